# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The curves and the GPU script print every row, and a part that fails stops no other."""

import importlib.util
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import curves, gpu, gpu_parts, step

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOY = (
    "--model convnextv2_atto --input_size 64 --sizes atto femto --size_batches 2 1 --image_sizes "
    "64 96 --batches 1 2 --mask_ratios 0.25 0.5 0.75 --batch_size 2 --rounds 1 --warmup 0 "
    "--device cpu"
)


def run(program: str, words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"benchmarks/{program}", *words.split()]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of toy sizes wait for each other
    return subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, check=False)


def rows(markdown: str, title: str) -> list[str]:
    """First cells of the table under the heading that starts with `title`, without its head."""
    _, _, below = markdown.partition(f"### {title}")
    table = re.search(r"(?:^\|.*\n?)+", below, re.MULTILINE)
    lines = table[0].splitlines() if table else []
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]


def test_line_of_hand_calculated_numbers():
    """Means 2 and 4; b = ((-1)(-3) + 0 + (1)(2)) / 2 = 2.5, a = -1; gaps 0.5, -1, 0.5."""
    a, b, far = curves.fit_line([1, 2, 3], [1, 5, 6])
    assert (a, b) == (pytest.approx(-1), pytest.approx(2.5))
    assert far == 1  # 5 lies 1 above the line, the others 0.5 below


def test_exact_line_leaves_no_gap():
    a, b, _ = curves.fit_line([5, 10, 19, 24], [3.5, 6, 10.5, 13])
    assert (a, b) == (pytest.approx(1), pytest.approx(0.5))


def test_multiplications_of_tiny_are_the_known_ones():
    """4.455 GMAC at 224 px, of which 19 of 49 patches take that share."""
    encoder = curves.shape_of("convnextv2_tiny").encoder
    assert curves.gmac(encoder, 224 * 224) == pytest.approx(4.455, abs=5e-4)
    share = curves.gmac(encoder, 19 * 32 * 32) / curves.gmac(encoder, 224 * 224)
    assert share == pytest.approx(19 / 49)


def test_curves_have_every_row(tmp_path):
    output = tmp_path / "curves.md"
    done = run("curves.py", f"{TOY} --only mask,sizes,image,batch --output {output}")
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert text.strip() == done.stdout.strip()
    assert rows(text, "Model size") == ["atto", "femto"]
    assert rows(text, "Image size") == ["64 px", "96 px"]
    assert rows(text, "Batch size") == ["1", "2"]
    assert rows(text, "Mask ratio") == ["0.25", "0.5", "0.75"]
    assert text.index("### Mask ratio") < text.index("### Model size")  # the order of --only
    assert text.count("ms an image = a + b * visible") == 1
    assert "no memory" not in text
    assert text.count(" | **1.000** | ") == 3  # each curve's own reference


def test_sizes_that_do_not_fit_say_so(monkeypatch):
    """A model takes 16 bytes a parameter; with room for one and a half, they run in turn."""
    args = curves.parse_args([*TOY.split(), "--sizes", "atto", "--size_batches", "1"])
    own = curves.plan(args)["sizes"][0]
    parameters = sum(p.numel() for p in curves.shape_of(own.model).parameters())
    monkeypatch.setattr(curves, "free_bytes", lambda device: 15 * parameters)
    assert curves.measure_size(own).startswith("| atto | 1 | no memory | no memory |  |")
    monkeypatch.setattr(curves, "free_bytes", lambda device: 36 * parameters)
    assert re.match(r"\| atto, one after the other \| 1 \| [\d.]+ \| ", curves.measure_size(own))


def test_point_without_memory_keeps_its_row(monkeypatch):
    real = curves.make_loss

    def make_loss(kind, model, batch, args):
        def loss():
            raise torch.OutOfMemoryError("none left")

        return loss if batch == 2 else real(kind, model, batch, args)

    monkeypatch.setattr(curves, "make_loss", make_loss)
    args = curves.parse_args([*TOY.split(), "--only", "batch"])
    text = curves.report("batch", curves.plan(args)["batch"])
    assert rows(text, "Batch size") == ["1", "2"]
    assert "\n| 2 | 2 | 1 | no memory | " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only mask,size", "--only size: expected some of sizes, image, batch, mask"),
        ("--sizes atto femto --size_batches 4", "--size_batches has 1 numbers for 2 sizes"),
        ("--mask_ratios 0.6", "--mask_ratios: a line needs two different ones at least"),
        ("--rounds 0", "expected integers from 1"),
    ],
)
def test_curves_refuse(words, message, capsys):
    with pytest.raises(SystemExit):
        curves.parse_args(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sizes attos", "unknown size 'attos'. Did you mean 'atto'"),
        ("--image_sizes 224 100", "not a whole number of 32 x 32 patches; try 96 x 96"),
        ("--mask_ratios 0.5 0.99", "leaves 0 of 49 patches visible"),
    ],
)
def test_impossible_points_are_refused_before_anything_is_timed(words, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        curves.main([*words.split(), "--device", "cpu"])


def test_saving_has_a_row_for_each_way_and_leaves_nothing(tmp_path):
    words = "--model convnextv2_atto --input_size 64 --batch_size 1 --steps 1 --rounds 2"
    table = tmp_path / "table.md"
    done = run("saving.py", f"{words} --device cpu --folder {tmp_path} --output {table}")
    assert done.returncode == 0, done.stderr
    assert rows(table.read_text(), "Saving") == ["no save", "written at once", "`--async_save`"]
    assert re.search(r"a save of \d\d+ MiB", table.read_text())
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only tiny,large", "no part large: expected some of environment, gpu_tests"),
        ("--limit larg=3", "no part larg: expected some of"),
        ("--limit tiny", "--limit tiny: expected NAME=SECONDS"),
        ("--device cpu", "add --toy"),
    ],
)
def test_gpu_script_refuses(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_args(words.split())
    assert message in capsys.readouterr().err


def test_dry_run_prints_every_part_and_writes_nothing(tmp_path):
    done = run("gpu.py", f"--dry_run --output {tmp_path / 'gpu'} --minutes 4")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^(\w+): at most \d+ s$", done.stdout, re.MULTILINE)
    assert names == [name for name in gpu.PARTS if name not in gpu.APART]
    assert "tiny: at most 30 s\n" in done.stdout  # half of its share of eight minutes
    assert "--minutes=0.50\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_parts_that_goals_need_fit_into_the_budget():
    names = list(gpu.PARTS)
    needed = names[: names.index("choices") + 1]
    assert {"gpu_tests", "tiny", "tiny_compiled", "base", "base_compiled"} < set(needed)
    assert sum(gpu.PARTS[name][1] for name in needed) == pytest.approx(gpu.BUDGET)


def test_goal_tables_have_ten_rounds_and_two_batch_sizes():
    steps = [words for _, _, words in gpu.PARTS.values() if gpu.STEP in words]
    assert len(steps) == 7
    for words in steps:
        args = step.parse_args([*words.split()[1:], "--device", "cpu"])
        assert args.rounds == 10
        assert len(args.batch_size) == 2


def test_parts_chosen_alone_share_the_whole_time():
    one, two = gpu.plan(gpu.parse_args(["--only", "tiny,base_compiled", "--minutes", "8"]))
    assert one.limit + two.limit == pytest.approx(480)


def test_a_part_that_fits_no_more_is_named_in_the_next_call(tmp_path):
    args = gpu.parse_args(["--output", str(tmp_path)])
    parts = gpu.plan(args)
    for part in parts:
        part.state = "done"
    assert gpu.again(parts, args) == ""
    parts[-1].state, parts[-2].state = "left out: out of time", "stopped: it took more than 9 s"
    assert gpu.again(parts, args).endswith(f" --only {parts[-1].name},{parts[-2].name}`")


def test_reports_of_earlier_calls_are_kept(tmp_path):
    for name in ("report.md", "report2.md", "report3.md"):
        assert gpu.report_path(tmp_path).name == name
        (tmp_path / name).touch()


def test_cifar_without_its_zip_is_left_out_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ZIP", tmp_path / "no.zip")
    (part,) = gpu.plan(gpu.parse_args(["--only", "cifar"]))
    assert part.state == f"left out: there is no {tmp_path / 'no.zip'}"


def test_parts_without_pytest_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    states = {part.name: part.state for part in gpu.plan(gpu.parse_args([]))}
    assert states["gpu_tests"] == states["kernel_tests"] == "left out: pytest is not installed"
    assert states["tiny"] == "not started"


def test_a_budget_that_is_used_up_leaves_parts_out(tmp_path):
    done = run("gpu.py", f"--only tiny,curves --minutes 0 --output {tmp_path}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- tiny: left out: out of time\n- curves: left out: out of time" in text


def test_a_part_that_fails_is_reported_with_the_end_of_its_log(tmp_path):
    part = gpu.Part("broken", "Broken", 60, [sys.executable, "-c", "raise SystemExit('no luck')"])
    gpu.run(part, 60, tmp_path)
    assert part.state == "failed: exit status 1"
    assert "```\nno luck\n```" in gpu.section(part, tmp_path)


def test_what_a_stopped_part_started_ends_with_it(tmp_path):
    child = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    )
    part = gpu.Part("slow", "Slow", 60, [sys.executable, "-c", f"{child}; p.wait()"])
    gpu.run(part, 2, tmp_path)
    assert part.state == "stopped: it took more than 2 s"
    pid = int((tmp_path / "slow.txt").read_text(encoding="utf-8").split()[-1])
    state = Path(f"/proc/{pid}/stat")
    for _ in range(50):  # the kernel takes a moment
        if not state.exists() or " Z " in state.read_text(encoding="utf-8"):
            return
        time.sleep(0.1)
    pytest.fail("it runs on")


def test_a_part_writes_down_what_it_has_at_its_limit(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('so far')); "
        "print('ready', flush=True); time.sleep(60)"
    )
    part = gpu.Part("slow", "Slow", 60, [sys.executable, "-c", code])
    gpu.run(part, 2, tmp_path)
    assert part.state == "stopped: it took more than 2 s"
    assert part.seconds < gpu.GRACE
    assert "ready\nso far" in (tmp_path / "slow.txt").read_text(encoding="utf-8")


def test_rates_are_read_from_log_lines():
    line = "epoch 1/1  step 4/4  loss 0.9  lr 0.0e+00  grad_norm 0.16  images/s 389  data 19%"
    assert gpu_parts.rates(f"{line}\nepoch 1/1 done\n{line}") == [(389, 19)] * 2


def test_whole_gpu_script_in_toy_size(tmp_path):
    """One that is stopped at once, those that would compile, and no two of a kind."""
    again = {"base", "base_torch", *gpu.APART}
    names = [name for name in gpu.PARTS if name not in again]
    limits = "--limit environment=600 tiny_torch=0"  # the first has 12 s, too few beside other work
    words = f"--device cpu --toy {limits} --output {tmp_path} --only {','.join(names)}"
    done = run("gpu.py", words)
    assert done.returncode == 1, done.stderr  # for the stopped one
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    head = text.partition("\n## ")[0]
    states = dict(re.findall(r"^\| (\w+) \| (.*) \| \d+ \|$", head, re.MULTILINE))
    assert list(states) == names, done.stdout
    compiles = "left out: it compiles, which is not for toy size"
    expected = dict.fromkeys(names, "done") | dict.fromkeys(gpu.COMPILE, compiles)
    expected |= {"tiny_torch": "stopped: it took more than 0 s"}
    if not importlib.util.find_spec("triton"):
        expected["kernel_tests"] = "left out: triton is not installed"
    assert states == expected, text
    assert f"- tiny_torch: {expected['tiny_torch']}\n" in text.partition("## Not done")[2]
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    ran = [name for name in names if not states[name].startswith("left out")]
    assert titles == [*(gpu.PARTS[name][0] for name in ran), "Not done"]
    assert text.rstrip().endswith("--minutes 8 --only tiny_torch`")
    assert text.count(f"| {step.VARIANTS['packed']} / {step.VARIANTS['products']} | ") == 1
    assert rows(text, "Mask ratio") == ["0.5", "0.75"]
    assert rows(text, "Model size") == ["atto", "femto"]
    for name in ("packed", "dense"):
        assert len(rows(text, f"{name}, convnextv2_atto")) == gpu_parts.TOP
        assert (tmp_path / f"profile_{name}.txt").stat().st_size > 1000
    assert re.search(
        r"^\| false \| \d+ \| \d+% \| \d+ \|\n\| true \| CUDA only", text, re.MULTILINE
    )
    assert re.search(r"^\| first used in .* torch, ms \| .*\n.*\n\| atto, packed \| ", text, re.M)
    assert re.search(r"^\d+ (passed|skipped)", text, re.MULTILINE)  # pytest's last line


def zip_of_photos(path: Path, count: int = 3) -> Path:
    """Smooth JPEG files of 90 x 60 pixels."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            file, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (3, 4, 3))
            Image.fromarray(noise.astype(np.uint8)).resize((90, 60)).save(file, "JPEG")
            archive.writestr(f"{number}.jpg", file.getvalue())
    return path


def test_loader_has_a_row_for_each_way_to_read(tmp_path):
    photos, table = zip_of_photos(tmp_path / "photos.zip"), tmp_path / "table.md"
    words = "--rounds 1 --images 8 --batch_size 4 --input_size 64 --sets large small"
    done = run("loader.py", f"--photos {photos} {words} --output {table}")
    assert done.returncode == 0, done.stderr
    text = table.read_text(encoding="utf-8")
    assert text.strip() == done.stdout.strip()
    first = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    peers = [["ImageFolder, PIL, torchvision's transforms", "timm's loader"]]
    peers += [["ImageFolder, PIL, timm's transforms", "timm's loader"]]
    for name, fast in (("large", ["ours, folder, --decode fast"]), ("small", [])):
        for task, others in zip(("pretrain", "finetune"), peers, strict=True):
            head, *names = [
                f"{name}, {task}",
                "read and decode only",
                "ours, folder",
                "ours, pack",
                "ours, --ram_cache",
                "ours, folder, as sent to a GPU",
                *fast,
                *others,
            ]
            start = first.index(head)
            assert first[start + 1 : start + 1 + len(names)] == names
    assert text.count(" | 100% |") == 4


def test_threads_and_processes_read_the_same(tmp_path):
    photos = zip_of_photos(tmp_path / "photos.zip")
    words = "--rounds 1 --images 8 --batch_size 4 --workers 1 --input_size 64"
    done = run("loader_threads.py", f"--photos {photos} {words}")
    assert done.returncode == 0, done.stderr
    expected = ["no workers", "1 worker process", "1 thread"]
    assert rows(done.stdout, "Worker processes and threads") == expected


def test_parts_of_an_image_are_those_of_the_transforms(tmp_path):
    photos = zip_of_photos(tmp_path / "photos.zip")
    words = "--rounds 1 --batch_size 4 --input_size 64"
    done = run("loader_parts.py", f"--photos {photos} {words}")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\| (RandomResizedCrop|RandAugment|RandomErasing) \|", done.stdout, re.M)
    assert found == ["RandomResizedCrop", "RandomResizedCrop", "RandAugment", "RandomErasing"]


def test_zip_without_photos_is_refused(tmp_path):
    photos = zip_of_photos(tmp_path / "photos.zip", count=0)
    done = run("loader.py", f"--photos {photos}")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("it holds no JPEG files")
