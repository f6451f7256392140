"""detectron2's model zoo: its configs with a recipe's values in them, and files of weights read without risk.

`check` is what can be found wrong before torch is imported; the rest imports detectron2 on use.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgeted.errors import UserError, nearest
from budgeted.recipe import flatten
from tasks import coco_json, compat, layouts
from tasks.cifar10 import ArraysOnly
from tasks.folder import SPLITS, wrong

if TYPE_CHECKING:
    import torch
    from detectron2.config import CfgNode

log = logging.getLogger("budgeted")
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


def check(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for a model or weights that there are not, an option that is decided elsewhere, and data that
    lack what the model learns. Imports no torch."""
    _check_names(cfg)
    check_masks(cfg)


def _check_names(cfg: Mapping[str, Any]) -> None:
    task, known = cfg["task"], names()
    address(task["weights"])
    if cfg["compile"]:
        raise UserError("compile=true: images change size at every step, which torch.compile does not take; false")
    if known and task["model"] not in known:
        alike = [name for name in known if Path(name).stem == Path(task["model"]).stem] or known
        hint = nearest(task["model"], alike)
        raise UserError(f"task.model={task['model']}: no detector of boxes and masks in detectron2's zoo; {hint}")
    for name in flatten(task["options"]):
        for owner, keys in OWNED.items():
            if any(f"{name}.".startswith(f"{key}.") for key in keys):
                raise UserError(f"task.options.{name}: decided by {owner}, and nowhere else")


def check_masks(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for objects without a mask where the model learns masks; not while there is no json."""
    root = layouts.data_root(cfg)
    for split in SPLITS if masked(cfg["task"]) else ():
        path = layouts.coco_files(root, split)[0]
        if path.is_file() and (bare := coco_json.maskless(root, split)):
            fix = "add them; task.model=COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml trains on boxes alone"
            raise wrong(root, f"{path.relative_to(root)}: {bare}, which {cfg['task']['model']} needs", fix)


def masked(task: Mapping[str, Any]) -> bool:
    """Does the model learn masks, as its options or the zoo's config and what that is based on say?"""
    own = flatten(task.get("options") or {}).get("MODEL.MASK_ON")
    path = _configs() / task.get("model", "")
    while own is None and path.is_file():
        text = path.read_text()
        said = re.search(r"^  MASK_ON: *(\w+)", text, re.MULTILINE)
        base = re.search(r'^_BASE_: *"?([^"\n]+)', text, re.MULTILINE)
        own = said[1].lower() == "true" if said else None
        path = path.parent / (base[1] if base else "")
    return bool(own)


def names() -> list[str]:
    """Detectors of boxes and masks in the zoo, as upstream names their configs; none where it is not installed."""
    folder = _configs()
    kinds = ("COCO-Detection", "COCO-InstanceSegmentation", "Cityscapes", "PascalVOC-Detection", "Misc")
    return sorted(str(path.relative_to(folder)) for kind in kinds for path in folder.glob(f"{kind}/*.yaml"))


def _configs() -> Path:
    """The folder of the zoo's configs; one that there is not where detectron2 is not installed."""
    found = importlib.util.find_spec("detectron2")
    places = found.submodule_search_locations if found else None
    return Path(places[0] if places else "/nonexistent", "model_zoo", "configs")


def address(weights: str) -> str | None:
    """The address that detectron2's name of `weights` stands for; None for a path, none and its older catalog.

    Raises UserError for a name that the zoo has not."""
    scheme, _, name = weights.rpartition("://")
    if scheme in ("", "catalog"):
        return None
    if scheme in ("http", "https", "file"):
        return weights
    if scheme != "detectron2":
        raise UserError(f"task.weights={weights}: no such source; give a path, https://..., detectron2://NAME or none")
    if (known := weight_names()) and name not in known:
        hint = f"{nearest(name, known)} Or give its address, {HOME}..."
        raise UserError(f"task.weights={weights}: detectron2's zoo has no such weights; {hint}")
    return f"{HOME}{name}"


def weight_names() -> set[str]:
    """What the zoo has under detectron2://, read off its files; none where it is not installed."""
    found = importlib.util.find_spec("detectron2")
    if not found or not found.submodule_search_locations:
        return set()
    folder = Path(found.submodule_search_locations[0], "model_zoo")
    trained = re.findall(r'"([\w./-]+)": "(\d+/model_\w+\.pkl)"', (folder / "model_zoo.py").read_text())
    texts = (path.read_text() for path in folder.glob("configs/**/*.yaml"))
    named = {name for text in texts for name in re.findall(r'detectron2://([^"\s]+)', text)}
    return {*named, *("/".join(pair) for pair in trained), "ImageNetPretrained/torchvision/R-50.pkl"}


def config(cfg: Mapping[str, Any], classes: int, device: str) -> CfgNode:
    """The zoo's config `task.model` with `task.options` and what the recipe decides in it, rates aside.

    Raises UserError for what `check` refuses, for an option or a kind of model that there is not.
    """
    compat.detectron2()
    _check_names(cfg)
    from detectron2 import model_zoo

    task, optimizer = cfg["task"], cfg["optimizer"]
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
    model.DEVICE = device
    solver.MOMENTUM, solver.NESTEROV = optimizer.get("momentum", 0.0), optimizer.get("nesterov", False)
    solver.IMS_PER_BATCH, solver.STEPS, solver.WARMUP_ITERS = task["batch_size"], (), 0
    node.TEST.EXPECTED_RESULTS = []
    return node


def set_option(node: CfgNode, known: Mapping[str, Any], name: str, value: Any) -> None:
    """Set the dotted `name` in `node`. Raises UserError where upstream has no such key, or wants another type."""
    if name not in known:
        raise UserError(f"task.options.{name}: detectron2 has no such option; {nearest(name, known)}")
    if isinstance(known[name], float) and type(value) is int:
        value = float(value)
    try:
        node.merge_from_list([name, value])
    except ValueError:
        kind = type(known[name]).__name__
        raise UserError(f"task.options.{name}={value}: detectron2 wants a {kind} like {known[name]}") from None


def load_weights(model: torch.nn.Module, weights: str) -> None:
    """Load a .pth, a checkpoint of the suite or detectron2's .pkl, by upstream's rules of renaming.

    All of the backbone has to come from it. Raises UserError when it does not, or when the file cannot be had.
    """
    from detectron2.checkpoint import DetectionCheckpointer

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
    from detectron2.utils.file_io import PathManager

    try:
        return Path(PathManager.get_local_path(weights))
    except Exception as error:  # no network, no such address, no handler for it
        url = weights.replace("detectron2://", HOME)
        hint = "fetch it elsewhere and give task.weights=PATH, or none"
        raise UserError(f"task.weights={weights}: cannot be had from {url} ({error}); {hint}") from error


def read_weights(path: Path) -> dict[str, Any]:
    """A file's content in the form that upstream's checkpointer takes. Nothing in the file is run."""
    import torch

    from budgeted.checkpoint import opened

    if path.suffix != ".pkl":
        content = opened(torch.load(path, map_location="cpu", weights_only=True))
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
