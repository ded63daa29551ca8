"""The CSV files, the plots and the page, from the results of the runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.collect import Run, Table, read_runs, read_table
from experiments.settings import load_settings
from experiments.stats import Ranked, by_problem, differences, interval
from lambda_return_ext.critic.files import atomic_path, write_text

# Each against Monte-Carlo with its own head.
REFERENCE = {"lambda_linear": "mc_linear", "mc_bias_linear": "mc_linear", "lambda_block": "mc_block"}
# What the recipe's parts do: the first minus the second, and what that leaves.
CONTRASTS = (
    ("lambda", "mc_bias", "λ-return and warm-up, from the same first prediction"),
    ("mc_bias", "mc", "first prediction of 0.5, Monte-Carlo"),
    ("lambda", "lambda_no_bias", "first prediction of 0.5, λ-return"),
    ("lambda", "lambda_no_warmup", "warm-up on the last token"),
    ("lambda_no_warmup", "mc_bias", "λ-return alone"),
    ("lambda_linear", "mc_bias_linear", "λ-return and warm-up under a linear head"),
)


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
            ("validation after warm-up ≥ 0.6", f"{warm:.4f}", warm >= 0.6),
            ("token variance rises after warm-up", f"{spread[0]:.4f} to {spread[1]:.4f}", spread[1] > spread[0]),
            ("token variance above that of MC", f"{spread[1]:.4f}, MC {spread_mc:.4f}", spread[1] > spread_mc),
            ("final validation ≥ 0.65", f"{last:.4f}", last >= 0.65),
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


def baselines(runs: Sequence[Run], likelihood: Table) -> Table:
    """What needs no training: length for every data set, likelihood for the rollouts."""
    rows: list[tuple[Any, ...]] = []
    for data_set, regime in dict.fromkeys(cell[:2] for cell in cells(runs)):
        chosen = select(runs, data_set, regime, "mc")
        rows.append((data_set, regime, "length", f"{sum(run['length'] for run in chosen) / len(chosen):.3f}"))
    likely = [float(row[1]) for row in likelihood.rows]
    rows.append(("rollouts", f"{len(likely)} problems", "likelihood per token", f"{sum(likely) / len(likely):.3f}"))
    return Table(("data_set", "regime", "baseline", "pairwise_accuracy"), rows)


def families(runs: Sequence[Run], settings: Mapping[str, Any]) -> Table:
    """The rollouts family by family: accuracies, and what the recipe gains on both kinds of Monte-Carlo."""
    how = settings["report"]["resamples"], settings["report"]["seed"]
    rows: list[tuple[Any, ...]] = []
    for regime in dict.fromkeys(cell[1] for cell in cells(runs) if cell[0] == "rollouts"):
        sides = {name: select(runs, "rollouts", regime, name) for name in ("mc", "mc_bias", "lambda")}
        seeds = set.intersection(*({run["seed"] for run in side} for side in sides.values()))
        ranked = {name: [run["validation"] for run in side if run["seed"] in seeds] for name, side in sides.items()}
        for family in sorted({family_of(problem) for side in ranked["mc"] for problem in side}):
            ours = {name: [only(one, family) for one in side] for name, side in ranked.items()}
            means = {name: [*by_problem(side).values()] for name, side in ours.items()}
            gains = [interval([*differences(ours["lambda"], ours[name]).values()], *how) for name in ("mc", "mc_bias")]
            rows.append(
                (
                    *(regime, family, len(means["mc"])),
                    *(f"{sum(mean) / len(mean):.3f}" for mean in means.values()),
                    *(f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" for gain, low, high in gains),
                )
            )
    columns = ("regime", "family", "problems", "mc", "mc_bias", "lambda", "lambda - mc", "lambda - mc_bias")
    return Table(columns, rows)


def family_of(problem: str) -> str:
    """The name of a rollout's problem begins with its family."""
    return problem.partition(":")[0]


def only(ranked: Ranked, family: str) -> Ranked:
    """What was ranked of one family."""
    return {problem: pairs for problem, pairs in ranked.items() if family_of(problem) == family}


def plot_differences(table: Table, path: Path) -> None:
    """The paired difference from Monte-Carlo of every contestant, with its interval."""
    plt = _pyplot()
    rows = [row for row in table.rows if row[8]]
    figure, axis = plt.subplots(figsize=(8.5, 1.5 + 0.25 * len(rows)), layout="constrained")
    colors = {"small": "C0", "larger": "C1"}
    for height, row in enumerate(rows):
        mean, low, high = (float(cell) for cell in row[8:11])
        axis.errorbar(
            mean, height, xerr=[[mean - low], [high - mean]], fmt="o", markersize=5, color=colors[row[1]], capsize=3
        )
        if height and row[:2] != rows[height - 1][:2]:
            axis.axhline(height - 0.5, color="0.8", linewidth=1)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{row[2]}, {place(row)}" for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("pairwise accuracy on validation minus that of Monte-Carlo with the same head")
    axis.set_title("Differences from Monte-Carlo, 95 % intervals over problems", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Accuracy on training and validation, and token variance, over the steps: the mean over seeds."""
    plt = _pyplot()
    found = cells(runs)
    sets, regimes = (list(dict.fromkeys(cell[place] for cell in found)) for place in (0, 1))
    shape = 2 * len(regimes), len(sets)
    figure, axes = plt.subplots(
        *shape, figsize=(3.2 * shape[1], 2.4 * shape[0]), layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    for column, data_set in enumerate(sets):
        for row, regime in enumerate(regimes):
            above, below = axes[row, column], axes[len(regimes) + row, column]
            for color, name in (("C3", "mc"), ("C1", "mc_bias"), ("C0", "lambda")):
                chosen = select(runs, data_set, regime, name)
                if not chosen:
                    continue
                steps = [check["step"] for check in chosen[0]["trace"]][1:]  # at 0 all pairs are tied or chance

                def curve(key: str, chosen: Sequence[Run] = chosen, steps: Sequence[int] = steps) -> list[float]:
                    return [mean_of(chosen, key, i + 1) for i in range(len(steps))]

                above.plot(steps, curve("validation_pairwise_accuracy"), "o-", color=color, label=f"{name}, validation")
                above.plot(steps, curve("train_pairwise_accuracy"), ":", color=color, label=f"{name}, training")
                below.semilogy(steps, curve("validation_token_variance_right"), "o-", color=color, label=name)
            for axis in (above, below):
                axis.set_title(f"{data_set}, {regime}", fontsize=9)
                axis.grid(alpha=0.3)
            if column == 0:
                above.set_ylabel("pairwise accuracy", fontsize=8)
                below.set_ylabel("variance of V over tokens", fontsize=8)
        axes[-1, column].set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
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
    better = [place(row) for row in main if float(row[9]) > 0]
    worse = [place(row) for row in main if float(row[10]) < 0]
    against_mc = "; ".join(f"{place(row)} {row[8]} [{row[9]}, {row[10]}]" for row in main)
    same = [row for row in parts.rows if row[2] == "lambda - mc_bias"]
    gains = [place(row) for row in same if float(row[6]) > 0]
    losses = [place(row) for row in same if float(row[7]) < 0]
    isolated = "; ".join(f"{place(row)} {row[5]} [{row[6]}, {row[7]}]" for row in same)
    fits = {name: [row for row in table.rows if row[2] == name] for name in ("mc", "lambda")}
    gaps = {name: [float(row[4]) - float(row[5]) for row in rows] for name, rows in fits.items()}
    spread = {name: f"{min(each):.2f} to {max(each):.2f}" for name, each in gaps.items()}
    held = [row for row in checks.rows if row[4] in ("yes", "better")]
    claims = dict.fromkeys(row[2] for row in checks.rows)
    by_claim = "; ".join(f"{claim}: {sum(row[2] == claim for row in held)}" for claim in claims)
    return [
        f"The plan's λ recipe ranks validation pairs better than Monte-Carlo {on(better)}, and worse {on(worse)}; "
        f"elsewhere the 95 % interval holds 0: {against_mc}.",
        f"Against Monte-Carlo from the same first prediction of 0.5, which leaves λ and the warm-up, it is better "
        f"{on(gains)}, and worse {on(losses)}: {isolated or 'not run'}.",
        f"Memorising: training accuracy is above that of validation by {spread['mc']} with Monte-Carlo and by "
        f"{spread['lambda']} with the recipe, over data sets and regimes.",
        f"Of the plan's checklist {len(held)} of {len(checks.rows)} rows hold; of {len(main)} each, {by_claim}.",
        f"Hints from single comparisons are in the tables; each of {len(table.rows)} rows has its interval, and with "
        "so many some exclude 0 by chance.",
    ]


def place(row: Sequence[Any]) -> str:
    """A data set and a regime."""
    return f"{row[0]} ({row[1]})"


def on(places: Sequence[str]) -> str:
    """Where something holds."""
    return "on " + ", ".join(places) if places else "nowhere"


def derived(settings: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Table]:
    """The tables that follow from the runs."""
    return {
        "summary": summary(runs, settings),
        "checklist": checklist(runs, settings),
        "contrasts": contrasts(runs, settings),
        "families": families(runs, settings),
        "human_eval": summary(runs, settings, "human_eval"),
        "baselines": baselines(runs, read_table(settings, "likelihood")),
    }


def write_report(settings: Mapping[str, Any]) -> None:
    """Write the derived CSV files, the plots and the page, from the CSV files that `collect` wrote and nothing else."""
    figures, page = Path(settings["report"]["figures"]), Path(settings["report"]["page"])
    runs = read_runs(settings)
    tables = derived(settings, runs)
    for name, each in tables.items():
        write_text(Path(settings["results"]) / f"{name}.csv", each.csv())
    plot_differences(tables["summary"], figures / "evidence_differences.png")
    plot_curves(runs, figures / "evidence_curves.png")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, page_text(settings, runs, tables))
    rates = read_table(settings, "pass_rates")
    for row in rates.rows:
        named = dict(zip(rates.columns, row, strict=True))
        print(f"{named['family']}: right {named['of_judged']} of judged and {named['of_all']} of all answers", end="")
        print(", OUTSIDE the band of pass rates" if row[-1] != "yes" else "", flush=True)


def page_text(settings: Mapping[str, Any], runs: Sequence[Run], tables: Mapping[str, Table]) -> str:
    """The page."""
    here = Path(__file__)
    protocol = here.with_name("protocol.md").read_text(encoding="utf-8").partition("\n\n")[2]
    full = settings["results"] == "experiments/results"  # what the notes are about
    notes = here.with_name("notes.md").read_text(encoding="utf-8").strip() if full else ""
    seconds = sum(run["seconds"] for run in runs)
    figures = os.path.relpath(settings["report"]["figures"], Path(settings["report"]["page"]).parent)
    low, high = settings["rollouts"]["pass_rate"]
    parts = [
        "# Does the λ-return critic generalise better?",
        f"*Generated from the CSV files in `{settings['results']}` by `python -m experiments.report`, the last step of "
        "`make experiment`; edit `experiments/`, not this page.*",
        "\n".join(
            f"{number}. {line}"
            for number, line in enumerate(five_lines(tables["summary"], tables["checklist"], tables["contrasts"]), 1)
        ),
        notes,
        f"![Differences from Monte-Carlo]({figures}/evidence_differences.png)",
        f"![Curves]({figures}/evidence_curves.png)",
        "## Results at the last step",
        "Accuracy is the mean over problems, `low` and `high` the 95 % interval; `train` is the accuracy on training "
        "pairs, `token_variance` that of V within right validation solutions. `minus_mc` is the paired difference from "
        "Monte-Carlo with the same head.",
        tables["summary"].markdown(),
        "## The plan's checklist",
        tables["checklist"].markdown(),
        "## Which part of the recipe",
        tables["contrasts"].markdown(),
        "## The rollouts by family",
        tables["families"].markdown(),
        f"Rates of right answers, of those that were judged and of all; {low:g} to {high:g} is what was demanded. "
        "Only problems with both kinds of answers can give pairs.",
        read_table(settings, "pass_rates").markdown(),
        "## HumanEval, never trained on",
        tables["human_eval"].markdown(),
        "## Baselines",
        tables["baselines"].markdown(),
        "## The data sets",
        "`shared_prefix` is the share of the shorter solution's tokens that both sides begin with.",
        read_table(settings, "data_sets").markdown(),
        "## Protocol",
        protocol.strip(),
        "## To repeat it",
        "`make experiment`, from nothing; `make experiment QUICK=1` for a small version; "
        "`python -m experiments.report` makes this page again from the CSV files. Wall time of the stages:",
        read_table(settings, "times").markdown(),
        f"The {len(runs)} runs took {seconds / 60:.0f} minutes in all, {seconds / len(runs):.0f} s each on the mean, "
        "two at a time with one thread each.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Write the report again."""
    parser = argparse.ArgumentParser(description=write_report.__doc__)
    parser.add_argument("--quick", action="store_true", help="that of the small version")
    write_report(load_settings(parser.parse_args().quick))


if __name__ == "__main__":
    main()
