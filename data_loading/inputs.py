# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images that a command names: files, patterns, and all that --data_path takes, in their order.

python predict.py runs/finetune photos "more/*.jpg" shards.tar
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np

from config.paths import PATTERN
from data_loading import parquet
from data_loading.arrange import DatasetSpec
from data_loading.files import Names
from data_loading.folders import FolderFiles
from data_loading.formats import extensions
from data_loading.images import Images
from data_loading.index import Listing
from data_loading.mixed import MixedImages, reading_order
from data_loading.sources import UnknownSource, open_images
from data_loading.split import Part
from errors import UserError


@dataclass(frozen=True)
class Inputs:
    """Opens the paths of a command as one data set.

    spec: of each path, but for the path. layout: as in `open_images`. train: take the part for
    training, where the data has several. flag: that names the paths, for messages. is_own: they
    are data of their own, not the data of a run, so they need not say which part is which.
    """

    spec: DatasetSpec
    layout: str = "auto"
    train: bool = True
    flag: str = "--images"
    is_own: bool = False

    def open(self, paths: Sequence[str]) -> MixedImages:
        """Open the images of all paths, one after the other; UserError if one has none."""
        parts: list[Images] = []
        expanded = (path for given in paths for path in self.expand(given))
        for is_file, names in groupby(expanded, key=self._is_image_file):
            group = [*names]
            opened = [image_files(group)] if is_file else map(self._open, group)
            parts += [images for each in opened for images in getattr(each, "parts", [each])]
        lacking = [part.path for part in parts if part.targets is None and self.spec.labeled]
        if lacking:
            raise UserError(
                f"{self.flag} {lacking[0]} has no labels; give a table or class folders"
            )
        return MixedImages(parts)

    def expand(self, path: str) -> list[str]:
        """Return the paths of a pattern of files, in order; other paths as they are."""
        is_path = not PATTERN.search(path) or os.path.exists(os.path.expanduser(path))
        if is_path or path.lower().endswith(".tar") or parquet.kind_of(path):
            return [path]
        found = sorted(glob.glob(os.path.expanduser(path), recursive=True))
        endings = tuple(extensions())
        images = [name for name in found if name.lower().endswith(endings)]
        if not found:
            raise UserError(f"{self.flag} {path}: no file matches this pattern; correct it")
        return images or found

    def _is_image_file(self, path: str) -> bool:
        ends_so = path.lower().endswith(tuple(extensions()))
        return ends_so and os.path.isfile(os.path.expanduser(path))

    def _open(self, path: str) -> Images | MixedImages:
        name = "data_path" if self.train or not self.is_own else "eval_data_path"
        try:
            return open_images(self.layout, replace(self.spec, **{name: path}), self.train)
        except UnknownSource:
            return image_files([path])  # of another suffix
        except UserError as error:
            text = str(error)
            for own in ("--data_path", "--eval_data_path"):
                text = text.replace(f"{own} {path}", f"{self.flag} {path}")
            raise UserError(text) from error


def image_files(paths: Iterable[str]) -> Images:
    """Return image files by their paths, which are not looked at before they are read."""
    names = Names.pack(os.fsencode(os.path.expanduser(path)) for path in paths)
    where = names[0] if len(names) else ""
    return Images(partial(FolderFiles, ""), Listing(names, {}, {}), where)


def in_input_order(data: MixedImages) -> Part:
    """Return images in the order of the inputs, and in each in its own: a table by its rows."""
    return Part(data, np.concatenate([*_orders(data)]))


def _orders(data: MixedImages) -> Iterator[np.ndarray]:
    for start, part in zip(data.starts, data.parts, strict=False):
        lines = part.listing.arrays.get("lines")
        order = reading_order(part) if lines is None else np.argsort(lines, kind="stable")
        yield start + order
