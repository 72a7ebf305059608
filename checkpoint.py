# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint files: written whole or not at all, read without running code, loaded strictly.

python -c "import checkpoint as c, pathlib; print(c.numbered_checkpoints(pathlib.Path('.')))"
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError

GROUP_STATE = ("step", "lookahead_step", "k")  # what optimizers count in a group, not in a state


def write_atomically(content: Any, path: Path) -> None:
    """Save text or bytes, or with torch.save what it is, so that `path` is old or new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name, by copying where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        return write_atomically(source.read_bytes(), target)
    os.replace(temporary, target)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-<epoch>.pth` files of a folder, newest epoch first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]


def find_checkpoint(folder: Path) -> Path:
    """What to use of a run's folder: `checkpoint-best.pth`, else the newest."""
    best = folder / "checkpoint-best.pth"
    found = [best] if best.exists() else numbered_checkpoints(folder) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint-<epoch>.pth; name a checkpoint or another folder"
        )
    return found[0]


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint's plain types and tensors to the CPU; code in it is never run.

    A folder stands for its `find_checkpoint`.
    """
    path = find_checkpoint(Path(path)) if os.path.isdir(path) else path
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # files of before torch 1.6
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist; check the path") from error
    except PermissionError as error:
        raise UserError(f"checkpoint {path} may not be read; check its permissions") from error
    except MemoryError:  # says nothing about the file
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is no torch checkpoint, or holds more than tensors and plain "
            "types, which could run code; save it again as a dict of tensors"
        ) from error
    except Exception as error:  # torch's unpickler raises nearly anything on other files
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise UserError(f"checkpoint {path} is truncated or damaged ({reason})") from error


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
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
            for kind, names in problems.items()
            if names
        )
        raise UserError(
            f"{source} does not fit {type(model).__name__}: {told}; "
            "check --model and the flags that shape it (--stem_stride, --in_chans, --decoder_*)"
        )
    model.load_state_dict(weights, strict=False)
    return missing


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, source: str) -> None:
    """Restore the moments; learning rate, decay and betas stay as the flags set them now."""
    name = type(optimizer).__name__
    if saved.get("name", name) != name:
        raise UserError(f"{source}: saved by {saved['name']}, this run uses {name}; change --opt")
    kept = GROUP_STATE + ("params",)
    options = [{k: v for k, v in g.items() if k not in kept} for g in optimizer.param_groups]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if ours != theirs:
        raise UserError(
            f"{source}: its optimizer has parameter groups of {theirs} tensors, this run has "
            f"{ours}; resume with the same --layer_decay, --layer_decay_type and --weight_decay"
        )
    optimizer.load_state_dict(saved)
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
