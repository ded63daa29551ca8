"""Examples laid out as pieces of text, chats through the tokenizer's template."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lambda_return_ext.critic.data.content import Ids, Message
from lambda_return_ext.critic.data.rows import Example
from lambda_return_ext.critic.data.shapes import Answer
from lambda_return_ext.critic.errors import UserError

# A chat of which the roles are left and the tokens around them are gone; templates may open or skip the reasoning.
BARE_START = re.compile(r"\s*(system|user)\s*\n")
BARE_END = re.compile(r"(assistant|model)\s*(<think>\s*(</think>\s*)?)?$")


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
        if isinstance(answer.content, Ids):
            assert isinstance(example.prompt, tuple)
            return [Piece(example.prompt, False), *_pieces_of_ids(answer.content)]
        if isinstance(answer.content, str):
            assert isinstance(example.prompt, str)
            pieces = [Piece(example.prompt, False, special=True), Piece(answer.content, True)]
            return pieces if answer.truncated else [*pieces, Piece(self.end, True)]
        assert isinstance(example.prompt, list)
        messages = [*example.prompt, *answer.content]
        # Of a message that was cut off the end token is the template's own.
        cut = answer.truncated and messages[-1]["role"] == "assistant"
        try:
            return self._chat(example, messages, len(example.prompt), cut)
        except (ValueError, TypeError, KeyError, RecursionError, TemplateError) as error:
            raise UserError(
                f"{example.where}: {answer.name!r} must be messages that the chat template takes: {error}"
            ) from error

    def _chat(self, example: Example, messages: list[Message], prompt_messages: int, cut: bool) -> list[Piece]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        template = self.template or self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"data.chat_template must be a Jinja file for rows of messages, as {example.where} is one: the "
                "tokenizer of this backbone has no template of its own"
            )
        if isinstance(template, str) and re.search(r"\{%-?\s*generation", template):
            before = sum(i < prompt_messages for i in answers)
            return self._marked_by_the_template(example, messages, before, cut)
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
            end = len(text.rstrip())
            if cut and i == len(messages) - 1:
                end = self._end_of_content(example, messages, text)
            spans.append((len(head), max(len(head), end)))
        return _interleave(whole, spans)

    def _marked_by_the_template(self, example: Example, messages: list[Message], before: int, cut: bool) -> list[Piece]:
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._render(example, messages, False, **marked)
        spans = list(_runs(encoded["assistant_masks"]))[before:]
        if not spans:
            raise ValueError("it marks no token of the assistant")
        ids = tuple(encoded["input_ids"])
        if cut:
            start, end = spans[-1]
            spans[-1] = start, start + len(self._without_end(ids[start:end]))
        return _interleave(ids, spans)

    def _end_of_content(self, example: Example, messages: list[Message], text: str) -> int:
        """Where the last message's own text ends, before the end token that the template writes."""
        if messages[-1].get("content") and not messages[-1].get("tool_calls"):
            return len(self._render(example, messages, False, continue_final_message=True))
        shorter = text.rstrip()
        for token in self.tokenizer.all_special_tokens:  # one of them alone: the template writes one
            if shorter.endswith(token):
                return len(shorter) - len(token)
        return len(shorter)

    def _without_end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Without the special tokens at the end, and the white space that the template writes around them."""
        special = set(self.tokenizer.all_special_ids)
        start = len(ids)
        while start and (ids[start - 1] in special or not self.tokenizer.decode([ids[start - 1]]).strip()):
            start -= 1
        return ids[: next((i for i in range(start, len(ids)) if ids[i] in special), len(ids))]

    def _render(self, example: Example, messages: list[Message], open_answer: bool, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            chat_template=self.template,
            add_generation_prompt=open_answer,
            **{"tokenize": False, **kwargs},
        )


def lost_special_tokens(example: Example, tokenizer: Any) -> bool:
    """Whether a prompt of text reads like a chat whose special tokens were left out as it was decoded.

    The model then sees other tokens than those that the answer was sampled after; token ids have no such loss.
    """
    if not isinstance(example.prompt, str) or not tokenizer.chat_template:
        return False
    if not BARE_START.match(example.prompt) or not BARE_END.search(example.prompt.rstrip()):
        return False
    return not any(token in example.prompt for token in tokenizer.all_special_tokens)


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


def _pieces_of_ids(answer: Ids) -> list[Piece]:
    """One piece for each run of tokens that the model wrote or did not."""
    if answer.mask is None:
        return [Piece(answer.ids, True)]
    pieces, start = [], 0
    for written, run in groupby(answer.mask):
        end = start + len(list(run))
        pieces.append(Piece(answer.ids[start:end], written))
        start = end
    return pieces


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
