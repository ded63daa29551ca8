// Affine maps H -> a H + b: what a stretch of tokens does to the carry, whatever the carry is.
//
// One valid token is (a, b) = (gamma lam, its own term), a masked token is the identity (1, 0), and stretches compose.
// A scan over maps is what lets many threads work on one row.
#pragma once

#include <cmath>

#include "lambda_return.h"

namespace lambda_return {

template <class acc_t>
struct alignas(2 * sizeof(acc_t)) AffineMap {
  acc_t a, b;

  LAMBDA_RETURN_HOST_DEVICE static AffineMap identity() { return {acc_t(1), acc_t(0)}; }

  // The map of one more valid token on top of this one. step(h) is the recurrence of that token.
  template <class Step>
  LAMBDA_RETURN_HOST_DEVICE void then(const Discount<acc_t>& discount, const Step& step) {
    a *= discount.carry;
    b = step(b);
  }
};

// How maps are applied and composed under one discount. fma is written out so that every place that applies a map
// rounds alike: the carry of a chunk is the same bits whoever computes it.
template <class acc_t>
struct AffineRule {
  bool drops_carry;  // gamma lam is exactly 0: a token does not look at the carry, not even at an Inf in it

  LAMBDA_RETURN_HOST_DEVICE explicit AffineRule(const Discount<acc_t>& discount)
      : drops_carry(discount.carry == acc_t(0)) {}

  LAMBDA_RETURN_HOST_DEVICE acc_t apply(const AffineMap<acc_t>& map, acc_t carry) const {
#if !defined(__CUDA_ARCH__)
    using std::fma;
#endif
    return drops_carry && map.a == acc_t(0) ? map.b : fma(map.a, carry, map.b);
  }

  // later after earlier
  LAMBDA_RETURN_HOST_DEVICE AffineMap<acc_t> compose(
      const AffineMap<acc_t>& later, const AffineMap<acc_t>& earlier) const {
    return {later.a * earlier.a, apply(later, earlier.b)};
  }
};

}  // namespace lambda_return
