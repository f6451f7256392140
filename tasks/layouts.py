"""What a data folder holds, found by listing it: counts and classes, or one line on what is wrong.

Four layouts (ImageNet, COCO, Cityscapes, Kinetics), CIFAR-10 in torchvision's format or as an .npz, and any folder of
class folders, or its packed copy. Everything here runs before torch is imported. A name that a data file gives (a
manifest's clip, a file_name in COCO's json) is only ever looked up inside data.root. `images`, `streets`, `clips`,
`cifar10` and `packed` list or read the samples for the adapters, so that what is counted here is what is trained on.
"""

from __future__ import annotations

import csv
import difflib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgeted.errors import UserError
from tasks import cifar10 as cifar
from tasks import coco_json, packed
from tasks.cifar10 import cifar10, is_cifar10
from tasks.coco_json import coco_files
from tasks.folder import SPLITS, Data, digest_of, names, near, refuse_outside, some, tally, wrong
from tasks.packed import is_packed

__all__ = ["Data", "check", "cifar10", "clips", "coco_files", "data_root", "images", "inspect"]
__all__ += ["is_cifar10", "is_packed", "packed", "streets", "subset"]

log = logging.getLogger("budgeted")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
STREET_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)


def inspect(cfg: Mapping[str, Any]) -> Data:
    """Counts and classes of cfg's data by listing alone; nothing is decoded.

    n_train follows data.subset. For a *_tiny task whose embedded data is not written yet the counts are the known
    ones. Raises UserError, one line."""
    from tasks import tiny

    name, root = cfg["task"]["name"], data_root(cfg)
    try:
        if tiny.embedded(cfg) and (not root.exists() or (root.is_dir() and not any(root.iterdir()))):
            n_train, n_val, classes = tiny.COUNTS[name]
            data = Data(name, root, n_train, n_val, classes, digest=tiny.digest(name))
        else:
            data = _listed(name, cfg["task"]["adapter"], _existing(root, name))
    except OSError as error:
        fix = "mend its permissions" if isinstance(error, PermissionError) else "mend or remove it"
        raise wrong(root, f"{error.filename} cannot be read ({error.strerror})", fix) from None
    keep = cfg["data"].get("subset")
    if keep is not None and keep > data.n_train:
        raise UserError(f"data.subset={keep}: {root} has {data.n_train} training samples")
    return data if keep is None else replace(data, n_train=keep)


def check(cfg: Mapping[str, Any], sample: int = 32, seconds: float = 4.0) -> tuple[Data, list[str], int]:
    """inspect(), then decode `sample` files of each split, more while `seconds` last, and look at what only decoding
    shows. Findings are lines of path, fault and fix; a clip that cannot be decoded is one of Data.missing from then on.
    The number is that of the files decoded."""
    from tasks import decode

    data = inspect(cfg)
    return decode.findings(cfg, data, sample, seconds) if data.root.is_dir() else (data, [], 0)


def subset(n: int, keep: int | None) -> list[int]:
    """Which of n training samples data.subset=keep leaves: the first `keep` of one fixed shuffle, so that a larger
    subset holds a smaller one. All n in their order where keep is None or not less than n."""
    order = list(range(n))
    if keep is None or keep >= n:
        return order
    random.Random(0).shuffle(order)
    return order[:keep]


def data_root(cfg: Mapping[str, Any]) -> Path:
    root = cfg["data"].get("root")
    if not root:
        name = cfg["task"]["name"]
        raise UserError(f"data.root is not set: say where {name}'s files are, e.g. data.root=/data/{name}")
    return Path(root).expanduser()


def _listed(name: str, adapter: str, root: Path) -> Data:
    """The data of an adapter's layout. Raises UserError, which names the layout where it is another one's."""
    try:
        return LAYOUTS[adapter](name, root)
    except UserError:
        found = next((kind for kind, (_, _, holds) in MARKS.items() if holds(root)), adapter)
        if found == adapter or MARKS[adapter][2](root):
            raise
        what, task, _ = MARKS[found]
        raise wrong(root, f"this is laid out like {what}", f"task={task} takes it, task={name} does not") from None


def _existing(root: Path, name: str) -> Path:
    if root.is_symlink() and not root.exists():
        raise UserError(f"data.root={root}: a link to nothing: mend it, or set data.root to the folder itself")
    if not root.is_dir():
        beside = [n for n in names(root.parent) if n.endswith("_tiny") == name.endswith("_tiny")]
        close = [root.parent / n for n in difflib.get_close_matches(root.name, beside, n=1)]
        if root.exists():
            close = [root.parent]
        hint = f"did you mean {close[0]}?" if close else f"set data.root to the folder that holds {name}"
        raise UserError(f"data.root={root}: {'not a folder' if root.exists() else 'no such folder'}: {hint}")
    if not any(root.iterdir()):
        raise UserError(f"data.root={root}: the folder is empty: put {name}'s files there or set another data.root")
    return root


# Class folders: ImageNet and any set laid out alike.


def images(root: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes, and (path, class index) of every image of a split of train/<class>/x.jpg and val/<class>/x.jpg.

    A root that holds class folders alone is split: each tenth image of a class, in a fixed shuffle, is validation."""
    whole = _unsplit(root)
    base = root if whole else root / split
    classes = tuple(name for name in names(base) if (base / name).is_dir())
    found = []
    for index, name in enumerate(classes):
        files = [f for f in names(base / name) if f.lower().endswith(IMAGES)]
        if whole:
            random.Random(name).shuffle(files)
            held = len(files) // 10
            files = sorted(files[:held] if split == "val" else files[held:])
        found += [(f"{base}/{name}/{f}", index) for f in files]
    return classes, found


def _unsplit(root: Path) -> bool:
    return not (root / "train").is_dir() and not (root / "val").is_dir()


def no_images(root: Path) -> tuple[list[str], list[str]]:
    """What lies among class folders and their images, in paths of root: what `images` passes over, and folders and
    links to nothing that have an image's name. A flat val/ may stay beside its class folders, and any file beside
    class folders that are not split."""
    passed, broken, whole = [], [], _unsplit(root)
    for base in [root] if whole else [root / split for split in SPLITS]:
        classes = {name for name in names(base) if (base / name).is_dir()}
        for folder in (base, *(base / name for name in classes)):
            for entry in os.scandir(folder):
                named = entry.name.lower().endswith(IMAGES)
                allowed = (whole and not named) or (base.name == "val" and named)
                if entry.name.startswith(".") or (folder == base and (allowed or entry.name in classes)):
                    continue
                if not named or folder == base:
                    passed.append(entry.path)
                elif not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):  # no second look at most
                    broken.append(entry.path)
    return _in_root(root, passed), _in_root(root, broken)


def _in_root(root: Path, paths: list[str]) -> list[str]:
    return sorted(path.removeprefix(f"{root}/") for path in paths)


def _class_folders(name: str, root: Path) -> Data:
    if is_cifar10(root):
        return cifar.summary(name, root)
    if is_packed(root):
        return packed.summary(name, root)
    (classes, train), (val_classes, val) = (images(root, split) for split in SPLITS)
    if root.name in SPLITS and all((root.parent / split).is_dir() for split in SPLITS):
        raise wrong(root, "one split of a set", f"did you mean data.root={root.parent}?")
    _refuse_odd_splits(root, classes, val_classes, bool(train))
    _refuse_unplaced(root, val)
    if not (root / "train").is_dir():
        log.warning("%s has no train/ and val/: each tenth image of a class is held out for validation", root)
    for one, other, lacking in (
        ("train", "val", set(classes) - set(val_classes)),
        ("val", "train", set(val_classes) - set(classes)),
    ):
        if lacking:
            what = f"{one}/ has class folders that {other}/ lacks: {some(sorted(lacking))}"
            raise wrong(root, what, f"both need the same; add them to {other}/ or remove them")
    for split, found in (("train", train), ("val", val)):
        empty = sorted(set(range(len(classes))) - {label for _, label in found})
        if empty:
            what = f"{split}/ has class folders without an image: {some(classes[i] for i in empty)}"
            raise wrong(root, what, f"fill or remove them; images end in {' '.join(IMAGES)}")
    tallies = (tally(classes, (label for _, label in found)) for found in (train, val))
    return Data(name, root, len(train), len(val), classes, digest=digest_of(classes, *tallies))


def _refuse_odd_splits(root: Path, classes: tuple[str, ...], val_classes: tuple[str, ...], filled: bool) -> None:
    """Name the nearest right form where train/ or val/ is not a folder of class folders."""
    there = [p for p in ("ILSVRC/Data/CLS-LOC", *names(root)) if (root / p / "train").is_dir()]
    deeper = next((p for p in there if images(root / p, "train")[1]), None)
    if deeper and not (root / "train").is_dir():
        raise wrong(root, "no train/ here", f"did you mean data.root={root / deeper}?")
    if (root / "val").is_dir() and not val_classes and any(f.lower().endswith(IMAGES) for f in names(root / "val")):
        fix = "run mode=prepare prepare.labels=<csv with columns image,wnid> first"
        raise wrong(root, "val/ holds loose images instead of class folders", fix)
    for split, found in (("train", classes), ("val", val_classes)):
        if not found or not filled:
            fix = f"expected {split}/<class>/<image>; {near(split, root)}"
            raise wrong(root, f"no class folders with images in {split}/", fix)
    if len(classes) < 2:
        raise wrong(root, f"one class folder only ({classes[0]})", "at least two classes are needed")


def _refuse_unplaced(root: Path, val: list[tuple[str, int]]) -> None:
    """The loose images of a flat val/ stay when they are linked into class folders; one that is in none is unused."""
    placed = {path.rpartition("/")[2] for path, _ in val}
    loose = [f for f in names(root / "val") if f.lower().endswith(IMAGES) and f not in placed]
    if loose:
        fix = "finish with mode=prepare prepare.labels=<csv with columns image,wnid>, or remove them"
        raise wrong(root, f"val/ holds loose images that are in no class folder: {some(loose)}", fix)


# Cityscapes.


def streets(root: Path, split: str) -> list[tuple[str, str]]:
    """(image, labelTrainIds) paths of a split, in the order of the image's name; the label may be absent.

    Those that mmseg finds: at any depth, and no link to nothing. Raises UserError for a link that leads upwards."""
    base, end = f"{root}/leftImg8bit/{split}", "_leftImg8bit.png"
    found = (path for path in _below(root, base) if path.endswith(end) and os.path.isfile(path))
    labels = f"{root}/gtFine/{split}"
    return [(path, f"{labels}{path[len(base) : -len(end)]}_gtFine_labelTrainIds.png") for path in sorted(found)]


def sources(label: str) -> tuple[str, str]:
    """The files of which mode=prepare makes a labelTrainIds file, the better one first."""
    stem = label.removesuffix("labelTrainIds.png")
    return f"{stem}labelIds.png", f"{stem}polygons.json"


def no_streets(root: Path) -> list[str]:
    """What lies among the street scenes and is none, in paths of root: mmseg passes it over."""
    below = (f"{root}/leftImg8bit/{split}" for split in SPLITS)
    used = {path for split in SPLITS for path, _ in streets(root, split)}
    return _in_root(root, [path for folder in below for path in _below(root, folder) if path not in used])


def _below(root: Path, folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all that is neither a folder nor a hidden file, at any depth."""
    here = os.path.realpath(folder)
    if here in above:  # mmseg would follow it for ever
        what = f"{folder.removeprefix(f'{root}/')} is a link to a folder that it lies in"
        raise wrong(root, what, "remove it")
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        if entry.is_dir():
            yield from _below(root, entry.path, (*above, here))
        elif not entry.name.startswith("."):
            yield entry.path


def _cityscapes(name: str, root: Path) -> Data:
    counts, cities = [], []
    for split in SPLITS:
        pairs = streets(root, split)
        if not pairs:
            fix = f"unpack leftImg8bit_trainvaltest.zip here; {near('leftImg8bit', root)}"
            raise wrong(root, f"no leftImg8bit/{split}/<city>/*_leftImg8bit.png", fix)
        labels = [Path(label) for _, label in pairs]
        there = {folder: set(names(folder)) for folder in {label.parent for label in labels}}
        lost = [label for label in labels if label.name not in there[label.parent]]
        if lost:
            bare = [label for label in lost if not any(name in there[label.parent] for name in sources(label.name))]
            what = f"labels absent: {some(str(label.relative_to(root)) for label in lost)}"
            if len(bare) < len(lost):
                raise wrong(root, what, f"run mode=prepare task={name} data.root={root} to make them")
            raise wrong(root, what, "unpack gtFine_trainvaltest.zip here")
        counts.append(len(pairs))
        base = f"{root}/leftImg8bit/{split}/"
        cities.append(Counter(picture.removeprefix(base).rpartition("/")[0] for picture, _ in pairs))
    digest = digest_of(STREET_CLASSES, *(sorted(found.items()) for found in cities))
    return Data(name, root, counts[0], counts[1], STREET_CLASSES, digest=digest)


# Kinetics.


def clips(root: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]], list[str]]:
    """Classes, (path, class index) of the clips that are there, and the listed ones that are absent or, in a set of up
    to 5,000, seen from the file's frame to be broken (mode=prepare opens every clip of a larger one)."""
    classes, listed = listed_clips(root, split)
    return classes, *_readable(root, listed)


def _readable(root: Path, listed: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[str]]:
    there = {folder: set(names(root / folder)) for folder in {clip.rpartition("/")[0] for clip, _ in listed}}
    look = len(listed) <= 5000
    found, missing = [], []
    for clip, label in listed:
        folder, _, file = clip.rpartition("/")
        if file not in there[folder] or (look and mp4_fault(root / clip)):
            missing.append(clip)
        else:
            found.append((f"{root}/{clip}", label))
    return found, missing


def listed_clips(root: Path, split: str, manifest: bool = True) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes and (path in root, class index) of the clips that a split lists.

    From `<split>_list.csv` (`path index` or `path,index` a line, classes.txt naming the indices) or, without one, from
    the official `<split>.csv` (label, youtube_id, time_start, time_end, split); manifest: which of two comes first."""
    if (root / f"{split}_list.csv").is_file() and (manifest or not (root / f"{split}.csv").is_file()):
        return _manifest(root, root / f"{split}_list.csv")
    if (root / f"{split}.csv").is_file():
        return _official(root, root / f"{split}.csv")
    fix = f"give a manifest (`path index` a line) or the official csv; {near(f'{split}.csv', root)}"
    raise wrong(root, f"no {split}_list.csv and no {split}.csv", fix)


def lost_before(root: Path) -> dict[str, str]:
    """Clip -> why mode=prepare left it out of the manifests that it wrote: its missing.txt."""
    path = root / "missing.txt"
    if not path.is_file() or not (root / "train_list.csv").is_file():
        return {}
    pairs = (line.strip().partition(": ") for line in _lines(root, path))
    return {clip: why or "absent or unreadable" for clip, _, why in pairs if clip}


def mp4_fault(path: Path) -> str | None:
    """What is wrong with an mp4 as far as its boxes say: cut short, no index, no video. None where nothing is."""
    if not path.is_file():  # a link to nothing, a folder
        return "not a file"
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        return None
    index, position, size = b"", 0, path.stat().st_size
    with path.open("rb") as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4])
            length = {0: size - position, 1: int.from_bytes(head[8:16])}.get(length, length)
            if length < 8 or position + length > size:
                return f"cut short or not an mp4 ({size} bytes)"
            if head[4:8] == b"moov":
                file.seek(position)
                index = file.read(length)
            position += length
    if not index:
        return f"cut short or not an mp4 ({size} bytes)"
    return None if b"vide" in index else "no video stream"


def _lines(root: Path, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise wrong(root, f"{path.name} is not text", "save it as UTF-8") from None


def _manifest(root: Path, path: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    listed = []
    for number, line in enumerate(_lines(root, path), 1):
        clip, label = (part.strip() for part in line.strip().rpartition("," if "," in line else " ")[::2])
        if clip and label.isdecimal() and len(label) < 20:  # Python reads no more than 4,300 digits
            refuse_outside(root, clip, f"{path.name} line {number}")
            listed.append((clip, int(label)))
        elif line.strip():
            fix = "expected `path index`, e.g. train/walk/a.mp4 0"
            raise wrong(root, f"{path.name} line {number} is {line[:60]!r}", fix)
    if not listed:
        raise wrong(root, f"{path.name} lists no clip", "remove it, or run mode=prepare to write it")
    top, given = max(label for _, label in listed), root / "classes.txt"
    if not given.is_file():
        if top >= len(listed):
            what = f"{path.name} has class index {top} and only {len(listed)} clips"
            raise wrong(root, what, "indices count from 0; name the classes in classes.txt, one a line")
        folders = {label: Path(clip).parent.name for clip, label in reversed(listed)}
        return tuple(folders.get(i, str(i)) for i in range(top + 1)), listed
    classes = tuple(line.strip() for line in _lines(root, given) if line.strip())
    if top >= len(classes):
        what = f"{path.name} has class index {top} and classes.txt {len(classes)} names"
        raise wrong(root, what, "indices count from 0")
    return classes, listed


def _official(root: Path, path: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Clips are <split>/<label>/<id>_<start>_<end>.mp4 with six digits each; a label's folder may have its spaces or
    underscores, and without label folders the clips lie in the split's. Classes are the sorted labels."""
    try:
        rows = list(csv.DictReader(_lines(root, path)))
    except csv.Error as error:
        raise wrong(root, f"{path.name} is no csv ({error})", "get the official one again") from None
    lost = [c for c in ("label", "youtube_id", "time_start", "time_end") if not rows or c not in rows[0]]
    if lost:
        what = f"{path.name} {'has no column ' + lost[0] if rows else 'lists no clip'}"
        raise wrong(root, what, "expected the official label,youtube_id,time_start,time_end,split")
    classes = tuple(sorted({row["label"] or "" for row in rows}))
    # Listed once: a split may hold its 60,000 clips itself.
    loose = any(name.endswith(".mp4") for name in names(root / path.stem)[:50])
    places = {label: (_label_folder(root, path.stem, label, loose), index) for index, label in enumerate(classes)}
    listed = []
    for number, row in enumerate(rows, 2):
        try:
            clip = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
        except (TypeError, ValueError):
            fix = "time_start and time_end are integers"
            raise wrong(root, f"{path.name} line {number} has no whole seconds", fix) from None
        folder, index = places[row["label"]]
        refuse_outside(root, f"{folder}/{clip}", f"{path.name} line {number}")
        listed.append((f"{folder}/{clip}", index))
    return classes, listed


def _label_folder(root: Path, split: str, label: str, loose: bool) -> str:
    if "/" in label or label in ("", ".", ".."):
        raise wrong(root, f"{split}.csv has the label {label!r}", "a label is the name of a folder")
    spellings = [f"{split}/{label.replace(' ', '_')}", f"{split}/{label}"]
    return next((s for s in spellings if (root / s).is_dir()), split if loose else spellings[0])


def _kinetics(name: str, root: Path) -> Data:
    (classes, train_list), (val_classes, val_list) = (listed_clips(root, split) for split in SPLITS)
    (train, lost), (val, val_lost) = (_readable(root, listed) for listed in (train_list, val_list))
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise wrong(root, f"train and val do not name the same classes: {some(odd)}", "both lists need every class")
    for split, found, gone in (("train", train, lost), ("val", val, val_lost)):
        if not found:
            what = f"none of the {len(gone)} clips that {split} lists can be read, first {gone[0]}"
            raise wrong(root, what, "data.root is the folder that holds train/ and val/")
    listed = {clip for clip, _ in (*train_list, *val_list)}
    before = [clip for clip in lost_before(root) if clip not in listed]
    labels = _labels_of(before, classes)
    digest = None  # where the class of a clip is not known any more, nor is the data set's digest
    if sum(map(len, labels.values())) == len(before):
        for split, found in (("train", train_list), ("val", val_list)):
            labels[split] += [label for _, label in found]
        digest = digest_of(classes, *(tally(classes, labels[split]) for split in SPLITS))
    return Data(name, root, len(train), len(val), classes, (*lost, *val_lost, *before), digest=digest)


def _labels_of(unlisted: Iterable[str], classes: tuple[str, ...]) -> dict[str, list[int]]:
    """Split -> class indices of clips that no list has any more, by the folders they lay in."""
    spelt = {name: index for index, label in enumerate(classes) for name in (label, label.replace(" ", "_"))}
    parts = [Path(clip).parts for clip in unlisted]
    return {s: [spelt[p[-2]] for p in parts if p[0] == s and len(p) > 2 and p[-2] in spelt] for s in SPLITS}


def _is_folders(root: Path) -> bool:
    some_classes = (root / "train" / name for name in names(root / "train")[:3])
    pictures = any(file.lower().endswith(IMAGES) for folder in some_classes for file in names(folder))
    return pictures or is_cifar10(root) or is_packed(root)


def _is_kinetics(root: Path) -> bool:
    if (root / "train_list.csv").is_file():
        return True
    with suppress(FileNotFoundError, IsADirectoryError), (root / "train.csv").open("rb") as file:
        return b"youtube_id" in file.readline(1000)
    return False


# What tells a layout at a glance: in words, the task that takes it, the test. Where two hold, the first is meant.
MARKS: dict[str, tuple[str, str, Callable[[Path], bool]]] = {
    "segmentation": ("Cityscapes (leftImg8bit/)", "cityscapes", lambda root: (root / "leftImg8bit").is_dir()),
    "detection": ("COCO (annotations/*.json)", "coco", lambda root: any(root.glob("annotations/*.json"))),
    "video": ("Kinetics (train.csv or train_list.csv)", "kinetics", _is_kinetics),
    "classification": ("class folders (train/<class>/)", "imagenet", _is_folders),
}
LAYOUTS: dict[str, Callable[[str, Path], Data]] = {
    "classification": _class_folders,
    "detection": coco_json.summary,
    "segmentation": _cityscapes,
    "video": _kinetics,
}
