#include "scan_rows.h"

namespace lambda_return::cpu {
namespace {

// values [B, T], targets [B, T], mask [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> masked_mse(const Tensor& values, const Tensor& targets, const Tensor& mask) {
  const MaskedMseArguments in(values, targets, mask);
  SquaredError error;
  THO_DISPATCH_V2(values.scalar_type(), "masked_mse", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto& k = kernels<scalar_t>();
    const auto v = const_rows<kernel_t<scalar_t>>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    const StretchErrors errors(in.B);
    parallel_rows(in.B, in.T, From::kLeft, [&](int64_t b) {
      if (in.targets_as_values()) {
        k.masked_mse(v[b], const_rows<kernel_t<scalar_t>>(in.targets)[b], m[b], in.T, errors.of(b));
      } else {
        k.masked_mse_of_wide(v[b], const_rows<acc_t>(in.targets)[b], m[b], in.T, errors.of(b));
      }
    });
    error = errors.sum();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return mean_and_count(error, values);
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor masked_mse_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& targets,
    const Tensor& mask) {
  const MaskedMseArguments in(values, targets, mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = new_tensor(values, {in.B, in.T}, values.scalar_type());

  THO_DISPATCH_V2(values.scalar_type(), "masked_mse_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto& k = kernels<scalar_t>();
    const auto v = const_rows<kernel_t<scalar_t>>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    const auto dv = mutable_rows<kernel_t<scalar_t>>(grad_values);
    const acc_t scale = gradient_scale<acc_t>(grad);
    parallel_rows(in.B, in.T, From::kLeft, [&](int64_t b) {
      if (in.targets_as_values()) {
        k.masked_mse_backward(v[b], const_rows<kernel_t<scalar_t>>(in.targets)[b], m[b], in.T, scale, dv[b]);
      } else {
        k.masked_mse_backward_of_wide(v[b], const_rows<acc_t>(in.targets)[b], m[b], in.T, scale, dv[b]);
      }
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
