# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Updates that go wrong: planted in data, gradients, parameters.  pytest tests/test_guard.py"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import UserError
from guard import KEPT, Guard, add_to, first_not_finite
from tests.test_end_to_end import COLOURS, FINETUNE, PRETRAIN, SMALL, assert_same, log, run, weights
from tests.test_stepper import adamw, feed, product
from tests.tiny import _Torn, classifier
from utils import TrainState

NAN = math.nan
SCRIPTS = {"main_pretrain.py": PRETRAIN, "main_finetune.py": FINETUNE}
FRAIL = {
    "main_pretrain.py": ["--model", "tests.tiny:frail_fcmae", "--decoder_embed_dim", "8"],
    "main_finetune.py": ["--model", "tests.tiny:frail", "--aa", "none"],
}


PLACE = "gradient of the output of stages.1.0.pwconv2"  # the first behind the block's own


def faults(folder: Path) -> list[dict]:
    return json.loads((folder / "bad_batch.json").read_text())


def is_finite(path: Path) -> bool:
    return all(torch.isfinite(value).all() for value in weights(path).values())


# --- whole runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_image_that_is_not_finite_is_named_and_costs_its_update_alone(tmp_path, script, on_spike):
    """Nothing of it is in the weights, so there is nothing to go back from."""
    words = [*SCRIPTS[script], "--data_set", "tests.tiny:poisoned", "--on_spike", on_spike]
    words += ["--num_workers", 2, "--print_freq", 3, "--output_dir", tmp_path]
    said = run(script, *words).stdout
    assert said.count("skipped an update, first number") == 2
    assert "went back" not in said
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["state"]
    assert state["bad_steps"] == 2  # once an epoch
    assert is_finite(tmp_path / "checkpoint-1.pth")
    assert [fault["epoch"] for fault in faults(tmp_path)] == [0, 1]
    for fault in faults(tmp_path):
        (rank,) = fault["ranks"]
        (ids,) = rank["sample_ids"]
        assert fault["fault"] == "loss is not finite"
        assert 5 in ids
        assert len(ids) == 6
        assert (rank["first_not_finite"], rank["of_samples"]) == ("images", [5])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_gradient_of_one_rank_is_skipped_by_both(tmp_path, script, on_spike):
    words = [*FRAIL[script], *COLOURS, *SMALL, "--batch_size", 3, "--on_spike", on_spike]
    words += ["--output_dir", tmp_path, "--kernels", "torch"]
    said = run(script, *words, torchrun=2, env={"FRAIL": "gradient:2:1"}).stdout
    assert "skipped an update, first number 3: gradient is not finite" in said
    (fault,) = faults(tmp_path)
    assert (fault["epoch"], fault["update"], fault["grad_norm"]) == (0, 3, None)
    well, ill = fault["ranks"]
    assert (well["rank"], well["first_not_finite"]) == (0, None)
    assert ill["rank"] == 1
    assert ill["first_not_finite"].replace("encoder.", "") == PLACE
    assert len({*well["sample_ids"][0], *ill["sample_ids"][0]}) == 6
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["state"]
    assert state["updates"] == 8
    assert state["bad_steps"] == (4 if on_spike == "rollback" else 1)  # back to the beginning
    assert ("went back to the last snapshot: the 4 updates" in said) == (on_spike == "rollback")


@pytest.mark.parametrize("script", SCRIPTS)
def test_parameter_is_brought_back_by_a_rollback(tmp_path, script):
    words = [*FRAIL[script], *COLOURS, *SMALL, "--on_spike", "rollback", "--print_freq", 1]
    words += ["--snapshot_freq", 2, "--output_dir", tmp_path]
    said = run(script, *words, env={"FRAIL": "parameter:5:0"}).stdout
    (fault,) = faults(tmp_path)
    assert fault["update"] == 7  # before its end update 6 had used the value
    name = "stages.1.0.pwconv1.bias"
    assert fault["ranks"][0]["first_not_finite"].endswith(name)
    assert "went back to the last snapshot: the 3 updates since are undone; return 1 of 10" in said
    assert is_finite(tmp_path / "checkpoint-1.pth")
    assert all(math.isfinite(entry["train_loss"]) for entry in log(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_parameter_that_is_lost_stops_a_run_whose_checkpoints_stay_whole(tmp_path, script):
    """They must not give way to weights from which nobody can go on."""
    words = [*FRAIL[script], *COLOURS, *SMALL, "--epochs", 9, "--max_bad_steps", 6]
    words += ["--save_ckpt_every_steps", 1, "--output_dir", tmp_path]
    done = run(script, *words, env={"FRAIL": "parameter:5:0"}, expect=1)
    assert "7 updates in a row went wrong, the last: loss is not finite; lower --lr" in done.stderr
    assert "the weights are not finite" in done.stdout
    kept = {path.name for path in tmp_path.glob("checkpoint-*-seen-*.pth")}
    assert kept == {"checkpoint-1-seen-6.pth"}  # of update 6 the weights are not finite
    assert all(is_finite(path) for path in tmp_path.glob("checkpoint-*.pth"))
    assert [fault["update"] for fault in faults(tmp_path)] == list(range(7, 14))


def test_spike_is_undone_with_what_led_to_it(tmp_path):
    """From update 25 on as if the updates since the snapshot had not been."""
    words = [*FRAIL["main_finetune.py"], *COLOURS, *SMALL, "--epochs", 7, "--spike_factor", 5]
    words += ["--print_freq", 1, "--on_spike", "rollback", "--output_dir", tmp_path, "--model_ema"]
    said = run("main_finetune.py", *words, env={"FRAIL": "loss:24:0"}).stdout
    (fault,) = faults(tmp_path)
    assert fault["update"] == 25
    assert fault["loss"] > 5 * fault["usual_loss"] > 0
    assert fault["ranks"][0]["first_not_finite"] is None
    assert "the 1 updates since are undone" in said  # an epoch is 4 updates, its end a snapshot
    before, after = (
        torch.load(tmp_path / f"checkpoint-{n}.pth", weights_only=True) for n in (5, 6)
    )
    assert after["state"]["bad_steps"] == 1
    steps = [[s["step"].item() for s in c["optimizer"]["state"].values()] for c in (before, after)]
    assert {len(set(step)) for step in steps} == {1}
    assert (steps[0][0], steps[1][0]) == (24, 27)


def test_rollback_survives_a_restart(tmp_path):
    """Killed after a rollback, the run ends as the one that was not."""
    words = [*FRAIL["main_pretrain.py"], *COLOURS, *SMALL, "--epochs", 3, "--print_freq", 1]
    words += ["--on_spike", "rollback", "--save_ckpt_every_steps", 3, "--kernels", "torch"]
    env = {"FRAIL": "gradient:6:0"}
    run("main_pretrain.py", *words, "--output_dir", tmp_path / "whole", env=env)
    again = [*words, "--output_dir", tmp_path / "again"]
    run("main_pretrain.py", *again, "--max_minutes", "1e-6", env=env, expect=75)
    run("main_pretrain.py", *again, env=env)
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True)
        for name in ("again", "whole")
    )
    assert_same(ours["model"], theirs["model"])
    assert ours["state"] == theirs["state"]


# --- the guard ------------------------------------------------------------------------------


def guarded(stepper, model, optimizer, **options) -> tuple[Guard, TrainState]:
    guard, state = Guard(stepper, (model, optimizer), **options), TrainState()
    guard.begin_epoch(state, lambda *batch: None)
    return guard, state


def test_run_stops_after_bad_updates_in_a_row(log):
    model, optimizer, stepper = product(lr=1e-9)
    guard, state = guarded(stepper, model, optimizer, max_bad_steps=2)
    for x in (NAN, NAN, 1, NAN, NAN):  # never three in a row
        feed(model, stepper, x)
        assert guard.look(state) == ""
    assert state.bad_steps == 4
    feed(model, stepper, NAN)
    assert "3 updates in a row went wrong" in guard.look(state)
    assert log.text.count("skipped an update") == 5
    feed(model, stepper, NAN)
    assert guard.look(state) == ""  # who goes on from what is saved then has all of them again


def test_single_bad_update_stops_a_run_that_allows_none():
    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, max_bad_steps=0)
    feed(model, stepper, NAN)
    assert guard.look(state).startswith("1 updates in a row")


def test_search_of_fp16_for_its_scale_is_no_fault(tmp_path, log):
    model, optimizer, stepper = product(lr=1e-38, amp="fp16")
    guard, state = guarded(stepper, model, optimizer, max_bad_steps=0, every=1, folder=tmp_path)
    feed(model, stepper, *[3e38] * 16)
    assert guard.look(state) == ""
    assert state.bad_steps == 16
    assert "skipped 16 updates while fp16 looks for its scale" in log.text
    assert list(tmp_path.iterdir()) == []


def test_rollback_restores_weights_moments_and_counts():
    model, optimizer, stepper = adamw()
    guard, state = guarded(stepper, model, optimizer, every=3)
    twin = copy.deepcopy(model), None

    def train(*values: float) -> None:
        feed(model, stepper, *values)
        state.updates += len(values)
        assert guard.look(state) == ""

    train(1, 2, 3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    usual = stepper.state()
    train(4, 5)
    assert not torch.equal(model.weight, twin[0].weight)
    train(6, NAN)  # a look at 7 updates: the NaN is found, the snapshot is that of update 3
    assert (state.updates, state.bad_steps) == (7, 4)
    for _ in range(2):  # the snapshot itself is not trained on
        assert_same(model.state_dict(), kept[0])
        moments = [o["state"][0] for o in (optimizer.state_dict(), kept[1])]
        assert_same(*moments)
        assert stepper.state() == usual
        train(7, NAN)
    assert (state.updates, state.bad_steps) == (11, 8)


def test_returns_with_little_between_are_counted_and_others_forgotten():
    model, optimizer, stepper = product(lr=1e-9)
    guard, state = guarded(stepper, model, optimizer, every=3, max_bad_steps=2)

    def train(*values: float) -> str:
        feed(model, stepper, *values)
        state.updates += len(values)
        return guard.look(state)

    for _ in range(3):
        assert train(1, NAN) == train(NAN) == train(1, 1, 1) == ""
    assert train(NAN) == train(1, NAN) == ""
    assert "went back to a snapshot 3 times" in train(1, NAN)


def test_faults_are_listed_once_and_the_newest_are_kept(tmp_path):
    path = tmp_path / "bad_batch.json"
    path.write_text("[{half a line of a run that was killed")
    for update in (1, 2, 2, 3):  # 2 again after a restart
        add_to(path, [{"epoch": 0, "update": update}])
    assert [fault["update"] for fault in json.loads(path.read_text())] == [1, 2, 3]
    add_to(path, [{"epoch": 1, "update": update} for update in range(10, 10 + KEPT)])
    assert [fault["update"] for fault in json.loads(path.read_text())] == [*range(10, 10 + KEPT)]


def test_full_disk_costs_the_list_and_not_the_run(tmp_path, monkeypatch, log):
    def full(*_: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr("guard.write_atomically", full)
    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, folder=tmp_path)
    feed(model, stepper, NAN)
    assert guard.look(state) == ""
    assert "bad_batch.json cannot be written: No space left" in log.text


def test_batch_that_cannot_be_read_again_is_said_to_be():
    class Gone:
        def again(self, epoch: int, ids: torch.Tensor) -> None:
            raise UserError("cannot read image a.png")

    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, batches=Gone())
    stepper.step(model(NAN), torch.tensor([3]))
    state.updates = 1
    assert guard.look(state) == ""


# --- where it began -------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return classifier(stem_stride=1, num_classes=3).train()


def find(net: nn.Module, scale: float = 1.0) -> str:
    images = torch.randn(2, 3, 16, 16)
    return first_not_finite(net, lambda: net(images).square().mean() * scale)


def test_first_value_that_is_not_finite_is_named():
    net = network()
    assert find(net) == ""
    assert find(net, NAN) == "loss"
    hook = net.stages[2][0].register_forward_hook(lambda m, i, o: o * NAN)
    assert find(net) == "output of stages.2.0"
    hook.remove()
    hook = net.stages[2][0].register_forward_hook(lambda m, i, o: _Torn.apply(o))
    assert find(net).startswith("gradient of the output of ")
    hook.remove()
    hook = net.stages[3][0].pwconv2.weight.register_hook(lambda grad: grad * NAN)
    assert find(net) == "gradient of stages.3.0.pwconv2.weight"
    hook.remove()
    net.norm.weight.data[2] = math.inf
    assert find(net) == "norm.weight"


def test_looking_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3))
    before = copy.deepcopy(net.state_dict())
    assert find(net) == ""
    assert_same(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def test_compiled_network_is_looked_at_module_by_module():
    net = network()
    net.stages[2][0].register_forward_hook(lambda m, i, o: o * NAN)
    net.compile(backend="eager")
    assert find(net) == "output of stages.2.0"
