"""What a data folder holds, found by listing it: the counts and classes of a training set, or one line on what is wrong.

Four layouts (ImageNet, COCO, Cityscapes, Kinetics), CIFAR-10 in torchvision's format or as an .npz, and any folder of
class folders. Everything here runs before torch is imported. A name that a data file gives (a manifest's clip, a
file_name in COCO's json) is only ever looked up inside data.root. `images`, `streets`, `clips` and `cifar10` list or
read the samples for the adapters, so that what is counted here is what is trained on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from budgeted.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
STREET_CLASSES = tuple(
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle".split(",")
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_HELD_OUT = 5000  # of the 50,000 training images (PAPER.md section 3.1)


@dataclass(frozen=True)
class Data:
    """A training set and its validation set. missing: paths that are listed but absent or unreadable."""

    name: str
    root: Path
    n_train: int
    n_val: int
    classes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def inspect(cfg: Mapping[str, Any]) -> Data:
    """Counts and classes of cfg's data by listing alone; nothing is decoded.

    n_train follows data.subset. For a *_tiny task whose embedded data is not written yet the counts are the known
    ones. Raises UserError, one line."""
    from tasks import tiny

    name, root = cfg["task"]["name"], data_root(cfg)
    if tiny.embedded(cfg) and not (root.exists() and any(root.iterdir())):
        n_train, n_val, classes = tiny.COUNTS[name]
        data = Data(name, root, n_train, n_val, classes)
    else:
        data = LAYOUTS[cfg["task"]["adapter"]](name, _existing(root, name))
    keep = cfg["data"].get("subset")
    return data if keep is None else replace(data, n_train=len(subset(data.n_train, keep)))


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
        raise UserError(f"data.root is not set: task={cfg['task']['name']} reads it, e.g. data.root=/data/{cfg['task']['name']}")
    return Path(root).expanduser()


def _existing(root: Path, name: str) -> Path:
    if not root.is_dir():
        here = root.parent if root.parent.is_dir() else None
        near = nearest(root.name, (p.name for p in here.iterdir())) if here and any(here.iterdir()) else ""
        hint = f"in {here} {near}" if near.startswith("did") else f"set data.root to the folder that holds {name}"
        raise UserError(f"data.root={root}: {'is a file' if root.exists() else 'no such folder'}: {hint}")
    if not any(root.iterdir()):
        raise UserError(f"data.root={root}: the folder is empty: put {name}'s files there or set another data.root")
    return root


def wrong(root: Path, what: str, fix: str) -> UserError:
    return UserError(f"data.root={root}: {what}: {fix}")


def inside(root: Path, name: str, source: str) -> Path:
    """root/name for a relative name that stays in root. Raises UserError for an absolute one or one with `..`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise wrong(root, f"{source} names {name!r}, which leads out of the folder", "only relative paths without .. are read")
    return root / path


def _names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones; none where it is absent."""
    try:
        return sorted(n for n in os.listdir(folder) if not n.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def some(names: Iterable[str]) -> str:
    """A count and the first of the names, for a message of one line."""
    names = list(names)
    return f"{len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})"


# Class folders: ImageNet and any set laid out alike.


def images(root: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes, and (path, class index) of every image of a split of train/<class>/x.jpg and val/<class>/x.jpg.

    A root that holds class folders alone is split: each tenth image of a class, in a fixed shuffle, is validation."""
    folder = root / split
    whole = not (root / "train").is_dir() and not (root / "val").is_dir()
    base = root if whole else folder
    classes = tuple(e.name for e in sorted(os.scandir(base), key=lambda e: e.name) if e.is_dir() and e.name[0] != ".") if base.is_dir() else ()
    found = []
    for index, name in enumerate(classes):
        files = [f for f in _names(base / name) if f.lower().endswith(IMAGES)]
        if whole:
            random.Random(name).shuffle(files)
            held = len(files) // 10
            files = sorted(files[:held] if split == "val" else files[held:])
        found += [(f"{base}/{name}/{f}", index) for f in files]
    return classes, found


def _class_folders(name: str, root: Path) -> Data:
    if (root / "cifar10.npz").is_file() or (root / "cifar-10-batches-py").is_dir() or root.name == "cifar-10-batches-py":
        return _cifar10(name, root)
    (classes, train), (val_classes, val) = (images(root, split) for split in SPLITS)
    _refuse_odd_splits(root, classes, val_classes)
    for one, other, names in (("train", "val", set(classes) - set(val_classes)), ("val", "train", set(val_classes) - set(classes))):
        if names:
            raise wrong(root, f"{one}/ has class folders that {other}/ lacks: {some(sorted(names))}", f"both need the same; add them to {other}/ or remove them")
    for split, found in (("train", train), ("val", val)):
        empty = set(range(len(classes))) - {label for _, label in found}
        if empty:
            raise wrong(root, f"{split}/ has class folders without an image: {some(classes[i] for i in sorted(empty))}", f"fill or remove them; images end in {' '.join(IMAGES)}")
    return Data(name, root, len(train), len(val), classes)


def _refuse_odd_splits(root: Path, classes: tuple[str, ...], val_classes: tuple[str, ...]) -> None:
    """Name the nearest right form where train/ or val/ is not a folder of class folders."""
    within = next((p for p in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", *_names(root)) if (root / p / "train").is_dir()), None)
    if within and not classes:
        raise wrong(root, "no train/ here", f"did you mean data.root={root / within}?")
    if (root / "val").is_dir() and not val_classes and any(f.lower().endswith(IMAGES) for f in _names(root / "val")):
        raise wrong(root, "val/ holds loose images instead of class folders", "run mode=prepare prepare.labels=<csv with columns image,wnid> first")
    for split, found in (("train", classes), ("val", val_classes)):
        if not found:
            raise wrong(root, f"no class folders in {split}/", f"expected {split}/<class>/<image>, {nearest(split, _names(root))}")
    if len(classes) < 2:
        raise wrong(root, f"one class folder only ({classes[0]})", "at least two classes are needed")


# CIFAR-10.


def _cifar10(name: str, root: Path) -> Data:
    archive, folder = root / "cifar10.npz", _batches(root)
    if archive.is_file():
        shapes = _npz_shapes(root, archive)
        want = {"train_x": (50000, 32, 32, 3), "train_y": (50000,), "test_x": (10000, 32, 32, 3), "test_y": (10000,)}
        off = [f"{k} is {shapes.get(k, 'absent')} instead of {v}" for k, v in want.items() if shapes.get(k) != v]
        if off:
            raise wrong(root, f"cifar10.npz: {off[0]}", "build it again with get_cifar10.py")
    else:
        lost = [f for f in (*_train_batches(), "test_batch") if not (folder / f).is_file()]
        if lost:
            raise wrong(root, f"cifar-10-batches-py lacks {some(lost)}", "unpack cifar-10-python.tar.gz again")
    return Data(name, root, 50000 - CIFAR10_HELD_OUT, CIFAR10_HELD_OUT, CIFAR10_CLASSES)


def _batches(root: Path) -> Path:
    return root if root.name == "cifar-10-batches-py" else root / "cifar-10-batches-py"


def _train_batches() -> list[str]:
    return [f"data_batch_{i}" for i in range(1, 6)]


def _npz_shapes(root: Path, path: Path) -> dict[str, tuple[int, ...]]:
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    npy.read_magic(file)
                    shapes[entry.removesuffix(".npy")] = npy.read_array_header_1_0(file)[0]
            return shapes
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise wrong(root, f"cifar10.npz cannot be read ({error})", "build it again with get_cifar10.py") from None


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR-10's pickled batches and refuses to call anything but what builds a numpy array."""

    allowed = {"numpy.core.multiarray": "_reconstruct", "numpy._core.multiarray": "_reconstruct", "_codecs": "encode"}

    def find_class(self, module: str, name: str) -> Any:
        if (module == "numpy" and name in ("ndarray", "dtype")) or self.allowed.get(module) == name:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def cifar10(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "val", "test"} -> images (n, 32, 32, 3) uint8 and labels (n,) int64. val: 5,000 images that one fixed
    permutation holds out of the 50,000 for training. Pickles are read by an unpickler that builds arrays only."""
    import numpy as np

    if (root / "cifar10.npz").is_file():
        with np.load(root / "cifar10.npz", allow_pickle=False) as file:
            x, y, test_x, test_y = (file[k] for k in ("train_x", "train_y", "test_x", "test_y"))
    else:
        parts = [_batch(root, f) for f in (*_train_batches(), "test_batch")]
        x, y = (np.concatenate(column) for column in zip(*parts[:5], strict=True))
        test_x, test_y = parts[5]
    order = np.random.default_rng(0).permutation(len(x))
    val, train = np.sort(order[:CIFAR10_HELD_OUT]), np.sort(order[CIFAR10_HELD_OUT:])
    y, test_y = y.astype(np.int64), test_y.astype(np.int64)
    return {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": (test_x, test_y)}


def _batch(root: Path, file: str) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    try:
        with (_batches(root) / file).open("rb") as stream:
            batch = _ArraysOnly(stream, encoding="latin1").load()
        x, y = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch["labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise wrong(root, f"{file} is not a CIFAR-10 batch ({error})", "unpack cifar-10-python.tar.gz again") from None
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y


# Cityscapes.


def streets(root: Path, split: str) -> list[tuple[str, str]]:
    """(image, labelTrainIds) paths of a split, in the order of the image's name; the label may be absent."""
    base, pairs = root / "leftImg8bit" / split, []
    for city in _names(base):
        for file in _names(base / city):
            if file.endswith("_leftImg8bit.png"):
                label = file.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
                pairs.append((f"{base}/{city}/{file}", f"{root}/gtFine/{split}/{city}/{label}"))
    return pairs


def _cityscapes(name: str, root: Path) -> Data:
    counts = []
    for split in SPLITS:
        pairs = streets(root, split)
        if not pairs:
            folder = f"leftImg8bit/{split}"
            raise wrong(root, f"no {folder}/<city>/*_leftImg8bit.png", f"unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip here, {nearest('leftImg8bit', _names(root))}")
        listed = {city: set(_names(root / "gtFine" / split / city)) for city in {Path(i).parent.name for i, _ in pairs}}
        lost = [os.path.relpath(lab, root) for _, lab in pairs if Path(lab).name not in listed[Path(lab).parent.name]]
        if lost:
            made = Path(lost[0]).name.replace("labelTrainIds.png", "")
            source = any(f"{made}{kind}" in listed[Path(lost[0]).parent.name] for kind in ("labelIds.png", "polygons.json"))
            fix = f"run mode=prepare task={name} data.root={root} to make them" if source else "unpack gtFine_trainvaltest.zip here"
            raise wrong(root, f"labels absent: {some(lost)}", fix)
        counts.append(len(pairs))
    return Data(name, root, counts[0], counts[1], STREET_CLASSES)


# Kinetics.


def clips(root: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]], list[str]]:
    """Classes, (path, class index) of the clips that are there, and the listed ones that are not.

    From `<split>_list.csv` (`path index` or `path,index` a line, classes.txt naming the indices) or, without one, from
    the official `<split>.csv` (label, youtube_id, time_start, time_end, split)."""
    manifest, official = root / f"{split}_list.csv", root / f"{split}.csv"
    if manifest.is_file():
        classes, listed = _manifest(root, manifest)
    elif official.is_file():
        classes, listed = official_list(root, official)
    else:
        raise wrong(root, f"no {split}_list.csv and no {split}.csv", f"give a manifest (`path index` a line) or the official csv, {nearest(f'{split}.csv', _names(root))}")
    there: dict[str, set[str]] = {}
    found, missing = [], []
    for path, label in listed:
        folder, _, file = path.rpartition("/")
        if folder not in there:
            there[folder] = set(_names(root / folder))
        (found.append((f"{root}/{path}", label)) if file in there[folder] else missing.append(path))
    return classes, found, missing


def _lines(root: Path, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise wrong(root, f"{path.name} is not text", "save it as UTF-8") from None


def _manifest(root: Path, path: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    listed = []
    for number, line in enumerate(_lines(root, path), 1):
        if not line.strip():
            continue
        clip, _, label = line.strip().replace(",", " ").rpartition(" ") if "," not in line else line.strip().rpartition(",")
        if not clip.strip() or not label.strip().isdigit():
            raise wrong(root, f"{path.name} line {number} is {line[:60]!r}", "expected `path index`, e.g. train/walk/a.mp4 0")
        inside(root, clip.strip(), f"{path.name} line {number}")
        listed.append((clip.strip(), int(label)))
    if not listed:
        raise wrong(root, f"{path.name} lists no clip", "run mode=prepare to write it")
    top = max(label for _, label in listed)
    names = root / "classes.txt"
    if not names.is_file():
        folders = {label: Path(clip).parent.name for clip, label in reversed(listed)}
        return tuple(folders.get(i, str(i)) for i in range(top + 1)), listed
    classes = tuple(line.strip() for line in _lines(root, names) if line.strip())
    if top >= len(classes):
        raise wrong(root, f"{path.name} has class index {top} and classes.txt names {len(classes)}", "indices start at 0")
    return classes, listed


def official_list(root: Path, path: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes (sorted labels) and (`<split>/<label>/<id>_<start>_<end>.mp4`, class index) of the official csv's rows.

    A label's folder may keep its spaces or have underscores; without label folders the clips lie in the split's."""
    rows = list(csv.DictReader(_lines(root, path)))
    need = ("label", "youtube_id", "time_start", "time_end")
    lost = [c for c in need if not rows or c not in rows[0]]
    if lost:
        raise wrong(root, f"{path.name} {'has no column ' + lost[0] if rows else 'lists no clip'}", f"expected the official columns {','.join(need)},split")
    classes = tuple(sorted({row["label"] for row in rows}))
    index = {label: i for i, label in enumerate(classes)}
    folders = {label: _label_folder(root, path.stem, label) for label in classes}
    listed = []
    for number, row in enumerate(rows, 2):
        try:
            file = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
        except (TypeError, ValueError):
            raise wrong(root, f"{path.name} line {number} has no whole seconds", "time_start and time_end are integers") from None
        clip = f"{folders[row['label']]}/{file}"
        inside(root, clip, f"{path.name} line {number}")
        listed.append((clip, index[row["label"]]))
    return classes, listed


def _label_folder(root: Path, split: str, label: str) -> str:
    spellings = [f"{split}/{label.replace(' ', '_')}", f"{split}/{label}", split]
    if "/" in label or label in ("", ".", ".."):
        raise wrong(root, f"{split}.csv has the label {label!r}", "a label is a folder's name")
    return next((s for s in spellings[:2] if (root / s).is_dir()), spellings[0] if not _loose(root / split) else split)


def _loose(folder: Path) -> bool:
    return any(name.endswith(".mp4") for name in _names(folder)[:50])


def _kinetics(name: str, root: Path) -> Data:
    (classes, train, lost), (val_classes, val, val_lost) = (clips(root, split) for split in SPLITS)
    if classes != val_classes:
        odd = set(classes) ^ set(val_classes)
        raise wrong(root, f"train and val do not name the same classes: {some(sorted(odd))}", "both lists need every class")
    for split, found, gone in (("train", train, lost), ("val", val, val_lost)):
        if not found:
            raise wrong(root, f"none of the {len(gone)} clips of {split} is there, first {gone[0]}", "check that data.root is the folder that holds train/ and val/")
    return Data(name, root, len(train), len(val), classes, (*lost, *val_lost))


# COCO.


def coco_files(root: Path, split: str) -> tuple[Path, Path]:
    """The json with a split's annotations and the folder of its images."""
    return root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"


def _coco(name: str, root: Path) -> Data:
    train, val = (_coco_split(root, split) for split in SPLITS)
    if train["classes"] != val["classes"]:
        odd = set(train["classes"]) ^ set(val["classes"])
        raise wrong(root, f"train and val do not have the same categories{': ' + some(sorted(odd)) if odd else ' in the same order'}", "both json files need the same list")
    return Data(name, root, train["annotated"], val["images"], tuple(train["classes"]))


def _coco_split(root: Path, split: str) -> dict[str, Any]:
    """{"images", "annotated", "classes"} of a split: annotated counts the images with an object that is not a crowd,
    which are those that are trained on."""
    path, folder = coco_files(root, split)
    where = os.path.relpath(path, root)
    if not path.is_file():
        raise wrong(root, f"no {where}", f"COCO's annotations_trainval2017.zip holds it, {nearest('annotations', _names(root))}")
    summary = _cached(path, lambda: _coco_summary(root, path, folder.name))
    there = set(_names(folder))
    lost = [n for n in summary["files"] if n not in there] if "/" not in "".join(summary["files"]) else [
        n for n in summary["files"] if not (folder / n).is_file()]
    if lost:
        raise wrong(root, f"{where} lists images that are not in {folder.name}/: {some(lost)} of {len(summary['files'])}", f"unpack {folder.name}.zip here again")
    return {"images": len(summary["files"]), "annotated": summary["annotated"], "classes": summary["classes"]}


def _coco_summary(root: Path, path: Path, folder: str) -> dict[str, Any]:
    where = os.path.relpath(path, root)
    try:
        tables = json.loads(path.read_bytes())
        images = {i["id"]: (i["file_name"], i["height"], i["width"]) for i in tables["images"]}
        categories = {c["id"]: c["name"] for c in tables["categories"]}
        annotations = tables["annotations"]
        fault = next(_coco_faults(images, categories, annotations), None)
        if fault:
            raise wrong(root, f"{where}: {fault[0]}", fault[1])
        annotated = len({a["image_id"] for a in annotations if not a.get("iscrowd")})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "not json" if isinstance(error, ValueError) else f"not COCO's form ({type(error).__name__}: {error})"
        raise wrong(root, f"{where} is {kind}", "expected {images, annotations, categories}; see cocodataset.org/#format-data") from None
    for file, _, _ in images.values():
        inside(root, file, where)
    return {"files": [file for file, _, _ in images.values()], "annotated": annotated,
            "classes": [categories[i] for i in sorted(categories)]}


def _coco_faults(images: Mapping[Any, Any], categories: Mapping[Any, str], annotations: list[Any]) -> Iterator[tuple[str, str]]:
    """What is wrong and how to mend it, each as a pair, in the order of the annotations."""
    for table, what in ((images, "images"), (annotations, "annotations"), (categories, "categories")):
        if not table:
            yield f"the list of {what} is empty", "training needs at least one"
    if len({a["id"] for a in annotations}) < len(annotations):
        yield "two annotations have the same id", "give each its own"
    for a in annotations:
        if a["category_id"] not in categories:
            yield (f"annotation {a['id']} has category_id {a['category_id']}, which is not in categories",
                   f"ids go from {min(categories)} to {max(categories)}")
        if a["image_id"] not in images:
            yield f"annotation {a['id']} has image_id {a['image_id']}, which is not in images", "remove it"
            continue
        _, height, width = images[a["image_id"]]
        shape = a.get("segmentation")
        if isinstance(shape, dict) and list(shape["size"]) != [height, width]:
            yield f"annotation {a['id']}'s mask is {shape['size']} and its image [{height}, {width}]", "an RLE's size is [height, width]"
        elif isinstance(shape, list) and any(_outside(polygon, height, width) for polygon in shape):
            yield f"annotation {a['id']}'s polygon leaves its image of {width} x {height}", "coordinates are x, y in pixels; width and height may be swapped"


def _outside(polygon: list[float], height: float, width: float) -> bool:
    """Whether a polygon leaves its image by more than a twentieth (annotation tools overshoot by a pixel or two)."""
    return bool(polygon) and (max(polygon[0::2]) > 1.05 * width + 2 or max(polygon[1::2], default=0) > 1.05 * height + 2
                              or min(polygon) < -2 - 0.05 * max(height, width))


def _cached(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """compute(), kept in the user's cache folder for as long as path's size and time stay: COCO's json takes 10 s."""
    stat = path.stat()
    if stat.st_size < 5_000_000:
        return compute()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:1".encode()).hexdigest()[:20]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "budgeted" / f"coco-{key}.json"
    if home.is_file():
        return json.loads(home.read_text())
    result = compute()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        beside = home.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(result))
        beside.replace(home)
    except OSError:
        return result  # a read-only home costs time and nothing else
    return result


LAYOUTS: dict[str, Callable[[str, Path], Data]] = {
    "classification": _class_folders, "detection": _coco, "segmentation": _cityscapes, "video": _kinetics,
}
