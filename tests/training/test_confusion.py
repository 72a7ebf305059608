# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tables of classes, and confusion.csv."""

from pathlib import Path

import pytest

from errors import UserError
from training.confusion import describe, report_classes, write_confusion

MATRIX = [[8, 2, 0], [0, 0, 0], [1, 3, 4]]
NAMES = ["ant", "bee", "water, still"]


def test_table_has_the_worst_classes_first_and_leaves_out_those_without_images():
    assert describe({"confusion": MATRIX}, NAMES) == [
        "class         accuracy  images",
        "water, still     50.00       8",
        "ant              80.00      10",
        "most confused: water, still as bee (3), ant as bee (2), water, still as ant (1)",
    ]
    assert describe({"class_accuracy": [80.0, None, 50.0]}) == [
        "class  accuracy",
        "2         50.00",
        "0         80.00",
    ]
    assert describe({"acc1": 5.0}) == []
    assert describe({"confusion": [[1, 0], [0, 0]]})[-1] == "0        100.00       1"


def test_table_has_a_column_for_each_metric_of_classes():
    stats = {"f1": 5.0, "f1_per_class": [70.0, 12.5], "class_accuracy": [60.0, 80.0]}
    assert describe(stats | {"auroc_per_class": [None, 9.0]}, NAMES[:2]) == [
        "class  accuracy     f1  auroc",
        "ant       60.00  70.00      -",
        "bee       80.00  12.50   9.00",
    ]


def test_table_of_many_classes_is_short():
    matrix = [[int(i != j or i > 25) for j in range(30)] for i in range(30)]
    lines = describe({"confusion": matrix})
    assert len(lines) == 22
    assert lines[0] == "class  accuracy  images  (the worst 20 of 30 classes)"
    assert lines[-1].count("(1)") == 5


def test_file_has_names_and_a_column_for_images_without_an_answer(tmp_path):
    write_confusion([[8, 2, 0, 1], [0, 0, 0, 0], [1, 3, 4, 0]], NAMES, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == (
        'true class,ant,bee,"water, still",no prediction\n'
        "ant,8,2,0,1\nbee,0,0,0,0\n"
        '"water, still",1,3,4,0\n'
    )
    write_confusion([[1, 0], [0, 2]], ["caf\udce9", "b"], tmp_path / "b.csv")  # of a Latin-1 folder
    assert (tmp_path / "b.csv").read_text().startswith("true class,caf\\udce9,b\n")


def test_evaluation_writes_into_the_folder_that_is_named(tmp_path):
    folder = tmp_path / "new"
    report_classes({"confusion": MATRIX}, None, str(folder), of_ema=True)
    assert [path.name for path in folder.iterdir()] == ["confusion-ema.csv"]
    report_classes({"confusion": MATRIX}, None, "", of_ema=False)
    Path(tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/confusion.csv"):
        report_classes({"confusion": MATRIX}, None, str(tmp_path / "file"), of_ema=False)
