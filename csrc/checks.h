// Argument checks and layouts shared by the CPU and CUDA operators.
//
// The Python layer (lambda_return_ext/functional.py) explains bad input to people. What is checked here is
// what could otherwise read or write out of bounds, for callers that reach the operators directly.
#pragma once

#include "torch_abi.h"

#include <algorithm>
#include <array>
#include <initializer_list>

#include "kernels/numeric.h"

namespace lambda_return {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// values_t of the kernels: THO_DISPATCH_V2(type, name, AT_WRAP(body), LAMBDA_RETURN_VALUE_TYPES).
#define LAMBDA_RETURN_VALUE_TYPES                                              \
  torch::headeronly::ScalarType::Double, torch::headeronly::ScalarType::Float, \
      torch::headeronly::ScalarType::BFloat16, torch::headeronly::ScalarType::Half

inline ScalarType accumulate_dtype(const Tensor& values) {
  return values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be [B, T], got ", x.dim(), " dimensions");
}

// x [B, T] must have the shape and device of like [B, T].
inline void check_same_matrix(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  check_matrix(x, name);
  STD_TORCH_CHECK(
      x.size(0) == like.size(0) && x.size(1) == like.size(1), name, " must have the shape of ", like_name, ", [",
      like.size(0), ", ", like.size(1), "], got [", x.size(0), ", ", x.size(1), "]");
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of ", like_name);
}

inline void check_rewards(const Tensor& terminal_rewards, const Tensor& values) {
  STD_TORCH_CHECK(
      terminal_rewards.dim() == 1 && terminal_rewards.size(0) == values.size(0), "terminal_rewards must be [B] = [",
      values.size(0), "], got ", terminal_rewards.numel(), " elements in ", terminal_rewards.dim(), " dimensions");
  STD_TORCH_CHECK(terminal_rewards.device() == values.device(), "terminal_rewards must be on the device of values");
}

inline void check_scalar(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 0, name, " must be 0-dim, got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of values");
}

// x as dtype. A complex x is refused: its imaginary part would be dropped.
inline Tensor cast(const Tensor& x, ScalarType dtype) {
  const ScalarType from = x.scalar_type();
  STD_TORCH_CHECK(
      from != ScalarType::ComplexHalf && from != ScalarType::ComplexFloat && from != ScalarType::ComplexDouble,
      "masks, rewards and numbers must have a real dtype");
  return torch::stable::to(x, dtype);
}

// x [B, T] whose rows are contiguous in T: x itself where they are (any row stride, 0 included), else one
// copy.
inline Tensor contiguous_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// mask [B, T] as bytes, nonzero = valid: bool, uint8 and int8 as they are, any other dtype through one bool
// copy.
inline Tensor byte_mask(const Tensor& mask) {
  const ScalarType dtype = mask.scalar_type();
  const bool is_byte = dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == ScalarType::Char;
  return contiguous_rows(is_byte ? mask : cast(mask, ScalarType::Bool));
}

// x of dtype, contiguous: for [B] and 0-dim arguments. The dispatcher takes a microsecond, and so is not called for
// nothing.
inline Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() != dtype) return torch::stable::contiguous(cast(x, dtype));
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A new contiguous tensor on the device of like, past the dispatcher.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 2> strides{};
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "new_tensor makes matrices, rows and numbers");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[i])) {
    strides[i] = stride;
  }
  const auto device = like.device();
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), static_cast<int32_t>(device.type()),
      device.index(), &made));
  return Tensor(made);
}

// Row pointers into a [B, T] tensor whose rows are contiguous in T.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
  // Whether each of rows of that length begins where another one ends.
  bool follow(int64_t length) const { return stride == length; }
};

template <class T>
Rows<const T> const_rows(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0)};
}

template <class T>
Rows<T> mutable_rows(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0)};
}

}  // namespace lambda_return
