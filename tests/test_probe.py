# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""probe.py: each sub-command with toy images, its flags, its cache, and bad input."""

import csv
import json
import os
import re
import shutil
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import probe
from config import flags, probe_flags
from data_loading.rng import fold_in
from errors import UserError
from insight import drawing, feature_cache
from insight.evaluators import Labeled
from insight.feature_cache import FeatureCache
from models import create_model
from tests import tiny
from tests.groups import run_script
from tests.test_docs import commands
from training import frozen
from weights import files

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("blue", "green", "red")


def photo(number: int) -> Image.Image:
    """A noisy image that is bright in the channel of its class."""
    random = np.random.default_rng(fold_in(7, number))
    pixels = random.integers(0, 90, (18, 18, 3), dtype=np.uint8)
    pixels[..., 2 - number % 3] += 150
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, and images in class folders: 24 to train on and 9 to evaluate."""
    folder = tmp_path_factory.mktemp("probe")
    for part, numbers in (("train", range(24)), ("val", range(24, 33))):
        for number in numbers:
            path = folder / "photos" / part / CLASSES[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(number).save(path)
    shutil.copy(folder / "photos/train/blue/3.png", folder / "photos/val/red/copy.png")
    torch.manual_seed(0)
    model = tiny.classifier(num_classes=5, stem_stride=1)
    run = {"input_size": (16, 16), "crop_pct": 1.0, "in_chans": 3}
    torch.save({"model": model.state_dict(), "args": run}, folder / "tiny.pth")
    large = tiny.classifier(num_classes=5, stem_stride=1)
    wrapped = {f"net.{name}": value for name, value in model.state_dict().items()}
    weights = {"model_ema": large.state_dict(), "other": wrapped, "model": model.state_dict()}
    torch.save(weights | {"args": run}, folder / "several.pth")
    return folder


@pytest.fixture(autouse=True)
def in_place(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SUFFIXES = {"accuracy": ".json", "features": ".npy", "duplicates": ".csv", "outliers": ".csv"}
COMMON = "--model tests.tiny:classifier --stem_stride 1 --data_path photos --device cpu"
COMMON += " --num_workers 0 --batch_size 8"


def run(words: str, data: Path | str = "photos", common: str = COMMON) -> None:
    """Run a sub-command, of tiny.pth if the words name no other checkpoint."""
    view, *rest = words.split()
    if not any(word.endswith(".pth") for word in rest[:1]):
        rest = ["tiny.pth", *rest]
    view, args = probe_flags.parse_probe(
        [view, *rest, *common.replace("photos", str(data)).split()]
    )
    probe.VIEWS[view](args)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- sub-commands ---------------------------------------------------------------------------------


def test_probes_of_separable_classes_find_them(tmp_path, capsys):
    out = tmp_path / "new/folder/r.json"
    run(f"accuracy --k 3 --fractions 1 0.5 --output {out}")
    found = json.loads(out.read_text())
    assert (found["train_images"], found["val_images"], found["classes"]) == (24, 10, 3)
    assert found["chance"] == pytest.approx(30)  # 3 of 10 are blue, as is the first of equals
    rows = found["results"]
    assert [(row["probe"], row["images"]) for row in rows] == [
        (name, images) for images in (24, 12) for name in ("knn", "linear", "logistic")
    ]
    assert all(row["score"] == 90 for row in rows[:3])  # the copy has a wrong class
    # Wilson's interval, which is not empty at 100%.
    assert rows[0]["standard_error"] == pytest.approx(100 * (0.009 + 1 / 400) ** 0.5 / 1.1)
    said = capsys.readouterr().out
    assert "tiny.pth on photos: 10 features, 24 training and 10 evaluation images" in said
    assert re.search(r"knn +24  90.00% ± 9.75 +k 3, temperature 0.07", said)


def test_top5_counts_the_five_best_of_many_classes():
    labels = torch.arange(28) % 7
    sets = [Labeled(torch.eye(7)[labels], labels)] * 2
    sets[1] = Labeled(sets[1].features, (labels + (labels == 0)).clone())  # a seventh is wrong
    args = Namespace(k=4, temperature=0.07, seed=0)
    found = [probe.run_probe(name, *sets, "class", args) for name in ("knn", "linear")]
    assert [row["score"] for row in found] == pytest.approx([600 / 7] * 2)
    assert all(row["score"] <= row["top5"] <= 100 for row in found)


def test_order_of_probes_does_not_depend_on_the_flag(tmp_path):
    run(f"accuracy --k 3 --probes linear knn --output {tmp_path}/r.json")
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["probe"] for row in found] == ["knn", "linear"]


def test_files_of_features_have_the_same_rows(tmp_path):
    for suffix in ("npy", "safetensors", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        run(f"features --split all --output {tmp_path}/f.{suffix}")
    rows, features = read_csv(tmp_path / "f-rows.csv"), np.load(tmp_path / "f.npy")
    assert features.shape == (34, 10)
    assert rows[0] == {
        "row": "0",
        "image": "photos/train/blue/0.png",
        "part": "train",
        "label": "0",
        "class": "blue",
    }
    assert rows[-1]["image"].startswith("photos/val/red/")
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("features"), features)
        assert file.get_tensor("labels").tolist() == [int(row["label"]) for row in rows]
        about = file.metadata()
    assert json.loads(about["images"]) == [row["image"] for row in rows]
    assert json.loads(about["classes"]) == [row["class"] for row in rows]
    assert about["checkpoint"] == "tiny.pth"
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["image", "part", "label", "class", "feature"]
    assert np.array_equal(np.stack(table["feature"].to_numpy()), features)
    assert table.schema.metadata[b"checkpoint"] == b"tiny.pth"


def test_features_are_the_input_of_the_classifier(tmp_path):
    run(f"features --output {tmp_path}/f.npy")
    model = tiny.classifier(num_classes=5, stem_stride=1).eval()
    model.load_state_dict(torch.load("tiny.pth")["model"])
    pixels = np.asarray(Image.open("photos/train/blue/0.png").resize((16, 16), 3)) / 255
    image = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    image = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(image), pre_logits=True)
    first = torch.from_numpy(np.load(tmp_path / "f.npy")[:1])
    torch.testing.assert_close(first, expected, atol=0.02, rtol=0.02)  # of the resize


def test_neighbors_have_the_class_of_the_image(tmp_path, capsys):
    run(f"neighbors --k 2 --num_images 3 --output {tmp_path}/n.png")
    assert "n.png: 3 images with 2 neighbors each" in capsys.readouterr().out
    picture = Image.open(tmp_path / "n.png").convert("RGB")
    assert picture.width > 3 * 112
    frames = {color for count, color in picture.getcolors(1 << 24) if count > 500}
    assert (0x2F, 0x8F, 0x4E) in frames  # the green of the same class
    assert (0xC8, 0x40, 0x2F) not in frames
    run(f"neighbors --k 24 --split val --num_images 1 --output {tmp_path}/m.png")  # all of train


def test_neighbors_are_those_of_images_of_all_the_data(tmp_path, monkeypatch):
    """The first images of a sorted folder are of one class."""
    seen, real = [], probe.drawing.draw_grid
    monkeypatch.setattr(probe.drawing, "draw_grid", lambda *w: seen.append(w[0]) or real(*w))
    run(f"neighbors --k 2 --num_images 3 --output {tmp_path}/n.png")
    assert [row[0].lines[0] for row in seen[0]] == [*CLASSES]


def test_other_processes_write_no_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "is_main_process", lambda: False)
    run(f"accuracy --k 3 --output {tmp_path}/r.json")
    assert "chance" not in capsys.readouterr().out
    assert not (tmp_path / "r.json").exists()


def test_groups_of_duplicates_are_in_order(tmp_path):
    shutil.copytree("photos", tmp_path / "data")
    for copy, of in (("blue/a", "blue/0"), ("blue/b", "blue/0"), ("red/c", "red/2")):
        train = tmp_path / "data/train"
        shutil.copy(train / f"{of}.png", train / f"{copy}.png")
    run(f"duplicates --threshold 0.9999 --output {tmp_path}/d.csv", tmp_path / "data")
    assert [row["group"] for row in read_csv(tmp_path / "d.csv")] == ["1", "1", "1", "2"]


@pytest.mark.parametrize("view", ["neighbors --k 2", "duplicates --split all", "outliers --k 2"])
def test_pictures_tell_which_image_is_where(view, tmp_path, monkeypatch):
    """Files of several classes may have one name."""
    grids, real = [], drawing.draw_grid
    monkeypatch.setattr(drawing, "draw_grid", lambda *words: grids.append(words[0]) or real(*words))
    words = f"{view} --threshold 0.9999" if "duplicates" in view else view
    run(f"{words} --output {tmp_path}/a.{'png' if 'neighbors' in view else 'csv'}")
    cells = [cell for row in grids[0] for cell in row]
    assert len(cells) > 1
    assert all(re.fullmatch(r"photos/(train|val)/[a-z]+/\w+\.png", cell.path) for cell in cells)
    if "duplicates" in view:
        assert [cell.lines[1] for cell in cells] == ["train", "val"]


def test_copies_in_train_and_val_are_found(tmp_path, capsys):
    run(f"duplicates --split all --threshold 0.9999 --output {tmp_path}/d.csv")
    assert "1 pair in 1 group of 34 images" in (said := capsys.readouterr().out)
    assert "1 pair across train and val; 1 pair with two classes" in said
    (row,) = read_csv(tmp_path / "d.csv")
    assert (row["image_1"], row["part_1"]) == ("photos/train/blue/3.png", "train")
    assert (row["image_2"], row["class_2"]) == ("photos/val/red/copy.png", "red")
    assert float(row["similarity"]) == pytest.approx(1)
    assert Image.open(tmp_path / "d.png").width > 200
    run(f"duplicates --threshold 0.99999 --output {tmp_path}/none.csv")
    assert "none.csv: no pair of 24 images" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_image_that_is_unlike_the_others_comes_first(place, tmp_path, capsys):
    shutil.copytree("photos", tmp_path / "data")
    Image.new("RGB", (18, 18), "white").save(tmp_path / "data/train/red/white.png")
    shutil.copy("photos/train/red/2.png", tmp_path / "data/train/green/red.png")
    run(f"outliers --k 2 --output {tmp_path}/o.csv", tmp_path / "data")
    rows = read_csv(tmp_path / "o.csv")
    assert (len(rows), rows[0]["image"]) == (26, f"{tmp_path}/data/train/red/white.png")
    values = [float(row["distance"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert [row["rank"] for row in rows] == [str(n + 1) for n in range(26)]
    assert sum(float(row["same_class"]) for row in rows) > 20
    run(f"features --output {tmp_path}/f.npy", tmp_path / "data")
    x = torch.from_numpy(np.load(tmp_path / "f.npy"))
    x = torch.nn.functional.normalize(x - x.mean(0))
    similar = (x @ x.T).fill_diagonal_(-2)  # an image is not its own neighbor
    near, places = similar.topk(2)
    assert values == pytest.approx(sorted((1 - near[:, 1]).tolist(), reverse=True), abs=1e-5)
    own = {row["image"]: row["class"] for row in read_csv(tmp_path / "f-rows.csv")}
    classes = [*own.values()]
    for image, found in zip(own, places.tolist(), strict=True):
        (row,) = (row for row in rows if row["image"] == image)
        same = sum(classes[place] == own[image] for place in found) / 2
        assert float(row["same_class"]) == same
    assert "0.500" in {row["same_class"] for row in rows}


def test_map_and_selectivity_are_drawn(tmp_path, capsys):
    run(f"map --split all --output {tmp_path}/m.png")
    assert re.search(r"m.png: 34 images, PC 1 \(\d+% of variance\)", capsys.readouterr().out)
    run(f"selectivity --output {tmp_path}/s.png")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("stages.")]
    assert [row[:2] for row in rows] == [[f"stages.{n}.0", str(4 * (4 + 2 * n))] for n in range(4)]
    assert all(0 < float(row[3]) < 1 for row in rows)
    for name in ("m", "s"):
        assert Image.open(tmp_path / f"{name}.png").width > 200


def test_columns_of_the_selectivity_are_those_of_the_head(tmp_path, monkeypatch, capsys):
    index = torch.tensor([0.0, 0.1, 0.8])
    monkeypatch.setattr(probe, "summarize", lambda means: [(name, index, 2) for name in means])
    run(f"selectivity --layers stages.0 --output {tmp_path}/s.png")
    head, row = (line.split() for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert head == ["layer", "channels", "silent", "mean", "median", "over", "0.5"]
    assert row == ["stages.0.0", "16", "2", "0.300", "0.100", "33.3%"]


def test_images_without_labels_are_enough_for_all_but_probes(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(6):
        photo(number).save(tmp_path / f"flat/{number}.png")
    flat = tmp_path / "flat"
    for words, name in (("features", "f.npy"), ("duplicates", "d.csv"), ("map", "m.png")):
        run(f"{words} --output {tmp_path}/{name}", flat)
        assert (tmp_path / name).exists()
    assert "label" not in read_csv(tmp_path / "f-rows.csv")[0]
    run(f"features --val_split 0.5 --split all --output {tmp_path}/f.npy", flat)
    parts = [row["part"] for row in read_csv(tmp_path / "f-rows.csv")]
    assert set(parts) == {"train", "val"}
    assert len(parts) == 6
    with pytest.raises(UserError, match="no class folders"):
        run("selectivity", flat)


# --- checkpoints ----------------------------------------------------------------------------------


def test_pretrained_encoder_and_library_weights_have_features(tmp_path, monkeypatch):
    """The encoder of pre-training has no final norm, and other networks other heads."""
    torch.manual_seed(0)
    fcmae = create_model("fcmae_convnextv2_atto", stem_stride=1, patch_size=8)
    saved = {"model": "convnextv2_atto", "stem_stride": 1, "input_size": (16, 16)}
    torch.save({"model": fcmae.state_dict(), "args": saved}, tmp_path / "pre.pth")
    name = "timm:mobilenetv3_small_050"
    weights = create_model(name).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: weights)
    rest = f"--data_path photos --device cpu --num_workers 0 --max_images 4 --output {tmp_path}"
    for source, size, width in ((tmp_path / "pre.pth", "16", 320), (name, "32", 1024)):
        words = f"features {source} --input_size {size} {rest}/f.npy"
        probe.write_features(probe_flags.parse_probe(words.split())[1])
        found = np.load(tmp_path / "f.npy")
        assert found.shape == (4, width)
        assert np.isfinite(found).all()


def test_network_without_forward_features_gives_the_input_of_its_classifier(tmp_path):
    torch.manual_seed(0)
    model = tiny.other(5)
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    words = f"features {tmp_path}/other.pth --model tests.tiny:other --input_size 16 "
    words += f"--data_path photos --device cpu --num_workers 0 --output {tmp_path}/f.npy"
    probe.write_features(probe_flags.parse_probe(words.split())[1])
    assert np.load(tmp_path / "f.npy").shape == (24, 8)


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def extracted(monkeypatch) -> list[str]:
    """The parts whose features are computed, and not read."""
    seen, real = [], frozen.extract

    def extract(model: Any, batches: Any, *rest: Any) -> Any:
        seen.append("features")
        return real(model, batches, *rest)

    monkeypatch.setattr(frozen, "extract", extract)
    return seen


def test_sub_commands_share_features_until_something_changes(tmp_path, extracted, place):
    out = f"--output {tmp_path}"
    for words in (f"features {out}/f.npy", f"map {out}/m.png", f"features {out}/g.parquet"):
        run(words)
    assert len(extracted) == 1
    assert list((tmp_path / "cache/convnextv2/features").iterdir())
    changes = (
        "several.pth --use_ema",
        "--layer stages.1",
        "--input_size 24",
        "--crop_pct 0.5",
        "--mean 0 --std 1",
        "--value_range 0 300",
        "--amp bf16",
        "--max_images 5",
        "--split val",
    )
    for number, words in enumerate(changes, 2):
        run(f"features {words} {out}/f.npy")
        assert len(extracted) == number, words
    run(f"features several.pth {out}/f.npy")  # the same weights in another file
    assert len(extracted) == len(changes) + 1
    path = place / "photos/train/red/2.png"
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    run(f"features {out}/f.npy")
    assert len(extracted) == len(changes) + 2


def test_key_is_the_same_in_every_process(tmp_path, monkeypatch):
    """The text of a transform held the address of a function."""
    keys, real = [], FeatureCache.read

    def read(self: FeatureCache, key: dict) -> Any:
        keys.append(key)
        return real(self, key)

    monkeypatch.setattr(FeatureCache, "read", read)
    run(f"features --output {tmp_path}/f.npy --input_size 64 --crop_pct 0.875 --max_images 2")
    assert "_crop_ends" in keys[0]["transform"]
    assert " 0x" not in json.dumps(keys[0])


def test_cache_lies_where_the_flag_says_or_is_off(tmp_path, extracted):
    for words in (f"--feature_cache {tmp_path}/own", "--feature_cache none"):
        for _ in range(2):
            run(f"features --output {tmp_path}/f.npy {words}")
    assert len(extracted) == 3
    assert len(list((tmp_path / "own").iterdir())) == 1
    assert not (tmp_path / "cache/convnextv2/features").exists()


def test_features_of_files_that_change_meanwhile_are_not_cached(tmp_path, monkeypatch, capsys):
    answers = iter(["before", "after"])
    monkeypatch.setattr(feature_cache, "hash_images", lambda data: next(answers))
    run(f"features --output {tmp_path}/f.npy")
    assert "not cached, since files have changed meanwhile" in capsys.readouterr().out
    assert list((tmp_path / "cache/convnextv2/features").iterdir()) == []


def test_data_set_of_code_is_not_cached(tmp_path, extracted, capsys):
    for _ in range(2):
        run(f"features --output {tmp_path}/f.npy --data_set tests.tiny:colors")
    assert len(extracted) == 2
    assert "not cached, since the data set lists neither" in capsys.readouterr().out


def test_activities_are_cached_too(tmp_path, monkeypatch, capsys):
    run(f"selectivity --output {tmp_path}/a.png")
    first = capsys.readouterr().out
    monkeypatch.setattr(frozen.ClassMeans, "count", None)
    run(f"selectivity --output {tmp_path}/b.png")
    table = [line for line in first.splitlines() if line.startswith("stages")]
    assert [s for s in capsys.readouterr().out.splitlines() if s.startswith("stages")] == table
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --- bad input ------------------------------------------------------------------------------------


def make_bad_data(folder: Path) -> None:
    for name, classes in (("one", ["red"]), ("others", ["red", "fox"])):
        for part in ("train", "val"):
            for kind in classes if part == "val" or name == "one" else ["red", "blue"]:
                (folder / name / part / kind).mkdir(parents=True)
                photo(len(kind)).save(folder / name / part / kind / "1.png")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("accuracy --k 25", "k 25: there are only 24 images to find neighbors among; lower k"),
        ("accuracy --k 13 --fractions 0.5", "only 12 images .* at fraction 0.5; lower k"),
        ("neighbors --k 24", "k 24: there are only 23 images"),
        ("neighbors --k 25 --split val", "k 25: there are only 24 images"),
        ("outliers --split all --k 34", "k 34: there are only 33 images"),
        ("accuracy --data ONE", "train: all images are of one class, 'red', so there is nothing"),
        ("selectivity --data ONE", "train: all images are of one class, 'red'"),
        ("accuracy --k 1 --data OTHERS", "val has classes that train does not know: fox"),
        ("features --data EMPTY", "no class folders|no images"),
        ("map --max_images 2", "a map of 2 images says nothing"),
        ("features --layer stages.7", "--layer: unknown block 'stages.7'. Did you mean 'stages"),
        ("features --layer head", "--layer head: the classifier is not used"),
        ("selectivity --layers head", "--layers head: the classifier is not used"),
        ("selectivity --layers blok", "--layers: unknown block 'blok'. Blocks: downsample"),
        ("features none.pth", "checkpoint none.pth does not exist"),
        ("features decoder.pth", "decoder.pth: .*"),
        ("features nan.pth", "nan.pth holds NaN or Inf"),
    ],
)
def test_bad_input_is_refused_before_features_are_computed(
    words, problem, tmp_path, monkeypatch, place
):
    make_bad_data(tmp_path)
    state = torch.load("tiny.pth")
    decoder = {"decoder.0.dwconv.weight": torch.zeros(3, 1, 7, 7), "mask_token": torch.zeros(1)}
    torch.save(state | {"model": decoder}, place / "decoder.pth")
    weights = {name: value / 0 if "pwconv1" in name else value for name, value in
               state["model"].items()}  # fmt: skip
    torch.save(state | {"model": weights}, place / "nan.pth")
    monkeypatch.chdir(place)
    words, _, name = words.partition(" --data ")
    monkeypatch.setattr(frozen, "_cached", None)
    with pytest.raises(UserError, match=problem):
        run(words, tmp_path / name.lower() if name else "photos")


def test_features_that_are_not_finite_are_named(tmp_path):
    saved = torch.load("tiny.pth")
    saved["model"]["norm.weight"].fill_(3e38)
    torch.save(saved, tmp_path / "large.pth")
    with pytest.raises(UserError, match=r"features of 24 images hold NaN or Inf \(photos/train/bl"):
        run(f"features {tmp_path}/large.pth --output {tmp_path}/f.npy")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "map c.pth --data_path d --output a.jpg",
            "got 'a.jpg', expected a name that ends",
        ),
        ("features c.pth --data_path d --output a.csv", "ends in .npy or .safetensors or .parquet"),
        ("c.pth", "--data_path is missing"),
        (
            "neigbors c.pth --data_path d",
            "unknown sub-command 'neigbors'. Did you mean 'neighbors'",
        ),
        ("map timm:resnet18 --data_path d --use_ema", "--use_ema is for a file of weights"),
        ("c.pth --data_path d --eval_data_path a=x,b=y", "give one set"),
        ("c.pth --data_path d --fractions 1.5", "expected a number in"),
        ("map c.pth --data_path d --k 3", "unrecognized argument '--k'"),
        ("duplicates c.pth --data_path d --threshold 2", "expected a number in"),
        ("c.pth --data_path d --feature_cache p.png", "is a file; give a folder, or none"),
        ("c.pth --data_path d --probes linear --k 5", "--k is for --probes knn, which is not"),
        ("c.pth --data_path d --mean 0.5", "--mean and --std belong together"),
        ("--data_path d", "required: CHECKPOINT"),
    ],
)
def test_wrong_flags_are_refused_at_once(words, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.png").touch()
    with pytest.raises(SystemExit):
        probe_flags.parse_probe(words.split())
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("view", "output", "lost"),
    [
        ("map", "photos/train/{}", "photos/train/{}"),
        ("duplicates", "a.csv", "a.csv"),
        ("features", "a.npy", "a-rows.csv"),
        ("selectivity", "photos/train/{}", "photos/train/{}"),
    ],
)
def test_inputs_are_not_overwritten(view, output, lost, tmp_path, monkeypatch, place):
    """A table of labels was replaced by the rows of the features."""
    shutil.copytree(place / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    first = sorted((tmp_path / "photos/train").rglob("*.png"))[0]
    name = first.relative_to(tmp_path / "photos/train")
    output, lost, data = output.format(name), lost.format(name), "photos"
    if lost.endswith(".csv"):
        rows = [f"{path},{path.parent.name}" for path in (tmp_path / "photos/train").rglob("*.png")]
        Path(lost).write_text("\n".join(["image,label", *rows]))
        data = lost
    held = Path(lost).read_bytes()
    with pytest.raises(UserError, match=f"would overwrite {lost}, an input; give another name"):
        run(f"{view} {place}/tiny.pth --split train --output {output}", data)
    assert Path(lost).read_bytes() == held


def test_missing_packages_are_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("insight.feature_files.find_spec", lambda name: None)
    monkeypatch.setattr("insight.embedding.find_spec", lambda name: None)
    for words, package in (
        (f"features --output {tmp_path}/f.parquet", "pyarrow"),
        (f"map --method umap --output {tmp_path}/m.png", "umap-learn"),
    ):
        with pytest.raises(UserError, match=f"pip install {package}"):
            run(words)


def test_numbers_are_probed_by_regression_and_not_by_logistic(tmp_path):
    lines = ["image,label,split"]
    for number in range(18):
        photo(number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number % 3 + 0.25},{'val' if number > 11 else 'train'}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    words = "accuracy --task regression"
    run(f"{words} --k 3 --output {tmp_path}/r.json", tmp_path / "t.csv")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["score"] == "R squared"
    assert [row["probe"] for row in found["results"]] == ["knn", "linear"]
    assert all(row["score"] > 80 for row in found["results"])
    with pytest.raises(UserError, match="--probes logistic needs one class per image"):
        run(f"{words} --probes logistic", tmp_path / "t.csv")


# --- flags ----------------------------------------------------------------------------------------


# sub-command -> flag -> words; with them the sub-command does other things than without.
TABLE = "--data_path rows.csv"
ACTS: dict[str, dict[str, str]] = {
    "accuracy": {
        "probes": "--probes knn", "k": "--k 2", "temperature": "--temperature 3",
        "fractions": "--fractions 0.5", "output": "--output other.json",
    },
    "features": {
        "output": "--output other.npy", "split": "--split val", "layer": "--layer stages.1",
        "checkpoint": "several.pth --use_ema", "max_images": "--max_images 7",
        "data_path": "--data_path photos/val", "data_set": "--data_set DIGITS",
        "eval_data_path": "--split val --eval_data_path photos/train",
        "val_split": "--data_path photos/train --val_split 0.3",
        "image_column": f"{TABLE} --image_column other",
        "label_column": f"{TABLE} --label_column kind",
        "image_root": f"{TABLE} --image_root photos", "task": f"{TABLE} --task multi_label",
        "split_column": f"{TABLE} --split_column use",
        "on_bad_image": "--data_path broken --on_bad_image skip",
        "nb_classes": "--data_set tests.test_probe:nameless --nb_classes 3",
        "input_size": "--input_size 24", "crop_pct": "--crop_pct 0.5",
        "imagenet_default_mean_and_std": "--imagenet_default_mean_and_std false",
        "mean": "--mean 0.1 --std 1", "std": "--mean 0.1 --std 2",
        "value_range": "--value_range 0 300", "in_chans": "--in_chans 1",
        "model": "--model tests.tiny:other", "stem_stride": "--stem_stride 2",
        "model_key": "several.pth --model_key model_ema",
        "use_ema": "several.pth --use_ema",
        "model_prefix": "several.pth --model_key other --model_prefix net.",
        "sha256": f"--sha256 {'0' * 64}", "amp": "--amp bf16", "device": "--device cuda:77",
        "seed": "--max_images 7 --seed 1",
    },
    "neighbors": {"k": "--k 3", "num_images": "--num_images 2", "split": "--split val",
                  "center": "--center false"},
    "duplicates": {"threshold": "--threshold 0.5", "num_images": "--threshold 0 --num_images 1",
                   "center": "--threshold 0.5 --center false"},
    "outliers": {"k": "--k 3", "num_images": "--num_images 2", "center": "--center false"},
    "map": {"method": "--method tsne"},
    "selectivity": {"layers": "--layers stages.2", "split": "--split val"},
}  # fmt: skip
# Flags that other tests show to act: where the cache lies, files that list images, speed.
ELSEWHERE = {"feature_cache", "data_index", "batch_size", "num_workers"}
# Words without which a flag has nothing to act on.
BASES = {
    "seed": "--max_images 7", "std": "--mean 0.1 --std 1", "use_ema": "several.pth",
    "model_key": "several.pth", "eval_data_path": "--split val", "task": TABLE,
    "image_column": TABLE, "label_column": TABLE, "image_root": TABLE, "split_column": TABLE,
    "on_bad_image": "--data_path broken", "val_split": "--data_path photos/train",
    "nb_classes": "--data_set tests.test_probe:nameless",
    "model_prefix": "several.pth --model_key other",
    "duplicates center": "--threshold 0.5", "duplicates num_images": "--threshold 0",
}  # fmt: skip


class Nameless(torch.utils.data.Dataset):
    """Images with labels but without names of classes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return photo(index), index % 3


def nameless(data_path: str, train: bool) -> Nameless:
    """`Nameless`, whatever the path."""
    return Nameless()


@pytest.fixture(scope="module")
def sources(place) -> None:
    rows = ["image,other,label,kind,use,split"]
    for n in range(6):
        name = f"train/{CLASSES[n % 3]}/{n}.png"
        other = f"train/{CLASSES[(n + 1) % 3]}/{n + 1}.png"
        shutil.copy(place / "photos" / name, place / f"{n}.png")
        (place / Path(name).parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(place / "photos" / name, place / name)
        shutil.copy(place / "photos" / other, place / f"o{n}.png")
        use = "val" if n > 3 else "train"
        rows.append(f"{n}.png,o{n}.png,{n % 3},{n % 2},{use},train")
        photo(n + 100).save(place / "photos" / f"{n}.png")
    (place / "rows.csv").write_text("\n".join(rows))
    shutil.copytree(place / "photos/train", place / "broken")
    (place / "broken/red/bad.png").write_bytes(b"no image")


@pytest.mark.parametrize(("view", "flag"), [(v, f) for v, rows in ACTS.items() for f in rows])
def test_flag_acts(view, flag, sources):
    base = BASES.get(f"{view} {flag}", BASES.get(flag, ""))
    seen = [see(view, words) for words in (base, ACTS[view][flag])]
    assert seen[0] != seen[1]


def see(view: str, words: str) -> Any:
    """Run a sub-command; returns the files that it writes, or its error."""
    folder = Path("out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rest, source = words.split(), "tiny.pth"
    if rest and rest[0].endswith(".pth"):
        source = rest.pop(0)
    common = COMMON + (" --k 4" if view in ("accuracy", "outliers", "neighbors") else "")
    given = {word for word in rest if word.startswith("--")}
    kept, pairs = [], common.split()
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        kept += [] if name in given else [name, value]
    output = [] if "--output" in given else ["--output", f"{view}{SUFFIXES.get(view, '.png')}"]
    try:
        _, args = probe_flags.parse_probe([view, source, *kept, *rest, *output])
        args = args.replace(output=str(folder / args.output), feature_cache="none")
        probe.VIEWS[view](args)
    except (UserError, SystemExit) as error:
        return str(error)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("view", probe_flags.AIMS)
def test_every_flag_has_a_row(view):
    """Those that all sub-commands have are tested with one of them."""
    names = {action.dest for action in probe_flags.probe_parser(view)._actions} - {"help"}
    own = {row[0].removeprefix("--") for row in probe_flags.ROWS[view]}
    shared = {"output", "layer", "split"}
    assert own - shared <= set(ACTS[view])
    assert names - own <= {*ACTS["features"], *ELSEWHERE}
    assert set(ACTS[view]) <= names
    assert set(probe_flags.AIMS) == set(probe.VIEWS) == set(ACTS)
    assert flags.library_of("timm:resnet18") == "timm"


@pytest.mark.slow
@pytest.mark.parametrize("view", ["features", "selectivity"])
def test_two_processes_give_the_same_bytes(view, place, tmp_path):
    words = f"{view} {place}/tiny.pth {COMMON}".replace("photos", f"{place}/photos").split()
    suffix = SUFFIXES.get(view, ".png")
    for ranks in (1, 2):
        out = "--feature_cache", tmp_path / f"{ranks}", "--output", tmp_path / f"{ranks}{suffix}"
        run_script("probe.py", *words, *out, ranks=ranks, folder=tmp_path)
    assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


# --- documentation --------------------------------------------------------------------------------


@pytest.fixture
def of_the_docs(tmp_path, place, monkeypatch) -> None:
    """A folder with the runs and photos that docs/probe.md names; hubs give weights of ours."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "photos/train", "photos")  # README: labeled has train/ and val/
    shutil.copytree(place / "photos", "labeled")
    torch.manual_seed(0)
    atto = create_model("convnextv2_atto", num_classes=10).state_dict()
    run = {"model": "convnextv2_atto", "input_size": (32, 32)}
    for name in ("digits", "digits_labeled", "photos"):
        Path("runs", name).mkdir(parents=True)
        torch.save({"model": atto, "args": run}, f"runs/{name}/checkpoint-4.pth")
    resnet = create_model("timm:resnet18").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: resnet)
    real, own = files.locate, Path("runs/photos/checkpoint-4.pth")
    monkeypatch.setattr(
        files, "locate", lambda x, *rest: own if str(x).startswith("hf-hub") else real(x, *rest)
    )


@pytest.mark.slow
def test_commands_of_the_documentation_run(of_the_docs, capsys):
    """With small networks, and without training them."""
    page = ROOT / "docs/probe.md"
    found = [words[2:] for words in commands(page) if words[:2] == ["python", "probe.py"]]
    assert {words[0] for words in found} >= set(probe_flags.AIMS) - {"accuracy"}
    for words in found:
        few = ["--k", "3", "--fractions", "1", "0.5"]  # the test has only 24 photos
        more = few * (words[0] not in probe_flags.AIMS and "DIGITS" not in words)
        view, args = probe_flags.parse_probe(
            [*words, *more, "--num_workers", "0", "--device", "cpu"]
        )
        if vars(args).get("method") == "tsne" and not find_spec("sklearn"):
            with pytest.raises(UserError, match="pip install scikit-learn"):
                probe.draw_map(args)
            continue
        probe.VIEWS[view](args)
        written = args.output or ""
        assert not written or Path(written).stat().st_size > 500
    assert "chance" in capsys.readouterr().out
