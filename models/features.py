# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Which stages' maps a network gives, and what a detection or segmentation head asks about them.

python -c "from models import create_model; c('convnextv2_atto', features_only=True)"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errors import UserError


def take_stages(indices: int | Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Of stages 0, 1, ...: all (None), the last n (an int), or those listed, -1 for the last."""
    if indices is None:
        return tuple(range(stages))
    last_n = isinstance(indices, int)
    wanted = range(stages - indices, stages) if last_n else indices
    taken = tuple(wanted if last_n else (i + stages if i < 0 else i for i in wanted))
    in_order = list(taken) == sorted(set(taken) & set(range(stages)))
    if not taken or not in_order:
        raise UserError(
            f"stages {indices!r}: expected how many of the last, 1 to {stages}, or a rising list "
            f"of numbers from 0 to {stages - 1}"
        )
    return taken


def left_out(deepest: int, stages: int) -> tuple[str, ...]:
    """How the parameters begin that a backbone lacks: none may wait in vain for its gradient."""
    parts = ("downsample_layers", "stages")
    return "norm.", "head.", *(f"{part}.{i}." for i in range(deepest + 1, stages) for part in parts)


@dataclass(frozen=True)
class FeatureInfo:
    """Channels and strides of a network's maps, asked for as timm's `feature_info`."""

    num_chs: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, taken: Sequence[int], dims: Sequence[int], stem_stride: int) -> FeatureInfo:
        return cls(tuple(dims[i] for i in taken), tuple(stem_stride * 2**i for i in taken))

    def channels(self) -> list[int]:
        return list(self.num_chs)

    def reduction(self) -> list[int]:
        return list(self.strides)
