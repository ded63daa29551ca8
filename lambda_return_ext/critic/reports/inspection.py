"""`lambda-critic inspect`: one HTML page that shows what a critic says about each token, with nothing to download."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Solution
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.evaluation.credit import Credit, credit_solutions
from lambda_return_ext.critic.evaluation.validation import pairs_of
from lambda_return_ext.critic.task import Task, build_collator, load_run

LARGEST_DROPS = 3
GAMMA, LAMBDA, MINUS = "\N{GREEK SMALL LETTER GAMMA}", "\N{GREEK SMALL LETTER LAMDA}", "\N{MINUS SIGN}"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def inspect_run(run: str, pairs: int, output: str | None = None) -> Path:
    """Write the page of a run's validation pairs and return its path.

    Args:
        run: folder of the run.
        pairs: so many pairs at most, evenly spread over the margins.
        output: the file to write; None means `inspect.html` in the run folder.

    Raises:
        UserError: the folder holds no run, its data has changed since, or the page cannot be written.
    """
    if pairs < 1:
        raise UserError(f"--pairs must be at least 1, got {pairs}")
    path = Path(output) if output else Path(run) / checkpoint.INSPECT
    display = Display()
    task, state = load_run(run)
    shown = [*credited_pairs(task, display)]
    shown.sort(key=lambda item: item[1])
    facts = [
        ("pairwise accuracy, validation", f"{state['metrics']['validation/pairwise_accuracy']:.3f}"),
        ("mean margin, validation", f"{state['metrics']['validation/margin']:+.2g}".replace("-", MINUS)),
        ("validation pairs", f"{len(shown):,}"),
    ]
    if len(shown) > pairs:
        shown = [shown[round(i * (len(shown) - 1) / max(pairs - 1, 1))] for i in range(pairs)]
    tokenizer = task.backbone.tokenizer()
    gamma, lam = task.config.training.value_loss.gamma_lam
    content = {
        "title": f"What the critic says, token by token: {Path(run).name}",
        "about": (
            f"{len(shown)} pairs of problems that the critic was never trained on, under the best checkpoint "
            f"(step {state['step']}); the target has {GAMMA} = {gamma:g} and {LAMBDA} = {lam:g}. "
            "Point at a token for its numbers."
        ),
        "facts": [*facts, ("pairs on this page", f"{len(shown):,}")],
        "pairs": [describe_pair(tokenizer, pair, margin, *sides) for pair, margin, *sides in shown],
    }
    try:
        files.write_text(path, render_page(content))
    except OSError as error:
        raise UserError(f"--output must be a file that can be written, got {str(path)!r}: {error}") from error
    display.line(f"wrote {path}: {len(shown)} pairs; open it in a browser")
    return path


def credited_pairs(task: Task, display: Display) -> list[tuple[TokenPair, float, Credit, Credit]]:
    """Each validation pair with its margin and the credit of its right and its wrong solution."""
    gamma, lam = task.config.training.value_loss.gamma_lam
    collate = build_collator(task, task.data.validation, display)
    pairs = sorted(pairs_of(task.data.validation), key=lambda pair: pair.length)
    size = task.config.evaluation.batch_size
    task.model.eval()
    credited = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        solutions = [pair.right.solution for pair in part] + [pair.wrong.solution for pair in part]
        credits = credit_solutions(task.model, collate.pad(part).to(task.device), solutions, gamma, lam)
        for pair, right, wrong in zip(part, credits[: len(part)], credits[len(part) :], strict=True):
            credited.append((pair, mean_value(right) - mean_value(wrong), right, wrong))
    return credited


def mean_value(credit: Credit) -> float:
    """Mean of V over the output tokens of one solution."""
    return credit.values[credit.mask].double().mean().item()


def describe_pair(tokenizer: Any, pair: TokenPair, margin: float, right: Credit, wrong: Credit) -> dict[str, Any]:
    """One pair as the page reads it."""
    differs = first_difference(pair.right.solution.output_ids, pair.wrong.solution.output_ids)
    return {
        "problem": pair.problem,
        "margin": _short(margin),
        "differs": differs,
        "prompt": "".join(token_texts(tokenizer, pair.right.solution.prompt_ids)),
        "right": describe_solution(tokenizer, pair.right.solution, right, differs),
        "wrong": describe_solution(tokenizer, pair.wrong.solution, wrong, differs),
    }


def describe_solution(tokenizer: Any, solution: Solution, credit: Credit, differs: int) -> dict[str, Any]:
    """Texts `t`, mask `m`, V, G, advantages and TD errors of what follows the prompt; mean V, and the largest drops."""
    return {
        "t": token_texts(tokenizer, solution.output_ids),
        "m": credit.mask.int().tolist(),
        "v": _list(credit.values),
        "g": _list(credit.targets),
        "a": _list(credit.advantages),
        "d": _list(credit.td_errors),
        "mean": _short(mean_value(credit)),
        "drops": largest_drops(credit, differs),
    }


def first_difference(right: Sequence[int], wrong: Sequence[int]) -> int:
    """Index of the first token in which the two differ, or the length of the shorter where it begins the longer."""
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(right, wrong, strict=False))
    return sum(1 for _ in same)


def largest_drops(credit: Credit, start: int) -> list[int]:
    """Positions from `start` on at which V falls most from one output token to the next, the largest first.

    What stands before the first difference is in the other solution too, so it cannot be where this one went wrong.
    """
    positions = credit.mask.nonzero()[:, 0]
    falls = -credit.values[positions].diff()
    order = [
        i for i in falls.argsort(descending=True, stable=True).tolist() if falls[i] > 0 and positions[i + 1] >= start
    ]
    return [int(positions[i + 1]) for i in order[:LARGEST_DROPS]]


def token_texts(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    """The text of each token, so that the texts put together are the whole.

    Where a character is spread over several tokens, the last of them has it and the others are empty.
    """
    texts: list[str] = []
    waiting: list[int] = []
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        waiting.append(i)
        text = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if REPLACEMENT in text and len(waiting) < 4 and tokenizer.unk_token_id != i:
            texts.append("")
            continue
        if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops the space of the first token that it decodes
        waiting = []
        texts.append(text)
    if waiting:
        texts[-1] = REPLACEMENT
    return texts


def render_page(content: dict[str, Any]) -> str:
    """The page with its data inside. No text of the data can end the element that holds it."""
    template = resources.files("lambda_return_ext.critic.reports").joinpath("inspect.html").read_text(encoding="utf-8")
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = template.split("%DATA%")
    return before.replace("%TITLE%", html.escape(content["title"])) + data + after


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _list(numbers: Tensor) -> list[float]:
    return [_short(number) for number in numbers.tolist()]
