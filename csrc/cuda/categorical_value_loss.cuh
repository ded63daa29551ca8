// categorical_value_loss and its backward on the device; the mathematics of a token is in
// kernels/categorical_value_loss.h.
//
// Forward is two launches. The first reads all logits, of tokens that have nothing to do with one another, and leaves
// V, the largest logit and the logarithm of the sum of each. The second is the scan of td_lambda over V; where it has
// the returns of a few tokens, it reads again the few logits under each of them. In one launch there would be no more
// blocks than the scan has, which a few short rows leave most of the chip idle with, and the logits are K times as much
// memory as all else. Backward is one launch.
//
// A group of lanes works on one token, and each lane on as many of its logits as one 16-byte access holds. Of the
// Gaussian each lane takes one edge of a bin, so that no tail is computed twice.
#pragma once

#include "../kernels/categorical_value_loss.h"
#include "../kernels/logit_rows.h"
#include "td_lambda_loss.cuh"

namespace lambda_return::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// ---- groups of lanes ----

// Each warp in groups of 2^log2_lanes lanes.
struct LaneGroups {
  int log2_lanes;  // 2 ... 5

  __device__ int lanes() const { return 1 << log2_lanes; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp & (lanes() - 1); }
  __device__ int first_lane() const { return static_cast<int>(threadIdx.x) % kWarp & ~(lanes() - 1); }
  // Of the calling lane's group, in its warp and in its block.
  __device__ int of_warp() const { return static_cast<int>(threadIdx.x) % kWarp >> log2_lanes; }
  __device__ int of_block() const { return static_cast<int>(threadIdx.x) >> log2_lanes; }
  __device__ int a_warp() const { return kWarp >> log2_lanes; }
  LAMBDA_RETURN_HOST_DEVICE int64_t a_block() const { return kThreads >> log2_lanes; }

  // combine over a group, in every lane of it: the same bits in all, as combine(x, y) is combine(y, x).
  template <class T, class Combine>
  __device__ __forceinline__ T over(T mine, const Combine& combine) const {
#pragma unroll
    for (int delta = kWarp / 2; delta > 0; delta /= 2) {
      const T other = __shfl_xor_sync(kFullMask, mine, delta);
      if (delta < lanes()) mine = combine(mine, other);
    }
    return mine;
  }
  template <class T>
  __device__ __forceinline__ T sum(T mine) const {
    return over(mine, [](T x, T y) { return x + y; });
  }
  template <class T>
  __device__ __forceinline__ T largest(T mine) const {
    return over(mine, [](T x, T y) { return x > y ? x : y; });
  }
};

// ---- logits ----

// Logits of one 16-byte access.
template <class scalar_t>
constexpr int kLogits = 16 / sizeof(scalar_t);

// The logits of all tokens, and how a warp reads them.
template <class scalar_type>
struct TokenLogits {
  using scalar_t = scalar_type;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int N = kLogits<scalar_t>;

  Sequences sequences;
  LogitRows<const scalar_t> logits;
  Chunking chunking;  // of the K logits of a token
  LaneGroups groups;
  int turns;  // of a group, until it has read a token's

  struct Token {
    int64_t row, t;  // of packed sequences, row 0
    bool exists;
  };

  // heads: whether some token may begin elsewhere than on 16 bytes.
  static TokenLogits of(
      const Sequences& sequences, const LogitRows<const scalar_t>& logits, int64_t K, bool vectorized, bool heads) {
    LaneGroups groups{2};
    while (groups.log2_lanes < 5 && (int64_t(N) << groups.log2_lanes) < K) ++groups.log2_lanes;
    const int64_t a_turn = int64_t(N) << groups.log2_lanes, most = K + (vectorized && heads ? N - 1 : 0);
    return {sequences, logits, {K, vectorized}, groups, static_cast<int>((most + a_turn - 1) / a_turn)};
  }

  int64_t rows() const { return sequences.packed() ? 1 : sequences.B; }
  // One token a group. 2^31 blocks are more tokens than any device has memory for.
  int64_t blocks() const { return (rows() * sequences.T + groups.a_block() - 1) / groups.a_block(); }

  // Of the calling lane's group.
  __device__ __forceinline__ Token token() const {
    const int64_t tokens = sequences.packed() ? sequences.T : sequences.T * sequences.B;
    const int64_t index = blockIdx.x * groups.a_block() + groups.of_block();
    if (sequences.packed()) return {0, index, index < tokens};
    if (tokens <= INT32_MAX) {  // a division of 64 bits would take longer than all the rest
      const auto i = static_cast<uint32_t>(index), T = static_cast<uint32_t>(sequences.T);
      return {i / T, i % T, index < tokens};
    }
    return {index / sequences.T, index % sequences.T, index < tokens};
  }
  // Whether a packed token belongs to a sequence.
  __device__ __forceinline__ bool is_inside(const Token& token) const {
    if (!sequences.packed()) return true;
    return sequences.begin(0) <= token.t && token.t < sequences.begin(sequences.B);
  }
};

// What a lane reads of a token's logits: those of one turn at a time, all others -inf. Twice over, where the second
// time begins with what the first one left in registers, and ends there if there is one turn.
template <class scalar_t>
class LaneLogits {
 public:
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int N = kLogits<scalar_t>;

  // reads: whether to read the token's, else all are -inf.
  __device__ __forceinline__
  LaneLogits(const TokenLogits<scalar_t>& in, const typename TokenLogits<scalar_t>::Token& token, bool reads)
      : in_(in),
        token_(in.logits.at(token.row, token.t)),
        chunking_{reads ? in.chunking.T : 0, in.chunking.vectorized} {
    begin_ = in.groups.lane() * N - chunking_.head<N>(token_);
  }

  // The largest logit, in every lane of the group; a NaN is not.
  __device__ __forceinline__ acc_t largest() {
    acc_t most = not_any();
#pragma unroll 1
    for (int turn = 0; turn < in_.turns; ++turn) {
      load(turn);
#pragma unroll
      for (int i = 0; i < N; ++i) most = widen(items_[i]) > most ? widen(items_[i]) : most;
    }
    return in_.groups.largest(most);
  }
  // Calls use(first, x) with logits first ... first + N - 1 of each turn, after largest().
  template <class Use>
  __device__ __forceinline__ void for_turns(const Use& use) {
#pragma unroll 1
    for (int turn = in_.turns - 1; turn >= 0; --turn) {
      use(first(turn), items_);
      if (turn > 0) load(turn - 1);
    }
  }

 private:
  __device__ static acc_t not_any() { return -not_counted<acc_t>(); }
  __device__ __forceinline__ int64_t first(int turn) const {
    return begin_ + turn * (int64_t(N) << in_.groups.log2_lanes);
  }
  __device__ __forceinline__ void load(int turn) {
    load_items(token_, first(turn), chunking_, narrow<scalar_t>(not_any()), items_);
  }

  const TokenLogits<scalar_t>& in_;
  const scalar_t* token_;
  Chunking chunking_;
  int64_t begin_;
  scalar_t items_[N];
};

// ---- the distribution of a target ----

// Turns of a group until each of the bins that q is not 0 on had a lane. Where rounding makes them one more, what that
// one weighs is as little as what lies beyond all of them.
template <class acc_t>
int window_turns(const Bins<acc_t>& bins, const LaneGroups& groups) {
  if (bins.kind == BinKind::kTwoHot) return 1;
  const double reached = std::floor(2 * static_cast<double>(bins.reach) + 1) + 1;
  const int64_t edges = 1 + (reached < static_cast<double>(bins.K) ? static_cast<int64_t>(reached) : bins.K);
  return static_cast<int>((edges - 1) >> groups.log2_lanes) + 1;
}

// The bins that the q of a target is not 0 on: count of them from begin on. place: of the target, in widths from the
// middle of the first of them; exact, as a place less a whole number not above it is.
template <class acc_t>
struct Window {
  int64_t begin;
  int count;
  acc_t place;

  __device__ __forceinline__ static Window of(const Bins<acc_t>& bins, acc_t g) {
    const auto target = bins.target(g);
    const int64_t count = target.end - target.begin;
    return {
        target.begin, static_cast<int>(count < INT32_MAX ? count : INT32_MAX),
        target.place - static_cast<acc_t>(target.begin)};
  }
};

// The q of a group's target: calls use(j, w) with each lane's own bin begin + j, in the order of the lanes, as many
// times for every group of a warp. w is q but for a factor, and 0 outside of the window. Returns the sum of all w.
template <class acc_t, class Use>
__device__ __forceinline__ acc_t
for_window(const Bins<acc_t>& bins, const Window<acc_t>& window, const LaneGroups& groups, int turns, const Use& use) {
  if (bins.kind == BinKind::kTwoHot) {
    use(groups.lane(), bins.weight({window.place, 0, window.count, acc_t(1)}, groups.lane()));
    return 1;
  }
  acc_t sum = 0, last_tail = 0;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    // Each lane has the right edge of its bin, and asks its neighbour for the left one.
    const int j = (turn << groups.log2_lanes) + groups.lane() - 1;
    const acc_t left = bins.edge(window.place, j), right = bins.edge(window.place, j + 1), tail = gaussian_tail(right);
    acc_t left_tail = __shfl_up_sync(kFullMask, tail, 1);
    if (groups.lane() == 0) left_tail = planted(Bug::kWrongEdgeBetweenTurns) ? tail : last_tail;
    last_tail = __shfl_sync(kFullMask, tail, groups.first_lane() + groups.lanes() - 1);
    const bool is_within = j >= 0 && j < window.count;
    const acc_t w = is_within ? gaussian_mass(left, left_tail, right, tail) : acc_t(0);
    sum += w;
    use(j, w);
  }
  return groups.sum(sum);
}

// ---- forward: values ----

template <class scalar_type>
struct CategoricalValuesOp {
  using acc_t = accumulate_t<scalar_type>;

  TokenLogits<scalar_type> tokens;
  Bins<acc_t> bins;
  Rows<const uint8_t> mask, attention_mask;  // null: all
  Rows<acc_t> values, largest, log_sums;     // of every token
};

// values, largest, log_sums <- what the logits say; V is 0 where a token is masked, log_sums inf where it does not
// count.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 4) categorical_values_kernel(const CategoricalValuesOp<scalar_t> op) {
  using acc_t = accumulate_t<scalar_t>;
  const LaneGroups& groups = op.tokens.groups;
  const auto token = op.tokens.token();
  bool valid = token.exists && op.tokens.is_inside(token), counts = valid;
  if (valid && op.mask.data != nullptr) valid = op.mask[token.row][token.t] != 0;
  if (counts && op.attention_mask.data != nullptr) counts = op.attention_mask[token.row][token.t] != 0;
  LaneLogits<scalar_t> logits(op.tokens, token, valid);
  const acc_t largest = logits.largest();
  acc_t sum = 0, index = 0;
  logits.for_turns([&](int64_t first, const auto& x) {
    acc_t of_turn = 0;
#pragma unroll
    for (int i = 0; i < kLogits<scalar_t>; ++i) {
      const acc_t e = exp_of(widen(x[i]) - largest);
      of_turn += e;
      index += e * static_cast<acc_t>(i);
    }
    sum += of_turn;
    index += of_turn * static_cast<acc_t>(first);
  });
  sum = groups.sum(sum);
  index = groups.sum(index);
  if (!token.exists || groups.lane() != 0) return;
  op.values[token.row][token.t] = valid ? op.bins.value(index / sum) : acc_t(0);
  op.largest[token.row][token.t] = largest;
  op.log_sums[token.row][token.t] = valid && counts ? log_of(sum) : not_counted<acc_t>();
}

// ---- forward: returns and losses ----

template <class scalar_type>
struct CategoricalLossOp : LossScan<SequenceScan<accumulate_t<scalar_type>>> {
  using Base = LossScan<SequenceScan<accumulate_t<scalar_type>>>;
  using typename Base::acc_t;
  using typename Base::Row;
  static constexpr bool kRightToLeft = true;
  static constexpr int N = Base::N;
  static constexpr int kBlocksPerSm = sizeof(acc_t) == 8 ? 2 : 4;

  DiscountRows discounts;
  const acc_t* terminal_rewards;  // [B]
  Rows<const acc_t> rewards;      // null: none
  LogitRows<const scalar_type> logits;
  Bins<acc_t> bins;
  LaneGroups groups;
  int turns;  // see window_turns
  Rows<const acc_t> largest, log_sums;
  Rows<acc_t> returns;

  struct Items {
    acc_t values[N], rewards[N];
    unsigned valid;  // bit i: token i is
  };
  struct Output {
    acc_t returns[N];
  };

  __device__ Row row(int64_t index) const { return this->row_of(index, discounts); }
  __device__ acc_t initial(const Row& row) const { return terminal_rewards[row.sequence]; }
  __device__ void load(const Row& row, int64_t first, Items& items) const {
    uint8_t mask[N];
    this->load_mask(this->mask, row, first, mask);
    this->load_tokens(row, first, items.values);
    this->load_optional(rewards, row, first, items.rewards);
    items.valid = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) items.valid |= mask[i] != 0 ? 1u << i : 0u;
  }
  __device__ bool valid(const Items& items, int i) const { return (items.valid >> i & 1) != 0; }
  __device__ acc_t step(const Row& row, const Items& items, int i, acc_t h) const {
    return row.discount.step(items.values[i], items.rewards[i] + h);
  }
  __device__ void visit(const Row&, const Items& items, int i, acc_t h, Output& output) const {
    output.returns[i] = valid(items, i) ? items.rewards[i] + h : acc_t(0);
  }
  __device__ void finish_row(const Row&, acc_t) const {}
  __device__ void finish_block(int64_t index, const Output& output) const {
    this->clear_outside(returns);
    Base::finish_block(index, output);
  }

  // The warp, which holds N tokens a lane, writes their returns and then goes through all of them, group by group.
  __device__ void finish_chunk(const Row& row, int64_t first, const Items&, Output& output) const {
    store_items(this->at(returns, row), first, this->row_chunking(row), output.returns);
    if (!planted(Bug::kNoBarrierBeforeReturnsAreRead)) __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t begin = first - (kWarp - 1 - lane) * N;  // of the last lane, which has the first tokens
    const int before = begin < 0 ? static_cast<int>(-begin) : 0;
    const int count = begin + kWarp * N < row.length ? kWarp * N : static_cast<int>(row.length - begin);
    acc_t loss = 0, g_sum = 0, g_squares = 0, error_sum = 0, error_squares = 0;
    int counted = 0, turn = 0;
#pragma unroll 1
    for (int of_warp = before; of_warp < count; of_warp += groups.a_warp(), ++turn) {
      const int64_t t = begin + of_warp + groups.of_warp();
      const bool exists = of_warp + groups.of_warp() < count;
      const acc_t log_sum = exists ? this->at(log_sums, row)[t] : not_counted<acc_t>();
      const bool counts = log_sum != not_counted<acc_t>();
      const acc_t g = counts ? this->at(returns, row)[t] : acc_t(0);
      acc_t of_token = 0;
      if (__any_sync(kFullMask, counts)) of_token = log_sum - expected_logit(row, t, counts, g);
      // The lanes of the group take turns, so that each adds up as many tokens as it holds.
      if (!exists || (turn & (groups.lanes() - 1)) != groups.lane()) continue;
      if (this->sums.losses.data != nullptr) this->at(this->sums.losses, row)[t] = counts ? of_token : acc_t(0);
      if (!counts) continue;
      const acc_t error = g - this->at(this->tokens, row)[t];
      ++counted;
      loss += of_token;
      g_sum += g;
      g_squares += g * g;
      error_sum += error;
      error_squares += error * error;
    }
    const auto& reduction = this->sums.reduction;
    reduction.add(kSequenceLoss, static_cast<double>(loss));
    reduction.add(kSequenceTokens, counted);
    reduction.add(kStatistics + 1, static_cast<double>(g_sum));
    reduction.add(kStatistics + 2, static_cast<double>(g_squares));
    reduction.add(kStatistics + 3, static_cast<double>(error_sum));
    reduction.add(kStatistics + 4, static_cast<double>(error_squares));
  }
  // Of a group's token: the logit under q, less the largest.
  __device__ __forceinline__ acc_t expected_logit(const Row& row, int64_t t, bool counts, acc_t g) const {
    auto window = Window<acc_t>::of(bins, g);
    if (!counts) window.count = 0;
    const scalar_type* x = logits.at(this->sequences.packed() ? 0 : row.sequence, row.begin + t) + window.begin;
    const acc_t most = counts ? this->at(largest, row)[t] : acc_t(0);
    acc_t expected = 0;
    const acc_t sum = for_window(bins, window, groups, turns, [&](int j, acc_t w) {
      if (w != 0) expected += w * (widen(x[j]) - most);  // a logit of -inf may be where q is 0
    });
    return groups.sum(expected) / sum;
  }
};

// ---- backward ----

template <class scalar_type>
struct CategoricalGradientOp {
  using acc_t = accumulate_t<scalar_type>;

  TokenLogits<scalar_type> tokens;
  Bins<acc_t> bins;
  int turns;  // see window_turns
  Rows<const acc_t> returns, log_sums;
  const acc_t* grad_loss;         // 0-dim; null where there is no reduction
  Rows<const acc_t> grad_losses;  // of each token, where there is no reduction, else null
  const acc_t* scale;             // [B]
  bool one_scale;                 // for all sequences
  LogitRows<scalar_type> grad_logits;

  // The factor of a token that counts.
  __device__ __forceinline__ acc_t factor(const typename TokenLogits<scalar_type>::Token& token) const {
    if (grad_loss == nullptr) return grad_losses[token.row][token.t];
    int64_t sequence = token.row;
    if (one_scale) {
      sequence = 0;
    } else if (tokens.sequences.packed()) {  // the last sequence that begins at this token or before
      int64_t end = tokens.sequences.B;
      while (end - sequence > 1) {
        const int64_t middle = sequence + (end - sequence) / 2;
        (tokens.sequences.begin(middle) <= token.t ? sequence : end) = middle;
      }
    }
    return *grad_loss * scale[sequence];
  }
};

// grad_logits <- grad_loss * scale * (softmax - q) of each token that counts, 0 elsewhere.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 4)
    categorical_value_loss_backward_kernel(const CategoricalGradientOp<scalar_t> op) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int N = kLogits<scalar_t>;
  const LaneGroups& groups = op.tokens.groups;
  const auto token = op.tokens.token();
  const bool is_inside = token.exists && op.tokens.is_inside(token);
  const acc_t log_sum = is_inside ? op.log_sums[token.row][token.t] : not_counted<acc_t>();
  const bool counts = log_sum != not_counted<acc_t>(), any_counts = __any_sync(kFullMask, counts);
  LaneLogits<scalar_t> logits(op.tokens, token, counts);
  const acc_t largest = logits.largest();
  const acc_t factor = counts ? op.factor(token) : acc_t(0);
  const auto window = Window<acc_t>::of(op.bins, counts ? op.returns[token.row][token.t] : acc_t(0));
  logits.for_turns([&](int64_t first, const auto& x) {
    scalar_t gradients[N];
#pragma unroll
    for (int i = 0; i < N; ++i) gradients[i] = narrow<scalar_t>(0);
    if (any_counts) {
      acc_t q[N];
#pragma unroll
      for (int i = 0; i < N; ++i) q[i] = window.place - window.place;  // 0, or NaN
      const int64_t first_of_window = first - window.begin;
      const acc_t sum = for_window(op.bins, window, groups, op.turns, [&](int j, acc_t w) {
        // Where this lane's first bin is among those that the group has; -N: none of its bins is.
        const int64_t distance = first_of_window - (j - groups.lane());
        const int place = distance > -N && distance < groups.lanes() ? static_cast<int>(distance) : -N;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int lane = (place + i) & (groups.lanes() - 1);
          const acc_t other = __shfl_sync(kFullMask, w, groups.first_lane() + lane);
          if (place + i == lane) q[i] = other;
        }
      });
      const acc_t norm = acc_t(1) / sum;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const acc_t probability = exp_of((widen(x[i]) - largest) - log_sum);
        gradients[i] = narrow<scalar_t>(counts ? factor * (probability - q[i] * norm) : acc_t(0));
      }
    }
    if (token.exists) store_items(op.grad_logits.at(token.row, token.t), first, op.tokens.chunking, gradients);
  });
}

// ---- launches ----

template <class scalar_t>
struct CategoricalLossInputs {
  using acc_t = accumulate_t<scalar_t>;

  Sequences sequences;
  LogitRows<const scalar_t> logits;
  Bins<acc_t> bins;
  const acc_t* terminal_rewards;             // [B]
  Rows<const uint8_t> mask, attention_mask;  // null: all
  Rows<const acc_t> rewards;                 // null: none
  DiscountRows discounts;
  Reduction reduction;

  ScanPlan plan() const { return sequences.plan(1, kItems<acc_t>); }
  int64_t tokens() const { return (sequences.packed() ? 1 : sequences.B) * sequences.T; }
};

template <class acc_t>
struct CategoricalLossOutputs : LossOutputs<acc_t> {
  Rows<acc_t> returns, log_sums;
};

// Whether some token of these logits may begin elsewhere than on 16 bytes.
template <class scalar_t>
bool has_heads(const LogitRows<const scalar_t>& logits) {
  constexpr int64_t N = kLogits<scalar_t>;
  return reinterpret_cast<uintptr_t>(logits.data) % 16 != 0 || logits.row_stride % N != 0 ||
         logits.token_stride % N != 0;
}

// Where V begins in the workspace of the forward, after what its loss needs: aligned as an output is, so that the scan
// reads and writes in 16-byte accesses.
template <class acc_t>
int64_t values_offset(int64_t B, const ScanPlan& plan) {
  return (LossSums<acc_t>::workspace_bytes(B, plan) + 63) / 64 * 64;
}

// Bytes of workspace of the forward, on a 64-byte boundary: what its loss needs, V and the largest logit of each token.
template <class scalar_t>
int64_t categorical_value_loss_workspace_bytes(const CategoricalLossInputs<scalar_t>& in, const ScanPlan& plan) {
  using acc_t = accumulate_t<scalar_t>;
  return values_offset<acc_t>(in.sequences.B, plan) + 2 * in.tokens() * int64_t(sizeof(acc_t));
}

// plan: in.plan() or any other that covers the rows. normalizer: 0-dim or null.
template <class scalar_t>
void launch_categorical_value_loss(
    const CategoricalLossInputs<scalar_t>& in, const accumulate_t<scalar_t>* normalizer,
    const CategoricalLossOutputs<accumulate_t<scalar_t>>& out, const ScanPlan& plan, void* workspace,
    cudaStream_t stream) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t T = in.sequences.T, offset = values_offset<acc_t>(in.sequences.B, plan);
  const Rows<acc_t> values{reinterpret_cast<acc_t*>(static_cast<char*>(workspace) + offset), T};
  const Rows<acc_t> largest{values.data + in.tokens(), T};
  const auto tokens = TokenLogits<scalar_t>::of(in.sequences, in.logits, in.bins.K, true, has_heads(in.logits));
  const CategoricalValuesOp<scalar_t> project{tokens, in.bins, in.mask,     in.attention_mask,
                                              values, largest, out.log_sums};
  if (in.tokens() > 0) {
    LAMBDA_RETURN_LAUNCH((categorical_values_kernel<scalar_t>), tokens.blocks(), kThreads, stream, project);
  }

  const auto read_only = [&](const Rows<acc_t>& rows) {
    return in.sequences.rows(Rows<const acc_t>{rows.data, rows.stride});
  };
  const auto alignment = Alignment<kItems<acc_t>>(in.sequences.packed() ? 1 : in.sequences.B)
                             .add(values)
                             .add(out.returns)
                             .add_optional(in.mask)
                             .add_optional(in.rewards);
  const SequenceScan<acc_t> scan{
      in.sequences, 0, alignment.vectorized(), read_only(values), in.sequences.rows(in.mask)};
  const CategoricalLossOp<scalar_t> op{
      {scan, LossSums<acc_t>::of(in.sequences, in.reduction, normalizer, out, plan, workspace)},
      in.discounts,
      in.terminal_rewards,
      in.sequences.rows(in.rewards),
      in.logits,
      in.bins,
      tokens.groups,
      window_turns(in.bins, tokens.groups),
      read_only(largest),
      read_only(out.log_sums),
      in.sequences.rows(out.returns)};
  launch_scan(op, plan, workspace, stream);
}

template <class scalar_t>
struct CategoricalGradientInputs {
  using acc_t = accumulate_t<scalar_t>;

  Sequences sequences;
  LogitRows<const scalar_t> logits;
  Bins<acc_t> bins;
  Rows<const acc_t> returns, log_sums;
  const acc_t* grad_loss;         // 0-dim; null where there is no reduction
  Rows<const acc_t> grad_losses;  // of each token, where there is no reduction, else null
  const acc_t* scale;             // [B]
  Reduction reduction;
};

// grad_logits: of every token. Sequences must have tokens.
template <class scalar_t>
void launch_categorical_value_loss_backward(
    const CategoricalGradientInputs<scalar_t>& in, const LogitRows<scalar_t>& grad_logits, cudaStream_t stream) {
  constexpr int N = kLogits<scalar_t>;
  const LogitRows<const scalar_t> out{grad_logits.data, grad_logits.row_stride, grad_logits.token_stride};
  const auto place = [](const auto& rows) { return reinterpret_cast<uintptr_t>(rows.data) / sizeof(scalar_t); };
  const bool vectorized = (place(in.logits) - place(out)) % N == 0 &&
                          (in.logits.row_stride - out.row_stride) % N == 0 &&
                          (in.logits.token_stride - out.token_stride) % N == 0;
  const auto tokens = TokenLogits<scalar_t>::of(in.sequences, in.logits, in.bins.K, vectorized, has_heads(in.logits));
  const CategoricalGradientOp<scalar_t> op{
      tokens,         in.bins,  window_turns(in.bins, tokens.groups),     in.returns, in.log_sums, in.grad_loss,
      in.grad_losses, in.scale, in.reduction != Reduction::kSequenceMean, grad_logits};
  LAMBDA_RETURN_LAUNCH((categorical_value_loss_backward_kernel<scalar_t>), tokens.blocks(), kThreads, stream, op);
}

}  // namespace lambda_return::cuda
