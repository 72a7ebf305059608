# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Datasets by name, and the datasets, transforms and loaders that the flags describe.

python -c "import datasets; print(list(datasets.DATASETS))"
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from config.sizes import batch_sizes, describe_size, describe_sizes, sizes_by_epoch
from config.tasks import OF_TABLES, known_kind
from data_loading.augment import Augmentation
from data_loading.builtin import Digits, Synthetic, cifar
from data_loading.dataset import TransformedDataset
from data_loading.images import Images
from data_loading.labels import (
    Head,
    check_column,
    class_names,
    describe_one_class,
    find_outputs,
    find_positions,
    order_of_head,
)
from data_loading.loader import DeviceLoader
from data_loading.mixed import Listed, MixedImages
from data_loading.outputs import (
    check_table,
    choose_scale,
    count_outputs,
    find_kind,
    head_to_keep,
    own_count,
)
from data_loading.ram_cache import hold_in_ram
from data_loading.samplers import EvalSampler, TrainSampler, balance, check_global_batch
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import Part, keep_fraction, list_labels, list_values, split
from data_loading.stages import ByEpoch, by_epoch
from data_loading.summary import log_dataset
from data_loading.tables import Columns
from data_loading.targets import Targets
from data_loading.torchvision_sets import PREFIX, torchvision_set
from data_loading.transforms import (
    build_augmentation,
    build_mean_and_std,
    create_eval_transform,
    create_pretrain_transform,
    create_train_transform,
    height_and_width,
)
from data_loading.tta import ONE_VIEW, build_views
from data_loading.tuning import Tuner, first_workers, most_workers
from data_loading.workers import WatchedLoader
from errors import UserError, resolve
from parallel.process_group import get_logger, get_rank, get_world_size

SAMPLE_TIMEOUT = 1800.0  # seconds, half of the time that ranks wait for each other

# Functions (spec, train) -> map-style dataset of (PIL image or (C, H, W) tensor, label).
DATASETS: dict[str, Callable[[DatasetSpec, bool], Any]] = {
    "auto": partial(open_images, "auto"),
    "IMNET": partial(open_images, "IMNET"),
    "image_folder": partial(open_images, "image_folder"),
    "folder": partial(open_images, "folder"),
    "table": partial(open_images, "table"),
    "CIFAR": lambda spec, train: cifar(CIFAR100, spec.data_path, train),
    "CIFAR10": lambda spec, train: cifar(CIFAR10, spec.data_path, train),
    "DIGITS": lambda spec, train: Digits(train),
    "SYNTHETIC": lambda spec, train: Synthetic(spec.input_size, spec.nb_classes or 10, train),
}


def create_dataset(data_set: str, spec: DatasetSpec, train: bool) -> Any:
    """Create a dataset of `DATASETS`, or call `package.module:function` with (data_path, train).

    `torchvision:NAME` is one of torchvision. The function gets eval_data_path instead, if given,
    for train=False.
    """
    if data_set.startswith(PREFIX):
        data = torchvision_set(data_set, spec.data_path, train)
    elif data_set in DATASETS:
        data = DATASETS[data_set](spec, train)
    else:
        own_path = spec.data_path if train else spec.eval_data_path or spec.data_path
        data = resolve(data_set, DATASETS, kind="data set")(own_path, train)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UserError(
            f"--data_set {data_set} returned {type(data).__name__}, expected a map-style dataset"
        )
    if len(data) == 0:
        raise UserError(f"--data_set {data_set}: the {'train' if train else 'val'} set is empty")
    return data


def create_unlabeled(data_set: str, spec: DatasetSpec, train: bool, problem: UserError) -> Any:
    """Create a data set without its labels, which raised `problem`.

    That is raised again if the images cannot be opened either, since it says more, and if a column
    of labels was named.
    """
    try:
        data = create_dataset(data_set, replace(spec, labeled=False), train)
    except UserError:
        raise problem from None
    if isinstance(data, Images) and spec.columns.labels:
        raise problem
    return data


def on_bad_image(is_train: bool, args: Any) -> str:
    """Return `on_bad` of `TransformedDataset`; evaluation must not count another image instead."""
    return {"error": "error", "skip": "replace" if is_train else "leave out"}[args.on_bad_image]


def build_transform(is_train: bool, args: Any) -> Callable:
    """Build the fine-tuning transform; yields (C, H, W) before normalization."""
    if not is_train:
        five_crop = build_views(args).crops > 1
        return create_eval_transform(args.input_size, args.crop_pct, five_crop)
    return _train_transform(args, create_train_transform)


def _train_transform(args: Any, create: Callable[[Any, Augmentation], Callable]) -> Any:
    """Build the transform of the training images, or several if it changes with the epoch."""
    sizes, off = ByEpoch(sizes_by_epoch(args)), vars(args).get("aug_off_epoch", 0)
    whole = build_augmentation(args)
    parts = {
        epoch: create(sizes.at(epoch), whole.geometric() if 0 < off <= epoch else whole)
        for epoch in sorted({*sizes.parts, off})
    }
    return by_epoch(parts)


def build_dataset(
    is_train: bool, args: Any, head: Head | None = None, resumes: bool = False
) -> tuple[TransformedDataset, int]:
    """Build the labeled dataset; returns it and its number of classes, or of other outputs.

    head: its labels become positions in this head, found by class name. Evaluation data may lack
    some of its classes; training data of other classes keeps its own order, or is refused if the
    run that has this head resumes.
    """
    kept = head if resumes or not is_train else None
    data, part = _create_labeled(is_train, args, kept), "train" if is_train else "val"
    kind = find_kind(data, args, kept)
    if is_train and args.label_fraction < 1:
        data = keep_fraction(data, args.label_fraction, args.seed, kind)
    names = classes = class_names(data)
    if is_train and head and names is not None:
        rows = data.dataset if isinstance(data, Part) else data
        in_folders = isinstance(rows, Images) and not rows.is_table
        head = head_to_keep(names, head, resumes, kind, in_folders)
    elif is_train and head and not resumes:
        own = own_count(data, kind) or args.nb_classes
        head = head if kind == head.kind == "number" and head.count == own else None
    positions = None
    if head and names is not None:
        find = find_outputs if kind == "number" else find_positions
        check_table(data, names, head, part)
        positions = find(names, head, part)
        classes = head.names or (order_of_head(names, head)[0] if kind != "number" else names)
    elif head and head.names is not None:
        text = "%s has no class names, so its labels are taken for positions in %s"
        get_logger().info(text, part, head.source)
    count = count_outputs(data, args, head, kind, part)
    used = describe_sizes(args) if is_train else describe_size(args.input_size)
    log_dataset(data, is_train, used, count, kind)
    hold_images(data, args, part)
    dataset = TransformedDataset(
        data,
        build_transform(is_train, args),
        args.seed,
        args.in_chans,
        count,
        on_bad_image(is_train, args),
        classes=classes,
    )
    scale = choose_scale(data, args, head, classes) if kind == "number" else None
    dataset.expect(Targets(kind, count, positions, scale))
    dataset.map_values(vars(args).get("value_range"))
    return dataset.decode_fast(is_train and vars(args).get("decode") == "fast"), count


def _create_labeled(is_train: bool, args: Any, head: Head | None) -> Any:
    """Create the data set that the flags name, or with --val_split a part of the training data."""
    if args.data_set == "folder":
        raise UserError(
            "--data_set folder has no labels, so main_pretrain.py alone can use it; expected class "
            "folders: --data_set image_folder or IMNET"
        )
    spec = build_spec(
        args,
        nb_classes=args.nb_classes or (head.count if head and not is_train else None),
        kind=known_kind(vars(args)) or (head.kind if head else None),
        columns=build_columns(args, args.label_column, args.weight_column, is_train),
    )
    splits = args.val_split > 0
    with naming_source(args, head):
        data = create_dataset(args.data_set, spec, is_train or splits)
    if splits:
        if isinstance(data, Listed) and data.own_split:
            raise UserError(
                f"--val_split: {args.data_path} has evaluation data of its own ({data.own_split}); "
                "drop --val_split"
            )
        data = split(data, args.val_split, is_train)
    rows = data.dataset if isinstance(data, Part) else data
    is_table = isinstance(rows, Images) and rows.is_table
    check_columns(rows, args)
    for part in _tables(rows) if is_train and spec.kind is None else ():
        if part.listing.metadata.get("classes_of_cells"):
            column = part.listing.metadata["columns"]["labels"][0]
            check_column(part.classes, part.example_of, f"{part.path}: {column}")
    if is_train and is_table and rows.kind == "class" and len(rows.classes) == 1:
        raise UserError(
            f"{args.data_path}: {describe_one_class(rows.classes[0], 'rows')}. For yes or no give "
            "a column of 0 and 1 and --task multi_label; for a number --task regression"
        )
    return data


def _tables(data: Any) -> list[Images]:
    """Return the parts of a data set whose labels are in columns."""
    parts = data.parts if isinstance(data, MixedImages) else [data]
    return [part for part in parts if isinstance(part, Images) and part.is_table]


def check_columns(data: Any, args: Any) -> None:
    """Raise UserError for given flags of columns where the data has none, or no image files."""
    given = [n for n in OF_TABLES if n in getattr(args, "given", ()) and vars(args).get(n)]
    for images in data.parts if isinstance(data, MixedImages) else [data]:
        if given and isinstance(images, Images) and not images.is_table:
            raise UserError(f"--{given[0]}: {images.path} has no columns; drop it, or give a table")
        if isinstance(images, Images) and not images.names_files:
            for name in given:
                if name == "image_root" or (name == "image_column" and not images.chosen_column):
                    raise UserError(f"--{name}: {images.path} holds the images itself; drop it")


@contextlib.contextmanager
def naming_source(args: Any, head: Head | None) -> Iterator[None]:
    """Add the checkpoint to an error about a flag that comes from it, and was not typed."""
    try:
        yield
    except UserError as error:
        given = getattr(args, "given", OF_TABLES)
        names = [name for name in OF_TABLES if f"--{name}:" in str(error) and name not in given]
        if not (names and head):
            raise
        raise UserError(f"{error} --{names[0]} is taken from {head.source}; give it") from error


def build_spec(args: Any, **changes: Any) -> DatasetSpec:
    """Build the settings of `create_dataset`; changes: of its fields, such as labeled=False."""
    spec = DatasetSpec(
        args.data_path,
        vars(args).get("eval_data_path"),
        data_index=args.data_index,
        columns=build_columns(args),
        skip_missing=args.on_bad_image == "skip",
    )
    if "input_size" in vars(args):
        spec = replace(spec, input_size=height_and_width(args.input_size))
    return replace(spec, **changes)


def build_columns(
    args: Any, labels: Sequence[str] | None = (), weight: str | None = None, is_train: bool = True
) -> Columns:
    """Build the names of the columns of a table; evaluation leaves the weights out."""
    weights = (weight, None) if is_train else (None, weight)
    return Columns(args.image_column, labels or (), args.split_column, *weights, args.image_root)


def build_datasets(
    args: Any, head: Head | None = None, resumes: bool = False
) -> tuple[TransformedDataset, TransformedDataset | None, int]:
    """Build (train, val, number of classes) with equal class labels; val is None if disabled.

    head: of the weights that the run starts from. resumes: the run itself continues.
    """
    train, nb_classes = build_dataset(True, args, head, resumes)
    if args.disable_eval:
        return train, None, nb_classes
    val, _ = build_dataset(False, args, train.head("train"))
    return train, val, nb_classes


def count_labels(dataset: TransformedDataset, nb_classes: int) -> Tensor:
    """(K,) float64, the number of images of each class, in the order of the head.

    UserError if the data set does not list its labels, since reading all images may take hours.
    """
    labels = list_labels(dataset.dataset)
    if labels is None:
        raise UserError(
            "--class_weights: the data set does not list its labels; give it a list `targets` with "
            "the label of each image, or pass weights such as --class_weights [1,2.5]"
        )
    if dataset.positions is not None:
        labels = np.asarray(dataset.positions)[labels]
    if labels.min() < 0 or labels.max() >= nb_classes:
        got = f"labels from {labels.min()} to {labels.max()}"
        raise UserError(f"`targets` of the data set has {got}; expected 0 to {nb_classes - 1}")
    return torch.from_numpy(np.bincount(labels, minlength=nb_classes)).double()


def hold_images(data: Any, args: Any, part: str) -> None:
    """Hold the image files in memory if the flags ask for it; --eval reads them once anyway."""
    if vars(args).get("ram_cache") and not vars(args).get("eval"):
        hold_in_ram(data, part, args.dry_run)


def build_pretrain_dataset(args: Any) -> TransformedDataset:
    """Build the training images of any dataset; pre-training ignores their labels."""
    data = create_dataset(args.data_set, build_spec(args, labeled=False), train=True)
    check_columns(data, args)
    log_dataset(data, True, describe_sizes(args))
    hold_images(data, args, "train")
    transform, on_bad = _train_transform(args, create_pretrain_transform), on_bad_image(True, args)
    dataset = TransformedDataset(data, transform, args.seed, args.in_chans, on_bad=on_bad)
    dataset.map_values(vars(args).get("value_range"))
    return dataset.decode_fast(vars(args).get("decode") == "fast")


def eval_dataset(data: Any, args: Any, on_bad: str | None = None) -> TransformedDataset:
    """Return images as an evaluation reads them, without labels.

    on_bad: of `TransformedDataset`; default: that of an evaluation.
    """
    on_bad, transform = on_bad or on_bad_image(False, args), build_transform(False, args)
    dataset = TransformedDataset(data, transform, 0, args.in_chans, on_bad=on_bad)
    return dataset.map_values(vars(args).get("value_range"))


def build_reader(
    dataset: TransformedDataset, args: Any, device: torch.device | str
) -> DeviceLoader:
    """Build a loader whose `reload` reads chosen images, in this process."""
    return DeviceLoader(WatchedLoader(dataset, [], 1), device, *build_mean_and_std(args))


def build_loader(
    dataset: TransformedDataset, is_train: bool, args: Any, device: torch.device | str
) -> DeviceLoader:
    """Build this rank's loader: shuffled full batches to train, every image once to evaluate."""
    rank, world_size = get_rank(), get_world_size()
    if is_train:
        batch_size: int | ByEpoch = ByEpoch(batch_sizes(args))
        weights = build_weights(dataset, vars(args).get("sampling", "shuffle"))
        sampler = TrainSampler(
            len(dataset), args.seed, rank, world_size, weights, args.num_samples, args.aug_repeats
        )
        largest = max(batch_size.parts.values())
        check_global_batch(sampler, largest, grown=largest > args.batch_size)
    else:
        batch_size = int(1.5 * args.batch_size)  # as official: no backward
        sampler = EvalSampler(len(dataset), rank, world_size, args.dist_eval)
    loader = build_workers(dataset, sampler, batch_size, args, drop_last=is_train)
    if args.num_workers is None and is_train and not vars(args).get("dry_run"):
        loader.tuner = Tuner(most_workers())
    views = ONE_VIEW if is_train else build_views(args)
    return DeviceLoader(loader, device, *build_mean_and_std(args), views)


def build_workers(
    dataset: TransformedDataset, sampler: Any, batch_size: int | ByEpoch, args: Any, **options: Any
) -> WatchedLoader:
    """Build a loader of this rank's samples; options: more of them for DataLoader."""
    return WatchedLoader(
        dataset,
        sampler,
        batch_size,
        first_workers() if args.num_workers is None else args.num_workers,
        SAMPLE_TIMEOUT if args.data_timeout is None else args.data_timeout,
        pin_memory=args.pin_mem and torch.cuda.is_available(),  # without CUDA torch warns
        **options,
    )


def build_weights(dataset: TransformedDataset, sampling: str) -> Tensor | None:
    """Build the weights by which images are drawn, None to take each once an epoch."""
    data = dataset.dataset.dataset if isinstance(dataset.dataset, Part) else dataset.dataset
    if isinstance(data, Listed) and data.shares:
        if sampling == "balanced":
            raise UserError("--sampling balanced and the weights of --data_path: drop one of them")
        sampling = "weighted"
    if sampling == "shuffle":
        return None
    name = "weights" if sampling == "weighted" else "targets"
    if sampling == "balanced" and dataset.kind == "number":
        raise UserError("--sampling balanced needs classes, and the data has numbers; use weighted")
    if sampling == "balanced" and dataset.kind == "class":
        values = list_labels(dataset.dataset)
    else:
        values = list_values(dataset.dataset, name)
    if values is None:
        raise UserError(
            f"--sampling {sampling}: the data set does not list {name}; give it a list `{name}` "
            f"with the {'weight' if name == 'weights' else 'label'} of each image"
        )
    weights = torch.as_tensor(np.array(values))  # a copy: torch warns of read-only memory
    if sampling == "balanced":
        return balance(weights)
    weights = weights.double()
    if not (weights.isfinite() & (weights >= 0)).all() or not weights.sum() > 0:
        raise UserError("--sampling weighted: expected weights of at least 0, one above 0")
    return weights
