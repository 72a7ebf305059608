# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Sub-commands of probe.py, their flags and checks.

python probe.py neighbors runs/photos --data_path photos --k 5
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from config import checks, flags, phases, recipes
from config import parser as parsers
from config.flags import SOURCES
from config.kinds import BOOL, COUNT, FRACTION, NAME, OUT, POSITIVE, number, out
from config.tool_flags import OF_FILES
from errors import did_you_mean

AIMS = {
    "accuracy": """Measure how well frozen features separate classes: k nearest neighbors,
a linear probe by ridge regression and a logistic one, fitted to the training
images.

  python probe.py runs/photos --data_path labeled
  python probe.py timm:resnet18 --data_path labeled

Other sub-commands, each with its own --help:
  features     write features to .npy, .safetensors or .parquet
  neighbors    draw images with their nearest neighbors
  duplicates   list and draw near-duplicates
  outliers     list and draw images that are far from all others
  map          draw the images as points in two dimensions
  selectivity  class selectivity of the channels of each layer""",
    "features": """Write the features of all images, with names and labels.

  python probe.py features runs/photos --data_path photos --output photos.npy

.npy holds (images, channels) float32, and photos-rows.csv next to it the names
and labels of the rows; .safetensors and .parquet hold them too.""",
    "neighbors": """Draw images and their nearest neighbors among the training images.

  python probe.py neighbors runs/photos --data_path photos --k 5

Numbers are cosine distances: 0 for equal features, about 1 for unrelated ones.""",
    "duplicates": """Find images that are nearly the same, also of training and evaluation data.

  python probe.py duplicates runs/photos --data_path labeled --split all

All pairs are compared. The CSV file has a line per pair over the threshold;
pairs that share an image are one group.""",
    "outliers": """Rank images by the distance to their k-th nearest neighbor.

  python probe.py outliers runs/photos --data_path photos

The CSV file has a line per image, the most distant first, and the fraction of
its k neighbors that have its class: near 0 suggests a wrong label.""",
    "map": """Draw the features of all images in two dimensions, colored by class.

  python probe.py map runs/photos --data_path photos --method pca""",
    "selectivity": """Draw and print the class selectivity index of the channels of each layer.

  python probe.py selectivity runs/photos --data_path labeled

(largest - others) / (largest + others) of the mean activities of a channel for
each class: 0 if it is equally active for all, 1 if it is for one class alone.""",
}
PROBES = ("knn", "linear", "logistic")
FEATURE_SUFFIXES = (".npy", ".safetensors", ".parquet")
SIDE_ENDINGS = {".npy": "-rows.csv", ".csv": ".png"}  # by that of --output
PNG, CSV = out(".png"), out(".csv")
COSINE = number("float [-1, 1]")
# fmt: off
COMMON = (
    ("checkpoint", {"metavar": "CHECKPOINT"}, None, f"{SOURCES}; or torchvision:NAME"),
    ("--feature_cache", OUT, None,
     "folder of computed features, or none; default: ~/.cache/convnextv2/features"),
    ("--max_images", COUNT, None, "largest number of images of a part, drawn by --seed"),
)
SPLIT = ("--split", ("train", "val"), "train", "images to use; not all data has val")
EITHER = ("--split", ("train", "val", "all"), "train", "images to use; not all data has val")
LAYER = (
    "--layer", NAME, None,
    "module whose output, averaged over positions, is used; default: the classifier's input",
)
CENTER = (
    "--center", BOOL, True, "subtract the mean of all features before they are compared by cosine",
)
ROWS = {
    "accuracy": (
        ("--probes", PROBES, PROBES, "probes to fit; linear is ridge regression", "+"),
        ("--k", COUNT, 20, "neighbors that vote"),
        ("--temperature", POSITIVE, 0.07, "softmax temperature of the neighbor votes"),
        ("--fractions", FRACTION, (1.0,),
         "fractions of the training images of each class to fit the probes to", "+"),
        ("--output", out(".json"), None, "JSON file to write the results to; default: none"),
        LAYER,
    ),
    "features": (
        ("--output", out(*FEATURE_SUFFIXES), "features.npy",
         "file to write: .npy, .safetensors or .parquet"),
        EITHER, LAYER,
    ),
    "neighbors": (
        ("--k", COUNT, 6, "neighbors of an image"),
        ("--num_images", COUNT, 8, "number of images, one per row, spread evenly"),
        ("--output", PNG, "neighbors.png", "PNG file to write"),
        ("--split", ("train", "val"), "train", "images to find neighbors of; not all data has val"),
        CENTER, LAYER,
    ),
    "duplicates": (
        ("--threshold", COSINE, 0.97, "smallest cosine similarity of a pair"),
        ("--num_images", COUNT, 10, "largest number of groups in the picture, one per row"),
        ("--output", CSV, "duplicates.csv", "CSV file to write; the picture is a .png next to it"),
        EITHER, CENTER, LAYER,
    ),
    "outliers": (
        ("--k", COUNT, 10, "neighbor whose distance counts"),
        ("--num_images", COUNT, 24, "number of images in the picture"),
        ("--output", CSV, "outliers.csv", "CSV file to write; the picture is a .png next to it"),
        EITHER, CENTER, LAYER,
    ),
    "map": (
        ("--method", ("pca", "tsne", "umap"), "pca",
         "pca; tsne needs scikit-learn, and umap umap-learn"),
        ("--output", PNG, "map.png", "PNG file to write"),
        EITHER, LAYER,
    ),
    "selectivity": (
        ("--layers", NAME, None,
         "modules to look at; default: blocks of ConvNeXt, or all activation functions", "+"),
        ("--output", PNG, "selectivity.png", "PNG file to write"),
        SPLIT,
    ),
}
# fmt: on
DATA = """
--data_set --data_path --eval_data_path --val_split --data_index --task --image_column
--label_column --image_root --split_column --nb_classes --on_bad_image
"""
PREPROCESSING = """
--input_size --crop_pct --imagenet_default_mean_and_std --mean --std --value_range --in_chans
"""
WEIGHTS = "--model --stem_stride --model_key --use_ema --model_prefix --sha256"
MACHINE = "--device --amp --batch_size --num_workers --seed"
TEXTS = {
    "input_size": parsers.OF_CHECKPOINT["input_size"],
    "data_path": "data: whatever main_finetune.py takes; some sub-commands need no labels",
    "nb_classes": "number of classes, for data sets without class names",
    "seed": "random seed of draws, and of --method",
}


def probe_parser(view: str = "accuracy") -> parsers.Parser:
    """Return the parser of a sub-command."""
    name = "" if view == "accuracy" else f"{view} "
    parser = parsers.Parser(f"%(prog)s {name}CHECKPOINT --data_path DATA [FLAGS]", AIMS[view])
    parsers.add_rows(parser, "start here", [COMMON[0], *ROWS[view], *COMMON[1:]])
    parsers.add_flags(parser, "data", DATA)
    parsers.add_flags(parser, "preprocessing", PREPROCESSING)
    parsers.add_flags(parser, "choice of weights", WEIGHTS)
    parsers.add_flags(parser, "machine", MACHINE)
    parsers.adapt_flags(parser, TEXTS)
    return parser


def parse_probe(words: Sequence[str] | None = None) -> tuple[str, parsers.FrozenNamespace]:
    """Return a sub-command, and the flags of main_finetune.py with those of probe.py.

    Without a sub-command as the first word it is `accuracy`. CHECKPOINT is --finetune, or --model
    with --pretrained for a network of timm or torchvision.
    """
    words = [*(sys.argv[1:] if words is None else words)]
    view = words.pop(0) if words and words[0] in AIMS else "accuracy"
    parser = probe_parser(view)
    two = [word for word in words[:2] if not word.startswith("-")]  # and not flags
    if len(two) == 2 and (hint := did_you_mean(two[0], AIMS)):
        parser.error(f"unknown sub-command {two[0]!r}. {hint}")
    values, typed = vars(parser.parse_args(words)), {*recipes.flags_set_by(parser, words)}
    given = typed
    source = values["checkpoint"]
    library = flags.library_of(source)
    if library:
        problem = next((name for name in ("model", *OF_FILES) if name in typed), "")
        if problem:
            parser.error(f"--{problem} is for a file of weights, not for {source}; drop it")
        values, given = values | {"model": source, "pretrained": True}, given | {"model"}
    else:
        values["finetune"] = source
    plain = {"aa": "none"}  # nothing is augmented; the default refuses images of many channels
    args = vars(parsers.finetune_parser().parse_args([])) | plain | values
    args = parsers.finalize(argparse.Namespace(**args), given, typed)
    for problem in (*checks.problems(args), *problems(view, args)):
        parser.error(problem)
    return view, args


def side_file(path: Path) -> Path:
    """Return the second file that is written next to a .npy or .csv of --output."""
    return path.with_name(path.stem + SIDE_ENDINGS[path.suffix])


def files_to_write(output: str | None) -> list[Path]:
    """Return the files of --output."""
    paths = [Path(output)] if output else []
    return paths + [side_file(path) for path in paths if path.suffix in SIDE_ENDINGS]


def problems(view: str, args: argparse.Namespace) -> Iterator[str]:
    """Yield a message for each flag of probe.py that cannot work."""
    for name in ("k", "temperature"):
        if view == "accuracy" and name in args.typed and "knn" not in args.probes:
            yield f"--{name} is for --probes knn, which is not among them; drop it"
    if len(phases.eval_sets(args.eval_data_path)) > 1:
        yield f"--eval_data_path {args.eval_data_path}: give one set"
    if args.feature_cache not in (None, "none") and Path(args.feature_cache).is_file():
        yield f"--feature_cache {args.feature_cache} is a file; give a folder, or none"
