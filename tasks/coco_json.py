"""COCO's layout: annotations/instances_<split>2017.json, checked against itself and the images in <split>2017/."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.folder import SPLITS, Data, digest_of, names, near, refuse_outside, some, wrong

log = logging.getLogger("budgeted")
# What is kept of a json.
KEPT = {"images", "annotated", "classes", "objects", "degenerate", "without_area", "without_mask", "crowds_without"}


def coco_files(root: Path, split: str) -> tuple[Path, Path]:
    """The json with a split's annotations and the folder of its images."""
    return root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"


def summary(name: str, root: Path) -> Data:
    """Counts and categories, in the order of their ids. Raises UserError."""
    train, val = (_split(root, split) for split in SPLITS)
    if train["classes"] != val["classes"]:
        odd = sorted(set(train["classes"]) ^ set(val["classes"]))
        what = f"train and val do not have the same categories{': ' + some(odd) if odd else ' by id'}"
        raise wrong(root, what, "both json files need the same list")
    for split, digest in zip(SPLITS, (train, val), strict=True):
        if not digest["annotated"]:
            where = coco_files(root, split)[0].relative_to(root)
            raise wrong(root, f"{where} has no object that is not a crowd", "annotate some: AP would be 0 without one")
    bare = len(train["images"]) - train["annotated"]
    classes, counts = tuple(train["classes"]), (train["annotated"], len(val["images"]))
    told = digest_of(classes, *([len(found["images"]), found["objects"]] for found in (train, val)))
    return Data(name, root, *counts, classes, left_out=bare, digest=told)


def _split(root: Path, split: str) -> dict[str, Any]:
    """The digest of a split whose images are all there."""
    path, folder = coco_files(root, split)
    where = path.relative_to(root)
    if not path.is_file():
        raise wrong(root, f"no {where}", _instead(root, path))
    found = digest(root, path)
    files = [PurePosixPath(name) for name, *_ in found["images"]]
    there = {parent: set(names(folder / parent)) for parent in {file.parent for file in files}}
    lost = [str(file) for file in files if file.name not in there[file.parent]]
    if lost:
        what = f"{where} lists images that are not in {folder.name}/: {some(lost)} of {len(files)}"
        raise wrong(root, what, f"unpack {folder.name}.zip here again")
    return found


def _instead(root: Path, path: Path) -> str:
    """What to do for a json of objects that is not there: COCO's own others say nothing of objects."""
    alien = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
    own = {coco_files(root, split)[0].name for split in SPLITS}
    there = [name for name in names(path.parent) if name.endswith(".json") and name not in own]
    if given := [name for name in there if not name.startswith(alien)]:
        return f"annotations/ holds {some(given, 3)}: rename or link the right one to that name"
    closest = near(path.name, path.parent) if path.parent.is_dir() else near("annotations", root)
    return f"unpack annotations_trainval2017.zip here, or put your own there by that name; {closest}"


def maskless(root: Path, split: str) -> str:
    """Which objects fail a model of masks for want of one, in words; '' for none. A crowd is looked at by the
    evaluation alone. Raises UserError for a fault in the json."""
    found = digest(root, coco_files(root, split)[0])
    if found["without_mask"]:
        return f"objects without a mask: {found['without_mask']}"
    crowds = found["crowds_without"] if split == "val" else ""
    return f"crowds without a mask: {crowds}" if crowds else ""


def digest(root: Path, path: Path) -> dict[str, Any]:
    """What listing and checking need of a COCO json, which is parsed once. Raises UserError for a fault in it.

    images: [file_name, width, height] each. annotated: how many images have an object that is not a crowd, those that
    are trained on. classes: names in the order of their ids. objects: how many of each class. degenerate,
    without_area, without_mask (of objects that are not a crowd), crowds_without: which are, counted in words, ''
    for none.
    """
    stat = path.stat()
    return _kept(root, path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # both splits of a set
def _kept(root: Path, path: Path, size: int, mtime: int) -> dict[str, Any]:
    return _cached(path, lambda: _digest(root, path))


def _tables(root: Path, path: Path) -> dict[str, Any]:
    """A COCO json with its faults ruled out. Raises UserError."""
    where = path.relative_to(root)
    try:
        tables = json.loads(path.read_bytes())
        fault = next(_faults(tables), None)
        for image in tables["images"]:
            refuse_outside(root, image["file_name"], str(where))
    except (ValueError, RecursionError):
        raise wrong(root, f"{where} is not json, or cut short", "unpack or write it again") from None
    except (LookupError, TypeError, AttributeError) as error:
        what = f"{where} is not of COCO's form ({type(error).__name__}: {error})"
        raise wrong(root, what, "expected {images, annotations, categories}, see cocodataset.org") from None
    if fault:
        raise wrong(root, f"{where}: {fault[0]}", fault[1])
    return tables


def _digest(root: Path, path: Path) -> dict[str, Any]:
    tables = _tables(root, path)
    rows, categories = tables["annotations"], sorted(tables["categories"], key=lambda c: c["id"])
    objects = Counter(row["category_id"] for row in rows)

    def which(test: Callable[[Mapping[str, Any]], bool]) -> str:
        ids = [str(row["id"]) for row in rows if test(row)]
        return some(ids) if ids else ""

    return {
        "images": [[image["file_name"], image["width"], image["height"]] for image in tables["images"]],
        "annotated": len({row["image_id"] for row in rows if not row.get("iscrowd") and _has_shape(row)}),
        "classes": [category["name"] for category in categories],
        "objects": [objects[category["id"]] for category in categories],
        "degenerate": which(_degenerate),
        "without_area": which(lambda row: min(row["bbox"][2:]) <= 0),
        "without_mask": which(lambda row: not row.get("segmentation") and not row["iscrowd"]),
        "crowds_without": which(lambda row: not row.get("segmentation") and row["iscrowd"]),
    }


def _degenerate(row: Mapping[str, Any]) -> bool:
    shape = row.get("segmentation")
    return isinstance(shape, list) and any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape)


def _has_shape(row: Mapping[str, Any]) -> bool:
    """Does detectron2 keep this object? It drops one whose polygons all have fewer than three points."""
    mask = row.get("segmentation")
    return not (isinstance(mask, list) and mask) or any(len(p) >= 6 and len(p) % 2 == 0 for p in mask)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


# Upstream and pycocotools read these of every object, the evaluation only after training.
REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bbox": (
        lambda v: isinstance(v, list) and len(v) == 4 and all(map(_finite, v)),
        "it is [x, y, width, height] in pixels",
    ),
    # What is kept of the evaluation, AP over objects of all sizes, is the same for any area.
    "area": (_finite, "it is a number of pixels; width x height of its box will do, the AP that is kept is the same"),
    "iscrowd": (lambda v: v in (0, 1), "it is 0, or 1 for a crowd"),
}


def _faults(tables: Mapping[str, list[Any]]) -> Iterator[tuple[str, str]]:
    """What is wrong and how to mend it, in pairs."""
    for kind in ("images", "annotations", "categories"):
        if not tables[kind]:
            yield f"the list of {kind} is empty", "training needs at least one"
        if len({row["id"] for row in tables[kind]}) < len(tables[kind]):
            yield f"two {kind} have the same id", "give each its own"
    sizes = {image["id"]: (image["height"], image["width"]) for image in tables["images"]}
    categories = {category["id"] for category in tables["categories"]}
    if nameless := [c["id"] for c in tables["categories"] if not isinstance(c.get("name"), str)]:
        yield f"category {nameless[0]} has no name", "give it one"
    if len({type(category) for category in categories}) > 1:
        yield "the ids of categories are of several types", "they are whole numbers"
    for row in tables["annotations"]:
        name = f"annotation {row['id']}"
        if row["category_id"] not in categories:
            span = f"{min(categories)} to {max(categories)}"
            yield f"{name} has category_id {row['category_id']}, which is not in categories", f"known ids: {span}"
        if row["image_id"] not in sizes:
            yield f"{name} has image_id {row['image_id']}, which is not in images", "remove it or add the image"
            continue
        for key, (good, form) in REQUIRED.items():
            if not good(row.get(key)):
                yield f"{name} has {f'{key} {str(row[key])[:60]}' if key in row else f'no {key}'}", form
        height, width = sizes[row["image_id"]]
        mask = row.get("segmentation")
        if isinstance(mask, dict) and list(mask["size"]) != [height, width]:
            yield f"{name} has a mask of {mask['size']}, its image is [{height}, {width}]", "size is [height, width]"
        elif isinstance(mask, dict) and isinstance(mask.get("counts"), list) and sum(mask["counts"]) != height * width:
            yield (
                f"{name} has a mask of {sum(mask['counts'])} pixels, its image {height * width}",
                "counts are its runs",
            )
        elif mask and not isinstance(mask, dict | list):
            yield f"{name} has segmentation {str(mask)[:60]!r}", "it is a list of polygons or a run-length mask"
        elif isinstance(mask, list) and any(_outside(polygon, height, width) for polygon in mask):
            yield f"{name} has a polygon outside its image of {width} x {height}", "points are x, y in pixels"


def _outside(polygon: list[float], height: float, width: float) -> bool:
    """Does a polygon leave its image by more than a twentieth? (Annotation tools overshoot by a pixel or two.)"""
    high = max(polygon[0::2], default=0) > 1.05 * width + 2 or max(polygon[1::2], default=0) > 1.05 * height + 2
    return high or min(polygon, default=0) < -0.05 * max(height, width) - 2


def _cached(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """compute(), kept in the user's cache folder while path's size and time stay: COCO's json takes half a minute."""
    stat = path.stat()
    if stat.st_size < 5_000_000:
        return compute()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:6".encode()).hexdigest()[:20]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "budgeted" / f"coco-{key}.json"
    with contextlib.suppress(OSError, ValueError):  # absent, or not ours to read
        kept = json.loads(home.read_text())
        if isinstance(kept, dict) and kept.keys() == KEPT:
            return kept
    result = compute()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        beside = home.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(result))
        beside.replace(home)
    except OSError:
        log.debug("%s cannot be written; the json will be parsed again", home)
    return result
