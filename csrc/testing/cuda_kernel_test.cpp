// Every shipped launch function on the emulator: right, inside its bounds, and the same bits under every schedule.
//
//   cuda_kernel_test            every length, plan and type: one layout for each length, a few schedules
//   cuda_kernel_test --sweep    every length in every layout, every schedule
//
// The builds with sanitizers, which are slower but see more in each run, run a part of the former.
#include <algorithm>
#include <type_traits>

#include "cuda_kernel_cases.h"

namespace lambda_return::cuda::testing {
namespace {

using cuda_emulator::Order;

bool sweep = false;

// ThreadSanitizer creates the first 256 threads of a resident block in half a second: few blocks there.
std::vector<ScheduleSpec> all_schedules() {
  if (CUDA_EMULATOR_TSAN) return {{Order::kRandom, 2, 3}, {Order::kDescending, 1, 2}};
  if (CUDA_EMULATOR_ASAN) return {{Order::kDescending, 1, 2}, {Order::kRandom, 2, 5}, {Order::kAscending, 1, 1}};
  if (!sweep) {
    return {{Order::kAscending, 1, 1},  {Order::kDescending, 1, 2}, {Order::kRandom, 1, 5},
            {Order::kAscending, 1, 16}, {Order::kRandom, 2, 16},    {Order::kRandom, 3, 2}};
  }
  std::vector<ScheduleSpec> specs;
  for (int resident : {1, 2, 5, 16}) {
    specs.push_back({Order::kAscending, 1, resident});
    specs.push_back({Order::kDescending, 1, resident});
    for (unsigned seed : {1u, 2u, 3u}) specs.push_back({Order::kRandom, seed, resident});
  }
  return specs;
}

template <class scalar_t>
constexpr bool kIsFloat = std::is_same_v<scalar_t, float>;

struct DiscountPair {
  double gamma, lam;
};
constexpr DiscountPair kDiscounts[] = {{1.0, 0.95}, {0.9, 0.5},  {1.0, 1.0}, {0.99, 1.0},
                                       {1.0, 0.0},  {0.0, 0.95}, {1.0, 0.99}};

// Around the edges of a thread's 4 or 8 tokens, a warp's 128 or 256, a block's 1024 or 2048 and the change of plan.
const std::vector<int64_t> kLengths = {1,   2,   3,   4,   5,   7,   8,    9,    17,   127,  128,  129,  255,
                                       256, 257, 511, 512, 513, 700, 1023, 1024, 1025, 2047, 2048, 2049, 2056};
const std::vector<int64_t> kLongLengths = {4095, 4096, 4097, 4104, 6143, 6145, 9000};

// One layout of every length and of every plan meets all schedules with float; the others, and the other types, whose
// synchronisation is that of float, three of them in turn.
std::vector<ScheduleSpec> three_of(const std::vector<ScheduleSpec>& all, size_t turn) {
  if (all.size() <= 3) return all;
  return {all[turn % all.size()], all[(turn + 7) % all.size()], all[(turn + 13) % all.size()]};
}

// Each length in each layout; row counts, masks and discounts take turns, each in a cycle of its own.
template <class scalar_t>
void test_shapes(const std::vector<ScheduleSpec>& schedules) {
  constexpr int64_t kRows[] = {1, 2, 3, 5, 9};
  constexpr size_t kLayouts = static_cast<size_t>(Layout::kCount), kMasks = static_cast<size_t>(MaskKind::kCount);
  size_t turn = 0;
  const auto test_length = [&](int64_t T, bool is_long) {
    const size_t number = turn / kLayouts;
    for (int layout = 0; layout < static_cast<int>(kLayouts); ++layout) {
      const auto& [gamma, lam] = kDiscounts[turn % std::size(kDiscounts)];
      Case c{.B = is_long ? 1 + layout % 2 : kRows[turn % std::size(kRows)], .T = T};
      c.layout = static_cast<Layout>(layout);
      c.mask = number % 3 == 0 ? MaskKind::kGaps : static_cast<MaskKind>((turn + number / kLayouts) % kMasks);
      c.gamma = gamma;
      c.lam = lam;
      // Without the sweep: one layout a length, another one from length to length.
      if (sweep || static_cast<size_t>(layout) == number % kLayouts) {
        test_case<scalar_t>(c, layout == 0 && kIsFloat<scalar_t> ? schedules : three_of(schedules, turn));
      }
      ++turn;
    }
  };
  for (int64_t T : kLengths) test_length(T, false);
  for (int64_t T : kLongLengths) test_length(T, true);
}

// Loops and segments that the shapes above do not reach: teams that take several rows, segments of several tiles.
template <class scalar_t>
void test_plans(const std::vector<ScheduleSpec>& all) {
  const int64_t tile = kThreads * kItems<scalar_t>;
  size_t turn = 0;
  const auto test_plan = [&](int64_t B, int64_t T, const ScanPlan& plan) {
    for (Layout layout : {Layout::kDense, Layout::kShifted, Layout::kAllDifferent}) {
      Case c{.B = B, .T = T, .layout = layout};
      c.lam = turn % 2 == 0 ? 0.95 : 0.99;
      c.plan = plan;
      if (!kPlain && layout != Layout::kShifted) continue;
      test_case<scalar_t>(c, layout == Layout::kDense && kIsFloat<scalar_t> ? all : three_of(all, turn++));
    }
  };
  test_plan(21, 2 * kWarp * kItems<scalar_t> + 3, {ScanPlan::kWarpPerRow, 2});
  test_plan(5, 2 * tile + 1, {ScanPlan::kBlockPerRow, 2});
  // The last segment has a tile that lies outside the row, or only does not when the row has a head.
  test_plan(2, 5 * tile - 1, plan_of_segments<scalar_t>(2, 5 * tile - 1, 2));
  test_plan(1, 7 * tile + 5, plan_of_segments<scalar_t>(1, 7 * tile + 5, 3));
}

// gamma lam = 0 must not look at an infinite carry; elsewhere infinity is what the recurrence makes of it.
template <class scalar_t>
void test_infinite_rewards(const std::vector<ScheduleSpec>& schedules) {
  for (const auto& [gamma, lam] : {DiscountPair{1.0, 0.0}, DiscountPair{0.0, 0.95}, DiscountPair{1.0, 1.0}}) {
    for (int64_t T : {13, 600, 4200}) {
      Case c{.B = 3, .T = T, .layout = Layout::kDense, .mask = MaskKind::kGaps, .gamma = gamma, .lam = lam};
      c.infinite_rewards = true;
      test_case<scalar_t>(c, three_of(schedules, static_cast<size_t>(T)));
    }
  }
}

// Monte-Carlo never looks at V.
template <class scalar_t>
void test_monte_carlo_reads_no_values() {
  for (int64_t T : {13, 600, 4200}) {
    const Case c{.B = 2, .T = T, .layout = Layout::kDense, .mask = MaskKind::kGaps, .gamma = 1.0, .lam = 1.0};
    current_case = "Monte-Carlo over NaN values: " + name_of(c, kTypeName<scalar_t>);
    Inputs<scalar_t> in(c);
    for (int64_t row = 0; row < c.B; ++row) std::fill_n(in.values[row], T, narrow<scalar_t>(static_cast<float>(kNaN)));
    Outputs<scalar_t> out(c);
    run_lambda_return(in, ScanPlan::of(c.B, c.T, kItems<scalar_t>), out);
    check_matrix("returns", c, out.returns, expected_outputs(in).returns);
  }
}

// More rows than the largest grid has teams for.
void test_more_rows_than_blocks() {
  const std::vector<ScheduleSpec> schedules = {{Order::kAscending, 1, 2}};
  test_case<float>({.B = kMaxBlocks * kWarps + 9, .T = 3}, schedules);
  test_case<float>({.B = kMseMaxBlocks + 3, .T = 40}, schedules);
}

// ---- the choice of a plan ----

void expect_plan(int64_t B, int64_t T, ScanPlan::Kind kind) {
  current_case = "plan of [" + std::to_string(B) + ", " + std::to_string(T) + "]";
  const ScanPlan plan = ScanPlan::of(B, T, 8);
  expect(plan.kind == kind, "kind " + std::to_string(plan.kind));
  if (kind != ScanPlan::kLongRows) return expect(0 < plan.blocks && plan.blocks <= kMaxBlocks, "blocks");
  expect(plan.segments > 0 && plan.segments * B == plan.blocks, "segments");
  expect(plan.segments * plan.tiles * kThreads * 8 >= T + 7, "the segments do not cover the row");
  expect(plan.bytes_to_clear() <= 64 * 1024, "bytes to clear");
}

void test_plan_rule() {
  expect_plan(1, 512, ScanPlan::kWarpPerRow);
  expect_plan(1, 513, ScanPlan::kBlockPerRow);
  expect_plan(1, 4096, ScanPlan::kBlockPerRow);
  expect_plan(511, 4097, ScanPlan::kLongRows);
  expect_plan(512, 4097, ScanPlan::kBlockPerRow);
  expect_plan(4096, 2048, ScanPlan::kWarpPerRow);
  for (int64_t B : {1, 3, 16, 511}) {
    for (int64_t T : {4097, 65536, 1 << 20, 1 << 27, 0x7fffffff}) expect_plan(B, T, ScanPlan::kLongRows);
  }
}

// 16-byte accesses wherever all rows of all matrices start alike, and only there.
void test_layouts() {
  for (int i = 0; i < static_cast<int>(Layout::kCount); ++i) {
    const auto layout = static_cast<Layout>(i);
    const Inputs<float> in({.B = 3, .T = 21, .layout = layout});
    const Outputs<float> out(in.c);
    Alignment<8> alignment(3);
    alignment.add(in.values.const_rows()).add(in.loss_mask.const_rows()).add(out.returns.rows());
    current_case = kLayoutNames[i];
    expect(alignment.vectorized() == vectorized(layout), "vectorized");
  }
}

// ---- look-back over more segments than a warp has lanes ----

// Segment 0 has published its carry, as have those from `first_carry` to `last_carry`; all others their maps alone.
void test_look_back(int64_t segments, int64_t first_carry, int64_t last_carry) {
  current_case = "look-back over " + std::to_string(segments) + " segments, carries from " +
                 std::to_string(first_carry) + " to " + std::to_string(last_carry);
  std::vector<unsigned> flags(static_cast<size_t>(segments));
  std::vector<AffineMap<float>> maps(flags.size());
  std::vector<float> carries(flags.size(), std::numeric_limits<float>::quiet_NaN()), found(kWarp);
  const AffineRule<float> rule(Discount<float>::from(1.0, 0.95));
  Noise noise(7);
  float carry = 0.5f;
  for (size_t s = 0; s < flags.size(); ++s) {
    maps[s] = {static_cast<float>(noise.uniform()), static_cast<float>(noise.uniform())};
    carry = rule.apply(maps[s], carry);
    const bool known = s == 0 || (first_carry <= int64_t(s) && int64_t(s) <= last_carry);
    if (known) carries[s] = carry;
    flags[s] = known ? LookBack<float>::kCarry : LookBack<float>::kMap;
  }
  const LookBack<float> look_back{nullptr, flags.data(), maps.data(), carries.data(), segments, 1};
  cuda_emulator::launch(dim3(1), dim3(kWarp), 0, [&] { found[threadIdx.x] = look_back.carry_into(0, segments, rule); });
  for (float value : found) expect(value == carry, "the folded carry differs");
}

void test_look_back_distances() {
  for (int64_t segments : {1, 2, 31, 32, 33, 34, 64, 65, 100}) {
    test_look_back(segments, segments, segments);
    for (int64_t known : {int64_t(1), segments / 2, segments - 1}) {
      if (known < segments) test_look_back(segments, known, known);
    }
    test_look_back(segments, segments / 3, segments / 2);
  }
}

// ---- eos_mask ----

template <class word_t>
void test_eos_mask(int64_t B, int64_t T, bool is_float, Place place, MaskKind kind) {
  const int bits = 8 * sizeof(word_t);
  const auto value_bits = static_cast<word_t>(~uint64_t(0) >> (64 - bits + (is_float ? 1 : 0)));
  const auto one = static_cast<word_t>(is_float ? uint64_t(0x3c) << (bits - 8) : 1);
  const Matrix<word_t> mask(B, T, place), eos(B, T, {0, T});
  Noise noise(static_cast<uint64_t>(B + T));
  for (int64_t row = 0; row < B; ++row) {
    for (int64_t t = 0; t < T; ++t) {
      // One bit anywhere is a valid token; the sign of a float alone is not.
      const bool valid = is_valid(kind, row, t, T, noise.uniform());
      const int bit = static_cast<int>(noise.bits() % static_cast<unsigned>(bits - (is_float ? 1 : 0)));
      const auto zero = is_float && t % 2 == 0 ? static_cast<word_t>(uint64_t(1) << (bits - 1)) : word_t(0);
      mask[row][t] = valid ? static_cast<word_t>(word_t(1) << bit) : zero;
      eos[row][t] = 0;
    }
  }
  launch_eos_mask<word_t>(B, T, mask[0], place.stride, value_bits, one, eos[0], nullptr);
  current_case = "eos_mask of " + std::to_string(sizeof(word_t)) + "-byte words [" + std::to_string(B) + ", " +
                 std::to_string(T) + "], mask " + std::to_string(static_cast<int>(kind));
  expect(eos.canaries_are_alive(), "written outside of the rows");
  for (int64_t row = 0; row < B; ++row) {
    std::vector<word_t> words(mask[row], mask[row] + T);
    for (word_t& word : words) word &= value_bits;
    const int64_t last = last_valid_position(words.data(), T);
    for (int64_t t = 0; t < T; ++t) {
      if (eos[row][t] != (t == last ? one : 0)) return expect(false, "[" + std::to_string(row) + "]");
    }
  }
}

template <class word_t>
void test_eos_words(const ScheduleSpec& schedule) {
  use_schedule(schedule.order, schedule.seed, schedule.resident_blocks);
  for (int64_t T : {1, 2, 15, 16, 17, 33, 255, 257, 513, 1100, 2049, 4097, 8300}) {
    for (int kind = 0; kind < static_cast<int>(MaskKind::kCount); ++kind) {
      if (!kPlain && (T + kind) % 3 != 0) continue;
      test_eos_mask<word_t>(3, T, false, {0, T}, static_cast<MaskKind>(kind));
      if (sizeof(word_t) > 1) test_eos_mask<word_t>(3, T, true, {1, T + 3}, static_cast<MaskKind>(kind));
    }
  }
}

void test_eos() {
  for (const ScheduleSpec& schedule : all_schedules()) {
    test_eos_words<uint8_t>(schedule);
    test_eos_words<uint16_t>(schedule);
    test_eos_words<uint32_t>(schedule);
    test_eos_words<uint64_t>(schedule);
  }
  use_schedule(Order::kAscending, 1, 2);
  if (kPlain) test_eos_mask<uint8_t>(kEosMaxBlocks + 2, 2, false, {0, 2}, MaskKind::kGaps);  // more rows than blocks
}

// ---- more than 2^31 elements ----

// The same bits as with rows next to one another.
void test_far_rows() {
  constexpr int64_t B = 3, T = 72;
  use_schedule(Order::kRandom, 1, 2);
  const Inputs<float> in(Case{.B = B, .T = T});
  const Outputs<float> near = run(in);
  current_case = "rows 2^31 elements apart";
  const auto values = FarMatrix<float>::copy_of(in.values, B, T), targets = FarMatrix<float>::copy_of(in.targets, B, T);
  const auto grad_returns = FarMatrix<float>::copy_of(in.grad_returns, B, T);
  const auto mask = FarMatrix<uint8_t>::copy_of(in.loss_mask, B, T);
  const auto attention_mask = FarMatrix<uint8_t>::copy_of(in.attention_mask, B, T);
  const FarMatrix<float> out(B, T);
  const ScanPlan plan = ScanPlan::of(B, T, kItems<float>);
  const Workspace scratch(lambda_value_loss_workspace_bytes<float>(plan));
  float terminal[B], loss = 0, grad_loss = in.grad_loss(in.num_counted);
  int64_t num_tokens = 0;

  launch_lambda_return<float>(
      B, T, values.const_rows(), in.rewards.data(), mask.const_rows(), in.c.gamma, in.c.lam, out.rows(), plan,
      scratch.data(), nullptr);
  expect_same_rows("returns", out, near.returns, B, T);
  launch_lambda_return_backward<float>(
      B, T, grad_returns.const_rows(), mask.const_rows(), in.c.gamma, in.c.lam, out.rows(), terminal, plan,
      scratch.data(), nullptr);
  expect_same_rows("grad_values", out, near.grad_values, B, T);
  const ValueLossInputs<float> inputs{
      B,          T,       values.const_rows(), in.rewards.data(), attention_mask.const_rows(), mask.const_rows(),
      in.c.gamma, in.c.lam};
  launch_lambda_value_loss<float>(inputs, &loss, &num_tokens, plan, scratch.data(), nullptr);
  expect(loss == near.loss.loss && num_tokens == near.loss.num_tokens, "loss");
  launch_lambda_value_loss_backward<float>(inputs, &grad_loss, &num_tokens, out.rows(), plan, scratch.data(), nullptr);
  expect_same_rows("loss gradient", out, near.loss_gradient, B, T);
  const MseInputs<float, float> mse{B, T, values.const_rows(), targets.const_rows(), mask.const_rows()};
  launch_masked_mse(mse, &loss, &num_tokens, Workspace(masked_mse_workspace_bytes(mse)).data(), nullptr);
  expect(loss == near.mse.loss && num_tokens == near.mse.num_tokens, "mse");
  grad_loss = in.grad_loss(in.num_tokens);
  launch_masked_mse_backward(mse, &grad_loss, &num_tokens, out.rows(), nullptr);
  expect_same_rows("mse gradient", out, near.mse_gradient, B, T);
}

// ---- all ----

template <class scalar_t>
void test_type() {
  const std::vector<ScheduleSpec> schedules = all_schedules();
  test_shapes<scalar_t>(schedules);
  test_plans<scalar_t>(schedules);
  test_infinite_rewards<scalar_t>(schedules);
  test_monte_carlo_reads_no_values<scalar_t>();
}

int test_all() {
  test_plan_rule();
  test_layouts();
  test_look_back_distances();
  test_eos();
  test_far_rows();
  test_type<float>();
  if (!CUDA_EMULATOR_TSAN) test_type<double>();
  if (!CUDA_EMULATOR_TSAN) test_type<__nv_bfloat16>();
  if (kPlain) test_type<__half>();  // the code of bfloat16 but for widen and narrow
  if (kPlain) test_more_rows_than_blocks();
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lambda_return::cuda::testing

int main(int argc, char** argv) {
  lambda_return::cuda::testing::sweep = argc == 2 && std::string(argv[1]) == "--sweep";
  return lambda_return::cuda::testing::test_all();
}
