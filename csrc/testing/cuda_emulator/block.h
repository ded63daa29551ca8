// One resident block: its threads, who of them can run, the hand-over to other blocks, the barrier, and failures.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <source_location>

#include "fiber.h"
#include "schedule.h"

namespace cuda_emulator {

// ---- the threads of a block ----

enum class ThreadState : uint8_t { kReady, kInWarpCollective, kAtBarrier, kExited };

struct Thread {
  Fiber* fiber;
  uint3 index;  // threadIdx
  int id;       // x fastest, then y, z
  int lane;
  ThreadState state;
  std::source_location site;  // of the barrier or collective it waits in
  // The warp collective it waits in:
  unsigned mask;
  int source_lane;
  uint64_t value, result;
};

// The threads that can run, as a set of ids.
class ReadySet {
 public:
  CUDA_EMULATOR_HIDDEN void clear() {
    for (uint64_t& word : words_) {
      word = 0;
    }
    size_ = 0;
  }

  CUDA_EMULATOR_HIDDEN void insert(int id) {
    words_[id / 64] |= uint64_t{1} << (id % 64);
    ++size_;
  }

  CUDA_EMULATOR_HIDDEN bool empty() const { return size_ == 0; }

  // Removes the first id >= start, or the smallest one if there is none. The set must not be empty.
  CUDA_EMULATOR_HIDDEN int take_at_or_above(int start) {
    int word = start / 64;
    uint64_t candidates = words_[word] & (~uint64_t{0} << (start % 64));
    while (candidates == 0) {
      word = (word + 1) % kWords;
      candidates = words_[word];
    }
    return remove(word * 64 + __builtin_ctzll(candidates));
  }

  // Removes the last id <= start, or the largest one if there is none. The set must not be empty.
  CUDA_EMULATOR_HIDDEN int take_at_or_below(int start) {
    int word = start / 64;
    uint64_t candidates = words_[word] & (~uint64_t{0} >> (63 - start % 64));
    while (candidates == 0) {
      word = (word + kWords - 1) % kWords;
      candidates = words_[word];
    }
    return remove(word * 64 + 63 - __builtin_clzll(candidates));
  }

 private:
  static constexpr int kWords = kMaxThreadsPerBlock / 64;

  CUDA_EMULATOR_HIDDEN int remove(int id) {
    words_[id / 64] &= ~(uint64_t{1} << (id % 64));
    --size_;
    return id;
  }

  uint64_t words_[kWords];
  int size_;
};

// ---- taking turns between blocks ----

// The right to run, held by one resident slot at a time. Waiting goes through the kernel's futex, of which
// ThreadSanitizer knows nothing, instead of through a mutex, which would order the blocks' memory accesses.
class Baton {
 public:
  CUDA_EMULATOR_HIDDEN explicit Baton(int slots) : slots_(slots) {
    for (int slot = 0; slot < kMaxResidentBlocks; ++slot) {
      live_[slot] = slot < slots;
      turn_[slot] = slot == 0 ? 1 : 0;
    }
  }

  CUDA_EMULATOR_HIDDEN void wait(int slot) {
    while (__atomic_load_n(&turn_[slot], __ATOMIC_ACQUIRE) == 0) {
      syscall(SYS_futex, &turn_[slot], FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
    }
    turn_[slot] = 0;
  }

  // Hands over to a random live slot, which may be the caller itself, and returns when it is the caller's turn again.
  CUDA_EMULATOR_HIDDEN void pass(int slot, Random& random) { hand_over(slot, choose(-1, random)); }

  // The same, but to another slot wherever there is one.
  CUDA_EMULATOR_HIDDEN void pass_to_other(int slot, Random& random) { hand_over(slot, choose(slot, random)); }

  // The caller's slot has no more blocks to run.
  CUDA_EMULATOR_HIDDEN void leave(int slot, Random& random) {
    live_[slot] = false;
    const int next = choose(-1, random);
    if (next >= 0) {
      give_to(next);
    }
  }

 private:
  // A random live slot other than `excluded`; -1 if there is none.
  CUDA_EMULATOR_HIDDEN int choose(int excluded, Random& random) const {
    int candidates[kMaxResidentBlocks];
    int count = 0;
    for (int slot = 0; slot < slots_; ++slot) {
      if (live_[slot] && slot != excluded) {
        candidates[count++] = slot;
      }
    }
    return count == 0 ? -1 : candidates[random.below(count)];
  }

  CUDA_EMULATOR_HIDDEN void hand_over(int slot, int next) {
    if (next >= 0 && next != slot) {
      give_to(next);
      wait(slot);
    }
  }

  CUDA_EMULATOR_HIDDEN void give_to(int slot) {
    __atomic_store_n(&turn_[slot], 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &turn_[slot], FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }

  int slots_;
  bool live_[kMaxResidentBlocks];
  int turn_[kMaxResidentBlocks];  // 1: the slot holds the baton and has yet to notice
};

// ---- a launch and the block that a slot runs ----

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  void (*kernel)(void* arguments);
  void* arguments;
  Schedule schedule;
  Baton baton;
  Random random;
  uint64_t next_block = 0, num_blocks;
  uint64_t yields_since_progress = 0;
  OrderTag finished{};
};

// The order that one barrier after another creates. A thread can reach the next one before all have left this one: two
// tags, used in turn, keep consecutive ones apart.
struct BarrierOrder {
  unsigned generation = 0;
  OrderTag tags[2];

  CUDA_EMULATOR_HIDDEN OrderTag& current() { return tags[generation % 2]; }
};

struct Warp {
  unsigned arrived = 0;                // lanes that wait in a collective
  unsigned exited = 0;                 // lanes that have returned or never existed
  BarrierOrder sync_order[kWarpSize];  // of __syncwarp, by the lowest lane of the mask: groups of lanes sync apart
};

struct Barrier {
  int arrived = 0;
  std::source_location site;
  BarrierOrder order;
};

// A resident slot: an operating system thread and the block that it runs at present.
struct Block {
  Launch* launch = nullptr;
  int slot = 0;
  int num_threads = 0;
  Thread* threads = nullptr;
  Warp* warps = nullptr;
  char* dynamic_shared = nullptr;
  Fiber slot_fiber;  // runs between blocks
  uint3 index{};     // blockIdx
  int alive = 0;     // threads that have not returned
  ReadySet ready;
  Thread* running = nullptr;  // null: slot_fiber
  Barrier barrier;
  unsigned accesses_since_yield = 0;
  OrderTag started, finished;
};

// The block that this operating system thread runs. Poisoning shared memory spares it (launch.h).
inline thread_local Block* current_block = nullptr;

// ---- failures ----

CUDA_EMULATOR_HIDDEN inline void print_site(const std::source_location& site) {
  if (site.line() != 0) {
    std::fprintf(stderr, "%s:%u", site.file_name(), static_cast<unsigned>(site.line()));
  }
}

CUDA_EMULATOR_HIDDEN inline void print_waiting_threads(const Block& block) {
  constexpr int kMaxPrinted = 8;
  int waiting = 0;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    const bool in_collective = thread.state == ThreadState::kInWarpCollective;
    if (!in_collective && thread.state != ThreadState::kAtBarrier) {
      continue;
    }
    if (++waiting > kMaxPrinted) {
      continue;
    }
    std::fprintf(stderr, "    thread (%u, %u, %u) waits at ", thread.index.x, thread.index.y, thread.index.z);
    print_site(thread.site);
    if (in_collective) {
      std::fprintf(stderr, " for the lanes 0x%08x\n", thread.mask);
    } else {
      std::fprintf(stderr, " for the block\n");
    }
  }
  if (waiting > kMaxPrinted) {
    std::fprintf(stderr, "    and %d more threads wait\n", waiting - kMaxPrinted);
  }
}

// Reports a rule that the kernel broke and ends the process: nothing that it computes afterwards means anything.
[[noreturn]] CUDA_EMULATOR_HIDDEN inline void fail(const char* rule, const std::source_location& site = {}) {
  std::fprintf(stderr, "cuda_emulator: %s\n", rule);
  if (const Block* block = current_block; block != nullptr) {
    std::fprintf(stderr, "    in block (%u, %u, %u)", block->index.x, block->index.y, block->index.z);
    if (const Thread* thread = block->running; thread != nullptr) {
      std::fprintf(stderr, ", thread (%u, %u, %u)", thread->index.x, thread->index.y, thread->index.z);
    }
    std::fprintf(stderr, site.line() != 0 ? ", at " : "\n");
    print_site(site);
    std::fprintf(stderr, site.line() != 0 ? "\n" : "");
    print_waiting_threads(*block);
    const Schedule& schedule = block->launch->schedule;
    std::fprintf(
        stderr, "    schedule: order %d, seed %u, %d resident blocks\n", static_cast<int>(schedule.order),
        schedule.seed, schedule.resident_blocks);
  }
  std::fflush(stderr);
  _exit(kFailureExitCode);
}

CUDA_EMULATOR_HIDDEN inline bool same_site(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && __builtin_strcmp(a.file_name(), b.file_name()) == 0;
}

// ---- running threads ----

CUDA_EMULATOR_HIDDEN inline void make_ready(Block& block, Thread& thread) {
  thread.state = ThreadState::kReady;
  block.ready.insert(thread.id);
}

// Runs `next`, or the slot itself if it is null, and returns when the calling thread is run again.
CUDA_EMULATOR_HIDDEN inline void run(Block& block, Thread* next) {
  Thread* self = block.running;
  if (next == self) {
    return;
  }
  block.running = next;
  const bool ends = self != nullptr && self->state == ThreadState::kExited;
  switch_fiber(
      self != nullptr ? *self->fiber : block.slot_fiber, next != nullptr ? *next->fiber : block.slot_fiber, ends);
}

// Takes the next thread to run from those that are ready; null if none is, which ends the block or is a deadlock.
CUDA_EMULATOR_HIDDEN inline Thread* take_ready(Block& block) {
  if (block.ready.empty()) {
    return nullptr;
  }
  switch (block.launch->schedule.order) {
    case Order::kAscending:
      return &block.threads[block.ready.take_at_or_above(0)];
    case Order::kDescending:
      return &block.threads[block.ready.take_at_or_below(block.num_threads - 1)];
    default:
      return &block.threads[block.ready.take_at_or_above(block.launch->random.below(block.num_threads))];
  }
}

// Takes the next thread after `self` in the block's order, so that a thread that polls cannot starve the one it polls
// for. Devices since compute capability 7.0 promise the same progress.
CUDA_EMULATOR_HIDDEN inline Thread* take_ready_after(Block& block, const Thread& self) {
  const int last = block.num_threads - 1;
  switch (block.launch->schedule.order) {
    case Order::kAscending:
      return &block.threads[block.ready.take_at_or_above(self.id == last ? 0 : self.id + 1)];
    case Order::kDescending:
      return &block.threads[block.ready.take_at_or_below(self.id == 0 ? last : self.id - 1)];
    default:
      return take_ready(block);
  }
}

// Suspends the running thread until another one makes it ready.
CUDA_EMULATOR_HIDDEN inline void suspend(Block& block) { run(block, take_ready(block)); }

// Lets another thread of the block run and, once this one is run again, perhaps another block.
CUDA_EMULATOR_HIDDEN inline void yield() {
  Block& block = *current_block;
  Launch& launch = *block.launch;
  if (++launch.yields_since_progress > launch.schedule.livelock_yields) {
    fail("livelock: every resident block polls and none finishes; do they wait for a block that is not resident?");
  }
  make_ready(block, *block.running);
  run(block, take_ready_after(block, *block.running));
  launch.baton.pass(block.slot, launch.random);
}

// To be called wherever a kernel can see what others do: at atomics, flags and fences.
CUDA_EMULATOR_HIDDEN inline void maybe_yield() {
  Block& block = *current_block;
  const unsigned interval = block.launch->schedule.yield_every;
  if (interval != 0 && ++block.accesses_since_yield >= interval) {
    block.accesses_since_yield = 0;
    yield();
  }
}

// ---- __syncthreads ----

CUDA_EMULATOR_HIDDEN inline void open_barrier(Block& block) {
  block.barrier.arrived = 0;
  ++block.barrier.order.generation;
  for (int i = 0; i < block.num_threads; ++i) {
    if (block.threads[i].state == ThreadState::kAtBarrier) {
      make_ready(block, block.threads[i]);
    }
  }
}

// Opens when every thread that has not returned is there.
CUDA_EMULATOR_HIDDEN inline void wait_at_barrier(const std::source_location& site) {
  Block& block = *current_block;
  Barrier& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.site = site;
  } else if (!same_site(barrier.site, site)) {
    fail("divergent barrier: threads of one block wait in different __syncthreads", site);
  }
  OrderTag& tag = barrier.order.current();
  tag.release();
  block.running->site = site;
  block.running->state = ThreadState::kAtBarrier;
  if (++barrier.arrived == block.alive) {
    open_barrier(block);
  }
  suspend(block);
  tag.acquire();
}

}  // namespace cuda_emulator
