# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What others packed, read into memory: no name in an archive becomes a path, no pickle runs code.

python -c "from data_loading import builtin; print(builtin.unpickle(b'\\x80\\x02K\\x01.'))"
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import pickle
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_url

from data_loading.folders import DatasetSpec
from data_loading.rng import fold_in
from errors import UserError
from parallel.process_group import is_main_process, main_process_first
from utils import write_atomically

LARGEST = 2**29  # bytes that an archive may unpack to; CIFAR's are 180 MiB
HEADERS = 2**24  # bytes of an archive that are no member's
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)
DAMAGED += (NotImplementedError, ValueError)  # by zipfile, of kinds and sizes it cannot be


def _refuse(name: str, size: int, plain: bool) -> None:
    """UserError for a member that an honest archive of data does not have."""
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name):
        raise UserError(f"is refused: its member {name!r} would lie outside of its folder")
    if not plain:
        raise UserError(f"is refused: its member {name!r} is a link or a device, no file")
    if size > LARGEST:
        raise UserError(f"is refused: it unpacks to {size} bytes or more, above {LARGEST}")


class _Bounded:
    """A stream of which `left` more bytes may be read: the size of a tar's header is a claim too.

    What is skipped is not kept, and counts as its member's.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.left = stream, HEADERS
        self.seek, self.tell, self.close = stream.seek, stream.tell, stream.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise UserError(f"is refused: it has headers of more than {HEADERS} bytes")
        self.left -= size
        return self.stream.read(size)


class _Tar(tarfile.TarFile):
    @classmethod
    def taropen(cls, name: str, mode: str = "r", fileobj: Any = None, **options: Any) -> _Tar:
        """What `open` ends in for every compression."""
        return super().taropen(name, mode, _Bounded(fileobj), **options)


def read_tar(path: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """These members of a tar archive, of any compression, by name; all others are checked too."""
    found, names, size = {}, set(wanted), 0
    try:
        with open(path, "rb") as file, _Tar.open(fileobj=file) as archive:
            for member in archive:
                size += member.size
                _refuse(member.name, size, member.isfile() or member.isdir())
                if member.name in names:
                    archive.fileobj.left += member.size
                    found[member.name] = archive.extractfile(member).read()
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except DAMAGED as error:
        raise UserError(f"{path} is no tar archive, or damaged ({error})") from error
    absent = names - found.keys()
    if absent:
        raise UserError(f"{path} has no {min(absent)}")
    return found


class Zip:
    """A zip archive whose members are read into memory, after all of them were checked.

    with Zip(path) as archive: archive.names, archive.read(name)
    """

    def __init__(self, path: Path) -> None:
        self.file = zipfile.ZipFile(path)
        members = self.file.infolist()
        self.names = [member.filename for member in members]
        for member in members:
            mode = stat.S_IFMT(member.external_attr >> 16)
            _refuse(member.filename, 0, mode in (0, stat.S_IFREG, stat.S_IFDIR))

    def __enter__(self) -> Zip:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def read(self, name: str, largest: int = LARGEST) -> bytes:
        """A member; no more of it is unpacked than is allowed, whatever size it claims."""
        with self.file.open(name) as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise UserError(f"is refused: its member {name!r} unpacks to more than {largest} bytes")
        return data


class _Bytes:
    """In place of numpy's type of bytes; the real one takes fields of pointers from a pickle."""

    __slots__ = ()

    def __init__(self, code: str, *_: Any) -> None:
        if code not in ("u1", "|u1"):
            raise UserError(f"holds an array of type {str(code)[:20]!r}; expected uint8 alone")

    def __setstate__(self, state: tuple) -> None:
        if state[1:5] != ("|", None, None, None):
            raise UserError("holds an array type with fields; expected uint8 alone")


class _Array:
    """In place of numpy's array, and of the function that makes an empty one."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        plain = isinstance(kind, _Bytes) and isinstance(data, bytes) and isinstance(shape, tuple)
        if by_columns or not plain:
            raise UserError("holds an array of another kind; expected uint8, row by row")
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


ARRAYS = {  # all that a pickle may ask for
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ARRAYS:
            raise UserError(f"asks for {module}.{name}, and what a pickle names could run")
        return ARRAYS[f"{module}.{name}"]


def unpickle(data: bytes) -> Any:
    """Plain types out of a pickle, with uint8 arrays as values of the dict that it is.

    One that asks for more is a UserError.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged ones raise nearly anything
        raise UserError(f"is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        return content
    arrays = {key: value.array for key, value in content.items() if isinstance(value, _Array)}
    absent = [key for key, array in arrays.items() if array is None]
    if absent:
        raise UserError(f"is damaged (the array {str(absent[0])[:20]!r} has no content)")
    return content | arrays


class Cifar(Dataset):
    """CIFAR-10 or CIFAR-100 in `root`, in the files of torchvision's `kind`, which are pickles.

    download: fetch what is not there, as torchvision does, from where it does.
    """

    def __init__(self, kind: type[CIFAR10], root: Path, train: bool, download: bool) -> None:
        folder, meta = root / kind.base_folder, kind.meta
        every = [*kind.train_list, *kind.test_list, [meta["filename"], meta["md5"]]]
        if download and not all((folder / name).is_file() for name, _ in every):
            self._fetch(kind, root, [name for name, _ in every])
        parts = [
            self._read(folder / name, md5)
            for name, md5 in (kind.train_list if train else kind.test_list)
        ]
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        self.images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))  # (N, 32, 32, 3) uint8
        key = "labels" if "labels" in parts[0] else "fine_labels"
        self.labels = [label for part in parts for label in part[key]]
        self.classes = tuple(self._read(folder / meta["filename"], meta["md5"])[meta["key"]])

    @staticmethod
    def _fetch(kind: type[CIFAR10], root: Path, names: list[str]) -> None:
        download_url(kind.url, str(root), kind.filename, kind.tgz_md5)
        wanted = [f"{kind.base_folder}/{name}" for name in names]
        for name, data in read_tar(root / kind.filename, wanted).items():
            (root / name).parent.mkdir(exist_ok=True)
            write_atomically(data, root / name)

    @staticmethod
    def _read(path: Path, md5: str) -> dict[str, Any]:
        data = path.read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{path} is not the published file: its MD5 is not {md5}")
        try:
            return unpickle(data)
        except UserError as error:
            raise UserError(f"{path} {error}") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


def find_cifar(kind: type[CIFAR10], data_path: str | None, train: bool) -> Cifar:
    """`Cifar` in data_path, downloaded there by the main process if need be; on every rank."""
    if not data_path:
        raise UserError(f"--data_path is not given; expected where {kind.__name__} is or shall be")
    root = Path(data_path).expanduser()

    def find() -> Cifar:
        try:
            return Cifar(kind, root, train, download=is_main_process())
        except Exception as error:  # of the network, whatever it is: the other ranks wait
            reason = error if isinstance(error, UserError | RuntimeError) else repr(error)
            raise UserError(
                f"{kind.__name__} could not be had ({reason}); expected {root / kind.base_folder}/ "
                f"with the files of {kind.url}: download and unpack it in {root}"
            ) from error

    return main_process_first(find)


def cifar10(spec: DatasetSpec, train: bool) -> Cifar:
    """CIFAR-10 in data_path, downloaded there if need be."""
    return find_cifar(CIFAR10, spec.data_path, train)


def cifar100(spec: DatasetSpec, train: bool) -> Cifar:
    """CIFAR-100 in data_path, downloaded there if need be."""
    return find_cifar(CIFAR100, spec.data_path, train)


class Digits(Dataset):
    """1797 grey 8x8 digits (assets/README.md); in each class every fifth is for validation."""

    classes = tuple("0123456789")

    def __init__(self, train: bool):
        with np.load(Path(__file__).resolve().parent / "assets" / "digits.npz") as file:
            images, labels = file["images"], file["labels"]
        nth = np.zeros(len(labels), dtype=np.int64)  # how many of its class came before
        for label in range(10):
            nth[labels == label] = np.arange((labels == label).sum())
        chosen = (nth % 5 != 4) if train else (nth % 5 == 4)
        self.images = (images[chosen].astype(np.uint16) * 255 // 16).astype(np.uint8)  # was 0..16
        self.labels = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


class Synthetic(Dataset):
    """Discs on noise; the label is the hue, which tints the noise for crops that miss the disc."""

    def __init__(self, size: tuple[int, int], nb_classes: int, train: bool):
        self.size, self.train = size, train
        self.classes = tuple(f"hue{k}" for k in range(nb_classes))

    def __len__(self) -> int:
        return 1024 if self.train else 256

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        (height, width), label = self.size, index % len(self.classes)
        random = np.random.default_rng(fold_in(int(self.train), index))
        colour = 255 * np.array(colorsys.hsv_to_rgb(label / len(self.classes), 1, 1))
        radius = random.uniform(0.25, 0.45) * min(height, width)
        y = np.arange(height)[:, None] + 0.5 - random.uniform(radius, height - radius)
        x = np.arange(width)[None, :] + 0.5 - random.uniform(radius, width - radius)
        share = np.where(y**2 + x**2 <= radius**2, 0.8, 0.2)[..., None]  # (H, W, 1) of colour
        noise = random.uniform(0, 255, size=(height, width, 1))
        pixels = (share * colour + (1 - share) * noise).astype(np.uint8)  # (H, W, 3)
        return Image.fromarray(pixels), label
