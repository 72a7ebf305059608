# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The command line of each script: parsers, cross-checks, frozen arguments.

python -c "from config import parser; parser.parse(parser.pretrain_parser(), ['--help'])"
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from config import recipes
from config.flags import (
    EXPORT_HELP,
    FLAGS,
    FOLDERS,
    GRAPHS,
    HELP,
    MODEL_KEY,
    NEED_PATH,
    SOURCES,
    TARGETS,
    number,
    str2bool,
)

OTHER_SCRIPTS = ("submitit", "pictures", "export")  # groups of FLAGS that no main has


class FrozenNamespace(argparse.Namespace):
    """Parsed flags; a changed copy is `FrozenNamespace(**{**vars(args), "name": value})`."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any = None) -> NoReturn:
        raise AttributeError(f"args are frozen, {name!r} cannot change: use a local or TrainState")

    __delattr__ = __setattr__


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    script = ""  # the main whose flags these are
    source = ""  # names the file of flags while its values are parsed

    def error(self, message: str) -> NoReturn:  # the usage, ninety flags, would hide the message
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n(see {self.prog} --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0])
            hint = recipes.closest(word.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized argument {word!r}; {hint}")
        return parsed


def add_args(parser: argparse.ArgumentParser, *groups: str, only: Sequence[str] = ()) -> None:
    """Declare these groups of FLAGS, or of their flags only some."""
    for title in groups:
        group = parser.add_argument_group(title)
        rows = [row for row in FLAGS[title] if not only or row[0] in only]
        for flags, kind, default, text, *nargs in rows:
            more: dict[str, Any] = {"nargs": nargs[0]} if nargs else {}
            if isinstance(kind, tuple):
                more |= {"type": type(kind[0]), "choices": kind}
            elif kind is str2bool:
                more |= {"type": kind, "metavar": "BOOL", "nargs": "?", "const": True}
            else:
                more |= {"type": number(kind), "metavar": "N"} if kind is not str else {}
            group.add_argument(*flags.split(), default=default, help=text, **more)


def add_submitit_args(parser: argparse.ArgumentParser) -> None:
    """What `submitit_*.py` asks of the cluster, on top of a main's flags."""
    add_args(parser, "submitit")


def _make_parser(script: str, aim: str, *left_out: str) -> argparse.ArgumentParser:
    parser = _Parser(usage="%(prog)s [FLAGS]", allow_abbrev=False)
    parser.description = HELP % (aim, script, script)
    parser.formatter_class = partial(_Help, max_help_position=32)
    parser.script = script.removesuffix(".py")
    add_args(parser, *(title for title in FLAGS if title not in (*left_out, *OTHER_SCRIPTS)))
    return parser


def pretrain_parser() -> argparse.ArgumentParser:
    """The flags of main_pretrain.py."""
    aim = "Pre-train ConvNeXt V2 as a masked autoencoder (FCMAE)."
    left_out = ("augmentation", "starting weights and head", "evaluation and moving average")
    parser = _make_parser("main_pretrain.py", aim, *left_out)
    parser.set_defaults(epochs=800, blr=1.5e-4, min_lr=0.0, scale=(0.2, 1.0), spike_factor=5.0)
    return parser


def visualize_parser() -> argparse.ArgumentParser:
    """The flags of visualize.py; data that is not given is that of the run that is looked at."""
    parser = _Parser(usage="%(prog)s [FLAGS]", allow_abbrev=False, formatter_class=_Help)
    parser.description = "Draw the reconstructions of a pre-trained model."
    add_args(parser, "pictures")
    add_args(parser, "model", only=("--model",))
    add_args(parser, "data", only=("--data_set", "--data_path", "--data_index"))
    add_args(parser, "evaluation and moving average", only=("--eval_data_path",))
    add_args(parser, "run", only=("--device", "--seed"))
    parser.set_defaults(model=None, data_set=None, data_path=None)
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The flags of export.py; what is not given is as in the run that is exported."""
    usage = "%(prog)s CHECKPOINT --to TARGET [FLAGS]"
    parser = _Parser(usage=usage, allow_abbrev=False, description=EXPORT_HELP % SOURCES)
    parser.formatter_class = partial(_Help, max_help_position=32)
    add_args(parser, "export")
    add_args(parser, "model", only=("--input_size",))
    add_args(parser, "data", only=("--crop_pct", "--imagenet_default_mean_and_std"))
    which = ("--model_key", "--use_ema", "--model_prefix")
    add_args(parser, "starting weights and head", only=which)
    add_args(parser, "checkpoints and logs", only=("--sha256",))
    parser.set_defaults(input_size=None, imagenet_default_mean_and_std=None)
    return parser


def export_problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with flags of export.py: each acts on a target or is refused."""
    if args.to is None:
        return (yield f"--to: expected one of {', '.join(TARGETS)}")
    if args.half and args.to not in GRAPHS:
        yield f"--half true: weights for {args.to} keep their precision; who loads them can cast"
    if args.opset and args.to != "onnx":
        yield f"--opset {args.opset} is a matter of --to onnx; drop it"
    for name in ("labels", "crop_pct", "imagenet_default_mean_and_std"):
        if getattr(args, name) is not None and args.to != "hf":
            yield f"--{name}: of all targets only hf has a place for it; drop it"
    suffix = TARGETS[args.to]
    if args.output and not args.output.endswith(suffix):
        yield f"--output {args.output}: expected a name that ends in {suffix}"
    if len(args.input_size or ()) > 2:
        yield f"--input_size: got {args.input_size}, expected a side, or height and width"
    if args.use_ema and args.model_key != MODEL_KEY:
        yield f"--use_ema true and --model_key {args.model_key} both name the weights; drop one"


def finetune_parser() -> argparse.ArgumentParser:
    """The flags of main_finetune.py."""
    aim = "Fine-tune ConvNeXt V2 (--finetune CKPT), train from scratch, or evaluate (--eval true)."
    return _make_parser("main_finetune.py", aim, "masked autoencoder")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> FrozenNamespace:
    """Read the command line, over `--config` and `--recipe` if given, resolve, check and freeze."""
    args = finalize(argparse.Namespace(**recipes.read_flags(parser, argv)))
    for problem in _problems(args):
        parser.error(problem)
    return args


def finalize(args: argparse.Namespace) -> FrozenNamespace:
    """Resolve unset flags that follow from others, lists to tuples, `input_size` to (H, W).

    `--use_amp false` becomes `amp="none"`; with `amp=None` the main decides by the device:
    bf16 on CUDA only, or half precision on any device when `use_amp` is True.
    """
    new = {key: tuple(x) if isinstance(x, list) else x for key, x in vars(args).items()}
    size = new["input_size"] if isinstance(new["input_size"], tuple) else (new["input_size"],)
    new["input_size"] = size * 2 if len(size) == 1 else size
    if new["warmup_epochs"] is None:
        new["warmup_epochs"] = min(40.0 if "mask_ratio" in new else 20.0, new["epochs"] / 5)
    if new.get("job_dir") == "":
        new["job_dir"] = "./runs/%j"
    if "mask_ratio" in new and new["opt_betas"] is None and new["opt"].lower() == "adamw":
        new["opt_betas"] = (0.9, 0.95)
    if new["use_amp"] is False and new["amp"] is None:
        new["amp"] = "none"
    if new["deterministic"] and new["kernels"] == "auto":
        new["kernels"] = "torch"  # which of them is the fastest may differ between two runs
    if "mask_ratio" in new and new["patch_size"] is None:
        new["patch_size"] = 8 * new["stem_stride"]
    if "finetune" in new:
        new["aa"] = None if new["aa"] in ("", "none", "None") else new["aa"]
        if new["head_init_scale"] is None:
            new["head_init_scale"] = 0.001 if new["finetune"] else 1.0
    return FrozenNamespace(**new)


def dump_args(args: argparse.Namespace) -> str:
    """YAML that `--config` reads back to the same args."""
    import yaml

    values = {key: list(x) if isinstance(x, tuple) else x for key, x in vars(args).items()}
    values.pop("config", None)
    recipe = values.pop("recipe", None)  # every flag of it is in the values, changed or not
    return f"# recipe {recipe}\n" * bool(recipe) + yaml.safe_dump(values, sort_keys=False)


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.data_set in NEED_PATH and not (
        args.data_path or (vars(args).get("eval") and args.eval_data_path)
    ):
        yield f"--data_path is missing, --data_set {args.data_set} needs it; give the folder"
    if args.data_index and args.data_set not in FOLDERS:
        yield f"--data_index lists images in folders, --data_set {args.data_set} has none; drop it"
    if len(args.input_size) != 2:
        yield f"--input_size: got {args.input_size}, expected one or two numbers (height, width)"
    if args.scale[0] > args.scale[1]:
        yield f"--scale: got {args.scale}, expected least and most; swap them"
    if args.start_epoch >= args.epochs:
        yield f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}; lower it"
    if args.warmup_epochs > args.epochs:
        yield f"--warmup_epochs {args.warmup_epochs:g} > --epochs {args.epochs}; lower the first"
    if args.lr is not None and args.min_lr > args.lr:
        yield f"--min_lr {args.min_lr} > --lr {args.lr}; lower --min_lr"
    if args.use_amp is not None and args.amp is not None and args.use_amp == (args.amp == "none"):
        yield f"--use_amp {args.use_amp} contradicts --amp {args.amp}; give only --amp"
    if args.sha256 and bool(args.resume) == bool(vars(args).get("finetune")):
        yield "--sha256 belongs to one file; give either --resume or --finetune with it"
    if args.deterministic and args.compile:
        yield "--deterministic true: what --compile true makes is chosen by measuring; drop one"
    within = args.opt.lower().removeprefix("lookahead_")
    if args.deterministic and within.startswith(("bnb", "fused")):  # timm's, of others
        yield f"--deterministic true: torch does not know how --opt {args.opt} adds; drop one"
    if args.dry_run and vars(args).get("eval"):
        yield "--dry_run true tries a training run; --eval true writes nothing: drop one"
    if args.snapshot_freq and args.on_spike != "rollback":
        yield f"--snapshot_freq {args.snapshot_freq}: --on_spike skip takes none; drop one"
    if 0 < args.spike_factor <= 1:
        yield f"--spike_factor {args.spike_factor:g}: the usual is no spike; give 3 or more, or 0"
    if args.data_timeout and not args.num_workers:
        got = f"--data_timeout {args.data_timeout:g}"
        yield f"{got} watches loader processes, --num_workers 0 has none; give some, or drop it"
    if args.cuda_graphs and args.compile:
        yield "--cuda_graphs true and --compile true exclude each other; drop one"
    if args.cuda_graphs and args.grad_checkpointing:
        got = "--cuda_graphs true is for small models, --grad_checkpointing true for big ones"
        yield f"{got}; drop one"
    if args.update_freq is not None and args.effective_batch is not None:
        got = f"--update_freq {args.update_freq} and --effective_batch {args.effective_batch}"
        yield f"{got} both say how much an update accumulates; drop one"
    if args.cuda_graphs and (args.update_freq or 1) > 1:
        yield f"--cuda_graphs true cannot accumulate: --update_freq {args.update_freq}; drop one"
    if args.cuda_graphs and "adahessian" in args.opt.lower():
        yield f"--cuda_graphs true has no second derivatives for --opt {args.opt}; drop one"
    yield from _pretrain_problems(args) if "mask_ratio" in args else _finetune_problems(args)


def _pretrain_problems(args: argparse.Namespace) -> Iterator[str]:
    patch, stride = args.patch_size, 8 * args.stem_stride
    if patch % stride:
        yield f"--patch_size {patch}: not a multiple of 8 * stem_stride; try {_near(patch, stride)}"
    for side in args.input_size:
        if side % patch:
            yield f"--input_size {side}: not a multiple of --patch_size; try {_near(side, patch)}"
    patches = math.prod(side // patch for side in args.input_size)
    kept = math.floor(patches * (1 - args.mask_ratio) + 1e-6)
    if not 1 <= kept < patches:
        got = f"--mask_ratio {args.mask_ratio} keeps {kept} of {patches} patches"
        yield f"{got}, expected 1 to {patches - 1}; raise --input_size or change --mask_ratio"
    if args.crop_pct is not None:
        yield "--crop_pct: pre-training has no evaluation to crop for; leave it out"


def _near(value: int, step: int) -> str:
    low = value // step * step
    return f"{low} or {low + step}" if low else str(step)


def _finetune_problems(args: argparse.Namespace) -> Iterator[str]:
    span, stride = args.cutmix_minmax, 8 * args.stem_stride
    if args.model.startswith("convnextv2") and min(args.input_size) < stride:
        yield f"--input_size {args.input_size}: expected at least {stride}; lower --stem_stride"
    if args.resplit:
        yield "--resplit true: there are no augmentation splits here; leave it out"
    if span is not None and (len(span) != 2 or span[0] > span[1]):
        yield f"--cutmix_minmax: got {span}, expected two numbers, least and most"
    mixing = (args.mixup > 0 or args.cutmix > 0 or span is not None) and not args.eval
    if mixing and args.batch_size % 2:
        yield f"--batch_size {args.batch_size}: --mixup and --cutmix mix pairs; make it even"
    for name in ("model_ema_eval", "model_ema_force_cpu"):
        if getattr(args, name) and not args.model_ema:
            yield f"--{name} true needs --model_ema true; give both or neither"
    if args.disable_eval and args.model_ema_eval:
        yield "--disable_eval true leaves --model_ema_eval nothing to do; drop one"
    if args.eval_data_path and args.data_set in (
        "IMNET",
        "CIFAR10",
        "CIFAR",
        "DIGITS",
        "SYNTHETIC",
    ):
        yield f"--eval_data_path: --data_set {args.data_set} has its own; use image_folder"
    if args.use_ema and not (args.finetune or args.resume or args.eval):
        yield "--use_ema true: no weights to choose among; give --finetune, --resume or --eval"
    if args.use_ema and args.model_key != MODEL_KEY:
        yield f"--use_ema true and --model_key {args.model_key} both name the weights; drop one"
    if args.eval and args.cuda_graphs:
        yield "--cuda_graphs true serves training; drop it with --eval true"
    if args.eval and args.disable_eval:
        yield "--eval true and --disable_eval true leave nothing to do; --disable_eval false"
    source = args.resume or args.finetune or (args.auto_resume and args.output_dir)
    if args.eval and not source:
        yield "--eval true: no weights to evaluate; give --resume CHECKPOINT"
