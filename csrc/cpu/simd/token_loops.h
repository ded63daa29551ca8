// The general operators token by token, on a block that the scan has left in the cache: everything but the recurrence.
// Plain loops where the compiler vectorises them for the target they are included under, vectors where it does not.
//
// No include guard: see row_kernels.h. Rewards, masks and old values may be null: none, all valid, not clipped.

// to[t] = f(from[t] ...) on vectors, each dtype as lanes of its accumulation dtype.
template <class F, class To, class... From>
LAMBDA_RETURN_INLINE void map_tokens(int64_t n, To* to, const F& f, const From*... from) {
  constexpr int W = lanes_of<To>;
  int64_t t = 0;
  for (; t + W <= n; t += W) {
    store<W>(to + t, f(load<W>(from + t)...));
  }
  if (t < n) {
    alignas(64) To lanes[W];
    store<W>(lanes, f(load<W>(EdgeBuffer<W, From>(from + t, n - t).data)...));
    std::memcpy(static_cast<void*>(to + t), lanes, (n - t) * sizeof(To));
  }
}

template <class scalar_t>
void widen_tokens(const scalar_t* from, int64_t n, accumulate_of<scalar_t>* to) {
  map_tokens(n, to, unchanged, from);
}

template <class scalar_t>
void narrow_tokens(const accumulate_of<scalar_t>* from, int64_t n, scalar_t* to) {
  map_tokens(n, to, unchanged, from);
}

// V = sigmoid(output).
template <class acc_t>
void head_values(const acc_t* outputs, int64_t n, acc_t* values) {
  using V = Vector<acc_t, lanes_of<acc_t>>;
  const auto value = [&](V x) LAMBDA_RETURN_INLINE_LAMBDA { return sigmoid_of<acc_t>(x); };
  map_tokens(n, values, value, outputs);
}

// terms <- gamma (1 - lam) V + gamma lam r, without what has weight 0.
template <class acc_t>
void recurrence_terms(const acc_t* values, const acc_t* rewards, Discount<acc_t> discount, int64_t n, acc_t* terms) {
  const acc_t value = discount.value, carry = discount.carry;
  if (value == 0) {
    std::memset(terms, 0, n * sizeof(acc_t));
  } else {
    for (int64_t t = 0; t < n; ++t) {
      terms[t] = value * values[t];
    }
  }
  if (rewards != nullptr && carry != 0) {
    for (int64_t t = 0; t < n; ++t) {
      terms[t] += carry * rewards[t];
    }
  }
}

// out <- G = r + H at valid tokens, G - V where values are given, 0 elsewhere.
template <class acc_t>
void finish_returns(
    const acc_t* carries, const acc_t* rewards, const acc_t* values, const uint8_t* mask, int64_t n, acc_t* out) {
  for (int64_t t = 0; t < n; ++t) {
    acc_t x = carries[t];
    if (rewards != nullptr) x += rewards[t];
    if (values != nullptr) x -= values[t];
    out[t] = mask[t] != 0 ? x : acc_t(0);
  }
}

// From what reaches each token from the left, 0 where masked: dV = gamma (1 - lam) A and dr = g + gamma lam A.
template <class acc_t>
void finish_adjoint(
    const acc_t* before, const acc_t* grads, const uint8_t* mask, Discount<acc_t> discount, int64_t n,
    acc_t* grad_values, acc_t* grad_rewards) {
  const acc_t value = discount.value, carry = discount.carry;  // what has weight 0 is left out: it may be infinite
  for (int64_t t = 0; t < n; ++t) {
    grad_values[t] = value == 0 ? acc_t(0) : value * before[t];
  }
  for (int64_t t = 0; t < n; ++t) {
    const acc_t x = carry == 0 ? grads[t] : carry * before[t] + grads[t];
    grad_rewards[t] = mask[t] != 0 ? x : acc_t(0);
  }
}

// The losses of token_loss.h in vectors, without a branch.
template <LossKind kKind, class acc_t, class V>
LAMBDA_RETURN_INLINE V losses_of(V x, V v, V target, acc_t delta) {
  const V e = v - target;
  if constexpr (kKind == LossKind::kMse) {
    return e * e;
  } else if constexpr (kKind == LossKind::kBceLogits) {
    return (x > 0 ? x : V{}) - x * target + log1p_of<acc_t>(exp_of<acc_t>(x < 0 ? x : -x));
  } else if constexpr (kKind == LossKind::kBce) {
    const V log_v = log_of<acc_t>(v), log_rest = log_rest_of<acc_t>(v), least = broadcast<V>(acc_t(-100));
    return -target * (log_v < least ? least : log_v) - (1 - target) * (log_rest < least ? least : log_rest);
  } else {
    const V magnitude = e < 0 ? -e : e, outside = delta * (magnitude - acc_t(0.5) * delta);
    const V loss = magnitude > delta ? outside : acc_t(0.5) * e * e;  // a NaN is inside, and stays one
    return kKind == LossKind::kHuber ? loss : loss / delta;
  }
}

// Their derivatives.
template <LossKind kKind, class acc_t, class V>
LAMBDA_RETURN_INLINE V derivatives_of(V v, V target, acc_t delta) {
  const V e = v - target;
  if constexpr (kKind == LossKind::kMse) {
    return 2 * e;
  } else if constexpr (kKind == LossKind::kBceLogits) {
    return e;
  } else if constexpr (kKind == LossKind::kBce) {
    const V variance = v * (1 - v), tiny = broadcast<V>(acc_t(1e-12));
    return e / (variance < tiny ? tiny : variance);
  } else {
    const V bound = broadcast<V>(delta), magnitude = e < 0 ? -e : e;
    const V derivative = magnitude > bound ? (e < 0 ? -bound : bound) : e;
    return kKind == LossKind::kHuber ? derivative : derivative / delta;
  }
}

// TokenSums in lanes, each added to in float64.
template <class V>
struct TokenSumLanes {
  using Wide = decltype(in_float64(V()));
  Wide loss{}, returns{}, squared_returns{}, errors{}, squared_errors{};
  V tokens{}, clipped{};  // of one block, and so exact

  LAMBDA_RETURN_INLINE void add(V losses, V targets, V differences) {
    constexpr auto square = [](auto x) LAMBDA_RETURN_INLINE_LAMBDA { return x * x; };
    loss += in_float64(losses);
    returns += in_float64(targets);
    squared_returns += in_float64(targets, square);
    errors += in_float64(differences);
    squared_errors += in_float64(differences, square);
  }
  LAMBDA_RETURN_INLINE void add_to(TokenSums* sums) const {
    sums->loss += sum_of_lanes(loss);
    sums->returns += sum_of_lanes(returns);
    sums->squared_returns += sum_of_lanes(squared_returns);
    sums->errors += sum_of_lanes(errors);
    sums->squared_errors += sum_of_lanes(squared_errors);
    sums->tokens += sum_of_lanes(in_float64(tokens));
    sums->clipped += sum_of_lanes(in_float64(clipped));
  }
};

// The last tokens of a block, fewer than a vector has, and after them tokens that do not count.
template <LossKind kKind, bool kClipped, class acc_t>
void token_losses_of_kind(const TokenLoss<acc_t>& settings, const LossBlock<acc_t>& block, TokenSums* sums);
template <LossKind kKind, bool kClipped, class acc_t>
void token_losses_of_edge(
    const TokenLoss<acc_t>& settings, const LossBlock<acc_t>& block, int64_t begin, TokenSums* sums) {
  constexpr int W = lanes_of<acc_t>;
  using Edge = EdgeBuffer<W, acc_t>;
  const int64_t rest = block.length - begin;
  const auto edge_of = [&](const acc_t* x) { return x != nullptr ? Edge(x + begin, rest) : Edge(); };
  const Edge outputs = edge_of(block.outputs), values = edge_of(block.values), carries = edge_of(block.carries),
             rewards = edge_of(block.rewards), old_values = edge_of(block.old_values), factors = edge_of(block.factors);
  const EdgeBuffer<W, uint8_t> counts(block.counts + begin, rest);
  Edge derivatives, losses;
  LossBlock<acc_t> edge = block;
  edge.length = W;
  edge.outputs = outputs.data;
  edge.values = values.data;
  edge.carries = carries.data;
  if (block.rewards != nullptr) edge.rewards = rewards.data;
  edge.old_values = old_values.data;
  edge.counts = counts.data;
  if (block.factors != nullptr) edge.factors = factors.data;
  if (block.derivatives != nullptr) edge.derivatives = derivatives.data;
  if (block.losses != nullptr) edge.losses = losses.data;
  token_losses_of_kind<kKind, kClipped>(settings, edge, sums);
  if (block.derivatives != nullptr) std::memcpy(block.derivatives + begin, derivatives.data, rest * sizeof(acc_t));
  if (block.losses != nullptr) std::memcpy(block.losses + begin, losses.data, rest * sizeof(acc_t));
}

template <LossKind kKind, bool kClipped, class acc_t>
void token_losses_of_kind(const TokenLoss<acc_t>& settings, const LossBlock<acc_t>& block, TokenSums* sums) {
  constexpr int W = lanes_of<acc_t>;
  using V = Vector<acc_t, W>;
  const acc_t delta = settings.delta;
  const V range = broadcast<V>(settings.clip_range);
  const bool with_losses = block.losses != nullptr || sums != nullptr || kClipped;
  TokenSumLanes<V> lanes;
  int64_t t = 0;
  for (; t + W <= block.length; t += W) {
    const auto counts = TokenMask<acc_t, W>::of(widen_bytes<W>(block.counts + t), 0);
    const V x = load<W>(block.outputs + t), v = load<W>(block.values + t);
    V target = load<W>(block.carries + t);
    if (block.rewards != nullptr) target += load<W>(block.rewards + t);
    V loss = with_losses ? losses_of<kKind>(x, v, target, delta) : V{};
    V derivative = block.derivatives != nullptr ? derivatives_of<kKind>(v, target, delta) : V{};
    if constexpr (kClipped) {
      const V old = load<W>(block.old_values + t), change = v - old;
      const V held = old + (change > range ? range : change < -range ? -range : change);
      const V held_loss = losses_of<kKind>(held, held, target, delta);
      // What is within the range is not held, however old + (V - old) rounds.
      const auto is_held = ((change > range) | (change < -range)) & (held_loss > loss);
      loss = is_held ? held_loss : loss;
      derivative = is_held ? V{} : derivative;
      lanes.clipped += counts.keep(is_held ? broadcast<V>(acc_t(1)) : V{});
    }
    loss = counts.keep(loss);
    if (block.losses != nullptr) store<W>(block.losses + t, loss);
    if (block.derivatives != nullptr) {
      const V factor = block.factors != nullptr ? load<W>(block.factors + t) : broadcast<V>(block.factor);
      store<W>(block.derivatives + t, counts.keep(derivative * factor));
    }
    if (sums != nullptr) {
      lanes.add(loss, counts.keep(target), counts.keep(target - v));
      lanes.tokens += counts.keep(broadcast<V>(acc_t(1)));
    }
  }
  if (sums != nullptr) lanes.add_to(sums);
  if (t < block.length) token_losses_of_edge<kKind, kClipped>(settings, block, t, sums);
}

template <class acc_t>
void token_losses(const TokenLoss<acc_t>& loss, const LossBlock<acc_t>& block, TokenSums* sums) {
  using Loops = void (*)(const TokenLoss<acc_t>&, const LossBlock<acc_t>&, TokenSums*);
  const bool clipped = block.old_values != nullptr;
  const Loops loops = loss.kind == LossKind::kMse     ? (clipped ? token_losses_of_kind<LossKind::kMse, true, acc_t>
                                                                 : token_losses_of_kind<LossKind::kMse, false, acc_t>)
                      : loss.kind == LossKind::kHuber ? (clipped ? token_losses_of_kind<LossKind::kHuber, true, acc_t>
                                                                 : token_losses_of_kind<LossKind::kHuber, false, acc_t>)
                      : loss.kind == LossKind::kSmoothL1
                          ? (clipped ? token_losses_of_kind<LossKind::kSmoothL1, true, acc_t>
                                     : token_losses_of_kind<LossKind::kSmoothL1, false, acc_t>)
                      : loss.kind == LossKind::kBce ? token_losses_of_kind<LossKind::kBce, false, acc_t>
                                                    : token_losses_of_kind<LossKind::kBceLogits, false, acc_t>;
  loops(loss, block, sums);
}
