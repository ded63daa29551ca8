// From one sum of squared errors a thread to the mean of all, in one launch: every block leaves a partial sum, and the
// block that finishes last adds the partials up in the order of their index. No atomics on floats, same bits each time.
#pragma once

#include "../kernels/squared_error.h"
#include "platform.cuh"

namespace lambda_return::cuda {

// The sum over the block, in thread 0. Called by every thread of a block of kBlockThreads.
template <int kBlockThreads>
__device__ __forceinline__ SquaredError block_sum(SquaredError mine, SquaredError (&slots)[kBlockThreads / 32]) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    SquaredError other;
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, delta);
    other.num_tokens = __shfl_xor_sync(0xffffffffu, mine.num_tokens, delta);
    mine.add(other);
  }
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kBlockThreads / 32; ++warp) mine.add(slots[warp]);
  }
  return mine;
}

template <class loss_t, int kBlockThreads>
struct MeanReduction {
  unsigned* done;          // blocks that have left their partial sum; cleared before the launch
  SquaredError* partials;  // [blocks]
  loss_t* loss;            // 0-dim
  int64_t* num_tokens;     // 0-dim

  // Called by every thread of every block at its end; index is where the block's partial sum belongs.
  __device__ __forceinline__ void finish(int64_t index, const SquaredError& mine) const {
    __shared__ SquaredError slots[2][kBlockThreads / 32];
    __shared__ bool is_last;
    const SquaredError sum = block_sum<kBlockThreads>(mine, slots[0]);
    if (threadIdx.x == 0) {
      partials[index] = sum;
      is_last = fetch_add_acq_rel(done, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;

    SquaredError all;
    // By its own choice nvcc unrolls 16 times, and this tail then takes more registers than the rest of the kernel.
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < gridDim.x; i += kBlockThreads) all.add(partials[i]);
    all = block_sum<kBlockThreads>(all, slots[1]);
    if (threadIdx.x == 0) {
      *loss = static_cast<loss_t>(all.mean());
      *num_tokens = all.num_tokens;
    }
  }
};

}  // namespace lambda_return::cuda
