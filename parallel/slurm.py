# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The job that submitit runs: how it starts, goes back into the queue and is followed.

python -c "from parallel import slurm; print(slurm.state('12345'))"
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from errors import EXIT_REQUEUE
from parallel.environment import port_of

JOB_ID = "%j"
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGTERM")  # a scheduler's warnings before it ends a job
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
ENDS += ("DEADLINE", "PREEMPTED", "GONE")  # GONE: SLURM no longer knows the job
POLL_S = 5.0  # time between two questions to SLURM
ATTEMPTS = 3  # to put a job back into the queue


class Trainer:
    """The job: each of its tasks is one rank of `module.main(args)`.

    The output goes into the job's folder. After a preemption or at the time limit the job starts
    again under the same number and resumes.
    """

    def __init__(self, module: str, args: Any, umask: int | None = None) -> None:
        self.module, self.args, self.umask = module, args, umask

    def __call__(self) -> None:
        import submitit

        if self.umask is not None:  # the user's; jobs are submitted with a private one
            os.umask(self.umask)
        job = submitit.JobEnvironment()
        for name in SIGNALS:  # submitit's handlers would pickle the job again each time
            signal.signal(
                getattr(signal, name), lambda number, _: self._requeue_at_once(job, number)
            )
        # The training script chooses the GPU: SLURM may number them differently.
        launcher = submitit.helpers.TorchDistributedEnvironment()
        launcher.export(set_cuda_visible_devices=False, overwrite=True)
        # submitit's port may be in use by an outgoing connection.
        os.environ["MASTER_PORT"] = port_of(zlib.crc32(job.job_id.encode()))
        sys.argv = [f"{self.module}.py"]  # the name in error messages

        main = importlib.import_module(self.module)
        try:
            from parallel import process_group  # loads torch, which submitting a job need not

            process_group.launch(main.main, self._flags(main, job.job_id))
            _ignore_signals()  # during Python's shutdown they would fail a job that is done
        except SystemExit as end:  # its traceback keeps the whole run alive: see _exit
            if end.code != EXIT_REQUEUE:
                raise
            code = requeue(job)
            atexit._run_exitfuncs()  # they release the run folder
            _exit(code)

    def _flags(self, main: Any, job_id: str) -> Any:
        """Return the training script's own flags, for this job."""
        names = {action.dest for action in main.get_args_parser()._actions}
        flags = {name: value for name, value in vars(self.args).items() if name in names}
        flags["output_dir"] = self.args.output_dir or self.args.job_dir
        for name in ("output_dir", "log_dir"):
            flags[name] = flags[name] and flags[name].replace(JOB_ID, job_id)
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        flags["auto_resume"] = self.args.auto_resume or restarted
        return type(self.args)(**flags)

    def _requeue_at_once(self, job: Any, number: int) -> None:
        """Handle a signal outside of the epochs, where there is nothing to save."""
        if job.global_rank == 0:  # the others end with it; it may need them to save
            text = f"asked to stop ({signal.Signals(number).name}) outside of the epochs"
            print(text, flush=True)
            _exit(requeue(job))

    def checkpoint(self) -> Any:
        """Return the job that submitit queues after a preemption: the same one, resumed."""
        import submitit

        again = type(self.args)(**vars(self.args) | {"auto_resume": True})
        return submitit.helpers.DelayedSubmission(Trainer(self.module, again, self.umask))


def _ignore_signals() -> None:
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _exit(code: int) -> NoReturn:
    """End without Python's shutdown.

    To close a process group may need the other ranks, and to free gloo's last tensor may wait for
    its thread, which waits for the GIL.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def requeue(job: Any) -> int:
    """Put this job back into the queue, on rank 0; returns the exit code for this process."""
    _ignore_signals()
    if job.global_rank != 0:
        return 0  # another code would make srun end rank 0 before it has requeued the job
    for attempt in range(ATTEMPTS):
        time.sleep(POLL_S * (attempt > 0))  # the controller may be busy
        try:
            if job.name() == "slurm":
                _requeue_in_slurm(job.job_id)
            else:
                job._requeue(0)  # exits with the code that submitit's controller waits for
            return EXIT_REQUEUE
        except SystemExit as end:
            return int(end.code or 0)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            problem = error
    print(
        f"job {job.job_id} cannot go back into the queue: {problem}; its checkpoints are complete: "
        "submit it again with the same output folder",
        file=sys.stderr,
    )
    return EXIT_REQUEUE


def _requeue_in_slurm(job_id: str) -> None:
    now = state(job_id)
    if now != "RUNNING":
        print(f"job {job_id} is {now} and not requeued: the scheduler has decided", flush=True)
        return
    done = run_command("scontrol", "requeue", job_id)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    print(f"job {job_id} goes back into the queue", flush=True)


def state(job_id: str) -> str:
    """Return the state of a job in SLURM's words; GONE if SLURM no longer knows it."""
    if shutil.which("scontrol") is None:
        raise RuntimeError("scontrol is not on this machine")
    done = run_command("scontrol", "show", "job", "--oneliner", job_id)
    found = re.search(r"JobState=(\w+)", done.stdout)
    if found:
        return found[1]
    if "Invalid job id" not in done.stderr:
        raise RuntimeError(done.stderr.strip() or f"scontrol printed {done.stdout!r}")
    if shutil.which("sacct") is None:
        return "GONE"
    states = run_command("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State").stdout.split()
    return states[0] if states else "GONE"


def run_command(*words: str) -> subprocess.CompletedProcess:
    """Run a program and return its exit code and output."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def follow(jobs: Sequence[Any], cluster: str) -> bool:
    """Print the output of rank 0 of each job until all have ended; True if all completed."""
    outputs = [Tail(job.paths.stdout, f"{job.job_id}: " * (len(jobs) > 1)) for job in jobs]
    states = [""] * len(jobs)
    while not set(states) <= set(ENDS):
        time.sleep(POLL_S if cluster == "slurm" else POLL_S / 10)
        for number, job in enumerate(jobs):
            before = states[number]
            if before not in ENDS:
                states[number] = _state(job, cluster) or before
            outputs[number].show()
            if states[number] != before:
                print(f"job {job.job_id}: {states[number]}", flush=True)
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
        except (RuntimeError, subprocess.SubprocessError) as error:
            print(f"SLURM does not answer, asking again: {error}", file=sys.stderr)
            return ""
        if now != "GONE":
            return now
    if job.task(0).paths.result_pickle.exists():
        return "FAILED" if job.task(0).exception() else "COMPLETED"
    return now or ("FAILED" if job.done() else "RUNNING")


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


class Tail:
    """Prints the lines that are added to a file."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix, self.printed = path, prefix, 0

    def show(self) -> None:
        """Print the complete lines since the last call."""
        if not self.path.exists():
            return
        with open(self.path, errors="replace", newline="\n") as file:
            lines = [line for line in file if line.endswith("\n")]
        for line in lines[self.printed :]:
            print(self.prefix + line, end="", flush=True)
        self.printed = len(lines)
