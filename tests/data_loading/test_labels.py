# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Labels follow the names of the classes, not their order on the disk."""

import logging
import re

import pytest

from data_loading.labels import Head, class_names, find_positions
from errors import UserError

ABC = Head("it.pth", ["ant", "bee", "cat"], 3)


class Named:
    """A data set with class names."""

    def __init__(self, **names) -> None:
        self.__dict__.update(names)


def test_class_names_are_in_the_order_of_labels():
    assert class_names(Named(class_to_idx={"dog": 1, "cat": 0})) == ["cat", "dog"]
    assert class_names(Named(classes=(7, 3))) == ["7", "3"]
    assert class_names(Named()) is None


@pytest.mark.parametrize(
    ("names", "head", "positions"),
    [
        (["ant", "bee", "cat"], ABC, [0, 1, 2]),
        (["cat", "bee", "ant"], ABC, [2, 1, 0]),  # sorted otherwise
        (["cat"], ABC, [2]),  # others have no images
        (["10", "2", "9"], Head("it.pth", ["10", "2", "9"], 3), [0, 1, 2]),  # by name
        (["10", "2", "9"], Head("it.pth", ["2", "9", "10"], 3), [2, 0, 1]),
        (["0", "2"], ABC, [0, 2]),  # numbers are labels
        (["1", "2", "3"], ABC, [0, 1, 2]),  # one for each class: in their order, from 0 or 1
        (["10", "2", "9"], ABC, [2, 0, 1]),
        (["ant", "bee", "cat"], Head("it.pth", None, 3), [0, 1, 2]),  # without names in order
        (["0", "1", "10", "11", "2"], Head("it.pth", None, 12), [0, 1, 10, 11, 2]),
        (["n01440764", "n15075141"], Head("it.pth", None, 1000), [0, 999]),  # ImageNet's ends
        (["n01443537"], Head("it.pth", None, 1000), [1]),
    ],
)
def test_position_of_each_label_in_the_head(names, head, positions):
    assert find_positions(names, head, "val") == positions


@pytest.mark.parametrize(
    ("names", "head", "message"),
    [
        (
            ["bee", "cat", "zant"],
            ABC,
            "val has 3 classes, it.pth 3, and they differ: only in val: zant; only in it.pth: ant; "
            "rename or restore these class folders",
        ),
        (["3", "4"], ABC, "only in val: 3, 4; only in it.pth: ant, bee, cat"),
        (["0", "00"], ABC, "only in val: 0, 00"),  # the same number twice
        (
            ["ant", "bee"],
            Head("it.pth", None, 3),
            "val has 2 classes, it.pth 3, and it.pth stores no class names by which to match them",
        ),
    ],
)
def test_unknown_classes_are_refused_by_name(names, head, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_positions(names, head, "val")


def test_absent_classes_and_numbers_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        find_positions(["cat"], ABC, "val")
        find_positions(["1"], ABC, "val")
    assert [record.getMessage() for record in caplog.records] == [
        "val has no images of 2 of the 3 classes: ant, bee",
        "val has no images of 2 of the 3 classes: 0, 2",
        "val: the class folders are named by numbers, which are taken for labels of it.pth",
    ]
