// The kernels of one x86 instruction set: row_kernels.h under its target, in an unnamed namespace.
//
// No include guard: see vector.h. Included after
//   LAMBDA_RETURN_TARGET     the target, a string of GCC's and clang's names for processor features
//   LAMBDA_RETURN_LANES      float32 lanes
//   LAMBDA_RETURN_AVX512     1 where the target has AVX-512 F
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#define LAMBDA_RETURN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LAMBDA_RETURN_PUSH(target_) \
  LAMBDA_RETURN_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define LAMBDA_RETURN_POP LAMBDA_RETURN_PRAGMA(clang attribute pop)
#else
#define LAMBDA_RETURN_PUSH(target_) LAMBDA_RETURN_PRAGMA(GCC push_options) LAMBDA_RETURN_PRAGMA(GCC target(target_))
#define LAMBDA_RETURN_POP LAMBDA_RETURN_PRAGMA(GCC pop_options)
#endif

LAMBDA_RETURN_PUSH(LAMBDA_RETURN_TARGET)
namespace lambda_return::cpu {
namespace {

constexpr int kLanes = LAMBDA_RETURN_LANES;
#define LAMBDA_RETURN_FMA 1
#include "row_kernels.h"

}  // namespace
}  // namespace lambda_return::cpu
LAMBDA_RETURN_POP
