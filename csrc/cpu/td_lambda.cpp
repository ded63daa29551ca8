#include "td_lambda_scan.h"

namespace lambda_return::cpu {
namespace {

// out <- G, or G - V.
template <class scalar_t>
void write_returns(
    const TdLambdaArguments& in, const Layout& layout, const Tensor& lam, bool advantages, const Tensor& out) {
  using acc_t = accumulate_t<scalar_t>;
  const auto rows = mutable_token_rows<kernel_t<scalar_t>>(out);
  const auto& loops = token_loops(acc_t());
  const TdLambdaScan<scalar_t> scan(in, layout, lam);
  if (!advantages && !in.rewards.defined()) return scan.write_returns(rows);
  scan.run([&](const Stretch& stretch) {
    auto* row = layout.row_of(rows, stretch.row);
    return [&, row](const auto& block) {
      alignas(64) acc_t results[kBlock];
      loops.finish_returns(
          block.carries, block.rewards, advantages ? block.values : nullptr, block.mask, block.length, results);
      kernels<scalar_t>().narrow(results, block.length, row + block.begin);
    };
  });
}

Tensor td_lambda(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask, const OptionalTensor& rewards,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam, bool advantages) {
  const TdLambdaArguments in(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam);
  const Layout layout(in.shape);
  Tensor out = in.shape.new_tokens();
  THO_DISPATCH_V2(
      values.scalar_type(), "td_lambda",
      AT_WRAP([&] { write_returns<scalar_t>(in, layout, in.lam, advantages, out);
  }), LAMBDA_RETURN_VALUE_TYPES);
  return out;
}

std::tuple<Tensor, Tensor> td_lambda_pair(
    const Tensor& values, const Tensor& terminal_rewards, const OptionalTensor& mask, const OptionalTensor& rewards,
    const OptionalTensor& cu_seqlens, const Tensor& gamma, const Tensor& lam_returns, const Tensor& lam_advantages) {
  const TdLambdaArguments in(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam_returns);
  const Tensor second_lam = in.shape.per_row(lam_advantages, "lam_advantages");
  const Layout layout(in.shape);
  Tensor returns = in.shape.new_tokens(), advantages = in.shape.new_tokens();
  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_pair", AT_WRAP([&] {
    write_returns<scalar_t>(in, layout, in.lam, false, returns);
    write_returns<scalar_t>(in, layout, second_lam, true, advantages);
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {returns, advantages};
}

Tensor td_lambda_map(
    const Tensor& values, const OptionalTensor& mask, const OptionalTensor& rewards, const OptionalTensor& cu_seqlens,
    const Tensor& gamma, const Tensor& lam) {
  const TdLambdaArguments in(values, std::nullopt, mask, rewards, cu_seqlens, gamma, lam);
  const Layout layout(in.shape);
  Tensor out = torch::stable::new_empty(values, {in.shape.B, 2}, accumulate_dtype(values));
  THO_DISPATCH_V2(values.scalar_type(), "td_lambda_map", AT_WRAP([&] {
    using acc_t = accumulate_t<scalar_t>;
    auto* maps = static_cast<acc_t*>(out.mutable_data_ptr());
    TdLambdaScan<scalar_t>(in, layout, in.lam).maps([&](int64_t row, const AffineMap<acc_t>& map) {
      maps[2 * row] = map.a;
      maps[2 * row + 1] = map.b;
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return out;
}

// The adjoint at grad_returns: see kernels/lambda_return.h.
template <class scalar_t>
class AdjointScan {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using value_t = kernel_t<scalar_t>;

  AdjointScan(
      const Layout& layout, const Tensor& grads, const Tensor& mask, const Tensor& gamma, const Tensor& lam,
      const Tensor& grad_terminal)
      : layout_(layout),
        grads_(const_rows<value_t>(grads)),
        mask_(const_rows_or_null<uint8_t>(mask)),
        discounts_(DiscountRows::of(gamma, lam)),
        terminal_(static_cast<acc_t*>(grad_terminal.mutable_data_ptr())) {}

  // dv <- the gradient of the values.
  void write(const Rows<value_t>& dv) const {
    const auto& own = kernels<scalar_t>();
    const Prefetch prefetch = layout_.prefetch_for<scalar_t>(grads_, mask_);
    const auto constants = [&](int64_t row) { return own.constants(discounts_.at<acc_t>(row), prefetch); };
    run([&](const Stretch& s) { return own.adjoint_map(constants(s.row), grads(s), mask(s), s.length); },
        [&](const Stretch& s, acc_t carry) {
          return own.lambda_return_backward(
              constants(s.row), grads(s), mask(s), s.length, carry, layout_.row_of(dv, s.row) + s.begin);
        });
  }

  // And dr <- that of the rewards: block by block, through buffers.
  void write(const Rows<value_t>& dv, const Rows<acc_t>& dr) const {
    const auto& own = kernels<scalar_t>();
    const auto& accumulated = kernels<acc_t>();
    run(
        [&](const Stretch& s) {
          return for_blocks(s, [&](int64_t, int64_t length, auto* x, auto* block_mask, const auto& constants) {
            return accumulated.adjoint_map(constants, x, block_mask, length);
          });
        },
        [&](const Stretch& s, acc_t carry) {
          value_t* row_dv = layout_.row_of(dv, s.row) + s.begin;
          acc_t* row_dr = layout_.row_of(dr, s.row) + s.begin;
          return for_blocks(s, [&](int64_t begin, int64_t length, auto* x, auto* block_mask, const auto& constants) {
            alignas(64) acc_t before[kBlock], results[kBlock];
            const auto map = accumulated.lambda_return_backward(constants, x, block_mask, length, carry, before);
            token_loops(acc_t()).finish_adjoint(
                before, x, block_mask, discounts_.at<acc_t>(s.row), length, results, row_dr + begin);
            own.narrow(results, length, row_dv + begin);
            carry = rule(s.row).apply(map, carry);
            return map;
          });
        });
  }

 private:
  AffineRule<acc_t> rule(int64_t row) const { return AffineRule<acc_t>(discounts_.at<acc_t>(row)); }
  const value_t* grads(const Stretch& s) const { return layout_.row_of(grads_, s.row) + s.begin; }
  const uint8_t* mask(const Stretch& s) const { return mask_of(layout_, mask_, s); }

  template <class MapOf, class Run>
  void run(const MapOf& map_of, const Run& run_stretch) const {
    scan_rows<acc_t>(
        layout_.rows(), From::kLeft, [this](int64_t row) { return rule(row); }, [](int64_t) { return acc_t(0); },
        map_of, run_stretch, [this](int64_t row, acc_t carry) { terminal_[row] = carry; });
  }

  // Block by block from left to right: body(begin, length, gradients, mask, constants) -> map of the block.
  template <class Body>
  AffineMap<acc_t> for_blocks(const Stretch& s, const Body& body) const {
    alignas(64) acc_t widened[kBlock];
    // A itself reaches the tokens; their weights come after.
    const auto constants = kernels<acc_t>().constants({acc_t(1), discounts_.at<acc_t>(s.row).carry}, Prefetch::kNone);
    auto map = AffineMap<acc_t>::identity();
    for (int64_t begin = 0; begin < s.length; begin += kBlock) {
      const int64_t length = std::min(kBlock, s.length - begin);
      kernels<scalar_t>().widen(grads(s) + begin, length, widened);
      map = rule(s.row).compose(body(begin, length, widened, mask(s) + begin, constants), map);
    }
    return map;
  }

  const Layout& layout_;
  Rows<const value_t> grads_;
  Rows<const uint8_t> mask_;
  DiscountRows discounts_;
  acc_t* terminal_;
};

std::tuple<Tensor, Tensor, Tensor> td_lambda_backward(
    const Tensor& grad_returns, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const Tensor& gamma,
    const Tensor& lam, bool with_rewards) {
  const TokenShape shape(grad_returns, "grad_returns", cu_seqlens);
  const Layout layout(shape);
  const Tensor grads = shape.rows(grad_returns), bytes = shape.optional_mask(mask, "mask");
  const Tensor gammas = shape.per_row(gamma, "gamma"), lams = shape.per_row(lam, "lam");
  const ScalarType acc_dtype = accumulate_dtype(grad_returns);
  Tensor grad_values = shape.new_tokens();
  Tensor grad_terminal = torch::stable::new_empty(grad_returns, {shape.B}, acc_dtype);
  Tensor grad_rewards =
      with_rewards ? shape.new_tokens(acc_dtype) : torch::stable::new_empty(grad_returns, {0}, acc_dtype);

  THO_DISPATCH_V2(grad_returns.scalar_type(), "td_lambda_backward", AT_WRAP([&] {
    const AdjointScan<scalar_t> scan(layout, grads, bytes, gammas, lams, grad_terminal);
    const auto dv = mutable_token_rows<kernel_t<scalar_t>>(grad_values);
    if (with_rewards) {
      scan.write(dv, mutable_token_rows<accumulate_t<scalar_t>>(grad_rewards));
    } else {
      scan.write(dv);
    }
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {grad_values, grad_terminal, grad_rewards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CPU, m) {
  m.impl("td_lambda", TORCH_BOX(&td_lambda));
  m.impl("td_lambda_pair", TORCH_BOX(&td_lambda_pair));
  m.impl("td_lambda_map", TORCH_BOX(&td_lambda_map));
  m.impl("td_lambda_backward", TORCH_BOX(&td_lambda_backward));
}

}  // namespace lambda_return::cpu
