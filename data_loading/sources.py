# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Open the images of --data_path, whatever they are: folders, a table, a zip file, shards.

python main_pretrain.py --data_path photos.zip --model convnextv2_atto --dry_run
"""

import os
import shlex
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config.flags import command
from config.paths import PATTERN, split_sources
from data_loading import packs, parquet, parquet_columns
from data_loading.arrange import (
    DatasetSpec,
    Part,
    arrange,
    check_files,
    choose_split,
    describe,
    list_rows,
    sorted_by_name,
    with_facts,
)
from data_loading.files import Files
from data_loading.folders import FolderFiles, list_folder
from data_loading.images import Images
from data_loading.index import Listing, cached, file_states
from data_loading.listing import is_system, scan
from data_loading.mixed import MixedImages
from data_loading.tables import EVAL, TRAIN, Table, choose_columns, read_table
from data_loading.tar import UNPACK, TarFiles, expand, list_tar
from data_loading.zips import ZipFiles, list_zip
from errors import UserError, first_few, plural
from parallel.process_group import get_logger

TABLES = (".csv", ".tsv", ".txt")
LOOKED_AT = 20  # folders in a folder
KINDS = f"a folder, a table ({', '.join(TABLES)}), a zip or tar file, or Parquet or Arrow files"


class UnknownSource(UserError):
    """A path to a file that holds no images, as far as one can see."""


@dataclass(frozen=True)
class Source:
    """Functions that list and read the images of a part.

    what: describes them, for messages. identity: plain values that tell it from other sources.
    archives: files that hold or list the images; an index remembers their size and time.
    """

    what: str
    identity: dict[str, Any]
    list: Callable[[], Listing]
    open: Callable[[Listing], Files]
    archives: Sequence[str] = ()


def open_images(layout: str, spec: DatasetSpec, train: bool) -> Images | MixedImages:
    """Open the images to train on or to evaluate; several sources become one data set.

    layout: of --data_set: auto; IMNET for class folders in train/ and val/; image_folder for class
    folders; folder for images without labels; table. Every rank must call it.
    """
    name = "train.index" if train else "val.index"
    folder = Path(spec.data_index).expanduser() / name if spec.data_index else None
    flag, path = _choose_path(layout, spec, train)
    try:
        sources = split_sources(path)
    except ValueError as error:
        raise UserError(f"--{flag}: {error}") from error
    if len(sources) == 1:
        return open_part(_find_part(layout, spec, train, flag, path), folder)
    parts = []
    for number, (each, _) in enumerate(sources, 1):
        own = folder and folder.with_name(f"{folder.stem}-{number}.index")
        parts.append(open_part(_find_part(layout, spec, train, flag, each), own))
    shares = [share for _, share in sources]
    return MixedImages(parts, None if None in shares or not train else shares)


def open_part(part: Part, folder: Path | None = None) -> Images:
    """Open the images of a part; folder: of the index that keeps their list."""
    source = find_source(part)
    if folder:
        identity = {**source.identity, "files": file_states(list(source.archives))}
        listing = cached(source.list, source.what, identity, folder)
    else:
        listing = source.list()
    what = f"{source.what}{describe(listing)}"
    return Images(source.open, listing, part.path, what, source.archives)


def _choose_path(layout: str, spec: DatasetSpec, train: bool) -> tuple[str, str]:
    """Return the flag that gives the data of a part, and its value."""
    own = not train and (bool(spec.eval_data_path) or layout == "image_folder")
    flag = "eval_data_path" if own else "data_path"
    path = getattr(spec, flag)
    if not path:
        hint = ", or --val_split 0.1" if own else ""
        raise UserError(f"--{flag} is not given; give the folder, table or archive of images{hint}")
    return flag, str(path)


def _find_part(layout: str, spec: DatasetSpec, train: bool, flag: str, path: str) -> Part:
    """Return the part to read, within a folder that has train/ and val/."""
    own = flag == "eval_data_path"
    part = Part(layout, os.path.expanduser(path), spec, train, is_own=own)
    if not (PATTERN.search(path) or os.path.exists(part.path)):
        raise UserError(f"--{flag} {path}: no such file or folder")
    is_folder = os.path.isdir(part.path) and not packs.is_pack(part.path)
    if layout == "table" or not (part.may_split and is_folder):
        return part
    names = scan(part.path)
    folders = [name for name in [*names.folders, *names.links] if not is_system(name)]
    chosen, own_split = choose_split(folders, part)
    if chosen is None:
        return part
    inner = os.path.join(part.path, chosen)
    return replace(part, layout="image_folder", path=inner, own_split=own_split, is_own=True)


def find_source(part: Part) -> Source:
    """Recognize what `part.path` is; UnknownSource if it is nothing that holds images."""
    path, layout, is_folder = part.path, part.layout, os.path.isdir(part.path)
    if layout == "table" and is_folder:
        raise UserError(f"--data_path {path}: it is a folder, expected a table, a file of rows")
    if path.lower().endswith(TABLES) or (layout == "table" and not parquet.kind_of(path)):
        return _table(part)
    if is_folder and packs.is_pack(path):
        return _pack(part)
    if shards := _tar_shards(path):
        return _tar(part, shards)
    is_parquet = bool(parquet.kind_of(path))
    if is_folder:
        is_parquet = parquet.holds_files(path) and not _holds_images(path)
    if is_parquet:
        return _parquet(part)
    if is_folder:
        return _folder(part)
    if zipfile.is_zipfile(path):
        return _zip(part)
    flag = "data_path" if part.train or not part.spec.eval_data_path else "eval_data_path"
    if path.lower().endswith(".zip"):
        raise UserError(f"--{flag} {path}: it is no whole zip file; copy or download it again")
    raise UnknownSource(
        f"--{flag} {path}: expected {KINDS}; if it is a table, add --data_set table"
    )


def _identity(part: Part, kind: str, path: str) -> dict[str, Any]:
    """Return what tells a list of images from those of other sources and other columns."""
    spec, columns = part.spec, vars(part.spec.columns)
    held = {kind: os.path.realpath(path), "labeled": spec.labeled, "kind": spec.kind}
    return held | {"train": part.train, **columns, "labels": [*columns["labels"]]}


def _folder(part: Part) -> Source:
    root, labeled = part.path, part.spec.labeled
    part.check(part.own_split)
    kinds = {False: "the images in", True: "the class folders of"}

    def make() -> Listing:
        listing = list_folder(root, labeled, leave_out_empty=not part.train)
        return with_facts(listing, own_split=part.own_split)

    what = f"{kinds[labeled]} {root}"
    identity = {"folder": os.path.realpath(root), "labeled": labeled}
    return Source(what, identity, make, partial(FolderFiles, root))


def _table(part: Part) -> Source:
    path, spec = part.path, part.spec
    root = os.path.expanduser(spec.columns.root) or os.path.dirname(path)

    def make() -> Listing:
        listing, _ = list_rows(read_table(path), part)
        check_files(listing, path, root, spec.skip_missing)
        return sorted_by_name(listing)

    identity = _identity(part, "table", path) | {"root": os.path.realpath(root)}
    return Source(f"the table {path}", identity, make, partial(FolderFiles, root), [path])


def _zip(part: Part) -> Source:
    path = part.path

    def make() -> Listing:
        return arrange(list_zip(path), part)

    identity = _identity(part, "zip", path)
    return Source(f"the zip file {path}", identity, make, partial(ZipFiles, path), [path])


def _holds_images(folder: str) -> bool:
    """Return True if images lie in a folder, or in one of the first folders in it."""
    names = scan(folder)
    inner = [name for name in sorted([*names.folders, *names.links]) if not is_system(name)]
    return bool(names.images) or any(
        scan(os.path.join(folder, name)).images for name in inner[:LOOKED_AT]
    )


def _tar_shards(path: str) -> list[str]:
    """Return the tar files that a path, a pattern or a folder of shards stands for."""
    if os.path.isdir(path):
        tars = [name for name in scan(path).others if name.lower().endswith(".tar")]
        return [] if _holds_images(path) else [os.path.join(path, name) for name in sorted(tars)]
    endings = (".tar", *(ending for endings in UNPACK for ending in endings))
    if not PATTERN.search(path):
        is_tar = path.lower().endswith(endings) or tarfile.is_tarfile(path)
        return expand(path) if is_tar else []
    return expand(path) if path.lower().endswith(endings) else []


def _tar(part: Part, shards: Sequence[str]) -> Source:
    path = part.path
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        by_split.setdefault(parquet.split_of(os.path.basename(shard)), []).append(shard)
    part, shards = _choose_files(part, by_split)

    def make() -> Listing:
        given, labeled = part.spec.columns, part.spec.labeled
        wanted = [*given.labels, given.split or "split", *filter(None, [given.weight])]
        reads = labeled or given.split is not None
        found = list_tar(shards, reads, wanted if given.labels or not labeled else None)
        if reads and not found.columns and (given.labels or given.split):
            known = list_tar(shards, True).columns
            name = f"--label_column {given.labels[0]}" if given.labels else "--split_column"
            fix = f"it has {first_few(known, 9)}" if known else "drop it: it has no label files"
            raise UserError(f"{name}: {path} has no such column; {fix}")
        return arrange(found, part)

    identity = _identity(part, "tar", path)
    what = f"{plural(len(shards), 'tar file')} of {path}"
    what = what if len(shards) > 1 else f"the tar file {shards[0]}"
    return Source(what, identity, make, partial(_open_tar, list(shards)), shards)


def _open_tar(shards: Sequence[str], listing: Listing) -> TarFiles:
    above = listing.metadata.get("above", "")
    return TarFiles(shards, listing.names, dict(listing.arrays), above)


def _pack(part: Part) -> Source:
    path, pack = part.path, packs.read_pack(part.path)
    names = {packs.PARTS[name]: [name] for name in pack["parts"]}
    part, (name,) = _choose_files(part, names)
    part.check(part.own_split)
    shards = packs.shard_paths(path, pack, name)

    def make() -> Listing:
        listing = packs.for_task(packs.list_part(path, pack, name), path, part.spec.labeled)
        return with_facts(listing, own_split=part.own_split)

    identity = {"pack": os.path.realpath(path), "part": name, "labeled": part.spec.labeled}
    what = f"the pack {path}"
    return Source(what, identity, make, partial(packs.open_files, shards), shards)


def _choose_files(part: Part, by_split: dict[str, list[str]]) -> tuple[Part, list[str]]:
    """Return the files of a part, and the part with what separates it from others.

    by_split: files by train, val, test, or '' for those that are for both.
    """
    evaluation = next((names[0] for names in EVAL if names[0] in by_split), "")
    wanted = TRAIN[0] if part.train else evaluation
    if by_split.keys() == {""} or (len(by_split) == 1 and not os.path.isdir(part.path)):
        return part, next(iter(by_split.values()))  # files that were named are used
    if wanted not in by_split:
        kind = "training" if part.train else "evaluation"
        found = ", ".join(split or "other" for split in by_split)
        raise UserError(
            f"{part.path} has files of {found}, and none for {kind}; give the files with "
            f"--{'data_path' if part.train else 'eval_data_path'}"
        )
    if others := by_split.get(""):
        get_logger().warning(
            "%s: left out %d files without a split in their names: %s",
            *(part.path, len(others), first_few(others)),
        )
    own_split = f"files of {evaluation}" * bool(evaluation)
    return replace(part, own_split=own_split, is_own=True), by_split[wanted]


def _parquet(part: Part) -> Source:
    path, spec = part.path, part.spec
    part, files = _choose_files(part, parquet.list_files(path))
    image = parquet_columns.find_image_column(files, spec.columns.image)
    names = [n for n in parquet_columns.list_columns(files) if n != image.name]
    holds_images = image.kind != "path"
    empty = Table(path, dict.fromkeys(names, ()), np.zeros(0), images=())
    chosen = choose_columns(empty, spec.columns, spec.labeled)
    wanted = [name for name in (*chosen.labels, chosen.split, chosen.weight) if name]
    wanted += [image.name] * (not holds_images)
    root = os.path.expanduser(spec.columns.root) or os.path.dirname(files[0])

    def make() -> Listing:
        found = parquet_columns.read_columns(files, image.name, wanted)
        if holds_images:
            listing = arrange(found, part, has_folders=False)
            return with_facts(listing, image_column=image.name)
        rows = np.arange(1, 1 + len(next(iter(found.columns.values()))))
        table = Table(path, found.columns, rows, "row", None, found.class_names)
        listing, _ = list_rows(table, part)
        check_files(listing, path, root, spec.skip_missing)
        return sorted_by_name(listing)

    identity = _identity(part, "parquet", path) | {"root": os.path.realpath(root)}
    if not holds_images:
        return Source(f"the table {path}", identity, make, partial(FolderFiles, root), files)
    if spec.shuffled and not parquet.is_random_access(files):
        get_logger().warning(
            "%s: Parquet is decoded a row group at a time, so a shuffled epoch is slow; pack it "
            "once: %s %s FOLDER",
            *(path, command("pack"), shlex.quote(path)),
        )
    open_files = partial(_open_parquet, files, image.name)
    kind = "Arrow" if parquet.is_random_access(files) else "Parquet"
    what = f"{plural(len(files), f'{kind} file')} of {path}"
    what = what if len(files) > 1 else f"the {kind} file {files[0]}"
    return Source(what, identity, make, open_files, files)


def _open_parquet(files: Sequence[str], column: str, listing: Listing) -> parquet.ParquetFiles:
    return parquet.ParquetFiles(files, column, listing.names, listing.arrays)
