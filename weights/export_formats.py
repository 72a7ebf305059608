# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights and graphs of a network as files, each with what reads it elsewhere.

python -c "from weights import export_formats; print(export_formats.Subject.__doc__)"
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.convnextv2 import SIZES, ConvNeXtV2
from weights.convert import CONV_MLP, to_convnextv2, to_official, to_timm
from weights.files import load_weights, read_checkpoint

PROTOBUF = 2**31 - 2**24  # bytes: a protobuf message ends at 2 GiB, and the graph is in it too


@dataclass(frozen=True)
class Subject:
    """What is exported, and what its users must know of it."""

    state: dict[str, Tensor]  # of `ConvNeXtV2`
    whole: dict[str, Tensor]  # of `FCMAE` if there is a decoder, else the same
    shape: dict[str, Any]  # of `models.convert.describe`
    size: tuple[int, int] = (224, 224)  # pixels: height and width
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    crop_pct: float | None = None
    labels: list[str] = field(default_factory=list)
    half: bool = False
    opset: int = 17

    @property
    def size_name(self) -> str | None:
        """`convnextv2_tiny`, or None for a network that is none of the eight."""
        shape = self.shape["depths"], self.shape["dims"]
        return next((f"convnextv2_{name}" for name, own in SIZES.items() if own == shape), None)

    @property
    def output(self) -> str:
        """What the network gives: by its weights, `logits`, `features` (N, C) or `map`."""
        if self.shape["num_classes"]:
            return "logits"
        return "features" if "norm.weight" in self.state else "map"

    @property
    def stride(self) -> int:
        """Pixels along a cell of the last map."""
        return self.shape["stem_stride"] * 2 ** (len(self.shape["dims"]) - 1)


def as_dict(held: Any) -> dict[str, Any]:
    """Flags as this toolkit or the official one keeps them; empty if there are none."""
    return vars(held) if isinstance(held, argparse.Namespace) else dict(held or {})


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def check_shape(source: str, shape: dict[str, Any], model: str) -> None:
    """Refuse what lacks blocks of the model that it was made for; say what is none of the eight."""
    found = shape["depths"], shape["dims"]
    expected = SIZES.get(model.removeprefix("convnextv2_"))
    if expected is not None and expected != found:
        raise UserError(f"{source}: {model} has depths and widths {expected}, these are {found}")
    if found not in SIZES.values():
        text = f"none of the eight sizes: depths {found[0]}, widths {found[1]}"
        print(f"{source}: {text}", file=sys.stderr)


class Network(nn.Module):
    """What a graph computes: images (N, C, H, W) -> `Subject.output`.

    Of a half-precision one images and output stay in float32, and inside it the mean over
    positions, the norm behind it and, see `models.ops`, the statistics of GRN.
    """

    def __init__(
        self, subject: Subject, source: str = "the checkpoint", half: bool = False
    ) -> None:
        super().__init__()
        self.bare = ConvNeXtV2(**subject.shape)
        load_weights(self.bare, subject.state, source, absent_parts(subject.state))
        self.output, self.half_precision = subject.output, half
        if half:
            self.bare.half().norm.float()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bare.forward_features(images.half() if self.half_precision else images)
        x = x.float() if self.half_precision else x
        if self.output == "map":
            return x
        x = self.bare.forward_head(x, pre_logits=True)
        if self.output == "features":
            return x
        return self.bare.head(x.half()).float() if self.half_precision else self.bare.head(x)


def absent_parts(state: dict[str, Tensor]) -> tuple[str, ...]:
    """The final norm, which pre-trained weights lack; without it, there can be no head."""
    return () if any(name.startswith(("norm.", "head.")) for name in state) else ("norm.",)


# --- weights under other names: write(subject, path), read(subject, path) -> function -------------


def write_safetensors(subject: Subject, path: Path) -> None:
    """Our own names, decoder included."""
    save(subject.whole, path, layout="ConvNeXt V2 toolkit (the official names)")


def save(state: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """A .safetensors file; safetensors' own `save_file` makes one that only its owner may read."""
    from safetensors import torch as safetensors

    contiguous = {name: value.contiguous() for name, value in state.items()}
    path.write_bytes(safetensors.save(contiguous, {"format": "pt", **metadata}))


def read_safetensors(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """By safetensors, into a model of ours."""
    from safetensors.torch import load_file

    state = {name.removeprefix("encoder."): v for name, v in load_file(path).items()}
    own = {name: value for name, value in state.items() if name in subject.state}
    return Network(Subject(own, own, subject.shape)).double()


def write_official(subject: Subject, path: Path) -> None:
    """What the official scripts read, decoder included."""
    torch.save({"model": to_official(subject.whole)}, path)


def read_official(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """By timm's own reader of the official layout."""
    from timm.models.convnext import checkpoint_filter_fn

    state = torch.load(path, weights_only=True)["model"]
    state = {name: value for name, value in state.items() if name in subject.state}
    model = _timm_model(subject)
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=subject.output != "map")
    return _of_timm(model, subject)


def write_timm(subject: Subject, path: Path) -> None:
    """A file for `timm.create_model(..., checkpoint_path=FILE)`."""
    save(to_timm(subject.state), path)


def read_timm(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """As `timm_call` says."""
    from timm.models import load_checkpoint

    if subject.output != "map":
        return _of_timm(_timm_model(subject, checkpoint_path=str(path)), subject)
    model = _timm_model(subject)
    load_checkpoint(model, str(path), strict=False)  # its final norm is in no file
    return _of_timm(model, subject)


def timm_arguments(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Name and keywords of the same network in timm."""
    shape, dims = subject.shape, subject.shape["dims"]
    name = subject.size_name or f"convnextv2_{'atto' if dims[0] in CONV_MLP else 'tiny'}"
    own = {} if subject.size_name else {"depths": shape["depths"], "dims": dims}
    own |= {"in_chans": shape["in_chans"]} if shape["in_chans"] != 3 else {}
    own |= {"patch_size": shape["stem_stride"]} if shape["stem_stride"] != 4 else {}
    return name, {"num_classes": shape["num_classes"], **own}


def _timm_model(subject: Subject, **more: Any) -> nn.Module:
    import timm

    name, keywords = timm_arguments(subject)
    return timm.create_model(name, **keywords, **more)


def _of_timm(model: nn.Module, subject: Subject) -> Callable[[Tensor], Tensor]:
    model.double().eval()
    return model.forward_features if subject.output == "map" else model


def timm_call(subject: Subject, path: str) -> str:
    """What to type in Python to use the file."""
    name, keywords = timm_arguments(subject)
    words = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in keywords.items())])
    if subject.output == "map":
        model = f"model = timm.create_model({words})"
        return f'{model}; timm.models.load_checkpoint(model, "{path}", strict=False)'
    return f'model = timm.create_model({words}, checkpoint_path="{path}")'


def check_round_trip(expected: dict[str, Tensor], path: Path) -> None:
    """Raise unless the file gives these weights of ours back, bit by bit."""
    held = read_checkpoint(path)
    again = to_convnextv2(held.get("model", held), decoder="mask_token" in expected)[0]
    same = again.keys() == expected.keys()
    if not same or not all(torch.equal(again[name], v) for name, v in expected.items()):
        raise UserError(f"{path.name} does not give the same weights back; nothing was kept")


# --- graphs ---------------------------------------------------------------------------------------


def _example(subject: Subject) -> Tensor:
    return torch.zeros(2, subject.shape["in_chans"], *subject.size)


def write_onnx(subject: Subject, path: Path) -> None:
    """By torch's tracing exporter: the newer one cannot go below opset 18, and takes 15 s."""
    held = sum(value.nbytes for value in subject.state.values()) // (2 if subject.half else 1)
    if held > PROTOBUF:
        raise UserError(
            f"an ONNX file holds 2 GiB at most, these weights are {held / 2**30:.1f}: give --half "
            "true, or --to pt2"
        )
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--to onnx needs two packages: pip install onnx onnxruntime")
    free = {"images": {0: "batch", 2: "height", 3: "width"}, subject.output: {0: "batch"}}
    if subject.output == "map":
        free["map"] |= {2: "rows", 3: "columns"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older one
        torch.onnx.export(
            Network(subject, half=subject.half),
            (_example(subject),),
            str(path),
            dynamo=False,
            opset_version=subject.opset,
            input_names=["images"],
            output_names=[subject.output],
            dynamic_axes=free,
        )


def read_onnx(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """By onnxruntime, with all the fusions it makes by default."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torchscript(subject: Subject, path: Path) -> None:
    """A trace, for `torch.jit.load` and LibTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.export is newer
        network = Network(subject, half=subject.half)
        torch.jit.trace(network, _example(subject), check_trace=False).save(str(path))


def read_torchscript(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))


def write_pt2(subject: Subject, path: Path) -> None:
    """An exported program, for `torch.export.load` and what compiles it ahead of time."""
    least = 2 * subject.stride  # one cell is a special case that a program holds for or excludes
    if min(subject.size) < least:
        raise UserError(
            f"--input_size {subject.size}: an exported program needs {least} pixels a side at "
            "least; give more, or export --to onnx"
        )
    dims = {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    free = ({0: torch.export.Dim("batch", min=1), **dims},)
    network = Network(subject, half=subject.half)
    program = torch.export.export(network, (_example(subject),), dynamic_shapes=free, strict=False)
    torch.export.save(program, path)


def read_pt2(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written
        return torch.export.load(path).module()
