# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""CUDA graphs: the forward and the backward pass each launch all their kernels at once.

python main_pretrain.py --data_set SYNTHETIC --model convnextv2_atto --cuda_graphs
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from training.stepper import autocast


def check_graphs(asked: bool, device: torch.device, update_freq: int = 1) -> None:
    """Raise UserError if --cuda_graphs is given and does not work with this run."""
    if asked and update_freq > 1:
        raise UserError(
            f"--cuda_graphs does not work with {update_freq} gradient accumulation steps; "
            "drop it, raise --batch_size, or lower --effective_batch"
        )
    if asked and device.type != "cuda":
        raise UserError(f"--cuda_graphs needs a CUDA device, this one is {device}; drop it")


class Graphed(nn.Module):
    """A model whose training forward and backward passes are replayed as CUDA graphs.

    shapes: of the tensors that every call gets; constants: the other arguments of every call.
    Gradients must not accumulate (pytorch issue 181723). Random numbers follow the seed as
    without graphs, since a replay reads the generator's state.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, amp: str, shapes: Sequence, *constants: Any
    ) -> None:
        super().__init__()
        self.model, self.device, self.amp, self.constants = model, device, amp, constants
        self.shapes = [torch.Size(shape) for shape in shapes]
        samples = [torch.ones(shape, device=device) for shape in shapes]
        samples = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in samples]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            torch.cuda.make_graphed_callables(self.train(), tuple(samples))  # replaces `forward`
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"--cuda_graphs cannot capture this model, drop it: {error}") from error
        for buffer, before in buffers:  # undo what the warm-up passes did to running statistics
            buffer.copy_(before)

    def __call__(self, *args: Any) -> Any:
        """Call the model with the tensors among `args`; the graphs hold the constants."""
        tensors = args[: len(self.shapes)]
        shapes = [x.shape for x in tensors]
        if shapes != self.shapes:  # a replay would broadcast a batch of one without an error
            raise UserError(f"--cuda_graphs: got {shapes}, captured {self.shapes}; drop it")
        return super().__call__(*tensors)

    def forward(self, *tensors: Tensor) -> Any:
        with autocast(self.device, self.amp, cache=False):
            return self.model(*tensors, *self.constants)
