"""The pictures of the report: one function per kind, each from a Grid or curves to PNG bytes.

matplotlib is imported inside and used without pyplot, so nothing here is global and no figure stays behind.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.results import Curve
from benchmarks.tables import AXES, ORDER, PAIR, Grid, baseline, compare, full_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Drawn once, black on white: the page multiplies a picture into its paper, or inverts it and screens it in the dark.
PAPER, INK, MUTED, RULE = "#ffffff", "#1d2127", "#666b73", "#dcdcdc"
# Okabe and Ito's palette, told apart by colour-blind readers; the grey stands for their black.
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#1f78b4", "#d55e00", "#009e73", "#c06a9c", "#e69f00", "#56b4e9", "#8a8f98",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)


class Look(NamedTuple):
    """How a schedule is drawn. Marker and dash say what colour does: grey print keeps them."""

    colour: str
    dash: Any  # as matplotlib takes it
    marker: str
    hollow: bool = False


STYLE = {
    "linear": Look(BLUE, "-", "o"), "uba": Look(BLUE, "--", "o", True),
    "step": Look(RED, "-", "s"), "sgdr": Look(RED, "--", "s", True),
    "cosine": Look(GREEN, "-", "^"), "wsd": Look(GREEN, "--", "^", True),
    "rex": Look(PURPLE, "-", "D"), "htd": Look(PURPLE, "--", "D", True),
    "knee": Look(SKY, "-", "v"), "poly": Look(SKY, "--", "v", True),
    "onecycle": Look(ORANGE, "-", "P"), "exp": Look(ORANGE, "--", "P", True),
    "refined": Look(GREY, "-", "X"), "inverse": Look(GREY, "--", "X", True), "constant": Look(GREY, ":", "*"),
}  # fmt: skip
OTHER_DASHES: tuple[Any, ...] = ("-.", (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1)))
OTHER_MARKERS = ("<", ">", "d", "X", "P", "*")  # those that differ at four points
WIDE, TALL, DPI = 5.9, 3.9, 120
LABELS = 20  # at most so many lines carry a name
NAME = 40  # characters of a schedule's name in a picture: two or three constants fit


def style(schedule: str) -> Look:
    """The look of a schedule, the same in every picture and every report.

    One with constants ("onecycle pct_start=0.3") has the colour of its kind, and dash and marker of its own.
    """
    if schedule in STYLE:
        return STYLE[schedule]
    number = zlib.crc32(schedule.encode("utf-8", "replace"))
    number, colour = divmod(number, len(COLOURS))
    number, dash = divmod(number, len(OTHER_DASHES))
    number, marker = divmod(number, len(OTHER_MARKERS))
    kind = STYLE.get(schedule.split(" ")[0])
    return Look(kind.colour if kind else COLOURS[colour], OTHER_DASHES[dash], OTHER_MARKERS[marker], bool(number % 2))


def plain(text: str, limit: int = 24) -> str:
    """Text that matplotlib draws as it is: no math mode. A long one loses its middle: names differ at their ends."""
    half = (limit - 1) // 2
    return (text if len(text) <= limit else f"{text[: limit - 1 - half]}…{text[-half:]}").replace("$", r"\$")


def _axes(height: float = TALL, right: float = 0.80) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.105, 0.56 / height, right - 0.105, 1 - 0.84 / height), facecolor=PAPER)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=8, length=3, width=0.8, which="both")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=MUTED, fontsize=8.5)
    axes.set_title(y, loc="left", color=INK, fontsize=9, pad=7)


def png(figure: Figure) -> bytes:
    """The picture as PNG, as much wider as its longest name needs; without metadata: equal data give equal bytes."""
    from matplotlib.transforms import Bbox

    whole = Bbox.union([Bbox.from_bounds(0, 0, *figure.get_size_inches()), figure.get_tightbbox().padded(0.05)])
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", bbox_inches=whole, metadata={"Software": None}, pil_kwargs={"compress_level": 4}
    )
    return buffer.getvalue()


def _line(axes: Axes, schedule: str, x: Any, y: Any, main: bool = True, **more: Any) -> None:
    """A schedule's line in its look; in a crowd all but the main ones are thin."""
    colour, dash, marker, hollow = style(schedule)
    axes.plot(
        x, y, linestyle=dash, color=colour, linewidth=1.9 if main else 1.1, marker=marker,
        markersize=4.4 if main else 3.6, markerfacecolor=PAPER if hollow else colour, markeredgewidth=0.8,
        zorder=3 if main else 2, **more,
    )  # fmt: skip


def spread(heights: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Heights moved apart to at least `gap` (less if they do not fit), kept in order and in [low, high].

    heights: any order; the answer is in the same order.
    """
    n = len(heights)
    gap = min(gap, (high - low) / max(1, n - 1))
    order = np.argsort(heights, kind="stable")
    places = np.array(heights, dtype=float)[order] - gap * np.arange(n)
    blocks: list[list[float]] = []  # pooled neighbours: [mean, size]
    for place in places:
        blocks.append([float(place), 1.0])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, size = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * size) / (blocks[-1][1] + size), blocks[-1][1] + size]
    pooled = np.concatenate([np.full(int(size), mean) for mean, size in blocks]) if blocks else places
    pooled = np.clip(pooled, low, high - gap * (n - 1)) + gap * np.arange(n)
    answer = np.empty(n)
    answer[order] = pooled
    return [float(v) for v in answer]


def _direct_labels(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Names at the right edge, each joined to the end (x, y) of its line."""
    ends = dict(list(ends.items())[:LABELS])
    to_axes = axes.transData + axes.transAxes.inverted()
    starts = {name: to_axes.transform(end) for name, end in ends.items()}
    size = 8.5 if len(ends) <= 12 else 7
    gap = size * 1.25 / (axes.get_position().height * TALL * 72)
    heights = spread([float(y) for _, y in starts.values()], gap, -0.02, 1.02)
    for (name, (x, y)), height in zip(starts.items(), heights, strict=True):
        axes.plot(
            (x + 0.008, 1.03), (y, height),
            transform=axes.transAxes, color=style(name).colour, linewidth=0.6, clip_on=False,
        )  # fmt: skip
        _line(
            axes, name, (1.03, 1.065, 1.10), (height,) * 3, False,
            transform=axes.transAxes, clip_on=False, markevery=(1, 2),
        )  # fmt: skip
        axes.text(
            1.115, height, plain(name, NAME), color=INK, fontsize=size, va="center",
            weight="bold" if name in ORDER[:2] else "normal", transform=axes.transAxes,
        )  # fmt: skip


def _budget_axis(axes: Axes, grid: Grid, budgets: Sequence[str]) -> None:
    places = [grid.position[b] for b in budgets]
    axes.set_xscale("log")
    axes.minorticks_off()
    span = math.log(max(places) / min(places)) or 1.0
    shown: list[tuple[float, str]] = []
    for budget, place in zip(budgets, places, strict=True):
        label = plain(budget, 10)
        wide = 0.01 + 0.0087 * (len(label) + len(shown[-1][1])) if shown else 0.0  # of the axis, at 8 points
        if not shown or math.log(place / shown[-1][0]) / span >= wide:
            shown.append((place, label))
    axes.set_xticks([p for p, _ in shown], [t for _, t in shown])
    axes.set_xlim(min(places) / math.exp(0.04 * span), max(places) * math.exp(0.02 * span))


def drawable(grid: Grid) -> list[str]:
    """The budgets that have a place on the axis and a finished run."""
    has = {b for (_, b), q in grid.squares.items() if q.values}
    return [b for b in grid.budgets if b in has and grid.position[b] > 0]


def budget_curve(grid: Grid) -> bytes:
    """The metric (%) against the budget, a line per schedule, a band of one standard deviation over seeds, and where
    90% of the best full-budget mean lies (Figure 1 of the paper)."""
    figure, axes = _axes()
    budgets, ends = drawable(grid), {}
    crowd, banded, lowest = len(grid.schedules) > 6, False, math.inf
    for schedule in reversed(grid.schedules):
        found = [(grid.position[b], grid.squares[schedule, b].summary) for b in budgets]
        found = [(x, s) for x, s in found if s.n]
        if not found:
            continue
        x = np.array([x for x, _ in found])
        mean = 100 * np.array([s.mean for _, s in found])
        std = 100 * np.array([0.0 if math.isnan(s.std) else s.std for _, s in found])
        main = schedule in ORDER[:2] or not crowd
        _line(axes, schedule, x, mean, main)
        if main and std.any():
            axes.fill_between(x, mean - std, mean + std, color=style(schedule).colour, alpha=0.18, linewidth=0)
            banded = True
        ends[schedule] = (float(x[-1]), float(mean[-1]))
        lowest = min(lowest, float(mean.min()))
    _budget_axis(axes, grid, budgets)
    notes = ["band: ± std"] * banded
    if (full := full_value(grid)) and lowest < 90 * full:
        axes.axhline(90 * full, color=MUTED, linewidth=0.9, dashes=(4, 3))
        notes.append("dashed: 90% of the best at 100%")
    _name(axes, AXES[grid.family], f"{plain(grid.metric)}, %" + (f" ({'; '.join(notes)})" if notes else ""))
    _direct_labels(axes, dict(reversed(ends.items())))
    return png(figure)


def reference(grid: Grid) -> str:
    """The schedule that differences are drawn above: step, the paper's rival, or else the baseline of the table."""
    return PAIR[1] if PAIR[1] in grid.schedules else baseline(grid)


def gain_curve(grid: Grid) -> bytes:
    """Paired difference to `reference` in percentage points against the budget; a band is a 95% interval of the mean.

    Two seeds have no band: their interval, in the table, is 12.7 standard errors wide and would flatten all else.
    """
    figure, axes = _axes()
    budgets, ends = drawable(grid), {}
    crowd, banded = len(grid.schedules) > 6, False
    base = reference(grid)
    rivals = [s for s in grid.schedules if s != base]
    foremost = PAIR[0] if PAIR[0] in rivals else rivals[0]
    axes.axhline(0, color=style(base).colour, linewidth=1.9)
    for schedule in reversed(rivals):
        verdict = compare(grid, schedule, base)
        found = [(grid.position[b], d) for b in budgets if verdict and (d := verdict.differences.get(b))]
        if not found:
            continue
        x, mean = np.array([x for x, _ in found]), 100 * np.array([d.mean for _, d in found])
        _line(axes, schedule, x, mean, schedule == foremost or not crowd)
        if schedule == foremost:
            ends_of = [(d.low, d.high) if d.n > 2 else (math.nan, math.nan) for _, d in found]
            low, high = 100 * np.array(ends_of).T
            axes.fill_between(x, low, high, color=style(schedule).colour, alpha=0.18, linewidth=0)
            banded = not np.isnan(low).all()
        ends[schedule] = (float(x[-1]), float(mean[-1]))
    ends[base] = (grid.position[budgets[-1]], 0.0)
    _budget_axis(axes, grid, budgets)
    whose = f" of {plain(foremost, NAME)}" if len(rivals) > 1 else ""
    band = f" (band: 95% interval{whose})" if banded else ""
    _name(axes, AXES[grid.family], f"{plain(grid.metric)}, points above {plain(base, NAME)}{band}")
    _direct_labels(axes, dict(reversed(ends.items())))
    return png(figure)


def _binned(progress: np.ndarray, values: np.ndarray, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Means of values in equal bins of progress, without empty ones. Shapes (n,), (n,) -> (m,), (m,), m <= bins."""
    known = np.isfinite(values)
    index = np.minimum((progress[known] * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    total = np.bincount(index, weights=values[known], minlength=bins)
    used = count > 0
    return (np.nonzero(used)[0] + 0.5) / bins, total[used] / count[used]


def rate_curve(curves: Mapping[str, Curve]) -> bytes:
    """Learning rate against progress, a line per schedule: by its formula, else as logged (one run each)."""
    return _progress_curve(curves, "lr", "learning rate")


def loss_curve(curves: Mapping[str, Curve]) -> bytes:
    """Training loss against progress, means over hundredths of the run; where fewer steps were logged, at those."""
    few = max(len(curve.progress) for curve in curves.values()) < 100
    return _progress_curve(curves, "loss", f"training loss, {'logged steps' if few else 'mean over 1% of the run'}")


def _progress_curve(curves: Mapping[str, Curve], field: str, title: str) -> bytes:
    figure, axes = _axes()
    crowd, ends, seen = len(curves) > 6, {}, []
    for place, (schedule, curve) in reversed(list(enumerate(curves.items()))):
        x, y = np.array(curve.progress), np.array(getattr(curve, field), dtype=float)
        if field == "lr" and curve.rates:
            x, y = (np.array(values) for values in curve.rates)
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        if field == "loss":
            x, y = _binned(x, y)
        if not x.size:
            continue
        main = schedule in ORDER[:2] or not crowd
        every = max(1, len(x) // 8)
        _line(axes, schedule, x, y, main, markevery=(every * place // len(curves), every))  # beside each other
        ends[schedule] = (float(x[-1]), float(y[-1]))
        seen.append(y)
    values = np.concatenate(seen) if seen else np.ones(1)
    if field == "loss" and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "25%", "50%", "75%", "100%"))
    _name(axes, "progress through the budget", title)
    _direct_labels(axes, dict(reversed(ends.items())))
    return png(figure)


def heat_map(grid: Grid, rows: int = 40, columns: int = 14) -> bytes:
    """schedule x budget: the number is the mean in %, the colour how far it is below the best of its budget (pp).

    A mean over other seeds than the others' has no colour.
    """
    from matplotlib.colors import PowerNorm

    finished = np.flatnonzero(~np.isnan(grid.means()).all(axis=1))[:rows]
    schedules, budgets = [grid.schedules[k] for k in finished], grid.budgets[:columns]
    means = 100 * grid.means()[finished, :columns]
    gap = 100 * grid.gaps()[finished, :columns]
    best = {budget: grid.best(budget) for budget in budgets}
    figure, axes = _axes(height=1.15 + 0.235 * len(schedules), right=0.86)
    box = axes.get_position()
    axes.set_position((0.17, box.y0, 0.69, box.height))
    top = max(0.5, float(np.nanpercentile(gap, 90)) if np.isfinite(gap).any() else 0.5)
    colours = _sequential()
    norm = PowerNorm(0.5, 0, top, clip=True)
    image = axes.pcolormesh(np.ma.masked_invalid(gap), cmap=colours, norm=norm, edgecolors=PAPER, linewidth=1.5)
    for (i, j), value in np.ndenumerate(means):
        missing, compared = math.isnan(value), not math.isnan(gap[i, j])
        dark = compared and sum(colours(norm(gap[i, j]))[:3]) < 1.6
        ink = "#ffffff" if dark else "#16191d" if compared else MUTED
        weight = "bold" if schedules[i] in best[budgets[j]] else "normal"
        axes.text(
            j + 0.5,
            i + 0.5,
            "—" if missing else f"{value:.1f}",
            ha="center",
            va="center",
            color=ink,
            fontsize=8,
            weight=weight,
        )
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xticks(np.arange(len(budgets)) + 0.5, [plain(b, 10) for b in budgets])
    axes.set_yticks(np.arange(len(schedules)) + 0.5, [plain(s, NAME) for s in schedules])
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    other = "; none: other seeds" if np.any(np.isnan(gap) & ~np.isnan(means)) else ""
    _name(axes, AXES[grid.family], f"{plain(grid.metric)}, % (colour: points below the best of the budget{other})")
    _colour_bar(figure, axes, image, top)
    return png(figure)


def _sequential() -> Any:
    """Blue where it is the best of its budget, fading into the page: even in lightness, so it survives grey print."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = ("#1b5e94", "#5b96c2", "#a9c9e0", "#ececec")
    return LinearSegmentedColormap.from_list("gap", stops)


def _colour_bar(figure: Figure, axes: Axes, image: Any, top: float) -> None:
    box = axes.get_position()
    height = min(box.height, 0.5 * TALL / figure.get_figheight() * 0.8)
    bar = figure.colorbar(image, cax=figure.add_axes((0.885, box.y1 - height, 0.018, height)), extend="max")
    bar.outline.set_visible(False)
    bar.ax.invert_yaxis()
    bar.set_ticks((0, top / 4, top), labels=("0", f"{top / 4:.1f}", f"{top:.1f}"))
    bar.ax.tick_params(colors=MUTED, labelsize=7.5, length=2)
