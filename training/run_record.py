# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""run.json in the folder of a run: flags, code, versions, machine, data, times and results.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/digits; cat runs/digits/run.json
"""

import atexit
import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from config.cores import cpu_cores, cpu_name
from config.flags import is_pretraining
from config.parser import PACKAGE, absolute_paths, find_versions
from config.run_files import PLACES, RECORD
from config.sizes import as_one_flag
from data_loading.dataset import TransformedDataset
from data_loading.fingerprint import describe_source, fingerprint
from errors import Preempted, TrainingStopped, UserError, describe_error, first_line
from parallel.process_group import get_logger, get_world_size
from training import run_lock
from training.checkpoint import TrainState
from training.hooks import Hook, Run
from training.report import Record
from utils import write_atomically

ROOT = Path(__file__).resolve().parents[1]
VERSION = 1
GIT_SECONDS = 5.0  # for each call of git
# Packages that are not required: their versions are noted if the run has imported them.
OPTIONAL = ("wandb", "trackio", "pyarrow", "tifffile", "triton", "safetensors", "huggingface_hub")
OPTIONAL += ("transformers", "onnx", "onnxruntime", "pandas", "sklearn", "umap")
LOST = "ended by a failure of another process; see console.log"
GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")


class RunRecord(Hook):
    """Writes run.json at the start, at every save, after every epoch and at the end.

    facts: entries that the run does not change. datasets: by name, `train` first. before: the
    record of the run that resumes, {} for a new one.
    """

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        datasets: Mapping[str, TransformedDataset],
        resumed_from: str = "",
    ) -> None:
        self.path = folder / RECORD if folder else None
        self.facts, self.datasets, self.resumed_from = dict(facts), datasets, resumed_from
        self.start, self.final, self.before = time.time(), {}, {}
        self.logged = 0.0  # epochs done at the last line of log.txt

    def on_start(self, run: Run) -> None:
        own = bool(self.resumed_from) and Path(self.resumed_from).resolve().parent
        if own == self.path.parent.resolve():
            self.before = read_before(self.path)
        self.facts |= {"git": describe_git(ROOT), "packages": find_packages()}
        self.facts["device"] = describe_device(run.device)
        self.facts["data"] = {"train": None, "val": None} | {
            name: describe_data(each, run.args) for name, each in self.datasets.items()
        }
        if not self.facts["finetuned_from"]:
            self.facts["finetuned_from"] = self.before.get("finetuned_from")
        self.final = metrics_of(run.state.stats)
        self.run, self.logged = run, float(run.state.epoch)
        self._write("running")
        atexit.register(self._leave)

    def on_save(self, run: Run) -> None:
        self._write("running")

    def on_epoch(self, stats: Record, state: TrainState) -> None:
        self.final, self.logged = metrics_of(stats), state.position
        self._write("running")

    def on_end(self, run: Run) -> None:
        atexit.unregister(self._leave)
        self._write(*describe_end(run.error))

    def _leave(self) -> None:
        """Note the end of a process that another one ends: no `on_end` is called there."""
        with contextlib.suppress(OSError):
            self._write("failed", LOST)

    def _write(self, status: str, error: str | None = None) -> None:
        if run_lock.is_taken_over():  # the folder is another run's by now
            return
        text = json.dumps(self.content(status, error, time.time()), indent=1, allow_nan=False)
        write_atomically(without_passwords(text) + "\n", self.path)

    def epochs_done(self) -> float:
        """Return the number of epochs done: an epoch is whole once log.txt has its line.

        One that has made its last step is not: that step may be bad, or its evaluation may fail.
        """
        done = self.run.state.position
        return done - 1 if done == int(done) and done > self.logged else done

    def content(self, status: str, error: str | None, now: float) -> dict[str, Any]:
        """Return the content of run.json at a time in seconds since 1970."""
        state, earlier = self.run.state, self.before.get("sessions", [])
        session = {
            "start": as_utc(self.start),
            "end": None if status == "running" else as_utc(now),
            "updated": as_utc(now),
            "seconds": round(now - self.start, 3),
            "status": status,
            "error": error,
            "resumed_from": self.resumed_from or None,
            "processes": self.facts["device"]["processes"],
            "host": platform.node(),
            "commit": (self.facts["git"] or {}).get("commit"),
        }
        sessions = [*earlier, session]
        return {
            "version": VERSION,
            "script": self.facts["script"],
            **{name: session[name] for name in ("status", "error")},
            "start": sessions[0]["start"],
            **{name: session[name] for name in ("end", "updated")},
            "seconds": round(sum(each["seconds"] for each in sessions), 3),
            **self.facts,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": session["host"],
            "resumed_from": session["resumed_from"],
            "epochs_done": self.epochs_done(),
            "steps_done": state.global_step,
            "final": self.final,
            "best": best_of(state),
            "sessions": sessions,
        }


def build_run_record(
    args: Any,
    folder: Path | None,
    point: Any,
    datasets: Mapping[str, TransformedDataset],
    parameters: int,
    mask_ratio: float | None = None,
) -> RunRecord | None:
    """Build the hook that writes run.json; None without a folder.

    point: the `ResumePoint` of the run. datasets: by name, `train` first. parameters: number of
    those that are trained. mask_ratio: fraction of the patches that are masked, after rounding.
    """
    if folder is None:
        return None
    flags = as_one_flag(absolute_paths(vars(args)))
    start = flags.get("finetune") or (args.model if flags.get("pretrained") else "")
    facts = {
        "script": "main_pretrain" if is_pretraining(flags) else "main_finetune",
        "arguments": as_json(flags),
        "typed": sorted(args.typed),
        "recipe": (args.recipe or "").partition(":")[0] or None,  # without its flags
        "seed": args.seed,
        "mask_ratio": None if mask_ratio is None else round(mask_ratio, 6),
        "parameters": parameters,
        "finetuned_from": (point.source if point.is_weights else start) or None,
    }
    return RunRecord(folder, facts, datasets, point.source if point.is_run else "")


def read_before(path: Path) -> dict[str, Any]:
    """Return the record of a run that resumes, {} if it is absent or damaged.

    Its last session was killed if it did not note an end.
    """
    try:
        found = json.loads(path.read_bytes())
        sessions = [{**each} for each in found["sessions"]]
        sessions = [each for each in sessions if each["start"] and each["seconds"] >= 0]
    except FileNotFoundError:  # of an earlier version
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = "%s is damaged (%s); a new one is written, without earlier sessions"
        get_logger().warning(text, path, first_line(error))
        return {}
    for each in sessions:
        if each.get("status") == "running":
            each["status"] = "killed"
    return {**found, "sessions": sessions}


# --- what is noted ----------------------------------------------------------------------------


def as_utc(seconds: float) -> str:
    """Return a time in seconds since 1970 as `2026-11-30T14:44:19Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def as_json(value: Any) -> Any:
    """Return flags as JSON's types: NaN and Inf become texts, as do other types."""
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def without_passwords(text: str) -> str:
    """Replace `user:password@` in addresses by `***@`."""
    return re.sub(r"(?<=://)[^/@\s\"]+@", "***@", text)


def metrics_of(stats: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers among the values of an epoch; None for NaN and Inf."""
    return {
        name: value if math.isfinite(value) else None
        for name, value in stats.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in PLACES
    }


def best_of(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return the best metrics by their names in log.txt; epoch: number of epochs done then."""
    endings = {"best": "", "best-ema": "_ema"}
    return {
        f"test_{state.best_metric}{endings.get(name, f'_{name}')}": {
            "value": value if math.isfinite(value) else None,
            "epoch": state.best_epochs.get(name),
            "lower_is_better": state.lower_is_better,
        }
        for name, value in state.best.items()
    }


def describe_end(error: BaseException | None) -> tuple[str, str | None]:
    """Return status and error of a run that ends."""
    if error is None:
        return "finished", None
    if isinstance(error, Preempted | KeyboardInterrupt):
        return "stopped", str(error) or type(error).__name__
    known = isinstance(error, UserError | TrainingStopped)
    return "failed", str(error) if known else f"{type(error).__name__}: {first_line(error)}"


def describe_data(dataset: TransformedDataset, args: Any) -> dict[str, Any]:
    """Return source, number of images and classes, and fingerprint of a data set."""
    source, mark = describe_source(dataset.dataset) or args.data_set, None
    try:
        mark = fingerprint(dataset.dataset)
    except Exception as error:  # of a user's data set
        get_logger().warning(
            "no fingerprint of %s in %s: %s", source, RECORD, describe_error(error)
        )
    count = None if dataset.kind == "number" else dataset.nb_classes
    return {"source": source, "images": len(dataset), "classes": count, "fingerprint": mark}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type, name and number of the devices of the run, its processes and CPU cores."""
    of_gpu = device.type == "cuda"
    processes = get_world_size()
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if of_gpu else cpu_name(),
        "count": processes if of_gpu else 1,
        "processes": processes,
        "cpu_cores": cpu_cores(),
    }


def find_packages() -> dict[str, str]:
    """Return versions of the toolkit, of what it requires, and of what else it has imported."""
    needed: list[str] = []
    if (path := ROOT / "requirements.txt").exists():
        needed = path.read_text(encoding="utf-8").splitlines()
    else:
        with contextlib.suppress(metadata.PackageNotFoundError):
            needed = [line for line in metadata.requires(PACKAGE) or () if "extra ==" not in line]
    names = [found[0] for line in needed if (found := re.match(r"[\w.-]+", line))]
    names += [name for name in OPTIONAL if name in sys.modules]
    versions = {PACKAGE: find_versions()[PACKAGE]}
    for name in names:
        distribution = {"sklearn": "scikit-learn", "umap": "umap-learn"}.get(name, name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[distribution] = metadata.version(distribution)
    return versions


def describe_git(folder: Path) -> dict[str, Any] | None:
    """Return the state of the toolkit's files in git; None if they are in no repository.

    changed_files: number of files that differ from the commit, and of new Python files; diff_lines
    and diff_bytes: size of `git diff HEAD`. Hooks, monitors and diff programs of the repository do
    not run.
    """

    drop = [name for name in os.environ if name[:4] == "GIT_" and name[:10] != "GIT_CONFIG"]
    own = {name: value for name, value in os.environ.items() if name not in drop}

    def git(*words: str) -> bytes:
        command = [*GIT, "-C", str(folder), *words]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": True}
        return subprocess.run(command, env=own, timeout=GIT_SECONDS, **options).stdout

    try:
        git("ls-files", "--error-unmatch", "errors.py")  # not a repository around a venv
        commit, branch = git("rev-parse", "HEAD", "--abbrev-ref", "HEAD").decode().split()
        diff = git("diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules", "HEAD", ".")
        new = git("ls-files", "--others", "--exclude-standard", "-z", "*.py").count(b"\0")
        return {
            "commit": commit,
            "branch": branch,
            "changed_files": len(re.findall(rb"^diff --git ", diff, re.MULTILINE)) + new,
            "diff_lines": diff.count(b"\n"),
            "diff_bytes": len(diff),
        }
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no time
        return None
