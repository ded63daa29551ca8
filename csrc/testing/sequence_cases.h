// What the tests of the general operators share: schedules, and arrays for sequences padded or packed.
#pragma once

#include "cuda_kernel_cases.h"

namespace lambda_return::cuda::testing {

inline std::vector<ScheduleSpec> schedules() {
  using cuda_emulator::Order;
  if (CUDA_EMULATOR_TSAN) return {{Order::kRandom, 2, 3}, {Order::kDescending, 1, 2}};
  if (CUDA_EMULATOR_ASAN) return {{Order::kDescending, 1, 2}, {Order::kRandom, 2, 5}};
  return {{Order::kAscending, 1, 1}, {Order::kDescending, 1, 2}, {Order::kRandom, 3, 5}, {Order::kRandom, 4, 16}};
}

// Exactly as many elements as asked for, the last one at the end of its allocation.
template <class Element>
struct Array {
  int64_t size;
  std::shared_ptr<char> memory;

  explicit Array(int64_t size_) : size(size_), memory(allocate(size_ * int64_t(sizeof(Element)))) {}
  Element* data() const { return reinterpret_cast<Element*>(memory.get()); }
  Element& operator[](int64_t i) const { return data()[i]; }
  bool same_bits(const Array& other) const {
    return memcmp(data(), other.data(), static_cast<size_t>(size) * sizeof(Element)) == 0;
  }
};

inline std::vector<int64_t> starts_of(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> starts = {0};
  for (int64_t length : lengths) starts.push_back(starts.back() + length);
  return starts;
}

}  // namespace lambda_return::cuda::testing
