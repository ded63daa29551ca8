// What the emulator tells ThreadSanitizer and AddressSanitizer, and how it hides itself from them.
#pragma once

#if defined(__SANITIZE_THREAD__)
#define CUDA_EMULATOR_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define CUDA_EMULATOR_TSAN 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATOR_ASAN 1
#include <sanitizer/common_interface_defs.h>
#else
#define CUDA_EMULATOR_ASAN 0
#endif

// Every function of the scheduler carries this attribute. ThreadSanitizer must not see the scheduler: its hand-overs
// would order threads that the kernel did not order, and its own state would look like a race. AddressSanitizer must
// not place red zones into frames that are abandoned when a fiber ends, because its stack is used again.
// Such a function calls no function of the standard library on shared state: templates are compiled with checks.
#define CUDA_EMULATOR_HIDDEN __attribute__((no_sanitize("thread", "address")))

namespace cuda_emulator {

// The only happens-before edges that ThreadSanitizer learns: from every earlier release() of a tag to an acquire().
class OrderTag {
 public:
  CUDA_EMULATOR_HIDDEN void release() {
#if CUDA_EMULATOR_TSAN
    __tsan_release(this);
#endif
  }

  CUDA_EMULATOR_HIDDEN void acquire() {
#if CUDA_EMULATOR_TSAN
    __tsan_acquire(this);
#endif
  }

 private:
  char address_;  // never written: its address is the tag
};

}  // namespace cuda_emulator
