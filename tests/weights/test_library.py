# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--pretrained: weights of timm and torchvision, with downloads replaced; checkpoints of both."""

import argparse

import pytest
import torch

import export
import main_finetune
from config import parser as options
from errors import UserError
from models import create_model
from tests.test_end_to_end import FINETUNE, assert_same, run, weights
from tests.test_flags_act import build
from training.setup import check_start, user_modules
from weights.library import read_library_weights
from weights.pretrained import read_pretrained
from weights.saved_run import inherit_flags, read_saved_run

TIMM, TORCHVISION = "timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"


def parse(words: str) -> argparse.Namespace:
    return options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words.split()])


@pytest.fixture
def downloads(monkeypatch):
    """Replace both libraries' downloads; returns the weights that they give."""
    weights = {}
    for name in (TIMM, TORCHVISION):
        torch.manual_seed(5)
        weights[name] = create_model(name).state_dict()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights[TIMM])
    )
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights[TORCHVISION]
    )
    return weights


@pytest.mark.parametrize("name", [TIMM, TORCHVISION])
def test_weights_bring_their_preprocessing_and_a_new_head(name, downloads):
    weights = read_library_weights(name)
    args = parse(f"--model {name} --pretrained --in_chans 1 --stem_stride 1")
    args = inherit_flags(args, weights.saved)
    sides = {TIMM: 224, TORCHVISION: 224}
    assert args.input_size == (sides[name],) * 2
    assert args.crop_pct == pytest.approx(0.875)
    # Of three channels, for an image of one.
    assert args.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert args.head_init_scale == 0.001
    check_start(args, weights)
    model = create_model(name, in_chans=1, num_classes=5, stem_stride=1)
    report = weights.load(model)
    assert any("the model gets a new head" in text for text in report.warnings)
    stem, own = next(iter(downloads[name].items()))
    found = model.state_dict()[stem]
    torch.testing.assert_close(found, own.sum(1, keepdim=True))
    same = [n for n, value in model.state_dict().items() if torch.equal(value, downloads[name][n])]
    assert len(same) >= len(downloads[name]) - 4  # but the stem and the last layer


def test_given_preprocessing_wins(downloads):
    args = parse(f"--model {TIMM} --pretrained --input_size 64 --crop_pct 1 --mean 0.5 --std 0.5")
    args = inherit_flags(args, read_library_weights(TIMM).saved)
    assert (args.input_size, args.crop_pct, args.mean) == ((64, 64), 1.0, (0.5,))


def test_source_names_the_weights(downloads):
    assert read_library_weights(TIMM).path == f"{TIMM}.lamb_in1k"
    assert read_library_weights(TORCHVISION).path == f"{TORCHVISION}.IMAGENET1K_V1"


def fails(*_, **__):
    raise OSError("Temporary failure in name resolution")


def test_no_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fails)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fails)
    for name in (TIMM, TORCHVISION):
        with pytest.raises(UserError, match=r"^no weights for .*Temporary failure.*load it$"):
            read_library_weights(name)


def test_run_names_its_flags_if_weights_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fails)
    words = f"--model {TIMM} --pretrained --input_size 32"
    with pytest.raises(UserError, match="^--pretrained: no weights .* it with --finetune FILE"):
        build("finetune", words, tmp_path / "run", monkeypatch)


def test_network_without_weights_is_named():
    with pytest.raises(UserError, match="no weights for timm:efficientnet_b7 .*No pretrained"):
        read_library_weights("timm:efficientnet_b7")


def test_run_starts_from_the_weights(downloads, tmp_path, monkeypatch):
    words = f"--model {TIMM} --pretrained --freeze_backbone --input_size 32 --stem_stride 4"
    built = build("finetune", words, tmp_path / "run", monkeypatch)
    assert f"loaded 242 tensors from {TIMM}.lamb_in1k" in built.text
    assert f"taken from {TIMM}.lamb_in1k: --crop_pct 0.875 --mean 0.485 0.456 0.406" in built.text
    state = built.inner.state_dict()
    assert torch.equal(state["conv_head.weight"], downloads[TIMM]["conv_head.weight"])
    assert sum(len(g["params"]) for g in built.stepper.optimizer.param_groups) == 2
    # What resumes needs no download, and evaluation neither.
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fails)
    build("finetune", words + " --epochs 3", tmp_path / "run", monkeypatch)
    config = tmp_path / "run/args.yaml"
    main_finetune.main(
        options.parse(options.finetune_parser(), ["--config", str(config), "--eval"])
    )


# --- checkpoints that name a network of a library ------------------------------------------------


def checkpoint(path, name: str, **flags):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, stem_stride=flags.get("stem_stride", 4))
    args = {"model": name, "in_chans": 3, "input_size": [32, 32], "stem_stride": 4} | flags
    torch.save({"model": model.state_dict(), "args": args, "classes": ["a", "b", "c"]}, path)
    return str(path)


def test_checkpoint_may_choose_a_network_of_a_library_but_no_code(tmp_path):
    """timm:NAME is no code, so nobody needs to repeat --model."""
    saved = read_saved_run({"args": {"model": "timm:resnet18(drop_rate=0.1)"}}, "x.pth", {})
    assert inherit_flags(parse("--resume x"), saved).model == "timm:resnet18(drop_rate=0.1)"
    saved = read_saved_run({"args": {"model": "my.nets:net"}}, "x.pth", {})
    with pytest.raises(UserError, match="is code and not a name"):
        inherit_flags(parse("--resume x"), saved)
    assert user_modules({"model": "timm:resnet18", "other": "tests.tiny:other(x=1)"}).keys() == {
        "tests.tiny"
    }


def test_weights_of_another_network_are_refused_in_words(tmp_path):
    path = checkpoint(tmp_path / "x.pth", TIMM)
    weights = read_pretrained(path)
    with pytest.raises(UserError, match=f"was trained with {TIMM}"):
        inherit_flags(parse(f"--finetune {path} --model timm:resnet18"), weights.saved)
    tagged = inherit_flags(parse(f"--finetune {path} --model {TIMM}.lamb_in1k"), weights.saved)
    assert tagged.model == f"{TIMM}.lamb_in1k"  # of the same network
    bare = tmp_path / "bare.pth"
    torch.save(weights.state, bare)
    with pytest.raises(UserError, match="conv1"):
        check_start(parse("--model timm:resnet18"), read_pretrained(str(bare)))
    check_start(parse(f"--model {TIMM}"), read_pretrained(str(bare)))


@pytest.mark.parametrize("name", [TIMM, TORCHVISION])
def test_library_run_is_exported_without_model(name, tmp_path, monkeypatch, capsys):
    path = checkpoint(tmp_path / "x.pth", name, stem_stride=1)
    output = str(tmp_path / "x.safetensors")
    words = [path, "--to", "safetensors", "--output", output]
    export.main(options.export_parser().parse_args(words))
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    state = read_pretrained(output).state
    assert state.keys() == create_model(name, num_classes=3).state_dict().keys()
    with pytest.raises(UserError, match="--to hf is for ConvNeXt"):
        export.main(options.export_parser().parse_args([path, "--to", "hf"]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize("name", [TIMM, TORCHVISION])
def test_library_run_is_exported_as_a_graph(name, target, tmp_path, capsys):
    pytest.importorskip("onnxruntime" if target == "onnx" else "torch")
    path = checkpoint(tmp_path / "x.pth", name)
    output = str(tmp_path / "x") + {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}[target]
    words = [path, "--to", target, "--output", output]
    export.main(options.export_parser().parse_args(words))
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.slow
def test_frozen_run_on_two_processes_resumes_exactly(tmp_path):
    """Under DistributedDataParallel, with EMA; BatchNorm statistics must not move."""
    words = [*FINETUNE, "--model", "timm:test_resnet", "--stem_stride", 1, "--freeze_backbone"]
    words += ["--model_ema", "--epochs", 2, "--save_ckpt_num", 9, "--output_dir"]
    run("main_finetune.py", *words, tmp_path / "whole", ranks=2)
    first, last = (weights(tmp_path / f"whole/checkpoint-{i}.pth") for i in (0, 1))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"fc.weight", "fc.bias"}
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint-0.pth").rename(tmp_path / "again/checkpoint-0.pth")
    run("main_finetune.py", *words, tmp_path / "again", ranks=2)
    for key in ("model", "model_ema"):
        names = [tmp_path / name / "checkpoint-1.pth" for name in ("again", "whole")]
        assert_same(*(weights(name, key) for name in names))


@pytest.mark.parametrize(("name", "part"), [("inception_v3", "AuxLogits"), ("googlenet", "aux1")])
def test_auxiliary_classifiers_of_published_weights_are_left_out(name, part, monkeypatch):
    parts = {part: torch.nn.Linear(1, 1), "fc": torch.nn.Linear(1, 1)}
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: torch.nn.ModuleDict(parts))
    assert {*read_library_weights(f"torchvision:{name}").state} == {"fc.weight", "fc.bias"}


def test_run_of_an_own_network_is_exported_without_model(tmp_path, capsys):
    name = "mlp(hidden_dims=[4])"
    torch.manual_seed(0)
    state = create_model(name, num_classes=3, input_size=(8, 8)).state_dict()
    args = {"model": name, "in_chans": 3, "input_size": [8, 8], "stem_stride": 4}
    torch.save({"model": state, "args": args}, tmp_path / "x.pth")
    words = [str(tmp_path / "x.pth"), "--to", "safetensors"]
    words += ["--output", str(tmp_path / "x.safetensors")]
    export.main(options.export_parser().parse_args(words))
    assert "largest difference 0.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_backbone_with_statistics_of_masked_images_warns(frozen, tmp_path, caplog):
    state = {f"encoder.{n}": v for n, v in create_model(TIMM, num_classes=0).state_dict().items()}
    torch.save({"model": state}, tmp_path / "x.pth")
    args = parse(f"--model {TIMM} --finetune x {'--freeze_backbone' * frozen}")
    check_start(args, read_pretrained(str(tmp_path / "x.pth")))
    assert ("statistics of masked images" in caplog.text) == frozen
