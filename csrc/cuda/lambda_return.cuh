// lambda_return and its adjoint on the device; the mathematics is in kernels/lambda_return.h.
#pragma once

#include "row_scan.cuh"

namespace lambda_return::cuda {

// returns [B, T] <- G of values [B, T], mask [B, T], terminal_rewards [B].
template <class scalar_type>
struct LambdaReturnOp : EqualRows<accumulate_t<scalar_type>>, NoReduction {
  using scalar_t = scalar_type;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr bool kRightToLeft = true;
  static constexpr int N = kItems<scalar_t>;
  using EqualRows<acc_t>::chunking;
  using EqualRows<acc_t>::discount;

  Rows<const scalar_t> values;
  Rows<const uint8_t> mask;
  const acc_t* terminal_rewards;
  Rows<scalar_t> returns;

  struct Items {
    scalar_t values[N];
    uint8_t mask[N];
  };
  struct Output {
    scalar_t returns[N];
  };

  __device__ const scalar_t* first_row(int64_t row) const { return values[row]; }
  __device__ acc_t initial(int64_t row) const { return terminal_rewards[row]; }
  __device__ void load(int64_t row, int64_t first, Items& items) const {
    load_items(mask[row], first, chunking, uint8_t(0), items.mask);
    // Monte-Carlo does not look at V: half of the bytes need not move.
    if (discount.value != acc_t(0)) load_items(values[row], first, chunking, narrow<scalar_t>(0), items.values);
  }
  __device__ bool valid(const Items& items, int i) const {
    return items.mask[i] != 0 || (planted(Bug::kMaskIgnoredInVectorPath) && chunking.vectorized);
  }
  __device__ acc_t step(int64_t, const Items& items, int i, acc_t h) const {
    return discount.step(widen(items.values[i]), h);
  }
  __device__ void visit(int64_t, const Items& items, int i, acc_t h, Output& output) const {
    output.returns[i] = narrow<scalar_t>(valid(items, i) ? h : acc_t(0));
  }
  __device__ void finish_chunk(int64_t row, int64_t first, const Items&, Output& output) const {
    store_items(returns[row], first, chunking, output.returns);
  }
  __device__ void finish_row(int64_t, acc_t) const {}
};

// grad_values [B, T], grad_terminal_rewards [B] <- the adjoint at grad_returns [B, T], mask [B, T].
template <class scalar_type>
struct LambdaReturnBackwardOp : EqualRows<accumulate_t<scalar_type>>, NoReduction {
  using scalar_t = scalar_type;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr bool kRightToLeft = false;
  static constexpr int N = kItems<scalar_t>;
  using EqualRows<acc_t>::chunking;
  using EqualRows<acc_t>::discount;

  Rows<const scalar_t> grad_returns;
  Rows<const uint8_t> mask;
  Rows<scalar_t> grad_values;
  acc_t* grad_terminal_rewards;

  struct Items {
    scalar_t grad_returns[N];
    uint8_t mask[N];
  };
  struct Output {
    scalar_t grad_values[N];
  };

  __device__ const scalar_t* first_row(int64_t row) const { return grad_returns[row]; }
  __device__ acc_t initial(int64_t) const { return 0; }
  __device__ void load(int64_t row, int64_t first, Items& items) const {
    load_items(mask[row], first, chunking, uint8_t(0), items.mask);
    load_items(grad_returns[row], first, chunking, narrow<scalar_t>(0), items.grad_returns);
  }
  __device__ bool valid(const Items& items, int i) const { return items.mask[i] != 0; }
  __device__ acc_t step(int64_t, const Items& items, int i, acc_t h) const {
    return discount.adjoint_step(widen(items.grad_returns[i]), h);
  }
  __device__ void visit(int64_t, const Items& items, int i, acc_t h, Output& output) const {
    output.grad_values[i] = narrow<scalar_t>(valid(items, i) ? discount.weighted_value(h) : acc_t(0));
  }
  __device__ void finish_chunk(int64_t row, int64_t first, const Items&, Output& output) const {
    store_items(grad_values[row], first, chunking, output.grad_values);
  }
  __device__ void finish_row(int64_t row, acc_t h) const { grad_terminal_rewards[row] = h; }
};

// B > 0 and T > 0. plan: ScanPlan::of(B, T, kItems<scalar_t>), or any other that covers the rows.
// workspace: plan.workspace_bytes<acc_t>() bytes, 16-byte aligned.
template <class scalar_t>
void launch_lambda_return(
    int64_t B, int64_t T, Rows<const scalar_t> values, const accumulate_t<scalar_t>* terminal_rewards,
    Rows<const uint8_t> mask, double gamma, double lam, Rows<scalar_t> returns, const ScanPlan& plan, void* workspace,
    cudaStream_t stream) {
  constexpr int N = kItems<scalar_t>;
  const bool vectorized = Alignment<N>(B).add(values).add(mask).add(returns).vectorized();
  const auto discount = Discount<accumulate_t<scalar_t>>::from(gamma, lam);
  const LambdaReturnOp<scalar_t> op{{B, {T, vectorized}, discount}, {}, values, mask, terminal_rewards, returns};
  launch_scan(op, plan, workspace, stream);
}

template <class scalar_t>
void launch_lambda_return_backward(
    int64_t B, int64_t T, Rows<const scalar_t> grad_returns, Rows<const uint8_t> mask, double gamma, double lam,
    Rows<scalar_t> grad_values, accumulate_t<scalar_t>* grad_terminal_rewards, const ScanPlan& plan, void* workspace,
    cudaStream_t stream) {
  constexpr int N = kItems<scalar_t>;
  const bool vectorized = Alignment<N>(B).add(grad_returns).add(mask).add(grad_values).vectorized();
  const auto discount = Discount<accumulate_t<scalar_t>>::from(gamma, lam);
  const LambdaReturnBackwardOp<scalar_t> op{{B, {T, vectorized}, discount}, {}, grad_returns, mask, grad_values,
                                            grad_terminal_rewards};
  launch_scan(op, plan, workspace, stream);
}

}  // namespace lambda_return::cuda
