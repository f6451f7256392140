"""Keys, orders and generators: functions of their arguments, the same on every machine."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgeted.randomness import key, key_in, permutation, preserved, seed_all, seed_cpu, seed_torch, stream


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_keys_are_the_same_on_every_machine():
    assert [key(0), key(0, 0), key(0, 1), key(1, 0), key(3, 1, 4)] == [
        3980143261097177850, 2547805098422156800, 679284462775129381, 4386344025017528426, 2184994149544335121,
    ]  # fmt: skip


def test_orders_are_the_same_on_every_machine():
    assert permutation(0, 0, 8).tolist() == [2, 3, 1, 0, 4, 5, 7, 6]
    assert permutation(0, 1, 8).tolist() == [2, 7, 5, 0, 6, 3, 1, 4]
    assert permutation(1, 0, 8).tolist() == [3, 4, 1, 7, 0, 6, 2, 5]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_keys_are_seeds_that_torch_takes(numbers):
    assert 0 <= key(*numbers) < 2**63


def test_keys_of_neighbours_do_not_collide():
    keys = {
        key(*numbers) for seed in range(20) for kind in range(4) for k in range(200) for numbers in [(seed, kind, k)]
    }
    assert len(keys) == 20 * 4 * 200
    assert len({key(0), key(0, 0), key(0, 0, 0), key(0, 0, 0, 0)}) == 4
    assert key(1, 2) != key(2, 1)


@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 300))
def test_orders_hold_every_sample_once(seed, epoch, n):
    order = permutation(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == permutation(seed, epoch, n).tolist()


def test_orders_change_with_seed_and_epoch():
    orders = [tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_orders_do_not_touch_any_generator():
    seed_all(5)
    expected = draws()
    seed_all(5)
    permutation(0, 0, 100)
    assert draws() == expected


@pytest.mark.parametrize("seed", [seed_all, seed_cpu])
def test_seeding_decides_what_all_three_draw(seed):
    seed(key(1, 2, 3))
    first = draws()
    seed(key(1, 2, 3))
    assert draws() == first
    seed(key(1, 2, 4))
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_streams_keys_are_those_of_all_its_numbers():
    assert [key_in(stream(3, 1), k) for k in range(5)] == [key(3, 1, k) for k in range(5)]


def test_torch_alone_can_be_seeded():
    seed_all(1)
    random_next, numpy_next, _ = draws()
    seed_all(1)
    seed_torch(key(9))
    a, b, c = draws()
    torch.manual_seed(key(9))
    assert (a, b, c) == (random_next, numpy_next, float(torch.rand(1)))


def test_generators_are_put_back_even_after_an_error():
    seed_all(7)
    expected = draws()
    seed_all(7)
    with pytest.raises(KeyError), preserved():
        draws()
        raise KeyError
    assert draws() == expected


def test_only_what_is_the_models_touches_the_gpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    seed_cpu(1)
    seed_torch(1)
    assert seeded == []
    seed_all(1)
    assert seeded == [key(1)]
