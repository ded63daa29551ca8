// Runs the shipped launch functions under the emulator: one Case is one set of inputs, of which run() makes every
// output of every operator and check() compares them with the row functions of csrc/kernels in float64.
//
// Whatever a kernel must not use is NaN (or a nonzero byte in masks), whatever it must not write is a canary, every
// allocation ends with the last byte it may touch (so that AddressSanitizer sees the next), and workspaces start as
// garbage.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "cuda/eos_mask.cuh"
#include "cuda/lambda_value_loss.cuh"
#include "cuda/masked_mse.cuh"
#include "kernels/eos_mask.h"
#include "kernels/lambda_value_loss.h"
#include "kernels/masked_mse.h"

namespace lambda_return::cuda::testing {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr unsigned char kCanary = 0xff;  // NaN in every float format, a valid token in masks

inline constexpr bool kPlain = !CUDA_EMULATOR_TSAN && !CUDA_EMULATOR_ASAN;

// ---- reports ----

inline int failures = 0;
inline std::string current_case;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("wrong result: %s: %s\n", current_case.c_str(), what.c_str());
}

// ---- memory ----

// Exactly this many bytes, aligned as torch's allocator at least does, full of canaries.
inline std::shared_ptr<char> allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  memset(memory, kCanary, static_cast<size_t>(bytes));
  return {static_cast<char*>(memory), std::free};
}

// How the matrices of a case lie in memory, in elements.
enum class Layout {
  kDense,         // stride T: with T odd, every row starts elsewhere relative to 16 bytes
  kPadded,        // every row starts on a boundary
  kShifted,       // no row starts on a boundary, and all matrices start alike
  kMaskShifted,   // only the masks start elsewhere: no 16-byte accesses from here on
  kOutputStride,  // only the outputs have another stride
  kAllDifferent,
  kCount,
};
inline constexpr const char* kLayoutNames[] = {"dense",        "padded",        "shifted",
                                               "mask shifted", "output stride", "all different"};
inline bool vectorized(Layout layout) { return layout < Layout::kMaskShifted; }

enum class Role { kValues, kMask, kOutput };

struct Place {
  int64_t offset, stride;
};
inline Place place(Layout layout, Role role, int64_t T) {
  switch (layout) {
    case Layout::kPadded:
      return {0, (T + 15) / 8 * 8};
    case Layout::kShifted:
      return {5, T + 2};
    case Layout::kMaskShifted:
      return {role == Role::kMask ? 1 : 0, T};
    case Layout::kOutputStride:
      return {0, T + (role == Role::kOutput ? 1 : 0)};
    case Layout::kAllDifferent:
      return {1 + static_cast<int>(role), T + 1 + static_cast<int>(role)};
    default:
      return {0, T};
  }
}

// A [B, T] matrix inside an allocation of canaries. Ends at its last element; in builds that would not see an access
// beyond, at canaries of its own.
template <class Element>
class Matrix {
 public:
  Matrix(int64_t B, int64_t T, Place place) : B_(B), T_(T), place_(place) {
    constexpr int64_t kTail = CUDA_EMULATOR_ASAN ? 0 : 16;
    elements_ = place.offset + (B - 1) * place.stride + T + kTail;
    memory_ = allocate(elements_ * static_cast<int64_t>(sizeof(Element)));
  }

  Element* operator[](int64_t row) const { return data() + place_.offset + row * place_.stride; }
  Rows<Element> rows() const { return {(*this)[0], place_.stride}; }
  Rows<const Element> const_rows() const { return {(*this)[0], place_.stride}; }

  bool canaries_are_alive() const {
    for (int64_t i = 0; i < elements_; ++i) {
      const int64_t from_first = i - place_.offset, row = from_first / place_.stride;
      if (from_first >= 0 && row < B_ && from_first % place_.stride < T_) continue;
      const auto* bytes = reinterpret_cast<const unsigned char*>(data() + i);
      for (size_t byte = 0; byte < sizeof(Element); ++byte) {
        if (bytes[byte] != kCanary) return false;
      }
    }
    return true;
  }
  bool same_bits(const Matrix& other) const {
    return memcmp(data(), other.data(), static_cast<size_t>(elements_) * sizeof(Element)) == 0;
  }

 private:
  Element* data() const { return reinterpret_cast<Element*>(memory_.get()); }

  int64_t B_, T_, elements_;
  Place place_;
  std::shared_ptr<char> memory_;
};

// A [B, T] matrix, or tokens with T logits each, with more than 2^31 elements from one row to the next: an index of 32
// bits ends up elsewhere. Memory is taken by the pages that are touched alone, and there is none where the system
// grants no such addresses.
template <class Element>
class FarMatrix {
 public:
  static constexpr int64_t kStride = (int64_t(1) << 31) + 64;

  FarMatrix(int64_t B, int64_t T) {
    const auto bytes = static_cast<size_t>(((B - 1) * kStride + T) * static_cast<int64_t>(sizeof(Element)));
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = {static_cast<Element*>(memory), [bytes](Element* p) { munmap(p, bytes); }};
  }
  // With the rows of another matrix.
  template <class Matrix>
  static FarMatrix copy_of(const Matrix& matrix, int64_t B, int64_t T) {
    FarMatrix far(B, T);
    for (int64_t row = 0; row < B; ++row) {
      memcpy(far[row], matrix[row], static_cast<size_t>(T) * sizeof(Element));
    }
    return far;
  }

  Element* operator[](int64_t row) const { return memory_.get() + row * kStride; }
  Rows<Element> rows() const { return {memory_.get(), kStride}; }
  Rows<const Element> const_rows() const { return {memory_.get(), kStride}; }

 private:
  std::shared_ptr<Element> memory_;
};

// Whether rows of two matrices have the same bits.
template <class A, class B_>
void expect_same_rows(const char* what, const A& a, const B_& b, int64_t B, int64_t T) {
  for (int64_t row = 0; row < B; ++row) {
    expect(memcmp(a[row], b[row], static_cast<size_t>(T) * sizeof(a[row][0])) == 0, what);
  }
}

// What was in the workspace before a launch must not matter.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(allocate(bytes)) {
    memset(memory_.get(), 0xa5, static_cast<size_t>(bytes));
  }
  void* data() const { return memory_.get(); }

 private:
  std::shared_ptr<char> memory_;
};

// ---- inputs ----

// Marsaglia's and Vigna's splitmix64.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)

 private:
  uint64_t state_;
};

enum class MaskKind { kGaps, kConversation, kDense, kNothing, kFirstToken, kEmptyRows, kCount };

inline bool is_valid(MaskKind kind, int64_t row, int64_t t, int64_t T, double noise) {
  switch (kind) {
    case MaskKind::kGaps:
      return noise < 0.6;
    case MaskKind::kConversation:  // prompt, gaps, padding
      return noise < 0.8 && t >= T / 4 && t < T - (row + 1) * T / 10;
    case MaskKind::kDense:
      return true;
    case MaskKind::kFirstToken:
      return t == 0;
    case MaskKind::kEmptyRows:
      return row % 2 == 1 && noise < 0.6;
    default:
      return false;
  }
}

// A byte counts as valid unless it is 0.
inline uint8_t mask_byte(bool valid, Noise& noise) {
  constexpr uint8_t kNonzero[] = {1, 2, 0x80, 0xff};
  return valid ? kNonzero[noise.bits() % 4] : 0;
}

struct Case {
  int64_t B, T;
  Layout layout = Layout::kDense;
  MaskKind mask = MaskKind::kGaps;
  double gamma = 1.0, lam = 0.95;
  bool infinite_rewards = false;
  std::optional<ScanPlan> plan = std::nullopt;  // else the one that the shape asks for
};

template <class scalar_t>
inline constexpr const char* kTypeName = "float";
template <>
inline constexpr const char* kTypeName<double> = "double";
template <>
inline constexpr const char* kTypeName<__half> = "half";
template <>
inline constexpr const char* kTypeName<__nv_bfloat16> = "bfloat16";

inline std::string name_of(const Case& c, const char* type) {
  char text[256];
  std::snprintf(
      text, sizeof(text), "%s [%lld, %lld], %s, mask %d, gamma %g, lam %g%s%s", type, static_cast<long long>(c.B),
      static_cast<long long>(c.T), kLayoutNames[static_cast<int>(c.layout)], static_cast<int>(c.mask), c.gamma, c.lam,
      c.infinite_rewards ? ", infinite rewards" : "", c.plan ? ", plan by hand" : "");
  return text;
}

template <class scalar_t>
struct Inputs {
  using acc_t = accumulate_t<scalar_t>;

  Case c;
  Matrix<scalar_t> values, targets, grad_returns;
  Matrix<acc_t> wide_targets;
  Matrix<uint8_t> attention_mask, loss_mask;
  std::vector<acc_t> rewards;
  int64_t num_tokens = 0, num_counted = 0;  // of loss_mask, of both masks

  explicit Inputs(const Case& c)
      : c(c),
        values(matrix<scalar_t>(Role::kValues)),
        targets(matrix<scalar_t>(Role::kValues)),
        grad_returns(matrix<scalar_t>(Role::kValues)),
        wide_targets(matrix<acc_t>(Role::kValues)),
        attention_mask(matrix<uint8_t>(Role::kMask)),
        loss_mask(matrix<uint8_t>(Role::kMask)) {
    Noise noise(static_cast<uint64_t>(c.B * 1000003 + c.T));
    for (int64_t row = 0; row < c.B; ++row) {
      const double sign = noise.uniform() < 0.5 ? -1.0 : 1.0;
      rewards.push_back(static_cast<acc_t>(sign * (c.infinite_rewards ? kInf : noise.uniform())));
      for (int64_t t = 0; t < c.T; ++t) fill(row, t, noise);
    }
  }

  // The gradient that makes the scale of a mean's gradient 1.5: no token count brings rounding of its own.
  acc_t grad_loss(int64_t tokens) const { return static_cast<acc_t>(tokens == 0 ? 1.0 : 0.75 * double(tokens)); }

 private:
  template <class T>
  Matrix<T> matrix(Role role) const {
    return Matrix<T>(c.B, c.T, place(c.layout, role, c.T));
  }
  void fill(int64_t row, int64_t t, Noise& noise) {
    const bool valid = is_valid(c.mask, row, t, c.T, noise.uniform()), attended = noise.uniform() < 0.8;
    loss_mask[row][t] = mask_byte(valid, noise);
    attention_mask[row][t] = mask_byte(attended, noise);
    num_tokens += valid;
    num_counted += valid && attended;
    const auto draw = [&] { return static_cast<acc_t>(valid ? 4 * noise.uniform() - 2 : kNaN); };
    values[row][t] = narrow<scalar_t>(draw());
    targets[row][t] = narrow<scalar_t>(draw());
    grad_returns[row][t] = narrow<scalar_t>(draw());
    wide_targets[row][t] = draw();
  }
};

// ---- outputs ----

template <class acc_t>
struct Mean {
  acc_t loss = static_cast<acc_t>(kNaN);
  int64_t num_tokens = -1;
};

// Every output of every operator.
template <class scalar_t>
struct Outputs {
  using acc_t = accumulate_t<scalar_t>;

  Matrix<scalar_t> returns, grad_values, loss_gradient, one_mask_gradient, mse_gradient, wide_mse_gradient;
  std::vector<acc_t> grad_rewards;
  Mean<acc_t> loss, one_mask_loss, mse, wide_mse;

  explicit Outputs(const Case& c)
      : returns(matrix(c)),
        grad_values(matrix(c)),
        loss_gradient(matrix(c)),
        one_mask_gradient(matrix(c)),
        mse_gradient(matrix(c)),
        wide_mse_gradient(matrix(c)),
        grad_rewards(static_cast<size_t>(c.B), static_cast<acc_t>(kNaN)) {}

  // body(name, matrix or mean, the same of other) for each of them but grad_rewards.
  template <class Other, class Body>
  void for_each(const Other& other, const Body& body) const {
    body("returns", returns, other.returns);
    body("grad_values", grad_values, other.grad_values);
    body("loss gradient", loss_gradient, other.loss_gradient);
    body("one-mask loss gradient", one_mask_gradient, other.one_mask_gradient);
    body("mse gradient", mse_gradient, other.mse_gradient);
    body("wide mse gradient", wide_mse_gradient, other.wide_mse_gradient);
    body("loss", loss, other.loss);
    body("one-mask loss", one_mask_loss, other.one_mask_loss);
    body("mse", mse, other.mse);
    body("wide mse", wide_mse, other.wide_mse);
  }

 private:
  static Matrix<scalar_t> matrix(const Case& c) {
    return Matrix<scalar_t>(c.B, c.T, place(c.layout, Role::kOutput, c.T));
  }
};

// ---- the launch functions ----

template <class scalar_t>
void run_lambda_return(const Inputs<scalar_t>& in, const ScanPlan& plan, Outputs<scalar_t>& out) {
  using acc_t = accumulate_t<scalar_t>;
  const Case& c = in.c;
  launch_lambda_return<scalar_t>(
      c.B, c.T, in.values.const_rows(), in.rewards.data(), in.loss_mask.const_rows(), c.gamma, c.lam,
      out.returns.rows(), plan, Workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
  launch_lambda_return_backward<scalar_t>(
      c.B, c.T, in.grad_returns.const_rows(), in.loss_mask.const_rows(), c.gamma, c.lam, out.grad_values.rows(),
      out.grad_rewards.data(), plan, Workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
}

template <class scalar_t>
void run_value_loss(
    const Inputs<scalar_t>& in, const Matrix<uint8_t>& attention_mask, int64_t tokens, const ScanPlan& plan,
    Mean<accumulate_t<scalar_t>>& mean, Matrix<scalar_t>& gradient) {
  const Case& c = in.c;
  const ValueLossInputs<scalar_t> inputs{
      c.B,     c.T,  in.values.const_rows(), in.rewards.data(), attention_mask.const_rows(), in.loss_mask.const_rows(),
      c.gamma, c.lam};
  const auto grad_loss = in.grad_loss(tokens);
  launch_lambda_value_loss<scalar_t>(
      inputs, &mean.loss, &mean.num_tokens, plan, Workspace(lambda_value_loss_workspace_bytes<scalar_t>(plan)).data(),
      nullptr);
  launch_lambda_value_loss_backward<scalar_t>(
      inputs, &grad_loss, &mean.num_tokens, gradient.rows(), plan,
      Workspace(plan.workspace_bytes<accumulate_t<scalar_t>>()).data(), nullptr);
}

template <class scalar_t, class target_t>
void run_masked_mse(
    const Inputs<scalar_t>& in, const Matrix<target_t>& targets, Mean<accumulate_t<scalar_t>>& mean,
    Matrix<scalar_t>& gradient) {
  const Case& c = in.c;
  const MseInputs<scalar_t, target_t> inputs{
      c.B, c.T, in.values.const_rows(), targets.const_rows(), in.loss_mask.const_rows()};
  const auto grad_loss = in.grad_loss(in.num_tokens);
  launch_masked_mse(
      inputs, &mean.loss, &mean.num_tokens, Workspace(masked_mse_workspace_bytes(inputs)).data(), nullptr);
  launch_masked_mse_backward(inputs, &grad_loss, &mean.num_tokens, gradient.rows(), nullptr);
}

template <class scalar_t>
Outputs<scalar_t> run(const Inputs<scalar_t>& in) {
  const ScanPlan plan = in.c.plan.value_or(ScanPlan::of(in.c.B, in.c.T, kItems<scalar_t>));
  Outputs<scalar_t> out(in.c);
  run_value_loss(in, in.attention_mask, in.num_counted, plan, out.loss, out.loss_gradient);
  run_value_loss(in, in.loss_mask, in.num_tokens, plan, out.one_mask_loss, out.one_mask_gradient);
  run_lambda_return(in, plan, out);
  run_masked_mse(in, in.targets, out.mse, out.mse_gradient);
  run_masked_mse(in, in.wide_targets, out.wide_mse, out.wide_mse_gradient);
  return out;
}

// ---- what they must be ----

// Inputs in float64 and what the row functions make of them. Only layout and types differ from Outputs.
struct Expected {
  Matrix<double> returns, grad_values, loss_gradient, one_mask_gradient, mse_gradient, wide_mse_gradient;
  std::vector<double> grad_rewards;
  SquaredError loss, one_mask_loss, mse, wide_mse;
};

template <class Element>
std::vector<double> widened(const Element* row, int64_t T) {
  std::vector<double> result;
  for (int64_t t = 0; t < T; ++t) result.push_back(static_cast<double>(widen(row[t])));
  return result;
}

template <class scalar_t>
Expected expected_outputs(const Inputs<scalar_t>& in) {
  const int64_t B = in.c.B, T = in.c.T;
  // The coefficients as the kernels have them: rounding lam once is no error of the scan.
  const auto rounded = Discount<accumulate_t<scalar_t>>::from(in.c.gamma, in.c.lam);
  const Discount<double> discount{static_cast<double>(rounded.value), static_cast<double>(rounded.carry)};
  const auto matrix = [&] { return Matrix<double>(B, T, {0, T}); };
  Expected e{matrix(), matrix(), matrix(), matrix(), matrix(), matrix(), {}, {}, {}, {}, {}};
  const auto scale = [&](int64_t tokens) { return mean_squared_error_scale(double(in.grad_loss(tokens)), tokens); };
  const double two_masks = scale(in.num_counted), one_mask = scale(in.num_tokens);
  for (int64_t row = 0; row < B; ++row) {
    const auto values = widened(in.values[row], T), targets = widened(in.targets[row], T);
    const auto wide_targets = widened(in.wide_targets[row], T), gradients = widened(in.grad_returns[row], T);
    const double *v = values.data(), reward = static_cast<double>(in.rewards[static_cast<size_t>(row)]);
    const uint8_t *attended = in.attention_mask[row], *mask = in.loss_mask[row];
    lambda_return_row(v, mask, T, reward, discount, e.returns[row]);
    e.grad_rewards.push_back(
        lambda_return_backward_row<double, double>(gradients.data(), mask, T, discount, e.grad_values[row]));
    e.loss.add(lambda_value_loss_row(v, attended, mask, T, reward, discount));
    e.one_mask_loss.add(lambda_value_loss_row(v, mask, mask, T, reward, discount));
    lambda_value_loss_backward_row(v, attended, mask, T, reward, discount, two_masks, e.loss_gradient[row]);
    lambda_value_loss_backward_row(v, mask, mask, T, reward, discount, one_mask, e.one_mask_gradient[row]);
    e.mse.add(masked_mse_row(v, targets.data(), mask, T));
    e.wide_mse.add(masked_mse_row(v, wide_targets.data(), mask, T));
    masked_mse_backward_row(v, targets.data(), mask, T, one_mask, e.mse_gradient[row]);
    masked_mse_backward_row(v, wide_targets.data(), mask, T, one_mask, e.wide_mse_gradient[row]);
  }
  return e;
}

// ---- comparisons ----

// Half the distance between neighbours of scalar_t around 1 may be lost to rounding; twice that is allowed.
template <class scalar_t>
inline constexpr double kRounding = 0x1p-23;
template <>
inline constexpr double kRounding<double> = 0x1p-52;
template <>
inline constexpr double kRounding<__half> = 0x1p-10;
template <>
inline constexpr double kRounding<__nv_bfloat16> = 0x1p-7;

// Equal infinities are close. Values are below 2 and discounted sums of them below 200: they err by a few units of the
// accumulation type at that scale, though they may cancel to less.
template <class scalar_t>
bool is_close(double actual, double exact) {
  constexpr double kAccumulated = 64 * kRounding<accumulate_t<scalar_t>>;
  return actual == exact || std::abs(actual - exact) <=
                                kRounding<scalar_t> * std::abs(exact) + kAccumulated * std::fmax(1.0, std::abs(exact));
}

template <class scalar_t>
void check_matrix(const char* name, const Case& c, const Matrix<scalar_t>& actual, const Matrix<double>& exact) {
  expect(actual.canaries_are_alive(), std::string(name) + " was written outside of its rows");
  for (int64_t row = 0; row < c.B; ++row) {
    for (int64_t t = 0; t < c.T; ++t) {
      const double value = static_cast<double>(widen(actual[row][t]));
      if (is_close<scalar_t>(value, exact[row][t])) continue;
      char text[160];
      std::snprintf(
          text, sizeof(text), "%s[%lld, %lld] is %.9g, not %.9g", name, static_cast<long long>(row),
          static_cast<long long>(t), value, exact[row][t]);
      return expect(false, text);
    }
  }
}

template <class scalar_t>
void check_mean(const char* name, const Mean<accumulate_t<scalar_t>>& actual, const SquaredError& exact) {
  expect(actual.num_tokens == exact.num_tokens, std::string(name) + ": token count");
  expect(is_close<accumulate_t<scalar_t>>(static_cast<double>(actual.loss), exact.mean()), name);
}

template <class scalar_t>
void check(const Inputs<scalar_t>& in, const Outputs<scalar_t>& out) {
  struct {
    const Case& c;
    void operator()(const char* name, const Matrix<scalar_t>& actual, const Matrix<double>& exact) const {
      check_matrix(name, c, actual, exact);
    }
    void operator()(const char* name, const Mean<accumulate_t<scalar_t>>& actual, const SquaredError& exact) const {
      check_mean<scalar_t>(name, actual, exact);
    }
  } const compare{in.c};
  const Expected expected = expected_outputs(in);
  out.for_each(expected, compare);
  for (size_t row = 0; row < out.grad_rewards.size(); ++row) {
    const bool ok =
        is_close<accumulate_t<scalar_t>>(static_cast<double>(out.grad_rewards[row]), expected.grad_rewards[row]);
    expect(ok, "grad_terminal_rewards[" + std::to_string(row) + "]");
  }
}

template <class scalar_t>
void check_same_bits(const Outputs<scalar_t>& first, const Outputs<scalar_t>& other, const std::string& schedule) {
  using acc_t = accumulate_t<scalar_t>;
  struct {
    const std::string& schedule;
    void operator()(const char* name, const Matrix<scalar_t>& a, const Matrix<scalar_t>& b) const {
      expect(a.same_bits(b), name + (" has other bits under schedule " + schedule));
    }
    void operator()(const char* name, const Mean<acc_t>& a, const Mean<acc_t>& b) const {
      const bool same = memcmp(&a.loss, &b.loss, sizeof(acc_t)) == 0 && a.num_tokens == b.num_tokens;
      expect(same, name + (" has other bits under schedule " + schedule));
    }
  } const compare{schedule};
  first.for_each(other, compare);
  const size_t bytes = first.grad_rewards.size() * sizeof(acc_t);
  expect(
      memcmp(first.grad_rewards.data(), other.grad_rewards.data(), bytes) == 0,
      "grad_terminal_rewards has other bits under schedule " + schedule);
}

// ---- a case under schedules ----

inline std::string use_schedule(cuda_emulator::Order order, unsigned seed, int resident_blocks) {
  cuda_emulator::schedule.order = order;
  cuda_emulator::schedule.seed = seed;
  cuda_emulator::schedule.resident_blocks = resident_blocks;
  constexpr const char* kNames[] = {"ascending", "descending", "random "};
  std::string name = kNames[static_cast<int>(order)];
  if (order == cuda_emulator::Order::kRandom) name += std::to_string(seed);
  return name + ", " + std::to_string(resident_blocks) + " resident";
}

struct ScheduleSpec {
  cuda_emulator::Order order;
  unsigned seed;
  int resident_blocks;
};

// Right under the first schedule, the same bits under all others.
template <class scalar_t>
void test_case(const Case& c, const std::vector<ScheduleSpec>& schedules) {
  current_case = name_of(c, kTypeName<scalar_t>);
  const Inputs<scalar_t> in(c);
  std::optional<Outputs<scalar_t>> first;
  for (const ScheduleSpec& spec : schedules) {
    const std::string name = use_schedule(spec.order, spec.seed, spec.resident_blocks);
    Outputs<scalar_t> out = run(in);
    if (first) {
      check_same_bits(*first, out, name);
    } else {
      check(in, out);
      first.emplace(std::move(out));
    }
  }
}

// A plan for few long rows whose segments have this many tiles.
template <class scalar_t>
ScanPlan plan_of_segments(int64_t B, int64_t T, int64_t tiles) {
  const int64_t tile = int64_t(kThreads) * kItems<scalar_t>;
  const int64_t segments = ((T + kItems<scalar_t> - 1 + tile - 1) / tile + tiles - 1) / tiles;
  return {ScanPlan::kLongRows, segments * B, segments, tiles};
}

}  // namespace lambda_return::cuda::testing
