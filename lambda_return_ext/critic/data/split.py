"""The data of a run: read, tokenised, split by problem, and described in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.chat import Renderer, read_chat_template
from lambda_return_ext.critic.data.pairs import TokenPair, group_by_problem, sample_pairs, stable_hash
from lambda_return_ext.critic.data.rollouts import fit_prompts, tokenize
from lambda_return_ext.critic.data.rows import Example, parse_example
from lambda_return_ext.critic.data.sources import Source
from lambda_return_ext.critic.errors import UserError


@dataclass(frozen=True)
class PairData:
    """The pairs of a run after the split.

    Attributes:
        train: pairs to train on.
        validation: pairs of problems that `train` has none of.
        possible: number of pairs that could be made of the problems of `train` and of `validation`.
        dropped: what was left out, and how much of it.
        truncated: number of pairs whose prompt lost its beginning.
    """

    train: list[TokenPair]
    validation: list[TokenPair]
    possible: dict[str, int]
    dropped: dict[str, int]
    truncated: int

    def report(self) -> dict[str, Any]:
        """The data in numbers."""
        parts = {"train": self.train, "validation": self.validation}
        return {
            **{name: {**_describe(pairs), "possible_pairs": self.possible[name]} for name, pairs in parts.items()},
            "truncated_prompts": self.truncated,
            "dropped": self.dropped,
        }


def _describe(pairs: Sequence[TokenPair]) -> dict[str, Any]:
    gains = [pair.right.outputs - pair.wrong.outputs for pair in pairs]
    return {
        "problems": len({pair.problem for pair in pairs}),
        "pairs": len(pairs),
        "tokens": sum(pair.right.length + pair.wrong.length for pair in pairs),
        "output_tokens": sum(pair.right.outputs + pair.wrong.outputs for pair in pairs),
        "mean_length_right": fmean(pair.right.outputs for pair in pairs),
        "mean_length_wrong": fmean(pair.wrong.outputs for pair in pairs),
        "right_longer": sum(gain > 0 for gain in gains) / len(pairs),
        "right_shorter": sum(gain < 0 for gain in gains) / len(pairs),
    }


def read_examples(config: DataConfig) -> tuple[list[Example], str]:
    """Read and check all rows; return them and a digest, by which a run notices that its data changed.

    Raises:
        UserError: names the file and the line that is wrong, what it must be and what it got.
    """
    source = Source(config.path, config.subset, config.split)
    examples = [parse_example(row) for row in source]
    if not examples:
        raise UserError(f"{config.path} must hold at least one pair, got an empty file")
    return examples, source.sha256()


def select_pairs(examples: Sequence[Example], tokenizer: Any, config: DataConfig) -> PairData:
    """Tokenise the examples, split them by problem and take as many pairs as the configuration says.

    A pair of which one side is longer than `max_length` is dropped and counted, unless prompts may be cut: cut short,
    a solution would end where nothing says whether it was right.

    Raises:
        UserError: there are too few problems for the split.
    """
    dropped: Counter[str] = Counter()
    solutions = tokenize(examples, Renderer(tokenizer, read_chat_template(config.chat_template)))
    problems = group_by_problem(examples, solutions)
    sampled: dict[str, tuple[list[TokenPair], int]] = {}
    for name, problem in problems.items():
        pairs, possible = sample_pairs(name, problem, config, dropped)
        if pairs:
            sampled[name] = pairs, possible
        else:
            dropped["problems without a pair"] += 1
    wanted = config.validation_problems + (config.train_problems or 1)
    if len(sampled) < wanted:
        reasons = "; ".join(f"dropped {number} {reason}" for reason, number in dropped.items())
        raise UserError(
            f"data.validation_problems + data.train_problems must be at most the number of problems in {config.path} "
            f"that fit into data.max_length, got {wanted} for {len(sampled)} problems{f' ({reasons})' * bool(reasons)}"
        )
    order = sorted(sampled, key=lambda problem: stable_hash(config.split_seed, problem))
    last = None if config.train_problems is None else wanted
    chosen = {"train": order[config.validation_problems : last], "validation": order[: config.validation_problems]}
    whole = {part: [pair for name in names for pair in sampled[name][0]] for part, names in chosen.items()}
    fitted = {
        part: [TokenPair(pair.problem, *fit_prompts(pair[1:], config.max_length)) for pair in pairs]
        for part, pairs in whole.items()
    }
    return PairData(
        train=fitted["train"],
        validation=fitted["validation"],
        possible={part: sum(sampled[name][1] for name in names) for part, names in chosen.items()},
        dropped=dict(dropped),
        truncated=sum(pair.length > config.max_length for pairs in whole.values() for pair in pairs),
    )
