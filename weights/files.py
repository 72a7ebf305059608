# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint files: written whole or not at all, read without running code, loaded strictly.

python -c "from weights.files import read_checkpoint; read_checkpoint('runs/demo/finetune')"
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, first_few
from parallel import state_dict
from weights.download import KINDS, WEIGHTS, locate

# The official mains and submitit keep their flags so; neither can do anything.
HARMLESS = [argparse.Namespace, PosixPath, (PosixPath, "pathlib.PosixPath")]


def check_archive(path: Path, checksums: bool = True) -> None:
    """UserError if a record of a zip archive is compressed or does not match its CRC-32."""
    if not zipfile.is_zipfile(path):
        return  # a pickle of before torch 1.6 has no checksums
    with zipfile.ZipFile(path) as archive:
        packed = [record for record in archive.infolist() if record.compress_type]
        if packed:  # it could hold a thousand times the size of the file
            raise UserError(
                f"checkpoint {path} is refused: its member {packed[0].filename!r} is compressed, "
                "as torch never does, and could unpack to any size; if you trust who made it, "
                f"unpack it and save it again: python -c \"import torch; c = torch.load('{path}', "
                "weights_only=True); torch.save(c, 'stored.pth')\""
            )
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: the checksum of {damaged} does not match")


def progress(path: Path) -> tuple[int, int] | None:
    """(epoch to go on with, images) of a checkpoint by its name; None if it is not numbered."""
    found = re.fullmatch(r"checkpoint-(\d+)(?:-seen-(\d+))?\.pth", path.name)
    if not found:
        return None
    return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that a run can go on from, newest first."""
    found = [(progress(path), path) for path in folder.iterdir()]
    return [path for _, path in sorted((p for p in found if p[0]), reverse=True)]


def find_checkpoint(folder: Path, average: bool = False) -> Path:
    """What to use of a run's folder: the best, else the newest; or a hub's weights.

    average: the best average of the weights, `checkpoint-best-ema.pth`, goes first.
    """
    names = ["checkpoint-best-ema.pth"] * average + ["checkpoint-best.pth"]
    found = [folder / name for name in names if (folder / name).exists()]
    found += numbered_checkpoints(folder) if folder.is_dir() else []
    found += [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint-<epoch>.pth and no {' or '.join(WEIGHTS)}; "
            "name a checkpoint or another folder"
        )
    return found[0]


def read_checkpoint(
    source: str | Path, sha256: str = "", check: bool = True, average: bool = False
) -> Any:
    """Read a checkpoint's plain types and tensors to the CPU; code in it is never run.

    source: what `sources.locate` understands; a folder stands for its `find_checkpoint`, which
    knows `average`.
    sha256: of the file that is expected. check: the checksum that our own end with, which takes
    reading all of them. `.safetensors` files are read as state dicts.
    """
    path = locate(source, sha256)
    if path.is_dir():
        path = find_checkpoint(path, average)
        logging.getLogger("convnextv2").info("%s: %s of it", source, path.name)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # safetensors: a length of 8 bytes, then JSON
            from safetensors.torch import load_file

            return load_file(path)
        if not start.startswith((b"PK", b"\x80")):  # a zip, or a pickle of before torch 1.6
            raise UserError(
                f"checkpoint {path} is no checkpoint, it begins with {start!r}; expected a .pth, "
                ".pt, .bin or .safetensors file"
            )
        check_archive(path, check)
        return _unpickle(path)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist; expected {KINDS}") from error
    except PermissionError as error:
        raise UserError(f"checkpoint {path} may not be read; check its permissions") from error
    except (UserError, MemoryError):  # the second says nothing about the file
        raise
    except Exception as error:  # torch's unpickler raises nearly anything on other files
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise UserError(
                f"checkpoint {path} is refused: it asks for {asked[1]}, and what a checkpoint "
                "names could run. If you trust who made it, take its tensors out, best where "
                "nothing can be harmed, such as a container without network: python -c "
                f"\"import torch; c = torch.load('{path}', weights_only=False); "
                "c = c.get('model', c) if isinstance(c, dict) else c; "
                "torch.save(getattr(c, 'state_dict', lambda: c)(), 'weights.pth')\""
            ) from error
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise UserError(
            f"checkpoint {path} is truncated, damaged or no checkpoint ({reason})"
        ) from error


def _unpickle(path: Path) -> Any:
    with torch.serialization.safe_globals(HARMLESS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "unable to mmap" in str(error):  # for want of memory
                raise OSError(str(error)) from error
            if "mmap can only be used" not in str(error):  # files of before torch 1.6
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, allow_missing: Iterable[str] = ()
) -> list[str]:
    """Load all of `weights` or nothing; returns the missing names that start as allowed.

    Anything else that is missing, unexpected or of another shape is an error that names it.
    """
    expected = model.state_dict()
    allowed = tuple(allow_missing)
    missing = [name for name in expected if name not in weights]
    problems = {
        "missing": [name for name in missing if not name.startswith(allowed)],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
            for name, value in weights.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(names)} {kind} ({first_few(names)})" for kind, names in problems.items() if names
        )
        raise UserError(
            f"{source} does not fit {type(model).__name__}: {told}; "
            "check --model and the flags that shape it (--stem_stride, --in_chans, --decoder_*)"
        )
    state_dict.load_weights(model, weights)
    return missing


def _is_within(path: Path) -> bool:
    return "-seen-" in path.name
