# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint files: written whole or not at all, read without running code, loaded strictly.

python -c "from weights.files import read_checkpoint; read_checkpoint('runs/demo/finetune')"
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import logging
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from errors import UserError, some
from parallel import state_dict
from parallel.sharding import own_part
from weights.download import KINDS, WEIGHTS, locate

# The official mains and submitit keep their flags so; neither can do anything.
HARMLESS = [argparse.Namespace, PosixPath, (PosixPath, "pathlib.PosixPath")]
GROUP_STATE = ("step", "lookahead_step", "k")  # what optimizers count in a group, not in a state


MARK = b"sha256 of all before: "  # ends a checkpoint, as the comment of its zip archive


def write_atomically(content: Any, path: Path) -> None:
    """Save text or bytes, or with torch.save what it is, so that `path` is old or new, whole.

    A function fills the file itself. What torch saves ends with its own checksum. OSError if the
    disk does not take it.
    """
    if callable(content):
        return _replace(path, content)
    if isinstance(content, str | bytes):
        data = content.encode() if isinstance(content, str) else content
        return _replace(path, lambda file: file.write(data))
    _replace(path, lambda file: _save(content, file))


def _save(content: Any, file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer, of a disk that is full
        raise OSError(f"torch.save: {str(error).splitlines()[0]}") from error
    _seal(file)


def _beside(path: Path) -> Path:
    """A name that nobody else writes to: in containers the numbers of processes are often alike."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replace(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    temporary = _beside(path)
    try:
        with open(temporary, "w+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(folder)


def _seal(file: BinaryIO) -> None:
    """Turn the empty comment at the end of a zip archive into the checksum of what precedes it."""
    file.seek(-2, os.SEEK_END)  # the length of the comment
    end = file.tell()
    comment = MARK + _sha256(file, end)
    file.seek(end)
    file.write(len(comment).to_bytes(2, "little") + comment)


def _sha256(file: BinaryIO, length: int) -> bytes:
    """In hexadecimal, of the first `length` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0:
        block = file.read(min(length, 2**22))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


def has_seal(path: Path, check: bool = False) -> bool:
    """Whether a file ends with its checksum; with `check`, UserError if that does not fit."""
    size = len(MARK) + 64
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END) - size
        file.seek(max(end, 0))
        tail = file.read()
        found = tail.startswith(MARK)
        if found and check and _sha256(file, end - 2) != tail[len(MARK) :]:
            raise UserError(f"checkpoint {path} is damaged: its checksum does not fit")
    return found


def link(source: Path, target: Path) -> None:
    """Give a finished file a second name, by copying where the file system has no hard links."""
    temporary = _beside(target)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file:
            return _replace(target, lambda copy: shutil.copyfileobj(file, copy))
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # which stays where both were names of one file


def checkpoint_name(epoch: int, seen: int) -> str:
    """`checkpoint-<last finished epoch>.pth`, or in an epoch `checkpoint-<it>-seen-<images>.pth`.

    Images, since what an update takes may change within a run.
    """
    return f"checkpoint-{epoch}-seen-{seen}.pth" if seen else f"checkpoint-{epoch - 1}.pth"


def _progress(path: Path) -> tuple[int, int] | None:
    """(epoch to go on with, images) of a checkpoint by its name; None if it is not numbered."""
    found = re.fullmatch(r"checkpoint-(\d+)(?:-seen-(\d+))?\.pth", path.name)
    if not found:
        return None
    return (int(found[1]), int(found[2])) if found[2] else (int(found[1]) + 1, 0)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that a run can go on from, newest first."""
    found = [(_progress(path), path) for path in folder.iterdir()]
    return [path for _, path in sorted((p for p in found if p[0]), reverse=True)]


def write_checkpoints(
    folder: Path,
    content: dict[str, Any],
    numbered: bool,
    improved: Iterable[str],
    keep: int,
    source: str = "",
) -> None:
    """The files of `utils.save_model`.

    The numbered one comes last: a run that is killed before it repeats the epoch, and writes the
    others again.
    """
    state = content["state"]
    newest = folder / checkpoint_name(state["epoch"], state["seen"])
    complete = [folder / f"checkpoint-{name}.pth" for name in improved if name != "best-ema"]
    complete += [newest] if numbered else []
    if "best-ema" in improved:
        short = {key: content[key] for key in ("state", "args", "classes")}
        write_atomically(
            {"model": content["model_ema"], "model_ema": content["model_ema"], **short},
            folder / "checkpoint-best-ema.pth",
        )
    for number, path in enumerate(complete):
        if number == 0:
            write_atomically(content, path)
        else:
            link(complete[0], path)
    if numbered:
        _rotate(folder, newest, keep, source)


def _rotate(folder: Path, newest: Path, keep: int, source: str) -> None:
    """Delete all but the `keep` newest ends of epochs, and within an epoch all but two saves.

    source: what the run went on from, which stays as long as it runs.
    """
    paths = numbered_checkpoints(folder)
    ends = [path for path in paths if not _is_within(path)]
    within = [path for path in paths if _is_within(path)]
    for path in ends[keep:] + (within[2:] if newest in within else []):
        if path != newest and path.resolve() != Path(source).resolve():
            path.unlink()
    drop_passed(newest, source)


def drop_passed(newest: Path, source: str = "") -> None:
    """Delete the saves within epochs that end no later than `newest`, itself such an end.

    A run that was killed between its last save and this has left them.
    """
    for path in numbered_checkpoints(newest.parent) if not _is_within(newest) else ():
        passed = _is_within(path) and _progress(path) < _progress(newest)
        if passed and path.resolve() != Path(source).resolve():
            with contextlib.suppress(OSError):  # they are in nobody's way
                path.unlink()


def _is_within(path: Path) -> bool:
    return "-seen-" in path.name


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
        has_seal(path, check)
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


def _refuse_compressed(path: Path) -> None:
    """UserError if a zip archive holds what may be a thousand times as large as the file."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = [member for member in archive.infolist() if member.compress_type]
    if packed:
        raise UserError(
            f"checkpoint {path} is refused: its member {packed[0].filename!r} is compressed, as "
            "torch never does, and could unpack to any size; if you trust who made it, unpack it "
            f"and save it again: python -c \"import torch; c = torch.load('{path}', "
            "weights_only=True); torch.save(c, 'stored.pth')\""
        )


def _unpickle(path: Path) -> Any:
    _refuse_compressed(path)
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
            f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names
        )
        raise UserError(
            f"{source} does not fit {type(model).__name__}: {told}; "
            "check --model and the flags that shape it (--stem_stride, --in_chans, --decoder_*)"
        )
    state_dict.load_weights(model, weights)
    return missing


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, source: str) -> None:
    """Restore the moments; learning rate, decay and betas stay as the flags set them now."""
    name = type(own_part(optimizer)).__name__
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
    state_dict.load_optimizer(optimizer, saved)
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)


def restore_run(
    checkpoint: Mapping[str, Any],
    source: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any = None,
    model_ema: nn.Module | None = None,
) -> None:
    """Put what `utils.save_model` wrote back into the parts of a run."""
    load_weights(model, checkpoint["model"], source)
    load_optimizer(optimizer, checkpoint["optimizer"], source)
    if scaler is not None and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    if model_ema is not None:
        averaged = checkpoint.get("model_ema")
        if averaged is None:
            logging.getLogger("convnextv2").warning(
                "%s has no averaged weights: the average starts from its weights", source
            )
        load_weights(model_ema, averaged or checkpoint["model"], source)
