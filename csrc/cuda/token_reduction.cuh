// From the sums of every thread to a loss, the scale of each sequence's gradient and the statistics, in one launch:
// every block leaves its sums, and the block that finishes last adds them up in the order of their index. No atomics on
// floats, same bits each time.
#pragma once

#include "../kernels/token_loss.h"
#include "row_scan.cuh"

namespace lambda_return::cuda {

// What a block leaves: the members of TokenSums, then the means of its sequences and how many have tokens.
enum SumField {
  kLossSum,
  kStatistics,  // as in the output
  kMeanSum = kStatistics + TokenSums::kStatistics,
  kSequenceCount,
  kSumFields,
  // Of the sequence at hand: into the sums when it ends.
  kSequenceLoss = kSumFields,
  kSequenceTokens,
  kSlots,
};

struct SequenceSums {
  double loss;
  int64_t tokens;
};

template <class acc_t>
struct TokenReduction {
  Reduction reduction;
  int64_t B;
  const acc_t* normalizer;  // 0-dim; null: the number of tokens, or of sequences
  unsigned* done;           // blocks that have left their sums; cleared before the launch
  double* partials;         // [blocks, kSumFields]
  int64_t* tokens;          // [B], where sequences are averaged
  acc_t* loss;              // 0-dim; null where there is no reduction
  acc_t* scale;             // [B]
  double* statistics;       // [6]

  bool __device__ averages_sequences() const { return reduction == Reduction::kSequenceMean; }

  // Every thread has a slot for each field, in shared memory: the registers are for the tokens.
  using Slots = double[kSlots][kThreads];
  static __device__ __forceinline__ Slots& slots() {
    __shared__ Slots memory;
    return memory;
  }
  static __device__ __forceinline__ void clear() {
#pragma unroll
    for (int field = 0; field < kSlots; ++field) slots()[field][threadIdx.x] = 0;
  }
  static __device__ __forceinline__ void add(int field, double value) { slots()[field][threadIdx.x] += value; }
  // What the slots of this thread have of the sequence at hand; the next one starts from nothing.
  static __device__ __forceinline__ SequenceSums end_sequence() {
    double &loss = slots()[kSequenceLoss][threadIdx.x], &tokens = slots()[kSequenceTokens][threadIdx.x];
    const SequenceSums sums{loss, static_cast<int64_t>(tokens)};
    add(kLossSum, loss);
    add(kStatistics, tokens);
    loss = tokens = 0;
    return sums;
  }

  // The sums of a warp's sequence, in every lane.
  static __device__ __forceinline__ SequenceSums warp_sum(SequenceSums mine) {
#pragma unroll
    for (int delta = kWarp / 2; delta > 0; delta /= 2) {
      mine.loss += __shfl_xor_sync(kFullMask, mine.loss, delta);
      mine.tokens += __shfl_xor_sync(kFullMask, mine.tokens, delta);
    }
    return mine;
  }
  // The end of a sequence that a team of warps walked along; called by all of its threads.
  template <int kTeamWarps>
  __device__ __forceinline__ void finish_sequence(int64_t sequence) const {
    const SequenceSums mine = end_sequence();
    if (!averages_sequences()) return;
    SequenceSums sums = warp_sum(mine);
    if constexpr (kTeamWarps > 1) {
      __shared__ SequenceSums of_warp[kWarps];
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
      __syncthreads();
      sums = of_warp[0];
      for (int warp = 1; warp < kWarps; ++warp) {
        sums.loss += of_warp[warp].loss;
        sums.tokens += of_warp[warp].tokens;
      }
      __syncthreads();  // before the next sequence's sums
    }
    if (threadIdx.x % (kTeamWarps * kWarp) == 0) add_mean(sequence, sums);
  }
  __device__ __forceinline__ void add_mean(int64_t sequence, const SequenceSums& sums) const {
    tokens[sequence] = sums.tokens;
    if (sums.tokens == 0) return;
    add(kMeanSum, sums.loss / static_cast<double>(sums.tokens));
    add(kSequenceCount, 1);
  }

  // sums <- over the slots of all threads of the block; the slots are free again.
  static __device__ __forceinline__ void block_sums(double* sums) {
    __syncthreads();
    for (int field = threadIdx.x / kWarp; field < kSumFields; field += kWarps) {
      double sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += slots()[field][i * kWarp + threadIdx.x % kWarp];
#pragma unroll
      for (int delta = kWarp / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(kFullMask, sum, delta);
      if (threadIdx.x % kWarp == 0) sums[field] = sum;
    }
    __syncthreads();
  }

  // Called by every thread of every block at its end; index is where the block's sums belong. Where blocks had no whole
  // sequences, segment_of(sequence) is the index of its first segment, for sequence = B one beyond the last.
  template <class SegmentOf>
  __device__ __forceinline__ void finish(int64_t index, bool whole_sequences, const SegmentOf& segment_of) const {
    __shared__ bool is_last;
    end_sequence();  // of a segment
    block_sums(partials + index * kSumFields);
    if (threadIdx.x == 0) is_last = fetch_add_acq_rel(done, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;

    clear();
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
#pragma unroll
      for (int field = 0; field < kSumFields; ++field) add(field, partials[i * kSumFields + field]);
    }
    if (averages_sequences() && !whole_sequences) add_segments(segment_of);
    __shared__ double all[kSumFields];
    block_sums(all);
    write(all);
  }

 private:
  // A warp adds up the segments of a sequence.
  template <class SegmentOf>
  __device__ __forceinline__ void add_segments(const SegmentOf& segment_of) const {
#pragma unroll 1
    for (int64_t sequence = threadIdx.x / kWarp; sequence < B; sequence += kWarps) {
      SequenceSums sums{};
      const int64_t end = segment_of(sequence + 1);
#pragma unroll 1
      for (int64_t i = segment_of(sequence) + threadIdx.x % kWarp; i < end; i += kWarp) {
        sums.loss += partials[i * kSumFields + kLossSum];
        sums.tokens += static_cast<int64_t>(partials[i * kSumFields + kStatistics]);
      }
      sums = warp_sum(sums);
      if (threadIdx.x % kWarp == 0) add_mean(sequence, sums);
    }
  }

  __device__ __forceinline__ void write(const double* all) const {
    const bool is_mean = reduction == Reduction::kTokenMean || averages_sequences();
    double divisor = 1;
    if (is_mean) divisor = all[averages_sequences() ? int(kSequenceCount) : int(kStatistics)];
    if (is_mean && normalizer != nullptr) divisor = static_cast<double>(*normalizer);
    const double factor = divisor == 0 ? 0 : 1 / divisor;
    if (threadIdx.x == 0 && loss != nullptr) {
      const double sum = all[averages_sequences() ? kMeanSum : kLossSum];
      *loss = static_cast<acc_t>(divisor == 0 ? 0 : sum / divisor);
    }
    if (threadIdx.x < TokenSums::kStatistics) statistics[threadIdx.x] = all[kStatistics + threadIdx.x];
#pragma unroll 2
    for (int64_t sequence = threadIdx.x; sequence < B; sequence += kThreads) {
      const int64_t count = averages_sequences() ? tokens[sequence] : 1;
      scale[sequence] = static_cast<acc_t>(count == 0 ? 0 : factor / static_cast<double>(count));
    }
  }
};

}  // namespace lambda_return::cuda
