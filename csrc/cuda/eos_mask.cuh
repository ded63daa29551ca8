// eos_mask on the device: one block a row looks for the last valid position from the right, and stops at the first tile
// that has one. A mask may be of any dtype: only its size matters, which bits are a sign, and what its 1 looks like.
#pragma once

#include "items.cuh"

namespace lambda_return::cuda {

constexpr int kEosThreads = 256;
constexpr int64_t kEosMaxBlocks = 65535;
// Words of one 16-byte load.
template <class word_t>
constexpr int kEosItems = 16 / sizeof(word_t);

// mask, eos [B, T] as unsigned words; eos is 0 already and is contiguous. A token is valid if it has a bit of
// value_bits (all bits for integers, all but the sign for floats: -0.0 is 0).
template <class word_t>
__global__ void __launch_bounds__(kEosThreads) eos_mask_kernel(
    int64_t B, int64_t T, const word_t* mask, int64_t stride, word_t value_bits, word_t one, word_t* eos) {
  constexpr int kItems = kEosItems<word_t>;
  __shared__ int64_t last_of_warp[2][kEosThreads / 32];
  const Chunking chunking{T, true};
  int parity = 0;
  for (int64_t row = blockIdx.x; row < B; row += gridDim.x) {
    const word_t* row_mask = mask + row * stride;
    const int head = chunking.head<kItems>(row_mask);
    int64_t last = -1;
    for (int64_t end = chunking.chunks<kItems>(head); end > 0 && last < 0; end -= kEosThreads) {
      const int64_t first = (end - kEosThreads + threadIdx.x) * kItems - head;
      word_t items[kItems];
      load_items(row_mask, first, chunking, word_t(0), items);
      int64_t own = -1;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if ((items[i] & value_bits) != 0) own = first + i;
      }
      const unsigned lanes = __ballot_sync(0xffffffffu, own >= 0);
      const unsigned speaker = lanes == 0 ? 0u : 31u - static_cast<unsigned>(__clz(static_cast<int>(lanes)));
      if (threadIdx.x % 32 == speaker) last_of_warp[parity][threadIdx.x / 32] = own;
      __syncthreads();
      // The two buffers alternate: the barrier in between keeps a fast warp from overwriting what a slow one reads.
      for (int warp = 0; warp < kEosThreads / 32; ++warp) {
        if (last_of_warp[parity][warp] >= 0) last = last_of_warp[parity][warp];
      }
      parity ^= 1;
    }
    if (threadIdx.x == 0 && last >= 0) eos[row * T + last] = one;
  }
}

template <class word_t>
void launch_eos_mask(
    int64_t B, int64_t T, const void* mask, int64_t stride, uint64_t value_bits, uint64_t one, void* eos,
    cudaStream_t stream) {
  LAMBDA_RETURN_LAUNCH(
      (eos_mask_kernel<word_t>), B < kEosMaxBlocks ? B : kEosMaxBlocks, kEosThreads, stream, B, T,
      static_cast<const word_t*>(mask), stride, static_cast<word_t>(value_bits), static_cast<word_t>(one),
      static_cast<word_t*>(eos));
}

}  // namespace lambda_return::cuda
