# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoint sources: local paths, the Hugging Face hub, timm's weights and https addresses.

python -c "from weights.download import locate; print(locate('timm:convnextv2_atto.fcmae'))"
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from errors import UserError, first_line, resolve
from parallel.process_group import get_logger
from weights.hub_config import FILES

INDEX = ".index.json"  # end of the name of a file that lists the parts of large weights
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # weight files of the Hugging Face hub
WEIGHTS += tuple(name + INDEX for name in WEIGHTS)
KINDS = "a file, a folder, hf-hub:owner/name, timm:model.tag or https://..."


def locate(source: str | Path, sha256: str = "") -> Path:
    """Return the local path of `source`, downloaded to the hub's or torch's cache if needed.

    source: a path, `hf-hub:owner/name` (with an optional `@revision`), `timm:model.tag`, or an
    https address. sha256: expected checksum of the file, in hexadecimal; another one is refused.
    """
    text = str(source)
    kind, _, name = text.partition(":")
    if kind == "hf-hub":
        path = _from_hub(name, text)
    elif kind == "timm":
        from timm import list_pretrained

        known = dict.fromkeys(list_pretrained(), "timm/" + name)
        path = _from_hub(resolve(name, known, "weights of timm", importable=False), text)
    elif kind == "https":
        path = _from_address(text, sha256)
    else:
        path = Path(text)
    if sha256:
        _check_hash(path, text, sha256.lower())
    return path


def list_parts(index: Path) -> dict[str, str]:
    """Return tensor name -> file next to the index, from the hub's index of weights in parts."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = all(Path(name).name == name and "\\" not in name for name in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}); expected a JSON weight_map") from error
    if not named:  # a file must not choose what else is read
        raise UserError(f"{index} is refused: it names files outside of its own folder")
    return files


def _check_hash(path: Path, source: str, sha256: str) -> None:
    if not path.is_file() or path.name.endswith(INDEX):
        raise UserError(f"--sha256 needs a file, and {source} is not one; drop it or give a file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if found != sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, expected {sha256}: it is another file or damaged; "
            "correct --sha256, or delete the file and download it again"
        )


def _from_hub(name: str, source: str) -> Path:
    """Download the first of WEIGHTS that a model on the Hugging Face hub has, with its parts."""
    from huggingface_hub import errors, hf_hub_download

    repository, _, revision = name.partition("@")
    problem: Exception | None = None
    for file in WEIGHTS:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision or None))
            for part in sorted({*list_parts(path).values()} if file.endswith(INDEX) else ()):
                hf_hub_download(repository, part, revision=revision or None)
            for extra in FILES:  # class names and preprocessing, if the model has them
                with contextlib.suppress(errors.EntryNotFoundError):
                    hf_hub_download(repository, extra, revision=revision or None)
            return path
        except UserError:
            raise
        except errors.EntryNotFoundError as error:  # not in the model, or offline and not cached
            problem = error
        except Exception as error:  # of any http library
            problem = error
            break
    raise UserError(
        f"{source}: found no {' or '.join(WEIGHTS)} ({first_line(problem)}); check the name and "
        "the network, run `hf auth login` for a private model, or give the path of a file"
    ) from problem


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
            raise UserError(f"{address}: {first_line(error)}; check address and network") from error
    if not sha256:
        warning = "%s: the download was not verified; give --sha256 to verify it"
        get_logger().warning(warning, address)
    return path
