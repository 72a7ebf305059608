# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Model the time of a step on many processes: computation, and an all-reduce of the gradients.

PYTHONPATH=. python -c "from benchmarks.scaling_model import Link; print(Link(1e-5, 4e10))"

scaling_steps fits these formulas to processes of this machine; with the hardware figures of the
flags they give tables for GPUs that were not measured.
"""

import argparse
import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import nn

from benchmarks.curves import gmac, shape_of
from benchmarks.gpu_parts import table
from models import create_model
from models.convnextv2 import SIZES, Block
from models.fcmae import visible_patches

CLASSES = 1000
BACKWARD = 2 / 3  # of a step's multiplications: two matrix products for each one of forward
FIRST, OTHERS = 2**20, 25 * 2**20  # bytes of DistributedDataParallel's buckets
UPDATE = 32  # bytes moved: AdamW reads p, g, m, v and writes p, m, v; the norm reads g
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
RECIPES = {  # name, global batch; arXiv 2301.00808, appendix A
    "pretrain": ("Pre-training", 4096),
    "finetune": ("Fine-tuning", 1024),
}
ENOUGH = 0.9  # of a GPU's full throughput
MOST = 2**20  # upper bound of the search for images per GPU


@dataclass(frozen=True)
class Link:
    """A connection between members of an all-reduce.

    latency: seconds a step of the ring. bandwidth: bytes a second that a member sends. tree: steps
    grow with the logarithm of the members; double binary trees move as many bytes as a ring.
    cores: more members than that take turns.
    """

    latency: float
    bandwidth: float
    tree: bool = False
    cores: float = math.inf

    def seconds(self, size: float, members: int, messages: int = 1) -> float:
        """Return the seconds of an all-reduce of `size` bytes in `messages`, one after the other.

        A ring: n - 1 steps of reduce-scatter, n - 1 of all-gather, each of size / n bytes. Source:
        Thakur, Rabenseifner, Gropp 2005, sections 4.4 and 4.5.
        """
        waits = messages * steps(members, self.tree) * self.latency
        turns = max(1.0, members / self.cores)
        return turns * (waits + share(members) * size / self.bandwidth)


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs: a ring in each node, and a link through the nodes for each GPU's part.

    Reduce-scatter and all-gather within a node together cost one all-reduce there; between them
    each GPU exchanges its own part with its peers in other nodes through its own adapter.
    """

    inside: Link
    between: Link
    per_node: int

    def seconds(self, size: float, members: int, messages: int = 1) -> float:
        """Return the seconds of an all-reduce over `members` GPUs that fill their nodes."""
        local = min(members, self.per_node)
        nodes = math.ceil(members / self.per_node)
        within = self.inside.seconds(size, local, messages)
        return within + self.between.seconds(size / local, nodes, messages)


def steps(members: int, tree: bool = False) -> int:
    """Return the number of sequential messages of an all-reduce."""
    return 2 * (math.ceil(math.log2(members)) if tree else members - 1)


def share(members: int) -> float:
    """Return the bytes that a member of a ring sends per byte of an all-reduce."""
    return 2 * (members - 1) / members


def buckets(size: float) -> int:
    """Estimate the number of buckets in which DistributedDataParallel sends `size` bytes.

    A bucket holds whole parameters, and a parameter larger than a bucket has its own.
    """
    return 1 + math.ceil(max(0.0, size - FIRST) / OTHERS)


@dataclass(frozen=True)
class Work:
    """Seconds of a step of a single process.

    image: forward and backward of one image. fixed: independent of the images, such as the
    optimizer. floor: least time of forward and backward, for launching kernels.
    """

    image: float
    fixed: float
    floor: float = 0.0

    def passes(self, images: float) -> float:
        """Return the seconds of forward and backward."""
        return max(self.floor, images * self.image)

    def seconds(self, images: float) -> float:
        """Return the seconds of a full step."""
        return self.passes(images) + self.fixed


@dataclass(frozen=True)
class Training:
    """A model's steps on several processes.

    numbers: size of the gradient. gradient_bytes: of each number sent. hidden: fraction of the
    communication that overlaps with backward, if that lasts long enough. slowdown: number of
    processes -> factor on the computing time, since they share cores and memory; default 1.
    """

    work: Work
    network: Link | Cluster
    numbers: int
    gradient_bytes: int = 4
    hidden: float = 0.0
    slowdown: Mapping[int, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the gradients that are sent."""
        return self.gradient_bytes * self.numbers

    @property
    def messages(self) -> int:
        """Number of buckets; they are filled in float32, also if the gradients are sent in bf16."""
        return buckets(4 * self.numbers)

    def exchange(self, members: int) -> float:
        """Return the seconds of the gradients' all-reduce alone."""
        return self.network.seconds(self.size, members, self.messages)

    def seconds(self, members: int, images: float) -> float:
        """Return the seconds of a step of `images` on each of the members."""
        slow, exchange = self.slowdown.get(members, 1.0), self.exchange(members)
        backward = BACKWARD * slow * self.work.passes(images)
        longer = max((1 - self.hidden) * exchange, exchange - backward)
        return slow * self.work.seconds(images) + longer

    def weak(self, members: int, images: float) -> float:
        """Return the efficiency compared with independent processes of as many images."""
        return self.work.seconds(images) / self.seconds(members, images)

    def strong(self, members: int, total: float) -> float:
        """Return the efficiency compared with one process that takes the full batch."""
        return self.work.seconds(total) / (members * self.seconds(members, total / members))

    def fewest(self, members: int) -> int:
        """Return the fewest images per GPU for ENOUGH of the full throughput of a single GPU."""
        return bisect.bisect_left(
            range(MOST), ENOUGH, key=lambda n: n * self.work.image / self.seconds(members, n)
        )


# --- fits ---------------------------------------------------------------------------------------


def fit_two(
    a: Sequence[float], b: Sequence[float], seconds: Sequence[float]
) -> tuple[float, float]:
    """Fit x, y >= 0 with x a + y b = seconds, by least squares of the relative errors.

    Relative, since the times of an all-reduce differ by a factor of a thousand.
    """
    terms = np.array([a, b], dtype=float).T / np.array(seconds)[:, None]
    both = np.linalg.lstsq(terms, np.ones(len(seconds)), rcond=None)[0]
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = terms.sum(0) / np.square(terms).sum(0)  # one term without the other
    gaps = np.square(1 - terms * alone).sum(0)
    return (float(alone[0]), 0.0) if gaps[0] < gaps[1] else (0.0, float(alone[1]))


def fit_link(
    sizes: Sequence[float], members: Sequence[int], seconds: Sequence[float], cores: float
) -> Link:
    """Fit latency and bandwidth of a ring to timed all-reduces."""
    one = Link(1.0, math.inf, cores=cores), Link(0.0, 1.0, cores=cores)  # units
    points = list(zip(sizes, members, strict=True))
    waits, sent = ([link.seconds(*point) for point in points] for link in one)
    latency, per_byte = fit_two(waits, sent, seconds)
    return Link(latency, 1 / per_byte if per_byte else math.inf, cores=cores)


def fit_work(images: Sequence[float], seconds: Sequence[float]) -> Work:
    """Fit the seconds per image and per step to timed steps of different numbers of images."""
    return Work(*fit_two(images, [1.0] * len(images), seconds))


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return (root mean square, largest) of predicted / measured - 1."""
    gaps = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return math.sqrt(sum(gap**2 for gap in gaps) / len(gaps)), max(gaps)


# --- computation and gradients of a model --------------------------------------------------------


@cache
def network(model: str, mode: str) -> nn.Module:
    """Build the model that a mode trains, on the meta device."""
    if mode == "pretrain":
        return shape_of(model)
    with torch.device("meta"):
        return create_model(model, num_classes=CLASSES)


def parameters(model: str, mode: str) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in network(model, mode).parameters() if p.requires_grad)


def blocks(model: str, mode: str) -> int:
    """Return the number of blocks of encoder and decoder."""
    return sum(isinstance(part, Block) for part in network(model, mode).modules())


def weights(layers: nn.Module) -> int:
    """Return the multiplications of linear and convolution layers at one position."""
    kinds = (nn.Conv2d, nn.Linear)
    return sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, kinds))


def forward_gmac(model: str, mode: str, input_size: int) -> float:
    """Return the GMACs of linear and convolution layers in forward, per image.

    In pre-training the encoder counts visible patches only, and the decoder all cells.
    """
    whole = network(model, mode)
    if mode == "finetune":
        return gmac(whole, input_size**2) + weights(whole.head) / 1e9
    h, w = whole.grid_size(input_size, input_size)
    seen = visible_patches(h * w, whole.mask_ratio) * whole.patch_size**2
    cells = (input_size // whole.encoder.total_stride) ** 2
    decoder = sum(weights(part) for part in (whole.proj, whole.decoder, whole.pred))
    return gmac(whole.encoder, seen) + cells * decoder / 1e9


# --- many GPUs, estimated ------------------------------------------------------------------------


def assumed_training(model: str, mode: str, args: argparse.Namespace) -> Training:
    """Model training on the GPUs of the flags; a step has three times forward's multiplications."""
    numbers = parameters(model, mode)
    flops = 3 * 2e9 * forward_gmac(model, mode, args.input_size)
    work = Work(
        image=flops / (args.peak_tflops * 1e12 * args.share),
        fixed=UPDATE * numbers / (args.memory_tb_s * 1e12),
        floor=blocks(model, mode) * args.block_ms / 1e3,
    )
    inside = Link(args.node_us / 1e6, args.node_gb_s * 1e9)
    between = Link(args.network_us / 1e6, args.network_gb_s * 1e9, args.between == "tree")
    cluster = Cluster(inside, between, args.gpus_per_node)
    return Training(work, cluster, numbers, args.gradient_bytes, args.hidden)


def cell(seconds: float, images: float, efficiency: float) -> str:
    """Format a cell: `12.3 ms, 333k/s, **98%**`."""
    rate, percent = images / seconds, 100 * efficiency
    text = f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.0f}k"
    text = text if rate >= 1e4 else f"{rate:.0f}"
    return f"{1e3 * seconds:.1f} ms, {text}/s, **{percent:.{int(percent < 1)}f}%**"


def describe_assumptions(args: argparse.Namespace) -> str:
    """Return the assumptions of the tables as Markdown."""
    between = "double binary trees" if args.between == "tree" else "a ring"
    ways = (argparse.Namespace(**{**vars(args), "between": way}) for way in ("tree", "ring"))
    huge = (assumed_training("convnextv2_huge", "pretrain", way) for way in ways)
    ms = [1e3 * training.exchange(GPUS[-1]) for training in huge]
    return f"""Estimated, not measured, for DistributedDataParallel. Assumptions:

- Computing: {args.peak_tflops:g} TFLOP/s in bf16, of which models of all sizes reach \
{100 * args.share:g}%; at least {args.block_ms:g} ms per block, for launches; AdamW and the \
gradient norm move {UPDATE} bytes per parameter at {args.memory_tb_s:g} TB/s. \
{args.input_size} px, mask ratio 0.6.
- Network: nodes of {args.gpus_per_node} GPUs; in each a ring, {args.node_gb_s:g} GB/s per GPU and \
{args.node_us:g} us per step; between the nodes {between}, {args.network_gb_s:g} GB/s per GPU \
and {args.network_us:g} us per step.
- Communication: {args.gradient_bytes} bytes per parameter, in buckets of {OTHERS >> 20} MiB of \
float32, one after the other, in turn within and between the nodes; {100 * args.hidden:g}% overlap \
with backward (two thirds of the computation), if it is long enough.
- All ranks are equally fast, none waits for data, and memory suffices.

The most sensitive assumption: the gradients of Huge take {ms[0]:.0f} ms on {GPUS[-1]} GPUs with a \
tree between the nodes, which NCCL prefers for many, and {ms[1]:.0f} ms with a ring \
(`--between`)."""


def gpu_tables(args: argparse.Namespace) -> str:
    """Return Markdown for all sizes: step time, images/s, efficiency, fewest images per GPU."""
    texts = ["### Many GPUs, estimated", describe_assumptions(args)]
    gpus = [f"{n} GPUs" for n in GPUS]
    for mode, (name, total) in RECIPES.items():
        each, weak, strong, fewest = args.gpu_batch, [], [], []
        for size in SIZES:
            model = f"convnextv2_{size}"
            own = assumed_training(model, mode, args)
            about = [size, f"{forward_gmac(model, mode, args.input_size):.3f}"]
            about += [f"{own.size / 1e6:.0f}"]
            points = [(n, own.seconds(n, each), own.seconds(n, total / n)) for n in GPUS]
            weak.append(about + [cell(s, n * each, own.weak(n, each)) for n, s, _ in points])
            strong.append(about + [cell(s, total, own.strong(n, total)) for n, _, s in points])
            fewest.append([size, *(own.fewest(n) for n in (1, *GPUS))])
        head = ["", "GMAC per image", "MB of gradients", *gpus]
        texts += [
            f"{name}, {each} images per GPU (weak scaling): ms per step, images/s, efficiency "
            "compared with as many independent GPUs.",
            table(head, weak),
            f"{name}, {total} images per step (strong scaling): ms per step, images/s, efficiency "
            "compared with one GPU that takes them all.",
            table(head, strong),
            f"{name}: fewest images per GPU for {100 * ENOUGH:g}% of the throughput that one "
            "GPU reaches alone with any number.",
            table(["", "1 GPU", *gpus], fewest),
        ]
    return "\n\n".join(texts)
