"""Rollouts: tokenised answers with their rewards, and whether they fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.chat import Piece, Renderer
from lambda_return_ext.critic.data.rows import Example
from lambda_return_ext.critic.data.shapes import Answer
from lambda_return_ext.critic.errors import UserError


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


class Rollout(NamedTuple):
    """One tokenised answer to a problem, with its reward.

    Attributes:
        problem: the problem.
        solution: its tokens.
        reward: any finite number, given at the last output token; None where the data does not say.
        step_rewards: one for each of the output ids, besides the terminal one; None for none.
        truncated: it was cut off, so that it has no end token.
        logprobs: what the policy said of each of the output ids; None where the data does not say.
    """

    problem: str
    solution: Solution
    reward: float | None
    step_rewards: tuple[float, ...] | None = None
    truncated: bool = False
    logprobs: tuple[float, ...] | None = None

    @property
    def total(self) -> float:
        """All rewards together, by which rollouts of a problem are compared."""
        return (self.reward or 0.0) + sum(self.step_rewards or ())

    @property
    def outputs(self) -> int:
        """Number of output tokens."""
        return self.solution.outputs

    @property
    def length(self) -> int:
        """Number of all tokens."""
        return self.solution.length

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Itself: what a run trains on is pairs or rollouts."""
        return (self,)


class HasRollouts(Protocol):
    """What a run trains on: a pair, or a rollout alone."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Its rollouts."""


def solutions_of(items: Iterable[HasRollouts]) -> Iterator[Solution]:
    """The tokens of all rollouts of some items, in order."""
    return (rollout.solution for item in items for rollout in item.rollouts)


def fits(solution: Solution, config: DataConfig) -> bool:
    """Whether a solution fits into `max_length`, once its prompt is cut where the configuration allows that."""
    if config.overlong == "drop":
        return solution.length <= config.max_length
    return len(solution.output_ids) < config.max_length


def prompt_fits(solution: Solution, config: DataConfig) -> bool:
    """Whether a prompt leaves room for an answer, once it is cut where the configuration allows that."""
    return config.overlong != "drop" or len(solution.prompt_ids) < config.max_length


def unusable(rollout: Rollout, config: DataConfig) -> str | None:
    """Why a rollout can't be trained on, as it follows the word for many of them; None where it can."""
    if not rollout.outputs:
        return "that have no output token"
    if not prompt_fits(rollout.solution, config):
        return "whose prompt alone fills data.max_length"
    return None if fits(rollout.solution, config) else "that do not fit into data.max_length"


def fit_prompts(solutions: Sequence[Solution], max_length: int) -> list[Solution]:
    """The same where all of them fit, else with as much of the end of each prompt as the longest answer leaves room."""
    if all(solution.length <= max_length for solution in solutions):
        return list(solutions)
    room = max_length - max(len(solution.output_ids) for solution in solutions)
    return [solution._replace(prompt_ids=solution.prompt_ids[-room:]) for solution in solutions]


def tokenize(examples: Sequence[Example], renderer: Renderer) -> list[list[Rollout]]:
    """The rollout of each answer of each example; every distinct piece of text is tokenised once.

    Raises:
        UserError: a chat template does not take a row's messages, or marks other parts than its `turn_rewards` are of.
    """
    laid_out = [[renderer.pieces(example, answer) for answer in example.answers] for example in examples]
    everything = itertools.chain.from_iterable(itertools.chain.from_iterable(laid_out))
    texts = dict.fromkeys(piece for piece in everything if isinstance(piece.content, str))
    ids: dict[Piece, tuple[int, ...]] = {}
    for special in (True, False):
        pieces = [piece for piece in texts if piece.special == special]
        if pieces:
            rows = renderer.tokenizer([piece.content for piece in pieces], add_special_tokens=special)["input_ids"]
            ids |= {piece: tuple(row) for piece, row in zip(pieces, rows, strict=True)}

    def rollout(example: Example, answer: Answer, pieces: Sequence[Piece]) -> Rollout:
        prompt, *output = (ids[piece] if isinstance(piece.content, str) else piece.content for piece in pieces)
        mask = tuple(piece.counted for piece, part in zip(pieces[1:], output, strict=True) for _ in part)
        solution = Solution(prompt, tuple(itertools.chain(*output)), None if all(mask) else mask)
        step_rewards = None
        if answer.turn_rewards is not None:
            step_rewards = _place_turn_rewards(example, answer, pieces[1:], [len(part) for part in output])
        return Rollout(example.problem, solution, answer.reward, step_rewards, answer.truncated, answer.logprobs)

    return [
        [rollout(example, *both) for both in zip(example.answers, answers, strict=True)]
        for example, answers in zip(examples, laid_out, strict=True)
    ]


def _place_turn_rewards(
    example: Example, answer: Answer, pieces: Sequence[Piece], lengths: Sequence[int]
) -> tuple[float, ...]:
    """One number for each output token: each of `turn_rewards` at its message's last token, elsewhere 0."""
    assert answer.turn_rewards is not None
    ends = list(itertools.accumulate(lengths))
    # Text is one message, whose end token is a piece of its own.
    turns = [i for i, piece in enumerate(pieces) if piece.counted]
    last = turns[-1:] if isinstance(answer.content, str) else turns
    if len(last) != len(answer.turn_rewards):
        raise UserError(
            f"{example.where}: 'turn_rewards' must have one number for each part of {answer.name!r} that the chat "
            f"template marks, got {len(answer.turn_rewards)} for {len(last)}"
        )
    placed = [0.0] * sum(lengths)
    for number, (i, reward) in enumerate(zip(last, answer.turn_rewards, strict=True)):
        if not placed or (lengths[i] == 0 and not isinstance(answer.content, str)):
            raise UserError(
                f"{example.where}: 'turn_rewards' must be of messages that have tokens, got one of message {number} of "
                f"{answer.name!r}, which has none"
            )
        placed[ends[i] - 1] = reward
    return tuple(placed)
