// Runs one CPU kernel on rows of 8,192 tokens, for callgrind to count: see instruction_counts.py.
//
//   instruction_counts SET KERNEL DTYPE MASK ROWS     with SET portable or avx2, MASK dense or gaps
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/simd/instruction_set.h"

using namespace lambda_return;
using namespace lambda_return::cpu;

namespace {

template <class scalar_t>
int run(const RowKernels<scalar_t>& kernels, const std::string& kernel, bool gaps, int rows) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t T = 8192;
  const std::vector<acc_t> wide(T, acc_t(0.5));
  std::vector<scalar_t> values(T), out(T);
  kernels.narrow(wide.data(), T, values.data());
  std::vector<uint8_t> mask(T, 1);
  for (int64_t t = 0; gaps && t < T; ++t) {
    mask[t] = t * 7919 % 10 < 7;
  }
  const auto constants = kernels.constants(Discount<acc_t>::from(1.0, 0.95));
  const scalar_t* v = values.data();
  const uint8_t* m = mask.data();
  SquaredError error;
  for (; rows > 0; --rows) {
    if (kernel == "lambda_return") {
      kernels.lambda_return(constants, v, m, T, 1, out.data());
    } else if (kernel == "lambda_return_backward") {
      kernels.lambda_return_backward(constants, v, m, T, 1, out.data());
    } else if (kernel == "lambda_value_loss") {
      kernels.lambda_value_loss(constants, v, m, m, T, 1, &error);
    } else if (kernel == "lambda_value_loss_backward") {
      kernels.lambda_value_loss_backward(constants, v, m, m, T, 1, 1, out.data());
    } else if (kernel == "masked_mse") {
      kernels.masked_mse(v, v, m, T, &error);
    } else if (kernel == "masked_mse_backward") {
      kernels.masked_mse_backward(v, v, m, T, 1, out.data());
    } else {
      return 4;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::string set_name = argv[1], kernel = argv[2], dtype = argv[3];
  const bool gaps = std::string(argv[4]) == "gaps";
  const int rows = std::atoi(argv[5]);
  const InstructionSet* set = set_name == "avx2" ? avx2() : portable();
  if (set == nullptr) return 3;
  return dtype == "float32"    ? run(set->float32, kernel, gaps, rows)
         : dtype == "bfloat16" ? run(set->bfloat16, kernel, gaps, rows)
         : dtype == "float16"  ? run(set->float16, kernel, gaps, rows)
         : dtype == "float64"  ? run(set->float64, kernel, gaps, rows)
                               : 5;
}
