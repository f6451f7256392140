"""Who a run is, where it lives, what state it is in, and who holds it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from budgeted.cells import Cell, Held, signature
from budgeted.errors import UserError
from tasks import cli


def cell(out, departs=False, mark="abc123"):
    return Cell("toy", "linear", "10%", 3, mark, departs, Path(out))


RATE = cli.configuration(("task=imagenet_tiny",))["task"]["lr"]
RESULT = {
    "schema": 1,
    "status": "done",
    "signature": "abc123",
    "reported": {"metric": "top1", "rule": "best", "value": 0.5},
}


# -- names --------------------------------------------------------------------------------------------------


def test_directory_says_who_it_is(tmp_path):
    assert cell("runs").directory == Path("runs/toy/linear/10%/s3")
    assert cell("runs", departs=True).directory == Path("runs/toy/linear/10%/s3-abc123")


def test_signature_is_six_digits_over_values_alone():
    fields = {"lr": 0.1, "k": {"a": [1, 2], "b": None}, "flag": True}
    assert len(signature(fields)) == 6 and int(signature(fields), 16) >= 0
    assert signature(fields) == signature(dict(reversed(fields.items())))
    assert signature({"eta": 0}) == signature({"eta": 0.0})  # schedule.eta=0 is the schedule as it comes
    assert signature({"flag": True}) != signature({"flag": 1})
    different = [{"lr": 0.1}, {"lr": 0.2}, {"lr": "0.1"}, {"lr": None}, {"Lr": 0.1}, {"lr": [0.1]}, {}]
    assert len({signature(d) for d in different}) == len(different)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Words that leave the embedded data unwritten: its counts are known."""
    out = tmp_path_factory.mktemp("cells")
    return (f"out={out}", f"data.root={out}/imagenet_tiny")


def named(words, *more):
    recipe = cli.recipe((*words, *more))
    return recipe.cell.name


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ((), "imagenet_tiny/linear/10%/s0"),
        (("seed=7",), "imagenet_tiny/linear/10%/s7"),
        (("schedule=step", "budget=5%"), "imagenet_tiny/step/5%/s0"),
        (("budget.amount=15%",), "imagenet_tiny/linear/15%/s0"),
        (("budget.amount=45min",), "imagenet_tiny/linear/45min/s0"),
        (("budget.amount=10%",), "imagenet_tiny/linear/10%/s0"),
        (("data.workers=2",), "imagenet_tiny/linear/10%/s0"),
        (("log_every=7", "checkpoint.every=1ep", "checkpoint.minutes=1"), "imagenet_tiny/linear/10%/s0"),
        (("device=cpu", "compile=true", "channels_last=true", "micro_batch=32"), "imagenet_tiny/linear/10%/s0"),
        (
            (f"task.lr={RATE:e}", "task.batch_size=32", "precision=fp32"),
            "imagenet_tiny/linear/10%/s0",
        ),  # as it is anyway
        (("schedule=cosine", "schedule.eta=0"), "imagenet_tiny/cosine/10%/s0"),
        (("hydra.job.chdir=false",), "imagenet_tiny/linear/10%/s0"),
        (("grad_norm=true",), "imagenet_tiny/linear/10%/s0"),
    ],
)
def test_what_does_not_affect_the_result_does_not_depart(words, more, name):
    assert named(words, *more) == name


DEPARTURES = [
    ("task.lr=0.2",), ("precision=bf16",), ("data.subset=1000",), ("task.batch_size=64",), ("hold=5",), ("task.model=resnet18",),
    ("task.weight_decay=0",), ("task.full=20ep",), ("task.warmup.fraction=0.1",), ("task.rule=final",), ("optimizer=adam",),
    ("optimizer.momentum=0.8",), ("optimizer.nesterov=true",), ("task.milestones=[0.5]",), ("on_nonfinite=skip",),
    ("task.weights=https://example.org/w.pth",), ("micro_batch=8",),
]  # fmt: skip


@pytest.mark.parametrize("more", DEPARTURES, ids=lambda v: v[0])
def test_what_affects_the_result_departs(words, more):
    name = named(words, *more)
    assert name.startswith("imagenet_tiny/linear/10%/s0-") and len(name) == len("imagenet_tiny/linear/10%/s0-") + 6
    assert named(words, *more) == name


def test_weights_and_earlier_runs_are_known_by_their_content(words, tmp_path):
    """Every checkpoint is called checkpoint.pt, and a run may be written with a slash behind it."""
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_text(text)
    a, b, c = (named(words, f"task.weights={tmp_path}/{name}/checkpoint.pt", "mode=plan") for name in "abc")
    assert a == c != b
    rows = [{"step": t, "lr": 0.05, "grad_norm": 1.0} for t in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "result.json").write_text('{"status": "done"}')
    (tmp_path / "config.yaml").write_text("task: {lr: 0.05}\noptimizer: {lr: null}\n")
    run = ("schedule=replay", "budget.amount=4it")
    assert named(words, *run, f"schedule.run={tmp_path}") == named(words, *run, f"schedule.run={tmp_path}/")
    with pytest.raises(UserError, match=r"made 4 steps; budget.amount=4it"):
        named(words, "schedule=replay", f"schedule.run={tmp_path}")


@pytest.mark.parametrize(
    "more",
    [
        ("schedule=step", "schedule.gamma=0.2"),
        ("schedule=poly", "schedule.power=2"),
        ("schedule=wsd", "schedule.shape=linear"),
    ],
    ids=lambda v: v[1],
)
def test_a_schedules_constants_depart(words, more):
    assert named(words, *more).startswith(f"imagenet_tiny/{more[0][9:]}/10%/s0-")


def test_departures_do_not_share_a_directory(words):
    assert len({named(words, *more) for more in DEPARTURES}) == len(DEPARTURES)
    assert named(words, "task.lr=0.2") != named(words, "task.lr=0.3")


def test_one_recipe_is_one_signature_however_it_is_written(words):
    signatures = {
        cli.recipe((*words, *more)).cell.signature for more in [(), (f"task.lr={RATE:e}",), ("task.warmup.fraction=0",)]
    }
    assert len(signatures) == 1


def class_folders(root, train, val, classes=("a", "b")):
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                (root / split / name / f"{k}.jpg").touch()
    return root


def test_other_data_depart_by_their_counts(tmp_path):
    photos = class_folders(tmp_path / "photos", 40, 5)
    name = named((f"out={tmp_path}", f"data.root={photos}"))
    assert name.startswith("imagenet_tiny/linear/10%/s0-")
    said = ("task.samples=80", "task.val_samples=10", "task.classes=2")  # saying so does not make them the recipe's
    assert named((f"out={tmp_path}", f"data.root={photos}", *said)) == name
    larger = class_folders(tmp_path / "larger", 41, 5)
    assert named((f"out={tmp_path}", f"data.root={larger}")) not in (name, "imagenet_tiny/linear/10%/s0")
    # The same counts and classes as the recipe's own: the same cell, wherever they lie.
    classes = [f"c{k}" for k in range(10)]
    equal = class_folders(tmp_path / "equal", 200, 50, classes)
    assert named((f"out={tmp_path}", f"data.root={equal}")) == "imagenet_tiny/linear/10%/s0"


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", ".hidden", "a\nb"])
def test_no_name_leads_out_of_the_folder_of_runs(words, name):
    with pytest.raises(UserError):
        cli.recipe((*words, f"task.name='{name}'"))


# -- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("partial", "partial"),
        ("failed", "failed"),
        ("running", "partial"),
        ("done", "partial"),
        ("nonsense", "missing"),
        (None, "missing"),
    ],
)
def test_states_are_read_off_the_disk(tmp_path, state, expected):
    c = cell(tmp_path)
    assert c.state == "missing"
    c.directory.mkdir(parents=True)
    c.write_state(state)
    assert c.state == expected  # nobody runs it, and without a result it is not done


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'"done"', b'{"state": ["done"]}', b'{"state": {}}', b"\xff\xff", b"[" * 9999]
)
def test_a_damaged_state_is_no_state(tmp_path, raw):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    (c.directory / "state.json").write_bytes(raw)
    assert c.state == "missing"


def test_state_says_who_and_how_far(tmp_path):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    c.write_state("failed", 3, 10, "out of memory", eta_seconds=float("nan"))
    said = json.loads((c.directory / "state.json").read_text())
    assert (said["state"], said["step"], said["total"], said["error"], said["pid"]) == (
        "failed",
        3,
        10,
        "out of memory",
        os.getpid(),
    )
    assert said["eta_seconds"] is None
    assert [p.name for p in c.directory.iterdir()] == ["state.json"]


def test_done_is_a_whole_result_of_this_recipe(tmp_path):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    c.write_result(RESULT)
    assert c.state == "done" and c.result() == RESULT
    assert cell(tmp_path, mark="def456").state == "missing"


def test_a_result_of_another_recipe_is_not_written_over(tmp_path):
    mine, other = cell(tmp_path), cell(tmp_path, mark="def456")
    mine.refuse_other_result()  # there is none
    mine.directory.mkdir(parents=True)
    mine.write_result({**RESULT, "data": {"n_train": 40}})
    mine.refuse_other_result()
    with pytest.raises(
        UserError, match="s3 holds the result of another recipe .*abc123 on 40 training.*now def456.*out="
    ):
        other.refuse_other_result()
    mine.write_result({**RESULT, "status": "failed"})
    other.refuse_other_result()


def test_a_command_that_would_write_over_a_result_is_refused(tmp_path):
    words = ("task=imagenet_tiny", f"out={tmp_path}")
    there = cli.recipe(words).cell
    there.directory.mkdir(parents=True)
    there.write_result({**RESULT, "signature": "0a0a0a"})
    with pytest.raises(UserError, match="holds the result of another recipe"):
        cli.recipe(words)
    assert cli.recipe((*words, "mode=plan")).cell.state != "done"


@pytest.mark.parametrize(
    "changed",
    [
        {"schema": 2}, {"status": "running"}, {"signature": "def456"}, {"reported": None}, {"reported": {}}, {"reported": {"value": None}},
        {"reported": {"value": "0.5"}}, {"reported": {"value": float("nan")}}, {"reported": {"value": True}},
    ],
)  # fmt: skip
def test_a_result_of_another_kind_is_not_done(tmp_path, changed):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    c.write_result({**RESULT, **changed})
    assert c.result() is None and c.state != "done"


def test_a_result_with_any_digit_changed_is_not_done(tmp_path):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    c.write_result(RESULT)
    path = c.directory / "result.json"
    raw = path.read_text()
    for old, new in [("0.5", "0.6"), ('"digest"', '"dogest"'), ("best", "best "), ("top1", "top5")]:
        path.write_text(raw.replace(old, new, 1))
        assert c.result() is None
    for cut in range(0, len(raw) - 1, 7):
        path.write_text(raw[:cut])
        assert c.result() is None
    path.write_text(json.dumps(RESULT))  # without a digest
    assert c.result() is None
    path.write_text(raw)
    assert c.result() == RESULT


# -- the lock -----------------------------------------------------------------------------------------------


def _hold(c, pipe):
    with c.lock():
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def held(tmp_path):
    """A cell that another process holds, and that process."""
    c = cell(tmp_path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(c, there))
    process.start()
    assert here.recv() == "held"
    yield c, process, here
    process.kill()
    process.join()


def test_the_second_of_two_processes_is_told_who_holds_it(held):
    c, process, _ = held
    with (
        pytest.raises(Held, match=rf"toy/linear/10%/s3 is being run by process {process.pid} on .+ since 20\d\d-"),
        c.lock(),
    ):
        pass
    assert f"process {process.pid}" in c.holder()


def test_a_run_with_a_holder_is_running(held):
    c, _, _ = held
    c.write_state("running")
    assert c.state == "running"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff"])
def test_a_lock_whose_text_is_lost_is_still_held(held, raw):
    c, _, _ = held
    (c.directory / "lock").write_bytes(raw)
    c.write_state("running")
    assert c.holder() and c.state == "running"
    with pytest.raises(Held), c.lock():
        pass


def test_a_killed_process_leaves_no_lock(held):
    c, process, _ = held
    c.write_state("running")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert c.holder() is None and c.state == "partial"
    with c.lock():
        assert f'"pid": {os.getpid()}' in (c.directory / "lock").read_text()


def test_a_process_that_ends_frees_it(held):
    c, process, pipe = held
    pipe.send("enough")
    process.join()
    with c.lock():
        pass
    with c.lock():
        pass


def _asks(c, pipe):
    try:
        with c.lock():
            pipe.send("mine")
    except Held as error:
        pipe.send(str(error))


def test_its_holder_may_look_at_its_state_without_losing_it(tmp_path):
    """Closing any handle of a file drops the process's record locks on it: looking must not open the file."""
    c = cell(tmp_path)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    with c.lock():
        c.write_state("running")
        assert c.state == "running" and c.holder()
        with pytest.raises(Held), c.lock():
            pass
        other = context.Process(target=_ask_in_a_fresh_process, args=(c, there))
        other.start()
        assert "is being run by process" in here.recv()
        other.join()


def _ask_in_a_fresh_process(c, pipe):
    from budgeted import cells

    cells._HELD.clear()  # what a process that was not forked from the holder has
    _asks(c, pipe)


def test_litter_of_killed_writers_is_swept_by_the_next_holder(tmp_path):
    c = cell(tmp_path)
    c.directory.mkdir(parents=True)
    for name in (".checkpoint.pt.123.tmp", "checkpoint.prev.tmp", "checkpoint.pt", "notes.txt"):
        (c.directory / name).touch()
    with c.lock():
        assert sorted(p.name for p in c.directory.iterdir()) == ["checkpoint.pt", "lock", "notes.txt"]
