"""Pairs of rollouts of one problem with different rewards: which there are, and which are taken."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.rollouts import Rollout, Solution, fits, prompt_fits, unusable
from lambda_return_ext.critic.data.rows import Example


class TokenPair(NamedTuple):
    """Two rollouts of the same problem: the right one has the higher reward."""

    problem: str
    right: Rollout
    wrong: Rollout

    @property
    def length(self) -> int:
        """Tokens of the longer side, by which batches are put together whether or not features are cached."""
        return max(self.right.length, self.wrong.length)

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """The right one, then the wrong one."""
        return self.right, self.wrong


@dataclass
class Problem:
    """What the data has of one problem.

    Attributes:
        pairs: pairs that the data gives as such.
        rollouts: those that may be paired with any other.
    """

    pairs: list[TokenPair] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def everything(self) -> list[Rollout]:
        """All rollouts, those of pairs first."""
        return [*itertools.chain.from_iterable(pair.rollouts for pair in self.pairs), *self.rollouts]


def group_by_problem(examples: Sequence[Example], rollouts: Sequence[Sequence[Rollout]]) -> dict[str, Problem]:
    """Bring together examples that share a problem id, a task or a prompt, directly or through others.

    The same task text under two ids is one problem: on both sides of a split it would leak. Of the ids of one
    problem the first in alphabetical order names it, whatever the order of lines.
    """
    problems: dict[str, Problem] = {}
    names = problem_names(examples, rollouts)
    for name, example, answers in zip(names, examples, rollouts, strict=True):
        problem = problems.setdefault(name, Problem())
        named = [rollout._replace(problem=name) for rollout in answers]
        if example.paired:
            problem.pairs.append(TokenPair(name, *named))
        else:
            problem.rollouts += named
    return problems


def problem_names(examples: Sequence[Example], rollouts: Sequence[Sequence[Rollout]]) -> list[str]:
    """The problem of each example, as `group_by_problem` says."""
    leader: dict[object, object] = {}

    def find(node: object) -> object:
        while leader.setdefault(node, node) != node:
            node = leader[node]
        return node

    for example, answers in zip(examples, rollouts, strict=True):
        for node in (("task", example.task), *(rollout.solution.prompt_ids for rollout in answers)):
            leader[find(node)] = find(example.problem)
    names: dict[object, str] = {}
    for example in examples:
        root = find(example.problem)
        names[root] = min(names.get(root, example.problem), example.problem)
    return [names[find(example.problem)] for example in examples]


def sample_pairs(name: str, problem: Problem, config: DataConfig, dropped: Counter[str]) -> tuple[list[TokenPair], int]:
    """At most `pairs_per_problem` pairs of a problem, the same ones wherever it lands.

    Given pairs come first. Free rollouts with different rewards are paired so that each of one reward is used as often
    as any other of it; where `length_bin` is set, both sides of a pair have their number of output tokens in the same
    bin of that width.

    Args:
        name: the problem.
        problem: what there is of it.
        config: the configuration.
        dropped: counts what is left out.

    Returns:
        The pairs, and the number of those that could have been taken.
    """

    def length_bin(rollout: Rollout) -> int:
        return 0 if config.length_bin is None else rollout.outputs // config.length_bin

    def drop(reason: str, number: int = 1) -> None:
        if number:
            dropped[reason] += number

    given = []
    for pair in dict.fromkeys(problem.pairs):
        if pair.right.solution == pair.wrong.solution:
            drop("pairs whose two sides are the same")
        elif not (pair.right.outputs and pair.wrong.outputs):
            drop("pairs with a solution that has no output token")
        elif not (prompt_fits(pair.right.solution, config) and prompt_fits(pair.wrong.solution, config)):
            drop("pairs whose prompt alone fills data.max_length")
        elif not (fits(pair.right.solution, config) and fits(pair.wrong.solution, config)):
            drop("pairs with a solution that does not fit into data.max_length")
        elif length_bin(pair.right) != length_bin(pair.wrong):
            drop("pairs whose two sides are in different bins of data.length_bin")
        else:
            given.append(pair)
    drop("repeated pairs", len(problem.pairs) - len(set(problem.pairs)))

    # By length bin and reward, the highest first.
    free: dict[int, dict[float, list[Rollout]]] = {}
    by_solution: dict[Solution, dict[float, Rollout]] = {}
    for rollout in problem.rollouts:
        by_solution.setdefault(rollout.solution, {}).setdefault(rollout.total, rollout)
    several = {solution for solution, rewards in by_solution.items() if len(rewards) > 1}
    drop("solutions that have more than one reward", len(several))
    drop("repeated solutions", len(problem.rollouts) - sum(map(len, by_solution.values())))
    distinct = [rollout for solution, by in by_solution.items() if solution not in several for rollout in by.values()]
    distinct.sort(key=lambda rollout: (-rollout.total, stable_hash(config.split_seed, rollout.solution)))
    for rollout in distinct:
        if reason := unusable(rollout, config):
            drop(f"solutions {reason}")
        else:
            free.setdefault(length_bin(rollout), {}).setdefault(rollout.total, []).append(rollout)
    shared = sorted((key for key, by in free.items() if len(by) > 1), key=lambda k: stable_hash(config.split_seed, k))
    if config.length_bin is not None:
        alone = sum(len(side) for by in free.values() if len(by) == 1 for side in by.values())
        drop("solutions without a partner of another reward in their bin of data.length_bin", alone)

    sides = [both for key in shared for both in itertools.combinations(free[key].values(), 2)]
    if any(len(free[key]) > 2 for key in shared):
        sides.sort(key=lambda both: stable_hash(config.split_seed, tuple(side[0].solution for side in both)))
    made = (TokenPair(name, *both) for both in _alternate([_evenly(*both) for both in sides]))
    given.sort(key=lambda pair: stable_hash(config.split_seed, (name, pair.right.solution, pair.wrong.solution)))
    pairs = list(itertools.islice(itertools.chain(given, made), config.pairs_per_problem))
    return pairs, len(given) + sum(len(right) * len(wrong) for right, wrong in sides)


def _evenly(right: Sequence[Rollout], wrong: Sequence[Rollout]) -> Iterator[tuple[Rollout, Rollout]]:
    """All combinations; after any number of them no rollout of a side was used two times more than another."""
    longer, shorter = (right, wrong) if len(right) >= len(wrong) else (wrong, right)
    for shift in range(len(shorter)):
        for i, one in enumerate(longer):
            other = shorter[(i + shift) % len(shorter)]
            yield (one, other) if longer is right else (other, one)


def _alternate(parts: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One of each in turn until all are empty."""
    missing = object()
    for row in itertools.zip_longest(*parts, fillvalue=missing):
        yield from (item for item in row if item is not missing)


def all_pairs(rollouts: Sequence[Rollout]) -> list[TokenPair]:
    """All pairs of rollouts of the same problem with different rewards, the higher one right."""
    by_problem: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_problem.setdefault(rollout.problem, []).append(rollout)
    return [
        TokenPair(name, *sorted(both, key=lambda rollout: -rollout.total))
        for name, group in by_problem.items()
        for both in itertools.combinations(group, 2)
        if both[0].total != both[1].total
    ]


def stable_hash(seed: int, item: object) -> bytes:
    """Orders items at random, yet the same in every process and whatever else the file holds."""
    return hashlib.sha256(f"{seed}:{item!r}".encode()).digest()
