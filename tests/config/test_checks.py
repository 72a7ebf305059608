# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags without a value, without an effect, or that do nothing with --eval."""

import argparse
import copy
import pickle
import re

import pytest

from config import checks, flags, predict_flags, probe_flags, views
from config import parser as options
from config.kinds import FileToWrite

PARSERS = {
    "pretrain": options.pretrain_parser,
    "finetune": options.finetune_parser,
    "visualize": options.visualize_parser,
    "export": options.export_parser,
    "pack": options.pack_parser,
    "predict": predict_flags.predict_parser,
    "features": lambda: probe_flags.probe_parser("features"),
    "report": views.report_parser,
    "explain": views.explain_parser,
    "data": views.data_parser,
}
WORDS = {"predict": 2} | dict.fromkeys(("export", "pack", "features", "report", "explain"), 1)
DIGITS = ["--data_set", "DIGITS"]
MAY_BE_EMPTY = {"output_dir", "log_dir", "resume", "finetune", "model_prefix", "aa"}


def finetune(*words):
    return options.parse(options.finetune_parser(), [*DIGITS, *words])


def refused(capsys, *words):
    """Return the error of flags that are refused."""
    with pytest.raises(SystemExit) as stop:
        finetune(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- empty texts -----------------------------------------------------------------------------


def texts(kind):
    """Names of the flags of a script that take a text."""
    actions = [x for x in PARSERS[kind]()._actions if x.nargs != 0 and x.choices is None]
    return [x.dest for x in actions if isinstance(x.type, FileToWrite | None)]


@pytest.mark.parametrize("kind", PARSERS)
def test_an_empty_text_is_refused_unless_it_has_a_meaning(kind, capsys):
    """It is what an unset shell variable gives: `--sched "$S"`."""
    for name in sorted({*texts(kind)} - {"checkpoint", "source", "dest", "input", "runs"}):
        words = ["x"] * WORDS.get(kind, 0) + [f"--{name}", ""]
        if name in MAY_BE_EMPTY:
            assert vars(PARSERS[kind]().parse_args(words))[name] == ""
            continue
        with pytest.raises(SystemExit):
            PARSERS[kind]().parse_args(words)
        error = capsys.readouterr().err
        assert re.search(rf"argument --{name}(/--\w+)?: got an empty text; give ", error)


def test_an_empty_text_among_several_is_refused(capsys):
    assert "--metrics: got an empty text; give NAME" in refused(capsys, "--metrics", "acc1", "")
    assert "--tracker: got an empty text" in refused(capsys, "--tracker= ")


def test_files_hold_empty_texts_for_flags_without_a_value(tmp_path, capsys):
    path = tmp_path / "args.yaml"
    path.write_text(options.dump_args(finetune()))
    assert "head: ''" in path.read_text()
    assert finetune("--config", str(path)).head == ""
    path.write_text("sched: ''\n")
    assert finetune("--config", str(path)).sched == ""


def test_flags_that_may_be_empty_exist():
    known = {row[0].removeprefix("--") for rows in flags.FLAGS.values() for row in rows}
    assert set(flags.MAY_BE_EMPTY.split()) <= known


# --- flags that need others ------------------------------------------------------------------

NEEDS = {  # flag with a value: what it needs to act
    "--linear_probe_blr 2.5": "--linear_probe",
    "--layer_decay_type group": "--layer_decay 0.5",
    "--mixup_mode elem": "--cutmix 1",
    "--mixup_prob 0.5": "--cutmix_minmax 0.2 0.8",
    "--mixup_off_epoch 3": "--cutmix 1",
    "--aug_off_epoch 3": "--aa rand-m9",
    "--mixup_switch_prob 0.2": "--mixup 1 --cutmix 1",
    "--color_jitter_prob 0.5": "--color_jitter 0.4",
    "--remode rand": "--reprob 0.1",
    "--recount 2": "--reprob 0.1",
    "--progressive_batch true": "--input_size 64:0,224:2",
    "--model_ema_decay 0.9": "--model_ema",
    "--model_key model": "--finetune x",
    "--model_prefix encoder.": "--resume x",
    "--save_ckpt_every_steps 2": "--save_ckpt true",
    "--save_ckpt_every_minutes 2.5": "--save_ckpt true",
    "--async_save true": "--save_ckpt true",
    "--max_save_failures 2": "--save_ckpt true",
}
WITHOUT = ["--reprob", "0", "--aa", "none", "--save_ckpt", "false"]


@pytest.mark.parametrize("words", NEEDS)
def test_a_typed_flag_that_lacks_another_one_is_refused(words, capsys, tmp_path):
    """It did nothing; as a default, from a file and with --eval it still may."""
    flag, value = words.split()
    name = flag.removeprefix("--")
    said = refused(capsys, *WITHOUT, flag, value)
    assert f"{words} needs {checks.NEEDS[name][0]}; add it, or drop {flag}" in said
    if (default := flags.default_of(name)) not in (None, ""):
        finetune(*WITHOUT, flag, str(default))
    finetune(*WITHOUT, flag, value, "--eval", "--resume", "x")
    finetune(*WITHOUT, flag, value, *NEEDS[words].split())
    args = vars(finetune(*WITHOUT)) | {name: value}
    path = tmp_path / "args.yaml"
    path.write_text(options.dump_args(argparse.Namespace(**args)))
    finetune("--config", str(path))


def test_a_default_of_the_official_code_needs_nothing():
    assert finetune(*WITHOUT, "--model_key", "model|module").model_key == "model|module"


def test_nothing_is_saved_without_a_folder(capsys):
    said = refused(capsys, "--async_save", "true", "--output_dir", "none")
    assert "--async_save true needs --save_ckpt true with an output folder; add it, or drop" in said


def test_every_need_is_tested():
    assert [words.split()[0][2:] for words in NEEDS] == [*checks.NEEDS]


def test_typed_flags_are_those_of_the_command_line(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("seed: 3\nlr: 1\n")
    args = finetune("--config", str(path), "--lr", "2")
    assert args.typed == {"data_set", "config", "lr"}
    assert args.given == {"data_set", "config", "lr", "seed"}
    for other in (args.replace(lr=3.0), pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert other.typed == args.typed


@pytest.mark.parametrize("head", ["linear@layer4", " mlp(hidden=8)@stages.2", "own.code:f @norm"])
def test_a_head_on_a_block_is_for_another_flag(head, capsys):
    said = refused(capsys, "--head", head)
    assert f'a head on a block is for --heads; give --heads "main={head.strip()}"' in said
    finetune("--heads", f"main={head.strip()}")
    finetune("--head", "own.code:f(key='a@b')")
