"""Two baselines that need no training: length and likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Solution
from lambda_return_ext.critic.model.features import PromptGroup, continue_prompt

# Elements of the logits that the likelihood baseline has at once, whatever the lengths and the vocabulary.
LOGITS_AT_ONCE = 2**26


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
    language_model: Any,
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
        for solution, rows in zip(group.solutions, log_likelihoods(language_model, group), strict=True):
            scores[solution] = rows.mean().item()
        advance(group.tokens)
    return sum(scores[pair.right.solution] > scores[pair.wrong.solution] for pair in validation) / len(validation)


def log_likelihoods(language_model: Any, group: PromptGroup) -> list[Tensor]:
    """The log-probability of each output token of each solution of a group.

    First the model runs without its logits, which would be the largest tensor by far, and its features are kept; then
    its head runs over some of them at a time. The head runs within the model all the same, over features in the place
    of those of one token: some families scale or cap the logits behind it.
    """
    seen: list[Tensor] = []
    given: list[Tensor] = []

    def swap(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen[:] = arguments
        return (given.pop() if given else arguments[0][:1, -1:],)

    handle = language_model.get_output_embeddings().register_forward_pre_hook(swap)
    try:
        prompt, output = continue_prompt(language_model, group, lambda _: seen[0])
        before = torch.cat([prompt[:, -1:].expand(len(output), -1, -1), output[:, :-1]], dim=1)
        masks = [solution.output_mask or (True,) * len(solution.output_ids) for solution in group.solutions]
        ids = [[*compress(s.output_ids, mask)] for s, mask in zip(group.solutions, masks, strict=True)]
        features = torch.cat([row[: len(mask)][torch.tensor(mask)] for row, mask in zip(before, masks, strict=True)])
        targets = torch.tensor([*chain.from_iterable(ids)], device=features.device)
        size = max(LOGITS_AT_ONCE // language_model.config.get_text_config().vocab_size, 1)
        rows = []
        for part, target in zip(features.split(size), targets.split(size), strict=True):
            given.append(part[None])
            logits = language_model(input_ids=target[None, :1], use_cache=False).logits[0]
            rows.append(-nn.functional.cross_entropy(logits.float(), target, reduction="none"))
    finally:
        handle.remove()
    return [*torch.cat(rows).split([*map(len, ids)])]
