# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Files of features with the names and labels of their images: .npy, .safetensors and .parquet.

python probe.py features runs/photos --data_path photos --output photos.parquet
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.probe_flags import side_file
from errors import UserError
from utils import as_csv, explain, write_atomically

LARGEST_HEADER = 90_000_000  # bytes of names in a safetensors file, which allows 100 MB


@dataclass
class Table:
    """Features of images, a row each.

    features: (N, D) float32. images: names. parts: `train` or `val` of each. labels: (N,) numbers
    of classes, None if images have not one class each. classes: texts of the labels, '' without.
    about: of the whole, such as the checkpoint.
    """

    features: Tensor
    images: list[str]
    parts: list[str]
    labels: Tensor | None
    classes: list[str]
    about: dict[str, str] = field(default_factory=dict)


def write_csv(names: Sequence[str], rows: Sequence[Sequence], path: Path) -> None:
    """Write rows below a line of column names, atomically. UserError if that fails."""
    write_output(as_csv(names, rows), path)


def write_npy(table: Table, path: Path) -> list[Path]:
    """Write features, and in NAME-rows.csv next to them row, image, part, label and class."""
    write_output(lambda file: np.save(file, table.features.numpy()), path)
    rows = zip(range(len(table.images)), *_columns(table).values(), strict=True)
    listing = side_file(path)
    write_csv(("row", *_columns(table)), [*rows], listing)
    return [path, listing]


def write_safetensors(table: Table, path: Path) -> list[Path]:
    """Write the tensors `features` and `labels`; `images`, `parts` and `classes`
    are JSON lists in the metadata.
    """
    from safetensors.torch import save

    columns = _columns(table)
    lists = {"images": "image", "parts": "part", "classes": "class"}
    texts = {name: json.dumps(columns[column]) for name, column in lists.items()}
    if sum(map(len, texts.values())) > LARGEST_HEADER:
        raise UserError(
            f"--output {path}: safetensors files hold at most 100 MB of names, and these are "
            "longer; give a name that ends in .parquet or .npy"
        )
    tensors = {"features": table.features}
    if table.labels is not None:
        tensors["labels"] = table.labels
    write_output(save(tensors, texts | table.about), path)
    return [path]


def write_parquet(table: Table, path: Path) -> list[Path]:
    """Write the columns image, part, label (if any), class and feature, a list of D float32."""
    import pyarrow as pa
    from pyarrow import parquet

    flat = pa.array(table.features.numpy().reshape(-1))
    columns = dict(_columns(table))
    columns["feature"] = pa.FixedSizeListArray.from_arrays(flat, table.features.shape[1])
    rows = pa.table(columns).replace_schema_metadata(table.about)
    write_output(lambda file: parquet.write_table(rows, pa.PythonFile(file, "w")), path)
    return [path]


WRITERS: dict[str, Callable[[Table, Path], list[Path]]] = {
    ".npy": write_npy,
    ".safetensors": write_safetensors,
    ".parquet": write_parquet,
}


def check_writer(path: Path) -> None:
    """Raise UserError, before features are computed, if a file cannot be written."""
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(
            f"--output {path} needs pyarrow: pip install pyarrow; or give a name that ends in .npy"
        )


def _columns(table: Table) -> dict[str, list]:
    """Return the columns of each image: image, part, label if there are any, and class."""
    columns = {"image": [_printable(name) for name in table.images], "part": table.parts}
    if table.labels is not None:
        columns["label"] = table.labels.tolist()
    return columns | {"class": table.classes}


def _printable(name: str) -> str:
    """Return a name with bytes that are no UTF-8 as \\x.., which every format can hold."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def write_output(content: object, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, path)
    except OSError as error:
        raise UserError(f"--output {path}: {explain(error)}") from error


def as_table(features: Tensor, **columns: object) -> Table:
    """Build a `Table` with its features in float32 on the CPU."""
    return Table(features.detach().float().cpu().contiguous(), **columns)


def join(tables: Sequence[Table]) -> Table:
    """Return the rows of several tables, one after the other."""
    labels = [table.labels for table in tables]
    return Table(
        torch.cat([table.features for table in tables]),
        [name for table in tables for name in table.images],
        [part for table in tables for part in table.parts],
        None if any(each is None for each in labels) else torch.cat(labels),
        [text for table in tables for text in table.classes],
        tables[0].about,
    )
