// Launching a grid: resident slots, the life of a block and of its threads, poisoned shared memory.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "block.h"

namespace cuda_emulator {

// ---- shared memory ----

// A stretch of memory without a C++ object of its own.
struct MemoryRange {
  char* begin = nullptr;
  size_t bytes = 0;
};

// Fills with bytes 0xff: NaN in every floating-point format, -1 or the maximum in every integer. Through volatile, as a
// call of memset would be seen by the sanitizers.
CUDA_EMULATOR_HIDDEN inline void poison(MemoryRange range) {
  for (size_t i = 0; i < range.bytes; ++i) {
    const_cast<volatile char*>(range.begin)[i] = static_cast<char>(0xff);
  }
}

// The thread_local variables of the program or library that contains this code, for the calling thread: that is, the
// kernels' __shared__ variables, and current_block.
CUDA_EMULATOR_HIDDEN inline MemoryRange static_shared_memory() {
  const auto visit = [](dl_phdr_info* module, size_t, void* result) {
    char* begin = static_cast<char*>(module->dlpi_tls_data);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & segment = module->dlpi_phdr[i];
      const char* inside = reinterpret_cast<const char*>(&current_block);
      if (segment.p_type == PT_TLS && begin <= inside && inside < begin + segment.p_memsz) {
        *static_cast<MemoryRange*>(result) = {begin, segment.p_memsz};
        return 1;
      }
    }
    return 0;
  };
  MemoryRange range;
  dl_iterate_phdr(visit, &range);
  return range;
}

CUDA_EMULATOR_HIDDEN inline void poison_shared_memory(Block& block, MemoryRange static_shared) {
  poison(static_shared);
  current_block = &block;
  poison({block.dynamic_shared, block.launch->dynamic_shared_bytes});
}

// ---- the life of a thread ----

// A thread that returns no longer counts for barriers. No lane may wait for it in a collective.
CUDA_EMULATOR_HIDDEN inline void exit_thread(Block& block, Thread& self) {
  self.state = ThreadState::kExited;
  Warp& warp = block.warps[self.id / kWarpSize];
  warp.exited |= 1u << self.lane;
  const Thread* lanes = &self - self.lane;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((warp.arrived >> lane & 1u) != 0 && (lanes[lane].mask >> self.lane & 1u) != 0) {
      fail("warp collective: a lane exits while others of its warp wait for it", lanes[lane].site);
    }
  }
  --block.alive;
  if (block.alive > 0 && block.barrier.arrived == block.alive) {
    open_barrier(block);
  }
}

CUDA_EMULATOR_HIDDEN inline void run_thread() {
  finish_first_switch();
  Block& block = *current_block;
  block.started.acquire();
  block.launch->kernel(block.launch->arguments);
  block.finished.release();
  block.launch->finished.release();
  exit_thread(block, *block.running);
  suspend(block);  // for ever
  __builtin_unreachable();
}

// ---- the life of a block ----

CUDA_EMULATOR_HIDDEN inline uint3 unflatten(uint64_t id, dim3 size) {
  return {
      static_cast<unsigned>(id % size.x), static_cast<unsigned>(id / size.x % size.y),
      static_cast<unsigned>(id / size.x / size.y)};
}

CUDA_EMULATOR_HIDDEN inline void start_threads(Block& block) {
  block.ready.clear();
  for (int id = 0; id < block.num_threads; ++id) {
    Thread& thread = block.threads[id];
    thread.index = unflatten(id, block.launch->block);
    thread.id = id;
    thread.lane = id % kWarpSize;
    thread.mask = 0;
    prepare_fiber(*thread.fiber, run_thread);
    make_ready(block, thread);
  }
}

CUDA_EMULATOR_HIDDEN inline void start_warps(Block& block) {
  for (int first = 0; first < block.num_threads; first += kWarpSize) {
    Warp& warp = block.warps[first / kWarpSize];
    const int lanes = block.num_threads - first;
    warp.arrived = 0;
    warp.exited = lanes < kWarpSize ? kFullMask << lanes : 0;
  }
}

CUDA_EMULATOR_HIDDEN inline void run_block(Block& block, uint64_t id, MemoryRange static_shared) {
  block.index = unflatten(id, block.launch->grid);
  block.alive = block.num_threads;
  block.barrier.arrived = 0;
  poison_shared_memory(block, static_shared);
  start_warps(block);
  start_threads(block);
  block.started.release();
  suspend(block);
  if (block.alive > 0) {
    fail("deadlock: every thread of a block waits for another one");
  }
  block.finished.acquire();  // the slot's next block has its __shared__ variables at the same addresses
}

// ---- resident slots ----

CUDA_EMULATOR_HIDDEN inline void allocate_slot(Block& block) {
  const Launch& launch = *block.launch;
  block.num_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  block.threads = new Thread[block.num_threads];
  block.warps = new Warp[(block.num_threads + kWarpSize - 1) / kWarpSize];
  // To the byte, so that AddressSanitizer sees the end; 128 is the alignment of shared memory on a device.
  void* dynamic_shared = nullptr;
  if (posix_memalign(&dynamic_shared, 128, launch.dynamic_shared_bytes) != 0) {
    throw std::bad_alloc();
  }
  block.dynamic_shared = static_cast<char*>(dynamic_shared);
  for (int id = 0; id < block.num_threads; ++id) {
    block.threads[id].fiber = fiber_pool.take();
  }
}

CUDA_EMULATOR_HIDDEN inline void free_slot(Block& block) {
  for (int id = block.num_threads - 1; id >= 0; --id) {
    fiber_pool.give_back(block.threads[id].fiber);
  }
  delete[] block.threads;
  delete[] block.warps;
  std::free(block.dynamic_shared);
  current_block = nullptr;
}

// The body of a slot's operating system thread: takes one block after another until none is left.
CUDA_EMULATOR_HIDDEN inline void run_slot(Launch& launch, int slot) {
  launch.baton.wait(slot);
  Block block;
  block.launch = &launch;
  block.slot = slot;
  block.slot_fiber = current_thread_as_fiber();
  current_block = &block;
  allocate_slot(block);
  const MemoryRange static_shared = static_shared_memory();
  while (launch.next_block < launch.num_blocks) {
    run_block(block, launch.next_block++, static_shared);
    launch.yields_since_progress = 0;
    // Two blocks in one slot count as ordered: keep neighbours in different slots.
    launch.baton.pass_to_other(slot, launch.random);
  }
  free_slot(block);
  launch.baton.leave(slot, launch.random);
}

// ---- launch ----

// The limits of every device since compute capability 7.0.
inline void check_launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxBlockZ = 64;
  if (grid.x == 0 || grid.x > kMaxGridX || grid.y == 0 || grid.y > kMaxGridYZ || grid.z == 0 || grid.z > kMaxGridYZ) {
    fail("launch: the grid is empty or too large");
  }
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > kMaxBlockZ ||
      uint64_t{block.x} * block.y * block.z > kMaxThreadsPerBlock) {
    fail("launch: a block must have 1 to 1024 threads");
  }
  if (dynamic_shared_bytes > kMaxSharedBytes) {
    fail("launch: too much dynamic shared memory");
  }
  if (schedule.resident_blocks < 1 || schedule.resident_blocks > kMaxResidentBlocks) {
    fail("launch: schedule.resident_blocks must be 1 to 64");
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*kernel)(void*), void* arguments) {
  check_launch(grid, block, dynamic_shared_bytes);
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  const int slots = static_cast<int>(std::min<uint64_t>(schedule.resident_blocks, num_blocks));
  Launch launch{
      .grid = grid,
      .block = block,
      .dynamic_shared_bytes = dynamic_shared_bytes,
      .kernel = kernel,
      .arguments = arguments,
      .schedule = schedule,
      .baton = Baton(slots),
      .random = Random(schedule.seed),
      .num_blocks = num_blocks,
  };
  std::vector<std::thread> threads;
  for (int slot = 0; slot < slots; ++slot) {
    threads.emplace_back([&launch, slot] { run_slot(launch, slot); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  launch.finished.acquire();
}

// kernel<<<grid, block, dynamic_shared_bytes>>>(arguments...): runs the whole grid and returns when it is done. One
// launch at a time in a process.
template <class Kernel, class... Arguments>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Kernel kernel, Arguments... arguments) {
  auto call = [&] { kernel(arguments...); };
  const auto invoke = [](void* pointer) { (*static_cast<decltype(call)*>(pointer))(); };
  run_grid(grid, block, dynamic_shared_bytes, invoke, &call);
}

}  // namespace cuda_emulator
