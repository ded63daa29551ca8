// Tests of the torch-free kernels against the definitions, written over the list of valid positions.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "kernels/eos_mask.h"
#include "kernels/lambda_return.h"
#include "kernels/lambda_value_loss.h"
#include "kernels/masked_mse.h"

using namespace lambda_return;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

void check(bool ok, const char* what, int64_t T, double gamma, double lam) {
  if (!ok) {
    ++failures;
    std::printf("FAILED: %s (T %lld, gamma %g, lam %g)\n", what, static_cast<long long>(T), gamma, lam);
  }
}

// |a - b| within tolerance of the larger one's scale; equal infinities are close, NaN is close to nothing.
bool close(double a, double b, double tolerance) {
  return a == b || std::abs(a - b) <= tolerance * std::fmax(1.0, std::fmax(std::abs(a), std::abs(b)));
}

template <class scalar_t>
struct Row {
  std::vector<scalar_t> values;
  std::vector<uint8_t> attention, mask;
  accumulate_t<scalar_t> reward;

  // A row whose valid positions have density `density`; every value that must not be used is NaN.
  Row(int64_t T, double density, std::mt19937& random) : values(T), attention(T), mask(T) {
    std::normal_distribution<double> normal;
    std::bernoulli_distribution valid(density), attended(0.8);
    for (int64_t t = 0; t < T; ++t) {
      mask[t] = valid(random) ? 1 + t % 255 : 0;  // any nonzero byte is valid
      attention[t] = attended(random);
      values[t] = mask[t] ? static_cast<scalar_t>(normal(random)) : static_cast<scalar_t>(kNaN);
    }
    reward = static_cast<accumulate_t<scalar_t>>(normal(random));
  }

  int64_t size() const { return static_cast<int64_t>(values.size()); }

  std::vector<double> expected_returns(double gamma, double lam) const {
    std::vector<double> returns(values.size(), 0.0);
    int64_t next = -1;
    for (int64_t t = size() - 1; t >= 0; --t) {
      if (!mask[t]) continue;
      returns[t] = next < 0 ? static_cast<double>(reward)
                            : gamma * ((1 - lam) * static_cast<double>(values[next]) + lam * returns[next]);
      next = t;
    }
    return returns;
  }
};

template <class scalar_t>
void test_row(int64_t T, double density, double gamma, double lam, std::mt19937& random) {
  using acc_t = accumulate_t<scalar_t>;
  const double tolerance = std::is_same_v<scalar_t, double> ? 1e-12 : 1e-4;
  const Row<scalar_t> row(T, density, random);
  const auto discount = Discount<acc_t>::from(gamma, lam);
  const std::vector<double> expected = row.expected_returns(gamma, lam);

  std::vector<scalar_t> returns(T, scalar_t(-7));
  lambda_return_row(row.values.data(), row.mask.data(), T, row.reward, discount, returns.data());
  bool ok = true;
  for (int64_t t = 0; t < T; ++t) ok = ok && close(returns[t], expected[t], tolerance);
  check(ok, "lambda_return", T, gamma, lam);

  // Forward and adjoint agree: the map (V, R) -> G is linear, so <g, G> = <dV, V> + dR R.
  std::vector<scalar_t> grad_returns(T, scalar_t(kNaN)), grad_values(T, scalar_t(-7));
  for (int64_t t = 0; t < T; ++t) {
    if (row.mask[t]) grad_returns[t] = scalar_t(std::sin(1.0 + static_cast<double>(t)));
  }
  const acc_t grad_reward =
      lambda_return_backward_row(grad_returns.data(), row.mask.data(), T, discount, grad_values.data());
  double left = 0, right = static_cast<double>(grad_reward) * row.reward;
  bool masked_zero = true;
  for (int64_t t = 0; t < T; ++t) {
    if (row.mask[t]) {
      left += static_cast<double>(grad_returns[t]) * expected[t];
      right += static_cast<double>(grad_values[t]) * row.values[t];
    } else {
      masked_zero = masked_zero && grad_values[t] == scalar_t(0);
    }
  }
  check(close(left, right, 10 * tolerance), "lambda_return_backward is the adjoint", T, gamma, lam);
  check(masked_zero, "lambda_return_backward is 0 where masked", T, gamma, lam);

  // Fused loss against the same loss from finished targets, forward and backward.
  double sum = 0;
  int64_t count = 0;
  std::vector<uint8_t> both(T);
  std::vector<acc_t> targets(T);
  for (int64_t t = 0; t < T; ++t) {
    both[t] = row.mask[t] && row.attention[t];
    targets[t] = static_cast<acc_t>(expected[t]);
    if (both[t]) {
      sum += (row.values[t] - expected[t]) * (row.values[t] - expected[t]);
      ++count;
    }
  }
  const SquaredError fused =
      lambda_value_loss_row(row.values.data(), row.attention.data(), row.mask.data(), T, row.reward, discount);
  check(fused.num_tokens == count && close(fused.sum, sum, 10 * tolerance), "lambda_value_loss", T, gamma, lam);
  const SquaredError separate = masked_mse_row(row.values.data(), targets.data(), both.data(), T);
  check(separate.num_tokens == count && close(separate.sum, sum, 10 * tolerance), "masked_mse", T, gamma, lam);
  check(count > 0 || (fused.mean() == 0 && separate.mean() == 0), "no token gives 0", T, gamma, lam);

  const acc_t scale = mean_squared_error_scale(acc_t(3), count);
  std::vector<scalar_t> fused_grad(T, scalar_t(-7)), separate_grad(T, scalar_t(-7));
  lambda_value_loss_backward_row(
      row.values.data(), row.attention.data(), row.mask.data(), T, row.reward, discount, scale, fused_grad.data());
  masked_mse_backward_row(row.values.data(), targets.data(), both.data(), T, scale, separate_grad.data());
  ok = true;
  for (int64_t t = 0; t < T; ++t) {
    const double gradient = both[t] ? 3 * 2 * (row.values[t] - expected[t]) / static_cast<double>(count) : 0.0;
    ok = ok && close(fused_grad[t], gradient, 10 * tolerance) && close(separate_grad[t], gradient, 10 * tolerance);
  }
  check(ok, "loss gradients", T, gamma, lam);

  int64_t last = -1;
  for (int64_t t = 0; t < T; ++t) {
    if (row.mask[t]) last = t;
  }
  check(last_valid_position(row.mask.data(), T) == last, "last_valid_position", T, gamma, lam);
}

// A term with coefficient 0 is left out, so Inf does not turn into NaN.
void test_left_out_terms() {
  const std::vector<double> values{1.0, kInf, 2.0};
  const std::vector<uint8_t> mask{1, 1, 1};
  std::vector<double> returns(3);
  lambda_return_row(values.data(), mask.data(), 3, 0.5, Discount<double>::from(1.0, 1.0), returns.data());
  check(returns == std::vector<double>({0.5, 0.5, 0.5}), "Monte-Carlo does not read V", 3, 1, 1);
  lambda_return_row(values.data(), mask.data(), 3, kInf, Discount<double>::from(1.0, 0.0), returns.data());
  check(returns == std::vector<double>({kInf, 2.0, kInf}), "lam 0 does not read G", 3, 1, 0);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int64_t T : {0, 1, 2, 3, 7, 16, 33, 100, 1000}) {
    for (double density : {0.0, 0.05, 0.5, 1.0}) {
      for (auto [gamma, lam] : {std::pair{1.0, 0.95}, {1.0, 1.0}, {1.0, 0.0}, {0.9, 0.5}, {0.0, 0.7}}) {
        test_row<float>(T, density, gamma, lam, random);
        test_row<double>(T, density, gamma, lam, random);
      }
    }
  }
  test_left_out_terms();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}
