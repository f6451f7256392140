"""The classification adapter: weights by name, and data that is read once."""

from types import SimpleNamespace

import numpy as np
import torch

from tasks import classification, cli, layouts


def adapter(root, *words):
    cfg = cli.configuration(("task=cifar10", f"data.root={root}", *words))
    data = SimpleNamespace(root=root, classes=("x",) * 10)
    return classification.Classification(cfg, data, torch.device("cpu"))


def test_weights_from_a_file_without_a_suffix(tmp_path):
    state = classification.build_model("resnet18", 10).state_dict()
    torch.save(state, tmp_path / "weights")
    model = adapter(tmp_path, "task.model=resnet18", f"task.weights={tmp_path / 'weights'}").make_model()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_evaluations_read_the_data_once(tmp_path, monkeypatch):
    """CIFAR-10 has two hundred evaluations."""
    reads = []
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    parts = {"train": (images, labels), "val": (images[:8], labels[:8])}
    monkeypatch.setattr(layouts, "is_cifar10", lambda root: True)
    monkeypatch.setattr(layouts, "cifar10", lambda root: reads.append(root) or parts)
    task = adapter(tmp_path, "task.model=resnet20")
    task.session, task.model = SimpleNamespace(rank=0, world_size=1), task.make_model()
    found = [task.evaluate() for _ in range(3)]
    assert len(reads) == 1 and found[0] == found[2]
