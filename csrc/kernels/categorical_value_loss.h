// Values as classification: what K logits of a token say, and their cross-entropy against a target.
//
// The K bins stand for the values c_k = first + k width, evenly spaced. Logits x say
//
//   V = sum_k softmax(x)_k c_k        softmax(x)_k = exp(x_k - m - s),  m = max x,  s = log sum_k exp(x_k - m)
//
// and a target G, clamped to the range of the bins, is the distribution q(G) over them:
//
//   two_hot    (c_0 = low, c_{K-1} = high)  the two neighbours of G, in proportion
//   hl_gauss   (middles of K intervals from low to high)  a Gaussian around G with standard deviation sigma widths, cut
//              into the intervals: q_k = (F(high end of k) - F(low end of k)) / (F(high) - F(low))
//
// As q sums to 1, the loss needs only the logits where q is not 0, and its gradient no other sum over k:
//
//   loss = -sum_k q_k log softmax(x)_k = s - sum_k q_k (x_k - m)
//   d loss / d x_k = exp(x_k - m - s) - q_k
//
// s is kept for the backward and m found anew: their sum would round away what large logits differ by.
//
// A Gaussian ends here at 9 standard deviations, beyond which is less than 1e-18 of it; in float32 at 6, beyond which
// is less than 2e-9.
#pragma once

#include <cmath>

#include "numeric.h"

namespace lambda_return {

enum class BinKind : int64_t { kHlGauss, kTwoHot };

// The s of a token that does not count: another one has log 1 <= s <= log K, or NaN.
template <class acc_t>
LAMBDA_RETURN_HOST_DEVICE acc_t not_counted() {
  return static_cast<acc_t>(INFINITY);
}

// erfc(|z|): twice the share of a Gaussian beyond z standard deviations times the square root of 2.
LAMBDA_RETURN_HOST_DEVICE float gaussian_tail(float z) { return erfcf(fabsf(z)); }
LAMBDA_RETURN_HOST_DEVICE double gaussian_tail(double z) { return erfc(fabs(z)); }
LAMBDA_RETURN_HOST_DEVICE float round_down(float x) { return floorf(x); }
LAMBDA_RETURN_HOST_DEVICE double round_down(double x) { return floor(x); }

// The share between two places, times 2, from their tails: without cancellation on either side of the middle.
template <class acc_t>
LAMBDA_RETURN_HOST_DEVICE acc_t gaussian_mass(acc_t left, acc_t left_tail, acc_t right, acc_t right_tail) {
  if (left > 0) return left_tail - right_tail;
  if (right < 0) return right_tail - left_tail;
  return acc_t(2) - left_tail - right_tail;
}

template <class acc_t>
struct Bins {
  BinKind kind;
  int64_t K;
  acc_t low, high, first, width;
  acc_t reach, sharpness;  // of hl_gauss: 9 or 6 sigma, 1 / (sigma sqrt(2)); both in widths

  static Bins of(int64_t kind, int64_t K, double low, double high, double sigma) {
    const bool gaussian = kind == static_cast<int64_t>(BinKind::kHlGauss);
    const double width = (high - low) / static_cast<double>(gaussian ? K : K - 1);
    return {
        static_cast<BinKind>(kind),
        K,
        static_cast<acc_t>(low),
        static_cast<acc_t>(high),
        static_cast<acc_t>(gaussian ? low + width / 2 : low),
        static_cast<acc_t>(width),
        static_cast<acc_t>((sizeof(acc_t) == 8 ? 9 : 6) * sigma),
        static_cast<acc_t>(1 / (sigma * std::sqrt(2.0)))};
  }

  // V, from the mean of k over the softmax.
  LAMBDA_RETURN_HOST_DEVICE acc_t value(acc_t mean_index) const { return first + width * mean_index; }

  // The bins begin ... end - 1 that the q of a place is not 0 on. A NaN is everywhere.
  struct Reach {
    int64_t begin, end;
  };

  LAMBDA_RETURN_HOST_DEVICE Reach reach_of(acc_t place) const {
    if (!(place == place)) return {0, K};
    if (kind == BinKind::kTwoHot) return {within(round_down(place), 0), within(round_down(place) + 2, 1)};
    return {within(round_down(place + acc_t(0.5) - reach), 0), within(round_down(place + acc_t(1.5) + reach), 1)};
  }

  // Where a target is: its place in widths from the middle of bin 0, the bins begin ... end - 1 that q is not 0 on, and
  // 1 / (F(high) - F(low)) of hl_gauss. A NaN is everywhere.
  struct Target {
    acc_t place;
    int64_t begin, end;
    acc_t norm;
  };

  LAMBDA_RETURN_HOST_DEVICE Target target(acc_t g) const {
    const acc_t place = ((g < low ? low : g > high ? high : g) - first) / width;
    const Reach bins = reach_of(place);
    if (!(place == place)) return {place, bins.begin, bins.end, place};
    if (kind == BinKind::kTwoHot) return {place, bins.begin, bins.end, 1};
    const acc_t left = edge(place, 0), right = edge(place, K);
    return {place, bins.begin, bins.end, 1 / gaussian_mass(left, gaussian_tail(left), right, gaussian_tail(right))};
  }

  // q_k, for any k.
  LAMBDA_RETURN_HOST_DEVICE acc_t weight(const Target& target, int64_t k) const {
    if (k < target.begin || k >= target.end) return 0;
    if (kind == BinKind::kTwoHot) return two_hot(target.place, k);
    const acc_t left = edge(target.place, k), right = edge(target.place, k + 1);
    return target.norm * gaussian_mass(left, gaussian_tail(left), right, gaussian_tail(right));
  }

  // Calls use(k, q_k) for all k where q is not 0. Neighbours share the tail of the edge between them.
  template <class Use>
  LAMBDA_RETURN_HOST_DEVICE void for_weights(const Target& target, const Use& use) const {
    if (kind == BinKind::kTwoHot) {
      for (int64_t k = target.begin; k < target.end; ++k) use(k, two_hot(target.place, k));
      return;
    }
    acc_t left = edge(target.place, target.begin), left_tail = gaussian_tail(left);
    for (int64_t k = target.begin; k < target.end; ++k) {
      const acc_t right = edge(target.place, k + 1), right_tail = gaussian_tail(right);
      use(k, target.norm * gaussian_mass(left, left_tail, right, right_tail));
      left = right;
      left_tail = right_tail;
    }
  }

  // The left edge of interval k, in standard deviations from the target times the square root of 2.
  LAMBDA_RETURN_HOST_DEVICE acc_t edge(acc_t place, int64_t k) const {
    return (static_cast<acc_t>(k) - acc_t(0.5) - place) * sharpness;
  }

 private:
  LAMBDA_RETURN_HOST_DEVICE static acc_t two_hot(acc_t place, int64_t k) {
    const acc_t distance = place - static_cast<acc_t>(k), share = acc_t(1) - (distance < 0 ? -distance : distance);
    return share < 0 ? acc_t(0) : share;
  }
  // x between least and K, converted only when it is: the other way round it would not be defined.
  LAMBDA_RETURN_HOST_DEVICE int64_t within(acc_t x, int64_t least) const {
    const acc_t most = static_cast<acc_t>(K - 1 + least);
    return x < static_cast<acc_t>(least) ? least : x > most ? K - 1 + least : static_cast<int64_t>(x);
  }
};

}  // namespace lambda_return
