# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Train on the same images from every kind of source, and compare the weights bit for bit.

python benchmarks/sources.py --data cifar10_jpeg.zip --images 2000 --output benchmarks/RESULTS.md
"""

import argparse
import csv
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

SCRIPTS = {  # one epoch, with everything that draws random numbers
    "main_pretrain.py": "--decoder_embed_dim 32 --picture_freq 0",
    "main_finetune.py": "--val_split 0.1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8",
}
COMMON = (
    "--model convnextv2_atto --input_size 32 --stem_stride 2 --batch_size 20 --update_freq 1 "
    "--drop_path 0.1 --epochs 1 --warmup_epochs 0 --device cpu --kernels torch --log_dir none "
    "--progress lines --print_freq 1000"
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="zip file of class folders")
    parser.add_argument("--images", type=int, default=2000, help="number of images to use")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


def unpack(data: Path, count: int, root: Path) -> list[str]:
    """Write evenly chosen images of the folder train/ of a zip file; returns their names."""
    with zipfile.ZipFile(data) as file:
        found = sorted(n for n in file.namelist() if "train/" in n and not n.endswith("/"))
        for name in (found[i * len(found) // count] for i in range(count)):
            path = root / name.partition("train/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read(name))
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))


def as_folder(root: Path, names: Sequence[str], to: Path) -> Path:
    return root


def as_table(root: Path, names: Sequence[str], to: Path) -> Path:
    path = to / "photos.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = [(name, name.partition("/")[0]) for name in reversed(names)]
        csv.writer(file).writerows([("image", "label"), *rows])
    return path


def as_zip(root: Path, names: Sequence[str], to: Path) -> Path:
    path = to / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in reversed(names):
            file.write(root / name, name)
    return path


def as_shards(root: Path, names: Sequence[str], to: Path) -> Path:
    """Write three tar files; the images of each class are in all of them."""
    folder = to / "shards"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as file:
            for name in names[number::3]:
                file.add(root / name, name)
    return folder


def as_parquet(root: Path, names: Sequence[str], to: Path) -> Path:
    """Write a Parquet file with a struct of bytes and path, as Hugging Face does."""
    import pyarrow
    from pyarrow import parquet

    path = to / "photos.parquet"
    images = [{"bytes": (root / name).read_bytes(), "path": name} for name in reversed(names)]
    labels = [name.partition("/")[0] for name in reversed(names)]
    table = pyarrow.table({"image": images, "label": labels})
    parquet.write_table(table, path, row_group_size=max(1, len(names) // 4))
    return path


def as_pack(root: Path, names: Sequence[str], to: Path) -> Path:
    """Run pack.py, with several shards."""
    words = [root, to / "packed", "--shard_size", len(names) // 3 + 1, "--num_workers", 2]
    command = [sys.executable, str(ROOT / "pack.py"), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return to / "packed"


FORMS: dict[str, Callable[[Path, Sequence[str], Path], Path]] = {
    "class folders": as_folder,
    "CSV table": as_table,
    "zip file": as_zip,
    "3 tar files": as_shards,
    "Parquet file": as_parquet,
    "pack": as_pack,
}


def train(script: str, path: Path, output: Path, workers: int, processes: int, more: str) -> str:
    """Train for one epoch; returns the SHA-256 of the weights."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [*launcher[: 4 if processes > 1 else 0], str(ROOT / script)]
    words += [*SCRIPTS[script].split(), *COMMON.split(), *more.split()]
    words += ["--data_path", str(path), "--output_dir", str(output)]
    words += ["--num_workers", str(workers)]
    if path.suffix == ".csv":
        words += ["--image_root", str(path.parent / "photos")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} on {path} failed:\n{done.stdout}{done.stderr}")
    state = torch.load(output / "checkpoint-0.pth", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def compare(
    root: Path,
    names: Sequence[str],
    to: Path,
    workers: Sequence[int],
    processes: Sequence[int],
    more: str = "",
) -> dict[tuple[str, int, int], dict[str, str]]:
    """Return the digests of all forms for each (script, processes, workers)."""
    found: dict[tuple[str, int, int], dict[str, str]] = {}
    for form, write in FORMS.items():
        path = write(root, names, to)
        for script in SCRIPTS:
            for ranks in processes:
                for count in workers:
                    output = to / f"{path.name}-{script}-{ranks}-{count}"
                    digest = train(script, path, output, count, ranks, more)
                    found.setdefault((script, ranks, count), {})[form] = digest
                    print(f"{form}, {script}, {ranks} x {count}: {digest[:12]}", flush=True)
    return found


def report(found: dict[tuple[str, int, int], dict[str, str]], images: int) -> str:
    """Return the table of digests as Markdown."""
    head = ["script", "processes", "workers", *FORMS]
    rows = [[*map(str, key), *(digest[:8] for digest in held.values())]
            for key, held in sorted(found.items())]  # fmt: skip
    same = all(len({*held.values()}) == 1 for held in found.values())
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    verdict = "All sources give the same bits." if same else "THE SOURCES DIFFER."
    title = f"The first digits of the SHA-256 of the weights after an epoch of {images} images"
    return f"{title} ({COMMON}).\n\n" + "\n".join(lines) + f"\n\n{verdict}\n"


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = unpack(args.data, args.images, folder / "photos")
        found = compare(folder / "photos", names, folder, args.workers, args.processes)
    text = report(found, len(names))
    print(text)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
