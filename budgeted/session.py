"""One cell being trained: the only clock, learning-rate writer, log and checkpointer, whoever drives the steps.

    session.attach(model, optimizer, evaluate)     # goes on from the checkpoint, where there is one
    for batch in session.loader(dataset):
        session.before_step()                      # learning rate and randomness of this update
        loss = ...; loss.backward(); optimizer.step()
        session.after_step(loss)                   # log, evaluate, checkpoint, obey signals
        if session.finished: break
    session.finish()                               # result.json

The native loop, detectron2's hooks and mmengine's hooks make exactly these calls.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from budgeted import checkpoint, code, trackers
from budgeted.budgets import Budget
from budgeted.cells import RESULT_SCHEMA, now
from budgeted.clock import Clock
from budgeted.data import Batches, end_workers, loader
from budgeted.distributed import World
from budgeted.errors import UserError
from budgeted.journal import Journal
from budgeted.machine import device_name, forget_peak_memory, peak_memory, versions
from budgeted.randomness import EVALUATION, STEPS, preserved, seed_all
from budgeted.recipe import Recipe
from budgeted.scheduler import BudgetedLR
from budgeted.signals import Signals, first_of

log = logging.getLogger("budgeted")
ENDLESS = 2**40  # iterations of a clock budget, for loops that want a number


class NonFinite(RuntimeError):
    """The loss was not finite."""


class Session:
    """See the module's docstring for the calls. `total`: T, or a very large number under a clock budget."""

    def __init__(self, recipe: Recipe, total: int | None, world: World, device: torch.device) -> None:
        cfg = recipe.cfg
        _refuse_odd_shares(recipe, world)
        self.recipe, self.cfg, self.cell = recipe, cfg, recipe.cell
        self.world, self.rank, self.world_size, self.device = world, world.rank, world.size, device
        self.seed = cfg["seed"]
        self.directory: Path = self.cell.directory
        self.upstream_dir = self.directory / "upstream"
        self.horizon = total
        self.total = ENDLESS if total is None else total
        # GPU-hours are shared by the processes, of which each has one device.
        self.clock = Clock(Budget(self.cell.budget).seconds(world.size) if recipe.seconds else None, world)
        self.step = 0
        self.samples = self.evaluations = self.resumed = self.skipped = 0
        self.metrics: dict[str, dict[str, Any]] = {}
        self.started = now()
        self._code = code.files()
        here = {"code": code.digest(self._code), "world_size": world.size, "device": device_name(device)}
        self.parts = [{"step": 0, **here}]
        self._evaluated_at = -1
        self._owed = False  # an evaluation is due that has not been made
        self._done = False
        self._pending: list[tuple[int, torch.Tensor | float, float]] = []  # step, loss, learning rate
        self._grad_norm: float | None = None
        self._saved_step: int | None = None
        self._saving = checkpoint.Background()
        self._room: torch.Tensor | None = None  # what the last checkpoint was packed into
        self._ending = False  # the state is somebody else's to write
        self._final: tuple[str, dict[str, Any] | None] | None = None  # what was evaluated last: its digest, its tensors
        self._loss = self._applied_lr = math.nan
        forget_peak_memory(device)
        self._evals = recipe.period(cfg["task"]["eval_every"], total)
        self._saves = recipe.period(cfg["checkpoint"]["every"], total)
        self._signals = Signals()

    # -- set-up ---------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        evaluate: Callable[[], dict[str, float]],
        evaluation_weights: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        """Take over the learning rate of `optimizer` and go on from the checkpoint, if there is one.

        `model` is unwrapped (no DDP). `evaluate()` returns metrics as fractions, on every rank, and leaves the
        model in train mode. `evaluation_weights()` is a context inside which the model holds the weights to be
        evaluated, where those are not the ones trained (Schedule-Free, precise batch norm).
        """
        self.model, self.optimizer, self._evaluate_model = model, optimizer, evaluate
        statistics = (b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))
        self._judged = [*model.parameters(), *statistics]
        self._evaluation_weights = evaluation_weights
        progress = None if self.horizon else lambda: self.clock.progress
        self.scheduler = BudgetedLR(optimizer, self.recipe.schedule, self.horizon, progress)
        self._restore()
        optimizer.register_step_pre_hook(self._before_update)
        if self.cfg["on_nonfinite"] == "skip":
            self._buffers = [b for b in model.buffers() if b.is_floating_point()]
            self._kept = [b.clone() for b in self._buffers]
        self._signals.catch()
        self._bar = tqdm(
            total=self.horizon or 100,
            initial=self.step if self.horizon else int(100 * self.progress),
            desc=self.cell.name,
            unit="it" if self.horizon else "%",
            disable=not self.world.is_main or os.environ.get("BUDGETED_BAR") == "0",
            mininterval=0.5 if os.isatty(2) else 10,
            dynamic_ncols=True,
            leave=False,
            delay=0.1,  # nothing is shown yet: see _advance_bar
        )
        self._last_save = time.perf_counter()
        self.clock.start()
        self._write_state("running", **self._state())

    def loader(self, dataset: Any, collate_fn: Callable | None = None) -> Iterator[Any]:
        """Batches of `dataset` for this rank from this step to the end of the budget; waiting is measured."""
        if len(dataset) != self.recipe.epoch.samples:
            raise ValueError(f"the data set has {len(dataset)} samples, the recipe {self.recipe.epoch.samples}")
        return self._timed(self.loader_of(dataset, self.step, self.total, collate_fn))

    def loader_of(self, dataset: Any, start: int, stop: int, collate_fn: Callable | None = None) -> DataLoader:
        """The batches of iterations `start` to `stop`, outside the run's own stream."""
        return loader(
            dataset,
            self.seed,
            self._batches(start, stop),
            workers=self.cfg["data"]["workers"],
            collate_fn=collate_fn,
            pin_memory=self.device.type == "cuda",
        )

    def pieces(self) -> list[float]:
        """The batches of the coming update on this rank, each as the weight of its mean loss.

        Weighted so, the gradients' sum over batches, averaged over ranks, is that of the global batch's mean loss.
        """
        whole = len(self.recipe.epoch.positions(self.step))
        pieces = self._batches(self.step, self.step + 1).pieces(self.step)
        return [len(piece) * self.world_size / whole for piece in pieces]

    def _batches(self, start: int, stop: int) -> Batches:
        return Batches(self.recipe.epoch, start, stop, self.rank, self.world_size, self.cfg["micro_batch"])

    def _timed(self, source: Any) -> Iterator[Any]:
        iterator = iter(source)
        while True:
            try:
                with self.clock.measured("wait_seconds"):
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch

    # -- one step -------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Is the budget spent?"""
        return self.progress >= 1

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        return self.step / self.horizon if self.horizon else self.clock.progress

    def before_step(self) -> None:
        """Set the rates of the coming update and key all randomness by (seed, step, rank)."""
        if self._owed:  # by the checkpoint that the run goes on from
            self.evaluate()
        if self.cfg["on_nonfinite"] == "skip":
            _copy(self._buffers, self._kept)
        self._previous_progress = self.progress
        self.scheduler.set_step(self.step)
        seed_all(self.seed, STEPS, self.step, self.rank)

    def after_step(self, loss: torch.Tensor | float) -> None:
        """Account for the update just made. Raises NonFinite, or Interrupted once a signal's checkpoint is saved."""
        self._saving.check()
        self.clock.tick()
        step, self.step = self.step, self.step + 1
        positions = self.recipe.epoch.positions(step)
        self.samples += len(positions)
        self._pending.append((step, loss.detach() if isinstance(loss, torch.Tensor) else loss, self._applied_lr))
        logged = self.horizon is None or step % self.cfg["log_every"] == 0 or self.step == self.total
        if logged:
            self._log(step)
        before, after = self._previous_progress, min(1.0, self.progress)
        self._owed = self._evals(self.step, after) > self._evals(step, before) or self.finished
        self._advance_bar()
        # Saved before it is evaluated: a signal, or a kill, in a long evaluation costs no training.
        self._save_or_stop(self._saves(self.step, after) > self._saves(step, before) or self.finished)
        if self._owed:
            self.evaluate()
            if self._asked()[0]:
                self._save_or_stop(True)

    def _save_or_stop(self, due: bool) -> None:
        """Save where a checkpoint is due by progress or by the minutes, or a signal came; then leave after a signal."""
        stop, overdue = self._asked()
        if due or stop or overdue:
            self.save()
        if stop:
            self._saving.wait()
            self._write_state("partial", **self._state())
            raise self._signals.obey(stop)

    def evaluate(self) -> None:
        """Evaluate now, outside the training clock, and record the metrics at the last step made."""
        self._owed = False
        if self._evaluated_at == self.step:
            return
        with self.clock.paused():
            self._saving.wait()  # an evaluation starts data workers: nobody forks while another thread writes
            with self.clock.measured("eval_seconds"):
                self._evaluate_at(self.step - 1)
        self._evaluated_at = self.step
        self.evaluations += 1

    def _evaluate_at(self, step: int) -> None:
        self._check_losses()
        with self._evaluated_weights(step):
            values = self._evaluate_model()
            self._final = self._final_weights() if self.finished else None
        for name, value in values.items():
            value = float(value)
            entry = self.metrics.setdefault(name, {"final": value, "best": value, "best_step": step})
            entry["final"] = value
            if value > entry["best"] or math.isnan(entry["best"]):
                entry.update(best=value, best_step=step)
        self._write_line({"step": step, "eval": {k: float(v) for k, v in values.items()}})
        log.info("%s step %d: %s", self.cell.name, step, ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    @contextmanager
    def _evaluated_weights(self, step: int) -> Iterator[None]:
        """The model as it is evaluated after `step`, under randomness of its own."""
        weights = self._evaluation_weights() if self._evaluation_weights else nullcontext()
        with preserved(), weights:
            seed_all(self.seed, EVALUATION, step, self.rank)
            yield

    def _final_weights(self) -> tuple[str, dict[str, Any] | None]:
        """Their sha256, and a copy where they are not the ones trained."""
        digest = checkpoint.tensors_sha256(_tensors(self.model))
        if self._evaluation_weights is None or not self.world.is_main:
            return digest, None
        return digest, {k: v.clone() for k, v in self.model.state_dict().items()}

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs inside optimizer.step: what stands in the parameter groups here is what the update uses."""
        wanted = [base * self.scheduler.ratio for base in self.scheduler.base_lrs]
        found = [float(group["lr"]) for group in optimizer.param_groups]
        if any(not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-30) for a, b in zip(wanted, found, strict=True)):
            raise RuntimeError(f"something else wrote the learning rate at step {self.step}: {found}, not {wanted}")
        self._applied_lr = found[0]
        if self.cfg["grad_norm"] or self.cfg["on_nonfinite"] == "skip":
            self._look_at_gradients(optimizer)

    def _look_at_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        order = 1.0 if self.cfg["optimizer"]["name"] in ("adam", "adamw", "amsgrad") else 2.0
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters], order))
        self._grad_norm = norm
        if self.cfg["on_nonfinite"] == "skip" and not math.isfinite(norm):
            for p in parameters:
                p.grad = None  # optimizers leave out a parameter without a gradient
            _copy(self._kept, self._buffers)  # batch-norm statistics never recover from what is not finite
            self.skipped += 1
            log.warning("step %d left out: its gradient is not finite (learning rate %g)", self.step, self._applied_lr)

    # -- log ------------------------------------------------------------------------------------------------

    def _log(self, step: int) -> None:
        last = self._pending[-1][1]
        self._check_losses()
        value = float(self.world.mean(torch.as_tensor(last, dtype=torch.float32, device=self.device)))
        line = {"step": step, "progress": self.scheduler.progress, "lr": self._applied_lr, "loss": value}
        group = self.optimizer.param_groups[0]
        if self.recipe.schedule.momentum_at is not None:
            line["momentum"] = group["momentum"] if "momentum" in group else group["betas"][0]
        if self._grad_norm is not None:
            line["grad_norm"] = self._grad_norm
        line["seconds"] = round(self.clock.elapsed, 6)
        self._write_line(line)
        self._loss = value

    def _check_losses(self) -> None:
        """Raise NonFinite for the first pending loss that is not finite; one synchronisation for all of them."""
        pending, self._pending = self._pending, []
        if not pending or self.cfg["on_nonfinite"] == "skip":
            return
        for (step, _, rate), value in zip(pending, self._read([v for _, v, _ in pending]), strict=True):
            if not math.isfinite(value):
                self._refuse(f"the loss of step {step} is {value}", rate)

    def _read(self, losses: list[torch.Tensor | float]) -> list[float]:
        """Losses as numbers, their means over ranks, so that every rank finds what one has; one synchronisation."""
        if self.world.size == 1 and self.device.type == "cpu":
            return [float(v) for v in losses]
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in losses])
        return self.world.mean(values).tolist()

    def _check_weights(self) -> None:
        """Raise NonFinite where the update just made left weights or batch-norm statistics that are not finite.

        Its loss, of the weights before, may have been: they must not become the last good checkpoint.
        """
        with torch.no_grad():  # what is not finite leaves no sum finite; the largest magnitude takes ten times as long
            total = torch.stack([t.sum(dtype=torch.float32) for t in self._judged]).sum()
        if not math.isfinite(self.world.mean(total)):
            self._refuse(f"the update of step {self.step - 1} left weights that are not finite", self._applied_lr)

    def _refuse(self, what: str, rate: float) -> NoReturn:
        self._saving.join()
        saved = self._saved_step
        good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is of step {saved}"
        raise NonFinite(f"{what} at learning rate {rate:g}; {good}")

    def _write_line(self, line: dict[str, Any]) -> None:
        if self.world.is_main:
            self.journal.write(line)
            self.tracker.write(line)

    def _advance_bar(self) -> None:
        bar = self._bar
        try:
            bar.update((self.step if self.horizon else int(100 * self.progress)) - bar.n)
            bar.set_postfix(lr=f"{self._applied_lr:.3g}", loss=f"{self._loss:.3g}", refresh=False)
        except OSError:  # the terminal is gone; the run goes on
            bar.disable = True

    def _state(self) -> dict[str, Any]:
        spent = self.clock.elapsed
        rate = self.samples / spent if spent else None
        left = (1 / self.progress - 1) * spent if self.progress else None
        return {"step": self.step, "samples_per_second": rate, "eta_seconds": left, "progress": self.progress}

    def _write_state(self, state: str, step: int, **more: Any) -> None:
        if self.world.is_main:
            try:
                self.cell.write_state(state, step, self.horizon, None, **more)
            except OSError as full:  # for the eyes of mode=status alone
                log.warning("%s: state.json cannot be written (%s)", self.cell.name, full)

    # -- saving and going on --------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the step just made, from a copy, while training goes on: see `_saving`."""
        with self.clock.paused():
            self._check_losses()
            self._check_weights()
            if self.world.is_main:
                self._saving.wait()
                packed = checkpoint.pack(self._content(), self._room)
                self._saving.start(partial(self._write, packed, self._state()))
                self._room = packed.tensors
        self._last_save = time.perf_counter()

    def _write(self, content: checkpoint.Packed, state: dict[str, Any]) -> None:
        self.journal.sync()  # a checkpoint that knows of a line must not outlive it
        checkpoint.save(self.cell.checkpoint, content)
        self._saved_step = state["step"] - 1
        if not self._ending:
            self._write_state("running", **state)

    def _content(self) -> dict[str, Any]:
        return {
            "recipe": json.dumps(self.recipe.fields, sort_keys=True),
            "signature": self.cell.signature,
            "total": self.horizon,
            "step": self.step,
            "counters": {k: getattr(self, k) for k in _COUNTERS} | self.clock.state(),
            "clock": self.clock.progress,
            "metrics": self.metrics,
            "evaluated_at": self._evaluated_at,
            "owed": self._owed,
            "journal": self.journal.mark(),
            "first_started": self.started,
            "parts": self.parts,
            "code": self._code,
            "data": {"digest": self.recipe.data.digest, "root": str(self.recipe.data.root)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def _restore(self) -> None:
        content = checkpoint.load(self.cell.checkpoint)
        if content is None:
            self._open_journal(None)
            return
        try:
            self._take(content)
            self._open_journal(content["journal"])
        except (LookupError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise checkpoint.BrokenCheckpoint(
                f"{self.cell.checkpoint} does not hold what a run saves ({what})"
            ) from error
        self.resumed += 1
        log.info("%s goes on at step %d", self.cell.name, self.step)

    def _take(self, content: dict[str, Any]) -> None:
        self._refuse_other(content)
        if type(content["step"]) is not int or not 0 <= content["step"] <= self.total:
            raise TypeError(f"step is {content['step']!r}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.step, self.metrics = content["step"], content["metrics"]
        self._saved_step = self.step - 1
        self._evaluated_at, self._owed = content["evaluated_at"], content["owed"]
        self.started = content["first_started"]
        for name in _COUNTERS:
            setattr(self, name, content["counters"][name] + 0)  # a TypeError where it is no number
        self.clock.restore(content["counters"], content["clock"])
        self._take_parts(content.get("parts", []), content.get("code", {}))

    def _take_parts(self, parts: list[dict[str, Any]], files: dict[str, str]) -> None:
        """What the run was made by so far, and is from here on. Says what is not the same; code=stop refuses code."""
        if not parts:  # in a checkpoint of before; what is known begins here
            log.warning("%s goes on at step %d, to which it came by code that is not known", self.cell.name, self.step)
            self.parts[0]["step"] = self.step
            return
        before, here = parts[-1], self.parts[-1]
        odd = {k: (before[k], here[k]) for k in ("code", "world_size", "device") if before[k] != here[k]}
        self.parts = [*parts, {**here, "step": self.step}] if odd else parts
        option = self.cfg.get("code", "warn")
        if "code" in odd and option != "ignore":
            words = f"{self.cell.name} goes on at step {self.step} with other code: {code.changed(files, self._code)}"
            if option == "stop":
                raise UserError(f"{words}; code=warn goes on all the same, another out= starts anew")
            log.warning("%s", words)
        for key, words in (("world_size", "processes"), ("device", "as its device")):
            if key in odd:  # batch norm may see other batches, sums are taken in another order
                log.warning("%s goes on with %s %s, before it had %s", self.cell.name, odd[key][1], words, odd[key][0])

    def _refuse_other(self, content: dict[str, Any]) -> None:
        """A checkpoint of another recipe or budget is an error that says what differs."""
        saved = json.loads(content["recipe"])
        lines = _difference({**saved, "T": content["total"]}, {**self.recipe.fields, "T": self.horizon})
        if lines:
            raise ValueError(f"{self.cell.checkpoint} is of another recipe: {'; '.join(lines)}")
        theirs, own = content.get("data", {}), self.recipe.data  # a checkpoint of before has none
        if own.digest and theirs.get("digest") not in (None, own.digest):
            raise ValueError(f"{self.cell.checkpoint} is of other data, in {theirs['root']}: give another out=")

    def _open_journal(self, mark: dict[str, Any] | None) -> None:
        if self.world.is_main:
            at = self.step, self.step - self._owed
            self.journal = Journal(self.cell.metrics, mark, *at)
            self.tracker = trackers.start(self.cfg.get("tracker", "none"), self.cell, self.cfg, *at)

    def _asked(self) -> tuple[int, bool]:
        """(the signal that any rank has received or 0, is a checkpoint due by the minutes): the same on every rank."""
        minutes = (time.perf_counter() - self._last_save) / 60
        answers = self.world.gather((self._signals.noted, minutes >= self.cfg["checkpoint"]["minutes"]))
        return first_of({number for number, _ in answers}), answers[0][1]

    # -- the end --------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Evaluate the final model if it has not been, write result.json, and return it."""
        if self._evaluated_at != self.step:
            self.evaluate()
            self.save()
        self._saving.wait()
        metric, rule = self.cfg["task"]["metric"], self.cfg["task"]["rule"]
        if not math.isfinite(self.metrics[metric][rule]):
            raise NonFinite(f"the {rule} {metric} is {self.metrics[metric][rule]}: there is nothing to report")
        if self._final is None:  # evaluated before the run was killed
            with self._evaluated_weights(self.step - 1):
                self._final = self._final_weights()
        digest, evaluated = self._final
        result: dict[str, Any] = {}
        if self.world.is_main:
            if evaluated is not None:
                self.journal.sync()
                checkpoint.save(self.cell.checkpoint, {**self._content(), "evaluated": evaluated})
            result = self._result(digest)
            self.cell.write_result(result)
            checkpoint.previous(self.cell.checkpoint).unlink(missing_ok=True)
            self._write_state("done", **self._state())
        self._done = True
        return self.world.agree(result)

    def settle(self) -> None:
        """Wait for the checkpoint under way: the run has failed, and its state is the caller's to write."""
        self._ending = True
        self._saving.join()

    def close(self) -> None:
        """Give signals and files back; safe to call at any time. A signal that came too late to be obeyed is raised."""
        self._signals.release()
        end_workers()
        try:
            self._saving.wait()
        except Exception as error:  # another ended the run first: this one is for run.log
            log.debug("%s: the last checkpoint could not be written (%s)", self.cell.name, error)
        if hasattr(self, "_bar"):
            with suppress(OSError):
                self._bar.close()
        if hasattr(self, "journal"):
            self.journal.close()
        if hasattr(self, "tracker"):
            self.tracker.close(self._done)
        self._signals.pass_on()

    def _result(self, digest: str) -> dict[str, Any]:
        task, data, rule, clock = self.cfg["task"], self.recipe.data, self.cfg["task"]["rule"], self.clock
        return {
            "schema": RESULT_SCHEMA,
            "task": self.cell.task,
            "schedule": self.cell.schedule,
            "optimizer": self.cfg["optimizer"]["name"],
            "model": task["model"],
            "budget": {
                "amount": self.cell.budget,
                "fraction": self.step / self.recipe.full,
                "iterations": self.horizon or self.step,
                "full_iterations": self.recipe.full,
            },
            "seed": self.seed,
            "signature": self.cell.signature,
            "work": self.recipe.work,
            "status": "done",
            "reported": {"metric": task["metric"], "rule": rule, "value": self.metrics[task["metric"]][rule]},
            "metrics": self.metrics,
            "iterations_done": self.step,
            "samples_seen": self.samples,
            "skipped_updates": self.skipped,
            "train_seconds": clock.elapsed,
            "eval_seconds": clock.eval_seconds,
            "evaluations": self.evaluations,
            "data_wait_seconds": clock.wait_seconds,
            "compile_seconds": clock.compile_seconds,
            "samples_per_second": self.samples / clock.elapsed if clock.elapsed else None,
            "peak_memory_bytes": peak_memory(self.device),
            "device": device_name(self.device),
            "precision": self.cfg["precision"],
            "world_size": self.world_size,
            "resumed": self.resumed,
            "parts": self.parts,
            "data": {
                "name": data.name,
                "root": str(data.root.resolve()),
                "n_train": data.n_train,
                "n_val": data.n_val,
                "classes": len(data.classes),
                "digest": data.digest,
                "missing": len(data.missing),
            },
            "weights_sha256": digest,
            "versions": versions(),
            "git": code.git_state(),
            "started": self.started,
            "finished": now(),
        }


def _refuse_odd_shares(recipe: Recipe, world: World) -> None:
    """Raise UserError for a batch that ranks would put through the model in different numbers of pieces.

    A rank with one more (or none) would wait for the others in batch norm or in the gradients' sum.
    """
    micro, batch = recipe.cfg["micro_batch"], recipe.epoch.batch
    if batch > world.size and batch % world.size:
        near = batch // world.size * world.size
        raise UserError(
            f"task.batch_size={batch}: {world.size} processes cannot share it equally; "
            f"{near} or {near + world.size}, or another number of processes"
        )
    for k in (0, int(recipe.epoch.iterations) - 1):  # the last of an epoch may be smaller
        size = len(recipe.epoch.positions(k))
        if size < world.size:
            raise UserError(f"{world.size} processes cannot share a batch of {size}: fewer of them, or a larger batch")
        shares = {-(-size // world.size), size // world.size}
        if micro and len({-(-share // micro) for share in shares}) > 1:
            raise UserError(
                f"micro_batch={micro}: {world.size} processes would share a batch of {size} in unequal numbers of "
                f"pieces; micro_batch={max(shares)} or another number of processes"
            )


_COUNTERS = ("samples", "evaluations", "resumed", "skipped")


def _copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    for a, b in zip(source, target, strict=True):
        b.copy_(a)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((k, v) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor))


def _difference(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for k in sorted({*saved, *wanted}):
        a, b = saved.get(k), wanted.get(k)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _difference(a, b, f"{prefix}{k}.")
        elif json.loads(json.dumps(a)) != json.loads(json.dumps(b)):
            lines.append(f"{prefix}{k} was {a}, now {b}")
    return lines
