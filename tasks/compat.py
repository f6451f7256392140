"""Shims that let the upstreams import and run beside a current torch. One function per upstream, called on use."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from budgeted.errors import UserError

DETECTRON2_COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"  # of the sources this was tried with
INSTALL = {
    "mmsegmentation": "pip install mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0 ftfy regex",
    "detectron2": "pip install --no-build-isolation "
    f"'git+https://github.com/facebookresearch/detectron2@{DETECTRON2_COMMIT}'",
}


def _unusable(upstream: str, what: str) -> UserError:
    return UserError(f"this task runs on {upstream}, and {what} cannot be imported: {INSTALL[upstream]}")


def mmseg() -> ModuleType:
    """Import mmsegmentation with everything it registers, with or without mmcv's compiled ops. Idempotent.

    mmseg imports mmcv.ops, which asks for `mmcv._ext`, compiled code that mmcv-lite has not and PSPNet does not
    need. A stub stands in during the import and is taken out after it: mmengine takes a findable `mmcv._ext` for
    a full mmcv, and would look for its SyncBN there.
    """
    missing = [name for name in ("mmengine", "mmcv", "mmseg", "ftfy", "regex") if not importlib.util.find_spec(name)]
    if missing:
        raise _unusable("mmsegmentation", ", ".join(missing))
    stub = "mmcv._ext" not in sys.modules and not importlib.util.find_spec("mmcv._ext")
    if stub:
        sys.modules["mmcv._ext"] = _NoCompiledOps("mmcv._ext")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in ("datasets", "evaluation", "models"):
                importlib.import_module(f"mmseg.{part}")
    except ImportError as error:
        raise _unusable("mmsegmentation", f"mmseg.{part} ({error})") from error
    except AssertionError as error:  # how mmseg refuses an mmcv or mmengine of another version
        raise UserError(f"mmsegmentation: {' '.join(str(error).split())}") from None
    finally:
        if stub:
            del sys.modules["mmcv._ext"]
    return sys.modules["mmseg"]


def mmseg_config(name: str) -> Path:
    """The file of mmsegmentation's packaged config `name`, found without importing upstream or torch.

    Raises UserError, with the nearest, where there is none.
    """
    spec = importlib.util.find_spec("mmseg")
    if spec is None:
        mmseg()  # says what to install
    found = {path.stem: path for path in Path(spec.origin).parent.glob(".mim/configs/[!_]*/*.py")}  # type: ignore
    if not found:
        raise _unusable("mmsegmentation", "mmseg's packaged configs (.mim)")
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0)
        raise UserError(f"task.model={name}: mmsegmentation has no such config; the nearest is {', '.join(near)}")
    return found[name]


# The suite's own small models, beside those of the upstreams (tasks/classification.py, tasks/video.py).
OWN_MODELS = {"classification": ("resnet18_cifar", "resnet20", "resnet_narrow"), "video": ("tiny",)}
# Where an upstream defines its models: (package, files, what stands before a name).
_DEFINED = {
    "classification": ("torchvision", "models/*.py", r"^@register_model\(\)\n(?:(?!def ).*\n)*?def (\w+)\("),
    "video": ("pytorchvideo", "models/hub/[!u]*.py", r"^def ([a-z]\w*)\("),  # but utils.py
}


def model_names(adapter: str) -> list[str]:
    """What task.model may name under this adapter, read off the upstream's files: nothing is imported.

    Empty where the upstream is not installed.
    """
    package, files, pattern = _DEFINED[adapter]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    sources = (path.read_text(encoding="utf-8") for path in Path(spec.origin).parent.glob(files))
    found = {name for text in sources for name in re.findall(pattern, text, re.MULTILINE)}
    kept = {name for name in found if not name.endswith(("_detection", "_base_16"))}  # those do not classify clips
    return sorted({*kept, *OWN_MODELS[adapter]})


class _NoCompiledOps(ModuleType):
    """Stands for mmcv._ext: has any op by name, and none that can be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def op(*args: Any, **kwargs: Any) -> None:
            raise UserError(
                f"mmcv's compiled op {name!r} is not in mmcv-lite: choose a task.model that needs none, "
                "or install mmcv 2.1.0 built for this torch"
            )

        return op


def detectron2() -> ModuleType:
    """Import detectron2's engine, evaluation and model zoo, with or without its compiled part. Idempotent.

    Without `detectron2._C` upstream itself puts a class that explains the matter in place of each compiled
    layer; Mask R-CNN, Faster R-CNN and RetinaNet need none. Its model zoo finds its files by pkg_resources, which
    setuptools 81 took away: a stand-in for the one function it calls serves during the import.
    """
    missing = [name for name in ("detectron2", "fvcore", "iopath", "pycocotools") if not importlib.util.find_spec(name)]
    if missing:
        raise _unusable("detectron2", ", ".join(missing))
    stub = "pkg_resources" not in sys.modules and not importlib.util.find_spec("pkg_resources")
    if stub:
        sys.modules["pkg_resources"] = ModuleType("pkg_resources")
        sys.modules["pkg_resources"].resource_filename = _resource_filename  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.script and pkg_resources are on their way out
            for part in ("engine", "evaluation", "model_zoo"):
                importlib.import_module(f"detectron2.{part}")
    except ImportError as error:
        raise _unusable("detectron2", f"detectron2.{part} ({error})") from error
    finally:
        if stub:
            del sys.modules["pkg_resources"]
    for message in ("torch.meshgrid", "The given NumPy array is not writable"):  # said once a run, of upstream's code
        warnings.filterwarnings("ignore", message)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    return sys.modules["detectron2"]


def _resource_filename(package: str, path: str) -> str:
    return str(Path(str(sys.modules[package].__file__)).parent / path)
