"""From a command line to recipes: the same configuration as Hydra's own, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from budgeted.errors import UserError
from budgeted.recipe import flatten
from tasks import cli

GROUPS = {group: cli.options(group) for group in ("task", "schedule", "budget", "optimizer", "sweep")}
LONGEST = max(map(len, GROUPS.values()))


def hydras_own(words):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        whole = OmegaConf.to_container(compose("config", overrides=list(words)), resolve=True)
    if whole["optimizer"]["name"] != "sgd":  # kinetics brings Nesterov's momentum to any: see cli._fitting
        whole["optimizer"].pop("nesterov", None)
    return whole


# -- the configuration --------------------------------------------------------------------------------------


def test_groups_have_their_options():
    assert GROUPS["budget"] == ("1%", "5%", "10%", "25%", "50%", "100%")
    assert {"imagenet", "cifar10", "kinetics", "coco", "cityscapes"} <= set(GROUPS["task"])
    assert set(GROUPS["optimizer"]) == {"sgd", "adam", "adamw", "amsgrad", "rmsprop", "schedule_free"}
    assert {"smoke", "table3"} <= set(GROUPS["sweep"]) and len(GROUPS["schedule"]) == 16


@pytest.mark.parametrize("k", range(LONGEST))
def test_equals_hydras_own_for_every_option_of_every_group(k):
    words = tuple(f"{group}={names[k % len(names)]}" for group, names in GROUPS.items())
    assert cli.configuration(words) == hydras_own(words)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("task=coco", "schedule=step", "budget=5%", "seed=1", "out=elsewhere", "data.root=/data/coco"),
        ("budget.amount=900it", "task.lr=1e-3", "task.batch_size=64", "schedule=wsd", "schedule.shape=linear"),
        ("task.milestones=[0.5,0.75]", "task.warmup.fraction=0.1", "data.subset=null", "hold=7"),
        ("budget.amount='5%'", 'out="a b"', "task.model=resnet50", "task.weights='/a/b=c.pt'"),
        ("++seed=3", "compile=true", "channels_last=True", "precision=bf16"),
        ("task=coco_tiny", "+task.options.a.b=1", "+task.options.c=[1,x]"),
        ("task=coco_tiny", "task.options.MODEL.RESNETS.NORM=GN", "+task.options.MODEL.NEW=null"),
        ("seed=1", "seed=2", "schedule=step", "schedule=linear"),
        ("task.lr=${task.weight_decay}", "out=runs/${task.name}"),
        ("optimizer=adam", "optimizer.betas=[0.8,0.99]", "optimizer.lr=0.01"),
        ("optimizer=adam", "task=kinetics_tiny"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_equals_hydras_own_for_typical_words(words):
    assert cli.configuration(words) == hydras_own(words)


def test_cells_do_not_share_what_they_are_made_of():
    one = cli.configuration(("task=imagenet_tiny",))
    one["task"]["milestones"].append(0.9)
    one["data"]["workers"] = 99
    two = cli.configuration(("task=imagenet_tiny",))
    assert 0.9 not in two["task"]["milestones"] and two["data"]["workers"] != 99


# -- sweeps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", cli.options("task"))
@pytest.mark.parametrize("optimizer", cli.options("optimizer"))
def test_every_optimizer_goes_with_every_task(task, optimizer):
    recipe = cli.recipe((f"task={task}", f"optimizer={optimizer}", "mode=plan"))
    keys = set(OmegaConf.load(ROOT / "conf" / "optimizer" / f"{optimizer}.yaml"))
    assert set(recipe.cfg["optimizer"]) == keys
    assert set(recipe.fields["optimizer"]) <= {*keys, "lr"}
    if optimizer == "sgd":
        assert recipe.cfg["optimizer"]["nesterov"] is task.startswith("kinetics")


def test_a_sweep_is_the_product_of_its_words_in_order():
    jobs = cli.expand(("schedule=step,linear", "budget=1%,5%", "seed=range(2)", "task=imagenet_tiny"))
    assert len(jobs) == 8 and len(set(jobs)) == 8
    assert jobs[0] == ("schedule=step", "budget=1%", "seed=0", "task=imagenet_tiny")
    assert jobs[-1] == ("schedule=linear", "budget=5%", "seed=1", "task=imagenet_tiny")


def test_a_cell_that_is_asked_for_twice_comes_once():
    assert cli.expand(("seed=1,2,1",)) == [("seed=1",), ("seed=2",)]


def test_all_schedules_leave_out_those_that_need_a_run(said):
    names = [job[0].removeprefix("schedule=") for job in cli.expand(("schedule=glob(*)",))]
    assert sorted(names) == sorted(set(GROUPS["schedule"]) - {"refined", "replay"})
    assert any("refined and replay" in line for line in said)


def test_all_schedules_with_a_run_leave_out_none():
    assert len(cli.expand(("schedule=glob(*)", "schedule.run=/a/run"))) == 16
    assert [job[0] for job in cli.expand(("schedule=glob(c*)",))] == ["schedule=constant", "schedule=cosine"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("schedule=linr,step",), "did you mean 'linear'"),
        (("budget=5,10",), "budget=5%"),
        (("schedule=glob(q*)",), "matches no schedule"),
        (("seed=range(0)",), "no cell"),
        (("seed=interval(0,1)",), "INTERVAL"),
        (("mode=plan,train",), "one mode"),
        (("task=coco,imagnet",), "did you mean 'imagenet'"),
    ],
)
def test_a_wrong_sweep_is_one_line(words, said):
    with pytest.raises(UserError) as error:
        cli.expand(words)
    assert said in str(error.value)


def test_every_named_sweep_and_task_can_be_planned():
    for task in GROUPS["task"]:
        planned = cli.recipe((f"task={task}", "mode=plan", "data.root=/nowhere"))
        assert planned.total and planned.cell.name.startswith(f"{task}/linear/10%/s0")


# -- what is wrong, in one line -----------------------------------------------------------------------------

BAD = [
    # words, what the line must hold
    ("task=imagenet_tny", "did you mean 'imagenet_tiny'"),
    ("task=", "no such task"),
    ("schedule=linaer", "did you mean 'linear'"),
    ("budget=5", "budget=5%"),
    ("budget=15%", "budget.amount=15%"),
    ("budget=45min", "budget.amount=45min"),
    ("budget=15", "budget.amount=15%"),
    ("optimizer=sdg", "did you mean 'sgd'"),
    ("shedule=linear", "did you mean 'schedule'"),
    ("task.lrr=0.1", "did you mean 'task.lr'"),
    ("lr=0.1", "'task.lr'"),
    ("budget=5% budget.amount=900it", "one of them"),
    ("budget.amount=-3", "budget.amount=-3"),
    ("budget.amount=-3it", "must be positive"),
    ("budget.amount=abc", "900it"),
    ("budget.amount=0ep", "must be positive"),
    ("budget.amount=1e99it", "more than 1e12"),
    ("budget.amount=1e400it", "900it"),
    ("budget.amount=", "900it"),
    ("budget.amount=nan%", "900it"),
    ("budget.amount=[5%]", "900it"),
    ("task.weights=/a=b.pt", "quote a value"),
    ("sweep=smoke", "python run.py -m sweep=smoke"),
    ("-m sweep=smok", "did you mean 'smoke'"),
    ("seed=1,2", "python run.py -m 'seed=1,2'"),
    ("schedule=glob(*)", "-m 'schedule=glob(*)'"),
    ("mode=trian", "did you mean 'train'"),
    ("mode=status out=nowhere", "out=nowhere: no such folder"),
    ("mode=report out=nowhere", "out=nowhere: no such folder"),
    ("seed", "write key=value"),
    ("~seed", "nothing of the configuration can be deleted"),
    ("task.lr={", "cannot be read"),
    ("task.lr=${nope}", "nope"),
    ("+seed=1", "remove + prefix"),
    ("task=kinetics_tiny task.options.x=1", "+task.options.x=1"),
    ("data=5", "data.root"),
    ("task.warmup={fraction:.1}", "task.warmup.fraction"),
    ("data.root=nowhere", "data.root=nowhere: no such folder"),
    ("data.root=empty", "data.root=empty: the folder is empty"),
    ("data.root=lacking", "lacks"),
    ("data.root=file", "data.root=file: not a folder"),
    ("task.batch_size=5000", "larger than the data set (2000 training samples)"),
    ("task.batch_size=0", "at least 1"),
    ("task.lr=abc", "must be a positive number"),
    ("seed=1.5", "must be a whole number"),
    ("precision=fp16", "one of fp32, bf16"),
    ("task.eval_every=45min", "25%"),
    ("task.metric=miou", "top1 or top5"),
    ("task.name=../../etc/x", "names a folder"),
    ("optimizer.name=adam", "write optimizer=adam"),
    ("schedule.name=step", "write schedule=step"),
    ("schedule.name={1:2}", "write schedule="),
    ("-m hydra/launcher=nan", "must be a string"),
    ("-m hydra/launcher=slrum", "did you mean 'slurm'"),
    ("task.name=foo", "write task=foo"),
    ("data.root=~/surely/not", os.path.expanduser('~/surely/not: no such folder')),
    ("optimizer=adam task.lr=0.5", "optimizer.lr"),
    ("schedule=refined", "schedule.run=DIR"),
    ("schedule=replay schedule.run=nowhere", "no metrics.jsonl there"),
    ("schedule=step schedule.milestones=[2]", "fractions of the budget"),
    ("schedule=wsd schedule.shape=squar", "did you mean 'square'"),
    ("hydra/launcher=nope", "no such launcher"),
    ("-m seed=1,2 foo=1", "foo: no such key"),
    ("-m task.lr=0.1,abc", "task.lr=abc"),
    ("-m budget.amount=5%,abc", "budget.amount=abc"),
    ("-m schedule=step,linear task.batch_size=32,5000", "larger than the data set"),
    ("-m mode=report", "one cell at a time"),
    ("-m seed=1 data.workers=0,1", "run twice"),
    ("out=file/x", "is not a folder"),
    ("-m out=file seed=0,1", "is not a folder"),
    ("task.model=resnt18", "did you mean 'resnet18'"),
    ("-m task.model=resnet_narrow,resnt18", "did you mean 'resnet18'"),
    ("task=kinetics_tiny task.model=i3d_r5", "did you mean 'i3d_r50'"),
    ("task.weights=/nope/w.pt", "no such file"),
    ("task=cityscapes_tiny task.weights=nope", "no such file"),
    ("+task.options.x=1", "no such key"),
    ("--config-name=foo", "no such option"),
    ("-x seed=1", "no such option"),
    ("seed=9999999999", "from 0 to 999999999"),
    ("optimizer.momentum=0 optimizer.nesterov=true", "optimizer.nesterov=false"),
    ("task=kinetics_tiny task.frames=0", "at least 1"),
    ("task=kinetics_tiny task.scale=[20,40]", "two short sides, rising, from task.crop=32 up"),
    ("task=kinetics_tiny optimizer=adamw optimizer.nesterov=true", "optimizer.nesterov: no such key"),
    ("task=coco task.options=5", "task.options=5: must be a section"),
    ("-m sweep=smoke,rex", "one sweep at a time"),
    ("budget.amount=.5%", "write 0.5%"),
    ("task.classes=5", "says what data the recipe is for; data.root and data.subset"),
    ("-m schedule=step,linear schedule.gamma=0.2", "no such constant of schedule=linear"),
    ("schedule=exp schedule.T0=inf", "a finite number"),
    ("optimizer=schedule_free optimizer.momentum=0", "a number in (0, 1)"),
    ("task=cityscapes_tiny task.crop=[64]", "[height, width]"),
]  # fmt: skip

GOOD = [
    "mode=plan",
    "mode=plan schedule=step budget=100% task=imagenet",
    "-m mode=plan schedule=step,linear budget=1%,100%",
    "sweep=table3 -m mode=plan",
    "-m sweep=smoke schedule=linear mode=plan",
    "--help",
]

DRIVER = """
import contextlib, io, json, logging, os, runpy, sys
answers = []
for line in json.load(sys.stdin):
    sys.argv = [{run!r}, *line.split()]
    logging.getLogger("budgeted").handlers.clear()
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path({run!r}, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    answers.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
json.dump(answers, sys.stdout)
"""


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What run.py answers to every line (one process for all of them), and the files before and after."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    for name in ("train/a", "train/b", "train/c", "val/a", "val/b"):
        (folder / "lacking" / name).mkdir(parents=True)
        (folder / "lacking" / name / "0.jpg").touch()
    before = tree(folder)
    lines = [*GOOD, *(words for words, _ in BAD)]
    script = textwrap.dedent(DRIVER).format(run=str(ROOT / "run.py"))
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(lines), capture_output=True, text=True,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True)), before, tree(folder)


@pytest.mark.parametrize(("words", "said"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_ends_in_one_line_and_exit_code_2(answers, words, said):
    code, out, err, torch_imported = answers[0][words]
    assert code == 2, err
    assert re.fullmatch(r"error: [^\n]+\n", err) and said in err and len(err) < 700
    assert out == "" and not torch_imported


@pytest.mark.parametrize(
    ("words", "said"),
    zip(
        GOOD,
        [
            "imagenet_tiny/linear/10%/s0",
            "500,400",
            "imagenet_tiny/step/100%/s0",
            "144 cells",
            "8 cells",
            "schedule: constant, cosine",
        ],
        strict=True,
    ),
    ids=GOOD,
)
def test_plans_and_help_launch_nothing_and_need_no_torch(answers, words, said):
    code, out, err, torch_imported = answers[0][words]
    assert code == 0 and err == "" and said in out and not torch_imported


def test_neither_plans_nor_bad_input_write_anything(answers):
    assert answers[2] == answers[1]


keys = st.sampled_from(
    [*flatten(cli.configuration(())), *GROUPS, "data", "+task.options.x", "++seed", "+foo", "a.b.c", "task.lr.x"]
)
values = st.one_of(
    st.sampled_from(["", "null", "true", "1", "-1", "1e400", "nan", "[]", "{}", "[1,2]", "{a:1}", "{1:2}", "[a:1]", "${seed}", "${", "???",
                     "'q'", "1,2", "range(3)", "glob(*)", "float(a)", "5%", "../x", "0x10", "9" * 5000, "[[1]]", "[nan]", "@", "\\"]),
    st.text("015.eE%-_ [{(,)}]='\"\\$:@#~é\n", max_size=6),
)  # fmt: skip


@given(st.lists(st.tuples(keys, values).map("=".join), min_size=1, max_size=2), st.booleans())
def test_any_words_are_a_plan_or_a_user_error(words, multirun):
    try:
        if multirun:
            cli.recipes(cli.expand([*words, "mode=plan"]))
        else:
            cli.check_arguments([*words, "mode=plan"])
    except UserError as error:
        assert str(error)


def run(folder, *words, **env):
    command = [sys.executable, str(ROOT / "run.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


@pytest.mark.parametrize("words", [("budget=5",), ("-m", "schedule=step,linaer"), ("mode=status",)], ids=" ".join)
def test_bad_input_of_a_process_of_its_own(tmp_path, words):
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert tree(tmp_path) == []


def test_the_trace_is_there_for_who_wants_it(tmp_path):
    done = run(tmp_path, "budget=5", HYDRA_FULL_ERROR="1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "UserError" in done.stderr


# -- quick answers ------------------------------------------------------------------------------------------


def test_help_takes_a_second_at_most_and_shows_the_choices(tmp_path):
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(tmp_path, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(took) <= 1.0  # of this process: others may be busy on the machine
    assert "schedule: constant, cosine" in done.stdout and "budget.amount=900it" in done.stdout
    assert tree(tmp_path) == []
