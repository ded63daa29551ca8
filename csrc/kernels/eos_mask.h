// The last valid position of one row.
#pragma once

#include "numeric.h"

namespace lambda_return {

// mask [T] of any type that compares with 0. Returns -1 where no position is valid.
template <class mask_t>
LAMBDA_RETURN_HOST_DEVICE int64_t last_valid_position(const mask_t* mask, int64_t T) {
  int64_t t = T - 1;
  while (t >= 0 && mask[t] == mask_t(0)) {
    --t;
  }
  return t;
}

}  // namespace lambda_return
