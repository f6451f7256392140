"""From entries to tables: grids of schedule x budget, comparisons, sentences, costs. Pure: no drawing, no HTML."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.published import RECIPES, Published, beside, notes
from benchmarks.results import BadFile, Entry, amount, cell_of, clean, written
from benchmarks.statistics import Summary, mean_ranks, paired, summarize
from tasks import tiny

PAIR = ("linear", "step")  # the comparison of the paper
ORDER = (
    "linear", "step", "constant", "exp", "poly", "cosine", "htd", "inverse", "rex", "onecycle",
    "knee", "wsd", "sgdr", "uba", "refined",
)  # fmt: skip
CONF = Path(__file__).parent.parent / "conf"
MOST_COMPARED = 6  # rows of differences below a table
MOST_LISTED = 6  # schedules, runs or places in a remark
ALIKE = 0.05  # iterations that differ by less are called the same
LEAF = 400  # characters of a value that are kept: a path's end tells it from others
CONFIGS = 2000  # different configurations that are read at most
AXES = {
    "fraction": "budget, share of the full run",
    "clock": "budget, training minutes",
    "gpuh": "budget, GPU-hours",
    "flop": "budget, training FLOPs",
}


class Departure(NamedTuple):
    """A value other than the named recipe's; named is "" where the recipe has no such key."""

    key: str
    value: str
    named: str

    def __str__(self) -> str:
        return f"{self.key} {clean(self.value, 80)}" + (f" ({clean(self.named, 80)})" if self.named else "")


@dataclass(slots=True)
class Square:
    """The runs of one schedule at one budget. values: seed -> metric; states: count of the unfinished by state.

    seeds: those that should be here; begun: those of the unfinished.
    """

    values: dict[int, float] = field(default_factory=dict)
    runs: list[Entry] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    summary: Summary = summarize(())
    published: Published | None = None
    seeds: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)

    @property
    def missing(self) -> int:
        """Seeds that should be here and neither finished nor left a state."""
        return len(self.seeds - self.begun - {run.cell.seed for run in self.runs})


@dataclass(slots=True)
class Grid:
    """One metric of one recipe: squares[schedule, budget]. metric is "" while no run is finished.

    A schedule is called by its name and by what departs in its constants: "exp gamma=0.99".
    """

    task: str
    optimizer: str
    metric: str
    rule: str
    family: str  # fraction, clock, gpuh or flop: the axis the budgets lie on
    schedules: list[str]  # best first, then those with gaps
    budgets: list[str]  # as written, smallest first
    position: dict[str, float]  # budget -> place on the axis, NaN if no run says
    seeds: list[int]  # the union over all squares
    squares: dict[tuple[str, str], Square]
    departures: tuple[Departure, ...] = ()  # from the named recipe, the same for all runs
    data: str = ""  # the data set in words, where the task has runs on several

    @property
    def title(self) -> str:
        """Name for a heading."""
        altered = ", altered" if self.departures else ""
        return self.task + altered + (f", {self.data}" if self.data else "")

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The results of all its finished runs."""
        return [run.result for square in self.squares.values() for run in square.runs if run.result]

    @property
    def full_title(self) -> str:
        """Name where nothing around it says what is altered."""
        return self.title.replace(", altered", f" (altered: {self.altered()})", 1) if self.departures else self.title

    def altered(self, most: int = 3) -> str:
        """The first departures in a few words, "" for a named recipe."""
        shown = ", ".join(f"{d.key} {clean(d.value, 80)}" for d in self.departures[:most])
        return shown + (f" and {more} more" if (more := len(self.departures) - most) > 0 else "")

    def means(self) -> np.ndarray:
        """Mean over seeds, shape (schedules, budgets), NaN where missing."""
        rows = [[self.squares[s, b].summary.mean for b in self.budgets] for s in self.schedules]
        return np.array(rows, dtype=float).reshape(len(self.schedules), len(self.budgets))

    def comparable(self, budget: str) -> dict[str, float]:
        """schedule -> mean at this budget, of those with all the seeds that any has there.

        Means over other seeds are not compared."""
        squares = {s: self.squares[s, budget] for s in self.schedules}
        seeds = set().union(*(square.values for square in squares.values()))
        return {s: q.summary.mean for s, q in squares.items() if seeds and set(q.values) == seeds}

    def best(self, budget: str) -> set[str]:
        """The schedules with the highest comparable mean at this budget, empty with fewer than two to compare."""
        means = self.comparable(budget)
        return {s for s, m in means.items() if m == max(means.values())} if len(means) > 1 else set()

    def ranks(self) -> dict[str, float]:
        """schedule -> mean rank over the budgets where there is something to compare, NaN unless it is comparable at
        each of them."""
        columns = [means for b in self.budgets if len(means := self.comparable(b)) > 1]
        scores = np.array([[c.get(s, math.nan) for c in columns] for s in self.schedules], dtype=float)
        found = mean_ranks(scores.reshape(len(self.schedules), len(columns)))
        return dict(zip(self.schedules, map(float, found), strict=True))

    def gaps(self) -> np.ndarray:
        """How far a comparable mean is below the best of its budget, shape (schedules, budgets), NaN elsewhere."""
        gap = np.full((len(self.schedules), len(self.budgets)), math.nan)
        for column, budget in enumerate(self.budgets):
            means = self.comparable(budget)
            for row, schedule in enumerate(self.schedules):
                if schedule in means and len(means) > 1:
                    gap[row, column] = max(means.values()) - means[schedule]
        return gap


# ---- grids


def grids(entries: Iterable[Entry]) -> tuple[list[Grid], list[Entry]]:
    """The grids of the reported metrics, and the finished runs that no grid can hold, with the reason in `note`.

    Runs are pooled by what departs from the named recipe, apart from schedule, budget and seed, and by their data set.
    Real data come before embedded; among each, named recipes before altered ones, then by name. Where sweeps say what
    was asked for, each square expects that and what is there; else every seed that finished in its grid. A schedule
    that was only tried, and failed, has no row.
    """
    entries = list(entries)
    recorded = any(e.asked is not None for e in entries)
    groups, left = by_recipe(entries)
    made = []
    embedded = {key: is_embedded(*key[:2], [e.result for e in runs if e.result]) for key, runs in groups.items()}
    for key in sorted(groups, key=lambda key: (embedded[key], bool(key[1]), _place(key[0]), key)):
        if rows := _without_tries(groups[key]):
            task, departures, data = key
            made += [replace(grid, data=data) for grid in _recipe_grids(task, departures, rows, recorded)]
    return made, left


def is_embedded(task: str, departures: Iterable[Departure], runs: Iterable[dict[str, Any]]) -> bool:
    """Whether these runs are of generated data: a *_tiny task may have been given others by data.root."""
    if not task.endswith("_tiny") or any(d.key == DATA for d in departures):
        return False
    found = {run["data.digest"] for run in runs} - {None, ""}
    return not found or task not in tiny.COUNTS or found <= {tiny.digest(task)}


def _without_tries(entries: list[Entry]) -> list[Entry]:
    """The entries, but not those of a schedule all of whose runs failed and that no sweep asked for."""
    tried = {e.cell.schedule for e in entries}
    tried -= {e.cell.schedule for e in entries if e.state not in ("failed", "died") or e.asked is not None}
    return [e for e in entries if e.cell.schedule not in tried]


def _place(task: str) -> tuple[int, str]:
    """Sorting key: the paper's tasks in its order, then by name."""
    known = list(RECIPES)
    return (known.index(task) if task in known else len(known), task)


def _recipe(entry: Entry) -> tuple[str, str, str]:
    result = entry.result
    return (result["optimizer"], result["reported.metric"], result["reported.rule"]) if result else ("", "", "")


def _recipe_grids(task: str, departures: tuple[Departure, ...], entries: list[Entry], recorded: bool) -> list[Grid]:
    """One grid per metric, rule and axis; unfinished runs, where these are not known, go with the most common ones."""
    recipes = Counter(_recipe(e) for e in entries if e.result)
    common = recipes.most_common(1)[0][0] if recipes else ("", "", "")
    parts: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        try:
            family, _ = amount(entry.cell.budget)
        except BadFile:
            continue
        parts[(_recipe(entry) if entry.result else common), family].append(entry)
    order = sorted(parts, key=lambda k: (-recipes[k[0]], list(AXES).index(k[1]), k[0]))
    made = [_grid(task, recipe, family, parts[recipe, family], departures, recorded) for recipe, family in order]
    return made


def _grid(
    task: str,
    recipe: tuple[str, str, str],
    family: str,
    entries: list[Entry],
    departures: tuple[Departure, ...],
    recorded: bool = False,
) -> Grid:
    optimizer, metric, rule = recipe
    squares: dict[tuple[str, str], Square] = defaultdict(Square)
    expected = {e.cell.seed for e in entries if e.result or e.asked is not None}  # a failed try asks nothing of others
    for entry in entries:
        square = squares[entry.cell.schedule, entry.cell.budget]
        if entry.state != "unreadable" or entry.asked is not None:
            square.seeds.add(entry.cell.seed)
        if entry.result:
            square.runs.append(entry)
            value = entry.result["metrics"].get(metric, {}).get(rule)
            if value is not None:
                square.values[entry.cell.seed] = value
        elif entry.state != "missing":
            square.states[entry.state] += 1
            square.begun.add(entry.cell.seed)
    position = _positions({b for _, b in squares}, entries, family)
    budgets = sorted(position, key=lambda b: (math.isnan(p := position[b]), 0 if math.isnan(p) else p, written(b)))
    schedules = sorted({s for s, _ in squares}, key=_known)
    for schedule in schedules:
        for budget in budgets:
            square = squares[schedule, budget]
            square.summary = summarize(list(square.values.values()))
            if family == "fraction" and not departures:
                clips = [n or 0 for n in _clips(square.runs)]
                square.published = beside(task, optimizer, schedule, budget, metric, min(clips, default=None))
    seeds = sorted(expected or set().union(*(q.seeds for q in squares.values())))
    if not recorded:
        for square in squares.values():
            square.seeds = set(seeds) | square.begun
    grid = Grid(task, optimizer, metric, rule, family, schedules, budgets, position, seeds, dict(squares), departures)
    grid.schedules = _by_rank(grid)
    return grid


def _clips(runs: Iterable[Entry]) -> list[int | None]:
    """Training samples of each finished run, None where it does not say."""
    return [run.result["data.n_train"] for run in runs if run.result]


def published_notes(task: str, runs: Sequence[Entry]) -> list[str]:
    """What to know where published numbers stand beside these unaltered runs, or why they do not."""
    lacking = [n for run in runs if run.result and (n := run.result["data.missing"]) is not None]
    return notes(task, _clips(runs), max(lacking, default=None))


def _known(schedule: str) -> tuple[int, str]:
    return (ORDER.index(schedule) if schedule in ORDER else len(ORDER), schedule)


def _by_rank(grid: Grid) -> list[str]:
    mean_rank = grid.ranks()
    return sorted(grid.schedules, key=lambda s: (math.isnan(r := mean_rank[s]), 0 if math.isnan(r) else r, _known(s)))


def _positions(budgets: set[str], entries: list[Entry], family: str) -> dict[str, float]:
    """Budget -> place on its axis: the amount as written; for it, ep, im the fraction that a run recorded, or what
    follows from a run of another budget in that unit. NaN where no run says."""
    position = {b: amount(b)[1] for b in budgets}
    each: dict[str, float] = {}  # unit -> the fraction that one of it is
    for entry in entries:
        if entry.result and math.isnan(position[entry.cell.budget]):
            fraction = position[entry.cell.budget] = entry.result["budget.fraction"]
            size, unit = written(entry.cell.budget)
            each[unit] = fraction / size if size else math.nan
    for budget in (b for b in budgets if math.isnan(position[b])):
        size, unit = written(budget)
        position[budget] = size * each.get(unit, math.nan)
    return position


def secondary(grid: Grid) -> list[Grid]:
    """The same grid for each other metric of its runs, by the same rule."""
    runs = [run for square in grid.squares.values() for run in square.runs]
    names = sorted({name for run in runs if run.result for name in run.result["metrics"]} - {grid.metric})
    made = [_grid(grid.task, (grid.optimizer, name, grid.rule), grid.family, runs, grid.departures) for name in names]
    for other in made:
        other.seeds, other.data = grid.seeds, grid.data
        for key, square in other.squares.items():
            first = grid.squares[key]
            square.seeds, square.states, square.begun = first.seeds, first.states, first.begun
    return [g for g in made if any(s.values for s in g.squares.values())]


# ---- comparison and sentences


class Verdict(NamedTuple):
    """Two schedules on one grid. differences: budget -> paired Summary (fractions), where seeds are shared."""

    grid: Grid
    first: str
    second: str
    differences: dict[str, Summary]

    @property
    def wins(self) -> int:
        """Budgets where the first has the higher mean."""
        return sum(d.mean > 0 for d in self.differences.values())

    @property
    def losses(self) -> int:
        """Budgets where the second has the higher mean."""
        return sum(d.mean < 0 for d in self.differences.values())

    @property
    def mean(self) -> float:
        """Mean over budgets of the difference."""
        return float(np.mean([d.mean for d in self.differences.values()]))


def compare(grid: Grid, first: str = PAIR[0], second: str = PAIR[1]) -> Verdict | None:
    """The paired comparison, or None where the two share no seed at any budget."""
    found = {}
    for budget in grid.budgets:
        a, b = grid.squares.get((first, budget)), grid.squares.get((second, budget))
        if a and b and a.values.keys() & b.values.keys():
            found[budget] = paired(a.values, b.values)
    return Verdict(grid, first, second, found) if found else None


def baseline(grid: Grid) -> str:
    """The schedule that others are compared with: linear, the paper's proposal, or else the best by mean rank."""
    finished = [s for s in grid.schedules if any(grid.squares[s, b].values for b in grid.budgets)] or grid.schedules
    return PAIR[0] if PAIR[0] in finished else finished[0]


def differences(grid: Grid) -> list[Verdict]:
    """What stands below a table: linear - step as in the paper, and each other schedule minus the baseline.

    The first MOST_COMPARED, best first: where each is compared with one, the more there are, the more differ by chance.
    """
    base = baseline(grid)
    paper = [v for v in [compare(grid)] if v]
    rivals = [s for s in grid.schedules if s != base and not (paper and s == PAIR[1])]
    return (paper + [v for s in rivals if (v := compare(grid, s, base))])[:MOST_COMPARED]


def differences_text(grid: Grid) -> str:
    """What the differences below a table are, "" for none."""
    shown = differences(grid)
    if not shown:
        return ""
    base = baseline(grid)
    best = "the best by mean rank" if grid.ranks().get(base, math.nan) > 0 else "the first with results"
    why = "the paper's proposal" if base == PAIR[0] else best
    interval = ", with their 95% interval" if any(d.n > 1 for v in shown for d in v.differences.values()) else ""
    cut = f" The first {MOST_COMPARED} are shown." if len(grid.schedules) > MOST_COMPARED + 1 else ""
    return f"Differences: points, paired over equal seeds{interval}; the baseline is {base}, {why}.{cut}"


def apart(difference: Summary) -> bool:
    """Whether a paired difference is larger than chance: its 95% interval leaves zero. Of one seed there is none."""
    return difference.low > 0 or difference.high < 0


def answers(grid: Grid) -> list[str]:
    """A line per budget: the best schedule, the runner-up, and whether their difference is larger than chance."""
    lines = []
    for budget in grid.budgets:
        finished = [s for s in grid.schedules if grid.squares[s, budget].values]
        if order := _first_two(grid, budget):
            lines.append(_answer(grid, budget, *order))
        elif len(finished) == 1:
            s = grid.squares[finished[0], budget].summary
            lines.append(f"{budget}: {finished[0]} {percent(s)} ({_seeds(s.n)}), no other schedule to compare with.")
        elif finished:
            lines.append(f"{budget}: {len(finished)} schedules, but not of equal seeds: none is called the best.")
    return lines


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"


def _first_two(grid: Grid, budget: str) -> tuple[str, str] | None:
    means = grid.comparable(budget)
    order = sorted(means, key=lambda s: -means[s])  # stable: of equals the better by mean rank
    return (order[0], order[1]) if len(order) > 1 else None


def _answer(grid: Grid, budget: str, first: str, second: str) -> str:
    one, two = grid.squares[first, budget], grid.squares[second, budget]
    d = paired(one.values, two.values)
    if d.n == 1:
        judged = "not told apart, one seed has no interval"
    else:
        judged = f"95% interval {points(d.low, 2)} to {points(d.high, 2)}, {'' if apart(d) else 'not '}told apart"
    means = grid.comparable(budget)
    unequal = [s for s in grid.schedules if grid.squares[s, budget].values and s not in means]
    left = f" Left out for want of equal seeds: {_listed(unequal)}." if unequal else ""
    return (
        f"{budget}: {first} {percent(one.summary)} ({_seeds(d.n)}), runner-up {second} {percent(two.summary)}, "
        f"difference {points(d.mean, 2)}: {judged}.{left}"
    )


def percent(s: Summary) -> str:
    """'30.63 ± 0.36' in percent, '30.63' for one run."""
    return f"{100 * s.mean:.2f}" + ("" if math.isnan(s.std) else f" ± {100 * s.std:.2f}")


def caveat(grid: Grid) -> str:
    """What a table of generated data is good for, "" for others."""
    return "Embedded data: this shows that the code path works, not how a schedule fares." if _is_embedded(grid) else ""


def _is_embedded(grid: Grid) -> bool:
    return is_embedded(grid.task, grid.departures, grid.runs)


def remarks(grid: Grid) -> list[str]:
    """What to know before schedules of a table are compared: embedded data, unlike work, data, code or machines."""
    return [line for line in (caveat(grid), *_work(grid), _places(grid), *_made_by(grid)) if line]


def _work(grid: Grid) -> list[str]:
    """The iterations of each schedule where a budget did not give all of them the same."""
    lines = []
    for budget in grid.budgets:
        made = {s: n for s in grid.schedules if (n := iterations(grid.squares[s, budget])) is not None}
        if len(made) < 2 or max(made.values()) <= (1 + ALIKE) * min(made.values()):
            continue
        listed = _listed([f"{s} {n:,.0f}" for s, n in sorted(made.items(), key=lambda item: -item[1])])
        lines.append(
            f"{budget} gave the schedules unequal iterations ({listed}): the machine and its load are ranked, too."
        )
    return lines


def iterations(square: Square) -> float | None:
    """Mean iterations of the finished runs, None without any."""
    made = [run.result["iterations_done"] for run in square.runs if run.result]
    return float(np.mean(made)) if made else None


def _places(grid: Grid) -> str:
    """Says where runs without a digest of their data lie in several places."""
    roots = sorted({r["data.root"] or "an unknown place" for r in grid.runs})
    if len(roots) < 2 or all(r["data.digest"] for r in grid.runs):
        return ""
    return f"Data in {', '.join(roots[:MOST_LISTED])}: older results have no digest to tell whether they are the same."


def _made_by(grid: Grid) -> list[str]:
    """Says which runs were made in parts by other code, device or processes, and whether the table mixes code."""
    runs = [e for s in grid.schedules for b in grid.budgets for e in grid.squares[s, b].runs]
    known = [(e, e.result["parts"]) for e in runs if e.result and e.result["parts"]]
    lines = []
    if split := [e for e, parts in known if len(parts) > 1]:
        runs_text = "1 run was" if len(split) == 1 else f"{len(split):,} runs were"
        lines.append(f"{runs_text} continued by other code, device or number of processes: {_names(split)}.")
    by_code: dict[str, list[Entry]] = defaultdict(list)
    for entry, parts in known:
        by_code[parts[-1]["code"] or "unknown"].append(entry)
    if len(by_code) > 1:
        versions = sorted(by_code.items(), key=lambda item: (-len(item[1]), item[0]))
        others = [e for _, several in versions[1:] for e in several]
        lines.append(
            f"The runs were finished by {len(by_code)} versions of the code; "
            f"{len(others):,} not by the commonest, {versions[0][0][:12]}: {_names(others)}."
        )
    return lines


def _names(entries: Sequence[Entry]) -> str:
    return _listed([clean("/".join(entry.path.parts[-3:]), 200) for entry in entries])


def _listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:MOST_LISTED]) + (f" and {n} more" if (n := len(names) - MOST_LISTED) > 0 else "")


def points(value: float, digits: int = 1) -> str:
    """A difference of fractions as text, in percentage points."""
    return f"{100 * value:+.{digits}f} pp".replace("-", "\u2212")


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}\u2013{high}"


def sentence(verdicts: Sequence[Verdict], full: bool = False) -> str:
    """The answer in one line: who wins at how many budgets, by how much, from how many seeds.

    full: say what is altered, where nothing around does.
    """
    first, second = verdicts[0].first, verdicts[0].second
    wins, losses = sum(v.wins for v in verdicts), sum(v.losses for v in verdicts)
    total = sum(len(v.differences) for v in verdicts)
    mean = float(np.mean([d.mean for v in verdicts for d in v.differences.values()]))
    n = _span([d.n for v in verdicts for d in v.differences.values()])
    if losses > wins:
        first, second, wins, losses, mean = second, first, losses, wins, -mean
    recipes = len({(v.grid.task, v.grid.departures, v.grid.data) for v in verdicts})
    one = "altered recipe" if verdicts[0].grid.departures else "task"
    title = verdicts[0].grid.full_title if full else verdicts[0].grid.title
    where = f"on {title}" if recipes == 1 else f"over {recipes} {one}s"
    things = "budget" if recipes == 1 else f"{one.split()[-1]}-budget pair"
    counted = f"{wins} of {total} {things}{'s' if total != 1 else ''}"
    detail = f"(mean {points(mean)}, n={n})"
    if wins == losses:
        return (
            f"{first} and {second} are level {where}: each ahead at {counted} (mean {points(mean)} for {first}, n={n})"
        )
    return f"{first} beats {second} at {counted} {where} {detail}"


def speaking(all_grids: Sequence[Grid]) -> list[Grid]:
    """The grids that a first screen speaks of: embedded data only where there are no others."""
    real = [g for g in all_grids if not _is_embedded(g)]
    return real if any(g.runs for g in real) else list(all_grids)


def headline(all_grids: Sequence[Grid], finished: int) -> str:
    """One sentence from the data: linear against step where both ran, else the best schedule.

    Real data alone speak where there are any; fractions before other axes, named recipes before altered ones.
    """
    for other_axis in (False, True):
        for altered in (False, True):
            chosen = [
                g for g in speaking(all_grids) if (g.family != "fraction", bool(g.departures)) == (other_axis, altered)
            ]
            if verdicts := [v for g in chosen if (v := compare(g))]:
                return sentence(verdicts, full=True)
            if text := next((text for g in chosen if (text := leader(g, full=True))), ""):
                return text
    return f"{finished:,} finished run{'s' if finished != 1 else ''}: not enough to compare schedules yet"


def leader(grid: Grid, full: bool = False) -> str:
    """Who is best at how many budgets, "" where nothing can be compared. full: say what is altered."""
    wins = Counter(s for b in grid.budgets for s in grid.best(b))
    contested = sum(bool(grid.best(b)) for b in grid.budgets)
    if not wins:
        return ""
    name, count = min(wins.items(), key=lambda item: (-item[1], _known(item[0])))
    n = _span([q.summary.n for q in grid.squares.values() if q.summary.n])
    title = grid.full_title if full else grid.title
    firsts = [(b, order) for b in grid.budgets if (order := _first_two(grid, b)) and order[0] == name]
    sure = sum(apart(paired(grid.squares[a, b].values, grid.squares[c, b].values)) for b, (a, c) in firsts)
    told = f"told apart from the runner-up at {sure}" if sure else "nowhere told apart from the runner-up"
    return f"{name} is best at {count} of {contested} budget{'s' if contested != 1 else ''} on {title} (n={n}), {told}"


def reach(grid: Grid, schedule: str = PAIR[0], share: float = 0.9) -> str:
    """The smallest budget at which the schedule reaches `share` of the best full-budget mean, "" if unknown."""
    best = full_best(grid)
    if best is None or (schedule, grid.budgets[0]) not in grid.squares:
        return ""
    full = best.summary.mean
    for budget in grid.budgets:
        square = grid.squares[schedule, budget]
        if square.values.keys() != best.values.keys():
            continue
        if square.summary.mean >= share * full and grid.position[budget] < 1:
            part = f"{100 * square.summary.mean / full:.0f}%"
            return f"With {schedule}, {budget} of the budget reaches {part} of the full-budget {grid.metric}."
    return ""


def full_best(grid: Grid) -> Square | None:
    """The square of the best comparable mean at the full budget; None where there is none above 0."""
    full = [b for b in grid.budgets if grid.family == "fraction" and abs(grid.position[b] - 1) < 1e-9]
    squares = [grid.squares[s, b] for b in full for s in grid.comparable(b)]
    best = max(squares, key=lambda q: q.summary.mean, default=None)
    return best if best and best.summary.mean > 0 else None


def full_value(grid: Grid) -> float | None:
    """The best comparable mean at the full budget; None where there is none above 0."""
    best = full_best(grid)
    return best.summary.mean if best else None


# ---- cost and provenance


def costs(grid: Grid) -> list[dict[str, Any]]:
    """Per budget, medians over its runs: seconds, samples per second, memory, and what ran on what."""
    rows = []
    for budget in grid.budgets:
        runs = [r.result for s in grid.schedules for r in grid.squares[s, budget].runs if r.result]
        if runs:
            rows.append({"budget": budget, "runs": len(runs), **_cost(runs)})
    return rows


def _cost(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def median(key: str) -> float | None:
        known = [r[key] for r in runs if r[key] is not None]
        return float(np.median(known)) if known else None

    train, wait = median("train_seconds"), median("data_wait_seconds")
    memory = [r["peak_memory_bytes"] for r in runs if r["peak_memory_bytes"] is not None]
    places = [p for r in runs if (p := best_place(r)) is not None]
    return {
        "train_seconds": train,
        "eval_seconds": median("eval_seconds"),
        "data_wait": wait / train if wait is not None and train else None,
        "compile_seconds": median("compile_seconds"),
        "samples_per_second": median("samples_per_second"),
        "peak_memory_bytes": max(memory, default=None),
        "devices": sorted({_device(r) for r in runs}),
        "missing": max((r["data.missing"] or 0 for r in runs), default=0),
        "resumed": sum(r["resumed"] or 0 for r in runs),
        "skipped": sum(r["skipped_updates"] or 0 for r in runs),
        "best_place": float(np.median(places)) if places else None,
    }


def _device(result: dict[str, Any]) -> str:
    size = result["world_size"] or 1
    return (result["device"] or "?") + (f" \u00d7{size}" if size > 1 else "")


def best_place(result: dict[str, Any]) -> float | None:
    """Share of the run at which the best value of the reported metric was seen (Table 4 of the paper)."""
    step = result["metrics"][result["reported.metric"]]["best_step"]
    return None if step is None or not result["iterations_done"] else min(1.0, (step + 1) / result["iterations_done"])


def provenance(entries: Iterable[Entry]) -> list[str]:
    """What made the finished runs: commits, versions and the time span, as sentences."""
    runs = [e.result for e in entries if e.result]
    commits = sorted({(r["git.commit"] or "unknown")[:10] for r in runs})
    dirty = sum(bool(r["git.dirty"]) for r in runs)
    versions: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, version in run["versions"].items():
            versions[name].add(version)
    lines = [f"Code: {', '.join(commits[:5])}{' …' if len(commits) > 5 else ''}; {dirty} runs from a changed tree."]
    if versions:
        lines.append(
            "Versions: " + ", ".join(f"{n} {'/'.join(sorted(v)[:4])}" for n, v in sorted(versions.items())) + "."
        )
    ends = sorted(r["finished"] for r in runs if r["finished"])
    return [*lines, f"Finished between {ends[0]} and {ends[-1]}."] if ends else lines


# ---- what departs from the named recipe

Key = tuple[str, tuple[Departure, ...], str]  # task, departures, data set in words
DATA = "training samples"
UNKNOWN = Departure("other data", "", "")  # the directory says altered, and neither values nor sample counts do


def by_recipe(
    entries: Sequence[Entry],
) -> tuple[dict[Key, list[Entry]], list[Entry]]:
    """Runs by (task, departures, data), () for the named recipe, and the finished runs whose recipe cannot be told.

    What departs in a schedule's own constants becomes part of the schedule's name in `cell`.
    """
    groups: dict[Key, list[Entry]] = defaultdict(list)
    sets = _data_sets(entries)
    named: dict[str, list[Entry]] = defaultdict(list)
    suffixed: dict[tuple[str, tuple[Departure, ...]], list[Entry]] = defaultdict(list)
    left: list[Entry] = []
    configs: dict[str, dict[str, str]] = {}
    sources: dict[str, str] = {}
    for entry in entries:
        if entry.cell.seed < 0 or entry.elsewhere:
            continue
        if not entry.cell.suffix:
            named[entry.cell.task].append(entry)
            continue
        missing = entry.state == "missing"
        leaves = _recorded(entry.asked or {}) if missing else _config(entry.path / "config.yaml", configs)
        if leaves:
            own, others = _departures(leaves, entry.cell.task, entry.cell.schedule)
            name = _distinct(" ".join([entry.cell.schedule, *own]), leaves.get("schedule.run"), sources)
            cell = entry.cell._replace(schedule=name)
            suffixed[entry.cell.task, others].append(replace(entry, cell=cell))
        elif entry.result:
            left.append(replace(entry, note="config.yaml cannot be read, or too many differ"))
    pooled = [(task, (), runs) for task, runs in named.items()] + [
        (task, departures, own_runs)
        for (task, others), runs in suffixed.items()
        for departures, own_runs in _by_data(task, others, runs).items()
    ]
    for task, departures, runs in pooled:
        for data, own_runs in _by_set(runs, sets).items():
            firsts: dict[tuple[object, ...], Path] = {}
            for run in own_runs:
                if run.result and (first := firsts.setdefault(run.cell[:4], run.path)) != run.path:
                    left.append(replace(run, note=f"the same values and seed as {first.name}"))
                else:
                    groups[task, departures, data].append(run)
    return groups, left


class DataSet(NamedTuple):
    """What a run was made on: the digest of its data, "" in older results, which have counts alone."""

    digest: str
    n_val: int | None
    classes: int | None

    def __str__(self) -> str:
        if self.digest:
            return f"digest {self.digest}"
        counts = f"{'unknown' if self.n_val is None else f'{self.n_val:,}'} validation samples"
        return counts + (f", {self.classes:,} classes" if self.classes is not None else "") + ", no digest"

    def may_be(self, other: DataSet) -> bool:
        """Whether the counts allow one without a digest to be the other; what is unknown allows no n_val."""
        return self.n_val == other.n_val is not None and (
            self.classes == other.classes or None in (self.classes, other.classes)
        )


def _data_set(result: dict[str, Any]) -> DataSet:
    return DataSet(result["data.digest"] or "", result["data.n_val"], result["data.classes"])


def _data_sets(entries: Sequence[Entry]) -> dict[tuple[str, DataSet], str]:
    """(task, data set) -> its words, "" where the task has one data set only. Two never have the same words."""
    found: dict[str, dict[DataSet, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for entry in entries:
        if entry.result and not entry.elsewhere:
            found[entry.cell.task][_data_set(entry.result)][entry.result["data.root"] or ""] += 1
    words: dict[tuple[str, DataSet], str] = {}
    for task, sets in found.items():
        same = {one: _pooled(one, list(sets)) for one in sets}
        roots: dict[DataSet, Counter[str]] = defaultdict(Counter)
        for one, several in sets.items():
            roots[same[one]] += several
        names = _told_apart(roots) if len(roots) > 1 else dict.fromkeys(roots, "")
        words |= {(task, one): names[same[one]] for one in sets}
    return words


def _pooled(one: DataSet, others: Sequence[DataSet]) -> DataSet:
    """The first data set with the same digest; for one without, the only one that it may be, else itself."""
    if one.digest:
        return next(other for other in others if other.digest == one.digest)
    named = {other.digest: other for other in reversed(others) if other.digest and one.may_be(other)}
    return next(iter(named.values())) if len(named) == 1 else one


def _told_apart(sets: dict[DataSet, Counter[str]]) -> dict[DataSet, str]:
    """Words for each data set: the ends of where it lies, and as much more as tells it from the others."""
    roots = {one: [root for root, _ in several.most_common(2) if root] for one, several in sets.items()}
    short = {one: " and ".join(f"\u2026/{Path(root).name}" for root in places) for one, places in roots.items()}
    whole = {one: " and ".join(places) for one, places in roots.items()}
    for names in (short, whole):
        if all(names.values()) and len(set(names.values())) == len(names):
            return {one: f"data in {name}" for one, name in names.items()}
    return {one: f"data in {name or 'an unknown place'} ({one})" for one, name in short.items()}


def _by_set(runs: Sequence[Entry], sets: dict[tuple[str, DataSet], str]) -> dict[str, list[Entry]]:
    """Runs by the words of their data set; unfinished ones, whose data set nothing says, with the commonest."""
    named = [sets[run.cell.task, _data_set(run.result)] if run.result else None for run in runs]
    common = Counter(name for name in named if name is not None).most_common(1)
    parts: dict[str, list[Entry]] = defaultdict(list)
    for run, name in zip(runs, named, strict=True):
        parts[name if name is not None else common[0][0] if common else ""].append(run)
    return parts


def _by_data(task: str, others: tuple[Departure, ...], runs: list[Entry]) -> dict[tuple[Departure, ...], list[Entry]]:
    """Runs by all departures, the size of the data among them; unfinished ones, of unknown data, by the commonest."""
    wanted = dict(_task(task)).get("task.samples", "null")  # none for Kinetics: every copy has its own
    subset = {d.value for d in others if d.key == "data.subset"}

    def complete(run: Entry) -> tuple[Departure, ...]:
        size = run.result["data.n_train"] if run.result else _samples(run.asked or {})
        if size is None or wanted == "null" or str(size) == wanted or str(size) in subset:
            found = others
        else:
            found = (Departure(DATA, f"{size}", wanted), *others)
        return found if found or " " in run.cell.schedule else (UNKNOWN,)

    known = Counter(complete(run) for run in runs if run.result or run.state == "missing")
    common = known.most_common(1)[0][0] if known else others or (UNKNOWN,)
    parts: dict[tuple[Departure, ...], list[Entry]] = defaultdict(list)
    for run in runs:
        parts[complete(run) if run.result or run.state == "missing" else common].append(run)
    return parts


def _departures(leaves: dict[str, str], task: str, schedule: str) -> tuple[list[str], tuple[Departure, ...]]:
    """What departs from conf/: in the schedule's constants (words for its name), and in all else, foremost first."""
    named = dict(_leaves_of("config"))
    usual = named["defaults.optimizer"]
    for group, name in (("schedule", schedule), ("optimizer", leaves.get("optimizer.name", usual))):
        named |= {f"{group}.{k}": v for k, v in _leaves_of(f"{group}/{name}")}
    named |= {"optimizer.name": usual} | dict(_task(task))  # a task has the last word on its optimizer, as in Hydra
    own, others = [], []
    for key, value in sorted(leaves.items(), key=lambda leaf: (leaf[0] not in FOREMOST, leaf[0])):
        was = named.get(key, "")
        if not key.startswith(AFFECTING) or key.startswith(QUIET) or value == was or "${" in was:
            continue
        if key == "task.weights" and "://" not in value:
            value = value.rsplit("/", 1)[-1]  # where they lie does not matter
        if key == "schedule.name":  # the cell says it
            continue
        if key == "schedule.run":
            own.append(f"run={_source(value, task)}")
        elif was == "???":
            continue
        elif key.startswith("schedule."):
            own.append(f"{key.removeprefix('schedule.')}={value}")
        else:
            others.append(Departure("optimizer" if key == "optimizer.name" else key, value, was))
    return own, tuple(others)


def _source(run: str, task: str) -> str:
    """A short name of the run that a schedule was made from: its cell, without the task where that is the same."""
    try:
        cell = cell_of(Path(run))
        parts = Path(run).parts[-4 if cell.task != task else -3 :]
    except BadFile:
        parts = Path(run).parts[-1:]
    return "/".join(parts)


def _distinct(name: str, run: str | None, known: dict[str, str]) -> str:
    """The name of a schedule made from `run`, with a digest where one from another run has it. known: name -> run."""
    if run is None:
        return name
    path = os.path.abspath(run)
    return name if known.setdefault(name, path) == path else f"{name} #{sha256(path.encode()).hexdigest()[:4]}"


AFFECTING = ("task.", "schedule.", "optimizer.", "precision", "hold", "on_nonfinite", "micro_batch", "data.subset")
FOREMOST = ("data.subset", "optimizer.name", "task.model")
QUIET = ("task.samples", "task.val_samples", "task.classes")  # what the data should be, not what it was


def _config(path: Path, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Leaves of a run's config.yaml, {} if it cannot be read. known: those read so far, by their text."""
    try:
        if path.stat().st_size > 100_000:
            return {}
        text = re.sub(r"^seed:.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except (OSError, ValueError):
        return {}
    if text not in known and len(known) < CONFIGS:
        known[text] = _parsed(text)
    return known.get(text, {})


def _recorded(record: dict[str, Any]) -> dict[str, str]:
    """Leaves of what cells.json says of a cell, as its config.yaml would say them; {} if it says nothing usable."""
    recipe, words = record.get("recipe"), record.get("words")
    if not isinstance(recipe, dict):
        return {}
    data = recipe.get("data")
    whole = {key: value for key, value in recipe.items() if key not in ("data", "budget", "seed")}
    leaves = _leaves(whole | {"data": {"subset": data.get("subset") if isinstance(data, dict) else None}})
    if leaves.get("optimizer.lr") == leaves.get("task.lr"):  # filled in there, null in a config.yaml
        leaves["optimizer.lr"] = "null"
    for word in words if isinstance(words, list) else ():
        key, _, value = str(word).partition("=")
        if key in ("task.weights", "schedule.run"):  # digests there
            leaves[key] = clean(value.strip("'\""), LEAF)
    return leaves


def _samples(record: dict[str, Any]) -> int | None:
    """How many training samples a cell that was asked for was to have, None where cells.json does not say."""
    recipe = record.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    size = data.get("train") if isinstance(data, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _parsed(text: str) -> dict[str, str]:
    """Leaves of YAML, dotted, as text; {} for anything but a mapping."""
    import yaml

    if re.search(r"[\s\[{,][&*]\w", text):  # aliases: a few of them can stand for endless text
        return {}
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _leaves(data) if isinstance(data, dict) else {}
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}


def _leaves(data: object, prefix: str = "", depth: int = 6) -> dict[str, str]:
    if isinstance(data, dict) and depth:
        found: dict[str, str] = {}
        for key, value in list(data.items())[:200]:
            found |= _leaves(value, f"{prefix}.{clean(key, 40)}" if prefix else clean(key, 40), depth - 1)
        return found
    if data is None or isinstance(data, bool):
        return {prefix: "null" if data is None else str(data).lower()}
    if isinstance(data, float):
        return {prefix: f"{data:.12g}"}  # 1.0 and 1 are one value
    return {prefix: clean(data, LEAF)}


@lru_cache(maxsize=256)
def _leaves_of(name: str) -> tuple[tuple[str, str], ...]:
    """Leaves of conf/<name>.yaml, its list of defaults as `defaults.<group>`, as pairs; () if there is none."""
    if not re.fullmatch(r"(\w+/)?[\w-]+", name):
        return ()
    import yaml

    try:
        data = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ()
    chosen = data.pop("defaults", [])
    named = {group: option for one in chosen if isinstance(one, dict) for group, option in one.items()}
    inherited = [one for one in chosen if isinstance(one, str) and one != "_self_"]
    leaves: dict[str, str] = {}
    for other in inherited:
        leaves |= dict(_leaves_of(f"{name.rpartition('/')[0]}/{other}"))
    return tuple((leaves | _leaves(data | ({"defaults": named} if named else {}))).items())


def _task(name: str) -> tuple[tuple[str, str], ...]:
    return _leaves_of(f"task/{name}")


def alone(entry: Entry) -> Grid:
    """A grid of one finished run whose recipe cannot be told."""
    result = entry.result
    assert result is not None
    recipe = (result["optimizer"], result["reported.metric"], result["reported.rule"])
    reason = (Departure("signature", entry.cell.suffix, ""), Departure(entry.note, "", ""))
    return _grid(entry.cell.task, recipe, result["family"], [entry], reason)
