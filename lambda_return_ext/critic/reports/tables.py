"""The tables that people see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lambda_return_ext.critic.display import Display

ROWS = {
    "pairwise accuracy": "pairwise_accuracy",
    "accuracy of the last token": "last_token_accuracy",
    "mean value, right": "mean_right",
    "mean value, wrong": "mean_wrong",
    "margin": "margin",
    "token variance, right": "token_variance_right",
    "token variance, wrong": "token_variance_wrong",
    "explained variance": "explained_variance",
    "Brier score": "brier",
    "calibration error": "calibration_error",
    "TD-error spikiness, right": "td_spikiness_right",
    "TD-error spikiness, wrong": "td_spikiness_wrong",
    "correlation with position, right": "position_correlation_right",
    "correlation with position, wrong": "position_correlation_wrong",
    "loss": "loss",
}
DATA_ROWS = {
    "problems": ("problems", ","),
    "pairs": ("pairs", ","),
    "pairs that could be made": ("possible_pairs", ","),
    "tokens": ("tokens", ","),
    "output tokens": ("output_tokens", ","),
    "mean output tokens, right": ("mean_length_right", ".1f"),
    "mean output tokens, wrong": ("mean_length_wrong", ".1f"),
    "pairs with the longer side right": ("right_longer", ".1%"),
    "pairs with the shorter side right": ("right_shorter", ".1%"),
}


def print_data(display: Display, summary: Mapping[str, Any]) -> None:
    """Print what a run trains on and is measured on, and what of its data it leaves out."""
    display.line(summary["path"])
    table = Table()
    table.add_column("")
    parts = ("train", "validation")
    for part in parts:
        table.add_column(part, justify="right")
    for title, (key, style) in DATA_ROWS.items():
        table.add_row(title, *(f"{summary[part][key]:{style}}" for part in parts))
    display.console.print(table)
    if summary["truncated_prompts"]:
        display.line(f"cut the beginning of the prompt: {summary['truncated_prompts']:,} pairs")
    for reason, number in summary["dropped"].items():
        display.line(f"dropped: {number:,} {reason}")


def print_results(display: Display, results: Mapping[str, Any]) -> None:
    """Print the final table: each checkpoint on validation and on training pairs, then the baselines."""
    display.line(results["title"])
    table = Table()
    table.add_column("")
    for name, measured in results["checkpoints"].items():
        for part in ("validation", "train pairs"):
            table.add_column(f"{name} (step {measured['step']})\n{part}", justify="right")
    metrics = [measured["metrics"] for measured in results["checkpoints"].values()]
    for title, key in ROWS.items():
        style = ".4f" if "accuracy" in key else ".4g"  # margins and variances can be tiny
        cells = [f"{m[f'{part}/{key}']:{style}}" for m in metrics for part in ("validation", "train_subset")]
        table.add_row(title, *cells)
    table.add_row("gap (train - validation)", *(c for m in metrics for c in (f"{m['validation/gap']:.4f}", "")))
    table.add_section()
    for i, title in enumerate(length_bins(metrics[0])):
        cells = [cell for m in metrics for cell in (f"{m['validation/length_accuracy'][i]:.4f}", "")]
        table.add_row(f"pairwise accuracy, {title}", *cells)
    if results["baselines"]:
        table.add_section()
        for title, accuracy in results["baselines"].items():
            table.add_row(f"baseline: {title}", f"{accuracy:.4f}")
    display.console.print(table)


def length_bins(measured: Mapping[str, Any]) -> list[str]:
    """Titles of the parts of equal size by which accuracy on validation is told by length."""
    ends = zip(measured["validation/length_shortest"], measured["validation/length_longest"], strict=True)
    return [f"{low:.0f} to {high:.0f} tokens" for low, high in ends]
