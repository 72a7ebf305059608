# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Command-line parsers of all scripts, checks across flags, and frozen arguments.

python -c "from config import parser; parser.parse(parser.pretrain_parser(), ['--help'])"
"""

import argparse
import contextlib
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from config import flags, recipes
from config.flags import as_typed
from errors import did_you_mean, pipe_may_close, plural, resolve

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnextv2-toolkit"  # name of the distribution
LIBRARIES = ("torch", "torchvision", "timm", "numpy")
OTHER_SCRIPTS = (flags.JOB, "drawing", "export")  # groups of FLAGS
FINETUNE_ONLY = ("augmentation", "pretrained weights and head", "evaluation and EMA")
WRITTEN = ("output_dir", "log_dir", "data_index")  # flags with the path of a folder to write
READ = ("data_path", "eval_data_path", "finetune", "resume")  # a path, or another source
CONFLICTS = (  # two flags that exclude each other, and the reason
    ("deterministic", "compile", "torch.compile chooses kernels by timing"),
    ("dry_run", "eval", "a dry run checks training"),
    ("cuda_graphs", "compile", "both capture the training step"),
    ("cuda_graphs", "sync_bn", "graphs cannot wait for other processes"),
    ("cuda_graphs", "grad_checkpointing", "graphs help small models, checkpointing large ones"),
    ("update_freq", "effective_batch", "both set the gradient accumulation steps"),
    ("val_split", "eval_data_path", "both give the evaluation data"),
    ("val_split", "disable_eval", "there would be no evaluation"),
    ("disable_eval", "model_ema_eval", "there would be no evaluation"),
    ("eval", "cuda_graphs", "graphs are for training"),
    ("eval", "disable_eval", "there would be nothing to do"),
    ("pretrained", "finetune", "both give the weights"),
    ("freeze_backbone", "grad_checkpointing", "a frozen backbone keeps nothing for backward"),
    ("freeze_backbone", "cuda_graphs", "graphs are for networks that train as a whole"),
    ("freeze_backbone", "sync_bn", "the BatchNorm of a frozen backbone uses what it has learned"),
)


class FrozenNamespace(argparse.Namespace):
    """Parsed flags.

    given: names of those that the command line, --config or --recipe set; others have their default
        or are taken from a checkpoint. It is no flag, so `vars(args)` does not hold it.
    """

    __slots__ = ("given",)

    def __init__(self, given: Iterable[str] = (), /, **values: Any) -> None:
        object.__setattr__(self, "given", frozenset(given))
        self.__dict__.update(values)

    def __reduce__(self) -> tuple:  # submitit pickles the flags of a job
        return partial(FrozenNamespace, self.given, **vars(self)), ()

    def replace(self, **changes: Any) -> "FrozenNamespace":
        """Return a changed copy."""
        return FrozenNamespace(self.given, **{**vars(self), **changes})

    def __setattr__(self, name: str, value: Any = None) -> NoReturn:
        raise AttributeError(f"args are frozen, {name!r} cannot change: use a local or TrainState")

    __delattr__ = __setattr__


class _Help(argparse.RawDescriptionHelpFormatter):
    """Append the range and the default to each flag's help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, _, default = (action.help or "").partition("; default: ")
        if not default and action.default not in (None, "", argparse.SUPPRESS):
            default = as_typed(action.default).replace("%", "%%")
        notes = [getattr(action.type, "range", ""), f"default: {default}" if default else ""]
        return f"{text} ({'; '.join(filter(None, notes))})" if any(notes) else text


class _Answer(argparse.Action):
    """A flag that prints a text and ends the script; it sets nothing."""

    def __init__(self, option_strings: Sequence[str], dest: str, answer: Any, **options: Any):
        super().__init__(option_strings, "help", default=argparse.SUPPRESS, **options)
        self.answer = answer  # (parser, value) -> text

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        with pipe_may_close():
            print(self.answer(parser, values).rstrip())
        parser.exit()


class _Parser(argparse.ArgumentParser):
    source = ""  # names the config file while its values are parsed

    def __init__(self, usage: str, description: str, script: str = "") -> None:
        """script: the main script that these flags are for; '' for others, which have few."""
        super().__init__(usage=usage, description=description, allow_abbrev=False, add_help=False)
        self.script = script
        self.formatter_class = partial(_Help, max_help_position=30)
        options = {"nargs": 0, "help": "show all flags"}
        if script:
            options = {"nargs": "?", "choices": ("all",), "metavar": "all"}
            options["help"] = "show everyday flags, or all of them"
        self.add_argument(
            *("-h", "--help"),
            action=_Answer,
            answer=lambda parser, value: parser.format_help() if value else parser.short_help(),
            **options,
        )
        self.add_argument(
            "--version",
            action=_Answer,
            answer=lambda *_: describe_versions(),
            nargs=0,
            help="show versions of the toolkit and its libraries",
        )

    def short_help(self) -> str:
        """Return the help of everyday flags; of all where there are few."""
        if not self.script:
            return self.format_help()
        formatter, hidden = self._get_formatter(), 0
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = group._group_actions
            shown = [
                action for action in actions if action.dest in ("help", *flags.EVERYDAY.split())
            ]
            hidden += len(actions) - len(shown)
            formatter.start_section(group.title)
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(f"--help all shows {hidden} more flags.")
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:  # argparse's usage would hide the message
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n(see {self.prog} --help)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0])
            hint = did_you_mean(word.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized argument {word!r}. {hint}")
        return parsed


def describe_versions() -> str:
    """Return the versions of the toolkit, Python and the main libraries, without loading them."""
    own = ROOT / "pyproject.toml"
    text = own.read_text(encoding="utf-8") if own.exists() else ""
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    versions = {PACKAGE: found[1] if found else "unreleased", "Python": platform.python_version()}
    for name in (PACKAGE,) * (found is None) + LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _list_models(parser: Any, value: Any) -> str:
    package = __name__.removesuffix("config.parser")  # where pip has installed the toolkit
    names = resolve(f"{package}models:list_models", {}, "function")()  # imports torch
    pretrained = parser.script == "main_pretrain"
    shown = [name for name in names if name.startswith("fcmae_") is pretrained]
    return "\n".join(name.removeprefix("fcmae_") for name in shown)


def add_flags(
    parser: argparse.ArgumentParser, title: str, only: str = "", left_out: Sequence[str] = ()
) -> None:
    """Add a group of FLAGS, or under a new title only the flags named in `only`."""
    group = parser.add_argument_group(title)
    rows = [row for rows in flags.FLAGS.values() for row in rows if row[0] in only.split()]
    rows = [row for row in rows or flags.FLAGS[title] if row[0] not in left_out]
    for names, kind, default, text, *nargs in rows:
        choices = isinstance(kind, tuple)
        options = {"choices": kind, "type": type(kind[0])} if choices else dict(kind)
        if nargs:
            options["nargs"] = nargs[0]
        group.add_argument(*names.split(), default=default, help=text, **options)


def add_submitit_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `submitit_*.py` that describe the job to those of a main script."""
    add_flags(parser, flags.JOB)
    if isinstance(parser, _Parser):
        parser.description = flags.SUBMITIT_HELP % {"kind": parser.script.removeprefix("main_")}


def _main_parser(kind: str, aim: str, *left_out: str) -> _Parser:
    """Return the parser of main_KIND.py without some groups or flags."""
    text = flags.HELP % {"aim": aim, "kind": kind}
    parser = _Parser("%(prog)s [FLAGS]", text, f"main_{kind}")
    parser.add_argument(
        "--list_models", action=_Answer, answer=_list_models, nargs=0, help="show names for --model"
    )
    for title in flags.FLAGS:
        if title not in (*left_out, *OTHER_SCRIPTS):
            add_flags(parser, title, left_out=left_out)
    return parser


def pretrain_parser() -> argparse.ArgumentParser:
    """Return the parser of main_pretrain.py."""
    aim = "Pre-train ConvNeXt V2 as a fully convolutional masked autoencoder (FCMAE)."
    parser = _main_parser("pretrain", aim, "--finetune", *FINETUNE_ONLY)
    add_flags(parser, "choice of weights", "--model_key --model_prefix")
    parser.set_defaults(epochs=800, blr=1.5e-4, min_lr=0.0, scale=(0.2, 1.0), spike_factor=5.0)
    return parser


def finetune_parser() -> argparse.ArgumentParser:
    """Return the parser of main_finetune.py."""
    aim = "Fine-tune a classifier, train it from scratch, or evaluate it (--eval)."
    parser = _main_parser("finetune", aim, "masked autoencoder")
    data_set = next(action for action in parser._actions if action.dest == "data_set")
    data_set.help = data_set.help.replace(" folder,", "")  # it has no labels
    resume = next(action for action in parser._actions if action.dest == "resume")
    resume.help += ", but not with --eval"
    return parser


def visualize_parser() -> argparse.ArgumentParser:
    """Return the parser of visualize.py; unset flags are those of the pre-training run."""
    aim = "Draw images, their masks and their reconstructions by a pre-trained model."
    parser = _Parser("%(prog)s --checkpoint PATH [FLAGS]", aim)
    add_flags(parser, "drawing")
    names = "--model --data_set --data_path --eval_data_path --data_index --device --seed "
    names += "--input_size --mask_ratio --imagenet_default_mean_and_std"
    add_flags(parser, "overrides of the run's flags", names)
    unset = [word.removeprefix("--") for word in names.split() if word != "--device"]
    parser.set_defaults(**dict.fromkeys(unset))
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of export.py; unset flags are those of the exported run."""
    parser = _Parser("%(prog)s CHECKPOINT --to FORMAT [FLAGS]", flags.EXPORT_HELP)
    add_flags(parser, "export")
    add_flags(parser, "choice of weights", "--model_key --use_ema --model_prefix --sha256")
    names = "--model --input_size --crop_pct --imagenet_default_mean_and_std --mean --std"
    add_flags(parser, "overrides of the run's flags", names)
    parser.set_defaults(model=None, input_size=None, imagenet_default_mean_and_std=None)
    action = next(action for action in parser._actions if action.dest == "model")
    text = "timm:NAME, torchvision:NAME or package.module:function of another network"
    action.help = f"{text}; default: the checkpoint's"
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> FrozenNamespace:
    """Read the command line over `--config` over `--recipe`; finalize, check and freeze it."""
    flags, given = recipes.read_flags(parser, argv)
    args = finalize(argparse.Namespace(**flags), given)
    for problem in _problems(args):
        parser.error(problem)
    return args


def finalize(args: argparse.Namespace, given: Iterable[str] | None = None) -> FrozenNamespace:
    """Resolve unset flags that follow from others, lists to tuples, `input_size` to (H, W).

    given: as in `FrozenNamespace`; None for all flags.
    `--use_amp false` becomes `amp="none"`. With `amp=None` the main script decides by the device:
    bf16 on CUDA only, or half precision on any device when `use_amp` is True.
    """
    new = {key: tuple(x) if isinstance(x, list) else x for key, x in vars(args).items()}
    pretrain = flags.is_pretraining(new)
    size = new["input_size"] if isinstance(new["input_size"], tuple) else (new["input_size"],)
    new["input_size"] = size * 2 if len(size) == 1 else size
    if new["warmup_epochs"] is None:
        new["warmup_epochs"] = min(40.0 if pretrain else 20.0, new["epochs"] / 5)
    if new["output_dir"] == "none":
        new["output_dir"] = ""
    if new.get("job_dir") == "":
        new["job_dir"] = "./runs/%j"
    if new["use_amp"] is False and new["amp"] is None:
        new["amp"] = "none"
    if new["deterministic"] and new["kernels"] == "auto":
        new["kernels"] = "torch"  # two runs may measure different kernels as the fastest
    if pretrain:
        if new["opt_betas"] is None and new["opt"].lower() == "adamw":
            new["opt_betas"] = (0.9, 0.95)
        new["patch_size"] = new["patch_size"] or 8 * new["stem_stride"]
    else:
        new["aa"] = None if new["aa"] in ("", "none", "None") else new["aa"]
        if new["head_init_scale"] is None:
            new["head_init_scale"] = 0.001 if new["finetune"] or new["pretrained"] else 1.0
    return FrozenNamespace(new if given is None else given, **new)


def dump_args(args: argparse.Namespace) -> str:
    """Write args as YAML that `--config` reads back to the same args."""
    import yaml

    values = absolute_paths(vars(args))
    values = {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}
    values.pop("config", None)
    recipe = values.pop("recipe", None)  # its flags are among the values
    return f"# recipe {recipe}\n" * bool(recipe) + yaml.safe_dump(values, sort_keys=False)


def absolute_paths(args: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths absolute, as a run stores them, so that it can be used from any folder.

    A source such as `timm:NAME`, or a --data_path that is no path for a user's own data set, stays
    as it is, since there is no such file.
    """
    new = dict(args)
    for name in (*WRITTEN, *READ):
        text = args.get(name) or ""
        path = os.path.abspath(os.path.expanduser(text))
        if text not in ("", "none") and (name in WRITTEN or os.path.exists(path)):
            new[name] = path
    return new


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each combination of flags that cannot work."""
    values = vars(args)
    for one, other, reason in CONFLICTS:
        if values.get(one) and values.get(other):
            both = f"--{one} {as_typed(values[one])} and --{other} {as_typed(values[other])}"
            yield f"{both} cannot be combined: {reason}; drop one"
    evaluates_elsewhere = values.get("eval") and args.eval_data_path
    if args.data_set in flags.NEED_PATH and not (args.data_path or evaluates_elsewhere):
        yield f"--data_set {args.data_set} needs --data_path; give the folder of the data"
    if args.data_index and args.data_set not in flags.FOLDERS:
        yield f"--data_index is for folders of images, not for --data_set {args.data_set}; drop it"
    if args.cuda_graphs and (args.update_freq or 1) > 1:
        yield f"--cuda_graphs does not work with --update_freq {args.update_freq}; drop one"
    if args.sync_bn_group and not args.sync_bn:
        yield "--sync_bn_group needs --sync_bn true; give both or neither"
    if len(args.input_size) != 2:
        yield f"--input_size: got {as_typed(args.input_size)}, expected one or two numbers"
    yield from _mean_problems(args)
    if args.scale[0] > args.scale[1]:
        yield f"--scale: got {as_typed(args.scale)}, expected the smaller number first; swap them"
    if args.start_epoch >= args.epochs:
        yield f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}; lower it"
    if args.warmup_epochs > args.epochs:
        yield f"--warmup_epochs {args.warmup_epochs:g} is above --epochs {args.epochs}; lower it"
    if args.lr is not None and args.min_lr > args.lr:
        yield f"--min_lr {args.min_lr} is above --lr {args.lr}; lower --min_lr"
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
    if args.data_timeout and not args.num_workers:
        yield "--data_timeout needs --num_workers 1 or more, and it is 0; drop --data_timeout"
    if args.cuda_graphs and "adahessian" in args.opt.lower():
        yield f"--cuda_graphs true has no second derivatives for --opt {args.opt}; drop one"
    if not (args.resume or values.get("finetune") or _has_checkpoint(args.output_dir)):
        yield from shape_problems(args)  # otherwise once the flags of the checkpoint are known
    if not flags.is_pretraining(values):
        yield from _finetune_problems(args)
    elif args.crop_pct is not None:
        yield "--crop_pct is for evaluation, and pre-training has none; leave it out"


def _has_checkpoint(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(folder) and any(name.startswith("checkpoint-") for name in os.listdir(folder))
    return False


def _mean_problems(args: argparse.Namespace) -> Iterator[str]:
    if (args.mean is None) != (args.std is None):
        yield "--mean and --std belong together; give both or neither"
    elif args.mean is not None and args.imagenet_default_mean_and_std is False:
        yield "--mean and --imagenet_default_mean_and_std false contradict each other; drop one"


def shape_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each size that does not fit the network."""
    stride = 8 * args.stem_stride
    for name, found in (("mean", args.mean), ("std", args.std)):
        if found is not None and len(found) not in (1, args.in_chans):
            got = f"--{name} {as_typed(found)} has {plural(len(found), 'value')}"
            yield f"{got}, expected one, or one for each of --in_chans {args.in_chans}"
    if flags.is_pretraining(vars(args)):
        yield from _patch_problems(args, stride)
    elif args.model.startswith("convnextv2") and min(args.input_size) < stride:
        got = as_typed(args.input_size)
        yield f"--input_size: got {got}, expected at least {stride}; or lower --stem_stride"


def _patch_problems(args: argparse.Namespace, stride: int) -> Iterator[str]:
    patch = args.patch_size
    for flag, value, step, name in (
        ("patch_size", patch, stride, f"8 * stem_stride = {stride}"),
        *(("input_size", side, patch, f"--patch_size {patch}") for side in args.input_size),
    ):
        if value % step:
            low = value // step * step
            near = f"{low} or {low + step}" if low else step
            yield f"--{flag} {value} is not a multiple of {name}; try {near}"
    patches = math.prod(side // patch for side in args.input_size)
    kept = math.floor(patches * (1 - args.mask_ratio) + 1e-6)
    if patches == 1:
        got = f"--input_size {as_typed(args.input_size)} is a single patch of --patch_size {patch}"
        yield f"{got}; raise --input_size, or lower --patch_size (a multiple of 8 * --stem_stride)"
    elif not 1 <= kept < patches:
        got = f"--mask_ratio {args.mask_ratio} keeps {kept} of {patches} patches"
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
        if getattr(args, name) and not args.model_ema:
            yield f"--{name} true needs --model_ema true; give both or neither"
    if args.eval_data_path and args.data_set in flags.HAVE_EVAL_DATA:
        got = f"--eval_data_path: --data_set {args.data_set} has its own evaluation data"
        yield f"{got}; use --data_set image_folder or drop it"
    if args.val_split and args.data_set in flags.HAVE_EVAL_DATA and args.data_set != "IMNET":
        yield f"--val_split: --data_set {args.data_set} has its own evaluation data; drop it"
    if args.use_ema and not (args.finetune or args.resume or args.eval):
        yield "--use_ema true needs a checkpoint; give --finetune, --resume or --eval true"
    yield from _two_names(args)
    yield from _backbone_problems(args)
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
    """Yield a message for each flag of export.py that is for a ConvNeXt V2 alone."""
    if args.to not in (*flags.GRAPHS, "safetensors"):
        targets = ", ".join((*flags.GRAPHS, "safetensors"))
        yield f"--model {model}: --to {args.to} is for ConvNeXt V2; use one of {targets}"
    if args.half:
        other = " or --model" * bool(args.model)
        yield f"--half true is tested with ConvNeXt V2 only, not with {model}; drop --half{other}"


def export_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of export.py that the format cannot use."""
    if args.to is None:
        return (yield f"--to is missing; give one of {', '.join(flags.TARGETS)}")
    if args.model and not (flags.is_code(args.model) or flags.library_of(args.model)):
        yield f"--model {args.model}: the size of a ConvNeXt V2 is found in its weights; drop it"
    elif args.model:
        yield from other_network_problems(args, args.model)
    if args.half and args.to not in flags.GRAPHS:
        yield f"--half true: weights for {args.to} keep their precision; drop it"
    if args.opset and args.to != "onnx":
        yield f"--opset {args.opset} is for --to onnx only; drop it"
    for name in ("labels", "crop_pct", "imagenet_default_mean_and_std", "mean", "std"):
        if getattr(args, name) is not None and args.to in flags.GRAPHS:
            yield f"--{name}: --to {args.to} cannot store it, as files of weights can; drop it"
    suffix = flags.TARGETS[args.to]
    if args.output and not args.output.endswith(suffix):
        yield f"--output {args.output}: expected a name that ends in {suffix}"
    if len(args.input_size or ()) > 2:
        yield f"--input_size: got {as_typed(args.input_size)}, expected one or two numbers"
    yield from _mean_problems(args)
    yield from _two_names(args)
