"""Embedded data: small generated sets in the on-disk format of the real ones, so that the same code path reads both.

Every image, clip and annotation is drawn by numpy generators keyed by (split, index): the files come out the same
byte for byte on every run with the same libraries. Nothing here is a photograph and nothing needs a network.
"""

from __future__ import annotations

import colorsys
import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from budgeted.errors import UserError
from tasks.folder import digest_of, tally
from tasks.layouts import STREET_CLASSES

VERSION = 4  # a set written by another version is generated again
MARKER = ".tiny.json"
SPLITS = ("train", "val")
SHAPES, FILLS = ("disc", "square", "triangle", "cross", "star"), ("striped", "checked")
FORMS = [(SHAPES[i % 5], FILLS[i % 2]) for i in range(10)]  # each pair once; neighbours share neither
THINGS = {3: "ball", 17: "kite", 44: "star"}  # category ids with gaps, like COCO's own
MOTIONS = ("falling", "growing", "rising", "shrinking", "spinning")  # none of them changes in a mirror
# Cityscapes' own labelIds; ego (the car's own bonnet) is one of those that training ignores
STUFF = dict(ego=1, road=7, sidewalk=8, building=11, pole=17, vegetation=21, sky=23, person=24, car=26)
# How often a piece of the outline is repeated around the centre, and the piece: (share of its turn, distance)
OUTLINES: dict[str, tuple[int, list[tuple[float, float]]]] = {
    "disc": (28, [(0, 1)]),
    "triangle": (3, [(0, 1)]),
    "square": (4, [(0, 1)]),
    "kite": (2, [(0, 1), (0.5, 0.55)]),
    "star": (5, [(0, 1), (0.5, 0.42)]),
    "cross": (4, [(-0.2, 1.05), (0.2, 1.05), (0.5, 0.47)]),
}
COUNTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "imagenet_tiny": (2000, 500, tuple(f"n{i:08d}" for i in range(1, len(FORMS) + 1))),
    "coco_tiny": (120, 40, tuple(THINGS.values())),
    "cityscapes_tiny": (80, 24, STREET_CLASSES),
    "kinetics_tiny": (80, 40, MOTIONS),
}
DRAWN = {"train": (101, 109, 103), "val": (31, 31, 38)}  # how many of THINGS coco_tiny shows
Array = np.ndarray


def embedded(cfg: Mapping[str, Any]) -> bool:
    """Whether cfg asks for an embedded set: a *_tiny task whose data.root is a folder of the task's own name."""
    return cfg["task"]["name"] in COUNTS and Path(cfg["data"]["root"]).name == cfg["task"]["name"]


def digest(name: str) -> str:
    """The Data.digest of an embedded set, known before it is written."""
    *counts, classes = COUNTS[name]
    sizes = dict(zip(SPLITS, counts, strict=True))
    held: Iterable[Any] = (tally(classes, (k % len(classes) for k in range(size))) for size in sizes.values())
    if name == "coco_tiny":
        held = ([size, DRAWN[split]] for split, size in sizes.items())
    elif name == "cityscapes_tiny":
        held = (sorted(Counter(_city(split, k) for k in range(size)).items()) for split, size in sizes.items())
    return digest_of(classes, *held)


def ensure(cfg: Mapping[str, Any]) -> None:
    """Write the embedded set of a *_tiny task to cfg["data"]["root"] unless it is there. Safe to call from many
    processes at once: one writes beside the root and renames, the others wait. A folder with other data in it
    is left as it is. Raises UserError."""
    from filelock import FileLock

    root = Path(cfg["data"]["root"]).expanduser()
    if not embedded(cfg) or _marker(root).get("version") == VERSION:
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock"):
            marker = _marker(root)
            if marker.get("version") != VERSION and (marker or not root.exists() or not any(root.iterdir())):
                _replace(root, cfg["task"]["name"], {MARKER, *marker.get("entries", [])})
    except OSError as error:
        raise UserError(f"data.root={root}: cannot be written ({error.strerror}): choose another data.root") from None


def _marker(root: Path) -> dict[str, Any]:
    """What the marker of a finished set says; empty where there is none."""
    try:
        return json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        return {}


def _replace(root: Path, name: str, stale: set[str]) -> None:
    """Generate beside root, then swap by renaming. Whatever is in root must be among the stale entries."""
    foreign = sorted({p.name for p in root.iterdir()} - stale) if root.exists() else []
    if foreign:
        what = f"an older embedded set lies beside files that are none of it ({foreign[0]})"
        raise UserError(f"data.root={root}: {what}: move them away, or set another data.root")
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        WRITERS[name](fresh)
        n_train, n_val, _ = COUNTS[name]
        entries = sorted(p.name for p in fresh.iterdir())
        marker = {"version": VERSION, "name": name, "n_train": n_train, "n_val": n_val, "entries": entries}
        (fresh / MARKER).write_text(json.dumps(marker) + "\n")
        if root.exists():
            root.rename(Path(scratch, "stale"))
        fresh.rename(root)


# Drawing. A canvas is a float array (height, width, 3) in 0..255, a mask a float array (height, width) in 0..1.


def _rng(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), index])


def _outline(shape: str, centre: Any, radius: float, angle: float) -> Array:
    """Corners of a shape as (n, 2) pixel coordinates x, y."""
    repeats, corners = OUTLINES[shape]
    turn = [angle + 2 * np.pi * (k + part) / repeats for k in range(repeats) for part, _ in corners]
    reach = radius * np.array([reach for _, reach in corners] * repeats)
    return np.asarray(centre) + np.stack([reach * np.cos(turn), reach * np.sin(turn)], 1)


def _mask(size: tuple[int, int], outline: Array) -> Array:
    """The polygon's coverage of each pixel; size is (width, height)."""
    fine = Image.new("L", (size[0] * 4, size[1] * 4))
    ImageDraw.Draw(fine).polygon([(x * 4, y * 4) for x, y in outline.tolist()], fill=255)
    return np.asarray(fine.resize(size, Image.Resampling.BOX), np.float32) / 255


def _paint(canvas: Array, mask: Array, colour: Array) -> None:
    canvas += mask[..., None] * (colour - canvas)


def _clouds(rng: np.random.Generator, size: tuple[int, int], spread: float = 45.0) -> Array:
    """A smooth background of random colours."""
    coarse = np.clip(rng.normal(rng.uniform(60, 190, 3), spread, (4, 4, 3)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32).copy()


def _colour(rng: np.random.Generator, away_from: Array, distance: float = 70.0) -> Array:
    """A random colour that can be told from another."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - away_from).mean() > distance:
            return colour


def _picture(canvas: Array, rng: np.random.Generator, noise: float) -> Image.Image:
    return Image.fromarray(np.clip(canvas + rng.normal(0, noise, canvas.shape), 0, 255).astype(np.uint8))


def _clutter(rng: np.random.Generator, canvas: Array, count: int, radius: float) -> None:
    height, width = canvas.shape[:2]
    for _ in range(count):
        shape = rng.choice(["disc", "square", "triangle", "kite"])
        outline = _outline(shape, rng.uniform(0, [width, height]), radius * rng.uniform(0.4, 1), rng.uniform(0, 6.3))
        _paint(canvas, _mask((width, height), outline), rng.uniform(0, 255, 3))


# imagenet_tiny: ten forms (shape x fill), any colour, size, angle and place.


def _hue(turn: float, value: float) -> Array:
    """A colour by its place on the wheel (1 is once around)."""
    return 255 * value * np.array(colorsys.hsv_to_rgb(turn % 1, 0.75, 1))


def _form(rng: np.random.Generator, canvas: Array, label: int) -> None:
    """Paint the form of a class: shape and fill are its own, of the colour it has a leaning only."""
    shape, fill = FORMS[label]
    size = canvas.shape[0]
    radius, angle = size * rng.uniform(0.28, 0.46), rng.normal(0, 0.4)
    centre = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
    hue = label / len(FORMS) + rng.normal(0, 0.09)
    light, dark = _hue(hue, rng.uniform(0.75, 1)), _hue(hue, rng.uniform(0.1, 0.5))
    y, x = np.mgrid[:size, :size]
    tilt, pitch = rng.normal(0.8, 0.3), 2 * np.pi / rng.uniform(6, 9)
    u, v = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    wave = np.sin(pitch * u + rng.uniform(0, 6.3))
    if fill == "checked":
        wave = wave * np.sin(pitch * v + rng.uniform(0, 6.3))
    blend = np.clip(0.5 + 2 * wave, 0, 1)[..., None]
    _paint(canvas, _mask((size, size), _outline(shape, centre, radius, angle)), dark + blend * (light - dark))


def _form_image(split: str, index: int) -> tuple[int, Image.Image]:
    """Label and picture. One in ten shows a second form of any class, and nothing says which one counts."""
    rng = _rng(split, index)
    label = index % len(FORMS)
    canvas = _clouds(rng, (40, 40), 20)
    _clutter(rng, canvas, int(rng.integers(1, 4)), 6)
    shown = [label, int(rng.integers(len(FORMS)))] if rng.random() < 0.1 else [label]
    for form in rng.permutation(shown):
        _form(rng, canvas, form)
    _clutter(rng, canvas, int(rng.integers(0, 3)), 5)
    return label, _picture(canvas, rng, rng.uniform(4, 20))


def _imagenet(root: Path) -> None:
    *counts, classes = COUNTS["imagenet_tiny"]
    for split, count in zip(SPLITS, counts, strict=True):
        for wnid in classes:
            (root / split / wnid).mkdir(parents=True)
        for index in range(count):
            label, picture = _form_image(split, index)
            picture.save(root / split / classes[label] / f"{classes[label]}_{index}.JPEG", quality=90)


# coco_tiny: one to four things an image; a tenth of the masks as RLE, and here and there a crowd.


def _thing(rng: np.random.Generator, canvas: Array, category: int) -> tuple[Array, Array]:
    """Paint one thing; its outline clipped to the image, and its mask."""
    height, width = canvas.shape[:2]
    radius = rng.uniform(10, 26)
    shape = {"ball": "disc"}.get(THINGS[category], THINGS[category])
    outline = _outline(
        shape,
        rng.uniform(0.6 * radius, [width - 0.6 * radius, height - 0.6 * radius]),
        radius,
        rng.uniform(0, 2 * np.pi),
    )
    mask = _mask((width, height), outline)
    _paint(canvas, mask, _colour(rng, canvas.mean((0, 1)), 50))
    return np.clip(outline, 0, [width, height]), mask > 0.5


def _annotation(outline: Array, mask: Array, form: str) -> dict[str, Any]:
    """segmentation, area, bbox and iscrowd in COCO's fields; form is polygon, rle or crowd."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    segmentation: Any = [np.round(outline, 2).ravel().tolist()]
    if form == "rle":
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    elif form == "crowd":  # runs over columns, the first of zeros
        flat = np.concatenate([[0], mask.ravel(order="F").astype(np.int8), [1 - mask[-1, -1]]])
        edges = np.flatnonzero(np.diff(flat))
        segmentation = {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}
    return {
        "segmentation": segmentation,
        "area": float(coco_mask.area(rle)),
        "bbox": coco_mask.toBbox(rle).tolist(),
        "iscrowd": int(form == "crowd"),
    }


def _coco_image(split: str, index: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    rng = _rng(split, index)
    width, height = (int(side) for side in rng.choice([96, 112, 128], 2))
    canvas = _clouds(rng, (width, height), 30)
    annotations = []
    if rng.random() < 0.1:
        category = int(rng.choice(list(THINGS)))
        herd = [_thing(rng, canvas, category)[1] for _ in range(6)]
        annotations.append({**_annotation(np.zeros((0, 2)), np.any(herd, 0), "crowd"), "category_id": category})
    for _ in range(int(rng.integers(1, 5))):
        category = int(rng.choice(list(THINGS)))
        outline, mask = _thing(rng, canvas, category)
        form = "rle" if rng.random() < 0.1 else "polygon"
        annotations.append({**_annotation(outline, mask, form), "category_id": category})
    return _picture(canvas, rng, 8), annotations


def _coco(root: Path) -> None:
    categories = [{"supercategory": "thing", "id": i, "name": name} for i, name in THINGS.items()]
    (root / "annotations").mkdir()
    for split, count in zip(SPLITS, COUNTS["coco_tiny"][:2], strict=True):
        folder = root / f"{split}2017"
        folder.mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            picture, found = _coco_image(split, index)
            image_id = index * 7 + 9
            name = f"{image_id:012d}.jpg"
            picture.save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "width": picture.width, "height": picture.height})
            annotations += [{"id": len(annotations) + k + 1, "image_id": image_id, **a} for k, a in enumerate(found)]
        tables = {
            "info": {"description": "budgeted coco_tiny"},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tables))


# cityscapes_tiny: streets from behind the wheel, with Cityscapes' label ids.


def _street(split: str, index: int) -> tuple[Image.Image, Array]:
    """Picture and labelIds (uint8) of one scene of 128 x 64."""
    rng, width, height = _rng(split, index), 128, 64
    canvas, labels = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.uint8)
    tints = {
        "ego": (40, 40, 45),
        "road": (110, 105, 110),
        "sidewalk": (150, 140, 145),
        "building": (130, 115, 100),
        "pole": (90, 90, 95),
        "vegetation": (70, 105, 60),
        "sky": (185, 205, 225),
        "person": (120, 70, 75),
        "car": (90, 95, 140),
    }

    def put(stuff: str, corners: Array | Sequence[Sequence[float]], jitter: float = 22.0) -> None:
        mask = _mask((width, height), np.asarray(corners, float))
        _paint(canvas, mask, np.asarray(tints[stuff]) + rng.normal(0, jitter, 3) + rng.normal(0, 7, canvas.shape))
        labels[mask > 0.5] = STUFF[stuff]

    def box(x: float, y: float, w: float, h: float) -> list[list[float]]:
        return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]

    horizon = rng.uniform(24, 32)
    put("sky", box(0, 0, width, height))
    x = 0.0
    while x < width:
        w, tall = rng.uniform(12, 34), rng.uniform(4, horizon - 2)
        put("building", box(x, horizon - tall, w, tall + 4), 30)
        x += w + rng.choice([0, 0, rng.uniform(4, 16)])
    for _ in range(int(rng.integers(1, 5))):
        put("vegetation", _outline("disc", (rng.uniform(0, width), horizon - rng.uniform(0, 8)), rng.uniform(5, 13), 0))
    put("sidewalk", box(0, horizon, width, height))
    middle, half = rng.uniform(50, 78), rng.uniform(45, 75)
    put("road", [[middle - 6, horizon], [middle + 6, horizon], [middle + half, height], [middle - half, height]])
    for _ in range(int(rng.integers(1, 4))):
        depth = rng.uniform(0.15, 0.75)
        y, w = horizon + depth * (height - horizon), 8 + 30 * depth
        put("car", box(middle + rng.uniform(-1, 1) * half * depth * 0.7 - w / 2, y - 0.55 * w, w, 0.6 * w), 45)
    for _ in range(int(rng.integers(0, 4))):
        depth, x = rng.uniform(0.2, 0.9), rng.uniform(2, width - 8)
        tall, foot = 9 + 18 * depth, horizon + depth * (height - horizon) * 0.8
        put("person", [*box(x, foot - tall, 0.32 * tall, tall)], 40)
    for _ in range(int(rng.integers(0, 3))):
        put("pole", box(rng.uniform(0, width), horizon - rng.uniform(10, 22), 2, rng.uniform(20, 30)))
    put("ego", box(0, height - 3, width, 3))
    return _picture(canvas * rng.uniform(0.8, 1.15), rng, 6), labels


def _city(split: str, index: int) -> str:
    return ("oberstadt", "niederstadt")[index % 2] if split == "train" else "mittelstadt"


def _cityscapes(root: Path) -> None:
    from tasks.prepare import train_ids

    for split, count in zip(SPLITS, COUNTS["cityscapes_tiny"][:2], strict=True):
        for index in range(count):
            city = _city(split, index)
            stem = f"{city}_{index:06d}_000019"
            picture, labels = _street(split, index)
            files = {
                f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png": picture,
                f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png": Image.fromarray(labels),
                f"gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png": Image.fromarray(train_ids(labels)),
            }
            for name, image in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(root / name)


# kinetics_tiny: one frame says nothing, the motion is the class.


def _frames(split: str, index: int, count: int = 24) -> tuple[int, list[Array]]:
    """Label and `count` frames of 64 x 64."""
    rng = _rng(split, index)
    label = index % len(MOTIONS)
    motion = MOTIONS[label]
    background = _clouds(rng, (64, 64), 25) * 0.45  # dark: a net that small finds the way of light things alone
    colour = rng.uniform(150, 255, 3)
    shape, pace = str(rng.choice(["square", "triangle", "cross", "star"])), rng.uniform(0.7, 1.3)
    radius, x, angle = rng.uniform(9, 15), rng.uniform(18, 46), rng.uniform(0, 2 * np.pi)
    way = {"falling": 1, "growing": 1, "rising": -1, "shrinking": -1}.get(motion, int(rng.choice([-1, 1])))
    travel = 34 * pace * way if motion in ("falling", "rising") else 0
    scale = pace * way if motion in ("growing", "shrinking") else 0
    turn = way * pace * 4 if motion == "spinning" else 0
    y = 32 + rng.uniform(-6, 6)
    frames = []
    for t in np.linspace(-0.5, 0.5, count):
        canvas = background.copy()
        centre = (x, y + travel * t) + rng.normal(0, 0.2, 2)
        _paint(canvas, _mask((64, 64), _outline(shape, centre, radius * np.exp(scale * t), angle + turn * t)), colour)
        frames.append(np.asarray(_picture(canvas, rng, 4)))
    return label, frames


def encode(path: Path, frames: Sequence[Array], rate: int = 12) -> None:
    """Write RGB frames (height, width, 3) uint8 as an mp4 of `rate` frames a second: h264, or mpeg4 without libx264.
    x264's assembler gives other bytes from call to call on frames this small, so it is off."""
    import av

    x264 = "libx264" in av.codecs_available
    options = {"crf": "18", "preset": "ultrafast", "x264-params": "asm=0:bframes=2"} if x264 else {"qscale": "3"}
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264" if x264 else "mpeg4", rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def _kinetics(root: Path) -> None:
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in MOTIONS))
    for split, count in zip(SPLITS, COUNTS["kinetics_tiny"][:2], strict=True):
        official, manifest = [], []
        for index in range(count):
            label, frames = _frames(split, index)
            clip, start = f"tiny{split[0]}{index:06d}", index % 90
            name = f"{split}/{MOTIONS[label]}/{clip}_{start:06d}_{start + 2:06d}.mp4"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            encode(root / name, frames)
            official.append([MOTIONS[label], clip, start, start + 2, split])
            manifest.append(f"{name} {label}\n")
        with (root / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([["label", "youtube_id", "time_start", "time_end", "split"], *official])
        (root / f"{split}_list.csv").write_text("".join(manifest))


WRITERS: dict[str, Callable[[Path], None]] = {
    "imagenet_tiny": _imagenet,
    "coco_tiny": _coco,
    "cityscapes_tiny": _cityscapes,
    "kinetics_tiny": _kinetics,
}
