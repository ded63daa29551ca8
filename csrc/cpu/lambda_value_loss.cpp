#include "parallel_rows.h"

#include "../kernels/lambda_value_loss.h"

namespace lambda_return::cpu {
namespace {

// values [B, T], terminal_rewards [B], masks [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> lambda_value_loss(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& attention_mask, const Tensor& loss_mask,
    double gamma, double lam) {
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  SquaredError error;
  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto v = const_rows<scalar_t>(in.values);
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const auto m = const_rows<uint8_t>(in.loss_mask);
    const auto* r = static_cast<const acc_t*>(in.terminal_rewards.const_data_ptr());
    const auto discount = Discount<acc_t>::from(gamma, lam);
    error = sum_over_rows(in.B, in.T, [&](int64_t b) {
      return lambda_value_loss_row(v[b], a[b], m[b], in.T, r[b], discount);
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return mean_and_count(error, values);
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor lambda_value_loss_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& terminal_rewards,
    const Tensor& attention_mask, const Tensor& loss_mask, double gamma, double lam) {
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = torch::stable::new_empty(values, {in.B, in.T});

  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto v = const_rows<scalar_t>(in.values);
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const auto m = const_rows<uint8_t>(in.loss_mask);
    const auto dv = mutable_rows<scalar_t>(grad_values);
    const auto* r = static_cast<const acc_t*>(in.terminal_rewards.const_data_ptr());
    const auto discount = Discount<acc_t>::from(gamma, lam);
    const acc_t scale = gradient_scale<acc_t>(grad);
    parallel_rows(in.B, in.T, [&](int64_t b) {
      lambda_value_loss_backward_row(v[b], a[b], m[b], in.T, r[b], discount, scale, dv[b]);
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("lambda_value_loss", TORCH_BOX(&lambda_value_loss));
  m.impl("lambda_value_loss_backward", TORCH_BOX(&lambda_value_loss_backward));
}

}  // namespace lambda_return::cpu
