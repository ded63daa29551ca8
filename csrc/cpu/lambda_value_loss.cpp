#include "scan_rows.h"

namespace lambda_return::cpu {
namespace {

// values [B, T], terminal_rewards [B], masks [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> lambda_value_loss(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& attention_mask, const Tensor& loss_mask,
    double gamma, double lam) {
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  SquaredError error;
  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss", AT_WRAP([&] {
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const int64_t per_row = stretches_of(in.T);
    const StretchErrors errors(in.B * per_row);
    scan_returns<scalar_t>(
        in.values, in.terminal_rewards, in.loss_mask, gamma, lam, a.follow(in.T),
        [&](const auto& k, const auto& constants, const Stretch& s, auto* v, auto* m, auto carry) {
          SquaredErrorLanes* error = errors.of(s.row * per_row + s.index);
          return k.lambda_value_loss(constants, v, a[s.row] + s.begin, m, s.length, carry, error);
        });
    error = errors.sum();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return mean_and_count(error, values);
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor lambda_value_loss_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& terminal_rewards,
    const Tensor& attention_mask, const Tensor& loss_mask, double gamma, double lam) {
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = new_tensor(values, {in.B, in.T}, values.scalar_type());

  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss_backward", AT_WRAP([&] {
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const auto dv = mutable_rows<kernel_t<scalar_t>>(grad_values);
    const auto scale = gradient_scale<accumulate_t<scalar_t>>(grad);
    scan_returns<scalar_t>(
        in.values, in.terminal_rewards, in.loss_mask, gamma, lam, a.follow(in.T),
        [&](const auto& k, const auto& constants, const Stretch& s, auto* v, auto* m, auto carry) {
          return k.lambda_value_loss_backward(
              constants, v, a[s.row] + s.begin, m, s.length, carry, scale, dv[s.row] + s.begin);
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
