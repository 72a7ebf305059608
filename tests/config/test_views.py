# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The first word of visualize.py's command line chooses what it does."""

import pytest

import visualize
from config import parser as options
from config import views


def test_reconstructions_need_no_first_word():
    """Command lines of earlier versions have none."""
    for words in (["--checkpoint", "runs"], ["reconstructions", "--checkpoint", "runs"]):
        view, args = views.parse_view(words)
        assert (view, args.checkpoint) == ("reconstructions", "runs")
        assert args.output == "reconstructions.png"
    assert set(views.VIEWS) == set(visualize.VIEWS)


def test_unknown_word_is_refused_with_a_hint(capsys):
    for word, hint in (("stat", "Did you mean 'stats'"), ("folder", "expected reconstructions, ")):
        with pytest.raises(SystemExit):
            views.parse_view([word])
        assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "script"),
    [
        ("", "pretrain"),
        ("--mask_ratio 0.7", "pretrain"),
        ("--mixup 0.8", "finetune"),
        ("--mixup=0.8", "finetune"),
        ("--script finetune", "finetune"),
        ("--recipe digits_finetune", "finetune"),
        ("--recipe digits_pretrain", "pretrain"),
        ("--config FINE", "finetune"),
        ("--config PRE", "pretrain"),
        ("--resume FINE", "finetune"),
    ],
)
def test_script_is_that_of_the_flags(words, script, tmp_path):
    for name, make in (("FINE", options.finetune_parser), ("PRE", options.pretrain_parser)):
        args = options.parse(make(), ["--data_path", "photos"])
        (tmp_path / f"{name}.yaml").write_text(options.dump_args(args))
        words = words.replace(name, str(tmp_path / f"{name}.yaml"))
    view, args = views.parse_view(["data", "--data_path", "photos", *words.split()])
    assert (view, args.num_images, args.num_epochs) == ("data", 4, 4)
    assert ("mask_ratio" in vars(args)) == (script == "pretrain")


def test_flags_of_both_scripts_are_refused(capsys):
    with pytest.raises(SystemExit):
        views.parse_view(["data", "--data_path", "x", "--mixup", "1", "--mask_ratio", "0.5"])
    assert "unrecognized argument '--mask_ratio'" in capsys.readouterr().err


def test_help_shows_the_flags_of_a_view_first(capsys):
    for word, flag in (("data", "--num_epochs"), ("stats", "--value_range")):
        with pytest.raises(SystemExit):
            views.parse_view([word, "--help"])
        assert flag in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--value_range 1 0", "--value_range 1", "--num_images 0"])
def test_wrong_flags_of_stats_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        views.parse_view(["stats", "--data_path", "x", *words.split()])
    assert words.split()[0] in capsys.readouterr().err
