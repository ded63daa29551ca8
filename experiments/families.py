"""Task families of reasoning-gym in a form that a model of 135 million parameters sometimes solves.

Each family says how a problem is asked, how its solution is worked out in one line, and how the last words of such a
line become the answer that the scorer of reasoning-gym takes. The worked lines are only shown as examples in the
prompt: what the model writes is judged by reasoning-gym alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Entry = dict[str, Any]
# One for each example in the prompt: rollouts of one problem then often differ from their first token on.
OPENINGS = ("First", "So", "We get")


class Family(NamedTuple):
    """One kind of problem.

    Attributes:
        ask: the problem in a line.
        work: a right solution in a line, without its answer.
        give: the answer as text, as it is shown in the examples.
        read: the answer as the scorer takes it, made from the text after "Answer:".
    """

    ask: Callable[[Entry], str]
    work: Callable[[Entry], str]
    give: Callable[[Entry], str] = lambda entry: entry["answer"]
    read: Callable[[str], str] = lambda text: text


def _sum_steps(expression: str) -> str:
    """`4 - 1 - 7` as `4 - 1 = 3, 3 - 7 = -4`."""
    first, *rest = re.findall(r"(?:^|[+-] )\d+", expression)
    total, steps = int(first), []
    for term in rest:
        sign, number = term.split()
        result = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return ", ".join(steps)


def _letter_steps(entry: Entry) -> str:
    span, letter = entry["metadata"]["span"], entry["metadata"]["target_letter"]
    return ", ".join(f"{' '.join(word)} has {word.lower().count(letter)}" for word in span)


def _numbers(text: str) -> str:
    return str([part.strip() for part in text.split(",")])


def _filter_steps(entry: Entry) -> str:
    kept = list(entry["metadata"]["result"])
    steps = []
    for number in entry["metadata"]["original_numbers"]:
        keeps = number in kept
        if keeps:
            kept.remove(number)
        steps.append(f"{number} {'stays' if keeps else 'goes'}")
    return ", ".join(steps)


def _filter_ask(entry: Entry) -> str:
    task, _, _ = entry["question"].partition(" in this list")
    return f"{task}: {', '.join(entry['metadata']['original_numbers'])}"


def _bits_steps(entry: Entry) -> str:
    number = entry["metadata"]["number"]
    powers = [str(1 << bit) for bit in reversed(range(number.bit_length())) if number >> bit & 1]
    return f"{number} = {' + '.join(powers)}"


def _gcd_steps(entry: Entry) -> str:
    a, b = sorted(entry["metadata"]["numbers"], reverse=True)
    steps = []
    while b:
        steps.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return ", ".join(steps)


FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        lambda entry: f"Compute {entry['metadata']['expression']}",
        lambda entry: _sum_steps(entry["metadata"]["expression"]),
    ),
    "letter_counting": Family(
        lambda entry: f'How often is "{entry["metadata"]["target_letter"]}" in: {" ".join(entry["metadata"]["span"])}',
        _letter_steps,
    ),
    "number_filtering": Family(
        _filter_ask,
        _filter_steps,
        lambda entry: ", ".join(entry["metadata"]["result"]) or "none",
        lambda text: "[]" if text == "none" else _numbers(text),
    ),
    "count_bits": Family(
        lambda entry: f"How many 1 bits has {entry['metadata']['number']}",
        _bits_steps,
    ),
    "gcd": Family(
        lambda entry: f"Find the greatest common divisor of {entry['metadata']['numbers']}",
        _gcd_steps,
    ),
}
