# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The number of CPU cores that this process may use.

python -c "from config.cores import cpu_cores; print(cpu_cores())"
"""

import os
from contextlib import suppress
from pathlib import Path


def cpu_cores(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return the CPU cores that this process may use; limit: file of a container's, if any."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file; max, which stands for no limit
        quota, period = map(int, Path(limit).read_text().split())
        cores = min(cores, -(-quota // period))
    return cores
