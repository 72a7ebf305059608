# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Compare FCMAE pre-training on CIFAR-10 with training from scratch, at equal epochs and time.

python benchmarks/cifar.py --data cifar10_jpeg.zip --output benchmarks/RESULTS.md
"""

import argparse
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config.kinds import AMOUNT, BELOW_1, CHANCE, COUNT, FRACTION, FROM_0

SWITCH = {"type": int, "choices": [0, 1]}

HELP = """Train a network on CIFAR-10, in three runs for each seed:
  pretrained  FCMAE pre-training on --pretrain_images, then --epochs of fine-tuning
  scratch     --epochs of the same training from random weights
  longer      from random weights for as long as `pretrained` trains in all: for --epochs +
              --pretrain_epochs * P / S, rounded up, P and S the median seconds of an epoch of
              pre-training and of `scratch`, evaluation left out, with the first seed
The accuracy is that after the last epoch: no epoch is chosen by it. Images, of a zip of
train/CLASS/*.jpg and val/CLASS/*.jpg, stay in the memory of the device and are augmented there.

  python benchmarks/cifar.py                              # settings by device, three seeds
  python benchmarks/cifar.py --seeds 0 --pretrain_epochs 40 --epochs 20
  python benchmarks/cifar.py --model 2,4,2/96,192,384 --stem_stride 2     # blocks/channels
  python benchmarks/cifar.py --model timm:resnet18 --stem_stride 1 --longer_epochs 0
  python benchmarks/cifar.py --results runs/cifar.jsonl   # rerun the same command to resume

Learning curves go to stderr, the tables to stdout and --output."""
RUNS = {
    "pretrained": "FCMAE pre-training, then fine-tuning",
    "scratch": "from scratch, as many epochs as fine-tuning",
    "longer": "from scratch, as much time as both together",
}
SETTINGS = {  # flag: (kind, default on a GPU, default on a CPU, help)
    "model": (None, "convnextv2_pico", "1,2,2/24,48,96", "a name, or blocks/channels of stages"),
    "stem_stride": (COUNT, 1, 2, "1, 2 or 4; 2 costs a quarter of 1"),
    "drop_path": (BELOW_1, 0.1, 0.0, "stochastic depth, not in pre-training"),
    "patch_size": (COUNT, 8, 8, "pixels, side of a mask patch; a multiple of the total stride"),
    "mask_ratio": (CHANCE, 0.6, 0.6, "fraction of patches removed"),
    "norm_pix_loss": (SWITCH, 1, 1, "1: normalize each target patch; 0: plain pixels"),
    "decoder_embed_dim": (COUNT, 256, 64, "channels of the decoder's one block"),
    "pretrain_images": (COUNT, 20000, 20000, "to pre-train on, as many of each class"),
    "train_images": (COUNT, 20000, 20000, "with labels, to train on, as many of each class"),
    "val_images": (COUNT, 10000, 5000, "to evaluate on, as many of each class"),
    "pretrain_epochs": (COUNT, 80, 5, "of pre-training"),
    "epochs": (COUNT, 40, 3, "of fine-tuning, and from scratch"),
    "pretrain_batch_size": (COUNT, 256, 32, "images in an update of pre-training"),
    "batch_size": (COUNT, 256, 64, "images in an update of fine-tuning and from scratch"),
    "pretrain_lr": (AMOUNT, 1.5e-3, 2e-3, "peak rate of pre-training"),
    "finetune_lr": (AMOUNT, 2e-3, 2e-3, "peak rate of fine-tuning"),
    "scratch_lr": (AMOUNT, 2e-3, 2e-3, "peak rate from scratch"),
    "layer_decay": (FRACTION, 0.9, 0.9, "rate of a layer / of the next, in fine-tuning; 1: off"),
    "warmup_epochs": (AMOUNT, 5, 2, "of every training, at most a fifth of it"),
    "weight_decay": (AMOUNT, 0.05, 0.05, "for matrices, of every training"),
    "smoothing": (BELOW_1, 0.1, 0.1, "label smoothing"),
    "mixup": (AMOUNT, 0.0, 0.0, "alpha of mixup; 0: off"),
    "cutmix": (AMOUNT, 1.0, 0.0, "alpha of cutmix; 0: off"),
    "mixup_prob": (CHANCE, 0.5, 0.5, "chance that a batch is mixed"),
    "cutout": (FROM_0, 8, 0, "pixels, side of a gray square, not in pre-training; 0: none"),
    "pad": (FROM_0, 4, 4, "pixels that a random crop may take from beyond the border"),
    "eval_every": (COUNT, 10, 10, "epochs between points of the learning curve"),
}


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    near = ROOT.parent / "shared/data/cifar10_jpeg.zip"
    parser.add_argument("--data", type=Path, default=near, help=f"the zip [{near}]")


def argument(kind: dict | None) -> dict:
    """Return argparse's arguments of a setting."""
    return {**kind, "metavar": "N"} if kind else {}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAGS]", description=HELP, allow_abbrev=False)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    add_data_flag(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, CPU), cpu, cuda")
    parser.add_argument("--amp", choices=["none", "bf16"], help="[bf16 on CUDA, else none]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument(
        "--cuda_graphs", action="store_true", help="as main_pretrain.py --cuda_graphs"
    )
    parser.add_argument("--results", type=Path, help="file of finished runs, to resume from")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    longer = {**FROM_0, "metavar": "N", "help": "instead of the rule for `longer`; 0: leave it out"}
    parser.add_argument("--longer_epochs", **longer)
    for flag, (kind, large, small, text) in SETTINGS.items():
        text = f"{text} [GPU {large}, CPU {small}]"
        parser.add_argument(f"--{flag}", help=text, **argument(kind))
    parser.set_defaults(cutmix_minmax=None, mixup_switch_prob=0.5, mixup_mode="batch")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

from benchmarks.cifar_runs import equal_epochs, load, run
from benchmarks.step import machine, read
from errors import UserError
from parallel import process_group
from training.stepper import choose_amp


def fill_in(args: argparse.Namespace) -> None:
    """Set defaults that depend on the device, and check that settings fit together."""
    args.device = process_group.find_device(args.device)
    args.amp = choose_amp(args.amp, None, args.device)
    for flag, (_, *defaults, _) in SETTINGS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[args.device.type == "cpu"])
    for size, flag in ((args.batch_size, "train"), (args.pretrain_batch_size, "pretrain")):
        if size > (images := getattr(args, f"{flag}_images")):
            raise UserError(f"a batch of {size}, but --{flag}_images {images}; lower it")
    for path in filter(None, (args.results, args.output)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: mixup mixes pairs; make it even")


def finished(path: Path | None, settings: str) -> dict[tuple[str, int], dict]:
    """Return (run, seed) -> row of --results; UserError if rows have other settings."""
    try:
        rows = [json.loads(line) for line in read(path).splitlines()] if path else []
        other = next((row["settings"] for row in rows if row["settings"] != settings), "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--results {path}: not of this program ({error}); name another") from error
    if other:
        raise UserError(f"--results {path}: of other settings, {other}; name another file")
    return {(row["run"], row["seed"]): row for row in rows}


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """Return the rows of RUNS without `longer` for --longer_epochs 0."""
    return {name: RUNS[name] for name in RUNS if name != "longer" or args.longer_epochs != 0}


def mean_and_each(values: list[float], form: str) -> str:
    """[1, 2] and `.1f` -> `**1.5** | 1.0, 2.0`"""
    return f"**{statistics.mean(values):{form}}** | {', '.join(f'{v:{form}}' for v in values)}"


def report(rows: dict[tuple[str, int], dict], args: argparse.Namespace, settings: str) -> str:
    """Markdown: settings, machine, a row for each of RUNS, and what pre-training is ahead by."""
    table, ahead, accuracy = [], [], {}
    for name, title in chosen(args).items():
        own = [rows[name, seed] for seed in args.seeds]
        accuracy[name] = [row["acc1"] for row in own]
        gaps = [a - b for a, b in zip(accuracy["pretrained"], accuracy[name], strict=True)]
        ahead += [f"| {title} | {mean_and_each(gaps, '+.2f')} |"]
        phases = [[row[key] for row in own] for key in ("pretraining", "training")]
        columns = [title, " + ".join(str(len(phase[0])) for phase in phases)]
        columns += [mean_and_each(accuracy[name], ".2f")]
        columns += [f"{statistics.mean(map(sum, phase)):.1f}" for phase in phases]
        columns += [mean_and_each([row["seconds"] for row in own], ".1f")]
        table += [f"| {' | '.join(columns)} |"]
    first, rates = rows["pretrained", args.seeds[0]], []
    sizes = (args.pretrain_images, args.pretrain_batch_size), (args.train_images, args.batch_size)
    for key, (images, size) in zip(("pretraining", "training"), sizes, strict=True):
        images = images // size * size  # incomplete batches are dropped
        rates.append(f"{images / statistics.median(first[key]):.0f}")
    lines = [
        f"### CIFAR-10, {args.pretrain_images} images, {args.train_images} of them with labels\n",
        f"`{settings} --seeds {' '.join(map(str, args.seeds))}`",
        *dict.fromkeys(row["machine"] for row in rows.values()),
        f"Median epoch: {rates[0]} img/s in pre-training, {rates[1]} in fine-tuning. Times are"
        " without reading the zip.",
        "\n| | epochs | top-1 % | each seed | pre-training s | training s | whole run s | each |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "\n| pre-trained is ahead of | points | each seed |\n|---|---|---|",
        *ahead[1:],
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    fill_in(args)
    named = {flag: getattr(args, flag) for flag in ("device", "amp", "longer_epochs", *SETTINGS)}
    settings = " ".join(f"--{flag} {value}" for flag, value in named.items() if value is not None)
    settings += " --compile" * args.compile + " --cuda_graphs" * args.cuda_graphs
    rows = finished(args.results, settings)
    data = load(args.data, {"train": args.train_images, "val": args.val_images})
    data["pretrain"] = load(args.data, {"train": args.pretrain_images})["train"]
    for seed, name in itertools.product(args.seeds, chosen(args)):
        if (name, seed) in rows:
            continue
        epochs = args.epochs
        if name == "longer":
            known = [len(row["training"]) for row in rows.values() if row["run"] == name]
            pair = rows["pretrained", seed]["pretraining"], rows["scratch", seed]["training"]
            epochs = args.longer_epochs or (known or [equal_epochs(*pair, epochs)])[0]
        row = run(name, seed, epochs, data, args)
        rows[name, seed] = row | {"settings": settings, "machine": machine(args.device)}
        if args.results:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[name, seed]) + "\n")
    print(text := report(rows, args, settings))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    process_group.launch(main, get_args_parser().parse_args())
