"""The statistics, against numbers computed by hand or taken from tables."""

import math

import numpy as np
import pytest

from benchmarks.statistics import mean_ranks, paired, ranks, summarize, t95


def test_summary_of_three_runs():
    s = summarize([0.60, 0.62, 0.64])
    assert (s.n, round(s.mean, 12), round(s.std, 12)) == (3, 0.62, 0.02)
    assert s.low == pytest.approx(0.570317, abs=1e-6)  # 0.62 - 4.3027 * 0.02 / sqrt(3)
    assert s.high == pytest.approx(0.669683, abs=1e-6)


def test_one_run_has_no_spread_and_none_has_nothing():
    one, none = summarize([0.5]), summarize([])
    assert (one.n, one.mean) == (1, 0.5) and math.isnan(one.std) and math.isnan(one.low)
    assert none.n == 0 and math.isnan(none.mean)


@pytest.mark.parametrize(
    "dof, value", [(1, 12.7062), (2, 4.3027), (10, 2.2281), (30, 2.0423), (31, 2.0395), (60, 2.0003), (120, 1.9799)]
)
def test_t_quantiles(dof, value):
    assert t95(dof) == pytest.approx(value, abs=1e-4)


def test_pairs_use_only_shared_seeds():
    s = paired({0: 0.5, 1: 0.7, 7: 0.1}, {0: 0.4, 1: 0.5, 2: 0.9})
    assert s.n == 2
    assert s.mean == pytest.approx(0.15)
    assert s.std == pytest.approx(0.0707107, abs=1e-7)
    assert paired({0: 1.0}, {1: 1.0}).n == 0


def test_ranks_share_ties_and_leave_gaps():
    scores = np.array([[0.9, 0.5], [0.9, np.nan], [0.1, 0.7]])
    np.testing.assert_array_equal(ranks(scores), [[1.5, 2], [1.5, np.nan], [3, 1]])


def test_mean_ranks_count_only_complete_rows():
    scores = np.array([[0.9, 0.5], [0.95, np.nan], [0.1, 0.7]])
    np.testing.assert_array_equal(mean_ranks(scores), [1.5, np.nan, 1.5])
    assert mean_ranks(np.empty((0, 0))).shape == (0,)
