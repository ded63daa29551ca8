// The arguments of every operator, checked and laid out for the kernels: what the CPU and CUDA operators share.
//
// Matrices are [B, T] with rows contiguous in T, masks are bytes, rewards and scalars have the accumulation dtype.
#pragma once

#include "checks.h"

namespace lambda_return {

struct LambdaReturnArguments {
  int64_t B, T;
  Tensor values;            // [B, T]
  Tensor terminal_rewards;  // [B]
  Tensor mask;              // [B, T]

  LambdaReturnArguments(const Tensor& values_, const Tensor& terminal_rewards_, const Tensor& mask_) {
    check_matrix(values_, "values");
    check_same_matrix(mask_, "mask", values_, "values");
    check_rewards(terminal_rewards_, values_);
    B = values_.size(0);
    T = values_.size(1);
    values = contiguous_rows(values_);
    terminal_rewards = contiguous_as(terminal_rewards_, accumulate_dtype(values_));
    mask = byte_mask(mask_);
  }
};

struct LambdaReturnBackwardArguments {
  int64_t B, T;
  Tensor grad_returns;  // [B, T]
  Tensor mask;          // [B, T]

  LambdaReturnBackwardArguments(const Tensor& grad_returns_, const Tensor& mask_) {
    check_matrix(grad_returns_, "grad_returns");
    check_same_matrix(mask_, "mask", grad_returns_, "grad_returns");
    B = grad_returns_.size(0);
    T = grad_returns_.size(1);
    grad_returns = contiguous_rows(grad_returns_);
    mask = byte_mask(mask_);
  }
};

struct LambdaValueLossArguments {
  int64_t B, T;
  Tensor values;            // [B, T]
  Tensor terminal_rewards;  // [B]
  Tensor attention_mask;    // [B, T]
  Tensor loss_mask;         // [B, T]

  LambdaValueLossArguments(
      const Tensor& values_, const Tensor& terminal_rewards_, const Tensor& attention_mask_, const Tensor& loss_mask_) {
    check_matrix(values_, "values");
    check_same_matrix(attention_mask_, "attention_mask", values_, "values");
    check_same_matrix(loss_mask_, "loss_mask", values_, "values");
    check_rewards(terminal_rewards_, values_);
    B = values_.size(0);
    T = values_.size(1);
    values = contiguous_rows(values_);
    terminal_rewards = contiguous_as(terminal_rewards_, accumulate_dtype(values_));
    attention_mask = byte_mask(attention_mask_);
    loss_mask = byte_mask(loss_mask_);
  }
};

struct MaskedMseArguments {
  int64_t B, T;
  Tensor values;   // [B, T]
  Tensor targets;  // [B, T], in the dtype of values or their accumulation dtype
  Tensor mask;     // [B, T]

  MaskedMseArguments(const Tensor& values_, const Tensor& targets_, const Tensor& mask_) {
    check_matrix(values_, "values");
    check_same_matrix(targets_, "targets", values_, "values");
    check_same_matrix(mask_, "mask", values_, "values");
    STD_TORCH_CHECK(
        targets_.scalar_type() == values_.scalar_type() || targets_.scalar_type() == accumulate_dtype(values_),
        "targets must have the dtype of values or its accumulation dtype");
    B = values_.size(0);
    T = values_.size(1);
    values = contiguous_rows(values_);
    targets = contiguous_rows(targets_);
    mask = byte_mask(mask_);
  }

  bool targets_as_values() const { return targets.scalar_type() == values.scalar_type(); }
};

// What the backward of a loss gets besides the inputs of its forward.
struct LossGradientArguments {
  Tensor grad_loss;   // 0-dim
  Tensor num_tokens;  // 0-dim, int64

  LossGradientArguments(const Tensor& grad_loss_, const Tensor& num_tokens_, const Tensor& values) {
    check_scalar(grad_loss_, "grad_loss", values);
    check_scalar(num_tokens_, "num_tokens", values);
    grad_loss = contiguous_as(grad_loss_, accumulate_dtype(values));
    num_tokens = contiguous_as(num_tokens_, ScalarType::Long);
  }
};

}  // namespace lambda_return
