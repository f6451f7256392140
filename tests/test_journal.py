"""metrics.jsonl: whole lines, none lost, none twice."""

from __future__ import annotations

import errno
import json
import resource

import pytest

from budgeted.journal import Journal


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path, n):
    """A log of n rows and where it stood after each."""
    journal = Journal(path)
    marks = [journal.mark()]
    for k in range(n):
        journal.write({"step": k, "loss": 1 / (k + 1)})
        marks.append(journal.mark())
    journal.close()
    return marks


def test_rows_come_back_in_order_and_what_is_no_number_as_null(tmp_path):
    journal = Journal(tmp_path / "m")
    journal.write({"step": 0, "loss": float("nan")})
    assert rows(tmp_path / "m") == [{"step": 0, "loss": None}]  # without closing: a kill loses nothing
    journal.write({"step": 1, "é": [float("inf"), 0.1]})
    assert rows(tmp_path / "m")[1] == {"step": 1, "é": [None, 0.1]}


@pytest.mark.parametrize("k", [0, 1, 5, 8])
def test_it_goes_on_exactly_at_a_mark(tmp_path, k, said):
    whole = (tmp_path / "a", tmp_path / "b")
    marks = written(whole[0], 8)
    written(whole[1], 8)
    with open(whole[0], "ab") as file:
        file.write(b'{"step": 7, "eval": {}}\n{"step": 8, "lo')
    again = Journal(whole[0], marks[k], step=k, evaluated=k)
    assert again.mark() == marks[k]
    for j in range(k, 8):
        again.write({"step": j, "loss": 1 / (j + 1)})
    assert whole[0].read_bytes() == whole[1].read_bytes() and again.mark() == marks[8] and not said


def test_without_a_mark_it_starts_over(tmp_path):
    written(tmp_path / "m", 3)
    Journal(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b""


@pytest.mark.parametrize(
    "damage,kept",
    [
        (lambda raw: raw.replace(b'"step": 3', b'"step": "3"'), [0, 1, 2, 4, 5]),
        (lambda raw: raw.replace(b'"step": 3', b'"step": -3'), [0, 1, 2, 4, 5]),
        (lambda raw: raw.replace(b'{"step": 3', b'["step", 3'), [0, 1, 2, 4, 5]),
        (lambda raw: raw[:100], [0, 1, 2]),
        (lambda raw: b"\xff" + raw, [1, 2, 3, 4, 5]),
        (lambda raw: raw[:40] + b"\0" * 20 + raw[60:], [0, 3, 4, 5]),
        (lambda raw: raw.replace(b"0.5", b"0.7"), [0, 1, 2, 3, 4, 5]),
        (lambda raw: b"[" * 100_000 + b"\n" + raw, [0, 1, 2, 3, 4, 5]),
        (lambda raw: b"{}\n" + raw + raw, [0, 1, 2, 3, 4, 5]),
        (lambda raw: b"", []),
    ],
    ids=["text", "negative", "a list", "cut", "not text", "zeros", "a digit", "deep", "doubled", "empty"],
)
def test_a_damaged_one_keeps_its_whole_lines_and_says_so(tmp_path, damage, kept, said):
    path = tmp_path / "m"
    marks = written(path, 8)
    path.write_bytes(damage(path.read_bytes()))
    journal = Journal(path, marks[6], step=6, evaluated=6)
    assert [row["step"] for row in rows(path)] == kept
    assert len(said) == 1 and f"{len(kept)} lines" in said[0]
    journal.write({"step": 6})
    assert rows(path)[-1] == {"step": 6} and path.read_bytes().endswith(b"\n")


def test_an_evaluation_that_will_be_made_again_is_left_out(tmp_path, said):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 1, "eval": {}}\n{"step": 2}\n{"step": 2, "eval": {}}\n')
    Journal(tmp_path / "m", {"bytes": 5, "sha256": "other"}, step=3, evaluated=2)
    assert rows(tmp_path / "m") == [{"step": 1}, {"step": 1, "eval": {}}, {"step": 2}] and len(said) == 1


def test_a_line_without_room_leaves_nothing_and_can_be_written_later(tmp_path):
    marks = written(tmp_path / "m", 4)
    journal = Journal(tmp_path / "m", marks[4], step=4, evaluated=4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (marks[4]["bytes"] + 10, before[1]))
    try:
        with pytest.raises(OSError) as error:
            journal.write({"step": 4, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert [row["step"] for row in rows(tmp_path / "m")] == [0, 1, 2, 3] and journal.mark() == marks[4]
    journal.write({"step": 4, "loss": 0.25})
    assert [row["step"] for row in rows(tmp_path / "m")] == [0, 1, 2, 3, 4]
