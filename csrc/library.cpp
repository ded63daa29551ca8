// Every operator schema of the library. All are functional: nothing is mutated, no output aliases an input.
//
// Shapes: values, targets, returns and masks are [B, T]; terminal_rewards is [B]; loss and num_tokens are
// 0-dim. Fake and autograd registrations of the same operators: lambda_return_ext/_registrations.py.
#include "torch_abi.h"

STABLE_TORCH_LIBRARY(lambda_return, m) {
  m.def(
      "lambda_return(Tensor values, Tensor terminal_rewards, Tensor mask, "
      "float gamma=1.0, float lam=0.95) -> Tensor");
  m.def(
      "lambda_return_backward(Tensor grad_returns, Tensor mask, "
      "float gamma=1.0, float lam=0.95) -> (Tensor grad_values, Tensor grad_terminal_rewards)");

  m.def(
      "lambda_value_loss(Tensor values, Tensor terminal_rewards, Tensor attention_mask, Tensor loss_mask, "
      "float gamma=1.0, float lam=0.95) -> (Tensor loss, Tensor num_tokens)");
  m.def(
      "lambda_value_loss_backward(Tensor grad_loss, Tensor num_tokens, Tensor values, "
      "Tensor terminal_rewards, Tensor attention_mask, Tensor loss_mask, "
      "float gamma=1.0, float lam=0.95) -> Tensor");

  m.def("masked_mse(Tensor values, Tensor targets, Tensor mask) -> (Tensor loss, Tensor num_tokens)");
  m.def(
      "masked_mse_backward(Tensor grad_loss, Tensor num_tokens, Tensor values, Tensor targets, "
      "Tensor mask) -> Tensor");

  m.def("eos_mask(Tensor mask) -> Tensor");
}
