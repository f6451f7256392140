"""detectron2's model zoo: its configs with a recipe's values in them, and files of weights read without risk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from budgeted.errors import UserError, nearest
from budgeted.recipe import flatten
from tasks import base, compat
from tasks.cifar10 import ArraysOnly

compat.detectron2()  # before what follows: importing detectron2 needs help

from detectron2 import model_zoo  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem  # noqa: E402
from detectron2.utils.file_io import PathManager  # noqa: E402

log = logging.getLogger("budgeted")
CONFIGS = Path(str(model_zoo.__file__)).parent / "configs"
HOME = "https://dl.fbaipublicfiles.com/detectron2/"  # what upstream's detectron2:// stands for
# Options that are decided elsewhere, and where.
OWNED = {
    "budget": ("SOLVER.MAX_ITER",),
    "schedule": ("SOLVER.LR_SCHEDULER_NAME", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.BASE_LR_END"),
    "task.milestones": ("SOLVER.STEPS",),
    "task.warmup": ("SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD", "SOLVER.RESCALE_INTERVAL"),
    "task.lr": ("SOLVER.BASE_LR",),
    "task.weight_decay": ("SOLVER.WEIGHT_DECAY",),
    "task.batch_size": ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
    "task.weights": ("MODEL.WEIGHTS",),
    "task.eval_every": ("TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS"),
    "checkpoint": ("SOLVER.CHECKPOINT_PERIOD",),
    "optimizer": ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
    "precision": ("SOLVER.AMP",),
    "device": ("MODEL.DEVICE", "CUDNN_BENCHMARK"),
    "data": ("DATASETS", "DATALOADER", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
    "out": ("OUTPUT_DIR", "VIS_PERIOD"),
    "seed": ("SEED",),
}


def config(cfg: dict, classes: int, device: torch.device) -> CfgNode:
    """The zoo's config `task.model` with the recipe's values and `task.options` in it.

    Raises UserError for a name, an option or a kind of model that there is not.
    """
    task, optimizer = cfg["task"], cfg["optimizer"]
    names = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml") if "Base-" not in path.name)
    if task["model"] not in names:
        alike = [name for name in names if Path(name).stem == Path(task["model"]).stem] or names
        raise UserError(f"task.model={task['model']}: not in detectron2's model zoo; {nearest(task['model'], alike)}")
    node = model_zoo.get_config(task["model"])
    known = flatten(node)
    for name, value in flatten(task["options"]).items():
        set_option(node, known, name, value)
    model, solver = node.MODEL, node.SOLVER
    if (
        model.META_ARCHITECTURE not in ("GeneralizedRCNN", "RetinaNet")
        or model.KEYPOINT_ON
        or model.LOAD_PROPOSALS
        or node.DATALOADER.SAMPLER_TRAIN != "TrainingSampler"
    ):
        where = "take one of COCO-Detection or COCO-InstanceSegmentation"
        raise UserError(f"task.model={task['model']}: not a detector of boxes and masks on plain COCO; {where}")
    if task["metric"].startswith("mask") and not model.MASK_ON:
        raise UserError(f"task.metric={task['metric']}: {task['model']} has no masks; task.metric=box_ap")
    model.ROI_HEADS.NUM_CLASSES = model.RETINANET.NUM_CLASSES = classes
    model.DEVICE = str(device)
    solver.BASE_LR, solver.WEIGHT_DECAY = float(base.base_lr(cfg)), float(base.weight_decay(cfg))
    solver.MOMENTUM, solver.NESTEROV = optimizer.get("momentum", 0.0), optimizer.get("nesterov", False)
    solver.IMS_PER_BATCH, solver.STEPS, solver.WARMUP_ITERS = task["batch_size"], (), 0
    node.TEST.EXPECTED_RESULTS = []
    return node


def set_option(node: CfgNode, known: Mapping[str, Any], name: str, value: Any) -> None:
    """Set the dotted `name` in `node`. Raises UserError where the suite decides it, or upstream has no such key."""
    for owner, keys in OWNED.items():
        if any(f"{name}.".startswith(f"{key}.") for key in keys):
            raise UserError(f"task.options.{name}: decided by {owner}, and nowhere else")
    if name not in known:
        raise UserError(f"task.options.{name}: detectron2 has no such option; {nearest(name, known)}")
    if isinstance(known[name], float) and type(value) is int:
        value = float(value)
    try:
        node.merge_from_list([name, value])
    except ValueError:
        kind = type(known[name]).__name__
        raise UserError(f"task.options.{name}={value}: detectron2 wants a {kind} like {known[name]}") from None


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


def load_weights(model: nn.Module, weights: str) -> None:
    """Load a .pth, a checkpoint of the suite or detectron2's .pkl, by upstream's rules of renaming.

    All of the backbone has to come from it. Raises UserError when it does not, or when the file cannot be had.
    """
    path = fetch(weights)
    try:
        result = DetectionCheckpointer(model, save_to_disk=False)._load_model(read_weights(path))
    except Exception as error:  # hostile or foreign bytes raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"task.weights={weights}: not a file of weights ({type(error).__name__}: {reason})") from error
    own, trunk = model.state_dict(), "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    wrong = [f"{name} is {theirs} there and {ours} here" for name, theirs, ours in result.incorrect_shapes]
    wrong += [f"{name} is absent or of another shape" for name in result.missing_keys if name.startswith(trunk)]
    fit = len(own) - len(result.missing_keys)
    if wrong:
        raise UserError(f"task.weights={weights}: fits {fit} of the model's {len(own)} tensors; first {wrong[0]}")
    log.info("%s: %d of the model's %d tensors, %d not used", weights, fit, len(own), len(result.unexpected_keys))


def fetch(weights: str) -> Path:
    """The file of `weights`: a path, or an address that upstream downloads and keeps. Raises UserError."""
    if "://" not in weights:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"task.weights={weights}: no such file; give a path, none, or an address of detectron2's")
        return path
    try:
        return Path(PathManager.get_local_path(weights))
    except Exception as error:  # no network, no such address, no handler for it
        url = weights.replace("detectron2://", HOME)
        hint = "fetch it elsewhere and give task.weights=PATH, or none"
        raise UserError(f"task.weights={weights}: cannot be had from {url} ({error}); {hint}") from error


def read_weights(path: Path) -> dict[str, Any]:
    """A file's content in the form that upstream's checkpointer takes. Nothing in the file is run."""
    if path.suffix != ".pkl":
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {"model": content.get("evaluated") or content.get("model") or content}
    with path.open("rb") as file:
        content = Arrays(file, encoding="latin1").load()
    if "model" in content and "__author__" in content:
        return content
    content = {name: array for name, array in content.get("blobs", content).items() if not name.endswith("_momentum")}
    return {"model": content, "__author__": "Caffe2", "matching_heuristics": True}


class Arrays(ArraysOnly):
    """Unpickles numpy arrays in plain containers, and refuses the rest."""

    allowed = {**ArraysOnly.allowed, "collections": "OrderedDict"}
