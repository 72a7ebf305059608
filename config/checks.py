# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checks of flags that contradict each other or do not fit the network.

python main_pretrain.py --data_set DIGITS --input_size 33
"""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from config import flags, tool_flags
from config.augmentation import augmentation_problems, ends_some, image_problems
from config.flags import as_typed
from config.linear_probe import linear_probe_problems
from config.phases import phase_problems
from config.schedules import schedule_problems
from config.sizes import size_problems, sizes_by_epoch
from config.tasks import task_problems
from config.tta import tta_problems, tta_size_problems
from errors import plural

CONFLICTS = (  # two flags that exclude each other, and the reason
    ("deterministic", "compile", "torch.compile chooses kernels by timing"),
    ("dry_run", "eval", "a dry run checks training"),
    ("val_split", "eval_data_path", "both give the evaluation data"),
    ("eval", "disable_eval", "there would be nothing to do"),
    ("head", "heads", "both say what the heads are"),
)
IN_TRAINING = (  # more of them, of which --eval does not use one
    ("cuda_graphs", "compile", "both capture the training step"),
    ("cuda_graphs", "sync_bn", "graphs cannot wait for other processes"),
    ("cuda_graphs", "grad_checkpointing", "graphs help small models, checkpointing large ones"),
    ("cuda_graphs", "freeze", "graphs keep BatchNorm in one mode"),
    ("update_freq", "effective_batch", "both set the gradient accumulation steps"),
    ("val_split", "disable_eval", "there would be no evaluation"),
    ("disable_eval", "model_ema_eval", "there would be no evaluation"),
    ("disable_eval", "metrics", "there would be no evaluation"),
    ("disable_eval", "best_metric", "there would be no evaluation"),
    ("disable_eval", "patience", "there would be no evaluation"),
    ("freeze_backbone", "precise_bn", "the BatchNorm of a frozen backbone keeps its statistics"),
    ("dry_run", "tracker", "a dry run logs nothing to it"),
    ("pretrained", "finetune", "both give the weights"),
    ("cuda_graphs", "heads", "graphs are for one output"),
    ("freeze_backbone", "grad_checkpointing", "a frozen backbone keeps nothing for backward"),
    ("freeze_backbone", "cuda_graphs", "graphs are for networks that train as a whole"),
    ("freeze_backbone", "sync_bn", "the BatchNorm of a frozen backbone uses what it has learned"),
)
_MIXING = "--mixup, --cutmix or --cutmix_minmax", lambda a: a.mixup or a.cutmix or a.cutmix_minmax
_BOTH = "--mixup with --cutmix", lambda args: args.mixup and (args.cutmix or args.cutmix_minmax)
_SAVES = (
    "--save_ckpt true with an output folder",
    lambda args: args.save_ckpt and args.output_dir != "",
)
_WEIGHTS = "--finetune or --resume", lambda args: args.resume or vars(args).get("finetune")
NEEDS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # flag: what it needs to act, and a test
    "linear_probe_blr": ("--linear_probe true", lambda args: args.linear_probe),
    "layer_decay_type": ("--layer_decay below 1", lambda args: args.layer_decay < 1),
    "mixup_mode": _MIXING,
    "mixup_prob": _MIXING,
    "mixup_off_epoch": _MIXING,
    "aug_off_epoch": ("--aa, --reprob or another that it ends", ends_some),
    "mixup_switch_prob": _BOTH,
    "color_jitter_prob": ("--color_jitter above 0", lambda args: args.color_jitter),
    "remode": ("--reprob above 0", lambda args: args.reprob > 0),
    "recount": ("--reprob above 0", lambda args: args.reprob > 0),
    "progressive_batch": ("--input_size with sizes by epoch", lambda args: args.input_sizes),
    "model_ema_decay": ("--model_ema true", lambda args: args.model_ema),
    "model_key": _WEIGHTS,
    "model_prefix": _WEIGHTS,
    "save_ckpt_every_steps": _SAVES,
    "save_ckpt_every_minutes": _SAVES,
    "async_save": _SAVES,
    "max_save_failures": _SAVES,
}
OFFICIAL_DEFAULTS = {"model_key": "model|module"}  # where ours are others
# Flags that do nothing with --eval; it takes them, since a run's flags may be used to evaluate it.
OF_TRAINING = """
epochs lr blr min_lr drop_path scale ratio hflip vflip rot90 decode sampling
num_samples aug_repeats label_fraction ram_cache
train_interpolation aa color_jitter color_jitter_prob pca_lighting grayscale_prob
gaussian_blur_prob reprob remode recount smoothing mixup cutmix cutmix_minmax
mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch aug_off_epoch class_weights warmup_epochs
warmup_steps start_epoch update_freq effective_batch progressive_batch sched sched_options opt
opt_eps opt_betas momentum weight_decay weight_decay_end no_weight_decay param_group freeze
clip_grad clip_mode pretrained freeze_backbone linear_probe linear_probe_blr reset_head
head_init_scale layer_decay
layer_decay_type eval_freq patience min_delta precise_bn
model_ema_decay model_ema_force_cpu model_ema_eval cuda_graphs grad_checkpointing on_spike
spike_factor snapshot_freq max_bad_steps log_dir print_freq profile tracker project tags report
progress auto_resume save_ckpt save_ckpt_freq save_ckpt_num save_ckpt_every_steps
save_ckpt_every_minutes max_minutes async_save max_save_failures shard grad_compression sync_bn
sync_bn_group
"""


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each combination of flags that cannot work."""
    values = vars(args)
    yield from linear_probe_problems(args)
    for one, other, reason in CONFLICTS + IN_TRAINING * (not values.get("eval")):
        if values.get(one) and values.get(other):
            both = f"--{one} {as_typed(values[one])} and --{other} {as_typed(values[other])}"
            yield f"{both} cannot be combined: {reason}; drop one"
    yield from _data_problems(args)
    if args.cuda_graphs and (args.update_freq or 1) > 1:
        yield f"--cuda_graphs does not work with --update_freq {args.update_freq}; drop one"
    if args.sync_bn_group and not args.sync_bn:
        yield "--sync_bn_group needs --sync_bn true; give both or neither"
    yield from size_problems(args)
    yield from (*_mean_problems(args), *_tracker_problems(args))
    yield from augmentation_problems(args)
    if args.start_epoch >= args.epochs:
        yield f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}; lower it"
    yield from schedule_problems(args)
    yield from task_problems(args)
    yield from _without_effect(args)
    if args.use_amp is not None and args.amp is not None and args.use_amp == (args.amp == "none"):
        yield f"--use_amp {as_typed(args.use_amp)} contradicts --amp {args.amp}; give only --amp"
    if args.resume and values.get("finetune") and not values["eval"]:
        yield "--resume and --finetune cannot be combined; drop one (--finetune= clears it)"
    if args.sha256 and bool(args.resume) == bool(values.get("finetune")):
        yield "--sha256 is for one file; give it with either --resume or --finetune"
    opt = args.opt.lower().removeprefix("lookahead_")
    if args.deterministic and opt.startswith(("bnb", "fused")):  # kernels of other packages
        yield f"--deterministic true is not possible with --opt {args.opt}; drop one"
    if args.snapshot_freq and args.on_spike != "rollback":
        yield f"--snapshot_freq {args.snapshot_freq} needs --on_spike rollback; add it or drop both"
    if 0 < args.spike_factor <= 1:
        yield f"--spike_factor {args.spike_factor:g}: expected 3 or more, or 0 for no spike check"
    if args.data_timeout and args.num_workers == 0:
        yield "--data_timeout needs --num_workers 1 or more, and it is 0; drop --data_timeout"
    if args.cuda_graphs and "adahessian" in args.opt.lower():
        yield f"--cuda_graphs true has no second derivatives for --opt {args.opt}; drop one"
    if not (args.resume or values.get("finetune") or _has_checkpoint(args.output_dir)):
        yield from shape_problems(args)  # otherwise once the flags of the checkpoint are known
    own = _pretrain_problems if flags.is_pretraining(values) else _finetune_problems
    yield from own(args)


def _pretrain_problems(args: argparse.Namespace) -> Iterator[str]:
    if args.crop_pct is not None:
        yield "--crop_pct is for evaluation, and pre-training has none; leave it out"
    for name in ("probe_data", "probe_images", "probe_label_column", "probes"):
        if name in args.typed and not args.probe_every:
            value = as_typed(vars(args)[name])
            yield f"--{name} {value} needs --probe_every above 0; add it, or drop --{name}"


def _data_problems(args: argparse.Namespace) -> Iterator[str]:
    values = vars(args)
    evaluates_elsewhere = values.get("eval") and args.eval_data_path
    if flags.needs_path(args.data_set) and not (args.data_path or evaluates_elsewhere):
        of = f"--data_set {args.data_set} needs --data_path" if args.data_set != "auto" else ""
        yield f"{of or '--data_path is missing'}; give the folder, table or archive of the data"
    for name in ("data_index", "ram_cache"):
        if values[name] and args.data_set not in flags.LISTED:
            yield f"--{name} is for image files, not for --data_set {args.data_set}; drop it"


def _without_effect(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of the command line that lacks another one to act.

    Files may have such flags, as the args.yaml of a run has all. For --eval see `OF_TRAINING`.
    """
    for name, (needed, acts) in NEEDS.items():
        if name in args.typed and not vars(args).get("eval") and not acts(args):
            value = getattr(args, name)
            if value not in (flags.default_of(name), OFFICIAL_DEFAULTS.get(name)):
                yield f"--{name} {as_typed(value)} needs {needed}; add it, or drop --{name}"


def idle_in_evaluation(args: argparse.Namespace) -> list[str]:
    """Return the flags of the command line that are for training alone, with --eval."""
    evaluates = vars(args).get("eval")
    return [name for name in OF_TRAINING.split() if evaluates and name in args.typed]


def _has_checkpoint(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(folder) and any(name.startswith("checkpoint-") for name in os.listdir(folder))
    return False


def _mean_problems(args: argparse.Namespace) -> Iterator[str]:
    if (args.mean is None) != (args.std is None):
        yield "--mean and --std belong together; give both or neither"
    elif args.mean is not None and args.imagenet_default_mean_and_std is False:
        yield "--mean and --imagenet_default_mean_and_std false contradict each other; drop one"


def _tracker_problems(args: argparse.Namespace) -> Iterator[str]:
    for name, default in (("project", flags.PROJECT), ("tags", None)):
        value = vars(args)[name]
        if value != default and not args.tracker:
            yield f"--{name} {as_typed(value)} needs --tracker; give both or neither"


def shape_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each size that does not fit the network."""
    stride = 8 * args.stem_stride
    for name, found in (("mean", args.mean), ("std", args.std)):
        if found is not None and len(found) not in (1, args.in_chans):
            got = f"--{name} {as_typed(found)} has {plural(len(found), 'value')}"
            yield f"{got}, expected one, or one for each of --in_chans {args.in_chans}"
    yield from _range_problems(vars(args).get("value_range"))
    yield from image_problems(args)
    if flags.is_pretraining(vars(args)):
        if flags.implied_patch(args.model, args.stem_stride):  # others: `models.check_images`
            yield from patch_problems(args, stride, f"8 * stem_stride = {stride}")
        return
    yield from tta_size_problems(args)
    if args.model.startswith("convnext") and min(smallest := sizes_by_epoch(args)[0]) < stride:
        got = as_typed(smallest)
        yield f"--input_size: got {got}, expected at least {stride}; or lower --stem_stride"


def _range_problems(found: Any) -> Iterator[str]:
    if found is not None and (len(found) != 2 or found[0] >= found[1]):
        got = f"--value_range {as_typed(found)}"
        yield f"{got}: expected the value that becomes 0, then a larger one that becomes 1"


def patch_problems(args: argparse.Namespace, stride: int, name: str) -> Iterator[str]:
    """Yield a message for each size that does not fit; stride, name: of the last feature map."""
    patch = args.patch_size or stride
    patch_name = f"--patch_size {patch}" if args.patch_size else name
    sizes = [*sizes_by_epoch(args).values()]
    sides = dict.fromkeys(side for size in sizes for side in size)
    for flag, value, step, unit in (
        ("patch_size", patch, stride, name),
        *(("input_size", side, patch, patch_name) for side in sides),
    ):
        if value % step:
            low = value // step * step
            near = f"{low} or {low + step}" if low else step
            yield f"--{flag} {value} is not a multiple of {unit}; try {near}"
    for size in sizes:
        yield from _mask_problems(args, patch, size)


def _mask_problems(args: argparse.Namespace, patch: int, size: tuple[int, int]) -> Iterator[str]:
    """Yield a message if images of a size have too few patches."""
    patches = math.prod(side // patch for side in size)
    kept = math.floor(patches * (1 - args.mask_ratio) + 1e-6)
    if patches == 1:
        got = f"--input_size {as_typed(size)} is a single patch of --patch_size {patch}"
        fix = "or lower --patch_size (a multiple of 8 * --stem_stride)"
        fix = fix if args.patch_size else "or lower --stem_stride"
        yield f"{got}; raise --input_size to {2 * patch} or more, {fix}"
    elif not 1 <= kept < patches:
        got = f"--mask_ratio {args.mask_ratio} keeps {kept} of {patches} patches"
        got += f" at --input_size {as_typed(size)}" * (size != tuple(args.input_size))
        yield f"{got}, expected 1 to {patches - 1}; {'raise' if kept else 'lower'} --mask_ratio"


def _finetune_problems(args: argparse.Namespace) -> Iterator[str]:
    minmax = args.cutmix_minmax
    if args.resplit:
        yield "--resplit true is not supported: there are no augmentation splits; leave it out"
    if minmax is not None and (len(minmax) != 2 or minmax[0] > minmax[1]):
        yield f"--cutmix_minmax: got {as_typed(minmax)}, expected two numbers, the smaller first"
    mixing = (args.mixup > 0 or args.cutmix > 0 or minmax is not None) and not args.eval
    if mixing and args.batch_size % 2:
        yield f"--batch_size {args.batch_size}: --mixup and --cutmix need pairs; make it even"
    for name in ("model_ema_eval", "model_ema_force_cpu"):
        if getattr(args, name) and not (args.model_ema or args.eval):
            yield f"--{name} true needs --model_ema true; give both or neither"
    if args.eval_data_path and (
        args.data_set in flags.HAVE_EVAL_DATA or flags.downloads(args.data_set)
    ):
        got = f"--eval_data_path: --data_set {args.data_set} has its own evaluation data"
        yield f"{got}; drop one of the two"
    if args.val_split and args.data_set in flags.HAVE_EVAL_DATA and args.data_set != "IMNET":
        yield f"--val_split: --data_set {args.data_set} has its own evaluation data; drop it"
    if args.use_ema and not (args.finetune or args.resume or args.eval):
        yield "--use_ema true needs a checkpoint; give --finetune, --resume or --eval true"
    if re.fullmatch(r"\s*[\w.:]+(\(.*\))?\s*@.*", args.head or ""):
        fix = f'give --heads "main={args.head.strip()}"'
        yield f"--head {args.head}: a head on a block is for --heads; {fix}"
    yield from _two_names(args)
    yield from (*phase_problems(args), *tta_problems(args))
    yield from _backbone_problems(args)
    if args.reset_head and not (args.finetune or args.pretrained or args.resume):
        yield "--reset_head true needs weights to start from; give --finetune, or drop it"
    if args.eval and not (args.resume or args.finetune or args.output_dir):
        yield "--eval true needs weights to evaluate; give --resume CHECKPOINT"


def _backbone_problems(args: argparse.Namespace) -> Iterator[str]:
    if args.pretrained and not flags.library_of(args.model):
        got = f"--pretrained true: --model {args.model} is not of timm or torchvision"
        yield f"{got}; give its weights by --finetune, such as timm:convnextv2_tiny.fcmae"
    if args.pretrained and args.resume and not args.eval:
        yield "--pretrained and --resume cannot be combined: both give the weights; drop one"
    if args.freeze_backbone and args.layer_decay < 1:
        got = f"--layer_decay {args.layer_decay:g}"
        yield f"{got} and --freeze_backbone true: the head is the only layer that trains; drop one"
    if args.freeze_backbone and args.drop_path:
        got = f"--drop_path {args.drop_path:g}"
        yield f"{got} and --freeze_backbone true: a frozen backbone drops nothing; drop one"


def _two_names(args: argparse.Namespace) -> Iterator[str]:
    if args.use_ema and args.model_key != flags.MODEL_KEY:
        yield f"--use_ema true and --model_key {args.model_key} both name the weights; drop one"


def other_network_problems(args: argparse.Namespace, model: str) -> Iterator[str]:
    """Yield a message for each flag of export.py that is for a ConvNeXt alone."""
    if args.to not in tool_flags.FOR_ANY_NETWORK:
        targets = ", ".join(tool_flags.FOR_ANY_NETWORK)
        yield f"--model {model}: --to {args.to} is for ConvNeXt; use one of {targets}"
    if args.half:
        other = " or --model" * bool(args.model)
        yield f"--half true is tested with ConvNeXt only, not with {model}; drop --half{other}"


def export_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of export.py that the format cannot use."""
    if args.to is None:
        return (yield f"--to is missing; give one of {', '.join(tool_flags.TARGETS)}")
    if (args.model or "").removeprefix("fcmae_").startswith("convnext"):
        yield f"--model {args.model}: the size of a ConvNeXt is found in its weights; drop it"
    elif args.model:
        yield from other_network_problems(args, args.model)
    if args.half and args.to not in tool_flags.GRAPHS:
        yield f"--half true: weights for {args.to} keep their precision; drop it"
    if args.opset and args.to != "onnx":
        yield f"--opset {args.opset} is for --to onnx only; drop it"
    stored = ("labels", "crop_pct", "imagenet_default_mean_and_std", "mean", "std", "value_range")
    for name in stored:
        if getattr(args, name) is not None and args.to in tool_flags.GRAPHS:
            yield f"--{name}: --to {args.to} cannot store it, as files of weights can; drop it"
    suffix = tool_flags.TARGETS[args.to]
    if args.output and not args.output.endswith(suffix):
        yield f"--output {args.output}: expected a name that ends in {suffix}"
    if len(args.input_size or ()) > 2:
        yield f"--input_size: got {as_typed(args.input_size)}, expected one or two numbers"
    yield from (*_mean_problems(args), *_range_problems(args.value_range))
    yield from _two_names(args)
