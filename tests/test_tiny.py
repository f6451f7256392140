"""The embedded data: the real formats, the same bytes every time, written once and whole."""

import csv
import filecmp
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from budgeted.errors import UserError
from tasks import layouts, tiny

ADAPTERS = {
    "imagenet_tiny": "classification",
    "coco_tiny": "detection",
    "cityscapes_tiny": "segmentation",
    "kinetics_tiny": "video",
}


def config(folder: Path, name: str) -> dict:
    return {"task": {"name": name, "adapter": ADAPTERS[name]}, "data": {"root": str(folder / name), "subset": None}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with all four sets (an eighth of imagenet_tiny), and what inspect() said of each before it was there."""
    folder = tmp_path_factory.mktemp("tiny")
    patch = pytest.MonkeyPatch()
    patch.setitem(tiny.COUNTS, "imagenet_tiny", (250, 130, tiny.COUNTS["imagenet_tiny"][2]))
    before = {name: layouts.inspect(config(folder, name)) for name in tiny.COUNTS}
    for name in tiny.COUNTS:
        tiny.ensure(config(folder, name))
    patch.undo()
    return folder, before


@pytest.mark.parametrize("name", tiny.COUNTS)
def test_counts_are_known_before_anything_is_written_and_hold_after(written, name):
    folder, before = written
    assert layouts.inspect(config(folder, name)) == before[name]
    data, findings, decoded = layouts.check(config(folder, name))
    assert (data, findings) == (before[name], []) and decoded >= 32


def test_counts():
    assert {name: (n, v, len(c)) for name, (n, v, c) in tiny.COUNTS.items()} == {
        "imagenet_tiny": (2000, 500, 10),
        "coco_tiny": (120, 40, 3),
        "cityscapes_tiny": (80, 24, 19),
        "kinetics_tiny": (80, 40, 5),
    }


def same(a: Path, b: Path) -> bool:
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    return filecmp.cmpfiles(a, b, files, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("name", ["coco_tiny", "cityscapes_tiny"])
def test_a_second_writing_gives_the_same_bytes(written, tmp_path, name):
    tiny.ensure(config(tmp_path, name))
    assert same(written[0] / name, tmp_path / name)


def test_clips_are_encoded_to_the_same_bytes(written, tmp_path):
    for index in (3, 4, 11):
        label, frames = tiny._frames("val", index)
        name = f"tinyv{index:06d}_{index:06d}_{index + 2:06d}.mp4"
        tiny.encode(tmp_path / name, frames)
        assert filecmp.cmp(
            tmp_path / name, written[0] / "kinetics_tiny/val" / tiny.MOTIONS[label] / name, shallow=False
        )


def test_imagenet_files_are_what_their_index_draws(written, tmp_path):
    label, picture = tiny._form_image("val", 123)
    picture.save(tmp_path / "x.JPEG", quality=90)
    assert label == 3
    assert filecmp.cmp(
        tmp_path / "x.JPEG", written[0] / "imagenet_tiny/val/n00000004/n00000004_123.JPEG", shallow=False
    )


def test_imagenet_is_balanced_class_folders_of_jpeg(written):
    root = written[0] / "imagenet_tiny"
    assert {len(list(d.iterdir())) for d in (root / "train").iterdir()} == {25}
    assert {len(list(d.iterdir())) for d in (root / "val").iterdir()} == {13}
    with Image.open(root / "train/n00000001/n00000001_0.JPEG") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (40, 40), "RGB")


def test_coco_reads_with_its_own_tool_and_areas_fit_the_masks(written):
    from pycocotools.coco import COCO

    coco = COCO(written[0] / "coco_tiny/annotations/instances_train2017.json")
    assert sorted(coco.getCatIds()) == [3, 17, 44]
    rows = list(coco.anns.values())
    kinds = [("crowd" if r["iscrowd"] else "rle") if isinstance(r["segmentation"], dict) else "polygon" for r in rows]
    assert kinds.count("polygon") > 200 and kinds.count("rle") > 10 and kinds.count("crowd") > 5
    for row, kind in zip(rows, kinds, strict=True):
        drawn = coco.annToMask(row)
        assert drawn.shape == (coco.imgs[row["image_id"]]["height"], coco.imgs[row["image_id"]]["width"])
        assert abs(int(drawn.sum()) - row["area"]) <= (0 if kind != "polygon" else 30 + 0.1 * row["area"])


def test_cityscapes_labels_are_its_own_ids_and_their_training_ids(written):
    root = written[0] / "cityscapes_tiny"
    pairs = {7: 0, 8: 1, 11: 2, 17: 5, 21: 8, 23: 10, 24: 11, 26: 13, 1: 255}
    seen = set()
    for file in root.glob("gtFine/*/*/*_labelIds.png"):
        ids, trained = (
            np.asarray(Image.open(str(file).replace("labelIds", kind))) for kind in ("labelIds", "labelTrainIds")
        )
        assert ids.shape == (64, 128) and ids.dtype == np.uint8
        both = set(zip(ids.ravel().tolist(), trained.ravel().tolist(), strict=True))
        assert both <= set(pairs.items())
        seen |= both
    assert seen == set(pairs.items())


def test_kinetics_has_the_official_columns_and_clips_of_24_frames(written):
    import av

    root = written[0] / "kinetics_tiny"
    with (root / "val.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0].values()) == ["falling", "tinyv000000", "0", "2", "val"]
    assert list(rows[0]) == ["label", "youtube_id", "time_start", "time_end", "split"]
    assert (root / "val_list.csv").read_text().splitlines()[0] == "val/falling/tinyv000000_000000_000002.mp4 0"
    with av.open(str(root / "val/falling/tinyv000000_000000_000002.mp4")) as clip:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in clip.decode(video=0)]
    assert frames == [(64, 64, 3)] * 24


@pytest.mark.parametrize(("motion", "way"), [("falling", 1), ("rising", -1)])
def test_the_motion_is_the_class(motion, way):
    for index in range(tiny.MOTIONS.index(motion), 30, len(tiny.MOTIONS)):
        frames = np.stack(tiny._frames("train", index)[1]).astype(float)
        moving = np.abs(frames - np.median(frames, 0)).sum(-1) > 90
        rows = [np.nonzero(m)[0].mean() for m in (moving[:3].any(0), moving[-3:].any(0))]
        assert way * (rows[1] - rows[0]) > 8


def test_a_set_of_another_version_is_written_again(tmp_path, monkeypatch):
    cfg = config(tmp_path, "cityscapes_tiny")
    monkeypatch.setitem(tiny.WRITERS, "cityscapes_tiny", lambda root: (root / "old").write_text("old"))
    monkeypatch.setattr(tiny, "VERSION", 0)
    tiny.ensure(cfg)
    monkeypatch.undo()
    monkeypatch.setitem(tiny.WRITERS, "cityscapes_tiny", lambda root: (root / "new").write_text("new"))
    tiny.ensure(cfg)
    root = tmp_path / "cityscapes_tiny"
    assert sorted(p.name for p in root.iterdir()) == [".tiny.json", "new"]
    assert json.loads((root / ".tiny.json").read_text())["version"] == tiny.VERSION


def test_an_old_set_with_other_files_in_it_is_not_removed(tmp_path):
    root = tmp_path / "coco_tiny"
    root.mkdir()
    (root / ".tiny.json").write_text('{"version": 0, "entries": ["annotations"]}')
    (root / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"older embedded set lies beside files that are none of it \(mine.txt\)"):
        tiny.ensure(config(tmp_path, "coco_tiny"))
    assert (root / "mine.txt").read_text() == "mine"


def test_own_data_under_the_name_of_a_tiny_task_is_left_alone(tmp_path):
    (tmp_path / "imagenet_tiny").mkdir()
    (tmp_path / "imagenet_tiny/mine.txt").write_text("mine")
    tiny.ensure(config(tmp_path, "imagenet_tiny"))
    assert [p.name for p in (tmp_path / "imagenet_tiny").iterdir()] == ["mine.txt"]


def test_a_root_of_another_name_gets_nothing(tmp_path):
    cfg = config(tmp_path, "coco_tiny")
    cfg["data"]["root"] = str(tmp_path / "typo")
    tiny.ensure(cfg)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(UserError, match="no such folder"):
        layouts.inspect(cfg)


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(root):
        (root / "half").write_text("half")
        raise RuntimeError("stopped")

    monkeypatch.setitem(tiny.WRITERS, "coco_tiny", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        tiny.ensure(config(tmp_path, "coco_tiny"))
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data.root=\S+: cannot be written \(.*\): choose another data.root$"):
        tiny.ensure(config(tmp_path / "file", "coco_tiny"))


def test_two_processes_at_once_write_one_set(tmp_path):
    code = f"from tasks import tiny; tiny.ensure({config(tmp_path, 'coco_tiny')!r})"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert layouts.inspect(config(tmp_path, "coco_tiny")).n_train == 120
    assert sorted(p.name for p in tmp_path.iterdir()) == [".coco_tiny.lock", "coco_tiny"]


def test_neither_listing_nor_writing_needs_torch(tmp_path):
    code = f"import sys; from tasks import layouts; layouts.inspect({config(tmp_path, 'coco_tiny')!r}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
