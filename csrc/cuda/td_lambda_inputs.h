// From the checked arguments of the general operators to what their kernels take.
#pragma once

#include "torch_cuda.h"

#include "../td_lambda_arguments.h"
#include "td_lambda.cuh"

namespace lambda_return::cuda {

inline Sequences device_sequences(const TokenShape& shape) {
  return {shape.B, shape.T, shape.packed ? shape.cu_seqlens.const_data_ptr<int64_t>() : nullptr};
}

// Rows of an output as TokenShape::new_tokens makes it.
template <class T>
Rows<T> output_rows(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.dim() == 2 ? x.stride(0) : 0};
}

template <class value_t>
TdLambdaInputs<value_t> device_inputs(const TdLambdaArguments& in) {
  using acc_t = accumulate_t<value_t>;
  return {
      device_sequences(in.shape), device_rows<value_t>(in.values), data_or_null<acc_t>(in.terminal_rewards),
      device_rows_or_null<uint8_t>(in.mask), device_rows_or_null<acc_t>(in.rewards)};
}

}  // namespace lambda_return::cuda
