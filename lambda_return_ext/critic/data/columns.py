"""Names of columns: those that rows have here, and what `data.columns` says others call them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lambda_return_ext.critic.errors import UserError

REWARD_KEYS = ("reward", "rewards", "label", "labels")
# A row may do without these, so that a column of that name need not be in every row.
OPTIONAL_KEYS = (
    "problem_id",
    "tools",
    "completion_mask",
    "logprobs",
    "entropies",
    "turn_rewards",
    "finish_reason",
    "truncated",
    "final_answer_correct",
)
KEYS = (
    *("prompt", "chosen", "rejected", "correct", "incorrect", "completion", "messages", "answers"),
    *("prompt_ids", "completion_ids", "completions", "problem", "steps"),
    *REWARD_KEYS,
    *OPTIONAL_KEYS,
)
ABSENT = object()


class Columns:
    """Renames the columns of one source's rows.

    Args:
        columns: {our name: theirs}; `a.b` is `b` of the object `a`, `a.0` the first item of the list `a`.
        unlabelled: rows may come without a reward.

    Raises:
        UserError: a name of ours is none.
    """

    def __init__(self, columns: Mapping[str, str], unlabelled: bool = False):
        for ours in columns:
            if ours not in KEYS:
                raise UserError(
                    f"data.columns must have names of this program's on the left, got {ours!r}{_nearest(ours, KEYS)}"
                )
        self.names = frozenset(columns)
        self._columns = dict(columns)
        self._optional = {*OPTIONAL_KEYS, *(REWARD_KEYS if unlabelled else ())}
        # A column that was renamed is not read under its old name as well.
        self._moved = {*columns, *columns.values()}
        self._never_seen = self.names & {*OPTIONAL_KEYS}
        self._last: Mapping[str, Any] | None = None

    def rename(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row under our names.

        Raises:
            UserError: a column is not there; names file, line and the nearest column.
        """
        self._last = values
        renamed = {key: value for key, value in values.items() if key not in self._moved}
        for ours, theirs in self._columns.items():
            value, near = _look_up(values, theirs)
            if value is not ABSENT:
                renamed[ours] = value
                self._never_seen -= {ours}
            elif ours not in self._optional:
                raise UserError(f"{where}: data.columns.{ours} must name a column that is there, got {theirs!r}{near}")
        return renamed

    def finish(self, path: str) -> None:
        """All rows were read.

        Raises:
            UserError: no row had a column that each of them may do without.
        """
        for ours in sorted(self._never_seen if self._last is not None else ()):
            _, near = _look_up(self._last or {}, self._columns[ours])
            raise UserError(
                f"{path}: data.columns.{ours} must name a column that some row has, got {self._columns[ours]!r}, "
                f"which none has{near}"
            )


def _look_up(values: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """What stands under a name, or ABSENT and what is nearest to the part of the name that is not there."""
    if name in values:
        return values[name], ""
    value: Any = values
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT, _nearest(part, value if isinstance(value, Mapping) else ())
    return value, ""


def _nearest(name: str, names: Iterable[str]) -> str:
    names = [str(candidate) for candidate in names]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if nearest:
        return f"; the nearest is {nearest[0]!r}"
    return f"; there are {', '.join(sorted(names))}" if names else ""
