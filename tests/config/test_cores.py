# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Name of the CPU in run.json and in the name of the file of chosen kernels."""

import platform

from config.cores import cpu_name

INTEL = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) 8480
power management:

processor\t: 1
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) 8480
"""


def test_name_of_the_cpu(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(INTEL)
    assert cpu_name(str(info)) == "Intel(R) Xeon(R) 8480"
    assert cpu_name(str(info), numbers=True) == "Intel(R) Xeon(R) 8480 6 143"


def test_a_file_without_a_name_gives_the_architecture(tmp_path):
    """Of ARM, Linux names no model; the name was empty, and equal on all machines."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nCPU part\t: 0xd4f\n")
    expected = platform.processor() or platform.machine()
    assert cpu_name(str(info)) == cpu_name(str(tmp_path / "none"), numbers=True) == expected
    assert expected
