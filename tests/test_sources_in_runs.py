# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Whole runs on every kind of source: the same weights, and the commands of docs/data.md."""

import io
import json
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.sources import FORMS
from tests.groups import TIME_LIMIT_S, exit_codes, run_script, start_script
from tests.test_docs import FENCE, ROOT

pytestmark = pytest.mark.slow

SMALL = (
    "--input_size 16 --stem_stride 1 --batch_size 4 --epochs 1 --warmup_epochs 0 --device cpu "
    "--kernels torch --log_dir none --update_freq 1"
)
SECTIONS = ("Sources", "Tables", "Tasks", "Packing", "Images in memory")  # of docs/data.md
MODELS = {
    "main_pretrain.py": "--model tests.tiny:fcmae --decoder_embed_dim 8 --picture_freq 0",
    "main_finetune.py": "--model tests.tiny:classifier --val_split 0.2 --aa rand-m9-mstd0.5-inc1 "
    "--mixup 0.5 --reprob 0.5",
}


def write_photos(root: Path, classes: str = "abc", count: int = 8, suffix: str = ".jpg") -> Path:
    noise = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 256, (24, 20 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}{suffix}")
    return root


def weights_after(script: str, path: Path, folder: Path, ranks: int, workers: int) -> dict:
    folder.mkdir()
    words = f"{MODELS[script]} {SMALL} --num_workers {workers} --output_dir {folder}/run".split()
    words += ["--data_path", path]
    if path.suffix == ".csv":
        words += ["--image_root", path.parent / "photos"]
    run_script(script, *words, ranks=ranks, folder=folder)
    return torch.load(folder / "run" / "checkpoint-0.pth", weights_only=True)["model"]


@pytest.mark.parametrize("script", MODELS)
def test_weights_do_not_depend_on_what_holds_the_images(script, tmp_path):
    """Order, labels, held-out images, augmentation and masks must be the same, bit for bit."""
    pytest.importorskip("pyarrow")
    root = write_photos(tmp_path / "photos")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    found = {}
    for number, (form, write) in enumerate(FORMS.items()):
        path = write(root, names, tmp_path)
        for ranks, workers in ((1, 2 * (number % 2)), (2, 0)):
            folder = tmp_path / f"{number}-{ranks}"
            found[form, ranks] = weights_after(script, path, folder, ranks, workers)
    for (form, ranks), weights in found.items():
        for name, expected in found["class folders", ranks].items():
            assert torch.equal(weights[name], expected), (form, ranks, name)


def commands_of_sources() -> list[str]:
    """Training commands of the sections of docs/data.md that teach a source."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    commands = []
    for section in SECTIONS:
        content = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        blocks = [block for language, block in FENCE.findall(content) if language == "sh"]
        lines = "".join(blocks).replace("\\\n", "").splitlines()
        found = [line for line in lines if not line.startswith("python pack.py")]
        assert found, section
        commands += found  # test_pack.py runs those of pack.py
    return commands


def write_archives(root: Path, names: list[str], folder: Path) -> None:
    """Write a zip file, tar files, a WebDataset, Parquet, Arrow and a pack of the same images."""
    import pyarrow
    from pyarrow import ipc, parquet

    FORMS["zip file"](root, names, folder)
    shards = FORMS["3 tar files"](root, names, folder)
    (folder / "web").mkdir()
    for number in range(2):
        (shards / f"{number:06d}.tar").rename(shards / f"photos-{number:04d}.tar")
        with tarfile.open(folder / "web" / f"{number:04d}.tar", "w") as file:
            for name in names[number::2]:
                file.add(root / name, name)
                label = json.dumps({"animal": name[0], "id": 1}).encode()
                member = tarfile.TarInfo(name.replace(".jpg", ".json"))
                member.size = len(label)
                file.addfile(member, io.BytesIO(label))
    (folder / "hub" / "data").mkdir(parents=True)
    (folder / "saved").mkdir()
    images = FORMS["Parquet file"](root, names, folder)
    images = images.rename(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    table, saved = parquet.read_table(images), "data-00000-of-00001.arrow"
    with (
        pyarrow.OSFile(str(folder / "saved" / saved), "wb") as file,
        ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": saved}]}))
    shutil.copytree(FORMS["pack"](root, names, folder), folder / "small")


@pytest.fixture(scope="module")
def documented_data(tmp_path_factory):
    """A folder with what the commands of docs/data.md read."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("docs")
    root = write_photos(folder / "photos")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    write_archives(root, names, folder)
    shutil.copytree(root / "a", folder / "flat")
    write_photos(folder / "table", "a", 8)
    rows = ["image,label,width,height,tags,weight,split"]
    for n in range(8):
        part = "val" if n > 5 else "train"
        rows.append(f"a/{n}.jpg,{'xy'[n % 2]},{n},{n + 1},{'x|y' if n % 3 else 'y'},{n},{part}")
    (folder / "table" / "photos.csv").write_text("\n".join(rows))
    food = folder / "food" / "food-101"  # as torchvision unpacks it
    write_photos(food / "images", ["apple_pie", "waffles"], 4)
    (food / "meta").mkdir()
    for part, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        listed = {name: [f"{name}/{n}" for n in numbers] for name in ("apple_pie", "waffles")}
        (food / "meta" / f"{part}.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize("command", commands_of_sources())
def test_documented_commands_run(command, documented_data, tmp_path):
    _, script, *words = shlex.split(command, comments=True)
    pretrains = script == "main_pretrain.py"
    model = "tests.tiny:fcmae" if pretrains else "tests.tiny:classifier"
    words = [model if word == "convnextv2_atto" else word for word in words if word != "--dry_run"]
    words += shlex.split("--decoder_embed_dim 8 --picture_freq 0" if pretrains else "--aa none")
    words += shlex.split(f"{SMALL} --num_workers 0 --output_dir {tmp_path}")
    output = tmp_path / "output.txt"
    processes = start_script(script, words, [(output, output)], cwd=documented_data)
    assert exit_codes(processes, TIME_LIMIT_S) == [0], output.read_text()
    assert (tmp_path / "checkpoint-0.pth").exists()
