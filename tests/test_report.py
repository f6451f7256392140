"""The report and the status: what counts, what is shown, what is escaped, how long it takes."""

import csv
import hashlib
import io
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import plots, report, results, status, tables
from benchmarks.make_results import make, record, write_run
from benchmarks.results import BadFile, amount, clean, last_step, read_curve, scan, seconds_text
from budgeted.cells import digest

HERE = socket.gethostname()
ROOT = Path(__file__).resolve().parent.parent


def run(task, schedule, budget, seed, value, suffix="", **more):
    """A result.json with this reported value."""
    data = record(task, schedule, budget, seed, suffix or "abc123", random.Random(0))
    metric = data["reported"]["metric"]
    data["metrics"][metric] |= {"final": value, "best": value}
    data["reported"]["value"] = value
    return data | more


def put(out, *args, suffix="", **more):
    return write_run(out, run(*args, suffix=suffix, **more), suffix)


def state(out, cell, **fields):
    path = out / cell
    path.mkdir(parents=True)
    base = {"state": "running", "step": 5, "total": 10, "error": None, "host": HERE, "pid": os.getpid(), "job": None}
    (path / "state.json").write_text(json.dumps(base | fields))
    return path


def text(renderable, width=160):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def pair(tmp_path):
    """linear against step on imagenet: +2 points at 5%, -1 at 100%, three seeds."""
    for seed, shift in enumerate((-0.01, 0.0, 0.01)):
        put(tmp_path, "imagenet", "linear", "5%", seed, 0.52 + shift)
        put(tmp_path, "imagenet", "step", "5%", seed, 0.50 + shift)
        put(tmp_path, "imagenet", "linear", "100%", seed, 0.69 + 2 * shift)
        put(tmp_path, "imagenet", "step", "100%", seed, 0.70 + shift)
    return tmp_path


# ---- numbers


def test_means_over_other_seeds_are_not_compared(pair):
    put(pair, "imagenet", "cosine", "5%", 2, 0.99)
    put(pair, "imagenet", "linear", "1%", 0, 0.3)
    put(pair, "imagenet", "step", "1%", 1, 0.2)
    (grid,), _ = tables.grids(scan(pair))
    assert grid.best("5%") == {"linear"} and grid.best("1%") == set()


def test_ranks_colours_and_the_full_value_are_of_the_same_seeds(pair, monkeypatch):
    for budget, value in (("5%", 0.99), ("100%", 0.98)):
        put(pair, "imagenet", "rex", budget, 2, value)
        for seed in range(3):
            put(pair, "imagenet", "cosine", budget, seed, 0.1)
    (grid,), _ = tables.grids(scan(pair))
    assert grid.schedules == ["linear", "step", "cosine", "rex"] and math.isnan(grid.ranks()["rex"])
    assert [grid.ranks()[s] for s in grid.schedules[:3]] == [1.5, 1.5, 3.0]
    assert tables.full_value(grid) == pytest.approx(0.70)
    gaps = dict(zip(grid.schedules, grid.gaps().tolist(), strict=True))
    assert gaps["linear"] == pytest.approx([0, 0.01]) and all(map(math.isnan, gaps["rex"]))
    drawn = {}
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, s, **k: drawn.update({s: k["weight"]}))
    plots.heat_map(grid)
    assert (drawn["52.0"], drawn["70.0"], drawn["99.0"], drawn["98.0"]) == ("bold", "bold", "normal", "normal")


def test_a_budget_with_nothing_to_compare_leaves_the_ranks_alone(pair):
    put(pair, "imagenet", "rex", "10%", 0, 0.5)
    (grid,), _ = tables.grids(scan(pair))
    assert [grid.ranks()[s] for s in ("linear", "step")] == [1.5, 1.5] and math.isnan(grid.ranks()["rex"])


@pytest.mark.parametrize("seeds, said", [(1, ""), (2, ""), (3, " (band: 95% interval)")])
def test_a_band_is_named_where_there_is_one(tmp_path, monkeypatch, seeds, said):
    for seed in range(seeds):
        for budget in ("5%", "100%"):
            put(tmp_path, "imagenet", "linear", budget, seed, 0.5 + seed / 100)
            put(tmp_path, "imagenet", "step", budget, seed, 0.4)
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **k: titles.append(title))
    plots.gain_curve(tables.grids(scan(tmp_path))[0][0])
    assert titles == [f"top1, points above step{said}"]


def test_what_a_budget_reaches_is_of_the_same_seeds(pair):
    put(pair, "imagenet", "linear", "50%", 2, 0.69)
    (grid,), _ = tables.grids(scan(pair))
    assert tables.reach(grid) == ""
    put(pair, "imagenet", "linear", "50%", 0, 0.69)
    put(pair, "imagenet", "linear", "50%", 1, 0.69)
    (grid,), _ = tables.grids(scan(pair))
    assert tables.reach(grid) == "With linear, 50% of the budget reaches 99% of the full-budget top1."


def test_grid_against_literals(pair):
    (grid,), _ = tables.grids(scan(pair))
    assert (grid.metric, grid.rule, grid.budgets, grid.seeds) == ("top1", "best", ["5%", "100%"], [0, 1, 2])
    square = grid.squares["linear", "5%"].summary
    assert (square.n, round(square.mean, 9), round(square.std, 9)) == (3, 0.52, 0.01)
    assert grid.best("5%") == {"linear"} and grid.best("100%") == {"step"}
    verdict = tables.compare(grid)
    assert (verdict.wins, verdict.losses, round(verdict.mean, 9)) == (1, 1, 0.005)
    assert round(verdict.differences["100%"].std, 9) == 0.01


def test_headline_counts_budgets(pair):
    shutil.rmtree(pair / "imagenet" / "step" / "100%")
    found = report.survey(pair)
    assert found.headline == "linear beats step at 1 of 1 budget on imagenet (mean +2.0 pp, n=3)"
    put(pair, "imagenet", "step", "100%", 0, 0.5)
    assert report.survey(pair).headline == "linear beats step at 2 of 2 budgets on imagenet (mean +9.5 pp, n=1–3)"
    put(pair, "imagenet", "linear", "10%", 0, 0.5)
    put(pair, "imagenet", "step", "10%", 0, 0.4)
    put(pair, "coco", "step", "10%", 0, 0.4)
    put(pair, "coco", "linear", "10%", 0, 0.1)
    assert report.survey(pair).headline.startswith("linear beats step at 3 of 4 task-budget pairs over 2 tasks")


def test_headline_when_step_is_ahead_or_absent(tmp_path):
    put(tmp_path, "coco", "step", "10%", 0, 0.4)
    put(tmp_path, "coco", "linear", "10%", 0, 0.1)
    assert report.survey(tmp_path).headline == "step beats linear at 1 of 1 budget on coco (mean +30.0 pp, n=1)"
    shutil.rmtree(tmp_path / "coco" / "step")
    put(tmp_path, "coco", "rex", "10%", 0, 0.2)
    assert report.survey(tmp_path).headline == (
        "rex is best at 1 of 1 budget on coco (n=1), nowhere told apart from the runner-up"
    )


def test_real_tasks_speak_before_tiny_ones(pair):
    put(pair, "imagenet_tiny", "linear", "5%", 0, 0.1)
    put(pair, "imagenet_tiny", "step", "5%", 0, 0.9)
    assert "tiny" not in report.survey(pair).headline


def test_budgets_sort_by_share_and_clocks_stand_apart(tmp_path):
    for budget, fraction in (("100%", 1.0), ("900it", 0.02), ("5%", 0.05), ("1%", 0.01)):
        data = run("imagenet", "linear", budget if budget[-1] == "%" else "1%", 0, 0.5)
        data["budget"] = {"amount": budget, "fraction": fraction, "iterations": None, "full_iterations": None}
        write_run(tmp_path, data)
    for budget in ("2h", "45min", "8gpuh"):
        data = run("imagenet", "linear", "1%", 0, 0.5)
        data["budget"] = {"amount": budget, "fraction": 0.3, "iterations": 7, "full_iterations": 70}
        write_run(tmp_path, data)
    found, _ = tables.grids(scan(tmp_path))
    assert [(g.family, g.budgets) for g in found] == [
        ("fraction", ["1%", "900it", "5%", "100%"]),
        ("clock", ["45min", "2h"]),
        ("gpuh", ["8gpuh"]),
    ]


def test_an_unfinished_budget_has_its_place_by_another_of_its_unit(tmp_path):
    data = run("imagenet", "linear", "1%", 0, 0.5)
    data["budget"] = {"amount": "900it", "fraction": 0.02, "iterations": 900, "full_iterations": 45000}
    write_run(tmp_path, data)
    put(tmp_path, "imagenet", "linear", "1%", 0, 0.5)
    for budget in ("100it", "2000it", "10ep", "9ep"):
        state(tmp_path, f"imagenet/linear/{budget}/s0")
    (grid,), _ = tables.grids(scan(tmp_path))
    assert grid.budgets == ["100it", "1%", "900it", "2000it", "9ep", "10ep"]
    assert grid.position["2000it"] == pytest.approx(2000 / 45000) and math.isnan(grid.position["9ep"])


@pytest.mark.parametrize(
    "written, meant",
    [
        ("5%", ("fraction", 0.05)),
        ("45min", ("clock", 45)),
        ("90s", ("clock", 1.5)),
        ("1.5h", ("clock", 90)),
        ("3e17flop", ("flop", 3e17)),
    ],
)
def test_amounts(written, meant):
    assert amount(written) == meant


@pytest.mark.parametrize("written", ["", "5", "%", "-5%", "5 parsecs", "../5%", "nan%"])
def test_what_is_no_amount(written):
    with pytest.raises(BadFile):
        amount(written)


def test_published_numbers_stand_only_beside_the_paper_s_recipe(pair):
    put(pair, "imagenet", "linear", "10%", 0, 0.6, suffix="0a1b2c")
    put(pair, "imagenet_tiny", "linear", "5%", 0, 0.5)
    squares = {g.task: g.squares for g in tables.grids(scan(pair))[0]}
    assert squares["imagenet"]["linear", "5%"].published[:2] == (0.5726, 0.0024)
    assert ("linear", "10%") not in squares["imagenet"]
    assert squares["imagenet_tiny"]["linear", "5%"].published is None


@pytest.mark.parametrize(
    "n_train, missing, shown", [(219_782, 20_018, True), (100_000, 0, True), (800, 3, False), (None, None, False)]
)
def test_kinetics_numbers_stand_only_beside_a_whole_data_set(tmp_path, n_train, missing, shown):
    data = run("kinetics", "linear", "25%", 0, 0.6)
    write_run(tmp_path, data | {"data": data["data"] | {"n_train": n_train, "missing": missing}})
    found = report.survey(tmp_path)
    count = "an unknown number of" if n_train is None else f"{n_train:,}"
    ours = f"Ours: {count} training clips, {'an unknown number' if missing is None else f'{missing:,}'} missing."
    (row,) = csv.DictReader(io.StringIO(report.to_csv(found)))
    terminal = " ".join(text(report.render_terminal(tmp_path)).split())
    for shape in (report.markdown(found), report.build(tmp_path).read_text(), row["published_note"], terminal):
        assert ours in shape and ("No published number stands beside" in shape) != shown
    assert ("paper 66.34" in report.markdown(found), row["published_mean"] == "0.6634") == (shown, shown)


def test_what_differs_from_rex_is_said_wherever_its_numbers_are(tmp_path):
    put(tmp_path, "cifar10_resnet20", "rex", "1%", 0, 0.7)
    found = report.survey(tmp_path)
    (row,) = csv.DictReader(io.StringIO(report.to_csv(found)))
    terminal = " ".join(text(report.render_terminal(tmp_path)).split())
    for shape in (report.markdown(found), report.build(tmp_path).read_text(), row["published_note"], terminal):
        assert "it tuned the learning rate for every cell, ours is fixed" in shape
        assert "5,000 held-out training images, with 45,000 left to train on" in shape


CONFIG = """seed: {seed}
out: /elsewhere
precision: fp32
data: {{root: /mine, subset: {subset}}}
optimizer: {{name: sgd, momentum: 0.9}}
task: {{name: {task}, lr: 0.1, model: {model}, samples: 7, warmup: {{fraction: 0}}}}
schedule: {{name: {schedule}{constants}}}
"""


def put_altered(out, schedule, budget, seed, value, subset=5000, model="mine", constants="", task="cifar10"):
    """A finished run of cifar10 with another model and less data, as the trainer leaves it."""
    words = (task, schedule, budget, str(seed), str(subset), model, constants)
    suffix = hashlib.sha256(" ".join(words).encode()).hexdigest()[:6]
    data = run("imagenet", schedule, budget, seed, value, suffix=suffix)
    data |= {"task": task, "data": data["data"] | {"n_train": subset}}
    path = write_run(out, data, suffix, curve=True)
    fields = {"task": task, "schedule": schedule, "seed": seed, "subset": subset, "model": model}
    (path / "config.yaml").write_text(CONFIG.format(**fields, constants=constants))
    return path


@pytest.fixture
def variant(tmp_path):
    """linear against step on altered cifar10: +4 points at 5%, +1 at 100%, two seeds."""
    for seed, shift in enumerate((-0.01, 0.01)):
        for schedule, at_5, at_100 in (("linear", 0.44, 0.71), ("step", 0.40, 0.70)):
            put_altered(tmp_path, schedule, "5%", seed, at_5 + shift)
            put_altered(tmp_path, schedule, "100%", seed, at_100 + shift)
    return tmp_path


def test_altered_runs_have_a_grid_of_their_own(variant):
    (grid,), left = tables.grids(scan(variant))
    assert (grid.title, grid.budgets, grid.schedules, grid.seeds, left) == (
        "cifar10, altered", ["5%", "100%"], ["linear", "step"], [0, 1], [],
    )  # fmt: skip
    assert list(map(str, grid.departures)) == ["data.subset 5000 (null)", "task.model mine (resnet18_cifar)"]
    assert [[round(v, 9) for v in row] for row in grid.means()] == [[0.44, 0.71], [0.40, 0.70]]
    found = report.survey(variant)
    assert found.headline == (
        "linear beats step at 2 of 2 budgets on cifar10 (altered: data.subset 5000, task.model mine) (mean +2.5 pp, n=2)"
    )
    assert "| linear | **44.00 ± 1.41** | **71.00 ± 1.41** |" in report.markdown(found).splitlines()
    rows = list(csv.DictReader(io.StringIO(report.to_csv(found))))
    assert {r["altered"] for r in rows} == {"data.subset 5000 (null), task.model mine (resnet18_cifar)"}
    index = report.build(variant)
    page = index.read_text()
    assert page.count("task.model mine (resnet18_cifar)") == 1 and "44.00 ± 1.41" in page
    kinds = {p.stem.split("-")[-1] for p in index.parent.glob("*.png")}
    assert kinds == {"budget", "gain", "lr", "loss"}  # a heat map of two schedules would repeat the table
    assert "data.subset 5000 (null)" in text(report.render_terminal(variant))


def test_named_recipes_come_first_and_published_numbers_only_beside_them(pair):
    for schedule in ("linear", "step"):
        put_altered(pair, schedule, "5%", 0, 0.99, subset=1_281_167, task="imagenet")
    (named, altered), _ = tables.grids(scan(pair))
    assert (named.departures, altered.title) == ((), "imagenet, altered")
    assert named.squares["linear", "5%"].published and not altered.squares["linear", "5%"].published
    assert not tables.secondary(altered)
    found = report.survey(pair)
    assert found.headline.startswith("linear and step are level on imagenet: each ahead at 1 of 2 budgets")
    markdown = report.markdown(found)
    assert "paper 5" in markdown.split("altered")[0] and "paper 5" not in markdown.split("altered", 1)[1]


def test_constants_name_the_schedule_and_anything_else_splits(tmp_path):
    put_altered(tmp_path, "exp", "5%", 0, 0.5)
    put_altered(tmp_path, "exp", "5%", 0, 0.6, constants=", gamma: 0.99")
    put_altered(tmp_path, "exp", "5%", 0, 0.7, model="other")
    put_altered(tmp_path, "exp", "5%", 0, 0.8, subset=600)
    found, left = tables.grids(scan(tmp_path))
    assert [(g.altered(), g.schedules) for g in found] == [
        ("data.subset 5000, task.model mine", ["exp gamma=0.99", "exp"]),
        ("data.subset 5000, task.model other", ["exp"]),
        ("data.subset 600, task.model mine", ["exp"]),
    ] and not left
    assert report.survey(tmp_path).headline.startswith("exp gamma=0.99 is best at 1 of 1 budget on cifar10 (altered:")


def put_recipe(out, task, schedule, seed, *changes, run_of=None, n_train=None):
    """A finished suffixed run at 5% of a task of conf/, composed by Hydra with these overrides, as the trainer does."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    words = [f"task={task}", f"schedule={schedule}", "budget=5%", f"seed={seed}", *changes]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", [*words, *([f"schedule.run={run_of}"] if run_of else [])])
    suffix = hashlib.sha256(" ".join([*words, str(run_of)]).encode()).hexdigest()[:6]
    data = run("coco" if task.startswith("coco") else "imagenet", schedule, "5%", seed, 0.5, suffix=suffix)
    data |= {"task": task, "data": data["data"] | {"n_train": n_train or config.task.get("samples", 240_000)}}
    path = write_run(out, data, suffix)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return path


@pytest.mark.parametrize("task", ["coco", "cityscapes", "kinetics", "kinetics_tiny", "imagenet"])
def test_only_what_was_changed_departs(tmp_path, task):
    put_recipe(tmp_path, task, "linear", 0, "task.lr=0.123")
    put_recipe(tmp_path, task, "exp", 0, "schedule.gamma=0.99")
    put_recipe(tmp_path, task, "linear", 1, "task.weights=/mine/R-50.pkl")
    put(tmp_path, task, "linear", "5%", 0, 0.5) if task in ("coco", "imagenet") else None
    found, left = tables.grids(scan(tmp_path))
    assert [g.altered() for g in found] == ["", "task.lr 0.123", "task.weights R-50.pkl"] and not left
    assert "exp gamma=0.99" in found[0].schedules and ("linear" in found[0].schedules) == (task in ("coco", "imagenet"))


def test_a_task_s_own_optimizer_value_departs_where_it_is_changed(tmp_path):
    put_recipe(tmp_path, "kinetics", "linear", 0, "optimizer.nesterov=false")
    (grid,), _ = tables.grids(scan(tmp_path))
    assert list(map(str, grid.departures)) == ["optimizer.nesterov false (true)"]


def test_an_optimizer_of_another_name_departs_by_its_name_alone(tmp_path):
    put_recipe(tmp_path, "imagenet", "linear", 0, "optimizer=adam")
    (grid,), _ = tables.grids(scan(tmp_path))
    assert list(map(str, grid.departures)) == ["optimizer adam (sgd)"]


def test_refined_stands_beside_the_others_under_the_name_of_its_source(pair):
    for seed in range(2):
        put_recipe(pair, "imagenet", "refined", seed, run_of="runs/imagenet/linear/100%/s0")
        put_recipe(pair, "imagenet", "refined", seed, run_of=f"/{'long/' * 30}imagenet/linear/100%/s1")
    put_recipe(pair, "imagenet", "refined", 0, run_of="/elsewhere/imagenet_tiny/linear/100%/s1")
    put_recipe(pair, "imagenet", "refined", 0, "schedule.power=1", run_of="/elsewhere/mine")
    for source in ("first", "second"):
        put_recipe(pair, "imagenet", "refined", 0, run_of=f"/{source}/imagenet/linear/100%/s7")
    (grid,), left = tables.grids(scan(pair))
    names = {
        "linear", "step", "refined run=linear/100%/s0", "refined run=linear/100%/s1",
        "refined run=imagenet_tiny/linear/100%/s1", "refined power=1 run=mine",
    }  # fmt: skip
    twins = {s for s in grid.schedules if s.startswith("refined run=linear/100%/s7")}
    assert set(grid.schedules) - twins == names and len(twins) == 2 and not left and not grid.departures
    assert grid.squares["refined run=linear/100%/s1", "5%"].values.keys() == {0, 1}


def test_other_data_split_by_their_size_and_unfinished_runs_join_in(tmp_path):
    for seed, size in ((0, 300), (1, 300), (2, 40)):
        path = put_altered(tmp_path, "linear", "5%", seed, 0.5, subset=size, model="resnet18_cifar")
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace(f"subset: {size}", "subset: null"))
    path = state(tmp_path, "cifar10/step/5%/s0-abcdef")
    (path / "config.yaml").write_text(config.replace("subset: 40", "subset: null").replace("linear", "step"))
    (many, few), _ = tables.grids(scan(tmp_path))
    assert (str(many.departures[0]), many.squares["step", "5%"].states) == (
        "training samples 300 (45000)", {"running": 1},
    )  # fmt: skip
    assert few.altered() == "training samples 40"


def test_runs_of_an_unreadable_recipe_are_listed(variant):
    put(variant, "imagenet", "linear", "10%", 0, 0.5, suffix="0a1b2c")
    bomb = put(variant, "imagenet", "linear", "10%", 1, 0.5, suffix="0a1b2d") / "config.yaml"
    bomb.write_text("task: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    found = report.survey(variant)
    assert len(found.grids) == 1 and [e.cell.suffix for e in found.left] == ["0a1b2c", "0a1b2d"]
    page = report.build(variant).read_text()
    assert "Altered in an unknown way (2)" in page and "imagenet/linear/10%/s0-0a1b2c" in page
    rows = list(csv.DictReader(io.StringIO(report.to_csv(found))))
    assert [float(r["mean"]) for r in rows if r["task"] == "imagenet"] == [0.5, 0.5]


def test_inherited_values_are_named():
    named = dict(tables._task("cifar10_resnet20"))
    assert (named["task.batch_size"], named["task.model"], named["task.rule"]) == ("128", "resnet20", "final")


def test_all_finished_runs_are_counted(tmp_path):
    put_altered(tmp_path, "linear", "5%", 0, 0.5)
    put(tmp_path, "imagenet", "linear", "10%", 0, 0.5, suffix="0a1b2c")
    assert report.survey(tmp_path).headline == "2 finished runs: not enough to compare schedules yet"


def test_best_place_is_the_share_of_the_run(tmp_path):
    data = run("imagenet", "step", "10%", 0, 0.5)
    data["metrics"]["top1"]["best_step"] = data["iterations_done"] // 2 - 1
    write_run(tmp_path, data)
    (grid,), _ = tables.grids(scan(tmp_path))
    assert tables.costs(grid)[0]["best_place"] == 0.5


# ---- what may be compared


def on(out, schedule, seed, value, suffix, task="imagenet", parts=None, iterations=None, budget="5%", **data):
    """A finished run on this data; a key given as None is absent, as in older results."""
    made = run(task, schedule, budget, seed, value)
    made["data"] = {key: v for key, v in (made["data"] | data).items() if v is not None}
    made |= {"parts": parts} if parts else {}
    made |= {"iterations_done": iterations} if iterations else {}
    path = write_run(out, made | {"signature": suffix or "abc123"}, suffix)
    if suffix:
        fields = {"task": task, "schedule": schedule, "seed": seed, "subset": "null", "model": "mine"}
        (path / "config.yaml").write_text(CONFIG.format(**fields, constants=""))


OLD = {"digest": None, "classes": None}


@pytest.mark.parametrize(
    "one, two, apart",
    [
        ({"digest": "a" * 12}, {"digest": "b" * 12}, True),
        ({"digest": "a" * 12}, {"digest": "a" * 12}, False),
        ({**OLD, "n_val": 250}, {**OLD, "n_val": 500}, True),
        ({**OLD, "n_val": 250}, {**OLD, "n_val": 250}, False),
        ({"digest": None, "classes": 3}, {"digest": None, "classes": 4}, True),
        ({"digest": None}, {"digest": "a" * 12}, False),
        ({"digest": None, "n_val": 7}, {"digest": "a" * 12, "n_val": 8}, True),
        ({**OLD, "n_val": None}, {"digest": "a" * 12, "n_val": None}, True),
    ],
)
@pytest.mark.parametrize("suffixes", [("", ""), ("0a1b2c", "0a1b2d")])
def test_runs_on_different_data_never_share_a_table(tmp_path, one, two, apart, suffixes):
    on(tmp_path, "linear", 0, 0.3, suffixes[0], root="/own/pB", **one)
    on(tmp_path, "cosine", 0, 0.2, suffixes[1], root="/own/pC", **two)
    found = report.survey(tmp_path)
    assert [g.schedules for g in found.grids] == ([["linear"], ["cosine"]] if apart else [["linear", "cosine"]])
    titles = [g.title for g in found.grids]
    assert [t.rpartition(", ")[2] for t in titles if apart] == ["data in …/pB", "data in …/pC"][: 2 * apart]
    assert found.headline.startswith("2 finished runs: not enough" if apart else "linear is best")
    remark = "Data in /own/pB, /own/pC: older results have no digest to tell whether they are the same."
    known = one["digest"] and two["digest"]
    for shown in (text(report.render_terminal(tmp_path), 1000), report.markdown(found)):
        assert (remark in shown) == (not apart and not known)
        assert all(title in shown for title in titles)
    assert len({report.page.anchor(g) for g in found.grids}) == len(titles)


def test_a_digest_that_two_could_have_is_guessed_for_none(tmp_path):
    for schedule, name in (("linear", "a" * 12), ("step", "b" * 12), ("cosine", None)):
        on(tmp_path, schedule, 0, 0.3, "", digest=name, root="/same")
    titles = [g.title for g in report.survey(tmp_path).grids]
    assert titles == [
        "imagenet, data in …/same (50,000 validation samples, 10 classes, no digest)",
        "imagenet, data in …/same (digest aaaaaaaaaaaa)",
        "imagenet, data in …/same (digest bbbbbbbbbbbb)",
    ]


def test_equal_values_and_seeds_on_two_data_sets_are_no_duplicates(tmp_path):
    on(tmp_path, "linear", 0, 0.3, "0a1b2c", digest="a" * 12, root="/pB")
    on(tmp_path, "linear", 0, 0.2, "0a1b2d", digest="b" * 12, root="/pC")
    found = report.survey(tmp_path)
    assert not found.left and [float(g.means()[0, 0]) for g in found.grids] == [0.3, 0.2]


def test_real_data_given_to_a_tiny_task_are_not_called_embedded(tmp_path):
    for seed in (0, 1):
        data = run("imagenet_tiny", "linear", "5%", seed, 0.5)
        write_run(tmp_path, data | {"data": data["data"] | {"digest": "c" * 12, "root": "/data/photos"}})
    assert "Embedded data" not in text(report.render_terminal(tmp_path), 1000)


def test_a_schedule_that_is_not_compared_is_named_and_so_is_the_side_of_an_interval(tmp_path):
    for seed, shift in enumerate((-0.001, 0.0, 0.001)):
        put(tmp_path, "imagenet", "step", "5%", seed, 0.4 + 2 * shift)
        put(tmp_path, "imagenet", "linear", "5%", seed, 0.3 + shift)
        if seed:
            put(tmp_path, "imagenet", "rex", "5%", seed, 0.9 + shift)
    shown = text(report.render_terminal(tmp_path), 1000)
    assert "told apart. Left out for want of equal seeds: rex." in shown
    assert "The 95% interval of linear − step leaves zero for linear at 0 of 1 and for step at 1." in shown


def test_a_baseline_that_has_no_rank_is_not_called_the_best(tmp_path):
    for seed, shift in enumerate((-0.001, 0.0, 0.001)):
        put(tmp_path, "imagenet", "rex", "5%", seed, 0.4 + shift)
        if seed:
            put(tmp_path, "imagenet", "cosine", "5%", seed, 0.3 + 2 * shift)
    shown = text(report.render_terminal(tmp_path), 1000)
    assert "the baseline is cosine, the first with results" in shown and "by mean rank" not in shown


def test_own_data_speak_first_and_embedded_ones_only_alone(tmp_path):
    for schedule, value in (("linear", 0.9), ("step", 0.1)):
        put(tmp_path, "imagenet_tiny", schedule, "5%", 0, value)
    caveat = "Embedded data: this shows that the code path works, not how a schedule fares."
    shapes = (text(report.render_terminal(tmp_path), 1000), report.markdown(report.survey(tmp_path)))
    assert all(caveat in shape for shape in (*shapes, report.build(tmp_path).read_text()))
    assert report.survey(tmp_path).headline.startswith("linear beats step at 1 of 1 budget on imagenet_tiny")
    for schedule, value in (("mine", 0.5), ("cosine", 0.4)):
        put_altered(tmp_path, schedule, "5%", 0, value)
    found = report.survey(tmp_path)
    assert found.headline.startswith("mine is best at 1 of 1 budget on cifar10 (altered")
    assert [g.task for g in found.grids] == ["cifar10", "imagenet_tiny"]
    page = report.build(tmp_path).read_text()
    assert "linear minus step" not in page and page.index("cifar10, altered</h2>") < page.index("imagenet_tiny</h2>")
    shutil.rmtree(tmp_path / "cifar10/cosine")
    assert report.survey(tmp_path).headline == "3 finished runs: not enough to compare schedules yet"


def put_values(out, **values):
    """Runs at 5%: schedule -> the value of each seed."""
    for schedule, several in values.items():
        for seed, value in enumerate(several):
            put(out, "imagenet", schedule, "5%", seed, value)


@pytest.mark.parametrize(
    "mine, told",
    [
        ((0.450, 0.452, 0.472), "not told apart"),  # -0.3, +0.1, +1.2 points
        ((0.463, 0.462, 0.470), "told apart"),  # +1.0, +1.1, +1.0 points
        ((0.463,), "not told apart, one seed has no interval"),
    ],
)
def test_a_budget_s_best_is_told_from_the_runner_up_only_beyond_chance(tmp_path, mine, told):
    linear = (0.453, 0.451, 0.460)[: len(mine)]
    put_values(tmp_path, linear=linear, mine=mine, cosine=[v - 0.1 for v in linear])
    (grid,), _ = tables.grids(scan(tmp_path))
    (line,) = tables.answers(grid)
    assert line.startswith("5%: mine ") and "runner-up linear" in line
    assert line.endswith((f", {told}.", f": {told}."))
    where = "told apart from the runner-up at 1" if told == "told apart" else "nowhere told apart from the runner-up"
    assert tables.leader(grid).endswith(where)


def test_a_budget_without_two_of_equal_seeds_has_no_best(tmp_path):
    put_values(tmp_path, linear=(0.40, 0.44))
    (grid,), _ = tables.grids(scan(tmp_path))
    assert tables.answers(grid) == ["5%: linear 42.00 ± 2.83 (2 seeds), no other schedule to compare with."]
    put_values(tmp_path, mine=(0.9,))
    (grid,), _ = tables.grids(scan(tmp_path))
    assert tables.answers(grid) == ["5%: 2 schedules, but not of equal seeds: none is called the best."]


def test_without_step_others_are_compared_with_linear_or_the_best(tmp_path):
    put_values(tmp_path, mine=(0.50, 0.52), cosine=(0.45, 0.46), rex=(0.47, 0.48))
    (grid,), _ = tables.grids(scan(tmp_path))
    assert [v[1:3] for v in tables.differences(grid)] == [("rex", "mine"), ("cosine", "mine")]
    assert "the baseline is mine, the best by mean rank." in tables.differences_text(grid)
    put_values(tmp_path, linear=(0.40, 0.44))
    found = report.survey(tmp_path)
    (grid,) = found.grids
    assert [v[1:3] for v in tables.differences(grid)] == [("mine", "linear"), ("rex", "linear"), ("cosine", "linear")]
    assert "| *mine − linear* | +9.00<br>−3.71 to +21.71 |" in report.markdown(found)
    for shape in (
        report.markdown(found),
        text(report.render_terminal(tmp_path), 1000),
        report.build(tmp_path).read_text(),
    ):
        assert "the baseline is linear, the paper&#x27;s proposal" in shape.replace("'", "&#x27;")
        assert "−3.71 to +21.71" in shape


def test_gains_are_drawn_above_the_baseline_where_there_is_no_step(tmp_path, monkeypatch):
    for schedule, value in (("linear", 0.4), ("mine", 0.5), ("cosine", 0.3)):
        for seed in range(3):
            for budget in ("5%", "100%"):
                put(tmp_path, "imagenet", schedule, budget, seed, value + seed * value / 10)
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **k: titles.append(title))
    plots.gain_curve(tables.grids(scan(tmp_path))[0][0])
    assert titles == ["top1, points above linear (band: 95% interval of mine)"]


@pytest.mark.parametrize("slowest, said", [(520, False), (453, True)])
def test_unequal_work_is_said(tmp_path, slowest, said):
    for schedule, made in (("linear", 525), ("cosine", 545), ("mine", slowest)):
        on(tmp_path, schedule, 0, 0.4, "", budget="1%", iterations=made)
    found = report.survey(tmp_path)
    line = f"1% gave the schedules unequal iterations (cosine 545, linear 525, mine {slowest})"
    for shape in (text(report.render_terminal(tmp_path), 1000), report.build(tmp_path).read_text()):
        assert (line in shape) == said
    rows = csv.DictReader(io.StringIO(report.to_csv(found)))
    assert {r["schedule"]: float(r["iterations"]) for r in rows} == {"linear": 525, "cosine": 545, "mine": slowest}


def part(step, code="c" * 12, world_size=1, device="cpu"):
    return {"step": step, "code": code, "world_size": world_size, "device": device}


def test_runs_made_in_parts_or_by_other_code_are_counted_and_named(tmp_path):
    on(tmp_path, "linear", 0, 0.4, "", parts=[part(0)])
    on(tmp_path, "linear", 1, 0.4, "", parts=[part(0)])
    on(tmp_path, "step", 0, 0.3, "", parts=[part(0), part(9, world_size=2)])
    (grid,), _ = tables.grids(scan(tmp_path))
    lines = ["1 run was continued by other code, device or number of processes: step/5%/s0."]
    assert tables.remarks(grid) == lines
    on(tmp_path, "step", 1, 0.3, "", parts=[part(0, code="d" * 12)])
    found = report.survey(tmp_path)
    lines.append("The runs were finished by 2 versions of the code; 1 not by the commonest, cccccccccccc: step/5%/s1.")
    assert tables.remarks(found.grids[0]) == lines
    shapes = text(report.render_terminal(tmp_path), 1000), report.markdown(found), report.build(tmp_path).read_text()
    assert all(line in shape for line in lines for shape in shapes)


def test_a_long_headline_is_whole_in_every_shape(tmp_path):
    model = "m" * 75
    for schedule, value in (("mine", 0.5), ("cosine", 0.4)):
        put_altered(tmp_path, schedule, "5%", 0, value, model=model)
    found = report.survey(tmp_path)
    assert len(found.headline) > 120
    assert f"**{found.headline}**" in report.markdown(found).splitlines()[0]


# ---- what counts


def edit(path, change):
    data = json.loads((path / "result.json").read_text())
    data.pop("digest")
    change(data)
    (path / "result.json").write_text(json.dumps({**data, "digest": digest(data)}))


HOSTILE = {
    "bool for a number": lambda d: d["reported"].update(value=True),
    "text for a number": lambda d: d.update(train_seconds="12"),
    "NaN": lambda d: d["metrics"]["top1"].update(best=float("nan")),
    "Infinity": lambda d: d.update(train_seconds=float("inf")),
    "a huge integer": lambda d: d.update(peak_memory_bytes=10**400),
    "a huge seed": lambda d: d.update(seed=10**400),
    "a float that overflows": lambda d: d.update(train_seconds=10**40),
    "percent for a fraction": lambda d: (d["metrics"]["top1"].update(best=69.3), d["reported"].update(value=69.3)),
    "a list for an object": lambda d: d.update(budget=[1]),
    "null for a name": lambda d: d.update(task=None),
    "another task": lambda d: d.update(task="<script>alert(1)</script>"),
    "another seed": lambda d: d.update(seed=5),
    "not done": lambda d: d.update(status="partial"),
    "another schema": lambda d: d.update(schema=2),
    "true for the schema": lambda d: d.update(schema=True),
    "a value of its own": lambda d: d["reported"].update(value=0.99),
    "an unknown rule": lambda d: d["reported"].update(rule="median"),
    "no metrics": lambda d: d.update(metrics={}),
    "a missing key": lambda d: d.pop("iterations_done"),
    "negative time": lambda d: d.update(train_seconds=-1.0),
    "a number for a device": lambda d: d.update(device=3),
    "control characters": lambda d: d.update(device="\x1b[2Jgone"),
    "parts that are no list": lambda d: d.update(parts={"step": 0}),
    "a part that is no object": lambda d: d.update(parts=[3]),
    "a number for the code": lambda d: d.update(parts=[{"step": 0, "code": 3}]),
    "a number for the digest of data": lambda d: d["data"].update(digest=3),
    "a lone surrogate": lambda d: d.update(device="\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_result_never_counts(tmp_path, name):
    edit(put(tmp_path, "imagenet", "linear", "10%", 0, 0.5), HOSTILE[name])
    (entry,) = scan(tmp_path)
    assert (entry.state, entry.result) == ("unreadable", None)
    assert entry.note.startswith("result.json: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b" " * (2 << 20)],
    ids=["empty", "truncated", "list", "null", "number", "not utf-8", "deep", "5000 digits", "2 MiB"],
)
def test_a_broken_file_never_counts(tmp_path, content):
    path = put(tmp_path, "imagenet", "linear", "10%", 0, 0.5)
    (path / "result.json").write_bytes(content)
    assert [e.state for e in scan(tmp_path)] == ["unreadable"]
    page = report.build(tmp_path).read_text()
    assert "imagenet/linear/10%/s0" in page and "<b>1</b> unreadable" in page


def test_a_digit_changed_anywhere_never_counts(tmp_path):
    path = put(tmp_path, "imagenet", "linear", "10%", 0, 0.5) / "result.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 11):
        if chr(whole[at]).isdigit():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert [e.state for e in scan(tmp_path)] == ["unreadable"]


def test_a_result_truncated_anywhere_never_counts(tmp_path):
    path = put(tmp_path, "imagenet", "linear", "10%", 0, 0.5) / "result.json"
    whole = path.read_bytes()
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        assert [e.state for e in scan(tmp_path)] == ["unreadable"]


def test_files_that_are_no_files(tmp_path):
    path = put(tmp_path, "imagenet", "linear", "10%", 0, 0.5)
    (path / "result.json").unlink()
    os.mkfifo(path / "result.json")
    (tmp_path / "imagenet" / "linear" / "10%" / "s1" / "result.json").mkdir(parents=True)
    assert [e.state for e in scan(tmp_path)] == ["unreadable", "unreadable"]


def test_a_copied_directory_counts_once(pair):
    shutil.copytree(pair / "imagenet" / "linear" / "5%" / "s0", pair / "imagenet" / "linear" / "5%" / "s9")
    shutil.copytree(pair / "imagenet" / "linear" / "5%" / "s0", pair / "imagenet" / "linear" / "5%" / "s0_backup")
    shutil.copytree(pair / "imagenet", pair / "old" / "imagenet")
    (pair / "again").symlink_to(pair)
    (pair / "also").symlink_to(pair / "imagenet")
    states = [e.state for e in scan(pair)]
    assert states.count("unreadable") == 2 + 2
    assert report.survey(pair).counts["done"] == 12


def test_the_live_cell_wins_and_no_copy_hides_a_missing_one(pair):
    """`backup` and `old` come before and after `imagenet` in the alphabet."""
    put(pair / "backup", "imagenet", "linear", "5%", 0, 0.10)
    shutil.copytree(pair / "imagenet/step/5%/s2", pair / "old/imagenet/step/5%/s2")
    shutil.rmtree(pair / "imagenet/step/5%/s2")
    state(pair, "old/imagenet/step/5%/s1", state="failed", error="boom")
    put(pair / "gpu", "coco", "linear", "5%", 0, 0.3)
    found = report.survey(pair)
    (grid,) = found.grids
    assert grid.squares["linear", "5%"].values[0] == pytest.approx(0.51)
    assert grid.squares["step", "5%"].values.keys() == {0, 1} and not grid.squares["step", "5%"].states
    assert (found.counts["done"], found.counts["unreadable"], found.counts["missing"]) == (11, 0, 1)
    notes = {str(e.path.relative_to(pair)): (e.state, e.note) for e in found.elsewhere}
    assert notes == {
        "backup/imagenet/linear/5%/s0": ("done", ""), "old/imagenet/step/5%/s1": ("failed", "boom"),
        "old/imagenet/step/5%/s2": ("done", ""), "gpu/coco/linear/5%/s0": ("done", ""),
    }  # fmt: skip
    assert "Elsewhere (4)" in report.build(pair).read_text()


def test_status_and_report_count_the_same_and_say_where_the_rest_is_reported(pair):
    put(pair / "own", "imagenet", "linear", "5%", 0, 0.10)
    shutil.copytree(pair / "imagenet/step/5%", pair / "old/imagenet/step/5%")
    notes = {str(e.path.relative_to(pair)): e.note for e in report.survey(pair).elsewhere}
    assert notes["old/imagenet/step/5%/s1"] == f"the same result as in {pair / 'imagenet/step/5%/s1'}"
    assert notes["own/imagenet/linear/5%/s0"] == ""
    said = (
        f"Not counted here: 4 runs of another out= deeper below, which have a report of their own: "
        f"mode=report out={pair / 'old'} (3); mode=report out={pair / 'own'} (1)."
    )
    shown = text(status.render(status.rows(pair)), 1000), text(report.render_terminal(pair), 1000)
    assert all(said in one and "12 done" in one and "unreadable" not in one for one in shown)
    assert said in report.markdown(report.survey(pair)).replace("\\", "")
    assert said in report.build(pair).read_text()
    assert report.survey(pair / "own").counts["done"] == 1


def test_a_copy_of_a_damaged_cell_does_not_stand_for_it(pair):
    shutil.copytree(pair / "imagenet", pair / "old" / "imagenet")
    (pair / "imagenet/linear/5%/s0/result.json").write_text("{")
    assert report.survey(pair).counts["unreadable"] == 1
    assert report.survey(pair).grids[0].squares["linear", "5%"].values.keys() == {1, 2}


def test_an_unreadable_seed_hides_no_missing_one(pair):
    shutil.copytree(pair / "imagenet/linear/5%/s0", pair / "imagenet/step/5%/s9")
    shutil.rmtree(pair / "imagenet/step/5%/s2")
    assert report.survey(pair).counts["missing"] == 1


def test_missing_and_unfinished_squares_are_counted(pair):
    shutil.rmtree(pair / "imagenet" / "step" / "5%" / "s2")
    state(pair, "imagenet/rex/5%/s0")
    state(pair, "imagenet/rex/5%/s1", state="failed", error="boom")
    (grid,), _ = tables.grids(scan(pair))
    assert grid.squares["rex", "5%"].states == {"running": 1, "failed": 1}
    assert report.survey(pair).counts == {
        "done": 11, "running": 1, "partial": 0, "died": 0, "failed": 1, "unreadable": 0, "missing": 1 + 1 + 3,
    }  # fmt: skip
    page = report.build(pair).read_text()
    assert "0/3, 1 failed, 1 running" in page and "2/3" in page


def asked(out, *cells, sweep="1", **more):
    """A cells.json that asked for these; more: fields of each of its records."""
    folder = out / ".sweep" / sweep
    folder.mkdir(parents=True)
    (folder / "cells.json").write_text(json.dumps({"cells": [{"cell": name, **more} for name in cells]}))


def test_what_a_sweep_asked_for_and_never_began_is_missing(pair):
    asked(pair, *(f"imagenet/{s}/1%/s{k}" for s in ("linear", "step") for k in range(4)), "imagenet/linear/5%/s0")
    asked(pair, "coco/rex/25%/s0", "coco/rex/25%/s1", sweep="2")
    put(pair, "imagenet", "step", "1%", 0, 0.2)
    found = report.survey(pair)
    imagenet, coco = found.grids
    assert (imagenet.budgets, imagenet.seeds) == (["1%", "5%", "100%"], [0, 1, 2, 3])
    assert {k: q.missing for k, q in imagenet.squares.items() if q.missing} == {("linear", "1%"): 4, ("step", "1%"): 3}
    assert (coco.task, coco.schedules, coco.squares["rex", "25%"].missing) == ("coco", ["rex"], 2)
    assert found.counts["missing"] == 4 + 3 + 2
    table = report.markdown(found)
    assert "— (0/4, 4 missing)" in table and "(1/4, 3 missing)" in table and "(n=3)" in table
    page = report.build(pair).read_text()
    assert "Missing (9)" in page and "0/2, 2 missing" in page and "coco/rex/25%/s1" in page
    rows = {(r["task"], r["schedule"], r["budget"]): r for r in csv.DictReader(io.StringIO(report.to_csv(found)))}
    assert (rows["coco", "rex", "25%"]["missing"], rows["coco", "rex", "25%"]["seeds_expected"]) == ("2", "2")
    assert "0/2, 2 missing" in text(report.render_terminal(pair))


def test_what_nobody_asked_for_is_not_missing(pair):
    put(pair, "imagenet", "rex", "5%", 0, 0.5)
    assert report.survey(pair).counts["missing"] == 2 + 3  # no sweep on record: every seed of the others
    asked(pair, "imagenet/rex/5%/s0")
    found = report.survey(pair)
    assert found.counts["missing"] == 0 and found.grids[0].squares["rex", "100%"].seeds == set()
    assert [line for line in report.markdown(found).splitlines() if line.startswith("| rex")] == [
        "| rex | 50.00 (n=1) | — |",
    ]  # fmt: skip


def test_a_cell_dropped_on_purpose_is_missing_until_the_named_file_is_gone(pair):
    asked(pair, "imagenet/linear/5%/s0", "imagenet/rex/1%/s0", sweep="20270101-a")
    asked(pair, "imagenet/rex/1%/s0", sweep="20270102-b")
    (missing,) = (e for e in report.survey(pair).entries if e.state == "missing")
    files = [".sweep/20270101-a/cells.json", ".sweep/20270102-b/cells.json"]
    assert missing.note == ", ".join(files)
    shown = (report.build(pair).read_text(), report.markdown(report.survey(pair)), text(report.render_terminal(pair)))
    assert all(file in said and "until the cells.json that asked for it is deleted" in said
               for said in (" ".join(one.split()) for one in shown) for file in files)  # fmt: skip
    for file in files:
        (pair / file).unlink()
    assert report.survey(pair).counts["missing"] == 0 and "cells.json" not in report.build(pair).read_text()


def test_a_failed_try_leaves_the_tables_as_they_were(pair):
    before = report.markdown(report.survey(pair)).splitlines()
    state(pair, "imagenet/exp/5%/s0", state="failed", error="boom")
    state(pair, "imagenet/step/5%/s7", state="failed", error="boom")
    found = report.survey(pair)
    after = report.markdown(found).splitlines()
    assert [a for a, b in zip(after, before, strict=True) if a != b] == [
        "12 done, 2 failed",
        "| step | 50.00 ± 1.00 (3/4, 1 failed)<br>paper 51.94 ± 0.48 | **70.00 ± 1.00**<br>paper 69.34 ± 0.18 |",
    ]
    page = report.build(pair).read_text()
    assert "Unfinished (2)" in page and "imagenet/exp/5%/s0" in page and found.counts["missing"] == 0


def test_a_failed_cell_that_a_sweep_asked_for_keeps_its_row(pair):
    asked(pair, "imagenet/exp/5%/s0")
    state(pair, "imagenet/exp/5%/s0", state="failed", error="boom")
    assert "| exp | — (0/1, 1 failed) | — |" in report.markdown(report.survey(pair))


def test_a_missing_cell_that_lies_elsewhere_or_is_unreadable(pair):
    asked(pair, "imagenet/linear/5%/s0", "imagenet/linear/5%/s1", "imagenet/step/5%/s0")
    shutil.copytree(pair / "imagenet/linear/5%/s0", pair / "backup/imagenet/linear/5%/s0")
    shutil.rmtree(pair / "imagenet/linear/5%/s0")
    (pair / "imagenet/linear/5%/s1/result.json").write_text("{")
    found = report.survey(pair)
    assert (found.counts["missing"], found.counts["unreadable"]) == (1, 1)
    square = found.grids[0].squares["linear", "5%"]
    assert (square.seeds, square.missing, square.states) == ({0, 1, 2}, 1, {"unreadable": 1})


def test_a_missing_altered_cell_stands_with_those_of_its_recipe(variant):
    recipe = {
        "task": {"name": "cifar10", "lr": 0.1, "model": "mine", "warmup": {"fraction": 0}},
        "optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.1}, "schedule": {"name": "exp", "gamma": 0.99},
        "precision": "fp32", "data": {"subset": 5000, "train": 5000, "val": 9}, "budget": "5%", "seed": 2, "T": 7,
    }  # fmt: skip
    asked(variant, "cifar10/exp/5%/s2-0a1b2c", recipe=recipe, words=["schedule=exp", "schedule.gamma=0.99"])
    found = report.survey(variant)
    (grid,) = found.grids
    assert grid.squares["exp gamma=0.99", "5%"].missing == found.counts["missing"] == 1
    assert grid.squares["linear", "5%"].missing == 0


def test_hostile_records_of_sweeps_ask_for_nothing(pair, caplog):
    names = ["../../../s0", "/a/b/5%/s0", "a/../5%/s0", "imagenet/linear/parsecs/s0", "x" * 5000, "", "s0", 3, None, True,
             ["imagenet/linear/1%/s0"], "a/b/5%/s" + "9" * 400, "\x1b[2J/b/5%/s0", "a\ud800/b/5%/s0", "a/b/c/5%/s0"]  # fmt: skip
    asked(pair, *names)
    for index, content in enumerate(
        ('{"cells": 3}', "[]", "{", '{"cells": [3, null, [], {"cell": {}}]}', "", "[" * 9999)
    ):
        (pair / ".sweep" / f"x{index}").mkdir()
        (pair / ".sweep" / f"x{index}" / "cells.json").write_text(content)
    (pair / ".sweep" / "file").write_text("")
    (pair / ".sweep" / "folder" / "cells.json").mkdir(parents=True)
    assert report.survey(pair).counts["missing"] == 0 and "is not JSON" in caplog.text
    for index, recipe in enumerate(
        (3, [], {"task": 3, "data": []}, {"data": {"train": True}}, {"schedule": {"run": {}}})
    ):
        asked(pair, f"imagenet/linear/5%/s7-00000{index}", sweep=f"y{index}", recipe=recipe, words={"a": 1})
    assert report.survey(pair).counts["missing"] == 5
    report.build(pair)


# ---- what is shown


class Parsed(HTMLParser):
    """Tags and links of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_is_self_contained(pair):
    write_run(pair, run("imagenet", "rex", "100%", 0, 0.6), curve=True)
    index = report.build(pair)
    page = index.read_text()
    parsed = Parsed(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    assert parsed.links and all(link.startswith(("data:image/png;base64,", "#t")) for link in parsed.links)
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert not [name for name in parsed.attributes if name.startswith("on") or name == "style"]
    kinds = {p.stem.split("-")[-1] for p in index.parent.glob("*.png")}
    assert kinds == {"budget", "gain", "heat", "lr", "loss"}
    assert (index.parent / "table.md").is_file() and (index.parent / "table.csv").is_file()


def test_names_and_messages_are_escaped(tmp_path):
    evil = '<script>alert("x")<|script>&$\\frac{}$'
    base = run("imagenet", "linear", "10%", 0, 0.5)
    for schedule in ("=cmd()|[red]", "<img src=x onerror=y>", "step"):
        for budget in ("10%", "100%"):
            data = json.loads(json.dumps(base)) | {"task": evil, "schedule": schedule, "device": "<b>cpu</b>"}
            data["budget"]["amount"] = budget
            write_run(tmp_path, data, curve=True)
    state(tmp_path, "x<i>y/linear/5%/s0", state="failed", error="<script>alert(1)</script>\x1b[31m\n[bold]|x")
    page = report.build(tmp_path).read_text()
    parsed = Parsed(page)
    assert not {"script", "img src=x", "i"} & set(parsed.tags) and "onerror" not in parsed.attributes
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "\x1b" not in page
    assert "<script" not in page and "<script" not in (tmp_path / "report" / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "report" / "table.csv").open()))
    assert {r["schedule"] for r in rows if r["task"] == evil} == {"'=cmd()|[red]", "<img src=x onerror=y>", "step"}
    shown = text(report.render_terminal(tmp_path)) + text(status.render(status.rows(tmp_path)))
    assert "\x1b" not in shown and "[red]" in shown and "[bold]" in shown


def test_clean_leaves_one_printable_line():
    assert clean("a\n b\x00\u202e\ud800c") == "a b\ufffd\ufffd\ufffdc"
    assert len(clean("x" * 10_000)) == 300


def test_csv_against_literals(pair):
    rows = {(r["schedule"], r["budget"]): r for r in csv.DictReader(io.StringIO(report.to_csv(report.survey(pair))))}
    row = rows["linear", "5%"]
    assert (row["n"], row["metric"], row["rule"], row["published_mean"]) == ("3", "top1", "best", "0.5726")
    assert float(row["mean"]) == pytest.approx(0.52) and float(row["std"]) == pytest.approx(0.01)
    assert float(row["final_mean"]) == pytest.approx(0.52) and row["device"] == "synthetic"
    assert list(rows) == [("linear", "5%"), ("linear", "100%"), ("step", "5%"), ("step", "100%")]


def test_csv_has_secondary_metrics(tmp_path):
    put(tmp_path, "coco", "linear", "10%", 0, 0.25)
    rows = list(csv.DictReader(io.StringIO(report.to_csv(report.survey(tmp_path)))))
    assert [(r["metric"], r["reported"]) for r in rows] == [("box_ap", "1"), ("mask_ap", "0")]
    assert rows[1]["published_mean"] == "0.2457"
    assert "Also measured: mask_ap" in report.build(tmp_path).read_text()


def test_markdown_against_literals(pair):
    lines = report.markdown(report.survey(pair)).splitlines()
    assert "| schedule | 5% | 100% |" in lines
    assert "| *linear − step* | +2.00<br>+2.00 to +2.00 | −1.00<br>−3.48 to +1.48 |" in lines
    start = "- 5%: linear 52.00 ± 1.00 (3 seeds), runner-up step 50.00 ± 1.00, difference +2.00 pp: "
    assert start + "95% interval +2.00 pp to +2.00 pp, told apart." in lines
    start = "- 100%: step 70.00 ± 1.00 (3 seeds), runner-up linear 69.00 ± 2.00, difference +1.00 pp: "
    assert start + "95% interval −1.48 pp to +3.48 pp, not told apart." in lines


def test_an_empty_directory_says_how_to_begin(tmp_path):
    page = report.build(tmp_path).read_text()
    assert "No runs under" in page and "python run.py -m sweep=smoke" in page
    assert "no runs yet" in text(status.render(status.rows(tmp_path)))


def test_nothing_finished_yet(tmp_path):
    state(tmp_path, "coco/linear/5%/s0")
    page = report.build(tmp_path).read_text()
    assert "0 finished runs" in page and "coco/linear/5%/s0" in page


def test_building_twice_gives_the_same_bytes(pair):
    folder = report.build(pair).parent
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {p.name: p.read_bytes() for p in report.build(pair).parent.iterdir()} == first


# ---- pictures


def test_a_schedule_looks_the_same_everywhere():
    assert plots.style("linear") == (plots.BLUE, "-", "o", False)
    assert plots.style("mine") == plots.style("mine")
    assert {plots.style(f"onecycle pct_start=0.{k}").colour for k in range(9)} == {plots.ORANGE}


def test_schedules_are_told_apart_without_colours():
    names = [*tables.ORDER, "onecycle pct_start=0.3", "onecycle pct_start=0.45", "wsd fraction=0.1", "wsd fraction=0.3"]
    assert set(tables.ORDER) <= set(plots.STYLE)
    assert len({plots.style(name)[1:] for name in names}) == len(names)


def boxes(monkeypatch, draws, data):
    """What a picture shows and where: (whole picture in inches, its texts, its bands), before it becomes a PNG."""
    from matplotlib.figure import Figure

    kept = {}
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.update(figure=self, **k), save(self, *a, **k)))
    draws(data)
    figure, axes = kept["figure"], kept["figure"].axes[0]
    inches = figure.dpi_scale_trans.inverted()
    texts = [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels()]
    return (
        kept["bbox_inches"],
        [(t.get_text(), t.get_window_extent().transformed(inches)) for t in texts],
        [(b.get_datalim(axes.transData), axes.viewLim) for b in axes.collections if b.get_alpha()],
    )


@pytest.mark.parametrize("draws", [plots.budget_curve, plots.gain_curve, plots.heat_map])
def test_a_name_with_constants_is_whole_and_inside_the_picture(pair, monkeypatch, draws):
    name = "onecycle pct_start=0.45,low=0.05"
    for seed in range(3):
        for budget in ("5%", "100%"):
            write_run(pair, run("imagenet", "onecycle", budget, seed, 0.5) | {"schedule": name})
    (grid,), _ = tables.grids(scan(pair))
    whole, texts, _ = boxes(monkeypatch, draws, grid)
    (box,) = (box for said, box in texts if said == name)
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


@pytest.mark.parametrize("draws", [plots.budget_curve, plots.gain_curve])
def test_bands_stay_inside_the_axes(tmp_path, monkeypatch, draws):
    for seed, shift in enumerate((-0.1, 0.0, 0.1)):  # an interval far wider than the difference
        for budget in ("5%", "100%"):
            put(tmp_path, "imagenet", "linear", budget, seed, 0.51 + shift)
            put(tmp_path, "imagenet", "step", budget, seed, 0.5)
    (grid,), _ = tables.grids(scan(tmp_path))
    _, _, bands = boxes(monkeypatch, draws, grid)
    assert bands and all(view.y0 <= band.y0 and band.y1 <= view.y1 for band, view in bands)


@pytest.mark.parametrize("amounts", [[f"{k}00it" for k in range(1, 40)], [f"{k}%" for k in (1, 5, 10, 25, 50, 100)]])
def test_budgets_on_the_axis_do_not_touch(tmp_path, monkeypatch, amounts):
    for written in amounts:
        data = run("imagenet", "linear", "10%", 0, 0.5)
        iterations = int(amount(written)[1] * 500_400) if "%" in written else int(written[:-2])
        data["budget"] |= {"amount": written, "fraction": iterations / 500_400, "iterations": iterations}
        write_run(tmp_path, data | {"iterations_done": iterations, "samples_seen": 256 * iterations})
    (grid,), _ = tables.grids(scan(tmp_path))
    _, texts, _ = boxes(monkeypatch, plots.budget_curve, grid)
    ticks = sorted(((box.x0, box.x1) for said, box in texts if said in amounts), key=lambda ends: ends[0])
    assert len(ticks) > 3 and all(a[1] < b[0] for a, b in zip(ticks, ticks[1:], strict=False))
    assert "%" not in amounts[0] or len(ticks) == len(amounts)


def test_the_heat_map_has_no_row_of_failed_tries(pair, monkeypatch):
    put(pair, "imagenet", "cosine", "5%", 0, 0.5)
    state(pair, "imagenet/rex/5%/s0", state="failed", error="boom")
    _, texts, _ = boxes(monkeypatch, plots.heat_map, tables.grids(scan(pair))[0][0])
    assert {"linear", "cosine"} <= {said for said, _ in texts} and "rex" not in {said for said, _ in texts}


def test_labels_move_apart_in_order():
    assert plots.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert plots.spread([0.9, 0.1], 0.1) == pytest.approx([0.9, 0.1])
    assert plots.spread([1.0, 1.0], 0.2) == pytest.approx([0.8, 1.0])
    crowded = plots.spread([0.5] * 30, 0.1)
    assert min(crowded) == pytest.approx(0.0) and max(crowded) == pytest.approx(1.0)


def test_curves_skip_and_count_malformed_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "progress": 0.0, "lr": 0.1, "loss": 2.5}', '{"step": 0, "eval": {"top1": 0.1}}', "{", "[1]",
             '{"progress": 2, "lr": 1}', '{"progress": 0.5, "lr": true}', '{"progress": 0.5, "lr": 0.05, "loss": NaN}',
             '{"step": 9, "progress": 0.9, "lr": 0.01, "loss": null}', '{"step": 10, "prog']  # fmt: skip
    path.write_text("\n".join(lines))
    curve = read_curve(path)
    assert (curve.progress, curve.lr, curve.loss[0], curve.bad) == ([0.0, 0.9], [0.1, 0.01], 2.5, 6)
    assert last_step(path) == 9


def test_a_long_log_is_read_in_part(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(200_000):
            file.write(json.dumps({"step": step, "progress": step / 200_000, "lr": 0.1, "loss": 1.0}) + "\n")
    start = time.process_time()
    curve = read_curve(path)
    assert time.process_time() - start < 1
    assert curve.bad == 0 and 1000 < len(curve.lr) < 4000
    assert curve.progress[0] == 0 and curve.progress[-1] > 0.999


# ---- status


def test_states(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    put(tmp_path, "imagenet", "linear", "10%", 0, 0.5)
    running = state(tmp_path, "imagenet/linear/10%/s1", samples_per_second=12.5, eta_seconds=300)
    (running / "metrics.jsonl").write_text('{"step": 6, "progress": 0.6, "lr": 0.1, "loss": 1}\n{"ste')
    state(tmp_path, "imagenet/linear/10%/s2", pid=gone.pid)
    state(tmp_path, "imagenet/linear/10%/s3", pid=gone.pid, host="elsewhere", job="77")
    state(tmp_path, "imagenet/linear/10%/s4", state="partial")
    state(tmp_path, "imagenet/linear/10%/s5-0a1b2c", state="failed", error="ValueError: no\nmore")
    state(tmp_path, "imagenet/linear/10%/s6", state="done")
    (state(tmp_path, "imagenet/linear/10%/s7") / "lock").write_text("")  # nobody holds it: the pid is another's
    rows = {r["seed"]: r for r in status.rows(tmp_path)}
    assert {seed: r["state"] for seed, r in rows.items()} == {
        0: "done", 1: "running", 2: "died", 3: "running", 4: "partial", 5: "failed", 6: "unreadable", 7: "died",
    }  # fmt: skip
    assert (rows[1]["step"], rows[1]["total"], rows[1]["rate"], rows[1]["eta"]) == (7, 10, 12.5, 180)
    assert (rows[5]["note"], rows[5]["suffix"]) == ("ValueError: no more", "0a1b2c")
    shown = text(status.render(list(rows.values())))
    assert "7 of 10" in shown and "ValueError: no more" in shown and "job 77" in shown and "top1 50.00%" in shown


def test_a_hostile_state_is_unreadable(tmp_path):
    for seed, fields in enumerate(({"state": 3}, {"step": True}, {"pid": 10**400}, {"eta_seconds": "soon"})):
        state(tmp_path, f"imagenet/linear/10%/s{seed}", **fields)
    assert {r["state"] for r in status.rows(tmp_path)} == {"unreadable"}


@pytest.mark.parametrize(
    "seconds, shown",
    [(None, "—"), (4.04, "4.0 s"), (40, "40 s"), (720, "12 min 00 s"), (18_420, "5 h 07 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds, shown):
    assert seconds_text(seconds) == shown


def test_many_finished_runs_are_folded_with_their_budgets_in_order(tmp_path):
    for seed in range(15):
        for budget in ("100%", "5%", "10%"):
            put(tmp_path, "imagenet", "linear", budget, seed, 0.5)
    assert "5% ×15  10% ×15  100% ×15" in text(status.render(status.rows(tmp_path)))


def test_status_of_a_thousand_cells_is_quick(tmp_path):
    make(tmp_path, 1000)
    start = time.process_time()
    assert "1,000 done" in text(status.render(status.rows(tmp_path)))
    assert time.process_time() - start < 3


BUILD = """
import re, sys, time
from pathlib import Path
from benchmarks import report
start = time.process_time()
report.build(Path(sys.argv[1]))
print(time.process_time() - start, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_ten_thousand_results(tmp_path):
    """In a process of its own: what tests before it in this one had resident is not the report's."""
    make(tmp_path, 10_000)
    done = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 20 and kilobytes < 1024 * 1024
    assert "<b>10,000</b> done" in (tmp_path / "report/index.html").read_text()


def test_cut_labels_can_be_told_apart():
    assert plots.plain("linear", 14) == "linear" and plots.plain("a$", 14) == r"a\$"
    cut = {plots.plain(f"onecycle pct_start=0.{k}", 14) for k in range(1, 5)}
    assert len(cut) == 4 and {len(label) for label in cut} == {14}


RATES = """
task: {lr: 0.1, batch_size: 4, last_batch: drop, milestones: [0.5, 0.75], warmup: {fraction: 0.0, factor: 1.0}}
optimizer: {name: sgd, lr: null}
schedule: {name: step, gamma: 0.1, milestones: null}
hold: null
"""


def test_rates_are_drawn_by_their_formula_however_few_were_logged(tmp_path):
    (tmp_path / "config.yaml").write_text(RATES)
    made = {"data": {"n_train": 40}, "budget": {"full_iterations": 100, "iterations": 8}}
    (tmp_path / "result.json").write_text(json.dumps(made))
    progress, rates = results.exact_rates(tmp_path)
    assert progress == [k / 8 for k in range(8)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


@pytest.mark.parametrize("text", ["", "a: [", "task: 3", RATES.replace("step", "nope"), RATES.replace("0.1,", "x,")])
def test_rates_that_a_configuration_does_not_say_are_not_drawn(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "result.json").write_text(
        '{"data": {"n_train": 40}, "budget": {"full_iterations": 9, "iterations": 8}}'
    )
    assert results.exact_rates(tmp_path) is None


def test_pictures_of_an_earlier_report_are_gone(pair):
    report.build(pair)
    folder = pair / "report"
    names = {path.name for path in folder.glob("*.png")}
    (folder / "07-gone-lr.png").write_bytes(b"old")
    (folder / "mine.png").write_bytes(b"a user's")
    report.build(pair)
    assert {path.name for path in folder.glob("*.png")} == names | {"mine.png"}
