# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images in folders: one folder per class, or flat and nested ones without labels.

python -c "from data_loading.folders import list_folder; print(list_folder('assets', False).names)"
"""

import os
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_loading.files import Files, Names
from data_loading.formats import extensions
from data_loading.index import Listing
from data_loading.labels import order_classes
from data_loading.listing import FolderWalk, SharedImages, class_folders, describe_left_out
from errors import UserError, first_few, plural
from parallel.process_group import get_logger


class FolderFiles(Files):
    """Image files below `root`; names may also be full paths."""

    def __init__(self, root: str, listing: Listing) -> None:
        self.root, self.names = root, listing.names

    def read(self, number: int) -> bytes:
        """Return the content of an image file."""
        with open(self.locate(number), "rb", buffering=0) as file:
            return file.read()

    def size(self, number: int) -> int:
        """Return the bytes of an image file."""
        return os.stat(self.locate(number)).st_size

    def locate(self, number: int) -> str:
        """Return the path of an image file."""
        return os.path.join(self.root, self.names[number])


def list_folder(root: str, labeled: bool, leave_out_empty: bool = False) -> Listing:
    """List the images below `root`, links followed; labeled: one folder per class.

    leave_out_empty: classes without images are left out, not refused. arrays: `targets`, (N,) the
    class of each image, if labeled. UserError if there are no images.
    """
    left_out: Counter[str] = Counter()
    names = order_classes(class_folders(root, left_out)) if labeled else [""]
    packed, counts, shared = _walk(root, names, left_out)
    empty, rest = [name for name in names if not counts[name]], describe_left_out(left_out)
    if not labeled and empty:
        raise UserError(f"{root}: no images; expected some of {' '.join(extensions())}{rest}")
    if leave_out_empty and len(empty) < len(names):
        names = [name for name in names if counts[name]]
        if empty:
            found = plural(len(empty), "class folder")
            text = "%s: left out %s without images: %s"
            get_logger().warning(text, root, found, first_few(empty))
    elif not names:
        raise UserError(
            f"{root} has no class folders; expected one folder of images per class, or a table of "
            f"labels{rest}"
        )
    elif empty:
        raise UserError(
            f"{root}: no images in {plural(len(empty), 'class folder')}: {first_few(empty)}; "
            f"expected some of {' '.join(extensions())}: fill or remove empty folders{rest}"
        )
    arrays, metadata = {}, {"left_out": dict(left_out), "shared": shared}
    if labeled:
        labels = {name: label for label, name in enumerate(names)}
        order = [name for name in counts if name in labels]
        found = [labels[name] for name in order]
        arrays["targets"] = np.repeat(np.array(found, np.int32), [counts[n] for n in order])
        metadata |= {"classes": names, "kind": "class"}
    return Listing(packed, arrays, metadata)


def _walk(
    root: str, names: Sequence[str], left_out: Counter[str]
) -> tuple[Names, dict[str, int], int]:
    """Return the images of all class folders in order, their numbers by class, and those shared."""
    text, ends, counts = bytearray(), array("q", [0]), {}
    shared, labels = SharedImages(root, names), {name: label for label, name in enumerate(names)}
    for name in sorted(names, key=os.fsencode):
        walk, before = FolderWalk(root, name, left_out), len(ends)
        for file in walk.in_order():
            text += os.fsencode(file) + b"\0"
            ends.append(len(text))
        counts[name] = len(ends) - before
        shared.add(walk.by_links, labels[name])
    packed = Names(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))
    return packed, counts, len(shared.shared)
