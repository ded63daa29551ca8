"""Items of the Responses API, as NeMo-Gym writes its rollouts, brought into the form of chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lambda_return_ext.critic.errors import UserError

ITEMS = ("message", "reasoning", "function_call", "function_call_output")


def is_responses(items: Sequence[Any]) -> bool:
    """Whether a list holds items of the Responses API and not chat messages."""
    return any(isinstance(item, dict) and item.get("type") in ITEMS for item in items)


def chat_messages(items: Sequence[Any], where: str, name: str) -> list[dict[str, Any]]:
    """The chat messages that items stand for.

    Reasoning, text and calls that follow one another are one message of the assistant, since one generation made them.

    Args:
        items: the items.
        where: file and line.
        name: what the row calls them.

    Raises:
        UserError: an item is of another kind.
    """
    messages: list[dict[str, Any]] = []
    open_answer: dict[str, Any] | None = None
    for number, item in enumerate(items):
        kind = (item.get("type") or "message") if isinstance(item, dict) else type(item).__name__
        if kind not in ITEMS:
            raise UserError(f"{where}: {name}, item {number}, must be one of {', '.join(ITEMS)}, got {kind!r}")
        if kind == "function_call_output" or (kind == "message" and item.get("role") != "assistant"):
            open_answer = None
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
                if kind == "function_call_output"
                else {key: item[key] for key in ("role", "content") if key in item}
            )
            continue
        if kind == "reasoning" and not _reasoning(item):
            continue  # as hosted models give it: that there was some, and not what
        if open_answer is None or (
            kind != "function_call" and (open_answer["content"] is not None or "tool_calls" in open_answer)
        ):
            open_answer = {"role": "assistant", "content": None}
            messages.append(open_answer)
        if kind == "reasoning":
            open_answer["reasoning_content"] = open_answer.get("reasoning_content", "") + _reasoning(item)
        elif kind == "message":
            open_answer["content"] = item.get("content")
        else:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            open_answer.setdefault("tool_calls", []).append(call)
    return messages


def chat_tools(tools: list[Any]) -> list[Any]:
    """Tools as chat templates take them: the Responses API does without the object `function` around each."""
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool
        else tool
        for tool in tools
    ]


def _reasoning(item: dict[str, Any]) -> str:
    return "".join(
        part["text"]
        for part in item.get("summary") or ()
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )
