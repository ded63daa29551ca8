"""Tokenised answers, and whether they fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.chat import Piece, Renderer
from lambda_return_ext.critic.data.rows import Example


class Solution(NamedTuple):
    """A tokenised prompt and one tokenised answer to it.

    Attributes:
        prompt_ids: the prompt.
        output_ids: all that follows it.
        output_mask: which of those the model wrote; the others are gaps, such as a tool's output. None: all.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    output_mask: tuple[bool, ...] | None = None

    @property
    def outputs(self) -> int:
        """Number of output tokens: those that carry loss and count in metrics."""
        return len(self.output_ids) if self.output_mask is None else sum(self.output_mask)

    @property
    def length(self) -> int:
        """Number of all tokens."""
        return len(self.prompt_ids) + len(self.output_ids)


def fits(solution: Solution, config: DataConfig) -> bool:
    """Whether a solution fits into `max_length`, once its prompt is cut where the configuration allows that."""
    if config.overlong == "drop":
        return solution.length <= config.max_length
    return len(solution.output_ids) < config.max_length


def fit_prompts(solutions: Sequence[Solution], max_length: int) -> list[Solution]:
    """The same where all of them fit, else with as much of the end of each prompt as the longest answer leaves room."""
    if all(solution.length <= max_length for solution in solutions):
        return list(solutions)
    room = max_length - max(len(solution.output_ids) for solution in solutions)
    return [solution._replace(prompt_ids=solution.prompt_ids[-room:]) for solution in solutions]


def tokenize(examples: Sequence[Example], renderer: Renderer) -> list[list[Solution]]:
    """The solution of each answer of each example; every distinct piece of text is tokenised once."""
    laid_out = [[renderer.pieces(example, answer) for answer in example.answers] for example in examples]
    everything = itertools.chain.from_iterable(itertools.chain.from_iterable(laid_out))
    texts = dict.fromkeys(piece for piece in everything if isinstance(piece.content, str))
    ids: dict[Piece, tuple[int, ...]] = {}
    for special in (True, False):
        pieces = [piece for piece in texts if piece.special == special]
        if pieces:
            rows = renderer.tokenizer([piece.content for piece in pieces], add_special_tokens=special)["input_ids"]
            ids |= {piece: tuple(row) for piece, row in zip(pieces, rows, strict=True)}

    def solution(pieces: Sequence[Piece]) -> Solution:
        prompt, *output = (ids[piece] if isinstance(piece.content, str) else piece.content for piece in pieces)
        mask = tuple(piece.counted for piece, part in zip(pieces[1:], output, strict=True) for _ in part)
        return Solution(prompt, tuple(itertools.chain(*output)), None if all(mask) else mask)

    return [[solution(pieces) for pieces in answers] for answers in laid_out]
