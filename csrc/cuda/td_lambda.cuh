// td_lambda, td_lambda_pair, td_lambda_map and the adjoint on the device: padded or packed rows, a discount a row,
// rewards a step. The recurrence is that of kernels/lambda_return.h with G = r + H.
//
// What an operator can do without (mask, rewards, cu_seqlens) is a null pointer and a branch that every thread takes
// alike, not another kernel.
#pragma once

#include "../kernels/discount_rows.h"
#include "row_scan.cuh"

namespace lambda_return::cuda {

// B sequences of a [B, T] matrix or, with cu_seqlens [B + 1], of a packed [T].
struct Sequences {
  int64_t B, T;
  const int64_t* cu_seqlens;

  struct Span {
    int64_t begin, length;
  };

  LAMBDA_RETURN_HOST_DEVICE bool packed() const { return cu_seqlens != nullptr; }

  // Whatever cu_seqlens holds, inside of the tensor.
  __device__ __forceinline__ int64_t begin(int64_t sequence) const { return clamp(cu_seqlens[sequence], 0); }
  __device__ __forceinline__ Span span(int64_t sequence) const {
    if (!packed()) return {0, T};
    const int64_t first = begin(sequence);
    return {first, clamp(cu_seqlens[sequence + 1], first) - first};
  }

  // The rows of a matrix: those of a packed one all begin at its first token, each with a span of its own.
  template <class T_>
  Rows<T_> rows(const Rows<T_>& matrix) const {
    return packed() ? Rows<T_>{matrix.data, 0} : matrix;
  }

  ScanPlan plan(int64_t outputs, int items) const {
    return packed() ? ScanPlan::of_packed(B, T, outputs, items) : ScanPlan::of(B * outputs, T, items);
  }

 private:
  __device__ __forceinline__ int64_t clamp(int64_t token, int64_t least) const {
    return token < least ? least : token < T ? token : T;
  }
};

// What the general operators share: a matrix of tokens (values, or the gradients of returns), which of them are valid,
// and where the rows lie. There are 2^log2_outputs rows for each sequence, next to one another, so that the second one
// finds its tokens in the cache.
template <class scalar_type>
struct SequenceScan {
  using scalar_t = scalar_type;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int N = kItems<scalar_t>;
  // float64 is for checking, and would spill with half of the threads of an SM.
  static constexpr int kBlocksPerSm = sizeof(scalar_t) == 8 ? 3 : 4;

  Sequences sequences;
  int log2_outputs;
  bool vectorized;
  Rows<const scalar_t> tokens;
  Rows<const uint8_t> mask;  // null: all valid

  struct Row {
    int64_t sequence, begin, length;
    Discount<acc_t> discount;
  };

  __device__ int64_t rows() const { return sequences.B << log2_outputs; }
  __device__ Row row_of(int64_t sequence, const DiscountRows& discounts) const {
    const auto [begin, length] = sequences.span(sequence);
    return {sequence, begin, length, discounts.at<acc_t>(sequence)};
  }
  __device__ Chunking row_chunking(const Row& row) const { return {row.length, vectorized}; }
  __device__ const Discount<acc_t>& discount_of(const Row& row) const { return row.discount; }
  // Row pointers are two registers each, for six matrices: a multiplication instead.
  template <class T>
  __device__ __forceinline__ T* at(const Rows<T>& matrix, const Row& row) const {
    return matrix[computed_anew(row.sequence)] + row.begin;
  }
  __device__ const scalar_t* first_row(const Row& row) const { return at(tokens, row); }

  // Items of another matrix, or 0 where there is none.
  template <class T>
  __device__ __forceinline__ void load_optional(
      const Rows<const T>& matrix, const Row& row, int64_t first, T (&items)[N]) const {
    if (matrix.data != nullptr) {
      load_items(at(matrix, row), first, row_chunking(row), T(0), items);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) items[i] = T(0);
    }
  }
  // Items of a mask, or 1 for every token of the row where there is none.
  __device__ __forceinline__ void load_mask(
      const Rows<const uint8_t>& matrix, const Row& row, int64_t first, uint8_t (&items)[N]) const {
    if (matrix.data != nullptr) {
      load_items(at(matrix, row), first, row_chunking(row), uint8_t(0), items);
    } else if (first >= 0 && first + N <= row.length) {
#pragma unroll
      for (int i = 0; i < N; ++i) items[i] = 1;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) items[i] = first + i >= 0 && first + i < row.length ? 1 : 0;
    }
  }
  __device__ __forceinline__ void load_tokens(const Row& row, int64_t first, scalar_t (&items)[N]) const {
    load_items(at(tokens, row), first, row_chunking(row), narrow<scalar_t>(0), items);
  }

  __device__ __forceinline__ Place place(unsigned ticket, const LookBack<acc_t>& look_back) const {
    if (!sequences.packed()) {  // the rows take turns, so that all of them advance together
      const int64_t segment = ticket / rows(), row = ticket % rows();
      return {row, segment, row * look_back.segments, true, segment == look_back.segments - 1};
    }
    // Row after row. Where cu_seqlens is not in order, tickets stand for segments that make no sense, but no two for
    // the same one, and each publishes at its own index, which is what others wait for.
    const int64_t index = ticket >> log2_outputs, output = ticket & ((1 << log2_outputs) - 1);
    const int64_t segment_tokens = look_back.tiles * kThreads * N;
    const int lane = threadIdx.x % kWarp;
    int begun = 0;  // sequences whose first segment is this one or before
    for (int64_t b = 0; b < sequences.B; b += kWarp) {
      const bool has_begun = b + lane < sequences.B && first_segment(b + lane, segment_tokens) <= index;
      begun += __popc(__ballot_sync(kFullMask, has_begun));
    }
    const int64_t sequence = begun == 0 ? 0 : begun - 1, first = first_segment(sequence, segment_tokens);
    const Chunking chunking{sequences.span(sequence).length, vectorized};
    const int head = chunking.template head<N>(tokens.data + sequences.begin(sequence));
    const int64_t chunks = chunking.template chunks<N>(head), chunks_of_segment = segment_tokens / N;
    const int64_t needed = chunks <= chunks_of_segment ? 1 : (chunks + chunks_of_segment - 1) / chunks_of_segment;
    const int64_t segment = index - first;
    return {
        sequence << log2_outputs | output, segment, output * look_back.segments + first,
        segment >= 0 && segment < needed, segment == needed - 1};
  }
  __device__ __forceinline__ int64_t first_segment(int64_t sequence, int64_t segment_tokens) const {
    return ScanPlan::packed_segments(sequence, sequences.begin(sequence), segment_tokens, N);
  }

  // Tokens of a packed matrix before its first and after its last sequence are 0: padding of the whole.
  template <class T>
  __device__ __forceinline__ void clear_outside(const Rows<T>& output) const {
    if (!sequences.packed() || output.data == nullptr) return;
    const int64_t begin = sequences.begin(0), end = sequences.begin(sequences.B), step = gridDim.x * int64_t(kThreads);
    const int64_t mine = blockIdx.x * int64_t(kThreads) + threadIdx.x;
    for (int64_t t = mine; t < begin; t += step) output.data[t] = narrow<T>(0);
    for (int64_t t = end + mine; t < sequences.T; t += step) output.data[t] = narrow<T>(0);
  }
};

// ---- returns, advantages, both, or the map of each row ----

// One row of output: G, or G - V.
template <class scalar_t>
struct ReturnsOutput {
  DiscountRows discounts;
  bool advantages;
  Rows<scalar_t> tokens;  // [B, T]; null: not asked for
};

template <class scalar_type>
struct TdLambdaOp : SequenceScan<scalar_type>, NoReduction {
  using Base = SequenceScan<scalar_type>;
  using typename Base::acc_t;
  static constexpr bool kRightToLeft = true;
  static constexpr int N = Base::N;

  Rows<const acc_t> rewards;      // null: none
  const acc_t* terminal_rewards;  // [B]; null: see initial
  ReturnsOutput<scalar_type> outputs[2];
  acc_t* maps;  // [B, 2]; null: not asked for

  struct Row : Base::Row {
    int output;
  };
  struct Items {
    scalar_type values[N];
    acc_t rewards[N];
    uint8_t mask[N];
  };
  struct Output {
    scalar_type returns[N];
  };

  __device__ Row row(int64_t index) const {
    const int output = static_cast<int>(index) & ((1 << this->log2_outputs) - 1);
    Row row{this->row_of(index >> this->log2_outputs, outputs[output].discounts), output};
    if (gives_slope(row)) row.discount.value = acc_t(0);
    return row;
  }
  // A map (a, b) is read off two carries: a is what 1 becomes where all terms are 0, b what 0 becomes with them.
  __device__ bool gives_slope(const Row& row) const { return maps != nullptr && row.output == 0; }
  __device__ acc_t initial(const Row& row) const {
    return maps == nullptr ? terminal_rewards[row.sequence] : acc_t(gives_slope(row) ? 1 : 0);
  }
  __device__ void load(const Row& row, int64_t first, Items& items) const {
    this->load_mask(this->mask, row, first, items.mask);
    // Monte-Carlo does not look at V: half of the bytes need not move.
    if (row.discount.value != acc_t(0) || outputs[row.output].advantages) this->load_tokens(row, first, items.values);
    this->load_optional(gives_slope(row) ? Rows<const acc_t>{nullptr, 0} : rewards, row, first, items.rewards);
  }
  __device__ bool valid(const Items& items, int i) const { return items.mask[i] != 0; }
  __device__ acc_t step(const Row& row, const Items& items, int i, acc_t h) const {
    return row.discount.step(widen(items.values[i]), items.rewards[i] + h);
  }
  __device__ void visit(const Row& row, const Items& items, int i, acc_t h, Output& output) const {
    const acc_t g = items.rewards[i] + h;
    const acc_t wanted = outputs[row.output].advantages ? g - widen(items.values[i]) : g;
    output.returns[i] = narrow<scalar_type>(valid(items, i) ? wanted : acc_t(0));
  }
  __device__ void finish_chunk(const Row& row, int64_t first, const Items&, Output& output) const {
    if (maps != nullptr) return;
    store_items(this->at(outputs[row.output].tokens, row), first, this->row_chunking(row), output.returns);
  }
  __device__ void finish_row(const Row& row, acc_t h) const {
    if (maps != nullptr) maps[2 * row.sequence + row.output] = h;
  }
  __device__ void finish_block(int64_t, const Output&) const {
    this->clear_outside(outputs[0].tokens);
    this->clear_outside(outputs[1].tokens);
  }
};

// ---- the adjoint ----

template <class scalar_type>
struct TdLambdaBackwardOp : SequenceScan<scalar_type>, NoReduction {
  using Base = SequenceScan<scalar_type>;
  using typename Base::acc_t;
  using typename Base::Row;
  static constexpr bool kRightToLeft = false;
  static constexpr int N = Base::N;

  DiscountRows discounts;
  Rows<scalar_type> grad_values;
  acc_t* grad_terminal_rewards;  // [B]
  Rows<acc_t> grad_rewards;      // null: not asked for

  struct Items {
    scalar_type grad_returns[N];
    uint8_t mask[N];
  };
  struct Output {
    scalar_type grad_values[N];
    acc_t grad_rewards[N];
  };

  __device__ Row row(int64_t index) const { return this->row_of(index, discounts); }
  __device__ acc_t initial(const Row&) const { return 0; }
  __device__ void load(const Row& row, int64_t first, Items& items) const {
    this->load_mask(this->mask, row, first, items.mask);
    this->load_tokens(row, first, items.grad_returns);
  }
  __device__ bool valid(const Items& items, int i) const { return items.mask[i] != 0; }
  __device__ acc_t step(const Row& row, const Items& items, int i, acc_t h) const {
    return row.discount.adjoint_step(widen(items.grad_returns[i]), h);
  }
  __device__ void visit(const Row& row, const Items& items, int i, acc_t h, Output& output) const {
    output.grad_values[i] = narrow<scalar_type>(valid(items, i) ? row.discount.weighted_value(h) : acc_t(0));
    output.grad_rewards[i] = valid(items, i) ? step(row, items, i, h) : acc_t(0);
  }
  __device__ void finish_chunk(const Row& row, int64_t first, const Items&, Output& output) const {
    store_items(this->at(grad_values, row), first, this->row_chunking(row), output.grad_values);
    if (grad_rewards.data == nullptr) return;
    store_items(this->at(grad_rewards, row), first, this->row_chunking(row), output.grad_rewards);
  }
  __device__ void finish_row(const Row& row, acc_t h) const { grad_terminal_rewards[row.sequence] = h; }
  __device__ void finish_block(int64_t, const Output&) const {
    this->clear_outside(grad_values);
    this->clear_outside(grad_rewards);
  }
};

// ---- launches ----

// The inputs of a launch. Sequences may be empty, and there may be none.
template <class scalar_t>
struct TdLambdaInputs {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int N = kItems<scalar_t>;

  Sequences sequences;
  Rows<const scalar_t> tokens;    // values, or the gradients of returns
  const acc_t* terminal_rewards;  // [B]; null for td_lambda_map and the adjoint
  Rows<const uint8_t> mask;       // null: all valid
  Rows<const acc_t> rewards;      // null: none

  // outputs: rows of output for each sequence, 1 or 2.
  ScanPlan plan(int64_t outputs) const { return sequences.plan(outputs, N); }
  Alignment<N> alignment() const {
    return Alignment<N>(sequences.packed() ? 1 : sequences.B).add(tokens).add_optional(mask).add_optional(rewards);
  }
  SequenceScan<scalar_t> scan(int log2_outputs, const Alignment<N>& alignment) const {
    return {sequences, log2_outputs, alignment.vectorized(), sequences.rows(tokens), sequences.rows(mask)};
  }
};

// outputs: the G or G - V of each row. plan: in.plan(1) or any other that covers the rows.
// workspace: plan.workspace_bytes<acc_t>() bytes, 16-byte aligned; the same for all launches below.
template <class scalar_t>
void launch_td_lambda(
    const TdLambdaInputs<scalar_t>& in, const ReturnsOutput<scalar_t>& output, const ScanPlan& plan, void* workspace,
    cudaStream_t stream) {
  const auto alignment = in.alignment().add(output.tokens);
  const ReturnsOutput<scalar_t> rows{output.discounts, output.advantages, in.sequences.rows(output.tokens)};
  const TdLambdaOp<scalar_t> op{in.scan(0, alignment), {},         in.sequences.rows(in.rewards),
                                in.terminal_rewards,   {rows, {}}, nullptr};
  launch_scan(op, plan, workspace, stream);
}

// plan: in.plan(2) or any other.
template <class scalar_t>
void launch_td_lambda_pair(
    const TdLambdaInputs<scalar_t>& in, const ReturnsOutput<scalar_t>& first, const ReturnsOutput<scalar_t>& second,
    const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  const auto alignment = in.alignment().add(first.tokens).add(second.tokens);
  const ReturnsOutput<scalar_t> rows[2] = {
      {first.discounts, first.advantages, in.sequences.rows(first.tokens)},
      {second.discounts, second.advantages, in.sequences.rows(second.tokens)}};
  const TdLambdaOp<scalar_t> op{in.scan(1, alignment), {},     in.sequences.rows(in.rewards), in.terminal_rewards,
                                {rows[0], rows[1]},    nullptr};
  launch_scan(op, plan, workspace, stream);
}

// maps [B, 2]. plan: in.plan(2) or any other.
template <class scalar_t>
void launch_td_lambda_map(
    const TdLambdaInputs<scalar_t>& in, const DiscountRows& discounts, accumulate_t<scalar_t>* maps,
    const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  const ReturnsOutput<scalar_t> none{discounts, false, {nullptr, 0}};
  const TdLambdaOp<scalar_t> op{
      in.scan(1, in.alignment()), {}, in.sequences.rows(in.rewards), nullptr, {none, none}, maps};
  launch_scan(op, plan, workspace, stream);
}

// plan: in.plan(1) or any other.
template <class scalar_t>
void launch_td_lambda_backward(
    const TdLambdaInputs<scalar_t>& in, const DiscountRows& discounts, Rows<scalar_t> grad_values,
    accumulate_t<scalar_t>* grad_terminal_rewards, Rows<accumulate_t<scalar_t>> grad_rewards, const ScanPlan& plan,
    void* workspace, cudaStream_t stream) {
  const auto alignment = in.alignment().add(grad_values).add_optional(grad_rewards);
  const TdLambdaBackwardOp<scalar_t> op{
      in.scan(0, alignment),          {}, discounts, in.sequences.rows(grad_values), grad_terminal_rewards,
      in.sequences.rows(grad_rewards)};
  launch_scan(op, plan, workspace, stream);
}

}  // namespace lambda_return::cuda
