# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every flag of the training scripts changes what a run computes, by the very value that it has.

A flag that is read (tests/config/test_no_dead_flag.py) may still reach nobody. Each row runs a
script's `main` in this process, with the training of an epoch left out, and looks at what it built.
"""

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import main_finetune
import main_pretrain
from config import parser as options
from data_loading.split import list_labels
from models import kernels
from models.layers import DropPath
from tests import fakes, tiny
from training.stepper import autocast

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune}
COMMON = (
    "--input_size 16 --stem_stride 1 --batch_size 6 --lr 0.01 --num_workers 0 --device cpu "
    "--epochs 2 --log_dir none --data_set tests.test_flags_act:recorded --data_path here"
)
BASE = {
    "pretrain": f"--model tests.tiny:fcmae --decoder_embed_dim 8 {COMMON}",
    "finetune": f"--model tests.tiny:classifier {COMMON}",
}
PATHS: list[str | None] = []


def recorded(data_path: str | None, train: bool) -> tiny.Colors:
    """`tests.tiny:colors`; notes the path that it was given."""
    PATHS.append(data_path)
    return tiny.colors(data_path, train)


class Rows(tiny.Colors):
    """Colors with a row of zeros and ones for each image; the uneven ones have two classes."""

    def __init__(self, length: int, uneven: bool) -> None:
        super().__init__(length)
        labels = torch.arange(length)
        self.targets = (labels >= 20).long() if uneven else torch.eye(3)[labels % 3]
        self.classes = ("many", "few") if uneven else self.classes

    def __getitem__(self, index: int) -> tuple:
        return super().__getitem__(index)[0], self.targets[index]


def rowed(data_path: str, train: bool) -> Rows:
    return Rows(26 if train else 7, uneven=False)


def uneven(data_path: str, train: bool) -> Rows:
    return Rows(26, uneven=True)


@dataclass
class Built:
    """What a script had built when its first epoch was about to begin, and the files it left."""

    args: argparse.Namespace
    folder: Path
    model: Any = None
    inner: Any = None  # without DistributedDataParallel
    train: Any = None  # data loaders
    val: Any = None
    metrics: Any = None
    loop: Any = None
    text: str = ""
    paths: list[str | None] = field(default_factory=list)  # of the data sets
    kernels: str = ""
    epochs: list[int] = field(default_factory=list)

    @property
    def stepper(self) -> Any:
        return self.loop.stepper

    @property
    def group(self) -> dict:
        """The parameter group of the deepest decayed weights."""
        return max(self.stepper.optimizer.param_groups, key=lambda g: (g["decayed"], g["lr_scale"]))

    def sample(self, index: int = 0, loader: str = "train") -> torch.Tensor:
        """An image as the loader's data set gives it, (C, H, W)."""
        return getattr(self, loader).loader.dataset[0, index][0]

    def files(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))


def build(script: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Run a script's main; its `train_one_epoch` does nothing but take the optimizer steps."""
    main = MAINS[script]
    with_folder = f"--output_dir {folder} " * ("--output_dir" not in words)
    words = f"{BASE[script]} {with_folder}{words}"
    args = options.parse(main.get_args_parser(), words.split())
    built = Built(args, folder)

    def train_one_epoch(model, model_without_ddp, data_loader, loop):
        built.model, built.inner, built.train, built.loop = (
            model, model_without_ddp, data_loader, loop,
        )  # fmt: skip
        built.epochs.append(loop.state.epoch)
        for _ in range(-(-len(data_loader) // loop.stepper.update_freq)):
            loop.schedule.apply(loop.state.global_step)
            loop.state.global_step += 1
        return {"loss": 1.0, "lr": 0.0}

    def evaluate(data_loader, model, device, amp, criterion, metrics, reporter=None, split=""):
        built.val, built.metrics = data_loader, metrics
        return {"acc1": 50.0, "loss": 1.0}

    monkeypatch.setattr(main, "train_one_epoch", train_one_epoch)
    if script == "finetune":
        monkeypatch.setattr(main, "evaluate", evaluate)
        monkeypatch.setattr(main, "evaluate_ema", evaluate)
    PATHS.clear()
    fakes.CALLS.clear()
    try:
        with fakes.logged() as messages:
            main.main(args)
    finally:
        torch.use_deterministic_algorithms(False)
    built.text, built.paths = "\n".join(messages), list(PATHS)
    built.kernels = kernels.autotune.autotuner.mode
    return built


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Return a function like `build`; it runs a script once for all rows with the same words."""
    runs: dict[tuple[str, str], Built] = {}

    def run(script: str, words: str) -> Built:
        if (script, words) not in runs:
            with pytest.MonkeyPatch.context() as patch:
                folder = tmp_path_factory.mktemp("baseline")
                runs[script, words] = build(script, words, folder, patch)
        return runs[script, words]

    return run


def deepest_drop_path(built: Built) -> float:
    return max(module.prob for module in built.inner.modules() if isinstance(module, DropPath))


def loss_of(built: Built) -> tuple[list[str], float]:
    criterion = built.loop.criterion
    return [f"{term.factor} {term.text}" for term in criterion.terms], criterion.smoothing


def transform(built: Built, loader: str = "train") -> str:
    return repr(getattr(built, loader).loader.dataset.transform)


def last_step(built: Built) -> Any:
    return built.train.loader.dataset.transform.transforms[-1]


def precision(built: Built) -> torch.dtype:
    with autocast(built.stepper.device, built.stepper.amp):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def drawn(built: Built) -> list[int]:
    """Number of images of each class in an epoch."""
    dataset, sampler = built.train.loader.dataset, built.train.loader.sampler
    return torch.bincount(dataset.dataset.targets[[key[1] % 26 for key in sampler]]).tolist()


def images_per_epoch(built: Built) -> dict[int, int]:
    """Times that an image comes in an epoch -> number of such images."""
    return dict(Counter(Counter(index % 26 for _, index in built.train.loader.sampler).values()))


def rows_of(built: Built) -> list[dict]:
    """The lines of log.txt."""
    return [json.loads(line) for line in (built.folder / "log.txt").read_text().splitlines()]


def kept_labels(built: Built) -> torch.Tensor:
    """The labels of the images to train on."""
    return torch.from_numpy(list_labels(built.train.loader.dataset.dataset))


ROWED, UNEVEN = (f"--data_set tests.test_flags_act:{name}" for name in ("rowed", "uneven"))
# (flag words, what to look at, its value without them, its value with them). A fifth entry: words
# for both runs.
Row = tuple
SHARED: dict[str, Row] = {
    "input_size": ("--input_size 32", lambda b: tuple(b.sample().shape), (3, 16, 16), (3, 32, 32)),
    "in_chans": ("--in_chans 1", lambda b: (b.inner.in_chans, len(b.sample())), (3, 3), (1, 1)),
    "drop_path": ("--drop_path 0.3", deepest_drop_path, 0.0, pytest.approx(0.3)),
    "data_path": ("--data_path there", lambda b: b.paths[0], "here", "there"),
    "mean": (
        "--mean 0.1 0.2 0.3 --std 0.7", lambda b: b.train.mean,
        pytest.approx([0.485, 0.456, 0.406]), pytest.approx([0.1, 0.2, 0.3]),
    ),
    "std": (
        "--mean 0 --std 0.7", lambda b: b.train.std,
        pytest.approx([0.229, 0.224, 0.225]), pytest.approx([0.7] * 3),
    ),
    "value_range": (
        "--value_range 0 255", lambda b: b.train.loader.dataset.value_range, None, (0, 255),
    ),
    "num_workers": ("--num_workers 2", lambda b: b.train.loader.num_workers, 0, 2),
    "on_bad_image": (
        "--on_bad_image skip",
        lambda b: (b.train.loader.dataset.on_bad, b.loop.checkpoints.before_save.__self__.active),
        ("error", False),
        ("replace", True),
    ),
    "decode": ("--decode fast", lambda b: b.train.loader.dataset.fast, False, True),
    "data_timeout": (
        "--data_timeout 7", lambda b: b.train.loader.timeout, 1800.0, 7.0, "--num_workers 1",
    ),
    "hflip": ("--hflip 1", lambda b: "HorizontalFlip(p=1" in transform(b), False, True),
    "ratio": ("--ratio 0.5 0.6", lambda b: "ratio=(0.5, 0.6)" in transform(b), False, True),
    "vflip": ("--vflip 0.4", lambda b: "VerticalFlip(p=0.4)" in transform(b), False, True),
    "rot90": ("--rot90 0.4", lambda b: "RandomRotate90(p=0.4)" in transform(b), False, True),
    "train_interpolation": (
        "--train_interpolation bilinear", lambda b: "bicubic" in transform(b), True, False,
    ),
    "aa": ("--aa v0", lambda b: "AutoAugment" in transform(b), False, True, "--data_set DIGITS"),
    "color_jitter": (
        "--color_jitter 0.4", lambda b: "ColorJitter" in transform(b), False, True, "--aa none",
    ),
    "color_jitter_prob": (
        "--color_jitter_prob 0.8", lambda b: "RandomApply" in transform(b), False, True,
        "--aa none --color_jitter 0.4",
    ),
    "pca_lighting": (
        "--pca_lighting 0.1", lambda b: "PcaLighting(std=0.1)" in transform(b), False, True,
    ),
    "grayscale_prob": (
        "--grayscale_prob 0.2", lambda b: "RandomGrayscale(p=0.2)" in transform(b), False, True,
    ),
    "gaussian_blur_prob": (
        "--gaussian_blur_prob 0.1", lambda b: "RandomGaussianBlur(p=0.1)" in transform(b),
        False, True,
    ),
    "remode": (
        "--remode const", lambda b: last_step(b).erase.mode, "pixel", "const", "--reprob 0.1",
    ),
    "recount": ("--recount 3", lambda b: last_step(b).erase.max_count, 1, 3, "--reprob 0.1"),
    "aug_off_epoch": (
        "--aug_off_epoch 1",
        lambda b: "RandAugment" in repr(b.train.loader.dataset.transform_at(1)),
        True,
        False,
        "--data_set DIGITS --aa rand-m9",
    ),
    "epochs": ("--epochs 3", lambda b: (len(b.epochs), b.loop.schedule.total), (2, 8), (3, 12)),
    "start_epoch": ("--start_epoch 1", lambda b: b.epochs, [0, 1], [1]),
    "batch_size": (
        "--batch_size 4", lambda b: (b.train.loader.batch_size, len(b.train)), (6, 4), (4, 6),
    ),
    "num_samples": (
        "--num_samples 40", lambda b: (len([*b.train.loader.sampler]), len(b.train)), (26, 4),
        (40, 6),
    ),
    "aug_repeats": (
        "--aug_repeats 3", lambda b: images_per_epoch(b), {1: 26}, {3: 8, 2: 1},
    ),
    "progressive_batch": (
        "--progressive_batch",
        lambda b: [b.train.loader.batch_sizes.at(epoch) for epoch in (0, 1)],
        [8, 8],
        [18, 8],
        "--input_size 16:0,24:1 --batch_size 8",
    ),
    "update_freq": ("--update_freq 2", lambda b: b.stepper.update_freq, 1, 2),
    "effective_batch": ("--effective_batch 12", lambda b: b.stepper.update_freq, 1, 2),
    "opt": ("--opt sgd", lambda b: type(b.stepper.optimizer).__name__, "AdamW", "SGD"),
    "opt_eps": ("--opt_eps 1e-3", lambda b: b.group["eps"], 1e-8, 1e-3),
    "momentum": ("--momentum 0.5", lambda b: b.group["momentum"], 0.9, 0.5, "--opt sgd"),
    "weight_decay": ("--weight_decay 0.2", lambda b: b.group["weight_decay"], 0.05, 0.2),
    "weight_decay_end": (
        "--weight_decay_end 0.2", lambda b: b.group["weight_decay"], 0.05, pytest.approx(0.2),
    ),
    "sched": (
        "--sched linear(1,0)",
        lambda b: [b.loop.schedule.rate(step) for step in (0, 1)],
        pytest.approx([0.005, 0.01]),
        pytest.approx([0.01, 0.00875]),
    ),
    "sched_options": (
        "--sched_options eps=linear(1e-8,1e-4)", lambda b: b.group["eps"], 1e-8,
        pytest.approx(1e-4 * 7 / 8, rel=1e-3),
    ),
    "no_weight_decay": (
        "--no_weight_decay none",
        lambda b: {group["weight_decay"] for group in b.stepper.optimizer.param_groups},
        {0.0, 0.05},
        {0.05},
    ),
    "param_group": (
        "--param_group *.dwconv:lr=0.5,eps=1e-3",
        lambda b: {group["eps"] for group in b.stepper.optimizer.param_groups},
        {1e-8},
        {1e-8, 1e-3},
    ),
    "freeze": ("--freeze *.dwconv:0-1", lambda b: frozen(b), set(), {"dwconv"}),
    "clip_mode": ("--clip_mode value", lambda b: b.stepper.clip_mode, "norm", "value",
                  "--clip_grad 1"),
    "clip_grad": ("--clip_grad 3", lambda b: b.stepper.clip_grad, None, 3.0),
    "lr": ("--lr 0.02", lambda b: b.loop.schedule.lr, 0.01, 0.02),
    "min_lr": ("--min_lr 0.001", lambda b: b.loop.schedule.min_lr == 0.001, False, True),
    "warmup_epochs": ("--warmup_epochs 1", lambda b: b.loop.schedule.warmup, 2, 4),
    "warmup_steps": ("--warmup_steps 3", lambda b: b.loop.schedule.warmup, 2, 3),
    "seed": (
        "--seed 5", lambda b: (b.loop.seed, b.train.loader.sampler.seed), (0, 0), (5, 5),
    ),
    "amp": ("--amp bf16", precision, torch.float32, torch.bfloat16),
    "use_amp": ("--use_amp true", precision, torch.float32, torch.bfloat16),
    "on_spike": ("--on_spike rollback", lambda b: b.loop.guard.snapshot_freq, None, 100),
    "snapshot_freq": (
        "--snapshot_freq 7", lambda b: b.loop.guard.snapshot_freq, 100, 7, "--on_spike rollback",
    ),
    "max_bad_steps": ("--max_bad_steps 3", lambda b: b.loop.guard.max_bad_steps, 10, 3),
    "spike_factor": ("--spike_factor 8", lambda b: b.stepper.spike_factor == 8, False, True),
    "kernels": (
        "--kernels torch", lambda b: b.kernels, "auto", "torch",
    ),
    "deterministic": (
        "--deterministic", lambda b: b.kernels, "auto", "torch",
    ),
    "grad_checkpointing": (
        "--grad_checkpointing",
        lambda b: any(getattr(m, "checkpointing", False) for m in b.inner.modules()),
        False,
        True,
    ),
    "print_freq": ("--print_freq 7", lambda b: b.loop.reporter.print_freq, 20, 7),
    "progress": (
        "--progress bar", lambda b: type(b.loop.reporter.hooks[0]).__name__, "LineHook", "BarHook",
    ),
    "report": ("--report false", lambda b: b.files("report.html"), ["report.html"], []),
    "hook": ("--hook csv", lambda b: b.files("metrics.csv"), [], ["metrics.csv"]),
    "profile": ("--profile", lambda b: [*b.loop.reporter.observers], [], ["profiler"]),
    "tracker": (
        "--tracker tests.fakes:tracker", lambda b: [*b.loop.reporter.observers], [],
        ["tests.fakes:tracker"],
    ),
    "project": (
        "--project mine", lambda b: tracked(b)["project"], "convnextv2", "mine",
        "--tracker tests.fakes:tracker",
    ),
    "tags": (
        "--tags a b", lambda b: tracked(b)["config"].get("tags"), None, ["a", "b"],
        "--tracker tests.fakes:tracker",
    ),
    "save_ckpt": (
        "--save_ckpt false",
        lambda b: b.files("checkpoint-?.pth"),
        ["checkpoint-0.pth", "checkpoint-1.pth"],
        [],
    ),
    "save_ckpt_freq": (
        "--save_ckpt_freq 2",
        lambda b: b.files("checkpoint-?.pth"),
        ["checkpoint-0.pth", "checkpoint-1.pth"],
        ["checkpoint-1.pth"],
    ),
    "save_ckpt_num": (
        "--save_ckpt_num 1",
        lambda b: b.files("checkpoint-?.pth"),
        ["checkpoint-0.pth", "checkpoint-1.pth"],
        ["checkpoint-1.pth"],
    ),
    "save_ckpt_every_steps": (
        "--save_ckpt_every_steps 3", lambda b: b.loop.checkpoints.every_steps, None, 3,
    ),
    "save_ckpt_every_minutes": (
        "--save_ckpt_every_minutes 9", lambda b: b.loop.checkpoints.signals.save_minutes, None, 9.0,
    ),
    "max_minutes": ("--max_minutes 99", lambda b: b.loop.checkpoints.signals.max_minutes, None, 99),
    "max_save_failures": (
        "--max_save_failures 2", lambda b: b.loop.checkpoints.max_failures, 5, 2,
    ),
    "async_save": ("--async_save", lambda b: b.loop.checkpoints.writer.pool is None, True, False),
}  # fmt: skip
PRETRAIN: dict[str, Row] = {
    "model": ("--model tests.tiny:fcmae64", lambda b: type(b.inner).__name__, "FCMAE", "FCMAE64"),
    "stem_stride": (
        "--stem_stride 2", lambda b: b.inner.encoder.total_stride, 8, 16, "--input_size 32",
    ),
    "patch_size": ("--patch_size 16", lambda b: b.inner.patch_size, 8, 16, "--input_size 32"),
    "mask_ratio": ("--mask_ratio 0.3", lambda b: b.inner.mask_ratio, 0.6, 0.3),
    "norm_pix_loss": ("--norm_pix_loss false", lambda b: b.inner.norm_pix_loss, True, False),
    "recon_loss": ("--recon_loss l1", lambda b: b.inner.recon_loss, "l2", "l1"),
    "decoder_depth": ("--decoder_depth 2", lambda b: len(b.inner.decoder), 1, 2),
    "decoder_embed_dim": ("--decoder_embed_dim 12", lambda b: b.inner.mask_token.shape[1], 8, 12),
    "picture_freq": (
        "--picture_freq 1",
        lambda b: b.files("reconstructions/*"),
        ["epoch-1.png"],
        ["epoch-0.png", "epoch-1.png"],
    ),
    "probe_every": (
        "--probe_every 0", lambda b: [("rank_me" in row) for row in rows_of(b)], [True] * 2,
        [False] * 2,
    ),
    "probe_images": (
        "--probe_images 12", lambda b: "10 training and 2 test images" in b.text, False,
        True, "--probes linear",
    ),
    "probes": (
        "--probes knn(k=3)",
        lambda b: [name for name in rows_of(b)[0] if re.fullmatch(r"probe_[a-z]+(_\d+)?", name)],
        ["probe_knn", "probe_linear"],
        ["probe_knn_3"],
    ),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std false",
        lambda b: round(b.train.mean[0], 3),
        0.485,
        0.5,
    ),
    "scale": (
        "--scale 0.5 0.6",
        lambda b: "scale=(0.5, 0.6)" in transform(b),
        False,
        True,
    ),
    "reprob": ("--reprob 0.5", lambda b: "RandomErasing" in type(last_step(b)).__name__, False,
               True),
    "opt_betas": ("--opt_betas 0.8 0.7", lambda b: b.group["betas"], (0.9, 0.95), (0.8, 0.7)),
    "blr": (
        "--blr 1.28", lambda b: round(b.loop.schedule.lr, 6), 0.01, 0.03,
    ),
}  # fmt: skip
FINETUNE: dict[str, Row] = {
    "model": ("--model tests.tiny:other", lambda b: type(b.inner).__name__, "ConvNeXtV2", "Other"),
    "stem_stride": (
        "--stem_stride 2", lambda b: b.inner.total_stride, 8, 16, "--input_size 32",
    ),
    "imagenet_default_mean_and_std": (
        "--imagenet_default_mean_and_std false",
        lambda b: [round(loader.mean[0], 3) for loader in (b.train, b.val)],
        [0.485] * 2,
        [0.5] * 2,
    ),
    "scale": (
        "--scale 0.5 0.6", lambda b: "scale=(0.5, 0.6)" in transform(b), False, True,
    ),
    "crop_pct": (
        "--crop_pct 0.5", lambda b: "size=32" in transform(b, "val"), False, True,
    ),
    "tta": ("--tta hflip vflip", lambda b: b.val.views.count, 1, 4),
    "reprob": (
        "--reprob 0.5", lambda b: last_step(b).prob, 0.25, 0.5, "--aa none --data_set DIGITS",
    ),
    "smoothing": (
        "--smoothing 0.3", lambda b: b.loop.criterion.smoothing, 0.1, 0.3,
    ),
    "loss": (
        "--loss 0.5*focal+bce",
        loss_of,
        (["1.0 ce"], 0.1),
        (["0.5 focal", "1.0 bce"], 0.0),
    ),
    "class_weights": (
        "--class_weights [1,2,3]",
        lambda b: b.loop.criterion.class_weights,
        None,
        pytest.approx(torch.tensor([0.5, 1.0, 1.5])),
    ),
    "mixup": ("--mixup 0.8", lambda b: b.loop.mixup and mixing(b).mixup_alpha, None, 0.8),
    "cutmix": ("--cutmix 0.7", lambda b: b.loop.mixup and mixing(b).cutmix_alpha, None, 0.7),
    "cutmix_minmax": (
        "--cutmix_minmax 0.2 0.4",
        lambda b: mixing(b).cutmix_minmax,
        None,
        (0.2, 0.4),
        "--cutmix 1",
    ),
    "mixup_prob": ("--mixup_prob 0.4", lambda b: mixing(b).mix_prob, 1.0, 0.4, "--mixup 1"),
    "mixup_switch_prob": (
        "--mixup_switch_prob 0.3", lambda b: mixing(b).switch_prob, 0.5, 0.3,
        "--mixup 1 --cutmix 1",
    ),
    "mixup_mode": ("--mixup_mode elem", lambda b: mixing(b).mode, "batch", "elem", "--mixup 1"),
    "mixup_off_epoch": (
        "--mixup_off_epoch 1", lambda b: b.loop.mixup.is_on(1), True, False, "--mixup 1",
    ),
    "opt_betas": ("--opt_betas 0.8 0.7", lambda b: b.group["betas"], (0.9, 0.999), (0.8, 0.7)),
    "blr": ("--blr 1.28", lambda b: round(b.loop.schedule.lr, 6), 0.01, 0.03),
    "head": (
        "--head mlp(hidden=7)",
        lambda b: [tuple(p.shape) for n, p in b.inner.named_parameters() if n.startswith("head.")],
        [(3, 10), (3,)],
        [(7, 10), (7,), (3, 7), (3,)],
    ),
    "heads": (
        "--heads main=linear@norm,aux=conv@stages.2 --loss main=ce,aux=0.4*bce",
        lambda b: [tuple(x.shape) for x in output_of(b)],
        [(6, 3)],
        [(6, 3), (6, 3)],
    ),
    "head_init_scale": (
        "--head_init_scale 0.5",
        lambda b: round(b.inner.head.weight.std().item(), 2),
        0.02,
        0.01,
    ),
    "freeze_backbone": (
        "--freeze_backbone",
        lambda b: sum(len(group["params"]) for group in b.stepper.optimizer.param_groups),
        60,
        2,
    ),
    "layer_decay": ("--layer_decay 0.5", lambda b: min_scale(b), 1.0, 0.5**5),
    "layer_decay_type": (
        "--layer_decay_type group", lambda b: min_scale(b), 0.5**5, 0.5**5, "--layer_decay 0.5",
    ),
    "model_ema": ("--model_ema", lambda b: b.loop.model_ema is None, True, False),
    "model_ema_decay": (
        "--model_ema_decay 0.5", lambda b: b.loop.model_ema.decay, 0.9999, 0.5, "--model_ema",
    ),
    "model_ema_force_cpu": (
        "--model_ema_force_cpu",
        lambda b: b.loop.model_ema.device.type,
        "cpu",
        "cpu",
        "--model_ema",
    ),
    "model_ema_eval": (
        "--model_ema_eval",
        lambda b: "test_acc1_ema" in (b.folder / "log.txt").read_text(),
        False,
        True,
        "--model_ema",
    ),
    "metrics": (
        "--metrics f1 ece(bins=4)",
        lambda b: b.metrics.names,
        ["loss", "acc1", "acc5"],
        ["loss", "f1", "ece_4", "acc1"],
    ),
    "best_metric": (
        "--best_metric loss",
        lambda b: (b.loop.state.best, b.loop.state.best_metric, b.loop.state.lower_is_better),
        ({"best": 50.0}, "acc1", False),
        ({"best": 1.0}, "loss", True),
    ),
    "eval_freq": ("--eval_freq 2", lambda b: evaluations_of(b), [True, True], [False, True]),
    "patience": ("--patience 1", lambda b: evaluations_of(b), [True] * 3, [True] * 2, "--epochs 3"),
    "task": (
        "--task multi_label", lambda b: (b.loop.criterion.kind, loss_of(b)[0], b.metrics.best),
        ("number", ["1.0 l2"], "rmse"), ("multi", ["1.0 bce"], "map"), f"--task regression {ROWED}",
    ),
    "normalize_targets": (
        "--normalize_targets false", lambda b: b.metrics.scale and b.metrics.scale.mean,
        pytest.approx((9 / 26, 9 / 26, 8 / 26)), None, f"--task regression {ROWED}",
    ),
    "sampling": ("--sampling balanced", lambda b: drawn(b), [20, 6], [13, 13], UNEVEN),
    "label_fraction": (
        "--label_fraction 0.5", lambda b: torch.bincount(kept_labels(b)).tolist(), [20, 6],
        [10, 3], UNEVEN,
    ),
    "disable_eval": (
        "--disable_eval",
        lambda b: "test_acc1" in (b.folder / "log.txt").read_text(),
        True,
        False,
    ),
}  # fmt: skip
# Flags that other tests show to act, with the file.
ELSEWHERE = {
    "tests/data_loading/test_split.py": "val_split",
    "tests/data_loading/test_tables.py": "image_column label_column split_column weight_column "
    "image_root",
    "tests/test_tasks.py": "eval_classes",
    "tests/data_loading/test_folders.py": "data_index",
    "tests/data_loading/test_ram_cache.py": "ram_cache",
    "tests/training/test_checkpoint.py": "auto_resume",
    "tests/config/test_recipes.py": "config recipe",
    "tests/parallel/test_sharding.py": "shard grad_compression sync_bn sync_bn_group",
    "tests/parallel/test_environment.py": "world_size local_rank dist_on_itp dist_url",
    "tests/test_end_to_end.py": "output_dir log_dir nb_classes data_set",
    "tests/test_mains.py": "resume sha256 finetune eval model_key use_ema model_prefix dry_run "
    "compile cuda_graphs",
    "tests/test_engines.py": "device",  # cuda on a GPU
    "tests/test_datasets.py": "pin_mem eval_data_path dist_eval",
    "tests/weights/test_library.py": "pretrained",
    "tests/training/test_phases.py": "min_delta",
    "tests/training/test_probes.py": "probe_data probe_label_column",
    "tests/training/test_linear_probe.py": "linear_probe linear_probe_blr",
    "tests/training/test_precise_bn.py": "precise_bn",
    "tests/models/test_heads.py": "reset_head",
    "tests/config/test_parser.py": "crop_pct resplit",  # refused
}


def output_of(built: Built) -> list[torch.Tensor]:
    """Outputs of the network in training, one for each head."""
    images = torch.zeros(6, 3, *built.args.input_size)
    output = built.inner.train()(images)
    return list(output.values()) if isinstance(output, dict) else [output]


def mixing(built: Built) -> Any:
    """timm's `Mixup` of the run."""
    return built.loop.mixup.mixup


def frozen(built: Built) -> set[str]:
    """Names of the layers that are frozen in the first epoch."""
    if built.loop.freezer is not None:
        built.loop.freezer.begin_epoch(0)
    found = {id(parameter) for parameter in built.stepper.frozen}
    named = built.stepper.model.named_parameters()
    return {name.split(".")[-2] for name, parameter in named if id(parameter) in found}


def tracked(built: Built) -> dict:
    """What the tracker was given."""
    _, words, config = fakes.CALLS[0]
    return words | {"config": config}


def evaluations_of(built: Built) -> list[bool]:
    """True for each epoch with an evaluation."""
    return ["test_acc1" in line for line in (built.folder / "log.txt").read_text().splitlines()]


def min_scale(built: Built) -> float:
    return min(group["lr_scale"] for group in built.stepper.optimizer.param_groups)


ROWS = [
    (script, flag, *row)
    for script, own in {"pretrain": PRETRAIN, "finetune": FINETUNE}.items()
    for flag, row in (SHARED | own).items()
]


@pytest.mark.parametrize(
    ("script", "flag", "row"),
    [(script, flag, row) for script, flag, *row in ROWS],
    ids=[f"{script}-{flag}" for script, flag, *_ in ROWS],
)
def test_flag_acts(script, flag, row, baseline, tmp_path, monkeypatch):
    words, look, before, after, *base = row
    base = base[0] if base else ""
    base += " --reprob 0.25" * (script == "finetune" and flag in ("reprob", "remode", "recount"))
    seen = [look(baseline(script, base))]
    if flag == "blr":
        monkeypatch.setitem(BASE, script, BASE[script].replace("--lr 0.01 ", ""))
    seen.append(look(build(script, f"{base} {words}", tmp_path, monkeypatch)))
    assert seen == [before, after]


@pytest.mark.parametrize("script", MAINS)
def test_every_flag_has_a_row(script):
    flags = {action.dest for action in MAINS[script].get_args_parser()._actions} - {"help"}
    rows = {flag for name, flag, *_ in ROWS if name == script}
    elsewhere = set(" ".join(ELSEWHERE.values()).split())
    assert flags - rows - elsewhere == set()
    assert all((Path(__file__).parents[1] / path).exists() for path in ELSEWHERE)
