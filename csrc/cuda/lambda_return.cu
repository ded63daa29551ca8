#include "torch_cuda.h"

#include "../arguments.h"
#include "lambda_return.cuh"

namespace lambda_return::cuda {
namespace {

// values [B, T], terminal_rewards [B], mask [B, T] -> returns [B, T] in the dtype of values.
Tensor lambda_return(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& mask, double gamma, double lam) {
  const OnDeviceOf device(values);
  const LambdaReturnArguments in(values, terminal_rewards, mask);
  Tensor returns = torch::stable::new_empty(values, {in.B, in.T});
  if (returns.numel() == 0) return returns;

  THO_DISPATCH_V2(values.scalar_type(), "lambda_return", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto plan = ScanPlan::of(in.B, in.T, kItems<value_t>);
    const Tensor scratch = workspace(values, plan.workspace_bytes<acc_t>());
    launch_lambda_return<value_t>(
        in.B, in.T, device_rows<value_t>(in.values), static_cast<const acc_t*>(in.terminal_rewards.const_data_ptr()),
        device_rows<uint8_t>(in.mask), gamma, lam, mutable_device_rows<value_t>(returns), plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return returns;
}

// grad_returns [B, T], mask [B, T] -> grad_values [B, T] in the dtype of grad_returns, grad_terminal_rewards [B] in
// its accumulation dtype.
std::tuple<Tensor, Tensor> lambda_return_backward(
    const Tensor& grad_returns, const Tensor& mask, double gamma, double lam) {
  const OnDeviceOf device(grad_returns);
  const LambdaReturnBackwardArguments in(grad_returns, mask);
  Tensor grad_values = torch::stable::new_empty(grad_returns, {in.B, in.T});
  // No tokens, no gradient; otherwise every row writes its own.
  Tensor grad_rewards = in.T == 0 ? torch::stable::new_zeros(grad_returns, {in.B}, accumulate_dtype(grad_returns))
                                  : torch::stable::new_empty(grad_returns, {in.B}, accumulate_dtype(grad_returns));
  if (grad_values.numel() == 0) return {grad_values, grad_rewards};

  THO_DISPATCH_V2(grad_returns.scalar_type(), "lambda_return_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto plan = ScanPlan::of(in.B, in.T, kItems<value_t>);
    const Tensor scratch = workspace(grad_returns, plan.workspace_bytes<acc_t>());
    launch_lambda_return_backward<value_t>(
        in.B, in.T, device_rows<value_t>(in.grad_returns), device_rows<uint8_t>(in.mask), gamma, lam,
        mutable_device_rows<value_t>(grad_values), static_cast<acc_t*>(grad_rewards.mutable_data_ptr()), plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {grad_values, grad_rewards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("lambda_return", TORCH_BOX(&lambda_return));
  m.impl("lambda_return_backward", TORCH_BOX(&lambda_return_backward));
}

}  // namespace lambda_return::cuda
