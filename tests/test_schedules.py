"""Every row of DESIGN's table at literal points, and the traps beside it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fvcore.common.param_scheduler import CompositeParamScheduler
from hypothesis import given
from hypothesis import strategies as st

from budgeted import UserError, hold, make, warmup
from budgeted.recipe import build_schedule
from budgeted.schedules import COOLDOWNS, SCHEDULES, refined_values, table

PURE = sorted(set(SCHEDULES) - {"refined", "replay"})  # those that need no earlier run
POINTS = [
    # name, constants, {p: f(p)}
    ("constant", {}, {0: 1, 0.3: 1, 0.999: 1}),
    ("linear", {}, {0: 1, 0.25: 0.75, 0.5: 0.5, 0.9: 0.1}),
    ("step", {}, {0: 1, 0.33: 1, 0.34: 0.1, 0.66: 0.1, 0.67: 0.01, 0.99: 0.01}),
    ("step", {"milestones": [2 / 3, 8 / 9]}, {0.66: 1, 0.67: 0.1, 0.88: 0.1, 0.89: 0.01}),
    ("step", {"milestones": [0.5], "gamma": 0.5}, {0.49: 1, 0.5: 0.5, 0.99: 0.5}),
    ("exp", {"gamma": 0.97, "T0": 200}, {0: 1, 0.005: 0.97, 0.01: 0.9409, 0.05: 0.737424, 0.5: 0.0475525}),
    ("exp", {"gamma": 0.99, "T0": 200}, {0.5: 0.99**100}),
    ("poly", {}, {0: 1, 0.5: 0.5358867, 0.9: 0.1258925}),
    ("poly", {"power": 2}, {0.5: 0.25, 0.75: 0.0625}),
    ("cosine", {}, {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25}),
    ("cosine", {"eta": 0.1}, {0: 1, 0.5: 0.55, 2 / 3: 0.325}),
    ("htd", {}, {0: 0.9999939, 2 / 3: 0.5, 0.5: 0.9525741, 0.9: 0.0147740}),
    ("htd", {"eta": 0.5}, {2 / 3: 0.75}),
    ("inverse", {}, {0: 1, 1 / 9: 0.5, 1 / 3: 0.25}),
    ("inverse", {"k": 1000}, {0.05: 1 / 51}),
    ("rex", {}, {0: 1, 0.25: 6 / 7, 0.5: 2 / 3, 0.75: 0.4, 0.9: 2 / 11}),
    ("onecycle", {}, {0: 0.1, 0.25: 0.55, 0.5: 1, 0.75: 0.55, 0.9: 0.28}),
    ("knee", {}, {0: 1, 0.5: 1, 0.75: 0.5, 0.9: 0.2}),
    ("knee", {"explore": 0}, {0: 1, 0.5: 0.5}),
    ("wsd", {}, {0: 1, 0.8: 1, 0.85: 0.5, 0.9: 0.2928932}),
    ("wsd", {"shape": "linear"}, {0.79: 1, 0.85: 0.75, 0.95: 0.25}),
    ("wsd", {"shape": "cosine"}, {0.85: 0.8535534, 0.9: 0.5}),
    ("wsd", {"shape": "mirror"}, {0.85: 0.6464466, 0.9: 0.5}),
    ("wsd", {"shape": "square"}, {0.85: 0.9375, 0.9: 0.75}),
    ("wsd", {"shape": "exp", "floor": 0.01}, {0.8: 1, 0.9: 0.1}),
    ("wsd", {"fraction": 1, "shape": "linear"}, {0: 1, 0.3: 0.7}),
    ("sgdr", {"first": 0.25, "mult": 1}, {0: 1, 0.125: 0.5, 0.25: 1, 0.375: 0.5, 0.75: 1}),
    ("sgdr", {"first": 0.1, "mult": 2}, {0.05: 0.5, 0.1: 1, 0.2: 0.5, 0.3: 1, 0.5: 0.5, 0.7: 1}),
    ("uba", {}, {0: 1, 0.5: 2 / 3, 2 / 3: 0.4}),
    ("uba", {"phi": 2}, {0: 1, 1 / 3: 0.75, 0.5: 0.5}),
    ("uba", {"phi": 0.5}, {0.5: 2 / 2.5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "constants", "points"), POINTS, ids=lambda v: v if isinstance(v, str) else "")
def test_values_at_literal_points(name, constants, points):
    schedule = make(name, **constants)
    assert {p: pytest.approx(f, abs=1e-6) for p, f in points.items()} == {p: schedule(p) for p in points}


def test_table_has_every_row_of_the_design():
    rows = "constant linear step exp poly cosine htd inverse rex onecycle knee wsd sgdr uba refined replay"
    assert set(SCHEDULES) == set(rows.split())
    assert {name for name, _, _ in POINTS} == set(PURE)
    assert set(COOLDOWNS) == {"linear", "sqrt", "cosine", "mirror", "square", "exp"}


@given(st.sampled_from(PURE), st.floats(0, 1, exclude_max=True))
def test_ratios_lie_between_zero_and_one(name, p):
    assert 0 <= make(name)(p) <= 1 + 1e-9


@pytest.mark.parametrize("name", PURE)
def test_starts_at_one_unless_it_rises_first(name):
    start = {"onecycle": 0.1, "htd": 0.5 * (1 + math.tanh(6))}.get(name, 1.0)
    assert make(name)(0) == pytest.approx(start, abs=1e-12)


@pytest.mark.parametrize("name", PURE)
def test_asking_for_the_end_is_harmless(name):
    end = make(name)(1.0)
    assert math.isfinite(end) and 0 <= end <= 1
    if name in ("linear", "poly", "cosine", "rex", "knee", "wsd", "uba"):
        assert end == pytest.approx(0, abs=1e-12)


# -- traps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 100, 90_000])
def test_last_update_of_linear_uses_one_over_t(total):
    assert make("linear")((total - 1) / total) == pytest.approx(1 / total, rel=1e-9)


def test_linear_is_not_torchs_warmup():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    theirs, found = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10), []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = [make("linear")(t / 10) for t in range(10)]
    assert found[0] < found[-1] and ours[0] > ours[-1]
    assert ours == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_rex_is_the_papers_and_not_the_copies():
    rex = make("rex")
    assert rex(0.5) == pytest.approx(2 / 3, abs=1e-12)
    assert abs(rex(0.5) - 0.909) > 0.2  # most copies divide by .9 + .1 (1 - p)
    assert all(rex(p) > 1 - p for p in (0.1, 0.5, 0.9))


@pytest.mark.parametrize("total", [3, 9, 90, 900, 90_000, 500_400, 70_400])
def test_milestones_pass_exactly_at_their_step(total):
    schedule = make("step", milestones=[2 / 3, 8 / 9])
    first, second = math.ceil(total * 2 / 3), math.ceil(total * 8 / 9)
    ratio = lambda t: schedule(t / total)  # noqa: E731
    assert [ratio(first - 1), ratio(first)] == pytest.approx([1, 0.1])
    assert [ratio(second - 1), ratio(second)] == pytest.approx([0.1 if second - 1 >= first else 1, 0.01])


def test_sgdr_restarts_exactly_at_its_step():
    schedule = make("sgdr", first=0.1, mult=2)
    assert schedule(3 / 30) == 1 and schedule(9 / 30) == 1 and schedule(8 / 30) < 0.1


def test_onecycle_moves_momentum_the_other_way():
    momentum = make("onecycle").momentum_at
    assert [momentum(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95])
    assert all(make(name).momentum_at is None for name in PURE if name != "onecycle")


# -- wrappers -----------------------------------------------------------------------------------------------


def test_warmup_multiplies_and_then_leaves_alone():
    schedule = warmup(make("linear"), 0.2, 0.5)
    assert [schedule(p) for p in (0, 0.1, 0.2, 0.5)] == pytest.approx([0.5, 0.75 * 0.9, 0.8, 0.5])
    assert [warmup(make("constant"), 0.5)(p) for p in (0, 0.25, 0.5)] == [0, 0.5, 1]
    assert warmup(make("rex"), 0)(0.5) == make("rex")(0.5)


def test_warmup_scales_with_the_budget():
    """1,000 of 90,000 iterations from 0.001 (detectron2's 1x): at 1% of the budget it takes 10 of 900."""
    schedule = warmup(make("constant"), 1000 / 90_000, 0.001)
    assert [schedule(500 / 90_000), schedule(5 / 900)] == pytest.approx([0.5005, 0.5005])
    assert schedule(10 / 900) == 1


def test_hold_samples_only_so_often():
    schedule = hold(make("linear"), 4)
    assert [schedule(p) for p in (0, 0.24, 0.25, 0.49, 0.5, 0.75, 0.99)] == [1, 1, 0.75, 0.75, 0.5, 0.25, 0.25]
    assert [hold(make("linear"), 10)(t / 10) for t in range(10)] == pytest.approx([1 - t / 10 for t in range(10)])
    assert len({hold(make("cosine"), 7)(t / 1000) for t in range(1000)}) == 7
    assert hold(make("onecycle"), 2).momentum_at(0.7) == pytest.approx(0.85)
    assert hold(make("linear"), 1)(0.99) == 1


def test_drops_into_code_that_takes_an_fvcore_schedule():
    half = CompositeParamScheduler([make("constant"), make("linear")], [0.5, 0.5], ["fixed", "rescaled"])
    assert [half(p) for p in (0.2, 0.5, 0.75)] == pytest.approx([1, 1, 0.5])


def test_table_interpolates_or_holds():
    assert [table([1, 0.5])(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [table([1, 0.5], hold=True)(p) for p in (0, 0.49, 0.5, 1)] == [1, 1, 0.5, 0.5]


# -- schedules made from a run ------------------------------------------------------------------------------


def a_run(tmp_path, lines, lr=0.2, own=None):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "result.json").write_text('{"status": "done"}')
    (tmp_path / "config.yaml").write_text(f"task: {{lr: {lr}}}\noptimizer: {{lr: {'null' if own is None else own}}}\n")
    return str(tmp_path)


@pytest.mark.parametrize("n", [2, 5, 100])
@pytest.mark.parametrize("power", [1, 2])
def test_refined_from_constant_norms_is_linear(n, power):
    assert refined_values([3.0] * n, power) == pytest.approx([1 - t / n for t in range(n)])


def test_refined_falls_faster_where_gradients_grow():
    """w = G^-2 = (1, 1/4), sums of the rest (5/4, 1/4): 5/4 and 1/16, over the larger 1 and 1/20."""
    assert refined_values([1.0, 2.0], 2, smooth=0) == pytest.approx([1, 0.05])
    assert refined_values([1.0, 2.0], 1, smooth=0) == pytest.approx([1, 1 / 6])


def test_refined_reads_the_norms_of_a_run(tmp_path):
    lines = [{"step": t, "lr": 0.2, "grad_norm": 4.0} for t in range(4)] + [{"step": 3, "eval": {"top1": 0.5}}]
    schedule = make("refined", run=a_run(tmp_path, lines))
    assert [schedule(p) for p in (0, 0.125, 0.25, 0.5, 0.75)] == pytest.approx([1, 0.875, 0.75, 0.5, 0.25])


def test_replay_repeats_rates_step_by_step(tmp_path):
    rates = [0.02, 0.2, 0.1, 0.05, 0.01]
    run = a_run(tmp_path, [{"step": t, "lr": r} for t, r in enumerate(rates)])
    schedule = make("replay", run=run)
    assert [0.2 * schedule(t / 5) for t in range(5)] == pytest.approx(rates, rel=1e-9)


def test_replay_keeps_the_scale_of_rates_that_never_reached_their_base(tmp_path):
    schedule = make("replay", run=a_run(tmp_path, [{"step": 0, "lr": 0.05}, {"step": 1, "lr": 0.1}], lr=3, own=0.2))
    assert [schedule(0), schedule(0.5)] == pytest.approx([0.25, 0.5])


def test_replay_wants_every_step(tmp_path):
    with pytest.raises(UserError, match="log_every=1"):
        make("replay", run=a_run(tmp_path, [{"step": 0, "lr": 0.2}, {"step": 50, "lr": 0.1}, {"step": 99, "lr": 0.01}]))


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    run = a_run(tmp_path, [{"step": 0, "lr": 0.2, "grad_norm": 1.0}, {"step": 1, "lr": 0.1, "grad_norm": 1.0}])
    (tmp_path / "result.json").unlink()
    for name in ("replay", "refined"):
        with pytest.raises(UserError, match="is not done; let it end first"):
            make(name, run=run)


def test_replay_repeats_momentum_and_adds_no_warmup(tmp_path):
    lines = [{"step": 0, "lr": 0.2, "momentum": 0.95}, {"step": 1, "lr": 0.1, "momentum": 0.85}]
    cfg = {
        "schedule": {"name": "replay", "run": a_run(tmp_path, lines)},
        "hold": 1,
        "task": {"warmup": {"fraction": 0.9, "factor": 0}},
    }
    schedule = build_schedule(cfg, 20, None)
    assert [schedule(0), schedule(0.5)] == pytest.approx([1, 0.5])
    assert [schedule.momentum_at(p) for p in (0, 0.5, 1)] == [0.95, 0.85, 0.85]


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "constants", "said"),
    [
        ("linaer", {}, "did you mean 'linear'"),
        ("cosin", {}, "did you mean 'cosine'"),
        ("linear", {"gamma": 0.1}, "linear has no constants"),
        ("step", {"gama": 0.1}, "did you mean 'gamma'"),
        ("step", {"gamma": 0}, "schedule.gamma=0"),
        ("step", {"gamma": "x"}, "schedule.gamma=x: must be a number"),
        ("step", {"gamma": True}, "must be a number"),
        ("step", {"milestones": [0.5, 1]}, "fractions of the budget in (0, 1)"),
        ("step", {"milestones": [30, 60]}, "fractions of the budget in (0, 1)"),
        ("step", {"milestones": "abc"}, "schedule=step"),
        ("step", {"milestones": 0.5}, "schedule=step"),
        ("exp", {"T0": 0}, "schedule.T0=0"),
        ("exp", {"gamma": 1.5}, "schedule.gamma=1.5"),
        ("poly", {"power": 0}, "positive"),
        ("cosine", {"eta": 1}, "in [0, 1)"),
        ("htd", {"L": 3, "U": 3}, "below U"),
        ("inverse", {"k": -1}, "not negative"),
        ("onecycle", {"low": 1}, "in [0, 1)"),
        ("knee", {"explore": 1}, "in [0, 1)"),
        ("wsd", {"fraction": 0}, "in (0, 1]"),
        ("wsd", {"shape": "squar"}, "did you mean 'square'"),
        ("sgdr", {"first": 0}, "in (0, 1]"),
        ("sgdr", {"mult": 0.5}, "at least 1"),
        ("uba", {"phi": 0}, "in (0, 2]"),
        ("uba", {"phi": math.nan}, "in (0, 2]"),
        ("exp", {"T0": math.inf}, "schedule.T0=inf: must be a finite number"),
        ("htd", {"L": -math.inf}, "schedule.L=-inf: must be a finite number"),
        ("inverse", {"k": math.inf}, "schedule.k=inf: must be a finite number"),
        ("onecycle", {"high_momentum": 2}, "schedule.high_momentum=2: must be in [0, 1)"),
        ("sgdr", {"first": 1e-6, "mult": 1.0}, "more than 100,000 periods"),
        ("refined", {}, "directory of an earlier run"),
        ("replay", {"run": "/nowhere"}, "directory of an earlier run"),
    ],
)
def test_a_wrong_constant_is_one_line_that_names_it(name, constants, said):
    with pytest.raises(UserError) as error:
        make(name, **constants)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_null_keeps_a_default():
    assert make("exp", T0=None, gamma=None)(0.005) == pytest.approx(0.97)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no step"),
        ([{"step": 0, "eval": {}}], "holds no step"),
        ([{"step": 0, "lr": 0.1}], "grad_norm=true"),
        ([{"step": 0, "grad_norm": 0.0}, {"step": 1, "grad_norm": 1.0}], "finite positive"),
        ([{"step": 0, "grad_norm": None}, {"step": 1, "grad_norm": 1.0}], "no grad_norm"),
        ([{"step": 0, "grad_norm": 1.0}], "at least 2"),
        ([3], "cannot be read"),
    ],
)
def test_a_run_that_cannot_be_refined_says_why(tmp_path, lines, said):
    with pytest.raises(UserError, match=said):
        make("refined", run=a_run(tmp_path, lines))


def test_a_run_whose_log_is_not_json_says_so(tmp_path):
    a_run(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text("{" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        make("replay", run=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        make("refined", run=str(tmp_path))


@pytest.mark.parametrize("wrong", [(-0.1, 0.0), (1.0, 0.0), (0.1, 1.5), (0.1, -0.1)])
def test_a_warmup_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match="warmup"):
        warmup(make("linear"), *wrong)


@pytest.mark.parametrize("updates", [0, -1, 1.5])
def test_a_hold_out_of_range_is_refused(updates):
    with pytest.raises(UserError, match="hold"):
        hold(make("linear"), updates)
