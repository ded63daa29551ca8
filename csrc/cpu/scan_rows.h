// Rows of a [B, T] tensor, and stretches of long rows, over threads: how the scans of the CPU are run.
#pragma once

#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

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
  int64_t begin, length;  // in tokens of the row
};

inline int64_t stretches_of(int64_t T) { return std::max<int64_t>(1, (T + kStretch - 1) / kStretch); }

// B rows of T tokens each, or of the lengths that offsets [B + 1] say.
struct RowShape {
  int64_t B, T;
  const int64_t* offsets = nullptr;

  int64_t length(int64_t row) const { return offsets == nullptr ? T : offsets[row + 1] - offsets[row]; }
  int64_t tokens() const { return offsets == nullptr ? B * T : offsets[B] - offsets[0]; }
  int64_t stretches(int64_t row) const { return stretches_of(length(row)); }

  Stretch stretch(From from, int64_t row, int64_t index) const {
    const int64_t T_row = length(row), length = std::min(kStretch, T_row - index * kStretch);
    return {row, index, from == From::kRight ? T_row - index * kStretch - length : index * kStretch, length};
  }
};

// Lets the processor wait for another one.
inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs run(stretch, carry) -> map on every stretch of every row, in the order of the scan within a row, where
// map_of(stretch) gives the same map without writing anything. first(row) is the carry that a row starts with,
// last(row, carry) takes what it ends with, rule(row) says how its maps are applied.
//
// Stretches are chained by their maps in every case, so that the bits depend on the shape alone. Where there are too
// few rows to occupy the threads, or rows of different lengths, these take stretches from one counter, round by round
// over the rows: a thread whose carry is not there yet computes its stretch's map meanwhile, hands its own carry on as
// soon as it can, and then reads the stretch a second time, from its cache. Waiting is safe: whoever owes the carry
// took its stretch earlier and runs.
template <class acc_t, class Rule, class First, class MapOf, class Run, class Last>
void scan_rows(
    const RowShape& rows, From from, const Rule& rule, const First& first, const MapOf& map_of, const Run& run,
    const Last& last) {
  const int64_t B = rows.B, threads = torch::stable::get_num_threads();
  const bool packed = rows.offsets != nullptr;
  if (threads == 1 || rows.tokens() <= kTokensPerThread || (!packed && (rows.stretches(0) == 1 || B >= 4 * threads))) {
    // Packed rows are here for want of threads or of tokens: no row needs a thread of its own.
    parallel_rows(B, packed ? 1 : rows.T, from, [&](int64_t row) {
      acc_t carry = first(row);
      for (int64_t index = 0; index < rows.stretches(row); ++index) {
        carry = rule(row).apply(run(rows.stretch(from, row, index), carry), carry);
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
  struct Task {
    Stretch stretch;
    int64_t in, out;  // its carries
  };
  std::vector<int64_t> carry_of(B), unfinished(B);  // the latest carry of each row; the rows that have more stretches
  std::iota(carry_of.begin(), carry_of.end(), 0);
  std::iota(unfinished.begin(), unfinished.end(), 0);
  std::vector<Task> tasks;
  for (int64_t index = 0; !unfinished.empty(); ++index) {
    for (const int64_t row : unfinished) {
      const int64_t out = B + static_cast<int64_t>(tasks.size());
      tasks.push_back({rows.stretch(from, row, index), carry_of[row], out});
      carry_of[row] = out;
    }
    const auto done = [&](int64_t row) { return rows.stretches(row) == index + 1; };
    unfinished.erase(std::remove_if(unfinished.begin(), unfinished.end(), done), unfinished.end());
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  const auto carries = std::make_unique<Carry[]>(B + count);
  for (int64_t row = 0; row < B; ++row) {
    carries[row].publish(first(row));
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      const Stretch& stretch = tasks[i].stretch;
      const auto row_rule = rule(stretch.row);
      Carry &in = carries[tasks[i].in], &out = carries[tasks[i].out];
      if (in.ready.load(std::memory_order_acquire)) {
        out.publish(row_rule.apply(run(stretch, in.value), in.value));
      } else {
        const AffineMap<acc_t> map = map_of(stretch);
        for (int pauses = 1; !in.ready.load(std::memory_order_acquire); ++pauses) {
          if (pauses % 256 != 0) {
            pause_thread();
          } else {
            std::this_thread::yield();  // there may be more threads than processors
          }
        }
        out.publish(row_rule.apply(map, in.value));
        run(stretch, in.value);
      }
    }
  });
  for (int64_t row = 0; row < B; ++row) {
    last(row, carries[carry_of[row]].value);
  }
}

// For a tensor of tokens and, of as many tokens each, what else is scanned with it. Half a MiB of it leaves room for
// that and for results in a second-level cache.
template <class scalar_t>
Prefetch prefetch_for(int64_t tokens, bool rows_follow) {
  constexpr int64_t kCached = (1 << 19) / sizeof(scalar_t);
  return tokens <= kCached ? Prefetch::kNone : rows_follow ? Prefetch::kBeyond : Prefetch::kStretch;
}

// The scan of the lambda-return over values [B, T] and mask [B, T] from terminal_rewards [B]: runs
//   run(kernels, constants, stretch, values of the stretch, mask of the stretch, carry) -> map
// on every stretch, where run calls one of the kernels and brings what else that one needs; rows_follow: in that too,
// each row begins where another one ends.
template <class scalar_t, class Run>
void scan_returns(
    const Tensor& values, const Tensor& terminal_rewards, const Tensor& mask, double gamma, double lam,
    bool rows_follow, const Run& run) {
  using acc_t = accumulate_t<scalar_t>;
  const auto v = const_rows<kernel_t<scalar_t>>(values);
  const auto m = const_rows<uint8_t>(mask);
  const auto* r = static_cast<const acc_t*>(terminal_rewards.const_data_ptr());
  const auto discount = Discount<acc_t>::from(gamma, lam);
  const auto& k = kernels<scalar_t>();
  const int64_t B = values.size(0), T = values.size(1);
  const auto constants =
      k.constants(discount, prefetch_for<scalar_t>(B * T, rows_follow && v.follow(T) && m.follow(T)));
  scan_rows<acc_t>(
      {B, T}, From::kRight, [&](int64_t) { return AffineRule<acc_t>(discount); }, [&](int64_t b) { return r[b]; },
      [&](const Stretch& s) { return k.returns_map(constants, v[s.row] + s.begin, m[s.row] + s.begin, s.length); },
      [&](const Stretch& s, acc_t carry) {
        return run(k, constants, s, v[s.row] + s.begin, m[s.row] + s.begin, carry);
      },
      [](int64_t, acc_t) {});
}

}  // namespace lambda_return::cpu
