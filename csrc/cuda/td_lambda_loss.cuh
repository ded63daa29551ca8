// td_lambda_loss and its backward on the device; the mathematics of a token is in kernels/token_loss.h.
#pragma once

#include "td_lambda.cuh"
#include "token_reduction.cuh"

namespace lambda_return::cuda {

// What both are called with besides the sequences.
template <class scalar_t>
struct TdLambdaLossInputs : TdLambdaInputs<scalar_t> {
  using Base = TdLambdaInputs<scalar_t>;

  Rows<const uint8_t> attention_mask;  // null: every valid token counts
  Rows<const scalar_t> old_values;     // null: not clipped
  DiscountRows discounts;
  TokenLoss<accumulate_t<scalar_t>> token_loss;
  Reduction reduction;

  Alignment<Base::N> alignment() const {
    return Base::alignment().add_optional(attention_mask).add_optional(old_values);
  }
};

// The kernels of regression and of cross-entropy are two: with the logarithms of the one beside the old values of the
// other, half of the threads of an SM have too few registers.
enum class LossFamily { kRegression, kCrossEntropy };

inline LossFamily family_of(LossKind kind) {
  return kind == LossKind::kBce || kind == LossKind::kBceLogits ? LossFamily::kCrossEntropy : LossFamily::kRegression;
}

// What the forward of a loss writes.
template <class acc_t>
struct LossOutputs {
  acc_t* loss;         // 0-dim; null where there is no reduction
  Rows<acc_t> losses;  // of each token, where there is no reduction, else null
  acc_t* scale;        // [B]
  double* statistics;  // [6]
};

// The same as a kernel needs it.
template <class acc_t>
struct LossSums {
  TokenReduction<acc_t> reduction;
  Rows<acc_t> losses;
  bool whole_sequences;  // of a block, else a segment
  int64_t segments;      // of one row, where they are not packed
  int64_t segment_tokens;

  // Bytes of workspace: what the scan needs, the sums of each block, a token count a sequence.
  static int64_t workspace_bytes(int64_t B, const ScanPlan& plan) {
    return scan_bytes(plan) + (plan.blocks * kSumFields + B) * int64_t(sizeof(double));
  }
  static LossSums of(
      const Sequences& sequences, Reduction how, const acc_t* normalizer, const LossOutputs<acc_t>& out,
      const ScanPlan& plan, void* workspace) {
    auto* partials = reinterpret_cast<double*>(static_cast<char*>(workspace) + scan_bytes(plan));
    auto* tokens = reinterpret_cast<int64_t*>(partials + plan.blocks * kSumFields);
    return {
        {how, sequences.B, normalizer, static_cast<unsigned*>(workspace), partials, tokens, out.loss, out.scale,
         out.statistics},
        sequences.rows(out.losses),
        plan.kind != ScanPlan::kLongRows,
        plan.segments,
        plan.tiles * kThreads * kItems<acc_t>};
  }

 private:
  static int64_t scan_bytes(const ScanPlan& plan) { return (plan.workspace_bytes<acc_t>() + 15) / 16 * 16; }
};

// The part that forward and backward share: both scan for G, and both know which tokens count.
template <class scalar_type, LossFamily kFamily>
struct TdLambdaLossScan : SequenceScan<scalar_type> {
  using Base = SequenceScan<scalar_type>;
  using typename Base::acc_t;
  using typename Base::Row;
  static constexpr bool kRightToLeft = true;
  static constexpr int N = Base::N;
  static constexpr int kBlocksPerSm = sizeof(scalar_type) == 8 ? 2 : 4;

  DiscountRows discounts;
  const acc_t* terminal_rewards;       // [B]
  Rows<const acc_t> rewards;           // null: none
  Rows<const uint8_t> attention_mask;  // null: every valid token counts
  Rows<const scalar_type> old_values;  // null: not clipped
  TokenLoss<acc_t> token_loss;

  struct Items {
    scalar_type values[N];
    acc_t rewards[N];
    unsigned valid, counted;  // bit i: token i is valid, counts
  };
  // The losses wait until all targets of a chunk are known, and are then made in packets of one 16-byte access: what
  // they need beside values and targets would otherwise take more registers than there are.
  static constexpr int kPacket = 16 / sizeof(scalar_type);
  struct Targets {
    acc_t targets[N];
  };

  TdLambdaLossScan(const TdLambdaLossInputs<scalar_type>& in, const Alignment<N>& alignment)
      : Base(in.scan(0, alignment)),
        discounts(in.discounts),
        terminal_rewards(in.terminal_rewards),
        rewards(in.sequences.rows(in.rewards)),
        attention_mask(in.sequences.rows(in.attention_mask)),
        old_values(in.sequences.rows(in.old_values)),
        token_loss(in.token_loss) {}

  __device__ Row row(int64_t index) const { return this->row_of(index, discounts); }
  __device__ acc_t initial(const Row& row) const { return terminal_rewards[row.sequence]; }
  __device__ void load(const Row& row, int64_t first, Items& items) const {
    uint8_t mask[N], attended[N];
    this->load_mask(this->mask, row, first, mask);
    this->load_mask(attention_mask, row, first, attended);
    this->load_tokens(row, first, items.values);
    this->load_optional(rewards, row, first, items.rewards);
    items.valid = items.counted = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      items.valid |= mask[i] != 0 ? 1u << i : 0u;
      items.counted |= attended[i] != 0 ? 1u << i : 0u;
    }
    items.counted &= items.valid;
  }
  __device__ bool valid(const Items& items, int i) const { return (items.valid >> i & 1) != 0; }
  __device__ static bool counts(const Items& items, int i) { return (items.counted >> i & 1) != 0; }
  __device__ acc_t value(const Items& items, int i) const {
    const acc_t x = widen(items.values[i]);
    return kFamily == LossFamily::kCrossEntropy ? token_loss.value(x) : x;
  }
  __device__ acc_t step(const Row& row, const Items& items, int i, acc_t h) const {
    return row.discount.step(value(items, i), items.rewards[i] + h);
  }
  __device__ void visit(const Row&, const Items& items, int i, acc_t h, Targets& output) const {
    output.targets[i] = items.rewards[i] + h;
  }

  // Calls use(begin, result_of) for each packet: result_of(i) is the result of token begin + i; of a token that does
  // not count, it means nothing.
  template <class Use>
  __device__ __forceinline__ void for_packets(
      const Row& row, int64_t first, const Items& items, const Targets& output, const Use& use) const {
#pragma unroll
    for (int begin = 0; begin < N; begin += kPacket) {
      scalar_type old[kPacket];
      if (kFamily == LossFamily::kRegression && old_values.data != nullptr) {
        const scalar_type* tokens = this->at(old_values, row);
        load_items(tokens, first + begin, this->row_chunking(row), narrow<scalar_type>(0), old);
      }
      use(begin, [&](int i) -> TokenLossResult<acc_t> {
        const acc_t x = widen(items.values[begin + i]), g = output.targets[begin + i];
        if (kFamily == LossFamily::kCrossEntropy) {
          const acc_t logit = computed_anew(x);  // the sigmoids of the scan would take a register a token
          return token_loss(logit, token_loss.value(logit), g);
        }
        return old_values.data == nullptr ? token_loss.of_error(x - g) : token_loss.clipped(x, widen(old[i]), g);
      });
    }
  }
  __device__ void finish_row(const Row&, acc_t) const {}
};

// What a scan over sequences does with the losses of their tokens.
template <class Scan>
struct LossScan : Scan {
  using acc_t = typename Scan::acc_t;
  using Row = typename Scan::Row;
  static constexpr bool kReduces = true;

  LossSums<acc_t> sums;

  __device__ void start_block() const { sums.reduction.clear(); }
  template <int kTeamWarps, class Output>
  __device__ void finish_team(const Row& row, const Output&) const {
    sums.reduction.template finish_sequence<kTeamWarps>(row.sequence);
  }
  template <class Output>
  __device__ void finish_block(int64_t index, const Output&) const {
    this->clear_outside(sums.losses);
    sums.reduction.finish(index, sums.whole_sequences, [&](int64_t sequence) {
      return this->sequences.packed() ? this->first_segment(sequence, sums.segment_tokens) : sequence * sums.segments;
    });
  }
};

template <class scalar_type, LossFamily kFamily>
struct TdLambdaLossOp : LossScan<TdLambdaLossScan<scalar_type, kFamily>> {
  using Base = TdLambdaLossScan<scalar_type, kFamily>;
  using typename Base::acc_t;
  using typename Base::Items;
  using typename Base::Row;
  static constexpr int N = Base::N;

  using Output = typename Base::Targets;

  // A chunk is summed in the accumulation type, chunks in float64.
  __device__ void finish_chunk(const Row& row, int64_t first, const Items& items, Output& output) const {
    acc_t loss = 0;
    int clipped = 0;
    this->for_packets(row, first, items, output, [&](int begin, const auto& result_of) {
      acc_t of_tokens[Base::kPacket];
#pragma unroll
      for (int i = 0; i < Base::kPacket; ++i) {
        const bool counts = this->counts(items, begin + i);
        const TokenLossResult<acc_t> result = result_of(i);
        of_tokens[i] = counts ? result.loss : acc_t(0);
        loss += of_tokens[i];
        clipped += counts && result.clipped ? 1 : 0;
      }
      if (this->sums.losses.data == nullptr) return;
      store_items(this->at(this->sums.losses, row), first + begin, this->row_chunking(row), of_tokens);
    });
    this->sums.reduction.add(kSequenceLoss, static_cast<double>(loss));
    this->sums.reduction.add(kSequenceTokens, __popc(items.counted));
    this->sums.reduction.add(kStatistics + 5, clipped);
    add_moments(kStatistics + 1, items, [&](int i) { return output.targets[i]; });
    add_moments(kStatistics + 3, items, [&](int i) { return output.targets[i] - this->value(items, i); });
  }
  // The sum of x(i) over the tokens that count, and after it that of its squares.
  template <class X>
  __device__ __forceinline__ void add_moments(int field, const Items& items, const X& x) const {
    acc_t sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const acc_t term = this->counts(items, i) ? x(i) : acc_t(0);
      sum += term;
      squares += term * term;
    }
    this->sums.reduction.add(field, static_cast<double>(sum));
    this->sums.reduction.add(field + 1, static_cast<double>(squares));
  }
};

// grad_values <- grad_loss * scale * d loss / d value of each token that counts.
template <class scalar_type, LossFamily kFamily>
struct TdLambdaLossBackwardOp : TdLambdaLossScan<scalar_type, kFamily>, NoReduction {
  using Scan = TdLambdaLossScan<scalar_type, kFamily>;
  using typename Scan::acc_t;
  using typename Scan::Items;
  using typename Scan::Row;
  using Output = typename Scan::Targets;

  const acc_t* grad_loss;         // 0-dim; null where there is no reduction
  Rows<const acc_t> grad_losses;  // of each token, where there is no reduction, else null
  const acc_t* scale;             // [B]
  Rows<scalar_type> grad_values;

  __device__ void finish_chunk(const Row& row, int64_t first, const Items& items, Output& output) const {
    const acc_t of_sequence = grad_loss == nullptr ? acc_t(0) : *grad_loss * scale[row.sequence];
    this->for_packets(row, first, items, output, [&](int begin, const auto& result_of) {
      acc_t of_tokens[Scan::kPacket];
      if (grad_losses.data != nullptr) {
        load_items(this->at(grad_losses, row), first + begin, this->row_chunking(row), acc_t(0), of_tokens);
      }
      scalar_type gradients[Scan::kPacket];
#pragma unroll
      for (int i = 0; i < Scan::kPacket; ++i) {
        const acc_t factor = grad_losses.data != nullptr ? of_tokens[i] : of_sequence;
        const bool counts = this->counts(items, begin + i);
        gradients[i] = narrow<scalar_type>(counts ? factor * result_of(i).derivative : acc_t(0));
      }
      store_items(this->at(grad_values, row), first + begin, this->row_chunking(row), gradients);
    });
  }
  __device__ void finish_block(int64_t, const Output&) const { this->clear_outside(grad_values); }
};

// ---- launches ----

template <class scalar_t, class Launch>
void with_family(const TdLambdaLossInputs<scalar_t>& in, const Launch& launch) {
  if (family_of(in.token_loss.kind) == LossFamily::kCrossEntropy) {
    launch.template operator()<LossFamily::kCrossEntropy>();
  } else {
    launch.template operator()<LossFamily::kRegression>();
  }
}

template <class scalar_t>
int64_t td_lambda_loss_workspace_bytes(const TdLambdaLossInputs<scalar_t>& in, const ScanPlan& plan) {
  return LossSums<accumulate_t<scalar_t>>::workspace_bytes(in.sequences.B, plan);
}

// plan: in.plan(1) or any other that covers the rows. normalizer: 0-dim or null.
template <class scalar_t>
void launch_td_lambda_loss(
    const TdLambdaLossInputs<scalar_t>& in, const accumulate_t<scalar_t>* normalizer,
    const LossOutputs<accumulate_t<scalar_t>>& out, const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  using Sums = LossSums<accumulate_t<scalar_t>>;
  const auto launch = [&]<LossFamily kFamily>() {
    const TdLambdaLossOp<scalar_t, kFamily> op{
        {{in, in.alignment().add_optional(out.losses)},
         Sums::of(in.sequences, in.reduction, normalizer, out, plan, workspace)}};
    launch_scan(op, plan, workspace, stream);
  };
  with_family(in, launch);
}

// grad_loss: 0-dim, or null; then grad_losses are of each token. workspace: plan.workspace_bytes<acc_t>() bytes.
template <class scalar_t>
void launch_td_lambda_loss_backward(
    const TdLambdaLossInputs<scalar_t>& in, const accumulate_t<scalar_t>* grad_loss,
    Rows<const accumulate_t<scalar_t>> grad_losses, const accumulate_t<scalar_t>* scale, Rows<scalar_t> grad_values,
    const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  const auto alignment = in.alignment().add_optional(grad_losses).add(grad_values);
  const auto launch = [&]<LossFamily kFamily>() {
    const TdLambdaLossBackwardOp<scalar_t, kFamily> op{
        {in, alignment}, {}, grad_loss, in.sequences.rows(grad_losses), scale, in.sequences.rows(grad_values)};
    launch_scan(op, plan, workspace, stream);
  };
  with_family(in, launch);
}

}  // namespace lambda_return::cuda
