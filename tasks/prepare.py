"""mode=prepare: what a data set needs once, between unpacking and training.

Nothing that was there is moved, changed or removed. Each file is written beside its place and renamed, so a run that
is stopped goes on where it was, and a second run has nothing to do.
"""

from __future__ import annotations

import csv
import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from budgeted.errors import UserError
from tasks import layouts
from tasks.decode import LOCAL, UNREADABLE, clip_fault, picture_fault, reason
from tasks.folder import SPLITS, names, near, some, wrong


def prepare(cfg: Mapping[str, Any], log: logging.Logger) -> list[str]:
    """Bring cfg's data into the form that training reads; lines that say what was done. Raises UserError."""
    root = layouts.data_root(cfg)
    if not root.is_dir():
        raise wrong(root, "no such folder", "set data.root to the folder that holds the unpacked files")
    steps = {"classification": _class_folders, "segmentation": _train_id_labels, "video": _short_clips}
    step = steps.get(cfg["task"]["adapter"])
    try:
        return step(root, cfg["prepare"], log) if step else [f"{root}: {cfg['task']['name']} needs no preparation"]
    except OSError as error:
        what = f"{error.filename or root} cannot be written ({error.strerror})"
        raise wrong(root, what, "mend that and run it again: it goes on where it was") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` (of the same suffix) to write to; renamed to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> str:
    """Make target the same file as source, or a copy of it where links are not to be had; which of the two."""
    try:
        os.link(source, target)
        return "hard-linked"
    except OSError:
        shutil.copyfile(source, target)
        return "copied"


def _each(work: Callable[[Any], str], items: Iterable[Any], workers: int, log: logging.Logger) -> Counter[str]:
    """Run work on all items in threads; how often it returned each word."""
    done: Counter[str] = Counter()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for word in pool.map(work, items):
            done[word] += 1
            if done.total() % 1000 == 0:
                log.info("prepare: %d done", done.total())
    return done


def _counts(done: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {word}" for word, n in sorted(done.items())) or "nothing to do"


# ImageNet: the flat validation images into class folders.


def _class_folders(root: Path, options: Mapping[str, Any], log: logging.Logger) -> list[str]:
    if options["pack"]:
        return _pack(root, log)
    loose = [f for f in names(root / "val") if f.lower().endswith(layouts.IMAGES)]
    if layouts.is_cifar10(root) or not loose:
        return [f"{root}: no loose images in val/: needs no preparation"]
    if not options.get("labels"):
        fix = "set prepare.labels=<csv with columns image,wnid>, e.g. Kaggle's LOC_val_solution.csv"
        raise wrong(root, f"val/ holds {len(loose)} loose images and nothing says what they show", fix)
    wnids = _wnids(root, Path(options["labels"]).expanduser())
    unnamed = [f for f in loose if Path(f).stem not in wnids]
    if unnamed:
        raise UserError(f"prepare.labels={options['labels']}: lacks images of val/: {some(unnamed)}: add their rows")

    def place(file: str) -> str:
        target = root / "val" / wnids[Path(file).stem] / file
        if target.exists():
            return "there already"
        with atomic(target) as beside:
            return _link(root / "val" / file, beside)

    done = _each(place, loose, options["workers"], log)
    return [f"{root}/val/<class>/: {_counts(done)}; the loose images stay and may be removed"]


def _pack(root: Path, log: logging.Logger) -> list[str]:
    """Class folders of small images as arrays in <root>-packed, in the folders' order: see tasks/packed.py."""
    to, counts = root.parent / f"{root.name}-packed", []
    if layouts.is_cifar10(root) or layouts.is_packed(root):
        return [f"{root}: holds arrays already"]
    if layouts.is_packed(to):
        return [f"{to}: there already; remove it to have it written anew"]
    classes = layouts.inspect(
        {"task": {"name": root.name, "adapter": "classification"}, "data": {"root": root}}
    ).classes
    for split in SPLITS:
        samples = layouts.images(root, split)[1]
        if fault := picture_fault(samples[0][0]):
            raise UserError(f"{samples[0][0]}: cannot be decoded ({fault}); replace or remove it")
        with Image.open(samples[0][0]) as first:
            width, height = first.size
        with atomic(to / f"{split}_images.npy") as beside:
            shape = (len(samples), height, width, 3)
            pixels = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
            for k, (path, _) in enumerate(samples):
                pixels[k] = _pixels(path, (width, height))
                if (k + 1) % 10_000 == 0:
                    log.info("prepare: %d of %d images of %s/ packed", k + 1, len(samples), split)
            pixels.flush()
        with atomic(to / f"{split}_labels.npy") as beside:
            np.save(beside, np.array([label for _, label in samples], np.int64))
        counts.append(f"{len(samples)} {split}")
    _write(to / "classes.txt", [f"{name}\n" for name in classes])  # last: with it the set is whole
    return [f"{to}: {', '.join(counts)} images of {width} x {height} packed", f"train with data.root={to}"]


def _pixels(path: str, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.size == size:
                return np.asarray(image.convert("RGB"))
            what = f"is {image.size[0]} x {image.size[1]}, the first {size[0]} x {size[1]}: only equal sizes are packed"
    except UNREADABLE as error:
        what = f"cannot be decoded ({reason(error, path)}); replace or remove it"
    raise UserError(f"{path}: {what}")


def _wnids(root: Path, path: Path) -> dict[str, str]:
    """Image name without suffix -> class, from a csv of image,wnid or Kaggle's ImageId,PredictionString."""
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prepare.labels={path}: cannot be read ({error}): give a csv of image,wnid") from None
    columns = next(
        (c for c in (("image", "wnid"), ("ImageId", "PredictionString")) if rows and set(c) <= set(rows[0])), None
    )
    if not columns:
        raise UserError(f"prepare.labels={path}: has no columns image,wnid: put that line first")
    known, found = {n for n in names(root / "train") if (root / "train" / n).is_dir()}, {}
    for number, row in enumerate(rows, 2):
        image, wnid = ((row[c] or "").strip() for c in columns)
        wnid = wnid.split(" ")[0]
        if wnid not in known:
            hint = near(wnid, root / "train")
            raise UserError(f"prepare.labels={path} line {number}: class {wnid!r} is not a folder of train/: {hint}")
        found[Path(image).stem] = wnid
    return found


# Cityscapes: labelIds, or polygons, to the 19 ids of training.


def train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Cityscapes' labelIds (any shape, uint8) as trainIds: 0 to 18, and 255 for what is ignored.
    Raises ValueError for an id that Cityscapes does not have."""
    from cityscapesscripts.helpers.labels import labels

    table = np.full(256, -1, np.int16)
    for label in labels:
        if label.id >= 0:
            table[label.id] = label.trainId if 0 <= label.trainId < 255 else 255
    mapped = table[label_ids]
    if (mapped < 0).any():
        raise ValueError(f"unknown ids {np.unique(label_ids[mapped < 0]).tolist()}, Cityscapes has 0 to 33")
    return mapped.astype(np.uint8)


def _train_id_labels(root: Path, options: Mapping[str, Any], log: logging.Logger) -> list[str]:
    targets = [Path(label) for split in SPLITS for _, label in layouts.streets(root, split)]
    if not targets:
        fix = f"unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip here; {near('leftImg8bit', root)}"
        raise wrong(root, "no leftImg8bit/<split>/<city>/*_leftImg8bit.png", fix)

    bare: list[str] = []

    def convert(target: Path) -> str:
        if target.exists():
            return "there already"
        stem = str(target).removesuffix("labelTrainIds.png")
        label_ids, polygons = map(Path, layouts.sources(str(target)))
        try:
            if label_ids.exists():
                with Image.open(label_ids) as image:
                    ids, word = np.asarray(image), "made from labelIds"
            elif polygons.exists():
                ids, word = _drawn(polygons), "drawn from polygons"
            else:
                bare.append(str(target.relative_to(root)))
                return "without a source"
            label = Image.fromarray(train_ids(ids))
        except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:
            raise wrong(
                root, f"{Path(stem).relative_to(root)}*: {error}", "unpack gtFine_trainvaltest.zip again"
            ) from None
        with atomic(target) as beside:
            label.save(beside)
        return word

    said = f"{root}/gtFine, labelTrainIds: {_counts(_each(convert, targets, options['workers'], log))}"
    if bare:  # a finding as mode=check has them: what could be made is made
        log.info("%s", said)
        what = f"{some(sorted(bare), 3)} cannot be made: neither labelIds nor polygons are there"
        log.warning("%s: %s: unpack gtFine_trainvaltest.zip again, or remove the pictures", root, what)
        raise SystemExit(1)
    return [said]


def _drawn(path: Path) -> np.ndarray:
    """The labelIds that an annotation's polygons draw. Raises ValueError for an unknown label."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.helpers.labels import name2label
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation = Annotation()
    annotation.fromJsonText(path.read_text())
    unknown = {o.label for o in annotation.objects if o.label.removesuffix("group") not in name2label} - set(name2label)
    if unknown:
        raise ValueError(f"unknown labels {sorted(unknown)}")
    return np.asarray(createLabelImage(annotation, "ids"))


# Kinetics: clips cut to a short side, and manifests of those that can be read.


def _short_clips(root: Path, options: Mapping[str, Any], log: logging.Logger) -> list[str]:
    side = options.get("short_side")
    to = root.parent / f"{root.name}-{side}" if side else root
    if not side and not all((root / f"{split}.csv").is_file() for split in SPLITS):
        raise wrong(root, "there is no official train.csv and val.csv to make manifests of", "set prepare.short_side")
    lists = {split: layouts.listed_clips(root, split, manifest=False) for split in SPLITS}
    classes = lists["train"][0]
    if alien := sorted({own[label] for own, listed in lists.values() for _, label in listed} - set(classes)):
        raise wrong(root, f"val.csv has labels that train.csv has not: {some(alien)}", "both need the same classes")
    faults: dict[str, str] = {}

    def cut(clip: str) -> str:
        if side and (to / clip).exists():  # whether or not the original was kept
            return "there already"
        fault = None if (root / clip).is_file() else "absent"
        fault = fault or (_shrink(root / clip, to / clip, int(side)) if side else clip_fault(root / clip))
        if fault:
            faults[clip] = fault
        return "missing" if fault else f"cut to {side}" if side else "whole"

    listed = [clip for _, rows in lists.values() for clip, _ in rows]
    done = _each(cut, listed, options["workers"], log)
    earlier = layouts.lost_before(root)  # a copy's copy lacks what the first one lacked
    faults |= {clip: earlier[clip] for clip in earlier.keys() - set(listed)}
    to.mkdir(exist_ok=True)
    for split, (own, rows) in lists.items():
        kept = [f"{clip} {classes.index(own[label])}\n" for clip, label in rows if clip not in faults]
        _write(to / f"{split}_list.csv", kept)
    _write(to / "classes.txt", [f"{name}\n" for name in classes])
    _write(to / "missing.txt", [f"{clip}: {fault}\n" for clip, fault in sorted(faults.items())])
    lines = [f"{to}: {_counts(done)}; manifests are train_list.csv and val_list.csv"]
    if faults:
        lines.append(f"{to}/missing.txt: {some(sorted(faults))} absent or unreadable, left out of the manifests")
    return lines + ([f"train with data.root={to}"] if side else [])


def _write(path: Path, lines: Iterable[str]) -> None:
    with atomic(path) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


class _Broken(Exception):
    """A video that does not decode to its end."""


def _shrink(source: Path, target: Path, side: int) -> str | None:
    """Write source's video with its short side brought down to `side`; what is wrong with it, or None."""
    import av

    try:
        with av.open(str(source), options=LOCAL) as clip, atomic(target) as beside:
            if not clip.streams.video:
                raise _Broken("no video stream")
            video = clip.streams.video[0]
            if min(video.width, video.height) > side:
                _encode(clip, beside, side)
            elif fault := clip_fault(source):
                raise _Broken(fault)
            else:
                _link(source, beside)
    except _Broken as error:
        return str(error)
    except (av.FFmpegError, OSError) as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        return f"cannot be decoded ({error.strerror})"
    return None


def _encode(clip: Any, path: Path, side: int) -> None:
    """h264 (mpeg4 without libx264) of an open video: even pixels, constant rate, no sound. Raises _Broken."""
    import av

    video = clip.streams.video[0]
    scale = side / min(video.width, video.height)
    with av.open(str(path), "w") as out:
        rate = Fraction(video.average_rate or 25).limit_denominator(1001)
        x264 = "libx264" in av.codecs_available
        options = {"crf": "20", "preset": "veryfast"} if x264 else {"qscale": "3"}
        stream: Any = out.add_stream("libx264" if x264 else "mpeg4", rate=rate, options=options)
        stream.width, stream.height = (2 * round(edge * scale / 2) for edge in (video.width, video.height))
        stream.pix_fmt, stream.thread_count = "yuv420p", 1  # the threads of prepare.workers are the parallelism
        count = 0
        for frame in clip.decode(video):
            small = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
            small.pts = None  # the encoder counts: phones write uneven times
            out.mux(stream.encode(small))
            count += 1
        out.mux(stream.encode())
    if count == 0 or count < 0.9 * video.frames:
        raise _Broken(f"ends early: {count} of {video.frames} frames")
