"""mmsegmentation's model zoo: its packaged configs with a recipe's values in them, and weights that are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from budgeted.errors import UserError, nearest
from budgeted.recipe import Config, flatten
from tasks import base, compat

mmseg = compat.mmseg()  # before what follows: importing it needs a stand-in for mmcv's compiled part

from mmengine import Config as Upstream  # noqa: E402
from mmengine.runner.checkpoint import (  # noqa: E402
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from mmseg.datasets import CityscapesDataset  # noqa: E402
from mmseg.models.losses import cross_entropy_loss as losses  # noqa: E402

CONFIGS = Path(str(mmseg.__file__)).parent / ".mim" / "configs"
CLASSES = CityscapesDataset.METAINFO["classes"]
FREE = ("model", "train_pipeline", "test_pipeline", "env_cfg", "optim_wrapper.clip_grad", "optim_wrapper.paramwise_cfg")
OWNED = ("model.pretrained", "model.backbone.pretrained", "model.backbone.init_cfg", "model.data_preprocessor.size")

ZOOS = {
    "open-mmlab": get_external_models,
    "openmmlab": get_external_models,
    "torchvision": get_torchvision_models,
    "mmcls": get_mmcls_models,
}
CLASSIFIER = ("fc.", "head.", "conv2.")  # conv2: MobileNetV2's last layer, which mmseg's backbone leaves out

_upstreams_loss = losses.cross_entropy


def cross_entropy(pred: Tensor, label: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Upstream's, which looks up the class weights of ignored pixels and fails: mmsegmentation's issue 3734.

    Only `avg_factor` is given to it, the weights of the pixels that count, which is its own where none is ignored.
    """
    weights, mean = kwargs.get("class_weight"), kwargs.get("reduction", "mean") == "mean"
    if weights is not None and mean and kwargs.get("avg_factor") is None:
        kwargs["avg_factor"] = weights[label[label != kwargs["ignore_index"]]].sum()
    return _upstreams_loss(pred, label, *args, **kwargs)


losses.cross_entropy = cross_entropy  # before a model is built: its losses keep the function they find


def upstream_config(task: Config) -> Upstream:
    """Upstream's packaged config `task.model`, on the classes of Cityscapes at the recipe's sizes.

    Raises UserError for a name upstream has not, or an option that the suite decides.
    """
    try:
        config = Upstream.fromfile(compat.mmseg_config(task["model"]))
    except ImportError as error:  # some configs want mmpretrain or mmdet
        raise UserError(f"task.model={task['model']}: {' '.join(str(error).split())}") from None
    if "backbone" not in config.model:
        raise UserError(f"task.model={task['model']}: this adapter needs a model of one backbone and its heads")
    _take_pipelines(config, task)
    config.model.data_preprocessor.size = tuple(task["crop"])
    for part in config.model.values():
        for head in part if isinstance(part, list) else [part]:
            if isinstance(head, dict) and "num_classes" in head:
                head["num_classes"] = len(CLASSES)
    for option in (options := flatten(task["options"])):
        free, owned = (any(f"{option}.".startswith(f"{key}.") for key in keys) for keys in (FREE, OWNED))
        if owned or not free:
            hint = "set task.weights or task.crop" if owned else f"free are {', '.join(FREE)}"
            raise UserError(f"task.options.{option}: other keys of the suite decide this; {hint}")
    if config.optim_wrapper.get("clip_grad") is None:
        config.optim_wrapper.pop("clip_grad", None)  # None takes no options
    try:
        config.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UserError(f"task.options do not fit upstream's config: {' '.join(str(error).split())[:200]}") from None
    config.model.pretrained = None  # load_weights does it, and checks that they fit
    config.model.backbone.pop("init_cfg", None)
    return config


def _take_pipelines(config: Upstream, task: Config) -> None:
    """The config's own augmentation if it is for Cityscapes, else that of upstream's Cityscapes; its sizes replaced."""
    cityscapes = Upstream.fromfile(CONFIGS / "_base_/datasets/cityscapes.py")
    own = config.get("train_dataloader", cityscapes.train_dataloader).dataset.type == cityscapes.dataset_type
    source = config if own else cityscapes
    for name, loader in (("train_pipeline", "train_dataloader"), ("test_pipeline", "val_dataloader")):
        config[name] = source[loader].dataset.pipeline
        for step in config[name]:
            if "scale" in step:
                step.scale = tuple(task["scale"])
            if "scales" in step:  # short sides, upstream's for pictures of 2048 x 1024
                step.scales = [round(side * min(task["scale"]) / 1024) for side in step.scales]
            if "crop_size" in step:
                step.crop_size = tuple(task["crop"])


def load_weights(model: nn.Module, weights: str) -> None:
    """Put `weights` into model: none, a file, a web address, or a name of upstream's zoos (open-mmlab://...).

    What has no segmentation head goes into the backbone, its classifier left out. Raises UserError, one line.
    """
    if weights == "none":
        return
    state = base.read_weights(weights, address(weights))
    if isinstance(state, dict):
        if not any(key.startswith("decode_head.") for key in state):
            model, state = model.backbone, _of_backbone(state, model.backbone)
        counts = {key: value for key, value in model.state_dict().items() if key.endswith(".num_batches_tracked")}
        state = {**counts, **state}  # files older than torch 0.4.1, such as torchvision's, have none
    base.refuse_misfit(model, state, weights)
    model.load_state_dict(state)


def address(weights: str) -> str | None:
    """Where upstream keeps what it calls `weights`; None for a path or a web address, which need no telling.

    Raises UserError for what upstream has not.
    """
    scheme, _, name = weights.rpartition("://")
    if scheme in ("", "http", "https", "file"):
        return None
    if scheme not in ZOOS:
        known = ", ".join(f"{zoo}://NAME" for zoo in ZOOS)
        raise UserError(f"task.weights={weights}: no such zoo; give a path, https://..., {known} or none")
    places = {key: place for key, place in ZOOS[scheme]().items() if place}
    name = get_deprecated_model_names().get(name, name)
    if name not in places:
        raise UserError(f"task.weights={weights}: {scheme} has no such weights; {nearest(name, places)} Or give a path")
    return places[name]


def _of_backbone(state: dict, backbone: nn.Module) -> dict:
    """A classifier's `state` without all that comes after its backbone."""
    if any(key.startswith("backbone.") for key in state):  # mmcls:// has the whole classifier
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    own = backbone.state_dict()
    return {key: value for key, value in state.items() if key in own or not key.startswith(CLASSIFIER)}
