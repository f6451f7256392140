"""python run.py mode=report: every result under a directory becomes <out>/report/ (page, tables, pictures)."""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import page, plots, tables
from benchmarks.results import Curve, Entry, clean, elsewhere_text, exact_rates, read_curve, scan, with_missing
from benchmarks.tables import Grid

if TYPE_CHECKING:
    from rich.console import Group

log = logging.getLogger("budgeted")
MISSING = (
    "Sweeps asked for these and there is nothing of them: the same sweep command launches them. What was dropped on "
    "purpose counts as missing until the cells.json that asked for it is deleted."
)
DRAWN = 10  # tasks with pictures; every task has its tables
ASKING = 3  # files named below a table
CURVES = 15  # schedules in the pictures of learning rate and loss


@dataclass(slots=True)
class Survey:
    """Everything a report says, read once. out: where the runs live. entries: what lies where cells of `out` do.

    left: finished runs that no grid can hold. elsewhere: directories too deep to be cells of `out`.
    """

    out: Path
    entries: list[Entry]
    grids: list[Grid]
    left: list[Entry]
    elsewhere: list[Entry]

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state. missing: what sweeps asked for and is not there; where none is recorded, the seeds that other
        squares of a grid have."""
        states = Counter(e.state for e in self.entries)
        counts = {state: states[state] for state in page.STATES}
        recorded = any(e.asked is not None for e in self.entries)
        counts["missing"] = (
            states["missing"] if recorded else sum(q.missing for g in self.grids for q in g.squares.values())
        )
        return counts

    @property
    def asking(self) -> list[str]:
        """The notes of what is missing, each once: the files that ask for it. The first few, the rest counted."""
        notes = sorted({e.note for e in self.entries if e.state == "missing"})
        return notes[:ASKING] + ([f"{len(notes) - ASKING} more that index.html names"] if len(notes) > ASKING else [])

    @property
    def apart(self) -> str:
        """What lies deeper than cells of `out` do, and how to report it; "" for nothing. As mode=status says it."""
        return elsewhere_text([e.path for e in self.elsewhere])

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        if not self.entries:
            return f"No runs under {clean(self.out, 120)} yet"
        return tables.headline(self.grids, sum(e.state == "done" for e in self.entries))


def survey(out: Path) -> Survey:
    """Reads every run under `out`, and what sweeps asked for."""
    found = scan(Path(out))
    entries = with_missing([e for e in found if not e.elsewhere], Path(out))
    return Survey(Path(out), entries, *tables.grids(entries), [e for e in found if e.elsewhere])


def build(out: Path, found: Survey | None = None) -> Path:
    """Writes <out>/report/{index.html,table.md,table.csv,*.png} and returns the path of index.html.

    found: what `survey` read, if it is at hand. Existing files are replaced one by one, each atomically.
    """
    found = found or survey(out)
    folder = found.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, skipped = draw(found.grids)
    written = {f"{picture.name}.png": picture.data for several in pictures.values() for picture in several}
    for name, data in written.items():
        _write(folder / name, data)
    for old in folder.glob("[0-9][0-9]-*.png"):  # of an earlier report, whose sections had other numbers
        if old.name not in written:
            old.unlink()
    _write(folder / "table.csv", to_csv(found).encode("utf-8", "replace"))
    _write(folder / "table.md", markdown(found).encode("utf-8", "replace"))
    _write(folder / "index.html", to_html(found, pictures, skipped).encode("utf-8", "replace"))
    return folder / "index.html"


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)


# ---- pictures


def draw(grids: Sequence[Grid]) -> tuple[dict[int, list[page.Picture]], int]:
    """Pictures of the first tasks, by the grid's index, and the count of malformed metrics lines skipped."""
    drawn: dict[int, list[page.Picture]] = {}
    bad = 0
    for index, grid in enumerate(grids):
        if len(drawn) == DRAWN:
            break
        stem = f"{index:02d}-" + (re.sub(r"[^A-Za-z0-9_-]+", "-", grid.title).strip("-")[:40] or "task")
        budget, curves = sample_curves(grid)
        bad += sum(curve.bad for curve in curves.values())
        jobs = _jobs(grid, budget, curves)
        if several := [page.Picture(f"{stem}-{kind}", draws(data), says) for kind, says, draws, data in jobs]:
            drawn[index] = several
    return drawn, bad


def _jobs(grid: Grid, budget: str, curves: dict[str, Curve]) -> Iterator[tuple[str, str, Any, Any]]:
    """(kind, description, drawing function, data) of every picture that this grid can fill."""
    budgets = plots.drawable(grid)
    what = f"{grid.metric} on {grid.title}"
    if len(budgets) > 1:
        yield "budget", f"{what} against the budget, a line per schedule", plots.budget_curve, grid
        base = plots.reference(grid)
        if any(tables.compare(grid, s, base) for s in grid.schedules if s != base):
            yield "gain", f"{what} above {base}, paired over seeds", plots.gain_curve, grid
    if budgets and len(grid.schedules) > 2:  # of two the table says as much
        yield "heat", f"{what}: schedule by budget", plots.heat_map, grid
    if curves:
        where = f"{grid.title} at {budget}"
        yield "lr", f"Learning rate against progress on {where}", plots.rate_curve, curves
        if any(not math.isnan(v) for c in curves.values() for v in c.loss):
            yield "loss", f"Training loss against progress on {where}", plots.loss_curve, curves


def sample_curves(grid: Grid) -> tuple[str, dict[str, Curve]]:
    """The budget most schedules have, the largest of those, and a run of each schedule there (lowest seed)."""

    def sampled(budget: str) -> list[tuple[str, Path]]:
        rows = [(s, grid.squares[s, budget].runs) for s in grid.schedules]
        firsts = [(s, min(runs, key=lambda r: r.cell.seed).path / "metrics.jsonl") for s, runs in rows if runs]
        return [(s, path) for s, path in firsts if path.is_file()]

    choices = [sampled(budget) for budget in grid.budgets]
    at, chosen = max(enumerate(choices), key=lambda item: (len(item[1]), item[0]), default=(0, []))
    curves = {}
    for schedule, path in chosen[:CURVES]:
        try:
            curves[schedule] = replace(read_curve(path), rates=exact_rates(path.parent))
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)
    return (grid.budgets[at] if choices else ""), {s: c for s, c in curves.items() if c.progress}


# ---- HTML


def to_html(found: Survey, pictures: dict[int, list[page.Picture]], skipped: int = 0) -> str:
    """The page as text."""
    verdicts = [v for g in tables.speaking(found.grids) if g.family == "fraction" and (v := tables.compare(g))]
    body = [page.masthead(found.headline, _standfirst(found), found.counts)]
    if verdicts:
        body.append(page.overview(verdicts))
    body += [page.task_section(grid, pictures.get(i, [])) for i, grid in enumerate(found.grids)]
    if found.left:
        intro = "What these runs departed in cannot be told: they stand in table.csv and in no table here."
        body.append(page.entry_section("Altered in an unknown way", intro, found.left, found.out))
    stopped = [e for e in found.entries if e.state not in ("done", "unreadable", "missing")]
    broken = [e for e in found.entries if e.state == "unreadable"]
    order = {"failed": 0, "died": 1, "running": 2, "partial": 3}
    if stopped:
        intro = (
            "Run the same sweep again to continue these: finished cells are left out. A schedule that no sweep asked "
            "for and whose runs all failed is in no table."
        )
        body.append(page.entry_section("Unfinished", intro, sorted(stopped, key=lambda e: order[e.state]), found.out))
    if broken:
        body.append(page.entry_section("Unreadable", "These files count nowhere.", broken, found.out))
    if asked := [e for e in found.entries if e.state == "missing"]:
        body.append(page.entry_section("Missing", MISSING, asked, found.out, "asked for by"))
    if found.elsewhere:
        body.append(page.entry_section("Elsewhere", found.apart, found.elsewhere, found.out))
    body.append(_colophon(found, skipped, max(0, sum(len(plots.drawable(g)) > 1 for g in found.grids) - DRAWN)))
    return page.document(f"{found.headline} - Budgeted training", body)


def _standfirst(found: Survey) -> list[str]:
    if not found.entries:
        return ["Start with: python run.py -m sweep=smoke"]
    spoken = [v for g in tables.speaking(found.grids) if (v := tables.compare(g))]
    known = [d for v in spoken for d in v.differences.values() if d.n > 1]
    if not known:
        return ["One seed per cell: no interval can be given."] if spoken else []
    ahead, behind = sum(d.low > 0 for d in known), sum(d.high < 0 for d in known)
    first, second = spoken[0].first, spoken[0].second
    line = f"The 95% interval of {first} − {second} leaves zero for {first} at {ahead} of {len(known)}"
    return [line + (f" and for {second} at {behind}." if behind else ".")]


def _colophon(found: Survey, skipped: int, undrawn: int) -> page.Html:
    lines = [
        "A difference is taken seed by seed; its interval is Student's t at 95%. Two schedules are told apart where "
        "it leaves zero; the best of many does so by chance more easily than one of two. Schedules stand in the order "
        "of their mean rank, which counts only those with all seeds at every budget where two can be compared. A "
        "result counts only if its file is whole and agrees with its directory.",
        "Published numbers stand beside ours only for the unaltered recipe that they belong to.",
        *(tables.provenance(found.entries) if found.grids else []),
    ]
    if skipped:
        lines.append(f"{skipped:,} malformed lines of metrics.jsonl were skipped.")
    if undrawn:
        lines.append(f"Pictures are drawn for the first {DRAWN} tables; {undrawn} more stand without.")
    return page.tag("section", page.tag("h2", "How to read this"), *[page.tag("p", line, cls="note") for line in lines])


# ---- Markdown and CSV


def _md(text: object, limit: int = 120) -> str:
    """Text for a Markdown cell: no markup, no HTML, no pipe."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(clean(text, limit), quote=False))


def markdown(found: Survey) -> str:
    """table.md: the headline, then a table per task."""
    lines = [f"**{_md(found.headline, 2000)}**", ""]
    lines += [part for line in _standfirst(found) for part in (_md(line, 1000), "")]
    lines += [", ".join(f"{n:,} {state}" for state, n in found.counts.items() if n), ""]
    for grid in found.grids:
        lines += [f"### {_md(grid.title, 1000)}: {_md(grid.metric or 'nothing finished')}, {AXIS[grid.family]}", ""]
        if grid.departures:
            lines += [f"Departs from {_md(grid.task)} in " + _md(", ".join(map(str, grid.departures)), 1000) + ".", ""]
        lines.append("| schedule | " + " | ".join(_md(b) for b in grid.budgets) + " |")
        lines.append("|---|" + "---:|" * len(grid.budgets))
        best = {b: grid.best(b) for b in grid.budgets}
        for schedule in grid.schedules:
            cells = [_md_cell(grid, schedule, b, schedule in best[b]) for b in grid.budgets]
            lines.append(f"| {_md(schedule)} | " + " | ".join(cells) + " |")
        for verdict in tables.differences(grid):
            shown = [_md_difference(verdict.differences.get(b)) for b in grid.budgets]
            lines.append(f"| *{_md(verdict.first)} − {_md(verdict.second)}* | " + " | ".join(shown) + " |")
        lines += ["", *(f"- {_md(line, 1000)}" for line in (*tables.answers(grid), *tables.remarks(grid)))]
        notes = (page.unit_text(grid), tables.differences_text(grid), *page.sources(grid))
        lines += ["", " ".join(_md(line, 1000) for line in notes if line), ""]
    if files := found.asking:
        lines += [f"{_md(MISSING, 1000)} Here: {', '.join(map(_md, files))}.", ""]
    if broken := found.counts["unreadable"]:
        lines += [f"{broken:,} unreadable results count nowhere; index.html lists them.", ""]
    if found.elsewhere:
        lines += [f"{_md(found.apart, 2000)} index.html lists them.", ""]
    return "\n".join(lines)


AXIS = {family: axis.removeprefix("budget, ") for family, axis in tables.AXES.items()}


def _md_cell(grid: Grid, schedule: str, budget: str, best: bool) -> str:
    square = grid.squares[schedule, budget]
    value = page.value_text(square)
    text = f"**{value}**" if best else value
    if short := page.count_text(square, len(grid.seeds)):
        text += f" ({short})"
    beside = page.published_text(square, grid.task)
    return text + (f"<br>{beside}" if beside else "")


def _md_difference(d: tables.Summary | None) -> str:
    mean, span = page.difference_text(d) if d else ("—", "")
    return mean + (f"<br>{span}" if span else "")


COLUMNS = (
    "task", "data", "data_digest", "altered",
    "optimizer", "schedule", "budget", "axis", "position", "metric", "reported", "rule", "n",
    "seeds_expected", "mean", "std", "ci_low", "ci_high", "final_mean", "final_std", "best_mean", "best_std",
    "best_place", "published_mean", "published_std", "published_source", "published_note",
    "iterations", "train_seconds", "eval_seconds", "data_wait_seconds", "compile_seconds", "samples_per_second",
    "peak_memory_bytes", "device", "world_size", "n_train", "data_missing",
    "running", "partial", "died", "failed", "unreadable", "missing",
)  # fmt: skip


def to_csv(found: Survey) -> str:
    """table.csv: a line per cell and metric, fractions in [0, 1], empty where unknown; times are means over runs."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for grid in (*found.grids, *map(tables.alone, found.left)):
        for one in (grid, *tables.secondary(grid)):
            for schedule, budget in product(one.schedules, one.budgets):
                writer.writerow(_plain(_csv_row(one, schedule, budget, one is grid)))
    return buffer.getvalue()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Empty for unknown numbers; text that a spreadsheet would run as a formula is quoted."""

    def one(value: Any) -> Any:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value

    return {key: one(value) for key, value in row.items()}


def _csv_row(grid: Grid, schedule: str, budget: str, reported: bool) -> dict[str, Any]:
    square = grid.squares[schedule, budget]
    s, p = square.summary, square.published
    results = [run.result for run in square.runs if run.result]
    row: dict[str, Any] = {
        "task": grid.task, "altered": ", ".join(map(str, grid.departures)),
        "schedule": schedule, "budget": budget, "optimizer": grid.optimizer,
        "axis": grid.family, "position": grid.position[budget], "metric": grid.metric,
        "reported": int(reported), "rule": grid.rule, "n": s.n, "seeds_expected": len(square.seeds), "mean": s.mean,
        "std": s.std, "ci_low": s.low, "ci_high": s.high, "missing": square.missing,
    }  # fmt: skip
    row |= {state: square.states[state] for state in page.STATES if state != "done"}
    if p:
        row |= {"published_mean": p.mean, "published_std": p.std, "published_source": p.source}
    if grid.family == "fraction" and not grid.departures:
        row["published_note"] = " ".join(tables.published_notes(grid.task, square.runs))
    return row | _csv_metric(results, grid.metric) | _csv_cost(results)


def _csv_metric(results: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    found = [r["metrics"][metric] for r in results if metric in r["metrics"]]
    row: dict[str, Any] = {}
    for rule in ("final", "best"):
        s = tables.summarize([f[rule] for f in found if f[rule] is not None])
        row |= {f"{rule}_mean": s.mean, f"{rule}_std": s.std}
    return row


def _csv_cost(results: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        known = [r[key] for r in results if r[key] is not None]
        return sum(known) / len(known) if known else None

    row: dict[str, Any] = {"iterations": mean("iterations_done")}
    for name in ("data.root", "data.digest"):
        row["data" if name == "data.root" else "data_digest"] = "; ".join(sorted({r[name] for r in results if r[name]}))
    times = ("train_seconds", "eval_seconds", "data_wait_seconds", "compile_seconds", "samples_per_second")
    most = {"peak_memory_bytes": "peak_memory_bytes", "data_missing": "data.missing", "n_train": "data.n_train",
            "world_size": "world_size"}  # fmt: skip
    row |= {key: mean(key) for key in times}
    row |= {name: max((r[key] for r in results if r[key] is not None), default=None) for name, key in most.items()}
    places = [p for r in results if (p := tables.best_place(r)) is not None]
    row["best_place"] = sum(places) / len(places) if places else None
    row["device"] = "; ".join(sorted({r["device"] for r in results if r["device"]}))
    return row


# ---- terminal


def render_terminal(out: Path, found: Survey | None = None) -> Group:
    """The headline and a table per task, for rich.print. found: what `survey` read, if it is at hand."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = found or survey(out)
    counts = ", ".join(f"{n:,} {state}" for state, n in found.counts.items() if n)
    said = [found.headline, *_standfirst(found)]
    parts: list[Any] = [Text(line, style="bold" if line == found.headline else "") for line in said]
    parts.append(Text(counts, style="dim"))
    for grid in found.grids:
        title = f"{grid.title}: {grid.metric or 'nothing finished'}, %, {AXIS[grid.family]}"
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("schedule")
        for budget in grid.budgets:
            table.add_column(Text(budget), justify="right")
        best = {b: grid.best(b) for b in grid.budgets}
        for schedule in grid.schedules:
            cells = [_terminal_cell(grid, schedule, b, schedule in best[b]) for b in grid.budgets]
            table.add_row(Text(schedule), *cells)
        for verdict in tables.differences(grid):
            shown = [_terminal_difference(verdict.differences.get(b)) for b in grid.budgets]
            table.add_row(Text(f"{verdict.first} − {verdict.second}", style="dim"), *shown)
        departs = [Text(clean(", ".join(map(str, grid.departures)), 1000), style="dim")] if grid.departures else []
        lines = [line for line in (tables.differences_text(grid), *page.sources(grid)) if line]
        known = [Text(line) for line in tables.answers(grid)]
        known += [Text(line, style="yellow") for line in tables.remarks(grid)]
        known += [Text(" ".join(lines), style="dim")] if lines else []
        parts += [Text(""), Text(title, style="italic"), *departs, table, *known]
    if files := found.asking:
        parts += [Text(""), Text(f"{MISSING} Here: {', '.join(files)}.", style="dim")]
    if found.elsewhere:
        parts += [Text(""), Text(found.apart, style="dim")]
    return Group(*parts)


def _terminal_cell(grid: Grid, schedule: str, budget: str, best: bool) -> Any:
    from rich.text import Text

    square = grid.squares[schedule, budget]
    text = Text(page.value_text(square), style="bold" if best else "")
    if short := page.count_text(square, len(grid.seeds)):
        text.append(f" {short}", style="yellow")
    beside = page.published_text(square, grid.task)
    return text.append(f"\n{beside}", style="dim") if beside else text


def _terminal_difference(d: tables.Summary | None) -> Any:
    from rich.text import Text

    mean, span = page.difference_text(d) if d else ("—", "")
    return Text(mean + (f"\n{span}" if span else ""), style="dim")
