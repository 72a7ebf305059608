# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From a stored sample to a batch on the host: transforms, order, loader; see also `decoding`.

python -c "from data_loading import transforms; print(transforms.create_eval_transform(224))"
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import transforms as T
from torchvision.transforms.functional import crop, get_dimensions, pil_to_tensor

from data_loading.decode import UNREADABLE, BadImage, decode, describe
from data_loading.rng import mix, seed_all, shuffled
from data_loading.workers import WatchedLoader, patiently
from errors import UserError

# --- transforms: PIL image or (C, H, W) tensor -> (C, H, W) tensor, uint8 unless float came in ---


def _to_tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def _check_picture(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        raise UserError(
            "--aa and --color_jitter act on 8-bit images of 1 or 3 channels, got "
            f"{describe(image)}; turn them off: --aa none --color_jitter 0"
        )
    return image


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    from timm.data.auto_augment import posterize

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **kwargs)


def _keep_posterize_working(step: Any) -> None:
    """timm's policies ask for 0 bits, which Pillow 13 refuses; it is black, as Pillow had it."""
    policy = getattr(step, "ops", None) or sum(getattr(step, "policy", []), [])
    for op in policy:
        if op.aug_fn.__name__ == "posterize":
            op.aug_fn = _posterize


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """One number is a square's side."""
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    return height, width


class RandomErasing:
    """timm's random erasing for one (C, H, W) image that is not normalised yet."""

    def __init__(self, prob: float, mode: str, count: int, mean: Sequence[float], std: Any):
        from timm.data.random_erasing import RandomErasing as Erase

        if mode not in ("const", "rand", "pixel"):
            raise UserError(f"--remode {mode}: expected const, rand or pixel")
        self.prob = prob
        self.erase = Erase(1.0, mode=mode, max_count=count, device="cpu")
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()).item() >= self.prob:
            return image
        scale = 1 if image.is_floating_point() else 255
        erased = self.erase((image / scale - self.mean) / self.std)
        pixels = (erased * self.std + self.mean) * scale
        return pixels if scale == 1 else pixels.round_().clamp_(0, 255).to(torch.uint8)


def mean_and_std(in_chans: int = 3, imagenet_default: bool = True) -> tuple[list, list]:
    """Per-channel constants for images in 0..1: ImageNet's or Inception's 0.5."""
    mean, std = (
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet_default else ([0.5] * 3,) * 2
    )
    if in_chans == 3:
        return list(mean), list(std)
    return [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans


def create_pretrain_transform(
    input_size: int | Sequence[int], scale: Sequence[float] = (0.2, 1.0), hflip: float = 0.5
) -> T.Compose:
    """Random resized crop (bicubic) and horizontal flip, as MAE and FCMAE."""
    bicubic = T.InterpolationMode.BICUBIC
    crop = T.RandomResizedCrop(
        height_and_width(input_size), scale=tuple(scale), interpolation=bicubic
    )
    return T.Compose([crop, T.RandomHorizontalFlip(hflip), _to_tensor])


def create_train_transform(
    input_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    color_jitter: float | None = None,
    aa: str | None = None,
    interpolation: str = "bicubic",
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    hflip: float = 0.5,
    scale: Sequence[float] | None = None,
) -> T.Compose:
    """timm's ImageNet augmentation, random erasing included.

    Up to 32 pixels a shift (padding 4) of the whole image replaces the random resized crop, as in
    the official code, unless `scale` is other than None or timm's own 0.08 to 1.
    """
    from timm.data import create_transform

    size, aa = height_and_width(input_size), None if (aa or "none").lower() == "none" else aa
    modes = [mode.value for mode in T.InterpolationMode]
    if interpolation not in ("random", *modes):
        raise UserError(
            f"--train_interpolation {interpolation}: expected random, {', '.join(modes)}"
        )
    if aa and color_jitter and "3a" not in aa:  # timm would drop it without a word
        raise UserError(f"--color_jitter {color_jitter} has no effect with --aa {aa}; drop one")
    try:
        steps = create_transform(
            size, is_training=True, use_prefetcher=True, color_jitter=color_jitter or None,
            auto_augment=aa, interpolation=interpolation, hflip=hflip,
            scale=None if scale is None else tuple(scale), mean=tuple(mean), std=tuple(std),
        ).transforms  # fmt: skip
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"--aa {aa}: {error!r}; expected e.g. rand-m9-mstd0.5-inc1") from error
    for step in steps:
        _keep_posterize_working(step)
    if max(size) <= 32 and (scale is None or tuple(scale) == (0.08, 1.0)):
        names = ["bilinear", "bicubic"] if interpolation == "random" else [interpolation]
        whole = [T.Resize(size, interpolation=T.InterpolationMode(name)) for name in names]
        steps[0] = T.Compose([T.RandomChoice(whole), T.RandomCrop(size, padding=4)])
    head = [_check_picture] if aa or color_jitter else []
    tail = [RandomErasing(reprob, remode, recount, mean, std)] if reprob > 0 else []
    return T.Compose([*head, *steps, _to_tensor, *tail])


def _middle(image: Image.Image | Tensor, ratio: float) -> Image.Image | Tensor:
    """Without the ends of an image that is more than `ratio` times as long as it is wide.

    20,000 x 10 pixels would become 512,000 x 256 before the centre is cut out.
    """
    height, width = get_dimensions(image)[1:]
    longest = math.ceil(ratio * min(height, width))
    top, left = (max(0, (side - longest) // 2) for side in (height, width))
    if not (top or left):
        return image
    return crop(image, top, left, height - 2 * top, width - 2 * left)


def create_eval_transform(
    input_size: int | Sequence[int], crop_pct: float | None = None
) -> T.Compose:
    """Shorter side to size / crop_pct, then the centre; bicubic.

    Without `crop_pct`: 224/256 from 33 to 383 pixels; else the whole image, squashed to the size.
    """
    from timm.data import create_transform

    size = height_and_width(input_size)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--crop_pct {crop_pct}: expected above 0 and at most 1, e.g. 0.875")
    if crop_pct is None and (max(size) <= 32 or min(size) >= 384):
        return T.Compose([T.Resize(size, interpolation=T.InterpolationMode.BICUBIC), _to_tensor])
    pct = crop_pct or 224 / 256
    steps = create_transform(size, interpolation="bicubic", crop_pct=pct, use_prefetcher=True)
    ratio = 16 * max(size) / min(size)  # far from what the crop keeps
    return T.Compose([partial(_middle, ratio=ratio / pct), *steps.transforms, _to_tensor])


# --- a sample is a function of (seed, epoch, index) ----------------------------------------------


TRIES = 100  # others in place of an image that cannot be used


class Replaced(NamedTuple):
    """Another sample, or None, in place of those that cannot be used: (name, why) of each."""

    sample: tuple[Tensor, int, int] | None
    bad: list[tuple[str, str]]


class Augmented(Dataset):
    """`dataset` with `transform`, asked by keys (epoch, index) and seeded by (seed, epoch, index).

    Returns (image (C, H, W), label, index), or a UserError where the sample cannot be used: as a
    value, because what a worker raises reaches the user as a long traceback. What a transform
    raises is a bug and stays an exception. on_bad: for an image that cannot be decoded `error`, or
    a `Replaced` that says so: with `replace` it holds another by the hash of (seed, epoch, index),
    which keeps the index and so the mask of its place, with `leave out` none.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        seed: int,
        in_chans: int = 3,
        nb_classes: int | None = None,
        on_bad: str = "error",
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.in_chans, self.nb_classes, self.on_bad = in_chans, nb_classes, on_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | Replaced | UserError:
        index, bad = key[1], []
        for attempt in range(1 + TRIES * (self.on_bad == "replace")):
            draw = (self.seed, *key, attempt) if attempt else (self.seed, *key)
            chosen = mix(*draw) % len(self) if attempt else index
            try:
                image, label = self._load(chosen, draw)
                sample = self.transform(image), label, index
                return Replaced(sample, bad) if bad else sample
            except BadImage as error:
                if self.on_bad == "error":
                    return error
                bad.append((self._file(chosen) or f"image number {chosen}", error.reason))
            except UserError as error:
                return error
        if self.on_bad == "leave out":
            return Replaced(None, bad)
        return UserError(
            f"{TRIES} others in place of {self.name_of(index)} cannot be used either, the last "
            f"{bad[-1][0]} ({bad[-1][1]}); too many to go on without: look at the data"
        )

    def _read(self, index: int, draw: tuple[int, ...]) -> tuple[Image.Image | Tensor, Any]:
        seed_all(*draw)
        item = self.dataset[index]
        sample, label = item if isinstance(item, tuple | list) else (item, None)
        return decode(sample, self.in_chans), label

    def _load(self, index: int, draw: tuple[int, ...]) -> tuple[Image.Image | Tensor, int]:
        try:
            image, label = patiently(partial(self._read, index, draw))
        except (BadImage, *UNREADABLE) as error:
            if isinstance(error, UserError) and not isinstance(error, BadImage):
                raise UserError(f"{self.name_of(index)}: {error}") from error
            reason = str(error)
            if not isinstance(error, BadImage):
                reason = f"{type(error).__name__}: {reason}"
            raise BadImage(
                f"cannot read {self.name_of(index)} ({reason}); replace or remove it, or do "
                "without such images: --on_bad_image skip",
                reason,
            ) from error
        if label is None and self.nb_classes is not None:
            raise UserError(f"{self.name_of(index)} has no label; expected (image, label)")
        label = 0 if label is None else int(label)  # pre-training has no use for it
        if self.nb_classes is not None and not 0 <= label < self.nb_classes:
            expected = f"expected 0 to {self.nb_classes - 1}"
            raise UserError(f"{self.name_of(index)}: label {label}; {expected}")
        return image, label

    def _file(self, index: int) -> str | None:
        entries = getattr(self.dataset, "samples", None)  # (path, label) where there are files
        listed = isinstance(entries, Sequence) and not isinstance(entries, str)
        entry = entries[index] if listed and index < len(entries) else None
        path = entry[0] if isinstance(entry, tuple | list) and entry else entry
        return str(path) if isinstance(path, str | os.PathLike) else None

    def name_of(self, index: int) -> str:
        """`image <its file>`, or `image number 7` where there are no files."""
        return f"image {self._file(index) or f'number {index}'}"


CHUNK = 4096  # keys that are computed at once: fewer take longer each, more the first of them


def keys_at(
    positions: range, length: int, seed: int, epoch: int, shuffle: bool = True
) -> Iterator[tuple[int, int]]:
    """Keys (epoch, index) at some positions of an epoch's order, in little memory at any length."""
    for first in range(0, len(positions), CHUNK):
        part = positions[first : first + CHUNK]
        indices = torch.arange(part.start, part.stop, part.step)
        if shuffle:
            indices = shuffled(indices, length, seed, epoch)
        yield from ((epoch, index) for index in indices.tolist())


class TrainSampler(Sampler):
    """Keys (epoch, index) of one rank: every world_size-th position of the epoch's order.

    All ranks' b-th batches together are one block of that order, whatever the number of ranks.
    """

    def __init__(self, length: int, seed: int, rank: int, world_size: int, shuffle: bool = True):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch, self.seen = 0, 0

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Choose the order; skip its first `seen` images, which all ranks used before a resume."""
        self.epoch, self.seen = epoch, seen

    def __len__(self) -> int:
        return (self.length - self.seen) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        end = self.seen + len(self) * self.world_size
        mine = range(self.seen, end)[self.rank :: self.world_size]
        return keys_at(mine, self.length, self.seed, self.epoch, self.shuffle)


class EvalSampler(Sampler):
    """Keys (0, index): every image once over all ranks, no padding; all on rank 0 if not shared."""

    def __init__(self, length: int, rank: int, world_size: int, dist_eval: bool = True):
        alone = range(length) if rank == 0 else range(0)
        self.indices = range(rank, length, world_size) if dist_eval else alone

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


# --- loader --------------------------------------------------------------------------------------


def collate(samples: list) -> tuple[Tensor, Tensor, Tensor, list] | UserError:
    """Samples -> images (N, C, H, W), labels (N,), ids (N,), what was `Replaced`: (name, why).

    Or the first UserError among them.
    """
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if error is not None:
        return error
    bad = [fault for sample in samples if isinstance(sample, Replaced) for fault in sample.bad]
    samples = [sample.sample if isinstance(sample, Replaced) else sample for sample in samples]
    samples = [sample for sample in samples if sample is not None]
    if not samples:  # all left out
        return torch.empty(0), torch.empty(0), torch.empty(0), bad
    images, labels, ids = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(ids), bad


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to all processes of a job would end the workers that its last update needs.

    They leave with their run: torch's watchdog sees when that is gone.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def create_loader(
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    num_workers: int = 0,
    pin_mem: bool = False,
    drop_last: bool = False,
    timeout: float = 0,
    collate_fn: Callable[[list], Any] = collate,
) -> WatchedLoader:
    """A DataLoader of `collate`d batches whose workers live as long as it does.

    timeout: seconds that a worker may take for one sample; 0: any time.
    """
    return WatchedLoader(
        dataset,
        num_workers,
        timeout,
        _leave_signals_to_the_run,
        sampler=sampler,
        batch_size=max(1, batch_size),
        pin_memory=pin_mem and torch.cuda.is_available(),  # elsewhere torch only warns
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        collate_fn=collate_fn,
    )
