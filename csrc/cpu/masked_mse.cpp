#include "parallel_rows.h"

#include "../kernels/masked_mse.h"

namespace lambda_return::cpu {
namespace {

// The checked inputs of forward and backward, laid out for the kernels.
struct Inputs {
  int64_t B, T;
  Tensor values;   // [B, T]
  Tensor targets;  // [B, T], in the dtype of values or their accumulation dtype
  Tensor mask;     // [B, T], bytes

  Inputs(const Tensor& values_, const Tensor& targets_, const Tensor& mask_) {
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

  // Calls body(targets) with the rows of targets in their own type.
  template <class scalar_t, class Body>
  void with_target_rows(const Body& body) const {
    if (targets.scalar_type() == values.scalar_type()) {
      body(const_rows<scalar_t>(targets));
    } else {
      body(const_rows<accumulate_t<scalar_t>>(targets));
    }
  }
};

// values [B, T], targets [B, T], mask [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> masked_mse(const Tensor& values, const Tensor& targets, const Tensor& mask) {
  const Inputs in(values, targets, mask);
  SquaredError error;
  THO_DISPATCH_V2(values.scalar_type(), "masked_mse", AT_WRAP([&] {
    const auto v = const_rows<scalar_t>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    in.with_target_rows<scalar_t>([&](auto g) {
      error = sum_over_rows(in.B, in.T, [&](int64_t b) { return masked_mse_row(v[b], g[b], m[b], in.T); });
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return mean_and_count(error, values);
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor masked_mse_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& targets,
    const Tensor& mask) {
  const Inputs in(values, targets, mask);
  check_scalar(grad_loss, "grad_loss", values);
  check_scalar(num_tokens, "num_tokens", values);
  const Tensor grad_loss_acc = contiguous_as(grad_loss, accumulate_dtype(values));
  const Tensor num_tokens_long = contiguous_as(num_tokens, ScalarType::Long);
  Tensor grad_values = torch::stable::new_empty(values, {in.B, in.T});

  THO_DISPATCH_V2(values.scalar_type(), "masked_mse_backward", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto v = const_rows<scalar_t>(in.values);
    const auto m = const_rows<uint8_t>(in.mask);
    const auto dv = mutable_rows<scalar_t>(grad_values);
    const acc_t scale = mean_squared_error_scale(
        *static_cast<const acc_t*>(grad_loss_acc.const_data_ptr()), *num_tokens_long.const_data_ptr<int64_t>());
    in.with_target_rows<scalar_t>([&](auto g) {
      parallel_rows(in.B, in.T, [&](int64_t b) {
        masked_mse_backward_row(v[b], g[b], m[b], in.T, scale, dv[b]);
      });
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("masked_mse", TORCH_BOX(&masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&masked_mse_backward));
}

}  // namespace lambda_return::cpu
