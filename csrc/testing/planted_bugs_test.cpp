// The net itself: plants one bug of enum Bug in the shipped kernels and runs a few cases that must show it.
//
//   planted_bugs_test           the names of all bugs
//   planted_bugs_test NAME      exits with 0 only if nothing was noticed; NAME "none" plants nothing
//
// planted_bugs.py runs it in every build and writes the table.
#define LAMBDA_RETURN_PLANT_BUGS
#include "categorical_cases.h"

namespace lambda_return::cuda::testing {
namespace {

using cuda_emulator::Order;

constexpr const char* kBugNames[] = {
    "none",
    "no_barrier_before_totals_are_read",
    "no_barrier_before_totals_are_reused",
    "wrong_lane_in_scan",
    "relaxed_flag",
    "off_by_one_at_the_row_edge",
    "carry_not_reset_between_rows",
    "mask_ignored_in_vector_path",
    "flags_not_cleared",
    "last_block_does_not_acquire",
    "no_barrier_before_returns_are_read",
    "wrong_edge_between_turns",
};
static_assert(std::size(kBugNames) == static_cast<size_t>(Bug::kCount));

// One of each plan, in shapes that end inside a tile, until one shows something; float32, as the code is the same for
// all types.
void run_cases() {
  const int64_t tile = kThreads * kItems<float>;
  std::vector<ScheduleSpec> schedules = {{Order::kAscending, 1, 2}, {Order::kDescending, 1, 2}, {Order::kRandom, 3, 3}};
  Case many{.B = 21, .T = 301};
  many.plan = ScanPlan{ScanPlan::kWarpPerRow, 2};
  test_case<float>(many, schedules);
  if (failures != 0) return;
  Case fewer{.B = 3, .T = 3 * tile + 5, .layout = Layout::kPadded};
  fewer.plan = ScanPlan{ScanPlan::kBlockPerRow, 2};
  test_case<float>(fewer, schedules);
  if (failures != 0) return;
  Case segments{.B = 2, .T = 2 * tile + 1};
  segments.plan = plan_of_segments<float>(2, segments.T, 1);
  test_case<float>(segments, schedules);
  if (failures != 0) return;
  test_categorical<float>({.B = 2, .T = 301, .K = 11}, schedules);
}

int plant(const std::string& name) {
  for (size_t bug = 0; bug < std::size(kBugNames); ++bug) {
    if (name != kBugNames[bug]) continue;
    planted_bug = static_cast<Bug>(bug);
    run_cases();
    return failures == 0 ? 0 : 2;
  }
  std::printf("no such bug: %s\n", name.c_str());
  return 3;
}

}  // namespace
}  // namespace lambda_return::cuda::testing

#if CUDA_EMULATOR_TSAN
extern "C" const char* __tsan_default_options() { return "halt_on_error=1:atexit_sleep_ms=0"; }
#endif

int main(int argc, char** argv) {
  using namespace lambda_return::cuda::testing;
  if (argc == 2) return plant(argv[1]);
  for (const char* name : kBugNames) std::printf("%s\n", name);
  return 0;
}
