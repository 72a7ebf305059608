# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Memory of a training step on 1 to 64 GPUs, on paper, and the paper checked on this CPU.

python benchmarks/memory.py --model convnextv2_huge
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
STEPS = {  # name -> kind, pixels, images of a GPU in the recipes of Huge
    "pre-training, 224 px": ("pretrain", 224, 64),
    "fine-tuning, 224 px": ("finetune", 224, 32),
    "fine-tuning, 384 px": ("finetune", 384, 16),
    "fine-tuning, 512 px": ("finetune", 512, 8),
}
CHECKED_IMAGES = 3  # of a process
GB = 1e9


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [f"convnextv2_{size}" for size in SIZES]
    parser.add_argument("--model", default=models[-1], choices=models)
    parser.add_argument("--sizes", nargs="*", default=SIZES[:-1], choices=SIZES, help="a line each")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--cards", type=float, nargs="+", default=[80, 141], help="GB of a GPU")
    parser.add_argument("--no_check", action="store_true", help="only the paper")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and typing errors answer before torch is loaded

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.memory_counts import (
    MASK_RATIO,
    SHARDS,
    Step,
    Task,
    count_step,
    images_that_fit,
    measure,
    per_gpu,
)
from optim_factory import create_optimizer
from parallel.sharding import Parallelism

ASSUMPTIONS = f"""No GPU was there: this is paper. Assumed is

- bf16 autocast; in float32 weights, gradients, AdamW's two moments and in fine-tuning the average.
- Gradients are DistributedDataParallel's buckets too, by `gradient_as_bucket_view`.
- What forward saves for backward, and what is in use at the peak, is counted: the step runs on
  tensors without memory, in torch's forms of all operations. Triton's, which need no canvas for
  hidden patches, should take less.
- zero1 gives whole tensors to GPUs, fsdp some rows of each; the fullest GPU is shown. Gathered is
  what fsdp has of others for a moment.
- 1 GB is 10^9 bytes. What CUDA, NCCL and fragmentation take comes on top; a card of 80 GB has 7%
  more than its name says.
- Mask ratio {MASK_RATIO}, 1000 classes; images are those of a micro-batch on each GPU."""

# --- the paper -------------------------------------------------------------------------------


Plan = dict[tuple[str, bool], Step]  # name of the step, with checkpointing


def plan(model: str, steps: Iterable[str], fsdp: bool = True) -> Plan:
    """What the formula needs, for steps of a model without and with checkpointing."""
    tasks = {
        (name, again): Task(model, *STEPS[name][:2], checkpointing=again, half=True)
        for name, again in product(steps, (False, True))
    }
    return {key: count_step(task, fsdp=fsdp) for key, task in tasks.items()}


def ways(gpus: list[int]) -> Iterator[tuple[str, int]]:
    """(shard, GPUs): one GPU has nobody to share with, and ddp shares nothing."""
    yield "ddp", max(gpus)
    for shard, count in product(SHARDS[1:], gpus):
        if count > 1:
            yield shard, count


def called(shard: str, gpus: int) -> str:
    return "ddp, any number" if shard == "ddp" else f"{shard}, {gpus} GPUs"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def resident_table(steps: Plan, gpus: list[int]) -> str:
    """GB that do not depend on images."""
    parts = ("weights", "gradients", "moments", "average", "gathered")
    rows = []
    for name in list(STEPS)[:2]:
        for shard, count in ways(gpus):
            held = per_gpu(steps[name, True], shard, count, images=0)
            values = [held[part] for part in parts]
            cells = [f"{value / GB:.2f}" for value in [*values, sum(values)]]
            rows.append([name.partition(",")[0], called(shard, count), *cells])
    return table(["GB of a GPU", "", *parts, "sum"], rows)


def image_table(steps: Plan) -> str:
    """MB of forward and backward: of an image, and whatever their number."""
    rows = []
    for (name, again), step in steps.items():
        lines = step.whole.saved, step.whole.peak[-1]  # of many images
        values = [value for line in lines for value in (line.each, line.fixed)]
        rows.append([name, "yes" if again else "no", *(f"{value / 1e6:.1f}" for value in values)])
    head = ["MB", "checkpointing", "saved: an image", "once", "at the peak: an image", "once"]
    return table(head, rows)


def total_table(steps: Plan, gpus: list[int]) -> str:
    """GB in all with the images of the recipes."""
    rows = []
    for (name, again), step in steps.items():
        images = STEPS[name][2]
        sums = [sum(per_gpu(step, *way, images).values()) for way in ways(gpus)]
        cells = [f"{value / GB:.1f}" for value in sums]
        rows.append([f"{name}, {images} images", "yes" if again else "no", *cells])
    return table(["GB of a GPU", "checkpointing", *(called(*way) for way in ways(gpus))], rows)


def fit_table(steps: Plan, gpus: list[int], cards: list[float]) -> str:
    """The most images."""
    rows = []
    for (name, again), step in steps.items():
        cells = [
            " / ".join(str(images_that_fit(step, *way, card * GB)) for card in cards)
            for way in ways(gpus)
        ]
        rows.append([name, "yes" if again else "no", *cells])
    names = " / ".join(f"{card:g}" for card in cards)
    head = [f"images that fit in {names} GB", "checkpointing"]
    return table([*head, *(called(*way) for way in ways(gpus))], rows)


def size_table(sizes: list[str], card: float) -> str:
    """A line for each size."""
    rows = []
    for size in sizes:
        steps = plan(f"convnextv2_{size}", [*STEPS][:2], fsdp=False)
        resident = sum(per_gpu(steps["fine-tuning, 224 px", True], "ddp", 1, 0).values())
        fits = [str(images_that_fit(step, "ddp", 1, card * GB)) for step in steps.values()]
        each = [f"{step.whole.peak[-1].each / 1e6:.1f}" for step in steps.values()]
        pairs = [f"{e} MB, {n}" for e, n in zip(each, fits, strict=True)]
        rows.append([size, f"{resident / GB:.2f}", *pairs])
    head = ["ddp", "GB without images", "pre-training", "checkpointing", "fine-tuning"]
    return table([*head, "checkpointing"], rows)


def paper(args: argparse.Namespace) -> str:
    """All tables."""
    steps = plan(args.model, STEPS)
    card = args.cards[0]
    parts = [
        f"### Memory on paper, {args.model}",
        ASSUMPTIONS,
        "Whatever the images:",
        resident_table(steps, args.gpus),
        "Of the images, with ddp:",
        image_table(steps),
        "With the images of the recipes:",
        total_table(steps, args.gpus),
        "Most images of a micro-batch on a GPU:",
        fit_table(steps, args.gpus, args.cards),
    ]
    if args.sizes:
        text = f"Other sizes at 224 px: memory an image takes at the peak, images in {card:g} GB:"
        parts += [text, size_table(args.sizes, card)]
    return "\n\n".join(parts)


# --- the check -------------------------------------------------------------------------------

PARTS = ("weights", "gradients", "moments", "saved")
HAS_FSDP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)  # on a CPU
WAYS = (("ddp", 1), *((shard, 2) for shard in SHARDS if HAS_FSDP or shard != "fsdp"))


def checked() -> list[Task]:
    """What is measured."""
    kinds = product(("pretrain", "finetune"), (False, True), (False, True))
    return [Task("convnextv2_atto", kind, 64, again, half) for kind, again, half in kinds]


def measure_all(rank: int, processes: int, tasks: list[Task], folder: str) -> None:
    """In each process: bytes of every task, whatever is shared, into a file."""
    torch.set_num_threads(1)
    device, found = torch.device("cpu"), []
    meet = dist.FileStore(f"{folder}/meet", processes)
    dist.init_process_group("gloo", store=meet, rank=rank, world_size=processes)
    for task, (shard, count) in product(tasks, WAYS):
        if count != processes:
            continue
        model = task.build()
        parallelism = Parallelism(shard, device, "bf16" if task.half else "none")
        parallelism.shard(model)
        optimizer = create_optimizer(model, lr=1e-3, shard=shard)
        forward = task.forward(parallelism.wrap(model), CHECKED_IMAGES)
        found.append(measure(model, optimizer, forward))
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measured(processes: int, tasks: list[Task]) -> list[dict[str, int]]:
    """For each task and way what the process holds that has the most of it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_all, (processes, tasks, folder), nprocs=processes)
        texts = [path.read_text(encoding="utf-8") for path in Path(folder).glob("*.json")]
    each = zip(*map(json.loads, texts), strict=True)
    return [{part: max(rank[part] for rank in ranks) for part in PARTS} for ranks in each]


def check(tasks: list[Task]) -> tuple[list[list[str]], float]:
    """Rows of measured bytes with the error of those on paper, and the largest error."""
    found = {count: iter(measured(count, tasks)) for count in (1, 2)}
    rows, worst = [], 0.0
    for task in tasks:
        step = count_step(task, cuda=False)
        name = f"{task.kind}, {'bf16' if task.half else 'float32'}"
        for shard, count in WAYS:
            real, paper = next(found[count]), per_gpu(step, shard, count, CHECKED_IMAGES)
            errors = [paper[part] / real[part] - 1 for part in PARTS]
            worst = max(worst, *map(abs, errors))
            cells = [
                f"{real[part] / 1e6:.2f} ({round(error, 4) + 0.0:+.2%})"  # no -0.00%
                for part, error in zip(PARTS, errors, strict=True)
            ]
            rows.append([name, "yes" if task.checkpointing else "no", shard, str(count), *cells])
    return rows, worst


def check_report() -> str:
    """The check as text."""
    rows, worst = check(tasks := checked())
    sample = f"{tasks[0].model}, {tasks[0].size} px, {CHECKED_IMAGES} images a process"
    text = f"""{sample}, gloo on this CPU. Bytes of
tensors that are alive between backward and update, and of those saved for backward, on the process
that has the most. In brackets how far the formula is off, {worst:.2%} at most. The peak is checked
by tests on one process; what fsdp gathers is not measured."""
    head = ["MB", "checkpointing", "shard", "processes", *PARTS]
    return "\n\n".join(["### Memory on paper and in a process", text, table(head, rows)])


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    text = paper(args)
    if not args.no_check:
        text += "\n\n" + check_report()
    print(text)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
