#include "parallel_rows.h"

#include "../kernels/eos_mask.h"

namespace lambda_return::cpu {
namespace {

// mask [B, T] -> [B, T] of the same dtype, 1 at the last valid position of each row and 0 elsewhere.
Tensor eos_mask(const Tensor& mask) {
  check_matrix(mask, "mask");
  const int64_t B = mask.size(0), T = mask.size(1);
  const Tensor mask_rows = contiguous_rows(mask);
  Tensor eos = torch::stable::new_zeros(mask, {B, T});

  THO_DISPATCH_V2(mask.scalar_type(), "eos_mask", AT_WRAP([&] {
    const auto m = const_rows<scalar_t>(mask_rows);
    const auto out = mutable_rows<scalar_t>(eos);
    parallel_rows(B, T, From::kRight, [&](int64_t b) {
      const int64_t last = last_valid_position(m[b], T);
      if (last >= 0) {
        out[b][last] = scalar_t(1);
      }
    });
  }), torch::headeronly::ScalarType::Bool, AT_EXPAND(AT_INTEGRAL_TYPES_V2), LAMBDA_RETURN_VALUE_TYPES);
  return eos;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) { m.impl("eos_mask", TORCH_BOX(&eos_mask)); }

}  // namespace lambda_return::cpu
