// lambda_value_loss and its backward on the device; the mathematics is in kernels/lambda_value_loss.h.
#pragma once

#include "lambda_return.cuh"
#include "mean_reduction.cuh"

namespace lambda_return::cuda {

// The part that forward and backward share: both scan for G, and both know which tokens count.
template <class scalar_type>
struct ValueLossScan : EqualRows<accumulate_t<scalar_type>> {
  using scalar_t = scalar_type;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr bool kRightToLeft = true;
  static constexpr int N = kItems<scalar_t>;
  using EqualRows<acc_t>::chunking;
  using EqualRows<acc_t>::discount;

  Rows<const scalar_t> values;         // [B, T]
  const acc_t* terminal_rewards;       // [B]
  Rows<const uint8_t> attention_mask;  // [B, T]
  Rows<const uint8_t> loss_mask;       // [B, T]
  bool one_mask;                       // both masks are the same memory: read it once

  struct Items {
    scalar_t values[N];
    uint8_t loss_mask[N];
    uint8_t attention_mask[N];
  };

  __device__ const scalar_t* first_row(int64_t row) const { return values[row]; }
  __device__ acc_t initial(int64_t row) const { return terminal_rewards[row]; }
  __device__ void load(int64_t row, int64_t first, Items& items) const {
    load_items(loss_mask[row], first, chunking, uint8_t(0), items.loss_mask);
    load_items(values[row], first, chunking, narrow<scalar_t>(0), items.values);
    if (one_mask) {
      memcpy(items.attention_mask, items.loss_mask, sizeof(items.loss_mask));
    } else {
      load_items(attention_mask[row], first, chunking, uint8_t(0), items.attention_mask);
    }
  }
  __device__ bool valid(const Items& items, int i) const { return items.loss_mask[i] != 0; }
  __device__ acc_t step(int64_t, const Items& items, int i, acc_t h) const {
    return discount.step(widen(items.values[i]), h);
  }
  __device__ bool counts(const Items& items, int i) const { return valid(items, i) && items.attention_mask[i] != 0; }
  __device__ acc_t error(const Items& items, int i, acc_t h) const { return widen(items.values[i]) - h; }
  __device__ void finish_row(int64_t, acc_t) const {}
};

// loss, num_tokens <- mean squared error and its token count.
template <class scalar_type>
struct ValueLossOp : ValueLossScan<scalar_type>, NoRowSums {
  using Base = ValueLossScan<scalar_type>;
  using typename Base::acc_t;
  using typename Base::Items;
  static constexpr bool kReduces = true;

  MeanReduction<acc_t, kThreads> mean;

  // A chunk is summed in the accumulation type, chunks in float64.
  struct Output {
    acc_t chunk_sum;
    int chunk_tokens;
    SquaredError error;
  };

  __device__ void visit(int64_t, const Items& items, int i, acc_t h, Output& output) const {
    if (this->counts(items, i)) {
      const acc_t error = this->error(items, i, h);
      output.chunk_sum += error * error;
      ++output.chunk_tokens;
    }
  }
  __device__ void finish_chunk(int64_t, int64_t, const Items&, Output& output) const {
    output.error.sum += static_cast<double>(output.chunk_sum);
    output.error.num_tokens += output.chunk_tokens;
    output.chunk_sum = 0;
    output.chunk_tokens = 0;
  }
  __device__ void finish_block(int64_t index, const Output& output) const { mean.finish(index, output.error); }
};

// grad_values [B, T] <- grad_loss * 2 m (V - G) / num_tokens.
template <class scalar_type>
struct ValueLossBackwardOp : ValueLossScan<scalar_type>, NoReduction {
  using Base = ValueLossScan<scalar_type>;
  using typename Base::acc_t;
  using typename Base::Items;

  const acc_t* grad_loss;     // 0-dim
  const int64_t* num_tokens;  // 0-dim
  Rows<scalar_type> grad_values;

  struct Output {
    scalar_type grad_values[Base::N];
  };

  __device__ void visit(int64_t, const Items& items, int i, acc_t h, Output& output) const {
    const acc_t scale = mean_squared_error_scale(*grad_loss, *num_tokens);
    output.grad_values[i] = narrow<scalar_type>(this->counts(items, i) ? scale * this->error(items, i, h) : acc_t(0));
  }
  __device__ void finish_chunk(int64_t row, int64_t first, const Items&, Output& output) const {
    store_items(grad_values[row], first, this->chunking, output.grad_values);
  }
};

// The inputs of a launch, forward and backward. B > 0 and T > 0.
template <class scalar_t>
struct ValueLossInputs {
  int64_t B, T;
  Rows<const scalar_t> values;
  const accumulate_t<scalar_t>* terminal_rewards;
  Rows<const uint8_t> attention_mask, loss_mask;
  double gamma, lam;

  ScanPlan plan() const { return ScanPlan::of(B, T, kItems<scalar_t>); }
  Alignment<kItems<scalar_t>> alignment() const {
    return Alignment<kItems<scalar_t>>(B).add(values).add(attention_mask).add(loss_mask);
  }
  ValueLossScan<scalar_t> scan(bool vectorized) const {
    const bool one_mask =
        attention_mask.data == loss_mask.data && (B == 1 || attention_mask.stride == loss_mask.stride);
    return {
        {B, {T, vectorized}, Discount<accumulate_t<scalar_t>>::from(gamma, lam)},
        values,
        terminal_rewards,
        attention_mask,
        loss_mask,
        one_mask};
  }
};

// Bytes of workspace of the forward: what the scan needs, then a partial sum a block.
template <class scalar_t>
int64_t lambda_value_loss_workspace_bytes(const ScanPlan& plan) {
  const int64_t scan_bytes = plan.workspace_bytes<accumulate_t<scalar_t>>();
  return (scan_bytes + 15) / 16 * 16 + plan.blocks * int64_t(sizeof(SquaredError));
}

template <class scalar_t>
void launch_lambda_value_loss(
    const ValueLossInputs<scalar_t>& in, accumulate_t<scalar_t>* loss, int64_t* num_tokens, const ScanPlan& plan,
    void* workspace, cudaStream_t stream) {
  const int64_t scan_bytes = (plan.workspace_bytes<accumulate_t<scalar_t>>() + 15) / 16 * 16;
  auto* partials = reinterpret_cast<SquaredError*>(static_cast<char*>(workspace) + scan_bytes);
  const ValueLossOp<scalar_t> op{
      in.scan(in.alignment().vectorized()), {}, {static_cast<unsigned*>(workspace), partials, loss, num_tokens}};
  launch_scan(op, plan, workspace, stream);
}

template <class scalar_t>
void launch_lambda_value_loss_backward(
    const ValueLossInputs<scalar_t>& in, const accumulate_t<scalar_t>* grad_loss, const int64_t* num_tokens,
    Rows<scalar_t> grad_values, const ScanPlan& plan, void* workspace, cudaStream_t stream) {
  const bool vectorized = in.alignment().add(grad_values).vectorized();
  const ValueLossBackwardOp<scalar_t> op{in.scan(vectorized), {}, grad_loss, num_tokens, grad_values};
  launch_scan(op, plan, workspace, stream);
}

}  // namespace lambda_return::cuda
