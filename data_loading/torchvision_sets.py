# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Any data set of torchvision by name, downloaded to --data_path if it is not there.

python main_finetune.py --data_set torchvision:Flowers102 --data_path flowers --dry_run
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets

from config.calls import parse_call
from errors import UserError, first_line, resolve_for
from parallel.process_group import is_main_process, main_process_first

PREFIX = "torchvision:"
# Values of `split` for training and evaluation, in the order in which they are tried.
SPLITS = {True: ("train", "trainval", "train-standard"), False: ("val", "valid", "test")}
LISTS = ("targets", "labels", "_labels", "y")  # attributes with the label of each image


class TorchvisionSet(Dataset):
    """A data set of torchvision; `targets` and `classes` only if it has them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        for name in LISTS:
            values = np.asarray(getattr(dataset, name, None))
            if values.shape == (len(dataset),) and values.dtype.kind in "iu":
                self.targets = values
                break
        for name in ("class_to_idx", "classes", "samples"):
            if (value := getattr(dataset, name, None)) is not None:
                setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def torchvision_set(data_set: str, root: str, train: bool) -> TorchvisionSet:
    """Open `torchvision:NAME`, perhaps with arguments: `torchvision:STL10(split=unlabeled)`.

    A `split` among the arguments is for training; evaluation has `val` or `test`.
    """
    call = parse_call(data_set.removeprefix(PREFIX), "--data_set")
    kinds = {name: getattr(datasets, name) for name in datasets.__all__}
    kind = resolve_for("--data_set", call.name, kinds, "data set of torchvision")
    if call.args:
        raise UserError(f"--data_set {data_set}: expected named arguments, such as split=train")
    found = _accepted(kind)
    folder = str(Path(root).expanduser())

    def find() -> Any:
        given = dict(call.kwargs)
        if "download" in found:
            given.setdefault("download", is_main_process())
        try:
            return _open_part(kind, folder, given, train, found)
        except UserError:
            raise
        except Exception as error:  # also of the network; the other ranks wait for this rank
            raise UserError(
                f"--data_set {data_set}: torchvision cannot open it in {folder} "
                f"({type(error).__name__}: {first_line(error)}); place its files there, or give "
                f"the arguments that it needs: {inspect.signature(kind)}"
            ) from error

    return TorchvisionSet(main_process_first(find))


def _accepted(kind: type) -> set[str]:
    """Return the names of the arguments of a data set, those that it passes on included."""
    found: set[str] = set()
    for each in inspect.getmro(kind):
        if "__init__" in vars(each):
            parameters = inspect.signature(each.__init__).parameters.values()
            found |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return found


def _open_part(
    kind: Callable[..., Any], root: str, given: dict[str, Any], train: bool, accepted: set[str]
) -> Any:
    """Open the training or the evaluation images of a data set."""
    if "train" in accepted:
        return kind(root, **given | {"train": train})
    if "split" not in accepted:
        if train:
            return kind(root, **given)
        raise UserError(
            f"torchvision's {kind.__name__} has no images of its own for evaluation; give "
            "--val_split 0.1"
        )
    if train and "split" in given:
        return kind(root, **given)
    refused = None
    for split in SPLITS[train]:
        try:
            return kind(root, **given | {"split": split})
        except ValueError as error:  # no such split
            refused = error
    raise UserError(
        f"torchvision's {kind.__name__}: {refused}; give it: {kind.__name__}(split=...)"
    )
