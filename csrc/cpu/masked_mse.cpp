#include "parallel_rows.h"

#include "../kernels/masked_mse.h"

namespace lambda_return::cpu {
namespace {

// Calls body(targets) with the rows of the targets in their own type.
template <class scalar_t, class Body>
void with_target_rows(const MaskedMseArguments& in, const Body& body) {
  if (in.targets_as_values()) {
    body(const_rows<scalar_t>(in.targets));
  } else {
    body(const_rows<accumulate_t<scalar_t>>(in.targets));
  }
}

// values [B, T], targets [B, T], mask [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> masked_mse(const Tensor& values, const Tensor& targets, const Tensor& mask) {
  const MaskedMseArguments in(values, targets, mask);
  SquaredError error;
  THO_DISPATCH_V2(values.scalar_type(), "masked_mse", AT_WRAP([&] {
    const auto v = const_rows<scalar_t>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    with_target_rows<scalar_t>(in, [&](auto g) {
      error = sum_over_rows(in.B, in.T, [&](int64_t b) { return masked_mse_row(v[b], g[b], m[b], in.T); });
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return mean_and_count(error, values);
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor masked_mse_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& targets,
    const Tensor& mask) {
  const MaskedMseArguments in(values, targets, mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = torch::stable::new_empty(values, {in.B, in.T});

  THO_DISPATCH_V2(values.scalar_type(), "masked_mse_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto v = const_rows<scalar_t>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    const auto dv = mutable_rows<scalar_t>(grad_values);
    const acc_t scale = gradient_scale<acc_t>(grad);
    with_target_rows<scalar_t>(in, [&](auto g) {
      parallel_rows(in.B, in.T, From::kLeft, [&](int64_t b) { masked_mse_backward_row(v[b], g[b], m[b], in.T, scale, dv[b]); });
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("masked_mse", TORCH_BOX(&masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&masked_mse_backward));
}

}  // namespace lambda_return::cpu
