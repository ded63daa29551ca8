#include "torch_cuda.h"

#include "../arguments.h"
#include "lambda_value_loss.cuh"

namespace lambda_return::cuda {
namespace {

template <class value_t>
ValueLossInputs<value_t> device_inputs(const LambdaValueLossArguments& in, double gamma, double lam) {
  return {
      in.B,
      in.T,
      device_rows<value_t>(in.values),
      static_cast<const accumulate_t<value_t>*>(in.terminal_rewards.const_data_ptr()),
      device_rows<uint8_t>(in.attention_mask),
      device_rows<uint8_t>(in.loss_mask),
      gamma,
      lam};
}

// values [B, T], terminal_rewards [B], masks [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> lambda_value_loss(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& attention_mask, const Tensor& loss_mask,
    double gamma, double lam) {
  const OnDeviceOf device(values);
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  auto [loss, num_tokens] = new_mean_and_count(values);
  if (values.numel() == 0) return {loss, num_tokens};

  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    const auto inputs = device_inputs<value_t>(in, gamma, lam);
    const ScanPlan plan = inputs.plan();
    const Tensor scratch = workspace(values, lambda_value_loss_workspace_bytes<value_t>(plan));
    launch_lambda_value_loss<value_t>(
        inputs, static_cast<accumulate_t<value_t>*>(loss.mutable_data_ptr()), num_tokens.mutable_data_ptr<int64_t>(),
        plan, scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {loss, num_tokens};
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor lambda_value_loss_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& terminal_rewards,
    const Tensor& attention_mask, const Tensor& loss_mask, double gamma, double lam) {
  const OnDeviceOf device(values);
  const LambdaValueLossArguments in(values, terminal_rewards, attention_mask, loss_mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = torch::stable::new_empty(values, {in.B, in.T});
  if (grad_values.numel() == 0) return grad_values;

  THO_DISPATCH_V2(values.scalar_type(), "lambda_value_loss_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    const auto inputs = device_inputs<value_t>(in, gamma, lam);
    const ScanPlan plan = inputs.plan();
    const Tensor scratch = workspace(values, plan.workspace_bytes<accumulate_t<value_t>>());
    launch_lambda_value_loss_backward<value_t>(
        inputs, static_cast<const accumulate_t<value_t>*>(grad.grad_loss.const_data_ptr()),
        grad.num_tokens.const_data_ptr<int64_t>(), mutable_device_rows<value_t>(grad_values), plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("lambda_value_loss", TORCH_BOX(&lambda_value_loss));
  m.impl("lambda_value_loss_backward", TORCH_BOX(&lambda_value_loss_backward));
}

}  // namespace lambda_return::cuda
