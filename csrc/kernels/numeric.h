// Number types of the kernels. Torch-free: compiled for host and device alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LAMBDA_RETURN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LAMBDA_RETURN_HOST_DEVICE inline
#endif

namespace lambda_return {

// Values are float64, float32, bfloat16 or float16. Everything is accumulated in float64 for float64 values
// and in float32 for all others.
template <class scalar_t>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class scalar_t>
using accumulate_t = typename AccumulateType<scalar_t>::type;

}  // namespace lambda_return
