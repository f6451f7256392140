"""Data addressed by position: the same samples whoever loads them, from wherever a run goes on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgeted.budgets import Epoch
from budgeted.data import WINDOW, Batches, Positioned, end_workers, grouped, loader, start_worker
from budgeted.randomness import permutation, seed_all
from budgeted.signals import STOP_SIGNALS


class Noisy(torch.utils.data.Dataset):
    """Sample i is (i, a draw of each generator)."""

    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(1))], dtype=torch.float64)


class TorchOnly(Noisy):
    torch_only = True

    def __getitem__(self, index):
        return torch.stack([torch.tensor(float(index)), torch.rand(())])


def passed(start, stop, workers=0, seed=3, last="keep", dataset=None, **share):
    batches = Batches(Epoch(10, 4, last), start, stop, **share)
    return [batch.tolist() for batch in loader(dataset or Noisy(), seed, batches, workers)]


@pytest.mark.parametrize("last", ["drop", "keep", "carry"])
def test_order_is_the_epochs_permutation(last):
    seen = [int(sample[0]) for batch in passed(0, 10, last=last) for sample in batch]
    orders = [permutation(3, epoch, 10).tolist() for epoch in range(5)]
    if last == "drop":
        assert seen == sum((order[:8] for order in orders), [])
    else:
        stream = sum(orders, [])
        assert seen == stream[: len(seen)] and len(seen) == (40 if last == "carry" else 34)


def test_remainders_of_an_epoch():
    assert [len(b) for b in passed(0, 6, last="keep")] == [4, 4, 2, 4, 4, 2]
    assert [len(b) for b in passed(0, 6, last="drop")] == [4] * 6
    assert [len(b) for b in passed(0, 6, last="carry")] == [4] * 6


def test_workers_change_nothing():
    alone = passed(0, 7)
    assert passed(0, 7, workers=2) == alone
    assert passed(4, 7, workers=2) == alone[4:]
    assert len({tuple(sample[1:]) for batch in alone for sample in batch}) == 24  # and the draws are not all the same


@given(st.integers(0, 12), st.sampled_from(["drop", "keep", "carry"]), st.booleans())
def test_starting_late_equals_the_tail_of_a_full_pass(start, last, torch_only):
    dataset = TorchOnly() if torch_only else Noisy()
    assert passed(start, 12, last=last, dataset=dataset) == passed(0, 12, last=last, dataset=dataset)[start:]


def test_another_seed_is_another_order_and_augmentation():
    here, there = passed(0, 3), passed(0, 3, seed=4)
    assert [s[0] for b in here for s in b] != [s[0] for b in there for s in b]
    assert not {s[1] for b in here for s in b} & {s[1] for b in there for s in b}


def test_each_pass_over_a_sample_is_augmented_anew():
    draws = [sample[1] for batch in passed(0, 30, last="carry") for sample in batch if sample[0] == 0]
    assert len(draws) == 12 and len(set(draws)) == 12


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy(), TorchOnly()], ids=["all", "torch only"])
def test_the_models_generators_are_left_as_they_were(workers, dataset):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_all(11)
    expected = [draw() for _ in range(4)]
    seed_all(11)
    found = [draw()]
    for _ in loader(dataset, 0, Batches(Epoch(10, 4), 0, 3), workers):
        found.append(draw())
    assert found == expected


def test_a_sample_asked_for_alone_is_the_one_in_its_batch():
    batch = Positioned(Noisy(), 3).__getitems__([5, 17, 3])
    assert [Positioned(Noisy(), 3).__getitems__([k])[0].tolist() for k in (5, 17, 3)] == [s.tolist() for s in batch]


@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 10**6))
def test_batches_of_one_group_are_made_within_windows(n, batch, seed):
    """No sample leaves its window, and of a window's batches one at most is of both groups."""
    groups = np.random.default_rng(seed).integers(0, 2, n)
    order = permutation(seed, 0, n)
    found, size = grouped(order, groups, batch), WINDOW * batch
    for start in range(0, n, size):
        assert sorted(found[start : start + size]) == sorted(order[start : start + size])
        batches = [groups[found[k : k + batch]] for k in range(start, min(start + size, n), batch)]
        assert sum(len(set(b)) > 1 for b in batches) <= 1
    ends = [(groups[found[k - 1]], groups[found[k]]) for k in range(size, n, size)]
    mixed = [len(set(groups[found[k - size : k]])) > 1 for k in range(size, n, size)]
    assert all(a == b for (a, b), before, after in zip(ends, mixed, mixed[1:], strict=False) if before and after)


class Sided(Noisy):
    """Half of its samples are of either group."""

    groups = np.arange(10) % 2


def test_a_data_set_with_groups_starts_anywhere_too():
    whole = [b.tolist() for b in loader(Sided(), 5, Batches(Epoch(10, 2, "carry"), 0, 9))]
    assert whole[4:] == [b.tolist() for b in loader(Sided(), 5, Batches(Epoch(10, 2, "carry"), 4, 9))]
    assert whole != [b.tolist() for b in loader(Noisy(), 5, Batches(Epoch(10, 2, "carry"), 0, 9))]


def test_an_iterator_draws_nothing_from_torchs_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    iter(loader(Noisy(), 0, Batches(Epoch(10, 4), 0, 3)))
    assert torch.rand(1) == expected


# -- shares of a batch --------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 5)),
       st.sampled_from(["drop", "keep", "carry"]), st.integers(0, 30))  # fmt: skip
def test_ranks_and_pieces_partition_every_batch(samples, batch, world, micro, last, step):
    epoch = Epoch(samples, min(batch, samples), last)
    shares = [Batches(epoch, 0, 99, rank, world, micro).pieces(step) for rank in range(world)]
    assert all(1 <= len(piece) <= (micro or batch) for share in shares for piece in share)
    assert sorted(k for share in shares for piece in share for k in piece) == list(epoch.positions(step))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_pieces_of_a_batch():
    assert Batches(Epoch(100, 8), 0, 1, micro=3).pieces(0) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert Batches(Epoch(100, 8), 0, 1, rank=1, world=2).pieces(2) == [[17, 19, 21, 23]]
    assert Batches(Epoch(100, 8), 0, 1, rank=1, world=2, micro=2).pieces(2) == [[17, 19], [21, 23]]


def test_two_ranks_see_together_what_one_sees():
    one = passed(0, 6, last="carry")
    two = [passed(0, 6, last="carry", rank=rank, world=2) for rank in (0, 1)]
    for whole, even, odd in zip(one, *two, strict=True):
        assert [sample for pair in zip(even, odd, strict=True) for sample in pair] == whole


def test_micro_batches_are_the_batch_cut_up():
    assert sum(passed(0, 4, micro=1, last="drop"), []) == sum(passed(0, 4, last="drop"), [])


# -- signals ------------------------------------------------------------------------------------------------


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.02)
        return index


def _load(pipe):
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    batches = iter(loader(Slow(), 0, Batches(Epoch(8, 2), 0, 20), workers=1))
    pipe.send(len(next(batches)))
    pipe.send(1 + sum(1 for _ in batches))


def test_workers_leave_signals_to_the_trainer():
    """The whole process group is told to stop, as a scheduler or ^C does it; the loading goes on to its end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    trainer = context.Process(target=_load, args=(there,))
    trainer.start()
    assert here.recv() == 2
    for number in STOP_SIGNALS:
        os.killpg(trainer.pid, number)
        time.sleep(0.02)
    assert here.poll(60) and here.recv() == 20
    trainer.join()
    assert trainer.exitcode == 0


def test_more_workers_than_cores_are_said_once_and_not_by_torch(recwarn, said):
    for _ in range(3):
        next(iter(loader(Slow(), 0, Batches(Epoch(8, 2), 0, 4), workers=64)))
        end_workers()
    assert sum("data.workers=64 on" in line for line in said) == 1
    assert not [w for w in recwarn if "worker" in str(w.message)]


class Stuck(Slow):
    def __getitem__(self, index):
        time.sleep(1000 if index == 7 else 0)
        return index


def test_the_end_of_workers_waits_for_none_that_hangs():
    here = iter(loader(Stuck(), 0, Batches(Epoch(8, 2), 0, 20), workers=2))
    assert len(next(here)) == 2
    processes = here._workers
    start = time.perf_counter()
    end_workers()
    assert not any(process.is_alive() for process in processes)
    assert time.perf_counter() - start < 4  # torch waits 5 s for each
    del here  # nor does torch
    gc.collect()
    assert time.perf_counter() - start < 4
    end_workers()  # a second time is no harm
    assert sum(len(batch) for batch in loader(Slow(), 0, Batches(Epoch(8, 2), 0, 4), workers=2)) == 8


def _forked(pipe):
    end_workers()
    pipe.send(True)


def test_the_workers_of_another_process_are_let_be():
    batches = iter(loader(Slow(), 0, Batches(Epoch(8, 2), 0, 4), workers=1))
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_forked, args=(there,))
    child.start()
    child.join(20)
    assert here.poll() and here.recv() and child.exitcode == 0
    assert sum(len(batch) for batch in batches) == 8


def _orphan(pipe):
    trainer = os.getppid()
    while os.getppid() == trainer:
        time.sleep(0.01)
    pipe.send(os.getpid())
    start_worker()
    pipe.send("it goes on")


def _parent(pipe):
    multiprocessing.get_context("fork").Process(target=_orphan, args=(pipe,), daemon=True).start()
    pipe.send(True)
    time.sleep(1000)


def test_a_worker_whose_trainer_died_before_it_began_ends():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    trainer = context.Process(target=_parent, args=(there,))
    trainer.start()
    there.close()
    assert here.recv()
    trainer.kill()
    assert here.recv() > 0
    with pytest.raises(EOFError):
        here.recv()
