// The general scan on the CPU, for td_lambda and its loss: rows of one length or of many, a discount for each row,
// rewards at every step.
//
// Where there is nothing but that to a return, the kernels of csrc/cpu/simd take rows as they lie in memory. Else a
// block of kBlock tokens at a time is brought into the accumulation type, turned into the terms of the recurrence,
// scanned by the kernels of csrc/cpu/simd, and consumed, all in buffers that stay in the first-level cache: memory
// moves as it would in one loop.
#pragma once

#include "../td_lambda_arguments.h"
#include "scan_rows.h"

namespace lambda_return::cpu {

inline const TokenLoops<double>& token_loops(double) { return instruction_set().double_loops; }
inline const TokenLoops<float>& token_loops(float) { return instruction_set().float_loops; }

// Where each row of a call begins, in tokens, and how long it is.
class Layout {
 public:
  // Raises where cu_seqlens does not run from 0 to total without falling.
  explicit Layout(const TokenShape& shape) : shape_{shape.B, shape.T} {
    if (!shape.packed) return;
    const auto* offsets = static_cast<const int64_t*>(shape.cu_seqlens.const_data_ptr());
    STD_TORCH_CHECK(offsets[0] == 0, "cu_seqlens must begin with 0, got ", offsets[0]);
    for (int64_t row = 0; row < shape.B; ++row) {
      STD_TORCH_CHECK(
          offsets[row] <= offsets[row + 1], "cu_seqlens must not fall, got ", offsets[row], " and then ",
          offsets[row + 1]);
    }
    STD_TORCH_CHECK(
        offsets[shape.B] == shape.T, "cu_seqlens must end with the number of tokens, ", shape.T, ", got ",
        offsets[shape.B]);
    shape_.offsets = offsets;
  }

  const RowShape& rows() const { return shape_; }

  // The rows of x, a matrix [B, T] or [1, total]; null where it is undefined.
  template <class T>
  T* row_of(const Rows<T>& x, int64_t row) const {
    if (x.data == nullptr) return nullptr;
    return shape_.offsets == nullptr ? x[row] : x.data + shape_.offsets[row];
  }
  // For a scan over both.
  template <class scalar_t, class T>
  Prefetch prefetch_for(const Rows<T>& x, const Rows<const uint8_t>& mask) const {
    const bool follow = x.follow(shape_.T) && (mask.data == nullptr || mask.follow(shape_.T));
    return cpu::prefetch_for<scalar_t>(shape_.tokens(), shape_.offsets != nullptr || follow);
  }

 private:
  RowShape shape_;
};

template <class T>
Rows<const T> const_rows_or_null(const Tensor& x) {
  return x.defined() ? const_rows<T>(x) : Rows<const T>{nullptr, 0};
}
// Of an output, [B, T] or [total]; null where it is not wanted.
template <class T>
Rows<T> mutable_token_rows(const Tensor& x, bool wanted = true) {
  return wanted ? Rows<T>{static_cast<T*>(x.mutable_data_ptr()), x.dim() == 2 ? x.stride(0) : 0} : Rows<T>{nullptr, 0};
}

// The mask of a block or a stretch where there is none.
inline const uint8_t* all_valid() {
  static const std::vector<uint8_t> ones(kStretch, 1);
  return ones.data();
}

inline const uint8_t* mask_of(const Layout& layout, const Rows<const uint8_t>& mask, const Stretch& stretch) {
  const uint8_t* row = layout.row_of(mask, stretch.row);
  return row == nullptr ? all_valid() : row + stretch.begin;
}

template <class scalar_t>
class TdLambdaScan {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using value_t = kernel_t<scalar_t>;

  // A block of a row after the scan: what the consumer sees. Pointers are to the block's first token.
  struct Block {
    int64_t row, begin, length;
    const acc_t *outputs, *values;  // of the head, and the values they say; the same but for logits
    const acc_t* carries;           // H, 0 where masked
    const acc_t* rewards;           // null: none
    const uint8_t* mask;
  };

  // lam: in place of the arguments' own.
  TdLambdaScan(const TdLambdaArguments& in, const Layout& layout, const Tensor& lam, bool logits = false)
      : layout_(layout),
        values_(const_rows<value_t>(in.values)),
        rewards_(const_rows_or_null<acc_t>(in.rewards)),
        mask_(const_rows_or_null<uint8_t>(in.mask)),
        terminal_rewards_(data_or_null<acc_t>(in.terminal_rewards)),
        discounts_(DiscountRows::of(in.gamma, lam)),
        logits_(logits) {}

  // Runs consume(block) over all tokens, within a stretch from right to left. stretch_of(stretch) makes the consumer of
  // a stretch.
  template <class ConsumerOf>
  void run(const ConsumerOf& consumer_of) const {
    scan_rows<acc_t>(
        layout_.rows(), From::kRight, rule(), first(), [&](const Stretch& stretch) { return map_of(stretch); },
        [&](const Stretch& stretch, acc_t carry) { return scan(stretch, carry, consumer_of(stretch)); },
        [](int64_t, acc_t) {});
  }

  // rows <- G, where there are neither rewards nor logits.
  void write_returns(const Rows<value_t>& rows) const {
    const auto& own = kernels<scalar_t>();
    const Prefetch prefetch = layout_.prefetch_for<scalar_t>(values_, mask_);
    const auto constants = [&](int64_t row) { return own.constants(discounts_.at<acc_t>(row), prefetch); };
    const auto values = [&](const Stretch& stretch) { return layout_.row_of(values_, stretch.row) + stretch.begin; };
    scan_rows<acc_t>(
        layout_.rows(), From::kRight, rule(), first(),
        [&](const Stretch& stretch) {
          return own.returns_map(
              constants(stretch.row), values(stretch), mask_of(layout_, mask_, stretch), stretch.length);
        },
        [&](const Stretch& stretch, acc_t carry) {
          return own.lambda_return(
              constants(stretch.row), values(stretch), mask_of(layout_, mask_, stretch), stretch.length, carry,
              layout_.row_of(rows, stretch.row) + stretch.begin);
        },
        [](int64_t, acc_t) {});
  }

  // The map of each row: its carry at the end to that at the beginning.
  template <class Take>
  void maps(const Take& take) const {
    const RowShape& rows = layout_.rows();
    parallel_rows(rows.B, rows.tokens() / std::max<int64_t>(1, rows.B), From::kRight, [&](int64_t row) {
      auto map = AffineMap<acc_t>::identity();
      for (int64_t index = 0; index < rows.stretches(row); ++index) {
        map = rule()(row).compose(map_of(rows.stretch(From::kRight, row, index)), map);
      }
      take(row, map);
    });
  }

 private:
  auto rule() const {
    return [this](int64_t row) { return AffineRule<acc_t>(discounts_.at<acc_t>(row)); };
  }

  auto first() const {
    return [this](int64_t row) { return terminal_rewards_ ? terminal_rewards_[row] : acc_t(0); };
  }

  // Calls body(block, constants, terms, kernels) block by block.
  template <class Body>
  void for_blocks(const Stretch& stretch, const Body& body) const {
    const auto& loops = token_loops(acc_t());
    const auto& own = kernels<scalar_t>();
    const Discount<acc_t> discount = discounts_.at<acc_t>(stretch.row);
    // Terms are made here only where the kernels cannot make them from the values as they lie in memory.
    constexpr bool kIsAccumulated = std::is_same_v<scalar_t, acc_t>;
    const bool make_terms = !kIsAccumulated || rewards_.data != nullptr || logits_;
    const auto constants =
        kernels<acc_t>().constants(make_terms ? Discount<acc_t>{acc_t(1), discount.carry} : discount, Prefetch::kNone);
    alignas(64) acc_t widened[kBlock], values[kBlock], terms[kBlock];
    const value_t* row_values = layout_.row_of(values_, stretch.row);
    const acc_t* row_rewards = layout_.row_of(rewards_, stretch.row);
    const uint8_t* row_mask = layout_.row_of(mask_, stretch.row);
    for (int64_t end = stretch.begin + stretch.length; end > stretch.begin;) {
      const int64_t begin = std::max(stretch.begin, end - kBlock), length = end - begin;
      Block block{
          stretch.row,
          begin,
          length,
          nullptr,
          nullptr,
          nullptr,
          row_rewards ? row_rewards + begin : nullptr,
          row_mask ? row_mask + begin : all_valid()};
      if constexpr (kIsAccumulated) {
        block.outputs = row_values + begin;
      } else {
        own.widen(row_values + begin, length, widened);
        block.outputs = widened;
      }
      block.values = block.outputs;
      if (logits_) {
        loops.head_values(block.outputs, length, values);
        block.values = values;
      }
      const acc_t* scanned = block.values;
      if (make_terms) {
        loops.recurrence_terms(block.values, block.rewards, discount, length, terms);
        scanned = terms;
      }
      body(block, constants, scanned);
      end = begin;
    }
  }

  AffineMap<acc_t> map_of(const Stretch& stretch) const {
    const auto row_rule = rule()(stretch.row);
    auto map = AffineMap<acc_t>::identity();
    for_blocks(stretch, [&](const Block& block, const auto& constants, const acc_t* scanned) {
      map = row_rule.compose(kernels<acc_t>().returns_map(constants, scanned, block.mask, block.length), map);
    });
    return map;
  }

  template <class Consume>
  AffineMap<acc_t> scan(const Stretch& stretch, acc_t carry, const Consume& consume) const {
    const auto row_rule = rule()(stretch.row);
    auto map = AffineMap<acc_t>::identity();
    alignas(64) acc_t carries[kBlock];
    for_blocks(stretch, [&](Block& block, const auto& constants, const acc_t* scanned) {
      const auto block_map =
          kernels<acc_t>().lambda_return(constants, scanned, block.mask, block.length, carry, carries);
      block.carries = carries;
      consume(block);
      carry = row_rule.apply(block_map, carry);
      map = row_rule.compose(block_map, map);
    });
    return map;
  }

  const Layout& layout_;
  Rows<const value_t> values_;
  Rows<const acc_t> rewards_;
  Rows<const uint8_t> mask_;
  const acc_t* terminal_rewards_;
  DiscountRows discounts_;
  bool logits_;
};

}  // namespace lambda_return::cpu
