// The operator library from C++ alone, as a program without Python uses it: load the shared library, then call the
// operators through torch's dispatcher.
#include "torch_abi.h"

#include <dlfcn.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <tuple>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace boxed = torch::stable::detail;  // conversion to and from the dispatcher's stack

namespace {

template <class T, size_t N>
Tensor tensor(const std::array<T, N>& data, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor result = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
  std::copy(data.begin(), data.end(), static_cast<T*>(result.mutable_data_ptr()));
  return result;
}

bool is(const Tensor& x, std::initializer_list<float> expected) {
  bool ok = x.numel() == static_cast<int64_t>(expected.size());
  const float* data = x.const_data_ptr<float>();
  for (float value : expected) ok = ok && std::abs(*data++ - value) < 1e-6f;
  return ok;
}

int run() {
  const Tensor values = tensor<float>(std::array{0.25f, 9.0f, 0.5f, 0.75f}, {1, 4}, ScalarType::Float);
  const Tensor rewards = tensor<float>(std::array{1.0f}, {1}, ScalarType::Float);
  const Tensor mask = tensor<uint8_t>(std::array<uint8_t, 4>{1, 0, 1, 1}, {1, 4}, ScalarType::Byte);

  // gamma 1, lam 0.5: G = 1 at the end, then (0.75 + 1) / 2, a gap, and (0.5 + 0.875) / 2.
  std::array<StableIValue, 5> stack{
      boxed::from(values), boxed::from(rewards), boxed::from(mask), boxed::from(1.0), boxed::from(0.5)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("lambda_return::lambda_return", "", stack.data(), TORCH_ABI_VERSION));
  const bool returns_ok = is(boxed::to<Tensor>(stack[0]), {0.6875f, 0.0f, 0.875f, 1.0f});

  std::array<StableIValue, 6> loss_stack{boxed::from(values), boxed::from(rewards), boxed::from(mask),
                                         boxed::from(mask),   boxed::from(1.0),     boxed::from(0.5)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("lambda_return::lambda_value_loss", "", loss_stack.data(), TORCH_ABI_VERSION));
  const float sum = 0.4375f * 0.4375f + 0.375f * 0.375f + 0.25f * 0.25f;
  const Tensor num_tokens = boxed::to<Tensor>(loss_stack[1]);
  const bool loss_ok = is(boxed::to<Tensor>(loss_stack[0]), {sum / 3}) && *num_tokens.const_data_ptr<int64_t>() == 3;

  std::printf("lambda_return %s, lambda_value_loss %s\n", returns_ok ? "ok" : "WRONG", loss_ok ? "ok" : "WRONG");
  return returns_ok && loss_ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::printf("usage: ops_test PATH_OF_THE_OPERATOR_LIBRARY (%s)\n", argc == 2 ? dlerror() : "no path");
    return 2;
  }
  return run();
}
