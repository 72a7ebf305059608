# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Repeat the matrix products of a step alone: a lower bound for the time of a step.

PYTHONPATH=. python -c "import benchmarks.products as p; print(p.Products.__doc__)"
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


class Products(TorchDispatchMode):
    """Every matrix product that `step()` makes, in its order, with operands of the same layout.

    Operands of equal shape and strides share one random tensor.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.operands: dict[tuple, Tensor] = {}
        with self:
            step()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func._schema.name in NAMES:
            self.calls.append((func, [self._operand(arg) for arg in args], kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _operand(self, arg: Any) -> Any:
        if not torch.is_tensor(arg):
            return arg
        key = (arg.shape, arg.stride(), arg.dtype)
        if key not in self.operands:
            fresh = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device)
            self.operands[key] = fresh.normal_()
        return self.operands[key]

    def __call__(self) -> None:
        """Compute all matrix products once."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)
