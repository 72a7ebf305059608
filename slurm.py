# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Jobs through submitit: what a job runs, how it is sent, how it goes on after a preemption.

python submitit_pretrain.py --nodes 8 --ngpus 8 --model convnextv2_base --data_path /data/imagenet
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

SIGNAL_DELAY_S = 120  # between the scheduler's signal and its kill
CPUS_PER_TASK = 10  # for the loader's workers, as the official script has it
JOB_NUMBER = "%j"


class Trainer:
    """The job: one task of it is one rank of `module.main(args)`.

    Output goes to the job's folder, from which a requeued job resumes by itself.
    """

    def __init__(self, module: str, args: Any, umask: int | None = None) -> None:
        self.module, self.args, self.umask = module, args, umask

    def __call__(self) -> None:
        import submitit

        if self.umask is not None:  # the user's; that of `submit` is for the job's pickles
            os.umask(self.umask)
        environment = submitit.helpers.TorchDistributedEnvironment().export()
        job = submitit.JobEnvironment().job_id
        main = importlib.import_module(self.module)
        flags = {action.dest for action in main.get_args_parser()._actions}
        values = {name: value for name, value in vars(self.args).items() if name in flags}
        values |= {
            "output_dir": (self.args.output_dir or self.args.job_dir).replace(JOB_NUMBER, job),
            "local_rank": environment.local_rank,
        }
        main.main(type(self.args)(**values))

    def checkpoint(self) -> Any:
        """What submitit queues after a preemption or a timeout: the same job again."""
        import submitit

        again = type(self.args)(**vars(self.args) | {"auto_resume": True})
        return submitit.helpers.DelayedSubmission(Trainer(self.module, again, self.umask))


def make_private(job_dir: str) -> None:
    """Make the folder of a job, or of jobs if it is one each; a job's own, for its owner alone."""
    folder = Path(job_dir)
    if JOB_NUMBER in job_dir:  # by then submitit makes it
        folder = next(path for path in folder.parents if JOB_NUMBER not in str(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if JOB_NUMBER not in job_dir:
            folder.chmod(0o700)
    except OSError as error:
        raise SystemExit(
            f"--job_dir {job_dir}: {folder} cannot be made yours alone ({error.strerror}), and "
            "pickles in it are code; choose a folder you own"
        ) from error


def submit(module: str, args: Any) -> Any:
    """Send the job that `args` describe and print where it can be followed; returns it."""
    try:
        import submitit
    except ImportError as error:
        raise SystemExit("submitting needs submitit: pip install submitit") from error
    here = str(Path(__file__).resolve().parent)  # the job's python must find these files
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    make_private(args.job_dir)
    executor = submitit.AutoExecutor(folder=args.job_dir, cluster=args.cluster)
    parameters: dict[str, Any] = {
        "name": module.removeprefix("main_"),
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": args.ngpus,
        "cpus_per_task": CPUS_PER_TASK,
        "timeout_min": args.timeout,
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
    }
    if args.partition:
        parameters["slurm_partition"] = args.partition
    if args.comment:
        parameters["slurm_comment"] = args.comment
    if args.use_volta32:
        parameters["slurm_constraint"] = "volta32gb"
    executor.update_parameters(**parameters)
    umask = os.umask(0o077)  # who can write the job's pickle chooses what the job runs
    try:
        job = executor.submit(Trainer(module, args, umask))
    finally:
        os.umask(umask)
    print(f"job {job.job_id}; standard output of rank 0: {job.paths.stdout}")
    if args.cluster == "debug":
        job.result()  # runs it, in this process
    return job
