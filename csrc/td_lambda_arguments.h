// The arguments of the general operators, checked and laid out for the kernels: what CPU and CUDA share.
//
// A padded matrix [B, T] and a packed one [total] are read alike: row b begins at a pointer and has a length.
#pragma once

#include <optional>

#include "checks.h"
#include "kernels/discount_rows.h"
#include "kernels/token_loss.h"

namespace lambda_return {

using OptionalTensor = std::optional<Tensor>;

// The shape that all per-token tensors of a call share: [B, T], or [total] in B sequences.
struct TokenShape {
  const Tensor& like;  // the values, or the gradient that comes in their place
  const char* name;    // of like
  bool packed;
  int64_t B, T;       // of a packed shape, T is the total
  Tensor cu_seqlens;  // [B + 1], int64; packed only

  TokenShape(const Tensor& like_, const char* name_, const OptionalTensor& cu_seqlens_)
      : like(like_), name(name_), packed(cu_seqlens_.has_value()) {
    if (packed) {
      const ScalarType dtype = cu_seqlens_->scalar_type();
      STD_TORCH_CHECK(like.dim() == 1, name, " must be [total] with cu_seqlens, got ", like.dim(), " dimensions");
      STD_TORCH_CHECK(
          cu_seqlens_->dim() == 1 && cu_seqlens_->numel() >= 1, "cu_seqlens must be [B + 1], got ",
          cu_seqlens_->numel(), " elements in ", cu_seqlens_->dim(), " dimensions");
      STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "cu_seqlens must be int32 or int64");
      STD_TORCH_CHECK(cu_seqlens_->device() == like.device(), "cu_seqlens must be on the device of ", name);
      cu_seqlens = contiguous_as(*cu_seqlens_, ScalarType::Long);
      B = cu_seqlens.numel() - 1;
      T = like.size(0);
    } else {
      check_matrix(like, name);
      B = like.size(0);
      T = like.size(1);
    }
  }

  // x has this shape and device.
  void check(const Tensor& x, const char* x_name) const {
    bool same = x.dim() == like.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
    STD_TORCH_CHECK(same, x_name, " must have the shape of ", name);
    STD_TORCH_CHECK(x.device() == like.device(), x_name, " must be on the device of ", name);
  }

  // x, with tokens of a row next to one another; [1, total] of a packed tensor.
  Tensor rows(const Tensor& x) const { return contiguous_rows(packed ? torch::stable::unsqueeze(x, 0) : x); }

  Tensor values(const Tensor& x, const char* x_name) const {
    check(x, x_name);
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), x_name, " must have the dtype of ", name);
    return rows(x);
  }
  // An absent tensor stays without storage: defined() is false.
  Tensor optional_values(const OptionalTensor& x, const char* x_name) const {
    return x ? values(*x, x_name) : Tensor();
  }
  Tensor optional_mask(const OptionalTensor& x, const char* x_name) const {
    if (!x) return Tensor();
    check(*x, x_name);
    return byte_mask(packed ? torch::stable::unsqueeze(*x, 0) : *x);
  }
  // In the accumulation dtype.
  Tensor optional_accumulated(const OptionalTensor& x, const char* x_name) const {
    if (!x) return Tensor();
    check(*x, x_name);
    const ScalarType dtype = accumulate_dtype(like);
    return rows(x->scalar_type() == dtype ? *x : cast(*x, dtype));
  }

  // One number a row, [B] or for all rows, 0-dim; float64.
  Tensor per_row(const Tensor& x, const char* x_name) const {
    STD_TORCH_CHECK(
        x.dim() == 0 || (x.dim() == 1 && x.size(0) == B), x_name, " must be 0-dim or [B] = [", B, "], got ", x.numel(),
        " elements in ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.device() == like.device(), x_name, " must be on the device of ", name);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, x_name, " must be float64");
    return torch::stable::contiguous(x);
  }
  Tensor per_sequence(const Tensor& x, const char* x_name) const {
    STD_TORCH_CHECK(
        x.dim() == 1 && x.size(0) == B, x_name, " must be [B] = [", B, "], got ", x.numel(), " elements in ", x.dim(),
        " dimensions");
    STD_TORCH_CHECK(x.device() == like.device(), x_name, " must be on the device of ", name);
    return contiguous_as(x, accumulate_dtype(like));
  }

  Tensor new_tokens(ScalarType dtype) const {
    return packed ? torch::stable::new_empty(like, {T}, dtype) : torch::stable::new_empty(like, {B, T}, dtype);
  }
  Tensor new_tokens() const { return new_tokens(like.scalar_type()); }
};

// A pointer into an optional tensor, null where it is absent.
template <class T>
const T* data_or_null(const Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

struct TdLambdaArguments {
  TokenShape shape;
  Tensor values;            // [B, T] or [1, total]
  Tensor terminal_rewards;  // [B]; undefined: the carry starts from 0
  Tensor mask;              // as values, bytes; undefined: all valid
  Tensor rewards;           // as values, in the accumulation dtype; undefined: none
  Tensor gamma, lam;        // 0-dim or [B]

  TdLambdaArguments(
      const Tensor& values_, const OptionalTensor& terminal_rewards_, const OptionalTensor& mask_,
      const OptionalTensor& rewards_, const OptionalTensor& cu_seqlens_, const Tensor& gamma_, const Tensor& lam_)
      : shape(values_, "values", cu_seqlens_),
        values(shape.rows(values_)),
        mask(shape.optional_mask(mask_, "mask")),
        rewards(shape.optional_accumulated(rewards_, "rewards")),
        gamma(shape.per_row(gamma_, "gamma")),
        lam(shape.per_row(lam_, "lam")) {
    if (terminal_rewards_) terminal_rewards = shape.per_sequence(*terminal_rewards_, "terminal_rewards");
  }
};

struct TdLambdaLossArguments : TdLambdaArguments {
  Tensor attention_mask;  // as values, bytes; undefined: the mask alone
  Tensor old_values;      // as values; undefined: not clipped
  LossKind kind;
  double delta, clip_range;
  Reduction reduction;

  TdLambdaLossArguments(
      const Tensor& values_, const Tensor& terminal_rewards_, const OptionalTensor& mask_,
      const OptionalTensor& attention_mask_, const OptionalTensor& rewards_, const OptionalTensor& old_values_,
      const OptionalTensor& cu_seqlens_, const Tensor& gamma_, const Tensor& lam_, int64_t kind_, double delta_,
      double clip_range_, int64_t reduction_)
      : TdLambdaArguments(values_, terminal_rewards_, mask_, rewards_, cu_seqlens_, gamma_, lam_),
        attention_mask(shape.optional_mask(attention_mask_, "attention_mask")),
        old_values(shape.optional_values(old_values_, "old_values")),
        kind(static_cast<LossKind>(kind_)),
        delta(delta_),
        clip_range(clip_range_),
        reduction(static_cast<Reduction>(reduction_)) {
    STD_TORCH_CHECK(kind_ >= 0 && kind_ <= int64_t(LossKind::kBceLogits), "kind must be a LossKind, got ", kind_);
    STD_TORCH_CHECK(
        reduction_ >= 0 && reduction_ <= int64_t(Reduction::kNone), "reduction must be a Reduction, got ", reduction_);
  }

  template <class acc_t>
  TokenLoss<acc_t> token_loss() const {
    return {kind, static_cast<acc_t>(delta), static_cast<acc_t>(clip_range)};
  }
};

}  // namespace lambda_return
