# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A fingerprint of the images of a data set: equal for equal names, labels and sizes.

python -c "from data_loading import fingerprint; print(fingerprint.__doc__)"

It is the BLAKE2b hash of what the list of the images knows; no image is read:

    number of images, names of the classes, kind of the labels
    of each image its name within the data, label, weight, and size in an archive
    with --val_split or --label_fraction the numbers of the chosen images
    of several sources their shares

Of an array of more than 64 MiB, 1,024 evenly spaced blocks of 64 KiB are hashed, so that the time
does not grow with the number of images. Data sets without a list, as most of a user's own, are
known by the name of their class, their length, `classes`, and `targets` and `weights` if there are
any.
"""

import hashlib
import json
from typing import Any

import numpy as np

from data_loading.images import Images
from data_loading.labels import class_names
from data_loading.mixed import Listed, MixedImages
from data_loading.split import Part, list_values

WHOLE = 64 << 20  # bytes of an array that is hashed as a whole
BLOCKS, BLOCK = 1024, 64 << 10  # number and bytes of the blocks of a larger one
SIZES = ("size", "file_size")  # arrays of a list with the bytes of each image


def fingerprint(dataset: Any) -> str:
    """Return 16 hexadecimal digits for the images of a data set and their labels."""
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, dataset)
    return digest.hexdigest()


def describe_source(dataset: Any) -> str:
    """Return the paths of the images, '' if the data set tells none."""
    if isinstance(dataset, Part):
        return describe_source(dataset.dataset)
    if isinstance(dataset, MixedImages):
        return ", ".join(part.path for part in dataset.parts)
    return dataset.path if isinstance(dataset, Images) else ""


def _add(digest: Any, dataset: Any) -> None:
    if isinstance(dataset, Part):
        _add_facts(digest, "part", len(dataset))
        _add_array(digest, "indices", np.asarray(dataset.indices, np.int64))
        return _add(digest, dataset.dataset)
    kind, classes = getattr(dataset, "kind", None), class_names(dataset)
    name = "images" if isinstance(dataset, Listed) else type(dataset).__qualname__
    _add_facts(digest, name, len(dataset), kind, None if classes is None else [*classes])
    if isinstance(dataset, MixedImages):
        _add_facts(digest, "shares", [*map(float, dataset.shares or ())])
        for part in dataset.parts:
            _add(digest, part)
        return None
    arrays = {key: list_values(dataset, key) for key in ("targets", "weights")}
    if isinstance(dataset, Images):
        arrays["names"] = dataset.listing.names.text
        arrays |= {key: dataset.listing.arrays.get(key) for key in SIZES}
    for key, array in arrays.items():
        if array is not None:
            _add_array(digest, key, array)
    return None


def _add_facts(digest: Any, *facts: Any) -> None:
    digest.update(json.dumps(facts, default=str).encode(errors="surrogateescape"))


def _add_array(digest: Any, name: str, array: np.ndarray) -> None:
    """Add an array of any shape, perhaps memory-mapped."""
    _add_facts(digest, name, array.dtype.str, array.shape)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if flat.nbytes <= WHOLE:
        return digest.update(flat)
    for number in range(BLOCKS):
        start = number * (flat.nbytes - BLOCK) // (BLOCKS - 1)
        digest.update(flat[start : start + BLOCK])
    return None
