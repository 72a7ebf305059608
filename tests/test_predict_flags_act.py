# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every flag of predict.py and of `visualize.py explain` acts, as in tests/test_flags_act.py."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import predict
import visualize
from config import predict_flags, views
from errors import UserError
from tests import fakes, tiny
from tests.test_predict import ARGS, CLASSES, save_checkpoint, write_images
from training import explain, setup

MODEL = "--model tests.tiny:classifier"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    save_checkpoint(folder / "it.pth")
    save_checkpoint(folder / "multi.pth", args={"task": "multi_label", "loss": "bce"})
    torch.manual_seed(1)
    other = tiny.classifier(num_classes=3, stem_stride=1, head_init_scale=9.0).state_dict()
    held = torch.load(folder / "it.pth", weights_only=True)
    wrapped = {f"net.{name}": value for name, value in held["model"].items()}
    torch.save({**held, "model_ema": other, "wrapped": wrapped}, folder / "all.pth")
    (folder / "images").mkdir()
    write_images(folder / "images", [f"{CLASSES[n % 3]}/{n:02d}.png" for n in range(6)])
    rows = "image,second,tag,kind,part\n"
    rows += "ant/00.png,bee/01.png,ant,bee,train\nbee/04.png,cat/02.png,bee,ant,val\n"
    (folder / "images/rows.csv").write_text(rows)
    (folder / "rows.csv").write_text(rows)
    shape = {"patch_size": 8, "decoder_embed_dim": 8, "mask_ratio": 0.6}
    model = tiny.fcmae(3, 1, 0.0, **shape)
    flags = {**ARGS, **shape, "model": "tests.tiny:fcmae", "decoder_depth": 1, "seed": 0}
    flags |= {"norm_pix_loss": True, "epochs": 1, "data_set": "auto", "data_path": "images"}
    torch.save({"model": model.state_dict(), "args": flags}, folder / "pre.pth")
    return folder


# --- predict.py -----------------------------------------------------------------------------------


def seen(words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Predict; returns the job, the loader and what was written, and the flags."""
    found = SimpleNamespace(calls={})

    def keep(target: Any, name: str, key: str) -> None:
        real = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found.calls[key] = (args, kwargs, real(*args, **kwargs))
            return found.calls[key][2]

        monkeypatch.setattr(target, name, call)

    with monkeypatch.context() as monkeypatch:
        keep(predict.PredictionJob, "build_loader", "loader")
        keep(predict, "load_trained", "trained")
        keep(setup.process_group, "init_distributed_mode", "device")
        keep(setup, "set_kernels", "kernels")
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: found.calls.update(compile=1))
        with fakes.logged() as found.lines:
            predict.main(predict_flags.parse(words.split()))
    found.job = found.calls["loader"][0][0]
    found.loader = found.calls["loader"][2]
    found.trained = found.calls["trained"][2]
    return found


def rows(found: Any) -> list[dict]:
    return json.loads(Path(found.job.args.output).read_text())


def paths(found: Any) -> list[str]:
    return [row["path"] for row in rows(found)]


TABLE = "it.pth rows.csv --image_root images"
BASE = "--device cpu --num_workers 0 --kernels torch"
# flag -> (words, what to look at, its value without them, its value with them[, words for both])
ROWS: dict[str, tuple] = {
    "checkpoint": ("= all.pth images", lambda f: f.trained.weights.path, "it.pth", "all.pth"),
    "input": ("= it.pth images images/cat", lambda f: len(rows(f)), 6, 8),
    "output": ("", lambda f: Path(f.job.args.output or "none").exists(), False, True),
    "overwrite": ("--overwrite", lambda f: len(rows(f)), "refused", 6),
    "topk": ("--topk 2", lambda f: "class_3" in rows(f)[0], True, False),
    "threshold": (
        "--threshold 0.0001", lambda f: all(len(r["prediction"]) == 3 for r in rows(f)),
        False, True, "multi.pth images",
    ),
    "labels": ("--labels false", lambda f: "target" in rows(f)[0], True, False),
    "split": (
        "--split train", paths, ["images/bee/04.png"], ["images/ant/00.png"],
        f"{TABLE} --split_column part",
    ),
    "num_worst": ("--num_worst 2", lambda f: len(f.job.evaluation.worst.rows), 6, 2),
    "batch_size": ("--batch_size 2", lambda f: f.loader.loader.batch_size, 64, 2),
    "num_workers": ("--num_workers 1", lambda f: f.loader.loader.num_workers, 0, 1),
    "device": ("--device auto", lambda f: f.calls["device"][0][0], "cpu", "auto"),
    "amp": ("--amp bf16", lambda f: f.job.amp, "none", "bf16"),
    "compile": ("--compile", lambda f: "compile" in f.calls, False, True),
    "kernels": ("--kernels auto", lambda f: f.calls["kernels"][0][0], "torch", "auto"),
    "data_timeout": (
        "--data_timeout 9", lambda f: f.loader.loader.timeout, 1800, 9, "it.pth images "
        "--num_workers 1",
    ),
    "image_column": (
        "--image_column second", paths, ["images/ant/00.png", "images/bee/04.png"],
        ["images/bee/01.png", "images/cat/02.png"], f"{TABLE} --labels false",
    ),
    "image_root": (
        "--image_root images", lambda f: len(paths(f)), "refused", 2, "it.pth rows.csv",
    ),
    "split_column": ("--split_column part", lambda f: len(paths(f)), 2, 1, TABLE),
    "label_column": (
        "--label_column kind", lambda f: [row["target"] for row in rows(f)],
        ["ant", "bee"], ["bee", "ant"], f"{TABLE} --label_column tag",
    ),
    "model_key": (
        "--model_key model_ema", lambda f: f.trained.network.head.weight.abs().max().item() > 3,
        True, False, "all.pth images",
    ),
    "use_ema": (
        "--use_ema", lambda f: f.trained.network.head.weight.abs().max().item() > 3, True, False,
        "all.pth images",
    ),
    "model_prefix": (
        "--model_prefix net.", lambda f: len(rows(f)), "refused", 6,
        "all.pth images --model_key wrapped",
    ),
    "sha256": (f"--sha256 {'0' * 64}", lambda f: len(rows(f)), 6, "refused"),
    "model": ("--model tests.tiny:classifier64", lambda f: next(
        f.trained.network.parameters()).dtype, torch.float32, torch.float64),
    "head": ("--head mlp", lambda f: len(rows(f)), 6, "refused"),
    "heads": ("--heads main=mlp@norm", lambda f: len(rows(f)), 6, "refused"),
    "tta": ("--tta hflip", lambda f: f.job.views.count, 1, 2),
    "input_size": ("--input_size 24 32", lambda f: f.trained.flags.input_size, (16, 16), (24, 32)),
    "crop_pct": ("--crop_pct 0.5", lambda f: f.trained.flags.crop_pct, None, 0.5),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std false", lambda f: f.loader.mean[0], 0.485, 0.5,
    ),
    "mean": ("--mean 0.1 --std 1", lambda f: f.loader.mean, [0.485, 0.456, 0.406], [0.1] * 3),
    "std": ("--mean 0.1 --std 0.3", lambda f: f.loader.std, [0.229, 0.224, 0.225], [0.3] * 3),
    "value_range": (
        "--value_range 0 510", lambda f: f.loader.loader.dataset.value_range, None, (0.0, 510.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("flag", ROWS)
def test_flag_of_predict_acts(flag, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words, look, before, after, *base = ROWS[flag]
    base = f"{base[0] if base else 'it.pth images'} {MODEL}"
    found = []
    for number, more in enumerate(("", words)):
        out = tmp_path / f"{number}.json"
        if flag == "overwrite":
            out.write_text("")
        line = f"{more[2:]} {MODEL}" if more.startswith("= ") else f"{base} {more}"
        first, second, rest = f"{line} ".split(" ", 2)
        to = "" if flag == "output" and not number else f"--output {out}"
        if more.startswith("= "):  # more inputs may follow
            line = f"{line} {BASE} {to}"
        else:
            line = f"{first} {second} {BASE} {rest} {to}"
        try:
            found.append(look(seen(line, place, tmp_path, monkeypatch)))
        except UserError:
            found.append("refused")
    assert found == [before, after]


def test_every_flag_of_predict_is_tried():
    flags = {action.dest for action in predict_flags.predict_parser()._actions} - {"help"}
    assert {*ROWS} == flags


def test_flags_that_cannot_work_together_are_refused(capsys):
    for words, message in {
        "a b --out c.png": "--output c.png: unknown suffix '.png'; expected a name that ends in",
        "a b --output c": "--output c; expected a name that ends in .csv, .json, .jsonl, .parquet",
        "a b --overwrite": "--overwrite true needs --output",
        "a - b": "- reads paths from standard input; give it alone",
        "a b --input_size 1 2 3": "--input_size: got 3 numbers, expected one or two",
        "a b --mean 0.5": "--mean and --std belong together",
        "a b --tta hflip hflip": "hflip is given 2 times",
        "a b --threshold 1": "got '1', expected a number in (0,1)",
        "a": "the following arguments are required: INPUT",
    }.items():
        with pytest.raises(SystemExit):
            predict_flags.parse(words.split())
        assert message in capsys.readouterr().err


# --- visualize.py explain -------------------------------------------------------------------------


def drawn(words: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace()

    def keep(target: Any, name: str) -> None:
        real = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(found, name, (args, real(*args, **kwargs)))
            return getattr(found, name)[1]

        monkeypatch.setattr(target, name, call)

    with monkeypatch.context() as monkeypatch, fakes.logged() as found.lines:
        for name in ("grad_cam", "error_map", "find_map"):
            keep(explain, name)
        for name in ("reading_loader", "init_distributed_mode", "read_source"):
            keep(visualize, name)
        visualize.explain(views.parse_explain(words.split()))
    found.loader = found.reading_loader[1]
    found.files = [path for path, _ in found.loader.loader.dataset.dataset.samples]
    return found


def images(found: SimpleNamespace) -> torch.Tensor:
    return (getattr(found, "grad_cam", None) or found.error_map)[0][1]


FINE, PRE = f"it.pth --images images {MODEL}", "pre.pth --model tests.tiny:fcmae"
EXPLAIN: dict[str, tuple] = {
    "checkpoint": (
        f"= all.pth --images images {MODEL}", lambda f: f.read_source[1].path, "it.pth", "all.pth",
    ),
    "output": ("--output b.png", lambda f: Path("b.png").exists(), False, True),
    "images": ("--images images/ant", lambda f: len(f.files), 6, 2),
    "num_images": ("--num_images 2", lambda f: len(images(f)), 6, 2),
    "split": (
        "--split val", lambda f: f.files, ["images/ant/00.png"], ["images/bee/04.png"],
        f"it.pth --images rows.csv --image_root images --split_column part {MODEL}",
    ),
    "target": (
        "--target bee", lambda f: None if f.grad_cam[0][4] is None else f.grad_cam[0][4].tolist(),
        None, [1] * 6,
    ),
    "layer": ("--layer stages.2.0", lambda f: f.grad_cam[0][2], "stages.3.0", "stages.2.0"),
    "num_masks": ("--num_masks 3", lambda f: f.error_map[0][4], 8, 3, PRE),
    "seed": ("--seed 4", lambda f: f.error_map[0][3], 0, 4, PRE),
    "model": (
        "--model tests.tiny:fcmae64",
        lambda f: next(f.error_map[0][0].parameters()).dtype,
        torch.float32, torch.float64, PRE,
    ),
    "head": ("--head mlp", lambda f: True, True, "refused"),
    "heads": ("--heads main=mlp@norm", lambda f: True, True, "refused"),
    "model_key": (
        "--model_key model_ema", lambda f: f.read_source[1].key, "model|module|state_dict",
        "model_ema", f"all.pth --images images {MODEL}",
    ),
    "use_ema": (
        "--use_ema", lambda f: "ema" in f.read_source[1].key, False, True,
        f"all.pth --images images {MODEL}",
    ),
    "model_prefix": (
        "--model_prefix net.", lambda f: True, "refused", True,
        f"all.pth --images images {MODEL} --model_key wrapped",
    ),
    "sha256": (f"--sha256 {'0' * 64}", lambda f: True, True, "refused"),
    "device": ("--device auto", lambda f: f.init_distributed_mode[0][0], "cpu", "auto"),
    "input_size": (
        "--input_size 24 32", lambda f: tuple(images(f).shape[2:]), (16, 16), (24, 32),
    ),
    "crop_pct": ("--crop_pct 0.5", lambda f: f.reading_loader[0][0].crop_pct, None, 0.5),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std false", lambda f: f.loader.mean[0], 0.485, 0.5,
    ),
    "mean": ("--mean 0.1 --std 1", lambda f: f.loader.mean, [0.485, 0.456, 0.406], [0.1] * 3),
    "std": ("--mean 0.1 --std 0.3", lambda f: f.loader.std, [0.229, 0.224, 0.225], [0.3] * 3),
    "value_range": (
        "--value_range 0 510", lambda f: f.loader.loader.dataset.value_range, None, (0.0, 510.0),
    ),
    "image_column": (
        "--image_column second", lambda f: f.files[0], "images/ant/00.png", "images/bee/01.png",
        f"it.pth --images rows.csv --image_root images {MODEL}",
    ),
    "image_root": (
        "--image_root images", lambda f: True, "refused", True,
        f"it.pth --images rows.csv {MODEL}",
    ),
    "split_column": (
        "--split_column part", lambda f: len(f.files), 2, 1,
        f"it.pth --images rows.csv --image_root images {MODEL}",
    ),
    "on_bad_image": (
        "--on_bad_image skip", lambda f: f.loader.loader.dataset.on_bad, "error", "leave out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flag", EXPLAIN)
def test_flag_of_explain_acts(flag, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words, look, before, after, *base = EXPLAIN[flag]
    base = f"{base[0] if base else FINE} --device cpu --output {tmp_path}/a.png"
    found = []
    full = f"{words[2:]} --device cpu --output {tmp_path}/a.png"
    for line in (base, full if words.startswith("= ") else f"{base} {words}"):
        try:
            found.append(look(drawn(line, monkeypatch)))
            picture = Path("b.png") if "b.png" in line else tmp_path / "a.png"
            assert Image.open(picture).width > 300
            picture.unlink()
        except UserError:
            found.append("refused")
    assert found == [before, after]


def test_every_flag_of_explain_is_tried():
    flags = {action.dest for action in views.explain_parser()._actions} - {"help"}
    assert {*EXPLAIN} == flags


def captions(words: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the text and the path below each image and each map."""
    with monkeypatch.context() as context:
        found, picture = [], torch.zeros(3, 1, 1)
        context.setattr(explain, "draw_images", lambda *words: found.append(words) or picture)
        context.setattr(visualize, "save", lambda *words: None)
        drawn(f"{words} --device cpu", context)
    _, texts, paths, *_ = found[0]
    return [*zip(texts, paths, strict=True)]


def test_explanations_tell_image_and_true_class(place, monkeypatch):
    """With class folders half of the captions were the same."""
    monkeypatch.chdir(place)
    found = captions(f"{FINE} --target bee", monkeypatch)
    names = [f"{name}/{n:02d}.png" for n, name in enumerate(("ant", "bee", "cat", "ant"))]
    expected = [(f"true: {name[:3]}", f"images/{name}") for name in (*names[::3], names[1])]
    assert found[0:6:2] == expected
    assert all(text.startswith("bee 0.") and not path for text, path in found[1::2])


def test_labels_that_are_not_of_the_checkpoint_are_no_true_classes(place, tmp_path, monkeypatch):
    """Of a folder 2026 the class is not 2026; images without labels need none."""
    write_images(tmp_path, ["ant/0.png", "2026/1.png"])
    write_images(tmp_path / "loose", ["ant/0.png", "1.png"])  # which class folders leave out
    monkeypatch.chdir(place)
    for images, count in ((tmp_path, 4), (tmp_path / "loose", 2), (tmp_path / "ant", 1)):
        found = captions(f"it.pth --images {images} {MODEL}", monkeypatch)
        assert [text for text, _ in found[::2]] == [""] * count
    rows = ["image,label", "ant/00.png,ant|bee", "bee/01.png,"]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    words = f"multi.pth --images {tmp_path}/rows.csv --image_root images {MODEL}"
    texts = [text for text, _ in captions(words, monkeypatch)[::2]]
    assert texts == ["true: ant|bee", "true: -"]


def test_views_of_the_checkpoint_are_not_explained(place, tmp_path, monkeypatch):
    """With five crops the image was five times as high."""
    monkeypatch.chdir(place)
    views = {"tta": ["five_crop"], "crop_pct": 0.5}
    save_checkpoint(tmp_path / "a.pth", args=views)
    words = f"{tmp_path}/a.pth --images images {MODEL} --device cpu --output {tmp_path}/a.png"
    assert images(drawn(words, monkeypatch)).shape == (6, 3, 16, 16)


def test_wrong_explanations_are_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    base = "--device cpu --output a.png"
    for words, message in {
        f"it.pth {MODEL}": "--images is missing; give images, or all that --data_path takes",
        f"{FINE} --target dog": "--target dog: it.pth has no such class. Known: ant, bee, cat",
        f"{FINE} --target 3": "--target 3: it.pth has no such class",
        f"{FINE} --num_masks 3": "--num_masks is for pre-trained models with a decoder, which it",
        f"{PRE} --target ant": "--target is for classifiers, which pre.pth is not; drop it",
        f"{PRE} --num_masks 1": "--num_masks 1: 3 of 4 patches are hidden at a time, so 2 masks",
    }.items():
        with pytest.raises(UserError, match=message):
            drawn(f"{words} {base}", monkeypatch)
    with pytest.raises(SystemExit):
        views.parse_explain([])
    assert "the following arguments are required: CHECKPOINT" in capsys.readouterr().err


@pytest.mark.parametrize("words", [FINE, f"{PRE} --images images"])
def test_pictures_do_not_replace_images_that_are_explained(words, place, monkeypatch):
    monkeypatch.chdir(place)
    held = Path("images/ant/00.png").read_bytes()
    with pytest.raises(UserError, match="would overwrite images/ant/00.png, an input"):
        drawn(f"{words} --device cpu --output images/ant/00.png", monkeypatch)
    assert Path("images/ant/00.png").read_bytes() == held
    with pytest.raises(SystemExit):  # nor a checkpoint
        drawn(f"{words} --device cpu --output it.pth", monkeypatch)
