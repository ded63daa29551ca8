// Tests of the CUDA emulator itself.
//
//   cuda_emulator_test                 correct kernels must be right, and quiet, under every schedule
//   cuda_emulator_test --faults        every fault below must be reported by this build as the table says
//   cuda_emulator_test --fault NAME    plants one fault; exits with 0 only if nothing was noticed
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_emulator/cuda_emulator.h"

namespace {

using cuda_emulator::kFullMask;
using cuda_emulator::launch;
using cuda_emulator::Order;
using cuda_emulator::Schedule;

// ---- faults ----

enum class Fault {
  kNone,
  // in block_scan
  kNoBarrierBeforeRead,
  kNoBarrierBeforeReuse,
  kWrongLane,
  kReadPastEnd,
  // in look_back
  kRelaxedFlag,
  kVolatileFlag,
  kRelaxedTicket,
  kWaitsForNextBlock,
  // each with a kernel of its own
  kNoSyncwarp,
  kFloatSumWithoutAtomic,
  kLaneNotInMask,
  kSourceNotInMask,
  kDifferentMasks,
  kDifferentCollectives,
  kExitedLane,
  kExitWhileAwaited,
  kLaneBeyondBlock,
  kDivergentBarrier,
  kBarrierAndCollective,
  kUnwrittenStaticShared,
  kUnwrittenDynamicShared,
  kStaticSharedIndex,
  kDynamicSharedIndex,
  kMisalignedVector,
  kStackOverflow,
  kBlockTooLarge,
};

// ---- kernels ----

// Twins of the acquire and release helpers that kernels wrap around inline PTX.
unsigned load_acquire(const unsigned* p) {
  cuda_emulator::maybe_yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

void store_release(unsigned* p, unsigned value) {
  cuda_emulator::maybe_yield();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  cuda_emulator::maybe_yield();
}

unsigned fetch_add_acq_rel(unsigned* p, unsigned value) {
  cuda_emulator::maybe_yield();
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

template <class T>
__device__ T warp_inclusive_sum(T value, Fault fault = Fault::kNone) {
  const int lane = threadIdx.x % 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    const T other = __shfl_up_sync(kFullMask, value, delta);
    if (lane >= delta + (fault == Fault::kWrongLane ? 1 : 0)) {
      value += other;
    }
  }
  return value;
}

template <class T>
__global__ void warp_scan(const T* input, T* output) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  output[i] = warp_inclusive_sum(input[i]);
}

// Inclusive sums of one row a block, tile by tile with a carry. input, output [gridDim.x, n].
__global__ void __launch_bounds__(128) block_scan(int n, const int* input, int* output, Fault fault) {
  __shared__ int totals[4];
  const unsigned warp = threadIdx.x / 32;
  const int* row = input + blockIdx.x * n;
  const int end = fault == Fault::kReadPastEnd ? n + 1 : n;
  int carry = 0;
  for (int first = 0; first < n; first += 128) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int sum = warp_inclusive_sum(i < end ? row[i] : 0, fault);
    if (threadIdx.x % 32 == 31) {
      totals[warp] = sum;
    }
    if (fault != Fault::kNoBarrierBeforeRead) {
      __syncthreads();
    }
    int before = 0, total = 0;
    for (unsigned w = 0; w < 4; ++w) {
      before += w < warp ? totals[w] : 0;
      total += totals[w];
    }
    if (i < n) {
      output[blockIdx.x * n + i] = carry + before + sum;
    }
    carry += total;
    if (fault != Fault::kNoBarrierBeforeReuse) {
      __syncthreads();
    }
  }
}

struct LookBack {
  unsigned* ticket;  // 0 at first, as the flags and done
  unsigned* flags;   // [tiles]
  float* prefixes;   // [tiles]
  unsigned* done;
  float* partials;  // [tiles]
  float* total;     // 0-dim
};

// Thread 0 of tile t > 0 waits for the prefix of its neighbour and returns it.
__device__ float wait_for_prefix(const LookBack& state, unsigned tile, unsigned tiles, Fault fault) {
  if (fault == Fault::kWaitsForNextBlock) {
    if (tile + 1 < tiles) {
      while (load_acquire(state.flags + tile + 1) == 0) {
        __nanosleep(32);
      }
    }
    return 0;
  }
  if (tile == 0) {
    return 0;
  }
  if (fault == Fault::kVolatileFlag) {
    while (*static_cast<volatile unsigned*>(state.flags + tile - 1) == 0) {
      __nanosleep(32);
    }
  } else {
    while (load_acquire(state.flags + tile - 1) == 0) {
      __nanosleep(32);
    }
  }
  return state.prefixes[tile - 1];
}

__device__ void publish_prefix(const LookBack& state, unsigned tile, float prefix, Fault fault) {
  state.prefixes[tile] = prefix;
  if (fault == Fault::kRelaxedFlag) {
    __atomic_store_n(state.flags + tile, 1u, __ATOMIC_RELAXED);
  } else if (fault == Fault::kVolatileFlag) {
    *static_cast<volatile unsigned*>(state.flags + tile) = 1;
  } else {
    store_release(state.flags + tile, 1);
  }
}

// The block that comes last adds up what all have left in partials.
__device__ void sum_partials(const LookBack& state, unsigned tile, float partial, Fault fault) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    state.partials[tile] = partial;
    const unsigned before =
        fault == Fault::kRelaxedTicket ? atomicAdd(state.done, 1) : fetch_add_acq_rel(state.done, 1);
    is_last = before == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned t = 0; t < gridDim.x; ++t) {
      sum += state.partials[t];
    }
    *state.total = sum;
  }
}

// Inclusive sums of one long row, a tile of 64 a block; float, so that the order of the sums is in the bits.
__global__ void look_back(int n, const float* input, float* output, LookBack state, Fault fault) {
  __shared__ unsigned shared_tile;
  __shared__ float shared_prefix, totals[2];
  if (threadIdx.x == 0) {
    shared_tile = atomicAdd(state.ticket, 1);
  }
  __syncthreads();
  const unsigned tile = shared_tile, i = tile * 64 + threadIdx.x;
  const float sum = warp_inclusive_sum(i < static_cast<unsigned>(n) ? input[i] : 0.0f);
  if (threadIdx.x % 32 == 31) {
    totals[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const float total = totals[0] + totals[1];
  if (threadIdx.x == 0) {
    shared_prefix = wait_for_prefix(state, tile, gridDim.x, fault);
    publish_prefix(state, tile, shared_prefix + total, fault);
  }
  __syncthreads();
  if (i < static_cast<unsigned>(n)) {
    output[i] = shared_prefix + (threadIdx.x >= 32 ? totals[0] : 0.0f) + sum;
  }
  sum_partials(state, tile, total, fault);
}

// ok[thread] <- whether every intrinsic gave what the programming guide says. 64 threads.
__global__ void intrinsics(int* ok) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  bool good = true;
  good &= __shfl_sync(kFullMask, lane, 7) == 7;
  good &= __shfl_sync(kFullMask, lane, 9, 8) == lane / 8 * 8 + 1;
  good &= __shfl_up_sync(kFullMask, lane, 3) == (lane < 3 ? lane : lane - 3);
  good &= __shfl_up_sync(kFullMask, lane, 1, 8) == (lane % 8 == 0 ? lane : lane - 1);
  good &= __shfl_down_sync(kFullMask, lane, 3) == (lane > 28 ? lane : lane + 3);
  good &= __shfl_down_sync(kFullMask, lane, 1, 8) == (lane % 8 == 7 ? lane : lane + 1);
  good &= __shfl_xor_sync(kFullMask, lane, 5) == (lane ^ 5);
  good &= __shfl_xor_sync(kFullMask, lane, 8, 8) == (lane < 8 || (lane / 8) % 2 == 0 ? lane : lane - 8);

  good &= __shfl_sync(kFullMask, 0.5 * lane, 3) == 1.5;
  good &= __shfl_sync(kFullMask, 0.5f * static_cast<float>(lane), 3) == 1.5f;
  good &= __shfl_sync(kFullMask, int64_t{lane} << 40, 3) == int64_t{3} << 40;
  good &= __half2float(__shfl_sync(kFullMask, __float2half(static_cast<float>(lane)), 3)) == 3.0f;
  good &= __bfloat162float(__shfl_sync(kFullMask, __float2bfloat16(static_cast<float>(lane)), 3)) == 3.0f;

  good &= __ballot_sync(kFullMask, lane % 2) == 0xaaaaaaaau;
  good &= __ballot_sync(kFullMask, thread < 32 ? lane : 0) == (thread < 32 ? 0xfffffffeu : 0u);
  good &= __any_sync(kFullMask, thread == 33) == (thread >= 32);
  good &= __all_sync(kFullMask, thread < 63) == (thread < 32);
  if (lane < 16) {
    good &= __ballot_sync(0x0000ffffu, lane > 3) == 0xfff0u;
    good &= __shfl_down_sync(0x0000ffffu, lane, 1, 16) == (lane == 15 ? 15 : lane + 1);
  }

  good &= __popc(0xf0f00001u) == 9 && __ffs(0x50) == 5 && __ffs(0) == 0;
  good &= __clz(1) == 31 && __clz(0) == 32 && __clz(-1) == 0;
  ok[blockIdx.x * blockDim.x + thread] = good;
}

// Groups of 8 lanes exchange values through shared memory, ordered by __syncwarp alone, each group at its own pace.
__global__ void groups_of_lanes(int* output) {
  __shared__ int slots[32];
  const int lane = static_cast<int>(threadIdx.x), group = lane / 8;
  const unsigned mask = 0xffu << (8 * group);
  int value = lane;
  for (int round = 0; round <= group; ++round) {
    slots[lane] = value;
    __syncwarp(mask);
    value = slots[group * 8 + (lane + 1) % 8];
    __syncwarp(mask);
  }
  output[lane] = value;
}

// output[x of all, y of all] <- the index that CUDA defines for it.
__global__ void two_dimensions(unsigned* output) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned lane_of_first_in_row = __shfl_sync(kFullMask, threadIdx.x, threadIdx.y % 2 * 16);
  output[y * gridDim.x * blockDim.x + x] = y * 1000 + x + lane_of_first_in_row;
}

// 16-byte accesses, cache hints and both half types. n is a multiple of 8.
__global__ void vector_copy(int n, const __half* input, __nv_bfloat16* output) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i * 8 >= n) {
    return;
  }
  const uint4 packet =
      i % 2 == 0 ? __ldg(reinterpret_cast<const uint4*>(input) + i) : __ldcs(reinterpret_cast<const uint4*>(input) + i);
  __half in[8];
  __nv_bfloat16 out[8];
  std::memcpy(static_cast<void*>(in), &packet, sizeof(packet));
  for (int k = 0; k < 8; ++k) {
    out[k] = __float2bfloat16(__half2float(in[k]));
  }
  uint4 result;
  std::memcpy(&result, out, sizeof(result));
  __stcs(reinterpret_cast<uint4*>(output) + i, result);
}

// output[thread] <- what shared memory holds before anyone has written to it; then everyone writes. 64 threads.
__global__ void shared_memory_at_start(float* output_static, float* output_dynamic) {
  __shared__ float fixed[64];
  float* dynamic = static_cast<float*>(cuda_emulator::dynamic_shared_memory());
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  output_static[i] = fixed[threadIdx.x];
  output_dynamic[i] = dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
}

// Thread 0 polls for a flag that the last thread of its own block sets.
__global__ void poll_within_block(unsigned* flags, int* data, int* output) {
  if (threadIdx.x == blockDim.x - 1) {
    data[blockIdx.x] = 42;
    store_release(flags + blockIdx.x, 1);
  }
  if (threadIdx.x == 0) {
    while (load_acquire(flags + blockIdx.x) == 0) {
    }
    output[blockIdx.x] = data[blockIdx.x];
  }
}

// trace <- the order in which the threads of all blocks came here.
__global__ void interleaving(unsigned* next, unsigned* trace) {
  for (int round = 0; round < 3; ++round) {
    trace[atomicAdd(next, 1)] = blockIdx.x * 1000 + threadIdx.x;
  }
}

// Fences on both sides order a relaxed counter.
__global__ void fences(unsigned* done, int* data, int* output) {
  data[blockIdx.x] = static_cast<int>(blockIdx.x);
  __threadfence();
  const unsigned before = atomicAdd(done, 1);
  __threadfence();
  if (before == gridDim.x - 1) {
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      sum += data[block];
    }
    *output = sum;
  }
}

// ---- correct kernels under every schedule ----

int failures = 0;

void check(bool ok, const char* what) {
  if (!ok) {
    ++failures;
    const Schedule& s = cuda_emulator::schedule;
    std::printf(
        "FAILED: %s (order %d, seed %u, %d resident blocks)\n", what, static_cast<int>(s.order), s.seed,
        s.resident_blocks);
  }
}

std::vector<Schedule> schedules() {
  std::vector<Schedule> all;
  for (int resident_blocks : {1, 2, 5, 16}) {
    all.push_back({.order = Order::kAscending, .resident_blocks = resident_blocks});
    all.push_back({.order = Order::kDescending, .resident_blocks = resident_blocks});
    for (unsigned seed : {1u, 2u, 3u}) {
      all.push_back({.order = Order::kRandom, .seed = seed, .resident_blocks = resident_blocks, .yield_every = seed});
    }
  }
  return all;
}

template <class T>
std::vector<T> numbers(int n) {
  std::vector<T> result(n);
  for (int i = 0; i < n; ++i) {
    result[i] = static_cast<T>(i * 37 % 101 - 50) / (std::is_integral_v<T> ? 1 : 3);
  }
  return result;
}

bool run_block_scan(int rows, int n, Fault fault) {
  const std::vector<int> input = numbers<int>(rows * n);
  std::vector<int> output(rows * n);
  launch(dim3(rows), dim3(128), 0, block_scan, n, input.data(), output.data(), fault);
  bool ok = true;
  for (int row = 0; row < rows; ++row) {
    int sum = 0;
    for (int i = row * n; i < (row + 1) * n; ++i) {
      sum += input[i];
      ok = ok && output[i] == sum;
    }
  }
  return ok;
}

// The sums of look_back and, last, their total.
std::vector<float> run_look_back(int n, Fault fault) {
  const int tiles = (n + 63) / 64;
  const std::vector<float> input = numbers<float>(n);
  std::vector<float> output(n + 1), prefixes(tiles), partials(tiles);
  std::vector<unsigned> counters(tiles + 2);
  const LookBack state{counters.data(),     counters.data() + 2, prefixes.data(),
                       counters.data() + 1, partials.data(),     output.data() + n};
  launch(dim3(tiles), dim3(64), 0, look_back, n, input.data(), output.data(), state, fault);
  return output;
}

bool sums_are_right(const std::vector<float>& sums) {
  const int n = static_cast<int>(sums.size()) - 1;
  const std::vector<float> input = numbers<float>(n);
  double sum = 0;
  bool ok = true;
  for (int i = 0; i < n; ++i) {
    sum += input[i];
    ok = ok && std::abs(sums[i] - sum) < 1e-3;
  }
  return ok && std::abs(sums[n] - sum) < 1e-3;
}

template <class T>
bool run_warp_scan() {
  const std::vector<T> input = numbers<T>(192);
  std::vector<T> output(192);
  launch(dim3(2), dim3(96), 0, warp_scan<T>, input.data(), output.data());
  bool ok = true;
  T sum = 0;
  for (int i = 0; i < 192; ++i) {
    sum = i % 32 == 0 ? input[i] : sum + input[i];
    ok = ok && std::abs(static_cast<double>(output[i] - sum)) < 1e-4;
  }
  return ok;
}

bool run_intrinsics() {
  std::vector<int> ok(3 * 64);
  launch(dim3(3), dim3(64), 0, intrinsics, ok.data());
  bool all = true;
  for (int one : ok) {
    all = all && one != 0;
  }
  return all;
}

bool run_groups_of_lanes() {
  std::vector<int> output(32);
  launch(dim3(1), dim3(32), 0, groups_of_lanes, output.data());
  bool ok = true;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 8;
    ok = ok && output[lane] == group * 8 + (lane + group + 1) % 8;
  }
  return ok;
}

bool run_two_dimensions() {
  std::vector<unsigned> output(64 * 16);
  launch(dim3(4, 2), dim3(16, 8), 0, two_dimensions, output.data());
  bool ok = true;
  for (unsigned y = 0; y < 16; ++y) {
    for (unsigned x = 0; x < 64; ++x) {
      ok = ok && output[y * 64 + x] == y * 1000 + x;
    }
  }
  return ok;
}

bool run_vector_copy() {
  constexpr int kLength = 8 * 77;
  std::vector<__half> input(kLength);
  std::vector<__nv_bfloat16> output(kLength);
  for (int i = 0; i < kLength; ++i) {
    input[i] = __float2half(static_cast<float>(i % 128));
  }
  launch(dim3(2), dim3(64), 0, vector_copy, kLength, input.data(), output.data());
  bool ok = true;
  for (int i = 0; i < kLength; ++i) {
    ok = ok && __bfloat162float(output[i]) == static_cast<float>(i % 128);
  }
  return ok;
}

bool run_shared_memory_at_start() {
  std::vector<float> fixed(20 * 64), dynamic(20 * 64);
  launch(dim3(20), dim3(64), 64 * sizeof(float), shared_memory_at_start, fixed.data(), dynamic.data());
  bool ok = true;
  for (size_t i = 0; i < fixed.size(); ++i) {
    ok = ok && std::isnan(fixed[i]) && std::isnan(dynamic[i]);
  }
  return ok;
}

bool run_poll_within_block() {
  std::vector<unsigned> flags(6);
  std::vector<int> data(6), output(6);
  launch(dim3(6), dim3(40), 0, poll_within_block, flags.data(), data.data(), output.data());
  return output == std::vector<int>(6, 42);
}

bool run_fences() {
  unsigned done = 0;
  std::vector<int> data(20);
  int output = 0;
  launch(dim3(20), dim3(1), 0, fences, &done, data.data(), &output);
  return output == 190;
}

std::vector<unsigned> run_interleaving() {
  unsigned next = 0;
  std::vector<unsigned> trace(8 * 33 * 3);
  launch(dim3(8), dim3(33), 0, interleaving, &next, trace.data());
  return trace;
}

void test_under(const Schedule& schedule) {
  cuda_emulator::schedule = schedule;
  for (int n : {1, 127, 128, 129, 300}) {
    check(run_block_scan(7, n, Fault::kNone), "block scan");
  }
  check(run_warp_scan<int>(), "warp scan of int");
  check(run_warp_scan<float>(), "warp scan of float");
  check(run_warp_scan<double>(), "warp scan of double");
  check(run_intrinsics(), "intrinsics");
  check(run_groups_of_lanes(), "groups of lanes");
  check(run_two_dimensions(), "two dimensions");
  check(run_vector_copy(), "vector copy of half types");
  check(run_shared_memory_at_start(), "shared memory is NaN before every block");
  check(run_poll_within_block(), "polling within a block");
  check(run_fences(), "fences");
}

void test_look_back(const Schedule& schedule) {
  cuda_emulator::schedule = schedule;
  static std::vector<float> first;
  const std::vector<float> sums = run_look_back(64 * 40 - 7, Fault::kNone);
  if (first.empty()) {
    first = sums;
    check(sums_are_right(sums), "look-back");
  }
  check(std::memcmp(sums.data(), first.data(), sums.size() * sizeof(float)) == 0, "look-back: the same bits");
}

// A run depends on the schedule, the whole schedule, and on nothing else.
void test_determinism() {
  std::vector<std::vector<unsigned>> traces;
  for (const Schedule& schedule : schedules()) {
    cuda_emulator::schedule = schedule;
    traces.push_back(run_interleaving());
    check(run_interleaving() == traces.back(), "the same schedule gives the same interleaving");
  }
  for (size_t i = 0; i < traces.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      check(traces[i] != traces[j], "different schedules give different interleavings");
    }
  }
}

int test_correct_kernels() {
  for (const Schedule& schedule : schedules()) {
    test_under(schedule);
    test_look_back(schedule);
  }
  test_determinism();
  std::printf("%zu schedules: %s\n", schedules().size(), failures == 0 ? "all correct" : "FAILED");
  return failures == 0 ? 0 : 1;
}

// ---- kernels with one fault each ----

__global__ void no_syncwarp(int* output) {
  __shared__ int slots[32];
  slots[threadIdx.x] = static_cast<int>(threadIdx.x);
  output[threadIdx.x] = slots[(threadIdx.x + 1) % 32];
}

__global__ void float_sum_without_atomic(float* sum) { *sum += 1.0f; }

__global__ void lane_not_in_mask(int* output) { output[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void source_not_in_mask(int* output) {
  if (threadIdx.x < 16) {
    output[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
  }
}

__global__ void different_masks(unsigned* output) {
  output[threadIdx.x] = __ballot_sync(threadIdx.x == 5 ? 0x0000ffffu : kFullMask, 1);
}

__global__ void different_collectives(int* output) {
  const int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) {
    output[threadIdx.x] = __shfl_down_sync(kFullMask, value, 1);
  } else {
    output[threadIdx.x] = __shfl_down_sync(kFullMask, value, 2);
  }
}

__global__ void exited_lane(unsigned* output) {
  if (threadIdx.x > 0) {
    output[threadIdx.x] = __ballot_sync(kFullMask, 1);
  }
}

__global__ void exit_while_awaited(unsigned* output) {
  if (threadIdx.x != 31) {
    output[threadIdx.x] = __ballot_sync(kFullMask, 1);
  }
}

__global__ void any_of_full_warp(int* output) { output[threadIdx.x] = __any_sync(kFullMask, 1); }

__global__ void divergent_barrier(int* output) {
  if (threadIdx.x < 40) {
    __syncthreads();
    output[threadIdx.x] = 1;
  } else {
    __syncthreads();
    output[threadIdx.x] = 2;
  }
}

__global__ void barrier_and_collective(unsigned* output) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    output[threadIdx.x] = __ballot_sync(kFullMask, 1);
  }
}

__global__ void static_shared_index(int* output) {
  __shared__ int slots[32];
  slots[threadIdx.x] = 1;
  __syncthreads();
  output[threadIdx.x] = slots[threadIdx.x % 32];
}

__global__ void dynamic_shared_index(int* output) {
  int* slots = static_cast<int*>(cuda_emulator::dynamic_shared_memory());
  slots[threadIdx.x] = 1;
  __syncthreads();
  output[threadIdx.x] = slots[threadIdx.x];
}

__global__ void misaligned_vector(const float* input, float4* output) {
  output[threadIdx.x] = reinterpret_cast<const float4*>(input + 1)[threadIdx.x];
}

__device__ int overflow_stack(volatile int* output, int depth) {
  volatile char frame[1024];
  frame[depth % 1024] = 1;
  return depth == 0 ? *output : overflow_stack(output, depth - 1) + frame[depth % 1024];
}

__global__ void stack_overflow(int* output) { *output = overflow_stack(output, 1000); }

// ---- planting faults ----

// Runs a kernel on one block; its result does not matter.
template <class T>
bool run_one_block(void (*kernel)(T*), int threads, size_t dynamic_shared_bytes = 0) {
  std::vector<T> output(threads);
  launch(dim3(1), dim3(threads), dynamic_shared_bytes, kernel, output.data());
  return true;
}

bool run_no_syncwarp() {
  std::vector<int> output(32);
  launch(dim3(1), dim3(32), 0, no_syncwarp, output.data());
  bool ok = true;
  for (int i = 0; i < 32; ++i) {
    ok = ok && output[i] == (i + 1) % 32;
  }
  return ok;
}

bool run_float_sum_without_atomic() {
  float sum = 0;
  launch(dim3(8), dim3(1), 0, float_sum_without_atomic, &sum);
  return sum == 8.0f;
}

// shared_memory_at_start reads before it writes: NaN is what a test of such a kernel would see.
bool run_unwritten_shared(bool dynamic) {
  std::vector<float> from_static(64), from_dynamic(64);
  launch(dim3(1), dim3(64), 64 * sizeof(float), shared_memory_at_start, from_static.data(), from_dynamic.data());
  return !std::isnan(dynamic ? from_dynamic[0] : from_static[0]);
}

bool run_misaligned_vector() {
  const std::vector<float> input(4 * 32 + 4);
  std::vector<float4> output(32);
  launch(dim3(1), dim3(32), 0, misaligned_vector, input.data(), output.data());
  return true;
}

// Whether the result is right; what the emulator or a sanitizer reports ends the process before that.
bool plant(Fault fault) {
  switch (fault) {
    case Fault::kNone:
    case Fault::kNoBarrierBeforeRead:
    case Fault::kNoBarrierBeforeReuse:
    case Fault::kWrongLane:
    case Fault::kReadPastEnd:
      return run_block_scan(3, 300, fault);
    case Fault::kRelaxedFlag:
    case Fault::kVolatileFlag:
    case Fault::kRelaxedTicket:
    case Fault::kWaitsForNextBlock:
      cuda_emulator::schedule.livelock_yields = 10000;
      return sums_are_right(run_look_back(64 * 20, fault));
    case Fault::kNoSyncwarp:
      return run_no_syncwarp();
    case Fault::kFloatSumWithoutAtomic:
      return run_float_sum_without_atomic();
    case Fault::kLaneNotInMask:
      return run_one_block(lane_not_in_mask, 32);
    case Fault::kSourceNotInMask:
      return run_one_block(source_not_in_mask, 32);
    case Fault::kDifferentMasks:
      return run_one_block(different_masks, 32);
    case Fault::kDifferentCollectives:
      return run_one_block(different_collectives, 32);
    case Fault::kExitedLane:
      return run_one_block(exited_lane, 32);
    case Fault::kExitWhileAwaited:
      return run_one_block(exit_while_awaited, 32);
    case Fault::kLaneBeyondBlock:
      return run_one_block(any_of_full_warp, 40);
    case Fault::kDivergentBarrier:
      return run_one_block(divergent_barrier, 64);
    case Fault::kBarrierAndCollective:
      return run_one_block(barrier_and_collective, 64);
    case Fault::kUnwrittenStaticShared:
      return run_unwritten_shared(false);
    case Fault::kUnwrittenDynamicShared:
      return run_unwritten_shared(true);
    case Fault::kStaticSharedIndex:
      return run_one_block(static_shared_index, 64);
    case Fault::kDynamicSharedIndex:
      return run_one_block(dynamic_shared_index, 33, 32 * sizeof(int));
    case Fault::kMisalignedVector:
      return run_misaligned_vector();
    case Fault::kStackOverflow:
      return run_one_block(stack_overflow, 1);
    case Fault::kBlockTooLarge:
      return run_one_block(any_of_full_warp, 1056);
  }
  return true;
}

// ---- the table: what each build must say ----

enum class Build { kPlain, kThread, kAddress };
constexpr Build kBuild = CUDA_EMULATOR_TSAN ? Build::kThread : CUDA_EMULATOR_ASAN ? Build::kAddress : Build::kPlain;
constexpr const char* kBuildNames[] = {"plain", "thread", "address,undefined"};

constexpr const char* kRace = "ThreadSanitizer: data race";
constexpr const char* kWrong = "wrong result";
constexpr const char* kHeap = "heap-buffer-overflow";
constexpr const char* kNothing = "";  // no claim: this build may miss it

struct Expectation {
  Fault fault;
  const char* name;
  std::array<const char*, 3> reports;  // a part of the report, by Build
};

// What the emulator itself reports, in every build.
constexpr std::array<const char*, 3> everywhere(const char* report) { return {report, report, report}; }

constexpr Expectation kExpectations[] = {
    {Fault::kNoBarrierBeforeRead, "no_barrier_before_read", {kWrong, kRace, kWrong}},
    {Fault::kNoBarrierBeforeReuse, "no_barrier_before_reuse", {kWrong, kRace, kWrong}},
    {Fault::kWrongLane, "wrong_lane", everywhere(kWrong)},
    {Fault::kReadPastEnd, "read_past_end", {kNothing, kNothing, kHeap}},
    {Fault::kRelaxedFlag, "relaxed_flag", {kNothing, kRace, kNothing}},
    {Fault::kVolatileFlag, "volatile_flag", {kNothing, kRace, kNothing}},
    {Fault::kRelaxedTicket, "relaxed_ticket", {kNothing, kRace, kNothing}},
    {Fault::kWaitsForNextBlock, "waits_for_next_block", everywhere("livelock")},
    {Fault::kNoSyncwarp, "no_syncwarp", {kWrong, kRace, kWrong}},
    {Fault::kFloatSumWithoutAtomic, "float_sum_without_atomic", {kNothing, kRace, kNothing}},
    {Fault::kLaneNotInMask, "lane_not_in_mask", everywhere("the calling lane is not in its mask")},
    {Fault::kSourceNotInMask, "source_not_in_mask", everywhere("the source lane is not in the mask")},
    {Fault::kDifferentMasks, "different_masks", everywhere("lanes of one mask name different masks")},
    {Fault::kDifferentCollectives, "different_collectives", everywhere("are in different collectives")},
    {Fault::kExitedLane, "exited_lane", everywhere("a lane that has exited or does not exist")},
    {Fault::kExitWhileAwaited, "exit_while_awaited", everywhere("a lane exits while others")},
    {Fault::kLaneBeyondBlock, "lane_beyond_block", everywhere("a lane that has exited or does not exist")},
    {Fault::kDivergentBarrier, "divergent_barrier", everywhere("divergent barrier")},
    {Fault::kBarrierAndCollective, "barrier_and_collective", everywhere("deadlock")},
    {Fault::kUnwrittenStaticShared, "unwritten_static_shared", everywhere(kWrong)},
    {Fault::kUnwrittenDynamicShared, "unwritten_dynamic_shared", everywhere(kWrong)},
    {Fault::kStaticSharedIndex, "static_shared_index", {kNothing, kNothing, "out of bounds for type 'int [32]'"}},
    {Fault::kDynamicSharedIndex, "dynamic_shared_index", {kNothing, kNothing, kHeap}},
    {Fault::kMisalignedVector, "misaligned_vector", {kNothing, kNothing, "misaligned address"}},
    {Fault::kStackOverflow, "stack_overflow", {"exit 139", kNothing, "stack-overflow"}},
    {Fault::kBlockTooLarge, "block_too_large", everywhere("a block must have 1 to 1024 threads")},
};

// The orders that a fault is run under until it shows.
constexpr std::array kOrders = {Order::kAscending, Order::kDescending, Order::kRandom};

int plant_by_name(const std::string& name) {
  for (const Expectation& expectation : kExpectations) {
    if (name != expectation.name) {
      continue;
    }
    for (Order order : kOrders) {
      cuda_emulator::schedule.order = order;
      if (!plant(expectation.fault)) {
        std::printf("wrong result, order %d\n", static_cast<int>(order));
        return 2;
      }
    }
    std::printf("nothing noticed\n");
    return 0;
  }
  std::printf("no such fault: %s\n", name.c_str());
  return 3;
}

// The output of this program with --fault, and its exit status as a shell shows it.
std::string output_of_fault(const char* program, const char* name) {
  const std::string command = "'" + std::string(program) + "' --fault " + name + " 2>&1; echo exit $?";
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) {
    return "popen failed";
  }
  char buffer[4096];
  while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) {
    output += buffer;
  }
  pclose(pipe);
  return output;
}

// The first line of `output` that is about `report`, or about anything noticed.
std::string summary(const std::string& output, const std::string& report) {
  for (const std::string& mark : {report, std::string("WARNING: "), std::string("ERROR: "), std::string("exit ")}) {
    const size_t found = mark.empty() ? std::string::npos : output.find(mark);
    if (found != std::string::npos) {
      const size_t begin = output.rfind('\n', found) == std::string::npos ? 0 : output.rfind('\n', found) + 1;
      return output.substr(begin, output.find('\n', found) - begin);
    }
  }
  return output;
}

int test_faults(const char* program) {
  for (const Expectation& expectation : kExpectations) {
    const std::string report = expectation.reports[static_cast<size_t>(kBuild)];
    const std::string output = output_of_fault(program, expectation.name);
    const bool ok = output.find(report) != std::string::npos && output.find("no such fault") == std::string::npos;
    failures += !ok;
    std::printf(
        "%-26s %-8s %s\n", expectation.name,
        report.empty() ? "no claim"
        : ok           ? "caught"
                       : "MISSED",
        summary(output, report).c_str());
    if (!ok) {
      std::printf("%s", output.c_str());
    }
  }
  std::printf("build %s: %s\n", kBuildNames[static_cast<size_t>(kBuild)], failures == 0 ? "all as expected" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace

#if CUDA_EMULATOR_TSAN
extern "C" const char* __tsan_default_options() { return "halt_on_error=1:atexit_sleep_ms=0"; }
#endif

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--fault" && argc == 3) {
    return plant_by_name(argv[2]);
  }
  return mode == "--faults" ? test_faults(argv[0]) : test_correct_kernels();
}
