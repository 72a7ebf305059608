# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""CUDA graphs: the kernels of a training step launched as one, where no shape ever changes.

python main_pretrain.py --data_set SYNTHETIC --model convnextv2_atto --cuda_graphs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from training.stepper import autocast


def check_graphs(asked: bool, device: torch.device, update_freq: int = 1) -> None:
    """Raise UserError where --cuda_graphs is asked for and cannot be."""
    if asked and update_freq > 1:
        raise UserError(
            f"--cuda_graphs true cannot accumulate, and an update has {update_freq} micro-batches "
            "of each process; drop it, raise --batch_size, or lower --effective_batch"
        )
    if asked and device.type != "cuda":
        raise UserError(f"--cuda_graphs needs a CUDA device, this one is {device}; drop it")


class Graphed(nn.Module):
    """`model` in training as two CUDA graphs, one of its forward and one of its backward.

    shapes: of the tensors in every call; fixed: what every call has behind them. Gradients must
    not accumulate (pytorch issue 181723). Seeds act as ever: a replay reads the generator's.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, amp: str, shapes: Sequence, *fixed: Any
    ) -> None:
        super().__init__()
        check_graphs(True, device)
        self.model, self.device, self.amp, self.fixed = model, device, amp, fixed
        self.shapes = [torch.Size(shape) for shape in shapes]
        sample = [torch.ones(shape, device=device) for shape in shapes]
        sample = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in sample]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            torch.cuda.make_graphed_callables(self.train(), tuple(sample))  # replaces `forward`
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"--cuda_graphs cannot capture this model, drop it: {error}") from error
        for buffer, before in buffers:  # the runs that warm up must not count in statistics
            buffer.copy_(before)

    def __call__(self, *args: Any) -> Any:
        """Like a call of the model."""
        tensors = args[: len(self.shapes)]
        shapes = [x.shape for x in tensors]
        if shapes != self.shapes:  # torch would broadcast a batch of one
            raise UserError(f"--cuda_graphs: got {shapes}, captured {self.shapes}; drop it")
        return super().__call__(*tensors)

    def forward(self, *tensors: Tensor) -> Any:
        with autocast(self.device, self.amp, cache=False):
            return self.model(*tensors, *self.fixed)
