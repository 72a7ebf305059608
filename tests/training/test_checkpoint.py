# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Checkpoints: atomic, strict, resumed from the right one."""

import copy
import hashlib
import io
import os
import pickle
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import utils
from config.parser import finetune_parser, parse
from data_loading.labels import Head
from errors import UserError
from optim_factory import create_optimizer
from training.checkpoint import (
    TrainableParts,
    TrainState,
    load_optimizer,
    write_checkpoint,
)
from training.checkpoint_manager import build_checkpoint_manager
from training.criterion import Criterion
from training.resume import auto_load_model, find_resume_point
from utils import link, save_model, write_atomically
from weights.files import find_checkpoint, load_weights, numbered_checkpoints, read_checkpoint


class Run:
    """A tiny run: model, averaged model, AdamW in two groups, one step taken."""

    def __init__(self, seed: int = 0, betas=(0.9, 0.999), weight_decay: float = 0.05) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.ema = copy.deepcopy(self.model)
        groups = [
            {"params": [self.model[0].weight, self.model[1].weight], "lr_scale": 1.0},
            {"params": [self.model[0].bias, self.model[1].bias], "weight_decay": 0.0},
        ]
        options = {"lr": 0.1, "betas": betas, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(groups, **options)
        self.scaler = torch.amp.GradScaler("cpu")
        self.step(torch.arange(6.0).view(2, 3))

    def step(self, x: torch.Tensor) -> None:
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, epoch: int, **options) -> Path:
        """Save as after the epoch of that number."""
        state = TrainState(epoch=epoch + 1, global_step=10 * (epoch + 1), best={"best": 12.5})
        args = {"lr": None, "input_size": (32, 32), "aa": "none", "epochs": 5, "use_amp": False}
        entries = {"args": args, "classes": None}
        save_model(folder, self.parts(), state, entries, **options)
        return folder / f"checkpoint-{epoch}.pth"

    def parts(self) -> TrainableParts:
        return TrainableParts(self.model, self.optimizer, self.scaler, self.ema)

    def load(self, folder: Path | None, **options) -> TrainState:
        start_epoch = options.pop("start_epoch", 0)
        return auto_load_model(find_resume_point(folder, **options), self.parts(), start_epoch)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- writing --------------------------------------------------------------------------------


def test_checkpoint_loads_with_weights_only_and_is_complete(tmp_path):
    """argparse.Namespace in the official ones makes torch >= 2.6 refuse them."""
    run = Run()
    content = torch.load(run.save(tmp_path, 6), weights_only=True)
    keys = {"model", "model_ema", "optimizer", "scaler", "state", "args", "classes", "kernels"}
    assert set(content) == keys
    assert content["state"] == {
        **{"epoch": 7, "samples_in_epoch": 0, "global_step": 70, "effective_batch": 0},
        **{
            "bad_steps": 0,
            "best": {"best": 12.5},
            "best_epochs": {},
            "stats": {},
            "epoch_sums": {},
            "images": 0,
            "best_metric": "acc1",
            "lower_is_better": False,
            "phase_end": 0,
            "steps_per_epoch": 0,
            "epoch_start": 0,
            "probed": {},
            "since_best": 0,
            "watched": {},
        },
    }
    assert content["args"]["input_size"] == (32, 32)
    assert content["args"]["lr"] is None
    assert torch.equal(content["model"]["0.weight"], run.model[0].weight)
    assert content["scaler"]["scale"] == 65536


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-0.pth"
    write_checkpoint({"a": 1}, path)

    def full_disk(content, file):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint({"a": 2}, path)
    monkeypatch.undo()
    assert names(tmp_path) == {"checkpoint-0.pth"}
    assert read_checkpoint(path) == {"a": 1}


def test_interrupted_write_leaves_no_file_at_all(tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"a": 2}, tmp_path / "checkpoint-0.pth")
    assert names(tmp_path) == set()


def test_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1])
    write_atomically("text\n", tmp_path / "args.yaml")
    assert done == ["fsync", "replace", "fsync"]  # the last one is the folder
    assert (tmp_path / "args.yaml").read_bytes() == b"text\n"


def test_second_name_survives_the_first(tmp_path):
    """Rotation deletes checkpoint-N, of which checkpoint-best is a hard link."""
    first, second = tmp_path / "checkpoint-0.pth", tmp_path / "checkpoint-best.pth"
    for content in ({"a": 1}, {"a": 2}):
        write_checkpoint(content, first)
        link(first, second)
        assert read_checkpoint(second) == content
    assert names(tmp_path) == {"checkpoint-0.pth", "checkpoint-best.pth"}
    write_checkpoint({"a": 3}, first)
    first.unlink()
    assert read_checkpoint(second) == {"a": 2}


def test_second_name_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_checkpoint({"a": 1}, tmp_path / "a.pth")
    link(tmp_path / "a.pth", tmp_path / "b.pth")
    assert read_checkpoint(tmp_path / "b.pth") == {"a": 1}
    assert names(tmp_path) == {"a.pth", "b.pth"}


# --- progress -------------------------------------------------------------------------------


def test_accuracy_of_zero_is_still_a_first_best():
    """The official strict `<` from 0.0 never wrote a best file for it."""
    state = TrainState()
    assert state.update_best({"best": 0.0, "best-ema": None}) == ["best"]
    assert state.best == {"best": 0.0}


def test_equal_accuracy_is_no_new_best():
    state = TrainState(best={"best": 50.0})
    assert state.update_best({"best": 50.0}) == []
    assert state.update_best({"best": 49.0}) == []
    assert state.update_best({"best": 50.5}) == ["best"]
    assert state.best == {"best": 50.5}


def test_accuracies_of_model_and_average_are_kept_apart():
    state = TrainState(best={"best": 50.0, "best-ema": 60.0})
    assert state.update_best({"best": 55.0, "best-ema": 55.0}) == ["best"]
    assert state.best == {"best": 55.0, "best-ema": 60.0}
    assert state.update_best({"best": None, "best-ema": None}) == []


def test_lowest_loss_is_the_best_if_it_is_the_metric():
    state = TrainState()
    state.choose_best("loss", True)
    assert [state.update_best({"best": loss}) for loss in (2.0, 1.5, 1.75)] == [["best"]] * 2 + [[]]
    assert state.best == {"best": 1.5}


def test_another_metric_starts_again_and_says_so(log):
    """A loss of 0.5 would never be above an accuracy of 80."""
    state = TrainState.from_dict({"best": {"best": 80.0}, "best_epochs": {"best": 3}})  # earlier
    state.choose_best("acc1", False)
    assert (state.best, log.messages) == ({"best": 80.0}, [])
    state.choose_best("f1", False)
    text = "--best_metric f1 (was acc1): the next evaluated epoch becomes the best"
    assert log.messages == [text]
    assert (state.best, state.best_epochs) == ({}, {})
    assert state.update_best({"best": 40.0}) == ["best"]
    resumed = TrainState.from_dict(asdict(state))
    resumed.choose_best("f1", False)
    assert resumed.best == {"best": 40.0}


def test_states_share_no_best():
    one, other = TrainState(), TrainState()
    one.update_best({"best": 1.0})
    assert other.best == {}


def test_accuracy_that_is_not_a_number_is_no_best():
    assert TrainState().update_best({"best": float("nan")}) == []


# --- rotation -------------------------------------------------------------------------------


def test_newest_are_kept_by_number_and_not_by_name(tmp_path):
    run = Run()
    for epoch in (8, 9, 10, 11):
        run.save(tmp_path, epoch, keep=3)
    assert names(tmp_path) == {"checkpoint-9.pth", "checkpoint-10.pth", "checkpoint-11.pth"}
    assert [path.stem for path in numbered_checkpoints(tmp_path)] == [
        "checkpoint-11",
        "checkpoint-10",
        "checkpoint-9",
    ]


def test_rotation_touches_nothing_but_numbered_checkpoints(tmp_path):
    others = {
        *("checkpoint-best.pth", "checkpoint-best-ema.pth", "checkpoint-1.pth.bak"),
        *("checkpoint-.pth", "my-checkpoint-1.pth", "checkpoint-1-old.pth", "log.txt"),
    }
    for name in others:
        (tmp_path / name).write_text(name)
    run = Run()
    for epoch in range(4):
        run.save(tmp_path, epoch, keep=1)
    assert names(tmp_path) == others | {"checkpoint-3.pth"}
    assert all((tmp_path / name).read_text() == name for name in others)


def test_changed_frequency_leaves_no_file_behind(tmp_path):
    """The official code deleted exactly epoch - num * freq, so a change of either leaked files."""
    run = Run()
    for epoch in (0, 1, 2, 4, 9):
        run.save(tmp_path, epoch, keep=5)
    run.save(tmp_path, 10, keep=2)
    assert names(tmp_path) == {"checkpoint-9.pth", "checkpoint-10.pth"}


def test_best_is_complete_and_resumable_and_best_ema_holds_the_average(tmp_path):
    run = Run()
    with torch.no_grad():
        for parameter in run.ema.parameters():
            parameter.fill_(7.0)
    run.save(tmp_path, 3, improved=["best", "best-ema"])
    run.save(tmp_path, 4)
    best = read_checkpoint(tmp_path / "checkpoint-best.pth")
    assert best["state"]["epoch"] == 4  # the real epoch
    assert_same(run.model, Namespace(best["model"]))
    average = read_checkpoint(tmp_path / "checkpoint-best-ema.pth")
    assert set(average) == {"model", "model_ema", "state", "args", "classes"}
    assert all((value == 7).all() for value in average["model"].values())
    other = Run(seed=1)
    assert other.load(None, resume=str(tmp_path / "checkpoint-best.pth")).epoch == 4
    assert find_resume_point(None, resume=str(tmp_path / "checkpoint-best-ema.pth")).is_weights


class Namespace:
    """A state dict that `assert_same` can read."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state


def test_best_off_the_saving_grid_is_written_alone(tmp_path):
    run = Run()
    run.save(tmp_path, 3, numbered=False, improved=["best"])
    assert names(tmp_path) == {"checkpoint-best.pth"}
    assert Run(seed=1).load(None, resume=str(tmp_path / "checkpoint-best.pth")).epoch == 4


def test_evaluation_takes_the_best_else_the_newest(tmp_path):
    run = Run()
    for epoch in (9, 10):
        run.save(tmp_path, epoch)
    assert find_checkpoint(tmp_path).name == "checkpoint-10.pth"
    run.save(tmp_path, 11, improved=["best"])
    run.save(tmp_path, 12)
    assert find_checkpoint(tmp_path).name == "checkpoint-best.pth"
    for empty in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(UserError, match="contains no checkpoint"):
            find_checkpoint(empty)
        (tmp_path / "empty").mkdir(exist_ok=True)


# --- resuming -------------------------------------------------------------------------------


def test_resumed_run_continues_as_if_it_had_not_stopped(tmp_path):
    run, other = Run(), Run(seed=1)
    run.scaler.scale(torch.ones(()))  # which creates the scale
    run.scaler.update(2.0**12)
    run.save(tmp_path, 6)
    state = other.load(tmp_path)
    assert (state.epoch, state.global_step, state.best) == (7, 70, {"best": 12.5})
    assert other.scaler.get_scale() == 2.0**12
    for one in (run, other):
        one.step(torch.ones(2, 3))
    assert_same(other.model, run.model)
    assert_same(other.ema, run.ema)


def test_weights_without_a_run_start_one_and_what_it_saves_wins_later(tmp_path, log):
    """Published weights have no optimizer; a requeued job repeats its --resume every time."""
    source = tmp_path / "published.pth"
    torch.save({"model": Run(seed=3).model.state_dict(), "epoch": 99}, source)
    folder = tmp_path / "run"
    folder.mkdir()
    point = find_resume_point(folder, str(source))
    assert (point.is_weights, point.is_run, point.source) == (True, False, str(source))
    run = Run(seed=1)
    assert run.load(folder, resume=str(source), start_epoch=2) == TrainState(epoch=2)
    text = "only its weights are loaded; training starts at epoch 3"
    assert f"cannot resume: {source} holds no optimizer and no state: {text}" in log.text
    run.save(folder, 6)
    again = Run(seed=4)
    assert again.load(folder, resume=str(source), start_epoch=2).epoch == 7
    assert_same(again.model, run.model)


@pytest.mark.parametrize(
    ("pretraining", "use_ema", "is_run"),
    [(False, False, True), (True, False, False), (False, True, False)],
)
def test_run_of_the_other_kind_or_its_average_is_weights(tmp_path, pretraining, use_ema, is_run):
    """--resume of a pre-training run in fine-tuning named 151 tensors that did not fit."""
    source = str(Run(seed=3).save(tmp_path, 6))
    args = {"lr": None, "use_ema": use_ema} | ({"mask_ratio": 0.6} if pretraining else {})
    point = find_resume_point(None, source, args=args)
    assert (point.is_run, point.is_weights) == (is_run, not is_run)


def test_a_run_that_another_one_continues_keeps_its_heads(tmp_path):
    """--reset_head did nothing, without a word; in its own folder a run is repeated with it."""
    source, flags = str(Run(seed=3).save(tmp_path, 6)), {"lr": None, "reset_head": True}
    with pytest.raises(UserError, match="--reset_head true: --resume .* continues that run with"):
        find_resume_point(None, source, args=flags)
    assert find_resume_point(tmp_path, args=flags).is_run
    assert find_resume_point(None, source, args=flags | {"use_ema": True}).is_weights


def test_names_of_classes_are_in_the_order_of_the_head(tmp_path):
    args = parse(finetune_parser(), ["--data_set", "DIGITS"])
    head = Head(names=("eel", "cat", "dog"), count=3)
    manager = build_checkpoint_manager(args, tmp_path, Run().parts(), head)
    manager.end_epoch(TrainState(epoch=1), last=True)
    saved = read_checkpoint(tmp_path / "checkpoint-0.pth")
    assert (saved["classes"], saved["outputs"]) == (["eel", "cat", "dog"], 3)


def test_rotation_spares_the_file_that_resume_names(tmp_path):
    """A requeued job names it again."""
    source = Run().save(tmp_path, 0)
    words = ["--data_set", "DIGITS", "--resume", str(source), "--save_ckpt_num", "1"]
    manager = build_checkpoint_manager(parse(finetune_parser(), words), tmp_path, Run().parts())
    for epoch in (2, 3):
        manager.end_epoch(TrainState(epoch=epoch), last=True)
    names = {path.name for path in tmp_path.glob("checkpoint-?.pth")}
    assert names == {"checkpoint-0.pth", "checkpoint-2.pth"}


def test_hash_belongs_to_resume_and_not_to_what_the_run_saves(tmp_path):
    source = Run(seed=3).save(tmp_path, 1)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    folder = tmp_path / "run"
    folder.mkdir()
    assert Run().load(folder, resume=str(source), sha256=digest).epoch == 2
    with pytest.raises(UserError, match="has SHA-256"):
        Run().load(folder, resume=str(source), sha256="0" * 64)
    Run().save(folder, 6)
    assert Run().load(folder, resume=str(source), sha256=digest).epoch == 7


def test_newest_whole_checkpoint_wins(tmp_path):
    for epoch in (9, 10):
        Run(seed=epoch).save(tmp_path, epoch)
    run = Run(seed=1)
    assert run.load(tmp_path).epoch == 11
    assert_same(run.model, Run(seed=10).model)


@pytest.mark.parametrize("best", [7, 9, 10, 12])
def test_best_checkpoint_wins_if_it_is_newer(tmp_path, best):
    """After a continuation from an older one, a worse best could replace it."""
    Run(seed=best).save(tmp_path, best).rename(tmp_path / "checkpoint-best.pth")
    newest = Run(seed=1).save(tmp_path, 9)
    within = newest.with_name("checkpoint-10-seen-8.pth")
    newest.rename(within)
    Run(seed=1).save(tmp_path, 9)
    run = Run(seed=2)
    source = find_resume_point(tmp_path, rename=False).source
    assert source == str(tmp_path / "checkpoint-best.pth" if best > 9 else within)
    assert find_resume_point(None, str(tmp_path)).source == str(within)
    assert run.load(tmp_path).epoch == max(10, best + 1)


@pytest.mark.parametrize("content", [b"half", {}, {"model": {}, "state": {"epoch": None}}])
def test_best_checkpoint_that_cannot_be_resumed_is_set_aside(tmp_path, content, log):
    """It may be newer than the numbered one, and the run would replace it."""
    newest, best = Run().save(tmp_path, 3), tmp_path / "checkpoint-best.pth"
    torch.save(content, best) if isinstance(content, dict) else best.write_bytes(content)
    assert find_resume_point(tmp_path).source == str(newest)
    assert not best.exists()
    assert f"checkpoint-best.pth.damaged; continuing from {newest}" in log.text


def test_old_best_checkpoint_is_not_verified(tmp_path):
    """That would read gigabytes at every start."""
    best = Run().save(tmp_path, 2).rename(tmp_path / "checkpoint-best.pth")
    newest, content = Run().save(tmp_path, 3), bytearray(best.read_bytes())
    with zipfile.ZipFile(best) as file:
        record = next(info for info in file.infolist() if "/data/" in info.filename)
    content[record.header_offset + 150] ^= 1
    best.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(best)
    assert find_resume_point(tmp_path).source == str(newest)
    assert best.exists()


def test_run_killed_between_its_best_and_its_numbered_checkpoint_has_both(tmp_path):
    """At the end of the last epoch nothing would write the numbered one."""
    Run(seed=3).save(tmp_path, 9).rename(tmp_path / "checkpoint-best.pth")
    Run().save(tmp_path, 8)
    within = tmp_path / "checkpoint-9-seen-8.pth"
    shutil.copy(tmp_path / "checkpoint-8.pth", within)
    find_resume_point(tmp_path, rename=False)
    assert not (tmp_path / "checkpoint-9.pth").exists()
    find_resume_point(tmp_path)
    run = Run()
    run.model.load_state_dict(read_checkpoint(tmp_path / "checkpoint-9.pth")["model"])
    assert_same(run.model, Run(seed=3).model)
    assert (tmp_path / "checkpoint-best.pth").exists()
    assert not within.exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_new_start_deletes_older_saves_of_an_epoch_but_that_of_resume(tmp_path, named):
    Run().save(tmp_path, 1)
    within = Run().save(tmp_path, 0).rename(tmp_path / "checkpoint-1-seen-8.pth")
    find_resume_point(tmp_path, str(within) if named else "")
    assert within.exists() == named


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_truncated_newest_is_passed_over_with_a_warning(tmp_path, log, share):
    """The official code wrote in place and crashed on such a file at every restart."""
    Run(seed=9).save(tmp_path, 9)
    damaged = Run(seed=10).save(tmp_path, 10)
    data = damaged.read_bytes()
    damaged.write_bytes(data[: int(share * len(data))])
    run = Run(seed=1)
    assert run.load(tmp_path).epoch == 10
    assert_same(run.model, Run(seed=9).model)
    warning = next(record for record in log.records if record.levelname == "WARNING")
    assert "checkpoint-10.pth" in warning.getMessage()
    assert "continuing from " in warning.getMessage()


def test_all_checkpoints_damaged_is_no_silent_start_from_the_beginning(tmp_path, log):
    """It would empty log.txt and write over what somebody could still have saved."""
    for epoch in (0, 1):
        Run().save(tmp_path, epoch).write_bytes(b"")
    start = tmp_path / "start.pth"
    Run(seed=3).save(tmp_path, 7).rename(start)
    for resume in ("", str(start), str(tmp_path)):
        with pytest.raises(UserError, match="no run can resume from a checkpoint in"):
            Run().load(tmp_path, resume=resume)


def test_new_run_does_not_mix_with_an_old_one_of_its_folder(tmp_path):
    """Rotation by number deleted the new run's first files, and a requeue went on with the old."""
    best = tmp_path / "checkpoint-best.pth"
    Run().save(tmp_path, 99).rename(best)
    with pytest.raises(UserError, match="holds checkpoint-best.pth"):
        Run().load(tmp_path, auto_resume=False)
    best.unlink()
    Run().save(tmp_path, 99)
    with pytest.raises(UserError, match="holds checkpoint-99.pth"):
        Run().load(tmp_path, auto_resume=False)
    newest = Run().save(tmp_path, 0, keep=1)
    assert newest.exists()


def test_resume_is_only_a_starting_point(tmp_path):
    """A requeued job repeats its --resume: what it has since saved itself must win."""
    folder = tmp_path / "out"
    folder.mkdir()
    start = Run(seed=5).save(tmp_path, 50)
    assert Run().load(folder, resume=str(start)).epoch == 51
    Run(seed=2).save(folder, 3)
    run = Run()
    assert run.load(folder, resume=str(start)).epoch == 4
    assert_same(run.model, Run(seed=2).model)


@pytest.mark.parametrize("folder", ["absent", "empty", None])
def test_nothing_to_resume_is_a_fresh_start(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Run().save(tmp_path, 3)  # in the current folder, where the official '' looked
    (tmp_path / "empty").mkdir()
    run, before = Run(seed=1), Run(seed=1)
    place = folder and tmp_path / folder
    assert run.load(place) == TrainState()
    assert run.load(place, start_epoch=5) == TrainState(5)
    assert_same(run.model, before.model)


def test_missing_resume_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth does not exist; expected a file, a folder"):
        Run().load(tmp_path, resume=str(tmp_path / "nowhere.pth"))


def test_new_hyper_parameters_win_and_moments_are_restored(tmp_path):
    """The official resume silently kept the old weight decay and betas."""
    old = Run()
    old.save(tmp_path, 0)
    new = Run(seed=1, betas=(0.5, 0.6), weight_decay=0.3)
    new.optimizer.param_groups[0]["lr_scale"] = 0.25
    new.load(tmp_path)
    first, second = new.optimizer.param_groups
    assert (first["betas"], first["weight_decay"], first["lr_scale"]) == ((0.5, 0.6), 0.3, 0.25)
    assert (second["betas"], second["weight_decay"]) == ((0.5, 0.6), 0.0)
    for mine, theirs in zip(new.model.parameters(), old.model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(new.optimizer.state[mine][key], old.optimizer.state[theirs][key])


def test_checkpoint_of_other_parameter_groups_is_refused(tmp_path):
    """Moments would go to the wrong parameters."""
    Run().save(tmp_path, 0)
    run = Run(seed=1)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"groups of \[2, 2\] tensors, this run has \[4\].*resume"):
        run.load(tmp_path)


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    """Its state has other names: the first step of the resumed run would be a KeyError."""
    Run().save(tmp_path, 0)
    run = Run(seed=1)
    groups = [{"params": group["params"]} for group in run.optimizer.param_groups]
    run.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    with pytest.raises(UserError, match="--opt"):
        run.load(tmp_path)


def test_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It has other names in its state, and a checksum as the comment of its zip file."""
    path = Run(seed=3).save(tmp_path, 6)
    content = read_checkpoint(path)
    content["state"] = {
        **{"epoch": 7, "updates": 70, "bad_steps": 2, "best": {"best": 12.5}, "seen": 8},
        **{"effective_batch": 4, "within": {"guard": {"losses": 3}}, "images": 26},
    }
    path.unlink()
    path = tmp_path / "checkpoint-7-seen-8.pth"
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"sha256 of all before: " + b"0" * 64
    run = Run(seed=1)
    assert run.load(tmp_path) == TrainState(
        epoch=7,
        global_step=70,
        bad_steps=2,
        best={"best": 12.5},
        samples_in_epoch=8,
        effective_batch=4,
        epoch_sums={"guard": {"losses": 3}},
        images=26,
    )
    assert_same(run.model, Run(seed=3).model)
    point = find_resume_point(tmp_path)
    assert point.entry("state")["effective_batch"] == 4


def test_missing_average_starts_from_the_weights_and_says_so(tmp_path, log):
    run = Run()
    run.ema = None
    run.save(tmp_path, 0)
    other = Run(seed=1)
    other.load(tmp_path)
    assert_same(other.ema, run.model)
    assert "has no EMA weights" in log.text


def test_missing_scaler_is_no_error(tmp_path):
    run = Run()
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.save(tmp_path, 0)
    other = Run(seed=1)
    assert other.load(tmp_path).epoch == 1
    assert other.scaler.get_scale() == 65536


# --- weights, strictly ----------------------------------------------------------------------


def weights(**changes) -> dict[str, torch.Tensor]:
    state = {name: torch.full_like(v, 9.0) for name, v in Run(seed=4).model.state_dict().items()}
    state |= {key.replace("_", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (weights(**{"1_bias": None}), r"1 missing \(1\.bias\)"),
        (weights(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (
            weights(**{"0_weight": torch.ones(4, 5)}),
            r"1 of another shape \(0\.weight \(4, 5\) instead of \(4, 3\)\)",
        ),
        (weights(**{"0_bias": torch.ones(4, 1)}), r"0\.bias \(4, 1\) instead of \(4,\)"),
        (
            {f"module.{name}": value for name, value in weights().items()},
            r"4 missing \(0\.weight, 0\.bias, 1\.weight and 1 more\); 4 unexpected \(module\.0",
        ),
        ({}, "4 missing"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_half_loaded(state, message):
    """The official code printed shape mismatches and trained on with what it had."""
    model, before = Run().model, Run().model
    with pytest.raises(UserError, match=f"some.pth does not fit Sequential: .*{message}"):
        load_weights(model, state, "some.pth")
    assert_same(model, before)


def test_allowed_names_may_be_missing_and_are_returned():
    model = Run().model
    state = weights(**{"1_bias": None, "1_weight": None})
    assert load_weights(model, state, "some.pth", ("1.",)) == ["1.weight", "1.bias"]
    assert (model[0].weight == 9).all()
    assert_same(nn.ModuleList([model[1]]), nn.ModuleList([Run().model[1]]))
    with pytest.raises(UserError, match="1 missing"):
        load_weights(model, weights(**{"0_bias": None}), "some.pth", ("1.",))


def test_allowed_is_a_prefix_and_not_any_part_of_a_name():
    """Official: every key with `proj` or `pred` somewhere in it was dropped."""
    with pytest.raises(UserError, match="missing"):
        load_weights(Run().model, weights(**{"1_bias": None}), "some.pth", ("bias",))


def test_optimizer_of_a_refused_checkpoint_is_unchanged():
    run = Run()
    before = copy.deepcopy(run.optimizer.state_dict())
    other = torch.optim.AdamW(run.model.parameters(), lr=0.3)
    with pytest.raises(UserError):
        load_optimizer(run.optimizer, other.state_dict(), "some.pth")
    assert str(run.optimizer.state_dict()) == str(before)


# --- files that are no checkpoints ----------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def zip_of_junk() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("archive/hello.txt", "junk")
    return data.getvalue()


def zip_with_pickle(pickled: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"archive/{name}", content)
    return data.getvalue()


@pytest.mark.parametrize("wrapping", [bytes, zip_with_pickle, "torch.save", "torch.save, old"])
def test_malicious_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch, wrapping):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if callable(wrapping):
        path.write_bytes(wrapping(pickle.dumps({"model": Malicious()}, protocol=2)))
    else:
        new = "old" not in wrapping
        torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match="evil.pth is refused: it needs .*system"):
        read_checkpoint(path)
    assert names(tmp_path) == {"evil.pth"}


OTHER_FILES = {
    "empty": b"",
    "line": b"\n",
    "web page": b"<html><body>404: Not Found</body></html>\n",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "yaml": b"epochs: 1\n",
    "json": b'{"epoch": 1}\n',
    "latin-1": "h\u00f6chst".encode("latin-1"),
    "digits": b"0123456789" * 500,
    "zeros": b"\x00" * 1000,
    "all bytes": bytes(range(256)) * 4,
    "pickle of 1 byte": b"\x80",
    "pickle of 2 bytes": b"\x80\x02",
    "pickle cut off": b"\x80\x04\x95",
    "zip of 4 bytes": b"PK\x03\x04",
    "zip of nothing": b"PK\x03\x04" + b"\x00" * 100,
    "zip of junk": zip_of_junk(),
    "zip of junk cut off": zip_of_junk()[:-5],
    "zip with an empty pickle": zip_with_pickle(b""),
    "zip with a text as pickle": zip_with_pickle(b"hello"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_file_of_another_kind_is_one_line_of_error(tmp_path, kind):
    path = tmp_path / "model.pth"
    path.write_bytes(OTHER_FILES[kind])
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert f"{path} is " in message
    assert "\n" not in message
    assert len(message) - len(str(path)) < 450


def test_folder_stands_for_its_best_or_newest_checkpoint(tmp_path):
    with pytest.raises(UserError, match="contains no checkpoint"):
        read_checkpoint(tmp_path)
    Run().save(tmp_path, 3)
    assert read_checkpoint(tmp_path)["state"]["epoch"] == 4


def test_checkpoint_of_before_torch_1_6_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["a"].tolist() == [1, 1]


def test_weights_of_a_gpu_are_read_without_one(tmp_path):
    source, path = tmp_path / "cpu.pth", tmp_path / "a.pth"
    torch.save({"a": torch.ones(2)}, source)
    with zipfile.ZipFile(source) as ours, zipfile.ZipFile(path, "w") as theirs:
        for name in ours.namelist():  # hpu: a device that is not here
            theirs.writestr(name, ours.read(name).replace(b"cpu", b"hpu"))
    assert read_checkpoint(path)["a"].device.type == "cpu"


def test_second_name_given_twice_leaves_nothing(tmp_path):
    """To rename one name of a file to another does nothing at all."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("content")
    for _ in range(2):
        utils.link(source, target)
    assert target.read_text() == "content"
    assert sorted(tmp_path.iterdir()) == [source, target]


# --- parameters of a loss -------------------------------------------------------------------


def with_loss(start: float | None) -> TrainableParts:
    """A model and a loss with a parameter, one step taken; None: a loss without parameters."""
    torch.manual_seed(0)
    text = "ce" if start is None else f"tests.tiny:Temperature({start})"
    model, criterion = nn.Linear(3, 2), Criterion(text)
    parts = TrainableParts(model, create_optimizer(model, lr=0.1, loss=criterion), loss=criterion)
    criterion(model(torch.ones(2, 3)), torch.tensor([0, 1])).backward()
    parts.optimizer.step()
    return parts


def test_parameters_of_a_loss_resume_with_their_optimizer_state(tmp_path):
    saved, other = with_loss(2.0), with_loss(5.0)
    save_model(tmp_path, saved, TrainState(1), {"args": {}})
    path = tmp_path / "checkpoint-0.pth"
    assert torch.load(path, weights_only=True)["loss"].keys() == {"terms.0.loss.scale"}
    auto_load_model(find_resume_point(tmp_path), other)
    assert_same(saved.loss, other.loss)
    ours, theirs = (parts.optimizer.state_dict()["state"] for parts in (saved, other))
    last = max(ours)
    assert torch.equal(ours[last]["exp_avg"], theirs[last]["exp_avg"])
    assert other.present()[-1] is other.loss  # also in the snapshots of a rollback


@pytest.mark.parametrize(("before", "now"), [(2.0, None), (None, 2.0)])
def test_other_parameters_of_the_loss_are_refused(tmp_path, before, now):
    save_model(tmp_path, with_loss(before), TrainState(1), {"args": {}})
    names = ["terms.0.loss.scale" if start else "none" for start in (before, now)]
    said = f"these parameters of a loss: {names[0]}; this --loss: {names[1]}. Give the --loss"
    with pytest.raises(UserError, match=said):
        auto_load_model(find_resume_point(tmp_path), with_loss(now))
