# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Run pytest on two processes; tests that fail only beside others are reported as FLAKY.

python tests/run.py -m "not slow"

Words are handed to pytest: `-n 0` runs one test after the other.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MAX_RERUNS = 20  # more failures than this have a common cause: they are not run again
SOME_FAILED, NO_TESTS = 1, 5  # exit codes of pytest; the second if nothing was selected


def pytest(*words: str, report: Path) -> int:
    """Run pytest with a JUnit report; returns its exit code."""
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *words]
    return subprocess.run(command, check=False).returncode


def failed_tests(report: Path) -> list[str]:
    """Node ids of the tests that failed or had an error, from a JUnit report."""
    cases = ElementTree.parse(report).iter("testcase")
    failed = [case for case in cases if any(part.tag in ("failure", "error") for part in case)]
    return list(dict.fromkeys(node_id(case.get("classname"), case.get("name")) for case in failed))


def node_id(classname: str, name: str) -> str:
    """`tests.models.test_fcmae` and `test_mask[3]` -> `tests/models/test_fcmae.py::test_mask[3]`

    A module that cannot be imported has no class name, and its own name is the test's.
    """
    if not classname:
        return f"{name.replace('.', '/')}.py"
    return f"{classname.replace('.', '/')}.py::{name}"


def main(words: list[str]) -> int:
    """Run the selected tests, then the failed ones again, each alone."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-n", "2", "--dist", "loadscope", "--durations=25"]
        code = pytest(*options, *words, report=report)
        if code != SOME_FAILED:  # others mean that tests were not run
            return 0 if code == NO_TESTS else code
        failed = failed_tests(report)
        if not failed or len(failed) > MAX_RERUNS:
            return code
        print(f"{len(failed)} failed; running each again, alone", flush=True)
        again = {test: pytest(test, "-p", "no:xdist", report=report) for test in failed}
    flaky = [f"FLAKY {test}: failed beside other tests, passed alone" for test in again]
    flaky = [line for line, code in zip(flaky, again.values(), strict=True) if code == 0]
    print(*flaky, sep="\n")
    if "FLAKY_FILE" in os.environ:  # .ci/run prints it at its end
        with open(os.environ["FLAKY_FILE"], "a") as file:
            file.writelines(f"{line}\n" for line in flaky)
    broken = [test for test, code in again.items() if code]
    for test in broken:
        print(f"FAILED {test}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
