# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Exported files, loaded by the libraries that they are for."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import export
from config import checks
from config import parser as options
from config.tool_flags import GRAPHS, TARGETS
from data_loading.transforms import create_eval_transform, mean_and_std
from errors import UserError
from models import create_model
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tests.tiny import SIZE
from weights import export_formats, huggingface
from weights.convert import describe, to_convnextv2
from weights.export_formats import ExportSpec, Network
from weights.files import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["red", "green", "blue"]
SIDES = ["--input_size", "64"]


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Set random values everywhere: zeros and ones would hide swapped tensors."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def classifier(**kwargs) -> ConvNeXtV2:
    return randomize(ConvNeXtV2(*SIZE, **{"num_classes": 3, **kwargs}))


def spec_of(model: torch.nn.Module | None = None, **kwargs) -> ExportSpec:
    state = (model or classifier()).state_dict()
    mean, std = mean_and_std()
    values = {"mean": mean, "std": std, "size": (64, 64), "labels": CLASSES, **kwargs}
    return ExportSpec(state, state, describe(state), **values)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Checkpoints of this toolkit: a classifier with EMA weights, and a pre-trained model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, model_ema = classifier(), classifier(stem_stride=2)
    run = {"input_size": [64, 64], "crop_pct": None, "imagenet_default_mean_and_std": False}
    facts = {"args": run, "classes": CLASSES, "state": {}}
    weights = {"model": model.state_dict(), "model_ema": model_ema.state_dict()}
    torch.save(weights | facts, folder / "classifier.pth")
    autoencoder = randomize(FCMAE(ConvNeXtV2(*SIZE), decoder_embed_dim=8))
    torch.save({"model": autoencoder.state_dict(), "args": run}, folder / "pretrained.pth")
    encoder = classifier(num_classes=0)
    torch.save({"model": encoder.state_dict()}, folder / "encoder.pth")
    return folder


def run(*words: object, cwd: Path = ROOT, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(ROOT / "export.py"), *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def main(*words: object) -> None:
    """The script in this process: what parsing refuses is a SystemExit."""
    parser = options.export_parser()
    args = parser.parse_args([str(word) for word in words])
    for problem in checks.export_problems(args):
        parser.error(problem)
    export.main(args)


# --- the script -----------------------------------------------------------------------------


EXPORT_ALL = """
import os, sys
from config import parser, tool_flags
import export
for target in tool_flags.TARGETS:
    os.mkdir(target)
    os.chdir(target)
    print("=====", file=sys.stderr)
    print("=====")
    export.main(parser.export_parser().parse_args([sys.argv[1], "--to", target]))
    os.chdir("..")
"""


@pytest.fixture(scope="module")
def exported(files, tmp_path_factory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """A folder for each target in which one process has exported the classifier, and its output."""
    folder = tmp_path_factory.mktemp("exported")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_ALL, str(files / "classifier.pth")],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    texts = (text.split("=====\n")[1:] for text in (done.stdout, done.stderr))
    return folder, dict(zip(TARGETS, zip(*texts, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_written_files_are_those_that_others_load(target, files, exported):
    folder, texts = exported
    (written,) = (folder / target).iterdir()
    assert written.name.endswith(TARGETS[target])
    stdout, stderr = (text.splitlines() for text in texts[target])
    assert stdout[-1].startswith(f"{written.name}: checked with ")
    assert len(stderr) == 1  # nothing else, such as a library's warning
    assert "official layout" in stderr[0]
    if target not in GRAPHS:
        ours = read_checkpoint(files / "classifier.pth")["model"]
        content = read_checkpoint(written)
        again = to_convnextv2(content.get("model", content))[0]
        assert again.keys() == ours.keys()
        assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.mark.parametrize("kind", ["pretrained", "encoder"])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_without_a_head_are_exported_as_features(kind, target, files, tmp_path, capsys):
    output = tmp_path / f"out{TARGETS[target]}"
    main(files / f"{kind}.pth", "--to", target, "--output", output, *SIDES)
    assert "checked with" in capsys.readouterr().out
    if target in ("official", "safetensors"):  # the decoder comes along
        ours = read_checkpoint(files / f"{kind}.pth")["model"]
        held = read_checkpoint(output)
        again = to_convnextv2(held.get("model", held), decoder=kind == "pretrained")[0]
        assert again.keys() == ours.keys()
        assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.fixture(scope="module")
def v1(tmp_path_factory) -> Path:
    """Checkpoints of ConvNeXt V1: a classifier, and a pre-training whose decoder is of V2."""
    folder = tmp_path_factory.mktemp("v1")
    model = classifier(layer_scale_init_value=1e-6)
    autoencoder = FCMAE(ConvNeXtV2(*SIZE, layer_scale_init_value=1e-6), decoder_embed_dim=8)
    for name, network in {"classifier": model, "pretrained": randomize(autoencoder)}.items():
        torch.save({"model": network.state_dict(), "classes": CLASSES}, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize(
    ("kind", "target"),
    [("classifier", target) for target in TARGETS if target != "pt2"]
    + [pytest.param("classifier", "pt2", marks=pytest.mark.slow)]
    + [("pretrained", target) for target in TARGETS if target not in GRAPHS],
)
def test_v1_is_exported_to_every_format(kind, target, v1, tmp_path, capsys):
    output = tmp_path / f"out{TARGETS[target]}"
    main(v1 / f"{kind}.pth", "--to", target, "--output", output, *SIDES)
    assert "checked with" in capsys.readouterr().out
    if target == "hf":
        config = json.loads((output / "config.json").read_text())
        kinds = {"classifier": "ForImageClassification", "pretrained": "Model"}
        assert config["architectures"] == [f"ConvNext{kinds[kind]}"]
    if target not in GRAPHS:
        source, held = (read_checkpoint(path) for path in (v1 / f"{kind}.pth", output))
        decoder = kind == "pretrained" and target in ("official", "safetensors")
        ours = to_convnextv2(source["model"], decoder)[0]
        again = to_convnextv2(held.get("model", held), decoder)[0]
        assert again.keys() == ours.keys()
        assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_v1_is_exported_in_half_precision(target, v1, tmp_path, capsys):
    output = tmp_path / f"out{TARGETS[target]}"
    main(v1 / "classifier.pth", "--to", target, "--half", "--output", output, *SIDES)
    assert "checked with" in capsys.readouterr().out


@pytest.mark.slow
def test_line_printed_for_timm_loads_the_file(files, tmp_path):
    import timm

    output = tmp_path / "a.safetensors"
    done = run(files / "classifier.pth", "--to", "timm", "--output", output)
    scope: dict = {"timm": timm}
    exec(done.stdout.splitlines()[0], scope)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(scope["model"].eval()(images), classifier()(images))


def test_use_ema_exports_the_ema_weights(files, tmp_path):
    words = ["--to", "safetensors", "--output", tmp_path / "a.safetensors", "--use_ema"]
    main(files / "classifier.pth", *words)
    assert describe(read_checkpoint(tmp_path / "a.safetensors")["model"])["stem_stride"] == 2


def test_script_reads_its_own_output(files, tmp_path):
    """A folder for transformers is a source like any other."""
    main(files / "classifier.pth", "--to", "hf", "--output", tmp_path / "hf")
    main(tmp_path / "hf", "--to", "safetensors", "--output", tmp_path / "a.safetensors", *SIDES)
    ours = read_checkpoint(files / "classifier.pth")["model"]
    again = read_checkpoint(tmp_path / "a.safetensors")["model"]
    assert all(torch.equal(again[name], value) for name, value in ours.items())


# --- bad input ------------------------------------------------------------------------------

BAD = {  # words after the checkpoint -> what the message must name
    "no target": ("", "--to is missing; give one of timm"),
    "half weights": ("--to timm --half", "--half"),
    "opset elsewhere": ("--to pt2 --opset 18", "--opset 18"),
    "old opset": ("--to onnx --opset 16", "expected an integer in [17,20]"),
    "labels elsewhere": ("--to onnx --labels names.txt", "--labels"),
    "crop elsewhere": ("--to onnx --crop_pct 0.9", "--crop_pct"),
    "name": ("--to onnx --output a.pth", "ends in .onnx"),
    "three sides": ("--to onnx --input_size 1 2 3", "--input_size"),
    "size by name": ("--to onnx --model convnextv2_tiny", "--model convnextv2_tiny: the size"),
    "own network": ("--to timm --model tests.tiny:other", ":other: --to timm is for Conv"),
    "own half": ("--to onnx --half --model tests.tiny:other", "drop --half or --model"),
    "two choices": ("--to timm --use_ema --model_key x", "--model_key x"),
}


@pytest.mark.parametrize("case", BAD)
def test_flags_that_would_be_ignored_are_refused(case, files, capsys):
    words, named = BAD[case]
    with pytest.raises(SystemExit):
        main(files / "classifier.pth", *words.split())
    assert named in capsys.readouterr().err


def test_wrong_target_is_refused(files, capsys):
    with pytest.raises(SystemExit):
        main(files / "classifier.pth", "--to", "tflite")
    assert "'tflite' (choose from" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_checkpoint_is_one_line(tmp_path):
    done = run(tmp_path / "nothing.pth", "--to", "timm", expect=2)
    assert "nothing.pth does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_existing_output_is_kept_without_overwrite(files, tmp_path):
    output = tmp_path / "a.safetensors"
    output.write_text("mine")
    words = [files / "classifier.pth", "--to", "safetensors", "--output", output]
    with pytest.raises(UserError, match="--overwrite true"):
        main(*words)
    assert output.read_text() == "mine"
    main(*words, "--overwrite")
    assert read_checkpoint(output)
    with pytest.raises(UserError, match="cannot write"):
        main(files / "classifier.pth", "--to", "hf", "--output", output, "--overwrite")


def test_overwriting_a_folder_leaves_other_files_in_it(files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    words = ["--to", "hf", "--output", tmp_path, "--overwrite"]
    main(files / "classifier.pth", *words)
    names = {"notes.txt", "config.json", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"model.safetensors"}


def test_number_of_labels_must_be_that_of_the_head(files, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    words = [files / "classifier.pth", "--to", "hf", "--output", tmp_path / "hf", "--labels"]
    with pytest.raises(UserError, match="has 2 names and the weights have 3"):
        main(*words, names)
    with pytest.raises(UserError, match=r"nothing\.txt"):
        main(*words, tmp_path / "nothing.txt")
    assert not (tmp_path / "hf").exists()


def test_folder_for_transformers_has_square_images(files, tmp_path):
    with pytest.raises(UserError, match="give one number, such as 192"):
        main(
            *[files / "classifier.pth", "--to", "hf", "--input_size", "256", "192"],
            *["--output", tmp_path / "hf"],
        )


def test_exported_program_needs_two_cells(files, tmp_path):
    with pytest.raises(UserError, match="needs at least 64 pixels"):
        main(
            *[files / "classifier.pth", "--to", "pt2", "--input_size", "32"],
            *["--output", tmp_path / "a.pt2"],
        )


def test_weights_that_half_precision_would_not_survive_are_refused(tmp_path):
    state = {name: value * 5 for name, value in classifier().state_dict().items()}
    torch.save({"model": state}, tmp_path / "large.pth")
    with pytest.raises(UserError, match="do not export it in float16"):
        main(tmp_path / "large.pth", "--to", "torchscript", "--half", *SIDES)


def test_network_beyond_what_onnx_holds_is_refused(tmp_path):
    with torch.device("meta"):
        state = ConvNeXtV2((3, 3, 27, 3), (352, 704, 1408, 2816)).state_dict()
    huge = ExportSpec(state, state, describe(state))
    with pytest.raises(UserError, match="--half true"):
        export_formats.write_onnx(huge, tmp_path / "a.onnx")


# --- the check itself -----------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_output_that_differs_leaves_nothing(wrong, files, tmp_path, monkeypatch):
    write, read, package = export.FORMATS["torchscript"]

    def other(subject: ExportSpec, path: Path):
        function = read(subject, path)
        return lambda images: function(images) * (1 + wrong)

    monkeypatch.setitem(export.FORMATS, "torchscript", (write, other, package))
    with pytest.raises(UserError, match="differs by"):
        main(files / "classifier.pth", "--to", "torchscript", "--output", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], {"input_size": [3, 64, 64]}])
def test_flags_of_other_libraries_are_no_obstacle(args, files, tmp_path):
    """Tracebacks, and the first two of timm's (channels, height, width) were taken for a size."""
    content = torch.load(files / "classifier.pth", weights_only=True)
    torch.save(content | {"args": args}, tmp_path / "a.pth")
    main(tmp_path / "a.pth", "--to", "safetensors", "--output", tmp_path / "a.safetensors")
    size = read_checkpoint(tmp_path / "a.safetensors")["args"]["input_size"]
    assert size == ([64, 64] if args else size[:1] * 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"input_size": "x"}, SIDES),
        ({"crop_pct": "a"}, ["--crop_pct", "1"]),
        ({"mean": "abc", "std": [1.0]}, ["--mean", "0", "--std", "1"]),
        ({"mean": [0.5], "std": [0.0]}, ["--imagenet_default_mean_and_std"]),
    ],
)
def test_unusable_flags_of_a_checkpoint_are_named(flags, words, files, tmp_path):
    """A standard deviation of 0 was exported, or ignored without a word."""
    content = torch.load(files / "classifier.pth", weights_only=True)
    torch.save(content | {"args": flags}, tmp_path / "a.pth")
    output = ["--to", "safetensors", "--output", tmp_path / "a.safetensors"]
    with pytest.raises(UserError, match=r"a\.pth stores --\w+ .*, expected .*; give --\w+"):
        main(tmp_path / "a.pth", *output)
    main(tmp_path / "a.pth", *output, *words)
    if "input_size" not in flags:  # a graph holds no preprocessing
        main(tmp_path / "a.pth", "--to", "torchscript", "--output", tmp_path / "a.pt", *SIDES)


def test_other_preprocessing_than_the_runs_is_said(files, tmp_path, capsys):
    content = torch.load(files / "classifier.pth", weights_only=True)
    content["args"] = content.get("args", {}) | {
        "input_size": [48, 48],
        "mean": [0.3],
        "std": [0.2],
    }
    torch.save(content, tmp_path / "a.pth")
    words = [tmp_path / "a.pth", "--to", "safetensors", "--output", tmp_path / "a.safetensors"]
    main(*words, "--input_size", 64)
    said = capsys.readouterr().err
    assert "--input_size 64 64 is used; the run was trained with 48 48" in said
    assert said.count("is used") == 1


def test_weights_that_come_back_different_leave_nothing(files, tmp_path, monkeypatch):
    def write(subject: ExportSpec, path: Path) -> None:
        changed = {name: value + 1e-7 for name, value in subject.state.items()}
        export_formats.save(changed, path, subject)

    _, *rest = export.FORMATS["safetensors"]
    monkeypatch.setitem(export.FORMATS, "safetensors", (write, *rest))
    with pytest.raises(UserError, match="same weights"):
        main(
            *[files / "classifier.pth", "--to", "safetensors"],
            *["--output", tmp_path / "a.safetensors"],
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_library_is_reported_in_the_last_line(files, tmp_path, monkeypatch, capsys):
    write, read, _ = export.FORMATS["hf"]
    monkeypatch.setitem(export.FORMATS, "hf", (write, read, "not-a-package"))
    main(files / "classifier.pth", "--to", "hf", "--output", tmp_path / "hf")
    said = capsys.readouterr().out
    assert "NOT checked: not-a-package is not installed (pip install not-a-package)" in said
    assert (tmp_path / "hf" / "config.json").exists()


# --- graphs ---------------------------------------------------------------------------------


def test_weights_that_fit_no_network_are_refused_without_the_library(tmp_path, monkeypatch):
    """Without the library installed, a transposed tensor used to be written and kept."""
    state = classifier().state_dict()
    name = "stages.1.0.pwconv1.weight"
    torch.save(state | {name: state[name].T}, tmp_path / "odd.pth")
    reader = (*export.FORMATS["hf"][:2], "not-a-package")
    monkeypatch.setitem(export.FORMATS, "hf", reader)
    with pytest.raises(UserError, match=r"odd\.pth does not fit ConvNeXtV2: .*pwconv1\.weight"):
        main(tmp_path / "odd.pth", "--to", "hf", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "model_ema"])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_not_finite_are_not_exported(files, tmp_path, name, target):
    content = read_checkpoint(files / "classifier.pth")
    content[name]["norm.bias"][2] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    words = ["--to", target, "--output", tmp_path / f"out{TARGETS[target]}"]
    with pytest.raises(UserError, match=r"nan\.pth holds NaN or Inf in norm\.bias"):
        main(tmp_path / "nan.pth", *words, "--use_ema", str(name == "model_ema").lower())
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pth"]


def test_decoder_that_is_not_finite_is_not_exported(files, tmp_path):
    """Formats with the decoder write more tensors than the network has."""
    content = read_checkpoint(files / "pretrained.pth")
    content["model"]["pred.bias"][2] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"NaN or Inf in pred\.bias"):
        main(tmp_path / "nan.pth", "--to", "official", "--output", tmp_path / "out.pth")


@pytest.mark.parametrize("name", ["convnextv2_atto", "fcmae_convnextv2_atto"])
def test_missing_block_is_no_smaller_network(name, tmp_path):
    """Atto without its last block of stage 2 used to be exported as a network of other depths."""
    with torch.device("meta"):
        state = create_model("convnextv2_atto").state_dict()
    state = {n: torch.zeros(v.shape) for n, v in state.items() if not n.startswith("stages.2.5.")}
    torch.save({"model": state, "args": {"model": name}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"convnextv2_atto, but .* of depths \(2, 2, 5, 2\)"):
        main(tmp_path / "a.pth", "--to", "safetensors")


def test_export_reports_dropped_parts_and_large_weights(tmp_path, capsys):
    model = classifier()
    with torch.no_grad():
        for block in model.modules():
            if hasattr(block, "pwconv1"):
                block.pwconv1.weight.normal_(std=0.88)
    torch.save(model.state_dict() | {"pred.bias": torch.zeros(3)}, tmp_path / "large.pth")
    main(tmp_path / "large.pth", "--to", "timm", "--output", tmp_path / "out.safetensors")
    said = capsys.readouterr().err
    assert "official layout; dropped: pred)" in said
    assert "the rms of its pointwise weights is" in said


@pytest.mark.slow
@pytest.mark.parametrize("target", GRAPHS)
@pytest.mark.parametrize("half", [False, True])
def test_graph_takes_other_batches_and_sizes(target, half, tmp_path):
    given, path = spec_of(half=half), tmp_path / f"a{TARGETS[target]}"
    write, read, _ = export.FORMATS[target]
    write(given, path)
    function, network = read(given, path), Network(given)
    for shape in ((1, 224, 224), (3, 256, 192), (2, 65, 127)):
        images = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            got, expected = function(images), network(images)
        assert got.dtype == torch.float32
        limit = (2e-3 if half else 1e-5) * expected.abs().max()
        assert (got - expected).abs().max() <= limit


@pytest.mark.parametrize("opset", [17, 20])
def test_onnx_graph_is_plain(opset, tmp_path):
    """No arithmetic on shapes, one LayerNormalization a norm, and vectors for GRN.

    A beta of four axes was taken for the bias of a GELU by a fusion of onnxruntime.
    """
    import onnx

    export_formats.write_onnx(spec_of(opset=opset), tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    assert model.opset_import[0].version == opset
    kinds = [node.op_type for node in model.graph.node]
    assert not {"Shape", "Reshape", "Slice", "Gather", "Concat"} & set(kinds)
    assert kinds.count("LayerNormalization") == 4 + 4 + 1  # blocks, downsampling, the last one
    vectors = [t for t in model.graph.initializer if "grn" in t.name or t.dims == [4 * SIZE[1][0]]]
    assert all(len(tensor.dims) <= 1 for tensor in vectors)
    (images,), (logits,) = model.graph.input, model.graph.output
    dims = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert logits.name == "logits"


def test_half_precision_graph_sums_in_full_precision(tmp_path):
    """In fp16 the sum of squares of 224 x 224 pixels' features is infinite."""
    import onnx

    export_formats.write_onnx(spec_of(half=True), tmp_path / "a.onnx")
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "a.onnx"))
    kind = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    kind |= {value.name: value.type.tensor_type.elem_type for value in inferred.graph.output}
    types = onnx.TensorProto
    for node in inferred.graph.node:
        if node.op_type in ("ReduceSum", "ReduceMean", "Sqrt"):
            assert kind[node.output[0]] == types.FLOAT, node.name
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            assert kind[node.output[0]] == types.FLOAT16, node.name
    held = [tensor for tensor in inferred.graph.initializer if len(tensor.dims) > 1]
    assert all(tensor.data_type == types.FLOAT16 for tensor in held)


def test_half_precision_survives_large_activations(tmp_path):
    model = classifier()
    with torch.no_grad():
        for block in (stage[0] for stage in model.stages):
            block.pwconv1.bias += 50  # squares of 2500 at 256 places and more
    given = spec_of(model, half=True)
    export_formats.write_torchscript(given, tmp_path / "a.pt")
    images = torch.randn(1, 3, 224, 224)
    got, expected = (
        torch.jit.load(tmp_path / "a.pt")(images),
        Network(given)(images),
    )
    assert got.isfinite().all()
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()


# --- transformers ---------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    """Smooth colors with some noise, as a photograph has."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + generator.integers(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "crop_pct"), [(224, None), (224, 0.5), (96, 1.0), (384, None), (32, None)]
)
@pytest.mark.parametrize("shape", [(300, 300), (640, 480), (200, 224), (150, 500)])
def test_processor_equals_our_evaluation_transform(size, crop_pct, shape, tmp_path):
    """To 4 of 255 levels: PIL and torchvision round bicubic differently, most where they enlarge.

    If the margin is odd, the crop of transformers may be one pixel off torchvision's.
    """
    import transformers

    values = huggingface.hf_processor(spec_of(size=(size, size), crop_pct=crop_pct))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = picture(*shape)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(x)[:, None, None] for x in mean_and_std())
    ours = create_eval_transform((size, size), crop_pct)(pil_to_tensor(image))
    difference = ((theirs * std + mean) * 255 - ours).abs()
    shifted = [difference]
    for axis in (1, 2):  # by one pixel at most
        moved = (theirs * std + mean) * 255
        length = ours.shape[axis] - 1
        shifted.append((moved.narrow(axis, 1, length) - ours.narrow(axis, 0, length)).abs())
    assert theirs.shape == ours.shape
    assert min(d.max().item() for d in shifted) <= 4.01
    assert values["do_center_crop"] == (size not in (32, 384))


def test_folder_has_labels_and_preprocessing(files, tmp_path):
    output = tmp_path / "hf"
    main(files / "classifier.pth", "--to", "hf", "--output", output)
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    assert config["layer_norm_eps"] == 1e-6
    assert config["architectures"] == ["ConvNextV2ForImageClassification"]
    processor = json.loads((output / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3  # as the run had it
    assert processor["size"] == {"shortest_edge": 73}  # 64 / 0.875


def test_one_channel(tmp_path):
    torch.save({"model": classifier(in_chans=1).state_dict()}, tmp_path / "gray.pth")
    for target in ("hf", "timm", "torchscript"):
        output = tmp_path / f"a{TARGETS[target]}"
        main(tmp_path / "gray.pth", "--to", target, "--output", output, *SIDES)
    values = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    assert (values["do_convert_rgb"], len(values["image_mean"])) == (True, 3)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_gray_classifier_works_in_transformers_pipeline(tmp_path, mode):
    """Pipelines convert images to RGB: `expected 1 channels, got 3`."""
    import transformers

    model = classifier(in_chans=1)
    content = {"model": model.state_dict(), "classes": CLASSES}
    torch.save(content | {"args": {"mean": (0.3,), "std": (0.25,)}}, tmp_path / "gray.pth")
    words = ["--to", "hf", "--output", tmp_path / "out", *SIDES, "--crop_pct", "1"]
    main(tmp_path / "gray.pth", *words)
    image = picture(64, 64).convert(mode)
    answers = transformers.pipeline("image-classification", model=str(tmp_path / "out"))(image)
    pixels = torch.from_numpy(np.array(image.convert("L"))) / 255  # as --in_chans 1 decodes it
    expected = model((pixels[None, None] - 0.3) / 0.25).softmax(1)[0].tolist()
    rounding = 1e-6 if mode == "L" else 1e-3  # of Pillow's gray values
    for answer in answers:
        wanted = expected[CLASSES.index(answer["label"])]
        assert answer["score"] == pytest.approx(wanted, abs=rounding)


# --- networks of the user's own -------------------------------------------------------------


HERE = "tests.weights.test_export_formats"


class Normed(torch.nn.Module):
    """A network that only a method tells the last layer of, with BatchNorm."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.stem, self.bn = torch.nn.Conv2d(in_chans, 4, 8, 8), torch.nn.BatchNorm2d(4)
        self.last = torch.nn.Linear(4, num_classes)

    def get_classifier(self) -> torch.nn.Module:
        return self.last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.bn(self.stem(images)).relu().mean((-2, -1)))


def normed(in_chans: int, num_classes: int, **unused: object) -> torch.nn.Module:
    return Normed(in_chans, num_classes)


class Hidden(Normed):
    """The same without the method."""

    get_classifier = None


def hidden(in_chans: int, num_classes: int, **unused: object) -> torch.nn.Module:
    return Hidden(in_chans, num_classes)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A checkpoint of a network of the user's own, as main_finetune.py writes it."""
    path = tmp_path_factory.mktemp("own") / "own.pth"
    model = randomize(Normed(2, 5))
    model.bn.running_mean.fill_(0.3)
    run = {
        "model": f"{HERE}:normed",
        "in_chans": 2,
        "input_size": (16, 16),
    }
    torch.save({"model": model.state_dict(), "args": run, "classes": [*"abcde"]}, path)
    return path


LOADERS = {
    "torchscript": torch.jit.load,
    "pt2": lambda path: torch.export.load(path).module(),
    "onnx": lambda path: export_formats.read_onnx(None, path),
}


@pytest.mark.parametrize("target", [*GRAPHS, "safetensors"])
def test_network_of_the_users_own_is_exported(own, tmp_path, capsys, target):
    """A last layer that is not called head used to be refused."""
    output = tmp_path / f"out{TARGETS[target]}"
    words = ["--to", target, "--output", output, "--model"]
    main(own, *words, f"{HERE}:normed")
    assert "largest difference" in capsys.readouterr().out
    model = Normed(2, 5).eval()
    if target == "safetensors":
        model.load_state_dict(read_checkpoint(output)["model"])
        return
    model.load_state_dict(read_checkpoint(own)["model"])
    images = torch.randn(3, 2, 16, 16)
    torch.testing.assert_close(LOADERS[target](output)(images), model(images), rtol=1e-4, atol=1e-5)


def test_code_of_a_checkpoint_is_not_run_without_being_named(own, tmp_path):
    with pytest.raises(UserError, match="trained with code, to run it give --model tests.weights"):
        main(own, "--to", "onnx", "--output", tmp_path / "a.onnx")


def test_classifier_that_is_not_found_is_explained(own, tmp_path):
    words = ["--model", f"{HERE}:hidden", "--output", tmp_path / "a.onnx"]
    with pytest.raises(UserError, match="give Hidden a method get_classifier"):
        main(own, "--to", "onnx", *words)


# --- facts about the weights ----------------------------------------------------------------


def test_labels_come_from_the_file_the_checkpoint_imagenet_or_numbers(tmp_path):
    (tmp_path / "names.txt").write_text("a\n\n b \nc\n")
    path = str(tmp_path / "names.txt")
    assert huggingface.find_labels(path, CLASSES, 3) == ["a", "b", "c"]
    assert huggingface.find_labels(None, CLASSES, 3) == CLASSES
    assert huggingface.find_labels(None, CLASSES, 2) == ["class_0", "class_1"]
    assert huggingface.find_labels(None, None, 1000)[0] == "tench, Tinca tinca"


def test_flags_of_an_official_checkpoint_are_understood(tmp_path):
    content = {"model": classifier().state_dict(), "args": argparse.Namespace(input_size=384)}
    torch.save(content, tmp_path / "a.pth")
    args = options.export_parser().parse_args([str(tmp_path / "a.pth"), "--to", "hf"])
    assert export.build_spec(args).size == (384, 384)


def test_crop_of_the_run_is_that_of_the_export(tmp_path):
    content = {"model": classifier().state_dict(), "args": {"crop_pct": 0.75}}
    torch.save(content, tmp_path / "a.pth")
    words = [str(tmp_path / "a.pth"), "--to", "hf"]
    for more, expected in ([], 0.75), (["--crop_pct", "0.5"], 0.5):
        assert (
            export.build_spec(options.export_parser().parse_args(words + more)).crop_pct == expected
        )


def test_ema_weights_of_a_run_are_the_best_ones(tmp_path):
    """Not those of the epoch in which the weights without EMA were best."""
    for name, stride in ("checkpoint-best.pth", 1), ("checkpoint-best-ema.pth", 2):
        model_ema = classifier(stem_stride=stride).state_dict()
        torch.save({"model": classifier().state_dict(), "model_ema": model_ema}, tmp_path / name)
    words = [str(tmp_path), "--to", "hf", "--use_ema"]
    assert export.build_spec(options.export_parser().parse_args(words)).shape["stem_stride"] == 2


def test_size_of_the_run_is_that_of_the_export(files):
    words = [files / "classifier.pth", "--to", "hf"]
    build = export.build_spec
    parser = options.export_parser()
    assert build(parser.parse_args(list(map(str, words)))).size == (64, 64)
    words += ["--input_size", "96"]
    assert build(parser.parse_args(list(map(str, words)))).size == (96, 96)
    words = [files / "encoder.pth", "--to", "hf"]
    spec = build(parser.parse_args(list(map(str, words))))
    assert spec.size == (224, 224)
    assert spec.mean == mean_and_std()[0]  # ImageNet's


def test_flags_of_the_file_and_of_its_format_act(files):
    parse = options.export_parser().parse_args
    words = [str(files / "classifier.pth"), "--to", "onnx"]
    assert export.build_spec(parse(words)).opset == ExportSpec.opset
    assert export.build_spec(parse([*words, "--opset", "20"])).opset == 20
    with pytest.raises(UserError, match="has SHA-256"):
        export.build_spec(parse([*words, "--sha256", "0" * 64]))


@pytest.mark.parametrize("name", ["convnextv2_tiny", "convnextv2_atto", "convnext_xlarge"])
def test_published_size_is_called_by_its_name(name):
    with torch.device("meta"):
        given = spec_of(create_model(name, num_classes=7))
    assert export.default_output(given, "timm") == f"{name}-timm.safetensors"
    assert export_formats.timm_arguments(given) == (name, {"num_classes": 7})
