"""Training one cell: what all four adapters share, and the native loop of the two that need one."""

from __future__ import annotations

import importlib
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from budgeted.cells import Cell, Held
from budgeted.checkpoint import opened
from budgeted.data import Loader
from budgeted.distributed import World, synchronised
from budgeted.errors import UserError
from budgeted.recipe import Config, DataSummary, Recipe
from budgeted.session import Session
from budgeted.signals import Interrupted
from tasks import submission

log = logging.getLogger("budgeted")

ADAPTERS = {
    "classification": "tasks.classification:Classification",
    "video": "tasks.video:Video",
    "detection": "tasks.detection:Detection",
    "segmentation": "tasks.segmentation:Segmentation",
}


class Adapter(Protocol):
    """What drives one upstream. It is the only code that knows that upstream."""

    def __init__(self, cfg: Config, data: DataSummary, device: torch.device) -> None: ...

    def build(self, session: Session) -> None:
        """Build model, optimizer and trainer for `session.total` iterations; ends with `session.attach`."""

    def train(self, session: Session) -> None:
        """Let the upstream's trainer make the updates from `session.step` until `session.finished`."""

    def flops(self) -> int:
        """Training FLOPs of one iteration of the global batch. Called before `build`."""


def train(recipe: Recipe) -> dict[str, Any] | None:
    """Run one cell to the end of its budget and return its result; None when another process is running it.

    Raises Interrupted after a signal (state `partial`). Any other error leaves state `failed` and is raised.
    """
    cell, world = recipe.cell, World.from_environment()
    device = pick_device(recipe.cfg["device"], world)
    if cell.budget.endswith("gpuh") and device.type != "cuda":
        raise UserError(f"budget.amount={cell.budget}: there is no GPU here to count hours of; write min or h")
    world.join(device)
    if not world.is_main:
        log.setLevel(logging.ERROR)
    try:
        if done := world.agree(_done(recipe) if world.is_main else None):
            return done
        with _held(cell, world), _logged(cell, world):
            if done := world.agree(_done(recipe) if world.is_main else None):  # by another process, a moment ago
                return done
            return _run(recipe, world, device)
    except Held as holder:
        log.warning("%s; nothing to do here", holder)
        return None
    finally:
        world.leave()


def _done(recipe: Recipe) -> dict[str, Any] | None:
    """The cell's result, if there is one."""
    found = recipe.cell.result()
    if found:
        log.info("%s is done already", recipe.cell.name)
        if theirs := recipe.other_root():
            log.warning("its data were in %s; where those are other data than these, give another out=", theirs)
    return found


def _run(recipe: Recipe, world: World, device: torch.device) -> dict[str, Any]:
    cell, cfg = recipe.cell, recipe.cfg
    session = None
    try:
        if world.is_main:
            cell.begin()
        if other := submission.check(cfg["code"], cell.out):
            log.warning("%s", other)
        if recipe.data.missing:
            log.warning(
                "%d samples of %s are missing or unreadable and left out: mode=check lists them",
                len(recipe.data.missing), recipe.data.root,
            )  # fmt: skip
        if not cell.checkpoint.exists():
            _write_config(recipe, world)
        adapter = adapter_of(cfg)(cfg, recipe.data, device)
        session = Session(recipe, _horizon(recipe, adapter), world, device)
        adapter.build(session)
        _write_config(recipe, world)  # a checkpoint of another recipe has been refused
        if not session.finished:
            adapter.train(session)
        return session.finish()
    except Interrupted as stop:
        _say_stopped(cell, stop, session)
        raise
    except BaseException as error:
        if isinstance(error, UserError):
            error.in_run = True
        try:
            if session is not None:
                session.settle()
        finally:
            _record_failure(cell, world, session, error)
        raise
    finally:
        if session is not None:
            session.close()


def _say_stopped(cell: Cell, stop: Interrupted, session: Session | None) -> None:
    assert session is not None
    log.warning(
        "%s stopped by signal %d after %d steps; the same command goes on", cell.name, stop.signal, session.step
    )
    session.close()
    if callable(stop.handler) and stop.handler is not signal.default_int_handler:
        stop.handler(stop.signal, None)  # whoever launched this process wants to know too: submitit requeues


def _horizon(recipe: Recipe, adapter: Adapter) -> int | None:
    """T; None where the clock decides."""
    if recipe.total is not None or recipe.seconds is not None:
        return recipe.total
    from budgeted.budgets import Budget

    cost = adapter.flops()
    total = Budget(recipe.cell.budget).iterations(flop_per_iteration=cost)
    log.info("one iteration costs %.4g FLOPs: %s is %d iterations", cost, recipe.cell.budget, total)
    return total


def _record_failure(cell: Cell, world: World, session: Session | None, error: BaseException) -> None:
    line = one_line(error)
    # When another rank dies, this one's collective fails: nothing is wrong with the recipe, the run goes on later.
    lost = world.size > 1 and (isinstance(error, dist.DistError) or any(w in line for w in LOST_PEER))
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    if lost and (reason := world.confessed()):  # it did not just die
        lost, line = False, reason
    elif not lost and not stopped:
        world.confess(line)
    try:
        log.debug("%s", "".join(traceback.format_exception(error)))
        if world.is_main:
            step, total = (session.step, session.horizon) if session else (0, None)
            # SystemExit: a signal before the session listens goes to whoever launched this process: submitit requeues.
            state = "partial" if lost or stopped else "failed"
            cell.write_state(state, step, total, f"another process was lost: {line}" if lost else line)
    except OSError as full:
        log.error("the failure could not be recorded: %s", full)


NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
LOST_PEER = ("gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe")


def one_line(error: BaseException) -> str:
    """What went wrong, in one line, with what to do where that is known."""
    text = str(error)
    if "Original Traceback" in text:  # from a data worker: torch puts the traceback into the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before it could save"
    first = " ".join(text.split())[:500] or type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(w in first.lower() for w in NO_MEMORY):
        return f"out of memory: {first}; try micro_batch= or precision=bf16"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def adapter_of(cfg: Config) -> Callable[..., Adapter]:
    module, name = ADAPTERS[cfg["task"]["adapter"]].split(":")
    return getattr(importlib.import_module(module), name)


def upstream(module: str, hint: str) -> Any:
    """Import `module` on use. Raises UserError with how to install it when it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} cannot be imported ({error}); install it: {hint}") from error


def pick_device(wanted: str, world: World) -> torch.device:
    """`auto` is a GPU where there is one. Raises UserError for cuda without a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; device=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def _held(cell: Cell, world: World) -> Iterator[None]:
    """Rank 0 holds the cell for all; when it cannot, every rank raises Held."""
    with ExitStack() as stack:
        refused = None
        if world.is_main:
            try:
                stack.enter_context(cell.lock())
            except Held as error:
                refused = str(error)
        refused = world.agree(refused)
        if refused:
            raise Held(refused)
        yield


@contextmanager
def _logged(cell: Cell, world: World) -> Iterator[None]:
    """Send what the console shows to run.log as well, tracebacks included."""
    if not world.is_main:
        yield
        return
    handler = _RunLog(cell.directory / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _RunLog(logging.FileHandler):
    """A log that a full disk does not turn into a second error, printed over the first."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def let_go(error: BaseException | None) -> None:
    """Empty the frames of a failed run: a sweep keeps its errors, and with them a model and its data workers."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write_config(recipe: Recipe, world: World) -> None:
    if world.is_main:
        from omegaconf import OmegaConf

        from budgeted.files import atomic

        with atomic(recipe.cell.directory / "config.yaml") as handle:
            handle.write(OmegaConf.to_yaml(OmegaConf.create(recipe.cfg)))


# -- optimizers ---------------------------------------------------------------------------------------------


def _sgd(params: Any, lr: float, weight_decay: float, o: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr, momentum=o["momentum"], weight_decay=weight_decay, nesterov=o["nesterov"])


def _adam(kind: type, amsgrad: bool) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, lr, weight_decay, o: kind(
        params, lr, betas=tuple(o["betas"]), eps=o["eps"], weight_decay=weight_decay, amsgrad=amsgrad
    )


def _rmsprop(params: Any, lr: float, weight_decay: float, o: Config) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        params, lr, alpha=o["alpha"], eps=o["eps"], weight_decay=weight_decay, momentum=o["momentum"]
    )


def _schedule_free(params: Any, lr: float, weight_decay: float, o: Config) -> torch.optim.Optimizer:
    package = upstream("schedulefree", "pip install schedulefree")
    return package.SGDScheduleFree(params, lr, momentum=o["momentum"], weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam(torch.optim.Adam, amsgrad=False),
    "adamw": _adam(torch.optim.AdamW, amsgrad=False),
    "amsgrad": _adam(torch.optim.Adam, amsgrad=True),
    "rmsprop": _rmsprop,
    "schedule_free": _schedule_free,
}


def base_lr(cfg: Config) -> float:
    """The optimizer's own learning rate where it has one, else the recipe's."""
    own = cfg["optimizer"].get("lr")
    return cfg["task"]["lr"] if own is None else own


def weight_decay(cfg: Config) -> float:
    """The optimizer's own weight decay where it has one, else the recipe's."""
    own = cfg["optimizer"].get("weight_decay")
    return cfg["task"]["weight_decay"] if own is None else own


def build_optimizer(cfg: Config, params: Any) -> torch.optim.Optimizer:
    """The configured optimizer over `params`: parameters, or groups that may carry their own lr and decay."""
    return OPTIMIZERS[cfg["optimizer"]["name"]](params, base_lr(cfg), weight_decay(cfg), cfg["optimizer"])


def decay_groups(model: nn.Module, norm_decay: float | None) -> list[dict[str, Any]]:
    """All parameters, those of normalisation layers with weight decay `norm_decay` (None: the same as the rest)."""
    if norm_decay is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    normal = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in normal]},
        {"params": [p for p in parameters if id(p) in normal], "weight_decay": norm_decay},
    ]


# What mmengine's checkpoints name beside tensors, in the log of the run that wrote them.
LOGGED = (
    *("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "numpy.ndarray", "numpy.dtype"),
    *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("_reconstruct", "scalar")),
)


class Unread:
    """Stands for an object of `LOGGED`, and forgets what the file says of it: neither it nor a function is had."""

    def __new__(cls, *args: Any) -> Unread:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(source: str, where: str | None = None, hint: str = "give a path, or none") -> Any:
    """The state dict in the file or at the address `where` (`source` itself, if None), out of its checkpoint.

    Raises UserError when it cannot be had or is no file of tensors, saying what task.weights=`source` could be.
    """
    where = where or source
    try:
        with torch.serialization.safe_globals([(Unread, name) for name in LOGGED]):
            if "://" in where:
                content = torch.hub.load_state_dict_from_url(
                    where, map_location="cpu", weights_only=True, progress=False
                )
            else:
                content = opened(torch.load(Path(where).expanduser(), map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"task.weights={source}: no such file; {hint}") from None
    except Exception as error:  # foreign bytes, networks and disks fail in many ways
        reason = f"{type(error).__name__}: {' '.join(str(getattr(error, 'reason', error)).split())[:100]}"
        if "://" in where:
            fix = "fetch it elsewhere and give task.weights=PATH, or none"
            raise UserError(f"task.weights={source}: cannot be fetched from {where} ({reason}); {fix}") from error
        raise UserError(f"task.weights={source}: not a file of tensors ({reason})") from error
    for inner in ("evaluated", "model", "model_state", "state_dict"):
        if isinstance(content, dict) and inner in content:
            return content[inner]
    return content


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file of tensors that fits `model` exactly. Raises UserError."""
    state = read_weights(path)
    refuse_misfit(model, state, path)
    model.load_state_dict(state)


def refuse_misfit(model: nn.Module, state: Any, path: str) -> None:
    """Raise UserError, with counts and the first name, unless `state` fits `model` exactly."""
    if not isinstance(state, dict):
        raise UserError(f"task.weights={path}: holds no state dict")
    own = model.state_dict()
    absent = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shape = [k for k in own if k in state and getattr(state[k], "shape", None) != own[k].shape]
    first = (absent or extra or shape or [None])[0]
    if first is not None:
        raise UserError(
            f"task.weights={path}: does not fit the model: {len(absent)} missing, {len(extra)} unknown, "
            f"{len(shape)} of another shape, first {first!r}"
        )


# -- evaluation ---------------------------------------------------------------------------------------------


REFRESH = 50  # batches that Schedule-Free's batch-norm statistics are of: its README


@contextmanager
def evaluation_weights(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader,
    inputs: Callable[[Any], Any],
    within: AbstractContextManager,
) -> Iterator[None]:
    """The model as it is evaluated where that is not as it is trained; all is put back in place at the end.

    It has Schedule-Free's averages, if `optimizer` keeps them, and batch-norm statistics that are those of `batches` as
    a whole at these weights: by fvcore's update_bn_stats, as in detectron2 and PySlowFast. `inputs` makes of a batch
    what the model takes, `within` is a context to do that in.
    """
    precise = upstream("fvcore.nn.precise_bn", "pip install fvcore")
    kept = [(m, k, b, b.clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    averaged: Any = optimizer if hasattr(optimizer, "eval") else None
    if averaged:
        averaged.eval()
    try:
        if precise.get_bn_modules(model):
            count = sum(1 for _ in batches.batch_sampler)  # type: ignore[union-attr]
            with within:
                precise.update_bn_stats(model, map(inputs, batches), count)
        yield
    finally:
        for module, name, buffer, was in kept:  # fvcore puts other tensors in their place
            buffer.copy_(was)
            module._buffers[name] = buffer
        if averaged:
            averaged.train()


# -- the native loop ----------------------------------------------------------------------------------------


class Native:
    """The loop for upstreams that publish models and data but no trainer: torchvision and pytorchvideo.

    A subclass gives `make_model()`, `train_dataset()` and `val_dataset()`: map-style, samples (x, y) with y a
    class index. A validation sample may hold V views of one clip, x of shape (V, ...): their softmax is averaged.
    `norm_decay`: weight decay of normalisation layers, None for the same as elsewhere. `refresh_batches`: so many
    training batches refresh the batch-norm statistics before an evaluation (0: none).
    """

    norm_decay: float | None = None
    refresh_batches = 0
    views = False

    def __init__(self, cfg: Config, data: DataSummary, device: torch.device) -> None:
        self.cfg, self.data, self.device = cfg, data, device
        self.classes = len(data.classes)

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def train_dataset(self) -> Any:
        raise NotImplementedError

    def val_dataset(self) -> Any:
        raise NotImplementedError

    def build(self, session: Session) -> None:
        torch.manual_seed(session.seed)
        self.session = session
        self.model = self.make_model().to(self.device)
        if self.cfg["channels_last"]:
            self.model = self.model.to(memory_format=self.memory_format)
        if session.world_size > 1:
            self.model = synchronised(self.model, self.device)
        self.optimizer = build_optimizer(self.cfg, decay_groups(self.model, self.norm_decay))
        self.dataset = self.train_dataset()
        special = self.refresh_batches > 0 or self._schedule_free
        session.attach(self.model, self.optimizer, self.evaluate, self.evaluation_weights if special else None)
        self.forward_model: nn.Module = self.model
        if session.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(self.model, device_ids=ids)
        if self.cfg["compile"]:
            self.forward_model = torch.compile(self.forward_model)  # type: ignore[assignment]

    memory_format = torch.channels_last

    @property
    def _schedule_free(self) -> bool:
        return self.cfg["optimizer"]["name"] == "schedule_free"

    def train(self, session: Session) -> None:
        self._training_mode()
        batches = session.loader(self.dataset)
        while not session.finished:
            self.step(session, batches)

    def step(self, session: Session, batches: Iterator[Any]) -> None:
        """One update from the next of `batches`."""
        session.before_step()
        pieces = session.pieces()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for k, share in enumerate(pieces):
            x, y = self._to_device(next(batches))
            last = k == len(pieces) - 1
            with nullcontext() if last or session.world_size == 1 else self.forward_model.no_sync():
                with self._autocast():
                    part = nn.functional.cross_entropy(self.forward_model(x), y) * share
                part.backward()
            loss += part.detach()
        self.optimizer.step()
        session.after_step(loss)

    def evaluate(self) -> dict[str, float]:
        """Top-1 and, with more than five classes, top-5 over the validation set, each sample counted once."""
        self.model.eval()
        session, dataset = self.session, self.val_dataset()
        own = range(session.rank, len(dataset), session.world_size)
        batches = Loader(
            torch.utils.data.Subset(dataset, own),  # type: ignore[arg-type]
            batch_size=max(1, self.cfg["task"].get("val_batch_size") or self.cfg["task"]["batch_size"]),
            num_workers=self.cfg["data"]["workers"],
        )
        right = torch.zeros(3, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for batch in batches:
                x, y = self._to_device(batch)
                scores = self._scores(x)
                order = scores.topk(min(5, self.classes), dim=1).indices == y[:, None]
                right += torch.stack([order[:, 0].sum(), order.any(1).sum(), torch.ones_like(y).sum()])
        if session.world_size > 1:
            dist.all_reduce(right)
        self._training_mode()
        top1, top5, n = right.tolist()
        return {"top1": top1 / n, "top5": top5 / n} if self.classes > 5 else {"top1": top1 / n}

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C); views of a sample (B, V, ...) are averaged."""
        views = x.shape[1] if self.views else 1
        with self._autocast():
            logits = self.model(x.flatten(0, 1) if self.views else x)
        return logits.float().softmax(1).unflatten(0, (-1, views)).mean(1)

    def _training_mode(self) -> None:
        self.model.train()
        if self._schedule_free:
            self.optimizer.train()  # type: ignore[attr-defined]

    def evaluation_weights(self) -> AbstractContextManager:
        batches = self.session.loader_of(self.dataset, 0, self.refresh_batches or REFRESH)
        return evaluation_weights(
            self.model, self.optimizer, batches, lambda batch: self._to_device(batch)[0], self._autocast()
        )

    def flops(self) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        batch = min(2, self.cfg["task"]["batch_size"])
        model, dataset = self.make_model().to(self.device).train(), self.train_dataset()
        x = torch.stack([dataset[k][0] for k in range(batch)]).to(self.device)
        y = torch.zeros(batch, dtype=torch.long, device=self.device)
        with FlopCounterMode(display=False) as counter:
            nn.functional.cross_entropy(model(self._prepare(x)), y).backward()
        return counter.get_total_flops() * self.cfg["task"]["batch_size"] // batch

    def _prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _to_device(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (t.to(self.device, non_blocking=True) for t in batch)
        x = self._prepare(x)
        if self.cfg["channels_last"] and not self.views:
            x = x.contiguous(memory_format=self.memory_format)
        return x, y

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg["precision"] == "bf16")
