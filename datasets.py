# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Data sets by name, and what the flags build of them; `data_pipeline` and `batches` do the rest.

python -c "import datasets; print(list(datasets.DATASETS))"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from data_loading.bad_images import BadImages
from data_loading.builtin import Digits, Synthetic, cifar10, cifar100
from data_loading.dataset import TransformedDataset
from data_loading.folders import DatasetSpec, folder, image_folder, imnet
from data_loading.loader import DeviceLoader, collate, create_loader
from data_loading.samplers import EvalSampler, TrainSampler
from data_loading.transforms import (
    create_eval_transform,
    create_pretrain_transform,
    create_train_transform,
    height_and_width,
    mean_and_std,
)
from errors import UserError, resolve
from parallel.process_group import get_rank, get_world_size

__all__ = [  # with the names of data_pipeline, so that `import datasets` is enough
    "DATASETS",
    "DOWNLOADED",
    "TransformedDataset",
    "DeviceLoader",
    "DatasetSpec",
    "EvalSampler",
    "TrainSampler",
    "build_bad_images",
    "build_batches",
    "build_dataset",
    "build_datasets",
    "build_loader",
    "build_mean_and_std",
    "build_mixup",
    "build_pretrain_dataset",
    "build_transform",
    "check_class_maps",
    "class_map",
    "collate",
    "create_dataset",
    "create_loader",
    "mean_and_std",
]


PATIENCE = 1800.0  # seconds for one sample: half of what ranks wait for each other


# --- data sets: (spec, train) -> map-style dataset of (PIL image or (C, H, W) tensor, label) -----


DATASETS: dict[str, Callable[[DatasetSpec, bool], Any]] = {
    "IMNET": imnet,
    "image_folder": image_folder,
    "folder": folder,
    "CIFAR": cifar100,
    "CIFAR10": cifar10,
    "DIGITS": lambda spec, train: Digits(train),
    "SYNTHETIC": lambda spec, train: Synthetic(spec.input_size, spec.nb_classes or 10, train),
}


DOWNLOADED = ("CIFAR", "CIFAR10")  # where they are not in data_path


def create_dataset(data_set: str, spec: DatasetSpec, train: bool) -> Any:
    """A row of `DATASETS`, or what `package.module:function` makes of (data_path, train).

    The function gets eval_data_path, if given, to evaluate.
    """
    make = resolve(data_set, DATASETS, kind="data set")
    own_path = spec.data_path if train else spec.eval_data_path or spec.data_path
    data = make(spec, train) if data_set in DATASETS else make(own_path, train)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(
            f"--data_set {data_set} made {type(data).__name__}; expected a map-style set"
        )
    if len(data) == 0:
        raise UserError(f"--data_set {data_set}: the {'train' if train else 'val'} set is empty")
    return data


def class_map(dataset: Any) -> dict[str, int] | None:
    """Class name -> label, if the dataset (or the one it wraps) has names."""
    while isinstance(dataset, TransformedDataset):
        dataset = dataset.dataset
    if hasattr(dataset, "class_to_idx"):
        return dict(dataset.class_to_idx)
    names = getattr(dataset, "classes", None)
    return None if names is None else {name: label for label, name in enumerate(names)}


def check_class_maps(train: Any, val: Any) -> None:
    """Raise UserError unless both name the same classes by the same labels (unnamed ones pass)."""
    ours, theirs = class_map(train), class_map(val)
    if ours is None or theirs is None or ours == theirs:
        return
    found = {
        "only in train": [name for name in ours if name not in theirs],
        "only in val": [name for name in theirs if name not in ours],
        "labels differ": [
            f"{name} (train {ours[name]}, val {theirs[name]})"
            for name in ours
            if theirs.get(name, ours[name]) != ours[name]
        ],
    }
    texts = []
    for what, names in found.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        texts += [f"{what}: {', '.join(map(str, names[:5]))}{more}"] if names else []
    raise UserError(
        f"train has {len(ours)} classes, val {len(theirs)}, and they are not the same: "
        f"{'; '.join(texts)}. Labels would shift; give both the same class folders"
    )


# --- what the flags build ------------------------------------------------------------------------


def build_mean_and_std(args: Any) -> tuple[list, list]:
    """`mean_and_std` as the flags say."""
    return mean_and_std(args.in_chans, args.imagenet_default_mean_and_std)


def on_bad_image(is_train: bool, args: Any) -> str:
    """What `TransformedDataset` does; an evaluation must not count another image in place of a bad one."""
    return {"error": "error", "skip": "replace" if is_train else "leave out"}[args.on_bad_image]


def build_bad_images(args: Any, folder: Path | None, *batches: DeviceLoader | None) -> BadImages:
    """The list of images that `--on_bad_image skip` goes without."""
    return BadImages(folder, *batches, active=args.on_bad_image == "skip")


def build_transform(is_train: bool, args: Any) -> Callable:
    """The fine-tuning transform for training or evaluation; yields (C, H, W), not normalised."""
    if not is_train:
        return create_eval_transform(args.input_size, args.crop_pct)
    mean, std = build_mean_and_std(args)
    return create_train_transform(
        args.input_size,
        mean,
        std,
        color_jitter=args.color_jitter,
        aa=args.aa,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        hflip=args.hflip,
        scale=args.scale,
    )


def build_dataset(is_train: bool, args: Any) -> tuple[TransformedDataset, int]:
    """The labelled data set and its number of classes, which --nb_classes may only confirm."""
    if args.data_set == "folder":
        raise UserError(
            "--data_set folder has no labels; expected class folders (--data_set image_folder or "
            "IMNET). Images without labels serve main_pretrain.py"
        )
    spec = DatasetSpec(
        args.data_path,
        args.eval_data_path,
        height_and_width(args.input_size),
        args.nb_classes,
        args.data_index,
    )
    data = create_dataset(args.data_set, spec, is_train)
    names = class_map(data)
    if names is None and args.nb_classes is None:
        raise UserError(
            f"--data_set {args.data_set} names no classes; give their number: --nb_classes"
        )
    if names is not None and args.nb_classes not in (None, len(names)):
        raise UserError(
            f"--nb_classes {args.nb_classes}, but the {'train' if is_train else 'val'} data has "
            f"{len(names)} classes; drop --nb_classes or correct the data"
        )
    nb_classes = args.nb_classes if names is None else len(names)
    transform = build_transform(is_train, args)
    on_bad = on_bad_image(is_train, args)
    return TransformedDataset(
        data, transform, args.seed, args.in_chans, nb_classes, on_bad
    ), nb_classes


def build_datasets(args: Any) -> tuple[TransformedDataset, TransformedDataset | None, int]:
    """(train, val, number of classes), after checking that both number their classes alike.

    No val with --disable_eval.
    """
    train, nb_classes = build_dataset(True, args)
    if args.disable_eval:
        return train, None, nb_classes
    val, _ = build_dataset(False, args)
    check_class_maps(train, val)
    return train, val, nb_classes


def build_pretrain_dataset(args: Any) -> TransformedDataset:
    """The training images of any data set; their labels are passed on but mean nothing here."""
    size = height_and_width(args.input_size)
    spec = DatasetSpec(args.data_path, input_size=size, data_index=args.data_index)
    data = create_dataset(args.data_set, spec, train=True)
    transform = create_pretrain_transform(size, args.scale, args.hflip)
    on_bad = on_bad_image(True, args)
    return TransformedDataset(data, transform, args.seed, args.in_chans, on_bad=on_bad)


def build_loader(dataset: TransformedDataset, is_train: bool, args: Any) -> DataLoader:
    """This rank's loader: permute whole batches to train, each image once to evaluate."""
    rank, world_size = get_rank(), get_world_size()
    patience = PATIENCE if args.data_timeout is None else args.data_timeout
    if not is_train:
        sampler = EvalSampler(len(dataset), rank, world_size, args.dist_eval)
        size = int(1.5 * args.batch_size)  # as official; no activations are kept for a backward
        return create_loader(
            dataset, sampler, size, args.num_workers, args.pin_mem, timeout=patience
        )
    needed, fits = args.batch_size * world_size, len(dataset) // world_size
    if len(dataset) < needed:
        fix = (
            f"use --batch_size {fits} or less" if fits else f"use at most {len(dataset)} processes"
        )
        raise UserError(
            f"{len(dataset)} training images, but one global batch takes {needed} "
            f"({args.batch_size} x {world_size} processes); {fix}"
        )
    sampler = TrainSampler(len(dataset), args.seed, rank, world_size)
    workers = args.num_workers
    return create_loader(dataset, sampler, args.batch_size, workers, args.pin_mem, True, patience)


def build_batches(
    dataset: TransformedDataset, is_train: bool, args: Any, device: Any
) -> DeviceLoader:
    """`build_loader`'s batches, normalised on the device."""
    return DeviceLoader(build_loader(dataset, is_train, args), device, *build_mean_and_std(args))


def build_mixup(args: Any, nb_classes: int) -> Callable | None:
    """timm's mixup and cutmix of a batch, (images, labels) -> (images, soft labels), or None."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=nb_classes,
    )
