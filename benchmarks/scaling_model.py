# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a step costs on many processes: computation, and a ring that adds up the gradients.

PYTHONPATH=. python -c "from benchmarks.scaling_model import Link; print(Link(1e-5, 4e10))"
"""

from __future__ import annotations

import argparse
import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
BACKWARD = 2 / 3  # of the multiplications of a step: two products for each one of forward
FIRST, OTHERS = 2**20, 25 * 2**20  # bytes of DistributedDataParallel's buckets
UPDATE = 32  # bytes moved: AdamW reads p, g, m, v and writes p, m, v; the norm reads g
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
RECIPES = {  # name, images an update; arXiv 2301.00808, appendix A
    "pretrain": ("Pre-training", 4096),
    "finetune": ("Fine-tuning", 1024),
}
ENOUGH = 0.9  # of what a GPU could do
MOST = 2**20  # images of a GPU that are looked at


@dataclass(frozen=True)
class Link:
    """What joins the members of a ring.

    latency: seconds a step of the ring. bandwidth: bytes a second that a member sends. tree: steps
    grow with the logarithm of the members; double binary trees move as many bytes as a ring.
    """

    latency: float
    bandwidth: float
    tree: bool = False

    def seconds(self, size: float, members: int, messages: int = 1) -> float:
        """All-reduce of `size` bytes in so many messages, one after the other.

        A ring: n - 1 steps that add, n - 1 that hand the sums on, each of size / n bytes. Source:
        Thakur, Rabenseifner, Gropp 2005, sections 4.4 and 4.5.
        """
        waits = messages * steps(members, self.tree) * self.latency
        return waits + share(members) * size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs: a ring in each node, and one through the nodes for each GPU's part of the sum.

    Adding up and handing on within a node together are what one all-reduce there costs; between
    them each of a node's GPUs exchanges its own part with its peers through its own adapter.
    """

    inside: Link
    between: Link
    per_node: int

    def seconds(self, size: float, members: int, messages: int = 1) -> float:
        """All-reduce over `members` GPUs that fill their nodes."""
        local = min(members, self.per_node)
        nodes = math.ceil(members / self.per_node)
        within = self.inside.seconds(size, local, messages)
        return within + self.between.seconds(size / local, nodes, messages)


@dataclass(frozen=True)
class Work:
    """Seconds of a step without anybody else.

    image: forward and backward of one image. fixed: what does not depend on the images, as the
    optimizer. floor: forward and backward take no less, however few images: the host's launches.
    """

    image: float
    fixed: float
    floor: float = 0.0

    def passes(self, images: float) -> float:
        """Forward and backward."""
        return max(self.floor, images * self.image)

    def seconds(self, images: float) -> float:
        """The whole step."""
        return self.passes(images) + self.fixed


def steps(members: int, tree: bool = False) -> int:
    """Messages that wait for each other in an all-reduce."""
    return 2 * (math.ceil(math.log2(members)) if tree else members - 1)


def share(members: int) -> float:
    """Bytes that a member of a ring sends for each byte of an all-reduce."""
    return 2 * (members - 1) / members


def buckets(size: float) -> int:
    """Messages in which DistributedDataParallel sends gradients of so many bytes, about.

    A bucket ends with a whole parameter, and one larger than a bucket has its own.
    """
    return 1 + math.ceil(max(0.0, size - FIRST) / OTHERS)


def exposed(exchange: float, passes: float, hidden: float) -> float:
    """Seconds of an exchange that a step is longer by.

    hidden: share of the exchange that runs beside backward, if that lasts long enough.
    """
    return max((1 - hidden) * exchange, exchange - BACKWARD * passes)


# --- fits ---------------------------------------------------------------------------------------


def fit_two(
    a: Sequence[float], b: Sequence[float], seconds: Sequence[float]
) -> tuple[float, float]:
    """x, y >= 0 with x a + y b = seconds, by least squares of the relative errors.

    Relative, since the times of an all-reduce differ by a factor of a thousand.
    """
    terms = np.array([a, b], dtype=float).T / np.array(seconds)[:, None]
    ones = np.ones(len(seconds))
    both = np.linalg.lstsq(terms, ones, rcond=None)[0]
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = terms.sum(0) / np.square(terms).sum(0)  # each without the other
    gaps = np.square(1 - terms * alone).sum(0)
    return (float(alone[0]), 0.0) if gaps[0] < gaps[1] else (0.0, float(alone[1]))


def fit_link(sizes: Sequence[float], members: Sequence[int], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth from timed all-reduces."""
    messages = [steps(n) for n in members]
    sent = [share(n) * size for n, size in zip(members, sizes, strict=True)]
    latency, per_byte = fit_two(messages, sent, seconds)
    return Link(latency, 1 / per_byte if per_byte else math.inf)


def fit_work(images: Sequence[float], seconds: Sequence[float]) -> Work:
    """Seconds an image and a step from timed steps of different numbers of images."""
    return Work(*fit_two(images, [1.0] * len(images), seconds))


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(root of the mean square, largest) of predicted / measured - 1."""
    gaps = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return math.sqrt(sum(gap**2 for gap in gaps) / len(gaps)), max(gaps)


@dataclass(frozen=True)
class Here:
    """The model of processes of this machine, which share its cores.

    slowdown: processes -> how much longer each computes beside the others. size: bytes of the
    gradients. Where processes outnumber cores the all-reduce waits for them as well.
    """

    work: Work
    slowdown: dict[int, float]
    link: Link
    size: int
    cores: int
    hidden: float = 0.0

    def crowd(self, members: int) -> float:
        """Processes that share a core."""
        return max(1.0, members / self.cores)

    def exchange(self, members: int) -> float:
        """Seconds of the gradients' exchange with nothing beside it."""
        return self.crowd(members) * self.link.seconds(self.size, members, buckets(self.size))

    def seconds(self, members: int, images: float) -> float:
        """A step of `images` on each of the members."""
        slow = self.slowdown[members]
        longer = exposed(self.exchange(members), slow * self.work.passes(images), self.hidden)
        return slow * self.work.seconds(images) + longer


# --- what a model computes and sends -------------------------------------------------------------


@cache
def network(model: str, mode: str) -> nn.Module:
    """The model that a mode trains, without memory for its parameters."""
    if mode == "pretrain":
        return shape_of(model)
    with torch.device("meta"):
        return create_model(model, num_classes=CLASSES)


def parameters(model: str, mode: str) -> int:
    """Numbers in the gradient."""
    return sum(p.numel() for p in network(model, mode).parameters() if p.requires_grad)


def blocks(model: str, mode: str) -> int:
    """Of encoder and decoder."""
    return sum(isinstance(part, Block) for part in network(model, mode).modules())


def weights(layers: nn.Module) -> int:
    """Multiplications of linear and convolution layers at one position."""
    kinds = (nn.Conv2d, nn.Linear)
    return sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, kinds))


def forward_gmac(model: str, mode: str, input_size: int) -> float:
    """Billions of multiplications of linear and convolution layers, forward, an image.

    In pre-training those of the visible patches in the encoder, and of all cells in the decoder.
    """
    whole = network(model, mode)
    if mode == "finetune":
        return gmac(whole, input_size**2) + weights(whole.head) / 1e9
    h, w = whole.grid_size(input_size, input_size)
    seen = visible_patches(h * w, whole.mask_ratio) * whole.patch_size**2
    cells = (input_size // whole.encoder.total_stride) ** 2
    decoder = sum(weights(part) for part in (whole.proj, whole.decoder, whole.pred))
    return gmac(whole.encoder, seen) + cells * decoder / 1e9


# --- many GPUs, on paper -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model in a mode on the GPUs that the flags assume."""

    work: Work
    cluster: Cluster
    size: float  # bytes of the gradients
    hidden: float

    @classmethod
    def of(cls, model: str, mode: str, args: argparse.Namespace) -> Case:
        """Forward and backward make three times the multiplications of forward."""
        flops = 3 * 2e9 * forward_gmac(model, mode, args.input_size)
        numbers = parameters(model, mode)
        work = Work(
            image=flops / (args.peak_tflops * 1e12 * args.share),
            fixed=UPDATE * numbers / (args.memory_tb_s * 1e12),
            floor=blocks(model, mode) * args.block_ms / 1e3,
        )
        inside = Link(args.node_us / 1e6, args.node_gb_s * 1e9)
        between = Link(args.network_us / 1e6, args.network_gb_s * 1e9, args.between == "tree")
        cluster = Cluster(inside, between, args.gpus_per_node)
        return cls(work, cluster, args.gradient_bytes * numbers, args.hidden)

    def seconds(self, gpus: int, images: float) -> float:
        """A step of so many images on each GPU."""
        exchange = self.cluster.seconds(self.size, gpus, buckets(self.size))
        return self.work.seconds(images) + exposed(exchange, self.work.passes(images), self.hidden)

    def weak(self, gpus: int, images: float) -> float:
        """Efficiency against as many GPUs that each train alone on as many images."""
        return self.work.seconds(images) / self.seconds(gpus, images)

    def strong(self, gpus: int, total: float) -> float:
        """Efficiency against one GPU that takes the whole batch, in parts if it has to."""
        return self.work.seconds(total) / (gpus * self.seconds(gpus, total / gpus))

    def fewest(self, gpus: int) -> int:
        """Images of a GPU with which it does ENOUGH of what any number would let it do alone."""
        return bisect.bisect_left(
            range(MOST), ENOUGH, key=lambda n: n * self.work.image / self.seconds(gpus, n)
        )


def cell(seconds: float, images: float, efficiency: float) -> str:
    """12.3 ms, 333k/s, 98%"""
    rate = images / seconds
    text = f"{rate / 1e3:.0f}k" if rate >= 1e4 else f"{rate:.0f}"
    return f"{1e3 * seconds:.1f} ms, {text}/s, **{100 * efficiency:.0f}%**"


def describe_assumptions(args: argparse.Namespace) -> str:
    """What the tables of GPUs rest on."""
    between = "trees between" if args.between == "tree" else "another between"
    return (
        f"Assumed, nothing of it measured: {args.peak_tflops:g} TFLOP/s in bf16, of which "
        f"{100 * args.share:g}% are reached; forward and backward take {args.block_ms:g} ms a "
        f"block at least (launches); AdamW and the norm move {UPDATE} bytes a parameter at "
        f"{args.memory_tb_s:g} TB/s. Nodes of {args.gpus_per_node} GPUs; a ring in each, "
        f"{args.node_gb_s:g} GB/s a GPU and {args.node_us:g} us a step, and {between} them, "
        f"{args.network_gb_s:g} GB/s a GPU and {args.network_us:g} us; gradients of "
        f"{args.gradient_bytes} bytes in messages of {OTHERS >> 20} MiB, one after the other; "
        f"{100 * args.hidden:g}% of the exchange hidden behind backward, if that, two thirds of "
        "the passes, is long enough. No rank is slower than another, none waits for data, memory "
        f"suffices. {args.input_size} px, mask ratio 0.6."
    )


def gpu_tables(args: argparse.Namespace) -> str:
    """Markdown for all sizes: step time, images/s, efficiency, the fewest images of a GPU."""
    texts = ["### Many GPUs, by the model", describe_assumptions(args)]
    for mode, (name, total) in RECIPES.items():
        each, weak, strong, fewest = args.gpu_batch, [], [], []
        for size in SIZES:
            case = Case.of(f"convnextv2_{size}", mode, args)
            about = [size, f"{forward_gmac(f'convnextv2_{size}', mode, args.input_size):.3f}"]
            about += [f"{case.size / 1e6:.0f}"]
            weak.append(about[:])
            strong.append(about[:])
            for n in GPUS:
                weak[-1].append(cell(case.seconds(n, each), n * each, case.weak(n, each)))
                strong[-1].append(cell(case.seconds(n, total / n), total, case.strong(n, total)))
            fewest.append([size, *(case.fewest(n) for n in (1, *GPUS))])
        gpus = [f"{n} GPUs" for n in GPUS]
        head = ["", "GMAC an image", "MB of gradients", *gpus]
        texts += [
            f"{name}, {each} images a GPU: ms a step, images/s, efficiency against as many GPUs "
            "that each train alone.",
            table(head, weak),
            f"{name}, {total} images an update: ms a step, images/s, efficiency against one GPU "
            "with all of them.",
            table(head, strong),
            f"{name}: fewest images a GPU for {100 * ENOUGH:g}% of what one reaches alone with as "
            "many as it likes.",
            table(["", "1 GPU", *gpus], fewest),
        ]
    return "\n\n".join(texts)
