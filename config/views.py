# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Sub-commands of visualize.py and their parsers.

python visualize.py data --data_path photos --mixup 0.8 --output seen.png
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config import checks, predict_flags, recipes
from config import parser as parsers
from config.flags import CORES, SOURCES
from config.kinds import BOOL, COUNT, NAME, PATH, out
from errors import did_you_mean

STATS_AIM = """Print mean and std of the pixels, sizes and kinds of images, and classes.

  python visualize.py stats --data_path photos
  python visualize.py stats --data_path scenes --in_chans 12 \\
      --value_range 0 10000

Values are in 0 to 1. The last line is for the command line of a training
script."""
DATA_AIM = """Draw the images that a training script would see: a row per image, a column
per epoch.

  python visualize.py data --data_path photos --model convnextv2_tiny
  python visualize.py data --data_path photos --mixup 0.8 --cutmix 1
  python visualize.py data --data_path photos --script finetune --aa 3a
  python visualize.py data --config runs/photos/args.yaml

Takes all flags of main_pretrain.py or main_finetune.py, and their defaults:
those of main_finetune.py if one of the flags is only for it, or with --script
finetune."""
RUNS_AIM = """List the runs in a folder and in those below it: script, model, recipe, status,
epochs, the last and the best value of a metric, time.

  python visualize.py runs runs
  python visualize.py runs runs --sort test_acc1
  python visualize.py runs runs --json

Without --sort the newest run comes first, with the metric that chooses its
best checkpoint. Runs of earlier versions have no run.json; what their log.txt
and args.yaml tell is listed."""
REPORT_AIM = """Write the report of a run as one HTML file, or of several runs side by side:
notes, curves, reconstructions, results by class, times, flags, machine.

  python visualize.py report runs/demo/pretrain
  python visualize.py report runs/first runs/second --output compared.html

RUN is the --output_dir of a training script. The file needs no server and no
network, so it can be sent by mail. Runs write their own report as they train,
unless --report is false."""
EXPLAIN_AIM = """Draw where a classifier looks, by Grad-CAM; of a pre-trained model, where its
reconstruction errs.

  python visualize.py explain runs/finetune --images photos
  python visualize.py explain runs/finetune --images photos --target cat
  python visualize.py explain runs/pretrain

Flags that are not given are those of the checkpoint."""
SCRIPTS = {"pretrain": parsers.pretrain_parser, "finetune": parsers.finetune_parser}
STATS_FLAGS = """
--data_set --data_path --eval_data_path --data_index --image_column --label_column --image_root
--split_column --in_chans --value_range --num_workers --on_bad_image --seed
"""
OF_STATS = (
    ("--num_images", COUNT, None, "images to measure, drawn by --seed; default: all"),
    ("--split", ("train", "val"), "train", "images to measure; not every data set has val"),
)
OF_REPORT = (
    ("runs", {"metavar": "RUN"}, None, "folders of runs", "+"),
    ("--output", out(".html"), None, "HTML file to write; default: report.html in the first RUN"),
)
OF_DATA = (
    ("--script", tuple(SCRIPTS), None, "training script whose flags are given; default: by them"),
    ("--output", out(".png"), "data.png", "PNG file to write"),
    ("--num_images", COUNT, 4, "number of images, one per row"),
    ("--num_epochs", COUNT, 4, "number of epochs, one per column"),
)
OF_RUNS = (
    ("folder", {"metavar": "DIR"}, "runs", "folder with the folders of runs", "?"),
    ("--sort", NAME, None, "metric of log.txt to show, the best run first; default: newest first"),
    ("--json", BOOL, False, "print JSON with all metrics instead of a table"),
)


def runs_parser() -> argparse.ArgumentParser:
    """Return the parser of `visualize.py runs`."""
    parser = parsers.Parser("%(prog)s runs [DIR] [FLAGS]", RUNS_AIM)
    parsers.add_rows(parser, "list", OF_RUNS)
    return parser


OF_EXPLAIN = (
    ("checkpoint", {"metavar": "CHECKPOINT"}, None, SOURCES),
    ("--output", out(".png"), "explain.png", "PNG file to write"),
    (
        "--images",
        PATH,
        None,
        "image files, or all that --data_path takes; default: those of the pre-training run",
        "+",
    ),
    ("--num_images", COUNT, 8, "number of images, spread over all"),
    ("--split", ("train", "val"), "train", "images to draw; not every data set has val"),
    (
        "--target",
        NAME,
        None,
        "classifier: class to explain, by name or number; default: the predicted one of each image",
    ),
    ("--layer", NAME, None, "classifier: module that gives the map; default: the last map"),
    ("--num_masks", COUNT, None, "pre-trained model: masks to average over; default: 8"),
)
EXPLAIN_FLAGS = """
--model --head --heads --model_key --use_ema --model_prefix --sha256 --device --seed --input_size
--crop_pct --imagenet_default_mean_and_std --mean --std --value_range --image_column --image_root
--split_column --on_bad_image
"""


def stats_parser() -> argparse.ArgumentParser:
    """Return the parser of `visualize.py stats`."""
    parser = parsers.Parser("%(prog)s stats --data_path PATH [FLAGS]", STATS_AIM)
    parsers.add_flags(parser, "data", STATS_FLAGS)
    parser.set_defaults(num_workers=CORES)
    parsers.add_rows(parser, "choice of images", OF_STATS)
    return parser


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of `visualize.py report`."""
    parser = parsers.Parser("%(prog)s report RUN [RUN ...] [--output FILE]", REPORT_AIM)
    parsers.add_rows(parser, "report", OF_REPORT)
    return parser


def data_parser(script: str = "pretrain") -> argparse.ArgumentParser:
    """Return the parser of `visualize.py data`: that of a training script with some more flags."""
    parser = SCRIPTS[script]()
    parser.usage, parser.description = "%(prog)s data [FLAGS]", DATA_AIM
    parser.everyday = " ".join([parser.everyday, *(row[0][2:] for row in OF_DATA)])
    parsers.add_rows(parser, "drawing", OF_DATA)
    return parser


def explain_parser() -> argparse.ArgumentParser:
    """Return the parser of `visualize.py explain`; unset flags are those of the checkpoint."""
    parser = parsers.Parser("%(prog)s explain CHECKPOINT [FLAGS]", EXPLAIN_AIM)
    parsers.add_rows(parser, "drawing", OF_EXPLAIN)
    parsers.add_flags(parser, "overrides of the checkpoint's flags", EXPLAIN_FLAGS)
    parser.set_defaults(**{word.removeprefix("--"): None for word in EXPLAIN_FLAGS.split()})
    parsers.adapt_flags(parser, predict_flags.TEXTS)
    return parser


def choose_script(words: Sequence[str]) -> str:
    """Return `finetune` if --script says so, or a flag of words or their files is only for it.

    Files are those of --config and --recipe, and the run of --resume.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--script", "--config", "--recipe", "--resume"):
        finder.add_argument(name)
    found, _ = finder.parse_known_args([*words])
    if found.script in SCRIPTS:
        return found.script
    names = {word.partition("=")[0].removeprefix("--") for word in words if word[:2] == "--"}
    for file in (found.config, found.recipe, found.resume):
        try:
            path = recipes.recipes().get(file) or Path(file or "")
            values = recipes.read_values(path) if file else {}
        except ValueError:  # the parser will say so
            continue
        if script := values.get("script"):
            return str(script).removeprefix("main_")
        names |= {*values}
    pretrain, finetune = ({a.dest for a in make()._actions} for make in SCRIPTS.values())
    return "finetune" if names & (finetune - pretrain) else "pretrain"


def parse_runs(words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `visualize.py runs`."""
    return runs_parser().parse_args(words)


def parse_stats(words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `visualize.py stats`."""
    parser = stats_parser()
    args = parser.parse_args(words)
    if args.value_range and args.value_range[0] >= args.value_range[1]:
        parser.error("--value_range: expected the value that becomes 0, then a larger one")
    return args


def parse_report(words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `visualize.py report`."""
    return report_parser().parse_args(words)


def parse_data(words: Sequence[str]) -> parsers.FrozenNamespace:
    """Parse the flags of `visualize.py data`."""
    return parsers.parse(data_parser(choose_script(words)), words)


def parse_explain(words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `visualize.py explain`."""
    parser = explain_parser()
    args = parser.parse_args(words)
    if len(args.input_size or ()) > 2:
        parser.error(f"--input_size: got {len(args.input_size)} numbers, expected one or two")
    for problem in checks.problems(predict_flags.flags_of_evaluation(args, OF_EXPLAIN)):
        parser.error(problem)
    return args


def parse_reconstructions(words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `visualize.py reconstructions`."""
    return parsers.visualize_parser().parse_args(words)


# Sub-command -> function that parses the words after it. The first is the default.
VIEWS: dict[str, Callable[[Sequence[str]], Any]] = {
    "reconstructions": parse_reconstructions,
    "data": parse_data,
    "stats": parse_stats,
    "runs": parse_runs,
    "report": parse_report,
    "explain": parse_explain,
}


def parse_view(words: Sequence[str] | None = None) -> tuple[str, Any]:
    """Return a sub-command and its flags; without a first word it is `reconstructions`."""
    words = [*(sys.argv[1:] if words is None else words)]
    name = words.pop(0) if words and not words[0].startswith("-") else next(iter(VIEWS))
    if name not in VIEWS:
        hint = did_you_mean(name, VIEWS) or f"expected {', '.join(VIEWS)}, or flags"
        parsers.visualize_parser().error(f"unknown sub-command {name!r}. {hint}")
    return name, VIEWS[name](words)
