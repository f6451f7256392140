"""Sweeps on one machine: what each launcher preset does with cells, workers that are killed, GPUs, and code that changed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import queue, status, sweep
from budgeted import code
from budgeted.cells import RESULT_SCHEMA, Cell
from budgeted.errors import UserError
from budgeted.files import read_json, write_json
from tasks import cli, devices, submission

ROOT = Path(__file__).resolve().parent.parent
CELL = ("budget.amount=40it", "checkpoint.every=5it", "device=cpu")


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "run.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "BUDGETED_BAR": "0", **environment},
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def said(process: subprocess.Popen, expect: int = 0, timeout: float = 240) -> str:
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    assert process.returncode == expect, output
    return output


def cell(out: Path, seed: int = 0) -> Path:
    return out / "imagenet_tiny" / "linear" / "40it" / f"s{seed}"


def worker(directory: Path, step: int, other_than: int = 0) -> int:
    """The process of a cell, once it has logged that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = read_json(directory / "state.json") or {}
        metrics = directory / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b"\n") > step and state["pid"] != other_than:
            return state["pid"]
        time.sleep(0.02)
    raise AssertionError(f"{directory} never came to step {step}")


def weights(out: Path) -> dict[str, str]:
    found = (json.loads(p.read_text()) for p in out.glob("*/*/*/*/result.json"))
    return {f"{r['task']} {r['seed']}": r["weights_sha256"] for r in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of three cells run one after the other."""
    out = tmp_path_factory.mktemp("alone")
    said(start("-m", *CELL, "seed=range(3)", f"out={out}"))
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_killed_worker_costs_a_sweep_nothing(launcher, alone, tmp_path):
    """joblib's fellows die with it and are launched again; Ray tries it again; the other's cell is the command's."""
    words = ["-m", *CELL, "seed=range(3)", f"out={tmp_path}", f"hydra/launcher={launcher}"]
    if launcher == "ray":
        if not importlib.util.find_spec("ray"):
            pytest.skip("ray is an extra: make ray")
        words += ["hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"]
    sweep = start(*words, RAY_AUTH_MODE="disabled")
    os.kill(worker(cell(tmp_path), 8), signal.SIGKILL)
    if launcher == "submitit_local":
        assert "s0: partial" in said(sweep, expect=1)
        sweep = start(*words)
    assert "3 of 3 cells done" in said(sweep) or launcher == "submitit_local"
    assert weights(tmp_path) == alone
    assert read_json(cell(tmp_path) / "result.json")["resumed"] == 1


@pytest.mark.slow
def test_a_local_job_is_requeued_by_its_signal(alone, tmp_path):
    sweep = start("-m", *CELL, "seed=0", f"out={tmp_path}", "hydra/launcher=submitit_local")
    os.kill(worker(cell(tmp_path), 8), signal.SIGUSR2)
    said(sweep)
    assert weights(tmp_path) == {k: v for k, v in alone.items() if k.endswith(" 0")}
    assert read_json(cell(tmp_path) / "result.json")["resumed"] == 1


@pytest.mark.parametrize(("launcher", "why"), [("slurm", "no srun here"), ("ray", "requirements-ray.txt")])
def test_a_launcher_that_cannot_be_is_refused_in_one_line(launcher, why, tmp_path):
    if launcher == "ray" and importlib.util.find_spec("ray"):
        pytest.skip("ray is installed")
    output = said(start("-m", f"out={tmp_path}/runs", f"hydra/launcher={launcher}", PATH=str(tmp_path)), expect=2)
    assert output.startswith(f"error: hydra/launcher={launcher}: ") and why in output and output.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# -- devices ------------------------------------------------------------------------------------------------

CLAIM = """
import sys
from pathlib import Path
from tasks import devices
print(devices.claim_gpu(Path(sys.argv[1])), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def begin() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)], cwd=ROOT, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "3,5"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_every_process_takes_a_gpu_of_its_own(claim):
    first, second = claim(), claim()
    assert {first.stdout.readline(), second.stdout.readline()} == {"3\n", "5\n"}
    third = claim()
    time.sleep(1)
    first.kill()  # however a process ends, its GPU is free
    assert third.stdout.readline() in ("3\n", "5\n")


def test_without_a_gpu_the_cores_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(12)))
    assert devices.claim_gpu() is None and devices.cells_at_once("auto") == 12
    for jobs, asked, threads in ((4, "", "3"), (12, "12", "1"), (5, "1", "1"), (40, "", "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        devices.share_threads(jobs)
        assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert devices.cells_at_once("auto") == 3 and devices.cells_at_once("cpu") == 12


def test_jobs_from_which_gpus_are_hidden_find_those_of_the_driver(monkeypatch, tmp_path):
    monkeypatch.setenv(devices.SHARED, "")
    monkeypatch.delenv(devices.SHARED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(devices, "_held", None)
    devices.share_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what submitit's local jobs start with
    assert devices.claim_gpu(tmp_path) == "4" == os.environ["CUDA_VISIBLE_DEVICES"]


# -- what was submitted -------------------------------------------------------------------------------------


class SlurmLauncher:
    """Stands for submitit's, whose name a submission keeps."""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep of three cells under tmp_path."""
    for name in (submission.SWEEP, submission.HOME, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    submission.begin()
    jobs = [(f"seed={k}", f"out={tmp_path}") for k in range(3)]
    return submission.record(jobs, [cli.recipe(job) for job in jobs], SlurmLauncher())


def test_a_sweep_records_code_and_recipes(submitted, tmp_path):
    found = json.loads((submitted / "code.json").read_text())
    assert found["commit"] == code.git_state()["commit"]
    assert {"run.py", "budgeted/session.py", "tasks/base.py", "conf/task/coco.yaml"} <= set(found["files"])
    assert (submitted / "code.diff").read_text() == (code.diff() or "")
    cells = json.loads((submitted / "cells.json").read_text())["cells"]
    assert [c["cell"] for c in cells] == [f"imagenet_tiny/linear/10%/s{k}" for k in range(3)]
    assert cells[1]["recipe"]["seed"] == 1 and cells[1]["recipe"]["T"] == 62
    assert cells[0]["recipe"]["task"]["model"] == "resnet_narrow"


def test_a_new_file_is_a_change_of_the_code(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(code, "HOME", tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "old.py").write_text("old = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert code.git_state()["dirty"] is False and code.diff() == ""
    (tmp_path / "notes.txt").write_text("no code\n")
    assert code.git_state()["dirty"] is False
    (tmp_path / "tasks" / "new.py").write_text("new = 2\n")
    assert code.git_state()["dirty"] is True
    assert "+++ b/tasks/new.py" in code.diff() and "+new = 2" in code.diff() and "notes" not in code.diff()


def test_every_out_of_a_sweep_has_the_code_on_record(tmp_path, monkeypatch):
    for name in (submission.SWEEP, submission.HOME, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    submission.begin()
    jobs = [(f"out={tmp_path}/{name}",) for name in "ab"]
    submission.record(jobs, [cli.recipe(job) for job in jobs], SlurmLauncher())
    assert submission.check("stop", tmp_path / "a") is None is submission.check("stop", tmp_path / "b")
    with pytest.raises(UserError, match="which code was submitted is not on record: .*code=warn runs it"):
        submission.check("stop", tmp_path / "c")


@pytest.mark.parametrize("word", ["mode=plan", "++mode=plan", "mode='plan'"])
def test_a_sweep_that_is_asked_for_its_plan_launches_nothing(tmp_path, capsys, word):
    assert sweep.run((word, "seed=0,1", f"out={tmp_path}"), None, None) == 0
    assert "0 done, 2 to run" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_cells_that_other_code_made_are_counted(tmp_path, said):
    cells = [cli.recipe((f"out={tmp_path}", f"seed={k}")) for k in range(3)]
    for recipe, made in zip(cells, (code.digest(code.files()), "0" * 12, None), strict=True):
        recipe.cell.directory.mkdir(parents=True)
        parts = {"parts": [{"step": 0, "code": made}]} if made else {}
        recipe.cell.write_result(
            {
                "schema": RESULT_SCHEMA,
                "status": "done",
                "signature": recipe.cell.signature,
                "reported": {"value": 0.5},
                **parts,
            }
        )
    assert sweep.run(("seed=0,1,2", f"out={tmp_path}"), None, None) == 0
    # One says so; one is of before results said it.
    assert "2 of the done cells were made by other code than this; another out= makes them anew" in said


def test_a_job_from_other_code_says_so_or_stops(submitted, tmp_path):
    assert submission.check("stop", tmp_path) is None
    found = json.loads((submitted / "code.json").read_text())
    found["files"]["tasks/base.py"] = "0" * 16
    found["files"]["tasks/gone.py"] = "1" * 16
    write_json(submitted / "code.json", {**found, "commit": "c0ffee" * 6})
    assert submission.check("ignore", tmp_path) is None
    warned = submission.check("warn", tmp_path)
    assert warned and "tasks/base.py, tasks/gone.py differ" in warned and "c0ffeec0ff" in warned
    with pytest.raises(UserError, match="not the code that was submitted.*code=warn runs it all the same"):
        submission.check("stop", tmp_path)
    submission.leave()
    assert submission.check("stop", tmp_path) is None  # a run that no sweep launched


# -- the queue ----------------------------------------------------------------------------------------------


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, fails: str = "") -> None:
    """A squeue that says this."""
    place = tmp_path / "bin"
    place.mkdir(exist_ok=True)
    end = f"echo '{fails}' >&2; exit 1" if fails else ""
    (place / "squeue").write_text(f"#!/bin/sh\ncat <<X\n{output}\nX\n{end}\n")
    (place / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")


def test_cells_in_the_queue_are_shown_with_their_job(submitted, tmp_path, monkeypatch):
    for k in range(3):
        (submitted / f"12_{k}_submitted.pkl").touch()
    pretend(tmp_path, monkeypatch, "12_0|PENDING|Priority\n12_1|RUNNING|None")
    partial = Cell("imagenet_tiny", "linear", "10%", 1, "x", False, tmp_path)
    partial.directory.mkdir(parents=True)
    partial.write_state("partial", 10, 62)
    found = {row["seed"]: row for row in status.rows(tmp_path)}
    assert (found[0]["state"], found[0]["job"], found[0]["note"]) == ("queued", "12_0", "job 12_0 Priority")
    assert (found[1]["state"], found[1]["step"], found[1]["note"]) == ("queued", 10, "job 12_1 begins")
    assert set(found) == {0, 1}
    every = status.rows_of([tmp_path / f"imagenet_tiny/linear/10%/s{k}" for k in range(3)], tmp_path)
    assert [row["state"] for row in every] == ["queued", "queued", "missing"]


def test_a_job_that_slurm_forgot_has_died(submitted, tmp_path, monkeypatch):
    (submitted / "12_0_submitted.pkl").touch()
    lost = Cell("imagenet_tiny", "linear", "10%", 0, "x", False, tmp_path)
    lost.directory.mkdir(parents=True)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    lost.write_state("running", 10, 62)
    state = read_json(lost.directory / "state.json")
    write_json(lost.directory / "state.json", {**state, "host": "elsewhere"})  # its process cannot be looked up here
    pretend(tmp_path, monkeypatch, "", fails="slurm_load_jobs error: Invalid job id specified")
    (row,) = status.rows(tmp_path)
    assert (row["state"], row["note"]) == ("died", "job 12_0 is gone")
    pretend(tmp_path, monkeypatch, "", fails="slurm_load_jobs error: Unable to contact slurm controller")
    assert [r["state"] for r in status.rows(tmp_path)] == ["running"]


def test_jobs_belong_to_cells_by_their_order_over_several_arrays(submitted, tmp_path, monkeypatch):
    for name in ("9_0", "9_1", "10"):  # two batches, the second of a single job
        (submitted / f"{name}_submitted.pkl").touch()
    pretend(tmp_path, monkeypatch, "9_1|PENDING|Resources\n10|PENDING|Priority\n77_3|RUNNING|None")
    jobs = queue.read(tmp_path).jobs
    assert queue.read(tmp_path).submitted == {"9_0", "9_1", "10"}
    assert {name[-2:]: job.id for name, job in jobs.items()} == {"s1": "9_1", "s2": "10"}


def test_who_goes_on_with_a_cell(submitted, tmp_path, monkeypatch):
    """A job that is ending after its cell failed does not; the next attempt's job, which has only begun, does."""
    for k in range(3):
        (submitted / f"12_{k}_submitted.pkl").touch()
    pretend(tmp_path, monkeypatch, "12_0|RUNNING|None\n12_1|PENDING|Priority\n12_2|COMPLETING|None")
    known = queue.read(tmp_path)
    first, second, third = (f"imagenet_tiny/linear/10%/s{k}" for k in range(3))
    asked = {
        (first, "failed", "12_0"): None,
        (first, "failed", "7_3"): "12_0",
        (first, "missing", None): "12_0",
        (first, "partial", "12_0"): "12_0",  # requeued
        (first, "running", "12_0"): None,
        (first, "done", "12_0"): None,
        (second, "failed", "12_1"): "12_1",
        (second, "done", "12_1"): None,
        (third, "failed", "12_2"): None,
    }
    found = {words: known.job_of(*words) for words in asked}
    assert {words: job and job.id for words, job in found.items()} == asked


def test_a_queue_that_does_not_answer_is_not_an_empty_one(submitted, tmp_path, monkeypatch, capsys):
    (submitted / "12_0_submitted.pkl").touch()
    pretend(tmp_path, monkeypatch, "", fails="slurm_load_jobs error: Socket timed out on send/recv operation")
    assert queue.read(tmp_path) is None

    class Slurm:
        _EXECUTOR = "slurm"

        def launch(self, *words: object, **more: object) -> None:
            raise AssertionError("a cell that may be queued already was submitted")

    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    assert sweep.run(["seed=0", f"out={tmp_path}"], Slurm(), None) == 2
    assert "error: squeue does not answer" in capsys.readouterr().err


def test_an_array_is_no_larger_than_the_cluster_takes(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 40'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    queue.largest_array.cache_clear()
    assert queue.largest_array() == 40
    queue.largest_array.cache_clear()
