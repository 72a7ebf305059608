# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The test runner: failures are failures, and tests that pass alone are reported as FLAKY."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parent / "run.py"
FAILS_ONCE = """
from pathlib import Path
def test_once():
    seen = Path("seen")
    first = not seen.exists()
    seen.touch()
    assert not first
def test_fine():
    pass
"""


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (FAILS_ONCE, 0, "FLAKY tests/test_it.py::test_once: failed beside other tests"),
        ("def test_bad():\n    assert False", 1, "FAILED tests/test_it.py::test_bad"),
    ],
)
def test_failures_are_run_again_alone(tmp_path, text, code, expected):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    notes = tmp_path / "notes"
    done = subprocess.run(
        [sys.executable, RUNNER, "-n", "0", "-q"],
        cwd=tmp_path, env={**os.environ, "FLAKY_FILE": str(notes)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert expected in done.stdout.splitlines()[-1]
    assert (expected in notes.read_text()) == (code == 0)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_module_that_cannot_be_imported_is_a_failure(tmp_path, processes):
    """Its tests did not run, so that nothing else may turn the result into a success."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("import no_such_module\n")
    (tmp_path / "tests" / "test_other.py").write_text("def test_fine():\n    pass\n")
    command = [sys.executable, RUNNER, "-n", processes, "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if processes == "0" else 1)
    assert processes == "0" or "FAILED tests/test_it.py" in done.stdout.splitlines()[-1]
