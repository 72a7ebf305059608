# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Numbers come out in the units of the data: from metrics, hooks, several sets and torch.hub."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import datasets
import hubconf
from config.parser import finetune_parser, parse
from data_loading.labels import Head
from data_loading.targets import Scale, Targets
from engine_finetune import evaluate
from errors import UserError
from models import create_model
from tests import fakes, tiny
from tests.groups import run_script
from training.criterion import build_criterion
from training.eval_sets import build_eval_sets, first_set
from training.evaluation import Metrics, build_metrics
from training.hooks import Reporter
from training.setup import settle_task
from weights.saved_run import SavedRun, inherit_flags, kept_head, read_saved_run

BASE = "--model tests.tiny:classifier --input_size 32 --batch_size 4 --num_workers 0 --device cpu"


@pytest.fixture
def folder(tmp_path):
    """6 images in a table, with a number of 100 to 600 and a part; the same table twice."""
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        row = [f"{number}.png", 100 * (number + 1), ("train", "val")[number % 2]]
        for name in ("t.csv", "v.csv", "w.csv"):
            with (tmp_path / name).open("a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([["image", "x", "part"]] * (number == 0) + [row])
    return tmp_path


def flags(words: str):
    return parse(finetune_parser(), f"{BASE} {words}".split())


def test_one_table_as_two_sets_has_equal_values(folder):
    """The second was measured on numbers of the data times their std: 7e5 in place of 297."""
    args = flags(
        f"--data_path {folder / 't.csv'} --task regression --label_column x --eval_data_path "
        f"a={folder / 'v.csv'},b={folder / 'w.csv'}"
    )
    train, val, outputs = datasets.build_datasets(first_set(args))
    metrics = build_metrics(args, outputs, "number", train.targets.scale)
    sets = build_eval_sets(args, val, train.head("train"), torch.device("cpu"), metrics)
    model = tiny.classifier(num_classes=1).eval()
    criterion = build_criterion(settle_task(args, "number"), 1, "cpu", train, "number")
    how = torch.device("cpu"), "none", criterion, metrics
    one, two = (evaluate(each.loader, model, *how) for each in sets)
    assert one == two
    assert 100 < one["rmse"] < 300  # std of 100 to 600: 171


def test_hooks_see_outputs_and_targets_of_an_evaluation_in_units_of_the_data():
    """--hook predictions wrote 0.5 for a width of 12 m."""
    counter = fakes.Counter()
    reporter = Reporter.quiet(torch.device("cpu"))
    reporter.observers = {"counter": counter}
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([[0.5], [-1.0]])
    model = tiny.classifier(num_classes=1).eval()
    metrics = Metrics(["mae"], None, 1, "number", Scale((10.0,), (4.0,)))
    batches = [(images, targets, torch.arange(2))]
    criterion = build_criterion(
        settle_task(flags("--data_path t.csv"), "number"), 1, "cpu", kind="number"
    )
    found = evaluate(batches, model, torch.device("cpu"), "none", criterion, metrics, reporter)
    (batch,) = counter.batches
    assert batch.targets.tolist() == [[12.0], [6.0]]
    expected = model(images).detach().double() * 4 + 10
    torch.testing.assert_close(batch.outputs, expected)
    assert found["mae"] == pytest.approx((batch.outputs - batch.targets).abs().mean().item())


def test_training_accuracy_is_of_classes_alone(monkeypatch):
    """log.txt had null, and metrics.csv nan, in every line of a regression."""
    import engine_finetune

    class Asked(Exception):
        pass

    def begin_epoch(names: list, batches: object, stepper: object) -> None:
        raise Asked(*names)

    monkeypatch.setattr(engine_finetune, "training_mode", lambda model: None)
    reporter = SimpleNamespace(begin_epoch=begin_epoch)
    for kind, more in (("class", ("class_acc",)), ("multi", ()), ("number", ())):
        loop = SimpleNamespace(stepper=None, state=None, freezer=None, reporter=reporter, kind=kind)
        with pytest.raises(Asked) as caught:
            engine_finetune.train_one_epoch(tiny.classifier(), None, [], loop)
        assert caught.value.args == ("loss", "grad_norm", *more)


# --- some of the classes, other tables ----------------------------------------------------------


def test_classes_of_the_data_alone_need_classes_and_one_set(folder, capsys):
    """The first set got other numbers of its classes, and a regression other outputs."""
    args = flags(f"--data_path {folder / 't.csv'} --eval_data_path {folder / 'v.csv'}")
    args = args.replace(label_column=("x",))
    head = Head("it.pth", ["x"], 1, "number", Scale((1.0,), (2.0,)))
    data, _ = datasets.build_dataset(False, args, head)
    with pytest.raises(UserError, match="--eval_classes data: the data has numbers and no classes"):
        data.keep_own_classes()
    words = "--data_path t.csv --eval --resume it.pth --eval_classes data"
    with pytest.raises(SystemExit):
        flags(f"{words} --eval_data_path a=v.csv,b=w.csv")
    assert "--eval_classes data is for one evaluation set; give them" in capsys.readouterr().err
    assert flags(f"{words} --eval_data_path v.csv").eval_classes == "data"


def test_another_table_is_evaluated_as_a_whole_and_errors_name_the_checkpoint(folder):
    """--split_column of the run took half of the rows of other.csv, or refused it."""
    table, other = folder / "t.csv", folder / "v.csv"
    stored = {"task": "regression", "label_column": ["x"], "split_column": "part"}
    stored |= {"image_column": "image", "data_path": str(table)}
    saved = read_saved_run({"args": stored, "classes": ["x"]}, "it.pth")
    same = inherit_flags(flags(f"--data_path {table} --eval --resume it.pth"), saved)
    assert len(datasets.build_dataset(False, same, saved.head)[0]) == 3
    words = f"--data_path {table} --eval_data_path {other} --eval --resume it.pth"
    args = inherit_flags(flags(words), saved)
    assert (args.split_column, args.label_column) == (None, ("x",))
    assert len(datasets.build_dataset(False, args, saved.head)[0]) == 6
    other.write_text(other.read_text().replace("image,x", "image,width"))
    with pytest.raises(UserError, match="--label_column: .*--label_column is taken from it.pth"):
        datasets.build_dataset(False, args, saved.head)


# --- torch.hub ------------------------------------------------------------------------------------


def test_torch_hub_gives_numbers_of_the_data(tmp_path):
    torch.manual_seed(0)
    source = create_model("convnextv2_atto", num_classes=1)
    content = {"model": source.state_dict(), "args": {"task": "regression"}, "classes": ["x"]}
    content |= {"target_scale": {"mean": [100.0], "std": [7.0]}}
    torch.save(content, tmp_path / "it.pth")
    images = torch.rand(2, 3, 32, 32)
    model = hubconf.convnextv2_atto(checkpoint=tmp_path / "it.pth")
    torch.testing.assert_close(model(images), source(images) * 7 + 100)
    new = hubconf.convnextv2_atto(checkpoint=tmp_path / "it.pth", num_classes=3)
    assert new(images).abs().max() < 50  # a new head has no units
    features = hubconf.convnextv2_atto(checkpoint=tmp_path / "it.pth", num_classes=0)
    assert torch.equal(features(images), source.forward_head(source.forward_features(images), True))


# --- numbers as they are --------------------------------------------------------------------------


def test_a_kept_head_keeps_its_units_or_the_flag_is_refused(folder):
    """--finetune --normalize_targets false trained on normalized numbers."""
    words = f"--data_path {folder / 't.csv'} --task regression --label_column x --split_column part"
    args = flags(f"{words} --normalize_targets false --finetune it.pth")
    head = Head("it.pth", ["x"], 1, "number", Scale((1.0,), (2.0,)))
    with pytest.raises(UserError, match="it.pth was trained with true and its head is kept; drop"):
        datasets.build_datasets(args, head)
    saved = SavedRun("it.pth", {"head": "mlp(8)"}, head)
    for more in ("--head mlp(8) --reset_head true", "", "--heads a=linear@norm"):
        new = flags(f"{words} --finetune it.pth {more}")
        assert kept_head(new, saved) is None
        train, val, _ = datasets.build_datasets(new, None)
        assert train.targets.scale == val.targets.scale == Scale((300.0,), (train_std(),))
        assert not head.fits(train.targets)  # so weights of a head of the same shape are left out
    assert kept_head(flags(f"{words} --head mlp(8)"), saved) is head
    assert kept_head(flags(words), replace(saved, flags={"head": "linear"})) is head
    assert kept_head(flags(words), saved, resumes=True) is head


def test_a_head_fits_targets_of_its_kind_in_its_units():
    numbers, names = Head("it.pth", None, 3, "number"), Head("it.pth", None, 3, "class")
    assert numbers.fits(Targets("number", 3))
    assert not numbers.fits(Targets("number", 3, scale=Scale((0.0,) * 3, (2.0,) * 3)))
    assert not numbers.fits(Targets("class", 3))
    assert not names.fits(Targets("number", 3))
    assert names.fits(Targets("multi", 3))
    assert Head("weights", None, 3).fits(Targets("class", 3))


def train_std() -> float:
    return (80000 / 3) ** 0.5  # of 100, 300, 500


def test_numbers_without_names_are_those_of_a_head_of_as_many():
    """Its weights were kept, and its units were not."""
    args = flags("--data_set tests.test_units:nameless --task regression")
    for count in (1, 2):
        head = Head("it.pth", None, count, "number", Scale((7.0,) * count, (2.0,) * count))
        train, outputs = datasets.build_dataset(True, args, head)
        assert outputs == 2
        assert head.fits(train.targets) == (count == 2) == (train.targets.scale == head.scale)


def test_named_numbers_keep_a_head_of_as_many_without_names(folder):
    """Its kind and units were lost, and a new head trained on numbers as they are."""
    words = f"--data_path {folder / 't.csv'} --task regression --label_column x --split_column part"
    head = Head("it.pth", None, 1, "number", Scale((7.0,), (2.0,)))
    for resumes in (False, True):
        train, _ = datasets.build_dataset(True, flags(words), head, resumes)
        assert (train.targets.scale, head.fits(train.targets)) == (head.scale, True)
    raw = Head("it.pth", ["x"], 1, "number")
    with pytest.raises(UserError, match="--normalize_targets true, but it.pth was trained with fa"):
        datasets.build_dataset(True, flags(f"{words} --normalize_targets true"), raw)
    assert datasets.build_dataset(True, flags(words), raw)[0].targets.scale is None


@pytest.mark.slow
def test_a_run_without_names_of_outputs_is_evaluated_by_its_checkpoint(tmp_path):
    """--eval built 1000 outputs for it."""
    one = {"ranks": 1, "folder": tmp_path}
    words = f"{BASE} --data_set tests.test_units:nameless --model timm:test_resnet --epochs 1"
    run_script("main_finetune.py", *words.split(), "--output_dir", tmp_path, **one)
    output = run_script("main_finetune.py", "--config", tmp_path / "args.yaml", "--eval", **one)
    assert "rmse" in output
    assert torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["outputs"] == 2


def nameless(data_path: str, train: bool) -> "Nameless":
    return Nameless(8)


class Nameless(tiny.Colors):
    """Two numbers for each image, without names."""

    kind, classes = "number", None
    targets = [(float(index), -1.0) for index in range(8)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, tuple[float, float]]:
        return super().__getitem__(index)[0], self.targets[index]


def test_classes_have_no_units(capsys):
    for words in ("--data_set DIGITS", "--data_path t.csv --task multi_label"):
        with pytest.raises(SystemExit):
            flags(f"{words} --normalize_targets false")
        assert "--normalize_targets false is for numbers, not for --task" in capsys.readouterr().err
    args = flags("--data_path t.csv --normalize_targets false")
    assert settle_task(args, "number").task == "regression"
    with pytest.raises(UserError, match="--normalize_targets false is for numbers, and the data"):
        settle_task(args, "class")
