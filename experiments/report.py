"""The CSV files, the plots and the page, from the results of the runs."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.stats import by_problem, differences, interval
from lambda_return_ext.critic.checkpoint import atomic_path, write_text

Run = Mapping[str, Any]
REFERENCE = {"lambda_linear": "mc_linear", "lambda_block": "mc_block"}  # each against Monte-Carlo with its own head
# What the recipe's parts do: the first minus the second, and what that leaves.
CONTRASTS = (
    ("lambda", "mc_bias", "λ-return and warm-up, from the same first prediction"),
    ("mc_bias", "mc", "first prediction of 0.5, Monte-Carlo"),
    ("lambda", "lambda_no_bias", "first prediction of 0.5, λ-return"),
    ("lambda", "lambda_no_warmup", "warm-up on the last token"),
    ("lambda_no_warmup", "mc_bias", "λ-return alone"),
)
COMMAND = "make experiment"


class Table(NamedTuple):
    """Rows of a CSV file, which the page shows too."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def csv(self) -> str:
        """As the text of a CSV file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()

    def markdown(self) -> str:
        """As a table of the page."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def read_runs(folder: Path) -> list[Run]:
    """The results of all finished runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def select(runs: Sequence[Run], data_set: str, regime: str, contestant: str) -> list[Run]:
    """The runs of one contestant, by seed."""
    chosen = [
        run for run in runs if (run["data_set"], run["regime"], run["contestant"]) == (data_set, regime, contestant)
    ]
    return sorted(chosen, key=lambda run: run["seed"])


def cells(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """What there are runs of, in the order of data sets, regimes and names; the two main contestants first."""
    found = {(run["data_set"], run["regime"], run["contestant"]) for run in runs}
    sets, first = ("rollouts", "hard", "mutants"), ("mc", "lambda")
    return sorted(found, key=lambda c: (sets.index(c[0]), c[1] != "small", c[2] not in first, c[2] != "mc", c[2]))


def mean_of(runs: Sequence[Run], key: str, check: int = -1) -> float:
    """The mean over seeds of a number of the trace."""
    return sum(run["trace"][check][key] for run in runs) / len(runs)


def per_run(runs: Sequence[Run]) -> Table:
    """One row a run."""
    traced = [
        f"{part}_{name}"
        for part in ("validation", "train")
        for name in (
            "pairwise_accuracy",
            "last_token_accuracy",
            "margin",
            "token_variance_right",
            "token_variance_wrong",
        )
    ]
    columns = ("data_set", "regime", "contestant", "seed", "train_problems", "train_pairs", "validation_pairs")
    rows = [
        (
            *(run[name] for name in columns),
            *(f"{run['trace'][-1][name]:.5f}" for name in traced),
            f"{run['trace'][0]['validation_mean']:.4f}",
            "" if run["warmup_gradient_elsewhere"] is None else run["warmup_gradient_elsewhere"],
            run["seconds"],
        )
        for run in runs
    ]
    return Table((*columns, *traced, "first_prediction", "warmup_gradient_elsewhere", "seconds"), rows)


def per_check(runs: Sequence[Run]) -> Table:
    """One row for each validation of each run."""
    names = ("step", "validation_pairwise_accuracy", "train_pairwise_accuracy", "validation_token_variance_right")
    rows = [
        (run["data_set"], run["regime"], run["contestant"], run["seed"], *(f"{row[name]:.5g}" for name in names))
        for run in runs
        for row in run["trace"]
    ]
    return Table(("data_set", "regime", "contestant", "seed", *names), rows)


def summary(runs: Sequence[Run], settings: Mapping[str, Any], part: str = "validation") -> Table:
    """One row a contestant: accuracy with its interval, and the paired difference from Monte-Carlo with its own."""
    how = settings["report"]["resamples"], settings["report"]["seed"]
    rows = []
    for cell in cells(runs):
        chosen = select(runs, *cell)
        if not all(run[part] for run in chosen):
            continue
        accuracy = interval([*by_problem([run[part] for run in chosen]).values()], *how)
        reference = REFERENCE.get(cell[2], "mc")
        other = {run["seed"]: run for run in select(runs, cell[0], cell[1], reference)}
        ours = [run for run in chosen if run["seed"] in other]
        gain: tuple[float, ...] = ()
        if cell[2] not in ("mc", *REFERENCE.values()) and ours:
            pairs = [run[part] for run in ours], [other[run["seed"]][part] for run in ours]
            gain = interval([*differences(*pairs).values()], *how)
        rows.append(
            (
                *cell,
                len(chosen),
                f"{mean_of(chosen, 'train_pairwise_accuracy'):.3f}",
                *(f"{number:.3f}" for number in accuracy),
                *((f"{number:+.3f}" for number in gain) if gain else ("", "", "")),
                f"{mean_of(chosen, 'validation_token_variance_right'):.4f}",
            )
        )
    columns = ("data_set", "regime", "contestant", "seeds", "train", part, "low", "high")
    return Table((*columns, "minus_mc", "minus_low", "minus_high", "token_variance"), rows)


def checklist(runs: Sequence[Run], settings: Mapping[str, Any]) -> Table:
    """The plan's claims, each as a number with its verdict, of every data set and regime."""
    how = settings["report"]["resamples"], settings["report"]["seed"]
    columns = ("data_set", "regime", "claim", "number", "verdict")
    rows: list[tuple[Any, ...]] = []
    for data_set, regime in dict.fromkeys(cell[:2] for cell in cells(runs)):
        ours, theirs = (select(runs, data_set, regime, name) for name in ("lambda", "mc"))
        if not ours or not theirs:
            continue
        checks = [row["step"] for row in ours[0]["trace"]]
        after = checks.index(settings["contestants"]["lambda"]["lambda_return"]["warmup_steps"])
        first = max((run["trace"][0]["validation_mean"] for run in ours), key=lambda value: abs(value - 0.5))
        elsewhere = max(run["warmup_gradient_elsewhere"] for run in ours)
        warm = mean_of(ours, "validation_pairwise_accuracy", after)  # over pairs; the primary figure is over problems
        last = interval([*by_problem([run["validation"] for run in ours]).values()], *how)[0]
        spread = [mean_of(ours, "validation_token_variance_right", check) for check in (after, -1)]
        spread_mc = mean_of(theirs, "validation_token_variance_right")
        seeds = {run["seed"] for run in ours} & {run["seed"] for run in theirs}
        pairs = [[run["validation"] for run in side if run["seed"] in seeds] for side in (ours, theirs)]
        gain, low, high = interval([*differences(*pairs).values()], *how)
        against = "better" if low > 0 else "worse" if high < 0 else "no difference"
        claims = [
            ("first prediction is 0.5", f"{first:.4f}", abs(first - 0.5) <= 0.01),
            ("largest gradient off the last token in warm-up is 0", f"{elsewhere:g}", elsewhere == 0),
            ("validation after warm-up ≥ 0.6", f"{warm:.3f}", warm >= 0.6),
            ("token variance rises after warm-up", f"{spread[0]:.4f} to {spread[1]:.4f}", spread[1] > spread[0]),
            ("token variance above that of MC", f"{spread[1]:.4f}, MC {spread_mc:.4f}", spread[1] > spread_mc),
            ("final validation ≥ 0.65", f"{last:.3f}", last >= 0.65),
        ]
        rows += [(data_set, regime, claim, number, "yes" if holds else "no") for claim, number, holds in claims]
        rows.append((data_set, regime, "final validation above MC", f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]", against))
    return Table(columns, rows)


def contrasts(runs: Sequence[Run], settings: Mapping[str, Any]) -> Table:
    """Paired differences between contestants that differ in one part of the recipe."""
    how = settings["report"]["resamples"], settings["report"]["seed"]
    rows: list[tuple[Any, ...]] = []
    for data_set, regime in dict.fromkeys(cell[:2] for cell in cells(runs)):
        for ours, theirs, meaning in CONTRASTS:
            sides = [{run["seed"]: run for run in select(runs, data_set, regime, name)} for name in (ours, theirs)]
            seeds = sorted(sides[0].keys() & sides[1].keys())
            if seeds:
                pairs = ([side[seed]["validation"] for seed in seeds] for side in sides)
                found = interval([*differences(*pairs).values()], *how)
                rows.append(
                    (
                        data_set,
                        regime,
                        f"{ours} - {theirs}",
                        meaning,
                        len(seeds),
                        *(f"{number:+.3f}" for number in found),
                    )
                )
    return Table(("data_set", "regime", "contrast", "what it isolates", "seeds", "difference", "low", "high"), rows)


def baselines(runs: Sequence[Run], facts: Mapping[str, Any]) -> Table:
    """What needs no training: length for every data set, likelihood for the rollouts."""
    rows: list[tuple[Any, ...]] = []
    for data_set, regime in dict.fromkeys(cell[:2] for cell in cells(runs)):
        chosen = select(runs, data_set, regime, "mc")
        rows.append((data_set, regime, "length", f"{sum(run['length'] for run in chosen) / len(chosen):.3f}"))
    likely = by_problem([facts["likelihood"]])
    rows.append(
        ("rollouts", f"{len(likely)} problems", "likelihood per token", f"{sum(likely.values()) / len(likely):.3f}")
    )
    return Table(("data_set", "regime", "baseline", "pairwise_accuracy"), rows)


def plot_differences(table: Table, path: Path) -> None:
    """The paired difference from Monte-Carlo of every contestant, with its interval."""
    plt = _pyplot()
    rows = [row for row in table.rows if row[8]]
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.27 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        mean, low, high = (float(cell) for cell in row[8:11])
        color = "C0" if row[1] == "small" else "C1"
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", markersize=5, color=color, capsize=3)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{row[2]}, {row[0]} ({row[1]})" for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("validation pairwise accuracy minus that of Monte-Carlo with the same head")
    axis.set_title("95 % intervals; blue: 60 problems, orange: more", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Accuracy on training and validation, and token variance, over the steps: the mean over seeds."""
    plt = _pyplot()
    places = list(dict.fromkeys(cell[:2] for cell in cells(runs)))
    figure, axes = plt.subplots(2, len(places), figsize=(3.1 * len(places), 6), layout="constrained", squeeze=False)
    for column, (data_set, regime) in enumerate(places):
        for color, name in (("C3", "mc"), ("C0", "lambda")):
            chosen = select(runs, data_set, regime, name)
            steps = [row["step"] for row in chosen[0]["trace"]][1:]  # before the first, all pairs are tied or chance

            def curve(key: str, chosen: Sequence[Run] = chosen, steps: Sequence[int] = steps) -> list[float]:
                return [mean_of(chosen, key, i + 1) for i in range(len(steps))]

            axes[0, column].plot(
                steps, curve("validation_pairwise_accuracy"), "o-", color=color, label=f"{name}, validation"
            )
            axes[0, column].plot(steps, curve("train_pairwise_accuracy"), ":", color=color, label=f"{name}, training")
            axes[1, column].plot(steps, curve("validation_token_variance_right"), "o-", color=color, label=name)
        axes[0, column].set(title=f"{data_set}, {regime}", ylim=(0.4, 1.0))
        axes[1, column].set_xlabel("step")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("pairwise accuracy")
    axes[1, 0].set_ylabel("variance of V over tokens, right solutions")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    _pyplot().close(figure)


def five_lines(table: Table, checks: Table, parts: Table) -> list[str]:
    """What came out, in words that follow from the numbers."""
    main = [row for row in table.rows if row[2] == "lambda"]
    better = [f"{row[0]} ({row[1]})" for row in main if float(row[9]) > 0]
    worse = [f"{row[0]} ({row[1]})" for row in main if float(row[10]) < 0]
    listed = "; ".join(f"{row[0]} ({row[1]}) {row[8]} [{row[9]}, {row[10]}]" for row in main)
    same = [row for row in parts.rows if row[2] == "lambda - mc_bias"]
    isolated = "; ".join(f"{row[0]} ({row[1]}) {row[5]} [{row[6]}, {row[7]}]" for row in same)
    overfit = "; ".join(
        f"{row[0]} ({row[1]}) {row[2]} {row[4]} to {row[5]}" for row in table.rows if row[2] in ("mc", "lambda")
    )
    held = [row for row in checks.rows if row[4] in ("yes", "better")]
    found = "on " + ", ".join(better) if better else "nowhere"
    return [
        f"The plan's λ recipe ranks validation pairs better than Monte-Carlo {found}, and worse "
        f"{'on ' + ', '.join(worse) if worse else 'nowhere'}; elsewhere the interval holds 0.",
        f"λ minus Monte-Carlo, with 95 % intervals over problems: {listed}.",
        f"Training to validation accuracy at the last step: {overfit}.",
        f"λ minus Monte-Carlo from the same first prediction of 0.5: {isolated or 'not run'}.",
        f"Of the plan's checklist, {len(held)} of {len(checks.rows)} rows hold.",
    ]


def write_report(settings: Mapping[str, Any]) -> None:
    """Write the CSV files, the plots and the page."""
    folder, results = Path(settings["folder"]), Path(settings["results"])
    figures = Path(settings["report"]["figures"])
    results.mkdir(parents=True, exist_ok=True)
    page = Path(settings["report"]["page"])
    runs = read_runs(folder / "runs")
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    table, checks = summary(runs, settings), checklist(runs, settings)
    sets = Table(tuple(facts["sets"][0]), [tuple(each.values()) for each in facts["sets"]])
    tables = {
        "summary": table,
        "checklist": checks,
        "contrasts": contrasts(runs, settings),
        "human_eval": summary(runs, settings, "human_eval"),
        "baselines": baselines(runs, facts),
        "data_sets": sets,
        "runs": per_run(runs),
        "checks": per_check(runs),
    }
    for name, each in tables.items():
        write_text(results / f"{name}.csv", each.csv())
    plot_differences(table, figures / "evidence_differences.png")
    plot_curves(runs, figures / "evidence_curves.png")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, page_text(settings, runs, tables))


def page_text(settings: Mapping[str, Any], runs: Sequence[Run], tables: Mapping[str, Table]) -> str:
    """The page."""
    protocol = Path(__file__).with_name("protocol.md").read_text(encoding="utf-8").partition("\n\n")[2]
    notes = Path(__file__).with_name("notes.md")
    seconds = sum(run["seconds"] for run in runs)
    figures = "figures/" if settings["report"]["figures"] == "docs/figures" else ""
    parts = [
        "# Does the λ-return critic generalise better?",
        "*Generated by `make experiment` from the CSV files in "
        f"`{settings['results']}`; edit `experiments/`, not this page.*",
        "\n".join(
            f"{number}. {line}"
            for number, line in enumerate(five_lines(tables["summary"], tables["checklist"], tables["contrasts"]), 1)
        ),
        notes.read_text(encoding="utf-8").strip() if notes.exists() and figures else "",
        f"![Differences from Monte-Carlo]({figures}evidence_differences.png)",
        f"![Curves]({figures}evidence_curves.png)",
        "## Results at the last step",
        "Accuracy is the mean over problems, `low` and `high` the 95 % interval; `train` is the accuracy on training "
        "pairs, `token_variance` that of V within right validation solutions.",
        tables["summary"].markdown(),
        "## The plan's checklist",
        tables["checklist"].markdown(),
        "## Which part of the recipe",
        tables["contrasts"].markdown(),
        "## HumanEval, never trained on",
        tables["human_eval"].markdown(),
        "## Baselines",
        tables["baselines"].markdown(),
        "## The data sets",
        "`shared_prefix` is the share of the shorter solution's tokens that both sides begin with.",
        tables["data_sets"].markdown(),
        "## Protocol",
        protocol.strip(),
        "## To repeat it",
        f"`{COMMAND}`. {len(runs)} runs took {seconds / 60:.0f} minutes of one core in all, "
        f"{seconds / len(runs):.0f} s each, beside other work; {cpu_name()}, torch {torch.__version__}, one thread a "
        "process.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def cpu_name() -> str:
    """The processor, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
