# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Build backend of `pip install .`: put the flat files into one package, convnextv2_toolkit.

python -m pip install .

The modules here have short names (datasets, utils, models, ...), which would hide those of other
packages. So the package gets copies in which `from models import fcmae` reads
`from convnextv2_toolkit.models import fcmae`; nothing else in them changes.
"""

import ast
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[1]
NAME = "convnextv2_toolkit"
OWN = {"package", "hubconf.py"}  # for installation and for torch.hub
DATA = ("recipes", "assets")  # files that the code reads
PAGES = ("insight/report.css", "insight/report.js")
METADATA = ("README.md", "LICENSE", "requirements.txt")


def module_files() -> list[Path]:
    """List the Python files of the toolkit: those at the top, and those in its packages."""
    packages = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
    packages = [folder for folder in packages if folder.name not in ("tests", "benchmarks")]
    top = [path for path in sorted(ROOT.glob("*.py")) if path.name not in OWN]
    return [*top, *(path for folder in packages for path in sorted(folder.rglob("*.py")))]


def prefix_imports(text: str, modules: set[str]) -> str:
    """Return Python source whose imports of `modules` come from the package instead."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        number = getattr(node, "lineno", 0) - 1
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in modules:
            lines[number] = lines[number].replace("from ", f"from {NAME}.", 1)
        elif isinstance(node, ast.Import) and node.names[0].name in modules:
            lines[number] = lines[number].replace("import ", f"from {NAME} import ", 1)
    return "".join(lines)


def write_tree(folder: Path) -> None:
    """Write the project that is built: the package, its metadata and a pyproject.toml."""
    files = [path.relative_to(ROOT) for path in module_files()]
    modules = {path.parts[0].removesuffix(".py") for path in files}
    package = folder / NAME
    shutil.copytree(ROOT / "package" / NAME, package)
    for path in files:
        target = package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(prefix_imports((ROOT / path).read_text("utf-8"), modules), "utf-8")
    for name in DATA:
        shutil.copytree(ROOT / name, package / name)
    for name in PAGES:
        shutil.copy(ROOT / name, package / name)
    for name in METADATA:
        shutil.copy(ROOT / name, folder / name)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    own, line = 'build-backend = "backend"\nbackend-path = ["package"]\n', "setuptools.build_meta"
    if own not in project:
        raise RuntimeError(f"pyproject.toml does not name this backend, expected {own!r}")
    project = project.replace(own, f'build-backend = "{line}"\n')
    (folder / "pyproject.toml").write_text(project, "utf-8")


@contextmanager
def built_tree() -> Iterator[None]:
    """Write the project to a temporary folder, and work there."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        write_tree(Path(name))
        os.chdir(name)
        try:
            yield
        finally:
            os.chdir(before)


def _in_tree(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(directory: str | None = None, *arguments: Any) -> Any:
        folder = directory and os.path.abspath(directory)
        with built_tree():
            return hook(*([folder] if folder else []), *arguments)

    return call


# The hooks of PEP 517 that pip calls.
get_requires_for_build_wheel = get_requires_for_build_sdist = lambda settings=None: []
prepare_metadata_for_build_wheel = _in_tree(build_meta.prepare_metadata_for_build_wheel)
build_wheel = _in_tree(build_meta.build_wheel)
build_sdist = _in_tree(build_meta.build_sdist)
