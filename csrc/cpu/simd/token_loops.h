// The general operators token by token, on a block that the scan has left in the cache: everything but the recurrence.
// Plain loops, vectorised by the compiler for the target they are included under, but for what needs exp and log.
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
constexpr auto unchanged = [](auto x) LAMBDA_RETURN_INLINE_LAMBDA { return x; };

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

// From what reaches each token from the left: dV = gamma (1 - lam) A and, where asked for, dr = g + gamma lam A.
template <class acc_t>
void finish_adjoint(
    const acc_t* before, const acc_t* grads, const uint8_t* mask, Discount<acc_t> discount, int64_t n,
    acc_t* grad_values, acc_t* grad_rewards) {
  for (int64_t t = 0; t < n; ++t) {
    grad_values[t] = mask[t] != 0 ? discount.weighted_value(before[t]) : acc_t(0);
  }
  if (grad_rewards != nullptr) {
    for (int64_t t = 0; t < n; ++t) {
      grad_rewards[t] = mask[t] != 0 ? discount.adjoint_step(grads[t], before[t]) : acc_t(0);
    }
  }
}

// The sum of x and of its squares in float64, in eight partial sums.
template <class acc_t>
LAMBDA_RETURN_INLINE void add_sums(const acc_t* x, int64_t n, double* sum, double* squares) {
  double sums[8] = {}, squared[8] = {};
  for (int64_t t = 0; t < n; t += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      const double value = x[t + lane];
      sums[lane] += value;
      squared[lane] += value * value;
    }
  }
  for (int lane = 0; lane < 8; ++lane) {
    *sum += sums[lane];
    if (squares != nullptr) *squares += squared[lane];
  }
}

// The two cross-entropies of token_loss.h.
template <LossKind kKind, class acc_t>
void cross_entropies_of_values(const LossBlock<acc_t>& block, const acc_t* targets, acc_t* losses) {
  using V = Vector<acc_t, lanes_of<acc_t>>;
  if constexpr (kKind == LossKind::kBceLogits) {
    const auto loss = [&](V x, V target) LAMBDA_RETURN_INLINE_LAMBDA {
      return (x > 0 ? x : V{}) - x * target + log1p_of<acc_t>(exp_of<acc_t>(x < 0 ? x : -x));
    };
    map_tokens(block.length, losses, loss, block.outputs, targets);
  } else {
    const auto loss = [&](V v, V target) LAMBDA_RETURN_INLINE_LAMBDA {
      const auto log_v = log_of<acc_t>(v), log_rest = log_rest_of<acc_t>(v), least = broadcast<V>(acc_t(-100));
      return -target * (log_v < least ? least : log_v) - (1 - target) * (log_rest < least ? least : log_rest);
    };
    map_tokens(block.length, losses, loss, block.values, targets);
  }
}

template <LossKind kKind, class acc_t>
LAMBDA_RETURN_INLINE acc_t cross_entropy_derivative(acc_t v, acc_t target) {
  if constexpr (kKind == LossKind::kBceLogits) return v - target;
  const acc_t variance = v * (1 - v), tiny = acc_t(1e-12);
  return (v - target) / (variance < tiny ? tiny : variance);
}

template <LossKind kKind, bool kClipped, class acc_t>
void token_losses_of_kind(TokenLoss<acc_t> loss, const LossBlock<acc_t>& block, TokenSums* sums) {
  constexpr bool kIsEntropy = kKind == LossKind::kBce || kKind == LossKind::kBceLogits;
  alignas(64) acc_t losses[kBlock], targets[kBlock], errors[kBlock];
  loss.kind = kKind;
  for (int64_t t = 0; t < block.length; ++t) {
    targets[t] = block.carries[t] + (block.rewards == nullptr ? acc_t(0) : block.rewards[t]);
  }
  if constexpr (kIsEntropy) {
    if (block.losses != nullptr || sums != nullptr) {
      cross_entropies_of_values<kKind>(block, targets, losses);
    } else {
      std::memset(losses, 0, block.length * sizeof(acc_t));
    }
  }
  int64_t tokens = 0, clipped = 0;
  for (int64_t t = 0; t < block.length; ++t) {
    const bool counts = block.counts[t] != 0;
    const acc_t target = targets[t];
    TokenLossResult<acc_t> result;
    if constexpr (kIsEntropy) {
      result = {losses[t], cross_entropy_derivative<kKind>(block.values[t], target), false};
    } else if constexpr (kClipped) {
      result = loss.clipped(block.values[t], block.old_values[t], target);
    } else {
      result = loss(block.outputs[t], block.values[t], target);
    }
    losses[t] = counts ? result.loss : acc_t(0);
    targets[t] = counts ? target : acc_t(0);
    errors[t] = counts ? target - block.values[t] : acc_t(0);
    if (block.derivatives != nullptr) block.derivatives[t] = counts ? result.derivative : acc_t(0);
    tokens += counts;
    clipped += counts && result.clipped;
  }
  if (block.losses != nullptr) std::memcpy(block.losses, losses, block.length * sizeof(acc_t));
  if (sums != nullptr) {
    const int64_t whole = (block.length + 7) / 8 * 8;
    for (int64_t t = block.length; t < whole; ++t) {
      losses[t] = targets[t] = errors[t] = 0;
    }
    sums->tokens += static_cast<double>(tokens);
    sums->clipped += static_cast<double>(clipped);
    add_sums(losses, whole, &sums->loss, nullptr);
    add_sums(targets, whole, &sums->returns, &sums->squared_returns);
    add_sums(errors, whole, &sums->errors, &sums->squared_errors);
  }
}

template <class acc_t>
void token_losses(const TokenLoss<acc_t>& loss, const LossBlock<acc_t>& block, TokenSums* sums) {
  using Loops = void (*)(TokenLoss<acc_t>, const LossBlock<acc_t>&, TokenSums*);
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
