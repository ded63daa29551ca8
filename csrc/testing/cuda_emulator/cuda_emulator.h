// Runs CUDA C++ kernels on the CPU, from the same source, compiled by g++ alone.
//
// How it works
//   * A CUDA thread is a fiber (fiber.h). A warp collective or a barrier suspends the fiber until the others arrive
//     (warp.h, block.h); nothing runs in parallel, everything interleaves.
//   * A resident block is an operating system thread, so that `__shared__` can be `static thread_local`. One block runs
//     at a time; the blocks hand a baton to each other at seeded places, so that spin loops between blocks make
//     progress and a run depends on nothing but the Schedule (schedule.h): a failure can be replayed.
//   * Shared memory is filled with NaN before every block.
//
// What it reports: a lane that is not in its own mask, a mask that names an exited lane, a shuffle from a lane outside
// the mask, lanes of one mask in different collectives, a divergent __syncthreads, a deadlock inside a block, blocks
// that wait for one that is not resident. Each report ends the process with kFailureExitCode. The sanitizers find the
// rest:
//   * -fsanitize=thread: every CUDA thread is a thread of ThreadSanitizer, ordered with others only by __syncthreads,
//     __syncwarp, __threadfence and acquire/release. A missing barrier is reported at its line even where the run's own
//     interleaving hides it.
//   * -fsanitize=address,undefined: accesses out of bounds, misaligned vector accesses.
//
// What a kernel source needs: this header where __CUDACC__ is not defined, and
//   cuda_emulator::launch(grid, block, dynamic_shared_bytes, kernel, arguments...)
//                                             for kernel<<<grid, block, dynamic_shared_bytes>>>(arguments...)
//   cuda_emulator::dynamic_shared_memory()    for extern __shared__ T name[]
//   cuda_emulator::maybe_yield()              around the __atomic_* builtin that is the twin of an instruction in PTX:
//                                             before a load, before and after what others wait for
//
// What it cannot show
//   * Weak memory reorders no values and nothing is timed. __threadfence counts as ordering with every other fence,
//     which is more than the hardware promises: publish data with release and read it after acquire.
//   * Two blocks that one resident slot runs one after the other count as ordered. Consecutive blocks therefore go to
//     different slots; use at least two.
//   * A static __shared__ array has no red zone: an index past it is found (by UBSan) only where the array is indexed
//     by its name. Dynamic shared memory is exact to the byte.
//   * A loop that polls without an atomic, __nanosleep or maybe_yield never lets another thread run: give tests a time
//     limit.
//   * The same source line reached on two divergent paths counts as one barrier or collective.
//   * ThreadSanitizer creates a thread in about 2 ms and has room for about 4096: that many resident CUDA threads, such
//     as 16 blocks of 256.
//   * x86-64, Linux and GCC with its sanitizers as shared libraries. Kernels must not use other thread_local variables
//     of the program or library that they are in: poisoning shared memory overwrites them (launch.h).
#pragma once

#include "sanitizers.h"
#include "schedule.h"
#include "fiber.h"
#include "block.h"
#include "warp.h"
#include "launch.h"
#include "intrinsics.h"
