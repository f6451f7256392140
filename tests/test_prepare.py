"""mode=prepare: what it writes, that it removes nothing, that it goes on where it was."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from budgeted.errors import UserError
from tasks import cli, layouts, prepare, tiny

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data beside the checkout is not here")


def run(root: Path, adapter: str, **options) -> list[str]:
    cfg = {"task": {"name": "mine", "adapter": adapter}, "data": {"root": str(root)}}
    cfg["prepare"] = {"labels": None, "pack": False, "short_side": 256, "workers": 2, **options}
    return prepare.prepare(cfg, logging.getLogger("budgeted"))


def look(root: Path, adapter: str) -> layouts.Data:
    return layouts.inspect({"task": {"name": "mine", "adapter": adapter}, "data": {"root": str(root)}})


def files(root: Path) -> dict[str, int]:
    """Path -> inode of every file."""
    return {str(p.relative_to(root)): p.stat().st_ino for p in root.rglob("*") if p.is_file()}


def test_absent_root(tmp_path):
    with pytest.raises(UserError, match="no such folder: set data.root to the folder that holds the unpacked files"):
        run(tmp_path / "x", "video")


def test_coco_needs_nothing(tmp_path):
    assert run(tmp_path, "detection") == [f"{tmp_path}: mine needs no preparation"]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("prepare.labels=5", "prepare.labels=5: must be a path or null"),
        ("prepare.labels=[a]", "prepare.labels=['a']: must be a path or null"),
        ("prepare.short_side=0", "prepare.short_side=0: must be a whole number of at least 1 or null"),
    ],
)
def test_words_that_are_wrong_are_one_line(word, line):
    with pytest.raises(UserError) as caught:
        cli.check_arguments(["mode=prepare", "task=imagenet", word])
    assert str(caught.value) == line


# ImageNet.


@pytest.fixture
def imagenet(tmp_path):
    for wnid in ("n01", "n02"):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "0.JPEG").write_bytes(b"x")
    (tmp_path / "val").mkdir()
    for i in range(1, 5):
        (tmp_path / f"val/ILSVRC2012_val_0000000{i}.JPEG").write_bytes(bytes([i]))
    return tmp_path


LABELS = "image,wnid\n" + "".join(f"ILSVRC2012_val_0000000{i}.JPEG,n0{1 + i % 2}\n" for i in range(1, 5))
KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_0000000{i},n0{1 + i % 2} 1 2 3 4 n0{1 + i % 2} 5 6 7 8 \n" for i in range(1, 5)
)


@pytest.mark.parametrize("text", [LABELS, KAGGLE, "\ufeff" + LABELS])
def test_validation_images_go_into_class_folders(imagenet, text):
    (imagenet / "labels.csv").write_text(text)
    before = files(imagenet)
    assert run(imagenet, "classification", labels=str(imagenet / "labels.csv")) == [
        f"{imagenet}/val/<class>/: 4 hard-linked; the loose images stay and may be removed"
    ]
    after = files(imagenet)
    assert before.items() <= after.items()
    assert sorted(set(after) - set(before)) == [
        "val/n01/ILSVRC2012_val_00000002.JPEG",
        "val/n01/ILSVRC2012_val_00000004.JPEG",
        "val/n02/ILSVRC2012_val_00000001.JPEG",
        "val/n02/ILSVRC2012_val_00000003.JPEG",
    ]
    data = look(imagenet, "classification")
    assert (data.n_train, data.n_val, data.classes) == (2, 4, ("n01", "n02"))
    assert "4 there already" in run(imagenet, "classification", labels=str(imagenet / "labels.csv"))[0]
    assert files(imagenet) == after


def test_validation_images_are_copied_where_links_are_not_to_be_had(imagenet, monkeypatch):
    def no_link(*_):
        raise OSError("no links here")

    (imagenet / "labels.csv").write_text(LABELS)
    monkeypatch.setattr(os, "link", no_link)
    assert "4 copied" in run(imagenet, "classification", labels=str(imagenet / "labels.csv"))[0]
    assert (imagenet / "val/n02/ILSVRC2012_val_00000003.JPEG").read_bytes() == b"\x03"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "val/ holds 4 loose images and nothing says what they show: "
         "set prepare.labels=<csv with columns image,wnid>, e.g. Kaggle's LOC_val_solution.csv"),
        ("a,b\n1,2\n", "has no columns image,wnid: put that line first"),
        (LABELS.replace("n02", "n03"), "class 'n03' is not a folder of train/: did you mean 'n0"),
        (LABELS.replace("n02", "../n02"), "class '../n02' is not a folder of train/: did you mean 'n02'?"),
        (LABELS.rsplit("ILSVRC", 1)[0], "lacks images of val/: 1 (ILSVRC2012_val_00000004.JPEG): add their rows"),
    ],
)  # fmt: skip
def test_labels_that_do_not_serve(imagenet, text, line):
    if text:
        (imagenet / "labels.csv").write_text(text)
    before = files(imagenet)
    with pytest.raises(UserError) as caught:
        run(imagenet, "classification", labels=text and str(imagenet / "labels.csv"))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert files(imagenet) == before


def test_class_folders_need_nothing(imagenet):
    for file in (imagenet / "val").iterdir():
        file.unlink()
    assert run(imagenet, "classification") == [f"{imagenet}: no loose images in val/: needs no preparation"]


# A packed copy of class folders.


@pytest.fixture
def small(tmp_path):
    """Two classes of 8x6 pictures."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{k}.png")
    return tmp_path / "set"


def test_packed_pixels_are_those_of_the_files(small):
    packed = small.with_name("set-packed")
    said = run(small, "classification", pack=True)
    assert said == [f"{packed}: 6 train, 4 val images of 8 x 6 packed", f"train with data.root={packed}"]
    whole = look(small, "classification")
    assert look(packed, "classification") == replace(whole, root=packed) and whole.digest
    for split in ("train", "val"):
        pixels, labels = layouts.packed.arrays(packed, split)
        for k, (path, label) in enumerate(layouts.images(small, split)[1]):
            assert (pixels[k] == np.asarray(Image.open(path))).all() and labels[k] == label
    before = files(packed)
    assert "there already" in run(small, "classification", pack=True)[0] and files(packed) == before


def test_only_whole_pictures_of_one_size_are_packed(small):
    odd = small / "train/dog/2.png"
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(odd)
    with pytest.raises(UserError, match=f"{odd}: is 9 x 6, the first 8 x 6"):
        run(small, "classification", pack=True)
    odd.write_bytes(odd.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{odd}: cannot be decoded"):
        run(small, "classification", pack=True)
    assert not layouts.is_packed(small.with_name("set-packed"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_first_picture_is_named(small, split):
    first = small / split / "cat/0.png"
    first.write_bytes(b"404 not found")
    with pytest.raises(UserError) as caught:
        run(small, "classification", pack=True)
    assert str(caught.value) == (f"{first}: cannot be decoded (not an image that Pillow knows); replace or remove it")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda root: (root / "val_images.npy").write_bytes(b"x"), "val_images.npy cannot be read"),
        (lambda root: (root / "val_labels.npy").unlink(), "val_labels.npy cannot be read"),
        (lambda root: np.save(root / "val_labels.npy", np.array([0, 1, 0])), "its labels (3,)"),
        (lambda root: np.save(root / "val_labels.npy", np.array([0, 1, 0, 2])), "goes to 2, classes.txt has 2"),
        (lambda root: np.save(root / "val_images.npy", np.zeros((4, 6, 8, 3))), "float64"),
        (lambda root: np.save(root / "val_labels.npy", np.array([{}]), allow_pickle=True), "cannot be read"),
    ],
)
def test_a_spoilt_packed_copy_is_one_line(small, spoil, what):
    run(small, "classification", pack=True)
    packed = small.with_name("set-packed")
    spoil(packed)
    with pytest.raises(UserError) as caught:
        look(packed, "classification")
    assert what in str(caught.value) and "prepare.pack=true" in str(caught.value)


def test_a_run_on_the_packed_copy_is_the_same_run(tmp_path):
    from tasks import base

    words = ("budget.amount=4it", "task.eval_every=100%", "device=cpu")
    data = tmp_path / "imagenet_tiny"
    tiny.ensure({"task": {"name": "imagenet_tiny"}, "data": {"root": str(data)}})
    run(data, "classification", pack=True)
    one, other = (
        base.train(cli.recipe((*words, f"data.root={root}", f"out={tmp_path / root.name}-runs")))
        for root in (data, data.with_name("imagenet_tiny-packed"))
    )
    assert one["weights_sha256"] == other["weights_sha256"] and one["metrics"] == other["metrics"]
    assert one["signature"] == other["signature"]


# Cityscapes.


def test_train_ids_of_every_label():
    ids = np.arange(34, dtype=np.uint8)
    x = 255
    assert prepare.train_ids(ids).tolist() == [
        *[x, x, x, x, x, x, x, 0, 1, x, x, 2, 3, 4, x, x, x, 5, x, 6, 7],
        *[8, 9, 10, 11, 12, 13, 14, 15, x, x, 16, 17, 18],
    ]  # fmt: skip
    assert prepare.train_ids(np.zeros((2, 3), np.uint8)).dtype == np.uint8
    with pytest.raises(ValueError, match=r"unknown ids \[34, 255\]"):
        prepare.train_ids(np.array([0, 34, 255], np.uint8))


def street(root: Path, name: str, ids: np.ndarray | None = None, polygons: list | None = None) -> Path:
    stem = f"ulm/ulm_{name}_000019"
    for split in ("train", "val"):
        picture = root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png"
        label = root / f"gtFine/{split}/{stem}_gtFine_"
        for path in (picture, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(picture)
        if ids is not None:
            Image.fromarray(ids).save(f"{label}labelIds.png")
        if polygons is not None:
            objects = [{"label": name, "polygon": polygon} for name, polygon in polygons]
            Path(f"{label}polygons.json").write_text(json.dumps({"imgHeight": 6, "imgWidth": 8, "objects": objects}))
    return Path(f"{root}/gtFine/val/{stem}_gtFine_labelTrainIds.png")


def test_labels_are_made_from_ids_or_drawn_from_polygons(tmp_path):
    one = street(tmp_path, "000000", np.full((6, 8), 26, np.uint8))
    square = [[0, 0], [3, 0], [3, 5], [0, 5]]
    two = street(tmp_path, "000001", None, [("sky", [[0, 0], [7, 0], [7, 5], [0, 5]]), ("cargroup", square)])
    before = files(tmp_path)
    assert run(tmp_path, "segmentation") == [
        f"{tmp_path}/gtFine, labelTrainIds: 2 drawn from polygons, 2 made from labelIds"
    ]
    assert before.items() <= files(tmp_path).items() and len(files(tmp_path)) == len(before) + 4
    assert (np.asarray(Image.open(one)) == 13).all()
    assert np.asarray(Image.open(two))[2].tolist() == [13, 13, 13, 13, 10, 10, 10, 10]
    assert look(tmp_path, "segmentation").n_val == 2
    after = files(tmp_path)
    assert run(tmp_path, "segmentation") == [f"{tmp_path}/gtFine, labelTrainIds: 4 there already"]
    assert files(tmp_path) == after


def test_labels_with_unknown_ids_stop_it_and_the_rest_can_go_on(tmp_path):
    bad = street(tmp_path, "000000", np.full((6, 8), 99, np.uint8))
    with pytest.raises(UserError) as caught:
        run(tmp_path, "segmentation")
    assert str(caught.value).endswith(
        "/ulm/ulm_000000_000019_gtFine_*: unknown ids [99], Cityscapes has 0 to 33: unpack gtFine_trainvaltest.zip again"
    )
    assert not bad.exists()
    street(tmp_path, "000000", np.full((6, 8), 7, np.uint8))
    run(tmp_path, "segmentation")
    assert (np.asarray(Image.open(bad)) == 0).all()


def test_polygons_of_an_unknown_label(tmp_path):
    street(tmp_path, "000000", None, [("spaceship", [[0, 0], [3, 0], [3, 5]])])
    with pytest.raises(UserError, match=r"unknown labels \['spaceship'\]"):
        run(tmp_path, "segmentation")


def test_labels_without_a_source_are_named_and_the_rest_is_made(tmp_path, said):
    made = street(tmp_path, "000000", np.full((6, 8), 7, np.uint8))
    gone = [street(tmp_path, f"{k:06d}", np.full((6, 8), 7, np.uint8)) for k in range(1, 3)]
    for label in gone:
        for split in ("train", "val"):
            Path(str(label).replace("/val/", f"/{split}/").replace("labelTrainIds", "labelIds")).unlink()
    with pytest.raises(UserError, match="labels absent: 3 .* run mode=prepare"):  # the first alone has a source
        look(tmp_path, "segmentation")
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "segmentation")
    assert caught.value.code == 1 and made.exists()
    stem = "gtFine/train/ulm/ulm_00000{}_000019_gtFine_labelTrainIds.png"
    names = f"{stem.format(1)}, {stem.format(2)}, {stem.format(1).replace('train', 'val')}, ..."
    assert said[-2:] == [
        f"{tmp_path}/gtFine, labelTrainIds: 2 made from labelIds, 4 without a source",
        f"{tmp_path}: 4 ({names}) cannot be made: neither labelIds nor polygons are there: "
        "unpack gtFine_trainvaltest.zip again, or remove the pictures",
    ]
    with pytest.raises(UserError, match=r"labels absent: 2 .*unpack gtFine_trainvaltest\.zip here"):
        look(tmp_path, "segmentation")


def test_a_first_label_without_a_source_does_not_hide_that_the_others_have_one(tmp_path):
    first = street(tmp_path, "000000", np.full((6, 8), 7, np.uint8))
    street(tmp_path, "000001", None, [("sky", [[0, 0], [3, 0], [3, 5]])])
    for split in ("train", "val"):
        Path(str(first).replace("/val/", f"/{split}/").replace("labelTrainIds", "labelIds")).unlink()
    with pytest.raises(UserError, match="labels absent: 2 .*: run mode=prepare task=mine data.root="):
        look(tmp_path, "segmentation")


@real
def test_real_streets_give_the_labels_that_came_with_them(tmp_path):
    for file in [*SHARED.glob("streets/*/val/*/*_leftImg8bit.png"), *SHARED.glob("streets/*/val/*/*_labelIds.png")]:
        copy = tmp_path / file.relative_to(SHARED / "streets")
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, copy) if os.stat(file).st_dev == os.stat(tmp_path).st_dev else copy.write_bytes(file.read_bytes())
    assert run(tmp_path, "segmentation") == [f"{tmp_path}/gtFine, labelTrainIds: 30 made from labelIds"]
    for file in tmp_path.glob("gtFine/val/*/*_labelTrainIds.png"):
        given = SHARED / "streets" / file.relative_to(tmp_path)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(given)))


# Kinetics.


def sizes(path: Path) -> list[tuple[int, int]]:
    import av

    with av.open(str(path)) as clip:
        return [(frame.width, frame.height) for frame in clip.decode(video=0)]


@pytest.fixture
def kinetics(tmp_path):
    """Three clips a split of 40 x 24; of the training ones one is absent and one cut short."""
    root = tmp_path / "k400"
    for split in ("train", "val"):
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i, label in enumerate(("sit down", "walk", "walk")):
            path = root / split / label / f"v{i}_{i:06d}_{i + 10:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny.encode(path, [np.full((24, 40, 3), 9 * k + i, np.uint8) for k in range(10)])
            rows.append(f"{label},v{i},{i},{i + 10},{split}")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    (root / "train/walk/v1_000001_000011.mp4").unlink()
    cut = root / "train/walk/v2_000002_000012.mp4"
    cut.write_bytes(cut.read_bytes()[:900])
    return root


def test_clips_are_cut_beside_and_the_missing_listed(kinetics):
    before, to = files(kinetics), kinetics.parent / "k400-16"
    assert run(kinetics, "video", short_side=16) == [
        f"{to}: 4 cut to 16, 2 missing; manifests are train_list.csv and val_list.csv",
        f"{to}/missing.txt: 2 (train/walk/v1_000001_000011.mp4, ...) absent or unreadable, left out of the manifests",
        f"train with data.root={to}",
    ]
    assert files(kinetics) == before
    assert (to / "train_list.csv").read_text() == "train/sit down/v0_000000_000010.mp4 0\n"
    assert (to / "val_list.csv").read_text().splitlines()[1:] == [
        "val/walk/v1_000001_000011.mp4 1",
        "val/walk/v2_000002_000012.mp4 1",
    ]
    assert (to / "classes.txt").read_text() == "sit down\nwalk\n"
    first, second = (to / "missing.txt").read_text().splitlines()
    assert first == "train/walk/v1_000001_000011.mp4: absent"
    assert second.startswith("train/walk/v2_000002_000012.mp4: cannot be decoded (")
    assert sizes(to / "val/walk/v1_000001_000011.mp4") == [(26, 16)] * 10
    lost = ("train/walk/v1_000001_000011.mp4", "train/walk/v2_000002_000012.mp4")
    data = look(to, "video")
    assert (data.n_train, data.n_val, data.classes, data.missing) == (1, 3, ("sit down", "walk"), lost)
    assert data.digest == look(kinetics, "video").digest is not None
    after = files(to)
    clips = {k: v for k, v in after.items() if k.endswith(".mp4")}
    assert "4 there already" in run(kinetics, "video", short_side=16)[0]
    assert clips == {k: v for k, v in files(to).items() if k.endswith(".mp4")}
    assert sorted(files(to)) == sorted(after)


def test_what_prepare_left_out_is_counted_and_said(kinetics):
    to, again = kinetics.parent / "k400-16", "training leaves it out; get it and run mode=prepare again"
    run(kinetics, "video", short_side=16)
    cfg = {"task": {"name": "mine", "adapter": "video", "frames": 8}, "data": {"root": str(to)}}
    data, (first, second), _ = layouts.check(cfg)
    assert len(data.missing) == 2
    assert first == f"train/walk/v1_000001_000011.mp4: absent, says missing.txt: {again}"
    assert second.startswith("train/walk/v2_000002_000012.mp4: cannot be decoded (") and second.endswith(again)
    with (to / "train_list.csv").open("a") as file:  # had after all, and listed by hand
        file.write("train/walk/v1_000001_000011.mp4 1\n")
    (to / "train/walk").mkdir()
    shutil.copy(to / "val/walk/v1_000001_000011.mp4", to / "train/walk")
    data, findings, _ = layouts.check(cfg)
    assert (data.n_train, data.missing, findings) == (2, ("train/walk/v2_000002_000012.mp4",), [second])
    (to / "train_list.csv").rename(to / "train.txt")  # missing.txt goes with the manifests
    assert layouts.lost_before(to) == {}


def test_where_the_class_of_a_clip_left_out_is_not_known_nor_is_the_digest(kinetics):
    """As of loose clips: with another digest, the very data it was made from would be refused."""
    to = kinetics.parent / "k400-16"
    run(kinetics, "video", short_side=16)
    assert look(to, "video").digest
    (to / "missing.txt").write_text("train/v1_000001_000011.mp4: absent\n")
    assert look(to, "video").digest is None


def test_a_copy_of_a_copy_keeps_what_is_missing(kinetics):
    run(kinetics, "video", short_side=20)
    run(kinetics.parent / "k400-20", "video", short_side=16)
    first, second = (kinetics.parent / f"k400-20{end}/missing.txt" for end in ("", "-16"))
    assert second.read_text() == first.read_text() and second.read_text().count("\n") == 2


def test_small_clips_are_linked(kinetics):
    run(kinetics, "video", short_side=24)
    clip = "val/walk/v1_000001_000011.mp4"
    assert (kinetics.parent / "k400-24" / clip).stat().st_ino == (kinetics / clip).stat().st_ino


def test_without_a_short_side_only_manifests_are_written(kinetics):
    before, digest = files(kinetics), look(kinetics, "video").digest
    assert run(kinetics, "video", short_side=None)[0] == (
        f"{kinetics}: 2 missing, 4 whole; manifests are train_list.csv and val_list.csv"
    )
    assert set(files(kinetics)) - set(before) == {"train_list.csv", "val_list.csv", "classes.txt", "missing.txt"}
    assert look(kinetics, "video").n_train == 1 and look(kinetics, "video").digest == digest
    assert "2 missing, 4 whole" in run(kinetics, "video", short_side=None)[0]


def test_without_a_short_side_from_the_command_line(kinetics):
    words = ["mode=prepare", "task=kinetics", f"data.root={kinetics}", "prepare.short_side=null"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "run.py"), *words],
        cwd=kinetics.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "2 missing, 4 whole" in done.stdout + done.stderr
    assert (kinetics / "train_list.csv").is_file()


def test_a_manifest_of_the_users_own_is_not_written_over(kinetics):
    for split in ("train", "val"):
        (kinetics / f"{split}.csv").unlink()
        (kinetics / f"{split}_list.csv").write_text(f"{split}/sit down/v0_000000_000010.mp4 0\n")
    before = files(kinetics)
    with pytest.raises(
        UserError, match="no official train.csv and val.csv to make manifests of: set prepare.short_side"
    ):
        run(kinetics, "video", short_side=None)
    assert "2 cut to 16" in run(kinetics, "video", short_side=16)[0]
    assert files(kinetics) == before


def test_a_stopped_cut_leaves_no_half_clip_and_goes_on(kinetics, monkeypatch):
    whole = prepare._encode

    def stop(clip, path, side):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        run(kinetics, "video", short_side=16, workers=1)
    assert not [f for f in files(kinetics.parent / "k400-16") if f.endswith(".mp4")]
    monkeypatch.setattr(prepare, "_encode", whole)
    assert "4 cut to 16" in run(kinetics, "video", short_side=16)[0]


def test_a_full_disk_is_an_error_and_not_a_broken_clip(kinetics, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_encode", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): mend that and run it again"):
        run(kinetics, "video", short_side=16)


def test_paths_that_leave_the_folder_are_refused(kinetics):
    (kinetics / "train.csv").write_text("label,youtube_id,time_start,time_end,split\nwalk,../../../x,0,1,train\n")
    with pytest.raises(UserError, match="leads out of the folder"):
        run(kinetics, "video", short_side=16)
    assert not (kinetics.parent / "k400-16").exists()


def test_a_playlist_that_calls_itself_mp4_reaches_no_network(kinetics):
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    (kinetics / "val/walk/v1_000001_000011.mp4").write_text(playlist)
    run(kinetics, "video", short_side=16)
    assert "val/walk/v1_000001_000011.mp4: cannot be decoded (" in (kinetics.parent / "k400-16/missing.txt").read_text()


def test_cut_clips_stay_listed_once_their_originals_are_gone(tmp_path):
    import logging

    from tasks import layouts, prepare

    root, to = tmp_path / "clips", tmp_path / "clips-64"
    root.mkdir()
    for split in ("train", "val"):
        rows = f"label,youtube_id,time_start,time_end,split\nwave,abcdefghijk,0,10,{split}\n"
        (root / f"{split}.csv").write_text(rows)
        clip = to / layouts.listed_clips(root, split, manifest=False)[1][0][0]
        clip.parent.mkdir(parents=True)
        clip.write_bytes(b"cut before")
    prepare._short_clips(root, {"short_side": 64, "workers": 1}, logging.getLogger("budgeted"))
    assert all(len((to / f"{split}_list.csv").read_text().splitlines()) == 1 for split in ("train", "val"))
    assert (to / "missing.txt").read_text() == ""
