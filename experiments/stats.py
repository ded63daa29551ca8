"""Means over problems, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Ranked = Mapping[str, Sequence[float]]  # of each problem, for each of its pairs, 1 where it is ranked right


def by_problem(runs: Sequence[Ranked]) -> dict[str, float]:
    """The accuracy of each problem, averaged over the runs (seeds) that measured it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for problem, ranked in run.items():
            found.setdefault(problem, []).append(float(np.mean(ranked)))
    return {problem: float(np.mean(values)) for problem, values in found.items()}


def differences(ours: Sequence[Ranked], theirs: Sequence[Ranked]) -> dict[str, float]:
    """Ours minus theirs for each problem, paired by seed: both hold the same problems in the same places."""
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys():
            raise ValueError("ours and theirs must be measured on the same problems, seed by seed")
    first, second = by_problem(ours), by_problem(theirs)
    return {problem: first[problem] - second[problem] for problem in first}


def interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """The mean, and the 95 % percentile bootstrap interval of it."""
    data, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = np.concatenate(
        [data[rng.integers(len(data), size=(part, len(data)))].mean(1) for part in _parts(resamples, 500)]
    )
    low, high = np.percentile(means, (2.5, 97.5))
    return float(data.mean()), float(low), float(high)


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
