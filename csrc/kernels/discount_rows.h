// One discount a row, as data.
#pragma once

#include "lambda_return.h"

namespace lambda_return {

// The discount of each row, from gamma and lam as float64, 0-dim or [B].
struct DiscountRows {
  const double *gamma, *lam;
  int64_t gamma_stride, lam_stride;  // 0: the same for all rows

  template <class Tensor>
  static DiscountRows of(const Tensor& gamma, const Tensor& lam) {
    return {
        static_cast<const double*>(gamma.const_data_ptr()), static_cast<const double*>(lam.const_data_ptr()),
        gamma.dim() == 0 ? 0 : 1, lam.dim() == 0 ? 0 : 1};
  }

  template <class acc_t>
  LAMBDA_RETURN_HOST_DEVICE Discount<acc_t> at(int64_t row) const {
    return Discount<acc_t>::from(gamma[row * gamma_stride], lam[row * lam_stride]);
  }
};

}  // namespace lambda_return
