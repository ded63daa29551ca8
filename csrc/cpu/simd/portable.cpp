// The kernels in what every processor of the target has: SSE2 on x86-64, NEON on AArch64.
#include "instruction_set.h"

#include <cstring>
#include <type_traits>
#include <utility>

// float64 vectors are wider than a register here; that no vector crosses a call makes GCC's note on calls moot.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace lambda_return::cpu {
namespace {

constexpr int kLanes = 4;
#define LAMBDA_RETURN_FMA 0
#define LAMBDA_RETURN_AVX512 0
#include "row_kernels.h"

}  // namespace

const InstructionSet* portable() {
  static constexpr InstructionSet set = instruction_set_named("portable");
  return &set;
}

}  // namespace lambda_return::cpu
