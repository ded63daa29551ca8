"""What a row of data says: a prompt and its right and wrong answers, as text or as chat messages.

The shapes are those that preference and reward data come in: `prompt, chosen, rejected`; `prompt, completion,
label`; `messages, label`; and `prompt, correct, incorrect` with lists. docs/critic.md shows each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lambda_return_ext.critic.data.sources import Row
from lambda_return_ext.critic.errors import UserError

Message = Mapping[str, Any]
Content = str | list[Message]
SHAPES = "prompt, chosen and rejected; prompt, completion and label; messages and label; prompt, correct and incorrect"
USED = ("prompt", "chosen", "rejected", "completion", "messages", "correct", "incorrect", "tools", "problem_id")
LABELS = {1: 1.0, 0: 0.0, "true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}  # True and 1.0 are 1


class Answer(NamedTuple):
    """One answer of a row.

    Attributes:
        name: where the row has it, such as `chosen` or `correct[2]`.
        content: text that follows the prompt, or messages that do.
        reward: 1 for right, 0 for wrong, None where the row does not say.
    """

    name: str
    content: Content
    reward: float | None


class Example(NamedTuple):
    """One row.

    Attributes:
        where: file and line.
        problem: the problem's id; where the row has none, one made from `task`.
        task: digest of all that stands before the first answer of the model: equal tasks are one problem.
        prompt: text, or messages.
        answers: the answers.
        paired: the first answer is right and the second wrong, and they belong together.
        tools: what the chat template is told of tools.
    """

    where: str
    problem: str
    task: str
    prompt: Content
    answers: list[Answer]
    paired: bool
    tools: list[Any] | None


def parse_example(row: Row, unlabelled: bool = False) -> Example:
    """Check a row and say what it holds.

    Args:
        row: the row.
        unlabelled: a `completion` or `messages` may stand without a `label`.

    Raises:
        UserError: names file, line and key, what it must be and what it got.
    """
    values = {key: value for key, value in row.values.items() if value is not None}
    for key in USED:
        _check_text(values.get(key), row.where, key)
    prompt = None if "prompt" not in values else _content(values["prompt"], row.where, "'prompt'")
    answers = _answers(values, row.where, unlabelled)
    for answer in answers:
        if not isinstance(answer.content, str) and not any(m["role"] == "assistant" for m in answer.content):
            raise UserError(f"{row.where}: {answer.name!r} must have a message of the assistant, got none")
    prompt, answers = _prompt_apart(prompt, answers, values, row.where)
    tools = values.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{row.where}: 'tools' must be a list, got {type(tools).__name__}")
    task = _task(prompt, answers)
    problem = values.get("problem_id", f"task-{task[:12]}")
    if isinstance(problem, int) and not isinstance(problem, bool):
        problem = str(problem)
    if not isinstance(problem, str):
        raise UserError(f"{row.where}: 'problem_id' must be a string or an integer, got {type(problem).__name__}")
    if not problem.strip():
        raise UserError(f"{row.where}: 'problem_id' must not be empty, got {problem!r}")
    return Example(row.where, problem, task, prompt, answers, "chosen" in values or "rejected" in values, tools)


def _answers(values: Mapping[str, Any], where: str, unlabelled: bool) -> list[Answer]:
    for keys in (("chosen", "rejected"), ("correct", "incorrect")):
        if keys[0] in values or keys[1] in values:
            break
    else:
        keys = ("completion", "label") if "completion" in values else ("messages", "label")
        if keys[0] not in values:
            raise UserError(f"{where}: a row must have the keys {SHAPES}; got the keys {sorted(values)}")
    for key in keys:
        if key not in values and not (key == "label" and unlabelled):
            raise UserError(f"{where}: the key {key!r} must be there, got the keys {sorted(values)}")
    first, second = keys
    if second == "rejected":
        rewards = {"chosen": 1.0, "rejected": 0.0}
        return [Answer(key, _content(values[key], where, repr(key)), reward) for key, reward in rewards.items()]
    if second == "label":
        return [Answer(first, _content(values[first], where, repr(first)), _label(values.get("label"), where))]
    answers = []
    for key, reward in (("correct", 1.0), ("incorrect", 0.0)):
        if not isinstance(values[key], list):
            raise UserError(f"{where}: {key!r} must be a list of answers, got {type(values[key]).__name__}")
        for index, item in enumerate(values[key]):
            name = f"{key}[{index}]"
            answers.append(Answer(name, _content(item, where, repr(name)), reward))
    if not answers:
        raise UserError(f"{where}: 'correct' and 'incorrect' must hold at least one answer, got none")
    return answers


def _check_text(value: Any, where: str, key: str) -> None:
    """Refuse half of a character, which JSON can write and no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"{where}: {key!r} must be Unicode text, alone or in a list, got {error}") from error


def _label(label: Any, where: str) -> float | None:
    if label is None:
        return None
    key = label.lower() if isinstance(label, str) else label
    try:
        return LABELS[key]
    except (KeyError, TypeError):
        raise UserError(f"{where}: 'label' must be true or false, 1 or 0, got {label!r}") from None


def _content(value: Any, where: str, name: str) -> Content:
    """Text that is not blank, or chat messages."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: {name} must not be empty, got {value!r}")
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} must be a string or a list of chat messages, got {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: {name} must not be empty, got []")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{where}: {name}, message {number}, must be an object with a 'role', got {str(message)[:60]!r}"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError(
                f"{where}: {name}, message {number}, must have a string as 'content', got {type(content).__name__}"
            )
    return value


def _prompt_apart(
    prompt: Content | None, answers: list[Answer], values: Mapping[str, Any], where: str
) -> tuple[Content, list[Answer]]:
    """Bring prompt and answers to one kind: all text, or all messages with the prompt's apart."""
    chats = [answer.content for answer in answers if not isinstance(answer.content, str)]
    whole = [chat for chat in chats if prompt is None or (isinstance(prompt, str) and chat[0]["role"] != "assistant")]
    if whole:
        # The answers are whole conversations. What they share at their beginning is the prompt.
        if len(whole) != len(answers):
            raise UserError(f"{where}: all answers must be whole conversations or none, got both")
        length = _shared_beginning(whole, stop_at_assistant=len(whole) == 1)
        if length == 0:
            raise UserError(f"{where}: conversations without a 'prompt' must begin with the same messages, got others")
        rest = [answer._replace(content=chat[length:]) for answer, chat in zip(answers, whole, strict=True)]
        return whole[0][:length], rest
    if prompt is None:
        raise UserError(f"{where}: the key 'prompt' must be there, got the keys {sorted(values)}")
    if isinstance(prompt, str) and not chats:
        return prompt, answers
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages, [
        answer._replace(content=[{"role": "assistant", "content": answer.content}])
        if isinstance(answer.content, str)
        else answer
        for answer in answers
    ]


def _shared_beginning(chats: Sequence[list[Message]], stop_at_assistant: bool) -> int:
    """How many messages all chats share at their beginning; an answer of the assistant is left in each."""
    roles = [[message["role"] for message in chat] for chat in chats]
    length = 0
    for messages in zip(*chats, strict=False):
        last_answers = [
            len(chat_roles) - 1 - chat_roles[::-1].index("assistant") if "assistant" in chat_roles else 0
            for chat_roles in roles
        ]
        if any(message != messages[0] for message in messages) or length == min(last_answers):
            break
        if stop_at_assistant and messages[0]["role"] == "assistant":
            break
        length += 1
    return length


def _task(prompt: Content, answers: Sequence[Answer]) -> str:
    if not isinstance(prompt, str):
        leading: list[Message] = []
        first = answers[0].content
        for message in [*prompt, *(first if not isinstance(first, str) else [])]:
            if message["role"] == "assistant":
                break
            leading.append(message)
        prompt = json.dumps(leading or list(prompt), sort_keys=True)
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
