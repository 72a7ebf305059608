# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""README and docs: commands parse, code runs, links and files exist, pages are complete."""

import csv
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine_pretrain
import main_finetune
import main_pretrain
from config import checks, predict_flags, probe_flags, tool_flags, views
from config import parser as options
from data_loading.rng import fold_in
from parallel import submit
from tests.test_layout import product_files
from training.schedules import Curve

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md"]
PAGES += [ROOT / "assets/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORKING, HOOKS = ROOT / "docs/forking.md", ROOT / "docs/hooks.md"
EXPECTED_PAGES = (
    "data pretraining finetuning models checkpoints distributed slurm weights performance "
    "configuration forking hooks troubleshooting from-official from-classy-vision insight predict "
    "probe"
)
README_LINES, WIDTH = 220, 100
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRITTEN = {
    "log.txt",
    "run.json",
    "profile.txt",
    "bad_images.txt",
    "args.yaml",
    "mine.yaml",
}  # by runs, users
OTHER_COMMANDS = {"pip", "tensorboard"}
OTHER_FLAGS = {  # of torchrun, srun, pip, tensorboard, docker and official programs
    "--nproc_per_node", "--max-restarts", "--local-rank", "--nodes", "--ntasks-per-node",
    "--kill-on-bad-exit", "--logdir", "--help",
    "--shm-size",
}  # fmt: skip


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return [content for name, content in FENCE.findall(read(page)) if name == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


# --- commands -------------------------------------------------------------------------------


def command_lines(page: Path) -> list[str]:
    """Commands of shell blocks, indented examples, `$ ` lines and inline code."""
    found = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found += [line[2:] for line in "\n".join(blocks(page, "")).splitlines() if line[:2] == "$ "]
    found += re.findall(r"^    (python .*)$", prose(page), re.MULTILINE)
    inline = re.findall(r"`((?:python|make|pip) [^`]+)`", prose(page))
    return [line for line in found + [" ".join(code.split()) for code in inline] if line.strip()]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of a page; the part after a launcher counts."""
    for line in command_lines(page):
        for words in _split_at(shlex.split(line, comments=True), "&&"):
            if words and words[0] == "torchrun":
                first = next(i for i, word in enumerate(words) if word.endswith(".py"))
                words = ["python", *words[first:]]
            elif words and words[0] == "srun":
                words = words[words.index("python") :]
            if words:
                yield words


def _split_at(words: Sequence[str], mark: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def parse_main(kind: str) -> Callable[[list[str]], Any]:
    return lambda words: options.parse(getattr(options, f"{kind}_parser")(), words)


def parse_job(kind: str) -> Callable[[list[str]], Any]:
    def parse(words: list[str]) -> Any:
        parser = getattr(options, f"{kind}_parser")()
        options.add_submitit_args(parser)
        return submit.read_runs(parser, words)

    return parse


def parse_export(words: list[str]) -> None:
    args = options.export_parser().parse_args(words)
    assert list(checks.export_problems(args)) == []


def parse_pack(words: list[str]) -> None:
    parser = options.pack_parser()
    args = parser.parse_args(words)
    defaults = vars(parser.parse_args([args.source]))
    assert list(tool_flags.pack_problems(args, defaults)) == []


SCRIPTS: dict[str, Callable[[list[str]], Any]] = {
    "main_pretrain.py": parse_main("pretrain"),
    "main_finetune.py": parse_main("finetune"),
    "submitit_pretrain.py": parse_job("pretrain"),
    "submitit_finetune.py": parse_job("finetune"),
    "export.py": parse_export,
    "pack.py": parse_pack,
    "predict.py": predict_flags.parse,
    "probe.py": probe_flags.parse_probe,
    "visualize.py": views.parse_view,
}


def check(words: Sequence[str]) -> None:
    """Fail with SystemExit or AssertionError if a command is not valid."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program != "python":
        assert program in OTHER_COMMANDS, f"unknown program {program}"
    elif rest[0] in SCRIPTS:
        code = 0
        try:
            SCRIPTS[rest[0]](rest[1:])
        except SystemExit as end:  # --help and --recipe list print something and end
            code = end.code
        assert code == 0, shlex.join(words)
    elif rest[0] == "-m":
        importlib.import_module(rest[1]).get_args_parser().parse_args(rest[2:])
    else:
        assert (ROOT / rest[0]).is_file(), f"no such script: {rest[0]}"
        module = importlib.import_module(rest[0].removesuffix(".py").replace("/", "."))
        if hasattr(module, "parse_args"):  # which checks more than the parser
            module.parse_args(rest[1:])
        else:
            module.get_args_parser().parse_args(rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_valid(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # of `--config recipes/...`
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "python main_pretrain.py --modle convnextv2_atto",
        "torchrun --nproc_per_node=8 main_finetune.py --data_path d --recipe no_such_recipe",
        "python submitit_pretrain.py --data_path d --nodse 3",
        "python export.py runs --to onnx --labels names.txt",
        "python pack.py photos",
        "python probe.py map runs --data_path d --k 5",
        "python benchmarks/step.py --no_such_flag",
        "python benchmarks/no_such_file.py",
        "python -m tests.browser report.html",
        "make no_such_target",
        "conda install torch",
    ],
)
def test_wrong_commands_are_found(line, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{line}\n```\n")
    (words,) = commands(page)
    with pytest.raises((SystemExit, AssertionError)):
        check(words)


def test_commands_are_read_from_all_forms(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python a.py\n--x 1` or:\n\n    python b.py   # not c\n\n"
        "```sh\ntorchrun --nproc_per_node=2 d.py \\\n  --y && make test\n```\n"
        "```\n$ python e.py\noutput\n```\n"
    )
    found = [shlex.join(words) for words in commands(page)]
    expected = ["python d.py --y", "make test", "python e.py", "python b.py", "python a.py --x 1"]
    assert found == expected


def test_every_flag_named_in_the_docs_exists():
    parsers = [options.visualize_parser(), options.export_parser(), options.pack_parser()]
    parsers += [views.stats_parser(), views.data_parser(), views.runs_parser()]
    parsers += [views.report_parser(), views.explain_parser()]
    parsers.append(predict_flags.predict_parser())
    parsers += [probe_flags.probe_parser(view) for view in probe_flags.AIMS]
    for kind in ("pretrain", "finetune"):
        parsers.append(getattr(options, f"{kind}_parser")())
        options.add_submitit_args(parsers[-1])
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= OTHER_FLAGS
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        spans = " ".join(re.findall(r"`([^`]+)`", prose(page)))
        spans = re.sub(r"python benchmarks/\S+ .*?(?= python|$)", "", spans)
        flags = {flag.rstrip("_") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", spans)}
        missing = {flag for flag in flags - known if not any(x.startswith(flag) for x in known)}
        assert missing == set(), name_of(page)


# --- links, files, form ---------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'src="([^"]+)"', prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_the_toolkit_that_a_page_names_exist(page):
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|yaml))`", prose(page)):
        places = [ROOT / folder / name for folder in (".", "docs", "benchmarks", "recipes")]
        written = name.rpartition("/")[2] in WRITTEN
        assert written or any(place.is_file() for place in places), f"{name} does not exist"


def test_all_pages_exist_and_readme_links_them():
    for name in EXPECTED_PAGES.split():
        assert f"docs/{name}.md" in read(ROOT / "README.md")
        assert (ROOT / f"docs/{name}.md").is_file()


def test_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "RESULTS.md"], ids=name_of)
def test_lines_are_wrapped(page):
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    links = re.compile(r"^\S*\]\(\S+\)\S*$|`[^`]{60,}`")  # cannot be broken
    assert [line for line in lines if len(line) > WIDTH and not links.search(line)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "RESULTS.md"], ids=name_of)
def test_tables_and_paragraphs_say_nothing_twice(page):
    """Merges of two branches kept both versions of a row."""
    lines = prose(page).splitlines()
    long = [line for line in lines if len(line) > 50]
    tables = re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)
    cells = [re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for table in tables]
    assert repeated_runs(prose(page)) == []
    for texts in (long, *cells):
        assert [text for text, count in Counter(texts).items() if count > 1] == []


def repeated_runs(text: str, length: int = 8) -> list[str]:
    """Runs of as many words that occur twice outside tables, wherever their lines break."""
    words = re.sub(r"^\|.*$", "|", text, flags=re.MULTILINE).split()
    runs = [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
    return [run for run, count in Counter(runs).items() if count > 1 and "|" not in run]


def test_sentences_that_a_merge_repeats_are_found():
    text = "- It writes other heads as `onnx`\n  and `pt2`; the hub refuses them.\n"
    again = "  heads as `onnx` and `pt2`; the hub\n  refuses them all.\n"
    assert repeated_runs(text + "Other words. It writes other heads.") == []
    assert repeated_runs(text + "| heads as `onnx` and `pt2`; the hub refuses |\n" * 2) == []
    assert repeated_runs(text + again) == ["heads as `onnx` and `pt2`; the hub refuses"]


def test_map_of_the_files_is_complete():
    text = read(FORKING).partition("## Map of the files")[2]
    named = set(re.findall(r"`([\w./]+\.py)`", text))
    files = {path.relative_to(ROOT).as_posix() for path in product_files() if path.stat().st_size}
    assert named - {"tests/test_layout.py"} == files


# --- Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.fixture
def fork(tmp_path, monkeypatch) -> Path:
    """A working folder with the files of forking.md and hooks.md in my_fork/, and a few images."""
    for block in [*blocks(FORKING, "python"), *blocks(HOOKS, "python")]:
        name = re.match(r"# (my_fork/\w+\.py)", block)[1]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(block)
    for split, count in (("train", 12), ("val", 4)):
        rows = []
        for number in range(count):
            random = np.random.default_rng(fold_in(len(split), number))
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{split}{number}.png")
            rows.append((f"{split}{number}.png", ("cat", "dog")[number % 2]))
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_fork"]:
        del sys.modules[name]


COMMON = "--data_set my_fork.sets:from_csv --data_path . --batch_size 4 --epochs 1 --print_freq 1"
COMMON += " --input_size 32 --stem_stride 1 --num_workers 0 --device cpu --log_dir none"


def train(main: Any, words: str) -> None:
    main.main(options.parse(main.get_args_parser(), f"{COMMON} {words}".split()))


def test_code_of_the_forking_guide_trains(fork, monkeypatch, capsys):
    objective = importlib.import_module("my_fork.objective")
    monkeypatch.setattr(engine_pretrain, "masked_loss", objective.masked_loss)
    train(
        main_pretrain, "--model my_fork.losses:charbonnier --norm_pix_loss false --output_dir pre"
    )

    learned = "my_fork.losses:Temperature(start=2)+0.1*bce"
    train(
        main_finetune,
        f"--model my_fork.nets:small --finetune pre --output_dir fine --loss {learned} "
        "--hook my_fork.hooks:Hardest(count=2)",
    )
    hardest = (fork / "fine/hardest.txt").read_text().splitlines()
    assert len(set(hardest) & {f"val{index}.png" for index in range(4)}) == 2
    assert "new: norm, head; dropped" in capsys.readouterr().out
    assert (fork / "fine/checkpoint-best.pth").exists()
    saved = torch.load(fork / "fine/checkpoint-0.pth", weights_only=True)
    assert saved["classes"] == ["cat", "dog"]
    assert saved["loss"]["terms.0.loss.log_scale"] != np.log(2)
    train(
        main_finetune, "--model my_fork.nets:plain --data_set my_fork.angles:discs --output_dir d"
    )
    saved = torch.load(fork / "d/checkpoint-best.pth", weights_only=True)
    assert saved["classes"] == ["x", "y"]
    assert saved["target_scale"]["mean"] == pytest.approx([16, 16], abs=4)
    keys = read(ROOT / "docs/checkpoints.md").partition("- Keys: ")[2].partition("\n- ")[0]
    assert {*saved, "loss", "hooks"} <= set(re.findall(r"`(\w+)`", keys))
    metric = "--metrics acc1 my_fork.metrics:cost(miss=5) --best_metric cost_5"
    train(main_finetune, f"--model my_fork.nets:plain --output_dir plain {metric}")
    saved = torch.load(fork / "plain/checkpoint-best.pth", weights_only=True)["state"]
    assert (saved["best_metric"], saved["lower_is_better"]) == ("cost_5", True)
    assert saved["best"]["best"] == saved["stats"]["test_cost_5"]


def test_losses_of_the_forking_guide(fork):
    losses = importlib.import_module("my_fork.losses")
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    assert losses.focal(logits, labels).item() == pytest.approx(0.25 * np.log(2))
    model = losses.charbonnier(3, 1, 0.0, mask_ratio=0.5)
    loss, pred, mask = model(torch.zeros(2, 3, 16, 16))
    removed = pred.flatten(2).mT[mask > 0]
    expected = (removed.square() + 1e-6).sqrt().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_schedule_of_the_forking_guide(fork):
    curve = Curve("my_fork.schedules:triangles(2)", "--sched", 10)
    assert [curve(w) for w in (0, 0.125, 0.25, 0.5)] == pytest.approx([0.1, 0.55, 1, 0.1])


def test_library_example_runs(fork, capsys):
    found = runpy.run_path("my_fork/library.py")
    assert found["features"].shape == (2, 320, 2, 2)
    assert found["mask"].sum(1).tolist() == [2, 2]
    assert "fcmae_convnextv2_huge" in capsys.readouterr().out
