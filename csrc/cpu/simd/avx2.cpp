// The kernels for AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lambda_return::cpu {
namespace {

constexpr int kLanes = 8;
#define LAMBDA_RETURN_FMA 1
#define LAMBDA_RETURN_AVX512 0
#include "row_kernels.h"

}  // namespace
}  // namespace lambda_return::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx2() {
  static constexpr InstructionSet set = instruction_set_named("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &set
                                                                                                           : nullptr;
}
#else
const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx2() { return nullptr; }
#endif
