# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint sources: local paths, the Hugging Face hub, timm's weights and https addresses.

python -c "from weights.download import locate; print(locate('timm:convnextv2_atto.fcmae'))"
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import torch

from errors import UserError, first_line, resolve

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # weight files of the Hugging Face hub
KINDS = "a file, a folder, hf-hub:owner/name, timm:model.tag or https://..."


def locate(source: str | Path, sha256: str = "") -> Path:
    """Return the local path of `source`, downloaded to the hub's or torch's cache if needed.

    source: a path, `hf-hub:owner/name` (with an optional `@revision`), `timm:model.tag`, or an
    https address. sha256: expected checksum of the file, in hexadecimal; another one is refused.
    """
    text = str(source)
    kind, _, name = text.partition(":")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"--sha256 {sha256}: expected 64 hexadecimal digits")
    if kind == "hf-hub":
        path = _from_hub(name, text)
    elif kind == "timm":
        from timm import list_pretrained

        known = dict.fromkeys(list_pretrained("convnextv2_*"), "timm/" + name)
        path = _from_hub(resolve(name, known, "weights of timm", importable=False), text)
    elif kind == "https":
        path = _from_address(text, sha256)
    elif "://" in text:
        raise UserError(f"{text}: expected {KINDS}")
    else:
        path = Path(text)
    if sha256:
        _check_hash(path, text, sha256.lower())
    return path


def _check_hash(path: Path, source: str, sha256: str) -> None:
    if not path.is_file():
        raise UserError(f"--sha256 needs a file, and {source} is not one; drop it or give a file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if found != sha256:
        cached = "" if str(path) == source else f"delete {path} to download it again, or "
        raise UserError(
            f"{source} has SHA-256 {found}, expected {sha256}: it is another file or damaged; "
            f"{cached}correct --sha256"
        )


def _from_hub(name: str, source: str) -> Path:
    """Download the first of WEIGHTS that a model on the Hugging Face hub has."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{source}: expected hf-hub:owner/name, with an optional @revision")
    offline = None
    for file in WEIGHTS:
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision or None))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            offline = error  # the next file may be in the cache
        except errors.EntryNotFoundError:  # the model has no such file
            continue
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise UserError(
                f"{source}: the hub has no such model, or it is private; check the name, or log "
                "in with `hf auth login`"
            ) from error
        except Exception as error:  # of any http library
            raise UserError(f"{source}: {first_line(error)}; check the network") from error
    if offline:
        raise UserError(
            f"{source}: the hub cannot be reached and the weights are not in the local cache; "
            "download them on a machine with network access and give the file's path"
        ) from offline
    raise UserError(f"{source} has no {' or '.join(WEIGHTS)}; give the path of a file instead")


def _from_address(address: str, sha256: str) -> Path:
    """Download to torch's cache, under a name that is unique to the address."""
    name = os.path.basename(address.partition("?")[0]) or "weights"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), sha256.lower() or None)
        except Exception as error:  # of urllib, ssl, sockets, and torch's for a wrong hash
            reason = first_line(error)
            raise UserError(f"{address}: {reason}; check address and network") from error
    if not sha256:
        warning = "%s: the download was not verified; give --sha256 to verify it"
        logging.getLogger("convnextv2").warning(warning, address)
    return path
