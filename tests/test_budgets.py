"""Budgets: every unit to one integer T, and amounts that are none."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgeted.budgets import Budget, Epoch, full_iterations
from budgeted.errors import UserError
from budgeted.recipe import periods

IMAGENET = Epoch(1_281_167, 256, "drop")
CIFAR = Epoch(45_000, 128, "keep")
CITYSCAPES = Epoch(2_975, 8, "carry")


def test_full_runs_of_the_paper():
    assert IMAGENET.iterations == 5_004 and full_iterations("100ep", IMAGENET) == 500_400
    assert CIFAR.iterations == 352 and full_iterations("200ep", CIFAR) == 70_400
    assert CITYSCAPES.iterations == Fraction(2975, 8) and full_iterations("400ep", CITYSCAPES) == 148_750
    assert full_iterations("90000it", Epoch(117_266, 16, "carry")) == 90_000


@pytest.mark.parametrize(
    ("full", "amount", "iterations"),
    [
        (500_400, "1%", 5_004),
        (70_400, "1%", 704),
        (148_750, "1%", 1_488),  # 1487.5, to the even neighbour
        (148_750, "5%", 7_438),  # 7437.5
        (90_000, "1%", 900),
        (300_000, "25%", 75_000),
        (100, "100%", 100),
        (7, "50%", 4),  # 3.5
        (3, "50%", 2),  # 1.5
        (1, "50%", 1),  # 0.5 rounds to 0: never less than one update
        (10, "1%", 1),
        (10, "1e-9%", 1),
        (100, "200%", 200),
        (1000, "0.25%", 2),  # 2.5
    ],
)
def test_a_percentage_is_rounded_and_never_cut_to_epochs(full, amount, iterations):
    assert Budget(amount).iterations(full) == iterations


def test_ten_percent_of_imagenet_is_not_whole_epochs_of_anything():
    assert Budget("0.1%").iterations(500_400) == 500  # a tenth of an epoch
    assert Budget("5%").iterations(full_iterations("10ep", Epoch(2000, 32, "drop"))) == 31  # half an epoch of 62


@pytest.mark.parametrize(
    ("amount", "epoch", "iterations"),
    [
        ("900it", None, 900),
        ("1.2e3it", None, 1_200),
        ("12ep", IMAGENET, 60_048),
        ("0.5ep", CIFAR, 176),
        ("1.5ep", CITYSCAPES, 558),  # 557.8
        ("1.2e6im", IMAGENET, 4_688),  # 4687.5
        ("45000im", CIFAR, 352),  # one epoch, its small last batch an iteration too
        ("2975im", CITYSCAPES, 372),  # 371.9
        ("64im", Epoch(100, 32), 2),
    ],
)
def test_iterations_epochs_and_images(amount, epoch, iterations):
    assert Budget(amount).iterations(epoch=epoch) == iterations


def test_flops_by_the_cost_of_an_iteration():
    assert Budget("3e17flop").iterations(flop_per_iteration=1.5e12) == 200_000
    assert Budget("1e12flop").iterations(flop_per_iteration=3e11) == 3
    with pytest.raises(UserError, match="the cost of one iteration"):
        Budget("1e12flop").iterations(10, CIFAR)


@pytest.mark.parametrize(
    ("amount", "right"),
    [("10epochs", "10ep"), ("500iters", "500it"), ("45sec", "45s"), ("3minutes", "3min"), ("2hours", "2h"), ("1GPUhours", "1gpuh"), ("900steps", "900it"), ("1e6samples", "1e6im")],
)  # fmt: skip
def test_a_unit_written_out_is_answered_with_ours(amount, right):
    with pytest.raises(UserError, match=f"unknown unit .* write {right}, or an amount such as"):
        Budget(amount)


def test_clock_budgets_are_seconds():
    assert Budget("45min").seconds() == 2700 and Budget("1.5h").seconds() == 5400
    assert Budget("45s").seconds() == 45 and Budget("45s").is_clock
    assert Budget("8gpuh").seconds(gpus=4) == 7200 and Budget("8gpuh").seconds() == 28_800
    assert Budget("1.5h").seconds(gpus=4) == 5400  # hours of the wall are not shared
    assert [Budget(a).is_clock for a in ("1min", "1h", "1gpuh", "1%", "1it", "1flop")] == [True] * 3 + [False] * 3
    with pytest.raises(UserError, match="no fixed number of iterations"):
        Budget("45min").iterations(100, CIFAR)


@pytest.mark.parametrize(
    "amount",
    ["-3", "-3it", "abc", ".5%", ".5", "", " ", "5", "5.5.5%", "nan%", "inf%", "%", "it", "5 %", " 5%", "5%\n", "5%%", "5kg", "5IT",
     "0ep", "0%", "0.0it", "-0it", "٥%", "５%", "²it", "5％", "1e400it", "1e-400%", "1e9999it", "9" * 5000 + "it", "1_000it",
     "0x10it", "1/2ep", "5%/../..", "5it;rm", "None", "True", "1e5", "--5%", "5ep5"],
)  # fmt: skip
def test_garbage_is_refused_in_one_line_with_the_right_form(amount):
    with pytest.raises(UserError) as error:
        Budget(amount)
    assert str(error.value).startswith(f"budget.amount={amount}")
    assert "positive" in str(error.value) or "900it" in str(error.value)


@pytest.mark.parametrize("amount", [5, 5.0, None, True, ["5%"], {"a": 1}, b"5%"])
def test_other_types_are_refused_like_words(amount):
    with pytest.raises(UserError):
        Budget(amount)


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        ("1e99it", "more than 1e12"),
        ("1e13it", "more than 1e12"),
        ("1e99%", "more than 1e12"),
        ("1e99im", "more than 1e12"),
        ("0.5it", "whole numbers"),
        ("1im", "less than one"),
        ("0.0001ep", "less than one"),
    ],
)
def test_an_amount_that_comes_to_nothing_or_too_much_is_refused(amount, said):
    with pytest.raises(UserError, match=said):
        Budget(amount).iterations(100, CIFAR)


# Digits of other scripts, signs, separators, things that mean something to a shell or a path.
odd = st.text("0159.eE+-_ %itepmhgpuflo/\\'\"\n\t\0,;$({[²½٥５−é∞😀", max_size=8)
numbers = st.one_of(
    st.text("0123456789.eE+-_ ", max_size=12),
    st.floats(allow_nan=True).map(str),
    st.integers().map(str),
    odd,
)
units = st.one_of(st.sampled_from(["%", "it", "ep", "im", "min", "h", "gpuh", "flop", ""]), odd)


@given(numbers, units)
def test_any_text_is_an_amount_or_a_user_error(number, unit):
    try:
        budget = Budget(number + unit)
        if budget.is_clock:
            assert budget.seconds(gpus=3) > 0
        else:
            assert 1 <= budget.iterations(1000, CIFAR, 1e9) <= 10**12
    except UserError as error:
        assert "budget.amount=" in str(error)


@given(st.integers(1, 10**7), st.fractions(Fraction(1, 1000), 100, max_denominator=1000))
def test_a_percentage_is_the_nearest_whole_number(full, percent):
    amount = f"{float(percent):.6f}%"
    exact = Fraction(amount[:-1]) / 100 * full
    assert abs(Budget(amount).iterations(full) - max(Fraction(1), exact)) <= Fraction(1, 2)


# -- epochs and positions -----------------------------------------------------------------------------------


def positions(epoch, steps):
    return [list(epoch.positions(t)) for t in range(steps)]


def test_drop_leaves_the_remainder_out():
    assert positions(Epoch(10, 4, "drop"), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]


def test_keep_makes_a_smaller_batch_of_it():
    assert positions(Epoch(10, 4, "keep"), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_carry_goes_on_into_the_next_epoch():
    assert positions(Epoch(10, 4, "carry"), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from(["drop", "keep", "carry"]), st.integers(0, 200))
def test_a_step_is_its_own_positions_whatever_came_before(samples, batch, last, step):
    batch = min(batch, samples)
    epoch = Epoch(samples, batch, last)
    here, then = epoch.positions(step), epoch.positions(step + 1)
    assert 1 <= len(here) <= batch and (len(here) == batch or last == "keep")
    assert then.start >= here.stop  # no sample is used twice in an epoch
    assert then.start == here.stop or last == "drop"
    assert here.start == epoch.position(step)
    assert last == "carry" or here.start // samples == (here.stop - 1) // samples
    assert epoch.seen(step + 1) - epoch.seen(step) == len(here)


# -- periods ------------------------------------------------------------------------------------------------


def due(amount, total, epoch=CIFAR):
    """The numbers of finished steps at which a period of a run ends."""
    count = periods(amount, total, epoch)
    return [k for k in range(1, total + 1) if count(k, k / total) > count(k - 1, (k - 1) / total)]


def test_periods_of_a_run():
    assert due("25%", 20) == [5, 10, 15, 20]
    assert due("50%", 7) == [4, 7]  # never before the half
    assert due("100%", 9) == [9]
    assert due("5%", 7) == [1, 2, 3, 4, 5, 6, 7]
    assert due("7it", 20) == [7, 14]
    assert due("1ep", 8, Epoch(10, 4, "carry")) == [3, 5, 8]  # after 2.5, 5 and 7.5 iterations
    assert due("128im", 3) == [1, 2, 3]


def test_periods_of_a_clock():
    count = periods("25%", None, CIFAR)
    assert [count(99, p) for p in (0, 0.24, 0.25, 0.5, 0.99, 1)] == [0, 0, 1, 2, 3, 4]
    assert periods("10it", None, CIFAR)(25, 0.1) == 2


@pytest.mark.parametrize("amount", ["45min", "1h", "1gpuh", "1e9flop", "abc", "0.5it"])
def test_a_period_is_not_a_clock(amount):
    with pytest.raises(UserError):
        periods(amount, 100, CIFAR)
