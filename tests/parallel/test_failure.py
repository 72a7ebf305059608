# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""All ranks end when one fails.

No launcher starts them here, since some launchers do not end the others.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import main_pretrain
from config import parser as options
from data_loading.workers import WatchedLoader
from errors import TrainingStopped, UserError
from parallel import failure, process_group
from tests import tiny
from tests.groups import ROOT, become_rank, exit_codes, fork_context, free_port, redirect
from tests.test_end_to_end import PRETRAIN
from training import run_lock

QUICK = ["--batch_size", "3", "--epochs", "1", "--kernels", "torch", "--print_freq", "1"]
QUICK += ["--log_dir", "none"]
TIMEOUT_S = 30.0  # on a busy machine; without the watch ranks wait for an hour or forever


def run_program(
    program: Callable, rank: int, size: int, port: int, output: Path, folder: Path
) -> None:
    """Run `program` on a rank as a script runs its main."""
    become_rank(rank, size, port)
    redirect(1, output)
    redirect(2, output)
    sys.argv = ["program.py"]
    failure.POLL_S, failure.GRACE_S, failure.LOST_S = 0.25, 2.0, 6.0
    process_group.launch(program, SimpleNamespace(rank=rank, folder=folder))


class Ranks:
    """Processes that run `program`, and their output; `files` are for the program to read."""

    def __init__(self, program: Callable, place: Path, size: int = 2, **files: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix=program.__name__, dir=place))
        for name, number in files.items():
            (folder / name).write_text(str(number))
        self.folder, port, context = folder, free_port(), fork_context()
        each = [(program, rank, size, port, folder / f"{rank}.txt", folder) for rank in range(size)]
        self.processes = [context.Process(target=run_program, args=args) for args in each]
        for process in self.processes:
            process.start()

    def end(self) -> list[int]:
        """Return the exit codes; all must end in time."""
        codes = exit_codes(self.processes, TIMEOUT_S)
        late = [self.output(rank) for rank, code in enumerate(codes) if code is None]
        assert not late, f"these ranks did not end: {late}"
        return codes

    def output(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()

    def wait_for(self, name: str) -> None:
        """Wait until a rank has made the file `name`."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, self.output(0)
            time.sleep(0.02)


# --- programs of the ranks ----------------------------------------------------------------------


def join() -> None:
    process_group.init_distributed_mode("cpu")
    dist.barrier()


def loop() -> None:
    """Run without communication between ranks."""
    while True:
        time.sleep(0.01)


def one_fails_during_a_collective(args: SimpleNamespace) -> None:
    join()
    if args.rank == 1:
        raise ZeroDivisionError("for a reason")
    process_group.all_reduce_sum(torch.ones(1))


def last_fails_during_loops(args: SimpleNamespace) -> None:
    join()
    if args.rank == 2:
        raise ZeroDivisionError("for a reason")
    loop()


def first_fails_during_a_loop(args: SimpleNamespace) -> None:
    join()
    if args.rank == 0:
        raise ZeroDivisionError("for a reason")
    loop()


def one_fails_during_a_loop(args: SimpleNamespace) -> None:
    join()
    failure.GRACE_S = 3.0  # longer than a rank needs to end
    if args.rank == int((args.folder / "failed").read_text()):
        raise ZeroDivisionError("for a reason")
    loop()


def one_fails_during_a_blocking_call(args: SimpleNamespace) -> None:
    """The call blocks like nccl, which does not notice that another rank has ended."""
    join()
    if args.rank == 1:
        raise ZeroDivisionError("for a reason")
    process_group._stores[0].get("key that is never set")


def user_error_of_one(args: SimpleNamespace) -> None:
    join()
    if args.rank == 1:
        raise UserError("got 3, expected 4")
    process_group.all_reduce_sum(torch.ones(1))


def stop_of_one(args: SimpleNamespace) -> None:
    join()
    if args.rank == 1:
        raise TrainingStopped("a loader process died")
    loop()


def no_device_for_one(args: SimpleNamespace) -> None:
    process_group.init_distributed_mode("cpu" if args.rank == 0 else "tpu")


def user_error_of_all(args: SimpleNamespace) -> None:
    join()
    first = int((args.folder / "first").read_text())
    time.sleep(0.7 * (args.rank != first))  # ranks meet the same error at different times
    raise UserError("got 3, expected 4")


def user_errors_that_differ(args: SimpleNamespace) -> None:
    join()
    time.sleep(0.7 * (args.rank != 1))
    raise UserError(f"got {args.rank}")


def exits(args: SimpleNamespace) -> None:
    join()
    code = int((args.folder / "code").read_text())
    if args.rank == 1 or code == 0:
        sys.exit(code)
    loop()


def one_is_done_before(args: SimpleNamespace) -> None:
    join()
    if args.rank == int((args.folder / "longest").read_text()):
        time.sleep(failure.GRACE_S + 1)
    print("done")


def killed(args: SimpleNamespace) -> None:
    """Wait to be killed, in a collective if the file `meets` exists. Rank 0 serves the store."""
    join()
    (args.folder / f"ready-{args.rank}").touch()
    while True:
        if (args.folder / "meets").exists():
            process_group.all_reduce_sum(torch.ones(1))
        time.sleep(0.01)


class Stuck(tiny.Colors):
    """Loading an image but the first never ends; its process writes its number into a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(8)
        self.file = file

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        if key[1] == 0:
            return super().__getitem__(0)
        self.file.with_suffix(".tmp").write_text(str(os.getpid()))
        self.file.with_suffix(".tmp").rename(self.file)
        signal.pause()


def folder_and_loaders(args: SimpleNamespace) -> None:
    """Fail on rank 1 while rank 0 holds the run folder and both ranks have a loader process."""
    join()
    run_lock.acquire_run_lock(str(args.folder / "run"))
    data = Stuck(args.folder / f"loader-{args.rank}")
    options = {"collate_fn": list, "prefetch_factor": 1, "multiprocessing_context": "fork"}
    batches = iter(WatchedLoader(data, [(0, 0), (0, 1)], 1, 1, **options))
    next(batches)
    if args.rank == 0:
        next(batches)
    while not all((args.folder / f"loader-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.02)
    raise ZeroDivisionError("for a reason")


def pretrain(args: SimpleNamespace, *words: str) -> None:
    words = [*PRETRAIN, *QUICK, "--output_dir", str(args.folder / "run"), *words]
    main_pretrain.main(options.parse(main_pretrain.get_args_parser(), words))


def pretrain_what_one_cannot_read(args: SimpleNamespace) -> None:
    pretrain(args, "--data_set", "tests.tiny:fails", "--picture_freq", "0")


def rank_without_others(args: SimpleNamespace) -> None:
    process_group.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    os.environ["WORLD_SIZE"] = "2"
    process_group.init_distributed_mode("cpu")


# --- exit codes and output --------------------------------------------------------------------


FAILING = {  # the rank that fails and the number of ranks; all cases run at once, as they wait
    one_fails_during_a_collective: (1, 2),
    one_fails_during_a_blocking_call: (1, 2),
    first_fails_during_a_loop: (0, 2),
    last_fails_during_loops: (2, 3),
}


def test_error_of_one_rank_ends_all(tmp_path):
    cases = [Ranks(program, tmp_path, size) for program, (_, size) in FAILING.items()]
    for started, (failed, size) in zip(cases, FAILING.values(), strict=True):
        assert started.end() == [1] * size, started.folder
        for rank in range(size):
            output = started.output(rank)
            if rank == failed:
                assert output.startswith(f"[rank {rank}] Traceback (most recent call last):\n")
                assert output.endswith(f"[rank {rank}] ZeroDivisionError: for a reason\n")
            else:
                why = f"rank {failed} has failed: ZeroDivisionError: for a reason"
                assert output == f"program.py: error [rank {rank}]: {why}\n"


USER_ERRORS = {
    user_error_of_one: (2, "got 3, expected 4"),
    stop_of_one: (1, "a loader process died"),
    no_device_for_one: (2, "--device tpu is not available; expected auto, cpu"),
}


def test_user_error_of_one_rank_is_one_line_on_all(tmp_path):
    cases = [Ranks(program, tmp_path) for program in USER_ERRORS]
    for started, (code, why) in zip(cases, USER_ERRORS.values(), strict=True):
        assert started.end() == [code, code], started.folder
        assert started.output(1) == f"program.py: error [rank 1]: {why}\n"
        assert started.output(0) == f"program.py: error [rank 0]: rank 1 has failed: {why}\n"


@pytest.mark.parametrize("first", [0, 1])
def test_same_error_of_all_ranks_is_printed_by_the_first_and_by_rank_0(tmp_path, first):
    """1,024 ranks must not print it 1,024 times, and people read the log of rank 0."""
    started = Ranks(user_error_of_all, tmp_path, size=3, first=first)
    assert started.end() == [2, 2, 2]
    for rank in range(3):
        line = f"program.py: error [rank {rank}]: got 3, expected 4\n"
        assert started.output(rank) == (line if rank in (0, first) else "")


def test_first_error_is_on_every_rank_before_its_own(tmp_path):
    started = Ranks(user_errors_that_differ, tmp_path)
    assert started.end() == [2, 2]
    assert started.output(1) == "program.py: error [rank 1]: got 1\n"
    first = "program.py: error [rank 0]: rank 1 has failed: got 1\n"
    assert started.output(0) == first + "program.py: error [rank 0]: got 0\n"


def test_no_rank_ends_before_all_have_printed_the_error(tmp_path):
    """Launchers kill the others when the first rank ends."""
    cases = [Ranks(one_fails_during_a_loop, tmp_path, failed=failed) for failed in (0, 1)]
    for failed, started in enumerate(cases):
        started.processes[failed].join(TIMEOUT_S)
        for process in started.processes:
            process.kill()
        assert f"rank {failed} has failed: ZeroDivisionError" in started.output(1 - failed)
        assert started.end()[failed] == 1


@pytest.mark.parametrize("code", [3, 0])
def test_rank_that_exits_by_itself_ends_the_others(tmp_path, code):
    """A data set's code may call sys.exit; the others must not wait for that rank."""
    started = Ranks(exits, tmp_path, code=code)
    assert started.end() == [code, code]
    why = "rank 1 has failed: SystemExit: 3"
    assert started.output(0) == (f"program.py: error [rank 0]: {why}\n" if code else "")


@pytest.mark.slow
def test_torchrun_on_two_machines_ends_on_both(tmp_path):
    """torchrun itself ends only the processes of the machine of the failed rank."""
    program = tmp_path / "program.py"
    program.write_text(
        "from types import SimpleNamespace\n"
        "import os, utils\n"
        "from tests.parallel.test_failure import last_fails_during_loops\n"
        "utils.launch(last_fails_during_loops, SimpleNamespace(rank=int(os.environ['RANK'])))\n"
    )
    words = ["--nnodes", "2", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(free_port())]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, "--node_rank", node, program],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in "01"
    ]
    codes, _, errors = ends(agents)
    assert codes == [1, 1]
    assert "[rank 2] ZeroDivisionError: for a reason" in errors[1]
    assert "error [rank 0]: rank 2 has failed: ZeroDivisionError: for a reason" in errors[0]
    assert "error [rank 1]: rank 2 has failed: ZeroDivisionError: for a reason" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "meets"), [(0, False), (0, True), (1, True)])
def test_rank_that_is_killed_ends_the_others(tmp_path, number, meets):
    started = Ranks(killed, tmp_path, **({"meets": 1} if meets else {}))
    for rank in (0, 1):
        started.wait_for(f"ready-{rank}")
    started.processes[number].kill()
    other = 1 - number
    assert started.end()[other] == 1
    expected = "(?i)gloo" if meets else "rank 0 is gone: killed, out of memory"
    assert f"[rank {other}]" in started.output(other)
    assert re.search(expected, started.output(other))


def test_rank_that_is_done_first_does_not_end_the_others(tmp_path):
    cases = [Ranks(one_is_done_before, tmp_path, longest=longest) for longest in (0, 1)]
    for started in cases:
        assert started.end() == [0, 0]
        assert [started.output(rank) for rank in (0, 1)] == ["done\n", "done\n"]


def test_failed_ranks_release_the_run_folder_and_end_their_loaders(tmp_path):
    started = Ranks(folder_and_loaders, tmp_path)
    assert started.end() == [1, 1]
    assert not (started.folder / "run" / ".lock").exists()
    why = "rank 1 has failed: ZeroDivisionError: for a reason"
    assert started.output(0) == f"program.py: error [rank 0]: {why}\n"
    assert started.output(1).count("Traceback") == 1
    for rank in (0, 1):
        assert not _runs(int((started.folder / f"loader-{rank}").read_text()))


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_training_that_fails_on_one_rank_ends_on_all(tmp_path):
    started = Ranks(pretrain_what_one_cannot_read, tmp_path)
    assert started.end() == [2, 2]
    error = "image number [0-9]+: ZeroDivisionError: of rank 1"
    assert re.search(rf"error \[rank 1\]: {error}\nThe data set raised it:", started.output(1))
    assert re.search(
        rf"program.py: error \[rank 0\]: rank 1 has failed: {error} The data set .*\n$",
        started.output(0),
    )
    assert "Traceback" not in started.output(0)
    assert "step 1/" in started.output(0)
    assert not (started.folder / "run" / ".lock").exists()
    kept = (started.folder / "run" / "console.log").read_text()
    assert kept.endswith(started.output(0))  # with the error of the other rank


def test_missing_ranks_are_a_user_error(tmp_path):
    started = Ranks(rank_without_others, tmp_path, size=1)
    assert started.end() == [2]
    assert "rank 0: rendezvous of 2 processes at 127.0.0.1:" in started.output(0)
    assert "not all joined within 0:00:01" in started.output(0)
    assert "Traceback" not in started.output(0)


# --- the scripts ----------------------------------------------------------------------------


def start_script(places: list[Path], script: str, *words: object) -> list[subprocess.Popen]:
    """Start one rank in each folder."""
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, str(place / script), *map(str, words)],
            cwd=place,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(len(places)), "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            **pipes,
        )
        for rank, place in enumerate(places)
    ]


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Return exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=2 * TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, errors = zip(*outputs, strict=True)
    return [process.returncode for process in processes], list(out), list(errors)


@pytest.mark.slow
def test_script_without_error_prints_nothing_to_stderr(tmp_path):
    words = [*PRETRAIN, *QUICK, "--output_dir", tmp_path / "run"]
    codes, out, errors = ends(start_script([ROOT] * 2, "main_pretrain.py", *words))
    assert codes == [0, 0]
    assert "1 of 1 epoch done" in out[0]
    assert out[1] == ""
    assert errors == ["", ""]
