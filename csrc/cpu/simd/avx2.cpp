// The kernels for AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#include "instruction_set.h"

#if defined(__x86_64__)
#define LAMBDA_RETURN_TARGET "avx2,fma,f16c"
#define LAMBDA_RETURN_LANES 8
#define LAMBDA_RETURN_AVX512 0
#include "x86_kernels.h"

const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx2() {
  static constexpr InstructionSet set = instruction_set_named("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &set
                                                                                                           : nullptr;
}
#else
const lambda_return::cpu::InstructionSet* lambda_return::cpu::avx2() { return nullptr; }
#endif
