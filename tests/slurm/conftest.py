# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The real SLURM of these tests; only `make test-slurm` starts it."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster

WHY = "a real SLURM changes the machine (packages, /etc/hosts): `make test-slurm`, as root"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start SLURM if TEST_SLURM is 1, else skip; the tests fail if it cannot start."""
    if os.environ.get("TEST_SLURM") != "1":
        pytest.skip(WHY)
    with Cluster() as running:
        yield running
