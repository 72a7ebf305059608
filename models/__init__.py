# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""All models by name.

python -c "import models; print(models.list_models())"
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from errors import UserError, resolve
from models import convnextv2
from models.fcmae import FCMAE

_PREFIX = "fcmae_"


def _fcmae(encoder: str, **kwargs: Any) -> FCMAE:
    """An FCMAE around the encoder of that name; keywords that FCMAE lacks go to the encoder."""
    if kwargs.get("features_only"):
        raise UserError(f"features_only is for {encoder}, not for the FCMAE around it")
    names = inspect.signature(FCMAE).parameters.keys() & kwargs.keys()
    own = {name: kwargs.pop(name) for name in names}
    return FCMAE(MODELS[encoder](num_classes=0, **kwargs), **own)


MODELS = {f"convnextv2_{s}": getattr(convnextv2, f"convnextv2_{s}") for s in convnextv2.SIZES}
MODELS |= {_PREFIX + name: partial(_fcmae, name) for name in MODELS}


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(MODELS)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build the model called `name`, or call the `package.module:function` of that name."""
    return resolve(name, MODELS, kind="model")(**kwargs)


def fcmae_name(name: str) -> str:
    """Name of the FCMAE around a model: `convnextv2_tiny` -> `fcmae_convnextv2_tiny`."""
    return name if name.startswith(_PREFIX) or ":" in name else _PREFIX + name


def build_fcmae(args: Any) -> nn.Module:
    """The pre-training model that the flags describe."""
    model = create_model(
        fcmae_name(args.model),
        in_chans=args.in_chans,
        stem_stride=args.stem_stride,
        drop_path_rate=args.drop_path,
        patch_size=args.patch_size,
        mask_ratio=args.mask_ratio,
        decoder_depth=args.decoder_depth,
        decoder_embed_dim=args.decoder_embed_dim,
        norm_pix_loss=args.norm_pix_loss,
    )
    if args.grad_checkpointing:
        enable_grad_checkpointing(model, args.compile)
    return model


def build_classifier(args: Any, num_classes: int) -> nn.Module:
    """The classifier that the flags describe."""
    model = create_model(
        args.model.removeprefix(_PREFIX),
        in_chans=args.in_chans,
        stem_stride=args.stem_stride,
        drop_path_rate=args.drop_path,
        num_classes=num_classes,
        head_init_scale=args.head_init_scale,
    )
    if args.grad_checkpointing and not args.eval:
        enable_grad_checkpointing(model, args.compile)
    return model


def enable_grad_checkpointing(model: nn.Module, compiled: bool) -> None:
    """Turn gradient checkpointing on by `set_grad_checkpointing`, as timm's models have it."""
    if compiled and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        raise UserError(
            f"--grad_checkpointing true with --compile true needs torch 2.14: {torch.__version__} "
            "would save in compiled blocks what it should compute again; drop one"
        )
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's models that cannot raise the second
        raise UserError(
            f"--grad_checkpointing: {type(model).__name__} does not support it ({error}); drop it"
        ) from error
