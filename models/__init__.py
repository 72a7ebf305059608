# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""All models by name.

python -c "import models; print(models.list_models())"
"""

import inspect
import traceback
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from config.calls import parse_call
from config.checks import patch_problems
from config.flags import is_code, is_pretraining, library_of
from config.sizes import sizes_by_epoch
from errors import UserError, did_you_mean, first_line, resolve, sentences
from models import backbones, convnextv2
from models.arguments import FLAGS
from models.attach import build_heads
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.masked import MaskedFCMAE
from models.parts import freeze_backbone, keep_statistics

_PREFIX = "fcmae_"
SIZE = ("depths", "dims", "features_only", "out_indices")  # not for a user of the flags
AUTOENCODER = "a masked autoencoder such as models.fcmae.FCMAE"
CLASSIFIER = "a classifier, images (N, C, H, W) -> logits (N, num_classes)"


def _fcmae(encoder: str, **kwargs: Any) -> FCMAE:
    """An FCMAE around the encoder of that name; keywords that FCMAE lacks go to the encoder."""
    if kwargs.get("features_only"):
        raise UserError(f"features_only is for {encoder}, not for the FCMAE around it")
    names = inspect.signature(FCMAE).parameters.keys() & kwargs.keys()
    own = {name: kwargs.pop(name) for name in names}
    kwargs |= {} if library_of(encoder) else {"num_classes": 0}
    network = create_model(encoder, **kwargs)
    return (FCMAE if isinstance(network, ConvNeXtV2) else MaskedFCMAE)(network, **own)


_NAMES = [f"convnextv2_{size}" for size in convnextv2.SIZES]
_NAMES += [f"convnext_{size}" for size in convnextv2.V1_SIZES]
MODELS = {name: getattr(convnextv2, name) for name in _NAMES}
MODELS |= {_PREFIX + name: partial(_fcmae, name) for name in MODELS}


def _classic(name: str, **kwargs: Any) -> nn.Module:
    """A network of models/classic.py, whose timm imports slowly."""
    from models.classic import build_network

    return build_network(name, **kwargs)


CLASSIC = ("anynet", "regnet", "regnet_y_256gf", "resnet", "resnext152_32x4d", "densenet", "mlp")
MODELS |= {name: partial(_classic, name) for name in CLASSIC}
MODELS |= {_PREFIX + name: partial(_fcmae, name) for name in CLASSIC if name != "mlp"}


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(MODELS)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build the model called `name`: of this toolkit, `timm:NAME` or `torchvision:NAME`.

    Or call the `package.module:function` of that name. `NAME(key=1)` adds arguments, which replace
    those in kwargs. A prefix `fcmae_` makes a masked autoencoder of a network.
    """
    bare = name.removeprefix(_PREFIX)
    if library_of(bare):
        return _fcmae(bare, **kwargs) if bare != name else backbones.create(name, **kwargs)
    call = parse_call(name, "--model")
    if call.args:
        raise UserError(f"--model {name}: give arguments by name, as in densenet(growth_rate=12)")
    return resolve(call.name, MODELS, kind="model")(**{**kwargs, **call.kwargs})


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
    if library_of(bare):
        backbones.parse_name(bare)
        return
    name = parse_call(bare, "--model").name
    resolve(fcmae_name(name) if is_pretraining(vars(args)) else name, MODELS, kind="model")


def _create_by_flags(name: str, kind: str, **kwargs: Any) -> nn.Module:
    """Call `create_model`; other arguments than a function has are a UserError."""
    if not library_of(name):
        _check_arguments(name, kwargs)
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


def _check_arguments(name: str, by_flag: Collection[str]) -> None:
    """Raise UserError if brackets after a name hold what flags set, or what a ConvNeXt lacks."""
    call = parse_call(name, "--model")
    for key in call.kwargs:
        if key in by_flag or (key in FLAGS and not is_code(name)):
            flag = backbones.BY_FLAG.get(key, key)
            raise UserError(f"--model {name}: give --{flag}, not the argument {key}")
    if not call.name.removeprefix(_PREFIX).startswith("convnext"):
        return  # a network that checks its own
    known = inspect.signature(ConvNeXtV2).parameters.keys() - {*by_flag, *FLAGS, *SIZE}
    for key in call.kwargs.keys() - known:
        accepted = f"Its arguments are {', '.join(sorted(known))}"
        hint = sentences(did_you_mean(key, known), accepted)
        raise UserError(f"--model {name} has no argument {key!r}. {hint}")


def _is_autoencoder(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("grid_size", "mask_ratio"))


def build_fcmae(args: Any) -> nn.Module:
    """The pre-training model that the flags describe."""
    recon_loss = vars(args).get("recon_loss", "l2")  # of an earlier version: none
    own = {"recon_loss": recon_loss} if recon_loss != "l2" else {}  # a user's may lack it
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
        **own,
    )
    if own and getattr(type(model), "forward_loss", None) is not FCMAE.forward_loss:
        got = f"--recon_loss {recon_loss}: {type(model).__name__} has a forward_loss of its own"
        raise UserError(f"{got}, which does not use it; drop --recon_loss")
    for flag in ("compile", "cuda_graphs", "sync_bn"):
        if getattr(args, flag) and isinstance(model, MaskedFCMAE):
            raise UserError(
                f"--{flag} true does not work with the masked operations of --model {args.model}; "
                f"drop --{flag}"
            )
    if isinstance(model, MaskedFCMAE) and vars(args).get("shard") == "fsdp":
        raise UserError(
            f"--shard fsdp does not work with the masked operations of --model {args.model}; drop "
            "--shard"
        )
    if args.grad_checkpointing:
        enable_grad_checkpointing(model, args.compile)
    return model


def check_images(args: Any, model: nn.Module) -> None:
    """Raise UserError if the images of the flags do not fit the stride of a `MaskedFCMAE`."""
    if isinstance(model, MaskedFCMAE):
        name = f"{model.stride}, the stride of --model {args.model}"
        for problem in patch_problems(args, model.stride, name):
            raise UserError(problem)


def check_sizes(args: Any, model: nn.Module) -> None:
    """Raise UserError if a network on the meta device takes the last size of a run alone.

    Nothing is computed. A network that cannot run there is not checked.
    """
    *earlier, last = sizes_by_epoch(args).values()
    if not earlier or _problem_with(model, args.in_chans, last) is not None:
        return
    for size in earlier:
        if (problem := _problem_with(model, args.in_chans, size)) is not None:
            raise UserError(
                f"--input_size {args.input_sizes}: --model {args.model} takes no images of "
                f"{size[0]} x {size[1]} pixels when it is built for {last[0]} x {last[1]} "
                f"({first_line(problem)}); give one size, or another --model"
            )


@torch.no_grad()
def _problem_with(model: nn.Module, in_chans: int, size: tuple[int, int]) -> Exception | None:
    """Return the error that a network raises for images of a size, or None."""
    was_training = model.training
    try:
        model.eval()(torch.empty(2, in_chans, *size, device="meta"))
    except Exception as error:  # of any library
        return error
    finally:
        model.train(was_training)
    return None


def build_classifier(args: Any, num_classes: int | None) -> nn.Module:
    """The classifier that the flags describe.

    num_classes: None if the data has to tell it: for checks, the classifier has 1000.
    """
    name = args.model.removeprefix(_PREFIX)
    sized = library_of(name) or parse_call(name, "--model").name == "mlp"
    size = {"input_size": args.input_size} if sized else {}
    model = _create_by_flags(
        name,
        CLASSIFIER,
        in_chans=args.in_chans,
        stem_stride=args.stem_stride,
        drop_path_rate=args.drop_path,
        num_classes=num_classes or 1000,
        head_init_scale=args.head_init_scale,
        **size,
    )
    build_heads(args, model, num_classes)
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
