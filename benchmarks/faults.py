"""Does any work get lost? Runs are killed, starved and damaged in many ways, and must end as if nothing had been.

    python -m benchmarks.faults kill task=coco_tiny n=20   # SIGKILL twice, resumed with any number of workers
    python -m benchmarks.faults stop n=8                   # SIGTERM, SIGINT, SIGUSR1, SIGUSR2: nothing is repeated
    python -m benchmarks.faults checkpoint n=50            # SIGKILL at random instants of a checkpoint's write
    python -m benchmarks.faults sweep n=16                 # a sweep of n cells, killed until nothing is left to do
    python -m benchmarks.faults files n=1000               # damaged files in a run's directory
    python -m benchmarks.faults all

`seed=` is that of the instants, `task=` one or several tasks; other words go to run.py (optimizer=schedule_free).
Every run is run.py's own code in a process of its own; torch is imported once, ahead of the forks. Exits 1 where
anything differs from the run that nothing happened to.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("imagenet_tiny", "kinetics_tiny", "coco_tiny", "cityscapes_tiny")
SMALL = ("budget.amount=12it", "checkpoint.every=3it", "task.eval_every=5it")
SAME = ("weights_sha256", "metrics", "reported", "iterations_done", "samples_seen")
PATIENCE = 300  # seconds, after which a run counts as hanging
_fork = multiprocessing.get_context("fork")


class Differs(Exception):
    """Something was lost, doubled or changed; the message says what."""


@dataclass
class Options:
    """What the command line asks for. `words` go to run.py."""

    n: int = 0
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    words: tuple[str, ...] = ()
    out: Path = field(default_factory=Path)


# -- runs -----------------------------------------------------------------------------------------------------


def start(words: Sequence[str], log: Path, prepare: Callable[[], None] = lambda: None) -> Any:
    """run.py with these words in a process (and process group) of its own; what it says is appended to `log`."""
    from tasks import cli

    cli.check_arguments(words)  # the child finds its configuration composed

    def command() -> None:
        sys.argv = [str(ROOT / "run.py"), *words]
        prepare()
        runpy.run_path(sys.argv[0], run_name="__main__")

    return fork(command, log)


def fork(work: Callable[[], None], log: Path) -> Any:
    """A process, with a group of its own, that does `work` and says to `log` what it has to say."""

    def child() -> None:
        gc.freeze()  # what the parent has left to collect (loaders, say) is not the child's to end
        os.setpgid(0, 0)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.enable()  # a SIGABRT has every thread say where it is
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        work()

    process = _fork.Process(target=child)
    process.start()
    return process


def finish(process: Any, expect: tuple[int, ...] = (0,), log: Path | None = None) -> int:
    """Wait for the end; the exit code. Raises Differs when it is not one of those expected."""
    process.join(PATIENCE)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGABRT)
        process.join(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise Differs(f"hangs after {PATIENCE} s: {log.read_text()[-8000:] if log else ''}")
    if process.exitcode not in expect:
        raise Differs(f"exit {process.exitcode}, not {expect}: {log.read_text()[-800:] if log else ''}")
    return process.exitcode


def to_the_end(words: Sequence[str], log: Path) -> None:
    finish(start(words, log), log=log)


def kill(process: Any, number: int = signal.SIGKILL, group: bool = False) -> None:
    """Send a signal to the process, or to all of its group as SLURM does; wait for the end of a SIGKILL."""
    try:
        (os.killpg if group else os.kill)(process.pid, number)
    except ProcessLookupError:
        return
    if number == signal.SIGKILL:
        process.join()


def members(group: int) -> list[int]:
    """The processes of a group that are alive: data workers may outlive their trainer for a while."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def json_of(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def lines(path: Path) -> list[dict[str, Any]]:
    """The log, times aside."""
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in path.read_text().splitlines()]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def directory(out: Path) -> Path:
    """The one run's directory under `out`."""
    found = {path.parent for path in out.glob("*/*/*/*/config.yaml")}
    if len(found) != 1:
        raise Differs(f"{len(found)} run directories in {out}: was the code or the configuration changed meanwhile?")
    return found.pop()


def wait_for(process: Any, ready: Callable[[], bool]) -> bool:
    """Wait until something is so; False when the process ended first."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive():
        if ready():
            return True
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise Differs(f"nothing happened for {PATIENCE} s")
        time.sleep(0.002)
    return False


def at_line(process: Any, out: Path, number: int) -> bool:
    """Wait until this very process has taken over its run and the log has `number` lines."""

    def ready() -> bool:
        found = next(iter(out.glob("*/*/*/*/state.json")), None)
        mine = found is not None and json_of(found).get("pid") == process.pid
        return mine and count(found.parent / "metrics.jsonl") >= number  # type: ignore[union-attr]

    return wait_for(process, ready)


@dataclass
class Whole:
    """A run that nothing happened to: its result, its log, and how long a line of it takes."""

    result: dict[str, Any]
    lines: list[dict[str, Any]]
    pace: float

    def agrees(self, found: Path) -> None:
        """Raise Differs unless the run in `found` ended the same."""
        result = json_of(found / "result.json")
        for key in SAME:
            if result.get(key) != self.result[key]:
                raise Differs(f"{key} is {result.get(key)}, not {self.result[key]}")
        if lines(found / "metrics.jsonl") != self.lines:
            raise Differs(f"{found}/metrics.jsonl has other lines")
        left = [p.name for p in found.iterdir() if p.name.endswith(".tmp")]
        if left or json_of(found / "state.json")["state"] != "done":
            raise Differs(f"left behind: {left or 'another state than done'}")


def whole(words: Sequence[str], out: Path) -> Whole:
    log, begun = out.with_suffix(".log"), []
    process = start((*words, "data.workers=0", f"out={out}"), log)
    if at_line(process, out, 1):
        begun.append(time.monotonic())
    finish(process, log=log)
    found = directory(out)
    took = time.monotonic() - begun[0] if begun else 0.1
    return Whole(json_of(found / "result.json"), lines(found / "metrics.jsonl"), took / count(found / "metrics.jsonl"))


def workers(rng: random.Random) -> str:
    return f"data.workers={rng.choice((0, 1, 2))}"


def words_of(task: str, options: Options) -> tuple[str, ...]:
    return (f"task={task}", *SMALL, *options.words)


# -- the experiments ------------------------------------------------------------------------------------------


def killed(options: Options) -> Iterator[str]:
    """SIGKILL at two random instants of each of n runs, each time resumed with a random number of workers."""
    for task in options.tasks:
        words, rng = words_of(task, options), random.Random(f"{task} {options.seed}")
        one = whole(words, options.out / f"{task}-whole")
        hit: Counter[int] = Counter()
        lingering, groups = 0.0, []
        for trial in range(options.n or 20):
            out = options.out / f"{task}-{trial}"
            for number in sorted(rng.randrange(len(one.lines)) for _ in range(2)):
                process = start((*words, workers(rng), f"out={out}"), out.with_suffix(".log"))
                if at_line(process, out, number):
                    time.sleep(rng.uniform(0, one.pace))
                    kill(process)
                    hit[count(directory(out) / "metrics.jsonl")] += 1
                    groups.append(process.pid)
                    if trial < 3:  # later ones are resumed at once, beside the data workers of the dead
                        lingering = max(lingering, last_one_gone(process.pid))
            to_the_end((*words, workers(rng), f"out={out}"), out.with_suffix(".log"))
            one.agrees(directory(out))
            shutil.rmtree(out)
        for group in groups:
            last_one_gone(group)
        yield (
            f"{task}: {trial + 1} runs, {hit.total()} kills after {len(hit)} different lines of {len(one.lines)}, "
            f"none differs; data workers outlived them by at most {lingering:.1f} s"
        )


def last_one_gone(group: int, limit: float = 30) -> float:
    """Seconds until no process of a group is left. Raises Differs when some stay."""
    begun = time.monotonic()
    while left := members(group):
        if time.monotonic() - begun > limit:
            raise Differs(f"data workers {left} outlive their trainer by {limit} s")
        time.sleep(0.05)
    return time.monotonic() - begun


def stopped(options: Options) -> Iterator[str]:
    """Each signal, to the trainer or to its whole group: saved at the step boundary, and no saved step repeated."""
    for task in options.tasks:
        words, rng = words_of(task, options), random.Random(f"stop {task} {options.seed}")
        one = whole(words, options.out / f"{task}-whole")
        slowest, orphans = 0.0, 0.0
        for trial in range(options.n or 8):
            number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)[trial % 4]
            out = options.out / f"{task}-{trial}"
            log = out.with_suffix(".log")
            process = start((*words, f"data.workers={(2, 0, 1)[trial % 3]}", f"out={out}"), log)
            if not at_line(process, out, rng.randrange(1, len(one.lines) - 2)):
                raise Differs(f"ended by itself: {log.read_text()[-300:]}")
            time.sleep(rng.uniform(0, one.pace))
            sent = time.monotonic()
            kill(process, number, group=trial % 2 == 0)
            finish(process, (128 + number, 0), log)
            slowest = max(slowest, time.monotonic() - sent)
            orphans = max(orphans, last_one_gone(process.pid))
            found = directory(out)
            state, kept = json_of(found / "state.json"), (found / "metrics.jsonl").read_bytes()
            if process.exitcode:
                steps = sum("lr" in row for row in lines(found / "metrics.jsonl"))
                if (state["state"], state["step"]) != ("partial", steps):
                    raise Differs(f"state {state['state']} at {state['step']} with {steps} steps logged")
            to_the_end((*words, "data.workers=0", f"out={out}"), log)
            if not (found / "metrics.jsonl").read_bytes().startswith(kept):
                raise Differs("a step that was saved was made again")
            one.agrees(found)
            shutil.rmtree(out)
        yield (
            f"{task}: {trial + 1} signals, none differs; the run had left after at most {slowest:.1f} s "
            f"(a line takes {one.pace:.2f} s), its data workers {orphans:.1f} s later"
        )


PHASES = {
    "w": "writing",
    "s": "written",
    "y": "on the disk",
    "l": "linked",
    "p": "the one before kept",
    "r": "renamed",
}


def slow_saves(pipe: int) -> None:
    """Stretch every stage of a checkpoint's write, and tell the pipe which stage it is in."""
    import io

    import torch

    from budgeted import checkpoint

    dump, save, fsync, link, replace = torch.save, checkpoint.save, os.fsync, os.link, os.replace
    within: list[Path] = []

    def tell(phase: str) -> None:
        if within:
            os.write(pipe, phase.encode())
            time.sleep(0.004)

    def slow_dump(content: Any, handle: Any) -> None:
        buffer = io.BytesIO()
        dump(content, buffer)
        data = buffer.getvalue()
        for k in range(8):
            tell("w")
            handle.write(data[k * len(data) // 8 : (k + 1) * len(data) // 8])
            handle.flush()

    def slow_save(path: Path, content: dict[str, Any]) -> None:
        within.append(path)
        save(path, content)
        within.clear()
        os.write(pipe, b".")

    def told(phase_before: str, call: Callable, phase_after: str) -> Callable:
        def run(*args: Any) -> None:
            tell(phase_before)
            call(*args)
            tell(phase_after)

        return run

    torch.save, checkpoint.save = slow_dump, slow_save  # type: ignore[assignment]
    os.fsync, os.link = told("s", fsync, "y"), told("y", link, "l")

    def slow_replace(old: Any, new: Any) -> None:
        told("l", replace, "p" if ".prev" in str(new) else "r")(old, new)

    os.replace = slow_replace  # type: ignore[assignment]


def killed_while_saving(options: Options) -> Iterator[str]:
    """One run that saves after every step is killed at n random instants of that; each time, one loads."""
    from budgeted import checkpoint

    task = options.tasks[0]
    words, rng = (*words_of(task, options), "checkpoint.every=1it", "budget.amount=40it"), random.Random(options.seed)
    one = whole(words, options.out / "whole")
    left, phases, runs, out, reached = options.n or 50, Counter(), 0, options.out / "0", -1  # type: ignore[var-annotated]
    while left:
        reader, writer = os.pipe()
        process = start(
            (*words, workers(rng), f"out={out}"),
            out.with_suffix(".log"),
            partial(slow_saves, writer),
        )
        os.close(writer)
        phase, stages = b"", rng.randrange(1, 60)
        while stages and (read := os.read(reader, 1)):
            phase, stages = read, stages - 1
        if stages == 0:
            time.sleep(rng.uniform(0, 0.004))
            kill(process)
            for read in iter(lambda: os.read(reader, 1), b""):  # noqa: B023
                phase = read
        process.join()
        os.close(reader)
        found = checkpoint.load(directory(out) / "checkpoint.pt")
        if process.exitcode == -signal.SIGKILL and phase not in (b"", b"."):
            phases[PHASES[phase.decode()]] += 1
            left -= 1
        step = found["step"] if found else 0
        if step < reached or (phase == b"" and step):
            raise Differs(f"killed when {phase!r}: the checkpoint is of step {step}, one of {reached} was there")
        reached = step
        if process.exitcode == 0 or left == 0:
            to_the_end((*words, f"out={out}"), out.with_suffix(".log"))
            one.agrees(directory(out))
            runs, out, reached = runs + 1, options.out / str(runs + 1), -1
    stages_hit = ", ".join(f"{n} {phase}" for phase, n in phases.most_common())
    yield (
        f"{task}: {phases.total()} kills ({stages_hit}) in {runs} runs: "
        "one loads each time, none is older than one before, none differs"
    )


def swept(options: Options) -> Iterator[str]:
    """A sweep of n cells in one or two processes at a time, killed at random and started again until it exits 0."""
    rng, log = random.Random(options.seed), options.out / "sweep.log"
    seeds = max(1, (options.n or 16) // (2 * len(options.tasks)))
    tasks = f"task={','.join(options.tasks)}"
    words = ("-m", tasks, "schedule=step,linear", *SMALL, f"seed={','.join(map(str, range(seeds)))}", *options.words)
    to_the_end((*words, f"out={options.out / 'whole'}"), log)
    reference = {p.parent.relative_to(options.out / "whole"): p.parent for p in _results(options.out / "whole")}
    out, kills, starts = options.out / "killed", 0, 0
    running: list[Any] = []
    while True:
        while len(running) < rng.choice((1, 2)):
            running.append(start((*words, workers(rng), f"out={out}"), log))
            starts += 1
        time.sleep(rng.uniform(0.5, 10))
        victim = running.pop(rng.randrange(len(running)))
        if victim.is_alive():
            kill(victim, rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
            kills += 1
            victim.join(PATIENCE)
        elif victim.exitcode == 0 and len(list(_results(out))) == len(reference):
            break
        if starts > 40 * len(reference):
            raise Differs(f"after {starts} starts {len(list(_results(out)))} of {len(reference)} cells are done")
    for other in running:
        finish(other, (0, 1), log)
    for name, one in reference.items():
        Whole(json_of(one / "result.json"), lines(one / "metrics.jsonl"), 0).agrees(out / name)
    extra = {p.parent.relative_to(out) for p in out.glob("*/*/*/*/state.json")} - set(reference)
    resumed = sum(json_of(path)["resumed"] for path in _results(out))
    if extra:
        raise Differs(f"cells that nobody asked for: {extra}")
    yield (
        f"{len(reference)} cells, {kills} kills, {starts} starts of the same command, {resumed} resumed: "
        f"{len(reference)} done, each to its T once, none differs"
    )


def _results(out: Path) -> Iterator[Path]:
    return out.glob("*/*/*/*/result.json")


# -- damaged files --------------------------------------------------------------------------------------------

WORDS = (b"", b"null", b"[]", b"{}", b"1e999", b"[" * 5000, b'{"step": -1}\n', b'{"state": "done"}', b"\x80\x04.")


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, doubled, another digit, or something else altogether."""
    kind, at = rng.choice(("cut", "flip", "flip", "fill", "double", "digit", "other")), rng.randrange(len(raw))
    changed = bytearray(raw)
    if kind == "cut":
        return raw[:at]
    if kind == "double":
        return raw[:at] + raw
    if kind == "other":
        return rng.choice(WORDS)
    if kind == "fill":
        changed[at : at + rng.randrange(1, 300)] = rng.randbytes(rng.randrange(300))
    elif kind == "digit":
        digits = [k for k, byte in enumerate(raw[:20000]) if chr(byte).isdigit()] or [0]
        changed[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:
        for _ in range(rng.choice((1, 1, 2, 50))):
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


FILES = ("checkpoint.pt", "checkpoint.prev.pt", "metrics.jsonl", "state.json", "config.yaml", *2 * ("result.json",))


def hostile(options: Options) -> Iterator[str]:
    """n directories of a run, half of them done, with one to three files damaged: state, status, report, resume.

    Each ends in a clear error, or as the run that nothing happened to; no damaged result counts as done.
    """
    from tasks import cli

    task, rng, log = options.tasks[0], random.Random(options.seed), options.out / "files.log"
    words = (f"task={task}", "budget.amount=5it", "checkpoint.every=1it", "task.eval_every=100%", *options.words)
    one = whole(words, options.out / "whole")
    done = directory(options.out / "whole")
    out = options.out / "partial"
    process = start((*words, f"out={out}"), out.with_suffix(".log"))
    at_line(process, out, 3)
    kill(process)
    part, here, endings = directory(out), options.out / "here", Counter()  # type: ignore[var-annotated]
    recipe = cli.recipe((*words, f"out={here}"))
    for trial in range(options.n or 1000):
        source, target = (done, part)[trial % 2], recipe.cell.directory
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("upstream"))
        there = [name for name in FILES if (source / name).exists()]
        for name in set(rng.sample(there, rng.choice((1, 1, 2, 3)))):
            (target / name).write_bytes(damaged((source / name).read_bytes(), rng))
        log.write_bytes(b"")
        finish(fork(lambda: _look_and_train(recipe), log), log=log)
        said = log.read_text().strip()
        if said.startswith("failed: "):
            endings[_clear(said, target)] += 1
        elif json_of(target / "result.json") == json_of(done / "result.json"):
            endings["a result that was whole"] += 1
        else:
            _agrees_but_for_the_log(one, target)
            endings["resumed, none differs"] += 1
        shutil.rmtree(here)
    yield f"{task}: {trial + 1} damaged directories: " + "; ".join(f"{n} {what}" for what, n in endings.most_common())


def _look_and_train(recipe: Any) -> None:
    from tasks import base

    log = logging.getLogger("budgeted")
    log.setLevel(logging.DEBUG)
    log.addHandler(logging.NullHandler())
    _look(recipe.cell.out)
    try:
        base.train(recipe)
    except Exception as error:
        print(f"failed: {base.one_line(error)}")


def _clear(said: str, target: Path) -> str:
    """What an error says, in short. Raises Differs unless it is one line, recorded, with its traceback in run.log."""
    state = json_of(target / "state.json")
    if "\n" in said or state.get("state") != "failed" or state.get("error") != said.removeprefix("failed: "):
        raise Differs(f"no clear error: {said[:500]}; {state}")
    if "Traceback" not in (target / "run.log").read_text() or str(target) not in said:
        raise Differs(f"says too little: {said[:500]}")
    return "refused: " + said.removeprefix("failed: ").replace(str(target), "").partition("(")[0].strip(" :/")


def _look(out: Path) -> None:
    """What looks at runs must not fail over one that is damaged, nor count it."""
    from benchmarks import report, results, status

    for entry in results.scan(out):
        if entry.state == "done" and (entry.result or {})["iterations_done"] != 5:
            raise Differs(f"a damaged result counts: {entry}")
    status.render(status.rows(out))
    report.survey(out)


def _agrees_but_for_the_log(one: Whole, found: Path) -> None:
    result = json_of(found / "result.json")
    if any(result.get(key) != one.result[key] for key in SAME):
        raise Differs(f"a wrong result counts as done: {result}")
    told = "is not what this run wrote" in (found / "run.log").read_text()
    if lines(found / "metrics.jsonl") != one.lines and not told:
        raise Differs("the log has lost lines, and nothing says so")


# -- the command ----------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[[Options], Iterator[str]]] = {
    "kill": killed,
    "stop": stopped,
    "checkpoint": killed_while_saving,
    "sweep": swept,
    "files": hostile,
}


@contextmanager
def engine() -> Iterator[None]:
    """Import all that runs need, with one thread, once for all forks; and write the embedded data."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["BUDGETED_BAR"] = "0"
    import torch

    from tasks import base, cli

    torch.set_num_threads(1)
    os.chdir(ROOT)
    logging.getLogger("budgeted").setLevel(logging.ERROR)
    for target in base.ADAPTERS.values():
        __import__(target.partition(":")[0])
    for task in TASKS:
        cli.embedded_data(cli.configuration((f"task={task}",)))
    yield


def main(arguments: Sequence[str]) -> int:
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    names = [word for word in arguments if "=" not in word] or ["all"]
    if wrong := set(names) - {*EXPERIMENTS, "all"}:
        print(f"{sorted(wrong)}: no such experiment; known: all, {', '.join(EXPERIMENTS)}", file=sys.stderr)
        return 2
    tasks = tuple(given.pop("task", ",".join(TASKS)).split(","))
    n, seed = int(given.pop("n", 0)), int(given.pop("seed", 0))
    words = tuple(f"{k}={v}" for k, v in given.items())
    code = 0
    with engine():
        for name in EXPERIMENTS if "all" in names else names:
            out = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
            begun = time.monotonic()
            try:
                for line in EXPERIMENTS[name](Options(n, seed, tasks, words, out)):
                    print(f"{name:11} {line} ({time.monotonic() - begun:.0f} s)", flush=True)
                    begun = time.monotonic()
                shutil.rmtree(out)
            except Differs as error:
                print(f"{name:11} DIFFERS, seed={seed}, see {out}: {error}", flush=True)
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
