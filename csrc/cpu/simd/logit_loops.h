// The classification loss token by token: K logits at a time, in vectors over k. What they compute is said in
// csrc/kernels/categorical_value_loss.h.
//
// No include guard: see row_kernels.h.

// (z + 5/2) exp(z^2) erfc(z) as a polynomial in (z - 5/2) / (z + 5/2): it falls smoothly from 5/2 at z = 0 to 1 /
// sqrt(pi) at infinity. Interpolated at the zeros of a Chebyshev polynomial, to a sixth and a fourth of a rounding.
template <class T>
struct GaussianTail;
template <>
struct GaussianTail<float> {
  static constexpr float series[] = {-7.292145892e-05f, 2.686559128e-05f,  6.662207888e-04f, -4.136037896e-04f,
                                     -4.803454969e-03f, 8.382888511e-03f,  2.835886739e-02f, -1.712494195e-01f,
                                     4.539142549e-01f,  -8.046519160e-01f, 1.054031849e+00f};
};
template <>
struct GaussianTail<double> {
  static constexpr double series[] = {
      -1.17527357615721753e-09, -4.49227190191343784e-11, 1.15762637090982541e-08,  6.52110049090975646e-09,
      -5.42513051314396099e-08, -7.43475709127897829e-08, 1.40056324942061843e-07,  4.54474744837795281e-07,
      -7.55141461639050350e-09, -1.96832719755069735e-06, -2.33148749095354329e-06, 6.75749162798147011e-06,
      1.82440958657996771e-05,  -1.95333810813692847e-05, -1.12604765773131437e-04, 5.83080692444767887e-05,
      7.02693713073525902e-04,  -4.39208301689622842e-04, -4.81878552214593664e-03, 8.39304430489486684e-03,
      2.83615501319384004e-02,  -1.71251145246124198e-01, 4.53914116648097221e-01,  -8.04651849439148137e-01,
      1.05403182030571796e+00};
};

// erfc(|z|), to 5 + 2.5 z^2 epsilon: z^2 is rounded, which weighs as much as the rounding of z itself.
template <class T, class V>
LAMBDA_RETURN_INLINE V tail_of(V z) {
  z = z < 0 ? -z : z;
  const V reciprocal = 1 / (z + T(2.5));
  return polynomial(GaussianTail<T>::series, (z - T(2.5)) * reciprocal) * reciprocal * exp_of<T>(-(z * z));
}

// The share of a Gaussian between two places, times 2.
template <class T, class V>
LAMBDA_RETURN_INLINE V mass_between(V left, V right) {
  const V left_tail = tail_of<T>(left), right_tail = tail_of<T>(right);
  const V across = 2 - left_tail - right_tail;
  return left > 0 ? left_tail - right_tail : right < 0 ? right_tail - left_tail : across;
}

template <class V, class Combine>
LAMBDA_RETURN_INLINE auto reduce_lanes(V x, const Combine& combine) {
  if constexpr (sizeof(V) == 4 * sizeof(x[0])) {
    return combine(combine(x[0], x[2]), combine(x[1], x[3]));
  } else {
    return reduce_lanes(combine(low_half(x), high_half(x)), combine);
  }
}
constexpr auto larger = [](auto a, auto b) LAMBDA_RETURN_INLINE_LAMBDA { return a > b ? a : b; };
constexpr auto sum = [](auto a, auto b) LAMBDA_RETURN_INLINE_LAMBDA { return a + b; };

// 0, 1, 2, ...
template <class V>
LAMBDA_RETURN_INLINE V lane_numbers() {
  V x{};
  for (size_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) {
    x[lane] = lane;
  }
  return x;
}

// Calls body(x, k, wanted) on vectors that cover x_k for k from begin to end, each k wanted once. The last vector of a
// row begins where it still ends within the row.
template <class scalar_t, class Body>
LAMBDA_RETURN_INLINE void for_logits(const scalar_t* x, int64_t K, int64_t begin, int64_t end, const Body& body) {
  using acc_t = accumulate_of<scalar_t>;
  constexpr int W = lanes_of<scalar_t>;
  using V = Vector<acc_t, W>;
  const auto step = [&](const scalar_t* from, int64_t first, int64_t next) LAMBDA_RETURN_INLINE_LAMBDA {
    const V k = lane_numbers<V>() + static_cast<acc_t>(first);
    body(load<W>(from), k, (k >= static_cast<acc_t>(next)) & (k < static_cast<acc_t>(end)));
  };
  if (K < W) {
    const EdgeBuffer<W, scalar_t> edge(x, K);
    step(edge.data, 0, begin);
    return;
  }
  for (int64_t next = begin; next < end; next += W) {
    const int64_t first = next < K - W ? next : K - W;
    step(x + first, first, next);
  }
}

template <class scalar_t>
LAMBDA_RETURN_INLINE accumulate_of<scalar_t> largest_logit(const scalar_t* x, int64_t K) {
  using acc_t = accumulate_of<scalar_t>;
  using V = Vector<acc_t, lanes_of<scalar_t>>;
  V most = broadcast<V>(-static_cast<acc_t>(INFINITY));
  for_logits(x, K, 0, K, [&](V logits, V, auto wanted) LAMBDA_RETURN_INLINE_LAMBDA {
    most = larger(wanted ? logits : most, most);
  });
  return reduce_lanes(most, larger);
}

template <class scalar_t>
void project_logits(
    const Bins<accumulate_of<scalar_t>>& bins, const LogitBlock<scalar_t>& block, const uint8_t* mask,
    const uint8_t* attention, accumulate_of<scalar_t>* values, accumulate_of<scalar_t>* largest,
    accumulate_of<scalar_t>* log_sums) {
  using acc_t = accumulate_of<scalar_t>;
  using V = Vector<acc_t, lanes_of<scalar_t>>;
  for (int64_t t = 0; t < block.length; ++t) {
    values[t] = 0;
    log_sums[t] = not_counted<acc_t>();
    if (mask != nullptr && mask[t] == 0) continue;  // its logits are not even read
    const scalar_t* x = block.logits + t * block.stride;
    const acc_t most = largest_logit(x, block.K);
    V sums{}, indices{};
    for_logits(x, block.K, 0, block.K, [&](V logits, V k, auto wanted) LAMBDA_RETURN_INLINE_LAMBDA {
      const V e = wanted ? exp_of<acc_t>(logits - most) : V{};
      sums += e;
      indices = multiply_add(e, k, indices);
    });
    const acc_t total = reduce_lanes(sums, sum);
    values[t] = bins.value(reduce_lanes(indices, sum) / total);
    largest[t] = most;
    if (attention == nullptr || attention[t] != 0) log_sums[t] = std::log(total);
  }
}

// The places of targets and, of hl_gauss, 1 / (F(high) - F(low)).
template <BinKind kKind, class acc_t>
struct PlacedTargets {
  alignas(64) acc_t places[kBlock], norms[kBlock];

  LAMBDA_RETURN_INLINE PlacedTargets(const Bins<acc_t>& bins, const acc_t* targets, int64_t n) {
    constexpr int W = lanes_of<acc_t>;
    using V = Vector<acc_t, W>;
    std::memcpy(places, targets, n * sizeof(acc_t));
    std::memset(static_cast<void*>(places + n), 0, (kBlock - n) % W * sizeof(acc_t));
    for (int64_t t = 0; t < n; t += W) {
      const V g = load<W>(places + t), low = broadcast<V>(bins.low), high = broadcast<V>(bins.high);
      const V place = ((g < low ? low : g > high ? high : g) - bins.first) / bins.width;
      store<W>(places + t, place);
      if constexpr (kKind == BinKind::kHlGauss) {
        const V left = (acc_t(-0.5) - place) * bins.sharpness;
        const V right = (static_cast<acc_t>(bins.K) - acc_t(0.5) - place) * bins.sharpness;
        store<W>(norms + t, 1 / mass_between<acc_t>(left, right));
      }
    }
  }

  // q_k of target t.
  template <class V>
  LAMBDA_RETURN_INLINE V weights(const Bins<acc_t>& bins, int64_t t, V k) const {
    const acc_t place = places[t];
    if constexpr (kKind == BinKind::kTwoHot) {
      const V share = 1 - (place < k ? k - place : place - k);
      return share < 0 ? V{} : share;
    } else {
      const V left = (k - acc_t(0.5) - place) * bins.sharpness, right = (k + acc_t(0.5) - place) * bins.sharpness;
      return norms[t] * mass_between<acc_t>(left, right);
    }
  }
};

template <BinKind kKind, class scalar_t>
void cross_entropies_of_kind(
    const Bins<accumulate_of<scalar_t>>& bins, const LogitBlock<scalar_t>& block,
    const accumulate_of<scalar_t>* targets, const accumulate_of<scalar_t>* largest,
    const accumulate_of<scalar_t>* log_sums, accumulate_of<scalar_t>* losses) {
  using acc_t = accumulate_of<scalar_t>;
  using V = Vector<acc_t, lanes_of<scalar_t>>;
  const PlacedTargets<kKind, acc_t> placed(bins, targets, block.length);
  for (int64_t t = 0; t < block.length; ++t) {
    losses[t] = 0;
    if (log_sums[t] == not_counted<acc_t>()) continue;
    const auto reach = bins.reach_of(placed.places[t]);
    const acc_t most = largest[t];
    V expected{};  // the logit under q, less the largest
    for_logits(
        block.logits + t * block.stride, block.K, reach.begin, reach.end,
        [&](V logits, V k, auto wanted) LAMBDA_RETURN_INLINE_LAMBDA {
          const V q = wanted ? placed.weights(bins, t, k) : V{};
          expected += q != 0 ? q * (logits - most) : V{};  // a logit of -inf may be where q is 0
        });
    losses[t] = log_sums[t] - reduce_lanes(expected, sum);
  }
}

template <BinKind kKind, class scalar_t>
void logit_gradients_of_kind(
    const Bins<accumulate_of<scalar_t>>& bins, const LogitBlock<scalar_t>& block,
    const accumulate_of<scalar_t>* targets, const accumulate_of<scalar_t>* log_sums,
    const accumulate_of<scalar_t>* factors, scalar_t* grad_logits) {
  using acc_t = accumulate_of<scalar_t>;
  constexpr int W = lanes_of<scalar_t>;
  using V = Vector<acc_t, W>;
  const int64_t K = block.K;
  const PlacedTargets<kKind, acc_t> placed(bins, targets, block.length);
  for (int64_t t = 0; t < block.length; ++t) {
    scalar_t* out = grad_logits + t * K;
    if (log_sums[t] == not_counted<acc_t>()) {
      std::memset(static_cast<void*>(out), 0, K * sizeof(scalar_t));
      continue;
    }
    const scalar_t* x = block.logits + t * block.stride;
    const auto reach = bins.reach_of(placed.places[t]);
    const acc_t most = largest_logit(x, K), log_sum = log_sums[t], factor = factors[t];
    // Of the vector from k = first on, the lanes from next on.
    const auto gradient = [&](const scalar_t* from, int64_t first, int64_t next) LAMBDA_RETURN_INLINE_LAMBDA {
      V y = exp_of<acc_t>(load<W>(from) - most - log_sum);
      if (next < reach.end && first + W > reach.begin) {
        const V k = lane_numbers<V>() + static_cast<acc_t>(first);
        const auto reached = (k >= static_cast<acc_t>(reach.begin)) & (k < static_cast<acc_t>(reach.end));
        y -= reached ? placed.weights(bins, t, k) : V{};
      }
      return factor * y;
    };
    if (K < W) {
      const EdgeBuffer<W, scalar_t> edge(x, K);
      scalar_t lanes[W];
      store<W>(lanes, gradient(edge.data, 0, 0));
      std::memcpy(static_cast<void*>(out), lanes, K * sizeof(scalar_t));
      continue;
    }
    // The last vector first: what it has too many of at its front is written again.
    const int64_t whole = K / W * W;
    if (whole < K) store<W>(out + K - W, gradient(x + K - W, K - W, whole));
    for (int64_t k = 0; k < whole; k += W) {
      store<W>(out + k, gradient(x + k, k, k));
    }
  }
}

template <class scalar_t>
void cross_entropies(
    const Bins<accumulate_of<scalar_t>>& bins, const LogitBlock<scalar_t>& block,
    const accumulate_of<scalar_t>* targets, const accumulate_of<scalar_t>* largest,
    const accumulate_of<scalar_t>* log_sums, accumulate_of<scalar_t>* losses) {
  const auto loops = bins.kind == BinKind::kTwoHot ? cross_entropies_of_kind<BinKind::kTwoHot, scalar_t>
                                                   : cross_entropies_of_kind<BinKind::kHlGauss, scalar_t>;
  loops(bins, block, targets, largest, log_sums, losses);
}

template <class scalar_t>
void logit_gradients(
    const Bins<accumulate_of<scalar_t>>& bins, const LogitBlock<scalar_t>& block,
    const accumulate_of<scalar_t>* targets, const accumulate_of<scalar_t>* log_sums,
    const accumulate_of<scalar_t>* factors, scalar_t* grad_logits) {
  const auto loops = bins.kind == BinKind::kTwoHot ? logit_gradients_of_kind<BinKind::kTwoHot, scalar_t>
                                                   : logit_gradients_of_kind<BinKind::kHlGauss, scalar_t>;
  loops(bins, block, targets, log_sums, factors, grad_logits);
}
