// The Python module `emulated_kernels`: the shipped launch functions under the emulator, on NumPy arrays in place of
// device memory. tests/ops/test_emulated_kernels.py drives it.
//
// float64, float32 and float16 arrays are what they are, uint16 arrays are the bits of bfloat16. Masks are uint8.
// Rows are contiguous in T and may be any number of elements apart, as the operators hand them to the kernels. Outputs
// are new, and full of NaN before the launch, as workspaces are of garbage.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "cuda/categorical_value_loss.cuh"
#include "cuda/eos_mask.cuh"
#include "cuda/lambda_value_loss.cuh"
#include "cuda/masked_mse.cuh"
#include "cuda/td_lambda_loss.cuh"

namespace py = pybind11;

namespace lambda_return::cuda::testing {
namespace {

// ---- arrays ----

template <class scalar_t>
inline constexpr char kTypeCode = py::format_descriptor<scalar_t>::c;
template <>
inline constexpr char kTypeCode<int64_t> = 'l';  // as NumPy on Linux says
template <>
inline constexpr char kTypeCode<__half> = 'e';
template <>
inline constexpr char kTypeCode<__nv_bfloat16> = 'H';

// Aligned as torch's allocator at least does: where 16-byte accesses begin depends on it.
template <class Element>
py::array new_array(std::vector<py::ssize_t> shape) {
  size_t bytes = sizeof(Element);
  for (py::ssize_t size : shape) bytes *= static_cast<size_t>(size);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  memset(memory, 0xff, bytes);  // NaN
  const py::capsule owner(memory, [](void* p) { std::free(p); });
  return py::array(py::dtype(std::string(1, kTypeCode<Element>)), std::move(shape), memory, owner);
}

void require(bool ok, const char* what) {
  if (!ok) throw py::value_error(what);
}

template <class Element>
const Element* elements(const py::array& array, py::ssize_t ndim) {
  require(array.dtype().char_() == kTypeCode<Element>, "an array has another dtype than its place asks for");
  require(array.ndim() == ndim, "an array has the wrong number of dimensions");
  return static_cast<const Element*>(array.data());
}

// A [B, T] array whose rows are contiguous.
template <class Element>
Rows<const Element> rows(const py::array& array) {
  const Element* data = elements<Element>(array, 2);
  require(array.shape(1) <= 1 || array.strides(1) == py::ssize_t(sizeof(Element)), "rows must be contiguous in T");
  require(array.strides(0) % py::ssize_t(sizeof(Element)) == 0, "rows must be whole elements apart");
  return {data, array.strides(0) / py::ssize_t(sizeof(Element))};
}

template <class Element>
Rows<Element> output_rows(py::array& array) {
  return {static_cast<Element*>(array.mutable_data()), array.shape(1)};
}

template <class Element>
const Element* vector(const py::array& array) {
  require(array.ndim() == 0 || array.shape(0) <= 1 || array.strides(0) == array.itemsize(), "must be contiguous");
  return elements<Element>(array, array.ndim());
}

// Calls body with a null pointer of the value type.
template <class Body>
py::object dispatch(const py::array& values, const Body& body) {
  switch (values.dtype().char_()) {
    case 'f':
      return body(static_cast<float*>(nullptr));
    case 'd':
      return body(static_cast<double*>(nullptr));
    case 'e':
      return body(static_cast<__half*>(nullptr));
    case 'H':
      return body(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw py::type_error("values must be float32, float64, float16 or the bits of bfloat16 as uint16");
  }
}
#define SCALAR(pointer) std::remove_pointer_t<decltype(pointer)>

// Aligned as new_array.
struct alignas(64) Line {
  char bytes[64];
};
std::vector<Line> workspace(int64_t bytes) {
  std::vector<Line> memory(static_cast<size_t>(bytes) / sizeof(Line) + 1);
  memset(memory.data(), 0xa5, memory.size() * sizeof(Line));
  return memory;
}

// ---- the operators ----

py::object lambda_return(
    const py::array& values, const py::array& terminal_rewards, const py::array& mask, double gamma, double lam) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const int64_t B = values.shape(0), T = values.shape(1);
    const ScanPlan plan = ScanPlan::of(B, T, kItems<scalar_t>);
    py::array returns = new_array<scalar_t>({B, T});
    launch_lambda_return<scalar_t>(
        B, T, rows<scalar_t>(values), vector<acc_t>(terminal_rewards), rows<uint8_t>(mask), gamma, lam,
        output_rows<scalar_t>(returns), plan, workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
    return returns;
  });
}

py::object lambda_return_backward(const py::array& grad_returns, const py::array& mask, double gamma, double lam) {
  return dispatch(grad_returns, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const int64_t B = grad_returns.shape(0), T = grad_returns.shape(1);
    const ScanPlan plan = ScanPlan::of(B, T, kItems<scalar_t>);
    py::array grad_values = new_array<scalar_t>({B, T}), grad_rewards = new_array<acc_t>({B});
    launch_lambda_return_backward<scalar_t>(
        B, T, rows<scalar_t>(grad_returns), rows<uint8_t>(mask), gamma, lam, output_rows<scalar_t>(grad_values),
        static_cast<acc_t*>(grad_rewards.mutable_data()), plan, workspace(plan.workspace_bytes<acc_t>()).data(),
        nullptr);
    return py::make_tuple(grad_values, grad_rewards);
  });
}

template <class scalar_t>
ValueLossInputs<scalar_t> value_loss_inputs(
    const py::array& values, const py::array& terminal_rewards, const py::array& attention_mask,
    const py::array& loss_mask, double gamma, double lam) {
  return {
      values.shape(0),
      values.shape(1),
      rows<scalar_t>(values),
      vector<accumulate_t<scalar_t>>(terminal_rewards),
      rows<uint8_t>(attention_mask),
      rows<uint8_t>(loss_mask),
      gamma,
      lam};
}

// Returns (loss, num_tokens).
py::object lambda_value_loss(
    const py::array& values, const py::array& terminal_rewards, const py::array& attention_mask,
    const py::array& loss_mask, double gamma, double lam) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    const auto in = value_loss_inputs<scalar_t>(values, terminal_rewards, attention_mask, loss_mask, gamma, lam);
    const ScanPlan plan = in.plan();
    accumulate_t<scalar_t> loss{};
    int64_t num_tokens = -1;
    launch_lambda_value_loss<scalar_t>(
        in, &loss, &num_tokens, plan, workspace(lambda_value_loss_workspace_bytes<scalar_t>(plan)).data(), nullptr);
    return py::make_tuple(loss, num_tokens);
  });
}

py::object lambda_value_loss_backward(
    double grad_loss, int64_t num_tokens, const py::array& values, const py::array& terminal_rewards,
    const py::array& attention_mask, const py::array& loss_mask, double gamma, double lam) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const auto in = value_loss_inputs<scalar_t>(values, terminal_rewards, attention_mask, loss_mask, gamma, lam);
    const ScanPlan plan = in.plan();
    const auto grad = static_cast<acc_t>(grad_loss);
    py::array grad_values = new_array<scalar_t>({in.B, in.T});
    launch_lambda_value_loss_backward<scalar_t>(
        in, &grad, &num_tokens, output_rows<scalar_t>(grad_values), plan,
        workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
    return grad_values;
  });
}

// Targets are of the values' dtype or, like the unrounded targets of another kernel, of the accumulation type.
template <class Body>
py::object dispatch_targets(
    const py::array& values, const py::array& targets, const py::array& mask, const Body& body) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const int64_t B = values.shape(0), T = values.shape(1);
    if (targets.dtype().char_() == kTypeCode<acc_t>) {
      return body(MseInputs<scalar_t, acc_t>{B, T, rows<scalar_t>(values), rows<acc_t>(targets), rows<uint8_t>(mask)});
    }
    return body(
        MseInputs<scalar_t, scalar_t>{B, T, rows<scalar_t>(values), rows<scalar_t>(targets), rows<uint8_t>(mask)});
  });
}

// Returns (loss, num_tokens).
py::object masked_mse(const py::array& values, const py::array& targets, const py::array& mask) {
  return dispatch_targets(
      values, targets, mask, [&]<class scalar_t, class target_t>(const MseInputs<scalar_t, target_t>& in) {
        accumulate_t<scalar_t> loss{};
        int64_t num_tokens = -1;
        launch_masked_mse(in, &loss, &num_tokens, workspace(masked_mse_workspace_bytes(in)).data(), nullptr);
        return py::make_tuple(loss, num_tokens);
      });
}

py::object masked_mse_backward(
    double grad_loss, int64_t num_tokens, const py::array& values, const py::array& targets, const py::array& mask) {
  return dispatch_targets(
      values, targets, mask, [&]<class scalar_t, class target_t>(const MseInputs<scalar_t, target_t>& in) {
        const auto grad = static_cast<accumulate_t<scalar_t>>(grad_loss);
        py::array grad_values = new_array<scalar_t>({in.B, in.T});
        launch_masked_mse_backward(in, &grad, &num_tokens, output_rows<scalar_t>(grad_values), nullptr);
        return grad_values;
      });
}

// ---- the general operators: packed matrices are [1, total], and what may be absent is None ----

using Optional = std::optional<py::array>;

template <class Element>
Rows<const Element> optional_rows(const Optional& array) {
  return array ? rows<Element>(*array) : Rows<const Element>{nullptr, 0};
}

// What says where the sequences of the other arrays are, and their discounts.
struct Shape {
  Optional cu_seqlens;   // int64 [B + 1]
  py::array gamma, lam;  // float64, 0-dim or [B]

  Sequences sequences(const py::array& tokens) const {
    if (!cu_seqlens) return {tokens.shape(0), tokens.shape(1), nullptr};
    return {cu_seqlens->shape(0) - 1, tokens.shape(1), vector<int64_t>(*cu_seqlens)};
  }
  DiscountRows discounts() const { return discounts(lam); }
  DiscountRows discounts(const py::array& other_lam) const {
    return {vector<double>(gamma), vector<double>(other_lam), gamma.ndim() == 0 ? 0 : 1, other_lam.ndim() == 0 ? 0 : 1};
  }
};

template <class scalar_t>
TdLambdaInputs<scalar_t> general_inputs(
    const Shape& shape, const py::array& tokens, const Optional& terminal_rewards, const Optional& mask,
    const Optional& rewards) {
  using acc_t = accumulate_t<scalar_t>;
  return {
      shape.sequences(tokens), rows<scalar_t>(tokens), terminal_rewards ? vector<acc_t>(*terminal_rewards) : nullptr,
      optional_rows<uint8_t>(mask), optional_rows<acc_t>(rewards)};
}

template <class Element>
py::array new_like(const py::array& tokens) {
  return new_array<Element>({tokens.shape(0), tokens.shape(1)});
}

py::object td_lambda(
    const py::array& values, const py::array& terminal_rewards, const Optional& mask, const Optional& rewards,
    const Optional& cu_seqlens, const py::array& gamma, const py::array& lam, bool advantages) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    const Shape shape{cu_seqlens, gamma, lam};
    const auto in = general_inputs<scalar_t>(shape, values, terminal_rewards, mask, rewards);
    const ScanPlan plan = in.plan(1);
    py::array returns = new_like<scalar_t>(values);
    launch_td_lambda<scalar_t>(
        in, {shape.discounts(), advantages, output_rows<scalar_t>(returns)}, plan,
        workspace(plan.workspace_bytes<accumulate_t<scalar_t>>()).data(), nullptr);
    return returns;
  });
}

py::object td_lambda_pair(
    const py::array& values, const py::array& terminal_rewards, const Optional& mask, const Optional& rewards,
    const Optional& cu_seqlens, const py::array& gamma, const py::array& lam_returns, const py::array& lam_advantages) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    const Shape shape{cu_seqlens, gamma, lam_returns};
    const auto in = general_inputs<scalar_t>(shape, values, terminal_rewards, mask, rewards);
    const ScanPlan plan = in.plan(2);
    py::array returns = new_like<scalar_t>(values), advantages = new_like<scalar_t>(values);
    launch_td_lambda_pair<scalar_t>(
        in, {shape.discounts(), false, output_rows<scalar_t>(returns)},
        {shape.discounts(lam_advantages), true, output_rows<scalar_t>(advantages)}, plan,
        workspace(plan.workspace_bytes<accumulate_t<scalar_t>>()).data(), nullptr);
    return py::make_tuple(returns, advantages);
  });
}

py::object td_lambda_map(
    const py::array& values, const Optional& mask, const Optional& rewards, const Optional& cu_seqlens,
    const py::array& gamma, const py::array& lam) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const Shape shape{cu_seqlens, gamma, lam};
    const auto in = general_inputs<scalar_t>(shape, values, std::nullopt, mask, rewards);
    const ScanPlan plan = in.plan(2);
    py::array maps = new_array<acc_t>({in.sequences.B, 2});
    launch_td_lambda_map<scalar_t>(
        in, shape.discounts(), static_cast<acc_t*>(maps.mutable_data()), plan,
        workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
    return maps;
  });
}

// Returns (grad_values, grad_terminal_rewards, grad_rewards); the last is empty without with_rewards.
py::object td_lambda_backward(
    const py::array& grad_returns, const Optional& mask, const Optional& cu_seqlens, const py::array& gamma,
    const py::array& lam, bool with_rewards) {
  return dispatch(grad_returns, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const Shape shape{cu_seqlens, gamma, lam};
    const auto in = general_inputs<scalar_t>(shape, grad_returns, std::nullopt, mask, std::nullopt);
    const ScanPlan plan = in.plan(1);
    py::array grad_values = new_like<scalar_t>(grad_returns), grad_terminal = new_array<acc_t>({in.sequences.B});
    py::array grad_rewards = with_rewards ? new_like<acc_t>(grad_returns) : new_array<acc_t>({0, 0});
    launch_td_lambda_backward<scalar_t>(
        in, shape.discounts(), output_rows<scalar_t>(grad_values), static_cast<acc_t*>(grad_terminal.mutable_data()),
        with_rewards ? output_rows<acc_t>(grad_rewards) : Rows<acc_t>{}, plan,
        workspace(plan.workspace_bytes<acc_t>()).data(), nullptr);
    return py::make_tuple(grad_values, grad_terminal, grad_rewards);
  });
}

// What a loss is called with besides the arrays.
struct LossOptions {
  int kind;
  double delta, clip_range;
  int reduction;
};

template <class scalar_t>
TdLambdaLossInputs<scalar_t> loss_inputs(
    const Shape& shape, const py::array& values, const py::array& terminal_rewards, const Optional& mask,
    const Optional& attention_mask, const Optional& rewards, const Optional& old_values, const LossOptions& options) {
  using acc_t = accumulate_t<scalar_t>;
  return {
      general_inputs<scalar_t>(shape, values, terminal_rewards, mask, rewards),
      optional_rows<uint8_t>(attention_mask),
      optional_rows<scalar_t>(old_values),
      shape.discounts(),
      {static_cast<LossKind>(options.kind), static_cast<acc_t>(options.delta), static_cast<acc_t>(options.clip_range)},
      static_cast<Reduction>(options.reduction)};
}

// Returns (loss, scale, statistics).
py::object td_lambda_loss(
    const py::array& values, const py::array& terminal_rewards, const Optional& mask, const Optional& attention_mask,
    const Optional& rewards, const Optional& old_values, const Optional& cu_seqlens, const py::array& gamma,
    const py::array& lam, std::optional<double> normalizer, int kind, double delta, double clip_range, int reduction) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const auto in = loss_inputs<scalar_t>(
        {cu_seqlens, gamma, lam}, values, terminal_rewards, mask, attention_mask, rewards, old_values,
        {kind, delta, clip_range, reduction});
    const ScanPlan plan = in.plan(1);
    const bool reduces = in.reduction != Reduction::kNone;
    const auto divisor = static_cast<acc_t>(normalizer.value_or(0));
    py::array loss = reduces ? new_array<acc_t>({}) : new_like<acc_t>(values);
    py::array scale = new_array<acc_t>({in.sequences.B}), statistics = new_array<double>({TokenSums::kStatistics});
    launch_td_lambda_loss<scalar_t>(
        in, normalizer ? &divisor : nullptr,
        {reduces ? static_cast<acc_t*>(loss.mutable_data()) : nullptr,
         reduces ? Rows<acc_t>{} : output_rows<acc_t>(loss), static_cast<acc_t*>(scale.mutable_data()),
         static_cast<double*>(statistics.mutable_data())},
        plan, workspace(td_lambda_loss_workspace_bytes<scalar_t>(in, plan)).data(), nullptr);
    return py::make_tuple(loss, scale, statistics);
  });
}

// grad_loss: 0-dim, or of each token.
py::object td_lambda_loss_backward(
    const py::array& grad_loss, const py::array& scale, const py::array& values, const py::array& terminal_rewards,
    const Optional& mask, const Optional& attention_mask, const Optional& rewards, const Optional& old_values,
    const Optional& cu_seqlens, const py::array& gamma, const py::array& lam, int kind, double delta,
    double clip_range) {
  return dispatch(values, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const auto in = loss_inputs<scalar_t>(
        {cu_seqlens, gamma, lam}, values, terminal_rewards, mask, attention_mask, rewards, old_values,
        {kind, delta, clip_range, 0});
    const ScanPlan plan = in.plan(1);
    const bool reduces = grad_loss.ndim() == 0;
    py::array grad_values = new_like<scalar_t>(values);
    launch_td_lambda_loss_backward<scalar_t>(
        in, reduces ? vector<acc_t>(grad_loss) : nullptr, reduces ? Rows<const acc_t>{} : rows<acc_t>(grad_loss),
        vector<acc_t>(scale), output_rows<scalar_t>(grad_values), plan, workspace(plan.workspace_bytes<acc_t>()).data(),
        nullptr);
    return grad_values;
  });
}

// ---- values as classification: logits are [B, T, K], or [1, total, K] packed ----

// A [B, T, K] array whose K logits are next to one another.
template <class Element>
LogitRows<const Element> logit_rows(const py::array& array) {
  constexpr py::ssize_t kSize = sizeof(Element);
  const Element* data = elements<Element>(array, 3);
  require(array.strides(2) == kSize, "logits of a token must be contiguous");
  require(array.strides(0) % kSize == 0 && array.strides(1) % kSize == 0, "tokens must be whole elements apart");
  return {data, array.strides(0) / kSize, array.strides(1) / kSize};
}

struct BinOptions {
  int kind;
  double low, high, sigma;

  template <class acc_t>
  Bins<acc_t> bins(const py::array& logits) const {
    return Bins<acc_t>::of(kind, logits.shape(2), low, high, sigma);
  }
};

// Returns (loss, scale, statistics, returns, log_sums).
py::object categorical_value_loss(
    const py::array& logits, const py::array& terminal_rewards, const Optional& mask, const Optional& attention_mask,
    const Optional& rewards, const Optional& cu_seqlens, const py::array& gamma, const py::array& lam,
    std::optional<double> normalizer, int kind, double low, double high, double sigma, int reduction) {
  return dispatch(logits, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const Shape shape{cu_seqlens, gamma, lam};
    const CategoricalLossInputs<scalar_t> in{
        shape.sequences(logits),
        logit_rows<scalar_t>(logits),
        BinOptions{kind, low, high, sigma}.bins<acc_t>(logits),
        vector<acc_t>(terminal_rewards),
        optional_rows<uint8_t>(mask),
        optional_rows<uint8_t>(attention_mask),
        optional_rows<acc_t>(rewards),
        shape.discounts(),
        static_cast<Reduction>(reduction)};
    const ScanPlan plan = in.plan();
    const bool reduces = in.reduction != Reduction::kNone;
    const auto divisor = static_cast<acc_t>(normalizer.value_or(0));
    py::array loss = reduces ? new_array<acc_t>({}) : new_like<acc_t>(logits);
    py::array scale = new_array<acc_t>({in.sequences.B}), statistics = new_array<double>({TokenSums::kStatistics});
    py::array returns = new_like<acc_t>(logits), log_sums = new_like<acc_t>(logits);
    CategoricalLossOutputs<acc_t> out{};
    if (reduces) {
      out.loss = static_cast<acc_t*>(loss.mutable_data());
    } else {
      out.losses = output_rows<acc_t>(loss);
    }
    out.scale = static_cast<acc_t*>(scale.mutable_data());
    out.statistics = static_cast<double*>(statistics.mutable_data());
    out.returns = output_rows<acc_t>(returns);
    out.log_sums = output_rows<acc_t>(log_sums);
    launch_categorical_value_loss<scalar_t>(
        in, normalizer ? &divisor : nullptr, out, plan,
        workspace(categorical_value_loss_workspace_bytes<scalar_t>(in, plan)).data(), nullptr);
    return py::make_tuple(loss, scale, statistics, returns, log_sums);
  });
}

// grad_loss: 0-dim, or of each token. Returns the gradient of the logits.
py::object categorical_value_loss_backward(
    const py::array& grad_loss, const py::array& scale, const py::array& logits, const py::array& returns,
    const py::array& log_sums, const Optional& cu_seqlens, int kind, double low, double high, double sigma,
    int reduction) {
  return dispatch(logits, [&](auto* type) {
    using scalar_t = SCALAR(type);
    using acc_t = accumulate_t<scalar_t>;
    const bool reduces = grad_loss.ndim() == 0;
    const py::ssize_t T = logits.shape(1), K = logits.shape(2);
    py::array grad_logits = new_array<scalar_t>({logits.shape(0), T, K});
    if (grad_logits.size() == 0) return grad_logits;
    launch_categorical_value_loss_backward<scalar_t>(
        {Shape{cu_seqlens, {}, {}}.sequences(logits), logit_rows<scalar_t>(logits),
         BinOptions{kind, low, high, sigma}.bins<acc_t>(logits), rows<acc_t>(returns), rows<acc_t>(log_sums),
         reduces ? vector<acc_t>(grad_loss) : nullptr, reduces ? Rows<const acc_t>{} : rows<acc_t>(grad_loss),
         vector<acc_t>(scale), static_cast<Reduction>(reduction)},
        {static_cast<scalar_t*>(grad_logits.mutable_data()), T * K, K}, nullptr);
    return grad_logits;
  });
}

// mask: uint8 [B, T].
py::array eos_mask(const py::array& mask) {
  const Rows<const uint8_t> in = rows<uint8_t>(mask);
  py::array eos = new_array<uint8_t>({mask.shape(0), mask.shape(1)});
  memset(eos.mutable_data(), 0, static_cast<size_t>(eos.nbytes()));
  launch_eos_mask<uint8_t>(mask.shape(0), mask.shape(1), in.data, in.stride, 0xff, 1, eos.mutable_data(), nullptr);
  return eos;
}

// ---- what a test must know ----

void use_schedule(const std::string& order, unsigned seed, int resident_blocks) {
  using cuda_emulator::Order;
  require(order == "ascending" || order == "descending" || order == "random", "order");
  cuda_emulator::schedule.order = order == "ascending"    ? Order::kAscending
                                  : order == "descending" ? Order::kDescending
                                                          : Order::kRandom;
  cuda_emulator::schedule.seed = seed;
  cuda_emulator::schedule.resident_blocks = resident_blocks;
}

// (name, blocks, segments of a row, tiles of a segment)
py::tuple described(const ScanPlan& plan) {
  constexpr const char* kNames[] = {"warp per row", "block per row", "long rows"};
  return py::make_tuple(kNames[plan.kind], plan.blocks, plan.segments, plan.tiles);
}

// The kernel that the shape asks for.
py::tuple plan(int64_t B, int64_t T, int items) { return described(ScanPlan::of(B, T, items)); }
py::tuple packed_plan(int64_t B, int64_t total, int64_t outputs, int items) {
  return described(ScanPlan::of_packed(B, total, outputs, items));
}

// Tokens that a thread holds at a time.
py::object items(const py::array& values) {
  return dispatch(values, [](auto* type) { return py::int_(kItems<SCALAR(type)>); });
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, module) {
  module.attr("WARP") = kWarp;
  module.attr("THREADS") = kThreads;
  module.attr("BLOCKS_TO_FILL") = kBlocksToFill;
  module.def("use_schedule", use_schedule, py::arg("order"), py::arg("seed"), py::arg("resident_blocks"));
  module.def("plan", plan);
  module.def("items", items);
  module.def("lambda_return", lambda_return);
  module.def("lambda_return_backward", lambda_return_backward);
  module.def("lambda_value_loss", lambda_value_loss);
  module.def("lambda_value_loss_backward", lambda_value_loss_backward);
  module.def("masked_mse", masked_mse);
  module.def("masked_mse_backward", masked_mse_backward);
  module.def("eos_mask", eos_mask);
  module.def("packed_plan", packed_plan);
  module.def("td_lambda", td_lambda);
  module.def("td_lambda_pair", td_lambda_pair);
  module.def("td_lambda_map", td_lambda_map);
  module.def("td_lambda_backward", td_lambda_backward);
  module.def("td_lambda_loss", td_lambda_loss);
  module.def("td_lambda_loss_backward", td_lambda_loss_backward);
  module.def("categorical_value_loss", categorical_value_loss);
  module.def("categorical_value_loss_backward", categorical_value_loss_backward);
}

}  // namespace lambda_return::cuda::testing
