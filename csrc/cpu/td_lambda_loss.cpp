#include "loss_reduction.h"

namespace lambda_return::cpu {
namespace {

// Runs take(block, row, loss block) over all tokens, with what the loss needs of each block laid out.
template <class scalar_t, class Take>
void for_loss_blocks(const TdLambdaLossArguments& in, const Layout& layout, const Take& take) {
  using acc_t = accumulate_t<scalar_t>;
  using value_t = kernel_t<scalar_t>;
  const auto attention = const_rows_or_null<uint8_t>(in.attention_mask);
  const auto old = const_rows_or_null<value_t>(in.old_values);
  const bool one_mask = !in.attention_mask.defined() ||
                        (in.mask.defined() && in.attention_mask.const_data_ptr() == in.mask.const_data_ptr() &&
                         in.attention_mask.stride(0) == in.mask.stride(0));
  TdLambdaScan<scalar_t>(in, layout, in.lam, in.kind == LossKind::kBceLogits).run([&](const Stretch& stretch) {
    const uint8_t* row_attention = one_mask ? nullptr : layout.row_of(attention, stretch.row);
    const value_t* row_old = layout.row_of(old, stretch.row);
    return [&take, stretch, row_attention, row_old](const auto& block) {
      alignas(64) acc_t old_values[kBlock];
      alignas(64) uint8_t both[kBlock];
      if (row_old != nullptr) kernels<scalar_t>().widen(row_old + block.begin, block.length, old_values);
      if (row_attention != nullptr) {
        for (int64_t t = 0; t < block.length; ++t) {
          both[t] = (block.mask[t] != 0) & (row_attention[block.begin + t] != 0);
        }
      }
      take(
          stretch, block,
          LossBlock<acc_t>{
              block.length, block.outputs, block.values, block.carries, block.rewards,
              row_old != nullptr ? old_values : nullptr, row_attention != nullptr ? both : block.mask, nullptr,
              nullptr});
    };
  });
}

std::tuple<Tensor, Tensor, Tensor> td_lambda_loss(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask,
    const OptionalTensor& attention_mask, const OptionalTensor& rewards, const OptionalTensor& old_values,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam, const OptionalTensor& normalizer,
    int64_t kind, double delta, double clip_range, int64_t reduction) {
  const TdLambdaLossArguments in(
      values, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam, kind, delta,
      clip_range, reduction);
  const Layout layout(in.shape);
  LossReduction loss(in.shape, layout, in.reduction, normalizer);
  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_loss", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto token_loss = in.token_loss<acc_t>();
    for_loss_blocks<scalar_t>(in, layout, [&](const Stretch& stretch, const auto& block, LossBlock<acc_t> tokens) {
      acc_t* losses = loss.losses_of<acc_t>(stretch.row);
      if (losses != nullptr) tokens.losses = losses + block.begin;
      token_loops(acc_t()).token_losses(token_loss, tokens, loss.sums_of(stretch));
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return loss.finish();
}

Tensor td_lambda_loss_backward(
    const Tensor& grad_loss, const Tensor& scale, const Tensor& values, const Tensor& terminal_rewards,
    const OptionalTensor& mask, const OptionalTensor& attention_mask, const OptionalTensor& rewards,
    const OptionalTensor& old_values, const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam,
    int64_t kind, double delta, double clip_range, int64_t reduction) {
  const TdLambdaLossArguments in(
      values, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam, kind, delta,
      clip_range, reduction);
  const Layout layout(in.shape);
  const bool of_tokens = in.reduction == Reduction::kNone;
  if (!of_tokens) check_scalar(grad_loss, "grad_loss", values);
  const Tensor grads = of_tokens ? in.shape.optional_accumulated(grad_loss, "grad_loss")
                                 : contiguous_as(grad_loss, accumulate_dtype(values));
  const Tensor scales = in.shape.per_sequence(scale, "scale");
  Tensor grad_values = in.shape.new_tokens();

  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_loss_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto token_loss = in.token_loss<acc_t>();
    const auto g = const_rows_or_null<acc_t>(of_tokens ? grads : Tensor());
    const auto dv = mutable_token_rows<kernel_t<scalar_t>>(grad_values);
    const auto* grad = static_cast<const acc_t*>(grads.const_data_ptr());
    const auto* row_scale = static_cast<const acc_t*>(scales.const_data_ptr());
    for_loss_blocks<scalar_t>(in, layout, [&](const Stretch& stretch, const auto& block, LossBlock<acc_t> tokens) {
      alignas(64) acc_t derivatives[kBlock];
      tokens.derivatives = derivatives;
      if (of_tokens) {
        tokens.factors = layout.row_of(g, stretch.row) + block.begin;
      } else {
        tokens.factor = *grad * row_scale[stretch.row];
      }
      token_loops(acc_t()).token_losses(token_loss, tokens, nullptr);
      kernels<scalar_t>().narrow(derivatives, block.length, layout.row_of(dv, stretch.row) + block.begin);
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("td_lambda_loss", TORCH_BOX(&td_lambda_loss));
  m.impl("td_lambda_loss_backward", TORCH_BOX(&td_lambda_loss_backward));
}

}  // namespace lambda_return::cpu
