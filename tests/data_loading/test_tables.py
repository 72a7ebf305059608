# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tables of images: how files, columns, splits and labels are read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from data_loading.sources import DatasetSpec, open_images
from data_loading.split import split
from data_loading.tables import Columns, choose_columns, read_table
from errors import UserError


@pytest.fixture
def make(tmp_path):
    """Write a table and its images; returns the data set of a part of it."""
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def make(
        text, train=True, name="t.csv", kind=None, eval_text=None, labeled=True,
        skip_missing=False, **columns,
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        other = None
        if eval_text is not None:
            other = str(tmp_path / "other.csv")
            (tmp_path / "other.csv").write_text(eval_text)
        columns = Columns(**columns)
        path = str(tmp_path / name)
        spec = DatasetSpec(
            path, other, kind=kind, columns=columns, labeled=labeled, skip_missing=skip_missing
        )
        return open_images("table", spec, train)

    return make


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image,label\n0.png,b\n1.png,a\n"),
        ("t.csv", "\ufeffimage;label\r\n0.png;b\r\n\r\n1.png;a\r\n"),  # of Excel in Europe
        ("t.csv", "0.png,b\n1.png,a\n"),  # without names of columns
        ("t.tsv", "label\tPath\nb\t0.png\na\t1.png\n"),
        ("t.txt", "0.png b\n1.png   a"),
        ("t.txt", "0.png\tb\n1.png\ta"),
        ("t.csv", 'image,label\n0.png,"b"\n"1.png",  a \n'),
    ],
)
def test_formats(make, name, text):
    """A table of another program would train on shifted or unstripped labels."""
    data = make(text, name=name)
    assert ([*data.names], data.classes, data.targets.tolist()) == (
        ["0.png", "1.png"],
        ["a", "b"],
        [1, 0],
    )
    assert data[1][1] == 0
    assert data[1][0].getpixel((0, 0)) == (1, 0, 0)
    assert data.kind == "class"


def test_numbers_as_names_are_in_their_order(make):
    """As text, 10 comes before 2, which would shift labels of a head without names."""
    data = make("0.png,10\n1.png,2\n2.png,2\n")
    assert (data.classes, data.targets.tolist()) == (["2", "10"], [1, 0, 0])


def test_several_classes_in_a_cell(make):
    data = make("image,tags\n0.png,b|a\n1.png,\n2.png, c | a |\n")
    assert data.kind == "multi"
    assert data.classes == ["a", "b", "c"]
    assert data.targets.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("labels", [["c_*"], ["c_a", "c_b"], ["*"]])
def test_a_column_for_each_class(make, labels):
    text = "image,c_a,c_b,split\n0.png,1,0,train\n1.png,-1,true,train\n2.png,0,1,val\n"
    data = make(text, labels=labels)
    assert data.kind == "multi"
    assert data.classes == ["c_a", "c_b"]
    assert data.targets.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("True", "False"), ("YES", "no")])
def test_yes_or_no_column_is_one_label_if_several_are_asked_for(make, yes, no):
    """Of True and False, as pandas writes them, there were two labels that excluded each other."""
    text = f"image,cat\n0.png,{yes}\n1.png,{no}\n"
    data = make(text, kind="multi")
    assert (data.classes, data.targets.tolist()) == (["cat"], [[1], [0]])
    assert make(text).classes == sorted([yes, no])  # two classes


def test_numbers(make):
    data = make("image,x,y\n0.png,1.5,-2\n1.png,2e3,0\n", kind="number", labels=["y", "x"])
    assert (data.kind, data.classes) == ("number", ["y", "x"])
    assert data.targets.tolist() == [[-2, 1.5], [0, 2000]]


SPLIT = "image,label,split\n0.png,a,train\n1.png,b,VAL\n2.png,c,test\n3.png,b,train\n"


def test_split_column(make):
    """Test rows must not be trained on, nor join the validation."""
    assert [*make(SPLIT).names] == ["0.png", "3.png"]
    assert make(SPLIT).own_split == "column split"
    assert [*make(SPLIT, train=False).names] == ["1.png"]
    assert [*make(SPLIT.replace("VAL", "train"), train=False).names] == ["2.png"]
    both = {"train": False, "eval_text": SPLIT}
    assert len(make("0.png,a", **both)) == 4  # a table of its own
    assert [*make("0.png,a", split="split", **both).names] == ["1.png"]
    renamed = SPLIT.replace("split", "fold")
    with pytest.raises(UserError, match="has the columns image, label, fold|no column of splits"):
        make(renamed, train=False)
    assert [*make(renamed, train=False, split="fold").names] == ["1.png"]


def test_given_columns_and_root(make, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "deep" / "7.png")
    text = "id,where,kind,share\n7,7.png,x,0.5\n7,7.png,y,2\n"
    given = {"image": "where", "labels": ["kind"], "weight": "share", "root": f"{tmp_path}/deep"}
    data = make(text, **given)
    assert data.weights.tolist() == [0.5, 2]  # the same image twice is no mistake
    assert data.samples[1] == (f"{tmp_path}/deep/7.png", 1)


def test_pretraining_needs_no_labels(make):
    data = make("image,a,b\n0.png,,\n", labeled=False)
    assert data[0][1] is None


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("", {}, "the table is empty"),
        ("image,label\n", {}, "t.csv: the table has column names and no rows; add one for"),
        ("image,tags\n0.png,\n1.png, \n", {"kind": "multi"}, "all cells of tags are empty, so"),
        ("image,a,b\n0.png,1,2\n", {}, "has the columns image, a, b; name those of the labels"),
        ("image,label\n0.png,a\n1.png\n", {}, "t.csv, line 3: 1 cell, expected 2"),
        ("image,label\n0.png,a\n1.png,\n2.png, \n", {}, "lines 3, 4: label is empty, expected the"),
        ("image,label\n0.png,a\n,b\n", {}, "line 3: image is empty"),
        ("image,image\n0.png,a\n", {}, "two columns have the same name"),
        ("image,x\n0.png,a\n", {"kind": "number"}, "line 2: x is 'a', expected a number"),
        ("image,x\n0.png,nan\n", {"kind": "number"}, "line 2: x is 'nan'"),
        ("image,a,b\n0.png,1,2\n", {"labels": ["a", "b"]}, "line 2: b is '2', expected 0 or 1"),
        ("image,a,b\n0.png,1,1\n", {"labels": "ab", "kind": "class"}, "has one column; use"),
        (
            "image,label\n0.png,a\n", {"labels": ["lable"]},
            "t.csv 'lable'. Did you mean 'label'? Known: image, label.",
        ),
        ("image,label\n0.png,a\n", {"image": "imag"}, "--image_column: unknown column of"),
        ("image,label,w\n0.png,a,-1\n", {"weight": "w"}, "w is '-1', expected a number of"),
        ("image,label,split\n0.png,a,train\n0.png,a,x\n", {}, "line 3: split is 'x', expected"),
        ("image,label,split\n0.png,a,val\n", {}, "no row of split is train"),
        ("image,label\n8.png,a\n9.png,a\n", {}, "no image file of column image exists (line 2: "),
        ('image,label\n"0.png,a\n', {}, "cannot read the table"),
    ],
)  # fmt: skip
def test_refusals(make, text, given, said):
    with pytest.raises(UserError) as caught:
        make(text, **given)
    assert said in str(caught.value)


def test_missing_image_names_its_line(make, caplog):
    text = "image,label\n0.png,a\n9.png,a\n"
    with pytest.raises(UserError, match="1 of 2 image files do not exist: line 3: .*9.png; corr"):
        make(text)
    data = make(text, skip_missing=True)
    assert "1 of 2 image files do not exist: line 3: " in caplog.text
    with pytest.raises(UserError) as caught:
        data[1]
    assert "correct line 3 of " in caught.value.remedy


def test_rows_of_an_image_stay_in_one_part(make):
    """A copy of a training image would make the evaluation look too good."""
    rows = [f"{number % 40}.png,{'ab'[number % 2]}" for number in range(80)]
    data = make("\n".join(rows), skip_missing=True)
    parts = [split(data, 0.3, train) for train in (True, False)]
    files = [{data.names[index] for index in part.indices} for part in parts]
    assert not files[0] & files[1]
    assert [len(part) % 2 for part in parts] == [0, 0]
    assert len(parts[0]) + len(parts[1]) == 80
    assert np.bincount([data.targets[index] for index in parts[1].indices]).min() > 0


def test_an_image_of_several_rows_is_held_out_with_all_of_them(make):
    """One of its rows was held out to represent its class, and the others were trained on."""
    rows = "0.png,a\n1.png,a\n0.png,a\n1.png,a\n2.png,b\n2.png,b\n"
    data = make("image,label\n" + rows)
    for fraction in (0.01, 0.99):
        train, val = (split(data, fraction, part) for part in (True, False))
        files = [{data.names[i] for i in part.indices} for part in (train, val)]
        assert not files[0] & files[1]
        assert len(files[1] - {"2.png"}) == 1  # of class a
        assert "2.png" in files[0]  # the only one of class b
        assert len(train) + len(val) == len(data)


def test_an_image_of_two_classes_stays_in_one_part(make):
    data = make("image,label\n0.png,a\n1.png,a\n0.png,b\n1.png,b\n2.png,b\n")
    for fraction in (0.01, 0.5, 0.9):
        train, val = (split(data, fraction, part) for part in (True, False))
        files = [{data.names[i] for i in part.indices} for part in (train, val)]
        assert not files[0] & files[1]
        assert "2.png" in files[0]  # 0 and 1 count as images of a, their first class


def test_usual_names(tmp_path):
    (tmp_path / "t.csv").write_text("id,Filename,Class,Split\n1,0.png,a,train\n")
    columns = choose_columns(read_table(tmp_path / "t.csv"), Columns(), labeled=True)
    assert (columns.image, columns.labels, columns.split) == ("Filename", ["Class"], "Split")
