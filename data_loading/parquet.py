# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Images in Parquet and Arrow files, laid out as Hugging Face publishes and saves them.

python -c "from data_loading.parquet import list_files; print(list_files('food101/data'))"

`data_loading/parquet_columns.py` reads everything but the images.
"""

import glob
import json
import os
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np

from data_loading.bad_images import is_transient
from data_loading.decode import BadImage
from data_loading.files import Files, Names
from data_loading.formats import describe_file, read_head
from data_loading.listing import is_above, is_system, scan
from errors import UserError, first_few, first_line

PARQUET, ARROW = ".parquet", ".arrow"
SPLITS = {  # words in the names of folders and files
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
PLACES = ("file", "group", "row")
OLDEST = (14, 0, 1)  # earlier ones run code that an Arrow file may hold: CVE-2023-47248
MAX_GROUP = 2**32  # bytes of images in a row group, which each worker process keeps in memory
KEPT_GROUPS = 2  # decoded row groups of Parquet in memory, often of 100 MB
KEPT_FILES = 64  # Arrow files that are mapped at the same time
ROWS_AT_ONCE = 256  # Arrow cannot hold more than 2 GB of images in one array
MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last one: a stream of Arrow
LOOKED_AT = 20  # folders, to recognize a data set
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@cache
def import_pyarrow() -> Any:
    """Import pyarrow with its submodules `parquet`, `ipc` and `compute`; UserError without it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        found = first_line(error)
    else:
        found = f"this is {pyarrow.__version__}"
        if tuple(map(int, re.findall(r"\d+", pyarrow.__version__)[:3])) >= OLDEST:
            return pyarrow
    raise UserError(
        f"Parquet and Arrow files need pyarrow {'.'.join(map(str, OLDEST))} or newer ({found}): "
        "pip install -U pyarrow; the extra [parquet] of the toolkit brings it"
    )


def list_files(path: str) -> dict[str, list[str]]:
    """Return the Parquet or Arrow files of a data set by split: train, val, test; '' for others.

    path: a file, a pattern such as `data/train-*.parquet`, or a folder that was downloaded from
    Hugging Face or written by `save_to_disk`. The first word of a folder's or file's name that is
    in `SPLITS` decides, from the outermost folder below `path` inwards. UserError if there are no
    files, files of both kinds, or several data sets.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        root, found = path, sorted(_walk(path))
    else:
        matching = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        found = sorted(name for name in matching if kind_of(name))
        root = os.path.commonpath([os.path.dirname(name) for name in found]) if found else ""
    if not found:
        raise UserError(f"{path}: no such {PARQUET} or {ARROW} files")
    if len({kind_of(name) for name in found}) > 1:
        raise UserError(
            f"{path} has both {PARQUET} and {ARROW} files; give those of one kind, such as "
            f"'{os.path.join(root, '**', '*' + PARQUET)}'"
        )
    splits, sets = defaultdict(list), {}
    for name in found:
        above, split = _split_of(os.path.relpath(name, root))
        splits[split].append(name)
        if split:
            sets[above] = name
    if len(sets) > 1:
        raise UserError(
            f"{path} holds {len(sets)} data sets, of {first_few(sets.values())}; give the folder "
            f"of one of them, or a pattern such as '{os.path.join(root, sorted(sets)[-1], '*')}'"
        )
    return dict(splits)


def holds_files(folder: str) -> bool:
    """Return True if Parquet or Arrow files lie in a folder, or in one below it, without images.

    Only a few folders are looked at, so that a folder with a million of images takes no longer.
    """
    waiting = [folder]
    for number in range(LOOKED_AT):
        if number == len(waiting):
            break
        with suppress(OSError):
            names = scan(waiting[number])
            if any(map(kind_of, names.others)) and not names.images:
                return True
            below = [name for name in [*names.folders, *names.links] if not is_system(name)]
            waiting += [os.path.join(waiting[number], name) for name in sorted(below)]
    return False


def kind_of(path: str) -> str:
    """Return `.parquet`, `.arrow` or '', by the name of a file."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in (PARQUET, ARROW) else ""


def is_random_access(files: Sequence[str]) -> bool:
    """Return True if any image is read at once; in Parquet, a whole row group has to be decoded."""
    return all(kind_of(name) == ARROW for name in files)


def _walk(root: str) -> Iterator[str]:
    """Yield the files below a folder, links followed, without hidden files and caches."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {first_line(error)}") from error

    seen = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_system(name))
        saved = _saved_files(folder) if "state.json" in names else None
        for name in names if saved is None else saved:
            # `Dataset.map` writes cache-*.arrow next to the files that it reads.
            if kind_of(name) and not is_system(name) and not name.startswith("cache-"):
                yield os.path.join(folder, name)


def _saved_files(folder: str) -> list[str] | None:
    """Return the files that state.json of `save_to_disk` names; None if it is of something else."""
    state = read_json(os.path.join(folder, "state.json"))
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        return None
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} holds a selection of rows by an old version of `datasets`; load it with "
            "load_from_disk and save it with save_to_disk of a newer one"
        )
    return [os.path.basename(item["filename"]) for item in listed]


def read_json(path: str) -> Any:
    """Read a JSON file; UserError if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; copy it again") from error


def split_of(name: str) -> str:
    """Return the split that a word in a name tells, train, val or test; '' if none does."""
    words = re.split(r"[\W\d_]+", name.lower())
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "")


def _split_of(path: str) -> tuple[str, str]:
    """Return the folder above the first name with the word of a split, and the split."""
    parts = path.split(os.sep)
    for depth, part in enumerate(parts):
        if split := split_of(part):
            return os.path.join("", *parts[:depth]), split
    return "", ""


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what pyarrow raises for a file that it cannot read into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (import_pyarrow().ArrowException, OSError) as error:
        if is_transient(error):
            raise
        raise UserError(f"cannot read {path}: {_reason(path)} ({first_line(error)})") from error


def _reason(path: str) -> str:
    if os.path.isdir(path):
        return "it is a folder"
    head = read_head(path)
    if head.startswith(MAGIC):
        return "it was cut short or is damaged; copy it again"
    description, remedy = describe_file(head)
    known = description if remedy or not head else f"it begins with {head[:12]!r}"
    return f"{known}; {remedy or 'copy it again'}"


class ParquetFile:
    """A Parquet file that is open for reading.

    schema: of Arrow. group_rows: number of rows in each row group.
    """

    def __init__(self, path: str) -> None:
        with readable(path):
            self.file, self.path = import_pyarrow().parquet.ParquetFile(path), path
            self.schema, self.about = self.file.schema_arrow, self.file.metadata
            groups = map(self.about.row_group, range(self.about.num_row_groups))
            self.group_rows = [group.num_rows for group in groups]

    def read(self, columns: Sequence[str], image: str | None = None) -> Any:
        """Return a table of some columns, and of the paths, not the bytes, in the column `image`.

        `image` has the type struct; None leaves it out.
        """
        leaves = [*columns] if image is None else [*columns, f"{image}.path"]
        with readable(self.path):
            return self.file.read(leaves, use_threads=False)

    def lacks_bytes(self, image: str) -> np.ndarray:
        """Return which rows are known to have no bytes in the struct `image`, (rows,) bool.

        Statistics tell it of whole row groups.
        """
        counts = [chunk.statistics for chunk in self._chunks(f"{image}.bytes")]
        nulls = [count.null_count if count is not None else None for count in counts]
        lacking = [null == rows for null, rows in zip(nulls, self.group_rows, strict=True)]
        return np.repeat(np.array(lacking, bool), self.group_rows)

    def check_images(self, column: str) -> None:
        """Raise UserError if a row group holds more bytes of images than fit into memory."""
        names = (column, f"{column}.bytes")
        sizes = [chunk.total_uncompressed_size for name in names for chunk in self._chunks(name)]
        if max(sizes, default=0) > MAX_GROUP:
            raise UserError(
                f"{self.path}: a row group holds {max(sizes) / 1e9:.1f} GB of images, expected at "
                f"most {MAX_GROUP / 1e9:.1f}; write it again with smaller ones, as "
                "pyarrow.parquet.write_table does with row_group_size=1000"
            )

    def _chunks(self, name: str) -> Iterator[Any]:
        """Yield what the footer says of a column, or a field of a struct, in each row group."""
        for number in range(self.about.num_row_groups):
            group = self.about.row_group(number)
            columns = map(group.column, range(group.num_columns))
            yield from (column for column in columns if column.path_in_schema == name)

    def images(self, column: str, group: int) -> tuple[int, Any]:
        """Decode the images of a row group; returns the number of its first row, and an array."""
        if group >= len(self.group_rows):
            raise UserError(f"{self.path} has changed since its rows were listed; start again")
        with readable(self.path):
            batches = self.file.iter_batches(ROWS_AT_ONCE, [group], [column], use_threads=False)
            chunks = [batch.column(column) for batch in batches]
            array = import_pyarrow().chunked_array(chunks, self.schema.field(column).type)
        return sum(self.group_rows[:group]), array


class ArrowFile:
    """An Arrow file or stream, memory-mapped: one group of rows, of which any is read at once."""

    def __init__(self, path: str) -> None:
        pyarrow = import_pyarrow()
        with readable(path):
            source = pyarrow.memory_map(path)
            self.mapped = source.read_buffer()
            is_file = self.mapped.slice(0, 6) == pyarrow.py_buffer(b"ARROW1")
            ends = self.mapped.slice(max(0, self.mapped.size - len(END_OF_STREAM)))
            if not is_file and ends != pyarrow.py_buffer(END_OF_STREAM):
                raise pyarrow.ArrowInvalid("the end of the stream is not there")
            source.seek(0)
            opened = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
            self.table, self.path = opened.read_all(), path
        self.schema, self.group_rows = self.table.schema, [self.table.num_rows]

    def read(self, columns: Sequence[str], image: str | None = None) -> Any:
        """Return a table of some columns, and of the column `image`; nothing is copied."""
        for name in columns:
            self._validate(name)
        return self.table.select([*columns] if image is None else [*columns, image])

    def _validate(self, column: str) -> None:
        """Raise UserError if a damaged column leads to other memory; of images it reads lengths."""
        with readable(self.path):
            self.table[column].validate(full=True)

    def lacks_bytes(self, image: str) -> np.ndarray:
        """Return which rows have no bytes in the struct `image`, (rows,) bool."""
        compute = import_pyarrow().compute
        return compute.is_null(compute.struct_field(self.table[image], "bytes")).to_numpy()

    def images(self, column: str, group: int) -> tuple[int, Any]:
        """Return 0, the number of the first row, and an array of all images."""
        return 0, self.table[column]

    def check_images(self, column: str) -> None:
        """Raise UserError if images are damaged, or compressed, so that all were read to memory."""
        self._validate(column)
        first, after = self.mapped.address, self.mapped.address + self.mapped.size
        for chunk in self.table[column].chunks:
            for buffer in chunk.buffers():
                if buffer is not None and buffer.size and not first <= buffer.address < after:
                    raise UserError(
                        f"{self.path}: the Arrow file is compressed, so its images cannot be read "
                        "one by one; write it without compression, or as Parquet"
                    )


def open_file(path: str) -> ParquetFile | ArrowFile:
    """Open a Parquet or Arrow file; UserError if it cannot be read."""
    return (ArrowFile if kind_of(path) == ARROW else ParquetFile)(path)


class _Cache:
    """Row groups, or mapped files, that one process read last; its threads share them."""

    def __init__(self) -> None:
        self.process, self.lock = os.getpid(), threading.Lock()
        self.groups: OrderedDict[tuple[int, int], tuple[int, Any]] = OrderedDict()


class ParquetFiles(Files):
    """Images in a column of Parquet or Arrow files.

    files: paths. column: as `find_image_column` returns it. names, places: as `read_columns`
    returns them, or in another order. A read from Parquet decodes a whole row group unless it is
    one of the last two of this process; from Arrow it copies one image.
    """

    def __init__(
        self, files: Sequence[str], column: str, names: Names, places: Mapping[str, np.ndarray]
    ) -> None:
        self.files, self.column, self.names, self.places = [*files], column, names, dict(places)
        self.kept = KEPT_FILES if is_random_access(files) else KEPT_GROUPS
        self._cache = _Cache()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _cache=_Cache())

    def read(self, number: int) -> bytes:
        """Return the bytes of an image; BadImage if its row has none, or a path that is refused."""
        file, group, row = (int(self.places[name][number]) for name in PLACES)
        first, images = self._images(file, group)
        if not 0 <= row - first < len(images):
            path = self.files[file]
            raise UserError(f"{path} has changed since its rows were listed; start again")
        image = images[row - first].as_py()
        path = None
        if isinstance(image, dict):
            image, path = image["bytes"], image.get("path")
        if image is None and path:
            return self._read_external(self.files[file], path)
        if image is None:
            raise BadImage("its row holds no image")
        return image

    def order(self) -> np.ndarray | None:
        """Return the numbers of all images in the order of their rows; None for Arrow files."""
        if is_random_access(self.files):
            return None
        return np.lexsort([self.places[name] for name in ("row", "group", "file")])

    def locate(self, number: int) -> str:
        """Return the file and the row, counted from 0."""
        file, row = (int(self.places[name][number]) for name in ("file", "row"))
        return f"{self.files[file]}, row {row}"

    def _images(self, file: int, group: int) -> tuple[int, Any]:
        """Return the number of the first row of a row group, and its images."""
        cache = self._cache
        if cache.process != os.getpid():  # a fork, perhaps while another thread held the lock
            cache = self._cache = _Cache()
        with cache.lock:
            if (file, group) not in cache.groups:
                while len(cache.groups) >= self.kept:  # before the next one takes memory
                    cache.groups.popitem(last=False)
                opened = open_file(self.files[file])
                cache.groups[file, group] = opened.images(self.column, group)
            cache.groups.move_to_end((file, group))
            return cache.groups[file, group]

    def _read_external(self, file: str, path: str) -> bytes:
        inside = path_inside(os.path.dirname(file), path)
        if inside is None:
            raise BadImage(
                f"its row has no bytes but the path {path!r}, outside the folder of {file}",
                remedy=EMBED,
            )
        try:
            with open(inside, "rb") as opened:
                return opened.read()
        except FileNotFoundError as error:
            raise BadImage(f"its row has no bytes, and {inside} does not exist") from error


EMBED = (
    "write the images into the files, as push_to_hub and save_to_disk of `datasets` do, or put "
    "them into that folder and their paths relative to it into the rows"
)


def path_inside(folder: str, path: str) -> str | None:
    """Return the path of a file that is given relative to a folder; None if it leaves the folder.

    Absolute paths to files in the folder are accepted.
    """
    folder = os.path.abspath(folder)
    full = os.path.normpath(os.path.join(folder, path))
    return full if is_above(folder, full) and "\0" not in path else None
