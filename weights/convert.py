# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights of every published layout, from and to the names of our own models.

python -c "from weights import convert; print(*convert.NAMES['timm'].items(), sep=chr(10))"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from errors import UserError, first_few

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
DECODER = ("proj.", "mask_token", "decoder.", "pred.")  # what pre-training has beside the encoder
CLASSIFIER = ("norm.", "head.")  # what only a classifier has
BLOCK = "stages.{i}.{j}."
CONV_MLP = (40, 48, 64, 80)  # first widths of timm's atto to nano: their MLPs are 1x1 convolutions
# Our dense names -> those of a layout; {i} is a stage, {j} a block or a place in it. The first row
# that fits is taken. Names without a row are the same on both sides.
NAMES = {
    "timm": {
        "downsample_layers.0.{j}.": "stem.{j}.",
        "downsample_layers.{i}.{j}.": "stages.{i}.downsample.{j}.",
        BLOCK + "dwconv.": "stages.{i}.blocks.{j}.conv_dw.",
        BLOCK + "norm.": "stages.{i}.blocks.{j}.norm.",
        BLOCK + "pwconv1.": "stages.{i}.blocks.{j}.mlp.fc1.",
        BLOCK + "grn.gamma": "stages.{i}.blocks.{j}.mlp.grn.weight",
        BLOCK + "grn.beta": "stages.{i}.blocks.{j}.mlp.grn.bias",
        BLOCK + "pwconv2.": "stages.{i}.blocks.{j}.mlp.fc2.",
        "norm.": "head.norm.",
        "head.": "head.fc.",
    },
    "Hugging Face": {
        "downsample_layers.0.0.": "convnextv2.embeddings.patch_embeddings.",
        "downsample_layers.0.1.": "convnextv2.embeddings.layernorm.",
        "downsample_layers.{i}.{j}.": "convnextv2.encoder.stages.{i}.downsampling_layer.{j}.",
        BLOCK + "norm.": "convnextv2.encoder.stages.{i}.layers.{j}.layernorm.",
        BLOCK + "grn.gamma": "convnextv2.encoder.stages.{i}.layers.{j}.grn.weight",
        BLOCK + "grn.beta": "convnextv2.encoder.stages.{i}.layers.{j}.grn.bias",
        BLOCK: "convnextv2.encoder.stages.{i}.layers.{j}.",
        "norm.": "convnextv2.layernorm.",
        "head.": "classifier.",
    },
    "MinkowskiEngine": {
        "downsample_layers.0.": "downsample_layers.0.",  # the stem is dense there
        "downsample_layers.{i}.0.": "downsample_layers.{i}.0.ln.",
        "downsample_layers.{i}.1.weight": "downsample_layers.{i}.1.kernel",
        BLOCK + "dwconv.weight": BLOCK + "dwconv.kernel",
        BLOCK + "norm.": BLOCK + "norm.ln.",
        BLOCK + "pwconv1.": BLOCK + "pwconv1.linear.",
        BLOCK + "pwconv2.": BLOCK + "pwconv2.linear.",
    },
    "official": {},
}
SIGNS = {  # a name that only one layout has
    "embeddings.patch_embeddings.weight": "Hugging Face",
    "stem.0.weight": "timm",
    "downsample_layers.0.0.weight": "official",
}


@dataclass
class Report:
    """What became of the tensors of a checkpoint, by name."""

    layout: str  # a key of NAMES
    renamed: dict[str, str] = field(default_factory=dict)  # theirs -> ours
    reshaped: list[str] = field(default_factory=list)  # "name (4C,) -> (1, 1, 1, 4C)"
    dropped: list[str] = field(default_factory=list)  # of a part that the target does not have
    loaded: list[str] = field(default_factory=list)  # what `models.pretrained` took
    missing: list[str] = field(default_factory=list)  # what it left as it was initialised

    def __str__(self) -> str:
        lists = {"new": self.missing, "dropped": self.dropped, "reshaped": self.reshaped}
        told = [
            f"{len(names)} {kind} ({first_few(names)})" for kind, names in lists.items() if names
        ]
        told = [f"{len(self.loaded)} tensors loaded, {len(self.renamed)} of them renamed", *told]
        return f"{self.layout} layout; {'; '.join(told)}"


# --- in ---------------------------------------------------------------------------------


def to_convnextv2(
    state: Mapping[str, Tensor], decoder: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """State dict of any known layout -> that of `ConvNeXtV2`, or with `decoder` of `FCMAE`.

    Layouts: see NAMES; ours are the official ones, with `encoder.` before them in pre-training.
    What only the other of the two models has is dropped, and reported. Unknown names stay: for
    `load_weights` to refuse.
    """
    bare = {unwrap(name): (name, value) for name, value in state.items()}
    if len(bare) < len(state):
        raise UserError("some names differ only by a prefix such as module.; expected one of each")
    report = Report(_layout(bare))
    if report.layout == "Hugging Face":  # ConvNextV2Model has not the prefix of its classifier
        whole = ("convnextv2.", "classifier.")
        bare = {n if n.startswith(whole) else f"convnextv2.{n}": v for n, v in bare.items()}
    out = {}
    for name, (given, value) in bare.items():
        ours = _translate(name.removeprefix("encoder."), _rules(report.layout, inward=True))
        if ours.startswith(CLASSIFIER if decoder else DECODER):
            report.dropped.append(given)
            continue
        new = _reshape(ours, name, value)
        ours = f"encoder.{ours}" if decoder and not ours.startswith(DECODER) else ours
        if new.shape != value.shape:
            report.reshaped.append(f"{ours} {tuple(value.shape)} -> {tuple(new.shape)}")
        if ours != given:
            report.renamed[given] = ours
        if ours in out:
            raise UserError(f"{given} and another tensor are both {ours}; expected one of each")
        out[ours] = new
    return out, report


def unwrap(name: str) -> str:
    """The name without what DistributedDataParallel and torch.compile put before it."""
    for prefix in WRAPPERS * 2:  # either may stand inside the other
        name = name.removeprefix(prefix)
    return name


def _layout(names: Iterable[str]) -> str:
    names = sorted(name.removeprefix("convnextv2.").removeprefix("encoder.") for name in names)
    if any(name.endswith(".kernel") for name in names):
        return "MinkowskiEngine"
    found = [layout for sign, layout in SIGNS.items() if sign in names]
    if not found:
        ends = [name.removesuffix(sign) for name in names for sign in SIGNS if name.endswith(sign)]
        hint = f"; perhaps --model_prefix {ends[0]}" if ends else ""
        raise UserError(
            f"no weights of a ConvNeXt V2: the names look like {first_few(names) or 'nothing'}; "
            "expected those of the official code, of timm, of Hugging Face or of this toolkit"
            + hint
        )
    return found[0]


def _rules(layout: str, inward: bool) -> list[tuple[re.Pattern, str]]:
    """(pattern, replacement) that turn names of a layout into ours, or ours into its."""
    rules = []
    for ours, theirs in NAMES[layout].items():
        source, target = (theirs, ours) if inward else (ours, theirs)
        pattern = re.sub(r"\\\{([ij])\\\}", r"(?P<\1>\\d+)", re.escape(source))
        rules.append((re.compile(pattern), re.sub(r"\{([ij])\}", r"\\g<\1>", target)))
    return rules


def _translate(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return name


def _reshape(ours: str, theirs: str, value: Tensor) -> Tensor:
    """The shape that a tensor has here; what is not a vector or a kernel stays as it is."""
    if theirs.endswith(".kernel"):  # (k*k, C) depthwise or (k*k, C, D); k*k counts columns first
        places, *channels = value.shape
        k = round(places**0.5)
        if k * k != places or len(channels) not in (1, 2):
            raise UserError(f"{theirs} {tuple(value.shape)}: expected (k * k, C) or (k * k, C, D)")
        kernel = value.reshape(k, k, *channels).transpose(0, 1)
        return kernel.permute(3, 2, 0, 1) if len(channels) == 2 else kernel.movedim(2, 0)[:, None]
    is_vector = value.ndim > 0 and value.numel() == value.shape[-1]
    if ".grn." in ours and is_vector:
        return value.reshape(1, 1, 1, -1)
    if ".pwconv" in ours and value.ndim == 4 and value.shape[2:] == (1, 1):  # see CONV_MLP
        return value.flatten(1)
    norm = re.search(r"(^|\.)(norm|downsample_layers\.0\.1|downsample_layers\.[1-9]\.0)\.", ours)
    return value.flatten() if is_vector and (ours.endswith(".bias") or norm) else value


# --- out --------------------------------------------------------------------------------


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `ConvNeXtV2` -> that of timm's `convnextv2_*`.

    GRN has vectors there, and the four small sizes have 1x1 convolutions for linear layers.
    """
    if describe(state)["dims"][0] in CONV_MLP:
        mlp = [name for name in state if ".pwconv" in name and name.endswith("weight")]
        state = {**state, **{name: state[name][..., None, None] for name in mlp}}
    return _outward(state, "timm", lambda grn: grn.flatten())


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `ConvNeXtV2` -> that of transformers' `ConvNextV2ForImageClassification`."""
    return _outward(state, "Hugging Face", lambda grn: grn)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `ConvNeXtV2` or `FCMAE` -> what the official scripts read.

    A classifier's is the same. Pre-trained weights lose `encoder.`, and GRN has the shape (1, 4C)
    of the published files, since the official `--finetune` adds two axes to it.
    """
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    classifier = any(name.startswith(CLASSIFIER) for name in state)
    return _outward(state, "official", lambda grn: grn if classifier else grn.reshape(1, -1))


def _outward(
    state: Mapping[str, Tensor], layout: str, grn: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    rules = _rules(layout, inward=False)
    shaped = {name: grn(v) if ".grn." in name else v for name, v in state.items()}
    return {_translate(name, rules): value.contiguous() for name, value in shaped.items()}


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of the `ConvNeXtV2` that a state dict under our names belongs to."""
    dims, depths = [], []
    while f"stages.{len(dims)}.0.dwconv.weight" in state:
        i = len(dims)
        dims.append(len(state[f"stages.{i}.0.dwconv.weight"]))
        depths.append(sum(f"stages.{i}.{j}.dwconv.weight" in state for j in range(len(state))))
    stem = state.get("downsample_layers.0.0.weight")
    if not dims or stem is None or stem.ndim != 4:
        raise UserError(
            f"no weights of a ConvNeXt V2: {first_few(list(state)) or 'no tensors at all'}"
        )
    return {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "in_chans": stem.shape[1],
        "stem_stride": stem.shape[2],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
    }
