# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Jobs in a real SLURM of two nodes: submitted, signaled, requeued, canceled.  make test-slurm"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel import slurm
from tests.slurm.cluster import ask
from tests.test_end_to_end import FINETUNE, ROOT, assert_same, log, run, weights
from tests.test_end_to_end import PRETRAIN as PRETRAIN_AUTO

NODES = ["--nodes", 2, "--ngpus", 0, "--cpus_per_task", 1, "--timeout", 10]
SIX = ["--batch_size", 3, "--epochs", 6]  # 24 steps on two ranks
# Runs whose weights are compared must not choose kernels by timing, each beside other work.
PRETRAIN = [*PRETRAIN_AUTO, "--kernels", "torch"]
SLOW = ["--picture_freq", 0, "--probe_every", 0]  # pictures and probes read images too
SLOW += ["--save_ckpt_every_steps", 1]
SLOW += ["--data_set", "tests.tiny:slow", "--data_path"]


class Job:
    """A submitted job and its folder."""

    def __init__(self, number: str, folder: Path) -> None:
        self.number, self.folder = number, folder

    def state(self) -> str:
        """Return SLURM's state of the job, '' if SLURM does not answer, as on a busy machine."""
        try:
            return slurm.state(self.number)
        except (RuntimeError, subprocess.TimeoutExpired):
            return ""

    def restarts(self) -> int:
        found = re.search(r"Restarts=(\d+)", ask("scontrol", "show", "job", self.number))
        return int(found[1]) if found else -1

    def output(self, kind: str = "out") -> str:
        path = self.folder / f"{self.number}_0_log.{kind}"
        return path.read_text() if path.exists() else ""

    def describe(self) -> str:
        shown = ask("scontrol", "show", "job", self.number)
        log = Path(os.environ["SLURM_CONF"]).with_name("ctld.log").read_text()
        lines = [line for line in log.splitlines() if f"JobId={self.number}" in line]
        return "\n".join([shown, *lines[-40:], self.output(), self.output("err")])

    def until(self, ready: Callable[[], object], what: str, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                pytest.fail(f"never: {what}\n{self.describe()}")
            time.sleep(0.2)

    def until_stuck(self) -> None:
        """Wait for the first step of the second epoch, which SLOW 60,1,12 makes slow."""
        self.until(lambda: "slow from here" in self.output(), "a slow step")
        assert (self.folder / "checkpoint-0.pth").exists()

    def end(self) -> str:
        self.until(lambda: self.state() in slurm.ENDS, "an end")
        return self.state()

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the weights of the job's last checkpoint."""
        assert self.end() == "COMPLETED", self.describe()
        return weights(max(self.folder.glob("checkpoint-?.pth")))


def submit(place: Path, script: str, *words: object, at: str = "%j") -> list[Job]:
    done = run(script, *words, "--job_dir", place / at)
    numbers = re.findall(r"^job (\w+)", done.stdout, re.MULTILINE)
    return [Job(number, place / at.replace("%j", number)) for number in numbers]


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def sweep(place) -> list[Job]:
    """An array of jobs that take two steps, one in each start."""
    for seed in (0, 5):
        (place / f"s{seed}.yaml").write_text(f"# toy\nscript: main_pretrain\nseed: {seed}\n")
    words = [*PRETRAIN, *NODES, "--nodes", 1, "--max_minutes", 0.0001, "--epochs", 1]
    words += ["--array", f"{place}/s0.yaml,{place}/s5.yaml", "--batch_size", 13]
    return submit(place, "submitit_pretrain.py", *words, at="sweep")


@pytest.fixture(scope="module")
def long(place, sweep) -> dict[str, Job]:
    """Slow jobs, submitted together."""
    a_step_a_start = ["--max_minutes", 0.0001, "--epochs", 3, "--exclude", "n2"]
    words = {
        "out of time": [*SIX, *SLOW, "1,1,0", *NODES, "--timeout", 2, "--signal_delay", 60],
        "whole": [*SIX, *NODES],
        "ten times": [*NODES, "--nodes", 1, *a_step_a_start],
        "requeued": [*SIX, *SLOW, "60,1,12", *NODES],
    }
    return {
        name: submit(place, "submitit_pretrain.py", *PRETRAIN, *more)[0]
        for name, more in words.items()
    }


@pytest.fixture(scope="module")
def whole(long) -> dict[str, torch.Tensor]:
    """Weights of an uninterrupted job."""
    return long["whole"].finish()


def test_two_nodes_train_as_torchrun_does(long, whole, tmp_path):
    """Two single-process copies of the run would train too."""
    assert long["whole"].restarts() == 0
    assert "NodeList=n[1-2]" in ask("scontrol", "show", "job", long["whole"].number)
    run("main_pretrain.py", *PRETRAIN, *SIX, "--output_dir", tmp_path, torchrun=2)
    assert_same(weights(tmp_path / "checkpoint-5.pth"), whole)


def test_srun_needs_no_torchrun(whole, tmp_path):
    """Once they met on the machine where srun was started, on which none of them ran."""
    words = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable]
    code = "import os; from parallel.environment import read_launcher as read; "
    code += "print(*read(), os.environ['MASTER_ADDR'])"
    assert sorted(ask(*words, "-c", code).splitlines()) == ["0 2 0 n1", "1 2 0 n1"]
    words += [ROOT / "main_pretrain.py", *PRETRAIN, *SIX, "--output_dir", tmp_path]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # as `run` has it
    subprocess.run(list(map(str, words)), cwd=ROOT, env=one, check=True, capture_output=True)
    assert_same(weights(tmp_path / "checkpoint-5.pth"), whole)


def test_requeued_from_outside_before_it_could_save(long, whole):
    """SLURM kills it KillWait seconds after its signal; a step takes longer."""
    job = long["requeued"]
    job.until_stuck()
    ask("scontrol", "requeue", job.number)
    assert_same(job.finish(), whole)
    assert job.restarts() == 1
    assert "asked to stop" not in job.output()
    assert job.output().count("resumed from") == 1


def test_canceled_job_saves_and_stays_canceled(place):
    """scancel sends the signal of a preemption, after which a job is requeued."""
    job = submit(place, "submitit_pretrain.py", *PRETRAIN, *SIX, *SLOW, "0.5,9,0", *NODES)[0]
    job.until(lambda: " step 2/" in job.output(), "steps")
    ask("scancel", job.number)
    job.until(lambda: "did not requeue" in job.output(), "the end")
    assert (job.end(), job.restarts()) == ("CANCELLED", 0)
    step = int(re.search(r"asked to stop \(SIGTERM\) at step (\d+)", job.output())[1])
    files = [torch.load(path, weights_only=True) for path in job.folder.glob("checkpoint-*.pth")]
    assert max(file["state"]["global_step"] for file in files) == step


def test_signal_before_the_first_epoch_requeues_too(place):
    job = submit(place, "submitit_pretrain.py", *PRETRAIN, *SLOW, "9,1,0", *NODES)[0]
    job.until(lambda: "effective batch" in job.output(), "a start")
    ask("scancel", "--signal=USR2", job.number)
    assert job.end() == "COMPLETED"
    assert job.restarts() == 1
    assert "received SIGUSR2 outside the training loop" in job.output()


def test_array_runs_each_recipe_in_its_own_folder(place, whole, tmp_path):
    for seed in (0, 5):
        text = f"# toy\nscript: main_pretrain\nseed: {seed}\n"
        (tmp_path / f"seed{seed}.yaml").write_text(text)
    array = ["--array", f"{tmp_path}/seed0.yaml,{tmp_path}/seed5.yaml", *SIX, *NODES]
    jobs = submit(place, "submitit_pretrain.py", *PRETRAIN, *array)
    assert [job.number[-2:] for job in jobs] == ["_0", "_1"]
    same, other = (job.finish() for job in jobs)
    assert_same(same, whole)
    assert any(not torch.equal(other[name], value) for name, value in same.items())


def test_each_job_of_an_array_requeues_itself(sweep, place):
    """Without %j it resumes in the folder named after its recipe."""
    assert [job.end() for job in sweep] == ["COMPLETED"] * 2
    assert all(job.restarts() > 0 for job in sweep)
    assert all((place / "sweep" / f"s{seed}" / "checkpoint-0.pth").exists() for seed in (0, 5))


def test_finetuning_waits_for_the_pretraining_and_is_followed_to_its_end(long, place):
    before = long["whole"]
    words = [*FINETUNE, "--batch_size", 3, "--finetune", before.folder, *NODES, "--follow"]
    words += ["--dependency", f"afterok:{before.number}", "--job_dir", place / "%j"]
    done = run("submitit_finetune.py", *words)
    folder = place / re.search(r"job (\d+);", done.stdout)[1]
    assert "epoch 2/2 done" in done.stdout
    assert done.stdout.rstrip().endswith("COMPLETED")
    assert [entry["epoch"] for entry in log(folder)] == [0, 1]


def test_job_that_fails_is_followed_to_its_error(place):
    words = [*PRETRAIN, "--batch_size", 40, *NODES, "--follow", "--job_dir", place / "%j"]
    done = run("submitit_pretrain.py", *words, expect=1)
    assert "FAILED" in done.stdout
    assert "error [rank 0]: 26 training images, but one global batch takes 80" in done.stdout
    assert "Traceback" not in done.stdout


def test_error_of_another_rank_is_followed_too(place):
    """Once srun killed rank 0 before it had printed the error of rank 1."""
    words = [*PRETRAIN, *NODES, "--follow", "--job_dir", place / "%j", "--picture_freq", 0]
    words += ["--data_set", "tests.tiny:fails", "--batch_size", 3]
    done = run("submitit_pretrain.py", *words, expect=1)
    error = "image number [0-9]+: ZeroDivisionError: of rank 1"
    assert re.search(rf"error \[rank 0\]: rank 1 has failed: {error} The data set", done.stdout)
    number = re.search(r"^job (\d+);", done.stdout)[1]
    own = (place / number / f"{number}_1_log.err").read_text()
    assert re.search(rf"error \[rank 1\]: {error}\nThe data set raised it:\n", own)


def test_script_of_a_dry_run_is_one_that_sbatch_takes(cluster, tmp_path):
    words = [*PRETRAIN, *NODES, "--job_dir", tmp_path / "%j", "--dry_run"]
    (tmp_path / "a.sh").write_text(run("submitit_pretrain.py", *words).stdout)
    before = ask("squeue", "-h", "-t", "all", "-o", "%i")
    subprocess.run(["sbatch", "--test-only", tmp_path / "a.sh"], check=True, capture_output=True)
    assert ask("squeue", "-h", "-t", "all", "-o", "%i") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.sh"]


def test_refusal_by_slurm_is_one_line(cluster, tmp_path):
    words = [*PRETRAIN, *NODES, "--partition", "nowhere", "--job_dir", tmp_path / "%j"]
    done = run("submitit_pretrain.py", *words, expect=2)
    assert "SLURM refused the job" in done.stderr
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr


def test_tenth_requeue_resumes_too(long, tmp_path):
    """submitit requeues three times, and writes its pickle again each time, which lost it."""
    weights_of_job = long["ten times"].finish()
    assert long["ten times"].restarts() >= 10
    run("main_pretrain.py", *PRETRAIN, "--epochs", 3, "--output_dir", tmp_path)
    assert_same(weights(tmp_path / "checkpoint-2.pth"), weights_of_job)


def test_job_at_its_time_limit_saves_and_resumes_to_the_same_weights(long, whole):
    job = long["out of time"]
    assert_same(job.finish(), whole)
    assert job.restarts() >= 1  # on a busy machine its second start may time out too
    assert "asked to stop (SIGUSR2)" in job.output()


def test_failure_of_a_node_costs_at_most_one_step(place, whole):
    words = [*PRETRAIN, *SIX, *SLOW, "60,1,12", *NODES]
    job = submit(place, "submitit_pretrain.py", *words)[0]
    job.until_stuck()
    ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.until(lambda: job.restarts() == 1, "a restart")
    ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert_same(job.finish(), whole)
    assert "resumed from" in job.output()
