# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""All ranks of a run must have the same flags, files and packages."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from config import parser as options
from errors import UserError
from models.kernels.autotune import Autotuner
from parallel import process_group
from tests.parallel.test_failure import QUICK, Ranks, ends, pretrain, start_script
from tests.test_end_to_end import FINETUNE, ROOT
from tests.test_layout import product_files
from training import run_lock, setup


def different(args: SimpleNamespace) -> None:
    process_group.init_distributed_mode("cpu")
    flags = {"lr": 0.1 * (args.rank != 1), "seed": args.rank == 2, "epochs": 3}
    setup.check_ranks_agree(flags | {"local_rank": args.rank, "num_workers": args.rank})


def pretrain_at_own_rate(args: SimpleNamespace) -> None:
    pretrain(args, "--lr", ["0.01", "0.02"][args.rank])


def test_one_difference_is_shown_and_other_ranks_are_named(tmp_path):
    started = Ranks(different, tmp_path, size=3)
    assert started.end() == [2, 2, 2]
    assert (
        "]: rank 1 differs from rank 0: --lr 0.0 (rank 0: 0.1); other ranks that differ: 2. "
        "Start all processes with"
    ) in started.output(0)


def test_script_refuses_other_flags_before_it_does_anything(tmp_path):
    """Each had its own learning rate, and the weights of all became those of none."""
    started = Ranks(pretrain_at_own_rate, tmp_path)
    assert started.end() == [2, 2]
    said = started.output(0)
    assert said.startswith("program.py: error [rank ")
    assert "]: rank 1 differs from rank 0: --lr 0.02 (rank 0: 0.01). Start all" in said
    assert not (started.folder / "run").exists()


def test_process_is_set_up_as_the_flags_say(capsys, monkeypatch):
    """A run that names a recipe says so; --deterministic acts before anything is computed."""
    calls = []
    monkeypatch.setattr(setup, "make_deterministic", lambda *args: calls.append(args))
    device = torch.device("cpu")
    for words, expected in ("", False), ("--deterministic", True):
        line = f"--recipe digits_pretrain --device cpu {words}"
        args = options.parse(options.pretrain_parser(), line.split())
        assert setup.setup_process(args) == (device, "none")
        assert calls.pop() == (expected, device)
        setup.log_recipe(args)
        assert "recipe digits_pretrain: --model" in capsys.readouterr().out
    args = options.parse(options.pretrain_parser(), ["--data_set", "DIGITS", "--device", "cpu"])
    setup.log_recipe(args)
    assert "recipe" not in capsys.readouterr().out
    args = options.parse(options.pretrain_parser(), ["--data_set", "DIGITS", "--dist_on_itp"])
    with pytest.raises(UserError, match="--dist_on_itp true: .* start with mpirun"):
        setup.setup_process(args)


def meet_in_a_file(args: SimpleNamespace) -> None:
    os.environ["MASTER_ADDR"] = "nowhere.invalid"
    del os.environ["LOCAL_RANK"]
    meeting = (args.folder / "meeting").as_uri()
    words = f"--data_set DIGITS --device cpu --world_size 2 --local_rank 3 --dist_url {meeting}"
    setup.setup_process(options.parse(options.pretrain_parser(), words.split()))
    assert dist.get_world_size() == 2
    assert os.environ["LOCAL_RANK"] == "3"


def test_processes_meet_where_the_flags_say(tmp_path):
    started = Ranks(meet_in_a_file, tmp_path)
    assert started.end() == [0, 0], started.output(0)


def test_description_has_flags_versions_and_files():
    found = setup.describe_rank(
        {"lr": 0.1, "input_size": (32, 32), "local_rank": 3, "num_workers": 2}
    )
    assert found["--lr"] == "0.1"
    assert found["--input_size"] == "(32, 32)"
    assert not {"--local_rank", "--num_workers"} & found.keys()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"Python", "timm", "numpy", "torchvision", "utils.py", "models/fcmae.py"} <= found.keys()


def test_user_modules_that_flags_name_are_compared_too():
    found = setup.describe_rank(
        {"model": "tests.tiny:classifier", "dist_url": "tcp://here:1", "opt": "a:b"}
    )
    assert found["tests.tiny"].startswith("(SHA-256 ")
    assert "a" not in found
    found = setup.describe_rank({"metrics": ("acc1", "tests.tiny:classifier(k=1)")})
    assert found["tests.tiny"].startswith("(SHA-256 ")
    found = setup.user_modules({"loss": "0.5*ce + tests.tiny:Temperature(start=2)"})
    assert found.keys() == {"tests.tiny"}


@pytest.mark.slow
def test_scripts_from_different_copies_name_the_file(tmp_path):
    for path in [*product_files(), ROOT / "tests" / "tiny.py"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    with open(tmp_path / "training/meters.py", "a") as file:
        file.write("# mended\n")
    words = [*FINETUNE, *QUICK]
    codes, _, errors = ends(start_script([ROOT, tmp_path], "main_finetune.py", *words))
    assert codes == [2, 2]
    assert errors[0].startswith("main_finetune.py: error [rank ")
    assert "]: rank 1 differs from rank 0: training/meters.py (SHA-256 " in errors[0]


def test_dry_run_renames_and_deletes_no_checkpoint(tmp_path):
    """It may look at the folder of a run that is writing."""
    torch.save({"model": {}, "optimizer": {}, "state": {}}, tmp_path / "checkpoint-0.pth")
    left = [tmp_path / "checkpoint-1.pth", tmp_path / "checkpoint-0-seen-8.pth"]
    for path in left:
        path.write_bytes(b"half")
    words = f"--data_set DIGITS --device cpu --output_dir {tmp_path}"
    for more, kept in ("--dry_run", True), ("", False):
        args = options.parse(options.pretrain_parser(), f"{words} {more}".split())
        run = setup.setup_run(args, torch.device("cpu"), "none")
        assert run.resume_point.source == str(tmp_path / "checkpoint-0.pth")
        assert [path.exists() for path in left] == [kept, kept]
    run_lock.acquire_run_lock("")


def test_checkpoint_of_the_folder_is_resumed_with_its_kernels(tmp_path, monkeypatch):
    kernels = {"cpu of another": {"sum float32 5": "torch"}}
    checkpoint = {"model": {}, "optimizer": {}, "state": {}, "kernels": kernels}
    torch.save(checkpoint, tmp_path / "checkpoint-0.pth")
    monkeypatch.setattr(setup, "autotuner", Autotuner())
    words = f"--data_set DIGITS --device cpu --output_dir {tmp_path} --dry_run".split()
    args = options.parse(options.pretrain_parser(), words)
    setup.setup_run(args, torch.device("cpu"), "none")
    assert setup.autotuner.state() == kernels
    args = options.parse(options.pretrain_parser(), [*words, "--auto_resume", "false"])
    with pytest.raises(UserError, match="checkpoint-0.pth"):
        setup.setup_run(args, torch.device("cpu"), "none")


@pytest.mark.parametrize("flag", ["head", "heads"])
def test_flags_of_the_checkpoint_are_checked_before_the_data_is_listed(tmp_path, flag):
    """The export failed when the training was complete."""
    value = {"head": "mlp(8)", "heads": "a=linear@norm"}[flag]
    checkpoint = {"model": {}, "optimizer": {}, "state": {}, "args": {flag: value}}
    torch.save(checkpoint, tmp_path / "checkpoint-0.pth")
    words = f"--data_set DIGITS --device cpu --output_dir {tmp_path} --dry_run"
    words += " --hook csv export(to=timm) --input_size 32 --stem_stride 1"
    args = options.parse(options.finetune_parser(), words.split())
    setup.check_flags(args)  # as typed
    with pytest.raises(UserError) as error:
        setup.setup_run(args, torch.device("cpu"), "none")
    assert f"not for --{flag} {value}; use one of onnx" in str(error.value)
    args = args.replace(hook=("export",))
    assert vars(setup.setup_run(args, torch.device("cpu"), "none").args)[flag] == value


def test_cuda_graphs_are_refused_where_they_cannot_be_recorded():
    words = "--data_set DIGITS --device cpu --cuda_graphs --output_dir none"
    args = options.parse(options.pretrain_parser(), words.split())
    with pytest.raises(UserError, match="--cuda_graphs"):
        setup.setup_run(args, torch.device("cpu"), "none")
