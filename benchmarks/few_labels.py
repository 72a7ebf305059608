# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Does pre-training pay? FCMAE on all images of CIFAR-10, then fine-tuning on few of the labels.

python benchmarks/few_labels.py --folder runs/few_labels --output benchmarks/RESULTS.md
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cifar import SETTINGS, add_data_flag, argument, mean_and_each
from config.kinds import COUNT, POSITIVE

HELP = """Compare three ways to train on a few labels, all with the same augmentation:
  pretrained  FCMAE on all images without labels, then --epochs of fine-tuning
  scratch     the same --epochs from random weights
  longer      from random weights, with the compute of pre-training and fine-tuning together
Learning rates are the best of --finetune_lrs, --scratch_lrs and --longer_lrs for each number of
labels, with the first seed; without --longer_lrs, `longer` takes the rate of `scratch`. Each run
reports the accuracy of its best epoch. Learning rates and epochs are chosen by --choose_images of
val/, and accuracies are those of the others. The compute of an image of pre-training, relative to
one of training, is measured first, by updates of both in turn.

  python benchmarks/few_labels.py --folder runs/few_labels     # the same command resumes
  python benchmarks/few_labels.py --folder runs/few1000 --labels 1000 --epochs 100 --seeds 0
  python benchmarks/few_labels.py --folder runs/resnet18 --model timm:resnet18 --patch_size 16

Learning curves go to stderr, the tables to stdout and --output."""
RUNS = {
    "pretrained": "FCMAE, then fine-tuning",
    "scratch": "random weights, as many epochs",
    "longer": "random weights, as much compute",
}
OWN = {  # what differs from cifar.py's settings for a CPU
    "model": "1,3/32,96",
    "patch_size": 4,
    "norm_pix_loss": 0,
    "pretrain_epochs": 30,
    "pretrain_batch_size": 64,
    "layer_decay": 0.75,
    "cutmix": 1.0,
    "mixup_prob": 0.8,
    "cutout": 8,
    "val_images": 10000,
}
RATES = {
    "finetune_lrs": [0.002, 0.004, 0.008, 0.016],
    "scratch_lrs": [0.0005, 0.001, 0.002, 0.004],
}
# What a run of this program decides by itself.
DECIDED = ("train_images", "epochs", "finetune_lr", "scratch_lr", "eval_every")
# What the key of a run says, so that a folder may be extended by more of them.
IN_JOBS = ("labels", "epochs", "seeds", "finetune_lrs", "scratch_lrs", "longer_lrs")
EVALUATIONS = 20  # points of a learning curve, among which is the best epoch
PROBES = 5  # of pre-training


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAGS]", description=HELP, allow_abbrev=False)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    add_data_flag(parser)
    many, rates = COUNT | {"nargs": "+"}, POSITIVE | {"nargs": "+"}
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="of finished runs and weights, to resume from")
    add("--labels", default=[250, 1000, 4000], help="numbers of labels [250 1000 4000]", **many)
    add("--epochs", default=[200, 100, 30], help="of each number [200 100 30]", **many)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    for flag, values in RATES.items():
        add(f"--{flag}", default=values, help=f"[{shown(values)}]", **rates)
    add("--longer_lrs", help="[the best of --scratch_lrs]", **rates)
    add("--choose_images", default=2000, help="of --val_images [2000]", **COUNT)
    add("--k", default=20, help="neighbors of the kNN probe [20]", **COUNT)
    add("--jobs", default=2, help="runs at a time, on a thread each [2]", **COUNT)
    add("--amp", choices=["none", "bf16"], default="bf16", help="[bf16]")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--output", type=Path, help="markdown file to append the tables to")
    for flag, (kind, _, small, text) in SETTINGS.items():
        if flag not in DECIDED:
            default = OWN.get(flag, small)
            add(f"--{flag}", default=default, help=f"{text} [{default}]", **argument(kind))
    fixed = {"device": "cpu", "cuda_graphs": False}
    parser.set_defaults(cutmix_minmax=None, mixup_switch_prob=0.5, mixup_mode="batch", **fixed)
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import numpy as np
import torch
from torch import nn

from benchmarks.cifar_runs import Data, InMemory, accuracy, classify, load, pretrain
from benchmarks.step import machine, read
from errors import UserError
from insight import evaluators
from insight.evaluators import Labeled
from insight.features import extract
from parallel import process_group
from utils import write_atomically

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the epochs, in the table of curves
COST_BATCHES, COST_ROUNDS = 20, 5


class Job(NamedTuple):
    """One training. labels: 0 in pre-training."""

    run: str
    labels: int
    seed: int
    lr: float
    epochs: int


COST = Job("cost", 0, 0, 0.0, 0)  # of an image of pre-training / one of training


# --- data -----------------------------------------------------------------------------------------


def pick(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
    return images[chosen], labels[chosen]


def per_class(labels: np.ndarray, count: int, seed: int | None = None) -> np.ndarray:
    """Return places of `count` images, as many of each class: the first ones, or drawn ones."""
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if seed is not None:
        places = [np.random.default_rng([seed, *own[:1]]).permutation(own) for own in places]
    return np.concatenate([own[: count // len(places)] for own in places])


def split(data: Data, args: Namespace, job: Job) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the images of a job: `pretrain`, `train`, `choose` and `test`."""
    train, val = data["train"], data["val"]
    choose = per_class(val[1], args.choose_images)
    few = per_class(train[1], job.labels or len(train[1]), job.seed)
    return {
        "pretrain": train,
        "train": pick(*train, few),
        "choose": pick(*val, choose),
        "test": pick(*val, np.setdiff1d(np.arange(len(val[1])), choose)),
    }


# --- runs -----------------------------------------------------------------------------------------


class BestEpoch:
    """Evaluates a network while it trains, and keeps the weights of its best evaluation."""

    def __init__(self, images: InMemory, args: Namespace) -> None:
        self.images, self.args = images, args
        self.curve: list[float] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        stats = accuracy(self.images, model, self.args)
        if stats["acc1"] > max(self.curve, default=-1.0):
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}
            self.best = len(self.curve)
        self.curve.append(stats["acc1"])
        self.model = model
        return stats

    def load(self) -> nn.Module:
        """Return the network with its best weights."""
        self.model.load_state_dict(self.weights)
        return self.model


class Probes:
    """Nearest neighbors and linear probes of frozen features, on all labels and on few."""

    def __init__(self, images: dict[str, tuple[np.ndarray, ...]], args: Namespace) -> None:
        self.args = args
        self.batches = [InMemory(*images[name], 500, args.device) for name in ("train", "choose")]
        labels = images["train"][1]
        self.few = {count: per_class(labels, count, 0) for count in args.labels}
        self.rows: list[dict[str, float]] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        dtype = torch.bfloat16 if self.args.amp == "bf16" else None
        found = [extract(model, batches, "cpu", dtype) for batches in self.batches]
        train, choose = (Labeled(each.features, each.labels) for each in found)
        scores = {"knn": evaluators.knn(train, choose, k=self.args.k)}
        scores["linear"] = evaluators.linear(train, choose)
        for count, places in self.few.items():
            few = evaluators.take(train, torch.from_numpy(places))
            scores[f"linear_{count}"] = evaluators.linear(few, choose)
        self.rows.append(scores)
        return scores


def weights_path(folder: Path, seed: int) -> Path:
    return folder / f"pretrained-{seed}.pth"


_DATA: Data = {}  # of a process


def start_process(args: Namespace) -> None:
    """Read the images once in each process."""
    torch.set_num_threads(1)
    counts = {"train": args.pretrain_images, "val": args.val_images}
    _DATA.update(load(args.data, counts))


def eval_every(epochs: int, points: int) -> int:
    """Return the epochs between at most `points` evaluations, the last after all epochs."""
    return math.ceil(epochs / points)


def do(job: Job, args: Namespace) -> dict[str, Any]:
    """Train; returns a row of plain values."""
    images = split(_DATA, args, job)
    every = eval_every(job.epochs, EVALUATIONS if job.labels else PROBES)
    args = Namespace(**vars(args) | {"eval_every": every})
    row = job._asdict() | {"machine": machine(args.device)}
    if not job.labels:
        probes = Probes(images, args)
        seconds, weights = pretrain(job.seed, images, args, probes)
        torch.save(weights, weights_path(args.folder, job.seed))
        return row | {"probes": probes.rows, "seconds": sum(seconds)}
    weights = None
    if job.run == "pretrained":
        weights = torch.load(weights_path(args.folder, job.seed), weights_only=True)
    best = BestEpoch(InMemory(*images["choose"], 1000, args.device), args)
    title = f"{job.run} {job.labels} labels seed {job.seed} lr {job.lr}"
    seconds, _ = classify(title, job.seed, job.epochs, images, args, best, weights, job.lr)
    tested = accuracy(InMemory(*images["test"], 1000, args.device), best.load(), args)
    epoch = min((best.best + 1) * every, job.epochs)
    row |= {"acc1": tested["acc1"], "curve": best.curve, "best_epoch": epoch}
    return row | {"seconds": sum(seconds)}


def relative_cost(args: Namespace) -> float:
    """Return the time of an image of pre-training / that of one of training, measured in turns."""
    count = COST_BATCHES * max(args.pretrain_batch_size, args.batch_size)
    images = split(_DATA, args, Job("cost", min(count, args.pretrain_images), 0, 1e-3, 2))
    images["pretrain"] = images["train"]
    args = Namespace(**vars(args) | {"pretrain_epochs": 2, "eval_every": 2})
    count, ratios = len(images["train"][1]), []
    for _ in range(COST_ROUNDS):
        pretraining, _ = pretrain(0, images, args)
        training, _ = classify("cost", 0, 2, images, args, lambda model: {}, None, 1e-3)
        own = pretraining[-1] / trained_images(count, args.pretrain_batch_size)
        ratios.append(own / training[-1] * trained_images(count, args.batch_size))
    return statistics.median(ratios)


def trained_images(count: int, batch_size: int) -> int:
    """Return the images of an epoch, whose incomplete batch is dropped."""
    return count // batch_size * batch_size


def longer_epochs(labels: int, epochs: int, cost: float, args: Namespace) -> int:
    """Return the epochs on `labels` images that cost as much as pre-training and `epochs` of them.

    cost: as `relative_cost`. Rounded up.
    """
    pretraining = trained_images(args.pretrain_images, args.pretrain_batch_size)
    cost *= args.pretrain_epochs * pretraining
    return epochs + math.ceil(cost / trained_images(labels, args.batch_size))


class Runs:
    """The finished runs of a folder, and the processes that do more of them."""

    def __init__(self, args: Namespace, settings: str) -> None:
        self.args, self.settings = args, settings
        self.path, self.asked = args.folder / "runs.jsonl", set[Job]()
        self.rows = {Job(*(row[key] for key in Job._fields)): row for row in self._read()}

    def _read(self) -> list[dict[str, Any]]:
        try:
            text = read(self.path) if self.path.exists() else ""
            rows = [json.loads(line) for line in text.splitlines()]
            other = next((x["settings"] for x in rows if x["settings"] != self.settings), "")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: holds no results of this program ({error}); name another folder"
            ) from error
        if other:
            raise UserError(
                f"--folder {self.args.folder}: of other settings, {other}; name another"
            )
        return rows

    def add(self, job: Job, row: dict[str, Any]) -> None:
        """Store a finished run; a program that is killed meanwhile leaves the file as it was."""
        self.rows[job] = row | {"settings": self.settings}
        lines = [json.dumps(each) + "\n" for each in self.rows.values()]
        write_atomically("".join(lines), self.path)

    @property
    def cost(self) -> float:
        """That of an image of pre-training / one of training, of this folder."""
        return self.rows[COST]["cost"]

    def do_all(self, pool: Executor, jobs: Iterable[Job]) -> None:
        """Do those that are not finished.

        After an error no more are begun; those in progress are finished and stored, and then it is
        raised.
        """
        jobs = list(jobs)
        self.asked.update(jobs)
        waiting = [job for job in jobs if job not in self.rows]
        running: dict[Future, Job] = {}
        errors: list[BaseException] = []
        while running or (waiting and not errors):
            while waiting and not errors and len(running) < self.args.jobs:
                job = waiting.pop(0)
                running[pool.submit(do, job, self.args)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    errors.append(error)
                else:
                    self.add(job, future.result())
        if errors:
            raise errors[0]

    def pretraining(self) -> list[Job]:
        """Return the jobs of pre-training, one for each seed."""
        lr, epochs = self.args.pretrain_lr, self.args.pretrain_epochs
        return [Job("pretraining", 0, seed, lr, epochs) for seed in self.args.seeds]

    def tuning(self, run: str, labels: int) -> list[Job]:
        """Return the jobs that find the best learning rate, with the first seed."""
        rates = {"pretrained": self.args.finetune_lrs, "scratch": self.args.scratch_lrs}
        rates["longer"] = self.args.longer_lrs or []
        epochs, seed = self._epochs(run, labels), self.args.seeds[0]
        return [Job(run, labels, seed, lr, epochs) for lr in rates[run]]

    def _epochs(self, run: str, labels: int) -> int:
        epochs = self.args.epochs[self.args.labels.index(labels)]
        return longer_epochs(labels, epochs, self.cost, self.args) if run == "longer" else epochs

    def of(self, run: str, labels: int) -> list[Job]:
        """Return the jobs of all seeds, with the best learning rate."""
        tuned = self.tuning(run, labels) or self.tuning("scratch", labels)
        best = max(tuned, key=lambda job: max(self.rows[job]["curve"]))
        epochs = self._epochs(run, labels)
        return [Job(run, labels, seed, best.lr, epochs) for seed in self.args.seeds]


def do_all(runs: Runs, args: Namespace) -> None:
    """Pre-train, choose learning rates, then do the other seeds and the longer runs."""
    if COST not in runs.rows:
        start_process(args)
        runs.add(COST, COST._asdict() | {"cost": relative_cost(args)})
    context = get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, start_process, (args,)) as pool:
        scratch = [runs.tuning("scratch", labels) for labels in args.labels]
        runs.do_all(pool, itertools.chain(runs.pretraining(), *scratch))
        tuned = [runs.tuning(r, n) for r in ("longer", "pretrained") for n in args.labels]
        runs.do_all(pool, itertools.chain(*tuned))
        every = itertools.product(reversed(RUNS), args.labels)  # the longest first
        runs.do_all(pool, itertools.chain(*itertools.starmap(runs.of, every)))


# --- tables ---------------------------------------------------------------------------------------


def report(runs: Runs, args: Namespace) -> str:
    """Markdown: settings, accuracies, leads, learning curves, and probes of pre-training."""
    asked = [row for job, row in runs.rows.items() if job in runs.asked]
    each = statistics.mean(runs.rows[job]["seconds"] for job in runs.pretraining())
    total = sum(row["seconds"] for row in asked)
    every = list(itertools.product(args.labels, RUNS))
    shares = [f"{share:.0%}" for share in SHARES]
    probes = [*runs.rows[runs.pretraining()[0]]["probes"][0]]
    lines = [
        f"### Few labels of {args.pretrain_images} images of CIFAR-10, `{args.model}`\n",
        f"`{runs.settings} {settings_of(args, IN_JOBS)}`",
        *dict.fromkeys(row["machine"] for row in asked),
        f"An image of pre-training costs {runs.cost:.2f} of one in training. On a thread each, "
        f"pre-training took {each / 60:.0f} minutes a seed, and all trainings {total / 60:.0f}.",
        *table(
            "labels | training | epochs | learning rate | best epochs | top-1 % | each seed",
            [accuracy_row(runs, labels, run) for labels, run in every],
        ),
        *table(
            "labels | FCMAE is ahead of | points | each seed",
            [lead_row(runs, labels, run) for labels, run in every if run != "pretrained"],
        ),
        "\nTop-1 % on the images that choose the epoch, by the share of the epochs, mean of seeds:",
        *table(
            " | ".join(["labels", "training", *shares]),
            [curve_row(runs, labels, run) for labels, run in every],
        ),
        "\nProbes of frozen features over the epochs of pre-training, top-1 %, mean of seeds:",
        *table(" | ".join(["epoch", *map(describe_probe, probes)]), probe_rows(runs)),
    ]
    return "\n".join(lines)


def accuracy_row(runs: Runs, labels: int, run: str) -> list[Any]:
    own = [runs.rows[job] for job in runs.of(run, labels)]
    before = f"{runs.args.pretrain_epochs} + " if run == "pretrained" else ""
    best = ", ".join(str(row["best_epoch"]) for row in own)
    cells = [labels, RUNS[run], f"{before}{own[0]['epochs']}", own[0]["lr"], best]
    return [*cells, mean_and_each([row["acc1"] for row in own], ".2f")]


def lead_row(runs: Runs, labels: int, run: str) -> list[Any]:
    """Cells of what fine-tuning after pre-training is ahead by, seed by seed."""
    pairs = zip(runs.of("pretrained", labels), runs.of(run, labels), strict=True)
    leads = [runs.rows[job]["acc1"] - runs.rows[other]["acc1"] for job, other in pairs]
    return [labels, RUNS[run], mean_and_each(leads, "+.2f")]


def curve_row(runs: Runs, labels: int, run: str) -> list[Any]:
    curve = np.mean([runs.rows[job]["curve"] for job in runs.of(run, labels)], 0)
    places = [max(math.ceil(share * len(curve)), 1) - 1 for share in SHARES]
    return [labels, RUNS[run], *(f"{curve[place]:.1f}" for place in places)]


def probe_rows(runs: Runs) -> list[list[Any]]:
    epochs, rows = runs.args.pretrain_epochs, []
    seeds = [runs.rows[job]["probes"] for job in runs.pretraining()]
    for number, probes in enumerate(zip(*seeds, strict=True), 1):
        means = [statistics.mean(probe[name] for probe in probes) for name in probes[0]]
        epoch = min(number * eval_every(epochs, PROBES), epochs)
        rows.append([epoch, *(f"{mean:.1f}" for mean in means)])
    return rows


def describe_probe(name: str) -> str:
    """`linear_1000` -> `linear, 1000 labels`"""
    kind, _, labels = name.partition("_")
    return f"{kind.replace('knn', 'kNN')}, {labels or 'all'} labels"


def table(head: str, rows: list[list[Any]]) -> Iterator[str]:
    """Yield the lines of a markdown table."""
    yield f"\n| {head} |"
    yield "|---" * (head.count("|") + 1) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def check(args: Namespace) -> None:
    """Raise UserError for settings that do not fit together, before anything is read."""
    if len(args.epochs) != len(args.labels):
        counts = [shown(values) for values in (args.epochs, args.labels)]
        raise UserError("--epochs {}, but --labels {}; give as many of both".format(*counts))
    limits = (  # what must not be above what
        ("labels", max(args.labels), "pretrain_images", args.pretrain_images),
        ("pretrain_batch_size", args.pretrain_batch_size, "pretrain_images", args.pretrain_images),
        ("k", args.k, "pretrain_images", args.pretrain_images),
        ("batch_size", args.batch_size, "labels", min(args.labels)),
        ("choose_images", args.choose_images, "val_images", args.val_images - 1),
    )
    for flag, value, other, limit in limits:
        if value > limit:
            own = shown(getattr(args, other))
            raise UserError(f"--{flag} {value}: too many for --{other} {own}; lower it")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: mixup mixes pairs; make it even")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"{args.output}: there is no folder {args.output.parent}; make it first")


def main(args: Namespace) -> None:
    check(args)
    args.device = torch.device("cpu")
    apart = ("folder", "data", "output", "jobs", "device", "compile", "cuda_graphs", *IN_JOBS)
    settings = settings_of(args, [name for name in vars(args) if name not in apart])
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(args, settings + " --compile" * args.compile)
    do_all(runs, args)
    print(text := report(runs, args))
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


def settings_of(args: Namespace, names: Iterable[str]) -> str:
    """Return flags as on a command line."""
    return " ".join(f"--{name} {shown(getattr(args, name))}" for name in names)


if __name__ == "__main__":
    process_group.launch(main, get_args_parser().parse_args())
