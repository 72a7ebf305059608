# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files of results, and the parts that survive a kill."""

import csv
import json
import os

import pytest
import torch

from errors import UserError
from insight import result_files
from insight.result_files import WRITERS, Parts, Shown, check_place, folder_of
from utils import write_atomically

FIELDS = {"path": str, "names": list[str], "values": list[float], "x": float, "error": str}
RECORDS = [
    {"path": "a,b.png", "names": ["ant", "bee"], "values": [0.5, 0.25], "x": 0.1, "error": None},
    {"path": 'c"d.png', "names": None, "values": None, "x": None, "error": "no\nimage"},
]

LINES = [json.dumps(record) for record in RECORDS]


def finished(out, records=RECORDS):
    parts = Parts(out, {"a": 1})
    parts.begin()
    for number, record in enumerate(records):
        parts.write(number, [json.dumps(record)], {})
    bad = parts.finish(len(records), FIELDS)
    parts.remove()
    return bad


def test_formats_hold_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    for suffix in WRITERS:
        assert finished(tmp_path / f"r{suffix}") == 1
    assert finished(tmp_path / "more.csv", [*RECORDS, RECORDS[0]]) == 1  # those with an error
    assert json.loads((tmp_path / "r.json").read_text()) == RECORDS
    assert [*map(json.loads, (tmp_path / "r.jsonl").open())] == RECORDS
    assert pyarrow.read_table(tmp_path / "r.parquet").to_pylist() == RECORDS
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [[*row.values()] for row in rows] == [
        ["a,b.png", "ant|bee", "0.5|0.25", "0.1", ""],
        ['c"d.png', "", "", "", "no\nimage"],
    ]


def test_files_without_records_are_valid(tmp_path):
    for suffix in WRITERS:
        finished(tmp_path / f"r{suffix}", [])
    assert json.loads((tmp_path / "r.json").read_text()) == []
    assert (tmp_path / "r.csv").read_text() == "path,names,values,x,error\n"


def test_parts_are_kept_for_the_same_plan_alone(tmp_path):
    out = tmp_path / "r.csv"
    parts = Parts(out, {"topk": 5, "size": (32, 32)})
    assert parts.begin() == {"parts": 0}
    parts.write(0, LINES, {"sum": torch.tensor([1.5])})
    parts = Parts(out, {"topk": 5, "size": (32, 32)})
    state = parts.begin()
    assert (state["parts"], state["sum"].tolist()) == (1, [1.5])
    with pytest.raises(UserError, match=r"other arguments: topk 5 \(now 3\); give the same"):
        Parts(out, {"topk": 3, "size": (32, 32)})
    parts = Parts(out, {"topk": 3, "size": (32, 32)}, overwrite=True)
    assert parts.begin() == {"parts": 0}
    assert sorted(os.listdir(folder_of(out))) == ["plan.json"]


def test_a_part_without_its_state_is_not_finished(tmp_path):
    """A program may be killed between the two writes: the sums lack this part."""
    parts = Parts(tmp_path / "r.csv", {})
    parts.begin()
    parts.write(0, LINES, {"sum": 1})
    (parts.folder / "00000001.jsonl").write_text("{}")
    again = Parts(tmp_path / "r.csv", {})
    assert again.begin()["parts"] == 1


class Killed(BaseException):
    """As by SIGKILL."""


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_part_counts_once_all_of_it_is_written(writes, tmp_path, monkeypatch):
    """A kill would lose records that the state says are there."""
    parts, left, real = Parts(tmp_path / "r.csv", {}), iter(range(writes)), write_atomically
    parts.begin()

    def write(content, path):
        if next(left, None) is None:
            raise Killed
        real(content, path)

    monkeypatch.setattr(result_files, "write_atomically", write)
    with pytest.raises(Killed):
        parts.write(0, LINES, {}, torch.ones(2))
    assert Parts(tmp_path / "r.csv", {}).begin()["parts"] == 0


def test_a_file_is_whole_or_absent(tmp_path):
    out = tmp_path / "r.csv"
    parts = Parts(out, {})
    parts.begin()
    parts.write(0, LINES, {})
    with pytest.raises(UserError, match="the same command continues"):
        parts.finish(2, FIELDS)  # the second part is lost
    assert not out.exists()


def test_rows_of_parts_are_in_order(tmp_path):
    parts = Parts(tmp_path / "r.csv", {})
    parts.begin()
    for number in range(3):
        parts.write(number, [], {}, torch.tensor([number]))
    assert torch.cat(parts.rows(2)).tolist() == [0, 1]


def test_an_existing_file_is_not_replaced_unasked(tmp_path):
    out = tmp_path / "r.csv"
    finished(out)
    with pytest.raises(UserError, match=r"r.csv exists; choose another --output, or"):
        Parts(out, {"a": 1})
    Parts(out, {"a": 1}, overwrite=True)
    (tmp_path / "s-classes.csv").write_text("precious")
    with pytest.raises(UserError, match=r"s-classes.csv exists; choose another --output, or"):
        Parts(tmp_path / "s.csv", {})
    parts = Parts(out, {"a": 2}, overwrite=True)  # killed between the file and the end
    parts.begin()
    assert Parts(out, {"a": 2}).continues


def test_places_that_cannot_be_written_are_refused_at_the_start(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a folder; give the name of a file in it"):
        check_place(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another place"):
        check_place(tmp_path / "file" / "r.csv")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="the folder is not writable for you"):
        check_place(tmp_path / "r.csv")


def test_a_full_disk_is_an_error_that_says_how_to_continue(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "r.csv", {})
    parts.begin()

    def full(content, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("insight.result_files.write_atomically", full)
    with pytest.raises(UserError, match="No space left.*the same command continues"):
        parts.write(0, LINES, {})


def test_table_ends_after_its_last_record_also_in_later_parts(capsys):
    shown = Shown(3)
    for part in range(3):
        shown.write(part, LINES, {})
    assert shown.finish(3, FIELDS) == 3
    assert len(capsys.readouterr().out.replace("no\nimage", "").splitlines()) == 1 + 3


def test_table_shows_the_first_records_and_counts_all_errors(capsys):
    shown = Shown(1)
    shown.write(0, LINES, {})
    assert shown.finish(1, FIELDS) == 1
    assert capsys.readouterr().out == (
        "path     names    values    x\na,b.png  ant|bee  0.5|0.25  0.1\n"
    )
