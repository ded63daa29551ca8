// Rows of a [B, T] tensor over threads, and the reduction of their squared errors.
#pragma once

#include <algorithm>
#include <memory>
#include <tuple>

#include "../arguments.h"
#include "simd/instruction_set.h"

namespace lambda_return::cpu {

// Tokens below which one thread is faster than waking a second: some ten microseconds of work.
constexpr int64_t kTokensPerThread = 16384;

// The end of a row at which its tokens are begun.
enum class From { kRight, kLeft };

// Calls body(row) once for each of the B rows of T tokens. Rows do not depend on one another, so neither the number
// of threads nor the order of rows can change a bit of the result. A thread takes its rows in the direction of their
// tokens: memory then goes by without a jump at every row, after which the hardware would have to start prefetching
// anew.
template <class Body>
void parallel_rows(int64_t B, int64_t T, From from, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / std::max<int64_t>(1, T));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(from == From::kLeft ? i : begin + end - 1 - i);
    }
  });
}

// The squared errors of all stretches of a tensor, each of which a kernel writes.
class StretchErrors {
 public:
  explicit StretchErrors(int64_t stretches) : stretches_(stretches), errors_(new SquaredErrorLanes[stretches]) {}

  SquaredErrorLanes* of(int64_t stretch) const { return &errors_[stretch]; }

  // Added up in the order of the stretches, whatever the number of threads that made them.
  SquaredError sum() const {
    SquaredErrorLanes sum{};
    for (int64_t i = 0; i < stretches_; ++i) {
      sum.add(errors_[i]);
    }
    return sum.total();
  }

 private:
  int64_t stretches_;
  std::unique_ptr<SquaredErrorLanes[]> errors_;
};

// (loss, num_tokens): the mean in the accumulation dtype of values and the count in int64, both 0-dim.
inline std::tuple<Tensor, Tensor> mean_and_count(const SquaredError& error, const Tensor& values) {
  Tensor loss = new_tensor(values, {}, accumulate_dtype(values));
  Tensor num_tokens = new_tensor(values, {}, ScalarType::Long);
  if (loss.scalar_type() == ScalarType::Double) {
    *loss.mutable_data_ptr<double>() = error.mean();
  } else {
    *loss.mutable_data_ptr<float>() = static_cast<float>(error.mean());
  }
  *num_tokens.mutable_data_ptr<int64_t>() = error.num_tokens;
  return {loss, num_tokens};
}

// d loss / d V of a token that counts, divided by its error.
template <class acc_t>
acc_t gradient_scale(const LossGradientArguments& grad) {
  return mean_squared_error_scale(
      *static_cast<const acc_t*>(grad.grad_loss.const_data_ptr()), *grad.num_tokens.const_data_ptr<int64_t>());
}

}  // namespace lambda_return::cpu
