# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Export formats: for each, a function that writes it and one that loads it with other libraries.

python -c "from weights import export_formats; print(export_formats.ExportSpec.__doc__)"
"""

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.convnextv2 import ConvNeXtV2
from weights.convert import CLASSIFIER, CONV_MLP, family, size_name, to_convnextv2
from weights.files import TOOLKIT, load_weights, read_checkpoint

PROTOBUF_LIMIT = 2**31 - 2**24  # bytes: a protobuf message ends at 2 GiB, with the graph in it


@dataclass(frozen=True)
class ExportSpec:
    """Weights to export, and the facts about them that other libraries need."""

    state: dict[str, Tensor]  # of `ConvNeXtV2`, or of `network`
    full_state: dict[str, Tensor]  # of `FCMAE` if there is a decoder, otherwise the same
    shape: dict[str, Any]  # from `weights.convert.describe`
    network: nn.Module | None = None  # a classifier of the user's own; None: a ConvNeXtV2
    size: tuple[int, int] = (224, 224)  # height and width in pixels
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    crop_pct: float | None = None
    value_range: tuple[float, float] | None = None  # values that become 0 and 1; None: of 8 bits
    labels: list[str] = field(default_factory=list)
    classes: list[str] | None = None  # names that the checkpoint stores, in the order of the head
    half: bool = False
    opset: int = 17

    @property
    def run(self) -> dict[str, Any]:
        """Preprocessing and class names, as a checkpoint of this toolkit stores them."""
        args = {"input_size": list(self.size), "mean": list(self.mean), "std": list(self.std)}
        args |= {"crop_pct": self.crop_pct} if self.crop_pct is not None else {}
        args |= {"value_range": list(self.value_range)} if self.value_range else {}
        return {"args": args, "classes": self.classes}

    @property
    def layout(self) -> str:
        """Names of the tensors, for the metadata of a file."""
        if self.network is not None:
            return type(self.network).__name__
        return "ConvNeXt V2 toolkit (the official names)"

    @property
    def output(self) -> str:
        """Output of the network: `logits`, or without a head `features` (N, C) or `map`."""
        if self.shape["num_classes"]:
            return "logits"
        return "features" if "norm.weight" in self.state else "map"


class Network(nn.Module):
    """The network of an exported graph: images (N, C, H, W) -> `ExportSpec.output`.

    half: float16 weights. Images and output stay in float32, and inside also the mean over
    positions, the norm after it and the statistics of GRN (see `models.kernels.ops`).
    """

    def __init__(self, spec: ExportSpec, source: str = "checkpoint", half: bool = False) -> None:
        super().__init__()
        self.output, self.is_half = spec.output, half
        self.is_foreign = spec.network is not None
        if self.is_foreign:
            self.model = copy.deepcopy(spec.network)
            load_weights(self.model, spec.state, source)
            self.eval().requires_grad_(False)
            return
        self.model = ConvNeXtV2(**spec.shape)
        # Pre-trained weights have no final norm; without it, they have no head either.
        has_norm = any(name.startswith(CLASSIFIER) for name in spec.state)
        load_weights(self.model, spec.state, source, () if has_norm else ("norm.",))
        if half:
            self.model.half().norm.float()
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.is_foreign:
            return self.model(images)
        x = self.model.forward_features(images.half() if self.is_half else images)
        x = x.float() if self.is_half else x
        if self.output == "map":
            return x
        x = self.model.forward_head(x, pre_logits=True)
        if self.output == "features":
            return x
        return self.model.head(x.half()).float() if self.is_half else self.model.head(x)


def save(state: dict[str, Tensor], path: Path, spec: ExportSpec, **metadata: str) -> None:
    """Write a .safetensors file; safetensors' `save_file` makes it readable by its owner only."""
    from safetensors import torch as safetensors

    contiguous = {name: value.contiguous() for name, value in state.items()}
    metadata |= {"format": "pt", TOOLKIT: json.dumps(spec.run)}
    path.write_bytes(safetensors.save(contiguous, metadata))


def read_safetensors(spec: ExportSpec, path: Path) -> Callable[[Tensor], Tensor]:
    """Load with safetensors, into our network."""
    from safetensors.torch import load_file

    prefix = "" if spec.network else "encoder."
    state = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    own = {name: value for name, value in state.items() if name in spec.state}
    return Network(replace(spec, state=own)).double()


def read_official(spec: ExportSpec, path: Path) -> Callable[[Tensor], Tensor]:
    """Load with timm, which can read official names."""
    from timm.models.convnext import checkpoint_filter_fn

    def without_decoder(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return checkpoint_filter_fn({name: state[name] for name in spec.state}, model)

    return read_timm(spec, path, without_decoder)


def read_timm(
    spec: ExportSpec, path: Path, filter_fn: Callable[..., Any] | None = None
) -> Callable[[Tensor], Tensor]:
    """Load with timm."""
    import timm

    name, arguments = timm_arguments(spec)
    model = timm.create_model(name, **arguments)
    is_map = spec.output == "map"  # then the file has no final norm
    timm.models.load_checkpoint(model, str(path), strict=not is_map, filter_fn=filter_fn)
    model.double().eval()
    return model.forward_features if is_map else model


def timm_arguments(spec: ExportSpec) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments of the same network in timm."""
    shape, dims = spec.shape, spec.shape["dims"]
    published = size_name(shape)
    name = published or f"{family(shape)}_{'atto' if dims[0] in CONV_MLP else 'tiny'}"
    other = {} if published else {"depths": shape["depths"], "dims": dims}
    other |= {"in_chans": shape["in_chans"]} if shape["in_chans"] != 3 else {}
    other |= {"patch_size": shape["stem_stride"]} if shape["stem_stride"] != 4 else {}
    return name, {"num_classes": shape["num_classes"], **other}


def timm_call(spec: ExportSpec, path: str) -> str:
    """Return the Python line that loads the file with timm."""
    name, arguments = timm_arguments(spec)
    words = ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])
    if spec.output == "map":
        model = f"model = timm.create_model({words})"
        return f'{model}; timm.models.load_checkpoint(model, "{path}", strict=False)'
    return f'model = timm.create_model({words}, checkpoint_path="{path}")'


def check_round_trip(expected: dict[str, Tensor], path: Path, convert: bool = True) -> None:
    """Raise UserError unless the file converts back to the same weights, bit by bit."""
    again = read_checkpoint(path)["model"]
    if convert:
        again = to_convnextv2(again, decoder="mask_token" in expected)[0]
    same = again.keys() == expected.keys()
    if not same or not all(torch.equal(again[name], v) for name, v in expected.items()):
        raise UserError(f"{path.name} does not give the same weights back; it was deleted")


def _example(spec: ExportSpec) -> Tensor:
    return torch.zeros(2, spec.shape["in_chans"], *spec.size)


def write_onnx(spec: ExportSpec, path: Path) -> None:
    """Write with torch's tracing exporter: the newer one needs opset 18 and takes 15 s."""
    nbytes = sum(value.nbytes for value in spec.state.values()) // (2 if spec.half else 1)
    if nbytes > PROTOBUF_LIMIT:
        raise UserError(
            f"an ONNX file holds at most 2 GiB, and these weights have {nbytes / 2**30:.1f} GiB: "
            "give --half true, or use --to pt2"
        )
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--to onnx needs two packages: pip install onnx onnxruntime")
    axes = {"images": {0: "batch"}, spec.output: {0: "batch"}}
    if spec.network is None:  # others may work with one size only
        axes["images"] |= {2: "height", 3: "width"}
    if spec.output == "map":
        axes["map"] |= {2: "rows", 3: "columns"}
    torch.onnx.export(
        Network(spec, half=spec.half),
        (_example(spec),),
        str(path),
        dynamo=False,
        opset_version=spec.opset,
        input_names=["images"],
        output_names=[spec.output],
        dynamic_axes=axes,
    )


def read_onnx(spec: ExportSpec, path: Path) -> Callable[[Tensor], Tensor]:
    """Load with onnxruntime, with its default fusions."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torchscript(spec: ExportSpec, path: Path) -> None:
    """Write a trace, for `torch.jit.load` and LibTorch."""
    network = Network(spec, half=spec.half)
    torch.jit.trace(network, _example(spec), check_trace=False).save(str(path))


def write_pt2(spec: ExportSpec, path: Path) -> None:
    """Write an exported program, for `torch.export.load` and AOT compilers."""
    network = Network(spec, half=spec.half)
    if spec.network is not None:
        dynamic = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(network, (_example(spec),), dynamic_shapes=dynamic)
        return torch.export.save(program, path)
    least = 2 * network.model.total_stride  # torch.export would specialize on a single cell
    if min(spec.size) < least:
        raise UserError(
            f"--input_size {spec.size}: --to pt2 needs at least {least} pixels a side; give "
            "more, or use --to onnx"
        )
    dims = {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    dynamic = ({0: torch.export.Dim("batch", min=1), **dims},)
    program = torch.export.export(network, (_example(spec),), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, path)
