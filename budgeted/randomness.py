"""Randomness as a function of (seed, position) and (seed, step): there is no generator state to save."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import numpy as np
import torch

SAMPLES, STEPS, EVALUATION = 1, 2, 3  # what a key is for: equal numbers of different streams must not collide
_MASK = (1 << 64) - 1


_START = 0x9E3779B97F4A7C15


def key(*numbers: int) -> int:
    """A 63-bit hash of whole numbers (rounds of splitmix64): equal inputs give equal seeds on any machine."""
    return stream(*numbers) >> 1


def stream(*numbers: int) -> int:
    """What key(*numbers, k) has in common for all k: key_in(stream(*numbers), k) is the same, sooner."""
    return reduce(_mixed, numbers, _START)


def key_in(stream: int, k: int) -> int:
    """The key of number `k` in a stream."""
    return _mixed(stream, k) >> 1


def _mixed(state: int, number: int) -> int:
    state = (state + (number & _MASK) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def seed_all(*numbers: int) -> None:
    """Seed random, numpy.random and torch (the CPU, and the GPU where one is in use) from `key(*numbers)`."""
    value = key(*numbers)
    seed_cpu(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def seed_cpu(value: int) -> None:
    """Seed random, numpy.random and torch's CPU generator: samples are made there, and the GPU's is the model's."""
    seed_torch(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def seed_torch(value: int) -> None:
    """Seed torch's CPU generator alone: 2 microseconds, where all of them take 15 (torch.manual_seed takes 400)."""
    torch.default_generator.manual_seed(value)


@contextmanager
def preserved(torch_only: bool = False) -> Iterator[None]:
    """Put the CPU generators (or torch's alone) back as they were found. What runs inside seeds them first.

    numpy's gives way to a spare one, as copying its state twice takes longer than many a sample (80 microseconds). The
    second of two normal numbers, which numpy may hold ready, is lost by that.
    """
    mine = torch.get_rng_state()
    others = None if torch_only else (random.getstate(), np.random.get_bit_generator())  # type: ignore[attr-defined]
    if others:
        np.random.set_bit_generator(spare := _spares.pop() if _spares else np.random.MT19937())  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_rng_state(mine)
        if others:
            random.setstate(others[0])
            np.random.set_bit_generator(others[1])  # type: ignore[attr-defined]
            _spares.append(spare)


_spares: list[np.random.BitGenerator] = []  # one for each depth of `preserved` that has been


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of range(n), a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(key=key(seed, epoch))).permutation(n)
