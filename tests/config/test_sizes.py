# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Image sizes by epoch: one flag on the command line and in files, two values for what reads it."""

import argparse

import pytest
import torch

from config import parser as options
from config import predict_flags
from config.sizes import describe_sizes, parse_sizes, sizes_by_epoch, write_sizes

TEXT = "128:0,160:50,224:80"
PARSERS = {"pretrain": options.pretrain_parser, "finetune": options.finetune_parser}


def parse(kind: str, *words: str) -> argparse.Namespace:
    return options.parse(PARSERS[kind](), ["--data_set", "DIGITS", *words])


def refused(capsys: pytest.CaptureFixture, kind: str, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(kind, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_sizes_are_read_and_written():
    sizes = {0: (96, 128), 5: (128, 128), 7: (128, 160)}
    assert parse_sizes("96x128:0, 128:5,128x160:7") == sizes
    assert write_sizes(sizes) == "96x128:0,128:5,128x160:7"
    assert parse_sizes(write_sizes(sizes)) == sizes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("128:0,160", "got '160', expected SIZE:EPOCH pairs with commas and no spaces"),
        ("128:0,160:", "got '160:', expected SIZE:EPOCH"),
        ("128:0,1.5:3", "got '1.5:3', expected SIZE:EPOCH"),
        ("128:0,-160:3", "got '-160:3', expected SIZE:EPOCH"),
        ("128:0,160:2.5", "got '160:2.5', expected SIZE:EPOCH"),
        ("128:0,,160:2", "got '', expected SIZE:EPOCH"),
        ("128:5,160:50", "got '128:5' first, expected epoch 0 there; give SIZE:0"),
        ("128:0,160:50,224:50", "got epoch 50 after 50, expected a later one"),
        ("128:0,160:50,224:20", "got epoch 20 after 50, expected a later one"),
        ("128:0,128:50", "got '128:50' after 128, expected a larger size"),
        ("128:0,96x160:50", "got '96x160:50' after 128, expected a larger size"),
        ("0:0,128:5", "got '0:0', expected a larger size"),
        ("128:0", "got one size, '128:0', expected SIZE:EPOCH pairs"),
    ],
)
@pytest.mark.parametrize("kind", PARSERS)
def test_wrong_sizes_are_refused(text, said, kind, capsys):
    assert said in refused(capsys, kind, f"--input_size={text}")


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("finetune", f"--input_size {TEXT} --epochs 80", "epoch 80 is not below --epochs 80; rais"),
        ("finetune", f"--input_size {TEXT} 224", f"--input_size: got {TEXT} 224, expected one or"),
        ("finetune", f"--input_size {TEXT} --cuda_graphs", "--cuda_graphs true replays steps"),
        ("finetune", "--input_size 16:0,64:5", "--input_size: got 16 16, expected at least 32"),
        ("pretrain", "--input_size 100:0,128:5", "100 is not a multiple of --patch_size 32; try"),
        ("pretrain", "--input_size 96:0,100:5", "100 is not a multiple of --patch_size 32; try"),
        ("pretrain", "--input_size 32:0,64:5", "--input_size 32 32 is a single patch"),
        (
            "pretrain", "--input_size 64:0,224:5 --mask_ratio 0.9",
            "keeps 0 of 4 patches at --input_size 64 64, expected 1 to 3; lower --mask_ratio",
        ),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(kind, words, said, capsys):
    assert said in refused(capsys, kind, *words.split())


@pytest.mark.parametrize("kind", PARSERS)
def test_the_last_size_is_that_of_the_network(kind):
    args = parse(kind, "--input_size", "64x96:0,96:5,128x160:7")
    assert args.input_size == (128, 160)
    assert sizes_by_epoch(args) == {0: (64, 96), 5: (96, 96), 7: (128, 160)}
    assert (
        describe_sizes(args) == "64 x 96 pixels, after 5 epochs 96 x 96, after 7 epochs 128 x 160"
    )
    args = parse(kind, "--input_size", "128")
    assert (args.input_size, args.input_sizes) == ((128, 128), "")
    assert sizes_by_epoch(args) == {0: (128, 128)}
    assert describe_sizes(args) == "128 x 128 pixels"


@pytest.mark.parametrize("words", [["--input_size", TEXT], ["--input_size", "96"], []])
@pytest.mark.parametrize("kind", PARSERS)
def test_files_hold_one_flag(kind, words, tmp_path):
    """args.yaml, a checkpoint and a file of one's own give the flags back; so does one override."""
    args = parse(kind, *words)
    path = tmp_path / "args.yaml"
    path.write_text(options.dump_args(args))
    assert "input_sizes" not in path.read_text()
    assert vars(parse(kind, "--config", str(path))) == {**vars(args), "config": str(path)}
    torch.save({"args": vars(args)}, tmp_path / "checkpoint-0.pth")
    stored = parse(kind, "--config", str(tmp_path / "checkpoint-0.pth"))
    assert (stored.input_size, stored.input_sizes) == (args.input_size, args.input_sizes)
    for other, size, sizes in (("64", (64, 64), ""), ("64:0,96:2", (96, 96), "64:0,96:2")):
        changed = parse(kind, "--config", str(path), "--input_size", other)
        assert (changed.input_size, changed.input_sizes) == (size, sizes)
    (tmp_path / "own.yaml").write_text(f"input_size: {TEXT}\n")
    own = parse(kind, "--recipe", str(tmp_path / "own.yaml"))
    assert (own.input_size, own.input_sizes) == ((224, 224), TEXT)
    assert f"--input_size {TEXT}" in own.recipe


def test_files_of_earlier_versions_have_one_size(tmp_path):
    args = {k: v for k, v in vars(parse("finetune")).items() if k != "input_sizes"}
    torch.save({"args": args | {"input_size": (64, 96)}}, tmp_path / "checkpoint-0.pth")
    (tmp_path / "old.yaml").write_text("input_size:\n- 64\n- 96\n")
    for name in ("checkpoint-0.pth", "old.yaml"):
        found = parse("finetune", "--config", str(tmp_path / name))
        assert (found.input_size, found.input_sizes) == ((64, 96), "")


def test_flags_can_be_finalized_again():
    args = parse("finetune", "--input_size", TEXT)
    again = options.finalize(argparse.Namespace(**vars(args)))
    assert (again.input_size, again.input_sizes) == ((224, 224), TEXT)


@pytest.mark.parametrize(
    "build", [options.export_parser, options.visualize_parser, predict_flags.predict_parser]
)
def test_other_scripts_take_one_size(build, capsys):
    with pytest.raises(SystemExit):
        build().parse_args(["--input_size", TEXT])
    assert f"got '{TEXT}', expected an integer >=1" in capsys.readouterr().err
    assert "by epoch" not in build().format_help()
