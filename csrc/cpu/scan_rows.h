// Rows of a [B, T] tensor, and stretches of long rows, over threads: how the scans of the CPU are run.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "parallel_rows.h"
#include "simd/instruction_set.h"

namespace lambda_return::cpu {

// The kernels of a dtype of torch, and that dtype as the kernels know it.
template <class scalar_t>
struct KernelType {
  using type = scalar_t;
  static const RowKernels<type>& kernels(const InstructionSet& set) {
    if constexpr (std::is_same_v<scalar_t, double>) {
      return set.float64;
    } else {
      return set.float32;
    }
  }
};
template <>
struct KernelType<torch::headeronly::BFloat16> {
  using type = bfloat16_bits;
  static const RowKernels<type>& kernels(const InstructionSet& set) { return set.bfloat16; }
};
template <>
struct KernelType<torch::headeronly::Half> {
  using type = float16_bits;
  static const RowKernels<type>& kernels(const InstructionSet& set) { return set.float16; }
};
template <class scalar_t>
using kernel_t = typename KernelType<scalar_t>::type;

template <class scalar_t>
const RowKernels<kernel_t<scalar_t>>& kernels() {
  return KernelType<scalar_t>::kernels(instruction_set());
}

// Tokens of a stretch: what a thread can read twice from its second-level cache (float32: 80 KiB in, 64 KiB out).
constexpr int64_t kStretch = 16384;

struct Stretch {
  int64_t row, index;     // index counts in the direction of the scan
  int64_t begin, length;  // in tokens
};

inline int64_t stretches_per_row(int64_t T) { return std::max<int64_t>(1, (T + kStretch - 1) / kStretch); }

enum class From { kRight, kLeft };

inline Stretch stretch_at(int64_t T, From from, int64_t row, int64_t index) {
  const int64_t length = std::min(kStretch, T - index * kStretch);
  return {row, index, from == From::kRight ? T - index * kStretch - length : index * kStretch, length};
}

// Runs run(stretch, carry) -> map on every stretch of every row, in the order of the scan within a row, where
// map_of(stretch) gives the same map without writing anything. first(row) is the carry that a row starts with,
// last(row, carry) takes what it ends with.
//
// Stretches are chained by their maps in every case, so that the bits depend on the shape alone. Where there are too
// few rows to occupy the threads, these take stretches from one counter, round by round over the rows: a thread whose
// carry is not there yet computes its stretch's map meanwhile, hands its own carry on as soon as it can, and then reads
// the stretch a second time, from its cache. Waiting is safe: whoever owes the carry took its stretch earlier and runs.
template <class acc_t, class First, class MapOf, class Run, class Last>
void scan_rows(
    int64_t B, int64_t T, From from, const AffineRule<acc_t>& rule, const First& first, const MapOf& map_of,
    const Run& run, const Last& last) {
  const int64_t per_row = stretches_per_row(T), threads = torch::stable::get_num_threads();
  if (per_row == 1 || threads == 1 || B >= 4 * threads) {
    parallel_rows(B, T, [&](int64_t row) {
      acc_t carry = first(row);
      for (int64_t index = 0; index < per_row; ++index) {
        carry = rule.apply(run(stretch_at(T, from, row, index), carry), carry);
      }
      last(row, carry);
    });
    return;
  }

  struct Carry {
    std::atomic<bool> ready{false};
    acc_t value;

    void publish(acc_t carry) {
      value = carry;
      ready.store(true, std::memory_order_release);
    }
  };
  const auto carries = std::make_unique<Carry[]>(B * (per_row + 1));  // [per_row + 1, B]
  for (int64_t row = 0; row < B; ++row) {
    carries[row].publish(first(row));
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, B * per_row), 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < B * per_row; i = next.fetch_add(1)) {
      const Stretch stretch = stretch_at(T, from, i % B, i / B);
      Carry &in = carries[i], &out = carries[i + B];
      if (in.ready.load(std::memory_order_acquire)) {
        out.publish(rule.apply(run(stretch, in.value), in.value));
      } else {
        const AffineMap<acc_t> map = map_of(stretch);
        while (!in.ready.load(std::memory_order_acquire)) {
          std::this_thread::yield();
        }
        out.publish(rule.apply(map, in.value));
        run(stretch, in.value);
      }
    }
  });
  for (int64_t row = 0; row < B; ++row) {
    last(row, carries[per_row * B + row].value);
  }
}

// The scan of the lambda-return over values [B, T] and mask [B, T] from terminal_rewards [B]: runs
//   run(kernels, constants, stretch, values of the stretch, mask of the stretch, carry) -> map
// on every stretch, where run calls one of the kernels and brings what else that one needs.
template <class scalar_t, class Run>
void scan_returns(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& mask, double gamma, double lam,
    const Run& run) {
  using acc_t = accumulate_t<scalar_t>;
  const auto v = const_rows<kernel_t<scalar_t>>(values);
  const auto m = const_rows<uint8_t>(mask);
  const auto* r = static_cast<const acc_t*>(terminal_rewards.const_data_ptr());
  const auto discount = Discount<acc_t>::from(gamma, lam);
  const auto& k = kernels<scalar_t>();
  const auto constants = k.constants(discount);
  scan_rows(
      values.size(0), values.size(1), From::kRight, AffineRule<acc_t>(discount), [&](int64_t b) { return r[b]; },
      [&](const Stretch& s) { return k.returns_map(constants, v[s.row] + s.begin, m[s.row] + s.begin, s.length); },
      [&](const Stretch& s, acc_t carry) {
        return run(k, constants, s, v[s.row] + s.begin, m[s.row] + s.begin, carry);
      },
      [](int64_t, acc_t) {});
}

}  // namespace lambda_return::cpu
