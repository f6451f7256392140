"""Published numbers, against the papers' tables."""

import csv

import pytest

from benchmarks.published import TABLE, beside, notes, published


@pytest.mark.parametrize(
    "cell, mean, std",
    [
        (("imagenet", "resnet18", "sgd", "step", "1%", "top1"), 0.2039, 0.0029),
        (("imagenet", "resnet18", "sgd", "linear", "100%", "top1"), 0.6933, 0.0012),
        (("coco", "mask_rcnn_r50_fpn", "sgd", "linear", "10%", "mask_ap"), 0.2457, 0.0007),
        (("cityscapes", "pspnet_r50", "sgd", "step", "50%", "miou"), 0.7423, 0.0094),
        (("kinetics", "i3d_r50", "sgd", "linear", "25%", "top1"), 0.6634, 0.0020),
    ],
)
def test_table_3(cell, mean, std):
    assert published(*cell) == (mean, std, "Li, Yumer, Ramanan, Budgeted Training, ICLR 2020, Table 3")


def test_an_error_becomes_an_accuracy():
    found = published("cifar10", "resnet20", "sgd", "rex", "1%", "top1")
    assert found is not None and found[:2] == (0.7206, 0.0046)  # 27.94 +- .46 % error in REX, Table 4
    assert published("cifar10", "resnet20", "sgd", "rex", "1%", "error") is None


def test_a_number_without_a_deviation():
    found = published("imagenet", "resnet50", "adam", "rex", "1%", "top1")
    assert found is not None and (found.mean, found.std) == (0.3009, None)  # 69.91 % error in REX, Table 8


def test_every_row_is_a_number_with_a_source():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 498
    assert all(row["source"] and float(row["mean"]) > 0 for row in rows)


def test_only_the_recipe_that_a_task_reproduces_stands_beside_it():
    assert beside("imagenet", "sgd", "linear", "5%", "top1") is not None
    assert beside("cifar10_resnet20", "adam", "constant", "100%", "top1").mean == 0.8806
    assert beside("imagenet_tiny", "sgd", "linear", "5%", "top1") is None
    assert beside("imagenet", "adam", "linear", "5%", "top1") is None  # REX's ResNet-50, not this recipe
    assert beside("imagenet", "sgd", "linear_ramp", "16ep", "top1") is None  # FFCV's recipe
    assert beside("cifar10", "sgd", "linear", "5%", "top1") is None  # Table 2: not found


def test_kinetics_needs_as_many_clips_as_tell_it_from_a_small_part():
    cell = ("kinetics", "sgd", "linear", "25%", "top1")
    assert [beside(*cell, n) is not None for n in (None, 800, 99_999, 100_000)] == [False, False, False, True]
    assert notes("kinetics", [240_000, 230_000], 7) == ["Ours: 230,000 to 240,000 training clips, 7 missing."]
    assert "100,000 training clips or more" in notes("kinetics", [240_000, None], None)[1]
    assert notes("imagenet", [5], 1) == notes("mine", [5], 1) == notes("kinetics", [], None) == []


def test_a_schedule_of_the_same_name_and_another_curve_has_no_number_beside_it():
    """REX's exp is e^{-3p}; ours is the budgeted paper's .97 per epoch."""
    assert published("cifar10", "resnet20", "sgd", "exp", "10%", "top1") is not None
    assert beside("cifar10_resnet20", "sgd", "exp", "10%", "top1") is None
    assert beside("cifar10_resnet20", "sgd", "linear", "10%", "top1") is not None
