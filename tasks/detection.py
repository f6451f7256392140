"""Detection and instance segmentation on COCO's layout: detectron2's DefaultTrainer, DatasetMapper and COCOEvaluator.

The recipe names one of the zoo's own configs (`task.model`, see tasks/zoo.py). From it come the model, the
augmentation, the sampling of proposals, the weight decay of norms and gradient clipping. Its length, learning rate
policy, seeds, and hooks for logging, checkpoints and evaluation are left out: those are the session's. One thing
departs from upstream: it groups images by aspect ratio as they come, by all that was read before; here they are grouped
within windows of a few batches, so that a run can start anywhere.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from budgeted.data import Loader
from budgeted.errors import UserError
from budgeted.randomness import preserved, seed_all
from budgeted.recipe import DataSummary
from tasks import base, compat, layouts, zoo

compat.detectron2()  # before what follows: importing detectron2 needs help

from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import (  # noqa: E402  # noqa: E402
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator  # noqa: E402
from detectron2.data.datasets import register_coco_instances  # noqa: E402
from detectron2.data.samplers import InferenceSampler  # noqa: E402
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, defaults  # noqa: E402
from detectron2.evaluation import COCOEvaluator, inference_on_dataset  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_model  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem  # noqa: E402
from detectron2.modeling.meta_arch import retinanet  # noqa: E402
from detectron2.modeling.meta_arch.dense_detector import DenseDetector  # noqa: E402
from detectron2.solver import build_optimizer  # noqa: E402
from detectron2.solver.build import maybe_add_gradient_clipping  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from fvcore.nn import sigmoid_focal_loss  # noqa: E402

log = logging.getLogger("budgeted")
# TorchScript rounds a function's first calls in a process otherwise than the later ones: a resume would show.
retinanet.sigmoid_focal_loss_jit = sigmoid_focal_loss


class Detection:
    """The adapter: what tasks.base.Adapter asks for."""

    def __init__(self, cfg: dict, data: DataSummary, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        zoo.check_masks(cfg)
        self.config = zoo.config(cfg, len(data.classes), str(device))
        self.config.SOLVER.BASE_LR = float(base.base_lr(cfg))
        self.config.SOLVER.WEIGHT_DECAY = float(base.weight_decay(cfg))
        self.names = {split: register(data.root, split) for split in ("train", "val")}
        self.trainer: Trainer = None  # type: ignore[assignment]

    def build(self, session: Any) -> None:
        """Upstream's model with its initial weights, its optimizer, and the session's state on top of them."""
        upstream_log(session.upstream_dir if session.rank == 0 else None)
        self.config.SOLVER.MAX_ITER = session.total
        self.config.OUTPUT_DIR = str(session.upstream_dir)
        len(self.train_images)  # read it before the clock starts
        torch.manual_seed(session.seed)
        self.trainer = Trainer(self, session)

    def train(self, session: Any) -> None:
        """Upstream's own loop from session.step until session.finished."""
        if self.free:
            self.trainer.optimizer.train()
        self.trainer.start_iter = session.step
        with suppress(Finished):
            self.trainer.train()

    def evaluate(self) -> dict[str, float]:
        """AP, AP50 and AP75 of boxes and masks by upstream's COCOEvaluator, each image once over all ranks."""
        model, session = self.trainer.bare, self.trainer.session
        if session.world_size > 1:
            for buffer in model.buffers():  # batch-norm statistics are each rank's own
                torch.distributed.broadcast(buffer, 0)
        mapper = DatasetMapper(self.config, is_train=False)
        images = Images(get_detection_dataset_dicts([self.names["val"]], filter_empty=False), mapper)
        sampler, workers = InferenceSampler(len(images)), self.cfg["data"]["workers"]
        loader = Loader(images, sampler=sampler, num_workers=workers, collate_fn=trivial_batch_collator)
        kinds = {"bbox": "box", "segm": "mask"} if self.config.MODEL.MASK_ON else {"bbox": "box"}
        judge = COCOEvaluator(self.names["val"], tuple(kinds), output_dir=self.config.OUTPUT_DIR, use_fast_impl=False)
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            results = session.world.agree(inference_on_dataset(model, loader, judge))  # rank 0 has them
        return fractions({prefix: results[kind] for kind, prefix in kinds.items()})

    def flops(self) -> int:
        """Training FLOPs of one iteration: forward and backward of up to 4 images, scaled to the global batch."""
        from torch.utils.flop_counter import FlopCounterMode

        images, batch = self.train_images, self.cfg["task"]["batch_size"]
        count = min(batch, 4)
        with preserved(), EventStorage(), FlopCounterMode(display=False) as counter:
            seed_all(0)
            sum(self.model()([images[k * len(images) // count] for k in range(count)]).values()).backward()
        return counter.get_total_flops() * batch // count

    def model(self) -> nn.Module:
        """Upstream's model with random weights."""
        try:
            model = build_model(self.config)
        except ImportError as error:  # of the compiled part
            raise UserError(f"task.model={self.cfg['task']['model']}: {' '.join(str(error).split())}") from None
        if isinstance(model, DenseDetector):  # upstream's running mean is an attribute, which no checkpoint has
            model.register_buffer("loss_normalizer", torch.tensor(100.0, dtype=torch.float64, device=model.device))
        if self.cfg["channels_last"]:
            model.to(memory_format=torch.channels_last)
        if self.cfg["precision"] == "bf16":
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
        return model.train()

    @property
    def free(self) -> bool:
        return self.cfg["optimizer"]["name"] == "schedule_free"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Upstream's SGD, or another of the suite's optimizers on upstream's parameter groups."""
        optimizer = build_optimizer(self.config, model)
        if self.cfg["optimizer"]["name"] == "sgd":
            return optimizer
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
        return maybe_add_gradient_clipping(self.config, base.build_optimizer(self.cfg, groups))

    def evaluation_weights(self) -> AbstractContextManager:
        precise = self.config.TEST.PRECISE_BN
        count = precise.NUM_ITER if precise.ENABLED else base.REFRESH
        batches = self.trainer.session.loader_of(self.train_images, 0, count, trivial_batch_collator)
        return base.evaluation_weights(
            self.trainer.bare, self.trainer.optimizer, batches, lambda batch: batch, EventStorage()
        )

    @cached_property
    def train_images(self) -> Images:
        """Images with an object that is not a crowd. Masks stay polygons as upstream has them, unless one is RLE."""
        records = get_detection_dataset_dicts([self.names["train"]], filter_empty=True)
        if self.config.MODEL.MASK_ON:
            objects = (a for r in records for a in r["annotations"] if not a.get("iscrowd", 0))
            if any(isinstance(a.get("segmentation"), dict) for a in objects):
                self.config.INPUT.MASK_FORMAT = "bitmask"
        records = [records[k] for k in layouts.subset(len(records), self.cfg["data"]["subset"])]
        images = Images(records, DatasetMapper(self.config, is_train=True))
        if self.config.DATALOADER.ASPECT_RATIO_GROUPING:
            images.groups = np.array([int(r["width"] <= r["height"]) for r in records])  # upstream's two
        return images


class Trainer(DefaultTrainer):
    """Upstream's trainer with the session as its only clock, log, checkpointer and writer of learning rates."""

    def __init__(self, adapter: Detection, session: Any) -> None:
        self.adapter, self.session = adapter, session
        # Upstream would take the GPU from the rank that its own launcher gave; on a CPU, DDP takes none.
        ddp = partial(create_ddp_model, device_ids=[session.device] if session.device.type == "cuda" else None)
        with mock.patch.object(defaults, "create_ddp_model", ddp):
            super().__init__(adapter.config)
        self._trainer = Step(self.model, self.data_loader, self.optimizer, session)

    @property
    def bare(self) -> nn.Module:
        """The model without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def build_model(self, cfg: CfgNode) -> nn.Module:  # this and the next are class methods upstream, called on self
        model, weights = self.adapter.model(), self.adapter.cfg["task"]["weights"]
        if weights != "none":
            zoo.load_weights(model, weights)
        elif frozen := cfg.MODEL.BACKBONE.FREEZE_AT:
            log.warning("task.weights=none: the first %d stages stay random, MODEL.BACKBONE.FREEZE_AT=0", frozen)
        return model

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return self.adapter.optimizer(model)

    def build_train_loader(self, cfg: CfgNode) -> Iterator[list[dict]]:
        yield from self.session.loader(self.adapter.train_images, trivial_batch_collator)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        special = self.adapter.free or cfg.TEST.PRECISE_BN.ENABLED
        weights = self.adapter.evaluation_weights if special else None
        self.session.attach(self.bare, optimizer, self.adapter.evaluate, weights)
        return self.session.scheduler

    def build_hooks(self) -> list[HookBase]:
        return [Drive(self.session)]


class Step(SimpleTrainer):
    """Upstream's step, whose `loss` stays a tensor where upstream reads five numbers back from the device.

    Where a batch comes in several pieces (`micro_batch`) or in unequal shares, their gradients are added up here.
    """

    def __init__(self, model: nn.Module, loader: Iterator, optimizer: torch.optim.Optimizer, session: Any) -> None:
        super().__init__(model, loader, optimizer)
        self.session = session
        self.loss = torch.zeros((), device=session.device)

    def _write_metrics(self, loss_dict: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        self.loss = torch.stack([loss.detach() for loss in loss_dict.values()]).sum()

    def run_step(self) -> None:
        pieces = self.session.pieces()
        if pieces == [1.0]:
            return super().run_step()
        self.optimizer.zero_grad()
        self.loss = torch.zeros_like(self.loss)
        for k, share in enumerate(pieces):
            batch, last = next(self._data_loader_iter), k == len(pieces) - 1
            with nullcontext() if last or self.session.world_size == 1 else self.model.no_sync():
                loss = sum(self.model(batch).values()) * share
                loss.backward()
            self.loss += loss.detach()
        self.optimizer.step()


class Drive(HookBase):
    """The session's calls around each update."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def before_step(self) -> None:
        self.session.before_step()

    def after_step(self) -> None:
        model, world = self.trainer.bare, self.session.world
        if world.size > 1 and isinstance(model, DenseDetector):  # upstream has one a rank, a checkpoint only rank 0's
            model.loss_normalizer.copy_(world.mean(model.loss_normalizer))
        self.session.after_step(self.trainer._trainer.loss)
        if self.session.finished:
            raise Finished


class Finished(BaseException):
    """The budget is spent. No `Exception`: upstream would log it as a failure."""


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Upstream's ResNet with one basic block in each of its four stages, under upstream's FPN: for coco_tiny."""
    resnets, stages = cfg.MODEL.RESNETS, []
    channels, wider = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, resnets.NORM)
    for stride in (1, 2, 2, 2):
        stages.append([BasicBlock(channels, wider, stride=stride, norm=resnets.NORM)])
        channels, wider = wider, 2 * wider
    bottom_up = ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, LastLevelMaxPool(), fpn.FUSE_TYPE)


class Images(Dataset):
    """Upstream's mapper over upstream's records. An image that cannot be used is named by the error."""

    groups: np.ndarray | None = None  # see budgeted.data.Positioned

    def __init__(self, records: list[dict], mapper: Callable[[dict], dict]) -> None:
        self.records, self.mapper = DatasetFromList(records, copy=False), mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        try:
            return self.mapper(record)
        except Exception as error:
            raise RuntimeError(f"{record['file_name']}: {type(error).__name__}: {error}") from error


def register(root: Path, split: str) -> str:
    """Make a split known to upstream under a name of its own, anew: the files may have changed since."""
    path, folder = layouts.coco_files(Path(root), split)
    name = f"coco {path.resolve()}"
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    register_coco_instances(name, {}, str(path), str(folder))
    return name


def fractions(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Upstream's percentages as {"box_ap": ..., "box_ap50": ...}; where it has NaN for want of detections, 0."""
    if any(math.isnan(found["AP"]) for found in results.values()):
        log.warning("nothing was detected in the validation images: the AP counts as 0")
    values = {f"{kind}_{m.lower()}": found[m] / 100 for kind, found in results.items() for m in ("AP", "AP50", "AP75")}
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def upstream_log(folder: Path | None) -> None:
    """Send what upstream says to a file in `folder` (None: nowhere) in place of the console."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "detectron2.log") if folder else logging.NullHandler()
    for name in ("detectron2", "fvcore", "iopath"):
        logger = logging.getLogger(name)
        for old in logger.handlers:
            old.close()
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
