// The vectorised kernels of the CPU and the choice among instruction sets, torch-free.
//
// portable.cpp, avx2.cpp and avx512.cpp compile the same headers (row_kernels.h and those that it includes) for 4, 8
// and 16 float32 lanes. The first time one is asked for, the widest that the processor has is chosen for good.
#pragma once

#include <cstdint>

#include "../../kernels/categorical_value_loss.h"
#include "../../kernels/scan.h"
#include "../../kernels/squared_error.h"
#include "../../kernels/token_loss.h"

#define LAMBDA_RETURN_INLINE_LAMBDA __attribute__((always_inline))
#define LAMBDA_RETURN_INLINE inline LAMBDA_RETURN_INLINE_LAMBDA

namespace lambda_return::cpu {

// 16-bit floats as they lie in memory.
struct bfloat16_bits {
  uint16_t bits;
};
struct float16_bits {
  uint16_t bits;
};

// What a scan asks for ahead of itself: nothing, for data in a cache; what is left of its stretch; or also what lies
// behind that, for rows of which each begins where another one ends.
enum class Prefetch { kNone, kStretch, kBeyond };

// A discount with the powers of c = gamma lam that a tile needs, laid out for one instruction set.
template <class acc_t>
struct ScanConstants {
  acc_t value, carry;  // gamma (1 - lam), gamma lam
  acc_t power[4];      // c^4, c^8, c^16, c^32
  acc_t tile;          // c^(tokens of a tile)
  Prefetch prefetch;
  alignas(64) acc_t carry_in_reverse[16];
  alignas(64) acc_t carry_in_forward[16];
};

// Tokens that the general operators take at a time, so that what they compute of them stays in the first-level cache.
constexpr int64_t kBlock = 1024;

// At most kBlock tokens of a row, K logits each: those of token t begin at logits + t * stride.
template <class scalar_t>
struct LogitBlock {
  const scalar_t* logits;
  int64_t stride, K, length;
};

// A SquaredError whose lanes are not added up yet: at the end of every row that would hold up the next.
struct SquaredErrorLanes {
  static constexpr int kLanes = 8;
  double sums[kLanes];  // where vectors are shorter, the last ones are 0
  int64_t num_tokens;

  void add(const SquaredErrorLanes& other) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += other.sums[lane];
    }
    num_tokens += other.num_tokens;
  }
  SquaredError total() const {
    double sum = 0;
    for (const double lane : sums) {
      sum += lane;
    }
    return {sum, num_tokens};
  }
};

// The kernels of one dtype on one stretch of a row, [T] all. They return the stretch's map from the carry that enters
// it to the carry that leaves it; with that map, and not with a carry of their own, stretches are chained, so that the
// bits of a row do not depend on who computes its stretches in which order.
template <class scalar_t>
struct RowKernels {
  using acc_t = accumulate_t<scalar_t>;
  using Constants = ScanConstants<acc_t>;
  using Map = AffineMap<acc_t>;

  Constants (*constants)(Discount<acc_t> discount, Prefetch prefetch);
  // The map alone, of returns (right to left) and of their adjoint (left to right).
  Map (*returns_map)(const Constants&, const scalar_t* values, const uint8_t* mask, int64_t T);
  Map (*adjoint_map)(const Constants&, const scalar_t* grad_returns, const uint8_t* mask, int64_t T);

  Map (*lambda_return)(
      const Constants&, const scalar_t* values, const uint8_t* mask, int64_t T, acc_t carry, scalar_t* returns);
  Map (*lambda_return_backward)(
      const Constants&, const scalar_t* grad_returns, const uint8_t* mask, int64_t T, acc_t carry,
      scalar_t* grad_values);
  Map (*lambda_value_loss)(
      const Constants&, const scalar_t* values, const uint8_t* attention_mask, const uint8_t* loss_mask, int64_t T,
      acc_t carry, SquaredErrorLanes* error);
  Map (*lambda_value_loss_backward)(
      const Constants&, const scalar_t* values, const uint8_t* attention_mask, const uint8_t* loss_mask, int64_t T,
      acc_t carry, acc_t scale, scalar_t* grad_values);

  // The squared error against targets of the same dtype or of the accumulation dtype, and its gradient.
  void (*masked_mse)(
      const scalar_t* values, const scalar_t* targets, const uint8_t* mask, int64_t T, SquaredErrorLanes* error);
  void (*masked_mse_of_wide)(
      const scalar_t* values, const acc_t* targets, const uint8_t* mask, int64_t T, SquaredErrorLanes* error);
  void (*masked_mse_backward)(
      const scalar_t* values, const scalar_t* targets, const uint8_t* mask, int64_t T, acc_t scale,
      scalar_t* grad_values);
  void (*masked_mse_backward_of_wide)(
      const scalar_t* values, const acc_t* targets, const uint8_t* mask, int64_t T, acc_t scale, scalar_t* grad_values);

  // To the accumulation type and back.
  void (*widen)(const scalar_t* from, int64_t n, acc_t* to);
  void (*narrow)(const acc_t* from, int64_t n, scalar_t* to);

  // categorical_value_loss, all [length] but for the logits. What the logits say where mask is valid: values, and with
  // them largest and, where attention is valid too, log_sums; else V is 0 and log_sums not_counted(). Null masks: all.
  void (*project_logits)(
      const Bins<acc_t>& bins, const LogitBlock<scalar_t>& block, const uint8_t* mask, const uint8_t* attention,
      acc_t* values, acc_t* largest, acc_t* log_sums);
  // Where log_sums says that a token counts, its cross-entropy against its target, and 0 elsewhere.
  void (*cross_entropies)(
      const Bins<acc_t>& bins, const LogitBlock<scalar_t>& block, const acc_t* targets, const acc_t* largest,
      const acc_t* log_sums, acc_t* losses);
  // The gradients of the same times factors; grad_logits [length, K].
  void (*logit_gradients)(
      const Bins<acc_t>& bins, const LogitBlock<scalar_t>& block, const acc_t* targets, const acc_t* log_sums,
      const acc_t* factors, scalar_t* grad_logits);
};

// At most kBlock tokens of a row and what became of them, [length] all. Null: no rewards, not clipped, and of
// derivatives and losses, not asked for.
template <class acc_t>
struct LossBlock {
  int64_t length;
  const acc_t *outputs, *values;  // of the head, and the values they say
  const acc_t *carries, *rewards, *old_values;
  const uint8_t* counts;
  acc_t *derivatives, *losses;
  // Derivatives are times factors [length], or times factor where there are none.
  const acc_t* factors = nullptr;
  acc_t factor = 1;
};

// The general operators but for the recurrence, on at most kBlock tokens; see token_loops.h.
template <class acc_t>
struct TokenLoops {
  void (*head_values)(const acc_t* outputs, int64_t n, acc_t* values);
  void (*recurrence_terms)(
      const acc_t* values, const acc_t* rewards, Discount<acc_t> discount, int64_t n, acc_t* terms);
  void (*finish_returns)(
      const acc_t* carries, const acc_t* rewards, const acc_t* values, const uint8_t* mask, int64_t n, acc_t* out);
  void (*finish_adjoint)(
      const acc_t* before, const acc_t* grads, const uint8_t* mask, Discount<acc_t> discount, int64_t n,
      acc_t* grad_values, acc_t* grad_rewards);
  void (*token_losses)(const TokenLoss<acc_t>& loss, const LossBlock<acc_t>& block, TokenSums* sums);
};

struct InstructionSet {
  const char* name;  // portable, avx2 or avx512
  RowKernels<double> float64;
  RowKernels<float> float32;
  RowKernels<bfloat16_bits> bfloat16;
  RowKernels<float16_bits> float16;
  TokenLoops<double> double_loops;
  TokenLoops<float> float_loops;
};

// Null where this build or this processor does not have it.
const InstructionSet* portable();
const InstructionSet* avx2();
const InstructionSet* avx512();

// The widest of them, or the one that the environment variable LAMBDA_RETURN_ISA names; throws std::runtime_error
// where that one is not there.
const InstructionSet& instruction_set();

}  // namespace lambda_return::cpu
