# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The layout: which package may import which, and how long files and functions may be.

The order is that of docs/forking.md. A new file needs no line here, a new package does.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL_FILES, FILE_LINES, FUNCTION_LINES, PARAMETERS = 16, 500, 50, 8

# Every layer imports only from the layers above its line.
LAYERS = (
    "errors",
    "config",
    "parallel",
    "utils",
    "data_loading",
    "models",
    "optim_factory",
    "weights",
    "datasets",
    "insight",
    "training",
    "engine_pretrain engine_finetune",
    "visualize export predict probe pack hubconf",
    "main_pretrain main_finetune",
    "submitit_pretrain submitit_finetune",
)
# The same within models: kernels know nothing of the networks.
MODEL_LAYERS = (
    "models.kernels",
    "models.layers models.sparse models.arguments models.parts",
    "models.convnextv2 models.backbones models.heads models.anynet models.classic models.resnext3d",
    "models.masked models.fcmae models.attach models.sweep",
    "models",
)
SUBMITIT = {"config", "parallel"}  # submitit_* name a main and do not import it
LATE = {("utils", "training.checkpoint"), ("utils", "training.resume")}  # names that forks know
LONG = {"main_pretrain.main", "main_finetune.main"}  # and the engines
ENGINES = {"engine_pretrain", "engine_finetune"}
# May have more parameters: public models, and Triton kernels, which take sizes and strides.
PUBLIC = ("ConvNeXtV2", "FCMAE", "AnyNet", "ResNet", "DenseNet", "MLP")
EXEMPT = {f"{name}.__init__" for name in PUBLIC}


def product_files() -> list[Path]:
    """Every Python file of the toolkit itself."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    return sorted([*ROOT.glob("*.py"), *(f for folder in packages for f in folder.rglob("*.py"))])


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in product_files()}


@cache
def imported(path: Path) -> set[str]:
    """The toolkit's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[:-1])
            base = ".".join(filter(None, [package * bool(node.level), node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {module_of(path)}


def rank(module: str, layers: tuple[str, ...]) -> int:
    """The layer that a module belongs to."""
    for number, names in enumerate(layers):
        if any(module == name or module.startswith(f"{name}.") for name in names.split()):
            return number
    raise AssertionError(f"{module} has no layer; add its package to LAYERS")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upwards(module):
    wrong = []
    for other in imported(MODULES[module]):
        if (module, other) in LATE:
            continue
        ours, theirs = rank(module, LAYERS), rank(other, LAYERS)
        same_package = module.split(".")[0] == other.split(".")[0]
        if module.startswith("submitit_"):
            allowed = other.split(".")[0] in SUBMITIT
        elif module.startswith("models") and other.startswith("models"):
            ours, theirs = rank(module, MODEL_LAYERS), rank(other, MODEL_LAYERS)
            allowed = (
                theirs < ours or ours == theirs == 0 or (ours == theirs and module != "models")
            )
        else:
            allowed = theirs < ours or same_package
        wrong += [] if allowed else [other]
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_no_import_cycles(module):
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        for other in imported(MODULES[current]):
            if (current, other) not in LATE and other not in seen:
                seen.add(other)
                waiting.append(other)
    assert module not in seen


def test_top_level_stays_small():
    assert len(list(ROOT.glob("*.py"))) <= TOP_LEVEL_FILES


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES
    long = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            allowed = module in ENGINES or f"{module}.{node.name}" in LONG
            long += [f"{node.name}: {lines}"] if lines > FUNCTION_LINES and not allowed else []
    assert long == []


def all_files() -> list[Path]:
    others = [path for folder in ("tests", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")]
    return sorted([*product_files(), *others])


@pytest.mark.parametrize("path", all_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_begin_with_license_and_docstring(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text:
        return
    assert text.startswith("# Copyright (c) the ConvNeXt V2 toolkit authors.\n# Licensed under")
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"models.kernels.triton_kernels"}))
def test_functions_have_at_most_8_parameters(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    owner = {id(child): node.name for node in classes for child in node.body}
    many = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            words = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(word.arg not in ("self", "cls", "ctx") for word in words)
            name = f"{owner[id(node)]}.{node.name}" if id(node) in owner else node.name
            many += [f"{name}: {count}"] if count > PARAMETERS and name not in EXEMPT else []
    assert many == []
