# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Who imports whom, and how long files and functions are.  pytest tests/test_layout.py

A file that is too long or imports upwards fails here. Raise a limit only with a reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {  # lines at most
    "main_pretrain.py": 150,
    "main_finetune.py": 200,
    "hubconf.py": 120,  # torch.hub looks for this very name
    "submitit_pretrain.py": 40,
    "submitit_finetune.py": 40,
    "predict.py": 200,
    "export.py": 200,
    "visualize.py": 200,
    "options.py": 330,
    "flags.py": 380,  # a line a flag
    "configs.py": 200,  # files of flags: what options would outgrow its limit by
    "datasets.py": 400,
    "data_pipeline.py": 400,
    "file_index.py": 300,  # which files there are, in a format of its own: memory at any number
    "decoding.py": 180,  # out of data_pipeline: what people see in a file, whatever its kind
    "data_faults.py": 350,  # images without use, machines that fail, processes that die: who did
    "archives.py": 260,  # tar, zip and pickles from outside, numpy's types: one place to keep safe
    "batches.py": 100,  # the device's half of what data_pipeline was: streams and normalising
    "optim_factory.py": 350,
    "utils.py": 400,
    "checkpoint.py": 400,
    "sharding.py": 360,  # DDP, ZeRO and FSDP, and whole weights for who works alone
    "whole_states.py": 130,  # what a file holds is whole, whoever had what
    "resume.py": 250,  # what a run goes on from: out of checkpoint (files) and utils (processes)
    "sources.py": 150,  # the hub, timm's weights, addresses: where a checkpoint is not a file yet
    "errors.py": 100,
    "randomness.py": 130,  # out of utils, which holds processes and runs; orders without lists
    "keeper.py": 360,  # when a run is saved and stopped: signals, clocks, agreement of ranks
    "guard.py": 270,  # updates that went wrong: what they held, and the way back
    "lock.py": 300,  # one run in a folder, whoever dies, stands still or has the same name
    "formats.py": 300,  # export.py says what goes where; this knows how files are written and read
    "hf_folder.py": 200,  # a format of four files, with labels, preprocessing and a card
    "stepper.py": 230,  # one update, and what became of it
    "graphs.py": 100,  # CUDA graphs: one row of trouble that nothing else needs to know
    "meters.py": 250,
    "losses.py": 200,
    "hooks.py": 400,  # with what kills and outages do to TensorBoard's files
    "dry_run.py": 400,  # --dry_run: asks every part of a run, so it belongs to none of them
    "trial.py": 300,  # what it measures with: the engine on chosen batches, memory, sizes
    "trial_data.py": 200,  # out of trial: the images and loaders, which know no engine
    "engine_pretrain.py": 100,
    "engine_finetune.py": 180,
    "ranks.py": 160,  # out of utils: processes that end together, whatever one of them does
    "alike.py": 100,  # above utils: asks all ranks whether they were started alike
    "launchers.py": 100,  # out of utils: what launchers say in the environment
    "slurm.py": 250,  # a job, from the inside and from the outside
    "submission.py": 350,  # flags of submitit_*.py to jobs: what slurm would outgrow its limit by
    "models/__init__.py": 120,
    "models/layers.py": 250,
    "models/sparse.py": 150,
    "models/tune.py": 300,  # which of several equal computations runs
    "models/kernels.py": 400,
    "models/ops.py": 200,  # products in several equal forms; what own backward passes share
    "models/mlp.py": 300,  # the block's MLP in one piece
    "models/depthwise.py": 300,  # the convolution that knows where patches lie, in several forms
    "models/block.py": 100,  # with what backward keeps of it: convnextv2 would outgrow its limit
    "models/features.py": 80,  # what detection heads ask of a network, whichever it is
    "models/convnextv2.py": 200,
    "models/fcmae.py": 250,
    "models/backbones.py": 250,
    "models/heads.py": 250,
    "models/convert.py": 300,
    "models/pretrained.py": 160,  # convert knows names; this one reads files and fills models
}
FUNCTION_LINES = 50

# module -> what of ours it may import
L0 = {"errors", "randomness", "sources", "sharding", "whole_states", "checkpoint", "launchers"}
L0 |= {"ranks", "utils"}
FLAGS = {"flags", "configs", "options"}
NETWORKS = {"models.convnextv2", "models.backbones", "models.heads"}
BELOW_LAYERS = L0 | {"models.tune", "models.kernels", "models.ops"}
BELOW_NETWORKS = BELOW_LAYERS | {"models.layers", "models.mlp", "models.sparse", "models.depthwise"}
BELOW_NETWORKS |= {"models.block", "models.features"}
MODELS = (
    BELOW_NETWORKS | NETWORKS | {"models.fcmae", "models.convert", "models.pretrained", "models"}
)
L1 = {"losses", "meters", "resume", "stepper", "graphs", "optim_factory", "keeper", "lock", "guard"}
L1 |= {"alike"}
DATA = {"decoding", "data_faults", "archives", "data_pipeline", "batches", "file_index"}
L1 |= DATA | {"datasets"}
FORMATS = {"formats", "hf_folder"}
SCRIPTS = {"visualize", "export", "predict"}
BELOW_ENGINES = L0 | MODELS | L1 | SCRIPTS | {"hooks"}
MAINS = {"main_pretrain", "main_finetune"}
ALLOWED = {
    "errors": set(),
    "randomness": {"errors"},
    "sources": {"errors"},
    "sharding": {"errors"},
    "whole_states": {"sharding"},
    "checkpoint": {"errors", "sharding", "whole_states", "sources"},
    "launchers": {"errors"},
    "ranks": set(),
    "utils": {"errors", "sharding", "whole_states", "checkpoint", "launchers", "ranks"},
    "flags": set(),
    "configs": {"flags"},
    "options": {"flags", "configs"},
    "slurm": {"errors", "launchers", "ranks", "utils"},
    "submission": {"errors", "configs", "options", "slurm"},
    "models.tune": L0 | {"flags"},
    "models.kernels": set(),
    "models.ops": {"models.tune"},
    "models.layers": BELOW_LAYERS,
    "models.sparse": {"errors"},
    "models.features": {"errors"},
    "models.depthwise": BELOW_LAYERS | {"models.layers", "models.sparse"},
    "models.mlp": BELOW_LAYERS | {"models.layers"},
    "models.block": BELOW_NETWORKS - {"models.block", "models.features"},
    **dict.fromkeys(NETWORKS, BELOW_NETWORKS),
    "models.fcmae": BELOW_NETWORKS | NETWORKS,
    "models.convert": {"errors"},
    "models.pretrained": L0 | {"flags", "models.convert"},
    "models": BELOW_NETWORKS | NETWORKS | {"models.fcmae"},
    **dict.fromkeys(L1, L0),  # so optim_factory asks the model, and imports none
    "data_pipeline": L0 | {"decoding", "data_faults"},
    "datasets": L0 | DATA,
    "file_index": L0 | {"decoding", "data_faults"},
    "graphs": L0 | {"stepper"},
    "keeper": L0 | {"lock"},  # a run that lost its folder saves no more
    "guard": L0 | {"stepper", "keeper"},
    "formats": L0 | MODELS,
    "hf_folder": L0 | MODELS | {"data_pipeline", "formats"},
    **dict.fromkeys(SCRIPTS, L0 | MODELS | L1 | FLAGS | FORMATS),
    "hooks": L0 | MODELS | L1 | {"visualize", "options"},
    "trial": L0 | MODELS | L1 | {"hooks"},  # an engine's epoch is handed to it by a main
    "trial_data": L0 | DATA,
    "dry_run": L0 | MODELS | L1 | {"hooks", "trial", "trial_data"},
    "engine_pretrain": BELOW_ENGINES,
    "engine_finetune": BELOW_ENGINES,
    "hubconf": {"checkpoint", "flags", "models", "models.convert", "models.pretrained"},
    "main_pretrain": BELOW_ENGINES | FLAGS | {"engine_pretrain", "dry_run"},
    "main_finetune": BELOW_ENGINES | FLAGS | {"engine_finetune", "dry_run"},
    "submitit_pretrain": {"options", "slurm", "submission"},
    "submitit_finetune": {"options", "slurm", "submission"},
}


def sources() -> list[Path]:
    """The toolkit's own files: scripts, modules, models."""
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """models/__init__.py -> models, models/layers.py -> models.layers"""
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(text: str, package: str = "") -> set[str]:
    """Every module that a source imports, inside functions and by importlib with a plain name too.

    `from a import b` gives a.b and a: which of them is a module, the caller knows.
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            if called in ("import_module", "__import__"):
                found.add(node.args[0].value)
    return found


def imports_of_ours(path: Path) -> set[str]:
    """Modules of this toolkit that a file imports; `models` only where the package is meant."""
    text = path.read_text(encoding="utf-8")
    package = "models" if path.parent.name == "models" else ""
    found = imported(text, package) & ALLOWED.keys()
    if "models" in found and not uses_package(text):
        found.discard("models")
    return found - {module_of(path)}


def uses_package(text: str) -> bool:
    """Whether a source takes something from models/__init__.py and not only modules beside it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name == "models" for alias in node.names):
            return True
        from_package = isinstance(node, ast.ImportFrom) and node.module == "models"
        if from_package and any(f"models.{alias.name}" not in ALLOWED for alias in node.names):
            return True
    return False


def functions(text: str) -> list[tuple[str, int]]:
    """(name, lines from `def` to its end) of every function and method."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]


def test_checks_see_what_they_look_for():
    text = (
        "import a.b, c\nfrom d import e\n\ndef f():\n    from .g import h\n"
        "    importlib.import_module('i')\n    importlib.import_module(name)\n    __import__('j')\n"
    )
    expected = {"a.b", "c", "d", "d.e", "pack.g", "pack.g.h", "i", "j"}
    assert imported(text, "pack") == expected
    assert functions(text) == [("f", 5)]
    assert uses_package("def f():\n    from models import create_model")
    assert uses_package("import models")
    assert not uses_package("from models import convnextv2\nfrom models.fcmae import FCMAE")


def test_files_that_are_there_import_something():
    """An empty result would pass every check below."""
    assert {"utils", "stepper", "hooks"} <= imports_of_ours(ROOT / "engine_finetune.py")
    assert imports_of_ours(ROOT / "models" / "fcmae.py") >= {"models.convnextv2", "models.sparse"}
    assert "models" in imports_of_ours(ROOT / "main_finetune.py")
    assert imports_of_ours(ROOT / "models" / "convert.py") == {"errors"}


def test_new_file_needs_a_reason():
    extra = {name_of(path) for path in sources()} - LIMITS.keys()
    assert not extra, f"{extra}: a new top-level file needs a reason: add it here"


def test_every_file_has_a_layer():
    modules = {name.removesuffix(".py").replace("/", ".") for name in LIMITS}
    assert {name.removesuffix(".__init__") for name in modules} == ALLOWED.keys()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_file_imports_only_from_lower_layers(path):
    upwards = imports_of_ours(path) - ALLOWED.get(module_of(path), set())
    assert not upwards, f"{name_of(path)} imports {upwards}, which it may not"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LIMITS.get(name_of(path), 0), f"{name_of(path)} has {lines} lines"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_functions_are_short(path):
    """Engines and mains are read from top to bottom, so they may be longer."""
    if path.name.startswith(("engine_", "main_")):
        return
    text = path.read_text(encoding="utf-8")
    long = [pair for pair in functions(text) if pair[1] > FUNCTION_LINES]
    assert not long, f"{name_of(path)}: {long}, expected {FUNCTION_LINES} lines at most"


def all_python() -> list[Path]:
    folders = ("tests", "benchmarks")
    return sources() + sorted(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))


@pytest.mark.parametrize("path", all_python(), ids=name_of)
def test_file_says_whose_and_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        "# Copyright (c) the ConvNeXt V2 toolkit authors.\n"
        "# Licensed under the MIT License; see LICENSE.\n"
    )
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_docstring_names_a_command_that_shows_the_file(path):
    first, *rest = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
    assert first.endswith(".")
    assert any(line.split(" ")[0] in ("python", "torchrun") for line in rest)
