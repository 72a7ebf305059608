# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""All models by name.

python -c "import models; print(models.list_models())"
"""

import inspect
import traceback
from functools import partial
from typing import Any

import torch
from torch import nn

from config.calls import parse_call
from config.flags import is_code, is_pretraining, library_of
from errors import UserError, first_line, resolve
from models import backbones, convnextv2
from models.fcmae import FCMAE
from models.parts import freeze_backbone, keep_statistics

_PREFIX = "fcmae_"
AUTOENCODER = "a masked autoencoder such as models.fcmae.FCMAE"
CLASSIFIER = "a classifier, images (N, C, H, W) -> logits (N, num_classes)"


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
    """Build the model called `name`: of this toolkit, `timm:NAME` or `torchvision:NAME`.

    Or call the `package.module:function` of that name. A name may have arguments, `NAME(key=1)`.
    """
    if library_of(name):
        return backbones.create(name, **kwargs)
    call = parse_call(name, "--model")
    return resolve(call.name, MODELS, kind="model")(*call.args, **call.kwargs, **kwargs)


def is_known(name: str) -> bool:
    """Return True for a name that a checkpoint may choose, since it is not a user's own code."""
    return bool(library_of(name)) or name.partition("(")[0].strip() in MODELS


def same_network(one: str, other: str) -> bool:
    """Return True if two names of a library's networks differ in the tag of the weights alone."""
    parts = [backbones.parse_name(name) for name in (one, other) if library_of(name)]
    return len(parts) == 2 and len({(*map(str, (a, b, d)),) for a, b, _, d in parts}) == 1


def fcmae_name(name: str) -> str:
    """Name of the FCMAE around a model: `convnextv2_tiny` -> `fcmae_convnextv2_tiny`."""
    return name if name.startswith(_PREFIX) or is_code(name) else _PREFIX + name


def check_model(args: Any) -> None:
    """Raise UserError if `--model` names no model and nothing that can be imported."""
    bare = args.model.removeprefix(_PREFIX)
    if not library_of(bare):
        name = fcmae_name(bare) if is_pretraining(vars(args)) else bare
        resolve(parse_call(name, "--model").name, MODELS, kind="model")
    elif is_pretraining(vars(args)):
        raise UserError(
            f"--model {bare}: a network of {library_of(bare)} cannot be pre-trained as a masked "
            "autoencoder; use main_finetune.py, or a ConvNeXt V2 (--list_models)"
        )
    else:
        backbones.parse_name(bare)


def _create_by_flags(name: str, kind: str, **kwargs: Any) -> nn.Module:
    """Call `create_model`; other arguments than a function has are a UserError."""
    try:
        model = create_model(name, **kwargs)
    except TypeError as error:
        is_call = traceback.extract_tb(error.__traceback__)[-1].filename == __file__
        if not (is_call or any(f"'{key}'" in str(error) for key in kwargs)):
            raise  # of the function's own code
        raise UserError(
            f"--model {name} cannot be called with the flags: {first_line(error)}. Expected a "
            f"function that takes {', '.join(kwargs)} and returns {kind}; write one that calls "
            "yours and name it as package.module:function (docs/forking.md)"
        ) from error
    if isinstance(model, nn.Module) and _is_autoencoder(model) == (kind == AUTOENCODER):
        return model
    script = "main_finetune.py" if kind == AUTOENCODER else "main_pretrain.py"
    other = f", or use {script}" if isinstance(model, nn.Module) else ""
    raise UserError(
        f"--model {name} returned {type(model).__name__}, expected {kind}; give another --model"
        + other
    )


def _is_autoencoder(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("grid_size", "mask_ratio"))


def build_fcmae(args: Any) -> nn.Module:
    """The pre-training model that the flags describe."""
    model = _create_by_flags(
        fcmae_name(args.model),
        AUTOENCODER,
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
    needed = {"input_size": args.input_size} if library_of(args.model) else {}
    model = _create_by_flags(
        args.model.removeprefix(_PREFIX),
        CLASSIFIER,
        in_chans=args.in_chans,
        stem_stride=args.stem_stride,
        drop_path_rate=args.drop_path,
        num_classes=num_classes,
        head_init_scale=args.head_init_scale,
        **needed,
    )
    if args.grad_checkpointing and not args.eval:
        enable_grad_checkpointing(model, args.compile)
    if args.freeze_backbone and not args.eval:
        freeze_backbone(model)
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
    if keep_statistics(model) and compiled:
        raise UserError(
            "--grad_checkpointing true with --compile true: the BatchNorm of "
            f"{type(model).__name__} would count every batch twice; drop one"
        )
