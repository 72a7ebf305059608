# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Ranks begin only alike."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import torch

from parallel import process_group
from tests.parallel.test_failure import QUICK, Ranks, ends, imported_once, pretrain, start_script
from tests.test_end_to_end import FINETUNE, ROOT
from training import setup

__all__ = ["imported_once"]  # a fixture


def different(args: SimpleNamespace) -> None:
    process_group.init_distributed_mode("cpu")
    flags = {"lr": 0.1 * (args.rank != 1), "seed": args.rank == 2, "epochs": 3}
    setup.check_alike(flags | {"local_rank": args.rank, "num_workers": args.rank})


def pretrain_at_own_rate(args: SimpleNamespace) -> None:
    pretrain(args, "--lr", ["0.01", "0.02"][args.rank])


def test_one_difference_is_told_and_other_ranks_are_counted(tmp_path):
    started = Ranks(different, tmp_path, size=3)
    assert started.end() == [2, 2, 2]
    assert "".join(map(started.said, range(3))).count("error [rank ") == 1
    assert (
        "]: rank 1 was not started as rank 0 was: it has --lr 0.0 instead of 0.1; others that "
        "differ: 2. Give all"
    ) in "".join(map(started.said, range(3)))


def test_script_refuses_other_flags_before_it_does_anything(tmp_path):
    """Each had its own learning rate, and the weights of all became those of none."""
    started = Ranks(pretrain_at_own_rate, tmp_path)
    assert started.end() == [2, 2]
    (told,) = [said for said in map(started.said, (0, 1)) if said]
    assert told.startswith("program.py: error [rank ")
    assert "]: rank 1 was not started as rank 0 was: it has --lr 0.02 instead of 0.01. Gi" in told
    assert not (tmp_path / "run").exists()


def test_description_has_flags_versions_and_files():
    found = setup.describe({"lr": 0.1, "input_size": (32, 32), "local_rank": 3, "num_workers": 2})
    assert found["--lr"] == "0.1"
    assert found["--input_size"] == "(32, 32)"
    assert not {"--local_rank", "--num_workers"} & found.keys()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"Python", "timm", "numpy", "torchvision", "utils.py", "models/fcmae.py"} <= found.keys()


def test_own_code_that_flags_name_is_compared_too():
    found = setup.describe(
        {"model": "tests.tiny:classifier", "dist_url": "tcp://here:1", "opt": "a:b"}
    )
    assert found["tests.tiny"].startswith("(SHA-256 ")
    assert "a" not in found


def test_order_of_flags_is_no_difference():
    """Equal ones had another digest, and no difference to show."""
    one, two = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert setup.digest_of(one) == setup.digest_of(two) != setup.digest_of({"a": "1", "b": "3"})


def test_first_differences_are_told_and_all_are_counted():
    first = dict.fromkeys("abcdef", "1")
    assert setup.differences(first, first) == ([], 0)
    told, count = setup.differences({"a": "1", "c": "2", "g": "3"}, first)
    assert told == ["b absent instead of 1", "c 2 instead of 1", "d absent instead of 1"]
    assert count == 6


def test_scripts_of_different_copies_are_told_the_file(tmp_path):
    files = [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), ROOT / "tests" / "tiny.py"]
    for path in files:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    with open(tmp_path / "training/meters.py", "a") as file:
        file.write("# mended\n")
    words = [*FINETUNE, *QUICK]
    codes, _, errors = ends(start_script([ROOT, tmp_path], "main_finetune.py", *words))
    assert codes == [2, 2]
    (told,) = filter(None, errors)
    assert told.startswith("main_finetune.py: error [rank ")
    assert "]: rank 1 was not started as rank 0 was: it has training/meters.py (SHA-256 " in told
