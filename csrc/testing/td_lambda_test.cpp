// The general operators on the emulator: right against the definitions in float64, inside their bounds whatever
// cu_seqlens holds, and the same bits under every schedule. tests/ops/test_emulated_td_lambda.py has more shapes; the
// builds with sanitizers are what this is for.
#include "cuda/td_lambda_loss.cuh"
#include "sequence_cases.h"

namespace lambda_return::cuda::testing {
namespace {

// Sequences of a padded [B, T] or, where there is cu_seqlens, of a packed [T].
struct GeneralCase {
  int64_t B, T;
  std::vector<int64_t> cu_seqlens = {};
  bool optional_inputs = true;  // mask, attention mask, rewards, old values
  LossKind kind = LossKind::kHuber;
  Reduction reduction = Reduction::kTokenMean;
  std::optional<ScanPlan> plan = std::nullopt, pair_plan = std::nullopt;
};

template <class scalar_t>
struct GeneralInputs {
  using acc_t = accumulate_t<scalar_t>;

  GeneralCase c;
  int64_t tokens;
  Array<scalar_t> values, old_values, grad_returns;
  Array<acc_t> rewards, terminal_rewards, grad_losses;
  Array<uint8_t> mask, attention_mask;
  Array<double> gamma, lam, other_lam;
  Array<int64_t> cu_seqlens;

  explicit GeneralInputs(const GeneralCase& c)
      : c(c),
        tokens(c.cu_seqlens.empty() ? c.B * c.T : c.T),
        values(tokens),
        old_values(tokens),
        grad_returns(tokens),
        rewards(tokens),
        terminal_rewards(c.B),
        grad_losses(tokens),
        mask(tokens),
        attention_mask(tokens),
        gamma(c.B),
        lam(1),
        other_lam(c.B),
        cu_seqlens(static_cast<int64_t>(c.cu_seqlens.size())) {
    Noise noise(static_cast<uint64_t>(c.B * 1000003 + c.T));
    for (int64_t t = 0; t < tokens; ++t) {
      const bool valid = noise.uniform() < 0.7 || !c.optional_inputs, attended = noise.uniform() < 0.8;
      const bool counts = valid && (attended || !c.optional_inputs);
      const auto draw = [&](bool use) { return static_cast<acc_t>(use ? 4 * noise.uniform() - 2 : kNaN); };
      mask[t] = mask_byte(valid, noise);
      attention_mask[t] = mask_byte(attended, noise);
      values[t] = narrow<scalar_t>(draw(valid));
      old_values[t] = narrow<scalar_t>(draw(counts));
      grad_returns[t] = narrow<scalar_t>(draw(valid));
      rewards[t] = draw(valid);
      grad_losses[t] = draw(counts);
    }
    lam[0] = 0.95;
    for (int64_t b = 0; b < c.B; ++b) {
      gamma[b] = 1 - 0.02 * noise.uniform();
      other_lam[b] = noise.uniform() < 0.3 ? 1 : noise.uniform();
      terminal_rewards[b] = static_cast<acc_t>(noise.uniform());
    }
    std::copy(c.cu_seqlens.begin(), c.cu_seqlens.end(), cu_seqlens.data());
  }

  Sequences sequences() const { return {c.B, c.T, c.cu_seqlens.empty() ? nullptr : cu_seqlens.data()}; }
  // First token of a sequence, and how many it has, as the kernels must understand cu_seqlens.
  Sequences::Span span(int64_t b) const {
    if (c.cu_seqlens.empty()) return {b * c.T, c.T};
    const int64_t begin = std::clamp(cu_seqlens[b], int64_t(0), c.T);
    return {begin, std::clamp(cu_seqlens[b + 1], begin, c.T) - begin};
  }
  template <class T>
  Rows<T> rows(T* data, bool present = true) const {
    return {present ? data : nullptr, c.T};
  }
  DiscountRows discounts(bool other = false) const {
    return other ? DiscountRows{gamma.data(), other_lam.data(), 1, 1} : DiscountRows{gamma.data(), lam.data(), 1, 0};
  }
  TdLambdaInputs<scalar_t> scan(const Array<scalar_t>& tokens_) const {
    return {
        sequences(), rows<const scalar_t>(tokens_.data()), terminal_rewards.data(),
        rows<const uint8_t>(mask.data(), c.optional_inputs), rows<const acc_t>(rewards.data(), c.optional_inputs)};
  }
  TdLambdaLossInputs<scalar_t> loss() const {
    return {
        scan(values),
        rows<const uint8_t>(attention_mask.data(), c.optional_inputs),
        rows<const scalar_t>(old_values.data(), c.optional_inputs && c.kind < LossKind::kBce),
        discounts(),
        {c.kind, acc_t(0.5), acc_t(0.25)},
        c.reduction};
  }
};

template <class scalar_t>
struct GeneralOutputs {
  using acc_t = accumulate_t<scalar_t>;

  Array<scalar_t> advantages, pair_returns, pair_advantages, grad_values, loss_gradient;
  Array<acc_t> maps, grad_terminal, grad_rewards, loss, scale;
  Array<double> statistics{TokenSums::kStatistics};

  explicit GeneralOutputs(const GeneralInputs<scalar_t>& in)
      : advantages(in.tokens),
        pair_returns(in.tokens),
        pair_advantages(in.tokens),
        grad_values(in.tokens),
        loss_gradient(in.tokens),
        maps(2 * in.c.B),
        grad_terminal(in.c.B),
        grad_rewards(in.tokens),
        loss(in.c.reduction == Reduction::kNone ? in.tokens : 1),
        scale(in.c.B) {}

  template <class Other, class Body>
  void for_each(const Other& other, const Body& body) const {
    body("advantages", advantages, other.advantages);
    body("pair returns", pair_returns, other.pair_returns);
    body("pair advantages", pair_advantages, other.pair_advantages);
    body("grad_values", grad_values, other.grad_values);
    body("loss gradient", loss_gradient, other.loss_gradient);
    body("maps", maps, other.maps);
    body("grad_terminal_rewards", grad_terminal, other.grad_terminal);
    body("grad_rewards", grad_rewards, other.grad_rewards);
    body("loss", loss, other.loss);
    body("scale", scale, other.scale);
    body("statistics", statistics, other.statistics);
  }
};

template <class scalar_t>
GeneralOutputs<scalar_t> run(const GeneralInputs<scalar_t>& in) {
  using acc_t = accumulate_t<scalar_t>;
  GeneralOutputs<scalar_t> out(in);
  const auto scan = in.scan(in.values);
  const ScanPlan plan = in.c.plan.value_or(scan.plan(1)), pair_plan = in.c.pair_plan.value_or(scan.plan(2));
  const auto scratch = [](const ScanPlan& p) { return Workspace(p.workspace_bytes<acc_t>()); };
  launch_td_lambda<scalar_t>(
      scan, {in.discounts(), true, in.rows(out.advantages.data())}, plan, scratch(plan).data(), nullptr);
  launch_td_lambda_pair<scalar_t>(
      scan, {in.discounts(), false, in.rows(out.pair_returns.data())},
      {in.discounts(true), true, in.rows(out.pair_advantages.data())}, pair_plan, scratch(pair_plan).data(), nullptr);
  launch_td_lambda_map<scalar_t>(scan, in.discounts(), out.maps.data(), pair_plan, scratch(pair_plan).data(), nullptr);
  auto adjoint = in.scan(in.grad_returns);
  adjoint.rewards = {nullptr, 0};
  launch_td_lambda_backward<scalar_t>(
      adjoint, in.discounts(), in.rows(out.grad_values.data()), out.grad_terminal.data(),
      in.rows(out.grad_rewards.data()), plan, scratch(plan).data(), nullptr);
  const auto loss = in.loss();
  const bool reduces = in.c.reduction != Reduction::kNone;
  launch_td_lambda_loss<scalar_t>(
      loss, nullptr,
      {reduces ? out.loss.data() : nullptr, in.rows(out.loss.data(), !reduces), out.scale.data(),
       out.statistics.data()},
      plan, Workspace(td_lambda_loss_workspace_bytes<scalar_t>(loss, plan)).data(), nullptr);
  const acc_t grad_loss = 2;
  launch_td_lambda_loss_backward<scalar_t>(
      loss, reduces ? &grad_loss : nullptr, in.template rows<const acc_t>(in.grad_losses.data(), !reduces),
      out.scale.data(), in.rows(out.loss_gradient.data()), plan, scratch(plan).data(), nullptr);
  return out;
}

// The definitions in float64, with the coefficients as the kernels have them.
template <class scalar_t>
GeneralOutputs<double> expected_outputs(const GeneralInputs<scalar_t>& in) {
  GeneralCase wide = in.c;
  wide.optional_inputs = true;
  GeneralOutputs<double> e((GeneralInputs<double>(wide)));
  const auto fill = [](const char*, const auto& array, const auto&) { std::fill_n(array.data(), array.size, 0.0); };
  e.for_each(e, fill);
  const auto at = [](const auto& array, int64_t t) { return static_cast<double>(widen(array[t])); };
  const auto loss_inputs = in.loss();
  const TokenLoss<double> token_loss{
      in.c.kind, double(loss_inputs.token_loss.delta), double(loss_inputs.token_loss.clip_range)};
  std::vector<double> sums, counts, derivatives(static_cast<size_t>(in.tokens));
  for (int64_t b = 0; b < in.c.B; ++b) {
    const auto [begin, length] = in.span(b);
    const auto coefficients = [&](bool other) {
      const auto d = in.discounts(other).template at<accumulate_t<scalar_t>>(b);
      return Discount<double>{double(d.value), double(d.carry)};
    };
    const Discount<double> discount = coefficients(false), other = coefficients(true);
    const auto scan = [&](const Discount<double>& d, double h, bool transforms, const auto& use) {
      for (int64_t t = begin + length - 1; t >= begin; --t) {
        if (in.c.optional_inputs && in.mask[t] == 0) continue;
        const double g = h + (in.c.optional_inputs ? at(in.rewards, t) : 0.0);
        const double x = at(in.values, t), v = transforms ? token_loss.value(x) : x;
        use(t, x, v, g);
        h = d.step(v, g);
      }
      return h;
    };
    const double terminal = at(in.terminal_rewards, b);
    scan(discount, terminal, false, [&](int64_t t, double, double v, double g) {
      e.advantages[t] = g - v;
      e.pair_returns[t] = g;
    });
    scan(other, terminal, false, [&](int64_t t, double, double v, double g) { e.pair_advantages[t] = g - v; });
    e.maps[2 * b] = 1;
    e.maps[2 * b + 1] =
        scan(discount, 0, false, [&](int64_t, double, double, double) { e.maps[2 * b] *= discount.carry; });
    double adjoint = 0;
    for (int64_t t = begin; t < begin + length; ++t) {
      if (in.c.optional_inputs && in.mask[t] == 0) continue;
      e.grad_values[t] = discount.weighted_value(adjoint);
      adjoint = discount.adjoint_step(at(in.grad_returns, t), adjoint);
      e.grad_rewards[t] = adjoint;
    }
    e.grad_terminal[b] = adjoint;
    double sum = 0, count = 0;
    scan(discount, terminal, true, [&](int64_t t, double x, double v, double g) {
      if (in.c.optional_inputs && in.attention_mask[t] == 0) return;
      const bool clips = loss_inputs.old_values.data != nullptr;
      const auto result = clips ? token_loss.clipped(v, at(in.old_values, t), g) : token_loss(x, v, g);
      sum += result.loss;
      ++count;
      derivatives[static_cast<size_t>(t)] = result.derivative;
      if (in.c.reduction == Reduction::kNone) e.loss[t] = result.loss;
      const double terms[] = {1, g, g * g, g - v, (g - v) * (g - v), result.clipped ? 1.0 : 0.0};
      for (int i = 0; i < TokenSums::kStatistics; ++i) e.statistics[i] += terms[i];
    });
    sums.push_back(sum);
    counts.push_back(count);
  }
  double sequences = 0;
  for (double count : counts) sequences += count > 0 ? 1 : 0;
  for (int64_t b = 0; b < in.c.B; ++b) {
    const double count = counts[static_cast<size_t>(b)];
    const double divisor = in.c.reduction == Reduction::kTokenMean      ? e.statistics[0]
                           : in.c.reduction == Reduction::kSequenceMean ? count * sequences
                                                                        : 1;
    e.scale[b] = divisor == 0 ? 0 : 1 / divisor;
    if (in.c.reduction != Reduction::kNone) e.loss[0] += sums[static_cast<size_t>(b)] * e.scale[b];
    const auto [begin, length] = in.span(b);
    for (int64_t t = begin; t < begin + length; ++t) {
      const double derivative = derivatives[static_cast<size_t>(t)];
      const double factor = in.c.reduction == Reduction::kNone ? at(in.grad_losses, t) : 2 * e.scale[b];
      if (derivative != 0) e.loss_gradient[t] = factor * derivative;
    }
  }
  return e;
}

template <class scalar_t>
void check_general(const GeneralOutputs<scalar_t>& actual, const GeneralOutputs<double>& exact) {
  actual.for_each(exact, [](const char* name, const auto& ours, const Array<double>& wanted) {
    using element_t = std::remove_cvref_t<decltype(ours[0])>;
    // Terms cancel, in sums of tokens most of all: an error is relative to the largest number.
    double largest = 1;
    for (int64_t i = 0; i < wanted.size; ++i) largest = std::fmax(largest, std::abs(wanted[i]));
    for (int64_t i = 0; i < wanted.size; ++i) {
      const double value = static_cast<double>(widen(ours[i])), error = std::abs(value - wanted[i]);
      constexpr double kAccumulated = 64 * kRounding<accumulate_t<scalar_t>>;
      const bool ok = error <= kRounding<element_t> * std::abs(wanted[i]) + kAccumulated * largest;
      if (ok) continue;
      char text[160];
      std::snprintf(
          text, sizeof(text), "%s[%lld] is %.9g, not %.9g", name, static_cast<long long>(i), value, wanted[i]);
      return expect(false, text);
    }
  });
}

// Right under the first schedule, the same bits under all others.
template <class scalar_t>
void test_general(const GeneralCase& c) {
  current_case = std::string("general, ") + kTypeName<scalar_t> + " [" + std::to_string(c.B) + ", " +
                 std::to_string(c.T) + "]" + (c.cu_seqlens.empty() ? "" : " packed") + ", reduction " +
                 std::to_string(static_cast<int>(c.reduction)) + ", kind " + std::to_string(static_cast<int>(c.kind));
  const GeneralInputs<scalar_t> in(c);
  std::optional<GeneralOutputs<scalar_t>> first;
  for (const ScheduleSpec& spec : schedules()) {
    const std::string name = use_schedule(spec.order, spec.seed, spec.resident_blocks);
    GeneralOutputs<scalar_t> out = run(in);
    if (first) {
      first->for_each(out, [&](const char* what, const auto& a, const auto& b) {
        expect(a.same_bits(b), what + (" has other bits under schedule " + name));
      });
    } else {
      check_general(out, expected_outputs(in));
      first.emplace(std::move(out));
    }
  }
}

// Every reduction and both families of losses meet every plan, padded and packed.
template <class scalar_t>
void test_plans() {
  const int64_t tile = kThreads * kItems<scalar_t>;
  const auto packed = [](const std::vector<int64_t>& lengths) {
    const auto starts = starts_of(lengths);
    return GeneralCase{.B = static_cast<int64_t>(lengths.size()), .T = starts.back(), .cu_seqlens = starts};
  };
  std::vector<GeneralCase> cases = {
      {.B = 3, .T = 301}, {.B = 2, .T = 2 * tile + 3}, packed({5, 0, 1, 2 * tile + 7, 0, 300, 1})};
  if (kPlain) cases.push_back(packed({0, 0, 1}));
  cases.push_back({.B = 3, .T = tile + 9});
  cases.back().plan = cases.back().pair_plan = ScanPlan{ScanPlan::kBlockPerRow, 2};
  cases.push_back(packed({3, 0, tile + 1, 40}));
  cases.back().plan = cases.back().pair_plan = ScanPlan{ScanPlan::kBlockPerRow, 2};
  // Segments of two tiles.
  cases.push_back(packed({1, 5 * tile - 3, 0, tile}));
  const auto by_hand = [&](int64_t outputs) {
    const auto& c = cases.back();
    const int64_t segments = ScanPlan::packed_segments(c.B, c.T, 2 * tile, kItems<scalar_t>);
    return ScanPlan{ScanPlan::kLongRows, segments * outputs, segments, 2};
  };
  cases.back().plan = by_hand(1);
  cases.back().pair_plan = by_hand(2);
  int turn = 0;
  for (GeneralCase c : cases) {
    for (int reduction = 0; reduction <= static_cast<int>(Reduction::kNone); ++reduction, ++turn) {
      if (!kPlain && reduction != 1 && reduction != turn % 7) continue;
      c.reduction = static_cast<Reduction>(reduction);
      c.kind = turn % 3 == 0 ? LossKind::kBceLogits : static_cast<LossKind>(turn % 3);
      c.optional_inputs = turn % 4 != 3;
      test_general<scalar_t>(c);
    }
  }
}

// No access out of bounds, no end without an end; what the results are does not matter.
template <class scalar_t>
void test_hostile_cu_seqlens() {
  const int64_t tile = kThreads * kItems<scalar_t>, total = 3 * tile + 11;
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();
  const std::vector<std::vector<int64_t>> hostile = {
      {0, total, 0, total, 0, total},         {total, 0, total, 0, total, 0},
      {kMost, kLeast, kMost, kLeast, 5, 2},   {kLeast, kLeast, kLeast, kLeast, kMost, kMost},
      {total - 3, total + 5, 7, 7, total, 1}, {-1, -1, -1, -1, -1, -1}};
  for (const auto& cu_seqlens : hostile) {
    for (const ScheduleSpec& spec : schedules()) {
      use_schedule(spec.order, spec.seed, spec.resident_blocks);
      for (const auto reduction : {Reduction::kSequenceMean, Reduction::kNone}) {
        GeneralCase c{.B = 5, .T = total, .cu_seqlens = cu_seqlens};
        c.reduction = reduction;
        run(GeneralInputs<scalar_t>(c));
        if (!kPlain) continue;
        c.plan = c.pair_plan = ScanPlan{ScanPlan::kWarpPerRow, 2};
        run(GeneralInputs<scalar_t>(c));
      }
    }
  }
}

// Where the segments of packed sequences lie: enough for each, and all within the bound that the host knows.
void test_packed_segments() {
  Noise noise(11);
  for (int turn = 0; turn < 2000; ++turn) {
    const int items = turn % 2 == 0 ? 4 : 8;
    std::vector<int64_t> lengths;
    for (uint64_t b = 0; b < 1 + noise.bits() % 40; ++b) {
      lengths.push_back(static_cast<int64_t>(noise.bits() % (noise.uniform() < 0.2 ? 40000 : 40)));
    }
    const auto starts = starts_of(lengths);
    const auto B = static_cast<int64_t>(lengths.size()), total = starts.back();
    for (int outputs : {1, 2}) {
      const ScanPlan plan = ScanPlan::of_packed(B, total, outputs, items);
      if (plan.kind != ScanPlan::kLongRows) continue;
      current_case = "segments of " + std::to_string(B) + " sequences of " + std::to_string(total) + " tokens";
      const int64_t segment_tokens = plan.tiles * kThreads * items;
      expect(plan.bytes_to_clear() <= 64 * 1024, "bytes to clear");
      expect(plan.blocks == plan.segments * outputs, "blocks");
      expect(plan.segments <= total / segment_tokens + 2 * B, "more blocks than needed");
      for (int64_t b = 0; b < B; ++b) {
        const int64_t first = ScanPlan::packed_segments(b, starts[static_cast<size_t>(b)], segment_tokens, items);
        const int64_t next =
            ScanPlan::packed_segments(b + 1, starts[static_cast<size_t>(b) + 1], segment_tokens, items);
        const int64_t needed = (lengths[static_cast<size_t>(b)] + items - 1 + segment_tokens - 1) / segment_tokens;
        expect(next - first >= std::max(needed, int64_t(1)) && next <= plan.segments, "too few segments");
      }
    }
  }
  for (int64_t total : {int64_t(5000), int64_t(1) << 27, int64_t(1) << 40}) {
    for (int64_t B : {1, 255, 511}) {
      const ScanPlan plan = ScanPlan::of_packed(B, total, B < 256 ? 2 : 1, 8);
      current_case = "plan of " + std::to_string(B) + " packed sequences, " + std::to_string(total) + " tokens";
      expect(plan.kind == ScanPlan::kLongRows && plan.bytes_to_clear() <= 64 * 1024, "segments");
    }
  }
}

// Rows 2^31 elements apart give the same bits as rows next to one another. Packed tokens are not tested so: those
// before the first sequence are written, too, and would take gigabytes.
void test_far_rows() {
  constexpr int64_t B = 3, T = 72;
  use_schedule(cuda_emulator::Order::kRandom, 1, 2);
  GeneralCase c{.B = B, .T = T};
  c.reduction = Reduction::kNone;
  const GeneralInputs<float> in(c);
  const GeneralOutputs<float> near = run(in);
  current_case = "general, rows 2^31 elements apart";
  const auto rows_of = [](const auto& array) { return [&](int64_t row) { return array.data() + row * T; }; };
  const auto far = [&]<class Element>(const Array<Element>& array) {
    FarMatrix<Element> matrix(B, T);
    for (int64_t row = 0; row < B; ++row) std::copy_n(rows_of(array)(row), T, matrix[row]);
    return matrix;
  };
  const auto same = [&]<class Element>(const char* what, const FarMatrix<Element>& ours, const Array<Element>& wanted) {
    for (int64_t row = 0; row < B; ++row) {
      expect(memcmp(ours[row], rows_of(wanted)(row), T * sizeof(Element)) == 0, what);
    }
  };
  const auto values = far(in.values), old_values = far(in.old_values), grad_returns = far(in.grad_returns);
  const auto rewards = far(in.rewards), grad_losses = far(in.grad_losses);
  const auto mask = far(in.mask), attention_mask = far(in.attention_mask);
  const FarMatrix<float> out(B, T), second(B, T);
  auto loss = in.loss();
  loss.tokens = values.const_rows();
  loss.mask = mask.const_rows();
  loss.rewards = rewards.const_rows();
  loss.attention_mask = attention_mask.const_rows();
  loss.old_values = old_values.const_rows();
  const TdLambdaInputs<float>& scan = loss;
  const ScanPlan plan = scan.plan(1), pair_plan = scan.plan(2);
  const Workspace scratch(td_lambda_loss_workspace_bytes<float>(loss, plan));
  Array<float> terminal(B), scale(B);
  Array<double> statistics(TokenSums::kStatistics);

  launch_td_lambda<float>(scan, {in.discounts(), true, out.rows()}, plan, scratch.data(), nullptr);
  same("advantages", out, near.advantages);
  launch_td_lambda_pair<float>(
      scan, {in.discounts(), false, out.rows()}, {in.discounts(true), true, second.rows()}, pair_plan,
      Workspace(pair_plan.workspace_bytes<float>()).data(), nullptr);
  same("pair returns", out, near.pair_returns);
  same("pair advantages", second, near.pair_advantages);
  launch_td_lambda_loss<float>(
      loss, nullptr, {nullptr, out.rows(), scale.data(), statistics.data()}, plan, scratch.data(), nullptr);
  same("losses", out, near.loss);
  launch_td_lambda_loss_backward<float>(
      loss, nullptr, grad_losses.const_rows(), scale.data(), out.rows(), plan, scratch.data(), nullptr);
  same("loss gradient", out, near.loss_gradient);
  auto adjoint = scan;
  adjoint.tokens = grad_returns.const_rows();
  adjoint.rewards = {nullptr, 0};
  launch_td_lambda_backward<float>(
      adjoint, in.discounts(), out.rows(), terminal.data(), second.rows(), plan, scratch.data(), nullptr);
  same("grad_values", out, near.grad_values);
  same("grad_rewards", second, near.grad_rewards);
}

int test_all() {
  test_packed_segments();
  test_far_rows();
  test_plans<float>();
  // The builds with sanitizers take long to compile. Out of order, sequences overlap and race for what they write.
  if constexpr (!CUDA_EMULATOR_TSAN) {
    test_hostile_cu_seqlens<float>();
    test_plans<double>();
  }
  if constexpr (kPlain) test_plans<__nv_bfloat16>();
  std::printf(failures == 0 ? "all tests of the general operators passed\n" : "%d FAILED\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lambda_return::cuda::testing

int main() { return lambda_return::cuda::testing::test_all(); }
