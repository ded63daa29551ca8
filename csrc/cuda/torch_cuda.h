// What the CUDA operators need of torch: device guard, current stream, workspace, and the device's own half types.
#pragma once

#include "../checks.h"

#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "items.cuh"

namespace lambda_return::cuda {

template <class scalar_t>
struct DeviceType {
  using type = scalar_t;
};
template <>
struct DeviceType<torch::headeronly::Half> {
  using type = __half;
};
template <>
struct DeviceType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};
template <class scalar_t>
using device_t = typename DeviceType<scalar_t>::type;

// Makes the device of x current for the lifetime of the object, and knows the stream to launch on.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Bytes on the device of like, from torch's allocator, at least 16-byte aligned.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// (loss, num_tokens), 0-dim, 0 where there is no token: the kernels write them otherwise.
inline std::tuple<Tensor, Tensor> new_mean_and_count(const Tensor& values) {
  if (values.numel() == 0) {
    return {
        torch::stable::new_zeros(values, {}, accumulate_dtype(values)),
        torch::stable::new_zeros(values, {}, ScalarType::Long)};
  }
  return {
      torch::stable::new_empty(values, {}, accumulate_dtype(values)),
      torch::stable::new_empty(values, {}, ScalarType::Long)};
}

template <class T>
Rows<const T> device_rows(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0)};
}

// An absent tensor gives null rows.
template <class T>
Rows<const T> device_rows_or_null(const Tensor& x) {
  return x.defined() ? device_rows<T>(x) : Rows<const T>{};
}

template <class T>
Rows<T> mutable_device_rows(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0)};
}

}  // namespace lambda_return::cuda
