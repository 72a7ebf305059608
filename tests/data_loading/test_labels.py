# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Labels follow the names of the classes, not their order on the disk."""

import logging
import re

import pytest
from timm.data import ImageNetInfo

from data_loading.labels import Head, class_names, find_positions
from data_loading.summary import describe_fractions, describe_similar_classes
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


def test_classes_of_one_name_are_told():
    """Two classes of one name in a data set of the user's own trained as two, without a word."""
    with pytest.raises(UserError, match="called 'crane', with the labels 0 and 2; give each"):
        class_names(Named(classes=("crane", "owl", "crane")))
    names = class_names(Named(classes=[("crane",), ("owl",), ("crane",), ("OWL",)]))
    found = "classes with nearly the same name: crane and crane (2), owl and OWL; if"
    assert describe_similar_classes(names).startswith(found)
    assert not describe_similar_classes(["crane", "owl", "owls", "1", "2"])


def test_column_of_numbers_is_told_to_be_no_classes():
    """Each price in a column became a class of its own, without a word."""
    said = "classes are called 0.5, -1.5e-3, .25 and 1 more; if they are numbers to predict, give"
    assert describe_fractions(["0.5", "-1.5e-3", ".25", "cat", "7.5", "7"]).startswith(said)
    assert not describe_fractions(["1.0", "2.0", "7", "v1.5", "1.2.3", "cat", ""])


def test_names_that_are_not_one_to_one_with_labels():
    """ImageNet's synonyms gave a head with too many classes, its two cranes one with too few."""
    synonyms = {"tench": 0, "Tinca": 0, "shark": 1}
    assert class_names(Named(class_to_idx=synonyms)) == ["tench", "shark"]
    of_torchvision = {"classes": [("crane",), ("owl", "eule"), ("crane",)]}  # as its ImageNet has
    of_torchvision["class_to_idx"] = {"crane": 2, "owl": 1, "eule": 1}
    assert class_names(Named(**of_torchvision)) == ["crane", "owl", "crane (2)"]
    with pytest.raises(UserError, match="class_to_idx has the labels 1, 2; expected 0 to 1"):
        class_names(Named(class_to_idx={"cat": 1, "dog": 2}))


@pytest.mark.parametrize(
    ("names", "head", "positions"),
    [
        (["ant", "bee", "cat"], ABC, [0, 1, 2]),
        (["cat", "bee", "ant"], ABC, [2, 1, 0]),  # sorted otherwise
        (["cat"], ABC, [2]),  # others have no images
        (["10", "2", "9"], Head("it.pth", ["10", "2", "9"], 3), [0, 1, 2]),  # by name
        (["10", "2", "9"], Head("it.pth", ["2", "9", "10"], 3), [2, 0, 1]),
        (["0", "2"], ABC, [0, 2]),  # numbers are labels
        (["ant", "bee", "cat"], Head("it.pth", None, 3), [0, 1, 2]),  # without names in order
        (["0", "1", "10", "11", "2"], Head("it.pth", None, 12), [0, 1, 10, 11, 2]),
        (["n01440764", "n15075141"], Head("it.pth", None, 1000), [0, 999]),  # ImageNet's ends
        (["n01443537"], Head("it.pth", None, 1000), [1]),
        (["n01440764", "n15075141"], Head("it.pth", None, 2), [0, 1]),  # not of all of ImageNet
        (["ant", "bee"], Head("it.pth"), [0, 1]),
    ],
)
def test_position_of_each_label_in_the_head(names, head, positions):
    assert find_positions(names, head, "val") == positions


def test_all_of_imagenet_is_matched_by_name_and_only_with_weights_that_may_be_its():
    names = ImageNetInfo().label_names()
    assert find_positions(names[::-1], Head("it.pth", None, 1000), "val") == [*range(1000)][::-1]
    others = [f"class {number}" for number in range(1000)]
    with pytest.raises(UserError, match="does not know: n01440764"):
        find_positions(names[:1], Head("it.pth", others, 1000), "val")


@pytest.mark.parametrize(
    ("names", "head", "message"),
    [
        (
            ["bee", "cat", "zant"],
            ABC,
            "val has classes that it.pth does not know: zant; val lacks classes of it.pth: ant. "
            "Rename, remove or restore these class folders",
        ),
        (["1", "2", "3"], ABC, "does not know: 1, 2, 3"),  # labels count from 0
        (["1", "2", "3"], Head("it.pth", None, 3), "name the folders by label, from 0 to 2"),
        (["3", "4"], ABC, "does not know: 3, 4; val lacks classes of it.pth: ant, bee, cat"),
        (["0", "00"], ABC, "does not know: 0, 00"),  # the same number twice
        # Names that are numbers are names: 0 is not the first, and 1 is no label.
        (["0", "1"], Head("it.pth", ["1", "2", "3"], 3), "does not know: 0; val lacks"),
        (["10", "20", "40"], Head("it.pth", ["10", "20", "30"], 3), "does not know: 40; val"),
        (
            ["ant", "bee"],
            Head("it.pth", None, 3),
            "val has 2 classes, it.pth 3 without names by which to match them; give data with 3 "
            "class folders, or name the folders by label, from 0 to 2",
        ),
    ],
)
def test_unknown_classes_are_refused_by_name(names, head, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_positions(names, head, "val")


def test_absent_classes_and_other_matches_are_logged(caplog):
    """Without class names labels may be wrong, and nothing was said."""
    with caplog.at_level(logging.INFO):
        find_positions(["cat"], ABC, "val")
        find_positions(["1"], ABC, "val")
        find_positions(["a", "b"], Head("it.pth", None, 2), "val")
        find_positions([f"c{i}" for i in range(9)], Head("it.pth", None, 9), "val")
    text = "val: it.pth stores no such class names, so labels are matched by"
    assert [record.getMessage() for record in caplog.records] == [
        "val has no images of 2 of the 3 classes: ant, bee",
        f"{text} number (1 = 1)",
        "val has no images of 2 of the 3 classes: ant, cat",
        f"{text} position (a = 0, b = 1)",
        f"{text} position (c0 = 0, c1 = 1, c2 = 2, c3 = 3, c4 = 4 and 4 more)",
    ]


def test_tens_of_thousands_of_classes_take_no_time():
    """A list was searched for each name: 10 s for 21,841 of them."""
    names = [f"class {i}" for i in range(200_000)]
    assert find_positions(names[::-1], Head("it.pth", names, len(names)), "val")[:2] == [
        *(199_999, 199_998)
    ]
