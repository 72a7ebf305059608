# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Results of predict.py by hand: what belongs to which image and class, also after two kills."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import predict
from errors import UserError
from tests.test_predict import CLASSES, killed_at, results, run, save_checkpoint, write_images
from training import prediction_eval


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A checkpoint and 7 images in class folders, in the current folder."""
    save_checkpoint(tmp_path / "it.pth")
    write_images(tmp_path, [f"labeled/{CLASSES[n % 3]}/{n}.png" for n in range(7)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: str) -> list[dict[str, str]]:
    return [*csv.DictReader(Path(path).read_text().splitlines())]


def test_reasons_belong_to_their_images():
    """Two of a batch, each with its own."""
    write_images(Path("x"), ["0.png", "3.png"])
    Path("x/1.png").write_bytes(b"no image")
    Image.new("RGB", (1, 1)).save("x/2.png")
    found = [row["error"] for row in results("it.pth x", Path("r.json"))]
    assert "not an image" in found[1]
    assert "single pixel" in found[2]
    assert found[0] is found[3] is None


def test_outputs_hold_no_graph(monkeypatch):
    """The activations of all images of a part would stay in memory."""
    seen, real = [], predict.PredictionRecords.columns

    def columns(self, outputs):
        seen.append(outputs.requires_grad)
        return real(self, outputs)

    monkeypatch.setattr(predict.PredictionRecords, "columns", columns)
    run("it.pth labeled --labels false")
    assert seen == [False, False]


# --- evaluation -----------------------------------------------------------------------------------


def test_all_labeled_images_are_evaluated_without_a_file(monkeypatch):
    """The table shows the first ones alone."""
    monkeypatch.setattr(predict, "SHOWN", 3)
    assert any(line.endswith(" on 7 images") for line in run("it.pth labeled"))


def test_labels_are_found_by_their_names():
    """The checkpoint has its classes in another order than the folders."""
    save_checkpoint(Path("it.pth"), names=CLASSES[::-1])
    rows = results("it.pth labeled", Path("r.json"))
    assert [row["target"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    right = sum(row["target"] == row["prediction"] for row in rows)
    assert json.loads(Path("r-metrics.json").read_text())["acc1"] == pytest.approx(100 * right / 7)


def test_classes_without_names_are_called_as_the_labels_are():
    save_checkpoint(Path("it.pth"), names=None)
    rows = results("it.pth labeled --labels true", Path("r.json"))
    assert {row["prediction"] for row in rows} <= {*CLASSES}
    assert [row["class"] for row in table("r-classes.csv")] == CLASSES


def test_tables_next_to_the_results_are_those_of_the_rows(monkeypatch):
    """With a loss whose probabilities are sigmoids."""
    names = ["bee", "ant", "cat"]
    save_checkpoint(Path("it.pth"), names=names, args={"loss": "bce"})
    drawn, real = [], prediction_eval.draw_rows
    monkeypatch.setattr(prediction_eval, "draw_rows", lambda *w: drawn.append(w[0]) or real(*w))
    rows = results("it.pth labeled", Path("r.json"))
    classes = table("r-classes.csv")
    assert [int(row["images"]) for row in classes] == [2, 3, 2]
    for name, found in zip(names, classes, strict=True):
        right = [row["prediction"] == name for row in rows if row["target"] == name]
        assert float(found["accuracy"]) == pytest.approx(100 * sum(right) / len(right))
    bins = [row for row in table("r-calibration.csv") if int(row["images"])]
    sure = sum(int(row["images"]) * float(row["confidence"]) for row in bins)
    assert sure == pytest.approx(100 * sum(row["probability"] for row in rows), rel=1e-4)
    losses = sorted((row["loss"] for row in rows), reverse=True)
    assert drawn[0][:, 0].tolist() == pytest.approx(losses, rel=1e-4)  # the worst first


def test_batches_are_evaluated_in_their_order():
    """Several processes would give sums that differ in their last bits from those of one."""
    job, seen = object.__new__(predict.PredictionJob), []
    job.size, job.widths = 2, [1] * 6
    job.evaluation = SimpleNamespace(add=lambda ids, *rest: seen.append(ids.tolist()))
    job.evaluate(torch.tensor([[4.0], [2.0], [3.0], [0.0], [1.0]]).expand(5, 6))
    assert seen == [[0, 1], [2, 3], [4]]


def test_metrics_that_are_not_defined_are_null():
    """R squared of one image is 0 / 0, and NaN is no JSON."""
    task = {"task": "regression", "loss": "l2"}
    save_checkpoint(Path("a.pth"), outputs=1, names=["w"], args=task)
    Path("a.csv").write_text("image,w\nlabeled/ant/0.png,2.5\n")
    (row,) = results("a.pth a.csv --label_column w", Path("r.json"))
    text = Path("r-metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["r2"] is None
    assert json.loads(text)["mae"] == pytest.approx(abs(row["prediction"] - 2.5), rel=1e-4)


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "changed"),
    [("", "weights"), (" --tta hflip", "tta"), (" --num_worst 2", "num_worst")],
)
def test_what_changes_the_results_does_not_continue(more, changed, monkeypatch):
    monkeypatch.setattr(predict, "PART", 4)
    words = "it.pth labeled --output r.csv"
    killed_at(1, words)
    if changed == "weights":  # another training wrote the same file
        held = torch.load("it.pth", weights_only=True)
        held["model"]["head.weight"].mul_(2)
        torch.save(held, "it.pth")
    with pytest.raises(UserError, match=f"other arguments: {changed} "):
        run(words + more)


def test_metrics_of_all_outputs_are_the_same_after_two_kills(place, monkeypatch):
    """The outputs of parts before the first one were stored with a later part again."""
    monkeypatch.setattr(predict, "PART", 4)
    save_checkpoint(Path("a.pth"), args={"task": "multi_label", "loss": "bce"})
    paths = sorted(Path("labeled").rglob("*.png")) * 2
    rows = [f"{path.absolute()},{'|'.join(CLASSES[: n % 4])}" for n, path in enumerate(paths)]
    Path("a.csv").write_text("\n".join(["image,tags", *rows]))
    words = "a.pth a.csv --label_column tags --output"
    run(f"{words} whole.json")
    for part in (1, 2):
        killed_at(part, f"{words} killed.json")
    run(f"{words} killed.json")
    for name in (".json", "-metrics.json"):
        assert Path(f"killed{name}").read_bytes() == Path(f"whole{name}").read_bytes()
