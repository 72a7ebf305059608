# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tasks end to end: multi-label and regression from tables and own data sets, sampling, classes."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import export
import main_finetune
from config.parser import export_parser, finetune_parser, parse
from data_loading.dataset import TransformedDataset, collate
from data_loading.labels import Head, order_of_head
from data_loading.mixing import build_mixup
from data_loading.samplers import TrainSampler, balance
from data_loading.targets import Scale
from errors import UserError
from models.convnextv2 import convnextv2_atto
from tests import fakes, tiny
from tests.groups import run_script
from training.criterion import build_criterion
from training.evaluation import Metrics
from training.report import SPEED
from training.resume import compare_args
from training.setup import check_task
from weights import export_formats

BASE = (
    "--model tests.tiny:classifier --input_size 16 --stem_stride 1 --batch_size 8 --lr 0.01 "
    "--num_workers 0 --device cpu --epochs 2 --log_dir none --aa none --reprob 0 --hflip 0 "
    "--scale 0.9 1 --warmup_epochs 0 --kernels torch"
)
KINDS = {"multi": ("multi_label", "map"), "number": ("regression", "rmse")}


@pytest.fixture
def rows(tmp_path):
    """40 images in a table, whose red is `x`, and whose green and blue are labels."""
    lines = [["image", "tags", "x", "y", "color", "split", "weight"]]
    for number in range(40):
        red, green, blue = 6 * number, 200 * (number % 2), 200 * (number % 3 == 0)
        Image.new("RGB", (16, 16), (red, green, blue)).save(tmp_path / f"{number}.png")
        tags = "|".join(tag for tag, value in (("green", green), ("blue", blue)) if value)
        color = "green" if green else "other"
        part = "val" if number % 5 == 0 else "train"
        lines.append([f"{number}.png", tags, 10 + number, -number, color, part, number % 2])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return tmp_path


def run(words: str) -> list[str]:
    """Run main_finetune.py in this process; returns its log lines."""
    with fakes.logged() as messages:
        main_finetune.main(parse(finetune_parser(), f"{BASE} {words}".split()))
    return messages


def last_of(folder: Path) -> dict:
    """The last line of log.txt, without what differs between two equal runs."""
    line = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if name not in SPEED}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kind", "classes"),
    [
        ("", "multi", ["blue", "green"]),
        ("--task regression --label_column x y", "number", ["x", "y"]),
    ],
)
def test_table_end_to_end(rows, words, kind, classes):
    """Training, log.txt, best checkpoint, EMA, resume and evaluation of another table."""
    run_words = f"--data_path {rows / 't.csv'} {words} --output_dir {rows / 'run'} --clip_grad 1"
    whole = f"{run_words} --model_ema --model_ema_eval --model_ema_decay 0.5"
    task, best = KINDS[kind]
    lines = run(whole)
    assert any(line.startswith(f"task {task}: --loss ") for line in lines)
    stats = last_of(rows / "run")
    assert {f"test_{best}", f"test_{best}_ema", "train_loss"} <= stats.keys()
    saved = torch.load(rows / "run" / "checkpoint-best.pth", weights_only=True)
    assert (saved["classes"], saved["args"]["task"]) == (classes, task)
    assert saved["state"]["best_metric"] == best
    assert saved["state"]["lower_is_better"] is (kind == "number")
    (rows / "run" / "checkpoint-1.pth").unlink()
    (rows / "run" / "checkpoint-best.pth").unlink()
    assert any("resumed from" in line for line in run(f"{whole} --auto_resume true"))
    assert last_of(rows / "run") == stats  # exactly
    lines = run(f"--eval --resume {rows / 'run' / 'checkpoint-1.pth'} --data_path {rows / 't.csv'}")
    value = f"{best} {stats[f'test_{best}']:.4g}"
    assert any(value in line and "on 8 images" in line for line in lines)


def test_regression_is_trained_on_normalized_targets_and_measured_in_units(rows):
    """Targets of 10 to 49: the mean of the training part is undone for the metrics."""
    words = f"--data_path {rows / 't.csv'} --task regression --label_column x"
    args = parse(finetune_parser(), f"{BASE} {words}".split())
    train, val, outputs = datasets.build_datasets(args)
    values = np.array([10 + number for number in range(40) if number % 5])
    assert outputs == 1
    assert train.targets.scale.mean == pytest.approx((values.mean(),))
    assert train.targets.scale.std == pytest.approx((values.std(),))
    assert train[0, 0][1].tolist() == pytest.approx([(11 - values.mean()) / values.std()])
    assert val[0, 0][1].tolist() == pytest.approx([(10 - values.mean()) / values.std()])
    metrics = Metrics(["mae", "rmse"], None, 1, "number", train.targets.scale)
    metrics.reset("cpu")
    zeros, targets = torch.zeros(8, 1), torch.stack([val[0, i][1] for i in range(8)])
    metrics.update(*metrics.in_units(zeros, targets), torch.zeros(8))
    metrics.reduce()
    errors = np.array([10 + 5 * number for number in range(8)]) - values.mean()
    assert metrics.values()["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-6)
    assert metrics.values()["rmse"] == pytest.approx((errors**2).mean() ** 0.5, rel=1e-6)
    plain, _, _ = datasets.build_datasets(args.replace(normalize_targets=False))
    assert plain[0, 0][1].tolist() == [11]


def test_an_exported_regression_gives_numbers_of_the_data(rows):
    """Another library knows nothing of mean and std."""
    torch.manual_seed(0)
    model = convnextv2_atto(num_classes=2, head_init_scale=100.0).eval()
    scale = {"mean": [5.0, -100.0], "std": [2.0, 50.0]}
    flags = {"task": "regression", "model": "convnextv2_atto"}
    content = {"model": model.state_dict(), "args": flags, "classes": ["x", "y"]}
    torch.save(content | {"target_scale": scale}, rows / "it.pth")
    args = export_parser().parse_args([str(rows / "it.pth"), "--to", "safetensors"])
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images) * torch.tensor([2.0, 50.0]) + torch.tensor([5.0, -100.0])
        found = export_formats.Network(export.build_spec(args))(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    content["target_scale"] = {"mean": [1.0]}
    torch.save(content, rows / "it.pth")
    with pytest.raises(UserError, match="target_scale is .*, expected lists of mean and std"):
        export.build_spec(args)


def test_resumed_and_finetuned_heads_keep_their_units(rows):
    """Other data has another mean; a head that is kept would be off by the difference."""
    words = f"--data_path {rows / 't.csv'} --task regression --label_column x y"
    args = parse(finetune_parser(), f"{BASE} {words}".split())
    head = Head("it.pth", ["y", "x"], 2, "number", Scale((1.0, 2.0), (10.0, 20.0)))
    for resumes in (True, False):
        train, val, _ = datasets.build_datasets(args, head, resumes)
        assert train.targets.scale == val.targets.scale == head.scale
        assert train.classes == ["y", "x"]
        assert train[0, 0][1].tolist() == pytest.approx([(-1 - 1) / 10, (11 - 2) / 20])
    other = Head("it.pth", ["x", "y"], 2, "multi")
    train, _, _ = datasets.build_datasets(args, other)
    assert train.targets.scale != other.scale
    with pytest.raises(UserError, match="is for --task regression, and it.pth for multi_label"):
        datasets.build_datasets(args, other, resumes=True)
    with pytest.raises(UserError, match="lacks classes of it.pth: z. Rename, remove or restore th"):
        datasets.build_dataset(False, args, Head("it.pth", ["x", "y", "z"], 3, "number"))
    one = args.replace(label_column=("x",))
    val, _ = datasets.build_dataset(False, one, Head("it.pth", ["width"], 1, "number"))
    assert val[0, 0][1].tolist() == [10]


def test_classes_of_an_evaluation_are_found_by_name(rows):
    """A tag that the training does not know is an error with its line; absent ones are 0."""
    text = (rows / "t.csv").read_text()
    (rows / "few.csv").write_text("image,tags\n0.png,green\n1.png,\n")
    (rows / "more.csv").write_text("image,tags\n0.png,green\n1.png,red|blue\n")
    words = f"--data_path {rows / 't.csv'} --eval_data_path {rows / 'few.csv'}"
    args = parse(finetune_parser(), f"{BASE} {words}".split())
    train, val, outputs = datasets.build_datasets(args)
    assert (train.kind, val.kind, outputs, train.classes) == (
        "multi",
        "multi",
        2,
        ["blue", "green"],
    )
    assert [val[0, index][1].tolist() for index in range(2)] == [[0, 1], [0, 0]]
    args = args.replace(eval_data_path=str(rows / "more.csv"))
    with pytest.raises(
        UserError, match=r"that train does not know: red \(line 3\); correct the ta"
    ):
        datasets.build_datasets(args)
    (rows / "one.csv").write_text(text.replace("green", "other"))
    args = args.replace(data_path=str(rows / "one.csv"), label_column=("color",))
    with pytest.raises(UserError, match="all rows are of one class, 'other'.*--task multi_label"):
        datasets.build_dataset(True, args)


def test_labels_that_mix_numbers_and_names_are_asked_about(rows):
    """A `7,5` or a `cat` among numbers became a class of its own, without a word."""
    text = (rows / "t.csv").read_text()
    (rows / "mixed.csv").write_text(text.replace(",other,train", ",7.5,train", 1))
    words = f"--data_path {rows / 'mixed.csv'} --label_column color"
    args = parse(finetune_parser(), f"{BASE} {words}".split())
    said = r"mixed.csv: color mixes numbers, 7.5 \(line \d+\), and names, green .*, other .*; corr"
    with pytest.raises(UserError, match=said):
        datasets.build_dataset(True, args)
    data, count = datasets.build_dataset(True, args.replace(task="classification"))
    assert (count, data.classes) == (3, ["7.5", "green", "other"])


def test_evaluation_needs_no_weights_and_takes_them_for_no_label(rows):
    """A table without the weights of the training was refused; one with them got a label more."""
    row = "{number}.png,{label},0\n"
    text = "".join(row.format(number=number, label=number % 2) for number in range(8))
    weighted = text.replace("\n", ",2\n")
    (rows / "train.csv").write_text("image,odd,never,w\n" + weighted)
    (rows / "plain.csv").write_text("image,odd,never\n" + text)
    words = f"{BASE} --label_column * --data_path {rows / 'train.csv'}"
    sampled = f"{words} --sampling weighted --weight_column w"
    for flags in (sampled, f"{sampled} --eval", f"{words} --weight_column w --eval"):
        for more in ("plain.csv", "train.csv"):
            given = [*flags.split(), "--resume", "it.pth", "--eval_data_path", str(rows / more)]
            data, _ = datasets.build_dataset(False, parse(finetune_parser(), given))
            assert (data.classes, data.dataset.weights) == (["odd", "never"], None)
    part = f"{sampled} --val_split 0.5".replace("train.csv", "plain.csv").split()
    data, _ = datasets.build_dataset(False, parse(finetune_parser(), part))
    assert data.classes == ["odd", "never"]
    with pytest.raises(UserError, match="--weight_column: unknown column of .*plain.csv 'w'"):
        datasets.build_dataset(True, parse(finetune_parser(), part))


class Own(tiny.Colors):
    """A data set of a user's with a row of labels for each image."""

    def __init__(self, length: int, kind: str | None, row: object) -> None:
        super().__init__(length)
        self.row = row
        if kind:
            self.kind = kind

    def __getitem__(self, index: int) -> tuple:
        return super().__getitem__(index)[0], self.row


def own_args(task: str = "auto", **flags: object) -> SimpleNamespace:
    words = f"{BASE} --data_set tests.test_tasks:own --task {task}"
    return parse(finetune_parser(), words.split()).replace(**flags)


@pytest.mark.parametrize(
    ("kind", "task", "row", "read"),
    [
        ("multi", "auto", [1, 0, 1], [1, 0, 1]),
        (None, "multi_label", torch.tensor([True, False, True]), [1, 0, 1]),
        ("number", "auto", np.array([0.5, -2, 7]), [0.5, -2, 7]),
        (None, "regression", (3, 4, 5.5), [3, 4, 5.5]),
    ],
)
def test_own_data_sets(kind, task, row, read, monkeypatch):
    monkeypatch.setattr("tests.test_tasks.own", lambda *_: Own(8, kind, row), raising=False)
    data, outputs = datasets.build_dataset(True, own_args(task, normalize_targets=False))
    batch = collate([data[0, 0], data[0, 1]])
    assert (outputs, batch[1].dtype, batch[1].tolist()) == (3, torch.float32, [read, read])


@pytest.mark.parametrize(
    ("kind", "task", "row", "said"),
    [
        ("multi", "regression", [1, 0, 1], "pass --task multi_label"),
        ("many", "auto", [1, 0, 1], "has kind = 'many', expected class, multi or number"),
        ("number", "auto", [1, 0, 1], "does not list its numbers; give it a list `targets`"),
        ("multi", "auto", [1, 0, 2], r"got the label [1.0, 0.0, 2.0], expected 3 zeros and ones"),
        (
            "multi",
            "auto",
            [1, 0],
            "got the label of shape (2,) [1.0, 0.0], expected 3 zeros and on",
        ),
        (
            "multi",
            "auto",
            "red",
            "got the label 'red', expected 3 zeros and ones, as --task multi_l",
        ),
        (None, "auto", [1, 0, 1], "expected an integer from 0 to 2; convert it in the data set"),
    ],
)
def test_own_data_sets_that_are_refused(kind, task, row, said, monkeypatch):
    monkeypatch.setattr("tests.test_tasks.own", lambda *_: Own(8, kind, row), raising=False)
    with pytest.raises(UserError) as caught:
        raise datasets.build_dataset(True, own_args(task))[0][0, 0]
    assert said in str(caught.value)


# --- losses, mixing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data_path t.csv --loss mse", "unknown loss 'mse'"),
        ("--data_path t.csv --loss l2", "takes numbers, and the labels are one class per image"),
        ("--data_path t.csv --task multi_label --loss focal", "use one of soft_target_ce"),
        (
            "--data_path t.csv --task regression --metrics acc1",
            "and this run's targets are numbers",
        ),
        (
            "--data_path t.csv --task regression --smoothing 0.1",
            "is for classes; pass --smoothing 0",
        ),
    ],
)
def test_losses_and_metrics_of_no_possible_task_are_refused_before_the_data(words, said):
    with pytest.raises(UserError, match=said):
        check_task(parse(finetune_parser(), words.split()))


def test_losses_of_a_possible_task_are_not():
    for words in ("--loss zlpr", "--metrics map hamming", "--loss focal"):
        check_task(parse(finetune_parser(), f"--data_path t.csv {words}".split()))


def test_task_of_the_evaluated_checkpoint_decides_on_metrics_before_the_data_is_listed(tmp_path):
    """rmse was refused, since no table says that it is for regression; acc1 only with the data."""
    saved = {"model": {"x": torch.ones(1)}, "args": {"task": "regression"}}
    torch.save(saved, tmp_path / "it.pth")
    words = f"--data_path {tmp_path}/none.csv --resume {tmp_path}/it.pth --eval --metrics"
    cases = {"acc1": "acc1 is for one class per image", "rmse": "not weights of a ConvNeXt"}
    for metric, said in cases.items():
        args = parse(finetune_parser(), [*words.split(), metric])
        check_task(args)
        with pytest.raises(UserError, match=said):
            main_finetune.evaluate_checkpoint(args, torch.device("cpu"), "none")


def test_mixed_labels_are_shares_of_both(monkeypatch):
    """timm's mixup takes one class per image, and would read rows of labels as classes."""
    args = SimpleNamespace(
        mixup=0.8, cutmix=0.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5,
        mixup_mode="batch", smoothing=0.1,
    )  # fmt: skip
    mixup = build_mixup(args, 2, "multi")
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 1, 4, 4)
    np.random.seed(1)
    mixed, targets = mixup(images.clone(), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    share = mixed[0, 0, 0, 0]  # of the second image in the first
    assert 0 < share < 1
    torch.testing.assert_close(
        targets,
        torch.stack([torch.stack([share * 0 + 1, share]), torch.stack([share * 0 + 1, 1 - share])]),
    )
    with pytest.raises(UserError, match="mix classes, and the data has numbers; drop them"):
        build_mixup(args, 2, "number")


def test_class_weights_of_several_labels_name_the_loss_to_use(rows):
    """24 of 32 images lack blue... the fix has negative / positive images of each class."""
    args = parse(finetune_parser(), f"--data_path {rows / 't.csv'} --class_weights inverse".split())
    train, _, outputs = datasets.build_datasets(args)
    blue = sum(number % 3 == 0 for number in range(40) if number % 5)
    green = sum(number % 2 for number in range(40) if number % 5)
    fix = f"pos_weight=[{(32 - blue) / blue:.3g},{(32 - green) / green:.3g}]"
    with pytest.raises(UserError) as caught:
        build_criterion(args, outputs, torch.device("cpu"), train, "multi")
    assert fix in str(caught.value)


# --- sampling -------------------------------------------------------------------------------


def test_balanced_epoch_has_as_many_images_of_each_class():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    drawn = torch.tensor([index for _, index in TrainSampler(1000, 0, 0, 1, balance(labels))])
    assert sorted(torch.bincount(labels[drawn % 1000]).tolist()) == [333, 333, 334]
    assert len(set(drawn.tolist())) == 1000  # a repeated image gets other augmentations
    assert torch.bincount(drawn[drawn % 1000 >= 990] % 1000 - 990).tolist() == pytest.approx(
        [33.3] * 10, abs=1
    )


def test_equal_weights_give_the_order_of_a_shuffle():
    for weight in (1.0, 0.3):
        weights = torch.full((500,), weight)
        assert [*TrainSampler(500, 3, 0, 1, weights)] == [*TrainSampler(500, 3, 0, 1)]


def test_weighted_sampling_takes_shares_and_no_image_without_weight():
    weights = torch.tensor([0.0, 1, 3, 0])
    drawn = [index % 4 for epoch in range(50) for _, index in at_epoch(weights, epoch)]
    assert (drawn.count(1), drawn.count(2)) == (50, 150)
    third = torch.tensor([1.0, 1, 1, 0])  # 4/3 of an image each: one or two an epoch
    drawn = [index % 4 for epoch in range(100) for _, index in at_epoch(third, epoch)]
    assert [drawn.count(item) / 100 for item in range(4)] == pytest.approx(
        [4 / 3] * 3 + [0], abs=0.15
    )


@pytest.mark.parametrize(
    "weights", [[3.0, 6, 6], [0.0, 0.1, 7, 0.3, 0, 2, 2, 0.7, 0], [1 / 3] * 100, range(40)], ids=len
)
def test_weighted_sampling_rounds_the_share_of_an_image_down_or_up(weights):
    """With a random point for each draw, an image of 1.2 shares was left out of some epochs."""
    weights, sums = torch.tensor([*weights]), 0
    length, shares = len(weights), weights.double() / weights.sum() * len(weights)
    for epoch in range(200):
        keys = torch.tensor([index for _, index in at_epoch(weights, epoch)])
        counts = torch.bincount(keys % length, minlength=length)
        assert (counts >= (shares - 1e-9).floor()).all()
        assert (counts <= (shares + 1e-9).ceil()).all()
        repeats = [
            number * length + image for image in range(length) for number in range(counts[image])
        ]
        assert sorted(repeats) == keys.sort().values.tolist()  # a draw of its own each time
        sums += counts
    assert (sums / 200 - shares).abs().max() < 0.15


def at_epoch(weights: torch.Tensor, epoch: int) -> list:
    sampler = TrainSampler(len(weights), 0, 0, 1, weights)
    sampler.set_epoch(epoch)
    return [*sampler]


def test_balanced_draws_do_not_depend_on_ranks_or_on_a_resume():
    weights = balance(torch.tensor([0] * 40 + [1] * 20))
    one = TrainSampler(60, 7, 0, 1, weights)
    parts = [TrainSampler(60, 7, rank, 3, weights) for rank in range(3)]
    for sampler in (one, *parts):
        sampler.set_epoch(2)
    whole = [*one]
    assert [key for keys in zip(*parts, strict=True) for key in keys] == whole
    one.set_epoch(2, start=24)
    assert [*one] == whole[24:]


def test_the_rarest_label_decides():
    rows = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0], [0, 0]])
    assert balance(rows).tolist() == [1 / 3, 1, 1 / 2, 1 / 3, 1 / 2]


def test_repeated_images_have_draws_of_their_own():
    data = TransformedDataset(tiny.Colors(3), lambda image: torch.rand(1), 0, nb_classes=3)
    (first, label, index), (again, same, number) = data[5, 1], data[5, 4]
    assert (label, same, index, number) == (1, 1, 1, 4)
    assert first != again
    assert data[5, 4][0] == again
    assert data.name_of(4) == "image number 1"


def test_an_interrupted_epoch_keeps_its_sampling():
    """Its order would change, and images would come twice."""
    with pytest.raises(UserError, match="with --sampling balanced and cannot resume with shuffle"):
        compare_args({"sampling": "balanced"}, {"sampling": "shuffle"}, "it.pth", in_epoch=True)
    changes = compare_args({"sampling": "balanced"}, {"sampling": "shuffle"}, "it.pth")
    assert changes == ["--sampling shuffle (was balanced)"]
    saved, now = {"weight_column": "w"}, {"weight_column": None}
    assert compare_args(saved, now, "it.pth", given=()) == ["--weight_column not set (was w)"]


def test_resuming_without_loss_takes_that_of_the_task():
    """None stands for it, which must not be logged as a change."""
    saved = {"task": "multi_label", "loss": "bce", "smoothing": 0.0}
    now = {"task": "auto", "loss": None, "smoothing": 0.1}
    assert compare_args(saved, now, "it.pth", given=()) == []
    saved["loss"] = "zlpr"
    assert compare_args(saved, now, "it.pth", given=()) == ["--loss bce (was zlpr)"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--data_set DIGITS --label_column x",
            "--label_column is for tables, not for --data_set DIGITS",
        ),
        (
            "--data_set DIGITS --task regression",
            "--data_set DIGITS has one class per image; give a",
        ),
        ("--data_path t.csv --task regression --mixup 1", "mix classes, and --task regression has"),
        ("--data_path t.csv --task regression --sampling balanced", "balanced needs classes"),
        ("--data_path t.csv --weight_column w", "--weight_column needs --sampling weighted"),
        ("--data_path t.csv --sampling weighted", "weighted needs --weight_column"),
        ("--data_set DIGITS --eval_classes data", "--eval_classes data needs --eval"),
    ],
)
def test_flags_that_cannot_act_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        parse(finetune_parser(), words.split())
    assert said in capsys.readouterr().err


def test_sampling_refusals(rows):
    words = f"--data_path {rows / 't.csv'} --label_column x --task regression"
    train, _ = datasets.build_dataset(True, parse(finetune_parser(), words.split()))
    with pytest.raises(UserError, match="balanced needs classes, and the data has numbers"):
        datasets.build_weights(train, "balanced")
    with pytest.raises(UserError, match="give it a list `weights` with the weight of each image"):
        datasets.build_weights(train, "weighted")
    plain = TransformedDataset(tiny.Colors(9), None, 0, nb_classes=3)
    with pytest.raises(UserError, match="give it a list `targets` with the label of each image"):
        datasets.build_weights(plain, "balanced")
    plain.dataset.weights = [0.0] * 9
    with pytest.raises(UserError, match="expected weights of at least 0, one above 0"):
        datasets.build_weights(plain, "weighted")


# --- some of the classes --------------------------------------------------------------------


def test_imagenet_is_found_by_english_names():
    head = Head("it.pth", None, 1000)
    order, how = order_of_head(["Goldfish", "great_white_shark", "tench"], head)
    assert (order[:3], how) == (
        ["tench", "Goldfish", "great_white_shark"],
        "by ImageNet's English names",
    )
    assert order_of_head(["crane", "tench"], head) == (None, "")  # there are two cranes


@pytest.mark.slow
def test_answers_may_be_limited_to_the_classes_of_the_data(rows):
    """Half of the classes: answers outside of them count as wrong, unless they are left out."""
    for number in range(8):
        folder = rows / "few" / ("bee", "cat")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (rows / f"{number}.png").rename(folder / f"{number}.png")
    model = tiny.classifier(num_classes=4, stem_stride=1)
    with torch.no_grad():  # dog > cat > bee > ant for every image
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(4.0))
    torch.save(
        {"model": model.state_dict(), "classes": ["ant", "bee", "cat", "dog"]}, rows / "m.pth"
    )
    words = (
        f"--eval --resume {rows / 'm.pth'} --data_set image_folder --eval_data_path {rows / 'few'}"
    )
    assert "top-1 0.00%" in (line := run(words)[-2])
    assert line.endswith("on 8 images among all 4 classes")
    assert "top-1 50.00%" in (line := run(f"{words} --eval_classes data")[-2])
    loss = (np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2  # of logits 1 and 2
    assert f"loss {loss:.4f} on 8 images among the 2 classes of the data" in line


@pytest.mark.slow
def test_two_processes_do_as_one(rows):
    """Balanced draws, sums of rows of labels and the gathered rows of mAP, with uneven shards."""
    lines = (rows / "t.csv").read_text().splitlines()
    (rows / "t.csv").write_text("\n".join(lines[:36]))  # 7 images to evaluate
    words = f"--data_path {rows / 't.csv'} --sampling balanced --epochs 1"
    run(f"{words} --output_dir {rows / 'one'}")
    words = f"{BASE} {words} --batch_size 4 --output_dir {rows / 'two'}".split()
    run_script("main_finetune.py", *words, ranks=2, folder=rows)
    found, one = last_of(rows / "two"), last_of(rows / "one")
    for name in ("test_loss", "test_map", "test_f1", "train_loss"):
        assert found[name] == pytest.approx(one[name], rel=1e-4)
