# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Two runs with --deterministic end with the same bits."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import datasets
from config import parser as options
from data_loading.rng import make_deterministic
from errors import UserError
from models.kernels import autotune
from tests.groups import results_of, run_ranks
from tests.test_end_to_end import FINETUNE, PRETRAIN, run

ALL = ["--deterministic", "--drop_path", "0.2", "--scale", "0.3", "1", "--save_ckpt_num", "1"]
AUGMENTED = [*FINETUNE, *ALL, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5"]
BASE = {
    "main_pretrain.py": [*PRETRAIN, *ALL],
    "main_finetune.py": [*AUGMENTED, "--mixup", "0.8", "--cutmix", "1", "--model_ema"],
}


def differing(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Where two checkpoints are not the same, bit by bit."""
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [name]
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        return [d for key in ours for d in differing(ours[key], theirs[key], f"{name}.{key}")]
    if isinstance(ours, list | tuple):
        pairs = zip(ours, theirs, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differing(a, b, f"{name}.{i}")]
    return [] if repr(ours) == repr(theirs) else [name]  # NaN is not equal to itself


def final(folder: Path) -> dict:
    """The last checkpoint, but for the flags, in which the folder is named."""
    content = torch.load(folder / "checkpoint-1.pth", weights_only=True)
    return {key: value for key, value in content.items() if key != "args"}


@pytest.mark.slow
@pytest.mark.parametrize("script", BASE)
def test_two_runs_are_equal_whatever_the_workers_and_what_was_measured_before(script, tmp_path):
    """Each implementation of a linear layer sums in its own order, and timing chose one."""
    said = []
    for workers, faster in ((0, "torch"), (0, "onednn"), (3, "onednn")):
        cache = tmp_path / faster / "convnextv2"
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / autotune.cache_file("cpu").name  # one thread here too
        path.write_text(json.dumps({"linear float32": faster}))
        folder = tmp_path / f"run{len(said)}"
        words = ["--num_workers", workers, "--output_dir", folder, "--print_freq", 1]
        env = {"XDG_CACHE_HOME": str(tmp_path / faster)}
        said.append(run(script, *BASE[script], *words, env=env).stdout)
    assert all("linear by torch" in text for text in said)
    runs = [final(tmp_path / f"run{number}") for number in range(3)]
    assert runs[0]["optimizer"]["state"]
    assert differing(runs[0], runs[1]) == []
    assert differing(runs[0], runs[2]) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", BASE)
def test_two_runs_of_two_processes_are_equal(script, tmp_path):
    for name, workers in (("a", 0), ("b", 3)):
        words = ["--batch_size", 2, "--num_workers", workers, "--output_dir", tmp_path / name]
        run(script, *BASE[script], *words, ranks=2)
    assert differing(final(tmp_path / "a"), final(tmp_path / "b")) == []


def test_differences_are_seen():
    one = {"a": [torch.zeros(2)], "b": 1}
    assert differing(one, {"a": [torch.zeros(2)], "b": 1}) == []
    assert differing(one, {"a": [torch.tensor([0.0, 1e-45])], "b": 2}) == [".a.0", ".b"]


# --- order of images and their augmentation ------------------------------------------------------


def parsed(*words: str) -> Any:
    """Flags of main_finetune.py."""
    return options.parse(options.finetune_parser(), [*AUGMENTED, *" ".join(words).split()])


SAMPLED = (
    "--data_set DIGITS --label_fraction 0.01 --num_samples 29 --aug_repeats 2 --sampling balanced"
)


def batches_of(
    batch_size: int, workers: int, more: str = ""
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, images) of this rank in two epochs."""
    words = ["--batch_size", str(batch_size), "--num_workers", str(workers), *more.split()]
    args = parsed(*words)
    train, _, _ = datasets.build_datasets(args)
    batches = datasets.build_loader(train, True, args, "cpu")
    found = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        found += [(ids, images) for images, _, ids in batches]
    return found


def batches_of_rank(rank: int, folder: Path) -> dict[tuple, list]:
    cases = [(workers, more) for workers in (0, 3) for more in ("", SAMPLED)]
    return {(workers, more): batches_of(3, workers, more) for workers, more in cases}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[tuple, list]]:
    """The batches of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks([batches_of_rank], 2, folder)
    return [results["batches_of_rank"] for results in results_of(folder)]


@pytest.mark.parametrize("more", ["", SAMPLED], ids=["all", "sampled"])
def test_order_and_augmentation_are_the_same_for_1_and_2_processes(ranks, more):
    alone = batches_of(6, 0, more)
    assert not torch.equal(alone[0][0], alone[4][0])  # another order in the second epoch
    others = {
        f"2 processes, {n} workers": list(zip(*(r[n, more] for r in ranks), strict=True))
        for n in (0, 3)
    }
    others["1 process, 3 workers"] = [(pair,) for pair in batches_of(6, 3, more)]
    for name, steps in others.items():
        assert len(steps) == len(alone) == 8
        for (ids, images), parts in zip(alone, steps, strict=True):
            together = [torch.stack(part, 1).flatten(0, 1) for part in zip(*parts, strict=True)]
            assert torch.equal(together[0], ids), name
            assert torch.equal(together[1], images), name
    if more:  # each image twice in a row, with other augmentations
        length = len(datasets.build_datasets(parsed(more))[0])
        assert [*(alone[0][0] % length)[::2]] == [*(alone[0][0] % length)[1::2]]
        assert not torch.equal(alone[0][1][::2], alone[0][1][1::2])


# --- what it sets and refuses ---------------------------------------------------------------------


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


def test_torch_is_told_and_cublas_before_its_first_product(restored):
    torch.backends.cudnn.benchmark = True
    make_deterministic(False, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    make_deterministic(True, torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_what_cannot_be_is_refused(restored, capsys):
    with pytest.raises(UserError, match="--device cpu"):
        make_deterministic(True, torch.device("mps"))
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is :0:0"):
        make_deterministic(True, torch.device("cuda"))
    refused = {"--compile": "torch.compile chooses kernels by timing"}
    for opt in ("bnbadamw", "lookahead_bnbadamw8bit", "Lookahead_FusedLAMB"):
        refused[f"--opt {opt}"] = f"is not possible with --opt {opt}"
    for kind in (options.pretrain_parser, options.finetune_parser):
        for words, reason in refused.items():
            with pytest.raises(SystemExit):
                options.parse(kind(), f"--data_set DIGITS --deterministic {words}".split())
            assert reason in capsys.readouterr().err


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
def test_measuring_chooses_no_kernel(kernels):
    words = f"--data_set DIGITS --deterministic --kernels {kernels}".split()
    args = options.parse(options.finetune_parser(), words)
    assert args.kernels == ("torch" if kernels == "auto" else kernels)


def test_triton_kernels_add_in_one_order():
    """So --kernels triton may stay: an atomic addition comes in any order, tuning is timing."""
    text = (
        Path(options.__file__).parents[1] / "models" / "kernels" / "triton_kernels.py"
    ).read_text(encoding="utf-8")
    assert "tl." in text
    assert "tl.atomic" not in text
    assert "autotune" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "--kernels triton", "--amp none", "--cuda_graphs"])
@pytest.mark.parametrize("script", BASE)
def test_two_runs_on_a_gpu_are_equal(script, words, tmp_path):
    for name in ("a", "b"):
        flags = ["--device", "cuda", "--output_dir", tmp_path / name, *words.split()]
        run(script, *BASE[script], *flags)
    assert differing(final(tmp_path / "a"), final(tmp_path / "b")) == []
