// The Python module `emulated_kernels`: the shipped launch functions under the emulator, on NumPy arrays in place of
// device memory. tests/ops/test_emulated_kernels.py drives it.
//
// float64, float32 and float16 arrays are what they are, uint16 arrays are the bits of bfloat16. Masks are uint8.
// Rows are contiguous in T and may be any number of elements apart, as the operators hand them to the kernels. Outputs
// are new, and full of NaN before the launch, as workspaces are of garbage.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cuda/eos_mask.cuh"
#include "cuda/lambda_value_loss.cuh"
#include "cuda/masked_mse.cuh"

namespace py = pybind11;

namespace lambda_return::cuda::testing {
namespace {

// ---- arrays ----

template <class scalar_t>
inline constexpr char kTypeCode = py::format_descriptor<scalar_t>::c;
template <>
inline constexpr char kTypeCode<__half> = 'e';
template <>
inline constexpr char kTypeCode<__nv_bfloat16> = 'H';

template <class Element>
py::array new_array(std::vector<py::ssize_t> shape) {
  py::array array(py::dtype(std::string(1, kTypeCode<Element>)), std::move(shape));
  memset(array.mutable_data(), 0xff, static_cast<size_t>(array.nbytes()));  // NaN
  return array;
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

std::vector<std::max_align_t> workspace(int64_t bytes) {
  std::vector<std::max_align_t> memory(static_cast<size_t>(bytes) / sizeof(std::max_align_t) + 1);
  memset(memory.data(), 0xa5, memory.size() * sizeof(std::max_align_t));
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

// The kernel that the shape asks for, as (name, blocks, segments of a row, tiles of a segment).
py::tuple plan(int64_t B, int64_t T, int items) {
  constexpr const char* kNames[] = {"warp per row", "block per row", "long rows"};
  const ScanPlan plan = ScanPlan::of(B, T, items);
  return py::make_tuple(kNames[plan.kind], plan.blocks, plan.segments, plan.tiles);
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
}

}  // namespace lambda_return::cuda::testing
