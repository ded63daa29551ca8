"""The tables that people see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lambda_return_ext.critic.display import Display

ROWS = {
    "pairwise accuracy": "pairwise_accuracy",
    "accuracy of the last token": "last_token_accuracy",
    "mean reward": "mean_reward",
    "mean value": "mean_value",
    "mean value of the last token": "mean_last_value",
    "mean value, right": "mean_right",
    "mean value, wrong": "mean_wrong",
    "margin": "margin",
    "token variance": "token_variance",
    "token variance, right": "token_variance_right",
    "token variance, wrong": "token_variance_wrong",
    "explained variance": "explained_variance",
    "Brier score": "brier",
    "calibration error": "calibration_error",
    "TD-error spikiness": "td_spikiness",
    "TD-error spikiness, right": "td_spikiness_right",
    "TD-error spikiness, wrong": "td_spikiness_wrong",
    "correlation with position": "position_correlation",
    "correlation with position, right": "position_correlation_right",
    "correlation with position, wrong": "position_correlation_wrong",
    "loss": "loss",
}
DATA_ROWS = {
    "problems": ("problems", ","),
    "rollouts": ("rollouts", ","),
    "pairs": ("pairs", ","),
    "pairs that could be made": ("possible_pairs", ","),
    "tokens": ("tokens", ","),
    "output tokens": ("output_tokens", ","),
    "mean output tokens": ("mean_length", ".1f"),
    "mean output tokens, right": ("mean_length_right", ".1f"),
    "mean output tokens, wrong": ("mean_length_wrong", ".1f"),
    "pairs with the longer side right": ("right_longer", ".1%"),
    "pairs with the shorter side right": ("right_shorter", ".1%"),
    "rollouts that were cut off": ("cut_off", ","),
    "problems whose rollouts all have one reward": ("problems_with_one_reward", ","),
    "mean reward": ("reward_mean", ".4g"),
    "standard deviation of the reward": ("reward_deviation", ".4g"),
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
        if key in summary[parts[0]]:
            table.add_row(title, *(f"{summary[part][key]:{style}}" for part in parts))
    display.console.print(table)
    print_rows(display, summary["rows"])
    if summary["truncated_prompts"]:
        kind = "pairs" if "pairs" in summary["train"] else "rollouts"
        display.line(f"cut the beginning of the prompt: {summary['truncated_prompts']:,} {kind}")
    for reason, number in summary["dropped"].items():
        display.line(f"dropped: {number:,} {reason}")


def print_rows(display: Display, rows: Mapping[str, Any]) -> None:
    """Say what was read, before anything was left out."""
    shapes = "; ".join(f"{number:,} of {shape}" for shape, number in rows["shapes"].items())
    display.line(f"rows: {shapes}")
    display.line(
        f"read: {rows['rollouts']:,} answers to {rows['problems']:,} problems, {rows['cut_off']:,} of them cut off; "
        f"{rows['problems_with_one_reward']:,} problems have answers of one reward only"
    )
    if rows["lost_special_tokens"]:
        display.line(
            f"warning: {rows['lost_special_tokens']:,} text prompts read like chats that lost their special tokens, so "
            "that the critic sees other tokens than the policy did: prompt_ids and completion_ids are better"
        )
    counts, quartiles = rows["reward_counts"], rows["reward_quartiles"]
    if counts is not None:
        told = ", ".join(f"{reward:g} ({count:,} answers)" for reward, count in counts)
    else:
        told = "from {:g} to {:g}, quartiles {:g}, {:g}, {:g}".format(*quartiles[::4], *quartiles[1:4])
    display.line(f"rewards: mean {rows['reward_mean']:.4g}, deviation {rows['reward_deviation']:.4g}; {told}")


def print_results(display: Display, results: Mapping[str, Any]) -> None:
    """Print the final table: each checkpoint on validation and on training pairs, then the baselines."""
    display.line(results["title"])
    table = Table()
    table.add_column("")
    for name, measured in results["checkpoints"].items():
        for part in ("validation", "train pairs" if "pairs" in results["data"]["train"] else "train rollouts"):
            table.add_column(f"{name} (step {measured['step']})\n{part}", justify="right")
    metrics = [measured["metrics"] for measured in results["checkpoints"].values()]
    for title, key in ROWS.items():
        style = ".4f" if "accuracy" in key else ".4g"  # margins and variances can be tiny
        numbers = [m.get(f"{part}/{key}") for m in metrics for part in ("validation", "train_subset")]
        if any(number is not None for number in numbers):
            table.add_row(title, *("" if number is None else f"{number:{style}}" for number in numbers))
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
    keys = ("validation/length_shortest", "validation/length_longest")  # not there where nothing can be ranked
    ends = zip(*(measured.get(key, []) for key in keys), strict=True)
    return [f"{low:.0f} to {high:.0f} tokens" for low, high in ends]
