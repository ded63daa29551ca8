#include "torch_cuda.h"

#include "td_lambda_inputs.h"
#include "td_lambda_loss.cuh"

namespace lambda_return::cuda {
namespace {

template <class value_t>
TdLambdaLossInputs<value_t> device_loss_inputs(const TdLambdaLossArguments& in) {
  return {
      device_inputs<value_t>(in),
      device_rows_or_null<uint8_t>(in.attention_mask),
      device_rows_or_null<value_t>(in.old_values),
      DiscountRows::of(in.gamma, in.lam),
      in.token_loss<accumulate_t<value_t>>(),
      in.reduction};
}

// values, masks, rewards, old_values [B, T] or [total], terminal_rewards [B], normalizer 0-dim -> loss 0-dim, or of
// each token; scale [B]; statistics [6].
std::tuple<Tensor, Tensor, Tensor> td_lambda_loss(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask,
    const OptionalTensor& attention_mask, const OptionalTensor& rewards, const OptionalTensor& old_values,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam, const OptionalTensor& normalizer,
    int64_t kind, double delta, double clip_range, int64_t reduction) {
  const OnDeviceOf device(values);
  const TdLambdaLossArguments in(
      values, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam, kind, delta,
      clip_range, reduction);
  const ScalarType acc = accumulate_dtype(values);
  if (normalizer) check_scalar(*normalizer, "normalizer", values);
  const Tensor divisor = normalizer ? contiguous_as(*normalizer, acc) : Tensor();
  const bool reduces = in.reduction != Reduction::kNone;
  Tensor loss = reduces ? torch::stable::new_empty(values, {}, acc) : in.shape.new_tokens(acc);
  Tensor scale = torch::stable::new_empty(values, {in.shape.B}, acc);
  Tensor statistics = torch::stable::new_empty(values, {TokenSums::kStatistics}, ScalarType::Double);

  // Also where there is no token: what is written then is the kernel's to know.
  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_loss", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto inputs = device_loss_inputs<value_t>(in);
    const ScanPlan plan = inputs.plan(1);
    const Tensor scratch = workspace(values, td_lambda_loss_workspace_bytes<value_t>(inputs, plan));
    LossOutputs<acc_t> out{};
    if (reduces) {
      out.loss = static_cast<acc_t*>(loss.mutable_data_ptr());
    } else {
      out.losses = output_rows<acc_t>(loss);
    }
    out.scale = static_cast<acc_t*>(scale.mutable_data_ptr());
    out.statistics = statistics.mutable_data_ptr<double>();
    launch_td_lambda_loss<value_t>(
        inputs, data_or_null<acc_t>(divisor), out, plan, scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {loss, scale, statistics};
}

// grad_loss as the forward's loss, scale [B] from the forward, then its inputs -> grad_values as values.
Tensor td_lambda_loss_backward(
    const Tensor& grad_loss, const Tensor& scale, const Tensor& values, const Tensor& terminal_rewards,
    const OptionalTensor& mask, const OptionalTensor& attention_mask, const OptionalTensor& rewards,
    const OptionalTensor& old_values, const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam,
    int64_t kind, double delta, double clip_range, int64_t reduction) {
  const OnDeviceOf device(values);
  const TdLambdaLossArguments in(
      values, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam, kind, delta,
      clip_range, reduction);
  const ScalarType acc = accumulate_dtype(values);
  const bool reduces = in.reduction != Reduction::kNone;
  if (reduces) check_scalar(grad_loss, "grad_loss", values);
  const Tensor grad = reduces ? contiguous_as(grad_loss, acc) : in.shape.optional_accumulated(grad_loss, "grad_loss");
  const Tensor factors = in.shape.per_sequence(scale, "scale");
  Tensor grad_values = in.shape.new_tokens();
  if (grad_values.numel() == 0) return grad_values;

  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_loss_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto inputs = device_loss_inputs<value_t>(in);
    const ScanPlan plan = inputs.plan(1);
    const Tensor scratch = workspace(values, plan.workspace_bytes<acc_t>());
    launch_td_lambda_loss_backward<value_t>(
        inputs, reduces ? data_or_null<acc_t>(grad) : nullptr, reduces ? Rows<const acc_t>{} : device_rows<acc_t>(grad),
        data_or_null<acc_t>(factors), output_rows<value_t>(grad_values), plan, scratch.mutable_data_ptr(),
        device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("td_lambda_loss", TORCH_BOX(&td_lambda_loss));
  m.impl("td_lambda_loss_backward", TORCH_BOX(&td_lambda_loss_backward));
}

}  // namespace lambda_return::cuda
