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


def _whole(numbers: list[str]) -> str:
    """`['7.0', '31.0']` as `7, 31`."""
    return ", ".join(str(int(float(number))) for number in numbers)


def _sorting_ask(entry: Entry) -> str:
    order = {"ascending": "small to large", "descending": "large to small"}[entry["metadata"]["direction"]]
    return f"Sort {_whole(entry['metadata']['original_numbers'])} from {order}"


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
    "number_sorting": Family(
        _sorting_ask,
        lambda entry: f"we take {_whole(entry['metadata']['sorted_numbers']).replace(', ', ', then ')}",
        lambda entry: _whole(entry["metadata"]["sorted_numbers"]),
        _numbers,
    ),
    "products": Family(
        lambda entry: f"Compute {entry['metadata']['expression']}",
        lambda entry: f"{entry['metadata']['expression']} = {entry['answer']}",
    ),
    "gcd": Family(
        lambda entry: f"Find the greatest common divisor of {entry['metadata']['numbers']}",
        _gcd_steps,
    ),
}
