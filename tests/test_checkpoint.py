"""Checkpoints: there is always one that loads, and what loads is what was written."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgeted import checkpoint
from budgeted.checkpoint import BrokenCheckpoint, load, previous, save, tensors_sha256


def content(k=0):
    return {
        "step": k,
        "loss": math.inf,
        "name": "é\n",
        "none": None,
        "flags": [True, False, 1, 1.0],
        "pair": (1, "a"),
        "empty": {},
        "nested": {"a": [{"b": torch.full((3, 2), float(k))}], 7: "seven"},
        "types": {
            "bf16": torch.tensor([1.5, -2], dtype=torch.bfloat16),
            "long": torch.arange(5),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(3.0),
            "nothing": torch.zeros(0, 4),
            "strided": torch.arange(12.0).reshape(3, 4).t(),
        },
    }


def same(a, b):
    """Equal in value, type and structure."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def is_content(found, k=0):
    return same({key: v for key, v in found.items() if key != "schema"}, content(k))


def test_a_path_may_be_a_word(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"step": 3})
    assert checkpoint.load(str(tmp_path / "checkpoint.pt")) == {"step": 3}


def test_round_trip(tmp_path):
    save(tmp_path / "c.pt", content())
    assert is_content(load(tmp_path / "c.pt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt"]


def test_a_save_that_was_killed_before_its_last_rename_leaves_nothing_behind_the_next(tmp_path):
    """Then the newest and the one before are one file, and rename(2) of one name of a file to another does nothing."""
    path = tmp_path / "c.pt"
    save(path, content(0))
    os.link(path, previous(path))
    save(path, content(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.prev.pt", "c.pt"]
    assert is_content(load(path), 1) and is_content(load(previous(path)), 0)


def test_loads_without_running_code(tmp_path):
    save(tmp_path / "c.pt", content())
    assert json.loads(torch.load(tmp_path / "c.pt", weights_only=True)["text"])["d"][0] == ["step", 0]


def test_none_is_not_an_error(tmp_path):
    assert load(tmp_path / "c.pt") is None


def test_the_one_before_is_kept(tmp_path):
    for k in range(3):
        save(tmp_path / "c.pt", content(k))
    assert is_content(load(tmp_path / "c.pt"), 2)
    assert is_content(checkpoint._read(previous(tmp_path / "c.pt")), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.prev.pt", "c.pt"]


@pytest.mark.parametrize("damage", [b"", b"PK", b"not a checkpoint" * 50, None])
def test_a_broken_one_gives_way_to_the_one_before_with_a_warning(tmp_path, damage, said):
    path = tmp_path / "c.pt"
    save(path, content(1))
    save(path, content(2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    assert is_content(load(path), 1)
    assert len(said) == 1 and "c.pt is broken" in said[0] and "\n" not in said[0]
    # The next save must not put the broken one in the place of the good one.
    save(path, content(3))
    path.unlink()
    assert is_content(load(path), 1)


def test_the_one_before_alone_is_enough(tmp_path):
    save(tmp_path / "c.pt", content(1))
    save(tmp_path / "c.pt", content(2))
    (tmp_path / "c.pt").unlink()
    assert is_content(load(tmp_path / "c.pt"), 1)


def test_no_whole_one_is_an_error_that_says_where(tmp_path):
    save(tmp_path / "c.pt", content(1))
    save(tmp_path / "c.pt", content(2))
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(BrokenCheckpoint, match=rf"{tmp_path}.*c.pt, c.prev.pt") as error:
        load(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_hostile_pickle_is_not_executed(tmp_path, form):
    evil = {"schema": checkpoint.SCHEMA, "digest": "", "text": Evil(tmp_path / "ran")}
    if form == "zip":
        torch.save(evil, tmp_path / "c.pt")
    else:
        (tmp_path / "c.pt").write_bytes(pickle.dumps(evil))
    with pytest.raises(BrokenCheckpoint):
        load(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(2), {"step": 1}, {"schema": 99, "digest": ""}, None])
def test_another_kind_of_file_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "c.pt")
    with pytest.raises(BrokenCheckpoint):
        load(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 1}, {"step": 0.0}, {"step": False}, {"empty": []}, {"empty": None}, {"flags": [True, False, 1]},
        {"flags": [1, False, 1, 1.0]}, {"pair": [1, "a"]}, {"pair": (1, "b")}, {"none": 0}, {"loss": -math.inf},
        {"nested": {"a": [{"b": torch.full((2, 3), 0.0)}], 7: "seven"}}, {"nested": {"a": [{"b": torch.zeros(3, 2)}], "7": "seven"}},
        {"nested": {"a": [{"b": torch.zeros(3, 2, dtype=torch.float64)}], 7: "seven"}}, {"more": {}},
    ],
)  # fmt: skip
def test_the_digest_tells_any_change(tmp_path, changed, said):
    other = checkpoint.pack({**content(), **changed}).written()
    whole = {**other, "digest": checkpoint.pack(content()).written()["digest"]}
    torch.save(whole, tmp_path / "c.pt")
    with pytest.raises(BrokenCheckpoint, match="c.pt broken"):
        load(tmp_path / "c.pt")
    assert "its digest does not match its content" in said[0]


def test_weights_digest_is_over_names_types_shapes_and_bytes():
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    digest = tensors_sha256(tensors.items())
    assert digest == tensors_sha256(reversed(tensors.items())) and len(digest) == 64
    assert digest == tensors_sha256({"a": torch.arange(8.0)[::2] / 2, "b": torch.zeros(2)}.items())
    for other in (
        {**tensors, "b": torch.zeros(3)},
        {**tensors, "b": torch.zeros(2, 1)},
        {**tensors, "b": torch.zeros(2, dtype=torch.int32)},
        {**tensors, "b": torch.tensor([0.0, -0.0])},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ):
        assert digest != tensors_sha256(other.items())


# -- damage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoint 2 and, before it, checkpoint 1; and the newer one's bytes."""
    folder = tmp_path_factory.mktemp("two")
    save(folder / "c.pt", content(1))
    save(folder / "c.pt", content(2))
    return folder, (folder / "c.pt").read_bytes()


def damaged(two, data):
    folder, _ = two
    shutil.rmtree(folder / "x", ignore_errors=True)
    (folder / "x").mkdir()
    shutil.copy(folder / "c.prev.pt", folder / "x")
    (folder / "x" / "c.pt").write_bytes(data)
    return load(folder / "x" / "c.pt")


@given(st.data())
def test_flipped_bits_are_noticed_or_harmless(two, data):
    raw = bytearray(two[1])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = damaged(two, bytes(raw))
    assert is_content(found, 2) or is_content(found, 1)


@given(st.data())
def test_a_truncated_or_overwritten_file_is_noticed_or_harmless(two, data):
    raw = two[1]
    cut = data.draw(st.integers(0, len(raw) - 1))
    tail = data.draw(st.sampled_from([b"", b"\0" * (len(raw) - cut), b"\xa5" * 64, raw[:cut]]))
    found = damaged(two, raw[:cut] + tail)
    assert is_content(found, 1) or is_content(found, 2)


def test_a_digit_changed_inside_the_archive_is_noticed(two, tmp_path, said):
    """The archive is whole, its content is not what was saved: torch.load does not see it."""
    (tmp_path / "c.pt").write_bytes(two[1].replace(b"\x00\x00\x00\x40", b"\x00\x00\x40\x40", 1))
    torch.load(tmp_path / "c.pt", weights_only=True)
    with pytest.raises(BrokenCheckpoint, match="c.pt broken"):
        load(tmp_path / "c.pt")
    assert "its digest does not match its content" in said[0]


# -- interrupted writes -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_last_one_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save(path, content(1))

    def full(value, handle):
        handle.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(torch, "save", full)
        save(path, content(2))
    assert is_content(load(path), 1) and [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    save(path, content(3))
    assert is_content(load(path), 3)


def _saves(path: Path) -> None:
    big = {"weights": torch.ones(300_000)}
    for k in range(10_000):
        save(path, {**big, "step": k})


def killed_while_saving(path: Path, instants: int) -> list[int]:
    steps = []
    for seed in range(instants):
        child = multiprocessing.get_context("fork").Process(target=_saves, args=(path,))
        child.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = load(path)
        assert found is not None and found["weights"].sum() == 300_000
        steps.append(found["step"])
    return steps


def test_a_kill_at_any_instant_leaves_one_that_loads(tmp_path, said):
    killed_while_saving(tmp_path / "c.pt", 8)
    assert not said  # none of them was broken either


@pytest.mark.slow
def test_fifty_kills_leave_one_that_loads(tmp_path):
    assert max(killed_while_saving(tmp_path / "c.pt", 50)) > 0


# -- hostile run directories --------------------------------------------------------------------------------


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, overwritten, emptied, doubled or replaced by other JSON."""
    kind = rng.choice(["cut", "flip", "flip", "fill", "swap", "json", "digit", "digit"])
    if kind == "cut":
        return raw[: rng.randrange(len(raw))]
    changed = bytearray(raw)
    at = rng.randrange(len(raw))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 4, 64])):
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "fill":
        changed[at : at + rng.randrange(1, 200)] = rng.randbytes(rng.randrange(200))
    elif kind == "swap":
        other = rng.randrange(len(raw))
        changed[at : at + 20], changed[other : other + 20] = changed[other : other + 20], changed[at : at + 20]
    elif kind == "digit":
        digits = [k for k, byte in enumerate(raw) if chr(byte).isdigit()]
        changed[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:
        words = [
            b"null",
            b"[]",
            b"{}",
            b"1e999",
            b'{"step": [1]}',
            b'{"state": "done"}',
            b"[" * 5000,
            b'{"step": -1}\n',
            b"",
        ]
        return rng.choice(words)
    return bytes(changed)


@pytest.mark.slow
def test_a_thousand_hostile_files_never_make_a_wrong_result(toy, tmp_path, monkeypatch):
    """Each mutation either is an error, or the run goes on from an earlier state and ends as if nothing had been."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a thousand runs wait for the disk otherwise
    monkeypatch.setattr("budgeted.code.git_state", dict)
    changes = {"amount": "8it", "checkpoint__every": "25%"}
    whole = toy(out=tmp_path / "whole", **changes).train()
    interrupted = toy(out=tmp_path / "part", **changes)
    interrupted.train(stop_at=5)
    part, done = interrupted.recipe.cell.directory, toy(out=tmp_path / "whole", **changes).recipe.cell
    kept = {path.name: path.read_bytes() for path in part.iterdir()}
    assert {"checkpoint.pt", "checkpoint.prev.pt", "metrics.jsonl", "state.json"} <= set(kept)
    result = (done.directory / "result.json").read_bytes()
    endings = {"error": 0, "done": 0}
    for seed in range(1000):
        rng = random.Random(seed)
        shutil.rmtree(tmp_path / "part")
        run = toy(out=tmp_path / "part", **changes)
        part.mkdir(parents=True)
        for name, raw in kept.items():
            (part / name).write_bytes(raw)
        if rng.random() < 0.4:
            (part / "result.json").write_bytes(mutated(result, rng))
            found = run.recipe.cell.result()
            assert found is None or same({k: v for k, v in found.items()}, done.result())
        for name in rng.sample(sorted(kept), rng.choice([1, 1, 2])):
            (part / name).write_bytes(mutated(kept[name], rng))
        (part / "config.yaml").write_bytes(rng.randbytes(50))
        assert run.recipe.cell.state in ("missing", "partial", "failed", "done")
        if run.recipe.cell.state == "done":
            continue
        try:
            ended = run.train()
        except BrokenCheckpoint as error:
            assert "checkpoint" in str(error) and "\n" not in str(error)
            endings["error"] += 1
            continue
        assert [ended[k] for k in ("weights_sha256", "metrics", "reported", "iterations_done", "samples_seen")] == [
            whole[k] for k in ("weights_sha256", "metrics", "reported", "iterations_done", "samples_seen")
        ]
        endings["done"] += 1
    assert min(endings.values()) > 0


# -- in the background ----------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_stays_as_it_was():
    original = content()
    model = torch.nn.BatchNorm1d(2)
    kept, state = checkpoint.pack(original), checkpoint.pack(model.state_dict())
    original["nested"]["a"][0]["b"].add_(1)
    original["flags"].append(0)
    original["new"] = 1
    with torch.no_grad():
        model.weight.zero_()
    kept, state = checkpoint.unpack(kept), checkpoint.unpack(state)
    assert same(kept, content()) and kept["types"]["strided"].stride() == (1, 4)
    assert state["weight"].tolist() == [1, 1] and state._metadata == model.state_dict()._metadata


def test_a_copy_is_made_in_the_room_of_the_last_where_it_fits():
    first = checkpoint.pack(content(1))
    again = checkpoint.pack(content(2), first.tensors)
    assert again.tensors.data_ptr() == first.tensors.data_ptr() and is_content(checkpoint.unpack(again), 2)
    other = checkpoint.pack({"a": torch.ones(3)}, first.tensors)
    assert checkpoint.unpack(other)["a"].tolist() == [1, 1, 1] and is_content(checkpoint.unpack(again), 2)


def test_strides_are_kept_where_no_elements_share_memory():
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [image, image[:, 1:], torch.arange(3.0).expand(2, 3), torch.zeros(0, 4).t(), torch.rand(3, 1).t()]
    for a, b in zip(tensors, checkpoint.unpack(checkpoint.pack(tensors)), strict=True):
        assert torch.equal(a, b)
    for shape in ((2, 3, 4, 5), (4, 2, 1, 1), (2, 1, 5, 5), (1, 1, 1, 1)):
        image = torch.rand(shape).to(memory_format=torch.channels_last)
        assert checkpoint.unpack(checkpoint.pack(image)).stride() == image.stride()


@pytest.mark.parametrize(
    "text", ["null", "5", "[]", '{"l": []}', '{"d": [["a", {"t": ["float32", [3], [1000000000], 12]}]]}',
             '{"d": [["a", {"t": ["float32", [1], [1], -4]}]]}', '{"d": [["a", {"t": ["float32", [9], [1], 36]}]]}',
             '{"d": [["a", {"t": ["load", [3], [1], 12]}]]}'],
)  # fmt: skip
def test_a_text_that_was_never_packed_gives_way_to_the_one_before(tmp_path, text):
    save(tmp_path / "c.pt", content(1))
    save(tmp_path / "c.pt", content(2))
    save(tmp_path / "c.pt", checkpoint.Packed(json.loads(text), torch.zeros(12, dtype=torch.uint8)))
    assert is_content(load(tmp_path / "c.pt"), 2)


def test_what_is_no_content_is_refused():
    with pytest.raises(TypeError):
        checkpoint.pack({"a": {1, 2}})
    with pytest.raises(TypeError):
        checkpoint.pack({(1, 2): 3})


def test_background_work_is_done_one_at_a_time_and_its_error_is_raised_once():
    background, done, go = checkpoint.Background(), [], threading.Event()
    background.start(lambda: (go.wait(10), done.append(1)))
    background.check()
    assert done == []
    go.set()
    background.start(lambda: (done.append(2), 1 / 0))
    background.join()
    assert done == [1, 2]
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: done.append(3))
    background.start(lambda: done.append(4))
    background.wait()
    background.wait()
    assert done == [1, 2, 4]
