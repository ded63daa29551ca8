#include "torch_cuda.h"

#include "../arguments.h"
#include "masked_mse.cuh"

namespace lambda_return::cuda {
namespace {

// Calls body(inputs) with the device pointers of the arguments, the targets in their own type.
template <class value_t, class Body>
void with_device_inputs(const MaskedMseArguments& in, const Body& body) {
  using acc_t = accumulate_t<value_t>;
  const auto values = device_rows<value_t>(in.values);
  const auto mask = device_rows<uint8_t>(in.mask);
  if (in.targets_as_values()) {
    body(MseInputs<value_t, value_t>{in.B, in.T, values, device_rows<value_t>(in.targets), mask});
  } else {
    body(MseInputs<value_t, acc_t>{in.B, in.T, values, device_rows<acc_t>(in.targets), mask});
  }
}

// values [B, T], targets [B, T], mask [B, T] -> loss 0-dim, num_tokens 0-dim.
std::tuple<Tensor, Tensor> masked_mse(const Tensor& values, const Tensor& targets, const Tensor& mask) {
  const OnDeviceOf device(values);
  const MaskedMseArguments in(values, targets, mask);
  auto [loss, num_tokens] = new_mean_and_count(values);
  if (values.numel() == 0) return {loss, num_tokens};

  THO_DISPATCH_V2(values.scalar_type(), "masked_mse", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    with_device_inputs<value_t>(in, [&](const auto& inputs) {
      const Tensor scratch = workspace(values, masked_mse_workspace_bytes(inputs));
      launch_masked_mse(
          inputs, static_cast<accumulate_t<value_t>*>(loss.mutable_data_ptr()), num_tokens.mutable_data_ptr<int64_t>(),
          scratch.mutable_data_ptr(), device.stream());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return {loss, num_tokens};
}

// grad_loss 0-dim, num_tokens 0-dim from the forward, then its inputs -> grad_values [B, T].
Tensor masked_mse_backward(
    const Tensor& grad_loss, const Tensor& num_tokens, const Tensor& values, const Tensor& targets,
    const Tensor& mask) {
  const OnDeviceOf device(values);
  const MaskedMseArguments in(values, targets, mask);
  const LossGradientArguments grad(grad_loss, num_tokens, values);
  Tensor grad_values = torch::stable::new_empty(values, {in.B, in.T});
  if (grad_values.numel() == 0) return grad_values;

  THO_DISPATCH_V2(values.scalar_type(), "masked_mse_backward", AT_WRAP([&] {
    using value_t = device_t<scalar_t>;
    with_device_inputs<value_t>(in, [&](const auto& inputs) {
      launch_masked_mse_backward(
          inputs, static_cast<const accumulate_t<value_t>*>(grad.grad_loss.const_data_ptr()),
          grad.num_tokens.const_data_ptr<int64_t>(), mutable_device_rows<value_t>(grad_values), device.stream());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }), LAMBDA_RETURN_VALUE_TYPES);
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lambda_return, CUDA, m) {
  m.impl("masked_mse", TORCH_BOX(&masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&masked_mse_backward));
}

}  // namespace lambda_return::cuda
