"""Semantic segmentation on the Cityscapes layout: mmsegmentation's models and datasets, trained by mmengine's Runner.

A recipe names one of upstream's packaged configs (`task.model`). Of it are used the model, the augmentation, gradient
clipping and factors per parameter, at the recipe's crop and scale; a config for other data gets the augmentation of
upstream's Cityscapes. Its length, learning rate policy, data loaders, evaluation period and its hooks for logs,
checkpoints and timing are left out: those are the session's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from budgeted.data import Loader
from budgeted.errors import UserError
from budgeted.recipe import Config
from budgeted.session import Session
from tasks import base, compat, layouts
from tasks.mmzoo import CLASSES, Upstream, load_weights, upstream_config

compat.mmseg()  # before what follows: importing it needs a stand-in for mmcv's compiled part

from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.dist import broadcast  # noqa: E402
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm  # noqa: E402
from mmengine.optim import OptimWrapper  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner import IterBasedTrainLoop, Runner  # noqa: E402
from mmengine.runner.base_loop import BaseLoop  # noqa: E402
from mmseg.datasets import CityscapesDataset  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

init_default_scope("mmseg")
USED = ("model", "train_pipeline", "test_pipeline", "env_cfg", "find_unused_parameters")  # and the record shows no more
DEFAULT_HOOKS = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")


class Segmentation:
    """The adapter that tasks.base describes, for `task.adapter: segmentation`."""

    def __init__(self, cfg: Config, data: layouts.Data, device: torch.device) -> None:
        self.cfg, self.data, self.device = cfg, data, device
        self.upstream = upstream_config(cfg["task"])
        self.averaged = cfg["optimizer"]["name"] == "schedule_free"

    def build(self, session: Session) -> None:
        """Upstream's model with its initial weights and an optimizer; then the session's state on top of them.

        `compile` compiles the backbone, where the time goes; the heads take lists and dicts apart in Python.
        """
        self.session = session
        self.dataset = self.train_dataset()
        with quiet():
            self.runner = _Runner(self.upstream, session, self.device)
            Runner._init_model_weights(self.runner)
            load_weights(self.model, self.cfg["task"]["weights"])
            if self.cfg["channels_last"]:
                self.model.to(memory_format=torch.channels_last)
            if self.cfg["compile"]:
                self.model.backbone.compile()
            self.runner.optim_wrapper = self._optim_wrapper()
        self.optimizer = self.runner.optim_wrapper.optimizer
        averages = self.evaluation_weights if self.averaged else None
        session.attach(self.model, self.optimizer, self.evaluate, averages)

    def train_dataset(self) -> Any:
        """Upstream's dataset over the training images."""
        return streets(self.data, "train", self.upstream, self.cfg["data"]["subset"])

    def train(self, session: Session) -> None:
        """Upstream's Runner and loop, from session.step until session.finished."""
        if self.averaged:
            self.optimizer.train()
        batches: Any = session.loader(self.dataset, pseudo_collate)
        self.runner._train_loop = _Loop(self.runner, batches, session)
        try:
            self.runner.train()
        finally:
            batches.close()  # ends the data workers

    def evaluate(self) -> dict[str, float]:
        """Mean IoU, mean accuracy of the classes and accuracy of the pixels, by upstream's IoUMetric, not rounded.

        Areas are summed over the ranks' shares, in which each validation image is once.
        """
        metric = IoUMetric()
        metric.dataset_meta = {"classes": CLASSES}
        for buffer in self.model.buffers():  # ranks without SyncBN have each their own statistics
            broadcast(buffer)
        self.model.eval()
        with torch.no_grad(), self._autocast():
            for batch in self._val_loader():
                metric.process(batch, [sample.to_dict() for sample in self.model.val_step(batch)])
        self.model.train()
        own = torch.zeros(4, len(CLASSES), dtype=torch.float64)
        for areas in metric.results:
            own += torch.stack(areas)
        found = IoUMetric.total_area_to_metrics(*sum(self.session.world.gather(own)))
        means = {"miou": np.nanmean(found["IoU"]), "macc": np.nanmean(found["Acc"]), "aacc": found["aAcc"]}
        return {name: float(value) for name, value in means.items()}

    def evaluation_weights(self) -> AbstractContextManager:
        batches = self.session.loader_of(self.dataset, 0, base.REFRESH, pseudo_collate)
        return base.evaluation_weights(
            self.model,
            self.optimizer,
            batches,
            lambda batch: self.model.data_preprocessor(batch, True)["inputs"],
            self._autocast(),
        )

    def flops(self) -> int:
        """Training FLOPs of an iteration: convolutions and matrix products of the global batch at the crop's size,
        forward and backward. Counted on tensors without storage: it takes a second and no memory."""
        with quiet():
            model = revert_sync_batchnorm(MODELS.build(self.upstream.model)).to("meta").train()
        images = torch.zeros(self.cfg["task"]["batch_size"], 3, *self.cfg["task"]["crop"], device="meta")
        heads = [module for module in model.modules() if isinstance(module, BaseDecodeHead)]
        try:
            with FlopCounterMode(display=False) as counter:
                features = model.extract_feat(images)
                sum(part.sum() for head in heads for part in tree_leaves(head(features))).backward()
        except (TypeError, RuntimeError) as error:  # cascades' heads want each other's output
            name, why = self.cfg["task"]["model"], " ".join(str(error).split())[:100]
            raise UserError(f"the FLOPs of {name} cannot be counted ({why}): write the budget in it or ep") from error
        return counter.get_total_flops()

    @property
    def model(self) -> nn.Module:
        """The model itself, never its distributed wrapper."""
        model = self.runner.model
        return model.module if is_model_wrapper(model) else model

    def _optim_wrapper(self) -> OptimWrapper:
        """Upstream makes the parameter groups and clips; the suite chooses the optimizer."""
        sgd = {"type": "SGD", "lr": base.base_lr(self.cfg), "weight_decay": base.weight_decay(self.cfg)}
        theirs, names = self.upstream.optim_wrapper, ("clip_grad", "paramwise_cfg", "constructor")
        kept = {name: theirs[name] for name in names if name in theirs}
        wrapper = self.runner.build_optim_wrapper({**kept, "type": _OptimWrapper, "optimizer": sgd})
        wrapper.precision = self._autocast
        groups = [{k: group[k] for k in ("params", "lr", "weight_decay")} for group in wrapper.optimizer.param_groups]
        wrapper.optimizer = base.build_optimizer(self.cfg, groups)
        return wrapper

    def _autocast(self) -> torch.autocast:
        """bf16 where it is asked for. It has the range of fp32: no loss scaling."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg["precision"] == "bf16")

    def _val_loader(self) -> DataLoader:
        """This rank's share of the validation set, an image at a time as upstream has it: sizes may differ."""
        dataset = streets(self.data, "val", self.upstream)
        return Loader(
            dataset,
            sampler=range(self.session.rank, len(dataset), self.session.world_size),
            num_workers=self.cfg["data"]["workers"],
            collate_fn=pseudo_collate,
        )


def streets(data: layouts.Data, split: str, config: Upstream, keep: int | None = None) -> CityscapesDataset:
    """Upstream's dataset of one split; of the training split only what data.subset keeps."""
    dataset = _Streets(
        data_root=str(data.root),
        data_prefix={"img_path": f"leftImg8bit/{split}", "seg_map_path": f"gtFine/{split}"},
        pipeline=config.train_pipeline if split == "train" else config.test_pipeline,
        test_mode=split == "val",
    )
    steps = dataset.pipeline.transforms
    steps.insert(1 + [type(step).__name__ for step in steps].index("LoadAnnotations"), refuse_odd_labels)
    if keep:
        dataset.get_subset_(layouts.subset(len(dataset), keep))
    return dataset


class _Streets(CityscapesDataset):
    """Upstream's, whose errors name the file."""

    def prepare_data(self, idx: int) -> Any:
        try:
            return super().prepare_data(idx)
        except UserError:
            raise
        except Exception as error:
            record = self.get_data_info(idx)
            what = f"{record['img_path']} or its label {record['seg_map_path']}"
            raise UserError(f"{what}: cannot be used ({type(error).__name__}: {error}); replace them") from error


KNOWN = np.zeros(2**16, dtype=bool)  # the ids that a label image may hold
KNOWN[[*range(len(CLASSES)), 255]] = True


def refuse_odd_labels(sample: dict) -> dict:
    """A step of upstream's pipelines, which would stretch a label image of another size and fail at unknown ids.

    Raises UserError with its path.
    """
    label, picture, path = sample["gt_seg_map"], sample["ori_shape"], sample["seg_map_path"]
    if label.shape != tuple(picture):
        raise UserError(f"{path}: is {label.shape[::-1]}, its picture {picture[::-1]}: remove it and run mode=prepare")
    if not KNOWN[label].all():
        odd = sorted({int(v) for v in np.unique(label) if not KNOWN[v]})[:5]
        raise UserError(
            f"{path}: has unknown ids {odd}, known are 0 to {len(CLASSES) - 1} and 255: remove it and run mode=prepare"
        )
    return sample


@contextmanager
def quiet() -> Iterator[None]:
    """Without upstream's warnings about its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _OptimWrapper(OptimWrapper):
    """Upstream's, for an update in pieces that count by their share of the batch, under autocast where it is asked."""

    precision: Any = nullcontext
    share, last = 1.0, True

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), self.precision():
            yield

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.share

    def should_update(self) -> bool:
        return self.last

    should_sync = should_update


class _Loop(IterBasedTrainLoop):
    """Upstream's loop over batches that already start at the session's step; upstream would get there by decoding
    all that comes before. The session keeps the time, so there is nothing else to call."""

    def __init__(self, runner: Runner, batches: Iterator, session: Session) -> None:
        BaseLoop.__init__(self, runner, batches)
        self.session = session
        self._iter, self._max_iters, self._epoch, self._max_epochs = session.step, session.total, 0, 1

    def run(self) -> nn.Module:
        self.runner.model.train()
        while not self.session.finished:
            self.step()
        return self.runner.model

    def step(self) -> None:
        """One update, from as many batches as micro_batch makes of it."""
        model, wrapper, loss = self.runner.model, self.runner.optim_wrapper, 0.0
        self.session.before_step()
        shares = self.session.pieces()
        for k, share in enumerate(shares):
            wrapper.share, wrapper.last = share, k == len(shares) - 1
            loss += model.train_step(next(self.dataloader), wrapper)["loss"].detach() * share
        self._iter += 1
        self.session.after_step(loss)


class _Runner(Runner):
    """Upstream's Runner on the session's device, without its default hooks, console and report of the machine."""

    def __init__(self, config: Upstream, session: Session, device: torch.device) -> None:
        self.target = device
        super().__init__(
            model=config.model,
            work_dir=str(session.upstream_dir),
            train_dataloader={},  # these three only say that this Runner trains
            train_cfg={},
            optim_wrapper={},
            default_hooks=dict.fromkeys(DEFAULT_HOOKS),
            launcher="pytorch" if session.world_size > 1 else "none",
            env_cfg=config.env_cfg,
            default_scope="mmseg",
            experiment_name=session.cell.name,
            randomness={"seed": session.seed},  # initial weights; the steps are seeded by the session
            cfg=Upstream({key: config[key] for key in USED if key in config}, filename=config.filename),
        )

    def _init_model_weights(self) -> None:
        """Nothing: train() would draw them once more, over those that the session restored."""

    def _log_env(self, env_cfg: dict) -> None:
        """Nothing: result.json has it, and upstream takes a second to ask compilers for their versions."""

    def build_logger(self, *args: Any, **kwargs: Any) -> logging.Logger:
        logger = super().build_logger(*args, **kwargs)
        logger.handlers[0].setLevel(logging.ERROR)  # the console is the session's; upstream's file keeps the rest
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """One that draws nothing: upstream's imports matplotlib to begin with."""
        return SimpleNamespace(add_config=lambda config: None)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """SyncBN stays in distributed training on GPUs; torch has none elsewhere, and it becomes BN."""
        model, on_gpu = model.to(self.target), self.target.type == "cuda"
        if not (self.distributed and on_gpu):
            model = revert_sync_batchnorm(model)
        if not self.distributed:
            return model
        ids, unused = [self.target.index] if on_gpu else None, self.cfg.get("find_unused_parameters", False)
        return MMDistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=unused)
