# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a job of submitit runs, how it goes back into the queue, and what became of it.

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
from parallel import process_group

JOB_NUMBER = "%j"
WARNINGS = ("SIGUSR1", "SIGUSR2", "SIGTERM")  # of a scheduler, before it ends a job
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
ENDS += ("DEADLINE", "PREEMPTED", "GONE")  # GONE: SLURM has forgotten the job
LOOK = 5.0  # seconds between two questions about a job's state
ATTEMPTS = 3  # to put a job back into the queue


class Trainer:
    """The job: one task of it is one rank of `module.main(args)`.

    Output goes to the job's folder. Preempted, out of time or put back by the scheduler, the job
    starts again under the same number and goes on from there.
    """

    def __init__(self, module: str, args: Any, umask: int | None = None) -> None:
        self.module, self.args, self.umask = module, args, umask

    def __call__(self) -> None:
        import submitit

        if self.umask is not None:  # the user's; that of the submission is for the job's pickles
            os.umask(self.umask)
        job = submitit.JobEnvironment()
        for name in WARNINGS:  # submitit's handlers would write the job's pickle anew each time
            signal.signal(getattr(signal, name), lambda number, frame: self._warned(job, number))
        # Which GPU is a rank's, the main knows; SLURM may have numbered them otherwise.
        exported = submitit.helpers.TorchDistributedEnvironment()
        exported.export(set_cuda_visible_devices=False, overwrite=True)
        # submitit's port may be one that the system has given to a connection.
        os.environ["MASTER_PORT"] = exported.port_of(zlib.crc32(job.job_id.encode()))
        sys.argv = [f"{self.module}.py"]  # whose errors the log shows

        main = importlib.import_module(self.module)
        try:
            process_group.launch(main.main, self._flags(main, job.job_id))
            for name in WARNINGS:  # Python's shutdown would leave them to end a job that is done
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        except SystemExit as end:  # holds on to all of the run: see _leave
            if end.code != EXIT_REQUEUE:
                raise
            try:
                requeue(job)
            except SystemExit as last:
                atexit._run_exitfuncs()  # they give the folder free
                _leave(last)

    def _flags(self, main: Any, number: str) -> Any:
        """The main's own flags, for this job."""
        names = {action.dest for action in main.get_args_parser()._actions}
        values = {name: value for name, value in vars(self.args).items() if name in names}
        values["output_dir"] = (self.args.output_dir or self.args.job_dir).replace(
            JOB_NUMBER, number
        )
        if self.args.log_dir:
            values["log_dir"] = self.args.log_dir.replace(JOB_NUMBER, number)
        restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        values["auto_resume"] = self.args.auto_resume or restarted
        return type(self.args)(**values)

    def _warned(self, job: Any, number: int) -> None:
        """A signal outside of the epochs, which `keeper` watches: there is nothing to save."""
        if job.global_rank != 0:  # rank 0 may be in an epoch, and needs the others to save
            return
        print(f"asked to stop ({signal.Signals(number).name}) outside of the epochs", flush=True)
        try:
            requeue(job)
        except SystemExit as end:
            _leave(end)

    def checkpoint(self) -> Any:
        """What submitit queues, where it is asked to, after a preemption: the same job again."""
        import submitit

        again = type(self.args)(**vars(self.args) | {"auto_resume": True})
        return submitit.helpers.DelayedSubmission(Trainer(self.module, again, self.umask))


def requeue(job: Any) -> NoReturn:
    """Put this job back into the queue, unless it is to end, and leave; rank 0 does it for all."""
    for name in WARNINGS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if job.global_rank != 0:
        sys.exit(0)  # another code would end rank 0 before it has asked
    problem = None
    for attempt in range(ATTEMPTS):
        time.sleep(LOOK * (attempt > 0))
        try:
            if job.name() == "slurm":
                print(_requeue_in_slurm(job.job_id), flush=True)
            else:
                job._requeue(0)  # leaves with the code that submitit's controller waits for
            sys.exit(EXIT_REQUEUE)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            problem = error  # the controller may be busy
    print(
        f"job {job.job_id} cannot go back into the queue: {problem}; what it has saved is "
        "whole: send it again with the same output folder",
        file=sys.stderr,
    )
    sys.exit(EXIT_REQUEUE)


def _requeue_in_slurm(number: str) -> str:
    """Returns what became of the job."""
    now = state(number)
    if now != "RUNNING":
        return f"job {number} is {now}: the scheduler has decided what becomes of it"
    done = _ask("scontrol", "requeue", number)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return f"job {number} goes back into the queue"


def _leave(end: SystemExit) -> NoReturn:
    """End now, with nothing of the run let go of before.

    To close a process group may need ranks that are elsewhere, and whoever lets go of the last
    use of one of gloo may wait for its thread, which waits for the interpreter.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(end.code or 0))


def state(number: str) -> str:
    """The state of a job in SLURM's words; GONE if SLURM knows it no more."""
    if shutil.which("scontrol") is None:
        raise RuntimeError("scontrol is not on this machine")
    done = _ask("scontrol", "show", "job", "--oneliner", number)
    found = re.search(r"JobState=(\w+)", done.stdout)
    if found:
        return found[1]
    if "Invalid job id" not in done.stderr:
        raise RuntimeError(done.stderr.strip() or f"scontrol says {done.stdout!r}")
    if shutil.which("sacct") is None:
        return "GONE"
    told = _ask("sacct", "-n", "-X", "-P", "-j", number, "-o", "State").stdout.split()
    return told[0] if told else "GONE"


def _ask(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def follow(jobs: Sequence[Any], cluster: str) -> bool:
    """Print what rank 0 of each job says until all have ended; whether they ended well."""
    outputs = [Tail(job.paths.stdout, f"{job.job_id}: " * (len(jobs) > 1)) for job in jobs]
    states = [""] * len(jobs)
    asked = -LOOK
    while not set(states) <= set(ENDS):
        time.sleep(0.5)
        looking = time.monotonic() - asked > LOOK
        asked = time.monotonic() if looking else asked
        for number, job in enumerate(jobs):
            before = states[number]
            if looking and before not in ENDS:
                now = _state_in_slurm(job) if cluster == "slurm" else _state_here(job)
                states[number] = now or before
            outputs[number].show()
            if states[number] != before:
                print(f"job {job.job_id}: {states[number]}", flush=True)
    for job, end in zip(jobs, states, strict=True):
        if end != "COMPLETED":
            print(_why(job))
    return set(states) == {"COMPLETED"}


def _state_in_slurm(job: Any) -> str:
    try:
        now = state(job.job_id)
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"SLURM does not answer, asking again: {error}", file=sys.stderr)
        return ""
    return (_result(job) or now) if now == "GONE" else now


def _state_here(job: Any) -> str:
    return _result(job) or ("FAILED" if job.done() else "RUNNING")


def _result(job: Any) -> str:
    """What rank 0 has left behind; '' if nothing."""
    first = job.task(0)
    if not first.paths.result_pickle.exists():
        return ""
    return "FAILED" if first.exception() else "COMPLETED"


def _why(job: Any) -> str:
    """The last lines of rank 0's errors and of another rank's traceback, or why there are none."""
    errors = job.paths.stderr
    if not errors.exists():
        return (
            f"{errors.parent} holds no log of it: --job_dir must be on a file system that this "
            "machine and the nodes share"
        )
    others = [job.task(rank).paths.stderr for rank in range(1, job.num_tasks)]
    texts = [log.read_text(errors="replace") for log in (errors, *others) if log.exists()]
    shown = texts[:1] + [text for text in texts[1:] if "Traceback" in text][:1]
    return "\n".join(line for text in shown for line in text.splitlines()[-20:])


class Tail:
    """Prints what a file grows by."""

    def __init__(self, path: Path, mark: str = "") -> None:
        self.path, self.mark, self.place, self.rest = path, mark, 0, b""

    def show(self) -> None:
        """The lines that are new and whole."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.place)
            text = self.rest + file.read()
            self.place = file.tell()
        *lines, self.rest = text.split(b"\n")
        for line in lines:
            print(self.mark + line.decode(errors="replace"), flush=True)
