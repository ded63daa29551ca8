// Fibers: stacks that are switched by hand. A CUDA thread is one fiber.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__)
#error "the CUDA emulator needs GCC on x86-64 Linux"
#endif

namespace cuda_emulator {

inline constexpr size_t kPageBytes = 4096;
inline constexpr size_t kFiberStackBytes = (CUDA_EMULATOR_TSAN || CUDA_EMULATOR_ASAN) ? 256 * 1024 : 64 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;  // valid while the fiber is suspended
  char* stack = nullptr;          // lowest address
  size_t stack_bytes = 0;
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
  Fiber* next_free = nullptr;
};

// Saves the registers that the ABI lets a caller expect back, exchanges the stack, restores them and returns on the new
// stack. noipa: otherwise GCC looks inside, sees no register used, and keeps values in ones that do change.
__attribute__((naked, noipa)) static void exchange_stack(void** /*save to*/, void* /*continue at*/) {
  __asm__ volatile(
      "pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}

// Leaves `from`, which is running, for `to`. Returns when something switches back to `from`.
CUDA_EMULATOR_HIDDEN inline void switch_fiber(Fiber& from, Fiber& to, bool from_ends = false) {
#if CUDA_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if CUDA_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
  (void)from_ends;
  exchange_stack(&from.stack_pointer, to.stack_pointer);
#if CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// The first call of a fiber's entry function, in place of the end of switch_fiber.
CUDA_EMULATOR_HIDDEN inline void finish_first_switch() {
#if CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Makes the next switch to `fiber` call entry(), which must not return.
CUDA_EMULATOR_HIDDEN inline void prepare_fiber(Fiber& fiber, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // The ABI wants the stack pointer to be 8 modulo 16 at entry, as after a call. The word above the entry point is the
  // return address of entry(), 0 so that stack traces end there.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes) - 2;
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= kSavedRegisters; ++i) {
    top[-i] = nullptr;
  }
  fiber.stack_pointer = top - kSavedRegisters;
  fiber.asan_fake_stack = nullptr;
}

// The fiber that an operating system thread is when it starts.
CUDA_EMULATOR_HIDDEN inline Fiber current_thread_as_fiber() {
  Fiber fiber;
#if CUDA_EMULATOR_TSAN
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
#if CUDA_EMULATOR_ASAN
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &fiber.stack_bytes);
  pthread_attr_destroy(&attributes);
  fiber.stack = static_cast<char*>(stack);
#endif
  return fiber;
}

// A new fiber below whose stack lies a page that faults, so that an overflow does not corrupt the next one.
CUDA_EMULATOR_HIDDEN inline Fiber* create_fiber() {
  void* memory = mmap(
      nullptr, kPageBytes + kFiberStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
      0);
  if (memory == MAP_FAILED || mprotect(memory, kPageBytes, PROT_NONE) != 0) {
    std::perror("cuda_emulator: no memory for the stack of a CUDA thread");
    std::abort();
  }
  Fiber* fiber = new Fiber;
  fiber->stack = static_cast<char*>(memory) + kPageBytes;
  fiber->stack_bytes = kFiberStackBytes;
#if CUDA_EMULATOR_TSAN
  fiber->tsan_fiber = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Fibers are kept for all later blocks and launches: a ThreadSanitizer fiber takes about 2 ms to create, which
// would be most of the time of a test. Whoever holds the baton (block.h) may use the list.
class FiberPool {
 public:
  CUDA_EMULATOR_HIDDEN Fiber* take() {
    Fiber* fiber = free_;
    if (fiber == nullptr) {
      return create_fiber();
    }
    free_ = fiber->next_free;
    return fiber;
  }

  CUDA_EMULATOR_HIDDEN void give_back(Fiber* fiber) {
    fiber->next_free = free_;
    free_ = fiber;
  }

 private:
  Fiber* free_ = nullptr;
};

inline FiberPool fiber_pool;

}  // namespace cuda_emulator
