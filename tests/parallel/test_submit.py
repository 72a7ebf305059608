# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of submitit_*.py, the job for sbatch, and jobs on this machine.

With a real SLURM: slurm/test_jobs.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import parser as options
from errors import EXIT_REQUEUE
from parallel import slurm, submit
from tests.test_end_to_end import PRETRAIN, ROOT, assert_same, run, weights

LOCAL = ["--cluster", "local", "--follow"]


def read(*words: str) -> list:
    parser = options.pretrain_parser()
    options.add_submitit_args(parser)
    return submit.read_runs(parser, ["--data_set", "DIGITS", *words])


def script(*words: str) -> list[str]:
    return submit.script("main_pretrain", read(*words)).splitlines()


# --- parameters of sbatch -------------------------------------------------------------------

SBATCH = {
    "--nodes 8": "--nodes=8",
    "--ngpus 4": "--gpus-per-node=4",
    "--ngpus 3": "--ntasks-per-node=3",
    "--ngpus 0 --tasks_per_node 2": "--ntasks-per-node=2",
    "--timeout 90": "--time=90",
    "--signal_delay 300": "--signal=USR2@300",
    "--partition gpu": "--partition=gpu",
    "--account us": "--account=us",
    "--qos high": "--qos=high",
    "--constraint a100": "--constraint=a100",
    "--use_volta32": "--constraint=volta32gb",
    "--constraint ib --use_volta32": "--constraint='ib&volta32gb'",
    "--exclude n[1-3]": "--exclude='n[1-3]'",
    "--cpus_per_task 6": "--cpus-per-task=6",
    "--mem_gb 1.5": "--mem=1536M",
    "--gres gpu:a100:4,nvme:1 --ngpus 4": "--gres=gpu:a100:4,nvme:1",
    "--dependency afterok:12": "--dependency=afterok:12",
    "--comment note": "--comment=note",
    "--array tiny_pretrain,base_pretrain --data_path D": "--array=0-1%2",
    "": "--requeue",  # the cluster's default may be not to
}


@pytest.mark.parametrize("words", SBATCH)
def test_flag_becomes_a_parameter_of_sbatch(words):
    assert f"#SBATCH {SBATCH[words]}" in script(*words.split())


def test_defaults_are_the_official_ones_without_names_of_a_cluster():
    lines = script()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --time=4320"} <= set(lines)
    text = "\n".join(lines)
    for word in ("partition", "volta", "account", "mem=", "wckey", "gres", "constraint"):
        assert word not in text
    assert f"--output={os.getcwd()}/runs/%j/%j_0_log.out" in text


def test_no_gpu_is_requested_with_ngpus_0():
    text = "\n".join(script("--ngpus", "0", "--tasks_per_node", "2"))
    assert "gpu" not in text.replace(str(Path.cwd()), "")
    args = read("--ngpus", "0")[0]
    assert (args.device, args.tasks_per_node) == ("cpu", 1)


def test_gpus_in_gres_are_not_requested_twice():
    text = "\n".join(script("--gres", "gpu:2", "--ngpus", "2"))
    assert "gpus-per-node" not in text


def test_srun_gets_the_cores_and_ends_all_ranks_with_one():
    """Since SLURM 22.05 srun ignores the cores of sbatch."""
    line = next(line for line in script("--cpus_per_task", "6") if line.startswith("srun "))
    assert "--cpus-per-task=6" in line
    assert "--kill-on-bad-exit=1" in line


def test_gpus_of_gres_are_the_processes():
    (args,) = read("--gres", "gpu:a100:4,nvme:1")
    assert (args.ngpus, args.tasks_per_node) == (4, 4)


# --- refused --------------------------------------------------------------------------------

REFUSED = {
    "--ngpus 8 --tasks_per_node 4": "each process takes one GPU",
    "--ngpus 0 --device cuda": "and --ngpus 0 asks for none",
    "--timeout 1": "--signal_delay 120 s is all of --timeout 1 min",
    "--job_dir runs/%A": "% is only allowed in %j",
    "--gres gpu:4 --ngpus 8": "has 4 GPUs and --ngpus 8",
    "--cluster local --partition gpu": "--partition has no effect with --cluster local",
    "--cluster local --mem_gb 4": "--mem_gb has no effect with --cluster local",
    "--cluster local --dry_run": "--dry_run has no effect with --cluster local",
    "--cluster local --nodes 2": "is one machine, --nodes 2",
    "--cluster local --auto_resume false": "cannot restart a job with --auto_resume false",
    "--cluster debug --ngpus 2": "is one process, not 2",
    "--cluster debug --timeout 5": "--timeout has no effect with --cluster debug",
    "--array tiny_pretrain,tiny_pretrain": "names a recipe twice",
    "--array tiny_pretrain --recipe base_pretrain": "both name recipes",
    "--array tiny_ft": "this file is for main_finetune.py",
    "--array tiny_pretrian": "Did you mean 'tiny_pretrain'",
    "--array tiny_pretrain,base_pretrain --output_dir O": "is one folder for 2 jobs; put %j in it",
}


@pytest.mark.parametrize("words", REFUSED)
def test_flags_without_effect_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        read(*words.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--" + REFUSED[words].removeprefix("--") in error or REFUSED[words] in error
    assert len(error.splitlines()) == 2  # with a hint to --help


def test_job_knows_which_flags_were_given_and_has_its_folder():
    """Flags that nobody gave are taken from a checkpoint; none writes nothing."""
    words = ["--data_set", "DIGITS", "--lr", "0.1", "--job_dir", "jobs/%j"]
    for given, folder in ((), "jobs/12"), (("none",), ""), (("o",), "o"):
        (args,) = read(*words, *(f"--output_dir={name}" for name in given))
        flags = slurm.Trainer("main_pretrain", args)._flags("12")
        assert flags.output_dir == folder
        assert {"data_set", "lr", "output_dir"} <= flags.given
        assert "model" not in flags.given


def test_array_without_job_number_has_a_folder_for_each_recipe():
    words = ["--array", "tiny_pretrain,base_pretrain", "--data_path", "D"]
    assert [args.output_dir for args in read(*words)] == [None] * 2  # each job uses its number
    fixed = read(*words, "--job_dir", "sweep")
    assert [args.output_dir for args in fixed] == ["sweep/tiny_pretrain", "sweep/base_pretrain"]
    assert [args.model for args in fixed] == ["convnextv2_tiny", "convnextv2_base"]
    for none in ("none", ""):  # they write nothing
        unsaved = read(*words, "--job_dir", "sweep", f"--output_dir={none}")
        assert [args.output_dir for args in unsaved] == [""] * 2


def test_without_sbatch_only_a_dry_run_works(tmp_path):
    words = [*PRETRAIN, "--job_dir", tmp_path / "%j"]
    done = run("submitit_pretrain.py", *words, expect=2, env={"PATH": ""})
    assert "error: sbatch is not on this machine; submit on a login node" in done.stderr
    done = run("submitit_pretrain.py", *words, "--dry_run", env={"PATH": ""})
    assert done.stdout.startswith("#!/bin/bash")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that makes a shell script, first in PATH: program(name, text)."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def make(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    return make


# --- requeuing ------------------------------------------------------------------------------


class SlurmJob(SimpleNamespace):
    """A stand-in for submitit's JobEnvironment in a SLURM job."""

    def name(self) -> str:
        return "slurm"


@pytest.fixture
def handlers():
    before = {kind: signal.getsignal(kind) for kind in slurm.WARNINGS}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def requeue(rank: int = 0, folder: Path | str = "") -> int:
    return slurm.requeue(SlurmJob(global_rank=rank, job_id="12"), str(folder))


SHOW = 'if [ "$1" = show ]; then echo "JobId=12 JobState=%s Reason=None"; exit; fi; '


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_only_a_running_job_is_requeued(program, handlers, state, tmp_path):
    """scancel sends the same signal as a preemption."""
    program("scontrol", SHOW % state + f"touch {tmp_path}/requeued")
    assert requeue() == EXIT_REQUEUE
    assert not (tmp_path / "requeued").exists()


def test_only_rank_0_requeues_and_the_others_do_not_end_it_first(program, handlers, tmp_path):
    program("scontrol", SHOW % "RUNNING" + f'echo "$@" >> {tmp_path}/requeued')
    assert requeue(rank=1) == 0
    assert not (tmp_path / "requeued").exists()
    assert requeue() == EXIT_REQUEUE
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_job_that_never_saves_is_not_requeued_for_ever(
    program, handlers, tmp_path, capsys, monkeypatch
):
    """If the start takes longer than --timeout, the next one does so too."""
    program("scontrol", SHOW % "RUNNING")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-0.pth").touch()  # of another run
    for restarts, folder, expected in (
        ("8", "run", "requeued job 12"),
        ("9", "run", "did not requeue job 12, since it has saved nothing in 10 starts; raise"),
        ("9", "", "did not requeue job 12"),
        ("99", tmp_path, "requeued job 12"),
    ):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert requeue(folder=folder) == EXIT_REQUEUE
        assert "".join(capsys.readouterr()).startswith(expected)


def test_job_that_is_done_ignores_warnings(handlers, monkeypatch):
    """Python's shutdown restores the default handlers, which end the process."""
    monkeypatch.setattr("submitit.JobEnvironment", lambda: SlurmJob(global_rank=0, job_id="12"))
    environment = SimpleNamespace(export=lambda **options: None)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", lambda: environment)
    flags = []
    monkeypatch.setattr("parallel.process_group.launch", lambda main, args: flags.append(args))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("MASTER_PORT", "1")
    slurm.Trainer("main_pretrain", read("--input_size", "64")[0])()
    assert flags[0].given >= {"input_size", "output_dir"}  # a checkpoint must not replace them
    assert "patch_size" not in flags[0].given
    assert [signal.getsignal(kind) for kind in slurm.WARNINGS] == [signal.SIG_IGN] * 3


def test_requeue_is_tried_again_when_scontrol_fails(
    program, handlers, tmp_path, capsys, monkeypatch
):
    """The controller may be busy for a moment."""
    monkeypatch.setattr(slurm, "POLL_S", 0)
    fail = f"[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; echo Socket timed out; exit 1; }}"
    program("scontrol", SHOW % "RUNNING" + fail)
    assert requeue() == EXIT_REQUEUE
    assert "requeued job 12" in capsys.readouterr().out


def test_job_that_cannot_be_requeued_says_how_to_continue(program, handlers, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "POLL_S", 0)
    program("scontrol", SHOW % "RUNNING" + "echo Access denied >&2; exit 1")
    assert requeue() == EXIT_REQUEUE
    assert "job 12 could not be requeued: Access denied; what it" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert requeue() == EXIT_REQUEUE
    assert "No such file or directory: 'scontrol'" in capsys.readouterr().err


def test_state_of_a_job_that_slurm_has_forgotten(program):
    program("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.state("12") == "GONE"
    program("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RuntimeError, match="Unable to contact"):
        slurm.state("12")


def test_job_without_a_log_names_the_file_system(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "POLL_S", 0)
    program("scontrol", SHOW % "FAILED")
    paths = SimpleNamespace(stdout=tmp_path / "a.out", stderr=tmp_path / "a.err")
    assert not slurm.follow([SimpleNamespace(job_id="12", paths=paths)], "slurm")
    assert (
        "must be on a file system that this machine and the nodes share" in capsys.readouterr()[0]
    )


def test_log_is_shown_in_complete_lines(tmp_path, capsys):
    printed = slurm.print_lines(tmp_path / "log", 0)
    for text in ("one\ntw", "o\n", "\xc3\n"):
        with open(tmp_path / "log", "a", encoding="latin-1") as file:
            file.write(text)
        printed = slurm.print_lines(tmp_path / "log", printed, "12: ")
    assert capsys.readouterr().out == "12: one\n12: two\n12: \ufffd\n"


# --- jobs on this machine -------------------------------------------------------------------


@pytest.mark.slow
def test_preempted_local_job_is_requeued_and_ends_with_the_same_weights(tmp_path):
    """SIGTERM to submitit's controller works like a preemption."""
    slow = ["--data_set", "tests.tiny:slow", "--data_path", "0.1,9,0", "--batch_size", 3]
    words = [*PRETRAIN, *slow, "--ngpus", 2, "--job_dir", tmp_path / "%j", "--cluster", "local"]
    words += ["--kernels", "torch"]  # the fastest may differ between two runs
    command = [sys.executable, ROOT / "submitit_pretrain.py", *words]
    with open(tmp_path / "stdout", "w") as file:  # a pipe would stay open until the job ends
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), cwd=ROOT, stdout=file, env=env, check=True)
    number = re.search(r"^job (\d+);", (tmp_path / "stdout").read_text())[1]
    log = tmp_path / number / f"{number}_0_log.out"
    wait(lambda: log.exists() and " step 2/" in log.read_text())
    os.kill(int(number), signal.SIGTERM)
    wait(lambda: "2 of 2 epochs done" in log.read_text())
    assert "asked to stop (SIGTERM)" in log.read_text()
    assert "resumed from" in log.read_text()
    words = [*PRETRAIN, "--batch_size", 3, "--kernels", "torch", "--output_dir", tmp_path / "whole"]
    run("main_pretrain.py", *words, ranks=2)
    newest = "checkpoint-1.pth"
    assert_same(weights(tmp_path / number / newest), weights(tmp_path / "whole" / newest))


def wait(ready, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_local_job_is_followed_to_its_end(tmp_path):
    words = [*PRETRAIN, *LOCAL, "--epochs", 1, "--job_dir", tmp_path / "job"]
    done = run("submitit_pretrain.py", *words)
    assert "epoch 1/1 done" in done.stdout
    assert done.stdout.rstrip().endswith("COMPLETED")
    assert (tmp_path / "job" / "checkpoint-0.pth").exists()  # a folder without %j
    words[-1] = tmp_path / "other"
    done = run("submitit_pretrain.py", *words, "--batch_size", 40, expect=1)
    assert "error: 26 training images" in done.stdout
    assert "Traceback" not in done.stdout


def test_debug_job_exits_with_the_code_of_its_script(tmp_path):
    words = [*PRETRAIN, "--cluster", "debug", "--job_dir", tmp_path / "%j", "--batch_size", 40]
    done = run("submitit_pretrain.py", *words, expect=2)
    assert "main_pretrain.py: error: 26 training images" in done.stderr
    words[-1] = 6
    run("submitit_pretrain.py", *words, "--max_minutes", 0.0001, expect=EXIT_REQUEUE)


@pytest.mark.slow
def test_local_array_runs_every_recipe(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"s{seed}.yaml").write_text(f"# toy\nscript: main_pretrain\nseed: {seed}\n")
    array = ["--array", f"{tmp_path}/s1.yaml,{tmp_path}/s2.yaml", "--job_dir", tmp_path / "sweep"]
    done = run("submitit_pretrain.py", *PRETRAIN, *LOCAL, *array, "--epochs", 1)
    assert done.stdout.count("COMPLETED") == 2
    for seed in (1, 2):
        text = (tmp_path / "sweep" / f"s{seed}" / "args.yaml").read_text()
        assert f"seed: {seed}\n" in text


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="python has no -P yet")
def test_job_does_not_import_from_the_current_folder(tmp_path):
    for name in ("utils", "parallel", "config"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    words = [*PRETRAIN, *LOCAL, "--epochs", 1, "--job_dir", tmp_path / "%j"]
    command = [sys.executable, ROOT / "submitit_pretrain.py", *words]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.rstrip().endswith("COMPLETED"), done.stdout
