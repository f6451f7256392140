"""Video classification: pytorchvideo's models on clips that PyAV decodes, trained by the native loop of tasks/base.py.

A sample is uint8 until it is on the model's device and normalised there: a quarter of the bytes to collate and to send.
A training sample is (C, T, H, W), a validation sample (views, C, T, H, W); the softmax of its views is averaged.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from budgeted.errors import UserError, nearest
from tasks import layouts
from tasks.base import Config, DataSummary, Native, Session, read_weights, refuse_misfit, upstream
from tasks.clips import Clips, TestViews, TrainView

log = logging.getLogger("budgeted")
MEAN, STD = 0.45, 0.225  # of all three channels: video-nonlocal-net's 114.75 and 57.375, over 255
ALPHA = 4  # frames of SlowFast's fast pathway for one of the slow, in all of pytorchvideo's models


class Video(Native):
    """The clips of a Kinetics folder, classified by a model of pytorchvideo."""

    views = True
    memory_format = torch.channels_last_3d

    def __init__(self, cfg: Config, data: DataSummary, device: torch.device) -> None:
        super().__init__(cfg, data, device)
        task = self.task = cfg["task"]
        self.norm_decay, self.refresh_batches = task["norm_decay"], task["precise_bn"]

    def make_model(self) -> nn.Module:
        return make_model(self.task, self.classes)

    def build(self, session: Session) -> None:
        super().build(session)
        self._try_a_view()

    def _try_a_view(self) -> None:
        """Raise UserError where the model does not take a test's views: it would be known at the end of the budget."""
        task = self.task
        view = torch.zeros(1, 1, 3, task["frames"], task["test_crop"], task["test_crop"], device=self.device)
        self.model.eval()
        try:
            with torch.no_grad():
                self._scores(view)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:120]
            raise UserError(
                f"task.test_crop={task['test_crop']}: {task['model']} takes no such views ({why}); "
                f"task.test_crop={task['crop']}, as in training"
            ) from error
        self._training_mode()

    def train_dataset(self) -> Clips:
        task, items = self.task, self._items("train")
        kept = layouts.subset(len(items), self.cfg["data"]["subset"])
        view = TrainView(task["frames"], task["stride"], task["scale"], task["crop"], task["flip"])
        return Clips([items[k] for k in kept], view)

    def val_dataset(self) -> Clips:
        task = self.task
        view = TestViews(task["frames"], task["stride"], task["clips"], task["crops"], task["test_crop"])
        return Clips(self._items("val"), view)

    def _items(self, split: str) -> list[tuple[str, int]]:
        return layouts.clips(layouts.data_root(self.cfg), split)[1]

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.float().sub_(255 * MEAN).div_(255 * STD)
        return x.contiguous(memory_format=self.memory_format) if self.cfg["channels_last"] and x.ndim == 5 else x


# Models and their weights.


def make_model(task: Config, num_classes: int) -> nn.Module:
    """pytorchvideo's model with the recipe's options, dropout and weights. Takes float (B, C, T, H, W).

    Its own initialisation zeroes the last gamma of every residual block. Raises UserError.
    """
    known, name = models(), task["model"]
    if name not in known:
        raise UserError(f"task.model={name}: pytorchvideo has no such model; {nearest(name, known)}")
    classes = {"mvit": "head_num_classes", "efficient": "num_classes"}.get(name.split("_")[0], "model_num_class")
    try:
        model = known[name](**{classes: num_classes}, **task["options"])
    except (TypeError, AssertionError) as error:
        raise UserError(f"task.options={task['options']}: pytorchvideo's {name} refuses them: {error}") from None
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    if task["dropout"] and not dropouts:
        raise UserError(f"task.dropout={task['dropout']}: pytorchvideo's {name} has none; task.dropout=0")
    for module in dropouts:
        module.p = task["dropout"]
    for module in model.modules():
        if isinstance(getattr(module, "activation", None), nn.Softmax):  # X3D's head: the loss takes logits
            module.activation = None  # type: ignore[assignment]
    if task["weights"] != "none":
        load_weights(model, task["weights"])
    if name.startswith("slowfast"):
        model.register_forward_pre_hook(_pathways)
    return model


def _pathways(model: nn.Module, inputs: tuple[Tensor]) -> tuple[list[Tensor]]:
    return ([inputs[0][:, :, ::ALPHA], inputs[0]],)


def models() -> dict[str, Callable[..., nn.Module]]:
    """What task.model may name: the models of pytorchvideo's hub that classify clips, and `tiny`."""
    with warnings.catch_warnings():  # it uses torch.jit.script, which warns of its own end
        warnings.simplefilter("ignore")
        hub = upstream("pytorchvideo.models.hub", "pip install pytorchvideo==0.1.5")
    found = {k: v for k, v in vars(hub).items() if callable(v) and not k.endswith(("_detection", "_base_16"))}
    return {**found, "tiny": tiny}


def tiny(model_num_class: int, width: int = 8, depths: Sequence[int] = (1, 1, 1)) -> nn.Module:
    """pytorchvideo's parts in i3d_r50's order: `width` channels in the stem, depths[k] residual blocks in stage k."""
    from pytorchvideo.models import head, net, resnet, stem

    dims = [width, *(4 * width * 2**k for k in range(len(depths)))]
    parts = [
        stem.create_res_basic_stem(
            in_channels=3, out_channels=width, conv_kernel_size=(3, 5, 5), conv_padding=(1, 2, 2)
        )
    ]
    for k, depth in enumerate(depths):
        sizes = {"depth": depth, "dim_in": dims[k], "dim_inner": dims[k + 1] // 4, "dim_out": dims[k + 1]}
        strides = {"conv_a_stride": (1, 1, 1), "conv_b_stride": (1, 2, 2) if k else (1, 1, 1)}
        parts.append(resnet.create_res_stage(bottleneck=resnet.create_bottleneck_block, **sizes, **strides))
    parts.append(
        head.create_res_basic_head(in_features=dims[-1], out_features=model_num_class, pool=nn.AdaptiveAvgPool3d)
    )
    return net.Net(blocks=nn.ModuleList(parts))


def load_weights(model: nn.Module, source: str) -> None:
    """Load task.weights: a path, an address, or torchvision://NAME. A 2D ResNet of torchvision's is inflated.

    A classifier of another number of classes keeps its random start; all else must fit. Raises UserError.
    """
    own = model.state_dict()
    state = read_weights(source, _address(source), "give a path, torchvision://resnet50 or none")
    if isinstance(state, dict):
        state = inflate(state, own) if "layer1.0.conv1.weight" in state else dict(state)
        head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        fresh = [k for k in own if k.startswith(f"{head}.") and getattr(state.get(k), "shape", None) != own[k].shape]
        state.update({k: own[k] for k in fresh})
    refuse_misfit(model, state, source)
    model.load_state_dict(state)
    log.info("weights of %s%s", source, f"; {', '.join(fresh)} start at random" if fresh else "")


def _address(source: str) -> str:
    """Where torchvision://NAME lies; anything else as it is."""
    name = source.removeprefix("torchvision://")
    if name == source:
        return source
    from torchvision import models

    try:
        return models.get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError):
        raise UserError(f"task.weights={source}: torchvision has no such weights; try torchvision://resnet50") from None


def inflate(images: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's 2D ResNet under the names of pytorchvideo's 3D one, without its classifier.

    A kernel of t planes gets t copies of the 2D one over t, as in video-nonlocal-net: a still clip gives what the
    picture gave, but at its ends, where the padding shows.
    """
    stages = sorted({int(k.split(".")[1]) for k in own if ".res_blocks." in k})
    theirs = {"blocks.0.conv.": "conv1.", "blocks.0.norm.": "bn1."}
    theirs |= {f"blocks.{s}.res_blocks.": f"layer{i}." for i, s in enumerate(stages, 1)}
    theirs |= {"branch1_conv.": "downsample.0.", "branch1_norm.": "downsample.1."}
    theirs |= {
        f"branch2.{part}_{x}.": f"{name}{i}."
        for i, x in enumerate("abc", 1)
        for part, name in (("conv", "conv"), ("norm", "bn"))
    }
    pattern = re.compile("|".join(map(re.escape, theirs)))
    state = {}
    for key, value in own.items():
        flat = images.get(pattern.sub(lambda found: theirs[found[0]], key))
        if flat is not None and flat.ndim == 4:
            flat = flat[:, :, None].expand(-1, -1, value.shape[2], -1, -1) / value.shape[2]
        if flat is not None:
            state[key] = flat
    return state
