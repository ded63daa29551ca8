// What the fused losses share: a sum of squared errors with its token count, and the gradient's scale.
#pragma once

#include "numeric.h"

namespace lambda_return {

// Sum of squared errors and number of tokens. float64, so that the sum over any number of tokens is exact far
// beyond the float32 the loss is returned in.
struct SquaredError {
  double sum = 0;
  int64_t num_tokens = 0;

  LAMBDA_RETURN_HOST_DEVICE void add(double error) {
    sum += error * error;
    ++num_tokens;
  }
  LAMBDA_RETURN_HOST_DEVICE void add(const SquaredError& other) {
    sum += other.sum;
    num_tokens += other.num_tokens;
  }
  // 0 where no token counts.
  LAMBDA_RETURN_HOST_DEVICE double mean() const {
    return num_tokens == 0 ? 0.0 : sum / static_cast<double>(num_tokens);
  }
};

// d mean / dV = mean_squared_error_scale * (V - target), for the tokens that count.
template <class acc_t>
LAMBDA_RETURN_HOST_DEVICE acc_t mean_squared_error_scale(acc_t grad_loss, int64_t num_tokens) {
  return num_tokens == 0 ? acc_t(0) : acc_t(2) * grad_loss / static_cast<acc_t>(num_tokens);
}

}  // namespace lambda_return
