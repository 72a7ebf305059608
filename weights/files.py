# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint files: find them, read them without running code, load them strictly.

python -c "from weights.files import read_checkpoint; read_checkpoint('runs/demo/finetune')"
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, first_few, first_line
from parallel import state_dict
from weights.download import INDEX, KINDS, WEIGHTS, list_parts, locate
from weights.hub_config import read_hub_run
from weights.mismatch import explain

# Harmless classes in checkpoints of the official code and of submitit, which store their flags.
HARMLESS = [argparse.Namespace, PosixPath, (PosixPath, "pathlib.PosixPath")]
TOOLKIT = "convnextv2_toolkit"  # key in the metadata of .safetensors files
BEST, BEST_EMA = "checkpoint-best.pth", "checkpoint-best-ema.pth"


def parse_checkpoint_name(path: Path) -> tuple[int, int] | None:
    """Parse (epoch to resume, images of it already seen); None if the name has no number."""
    found = re.fullmatch(r"checkpoint-(\d+)(?:-seen-(\d+))?\.pth", path.name)
    if not found:
        return None
    return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """List the numbered checkpoints in a folder, newest first."""
    files = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in files if parse_checkpoint_name(path)]
    return sorted(found, key=parse_checkpoint_name, reverse=True)


def list_checkpoints(folder: Path, ema: bool = False) -> list[Path]:
    """List the weights in a folder in the order of `find_checkpoint`; [] if it has none."""
    newest = [path.name for path in numbered_checkpoints(folder)[:1]]
    names = (*[BEST_EMA] * ema, BEST, *newest, *WEIGHTS)
    return [folder / name for name in names if (folder / name).exists()]


def find_checkpoint(folder: Path, ema: bool = False) -> Path:
    """Choose the weights in a folder: the best, else the newest checkpoint, else a hub's file.

    ema: prefer the best EMA weights, `checkpoint-best-ema.pth`.
    """
    if found := list_checkpoints(folder, ema):
        return found[0]
    raise UserError(
        f"{folder} contains no checkpoint-<epoch>.pth and no {' or '.join(WEIGHTS)}; "
        "give the path of a checkpoint or of another folder"
    )


def find_source(source: str | Path, sha256: str = "", ema: bool = False) -> Path:
    """Find the file of a source, as `locate` does, and in a folder as `find_checkpoint` does."""
    path = locate(source, sha256)
    return find_checkpoint(path, ema) if path.is_dir() else path


def read_checkpoint(
    source: str | Path, sha256: str = "", check: bool = True, ema: bool = False
) -> Any:
    """Read a checkpoint's plain types and tensors to the CPU, without running code in it.

    source, sha256, ema: as in `find_source`. check: verify the checksums of a .pth file, which
    reads all of it. A `.safetensors` file is a state dict, and so are the parts that an index of
    the hub lists; one that export.py wrote, or that has the JSON files of transformers next to it,
    also has `args` and `classes`.
    """
    path = find_source(source, sha256, ema)
    part = re.search(r"-\d{5}-of-(\d{5})\.(safetensors|bin)$", path.name)
    if part and int(part[1]) > 1:
        raise UserError(
            f"{path} is one of {int(part[1])} parts of the weights; give their folder, with the "
            f"file that ends in {INDEX}"
        )
    content = _read_file(path, check)
    is_hub_file = path.name in WEIGHTS and isinstance(content, dict)
    if not (is_hub_file and all(isinstance(value, Tensor) for value in content.values())):
        return content
    return {**read_hub_run(path.parent, content), "model": content}


def _read_file(path: Path, check: bool = True) -> Any:
    """Read one file, or the parts that an index lists."""
    try:
        if path.name.endswith(INDEX):
            return _read_parts(path)
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # safetensors: a length in 8 bytes, then JSON
            return _read_safetensors(path)
        if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle before torch 1.6
            raise UserError(
                f"{path} is not a checkpoint: it begins with {start!r}; expected a .pth, .pt, "
                ".bin or .safetensors file"
            )
        check_archive(path, check)
        return _load(path)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist; expected {KINDS}") from error
    except PermissionError as error:
        raise UserError(f"checkpoint {path} is not readable; check its permissions") from error
    except (UserError, MemoryError):  # lack of memory says nothing about the file
        raise
    except Exception as error:  # torch's unpickler raises almost anything for other files
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise UserError(
                f"checkpoint {path} is refused: it needs {asked[1]}, and loading that could run "
                "any code. If you trust its author, load it in a container without network by "
                "torch.load(PATH, weights_only=False), and torch.save its state dict alone"
            ) from error
        reason = first_line(error).split(". ")[0]
        raise UserError(f"{path} is truncated, damaged or not a checkpoint ({reason})") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        run = json.loads((file.metadata() or {}).get(TOOLKIT, "{}"))
    return {**run, "model": load_file(path)} if run else load_file(path)


def _read_parts(index: Path) -> dict[str, Tensor]:
    files, state = list_parts(index), {}
    for name in sorted({*files.values()}):
        if not index.with_name(name).exists():
            raise UserError(f"{index.with_name(name)} is missing; {index.name} lists it")
        state |= _read_file(index.with_name(name))
    if state.keys() != files.keys():
        odd = first_few(sorted(state.keys() ^ files.keys()))
        raise UserError(f"{index} and its files hold different tensors: {odd}; download all again")
    return state


def check_archive(path: Path, checksums: bool = True) -> None:
    """Raise UserError if a record of a zip archive is compressed or fails its CRC-32."""
    if not zipfile.is_zipfile(path):
        return  # pickles before torch 1.6 have no checksums
    with zipfile.ZipFile(path) as archive:
        packed = [record for record in archive.infolist() if record.compress_type]
        if packed:  # it could unpack to a thousand times the size of the file
            raise UserError(
                f"checkpoint {path} is refused: its member {packed[0].filename!r} is compressed "
                "and could unpack to any size; expected a file that torch.save wrote"
            )
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {damaged} does not match its checksum")


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(HARMLESS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "unable to mmap" in str(error):
                raise MemoryError(f"not enough memory to map {path}") from error
            if "mmap can only be used" not in str(error):  # files before torch 1.6
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, allow_missing: Iterable[str] = ()
) -> list[str]:
    """Load all of `weights` or nothing, and return the missing names, as `check_weights` does."""
    missing = check_weights(model, weights, source, allow_missing)
    state_dict.load_weights(model, weights)
    return missing


def check_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, allow_missing: Iterable[str] = ()
) -> list[str]:
    """Raise UserError unless `weights` fit the model and are finite; returns the missing names.

    Missing names must start with one of `allow_missing`. Other missing names, unexpected names
    and other shapes are an error that lists them, with the reason if it is known. Buffers may hold
    Inf, as masks do.
    """
    expected = model.state_dict()
    allowed = tuple(allow_missing)
    missing = [name for name in expected if name not in weights]
    lacking = [name for name in missing if not name.startswith(allowed)]
    reshaped = [n for n, v in weights.items() if n in expected and v.shape != expected[n].shape]
    problems = {
        "missing": lacking,
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in reshaped
        ],
    }
    if any(problems.values()):
        found = [f"{len(x)} {kind} ({first_few(x)})" for kind, x in problems.items() if x]
        reason = explain(model, weights, lacking, reshaped)
        raise UserError(f"{source} does not fit {type(model).__name__}: {'; '.join(found)}{reason}")
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    check_finite({name: value for name, value in weights.items() if name in trained}, source)
    return missing


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError with the first names if tensors hold NaN or Inf."""
    odd = [name for name, value in weights.items() if not torch.isfinite(value.sum())]
    broken = [name for name in odd if not torch.isfinite(weights[name]).all()]  # slow, but exact
    if broken:
        raise UserError(
            f"{source} holds NaN or Inf in {first_few(broken)}: the run that wrote it had diverged "
            "or the file was damaged; give an earlier checkpoint"
        )
