# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The package that pip installs, used beside other packages named `datasets` and `utils`."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "package"))
import backend

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The package in site/, and modules that hide those of a clone."""
    folder = tmp_path_factory.mktemp("installed")
    how = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *how, "--target", folder / "site", ROOT]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for name in ("datasets", "utils", "models", "config"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    return folder


def run(folder: Path, *words: object) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_modules_are_imported_from_the_package_alone(folder):
    """`import datasets` of another package found ours."""
    code = """
import importlib, pkgutil, sys
import convnextv2_toolkit as package
names = [m.name for m in pkgutil.walk_packages(package.__path__, "convnextv2_toolkit.")]
for name in names:
    if not name.endswith("triton_kernels"):
        importlib.import_module(name)
own = {name.split(".")[1] for name in names}
print(len(names), sorted(own & set(sys.modules)))
"""
    count, found = run(folder, sys.executable, "-c", code).split(maxsplit=1)
    assert found == "[]\n"
    assert int(count) > 60


@pytest.mark.slow
def test_commands_run_the_scripts(folder):
    (package,) = importlib.metadata.distributions(path=[str(folder / "site")])
    names = [entry.name for entry in package.entry_points]
    assert len(names) == 9
    for name in names:
        assert "usage:" in run(folder, folder / "site" / "bin" / name, "--help")
    assert "convnextv2_atto" in run(
        folder, folder / "site" / "bin" / "convnextv2-finetune", "--list_models"
    )
    words = ["--recipe", "digits_pretrain", "--epochs", 1, "--warmup_epochs", 0]
    words += ["--batch_size", 700, "--input_size", 16, "--num_workers", 0, "--picture_freq", 0]
    words += ["--device", "cpu", "--output_dir", "run"]
    said = run(folder, folder / "site" / "bin" / "convnextv2-pretrain", *words)
    finetune = "convnextv2-finetune --finetune run --data_path FOLDER_OF_CLASSES"
    assert f"next: convnextv2-visualize --checkpoint run, or {finetune}\n" in said
    assert (folder / "run" / "checkpoint-0.pth").exists()
    assert "ResizeObserver" in (folder / "run" / "report.html").read_text()  # of insight/report.js


@pytest.mark.slow
def test_job_imports_the_package_by_its_own_name(folder):
    """A job of the installed package must not put its modules' short names into the path."""
    words = ["--recipe", "digits_pretrain", "--device", "cpu", "--cluster", "debug", "--ngpus", 0]
    words += ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 700, "--input_size", 16]
    words += ["--num_workers", 0, "--picture_freq", 0, "--job_dir", "job"]
    run(folder, folder / "site" / "bin" / "convnextv2-submit-pretrain", *words)
    assert (folder / "job" / "checkpoint-0.pth").exists()


def test_import_statements_that_are_rewritten():
    text = (
        "import utils\n"
        "import torch.utils as utils_of_torch  # from utils\n"
        "from datasets import x\n"
        "def late():\n"
        "    from models.kernels import ops  # from models\n"
        "from torch.utils import data\n"
    )
    assert backend.prefix_imports(text, {"utils", "datasets", "models"}) == (
        "from convnextv2_toolkit import utils\n"
        "import torch.utils as utils_of_torch  # from utils\n"
        "from convnextv2_toolkit.datasets import x\n"
        "def late():\n"
        "    from convnextv2_toolkit.models.kernels import ops  # from models\n"
        "from torch.utils import data\n"
    )
