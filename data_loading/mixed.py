# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Several sources as one data set, in given proportions.

python main_pretrain.py --data_path "photos.tar:0.7,scans/:0.3" --model convnextv2_atto --dry_run
"""

import bisect
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from config.tasks import TASK_OF
from data_loading.images import Images, Samples
from data_loading.labels import order_classes
from errors import UserError, plural


class MixedImages(Dataset):
    """The images of several sources, one after the other; classes of one name are one class.

    shares: parts of the draws for each source, None for as many as it has images. Other attributes
    are those of `Images`.
    """

    def __init__(self, parts: Sequence[Images], shares: Sequence[float] | None = None) -> None:
        self.parts, self.shares, self.what = list(parts), shares, plural(len(parts), "source")
        self.starts = [*itertools.accumulate(map(len, parts), initial=0)]
        self.kind, self.classes, self.targets = parts[0].kind, None, None
        self._join_targets()
        self.weights = self._join_weights()
        self.own_split = next((part.own_split for part in parts if part.own_split), "")

    def _join_targets(self) -> None:
        listed = [part.targets is not None for part in self.parts]
        if not any(listed):
            return
        kinds = {part.kind for part in self.parts}
        if len(kinds) > 1:
            found = [f"{part.path} has --task {TASK_OF[part.kind]}" for part in self.parts]
            raise UserError(f"the sources do not fit together: {', '.join(found)}; give --task")
        names = [[*part.classes] for part in self.parts]
        union = [*dict.fromkeys(itertools.chain(*names))]
        if self.kind == "number" or all(each == names[0] for each in names):
            union = names[0]
        else:
            union = order_classes(union)
        unfit = [part.path for part, own in zip(self.parts, names, strict=True) if own != union]
        if self.kind == "number" and unfit:
            raise UserError(
                f"{unfit[0]} has other columns of numbers than {self.parts[0].path}; name them "
                "with --label_column"
            )
        self.classes = union
        self.targets = np.concatenate(
            [_place(part, own, union) for part, own in zip(self.parts, names, strict=True)]
        )

    def _join_weights(self) -> np.ndarray | None:
        """Return weights of the images: own ones, scaled so that each source has its share."""
        if self.shares is None and not any(part.weights is not None for part in self.parts):
            return None
        lacking = [part.path for part in self.parts if part.weights is None]
        if 0 < len(lacking) < len(self.parts):
            raise UserError(f"{lacking[0]} has no weights and other sources do; add the column")
        found = []
        for part, share in zip(self.parts, self.shares or map(len, self.parts), strict=True):
            own = np.ones(len(part)) if part.weights is None else part.weights
            if not own.sum() > 0:
                raise UserError(f"{part.path}: all weights are 0; expected one above it")
            found.append(own * (share / own.sum()))
        return np.concatenate(found)

    def _find(self, index: int) -> tuple[Images, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self.starts, index) - 1
        return self.parts[number], index - self.starts[number]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        part, own = self._find(index)
        return part[own][0], None if self.targets is None else self.targets[index]

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        part, own = self._find(index)
        return part.read(own)

    @property
    def samples(self) -> Samples:
        """(path, target) of each image, as torchvision's folders have them."""
        return Samples(self)

    def reads(self, path: Path) -> bool:
        """Return True if an existing file is one of the images, or holds or lists some."""
        return any(part.reads(path) for part in self.parts)

    def path_of(self, index: int) -> str:
        """Return the path of an image, or the place that holds it."""
        part, own = self._find(index)
        return part.path_of(own)

    def encoded_names(self) -> list[bytes]:
        """Return the names of the images within their sources."""
        return [name for part in self.parts for name in part.encoded_names()]

    def describe_list(self, is_drawn: bool = True) -> str:
        """Describe the sources, and the files that each leaves out; is_drawn: by their shares."""
        shares, texts = self.shares if is_drawn else None, []
        for number, part in enumerate(self.parts):
            share = f" for {shares[number] / sum(shares):.0%} of the draws" if shares else ""
            texts.append(
                f"{plural(len(part), 'image')} of {part.path}{share}{part.describe_list()}"
            )
        return f"; {'; '.join(texts)}"


Listed = Images | MixedImages  # data sets whose images have names


def refuse_overwriting(written: Iterable[Path], data: Any, checkpoint: str = "") -> None:
    """Raise UserError if a file to write is the checkpoint, or is read by a data set.

    data: also one with another in its attribute `dataset`.
    """
    while not isinstance(data, Listed) and hasattr(data, "dataset"):
        data = data.dataset
    checkpoint = os.path.expanduser(checkpoint)
    for path in filter(Path.is_file, written):
        is_read = os.path.isfile(checkpoint) and path.samefile(checkpoint)
        if is_read or (isinstance(data, Listed) and data.reads(path)):
            raise UserError(f"--output would overwrite {path}, an input; give another name")


def reading_order(data: Any) -> np.ndarray:
    """Return the numbers of the images, (N,), in the order in which they are read fast."""
    if not isinstance(data, Listed):
        return np.arange(len(data))
    orders, start = [], 0
    for images in getattr(data, "parts", [data]):
        order = images.files.order()
        orders.append(start + (np.arange(len(images)) if order is None else order))
        start += len(images)
    return np.concatenate(orders)


def _place(part: Images, own: list[str], union: list[str]) -> np.ndarray:
    """Return the targets of a part with the classes of all parts."""
    if own == union:
        return part.targets
    places = np.array([union.index(name) for name in own], np.int32)
    if part.targets.ndim == 1:
        return places[part.targets]
    rows = np.zeros((len(part), len(union)), part.targets.dtype)
    rows[:, places] = part.targets
    return rows
