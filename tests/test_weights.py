"""task.weights: names that there are not, where the others come from, and whether what is here fits."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from torchvision import models

from budgeted.errors import UserError
from tasks import classification, cli, modes, tiny, video, weights

MODELS = {
    "classification": "resnet18",
    "video": "i3d_r50",
    "detection": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "segmentation": "pspnet_r50-d8_4xb2-40k_cityscapes-512x1024",
}


def cfg(adapter: str, source: str, **task) -> dict:
    return {"task": {"adapter": adapter, "model": MODELS[adapter], "weights": str(source), **task}}


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    for name in ("TORCH_HOME", "FVCORE_CACHE", "MMENGINE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def test_torchvisions_weights_are_read_off_its_files():
    for model in models.list_models(module=models):
        enum = models.get_model_weights(model)
        assert weights.of_torchvision(model) == {name: found.url for name, found in enum.__members__.items()}, model


@pytest.mark.parametrize(
    ("adapter", "source", "line"),
    [
        ("classification", "IMAGENET1K_V9", "no such file, nor weights of resnet18; did you mean 'IMAGENET1K_V1'?"),
        ("classification", "torchvision://resnet18", "no such source here; give a path, https://... or none"),
        ("video", "torchvision://resnet51", "torchvision has no such model; did you mean 'resnet50'?"),
        ("video", "gone.pt", "no such file; give a path, or none"),
        ("detection", "detectron2://ImageNetPretrained/MSRA/R-5.pkl",
         "detectron2's zoo has no such weights; did you mean 'ImageNetPretrained/MSRA/R-50.pkl'? "
         "Or give its address, https://dl.fbaipublicfiles.com/detectron2/..."),
        ("detection", "detectron://R-50.pkl", "no such source; give a path, https://..., detectron2://NAME or none"),
        ("segmentation", "open-mmlab://resnet50_v1",
         "open-mmlab has no such weights; did you mean 'resnet50_v1c'? Or give a path"),
    ],
)  # fmt: skip
def test_names_that_there_are_not(empty_caches, adapter, source, line):
    for package in {"detection": ["detectron2"], "segmentation": ["mmengine"]}.get(adapter, []):
        pytest.importorskip(package)
    with pytest.raises(UserError) as caught:
        weights.address(cfg(adapter, source))
    assert str(caught.value) == f"task.weights={source}: {line}"


def test_a_zoo_of_the_users_own_is_known(empty_caches):
    pytest.importorskip("mmengine")
    (empty_caches / "MMENGINE_HOME").mkdir()
    (empty_caches / "MMENGINE_HOME/open_mmlab.json").write_text(json.dumps({"mine": "https://a.b/mine.pth"}))
    assert weights.address(cfg("segmentation", "open-mmlab://mine")) == "https://a.b/mine.pth"


def test_a_slip_in_detectron2s_weights_ends_a_sweep_before_it_starts():
    pytest.importorskip("detectron2")
    with pytest.raises(UserError, match="detectron2's zoo has no such weights"):
        cli.recipe(("task=coco_tiny", "task.weights=detectron2://ImageNetPretrained/MSRA/R-50.pk"))


@pytest.mark.parametrize(
    ("adapter", "source", "place", "file"),
    [
        ("classification", "IMAGENET1K_V1", "https://download.pytorch.org/models/resnet18-f37072fd.pth",
         "TORCH_HOME/hub/checkpoints/resnet18-f37072fd.pth"),
        ("video", "torchvision://resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth",
         "TORCH_HOME/hub/checkpoints/resnet50-0676ba61.pth"),
        ("detection", "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
         "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl",
         "FVCORE_CACHE/detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
    ],
)  # fmt: skip
def test_where_weights_come_from_and_whether_they_are_here(empty_caches, monkeypatch, adapter, source, place, file):
    if adapter == "detection":
        pytest.importorskip("detectron2")
    said = f"task.weights={source}: from {place}, "
    assert weights.look(cfg(adapter, source), 5) == ([f"{said}not here yet: a run fetches them"], [])
    (empty_caches / file).parent.mkdir(parents=True)
    (empty_caches / file).touch()
    monkeypatch.setitem(weights.TRY, adapter, lambda cfg, classes: None)
    assert weights.look(cfg(adapter, source), 5)[0][0] == f"{said}kept in {empty_caches / file}"


def test_a_file_is_tried_on_the_model(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(models.resnet18(num_classes=5).state_dict(), path)
    assert weights.look(cfg("classification", path), 5) == ([f"task.weights={path}: they fit resnet18"], [])
    (misfit,) = weights.look(cfg("classification", path), 6)[1]
    assert "0 missing, 0 unknown, 2 of another shape, first 'fc.weight'" in misfit
    path.write_text("<html>")
    (misfit,) = weights.look(cfg("classification", path), 5)[1]
    assert "not a file of tensors" in misfit and "\n" not in misfit


@pytest.mark.parametrize("name", ["imagenet_tiny", "kinetics_tiny", "coco_tiny", "cityscapes_tiny"])
def test_check_finds_a_file_that_fits_no_model(name, tmp_path, said):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(2)}, path)
    full = cli.configuration((f"task={name}", f"data.root={tmp_path / name}"))
    full["task"]["weights"] = str(path)
    tiny.ensure(full)
    with pytest.raises(SystemExit):
        modes.check(OmegaConf.create(full), {})
    (line,) = [line for line in said if line.startswith("task.weights=")]
    assert "fit" in line and said[-1].startswith("1 findings; files: ")
    full["task"]["weights"] = "none"
    modes.check(OmegaConf.create(full), {})
    assert said[-1].startswith("nothing wrong found")


@pytest.mark.parametrize("name", ["imagenet_tiny", "kinetics_tiny", "coco_tiny", "cityscapes_tiny"])
def test_the_weights_of_a_tasks_own_model_fit(name, tmp_path):
    full = cli.configuration((f"task={name}",))
    model = BUILD[name](full)
    path = tmp_path / "x.pt"
    torch.save(model.state_dict(), path)
    full["task"]["weights"] = str(path)
    said, misfits = weights.look(full, 5)
    assert (said, misfits) == ([f"task.weights={path}: they fit {full['task']['model']}"], [])


def _detector(full):
    from tasks import detection, zoo

    return detection.build_model(zoo.config(full, 5, "cpu"))


def _segmenter(full):
    from tasks import mmzoo, segmentation

    return segmentation.MODELS.build(mmzoo.upstream_config(full["task"]).model)


BUILD = {
    "imagenet_tiny": lambda full: classification.build_model(full["task"]["model"], 5),
    "kinetics_tiny": lambda full: video.make_model(full["task"], 5),
    "coco_tiny": _detector,
    "cityscapes_tiny": _segmenter,
}
