"""The one writer of learning rates, in a plain PyTorch loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedulefree import SGDScheduleFree

from budgeted import BudgetedLR, hold, make, warmup
from budgeted.schedules import SCHEDULES

PURE = sorted(set(SCHEDULES) - {"refined", "replay"})
BASES = [0.1, 0.02, 3.0]


def groups(bases=BASES):
    return [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in bases]


def sgd(**options):
    return torch.optim.SGD(groups(), 0.5, momentum=0.9, **options)


def loop(scheduler, optimizer, total):
    """The rates that each update of a plain loop found in the parameter groups."""
    found = []
    for _ in range(total):
        found.append([float(g["lr"]) for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("name", PURE)
def test_every_update_finds_base_times_the_formula(name, total):
    schedule, optimizer = make(name), sgd()
    scheduler = BudgetedLR(optimizer, schedule, total)
    found = loop(scheduler, optimizer, total)
    for t in range(total):
        assert found[t] == pytest.approx([base * schedule(t / total) for base in BASES], rel=1e-9, abs=1e-15)
    assert list(scheduler.applied)[:total] == pytest.approx([schedule(t / total) for t in range(total)], rel=1e-9)


@pytest.mark.parametrize("total", [1, 7, 100])
def test_wrapped_schedules_are_applied_too(total):
    schedule, optimizer = warmup(hold(make("cosine"), 5), 0.3, 0.1), sgd()
    found = loop(BudgetedLR(optimizer, schedule, total), optimizer, total)
    assert [row[0] for row in found] == pytest.approx([0.1 * schedule(t / total) for t in range(total)], rel=1e-9)


def test_last_update_of_linear_and_one_step_too_many():
    optimizer = sgd()
    scheduler = BudgetedLR(optimizer, make("linear"), 7)
    assert loop(scheduler, optimizer, 7)[-1][0] == pytest.approx(0.1 / 7, rel=1e-9)
    assert [g["lr"] for g in optimizer.param_groups] == [0, 0, 0]
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0, 0, 0]


def test_the_loop_of_the_readme():
    model = torch.nn.Linear(1, 1)
    optimizer, total = torch.optim.SGD(model.parameters(), lr=0.1), 10
    rates = []
    scheduler = BudgetedLR(optimizer, make("linear"), total)
    for _ in range(total):
        rates += scheduler.get_last_lr()
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01])


def test_a_bare_function_of_progress_will_do():
    optimizer = sgd()
    assert [row[0] for row in loop(BudgetedLR(optimizer, lambda p: 1 - p * p, 2), optimizer, 2)] == [0.1, 0.1 * 0.75]


def test_is_torchs_own_kind_of_scheduler_and_warns_of_nothing(recwarn):
    optimizer = sgd()
    scheduler = BudgetedLR(optimizer, make("linear"), 3)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    loop(scheduler, optimizer, 3)
    assert not recwarn.list


# -- momentum -----------------------------------------------------------------------------------------------

MOMENTA = [0.95, 0.91, 0.87, 0.87, 0.91]  # .95 - .1 (1 - |2 t/5 - 1|)


def test_onecycle_moves_sgds_momentum():
    optimizer = sgd()
    scheduler, found = BudgetedLR(optimizer, make("onecycle"), 5), []
    for _ in range(5):
        found.append([g["momentum"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert found == [pytest.approx([m] * 3) for m in MOMENTA]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_onecycle_moves_adams_first_beta_alone(kind):
    optimizer = kind(groups(), betas=(0.9, 0.999))
    scheduler, found = BudgetedLR(optimizer, make("onecycle"), 5), []
    for _ in range(5):
        found.append(optimizer.param_groups[1]["betas"])
        optimizer.step()
        scheduler.step()
    assert [b[0] for b in found] == pytest.approx(MOMENTA) and {b[1] for b in found} == {0.999}


def test_momentum_stays_where_the_schedule_does_not_move_it():
    optimizer = sgd()
    loop(BudgetedLR(optimizer, make("linear"), 5), optimizer, 5)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9] * 3


def test_optimizers_without_momentum_are_left_alone():
    optimizer = torch.optim.Adagrad(groups())
    loop(BudgetedLR(optimizer, make("onecycle"), 5), optimizer, 5)
    assert "momentum" not in optimizer.param_groups[0]


def test_a_group_without_momentum_keeps_none():
    """torch's RMSprop and SGD have 0 unless one asks for some: a schedule that moves it does not ask."""
    two = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.RMSprop(
        [{"params": [p]} | more for p, more in zip(two, ({}, {"momentum": 0.9}), strict=True)]
    )
    scheduler, found = BudgetedLR(optimizer, make("onecycle", low_momentum=0.0), 4), []
    for _ in range(4):
        found.append([g["momentum"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert found == [pytest.approx([0.0, m]) for m in (0.95, 0.475, 0.0, 0.475)]


def test_the_momentum_that_schedule_free_averages_by_is_not_moved():
    optimizer = SGDScheduleFree([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="by which SGDScheduleFree averages"):
        BudgetedLR(optimizer, make("onecycle"), 5)
    BudgetedLR(optimizer, make("linear"), 5)


# -- tensors, closures, jumps -------------------------------------------------------------------------------


def test_a_learning_rate_held_in_a_tensor_is_written_in_place():
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate, foreach=False, capturable=False)
    scheduler = BudgetedLR(optimizer, make("linear"), 4)
    for t in range(4):
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.1 * (1 - t / 4), rel=1e-9)
        scheduler.step()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.sampled_from(PURE))
def test_rates_depend_on_the_step_alone_whatever_came_before(steps, name):
    optimizer, schedule = sgd(), make(name)
    scheduler = BudgetedLR(optimizer, schedule, 50)
    for t in steps:
        scheduler.set_step(t)
        assert scheduler.get_last_lr() == pytest.approx([b * schedule(t / 50) for b in BASES], rel=1e-9, abs=1e-15)
        assert scheduler.last_epoch == t


def test_a_clock_decides_in_place_of_the_steps():
    now, optimizer = [0.0], sgd()
    scheduler = BudgetedLR(optimizer, make("linear"), progress=lambda: now[0])
    found = []
    for value in (0.3, 0.3, 0.9, 1.7):
        now[0] = value
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.07, 0.07, 0.01, 0])
    assert list(scheduler.applied) == pytest.approx([1, 0.7, 0.7, 0.1, 0])


# -- saved and restored -------------------------------------------------------------------------------------


def test_state_round_trip_goes_on_where_it_was():
    optimizer = sgd()
    scheduler = BudgetedLR(optimizer, make("cosine"), 20)
    loop(scheduler, optimizer, 8)
    saved, kept = copy.deepcopy(scheduler.state_dict()), copy.deepcopy(optimizer.state_dict())
    rest = loop(scheduler, optimizer, 12)

    other = sgd()
    again = BudgetedLR(other, make("cosine"), 20)
    other.load_state_dict(kept)
    again.load_state_dict(saved)
    assert again.last_epoch == 8 and loop(again, other, 12) == rest
    assert list(again.applied)[8:] == list(scheduler.applied)[8:] and all(map(math.isnan, again.applied[1:8]))


def test_state_is_plain_enough_to_load_without_code(tmp_path):
    scheduler = BudgetedLR(sgd(), make("linear"), 20)
    torch.save(scheduler.state_dict(), tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True) == scheduler.state_dict()


@pytest.mark.parametrize("other", [19, 21, 200])
def test_another_horizon_is_refused_and_both_are_named(other):
    saved = BudgetedLR(sgd(), make("linear"), 20).state_dict()
    optimizer = sgd()
    scheduler = BudgetedLR(optimizer, make("linear"), other)
    with pytest.raises(ValueError, match=rf"20 .*{other}"):
        scheduler.load_state_dict(saved)
    assert scheduler.get_last_lr() == BASES


def test_a_clock_is_not_resumed_as_iterations():
    saved = BudgetedLR(sgd(), make("linear"), 20).state_dict()
    with pytest.raises(ValueError, match="20"):
        BudgetedLR(sgd(), make("linear"), progress=lambda: 0.0).load_state_dict(saved)


def test_base_rates_survive_an_optimizer_that_was_restored_in_mid_run():
    optimizer = sgd()
    loop(BudgetedLR(optimizer, make("linear"), 10), optimizer, 5)
    again = BudgetedLR(optimizer, make("linear"), 10)  # its groups now hold half the rates, and initial_lr
    assert again.base_lrs == BASES and again.get_last_lr() == BASES


@pytest.mark.parametrize("arguments", [{}, {"total": 0}, {"total": "5%"}, {"total": 5, "progress": lambda: 0.0}])
def test_wants_a_horizon_or_a_clock(arguments):
    with pytest.raises(ValueError, match="total"):
        BudgetedLR(sgd(), make("linear"), **arguments)


def test_wants_a_schedule_not_its_name():
    with pytest.raises(ValueError, match=r"'linear' is no schedule: make\('linear'\) may be meant"):
        BudgetedLR(sgd(), "linear", 10)
