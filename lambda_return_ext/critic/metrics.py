"""What the critic is judged by: ranking of held-out pairs, and two baselines that need no training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from lambda_return_ext import compute_pairwise_accuracy, compute_token_variance, create_eos_only_mask
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data import Collator, Solution, TokenPair
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.model import PromptGroup, continue_prompt


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module, loss: ValueLossConfig, pairs: Sequence[TokenPair], collate: Collator, batch_size: int
) -> dict[str, float]:
    """Measure the model on pairs; every pair counts once and a tie counts as wrong.

    Returns:
        `pairwise_accuracy` (by the mean value over output tokens), `mean_right`, `mean_wrong`, `margin`,
        `token_variance_right`, `token_variance_wrong`, `last_token_accuracy` (by the value of the last token
        alone) and `loss`, the training loss over all output tokens; each the mean over pairs.
    """
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(pairs, key=lambda pair: pair.length)
    totals: dict[str, float] = {}
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        batch = collate(part).to(device)
        values = model(batch.inputs, batch.attention_mask)
        ends = create_eos_only_mask(batch.loss_mask)
        (right, wrong), (mask_right, mask_wrong), (end_right, end_wrong) = (
            tensor.split(len(part)) for tensor in (values, batch.loss_mask, ends)
        )
        ranking = compute_pairwise_accuracy(right, wrong, mask_right, mask_wrong)
        last = compute_pairwise_accuracy(right, wrong, end_right, end_wrong)
        measured = {
            "pairwise_accuracy": ranking["pairwise_accuracy"],
            "mean_right": ranking["mean_pos"],
            "mean_wrong": ranking["mean_neg"],
            "margin": ranking["margin"],
            "token_variance_right": compute_token_variance(right, mask_right),
            "token_variance_wrong": compute_token_variance(wrong, mask_wrong),
            "last_token_accuracy": last["pairwise_accuracy"],
            "loss": value_loss(loss, values, batch.attention_mask, batch.loss_mask, batch.terminal_rewards)[0].item(),
        }
        for name, value in measured.items():
            totals[name] = totals.get(name, 0.0) + value * len(part)
    return {name: total / len(pairs) for name, total in totals.items()}


def length_baseline(train: Sequence[TokenPair], validation: Sequence[TokenPair]) -> tuple[str, float]:
    """Rank by length alone, in the direction that is better on the training pairs.

    Returns:
        "shorter is right" or "longer is right", and its pairwise accuracy on validation; a tie counts as wrong.
    """

    def accuracy(pairs: Sequence[TokenPair], sign: int) -> float:
        gains = [sign * (pair.right.outputs - pair.wrong.outputs) for pair in pairs]
        return sum(gain > 0 for gain in gains) / len(gains)

    sign = 1 if accuracy(train, 1) > accuracy(train, -1) else -1
    return ("longer is right" if sign == 1 else "shorter is right"), accuracy(validation, sign)


@torch.inference_mode()
def likelihood_baseline(
    language_model: nn.Module,
    validation: Sequence[TokenPair],
    groups: Iterable[PromptGroup],
    advance: Callable[[int], None],
) -> float:
    """Pairwise accuracy of ranking by the language model's mean log-probability per output token.

    Args:
        language_model: a transformers causal language model.
        validation: the pairs to rank; a tie counts as wrong.
        groups: their solutions by prompt.
        advance: called with the number of tokens read since the last call.
    """
    scores: dict[Solution, float] = {}
    for group in groups:
        prompt, output = continue_prompt(language_model, group)
        first = prompt.logits[0, -1:]
        for row, solution in enumerate(group.solutions):
            targets = torch.tensor(solution.output_ids, device=first.device)
            logits = torch.cat([first, output.logits[row, : len(targets) - 1]])
            log_probabilities = -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            if solution.output_mask is not None:
                log_probabilities = log_probabilities[torch.tensor(solution.output_mask, device=first.device)]
            scores[solution] = log_probabilities.mean().item()
        advance(group.tokens)
    return sum(scores[pair.right] > scores[pair.wrong] for pair in validation) / len(validation)
