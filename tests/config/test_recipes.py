# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Recipes give the published numbers, calculated by hand here."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from config import parser as options
from config import recipes
from data_loading.samplers import TrainSampler
from errors import UserError, plural
from models import create_model
from optim_factory import (
    build_optimizer,
    choose_update_freq,
    count_steps,
    scale_lr,
)
from training.schedules import build_schedule
from training.steps import Steps

ROOT = Path(options.__file__).resolve().parents[1]
PARSERS = {"main_pretrain": options.pretrain_parser, "main_finetune": options.finetune_parser}
NAMES = [name for name in recipes.recipes() if not name.startswith("_")]
SIZES = ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"]
IMAGES_1K, IMAGES_22K = 1_281_167, 14_197_122


def script_of(name: str) -> str:
    pretrain = name.endswith("_pretrain")
    return "main_pretrain" if pretrain else "main_finetune"


def expand(name: str, *words: str):
    """The args of a recipe, as a command line with its data and weights gives them."""
    weights = [] if "pretrain" in name or "scratch" in name else ["--finetune", "CKPT"]
    more = ["--data_path", "D", *weights, *words]
    return options.parse(PARSERS[script_of(name)](), ["--recipe", name, *more])


DATA = ["--data_path", "D"]


def refused(capsys, words, *parts, kind="main_finetune"):
    with pytest.raises(SystemExit) as stop:
        options.parse(PARSERS[kind](), [*DATA, *map(str, words)])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("error:") == 1
    for part in parts:
        assert part in message, message
    return message


# --- every file ------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_published_run():
    expected = {f"{size}_{kind}" for size in SIZES for kind in ("pretrain", "ft", "scratch")}
    for size in SIZES[3:]:
        expected |= {f"{size}_22k_ft", *(f"{size}_22k_1k_{side}" for side in (224, 384, 512))}
    expected |= {f"small_{what}_{step}" for what in ("data", "gpu") for step in ("pretrain", "ft")}
    assert set(NAMES) == expected | {"digits_pretrain", "digits_finetune"}


@pytest.mark.parametrize("name", NAMES)
def test_logged_flags_of_a_recipe_give_the_same_run(name):
    """The logged flags give the same run when pasted; so does --config FILE."""
    args = expand(name)
    size = name.partition("_")[0]
    assert args.model.removeprefix("convnextv2_") == size or size in ("small", "digits")
    if name != "small_data_ft":  # the model is that of --finetune
        assert args.recipe.startswith(f"{name}: --model convnextv2_")
    words = shlex.split(args.recipe.partition(": ")[2])
    rest = ["--data_path", "D", "--finetune", vars(args).get("finetune", "")]
    parser = PARSERS[script_of(name)]
    typed = options.parse(parser(), [*words, *rest[: 4 if "finetune" in args else 2]])
    assert vars(typed) == {**vars(args), "recipe": None}
    path = str(recipes.recipes()[name])
    as_config = options.parse(parser(), ["--config", path, *rest[: 4 if "finetune" in args else 2]])
    assert vars(as_config) == {**vars(args), "recipe": None, "config": path}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_effective_batch_is_kept_or_a_batch_size_that_keeps_it_is_named(name, processes):
    args = expand(name)
    if args.effective_batch is None:
        assert name.startswith(("digits", "small_data"))  # a fixed learning rate
        return
    asked = (args.update_freq, args.effective_batch)
    batch = args.batch_size
    if args.effective_batch < batch * processes:
        with pytest.raises(UserError) as refusal:
            choose_update_freq(*asked, batch, processes)
        batch = int(re.search(r"try --batch_size (\d+)", str(refusal.value))[1])
    update_freq = choose_update_freq(*asked, batch, processes)
    assert update_freq * batch * processes == args.effective_batch


@pytest.mark.parametrize("path", sorted(recipes.FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_starts_with_a_comment_and_has_no_duplicate_keys(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert all(len(line) <= 100 for line in text.splitlines())
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(text))


# --- the tables of the paper -----------------------------------------------------------------

PRETRAIN = ["blr", "weight_decay", "opt_betas", "effective_batch", "warmup_epochs", "epochs"]
PRETRAIN += ["scale", "hflip", "mask_ratio", "patch_size", "norm_pix_loss", "decoder_depth"]
PRETRAIN += ["decoder_embed_dim", "input_size", "opt", "min_lr"]
FINETUNE = ["blr", "weight_decay", "layer_decay", "layer_decay_type", "effective_batch"]
FINETUNE += ["warmup_epochs", "epochs", "smoothing", "mixup", "cutmix", "drop_path", "model_ema"]
B_FT = (6.25e-4, 0.05, 0.6, "group", 1024, 20, 100, 0.1, 0.8, 1.0)
PUBLISHED = {  # in the order of FINETUNE
    "atto_ft": (2e-4, 0.3, 0.9, "single", 1024, 0, 600, 0.2, 0, 0, 0.1, True),
    "femto_ft": (2e-4, 0.05, 0.9, "single", 1024, 0, 600, 0.2, 0.3, 0.3, 0, True),
    "pico_ft": (2e-4, 0.3, 0.9, "single", 1024, 0, 600, 0.2, 0.3, 0.3, 0, True),
    "nano_ft": (2e-4, 0.3, 0.9, "single", 1024, 0, 600, 0.2, 0.5, 0.5, 0.1, True),
    "tiny_ft": (8e-4, 0.05, 0.9, "single", 1024, 40, 300, 0.1, 0.8, 1.0, 0.2, True),
    "base_ft": (*B_FT, 0.1, True),
    "large_ft": (*B_FT, 0.2, True),
    "huge_ft": (1.25e-3, 0.05, 0.75, "single", 1024, 10, 50, 0.1, 0.8, 1.0, 0.3, True),
    "nano_22k_ft": (2.5e-4, 0.05, 0.9, "single", 4096, 5, 90, 0.1, 0.8, 1.0, 0, False),
    "tiny_22k_ft": (2.5e-4, 0.05, 0.9, "single", 4096, 5, 90, 0.1, 0.8, 1.0, 0, False),
    "base_22k_ft": (2.5e-4, 0.05, 0.8, "group", 4096, 5, 90, 0.1, 0.8, 1.0, 0.1, False),
    "large_22k_ft": (2.5e-4, 0.05, 0.8, "group", 4096, 5, 90, 0.1, 0.8, 1.0, 0.1, False),
    "huge_22k_ft": (2.5e-4, 0.05, 0.8, "single", 4096, 5, 90, 0.1, 0.8, 1.0, 0.3, False),
    "nano_22k_1k": (2.5e-5, 1e-8, 0.9, "single", 512, 0, 90, 0.1, 0, 0, 0.1, True),
    "tiny_22k_1k": (2.5e-5, 1e-8, 0.9, "single", 512, 0, 90, 0.1, 0, 0, 0.1, True),
    "base_22k_1k": (2.5e-5, 1e-8, 0.8, "group", 512, 0, 30, 0.1, 0, 0, 0.2, True),
    "large_22k_1k": (2.5e-5, 1e-8, 0.8, "group", 512, 0, 30, 0.1, 0, 0, 0.3, True),
    "huge_22k_1k": (2.5e-5, 1e-8, 0.85, "single", 512, 0, 30, 0.1, 0, 0, 0.5, False),
    # Of training from scratch only the results are published: these are ConvNeXt V1's, or ours.
    "atto_scratch": (2.5e-4, 0.3, 1, "single", 4096, 20, 600, 0.2, 0, 0, 0.1, True),
    "tiny_scratch": (2.5e-4, 0.05, 1, "single", 4096, 20, 300, 0.1, 0.8, 1.0, 0.1, True),
    "large_scratch": (2.5e-4, 0.05, 1, "single", 4096, 20, 300, 0.1, 0.8, 1.0, 0.5, True),
}


@pytest.mark.parametrize("size", SIZES)
def test_pretraining_is_as_published(size):
    args = expand(f"{size}_pretrain")
    expected = (1.5e-4, 0.05, (0.9, 0.95), 4096, 40, 1600)
    expected += ((0.2, 1.0), 0.5, 0.6, 32, True, 1, 512, (224, 224), "adamw", 0)
    assert tuple(getattr(args, key) for key in PRETRAIN) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_finetuning_is_as_published(name):
    for side in (224, 384, 512) if name.endswith("_1k") else (None,):
        args = expand(f"{name}_{side}" if side else name)
        assert tuple(getattr(args, key) for key in FINETUNE) == PUBLISHED[name]
        assert args.input_size == (side or 224, side or 224)
        assert args.head_init_scale == (1.0 if name.endswith("scratch") else 0.001)
        assert (args.reprob, args.aa, args.opt) == (0.25, "rand-m9-mstd0.5-inc1", "adamw")
        assert (args.crop_pct, args.min_lr) == (None, 1e-6)
        assert args.model_ema_eval == args.model_ema
        assert args.model_ema_decay == 0.9999
        assert args.disable_eval == ("22k_ft" in name)


@pytest.mark.parametrize(
    ("names", "processes", "lr"),
    [
        ("atto_pretrain huge_pretrain small_gpu_pretrain", 1, 0.0024),
        ("base_pretrain large_pretrain", 64, 0.0024),
        ("atto_ft femto_ft pico_ft nano_ft", 8, 0.0008),
        ("tiny_ft small_gpu_ft", 1, 0.0032),
        ("base_ft large_ft", 32, 0.0025),
        ("huge_ft", 8, 0.005),
        ("atto_scratch base_scratch base_22k_ft nano_22k_ft", 8, 0.004),
        ("base_22k_1k_224 huge_22k_1k_384 huge_22k_1k_512", 8, 0.00005),
        ("small_data_pretrain small_data_ft", 2, 0.0005),
    ],
)
def test_peak_learning_rate(names, processes, lr):
    for name in names.split():
        args = expand(name)
        freq = choose_update_freq(
            args.update_freq, args.effective_batch, args.batch_size, processes
        )
        got = scale_lr(args.lr, args.blr, args.batch_size * freq * processes)
        assert got == pytest.approx(lr, rel=1e-12), name


# --- what each parameter gets ----------------------------------------------------------------


def optimizer_of(args, lr: float):
    with torch.device("meta"):
        model = create_model(args.model, num_classes=1000)
    optimizer = build_optimizer(args, model, lr)
    return dict(model.named_parameters()), optimizer


def group_of(optimizer, parameter) -> dict:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


STEM, HEAD = "downsample_layers.0.0.weight", "head.weight"
SCALES = {  # of the learning rate: layer decay to the power of the layers up to the head
    "atto_ft": {STEM: 0.2541865828, "stages.2.3.dwconv.weight": 0.59049, HEAD: 1},
    "nano_ft": {STEM: 0.2058911321, "stages.2.7.pwconv2.weight": 0.729, HEAD: 1},
    "tiny_ft": {
        STEM: 0.1350851718,
        "downsample_layers.2.1.weight": 0.2824295365,
        "stages.2.8.pwconv1.weight": 0.6561,
        "norm.weight": 0.9,
        HEAD: 1,
    },
    "base_ft": {
        STEM: 0.0013060694,
        "stages.0.2.pwconv1.weight": 0.0021767823,
        "stages.2.8.pwconv1.weight": 0.01679616,
        "stages.2.26.pwconv1.weight": 0.36,
        "stages.3.0.pwconv1.weight": 0.6,
        HEAD: 1,
    },
    "huge_ft": {STEM: 2.3837831494e-05, "stages.2.26.pwconv1.weight": 0.31640625, HEAD: 1},
    "tiny_22k_ft": {STEM: 0.1350851718, "stages.2.8.pwconv1.weight": 0.6561},
    "base_22k_ft": {STEM: 0.0549755814, "stages.2.8.pwconv1.weight": 0.16777216},
    "huge_22k_ft": {"stages.2.26.pwconv1.weight": 0.4096},
    "large_22k_1k_384": {STEM: 0.0549755814, "stages.2.26.pwconv1.weight": 0.64},
    "huge_22k_1k_512": {"stages.2.26.pwconv1.weight": 0.52200625, "stages.3.2.norm.weight": 0.85},
    "base_scratch": {STEM: 1, "stages.2.26.pwconv1.weight": 1, HEAD: 1},
}


@pytest.mark.parametrize("name", SCALES)
def test_layer_decay_of_named_parameters(name):
    parameters, optimizer = optimizer_of(expand(name), lr=1.0)
    for key, scale in SCALES[name].items():
        assert group_of(optimizer, parameters[key])["lr_scale"] == pytest.approx(scale, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "decay"),
    [("atto_ft", 0.3), ("femto_ft", 0.05), ("base_ft", 0.05), ("tiny_22k_1k_224", 1e-8)],
)
def test_weight_decay_of_named_parameters(name, decay):
    parameters, optimizer = optimizer_of(expand(name), lr=1.0)
    for key in (STEM, "stages.2.1.pwconv1.weight", HEAD):
        assert group_of(optimizer, parameters[key])["weight_decay"] == decay
    for key in ("stages.2.1.grn.gamma", "stages.2.1.norm.weight", "head.bias"):
        assert group_of(optimizer, parameters[key])["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "images", "processes", "expected"),
    [
        ("tiny_ft", IMAGES_1K, 8, 1251),  # 160145 of a rank: 5004 batches of 32, in fours
        ("tiny_ft", IMAGES_1K, 32, 1251),  # 40036 of a rank: 1251 batches
        ("base_pretrain", IMAGES_1K, 64, 312),  # 20018 of a rank: 312 batches of 64
        ("base_pretrain", IMAGES_1K, 8, 313),  # 2502 batches, in eights and one of six
        ("base_22k_1k_384", IMAGES_1K, 32, 2502),
        ("base_22k_ft", IMAGES_22K, 128, 3466),
        ("base_scratch", IMAGES_1K, 64, 312),
    ],
)
def test_steps_of_an_epoch(name, images, processes, expected):
    args = expand(name)
    freq = choose_update_freq(None, args.effective_batch, args.batch_size, processes)
    batches = len(TrainSampler(images, 0, 0, processes)) // args.batch_size
    assert count_steps(batches, freq) == expected


SCHEDULES = {  # (updates an epoch, peak lr, {update: lr of the head})
    # 12480 updates of warm-up, 499200 in all
    "base_pretrain": (312, 0.0024, {0: 2.4e-3 / 12480, 6239: 0.0012, 12479: 0.0024, 499199: 0}),
    # no warm-up, 750600 in all
    "atto_ft": (1251, 0.0008, {0: 0.0008, 375300: 0.0004005, 750599: 1e-6}),
    # 50040 of warm-up, 375300 in all; a third and a half of the way down
    "tiny_ft": (
        1251,
        0.0032,
        {
            0: 0.0032 / 50040,
            25019: 0.0016,
            50039: 0.0032,
            50040: 0.0032,
            50040 + 108420: 0.00240025,
            50040 + 162629: 0.0016005,
            375299: 1e-6,
        },
    ),
    # 25020 of warm-up, 125100 in all
    "base_ft": (1251, 0.0025, {0: 0.0025 / 25020, 25019: 0.0025, 75059: 0.0012505, 125099: 1e-6}),
    # 12510 of warm-up, 62550 in all
    "huge_ft": (1251, 0.005, {0: 0.005 / 12510, 12509: 0.005, 62549: 1e-6}),
    # 17330 of warm-up, 311940 in all
    "base_22k_ft": (3466, 0.004, {0: 0.004 / 17330, 17329: 0.004, 164635: 0.0020005, 311939: 1e-6}),
    "base_22k_1k_384": (2502, 0.00005, {0: 0.00005, 37530: 0.0000255, 75059: 1e-6}),
    "base_scratch": (312, 0.004, {0: 0.004 / 6240, 6239: 0.004, 93599: 1e-6}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_at_chosen_steps(name):
    updates_per_epoch, peak, expected = SCHEDULES[name]
    args = expand(name)
    head = torch.nn.Parameter(torch.zeros(2, 2))
    group = {"params": [head], "lr_scale": 0.5, "decayed": True}
    optimizer = torch.optim.SGD([group], lr=peak)
    schedule = build_schedule(args, optimizer, peak, Steps.even(updates_per_epoch, args.epochs))
    for update, lr in expected.items():
        assert schedule.apply(update) == pytest.approx(lr, rel=3e-5, abs=1e-12), update
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr, rel=3e-5, abs=1e-12)
    assert schedule.total == max(expected) + 1


# --- the command line, --config, --recipe ----------------------------------------------------


def test_command_line_wins_over_config_and_config_over_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 30\nwarmup_epochs: 3\ndrop_path: 0.2\n")
    args = expand("tiny_ft", "--config", str(path), "--warmup_epochs", "2", "--seed", "5")
    assert (args.epochs, args.warmup_epochs, args.mixup, args.seed) == (30, 2, 0.8, 5)
    assert args.recipe.endswith("; changed: --epochs 30 --warmup_epochs 2.0")
    assert "--epochs 300 " in args.recipe  # the recipe itself stays readable


@pytest.mark.parametrize(
    ("name", "words", "kept", "gone"),
    [
        ("tiny_ft", "--update_freq 3", {"update_freq": 3}, {"effective_batch": None}),
        ("tiny_ft", "--effective_batch 64", {"effective_batch": 64}, {"update_freq": None}),
        ("digits_finetune", "--blr 0.002", {"blr": 0.002}, {"lr": None}),
        ("tiny_ft", "--lr 0.002", {"lr": 0.002}, {}),
        ("tiny_ft", "--warmup_steps 9", {"warmup_steps": 9}, {"warmup_epochs": 20}),
    ],
)
def test_partner_flag_wins_and_is_logged(name, words, kept, gone):
    args = expand(name, *words.split())
    for key, value in {**kept, **gone}.items():
        assert getattr(args, key) == value
    assert args.recipe.endswith(f"; changed: {words}")


def test_args_yaml_reads_back_to_the_same_run(tmp_path):
    path = tmp_path / "args.yaml"
    for words in ("", "--update_freq 2", "--use_amp false", "--lr 1e-3"):
        args = expand("tiny_ft", *words.split())
        path.write_text(options.dump_args(args))
        assert path.read_text().startswith("# recipe tiny_ft: --model convnextv2_tiny ")
        again = options.parse(options.finetune_parser(), ["--config", str(path)])
        assert vars(again) == {**vars(args), "config": str(path), "recipe": None}
    other = ["--config", str(path), "--effective_batch", "64", "--amp", "fp16"]
    changed = options.parse(options.finetune_parser(), other)
    assert (changed.effective_batch, changed.update_freq, changed.amp) == (64, None, "fp16")


RUNS = {  # flags of a training -> flags of an evaluation by its file -> eval_data_path, val_split
    "--val_split 0.3": {"--eval_data_path B": ("B", 0), "--seed 1": (None, 0.3)},
    "--eval_data_path A": {
        "--val_split 0.2": (None, 0.2),
        "--val_split 0": ("A", 0),
        "--eval_data_path B": ("B", 0),
    },
    "--disable_eval true": {"--eval_data_path B": ("B", 0)},
    "--eval_data_path A --cuda_graphs true": {"--compile true": ("A", 0)},
    "--eval_data_path A --pretrained true --model timm:resnet18": {"--finetune x": ("A", 0)},
    "--eval_data_path A --model_ema true --model_ema_eval true": {"--model_ema false": ("A", 0)},
}


@pytest.mark.parametrize(
    ("run", "words"), [(run, words) for run, each in RUNS.items() for words in each]
)
def test_a_run_is_evaluated_by_its_file_with_other_data(tmp_path, run, words):
    """Flags of its training were said to contradict those of the evaluation."""
    first = [*DATA, "--data_set", "image_folder", "--output_dir", str(tmp_path), *run.split()]
    args = options.parse(options.finetune_parser(), first)
    (tmp_path / "args.yaml").write_text(options.dump_args(args))
    words, found = words.split(), RUNS[run][words]
    args = options.parse(
        options.finetune_parser(), ["--config", str(tmp_path), "--eval", "true", *words]
    )
    assert (args.eval_data_path, args.val_split, args.disable_eval) == (*found, False)


def test_own_file_builds_on_a_recipe_or_on_another_file(tmp_path):
    (tmp_path / "first.yaml").write_text("base: tiny_ft\nepochs: 50\nupdate_freq: 2\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nmixup: 0\n")
    args = expand(str(tmp_path / "second.yaml"))
    assert (args.model, args.epochs, args.mixup, args.cutmix) == ("convnextv2_tiny", 50, 0, 1)
    assert (args.update_freq, args.effective_batch) == (2, None)


def test_later_files_of_a_base_win_and_partners_replace_each_other(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "args.yaml").write_text("data_path: /images\nepochs: 70\n")
    (tmp_path / "loss.yaml").write_text("smoothing: 0\nupdate_freq: 2\nepochs: 80\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: [tiny_ft, data/args.yaml, loss.yaml]\nmixup: 0\n")
    args = options.parse(options.finetune_parser(), ["--config", str(mine)])
    assert (args.model, args.data_path, args.epochs) == ("convnextv2_tiny", "/images", 80)
    assert (args.update_freq, args.effective_batch, args.smoothing) == (2, None, 0)
    mine.write_text("base: ./data\n")  # the folder of a run
    assert options.parse(options.finetune_parser(), ["--config", str(mine)]).epochs == 70
    folder = options.parse(options.finetune_parser(), ["--config", str(tmp_path / "data")])
    assert folder.epochs == 70


def save_flags(args, path):
    torch.save({"model": {}, "args": options.absolute_paths(vars(args))}, path)
    return str(path)


@pytest.mark.parametrize("words", ["", "--update_freq 2", "--use_amp false", "--aa none"])
def test_checkpoint_gives_the_flags_of_its_run(tmp_path, words):
    args = expand("tiny_ft", *words.split())
    path = save_flags(args, tmp_path / "checkpoint-0.pth")
    again = options.parse(options.finetune_parser(), ["--config", path])
    assert vars(again) == {**vars(args), "config": path, "recipe": None}
    changed = options.parse(options.finetune_parser(), ["--config", path, "--epochs", "50"])
    assert (changed.epochs, changed.model) == (50, args.model)
    (tmp_path / "mine.yaml").write_text("base: checkpoint-0.pth\nepochs: 50\n")
    built = options.parse(options.finetune_parser(), ["--config", str(tmp_path / "mine.yaml")])
    assert (built.epochs, built.model, built.mixup) == (50, args.model, args.mixup)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model", "my.module:net"], "model"),
        (["--loss", "0.5*ce + my.losses:own(a=1)"], "loss"),
        (["--metrics", "acc1", "my.metrics:own"], "metrics"),
        (["--sched", "linear(0,1)[0.5] + my.mod:f(2)[0.5]"], "sched"),
        (["--loss", "timm:ce + my.losses:own"], "loss"),
        (["--hook", "csv", "my.hooks:Own"], "hook"),
        (["--heads", "main=linear@norm, aux=my.heads:own@norm"], "heads"),
    ],
)
def test_code_that_a_checkpoint_names_must_be_typed_too(capsys, tmp_path, words, key):
    args = options.parse(options.finetune_parser(), [*words, *DATA])
    path = save_flags(args, tmp_path / "checkpoint-0.pth")
    refused(capsys, ["--config", path], f"names code, --{key}", "my.", "args.yaml of the run")
    args = options.parse(options.finetune_parser(), ["--config", path, *words])
    assert getattr(args, key) == getattr(
        options.parse(options.finetune_parser(), [*words, *DATA]), key
    )


def test_base_that_a_checkpoint_names_is_not_read(tmp_path):
    (tmp_path / "evil.yaml").write_text("loss: 'my.losses:own'\n")
    args = options.absolute_paths(vars(expand("tiny_ft"))) | {"base": "evil.yaml"}
    torch.save({"args": args}, tmp_path / "checkpoint-0.pth")
    words = ["--config", str(tmp_path / "checkpoint-0.pth")]
    assert options.parse(options.finetune_parser(), words).loss == args["loss"]


def test_names_of_libraries_and_patterns_are_no_code(tmp_path):
    words = ["--model", "timm:resnet18", "--param_group", "head:lr=10", "--freeze", "stem:0-2"]
    args = options.parse(options.finetune_parser(), [*words, *DATA])
    path = save_flags(args, tmp_path / "checkpoint-0.pth")
    again = options.parse(options.finetune_parser(), ["--config", path])
    assert (again.model, again.param_group) == ("timm:resnet18", args.param_group)


def test_files_without_flags_are_usage_errors(capsys, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    refused(capsys, ["--config", tmp_path / "weights.pth"], "holds no flags", "YAML file")
    refused(capsys, ["--config", tmp_path / "broken.pth"], "broken.pth: cannot read the file")
    refused(capsys, ["--config", tmp_path / "none.pth"], "none.pth: cannot read the file")
    (tmp_path / "empty").mkdir()
    refused(capsys, ["--config", tmp_path / "empty"], "cannot read the file", "args.yaml")
    path = save_flags(expand("tiny_ft"), tmp_path / "checkpoint-0.pth")
    refused(capsys, ["--config", path], "main_finetune", kind="main_pretrain")


def test_list_shows_every_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(options.finetune_parser(), ["--recipe", "list"])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 3 for line in lines)
    for name in NAMES:
        wanted = "main_pretrain.py" if name.endswith("pretrain") else "main_finetune.py"
        (line,) = (line for line in lines if line.split()[0] == name)
        assert line.split()[1] == wanted


def test_wrong_recipes_are_usage_errors(capsys, tmp_path):
    refused(
        capsys,
        ["--recipe", "tny_ft"],
        "unknown recipe 'tny_ft'",
        "Did you mean 'tiny_ft'",
        "list shows",
    )
    refused(capsys, ["--recipe", "_ft"], "unknown recipe")
    refused(capsys, ["--recipe", "../recipes/tiny_ft"], "unknown recipe")
    refused(capsys, ["--recipe", "no/such.yaml"], "no/such.yaml", "cannot read")
    refused(capsys, ["--recipe", "tiny_pretrain"], "tiny_pretrain: this file is for main_pre")
    refused(
        capsys,
        ["--recipe", "tiny_ft"],
        "for main_finetune.py, not for main_pretrain.py",
        kind="main_pretrain",
    )
    refused(capsys, ["--config", recipes.recipes()["digits_pretrain"]], "for main_pretrain.py")
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: two.yaml\nepochs: 3\n")
    two.write_text("base: one.yaml\n")
    refused(capsys, ["--recipe", one], "one.yaml builds on itself", "base two.yaml")
    (tmp_path / "args.yaml").write_text("base: ./\n")
    refused(capsys, ["--config", tmp_path], "args.yaml builds on itself", "base ./")
    for text, *parts in [
        ("base: tiny_tf", "base tiny_tf: unknown recipe", "'tiny_ft'"),
        ("recipe: tiny_ft", "unknown key 'recipe'", "base: NAME"),
        ("base: tiny_ft\nepoch: 3", "unknown key 'epoch'", "epochs"),
        ("base: tiny_ft\nepochs: many", "--epochs", "'many'"),
        ("base: [tiny_ft, tiny_tf]", "base tiny_tf: unknown recipe"),
        ("update_freq: 2\neffective_batch: 64", "--update_freq 2", "drop one"),
    ]:
        one.write_text(text)
        refused(capsys, ["--recipe", one], *parts)


# --- the effective batch ---------------------------------------------------------------------


def test_update_freq_and_effective_batch_exclude_each_other(capsys):
    words = ["--update_freq", "4", "--effective_batch", "64"]
    refused(capsys, words, "--update_freq 4 and --effective_batch 64", "drop one")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((None, None, 32, 8), 1),
        ((4, None, 32, 8), 4),
        ((None, 1024, 32, 8), 4),
        ((None, 1024, 32, 1), 32),
        ((None, 1024, 32, 32), 1),
        ((None, 4096, 64, 2), 32),
    ],
)
def test_update_freq_follows_from_the_processes(log, asked, expected):
    assert choose_update_freq(*asked) == expected
    batch, processes = asked[2:]
    images = {1: 256, 4: 1024, 32: 1024 if batch == 32 else 4096}[expected]
    images = 1024 if processes == 32 else images
    sizes = [(batch, "image"), (expected, "micro-batch"), (processes, "process")]
    sizes = " x ".join(plural(*size) for size in sizes)
    assert f"effective batch {images} = {sizes}" in log.text


@pytest.mark.parametrize(
    ("effective", "batch", "processes", "parts"),
    [
        (1024, 48, 8, ["48 x 8 processes = 384", "--batch_size 32 or 64"]),
        (1024, 32, 64, ["= 2048", "--batch_size 16"]),
        (1024, 32, 3, ["= 96; try --effective_batch 960 or 1056"]),  # no batch size would do
        (2, 1, 8, ["= 8; try --effective_batch 8"]),
    ],
)
def test_effective_batch_that_does_not_divide_is_refused(effective, batch, processes, parts):
    with pytest.raises(UserError) as refusal:
        choose_update_freq(None, effective, batch, processes)
    for part in (f"--effective_batch {effective} is not a multiple", *parts):
        assert part in str(refusal.value)


def test_epoch_smaller_than_a_step_is_logged(log):
    assert (count_steps(8, 4), count_steps(9, 4), count_steps(4, 4)) == (2, 3, 1)
    assert log.text == ""
    assert count_steps(3, 4) == 1
    assert "3 micro-batches, fewer than the 4 of an optimizer step" in log.text


# --- docs and a run --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_docs_state_the_result_that_the_recipe_states(name):
    table = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    size, _, kind = name.partition("_")
    if size not in SIZES:
        assert f"`{name}`" in table
        return
    first = recipes.recipes()[name].read_text(encoding="utf-8").partition("\n")[0]
    if kind in ("pretrain", "22k_ft"):  # steps on the way to a result
        assert f"`SIZE_{kind}`" in table
        return
    (row,) = [line for line in table.splitlines() if f"`SIZE_{kind}` |" in line]
    cell = row.split("|")[2 + SIZES.index(size)].strip()
    found = re.search(r"published ([\d.]+)%", first)
    assert cell == (found[1] if found else "—")


@pytest.mark.slow
def test_run_logs_its_recipe_and_effective_batch(tmp_path):
    words = "--recipe atto_ft --model tests.tiny:classifier --data_set tests.tiny:colors --aa none"
    words += " --input_size 16 --stem_stride 1 --epochs 1 --batch_size 4 --effective_batch 16"
    words += f" --num_workers 0 --device cpu --output_dir {tmp_path}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", "main_finetune.py", *words.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipe atto_ft: --model convnextv2_atto --batch_size 32") == 1
    assert "changed: --model tests.tiny:classifier" in done.stdout
    sizes = "effective batch 16 = 4 images x 2 micro-batches x 2 processes"
    assert done.stdout.count(sizes) == 1
    assert "random weights" in done.stdout  # --finetune was forgotten
    assert "peak lr 1.25e-05" in done.stdout  # 2e-4 * 16 / 256
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert saved["state"]["global_step"] == math.ceil(26 // 8 / 2) == 2
    assert saved["args"]["update_freq"] is None
    path = tmp_path / "args.yaml"
    again = options.parse(options.finetune_parser(), ["--config", str(path)])
    assert (again.effective_batch, again.update_freq, again.weight_decay) == (16, None, 0.3)
