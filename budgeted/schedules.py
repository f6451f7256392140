"""Learning-rate schedules: pure functions of progress.

A schedule maps progress p = t/T in [0, 1) to the ratio of the learning rate to its base value ("Budgeted
Training", Eq. 1). It has no state and knows no horizon. f(0) = 1 unless it warms up; asking for p = 1 is
harmless. The training loop asks for f(t/T) before update t, so the last update uses f((T-1)/T).

    schedule = make("linear")
    schedule(0.25)              # 0.75

The objects are called like fvcore's `ParamScheduler` and drop into code that takes one.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgeted.errors import UserError, nearest
from budgeted.files import read_json


@dataclass(frozen=True)
class Schedule:
    """`factor(p)` multiplies the base learning rate; `momentum_at(p)`, where given, is the momentum itself."""

    name: str
    factor: Callable[[float], float]
    momentum_at: Callable[[float], float] | None = None
    constants: dict[str, Any] = field(default_factory=dict)

    def __call__(self, progress: float) -> float:
        return self.factor(progress)


def constant() -> Schedule:
    """f = 1."""
    return Schedule("constant", lambda p: 1.0)


def linear() -> Schedule:
    """f = 1 - p (Budgeted Training, Eq. 2). Not torch's `LinearLR`, which is a warm-up."""
    return Schedule("linear", lambda p: 1.0 - p)


def step(milestones: Sequence[float] = (1 / 3, 2 / 3), gamma: float = 0.1) -> Schedule:
    """f = gamma^(number of milestones <= p). Milestones are fractions of the budget, in (0, 1)."""
    marks = sorted(float(m) for m in milestones)
    _require(all(0 < m < 1 for m in marks), "milestones", milestones, "fractions of the budget in (0, 1)")
    _require(0 < gamma <= 1, "gamma", gamma, "in (0, 1]")
    # t/T may round to just below the milestone it stands for: 2/3 of 900 is 600, and 600/900 must count as passed.
    values = [gamma**k for k in range(len(marks) + 1)]
    return Schedule("step", lambda p: values[bisect.bisect_right(marks, p + 1e-12)])


def exp(gamma: float = 0.97, T0: float = 200) -> Schedule:
    """f = gamma^(T0 p): gamma per epoch of a full run of T0 epochs, stretched to the budget (BAC, Sec. 3)."""
    _require(0 < gamma <= 1, "gamma", gamma, "in (0, 1]")
    _require(T0 > 0, "T0", T0, "a positive number of epochs")
    return Schedule("exp", lambda p: gamma ** (T0 * p))


def poly(power: float = 0.9) -> Schedule:
    """f = (1-p)^power."""
    _require(power > 0, "power", power, "positive")
    return Schedule("poly", lambda p: max(0.0, 1.0 - p) ** power)


def cosine(eta: float = 0.0) -> Schedule:
    """f = eta + (1-eta)(1 + cos(pi p))/2 (Loshchilov & Hutter 2017)."""
    _require(0 <= eta < 1, "eta", eta, "in [0, 1)")
    return Schedule("cosine", lambda p: eta + (1 - eta) * 0.5 * (1 + math.cos(math.pi * p)))


def htd(L: float = -6.0, U: float = 3.0, eta: float = 0.0) -> Schedule:
    """f = eta + (1-eta)(1 - tanh(L + (U-L)p))/2 (Hsueh et al. 2019). Ends at (1 - tanh U)/2, not at 0."""
    _require(L < U, "L", L, "below U")
    _require(0 <= eta < 1, "eta", eta, "in [0, 1)")
    return Schedule("htd", lambda p: eta + (1 - eta) * 0.5 * (1 - math.tanh(L + (U - L) * p)))


def inverse(k: float = 9.0) -> Schedule:
    """f = 1/(1 + k p). The default k is ours: it ends at 1/10 (Fig. 2 of the paper draws k near 1000)."""
    _require(k >= 0, "k", k, "not negative")
    return Schedule("inverse", lambda p: 1.0 / (1.0 + k * p))


def rex() -> Schedule:
    """f = (1-p) / (1/2 + (1-p)/2), so f(1/2) = 2/3 (Chen et al. 2022). Copies with f(1/2) = .909 are not REX."""
    return Schedule("rex", lambda p: (1.0 - p) / (0.5 + 0.5 * (1.0 - p)))


def onecycle(low: float = 0.1, high_momentum: float = 0.95, low_momentum: float = 0.85) -> Schedule:
    """A triangle from `low` to 1 at p = 1/2 and back; the momentum goes the other way (Smith & Topin 2017).

    Constants as in REX's comparison: low 0.1, momentum .95 to .85.
    """
    _require(0 <= low < 1, "low", low, "in [0, 1)")
    for key, value in (("high_momentum", high_momentum), ("low_momentum", low_momentum)):
        _require(0 <= value < 1, key, value, "in [0, 1)")
    height = lambda p: 1.0 - abs(2.0 * p - 1.0)  # noqa: E731
    return Schedule(
        "onecycle",
        lambda p: low + (1 - low) * height(p),
        lambda p: high_momentum - (high_momentum - low_momentum) * height(p),
    )


def knee(explore: float = 0.5) -> Schedule:
    """1 until p = `explore`, then linearly to 0 (Iyer et al. 2023)."""
    _require(0 <= explore < 1, "explore", explore, "in [0, 1)")
    return Schedule("knee", lambda p: 1.0 if p < explore else (1.0 - p) / (1.0 - explore))


# q is the progress of the cooldown, floor the value that "exp" ends at (Haegele et al. 2024).
COOLDOWNS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda q, floor: 1.0 - q,
    "sqrt": lambda q, floor: 1.0 - math.sqrt(q),
    "cosine": lambda q, floor: 0.5 * (1 + math.cos(math.pi * q)),
    "mirror": lambda q, floor: 2 * (1 - q) - 0.5 * (1 + math.cos(math.pi * q)),
    "square": lambda q, floor: 1.0 - q * q,
    "exp": lambda q, floor: floor**q,
}


def wsd(fraction: float = 0.2, shape: str = "sqrt", floor: float = 0.01) -> Schedule:
    """1, then a cooldown over the last `fraction` of the budget (Haegele et al. 2024).

    `floor` is where shape "exp" ends; the others end at 0.
    """
    _require(0 < fraction <= 1, "fraction", fraction, "in (0, 1]")
    if shape not in COOLDOWNS:
        raise UserError(f"schedule.shape={shape}: no such cooldown; {nearest(str(shape), COOLDOWNS)}")
    _require(0 < floor < 1, "floor", floor, "in (0, 1)")
    cool, start = COOLDOWNS[shape], 1.0 - fraction
    return Schedule("wsd", lambda p: 1.0 if p < start else cool(min(1.0, (p - start) / fraction), floor))


def sgdr(first: float = 0.05, mult: float = 2.0) -> Schedule:
    """Cosine periods of lengths c, cm, cm^2 ... as fractions of the budget (Loshchilov & Hutter 2017).

    Defaults: periods of 10, 20, 40 ... epochs of a 200-epoch run; such a run ends in the middle of a period.
    """
    _require(0 < first <= 1, "first", first, "a fraction of the budget in (0, 1]")
    _require(mult >= 1, "mult", mult, "at least 1")
    starts, lengths = [0.0], [first]
    while starts[-1] + lengths[-1] < 1:
        _require(len(starts) < 100_000, "first", first, "longer: it makes more than 100,000 periods")
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * mult)

    def factor(p: float) -> float:
        k = bisect.bisect_right(starts, p + 1e-12) - 1
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, p - starts[k]) / lengths[k])))

    return Schedule("sgdr", factor)


def uba(phi: float = 1.0) -> Schedule:
    """f = 2(1+cos(pi p)) / (2 phi + (2-phi)(1+cos(pi p))) (Tang et al. 2025); phi = 2 is the cosine.

    The default phi is ours: the published ones were not found.
    """
    _require(0 < phi <= 2, "phi", phi, "in (0, 2]")

    def factor(p: float) -> float:
        c = 1 + math.cos(math.pi * p)
        return 2 * c / (2 * phi + (2 - phi) * c)

    return Schedule("uba", factor)


def table(values: Sequence[float], name: str = "table", hold: bool = False) -> Schedule:
    """Values at p = 0, 1/n ... (n-1)/n, and 0 at p = 1: interpolated between them, or held when `hold`."""
    v = [float(x) for x in values]
    _require(bool(v) and all(map(math.isfinite, v)), "values", values, "finite numbers")
    n = len(v)
    v.append(v[-1] if hold else 0.0)

    def factor(p: float) -> float:
        x = min(max(p, 0.0), 1.0) * n
        k = min(int(x + 1e-9), n - 1)
        return v[k] if hold else v[k] + (x - k) * (v[k + 1] - v[k])

    return Schedule(name, factor)


def refined(run: str = "", power: int = 2, smooth: float = 0.1) -> Schedule:
    """The schedule that the gradient norms of an earlier run suggest (Defazio et al. 2023).

    `run`: the directory of a run trained with `grad_norm=true`. `power`: 2 for SGD, 1 for Adam.
    """
    return table(refined_values(_column(run, "grad_norm"), power, smooth), "refined")


def replay(run: str = "") -> Schedule:
    """The rates that an earlier run applied, step by step: how a clock budget is repeated by iteration.

    Warm-up and hold are in the recorded rates already, so neither is applied on top of it.
    """
    if [row.get("step") for row in _rows(run)] != list(range(len(_rows(run)))):
        raise UserError(f"schedule.run={run}: it logged too few steps; train it anew with log_every=1 and another out=")
    base = _base_rate(run)
    made = table([rate / base for rate in _column(run, "lr")], "replay", hold=True)
    if "momentum" not in _rows(run)[0]:
        return made
    return Schedule("replay", made.factor, table(_column(run, "momentum"), hold=True).factor)


def warmup(schedule: Schedule, fraction: float, start: float = 0.0) -> Schedule:
    """`schedule` times a ramp from `start` to 1 over the first `fraction` of the budget."""
    _require(0 <= fraction < 1, "warmup.fraction", fraction, "in [0, 1)")
    _require(0 <= start <= 1, "warmup.factor", start, "in [0, 1]")
    if fraction == 0:
        return schedule
    inner = schedule.factor

    def factor(p: float) -> float:
        return inner(p) * (start + (1 - start) * p / fraction) if p < fraction else inner(p)

    return Schedule(schedule.name, factor, schedule.momentum_at, schedule.constants)


def hold(schedule: Schedule, updates: int) -> Schedule:
    """`schedule` sampled only `updates` times over the run, at p = 0, 1/n ... (n-1)/n (REX's sampling rate)."""
    _require(isinstance(updates, int) and updates >= 1, "hold", updates, "a positive whole number")
    sample = lambda p: math.floor(p * updates + 1e-9) / updates  # noqa: E731
    inner, momentum = schedule.factor, schedule.momentum_at
    return Schedule(
        schedule.name,
        lambda p: inner(sample(p)),
        None if momentum is None else lambda p: momentum(sample(p)),
        schedule.constants,
    )


def refined_values(norms: Sequence[float], power: int = 2, smooth: float = 0.1) -> list[float]:
    """Refined ratios for gradient norms G_t of an earlier run (Defazio et al. 2023), one per norm, maximum 1.

    Weights w_t = G_t^-power of the median-smoothed norms (power 2 for SGD and L2 norms, 1 for Adam and L1
    norms); value_t is proportional to w_t * sum_{s>=t} w_s. The sum takes in s = t, where the paper's starts
    after it: so constant norms give exactly 1 - t/T, and the last update is not wasted on a rate of 0.
    """
    g = [float(x) for x in norms]
    ok = len(g) >= 2 and all(math.isfinite(x) and x > 0 for x in g)
    _require(ok, "run", f"{len(g)} gradient norms", "at least 2 finite positive ones")
    g = g[:: math.ceil(len(g) / 2000)]
    half = int(smooth * len(g) / 2)
    padded = [g[0]] * half + g + g[::-1][:half]
    w = [statistics.median(padded[i : i + 2 * half + 1]) ** -power for i in range(len(g))]
    remaining = list(itertools.accumulate(reversed(w)))[::-1]
    values = [a * b for a, b in zip(w, remaining, strict=True)]
    return [x / max(values) for x in values]


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        constant,
        linear,
        step,
        exp,
        poly,
        cosine,
        htd,
        inverse,
        rex,
        onecycle,
        knee,
        wsd,
        sgdr,
        uba,
        refined,
        replay,
    )
}


def make(name: str, **constants: Any) -> Schedule:
    """The schedule `name` with its constants; a constant of None keeps its default.

    Raises UserError for an unknown name or constant, a value of the wrong type or out of its range.
    """
    if name not in SCHEDULES:
        hint = f"{nearest(name, SCHEDULES)} (a new one is a function listed in SCHEDULES of {__file__})"
        raise UserError(f"schedule={name}: no such schedule; {hint}")
    given = {k: v for k, v in constants.items() if v is not None}
    parameters = inspect.signature(SCHEDULES[name]).parameters
    for key, value in given.items():
        if key not in parameters:
            hint = nearest(key, parameters) if parameters else f"{name} has no constants"
            raise UserError(f"schedule.{key}: {name} takes no such constant; {hint}")
        wanted = parameters[key].default
        if isinstance(wanted, float | int) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"schedule.{key}={value}: must be a number")
    try:
        made = SCHEDULES[name](**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule={name}: {error}") from None
    for key, value in given.items():
        _require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    return Schedule(made.name, made.factor, made.momentum_at, given)


def _rows(run: str) -> list[dict[str, Any]]:
    path = Path(run) / "metrics.jsonl"
    if not run or not path.is_file():
        raise UserError(f"schedule.run={run or 'null'}: no metrics.jsonl there; give the directory of an earlier run")
    if (read_json(path.with_name("result.json")) or {}).get("status") != "done":
        raise UserError(f"schedule.run={run}: that run is not done; let it end first")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if "eval" not in row and isinstance(row, dict)]
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"schedule.run={run}: its metrics.jsonl cannot be read") from None
    if not rows:
        raise UserError(f"schedule.run={run}: its metrics.jsonl holds no step")
    return rows


def steps_of(run: str) -> int:
    """How many steps an earlier run logged. Raises UserError."""
    return len(_rows(run))


def _column(run: str, key: str) -> list[float]:
    try:
        return [float(row[key]) for row in _rows(run)]
    except (KeyError, TypeError, ValueError):
        extra = "; train it anew with grad_norm=true and another out=" if key == "grad_norm" else ""
        raise UserError(f"schedule.run={run}: its metrics.jsonl has no {key} at some step{extra}") from None


def _base_rate(run: str) -> float:
    """The rate that the run's schedule multiplied: its optimizer's own, or its task's."""
    import yaml

    _rows(run)
    try:
        cfg = yaml.safe_load((Path(run) / "config.yaml").read_text())
        own = cfg["optimizer"]["lr"]
        rate = float(cfg["task"]["lr"] if own is None else own)
        if rate > 0:
            return rate
        raise ValueError(rate)
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        raise UserError(f"schedule.run={run}: its config.yaml does not say the base learning rate") from None


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"schedule.{key}={value}: must be {rule}")
