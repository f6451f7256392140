"""One run from its first update to its result: rates, log, evaluations, checkpoints, signals, clocks."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from budgeted import checkpoint, code, make, session
from budgeted.budgets import Epoch
from budgeted.checkpoint import BrokenCheckpoint
from budgeted.distributed import World
from budgeted.errors import UserError
from budgeted.machine import device_name
from budgeted.schedules import SCHEDULES
from budgeted.session import NonFinite, Session
from budgeted.signals import Interrupted

PURE = sorted(set(SCHEDULES) - {"refined", "replay"})
SAME = ("weights_sha256", "metrics", "reported", "iterations_done", "samples_seen")


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr("budgeted.code.git_state", lambda: {"commit": None, "dirty": None})


def lines(toy):
    """The log, times aside."""
    rows = [json.loads(line) for line in toy.recipe.cell.metrics.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def steps(toy):
    return [row for row in lines(toy) if "eval" not in row]


def evaluations(toy):
    return [row for row in lines(toy) if "eval" in row]


def at(step, action):
    """Do `action` ahead of update `step`, once."""
    done = []

    def before(session):
        if session.step == step and not done:
            done.append(step)
            action()

    return before


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def state(toy):
    return json.loads((toy.recipe.cell.directory / "state.json").read_text())


# -- learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 40])
@pytest.mark.parametrize("name", PURE)
def test_the_lr_column_is_base_times_the_formula(toy, name, total):
    run = toy(schedule=name, amount=f"{total}it")
    run.train()
    schedule = make(name)
    wanted = [pytest.approx(0.1 * schedule(t / total), rel=1e-9, abs=1e-15) for t in range(total)]
    assert [row["lr"] for row in steps(run)] == wanted and run.rates == wanted
    assert [row["step"] for row in steps(run)] == list(range(total))
    assert [row["progress"] for row in steps(run)] == pytest.approx([t / total for t in range(total)])


def test_momentum_is_logged_where_it_moves(toy):
    run = toy(schedule="onecycle", amount="4it")
    run.train()
    assert [row["momentum"] for row in steps(run)] == pytest.approx([0.95, 0.9, 0.85, 0.9])
    assert "momentum" not in steps_of(toy(amount="2it"))[0]


def steps_of(run):
    run.train()
    return steps(run)


def test_another_writer_of_rates_is_found_at_its_first_update(toy):
    run = toy()

    def meddle(session):
        if session.step == 3:
            session.optimizer.param_groups[0]["lr"] = 0.05

    run.before = meddle
    with pytest.raises(RuntimeError, match=r"something else wrote the learning rate at step 3: \[0.05\]"):
        run.train()
    assert [row["step"] for row in steps(run)] == [0, 1, 2]


# -- the log and the result ---------------------------------------------------------------------------------


def test_log_holds_steps_and_evaluations_in_order(toy):
    run = toy(amount="6it", task__eval_every="50%")
    run.train()
    assert [(row["step"], "eval" in row) for row in lines(run)] == [
        (0, False), (1, False), (2, False), (2, True), (3, False), (4, False), (5, False), (5, True),
    ]  # fmt: skip
    assert set(lines(run)[0]) == {"step", "progress", "lr", "loss"} and set(lines(run)[3]["eval"]) == {"top1"}


def test_fewer_steps_can_be_logged_and_the_last_always_is(toy):
    run = toy(amount="10it", log_every=4)
    assert run.train()["iterations_done"] == 10
    assert [row["step"] for row in steps(run)] == [0, 4, 8, 9]


def test_result_has_the_contracts_keys(toy):
    run = toy(amount="8it")
    result = run.train()
    assert set(
        [
            "schema",
            "task",
            "schedule",
            "optimizer",
            "budget",
            "seed",
            "signature",
            "status",
            "reported",
            "metrics",
            "iterations_done",
            "samples_seen",
            "train_seconds",
            "eval_seconds",
            "data_wait_seconds",
            "compile_seconds",
            "samples_per_second",
            "peak_memory_bytes",
            "device",
            "precision",
            "world_size",
            "resumed",
            "data",
            "weights_sha256",
            "versions",
            "git",
            "started",
            "finished",
        ]
    ) <= set(result)
    assert result["budget"] == {"amount": "8it", "fraction": 0.4, "iterations": 8, "full_iterations": 20}
    assert (result["iterations_done"], result["samples_seen"], result["resumed"]) == (8, 32, 0)
    root = str(Path("toy").resolve())
    counts = {"n_train": 40, "n_val": 8, "classes": 2, "missing": 0}
    assert result["data"] == {"name": "toy", "root": root, **counts, "digest": None}
    assert result["train_seconds"] > 0 and result["peak_memory_bytes"] > 1e6
    assert result["weights_sha256"] == checkpoint.tensors_sha256(run.session.model.state_dict().items())
    assert run.recipe.cell.result() == result and run.recipe.cell.state == "done"


def test_gradient_norms_are_logged_for_a_refined_schedule(toy):
    run = toy(amount="6it", grad_norm=True)
    norms = []
    run.loss = lambda step, value: norms.append(value) or value
    rows = steps_of(run)
    assert all(row["grad_norm"] > 0 for row in rows)
    schedule = make("refined", run=str(run.recipe.cell.directory))
    assert 0 < max(schedule(t / 6) for t in range(6)) == 1


def test_the_norm_is_that_of_all_gradients(toy):
    run = toy(amount="2it", grad_norm=True)
    wanted = []

    def keep(session):
        if session.step == 1:
            grads = [p.grad for p in session.model.parameters()]
            wanted.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))

    run.before = keep  # at step 1 the gradients are still those of step 0
    assert steps_of(run)[0]["grad_norm"] == pytest.approx(wanted[0], rel=1e-5)


# -- evaluations --------------------------------------------------------------------------------------------


def test_evaluations_come_by_period_and_at_the_end(toy):
    run = toy(amount="7it", task__eval_every="3it")
    run.train()
    assert [row["step"] for row in evaluations(run)] == [2, 5, 6]


def test_best_and_final_are_both_stored_and_the_rule_decides(toy, tmp_path):
    scores = [0.2, 0.5, 0.5, 0.4]
    best = toy(amount="8it", scores=list(scores), task__eval_every="25%").train()
    assert best["metrics"] == {"top1": {"final": 0.4, "best": 0.5, "best_step": 3}}
    assert best["reported"] == {"metric": "top1", "rule": "best", "value": 0.5}
    other = toy(out=tmp_path / "other", amount="8it", scores=scores, task__eval_every="25%", task__rule="final")
    final = other.train()
    assert final["reported"]["value"] == 0.4


def test_a_score_that_is_no_number_is_never_the_best(toy):
    result = toy(amount="8it", scores=[math.nan, 0.5, math.nan, 0.4], task__eval_every="25%").train()
    assert result["metrics"]["top1"] == {"final": 0.4, "best": 0.5, "best_step": 3}


def test_how_often_is_evaluated_or_logged_does_not_change_the_weights(toy, tmp_path):
    hashes = {
        toy(out=tmp_path / str(k), **changes).train()["weights_sha256"]
        for k, changes in enumerate(
            [{}, {"task__eval_every": "1it"}, {"log_every": 7}, {"checkpoint__minutes": 0}, {"data__workers": 2}]
        )
    }
    assert len(hashes) == 1
    assert toy(out=tmp_path / "other", seed=1).train()["weights_sha256"] not in hashes


# -- going on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 20 steps: its result and its log."""
    from conftest import Toy, toy_recipe

    recipe = toy_recipe(tmp_path_factory.mktemp("whole"))
    run = Toy(recipe, recipe.total)
    return run.train(), lines(run)


def agrees(run, result, whole):
    assert {k: result[k] for k in SAME} == {k: whole[0][k] for k in SAME}
    assert lines(run) == whole[1]


@pytest.mark.parametrize(
    ("stops", "resumed"),
    [([1], 0), ([5], 1), ([12], 1), ([19], 1), ([20], 1), ([3, 7], 1), ([5, 10, 15], 3), ([6, 6, 11], 2)],
    ids=str,
)
def test_a_run_that_died_ends_like_one_that_did_not(toy, whole, stops, resumed):
    for stop in stops:
        toy().train(stop_at=stop)
    run = toy()
    result = run.train()
    agrees(run, result, whole)
    assert result["resumed"] == resumed  # from checkpoints at 5, 10, 15 and 20


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_mid_step_loses_only_what_came_after_the_checkpoint(toy, whole, workers):
    run = toy(data__workers=workers)
    run.before = at(13, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    again = toy(data__workers=workers)
    result = again.train()
    agrees(again, result, whole)
    assert again.rates[0] == pytest.approx(0.1 * (1 - 10 / 20))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_go_on_exactly_too(toy, tmp_path, kind):
    make_one = lambda params: kind(params, 0.01)  # noqa: E731
    one, two, three = (toy(out=tmp_path / k) for k in ("one", "two", "two"))
    one.optimizer = two.optimizer = three.optimizer = make_one
    two.train(stop_at=13)
    assert three.train()["weights_sha256"] == one.train()["weights_sha256"]


def test_the_log_is_cut_to_the_checkpoint_whatever_followed_it(toy, whole):
    toy().train(stop_at=11)
    run = toy()
    with open(run.recipe.cell.metrics, "ab") as log:
        log.write(b'{"step": 11, "lr": 1}\n{"step": 12, "eval": {"top1": 1}}\n{"step": 10, "lr": 5}\n{"st')
    agrees(run, run.train(), whole)


def test_a_log_without_a_checkpoint_starts_over(toy, whole):
    toy().train(stop_at=4)
    run = toy()
    assert not run.recipe.cell.checkpoint.exists() and len(lines(run)) == 4
    agrees(run, run.train(), whole)


def test_a_broken_checkpoint_gives_way_to_the_one_before(toy, whole, said):
    toy().train(stop_at=16)
    run = toy()
    run.recipe.cell.checkpoint.write_bytes(b"PK")
    agrees(run, run.train(), whole)
    assert any("is broken" in line for line in said)


def test_a_run_that_died_between_its_last_step_and_its_result_only_writes_that(toy, whole, monkeypatch):
    run = toy()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(
            "budgeted.cells.Cell.write_result", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        run.train()
    assert run.recipe.cell.state == "partial"
    again = toy()
    agrees(again, again.train(), whole)
    assert again.rates == []


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(toy):
    first = toy()
    first.train(stop_at=11)
    cell = first.recipe.cell
    for changes, said in (({"amount": "30it"}, "T was 20, now 30"), ({"task__lr": 0.2}, "task.lr was 0.1, now 0.2")):
        other = toy(**changes)
        other.recipe = dataclasses.replace(other.recipe, cell=cell)
        with pytest.raises(ValueError, match=said) as error:
            other.train()
        assert "\n" not in str(error.value)
    assert toy().train()["iterations_done"] == 20  # and it is still there for its own


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "5"},
        {"step": 99},
        {"step": -1},
        {"step": True},
        {"model": 3},
        {"counters": None},
        {"recipe": None},
        {"optimizer": None},
    ],
    ids=str,
)
def test_a_checkpoint_of_wrong_types_is_an_error_and_no_result(toy, changed):
    toy().train(stop_at=11)
    run = toy()
    path = run.recipe.cell.checkpoint
    content = checkpoint.load(path)
    checkpoint.save(path, {**content, **changed})
    with pytest.raises(BrokenCheckpoint, match="checkpoint.pt"):
        run.train()
    assert run.recipe.cell.state != "done"


def test_checkpoints_come_by_progress_or_by_minutes(toy, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, packed: (saved.append(checkpoint.unpack(packed)["step"]), save(path, packed))
    )
    toy(checkpoint__every="25%").train()
    assert saved == [5, 10, 15, 20]
    saved.clear()
    toy(checkpoint__every="7it", seed=1).train()
    assert saved == [7, 14, 20]
    saved.clear()
    toy(checkpoint__minutes=0, amount="3it").train()
    assert saved == [1, 2, 3]


def test_training_goes_on_while_a_checkpoint_is_written(toy, whole, monkeypatch):
    """The write begun after step 4 ends when step 8 has begun: it holds the weights of step 4 all the same."""
    further, save = threading.Event(), checkpoint.save

    def slow(path, content):
        assert further.wait(10)
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", slow)
    run = toy()
    run.before = at(8, further.set)
    agrees(run, run.train(), whole)
    further.clear()
    killed = toy(seed=1)
    killed.before = at(8, lambda: (further.set(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        killed.train()
    assert checkpoint.load(killed.recipe.cell.checkpoint)["step"] == 5


def test_a_checkpoint_that_cannot_be_written_fails_the_run_at_the_next_step(toy, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    run = toy()
    run.before = at(5, lambda: run.session._saving.join())
    with pytest.raises(OSError, match="No space"):
        run.train()
    assert steps(run)[-1]["step"] == 4


@pytest.mark.parametrize("room", [0, 60, 300, 1000, 2000, 4000])
def test_a_full_disk_fails_cleanly_and_the_run_goes_on_once_there_is_room(toy, whole, room):
    """No file may grow beyond `room` bytes: a line of the log, a state, a checkpoint or the result is cut short."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = toy()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert run.recipe.cell.state != "done"
    again = toy()
    agrees(again, again.train(), whole)


# -- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_at_the_step_boundary_and_the_run_goes_on(toy, whole, number):
    handler = signal.getsignal(number)
    run = toy()
    run.before = at(8, kill(number))
    with pytest.raises(Interrupted) as stop:
        run.train()
    assert stop.value.signal == number and stop.value.code == 128 + number
    assert (state(run)["state"], state(run)["step"]) == ("partial", 9) and run.recipe.cell.state == "partial"
    assert signal.getsignal(number) is handler
    again = toy()
    agrees(again, again.train(), whole)
    assert again.rates[0] == pytest.approx(0.1 * (1 - 9 / 20))  # step 8 was saved: it is not repeated


def test_a_second_interrupt_leaves_at_once(toy):
    run = toy()
    run.before = at(
        8, lambda: (os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT), time.sleep(1))
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert steps(run)[-1]["step"] == 7


def test_a_second_interrupt_leaves_at_once_whatever_other_signals_came(toy):
    run = toy()
    numbers = (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    run.before = at(8, lambda: [kill(number)() for number in numbers])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert steps(run)[-1]["step"] == 7


def test_a_signal_that_comes_too_late_is_passed_on(toy, monkeypatch):
    """Within the writing of the result: the run is done, and who launched it learns that it was told to stop."""
    heard = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    result = Session._result
    monkeypatch.setattr(Session, "_result", lambda self, digest: (kill(signal.SIGTERM)(), result(self, digest))[1])
    try:
        run = toy()
        assert run.train()["status"] == "done" and state(run)["state"] == "done"
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert heard == [signal.SIGTERM]


def test_a_signal_at_the_last_step_leaves_a_run_that_only_needs_its_result(toy, whole):
    run = toy()
    run.before = at(19, kill(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.train()
    again = toy()
    agrees(again, again.train(), whole)


# -- losses that are not finite -----------------------------------------------------------------------------


def bad_at(*bad, value=math.nan):
    return lambda step, loss: loss * value if step in bad else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_stops_and_names_step_rate_and_checkpoint(toy, whole, value):
    run = toy()
    run.loss = bad_at(12, value=value)
    with pytest.raises(
        NonFinite, match=rf"loss of step 12 is {value} at learning rate 0.04; .* checkpoint is of step 9"
    ):
        run.train()
    again = toy()
    agrees(again, again.train(), whole)  # the last good checkpoint is usable


def test_it_names_the_rate_after_a_resume_too(toy):
    toy().train(stop_at=11)
    run = toy(log_every=1)
    run.loss = bad_at(12)
    with pytest.raises(NonFinite, match="step 12 is nan at learning rate 0.04; .* step 9"):
        run.train()


def test_it_names_the_first_bad_step_however_late_it_looks(toy):
    run = toy(log_every=8, checkpoint__every="100%")
    run.loss = bad_at(2, 3, 4)
    with pytest.raises(NonFinite, match="step 2 is nan at learning rate 0.09; there is no checkpoint yet"):
        run.train()
    assert not run.recipe.cell.checkpoint.exists()


def test_weights_are_never_saved_after_a_bad_loss(toy):
    run = toy(log_every=100, checkpoint__every="1it", task__eval_every="100%")
    run.loss = bad_at(6)
    with pytest.raises(NonFinite, match="step 6"):
        run.train()
    saved = checkpoint.load(run.recipe.cell.checkpoint)
    assert saved["step"] == 6 and all(torch.isfinite(v).all() for v in saved["model"].values())


class Breaks(torch.optim.SGD):
    """Its tenth update leaves a weight that is not finite, from a loss and a gradient that are."""

    made = 0

    def step(self, closure=None):
        super().step(closure)
        self.made += 1
        if self.made == 10:
            self.param_groups[0]["params"][0].data[0] = math.inf


def test_weights_that_are_not_finite_are_never_saved(toy):
    run = toy(task__eval_every="100%")
    run.optimizer = lambda parameters: Breaks(parameters, 0.1)
    wanted = "update of step 9 left weights that are not finite at learning rate 0.055; .* checkpoint is of step 4"
    with pytest.raises(NonFinite, match=wanted):
        run.train()
    saved = checkpoint.load(run.recipe.cell.checkpoint)
    assert saved["step"] == 5 and all(torch.isfinite(v).all() for v in saved["model"].values())


def test_skip_leaves_the_update_out_and_goes_on(toy):
    run, weights = toy(on_nonfinite="skip", amount="10it"), {}
    run.loss = bad_at(4)
    run.before = lambda session: weights.__setitem__(session.step, session.model[0].weight.detach().clone())
    result = run.train()
    assert result["skipped_updates"] == 1 and result["iterations_done"] == 10
    assert torch.equal(weights[4], weights[5]) and not torch.equal(weights[5], weights[6])
    assert [row["step"] for row in steps(run) if row["loss"] is None] == [4]
    assert all(torch.isfinite(v).all() for v in run.session.model.state_dict().values())


# -- who made it --------------------------------------------------------------------------------------------


def half(toy, monkeypatch, files, **changed):
    """A run of 20 iterations that was stopped at 12 and saved at 10, by the code that `files` stand for."""
    with monkeypatch.context() as patch:
        patch.setattr(code, "files", lambda: files)
        toy(**changed).train(stop_at=12)


def test_a_result_says_by_which_code_on_what_and_by_how_many_it_was_made(toy, monkeypatch):
    (part,) = toy().train()["parts"]
    assert part == {
        "step": 0, "code": code.digest(code.files()), "world_size": 1, "device": device_name(torch.device("cpu"))
    }  # fmt: skip
    half(toy, monkeypatch, code.files(), schedule="cosine")
    assert len(toy(schedule="cosine").train()["parts"]) == 1  # a resume alone is no new part


def test_a_run_that_goes_on_with_other_code_says_so(toy, monkeypatch, said):
    files = {**code.files(), "budgeted/schedules.py": "0" * 16}
    half(toy, monkeypatch, files)
    first, second = toy().train()["parts"]
    assert (first["code"], first["step"]) == (code.digest(files), 0)
    assert (second["code"], second["step"]) == (code.digest(code.files()), 10)
    assert any("goes on at step 10 with other code: budgeted/schedules.py differ" in line for line in said)


def test_other_code_is_refused_or_passed_over_as_the_option_says(toy, monkeypatch, said):
    half(toy, monkeypatch, {"run.py": "0" * 16})
    run = toy()
    run.recipe.cfg["code"] = "stop"
    with pytest.raises(UserError, match="goes on at step 10 with other code: .* and [0-9]+ more differ; code=warn"):
        run.train()
    run = toy()
    run.recipe.cfg["code"] = "ignore"
    assert len(run.train()["parts"]) == 2
    assert not any("other code" in line for line in said)


def test_a_checkpoint_of_before_goes_on(toy, said):
    toy().train(stop_at=12)
    content = checkpoint.load(toy().recipe.cell.checkpoint)
    for key in ("parts", "code", "data"):
        del content[key]
    checkpoint.save(toy().recipe.cell.checkpoint, content)
    assert [part["step"] for part in toy().train()["parts"]] == [10]
    assert any("goes on at step 10, to which it came by code that is not known" in line for line in said)


def test_another_number_of_processes_is_said(toy, said):
    toy().train(stop_at=12)
    content = checkpoint.load(toy().recipe.cell.checkpoint)
    content["parts"][0]["world_size"] = 4
    checkpoint.save(toy().recipe.cell.checkpoint, content)
    assert [part["world_size"] for part in toy().train()["parts"]] == [4, 1]
    assert any("goes on with 1 processes, before it had 4" in line for line in said)


def test_a_run_does_not_go_on_with_other_data(toy):
    toy().train(stop_at=12)
    content = checkpoint.load(toy().recipe.cell.checkpoint)
    content["data"] = {"digest": "0" * 12, "root": "/elsewhere"}
    checkpoint.save(toy().recipe.cell.checkpoint, content)
    toy().train(stop_at=11)  # whose data are not known
    run = toy()
    run.recipe = dataclasses.replace(run.recipe, data=dataclasses.replace(run.recipe.data, digest="1" * 12))
    checkpoint.save(run.recipe.cell.checkpoint, content)
    with pytest.raises(ValueError, match="is of other data, in /elsewhere: give another out="):
        run.train()


def test_weights_are_those_that_were_evaluated(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError):
        checkpoint.weights(path)
    checkpoint.save(path, {"model": {"w": torch.zeros(2)}})
    assert checkpoint.weights(path)["w"].tolist() == [0, 0]
    checkpoint.save(path, {"model": {"w": torch.zeros(2)}, "evaluated": {"w": torch.ones(2)}})
    assert checkpoint.weights(path)["w"].tolist() == [1, 1]


# -- the clock ----------------------------------------------------------------------------------------------


def slow(run, seconds=0.01):
    before = run.before
    run.before = lambda session: (before(session), time.sleep(seconds))
    return run


def test_a_clock_budget_ends_on_time_at_the_end_of_its_schedule(toy):
    """0.02 min is 1.2 s. Evaluations, of which there are five, take another 0.1 s each and are not counted."""
    run = slow(toy(amount="0.02min", task__eval_every="20%"))
    evaluate = run._evaluate
    run._evaluate = lambda model: (time.sleep(0.1), evaluate(model))[1]
    start = time.perf_counter()
    result = run.train()
    wall = time.perf_counter() - start
    # It ends with the step in which the time is up, which on a busy machine may be a long one.
    assert 1.2 <= result["train_seconds"] < 2.4 and wall > result["train_seconds"] + 0.5
    assert len(evaluations(run)) == 5
    rates = [row["lr"] for row in steps(run)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 0.1 and rates[-1] < 0.1 * 0.5
    assert [row["lr"] for row in steps(run)] == [
        pytest.approx(0.1 * (1 - row["progress"]), rel=1e-9) for row in steps(run)
    ]
    assert result["iterations_done"] == result["budget"]["iterations"] == len(rates)


def test_a_clock_budget_survives_two_interruptions(toy):
    for stop in (20, 45):
        run = slow(toy(amount="0.02min"))
        run.before = (lambda inner, k: lambda session: (inner(session), session.step == k and kill(signal.SIGTERM)()))(
            run.before, stop
        )
        with pytest.raises(Interrupted):
            run.train()
        time.sleep(0.2)  # time between two processes is not training time
    last = slow(toy(amount="0.02min"))
    result = last.train()
    assert 1.2 <= result["train_seconds"] < 2.4 and result["resumed"] == 2
    rows = steps(last)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert [row["lr"] for row in rows] == sorted((row["lr"] for row in rows), reverse=True)
    assert rows[-1]["lr"] < 0.1 * 0.5


def test_a_clock_run_can_be_replayed_by_iteration(toy):
    run = slow(toy(amount="0.004min"))
    run.train()
    (run.recipe.cell.directory / "config.yaml").write_text("task: {lr: 0.1}\noptimizer: {lr: null}\n")
    rates = [row["lr"] for row in steps(run)]
    again = toy(amount=f"{len(rates)}it")
    again.recipe = dataclasses.replace(again.recipe, schedule=make("replay", run=str(run.recipe.cell.directory)))
    again.train()
    assert again.rates == pytest.approx(rates, rel=1e-9)


def test_gpu_hours_are_shared_by_the_processes(toy):
    one, two = (Session(toy(amount="1gpuh").recipe, None, World(0, size), torch.device("cpu")) for size in (1, 2))
    assert (one.clock.seconds, two.clock.seconds) == (3600, 1800)
    assert Session(toy(amount="1h").recipe, None, World(0, 2), torch.device("cpu")).clock.seconds == 3600


def test_a_run_forgets_the_peak_of_the_one_before(toy, monkeypatch):
    forgotten = []
    monkeypatch.setattr(session, "forget_peak_memory", forgotten.append)
    toy().train()
    assert forgotten == [torch.device("cpu")]


def test_pieces_of_a_batch_weigh_as_much_as_the_whole(toy):
    """The mean over four samples is 3/4 of the mean of three and 1/4 of the last; of two ranks each averages its own."""

    def pieces(size, samples=40, **changed):
        recipe = dataclasses.replace(toy(**changed).recipe, epoch=Epoch(samples, 4, "keep"))
        return Session(recipe, 20, World(0, size), torch.device("cpu")).pieces()

    assert pieces(1) == [1] and pieces(1, micro_batch=3) == [0.75, 0.25] and pieces(1, micro_batch=1) == [0.25] * 4
    assert pieces(2) == [1] and pieces(2, micro_batch=1) == [0.5, 0.5]
    assert pieces(2, samples=3) == [pytest.approx(4 / 3)]  # two of an epoch's last three, averaged over two ranks


# -- refusals -----------------------------------------------------------------------------------------------


def test_ranks_with_different_numbers_of_pieces_are_refused(toy):
    """One would wait for the other in batch norm: of an epoch's last 3 samples the first of 2 ranks has 2."""

    def two(micro):
        recipe = dataclasses.replace(toy(micro_batch=micro).recipe, epoch=Epoch(39, 4, "keep"))
        return Session(recipe, 20, World(rank=0, size=2), torch.device("cpu"))

    with pytest.raises(UserError, match="micro_batch=1: 2 processes would share a batch of 3 .* micro_batch=2"):
        two(1)
    assert two(2).world_size == 2


def test_more_processes_than_samples_in_a_batch_are_refused(toy):
    with pytest.raises(UserError, match="5 processes cannot share a batch of 4"):
        Session(toy().recipe, 20, World(rank=0, size=5), torch.device("cpu"))


def test_a_batch_that_processes_cannot_share_equally_is_refused(toy):
    with pytest.raises(UserError, match="task.batch_size=4: 3 processes cannot share it equally; 3 or 6, or"):
        Session(toy().recipe, 20, World(rank=0, size=3), torch.device("cpu"))


def test_a_dataset_of_another_size_is_refused(toy):
    run = toy()
    run.train(stop_at=0)
    with pytest.raises(ValueError, match="39 samples, the recipe 40"):
        run.session.loader(range(39))
