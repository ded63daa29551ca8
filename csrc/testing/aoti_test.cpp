// A package of AOTInductor that holds the operators, run without Python: see aoti_package.py.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

namespace {

// [B, 4]: the same sequence in every row. gamma 1, lam 0.5: G = 1 at the end, then (0.75 + 1) / 2, a gap, and
// (0.5 + 0.875) / 2. With a reward of 0.25 at each token besides: 1.25, then 0.25 + (0.75 + 1.25) / 2, and
// 0.25 + (0.5 + 1.25) / 2; at lam 1 it is 1.25, 1.5 and 1.75.
bool run(torch::inductor::AOTIModelPackageLoader& model, int64_t B) {
  const at::Tensor values = at::tensor({0.25f, 9.0f, 0.5f, 0.75f}).repeat({B, 1});
  const at::Tensor mask = at::tensor({1, 0, 1, 1}, at::kByte).repeat({B, 1});
  const auto outputs = model.run({values, at::ones({B}), mask, at::arange(B + 1) * 4, at::full({B}, 0.5f)});
  const at::Tensor returns = at::tensor({0.6875f, 0.0f, 0.875f, 1.0f}).repeat({B, 1});
  const at::Tensor squares = at::tensor(0.4375f * 0.4375f + 0.375f * 0.375f + 0.25f * 0.25f);
  // At lam 1 every target is 1, so that the cross-entropy of a token is -log sigmoid(2 V).
  const at::Tensor categorical = at::softplus(-2 * at::tensor({0.25f, 0.5f, 0.75f})).mean();
  // Tokens, and the sums of G, G^2, G - V, (G - V)^2 and of what was clipped.
  const at::Tensor statistics = B * at::tensor({3.0, 2.5625, 2.23828125, 1.0625, 0.39453125, 0.0});
  const at::Tensor rewarded = at::tensor({1.125f, 0.0f, 1.25f, 1.25f}).repeat({B, 1});
  const at::Tensor advantages = at::tensor({1.5f, 0.0f, 1.0f, 0.5f}).repeat({B, 1});
  return at::allclose(outputs[0], returns) && at::allclose(outputs[1], squares / 3) &&
         at::allclose(outputs[2], returns.flatten()) && at::allclose(outputs[3], squares * B / 2) &&
         at::allclose(outputs[4], categorical) && at::allclose(outputs[5], statistics) &&
         at::allclose(outputs[6], rewarded) && at::allclose(outputs[7], advantages);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::printf("usage: aoti_test PATH_OF_THE_OPERATOR_LIBRARY PACKAGE (%s)\n", argc == 3 ? dlerror() : "no path");
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const bool ok = run(model, 2) && run(model, 5);
  std::printf("the package is %s\n", ok ? "ok" : "WRONG");
  return ok ? 0 : 1;
}
