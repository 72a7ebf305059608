# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Kill runs at random instants, restart them, and compare with an uninterrupted run.

python benchmarks/chaos.py --instants 200 --output benchmarks/RESULTS.md
"""

import argparse
import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel import process_group

COMMON = (
    "--input_size 16 --stem_stride 1 --batch_size 4 --lr 0.01 --num_workers 0 --device cpu "
    "--epochs 3 --data_set tests.tiny:colors --save_ckpt_every_steps 2 --update_freq 2 "
    "--progress lines --kernels torch --drop_path 0.1"
)
RUNS = {  # script -> its flags: each takes about a second
    "main_pretrain": f"--model tests.tiny:fcmae --decoder_embed_dim 8 --picture_freq 2 {COMMON}",
    "main_finetune": "--model tests.tiny:classifier --model_ema --model_ema_eval --mixup 0.5 "
    + COMMON,
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instants", type=int, default=200, help="kills, half of each script")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the instants")
    parser.add_argument("--output", type=Path, help="markdown file to append the table to")
    return parser


def start(script: str, folder: Path, *words: str) -> int:
    """Run the script in a fork of this process, with output in FOLDER.txt; returns its pid."""
    while int(time.time()) <= _second_of_events(folder):  # TensorBoard sorts files by it
        time.sleep(0.02)
    words = (*RUNS[script].split(), "--output_dir", str(folder), *words)
    return fork(script, words, folder.with_suffix(".txt"))


def fork(script: str, words: Sequence[str], said: Path) -> int:
    """Run the script with these flags in a fork of this process; its output goes to a file."""
    child = os.fork()
    if child == 0:
        status = 70
        atexit._clear()  # the parent's
        try:
            sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            status = _child(script, words)
            atexit._run_exitfuncs()  # they end workers that hang; os._exit runs none
        finally:
            os._exit(status)
    return child


def _second_of_events(folder: Path) -> int:
    """Return the second in which the newest event file of a run was created, or 0."""
    return max((int(p.name.split(".")[3]) for p in folder.rglob("events.out.*")), default=0)


def finish(child: int) -> int:
    """Wait for a process; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(script: str, words: Sequence[str]) -> int:
    import importlib
    import traceback

    from config import parser as options

    module = importlib.import_module(script)
    process_group.get_logger().handlers.clear()  # they write to the old standard output
    try:
        process_group.launch(module.main, options.parse(module.get_args_parser(), words))
    except SystemExit as end:
        return end.code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def digest(folder: Path) -> dict[str, str]:
    """Hash all files of a run, without timings."""
    import torch

    found = {}
    for path in sorted(folder.glob("checkpoint-*.pth")):
        content = torch.load(path, weights_only=True)
        content["args"].pop("output_dir")
        marks = hashlib.sha256()
        _feed(marks, content)
        found[path.name] = marks.hexdigest()
    for path in sorted([folder / "log.txt", *folder.rglob("*.png")]):
        if path.exists():
            name = path.relative_to(folder).as_posix()
            content = untimed(path) if name == "log.txt" else path.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
    found["TensorBoard"] = json.dumps(scalars(folder / "tensorboard"))
    return found


def untimed(log: Path) -> bytes:
    """Return the lines of log.txt without what two equal runs do not share."""
    from training.report import SPEED

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in row.items() if key not in SPEED} for row in rows]
    return json.dumps(kept).encode()


def _feed(marks, value: object) -> None:
    """Hash a value of plain types and tensors, bit by bit."""
    import torch

    if isinstance(value, dict):
        for key in sorted(value, key=str):
            marks.update(str(key).encode())
            _feed(marks, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(marks, item)
    elif isinstance(value, torch.Tensor):
        marks.update(f"{value.dtype} {tuple(value.shape)}".encode())
        marks.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        marks.update(repr(value).encode())


def scalars(folder: Path) -> dict[str, list]:
    """Return tag -> [step, value] of the TensorBoard scalars that are not timings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    from training.report import SPEED

    timed = (*SPEED, "memory_mb", "eta_s")
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(timed)]
    return {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in sorted(tags)}


def attempt(script: str, folder: Path, seconds: float) -> bool:
    """Kill a run after some seconds and restart it; returns False if it had already ended."""
    child = start(script, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    killed = finish(child) == -signal.SIGKILL
    complete(script, folder)
    return killed


def complete(script: str, folder: Path, *words: str) -> None:
    """Run the script until it ends."""
    if finish(start(script, folder, *words)) != 0:
        text = folder.with_suffix(".txt").read_text(errors="replace")
        raise AssertionError(f"{script} in {folder} did not resume:\n{text[-3000:]}")


def differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Return the names of files that differ or exist on one side only."""
    return sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )


def trial(script: str, count: int, seed: int, place: Path) -> dict[str, int]:
    """Kill a script at `count` random instants; returns the number of each outcome."""
    import importlib

    importlib.import_module(script)  # once, instead of in each fork
    reference = place / f"{script}-reference"
    complete(script, place / f"{script}-warm")
    began = time.monotonic()
    complete(script, reference)
    seconds = time.monotonic() - began
    expected, draw = digest(reference), random.Random(seed)
    outcomes = {"killed": 0, "already ended": 0, "lost": 0, "different": 0}
    for number in range(count):
        folder = place / f"{script}-{number}"
        try:
            killed = attempt(script, folder, draw.uniform(0, seconds))
            outcomes["killed" if killed else "already ended"] += 1
            if names := differences(digest(folder), expected):
                outcomes["different"] += 1
                print(f"{folder.name}: {', '.join(names)}", file=sys.stderr)
        except AssertionError as error:
            outcomes["lost"] += 1
            print(error, file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\r{script} {number + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)  # forks have no thread pool
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as place:
        found = {s: trial(s, args.instants // 2, args.seed, Path(place)) for s in RUNS}
    rows = [
        f"| {script} | {' | '.join(map(str, each.values()))} |" for script, each in found.items()
    ]
    head = "| | killed | already ended | runs lost | different files |\n|---|---|---|---|---|"
    text = "\n".join(["### Killed at random instants", "", head, *rows, ""])
    print(text)
    if args.output:
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(f"\n{text}")
    return 1 if any(each["lost"] + each["different"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
