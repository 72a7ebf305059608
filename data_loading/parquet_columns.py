# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Names, labels and other columns of Parquet and Arrow files, read without the images.

python -c "from data_loading import parquet_columns as p; print(p.read_columns(['a.parquet']))"
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from data_loading.bad_images import retry_io
from data_loading.files import Found, Names
from data_loading.formats import extensions
from data_loading.parquet import (
    EMBED,
    PLACES,
    ArrowFile,
    ParquetFile,
    import_pyarrow,
    open_file,
    path_inside,
    read_json,
    readable,
)
from data_loading.tables import require_column
from errors import UserError, first_few, first_line, resolve

# Usual names of columns of images, and of paths of image files.
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "photo", "picture")
PATHS = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img")
LOOKED_FOR = 1000  # files of images outside the Parquet files
DIGITS = 8  # of the number of a row in a name
EXPECTED = "numbers, text, or lists of whole numbers or text"


class ImageColumn(NamedTuple):
    """The column of the images. kind: `struct` of bytes and path, `binary`, or `path` of a file."""

    name: str
    kind: str


def find_image_column(files: Sequence[str], given: str | None = None) -> ImageColumn:
    """Return the column of the images, or of their paths; UserError if it is not clear.

    given: its name; None chooses by type, and of several columns by their usual names.
    """
    path, schema = files[0], open_file(files[0]).schema
    kinds = {field.name: _image_kind(field.type) for field in schema}
    columns = first_few((f"{field.name} ({field.type})" for field in schema), 9)
    if given:
        require_column("--image_column", given, kinds, path)
        if not kinds[given]:
            raise UserError(
                f"--image_column {given}: its type is {schema.field(given).type}; expected bytes, "
                f"a struct of bytes and path, or paths as text. {path} has the columns {columns}"
            )
        return ImageColumn(given, kinds[given])
    types = {name: about.get("_type") for name, about in _features(path, schema).items()}
    of_bytes = [name for name in kinds if kinds[name] in ("struct", "binary")]
    # A struct of bytes and path may also be audio, which only `datasets` says.
    of_bytes = [name for name in of_bytes if types.get(name, "Image") in ("Image", "Value")]
    found = [name for name in of_bytes if types.get(name) == "Image"] or of_bytes
    usual = [name for word in IMAGES for name in found if name.lower() == word]
    texts = [name for name in kinds if kinds[name] == "path"]
    texts = [name for word in PATHS for name in texts if name.lower() == word]
    found = usual[:1] or found or texts[:1]
    if len(found) == 1:
        return ImageColumn(found[0], kinds[found[0]])
    which = f"images may be in {first_few(found, 9)}" if found else "no column holds images"
    raise UserError(f"{path}: {which}; give --image_column. It has the columns {columns}")


def _image_kind(kind: Any) -> str:
    """Return the kind of a column of images that has an Arrow type, '' if it can have none."""
    types = import_pyarrow().types
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "struct" if "bytes" in fields and _is_binary(fields["bytes"]) else ""
    if _is_binary(kind):
        return "binary"
    return "path" if _kind(kind) == "text" and not types.is_temporal(kind) else ""


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _kind(kind: Any) -> str:
    """Return how a column of an Arrow type is represented; '' if it is left out."""
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_boolean(kind) or types.is_integer(kind):
        return "yes or no" if types.is_boolean(kind) else "whole numbers"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "numbers"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "lists" if _kind(kind.value_type) in ("whole numbers", "text") else ""
    is_time = types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind)
    is_text = str(kind) in ("string", "large_string", "string_view", "null")
    return "text" if is_text or is_time else ""


def list_columns(files: Sequence[str]) -> list[str]:
    """Return the names of the columns that `read_columns` can return, those of the first file."""
    return _usable(open_file(files[0]).schema)


def _usable(schema: Any) -> list[str]:
    return [field.name for field in schema if _kind(field.type)]


def read_columns(
    files: Sequence[str], image_column: str | None = None, wanted: Sequence[str] | None = None
) -> Found:
    """Read the names of the images and other columns, but no images; UserError if files differ.

    image_column: as `find_image_column` takes it. wanted: names; None reads all of `list_columns`.

    `Found.columns` holds int64, float and bool arrays, and lists of text. Missing floats are NaN;
    missing text is empty, and a column of integers or bools in which some are missing is text, with
    empty cells for those. Lists are text such as `cat|dog` or `0|3`, empty if the list is.
    `class_names` has the names of the integers in an array, and of those in lists.

    Names are the paths that the images have in their structs, if all of them have one and no two
    have the same. Otherwise they are the file and the number of the row, counted from 0:
    `train-00000-of-00002/00000017.jpg`.

    If the column of images holds paths as text, `names` and `places` are empty and the column is
    one of `columns`.
    """
    image, first = find_image_column(files, image_column), open_file(files[0])
    columns = _choose(first, image, wanted)
    class_names = _class_names(first, columns)
    read = [retry_io(partial(_read_file, path, first, image, columns)) for path in files]
    for part in read:
        if part.class_names != class_names:
            raise UserError(
                f"{part.path} and {first.path} have other class names "
                f"({part.class_names} and {class_names}); they are not of one data set"
            )
    if not any(part.rows for part in read):
        raise UserError(f"{first_few(files)}: no rows; expected one for each image")
    cells = {name: _join([part.cells.pop(name) for part in read]) for name in columns}
    numbers = [name for name in columns if isinstance(cells[name], np.ndarray)]
    numbers += [name for name in columns if _kind(first.schema.field(name).type) == "lists"]
    class_names = {name: names for name, names in class_names.items() if name in numbers}
    if image.kind == "path":
        return Found(Names.pack([]), {}, cells, class_names)
    return Found(_names(read), _places(read), cells, class_names)


@dataclass
class _Part:
    """Rows of a file. paths: of the images in their structs, a large_string array with nulls."""

    path: str
    group_rows: list[int]
    cells: dict[str, Any]
    paths: Any
    class_names: dict[str, list[str]]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


def _read_file(path: str, first: Any, image: ImageColumn, columns: Sequence[str]) -> _Part:
    opened = open_file(path)
    _check_same(opened, first, [*columns, image.name])
    if image.kind != "path":
        opened.check_images(image.name)
    table = opened.read(columns, image.name if _has_paths(opened, image) else None)
    with readable(path):
        cells = {name: _cells(table[name], f"{path}, column {name}") for name in columns}
        paths = _paths(opened, image, table)
    return _Part(path, opened.group_rows, cells, paths, _class_names(opened, columns))


def _choose(opened: Any, image: ImageColumn, wanted: Sequence[str] | None) -> list[str]:
    usable = _usable(opened.schema)
    chosen = usable if wanted is None else [*wanted]
    for name in chosen:
        names = dict.fromkeys(opened.schema.names)
        resolve(name, names, f"column of {opened.path}", importable=False)
        if name not in usable:
            kind = opened.schema.field(name).type
            raise UserError(f"{opened.path}: column {name} has type {kind}; expected {EXPECTED}")
    return [*dict.fromkeys([*chosen, image.name] if image.kind == "path" else chosen)]


def _check_same(opened: Any, first: Any, columns: Sequence[str]) -> None:
    """Raise UserError if a file lacks some columns of the first one, or has other types there."""
    names = opened.schema.names
    if twice := [name for name in columns if names.count(name) > 1]:
        raise UserError(f"{opened.path}: two columns have the name {twice[0]}; rename one")
    for name in columns:
        if name not in names:
            raise UserError(
                f"{opened.path} has no column {name}, but {first.path} has; they are not of one "
                f"data set. It has the columns {first_few(names, 9)}"
            )
        kind, expected = (each.schema.field(name).type for each in (opened, first))
        if (_kind(kind), _image_kind(kind)) != (_kind(expected), _image_kind(expected)):
            raise UserError(
                f"{opened.path}: column {name} has type {kind}, but in {first.path} it has type "
                f"{expected}; write both with the same type"
            )


def _has_paths(opened: Any, image: ImageColumn) -> bool:
    if image.kind != "struct":
        return False
    return "path" in [field.name for field in opened.schema.field(image.name).type]


def _places(read: Sequence[_Part]) -> dict[str, np.ndarray]:
    """Return the number of the file, of the row group, and of the row in the file, for each row."""
    files = np.repeat(np.arange(len(read), dtype=np.uint32), [part.rows for part in read])
    groups = [np.arange(len(part.group_rows), dtype=np.uint32) for part in read]
    groups = [np.repeat(some, part.group_rows) for some, part in zip(groups, read, strict=True)]
    rows = [np.arange(part.rows, dtype=np.uint32) for part in read]
    arrays = files, np.concatenate(groups), np.concatenate(rows)
    return dict(zip(PLACES, arrays, strict=True))


def _paths(opened: ParquetFile | ArrowFile, image: ImageColumn, table: Any) -> Any:
    """Return the paths of the images of a file, a large_string array; they may all be missing."""
    pyarrow = import_pyarrow()
    rows, kind = sum(opened.group_rows), pyarrow.large_string()
    if not _has_paths(opened, image):
        return pyarrow.nulls(rows, kind)
    paths = pyarrow.compute.struct_field(table[image.name], "path").cast(kind)
    paths = pyarrow.concat_arrays([*paths.chunks, pyarrow.nulls(0, kind)])
    if rows and opened.lacks_bytes(image.name).all():
        _look_for_files(opened.path, paths.slice(0, LOOKED_FOR).to_pylist())
    return paths


def _look_for_files(file: str, paths: Sequence[str | None]) -> None:
    """Raise UserError if no row of a file has bytes, and none of these paths leads to an image."""
    folder = os.path.dirname(file)
    inside = [path and path_inside(folder, path) for path in paths]
    if any(path and os.path.exists(path) for path in inside):
        return
    if not any(paths):
        raise UserError(f"{file}: no row has an image, neither bytes nor a path; {EMBED}")
    where = "are outside its folder" if not any(inside) else "do not exist"
    raise UserError(
        f"{file}: no row has the bytes of an image, and the files that it names {where} "
        f"({first_few(filter(None, paths), 2)}); {EMBED}"
    )


def _names(read: Sequence[_Part]) -> Names:
    """Return the names of all rows."""
    pyarrow = import_pyarrow()
    compute, kind = pyarrow.compute, pyarrow.large_binary()
    every = pyarrow.concat_arrays([part.paths for part in read])
    if not every.null_count and compute.min(compute.binary_length(every)).as_py() > 0:
        has_zeros = compute.any(compute.match_substring(every, "\0")).as_py()
        if not has_zeros and len(every.unique()) == len(every):
            return _as_names([every.cast(kind)])
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(part.path)) for part in read])
    pieces = []
    for part in read:
        stem = os.path.splitext(os.path.relpath(part.path, folder))[0]
        numbers = pyarrow.array(np.arange(part.rows)).cast(pyarrow.large_string())
        numbers = compute.utf8_lpad(numbers, DIGITS, "0").cast(kind)
        start = pyarrow.scalar(os.fsencode(f"{stem}/"), kind)
        pieces.append(_concatenate(start, numbers, _extensions(part.paths).cast(kind)))
    return _as_names(pieces)


def _concatenate(*parts: Any) -> Any:
    """Join texts of several arrays, or scalars, of type large_binary."""
    pyarrow = import_pyarrow()
    nothing = pyarrow.scalar(b"", pyarrow.large_binary())
    return pyarrow.compute.binary_join_element_wise(*parts, nothing)


def _extensions(paths: Any) -> Any:
    """Return the extensions of paths, .jpg for those that are missing or of no image."""
    pyarrow = import_pyarrow()
    compute = pyarrow.compute
    ends = compute.replace_substring_regex(paths, r"(?s)^.*(\.[^./]+)$", r"\1")
    ends = compute.utf8_lower(ends)
    known = compute.is_in(ends, value_set=pyarrow.array(extensions(), paths.type))
    return compute.if_else(known, ends, pyarrow.scalar(".jpg", paths.type))


def _as_names(arrays: Sequence[Any]) -> Names:
    pyarrow = import_pyarrow()
    zero = pyarrow.scalar(b"\0", pyarrow.large_binary())
    array = pyarrow.concat_arrays([_concatenate(each, zero) for each in arrays])
    _, ends, text = array.buffers()
    ends = np.frombuffer(ends, np.int64)[: len(array) + 1]
    return Names(np.frombuffer(text, np.uint8)[: ends[-1]], ends)


def _cells(array: Any, where: str) -> np.ndarray | list[str]:
    """Return the cells of a chunked array, as `read_columns` says. where: for messages."""
    pyarrow = import_pyarrow()
    if pyarrow.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    kind = _kind(array.type)
    if kind == "lists":
        return [_in_one_cell(row, where) for row in array.to_pylist()]
    if kind == "numbers":
        floats = pyarrow.types.is_floating(array.type)
        return (array if floats else array.cast(pyarrow.float64())).to_numpy()
    if kind != "text" and not array.null_count:
        try:
            return (array if kind == "yes or no" else array.cast(pyarrow.int64())).to_numpy()
        except pyarrow.ArrowInvalid:  # unsigned ones above 2^63
            pass
    return _texts(array)


def _texts(array: Any) -> list[str]:
    """Return the cells as text; equal ones are the same object."""
    pyarrow = import_pyarrow()
    kind = pyarrow.large_string()
    chunks = array.cast(kind).chunks
    encoded = pyarrow.concat_arrays([*chunks, pyarrow.nulls(0, kind)]).fill_null("")
    encoded = encoded.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return [texts[place] for place in encoded.indices.to_numpy().tolist()]


def _in_one_cell(row: Sequence[Any] | None, where: str) -> str:
    parts = [*map(str, row or ())]
    if None in (row or ()) or any("|" in part for part in parts):
        raise UserError(f"{where}: {row!r}; expected a list without | and missing items")
    return "|".join(parts)


def _join(parts: Sequence[Any]) -> np.ndarray | list[str]:
    """Join the cells of several files; they are text if those of one file are."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    lists = (part if isinstance(part, list) else part.tolist() for part in parts)
    # Arrow's text of a bool is in lower case.
    return [cell if isinstance(cell, str) else str(cell).lower() for part in lists for cell in part]


def _features(path: str, schema: Any) -> dict[str, dict[str, Any]]:
    """Return how `datasets` describes the columns: in the schema, or in dataset_info.json."""
    saved = os.path.join(os.path.dirname(path), "dataset_info.json")
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        info = json.loads(text)["info"] if text else os.path.exists(saved) and read_json(saved)
        features = (info or {}).get("features") or {}
        about = {name: _one(about) for name, about in features.items()}
        return {name: each for name, each in about.items() if isinstance(each, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: cannot read its description by `datasets` ({first_line(error)}); remove "
            f"dataset_info.json, or the metadata `huggingface` of the schema"
        ) from error


def _one(about: Any) -> Any:
    """Return the description of a column; [x] is an old way to write a list of x."""
    return {"_type": "List", "feature": about[0]} if isinstance(about, list) else about


def _class_names(opened: Any, columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the class names of columns of integers, and of lists of them."""
    found = {}
    for name, about in _features(opened.path, opened.schema).items():
        if about.get("_type") in ("List", "LargeList", "Sequence"):
            about = _one(about.get("feature"))
        is_label = isinstance(about, dict) and about.get("_type") == "ClassLabel"
        if name in columns and is_label and isinstance(about.get("names"), list):
            found[name] = [*map(str, about["names"])]
            if twice := [word for word, count in Counter(found[name]).items() if count > 1]:
                raise UserError(
                    f"{opened.path}: column {name} has two classes named {twice[0]!r}; rename one"
                )
    return found
