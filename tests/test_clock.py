"""What counts as training time: with a clock that the test sets."""

from __future__ import annotations

import time

import pytest

from budgeted.clock import Clock
from budgeted.distributed import World


@pytest.fixture
def now(monkeypatch):
    """now(seconds) lets that time pass."""
    at = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: at[0])
    return lambda seconds: at.__setitem__(0, at[0] + seconds)


def step(clock, now, seconds):
    now(seconds)
    clock.tick()


def test_setting_up_saving_and_evaluating_are_no_training(now):
    clock = Clock(None, World())
    now(50)
    clock.start()
    step(clock, now, 1)
    with clock.paused(), clock.measured("eval_seconds"):
        now(7)
    step(clock, now, 1)
    with pytest.raises(OSError), clock.paused():
        now(3)
        raise OSError
    step(clock, now, 1)
    assert (clock.elapsed, clock.eval_seconds, clock.compile_seconds) == (3, 7, 0)


def test_waiting_for_data_is_training_and_told_apart(now):
    clock = Clock(None, World())
    with clock.measured("wait_seconds"):
        now(2)
    step(clock, now, 1)
    assert (clock.elapsed, clock.wait_seconds) == (3, 2)


def test_what_the_first_step_takes_longer_than_the_second_is_compiling(now):
    clock = Clock(10, World())
    step(clock, now, 30)
    assert clock.progress == 0  # not yet judged
    step(clock, now, 2)
    assert (clock.elapsed, clock.compile_seconds, clock.progress) == (4, 28, pytest.approx(0.4))
    step(clock, now, 1)
    assert clock.progress == pytest.approx(0.5)
    step(clock, now, 99)
    assert clock.progress == 1


def test_a_first_step_that_is_not_judged_is_not_carried(now):
    clock = Clock(10, World())
    step(clock, now, 30)
    assert clock.state() == {"elapsed": 0, "compile_seconds": 30, "eval_seconds": 0, "wait_seconds": 0}


def test_a_resume_goes_on_where_it_was_and_the_time_between_is_not_counted(now):
    first = Clock(10, World())
    for _ in range(4):
        step(first, now, 1)
    now(1000)
    second = Clock(10, World())
    second.restore(first.state(), first.progress)
    second.start()
    step(second, now, 1.5)
    step(second, now, 1)
    assert (second.elapsed, second.progress, second.compile_seconds) == (6, pytest.approx(0.6), 0.5)


def test_half_of_a_budget_on_four_gpus_is_half_of_it_on_two(now):
    """A GPU-hour is 900 s of four: half of it leaves 900 s of two."""
    four = Clock(900, World())
    for _ in range(45):
        step(four, now, 10)
    two = Clock(1800, World())
    two.restore(four.state(), four.progress)
    two.start()
    assert four.progress == two.progress == pytest.approx(0.5)
    for _ in range(45):
        step(two, now, 10)
    assert two.progress == pytest.approx(0.75)


@pytest.mark.parametrize("lost", ["elapsed", "compile_seconds"])
def test_a_state_that_is_none_is_refused(lost):
    state = Clock(None, World()).state()
    with pytest.raises(KeyError, match=lost):
        Clock(None, World()).restore({k: v for k, v in state.items() if k != lost}, 0.0)
    with pytest.raises(TypeError):
        Clock(None, World()).restore({**state, lost: "1"}, 0.0)
