"""Plots of one run and of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.reports.log import read_metrics
from lambda_return_ext.critic.reports.tables import length_bins

MARKED = {"marker": "o", "markersize": 4}

EXPLAINED = ("explained_variance", "Explained variance of the reward")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    _pyplot().close(figure)


def _draw(axis: Any, source: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> None:
    """Draw a number over the steps, where it was measured."""
    source = [record for record in source if key in record]
    if source:
        axis.plot([record["step"] for record in source], [record[key] for record in source], label=label, **style)


def draw_reliability(axis: Any, measured: Mapping[str, Any], label: str, **style: Any) -> None:
    """Mean reward over the value of the last token, on validation; a larger dot is a fuller bin."""
    predicted, observed, count = (measured[f"validation/reliability_{x}"] for x in ("predicted", "observed", "count"))
    total = sum(count)
    axis.plot(predicted, observed, linewidth=1.2, label=f"{label}: Brier {measured['validation/brier']:.3f}", **style)
    axis.scatter(predicted, observed, s=[12 + 240 * number / total for number in count], alpha=0.6, **style)


def finish_reliability(axis: Any) -> None:
    """What the plot has besides its data."""
    drawn = [[0.0, 1.0], *(line.get_xydata().ravel() for line in axis.lines)]
    low, high = min(map(min, drawn)), max(map(max, drawn))  # 0 to 1, and rewards beyond
    margin = 0.03 * (high - low)
    axis.plot([low, high], [low, high], color="0.45", linestyle="--", linewidth=1, zorder=0, label="calibrated")
    ends = (low - margin, high + margin)
    axis.set(xlim=ends, ylim=ends, xlabel="value of the last token", ylabel="mean reward")
    axis.set_title("Reliability, validation")


def shared_length_bins(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of the parts by length of several runs; where their ends differ, those of quarters."""
    titles = [length_bins(each) for each in measured]
    if all(each == titles[0] for each in titles):
        return titles[0]
    return ["shortest quarter", "second quarter", "third quarter", "longest quarter"]


def plot_curves(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Draw a run into `curves.png`: over the steps, and of the best checkpoint reliability and accuracy by length."""
    records = read_metrics(run_dir)
    steps = [record for record in records if "train/loss" in record]
    checks = [record for record in records if "validation/loss" in record]
    plt = _pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    (loss, accuracy, reliability), (margin, variance, length) = axes
    pairs = "pairs" in results["data"]["validation"]
    trained_on = "training pairs" if pairs else "training rollouts"

    _draw(loss, steps, "train/loss", "training batch", color="C0", alpha=0.5, linewidth=1)
    _draw(loss, checks, "validation/loss", "validation", color="C1", **MARKED)
    loss.set_yscale("log")  # the last token alone, in the warm-up, has a far larger loss than all tokens
    loss.set_title("Loss")

    _draw(accuracy, checks, "train_subset/pairwise_accuracy", trained_on, color="C0", **MARKED)
    _draw(accuracy, checks, "validation/pairwise_accuracy", "validation", color="C1", **MARKED)
    for style, (title, score) in zip(("--", ":"), results["baselines"].items(), strict=False):
        accuracy.axhline(score, color="0.45", linestyle=style, linewidth=1.2, label=f"baseline: {title}")
    accuracy.set_title("Pairwise accuracy")

    key, title = ("margin", "Margin: mean value of right minus wrong") if pairs else EXPLAINED
    _draw(margin, checks, f"train_subset/{key}", trained_on, color="C0", **MARKED)
    _draw(margin, checks, f"validation/{key}", "validation", color="C1", **MARKED)
    margin.axhline(0.0, color="0.45", linewidth=0.8)
    margin.set_title(title)

    _draw(variance, checks, "validation/token_variance_right", "right solutions", color="C2", **MARKED)
    _draw(variance, checks, "validation/token_variance_wrong", "wrong solutions", color="C3", **MARKED)
    _draw(variance, checks, "validation/token_variance", "all rollouts", color="C1", **MARKED)
    variance.set_title("Variance of the value over tokens, validation")

    best = results["checkpoints"]["best"]
    draw_reliability(reliability, best["metrics"], "best checkpoint", color="C1")
    finish_reliability(reliability)
    titles = length_bins(best["metrics"])
    bars = length.bar(range(len(titles)), best["metrics"].get("validation/length_accuracy", []), color="C1")
    length.bar_label(bars, fmt="%.2f", fontsize=8)
    length.axhline(0.5, color="0.45", linestyle="--", linewidth=1)
    length.set_xticks(range(len(titles)), titles, fontsize=8)
    length.set_ylim(0, 1.05)
    length.set_title("Accuracy by length, best checkpoint, validation")

    warmup = max((record["step"] for record in steps if record["train/warmup_active"]), default=0)
    for axis in axes[:, :2].flat:
        name = "{}" if axis is loss else "_{}"  # matplotlib leaves names with an underscore out of the legend
        if warmup:
            axis.axvspan(0, warmup, color="0.92", zorder=0, label=name.format("warm-up: last token only"))
        axis.axvline(best["step"], color="0.7", linewidth=1, zorder=0, label=name.format("best checkpoint"))
        axis.set_xlabel("step")
    _finish(axes, length)
    figure.suptitle(results["title"])
    _save(figure, run_dir / checkpoint.CURVES)


def plot_comparison(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, Any]]], path: Path) -> None:
    """Draw several runs over one another.

    Args:
        runs: of each its name, the records of `metrics.jsonl` and its results.
        path: the PNG file.
    """
    figure, axes = _pyplot().subplots(2, 3, figsize=(16, 8.5), layout="constrained")
    (accuracy, margin, reliability), (loss, brier, length) = axes
    pairs = all("pairs" in results["data"]["validation"] for _, _, results in runs)
    curves = {
        accuracy: ("pairwise_accuracy", "Pairwise accuracy"),
        margin: ("margin", "Margin: mean value of right minus wrong") if pairs else EXPLAINED,
        loss: ("loss", "Loss"),
        brier: ("brier", "Brier score of the last token"),
    }
    bar = 0.8 / len(runs)
    for number, (name, records, results) in enumerate(runs):
        color = f"C{number}"
        checks = [record for record in records if "validation/loss" in record]
        for axis, (key, _) in curves.items():
            _draw(axis, checks, f"validation/{key}", name, color=color, **MARKED)
        _draw(accuracy, checks, "train_subset/pairwise_accuracy", "_train", color=color, linestyle=":", linewidth=1)
        best = results["checkpoints"]["best"]["metrics"]
        draw_reliability(reliability, best, name, color=color)
        parts = best.get("validation/length_accuracy", [])
        places = [i + bar * (number - (len(runs) - 1) / 2) for i in range(len(parts))]
        length.bar(places, parts, width=bar, color=color)
    for axis, (_, title) in curves.items():
        axis.set(title=f"{title}, validation", xlabel="step")
    accuracy.plot([], [], color="0.4", linestyle=":", linewidth=1, label="training data")
    finish_reliability(reliability)
    titles = shared_length_bins([results["checkpoints"]["best"]["metrics"] for _, _, results in runs])
    length.set_xticks(range(len(titles)), titles, fontsize=8)
    length.axhline(0.5, color="0.45", linestyle="--", linewidth=1)
    length.set(ylim=(0, 1.05), title="Pairwise accuracy by length, validation")
    _finish(axes, length)
    _save(figure, path)


def _finish(axes: Any, bars: Any) -> None:
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if axis is not bars and axis.get_legend_handles_labels()[1]:  # bars fill theirs, in the colours of the others
            axis.legend(fontsize=8, framealpha=0.9)
