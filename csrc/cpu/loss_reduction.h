// From the sums of each stretch of tokens to what a loss over lambda-returns gives: the loss, the scale of each
// sequence's gradient, and the statistics.
#pragma once

#include "td_lambda_scan.h"

namespace lambda_return::cpu {

class LossReduction {
 public:
  LossReduction(const TokenShape& shape, const Layout& layout, Reduction reduction, const OptionalTensor& normalizer)
      : layout_(layout), reduction_(reduction), first_part_(layout.rows().B + 1, 0) {
    const Tensor& like = shape.like;
    const ScalarType acc_dtype = accumulate_dtype(like);
    if (normalizer) {
      check_scalar(*normalizer, "normalizer", like);
      normalizer_ = contiguous_as(*normalizer, acc_dtype);
    }
    const RowShape& rows = layout.rows();
    loss_ = of_tokens() ? shape.new_tokens(acc_dtype) : torch::stable::new_empty(like, {}, acc_dtype);
    scale_ = torch::stable::new_empty(like, {rows.B}, acc_dtype);
    statistics_ = torch::stable::new_empty(like, {TokenSums::kStatistics}, ScalarType::Double);
    for (int64_t row = 0; row < rows.B; ++row) first_part_[row + 1] = first_part_[row] + rows.stretches(row);
    parts_.resize(first_part_[rows.B]);
  }

  // What to add a stretch's tokens to; the same for any number of threads.
  TokenSums* sums_of(const Stretch& stretch) { return &parts_[first_part_[stretch.row] + stretch.index]; }

  // Where the losses of a row's tokens go; null where they are only summed.
  template <class acc_t>
  acc_t* losses_of(int64_t row) const {
    return layout_.row_of(mutable_token_rows<acc_t>(loss_, of_tokens()), row);
  }

  // (loss, scale, statistics)
  std::tuple<Tensor, Tensor, Tensor> finish() {
    const std::vector<TokenSums> sums = row_sums();
    TokenSums all;
    double sequences = 0, of_sequences = 0;
    for (const TokenSums& row : sums) {
      all.add(row);
      sequences += row.tokens > 0;
      of_sequences += row.loss * reciprocal(row.tokens);
    }
    const bool by_sequence = reduction_ == Reduction::kSequenceMean;
    double denominator = 1;
    if (normalizer_.defined()) {
      denominator = read(normalizer_);
    } else if (by_sequence || reduction_ == Reduction::kTokenMean) {
      denominator = by_sequence ? sequences : all.tokens;
    }
    const double factor = reciprocal(denominator);
    for (int64_t row = 0; row < layout_.rows().B; ++row) {
      write(scale_, row, by_sequence ? factor * reciprocal(sums[row].tokens) : factor);
    }
    if (!of_tokens()) write(loss_, 0, (by_sequence ? of_sequences : all.loss) * factor);
    const double kept[] = {all.tokens, all.returns, all.squared_returns, all.errors, all.squared_errors, all.clipped};
    std::copy(std::begin(kept), std::end(kept), static_cast<double*>(statistics_.mutable_data_ptr()));
    return {loss_, scale_, statistics_};
  }

 private:
  bool of_tokens() const { return reduction_ == Reduction::kNone; }

  // The sums of each row, added up over its stretches in their order.
  std::vector<TokenSums> row_sums() const {
    const RowShape& rows = layout_.rows();
    std::vector<TokenSums> sums(rows.B);
    const TokenSums* part = parts_.data();
    for (int64_t row = 0; row < rows.B; ++row) {
      for (int64_t index = 0; index < rows.stretches(row); ++index) {
        sums[row].add(*part++);
      }
    }
    return sums;
  }

  static double reciprocal(double x) { return x == 0 ? 0 : 1 / x; }
  // Element i of a contiguous float32 or float64 tensor, and of a 0-dim one.
  static void write(const Tensor& x, int64_t i, double value) {
    if (x.scalar_type() == ScalarType::Double) {
      static_cast<double*>(x.mutable_data_ptr())[i] = value;
    } else {
      static_cast<float*>(x.mutable_data_ptr())[i] = static_cast<float>(value);
    }
  }
  static double read(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? *static_cast<const double*>(x.const_data_ptr())
                                                 : double(*static_cast<const float*>(x.const_data_ptr()));
  }

  const Layout& layout_;
  Reduction reduction_;
  Tensor normalizer_, loss_, scale_, statistics_;
  std::vector<int64_t> first_part_;  // [B + 1]
  std::vector<TokenSums> parts_;
};

}  // namespace lambda_return::cpu
