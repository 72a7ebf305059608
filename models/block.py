# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A block of the network, and what of it is kept for backward.

python -c "from models.block import Block; print(Block(8))"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.kernels import ops
from models.kernels.depthwise import depthwise
from models.kernels.grn_mlp import block_mlp
from models.layers import GRN, DropPath, LayerNorm, init_weights, linear
from models.sparse import PatchGrid


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, and an MLP with GRN, around a residual.

    x: dense (N, H, W, C), or packed (N, V, p, p, C) together with its grid.
    """

    checkpointing = False  # in training: save x alone for backward, which computes the rest again

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        init_weights(self.dwconv)
        self.norm = LayerNorm(dim)
        self.pwconv1 = linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: PatchGrid | None = None) -> Tensor:
        y = self._branch_checkpointed(x, grid) if self._checkpoints() else self.branch(x, grid)
        return x + self.drop_path(y)

    def branch(self, x: Tensor, grid: PatchGrid | None) -> Tensor:
        """What is added to x, before any of it is dropped."""
        y = depthwise(x, self.dwconv, grid, self.norm)
        return block_mlp(y, self.pwconv1, self.grn, self.pwconv2)

    def _checkpoints(self) -> bool:
        """Not in a graph for elsewhere, nor with weights that `functional_call` lends for a call:
        in backward they are gone.
        """
        asked = self.checkpointing and self.training and torch.is_grad_enabled()
        if not asked or ops.exporting():
            return False
        return all(isinstance(weight, nn.Parameter) for weight in self.parameters())

    def _branch_checkpointed(self, x: Tensor, grid: PatchGrid | None) -> Tensor:
        """`branch`; nothing random is in it, so no generator's state has to be kept either."""
        used = [*self.parameters()]

        def branch(x: Tensor) -> Tensor:
            if any(now is not then for now, then in zip(self.parameters(), used, strict=True)):
                raise RuntimeError(
                    "a block with gradient checkpointing has other weights in backward than in "
                    "forward, as after functional_call; set_grad_checkpointing(False)"
                )
            return self.branch(x, grid)

        return checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False)


def set_grad_checkpointing(network: nn.Module, enable: bool = True) -> None:
    """For all blocks of a network."""
    for module in network.modules():
        if isinstance(module, Block):
            module.checkpointing = enable
