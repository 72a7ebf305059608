# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A folder that transformers wrote tells its classes and preprocessing, as a checkpoint does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import main_finetune
from config import parser as options
from data_loading.transforms import create_eval_transform
from errors import UserError
from models.convnextv2 import ConvNeXtV2
from tests.tiny import SIZE
from weights.convert import to_hf
from weights.export_formats import ExportSpec
from weights.files import read_checkpoint
from weights.hub_config import read_hub_run
from weights.huggingface import hf_processor
from weights.pretrained import read_pretrained
from weights.saved_run import inherit_flags

NAMES = ["green", "red", "blue"]
RAW = [110 / 255, 100 / 255, 90 / 255]


def labels(names: list[str]) -> dict:
    """As `ConvNextV2ForImageClassification.save_pretrained` writes them into config.json."""
    return {
        "architectures": ["ConvNextV2ForImageClassification"],
        "model_type": "convnextv2",
        "num_channels": 3,
        "image_size": 224,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


PROCESSOR = {
    "crop_pct": 0.5,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "image_processor_type": "ConvNextImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 64},
}


def write(folder: Path, config: object = None, processor: object = None, classes: int = 3) -> Path:
    """Write a folder as save_pretrained does; None leaves a JSON file out."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = ConvNeXtV2(*SIZE, num_classes=classes)
    save_file(to_hf(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    files = {"config.json": config, "preprocessor_config.json": processor}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def run_of(tmp_path: Path, **what) -> dict:
    content = read_checkpoint(write(tmp_path / "hub", **what))
    return {"args": content.get("args"), "classes": content.get("classes")}


def test_names_and_preprocessing_are_those_of_the_folder(tmp_path):
    assert run_of(tmp_path, config=labels(NAMES), processor=PROCESSOR) == {
        "classes": NAMES,
        "args": {
            "input_size": [64],
            "crop_pct": 0.5,
            "mean": PROCESSOR["image_mean"],
            "std": PROCESSOR["image_std"],
        },
    }
    saved = read_pretrained(str(tmp_path / "hub")).saved
    assert (saved.head.names, saved.head.count) == (NAMES, 3)
    args = options.parse(options.finetune_parser(), ["--data_set", "DIGITS"])
    new = inherit_flags(args.replace(model="my.nets:tiny"), saved)
    assert (new.input_size, new.crop_pct, new.mean) == ((64, 64), 0.5, (0.1, 0.2, 0.3))


def test_evaluation_matches_classes_by_the_names_of_the_folder(tmp_path, capsys):
    """Labels used to be taken for positions: red images counted as green ones."""
    folder = write(tmp_path / "hub", labels(NAMES), PROCESSOR)
    words = f"--eval --resume {folder} --data_set tests.tiny:colors --device cpu --num_workers 0"
    words += " --model tests.tiny:classifier --output_dir none"
    main_finetune.main(options.parse(options.finetune_parser(), words.split()))
    by_name = capsys.readouterr().out
    assert "by position" not in by_name
    write(folder, labels([f"LABEL_{label}" for label in range(3)]), PROCESSOR)
    main_finetune.main(options.parse(options.finetune_parser(), words.split()))
    assert "by position (red = 0, green = 1, blue = 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "classes"),
    [
        (labels(["LABEL_0", "LABEL_1", "LABEL_2"]), None),
        (labels(["LABEL_0", "ant", "bee"]), ["LABEL_0", "ant", "bee"]),
        (labels(["tench", "ant", "bee"]), ["tench", "ant", "bee"]),  # ImageNet has 1000
        ({"label2id": {"ant": 2, "bee": 0, "cat": 1}}, ["bee", "cat", "ant"]),
        (labels(["crane", "crane", "ant"]), None),  # one could not be found by name
        (labels(["ant", "bee"]), None),  # of another head
        (labels(["class_0", "class_1", "class_2"]), None),  # of export.py, without names
        ({"id2label": {"1": "ant", "2": "bee", "3": "cat"}}, None),
        ({"id2label": {}}, None),
        ([], None),
        (None, None),
    ],
)
def test_class_names(tmp_path, config, classes):
    assert run_of(tmp_path, config=config)["classes"] == classes


def test_names_of_an_encoder_or_of_imagenet_in_words_do_not_count(tmp_path):
    """ImageNet's folders are called n01440764, and found by ImageNet's own names without these."""
    names = ["tench, Tinca tinca", *map(str, range(999))]
    assert run_of(tmp_path, config=labels(names), classes=1000)["classes"] is None
    assert run_of(tmp_path, config=labels(names[1:] + names[:1]), classes=1000)["classes"]
    assert run_of(tmp_path, config=labels(NAMES), classes=0)["classes"] is None


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"crop_pct": 0.875}, {"input_size": [64]}),  # the default here too
        ({"size": 64}, {"input_size": [64], "crop_pct": 0.5}),  # of old versions
        ({"size": {"shortest_edge": 384}}, {"input_size": [384]}),  # resized as a whole
        ({"size": {"height": 64, "width": 48}}, {"input_size": [64, 48], "crop_pct": 1.0}),
        (
            {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}
            | {"do_center_crop": True},
            {"input_size": [64, 64], "crop_pct": 0.8},
        ),
        ({"crop_size": {"height": 32, "width": 32}}, {"input_size": [64], "crop_pct": 0.5}),
        (
            {"size": {"shortest_edge": 512}, "crop_size": {"height": 448, "width": 448}}
            | {"do_center_crop": True},
            {"input_size": [448, 448], "crop_pct": 0.875},  # where no crop is the default
        ),
        ({"size": {"shortest_edge": 32}}, {"input_size": [32], "crop_pct": 0.5}),
        (
            {"size": {"shortest_edge": 32}, "crop_pct": None},
            {"input_size": [32], "crop_pct": 0.875},
        ),
        ({"size": {"height": 32, "width": 32}}, {"input_size": [32, 32]}),
        ({"size": [64, 48]}, {"input_size": [64, 48], "crop_pct": 1.0}),
        ({"size": {"longest_edge": 64}}, {}),
    ],
)
def test_size_and_crop(tmp_path, changes, flags):
    found = run_of(tmp_path, processor=PROCESSOR | changes)["args"]
    assert {name: found[name] for name in ("input_size", "crop_pct") if name in found} == flags


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_normalize": False}, [0], [1]),
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5], [0.25]),
        ({"rescale_factor": None, "image_mean": 0.5, "image_std": 0.25}, [0.5], [0.25]),
        ({"do_rescale": False, "image_mean": [51.0], "image_std": [51.0]}, [0.2], [0.2]),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0], "image_std": [1.0]}, [0.5], [0.5]),
    ],
)
def test_mean_and_std_are_those_of_images_in_0_to_1(tmp_path, changes, mean, std):
    found = run_of(tmp_path, processor=PROCESSOR | changes)["args"]
    assert (found["mean"], found["std"]) == (pytest.approx(mean), pytest.approx(std))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"id2label": {"a": "b"}}'),
        ("preprocessor_config.json", '{"size": "big"}'),
        ("preprocessor_config.json", '{"image_mean": ["x"], "image_std": [1]}'),
        ("preprocessor_config.json", '{"image_mean": 1, "image_std": 1, "rescale_factor": 0}'),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text):
    folder = write(tmp_path / "hub", labels(NAMES), PROCESSOR)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file} is damaged .*; download it again"):
        read_checkpoint(folder)


def test_other_files_beside_json_files_are_read_as_they_are(tmp_path):
    folder = write(tmp_path / "hub", labels(NAMES), PROCESSOR)
    shutil.copy(folder / "model.safetensors", folder / "mine.safetensors")
    assert "args" not in read_checkpoint(folder / "mine.safetensors")
    torch.save({"model": load_file(folder / "mine.safetensors"), "a": 1}, folder / "own.pth")
    assert read_checkpoint(folder / "own.pth").keys() == {"model", "a"}
    shutil.move(folder / "own.pth", folder / "pytorch_model.bin")
    assert read_checkpoint(folder / "pytorch_model.bin").keys() == {"model", "a"}
    torch.save(load_file(folder / "mine.safetensors"), folder / "pytorch_model.bin")
    assert read_checkpoint(folder / "pytorch_model.bin")["classes"] == NAMES


@pytest.mark.parametrize(
    ("size", "more"),
    [(96, ["--crop_pct", "0.7"]), (96, []), (32, []), (32, ["--crop_pct", "0.875"])],
)
def test_exported_folder_tells_the_same_by_its_json_files(tmp_path, size, more):
    """transformers' save_pretrained drops the metadata in which export.py stores the run."""
    args = {"input_size": [size, size], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    weights = ConvNeXtV2(*SIZE, num_classes=3).state_dict()
    torch.save({"model": weights, "args": args, "classes": NAMES}, tmp_path / "a.pth")
    words = [str(tmp_path / "a.pth"), "--to", "hf", "--output", str(tmp_path / "hf"), *more]
    export.main(options.export_parser().parse_args(words))
    stored = read_checkpoint(tmp_path / "hf")
    found = read_hub_run(tmp_path / "hf", load_file(tmp_path / "hf" / "model.safetensors"))
    assert found["classes"] == stored["classes"] == NAMES
    steps = [
        create_eval_transform(run["args"]["input_size"], run["args"].get("crop_pct"))
        for run in (stored, found)
    ]
    sizes = [[getattr(x, "size", None) for x in step.transforms] for step in steps]
    assert sizes[0] == sizes[1]
    for name in ("mean", "std"):
        assert found["args"][name] == pytest.approx(stored["args"][name])


def test_value_range_is_exported_and_read_back(tmp_path):
    """transformers gets raw pixels, which it multiplies before it subtracts the mean."""
    shape = {"in_chans": 3, "num_classes": 0}
    spec = ExportSpec({}, {}, shape, size=(64, 64), mean=[0.3, 0.4, 0.5], std=[0.2, 0.1, 0.3])
    spec = replace(spec, value_range=(-1000.0, 400.0))
    processor = hf_processor(spec)
    pixels = torch.tensor([-1000.0, -300.0, 400.0])
    theirs = pixels * processor["rescale_factor"] - torch.tensor(processor["image_mean"])
    theirs /= torch.tensor(processor["image_std"])
    ours = ((pixels + 1000) / 1400 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(theirs, ours)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    args = read_hub_run(tmp_path, {})["args"]
    assert args["mean"] == pytest.approx(spec.mean)
    assert (args["std"], args["value_range"]) == (spec.std, [-1000, 400])
    assert spec.run["args"]["value_range"] == [-1000, 400]
