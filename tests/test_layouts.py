"""Data folders: what is counted, and the one line that each kind of fault gives."""

import json
import pickle
import shutil
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from budgeted.errors import UserError
from tasks import cli, coco_json, compat, decode, layouts, modes, prepare, tiny, zoo
from tasks.folder import some

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data beside the checkout is not here")


BOXES = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASKS = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def look(root: Path, adapter: str, check: bool = False, **data):
    task = {"name": "mine", "adapter": adapter, "frames": 8, "model": BOXES}
    cfg = {"task": task, "data": {"root": str(root), **data}}
    return layouts.check(cfg)[:2] if check else layouts.inspect(cfg)


def fault(root: Path, adapter: str) -> str:
    """The one line, without data.root=...: ."""
    with pytest.raises(UserError) as caught:
        look(root, adapter)
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(f"data.root={root}: ")


def picture(path: Path, size=(8, 6), **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path, **kwargs)
    return path


def folders(root: Path, classes=("cat", "dog"), splits=("train", "val"), count=3) -> Path:
    for split in splits:
        for name in classes:
            for i in range(count):
                picture(root / split / name / f"{i}.jpg")
    return root


# The real sets.


@real
@pytest.mark.parametrize(
    ("folder", "adapter", "train", "val", "classes"),
    [
        ("photos", "classification", 4000, 500, 20),
        ("coco", "detection", 119, 50, 80),
        ("blood", "detection", 291, 73, 3),
        ("streets", "segmentation", 80, 30, 19),
        ("actions", "video", 160, 60, 7),
    ],
)
def test_real_sets(folder, adapter, train, val, classes):
    data, findings = look(SHARED / folder, adapter, check=True)
    assert (data.n_train, data.n_val, len(data.classes), data.missing, findings) == (train, val, classes, (), [])


@real
def test_real_clips_follow_the_manifest_and_its_classes():
    classes, clips, missing = layouts.clips(SHARED / "actions", "train")
    assert classes == ("fall", "lie down", "lie still", "sit", "sit down", "stand up", "walk") and not missing
    assert clips[0] == (f"{SHARED}/actions/train/fall/fir01c00018_000116_000121.mp4", 0)


# The digest of a set.


def labelled(root: Path, counts: dict[str, tuple[int, ...]], classes=("cat", "dog"), end: str = "jpg") -> Path:
    """Class folders with as many empty images of each class as `counts` says for a split."""
    for split, numbers in counts.items():
        for name, number in zip(classes, numbers, strict=True):
            (root / split / name).mkdir(parents=True)
            for k in range(number):
                (root / split / name / f"{k}.{end}").touch()
    return root


def test_sets_of_equal_counts_have_digests_of_their_own(tmp_path):
    roots = [
        labelled(tmp_path / "a", {"train": (3, 2), "val": (1, 1)}),
        labelled(tmp_path / "b", {"train": (2, 3), "val": (1, 1)}),
        labelled(tmp_path / "c", {"train": (3, 2), "val": (1, 1)}, classes=("cat", "emu")),
    ]
    found = [look(root, "classification") for root in roots]
    assert len({(data.n_train, data.n_val, len(data.classes)) for data in found}) == 1
    assert len({data.digest for data in found}) == 3
    assert all(len(data.digest) == 12 and int(data.digest, 16) >= 0 for data in found)


def test_a_digest_heeds_neither_place_nor_file_names_nor_subset(tmp_path):
    counts = {"train": (3, 2), "val": (1, 1)}
    data = look(labelled(tmp_path / "a", counts), "classification")
    assert look(labelled(tmp_path / "x/y", counts, end="png"), "classification").digest == data.digest
    assert look(tmp_path / "a", "classification", subset=2).digest == data.digest
    assert data.digest == "23f23bae9165"  # that of runs already finished: another one would refuse them


def test_the_digest_of_clips_is_that_of_the_list(tmp_path):
    digest = look(videos(tmp_path), "video").digest
    (tmp_path / "train/walk/bb_000000_000010.mp4").unlink()
    assert look(tmp_path, "video").digest == digest
    (tmp_path / "val.csv").write_text(OFFICIAL + "sit down,aa,3,13,val\nsit down,bb,0,10,val\nwalk,bb,0,10,val\n")
    assert look(tmp_path, "video").digest != digest


def test_the_digest_of_coco_counts_images_and_the_objects_of_each_category(tmp_path):
    digest = look(coco(tmp_path / "a"), "detection").digest
    assert look(coco(tmp_path / "b", info="x"), "detection").digest == digest
    swapped = [*row(id=1, category_id=3), *row(id=2, image_id=2, category_id=3)]
    other = look(coco(tmp_path / "c", annotations=swapped), "detection")
    assert (other.n_train, other.n_val, other.classes) == (2, 2, ("cat", "dog")) and other.digest != digest
    more = [{"id": i, "file_name": f"{min(i, 2)}.jpg", "width": 8, "height": 6} for i in (1, 2, 3)]
    bare = look(coco(tmp_path / "d", images=more), "detection")
    assert bare.n_train == 2 and bare.digest not in (digest, other.digest)


def test_the_digest_of_streets_counts_the_images_of_each_city(tmp_path):
    digests = set()
    for name, cities in (("a", ("ulm", "ulm")), ("b", ("ulm", "bonn")), ("c", ("bonn", "bonn"))):
        for split in ("train", "val"):
            for k, city in enumerate(cities if split == "train" else ("ulm", "ulm")):
                stem = f"{split}/{city}/{k}"
                for path in (f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelTrainIds.png"):
                    (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / name / path).touch()
        data = look(tmp_path / name, "segmentation")
        digests.add(data.digest)
        assert (data.n_train, data.n_val) == (2, 2)
    assert len(digests) == 3


# Any folder.


def test_absent_root_names_the_nearest(tmp_path):
    folders(tmp_path / "photos")
    assert fault(tmp_path / "photo", "classification") == f"no such folder: did you mean {tmp_path}/photos?"


def test_root_that_links_to_nothing(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert fault(tmp_path / "loop", "video") == "a link to nothing: mend it, or set data.root to the folder itself"


def test_a_name_with_a_line_break_stays_in_its_line(tmp_path):
    (folders(tmp_path) / "train/cat/0\n1.jpg").touch()
    (tmp_path / "train/cat/no\nte").touch()
    data, (finding,) = look(tmp_path, "classification", check=True)
    assert finding.startswith("train/cat/0\\n1.jpg: ") and "\n" not in finding + some(data.passed_over)
    path = coco(tmp_path / "coco") / TRAIN
    path.write_text(path.read_text().replace("2.jpg", "2\\n.jpg"))
    assert fault(tmp_path / "coco", "detection").startswith(
        f"{TRAIN} lists images that are not in train2017/: 1 (2\\n.jpg) of 2"
    )


def test_empty_root(tmp_path):
    assert fault(tmp_path, "video") == "the folder is empty: put mine's files there or set another data.root"


def test_unset_root():
    with pytest.raises(
        UserError, match="^data.root is not set: say where mine's files are, e.g. data.root=/data/mine$"
    ):
        layouts.inspect({"task": {"name": "mine", "adapter": "video"}, "data": {"root": None}})


def test_subset_is_fixed_and_nested():
    assert layouts.subset(5, None) == layouts.subset(5, 9) == [0, 1, 2, 3, 4]
    assert layouts.subset(10, 4) == [7, 8, 1, 5]
    assert layouts.subset(10, 6)[:4] == layouts.subset(10, 4)


def test_subset_counts(tmp_path):
    assert look(folders(tmp_path), "classification", subset=4).n_train == 4
    assert look(tmp_path, "classification", subset=6).n_train == 6
    with pytest.raises(UserError, match=r"data\.subset=400: .* has 6 training samples"):
        look(tmp_path, "classification", subset=400)


# Class folders.


def test_class_folders(tmp_path):
    data = look(folders(tmp_path), "classification")
    assert (data.n_train, data.n_val, data.classes) == (6, 6, ("cat", "dog"))
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/.hidden").mkdir()
    assert look(tmp_path, "classification") == data
    assert layouts.images(tmp_path, "val")[1][3] == (f"{tmp_path}/val/dog/0.jpg", 1)


def test_class_folders_without_splits_hold_a_tenth_out(tmp_path):
    for name in "ab":
        for i in range(20):
            picture(tmp_path / name / f"{i}.png")
    assert (look(tmp_path, "classification").n_train, look(tmp_path, "classification").n_val) == (36, 4)
    train, val = (layouts.images(tmp_path, split)[1] for split in ("train", "val"))
    assert set(train).isdisjoint(val) and layouts.images(tmp_path, "val")[1] == val


def test_class_folder_that_one_split_lacks(tmp_path):
    folders(tmp_path)
    picture(tmp_path / "train/emu/0.jpg")
    assert fault(tmp_path, "classification") == (
        "train/ has class folders that val/ lacks: 1 (emu): both need the same; add them to val/ or remove them"
    )
    shutil.move(tmp_path / "train/emu", tmp_path / "val/emu")
    assert fault(tmp_path, "classification").startswith("val/ has class folders that train/ lacks: 1 (emu)")


def test_class_folder_without_images(tmp_path):
    folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "emu").mkdir()
    assert fault(tmp_path, "classification") == (
        "train/ has class folders without an image: 1 (emu): "
        "fill or remove them; images end in .jpg .jpeg .png .bmp .ppm .webp"
    )


def test_flat_imagenet_validation_is_sent_to_prepare(tmp_path):
    folders(tmp_path, splits=["train"])
    picture(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")
    assert fault(tmp_path, "classification") == (
        "val/ holds loose images instead of class folders: "
        "run mode=prepare prepare.labels=<csv with columns image,wnid> first"
    )


def test_imagenet_validation_placed_in_part_is_sent_to_prepare(tmp_path):
    folders(tmp_path)
    for name in ("0", "1", "7"):  # 0 and 1 are in class folders too
        picture(tmp_path / f"val/{name}.jpg")
    line = (
        "val/ holds loose images that are in no class folder: 1 (7.jpg): "
        "finish with mode=prepare prepare.labels=<csv with columns image,wnid>, or remove them"
    )
    assert fault(tmp_path, "classification") == line
    shutil.rmtree(tmp_path / "val/dog")
    assert fault(tmp_path, "classification") == line
    (tmp_path / "val/7.jpg").unlink()
    shutil.copytree(tmp_path / "val/cat", tmp_path / "val/dog")
    assert look(tmp_path, "classification").n_val == 6


def test_validation_folder_of_another_name(tmp_path):
    folders(tmp_path, splits=["train", "valid"])
    assert fault(tmp_path, "classification") == (
        "no class folders with images in val/: expected val/<class>/<image>; did you mean 'valid'?"
    )


def test_root_one_level_too_high(tmp_path):
    folders(tmp_path / "ILSVRC/Data/CLS-LOC")
    assert (
        fault(tmp_path, "classification") == f"no train/ here: did you mean data.root={tmp_path}/ILSVRC/Data/CLS-LOC?"
    )


def test_check_finds_a_truncated_image(tmp_path):
    path = picture(folders(tmp_path) / "val/dog/1.jpg", (64, 64))
    path.write_bytes(path.read_bytes()[:700])
    (finding,) = look(tmp_path, "classification", check=True)[1]
    assert finding.startswith("val/dog/1.jpg: image file is truncated") and finding.endswith(": replace or remove it")


def test_check_decodes_on_while_there_is_time_and_counts(tmp_path):
    for k in range(8):
        picture(folders(tmp_path) / f"train/cat/{k}.jpg", (8, 8))
    cfg = {"task": {"name": "mine", "adapter": "classification"}, "data": {"root": str(tmp_path)}}
    data = layouts.inspect(cfg)
    assert layouts.check(cfg, sample=1, seconds=60) == (data, [], data.n_train + data.n_val)
    assert layouts.check(cfg, sample=2, seconds=0) == (data, [], 4)


def test_class_folders_alone_are_split_and_that_is_said(tmp_path, said):
    for name in ("a", "b"):
        for k in range(10):
            picture(tmp_path / name / f"{k}.jpg", (8, 8))
    data = look(tmp_path, "classification")
    assert (data.n_train, data.n_val) == (18, 2) and "each tenth image" in said[0]


def test_one_split_of_a_set_is_no_set(tmp_path):
    folders(tmp_path)
    assert fault(tmp_path / "train", "classification") == f"one split of a set: did you mean data.root={tmp_path}?"


def test_the_embedded_data_of_a_tiny_task_are_not_proposed_for_another(tmp_path):
    (tmp_path / "mine_tiny").mkdir()
    assert fault(tmp_path / "mine", "classification").startswith("no such folder: set data.root")


def test_check_finds_what_is_no_image(tmp_path):
    (folders(tmp_path) / "train/cat/0.jpg").write_text("404 not found")
    assert look(tmp_path, "classification", check=True)[1] == [
        "train/cat/0.jpg: not an image that Pillow knows: replace or remove it"
    ]


def test_what_is_no_image_is_counted_and_what_fails_is_found(tmp_path, said):
    folders(tmp_path)
    for path in ("train/cat/notes.txt", "train/dog/deeper/0.jpg", "train/n01.tar", "val/readme", "train/cat/.hidden"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
    picture(tmp_path / "train/loose.jpg")
    picture(tmp_path / "val/0.jpg")  # ImageNet's flat val/, placed
    (tmp_path / "train/cat/folder.jpg").mkdir()
    (tmp_path / "val/dog/link.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "val/dog/loop.jpg").symlink_to(tmp_path / "val/dog/loop.jpg")
    (tmp_path / "val/cat/link.jpg").symlink_to(tmp_path / "val/cat/0.jpg")
    data, findings = look(tmp_path, "classification", check=True)
    passed = ("train/cat/notes.txt", "train/dog/deeper", "train/loose.jpg", "train/n01.tar", "val/readme")
    assert data.passed_over == passed
    broken = ("train/cat/folder.jpg", "val/dog/link.jpg", "val/dog/loop.jpg")
    assert findings == [f"{path}: has an image's name and is no file: remove it" for path in broken]
    cfg = {"task": {"name": "mine", "adapter": "classification", "weights": "none"}, "data": {"root": str(tmp_path)}}
    with pytest.raises(SystemExit):
        modes.check(OmegaConf.create(cfg), {})
    assert "training passes over what is no sample: 5 (train/cat/notes.txt, ...)" in said


def test_files_beside_class_folders_that_are_not_split_may_lie_there(tmp_path):
    for name in ("a", "b", "b/c"):
        for k in range(10):
            picture(tmp_path / name / f"{k}.jpg")
    (tmp_path / "LICENSE").touch()
    picture(tmp_path / "cover.jpg")
    assert look(tmp_path, "classification", check=True)[0].passed_over == ("b/c", "cover.jpg")


# CIFAR-10.


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR-10 at a hundredth of its size, in both forms; images say their number in their first value."""
    for name, value in (("TRAIN", 500), ("TEST", 100), ("HELD_OUT", 50)):
        monkeypatch.setattr(f"tasks.cifar10.{name}", value)
    numbers = np.arange(500)
    train, test = np.zeros((500, 32, 32, 3), np.uint8), np.ones((100, 32, 32, 3), np.uint8)
    train[:, 0, 0, 0], train[:, 0, 0, 1], train[:, 31, 31, 2] = numbers % 256, numbers // 256, 7
    (tmp_path / "a").mkdir()
    labels = (numbers % 10).astype(np.uint8)
    np.savez(tmp_path / "a/cifar10.npz", train_x=train, train_y=labels, test_x=test, test_y=labels[:100])
    folder = tmp_path / "b/cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = {f"data_batch_{i + 1}": (train, slice(100 * i, 100 * (i + 1))) for i in range(5)}
    for name, (images, rows) in {**parts, "test_batch": (test, slice(100))}.items():
        data = images[rows].transpose(0, 3, 1, 2).reshape(100, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels[rows].tolist()}, protocol=2))
    return tmp_path


def test_cifar10_counts(tmp_path):
    """At its own size: the batches hold labels and pictures of nothing."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = pickle.dumps({"data": np.zeros((10000, 3072), np.uint8), "labels": [k % 10 for k in range(10000)]})
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(batch)
    for root in (tmp_path, folder):
        data = look(root, "classification")
        assert (data.n_train, data.n_val, data.classes[:2]) == (45000, 5000, ("airplane", "automobile"))


def test_cifar10_in_both_forms_is_the_same_data(small_cifar):
    found = [look(small_cifar / name, "classification", check=True) for name in "ab"]
    assert [(data.n_train, data.n_val, findings) for data, findings in found] == [(450, 50, [])] * 2
    assert found[0][0].digest == found[1][0].digest
    parts, same = layouts.cifar10(small_cifar / "a"), layouts.cifar10(small_cifar / "b")
    for split, n in (("train", 450), ("val", 50), ("test", 100)):
        assert parts[split][0].shape == (n, 32, 32, 3) and parts[split][1].dtype == np.int64
        assert all(np.array_equal(p, q) for p, q in zip(parts[split], same[split], strict=True))
    train, val = (parts[s][0][:, 0, 0, 0] + 256 * parts[s][0][:, 0, 0, 1].astype(int) for s in ("train", "val"))
    assert np.array_equal(np.sort([*train, *val]), np.arange(500))
    assert (parts["val"][1] == val % 10).all() and (parts["val"][0][:, 31, 31, 2] == 7).all()


def test_cifar10_of_other_labels_is_another_set(small_cifar):
    before = look(small_cifar / "a", "classification").digest
    with np.load(small_cifar / "a/cifar10.npz") as file:
        arrays = dict(file)
    np.savez(small_cifar / "a/cifar10.npz", **{**arrays, "train_y": np.zeros(500, np.uint8)})
    assert look(small_cifar / "a", "classification").digest not in (before, None)


def test_cifar10_holds_out_the_same_images_for_ever(small_cifar):
    val = layouts.cifar10(small_cifar / "a")["val"][0][:, 0, 0]
    assert val[:4, :2].tolist() == [[2, 0], [5, 0], [15, 0], [41, 0]]


def test_cifar10_pickle_that_would_call_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "called",))

    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    assert fault(tmp_path, "classification").startswith("data_batch_1 is not a CIFAR-10 batch (it asks for ")
    assert not (tmp_path / "called").exists()


def test_cifar10_npz_faults(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"not a zip")
    assert fault(tmp_path, "classification").startswith("cifar10.npz cannot be read (File is not a zip file)")
    np.savez(tmp_path / "cifar10.npz", train_x=np.zeros((5, 32, 32, 3), np.uint8))
    assert fault(tmp_path, "classification") == (
        "cifar10.npz: train_x is (5, 32, 32, 3) instead of (50000, 32, 32, 3): build it again with get_cifar10.py"
    )


def test_cifar10_batch_absent(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"")
    assert fault(tmp_path, "classification") == (
        "cifar-10-batches-py lacks 5 (data_batch_2, ...): unpack cifar-10-python.tar.gz again"
    )


# COCO.


def coco(root: Path, **changes) -> Path:
    """A set of two images and two objects a split; changes go into the training json."""
    tables = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 6} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 3 * i * i - 3 * i + 3, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0,
             "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}
            for i in (1, 2)
        ],
    }  # fmt: skip
    for split in ("train", "val"):
        for i in (1, 2):
            picture(root / f"{split}2017" / f"{i}.jpg")
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2017.json").write_text(
            json.dumps({**tables, **(changes if split == "train" else {})})
        )
    return root


def row(**changes) -> list[dict]:
    return [
        {
            "id": 7,
            "image_id": 1,
            "category_id": 3,
            "bbox": [1, 1, 3, 3],
            "area": 9,
            "iscrowd": 0,
            "segmentation": [],
            **changes,
        }
    ]


def test_coco_counts(tmp_path):
    data = look(coco(tmp_path), "detection")
    assert (data.n_train, data.n_val, data.classes) == (2, 2, ("cat", "dog"))


def test_coco_trains_on_images_with_an_object_that_is_no_crowd(tmp_path):
    data = look(coco(tmp_path, annotations=[*row(), *row(id=8, image_id=2, iscrowd=1)]), "detection")
    assert (data.n_train, data.left_out) == (1, 1)


TRAIN = "annotations/instances_train2017.json"
VAL = "annotations/instances_val2017.json"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"annotations": []}, "the list of annotations is empty: training needs at least one"),
        ({"images": []}, "the list of images is empty: training needs at least one"),
        ({"annotations": row(category_id=4)},
         "annotation 7 has category_id 4, which is not in categories: known ids: 3 to 9"),
        ({"annotations": row(image_id=5)},
         "annotation 7 has image_id 5, which is not in images: remove it or add the image"),
        ({"annotations": row() * 2}, "two annotations have the same id: give each its own"),
        ({"annotations": row(segmentation={"size": [8, 6], "counts": [48]})},
         "annotation 7 has a mask of [8, 6], its image is [6, 8]: size is [height, width]"),
        ({"annotations": row(segmentation=[[1, 1, 40, 1, 4, 4]])},
         "annotation 7 has a polygon outside its image of 8 x 6: points are x, y in pixels"),
        ({"annotations": row(segmentation={"size": [6, 8], "counts": [40, 5]})},
         "annotation 7 has a mask of 45 pixels, its image 48: counts are its runs"),
        ({"annotations": row(segmentation="abc")},
         "annotation 7 has segmentation 'abc': it is a list of polygons or a run-length mask"),
        ({"categories": [{"id": "3", "name": "cat"}, {"id": 3, "name": "dog"}]},
         "the ids of categories are of several types: they are whole numbers"),
        ({"annotations": row(bbox=[1, 1, float("nan"), 3])},
         "annotation 7 has bbox [1, 1, nan, 3]: it is [x, y, width, height] in pixels"),
        ({"annotations": row(bbox=[1, 1, 3])}, "annotation 7 has bbox [1, 1, 3]: it is [x, y, width, height] in pixels"),
        ({"annotations": row(area="9")}, "annotation 7 has area 9: it is a number of pixels; "
         "width x height of its box will do, the AP that is kept is the same"),
        ({"annotations": row(iscrowd=None)}, "annotation 7 has iscrowd None: it is 0, or 1 for a crowd"),
        ({"annotations": row(iscrowd=1)},
         "has no object that is not a crowd: annotate some: AP would be 0 without one"),
        ({"categories": [{"id": 3}, {"id": 9, "name": "dog"}]}, "category 3 has no name: give it one"),
    ],
)  # fmt: skip
def test_coco_faults(tmp_path, changes, line):
    between = " " if line.startswith("has ") else ": "
    assert fault(coco(tmp_path, **changes), "detection") == f"{TRAIN}{between}{line}"


@pytest.mark.parametrize("key", ["bbox", "area", "iscrowd"])
def test_coco_fields_that_only_the_evaluation_reads(tmp_path, key):
    path = coco(tmp_path) / VAL
    tables = json.loads(path.read_text())
    del tables["annotations"][1][key]
    path.write_text(json.dumps(tables))
    assert fault(tmp_path, "detection").startswith(f"{VAL}: annotation 2 has no {key}: it is ")


def test_coco_validation_without_an_object_is_refused(tmp_path):
    path = coco(tmp_path) / VAL
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": row(iscrowd=1)}))
    assert fault(tmp_path, "detection") == f"{VAL} has no object that is not a crowd: " + (
        "annotate some: AP would be 0 without one"
    )


@pytest.mark.parametrize("given", ["train", "val"])
def test_a_model_of_masks_is_refused_objects_without_one_by_check_and_before_a_sweep(tmp_path, given):
    """In the words of training: tests/test_detection.py has that side."""
    pytest.importorskip("detectron2")
    path = coco(tmp_path) / f"annotations/instances_{given}2017.json"
    tables = json.loads(path.read_text())
    path.write_text(json.dumps({**tables, "annotations": [*tables["annotations"], *row(), *row(id=8, iscrowd=1)]}))
    words = ("task=coco_tiny", f"data.root={tmp_path}")
    with pytest.raises(UserError) as caught:
        cli.recipe(words)
    assert str(caught.value) == (
        f"data.root={tmp_path}: annotations/instances_{given}2017.json: objects without a mask: 1 (7), which {MASKS} "
        f"needs: add them; task.model={BOXES} trains on boxes alone"
    )
    assert layouts.check(cli.configuration(words))[1] == [str(caught.value)]
    boxes = (*words, f"task.model={BOXES}", "task.batch_size=2")
    assert layouts.check(cli.configuration(boxes))[1] == [] and cli.recipe(boxes).data.n_train == 2


def test_a_crowd_without_a_mask_fails_the_evaluation_alone(tmp_path):
    pytest.importorskip("detectron2")
    for split, refused in (("train", False), ("val", True)):
        path = coco(tmp_path / split) / f"annotations/instances_{split}2017.json"
        tables = json.loads(path.read_text())
        path.write_text(json.dumps({**tables, "annotations": [*tables["annotations"], *row(iscrowd=1)]}))
        cfg = {"task": {"model": MASKS}, "data": {"root": str(tmp_path / split)}}
        with pytest.raises(UserError, match=r"crowds without a mask: 1 \(7\)") if refused else nullcontext():
            zoo.check_masks(cfg)


def test_which_models_of_the_zoo_learn_masks_is_what_upstream_says():
    pytest.importorskip("detectron2")
    compat.detectron2()
    from detectron2 import model_zoo

    names = zoo.names()
    assert len(names) > 20
    for name in names:
        assert zoo.masked({"model": name}) == model_zoo.get_config(name).MODEL.MASK_ON, name
    assert not zoo.masked({"model": MASKS, "options": {"MODEL": {"MASK_ON": False}}})


def test_jsons_of_the_users_own_names_are_named(tmp_path):
    coco(tmp_path)
    for name in ("b.json", "a.json", "captions_train2017.json", "notes.txt"):
        (tmp_path / "annotations" / name).touch()
    (tmp_path / TRAIN).unlink()
    assert fault(tmp_path, "detection") == (
        f"no {TRAIN}: annotations/ holds 2 (a.json, b.json): rename or link the right one to that name"
    )


# A folder of another layout.


def test_a_folder_of_another_layout_names_the_task_that_takes_it(tmp_path):
    made = {
        "classification": (folders(tmp_path / "pictures"), "class folders (train/<class>/)", "imagenet"),
        "detection": (coco(tmp_path / "objects"), "COCO (annotations/*.json)", "coco"),
        "segmentation": (streets(tmp_path / "streets"), "Cityscapes (leftImg8bit/)", "cityscapes"),
        "video": (videos(tmp_path / "clips"), "Kinetics (train.csv or train_list.csv)", "kinetics"),
    }
    for own, (root, what, task) in made.items():
        for adapter in made.keys() - {own}:
            assert fault(root, adapter) == f"this is laid out like {what}: task={task} takes it, task=mine does not"


def test_a_csv_beside_class_folders_is_not_kinetics(tmp_path):
    (folders(tmp_path, splits=["train"]) / "train.csv").write_text("image,label\n")
    assert fault(tmp_path, "classification").startswith("no class folders with images in val/")
    shutil.rmtree(tmp_path / "train")
    assert fault(tmp_path, "classification").startswith("no class folders with images in train/")


@pytest.mark.parametrize("name", ["/etc/passwd", "../1.jpg", "a/../../1.jpg", "..\\1.jpg", ""])
def test_coco_file_name_must_stay_inside(tmp_path, name):
    images = [{"id": 1, "file_name": name, "width": 8, "height": 6}]
    assert fault(coco(tmp_path, images=images, annotations=row()), "detection") == (
        f"{TRAIN} names {name!r}, which leads out of the folder: give a relative path without .."
    )


def test_coco_image_absent(tmp_path):
    (coco(tmp_path) / "val2017/2.jpg").unlink()
    assert fault(tmp_path, "detection") == (
        "annotations/instances_val2017.json lists images that are not in val2017/: 1 (2.jpg) of 2: "
        "unpack val2017.zip here again"
    )


def test_coco_categories_must_agree(tmp_path):
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "emu"}]
    assert fault(coco(tmp_path, categories=categories), "detection") == (
        "train and val do not have the same categories: 2 (dog, ...): both json files need the same list"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", " is not json, or cut short: unpack or write it again"),
        ("[" * 100_000, " is not json, or cut short: unpack or write it again"),
        ("[]", " is not of COCO's form (TypeError: list indices must be integers or slices, not str)"),
        ('{"images": [{}]}', " is not of COCO's form (KeyError: 'id')"),
    ],
)
def test_coco_json_of_another_form(tmp_path, text, line):
    (coco(tmp_path) / TRAIN).write_text(text)
    assert fault(tmp_path, "detection").startswith(TRAIN + line)


def test_coco_without_annotations_folder(tmp_path):
    shutil.move(coco(tmp_path) / "annotations", tmp_path / "annotation")
    assert fault(tmp_path, "detection") == (
        f"no {TRAIN}: unpack annotations_trainval2017.zip here, or put your own there by that name; "
        "did you mean 'annotation'?"
    )


def test_coco_check_finds_other_sizes_and_degenerate_objects(tmp_path):
    coco(
        tmp_path,
        annotations=[
            *row(segmentation=[[1, 1, 2, 2]]),
            *row(id=8, bbox=[1, 1, 0, 3], segmentation=[[1, 1, 2, 2, 1, 2]]),
        ],
    )
    picture(tmp_path / "train2017/2.jpg", (6, 8))
    end = ": they teach nothing; remove them"
    assert look(tmp_path, "detection", check=True)[1] == [
        "train2017/2.jpg: is (6, 8), listed as (8, 6): replace the image or mend its row in instances_train2017.json",
        f"{TRAIN}: annotations with a polygon of less than 3 points: 1 (7){end}",
        f"{TRAIN}: annotations with a box without area: 1 (8){end}",
    ]


def test_coco_summary_of_a_large_json_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = coco(tmp_path, info="x" * 5_000_000)
    first = look(root, "detection")
    coco_json._kept.cache_clear()
    monkeypatch.setattr(
        coco_json.json,
        "loads",
        lambda text: (
            pytest.fail("parsed again")
            if len(text) > 10**6
            else json.JSONDecoder().decode(str(text, "utf-8") if isinstance(text, bytes) else text)
        ),
    )
    assert look(root, "detection") == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    coco(tmp_path, info="x" * 5_000_001, annotations=row())
    assert look(root, "detection").n_train == 1


def turned(path: Path, size: tuple[int, int], orientation: int = 6) -> Path:
    """A picture of `size` in the file whose EXIF orientation turns it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(path, size, exif=exif)


@pytest.mark.parametrize(("size", "orientation", "fits"), [((6, 8), 6, True), ((8, 6), 6, False), ((8, 6), 3, True)])
def test_coco_sizes_are_those_that_detectron2_reads(tmp_path, size, orientation, fits):
    pytest.importorskip("detectron2")
    compat.detectron2()
    from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image

    path = turned(coco(tmp_path) / "train2017/2.jpg", size, orientation)
    line = (
        "train2017/2.jpg: is (6, 8) as its EXIF orientation turns it, listed as (8, 6): "
        "replace the image or mend its row in instances_train2017.json"
    )
    assert look(tmp_path, "detection", check=True)[1] == ([] if fits else [line])
    with nullcontext() if fits else pytest.raises(SizeMismatchError):
        check_image_size({"width": 8, "height": 6}, read_image(str(path), "BGR"))


def test_a_picture_of_damaged_exif_has_the_size_of_its_file(tmp_path):
    path = tmp_path / "x.jpg"
    picture(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 40)
    with Image.open(path) as image:
        assert decode.shown_size(image) == (8, 6)


def test_coco_check_parses_a_json_once(tmp_path, monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr(coco_json.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    sizes = [(coco(tmp_path) / path).stat().st_size for path in (TRAIN, VAL)]
    assert look(tmp_path, "detection", check=True)[1] == []
    assert parsed == sizes


@pytest.mark.parametrize("kept", ["[1]", '{"files": []}', "{"])
def test_coco_summary_that_something_else_wrote_is_made_anew(tmp_path, monkeypatch, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = look(coco(tmp_path, info="x" * 5_000_000), "detection")
    (summary,) = (tmp_path / "cache/budgeted").iterdir()
    summary.write_text(kept)
    coco_json._kept.cache_clear()
    assert look(tmp_path, "detection") == first and json.loads(summary.read_text())["classes"] == ["cat", "dog"]


# Cityscapes.


def streets(root: Path) -> Path:
    for split in ("train", "val"):
        for i in range(2):
            stem = f"{split}/ulm/ulm_{i:06d}_000019"
            picture(root / f"leftImg8bit/{stem}_leftImg8bit.png")
            label = root / f"gtFine/{stem}_gtFine_labelTrainIds.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8), i, np.uint8)).save(label)
    return root


def test_streets(tmp_path):
    data, findings = look(streets(tmp_path), "segmentation", check=True)
    assert (data.n_train, data.n_val, len(data.classes), findings) == (2, 2, 19, [])


def test_streets_are_those_that_mmseg_finds(tmp_path):
    fileio = pytest.importorskip("mmengine.fileio")
    folder, end = streets(tmp_path) / "leftImg8bit/train", "_leftImg8bit.png"
    for path in (f"ulm/part/b{end}", f"a{end}", f".old/c{end}", "ulm/notes.txt", f"ulm/._d{end}", "ulm/e.png"):
        picture(folder / f"{path}.png").rename(folder / path)
    (folder / f"ulm/f{end}").symlink_to(tmp_path / "nothing.png")
    (folder / "zoo").symlink_to(folder / "ulm")
    found = [path.removeprefix(f"{folder}/") for path, _ in layouts.streets(tmp_path, "train")]
    assert found == sorted(fileio.list_dir_or_file(str(folder), list_dir=False, suffix=end, recursive=True))
    assert len(found) == 8 and found[:2] == [f".old/c{end}", f"a{end}"]
    assert fault(tmp_path, "segmentation").startswith("labels absent: 6 (gtFine/train/.old/c_gtFine_labelTrainIds.png")
    assert layouts.no_streets(tmp_path)[:2] == ["leftImg8bit/train/ulm/e.png", f"leftImg8bit/train/ulm/f{end}"]


def test_streets_pass_over_what_is_none(tmp_path):
    (streets(tmp_path) / "leftImg8bit/val/ulm/notes.txt").touch()
    data, findings = look(tmp_path, "segmentation", check=True)
    assert (data.passed_over, findings) == (("leftImg8bit/val/ulm/notes.txt",), [])


def test_a_link_upwards_among_the_streets_is_refused(tmp_path):
    (streets(tmp_path) / "leftImg8bit/train/ulm/again").symlink_to(tmp_path / "leftImg8bit/train")
    assert fault(tmp_path, "segmentation") == (
        "leftImg8bit/train/ulm/again is a link to a folder that it lies in: remove it"
    )
    (tmp_path / "leftImg8bit/train/ulm/again").unlink()
    loop = tmp_path / "leftImg8bit/val/ulm/loop"
    loop.symlink_to(loop)
    assert fault(tmp_path, "segmentation") == (
        f"{loop} cannot be read (Too many levels of symbolic links): mend or remove it"
    )


LABEL = "gtFine/val/ulm/ulm_000001_000019_gtFine_labelTrainIds.png"


def test_streets_label_absent(tmp_path):
    (streets(tmp_path) / LABEL).unlink()
    assert fault(tmp_path, "segmentation") == f"labels absent: 1 ({LABEL}): unpack gtFine_trainvaltest.zip here"
    (tmp_path / LABEL.replace("labelTrainIds", "labelIds")).write_text("")
    assert fault(tmp_path, "segmentation") == (
        f"labels absent: 1 ({LABEL}): run mode=prepare task=mine data.root={tmp_path} to make them"
    )


def test_streets_without_images(tmp_path):
    shutil.move(streets(tmp_path) / "leftImg8bit", tmp_path / "leftimg8bit")
    assert fault(tmp_path, "segmentation") == (
        "no leftImg8bit/train/<city>/*_leftImg8bit.png: "
        "unpack leftImg8bit_trainvaltest.zip here; did you mean 'leftimg8bit'?"
    )


@pytest.mark.parametrize(
    ("pixels", "what"),
    [
        (np.full((6, 8), 19, np.uint8), "has unknown ids [19], known are 0 to 18 and 255"),
        (np.full((8, 6), 0, np.uint8), "is 6 x 8, its picture 8 x 6"),
        (np.zeros((6, 8, 3), np.uint8), "has colours instead of one id a pixel"),
    ],
)
def test_check_finds_a_wrong_label(tmp_path, pixels, what):
    Image.fromarray(pixels).save(streets(tmp_path) / LABEL)
    assert look(tmp_path, "segmentation", check=True)[1] == [f"{LABEL}: {what}: remove it and run mode=prepare"]


@pytest.mark.parametrize(("size", "orientation", "fits"), [((6, 8), 6, True), ((8, 6), 6, False), ((8, 6), 3, True)])
def test_streets_sizes_are_those_that_mmseg_reads(tmp_path, size, orientation, fits):
    mmcv = pytest.importorskip("mmcv")
    path = turned(streets(tmp_path) / LABEL.replace("gtFine", "leftImg8bit", 1), size, orientation)
    path = path.rename(str(path).replace("_gtFine_labelTrainIds", "_leftImg8bit"))
    line = f"{LABEL}: is 8 x 6, its picture 6 x 8 as its EXIF orientation turns it: store the picture without the tag"
    assert look(tmp_path, "segmentation", check=True)[1] == ([] if fits else [line])
    read = mmcv.imfrombytes(path.read_bytes(), flag="color", backend="cv2")
    label = mmcv.imfrombytes((tmp_path / LABEL).read_bytes(), flag="unchanged", backend="pillow")
    assert (read.shape[:2] == label.shape) == fits


# Kinetics.


def clip(path: Path, frames: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.encode(path, [np.full((16, 16, 3), 20 * i, np.uint8) for i in range(frames)])
    return path


def sound(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


OFFICIAL = "label,youtube_id,time_start,time_end,split\n"


def videos(root: Path) -> Path:
    for split in ("train", "val"):
        rows = [("sit down", "aa", 3, 13), ("walk", "bb", 0, 10)]
        for label, name, start, end in rows:
            clip(root / split / label.replace(" ", "_") / f"{name}_{start:06d}_{end:06d}.mp4")
        (root / f"{split}.csv").write_text(OFFICIAL + "".join(f"{x},{n},{s},{e},{split}\n" for x, n, s, e in rows))
    return root


def test_official_csv(tmp_path):
    data, findings = look(videos(tmp_path), "video", check=True)
    assert (data.n_train, data.n_val, data.classes, findings) == (2, 2, ("sit down", "walk"), [])
    assert layouts.clips(tmp_path, "val")[1][1] == (f"{tmp_path}/val/walk/bb_000000_000010.mp4", 1)


@pytest.mark.parametrize("form", ["{split}/{label}", "{split}"])
def test_official_csv_finds_other_spellings_of_the_folders(tmp_path, form):
    videos(tmp_path)
    for split in ("train", "val"):
        for label in ("sit down", "walk"):
            folder = tmp_path / form.format(split=split, label=label)
            folder.mkdir(exist_ok=True)
            for file in list((tmp_path / split / label.replace(" ", "_")).iterdir()):
                file.rename(folder / file.name)
        for folder in [d for d in (tmp_path / split).iterdir() if d.is_dir() and not any(d.iterdir())]:
            folder.rmdir()
    assert look(tmp_path, "video").n_train == 2


def test_manifest_comes_before_the_csv_and_takes_both_separators(tmp_path):
    videos(tmp_path)
    (tmp_path / "train_list.csv").write_text("train/walk/bb_000000_000010.mp4 1\n")
    (tmp_path / "val_list.csv").write_text("val/walk/bb_000000_000010.mp4,1\n\n")
    (tmp_path / "classes.txt").write_text("sit down\nwalk\n")
    data = look(tmp_path, "video")
    assert (data.n_train, data.n_val, data.classes) == (1, 1, ("sit down", "walk"))


def test_lost_and_broken_clips_are_counted_and_left_out(tmp_path):
    videos(tmp_path)
    lost, broken = "train/walk/bb_000000_000010.mp4", "val/sit_down/aa_000003_000013.mp4"
    (tmp_path / lost).unlink()
    (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:-40])
    data, findings = look(tmp_path, "video", check=True)
    assert (data.n_train, data.n_val, data.missing) == (1, 1, (lost, broken))
    end = ": training leaves it out; get it again or take it off the list"
    assert findings[0] == f"{lost}: absent{end}"
    assert findings[1].startswith(f"{broken}: cut short or not an mp4 (") and findings[1].endswith(end)
    (tmp_path / "val/walk/bb_000000_000010.mp4").write_text("<html>gone</html>")
    assert fault(tmp_path, "video") == (
        "none of the 2 clips that val lists can be read, first val/sit_down/aa_000003_000013.mp4: "
        "data.root is the folder that holds train/ and val/"
    )


@pytest.mark.parametrize(("make", "fault"), [("link", "absent"), ("folder", "not a file"), ("hidden", "a hidden file")])
def test_what_is_no_clip_is_missing(tmp_path, make, fault):
    path = videos(tmp_path) / "val/walk/bb_000000_000010.mp4"
    path.unlink()
    if make == "link":
        path.symlink_to(tmp_path / "nothing.mp4")
    elif make == "folder":
        path.mkdir()
    else:
        path = clip(path.parent / ".x_000000_000010.mp4")
        (tmp_path / "val.csv").write_text(
            OFFICIAL + "sit down,aa,3,13,val\nwalk,.x,0,10,val\n",
        )
    data, (finding,) = look(tmp_path, "video", check=True)
    name = str(path.relative_to(tmp_path))
    assert (data.n_val, data.missing) == (1, (name,)) and finding.startswith(f"{name}: {fault}: training leaves it out")


@pytest.mark.parametrize("prepared", [False, True])
def test_of_many_missing_clips_the_first_are_named_and_all_are_counted(tmp_path, prepared):
    rows = "".join(f"walk,gone{k:02d},0,10,val\n" for k in range(30))
    (videos(tmp_path) / "val.csv").write_text(OFFICIAL + "sit down,aa,3,13,val\nwalk,bb,0,10,val\n" + rows)
    if prepared:
        options = {"prepare": {"short_side": None, "workers": 1}}
        cfg = {"task": {"name": "mine", "adapter": "video"}, "data": {"root": str(tmp_path)}, **options}
        prepare.prepare(cfg, decode.log)
    data, findings = look(tmp_path, "video", check=True)
    assert (data.n_val, len(data.missing), len(findings)) == (2, 30, 21)
    assert findings[19].startswith("val/walk/gone19_000000_000010.mp4: absent")
    listed = "missing.txt names them all" if prepared else "mode=prepare writes them all to a missing.txt"
    assert findings[20] == f"10 more clips: 30 are missing in all: {listed}"


def test_clip_without_video_is_missing(tmp_path):
    sound(videos(tmp_path) / "val/walk/bb_000000_000010.mp4")
    assert look(tmp_path, "video").missing == ("val/walk/bb_000000_000010.mp4",)
    assert layouts.mp4_fault(tmp_path / "val/walk/bb_000000_000010.mp4") == "no video stream"


def test_check_finds_clips_that_are_too_short_or_damaged_inside(tmp_path):
    clip(videos(tmp_path) / "train/walk/bb_000000_000010.mp4", frames=5)
    damaged = tmp_path / "val/walk/bb_000000_000010.mp4"
    content = bytearray(damaged.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - start)
    damaged.write_bytes(content)
    data, findings = look(tmp_path, "video", check=True)
    assert findings[0] == (
        "train/walk/bb_000000_000010.mp4: 5 frames, 8 are needed: get it again or take it off the list"
    )
    assert findings[1].startswith("val/walk/bb_000000_000010.mp4: ") and len(findings) == 2
    assert data.missing == ("train/walk/bb_000000_000010.mp4", "val/walk/bb_000000_000010.mp4")


def test_mp4_boxes_that_lie_about_their_length_end(tmp_path):
    for head in (
        struct.pack(">I4s", 0, b"free"),
        struct.pack(">I4sQ", 1, b"moov", 2**62),
        struct.pack(">I4s", 3, b"moov"),
    ):
        (tmp_path / "x.mp4").write_bytes(head + bytes(20))
        assert layouts.mp4_fault(tmp_path / "x.mp4") == f"cut short or not an mp4 ({len(head) + 20} bytes)"


@pytest.mark.parametrize(
    ("lists", "line"),
    [
        ("walk.mp4\n", "train_list.csv line 1 is 'walk.mp4': expected `path index`, e.g. train/walk/a.mp4 0"),
        ("\n", "train_list.csv lists no clip: remove it, or run mode=prepare to write it"),
        (
            "../a.mp4 0\n",
            "train_list.csv line 1 names '../a.mp4', which leads out of the folder: give a relative path without ..",
        ),
        (
            "a.mp4 0\n/b.mp4 0\n",
            "train_list.csv line 2 names '/b.mp4', which leads out of the folder: give a relative path without ..",
        ),
        (
            "a.mp4 " + "9" * 5000,
            "train_list.csv line 1 is 'a.mp4 " + "9" * 54 + "': expected `path index`, e.g. train/walk/a.mp4 0",
        ),
        ("a.mp4 5\n", "train_list.csv has class index 5 and classes.txt 2 names: indices count from 0"),
    ],
)
def test_manifest_faults(tmp_path, lists, line):
    (videos(tmp_path) / "train_list.csv").write_text(lists)
    (tmp_path / "classes.txt").write_text("sit down\nwalk\n")
    assert fault(tmp_path, "video") == line


def test_manifest_without_class_names_takes_the_folders(tmp_path):
    videos(tmp_path)
    for split in ("train", "val"):
        lines = [f"{split}/sit_down/aa_000003_000013.mp4 0\n", f"{split}/walk/bb_000000_000010.mp4 1\n"]
        (tmp_path / f"{split}_list.csv").write_text("".join(lines))
    assert look(tmp_path, "video").classes == ("sit_down", "walk")
    (tmp_path / "val_list.csv").write_text("val/walk/bb_000000_000010.mp4 1000000000\n")
    assert fault(tmp_path, "video") == (
        "val_list.csv has class index 1000000000 and only 1 clips: "
        "indices count from 0; name the classes in classes.txt, one a line"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("label," + "x" * 200_000 + "\nwalk,3\n", "train.csv is no csv (field larger than field limit (131072)): get the official one again"),
        ("label,id\nwalk,3\n", "train.csv has no column youtube_id: expected the official label,youtube_id,time_start,time_end,split"),
        (OFFICIAL, "train.csv lists no clip: expected the official label,youtube_id,time_start,time_end,split"),
        (OFFICIAL + "walk,aa,x,3,train\n", "train.csv line 2 has no whole seconds: time_start and time_end are integers"),
        (OFFICIAL + "../x,aa,1,3,train\n", "train.csv has the label '../x': a label is the name of a folder"),
        (OFFICIAL + "walk,../../aa,1,3,train\n",
         "train.csv line 2 names 'train/walk/../../aa_000001_000003.mp4', which leads out of the folder: give a relative path without .."),
    ],
)  # fmt: skip
def test_official_csv_faults(tmp_path, text, line):
    (videos(tmp_path) / "train.csv").write_text(text)
    assert fault(tmp_path, "video") == line


def test_classes_must_agree(tmp_path):
    (videos(tmp_path) / "val.csv").write_text(OFFICIAL + "walk,bb,0,10,val\n")
    assert fault(tmp_path, "video") == (
        "train and val do not name the same classes: 1 (sit down): both lists need every class"
    )


def test_no_list_at_all(tmp_path):
    (videos(tmp_path) / "val.csv").rename(tmp_path / "valid.csv")
    assert fault(tmp_path, "video") == (
        "no val_list.csv and no val.csv: give a manifest (`path index` a line) or the official csv; did you mean 'valid.csv'?"
    )


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    folders(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tasks.folder.os.listdir", refuse)
    assert fault(tmp_path, "classification").endswith("cannot be read (Permission denied): mend its permissions")


def test_a_split_is_listed_once_for_all_its_labels(tmp_path, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = [f"label{k},v{k},0,10,{split}\n" for k in range(30)]
        (tmp_path / f"{split}.csv").write_text(OFFICIAL + "".join(rows))
        for k in range(30):
            (tmp_path / split / f"v{k}_000000_000010.mp4").touch()
    listings, listed = [], layouts.names
    monkeypatch.setattr(layouts, "names", lambda folder: listings.append(folder) or listed(folder))
    assert layouts.listed_clips(tmp_path, "train")[1][0] == ("train/v0_000000_000010.mp4", 0)
    assert listings == [tmp_path / "train"]
