"""What a configuration means: the paper's recipes at every budget, and values that are wrong."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
from conftest import ToyData

from budgeted.cells import RESULT_SCHEMA
from budgeted.errors import UserError
from budgeted.recipe import Recipe, flatten, known_key, resolve, same_types, validate
from tasks import cli

DATA = {
    "imagenet": ToyData("imagenet", Path("/data/imagenet"), 1_281_167, 50_000, tuple(map(str, range(1000)))),
    "cifar10": ToyData("cifar10", Path("/data/cifar10"), 45_000, 5_000, tuple(map(str, range(10)))),
    "coco": ToyData("coco", Path("/data/coco"), 117_266, 5_000, tuple(map(str, range(80)))),
    "cityscapes": ToyData("cityscapes", Path("/data/cityscapes"), 2_975, 500, tuple(map(str, range(19)))),
    "kinetics": ToyData("kinetics", Path("/data/kinetics"), 240_000, 20_000, tuple(map(str, range(400)))),
    "imagenet_tiny": ToyData("imagenet_tiny", Path("/data/tiny"), 2_000, 500, tuple(map(str, range(10)))),
}


def recipe(task="imagenet_tiny", *words, gpus=1, data=None) -> Recipe:
    cfg = cli.configuration((f"task={task}", *words))
    return resolve(cfg, cli.configuration((f"task={task}",)), data or DATA[task], gpus)


# -- horizons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "full", "one", "ten"),
    [
        ("imagenet", 500_400, 5_004, 50_040),
        ("cifar10", 70_400, 704, 7_040),
        ("coco", 90_000, 900, 9_000),
        ("cityscapes", 148_750, 1_488, 14_875),
        ("kinetics", 300_000, 3_000, 30_000),
    ],
)
def test_the_papers_recipes_at_their_budgets(task, full, one, ten):
    found = [recipe(task, f"budget={amount}") for amount in ("1%", "10%", "100%")]
    assert [r.total for r in found] == [one, ten, full] and {r.full for r in found} == {full}
    assert not any(r.cell.departs for r in found)


@pytest.mark.parametrize(
    ("task", "batch", "lr", "decay", "milestones", "metric", "rule"),
    [
        ("imagenet", 256, 0.1, 1e-4, [1 / 3, 2 / 3], "top1", "best"),
        ("cifar10", 128, 0.1, 5e-4, [1 / 3, 2 / 3], "top1", "best"),
        ("coco", 16, 0.02, 1e-4, [2 / 3, 8 / 9], "box_ap", "final"),
        ("cityscapes", 8, 0.01, 5e-4, [1 / 3, 2 / 3], "miou", "best"),
        ("kinetics", 32, 0.005, 1e-4, [1 / 2, 5 / 6], "top1", "final"),
    ],
)
def test_the_papers_recipes(task, batch, lr, decay, milestones, metric, rule):
    found = cli.configuration((f"task={task}",))["task"]
    assert (found["batch_size"], found["lr"], found["weight_decay"], found["metric"], found["rule"]) == (
        batch,
        lr,
        decay,
        metric,
        rule,
    )
    assert found["milestones"] == pytest.approx(milestones)


@pytest.mark.parametrize(
    ("amount", "total", "seconds"),
    [
        ("900it", 900, None),
        ("3ep", 186, None),
        ("6400im", 200, None),
        ("45min", None, 2700),
        ("8gpuh", None, 7200),
        ("3e17flop", None, None),
    ],
)
def test_every_unit_on_the_command_line(amount, total, seconds):
    found = recipe("imagenet_tiny", f"budget.amount={amount}", gpus=4)
    assert (found.total, found.seconds, found.cell.budget) == (total, seconds, amount)


def test_milestones_of_the_task_and_its_warmup_scale_with_the_budget():
    """Mask R-CNN's 1x: 1,000 iterations of warm-up and drops at 60,000 and 80,000 of 90,000; here 10, 600, 800 of 900."""
    schedule = recipe("coco", "schedule=step", "budget=1%").schedule
    ratio = lambda t: schedule(t / 900)  # noqa: E731
    assert [ratio(t) for t in (0, 5, 10, 599, 600, 799, 800, 899)] == pytest.approx(
        [0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_kinetics_drops_at_a_half_and_five_sixths():
    schedule = recipe("kinetics", "schedule=step").schedule
    assert [schedule(p) for p in (0.49, 0.5, 0.83, 0.84)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_own_milestones_go_before_the_tasks():
    schedule = recipe("coco", "schedule=step", "schedule.milestones=[0.5]", "task.warmup.fraction=0").schedule
    assert [schedule(p) for p in (0.49, 0.5, 0.9)] == pytest.approx([1, 0.1, 0.1])


def test_exponential_decays_by_the_epochs_of_the_full_run():
    assert recipe("cifar10", "schedule=exp", "budget=5%").schedule(0.5) == pytest.approx(0.97**100)
    assert recipe("imagenet", "schedule=exp").schedule(0.5) == pytest.approx(0.97**50)
    assert recipe("cifar10", "schedule=exp", "schedule.T0=100").schedule(0.5) == pytest.approx(0.97**50)


def test_hold_and_warmup_are_for_any_schedule():
    schedule = recipe(
        "imagenet_tiny", "schedule=cosine", "hold=2", "task.warmup.fraction=0.2", "task.warmup.factor=0.5"
    ).schedule
    assert [schedule(p) for p in (0, 0.1, 0.4, 0.5, 0.9)] == pytest.approx([0.5, 0.75, 1, 0.5, 0.5])


def test_evaluations_are_the_recipes():
    imagenet = recipe("imagenet", "budget=1%")
    count = imagenet.period("1ep", imagenet.total)
    assert [count(k, 0) for k in (5_003, 5_004)] == [0, 1]
    count = recipe("coco").period("100%", 900)
    assert [count(k, 0) for k in (899, 900)] == [0, 1]


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("task.batch_size=4000",), "task.batch_size=4000: larger than the data set (2000 training samples)"),
        (("budget.amount=0.0001ep",), "less than one"),
        (("budget.amount=1e99it",), "more than 1e12"),
        (("budget.amount=1gpuh", "device=cpu"), "no GPU-hours on device=cpu"),
        (("task.full=0.001ep",), "less than one"),
        (("schedule=step", "schedule.milestones=[1.5]"), "fractions of the budget"),
    ],
)
def test_what_does_not_resolve_is_refused(words, said):
    with pytest.raises(UserError) as error:
        recipe("imagenet_tiny", *words)
    assert said in str(error.value)


def test_top5_of_five_classes_is_refused():
    five = ToyData("kinetics_tiny", Path("/data"), 80, 40, ("a", "b", "c", "d", "e"))
    with pytest.raises(UserError, match="task.metric=top1"):
        recipe("imagenet_tiny", "task.metric=top5", data=five)
    assert recipe("imagenet_tiny", "task.metric=top5").cfg["task"]["metric"] == "top5"


WRONG = {
    "seed": [-1, 10**9, 1.5, "a", None, True, [1]],
    "device": ["gpu", 0, None],
    "precision": ["fp16", 32, True],
    "compile": ["yes", 1, None],
    "channels_last": ["no", 0],
    "micro_batch": [0, -1, 1.5, "a", True],
    "hold": [0, 2.5, "a"],
    "log_every": [0, None, "1ep"],
    "on_nonfinite": ["ignore", True, None],
    "grad_norm": [1, "a"],
    "watch": [0, -1, "a", True],
    "code": ["maybe", None],
    "tracker": ["wandbb", None],
    "out": ["", None, 5],
    "checkpoint.every": ["10min", "abc", 5, None, "0%", "1e9flop", "0.5it"],
    "checkpoint.minutes": [-1, "a", None, float("nan")],
    "plan.samples_per_second": [0, -1, "a"],
    "task.name": ["../x", "a/b", "", "..", ".x", None, "a b", "a\n", "é"],
    "task.adapter": ["foo", None, 3],
    "task.model": ["", None, 3],
    "task.weights": ["", None],
    "task.batch_size": [0, 1.5, "32", None, True],
    "task.lr": [0, -0.1, "a", float("nan"), float("inf"), None, True],
    "task.weight_decay": [-1e-4, "a", None],
    "task.full": ["45min", "10%", "abc", 100, "8gpuh", "1e9flop", "1.5h"],
    "task.last_batch": ["pad", None, True],
    "task.milestones": [[0], [1], [30, 60], 0.5, "a", None, [True]],
    "task.warmup.fraction": [1, -0.1, "a", None],
    "task.warmup.factor": [-0.1, 1.1, "a", None],
    "task.metric": ["miou", "topl", None, 1],
    "task.rule": ["worst", None],
    "task.eval_every": ["1h", "", 5],
    "task.augment": ["none", 3],
    "data.workers": [-1, 1.5, None],
    "data.subset": [0, -5, 1.5, "a"],
    "task.crop_scale": [[0.5], [2, 1], [0, 1], [0.9, 0.1], 0.5, None],
    "task.scale": [[40], [0, 40], [1.5, 2], 40, None],
    "task.crop": [0, -1, [64], [-1, 8], [0.5, 8], "a"],
    "task.frames": [0, -1, 1.5],
    "task.stride": [0, "a"],
    "task.clips": [0],
    "task.flip": [-0.1, 1.1, "a"],
    "task.dropout": [1, -0.1, "a"],
    "optimizer.lr": [-1, 0, "a", float("nan")],
    "optimizer.momentum": [-1, 1, "a"],
    "optimizer.betas": [[2, 3], [0.9], 0.9, [-0.1, 0.9]],
    "optimizer.eps": [-1, "a"],
    "optimizer.weight_decay": [-1, "a"],
    "budget.amount": ["abc", 5, None, "", "-3it", "5 %", "0%", ["5%"]],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_one_line_that_names_it(key):
    good = cli.configuration(("task=imagenet_tiny",))
    validate(good)
    *sections, last = key.split(".")
    for value in WRONG[key]:
        cfg = copy.deepcopy(good)
        node = cfg
        for section in sections:
            node = node[section]
        node[last] = value
        with pytest.raises(UserError) as error:
            validate(cfg)
        assert str(error.value).startswith(f"{key}={value}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("task.size=abc",), "task.size=abc: must be"),
        (("optimizer.momentum=abc",), "optimizer.momentum=abc: must be a number in [0, 1)"),
        (("optimizer.nesterov=1",), "optimizer.nesterov=1: must be true or false"),
        (("task.crop_scale=3",), "task.crop_scale=3: must be two rising shares in (0, 1]"),
        (("task.milestones=true",), "must be a list"),
        (("prepare.short_side=[1]",), "prepare.short_side=[1]: must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(words, said):
    named = cli.configuration(("task=imagenet_tiny",))
    same_types(named, named)
    with pytest.raises(UserError) as error:
        cfg = cli.configuration(("task=imagenet_tiny", *words))
        validate(cfg)
        same_types(cfg, named)
    assert said in str(error.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_a_moving_momentum_goes_with_all_optimizers_but_one(optimizer):
    words = ("data.root=/nowhere", "mode=plan", "schedule=onecycle")
    assert cli.recipe((*words, f"optimizer={optimizer}")).schedule.momentum_at
    with pytest.raises(UserError, match="schedule=onecycle moves the momentum, by which optimizer=schedule_free"):
        cli.recipe((*words, "optimizer=schedule_free"))


def test_a_replay_of_a_run_that_logged_too_little_says_what_to_do(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "lr": 0.1, "progress": 0}\n{"step": 31, "lr": 0.1, "progress": 0.9}\n'
    )
    (tmp_path / "config.yaml").write_text("task: {lr: 0.1}\noptimizer: {lr: null}\n")
    (tmp_path / "result.json").write_text('{"status": "done"}')
    words = ("data.root=/nowhere", "mode=plan", "schedule=replay", f"schedule.run={tmp_path}")
    with pytest.raises(UserError, match="logged too few steps; train it anew with log_every=1"):
        cli.recipe(words)


def finished(recipe, digest, root="/elsewhere"):
    recipe.cell.directory.mkdir(parents=True)
    reported = {"metric": "top1", "rule": "best", "value": 0.5}
    data = {"digest": digest, "root": root}
    recipe.cell.write_result(
        {
            "schema": RESULT_SCHEMA,
            "status": "done",
            "signature": recipe.cell.signature,
            "reported": reported,
            "data": data,
        }
    )


def test_a_result_of_other_data_is_refused_and_one_of_the_same_elsewhere_is_not(tmp_path):
    recipe = cli.recipe(("data.root=/nowhere", "mode=plan", f"out={tmp_path}"))
    known = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, digest="a" * 12))
    finished(known, "b" * 12)
    with pytest.raises(UserError, match=r"holds a result on other data, of /elsewhere, .*: give another out="):
        known.refuse_other_data()
    recipe.refuse_other_data()  # whose data are not here to be known
    assert recipe.other_root() == "/elsewhere"
    same = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, digest="b" * 12))
    same.refuse_other_data()
    assert same.other_root() is None


def test_null_and_free_options_may_become_anything():
    named = cli.configuration(("task=coco_tiny",))
    for words in (
        ("data.subset=5",),
        ("micro_batch=2",),
        ("optimizer.momentum=null",),
        ("task.options.MODEL.RESNETS.NORM=5",),
    ):
        same_types(cli.configuration(("task=coco_tiny", *words)), named)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("task.lrr", "did you mean 'task.lr'"),
        ("lr", "did you mean 'optimizer.lr' or 'task.lr'"),
        ("batch_size", "did you mean 'task.batch_size'"),
        ("workers", "did you mean 'data.workers'"),
        ("task.momentum", "did you mean 'optimizer.momentum'"),
        ("data.rot", "did you mean 'data.root'"),
        ("sed", "did you mean 'seed'"),
        ("task.warmup.fractoin", "did you mean 'task.warmup.fraction'"),
        ("data.qqqqqqqq", "there are data.root, data.workers, data.subset"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, said):
    cfg = cli.configuration(("task=imagenet_tiny",))
    with pytest.raises(UserError) as error:
        known_key(key, cfg)
    assert str(error.value).startswith(f"{key}: no such key; ") and said in str(error.value)


def test_known_keys_are_known():
    cfg = cli.configuration(("task=coco_tiny",))
    for key in ("seed", "task", "task.warmup", "task.warmup.fraction", "data.root", "task.options.any.thing"):
        known_key(key, cfg)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
