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
    using acc_t = accumulate_t<scalar_t>;
    const auto v = const_rows<kernel_t<scalar_t>>(in.values);
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const auto m = const_rows<uint8_t>(in.loss_mask);
    const auto* r = static_cast<const acc_t*>(in.terminal_rewards.const_data_ptr());
    const auto discount = Discount<acc_t>::from(gamma, lam);
    const auto& k = kernels<scalar_t>();
    const auto constants = k.constants(discount);
    // One sum a stretch, added up in order whatever the number of threads.
    const int64_t per_row = stretches_per_row(in.T);
    std::vector<SquaredError> errors(in.B * per_row);
    scan_rows(
        in.B, in.T, From::kRight, AffineRule<acc_t>(discount), [&](int64_t b) { return r[b]; },
        [&](const Stretch& s) { return k.returns_map(constants, v[s.row] + s.begin, m[s.row] + s.begin, s.length); },
        [&](const Stretch& s, acc_t carry) {
          return k.lambda_value_loss(
              constants, v[s.row] + s.begin, a[s.row] + s.begin, m[s.row] + s.begin, s.length, carry,
              &errors[s.row * per_row + s.index]);
        },
        [](int64_t, acc_t) {});
    for (const SquaredError& part : errors) {
      error.add(part);
    }
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
    const auto v = const_rows<kernel_t<scalar_t>>(in.values);
    const auto a = const_rows<uint8_t>(in.attention_mask);
    const auto m = const_rows<uint8_t>(in.loss_mask);
    const auto dv = mutable_rows<kernel_t<scalar_t>>(grad_values);
    const auto* r = static_cast<const acc_t*>(in.terminal_rewards.const_data_ptr());
    const auto discount = Discount<acc_t>::from(gamma, lam);
    const acc_t scale = gradient_scale<acc_t>(grad);
    const auto& k = kernels<scalar_t>();
    const auto constants = k.constants(discount);
    scan_rows(
        in.B, in.T, From::kRight, AffineRule<acc_t>(discount), [&](int64_t b) { return r[b]; },
        [&](const Stretch& s) { return k.returns_map(constants, v[s.row] + s.begin, m[s.row] + s.begin, s.length); },
        [&](const Stretch& s, acc_t carry) {
          return k.lambda_value_loss_backward(
              constants, v[s.row] + s.begin, a[s.row] + s.begin, m[s.row] + s.begin, s.length, carry, scale,
              dv[s.row] + s.begin);
        },
        [](int64_t, acc_t) {});
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("lambda_value_loss", TORCH_BOX(&lambda_value_loss));
  m.impl("lambda_value_loss_backward", TORCH_BOX(&lambda_value_loss_backward));
}

}  // namespace lambda_return::cpu
