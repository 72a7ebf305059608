# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every flag of the scripts that do not train acts, as in tests/test_flags_act.py."""

import argparse
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import datasets
import export
import pack
import visualize
from config import checks, flags
from config import parser as options
from data_loading.sources import DatasetSpec, open_images
from data_loading.transforms import mean_and_std
from errors import UserError
from models import create_model
from tests import tiny
from tests.parallel.test_submit import SBATCH
from weights.convert import to_official, to_timm

RUN = {
    "mask_ratio": 0.75, "drop_path": 0.0, "in_chans": 3, "stem_stride": 1, "input_size": (32, 32),
    "patch_size": 8, "decoder_depth": 1, "decoder_embed_dim": 8, "norm_pix_loss": True, "seed": 0,
    "epochs": 2, "crop_pct": None, "imagenet_default_mean_and_std": False, "on_bad_image": "error",
    "model": "tests.tiny:fcmae", "data_set": "tests.test_tool_flags_act:some", "data_path": "here",
    "data_index": "",
}  # fmt: skip
COUNTS = {"here": 26, "there": 20}


def some(data_path: str, train: bool) -> tiny.Colors:
    """As many images as belong to the path."""
    return tiny.Colors(COUNTS[data_path] if train else 7)


def one(data_path: str, train: bool) -> torch.utils.data.Dataset:
    """One black image."""
    return torch.utils.data.TensorDataset(torch.zeros(1, 3, 32, 32), torch.zeros(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Checkpoints in a folder, which becomes the current one."""
    folder = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    small, large = tiny.classifier(num_classes=3), tiny.classifier(num_classes=3, stem_stride=2)
    wrapped = {f"net.{name}": weight for name, weight in large.state_dict().items()}
    weights = {"model": small.state_dict(), "model_ema": large.state_dict(), "other": wrapped}
    torch.save(weights | {"args": RUN, "classes": ["a", "b", "c"]}, folder / "classifier.pth")
    shape = {name: RUN[name] for name in ("norm_pix_loss", "patch_size", "decoder_embed_dim")}
    for name in ("first", "second"):
        model = tiny.fcmae(in_chans=3, stem_stride=1, drop_path_rate=0, mask_ratio=0.75, **shape)
        torch.save({"model": model.state_dict(), "args": RUN}, folder / f"{name}.pth")
    (folder / "names.txt").write_text("x\ny\nz\n")
    (folder / "photos").mkdir()
    (folder / "more").mkdir()
    for name in ("one.png", "photos/two.png", "more/one.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    rows = ["image,other,part", "one.png,photos/two.png,val", "one.png,photos/two.png,train"]
    (folder / "rows.csv").write_text("\n".join(rows))
    return folder


# --- export.py ------------------------------------------------------------------------------------


def parse(words: str) -> argparse.Namespace:
    args = options.export_parser().parse_args(words.split())
    assert not list(checks.export_problems(args))
    return args


def spec(words: str) -> export.ExportSpec:
    return export.build_spec(parse(words))


def exported(words: str) -> list[str]:
    before = set(os.listdir())
    export.main(parse(words))
    new = sorted(set(os.listdir()) - before)
    for name in new:
        os.unlink(name)
    return new


def replaced(words: str) -> bool:
    old = Path("old.safetensors")
    old.write_bytes(b"")
    export.main(parse(f"{words} --output {old}"))
    return old.stat().st_size > 0


def stride(words: str) -> int:
    return spec(words).shape["stem_stride"]


# flag -> (words, what to look at, its value without them, its value with them[, words for both])
Row = tuple
OWN = "--to safetensors"
EXPORT: dict[str, Row] = {
    "to": ("--to official", exported, ["convnextv2.safetensors"], ["convnextv2-official.pth"], OWN),
    "output": (
        "--output a.safetensors", exported, ["convnextv2.safetensors"], ["a.safetensors"], OWN,
    ),
    "overwrite": ("--overwrite", replaced, "refused", True, OWN),
    "labels": ("--labels names.txt", lambda w: spec(w).labels, ["a", "b", "c"], ["x", "y", "z"]),
    "half": ("--half", lambda w: spec(w).half, False, True, "--to onnx"),
    "opset": ("--opset 20", lambda w: spec(w).opset, 17, 20, "--to onnx"),
    "model_key": ("--model_key model_ema", stride, 4, 2),
    "use_ema": ("--use_ema", stride, 4, 2),
    "model_prefix": (
        "--model_prefix net.", stride, "refused", 2, "--to hf --model_key other",
    ),
    "sha256": (f"--sha256 {'0' * 64}", stride, 4, "refused"),
    "model": (
        "--model tests.tiny:classifier",
        lambda w: type(spec(w).network).__name__,
        "NoneType",
        "ConvNeXtV2",
        "--to onnx --model_key model",
    ),
    "head": ("--head mlp", stride, 4, "refused"),  # the run's own alone is accepted
    "heads": ("--heads main=mlp@norm", stride, 4, "refused"),
    "input_size": ("--input_size 64", lambda w: spec(w).size, (32, 32), (64, 64)),
    "crop_pct": ("--crop_pct 0.5", lambda w: spec(w).crop_pct, None, 0.5),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std true",
        lambda w: (spec(w).mean, spec(w).std),
        mean_and_std(3, False),
        mean_and_std(3, True),
    ),
    "mean": (
        "--mean 0.1 0.2 0.3 --std 1", lambda w: spec(w).mean, [0.5] * 3, [0.1, 0.2, 0.3],
    ),
    "value_range": ("--value_range 0 9", lambda w: spec(w).value_range, None, [0.0, 9.0]),
    "std": ("--mean 0.1 --std 0.3", lambda w: spec(w).std, [0.5] * 3, [0.3] * 3),
}  # fmt: skip


@pytest.mark.parametrize("flag", EXPORT)
def test_flag_of_export_acts(flag, place, monkeypatch):
    monkeypatch.chdir(place)
    words, look, before, after, *base = EXPORT[flag]
    base = f"classifier.pth {base[0] if base else '--to hf'}"
    seen = []
    for line in base, f"{base} {words}":
        try:
            seen.append(look(line))
        except UserError:
            seen.append("refused")
    assert seen == [before, after]


# --- visualize.py ---------------------------------------------------------------------------------


def drawn(words: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Draw; returns what was made for it."""
    found = SimpleNamespace()

    def keep(name: str, module: Any = visualize) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(found, name, (args, real(*args, **kwargs)))
            return getattr(found, name)[1]

        monkeypatch.setattr(module, name, call)

    with monkeypatch.context() as monkeypatch:
        for name in ("ReconstructionImages", "init_distributed_mode", "build_fcmae"):
            keep(name)
        keep("build_spec", datasets)
        visualize.main(options.visualize_parser().parse_args(words.split()))
    found.drawing = found.ReconstructionImages[1]
    return found


def weight(found: SimpleNamespace) -> float:
    return found.build_fcmae[1].encoder.stages[0][0].pwconv1.weight.sum().item()


def images(found: SimpleNamespace) -> int:
    return len(found.drawing.images)


def data(found: SimpleNamespace) -> int:
    return len(found.ReconstructionImages[0][1])


def files(found: SimpleNamespace) -> list[str]:
    return [path for path, _ in getattr(found.ReconstructionImages[0][1], "samples", ())]


ROWS = "--images rows.csv"  # without another flag: one.png, twice
NAMES = "--model tests.tiny:fcmae --data_set tests.test_tool_flags_act:some"
VISUALIZE: dict[str, Row] = {
    "checkpoint": ("--checkpoint second.pth", weight),
    "images": (
        "--images one.png photos one.png",
        files, [], ["one.png", "photos/two.png", "one.png"],
    ),
    "input_size": (
        "--input_size 16 24",
        lambda found: tuple(found.drawing.images.shape[2:]), (32, 32), (16, 24),
    ),
    "mask_ratio": ("--mask_ratio 0.3", lambda found: int(found.drawing.mask[0].sum()), 12, 5),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std true", lambda found: found.drawing.mean[0], 0.5, 0.485,
    ),
    "value_range": (
        "--value_range 0 510", lambda found: found.drawing.loader.loader.dataset.value_range,
        None, (0.0, 510.0),
    ),
    "num_images": ("--num_images 3", images, 8, 3),
    "split": ("--split val", data, 26, 7),
    "model": (
        "--model tests.tiny:fcmae64",
        lambda found: found.build_fcmae[1].mask_token.dtype,
        torch.float32,
        torch.float64,
    ),
    "data_set": ("--data_set tests.test_tool_flags_act:one", data, 26, 1),
    "data_path": ("--data_path there", data, 26, 20),
    "eval_data_path": (
        "--eval_data_path e", lambda found: found.build_spec[1].eval_data_path, None, "e",
    ),
    "image_column": (f"{ROWS} --image_column other", files, [], ["photos/two.png"] * 2),
    "image_root": (f"{ROWS} --image_root more", files, [], ["more/one.png"] * 2),
    "split_column": (f"{ROWS} --split_column part", files, [], ["one.png"]),
    "on_bad_image": (
        "--on_bad_image skip", lambda found: found.drawing.loader.loader.dataset.on_bad,
        "error", "replace",
    ),
    "device": ("--device auto", lambda found: found.init_distributed_mode[0], ("cpu",), ("auto",)),
    "seed": ("--seed 1", lambda found: found.drawing.mask.tolist()),
}  # fmt: skip


@pytest.mark.parametrize("flag", VISUALIZE)
def test_flag_of_visualize_acts(flag, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words, look, *expected = VISUALIZE[flag]
    base = f"--checkpoint first.pth --output {tmp_path}/a.png --device cpu {NAMES}"
    seen = [look(drawn(f"{base} {more}", monkeypatch)) for more in ("", words)]
    assert seen == expected if expected else seen[0] != seen[1]
    assert Image.open(tmp_path / "a.png").width > 100


def make_sources() -> dict[str, list[str]]:
    """Write two images into each kind of source; returns the names in it, by its own."""
    with zipfile.ZipFile("a.zip", "w") as file:
        for name in ("val/x/1.png", "train/x/2.png"):
            file.write("one.png", name)
    with tarfile.open("b.tar", "w") as file:
        for name in ("1.png", "2.png"):
            file.add("one.png", name)
    Path("c.csv").write_text("image,split\none.png,val\nphotos/two.png,train\n")
    shutil.copy("one.png", "scan")
    return {
        "a.zip": ["a.zip/train/x/2.png"], "b.tar": ["b.tar/1.png", "b.tar/2.png"],
        "c.csv": ["photos/two.png"], "scan": ["scan"], "a.zip --split val": ["a.zip/val/x/1.png"],
        "c.csv one.png": ["photos/two.png", "one.png"],
    }  # fmt: skip


def test_all_that_data_path_takes_can_be_drawn(place, monkeypatch):
    """Archives and tables were taken for image files, which could not be read."""
    monkeypatch.chdir(place)
    base = f"--checkpoint first.pth --output a.png --device cpu {NAMES} --images "
    for words, names in make_sources().items():
        assert files(drawn(base + words, monkeypatch)) == names
    for words, problem in {
        "photos --split val": "photos does not say which images are for evaluation",
        "photos --image_column x": "--image_column: photos has no columns; drop it",
        "c.csv --image_column x": "--image_column: unknown column of c.csv 'x'. Known: image, spl",
        "rest.tar": "--images rest.tar: no such file or folder",
    }.items():
        with pytest.raises(UserError, match=problem):
            drawn(base + words, monkeypatch)
    with pytest.raises(UserError, match="--image_root is for tables, not for --data_set tests"):
        drawn(f"--checkpoint first.pth --image_root photos --device cpu {NAMES}", monkeypatch)


def test_weights_of_others_with_a_decoder_are_drawn(tmp_path, monkeypatch, capsys):
    """Only runs of this toolkit were accepted; the sizes are those of the weights."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("one.png")
    sizes = {"stem_stride": 1, "decoder_depth": 2, "decoder_embed_dim": 16}
    state = create_model("fcmae_convnextv2_atto", patch_size=8, **sizes).state_dict()
    official = argparse.Namespace(model="convnextv2_atto", input_size=16, norm_pix_loss=True)
    torch.save({"model": to_official(state), "args": official}, "official.pth")
    encoder = {n.removeprefix("encoder."): x for n, x in state.items() if n.startswith("encoder.")}
    decoder = {name: x for name, x in state.items() if not name.startswith("encoder.")}
    torch.save(to_timm(encoder) | decoder, "timm.pth")
    base = "--images one.png --input_size 16 --device cpu --num_images 1 --output a.png"
    pictures = []
    for name in ("official", "timm"):
        found = drawn(f"--checkpoint {name}.pth {base}", monkeypatch)
        assert (len(found.build_fcmae[1].decoder), found.build_fcmae[1].patch_size) == (2, 8)
        pictures.append(found.drawing)
        assert "a.png: 1 row of input, seen by the network, baseline" in capsys.readouterr().out
    torch.save(to_timm(encoder), "encoder.pth")
    with pytest.raises(UserError, match="encoder.pth has no proj, mask_token, decoder, pred: wit"):
        drawn(f"--checkpoint encoder.pth {base}", monkeypatch)
    with pytest.raises(UserError, match="official.pth names no images; give --images"):
        drawn("--checkpoint official.pth --device cpu", monkeypatch)
    with pytest.raises(UserError, match="--images two.png: no such file or folder"):
        drawn("--checkpoint official.pth --device cpu --images two.png", monkeypatch)


# --- pack.py --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A folder with tables of two images, and their folder, elsewhere."""
    folder = tmp_path_factory.mktemp("tables")
    for number, size in enumerate([(40, 30), (60, 50)]):
        path = folder / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise(size, 90).save(path)
    header, rows = "image,other,label,x,weights,part", ["0.png,1.png,a,1,5,train"]
    rows += ["1.png,0.png,b,0,6,val"]
    (folder / "rows.csv").write_text("\n".join([header, *rows]))
    (folder / "rows.rows").write_text("\n".join([header, *rows]))
    (folder / "photos" / "bad.png").write_bytes(b"none")
    (folder / "bad.csv").write_text("image,label\n0.png,a\nbad.png,b\n1.png,b\n")
    return folder


ROOTED = "--image_root photos"
PACK: dict[str, Row] = {
    "size": ("--size 20", "sides", [30, 50], [20, 20], ROOTED),
    "format": ("--format webp", "formats", ["JPEG"] * 2, ["WEBP"] * 2, f"--size 20 {ROOTED}"),
    "quality": ("--quality 10", "is_small", False, True, f"--size 20 {ROOTED}"),
    "shard_size": ("--shard_size 1", "shards", 1, 2, ROOTED),
    "part": (
        "--part val", "parts", ["train", "val"], ["val"], f"--split_column part {ROOTED}",
    ),
    "unlabeled": ("--unlabeled", "kind", "class", None, ROOTED),
    "label_files": ("--label_files", "members", ["0.png", "1.png"],
        ["0.json", "0.png", "1.json", "1.png"], ROOTED),
    "verify": ("--verify", "verified", False, True, ROOTED),
    "data_set": (
        "--data_set table", "kind", "refused", "class", f"SOURCE=rows.rows {ROOTED}",
    ),
    "image_column": (
        "--image_column other", "labels", ["a", "b"], ["b", "a"], ROOTED,
    ),
    "image_root": ("--image_root photos", "kind", "refused", "class", ""),
    "split_column": (
        "--split_column part", "parts", ["images"], ["train", "val"], ROOTED,
    ),
    "label_column": ("--label_column x", "classes", ["a", "b"], ["0", "1"], ROOTED),
    "weight_column": (
        "--weight_column weights", "weights", None, [5, 6], f"--label_column label {ROOTED}",
    ),
    "task": (
        "--task regression", "kind", "class", "number", f"--label_column x {ROOTED}",
    ),
    "on_bad_image": (
        "--on_bad_image skip", "names", "refused", ["0.png", "1.png"], f"SOURCE=bad.csv {ROOTED}",
    ),
    "num_workers": ("--num_workers 1", "workers", 0, 1, ROOTED),
}  # fmt: skip


def look_at_pack(words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Pack the table; returns what is in the pack."""
    source, found = "rows.csv", {"verified": False}
    if words.startswith("SOURCE="):
        source, _, words = words.removeprefix("SOURCE=").partition(" ")
    if "--num_workers" not in words:
        words += " --num_workers 0"
    args = options.pack_parser().parse_args([source, str(folder), *words.split()])
    with monkeypatch.context() as patch:
        patch.setattr(pack, "verify", lambda *_: found.update(verified=True))
        loader = pack.WatchedLoader
        patch.setattr(
            pack,
            "WatchedLoader",
            lambda *words, **more: found.update(workers=words[3]) or loader(*words, **more),
        )
        pack.main(args)
    about = json.loads((folder / "pack.json").read_text())["parts"]
    train = "val" not in about or "train" in about
    data = open_images("auto", DatasetSpec(str(folder), labeled=not args.unlabeled), train)
    images = [Image.open(io.BytesIO(data.read(number))) for number in range(len(data))]
    first = next(iter(about.values()))
    return found | {
        "sides": [min(image.size) for image in images],
        "formats": [image.format for image in images],
        "is_small": max(len(data.read(number)) for number in range(len(data))) < 500,
        "shards": len(first["shards"]),
        "members": sorted(tarfile.open(folder / first["shards"][0]["name"]).getnames()),
        "parts": list(about),
        "kind": data.kind,
        "names": list(data.names),
        "classes": data.classes,
        "weights": None if data.weights is None else data.weights.tolist(),
        "labels": data.kind == "class" and [data.classes[label] for label in data.targets],
    }


@pytest.mark.parametrize("flag", PACK)
def test_flag_of_pack_acts(flag, table, tmp_path, monkeypatch):
    monkeypatch.chdir(table)
    words, look, before, after, base = PACK[flag]
    seen = []
    for number, line in enumerate((base, f"{base} {words}".strip())):
        try:
            seen.append(look_at_pack(line, tmp_path / str(number), monkeypatch)[look])
        except UserError:
            seen.append("refused")
    assert seen == [before, after]


# --- all ------------------------------------------------------------------------------------------

# Flags that other tests show to act, with the file.
ELSEWHERE = {
    "tests/test_tool_flags_act.py": "output",  # of visualize.py, in each row
    "tests/data_loading/test_folders.py": "data_index",
    "tests/weights/test_export_heads.py": "head heads",
    "tests/parallel/test_submit.py": "cluster job_dir follow",
}


def test_every_flag_has_a_row():
    elsewhere = set(" ".join(ELSEWHERE.values()).split())
    for parser, rows in (
        (options.export_parser(), EXPORT),
        (options.visualize_parser(), VISUALIZE),
        (options.pack_parser(), PACK),
    ):
        names = {action.dest for action in parser._actions if action.option_strings} - {"help"}
        assert names - elsewhere <= set(rows) <= names
    names = {row[0].removeprefix("--") for row in flags.FLAGS[flags.JOB]}
    shown = {word.removeprefix("--") for words in SBATCH for word in words.split()}
    assert names - shown - elsewhere == set()
    assert all((Path(__file__).parents[1] / path).exists() for path in ELSEWHERE)
