# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Which runs may use CUDA graphs; that they change no number: tests/test_engines.py on a GPU."""

import pytest
import torch

from errors import UserError
from training.cuda_graphs import check_graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_graphs_refuse_gradient_accumulation():
    with pytest.raises(UserError, match="does not work with 4 gradient accumulation steps"):
        check_graphs(True, CUDA, 4)
    check_graphs(True, CUDA, 1)


def test_graphs_need_cuda():
    with pytest.raises(UserError, match="--cuda_graphs needs a CUDA device, this one is cpu"):
        check_graphs(True, CPU)
    check_graphs(False, CPU, 4)
