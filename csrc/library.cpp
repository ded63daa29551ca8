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

  // The general forms. gamma and lam are float64 tensors, 0-dim or [B]; values, rewards, masks and old_values are
  // [B, T], or [total] where cu_seqlens [B + 1] says where each sequence begins; no mask: every token is valid.
  m.def(
      "td_lambda(Tensor values, Tensor terminal_rewards, Tensor? mask, Tensor? rewards, Tensor? cu_seqlens, "
      "Tensor gamma, Tensor lam, bool advantages=False) -> Tensor");
  m.def(
      "td_lambda_backward(Tensor grad_returns, Tensor? mask, Tensor? cu_seqlens, Tensor gamma, Tensor lam, "
      "bool with_rewards=False) -> (Tensor grad_values, Tensor grad_terminal_rewards, Tensor grad_rewards)");
  m.def(
      "td_lambda_pair(Tensor values, Tensor terminal_rewards, Tensor? mask, Tensor? rewards, Tensor? cu_seqlens, "
      "Tensor gamma, Tensor lam_returns, Tensor lam_advantages) -> (Tensor returns, Tensor advantages)");
  // (a, b) [B, 2] of each sequence: the carry H that enters it at its end leaves it at its beginning as a H + b.
  m.def(
      "td_lambda_map(Tensor values, Tensor? mask, Tensor? rewards, Tensor? cu_seqlens, Tensor gamma, Tensor lam) "
      "-> Tensor");
  // kind and reduction: LossKind and Reduction in kernels/token_loss.h. scale [B] is d loss / d (sum of the losses of a
  // sequence's tokens); statistics [6] are n, sum G, sum G^2, sum (G - V), sum (G - V)^2 and the clipped tokens.
  m.def(
      "td_lambda_loss(Tensor values, Tensor terminal_rewards, Tensor? mask, Tensor? attention_mask, Tensor? rewards, "
      "Tensor? old_values, Tensor? cu_seqlens, Tensor gamma, Tensor lam, Tensor? normalizer, int kind=0, "
      "float delta=1.0, float clip_range=0.0, int reduction=0) -> (Tensor loss, Tensor scale, Tensor statistics)");
  m.def(
      "td_lambda_loss_backward(Tensor grad_loss, Tensor scale, Tensor values, Tensor terminal_rewards, Tensor? mask, "
      "Tensor? attention_mask, Tensor? rewards, Tensor? old_values, Tensor? cu_seqlens, Tensor gamma, Tensor lam, "
      "int kind=0, float delta=1.0, float clip_range=0.0, int reduction=0) -> Tensor");

  // kind: BinKind in kernels/categorical_value_loss.h; logits are [B, T, K], or [total, K] with cu_seqlens. returns and
  // log_sums are kept for the backward, [B, T] or [total]; the latter is inf where a token does not count.
  m.def(
      "categorical_value_loss(Tensor logits, Tensor terminal_rewards, Tensor? mask, Tensor? attention_mask, "
      "Tensor? rewards, Tensor? cu_seqlens, Tensor gamma, Tensor lam, Tensor? normalizer, int kind=0, float low=0.0, "
      "float high=1.0, float sigma=0.75, int reduction=0) "
      "-> (Tensor loss, Tensor scale, Tensor statistics, Tensor returns, Tensor log_sums)");
  m.def(
      "categorical_value_loss_backward(Tensor grad_loss, Tensor scale, Tensor logits, Tensor returns, "
      "Tensor log_sums, Tensor? cu_seqlens, int kind=0, float low=0.0, float high=1.0, float sigma=0.75, "
      "int reduction=0) -> Tensor");
}
