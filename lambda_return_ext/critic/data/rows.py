"""What a row of data says: a prompt and its answers with their rewards, as text, as chat messages or as token ids.

`shapes` has the shapes that rows come in; docs/critic.md shows each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lambda_return_ext.critic.data.content import (
    Message,
    TokenIds,
    check_unicode,
    read_content,
    read_ids,
    turns_of,
)
from lambda_return_ext.critic.data.responses import chat_tools
from lambda_return_ext.critic.data.shapes import PAIRED, SHAPES, Answer, shape_of
from lambda_return_ext.critic.data.sources import Row
from lambda_return_ext.critic.errors import UserError

Prompt = str | list[Message] | TokenIds
IMPLIED = frozenset(shape.name for shape in SHAPES if shape.implied)


class Example(NamedTuple):
    """One row.

    Attributes:
        where: file and line.
        problem: the problem's id; where the row has none, one made from `task`.
        task: digest of all that stands before the first answer of the model: equal tasks are one problem.
        prompt: text, messages or token ids.
        answers: the answers.
        paired: the first answer is right and the second wrong, and they belong together.
        tools: what the chat template is told of tools.
        shape: the keys that the row is read by, such as `prompt, completion, reward`.
    """

    where: str
    problem: str
    task: str
    prompt: Prompt
    answers: list[Answer]
    paired: bool
    tools: list[Any] | None
    shape: str


def parse_example(row: Row, unlabelled: bool = False) -> Example:
    """Check a row and say what it holds.

    Args:
        row: the row.
        unlabelled: the answers may stand without a reward.

    Raises:
        UserError: names file, line and key, what it must be and what it got.
    """
    row = row._replace(values={key: value for key, value in row.values.items() if value is not None})
    values, where = row.values, row.where
    shape = shape_of(row, unlabelled)
    for key in ("problem_id", "tools", shape.prompt, *shape.keys):
        if not key.endswith("_ids"):  # numbers, and many
            check_unicode(values.get(key), where, key)
    prompt: Prompt | None = None
    if shape.prompt == "prompt_ids":
        prompt = read_ids(row, "prompt_ids")
    elif shape.prompt in values:
        prompt = read_content(values[shape.prompt], where, repr(shape.prompt))
    answers = shape.read(row)
    for answer in answers:
        if isinstance(answer.content, list) and not turns_of(answer.content):
            raise UserError(f"{where}: {answer.name!r} must have a message of the assistant, got none")
    if not isinstance(prompt, tuple):
        prompt, answers = _prompt_apart(prompt, answers, values, where)
    for answer in answers:
        turns = turns_of(answer.content)
        if answer.turn_rewards is not None and len(answer.turn_rewards) != turns:
            raise UserError(
                f"{where}: 'turn_rewards' must have one number for each message of the assistant in {answer.name!r}, "
                f"got {len(answer.turn_rewards)} for {turns}"
            )
    tools = values.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' must be a list, got {type(tools).__name__}")
    task = _task(prompt, answers)
    problem = values.get("problem_id", f"task-{task[:12]}")
    if isinstance(problem, int) and not isinstance(problem, bool):
        problem = str(problem)
    if not isinstance(problem, str):
        raise UserError(f"{where}: 'problem_id' must be a string or an integer, got {type(problem).__name__}")
    if not problem.strip():
        raise UserError(f"{where}: 'problem_id' must not be empty, got {problem!r}")
    return Example(
        where, problem, task, prompt, answers, shape is PAIRED, None if tools is None else chat_tools(tools), shape.name
    )


def check_together(examples: Iterable[Example]) -> None:
    """Refuse rewards on two scales: rows whose reward is 1 or 0 by their shape, beside rows that give any number.

    Raises:
        UserError: names a line of either kind.
    """
    implied: Example | None = None
    outside: tuple[Example, float] | None = None
    for example in examples:
        if example.shape in IMPLIED:
            implied = implied or example
        elif outside is None:
            far = (answer.reward for answer in example.answers if answer.reward is not None)
            outside = next(((example, reward) for reward in far if not 0.0 <= reward <= 1.0), None)
        if implied and outside:
            raise UserError(
                f"{outside[0].where}: a reward must be between 0 and 1 where other rows have 1 for right and 0 for "
                f"wrong, as {implied.where} has by its keys {implied.shape}, got {outside[1]:g}"
            )


def _prompt_apart(
    prompt: str | list[Message] | None, answers: list[Answer], values: Mapping[str, Any], where: str
) -> tuple[str | list[Message], list[Answer]]:
    """Bring prompt and answers to one kind: all text, or all messages with the prompt's apart."""
    chats = [answer.content for answer in answers if isinstance(answer.content, list)]
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


def _task(prompt: Prompt, answers: Sequence[Answer]) -> str:
    if isinstance(prompt, tuple):
        prompt = json.dumps(prompt)
    elif not isinstance(prompt, str):
        leading: list[Message] = []
        first = answers[0].content
        for message in [*prompt, *(first if isinstance(first, list) else [])]:
            if message["role"] == "assistant":
                break
            leading.append(message)
        prompt = json.dumps(leading or list(prompt), sort_keys=True)
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
