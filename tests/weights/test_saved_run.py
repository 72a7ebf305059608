# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A command uses the flags of the checkpoint that it starts from, unless others are given."""

import argparse
import logging
import re

import pytest
import torch

from config import parser as options
from errors import UserError
from models import create_model
from weights.saved_run import inherit_flags, read_saved_run

NARROW = {
    "model": "fcmae_convnextv2_atto",
    "in_chans": 1,
    "stem_stride": 2,
    "input_size": (48, 32),
    "crop_pct": 0.5,
    "imagenet_default_mean_and_std": False,
}


def finetune(*words: str) -> argparse.Namespace:
    return options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words])


def pretrain(*words: str) -> argparse.Namespace:
    return options.parse(options.pretrain_parser(), ["--data_set", "DIGITS", *words])


def changed(args: argparse.Namespace, flags: dict | None, **how) -> dict:
    """The flags that a checkpoint with `flags` changes."""
    saved = read_saved_run({"args": flags}, "it.pth", how.pop("weights", None))
    new = vars(inherit_flags(args, saved, **how))
    return {name: value for name, value in new.items() if value != vars(args)[name]}


@pytest.mark.parametrize(
    ("words", "is_taken"),
    [
        ("", True),
        ("--heads a=linear@norm", True),  # as a head that is code has to be typed again
        ("--task auto", True),
        ("--heads b=linear@norm", False),
        ("--head mlp(8)", False),
        ("--data_set table --data_path t.csv --task multi_label", False),
    ],
)
def test_the_loss_is_that_of_the_run_with_its_heads_and_its_task(words, is_taken):
    """The loss of its task was reported in its place, and `conv` averaged other activations."""
    own = {"task": "classification", "loss": "poly", "heads": "a=linear@norm"}
    found = changed(finetune("--eval", "--resume", "it.pth", *words.split()), own)
    assert ("loss" in found) == is_taken
    assert "loss" not in changed(finetune("--resume", "it.pth", *words.split()), own)


def test_flags_come_from_the_checkpoint_unless_they_are_given(caplog):
    """With Inception's mean evaluated by ImageNet's, 100% became 45%."""
    own = NARROW | {"model": "convnextv2_atto"}
    more = {"lr": 7.0, "seed": 3, "patch_size": 16}
    with caplog.at_level(logging.INFO):
        assert changed(finetune("--resume", "it.pth"), NARROW | more) == own
    (record,) = caplog.records
    assert record.getMessage() == (
        "taken from it.pth: --model convnextv2_atto --stem_stride 2 --in_chans 1 "
        "--input_size 48 32 --crop_pct 0.5 --imagenet_default_mean_and_std false"
    )
    caplog.clear()
    words = ("--resume", "it.pth", "--crop_pct", "1", "--input_size", "64", "--in_chans", "3")
    with caplog.at_level(logging.INFO):
        found = changed(finetune(*words), NARROW)
    assert found.keys() == own.keys() - {"crop_pct", "input_size", "in_chans"}
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "--in_chans 3 is used; it.pth was trained with 1",
        "--input_size 64 64 is used; it.pth was trained with 48 32",
        "--crop_pct 1.0 is used; it.pth was trained with 0.5",
    ]


def test_evaluation_takes_the_loss_of_the_run_and_training_does_not():
    """The head `conv` averages as the loss says: evaluation would differ from the run's own."""
    flags = {"task": "classification", "loss": "0.5*bce + ce"}
    words = ("--eval", "true", "--resume", "it.pth")
    assert changed(finetune(*words), flags)["loss"] == flags["loss"]
    assert "loss" not in changed(finetune(*words, "--loss", "ce"), flags)
    assert "loss" not in changed(finetune(*words, "--head", "mlp"), flags)
    assert "loss" not in changed(finetune(*words), flags | {"loss": "ce"})  # that of the task
    assert "loss" not in changed(finetune(*words), flags | {"loss": "my.nets:loss + ce"})  # code
    assert "loss" not in changed(finetune("--finetune", "it.pth"), flags)
    assert "loss" not in changed(finetune("--resume", "it.pth"), flags, resumes=True)


def test_evaluation_leaves_the_weights_of_the_run_out_of_the_labels():
    """With `*` from the run, the column of its weights was one more label."""
    flags = {"label_column": ("*",), "weight_column": "w", "sampling": "weighted"}
    words = ("--data_set", "table", "--data_path", "t.csv", "--resume", "it.pth")
    labels = {"label_column": ("*",)}
    assert changed(finetune(*words, "--eval"), flags) == labels | {"weight_column": "w"}
    assert changed(finetune(*words), flags, resumes=True) == labels  # weights need --sampling
    assert changed(finetune(*words), flags) == {}


OWN_MEAN = {"imagenet_default_mean_and_std": True, "mean": [0.3], "std": (0.2,), "in_chans": 3}


def test_mean_and_std_come_from_the_checkpoint_as_a_whole_or_not_at_all(caplog):
    """One that is typed must not be combined with others of the run."""
    assert changed(finetune("--resume", "x"), OWN_MEAN) == {"mean": (0.3,), "std": (0.2,)}
    caplog.clear()
    words = ("--resume", "x", "--imagenet_default_mean_and_std", "true")
    assert changed(finetune(*words), OWN_MEAN) == {}
    own = "mean 0.485 0.456 0.406 and std 0.229 0.224 0.225 are used"
    saved = "it.pth was trained with mean 0.3 0.3 0.3 and std 0.2 0.2 0.2"
    assert [record.getMessage() for record in caplog.records] == [f"{own}; {saved}"]
    caplog.clear()
    words = ("--resume", "x", "--mean", "0.5", "--std", "0.5")
    assert changed(finetune(*words), {"imagenet_default_mean_and_std": False}) == {}
    assert caplog.records == []  # 0.5 are Inception's
    assert changed(finetune(*words), {"lr": 1.0}) == {}  # a run that stores none
    same = {"mean": [0.5], "std": [0.5], "in_chans": 1}
    changed(finetune(*words, "--in_chans", "1"), same)
    assert caplog.records == []
    rgb = {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.2, 0.5], "in_chans": 3}
    gray = changed(finetune("--resume", "x", "--in_chans", "1"), rgb)
    assert gray == {"mean": (pytest.approx(0.2),), "std": (pytest.approx(0.3),)}
    rgb = {"mean": [0.1, 0.2, 0.3], "std": [1.0]}
    changed(finetune(*words, "--in_chans", "1"), rgb)
    assert "trained with mean 0.1 0.2 0.3 and std 1.0 1.0 1.0" in caplog.text


def test_values_for_other_channels_are_refused_once_the_channels_are_known():
    words = ("--resume", "x", "--mean", "0.5", "0.4", "--std", "1", "--aa", "none")
    assert changed(finetune(*words), {"in_chans": 2}) == {"in_chans": 2}
    with pytest.raises(UserError, match="--mean 0.5 0.4 has 2 values, expected .* --in_chans 4"):
        changed(finetune(*words), {"in_chans": 4})


def test_value_range_comes_from_the_checkpoint(caplog):
    """The weights would see other images; with another mean it still holds."""
    aa = ("--aa", "none")
    saved = {"value_range": [0, 10_000]}
    assert changed(finetune("--resume", "x", *aa), saved) == {"value_range": (0, 10_000)}
    own = ("--mean", "0.5", "--std", "0.2")
    assert changed(pretrain("--resume", "x", *own), saved) == {"value_range": (0, 10_000)}
    caplog.clear()
    assert changed(pretrain("--resume", "x", "--value_range", "0", "255"), saved) == {}
    assert "--value_range 0.0 255.0 is used; it.pth was trained with 0 10000" in caplog.text
    with pytest.raises(UserError, match="--aa .* is for 8-bit images .* --value_range 0 10000"):
        changed(finetune("--resume", "x"), saved)
    for wrong in ([1, 0], [1], ["a", "b"], [0, float("nan")]):
        with pytest.raises(UserError, match="--value_range"):
            changed(pretrain("--resume", "x"), {"value_range": wrong})


def test_held_out_images_are_those_of_the_run(tmp_path, caplog):
    """Evaluated with another split, a run saw images that it was trained on."""
    flags = {"val_split": 0.2, "data_path": str(tmp_path)}
    data = ("--data_set", "IMNET", "--data_path", str(tmp_path))
    assert changed(finetune("--resume", "x"), flags, resumes=True) == {"val_split": 0.2}
    assert changed(finetune("--eval", "--resume", "x", *data), flags) == {"val_split": 0.2}
    assert changed(finetune("--eval", "--resume", "x", *data[:3], "/other"), flags) == {}
    assert changed(finetune("--finetune", "x", *data), flags) == {}
    other = ("--data_set", "image_folder", *data[2:], "--eval_data_path", "/other")
    assert changed(finetune("--eval", "--resume", "x", *other), flags) == {}
    caplog.clear()
    assert changed(finetune("--eval", "--resume", "x", *data, "--val_split", "0.5"), flags) == {}
    assert "--val_split 0.5 is used; it.pth was trained with 0.2" in caplog.text


def test_views_come_from_the_run_to_resume_and_to_evaluate_it(caplog):
    """A new run of its weights would take N times as long to evaluate, and not know why."""
    flags = {"tta": ["hflip", "five_crop"], "crop_pct": 0.5}
    found = {"tta": ("hflip", "five_crop"), "crop_pct": 0.5}
    assert changed(finetune("--eval", "--resume", "x"), flags) == found
    assert changed(finetune("--resume", "x"), flags, resumes=True) == found
    assert changed(finetune("--finetune", "x"), flags) == {"crop_pct": 0.5}
    caplog.clear()
    words = ("--eval", "--resume", "x", "--tta", "none")
    assert changed(finetune(*words), flags) == {"crop_pct": 0.5}
    assert "--tta none is used; it.pth was evaluated with hflip five_crop" in caplog.text
    with pytest.raises(UserError, match="stores --tta .'turn'., expected names of none, hflip"):
        changed(finetune("--eval", "--resume", "x"), {"tta": ["turn"]})


def test_views_are_checked_for_the_size_of_the_run():
    words = ("--eval", "--resume", "x", "--tta", "five_crop")
    with pytest.raises(UserError, match="images are resized to --input_size 32 32"):
        changed(finetune(*words), {"input_size": 32})
    assert changed(finetune(*words), {"input_size": 48}) == {"input_size": (48, 48)}
    with pytest.raises(UserError, match="--tta rot90 needs square images, got --input_size 48 32"):
        changed(finetune(*words[:-1], "rot90"), {"input_size": [48, 32]})


@pytest.mark.parametrize("source", ["--config", "--recipe"])
def test_flags_of_files_count_as_given(source, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("input_size: 64\n")
    words = (source, str(file), "--stem_stride", "2")
    assert changed(finetune(*words), NARROW).keys() == {
        *("model", "in_chans", "crop_pct", "imagenet_default_mean_and_std")
    }


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        (
            "model",
            "convnextv2_nano",
            "is given (on the command line, by --config or --recipe), but it.pth was",
        ),
        (
            "stem_stride",
            "1",
            "but it.pth was trained with 2; give --stem_stride 2, or another checkpoint",
        ),
    ],
)
def test_weights_that_cannot_fit_are_refused_in_words(flag, value, text):
    with pytest.raises(UserError, match=re.escape(text)):
        inherit_flags(finetune(f"--{flag}", value), read_saved_run({"args": NARROW}, "it.pth"))


@pytest.mark.parametrize(
    ("given", "saved"), [("my.nets:tiny", "convnextv2_atto"), ("convnextv2_atto", "my.nets:tiny")]
)
def test_name_and_code_may_be_of_one_network(given, saved, caplog):
    assert changed(finetune("--model", given), {"model": saved}) == {}
    assert caplog.records == []


@pytest.mark.parametrize("text", ["48x32:0", "48:0,32:1", 7])
def test_sizes_by_epoch_that_cannot_be_read_are_an_error(text):
    saved = read_saved_run({"args": NARROW | {"input_sizes": text}}, "it.pth")
    with pytest.raises(UserError, match="it.pth stores sizes by epoch, .* give --input_size"):
        inherit_flags(finetune("--resume", "x"), saved, resumes=True)
    assert inherit_flags(finetune("--resume", "x"), saved).input_sizes == ""  # its weights alone


def test_sizes_of_a_run_must_fit_the_flags_of_the_resumed_one():
    """Half an image in a batch, and a last size that never came, were not refused."""
    flags = NARROW | {"input_sizes": "32x16:0,48x32:10", "progressive_batch": True}
    saved = read_saved_run({"args": flags}, "it.pth")
    for words, said in (("--batch_size 12", "multiple of 8"), ("--epochs 10", "is not below --ep")):
        with pytest.raises(UserError, match=said):
            inherit_flags(finetune("--resume", "x", *words.split()), saved, resumes=True)
    args = inherit_flags(finetune("--resume", "x"), saved, resumes=True)
    assert (args.input_size, args.input_sizes) == ((48, 32), "32x16:0,48x32:10")
    assert args.progressive_batch
    args = inherit_flags(finetune("--resume", "x", "--input_size", "64"), saved, resumes=True)
    assert (args.input_size, args.input_sizes) == ((64, 64), "")


def test_official_checkpoints_store_a_namespace():
    flags = argparse.Namespace(model="convnextv2_tiny", input_size=320, crop_pct=None, lr=1.0)
    assert changed(finetune(), flags) == {"model": "convnextv2_tiny", "input_size": (320, 320)}


@pytest.mark.parametrize("name", ["convnextv2_nano", "fcmae_convnextv2_femto"])
def test_weights_without_flags_tell_the_shape(name):
    with torch.device("meta"):
        weights = create_model(name, in_chans=2, stem_stride=1).state_dict()
    own = {"model": name.removeprefix("fcmae_"), "in_chans": 2, "stem_stride": 1}
    count = None if name.startswith("fcmae_") else 1000  # of create_model
    assert read_saved_run({}, "it.pth", weights).head.count == count
    assert changed(finetune("--resume", "x", "--aa", "none"), None, weights=weights) == own
    assert changed(pretrain("--resume", "x"), None, weights=weights) == own | {"patch_size": 8}
    assert changed(finetune(), None, weights={"conv1.weight": torch.zeros(1)}) == {}


def test_resumed_pretraining_keeps_its_decoder_and_patches():
    decoder = {"patch_size": 16, "norm_pix_loss": False, "decoder_depth": 2}
    decoder |= {"decoder_embed_dim": 8}
    saved = NARROW | decoder
    words = ("--resume", "x", "--decoder_depth", "3")  # `compare_args` refuses this one
    found = changed(pretrain(*words), saved, resumes=True)
    expected = saved | {"model": "convnextv2_atto"}
    assert found == {k: v for k, v in expected.items() if k not in ("crop_pct", "decoder_depth")}
    new = changed(pretrain("--resume", "x"), saved)  # a new run from its weights
    kept = NARROW.keys() - {"crop_pct"}
    assert new == {name: expected[name] for name in (*kept, "patch_size")}
    assert changed(pretrain("--resume", "x"), {"stem_stride": 2})["patch_size"] == 16
    assert "patch_size" not in changed(pretrain("--patch_size", "32"), {"stem_stride": 2})
    assert changed(pretrain("--resume", "x"), {"in_chans": 1}) == {"in_chans": 1}
    own = {"model": "timm:resnet18", "patch_size": None}
    assert changed(pretrain("--resume", "x"), own, resumes=True) == own


def test_sizes_are_checked_after_they_are_known():
    """`--input_size 16` was refused before the stem stride of the checkpoint was read."""
    saved = {"stem_stride": 1}
    args = finetune("--resume", "x", "--input_size", "16")
    assert changed(args, saved) == saved
    with pytest.raises(UserError, match="--input_size: got 16 16, expected at least 32"):
        changed(args, {})


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"model": "shutil:rmtree"}, "trained with --model shutil:rmtree, which is code"),
        ({"input_size": "big"}, "it.pth stores --input_size 'big', expected one or two integers"),
        ({"input_size": []}, r"stores --input_size \[\], expected one or two integers >=1; give"),
        ({"input_size": [1, 3, 64, 64]}, r"stores --input_size \[1, 3, 64, 64\], expected one or"),
        ({"input_size": 0}, r"stores --input_size 0, expected one or two integers >=1; give"),
        ({"in_chans": "3"}, r"stores --in_chans '3', expected an integer >=1; give --in_chans"),
        ({"crop_pct": 0}, r"stores --crop_pct 0, expected a number in \(0,1\]; give --crop_pct"),
        ({"stem_stride": 3}, "stores --stem_stride 3, expected an integer of 1, 2, 4; give"),
        ({"mean": ["a"], "std": [1]}, r"it.pth stores --mean \['a'\], expected numbers"),
    ],
)
def test_file_cannot_choose_code_or_break_the_run(flags, text):
    with pytest.raises(UserError, match=text):
        changed(finetune(), flags)
    given = {"model": "my.nets:tiny", "input_size": "64", "in_chans": "1", "mean": "0", "std": "1"}
    given |= {"crop_pct": "1", "stem_stride": "2"}
    words = [word for name in flags for word in (f"--{name}", given[name])]
    assert changed(finetune(*words), flags) == {}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            {"mean": ["a"], "std": [1]},
            r"stores --mean \['a'\], expected numbers in .*; give --mean",
        ),
        ({"mean": [1.0], "std": []}, r"stores --std \[\], expected numbers >0; give --std"),
        ({"mean": [0.5], "std": [1, 0.0]}, r"stores --std \[1, 0.0\], expected numbers >0; give"),
        ({"mean": [float("nan")], "std": [1.0]}, r"stores --mean \[nan\], expected numbers in"),
    ],
)
def test_unreadable_mean_and_std_of_a_file_do_not_break_a_run_with_its_own(flags, text):
    with pytest.raises(UserError, match=text):
        changed(finetune(), flags)
    assert changed(finetune("--mean", "0", "--std", "1"), flags) == {}


def test_names_and_sizes_of_other_libraries(tmp_path):
    """A file of timm's train.py could not be loaded, whatever --model said."""
    with torch.device("meta"):
        weights = create_model("convnextv2_atto").state_dict()
    flags = {"model": "convnextv2_atto.fcmae_ft_in1k", "input_size": [3, 96, 64]}
    own = {"model": "convnextv2_atto", "input_size": (96, 64)}
    assert changed(finetune(), flags, weights=weights) == own
    words = ("--model", "convnextv2_atto", "--input_size", "64")
    assert changed(finetune(*words), flags, weights=weights) == {}
    assert changed(finetune(), {"model": "resnet50"}) == {}
