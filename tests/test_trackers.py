"""Dashboards: what reaches them, once each, over a resume; a dashboard that fails does not fail the run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from budgeted import trackers
from budgeted.errors import UserError


def tracked(make: Any, name: str) -> Any:
    run = make()
    run.recipe.cfg["tracker"] = name
    return run


def rows(run: Any) -> list[dict]:
    return [json.loads(line) for line in run.recipe.cell.metrics.read_text().splitlines()]


def wanted(run: Any) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl says, by the names that trackers use."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows(run):
        kind, values = ("eval", row["eval"]) if "eval" in row else ("train", row)
        for key, value in values.items():
            if key != "step":
                found.setdefault(f"{kind}/{key}", []).append((row["step"], value))
    return found


def test_tensorboard_shows_every_step_once_over_a_resume(toy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(toy, "tensorboard").train(stop_at=13)  # the checkpoint is of step 10: steps 10 to 12 are made again
    run = tracked(toy, "tensorboard")
    assert run.train()["resumed"] == 1
    folder = run.recipe.cell.directory / "tensorboard"
    events = {kind: EventAccumulator(str(folder / kind)) for kind in ("train", "eval")}
    for kind, found in events.items():
        assert len(list((folder / kind).iterdir())) == 2
        found.Reload()
    expected = wanted(run)
    assert {n for found in events.values() for n in found.Tags()["scalars"]} == set(
        expected
    ) and "eval/top1" in expected
    for name, values in expected.items():
        seen = [(e.step, e.value) for e in events[name.split("/")[0]].Scalars(name)]
        assert [s for s, _ in seen] == [s for s, _ in values], name
        assert [v for _, v in seen] == pytest.approx([v for _, v in values], rel=1e-6)


def test_no_tracker_writes_nothing(toy):
    run = toy()
    run.train()
    assert not {"tensorboard", "wandb", "tracker.json"} & {p.name for p in run.recipe.cell.directory.iterdir()}


class Wandb(types.ModuleType):
    """As much of wandb as we use: init, and a run's define_metric, log and finish. Like wandb's own, a run keeps what
    it was sent first of a step, and nothing of a step below the last."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished: list[int] = []

    def init(self, **words: Any) -> Wandb:
        self.started.append(words)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict, step: int) -> None:
        if step > (self.logged[-1][0] if self.logged else -1):
            self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def test_wandb_goes_on_with_the_run_it_began(toy, monkeypatch):
    service = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", service)
    tracked(toy, "wandb").train(stop_at=13)
    run = tracked(toy, "wandb")
    run.train()
    one, two = service.started
    assert one["id"] == two["id"] and one["resume"] == two["resume"] == "allow"
    assert one["name"] == "toy/linear/20it/s0" and one["config"]["task"]["lr"] == 0.1
    assert service.finished == [1, 0]  # the one that was cut off is not shown as finished
    expected = wanted(run)
    expected.pop("train/seconds")  # each process's own
    for name, values in expected.items():
        assert [(v["step"], v[name]) for _, v in service.logged if name in v] == values, name


def test_wandb_has_the_evaluation_that_a_stopped_run_owed(toy, monkeypatch):
    """Stopped within the evaluation after step 9, whose row it has: the next process makes the evaluation."""
    service = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", service)
    first = tracked(lambda: toy(scores=[]), "wandb")
    with pytest.raises(IndexError):
        first.train()
    assert service.logged[-1][1]["step"] == 9 and "train/loss" in service.logged[-1][1]
    tracked(toy, "wandb").train()
    assert [v["step"] for _, v in service.logged if "eval/top1" in v] == [9, 19]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(toy, monkeypatch, said):
    service = Wandb()
    service.log = lambda values, step: 1 / 0 if values["step"] == 5 else None  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", service)
    run = tracked(toy, "wandb")
    assert run.train()["status"] == "done"
    assert [line for line in said if "tracker=wandb failed and is left out from here on (ZeroDivisionError" in line]
    assert len([row for row in rows(run) if "loss" in row]) == 20


def test_one_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trackers.require("none")
    with pytest.raises(UserError, match=r"tracker=mlflow: mlflow is not installed; pip install mlflow"):
        trackers.require("mlflow")


def test_wandb_itself_without_a_network(toy, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra: pip install -e .[trackers]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked(toy, "wandb").train(stop_at=13)
    run = tracked(toy, "wandb")
    run.train()
    written = list((run.recipe.cell.directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2 and len({path.name for path in written}) == 1


def test_mlflow_itself_in_files(toy, monkeypatch, tmp_path: Path):
    pytest.importorskip("mlflow", reason="mlflow is an extra: pip install -e .[trackers]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked(toy, "mlflow").train(stop_at=13)
    run = tracked(toy, "mlflow")
    run.train()
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("budgeted").experiment_id])
    assert found.info.run_name == "toy/linear/20it/s0" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == wanted(run)["train/loss"]
