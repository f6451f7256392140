"""What a launcher adds to a sweep: `python -m benchmarks.launchers [basic|joblib|submitit_local|slurm|ray ...] [n=16]`.

Each launcher runs the same n cells of imagenet_tiny at one iteration, two at once where it can. `slurm` starts the
tests' own SLURM for it, and submits the cells as one array. Printed for each: cells done, seconds of the sweep, the
seconds of a cell that were not its own training and evaluation, and the largest memory of the driver.

    python -m benchmarks.launchers slurm n=500      # is any of 500 jobs lost?
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESETS: dict[str, tuple[str, ...]] = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local",),
    "slurm": ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.array_parallelism=2"),
    "ray": ("hydra/launcher=ray", "hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"),
}
AT_ONCE = {"basic": 1, "submitit_local": None}  # None: all; the others run two


@dataclass
class Seen:
    """A sweep that has ended: its cells that are done, in seconds what it took and what they trained, its driver."""

    done: int
    wall: float
    own: float
    driver_mb: float
    exit_code: int


def sweep(preset: str, n: int, environment: dict[str, str]) -> Seen:
    """Run the sweep in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="launchers-") as out:
        words = ("-m", "budget.amount=1it", f"seed=range({n})", "device=cpu", f"out={out}", *PRESETS[preset])
        begun = time.monotonic()
        with open(Path(out) / "driver.log", "w") as log:
            driver = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(ROOT / "run.py"), *words], cwd=ROOT, stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "BUDGETED_BAR": "0", **environment},
            )  # fmt: skip
            most = 0.0
            while driver.poll() is None:
                most = max(most, _resident_mb(driver.pid))
                time.sleep(0.2)
        wall = time.monotonic() - begun
        results = [json.loads(path.read_text()) for path in Path(out).glob("*/*/*/*/result.json")]
        if driver.returncode:
            print((Path(out) / "driver.log").read_text()[-2000:], file=sys.stderr)
        parts = ("train_seconds", "compile_seconds", "eval_seconds")
        return Seen(len(results), wall, sum(r[k] for r in results for k in parts), most, driver.returncode)


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


@contextmanager
def _slurm() -> Iterator[dict[str, str]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from slurm.cluster import Cluster, install

    with tempfile.TemporaryDirectory(prefix="slurm-") as state:
        cluster = Cluster(Path(state))
        install()
        cluster.start()
        try:
            yield cluster.environment
        finally:
            cluster.stop()


def main(arguments: Sequence[str]) -> int:
    n = int(next((a.split("=")[1] for a in arguments if a.startswith("n=")), "16"))
    names = [a for a in arguments if "=" not in a] or ["basic", "joblib", "slurm"]
    if wrong := set(names) - set(PRESETS):
        print(f"{sorted(wrong)}: no such launcher; known: {', '.join(PRESETS)}", file=sys.stderr)
        return 2
    lost = 0
    for name in names:
        if name == "slurm":
            with _slurm() as environment:
                found = sweep(name, n, environment)
        else:
            found = sweep(name, n, {"RAY_AUTH_MODE": "disabled"})
        lost += n - found.done
        at_once = AT_ONCE.get(name, 2) or n
        print(
            f"{name:15} {found.done} of {n} cells in {found.wall:.1f} s, exit {found.exit_code}; "
            f"{found.wall / n:.2f} s a cell ({at_once} at once), of which {found.own / n:.2f} s train and evaluate; "
            f"driver {found.driver_mb:.0f} MB",
            flush=True,
        )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
