# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of predict.py, and those of main_finetune.py --eval that follow from them.

python predict.py runs/finetune photos --output results.csv
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import checks
from config import parser as parsers
from config.flags import SOURCES
from config.kinds import BOOL, COUNT, FROM_0, OUT, number
from config.parser import FrozenNamespace

HELP = """Predict the classes of images, or numbers, with any checkpoint.

  python predict.py runs/finetune photos                       # a table
  python predict.py runs/finetune photos --output results.csv  # a file
  python predict.py timm:resnet18.a1_in1k "photos/*.jpg" --topk 3
  find photos -name "*.jpg" | python predict.py runs/finetune - --output a.json
  torchrun --nproc_per_node=8 predict.py runs/finetune photos --output a.parquet

INPUT is an image, a pattern in quotes, - for paths on standard input, or
whatever --data_path of the training scripts takes: a folder, a table, a zip
file, tar shards, Parquet. Image size, crop, mean, std and class names are those
of the checkpoint. Unreadable images are skipped and listed with the reason.
The same command continues an interrupted one. If the input has labels, with the
class names of the checkpoint, it is evaluated too."""
FORMATS = (".csv", ".json", ".jsonl", ".parquet")  # of --output, by its suffix
# fmt: off
PREDICT = (
    ("checkpoint", {"metavar": "CHECKPOINT"}, None, SOURCES),
    ("input", {"metavar": "INPUT"}, None, "images: see above; several are taken in this order",
     "+"),
    ("--output --out", OUT, None,
     f"file to write, {', '.join(FORMATS)}; default: the first images are printed as a table"),
    ("--overwrite", BOOL, False, "replace an existing --output, or unfinished other results"),
    ("--topk", COUNT, None, "most likely classes to list per image; default: 5"),
    ("--threshold", number("float (0, 1)"), None,
     "multi-label: probability from which on a class is predicted; default: 0.5"),
    ("--labels", ("auto", "true", "false"), "auto",
     "use the labels of the input: true, false, or auto: if they are classes of the checkpoint"),
    ("--split", ("val", "train"), "val",
     "part of the data to predict, for tables with --split_column and shards named train and val"),
    ("--num_worst", FROM_0, 16,
     "number of highest-loss images to draw (needs labels and --output)"),
)
# fmt: on
SHARED = {
    "speed": "--batch_size --num_workers --device --amp --compile --kernels --data_timeout",
    "columns of tables": "--image_column --image_root --split_column --label_column",
    "choice of weights": "--model_key --use_ema --model_prefix --sha256",
    "overrides of the checkpoint's flags": "--model --head --heads --tta --input_size --crop_pct "
    "--imagenet_default_mean_and_std --mean --std --value_range",
}
TEXTS = {
    **parsers.OF_CHECKPOINT,
    "batch_size": "images per process in each forward pass; default: 64",
    "label_column": "table: columns of labels, * for all others; default: the checkpoint's",
    "image_column": "table: column of image files; default: the checkpoint's, or image, path ...",
}
PLACE = "-"  # stands for the input where the flags of --eval need a --data_path


def predict_parser() -> argparse.ArgumentParser:
    """Return the parser of predict.py; unset flags are those of the checkpoint."""
    parser = parsers.Parser("%(prog)s CHECKPOINT INPUT [INPUT ...] [FLAGS]", HELP)
    parsers.add_rows(parser, "predictions", PREDICT)
    for title, names in SHARED.items():
        parsers.add_flags(parser, title, names)
    names = " ".join(SHARED.values()).replace("--", "").split()
    parser.set_defaults(**dict.fromkeys(names))
    parsers.adapt_flags(parser, TEXTS)
    return parser


def predict_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of predict.py that cannot work."""
    suffix = Path(args.output or "a.csv").suffix
    if suffix not in FORMATS:
        unknown = f": unknown suffix {suffix!r}" if suffix else ""
        yield f"--output {args.output}{unknown}; expected a name that ends in {', '.join(FORMATS)}"
    if args.overwrite and not args.output:
        yield "--overwrite true needs --output; give both or neither"
    if len(args.input_size or ()) > 2:
        yield f"--input_size: got {len(args.input_size)} numbers, expected one or two"
    if PLACE in args.input and len(args.input) > 1:
        yield "- reads paths from standard input; give it alone, or the other inputs without it"


def flags_of_evaluation(
    args: argparse.Namespace, rows: Sequence[tuple] = PREDICT
) -> FrozenNamespace:
    """Return the flags of main_finetune.py --eval, with those that were given here.

    rows: of the flags that it does not have.
    """
    own = {row[0].split()[0].removeprefix("--") for row in rows}
    given = {name: x for name, x in vars(args).items() if name not in own and x is not None}
    defaults = vars(parsers.finetune_parser().parse_args([]))
    # Only those that predict images are needed: a file in `data_path` would bring its --val_split.
    fixed = {"eval": True, "data_path": PLACE, "on_bad_image": "skip", "output_dir": ""}
    fixed |= {"resume": args.checkpoint, "config": None, "recipe": None}
    values = argparse.Namespace(**defaults | given | fixed)
    return parsers.finalize(values, {*given}, {*given})


def parse(argv: Sequence[str] | None = None) -> tuple[Any, FrozenNamespace]:
    """Return the flags of predict.py, checked, and those of the evaluation."""
    parser = predict_parser()
    args = parser.parse_args(argv)
    for problem in predict_problems(args):
        parser.error(problem)
    evaluation = flags_of_evaluation(args)
    for problem in checks.problems(evaluation):
        parser.error(problem)
    return args, evaluation
