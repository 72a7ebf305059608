# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measures of a network that need no labels: effective rank, feature distance, dead channels, GRN.

python -c "import torch; from insight.health import rank_me; print(rank_me(torch.randn(99, 8)))"

docs/insight.md says what is normal.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insight.evaluators import exact_dtype
from insight.features import as_input, encoder_of
from models.convnextv2 import ConvNeXtV2

DEAD = 0.01  # of the mean over the layer's channels
CONSTANT = 0.05  # standard deviation over the mean's size
# Beginnings of the names in log.txt of what probes measure.
MEASURES = ("probe_", "rank_me", "holdout_loss", "fixed_train_loss", "feature", "dead_channels")
MEASURES += ("saturated_channels", "grn_", "grad_norm_", "skipped_steps")


def is_measure(name: str) -> bool:
    """Return True for a name in log.txt of what probes of pre-training measure."""
    return name.startswith(MEASURES)


def rank_me(features: Tensor) -> float:
    """Effective rank of features (N, D), from 1 to min(N, D).

    It is exp(entropy) of the singular values, as fractions of their sum (RankMe, arXiv 2210.02885;
    Roy and Vetterli, 2007): the number of directions that the features use about equally.
    """
    x = features.to(exact_dtype(features.device))
    gram = x.T @ x if x.shape[1] <= len(x) else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def channel_distance(maps: Tensor) -> Tensor:
    """(N, C, L) maps of L cells -> (N,) mean of (1 - cosine) / 2 over all pairs of channels.

    0 if all channels look the same, 0.5 if they are unrelated. This is the feature collapse measure
    of ConvNeXt V2 (arXiv 2301.00808, section 3), where each channel is a pair with itself too.
    Channels that are zero everywhere have no direction and are left out; all of them: 0.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    norms = torch.linalg.vector_norm(maps, dim=2, keepdim=True)  # (N, C, 1)
    count = (norms > 0).sum((1, 2)).clamp(min=1)
    # The sum of all cosines is the squared norm of the sum of the unit vectors.
    total = (maps / norms.clamp(min=torch.finfo(maps.dtype).tiny)).sum(1)  # (N, L)
    return ((1 - total.square().sum(1) / count**2) / 2).clamp(min=0)


# --- activations ----------------------------------------------------------------------------------


def activations(encoder: nn.Module, images: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (stage from 1, maps (N, C, L)) of the layers to measure.

    In a ConvNeXt these are the widened features of every block, after GELU, where collapse shows
    first; GRN scales each of these maps. In other networks it is the last map alone, as stage 0.
    """
    images = as_input(encoder, images)
    if not isinstance(encoder, ConvNeXtV2):
        yield 0, encoder.forward_features(images).flatten(2)
        return
    x = images.permute(0, 2, 3, 1)
    pairs = zip(encoder.downsample_layers, encoder.stages, strict=True)
    for stage, (downsample, blocks) in enumerate(pairs, 1):
        x = downsample(x)  # (N, H, W, C)
        for block in blocks:
            inner = block.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            wide = F.gelu(block.pwconv1(block.norm(inner)))  # (N, H, W, 4C)
            yield stage, wide.flatten(1, 2).transpose(1, 2)
            x = block(x)


class LayerSums(NamedTuple):
    """Sums over images by layer, which add up over batches and ranks."""

    stages: Sequence[int]  # of each layer
    values: Sequence[Tensor]  # (2 + 2C,): images, distances; sums and squares of each channel

    def __add__(self, other: "LayerSums") -> "LayerSums":
        pairs = zip(self.values, other.values, strict=True)
        return LayerSums(self.stages, [one + another for one, another in pairs])


def layer_sums(model: nn.Module, images: Tensor) -> LayerSums:
    """Return sums of the layers of `activations` for whole images (N, C, H, W), on the device."""
    stages, sums = [], []
    for stage, maps in activations(encoder_of(model), images):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        images_and_distance = [maps.new_tensor(float(len(maps))), channel_distance(maps).sum()]
        moments = [maps.mean(2).sum(0), maps.square().mean(2).sum(0)]
        values = torch.cat([torch.stack(images_and_distance), *moments])
        stages.append(stage)
        sums.append(values.to(exact_dtype(maps.device)))
    return LayerSums(stages, sums)


def describe_layers(layers: LayerSums) -> dict[str, float | list[float]]:
    """Return measures by their names in log.txt, of sums over all images.

    feature_distance: mean over all layers of `channel_distance`; ..._stageN: of a stage, in a
    ConvNeXt; ..._blocks: a list. dead_channels, saturated_channels: in percent of all channels.
    The root mean square of a dead one is below 1% of the mean of those of its layer; a saturated
    one hardly varies over images and places: its standard deviation is below 5% of its mean.
    """
    distances: list[tuple[int, float]] = []
    dead = saturated = channels = 0
    for stage, values in zip(*layers, strict=True):
        count, distance = values[:2].tolist()
        mean, square = (values[2:] / count).chunk(2)
        size = square.sqrt()  # root mean square of each channel
        is_dead = size <= DEAD * size.mean()
        spread = (square - mean.square()).clamp(min=0).sqrt()
        distances.append((stage, distance / count))
        dead += is_dead.sum().item()
        saturated += (~is_dead & (spread < CONSTANT * mean.abs())).sum().item()
        channels += len(mean)
    found: dict[str, float | list[float]] = {"feature_distance": _mean(x for _, x in distances)}
    for stage in dict.fromkeys(stage for stage, _ in distances if stage):
        own = (x for number, x in distances if number == stage)
        found[f"feature_distance_stage{stage}"] = _mean(own)
    if len(distances) > 1:
        found["feature_distance_blocks"] = [x for _, x in distances]
    share = 100 / max(channels, 1)
    return found | {"dead_channels": share * dead, "saturated_channels": share * saturated}


def _mean(values: Iterable[float]) -> float:
    values = [*values]
    return sum(values) / max(len(values), 1)


# --- parameters -----------------------------------------------------------------------------------


def grn_sizes(model: nn.Module) -> dict[str, float]:
    """Return the root mean square of GRN's gamma and beta by stage, nothing without GRN.

    Names: grn_gamma_stage1, grn_beta_stage1 and so on. Both start at 0, where GRN does nothing.
    """
    encoder = encoder_of(model)
    found = {}
    for stage, blocks in enumerate(getattr(encoder, "stages", ()), 1):
        layers = [grn for block in blocks if (grn := getattr(block, "grn", None)) is not None]
        for name in ("gamma", "beta") if layers else ():
            values = torch.cat([getattr(layer, name).detach().flatten() for layer in layers])
            found[f"grn_{name}_stage{stage}"] = values.float().square().mean().sqrt().item()
    return found


def parameters_by_stage(model: nn.Module) -> Mapping[str, list[nn.Parameter]]:
    """Return the parameters of each stage of a ConvNeXt encoder, with its downsampling layer.

    Keys: stage1 and so on, and `decoder` for what is outside the encoder. The encoder of another
    network is one, `encoder`.
    """
    is_convnext = isinstance(getattr(model, "encoder", None), ConvNeXtV2)
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        top, *rest = name.split(".")
        key = "encoder" if top == "encoder" else "decoder"
        if is_convnext and top == "encoder" and len(rest) > 1 and rest[1].isdecimal():
            # encoder.stages.0.1..., encoder.downsample_layers.0...
            key = f"stage{int(rest[1]) + 1}"
        found.setdefault(key, []).append(parameter)
    return found
