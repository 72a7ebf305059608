# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Where a checkpoint may lie: a file, the Hugging Face hub, timm's weights, an https address.

python -c "from weights.download import locate; print(locate('timm:convnextv2_atto.fcmae'))"
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import torch

from errors import UserError, resolve

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what a hub's model or its folder holds
KINDS = "a file, a folder, hf-hub:owner/name, timm:model.tag or https://..."


def locate(source: str | Path, sha256: str = "") -> Path:
    """The local path of `source`, downloaded into the hub's or torch's own cache where need be.

    source: a path, `hf-hub:owner/name` (with `@revision` if wanted), `timm:model.tag`, or an https
    address. sha256: of the file, in hexadecimal; a file with another is refused.
    """
    text = str(source)
    kind, _, name = text.partition(":")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256}: expected 64 hexadecimal digits")
    if kind == "hf-hub":
        path = _from_hub(name, text)
    elif kind == "timm":
        path = _from_hub(f"timm/{_timm_name(name)}", text)
    elif kind == "https":
        path = _download(text, sha256)
    elif "://" in text:
        raise UserError(f"{text}: expected {KINDS}")
    else:
        path = Path(text)
    if sha256:
        _check_hash(path, text, sha256)
    return path


def _check_hash(path: Path, source: str, sha256: str) -> None:
    if not path.is_file():
        raise UserError(f"--sha256 belongs to a file, and {source} is none; drop it or name a file")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        found = found or hashlib.sha256(file.read())  # Python 3.10
    if found.hexdigest() != sha256.lower():
        fetched = "" if str(path) == source else f"delete {path} and fetch it again, or "
        raise UserError(
            f"{source} has sha256 {found.hexdigest()}, expected {sha256.lower()}: another or a "
            f"damaged file; {fetched}correct --sha256"
        )


def _timm_name(name: str) -> str:
    from timm import list_pretrained

    known = list_pretrained("convnextv2_*")
    resolve(name, dict.fromkeys(known), "weights of timm", importable=False)
    return name


def _from_hub(name: str, source: str) -> Path:
    """Download the first of WEIGHTS that a model of the Hugging Face hub has."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    repository, _, version = name.partition("@")
    revision = version or None  # the hub's main one
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{source}: expected hf-hub:owner/name, with @revision if wanted")
    for file in WEIGHTS:
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            kept = [hub.try_to_load_from_cache(repository, w, revision=revision) for w in WEIGHTS]
            for path in kept:
                if isinstance(path, str):
                    return Path(path)
            raise UserError(
                f"{source}: the hub cannot be reached and the weights are in no cache here; "
                "download them where there is a network and give the file's path"
            ) from error
        except errors.EntryNotFoundError:  # then the next; LocalEntryNotFoundError is one of these
            continue
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise UserError(
                f"{source}: the hub knows no such model, or hides it; check the name, or log in "
                "with `hf auth login`"
            ) from error
        except Exception as error:  # what the http library of this version raises
            raise UserError(f"{source}: {_first_line(error)}; check the network") from error
    raise UserError(f"{source} holds none of {', '.join(WEIGHTS)}; give a file's path instead")


def _download(address: str, sha256: str) -> Path:
    """Into torch's cache, under a name that belongs to this address alone."""
    name = os.path.basename(address.partition("?")[0]) or "weights"
    mark = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{mark}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), sha256.lower() or None)
        except Exception as error:  # of urllib, ssl, sockets, and torch's of a wrong hash
            raise UserError(
                f"{address}: {_first_line(error)}; check address and network"
            ) from error
    if not sha256:
        logging.getLogger("convnextv2").warning(
            "%s: taken as it came, without --sha256 to tell whether it is what you expect", address
        )
    return path


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
