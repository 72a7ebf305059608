# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Whether the processes of a run were started alike: flags, files of the toolkit, packages.

python -c "from training import setup; print(setup.describe({'--lr': 0.1}))"
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from errors import UserError, first_few, see_working_folder
from parallel.process_group import all_gather, broadcast, get_world_size

ROOT = Path(__file__).resolve().parents[1]
OWN = ("local_rank", "num_workers")  # flags whose defaults are a process's or a machine's own
PACKAGES = ("torch", "torchvision", "timm", "numpy")
OUR_PACKAGES = ("config", "parallel", "data_loading", "models", "weights", "training")
SHOWN = 3  # differences


def check_alike(args: Mapping[str, Any]) -> None:
    """UserError, on all ranks, if a rank differs from rank 0; all must call it."""
    if get_world_size() == 1:
        return
    mine = describe(args)
    if len(set(all_gather(digest_of(mine)))) == 1:
        return
    found = all_gather(differences(mine, broadcast(mine)))
    others = [rank for rank, (_, count) in enumerate(found) if count]
    shown, count = found[others[0]]
    more = f", and {count - SHOWN} more" * (count > SHOWN)
    also = f"; others that differ: {first_few(others[1:])}" * (len(others) > 1)
    raise UserError(
        f"rank {others[0]} was not started as rank 0 was: it has {', '.join(shown)}{more}{also}. "
        "Give all processes the same flags, and the same files and packages on every machine"
    )


def describe(args: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    flags = {f"--{name}": str(value) for name, value in args.items() if name not in OWN}
    versions = {"Python": "{}.{}".format(*sys.version_info)}
    versions |= {name: _version(name) for name in PACKAGES}
    files = {
        path.relative_to(ROOT).as_posix(): f"(SHA-256 {_digest(path.read_bytes())[:12]})"
        for path in sorted(
            [*ROOT.glob("*.py"), *(p for n in OUR_PACKAGES for p in ROOT.glob(f"{n}/**/*.py"))]
        )
    }
    return flags | versions | files | _named(args)


def _named(args: Mapping[str, Any]) -> dict[str, str]:
    """The modules that flags name, `package.module:function`."""
    found = {}
    see_working_folder()
    for value in map(str, args.values()):
        module = re.fullmatch(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*", value)
        with contextlib.suppress(ImportError, ValueError):  # who needs it will say more
            spec = importlib.util.find_spec(module[1]) if module else None
            if spec and spec.origin and Path(spec.origin).is_file():
                found[module[1]] = f"(SHA-256 {_digest(Path(spec.origin).read_bytes())[:12]})"
    return found


def digest_of(described: Mapping[str, str]) -> str:
    """Equal for what is equal."""
    return _digest(json.dumps(described, sort_keys=True).encode())


def differences(mine: Mapping[str, str], first: Mapping[str, str]) -> tuple[list[str], int]:
    """The first few, in words, and how many there are."""
    names = [name for name in {**first, **mine} if mine.get(name) != first.get(name)]
    told = [
        f"{name} {mine.get(name, 'absent')} instead of {first.get(name, 'absent')}"
        for name in names[:SHOWN]
    ]
    return told, len(names)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
