#include "torch_cuda.h"

#include "eos_mask.cuh"

namespace lambda_return::cuda {
namespace {

// What one token of a mask of this dtype looks like as an unsigned word: see eos_mask_kernel.
template <class scalar_t>
struct MaskWord {
  static uint64_t one() {
    const scalar_t value(1);
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(value));
    return word;
  }
  static uint64_t value_bits() {
    const bool is_integer = std::numeric_limits<scalar_t>::is_integer;
    return is_integer ? ~uint64_t(0) : ~uint64_t(0) >> (65 - 8 * sizeof(scalar_t));
  }
};

// mask [B, T] -> [B, T] of the same dtype, 1 at the last valid position of each row and 0 elsewhere.
Tensor eos_mask(const Tensor& mask) {
  check_matrix(mask, "mask");
  const OnDeviceOf device(mask);
  const int64_t B = mask.size(0), T = mask.size(1);
  const Tensor rows = contiguous_rows(mask);
  Tensor eos = torch::stable::new_zeros(mask, {B, T});
  if (eos.numel() == 0) return eos;

  THO_DISPATCH_V2(mask.scalar_type(), "eos_mask", AT_WRAP([&] {
    using Word = MaskWord<scalar_t>;
    const auto launch = [&](auto word) {
      launch_eos_mask<decltype(word)>(
          B, T, rows.const_data_ptr(), rows.stride(0), Word::value_bits(), Word::one(), eos.mutable_data_ptr(),
          device.stream());
    };
    if constexpr (sizeof(scalar_t) == 1) launch(uint8_t());
    if constexpr (sizeof(scalar_t) == 2) launch(uint16_t());
    if constexpr (sizeof(scalar_t) == 4) launch(uint32_t());
    if constexpr (sizeof(scalar_t) == 8) launch(uint64_t());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), torch::headeronly::ScalarType::Bool, AT_EXPAND(AT_INTEGRAL_TYPES_V2), LAMBDA_RETURN_VALUE_TYPES);
  return eos;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) { m.impl("eos_mask", TORCH_BOX(&eos_mask)); }

}  // namespace lambda_return::cuda
