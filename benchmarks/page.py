"""The report as one self-contained HTML page: no script, nothing fetched, every name escaped by construction."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.published import RECIPES
from benchmarks.results import Entry, clean, seconds_text
from benchmarks.statistics import Summary
from benchmarks.tables import (
    AXES,
    Grid,
    Square,
    Verdict,
    answers,
    apart,
    compare,
    costs,
    differences,
    differences_text,
    leader,
    percent,
    published_notes,
    reach,
    remarks,
    secondary,
    sentence,
)

LISTED = 200  # rows shown of a list that may be long; the rest is counted
STYLE = Path(__file__).with_name("page.css")
STATES = ("done", "running", "partial", "died", "failed", "unreadable")


class Html(str):
    """Text that is markup already. Anything else given to `tag` is escaped."""


class Picture(NamedTuple):
    """One picture: PNG bytes, dark on white."""

    name: str
    data: bytes
    says: str  # for those who cannot see it


def tag(name: str, *children: object, **attributes: str) -> Html:
    """An element. Children and attribute values are escaped unless they are Html; `cls` stands for class."""
    shown = "".join(
        f' {key.replace("cls", "class").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value
    )
    inside = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)
    return Html(f"<{name}{shown}>{inside}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """Markup one after the other."""
    return Html("".join(parts))


# ---- numbers as text, shared with the Markdown and the terminal table


def value_text(square: Square) -> str:
    """'30.63 ± 0.36' in percent, '30.63' for one run, '—' for none."""
    s = square.summary
    return percent(s) if s.n else "—"


def count_text(square: Square, seeds: int) -> str:
    """'' where each of the grid's seeds is there, 'n=1' where no more should be, else '1/3, 1 running, 1 missing'."""
    n, wanted = len(square.values), len(square.seeds)
    counts = [*sorted(square.states.items()), *([("missing", square.missing)] if square.missing else [])]
    if n >= wanted and not counts:
        return f"n={n}" if n not in (0, seeds) else ""
    return f"{n}/{wanted}" + "".join(f", {count} {state}" for state, count in counts)


def published_text(square: Square, task: str) -> str:
    """'paper 30.63 ± 0.36', or '' where nothing may stand beside."""
    p = square.published
    if p is None:
        return ""
    std = "" if p.std is None else f" ± {100 * p.std:.2f}"
    return f"{RECIPES[task].tag} {100 * p.mean:.2f}{std}"


def signed(difference: float, digits: int = 2) -> str:
    """'+1.72' or '−0.36': a difference of fractions in points."""
    return f"{100 * difference:+.{digits}f}".replace("-", "\u2212")


def unit_text(grid: Grid) -> str:
    """What the numbers of a table are."""
    n = len(grid.seeds)
    unit = "Percent, mean ± sample standard deviation over seeds" if n > 1 else "Percent"
    return f"{unit}; n={n} where no count is shown. Bold: best of its budget, of those with the same seeds."


def sources(grid: Grid) -> list[str]:
    """Where the published numbers of a grid come from, and what to know about them."""
    found = sorted({q.published.source for q in grid.squares.values() if q.published})
    recipe = None if grid.departures else RECIPES.get(grid.task)
    if recipe is None or grid.family != "fraction":
        return []
    runs = [run for square in grid.squares.values() for run in square.runs]
    return [*(f"{recipe.tag}: {source}." for source in found), *published_notes(grid.task, runs)]


# ---- tables


def _head(cells: Sequence[str]) -> Html:
    return tag("thead", tag("tr", *[tag("th", c, scope="col") for c in cells]))


def _scroll(table: Html) -> Html:
    return tag("div", table, cls="scroll")


def grid_table(grid: Grid) -> Html:
    """schedule x budget, best per budget in bold, published numbers and counts beneath, the difference in the foot."""
    best = {b: grid.best(b) for b in grid.budgets}
    rows = []
    for schedule in grid.schedules:
        cells = [tag("th", clean(schedule, 80), scope="row")]
        for budget in grid.budgets:
            square = grid.squares[schedule, budget]
            main = tag("b" if schedule in best[budget] else "span", value_text(square), cls="value")
            under = [tag("small", t) for t in [published_text(square, grid.task)] if t]
            if short := count_text(square, len(grid.seeds)):
                under.append(tag("small", short, cls="short"))
            cells.append(tag("td", main, *under, cls="" if square.values else "gap"))
        rows.append(tag("tr", *cells))
    foot = _differences(grid)
    return _scroll(tag("table", _head(["schedule", *grid.budgets]), tag("tbody", *rows), foot, cls="grid"))


def difference_text(d: Summary) -> tuple[str, str]:
    """A difference in points and its 95% interval, "" for one seed."""
    return signed(d.mean), "" if math.isnan(d.low) else f"{signed(d.low)} to {signed(d.high)}"


def _differences(grid: Grid) -> Html:
    """The foot of a table: a row per comparison."""
    rows = []
    for verdict in differences(grid):
        name = tag("th", f"{verdict.first} − {verdict.second}", tag("small", "points"), scope="row")
        cells = []
        for budget in grid.budgets:
            mean, span = difference_text(d) if (d := verdict.differences.get(budget)) else ("—", "")
            cells.append(tag("td", mean, *([tag("small", span)] if span else [])))
        rows.append(tag("tr", name, *cells))
    return tag("tfoot", *rows) if rows else Html("")


def _tint(d: Any) -> str:
    """Class of a difference: who is ahead, how far, and whether the interval leaves zero."""
    if d.mean == 0:
        return "even"
    size = sum(abs(100 * d.mean) >= limit for limit in (0.3, 1, 3))
    return f"{'win' if d.mean > 0 else 'loss'}{size}" + (" sure" if apart(d) else "")


def overview(verdicts: Sequence[Verdict]) -> Html:
    """Task x budget: the first screen's answer."""
    budgets = _columns(verdicts)
    rows = []
    for v in verdicts:
        link = tag("a", v.grid.title, href=f"#{anchor(v.grid)}")
        altered = [tag("small", v.grid.altered(), cls="altered")] if v.grid.departures else []
        cells = [tag("th", link, tag("small", v.grid.metric), *altered, scope="row")]
        for budget in budgets:
            d = v.differences.get(budget)
            cells.append(tag("td", signed(d.mean, 1), cls=_tint(d)) if d else tag("td", "—", cls="gap"))
        n = sorted({d.n for d in v.differences.values()})
        runs = f"{n[0]}" if len(n) == 1 else f"{n[0]}–{n[-1]}"
        cells += [tag("td", signed(v.mean, 1), cls="mean"), tag("td", runs)]
        rows.append(tag("tr", *cells))
    first, second = verdicts[0].first, verdicts[0].second
    several = any(d.n > 1 for v in verdicts for d in v.differences.values())
    caption = tag(
        "caption", tag("b", f"{first} minus {second}"), ", percentage points, paired over seeds. ",
        tag("i", f"{first} ahead", cls="win2"), " ", tag("i", f"{second} ahead", cls="loss2"),
        " Bold: the 95% interval leaves zero." if several else "",
    )  # fmt: skip
    return _scroll(
        tag("table", caption, _head(["task", *budgets, "mean", "seeds"]), tag("tbody", *rows), cls="overview")
    )


def _columns(verdicts: Sequence[Verdict]) -> list[str]:
    place = {b: v.grid.position[b] for v in verdicts for b in v.differences}
    return sorted(place, key=lambda b: (place[b], b))


def anchor(grid: Grid) -> str:
    """The id of a task's section."""
    key = f"{grid.task}/{grid.optimizer}/{grid.metric}/{grid.rule}/{grid.family}"
    key += "".join(f"/{d}" for d in grid.departures) + (f"/{grid.data}" if grid.data else "")
    return "t" + hashlib.sha256(key.encode()).hexdigest()[:8]


def cost_table(grid: Grid) -> Html:
    """What each budget cost: medians over its runs."""
    heads = ["budget", "runs", "training", "evaluation", "waiting for data", "compiling", "samples/s",
             "peak memory", "best seen at", "resumed", "updates skipped", "samples missing", "device"]  # fmt: skip
    rows = []
    for c in costs(grid):
        values = [
            c["budget"], c["runs"], seconds_text(c["train_seconds"]), seconds_text(c["eval_seconds"]),
            _percent(c["data_wait"]), seconds_text(c["compile_seconds"]), _or_dash(c["samples_per_second"], "{:,.1f}"),
            _or_dash(c["peak_memory_bytes"], "{:.2f} GiB", 2**30), _percent(c["best_place"]), c["resumed"],
            c["skipped"], c["missing"], ", ".join(c["devices"][:4]),
        ]  # fmt: skip
        rows.append(tag("tr", tag("th", values[0], scope="row"), *[tag("td", v) for v in values[1:]]))
    return _scroll(tag("table", _head(heads), tag("tbody", *rows), cls="list"))


def _or_dash(value: float | None, form: str, unit: float = 1.0) -> str:
    return "—" if value is None else form.format(value / unit)


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.0f}%"


# ---- sections


def task_section(grid: Grid, pictures: Sequence[Picture]) -> Html:
    """One task: what it says, the table, the pictures, the rest folded away."""
    verdict = compare(grid)
    finished = sum(len(q.runs) for q in grid.squares.values())
    possible = sum(len(q.seeds) for q in grid.squares.values())
    missing = sum(q.missing for q in grid.squares.values())
    unfinished = sum(sum(q.states.values()) for q in grid.squares.values())
    best = leader(grid)
    says = [sentence([verdict]) + "." if verdict else best and f"{best}.", reach(grid)]
    facts = f"{finished} of {possible} runs finished" + (
        f", {unfinished} unfinished or unreadable" if unfinished else ""
    )
    facts += f", {missing} missing" if missing else ""
    rule = {"best": "best evaluation of the run", "final": "final model"}.get(grid.rule, "")
    models = sorted(
        {r.result["model"] for q in grid.squares.values() for r in q.runs if r.result and r.result["model"]}
    )
    meta = " · ".join(filter(None, [grid.metric, rule, *models[:3], grid.optimizer, AXES[grid.family], facts]))
    title = grid.title if grid.family == "fraction" else f"{grid.title}, {AXES[grid.family].removeprefix('budget, ')}"
    parts = [tag("h2", title), *departures(grid), tag("p", meta, cls="meta")]
    parts.append(tag("p", " ".join(filter(None, says)), cls="says"))
    parts += [tag("p", line, cls="meta") for line in answers(grid)]
    parts += [grid_table(grid), *[tag("p", line, cls="note") for line in remarks(grid)]]
    parts.append(tag("p", " ".join([unit_text(grid), differences_text(grid), *sources(grid)]), cls="note"))
    parts.append(tag("div", *[_figure(p) for p in pictures], cls="figures"))
    for other in secondary(grid):
        parts.append(
            fold(
                f"Also measured: {clean(other.metric, 40)}",
                grid_table(other),
                tag("p", " ".join(sources(other)), cls="note"),
            )
        )
    if finished:
        parts.append(fold("What it cost", cost_table(grid)))
    return tag("section", *parts, id=anchor(grid))


def departures(grid: Grid) -> list[Html]:
    """What departs from the named recipe, once for the whole section; the named value in brackets."""
    if not grid.departures:
        return []
    listed = [part for d in grid.departures for part in (", ", tag("code", d))][1:]
    return [tag("p", f"Departs from {grid.task} in ", *listed, ".", cls="departures")]


def _figure(picture: Picture) -> Html:
    data = base64.b64encode(picture.data).decode()
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.says)}">')
    return tag("figure", image)


def fold(title: str, *inside: Html) -> Html:
    """A folded part of the page."""
    return tag("details", tag("summary", title), *inside)


def _more(total: int) -> Html:
    return tag("p", f"{total - LISTED:,} more are not listed here.", cls="note") if total > LISTED else Html("")


def entry_section(title: str, intro: str, entries: Sequence[Entry], out: Path, last: str = "why") -> Html:
    """A list of directories with their state and why, or what else the last column is."""
    rows = []
    for e in entries[:LISTED]:
        step, total = e.progress.get("step"), e.progress.get("total")
        where = clean(e.path.relative_to(out) if e.path.is_relative_to(out) else e.path)
        done = "—" if step is None or not total else f"{step:,} of {total:,}"
        rows.append(tag("tr", tag("th", where, scope="row"), *[tag("td", v) for v in (e.state, done, e.note or "—")]))
    table = _scroll(tag("table", _head(["directory", "state", "iterations", last]), tag("tbody", *rows), cls="list"))
    return tag(
        "section", tag("h2", f"{title} ({len(entries):,})"), tag("p", intro, cls="meta"), table, _more(len(entries))
    )


def masthead(headline: str, standfirst: Sequence[str], counts: Mapping[str, int]) -> Html:
    """The first lines of the page."""
    chips = [
        tag("li", tag("b", f"{n:,}"), f" {state}", cls=state) for state, n in counts.items() if n or state == "done"
    ]
    return tag(
        "header", tag("p", "Budgeted training · report", cls="kicker"), tag("h1", headline + "."),
        *[tag("p", line, cls="standfirst") for line in standfirst if line], tag("ul", *chips, cls="chips"),
    )  # fmt: skip


def document(title: str, body: Iterable[Html]) -> str:
    """The whole page. The policy allows the one style sheet by its hash and embedded pictures, nothing else."""
    css = STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{css}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{join(body)}</main></body></html>\n'
