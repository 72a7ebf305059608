# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parts of benchmarks/gpu.py: machine, compilation, profile, kernel choices, CUDA graphs.

python benchmarks/gpu_parts.py profile --model convnextv2_atto --batch 8 --output profile.md
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("environment", "compile", "profile", "choices", "graphs")
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "pytest", "submitit")
TOP = 25  # kernels of a profile that the table shows
STEPS = 3  # of a profile
COMPILED = ["model", "batch", "exit status", "seconds"]
PEERS = "masked_compiled,timm_compiled"  # these take minutes to compile


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", nargs="+", default=["convnextv2_tiny"])
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="for each --model")
    parser.add_argument("--toy", action="store_true", help="small images, few of them")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, required=True, help="markdown file to write")
    return parser


if __name__ == "__main__":
    get_args_parser().parse_args()  # --help and wrong flags answer before torch is imported

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import curves
from benchmarks.step import commit, machine
from benchmarks.variants import Variant, make_variant, time_steps
from models.kernels import autotune


def steps_of(model: str, batch: int, args: argparse.Namespace) -> dict[str, Variant]:
    """A packed and a dense step."""
    flags = curves.parse_args(["--model", model, "--device", args.device])
    flags = curves.flags_of(flags, input_size=64 if args.toy else 224)
    return {name: make_variant(name, batch, flags) for name in ("packed", "dense")}


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def save(text: str, args: argparse.Namespace) -> None:
    """Write the results so far."""
    args.output.write_text(text + "\n", encoding="utf-8")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(args: argparse.Namespace) -> str:
    """Return versions, commit and the output of nvidia-smi."""
    rows = [["python", sys.version.split()[0]], ["commit", commit()]]
    rows += [[name, version(name)] for name in PACKAGES]
    rows += [["CUDA of torch", torch.version.cuda], ["cuDNN", torch.backends.cudnn.version()]]
    rows += [["cores", os.cpu_count()], ["system", " ".join(os.uname())]]
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        rows += [["device", own.name], ["capability", f"{own.major}.{own.minor}"]]
        rows += [["multiprocessors", own.multi_processor_count]]
        rows += [["memory, GiB", f"{own.total_memory / 2**30:.1f}"]]
    smi = "nvidia-smi: not found"
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
        smi = done.stdout + done.stderr
    if args.device == "cuda" and not torch.cuda.is_available():
        print(smi)
        sys.exit("torch finds no CUDA device")
    return f"{machine(torch.device(args.device))}\n\n{table(['', ''], rows)}\n\n```\n{smi}\n```"


def compilations(args: argparse.Namespace) -> str:
    """Compiled peers of each --model and --batch run once, at the same time: they fill the cache.

    It lies in TORCHINDUCTOR_CACHE_DIR, where the parts that time these peers find it.
    """
    start, running = time.monotonic(), {}
    words = f"benchmarks/step.py --device {args.device} --only {PEERS} --rounds 1 --warmup 0"
    words += " --steps 1" + " --input_size 64" * args.toy
    threads = max(1, (os.cpu_count() or 2) // len(args.model))
    own = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    for model, batch in zip(args.model, args.batch, strict=True):
        command = [sys.executable, *words.split(), "--model", model, "--batch_size", str(batch)]
        file = args.output.with_name(f"{args.output.stem}_{model}_{batch}.txt").open("w")
        running[model, batch] = subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT
        )
    rows: list[list[Any]] = []
    while running:
        time.sleep(0.5)
        for key in [key for key, process in running.items() if process.poll() is not None]:
            rows.append([*key, running.pop(key).returncode, round(time.monotonic() - start)])
            save(table(COMPILED, rows), args)
    return table(COMPILED, rows)


def events_of(
    variant: Variant, steps: int, on_cuda: bool, file: Path
) -> list[tuple[str, int, float]]:
    """(kernel, calls, ms), all of one step, the longest first; the profiler's table in a file."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=kinds) as profiled:
        for _ in range(steps):
            variant.step()
        if on_cuda:
            torch.cuda.synchronize()
    averages = profiled.key_averages()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    file.write_text(averages.table(sort_by=order, row_limit=100, max_name_column_width=100))
    events = []
    for event in averages:
        # The list also has the operators that launch kernels, and ranges that span several kernels.
        whole = getattr(event, "is_user_annotation", False) or "Optimizer.step#" in event.key
        if not whole and ("CUDA" in str(event.device_type)) == on_cuda:
            ms = getattr(event, order) / steps / 1000
            events.append((event.key, round(event.count / steps), ms))
    return sorted(events, key=lambda event: -event[2])


def profiles(args: argparse.Namespace) -> str:
    """List the kernels that take the most time in a packed and a dense step."""
    device, texts = torch.device(args.device), []
    on_cuda, steps = device.type == "cuda", 1 if args.toy else STEPS
    for name, variant in steps_of(args.model[0], args.batch[0], args).items():
        time_steps(variant, steps, device)  # chooses and compiles kernels
        wall = 1000 * statistics.median(time_steps(variant, steps, device) for _ in range(5))
        file = args.output.with_name(f"{args.output.stem}_{name}.txt")
        events = events_of(variant, steps, on_cuda, file)
        total = sum(ms for *_, ms in events)
        rows = [
            [f"`{key[:100].replace('|', ' ')}`", calls, f"{ms:.3f}", f"{100 * ms / total:.1f}%"]
            for key, calls, ms in events[:TOP]
        ]
        what = "kernels on the device" if on_cuda else "operators on the CPU"
        texts.append(
            f"### {name}, {args.model[0]}, batch {variant.batch}\n\nA step takes {wall:.2f} ms "
            f"unprofiled; {what}: {total:.2f} ms in {sum(n for _, n, _ in events)} calls. "
            f"The profiler's own table: {file.name}.\n\n"
            + table(["kernel", "calls", "ms", "fraction"], rows)
        )
        save("\n\n".join(texts), args)  # now, so that it stays if the next one is interrupted
    return "\n\n".join(texts)


def choices(args: argparse.Namespace) -> str:
    """All entries of the cache file of kernel choices, with the time of each implementation."""
    cache = args.output.with_name("cache") / "choices"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    where: dict[str, str] = {}
    for model, batch in zip(args.model, args.batch, strict=True):
        for name, variant in steps_of(model, batch, args).items():
            variant.step()
            for entry in autotune.autotuner.seconds.keys() - where.keys():
                where[entry] = f"{model.removeprefix('convnextv2_')}, {name}"
            save(table_of_choices(where, args), args)
    return table_of_choices(where, args)


def table_of_choices(where: dict[str, str], args: argparse.Namespace) -> str:
    """Return the choices as a table; where: the step that made a choice first."""
    seconds = autotune.autotuner.seconds
    kept = {e: name for own in autotune.autotuner.state().values() for e, name in own.items()}
    names = list(dict.fromkeys(name for own in seconds.values() for name in own))
    rows = []
    for entry, taken in sorted(kept.items(), key=lambda item: (where[item[0]], item[0])):
        own = seconds[entry]
        cells = [f"{1000 * own[name]:.3f}" if name in own else "" for name in names]
        gain = next(iter(own.values())) / own[taken]
        rows.append([where[entry], entry, *cells, taken, f"{gain:.2f}"])
    head = ["first used in", "operation, dtype, shape"]
    return table([*head, *(f"{name}, ms" for name in names), "chosen", "first / chosen"], rows)


def rates(output: str) -> list[tuple[int, int]]:
    """(images/s, % of time spent waiting for data) of every log line of a run."""
    found = re.findall(r"images/s (\d+) +data (\d+)%", output)
    return [(int(rate), int(share)) for rate, share in found]


def graphs(args: argparse.Namespace) -> str:
    """Run main_pretrain.py on a small model with and without CUDA graphs."""
    words = (
        "main_pretrain.py --data_set SYNTHETIC --model convnextv2_atto --output_dir= "
        f"--device {args.device} --progress lines "
    )
    if args.toy:
        words += "--input_size 64 --batch_size 256 --epochs 1 --num_workers 0 --print_freq 1"
    else:
        workers = min(12, max(1, (os.cpu_count() or 2) - 2))
        words += "--input_size 96 --batch_size 32 --epochs 6 --print_freq 16 "
        words += f"--num_workers {workers}"
    rows = []
    for flag in ("false", "true") if args.device == "cuda" else ("false",):
        command = [sys.executable, *words.split(" "), "--cuda_graphs", flag]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        output = done.stdout + done.stderr
        print(output)
        if done.returncode or not (found := rates(output)):
            sys.exit(f"--cuda_graphs {flag}: exit status {done.returncode}")
        late = found[len(found) // 3 :]  # the first lines compile, capture and start workers
        middle = [statistics.median(column) for column in zip(*late, strict=True)]
        rows.append([flag, f"{middle[0]:.0f}", f"{middle[1]:.0f}%", len(late)])
    if args.device != "cuda":
        rows.append(["true", "CUDA only", "", ""])
    head = ["--cuda_graphs", "images/s, median", "waiting for data", "log lines"]
    return f"`{words.strip()}`\n\n{table(head, rows)}"


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if len(args.batch) != len(args.model):
        sys.exit(f"--batch has {len(args.batch)} numbers for {len(args.model)} models")
    args.output = args.output.resolve()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    functions = (environment, compilations, profiles, choices, graphs)
    text = dict(zip(PARTS, functions, strict=True))[args.part](args)
    save(text, args)
    print(text)


if __name__ == "__main__":
    main()
