// Runs the CPU kernels of one instruction set one after another, for callgrind to count: see instruction_counts.py.
//
//   instruction_counts SET     with SET portable or avx2; prints the tokens and the name of each case
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cpu/simd/instruction_set.h"

using namespace lambda_return;
using namespace lambda_return::cpu;

// What callgrind collects, from the call to the return; it knows the function by this name. After the statement that
// does nothing, the kernel is not called in place of the return.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>& kernel) {
  kernel();
  asm volatile("" ::: "memory");
}

namespace {

constexpr int64_t T = 8192, K = 51;  // tokens of a row, logits of a token

class Cases {
 public:
  Cases(const char* set, const char* dtype) : set_(set), dtype_(dtype) {}

  // The first call is not counted: it binds symbols.
  void operator()(const char* kernel, const char* form, int64_t tokens, const std::function<void()>& call) const {
    call();
    counted(call);
    std::printf("%d %s %s %s %s\n", static_cast<int>(tokens), set_, kernel, dtype_, form);
  }

 private:
  const char *set_, *dtype_;
};

// Numbers from 0 to 1, and a mask that drops so many of every ten tokens.
template <class acc_t>
std::vector<acc_t> numbers(int64_t n, int64_t step) {
  std::vector<acc_t> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<acc_t>(i * step % 1000) / 1000;
  return x;
}
std::vector<uint8_t> mask_without(int64_t dropped, int64_t step) {
  std::vector<uint8_t> mask(T);
  for (int64_t t = 0; t < T; ++t) mask[t] = t * step % 10 >= dropped;
  return mask;
}

template <class scalar_t>
void count_rows(const Cases& count, const RowKernels<scalar_t>& kernels) {
  using acc_t = accumulate_t<scalar_t>;
  const auto wide = numbers<acc_t>(kBlock * K, 7919), targets = numbers<acc_t>(T, 104729);
  std::vector<scalar_t> values(kBlock * K), out(kBlock * K);
  kernels.narrow(wide.data(), kBlock * K, values.data());
  const auto dense = mask_without(0, 1), gaps = mask_without(3, 7919), others = mask_without(2, 3);
  const auto constants = kernels.constants(Discount<acc_t>::from(1.0, 0.95), Prefetch::kBeyond);
  const scalar_t* v = values.data();
  scalar_t* o = out.data();
  SquaredErrorLanes error;
  const auto count_scans = [&](const char* form, const uint8_t* m) {
    count("returns_map", form, T, [&] { kernels.returns_map(constants, v, m, T); });
    count("adjoint_map", form, T, [&] { kernels.adjoint_map(constants, v, m, T); });
    count("lambda_return", form, T, [&] { kernels.lambda_return(constants, v, m, T, 1, o); });
    count("lambda_return_backward", form, T, [&] { kernels.lambda_return_backward(constants, v, m, T, 1, o); });
  };
  const auto count_losses = [&](const char* form, const uint8_t* attention, const uint8_t* m) {
    count("lambda_value_loss", form, T, [&] { kernels.lambda_value_loss(constants, v, attention, m, T, 1, &error); });
    count("lambda_value_loss_backward", form, T, [&] {
      kernels.lambda_value_loss_backward(constants, v, attention, m, T, 1, 1, o);
    });
  };
  count_scans("dense", dense.data());
  count_scans("gaps", gaps.data());
  count_losses("dense", dense.data(), dense.data());
  count_losses("gaps", gaps.data(), gaps.data());
  count_losses("two_masks", others.data(), gaps.data());
  const uint8_t* m = gaps.data();
  const acc_t* g = targets.data();
  count("masked_mse", "gaps", T, [&] { kernels.masked_mse(v, v, m, T, &error); });
  count("masked_mse_of_wide", "gaps", T, [&] { kernels.masked_mse_of_wide(v, g, m, T, &error); });
  count("masked_mse_backward", "gaps", T, [&] { kernels.masked_mse_backward(v, v, m, T, 1, o); });
  count("masked_mse_backward_of_wide", "gaps", T, [&] { kernels.masked_mse_backward_of_wide(v, g, m, T, 1, o); });

  std::vector<acc_t> x(kBlock), largest(kBlock), log_sums(kBlock);
  count("widen", "dense", kBlock, [&] { kernels.widen(v, kBlock, x.data()); });
  count("narrow", "dense", kBlock, [&] { kernels.narrow(g, kBlock, o); });
  const LogitBlock<scalar_t> block{v, K, K, kBlock};
  const auto bins_of = [](BinKind kind) { return Bins<acc_t>::of(static_cast<int64_t>(kind), K, 0, 1, 0.75); };
  const auto two_hot = bins_of(BinKind::kTwoHot), hl_gauss = bins_of(BinKind::kHlGauss);
  count("project_logits", "dense", kBlock, [&] {
    kernels.project_logits(two_hot, block, nullptr, nullptr, x.data(), largest.data(), log_sums.data());
  });
  const auto count_logits = [&](const char* form, const Bins<acc_t>& bins) {
    count("cross_entropies", form, kBlock, [&] {
      kernels.cross_entropies(bins, block, g, largest.data(), log_sums.data(), x.data());
    });
    count("logit_gradients", form, kBlock, [&] {
      kernels.logit_gradients(bins, block, g, log_sums.data(), wide.data(), o);
    });
  };
  count_logits("two_hot", two_hot);
  count_logits("hl_gauss", hl_gauss);
}

template <class acc_t>
void count_tokens(const Cases& count, const TokenLoops<acc_t>& loops) {
  const auto values = numbers<acc_t>(kBlock, 7919), carries = numbers<acc_t>(kBlock, 104729),
             rewards = numbers<acc_t>(kBlock, 31);
  const auto mask = mask_without(3, 7919);
  const auto discount = Discount<acc_t>::from(1.0, 0.95);
  const acc_t *v = values.data(), *h = carries.data(), *r = rewards.data();
  const uint8_t* m = mask.data();
  std::vector<acc_t> out(kBlock), more(kBlock);
  acc_t* o = out.data();
  count("head_values", "dense", kBlock, [&] { loops.head_values(v, kBlock, o); });
  count("recurrence_terms", "rewards", kBlock, [&] { loops.recurrence_terms(v, r, discount, kBlock, o); });
  count("finish_returns", "rewards", kBlock, [&] { loops.finish_returns(h, r, nullptr, m, kBlock, o); });
  count("finish_returns", "advantages", kBlock, [&] { loops.finish_returns(h, r, v, m, kBlock, o); });
  count("finish_adjoint", "rewards", kBlock, [&] { loops.finish_adjoint(h, v, m, discount, kBlock, o, more.data()); });
  // token_losses is the forward and the backward: what it is asked for decides.
  const auto count_losses = [&](const char* form, LossKind kind, const acc_t* old_values) {
    const TokenLoss<acc_t> loss{kind, acc_t(0.5), acc_t(0.25)};
    TokenSums sums;
    count("token_losses", form, kBlock, [&] {
      loops.token_losses(loss, {kBlock, v, v, h, r, old_values, m, nullptr, nullptr}, &sums);
    });
    count("token_derivatives", form, kBlock, [&] {
      loops.token_losses(loss, {kBlock, v, v, h, r, old_values, m, o, nullptr}, nullptr);
    });
  };
  count_losses("mse", LossKind::kMse, nullptr);
  count_losses("huber", LossKind::kHuber, nullptr);
  count_losses("huber_clipped", LossKind::kHuber, r);
  count_losses("bce", LossKind::kBce, nullptr);
  count_losses("bce_logits", LossKind::kBceLogits, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const InstructionSet* set = std::string(argv[1]) == "avx2" ? avx2() : portable();
  if (set == nullptr) return 3;
  count_rows({set->name, "float32"}, set->float32);
  count_rows({set->name, "bfloat16"}, set->bfloat16);
  count_rows({set->name, "float16"}, set->float16);
  count_rows({set->name, "float64"}, set->float64);
  count_tokens({set->name, "float32"}, set->float_loops);
  count_tokens({set->name, "float64"}, set->double_loops);
}
