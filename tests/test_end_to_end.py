"""The suite as a user runs it: commands, exit codes, files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(ROOT / "run.py"), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "BUDGETED_BAR": "0", "OMP_NUM_THREADS": "1"}


def run(*words: str, expect: int = 0, cwd: Path = ROOT) -> str:
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), cwd=cwd, timeout=300)
    assert done.returncode == expect, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def lines(path: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in path.read_text().splitlines()]


def results(out: Path) -> dict[str, dict]:
    return {str(p.parent.relative_to(out)): json.loads(p.read_text()) for p in out.glob("*/*/*/*/result.json")}


@pytest.mark.slow
def test_a_sweep_runs_once_and_its_report_shows_it(tmp_path):
    words = ("-m", "task=imagenet_tiny", "schedule=step,linear", "budget.amount=2it,5it", "seed=0,1", f"out={tmp_path}")
    assert "8 of 8 cells done" in run(*words)
    found = results(tmp_path)
    assert len(found) == 8
    assert {r["iterations_done"] for r in found.values()} == {2, 5}
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*/*/*")}
    again = run(*words)
    assert "8 done" in again and "nothing to launch" in again
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*/*/*")}
    page = run("mode=report", f"out={tmp_path}")
    assert "imagenet_tiny" in page
    report = tmp_path / "report"
    assert {"index.html", "table.md", "table.csv"} <= {p.name for p in report.iterdir()}
    assert list(report.glob("*.png"))
    assert "8 done" in run("mode=status", f"out={tmp_path}")


@pytest.mark.slow
def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    words = ("-m", "task=imagenet_tiny", "task.lr=1e20,0.05", "budget.amount=3it", f"out={tmp_path}")
    said = run(*words, expect=1)
    assert "1 of 2 cells done" in said
    assert "failed: NonFinite: the loss of step" in said
    assert [r["status"] for r in results(tmp_path).values()] == ["done"]
    states = [json.loads(p.read_text())["state"] for p in tmp_path.glob("*/*/*/*/state.json")]
    assert sorted(states) == ["done", "failed"]


RANK = """
import sys, torch
from budgeted.errors import UserError
from budgeted.session import Session
from tasks import base, cli
kind, words = sys.argv[1], tuple(sys.argv[2:])
after_step = Session.after_step
def after(self, loss):
    if self.rank == 1 and self.step == 2 and kind == "error":
        raise UserError("0001.png: cannot be decoded")
    after_step(self, loss * float("nan") if self.rank == 1 and self.step == 2 else loss)
Session.after_step = after
base.train(cli.recipe(words))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "rank 1: 0001.png: cannot be decoded"),
        ("nan", "NonFinite: the loss of step 2 is nan at learning rate"),
    ],
)
def test_what_fails_one_rank_is_the_cells_failure(tmp_path, kind, reason):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    words = ("task=imagenet_tiny", "budget.amount=9it", f"out={tmp_path / 'runs'}", "device=cpu")
    done = subprocess.run(
        [*torchrun, kind, *words],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode != 0
    (path,) = (tmp_path / "runs").glob("*/*/*/*/state.json")
    state = json.loads(path.read_text())
    assert state["state"] == "failed" and state["error"].startswith(reason), state


def test_a_cell_that_another_process_finished_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Between the look at its result and the lock."""
    from tasks import base, cli

    recipe = cli.recipe(("task=imagenet_tiny", "budget.amount=2it", f"out={tmp_path}", "device=cpu"))
    cli.embedded_data(recipe.cfg)
    held, first = base._held, []

    def late(*words):
        if not first:
            first.append(None)
            first.append(base.train(recipe))
        return held(*words)

    monkeypatch.setattr(base, "_held", late)
    result = base.train(recipe)
    assert result["resumed"] == 0 and result["finished"] == first[1]["finished"]
    assert result == recipe.cell.result() and recipe.cell.state == "done"


def test_a_check_says_where_the_data_are_not_the_recipes():
    assert "not the recipe's own data" not in run("mode=check")  # writes the embedded data
    said = run("mode=check", "task=imagenet", f"data.root={ROOT / 'data' / 'imagenet_tiny'}")
    assert "2,000 training samples (1,281,167), 500 validation samples (50,000), 10 classes (1,000)" in said


def test_a_named_sweep_takes_another_budget_in_any_unit(tmp_path):
    said = run("-m", "sweep=smoke", "budget.amount=5it", "mode=plan", f"out={tmp_path}")
    assert said.count("/5it/") == 8
    assert "one sweep at a time" in run("-m", "sweep=smoke,table3", f"out={tmp_path}", expect=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_paths_are_those_of_the_command_where_hydra_changes_folders(tmp_path):
    words = ("budget.amount=1it", "out=runs", "hydra.job.chdir=true", f"data.root={ROOT / 'data' / 'imagenet_tiny'}")
    run("mode=check")  # writes the embedded data
    assert "2 of 2 cells done" in run("-m", "seed=0,1", *words, cwd=tmp_path)
    assert sorted(p.parent.name for p in tmp_path.glob("**/result.json")) == ["s0", "s1"]
    assert (tmp_path / "runs" / "imagenet_tiny" / "linear" / "1it" / "s0" / "result.json").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path, workers):
    run("mode=check")  # writes the embedded data
    data = tmp_path / "photos"
    shutil.copytree(ROOT / "data" / "imagenet_tiny", data)
    for image in data.glob("train/*/*"):
        image.write_bytes(image.read_bytes()[:100])
    said = run(
        "budget.amount=1it", f"data.root={data}", f"data.workers={workers}", f"out={tmp_path / 'runs'}", expect=1
    )
    assert f"failed: {data}/train/" in said and "cannot be decoded" in said
    assert "Traceback" not in said
    assert "Traceback" in next((tmp_path / "runs").glob("*/*/*/*/run.log")).read_text()


def test_cells_that_would_share_a_directory_are_refused(tmp_path):
    """Paths are no part of a cell: two data roots with the same counts would be one run."""
    said = run("-m", "data.workers=0,1", f"out={tmp_path}/runs", expect=2)
    assert "imagenet_tiny/linear/10%/s0" in said and "data.workers" in said
    assert not (tmp_path / "runs").exists()


def test_one_cell_leaves_the_files_of_the_contract(tmp_path):
    run("budget.amount=3it", f"out={tmp_path}")
    cell = tmp_path / "imagenet_tiny" / "linear" / "3it" / "s0"
    names = {"config.yaml", "metrics.jsonl", "result.json", "state.json", "checkpoint.pt", "run.log", "lock"}
    assert {p.name for p in cell.iterdir()} == names
    trace = [x for x in lines(cell / "metrics.jsonl") if "lr" in x]
    assert [x["step"] for x in trace] == [0, 1, 2]
    assert [x["lr"] for x in trace] == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3], rel=1e-9)
    result = json.loads((cell / "result.json").read_text())
    wanted = """schema task schedule optimizer budget seed signature status reported metrics iterations_done samples_seen
        train_seconds eval_seconds data_wait_seconds compile_seconds samples_per_second peak_memory_bytes device precision
        world_size resumed data weights_sha256 versions git started finished"""
    assert set(wanted.split()) <= set(result)
    assert result["samples_seen"] == 3 * 32
    assert result["budget"] == {"amount": "3it", "fraction": 3 / 620, "iterations": 3, "full_iterations": 620}
    assert result["reported"]["value"] == result["metrics"]["top1"]["best"]
    from budgeted import checkpoint

    saved = checkpoint.load(cell / "checkpoint.pt")
    assert (saved["total"], saved["step"]) == (3, 3)


def _started(words: tuple[str, ...], metrics: Path, after: int) -> subprocess.Popen:
    """The process of `words`, once it has logged `after` lines."""
    process = subprocess.Popen(
        command(*words), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= after:
            return process
        time.sleep(0.02)
    out = process.communicate(timeout=5)[0] if process.poll() is not None else ""
    raise AssertionError(f"{words}: never logged {after} lines\n{out}")


@pytest.mark.slow
def test_two_processes_on_one_cell(tmp_path):
    words = ("budget.amount=60it", f"out={tmp_path}")
    metrics = tmp_path / "imagenet_tiny" / "linear" / "60it" / "s0" / "metrics.jsonl"
    first = _started(words, metrics, 1)
    first.send_signal(signal.SIGSTOP)  # or it might be done before the second is there
    said = run(*words)
    first.send_signal(signal.SIGCONT)
    assert f"process {first.pid}" in said
    assert first.wait(timeout=120) == 0
    assert [x["step"] for x in lines(metrics) if "lr" in x] == list(range(60))


@pytest.mark.slow
def test_a_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    words = ("budget.amount=40it", f"out={tmp_path}", "data.workers=2", "checkpoint.every=5it")
    metrics = tmp_path / "imagenet_tiny" / "linear" / "40it" / "s0" / "metrics.jsonl"
    first = _started(words, metrics, 6)
    first.kill()
    first.wait(timeout=10)
    run(*words)
    assert [x["step"] for x in lines(metrics) if "lr" in x] == list(range(40))


@pytest.mark.slow
def test_a_clock_budget_killed_twice_ends_on_time(tmp_path):
    """6 seconds of training, whatever happens in between, with the rate at the schedule's end."""
    words = ("budget.amount=0.1min", f"out={tmp_path}", "checkpoint.minutes=0.01")
    metrics = tmp_path / "imagenet_tiny" / "linear" / "0.1min" / "s0" / "metrics.jsonl"
    for after in (10, 30):
        process = _started(words, metrics, after)
        process.terminate()
        process.communicate(timeout=60)
    run(*words)
    result = json.loads((metrics.parent / "result.json").read_text())
    trace = [x for x in lines(metrics) if "lr" in x]
    assert 6.0 <= result["train_seconds"] < 7.5  # it ends with the step in which the time is up
    assert result["resumed"] == 2
    assert trace[-1]["lr"] < 0.01 < trace[0]["lr"]
    assert [x["step"] for x in trace] == list(range(len(trace)))
    assert all(x["lr"] == pytest.approx(0.05 * (1 - x["progress"]), rel=1e-9) for x in trace)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["imagenet_tiny", "kinetics_tiny"])
def test_two_ranks_train_what_one_process_trains(task, tmp_path):
    words = (f"task={task}", "budget.amount=4it")
    run(*words, f"out={tmp_path / 'one'}")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "run.py"), *words, f"out={tmp_path / 'two'}"],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cell = Path(task, "linear", "4it", "s0")
    one, two = (lines(tmp_path / d / cell / "metrics.jsonl") for d in ("one", "two"))
    assert [x["lr"] for x in one if "lr" in x] == [x["lr"] for x in two if "lr" in x]
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
    assert one[-1]["eval"]["top1"] == pytest.approx(two[-1]["eval"]["top1"], abs=1e-4)


def test_the_same_data_elsewhere_are_the_same_cell_and_others_are_refused(tmp_path):
    """Other classes, as many samples: nothing in the recipe tells them apart, but the data set's digest does."""
    run("mode=check")
    other = tmp_path / "photos"
    shutil.copytree(ROOT / "data" / "imagenet_tiny", other)
    words = ("budget.amount=1it", f"out={tmp_path / 'runs'}")
    run(*words)
    said = run(*words, f"data.root={other}")
    assert "is done already" in said and "its data were" not in said
    assert "1 done" in run("-m", *words, f"data.root={other}")
    for split in ("train", "val"):
        folder = next(p for p in sorted((other / split).iterdir()) if p.is_dir())
        folder.rename(folder.with_name("zebra"))
    for more in ((), ("-m",)):
        said = run(*more, *words, f"data.root={other}", expect=2)
        assert f"holds a result on other data, of {ROOT / 'data' / 'imagenet_tiny'}" in said and "another out=" in said
