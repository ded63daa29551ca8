"""`lambda-critic inspect`: one HTML page that shows what a critic says about each token, with nothing to download."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.config import ValuePosition
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Rollout
from lambda_return_ext.critic.data.split import Item
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.evaluation.credit import Credit, credit_solutions, value_changes
from lambda_return_ext.critic.task import Task, build_collator, load_run, midpoint

LARGEST_DROPS = 3
SIDES = ("right", "wrong")  # of a pair; a rollout alone has the first place
GAMMA, LAMBDA, MINUS = "\N{GREEK SMALL LETTER GAMMA}", "\N{GREEK SMALL LETTER LAMDA}", "\N{MINUS SIGN}"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def inspect_run(run: str, pairs: int, output: str | None = None) -> Path:
    """Write the page of a run's validation pairs or rollouts and return its path.

    Args:
        run: folder of the run.
        pairs: so many pairs or rollouts at most, evenly spread over their margins.
        output: the file to write; None means `inspect.html` in the run folder.

    Raises:
        UserError: the folder holds no run, its data has changed since, or the page cannot be written.
    """
    if pairs < 1:
        raise UserError(f"--pairs must be at least 1, got {pairs}")
    path = Path(output) if output else Path(run) / checkpoint.INSPECT
    display = Display()
    task, state = load_run(run)
    of_pairs = task.config.data.sampling == "pairs"
    kind = "pairs" if of_pairs else "rollouts"
    shown = [*credited_items(task, display)]
    shown.sort(key=lambda item: item.margin)
    measured = state["metrics"]
    facts = [
        (f"{title}, validation", f"{measured[f'validation/{key}']:{style}}".replace("-", MINUS))
        for title, key, style in (
            ("pairwise accuracy", "pairwise_accuracy", ".3f"),
            ("mean margin", "margin", "+.2g"),
            *([] if of_pairs else [("explained variance", "explained_variance", ".3f")]),
        )
        if f"validation/{key}" in measured
    ]
    facts.append((f"validation {kind}", f"{len(shown):,}"))
    if len(shown) > pairs:
        shown = [shown[round(i * (len(shown) - 1) / max(pairs - 1, 1))] for i in range(pairs)]
    tokenizer = task.backbone.tokenizer()
    gamma, lam = task.config.training.value_loss.gamma_lam
    totals = [rollout.total for rollout in task.data.rollouts]
    content = {
        "title": f"What the critic says, token by token: {Path(run).name}",
        "about": (
            f"{len(shown)} {kind} of problems that the critic was never trained on, under the best checkpoint "
            f"(step {state['step']}); the target has {GAMMA} = {gamma:g} and {LAMBDA} = {lam:g}. "
            "Point at a token for its numbers."
        ),
        "facts": [*facts, (f"{kind} on this page", f"{len(shown):,}")],
        "kind": kind,
        "sides": list(SIDES if of_pairs else SIDES[:1]),
        "position": task.config.model.value_position,
        "rewards": [min(0.0, *totals), max(1.0, *totals)],
        "pairs": [describe_item(tokenizer, item, task.config.model.value_position) for item in shown],
    }
    try:
        files.write_text(path, render_page(content))
    except OSError as error:
        raise UserError(f"--output must be a file that can be written, got {str(path)!r}: {error}") from error
    display.line(f"wrote {path}: {len(shown)} {kind}; open it in a browser")
    return path


class Shown(NamedTuple):
    """A pair or a rollout with what the critic says of it.

    Attributes:
        item: the pair or rollout.
        margin: of a pair, mean value of right minus wrong; of a rollout, minus the distance of its last value from its
            reward. The page shows the lowest first.
        misjudged: a pair whose wrong side is above, or a rollout whose last value is nearer to the other half.
        credits: of each of its rollouts.
    """

    item: Item
    margin: float
    misjudged: bool
    credits: tuple[Credit, ...]


def credited_items(task: Task, display: Display) -> Iterator[Shown]:
    """Each validation pair or rollout with the credit of its rollouts."""
    gamma, lam = task.config.training.value_loss.gamma_lam
    position, middle = task.config.model.value_position, midpoint(task.data.train)
    collate = build_collator(task, task.data.validation, display)
    items = sorted(task.data.validation, key=lambda item: item.length)
    size = task.config.evaluation.batch_size
    task.model.eval()
    for start in range(0, len(items), size):
        part = items[start : start + size]
        # As in a batch: the first rollout of all items before the second of any.
        rollouts = [rollout for side in zip(*(item.rollouts for item in part), strict=True) for rollout in side]
        batch = collate.pad(part).to(task.device)
        solutions = [rollout.solution for rollout in rollouts]
        credits = credit_solutions(task.model, batch, solutions, gamma, lam, position)
        for k, item in enumerate(part):
            own = tuple(credits[k :: len(part)])
            if isinstance(item, TokenPair):
                margin = mean_value(own[0]) - mean_value(own[1])
                yield Shown(item, margin, margin <= 0, own)
            else:
                last = verdict(own[0])
                yield Shown(item, -abs(last - item.total), (last >= middle) != (item.total >= middle), own)


def mean_value(credit: Credit) -> float:
    """Mean of V over the output tokens of one solution."""
    return credit.values[credit.mask].double().mean().item()


def verdict(credit: Credit) -> float:
    """The last value of one solution: after its last token where there is one, else before it."""
    values = credit.values if credit.values_after is None else credit.values_after
    return values[credit.mask][-1].item()


def describe_item(tokenizer: Any, shown: Shown, position: ValuePosition) -> dict[str, Any]:
    """One pair or rollout as the page reads it."""
    item, rollouts = shown.item, shown.item.rollouts
    differs = first_difference(*(rollout.solution.output_ids for rollout in rollouts)) if len(rollouts) > 1 else 0
    sides = zip(SIDES, rollouts, shown.credits, strict=False)
    return {
        "problem": item.problem,
        "margin": _short(shown.margin),
        "misjudged": shown.misjudged,
        "differs": differs,
        "prompt": "".join(token_texts(tokenizer, rollouts[0].solution.prompt_ids)),
        **{name: describe_rollout(tokenizer, one, credit, differs, position) for name, one, credit in sides},
    }


def describe_rollout(
    tokenizer: Any, rollout: Rollout, credit: Credit, differs: int, position: ValuePosition
) -> dict[str, Any]:
    """What follows the prompt, token by token.

    Texts `t`, mask `m`, V `v`, changes of V `c`, targets `g`, advantages `a` and TD errors `d`; mean and last V, the
    reward, and the largest drops. With values on both sides of a token, V is that after it.
    """
    return {
        "t": token_texts(tokenizer, rollout.solution.output_ids),
        "m": credit.mask.int().tolist(),
        "v": _list(credit.values if credit.values_after is None else credit.values_after),
        "c": _list(value_changes(credit, position)),
        "g": _list(credit.targets),
        "a": _list(credit.advantages),
        "d": _list(credit.td_errors),
        "mean": _short(mean_value(credit)),
        "last": _short(verdict(credit)),
        "reward": _short(rollout.total),
        "drops": largest_drops(credit, differs, position),
    }


def first_difference(right: Sequence[int], wrong: Sequence[int]) -> int:
    """Index of the first token in which the two differ, or the length of the shorter where it begins the longer."""
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(right, wrong, strict=False))
    return sum(1 for _ in same)


def largest_drops(credit: Credit, start: int, position: ValuePosition = "after") -> list[int]:
    """The tokens from `start` on that lowered V most when they were read, the largest drop first.

    What stands before the first difference is in the other solution too, so it cannot be where this one went wrong.
    """
    falls = -value_changes(credit, position)
    order = falls.argsort(descending=True, stable=True).tolist()
    return [i for i in order if falls[i] > 0 and i >= start][:LARGEST_DROPS]


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
