// Cross-entropy of K logits a token against the lambda-returns of the values that they say.
//
// Forward: one pass over the logits leaves V, the largest logit and the logarithm of the sum, three numbers a token;
// the scan of td_lambda runs over V; and as each return comes out of it, the few logits are read again that its
// distribution is not 0 on. Backward: logits in, gradients out, once. Nothing of the size of the logits is kept but
// they themselves.
#if defined(__GNUC__) && !defined(__clang__)
// A comparison that might raise a floating-point flag, which nobody reads, would keep loops from becoming vectors.
#pragma GCC optimize("no-trapping-math", "no-math-errno")
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "../categorical_arguments.h"
#include "loss_reduction.h"

namespace lambda_return::cpu {
namespace {

// exp(x) for x <= 0: as exact as the library's, and something that the compiler can vectorise. A NaN stays one.
inline double exp_of(double x) { return std::exp(x); }
inline float exp_of(float x) {
  constexpr float kLeast = -87.0f, kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it comes out rounded
  const float held = x < kLeast ? kLeast : x;
  const float shifted = held * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (held - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) - 0x4B400000u + 127u) << 23);
  return x < kLeast ? 0.0f : (p * r * r + r + 1.0f) * power;
}

constexpr int kLanes = 16;  // sums run in so many parts, which the compiler makes vectors of

// A token's logits in the accumulation type, and -inf up to a multiple of kLanes.
template <class acc_t>
class LogitBuffer {
 public:
  explicit LogitBuffer(int64_t K) : K_(K), memory_((K + kLanes - 1) / kLanes * kLanes) {}

  template <class scalar_t>
  void load(const kernel_t<scalar_t>* logits) {
    kernels<scalar_t>().widen(logits, K_, memory_.data());
    std::fill(memory_.begin() + K_, memory_.end(), -std::numeric_limits<acc_t>::infinity());
  }
  acc_t* data() { return memory_.data(); }

  acc_t largest() const {
    const acc_t* x = memory_.data();
    acc_t most[kLanes];
    std::copy(x, x + kLanes, most);
    for (int64_t k = kLanes; k < static_cast<int64_t>(memory_.size()); k += kLanes) {
      for (int i = 0; i < kLanes; ++i) most[i] = x[k + i] > most[i] ? x[k + i] : most[i];
    }
    return *std::max_element(most, most + kLanes);
  }

  // V and log sum.
  std::pair<acc_t, acc_t> project(const Bins<acc_t>& bins, acc_t largest) const {
    const int64_t padded = static_cast<int64_t>(memory_.size());
    const acc_t* x = memory_.data();
    acc_t sums[kLanes] = {}, indices[kLanes] = {};
    for (int64_t k = 0; k < padded; k += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const acc_t e = exp_of(x[k + i] - largest);
        sums[i] += e;
        indices[i] += e * static_cast<acc_t>(static_cast<int>(k) + i);
      }
    }
    acc_t sum = 0, index = 0;
    for (int i = 0; i < kLanes; ++i) {
      sum += sums[i];
      index += indices[i];
    }
    return {bins.value(index / sum), std::log(sum)};
  }

 private:
  int64_t K_;
  std::vector<acc_t> memory_;
};

// Calls body(begin, end) for ranges of the tokens of all rows, over threads.
template <class Body>
void parallel_tokens(const Logits& logits, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / logits.K);
  torch::stable::parallel_for(0, logits.B * logits.T, grain, body);
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
  parallel_tokens(in, [&](int64_t begin, int64_t end) {
    LogitBuffer<acc_t> buffer(in.K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / in.T, t = i % in.T;
      v[i] = 0;
      log_sum[i] = not_counted<acc_t>();
      if (valid.data != nullptr && valid[b][t] == 0) continue;  // its logits are not even read
      buffer.template load<scalar_t>(logits.at(b, t));
      most[i] = buffer.largest();
      const auto [value, sum] = buffer.project(bins, most[i]);
      v[i] = value;
      if (attended.data == nullptr || attended[b][t] != 0) log_sum[i] = sum;
    }
  });
}

// Scans values for the returns, and takes the cross-entropy of each token that counts as its return comes.
template <class scalar_t>
void scan_and_compare(
    const Logits& logits, const Bins<accumulate_t<scalar_t>>& bins, const TdLambdaArguments& in, const Layout& layout,
    const Tensor& largest, const Tensor& log_sums, const Tensor& returns, LossReduction& loss) {
  using acc_t = accumulate_t<scalar_t>;
  const auto rows = logits.rows<scalar_t>();
  const auto largest_rows = mutable_token_rows<acc_t>(largest);
  const auto log_sum_rows = mutable_token_rows<acc_t>(log_sums);
  const auto return_rows = mutable_token_rows<acc_t>(returns);
  const int64_t* offsets = layout.rows().offsets;
  TdLambdaScan<acc_t>(in, layout, in.lam).run([&](const Stretch& stretch) {
    return [&, stretch](const auto& block) {
      const acc_t* most = layout.row_of(largest_rows, stretch.row) + block.begin;
      const acc_t* log_sum = layout.row_of(log_sum_rows, stretch.row) + block.begin;
      acc_t* out = layout.row_of(return_rows, stretch.row) + block.begin;
      acc_t* losses = loss.template losses_of<acc_t>(stretch.row);
      TokenSums& sums = *loss.sums_of(stretch);
      for (int64_t t = 0; t < block.length; ++t) {
        const acc_t g = block.carries[t] + (block.rewards == nullptr ? acc_t(0) : block.rewards[t]);
        out[t] = block.mask[t] != 0 ? g : acc_t(0);
        acc_t token_loss = 0;
        if (log_sum[t] != not_counted<acc_t>()) {
          const int64_t token = block.begin + t;
          const scalar_t* x =
              offsets == nullptr ? rows.at(stretch.row, token) : rows.at(0, offsets[stretch.row] + token);
          acc_t expected = 0;  // the logit under q, less the largest
          bins.for_weights(bins.target(g), [&](int64_t k, acc_t q) {
            if (q != 0) expected += q * (static_cast<acc_t>(x[k]) - most[t]);  // a logit of -inf may be where q is 0
          });
          token_loss = log_sum[t] - expected;
          const double target = g, error = g - block.values[t];
          sums.loss += token_loss;
          sums.tokens += 1;
          sums.returns += target;
          sums.squared_returns += target * target;
          sums.errors += error;
          sums.squared_errors += error * error;
        }
        if (losses != nullptr) losses[block.begin + t] = token_loss;
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
  const int64_t K = in.in.K, T = in.in.T;
  const bool of_tokens = in.reduction == Reduction::kNone;
  const auto rows = in.in.rows<value_t>();
  const auto log_sums = const_rows<acc_t>(in.log_sums);
  const auto returns = const_rows<acc_t>(in.returns);
  const auto grad_rows = const_rows_or_null<acc_t>(of_tokens ? in.grad_loss : Tensor());
  const auto* grad = static_cast<const acc_t*>(in.grad_loss.const_data_ptr());
  const auto* scales = static_cast<const acc_t*>(in.scale.const_data_ptr());
  auto* out = static_cast<value_t*>(grad_logits.mutable_data_ptr());
  const int64_t* offsets = layout.rows().offsets;
  parallel_tokens(in.in, [&](int64_t begin, int64_t end) {
    LogitBuffer<acc_t> buffer(K);
    int64_t sequence = offsets == nullptr ? 0 : std::upper_bound(offsets, offsets + in.shape.B, begin) - offsets - 1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T, t = i % T;
      if (offsets == nullptr) sequence = b;
      while (offsets != nullptr && i >= offsets[sequence + 1]) ++sequence;
      const acc_t log_sum = log_sums[b][t];
      if (log_sum == not_counted<acc_t>()) {
        std::memset(static_cast<void*>(out + i * K), 0, K * sizeof(value_t));
        continue;
      }
      const acc_t factor = of_tokens ? grad_rows[b][t] : *grad * scales[sequence];
      buffer.template load<scalar_t>(rows.at(b, t));
      acc_t* x = buffer.data();
      const acc_t largest = buffer.largest();
      for (int64_t k = 0; k < K; ++k) x[k] = factor * exp_of((x[k] - largest) - log_sum);
      bins.for_weights(bins.target(returns[b][t]), [&](int64_t k, acc_t q) { x[k] -= factor * q; });
      kernels<scalar_t>().narrow(x, K, out + i * K);
    }
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
