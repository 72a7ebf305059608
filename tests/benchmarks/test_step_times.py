# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The program that measures what the shares of the time cost."""

import re

import pytest
import torch

from benchmarks import step_times

TOY = ["--input_size", "64", "--batch_size", "2", "--rounds", "2", "--steps", "3"]
TOY += ["--print_freq", "2", "--device", "cpu"]


@pytest.mark.slow
def test_report_has_both_kinds_and_their_ratio(capsys):
    assert step_times.main(TOY) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^\| (with shares of the time|without) \| ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["with shares of the time", "without"]
    assert all(float(median) > 0 for _, median in rows)
    assert re.search(r"median \d+\.\d{4}, \d+\.\d{4} to \d+\.\d{4}\. The marks of a step", text)
    assert re.search(r"Shares: data [\d.]+%, forward [\d.]+%, backward [\d.]+%, optimizer", text)


def test_steps_without_shares_are_not_measured():
    """Else the ratio would be 1 whatever the shares cost."""
    clock = step_times.Unmeasured()
    clock.mark("forward")
    assert not any(clock.read().values())
    assert clock.shares(clock.read()) == {}


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        step_times.parse_args(["--rounds", "0"])
    assert "--rounds, --steps, --batch_size and --print_freq: expected 1" in capsys.readouterr().err
    assert step_times.seconds_of_marks(torch.device("cpu"), steps=2) > 0
