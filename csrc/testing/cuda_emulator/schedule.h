// Which thread runs next: everything that a run depends on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

namespace cuda_emulator {

inline constexpr int kFailureExitCode = 86;  // of every report by the emulator itself
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr int kMaxThreadsPerBlock = 1024;
inline constexpr int kMaxResidentBlocks = 64;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // of one block, the opt-in limit of compute capability 9.0

// The order in which the threads of a block that can run are run. Ascending and descending are the extremes that show
// a missing barrier in the result; random orders show what depends on finer interleaving.
enum class Order { kAscending, kDescending, kRandom };

struct Schedule {
  Order order = Order::kAscending;
  unsigned seed = 1;                   // of random orders and of every hand-over between resident blocks
  int resident_blocks = 4;             // 1 to kMaxResidentBlocks
  unsigned yield_every = 3;            // every n-th atomic, flag access or fence lets others run; 0 = never
  uint64_t livelock_yields = 1000000;  // this many yields without a finished block are reported as a livelock
};

// The schedule of the launches to come.
inline Schedule schedule;

// Marsaglia's xorshift with 32 bits of state.
class Random {
 public:
  CUDA_EMULATOR_HIDDEN explicit Random(unsigned seed) : state_((seed * 2654435761u) ^ 88172645u) {
    if (state_ == 0) {
      state_ = 1;  // 0 is the fixed point of xorshift
    }
  }

  CUDA_EMULATOR_HIDDEN unsigned below(unsigned n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_ % n;
  }

 private:
  unsigned state_;
};

}  // namespace cuda_emulator
