// The vocabulary of CUDA C++ that kernels use, to be included after every header of the CUDA toolkit.
//
// Only what the emulator's own test covers is here. To add an intrinsic, add its test.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <source_location>

#include "block.h"
#include "warp.h"

// ---- declarations ----

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_emulator {

CUDA_EMULATOR_HIDDEN inline uint3 thread_index() { return current_block->running->index; }
CUDA_EMULATOR_HIDDEN inline uint3 block_index() { return current_block->index; }
CUDA_EMULATOR_HIDDEN inline dim3 block_size() { return current_block->launch->block; }
CUDA_EMULATOR_HIDDEN inline dim3 grid_size() { return current_block->launch->grid; }

// Twin of `extern __shared__ T name[]`.
CUDA_EMULATOR_HIDDEN inline void* dynamic_shared_memory() { return current_block->dynamic_shared; }

using Site = std::source_location;

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())

// ---- barriers and warp collectives; `site` is where the kernel calls them ----

inline void __syncthreads(const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  cuda_emulator::wait_at_barrier(site);
}

inline void __syncwarp(
    unsigned mask = cuda_emulator::kFullMask, const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  cuda_emulator::sync_warp(mask, site);
}

// The shuffles treat every `width` lanes (a power of two) as a warp of their own; a lane whose source would be outside
// its group gets its own value.
template <class T>
T __shfl_sync(
    unsigned mask, T value, int source, int width = cuda_emulator::kWarpSize,
    const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::running_lane(), group = lane & ~(width - 1);
  return cuda_emulator::shuffle(mask, value, group + (source & (width - 1)), site);
}

template <class T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = cuda_emulator::kWarpSize,
    const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::running_lane(), group = lane & ~(width - 1);
  const int source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, source < group ? lane : source, site);
}

template <class T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = cuda_emulator::kWarpSize,
    const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::running_lane(), group = lane & ~(width - 1);
  const int source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, source >= group + width ? lane : source, site);
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask, int width = cuda_emulator::kWarpSize,
    const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  const int lane = cuda_emulator::running_lane(), group = lane & ~(width - 1);
  const int source = lane ^ lane_mask;  // reading from an earlier group is allowed, from a later one it is not
  return cuda_emulator::shuffle(mask, value, source >= group + width ? lane : source, site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate, const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  return cuda_emulator::ballot(mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate, const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  return cuda_emulator::ballot(mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, const cuda_emulator::Site& site = cuda_emulator::Site::current()) {
  return cuda_emulator::ballot(mask, predicate != 0, site) == mask;
}

// ---- memory ----

// Relaxed: as on the device, it orders nothing but itself.
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  cuda_emulator::maybe_yield();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

// Ordered with every other fence, before and after.
inline void __threadfence() {
#if CUDA_EMULATOR_TSAN
  static cuda_emulator::OrderTag tag;
  tag.acquire();
  tag.release();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
  cuda_emulator::maybe_yield();
}

inline void __nanosleep(unsigned) { cuda_emulator::yield(); }

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}

template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// ---- bits ----

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// The position of the lowest one bit counted from 1; 0 if there is none.
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// The number of zeros above the highest one bit.
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
