// The kernels for AVX-512 F, BW, DQ and VL: Intel servers since Skylake, AMD since Zen 4.
#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace lambda_return::cpu {
namespace {

constexpr int kLanes = 16;
#define LAMBDA_RETURN_FMA 1
#define LAMBDA_RETURN_AVX512 1
#include "row_kernels.h"

}  // namespace
}  // namespace lambda_return::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx512() {
  static constexpr InstructionSet set = instruction_set_named("avx512");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("f16c")
             ? &set
             : nullptr;
}
#else
const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx512() { return nullptr; }
#endif
