"""The shapes of a row: which keys it has, and what answers they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lambda_return_ext.critic.data import content
from lambda_return_ext.critic.data.content import Content, Ids
from lambda_return_ext.critic.data.sources import Row
from lambda_return_ext.critic.errors import UserError


class Answer(NamedTuple):
    """One answer of a row.

    Attributes:
        name: where the row has it, such as `chosen` or `correct[2]`.
        content: text that follows the prompt, messages that do, or token ids.
        reward: any finite number, 1 for right and 0 for wrong where the row says no more; None where it does not say.
        truncated: it was cut off, and its end is not the model's.
        turn_rewards: one for each message of the assistant, besides the reward.
        logprobs: what the policy said of each of the token ids.
    """

    name: str
    content: Content
    reward: float | None
    truncated: bool = False
    turn_rewards: tuple[float, ...] | None = None
    logprobs: tuple[float, ...] | None = None


class Shape(NamedTuple):
    """A shape of a row.

    Attributes:
        prompt: the key of the prompt; the row may do without it where its answers are whole conversations.
        keys: the keys that it must have.
        read: gives the answers of a row.
        implied: its rewards are 1 and 0, or between, by what right and wrong mean.
        either: the second key too is of this shape alone, so that a row with it lacks the first.
    """

    prompt: str
    keys: tuple[str, ...]
    read: Callable[[Row], list[Answer]]
    implied: bool
    either: bool = False

    @property
    def name(self) -> str:
        """The keys, for people."""
        return ", ".join((self.prompt, *self.keys) if self.keys[0] != "messages" else self.keys)


def _paired(row: Row) -> list[Answer]:
    return [_text(row, key, reward) for key, reward in (("chosen", 1.0), ("rejected", 0.0))]


def _pooled(row: Row) -> list[Answer]:
    answers = []
    for key, reward in (("correct", 1.0), ("incorrect", 0.0)):
        if not isinstance(row.values[key], list):
            raise UserError(f"{row.where}: {key!r} must be a list of answers, got {type(row.values[key]).__name__}")
        for index, item in enumerate(row.values[key]):
            name = f"{key}[{index}]"
            answers.append(Answer(name, content.read_content(item, row.where, repr(name)), reward))
    if not answers:
        raise UserError(f"{row.where}: 'correct' and 'incorrect' must hold at least one answer, got none")
    return answers


def _labelled_completion(row: Row) -> list[Answer]:
    return [_alone(row, _text(row, "completion", _label(row)))]


def _labelled_messages(row: Row) -> list[Answer]:
    return [_alone(row, _text(row, "messages", _label(row)))]


def _rewarded_completion(row: Row) -> list[Answer]:
    return [_alone(row, _text(row, "completion", _reward(row)))]


def _rewarded_messages(row: Row) -> list[Answer]:
    return [_alone(row, _text(row, "messages", _reward(row)))]


def _token_ids(row: Row) -> list[Answer]:
    ids = content.read_ids(row, "completion_ids")
    of = "'completion_ids'"
    mask = content.read_mask(row, "completion_mask", len(ids), of) if "completion_mask" in row.values else None
    numbers = {
        key: content.read_numbers(row, key, len(ids), of) for key in ("logprobs", "entropies") if key in row.values
    }
    return [
        _alone(row, Answer("completion_ids", Ids(ids, mask), _reward(row)))._replace(logprobs=numbers.get("logprobs"))
    ]


def _rewarded_answers(row: Row) -> list[Answer]:
    texts = content.read_list(row, "answers")
    if not texts:
        raise UserError(f"{row.where}: 'answers' must hold at least one answer, got none")
    beside = {
        key: content.read_list(row, key, len(texts), "'answers'") if key in row.values else [None] * len(texts)
        for key in ("rewards", "turn_rewards", "finish_reason", "truncated")
    }
    answers = []
    for index, text in enumerate(texts):
        name, values = f"answers[{index}]", {key: items[index] for key, items in beside.items()}
        reward = None
        if "rewards" in row.values:
            reward = content.read_number(values["rewards"], row.where, f"'rewards[{index}]'")
        read = content.read_content(text, row.where, repr(name))
        answers.append(_with_ending(row, Answer(name, read, reward), values))
    return answers


def _labelled_steps(row: Row) -> list[Answer]:
    steps, reward = content.read_steps(row, "completions"), None
    if "labels" in row.values:
        labels = content.read_list(row, "labels", len(steps), "'completions'")
        right = [content.read_flag(label, row.where, f"'labels[{i}]'") for i, label in enumerate(labels)]
        reward = float(all(right))
    return [_alone(row, Answer("completions", "\n".join(steps), reward))]


def _first_wrong_step(row: Row) -> list[Answer]:
    steps = content.read_steps(row, "steps")
    label = content.read_number(row.values["label"], row.where, "'label'")
    if label not in range(-1, len(steps)):
        raise UserError(
            f"{row.where}: 'label' must be the number of the first wrong step, from 0 to {len(steps) - 1}, or -1 for "
            f"none, got {row.values['label']!r}"
        )
    reward = float(label == -1)
    if "final_answer_correct" in row.values:
        reward = float(content.read_flag(row.values["final_answer_correct"], row.where, "'final_answer_correct'"))
    return [_alone(row, Answer("steps", "\n\n".join(steps), reward))]


# A row that has the keys of several has the first shape, but for `data.columns`: what is named there goes first.
SHAPES = (
    Shape("prompt", ("chosen", "rejected"), _paired, implied=True, either=True),
    Shape("prompt", ("correct", "incorrect"), _pooled, implied=True, either=True),
    Shape("prompt", ("completion", "label"), _labelled_completion, implied=True),
    Shape("prompt", ("messages", "label"), _labelled_messages, implied=True),
    Shape("prompt_ids", ("completion_ids", "reward"), _token_ids, implied=False),
    Shape("prompt", ("completion", "reward"), _rewarded_completion, implied=False),
    Shape("prompt", ("messages", "reward"), _rewarded_messages, implied=False),
    Shape("prompt", ("answers", "rewards"), _rewarded_answers, implied=False),
    Shape("prompt", ("completions", "labels"), _labelled_steps, implied=True),
    Shape("problem", ("steps", "label"), _first_wrong_step, implied=True),
)
PAIRED = SHAPES[0]
# Without these a row may come where its answers are only to be scored.
REWARDS = ("reward", "rewards", "labels")


def shape_of(row: Row, unlabelled: bool = False) -> Shape:
    """The shape of a row.

    Args:
        row: the row.
        unlabelled: the reward may be missing.

    Raises:
        UserError: the row has the keys of none.
    """
    values = row.values
    fitting = [shape for shape in SHAPES if all(key in values for key in shape.keys)]
    if not fitting and unlabelled:
        fitting = [shape for shape in SHAPES if all(key in values or key in REWARDS for key in shape.keys)]
    if not fitting:
        raise UserError(_what_is_missing(row))
    # Stable: among those that `data.columns` says as much of, the first of the table.
    shape = min(fitting, key=lambda shape: -len(row.named.intersection((shape.prompt, *shape.keys))))
    for key in (*shape.keys, *((shape.prompt,) if shape.prompt != "prompt" else ())):
        if key not in values and not (key in REWARDS and unlabelled):
            raise UserError(f"{row.where}: the key {key!r} must be there, got the keys {sorted(values)}")
    return shape


def _what_is_missing(row: Row) -> str:
    got = f"got the keys {sorted(row.values)}"
    for shape in SHAPES:
        first, second = shape.keys
        if shape.either and second in row.values:
            first, second = second, first
        if first in row.values:
            also = ", or 'reward'," if second == "label" and first != "steps" else ","
            return f"{row.where}: the key {second!r} must be there{also} {got}"
    names = "; ".join(" and ".join(shape.name.rsplit(", ", 1)) for shape in SHAPES)
    return f"{row.where}: a row must have the keys {names}; {got}"


def _text(row: Row, key: str, reward: float | None) -> Answer:
    return Answer(key, content.read_content(row.values[key], row.where, repr(key)), reward)


def _label(row: Row) -> float:
    return content.read_label(row.values["label"], row.where, "'label'")


def _reward(row: Row) -> float | None:
    if "reward" not in row.values:
        return None
    return content.read_number(row.values["reward"], row.where, "'reward'")


def _alone(row: Row, answer: Answer) -> Answer:
    """With what stands in the row besides its one answer."""
    return _with_ending(row, answer, row.values)


def _with_ending(row: Row, answer: Answer, values: dict[str, Any]) -> Answer:
    reasons, flags = ([values[key]] if values.get(key) is not None else [] for key in ("finish_reason", "truncated"))
    rewards = values.get("turn_rewards")
    if rewards is not None:
        name = "turn_rewards"
        if not isinstance(rewards, list):
            raise UserError(
                f"{row.where}: {name!r} must be a list with one number for each message of the assistant, got "
                f"{type(rewards).__name__}"
            )
        rewards = tuple(content.read_number(item, row.where, f"'{name}[{i}]'") for i, item in enumerate(rewards))
    return answer._replace(truncated=content.read_cut_off(reasons, flags, row.where), turn_rewards=rewards)
