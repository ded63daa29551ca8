// The lambda-return of one sequence, its adjoint, and the recurrence both are made of.
//
// With valid positions p_1 < ... < p_n (mask true), values V and terminal reward R:
//
//   G[p_n] = R,    G[p_i] = gamma ((1 - lam) V[p_{i+1}] + lam G[p_{i+1}]).
//
// Written with the carry H that a position hands to the valid position left of it, all inputs of a step are
// at the step's own position, so a gap in the mask costs nothing:
//
//   H = R;  for t = T-1 ... 0:  valid: G[t] = H, H = gamma (1 - lam) V[t] + gamma lam G[t];  masked: G[t] =
//   0.
#pragma once

#include "numeric.h"

namespace lambda_return {

// The two coefficients of the recurrence. A term whose coefficient is exactly 0 is left out rather than
// multiplied by 0, so that Monte-Carlo (lam = 1) never reads V and an Inf in V cannot become a NaN in a
// target.
template <class acc_t>
struct Discount {
  acc_t value;  // gamma (1 - lam), weight of V
  acc_t carry;  // gamma lam, weight of what came from further along

  LAMBDA_RETURN_HOST_DEVICE static Discount from(double gamma, double lam) {
    return {static_cast<acc_t>(gamma * (1.0 - lam)), static_cast<acc_t>(gamma * lam)};
  }

  LAMBDA_RETURN_HOST_DEVICE acc_t weighted_value(acc_t v) const { return value == acc_t(0) ? acc_t(0) : value * v; }
  LAMBDA_RETURN_HOST_DEVICE acc_t weighted_carry(acc_t h) const { return carry == acc_t(0) ? acc_t(0) : carry * h; }

  // What a valid position with value v and return g hands to the valid position left of it.
  LAMBDA_RETURN_HOST_DEVICE acc_t step(acc_t v, acc_t g) const { return weighted_value(v) + weighted_carry(g); }

  // The same for the adjoint: what a valid position with incoming gradient g hands to the one right of it.
  LAMBDA_RETURN_HOST_DEVICE acc_t adjoint_step(acc_t g, acc_t adjoint) const { return g + weighted_carry(adjoint); }
};

// Calls visit(t, valid, G[t]) for t = T-1 ... 0. values [T], mask [T] (nonzero byte = valid).
template <class scalar_t, class acc_t, class Visit>
LAMBDA_RETURN_HOST_DEVICE void for_each_return(
    const scalar_t* values, const uint8_t* mask, int64_t T, acc_t terminal_reward, Discount<acc_t> discount,
    Visit&& visit) {
  acc_t carry = terminal_reward;
  for (int64_t t = T - 1; t >= 0; --t) {
    const bool valid = mask[t] != 0;
    visit(t, valid, valid ? carry : acc_t(0));
    if (valid) {
      carry = discount.step(static_cast<acc_t>(values[t]), carry);
    }
  }
}

// returns [T] <- G of one row.
template <class scalar_t, class acc_t>
LAMBDA_RETURN_HOST_DEVICE void lambda_return_row(
    const scalar_t* values, const uint8_t* mask, int64_t T, acc_t terminal_reward, Discount<acc_t> discount,
    scalar_t* returns) {
  for_each_return(values, mask, T, terminal_reward, discount, [&](int64_t t, bool, acc_t g) {
    returns[t] = static_cast<scalar_t>(g);
  });
}

// The adjoint of lambda_return_row: with incoming gradient g, from left to right over valid positions,
//   A[p_i] = g[p_i] + gamma lam A[p_{i-1}],   dV[p_i] = gamma (1 - lam) A[p_{i-1}],   dR = A[p_n].
// grad_returns [T], mask [T], grad_values [T] (written; 0 where masked). Returns dR.
template <class scalar_t, class acc_t>
LAMBDA_RETURN_HOST_DEVICE acc_t lambda_return_backward_row(
    const scalar_t* grad_returns, const uint8_t* mask, int64_t T, Discount<acc_t> discount, scalar_t* grad_values) {
  acc_t adjoint = 0;
  for (int64_t t = 0; t < T; ++t) {
    const bool valid = mask[t] != 0;
    grad_values[t] = static_cast<scalar_t>(valid ? discount.weighted_value(adjoint) : acc_t(0));
    if (valid) {
      adjoint = discount.adjoint_step(static_cast<acc_t>(grad_returns[t]), adjoint);
    }
  }
  return adjoint;
}

}  // namespace lambda_return
