// How threads read and write rows: each thread holds kItems consecutive tokens of one row at a time.
//
// A row is cut into chunks of kItems tokens at multiples of kItems *tokens of the allocation's alignment*, not of the
// row's start: with T odd, rows start anywhere, and only this makes every chunk but a row's first and last one a set
// of 16-byte accesses. The first chunk then begins up to kItems - 1 tokens before the row (`head`).
#pragma once

#include "platform.cuh"

namespace lambda_return::cuda {

// 8 tokens: one 16-byte load of a half type or two of float32, and one 8-byte load of mask bytes. 16 would halve the
// work of the scan over threads, but spill at the 64 registers that half of the threads of an SM may have; so would 8
// of float64.
template <class scalar_t>
constexpr int kItems = sizeof(scalar_t) == 8 ? 4 : 8;

// Row pointers into a [B, T] matrix whose rows are contiguous in T.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  LAMBDA_RETURN_HOST_DEVICE T* operator[](int64_t row) const { return data + row * stride; }
};

// Where the chunks of a row lie. vectorized: every matrix of the kernel has the same head in every row.
struct Chunking {
  int64_t T;
  bool vectorized;

  // Tokens between the aligned address at or before the start of this row and the start itself.
  template <int N, class T_>
  LAMBDA_RETURN_HOST_DEVICE int head(const T_* row) const {
    return vectorized ? static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T_) % N) : 0;
  }
  template <int N>
  LAMBDA_RETURN_HOST_DEVICE int64_t chunks(int head) const {
    return (T + head + N - 1) / N;
  }
};

template <int kBytes>
struct Packet;
template <>
struct Packet<16> {
  using type = uint4;
};
template <>
struct Packet<8> {
  using type = uint2;
};
template <>
struct Packet<4> {
  using type = unsigned;
};

// items[i] <- row[first + i] where that is inside [0, T), else outside.
template <int N, class T_>
__device__ __forceinline__ void load_items(
    const T_* row, int64_t first, const Chunking& chunking, T_ outside, T_ (&items)[N]) {
  const int64_t last = chunking.T - (planted(Bug::kOffByOneAtTheRowEdge) ? -1 : 0);
  if (chunking.vectorized && first >= 0 && first + N <= last) {
    constexpr int kBytes = N * sizeof(T_) >= 16 ? 16 : N * sizeof(T_);
    using packet_t = typename Packet<kBytes>::type;
    constexpr int kPackets = N * sizeof(T_) / kBytes;
    packet_t packets[kPackets];
#pragma unroll
    for (int i = 0; i < kPackets; ++i) packets[i] = reinterpret_cast<const packet_t*>(row + first)[i];
    memcpy(items, packets, sizeof(packets));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) items[i] = first + i >= 0 && first + i < last ? row[first + i] : outside;
  }
}

// row[first + i] <- items[i] where that is inside [0, T).
template <int N, class T_>
__device__ __forceinline__ void store_items(T_* row, int64_t first, const Chunking& chunking, const T_ (&items)[N]) {
  if (chunking.vectorized && first >= 0 && first + N <= chunking.T) {
    constexpr int kPackets = N * sizeof(T_) / 16;
    uint4 packets[kPackets];
    memcpy(packets, items, sizeof(packets));
#pragma unroll
    for (int i = 0; i < kPackets; ++i) store_packet(reinterpret_cast<uint4*>(row + first) + i, packets[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i >= 0 && first + i < chunking.T) row[first + i] = items[i];
    }
  }
}

// Whether the kernels may use 16-byte accesses on these matrices: all rows of all of them have the same head, that is,
// they start alike and their strides agree modulo kItems.
template <int N>
class Alignment {
 public:
  explicit Alignment(int64_t B) : B_(B) {}

  template <class T>
  Alignment& add(const Rows<T>& rows) {
    const auto address = reinterpret_cast<uintptr_t>(rows.data);
    const int64_t head = static_cast<int64_t>(address / sizeof(T) % N);
    const int64_t step = B_ > 1 ? (rows.stride % N + N) % N : 0;
    vectorized_ = vectorized_ && address % sizeof(T) == 0 && (head_ < 0 || (head == head_ && step == step_));
    head_ = head;
    step_ = step;
    return *this;
  }
  template <class T>
  Alignment& add_optional(const Rows<T>& rows) {
    return rows.data == nullptr ? *this : add(rows);
  }
  bool vectorized() const { return vectorized_; }

 private:
  int64_t B_, head_ = -1, step_ = 0;
  bool vectorized_ = true;
};

}  // namespace lambda_return::cuda
