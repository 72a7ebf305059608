# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A model and data small enough to train in a test: --model tests.tiny:classifier and so on."""

import atexit
import hashlib
import os
import signal
import time

import torch

from data_loading.rng import fold_in
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE

SIZE = ((1, 1, 1, 1), (4, 6, 8, 10))
CLASSES = 3


def classifier(**kwargs) -> ConvNeXtV2:
    """A ConvNeXt V2 of a few thousand parameters."""
    return ConvNeXtV2(*SIZE, **kwargs)


def fcmae(in_chans: int, stem_stride: int, drop_path_rate: float, **kwargs) -> FCMAE:
    """An FCMAE around it."""
    encoder = classifier(in_chans=in_chans, stem_stride=stem_stride, drop_path_rate=drop_path_rate)
    return FCMAE(encoder, **kwargs)


class Classifier64(ConvNeXtV2):
    """In float64, where sums in another order differ by 1e-16."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.double())


class FCMAE64(FCMAE):
    """The same for pre-training."""

    def forward(self, images: torch.Tensor, *mask) -> tuple[torch.Tensor, ...]:
        return super().forward(images.double(), *mask)


def classifier64(**kwargs) -> ConvNeXtV2:
    """`classifier` in float64."""
    return Classifier64(*SIZE, **kwargs).double()


def fcmae64(in_chans: int, stem_stride: int, drop_path_rate: float, **kwargs) -> FCMAE:
    """`fcmae` in float64."""
    encoder = classifier(in_chans=in_chans, stem_stride=stem_stride, drop_path_rate=drop_path_rate)
    return FCMAE64(encoder, **kwargs).double()


class Colors(torch.utils.data.Dataset):
    """Noise that is brighter in the channel of its label."""

    classes = ("red", "green", "blue")

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 128, (3, 20, 20), generator=generator, dtype=torch.uint8)
        image[index % CLASSES] += 100
        return image, index % CLASSES


def colors(data_path: str, train: bool) -> Colors:
    """26 images to train on, 7 to evaluate."""
    return Colors(26 if train else 7)


def even(data_path: str, train: bool) -> Colors:
    """32 images to train on; to evaluate 3, fewer than there may be processes."""
    return Colors(32 if train else 3)


class Poisoned(Colors):
    """Float images of which one batch holds a NaN."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index)
        image = image / 255
        return image * float("nan") if index == 5 else image, label


def poisoned(data_path: str, train: bool) -> Poisoned:
    """`colors` with one image that is not finite."""
    return Poisoned(26 if train else 7)


class Other(torch.nn.Module):
    """A classifier that is no ConvNeXt, as a fork may bring."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).mean((-2, -1)))


def other(num_classes: int, **kwargs) -> Other:
    """`Other`, whatever else the flags say."""
    return Other(num_classes)


class Temperature(torch.nn.Module):
    """Cross-entropy of logits over a temperature, which is trained, as a fork may bring."""

    takes = ("class", "soft")

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(start)))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits / self.scale, labels, reduction="none")
        return losses + 0.1 * self.scale.square()


def brier(logits: torch.Tensor, labels: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Mean Brier score of a batch, a loss that is a function and gives no value for each image."""
    errors = logits.softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
    return factor * errors.square().sum(1).mean()


class Deadly(Colors):
    """One sample of it ends the process that reads it, or never comes."""

    def __init__(self, length: int, fault: str) -> None:
        super().__init__(length)
        self.fault = fault
        self.samples = [(f"photos/{index}.jpg", index % CLASSES) for index in range(length)]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 5:
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().__getitem__(index)


def dies(data_path: str, train: bool) -> Deadly:
    """`colors` whose reader is killed, as for want of memory."""
    return Deadly(26 if train else 5, "dies")


def hangs(data_path: str, train: bool) -> Deadly:
    """`colors` of which one is on a file system that stalls."""
    return Deadly(26 if train else 5, "hangs")


class Stalls(Colors):
    """Once a process has read so many images, the next never comes: STALL=train:36."""

    def __init__(self, length: int, split: str) -> None:
        super().__init__(length)
        self.split, self.read = split, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        split, count = os.environ.get("STALL", "none:0").split(":")
        self.read += 1
        if split == self.split and self.read > int(count):
            print("asleep", flush=True)
            time.sleep(1000)
        return super().__getitem__(index)


def stalls(data_path: str, train: bool) -> Stalls:
    """`colors`, until the disk does not answer."""
    return Stalls(26 if train else 7, "train" if train else "val")


class Fails(Colors):
    """The seventh image that rank 1 asks for is an error."""

    asked = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked += 1
        if self.asked == 7 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("of rank 1")
        return super().__getitem__(index)


def fails(data_path: str, train: bool) -> Fails:
    """`colors`, of which one rank cannot read all."""
    return Fails(26 if train else 7)


class _Torn(torch.autograd.Function):
    """What it is given, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


def frail(**kwargs) -> ConvNeXtV2:
    """`classifier` that fails as FRAIL says: what, in which update (from 0), on which rank.

    gradient: of the output of stages.1.0; parameter: stages.1.0.pwconv1.bias becomes NaN, for good;
    loss: the logits are 10,000 times as large.
    """
    network = classifier(**kwargs)
    what, update, rank = os.environ["FRAIL"].split(":")
    seed, block = fold_in(0, int(update), 0, int(rank)), network.stages[1][0]

    def fail(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if torch.initial_seed() != seed or not module.training:
            return output
        if what == "parameter":
            block.pwconv1.bias.data[0] = float("nan")
        return {"gradient": _Torn.apply, "loss": lambda x: x * 1e4}.get(what, lambda x: x)(output)

    (network.head if what == "loss" else block).register_forward_hook(fail)
    if "HASHES" in os.environ:
        atexit.register(_tell_weights, network)
    return network


def _tell_weights(network: torch.nn.Module) -> None:
    """So that ranks can be compared: only the first one saves."""
    marks = hashlib.sha256()
    for value in network.state_dict().values():
        marks.update(value.numpy().tobytes())
    line = f"weights of rank {os.environ['RANK']}: {marks.hexdigest()}\n"
    print(line, end="", flush=True)  # at once: torchrun's python -u writes what `end` is apart


def frail_fcmae(in_chans: int, stem_stride: int, drop_path_rate: float, **kwargs) -> FCMAE:
    """An FCMAE around `frail`."""
    encoder = frail(in_chans=in_chans, stem_stride=stem_stride, drop_path_rate=drop_path_rate)
    return FCMAE(encoder, **kwargs)


class Slow(Colors):
    """In the first starts of a SLURM job it takes a while, and so does an image: to be ended."""

    def __init__(self, length: int, seconds: float, starts: int, after: int) -> None:
        super().__init__(length)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.seconds = seconds if restarts < starts else 0
        self.quick = after
        time.sleep(0 if after else self.seconds)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.quick -= 1
        if self.quick == -1 and self.seconds:
            print("slow from here", flush=True)
        time.sleep(0 if self.quick >= 0 else self.seconds)
        return super().__getitem__(index)


def slow(data_path: str, train: bool) -> Slow:
    """`colors`; --data_path 0.5,2,6: half a second an image in two starts, but not the first 6."""
    seconds, starts, after = data_path.split(",")
    return Slow(26 if train else 7, float(seconds), int(starts), int(after))
