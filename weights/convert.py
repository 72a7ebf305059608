# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Convert weights between this toolkit and the official code, timm, Hugging Face and others.

python -c "from weights import convert; print(*convert.NAMES['timm'].items(), sep=chr(10))"
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from errors import UserError, first_few
from models.convnextv2 import SIZES, V1_SIZES

State = Mapping[str, Tensor]
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
DECODER = ("proj.", "mask_token", "decoder.", "pred.")  # pre-training only
CLASSIFIER = ("norm.", "head.")  # classifiers only
BLOCK = "stages.{i}.{j}."
CONV_MLP = (40, 48, 64, 80)  # first widths of timm's atto to nano: their MLPs are 1x1 convolutions
# Our dense names -> those of a layout; {i} is a stage, {j} a block or a layer in it. The first row
# that matches applies. Names without a row are the same on both sides.
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
        BLOCK + "gamma": "stages.{i}.blocks.{j}.gamma",
        "norm.": "head.norm.",
        "head.": "head.fc.",
    },
    "Hugging Face": {  # with `convnext.` for V1
        "downsample_layers.0.0.": "convnextv2.embeddings.patch_embeddings.",
        "downsample_layers.0.1.": "convnextv2.embeddings.layernorm.",
        "downsample_layers.{i}.{j}.": "convnextv2.encoder.stages.{i}.downsampling_layer.{j}.",
        BLOCK + "norm.": "convnextv2.encoder.stages.{i}.layers.{j}.layernorm.",
        BLOCK + "grn.gamma": "convnextv2.encoder.stages.{i}.layers.{j}.grn.weight",
        BLOCK + "grn.beta": "convnextv2.encoder.stages.{i}.layers.{j}.grn.bias",
        BLOCK + "gamma": "convnextv2.encoder.stages.{i}.layers.{j}.layer_scale_parameter",
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
    "MMPretrain": {  # with `backbone.` before all but the head
        BLOCK + "dwconv.": BLOCK + "depthwise_conv.",
        BLOCK + "pwconv1.": BLOCK + "pointwise_conv1.",
        BLOCK + "pwconv2.": BLOCK + "pointwise_conv2.",
        "norm.": "norm3.",
        "head.": "head.fc.",
    },
    "official": {},
}
# Parts of MMPretrain's models that no network here has: norms of other stages, SparK's decoder.
MM_PARTS = ("norm0.", "norm1.", "norm2.", "neck.", "mask_tokens.", "enc_dec_")
HEADS = ("fc.", "classifier.", "head.fc.")  # of forks of the official code
SIGNS = {  # a name that identifies a layout
    "embeddings.patch_embeddings.weight": "Hugging Face",
    "stem.0.weight": "timm",
    "stem_0.weight": "timm",  # features_only=True
    "downsample_layers.0.0.weight": "official",
}


@dataclass
class Report:
    """Names of a checkpoint's tensors that were loaded, dropped, or missing from it."""

    layout: str  # a key of NAMES
    source: str = ""  # the file
    dropped: list[str] = field(default_factory=list)  # of parts that the model does not have
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # parts of the model that stay as initialized
    warnings: list[str] = field(default_factory=list)  # of a new head and adapted channels

    def __str__(self) -> str:
        """`official layout, new: head, norm; dropped: decoder`."""
        notes = [f"{self.layout} layout"]
        for kind, names in {"new": self.missing, "dropped": self.dropped}.items():
            parts = dict.fromkeys(name.split(".")[0] for name in names)
            notes += [f"{kind}: {', '.join(parts)}"] if parts else []
        return "; ".join(notes)


def to_convnextv2(
    state: State, decoder: bool = False, own: Collection[str] = ()
) -> tuple[dict[str, Tensor], Report]:
    """Convert a state dict of any known layout to `ConvNeXtV2`, or with `decoder` to `FCMAE`.

    Layouts: see NAMES; ours is the official one, with a prefix `encoder.` in pre-training.
    Parts that only the other of the two models has are dropped, and reported. Unknown names stay,
    and `load_weights` refuses them. own: names of the classifier to load, which stay; a head of
    `models.heads` may have some of another layout.
    """
    names = {name: unwrap(name) for name in state}
    report = Report(_layout(names))
    rules, out = _rules(report.layout, inward=True), {}
    not_ours = (CLASSIFIER if decoder else DECODER) + MM_PARTS * (report.layout == "MMPretrain")
    for name, theirs in names.items():
        ours = theirs
        if theirs not in own:
            ours = _translate(_normalize(theirs, report.layout), rules)
        if ours.startswith(not_ours):
            report.dropped.append(ours)
            continue
        value = _reshape(ours, theirs, state[name])
        ours = f"encoder.{ours}" if decoder and not ours.startswith(DECODER) else ours
        if ours in out:
            raise UserError(f"{name} and another tensor are both {ours}; expected one of each")
        out[ours] = value
    return out, report


def unwrap(name: str) -> str:
    """Remove the prefixes of DistributedDataParallel and torch.compile from a name."""
    for prefix in WRAPPERS * 2:  # either may be inside the other
        name = name.removeprefix(prefix)
    return name


def _layout(names: Mapping[str, str]) -> str:
    """Identify the layout of names; names: raw -> without WRAPPERS."""
    known = {re.sub(r"^convnext(v2)?\.(?=embeddings\.)", "", name) for name in names.values()}
    known = {name.removeprefix("encoder.") for name in known}
    if any(name.endswith(".kernel") for name in known):
        return "MinkowskiEngine"
    if any(name.endswith(".depthwise_conv.weight") for name in known):
        known |= {name.removeprefix("backbone.") for name in known}
        if "downsample_layers.0.0.weight" in known:
            return "MMPretrain"
    found = [layout for sign, layout in SIGNS.items() if sign in known]
    if not found:
        raise UserError(
            "these are not weights of a ConvNeXt V2 or V1, with names like "
            f"{first_few(sorted(known)) or 'none'}; expected those of the official code, timm, "
            f"Hugging Face, MMPretrain or this toolkit{_prefix_hint(names)}"
        )
    return found[0]


def _prefix_hint(names: Iterable[str]) -> str:
    """Suggest the --model_prefix of a network that is part of another one, '' if none is found."""
    ends = (
        name.removesuffix(sign) for name in names for sign in SIGNS if name.endswith(f".{sign}")
    )
    found, inside = [], [("convnextv2.", "classifier."), ("convnext.", "classifier.")]
    inside += [("encoder.", "mask_token")]
    inside += [("backbone.", "head.fc.")] * any(".depthwise_conv." in name for name in names)
    for prefix in dict.fromkeys(ends):
        for inner, next_to_it in inside:
            outer = prefix.removesuffix(inner)
            is_whole = outer != prefix and any(n.startswith(outer + next_to_it) for n in names)
            prefix = outer if is_whole else prefix
        found.append(prefix)
    return f"; try --model_prefix {' or '.join(found)}" if found else ""


def _normalize(name: str, layout: str) -> str:
    """Write a name as NAMES has it; layouts leave out a prefix, or write it otherwise."""
    if layout == "Hugging Face":  # ConvNextV2Model lacks the prefix of its classifier
        name = replace_prefix(name, "convnext.", "convnextv2.")
        full = name.startswith(("convnextv2.", "classifier."))
        return name if full else f"convnextv2.{name}"
    if layout == "timm":  # features_only=True writes stem_0 and stages_0
        return re.sub(r"^(stem|stages)_(\d+)\.", r"\1.\2.", name)
    if layout == "MMPretrain":
        return name.removeprefix("backbone.")
    name = name.removeprefix("encoder.")
    return next((f"head.{name[len(h) :]}" for h in HEADS if name.startswith(h)), name)


def _rules(layout: str, inward: bool) -> list[tuple[re.Pattern, str]]:
    """Make (pattern, replacement) pairs that turn a layout's names into ours, or ours into its."""
    rules = []
    for ours, theirs in NAMES[layout].items():
        source, target = (theirs, ours) if inward else (ours, theirs)
        pattern = re.sub(r"\\\{([ij])\\\}", r"(?P<\1>\\d+)", re.escape(source))
        rules.append((re.compile(pattern), re.sub(r"\{([ij])\}", r"\\g<\1>", target)))
    return rules


def _translate(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        if match := pattern.match(name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _reshape(ours: str, theirs: str, value: Tensor) -> Tensor:
    """Give a tensor the shape of ours; tensors with other than the known shapes are unchanged."""
    if theirs.endswith(".kernel"):  # (k*k, C) depthwise or (k*k, C, D), with k*k column by column
        cells, *channels = value.shape
        k = round(cells**0.5)
        kernel = value.reshape(k, k, *channels).transpose(0, 1)
        return kernel.permute(3, 2, 0, 1) if len(channels) == 2 else kernel.movedim(2, 0)[:, None]
    is_vector = value.ndim > 0 and value.numel() == value.shape[-1]
    if ".grn." in ours and is_vector:
        return value.reshape(1, 1, 1, -1)
    if ".pwconv" in ours and value.ndim == 4 and value.shape[2:] == (1, 1):  # see CONV_MLP
        return value.flatten(1)
    norm = re.search(r"(^|\.)(norm|downsample_layers\.0\.1|downsample_layers\.[1-9]\.0)\.", ours)
    return value.flatten() if is_vector and (ours.endswith(".bias") or norm) else value


def to_timm(state: State) -> dict[str, Tensor]:
    """Convert a state dict of `ConvNeXtV2` to timm's `convnextv2_*` or `convnext_*`.

    timm's GRN has vectors, and its four small sizes have 1x1 convolutions instead of linear layers.
    """
    if describe(state)["dims"][0] in CONV_MLP:
        mlp = [name for name in state if ".pwconv" in name and name.endswith("weight")]
        state = {**state, **{name: state[name][..., None, None] for name in mlp}}
    return _outward(state, "timm", lambda grn: grn.flatten())


def to_hf(state: State) -> dict[str, Tensor]:
    """Convert a state dict of `ConvNeXtV2` to `ConvNext(V2)ForImageClassification`."""
    out = _outward(state, "Hugging Face", lambda grn: grn)
    prefix = f"{family(describe(state))}."
    return {replace_prefix(name, "convnextv2.", prefix): value for name, value in out.items()}


def to_official(state: State) -> dict[str, Tensor]:
    """Convert a state dict of `ConvNeXtV2` or `FCMAE` to the official scripts.

    A classifier's is the same. Pre-trained weights lose `encoder.`, and GRN gets the shape (1, 4C)
    of the published files, since the official `--finetune` adds two axes to it.
    """
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    classifier = any(name.startswith(CLASSIFIER) for name in state)
    return _outward(state, "official", lambda grn: grn if classifier else grn.reshape(1, -1))


def _outward(state: State, layout: str, grn: Callable) -> dict[str, Tensor]:
    rules = _rules(layout, inward=False)
    shaped = {name: grn(v) if ".grn." in name else v for name, v in state.items()}
    return {_translate(name, rules): value.contiguous() for name, value in shaped.items()}


def replace_prefix(name: str, old: str, new: str) -> str:
    """Return the name with another prefix, if it has the old one."""
    return new + name.removeprefix(old) if name.startswith(old) else name


def family(shape: Mapping[str, Any]) -> str:
    """Return `convnext` for a shape of `describe` with layer scale (V1), else `convnextv2`."""
    return "convnextv2" if shape.get("layer_scale_init_value") is None else "convnext"


def size_name(shape: Mapping[str, Any]) -> str | None:
    """Return `convnextv2_tiny` for a shape of `describe`, None if it is no size of V2 or V1."""
    kind, found = family(shape), (shape.get("depths"), shape.get("dims"))
    sizes = SIZES if kind == "convnextv2" else V1_SIZES
    return next((f"{kind}_{name}" for name, size in sizes.items() if size == found), None)


def describe_decoder(state: State) -> dict[str, int]:
    """Return the flags of the decoder that a state dict of `FCMAE` holds."""
    blocks = [name for name in state if re.fullmatch(r"decoder\.\d+\.dwconv\.bias", name)]
    return {"decoder_embed_dim": state["mask_token"].shape[1], "decoder_depth": len(blocks)}


def describe(state: State) -> dict[str, Any]:
    """Return the arguments of the `ConvNeXtV2` that a state dict under our names belongs to."""
    dims, depths = [], []
    while f"stages.{len(dims)}.0.dwconv.weight" in state:
        i = len(dims)
        dims.append(len(state[f"stages.{i}.0.dwconv.weight"]))
        depths.append(sum(f"stages.{i}.{j}.dwconv.weight" in state for j in range(len(state))))
    stem = state.get("downsample_layers.0.0.weight")
    if not dims or stem is None or stem.ndim != 4:
        names = first_few(state) or "none"
        raise UserError(f"these are not weights of a ConvNeXt V2 or V1, with names like {names}")
    return {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "in_chans": stem.shape[1],
        "stem_stride": stem.shape[2],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "layer_scale_init_value": 1e-6 if "stages.0.0.gamma" in state else None,
    }
