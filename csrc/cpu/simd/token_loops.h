// The general operators token by token, on a block that the scan has left in the cache: everything but the recurrence.
// Plain loops, vectorised by the compiler for the target they are included under.
//
// No include guard: see row_kernels.h. Rewards, masks and old values may be null: none, all valid, not clipped.

template <class scalar_t>
void widen_tokens(const scalar_t* from, int64_t n, accumulate_of<scalar_t>* to) {
  constexpr int W = lanes_of<scalar_t>;
  int64_t t = 0;
  for (; t + W <= n; t += W) {
    store<W>(to + t, load<W>(from + t));
  }
  if (t < n) {
    EdgeBuffer<W, scalar_t> edge(from + t, n - t);
    alignas(64) accumulate_of<scalar_t> lanes[W];
    store<W>(lanes, load<W>(edge.data));
    std::memcpy(to + t, lanes, (n - t) * sizeof(lanes[0]));
  }
}

template <class scalar_t>
void narrow_tokens(const accumulate_of<scalar_t>* from, int64_t n, scalar_t* to) {
  constexpr int W = lanes_of<scalar_t>;
  int64_t t = 0;
  for (; t + W <= n; t += W) {
    store<W>(to + t, load<W>(from + t));
  }
  if (t < n) {
    EdgeBuffer<W, accumulate_of<scalar_t>> edge(from + t, n - t);
    scalar_t lanes[W];
    store<W>(lanes, load<W>(edge.data));
    std::memcpy(static_cast<void*>(to + t), lanes, (n - t) * sizeof(scalar_t));
  }
}

// V = sigmoid(output).
template <class acc_t>
void head_values(const acc_t* outputs, int64_t n, acc_t* values) {
  for (int64_t t = 0; t < n; ++t) {
    values[t] = sigmoid(outputs[t]);
  }
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

template <LossKind kKind, bool kClipped, class acc_t>
void token_losses_of_kind(TokenLoss<acc_t> loss, const LossBlock<acc_t>& block, TokenSums* sums) {
  alignas(64) acc_t losses[kBlock], targets[kBlock], errors[kBlock];
  loss.kind = kKind;
  int64_t tokens = 0, clipped = 0;
  for (int64_t t = 0; t < block.length; ++t) {
    const bool counts = block.counts[t] != 0;
    const acc_t target = block.carries[t] + (block.rewards == nullptr ? acc_t(0) : block.rewards[t]);
    TokenLossResult<acc_t> result;
    if constexpr (kClipped) {
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
