"""mmsegmentation's model zoo: its packaged configs with a recipe's values in them, and weights that are checked."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from budgeted.errors import UserError
from budgeted.recipe import Config, flatten
from tasks import base, compat

mmseg = compat.mmseg()  # before what follows: importing it needs a stand-in for mmcv's compiled part

from mmengine import Config as Upstream  # noqa: E402
from mmengine.runner.checkpoint import get_external_models  # noqa: E402
from mmseg.datasets import CityscapesDataset  # noqa: E402

CONFIGS = Path(str(mmseg.__file__)).parent / ".mim" / "configs"
CLASSES = CityscapesDataset.METAINFO["classes"]
FREE = ("model", "train_pipeline", "test_pipeline", "env_cfg", "optim_wrapper.clip_grad", "optim_wrapper.paramwise_cfg")
OWNED = ("model.pretrained", "model.backbone.pretrained", "model.backbone.init_cfg", "model.data_preprocessor.size")


def upstream_config(task: Config) -> Upstream:
    """Upstream's packaged config `task.model`, on the classes and augmentation of its Cityscapes at the recipe's sizes.

    Raises UserError for a name upstream has not, or an option that the suite decides.
    """
    try:
        config = Upstream.fromfile(compat.mmseg_config(task["model"]))
    except ImportError as error:  # some configs want mmpretrain or mmdet
        raise UserError(f"task.model={task['model']}: {' '.join(str(error).split())}") from None
    if "backbone" not in config.model:
        raise UserError(f"task.model={task['model']}: this adapter needs a model of one backbone and its heads")
    cityscapes = Upstream.fromfile(CONFIGS / "_base_/datasets/cityscapes.py")
    for name in ("train_pipeline", "test_pipeline"):
        config[name] = cityscapes[name]
        for step in config[name]:
            if "scale" in step:
                step.scale = tuple(task["scale"])
            if "crop_size" in step:
                step.crop_size = tuple(task["crop"])
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


def load_weights(model: nn.Module, weights: str) -> None:
    """Put `weights` into model: none, a file, a web address, or a name of upstream's zoo (open-mmlab://...).

    What holds a backbone alone goes into the backbone, its ImageNet classifier left out. Raises UserError, one line.
    """
    if weights == "none":
        return
    scheme, _, name = weights.rpartition("://")
    state = base.read_weights(weights, get_external_models().get(name) if scheme == "open-mmlab" else None)
    if isinstance(state, dict) and not any(key.startswith("backbone.") for key in state):
        model, state = model.backbone, {key: value for key, value in state.items() if not key.startswith("fc.")}
    base.refuse_misfit(model, state, weights)
    model.load_state_dict(state)
