// Masked squared error against targets computed elsewhere, one row, forward and backward.
//
//   loss = sum m (V - target)^2 / sum m,   dloss/dV = 2 m (V - target) / sum m.
#pragma once

#include "squared_error.h"

namespace lambda_return {

// values, targets, mask [T].
template <class scalar_t, class target_t>
LAMBDA_RETURN_HOST_DEVICE SquaredError
masked_mse_row(const scalar_t* values, const target_t* targets, const uint8_t* mask, int64_t T) {
  using acc_t = accumulate_t<scalar_t>;
  SquaredError error;
  for (int64_t t = 0; t < T; ++t) {
    if (mask[t] != 0) {
      error.add(static_cast<acc_t>(values[t]) - static_cast<acc_t>(targets[t]));
    }
  }
  return error;
}

// values, targets, mask, grad_values (written) [T].
template <class scalar_t, class target_t>
LAMBDA_RETURN_HOST_DEVICE void masked_mse_backward_row(
    const scalar_t* values, const target_t* targets, const uint8_t* mask, int64_t T, accumulate_t<scalar_t> scale,
    scalar_t* grad_values) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t t = 0; t < T; ++t) {
    const acc_t error = mask[t] != 0 ? static_cast<acc_t>(values[t]) - static_cast<acc_t>(targets[t]) : acc_t(0);
    grad_values[t] = static_cast<scalar_t>(scale * error);
  }
}

}  // namespace lambda_return
