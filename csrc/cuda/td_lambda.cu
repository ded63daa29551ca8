#include "torch_cuda.h"

#include "td_lambda.cuh"
#include "td_lambda_inputs.h"

namespace lambda_return::cuda {
namespace {

// Of the adjoint: the gradients of returns and their mask.
template <class value_t>
TdLambdaInputs<value_t> adjoint_inputs(const TokenShape& shape, const Tensor& grad_returns, const Tensor& mask) {
  return {device_sequences(shape), device_rows<value_t>(grad_returns), nullptr, device_rows_or_null<uint8_t>(mask), {}};
}

// values, mask, rewards [B, T] or [total], terminal_rewards [B] -> returns, or advantages, as values.
Tensor td_lambda(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask, const OptionalTensor& rewards,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam, bool advantages) {
  const OnDeviceOf device(values);
  const TdLambdaArguments in(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam);
  Tensor returns = in.shape.new_tokens();
  if (returns.numel() == 0) return returns;

  THO_DISPATCH_V2(values.scalar_type(), "td_lambda", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    const auto inputs = device_inputs<value_t>(in);
    const ScanPlan plan = inputs.plan(1);
    const Tensor scratch = workspace(values, plan.workspace_bytes<accumulate_t<value_t>>());
    launch_td_lambda<value_t>(
        inputs, {DiscountRows::of(in.gamma, in.lam), advantages, output_rows<value_t>(returns)}, plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return returns;
}

// As td_lambda: returns under lam_returns, advantages under lam_advantages.
std::tuple<Tensor, Tensor> td_lambda_pair(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask, const OptionalTensor& rewards,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam_returns, const Tensor& lam_advantages) {
  const OnDeviceOf device(values);
  const TdLambdaArguments in(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam_returns);
  const Tensor other_lam = in.shape.per_row(lam_advantages, "lam_advantages");
  Tensor returns = in.shape.new_tokens(), advantages = in.shape.new_tokens();
  if (returns.numel() == 0) return {returns, advantages};

  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_pair", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    const auto inputs = device_inputs<value_t>(in);
    const ScanPlan plan = inputs.plan(2);
    const Tensor scratch = workspace(values, plan.workspace_bytes<accumulate_t<value_t>>());
    launch_td_lambda_pair<value_t>(
        inputs, {DiscountRows::of(in.gamma, in.lam), false, output_rows<value_t>(returns)},
        {DiscountRows::of(in.gamma, other_lam), true, output_rows<value_t>(advantages)}, plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {returns, advantages};
}

// As td_lambda -> (a, b) [B, 2] of each row in the accumulation dtype.
Tensor td_lambda_map(
    const Tensor& values, const OptionalTensor& mask, const OptionalTensor& rewards, const OptionalTensor& cu_seqlens,
    const Tensor& gamma, const Tensor& lam) {
  const OnDeviceOf device(values);
  const TdLambdaArguments in(values, std::nullopt, mask, rewards, cu_seqlens, gamma, lam);
  Tensor maps = torch::stable::new_empty(values, {in.shape.B, 2}, accumulate_dtype(values));
  if (maps.numel() == 0) return maps;

  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_map", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto inputs = device_inputs<value_t>(in);
    const ScanPlan plan = inputs.plan(2);
    const Tensor scratch = workspace(values, plan.workspace_bytes<acc_t>());
    launch_td_lambda_map<value_t>(
        inputs, DiscountRows::of(in.gamma, in.lam), static_cast<acc_t*>(maps.mutable_data_ptr()), plan,
        scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return maps;
}

// grad_returns, mask [B, T] or [total] -> grad_values as grad_returns; grad_terminal_rewards [B] and grad_rewards, as
// grad_values or [0], in the accumulation dtype.
std::tuple<Tensor, Tensor, Tensor> td_lambda_backward(
    const Tensor& grad_returns, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const Tensor& gamma,
    const Tensor& lam, bool with_rewards) {
  const OnDeviceOf device(grad_returns);
  const TokenShape shape(grad_returns, "grad_returns", cu_seqlens);
  const Tensor rows = shape.rows(grad_returns), valid = shape.optional_mask(mask, "mask");
  const auto discounts = DiscountRows::of(shape.per_row(gamma, "gamma"), shape.per_row(lam, "lam"));
  const ScalarType acc = accumulate_dtype(grad_returns);
  Tensor grad_values = shape.new_tokens(), grad_terminal = torch::stable::new_empty(grad_returns, {shape.B}, acc);
  Tensor grad_rewards = with_rewards ? shape.new_tokens(acc) : torch::stable::new_empty(grad_returns, {0}, acc);
  if (grad_values.numel() == 0 && shape.B == 0) return {grad_values, grad_terminal, grad_rewards};

  THO_DISPATCH_V2(grad_returns.scalar_type(), "td_lambda_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto inputs = adjoint_inputs<value_t>(shape, rows, valid);
    const ScanPlan plan = inputs.plan(1);
    const Tensor scratch = workspace(grad_returns, plan.workspace_bytes<acc_t>());
    launch_td_lambda_backward<value_t>(
        inputs, discounts, output_rows<value_t>(grad_values), static_cast<acc_t*>(grad_terminal.mutable_data_ptr()),
        with_rewards ? output_rows<acc_t>(grad_rewards) : Rows<acc_t>{}, plan, scratch.mutable_data_ptr(),
        device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {grad_values, grad_terminal, grad_rewards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("td_lambda", TORCH_BOX(&td_lambda));
  m.impl("td_lambda_pair", TORCH_BOX(&td_lambda_pair));
  m.impl("td_lambda_map", TORCH_BOX(&td_lambda_map));
  m.impl("td_lambda_backward", TORCH_BOX(&td_lambda_backward));
}

}  // namespace lambda_return::cuda
