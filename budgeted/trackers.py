"""A run's metrics on a dashboard as well: tracker=tensorboard, wandb or mlflow. Off by default, imported on use.

    tracker = trackers.start("tensorboard", cell, cfg, step, step)   # goes on with what a requeued run began
    tracker.write({"step": 0, "loss": 1.0, ...})               # a row of metrics.jsonl
    tracker.close(done=True)

metrics.jsonl stays the record: a tracker that fails is left out with a warning, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from budgeted.cells import Cell
from budgeted.errors import UserError
from budgeted.files import finite, read_json, write_json

log = logging.getLogger("budgeted")
PROJECT = "budgeted"


class Tracker(Protocol):
    """One run of one service. What was written of steps from `step` on, and of evaluations from the step
    `evaluated` on, comes again."""

    def __init__(self, cell: Cell, cfg: dict[str, Any], step: int, evaluated: int) -> None: ...

    def write(self, values: dict[str, float], step: int) -> None:
        """Values by name, such as `train/loss` or `eval/top1`."""

    def close(self, done: bool) -> None:
        """`done`: the run has reached the end of its budget; otherwise it failed, or goes on another time."""


class TensorBoard:
    """Event files in the run's directory, in tensorboard/train and tensorboard/eval: `tensorboard --logdir runs`."""

    def __init__(self, cell: Cell, cfg: dict[str, Any], step: int, evaluated: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place, after = cell.directory / "tensorboard", {"train": step, "eval": evaluated}
        self.writers = {kind: SummaryWriter(str(place / kind), purge_step=s) for kind, s in after.items()}

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writers[name.split("/")[0]].add_scalar(name, value, step)

    def close(self, done: bool) -> None:
        for writer in self.writers.values():
            writer.close()


class WandB:
    """W&B, as the environment configures it (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline)."""

    def __init__(self, cell: Cell, cfg: dict[str, Any], step: int, evaluated: int) -> None:
        import wandb

        name = _known(cell.directory, "wandb") or _remember(cell.directory, "wandb", secrets.token_hex(8))
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        where = str(cell.directory)
        self.run = wandb.init(project=project, id=name, resume="allow", name=cell.name, config=cfg, dir=where)
        self.run.define_metric("*", step_metric="step")

    def write(self, values: dict[str, float], step: int) -> None:
        # Its own count never goes back: what it has already it leaves as it is, and that comes out the same. An
        # evaluation has a number of its own, as it may be made by another process than the step before it.
        evaluation = any(name.startswith("eval/") for name in values)
        self.run.log({**values, "step": step}, step=2 * step + evaluation)

    def close(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(self, cell: Cell, cfg: dict[str, Any], step: int, evaluated: int) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self.run = _known(cell.directory, "mlflow")
        self.written: dict[str, int] = {}
        if self.run:
            for key in self.client.get_run(self.run).data.metrics:
                self.written[key] = max(m.step for m in self.client.get_metric_history(self.run, key))
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run = self.client.create_run(where, run_name=cell.name, tags={"signature": cell.signature}).info.run_id
        _remember(cell.directory, "mlflow", self.run)

    def write(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        at = int(1000 * time.time())
        new = [Metric(k, v, at, step) for k, v in values.items() if step > self.written.get(k, -1)]  # it keeps doubles
        self.client.log_batch(self.run, metrics=new)

    def close(self, done: bool) -> None:
        self.client.set_terminated(self.run, status="FINISHED" if done else "KILLED")


KINDS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


class Rows:
    """A tracker, or none, fed with the rows of metrics.jsonl."""

    def __init__(self, name: str, make: Any) -> None:
        self.name, self.tracker = name, None
        self.tracker = self._tried(make)

    def write(self, row: dict[str, Any]) -> None:
        """One row: what is under `eval` goes by eval/<name>, the rest by train/<name>."""
        if self.tracker is None:
            return
        kind, values = ("eval", row["eval"]) if "eval" in row else ("train", row)
        numbers = {f"{kind}/{k}": v for k, v in finite(values).items() if k != "step" and v is not None}
        self._tried(lambda: self.tracker.write(numbers, row["step"]))

    def close(self, done: bool) -> None:
        if self.tracker is not None:
            self._tried(lambda: self.tracker.close(done))
        self.tracker = None

    def _tried(self, action: Any) -> Any:
        try:
            return action()
        except Exception as error:  # services raise what they like, and a run of days is worth more than its curve
            log.warning(
                "tracker=%s failed and is left out from here on (%s: %s); metrics.jsonl has it all",
                self.name, type(error).__name__, " ".join(str(error).split())[:200],
            )  # fmt: skip
            self.tracker = None
            return None


def require(name: str) -> None:
    """Raise UserError when the tracker of that name is not installed. Imports nothing."""
    if name != "none" and importlib.util.find_spec(KINDS[name][1]) is None:
        raise UserError(f"tracker={name}: {KINDS[name][1]} is not installed; pip install {KINDS[name][1]}")


def start(name: str, cell: Cell, cfg: dict[str, Any], step: int, evaluated: int) -> Rows:
    """The tracker of that name for a run that goes on at `step`; `none` takes rows and does nothing."""
    return Rows(name, (lambda: KINDS[name][0](cell, cfg, step, evaluated)) if name != "none" else lambda: None)


def _known(directory: Path, service: str) -> str | None:
    """The run that an earlier process of this cell began."""
    found = (read_json(directory / "tracker.json") or {}).get(service)
    return found if isinstance(found, str) else None


def _remember(directory: Path, service: str, run: str) -> str:
    write_json(directory / "tracker.json", {**(read_json(directory / "tracker.json") or {}), service: run})
    return run
