# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Labeled images for the probes of pre-training, and images whose loss is followed.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --probe_data photos --dry_run
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import datasets
from config.flags import LISTED, is_code
from data_loading.dataset import Replacement, TransformedDataset
from data_loading.labels import Head, class_names, describe_one_class, find_outputs, find_positions
from data_loading.loader import DeviceLoader
from data_loading.rng import fold_in_each
from data_loading.samplers import EvalSampler
from data_loading.split import list_labels, list_values, split
from data_loading.summary import describe_outputs
from data_loading.tables import Columns
from data_loading.targets import Targets
from errors import UserError, describe_error, first_few, first_line, plural
from insight.evaluators import few_labels
from parallel.process_group import get_logger, get_rank, get_world_size

STREAM = 0x960BE  # of the draws; --seed does not change the images, so that runs can be compared
MOST_IMAGES = 24_000  # labeled images of a probe, by default
LEAST_IMAGES = 500
SHARE = 0.25  # of the training images that a probe takes at most, by default
TESTED = 6  # one image of so many is scored, the others are learned from
HELD_OUT = 0.2  # of data that has no evaluation images of its own


class JoinedSets(Dataset):
    """Chosen samples of several `TransformedDataset`s, numbered from 0 one set after the other."""

    def __init__(self, sets: Sequence[tuple[TransformedDataset, np.ndarray]]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *(len(places) for _, places in sets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, number: int) -> tuple[TransformedDataset, int]:
        """Return the set of a sample, and its number there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        own, places = self.sets[part]
        return own, int(places[number - self.starts[part]])

    def __getitem__(self, key: tuple[int, int]) -> Any:
        own, place = self.find(key[1])
        sample = own[key[0], place]
        if isinstance(sample, Replacement):
            return sample if sample.sample is None else _numbered(sample.sample, key[1])
        return sample if isinstance(sample, UserError) else _numbered(sample, key[1])

    def name_of(self, number: int) -> str:
        """Return the name of a sample for messages."""
        own, place = self.find(number)
        return own.name_of(place)


def _numbered(sample: tuple, number: int) -> tuple:
    return (*sample[:2], number)


@dataclass(frozen=True)
class ProbeData:
    """Images whose features are probed: training images, and then test images.

    kind: of their labels, None without labels.
    """

    loader: DeviceLoader
    train_count: int
    test_count: int
    kind: str | None = None


# --- labeled images -------------------------------------------------------------------------------


def build_probe_data(args: Any, own: Any, device: torch.device) -> ProbeData:
    """Build the images that the flags choose: labeled ones if there are any, or images to train on.

    own: the raw training data of the run. UserError if --probe_data has no labels, or one class;
    labels of the training data that cannot be used are reported in the log.
    """
    wanted = args.probe_images or default_images(len(own))
    try:
        train, test = open_pair(args, args.probe_data, own)
    except UserError as error:
        if args.probe_data:
            raise UserError(f"--probe_data {args.probe_data}: {error}") from error
        text = "probes: no labels in the training data (%s); --probe_data DATA gives some"
        if args.probe_label_column:
            raise
        get_logger().info(text, first_line(error).partition("; expected")[0])
        return _unlabeled(args, own, min(wanted, len(own)), device)
    test_count = min(len(test), max(wanted // TESTED, 1))
    train_count = min(len(train), max(wanted - test_count, 1))
    kind = train.kind
    sets = [
        (train, choose(train.dataset, train_count, kind)),
        (test, choose(test.dataset, test_count, kind)),
    ]
    loader = build_probe_loader(args, JoinedSets(sets), device)
    counts = [len(places) for _, places in sets]
    names = f" ({first_few(train.classes)})" if train.classes else ""
    get_logger().info(
        "probes: labels of %s: %d training and %d test images, %s%s",
        args.probe_data or "the training data",
        *counts,
        describe_outputs(train.nb_classes, kind).strip(),
        names,
    )
    return ProbeData(loader, *counts, kind)


def _unlabeled(args: Any, own: Any, count: int, device: torch.device) -> ProbeData:
    whole = _transformed(args, own, None)
    places = choose(own, count, kind="")
    return ProbeData(build_probe_loader(args, JoinedSets([(whole, places)]), device), count, 0)


def default_images(images: int) -> int:
    """Return the labeled images of a probe, so that it costs few percent of 10 epochs.

    images: of an epoch of the run.
    """
    return int(min(MOST_IMAGES, max(LEAST_IMAGES, SHARE * images)))


def choose(data: Any, count: int, kind: str = "class") -> np.ndarray:
    """Return the sorted numbers of `count` or nearly as many samples, of each class its share.

    They depend on the numbers of the samples alone. Without listed labels, or with fewer images
    than classes, classes get what chance gives them.
    """
    if count >= len(data):
        return np.arange(len(data))
    labels = list_labels(data) if kind == "class" else None
    if labels is not None and count >= len(np.unique(labels)):
        return few_labels(torch.from_numpy(np.array(labels)), count / len(data), STREAM).numpy()
    draws = fold_in_each(np.arange(len(data)), STREAM)
    return np.sort(np.argsort(draws, kind="stable")[:count])


def open_pair(args: Any, path: str, own: Any) -> tuple[TransformedDataset, TransformedDataset]:
    """Open labeled training and test images, with equal class labels.

    path: of --probe_data, '' for the training data of the run. Data without evaluation images of
    its own gives a fifth of its images, of each class.
    """
    train, test = open_labeled(args, path, own, True), open_labeled(args, path, own, False)
    if test is None:
        whole = train
        train, test = (split(whole, HELD_OUT, is_train) for is_train in (True, False))
    kind = getattr(train, "kind", None) or "class"
    names = class_names(train)
    count = len(names) if names is not None else _count_outputs(train, kind)
    if kind == "class" and count < 2:
        problem = describe_one_class(names[0] if names else None)
        raise UserError(f"{problem}; give images of two classes or more")
    head = Head("the probes' training images", names, count, kind)
    positions = None
    if names is not None and (other := class_names(test)) is not None:
        find = find_outputs if kind == "number" else find_positions
        positions = find(other, head, "probe test set")
    return _transformed(args, train, head), _transformed(args, test, head, positions)


def open_labeled(args: Any, path: str, own: Any, train: bool) -> Any:
    """Open one part of labeled data; None for evaluation images that the data does not have."""
    data_set = "auto" if path else args.data_set
    reopens = data_set in LISTED
    if data_set == "folder":
        raise UserError("--data_set folder has no labels")
    as_labeled = train and not reopens  # code gives labels with the images
    data = own if as_labeled else _create(args, path, data_set, train)
    if data is not None and class_names(data) is None and list_values(data, "targets") is None:
        raise UserError("the data set lists neither `classes` nor `targets`")
    return data


def _create(args: Any, path: str, data_set: str, train: bool, labeled: bool = True) -> Any:
    """Create a data set; None for evaluation images that it does not have."""
    columns = Columns() if path else datasets.build_columns(args)
    spec = datasets.build_spec(
        args,
        data_path=path or args.data_path,
        eval_data_path=None,
        data_index=f"{args.data_index}/probes" if args.data_index else "",
        columns=replace(columns, labels=tuple(args.probe_label_column or ())),
        labeled=labeled,
    )
    try:
        return datasets.create_dataset(data_set, spec, train)
    except UserError as error:  # such as no folder val/, no column of splits
        if train:
            text = str(error).replace("--label_column", "--probe_label_column")
            raise UserError(text.replace(f"--data_path {path}: ", "")) from error
        if path or not labeled:  # once
            text = "probes: no evaluation images in %s (%s)"
            get_logger().info(text, path or "the data", first_line(error).split(";")[0])
        return None
    except Exception as error:
        if train or not is_code(data_set):
            raise
        text = "probes: %s has no evaluation images (%s)"
        get_logger().info(text, data_set, describe_error(error))
        return None


def _count_outputs(data: Any, kind: str) -> int:
    targets = list_values(data, "targets")
    if kind != "class":
        return targets.shape[1] if targets.ndim == 2 else 1
    return int(targets.max()) + 1


def _transformed(
    args: Any, data: Any, head: Head | None, positions: Sequence[int] | None = None
) -> TransformedDataset:
    """Apply the transform of evaluation; head: None for images without labels."""
    found = datasets.eval_dataset(data, args, "leave out")  # no bad one may end the run
    if head is not None:
        found.classes = head.names
        found.expect(Targets(head.kind, head.count, positions))
    return found


def build_probe_loader(args: Any, data: Dataset, device: torch.device) -> DeviceLoader:
    """Build this rank's loader of the images, each of which comes once over all ranks."""
    sampler = EvalSampler(len(data), get_rank(), get_world_size())
    loader = datasets.build_workers(data, sampler, args.batch_size, args, drop_last=False)
    return DeviceLoader(loader, device, *datasets.build_mean_and_std(args))


# --- images whose loss is followed ----------------------------------------------------------------


def open_held_out(args: Any, own: Any) -> tuple[Any, bool]:
    """Return images for the loss on a fixed set, and True if the run does not train on them.

    They are the evaluation images of the data, or without any the training images themselves.
    """
    held = _create(args, "", args.data_set, False, labeled=args.data_set not in LISTED)
    return (own, False) if held is None or len(held) == 0 else (held, True)


def describe_held_out(count: int, is_held_out: bool) -> str:
    """Return a text for the log about the images of `open_held_out`."""
    if is_held_out:
        return f"holdout_loss of {plural(count, 'evaluation image')}"
    return f"fixed_train_loss of {plural(count, 'training image')} (the data has no others)"
