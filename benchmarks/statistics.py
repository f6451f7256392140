"""Pure statistics on a few runs. Arrays in, numbers out; nothing here knows files or schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
Z95 = 1.959964


class Summary(NamedTuple):
    """n runs: mean, sample standard deviation (NaN for n < 2), 95% t interval of the mean (NaN for n < 2)."""

    n: int
    mean: float
    std: float
    low: float
    high: float


def t95(dof: int) -> float:
    """The factor of a two-sided 95% interval with `dof` >= 1 degrees of freedom (error < 1e-4)."""
    if dof <= len(T95):
        return T95[dof - 1]
    z = Z95  # Cornish-Fisher expansion around the normal
    return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)


def summarize(values: Sequence[float] | np.ndarray) -> Summary:
    """values: shape (n,), one number per run. Empty gives n = 0 and NaN."""
    array = np.asarray(values, dtype=float)
    n = array.size
    if n == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(array.mean())
    if n == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    std = float(array.std(ddof=1))
    half = t95(n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Summary:
    """Summary of a - b over the seeds that both have. a, b: seed -> value."""
    return summarize([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each row in its column, 1 = highest, ties share the mean rank, NaN stays NaN.

    scores: shape (schedules, budgets), mean over seeds. Returns the same shape.
    """
    scores = np.asarray(scores, dtype=float)
    known = ~np.isnan(scores)
    above = (scores[None, :, :] > scores[:, None, :]).sum(axis=1)
    equal = (scores[None, :, :] == scores[:, None, :]).sum(axis=1)  # counts itself; 0 for NaN
    return np.where(known, above + (equal + 1) / 2, np.nan)


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """Mean rank over columns of the rows without a gap, NaN for the others: (schedules, budgets) -> (schedules,).

    A row with a gap has met fewer rivals, so its mean would not compare. Ranks count only rows without a gap.
    """
    scores = np.array(scores, dtype=float)
    scores[np.isnan(scores).any(axis=1)] = np.nan
    return ranks(scores).mean(axis=1) if scores.size else np.full(scores.shape[0], np.nan)
