# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files of results, and the parts that survive a kill."""

import csv
import json
import os

import pytest
import torch

from errors import UserError
from insight.result_files import WRITERS, Parts, Shown, check_place, folder_of

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
    Parts(tmp_path / "s.csv", {})
    with pytest.raises(UserError, match=r"s-classes.csv exists; choose another --output, or"):
        Parts(tmp_path / "s.csv", {}, evaluates=True)


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


def test_table_shows_the_first_records_and_counts_all_errors(capsys):
    shown = Shown(1)
    shown.write(0, LINES, {})
    assert shown.finish(1, FIELDS) == 1
    assert capsys.readouterr().out == (
        "path     names    values    x\na,b.png  ant|bee  0.5|0.25  0.1\n"
    )
