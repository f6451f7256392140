"""The segmentation adapter: its settings, its agreement with upstream's own Runner, and whole cells."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from budgeted.distributed import World
from budgeted.errors import UserError
from budgeted.schedules import Schedule
from budgeted.session import Session
from tasks import base, cli, compat, layouts

REPO = Path(__file__).resolve().parent.parent
STREETS = REPO.parent / "shared/data/streets"
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="needs mmsegmentation")


@pytest.fixture(scope="module")
def seg():
    from tasks import segmentation

    torch.set_num_threads(1)
    return segmentation


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """cell("key=value", ...) is the recipe of a cityscapes_tiny cell that lives in tmp_path."""
    monkeypatch.setenv("BUDGETED_BAR", "0")

    def make(*words):
        recipe = cli.recipe(("task=cityscapes_tiny", f"out={tmp_path / 'runs'}", *words))
        cli.embedded_data(recipe.cfg)
        return recipe

    return make


@pytest.fixture
def built(seg, cell):
    """built("key=value", ...) is an adapter after build(), and its session."""
    sessions = []

    def make(*words, recipe=None):
        recipe = recipe or cell(*words)
        adapter = seg.Segmentation(recipe.cfg, recipe.data, CPU)
        sessions.append(Session(recipe, recipe.total, World(), CPU))
        sessions[-1].cell.directory.mkdir(parents=True, exist_ok=True)
        adapter.build(sessions[-1])
        return adapter, sessions[-1]

    yield make
    for session in sessions:
        session.close()


def metrics(recipe):
    return [json.loads(line) for line in recipe.cell.metrics.read_text().splitlines()]


# Upstream's import.


def test_the_stand_in_for_compiled_ops_is_gone_after_the_import(seg):
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert "mmcv._ext" not in sys.modules
    assert not mmcv_full_available()


def test_a_compiled_op_says_what_it_needs(seg):
    from mmcv.ops import nms

    with pytest.raises(UserError, match="'nms' is not in mmcv-lite.*choose a task.model that needs none"):
        nms(torch.zeros(2, 4), torch.zeros(2), 0.5)


def test_absent_upstream_is_one_line_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mmengine, mmcv, mmseg.*pip install mmsegmentation==1.2.2"):
        compat.mmseg()


# Settings.


def task(**changes):
    cfg = cli.configuration(("task=cityscapes", "data.root=/nowhere"))
    return {**cfg["task"], **changes}


def test_the_recipe_is_the_papers():
    data = layouts.Data("cityscapes", Path("/x"), 2975, 500, ("x",) * 19)
    cfg = cli.configuration(("task=cityscapes", "data.root=/x", "budget=100%"))
    from budgeted.recipe import resolve

    recipe = resolve(cfg, cfg, data)
    assert recipe.total == 148_750
    assert (cfg["task"]["lr"], cfg["task"]["weight_decay"], cfg["optimizer"]["momentum"]) == (0.01, 5e-4, 0.9)
    assert recipe.schedule(0.0) == 1.0


def test_upstreams_config_at_the_recipes_sizes(seg):
    config = seg.upstream_config(task(crop=[64, 96], scale=[192, 96]))
    steps = {step["type"]: step for step in config.train_pipeline}
    assert steps["RandomCrop"]["crop_size"] == (64, 96)
    assert steps["RandomResize"]["scale"] == (192, 96) and steps["RandomResize"]["ratio_range"] == (0.5, 2.0)
    assert steps["RandomFlip"]["prob"] == 0.5 and "PhotoMetricDistortion" in steps
    assert config.test_pipeline[1]["scale"] == (192, 96)
    assert config.model.data_preprocessor["size"] == (64, 96)
    assert config.model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert config.model.test_cfg.mode == "whole"


def untouched(name):
    from mmengine import Config

    return Config.fromfile(compat.mmseg_config(name))


def test_the_recipes_config_is_upstreams_own(seg):
    """At the recipe's sizes, which are upstream's, all that is used of the file is as it stands there but weights."""
    ours, theirs = seg.upstream_config(task()), untouched(task()["model"])
    assert theirs.model.pop("pretrained") == task()["weights"] and ours.model.pop("pretrained") is None
    assert ours.model.to_dict() == theirs.model.to_dict()
    assert ours.train_pipeline == theirs.train_dataloader.dataset.pipeline
    assert ours.test_pipeline == theirs.val_dataloader.dataset.pipeline
    assert theirs.optim_wrapper.pop("clip_grad") is None and ours.optim_wrapper == theirs.optim_wrapper
    assert ours.env_cfg == theirs.env_cfg


OTHERS = {"cgnet_fcn_4xb4-60k_cityscapes-680x680": (680, 680), "pidnet-s_2xb6-120k_1024x1024-cityscapes": (1024, 1024)}


@pytest.mark.parametrize("name", OTHERS)
def test_a_config_for_cityscapes_keeps_its_own_augmentation(seg, name):
    ours, theirs = seg.upstream_config(task(model=name, crop=OTHERS[name])), untouched(name)
    assert ours.train_pipeline == theirs.train_dataloader.dataset.pipeline
    assert ours.test_pipeline == theirs.val_dataloader.dataset.pipeline


def test_a_config_for_other_data_gets_the_streets_classes_and_labels(seg):
    config = seg.upstream_config(task(model="pspnet_r50-d8_4xb4-80k_ade20k-512x512"))
    assert config.model.decode_head.num_classes == config.model.auxiliary_head.num_classes == 19
    assert config.train_pipeline == seg.upstream_config(task()).train_pipeline


def test_an_unknown_config_names_the_nearest(seg):
    with pytest.raises(UserError, match="no such config; the nearest is pspnet_r50-d8_4xb2-40k_cityscapes-512x1024"):
        seg.upstream_config(task(model="pspnet_r50_4xb2-40k_cityscapes-512x1024"))


def test_options_reach_the_model(seg):
    options = {"model": {"decode_head": {"dropout_ratio": 0.3}}, "optim_wrapper": {"clip_grad": {"max_norm": 1.0}}}
    config = seg.upstream_config(task(options=options))
    assert config.model.decode_head.dropout_ratio == 0.3
    assert config.model.decode_head.channels == 512
    assert config.optim_wrapper.clip_grad == {"max_norm": 1.0}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"param_scheduler": [1]}, "free are model"),
        ({"train_cfg": {"max_iters": 7}}, "free are model"),
        ({"optim_wrapper": {"optimizer": {"lr": 1}}}, "free are model"),
        ({"models": {"x": 1}}, "free are model"),
        ({"model": {"pretrained": "x"}}, "set task.weights"),
        ({"model": {"data_preprocessor": {"size": [1, 1]}}}, "set task.weights or task.crop"),
    ],
)
def test_options_that_the_suite_decides_are_refused(seg, option, words):
    with pytest.raises(UserError, match=words):
        seg.upstream_config(task(options=option))


# FLOPs.


def test_flops_of_the_papers_model(seg):
    """Counted by hand where it is simple: PSPNet's bottleneck alone is 3x3 from 4096 to 512 at 64x128."""
    data = layouts.Data("cityscapes", Path("/x"), 2975, 500, ("x",) * 19)
    cfg = cli.configuration(("task=cityscapes", "data.root=/x"))
    adapter = seg.Segmentation(cfg, data, CPU)
    found = adapter.flops()
    bottleneck = 8 * 3 * 2 * (9 * 4096 * 512) * 64 * 128
    assert bottleneck < found
    assert found == pytest.approx(18.04e12, rel=0.005)  # 376 G multiply-adds an image forward, three times that in all


# Weights.


@pytest.fixture
def small(seg, cell):
    recipe = cell()
    with seg.quiet():
        return seg.revert_sync_batchnorm(seg.MODELS.build(seg.upstream_config(recipe.cfg["task"]).model))


def test_weights_of_a_whole_model_and_of_a_backbone(seg, small, tmp_path):
    whole = {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in small.state_dict().items()
    }
    torch.save({"state_dict": whole}, tmp_path / "whole.pth")
    seg.load_weights(small, str(tmp_path / "whole.pth"))
    assert all(torch.equal(value, whole[key]) for key, value in small.state_dict().items())
    backbone = {key: value + 1 for key, value in small.backbone.state_dict().items()}
    torch.save(
        {**backbone, "fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}, tmp_path / "backbone.pth"
    )
    seg.load_weights(small, str(tmp_path / "backbone.pth"))
    assert all(torch.equal(value, backbone[key]) for key, value in small.backbone.state_dict().items())
    assert torch.equal(small.decode_head.conv_seg.weight, whole["decode_head.conv_seg.weight"])


def test_weights_that_do_not_fit_are_counted(seg, small, tmp_path):
    state = small.backbone.state_dict()
    del state["stem.1.bias"]
    state["stem.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"1 missing, 0 unknown, 1 of another shape, first 'stem.1.bias'"):
        seg.load_weights(small, str(tmp_path / "x.pth"))


def test_a_classifier_of_upstreams_zoos_goes_into_the_backbone(seg, small, tmp_path, monkeypatch):
    """mmcls has whole classifiers and MobileNetV2's last layer; torchvision's files have no counts of batches."""
    norms = small.backbone.state_dict()
    state = {f"backbone.{key}": value + 1 for key, value in norms.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": {**state, "backbone.conv2.conv.weight": torch.ones(1), "head.fc.bias": torch.ones(1)}},
               tmp_path / "x.pth")  # fmt: skip
    asked = []

    def fetch(address, **kwargs):
        asked.append(address)
        return torch.load(tmp_path / "x.pth", weights_only=kwargs["weights_only"])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name in ("mmcls://resnet18", "torchvision://resnet18", "open-mmlab://resnet18_v1c"):
        seg.load_weights(small, name)
    assert all(torch.equal(value, state[f"backbone.{key}"]) for key, value in small.backbone.state_dict().items()
               if not key.endswith("num_batches_tracked"))  # fmt: skip
    assert [address.rpartition("/")[2][:9] for address in asked] == ["resnet18_", "resnet18-", "resnet18_"]
    assert asked[1] == "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("torchvision://resnet_50", "torchvision has no such weights; did you mean 'resnet50'. Or give a path"),
        ("mmcls://mobilenetv2", "mmcls has no such weights; did you mean 'mobilenet_v2'"),
        ("torchvison://resnet50", "no such zoo; give a path, https://..., open-mmlab://NAME, .*, mmcls://NAME or none"),
    ],
)
def test_weights_that_upstreams_zoos_have_not(seg, small, weights, words):
    with pytest.raises(UserError, match=words):
        seg.load_weights(small, weights)


def logged_by_mmengine(state):
    """A checkpoint as mmengine's CheckpointHook writes it, with the history of a run's losses."""
    from mmengine.logging import MessageHub

    hub = MessageHub("a run")
    hub.update_scalar("train/loss", np.float32(2.5))
    hub.update_info("iter", np.int64(3))
    return {"meta": {"iter": 3}, "state_dict": state, "message_hub": hub.state_dict(), "param_schedulers": []}


def test_weights_of_an_mmengine_run_are_read_without_its_log(seg, small, tmp_path):
    torch.save(logged_by_mmengine({key: value + 1 for key, value in small.state_dict().items()}), tmp_path / "x.pth")
    before = small.decode_head.conv_seg.bias.clone()
    seg.load_weights(small, str(tmp_path / "x.pth"))
    assert torch.equal(small.decode_head.conv_seg.bias, before + 1)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_weights_run_no_code(seg, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**logged_by_mmengine({}), "state_dict": Trap()}, "trap.pth")
    with pytest.raises(UserError, match="not a file of tensors"):
        seg.load_weights(small, "trap.pth")
    assert not Path("trapped").exists()


class Reach:
    def __reduce__(self):
        return getattr, (torch.nn.Parameter(torch.zeros(1)), "data")


def test_weights_reach_nothing_by_getattr(tmp_path):
    """mmengine's log names getattr: what stands for it gives nothing."""
    torch.save({"state_dict": {"w": torch.ones(1), "x": Reach()}}, tmp_path / "x.pth")
    state = base.read_weights(str(tmp_path / "x.pth"))
    assert type(state["x"]) is base.Unread and not vars(state["x"])


def test_absent_weights_are_one_line(seg, small, tmp_path):
    with pytest.raises(UserError, match="no such file; give a path, or none"):
        seg.load_weights(small, str(tmp_path / "none.pth"))


def test_without_a_network_the_line_says_where_the_weights_are(seg, small, monkeypatch):
    def refuse(address, **kwargs):
        assert kwargs["weights_only"]
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(
        UserError,
        match=r"from https://download.openmmlab.com\S+resnet50_v1c\S+ \(URLError: no route\); fetch it elsewhere",
    ):
        seg.load_weights(small, "open-mmlab://resnet50_v1c")


# Data.


def test_a_label_of_another_size_says_what_to_do(seg):
    sample = {"gt_seg_map": np.zeros((4, 8)), "ori_shape": (5, 8), "seg_map_path": "x.png"}
    with pytest.raises(UserError, match=r"x.png: is \(8, 4\), its picture \(8, 5\): remove it and run mode=prepare"):
        seg.refuse_odd_labels(sample)


def test_a_label_that_is_cut_short_is_named(seg, built):
    adapter, _ = built()
    broken = adapter.dataset.get_data_info(3)["seg_map_path"]
    whole = Path(broken).read_bytes()
    other = Path(broken).with_name("cut.png")
    other.write_bytes(whole[:100])
    adapter.dataset.get_data_info = lambda index: {
        **type(adapter.dataset).get_data_info(adapter.dataset, index),
        "seg_map_path": str(other),
    }
    try:
        with pytest.raises(UserError, match=r"leftImg8bit.png or its label \S+cut.png: cannot be used \(OSError: "):
            adapter.dataset[3]
    finally:
        other.unlink()


def test_the_stream_starts_at_the_sessions_step(seg, built):
    adapter, session = built()
    first = [batch for batch, _ in zip(session.loader(adapter.dataset, seg.pseudo_collate), range(3), strict=False)]
    session.step = 2
    again = next(iter(session.loader(adapter.dataset, seg.pseudo_collate)))
    assert all(torch.equal(a, b) for a, b in zip(first[2]["inputs"], again["inputs"], strict=True))
    assert again["inputs"][0].shape[1:] <= (64, 128)


def test_subset_keeps_the_samples_that_layouts_names(seg, cell):
    recipe = cell("data.subset=7")
    config = seg.upstream_config(recipe.cfg["task"])
    with seg.quiet():
        kept, everything = (seg.streets(recipe.data, "train", config, keep) for keep in (7, None))
    assert len(kept) == recipe.data.n_train == 7 and len(everything) == 80
    names = [everything.get_data_info(i)["img_path"] for i in layouts.subset(80, 7)]
    assert [kept.get_data_info(i)["img_path"] for i in range(7)] == names


# Agreement with upstream's own Runner.


@pytest.mark.slow
def test_a_run_makes_upstreams_own_losses(seg, built, cell, tmp_path):
    """24 iterations with the policy of upstream's config (poly to a floor of 1e-4) and dropout: equal losses."""
    from mmengine.hooks import Hook

    from benchmarks.plain_mmseg import plain_runner
    from budgeted.randomness import STEPS, seed_all

    total, floor = 24, 1e-4
    recipe = cell(f"budget.amount={total}it", "task.eval_every=100%")
    lr = recipe.cfg["task"]["lr"]
    # mmengine's PolyLR(end=T) is at the floor in the last of its T updates
    policy = Schedule("theirs", lambda p: (floor + (lr - floor) * (1 - round(p * total) / (total - 1)) ** 0.9) / lr)
    recipe = dataclasses.replace(recipe, schedule=policy)
    adapter, session = built(recipe=recipe)
    initial = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    batches = list(session.loader_of(adapter.dataset, 0, total, seg.pseudo_collate))
    adapter.train(session)
    lines = [line for line in metrics(recipe) if "loss" in line]

    seen = []

    class Listen(Hook):
        def before_train(self, runner):
            seen.append({key: value.clone() for key, value in runner.model.state_dict().items()})

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seed_all(session.seed, STEPS, batch_idx, 0)  # the same dropout; nothing else is shared

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append((runner.optim_wrapper.optimizer.param_groups[0]["lr"], float(outputs["loss"])))

    samples = [
        dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
    ]
    batch, untouched = (
        recipe.cfg["task"]["batch_size"],
        torch.Generator(),
    )  # else its iterator draws before the weights do
    source = torch.utils.data.DataLoader(samples, batch, collate_fn=seg.pseudo_collate, generator=untouched)
    plain = plain_runner(adapter, source, tmp_path / "plain", total, (Listen(),))
    plain.train()
    assert seen[0].keys() == initial.keys() and all(torch.equal(seen[0][key], initial[key]) for key in initial)
    np.testing.assert_allclose([line["lr"] for line in lines], [rate for rate, _ in seen[1:]], rtol=1e-6)
    np.testing.assert_allclose([line["loss"] for line in lines], [loss for _, loss in seen[1:]], rtol=1e-5)
    for (key, ours), theirs in zip(adapter.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=key)
    # one set of weights, both evaluations: upstream rounds to a hundredth of a percent
    found, theirs = adapter.evaluate(), plain.val()
    assert found["miou"] > 0.05
    for ours, name in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        assert 100 * found[ours] == pytest.approx(theirs[name], abs=0.0051)


# Evaluation.


def test_metrics_are_those_of_a_confusion_matrix_counted_by_hand(seg, built):
    adapter, _ = built()
    counts = np.zeros((19, 19))  # truth, prediction
    adapter.model.eval()
    with torch.no_grad():
        for batch in adapter._val_loader():
            (sample,) = adapter.model.val_step(batch)
            truth, guess = (part.data.squeeze().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
            np.add.at(counts, (truth[truth != 255], guess[truth != 255]), 1)
    with np.errstate(invalid="ignore"):
        iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
        accuracy = counts.diagonal() / counts.sum(1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = adapter.evaluate()
    assert found["miou"] == pytest.approx(np.nanmean(iou), abs=1e-12)
    assert found["macc"] == pytest.approx(np.nanmean(accuracy), abs=1e-12)
    assert found["aacc"] == pytest.approx(counts.trace() / counts.sum(), abs=1e-7)  # upstream divides float32
    assert adapter.model.training and torch.equal(before, torch.get_rng_state())


# Whole cells.


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_cell_from_start_to_result(seg, cell, tmp_path, monkeypatch):
    recipe = cell("budget.amount=4it", f"data.root={REPO / 'data/cityscapes_tiny'}", "schedule=step")
    monkeypatch.chdir(tmp_path)
    result = base.train(recipe)
    assert result["status"] == "done" and result["iterations_done"] == 4 and result["samples_seen"] == 16
    assert set(result["metrics"]) == {"miou", "macc", "aacc"} and 0 < result["metrics"]["miou"]["final"] < 1
    rates = [line["lr"] for line in metrics(recipe) if "loss" in line]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])
    inside = {Path(name).parts[0] for name in listing(recipe.cell.directory)}
    assert inside == {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "state.json",
        "checkpoint.pt",
        "run.log",
        "lock",
        "upstream",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert not any("vis_data" in name or name.endswith(".pth") for name in listing(tmp_path))


def test_class_weights_leave_ignored_pixels_out(seg):
    """Upstream's loss fails at them. It is torch's own weighted mean, as upstream's is where none is ignored."""
    from tasks import mmzoo

    torch.manual_seed(0)
    pred, weights, label = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 1.0, 2.0]), torch.randint(3, (2, 4, 4))
    rest = {"class_weight": weights, "ignore_index": 255}
    torch.testing.assert_close(
        mmzoo.cross_entropy(pred, label, **rest), mmzoo._upstreams_loss(pred, label, **rest), rtol=1e-6, atol=0
    )
    label[0, :2] = 255
    expected = torch.nn.functional.cross_entropy(pred, label, weights, ignore_index=255)
    torch.testing.assert_close(mmzoo.cross_entropy(pred, label, **rest), expected)


@pytest.mark.slow
def test_a_head_that_wants_edges_gets_them(seg, cell, tmp_path):
    """PIDNet's own augmentation makes them, and its loss asks for them."""
    words = ("task=cityscapes", "task.model=pidnet-s_2xb6-120k_1024x1024-cityscapes", "task.weights=none",
             "task.batch_size=2", "task.crop=[64,128]", "task.scale=[128,64]", "task.eval_every=100%", "data.workers=0",
             "data.subset=4", "log_every=1", "budget.amount=1it", f"data.root={cell().data.root}")  # fmt: skip
    result = base.train(cli.recipe((*words, f"out={tmp_path / 'edges'}")))
    assert result["iterations_done"] == 1


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_bit_for_bit(seg, cell, monkeypatch):
    from budgeted.signals import Interrupted

    words = ("budget.amount=7it", "task.eval_every=100%", "checkpoint.every=100%")
    whole = base.train(cell(*words, "out=" + str(cell().cell.out / "whole")))
    for victim, workers in ((2, 0), (5, 2)):
        original = Session.before_step

        def before_step(self, victim=victim, original=original):
            original(self)
            if self.step == victim:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Session, "before_step", before_step)
        with pytest.raises(Interrupted):
            base.train(cell(*words, f"data.workers={workers}"))
        monkeypatch.setattr(Session, "before_step", original)
    resumed = base.train(cell(*words, "data.workers=2"))
    assert resumed["resumed"] == 2
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["metrics"] == whole["metrics"]
    steps = [line["step"] for line in metrics(cell(*words)) if "loss" in line]
    assert steps == list(range(7))


def test_dropout_follows_the_step_and_not_the_loading(seg, built):
    adapter, session = built()
    features = torch.ones(1, 32, 4, 4)
    head = adapter.model.decode_head.train()
    session.before_step()
    first = head.dropout(features)
    session.before_step()
    next(iter(session.loader(adapter.dataset, seg.pseudo_collate)))
    assert torch.equal(first, head.dropout(features)) and (first == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("precision=bf16",),
        ("channels_last=true",),
        ("micro_batch=2",),
        ("optimizer=adam", "optimizer.lr=0.01"),
        ("optimizer=schedule_free",),
    ],
)
def test_variants_learn(seg, cell, words):
    result = base.train(cell("budget.amount=12it", "task.eval_every=100%", "checkpoint.every=100%", *words))
    assert result["metrics"]["aacc"]["final"] > 0.2


@pytest.mark.slow
def test_compiled_backbone_gives_the_same_first_loss(seg, cell, monkeypatch):
    """Traced, not compiled, which takes minutes here."""
    original, losses = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager"))
    for words in ((), ("compile=true",)):
        recipe = cell("budget.amount=2it", f"out={cell().cell.out}/{len(words)}", *words)
        base.train(recipe)
        losses.append(next(line["loss"] for line in metrics(recipe)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pieces_of_a_batch_add_up_to_its_gradient(seg, built, tmp_path):
    """Batch norm aside (frozen here), micro_batch leaves the update as it is."""
    weights = []
    for words in ((), ("micro_batch=3",)):
        adapter, session = built("budget.amount=9it", f"out={tmp_path}/{len(words)}", *words)
        for module in adapter.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout2d):
                module.eval()
                module.train = lambda mode=True, module=module: module
        loop = seg._Loop(adapter.runner, session.loader(adapter.dataset, seg.pseudo_collate), session)
        before = adapter.model.decode_head.conv_seg.weight.clone()
        loop.step()
        weights.append(adapter.model.decode_head.conv_seg.weight - before)
    assert weights[0].abs().max() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-6)


WORKER = """
import sys, torch
torch.set_num_threads(1)
from tasks import base, cli
recipe = cli.recipe(tuple(sys.argv[1:]))
base.train(recipe)
"""


@pytest.mark.slow
def test_two_processes_share_batches_and_validation_images(seg, cell, tmp_path):
    """23 images over 2 ranks: each once, so one process finds the same numbers for the same weights."""
    root = tmp_path / "streets"
    subprocess.run(["cp", "-r", cell().data.root, root], check=True)
    (root / ".tiny.json").unlink()
    image = sorted((root / "leftImg8bit/val").rglob("*.png"))[0]
    image.unlink()
    words = ["task=cityscapes_tiny", f"out={tmp_path / 'ddp'}", f"data.root={root}", "budget.amount=4it", "device=cpu"]
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        tmp_path / "worker.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BUDGETED_BAR": "0", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*command, *words], env=environment, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = cli.recipe(tuple(words))
    result = recipe.cell.result()
    assert result["world_size"] == 2 and result["samples_seen"] == 16 and result["data"]["n_val"] == 23
    alone = Session(recipe, recipe.total, World(), CPU)
    adapter = seg.Segmentation(recipe.cfg, recipe.data, CPU)
    adapter.build(alone)
    found = adapter.evaluate()
    alone.close()
    assert alone.step == 4
    assert found == {name: values["final"] for name, values in result["metrics"].items()}


@pytest.mark.slow
def test_the_full_budget_beats_a_tenth(seg, cell):
    tenth, full = (base.train(cell(f"budget={amount}")) for amount in ("10%", "100%"))
    assert full["reported"]["value"] > 0.3 > 0.2 > tenth["reported"]["value"] > 0.06


@pytest.mark.slow
@pytest.mark.skipif(not STREETS.exists(), reason="no photographs here")
def test_photographs_learn(seg, cell):
    sizes = ("task.crop=[180,240]", "task.scale=[240,180]", "task.lr=0.05")
    result = base.train(cell(f"data.root={STREETS}", "task.full=16it", "budget=100%", "task.eval_every=100%", *sizes))
    assert result["data"] == {**result["data"], "n_train": 80, "n_val": 30}
    assert result["metrics"]["miou"]["final"] > 0.09
