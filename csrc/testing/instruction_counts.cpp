// Runs one CPU kernel on rows of 8,192 tokens, for callgrind to count: see instruction_counts.py.
//
//   instruction_counts SET KERNEL MASK ROWS     with SET portable or avx2, MASK dense or gaps
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/simd/instruction_set.h"

using namespace lambda_return;
using namespace lambda_return::cpu;

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const std::string set_name = argv[1], kernel = argv[2];
  const bool gaps = std::string(argv[3]) == "gaps";
  const InstructionSet* set = set_name == "avx2" ? avx2() : portable();
  if (set == nullptr) return 3;
  constexpr int64_t T = 8192;
  std::vector<float> values(T, 0.5f), out(T);
  std::vector<uint8_t> mask(T, 1);
  for (int64_t t = 0; gaps && t < T; ++t) {
    mask[t] = t * 7919 % 10 < 7;
  }
  const RowKernels<float>& kernels = set->float32;
  const auto constants = kernels.constants(Discount<float>::from(1.0, 0.95));
  SquaredError error;
  for (int rows = std::atoi(argv[4]); rows > 0; --rows) {
    if (kernel == "lambda_return") {
      kernels.lambda_return(constants, values.data(), mask.data(), T, 1, out.data());
    } else if (kernel == "lambda_return_backward") {
      kernels.lambda_return_backward(constants, values.data(), mask.data(), T, 1, out.data());
    } else if (kernel == "lambda_value_loss") {
      kernels.lambda_value_loss(constants, values.data(), mask.data(), mask.data(), T, 1, &error);
    } else if (kernel == "lambda_value_loss_backward") {
      kernels.lambda_value_loss_backward(constants, values.data(), mask.data(), mask.data(), T, 1, 1, out.data());
    } else {
      return 4;
    }
  }
  return 0;
}
