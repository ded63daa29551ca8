// Runs the shipped launch functions of categorical_value_loss under the emulator: a CategoricalCase is one set of
// inputs, checked against the definitions in float64.
#pragma once

#include "cuda/categorical_value_loss.cuh"
#include "sequence_cases.h"

namespace lambda_return::cuda::testing {

struct CategoricalCase {
  int64_t B, T, K;
  std::vector<int64_t> cu_seqlens = {};
  BinKind kind = BinKind::kHlGauss;
  double sigma = 0.75;
  Reduction reduction = Reduction::kTokenMean;
  bool optional_inputs = true;  // mask, attention mask, rewards
  int64_t gap = 0;              // logits between two tokens'
  std::optional<ScanPlan> plan = std::nullopt;
};

inline constexpr double kLow = -0.5, kHigh = 1.5, kLam = 0.9;

template <class scalar_t>
struct CategoricalInputs {
  using acc_t = accumulate_t<scalar_t>;

  CategoricalCase c;
  int64_t tokens;
  Array<scalar_t> logits;
  Array<acc_t> rewards, terminal_rewards, grad_losses;
  Array<uint8_t> mask, attention_mask;
  Array<double> gamma, lam;
  Array<int64_t> cu_seqlens;

  explicit CategoricalInputs(const CategoricalCase& c)
      : c(c),
        tokens(c.cu_seqlens.empty() ? c.B * c.T : c.T),
        logits(tokens * (c.K + c.gap) - c.gap),
        rewards(tokens),
        terminal_rewards(c.B),
        grad_losses(tokens),
        mask(tokens),
        attention_mask(tokens),
        gamma(c.B),
        lam(1),
        cu_seqlens(static_cast<int64_t>(c.cu_seqlens.size())) {
    Noise noise(static_cast<uint64_t>(c.B * 1000003 + c.T * 101 + c.K));
    for (int64_t t = 0; t < tokens; ++t) {
      const bool valid = noise.uniform() < 0.7 || !c.optional_inputs, attended = noise.uniform() < 0.8;
      const auto draw = [&] { return static_cast<acc_t>(valid ? 4 * noise.uniform() - 2 : kNaN); };
      mask[t] = mask_byte(valid, noise);
      attention_mask[t] = mask_byte(attended, noise);
      rewards[t] = draw() / 8;
      grad_losses[t] = draw();
      for (int64_t k = 0; k < c.K; ++k) logits[t * (c.K + c.gap) + k] = narrow<scalar_t>(draw());
    }
    lam[0] = kLam;
    for (int64_t b = 0; b < c.B; ++b) {
      gamma[b] = 1 - 0.02 * noise.uniform();
      terminal_rewards[b] = static_cast<acc_t>(noise.uniform());
    }
    std::copy(c.cu_seqlens.begin(), c.cu_seqlens.end(), cu_seqlens.data());
  }

  Sequences sequences() const { return {c.B, c.T, c.cu_seqlens.empty() ? nullptr : cu_seqlens.data()}; }
  Sequences::Span span(int64_t b) const {
    return c.cu_seqlens.empty() ? Sequences::Span{b * c.T, c.T} : sequences().span(b);
  }
  template <class T>
  Rows<T> rows(T* data, bool present = true) const {
    return {present ? data : nullptr, c.T};
  }
  LogitRows<const scalar_t> logit_rows() const { return {logits.data(), c.T * (c.K + c.gap), c.K + c.gap}; }
  template <class T>
  Bins<T> bins() const {
    return Bins<T>::of(static_cast<int64_t>(c.kind), c.K, kLow, kHigh, c.sigma);
  }
  CategoricalLossInputs<scalar_t> loss() const {
    return {
        sequences(),
        logit_rows(),
        bins<acc_t>(),
        terminal_rewards.data(),
        rows<const uint8_t>(mask.data(), c.optional_inputs),
        rows<const uint8_t>(attention_mask.data(), c.optional_inputs),
        rows<const acc_t>(rewards.data(), c.optional_inputs),
        {gamma.data(), lam.data(), 1, 0},
        c.reduction};
  }
};

template <class scalar_t>
struct CategoricalOutputs {
  using acc_t = accumulate_t<scalar_t>;

  Array<scalar_t> gradient;
  Array<acc_t> returns, log_sums, loss, scale;
  Array<double> statistics{TokenSums::kStatistics};

  explicit CategoricalOutputs(const CategoricalCase& c, int64_t tokens)
      : gradient(tokens * c.K),
        returns(tokens),
        log_sums(tokens),
        loss(c.reduction == Reduction::kNone ? tokens : 1),
        scale(c.B) {}

  template <class Other, class Body>
  void for_each(const Other& other, const Body& body) const {
    body("gradient", gradient, other.gradient);
    body("returns", returns, other.returns);
    body("log_sums", log_sums, other.log_sums);
    body("loss", loss, other.loss);
    body("scale", scale, other.scale);
    body("statistics", statistics, other.statistics);
  }
};

inline constexpr double kGradLoss = 2;

// gradient: where it goes, else into the outputs.
template <class scalar_t>
CategoricalOutputs<scalar_t> run(
    const CategoricalInputs<scalar_t>& in, const CategoricalLossInputs<scalar_t>& loss,
    const std::optional<LogitRows<scalar_t>>& gradient = std::nullopt) {
  using acc_t = accumulate_t<scalar_t>;
  CategoricalOutputs<scalar_t> out(in.c, in.tokens);
  const ScanPlan plan = in.c.plan.value_or(loss.plan());
  const bool reduces = in.c.reduction != Reduction::kNone;
  launch_categorical_value_loss<scalar_t>(
      loss, nullptr,
      {{reduces ? out.loss.data() : nullptr, in.rows(out.loss.data(), !reduces), out.scale.data(),
        out.statistics.data()},
       in.rows(out.returns.data()),
       in.rows(out.log_sums.data())},
      plan, Workspace(categorical_value_loss_workspace_bytes<scalar_t>(loss, plan)).data(), nullptr);
  const acc_t grad_loss = kGradLoss;
  if (in.tokens == 0) return out;
  launch_categorical_value_loss_backward<scalar_t>(
      {loss.sequences, loss.logits, loss.bins, in.template rows<const acc_t>(out.returns.data()),
       in.template rows<const acc_t>(out.log_sums.data()), reduces ? &grad_loss : nullptr,
       in.template rows<const acc_t>(in.grad_losses.data(), !reduces), out.scale.data(), in.c.reduction},
      gradient.value_or(LogitRows<scalar_t>{out.gradient.data(), in.c.T * in.c.K, in.c.K}), nullptr);
  return out;
}
template <class scalar_t>
CategoricalOutputs<scalar_t> run(const CategoricalInputs<scalar_t>& in) {
  return run(in, in.loss());
}

// The definitions in float64.
template <class scalar_t>
CategoricalOutputs<double> expected_outputs(const CategoricalInputs<scalar_t>& in) {
  using acc_t = accumulate_t<scalar_t>;
  const CategoricalCase& c = in.c;
  const int64_t K = c.K;
  CategoricalOutputs<double> e(c, in.tokens);
  e.for_each(e, [](const char*, const auto& array, const auto&) { std::fill_n(array.data(), array.size, 0.0); });
  std::fill_n(e.log_sums.data(), in.tokens, kInf);
  const auto bins = in.template bins<double>();
  std::vector<double> sums(static_cast<size_t>(c.B)), counts(sums.size());
  for (int64_t b = 0; b < c.B; ++b) {
    const auto [begin, length] = in.span(b);
    const auto rounded = in.loss().discounts.template at<acc_t>(b);
    const Discount<double> discount{double(rounded.value), double(rounded.carry)};
    double h = in.terminal_rewards[b];
    for (int64_t t = begin + length - 1; t >= begin; --t) {
      if (c.optional_inputs && in.mask[t] == 0) continue;
      std::vector<double> x;
      for (int64_t k = 0; k < K; ++k) x.push_back(static_cast<double>(widen(in.logits[t * (K + c.gap) + k])));
      const double largest = *std::max_element(x.begin(), x.end());
      double sum = 0, index = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double p = std::exp(x[static_cast<size_t>(k)] - largest);
        sum += p;
        index += p * static_cast<double>(k);
      }
      const double v = bins.value(index / sum), g = h + (c.optional_inputs ? double(in.rewards[t]) : 0.0);
      e.returns[t] = g;
      h = discount.step(v, g);
      if (c.optional_inputs && in.attention_mask[t] == 0) continue;
      e.log_sums[t] = std::log(sum);
      double loss = e.log_sums[t];
      const auto target = bins.target(g);
      for (int64_t k = 0; k < K; ++k) {
        const double log_p = x[static_cast<size_t>(k)] - largest, q = bins.weight(target, k);
        loss -= q * log_p;
        e.gradient[t * K + k] = std::exp(log_p) / sum - q;
      }
      sums[static_cast<size_t>(b)] += loss;
      ++counts[static_cast<size_t>(b)];
      if (c.reduction == Reduction::kNone) e.loss[t] = loss;
      const double terms[] = {1, g, g * g, g - v, (g - v) * (g - v)};
      for (int i = 0; i < 5; ++i) e.statistics[i] += terms[i];
    }
  }
  const auto sequences =
      static_cast<double>(std::count_if(counts.begin(), counts.end(), [](double n) { return n > 0; }));
  for (int64_t b = 0; b < c.B; ++b) {
    const double count = counts[static_cast<size_t>(b)];
    const double divisor = c.reduction == Reduction::kTokenMean      ? e.statistics[0]
                           : c.reduction == Reduction::kSequenceMean ? count * sequences
                                                                     : 1;
    e.scale[b] = divisor == 0 ? 0 : 1 / divisor;
    if (c.reduction != Reduction::kNone) e.loss[0] += sums[static_cast<size_t>(b)] * e.scale[b];
    const auto [begin, length] = in.span(b);
    for (int64_t t = begin; t < begin + length; ++t) {
      if (e.log_sums[t] == kInf) continue;
      const double factor = c.reduction == Reduction::kNone ? double(in.grad_losses[t]) : kGradLoss * e.scale[b];
      for (int64_t k = 0; k < K; ++k) e.gradient[t * K + k] *= factor;
    }
  }
  return e;
}

template <class scalar_t>
void check_categorical(const CategoricalOutputs<scalar_t>& actual, const CategoricalOutputs<double>& exact, int64_t K) {
  actual.for_each(exact, [&](const char* name, const auto& ours, const Array<double>& wanted) {
    using element_t = std::remove_cvref_t<decltype(ours[0])>;
    double largest = 0;
    for (int64_t i = 0; i < wanted.size; ++i) {
      if (wanted[i] != kInf) largest = std::fmax(largest, std::abs(wanted[i]));
    }
    for (int64_t i = 0; i < wanted.size; ++i) {
      const double value = static_cast<double>(widen(ours[i]));
      // The place of a target is a number of up to K.
      const double accumulated = 16 * (4 + double(K)) * kRounding<accumulate_t<scalar_t>>;
      const double error = std::abs(value - wanted[i]);
      if (value == wanted[i] || error <= kRounding<element_t> * std::abs(wanted[i]) + accumulated * largest) continue;
      char text[160];
      std::snprintf(
          text, sizeof(text), "%s[%lld] is %.9g, not %.9g", name, static_cast<long long>(i), value, wanted[i]);
      return expect(false, text);
    }
  });
}

// Right under the first schedule, the same bits under all others.
template <class scalar_t>
void test_categorical(const CategoricalCase& c, const std::vector<ScheduleSpec>& schedules) {
  current_case = std::string("categorical, ") + kTypeName<scalar_t> + " [" + std::to_string(c.B) + ", " +
                 std::to_string(c.T) + ", " + std::to_string(c.K) + "]" + (c.cu_seqlens.empty() ? "" : " packed") +
                 ", kind " + std::to_string(static_cast<int>(c.kind)) + ", reduction " +
                 std::to_string(static_cast<int>(c.reduction));
  const CategoricalInputs<scalar_t> in(c);
  std::optional<CategoricalOutputs<scalar_t>> first;
  for (const ScheduleSpec& spec : schedules) {
    const std::string name = use_schedule(spec.order, spec.seed, spec.resident_blocks);
    CategoricalOutputs<scalar_t> out = run(in);
    if (first) {
      first->for_each(out, [&](const char* what, const auto& a, const auto& b) {
        expect(a.same_bits(b), what + (" has other bits under schedule " + name));
      });
    } else {
      check_categorical(out, expected_outputs(in), c.K);
      first.emplace(std::move(out));
    }
  }
}

}  // namespace lambda_return::cuda::testing
