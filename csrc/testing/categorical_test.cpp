// categorical_value_loss on the emulator: right against the definitions in float64, inside its bounds whatever
// cu_seqlens holds, and the same bits under every schedule. tests/ops/test_emulated_categorical.py has more shapes; the
// builds with sanitizers are what this is for.
#include "categorical_cases.h"

namespace lambda_return::cuda::testing {
namespace {

// Every plan, padded and packed; a group of every size, with one turn and more.
template <class scalar_t>
void test_plans() {
  const int64_t tile = kThreads * kItems<scalar_t>;
  const auto packed = [](const std::vector<int64_t>& lengths, int64_t K) {
    const auto starts = starts_of(lengths);
    return CategoricalCase{.B = static_cast<int64_t>(lengths.size()), .T = starts.back(), .K = K, .cu_seqlens = starts};
  };
  std::vector<CategoricalCase> cases = {{.B = 3, .T = 101, .K = 51}, packed({5, 0, 1, 70, 0, 300, 1}, 11)};
  cases.push_back({.B = 2, .T = tile + 3, .K = 5});
  cases.back().plan = ScanPlan{ScanPlan::kBlockPerRow, 1};
  cases.push_back(packed({1, 2 * tile + 7, 0, 40}, 3));  // long rows
  cases.push_back({.B = 2, .T = 9, .K = 300});           // more than a group holds at a time
  if (kPlain) {
    cases.push_back({.B = 2, .T = 37, .K = 64, .gap = 3});
    cases.push_back(packed({0, 0, 1}, 2));
    cases.push_back({.B = 2, .T = 20, .K = 101, .sigma = 5});
    cases.push_back({.B = 0, .T = 4, .K = 2});
    cases.push_back({.B = 3, .T = 0, .K = 2});
  }
  int turn = 0;
  for (CategoricalCase c : cases) {
    for (int reduction = 0; reduction <= static_cast<int>(Reduction::kNone); ++reduction, ++turn) {
      if (!kPlain && reduction != 1 && reduction != turn % 7) continue;
      c.reduction = static_cast<Reduction>(reduction);
      c.kind = turn % 3 == 0 ? BinKind::kTwoHot : BinKind::kHlGauss;
      c.optional_inputs = turn % 4 != 3;
      test_categorical<scalar_t>(c, schedules());
    }
  }
}

// No access out of bounds, no end without an end; what the results are does not matter.
void test_hostile_cu_seqlens() {
  const int64_t total = 2 * kThreads * kItems<float> + 11;
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();
  for (const std::vector<int64_t>& cu_seqlens : std::vector<std::vector<int64_t>>{
           {0, total, 0, total}, {total, 0, total, 0}, {kMost, kLeast, 5, 2}, {kLeast, kMost, kLeast, kMost}}) {
    for (const auto reduction : {Reduction::kSequenceMean, Reduction::kNone}) {
      CategoricalCase c{.B = 3, .T = total, .K = 3, .cu_seqlens = cu_seqlens};
      c.reduction = reduction;
      use_schedule(cuda_emulator::Order::kRandom, 2, 3);
      run(CategoricalInputs<float>(c));
    }
  }
}

// Tokens 2^31 logits apart give the same bits as tokens next to one another.
void test_far_tokens() {
  constexpr int64_t T = 5, K = 12;
  use_schedule(cuda_emulator::Order::kRandom, 1, 2);
  CategoricalCase c{.B = 1, .T = T, .K = K};
  const CategoricalInputs<float> in(c);
  const CategoricalOutputs<float> near = run(in);
  current_case = "categorical, tokens 2^31 logits apart";
  const FarMatrix<float> logits(T, K), gradient(T, K);
  for (int64_t t = 0; t < T; ++t) std::copy_n(in.logits.data() + t * K, K, logits[t]);
  auto loss = in.loss();
  loss.logits = {logits[0], 0, logits.kStride};
  const CategoricalOutputs<float> far = run<float>(in, loss, LogitRows<float>{gradient[0], 0, gradient.kStride});
  for (int64_t t = 0; t < T; ++t) std::copy_n(gradient[t], K, far.gradient.data() + t * K);
  far.for_each(near, [](const char* what, const auto& a, const auto& b) { expect(a.same_bits(b), what); });
}

int test_all() {
  test_far_tokens();
  test_plans<float>();
  // The builds with sanitizers take long to compile. Out of order, sequences overlap and race for what they write.
  if constexpr (!CUDA_EMULATOR_TSAN) test_hostile_cu_seqlens();
  if constexpr (kPlain) {
    test_plans<double>();
    test_plans<__nv_bfloat16>();
  }
  std::printf(failures == 0 ? "all tests of the classification loss passed\n" : "%d FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lambda_return::cuda::testing

int main() { return lambda_return::cuda::testing::test_all(); }
