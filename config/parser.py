# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Command-line parsers of all scripts, and frozen arguments.

python -c "from config import parser; parser.parse(parser.pretrain_parser(), ['--help'])"
"""

import argparse
import contextlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from config import checks, flags, kinds, recipes, tool_flags
from config.flags import as_typed
from config.linear_probe import imply_flags
from config.paths import absolute, map_sources
from config.phases import map_eval_paths
from config.schedules import clear_scheduled
from config.sizes import as_one_flag, split_sizes
from config.tasks import known_kind, task_flags
from errors import did_you_mean, pipe_may_close, resolve, sentences

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "convnextv2-toolkit"  # name of the distribution
LIBRARIES = ("torch", "torchvision", "timm", "numpy")
VISUALIZE_HELP = """Draw images, their masks and their reconstructions by a pre-trained model.

  python visualize.py --checkpoint runs/photos
  python visualize.py data --help    draw what a training script sees
  python visualize.py stats --help   print mean, std, sizes and classes
  python visualize.py runs --help    list runs with their results
  python visualize.py report --help  write the report of runs as one HTML file
  python visualize.py explain --help draw where a network looks"""
FINETUNE_ONLY = (
    "label smoothing and mixing",
    "loss",
    "task and sampling",
    "pretrained weights and head",
    "evaluation and EMA",
)
# Help texts of flags that a tool takes from the checkpoint.
OF_CHECKPOINT = {
    "input_size": "image side in pixels, or height and width; default: the checkpoint's",
    "model": "timm:NAME, torchvision:NAME or package.module:function of another network; default: "
    "the checkpoint's",
    "head": "the checkpoint's --head again, to allow running its package.module:name",
    "heads": "the checkpoint's --heads again, to allow running its package.module:name",
}
WRITTEN = ("output_dir", "log_dir", "data_index")  # flags with the path of a folder to write
SOURCES = ("data_path", "eval_data_path", "probe_data")  # one path or several
READ = (*SOURCES, "image_root", "finetune", "resume")  # a path, or another source


class FrozenNamespace(argparse.Namespace):
    """Parsed flags.

    given: names of those that the command line, --config or --recipe set; others have their default
        or are taken from a checkpoint. typed: those of the command line alone. Neither is a flag,
        so `vars(args)` does not hold them.
    """

    __slots__ = ("given", "typed")

    def __init__(
        self, given: Iterable[str] = (), typed: Iterable[str] = (), /, **values: Any
    ) -> None:
        object.__setattr__(self, "given", frozenset(given))
        object.__setattr__(self, "typed", frozenset(typed))
        self.__dict__.update(values)

    def __reduce__(self) -> tuple:  # submitit pickles the flags of a job
        return partial(FrozenNamespace, self.given, self.typed, **vars(self)), ()

    def replace(self, **changes: Any) -> "FrozenNamespace":
        """Return a changed copy."""
        return FrozenNamespace(self.given, self.typed, **{**vars(self), **changes})

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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help has the range and default of each flag."""

    everyday = flags.EVERYDAY  # flags in the short help
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
            names = ("help", *self.everyday.split())
            shown = [action for action in actions if action.dest in names]
            hidden += len(actions) - len(shown)
            formatter.start_section(group.title)
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(f"--help all shows {hidden} more flags.")
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:  # argparse's usage would hide the message
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n(see {self.prog} --help)\n")

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """Refuse an empty text, as an unset shell variable gives it, unless it has a meaning.

        Files hold it for flags without a value, as those of earlier versions do.
        """
        is_text = isinstance(action.type, kinds.FileToWrite | None) and action.choices is None
        is_empty = action.nargs != 0 and not all(word.strip() for word in words)
        allowed = action.dest in flags.MAY_BE_EMPTY.split()
        allowed |= bool(self.source) and action.default in ("", None)
        if is_text and is_empty and not allowed:
            problem = f"got an empty text; give {action.metavar}, or leave the flag out"
            raise argparse.ArgumentError(action, problem)
        return super()._get_values(action, words)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            word = next((word for word in extra if word.startswith("-")), extra[0])
            hint = did_you_mean(word.partition("=")[0], self._option_string_actions)
            self.error(sentences(f"unrecognized argument {word!r}.", hint))
        return parsed


def find_versions() -> dict[str, str]:
    """Return the versions of the toolkit, Python and the main libraries, without loading them."""
    own = ROOT / "pyproject.toml"
    text = own.read_text(encoding="utf-8") if own.exists() else ""
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    versions = {PACKAGE: found[1] if found else "unreleased", "Python": platform.python_version()}
    for name in (PACKAGE,) * (found is None) + LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def describe_versions() -> str:
    """Return the versions of `find_versions` in one line."""
    return ", ".join(f"{name} {version}" for name, version in find_versions().items())


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
    rows = [row for rows in flags.FLAGS.values() for row in rows if row[0] in only.split()]
    rows = rows or (flags.FLAGS | tool_flags.TOOLS)[title]
    add_rows(parser, title, [row for row in rows if row[0] not in left_out])


def add_rows(parser: argparse.ArgumentParser, title: str, rows: Iterable[tuple]) -> None:
    """Add a group of flags, given as rows of FLAGS."""
    group = parser.add_argument_group(title)
    for names, kind, default, text, *nargs in rows:
        choices = isinstance(kind, tuple)
        options = {"choices": kind, "type": type(kind[0])} if choices else dict(kind)
        if nargs:
            options |= {"nargs": nargs[0], "metavar": options.get("metavar", "NAME")}
        group.add_argument(*names.split(), default=default, help=text, **options)


def adapt_flags(parser: argparse.ArgumentParser, texts: Mapping[str, str]) -> None:
    """Give flags of the training scripts other help texts, by name, for a tool.

    --input_size takes one size: sizes by epoch are for training.
    """
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)
        if action.dest == "input_size":
            action.type = kinds.COUNT["type"]


def add_submitit_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `submitit_*.py` that describe the job to those of a main script."""
    add_flags(parser, flags.JOB)
    if isinstance(parser, Parser):
        parser.description = flags.SUBMITIT_HELP % {"kind": parser.script.removeprefix("main_")}


def _main_parser(kind: str, aim: str, *left_out: str) -> Parser:
    """Return the parser of main_KIND.py without some groups or flags."""
    text = flags.HELP % {"aim": aim, "kind": kind}
    parser = Parser("%(prog)s [FLAGS]", text, f"main_{kind}")
    parser.add_argument(
        "--list_models", action=_Answer, answer=_list_models, nargs=0, help="show names for --model"
    )
    for title in flags.FLAGS:
        if title not in (*left_out, flags.JOB):
            add_flags(parser, title, left_out=left_out)
    return parser


def pretrain_parser() -> argparse.ArgumentParser:
    """Return the parser of main_pretrain.py."""
    aim = "Pre-train ConvNeXt V2 as a fully convolutional masked autoencoder (FCMAE)."
    parser = _main_parser("pretrain", aim, "--finetune", *FINETUNE_ONLY)
    add_flags(parser, "choice of weights", "--model_key --model_prefix")
    parser.set_defaults(epochs=800, blr=1.5e-4, min_lr=0.0, spike_factor=5.0)
    parser.set_defaults(scale=(0.2, 1.0), aa="none", reprob=0.0)  # crop and flip only, as in MAE
    return parser


def finetune_parser() -> argparse.ArgumentParser:
    """Return the parser of main_finetune.py."""
    aim = "Fine-tune a classifier, train it from scratch, or evaluate it (--eval)."
    parser = _main_parser("finetune", aim, "masked autoencoder", "probes and alarms")
    data_set = next(action for action in parser._actions if action.dest == "data_set")
    data_set.help = data_set.help.replace(" folder,", "")  # it has no labels
    resume = next(action for action in parser._actions if action.dest == "resume")
    resume.help += ", but not with --eval"
    return parser


def visualize_parser() -> argparse.ArgumentParser:
    """Return the parser of visualize.py; unset flags are those of the pre-training run."""
    parser = Parser("%(prog)s [reconstructions] --checkpoint PATH [FLAGS]", VISUALIZE_HELP)
    add_flags(parser, "drawing")
    names = "--model --data_set --data_path --eval_data_path --data_index --device --seed "
    names += "--input_size --mask_ratio --imagenet_default_mean_and_std --value_range "
    names += "--image_column --image_root --split_column --on_bad_image"
    add_flags(parser, "overrides of the run's flags", names)
    unset = [word.removeprefix("--") for word in names.split() if word != "--device"]
    parser.set_defaults(**dict.fromkeys(unset))
    adapt_flags(parser, {"input_size": OF_CHECKPOINT["input_size"]})
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of export.py; unset flags are those of the exported run."""
    parser = Parser("%(prog)s CHECKPOINT --to FORMAT [FLAGS]", tool_flags.EXPORT_HELP)
    add_flags(parser, "export")
    add_flags(parser, "choice of weights", "--model_key --use_ema --model_prefix --sha256")
    names = "--model --head --heads --input_size --crop_pct --imagenet_default_mean_and_std"
    add_flags(parser, "overrides of the run's flags", f"{names} --mean --std --value_range")
    unset = ("model", "head", "heads", "input_size", "imagenet_default_mean_and_std")
    parser.set_defaults(**dict.fromkeys(unset))
    adapt_flags(parser, OF_CHECKPOINT)
    return parser


def pack_parser() -> argparse.ArgumentParser:
    """Return the parser of pack.py."""
    parser = Parser("%(prog)s SOURCE DEST [FLAGS]", tool_flags.PACK_HELP)
    add_flags(parser, "pack")
    add_flags(parser, "what the source is", tool_flags.PACK_SHARED)
    parser.set_defaults(num_workers=flags.CORES)
    adapt_flags(parser, tool_flags.PACK_TEXTS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> FrozenNamespace:
    """Read the command line over `--config` over `--recipe`; finalize, check and freeze it."""
    flags, given, typed = recipes.read_flags(parser, argv)
    args = finalize(argparse.Namespace(**flags), given, typed)
    for problem in checks.problems(args):
        parser.error(problem)
    return args


def finalize(
    args: argparse.Namespace, given: Iterable[str] | None = None, typed: Iterable[str] = ()
) -> FrozenNamespace:
    """Resolve unset flags that follow from others, lists to tuples, `input_size` to (H, W).

    `input_sizes` is the text of an --input_size that has sizes by epoch, otherwise ''.
    given, typed: as in `FrozenNamespace`; given: None for all flags.
    `--use_amp false` becomes `amp="none"`. With `amp=None` the main script decides by the device:
    bf16 on CUDA only, or half precision on any device when `use_amp` is True.
    """
    new = {key: tuple(x) if isinstance(x, list) else x for key, x in vars(args).items()}
    pretrain = flags.is_pretraining(new)
    new["input_size"], sizes = split_sizes(new["input_size"])
    new["input_sizes"] = sizes or new.get("input_sizes", "")
    clear_scheduled(new, new if given is None else given)
    imply_flags(new, new if given is None else given, typed)
    if new["warmup_epochs"] is None:
        new["warmup_epochs"] = min(40.0 if pretrain else 20.0, new["epochs"] / 5)
    new["aa"] = None if new["aa"] in ("", "none", "None") else new["aa"]
    if new["output_dir"] == "none":
        new["output_dir"] = ""
    if new.get("job_dir") == "":
        new["job_dir"] = "./runs/%j"
    if new["use_amp"] is False and new["amp"] is None:
        new["amp"] = "none"
    if new["deterministic"] and new["kernels"] == "auto":
        new["kernels"] = "torch"  # two runs may measure different kernels as the fastest
    if pretrain:
        if new["opt_betas"] is None and re.match(r"adamw\b(?!.*\bbetas\b)", new["opt"].lower()):
            new["opt_betas"] = (0.9, 0.95)
        implied = flags.implied_patch(new["model"], new["stem_stride"])
        new["patch_size"] = new["patch_size"] or implied
    else:
        if kind := known_kind(new):
            new |= task_flags(new, new if given is None else given, kind)
        if new["head_init_scale"] is None:
            new["head_init_scale"] = 0.001 if new["finetune"] or new["pretrained"] else 1.0
    return FrozenNamespace(new if given is None else given, typed, **new)


def dump_args(args: argparse.Namespace) -> str:
    """Write args as YAML that `--config` reads back to the same args."""
    import yaml

    values = as_one_flag(absolute_paths(vars(args)))
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
        if name in SOURCES and text:
            new[name] = map_sources(text, absolute)
        elif text not in ("", "none"):
            new[name] = absolute(text, exists=name in WRITTEN)
    if args.get("eval_data_path"):
        new["eval_data_path"] = map_eval_paths(new["eval_data_path"], absolute)
    return new
