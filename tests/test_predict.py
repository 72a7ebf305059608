# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""predict.py: files, order, labels, bad images, interruptions and processes."""

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import predict
from config import parser as options
from config import predict_flags
from errors import UserError
from insight.predictions import cell
from models import create_model
from tests import fakes, tiny
from tests.groups import TIME_LIMIT_S, exit_codes, start_script
from training import prediction_eval, worst_images

CLASSES = ["ant", "bee", "cat"]
ARGS = {
    "model": "tests.tiny:classifier", "in_chans": 3, "stem_stride": 1, "input_size": [16, 16],
    "loss": "ce", "task": "classification", "head": "", "heads": "",
}  # fmt: skip
BASE = "--model tests.tiny:classifier --device cpu --num_workers 0 --kernels torch --batch_size 4"


def save_checkpoint(path: Path, outputs: int = 3, names=CLASSES, **changes) -> Path:
    torch.manual_seed(0)
    model = tiny.classifier(num_classes=outputs, stem_stride=1, head_init_scale=100.0)
    held = {"model": model.state_dict(), "args": {**ARGS, **changes.pop("args", {})}}
    torch.save({**held, "classes": names, "outputs": outputs, **changes}, path)
    return path


def write_images(root: Path, names: list[str]) -> None:
    noise = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pixels = pixels // 2 + 100 * (np.arange(3) == noise.integers(3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, class folders with a file that is no image, and the same images in others."""
    folder = tmp_path_factory.mktemp("predict")
    save_checkpoint(folder / "it.pth")
    names = [f"{CLASSES[n % 3]}/{n:02d}.png" for n in range(11)]
    write_images(folder / "labeled", names)
    (folder / "labeled/cat/05.png").write_bytes(b"no image")
    shutil.copytree(folder / "labeled/ant", folder / "flat")
    rows = ["image,label", *(f"{name},{name[:3]}" for name in reversed(names))]
    (folder / "rows.csv").write_text("\n".join(rows))
    with tarfile.open(folder / "shard.tar", "w") as file:
        for name in names[:4]:
            file.add(folder / "labeled" / name, name)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def run(words: str) -> list[str]:
    """Run predict.py in this process; returns its log lines."""
    with fakes.logged() as messages:
        predict.main(predict_flags.parse(f"{words} {BASE}".split()))
    return messages


def results(words: str, out: Path) -> list[dict]:
    run(f"{words} --output {out} --overwrite")
    return json.loads(out.read_text())


def paths(found: list[dict]) -> list[str]:
    return [row["path"] for row in found]


# --- predictions ----------------------------------------------------------------------------------


def test_predictions_are_those_of_main_finetune(place, tmp_path):
    """The same preprocessing, weights, classes and probabilities as in --eval."""
    words = (
        f"--eval --resume {place}/it.pth --eval_data_path labeled --on_bad_image skip --device cpu "
        f"--hook predictions --output_dir {tmp_path} --num_workers 0 --kernels torch --tta hflip "
        "--model tests.tiny:classifier"
    )
    main_finetune.main(options.parse(options.finetune_parser(), words.split()))
    expected = [*csv.DictReader((tmp_path / "predictions.csv").open())]
    run(f"it.pth labeled --output {tmp_path}/r.csv --tta hflip")
    found = [row for row in csv.DictReader((tmp_path / "r.csv").open()) if not row["error"]]
    assert [{name: row[name] for name in expected[0]} for row in found] == expected
    assert len({row["prediction"] for row in found}) > 1
    assert len(expected) == 10


def test_probabilities_are_those_of_a_loop_in_plain_pytorch(place, tmp_path):
    (found,) = results("it.pth flat/00.png --mean 0.5 --std 0.25", tmp_path / "r.json")
    model = tiny.classifier(num_classes=3, stem_stride=1).eval()
    model.load_state_dict(torch.load(place / "it.pth", weights_only=True)["model"])
    pixels = torch.from_numpy(np.array(Image.open("flat/00.png"))).permute(2, 0, 1)[None]
    whole = torch.nn.functional.interpolate(
        pixels, (16, 16), mode="bicubic", antialias=True, align_corners=False
    )
    with torch.no_grad():
        chances = model((whole / 255 - 0.5) / 0.25).softmax(1)[0]
    order = chances.argsort(descending=True).tolist()
    assert [found[f"class_{n}"] for n in (2, 3)] == [CLASSES[n] for n in order[1:]]
    assert found["prediction"] == CLASSES[order[0]]
    assert found["probability"] == pytest.approx(chances.max().item(), rel=1e-4)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_all_formats_agree(suffix, tmp_path):
    expected = results("it.pth labeled", tmp_path / "r.json")
    out = tmp_path / f"r.{suffix}"
    run(f"it.pth labeled --output {out} --overwrite")
    if suffix == "csv":
        found = [*csv.DictReader(out.open())]
        expected = [{name: cell(value) for name, value in row.items()} for row in expected]
    elif suffix == "jsonl":
        found = [json.loads(line) for line in out.open()]
    else:
        found = pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
    assert found == expected


def test_unreadable_images_are_listed_in_their_place(tmp_path):
    found = results("it.pth labeled", tmp_path / "r.json")
    names = [
        f"labeled/{path.relative_to('labeled')}" for path in sorted(Path("labeled").rglob("*.png"))
    ]
    assert paths(found) == names
    (bad,) = [row for row in found if row["error"]]
    assert bad["path"] == "labeled/cat/05.png"
    assert "not an image" in bad["error"]
    assert bad["prediction"] is bad["loss"] is None


def test_a_batch_of_unreadable_images_alone(tmp_path):
    """It has no tensors, and the batches after it must keep their numbers."""
    (tmp_path / "x").mkdir()
    for number in range(10):
        path = tmp_path / "x" / f"{number}.png"
        path.write_bytes(b"no image") if 4 <= number < 8 else shutil.copy("flat/00.png", path)
    found = results(f"it.pth {tmp_path}/x", tmp_path / "r.json")
    assert [row["error"] is None for row in found] == [True] * 4 + [False] * 4 + [True] * 2
    assert len({row["probability"] for row in found}) == 2


@pytest.mark.parametrize("labeled", [False, True])
def test_inputs_without_any_image_that_can_be_used_are_an_error(tmp_path, labeled):
    """The exit code was 0, so a script went on; the results say why."""
    folder = tmp_path / "x" / "ant" if labeled else tmp_path / "x"
    folder.mkdir(parents=True)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    with pytest.raises(UserError, match="x: no image could be used; the column error says why"):
        run(f"it.pth {tmp_path}/x --output {tmp_path}/r.json")
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert "single pixel" in found["error"]
    assert found["prediction"] is None


# --- inputs ---------------------------------------------------------------------------------------


def test_inputs_are_taken_in_order(tmp_path):
    """Rows of a table were sorted by name."""
    out = tmp_path / "r.json"
    table = results("it.pth rows.csv --labels false --image_root labeled", out)
    assert paths(table) == [f"labeled/{CLASSES[n % 3]}/{n:02d}.png" for n in reversed(range(11))]
    found = results("it.pth flat/09.png flat/0[36].png shard.tar flat/00.png", out)
    assert paths(found) == [
        "flat/09.png", "flat/03.png", "flat/06.png", "shard.tar/ant/00.png", "shard.tar/ant/03.png",
        "shard.tar/bee/01.png", "shard.tar/cat/02.png", "flat/00.png",
    ]  # fmt: skip


def test_paths_on_standard_input(tmp_path, monkeypatch):
    """Missing files are skipped like those that cannot be read."""
    text = b"flat/03.png\n\nflat/none.png\r\nflat/00.png\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    found = results("it.pth -", tmp_path / "r.json")
    assert paths(found) == ["flat/03.png", "flat/none.png", "flat/00.png"]
    assert "No such file" in found[1]["error"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    with pytest.raises(UserError, match="standard input names no image"):
        run("it.pth -")


def test_folders_with_parts_are_taken_as_a_whole(tmp_path):
    """`photos` with train/ and val/: the training images alone would be predicted."""
    write_images(tmp_path, ["x/train/ant/1.png", "x/val/ant/2.png"])
    found = results(f"it.pth {tmp_path}/x", tmp_path / "r.json")
    assert [path[-9:] for path in paths(found)] == ["ant/1.png", "ant/2.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("it.pth none.png", "INPUT none.png: no such file or folder"),
        ("it.pth x/*.jpg", r"INPUT x/\*.jpg: no file matches this pattern"),
        ("it.pth flat --labels true", "flat has no class folders; expected"),
        ("it.pth flat --topk 2 --threshold 0.5", "--threshold is for --task multi_label, which it"),
        ("it.pth flat --label_column x", "--label_column: flat has no columns; drop it"),
        ("it.pth flat --output flat", "unknown suffix|--output flat"),
        ("it.pth flat --model tests.tiny:classifier --input_size 4", "use larger images"),
    ],
)
def test_wrong_commands_are_refused(words, message, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        run(words)
    assert re.search(message, f"{caught.value} {capsys.readouterr().err}")


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no images"):
        run(f"it.pth {tmp_path}")


# --- checkpoints ----------------------------------------------------------------------------------


def test_pre_trained_weights_are_refused_with_what_to_do(tmp_path):
    model = tiny.fcmae(3, 1, 0.0, patch_size=8, decoder_embed_dim=8)
    torch.save({"model": model.state_dict(), "args": {**ARGS, "mask_ratio": 0.6}}, tmp_path / "a")
    with pytest.raises(UserError, match="has no classifier, as after pre-training; fine-tune it"):
        run(f"{tmp_path}/a flat")
    backbone = create_model("convnextv2_atto", num_classes=0).state_dict()
    torch.save({"model": backbone}, tmp_path / "b.pth")
    words = f"{tmp_path}/b.pth flat --device cpu"
    with pytest.raises(UserError, match="has no classifier"):
        predict.main(predict_flags.parse(words.split()))


def test_classes_without_names_are_numbers_and_a_line_says_so(tmp_path):
    save_checkpoint(tmp_path / "a.pth", names=None)
    lines = run(f"{tmp_path}/a.pth flat --output {tmp_path}/r.json")
    assert f"{tmp_path}/a.pth stores no class names; their numbers are shown, 0 to 2" in lines
    found = json.loads((tmp_path / "r.json").read_text())
    assert {row["prediction"] for row in found} <= {"0", "1", "2"}


def test_published_weights_of_1000_classes_have_the_names_of_imagenet(tmp_path):
    path = save_checkpoint(tmp_path / "a.pth", outputs=1000, names=None)
    held = torch.load(path, weights_only=True)
    del held["outputs"]  # that runs of this toolkit store
    torch.save(held, path)
    lines = run(f"{path} flat --output {tmp_path}/r.json --topk 1000")
    assert f"{path} stores no class names; those of ImageNet are shown" in lines
    row = json.loads((tmp_path / "r.json").read_text())[0]
    names = {x for name, x in row.items() if name.startswith("class_")} | {row["prediction"]}
    assert len(names) == 1000
    assert {"tench", "crane", "crane (2)"} <= names


def test_networks_of_libraries_bring_their_preprocessing(tmp_path, monkeypatch):
    """The file of `timm:NAME` alone would be read as a ConvNeXt."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    flags = {"input_size": (3, 64, 64), "crop_pct": 0.5, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    monkeypatch.setattr("weights.library._read_timm", lambda *words: ("tag", state, flags))
    loaded = []
    real = predict.load_trained
    monkeypatch.setattr(predict, "load_trained", lambda *a: loaded.append(real(*a)) or loaded[-1])
    words = f"timm:resnet18 flat --device cpu --num_workers 0 --output {tmp_path}/r.json"
    predict.main(predict_flags.parse(words.split()))
    flags = loaded[0].flags
    assert (flags.input_size, flags.crop_pct, flags.mean[0]) == ((64, 64), 0.5, 0.1)
    assert loaded[0].head.count == 7
    assert len(json.loads((tmp_path / "r.json").read_text())) == 4
    with pytest.raises(UserError, match="--use_ema is for files, and timm:resnet18 is a name"):
        predict.main(predict_flags.parse([*words.split()[:-2], "--use_ema"]))


# --- tasks ----------------------------------------------------------------------------------------


def test_several_classes(tmp_path):
    save_checkpoint(tmp_path / "a.pth", args={"task": "multi_label", "loss": "bce"})
    (tmp_path / "a.csv").write_text(
        f"image,tags\n{os.getcwd()}/flat/00.png,ant|cat\n{os.getcwd()}/flat/03.png,\n"
    )
    out = tmp_path / "r.json"
    first, second = results(f"{tmp_path}/a.pth {tmp_path}/a.csv --label_column tags", out)
    assert (first["target"], second["target"]) == (["ant", "cat"], [])
    likely = {first[f"class_{n}"] for n in (1, 2, 3) if first[f"probability_{n}"] >= 0.5}
    assert {*first["prediction"]} == likely
    assert first["class_3"]
    stats = json.loads((tmp_path / "r-metrics.json").read_text())
    assert {"map", "f1", "exact_match", "loss"} <= {*stats}
    low = results(f"{tmp_path}/a.pth flat --threshold 0.0001", out)
    assert all(len(row["prediction"]) == 3 for row in low)


def test_numbers_are_predicted_in_the_units_of_the_data(tmp_path):
    scale = {"mean": [100.0, 0.0], "std": [10.0, 1.0]}
    task = {"task": "regression", "loss": "l2"}
    words = {"outputs": 2, "names": ["w", "h"], "args": task, "target_scale": scale}
    save_checkpoint(tmp_path / "a.pth", **words)
    save_checkpoint(tmp_path / "b.pth", **words | {"target_scale": None})
    (tmp_path / "a.csv").write_text(f"image,h,w\n{os.getcwd()}/flat/00.png,2,90\n")
    out = tmp_path / "r.json"
    labels = f"{tmp_path}/a.csv --label_column h w"
    (row,) = results(f"{tmp_path}/a.pth {labels}", out)
    (bare,) = results(f"{tmp_path}/b.pth {tmp_path}/a.csv --labels false", tmp_path / "s.json")
    assert (row["target_w"], row["target_h"]) == (90, 2)
    assert row["prediction_w"] == pytest.approx(100 + 10 * bare["prediction_w"], rel=1e-4)
    assert row["prediction_h"] == pytest.approx(bare["prediction_h"], rel=1e-4)
    stats = json.loads((tmp_path / "r-metrics.json").read_text())
    errors = [row[f"prediction_{n}"] - row[f"target_{n}"] for n in "wh"]
    assert stats["mae"] == pytest.approx(sum(map(abs, errors)) / 2, rel=1e-4)
    with pytest.raises(UserError, match="--topk is for classes, and .* predicts numbers"):
        run(f"{tmp_path}/a.pth flat --topk 2")
    assert "--topk 4: all 3 classes of it.pth are listed" in run("it.pth flat --topk 4")


# --- labels ---------------------------------------------------------------------------------------


def test_labels_that_are_classes_of_the_checkpoint_make_an_evaluation(tmp_path):
    lines = run(f"it.pth labeled --output {tmp_path}/r.csv")
    rows = [row for row in csv.DictReader((tmp_path / "r.csv").open()) if row["target"]]
    right = [row["target"] == row["prediction"] for row in rows]
    stats = json.loads((tmp_path / "r-metrics.json").read_text())
    assert stats["acc1"] == pytest.approx(100 * sum(right) / 10)
    assert stats["loss"] == pytest.approx(sum(float(row["loss"]) for row in rows) / 10, rel=1e-5)
    assert any(line.startswith("labeled: top-1 ") and line.endswith("10 images") for line in lines)
    table = [*csv.DictReader((tmp_path / "r-classes.csv").open())]
    assert [row["class"] for row in table] == CLASSES
    assert [int(row["images"]) for row in table] == [4, 4, 2]
    matrix = [*csv.reader((tmp_path / "r-confusion.csv").open())]
    assert sum(int(matrix[n + 1][n + 1]) for n in range(3)) == sum(right)
    bins = [*csv.DictReader((tmp_path / "r-calibration.csv").open())]
    assert sum(int(row["images"]) for row in bins) == 10
    assert [*bins[1].values()][:2] == ["6.67", "13.33"]
    used = [row for row in bins if int(row["images"])]
    assert all(float(r["from"]) <= float(r["confidence"]) <= float(r["to"]) for r in used)
    gaps = [int(r["images"]) * abs(float(r["confidence"]) - float(r["accuracy"])) for r in used]
    assert stats["ece"] == pytest.approx(sum(gaps) / 10, rel=1e-4)
    for name in ("calibration", "worst"):
        assert Image.open(tmp_path / f"r-{name}.png").width > 200


@pytest.mark.parametrize("name", ["own.csv", "own-classes.csv"])
def test_inputs_are_never_overwritten(name, tmp_path):
    """The labels of a table would be lost."""
    images = Path("labeled").resolve().rglob("*.png")
    text = "image,label\n" + "".join(f"{path},cat\n" for path in images)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"would overwrite .*{name}, an input; give another name"):
        run(f"it.pth {tmp_path / name} --output {tmp_path}/own.csv --overwrite")
    assert (tmp_path / name).read_text() == text


def test_pictures_of_an_evaluation_do_not_replace_images_of_the_input(tmp_path):
    shutil.copytree("labeled", tmp_path / "d")
    image = next((tmp_path / "d").rglob("*.png"))
    own = image.replace(image.with_name("r-worst.png")).read_bytes()
    out = image.with_name("r.csv")
    with pytest.raises(UserError, match="would overwrite .*r-worst.png, an input"):
        run(f"it.pth {tmp_path}/d --output {out} --overwrite")
    assert image.with_name("r-worst.png").read_bytes() == own
    rows = results(f"it.pth {tmp_path}/d", out.with_name("s.json"))  # not a picture
    assert len(rows) == 11


def test_an_evaluation_next_to_its_images_can_be_continued_and_repeated(tmp_path, monkeypatch):
    """Its own pictures were taken for inputs."""
    shutil.copytree("labeled", tmp_path / "d")
    words = f"it.pth {tmp_path}/d --output {tmp_path}/d/r.csv"
    with monkeypatch.context() as context:
        context.setattr(prediction_eval, "draw_rows", None)
        with pytest.raises(TypeError):
            run(words)
    assert (tmp_path / "d/r-calibration.png").exists()
    run(words)
    assert (tmp_path / "d/r-worst.png").exists()
    run(f"{words} --overwrite")


def test_files_of_an_earlier_evaluation_do_not_stay_next_to_other_results(tmp_path):
    run(f"it.pth labeled --output {tmp_path}/r.csv")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"r-metrics.json", "r-worst.png"} < names
    with pytest.raises(UserError, match="r.csv exists"):
        run(f"it.pth flat --output {tmp_path}/r.csv")
    run(f"it.pth flat --output {tmp_path}/r.csv --overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]


def test_labels_that_match_by_position_are_offered(tmp_path):
    """The advice was to give data with as many class folders, which it had."""
    path = save_checkpoint(tmp_path / "nameless.pth", names=None)
    said = "the classes of INPUT match those of .* only by position; if that is right, give --lab"
    assert any(re.search(said, line) for line in run(f"{path} labeled"))
    assert any("top-1" in line for line in run(f"{path} labeled --labels true"))


def test_worst_images_are_named_with_their_folder(tmp_path, monkeypatch):
    """Files of several classes may have one name."""
    drawn, real = [], worst_images.draw_images

    def draw(*words: object) -> torch.Tensor:
        drawn.append(words)
        return real(*words)

    monkeypatch.setattr(worst_images, "draw_images", draw)
    rows = results("it.pth labeled --num_worst 3", tmp_path / "r.json")
    rows = sorted((row for row in rows if row["target"]), key=lambda row: -row["loss"])[:3]
    _, texts, paths, *_ = drawn[0]
    assert [*paths] == [row["path"] for row in rows]
    assert [text.splitlines()[0] for text in texts] == [f"true: {row['target']}" for row in rows]


def test_labels_of_other_classes_are_not_used_unless_asked_for(tmp_path):
    write_images(tmp_path, ["x/dog/1.png", "x/ant/2.png"])
    lines = run(f"it.pth {tmp_path}/x")
    (line,) = [line for line in lines if line.startswith("predictions alone, no evaluation")]
    assert not [line for line in run("it.pth flat") if line.startswith("predictions alone")]
    assert "classes that it.pth does not know: dog" in line
    assert "To evaluate, give images with labels of these classes" in line
    write_images(tmp_path, ["y/train/ant/1.png", "y/val/ant/2.png"])
    lines = run(f"it.pth {tmp_path}/y")
    assert "give its subfolder val" in " ".join(lines)
    with pytest.raises(UserError, match="does not know: dog"):
        run(f"it.pth {tmp_path}/x --labels true")


def test_a_table_whose_labels_are_not_found_is_named(tmp_path):
    """It was predicted without an evaluation, and without a word about --label_column."""
    (tmp_path / "a.csv").write_text(
        f"image,species,size\n{Path('labeled/ant/00.png').absolute()},ant,3\n"
    )
    (line,) = [line for line in run(f"it.pth {tmp_path}/a.csv") if "no evaluation" in line]
    assert "name those of the labels with --label_column" in line


def test_labels_can_be_ignored(tmp_path):
    found = results("it.pth labeled --labels false", tmp_path / "r.json")
    assert "target" not in found[0]
    assert not (tmp_path / "r-metrics.json").exists()


def test_without_a_file_the_first_images_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(predict, "SHOWN", 3)
    lines = run("it.pth labeled --labels false --topk 1")
    assert "the first 3 of 11 images; --output results.csv predicts and writes all of them" in lines
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["path", "prediction", "probability"]
    assert [line.split()[0] for line in shown[1:]] == [f"labeled/ant/0{n}.png" for n in (0, 3, 6)]


# --- interruptions and processes ------------------------------------------------------------------


class Killed(BaseException):
    """As by SIGKILL: nothing is cleaned up."""


def killed_at(number: int, words: str) -> None:
    """Run until a part is to be written."""
    real = predict.Parts.write

    def write(self, part, *rest):
        if part == number:
            raise Killed
        real(self, part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict.Parts, "write", write)
        with pytest.raises(Killed):
            run(words)


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_command_continues_bit_for_bit(after, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PART", 4)
    names = [f"a.{suffix}", "a-metrics.json", "a-confusion.csv", "a-worst.png", "a-calibration.csv"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    run(f"it.pth labeled --output {tmp_path}/whole/a.{suffix}")
    words = f"it.pth labeled --output {tmp_path}/killed/a.{suffix}"
    killed_at(after, words)
    with pytest.raises(UserError, match="other arguments: topk 5 .now 2."):
        run(f"{words} --topk 2")
    lines = run(words)
    assert f"{tmp_path}/killed/a.{suffix}: continues after {4 * after} of 11 images" in lines
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))
    with pytest.raises(UserError, match="exists; choose another --output"):
        run(words)


def test_other_images_do_not_continue(tmp_path, monkeypatch):
    """A run with another --image_root, or another archive, was mixed with the first one."""
    monkeypatch.setattr(predict, "PART", 4)
    for root in ("a", "b"):
        shutil.copytree("labeled", tmp_path / root)
    names = [path.relative_to("labeled") for path in sorted(Path("labeled").rglob("*.png"))]
    (tmp_path / "t.csv").write_text("\n".join(["image", *map(str, names)]))
    words = (
        f"it.pth {tmp_path}/t.csv --output {tmp_path}/r.csv --labels false --image_root {tmp_path}"
    )
    killed_at(1, f"{words}/a")
    with pytest.raises(UserError, match="other arguments: image_root"):
        run(f"{words}/b")
    (tmp_path / "t.csv").write_text("\n".join(["image", *map(str, names)]) + "\n")
    with pytest.raises(UserError, match="other arguments: files"):
        run(f"{words}/a")
    lines = run(f"{words}/b --overwrite true")
    assert not [line for line in lines if "continues after" in line]


def test_metrics_of_all_outputs_continue_too(tmp_path, monkeypatch):
    """`map` needs the outputs of the parts before the interruption."""
    monkeypatch.setattr(predict, "PART", 4)
    save_checkpoint(tmp_path / "a.pth", args={"task": "multi_label", "loss": "bce"})
    names = [path for path in sorted(Path("labeled").rglob("*.png")) if path.name != "05.png"]
    rows = [f"{path.absolute()},{'|'.join(CLASSES[: n % 4])}" for n, path in enumerate(names)]
    (tmp_path / "a.csv").write_text("\n".join(["image,tags", *rows]))
    words = f"{tmp_path}/a.pth {tmp_path}/a.csv --label_column tags --output {tmp_path}"
    run(f"{words}/whole.json")
    killed_at(2, f"{words}/killed.json")
    run(f"{words}/killed.json")
    for name in (".json", "-metrics.json"):
        whole, killed = (tmp_path / f"{each}{name}" for each in ("whole", "killed"))
        assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_change_of_the_loader_processes_loses_no_image(tmp_path, monkeypatch):
    """They are restarted with the images that are left."""
    expected = results("it.pth labeled", tmp_path / "r.json")
    changes = iter([2, 1])

    def after_batch(self, plan, *words):
        return replace(plan, workers=next(changes, plan.workers))

    monkeypatch.setattr(predict.Tuner, "after_batch", after_batch)
    monkeypatch.setattr("datasets.first_workers", lambda: 1)
    words = BASE.replace("--num_workers 0 ", "").replace("batch_size 4", "batch_size 2")
    predict.main(predict_flags.parse(f"it.pth labeled {words} --output {tmp_path}/s.json".split()))
    assert next(changes, None) is None
    found = json.loads((tmp_path / "s.json").read_text())
    assert paths(found) == paths(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["error"] == other["error"]
        if not one["error"]:
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(place, tmp_path):
    for ranks, workers in ((1, 0), (2, 0), (3, 1)):
        (tmp_path / str(ranks)).mkdir()
        words = ["it.pth", "labeled", "--output", tmp_path / str(ranks) / "a.csv", *BASE.split()]
        words += ["--num_workers", workers]
        run_here("predict.py", words, ranks, tmp_path, place)
    for name in sorted(os.listdir(tmp_path / "1")):
        for ranks in "23":
            assert (tmp_path / ranks / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "2")) == sorted(os.listdir(tmp_path / "1"))


def fatal(**kwargs) -> torch.nn.Module:
    """A classifier that ends its process at a call, without any clean-up: FATAL=3."""
    network, calls = tiny.classifier(**kwargs), iter(range(1, 10**6))

    def count(*words: object) -> None:
        if next(calls) == int(os.environ.get("FATAL", "0")):
            os.kill(os.getpid(), signal.SIGKILL)

    network.register_forward_hook(count)
    return network


@pytest.mark.slow
def test_after_a_kill_another_number_of_processes_continues(place, tmp_path):
    names = sorted(path for path in Path("labeled").rglob("*.png"))
    rows = [f"{names[n % 11].absolute()},{names[n % 11].parent.name}" for n in range(2300)]
    (tmp_path / "a.csv").write_text("\n".join(["image,label", *rows]))
    base = ["it.pth", tmp_path / "a.csv", "--device", "cpu", "--num_workers", 0, "--kernels"]
    base += ["torch", "--batch_size", 128, "--model", "tests.test_predict:fatal", "--output"]
    (tmp_path / "whole").mkdir()
    run_here("predict.py", [*base, tmp_path / "whole/r.csv"], 1, tmp_path, place)
    outputs = [(tmp_path / f"killed-{rank}.txt",) * 2 for rank in range(2)]
    words = [*base, tmp_path / "killed/r.csv"]
    processes = start_script("predict.py", words, outputs, {"FATAL": "7"}, cwd=place)
    assert -signal.SIGKILL in exit_codes(processes, TIME_LIMIT_S)
    assert not (tmp_path / "killed/r.csv").exists()
    said = run_here("predict.py", words, 1, tmp_path, place)
    assert "continues after 1024 of 2300 images" in said
    for name in sorted(os.listdir(tmp_path / "whole")):
        whole, killed = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert killed.read_bytes() == whole.read_bytes()


def run_here(script: str, words: list, ranks: int, folder: Path, cwd: Path, expect: int = 0) -> str:
    outputs = [folder / f"output-{ranks}-{rank}.txt" for rank in range(ranks)]
    processes = start_script(script, words, [(each, each) for each in outputs], cwd=cwd)
    codes = exit_codes(processes, TIME_LIMIT_S)
    assert codes == [expect] * ranks, "\n".join(each.read_text() for each in outputs)
    return outputs[0].read_text()
