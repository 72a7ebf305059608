# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The CPU: its name, and the number of cores that this process may use.

python -c "from config.cores import cpu_cores; print(cpu_cores())"
"""

import os
import platform
import re
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


def cpu_name(info: str = "/proc/cpuinfo", numbers: bool = False) -> str:
    """Return the name of the CPU. info: file in which Linux names it.

    numbers: with family and model, which tell CPUs of one name apart.
    """
    with suppress(OSError):
        text = Path(info).read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(.+?)[ \t]*:[ \t]*(.+)$", text, re.MULTILINE))
        names = ("model name", *("cpu family", "model") * numbers)
        if found := [fields[name] for name in names if name in fields]:
            return " ".join(found)
    return platform.processor() or platform.machine()
