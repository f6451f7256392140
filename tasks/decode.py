"""What only decoding shows of a data folder: the findings of mode=check, each a line of path, fault and fix."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from budgeted.errors import UserError
from tasks import coco_json, layouts, zoo
from tasks.folder import SPLITS, Data, in_line

log = logging.getLogger("budgeted")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises
LOCAL = {"protocol_whitelist": "file"}  # a playlist that calls itself .mp4 reaches no network
AGAIN = "remove it and run mode=prepare"
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
SHOWN = 20  # of the missing clips, of which a large set has thousands

Take = Callable[[Sequence[Any]], Iterator[Any]]  # some of the files of a split


def findings(cfg: Mapping[str, Any], data: Data, sample: int, seconds: float) -> tuple[Data, list[str], int]:
    """data with the clips that cannot be decoded among the missing, a line for each finding, and how many files were
    decoded: `sample` of each split in random order, and more for as long as `seconds` are not over."""
    decoded = itertools.count()

    def take(items: Sequence[Any]) -> Iterator[Any]:
        end = time.monotonic() + seconds
        for k, item in enumerate(random.Random(0).sample(items, len(items))):
            if k >= sample and time.monotonic() > end:
                return
            next(decoded)
            yield item

    look: dict[str, Callable[[Data, Take, int], Iterator[tuple[str, str]]]] = {
        "classification": _pictures,
        "segmentation": _labels,
        "detection": _objects,
        "video": _clips,
    }
    adapter, broken = cfg["task"]["adapter"], list[str]()
    if adapter == "segmentation":
        data = replace(data, passed_over=tuple(layouts.no_streets(data.root)))
    elif adapter == "classification" and not layouts.is_cifar10(data.root) and not layouts.is_packed(data.root):
        passed, broken = layouts.no_images(data.root)
        data = replace(data, passed_over=tuple(passed))
    found = [(path, "has an image's name and is no file: remove it") for path in broken]
    found += _misfits(cfg) if adapter == "detection" else _missing(data)
    least = int(cfg["task"].get("frames", 1))
    seen = [finding for finding in look[adapter](data, take, least) if finding[0] not in broken]
    if adapter == "video":
        data = replace(data, missing=tuple(dict.fromkeys((*data.missing, *(path for path, _ in seen)))))
    return data, [in_line(f"{path}: {what}") for path, what in (*found, *seen)], next(decoded)


def picture_fault(path: str | Path) -> str | None:
    """Why Pillow cannot decode an image, or None."""
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        return reason(error, path)
    return None


def reason(error: BaseException, path: str | Path) -> str:
    """What Pillow says of a file, in one line and without its path, which the message has already."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return str(error).split("\n")[0].replace(f"{str(path)!r}", "the file")


def clip_fault(path: str | Path, least: int = 1) -> str | None:
    """Why PyAV cannot decode a video to its end, or that it has fewer than `least` frames, or None."""
    import av

    try:
        with av.open(str(path), options=LOCAL) as clip:
            if not clip.streams.video:
                return "no video stream"
            promised = clip.streams.video[0].frames
            count = sum(1 for _ in clip.decode(video=0))
    except (av.FFmpegError, OSError) as error:
        return f"cannot be decoded ({error.strerror})"
    if count < 0.9 * promised:
        return f"ends early: {count} of {promised} frames"
    return f"{count} frames, {least} are needed" if count < least else None


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as detectron2 and mmseg read a picture: turned as its EXIF orientation says."""
    try:
        turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
    except Exception:  # damaged EXIF fails in many ways, and the upstreams take it for none
        turned = False
    return image.size[::-1] if turned else image.size


def label_fault(picture: str | Path, label: str | Path) -> str | None:
    """Why a labelTrainIds image does not go with its picture, and the fix, or None. mmseg heeds the picture's EXIF
    orientation and not the label's."""
    try:
        with Image.open(picture) as image, Image.open(label) as ids:
            if (shown := shown_size(image)) != ids.size:
                turned = _turned(image, shown)
                fix = "store the picture without the tag" if turned else AGAIN
                return f"is {ids.size[0]} x {ids.size[1]}, its picture {shown[0]} x {shown[1]}{turned}: {fix}"
            pixels = np.asarray(ids)
    except UNREADABLE as error:
        return f"cannot be decoded ({reason(error, label)}): {AGAIN}"
    if pixels.ndim != 2:
        return f"has colours instead of one id a pixel: {AGAIN}"
    odd = [int(v) for v in np.unique(pixels) if v >= len(layouts.STREET_CLASSES) and v != 255]
    return f"has unknown ids {odd}, known are 0 to 18 and 255: {AGAIN}" if odd else None


def _within(data: Data, path: str | Path) -> str:
    return str(Path(path).relative_to(data.root))


def _pictures(data: Data, take: Take, _: int) -> Iterator[tuple[str, str]]:
    if layouts.is_packed(data.root):  # nothing to decode
        return
    if layouts.is_cifar10(data.root):
        try:
            parts = layouts.cifar10(data.root)
        except UserError as error:
            path, _sep, what = str(error).partition(": ")
            yield path, what
            return
        for split, (_images, numbers) in parts.items():
            if numbers.min() < 0 or numbers.max() > 9:
                yield split, f"labels go from {numbers.min()} to {numbers.max()}, not 0 to 9: get the set again"
        return
    for split in SPLITS:
        for path, _ in take(layouts.images(data.root, split)[1]):
            fault = picture_fault(path)
            if fault:
                yield _within(data, path), f"{fault}: replace or remove it"


def _labels(data: Data, take: Take, _: int) -> Iterator[tuple[str, str]]:
    for split in SPLITS:
        for picture, label in take(layouts.streets(data.root, split)):
            fault = picture_fault(picture)
            if fault:
                yield _within(data, picture), f"{fault}: unpack leftImg8bit_trainvaltest.zip again"
            elif fault := label_fault(picture, label):
                yield _within(data, label), fault


def _missing(data: Data) -> Iterator[tuple[str, str]]:
    """The first of the clips that are listed and cannot be used, and where all of them are named."""
    before = layouts.lost_before(data.root) if data.missing else {}
    for clip in data.missing[:SHOWN]:
        fix = "get it again or take it off the list"
        if clip in before:
            why, fix = f"{before[clip]}, says missing.txt", "get it and run mode=prepare again"
        elif (data.root / clip).exists():
            why = layouts.mp4_fault(data.root / clip) or "a hidden file"
        else:
            why = "absent"
        yield clip, f"{why}: training leaves it out; {fix}"
    if len(data.missing) > SHOWN:
        known = before.keys() >= set(data.missing)
        listed = "missing.txt names them all" if known else "mode=prepare writes them all to a missing.txt"
        yield f"{len(data.missing) - SHOWN} more clips", f"{len(data.missing)} are missing in all: {listed}"


def _clips(data: Data, take: Take, least: int) -> Iterator[tuple[str, str]]:
    for split in SPLITS:
        for path, _ in take(layouts.clips(data.root, split)[1]):
            fault = clip_fault(path, least)
            if fault:
                yield _within(data, path), f"{fault}: get it again or take it off the list"


def _misfits(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What training will say of a set and the model of cfg, where they do not go together."""
    try:
        zoo.check_masks(cfg)
    except UserError as error:
        path, _, what = str(error).partition(": ")
        yield path, what


def _objects(data: Data, take: Take, _: int) -> Iterator[tuple[str, str]]:
    for split in SPLITS:
        path, folder = layouts.coco_files(data.root, split)
        found = coco_json.digest(data.root, path)
        for name, *listed in take(found["images"]):
            fault = picture_fault(folder / name) or _other_size(folder / name, tuple(listed))
            if fault:
                yield _within(data, folder / name), f"{fault}: replace the image or mend its row in {path.name}"
        for what, ids in (
            ("a polygon of less than 3 points", found["degenerate"]),
            ("a box without area", found["without_area"]),
        ):
            if ids:
                yield _within(data, path), f"annotations with {what}: {ids}: they teach nothing; remove them"


def _other_size(file: Path, listed: tuple[int, int]) -> str | None:
    with Image.open(file) as image:
        size = shown_size(image)
        return None if size == listed else f"is {size}{_turned(image, size)}, listed as {listed}"


def _turned(image: Image.Image, shown: tuple[int, int]) -> str:
    return " as its EXIF orientation turns it" if shown != image.size else ""
