#include "torch_cuda.h"

#include "../categorical_arguments.h"
#include "categorical_value_loss.cuh"
#include "td_lambda_inputs.h"

namespace lambda_return::cuda {
namespace {

template <class value_t>
CategoricalLossInputs<value_t> device_loss_inputs(
    const Logits& logits, const Bins<accumulate_t<value_t>>& bins, const TdLambdaArguments& in,
    const Tensor& attention_mask, Reduction reduction) {
  using acc_t = accumulate_t<value_t>;
  return {
      device_sequences(in.shape),
      logits.rows<value_t>(),
      bins,
      data_or_null<acc_t>(in.terminal_rewards),
      device_rows_or_null<uint8_t>(in.mask),
      device_rows_or_null<uint8_t>(attention_mask),
      device_rows_or_null<acc_t>(in.rewards),
      DiscountRows::of(in.gamma, in.lam),
      reduction};
}

template <class value_t>
CategoricalGradientInputs<value_t> device_gradient_inputs(
    const CategoricalBackwardArguments& in, const Bins<accumulate_t<value_t>>& bins) {
  using acc_t = accumulate_t<value_t>;
  const bool reduces = in.reduction != Reduction::kNone;
  return {
      device_sequences(in.shape),
      in.in.rows<value_t>(),
      bins,
      device_rows<acc_t>(in.returns),
      device_rows<acc_t>(in.log_sums),
      reduces ? data_or_null<acc_t>(in.grad_loss) : nullptr,
      reduces ? Rows<const acc_t>{} : device_rows<acc_t>(in.grad_loss),
      data_or_null<acc_t>(in.scale),
      in.reduction};
}

// logits [B, T, K] or [total, K], masks, rewards [B, T] or [total], terminal_rewards [B], normalizer 0-dim -> loss
// 0-dim, or of each token; scale [B]; statistics [6]; returns, log_sums [B, T] or [total].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> categorical_value_loss(
    const Tensor& logits, const Tensor& terminal_rewards, const OptionalTensor& mask,
    const OptionalTensor& attention_mask, const OptionalTensor& rewards, const OptionalTensor& cu_seqlens,
    const Tensor& gamma, const Tensor& lam, const OptionalTensor& normalizer, int64_t kind, double low, double high,
    double sigma, int64_t reduction) {
  check_bins(kind, low, high, sigma);
  const OnDeviceOf device(logits);
  const Logits tokens(logits, cu_seqlens.has_value());
  Tensor returns = tokens.new_tokens(), log_sums = tokens.new_tokens();
  // The scan's values are not there yet, and have the shape and dtype of its returns.
  const TdLambdaArguments in(returns, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam);
  const Tensor attention = in.shape.optional_mask(attention_mask, "attention_mask");
  const ScalarType acc = accumulate_dtype(logits);
  if (normalizer) check_scalar(*normalizer, "normalizer", logits);
  const Tensor divisor = normalizer ? contiguous_as(*normalizer, acc) : Tensor();
  const Reduction how = checked_reduction(reduction);
  const bool reduces = how != Reduction::kNone;
  Tensor loss = reduces ? torch::stable::new_empty(logits, {}, acc) : tokens.new_tokens();
  Tensor scale = torch::stable::new_empty(logits, {in.shape.B}, acc);
  Tensor statistics = torch::stable::new_empty(logits, {TokenSums::kStatistics}, ScalarType::Double);

  // Also where there is no token: what is written then is the kernel's to know.
  THO_DISPATCH_V2(logits.scalar_type(), "categorical_value_loss", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto bins = Bins<acc_t>::of(kind, tokens.K, low, high, sigma);
    const auto inputs = device_loss_inputs<value_t>(tokens, bins, in, attention, how);
    const ScanPlan plan = inputs.plan();
    const Tensor scratch = workspace(logits, categorical_value_loss_workspace_bytes<value_t>(inputs, plan));
    CategoricalLossOutputs<acc_t> out{};
    out.loss = reduces ? static_cast<acc_t*>(loss.mutable_data_ptr()) : nullptr;
    if (!reduces) out.losses = output_rows<acc_t>(loss);
    out.scale = static_cast<acc_t*>(scale.mutable_data_ptr());
    out.statistics = statistics.mutable_data_ptr<double>();
    out.returns = output_rows<acc_t>(returns);
    out.log_sums = output_rows<acc_t>(log_sums);
    launch_categorical_value_loss<value_t>(
        inputs, data_or_null<acc_t>(divisor), out, plan, scratch.mutable_data_ptr(), device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {loss, scale, statistics, returns, log_sums};
}

// grad_loss as the forward's loss, logits, then scale [B], returns and log_sums from the forward -> grad_logits.
Tensor categorical_value_loss_backward(
    const Tensor& grad_loss, const Tensor& scale, const Tensor& logits, const Tensor& returns, const Tensor& log_sums,
    const OptionalTensor& cu_seqlens, int64_t kind, double low, double high, double sigma, int64_t reduction) {
  check_bins(kind, low, high, sigma);
  const OnDeviceOf device(logits);
  const CategoricalBackwardArguments in(grad_loss, scale, logits, returns, log_sums, cu_seqlens, reduction);
  Tensor grad_logits = in.in.new_logits();
  if (grad_logits.numel() == 0) return grad_logits;

  THO_DISPATCH_V2(logits.scalar_type(), "categorical_value_loss_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    using acc_t = accumulate_t<value_t>;
    const auto bins = Bins<acc_t>::of(kind, in.in.K, low, high, sigma);
    launch_categorical_value_loss_backward<value_t>(
        device_gradient_inputs<value_t>(in, bins),
        {static_cast<value_t*>(grad_logits.mutable_data_ptr()), in.in.T * in.in.K, in.in.K}, device.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("categorical_value_loss", TORCH_BOX(&categorical_value_loss));
  m.impl("categorical_value_loss_backward", TORCH_BOX(&categorical_value_loss_backward));
}

}  // namespace lambda_return::cuda
