# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pack the visible patches of masked images, and put them back in their places.

python -c "import torch; from models.sparse import PatchGrid; print(PatchGrid(torch.eye(3)).ids)"
"""

import torch
from torch import Tensor

from errors import UserError
from models.kernels import ops


class PatchGrid:
    """The visible patches of every image; converts between dense and packed maps.

    dense   (N, h*p, w*p, C)   all cells; p shrinks from stage to stage, h and w do not
    packed  (N, V, p, p, C)    the V visible patches of every image, rows first

    mask: (N, h, w) or (N, L) with `size`, 1 = removed, 0 = visible, V zeros in every image.
    visible: V, if known; counting costs a host sync on a GPU.
    """

    def __init__(
        self, mask: Tensor, size: tuple[int, int] | None = None, visible: int | None = None
    ) -> None:
        self.size = size or (mask.shape[-2], mask.shape[-1])
        mask = mask.reshape(-1, self.size[0] * self.size[1])
        if visible is None:
            counts = (mask == 0).sum(1)
            low, high = int(counts.min()), int(counts.max())
            if low != high or low == 0:
                raise UserError(
                    f"mask leaves between {low} and {high} patches visible; "
                    "expected the same number, at least 1, in every image"
                )
            visible = high
        order = mask.argsort(dim=1, stable=True)  # visible ones first, each kind row by row
        self.ids = order[:, :visible]  # (N, V)
        packed = torch.arange(visible, dtype=torch.int32, device=mask.device)
        slots = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
        slots = slots.scatter(1, self.ids, packed.expand(len(mask), -1))  # in place, vmap fails
        self.slots = slots.view(-1, *self.size)  # (N, h, w), index among the packed, -1 = removed

    def pack(self, dense: Tensor) -> Tensor:
        """(N, h*p, w*p, C) -> (N, V, p, p, C)"""
        return ops.pack(dense, self.ids, *self.size)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, V, p, p, C) -> (N, h*p, w*p, C), zero where removed."""
        return ops.unpack(packed, self.ids, *self.size)
