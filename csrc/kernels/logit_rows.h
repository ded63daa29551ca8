// Where the logits of each token are.
#pragma once

#include "numeric.h"

namespace lambda_return {

// The K logits of each token: token t of row b begins at data + b * row_stride + t * token_stride.
template <class T>
struct LogitRows {
  T* data;
  int64_t row_stride, token_stride;

  LAMBDA_RETURN_HOST_DEVICE T* at(int64_t row, int64_t t) const { return data + row * row_stride + t * token_stride; }
};

}  // namespace lambda_return
