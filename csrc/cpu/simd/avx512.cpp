// The kernels for AVX-512 F, BW, DQ and VL: Intel servers since Skylake, AMD since Zen 4.
#include "instruction_set.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the placeholders in its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define LAMBDA_RETURN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define LAMBDA_RETURN_LANES 16
#define LAMBDA_RETURN_AVX512 1
#include "x86_kernels.h"

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
