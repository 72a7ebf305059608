# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Submit a training script as a job of SLURM or of this machine, by submitit.

python submitit_pretrain.py --nodes 8 --ngpus 8 --model convnextv2_base --data_path D --dry_run
"""

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import parser as options
from config import recipes
from errors import UserError, pipe_may_close, plural
from parallel.slurm import JOB_ID, Trainer, follow

SLURM_ONLY = ("partition", "account", "qos", "constraint", "exclude", "gres", "dependency")
SLURM_ONLY += ("comment", "use_volta32", "cpus_per_task", "mem_gb", "dry_run")


@pipe_may_close()
def run(module: str, parser: argparse.ArgumentParser) -> None:
    """Run submitit_*.py: read the flags, submit `module`, print the job's number and logs."""
    options.add_submitit_args(parser)
    dry_run = next(action for action in parser._actions if action.dest == "dry_run")
    dry_run.help = "print the script for sbatch without submitting it"
    try:
        runs = read_runs(parser)
        args = runs[0]  # the flags of the job are the same for all
        if args.dry_run:
            print(script(module, runs), end="")
            return
        try:
            jobs = submit(module, runs)
        except OSError as error:
            raise UserError(
                f"cannot write into --job_dir: {error}; use a folder you own"
            ) from error
        report(jobs, runs)
        if args.follow and args.cluster != "debug":
            sys.exit(0 if follow(jobs, args.cluster) else 1)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; submitted SLURM jobs continue, local ones are stopped\n")


def read_runs(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> list[Any]:
    """Return the checked flags of each job: one, or one for each recipe of `--array`."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags, *_ = recipes.read_flags(parser, words)
    names = [name.strip() for name in flags["array"].split(",") if name.strip()]
    if not names:
        return [resolve(options.parse(parser, words), parser)]
    labels = [Path(name).stem for name in names]
    if flags["recipe"]:
        parser.error("--array and --recipe both name recipes; put all of them in --array")
    if len(set(labels)) < len(labels):
        parser.error(f"--array {flags['array']} names a recipe twice; name each once")
    if flags["output_dir"] not in (None, "", "none") and JOB_ID not in flags["output_dir"]:
        problem = f"--output_dir {flags['output_dir']} is one folder for {len(names)} jobs"
        parser.error(f"{problem}; put %j in it, or drop it")
    runs = [resolve(options.parse(parser, [*words, f"--recipe={name}"]), parser) for name in names]
    if JOB_ID in runs[0].job_dir:
        return runs
    return [
        args.replace(output_dir=str(Path(args.job_dir, label))) if args.output_dir is None else args
        for args, label in zip(runs, labels, strict=True)
    ]


def resolve(args: Any, parser: argparse.ArgumentParser) -> Any:
    """Fill in the defaults of the cluster; a flag that cannot work ends the program."""
    nodes, gpus = (2, _gpus_of(args.gres) or 8) if args.cluster == "slurm" else (1, 1)
    ngpus = gpus if args.ngpus is None else args.ngpus
    args = args.replace(
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
        yield (
            f"--tasks_per_node {tasks} and --ngpus {args.ngpus}: each process takes one GPU; drop "
            "--tasks_per_node, or --ngpus 0 for CPUs"
        )
    if not args.ngpus and args.device.startswith("cuda"):
        yield f"--device {args.device} needs a GPU, and --ngpus 0 asks for none"
    if args.signal_delay >= 60 * args.timeout:
        yield (
            f"--signal_delay {args.signal_delay} s is all of --timeout {args.timeout} min and "
            "leaves no time to train; lower --signal_delay or raise --timeout"
        )
    if "%" in args.job_dir.replace(JOB_ID, ""):
        yield f"--job_dir {args.job_dir}: % is only allowed in %j, the job's number"
    gpus = _gpus_of(args.gres)
    if gpus is not None and gpus != args.ngpus:
        found = plural(gpus, "GPU")
        yield f"--gres {args.gres} has {found} and --ngpus {args.ngpus}; make them equal"
    if args.cluster == "slurm":
        return
    unused = (*SLURM_ONLY, *(("timeout", "signal_delay") if args.cluster == "debug" else ()))
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            yield f"--{name} has no effect with {where}; drop it"
    if args.nodes > 1:
        yield f"{where} is one machine, --nodes {args.nodes}; use --nodes 1"
    if args.cluster == "local" and not args.auto_resume:
        yield f"{where} cannot restart a job with --auto_resume false; drop it, or use %j"
    if args.cluster == "debug" and tasks > 1:
        yield f"{where} is one process, not {tasks}; use --ngpus 1, or --cluster local"


def _gpus_of(gres: str) -> int | None:
    """Return the number of GPUs in `gpu:a100:4,nvme:1`, None if there is no `gpu`."""
    for resource in gres.split(","):
        name, *more = resource.split("(")[0].split(":")
        if name == "gpu":
            return int(more[-1]) if more and more[-1].isdigit() else 1
    return None


def slurm_parameters(module: str, args: Any) -> dict[str, Any]:
    """Return submitit's parameters of the job for sbatch."""
    features = [args.constraint, "volta32gb" * args.use_volta32]
    same_names = ("nodes", "cpus_per_task", "partition", "account", "qos", "exclude", "gres")
    parameters = {
        **{name: getattr(args, name) for name in (*same_names, "dependency", "comment")},
        "job_name": module.removeprefix("main_"),
        "ntasks_per_node": args.tasks_per_node,
        "gpus_per_node": None if _gpus_of(args.gres) is not None else args.ngpus or None,
        "mem": f"{math.ceil(args.mem_gb * 1024)}M" if args.mem_gb else None,
        "time": args.timeout,
        "signal_delay_s": args.signal_delay,
        "constraint": "&".join(filter(None, features)),
        "additional_parameters": {"requeue": True},  # not the default of every cluster
        # Kill all ranks when one fails. Since SLURM 22.05 srun ignores sbatch's cores.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
    }
    parameters = {name: value for name, value in parameters.items() if value not in (None, "")}
    return parameters | {"wckey": None}  # submitit sets one, which some clusters refuse


def _executor(module: str, args: Any) -> Any:
    import submitit

    if args.cluster == "slurm":
        executor = submitit.SlurmExecutor(args.job_dir)
        executor.update_parameters(**slurm_parameters(module, args))
        return executor
    if args.cluster == "debug":
        return submitit.DebugExecutor(args.job_dir)
    executor = submitit.LocalExecutor(args.job_dir)
    executor.update_parameters(
        timeout_min=args.timeout,
        signal_delay_s=args.signal_delay,
        tasks_per_node=args.tasks_per_node,
        gpus_per_node=args.ngpus,
    )
    return executor


def script(module: str, runs: Sequence[Any]) -> str:
    """Return the script for sbatch; works without SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = Path(runs[0].job_dir).absolute()
    words = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]
    return _make_sbatch_string(  # an executor would need srun
        shlex.join(words),
        folder,
        map_count=len(runs) if len(runs) > 1 else None,
        **slurm_parameters(module, runs[0]),
    )


def submit(module: str, runs: Sequence[Any]) -> list[Any]:
    """Submit a job, or an array of them; returns submitit's jobs."""
    import submitit

    args = runs[0]
    if args.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine; submit on a login node of a SLURM cluster, show the "
            "job with --dry_run, or run it here with --cluster local"
        )
    make_private(args.job_dir)
    # The job imports this toolkit, or the package that pip installs, from here.
    root = str(Path(__file__).resolve().parents[__name__.count(".")])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"  # and nothing from the folder in which it starts
    executor = _executor(module, args)
    umask = os.umask(0o077)  # nobody else may write the job's pickle
    try:
        return executor.submit_array([Trainer(module, run, umask) for run in runs])
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused the job: {str(error).strip()}") from error
    finally:
        os.umask(umask)


def make_private(job_dir: str) -> None:
    """Create the job's folder, for its owner alone; with %j only the folder above."""
    from submitit.core.utils import JobPaths

    folder = JobPaths.get_first_id_independent_folder(job_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if JOB_ID not in job_dir:
        folder.chmod(0o700)


def report(jobs: Sequence[Any], runs: Sequence[Any]) -> None:
    """Print each job's number, its logs and the commands to follow and to cancel it."""
    for job, args in zip(jobs, runs, strict=True):
        label = f" ({args.recipe.partition(':')[0]})" if len(jobs) > 1 else ""
        print(f"job {job.job_id}{label}; output of rank 0: {job.paths.stdout}")
        print(f"  errors  {job.paths.stderr}")
        if args.cluster == "debug":
            job.result()  # runs the job in this process
            continue
        print(f"  follow  tail -F {job.paths.stdout}")
        cancel = "scancel" if args.cluster == "slurm" else "kill -INT"
        print(f"  cancel  {cancel} {job.job_id}", flush=True)
