"""What the fields of a row may hold: text, chat messages, token ids, numbers; each checked, none changed silently."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any, NamedTuple

from lambda_return_ext.critic.data.responses import chat_messages, is_responses
from lambda_return_ext.critic.data.sources import Row
from lambda_return_ext.critic.errors import UserError

Message = Mapping[str, Any]
TokenIds = tuple[int, ...]
LARGEST_ID = 2**31 - 1
TEXT_PARTS = ("text", "input_text", "output_text")
LABELS = {"true": 1.0, "false": 0.0}
# What samplers call an answer that ended because there was no more room.
CUT_OFF = ("length", "max_tokens", "max_output_tokens")


class Ids(NamedTuple):
    """An answer as the tokens that were sampled.

    Attributes:
        ids: all that follows the prompt.
        mask: which of those the model wrote; None: all.
    """

    ids: TokenIds
    mask: tuple[bool, ...] | None = None


Content = str | list[Message] | Ids


def turns_of(content: Content) -> int:
    """How many messages of the assistant an answer has; of token ids, how many runs that the model wrote."""
    if isinstance(content, str):
        return 1
    if isinstance(content, Ids):
        return 1 if content.mask is None else sum(written for written, _ in groupby(content.mask))
    return sum(message["role"] == "assistant" for message in content)


def read_content(value: Any, where: str, name: str) -> str | list[Message]:
    """Text that is not blank, or chat messages whose content is text.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: {name} must not be empty, got {value!r}")
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} must be a string or a list of chat messages, got {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: {name} must not be empty, got []")
    if is_responses(value):
        value = chat_messages(value, where, name)
    return [_message(message, f"{where}: {name}, message {number},") for number, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{place} must be an object with a 'role', got {str(message)[:60]!r}")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_text_part(part, place) for part in content)}
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{place} must have a string as 'content', got {type(content).__name__}")
    return message


def _text_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise UserError(f"{place} must have text alone as 'content', in parts of type 'text', got one of type {kind!r}")
    return str(part["text"])


def read_list(row: Row, key: str, length: int | None = None, of: str = "") -> list[Any]:
    """A list, of a length where one is given.

    Raises:
        UserError: it is none, or of another length.
    """
    value = row.values[key]
    if not isinstance(value, list):
        raise UserError(
            f"{row.where}: {key!r} must be a list{of and ' with one for each of '}{of}, got {type(value).__name__}"
        )
    if length is not None and len(value) != length:
        raise UserError(f"{row.where}: {key!r} must have one for each of {of}, got {len(value)} for {length}")
    return value


def read_number(value: Any, where: str, name: str) -> float:
    """A finite number, which may be written as text, as in a CSV file.

    Raises:
        UserError: it is none.
    """
    number = None
    if isinstance(value, (bool, int, float, str, Decimal)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = LABELS.get(value.lower()) if isinstance(value, str) else None
    if number is None or not math.isfinite(number):
        raise UserError(f"{where}: {name} must be a finite number, got {str(value)[:60]!r}")
    return number


def read_label(value: Any, where: str, name: str) -> float:
    """1 for true, 0 for false, or a number between.

    Raises:
        UserError: it is none of these.
    """
    try:
        number = read_number(value, where, name)
    except UserError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise UserError(f"{where}: {name} must be true or false, 1 or 0, or a number between, got {value!r}")
    return number


def read_flag(value: Any, where: str, name: str) -> bool:
    """True or false.

    Raises:
        UserError: it is neither.
    """
    number = LABELS.get(value.lower(), value) if isinstance(value, str) else value
    if number in ("0", "1"):
        number = int(number)
    if not isinstance(number, (bool, int, float)) or number not in (0, 1):
        raise UserError(f"{where}: {name} must be true or false, got {value!r}")
    return bool(number)


def read_ids(row: Row, key: str) -> TokenIds:
    """Token ids, as they are.

    Raises:
        UserError: it is no list of whole numbers from 0 to 2**31 - 1, or an empty one.
    """
    ids = read_list(row, key)
    if not ids:
        raise UserError(f"{row.where}: {key!r} must not be empty, got []")
    for number, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= LARGEST_ID:
            raise UserError(
                f"{row.where}: {key!r} must hold whole numbers from 0 to 2**31 - 1, got {str(token)[:60]!r} at {number}"
            )
    return tuple(ids)


def read_mask(row: Row, key: str, length: int, of: str) -> tuple[bool, ...]:
    """A mask with at least a one.

    Raises:
        UserError: it has another length, other values or no one.
    """
    mask = tuple(
        read_flag(item, row.where, f"{key}[{number}]") for number, item in enumerate(read_list(row, key, length, of))
    )
    if not any(mask):
        raise UserError(f"{row.where}: {key!r} must have a one, got zeros only")
    return mask


def read_numbers(row: Row, key: str, length: int, of: str) -> tuple[float, ...]:
    """Finite numbers.

    Raises:
        UserError: they are of another number, or one of them is not finite.
    """
    numbers = read_list(row, key, length, of)
    return tuple(read_number(item, row.where, f"{key}[{number}]") for number, item in enumerate(numbers))


def read_steps(row: Row, key: str) -> list[str]:
    """The steps of an answer.

    Raises:
        UserError: they are no list of texts, or all blank.
    """
    steps = read_list(row, key)
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise UserError(f"{row.where}: '{key}[{number}]' must be a string, got {type(step).__name__}")
    if not "".join(steps).strip():
        raise UserError(f"{row.where}: {key!r} must not be empty, got {steps!r}")
    return steps


def check_unicode(value: Any, where: str, key: str) -> None:
    """Refuse half of a character, which JSON can write and no tokenizer reads.

    Raises:
        UserError: there is one.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"{where}: {key!r} must be Unicode text, alone or in a list, got {error}") from error


def read_cut_off(reasons: Sequence[Any], flags: Sequence[Any], where: str) -> bool:
    """Whether an answer was cut off, by the reasons and the flags that stand beside it.

    Raises:
        UserError: a reason is no text, or a flag neither true nor false.
    """
    for reason in reasons:
        if not isinstance(reason, str):
            raise UserError(f"{where}: 'finish_reason' must be a string, got {type(reason).__name__}")
    cut = [read_flag(flag, where, "'truncated'") for flag in flags]
    return any(cut) or any(reason.lower() in CUT_OFF for reason in reasons)
