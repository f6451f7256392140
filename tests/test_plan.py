"""What cells would cost: against arithmetic done by hand, and a probe against a data set of known slowness."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import plan, probe
from budgeted.cells import signature
from budgeted.recipe import resolve
from tasks import cli, layouts
from tasks.classification import Classification

# imagenet_tiny at 10%: 62 iterations of 32 samples, evaluated at the half and the end.
WORDS = ("mode=plan", "data.root=/nowhere/imagenet_tiny", "device=cpu")
RUN = {"samples_per_second": 496.0, "eval_seconds": 6.0, "evaluations": 4, "world_size": 1, "device": "cpu: x"}


def cell(out, *words):
    return cli.recipe((*WORDS, f"out={out}", *words))


def finished(recipe, **known):
    """Leave the result of a run of `recipe` under another seed, so that the recipe itself stays to be run."""
    folder = recipe.cell.out / recipe.cell.task / "linear" / "10%" / "s9"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"task": recipe.cell.task, "work": recipe.work, **RUN, **known})
    (folder / "result.json").write_text(text)
    return folder


def stopped(recipe, checkpoint=True, **state):
    recipe.cell.directory.mkdir(parents=True)
    recipe.cell.write_state("partial", **state)
    if checkpoint:
        recipe.cell.checkpoint.touch()


def price(recipe):
    [row] = plan.price([recipe])
    return row


def seconds(recipe):
    return price(recipe)["seconds"]


# -- prices -------------------------------------------------------------------------------------------------


def test_a_price_is_training_and_its_evaluations(tmp_path):
    finished(cell(tmp_path))
    row = price(cell(tmp_path))
    assert (row["training"], row["evaluating"]) == (pytest.approx(1984 / 496), pytest.approx(2 * 1.5))
    assert row["seconds"] == pytest.approx(7.0)


def test_prices_are_of_one_device(tmp_path):
    finished(cell(tmp_path), world_size=2)
    assert seconds(cell(tmp_path)) == pytest.approx(14.0)


@pytest.mark.parametrize(
    "known",
    [{"work": None}, {"work": "abcdef"}, {"task": "imagenet"}, {"samples_per_second": None}, {"samples_per_second": 0}],
    ids=str,
)
def test_what_does_not_fit_prices_nothing(tmp_path, known):
    finished(cell(tmp_path), **known)
    row = price(cell(tmp_path))
    assert row["seconds"] is None and row["evaluating"] is None and row["device"] == ""


def test_a_result_that_does_not_count_evaluations_prices_training_and_says_so(tmp_path, capsys):
    finished(cell(tmp_path), evaluations=None)
    assert seconds(cell(tmp_path)) == pytest.approx(4.0)
    plan.show([cell(tmp_path), cell(tmp_path, "seed=1")])
    assert "evaluation not priced for 2 " in capsys.readouterr().out.replace("\n", " ")


def test_of_several_runs_the_median_counts(tmp_path):
    folder = finished(cell(tmp_path))
    for name, rate in (("s8", 992.0), ("s7", 1.0)):
        (folder.parent / name).mkdir()
        known = json.loads((folder / "result.json").read_text()) | {"samples_per_second": rate}
        (folder.parent / name / "result.json").write_text(json.dumps(known))
    assert price(cell(tmp_path))["training"] == pytest.approx(4.0)


OTHER_WORK = [
    *("task.size=64", "task.model=resnet18", "precision=bf16", "micro_batch=8", "task.batch_size=64", "compile=true"),
    *("channels_last=true", "task.augment=cifar", "optimizer=schedule_free"),
]
SAME_WORK = [
    *("task.lr=0.2", "task.weight_decay=0", "seed=3", "schedule=step", "budget=100%", "optimizer=adam", "hold=4"),
    *("task.full=20ep", "task.eval_every=10%", "task.rule=final", "task.metric=top5", "task.warmup.fraction=0.1"),
    *("data.subset=1000", "task.last_batch=keep", "on_nonfinite=skip", "task.milestones=[0.5]", "data.workers=3"),
]


@pytest.mark.parametrize("word", OTHER_WORK)
def test_a_variant_of_other_work_neither_prices_nor_is_priced(tmp_path, word):
    finished(cell(tmp_path / "a"))
    assert seconds(cell(tmp_path / "a", word)) is None
    finished(cell(tmp_path / "b", word))
    assert seconds(cell(tmp_path / "b")) is None and seconds(cell(tmp_path / "b", word)) > 0


@pytest.mark.parametrize("word", SAME_WORK)
def test_what_does_not_change_the_work_shares_the_price(tmp_path, word):
    finished(cell(tmp_path))
    assert seconds(cell(tmp_path, word)) > 0


# -- what is left -------------------------------------------------------------------------------------------


def test_a_partial_cell_costs_only_the_rest(tmp_path):
    finished(cell(tmp_path))
    stopped(cell(tmp_path), step=31, total=62)
    row = price(cell(tmp_path))
    assert (row["left"], row["seconds"]) == (31, pytest.approx(2.0 + 1.5))


def test_without_its_checkpoint_it_costs_all(tmp_path):
    finished(cell(tmp_path))
    stopped(cell(tmp_path), checkpoint=False, step=31, total=62)
    assert seconds(cell(tmp_path)) == pytest.approx(7.0)


@pytest.mark.parametrize("step", ["31", None, -3, True, 1e400])
def test_a_state_of_nonsense_costs_all(tmp_path, step):
    finished(cell(tmp_path))
    stopped(cell(tmp_path), step=step, total=62)
    assert seconds(cell(tmp_path)) == pytest.approx(7.0)


def test_a_finished_cell_costs_nothing(tmp_path):
    recipe = cell(tmp_path)
    recipe.cell.directory.mkdir(parents=True)
    recipe.cell.write_result(done(recipe))
    row = price(recipe)
    assert (row["state"], row["left"], row["seconds"]) == ("done", 0, 0.0)
    assert plan._total([row]).startswith("1 done, 0 to run: 0 iterations")


def done(recipe):
    return {
        "schema": 1,
        "status": "done",
        "task": recipe.cell.task,
        "signature": recipe.cell.signature,
        "reported": {"metric": "top1", "rule": "best", "value": 0.5},
        "data": {"n_train": recipe.data.n_train, "n_val": recipe.data.n_val},
    }


def test_a_clock_budget_costs_its_clock_and_its_evaluations(tmp_path):
    clock = ("budget.amount=1min",)
    finished(cell(tmp_path))
    assert seconds(cell(tmp_path, *clock)) == pytest.approx(60 + 2 * 1.5)
    stopped(cell(tmp_path, *clock), step=700, total=None, progress=0.75)
    assert seconds(cell(tmp_path, *clock)) == pytest.approx(15 + 1.5)


def test_a_clock_budgets_evaluations_by_the_epoch_follow_the_throughput(tmp_path):
    """60 s at 496 samples/s are 930 iterations: 15 epochs of 62."""
    words = ("budget.amount=1min", "task.eval_every=1ep")
    assert price(cell(tmp_path, *words))["evaluating"] is None
    finished(cell(tmp_path))
    assert price(cell(tmp_path, *words))["evaluating"] == pytest.approx(15 * 1.5)


@pytest.mark.parametrize("every", ["100%", "50%", "30%", "1%", "7it", "100it", "1ep", "0.7ep"])
@pytest.mark.parametrize("amount", ["1it", "7it", "62it", "150it"])
def test_evaluations_are_those_that_a_run_would_make(tmp_path, every, amount):
    recipe = cell(tmp_path, f"task.eval_every={every}", f"budget.amount={amount}")
    total, over = recipe.total, recipe.period(every, recipe.total)
    due = [over(k, k / total) > over(k - 1, (k - 1) / total) or k == total for k in range(1, total + 1)]
    for step in range(total):
        assert plan._evaluations(recipe, None, plan.Made(step)) == sum(due[step:])


def test_a_result_counts_its_evaluations_and_a_resume_carries_them(toy):
    run = toy(amount="20it", task__eval_every="25%", checkpoint__every="25%")
    run.train(stop_at=12)
    result = run.train()
    rows = [json.loads(line) for line in run.recipe.cell.metrics.read_text().splitlines()]
    assert result["evaluations"] == sum("eval" in row for row in rows) == 4
    assert result["work"] == run.recipe.work and result["resumed"] == 1


# -- what is printed ----------------------------------------------------------------------------------------


def shown(capsys, *words):
    recipes = cli.recipes(cli.expand(words))
    capsys.readouterr()
    plan.show(recipes)
    return " ".join(capsys.readouterr().out.split())


def test_table3_by_task(tmp_path, capsys):
    """Six budgets sum to 1.91 full runs, in two schedules and three seeds (docs/cluster.md: 11.9 million)."""
    out = shown(capsys, *table3(tmp_path))
    for task, iterations in (
        ("imagenet", "5,734,584"),
        ("coco", "1,031,400"),
        ("cityscapes", "1,704,684"),
        ("kinetics", "3,438,000"),
    ):
        assert f"│ {task} │ 36 │ 0 │ {iterations} │" in out
    assert "0 done, 144 to run: 11,908,668 iterations; 144 not priced" in out


def table3(out, *more):
    seeds = ("seed=0,1,2", f"out={out}", "mode=plan", *more)
    return ("task=imagenet,coco,cityscapes,kinetics", "schedule=step,linear", f"budget={SIX}", *seeds)


SIX = "1%,5%,10%,25%,50%,100%"


def test_one_given_throughput_for_several_tasks_is_said(tmp_path, capsys):
    out = shown(capsys, *table3(tmp_path, "plan.samples_per_second=900"))
    # 5,734,584 x 256 + 1,031,400 x 16 + 1,704,684 x 8 + 3,438,000 x 32 samples
    assert "496.36 device-hours of training (at the given 900 samples/s for all 4 tasks)" in out
    assert "evaluation not priced for 144" in out


def test_amounts_that_are_not_iterations_say_of_what_they_are(tmp_path, capsys):
    out = shown(capsys, *WORDS, f"out={tmp_path}", "budget.amount=1e15flop,45min,62it")
    assert out.count("by FLOPs") == 2 and out.count("by the clock") == 2
    assert "3 to run: 62 iterations, 1 by the clock, 1 by FLOPs, 0.75 device-hours" in out
    assert "1 not priced: their iterations are counted" in out and "1 not priced: no throughput known" in out


def test_flops_are_priced_by_those_that_a_probe_counted(tmp_path):
    """5e6 a sample, 32 samples an iteration: 1.6e11 are 1,000 iterations, at 496 samples/s 64.5 s."""
    flops = cell(tmp_path, "budget.amount=1.6e11flop")
    (tmp_path / "probe").mkdir()
    found = {"task": flops.cell.task, "work": flops.work, **RUN, "flop_per_sample": 5e6}
    (tmp_path / "probe" / "x.json").write_text(json.dumps(found))
    row = price(flops)
    assert (row["iterations"], row["unit"]) == (1000, "iterations")
    assert row["training"] == pytest.approx(32_000 / 496)


def test_disk_counts_folders_within_a_run_and_says_whom_it_covers(tmp_path, capsys):
    folder = finished(cell(tmp_path))
    (folder / "upstream").mkdir()
    (folder / "upstream" / "log").write_bytes(bytes(10**7))
    out = shown(capsys, *WORDS, f"out={tmp_path}", "task.size=32,64", "seed=0,1")
    assert "about 0.02 GB on disk for 2 of them" in out and "2 not priced" in out
    assert "│ imagenet_tiny" in out


def test_a_thousand_cells_are_priced_within_three_seconds(tmp_path, capsys):
    finished(cell(tmp_path))
    start = time.process_time()
    out = shown(capsys, *table3(tmp_path, "task.lr=0.1,0.2,0.3,0.4,0.5,0.6,0.7"))
    assert "1008 cells" in out and time.process_time() - start < 3


# -- data that are not here ---------------------------------------------------------------------------------

KINETICS = ("mode=plan", "task=kinetics", "data.root=/nowhere/kinetics")


def elsewhere(out, *words):
    """The recipe as it is where the clips are: a copy of 240,000 of them."""
    cfg = cli.configuration((*KINETICS, f"out={out}", *words))
    data = layouts.Data("kinetics", Path("/x"), 240_000, 19_000, tuple(map(str, range(400))))
    return resolve(cfg, cli.configuration(KINETICS), data)


@pytest.mark.parametrize("words", [(), ("task.lr=0.01",)], ids=["named", "departs"])
def test_a_finished_cell_counts_as_done_where_its_data_are_not_mounted(tmp_path, words):
    there = elsewhere(tmp_path, *words)
    there.cell.directory.mkdir(parents=True)
    there.cell.write_result(done(there))
    here = cli.recipe((*KINETICS, f"out={tmp_path}", *words))
    assert (here.cell.name, here.cell.state) == (there.cell.name, "done")
    other = cli.recipe((*KINETICS, f"out={tmp_path}", "seed=1", *words))
    assert other.cell.state == "missing" and other.work == there.work


def test_a_damaged_result_says_nothing_of_the_data(tmp_path):
    there = elsewhere(tmp_path)
    there.cell.directory.mkdir(parents=True)
    (there.cell.directory / "result.json").write_text(json.dumps({**done(there), "digest": "0" * 64}))
    here = cli.recipe((*KINETICS, f"out={tmp_path}"))
    assert here.data.n_train == 32 and price(here)["epochs"] is None


# -- the probe ----------------------------------------------------------------------------------------------


class Slow(torch.utils.data.Dataset):
    """Forty samples of 32x32 pixels that take 20 ms each."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.zeros(3, 32, 32), index % 10


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """slow(*words) probes imagenet_tiny with such samples, eight a batch: an epoch is five iterations.

    The first step takes half a second more, as on a GPU: meanwhile the loader gets all the batches that it may have.
    """
    one_step = Classification.step

    def step(self, session, batches):
        one_step(self, session, batches)
        time.sleep(0.5 * (session.step == 1))

    monkeypatch.setattr(Classification, "step", step)
    monkeypatch.setattr(Classification, "train_dataset", lambda self: Slow())
    monkeypatch.setattr(Classification, "val_dataset", lambda self: Slow())
    words = ("data.root=/nowhere/imagenet_tiny", "device=cpu", "data.subset=40", "task.batch_size=8")

    def run(*more):
        recipe = cli.recipe((*words, f"out={tmp_path}", "mode=probe", *more))
        return recipe, probe.measure(recipe)

    return run


@pytest.mark.parametrize("workers", [0, 2, 8])
def test_a_probe_finds_how_fast_the_data_come(slow, workers):
    truth = 50.0 * max(1, workers)
    for _ in range(3):  # whatever else the machine does, one of them should see it
        found = slow(f"data.workers={workers}")[1]
        assert 0 < found["data_wait_share"] <= 1
        # Batches that the loader had in hand would make it 1.4 times as fast, each time; a busy machine makes it slow.
        if 0.2 * truth < found["samples_per_second"] < 1.2 * truth:
            return
    raise AssertionError(f"{found['samples_per_second']:.0f} samples/s, not {truth:.0f}")


def test_pieces_of_a_batch_are_not_torn_apart(slow):
    """Six of eight samples and two: a step begins with the first, whatever was thrown away before."""
    found = slow("data.workers=1", "micro_batch=6")[1]
    assert found["samples_per_second"] < 75


def test_a_probe_prices_its_own_work_and_overwrites_no_other(slow, tmp_path):
    named, first = slow("data.workers=2", "plan.evaluate=true")
    other = slow("data.workers=2", "task.crop_scale=[0.3,1.0]")[0]
    files = sorted(p.name for p in (tmp_path / "probe").iterdir())
    assert files == sorted(f"imagenet_tiny-resnet_narrow-fp32-{r.work}.json" for r in (named, other))
    assert (
        first["flop_per_sample"] > 1e6 and first["evaluations"] == 1 and 0.35 < first["eval_seconds"] < 8
    )  # forty samples, two workers
    row = price(cell(tmp_path, "task.batch_size=8", "budget.amount=10it"))
    assert row["training"] == pytest.approx(80 / first["samples_per_second"])
    assert row["evaluating"] == pytest.approx(2 * first["eval_seconds"])
    assert price(cell(tmp_path, "task.batch_size=8", "task.crop_scale=[0.3,1.0]"))["evaluating"] is None


def test_whole_lots_of_batches_are_measured():
    assert [probe.measured(n) for n in (0, 1, 2, 3, 8, 16)] == [15, 15, 20, 15, 40, 80]


def test_work_is_six_digits():
    work = cell("runs").work
    assert len(work) == 6 and int(work, 16) >= 0 and work != signature({})
