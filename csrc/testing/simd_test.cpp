// The vectorised CPU kernels of every instruction set against the recurrences of csrc/kernels, token by token.
//
// With LAMBDA_RETURN_TEST_HALVES it checks, on a processor with AVX2, the 16-lane kernels compiled for AVX2 alone,
// every vector in two halves: the same source, lane layout and roundings as on AVX-512, so that they are tested where
// that is missing.
#include "cpu/simd/instruction_set.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/categorical_value_loss.h"
#include "kernels/lambda_return.h"
#include "kernels/lambda_value_loss.h"
#include "kernels/masked_mse.h"

#if defined(__x86_64__) && defined(LAMBDA_RETURN_TEST_HALVES)
#pragma GCC diagnostic ignored "-Wpsabi"  // as in portable.cpp
#define LAMBDA_RETURN_TARGET "avx2,fma,f16c"
#define LAMBDA_RETURN_LANES 16
#define LAMBDA_RETURN_AVX512 0
#include "cpu/simd/x86_kernels.h"
#endif

using namespace lambda_return;
using namespace lambda_return::cpu;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
int failures = 0;

// Values of the kernels' dtypes from and to float64, one at a time and without their vector code.
double to_double(double x) { return x; }
double to_double(float x) { return x; }
double to_double(bfloat16_bits x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
double to_double(float16_bits x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? kNaN : std::numeric_limits<double>::infinity())
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
template <class scalar_t>
scalar_t random_value(std::mt19937& random) {
  if constexpr (sizeof(scalar_t) >= 4) {
    return static_cast<scalar_t>(std::normal_distribution<double>()(random));
  } else {  // sign, an exponent around that of 1, mantissa
    const int mantissa_bits = std::is_same_v<scalar_t, float16_bits> ? 10 : 7;
    const int one = std::is_same_v<scalar_t, float16_bits> ? 15 : 127;
    const uint32_t exponent = one - 3 + random() % 4, mantissa = random() % (1u << mantissa_bits);
    return {static_cast<uint16_t>((random() & 1) << 15 | exponent << mantissa_bits | mantissa)};
  }
}
template <class scalar_t>
scalar_t not_a_number() {
  if constexpr (sizeof(scalar_t) >= 4) {
    return static_cast<scalar_t>(kNaN);
  } else {
    return {0x7fff};
  }
}

// Half a unit in the last place of the dtype, relative.
template <class scalar_t>
constexpr double kRounding = std::is_same_v<scalar_t, double>          ? 0
                             : std::is_same_v<scalar_t, float>         ? 0
                             : std::is_same_v<scalar_t, bfloat16_bits> ? 0x1p-8
                                                                       : 0x1p-11;

template <class scalar_t>
void check_kernels(const char* set, const char* dtype, const RowKernels<scalar_t>& kernels) {
  using acc_t = accumulate_t<scalar_t>;
  // A return is a chain of at most T roundings whose weights fall like (gamma lam)^n, and lam = 1 has no additions.
  const double unit = std::numeric_limits<acc_t>::epsilon();
  std::mt19937 random(7);
  for (const int64_t T : {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200, 1000, 4099}) {
    for (const double density : {0.0, 0.1, 0.5, 0.95, 1.0}) {
      for (const double lam : {0.0, 0.5, 0.95, 1.0}) {
        for (const double gamma : {1.0, 0.97, 0.0}) {
          std::vector<scalar_t> values(T), grads(T), out(T), gradient(T), adjoint(T);
          std::vector<uint8_t> mask(T), attention(T);
          std::vector<double> v(T), g(T), expected(T), expected_adjoint(T), expected_gradient(T);
          for (int64_t t = 0; t < T; ++t) {
            mask[t] = std::bernoulli_distribution(density)(random) ? 1 + random() % 255 : 0;
            attention[t] = random() % 5 ? 1 + random() % 255 : 0;
            values[t] = mask[t] ? random_value<scalar_t>(random) : not_a_number<scalar_t>();
            grads[t] = mask[t] ? random_value<scalar_t>(random) : not_a_number<scalar_t>();
            v[t] = to_double(values[t]);
            g[t] = to_double(grads[t]);
          }
          const auto narrow = Discount<acc_t>::from(gamma, lam);
          const Discount<double> wide{narrow.value, narrow.carry};
          const auto constants = kernels.constants(narrow, static_cast<Prefetch>(T % 3));
          const AffineRule<acc_t> rule(narrow);
          const acc_t reward = acc_t(0.7), scale = acc_t(0.3);
          double worst = 0;
          const auto compare = [&](double got, double want, double rounding) {
            const double error = std::abs(got - want) - rounding * std::abs(want) * 1.01 - (rounding > 0 ? 0x1p-24 : 0);
            worst = error <= worst ? worst : error;  // a NaN stays
          };

          const auto map = kernels.lambda_return(constants, values.data(), mask.data(), T, reward, out.data());
          const auto alone = kernels.returns_map(constants, values.data(), mask.data(), T);
          bool same_map = std::memcmp(&map, &alone, sizeof map) == 0;
          lambda_return_row<double, double>(v.data(), mask.data(), T, reward, wide, expected.data());
          for (int64_t t = 0; t < T; ++t) compare(to_double(out[t]), expected[t], kRounding<scalar_t>);
          double carry = reward;
          for (int64_t t = T - 1; t >= 0; --t) carry = mask[t] ? wide.step(v[t], carry) : carry;
          compare(rule.apply(map, reward), carry, 0);

          const auto back = kernels.lambda_return_backward(constants, grads.data(), mask.data(), T, 0, adjoint.data());
          const auto back_alone = kernels.adjoint_map(constants, grads.data(), mask.data(), T);
          same_map = same_map && std::memcmp(&back, &back_alone, sizeof back) == 0;
          const double grad_reward =
              lambda_return_backward_row<double, double>(g.data(), mask.data(), T, wide, expected_adjoint.data());
          for (int64_t t = 0; t < T; ++t) compare(to_double(adjoint[t]), expected_adjoint[t], kRounding<scalar_t>);
          compare(
              rule.apply(back, 0) / std::fmax(1, std::abs(grad_reward)),
              grad_reward / std::fmax(1, std::abs(grad_reward)), 0);

          for (const uint8_t* counted : {attention.data(), mask.data()}) {
            SquaredErrorLanes lanes;
            std::memset(static_cast<void*>(&lanes), 0xff, sizeof lanes);
            const auto loss_map =
                kernels.lambda_value_loss(constants, values.data(), counted, mask.data(), T, reward, &lanes);
            const SquaredError error = lanes.total();
            const SquaredError want =
                lambda_value_loss_row<double, double>(v.data(), counted, mask.data(), T, reward, wide);
            compare(error.sum / std::fmax(1, want.sum), want.sum / std::fmax(1, want.sum), 0);
            compare(error.num_tokens, want.num_tokens, 0);
            const auto gradient_map = kernels.lambda_value_loss_backward(
                constants, values.data(), counted, mask.data(), T, reward, scale, gradient.data());
            same_map = same_map && std::memcmp(&map, &loss_map, sizeof map) == 0 &&
                       std::memcmp(&map, &gradient_map, sizeof map) == 0;
            lambda_value_loss_backward_row<double, double>(
                v.data(), counted, mask.data(), T, reward, wide, scale, expected_gradient.data());
            for (int64_t t = 0; t < T; ++t) compare(to_double(gradient[t]), expected_gradient[t], kRounding<scalar_t>);
          }
          const auto check_mse = [&](const auto& targets, auto forward, auto backward) {
            SquaredErrorLanes lanes;
            std::memset(static_cast<void*>(&lanes), 0xff, sizeof lanes);
            forward(values.data(), targets.data(), mask.data(), T, &lanes);
            const SquaredError error = lanes.total();
            std::vector<double> to(T);
            for (int64_t t = 0; t < T; ++t) to[t] = to_double(targets[t]);
            const SquaredError want = masked_mse_row<double, double>(v.data(), to.data(), mask.data(), T);
            compare(error.sum / std::fmax(1, want.sum), want.sum / std::fmax(1, want.sum), 0);
            compare(error.num_tokens, want.num_tokens, 0);
            backward(values.data(), targets.data(), mask.data(), T, scale, gradient.data());
            masked_mse_backward_row<double, double>(
                v.data(), to.data(), mask.data(), T, scale, expected_gradient.data());
            for (int64_t t = 0; t < T; ++t) compare(to_double(gradient[t]), expected_gradient[t], kRounding<scalar_t>);
          };
          check_mse(grads, kernels.masked_mse, kernels.masked_mse_backward);
          check_mse(
              std::vector<acc_t>(g.begin(), g.end()), kernels.masked_mse_of_wide, kernels.masked_mse_backward_of_wide);

          // Sums of up to 20 values around 1 (lam 0.95) are the largest numbers in between.
          if (!(worst <= 64 * unit) || !same_map) {
            ++failures;
            std::printf(
                "FAILED: %s %s, T %lld, density %g, gamma %g, lam %g: error %g%s\n", set, dtype,
                static_cast<long long>(T), density, gamma, lam, worst, same_map ? "" : ", maps differ");
          }
        }
      }
    }
  }
}

// ---- the classification loss ----------------------------------------------------------------------------------------

template <class scalar_t>
scalar_t to_scalar(double x) {
  if constexpr (sizeof(scalar_t) >= 4) {
    return static_cast<scalar_t>(x);
  } else if constexpr (std::is_same_v<scalar_t, bfloat16_bits>) {  // by truncation
    const float f = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return {static_cast<uint16_t>(bits >> 16)};
  } else {  // an integer or a multiple of 1 / 8 of few bits
    int exponent;
    const double mantissa = std::frexp(std::abs(x), &exponent);
    const uint32_t bits = x == 0 ? 0 : (exponent + 14) << 10 | static_cast<uint32_t>(mantissa * 2048) % 1024;
    return {static_cast<uint16_t>((x < 0) << 15 | bits)};
  }
}

// The three kernels against the formulas of csrc/kernels in float64, with every number of logits around the lanes.
template <class scalar_t>
void check_logits(const char* set, const char* dtype, const RowKernels<scalar_t>& kernels) {
  using acc_t = accumulate_t<scalar_t>;
  const double unit = std::numeric_limits<acc_t>::epsilon();
  constexpr int64_t N = 37, kPadding = 3;  // tokens, and what stands between their logits and is not theirs
  std::mt19937 random(11);
  for (const int64_t K : {2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 51, 64, 101}) {
    for (const auto& [kind, sigma] :
         {std::pair(BinKind::kTwoHot, 1.0), {BinKind::kHlGauss, 0.75}, {BinKind::kHlGauss, 3.0}}) {
      const auto bins = Bins<acc_t>::of(static_cast<int64_t>(kind), K, -0.5, 1.5, sigma);
      const auto wide = Bins<double>::of(static_cast<int64_t>(kind), K, -0.5, 1.5, sigma);
      const int64_t stride = K + kPadding;
      std::vector<scalar_t> logits(N * stride, not_a_number<scalar_t>()), gradients(N * K);
      std::vector<acc_t> values(N), largest(N), log_sums(N), targets(N), losses(N), factors(N, acc_t(0.25));
      std::vector<uint8_t> mask(N), attention(N);
      for (int64_t t = 0; t < N; ++t) {
        mask[t] = random() % 4 ? 1 + random() % 255 : 0;
        attention[t] = random() % 4 ? 1 + random() % 255 : 0;
        targets[t] = acc_t(-0.75 + 2.5 * t / (N - 1));  // beyond the bins on both sides
        for (int64_t k = 0; k < K && mask[t]; ++k) {
          logits[t * stride + k] = to_scalar<scalar_t>((static_cast<int>(random() % 129) - 64) / 8.0);
        }
        if (mask[t] && t % 5 == 0) logits[t * stride + K - 1] = to_scalar<scalar_t>(40.0);
      }
      const LogitBlock<scalar_t> block{logits.data(), stride, K, N};
      kernels.project_logits(
          bins, block, mask.data(), attention.data(), values.data(), largest.data(), log_sums.data());
      kernels.cross_entropies(bins, block, targets.data(), largest.data(), log_sums.data(), losses.data());
      kernels.logit_gradients(bins, block, targets.data(), log_sums.data(), factors.data(), gradients.data());
      double worst = 0;
      const auto compare = [&](double got, double want, double allowed) {
        const double error = std::abs(got - want) / allowed;
        worst = error <= worst ? worst : error;  // a NaN stays
      };
      for (int64_t t = 0; t < N; ++t) {
        const bool counts = mask[t] && attention[t];
        std::vector<double> x(K), q(K);
        double most = -INFINITY, sum = 0, index = 0, expected = 0;
        for (int64_t k = 0; k < K; ++k) {
          x[k] = to_double(logits[t * stride + k]);
          most = std::fmax(most, x[k]);
        }
        for (int64_t k = 0; k < K; ++k) {
          sum += std::exp(x[k] - most);
          index += k * std::exp(x[k] - most);
        }
        compare(values[t], mask[t] ? wide.value(index / sum) : 0, 8 * unit);
        compare(log_sums[t] == not_counted<acc_t>(), !counts, 0.5);
        // In units of the largest difference of logits; a target's place in bins is only exact to K roundings.
        wide.for_weights(wide.target(targets[t]), [&](int64_t k, double weight) { q[k] = weight; });
        for (int64_t k = 0; k < K && counts; ++k) {
          expected += q[k] * (x[k] - most);
        }
        const double exact = (4 + K) * unit;
        compare(losses[t], counts ? std::log(sum) - expected : 0, 64 * exact);
        for (int64_t k = 0; k < K; ++k) {
          const double want = counts ? 0.25 * (std::exp(x[k] - most) / sum - q[k]) : 0;
          compare(
              to_double(gradients[t * K + k]), want,
              exact + kRounding<scalar_t> * std::abs(want) * 1.01 + 0x1p-25 * (kRounding<scalar_t> > 0));
        }
      }
      if (!(worst <= 1)) {
        ++failures;
        std::printf(
            "FAILED: %s %s, %lld logits, kind %d: %g times the error allowed\n", set, dtype, static_cast<long long>(K),
            static_cast<int>(kind), worst);
      }
    }
  }
}

// The exponential and the Gaussian's tails, each of which a gradient or a loss is made to consist of alone: relative
// errors in units of epsilon.
template <class acc_t>
void check_elementary(const char* set, const char* dtype, const RowKernels<acc_t>& kernels) {
  const double unit = std::numeric_limits<acc_t>::epsilon(), least = sizeof(acc_t) == 8 ? -708 : -87;
  double of_exp = 0, of_tail = 0;
  constexpr int64_t K = 64;
  {  // softmax - q where q is 0, the largest logit and the logarithm of the sum are said to be 0
    const auto bins = Bins<acc_t>::of(static_cast<int64_t>(BinKind::kTwoHot), K, 0, 1, 1);
    std::vector<acc_t> logits(K), gradients(K);
    const acc_t target = 0, log_sum = 0, factor = 1;
    for (int64_t i = 0; i < 1 << 12; ++i) {
      for (int64_t k = 2; k < K; ++k) logits[k] = static_cast<acc_t>(least * (i * (K - 2) + k) / (K << 12));
      kernels.logit_gradients(bins, {logits.data(), K, K, 1}, &target, &log_sum, &factor, gradients.data());
      for (int64_t k = 2; k < K; ++k) {
        const double want = std::exp(static_cast<double>(logits[k]));
        of_exp = std::fmax(of_exp, std::abs(gradients[k] - want) / (want * unit));
      }
    }
  }
  // Two bins, the Gaussian around the middle of the first: the share of the second is the tail from 1/2 width on, less
  // what is beyond 3/2. Of a wide Gaussian both are large and their difference is not, so the error is said of the
  // tail.
  const acc_t largest = 0, log_sum = 0;
  const double reach = sizeof(acc_t) == 8 ? 9 : 6;
  for (int i = 1; i <= 1 << 14; ++i) {
    const double z = reach * i / (1 << 14), sigma = 0.5 / z;  // the edge, in standard deviations
    const auto bins = Bins<acc_t>::of(static_cast<int64_t>(BinKind::kHlGauss), 2, 0, 2, sigma);
    const acc_t target = acc_t(0.5), logits[] = {0, -1};
    acc_t loss;
    kernels.cross_entropies(bins, {logits, 2, 2, 1}, &target, &largest, &log_sum, &loss);
    const double from = 0.5 * bins.sharpness, tail = std::erfc(from), beyond = std::erfc(3 * from);
    const double error = std::abs(loss * (2 - tail - beyond) - (tail - beyond));
    of_tail = std::fmax(of_tail, error / (tail * unit * (5 + 2.5 * from * from)));
  }
  std::printf("%s %s: exp to %.2f epsilon, erfc(z) to %.2f (5 + 2.5 z^2) epsilon\n", set, dtype, of_exp, of_tail);
  failures += !(of_exp <= 1) + !(of_tail <= 1);
}

// ---- the losses of a sigmoid ----------------------------------------------------------------------------------------

// The sigmoid and both cross-entropies against their definitions in long double: outputs of every magnitude down to the
// subnormal numbers, at every place in a vector, forward with its sums and backward, with what does not count a NaN.
template <class acc_t>
void check_cross_entropies(const char* set, const char* dtype, const TokenLoops<acc_t>& loops) {
  using Limits = std::numeric_limits<acc_t>;
  using wide_t = long double;
  const wide_t unit = Limits::epsilon(), least = 2 * wide_t(Limits::min());  // exp is 0 where it is below least
  const acc_t infinity = Limits::infinity();
  std::vector<acc_t> logits{0, infinity, -infinity, Limits::max(), Limits::lowest()}, probabilities{0, -acc_t(0), 1};
  for (acc_t x = Limits::denorm_min(); x < 1e4; x *= acc_t(1.0625) + Limits::denorm_min() / x) {
    for (const acc_t logit : {x, -x}) logits.push_back(logit);
    if (x < 1) probabilities.insert(probabilities.end(), {x, 1 - x});
  }
  for (acc_t x = -128; x < 128; x += acc_t(0.0078125)) logits.push_back(x + acc_t(0.001));
  for (acc_t x = 1; x > 0; x -= acc_t(0.0001)) probabilities.push_back(x);
  wide_t of_sigmoid = 0, of_logits = 0, of_values = 0;  // relative errors in epsilon
  const auto note = [](wide_t& worst, wide_t error) { worst = error <= worst ? worst : error; };  // a NaN stays
  bool sums_agree = true;
  for (const LossKind kind : {LossKind::kBceLogits, LossKind::kBce}) {
    const bool are_logits = kind == LossKind::kBceLogits;
    const std::vector<acc_t>& all = are_logits ? logits : probabilities;
    const TokenLoss<acc_t> loss{kind, 1, 1};
    for (const acc_t target : {acc_t(0), acc_t(1), acc_t(0.3), acc_t(-0.5)}) {
      for (size_t begin = 0, n = 1; begin < all.size(); begin += n, n = n % kBlock * 2 % 1000 + 1) {
        n = std::min(n, all.size() - begin);
        std::vector<acc_t> x(all.begin() + begin, all.begin() + begin + n), v = x, targets(n, target), losses(n), dx(n);
        std::vector<uint8_t> counts(n);
        for (size_t t = 0; t < n; ++t) {
          counts[t] = (begin + t) % 7 != 3;
          if (!counts[t]) x[t] = v[t] = targets[t] = acc_t(kNaN);
        }
        if (are_logits) loops.head_values(x.data(), n, v.data());
        LossBlock<acc_t> block{static_cast<int64_t>(n), x.data(), v.data(),     targets.data(), nullptr, nullptr,
                               counts.data(),           nullptr,  losses.data()};
        TokenSums sums;
        loops.token_losses(loss, block, &sums);
        block.losses = nullptr;
        block.derivatives = dx.data();
        loops.token_losses(loss, block, nullptr);
        double sum = 0;
        for (size_t t = 0; t < n; ++t) {
          sum += losses[t];
          if (!counts[t]) {
            note(of_logits, losses[t] == 0 && dx[t] == 0 ? 0 : kNaN);
            continue;
          }
          const wide_t at = x[t], g = target;
          if (!are_logits) {
            const wide_t log_v = std::fmax(std::log(at), wide_t(-100)), log_rest = std::fmax(log1p(-at), wide_t(-100));
            const wide_t weight = std::abs(g * log_v) + std::abs((1 - g) * log_rest);
            note(of_values, std::abs(losses[t] + g * log_v + (1 - g) * log_rest) / (weight * unit + least));
            const wide_t slope = (at - g) / std::fmax(at * (1 - at), wide_t(1e-12));
            note(of_values, std::abs(dx[t] - slope) / (std::abs(slope) * unit + least));
            continue;
          }
          const wide_t z = std::exp(-std::abs(at)), value = (at < 0 ? z : 1) / (1 + z);
          note(of_sigmoid, std::abs(v[t] - value) / (value * unit + least));
          note(of_logits, std::abs(dx[t] - (value - g)) / ((value + std::abs(g)) * unit + least));
          if (std::isinf(x[t]) || std::abs(x[t]) > Limits::max() / 2) {  // inf, or the NaN of inf - inf or of inf * 0
            const acc_t want = (x[t] > 0 ? x[t] : acc_t(0)) - x[t] * target;
            note(of_logits, losses[t] == want || (want != want && losses[t] != losses[t]) ? 0 : kNaN);
            continue;
          }
          const wide_t most = at > 0 ? at : 0, exact = most - at * g + log1p(z);
          // Where the target is 0 or 1 nothing cancels but what is exact.
          const bool is_label = target == 0 || target == 1;
          const wide_t weight = is_label ? exact : most + std::abs(at * g) + log1p(z);
          note(of_logits, std::abs(losses[t] - exact) / (weight * unit + least));
        }
        const bool same = std::abs(sums.loss - sum) <= 1e-12 * std::abs(sum) || !(std::abs(sum) <= Limits::max() / 2);
        sums_agree = sums_agree && same;
      }
    }
  }
  std::printf(
      "%s %s: sigmoid to %.2Lf epsilon, cross-entropy of logits to %.2Lf, of probabilities to %.2Lf\n", set, dtype,
      of_sigmoid, of_logits, of_values);
  failures += !(of_sigmoid <= 2) + !(of_logits <= 2.5) + !(of_values <= 2.5) + !sums_agree;
}

// ---- the regression losses ------------------------------------------------------------------------------------------

// Against TokenLoss itself, on a grid on which nothing is rounded and which ties and changes of just the clip range are
// on: forward and backward in one call, at every place in a vector, NaN where nothing counts, NaN and infinity also
// where it does.
template <class acc_t>
void check_regression_losses(const char* set, const char* dtype, const TokenLoops<acc_t>& loops) {
  const acc_t infinity = std::numeric_limits<acc_t>::infinity(), nan = acc_t(kNaN);
  const auto same = [](double got, double want) { return got == want || (got != got && want != want); };
  std::mt19937 generator(1);
  const auto grid = [&](int64_t n, bool with_specials) {
    std::vector<acc_t> x(n);
    for (acc_t& at : x) {
      const uint32_t random = generator();
      at = acc_t(static_cast<int>(random % 65) - 32) / 16;
      if (with_specials && random % 41 == 0) at = random % 3 == 0 ? nan : random % 3 == 1 ? infinity : -infinity;
    }
    return x;
  };
  std::vector<int64_t> lengths{1023, 1024};
  for (int64_t n = 1; n <= 40; ++n) lengths.push_back(n);
  int64_t wrong = 0, tokens_clipped = 0;
  for (const LossKind kind : {LossKind::kMse, LossKind::kHuber, LossKind::kSmoothL1}) {
    for (int form = 0; form < 16; ++form) {
      const bool clips = form & 1, with_rewards = form & 2, by_token = form & 4, with_specials = form & 8;
      for (const int64_t n : lengths) {
        auto values = grid(n, with_specials), carries = grid(n, with_specials);
        const auto rewards = grid(n, false), old_values = grid(n, with_specials), factors = grid(n, false);
        std::vector<uint8_t> counts(n);
        for (int64_t t = 0; t < n; ++t) {
          counts[t] = generator() % 3 != 0;
          if (!counts[t]) values[t] = carries[t] = nan;
        }
        const TokenLoss<acc_t> loss{kind, acc_t(0.5), acc_t(0.75)};
        std::vector<acc_t> losses(n), derivatives(n);
        LossBlock<acc_t> block{n,       values.data(), values.data(),      carries.data(), nullptr,
                               nullptr, counts.data(), derivatives.data(), losses.data()};
        if (with_rewards) block.rewards = rewards.data();
        if (clips) block.old_values = old_values.data();
        if (by_token) block.factors = factors.data();
        block.factor = acc_t(0.25);
        TokenSums sums, expected;
        loops.token_losses(loss, block, &sums);
        for (int64_t t = 0; t < n; ++t) {
          if (!counts[t]) {
            wrong += losses[t] != 0 || derivatives[t] != 0;
            continue;
          }
          const acc_t target = carries[t] + (with_rewards ? rewards[t] : acc_t(0)), v = values[t];
          const TokenLossResult<acc_t> want = clips ? loss.clipped(v, old_values[t], target) : loss(v, v, target);
          wrong += !same(losses[t], want.loss);
          wrong += !same(derivatives[t], want.derivative * (by_token ? factors[t] : acc_t(0.25)));
          const double g = target, e = target - v;
          expected.add({want.loss, 1, g, g * g, e, e * e, want.clipped ? 1.0 : 0.0});
        }
        wrong += !same(sums.loss, expected.loss) || sums.tokens != expected.tokens || sums.clipped != expected.clipped;
        wrong += !same(sums.returns, expected.returns) || !same(sums.squared_returns, expected.squared_returns);
        wrong += !same(sums.errors, expected.errors) || !same(sums.squared_errors, expected.squared_errors);
        tokens_clipped += static_cast<int64_t>(sums.clipped);
      }
    }
  }
  if (wrong != 0) std::printf("%s %s: %lld regression losses are wrong\n", set, dtype, static_cast<long long>(wrong));
  failures += wrong != 0 || tokens_clipped == 0;
}

void check_set(const InstructionSet& set) {
  check_regression_losses(set.name, "float64", set.double_loops);
  check_regression_losses(set.name, "float32", set.float_loops);
  check_cross_entropies(set.name, "float64", set.double_loops);
  check_cross_entropies(set.name, "float32", set.float_loops);
  check_logits(set.name, "float64", set.float64);
  check_logits(set.name, "float32", set.float32);
  check_logits(set.name, "bfloat16", set.bfloat16);
  check_logits(set.name, "float16", set.float16);
  check_elementary(set.name, "float64", set.float64);
  check_elementary(set.name, "float32", set.float32);
  check_kernels(set.name, "float64", set.float64);
  check_kernels(set.name, "float32", set.float32);
  check_kernels(set.name, "bfloat16", set.bfloat16);
  check_kernels(set.name, "float16", set.float16);
  std::printf("%s: checked\n", set.name);
}

}  // namespace

int main() {
#if !defined(LAMBDA_RETURN_TEST_HALVES)
  for (const InstructionSet* set : {portable(), avx2(), avx512()}) {
    if (set != nullptr) check_set(*set);
  }
#elif defined(__x86_64__)
  if (avx2() != nullptr) {
    static constexpr InstructionSet halves = instruction_set_named("avx512 in halves");
    check_set(halves);
  }
#endif
  return failures != 0;
}
