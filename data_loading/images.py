# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A data set of image files with labels, whatever holds the files.

python -c "from data_loading.images import Images; print(Images.__doc__)"
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data_loading.arrays import Encoded, load_file
from data_loading.decode import BadImage
from data_loading.files import Files
from data_loading.index import Listing
from data_loading.listing import describe_left_out
from errors import plural


class Images(Dataset):
    """Images with their targets, if they are listed.

    open_files: returns what reads the images of a listing. path: where they come from, for
    messages. what: describes the source. kind: of the targets, class, multi or number; None
    without. classes: names of the classes, or numbers, by label. targets: (N,) labels or (N, K)
    rows. weights: (N,) for sampling, or None. shares: of the sources of a pack, by which its images
    are drawn, in the weights; None without. own_split: what separates training from evaluation
    images in the data, `column split` or `folder val/`; '' if nothing does. archives: files that
    hold or list the images.
    """

    def __init__(
        self,
        open_files: Callable[[Listing], Files],
        listing: Listing,
        path: str,
        what: str = "",
        archives: Sequence[str] = (),
    ) -> None:
        self.open_files, self.listing, self.path, self.what = open_files, listing, path, what
        self.archives = archives
        self.files = open_files(listing)
        facts = listing.metadata
        self.kind, self.classes = facts.get("kind"), facts.get("classes")
        self.own_split: str = facts.get("own_split", "")
        self.targets = listing.arrays.get("targets")
        self.weights, self.shares = listing.arrays.get("weights"), facts.get("shares")

    def __reduce__(self) -> tuple:
        """Let spawned worker processes map an index themselves, and open its files."""
        return Images, (self.open_files, self.listing, self.path, self.what, self.archives)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor | Encoded, Any]:
        target = None if self.targets is None else self.targets[index]
        return load_file(self.read(index)), target

    def read(self, index: int) -> bytes:
        """Return the content of an image file; BadImage if a table or an index names none."""
        try:
            return self.files.read(index)
        except FileNotFoundError as error:
            where = self.line_of(index)
            if where:
                remedy = f"correct {where}, or --image_root"
                raise BadImage("no such file", remedy=remedy) from error
            folder = self.listing.folder
            if folder is None:
                raise
            raise BadImage(
                f"it does not exist, but {folder} lists it",
                remedy=f"the list is old: remove {folder}, and the next run lists the images again",
            ) from error

    @property
    def names(self) -> Sequence[str]:
        """Names of the images, by which they are ordered: paths in the data."""
        return self.listing.names

    def encoded_names(self) -> list[bytes]:
        """Return all names as bytes."""
        return self.listing.names.all_encoded()

    def path_of(self, index: int) -> str:
        """Return the path of an image, or the place that holds it."""
        return self.files.locate(index)

    def reads(self, path: Path) -> bool:
        """Return True if an existing file is one of the images, or holds or lists them."""
        end = os.fsencode(path.name)
        names = enumerate(self.encoded_names())
        found = [self.path_of(index) for index, name in names if name.endswith(end)]
        return any(map(path.samefile, filter(os.path.isfile, (*self.archives, *found))))

    @property
    def samples(self) -> "Samples":
        """(path, target) of each image, as torchvision's folders have them."""
        return Samples(self)

    @property
    def is_table(self) -> bool:
        """True if columns of a table, or of an archive, give the labels."""
        return "columns" in self.listing.metadata

    @property
    def chosen_column(self) -> str:
        """The column that holds the images themselves, '' if none does."""
        return self.listing.metadata.get("image_column", "")

    @property
    def names_files(self) -> bool:
        """True if rows of a table name image files, so that two rows may have the same one."""
        return bool(self.listing.metadata.get("columns", {}).get("image"))

    def line_of(self, index: int) -> str:
        """Return `line 3 of photos.csv`, or '' if the images are not rows of a table."""
        lines = self.listing.arrays.get("lines")
        unit = self.listing.metadata.get("unit")
        return "" if lines is None else f"{unit} {lines[index]} of {self.path}"

    def example_of(self, label: int) -> str:
        """Return the first row, or else image, that has a class: `line 3`, `cat/1.jpg`."""
        has = self.targets == label if self.targets.ndim == 1 else self.targets[:, label]
        index = int(np.argmax(has))
        return self.line_of(index).partition(" of ")[0] or self.names[index]

    def describe_list(self, is_drawn: bool = True) -> str:
        """Describe the files that are left out, and those listed twice; '' if there are none.

        is_drawn: also that a pack is drawn by the shares of its sources.
        """
        shared = self.listing.metadata.get("shared")
        text = f"; in two classes, by links: {plural(shared, 'image')}" if shared else ""
        if self.shares and is_drawn:
            text += f"; drawn by the shares of its {plural(len(self.shares), 'source')}"
        return describe_left_out(self.listing.metadata.get("left_out", {})) + text


class Samples(Sequence):
    """(path, target) of each image; nothing is copied."""

    def __init__(self, images: Any) -> None:
        """images: a data set with `path_of` and `targets`."""
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        number = range(len(self))[index]
        targets = self.images.targets
        return self.images.path_of(number), None if targets is None else targets[number]
