# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Run a training script as a job of submitit, requeue it, and follow its output.

python -c "from parallel import slurm; print(slurm.state('12345'))"
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.flags import FLAGS, JOB
from errors import EXIT_REQUEUE
from parallel.environment import WARNINGS, port_of
from parallel.failure import exit_now

PREFIX = __name__.removesuffix("parallel.slurm")  # of the package that pip installs
JOB_ID = "%j"
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
ENDS += ("DEADLINE", "PREEMPTED", "GONE")  # GONE: SLURM no longer knows the job
POLL_S = 5.0  # seconds between queries of SLURM
ATTEMPTS = 3  # to requeue a job
STARTS = 10  # of a job that has saved nothing yet


class Trainer:
    """The job; each of its tasks is one rank of `module.main(args)`.

    After a preemption or at its time limit the job is requeued under the same number and resumes.
    umask: the user's, to restore in the job, which is submitted with a private one.
    """

    def __init__(self, module: str, args: Any, umask: int | None = None) -> None:
        self.module, self.args, self.umask = module, args, umask

    def __call__(self) -> None:
        import submitit

        if self.umask is not None:
            os.umask(self.umask)
        job = submitit.JobEnvironment()
        folder = self._output_dir(job.job_id)
        for kind in WARNINGS:  # submitit's own handlers limit the number of requeues
            signal.signal(kind, lambda number, _: _requeue_at_once(job, number, folder))
        # The training script chooses the GPU: SLURM may number them differently.
        launcher = submitit.helpers.TorchDistributedEnvironment()
        launcher.export(set_cuda_visible_devices=False, overwrite=True)
        # submitit's port may be in use by an outgoing connection.
        os.environ["MASTER_PORT"] = port_of(zlib.crc32(job.job_id.encode()))
        sys.argv = [f"{self.module}.py"]  # the name in error messages

        main = importlib.import_module(PREFIX + self.module)
        try:
            from parallel import process_group  # imports torch, which submitting does not need

            process_group.launch(main.main, self._flags(job.job_id))
            _ignore_signals()  # during Python's shutdown they would fail a finished job
        except SystemExit as end:
            if end.code != EXIT_REQUEUE:
                raise
            exit_now(requeue(job, folder))

    def _flags(self, job_id: str) -> Any:
        """Return the training script's own flags, for this job."""
        of_job = {row[0].removeprefix("--") for row in FLAGS[JOB]}
        flags = {name: value for name, value in vars(self.args).items() if name not in of_job}
        flags["output_dir"] = self._output_dir(job_id)
        flags["log_dir"] = flags["log_dir"] and flags["log_dir"].replace(JOB_ID, job_id)
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        flags["auto_resume"] = self.args.auto_resume or restarted
        return type(self.args)(self.args.given | {"output_dir"}, **flags)

    def _output_dir(self, job_id: str) -> str:
        folder = self.args.job_dir if self.args.output_dir is None else self.args.output_dir
        return folder.replace(JOB_ID, job_id)


def _requeue_at_once(job: Any, number: int, folder: str) -> None:
    """Handle a signal before the first or after the last epoch, when there is nothing to save."""
    if job.global_rank == 0:  # the other ranks end when rank 0 does
        name = signal.Signals(number).name
        print(f"received {name} outside the training loop", flush=True)
        exit_now(requeue(job, folder))


def _ignore_signals() -> None:
    for kind in WARNINGS:
        signal.signal(kind, signal.SIG_IGN)


def requeue(job: Any, folder: str) -> int:
    """Requeue this job if this is rank 0; returns the exit code for this process.

    folder: of its checkpoints, '' for none.
    """
    _ignore_signals()
    if job.global_rank != 0:
        return 0  # with another code srun would kill rank 0 before it has requeued the job
    if job.name() != "slurm":
        from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE as code

        return code if job.name() == "local" else EXIT_REQUEUE
    starts = 1 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if starts >= STARTS and not (folder and any(Path(folder).glob("checkpoint-*.pth"))):
        print(
            f"did not requeue job {job.job_id}, since it has saved nothing in {starts} starts; "
            f"raise --timeout{', or add --save_ckpt_every_minutes 10' if folder else ''}",
            file=sys.stderr,
        )
        return EXIT_REQUEUE
    for attempt in range(ATTEMPTS):
        time.sleep(POLL_S * (attempt > 0))  # the controller may be busy
        try:
            now = state(job.job_id)
            if now == "RUNNING":  # and not canceled, which sends the signal of a preemption
                _scontrol("requeue", job.job_id)
                print(f"requeued job {job.job_id}", flush=True)
            else:
                print(f"did not requeue job {job.job_id}, since it is {now}", flush=True)
            return EXIT_REQUEUE
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            problem = error
    print(
        f"job {job.job_id} could not be requeued: {problem}; what it has saved is complete: submit "
        "it again with the same output folder",
        file=sys.stderr,
    )
    return EXIT_REQUEUE


def state(job_id: str) -> str:
    """Return the state of a job in SLURM's words; GONE if SLURM no longer knows it."""
    try:
        shown = _scontrol("show", "job", "--oneliner", job_id)
    except RuntimeError as error:
        if "Invalid job id" in str(error):
            return "GONE"
        raise
    found = re.search(r"JobState=(\w+)", shown)
    if found is None:
        raise RuntimeError(f"scontrol printed no JobState: {shown.strip()}")
    return found[1]


def _scontrol(*words: str) -> str:
    """Run scontrol and return its output; RuntimeError with its message if it fails."""
    command = ("scontrol", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def follow(jobs: Sequence[Any], cluster: str) -> bool:
    """Print the output of rank 0 of each job until all have ended; True if all completed."""
    states, printed = [""] * len(jobs), [0] * len(jobs)
    while not set(states) <= set(ENDS):
        time.sleep(POLL_S if cluster == "slurm" else POLL_S / 10)
        for number, job in enumerate(jobs):
            if states[number] in ENDS:
                continue
            now = _state(job, cluster) or states[number]  # first, so that no output is missed
            prefix = f"{job.job_id}: " * (len(jobs) > 1)
            printed[number] = print_lines(job.paths.stdout, printed[number], prefix)
            if now != states[number]:
                print(f"job {job.job_id}: {now}", flush=True)
            states[number] = now
    for job, end in zip(jobs, states, strict=True):
        if end != "COMPLETED":
            print(_last_errors(job))
    return set(states) == {"COMPLETED"}


def _state(job: Any, cluster: str) -> str:
    """Return the state of a job on any cluster, '' if SLURM does not answer."""
    now = ""
    if cluster == "slurm":
        try:
            now = state(job.job_id)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(f"SLURM does not answer, retrying: {error}", file=sys.stderr)
            return ""
        if now != "GONE":
            return now
    if job.task(0).paths.result_pickle.exists():
        return "FAILED" if job.task(0).exception() else "COMPLETED"
    return now or ("FAILED" if job.done() else "RUNNING")


def print_lines(path: Path, printed: int, prefix: str = "") -> int:
    """Print the complete lines of a file after the first `printed`; returns their new number."""
    if not path.exists():
        return printed
    with open(path, errors="replace", newline="\n") as file:
        lines = [line for line in file if line.endswith("\n")]
    for line in lines[printed:]:
        print(prefix + line, end="", flush=True)
    return len(lines)


def _last_errors(job: Any) -> str:
    """Return the last lines of rank 0's errors and of another rank's traceback."""
    errors = job.paths.stderr
    if not errors.exists():
        return (
            f"{errors.parent} has no log of the job: --job_dir must be on a file system that this "
            "machine and the nodes share"
        )
    others = [job.task(rank).paths.stderr for rank in range(1, job.num_tasks)]
    texts = [log.read_text(errors="replace") for log in (errors, *others) if log.exists()]
    shown = texts[:1] + [text for text in texts[1:] if "Traceback" in text][:1]
    return "\n".join(line for text in shown for line in text.splitlines()[-20:])
