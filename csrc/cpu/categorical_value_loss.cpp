// Cross-entropy of K logits a token against the lambda-returns of the values that they say.
//
// Forward: one pass over the logits leaves V, the largest logit and the logarithm of the sum, three numbers a token;
// the scan of td_lambda runs over V; and as each return comes out of it, the few logits are read again that its
// distribution is not 0 on. Backward: logits in, gradients out, once. Nothing of the size of the logits is kept but
// they themselves.
#include <algorithm>

#include "../categorical_arguments.h"
#include "loss_reduction.h"

namespace lambda_return::cpu {
namespace {

// Calls body(first, row, t, count) for blocks of the tokens of all rows, over threads: count of them, from token t of a
// row on, which is number first of all.
template <class Body>
void parallel_blocks(const Logits& logits, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / logits.K);
  torch::stable::parallel_for(0, logits.B * logits.T, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end;) {
      const int64_t row = first / logits.T, t = first % logits.T;
      const int64_t count = std::min({kBlock, end - first, logits.T - t});
      body(first, row, t, count);
      first += count;
    }
  });
}

// values, largest, log_sums <- what the logits say; log_sums inf where the token does not count.
template <class scalar_t>
void project(
    const Logits& in, const Bins<accumulate_t<scalar_t>>& bins, const Tensor& mask, const Tensor& attention_mask,
    const Tensor& values, const Tensor& largest, const Tensor& log_sums) {
  using acc_t = accumulate_t<scalar_t>;
  const auto logits = in.rows<kernel_t<scalar_t>>();
  const auto valid = const_rows_or_null<uint8_t>(mask), attended = const_rows_or_null<uint8_t>(attention_mask);
  auto* v = static_cast<acc_t*>(values.mutable_data_ptr());
  auto* most = static_cast<acc_t*>(largest.mutable_data_ptr());
  auto* log_sum = static_cast<acc_t*>(log_sums.mutable_data_ptr());
  parallel_blocks(in, [&](int64_t first, int64_t row, int64_t t, int64_t count) {
    kernels<scalar_t>().project_logits(
        bins, {logits.at(row, t), logits.token_stride, in.K, count}, valid.data == nullptr ? nullptr : valid[row] + t,
        attended.data == nullptr ? nullptr : attended[row] + t, v + first, most + first, log_sum + first);
  });
}

// Scans values for the returns, and takes the cross-entropy of each token that counts as its return comes.
template <class scalar_t>
void scan_and_compare(
    const Logits& logits, const Bins<accumulate_t<scalar_t>>& bins, const TdLambdaArguments& in, const Layout& layout,
    const Tensor& largest, const Tensor& log_sums, const Tensor& returns, LossReduction& loss) {
  using acc_t = accumulate_t<scalar_t>;
  const auto rows = logits.rows<kernel_t<scalar_t>>();
  const auto largest_rows = mutable_token_rows<acc_t>(largest);
  const auto log_sum_rows = mutable_token_rows<acc_t>(log_sums);
  const auto return_rows = mutable_token_rows<acc_t>(returns);
  const int64_t* offsets = layout.rows().offsets;
  TdLambdaScan<acc_t>(in, layout, in.lam).run([&](const Stretch& stretch) {
    return [&, stretch](const auto& block) {
      const int64_t row = offsets == nullptr ? stretch.row : 0;
      const int64_t token = block.begin + (offsets == nullptr ? 0 : offsets[stretch.row]);
      const acc_t* log_sum = layout.row_of(log_sum_rows, stretch.row) + block.begin;
      acc_t* out = layout.row_of(return_rows, stretch.row) + block.begin;
      acc_t* kept = loss.template losses_of<acc_t>(stretch.row);
      alignas(64) acc_t losses[kBlock];
      token_loops(acc_t()).finish_returns(block.carries, block.rewards, nullptr, block.mask, block.length, out);
      kernels<scalar_t>().cross_entropies(
          bins, {rows.at(row, token), rows.token_stride, logits.K, block.length}, out,
          layout.row_of(largest_rows, stretch.row) + block.begin, log_sum, losses);
      if (kept != nullptr) std::copy(losses, losses + block.length, kept + block.begin);
      TokenSums& sums = *loss.sums_of(stretch);
      for (int64_t t = 0; t < block.length; ++t) {
        if (log_sum[t] == not_counted<acc_t>()) continue;
        const double target = out[t], error = out[t] - block.values[t];
        sums.loss += losses[t];
        sums.tokens += 1;
        sums.returns += target;
        sums.squared_returns += target * target;
        sums.errors += error;
        sums.squared_errors += error * error;
      }
    };
  });
}

// grad_logits <- grad_loss * scale * (softmax - q) of each token that counts, 0 elsewhere.
template <class scalar_t>
void write_gradients(
    const CategoricalBackwardArguments& in, const Bins<accumulate_t<scalar_t>>& bins, const Layout& layout,
    const Tensor& grad_logits) {
  using acc_t = accumulate_t<scalar_t>;
  using value_t = kernel_t<scalar_t>;
  const int64_t K = in.in.K;
  const bool of_tokens = in.reduction == Reduction::kNone;
  const auto rows = in.in.rows<value_t>();
  const auto log_sums = const_rows<acc_t>(in.log_sums);
  const auto returns = const_rows<acc_t>(in.returns);
  const auto grad_rows = const_rows_or_null<acc_t>(of_tokens ? in.grad_loss : Tensor());
  const auto* grad = static_cast<const acc_t*>(in.grad_loss.const_data_ptr());
  const auto* scales = static_cast<const acc_t*>(in.scale.const_data_ptr());
  auto* out = static_cast<value_t*>(grad_logits.mutable_data_ptr());
  const int64_t* offsets = layout.rows().offsets;
  parallel_blocks(in.in, [&](int64_t first, int64_t row, int64_t t, int64_t count) {
    acc_t factors[kBlock];
    if (of_tokens) {
      std::copy(grad_rows[row] + t, grad_rows[row] + t + count, factors);
    } else if (offsets == nullptr) {
      std::fill(factors, factors + count, *grad * scales[row]);
    } else {  // the sequences that the block lies in
      int64_t sequence = std::upper_bound(offsets, offsets + in.shape.B, t) - offsets - 1;
      for (int64_t i = 0; i < count; ++sequence) {
        const int64_t end = std::min(count, offsets[sequence + 1] - t);
        for (; i < end; ++i) factors[i] = *grad * scales[sequence];
      }
    }
    kernels<scalar_t>().logit_gradients(
        bins, {rows.at(row, t), rows.token_stride, K, count}, returns[row] + t, log_sums[row] + t, factors,
        out + first * K);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> categorical_value_loss(
    const Tensor& logits, const Tensor& terminal_rewards, const OptionalTensor& mask,
    const OptionalTensor& attention_mask, const OptionalTensor& rewards, const OptionalTensor& cu_seqlens,
    const Tensor& gamma, const Tensor& lam, const OptionalTensor& normalizer, int64_t kind, double low, double high,
    double sigma, int64_t reduction) {
  check_bins(kind, low, high, sigma);
  const Logits tokens(logits, cu_seqlens.has_value());
  Tensor values = tokens.new_tokens(), largest = tokens.new_tokens(), log_sums = tokens.new_tokens(),
         returns = tokens.new_tokens();
  const TdLambdaArguments in(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam);
  const Tensor attention = in.shape.optional_mask(attention_mask, "attention_mask");
  const Layout layout(in.shape);
  LossReduction loss(in.shape, layout, checked_reduction(reduction), normalizer);
  THO_DISPATCH_V2(logits.scalar_type(), "categorical_value_loss", AT_WRAP([&] {
    const auto bins = Bins<accumulate_t<scalar_t>>::of(kind, tokens.K, low, high, sigma);
    project<scalar_t>(tokens, bins, in.mask, attention, values, largest, log_sums);
    scan_and_compare<scalar_t>(tokens, bins, in, layout, largest, log_sums, returns, loss);
  }), LAMBDA_RETURN_VALUE_TYPES);
  auto [result, scale, statistics] = loss.finish();
  return {result, scale, statistics, returns, log_sums};
}

Tensor categorical_value_loss_backward(
    const Tensor& grad_loss, const Tensor& scale, const Tensor& logits, const Tensor& returns, const Tensor& log_sums,
    const OptionalTensor& cu_seqlens, int64_t kind, double low, double high, double sigma, int64_t reduction) {
  check_bins(kind, low, high, sigma);
  const CategoricalBackwardArguments in(grad_loss, scale, logits, returns, log_sums, cu_seqlens, reduction);
  const Layout layout(in.shape);
  Tensor grad_logits = in.in.new_logits();
  THO_DISPATCH_V2(logits.scalar_type(), "categorical_value_loss_backward", AT_WRAP([&] {
    const auto bins = Bins<accumulate_t<scalar_t>>::of(kind, in.in.K, low, high, sigma);
    write_gradients<scalar_t>(in, bins, layout, grad_logits);
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("categorical_value_loss", TORCH_BOX(&categorical_value_loss));
  m.impl("categorical_value_loss_backward", TORCH_BOX(&categorical_value_loss_backward));
}

}  // namespace lambda_return::cpu
