# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Transforms that change with the epoch: of a sample the epoch in its key decides, never a state.

python -c "from data_loading.stages import by_epoch; print(by_epoch({0: len, 5: sum}).at(7))"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ByEpoch:
    """Transforms, or others, of the parts of a run: first epoch, counted from 0, -> transform."""

    parts: Mapping[int, Any]

    def at(self, epoch: int) -> Any:
        """Return what holds in an epoch."""
        return self.parts[max(first for first in self.parts if first <= epoch)]


def by_epoch(parts: Mapping[int, Callable]) -> Any:
    """Return `ByEpoch`, or the transform itself if there is one for all epochs."""
    return ByEpoch(parts) if len(parts) > 1 else parts[0]
