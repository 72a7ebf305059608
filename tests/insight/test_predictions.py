# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Outputs as classes, probabilities and numbers."""

import math

import pytest
import torch

from data_loading.targets import Scale
from insight.predictions import BROKEN, PredictionRecords, best_classes, likely_classes, texts

NAMES = ["ant", "bee", "cat"]


def test_best_classes_are_in_order_with_their_probabilities():
    outputs = torch.tensor([[0.0, math.log(3), math.log(2)]])
    found, chances = best_classes(outputs, "softmax", 3)
    assert found.tolist() == [[1, 2, 0]]
    assert chances[0].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert best_classes(outputs, "sigmoid")[1].item() == pytest.approx(0.75)


def test_of_equal_outputs_the_first_class_is_better():
    """Otherwise the order depends on the device and the batch."""
    outputs = torch.zeros(4, 50)
    assert best_classes(outputs, count=5)[0].tolist() == [[0, 1, 2, 3, 4]] * 4
    assert best_classes(outputs)[0].tolist() == [[0]] * 4


def test_outputs_that_are_not_finite_have_no_class():
    outputs = torch.tensor([[0.0, math.nan], [0.0, math.inf], [0.0, -math.inf]])
    assert best_classes(outputs, count=2)[0].tolist() == [[-1, -1], [-1, -1], [0, 1]]


def record(records: PredictionRecords, outputs: list[float]) -> dict:
    best = records.columns(torch.tensor([outputs]))
    row = records.in_units(best)[0].tolist()
    return records.record("a.png", row, outputs)


def test_record_of_a_class():
    records = PredictionRecords("class", "softmax", 3, NAMES, topk=2)
    assert [*records.fields] == [
        "path", "prediction", "probability", "class_2", "probability_2", "error",
    ]  # fmt: skip
    found = record(records, [0.0, math.log(3), math.log(2)])
    assert [*found] == [*records.fields]
    assert found == {
        "path": "a.png", "prediction": "bee", "probability": 0.5,
        "class_2": "cat", "probability_2": 0.333333, "error": None,
    }  # fmt: skip


def test_there_are_no_more_classes_to_list_than_the_network_has():
    fields = PredictionRecords("class", "softmax", 2, None, topk=5).fields
    assert "class_2" in fields
    assert "class_3" not in fields


def test_record_of_several_classes_has_all_from_the_threshold_on():
    outputs = [math.log(3), -9.0, 0.0]  # 0.75, 0.0001, 0.5
    records = PredictionRecords("multi", "sigmoid", 3, NAMES, topk=1)
    found = record(records, outputs)
    assert (found["prediction"], found["probability"]) == (["ant", "cat"], [0.75, 0.5])
    assert (found["class_1"], found["probability_1"]) == ("ant", 0.75)
    higher = PredictionRecords("multi", "sigmoid", 3, NAMES, topk=1, threshold=0.6)
    assert record(higher, outputs)["prediction"] == ["ant"]
    assert likely_classes(outputs, 0.8) == ([], [])


def test_numbers_are_in_the_units_of_the_data():
    scale = Scale((10.0, 0.0), (2.0, 1.0))
    records = PredictionRecords("number", "identity", 2, ["width", "height"], scale)
    found = record(records, [1.5, -2.0])
    assert (found["prediction_width"], found["prediction_height"]) == (13.0, -2.0)
    assert [*PredictionRecords("number", "identity", 1, ["age"]).fields] == [
        "path",
        "prediction",
        "error",
    ]


@pytest.mark.parametrize("kind", ["class", "multi", "number"])
def test_outputs_that_are_not_finite_are_an_error_of_the_image(kind):
    found = record(PredictionRecords(kind, "softmax", 3, NAMES), [0.0, math.nan, 1.0])
    assert found.pop("error") == BROKEN
    assert found.pop("path") == "a.png"
    assert {*found.values()} == {None}


def test_targets_are_named_as_predictions_are():
    records = PredictionRecords("multi", "sigmoid", 3, NAMES, labeled=True)
    assert records.targets([1, 0, 1], 0.25) == {"target": ["ant", "cat"], "loss": 0.25}
    records = PredictionRecords("number", "identity", 2, ["w", "h"], labeled=True)
    assert records.targets([1.0, 2.5], 1.0) == {"target_w": 1.0, "target_h": 2.5, "loss": 1.0}
    assert [*records.fields][:4] == ["path", "target_w", "target_h", "loss"]


def test_values_that_json_does_not_have_are_none():
    records = PredictionRecords("class", "softmax", 3, NAMES, labeled=True)
    assert records.targets([1], math.nan) == {"target": "bee", "loss": None}


def test_names_that_are_no_text_can_be_written():
    bad = PredictionRecords("class", "softmax", 2).bad("caf\udce9.png", "no image")
    assert bad["path"].encode() == b"caf\\udce9.png"


def test_texts_are_those_of_predictions_csv():
    assert texts([1, 0, 0.123456789], "class", NAMES) == ["bee", "ant", "0.123457"]
    assert texts([1, -1, 0.5], "class", None) == ["1", "", ""]
    assert texts([1, 0, 0, 5], "multi", ["x", "y"]) == ["x", "x|y", "0.5|0.993307"]
    assert texts([1.5, 2.5], "number", ["x"]) == ["1.5", "2.5", ""]
