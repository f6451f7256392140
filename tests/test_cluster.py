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

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
TINY = ("imagenet_tiny", "kinetics_tiny", "coco_tiny", "cityscapes_tiny")
# submitit takes every USR2 for a time-out where the limit is at most ten minutes.
LIMITS = ("hydra.launcher.timeout_min=10", "hydra.launcher.signal_delay_s=50")
SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", *LIMITS)
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

    def worker(self, step: int, other_than: str = "") -> dict | None:
        """The state its process wrote, once it has logged that step in another job array than that."""
        state = self.json("state.json")
        fresh = state.get("state") == "running" and state["job"].split("_")[0] != other_than
        return state if fresh and len(self.lines()) > step else None

    def has_finished(self) -> bool:
        return bool(self.json("result.json"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cells from beginning to end in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-W", "ignore", str(ROOT / "run.py"), "-m", *CELL, "seed=range(4)", f"out={out}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)
    return out


def each(cells: list[Seen], step: int, action: Callable[[Seen, dict], None], other_than: str = "") -> None:
    """Do something to every cell's worker as soon as that cell has logged a step."""
    left = list(cells)

    def reached() -> bool:
        for cell in [*left]:
            assert not cell.has_finished(), f"{cell.name} was too quick"
            if state := cell.worker(step, other_than):
                action(cell, state)
                left.remove(cell)
        return not left

    wait_for(reached, 150)


def hold(cell: Seen, state: dict) -> None:
    """Until SLURM sends a signal, which it does with a SIGCONT."""
    os.kill(state["pid"], signal.SIGSTOP)


def test_disturbed_cells_end_like_undisturbed_ones(slurm, run, undisturbed, tmp_path):
    """Cancelled as a whole, then by the same command: kill -9, scancel --signal, a time limit and a preemption."""
    words = ("-m", *CELL, "seed=range(4)", f"out={tmp_path}", *SLURM, "hydra.launcher.array_parallelism=3")
    killed, told, timed, preempted = cells = [Seen(tmp_path, seed) for seed in range(4)]

    driver = run(*words)
    each([killed, told, timed], 12, hold)
    array = killed.json("state.json")["job"].split("_")[0]
    watched = said(run("mode=status", f"out={tmp_path}"))
    assert "3 running" in watched and "1 queued" in watched
    assert re.search(rf"queued .*job {array}_3 JobArrayTaskLimit", watched), watched
    slurm.run("scancel", array)
    assert "the same command tries these 4 again" in said(driver, expect=1)
    assert {cell.json("state.json").get("state") for cell in cells} == {"partial", None}

    driver = run(*words)
    hit, jobs = {}, {}

    def disturb(cell: Seen, state: dict) -> None:
        hit[cell], jobs[cell] = state["pid"], state["job"]
        if cell is killed:
            os.kill(state["pid"], signal.SIGKILL)
        elif cell is told:
            slurm.run("scancel", "--signal=USR2", state["job"])
        else:  # limits are whole minutes
            hold(cell, state)
            clock = slurm.run("squeue", "-h", "-j", state["job"], "-o", "%M").strip()  # minutes:seconds
            slurm.run("scontrol", "update", f"JobId={state['job']}", f"TimeLimit={int(clock.split(':')[0]) + 1}")

    each([killed, told, timed], 25, disturb, other_than=array)
    each([preempted], 10, hold, other_than=array)
    wait_for(lambda: timed.json("state.json")["pid"] != hit[timed], 150)
    node = slurm.run("squeue", "-h", "-j", preempted.json("state.json")["job"], "-o", "%N").strip()
    slurm.run(
        "sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--wrap=sleep 1", "--output=/dev/null"
    )
    assert "4 of 4 cells done" in said(driver)

    for cell in (killed, told, timed):  # by the cancelled sweep, and by what was done to the second one
        assert cell.json("result.json")["resumed"] >= 2 and cell.json("state.json")["job"] == jobs[cell]
        log = (cell.path / "run.log").read_text()
        saved = re.findall(r"stopped by signal \d+ after (\d+) steps", log)
        assert len(saved) >= (1 if cell is killed else 2)  # a preemption takes whoever runs on the node
        assert all(f"goes on at step {step}" in log for step in saved)
    for seed, cell in enumerate(cells):
        whole, found = Seen(undisturbed, seed), cell.json("result.json")
        assert found["resumed"] >= 1
        for key in ("weights_sha256", "metrics", "samples_seen", "iterations_done"):
            assert found[key] == whole.json("result.json")[key]
        assert cell.lines() == whole.lines()
    logs = "".join(path.read_text() for path in sorted((tmp_path / ".sweep").glob("*/*_log.out")))
    assert "this job is timed-out" in logs and "Requeued job" in logs
    assert [path.name for path in (tmp_path / ".sweep").glob("*/*.killed")]  # by kill -9


def noted(folder: Path) -> dict[str, list[list[int]]]:
    """Data set to the samples of every step, over all ranks, as tests/slurm/samples wrote them down."""
    steps: dict[str, list[list[int]]] = {}
    for path in sorted(folder.iterdir()):
        batches = [json.loads(line) for line in path.read_text().splitlines()]
        steps[path.stem] = [a + b for a, b in zip(steps.get(path.stem, [[]] * len(batches)), batches, strict=True)]
    return {name: [sorted(step) for step in found] for name, found in steps.items()}


def test_the_smoke_sweep_completes(run, tmp_path):
    words = ("-m", "sweep=smoke", "budget=10%", "device=cpu", f"out={tmp_path}", *SLURM)  # 100% takes minutes
    assert "8 of 8 cells done" in said(run(*words))
    assert "nothing to launch" in said(run(*words))


def test_a_cell_that_fails_is_named_and_the_others_end(run, tmp_path):
    words = ("-m", "task.lr=1e20,0.05", "budget.amount=3it", "device=cpu", f"out={tmp_path}", *SLURM)
    heard = said(run(*words), expect=1)
    assert "1 of 2 cells done" in heard and re.search(r"s0-\w{6}: failed: NonFinite: the ", heard), heard


# What a process draws within the model, it draws for its own samples: detectron2 which anchors and proposals count,
# PSPNet which channels are dropped. Other draws, the same mean.
DRAWS = {"coco_tiny": 0.1, "cityscapes_tiny": 1e-3}


def test_two_nodes_train_what_one_process_trains(run, tmp_path):
    """All tiny tasks: the rates, the samples of every step, the first loss, and the metrics in the end."""
    words = (
        "-m",
        f"task={','.join(TINY)}",
        "budget.amount=4it",
        "task.eval_every=100%",
        "data.workers=0",
        "device=cpu",
    )
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    look = str(ROOT / "tests" / "slurm" / "samples")
    two = run(
        *words, f"out={tmp_path}/two", *SLURM, "hydra.launcher.nodes=2", PYTHONPATH=look, SAMPLES=str(tmp_path / "2")
    )
    said(run(*words, f"out={tmp_path}/one", PYTHONPATH=look, SAMPLES=str(tmp_path / "1")))
    said(two)
    assert noted(tmp_path / "1") == noted(tmp_path / "2") and len(noted(tmp_path / "1")) == len(TINY)
    for task in TINY:
        one, two = (Seen(tmp_path / out, task=task, budget="4it") for out in ("one", "two"))
        assert two.json("result.json")["world_size"] == 2
        a, b = one.lines(), two.lines()
        assert [x["lr"] for x in a if "lr" in x] == [x["lr"] for x in b if "lr" in x]
        assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=DRAWS.get(task, 1e-5)), task
        # Native tasks synchronise batch norm. AP and mIoU after four steps are thresholds and ratios of small counts.
        least = 1e-4 if task in ("imagenet_tiny", "kinetics_tiny") else 0.02
        assert a[-1]["eval"] == pytest.approx(b[-1]["eval"], abs=least), task


def test_when_one_of_two_ranks_is_killed_the_other_ends_and_the_same_command_goes_on(run, tmp_path):
    words = ("budget.amount=40it", "checkpoint.every=5it", "task.eval_every=100%", "device=cpu")
    srun = ("srun", "--nodes=2", "--ntasks=2", "--quiet")
    said(run(*words, f"out={tmp_path}/whole", by=srun))
    out, whole = (Seen(tmp_path / name, budget="40it") for name in ("killed", "whole"))
    step = run(*words, f"out={tmp_path}/killed", by=srun)
    state = wait_for(lambda: out.worker(12), 150)
    other = next(p for p in workers(str(tmp_path / "killed")) if p != state["pid"])
    os.kill(other, signal.SIGKILL)
    since = time.monotonic()
    step.wait(timeout=60)
    assert time.monotonic() - since < 30 and step.returncode != 0
    found = out.json("state.json")
    assert found["state"] == "partial" and "another process was lost" in found["error"] and not out.has_finished()
    said(run(*words, f"out={tmp_path}/killed", by=srun))
    assert out.lines() == whole.lines()
    assert out.json("result.json")["weights_sha256"] == whole.json("result.json")["weights_sha256"]


def workers(word: str) -> list[int]:
    """Processes of run.py with that word in their command, srun's own left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"srun" not in command[0] and any(word.encode() in part for part in command):
            found.append(int(path.parent.name))
    return found
