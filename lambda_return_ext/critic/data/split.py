"""The data of a run: read, tokenised, split by problem into what is trained on and what is measured, and described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev, quantiles
from typing import Any, NamedTuple

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.chat import Renderer, lost_special_tokens, read_chat_template
from lambda_return_ext.critic.data.pairs import (
    Problem,
    TokenPair,
    group_by_problem,
    problem_names,
    sample_pairs,
    stable_hash,
)
from lambda_return_ext.critic.data.rollouts import Rollout, fit_prompts, tokenize, unusable
from lambda_return_ext.critic.data.rows import Example, check_together, parse_example
from lambda_return_ext.critic.data.sources import Source
from lambda_return_ext.critic.errors import UserError

# A run trains on and is measured on items of one kind: pairs, or single rollouts.
Item = TokenPair | Rollout
SPLIT_PROBLEMS = 64  # validation problems where neither a number nor a file is given
FEW_REWARDS = 10


class Rows(NamedTuple):
    """The checked rows of a run.

    Attributes:
        train: of `data.path`.
        validation: of `data.validation_path`; None where a part of `data.path` validates.
        digests: of the files, by which a run notices that its data changed.
    """

    train: list[Example]
    validation: list[Example] | None
    digests: dict[str, str]


@dataclass(frozen=True)
class RunData:
    """The items of a run after the split.

    Attributes:
        train: items to train on.
        validation: items of problems that `train` has none of.
        possible: number of pairs that could be made of the problems of `train` and of `validation`; none for rollouts.
        dropped: what was left out, and how much of it.
        truncated: number of items whose prompt lost its beginning.
        rows: what was read, in numbers.
    """

    train: Sequence[Item]
    validation: Sequence[Item]
    possible: dict[str, int]
    dropped: dict[str, int]
    truncated: int
    rows: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        """The rollouts of all items."""
        return [rollout for item in (*self.train, *self.validation) for rollout in item.rollouts]

    def report(self) -> dict[str, Any]:
        """The data in numbers."""
        parts = {"train": self.train, "validation": self.validation}
        return {
            **{name: describe_items(items, self.possible.get(name)) for name, items in parts.items()},
            "truncated_prompts": self.truncated,
            "dropped": self.dropped,
            "rows": dict(self.rows),
        }


def describe_items(items: Sequence[Item], possible_pairs: int | None = None) -> dict[str, Any]:
    """Counts, lengths and rewards of some items."""
    rollouts = [rollout for item in items for rollout in item.rollouts]
    pairs = [item for item in items if isinstance(item, TokenPair)]
    counts = {
        "problems": len({item.problem for item in items}),
        **({"pairs": len(pairs)} if pairs else {"rollouts": len(rollouts)}),
        "tokens": sum(rollout.length for rollout in rollouts),
        "output_tokens": sum(rollout.outputs for rollout in rollouts),
    }
    if not pairs:
        return {
            **counts,
            "mean_length": fmean(rollout.outputs for rollout in rollouts),
            "cut_off": sum(rollout.truncated for rollout in rollouts),
            **describe_rewards(rollouts),
        }
    gains = [pair.right.outputs - pair.wrong.outputs for pair in pairs]
    return {
        **counts,
        "mean_length_right": fmean(pair.right.outputs for pair in pairs),
        "mean_length_wrong": fmean(pair.wrong.outputs for pair in pairs),
        "right_longer": sum(gain > 0 for gain in gains) / len(pairs),
        "right_shorter": sum(gain < 0 for gain in gains) / len(pairs),
        "possible_pairs": possible_pairs,
    }


def describe_rewards(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The distribution of all rewards of a rollout together, and of how many problems all answers have the same."""
    totals = [rollout.total for rollout in rollouts]
    by_problem: dict[str, set[float]] = {}
    for rollout, total in zip(rollouts, totals, strict=True):
        by_problem.setdefault(rollout.problem, set()).add(total)
    quartiles = quantiles(totals, method="inclusive") if len(totals) > 1 else totals * 3
    counts = Counter(totals)
    return {
        "problems_with_one_reward": sum(len(rewards) == 1 for rewards in by_problem.values()),
        "reward_mean": fmean(totals),
        "reward_deviation": pstdev(totals),
        "reward_quartiles": [min(totals), *quartiles, max(totals)],
        # A list of [reward, count] pairs where few rewards occur, as with a verifier that says right or wrong.
        "reward_counts": [[reward, counts[reward]] for reward in sorted(counts)]
        if len(counts) <= FEW_REWARDS
        else None,
    }


def read_rows(config: DataConfig) -> Rows:
    """Read and check all rows of a run.

    Raises:
        UserError: names the file and the line that is wrong, what it must be and what it got.
    """
    train, digest = read_examples(config)
    if config.validation_path is None:
        return Rows(train, None, {"sha256": digest})
    validation, other = read_examples(config, config.validation_path, "data.validation_path")
    return Rows(train, validation, {"sha256": digest, "validation_sha256": other})


def read_examples(config: DataConfig, path: str | None = None, name: str = "data.path") -> tuple[list[Example], str]:
    """Read and check the rows of one source; return them and its digest.

    Raises:
        UserError: names the file and the line that is wrong, what it must be and what it got.
    """
    source = Source(path or config.path, config.subset, config.split, name, config.columns)
    examples = [parse_example(row) for row in source]
    if not examples:
        raise UserError(f"{source.path} must hold at least one row, got an empty file")
    check_together(examples)
    return examples, source.sha256()


def select_data(rows: Rows, tokenizer: Any, config: DataConfig) -> RunData:
    """Tokenise the rows, split them by problem and take as many items as the configuration says.

    What is longer than `max_length` is dropped and counted, unless prompts may be cut: cut short, an answer would end
    where nothing says whether it was right.

    Raises:
        UserError: there are too few problems for the split, or no pair at all.
    """
    dropped: Counter[str] = Counter()
    examples = [*rows.train, *(rows.validation or ())]
    rollouts = tokenize(examples, Renderer(tokenizer, read_chat_template(config.chat_template)))
    held_out: set[str] = set()
    if rows.validation is not None:  # a problem of that file is not trained on, wherever it stands
        names = problem_names(examples, rollouts)
        held_out = set(names[len(rows.train) :])
        kept = [i >= len(rows.train) or names[i] not in held_out for i in range(len(examples))]
        again = {name for name, keep in zip(names, kept, strict=True) if not keep}
        dropped["problems that are in data.validation_path too"] = len(again)
        examples = [example for example, keep in zip(examples, kept, strict=True) if keep]
        rollouts = [answers for answers, keep in zip(rollouts, kept, strict=True) if keep]
    problems = group_by_problem(examples, rollouts)
    pairs = config.sampling == "pairs"
    take = sample_pairs if pairs else take_rollouts
    taken: dict[str, tuple[Sequence[Item], int]] = {}
    for name, problem in problems.items():
        items, possible = take(name, problem, config, dropped)
        if items:
            taken[name] = items, possible
        else:
            dropped[f"problems without a {'pair' if pairs else 'rollout that can be used'}"] += 1
    dropped = Counter({reason: number for reason, number in dropped.items() if number})
    if pairs and not any(map(_has_a_pair, problems.values())):
        raise UserError(
            f"{config.path} must hold two answers of one problem with different rewards, got no such pair"
            f"{_reasons(dropped)}; data.sampling: rollouts takes it, since it needs none"
        )
    chosen = split_problems(taken, held_out, rows, config, dropped)
    whole = {part: [item for name in names for item in taken[name][0]] for part, names in chosen.items()}
    fitted = {part: [fit_item(item, config.max_length) for item in items] for part, items in whole.items()}
    return RunData(
        train=fitted["train"],
        validation=fitted["validation"],
        possible={part: sum(taken[name][1] for name in names) for part, names in chosen.items()} if pairs else {},
        dropped=dict(dropped),
        truncated=sum(item.length > config.max_length for items in whole.values() for item in items),
        rows=describe_rows(examples, problems, tokenizer),
    )


def _has_a_pair(problem: Problem) -> bool:
    return bool(problem.pairs) or len({rollout.total for rollout in problem.rollouts}) > 1


def split_problems(
    taken: Mapping[str, Any], held_out: set[str], rows: Rows, config: DataConfig, dropped: Mapping[str, int]
) -> dict[str, list[str]]:
    """Which problems are trained on and which validate, each in an order of its own.

    Raises:
        UserError: there are not as many as the configuration wants.
    """
    order = sorted(taken, key=lambda problem: stable_hash(config.split_seed, problem))
    train = [name for name in order if name not in held_out]
    validation = [name for name in order if name in held_out]
    if rows.validation is None:
        wanted = config.validation_problems or SPLIT_PROBLEMS
        if len(order) < wanted + (config.train_problems or 1):
            raise UserError(
                f"data.validation_problems + data.train_problems must be at most the number of problems in "
                f"{config.path} that fit into data.max_length, got {wanted + (config.train_problems or 1)} for "
                f"{len(order)} problems{_reasons(dropped)}"
            )
        train, validation = order[wanted:], order[:wanted]
    for key, path, names, number in (
        ("train_problems", config.path, train, config.train_problems),
        ("validation_problems", config.validation_path, validation, config.validation_problems),
    ):
        if len(names) < (number or 1):
            raise UserError(
                f"data.{key} must be at most the number of problems in {path} that can be used, got {number or 1} for "
                f"{len(names)} problems{_reasons(dropped)}"
            )
    last = config.validation_problems if rows.validation is not None else None
    return {"train": train[: config.train_problems], "validation": validation[:last]}


def _reasons(dropped: Mapping[str, int]) -> str:
    return f" ({'; '.join(f'dropped {number} {reason}' for reason, number in dropped.items())})" * bool(dropped)


def take_rollouts(
    name: str, problem: Problem, config: DataConfig, dropped: Counter[str]
) -> tuple[Sequence[Rollout], int]:
    """All rollouts of a problem that can be used, repeated ones too: the policy says those more often.

    Args:
        name: the problem.
        problem: what there is of it.
        config: the configuration.
        dropped: counts what is left out.

    Returns:
        The rollouts, and their number.
    """
    taken = []
    for rollout in sorted(problem.everything, key=lambda rollout: stable_hash(config.split_seed, tuple(rollout))):
        if reason := unusable(rollout, config):
            dropped[f"answers {reason}"] += 1
        else:
            taken.append(rollout)
    return taken, len(taken)


def fit_item(item: Item, max_length: int) -> Item:
    """The item with the beginning of its prompt cut where it is too long; both sides of a pair alike."""
    fitted = fit_prompts([rollout.solution for rollout in item.rollouts], max_length)
    rollouts = [rollout._replace(solution=short) for rollout, short in zip(item.rollouts, fitted, strict=True)]
    return TokenPair(item.problem, *rollouts) if isinstance(item, TokenPair) else rollouts[0]


def describe_rows(examples: Sequence[Example], problems: Mapping[str, Problem], tokenizer: Any) -> dict[str, Any]:
    """What was read, before anything was left out."""
    rollouts = [rollout for problem in problems.values() for rollout in problem.everything]
    return {
        "shapes": dict(Counter(example.shape for example in examples)),
        "problems": len(problems),
        "rollouts": len(rollouts),
        "cut_off": sum(rollout.truncated for rollout in rollouts),
        **describe_rewards(rollouts),
        "lost_special_tokens": sum(lost_special_tokens(example, tokenizer) for example in examples),
    }
