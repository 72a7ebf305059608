# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Probes of pre-training: their images, their values, and that they change nothing."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import main_pretrain
from config import parser as options
from errors import UserError
from insight.alarms import ALARMS
from insight.evaluators import Labeled
from insight.health import LayerSums, is_measure
from models import build_fcmae
from tests import tiny
from tests.groups import results_of, run_ranks, run_script
from training import probes
from training.checkpoint import TrainState
from training.probe_data import choose, default_images
from training.probes import Evaluators, Probes, read_history
from training.stepper import Stepper
from training.tensorboard import scalar_tag

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WORDS = (
    "--input_size 16 --stem_stride 1 --batch_size 6 --lr 0.01 --num_workers 0 --device cpu "
    "--warmup_epochs 0 --picture_freq 0 --log_dir none --decoder_embed_dim 8 "
    "--model tests.tiny:fcmae"
)
PROBES = "--probes knn(k=5) linear"
COLORS = "--data_set tests.tiny:colors"


class Listed(tiny.Colors):
    """Colors with a list of their labels."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.targets = [index % tiny.CLASSES for index in range(length)]


def no_val(data_path: str, train: bool) -> Listed:
    """A data set that has only images to train on, and says so by an error."""
    return Listed({True: 26}[train])


class Bare(torch.utils.data.Dataset):
    """Images without labels."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> Tensor:
        return tiny.Colors(26)[index][0]


def bare(data_path: str, train: bool) -> Bare:
    return Bare()


def one_class(data_path: str, train: bool) -> Bare:
    data = Bare()
    data.classes, data.targets = ("only",), [0] * 26
    return data


def count_features(train: Labeled, test: Labeled, kind: str, plus: int = 0) -> dict[str, float]:
    """An evaluator as a fork may bring."""
    return {"train": len(train.features) + plus, "columns": test.features.shape[1]}


def fails(train: Labeled, test: Labeled, kind: str) -> float:
    return 1 / 0


def parse(words: str) -> Any:
    own = PROBES * ("--probe" not in words.replace("--probe_", "") and "_every 0" not in words)
    return options.parse(main_pretrain.get_args_parser(), f"{WORDS} {own} {words}".split())


def run(words: str, folder: Path) -> list[dict[str, Any]]:
    """Pre-train, and return the lines of log.txt."""
    main_pretrain.main(parse(f"{words} --output_dir {folder}"))
    return lines_of(folder)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The values in log.txt that do not depend on the speed of the machine."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    varies = ("time_", "images_per_s", "mfu")
    return [{k: x for k, x in line.items() if not k.startswith(varies)} for line in lines]


def made(words: str, own: Any = None) -> tuple[Probes, torch.nn.Module]:
    """Probes and the network, as main_pretrain.py has them."""
    args = parse(words)
    torch.manual_seed(0)
    model = build_fcmae(args)
    stepper = Stepper(model, torch.optim.SGD(model.parameters()), CPU)
    return Probes(args, own or Listed(26), model, stepper), model


def folder_of(path: Path, classes: dict[str, int]) -> Path:
    """Write a folder of images with a color for each class."""
    for number, (name, count) in enumerate(classes.items()):
        (path / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((20, 20, 3), 10 * index + 5, np.uint8)
            pixels[..., number % 3] = 250
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    return path


# --- whole runs -----------------------------------------------------------------------------------


def bits_of(value: Any) -> Any:
    """Nested values, with the bytes of tensors."""
    if isinstance(value, Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits_of(x) for key, x in value.items()}
    return [*map(bits_of, value)] if isinstance(value, list) else value


def weights_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint-2.pth", weights_only=True)


@pytest.mark.slow
def test_weights_are_the_same_bits_with_and_without_probes(tmp_path):
    words = f"{COLORS} --epochs 3 --drop_path 0.3 --probe_every"
    probed = run(f"{words} 1", tmp_path / "probed")
    plain = run(f"{words} 0", tmp_path / "plain")
    assert all("probe_knn_5" in line and "rank_me" in line for line in probed)
    assert not any("rank_me" in line or "alarms" in line for line in plain)
    assert [x["train_loss"] for x in probed] == [x["train_loss"] for x in plain]
    one, other = (weights_of(tmp_path / name) for name in ("probed", "plain"))
    for key in ("model", "optimizer"):
        assert bits_of(one[key]) == bits_of(other[key])


@pytest.mark.slow
def test_resumed_run_measures_the_same(tmp_path, monkeypatch):
    words = f"{COLORS} --epochs 4 --drop_path 0.3 --probe_every 2"
    whole = run(words, tmp_path / "whole")
    real = Probes.after_epoch

    def killed(self, model, state, stats, folder):
        if state.epoch == 3:
            raise KeyboardInterrupt
        return real(self, model, state, stats, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "after_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(words, tmp_path / "parts")
    parts = run(words, tmp_path / "parts")
    assert parts == whole
    assert ["rank_me" in line for line in whole] == [True, True, False, True]


def test_log_has_every_measure_under_its_name(tmp_path, capsys):
    (line,) = run(f"{COLORS} --epochs 1", tmp_path)
    stages = range(1, 5)
    expected = {"probe_knn_5", "probe_linear", "probe_linear_10pct", "rank_me", "holdout_loss"}
    expected |= {"feature_distance", "feature_distance_blocks"}
    expected |= {"dead_channels", "saturated_channels"}
    expected |= {"grad_norm_decoder", "skipped_steps"}
    for name in ("feature_distance", "grn_gamma", "grn_beta", "grad_norm"):
        expected |= {f"{name}_stage{stage}" for stage in stages}
    own = {name for name in line if is_measure(name)}
    assert own == expected
    assert all(math.isfinite(line[name]) for name in own - {"feature_distance_blocks"})
    assert line["skipped_steps"] == 0
    assert line["grad_norm_stage1"] > 0
    said = capsys.readouterr().out
    assert "no probe_knn_5_10pct: --probes knn(k=5): k 5: there are only 3 images" in said
    assert "no probe_knn_5_1pct: 0.01 of 26 images is less than one for each of 3" in said
    assert "probe: probe_knn_5" in said
    assert "grn_" not in said.partition("epoch 1/1 done")[2]  # log.txt has them


@pytest.mark.parametrize("data", ["bare", "one_class"])
def test_data_without_labels_has_the_other_measures(data, tmp_path, capsys):
    (line,) = run(f"--data_set tests.training.test_probes:{data} --epochs 1", tmp_path)
    assert not [name for name in line if name.startswith("probe_")]
    assert line["rank_me"] > 1
    assert "feature_distance" in line
    said = capsys.readouterr().out
    assert "probes: no labels in the training data (" in said
    assert "--probe_data DATA gives some" in said


def test_labels_of_other_data(tmp_path, capsys):
    path = folder_of(tmp_path / "photos", {"ant": 12, "bee": 12, "cat": 6})
    words = f"--data_set tests.training.test_probes:bare --probe_data {path} --epochs 1"
    (line,) = run(words, tmp_path / "run")
    assert line["probe_linear"] == 100
    said = capsys.readouterr().out
    found = r"(\d+) training and (\d+) test images, of 3 classes \(ant, bee, cat\)"
    counts = re.search(rf"labels of {path}: {found}", said).groups()
    assert sum(map(int, counts)) == 30
    assert f"no evaluation images in {path} ({path} does not say which images are for" in said


@pytest.mark.parametrize("flag", ["--data_path", "--probe_data"])
def test_damaged_images_that_are_only_probed_do_not_end_the_run(flag, tmp_path, capsys):
    """The first epoch was lost."""
    data = folder_of(tmp_path / "data" / "train", {"a": 12, "b": 12}).parent
    folder_of(data / "val", {"a": 4, "b": 4})
    for number in range(2):
        (data / "val" / "b" / f"{number}.png").write_text("no image")
    own = f"--data_path {data}" if flag == "--data_path" else f"--data_path {data}/train"
    lines = run(f"{own} {flag} {data} --epochs 1 --probes linear", tmp_path / "run")
    assert lines[-1]["probe_linear"] >= 0
    assert "2 images cannot be used: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "words"),
    [({"ant": 12}, "one class"), ({}, "no such file"), ({"a": 3, "b": 3}, "k 5: there are only 4")],
)
def test_probe_data_that_cannot_be_used_is_refused(classes, words, tmp_path):
    folder_of(tmp_path / "photos", classes)
    with pytest.raises(UserError, match=words):
        run(f"{COLORS} --epochs 1 --probe_data {tmp_path / 'photos'}", tmp_path / "run")


def table_of(folder: Path) -> Path:
    """A table of images with two columns that could be their labels."""
    folder_of(folder, {"ant": 12, "bee": 12})
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{n}"
        for n, path in enumerate(sorted(folder.rglob("*.png")))
    ]
    (folder / "t.csv").write_text("\n".join(["image,species,weight_g", *rows]))
    return folder / "t.csv"


def test_table_with_several_columns_needs_the_one_of_the_labels(tmp_path, capsys):
    """The error named --label_column, which pre-training does not have."""
    words = f"{COLORS} --epochs 1 --probe_data {table_of(tmp_path / 'photos')}"
    with pytest.raises(UserError, match="name those of the labels with --probe_label_column"):
        run(words, tmp_path / "run")
    (line,) = run(f"{words} --probe_label_column species", tmp_path / "run")
    assert line["probe_linear"] == 100
    assert "of 2 classes (ant, bee)" in capsys.readouterr().out


def test_labels_of_the_training_table_itself(tmp_path, capsys):
    words = f"--data_path {table_of(tmp_path / 'photos')} --epochs 1"
    (line,) = run(words, tmp_path / "a")
    assert "probe_linear" not in line
    said = capsys.readouterr().out
    assert "no labels in the training data (" in said
    assert "--probe_label_column" in said
    (line,) = run(f"{words} --probe_label_column species", tmp_path / "b")
    assert line["probe_linear"] == 100
    with pytest.raises(
        UserError, match="--probe_label_column: unknown column of .*'color'. Known: image"
    ):
        run(f"{words} --probe_label_column color", tmp_path / "c")


def test_loss_on_training_images_has_another_name(tmp_path, capsys):
    (line,) = run("--data_set tests.training.test_probes:no_val --epochs 1", tmp_path)
    assert "holdout_loss" not in line
    assert line["fixed_train_loss"] > 0
    said = capsys.readouterr().out
    assert "fixed_train_loss of 26 training images (the data has no others)" in said
    learned, scored = re.search(r"(\d+) training and (\d+) test images", said).groups()
    assert int(learned) + int(scored) == 26  # about a fifth is held out
    assert 0 < int(scored) < 13


def test_planted_collapse_warns_once_and_is_in_the_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "rank_me", lambda features: 1.1)
    lines = run(f"{COLORS} --epochs 3 --probe_every 1", tmp_path)
    for line in lines:
        (alarm,) = line["alarms"]
        assert alarm.startswith("collapse: rank_me 1.1")
    said = capsys.readouterr().out
    assert said.count("alarm after epoch 1: collapse: rank_me 1.1") == 1
    assert said.count("alarm after epoch") == 1
    assert re.search(r"^probes: holdout_loss .*; after every epoch$", said, re.MULTILINE)


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    words = f"{WORDS} {PROBES} --epochs 2 --probe_every 1".replace("tiny:fcmae", "tiny:fcmae64")
    even = f"{words} --data_set tests.tiny:even"
    two = f"{even} --batch_size 4 --output_dir {tmp_path / 'two'}"
    run_script("main_pretrain.py", *two.split(), ranks=2, folder=tmp_path)
    one = f"{even} --batch_size 8 --output_dir {tmp_path / 'one'}"
    run_script("main_pretrain.py", *one.split(), ranks=1, folder=tmp_path)
    lines = [lines_of(tmp_path / name) for name in ("one", "two")]
    for first, second in zip(*lines, strict=True):
        assert list(first) == list(second)
        for name in set(first) - {"alarms"}:
            assert first[name] == pytest.approx(second[name], rel=1e-4), name


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "samples", "due"),
    [(0, 0, False), (1, 0, True), (2, 0, False), (4, 0, True), (6, 0, False), (7, 0, True)],
)
def test_probes_come_after_the_first_epoch_then_regularly_and_at_the_end(epoch, samples, due):
    made_probes, _ = made(f"{COLORS} --probe_every 4 --epochs 7")
    assert made_probes.is_due(TrainState(epoch, samples_in_epoch=samples)) is due


def test_features_are_probed_with_their_labels():
    """Weights that pass the color on are told apart; without images the scores would be chance."""
    own, model = made(f"{COLORS} --probe_every 1")
    found = own.measure(model, TrainState(1, global_step=5))
    assert found["probe_linear"] == 100
    assert found["rank_me"] < 10.1


def test_nan_in_features_is_told_and_raises_the_alarm(tmp_path):
    own, model = made(f"{COLORS} --probe_every 1")
    model.encoder.stages[3][0].pwconv2.bias.data[0] = math.nan
    found = own.after_epoch(model, TrainState(1, global_step=5), {"train_loss": 1.0}, None)
    assert found["features_finite"] is False
    assert [alarm[:11] for alarm in found["alarms"]] == ["divergence:"]


def test_skipped_steps_are_those_since_the_last_probe():
    own, model = made(f"{COLORS} --probe_every 1")
    state = TrainState(1, global_step=10, bad_steps=1)
    assert own.measure(model, state)["skipped_steps"] == 10
    state.global_step, state.bad_steps = 30, 11
    assert own.measure(model, state)["skipped_steps"] == 50


def test_images_are_the_same_for_every_seed_and_of_every_class():
    data = Listed(300)
    chosen = choose(data, 30)
    assert np.bincount(np.array(data.targets)[chosen]).tolist() == [10] * 3
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert choose(Bare(), 10).tolist() == choose(Bare(), 10).tolist()
    assert len(choose(Bare(), 10)) == 10
    assert choose(data, 500).tolist() == list(range(300))


@pytest.mark.parametrize(("images", "expected"), [(100, 500), (20_000, 5_000), (1_281_167, 24_000)])
def test_default_number_of_images(images, expected):
    assert default_images(images) == expected


def test_history_is_that_of_the_epochs_before(tmp_path):
    rows = [{"epoch": epoch, "train_loss": 1.0 - epoch} for epoch in range(4)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "log.txt").write_text(lines + '{"epoch": 4, "tr')
    assert read_history(tmp_path, 3) == rows[:2]
    assert read_history(tmp_path / "none", 3) == read_history(None, 3) == []


def test_evaluators_of_a_fork():
    sets = [Labeled(torch.randn(n, 4), torch.arange(n) % 2) for n in (300, 20)]
    name = "tests.training.test_probes:count_features"
    found = Evaluators((name,)).run(*sets, "class")
    start = "probe_count_features"
    expected = {f"{start}_train": 300, f"{start}_train_10pct": 30, f"{start}_train_1pct": 4}
    columns = {f"{start}_columns{x}": 4 for x in ("", "_10pct", "_1pct")}
    assert found == expected | columns
    assert Evaluators((f"{name}(plus=1)",)).run(*sets, "class")[f"{start}_1_train"] == 301


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("knm",), "--probes: unknown evaluator 'knm'. Did you mean 'knn'"),
        (("knn(n=3)",), "it takes k=20, temperature=0.07"),
        (("knn", "knn"), "probe_knn is given twice"),
        (("tests.training.test_probes:missing",), "cannot import evaluator"),
    ],
)
def test_evaluators_that_are_not_known_are_refused(texts, words):
    with pytest.raises(UserError) as found:
        Evaluators(texts)
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--probes knn(k=27)", "k 27: there are only 26 images"),
        ("--probes tests.training.test_probes:fails", "ZeroDivisionError in test_probes.py"),
    ],
)
def test_evaluators_that_fail_are_refused_before_training(words, expected):
    with pytest.raises(UserError, match=expected):
        made(f"{COLORS} {words}")


def test_default_evaluators_that_do_not_fit_are_left_out(log):
    """A run on few images must not end for 20 neighbors that nobody asked for."""
    args = options.parse(main_pretrain.get_args_parser(), f"{WORDS} {COLORS}".split())
    model = build_fcmae(args)
    stepper = Stepper(model, torch.optim.SGD(model.parameters()), CPU)
    own = Probes(args, Listed(15), model, stepper)
    assert [*own.evaluators.calls] == ["probe_linear"]
    assert "no probe_knn: --probes knn: k 20: there are only 15 images" in log.text


def test_flags_of_probes_need_probes(capsys):
    with pytest.raises(SystemExit):
        parse(f"{COLORS} --probe_every 0 --probe_images 9")
    assert "--probe_images 9 needs --probe_every above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("probe_knn_10pct", "probe/knn_10pct"),
        ("rank_me", "health/rank_me"),
        ("grad_norm_stage1", "health/grad_norm_stage1"),
        ("test_acc1", "test/acc1"),
        ("train_loss", ""),
        ("alarms", ""),
    ],
)
def test_tags_of_tensorboard(name, tag):
    assert scalar_tag(name) == tag


def test_gradient_norms_of_stages_are_those_of_the_last_step():
    own, model = made(f"{COLORS} --probe_every 1")
    stepper = own.stepper
    stepper.begin_epoch(2)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 3.0):
        with stepper.micro_batch():
            loss = factor * model(images, torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 2), 2)[0]
        if factor == 3.0:
            expected = torch.autograd.grad(loss, own.stages["stage2"], retain_graph=True)
        stepper.step(loss)
    norm = torch.cat([grad.flatten() for grad in expected]).norm()
    found = dict(zip(own.stages, stepper.watched_norms.tolist(), strict=True))
    assert found["stage2"] == pytest.approx(norm.item(), rel=1e-4)


def test_networks_without_known_features_have_the_loss_alone(monkeypatch, log):
    def unknown(model):
        raise UserError("Net has no forward_features(images)")

    monkeypatch.setattr(probes, "encoder_of", unknown)
    own, model = made(f"{COLORS} --probe_every 1")
    found = own.measure(model, TrainState(1))
    assert list(found) == ["holdout_loss"]
    assert "probes: no features: Net has no forward_features" in log.text


# --- what the docs say ----------------------------------------------------------------------------


def section_of(title: str) -> str:
    text = (ROOT / "docs/insight.md").read_text(encoding="utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def blocks_of(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section_of(title), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_commands_and_code_of_the_docs_run(tmp_path, monkeypatch, capsys):
    """Each with a toy network, for one epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("photos", "labeled"):
        folder_of(tmp_path / name, {"ant": 12, "bee": 15})
    (own,) = blocks_of("Probes while pre-training", "python")
    path = tmp_path / re.match(r"# (\S+)\n", own)[1]
    path.parent.mkdir()
    path.write_text(own)
    commands = "".join(blocks_of("Probes while pre-training", "sh")).splitlines()
    toy = "--model tests.tiny:fcmae --device cpu --num_workers 0 --epochs 1 --warmup_epochs 0"
    toy += " --batch_size 9 --input_size 16 --stem_stride 1 --log_dir none --picture_freq 0"
    for command in commands:
        python, script, *words = shlex.split(command)
        assert (python, script) == ("python", "main_pretrain.py")
        words = [*words, *toy.split(), *["--output_dir", "last"] * ("--output_dir" not in words)]
        main_pretrain.main(options.parse(main_pretrain.get_args_parser(), words))
    line = json.loads((tmp_path / "last/log.txt").read_text())
    names = {"probe_knn_10", "probe_linear", "probe_nearest_mean", "probe_nearest_mean_10pct"}
    assert names <= set(line)
    assert len(commands) == 3
    (code,) = blocks_of("Alarms", "python")
    capsys.readouterr()
    exec(code, {})
    assert "Error" not in capsys.readouterr().out


def test_docs_name_every_measure(tmp_path):
    own, model = made(f"{COLORS} --probe_every 1")
    found = own.measure(model, TrainState(1, global_step=3, probed={"norms": [1.0] * 5}))
    text = section_of("Probes while pre-training") + section_of("Health of the network")
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    known = set(re.findall(r"`(\w+)`", " ".join(rows)))
    own_names = {re.sub(r"stage\d", "stage1", name).replace("_knn_5", "_knn") for name in found}
    assert own_names - known == set()
    assert {kind for kind, _ in ALARMS} == set(
        re.findall(r"^\| `([a-z ]+)` \|", section_of("Alarms"), re.MULTILINE)
    )


def test_tensorboard_has_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = f"{COLORS} --epochs 1 --output_dir {tmp_path} --log_dir {tmp_path / 'board'}"
    main_pretrain.main(parse(words))
    line = json.loads((tmp_path / "log.txt").read_text())
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for tag, name in (("probe/linear", "probe_linear"), ("health/rank_me", "rank_me")):
        (event,) = events.Scalars(tag)
        assert event.value == pytest.approx(line[name])
        assert event.step == 4


# --- other networks and several ranks -------------------------------------------------------------


@pytest.mark.slow
def test_other_networks_have_the_measures_that_apply(tmp_path):
    """Their BatchNorm must not learn from a probe: it would change the run."""
    words = "--data_set tests.tiny:colors --epochs 2 --model timm:resnet10t --input_size 32"
    words += " --patch_size 16 --stem_stride 2 --probe_every"
    lines = run(f"{words} 1", tmp_path / "probed")
    run(f"{words} 0", tmp_path / "plain")
    expected = {"rank_me", "feature_distance", "dead_channels", "saturated_channels"}
    expected |= {"grad_norm_encoder", "grad_norm_decoder", "holdout_loss", "probe_linear"}
    assert expected <= set(lines[-1])
    assert not [name for name in lines[-1] if "stage" in name or name.startswith("grn")]
    one, other = (
        torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True)["model"]
        for name in ("probed", "plain")
    )
    assert bits_of(one) == bits_of(other)


def buffers(rank: int, folder: Path) -> list[float]:
    model = torch.nn.BatchNorm1d(1)
    model.running_mean.fill_(rank + 1)
    with probes._buffers_of_rank_0(model):
        inside = model.running_mean.item()
    return [inside, model.running_mean.item()]


def sums(rank: int, folder: Path) -> list[Any]:
    """Rank 1 has no images."""
    own = LayerSums([1, 2], [torch.ones(4), torch.full((6,), 2.0)]) if rank == 0 else None
    loss = torch.tensor([3.0, 2.0] if rank == 0 else [0.0, 0.0], dtype=torch.float64)
    total, layers = probes._sum_over_ranks(loss, own, CPU)
    return [total.tolist(), list(layers.stages), [x.tolist() for x in layers.values]]


def test_ranks_share_statistics_and_sums(tmp_path):
    first, second = results_of(run_ranks([buffers, sums], 2, tmp_path))
    assert (first["buffers"], second["buffers"]) == ([1, 1], [1, 2])
    assert first["sums"] == second["sums"] == [[3, 2], [1, 2], [[1] * 4, [2] * 6]]
