"""What a result says of where it was made."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = (
    *("torch", "torchvision", "numpy", "hydra-core", "pillow", "pytorchvideo", "av", "detectron2", "sal-detectron2"),
    *("pycocotools", "mmsegmentation", "mmengine", "mmcv-lite", "schedulefree"),
)


def device_name(device: torch.device) -> str:
    """`cuda: NVIDIA H200` or `cpu: <processor>, 2 cores`."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"cpu: {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def peak_memory(device: torch.device) -> int:
    """Bytes since `forget_peak_memory`: of the GPU's allocator, or what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew: a sweep trains its cells in one process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # where it cannot be, the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
