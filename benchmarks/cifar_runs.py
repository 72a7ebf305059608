# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The runs of cifar.py: FCMAE and classifiers on images that stay in the device's memory.

PYTHONPATH=. python -c "from benchmarks.cifar_runs import equal_epochs; help(equal_epochs)"
"""

import math
import statistics
import sys
import time
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine_finetune
import engine_pretrain
from data_loading.decode import decode, load_image
from data_loading.mixing import build_mixup
from data_loading.rng import fold_in, seed_all
from data_loading.transforms import mean_and_std
from errors import UserError
from models import create_model
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, visible_patches
from optim_factory import create_optimizer
from training import checkpoint
from training.anomaly import AnomalyGuard
from training.checkpoint_manager import CheckpointManager
from training.hooks import Reporter
from training.report import format_stats
from training.schedules import Schedule
from training.setup import TrainLoop
from training.stepper import Stepper
from training.steps import Steps
from weights.pretrained import Pretrained

Data = dict[str, tuple[np.ndarray, np.ndarray]]  # split: images (N, H, W, 3) uint8, labels (N,)
MAX_BYTES = 2**24  # of an image in the zip, whatever size its header claims
DAMAGED = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, ValueError)


# --- images -------------------------------------------------------------------------------------


def load(path: Path, counts: dict[str, int]) -> Data:
    """Read `counts[split]` images from SPLIT/CLASS/*.jpg in a zip, the first of each class by name.

    Nothing is extracted: the images are read into memory.
    """
    expected = " and ".join(f"{count} in {split}/CLASS/*.jpg" for split, count in counts.items())
    try:
        with zipfile.ZipFile(path) as archive:
            data = {split: _read(archive, split, count) for split, count in counts.items()}
    except DAMAGED as error:  # UserError is a ValueError
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"--data {path}: {reason}; expected a zip with {expected}") from error
    classes = [names for _, _, names in data.values()]
    sizes = [images.shape[1:] for images, _, _ in data.values()]
    if len(set(sizes)) > 1 or classes != classes[:1] * len(classes):
        raise UserError(f"--data {path}: other classes or sizes in {' than in '.join(counts)}")
    return {split: (images, labels) for split, (images, labels, _) in data.items()}


def _read_bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} unpacks to more than {MAX_BYTES} bytes")
    return data


def _read(
    archive: zipfile.ZipFile, split: str, count: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    files: dict[str, list[str]] = {}
    for name in sorted(archive.namelist()):
        if name.startswith(f"{split}/") and name.lower().endswith((".jpg", ".jpeg")):
            files.setdefault(name.split("/")[1], []).append(name)
    each, rest = divmod(count, max(len(files), 1))
    least = min(map(len, files.values()), default=0)
    if rest or not 1 <= each <= least:
        raise UserError(f"holds {len(files)} classes in {split}/, the smallest of {least} images")
    chosen = [name for names in files.values() for name in names[:each]]
    images = [decode(load_image(_read_bytes(archive, name)), 3) for name in chosen]
    if len({image.shape for image in images}) > 1:
        raise UserError(f"holds images of several sizes in {split}/")
    images = torch.stack(images).permute(0, 2, 3, 1).numpy()
    return images, np.repeat(np.arange(len(files)), each), list(files)


class InMemory:
    """Stand-in for `DeviceLoader` over images that stay on the device as uint8.

    images: (N, H, W, 3). seed: for order, crops and flips; None, to evaluate, changes nothing.
    pad: pixels of reflected border that a crop may include. cutout: side of a blank square.
    `DeviceLoader` would copy on a stream that does not wait for crops made on the GPU.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        pad: int = 0,
        cutout: int = 0,
    ) -> None:
        border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        self.images = torch.from_numpy(np.pad(images, border, "reflect")).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.mean, self.std = (torch.tensor(x, device=device) for x in mean_and_std(3, True))
        self.size, self.batch_size, self.device = images.shape[1:3], batch_size, device
        self.seed, self.pad, self.cutout, self.epoch = seed, pad, cutout, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, crops and flips."""
        self.epoch = epoch

    def __len__(self) -> int:
        batches = len(self.labels) / self.batch_size
        return math.ceil(batches) if self.seed is None else int(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.arange(len(self.labels), device=self.device)
        if self.seed is not None:
            self.random = torch.Generator(self.device)
            self.random.manual_seed(fold_in(self.seed, self.epoch))
            order = torch.randperm(len(order), generator=self.random, device=self.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            ids = order[start : start + self.batch_size]
            images = self.images[ids] if self.seed is None else self._crops(ids)
            images = (images / 255 - self.mean) / self.std
            if self.seed is not None and self.cutout:
                images = images.masked_fill(self._squares(ids), 0.0)
            yield images.permute(0, 3, 1, 2), self.labels[ids], ids

    def _draw(self, ids: Tensor, high: int) -> Tensor:
        """(N,) -> (N, 1, 1) random integers below `high`."""
        shape = (len(ids), 1, 1)
        return torch.randint(high, shape, generator=self.random, device=self.device)

    def _lines(self) -> tuple[Tensor, Tensor]:
        """Return row indices (H, 1) and column indices (W,)."""
        height, width = (torch.arange(side, device=self.device) for side in self.size)
        return height[:, None], width

    def _crops(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, H, W, 3) uint8: crop and flip in one gather."""
        rows, columns = self._lines()
        columns = torch.where(self._draw(ids, 2) == 1, self.size[1] - 1 - columns, columns)
        rows = rows + self._draw(ids, 2 * self.pad + 1)  # (N, H, 1)
        columns = columns + self._draw(ids, 2 * self.pad + 1)  # (N, 1, W)
        return self.images[ids[:, None, None], rows, columns]

    def _squares(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, H, W, 1), True in a square centered on a random pixel."""
        inside = True
        for lines, side in zip(self._lines(), self.size, strict=True):
            below = lines - self._draw(ids, side) + self.cutout // 2
            inside = inside & (below >= 0) & (below < self.cutout)
        return inside[..., None]


# --- training -----------------------------------------------------------------------------------


def classifier(args: Namespace, **more: object) -> nn.Module:
    """Create the network that --model names or describes."""
    if "/" not in args.model:
        return create_model(args.model, stem_stride=args.stem_stride, **more)
    parts = [part.split(",") for part in args.model.split("/")]
    numbers = [int(n) for part in parts for n in part if n.isdecimal()]
    half = len(numbers) // 2
    if [len(part) for part in parts] != [half, half] or 0 in numbers:
        raise UserError(f"--model {args.model}: expected a name, or like 1,2,2/24,48,96")
    depths, dims = tuple(numbers[:half]), tuple(numbers[half:])
    return ConvNeXtV2(depths, dims, stem_stride=args.stem_stride, **more)


def autoencoder(args: Namespace) -> FCMAE:
    """Create the FCMAE around the network of --model."""
    own = {
        "patch_size": args.patch_size,
        "mask_ratio": args.mask_ratio,
        "decoder_embed_dim": args.decoder_embed_dim,
        "norm_pix_loss": bool(args.norm_pix_loss),
    }
    if "/" in args.model:
        return FCMAE(classifier(args, num_classes=0), **own)
    return create_model(f"fcmae_{args.model}", stem_stride=args.stem_stride, **own)


def called(model: nn.Module, args: Namespace, shapes: list, *fixed: int) -> nn.Module:
    """Apply --compile and --cuda_graphs to the model; shapes: of its inputs."""
    if args.compile:
        model.compile()
    if not args.cuda_graphs:
        return model
    from training.cuda_graphs import Graphed

    return Graphed(model, args.device, args.amp, shapes, *fixed)


def empty_loop(seed: int) -> TrainLoop:
    """Create a training loop whose other parts `train` sets."""
    return TrainLoop(None, None, None, None, None, None, seed=seed)


def train(
    title: str,
    model: nn.Module,
    one_epoch: Callable[..., dict[str, float]],
    loop: TrainLoop,
    batches: InMemory,
    epochs: int,
    args: Namespace,
    test: Callable[[], dict[str, float]] = dict,
    **recipe: object,
) -> tuple[list[float], dict[str, float]]:
    """Train; returns the seconds of each epoch without `test`, and the last result of `test`."""
    optimizer = create_optimizer(model, weight_decay=args.weight_decay, **recipe)
    updates, state = len(batches), checkpoint.TrainState()
    schedule = Schedule(
        optimizer,
        updates * epochs,
        recipe["lr"],
        warmup=round(min(args.warmup_epochs, epochs / 5) * updates),
        weight_decay=args.weight_decay,
    )
    stepper = Stepper(model, optimizer, args.device, args.amp)
    loop.stepper, loop.schedule, loop.state = stepper, schedule, state
    loop.checkpoints, loop.guard = CheckpointManager(None), AnomalyGuard(stepper)
    steps = Steps.even(updates, epochs)
    loop.reporter = Reporter([], args.device, state, steps, print_freq=updates)
    seconds = []
    while state.epoch < epochs:
        batches.set_epoch(state.epoch)
        start = time.perf_counter()
        stats = one_epoch(batches, loop)
        seconds.append(time.perf_counter() - start)  # it reads the meters: no queue is left
        state.end_epoch(steps)
        if state.epoch == epochs or state.epoch % args.eval_every == 0:
            tested = test()
            stats |= {f"val_{key}": value for key, value in tested.items()}
        stats = format_stats(stats, top5=True)
        rate = updates * batches.batch_size / seconds[-1]
        line = f"{title} {state.epoch}/{epochs}  {stats}  {rate:.0f} img/s"
        print(line, file=sys.stderr, flush=True)
    return seconds, tested


def pretrain(
    seed: int,
    data: Data,
    args: Namespace,
    test: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Pre-train FCMAE; returns the seconds of each epoch, and the weights for a classifier.

    test: called with the network as `classify` calls it.
    """
    batches = InMemory(*data["pretrain"], args.pretrain_batch_size, args.device, seed, args.pad)
    seed_all(seed)
    model = autoencoder(args).to(args.device)
    patches = math.prod(model.grid_size(*batches.size))
    shapes = [(batches.batch_size, 3, *batches.size), (batches.batch_size, patches)]
    fast = called(model, args, shapes, visible_patches(patches, args.mask_ratio))
    one_epoch = partial(engine_pretrain.train_one_epoch, fast, model)
    loop = empty_loop(seed)
    recipe = {"lr": args.pretrain_lr, "betas": (0.9, 0.95)}
    title, epochs = f"seed {seed} pre-training", args.pretrain_epochs
    tested = partial(test, model) if test else dict
    seconds, _ = train(title, model, one_epoch, loop, batches, epochs, args, tested, **recipe)
    return seconds, model.state_dict()


def classify(
    title: str,
    seed: int,
    epochs: int,
    data: Data,
    args: Namespace,
    test: Callable[[nn.Module], dict[str, float]],
    weights: dict[str, Tensor] | None,
    lr: float,
) -> tuple[list[float], dict[str, float]]:
    """Train a classifier on data["train"], from `weights` of pre-training or from random ones.

    Returns the seconds of each epoch without `test`, and the last result of `test`.
    """
    classes = int(data["train"][1].max()) + 1
    batches = InMemory(*data["train"], args.batch_size, args.device, seed, args.pad, args.cutout)
    seed_all(seed)
    head = {"num_classes": classes, "head_init_scale": 0.001 if weights else 1.0}
    model = classifier(args, drop_path_rate=args.drop_path, **head).to(args.device)
    recipe = {"lr": lr}
    if weights:
        Pretrained("FCMAE", {"model": weights}).load(model)
        recipe |= {"layer_decay": args.layer_decay}
    mixup = build_mixup(args, classes)
    fast = called(model, args, [(args.batch_size, 3, *batches.size)])
    one_epoch = partial(engine_finetune.train_one_epoch, fast, model)
    loop = empty_loop(seed)
    loop.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)
    loop.mixup = mixup
    return train(
        title, model, one_epoch, loop, batches, epochs, args, partial(test, model), **recipe
    )


def accuracy(images: InMemory, model: nn.Module, args: Namespace) -> dict[str, float]:
    """Evaluate a classifier on a split."""
    return engine_finetune.evaluate(images, model, args.device, args.amp)


def run(name: str, seed: int, epochs: int, data: Data, args: Namespace) -> dict:
    """Do one of cifar.RUNS; returns its accuracy and times in plain types."""
    start = time.perf_counter()
    pretraining, weights = pretrain(seed, data, args) if name == "pretrained" else ([], None)
    val = InMemory(*data["val"], 1000, args.device)
    test = partial(accuracy, val, args=args)
    lr = args.finetune_lr if weights else args.scratch_lr
    training, tested = classify(f"seed {seed} {name}", seed, epochs, data, args, test, weights, lr)
    return {
        "run": name,
        "seed": seed,
        "acc1": tested["acc1"],
        "pretraining": pretraining,  # seconds of each epoch
        "training": training,
        "seconds": time.perf_counter() - start,
    }


def equal_epochs(pretraining: list[float], training: list[float], epochs: int) -> int:
    """Epochs from scratch that take as long as pre-training and `epochs` of training, rounded up.

    Both lists hold the seconds of each epoch; medians, since the first epoch warms up.
    """
    seconds = len(pretraining) * statistics.median(pretraining)
    return epochs + math.ceil(seconds / statistics.median(training))
