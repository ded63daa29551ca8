// Warp collectives: every lane of the mask arrives, the last one computes all results, everyone goes on.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "block.h"

namespace cuda_emulator {

// Computes the results of the lanes of `mask` from their values. lanes points to lane 0 of the warp.
using WarpFunction = void (*)(Thread* lanes, unsigned mask);

CUDA_EMULATOR_HIDDEN inline bool has_lane(unsigned mask, int lane) { return (mask >> lane & 1u) != 0; }

CUDA_EMULATOR_HIDDEN inline int running_lane() { return current_block->running->lane; }

CUDA_EMULATOR_HIDDEN inline void check_lanes_agree(
    const Thread* lanes, unsigned mask, const std::source_location& site) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (has_lane(mask, lane) && lanes[lane].mask != mask) {
      fail("warp collective: lanes of one mask name different masks", site);
    }
    if (has_lane(mask, lane) && !same_site(lanes[lane].site, site)) {
      fail("warp collective: lanes of one mask are in different collectives", site);
    }
  }
}

CUDA_EMULATOR_HIDDEN inline void finish_collective(Block& block, Warp& warp, Thread& last, WarpFunction function) {
  Thread* lanes = &last - last.lane;
  check_lanes_agree(lanes, last.mask, last.site);
  function(lanes, last.mask);
  warp.arrived &= ~last.mask;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (has_lane(last.mask, lane)) {
      make_ready(block, lanes[lane]);
    }
  }
}

// The running thread's part in a collective; its value and source lane are set already.
CUDA_EMULATOR_HIDDEN inline void wait_for_warp(unsigned mask, WarpFunction function, const std::source_location& site) {
  Block& block = *current_block;
  Thread& self = *block.running;
  Warp& warp = block.warps[self.id / kWarpSize];
  self.mask = mask;
  self.site = site;
  if (!has_lane(mask, self.lane)) {
    fail("warp collective: the calling lane is not in its mask", site);
  }
  if ((mask & warp.exited) != 0) {
    fail("warp collective: the mask names a lane that has exited or does not exist", site);
  }
  self.state = ThreadState::kInWarpCollective;
  warp.arrived |= 1u << self.lane;
  if ((warp.arrived & mask) == mask) {
    finish_collective(block, warp, self, function);
  }
  suspend(block);
}

// ---- the collectives ----

CUDA_EMULATOR_HIDDEN inline void resolve_sync(Thread*, unsigned) {}

CUDA_EMULATOR_HIDDEN inline void resolve_shuffle(Thread* lanes, unsigned mask) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!has_lane(mask, lane)) {
      continue;
    }
    const int source = lanes[lane].source_lane;
    if (!has_lane(mask, source)) {
      fail("shuffle: the source lane is not in the mask", lanes[lane].site);
    }
    lanes[lane].result = lanes[source].value;
  }
}

CUDA_EMULATOR_HIDDEN inline void resolve_ballot(Thread* lanes, unsigned mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (has_lane(mask, lane) && lanes[lane].value != 0) {
      ballot |= 1u << lane;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (has_lane(mask, lane)) {
      lanes[lane].result = ballot;
    }
  }
}

// __syncwarp is the only collective that orders memory; the others move values and nothing else.
CUDA_EMULATOR_HIDDEN inline void sync_warp(unsigned mask, const std::source_location& site) {
  const Thread& self = *current_block->running;
  Warp& warp = current_block->warps[self.id / kWarpSize];
  BarrierOrder& order = warp.sync_order[mask == 0 ? 0 : __builtin_ctz(mask)];
  OrderTag& tag = order.current();
  tag.release();
  const bool completes = ((warp.arrived | 1u << self.lane) & mask) == mask;
  if (completes) {
    ++order.generation;
  }
  wait_for_warp(mask, resolve_sync, site);
  tag.acquire();
}

template <class T>
CUDA_EMULATOR_HIDDEN T shuffle(unsigned mask, T value, int source_lane, const std::source_location& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t), "CUDA shuffles at most 8 bytes");
  Thread& self = *current_block->running;
  __builtin_memcpy(&self.value, &value, sizeof(T));
  self.source_lane = source_lane;
  wait_for_warp(mask, resolve_shuffle, site);
  __builtin_memcpy(static_cast<void*>(&value), &self.result, sizeof(T));
  return value;
}

CUDA_EMULATOR_HIDDEN inline unsigned ballot(unsigned mask, bool predicate, const std::source_location& site) {
  Thread& self = *current_block->running;
  self.value = predicate;
  wait_for_warp(mask, resolve_ballot, site);
  return static_cast<unsigned>(self.result);
}

}  // namespace cuda_emulator
