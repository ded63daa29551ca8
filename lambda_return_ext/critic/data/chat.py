"""Examples laid out as pieces of text, chats through the tokenizer's template."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lambda_return_ext.critic.data.rows import Answer, Example, Message
from lambda_return_ext.critic.errors import UserError


class Piece(NamedTuple):
    """Part of a conversation that is tokenised by itself, as it was when the answer was sampled.

    Attributes:
        content: text, or token ids where the chat template marks them itself.
        counted: these are output tokens.
        special: the tokenizer may add its special tokens, such as that of the beginning.
    """

    content: str | tuple[int, ...]
    counted: bool
    special: bool = False


class Renderer:
    """Lays examples out as pieces of text, chats through the tokenizer's template.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: text of a Jinja template; None takes the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.template = chat_template
        self.end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def pieces(self, example: Example, answer: Answer) -> list[Piece]:
        """The first piece is the prompt; of the others those that the model wrote are counted.

        Raises:
            UserError: there is no chat template, or one that does not take these messages.
        """
        if isinstance(answer.content, str):
            assert isinstance(example.prompt, str)
            return [Piece(example.prompt, False, special=True), Piece(answer.content, True), Piece(self.end, True)]
        assert not isinstance(example.prompt, str)
        try:
            return self._chat(example, [*example.prompt, *answer.content], len(example.prompt))
        except (ValueError, TypeError, KeyError, RecursionError, TemplateError) as error:
            raise UserError(
                f"{example.where}: {answer.name!r} must be messages that the chat template takes: {error}"
            ) from error

    def _chat(self, example: Example, messages: list[Message], prompt_messages: int) -> list[Piece]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        template = self.template or self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"data.chat_template must be a Jinja file for rows of messages, as {example.where} is one: the "
                "tokenizer of this backbone has no template of its own"
            )
        if isinstance(template, str) and re.search(r"\{%-?\s*generation", template):
            before = sum(i < prompt_messages for i in answers)
            return self._marked_by_the_template(example, messages, before)
        whole = self._render(example, messages, False)
        spans = []
        for i in answers:
            if i < prompt_messages:
                continue
            head = self._render(example, messages[:i], True)
            text = self._render(example, messages[: i + 1], False)
            if not (text.startswith(head) and whole.startswith(text)):
                raise ValueError(
                    f"it writes message {i} in another way once others follow, so that its tokens cannot be told "
                    "apart; give data.chat_template a template that marks them with {% generation %}"
                )
            # What the template writes after the end token, such as a line break, is not from the model.
            spans.append((len(head), max(len(head), len(text.rstrip()))))
        return _interleave(whole, spans)

    def _marked_by_the_template(self, example: Example, messages: list[Message], before: int) -> list[Piece]:
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._render(example, messages, False, **marked)
        spans = list(_runs(encoded["assistant_masks"]))[before:]
        if not spans:
            raise ValueError("it marks no token of the assistant")
        return _interleave(tuple(encoded["input_ids"]), spans)

    def _render(self, example: Example, messages: list[Message], open_answer: bool, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            chat_template=self.template,
            add_generation_prompt=open_answer,
            **{"tokenize": False, **kwargs},
        )


def read_chat_template(path: str | None) -> str | None:
    """The text of `data.chat_template`.

    Raises:
        UserError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template must be a readable Jinja file, got {path!r}: {error}") from error


def _interleave(whole: Any, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """What stands before the first span is the prompt, the spans are counted, and the rest after the last is cut."""
    pieces = [Piece(whole[: spans[0][0]], False)]
    for i, (start, end) in enumerate(spans):
        pieces.append(Piece(whole[start:end], True))
        if i + 1 < len(spans):
            pieces.append(Piece(whole[end : spans[i + 1][0]], False))
    return pieces


def _runs(mask: Iterable[int]) -> Iterable[tuple[int, int]]:
    """[start, end) of each run of ones."""
    start = None
    length = 0
    for i, one in enumerate(mask):
        length = i + 1
        if one and start is None:
            start = i
        elif not one and start is not None:
            yield start, i
            start = None
    if start is not None:
        yield start, length
