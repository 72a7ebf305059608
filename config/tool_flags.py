# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of export.py, pack.py and visualize.py alone, declared as in config/flags.py.

python -c "from config.tool_flags import shard_size; print(shard_size('500MB'))"
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

from config.flags import SOURCES
from config.kinds import BOOL, COUNT, OUT, PATH, number

EXPORT_HELP = """Convert a checkpoint for other libraries, and check the result with them.

  python export.py runs/finetune --to hf --output my_model
  python export.py hf-hub:facebook/convnextv2-tiny-1k-224 --to timm

formats for --to:
  timm         .safetensors for timm.create_model(NAME, checkpoint_path=FILE)
  hf           folder for transformers' from_pretrained, with preprocessing
  official     .pth for the official ConvNeXt scripts, with the decoder
  safetensors  this toolkit's own names, with the decoder
  onnx         graph for onnxruntime, TensorRT and others
  torchscript  graph for torch.jit.load and LibTorch
  pt2          graph for torch.export.load; images of at least 64 x 64 pixels

Graphs accept any batch size, height and width; without a head they return
pooled features, or the last feature map if there is no final norm. The file is
loaded with timm, transformers, onnxruntime or torch, if installed, and deleted
if outputs differ from the network's by over 1e-5 of the largest (--half: 1e-2)."""
# Formats of export.py and the suffix of their files; hf is a folder. Graphs hold the network too.
GRAPHS = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
TARGETS = {"timm": ".safetensors", "hf": "", "official": ".pth", "safetensors": ".safetensors"}
TARGETS |= GRAPHS
# Flags that choose weights of a file, and mean nothing for the published ones of a library.
OF_FILES = ("model_key", "model_prefix", "use_ema", "sha256")
FOR_ANY_NETWORK = (*GRAPHS, "safetensors")  # the others are for a ConvNeXt with a linear classifier

PACK_HELP = """Pack images of any source into tar shards, which are read fast in any order.

  python pack.py photos packed                 # the files as they are
  python pack.py photos packed --size 256      # larger ones resized, as JPEG
  python pack.py packed --verify               # compare with the checksums
  python main_finetune.py --data_path packed --model convnextv2_atto

SOURCE is whatever --data_path of the training scripts takes: a folder, a table,
a zip file, tar shards, Parquet, or several of them. Names, order, labels, class
names, weights and the parts for training and evaluation are kept, so a run on a
pack without --size gives the same weights as one on SOURCE. The same command
continues an interrupted pack. Shards are plain tar files."""
UNITS = {"": None, "MB": 10**6, "GB": 10**9}


def shard_size(text: str) -> tuple[int | None, int | None]:
    """Read `10000` or `500MB` as (images, bytes) of a shard, of which one is None."""
    found = re.fullmatch(r"(\d+) ?(MB|GB)?", text, re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected images per shard such as 10000, or a size such as 500MB or 1GB"
        )
    count, unit = int(found[1]), UNITS[(found[2] or "").upper()]
    return (count, None) if unit is None else (None, count * unit)


def size_text(images: int | None, size: int | None) -> str:
    """Write the limit of a shard as `shard_size` reads it."""
    return str(images) if size is None else f"{size // 10**6}MB"


# fmt: off
EXPORT = (
    ("checkpoint", {"metavar": "CHECKPOINT"}, None, SOURCES),
    ("--to", tuple(TARGETS), None, "target format, listed above"),
    ("--output", OUT, "", "file or folder to write; default: named by size and format"),
    ("--overwrite", BOOL, False, "replace an existing output"),
    ("--labels", PATH, None, "hf: text file with a class name per line; default: the checkpoint's"),
    ("--half", BOOL, False, "graphs: weights in float16; sums, input and output stay in float32"),
    ("--opset", number("int [17, 20]"), None, "onnx: opset; default: 17, the most portable"),
)
PACK = (
    ("source", {"metavar": "SOURCE"}, None, "data to pack; with --verify and no DEST, a pack"),
    ("dest", {"metavar": "DEST"}, None, "folder of the pack: a new one, or one to continue", "?"),
    ("--size", COUNT, None, "shorter side in pixels of larger images; default: not resized"),
    ("--format", ("jpeg", "webp"), None, "format of resized images; default: jpeg"),
    ("--quality", number("int [1, 100]"), None, "quality of resized images; default: 90"),
    ("--shard_size", {"type": shard_size, "metavar": "TEXT"}, "1GB",
     "images per shard, or size with MB or GB"),
    ("--part", ("all", "train", "val"), "all", "images to pack: for training, evaluation or both"),
    ("--unlabeled", BOOL, False, "pack without labels, as for pre-training"),
    ("--label_files", BOOL, False,
     "add a .json file with the label to each image, for other programs that read WebDataset"),
    ("--verify", BOOL, False, "compare a pack with its checksums, and decode each image"),
)
DRAWING = (
    ("--checkpoint", PATH, "", "run of main_pretrain.py, or weights with a decoder"),
    ("--output", OUT, "reconstructions.png", "PNG file to write"),
    ("--images", PATH, None, "image files, or all that --data_path takes; default: the run's", "+"),
    ("--num_images", COUNT, 8, "number of images, one per row"),
    ("--split", ("train", "val"), "train", "images to draw; not every data set has val"),
)
# fmt: on
TOOLS = {"export": EXPORT, "pack": PACK, "drawing": DRAWING}
# Flags of the training scripts that pack.py has too, and texts where they mean something else.
PACK_SHARED = """
--data_set --image_column --image_root --split_column --label_column --weight_column --task
--on_bad_image --num_workers
"""
PACK_TEXTS = {
    "on_bad_image": "unreadable images: stop, or leave them out and list them in bad_images.txt",
    "num_workers": "processes that read and encode; the result does not depend on it",
    "weight_column": "table: column of weights for --sampling weighted; default: none",
}
OF_ENCODING = ("format", "quality")  # flags that need --size
OF_PACKING = """
size format quality shard_size part unlabeled label_files data_set image_column image_root
split_column label_column weight_column task on_bad_image
"""


def pack_problems(args: argparse.Namespace, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each combination of flags of pack.py that cannot work."""
    values = vars(args)
    given = [name for name in OF_PACKING.split() if values[name] != defaults[name]]
    if args.dest is None and not args.verify:
        yield "DEST is missing; give the folder of the pack, or --verify to check SOURCE"
    elif args.dest is None and given:
        yield f"--{given[0]} is for packing; drop it, or give DEST"
    for name in OF_ENCODING:
        if values[name] is not None and args.size is None:
            yield f"--{name} is for resized images; give --size too, or drop it"
    if args.label_files and args.data_set == "folder":
        yield "--label_files is for labels, and --data_set folder has none; drop one"
    if args.unlabeled:
        for name in ("label_column", "task", "label_files"):
            if name in given:
                yield f"--{name} is for labels, and --unlabeled drops them; drop one"
