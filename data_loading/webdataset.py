# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Samples of WebDataset shards: files of one key, of which some give labels.

python -c "from data_loading.webdataset import key_of; print(key_of(b'cat/0001.seg.png'))"

The key of a file is its path up to the first dot of the last part: `0001.jpg`, `0001.seg.png`,
`0001.cls` and `0001.json` are one sample. The image is the file whose extension follows the key.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from errors import UserError, a_type, first_few, plural

LABELS = (b".cls", b".json", b".txt")  # files that may say something of an image
MAX_BYTES = 2**24  # of such a file
NAMED = 5  # keys in a message
WHOLE = re.compile(r"[+-]?\d+")
KINDS = {bool: "true or false", int: "whole numbers", float: "numbers", str: "text"}
REMEDY = "correct this, or choose the columns to use: --label_column"

Places = dict[bytes, dict[bytes, tuple[int, int]]]  # extension -> key -> (first byte, bytes)


def key_of(name: bytes) -> bytes:
    """Return the path up to the first dot of its last part."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    return name if dot < 0 else name[:dot]


def follows_key(name: bytes) -> bool:
    """Return True for the extension of `0001.jpg`, False for that of `0001.seg.jpg`."""
    return name.count(b".", name.rfind(b"/") + 1) == 1


@dataclass
class Cells:
    """A column: a value for each image, None where there is none.

    examples: a value of each type, as text. missing: keys of the first images without a value.
    """

    values: list[Any]
    examples: dict[type, str]
    missing: list[str]


@dataclass
class Samples:
    """The samples of a shard.

    main: (M,) numbers of the images whose extension follows the key; keys: of the first of them.
    labels: number of label files that belong to one of them; others: the other ones by extension.
    doubles: keys with several images. columns: by (extension, column), for the images of `main`;
    the column '' is True where there is such a file.
    """

    main: np.ndarray
    keys: list[str]
    labels: int
    others: Counter[str]
    doubles: list[str]
    columns: dict[tuple[str, str], Cells] = field(default_factory=dict)


def group(shard: str, names: Sequence[bytes], labels: Places) -> Samples:
    """Group the images of a shard, of some names, and its label files to samples."""
    main = [number for number, name in enumerate(names) if follows_key(name)]
    first = [locate(shard, key_of(names[number])) for number in main[:NAMED]]
    samples = Samples(np.array(main, np.int64), first, 0, Counter(), [])
    if any(labels.values()):
        counts = Counter(key_of(names[number]) for number in main)
        samples.doubles = [locate(shard, key) for key, count in counts.items() if count > 1]
        for extension, places in labels.items():
            used = sum(key in counts for key in places)
            samples.labels += used
            samples.others[extension.decode()] += len(places) - used
    return samples


def locate(shard: str, key: bytes) -> str:
    """Return where a sample is, for messages."""
    return f"{shard}/{os.fsdecode(key)}"


def read_columns(
    shard: str,
    keys: Sequence[bytes],
    labels: Places,
    read: Callable[[int, int], bytes],
    wanted: Sequence[str] | None,
) -> dict[tuple[str, str], Cells]:
    """Read the label files of some samples of a shard; returns `Samples.columns`.

    read: of (first byte, bytes) of the shard. wanted: names of columns, or patterns such as
    `tag_*`; None: all. UserError if a file cannot be understood.
    """
    columns, known = {}, {}
    for extension, places in labels.items():
        if not places or not _is_of_use(extension, wanted):
            continue
        records: list[dict[str, Any] | None] = []
        for key in keys:
            try:
                records.append(_parse(read, places.get(key), extension))
            except UserError as error:
                name = f"{locate(shard, key)}{extension.decode()}"
                raise UserError(f"{name} {error}") from error
        values: dict[str, list] = {"": [None if record is None else True for record in records]}
        for column in dict.fromkeys(column for record in records for column in record or ()):
            if is_wanted(column, wanted):
                cells = [(record or {}).get(column) for record in records]
                values[column] = [known.setdefault((type(cell), cell), cell) for cell in cells]
        for column, cells in values.items():
            columns[extension.decode(), column] = _describe(shard, keys, cells)
    return columns


def is_wanted(column: str, wanted: Sequence[str] | None) -> bool:
    """Return True if a column is among the wanted ones, which may be patterns."""
    return wanted is None or any(fnmatchcase(column, pattern) for pattern in wanted)


def _is_of_use(extension: bytes, wanted: Sequence[str] | None) -> bool:
    if extension == b".json":
        return wanted is None or any(pattern not in ("cls", "txt") for pattern in wanted)
    return is_wanted(extension[1:].decode(), wanted)


def _describe(shard: str, keys: Sequence[bytes], values: list[Any]) -> Cells:
    examples, missing = {}, []
    for kind in set(map(type, values)) - {type(None)}:
        place = next(number for number, value in enumerate(values) if type(value) is kind)
        examples[kind] = f"{str(values[place])[:40]} for {locate(shard, keys[place])}"
    if None in values:
        lacking = (key for key, value in zip(keys, values, strict=True) if value is None)
        missing = [locate(shard, key) for key, _ in zip(lacking, range(NAMED), strict=False)]
    return Cells(values, examples, missing)


def _parse(
    read: Callable[[int, int], bytes], place: tuple[int, int] | None, extension: bytes
) -> dict[str, Any] | None:
    """Return the columns that a label file gives; UserError without the name of the file."""
    if place is None:
        return None
    if place[1] > MAX_BYTES:
        raise UserError(f"has {place[1]} bytes, expected at most {MAX_BYTES}")
    content = read(*place)
    try:
        text = content.decode().removeprefix("\ufeff").strip()
        if extension == b".txt":
            return {"txt": text}
        if extension == b".cls":
            return {"cls": int(text) if WHOLE.fullmatch(text) else _not_empty(text)}
        record = json.loads(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # the former: also of json and of decode
        expected = "JSON" if extension == b".json" else "text in UTF-8"
        raise UserError(f"is no {expected}: {error}; correct it") from error
    if not isinstance(record, dict):
        got = f"{a_type(record)} {str(record)[:40]}"
        raise UserError(f'has {got}, expected an object such as {{"label": 3}}; correct it')
    return {key: cell for key, value in record.items() if (cell := _cell(value)) is not None}


def _not_empty(text: str) -> str:
    if not text:
        raise UserError("is empty, expected a class: a whole number, or a name; correct it")
    return text


def _cell(value: Any) -> Any:
    """Return a value of JSON as a cell; None for null and for what is nested."""
    if isinstance(value, list) and all(_is_plain(part) for part in value):
        return "|".join(map(str, value))
    return value if isinstance(value, bool) or _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def refuse_doubles(parts: Iterable[Samples]) -> None:
    """Raise UserError if samples have several images whose extension follows the key."""
    doubles = [key for part in parts for key in part.doubles]
    if doubles:
        raise UserError(
            f"{plural(len(doubles), 'sample')} with several images: {first_few(doubles, NAMED)}; "
            "expected one: name masks and the like KEY.mask.png, which is left out, or remove them"
        )


def join_columns(parts: Sequence[Samples]) -> dict[str, Any]:
    """Return the columns of all shards, (N,) arrays or lists of text by name.

    UserError if some images have no value or no file, or if values have several types.
    """
    columns: dict[str, Any] = {}
    for extension, column in sorted({name for part in parts for name in part.columns}):
        total = Cells([], {}, [])
        for part in parts:
            nothing = Cells([None] * len(part.main), {}, part.keys)
            cells = part.columns.get((extension, column), nothing)
            total.values += cells.values
            total.examples = cells.examples | total.examples
            total.missing += cells.missing[: NAMED - len(total.missing)]
        if not total.examples:  # no image has such a file
            continue
        _refuse_missing(total, extension, column)
        if column in columns:
            raise UserError(f"{column} is given twice, by .json and by .{column} files; {REMEDY}")
        if column:
            columns[column] = _as_array(total, extension, column)
    return columns


def _refuse_missing(cells: Cells, extension: str, column: str) -> None:
    if lacking := sum(value is None for value in cells.values):
        what = f"entry {column} in their {extension} file" if column else f"{extension} file"
        images = plural(len(cells.values), "image")
        first = first_few([*cells.missing, *[""] * (lacking - len(cells.missing))], NAMED)
        raise UserError(f"{lacking} of {images} have no {what}: {first}; {REMEDY}")


def _as_array(cells: Cells, extension: str, column: str) -> Any:
    kinds = set(cells.examples)
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) > 1:
        found = first_few(f"{KINDS[kind]} ({cells.examples[kind]})" for kind in cells.examples)
        raise UserError(f"{column} of the {extension} files is of several types: {found}; {REMEDY}")
    if kinds == {str}:
        return cells.values
    try:
        return np.array(cells.values, {bool: bool, int: np.int64, float: np.float64}[kinds.pop()])
    except OverflowError:  # more than 64 bits
        return [str(value) for value in cells.values]
