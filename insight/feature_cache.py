# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A folder of features on disk, each file keyed by the weights, the images and the preprocessing.

python -c "from insight.feature_cache import default_folder; print(default_folder())"
"""

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_loading.builtin import Synthetic
from data_loading.mixed import Listed
from data_loading.split import Part
from errors import UserError, first_line
from parallel.process_group import get_logger
from utils import explain, write_atomically

VERSION = "2"  # of what is computed; a change of it makes all files stale
SUFFIX = ".safetensors"
ARRAYS = ("images", "data")  # attributes with the pixels of data sets that are held in memory


def default_folder() -> Path:
    """Return the folder of the cache for this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnextv2" / "features"


class FeatureCache:
    """Tensors by key, in one safetensors file each.

    A file is written under another name and then renamed, so it is never half written. It holds
    its whole key and a checksum; one that is damaged or has another key counts as absent.
    folder: None for a cache that is off.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, key: Mapping[str, str]) -> Path:
        """Return the file of a key; the cache must not be off."""
        name = hashlib.sha256(_text(key).encode()).hexdigest()[:32]
        return self.folder / f"{name}{SUFFIX}"

    def check(self) -> None:
        """Raise UserError, before anything is computed, if the folder cannot be written."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise _refused(self.folder, first_line(error)) from error
        if not writable:
            raise _refused(self.folder, "it is not writable")

    def read(self, key: Mapping[str, str] | None) -> dict[str, Tensor] | None:
        """Return the tensors that were stored with this key, None if there are none.

        key: None for data that cannot be recognized again.
        """
        if self.folder is None or key is None or not (path := self.path(key)).is_file():
            return None
        try:
            return _read(path, key)
        except Exception as error:  # of safetensors, of the disk, of JSON
            text = "%s: features cannot be used and are computed again (%s)"
            get_logger().warning(text, path, first_line(error))
            return None

    def write(self, key: Mapping[str, str] | None, tensors: Mapping[str, Tensor]) -> Path | None:
        """Store tensors; returns the file. A full disk is a warning, since the result is there."""
        from safetensors.torch import save

        if self.folder is None or key is None:
            return None
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        about = {"key": _text(key), "checksum": str(checksum(tensors))}
        path = self.path(key)
        try:
            write_atomically(save(tensors, about), path)
        except OSError as error:
            get_logger().warning("features are not cached: %s", explain(error))
            return None
        return path


def _refused(folder: Path, reason: str) -> UserError:
    return UserError(
        f"--feature_cache {folder}: {reason}; give another folder, or none for no cache"
    )


def _text(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _read(path: Path, key: Mapping[str, str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("key") != _text(key):
            raise ValueError("it has another key")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("checksum") != str(checksum(tensors)):
        raise ValueError("its checksum is wrong")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the names and values of tensors, whatever their order."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), value))
    return value


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if len(flat) else memoryview(b"")


# --- keys -----------------------------------------------------------------------------------------


def hash_weights(model: nn.Module, left_out: Iterable[str] = ()) -> str:
    """Return a SHA-256 of a network: its modules with their settings, and its weights.

    left_out: prefixes of parameters that do not count, such as a classifier that is not used.
    """
    digest, left_out = hashlib.sha256(), tuple(left_out)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(left_out):
            digest.update(f"{name} {type(module).__name__} {module.extra_repr()}\n".encode())
    for name, value in model.state_dict().items():
        if name.startswith(left_out):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def hash_bytes(*parts: bytes) -> str:
    """Return a SHA-256 of several texts; where one ends counts too."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part)
    return digest.hexdigest()


def hash_images(data: Any) -> str | None:
    """Return a SHA-256 of which images a data set has, in its order; None if it cannot tell.

    Images in files: by their names, and by sizes and modification times of the files, or of the
    archives that hold them. Images in memory: by their pixels. Labels do not count.
    """
    digest = hashlib.sha256()
    if isinstance(data, Part):
        inner = hash_images(data.dataset)
        if inner is None:
            return None
        digest.update(inner.encode() + np.ascontiguousarray(data.indices, np.int64).tobytes())
        return digest.hexdigest()
    if isinstance(data, Synthetic):  # a function of these
        return f"synthetic {data.size} {len(data.classes)} {data.train}"
    if isinstance(data, Listed):
        return _hash_files(data, digest)
    for name in ARRAYS:
        values = getattr(data, name, None)
        values = values.numpy() if isinstance(values, Tensor) else values
        if isinstance(values, np.ndarray) and len(values) == len(data) and values.dtype != object:
            digest.update(f"{type(data).__name__} {values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values))
            return digest.hexdigest()
    return None


def _hash_files(data: Listed, digest: Any) -> str | None:
    """Hash names, and the sizes and times of the files that hold the images."""
    held: dict[str, str] = {}  # an archive or a folder -> the archive that it is or lies in, or ''
    seen: set[str] = set()
    for number in range(len(data)):
        place = data.path_of(number)
        digest.update(os.fsencode(place) + b"\0")
        file = place if _is_file(place) else _find_archive(place, held)
        if not file:  # a file that is missing, or a place that is no path
            return None
        if file not in seen:
            seen.add(file)
            facts = os.stat(file)
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _find_archive(place: str, held: dict[str, str]) -> str:
    """Return the file in which `photos.zip/cat/1.jpg` or `a.parquet, row 3` lies, '' if none."""
    archive, comma, _ = place.rpartition(", row ")
    parent = archive if comma else os.path.dirname(place)
    if parent not in held:
        if _is_file(parent):
            held[parent] = parent
        elif not parent or parent == os.path.dirname(parent) or os.path.isdir(parent):
            held[parent] = ""
        else:
            held[parent] = _find_archive(parent, held)
    return held[parent]


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
