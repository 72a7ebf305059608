# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Fit weights of any layout to a model: names, classifier and input channels.

python -c "import timm; from weights import fit; print(fit.find_stem(timm.create_model('vgg11')))"
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from data_loading.targets import Scale
from errors import UserError, first_few, plural
from models.fcmae import FCMAE
from models.parts import adapt_stem, find_classifier, find_stem
from weights.convert import DECODER, Report, replace_prefix, to_convnextv2, unwrap

NAMED = "named_heads."  # prefix of the heads of --heads


def fit_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    new: Iterable[str] = (),
    saved: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    reset_head: bool = False,
) -> tuple[dict[str, Tensor], Report]:
    """Convert weights of any layout to the names and shapes of a model, and report how.

    new: prefixes of parts that may stay as initialized. If `head.` is one of them, which stands for
        the classifier whatever its name, or for all heads of `models.heads`, a head of another kind
        or for another number of classes is left out, and the first layer is adapted to the model's
        number of channels. Other differences remain, and `weights.files.load_weights` refuses them.
    saved, classes: names in the order of the weights' and of the model's classifier; one for other
        classes of the same number is left out too.
    reset_head: leave out all heads of the weights.
    """
    expected, heads = model.state_dict(), find_classifier(model)
    state, report = _rename(weights, expected)
    renames = heads and "head." not in heads and not heads[0].startswith(NAMED)
    if renames and not any(name.startswith(heads) for name in state):
        state = {replace_prefix(name, "head.", heads[0]): v for name, v in state.items()}
    left_out = tuple(getattr(model, "left_out", ()))  # a backbone has no head, or not all stages
    if "head." in new:
        others = None not in (saved, classes) and [*saved] != [*classes]
        for head in heads or ("head.",):
            if reset_head or not _same_head(head, expected, state, others):
                left_out += (head,)
                if not reset_head and any(name.startswith(head) for name in expected):
                    report.warnings += _describe_new_head(head, expected, state, saved)
        unknown = [name for name in state if name.startswith(NAMED) and not name.startswith(heads)]
        left_out += tuple(".".join(name.split(".")[:2]) + "." for name in unknown)
        adapt_channels(model, state, report)
    report.dropped += [name for name in state if name.startswith(left_out)]
    state = {name: value for name, value in state.items() if not name.startswith(left_out)}
    return state, report


def _same_head(
    head: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor], others: bool
) -> bool:
    """Return True if the weights have no head of that prefix, or the same as the model.

    others: they are for other classes.
    """
    ours, theirs = (
        {name: x.shape for name, x in tensors.items() if name.startswith(head)}
        for tensors in (expected, state)
    )
    plain = ours.keys() == {f"{head}weight", f"{head}bias"}
    # A linear layer without one of the two is damaged: `load_weights` refuses it.
    fits = ours == theirs or (plain and theirs.items() < ours.items())
    return not theirs or (fits and not others)


def _describe_new_head(
    head: str,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    saved: Sequence[str] | None,
) -> list[str]:
    """Return a warning that a head of the weights does not fit, so that a new one is trained."""
    theirs, which = state.get(f"{head}weight"), ""
    if head.startswith(NAMED):
        which = f" {head.split('.')[1]}"
    if theirs is None or f"{head}weight" not in expected:
        return [f"its head{which} is of another kind, so the model gets a new head"]
    names = f" ({first_few(saved, 5)})" if saved else ""
    note = f"its head{which} has {plural((*theirs.shape, 0)[0], 'class')}{names}"
    return [f"{note}, so the model gets a new head"]


def undo_scale(state: Mapping[str, Tensor], head: str, scale: Scale) -> dict[str, Tensor]:
    """Return weights whose last layer, named `head`, gives numbers in the units of the data.

    UserError if it has no weights of this shape with a bias.
    """
    weight, bias = state.get(f"{head}weight"), state.get(f"{head}bias")
    if weight is None or bias is None or len(weight) != len(scale.mean):
        raise UserError(
            f"the last layer {head} has no weight and bias of {len(scale.mean)} numbers"
        )
    mean, std = scale.tensors()
    shape = (-1,) + (1,) * (weight.ndim - 1)
    new = {f"{head}weight": weight * std.view(shape), f"{head}bias": bias * std + mean}
    return {**state, **{name: value.to(bias.dtype) for name, value in new.items()}}


def adapt_channels(model: nn.Module, state: dict[str, Tensor], report: Report) -> None:
    """Adapt weights for 1 or 3 channels in place: the first layer, and the last of an FCMAE."""
    expected = model.state_dict()
    for name in [f"{stem}.weight" for stem in find_stem(model)]:
        ours, theirs = expected.get(name), state.get(name)
        if ours is None or theirs is None or ours.ndim != 4 or theirs.ndim != 4:
            continue
        wanted, found = ours.shape[1], theirs.shape[1]
        if wanted == found or found not in (1, 3) or ours[:, :1].shape != theirs[:, :1].shape:
            continue
        state[name] = adapt_stem(theirs, wanted)
        how = "summed" if wanted == 1 else f"repeated and multiplied by {found}/{wanted}"
        report.warnings.append(
            f"it was trained on {plural(found, 'channel')} and the model has {wanted}: the weights "
            f"of the first layer are {how}"
        )
    if not isinstance(model, FCMAE):
        return
    for name in ("pred.weight", "pred.bias"):
        ours, theirs = expected[name], state.get(name)
        pixels = len(ours) // model.in_chans  # that a position of the decoder predicts
        if theirs is not None and len(theirs) != len(ours) and len(theirs) in (pixels, 3 * pixels):
            state[name] = adapt_prediction(theirs, pixels, model.in_chans)


def adapt_prediction(value: Tensor, pixels: int, channels: int) -> Tensor:
    """Adapt rows (pixels * C, ...) of a prediction to other channels: mean, or repeat."""
    rows = value.unflatten(0, (pixels, -1))  # (pixels, C, ...)
    if channels == 1:
        return rows.float().mean(1).to(value.dtype)
    order = torch.arange(channels) % rows.shape[1]
    return rows[:, order].flatten(0, 1)


def _rename(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Report]:
    """Convert any layout to a ConvNeXt V2's or V1's names; other models have only their own."""
    is_fcmae = any(name.startswith("encoder.") for name in expected)
    ours = {name.removeprefix("encoder.") for name in expected}
    blocks = {"stages.0.0.grn.gamma", "stages.0.0.gamma"}  # of V2, of V1
    if "downsample_layers.0.0.weight" in ours and ours & blocks:
        return to_convnextv2(state, is_fcmae, own=() if is_fcmae else expected)
    own, report = {unwrap(name): value for name, value in state.items()}, Report("own")
    if not is_fcmae and any(name.startswith("encoder.") for name in own):  # of an autoencoder
        report.dropped = [name for name in own if name.startswith(DECODER)]
        kept = [name for name in own if name not in report.dropped]
        own = {name.removeprefix("encoder."): own[name] for name in kept}
    return own, report
