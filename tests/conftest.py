# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One thread for toy sizes, since beside other programs torch's threads wait for each other."""

import gc
import os
import tempfile

import pytest
import torch

from parallel.process_group import get_logger

torch.set_num_threads(1)
gc.disable()  # until all tests are imported
CACHE = tempfile.TemporaryDirectory()  # of choices between kernels; the user's own stay his
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are processes that import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which must be set before a kernel is defined


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch):
    """Undo what a run in an earlier test did to the logger, which would write to its stdout."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    monkeypatch.setattr(get_logger(), "handlers", [])


@pytest.fixture
def log(caplog):
    """What the toolkit logs."""
    caplog.set_level("INFO", logger="convnextv2")
    return caplog


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but not what has been imported."""
    gc.enable()
    gc.freeze()
