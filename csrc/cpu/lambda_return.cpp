#include "scan_rows.h"

namespace lambda_return::cpu {
namespace {

// values [B, T], terminal_rewards [B], mask [B, T] -> returns [B, T] in the dtype of values.
Tensor lambda_return(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& mask, double gamma, double lam) {
  const LambdaReturnArguments in(values, terminal_rewards, mask);
  Tensor returns = new_tensor(values, {in.B, in.T}, values.scalar_type());

  THO_DISPATCH_V2(values.scalar_type(), "lambda_return", AT_WRAP([&] {
    const auto g = mutable_rows<kernel_t<scalar_t>>(returns);
    scan_returns<scalar_t>(
        in.values, in.terminal_rewards, in.mask, gamma, lam, true,
        [&](const auto& k, const auto& constants, const Stretch& s, auto* v, auto* m, auto carry) {
          return k.lambda_return(constants, v, m, s.length, carry, g[s.row] + s.begin);
        });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return returns;
}

// grad_returns [B, T], mask [B, T] -> grad_values [B, T] in the dtype of grad_returns, grad_terminal_rewards [B] in
// its accumulation dtype.
std::tuple<Tensor, Tensor> lambda_return_backward(
    const Tensor& grad_returns, const Tensor& mask, double gamma, double lam) {
  const LambdaReturnBackwardArguments in(grad_returns, mask);
  Tensor grad_values = new_tensor(grad_returns, {in.B, in.T}, grad_returns.scalar_type());
  Tensor grad_rewards = new_tensor(grad_returns, {in.B}, accumulate_dtype(grad_returns));

  THO_DISPATCH_V2(grad_returns.scalar_type(), "lambda_return_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto g = const_rows<kernel_t<scalar_t>>(in.grad_returns);
    const auto m = const_rows<uint8_t>(in.mask);
    const auto dv = mutable_rows<kernel_t<scalar_t>>(grad_values);
    auto* dr = static_cast<acc_t*>(grad_rewards.mutable_data_ptr());
    const auto discount = Discount<acc_t>::from(gamma, lam);
    const auto& k = kernels<scalar_t>();
    const auto constants =
        k.constants(discount, prefetch_for<scalar_t>(in.B * in.T, g.follow(in.T) && m.follow(in.T)));
    scan_rows<acc_t>(
        {in.B, in.T}, From::kLeft, [&](int64_t) { return AffineRule<acc_t>(discount); },
        [](int64_t) { return acc_t(0); },
        [&](const Stretch& s) { return k.adjoint_map(constants, g[s.row] + s.begin, m[s.row] + s.begin, s.length); },
        [&](const Stretch& s, acc_t carry) {
          return k.lambda_return_backward(
              constants, g[s.row] + s.begin, m[s.row] + s.begin, s.length, carry, dv[s.row] + s.begin);
        },
        [&](int64_t b, acc_t adjoint) { dr[b] = adjoint; });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {grad_values, grad_rewards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("lambda_return", TORCH_BOX(&lambda_return));
  m.impl("lambda_return_backward", TORCH_BOX(&lambda_return_backward));
}

}  // namespace lambda_return::cpu
