// masked_mse and its backward on the device; the mathematics is in kernels/masked_mse.h. No token depends on another,
// so one kernel serves every shape: blocks take tiles of rows in turn.
#pragma once

#include "items.cuh"
#include "mean_reduction.cuh"

namespace lambda_return::cuda {

constexpr int kMseThreads = 256;
constexpr int64_t kMseMaxBlocks = 4096;

template <class scalar_t, class target_t>
struct MseInputs {
  static constexpr int N = kItems<scalar_t>;

  int64_t B, T;
  Rows<const scalar_t> values;
  Rows<const target_t> targets;
  Rows<const uint8_t> mask;

  // Tiles of one row, with room for a head; every row counts as many.
  LAMBDA_RETURN_HOST_DEVICE int64_t tiles() const { return (T + N - 1 + kMseThreads * N - 1) / (kMseThreads * N); }
  int64_t blocks() const { return B * tiles() < kMseMaxBlocks ? B * tiles() : kMseMaxBlocks; }
  Alignment<N> alignment() const { return Alignment<N>(B).add(values).add(targets).add(mask); }

  // No token depends on another: rows that follow one another without space, those written among them, are one long
  // row, so that short ones leave no thread of a tile idle.
  MseInputs joined(int64_t written_stride) const {
    const bool joins = values.stride == T && targets.stride == T && mask.stride == T && written_stride == T;
    return joins ? MseInputs{1, B * T, values, targets, mask} : *this;
  }

  // Calls body(row, first, errors, counts) for this thread's chunks: the error of each token and whether it counts.
  template <class Body>
  __device__ __forceinline__ void for_chunks(const Chunking& chunking, const Body& body) const {
    using acc_t = accumulate_t<scalar_t>;
    for (int64_t tile = blockIdx.x; tile < B * tiles(); tile += gridDim.x) {
      const int64_t row = tile / tiles();
      const int head = chunking.template head<N>(values[row]);
      const int64_t first = (tile % tiles() * kMseThreads + threadIdx.x) * N - head;
      if (first >= T) continue;
      scalar_t v[N];
      target_t g[N];
      uint8_t m[N];
      load_items(mask[row], first, chunking, uint8_t(0), m);
      load_items(values[row], first, chunking, narrow<scalar_t>(0), v);
      load_items(targets[row], first, chunking, narrow<target_t>(0), g);
      acc_t errors[N];
      bool counts[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        counts[i] = m[i] != 0;
        errors[i] = counts[i] ? widen(v[i]) - widen(g[i]) : acc_t(0);
      }
      body(row, first, errors, counts);
    }
  }
};

template <class scalar_t, class target_t>
__global__ void __launch_bounds__(kMseThreads, 4) masked_mse_kernel(
    const MseInputs<scalar_t, target_t> in, const Chunking chunking,
    const MeanReduction<accumulate_t<scalar_t>, kMseThreads> mean) {
  using acc_t = accumulate_t<scalar_t>;
  SquaredError error;
  in.for_chunks(chunking, [&](int64_t, int64_t, const acc_t* errors, const bool* counts) {
    acc_t sum = 0;
    int tokens = 0;
#pragma unroll
    for (int i = 0; i < in.N; ++i) {
      sum += errors[i] * errors[i];
      tokens += counts[i];
    }
    error.sum += static_cast<double>(sum);
    error.num_tokens += tokens;
  });
  mean.finish(blockIdx.x, error);
}

template <class scalar_t, class target_t>
__global__ void __launch_bounds__(kMseThreads, 4) masked_mse_backward_kernel(
    const MseInputs<scalar_t, target_t> in, const Chunking chunking, const accumulate_t<scalar_t>* grad_loss,
    const int64_t* num_tokens, const Rows<scalar_t> grad_values) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int N = kItems<scalar_t>;
  const acc_t scale = mean_squared_error_scale(*grad_loss, *num_tokens);
  in.for_chunks(chunking, [&](int64_t row, int64_t first, const acc_t* errors, const bool*) {
    scalar_t gradients[N];
#pragma unroll
    for (int i = 0; i < N; ++i) gradients[i] = narrow<scalar_t>(scale * errors[i]);
    store_items(grad_values[row], first, chunking, gradients);
  });
}

// Bytes of workspace of the forward: a done counter, then a partial sum a block. Rows that are joined need no more.
template <class scalar_t, class target_t>
int64_t masked_mse_workspace_bytes(const MseInputs<scalar_t, target_t>& in) {
  return 16 + in.blocks() * int64_t(sizeof(SquaredError));
}

// B > 0 and T > 0. workspace is 16-byte aligned.
template <class scalar_t, class target_t>
void launch_masked_mse(
    const MseInputs<scalar_t, target_t>& rows, accumulate_t<scalar_t>* loss, int64_t* num_tokens, void* workspace,
    cudaStream_t stream) {
  const auto in = rows.joined(rows.T);
  clear_async(workspace, sizeof(unsigned), stream);
  const Chunking chunking{in.T, in.alignment().vectorized()};
  auto* partials = reinterpret_cast<SquaredError*>(static_cast<char*>(workspace) + 16);
  const MeanReduction<accumulate_t<scalar_t>, kMseThreads> mean{
      static_cast<unsigned*>(workspace), partials, loss, num_tokens};
  LAMBDA_RETURN_LAUNCH((masked_mse_kernel<scalar_t, target_t>), in.blocks(), kMseThreads, stream, in, chunking, mean);
}

template <class scalar_t, class target_t>
void launch_masked_mse_backward(
    const MseInputs<scalar_t, target_t>& rows, const accumulate_t<scalar_t>* grad_loss, const int64_t* num_tokens,
    Rows<scalar_t> grad_values, cudaStream_t stream) {
  const auto in = rows.joined(grad_values.stride);
  const Chunking chunking{in.T, in.alignment().add(grad_values).vectorized()};
  LAMBDA_RETURN_LAUNCH(
      (masked_mse_backward_kernel<scalar_t, target_t>), in.blocks(), kMseThreads, stream, in, chunking, grad_loss,
      num_tokens, grad_values);
}

}  // namespace lambda_return::cuda
