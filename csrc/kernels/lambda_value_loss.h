// Masked squared error of values against their own lambda-returns, one row, forward and backward.
//
// With m = attention_mask * loss_mask:  loss = sum m (V - G)^2 / sum m,  dloss/dV = 2 m (V - G) / sum m.
// G is a constant (no gradient through it) and runs over loss_mask alone; attention_mask only weights the
// error. The backward computes G again instead of keeping it: reading V and the masks once more moves fewer
// bytes.
#pragma once

#include "lambda_return.h"
#include "squared_error.h"

namespace lambda_return {

// values, attention_mask, loss_mask [T].
template <class scalar_t, class acc_t>
LAMBDA_RETURN_HOST_DEVICE SquaredError lambda_value_loss_row(
    const scalar_t* values, const uint8_t* attention_mask, const uint8_t* loss_mask, int64_t T, acc_t terminal_reward,
    Discount<acc_t> discount) {
  SquaredError error;
  for_each_return(values, loss_mask, T, terminal_reward, discount, [&](int64_t t, bool valid, acc_t g) {
    if (valid && attention_mask[t] != 0) {
      error.add(static_cast<acc_t>(values[t]) - g);
    }
  });
  return error;
}

// values, attention_mask, loss_mask, grad_values (written) [T].
template <class scalar_t, class acc_t>
LAMBDA_RETURN_HOST_DEVICE void lambda_value_loss_backward_row(
    const scalar_t* values, const uint8_t* attention_mask, const uint8_t* loss_mask, int64_t T, acc_t terminal_reward,
    Discount<acc_t> discount, acc_t scale, scalar_t* grad_values) {
  for_each_return(values, loss_mask, T, terminal_reward, discount, [&](int64_t t, bool valid, acc_t g) {
    const bool counts = valid && attention_mask[t] != 0;
    grad_values[t] = static_cast<scalar_t>(counts ? scale * (static_cast<acc_t>(values[t]) - g) : acc_t(0));
  });
}

}  // namespace lambda_return
