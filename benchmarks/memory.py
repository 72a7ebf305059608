# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Estimate the memory of a training step on 1 to 64 GPUs; check the estimate on this CPU.

python benchmarks/memory.py --model convnextv2_huge
"""

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
    parser.add_argument(
        "--sizes", nargs="*", default=SIZES[:-1], choices=SIZES, help="also estimate these sizes"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--cards", type=float, nargs="+", default=[80, 141], help="memory of a GPU in GB"
    )
    parser.add_argument("--no_check", action="store_true", help="estimate only, measure nothing")
    parser.add_argument("--output", type=Path, help="markdown file to append the tables to")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

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

ASSUMPTIONS = f"""These figures are estimates; no GPU was available. Assumptions:

- bf16 autocast. Weights, gradients, AdamW's state and, in fine-tuning, EMA weights are float32.
- Gradients share their memory with DistributedDataParallel's buckets (`gradient_as_bucket_view`).
- Tensors that forward saves for backward, and the peak, are counted by running the step on fake
  tensors with PyTorch's own kernels. The Triton kernels need no zeros for removed patches and
  should take less.
- zero1 shards whole tensors, fsdp the rows of each tensor. Figures are those of the GPU that holds
  the most. "gathered" is what fsdp temporarily holds of the other GPUs.
- 1 GB is 10^9 bytes. The memory of CUDA, NCCL and fragmentation is not included. A card of "80 GB"
  has 7% more.
- Mask ratio {MASK_RATIO}, 1000 classes; "images" is the micro-batch of one GPU."""

# --- estimate --------------------------------------------------------------------------------


Plan = dict[tuple[str, bool], Step]  # (name of the step, gradient checkpointing) -> step


def plan(model: str, steps: Iterable[str], fsdp: bool = True) -> Plan:
    """Count the steps of a model without and with gradient checkpointing."""
    tasks = {
        (name, again): Task(model, *STEPS[name][:2], checkpointing=again, half=True)
        for name, again in product(steps, (False, True))
    }
    return {key: count_step(task, fsdp=fsdp) for key, task in tasks.items()}


def ways(gpus: list[int]) -> Iterator[tuple[str, int]]:
    """Yield (shard, GPUs); sharding has no effect on one GPU, and ddp does not shard."""
    yield "ddp", max(gpus)
    for shard, count in product(SHARDS[1:], gpus):
        if count > 1:
            yield shard, count


def label(shard: str, gpus: int) -> str:
    return "ddp, any number" if shard == "ddp" else f"{shard}, {gpus} GPUs"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def resident_table(steps: Plan, gpus: list[int]) -> str:
    """Table of the memory that does not depend on the number of images."""
    parts = ("weights", "gradients", "optimizer", "EMA", "gathered")
    rows = []
    for name in list(STEPS)[:2]:
        for shard, count in ways(gpus):
            held = per_gpu(steps[name, True], shard, count, images=0)
            values = [held[part] for part in parts]
            cells = [f"{value / GB:.2f}" for value in [*values, sum(values)]]
            rows.append([name.partition(",")[0], label(shard, count), *cells])
    return table(["GB per GPU", "", *parts, "sum"], rows)


def image_table(steps: Plan) -> str:
    """Table of the activation memory in MB: per image, and independent of their number."""
    rows = []
    for (name, again), step in steps.items():
        lines = step.full.saved, step.full.peak[-1]  # of many images
        values = [value for line in lines for value in (line.each, line.fixed)]
        rows.append([name, "yes" if again else "no", *(f"{value / 1e6:.1f}" for value in values)])
    head = ["MB", "checkpointing", "saved: per image", "constant"]
    head += ["peak: per image", "constant"]
    return table(head, rows)


def total_table(steps: Plan, gpus: list[int]) -> str:
    """Table of the total memory with the batch sizes of the recipes."""
    rows = []
    for (name, again), step in steps.items():
        images = STEPS[name][2]
        sums = [sum(per_gpu(step, *way, images).values()) for way in ways(gpus)]
        cells = [f"{value / GB:.1f}" for value in sums]
        rows.append([f"{name}, {images} images", "yes" if again else "no", *cells])
    return table(["GB per GPU", "checkpointing", *(label(*way) for way in ways(gpus))], rows)


def fit_table(steps: Plan, gpus: list[int], cards: list[float]) -> str:
    """Table of the largest micro-batches that fit."""
    rows = []
    for (name, again), step in steps.items():
        cells = [
            " / ".join(str(images_that_fit(step, *way, card * GB)) for card in cards)
            for way in ways(gpus)
        ]
        rows.append([name, "yes" if again else "no", *cells])
    names = " / ".join(f"{card:g}" for card in cards)
    head = [f"images that fit in {names} GB", "checkpointing"]
    return table([*head, *(label(*way) for way in ways(gpus))], rows)


def size_table(sizes: list[str], card: float) -> str:
    """Table with one row for each model size, for ddp."""
    rows = []
    for size in sizes:
        steps = plan(f"convnextv2_{size}", [*STEPS][:2], fsdp=False)
        resident = sum(per_gpu(steps["fine-tuning, 224 px", True], "ddp", 1, 0).values())
        fits = [str(images_that_fit(step, "ddp", 1, card * GB)) for step in steps.values()]
        each = [f"{step.full.peak[-1].each / 1e6:.1f}" for step in steps.values()]
        pairs = [f"{e} MB, {n}" for e, n in zip(each, fits, strict=True)]
        rows.append([size, f"{resident / GB:.2f}", *pairs])
    head = ["ddp", "GB without activations", "pre-training", "checkpointing", "fine-tuning"]
    return table([*head, "checkpointing"], rows)


def estimates(args: argparse.Namespace) -> str:
    """Return all estimates as Markdown."""
    steps = plan(args.model, STEPS)
    card = args.cards[0]
    parts = [
        f"### Estimated memory, {args.model}",
        ASSUMPTIONS,
        "Independent of the number of images:",
        resident_table(steps, args.gpus),
        "Activations, with ddp:",
        image_table(steps),
        "Total with the batch sizes of the recipes:",
        total_table(steps, args.gpus),
        "Largest micro-batch of one GPU:",
        fit_table(steps, args.gpus, args.cards),
    ]
    if args.sizes:
        text = f"Other sizes at 224 px: peak memory per image, and images that fit in {card:g} GB:"
        parts += [text, size_table(args.sizes, card)]
    return "\n\n".join(parts)


# --- check -----------------------------------------------------------------------------------

PARTS = ("weights", "gradients", "optimizer", "saved")
HAS_FSDP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)  # FSDP2 on a CPU
WAYS = (("ddp", 1), *((shard, 2) for shard in SHARDS if HAS_FSDP or shard != "fsdp"))


def checked() -> list[Task]:
    """Return the tasks to measure."""
    kinds = product(("pretrain", "finetune"), (False, True), (False, True))
    return [Task("convnextv2_atto", kind, 64, again, half) for kind, again, half in kinds]


def measure_all(rank: int, processes: int, tasks: list[Task], folder: str) -> None:
    """Measure the bytes of every task in each process, and write them to a file."""
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
    """Return the bytes of each task and sharding on the process that holds the most."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_all, (processes, tasks, folder), nprocs=processes)
        texts = [path.read_text(encoding="utf-8") for path in Path(folder).glob("*.json")]
    each = zip(*map(json.loads, texts), strict=True)
    return [{part: max(rank[part] for rank in ranks) for part in PARTS} for ranks in each]


def check(tasks: list[Task]) -> tuple[list[list[str]], float]:
    """Return rows of measured bytes with the error of the estimate, and the largest error."""
    found = {count: iter(measured(count, tasks)) for count in (1, 2)}
    rows, worst = [], 0.0
    for task in tasks:
        step = count_step(task, cuda=False)
        name = f"{task.kind}, {'bf16' if task.half else 'float32'}"
        for shard, count in WAYS:
            real, estimate = next(found[count]), per_gpu(step, shard, count, CHECKED_IMAGES)
            errors = [estimate[part] / real[part] - 1 for part in PARTS]
            worst = max(worst, *map(abs, errors))
            cells = [
                f"{real[part] / 1e6:.2f} ({round(error, 4) + 0.0:+.2%})"  # no -0.00%
                for part, error in zip(PARTS, errors, strict=True)
            ]
            rows.append([name, "yes" if task.checkpointing else "no", shard, str(count), *cells])
    return rows, worst


def check_report() -> str:
    """Return the check as Markdown."""
    rows, worst = check(tasks := checked())
    sample = f"{tasks[0].model}, {tasks[0].size} px, {CHECKED_IMAGES} images per process"
    text = f"""{sample}, gloo on this CPU. Bytes of
the tensors alive between backward and optimizer step, and of those saved for backward, on the
process that holds the most. In brackets: the error of the estimate, at most {worst:.2%}. Tests
check the peak on one process; the memory that fsdp gathers is not measured."""
    head = ["MB", "checkpointing", "shard", "processes", *PARTS]
    return "\n\n".join(["### Estimated and measured memory", text, table(head, rows)])


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    text = estimates(args)
    if not args.no_check:
        text += "\n\n" + check_report()
    print(text)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


if __name__ == "__main__":
    main()
