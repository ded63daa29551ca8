// The one place that says which libtorch this library needs. Include it first, everywhere torch is included.
//
// Only the stable ABI of libtorch is used, so that a binary built against one torch runs under every later
// one.
#pragma once

// PyTorch 2.10: the first with parallel_for, const_data_ptr and the dispatcher call in the stable ABI.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
