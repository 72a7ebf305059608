# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags without a value, without an effect, or that do nothing with --eval."""

import pytest

from config import flags
from config import parser as options

PARSERS = {
    "pretrain": options.pretrain_parser,
    "finetune": options.finetune_parser,
    "visualize": options.visualize_parser,
    "export": options.export_parser,
}
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
    actions = PARSERS[kind]()._actions
    return [x.dest for x in actions if x.nargs != 0 and x.type is None and x.choices is None]


@pytest.mark.parametrize("kind", PARSERS)
def test_an_empty_text_is_refused_unless_it_has_a_meaning(kind, capsys):
    """It is what an unset shell variable gives: `--sched "$S"`."""
    for name in sorted({*texts(kind)} - {"checkpoint"}):
        words = ["x"] * (kind == "export") + [f"--{name}", ""]
        if name in MAY_BE_EMPTY:
            assert vars(PARSERS[kind]().parse_args(words))[name] == ""
            continue
        with pytest.raises(SystemExit):
            PARSERS[kind]().parse_args(words)
        assert f"--{name}: got an empty text; give " in capsys.readouterr().err


def test_an_empty_text_among_several_is_refused(capsys):
    assert "--metrics: got an empty text; give NAME" in refused(capsys, "--metrics", "acc1", "")
    assert "--tracker: got an empty text" in refused(capsys, "--tracker= ")


def test_files_hold_empty_texts_for_flags_without_a_value(tmp_path, capsys):
    path = tmp_path / "args.yaml"
    path.write_text(options.dump_args(finetune()))
    assert "head: ''" in path.read_text()
    assert finetune("--config", str(path)).head == ""
    path.write_text("sched: ''\n")
    assert "--sched: got an empty text" in refused(capsys, "--config", str(path))


def test_flags_that_may_be_empty_exist():
    known = {row[0].removeprefix("--") for rows in flags.FLAGS.values() for row in rows}
    assert set(flags.MAY_BE_EMPTY.split()) <= known
