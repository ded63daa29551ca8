// The arguments of categorical_value_loss and its backward, checked and laid out for the kernels. Nothing here is the
// CPU's own.
#pragma once

#include "kernels/categorical_value_loss.h"
#include "kernels/logit_rows.h"
#include "td_lambda_arguments.h"

namespace lambda_return {

struct Logits {
  Tensor logits;  // [B, T, K], or [total, K] packed; K logits next to one another
  bool packed;
  int64_t B, T, K;  // of packed logits, B is 1 and T the total

  Logits(const Tensor& logits_, bool packed_) : packed(packed_) {
    STD_TORCH_CHECK(
        logits_.dim() == (packed ? 2 : 3), "logits must be ", packed ? "[total, K] with cu_seqlens" : "[B, T, K]",
        ", got ", logits_.dim(), " dimensions");
    K = logits_.size(logits_.dim() - 1);
    STD_TORCH_CHECK(K >= 2, "logits must have K >= 2 logits a token, got ", K);
    logits = logits_.stride(logits_.dim() - 1) == 1 ? logits_ : torch::stable::contiguous(logits_);
    B = packed ? 1 : logits.size(0);
    T = logits.size(packed ? 0 : 1);
  }

  template <class T_>
  LogitRows<const T_> rows() const {
    return {
        static_cast<const T_*>(logits.const_data_ptr()), packed ? 0 : logits.stride(0), logits.stride(packed ? 0 : 1)};
  }
  // [B, T] or [total], in the accumulation dtype.
  Tensor new_tokens() const {
    const ScalarType acc = accumulate_dtype(logits);
    return packed ? torch::stable::new_empty(logits, {T}, acc) : torch::stable::new_empty(logits, {B, T}, acc);
  }
  // The shape of the logits, contiguous.
  Tensor new_logits() const {
    return packed ? torch::stable::new_empty(logits, {T, K}) : torch::stable::new_empty(logits, {B, T, K});
  }
};

inline void check_bins(int64_t kind, double low, double high, double sigma) {
  STD_TORCH_CHECK(kind >= 0 && kind <= int64_t(BinKind::kTwoHot), "kind must be a BinKind, got ", kind);
  STD_TORCH_CHECK(low < high, "low must be below high, got ", low, " and ", high);
  STD_TORCH_CHECK(sigma > 0, "sigma must be above 0, got ", sigma);
}

inline Reduction checked_reduction(int64_t reduction) {
  STD_TORCH_CHECK(
      reduction >= 0 && reduction <= int64_t(Reduction::kNone), "reduction must be a Reduction, got ", reduction);
  return static_cast<Reduction>(reduction);
}

// What the backward gets. log_sums says which tokens count.
struct CategoricalBackwardArguments {
  Logits in;
  TokenShape shape;  // of returns
  Reduction reduction;
  Tensor grad_loss;          // 0-dim, or of each token where there is no reduction
  Tensor scale;              // [B]
  Tensor returns, log_sums;  // [B, T] or [1, total]

  CategoricalBackwardArguments(
      const Tensor& grad_loss_, const Tensor& scale_, const Tensor& logits, const Tensor& returns_,
      const Tensor& log_sums_, const OptionalTensor& cu_seqlens, int64_t reduction_)
      : in(logits, cu_seqlens.has_value()),
        shape(returns_, "returns", cu_seqlens),
        reduction(checked_reduction(reduction_)) {
    const ScalarType acc = accumulate_dtype(logits);
    STD_TORCH_CHECK(returns_.scalar_type() == acc, "returns must have the accumulation dtype of logits");
    STD_TORCH_CHECK(
        shape.T == in.T && (shape.packed || shape.B == in.B), "returns must have the shape of logits without K");
    STD_TORCH_CHECK(returns_.device() == logits.device(), "returns must be on the device of logits");
    returns = shape.rows(returns_);
    log_sums = shape.values(log_sums_, "log_sums");
    scale = shape.per_sequence(scale_, "scale");
    if (reduction == Reduction::kNone) {
      grad_loss = shape.optional_accumulated(grad_loss_, "grad_loss");
    } else {
      check_scalar(grad_loss_, "grad_loss", logits);
      grad_loss = contiguous_as(grad_loss_, acc);
    }
  }
};

}  // namespace lambda_return
