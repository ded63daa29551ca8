// The one place where the CUDA compiler and the CUDA-on-CPU emulator differ. Kernels include this and nothing else of
// either; they are torch-free.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAMBDA_RETURN_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__)
#else
#include "../testing/cuda_emulator/cuda_emulator.h"

#define LAMBDA_RETURN_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream),                                      \
   cuda_emulator::launch(dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, [=] { kernel(__VA_ARGS__); }))
#endif

#include <cstdint>
#include <cstring>

#include "../kernels/numeric.h"

namespace lambda_return::cuda {

// Faults that a test plants on purpose, to see each of them caught by one of the emulator's builds.
enum class Bug {
  kNone,
  kNoBarrierBeforeTotalsAreRead,
  kNoBarrierBeforeTotalsAreReused,
  kWrongLaneInScan,
  kRelaxedFlag,
  kOffByOneAtTheRowEdge,
  kCarryNotResetBetweenRows,
  kMaskIgnoredInVectorPath,
  kFlagsNotCleared,
  kLastBlockDoesNotAcquire,
  kNoBarrierBeforeReturnsAreRead,
  kWrongEdgeBetweenTurns,
  kCount,
};
#if defined(LAMBDA_RETURN_PLANT_BUGS)  // by that test alone: it picks the bug when it runs
inline Bug planted_bug = Bug::kNone;
inline bool planted(Bug bug) { return bug == planted_bug; }
#else
LAMBDA_RETURN_HOST_DEVICE constexpr bool planted(Bug) { return false; }
#endif

// ---- values and their accumulation type; spelled out because torch compiles CUDA code without the operators ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class scalar_t>
__device__ __forceinline__ scalar_t narrow(accumulate_t<scalar_t> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One 16-byte store, where nvcc may split an assignment through the pointer into four of 4 bytes.
__device__ __forceinline__ void store_packet(uint4* p, uint4 packet) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(packet.x), "r"(packet.y), "r"(packet.z),
               "r"(packet.w)
               : "memory");
#else
  *p = packet;
#endif
}

// x, as a value that the compiler knows nothing of: what is computed from it is not kept in registers from before, or
// across the loop, instead.
__device__ __forceinline__ int64_t computed_anew(int64_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}
__device__ __forceinline__ float computed_anew(float x) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ double computed_anew(double x) {
#if defined(__CUDACC__)
  asm volatile("" : "+d"(x));
#endif
  return x;
}

// Clears the head of a workspace on the stream: a memset node under graph capture.
inline void clear_async(void* workspace, int64_t bytes, cudaStream_t stream) {
  if (planted(Bug::kFlagsNotCleared)) return;
#if defined(__CUDACC__)
  cudaMemsetAsync(workspace, 0, static_cast<size_t>(bytes), stream);
#else
  static_cast<void>(stream);
  memset(workspace, 0, static_cast<size_t>(bytes));
#endif
}

// ---- memory order between blocks: tiny helpers with a C++ twin ----

// Everything this thread, and the threads synchronised with it, wrote before is visible to whoever acquires the value.
__device__ __forceinline__ void store_release(unsigned* p, unsigned value) {
#if defined(__CUDACC__)
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
#else
  cuda_emulator::maybe_yield();
  if (planted(Bug::kRelaxedFlag)) {
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
  } else {
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
  }
  cuda_emulator::maybe_yield();
#endif
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#else
  cuda_emulator::maybe_yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

__device__ __forceinline__ unsigned fetch_add_acq_rel(unsigned* p, unsigned value) {
#if defined(__CUDACC__)
  unsigned old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#else
  cuda_emulator::maybe_yield();
  if (planted(Bug::kLastBlockDoesNotAcquire)) return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
#endif
}

}  // namespace lambda_return::cuda
