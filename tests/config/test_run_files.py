# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Lines of log.txt: where in the run they belong, and damaged ones."""

import math

import pytest

from config.run_files import parse_line, position_of


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "{}", '{"epoch": null}', '{"epoch": true}', '{"epoch": 1e999}',
     '{"epoch": "x"}', '{"epoch": NaN}', '{"epoch": [1]}', '{"epoch": 1, "tr', "[" * 9**5],
)  # fmt: skip
def test_lines_without_an_epoch_have_no_place(text):
    assert position_of(parse_line(text.encode())) == math.inf


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"epoch": 0}, 1),
        ({"after_epochs": 1.5, "step": 3}, 1.5),
        ({"after_epochs": 0.0}, 0),
        ({"epoch": "2", "after_epochs": ""}, 3),  # of metrics.csv
        ({"epoch": "", "after_epochs": "0.1"}, 0.1),
    ],
)
def test_place_of_a_row(row, expected):
    assert position_of(row) == expected
