"""What a backbone says of solutions, each prompt read once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_return_ext.critic.data.rollouts import Solution

# Solutions are read as many at once as both of these allow, and a longer one alone: memory grows with their tokens.
SOLUTIONS_AT_ONCE = 32
TOKENS_AT_ONCE = 2**14


class PromptGroup(NamedTuple):
    """Distinct solutions of one prompt that go through the model together."""

    prompt_ids: tuple[int, ...]
    solutions: list[Solution]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads: the prompt counts once."""
        return len(self.prompt_ids) + sum(len(solution.output_ids) for solution in self.solutions)


def group_by_prompt(solutions: Iterable[Solution]) -> list[PromptGroup]:
    """The distinct solutions by prompt, in parts of similar length that fit into memory."""
    by_prompt: dict[tuple[int, ...], list[Solution]] = {}
    for solution in dict.fromkeys(solutions):
        by_prompt.setdefault(solution.prompt_ids, []).append(solution)
    parts = []
    for prompt_ids, group in by_prompt.items():
        part: list[Solution] = []
        for solution in sorted(group, key=lambda solution: len(solution.output_ids)):
            size = len(part) + 1
            if not part or size > SOLUTIONS_AT_ONCE or size * solution.length > TOKENS_AT_ONCE:
                part = []
                parts.append(PromptGroup(prompt_ids, part))
            part.append(solution)
    return parts


@torch.inference_mode()
def compute_features(
    backbone: nn.Module, groups: Iterable[PromptGroup], advance: Callable[[int], None]
) -> dict[Solution, Tensor]:
    """Features [1 + T, H] of the prompt's last token and all that follows it of each solution, on the CPU.

    Args:
        backbone: a transformers base model.
        groups: what to compute.
        advance: called with the number of tokens read since the last call.
    """
    features = {}
    for group in groups:
        prompt, hidden = continue_prompt(backbone, group, lambda output: output.last_hidden_state)
        for row, solution in zip(hidden, group.solutions, strict=True):
            features[solution] = torch.cat([prompt[0, -1:], row[: len(solution.output_ids)]]).cpu()
        advance(group.tokens)
    return features


def continue_prompt(model: Any, group: PromptGroup, features_of: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Run a transformers model over a prompt and then, from its key-value cache, over all solutions at once.

    Args:
        model: the model.
        group: the prompt and its solutions.
        features_of: takes the features out of what the model returns.

    Returns:
        The features of the prompt [1, P, H] and of the solutions [N, T, H], padded on the right.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    prompt_ids, solutions = group
    rows = [torch.tensor(solution.output_ids) for solution in solutions]
    output_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) + len(prompt_ids) for row in rows], device=device)
    attention_mask = torch.arange(len(prompt_ids) + output_ids.shape[1], device=device) < lengths[:, None]
    # transformers 5.24 renamed the argument, and the old name warns there.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        # A recurrent layer's state cannot go on in several ways: each solution reads the prompt for itself.
        prompts = torch.tensor([prompt_ids], device=device).expand(len(solutions), -1)
        whole = features_of(model(torch.cat([prompts, output_ids], 1), attention_mask=attention_mask, use_cache=False))
        before, after = whole.split([len(prompt_ids), output_ids.shape[1]], dim=1)
        return before[:1], after
    prompt = features_of(model(input_ids=torch.tensor([prompt_ids], device=device), use_cache=True, **{name: cache}))
    cache.batch_repeat_interleave(len(solutions))
    output = model(input_ids=output_ids, attention_mask=attention_mask, use_cache=True, **{name: cache})
    return prompt, features_of(output)
