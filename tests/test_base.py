"""What the adapters share: the model as it is evaluated, and a cell's way through its states."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from schedulefree import SGDScheduleFree
from torch import nn

from budgeted.budgets import Epoch
from budgeted.data import Batches, loader
from tasks import base, cli
from tasks.base import evaluation_weights
from tasks.classification import Classification


class Points(torch.utils.data.Dataset):
    """24 points of three features, whose means differ from batch to batch."""

    def __init__(self):
        self.x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 5.0]) + 3

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.x[index], 0


def trained(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    optimizer = optimizer(model.parameters(), lr=0.1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(Points().x).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, SGDScheduleFree])
def test_statistics_are_those_of_all_batches_at_the_weights_that_are_evaluated(kind, micro):
    """Var[x] = E[x^2] - E[x]^2 over the 24 points, not the mean of the batches' variances, which is smaller."""
    model, optimizer = trained(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = loader(Points(), 0, Batches(Epoch(24, 6), 0, 4, micro=micro))
    with evaluation_weights(model, optimizer, batches, lambda batch: batch[0], nullcontext()):
        averaged = not torch.equal(model[0].weight, before["0.weight"])
        assert averaged == (kind is SGDScheduleFree)
        y = Points().x @ model[0].weight.detach().T
        assert model[1].running_mean == pytest.approx(y.mean(0), rel=1e-4)
        assert model[1].running_var == pytest.approx(y.var(0, correction=0), rel=1e-4)
    assert all(torch.allclose(v, before[k], rtol=1e-6) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, SGDScheduleFree])
def test_buffers_are_put_back_in_place_even_after_an_error(kind):
    """The session, which judges them and undoes a skipped update, holds the tensors themselves."""
    model, optimizer = trained(kind)
    held, before = dict(model.named_buffers()), {k: v.clone() for k, v in model.named_buffers()}
    batches = loader(Points(), 0, Batches(Epoch(24, 6), 0, 4))
    with pytest.raises(OSError), evaluation_weights(model, optimizer, batches, lambda batch: batch[0], nullcontext()):
        raise OSError
    assert all(v is held[k] and torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert model[1].momentum == 0.1


def test_a_model_without_batch_norm_reads_no_batches():
    model = nn.Linear(3, 3)
    with evaluation_weights(model, torch.optim.SGD(model.parameters()), None, None, nullcontext()):
        pass


def test_a_cell_is_running_from_the_moment_that_it_is_tried_again(tmp_path, monkeypatch):
    """Importing an upstream and reading the data may take a minute, in which it has not failed."""
    recipe = cli.recipe(("budget.amount=1it", f"out={tmp_path}"))
    recipe.cell.directory.mkdir(parents=True)
    recipe.cell.write_state("failed", 7, 10, "out of memory")
    seen = []

    def build(self, session):
        seen.append((recipe.cell.state, json.loads((recipe.cell.directory / "state.json").read_text())))
        raise RuntimeError("again")

    cli.embedded_data(recipe.cfg)
    monkeypatch.setattr(Classification, "build", build)
    with pytest.raises(RuntimeError):
        base.train(recipe)
    ((state, record),) = seen
    assert (state, record["step"], record["total"], record["error"]) == ("running", 7, 10, None)
    assert recipe.cell.state == "failed"


def test_an_interrupt_ahead_of_the_first_step_is_called_so():
    assert base.one_line(KeyboardInterrupt()) == "interrupted before it could save"
