"""Data addressed by position: resuming is a start position, whatever the number of workers.

Position k of the endless stream is sample permutation(seed, k // N)[k % N], augmented by generators seeded
with (seed, k); within a few batches samples may change places to be with their like. Nothing is skipped by decoding it,
and no loader state is saved.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, _utils, get_worker_info

from budgeted.budgets import Epoch
from budgeted.randomness import SAMPLES, key_in, permutation, preserved, seed_cpu, seed_torch, stream
from budgeted.signals import STOP_SIGNALS

log = logging.getLogger("budgeted")


class Positioned(Dataset):
    """A map-style dataset seen through positions. Its samples may draw from random, numpy.random and torch.

    A dataset that says `torch_only = True` promises to draw from torch alone, and is spared seeding the others. One
    that has `groups`, 0 or 1 for each of its samples, gets batches of `batch` that are of one group where they can be.
    """

    def __init__(self, dataset: Any, seed: int, batch: int = 1) -> None:
        self.dataset, self.seed, self.n, self.batch = dataset, seed, len(dataset), batch
        self.groups = getattr(dataset, "groups", None)
        self.torch_only = bool(getattr(dataset, "torch_only", False))
        self._seed, self._stream = seed_torch if self.torch_only else seed_cpu, stream(seed, SAMPLES)
        self._orders: dict[int, Any] = {}

    def __getitems__(self, positions: list[int]) -> list[Any]:
        """The samples at `positions`; DataLoader asks for a batch at a time."""
        if get_worker_info() is not None:
            return [self[k] for k in positions]
        with preserved(self.torch_only):  # in the main process the model's draws must not follow the data's
            return [self[k] for k in positions]

    def __getitem__(self, position: int) -> Any:
        epoch, offset = divmod(position, self.n)
        index = int(self._order(epoch)[offset])
        self._seed(key_in(self._stream, position))
        return self.dataset[index]

    def _order(self, epoch: int) -> Any:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}  # a batch may straddle two
            order = permutation(self.seed, epoch, self.n)
            self._orders[epoch] = order if self.groups is None else grouped(order, self.groups, self.batch)
        return self._orders[epoch]


def grouped(order: np.ndarray, groups: np.ndarray, batch: int) -> np.ndarray:
    """`order` with each window of WINDOW batches sorted by group, one way and then the other: two neighbours share one.

    Where a sample goes depends on its window alone, so a run can still start anywhere.
    """
    window = np.arange(len(order)) // (WINDOW * batch)
    return order[np.lexsort((groups[order] ^ (window & 1), window))]


WINDOW = 8


class Batches:
    """Positions of each batch from iteration `start` to `stop`: this rank's share, in pieces of `micro`."""

    def __init__(self, epoch: Epoch, start: int, stop: int, rank: int = 0, world: int = 1, micro: int | None = None):
        self.epoch, self.start, self.stop = epoch, start, stop
        self.rank, self.world, self.micro = rank, world, micro

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield from self.pieces(step)

    def pieces(self, step: int) -> list[list[int]]:
        """The batches that iteration `step` is made of on this rank; none where there are fewer samples than ranks."""
        own = list(self.epoch.positions(step)[self.rank :: self.world])
        size = self.micro or len(own) or 1
        return [own[k : k + size] for k in range(0, len(own), size)]


def loader(
    dataset: Any,
    seed: int,
    batches: Batches,
    workers: int = 0,
    collate_fn: Callable | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader over `batches` of `dataset`. The same samples come for any number of `workers`."""
    return Loader(
        Positioned(dataset, seed, batches.epoch.batch),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
    )


class Loader(DataLoader):
    """torch's DataLoader with workers that leave signals to the trainer, and no draw from torch's own generator."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        # Making an iterator draws a base seed, from torch's own generator unless it is given another.
        super().__init__(dataset, worker_init_fn=start_worker, generator=torch.Generator(), **options)

    def check_worker_number_rationality(self) -> None:
        """torch's warning of more workers than cores comes from every loader of every run; ours once."""
        _say_many(self.num_workers)

    def __iter__(self) -> Any:
        # Workers start with these signals held, as torch's own handler would end one that is not set up yet.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if self.num_workers:
            _iterators.add(iterator)
        return iterator


@functools.cache
def _say_many(workers: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        log.info(
            "data.workers=%d on %d cores: data.workers=%d may be faster, with the same result", workers, cores, cores
        )


_iterators: weakref.WeakSet = weakref.WeakSet()  # those of this process that have workers
os.register_at_fork(after_in_child=_iterators.clear)


def start_worker(worker: int = 0) -> None:
    """In a data worker: leave signals to the trainer, and end with it however it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # torch's workers look for their parent every five seconds, and not while they read: Linux tells them at once.
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    trainer, forked = multiprocessing.parent_process(), multiprocessing.get_start_method() == "fork"
    if forked and trainer is not None and trainer.pid != os.getppid():  # killed before that, so nobody was told
        os._exit(1)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_workers() -> None:
    """End the data workers of this process at once, even those that hang; their iterators are of no use afterwards.

    torch would ask them to end, wait five seconds for each, and wait for ever where one had died with a lock in hand.
    """
    for iterator in list(_iterators):
        if not iterator._shutdown:
            iterator._shutdown = True  # torch has nothing left to do
            _utils.signal_handling._remove_worker_pids(id(iterator))  # nor to complain about
            iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
        for worker in iterator._workers:
            worker.join()
        if iterator._pin_memory:
            iterator._pin_memory_thread_done_event.set()
    _iterators.clear()


# Ahead of multiprocessing's own exit, which sends SIGTERM to data workers that are left and then waits for them.
atexit.register(end_workers)
