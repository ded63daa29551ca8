// The loss of one token's value against its target, its derivative, and the sums over tokens that are kept of both.
//
// With e = V - G, in the standard definitions:
//
//   mse         e^2                                              (no factor of one half)
//   huber       e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2)
//   smooth_l1   huber / delta
//   bce         -G log V - (1 - G) log(1 - V), logarithms no less than -100
//   bce_logits  the same with V = sigmoid(x), from the logit x: max(x, 0) - x G + log(1 + exp(-|x|))
//
// and, with values of a policy step ago, PPO's clipped form of the first three: the larger of the losses of V and of
// old + clamp(V - old, -clip_range, clip_range).
#pragma once

#include <cmath>

#include "numeric.h"

namespace lambda_return {

enum class LossKind : int64_t { kMse, kHuber, kSmoothL1, kBce, kBceLogits };
enum class Reduction : int64_t { kTokenMean, kSequenceMean, kSum, kNone };

template <class acc_t>
LAMBDA_RETURN_HOST_DEVICE acc_t sigmoid(acc_t x) {
#if !defined(__CUDA_ARCH__)
  using std::exp;
#endif
  const acc_t z = exp(x < 0 ? x : -x);  // no overflow on either side
  return (x < 0 ? z : acc_t(1)) / (acc_t(1) + z);
}

// What a token's loss says: the loss, its derivative with respect to the head's output, and whether clipping decided.
template <class acc_t>
struct TokenLossResult {
  acc_t loss, derivative;
  bool clipped;
};

template <class acc_t>
struct TokenLoss {
  LossKind kind;
  acc_t delta;       // of huber and smooth_l1, > 0
  acc_t clip_range;  // > 0; read where there are old values

  // The value V of the head's output x.
  LAMBDA_RETURN_HOST_DEVICE acc_t value(acc_t x) const { return kind == LossKind::kBceLogits ? sigmoid(x) : x; }

  // The regression losses, as a function of the error.
  LAMBDA_RETURN_HOST_DEVICE TokenLossResult<acc_t> of_error(acc_t e) const {
    if (kind == LossKind::kMse) return {e * e, acc_t(2) * e, false};
    const acc_t magnitude = e < 0 ? -e : e;
    const bool inside = !(magnitude > delta);  // a NaN is, and stays one
    const acc_t loss = inside ? acc_t(0.5) * e * e : delta * (magnitude - acc_t(0.5) * delta);
    const acc_t derivative = inside ? e : (e < 0 ? -delta : delta);
    return kind == LossKind::kHuber ? TokenLossResult<acc_t>{loss, derivative, false}
                                    : TokenLossResult<acc_t>{loss / delta, derivative / delta, false};
  }

  // x: the head's output, v = value(x), target: G.
  LAMBDA_RETURN_HOST_DEVICE TokenLossResult<acc_t> operator()(acc_t x, acc_t v, acc_t target) const {
#if !defined(__CUDA_ARCH__)
    using std::exp;
    using std::log;
    using std::log1p;
#endif
    if (kind == LossKind::kBceLogits) {
      const acc_t magnitude = x < 0 ? -x : x;
      return {(x > 0 ? x : acc_t(0)) - x * target + log1p(exp(-magnitude)), v - target, false};
    }
    if (kind == LossKind::kBce) {
      const acc_t log_v = log(v), log_rest = log1p(-v), least = acc_t(-100), tiny = acc_t(1e-12);
      const acc_t variance = v * (acc_t(1) - v);
      return {
          -target * (log_v < least ? least : log_v) - (acc_t(1) - target) * (log_rest < least ? least : log_rest),
          (v - target) / (variance < tiny ? tiny : variance), false};
    }
    return of_error(v - target);
  }

  LAMBDA_RETURN_HOST_DEVICE TokenLossResult<acc_t> clipped(acc_t v, acc_t old, acc_t target) const {
    const acc_t change = v - old;
    const bool outside = change > clip_range || change < -clip_range;
    const TokenLossResult<acc_t> free = of_error(v - target);
    if (!outside) return free;
    const acc_t bounded = old + (change < 0 ? -clip_range : clip_range);
    const TokenLossResult<acc_t> held = of_error(bounded - target);
    return held.loss > free.loss ? TokenLossResult<acc_t>{held.loss, acc_t(0), true} : free;
  }
};

// Sums over tokens, in float64. The five after the loss are sufficient for the explained variance, over any number of
// ranks after one sum.
struct TokenSums {
  double loss = 0;
  double tokens = 0, returns = 0, squared_returns = 0, errors = 0, squared_errors = 0, clipped = 0;  // errors: G - V

  static constexpr int kStatistics = 6;

  LAMBDA_RETURN_HOST_DEVICE void add(const TokenSums& other) {
    loss += other.loss;
    tokens += other.tokens;
    returns += other.returns;
    squared_returns += other.squared_returns;
    errors += other.errors;
    squared_errors += other.squared_errors;
    clipped += other.clipped;
  }
};

}  // namespace lambda_return
