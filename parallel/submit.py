# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""From the flags of submitit_*.py to jobs: what is asked of the cluster, checks, what is printed.

python submitit_pretrain.py --nodes 8 --ngpus 8 --model convnextv2_base --data_path D --dry_run
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import parser as options
from config import recipes
from errors import UserError
from parallel.slurm import JOB_NUMBER, Trainer, follow

DEFAULTS = {"slurm": (2, 8), "local": (1, 1), "debug": (1, 1)}  # nodes, GPUs of each
SLURM_ONLY = ("partition", "account", "qos", "constraint", "exclude", "gres", "dependency")
SLURM_ONLY += ("comment", "use_volta32", "cpus_per_task", "mem_gb", "dry_run")
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
DRY_RUN_HELP = "print the script for sbatch and send nothing; on a node: main_*.py --dry_run"


def run(module: str, parser: argparse.ArgumentParser) -> None:
    """What submitit_*.py does: read the flags, send `module` to the cluster, say where it is."""
    options.add_submitit_args(parser)
    dry_run = next(action for action in parser._actions if action.dest == "dry_run")
    dry_run.help = DRY_RUN_HELP
    try:
        runs = read_runs(parser)
        args = runs[0]  # whatever a job's own recipe says, the cluster is asked once
        if args.dry_run:
            print(script(module, runs), end="")
            return
        jobs = submit(module, runs)
        report(jobs, args)
        if args.follow and not _followed(jobs, args.cluster):
            sys.exit(1)
    except UserError as error:
        parser.error(str(error))


# --- the flags ------------------------------------------------------------------------------


def read_runs(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> list[Any]:
    """The arguments of each job, checked: of one, or one for each recipe of `--array`."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = recipes.read_flags(parser, words)
    names = _names(given["array"])
    if not names:
        return [resolve(options.parse(parser, words), parser)]
    if given["recipe"]:
        parser.error("--array and --recipe both name recipes; put all of them in --array")
    labels = [Path(name).stem for name in names]
    if len(set(labels)) < len(labels):
        parser.error(f"--array {given['array']}: a recipe stands there twice; name each once")
    if given["output_dir"] and JOB_NUMBER not in given["output_dir"]:
        got = f"--output_dir {given['output_dir']}"
        parser.error(f"{got} is one folder for {len(names)} jobs; put %j in it, or drop it")
    runs = [resolve(options.parse(parser, [*words, f"--recipe={name}"]), parser) for name in names]
    if JOB_NUMBER in runs[0].job_dir:
        return runs
    return [
        _changed(args, output_dir=args.output_dir or str(Path(args.job_dir) / label))
        for args, label in zip(runs, labels, strict=True)
    ]


def _names(array: str) -> list[str]:
    return [name.strip() for name in array.split(",") if name.strip()]


def _changed(args: Any, **values: Any) -> Any:
    return type(args)(**{**vars(args), **values})


def resolve(args: Any, parser: argparse.ArgumentParser) -> Any:
    """Fill in what follows from the cluster, or end with what is wrong."""
    nodes, gpus = DEFAULTS[args.cluster]
    ngpus = gpus if args.ngpus is None else args.ngpus
    args = _changed(
        args,
        nodes=nodes if args.nodes is None else args.nodes,
        ngpus=ngpus,
        tasks_per_node=args.tasks_per_node or max(ngpus, 1),
        device="cpu" if ngpus == 0 and args.device == "auto" else args.device,
    )
    for problem in _problems(args, parser):
        parser.error(problem)
    return args


def _problems(args: Any, parser: argparse.ArgumentParser) -> Iterator[str]:
    tasks, where = args.tasks_per_node, f"--cluster {args.cluster}"
    if args.ngpus and tasks != args.ngpus:
        got = f"--tasks_per_node {tasks} and --ngpus {args.ngpus}"
        yield f"{got}: each process takes one GPU; drop --tasks_per_node, or --ngpus 0 for CPUs"
    if not args.ngpus and args.device.startswith("cuda"):
        yield f"--device {args.device} needs a GPU; --ngpus 0 asks for none"
    if args.signal_delay >= 60 * args.timeout:
        got = f"--signal_delay {args.signal_delay} s is all of --timeout {args.timeout} min"
        yield f"{got}, nothing would be trained; lower the first or raise the second"
    if "%" in args.job_dir.replace(JOB_NUMBER, ""):
        yield f"--job_dir {args.job_dir}: expected no other % than %j, the job's number"
    asked = _gpus_of(args.gres)
    if asked is not None and asked != args.ngpus:
        yield f"--gres {args.gres} has {asked} GPUs and --ngpus {args.ngpus}; make them the same"
    if args.cluster == "slurm":
        return
    for name in SLURM_ONLY:
        if getattr(args, name) != parser.get_default(name):
            yield f"--{name} acts on SLURM only, this is {where}; drop it"
    if args.nodes > 1:
        yield f"{where} is one machine, --nodes {args.nodes}; give --nodes 1"
    if args.cluster == "local" and not args.auto_resume:
        yield f"{where} cannot start a job again with --auto_resume false; drop it, or use %j"
    if args.cluster == "debug" and tasks > 1:
        yield f"{where} is one process, asked for are {tasks}; give --ngpus 1, or --cluster local"
    for name in ("timeout", "signal_delay") if args.cluster == "debug" else ():
        if getattr(args, name) != parser.get_default(name):
            yield f"{where} keeps no time, --{name} {getattr(args, name)}; use --max_minutes"


def _gpus_of(gres: str) -> int | None:
    """How many GPUs `gpu:a100:4,nvme:1` asks for; None if it names none."""
    for resource in gres.split(","):
        name, *more = resource.split("(")[0].split(":")
        if name == "gpu":
            return int(more[-1]) if more and more[-1].isdigit() else 1
    return None


# --- what is asked of the cluster -----------------------------------------------------------


def slurm_parameters(module: str, args: Any) -> dict[str, Any]:
    """What sbatch shall be asked, in submitit's words for it."""
    features = [args.constraint, "volta32gb" * args.use_volta32]
    asked = {
        "job_name": module.removeprefix("main_"),
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node,
        "gpus_per_node": None if _gpus_of(args.gres) is not None else args.ngpus or None,
        "cpus_per_task": args.cpus_per_task,
        "mem": f"{math.ceil(args.mem_gb * 1024)}M" if args.mem_gb else None,
        "time": args.timeout,
        "signal_delay_s": args.signal_delay,
        "constraint": "&".join(filter(None, features)),
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "exclude": args.exclude,
        "gres": args.gres,
        "dependency": args.dependency,
        "comment": args.comment,
        "additional_parameters": {"requeue": True},  # whatever the cluster's own default is
        # A rank that fails ends those that wait for it; since SLURM 22.05 srun forgets the cores.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
    }
    return {name: value for name, value in asked.items() if value not in (None, "")} | {
        "wckey": None  # submitit's own, which clusters that keep wckeys do not know
    }


def _executor(module: str, args: Any) -> Any:
    import submitit

    if args.cluster == "slurm":
        executor = submitit.SlurmExecutor(args.job_dir)
        executor.update_parameters(**slurm_parameters(module, args))
    elif args.cluster == "local":
        executor = submitit.LocalExecutor(args.job_dir)
        executor.update_parameters(
            timeout_min=args.timeout,
            signal_delay_s=args.signal_delay,
            tasks_per_node=args.tasks_per_node,
            gpus_per_node=args.ngpus,
        )
    else:
        executor = submitit.DebugExecutor(args.job_dir)
    return executor


def script(module: str, runs: Sequence[Any]) -> str:
    """What sbatch would be given; SLURM itself is not asked."""
    submitit = _import_submitit()

    class OnPaper(submitit.SlurmExecutor):
        """One that does not look for srun."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = OnPaper(runs[0].job_dir)
    executor.update_parameters(**slurm_parameters(module, runs[0]))
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitting needs submitit: pip install submitit") from error
    return submitit


# --- sending --------------------------------------------------------------------------------


def submit(module: str, runs: Sequence[Any]) -> list[Any]:
    """Send a job, or an array of them; returns them as submitit has them."""
    submitit, args = _import_submitit(), runs[0]
    if args.cluster == "slurm":
        check_slurm(args.job_dir)
    here = str(Path(__file__).resolve().parents[1])  # the job's python must find these files
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"  # and not take a utils.py of the folder it starts in
    make_private(args.job_dir)
    executor = _executor(module, args)
    umask = os.umask(0o077)  # who can write the job's pickle chooses what the job runs
    try:
        return executor.submit_array([Trainer(module, run, umask) for run in runs])
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused the job: {str(error).strip()}") from error
    finally:
        os.umask(umask)


def make_private(job_dir: str) -> None:
    """Make the folder of a job, or of jobs if it is one each; a job's own, for its owner alone."""
    folder = _common_folder(job_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if JOB_NUMBER not in job_dir:  # else submitit makes it
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"--job_dir {job_dir}: {folder} cannot be made yours alone ({error.strerror}), and "
            "pickles in it are code; choose a folder you own"
        ) from error


def _common_folder(job_dir: str) -> Path:
    """The folder above all that have the job's number in their names."""
    folder = Path(job_dir)
    return next(path for path in (folder, *folder.parents) if JOB_NUMBER not in str(path))


def check_slurm(job_dir: str) -> None:
    """UserError if no job can be sent from here, or none could see its folder."""
    absent = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if absent:
        raise UserError(
            f"{absent[0]} is not on this machine; send from a login node of a SLURM cluster, see "
            "the job by --dry_run, or run it here by --cluster local"
        )
    folder = _common_folder(job_dir).absolute()
    kind = _file_system(folder)
    if kind in IN_MEMORY and not _is_cluster_here():
        raise UserError(
            f"--job_dir {job_dir}: {folder} is in this machine's memory ({kind}), which no node "
            "can see; choose a folder on a file system that they share"
        )


def _file_system(folder: Path) -> str:
    """The kind of file system that holds the folder, or will; '' where that is not told."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    places = {line.split()[1]: line.split()[2] for line in lines}
    real = folder.resolve()
    return next((places[str(path)] for path in (real, *real.parents) if str(path) in places), "")


def _is_cluster_here() -> bool:
    """Whether every node is this machine."""
    words = ["sinfo", "--noheader", "--format", "%o"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    return set(asked.stdout.split()) <= {"127.0.0.1", "localhost", socket.gethostname()}


# --- saying where it is ---------------------------------------------------------------------


def report(jobs: Sequence[Any], args: Any) -> None:
    """Print each job's number, its logs, how to follow and how to cancel it."""
    names = _names(args.array) or [""]
    for job, name in zip(jobs, names, strict=True):
        what = f" ({name})" if name else ""
        print(f"job {job.job_id}{what}; output of rank 0: {job.paths.stdout}")
        print(f"  errors  {job.paths.stderr}")
        if args.cluster != "debug":
            print(f"  follow  tail -F {job.paths.stdout}")
            how = "scancel" if args.cluster == "slurm" else "kill -INT"
            print(f"  cancel  {how} {job.job_id}", flush=True)
    if args.cluster == "debug":
        for job in jobs:
            job.result()  # runs it, in this process


def _followed(jobs: Sequence[Any], cluster: str) -> bool:
    try:
        return cluster == "debug" or follow(jobs, cluster)
    except KeyboardInterrupt:
        goes_on = "go on" if cluster == "slurm" else "are stopped too"
        print(f"\nno longer followed; the jobs {goes_on}", file=sys.stderr)
        sys.exit(130)
