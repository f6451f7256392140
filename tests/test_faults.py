"""Nothing is lost, nothing counts that should not, and nothing is run that came as data."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import faults
from benchmarks.faults import Options, directory, json_of, lines
from budgeted import checkpoint
from budgeted.budgets import Epoch
from budgeted.cells import Cell
from budgeted.data import Batches, Loader, loader
from budgeted.errors import UserError
from budgeted.session import NonFinite, Session
from budgeted.signals import Interrupted

ROOT = Path(__file__).resolve().parent.parent
SAME = faults.SAME


@pytest.fixture(scope="module")
def engine():
    with faults.engine():
        yield


@pytest.fixture(scope="module")
def options(engine, tmp_path_factory):
    def make(n, *tasks, words=()):
        return Options(n, 1, tasks or faults.TASKS, words, tmp_path_factory.mktemp("faults"))

    return make


# -- the script, at a few points ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", faults.TASKS)
def test_killed_twice_and_resumed_with_other_workers_is_the_same_run(options, task):
    (line,) = faults.killed(options(2, task))
    assert "none differs" in line


@pytest.mark.slow
def test_schedule_free_is_the_same_run_too(options):
    (line,) = faults.killed(options(1, "imagenet_tiny", words=("optimizer=schedule_free",)))
    assert "none differs" in line


@pytest.mark.slow
def test_each_signal_to_the_run_or_its_group_saves_and_repeats_nothing(options):
    (line,) = faults.stopped(options(4, "imagenet_tiny"))
    assert "4 signals, none differs" in line


@pytest.mark.slow
@pytest.mark.parametrize("task", ["coco_tiny", "cityscapes_tiny", "kinetics_tiny"])
def test_a_signal_to_the_group_within_an_evaluation_loses_nothing(options, task):
    """With an evaluation at each step most of the time is spent in it, and its workers hear the signal as well."""
    (line,) = faults.stopped(options(1, task, words=("task.eval_every=1it",)))
    assert "none differs" in line


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_loads(options):
    (line,) = faults.killed_while_saving(options(8, "imagenet_tiny"))
    assert "8 kills" in line


@pytest.mark.slow
def test_a_sweep_whose_processes_are_killed_is_finished_by_the_same_command(options):
    (line,) = faults.swept(options(4, "imagenet_tiny", "kinetics_tiny"))
    assert "4 done, each to its T once, none differs" in line


@pytest.mark.slow
def test_damaged_directories_are_refused_or_end_as_if_nothing_had_been(options):
    (line,) = faults.hostile(options(40, "imagenet_tiny"))
    assert "40 damaged directories" in line


# -- a full disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave):
    """Leave `leave` bytes of room in the file system of a folder."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - leave))


def filling(folder, where, nth, leave):
    """Fill the disk ahead of call `nth` of `where`: (class or module, name)."""

    def prepare():
        owner, name = where
        original, calls = getattr(owner, name), []

        def run(*args, **kwargs):
            calls.append(0)
            if len(calls) == nth:
                fill(folder, leave)
            return original(*args, **kwargs)

        setattr(owner, name, run)

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(
    "where,nth,leave",
    [
        ((checkpoint, "save"), 1, 100_000),
        ((checkpoint, "save"), 3, 300_000),
        ((checkpoint, "save"), 3, 0),
        ((Session, "after_step"), 5, 0),
        ((Session, "evaluate"), 1, 0),
        ((Cell, "write_state"), 2, 0),
        ((Cell, "write_result"), 1, 0),
    ],
    ids=["first checkpoint", "third checkpoint", "nothing left", "a line", "evaluation", "state", "result"],
)
def test_a_full_disk_fails_cleanly_and_the_run_goes_on_once_there_is_room(engine, small, tmp_path, where, nth, leave):
    words = ("budget.amount=60it", "checkpoint.every=4it", "task.eval_every=30it")
    one = faults.whole(words, tmp_path / "whole")
    log = tmp_path / "log"
    process = faults.start((*words, f"out={small / 'runs'}"), log, filling(small, where, nth, leave))
    assert faults.finish(process, (1,), log) == 1
    said = log.read_text()
    assert said.count("No space left on device") == said.count(" failed: OSError: [Errno 28]") == 1
    assert "Traceback" not in said and "Logging error" not in said and "Exception ignored" not in said
    found = directory(small / "runs")
    state = json_of(found / "state.json")
    assert state["state"] == "failed" and "No space left" in state["error"]
    assert not list(found.glob("*.tmp")) and not list(found.glob(".*.tmp"))
    assert (found / "metrics.jsonl").read_bytes()[-1:] in (b"", b"\n")  # no torn line
    log.write_text("")
    if leave == 0:  # still no room: the same again, and no harm done
        faults.finish(faults.start((*words, f"out={small / 'runs'}"), log), (1,), log)
    saved = checkpoint.load(found / "checkpoint.pt")
    assert (saved["step"] if saved else 0) >= 4 * (nth - 1 if where[1] == "save" else 0)
    (small / "ballast").unlink()
    faults.to_the_end((*words, f"out={small / 'runs'}"), log)
    one.agrees(found)


# -- each failure is a state ----------------------------------------------------------------------------------

SHORT = ("budget.amount=8it", "checkpoint.every=2it", "task.eval_every=100%")


def failed(words, out, prepare=lambda: None, code=1):
    """Run what must fail: the line it says and the run's directory."""
    log = out.with_suffix(".log")
    process = faults.start((*words, f"out={out}"), log, prepare)
    faults.finish(process, (code,), log)
    said = [line for line in log.read_text().splitlines() if " failed: " in line]
    found = directory(out)
    state = json_of(found / "state.json")
    assert len(said) == 1 and "Traceback" not in log.read_text(), log.read_text()
    assert state["state"] == "failed" and said[0].endswith(f" failed: {state['error']}")
    assert "Traceback" in (found / "run.log").read_text()
    return said[0], found


@pytest.mark.slow
def test_a_run_that_fails_while_a_checkpoint_is_written_has_failed(engine, tmp_path):
    """The write ends after the failure: what stands in the end is the failure, and the checkpoint is whole."""

    def prepare():
        save, before_step = checkpoint.save, Session.before_step

        def slow(path, content):
            time.sleep(1)
            save(path, content)

        def fail(self):
            if self.step == 5:
                raise RuntimeError("in step 5")
            before_step(self)

        checkpoint.save, Session.before_step = slow, fail

    said, found = failed((*SHORT, "checkpoint.every=4it"), tmp_path / "runs", prepare)
    assert said.endswith("RuntimeError: in step 5") and checkpoint.load(found / "checkpoint.pt")["step"] == 4


def status(out):
    """The terminal's table of runs."""
    import io

    from rich.console import Console

    from benchmarks.status import render, rows

    console = Console(width=220, file=io.StringIO())
    console.print(render(rows(out)))
    return console.file.getvalue()


def failing_at(step, act):
    """Do something ahead of an update."""

    def prepare():
        original = Session.before_step

        def before(self):
            original(self)
            if self.step == step:
                act(self)

        Session.before_step = before

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("task", faults.TASKS)
def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(engine, tmp_path, task):
    line, found = failed((f"task={task}", *SHORT, "task.lr=1e9", "checkpoint.every=1it"), tmp_path / "runs")
    assert "NonFinite: the loss of step " in line and " at learning rate " in line and "e+0" in line
    step = int(line.split("the loss of step ")[1].split()[0])
    saved = checkpoint.load(found / "checkpoint.pt")
    if step:
        assert f"last good checkpoint is of step {saved['step'] - 1}" in line and saved["step"] <= step
    else:
        assert "there is no checkpoint yet" in line and saved is None
    assert "failed" in status(tmp_path / "runs") and "NonFinite: the loss of step" in status(tmp_path / "runs")


@pytest.mark.slow
def test_skipping_keeps_the_run_and_its_batch_norm_statistics(engine, tmp_path):
    """An image of infinities makes gradients that are left out; statistics of batches with it must be too."""

    def poisoned():
        from tasks import classification

        original = classification.Folder.__getitem__

        def read(self, index):
            x, y = original(self, index)
            return (x * float("inf") if index % 150 == 0 and len(self) == 2000 else x), y

        classification.Folder.__getitem__ = read

    words = (*SHORT, "on_nonfinite=skip", f"out={tmp_path / 'runs'}")
    faults.finish(faults.start(words, tmp_path / "log", poisoned), log=tmp_path / "log")
    found = directory(tmp_path / "runs")
    result, saved = json_of(found / "result.json"), checkpoint.load(found / "checkpoint.pt")
    assert 0 < result["skipped_updates"] < 8 and result["iterations_done"] == 8
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())
    assert (tmp_path / "log").read_text().count("its gradient is not finite") == result["skipped_updates"]


@pytest.mark.slow
def test_out_of_memory_is_one_line_with_what_to_do(engine, tmp_path):
    def starve(session):
        size = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 2**20, resource.RLIM_INFINITY))
        session.hog = torch.ones(2**28)

    line, found = failed(SHORT, tmp_path / "runs", failing_at(5, starve))
    assert " failed: out of memory: " in line and "try micro_batch= or precision=bf16" in line
    assert checkpoint.load(found / "checkpoint.pt")["step"] == 4
    assert "out of memory" in status(tmp_path / "runs")
    faults.to_the_end((*SHORT, f"out={tmp_path / 'runs'}"), tmp_path / "log")
    assert json_of(found / "result.json")["resumed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", faults.TASKS)
def test_a_killed_data_worker_fails_the_run_which_then_goes_on(engine, tmp_path, task):
    words = (f"task={task}", *SHORT)
    one = faults.whole(words, tmp_path / "whole")

    def shoot(session):
        workers = [pid for pid in faults.members(os.getpgid(0)) if pid != os.getpid()]
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(60)  # torch's handler of SIGCHLD ends this

    line, found = failed((*words, "data.workers=2"), tmp_path / "runs", failing_at(5, shoot))
    assert "DataLoader worker (pid" in line and "Killed" in line
    assert checkpoint.load(found / "checkpoint.pt")["step"] == 4
    faults.to_the_end((*words, "data.workers=1", f"out={tmp_path / 'runs'}"), tmp_path / "log")
    one.agrees(found)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["absent", "broken"])
@pytest.mark.parametrize("task,package", [("coco_tiny", "detectron2"), ("cityscapes_tiny", "mmseg")])
def test_a_missing_upstream_is_one_line_and_the_others_run(tmp_path, task, package, form):
    """A stand-in ahead of the real package: one that is not found, or one that does not import."""
    stub = tmp_path / "stub"
    (stub / package).mkdir(parents=True)
    if form == "absent":
        lines_ = [
            "from importlib.machinery import PathFinder",
            "found = PathFinder.find_spec",
            f"hide = lambda name, *args: None if name.split('.')[0] == {package!r} else found(name, *args)",
            "PathFinder.find_spec = staticmethod(hide)",
        ]
        (stub / "sitecustomize.py").write_text("\n".join(lines_))
    else:
        real = Path(importlib.util.find_spec(package).origin).parent
        for part in real.iterdir():
            if part.name != "__init__.py":
                (stub / package / part.name).symlink_to(part)
        (stub / package / "__init__.py").write_text("raise ImportError('libcudart.so.11: cannot open shared object')\n")
    env = {**os.environ, "PYTHONPATH": str(stub), "BUDGETED_BAR": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", str(ROOT / "run.py"), "-m", f"task={task},imagenet_tiny"]
    done = subprocess.run(
        [*words, "budget.amount=1it", f"out={tmp_path / 'runs'}"], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "1 of 2 cells done" in said and "Traceback" not in said, said
    line, again = [line for line in said.splitlines() if line.startswith(f"{task}/linear") and "failed: " in line]
    assert package in line and "pip install" in line, line
    assert line.partition("failed: ")[2] == again.partition("failed: ")[2]  # when it happened, and in the summary
    assert "failed" in status(tmp_path / "runs") and package in status(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task,files", [("coco_tiny", "train2017/*"), ("cityscapes_tiny", "leftImg8bit/train/*/*")])
def test_a_file_that_cannot_be_read_is_named(engine, tmp_path, task, files, workers):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(ROOT / "data" / task, data)
    for path in data.glob(files):
        path.write_bytes(path.read_bytes()[:80])
    line, found = failed((f"task={task}", *SHORT, f"data.root={data}", f"data.workers={workers}"), tmp_path / "runs")
    assert f"{data}/{files.split('*')[0]}" in line
    assert f"{data}/{files.split('*')[0]}"[:40] in status(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["of another size", "of an unknown id"])
def test_a_label_image_that_does_not_go_with_its_picture_is_named(engine, tmp_path, fault):
    """mmsegmentation would stretch the one and fail at the other without a name."""
    import shutil

    import numpy as np
    from PIL import Image

    data = tmp_path / "data"
    shutil.copytree(ROOT / "data" / "cityscapes_tiny", data)
    for path in data.glob("gtFine/train/*/*_labelTrainIds.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:] = 25 if "id" in fault else pixels
        Image.fromarray(pixels if "id" in fault else pixels[::2, ::2].copy()).save(path)
    line, _ = failed(("task=cityscapes_tiny", *SHORT, f"data.root={data}"), tmp_path / "runs")
    assert (
        f"{data}/gtFine/train/" in line and ("unknown ids [25]" if "id" in fault else "its picture (128, 64)") in line
    )


def test_a_metric_that_is_no_number_at_the_end_is_a_failure(toy):
    run = toy(scores=[0.5, float("nan")], task__rule="final")
    with pytest.raises(NonFinite, match="the final top1 is nan"):
        run.train()
    assert not (run.recipe.cell.directory / "result.json").exists()


def test_a_failed_cell_of_a_sweep_holds_nothing(toy):
    """Hydra keeps the errors of a sweep's cells: their frames must not keep models, or GPUs fill up."""
    from tasks import base

    before = set(multiprocessing.active_children())
    run = toy(data__workers=1)
    run.before = lambda session: 1 / 0
    try:
        run.train()
    except ZeroDivisionError as error:
        kept = error
    model = weakref.ref(run.session.model)
    assert set(multiprocessing.active_children()) <= before  # its data worker has ended
    del run
    gc.collect()
    assert model() is not None
    base.let_go(kept)
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(
    "error,said",
    [
        (MemoryError(), "out of memory: MemoryError; try micro_batch="),
        (
            RuntimeError("CUDA out of memory. Tried\nto allocate"),
            "out of memory: CUDA out of memory. Tried to allocate; try",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: DefaultCPUAllocator"),
        (OSError(12, "Cannot allocate memory"), "out of memory: [Errno 12]"),
        (OSError(28, "No space left on device", "/x/y"), "OSError: [Errno 28] No space left on device: '/x/y'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_failure_in_one_line(error, said):
    from tasks import base

    assert base.one_line(error).startswith(said) and "\n" not in base.one_line(error)


# -- evaluations ----------------------------------------------------------------------------------------------


def evaluating(run, act):
    """Do something within the first evaluation, and count them."""
    evaluate, made = run._evaluate, []

    def evaluation(model):
        made.append(1)
        if len(made) == 1:
            act()
        return evaluate(model)

    run._evaluate = evaluation
    return made


def agree(run, result, one, rows):
    assert {k: result[k] for k in SAME} == {k: one[k] for k in SAME}
    assert lines(run.recipe.cell.metrics) == rows


@pytest.fixture
def one(toy, tmp_path):
    run = toy(out=tmp_path / "whole")
    return run.train(), lines(run.recipe.cell.metrics)


def test_a_signal_ahead_of_an_evaluation_leaves_without_it(toy, one):
    """Evaluations may take longer than a cluster waits: the one that is due is made by whoever goes on."""
    run = toy()
    made = evaluating(run, lambda: None)
    run.before = lambda session: session.step == 9 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.train()
    assert made == [] and lines(run.recipe.cell.metrics)[-1]["step"] == 9
    again = toy()
    agree(again, again.train(), *one)


def test_a_signal_within_an_evaluation_keeps_it(toy, one):
    run = toy()
    evaluating(run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.train()
    assert lines(run.recipe.cell.metrics)[-1]["eval"] and run.session.step == 10
    again = toy()
    made = evaluating(again, lambda: None)
    agree(again, again.train(), *one)
    assert len(made) == 1  # the last


@pytest.mark.parametrize("torn", [False, True])
def test_a_death_within_an_evaluation_costs_no_training(toy, one, torn):
    run = toy()
    evaluating(run, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    if torn:  # the line was there already
        with open(run.recipe.cell.metrics, "a") as file:
            file.write('{"step": 9, "eval": {"top1": 5}}\n')
    again = toy()
    agree(again, again.train(), *one)
    assert len(again.rates) == 10  # steps 10 to 19: none was made twice


def test_a_death_within_the_last_evaluation_costs_no_training(toy, one):
    run = toy(task__eval_every="100%")
    evaluating(run, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    again = toy(task__eval_every="100%")
    result = again.train()
    assert again.rates == [] and result["weights_sha256"] == one[0]["weights_sha256"]
    assert lines(again.recipe.cell.metrics)[-1] == one[1][-1]


def test_what_the_first_step_compiled_is_not_carried_by_a_clock(toy):
    """A signal in a first step of a second must not cost a second of the budget of 1.2."""
    run = toy(amount="0.02min")

    def slow(session):
        time.sleep(1.0 if session.step == 0 else 0.01)
        if session.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    run.before = slow
    with pytest.raises(Interrupted):
        run.train()
    again = toy(amount="0.02min")
    again.before = lambda session: time.sleep(0.01)
    result = again.train()
    rows = [row for row in lines(again.recipe.cell.metrics) if "lr" in row]
    assert len(rows) > 40 and rows[1]["progress"] < 0.5 and 1.2 <= result["train_seconds"] < 2.4


# -- locks and links ------------------------------------------------------------------------------------------


def _ask(path, until):
    cell = Cell("toy", "linear", "5%", 0, "abc123", False, path)
    while time.monotonic() < until:
        cell.holder()


def test_asking_who_holds_a_cell_never_takes_it_from_one_who_wants_it(tmp_path):
    cell = Cell("toy", "linear", "5%", 0, "abc123", False, tmp_path)
    with cell.lock():
        pass
    context = multiprocessing.get_context("fork")
    asking = [context.Process(target=_ask, args=(tmp_path, time.monotonic() + 2)) for _ in range(2)]
    for process in asking:
        process.start()
    taken = 0
    while any(process.is_alive() for process in asking):
        with cell.lock():
            taken += 1
        time.sleep(0.001)
    assert taken > 20


def test_checkpoints_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for k in range(3):
        checkpoint.save(tmp_path / "c.pt", {"step": k})
    assert checkpoint.load(tmp_path / "c.pt")["step"] == 2
    assert checkpoint.load(checkpoint.previous(tmp_path / "c.pt"))["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2


# -- signals and what is left behind --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGKILL,)], ids=["SIGINT twice", "SIGKILL"]
)
def test_data_workers_end_with_their_run_even_while_they_hang(engine, tmp_path, numbers):
    def hang():
        from tasks import classification

        original = classification.Folder.__getitem__

        def read(self, index):
            if torch.utils.data.get_worker_info() and (tmp_path / "now").exists():
                time.sleep(1000)
            return original(self, index)

        classification.Folder.__getitem__ = read

    out, log = tmp_path / "runs", tmp_path / "log"
    words = ("budget.amount=500it", "checkpoint.every=5it", "data.workers=2", f"out={out}")
    process = faults.start(words, log, hang)
    assert faults.at_line(process, out, 8)
    (tmp_path / "now").touch()
    time.sleep(1)  # both hang by now
    assert len(faults.members(process.pid)) == 3
    for number in numbers:
        faults.kill(process, number)
        time.sleep(0.05)
    process.join(60)
    assert process.exitcode == (130 if numbers[0] == signal.SIGINT else -signal.SIGKILL)
    faults.last_one_gone(process.pid, limit=5)
    assert "Traceback" not in log.read_text(), log.read_text()
    if numbers[0] == signal.SIGINT:
        assert json_of(directory(out) / "state.json")["state"] == "partial"


def test_workers_start_with_signals_held():
    """Between its birth and its first line of Python a worker must not die of a signal to the group."""
    sent = []

    class Shooting(Loader):
        def __iter__(self):
            iterator = super().__iter__()
            for worker in iterator._workers:
                os.kill(worker.pid, signal.SIGTERM)
                sent.append(worker.pid)
            return iterator

    source = loader(range(40), 0, Batches(Epoch(40, 4), 0, 10), workers=2, collate_fn=list)
    source.__class__ = Shooting
    assert sum(len(batch) for batch in source) == 40 and len(sent) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BUDGETED_BAR": "1"}
    words = ("budget.amount=20it", "task.eval_every=2it", f"out={tmp_path}")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "run.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT
    )  # fmt: skip
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=200)
    (state,) = tmp_path.glob("*/*/*/*/state.json")
    assert json_of(state)["state"] == "done"


# -- what came as data is never run ---------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["evil.pth", "evil.pkl"])
@pytest.mark.parametrize("task", faults.TASKS)
def test_weights_are_not_executed(engine, tmp_path, task, form):
    content = {"model": Evil(tmp_path / "ran"), "__author__": Evil(tmp_path / "ran too")}
    if form.endswith("pkl"):
        (tmp_path / form).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / form)
    log = tmp_path / "log"
    words = (f"task={task}", *SHORT, f"task.weights={tmp_path / form}", f"out={tmp_path / 'runs'}")
    faults.finish(faults.start(words, log), (1, 2), log)
    assert f"task.weights={tmp_path / form}" in log.read_text().strip().splitlines()[-1]
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ran too").exists()


@pytest.mark.slow
def test_nothing_in_a_runs_directory_is_executed(engine, tmp_path):
    """A checkpoint, a config and a log that would make a folder, seen by status, report, replay and the run itself."""
    out, ran, log = tmp_path / "runs", tmp_path / "ran", tmp_path / "log"
    words = (*SHORT, f"out={out}")
    process = faults.start(words, log)
    assert faults.at_line(process, out, 6)
    faults.kill(process)
    found = directory(out)
    torch.save({"schema": checkpoint.SCHEMA, "digest": "", "text": Evil(ran)}, found / "checkpoint.pt")
    done = tmp_path / "done"  # replay takes none but a run that is done
    done.mkdir()
    (done / "result.json").write_text('{"status": "done"}')
    (done / "metrics.jsonl").write_text("".join((found / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]))
    evil = f'!!python/object/apply:os.mkdir ["{ran}"]'
    target = f'{{_target_: os.mkdir, path: "{ran}"}}'
    for config in (f"task: {evil}\n", f"task: {target}\noptimizer: {target}\n", f"task: ${{oc.decode:'{evil}'}}\n"):
        (found / "config.yaml").write_text(config)
        (done / "config.yaml").write_text(config)
        for mode in ("status", "report"):
            faults.to_the_end((f"mode={mode}", f"out={out}"), log)
        replay = ("schedule=replay", f"schedule.run={done}", "budget.amount=4it", f"out={tmp_path / 'other'}")
        with pytest.raises(UserError, match="config.yaml"):
            faults.start(replay, log)
    faults.to_the_end(words, log)  # by the checkpoint before
    assert "checkpoint.pt is broken" in log.read_text() and not ran.exists()


def test_nothing_of_ours_instantiates_from_a_configuration():
    """No unsafe loader, no instantiate, in any module that reads what others wrote."""
    for folder in ("budgeted", "tasks", "benchmarks", "hydra_plugins"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name == "faults.py":
                continue
            source = path.read_text()
            for word in ("instantiate(", "yaml.load(", "unsafe_load", "weights_only=False", "allow_pickle=True", "pickle.load", "eval(\"", "extractall"):  # fmt: skip
                allowed = word == "yaml.load(" and "SafeLoader" in source
                assert word not in source or allowed, f"{path}: {word}"


def test_a_full_disk_is_called_so_wherever_a_checkpoint_meets_it(tmp_path):
    """torch closes its archive over the error, and complains about positions in it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, 5000, 100_000, 400_000, 800_500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError) as error:
                checkpoint.save(tmp_path / "c.pt", {"step": 1, "a": torch.zeros(100_000), "b": torch.ones(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_json_of_the_state_is_overwritten_where_a_disk_is_full(tmp_path, monkeypatch):
    cell = Cell("toy", "linear", "5%", 0, "abc123", False, tmp_path)
    cell.directory.mkdir(parents=True)
    cell.write_state("running", 5, 10, more="x" * 50)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("budgeted.cells.write_json", full)
    cell.write_state("failed", 6, 10, "NonFinite: ...")
    state = json.loads((cell.directory / "state.json").read_text())
    assert (state["state"], state["step"], state["error"]) == ("failed", 6, "NonFinite: ...")
