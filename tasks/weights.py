"""What task.weights stands for: a path, an address, or a name whose address an upstream knows.

`address` tells a name that there is not before torch is imported: it reads the upstreams' own files. `look` is
mode=check's part: where weights come from, whether they are here, and whether they fit the model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from budgeted.errors import UserError, nearest
from tasks import compat, zoo

WEB = ("http", "https", "file")


def address(cfg: Mapping[str, Any]) -> str | None:
    """Where task.weights are fetched from; None for `none`, a path, and what only upstream itself can tell.

    Raises UserError for a name or a path that there is not."""
    weights, adapter = cfg["task"]["weights"], cfg["task"]["adapter"]
    scheme, _, name = weights.rpartition("://")
    if weights == "none" or (adapter == "segmentation" and scheme == "torchvision"):
        return None
    if scheme in WEB:
        return weights
    if adapter == "detection" and scheme:
        return zoo.address(weights)
    if scheme == "torchvision" and adapter == "video":
        if (models := compat.model_names("classification")) and name not in models:
            raise UserError(f"task.weights={weights}: torchvision has no such model; {nearest(name, models)}")
        return _known(weights, "IMAGENET1K_V1", of_torchvision(name), f"torchvision has no such weights of {name}")
    if scheme in OPENMMLAB and adapter == "segmentation":
        places = _of_openmmlab(scheme)
        name = _openmmlab("deprecated").get(name, name)
        return _known(weights, name, places, f"{scheme} has no such weights")
    if scheme:
        own = {"video": ["torchvision"], "segmentation": [*OPENMMLAB, "torchvision"]}.get(adapter, [])
        known = ", ".join([*(f"{zoo}://NAME" for zoo in own), "https://..."])
        raise UserError(f"task.weights={weights}: no such source here; give a path, {known} or none")
    own_names = of_torchvision(cfg["task"]["model"]) if adapter == "classification" else {}
    if weights not in own_names and not Path(weights).expanduser().is_file():
        what = f"no such file, nor weights of {cfg['task']['model']}" if own_names else "no such file"
        hint = nearest(weights, own_names) if own_names else "give a path, or none"
        raise UserError(f"task.weights={weights}: {what}; {hint}")
    return own_names.get(weights)


def _known(weights: str, name: str, places: Mapping[str, str], what: str) -> str | None:
    """The place of a name; None where the upstream is not installed, so that nothing is known."""
    if places and name not in places:
        raise UserError(f"task.weights={weights}: {what}; {nearest(name, places)} Or give a path")
    return places.get(name)


@cache
def of_torchvision(model: str) -> dict[str, str]:
    """Name -> address of torchvision's weights of a model, read off its file; none where there is no such model."""
    spec = importlib.util.find_spec("torchvision")
    for path in Path(spec.origin).parent.glob("models/*.py") if spec and spec.origin else ():
        text = path.read_text(encoding="utf-8")
        start = text.find(f"\ndef {model}(")
        if start < 0 or not (enum := re.search(r"weights: Optional\[(\w+)\]", text[start : start + 400])):
            continue
        body = text[text.find(f"\nclass {enum[1]}(") :]
        body = body[: body.find("\n\n\n")]
        found = dict(re.findall(r'^    (\w+) = Weights\((?:\s*#[^\n]*)*\s+url="([^"]+)"', body, re.MULTILINE))
        return found | {k: found[v] for k, v in re.findall(r"^    (\w+) = (\w+)$", body, re.MULTILINE) if v in found}
    return {}


OPENMMLAB = {"open-mmlab": "openmmlab", "openmmlab": "openmmlab", "mmcls": "mmcls"}  # zoo -> mmengine's list of it


def _of_openmmlab(scheme: str) -> dict[str, str]:
    found = _openmmlab(OPENMMLAB[scheme])
    own = Path(os.environ.get("MMENGINE_HOME") or _cache("mmengine")).expanduser() / "open_mmlab.json"
    if found and scheme != "mmcls" and own.is_file():
        found = found | json.loads(own.read_text())
    return {name: place for name, place in found.items() if place}


@cache
def _openmmlab(name: str) -> dict[str, str]:
    spec = importlib.util.find_spec("mmengine")
    return json.loads((Path(spec.origin).parent / f"hub/{name}.json").read_text()) if spec and spec.origin else {}


def _cache(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / name


def kept(adapter: str, place: str) -> Path:
    """The file that an upstream keeps of what it fetched from `place`."""
    path = urlparse(place).path
    if adapter == "detection":
        return Path(os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache").expanduser() / path.lstrip("/")
    home = Path(os.environ.get("TORCH_HOME") or _cache("torch")).expanduser()
    return home / "hub/checkpoints" / Path(path).name


def look(cfg: Mapping[str, Any], classes: int) -> tuple[list[str], list[str]]:
    """What to say of cfg's weights, and what is wrong with them. Those that are here are tried on the model."""
    weights, adapter = cfg["task"]["weights"], cfg["task"]["adapter"]
    if weights == "none":
        return [], []
    place, said = address(cfg), []
    if place is None and weights.startswith("torchvision://"):
        from tasks import mmzoo

        place = mmzoo.address(weights)
    if place is not None:
        file = kept(adapter, place)
        where = f"kept in {file}" if file.is_file() else "not here yet: a run fetches them"
        said.append(f"task.weights={weights}: from {place}, {where}")
        if not file.is_file():
            return said, []
    try:
        TRY[adapter](cfg, classes)
    except UserError as error:
        return said, [str(error)]
    return [*said, f"task.weights={weights}: they fit {cfg['task']['model']}"], []


def _try_classification(cfg: Any, classes: int) -> None:
    from tasks import base, classification

    weights = cfg["task"]["weights"]
    named = weights in of_torchvision(cfg["task"]["model"])
    model = classification.build_model(cfg["task"]["model"], classes, weights if named else "none")
    if not named:
        base.load_weights(model, weights)


def _try_video(cfg: Any, classes: int) -> None:
    from tasks import video

    video.make_model(cfg["task"], classes)


def _try_detection(cfg: Any, classes: int) -> None:
    node = zoo.config(cfg, classes, "cpu")
    from detectron2.modeling import build_model

    from tasks import detection  # noqa: F401  registers what a recipe's options may name

    zoo.load_weights(build_model(node), cfg["task"]["weights"])


def _try_segmentation(cfg: Any, classes: int) -> None:
    from tasks import mmzoo, segmentation

    with segmentation.quiet():
        model = segmentation.MODELS.build(mmzoo.upstream_config(cfg["task"]).model)
    mmzoo.load_weights(model, cfg["task"]["weights"])


TRY = {
    "classification": _try_classification,
    "video": _try_video,
    "detection": _try_detection,
    "segmentation": _try_segmentation,
}
