"""Image classification: torchvision's models, transforms and datasets under the native loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

from budgeted.errors import UserError, nearest
from tasks import layouts
from tasks.base import Native, load_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Classification(Native):
    """Any torchvision classification model, or one of `SMALL`, on class folders or CIFAR-10."""

    def make_model(self) -> nn.Module:
        task = self.cfg["task"]
        model = build_model(task["model"], self.classes, task["weights"])
        if task["weights"] != "none" and not _is_enum(task["model"], task["weights"]):
            load_weights(model, task["weights"])
        return model

    def train_dataset(self) -> Dataset:
        return self._dataset("train", train_transform(self.cfg["task"]))

    def val_dataset(self) -> Dataset:
        return self._val

    @cached_property
    def _val(self) -> Dataset:  # once, not for each evaluation
        return self._dataset("val", val_transform(self.cfg["task"]))

    def _dataset(self, split: str, transform: Callable) -> Dataset:
        root, keep = Path(self.data.root), self.cfg["data"]["subset"] if split == "train" else None
        if layouts.is_cifar10(root) or layouts.is_packed(root):
            whole = layouts.cifar10(root)[split] if layouts.is_cifar10(root) else layouts.packed.arrays(root, split)
            kept = layouts.subset(len(whole[1]), keep)
            images, labels = (part[kept] for part in whole) if keep else whole
            return Arrays(images, labels, transform)
        samples = layouts.images(root, split)[1]
        return Folder([samples[k] for k in layouts.subset(len(samples), keep)], transform)


class Arrays(Dataset):
    """Images (N, H, W, 3) of uint8 and labels (N,) in memory."""

    torch_only = True  # torchvision's v2 transforms draw from nothing else

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable) -> None:
        self.images, self.labels, self.transform = (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            labels,
            transform,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class Folder(Dataset):
    """Image files and their class indices. A file that cannot be decoded ends the run with its path."""

    torch_only = True

    def __init__(self, samples: list[tuple[str, int]], transform: Callable) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be decoded ({error}); replace or remove it") from None
        return self.transform(v2.functional.pil_to_tensor(pixels)), label


def train_transform(task: dict[str, Any]) -> Callable:
    """From a uint8 image (3, H, W) to a normalised float tensor of `task.size`."""
    size = task["size"]
    if task["augment"] == "cifar":  # PAPER.md 3.1: pad 4 and crop, flip
        steps: list[nn.Module] = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    else:  # PAPER.md 9: the PyTorch example's random resized crop and flip
        steps = [
            v2.RandomResizedCrop(size, scale=tuple(task["crop_scale"]), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    return v2.Compose([*steps, *_normalise(task)])


def val_transform(task: dict[str, Any]) -> Callable:
    """Resize to 8/7 of the crop and take the centre (256 and 224); CIFAR-size images are taken as they are."""
    size = task["size"]
    if task["augment"] == "cifar":
        return v2.Compose(_normalise(task))
    return v2.Compose([v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size), *_normalise(task)])


def _normalise(task: dict[str, Any]) -> list[nn.Module]:
    mean, std = (CIFAR_MEAN, CIFAR_STD) if task["augment"] == "cifar" else (IMAGENET_MEAN, IMAGENET_STD)
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def resnet18_cifar(num_classes: int) -> nn.Module:
    """ResNet-18 for 32x32 images: a 3x3 stem of stride 1 and no max-pool (PAPER.md 3.1, [LL])."""
    return _small_stem(models.resnet18(num_classes=num_classes), 64)


def resnet_narrow(num_classes: int) -> nn.Module:
    """A ResNet of one block a stage and 16 to 128 channels, its stem a 3x3 of stride 2: seconds on a CPU."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    shrink = {64: 16, 128: 32, 256: 64, 512: 128}
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            new = nn.Conv2d(
                shrink.get(module.in_channels, module.in_channels),
                shrink[module.out_channels],
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=False,
            )
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(shrink[module.num_features])
        if new is not None:
            model.set_submodule(name, new)
    model.fc = nn.Linear(128, num_classes)
    return _small_stem(model, 16, stride=2)


def _small_stem(model: ResNet, width: int, stride: int = 1) -> ResNet:
    model.conv1 = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


class _CifarBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions; a change of width is padded with zeros, without parameters."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.extra)))


def resnet20(num_classes: int) -> nn.Module:
    """The CIFAR ResNet of 20 layers (He et al. 2016, Sec. 4.2): 3 stages of 3 blocks, 16, 32, 64 channels."""
    blocks: list[nn.Module] = []
    before = 16
    for width in (16, 32, 64):
        for k in range(3):
            blocks.append(_CifarBlock(before, width, 2 if k == 0 and width > 16 else 1))
            before = width
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight)
    return model


SMALL: dict[str, Callable[[int], nn.Module]] = {
    "resnet18_cifar": resnet18_cifar,
    "resnet20": resnet20,
    "resnet_narrow": resnet_narrow,
}


def build_model(name: str, classes: int, weights: str = "none") -> nn.Module:
    """A model with `classes` outputs; torchvision's own weights by name (e.g. IMAGENET1K_V1) but for the last layer.

    Raises UserError for a name that neither torchvision's classification models nor `SMALL` know.
    """
    if name in SMALL:
        return SMALL[name](classes)
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"task.model={name}: no such classification model; {nearest(name, [*known, *SMALL])}")
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, num_classes=classes, **plain)  # the loop takes one output
    if _is_enum(name, weights):
        try:
            state = models.get_model_weights(name)[weights].get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # no network
            url = models.get_model_weights(name)[weights].url
            raise UserError(f"task.weights={weights}: cannot be fetched from {url} ({error}); give a path") from None
        own = model.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict(fitting, strict=False)
    return model


def _is_enum(name: str, weights: str) -> bool:
    return name not in SMALL and weights in models.get_model_weights(name).__members__
