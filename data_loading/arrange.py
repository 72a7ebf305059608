# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The images of a source that belong to training or to evaluation, their order and their labels.

python -c "from data_loading.arrange import Part; help(Part)"
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_loading.files import Folders, Found, Names, sort_by_name
from data_loading.formats import extensions
from data_loading.index import Listing
from data_loading.labels import order_classes
from data_loading.listing import describe_left_out
from data_loading.tables import (
    EVAL,
    SPLITS,
    TRAIN,
    Columns,
    Table,
    choose_columns,
    choose_rows,
    list_table,
    missing_files,
)
from errors import UserError, first_few, plural
from parallel.process_group import get_logger


@dataclass(frozen=True)
class DatasetSpec:
    """Settings for the functions in `DATASETS`; each uses those that concern it."""

    data_path: str | None = None
    eval_data_path: str | None = None
    input_size: tuple[int, int] = (224, 224)
    nb_classes: int | None = None
    data_index: str = ""
    kind: str | None = None  # of the targets of a table; None if its cells tell it
    columns: Columns = Columns()  # of a table
    labeled: bool = True
    skip_missing: bool = False  # image files that a table names
    shuffled: bool = True  # False: the images are read in their order


@dataclass(frozen=True)
class Part:
    """The part of a source to read: for training or for evaluation.

    layout: as in `open_images`. path: of what holds its images. own_split: what separates the
    parts in the data, '' if nothing does. is_own: nothing else is in it.
    """

    layout: str
    path: str
    spec: DatasetSpec
    train: bool
    own_split: str = ""
    is_own: bool = False

    @property
    def may_split(self) -> bool:
        """True if train/ and val/ in it are parts of the data."""
        return self.layout in ("auto", "IMNET")

    def check(self, own_split: str) -> None:
        """Raise UserError if the images of training would be evaluated."""
        if not (self.train or self.is_own or own_split):
            raise UserError(
                f"{self.path} does not say which images are for evaluation: it has no folder val/ "
                "and no column of splits; give --eval_data_path, --split_column, or --val_split 0.1"
            )


def choose_split(folders: Sequence[str], part: Part) -> tuple[str | None, str]:
    """Return the folder of a part if folders are named train, val and so on; and `own_split`.

    (None, "") if they are not: one for training and one to evaluate, or only such names.
    """
    lower = {name.lower(): name for name in folders}
    training = [lower[name] for name in TRAIN if name in lower]
    evaluation = [lower[name] for names in EVAL for name in names if name in lower]
    mine, wanted = (training, "train") if part.train else (evaluation, "val")
    is_split = (training and evaluation) or (folders and {*lower} <= SPLITS)
    if not is_split and part.layout == "auto":
        return None, ""
    if not mine:
        raise UserError(
            f"{part.path} has no folder {wanted}/; expected train/ and val/ with one folder per "
            "class. If class folders are directly in it, drop --data_set or give image_folder; "
            "for images without labels, --data_set folder; without val/, --val_split 0.1"
        )
    return mine[0], f"folder {evaluation[0]}/" if evaluation else ""


def with_facts(listing: Listing, **facts: Any) -> Listing:
    """Return a listing with more metadata."""
    return replace(listing, metadata={**listing.metadata, **facts})


def sorted_by_name(listing: Listing) -> Listing:
    """Return a listing in order of the names."""
    order = sort_by_name(listing.names)
    return listing if order is None else listing.take(order)


def list_rows(table: Table, part: Part) -> tuple[Listing, np.ndarray]:
    """List the rows of a part, and return their numbers too."""
    given, spec = part.spec.columns, part.spec
    columns = choose_columns(table, given, spec.labeled)
    split = columns.split if given.split or not part.is_own else None
    part.check(f"column {split}" * bool(split))
    chosen, rows = choose_rows(table, split, part.train)
    listing = list_table(chosen, columns, spec.kind, spec.labeled)
    own_split = f"column {split}" if len(rows) < len(table) else part.own_split
    return with_facts(listing, own_split=own_split), rows


def check_files(listing: Listing, path: str, root: str, skip_missing: bool) -> None:
    """Raise UserError, or warn with --on_bad_image skip, if image files of a table are missing."""
    missing = missing_files(listing.names, root)
    if not missing:
        return
    lines, names = listing.arrays["lines"], listing.names
    unit = listing.metadata["unit"]
    where = [os.path.join(root, names[row]) for row in missing[:5]]
    texts = [f"{unit} {lines[row]}: {file}" for row, file in zip(missing, where, strict=False)]
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    got = f"{len(missing)} of {plural(len(names), 'image file')} do not exist: {', '.join(texts)}"
    if len(missing) == len(names):
        slashes = "; paths need / in place of \\" * any("\\" in file for file in where)
        column = listing.metadata["columns"]["image"]
        raise UserError(
            f"{path}: no image file of column {column} exists ({', '.join(texts[:2])}); give "
            "--image_column, or --image_root for the folder that its paths are relative to"
            + slashes
        )
    if not skip_missing:
        raise UserError(
            f"{path}: {got}{more}; correct the table, or pass over them: --on_bad_image skip"
        )
    get_logger().warning("%s: %s%s", path, got, more)


def arrange(found: Found, part: Part, has_folders: bool = True) -> Listing:
    """List the images of an archive that belong to a part, in order, with their labels.

    Labels come from columns, if the archive has any, or from the folders in it. has_folders: False
    for names in which no folder has a meaning.
    """
    if not len(found.names):
        rest = describe_left_out(found.left_out)
        raise UserError(f"{part.path}: no images; expected some of {' '.join(extensions())}{rest}")
    if not (found.columns or has_folders):
        part.check(part.own_split)
        listing = Listing(found.names, {}, {"own_split": part.own_split})
        chosen = None
    elif found.columns:
        rows = np.arange(1, len(found.names) + 1)
        table = Table(part.path, found.columns, rows, "row", found.names, found.class_names)
        listing, chosen = list_rows(table, part)
    else:
        listing, chosen = by_folders(found.names, part)
    places = found.places
    if chosen is not None and len(chosen) < len(found.names):
        places = {name: array[chosen] for name, array in places.items()}
    listing = with_facts(listing, left_out=dict(found.left_out))
    return sorted_by_name(replace(listing, arrays={**listing.arrays, **places}))


def by_folders(names: Names, part: Part) -> tuple[Listing, np.ndarray | None]:
    """List the images of a part by the folders in an archive, and return their numbers too.

    None for all images.
    """
    folders, own_split, chosen = Folders(names), part.own_split, None
    cut_common_folders(folders)
    found, firsts = folders.runs()
    if part.may_split:
        mine, by_folder = choose_split(sorted({*found} - {""}), part)
        if mine is not None:
            own_split = own_split or by_folder
            held = [folder == mine for folder in found]
            chosen = np.flatnonzero(np.repeat(held, _lengths(firsts, len(names))))
            cut, folders = folders.cut + 1, Folders(names.take(chosen))
            folders.cut = cut
            found, firsts = folders.runs()
    part.check(own_split)
    rest, first = folders.rest(), folders.names[0]
    above = first[: len(first) - len(rest[0])]  # the same of all images
    listing = Listing(rest, {}, {"own_split": own_split, "above": above})
    if not part.spec.labeled:
        return listing, chosen
    if "" in found:
        _refuse_loose(listing.names, np.flatnonzero(~folders.have(0)), part.path)
    classes = order_classes(found)
    labels = {name: label for label, name in enumerate(classes)}
    targets = np.array([labels[name] for name in found], np.int32)
    targets = np.repeat(targets, _lengths(firsts, len(listing)))
    listing = with_facts(listing, classes=classes, kind="class")
    return replace(listing, arrays={"targets": targets}), chosen


def _lengths(firsts: np.ndarray, count: int) -> np.ndarray:
    """Return the lengths of runs that begin at `firsts`."""
    return np.diff(np.append(firsts, count))


def _refuse_loose(names: Names, loose: np.ndarray, path: str) -> None:
    raise UserError(
        f"{path}: {plural(len(loose), 'image')} of {len(names)} are in no class folder: "
        f"{first_few(names[int(number)] for number in loose[:3])}; expected CLASS/IMAGE. Images "
        "without labels are for main_pretrain.py"
    )


def cut_common_folders(folders: Folders) -> None:
    """Cut off folders that hold all images, if other folders lie in them."""
    while folders.have(1).all():
        found = {*folders.runs()[0]}
        if len(found) > 1 or found.pop().lower() in SPLITS:
            return
        folders.cut += 1


def describe(listing: Listing) -> str:
    """Return the columns that are used: ` (image path, label species, split fold)`; '' for none."""
    columns = dict(listing.metadata.get("columns", {}))
    labels = columns.pop("labels", ())
    texts = [f"{kind} {name}" for kind, name in columns.items() if name]
    if labels:
        found = f"label{'s' * (len(labels) > 1)} {first_few(labels, 5)}"
        texts.insert(columns.get("image") is not None, found)
    return f" ({', '.join(texts)})" if texts else ""
