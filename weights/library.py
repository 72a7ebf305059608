# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights that timm and torchvision publish for their networks, with their preprocessing.

python main_finetune.py --model timm:resnet18 --pretrained --data_set DIGITS --input_size 64
"""

from functools import partial
from typing import Any

from torch import Tensor

from errors import UserError, first_line
from models.backbones import parse_name
from parallel.process_group import main_process_first
from weights.pretrained import Pretrained

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers of Inception that are not built here
Weights = tuple[str, dict[str, Tensor], dict[str, Any]]  # tag, state dict, flags


def read_library_weights(model: str, size: tuple[int, int] | None = None) -> Pretrained:
    """Read the weights of `timm:NAME` or `torchvision:NAME`, downloaded if they are not cached.

    They bring image size, crop, mean and std, as the checkpoint of a run does. size: height and
    width to interpolate the positions of a transformer to.
    """
    library, network, tag, options = parse_name(model)
    read = {"timm": _read_timm, "torchvision": _read_torchvision}[library]
    try:
        tag, state, flags = main_process_first(partial(read, network, tag, options, size))
    except Exception as error:  # of any library: of the network, of the disk, of the arguments
        raise UserError(
            f"no weights for {model} ({first_line(error)}); choose another network, check the "
            "connection, or get the file elsewhere and load it"
        ) from error
    name = f"{library}:{network}.{tag}" if tag else f"{library}:{network}"
    state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    return Pretrained(name, {"model": state, "args": {"model": model, "in_chans": 3, **flags}})


def _read_timm(network: str, tag: str, options: dict, size: tuple[int, int] | None) -> Weights:
    import timm

    name = f"{network}.{tag}" if tag else network
    config = timm.get_pretrained_cfg(name)
    sized = {"img_size": size} if size and config and config.fixed_input_size else {}
    model = timm.create_model(name, pretrained=True, **sized, **options)
    config = model.pretrained_cfg
    flags = {"input_size": size or config["input_size"], "crop_pct": config["crop_pct"]}
    flags |= {"mean": config["mean"], "std": config["std"]}
    return config.get("tag", tag), model.state_dict(), flags


def _read_torchvision(
    network: str, tag: str, options: dict, size: tuple[int, int] | None
) -> Weights:
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    weights = models.get_model_weights(network)[tag or "DEFAULT"]
    model = models.get_model(network, weights=weights, **options)
    steps, state = weights.transforms(), model.state_dict()
    (crop,), (side,) = steps.crop_size, steps.resize_size
    if hasattr(model, "class_token") and size:
        state = interpolate_embeddings(size[0], model.patch_size, state)
    flags = {"input_size": size or crop, "crop_pct": crop / side}
    return weights.name, dict(state), flags | {"mean": steps.mean, "std": steps.std}
