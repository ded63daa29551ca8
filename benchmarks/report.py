"""Tables and plots from the CSV files of cpu.py. Measures nothing.

python benchmarks/report.py          # from benchmarks/results, into it and into the pages that quote it

Nothing but the CSV files decides what is written.
"""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

OURS = ("lambda_return", "loss forward", "loss backward")
ASSOCIATIVE_SCAN, CUMSUM = "torch.compile of associative_scan", "torch-discounted-cumsum"
MSE = "F.mse_loss forward + backward"
COPY = "copy, 9 bytes a token"  # of float32
# The floors, as many bytes in all. The forward of a loss writes nothing of size [B, T].
COPIES = dict(zip(OURS, ("copy into a new tensor", "copy in place", "copy into a new tensor"), strict=True))
HALVES = ("bfloat16", "float16")
# Colours that stay apart for colour-blind readers (Okabe and Ito), and with them markers.
STYLES = {
    "lambda_return": {"color": "#0072B2", "marker": "o", "lw": 2.4},
    "loss forward": {"color": "#56B4E9", "marker": "s", "lw": 1.4},
    "loss backward": {"color": "#56B4E9", "marker": "^", "lw": 1.4, "ls": "--"},
    "rlax lambda_returns, jit + vmap": {"color": "#009E73", "marker": "D"},
    "numba loop, as in tianshou": {"color": "#E69F00", "marker": "v"},
    CUMSUM: {"color": "#D55E00", "marker": "P"},
    ASSOCIATIVE_SCAN: {"color": "#CC79A7", "marker": "X"},
    "torch.compile of log2-doubling": {"color": "#7A7A7A", "marker": "<", "ls": ":"},
}
# The shapes that the goals are about.
MAIN_SHAPES = (("64", "1024"), ("16", "8192"), ("512", "256"))
MEMORY_SHAPES = (("512", "8192"), ("64", "131072"), ("1", "1048576"))
Row = dict[str, str]


def read(folder: Path, name: str) -> list[Row]:
    """The rows of one scenario, none where it was not run."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The timed rows with these columns."""
    return [row for row in rows if row["min_us"] and all(row[key] == value for key, value in wanted.items())]


def one(rows: Iterable[Row], **wanted: str) -> Row | None:
    """The only row with these columns, or None."""
    return next(iter(select(rows, **wanted)), None)


def distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """What these columns hold together, in the order of the rows."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def micros(row: Row | None) -> float:
    """Minimum time in microseconds; NaN where there is none."""
    return float(row["min_us"]) if row else math.nan


def median(row: Row | None) -> float:
    """Median time in microseconds; NaN where there is none."""
    return float(row["median_us"]) if row else math.nan


def digits(x: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".")


def in_milliseconds(micros: float) -> str:
    """Milliseconds, as `digits` has them."""
    return digits(micros / 1000)


def median_of_copy(rows: list[Row], name: str, **case: str) -> float:
    """The median of one of ours as a multiple of that of its floor; NaN where either was not timed."""
    row = one(rows, contestant=name, **case)
    return median(row) / median(one(rows, contestant=row["floor"], **case)) if row else math.nan


def caption(rows: Sequence[Row]) -> str:
    """What the rows were measured on."""
    row = rows[0]
    return (
        f"{row['machine']}, {row['cores']} cores, {row['instruction_set']}, torch {row['torch']}, "
        f"Python {row['python']}, commit {row['commit']}"
    )


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


# ---- tables ------------------------------------------------------------------------------------------------------


def peers_table(rows: list[Row], medians: bool) -> str:
    """Milliseconds of every way to the same targets and, in brackets, how many times that of lambda_return it is."""
    cases = distinct(rows, "mask", "B", "T")

    def cells(name: str) -> list[str]:
        found = []
        for mask, B, T in cases:
            row = one(rows, contestant=name, mask=mask, B=B, T=T)
            middle = f" / {in_milliseconds(median(row))}" if row and medians else ""
            ratio = f" ({digits(float(row['times_lambda_return']))}x)" if row and row["times_lambda_return"] else ""
            found.append(f"{in_milliseconds(micros(row))}{middle}{ratio}" if row else "-")
        return found

    def slowness(name: str) -> float:
        return max(micros(row) for row in select(rows, contestant=name))

    names = [name for (name,) in distinct(select(rows), "contestant") if name not in OURS[1:] and "copy" not in name]
    lines = []
    for name in sorted(names, key=slowness, reverse=True):
        version = select(rows, contestant=name)[0]["version"]
        title = f"**{name}** ({version})" if name == OURS[0] else f"{name} ({version})"
        lines.append([title, *cells(name)])
    lines.append(["copy of the 9 bytes a token that a return moves", *cells(COPY)])
    masks = {"dense": "", "gaps": "gaps "}
    text = table(["milliseconds", *(f"{masks[mask]}{B} x {T}" for mask, B, T in cases)], lines)
    missing = dict.fromkeys(f"{row['contestant']}: {row['status']}." for row in rows if row["status"] != "ok")
    return text + ("\n" + " ".join(missing) + "\n" if missing else "")


def memory_table(rows: list[Row]) -> str:
    """Medians of the operators beside copies, in milliseconds and in brackets as multiples of their own floor."""
    lines = []
    for mask, B, T, threads in distinct(rows, "mask", "B", "T", "threads"):
        case = {"mask": mask, "B": B, "T": T, "threads": threads}
        names = (COPY, "copy in place, 9 bytes a token", *OURS)
        times = [in_milliseconds(median(one(rows, contestant=name, **case))) for name in names]
        ratios = ["", "", *(f" ({median_of_copy(rows, name, **case):.2f}x)" for name in OURS)]
        cells = [time + ratio for time, ratio in zip(times, ratios, strict=True)]
        lines.append([f"{int(B):,} x {int(T):,}", mask, threads, *cells])
    return table(["B x T", "mask", "threads", "copy, 9 bytes", "in place", *OURS], lines)


def dtypes_table(rows: list[Row]) -> str:
    """The operators in every dtype, nanoseconds a token and in brackets multiples of the copy of as many bytes."""
    lines = []
    for B, T, dtype, mask in distinct(rows, "B", "T", "dtype", "mask"):
        here = {row["contestant"]: row for row in select(rows, B=B, T=T, dtype=dtype, mask=mask)}
        tokens = int(B) * int(T)
        cells = [f"{micros(here[x]) * 1000 / tokens:.3f} ({float(here[x]['times_copy']):.2f}x)" for x in OURS]
        lines.append([f"{int(B):,} x {int(T):,}", dtype, mask, *cells])
    return table(["B x T", "dtype", "mask", *OURS], lines)


def overhead_table(rows: list[Row]) -> str:
    """Microseconds of a call on 8 tokens."""
    return table(
        ["1 x 8, microseconds", "minimum", "median"],
        [[row["contestant"], f"{micros(row):.1f}", f"{median(row):.1f}"] for row in select(rows)],
    )


def classification_table(rows: list[Row]) -> str:
    """Nanoseconds a token."""
    cases = [
        ("classification: " + target, dtype) for target in ("hl_gauss", "two_hot") for dtype in ("float32", "bfloat16")
    ]
    lines = []
    for name in ("fused, forward", "composed, forward", "fused, forward + backward", "composed, forward + backward"):
        found = [one(rows, contestant=name, scenario=scenario, dtype=dtype) for scenario, dtype in cases]
        lines.append([name, *(digits(1e3 * micros(row) / (int(row["B"]) * int(row["T"]))) for row in found if row)])
    return table(["51 logits, nanoseconds a token", *(f"{case[0][16:]} {case[1]}" for case in cases)], lines)


def general_table(rows: list[Row]) -> str:
    """Microseconds, in brackets of ours multiples of the plain operator, of what is composed multiples of ours."""
    shapes = distinct(rows, "B", "T")
    lines, slower = [], []
    for name in (name for (name,) in distinct(rows, "contestant") if not name.startswith("composed: ")):
        _option, _, passes = name.partition(", ")
        cells = []
        for B, T in shapes:
            times = {row["contestant"]: micros(row) for row in select(rows, B=B, T=T)}
            composed = f"composed: {name}"
            for way, base in ((name, f"mse, {passes}" if passes else OURS[0]), (composed, name)):
                ratio = f" ({times[way] / times[base]:.2f}x)" if way in times and way != base else ""
                cells.append(f"{digits(times[way])}{ratio}" if way in times else "-")
            if times.get(composed, math.inf) < times[name]:
                slower.append(f"{name} ({int(B):,} x {int(T):,})")
        lines.append([name, *cells])
    header = (f"{prefix}{int(B):,} x {int(T):,}" for B, T in shapes for prefix in ("", "composed, "))
    text = table(["microseconds", *header], lines)
    return text + (f"\nSlower than what is composed: {'; '.join(slower)}.\n" if slower else "")


# ---- goals -------------------------------------------------------------------------------------------------------


def goals(folder: Path) -> list[tuple[str, str, float, str]]:
    """The goals on one machine: what, where, measured, and "met", "missed" or why it does not apply."""
    found: list[tuple[str, str, float, str]] = []

    def add(what: str, where: str, measured: float, met: bool) -> None:
        if not math.isnan(measured):
            found.append((what, where, measured, "met" if met else "missed"))

    rows = [row for row in read(folder, "peers") if (row["B"], row["T"]) in MAIN_SHAPES]
    for mask, B, T in distinct(rows, "mask", "B", "T"):
        case = {"B": B, "T": T}
        ours = micros(one(rows, contestant=OURS[0], mask=mask, **case))
        # The package knows no gaps: its time without them is what there is to compare with.
        cumsum = micros(one(rows, contestant=CUMSUM, mask="dense", **case)) / ours
        add(f"{CUMSUM} / lambda_return >= 7", f"{B} x {T} {mask}", cumsum, cumsum >= 7)
        scan = micros(one(rows, contestant=ASSOCIATIVE_SCAN, mask=mask, **case)) / ours
        add(f"{ASSOCIATIVE_SCAN} / lambda_return >= 15", f"{B} x {T} {mask}", scan, scan >= 15)
    memory = [row for row in read(folder, "memory") if (row["B"], row["T"]) in MEMORY_SHAPES]
    for there, time in ((rows, micros), (memory, median)):
        for mask, B, T in distinct(there, "mask", "B", "T"):
            case = {"mask": mask, "B": B, "T": T, "threads": "1"}
            ours = time(one(there, contestant=OURS[0], **case))
            for name, limit in (("loss forward", 1.0), ("loss backward", 1.25)):
                ratio = time(one(there, contestant=name, **case)) / ours
                add(f"{name} / lambda_return <= {limit}", f"{B} x {T} {mask}", ratio, ratio <= limit)
    for mask, B, T in distinct(memory, "mask", "B", "T"):
        case = {"mask": mask, "B": B, "T": T}
        where = f"{B} x {T} {mask}"
        for name in OURS:
            if int(B) > 1:
                ratio = median_of_copy(memory, name, threads="1", **case)
                add(f"out of cache: {name} / {COPIES[name]} <= 1.25, one thread", where, ratio, ratio <= 1.25)
            else:
                ratio = median_of_copy(memory, name, threads="2", **case)
                add(f"one long row: {name} / {COPIES[name]} <= 1.6, two threads", where, ratio, ratio <= 1.6)
        gains = []
        for name in (OURS[0], COPY):
            one_thread, two = (median(one(memory, contestant=name, threads=n, **case)) for n in "12")
            gains.append(one_thread / two)
        add("two threads / one >= 1.7 in speed", where, gains[0], gains[0] >= 1.7)
        if found and found[-1][3] == "missed" and gains[1] < 1.7:
            found[-1] = (*found[-1][:3], f"does not apply: the copy gains {gains[1]:.2f}")
    halves = [row for row in read(folder, "dtypes") if row["dtype"] in HALVES and (row["B"], row["T"]) in MEMORY_SHAPES]
    for B, T, dtype, mask in distinct(halves, "B", "T", "dtype", "mask"):
        for name in OURS:
            ratio = median_of_copy(halves, name, B=B, T=T, dtype=dtype, mask=mask)
            what = f"out of cache: {name} / {COPIES[name]} <= 1.25, one thread"
            add(what, f"{B} x {T} {mask} {dtype}", ratio, ratio <= 1.25)
    rows = read(folder, "overhead")
    for name in (OURS[0], "torch.ops.lambda_return.lambda_return", "loss forward"):
        call = micros(one(rows, contestant=name))
        add("call without gradient <= 8 us", f"{name}, 1 x 8", call, call <= 8)
    ratio = micros(one(rows, contestant="loss forward + backward")) / micros(one(rows, contestant=MSE))
    add(f"loss forward + backward / {MSE} <= 1.3", "1 x 8", ratio, ratio <= 1.3)
    return found


# ---- plots -------------------------------------------------------------------------------------------------------


def _finish(figure: Figure, path: Path, rows: Sequence[Row], what: str) -> None:
    versions = [row["version"] for row in rows if row["version"] and not row["version"].startswith("torch ")]
    listed = ", ".join(dict.fromkeys(part for version in versions for part in version.split(", ")))
    text = f"{what}. {caption(rows)}\n{listed}"
    figure.supxlabel(text, fontsize=7.5, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(which="major", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)


def plot_tokens(rows: list[Row], path: Path) -> None:
    """Time against tokens, both on log scales, with the copy as the floor."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    titles = {"tokens: columns": "16 rows, longer and longer", "tokens: rows": "1,024 tokens a row, more and more rows"}
    for axis, (scenario, title) in zip(axes, titles.items(), strict=True):
        here = select(rows, scenario=scenario)
        floor = sorted((int(row["B"]) * int(row["T"]), micros(row)) for row in select(here, contestant=COPY))
        axis.fill_between(*zip(*floor, strict=True), 0.1, color="#999999", alpha=0.25, lw=0)
        axis.plot(*zip(*floor, strict=True), color="#333333", lw=1.6, label="copy of the same bytes (9 a token)")
        for name, style in STYLES.items():
            points = sorted((int(row["B"]) * int(row["T"]), micros(row)) for row in select(here, contestant=name))
            if points:
                axis.plot(*zip(*points, strict=True), label=name, ms=5, **style)
        axis.set(title=title, xlabel="tokens (B x T)", xscale="log", yscale="log", ylim=(0.8, None))
        _tidy(axis)
    axes[0].set_ylabel("microseconds a call, minimum")
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -handles[i].get_ydata()[-1] / handles[i].get_xdata()[-1])
    axes[0].legend([handles[i] for i in order], [labels[i] for i in order], fontsize=8, frameon=False)
    what = "float32, every token valid, one thread, gamma 1, lambda 0.95"
    _finish(figure, path, rows, what)


def plot_peers(rows: list[Row], path: Path) -> None:
    """How many times the time of lambda_return every other way takes."""
    masks = {"dense": "every token valid", "gaps": "with gaps (70 % valid, at random)"}
    counts = []
    for mask in masks:
        names = distinct(select(rows, mask=mask), "contestant")
        counts.append([name for (name,) in names if name not in OURS and "copy" not in name])
    tall = 1.2 + 0.42 * max(map(len, counts))
    figure, axes = plt.subplots(1, 2, figsize=(12, tall + 1.1), layout="constrained", sharex=True)
    shades = ("#08306b", "#2a7ab9", "#8ec1e8")
    for axis, names, (mask, title) in zip(axes, counts, masks.items(), strict=True):
        ratios = {name: [float(row["times_lambda_return"]) for row in select(rows, contestant=name)] for name in names}
        names = sorted(names, key=lambda name: max(ratios[name]))
        shapes = distinct(select(rows, mask=mask), "B", "T")
        for i, (B, T) in enumerate(shapes):
            ours = one(rows, contestant=OURS[0], mask=mask, B=B, T=T)
            label = f"{B} x {T}: lambda_return {in_milliseconds(micros(ours))} ms"
            for place, name in enumerate(names):
                row = one(rows, contestant=name, mask=mask, B=B, T=T)
                if row is None:
                    continue
                ratio, y = float(row["times_lambda_return"]), place + 0.27 * (1 - i)
                axis.barh(y, ratio - 1, 0.25, left=1, color=shades[i % 3], label=label if place == 0 else None)
                axis.text(ratio * 1.08, y, digits(ratio), va="center", fontsize=6.5)
        versions = [select(rows, contestant=name)[0]["version"].split(", ")[0] for name in names]
        ticks = [name if name.startswith(v.split()[0]) else f"{name}" for name, v in zip(names, versions, strict=True)]
        axis.set_yticks(range(len(names)), [f"{n}\n({v})" for n, v in zip(ticks, versions, strict=True)], fontsize=7.5)
        axis.set(title=title, xscale="log", xlabel="times as long as lambda_return")
        axis.set_xlim(1, 2.5 * max(max(ratios[name]) for name in names))
        axis.legend(fontsize=7.5, loc="lower right", frameon=False)
        _tidy(axis)
        axis.grid(axis="y", lw=0)
    _finish(figure, path, rows, "float32, one thread, gamma 1, lambda 0.95, minimum of many batches of calls")


def plot_density(rows: list[Row], path: Path) -> None:
    """Time a token against the share of valid tokens."""
    shapes = distinct(rows, "B", "T")
    colors = dict(zip(OURS, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    figure, axes = plt.subplots(1, len(shapes), figsize=(11, 4.6), layout="constrained", squeeze=False)
    for axis, (B, T) in zip(axes[0], shapes, strict=True):
        tokens = int(B) * int(T)
        for name in OURS:
            for mask, dash in (("gaps", "-"), ("runs", ":")):
                here = select(rows, contestant=name, mask=mask, B=B, T=T)
                points = sorted((float(row["density"]), micros(row) * 1000 / tokens) for row in here)
                style = {**STYLES[name], "color": colors[name], "ls": dash, "lw": 1.6}
                title = {"gaps": "at random", "runs": "in runs of 64"}[mask]
                axis.plot(*zip(*points, strict=True), label=f"{name}, {title}", ms=4, **style)
        copies = [micros(row) * 1000 / tokens for row in select(rows, contestant=COPY, B=B, T=T)]
        axis.axhline(min(copies), color="#333333", lw=1.2)
        axis.text(0.5, 0.97 * min(copies), "copy, 9 bytes a token", va="top", ha="center", fontsize=8)
        axis.set(title=f"{int(B):,} x {int(T):,}", xlabel="share of valid tokens", ylim=(0, None), xlim=(0, 1.02))
        _tidy(axis)
    axes[0][0].set_ylabel("nanoseconds a token, minimum")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=len(OURS))
    _finish(figure, path, rows, "float32, one thread, gamma 1, lambda 0.95")


# ---- pages -------------------------------------------------------------------------------------------------------


def sections(folder: Path) -> dict[str, str]:
    """Markdown by name, of what was measured."""
    makers = {
        "memory": ("memory", memory_table),
        "dtypes": ("dtypes", dtypes_table),
        "overhead": ("overhead", overhead_table),
        "classification": ("classification", classification_table),
        "general": ("general", general_table),
        "peers": ("peers", lambda rows: peers_table(rows, medians=False)),
        "peers with medians": ("peers", lambda rows: peers_table(rows, medians=True)),
    }
    found = {}
    for name, (scenario, make) in makers.items():
        if rows := read(folder, scenario):
            found[name] = f"{caption(rows)}.\n\n{make(rows)}"
    if measured := goals(folder):
        lines = [[what, where, digits(number), verdict] for what, where, number, verdict in measured]
        met = sum(verdict == "met" for *_, verdict in measured)
        missed = sum(verdict == "missed" for *_, verdict in measured)
        found["goals"] = f"{met} met, {missed} missed.\n\n" + table(["goal", "where", "measured", ""], lines)
    return found


def write(folder: Path) -> None:
    """Write cpu.md and the plots into the folder of the CSV files, and print the goals."""
    text = sections(folder)
    page = "# CPU benchmarks\n\nWritten by `make bench`; times are minima, after a slash medians.\n"
    titles = {
        "goals": "Goals",
        "peers with medians": "Against other ways to the same targets, one thread",
        "memory": "Against copies, median milliseconds",
        "dtypes": "By dtype, nanoseconds a token, one thread",
        "overhead": "Overhead of a call",
        "classification": "Classification against the returns, one thread",
        "general": "By options, one thread",
    }
    for name, title in titles.items():
        if name in text:
            page += f"\n## {title}\n\n{text[name]}"
    (folder / "cpu.md").write_text(page)
    for name, plot in (("tokens", plot_tokens), ("peers", plot_peers), ("density", plot_density)):
        if rows := read(folder, name):
            plot(rows, folder / f"{name}.png")
    for what, where, number, verdict in goals(folder):
        print(f"{verdict.upper() if verdict == 'missed' else verdict:8} {number:8.3g}  {what}: {where}")
    print(f"tables and plots: {folder}")


def update(page: str, text: dict[str, str]) -> str:
    """Put tables between the markers ``<!-- benchmark NAME -->`` and ``<!-- end -->`` of a page."""

    def replaced(match: re.Match[str]) -> str:
        found = text.get(match[1])
        return match[0] if found is None else f"<!-- benchmark {match[1]} -->\n{found}<!-- end -->"

    return re.sub(r"<!-- benchmark ([a-z ]+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def update_pages(folder: Path) -> None:
    """Refresh the tables in the README and in docs/performance.md."""
    text = sections(folder)
    for path in PAGES:
        page = path.read_text()
        if (new := update(page, text)) != page:
            path.with_suffix(".tmp").write_text(new)
            path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    write(RESULTS)
    update_pages(RESULTS)
