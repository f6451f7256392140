"""Sweeps on a SLURM of the tests' own: signals, time limits, preemption, killed workers, several nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster, Unavailable, install

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).resolve().parent.parent
TINY = ("imagenet_tiny", "kinetics_tiny", "coco_tiny", "cityscapes_tiny")
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.signal_delay_s=5")
STEPS = 60
CELL = (f"budget.amount={STEPS}it", "checkpoint.every=10it", "task.eval_every=100%", "device=cpu")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))  # munge wants a place that all may enter
    try:
        install()
        cluster.start()
    except Unavailable as why:
        pytest.skip(str(why))
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.state)


@pytest.fixture
def run(slurm: Cluster) -> Iterator[Callable[..., subprocess.Popen]]:
    """run(*words, by=(...)) starts `[by] python run.py words` against the cluster; killed with the test."""
    started: list[subprocess.Popen] = []

    def start(*words: str, by: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [*by, sys.executable, "-W", "ignore", str(ROOT / "run.py"), *words],
            env={**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1", "BUDGETED_BAR": "0", **environment},
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    subprocess.run(["scancel", "--user=root"], env={**os.environ, **slurm.environment}, timeout=20)


def said(process: subprocess.Popen, expect: int = 0, timeout: float = 240) -> str:
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == expect, output
    return output


def wait_for(what: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


class Seen:
    """One cell's directory."""

    def __init__(self, out: Path, seed: int = 0, task: str = "imagenet_tiny", budget: str = f"{STEPS}it") -> None:
        self.budget, self.name = out / task / "linear" / budget, f"s{seed}"

    @property
    def path(self) -> Path:
        found = [
            *self.budget.glob(f"{self.name}-*"),
            self.budget / self.name,
        ]  # another evaluation period is another cell
        return found[0]

    def json(self, name: str) -> dict:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return {}

    def lines(self) -> list[dict]:
        try:
            rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    def reaches(self, step: int) -> dict:
        """The state of its worker, once it has logged that step."""
        wait_for(lambda: len(self.lines()) > step)
        return self.json("state.json")

    def has_finished(self) -> bool:
        return bool(self.json("result.json"))


def pending(pid: int, number: int) -> bool:
    """Does a signal wait for that stopped process?"""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^(?:ShdPnd|SigPnd):\s*([0-9a-f]+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cells from beginning to end in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-W", "ignore", str(ROOT / "run.py"), "-m", *CELL, "seed=range(4)", f"out={out}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)
    return out


def test_disturbed_cells_end_like_undisturbed_ones(slurm, run, undisturbed, tmp_path):
    """Cancelled as a whole, then by the same command: kill -9, scancel --signal, a time limit and a preemption."""
    words = ("-m", *CELL, "seed=range(4)", f"out={tmp_path}", *SLURM, "hydra.launcher.array_parallelism=3")
    killed, told, timed, preempted = cells = [Seen(tmp_path, seed) for seed in range(4)]

    driver = run(*words)
    state = killed.reaches(12)
    watched = said(run("mode=status", f"out={tmp_path}"))
    array = state["job"].split("_")[0]
    assert re.search(rf"queued .*job {array}_3 JobArrayTaskLimit", watched), watched
    slurm.run("scancel", array)
    assert "the same command tries these" in said(driver, expect=1)
    assert killed.json("state.json")["state"] == "partial" and not killed.has_finished()

    driver = run(*words)
    workers = {cell: cell.reaches(30) for cell in (killed, told, timed)}
    assert workers[killed]["job"] != state["job"]
    os.kill(workers[killed]["pid"], signal.SIGKILL)
    slurm.run("scancel", "--signal=USR2", workers[told]["job"])
    # The limit is a whole minute from the start: the worker is held until SLURM has noticed that it is over.
    os.kill(workers[timed]["pid"], signal.SIGSTOP)
    slurm.run("scontrol", "update", f"JobId={workers[timed]['job']}", "TimeLimit=1")
    wait_for(lambda: pending(workers[timed]["pid"], signal.SIGUSR2), 150)
    os.kill(workers[timed]["pid"], signal.SIGCONT)
    node = slurm.run("squeue", "-h", "-j", preempted.reaches(10)["job"], "-o", "%N").strip()
    slurm.run(
        "sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--wrap=sleep 2", "--output=/dev/null"
    )
    output = said(driver)

    assert "4 of 4 cells done" in output
    for seed, cell in enumerate(cells):
        whole, found = Seen(undisturbed, seed), cell.json("result.json")
        assert found["resumed"] >= 1
        for key in ("weights_sha256", "metrics", "samples_seen", "iterations_done"):
            assert found[key] == whole.json("result.json")[key]
        assert cell.lines() == whole.lines()
    logs = "".join(path.read_text() for path in sorted((tmp_path / ".sweep").glob("*/*_log.out")))
    assert "this job is timed-out" in logs and "Requeued job" in logs
    assert [path.name for path in (tmp_path / ".sweep").glob("*/*.killed")]  # by kill -9
