# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Updates that go wrong: planted in data, gradients, parameters."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import UserError
from tests.test_end_to_end import COLORS, FINETUNE, PRETRAIN, SMALL, assert_same, log, run, weights
from tests.tiny import _Torn, classifier
from tests.training.test_stepper import adamw, feed, product
from training.anomaly import MAX_ENTRIES, AnomalyGuard, append_entries, first_not_finite
from training.checkpoint import TrainState

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
    assert said.count("skipped 1 step, first at step") == 2
    assert "rolled back" not in said
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
    words = [*FRAIL[script], *COLORS, *SMALL, "--batch_size", 3, "--on_spike", on_spike]
    words += ["--output_dir", tmp_path, "--kernels", "torch"]
    said = run(script, *words, ranks=2, env={"FRAIL": "gradient:2:1"}).stdout
    assert "skipped 1 step, first at step 3: gradient is not finite" in said
    (fault,) = faults(tmp_path)
    assert (fault["epoch"], fault["update"], fault["grad_norm"]) == (0, 3, None)
    well, ill = fault["ranks"]
    assert (well["rank"], well["first_not_finite"]) == (0, None)
    assert ill["rank"] == 1
    assert ill["first_not_finite"].replace("encoder.", "") == PLACE
    assert len({*well["sample_ids"][0], *ill["sample_ids"][0]}) == 6
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["state"]
    assert state["global_step"] == 8
    assert state["bad_steps"] == (4 if on_spike == "rollback" else 1)  # back to the beginning
    assert ("rolled back to the last snapshot: 4 steps" in said) == (on_spike == "rollback")


@pytest.mark.parametrize("script", SCRIPTS)
def test_parameter_is_brought_back_by_a_rollback(tmp_path, script):
    words = [*FRAIL[script], *COLORS, *SMALL, "--on_spike", "rollback", "--print_freq", 1]
    words += ["--snapshot_freq", 2, "--output_dir", tmp_path]
    said = run(script, *words, env={"FRAIL": "parameter:5:0"}).stdout
    (fault,) = faults(tmp_path)
    assert fault["update"] == 7  # before its end update 6 had used the value
    name = "stages.1.0.pwconv1.bias"
    assert fault["ranks"][0]["first_not_finite"].endswith(name)
    assert "rolled back to the last snapshot: 3 steps dropped; rollback 1 of at most 10" in said
    assert is_finite(tmp_path / "checkpoint-1.pth")
    assert all(math.isfinite(entry["train_loss"]) for entry in log(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_parameter_that_is_lost_stops_a_run_whose_checkpoints_stay_whole(tmp_path, script):
    """They must not give way to weights from which nobody can go on."""
    words = [*FRAIL[script], *COLORS, *SMALL, "--epochs", 9, "--max_bad_steps", 6]
    words += ["--save_ckpt_every_steps", 1, "--output_dir", tmp_path]
    done = run(script, *words, env={"FRAIL": "parameter:5:0"}, expect=1)
    assert "7 bad steps in a row, the last one: loss is not finite; lower --lr" in done.stderr
    assert "the weights are not finite" in done.stdout
    kept = {path.name for path in tmp_path.glob("checkpoint-*-seen-*.pth")}
    assert kept == {"checkpoint-1-seen-6.pth"}  # of update 6 the weights are not finite
    assert all(is_finite(path) for path in tmp_path.glob("checkpoint-*.pth"))
    assert [fault["update"] for fault in faults(tmp_path)] == list(range(7, 14))


def test_return_brings_back_weights_moments_and_average(tmp_path):
    """The run ends as if the steps since the snapshot had been skipped from the beginning."""
    words = [*FRAIL["main_finetune.py"], *COLORS, *SMALL, "--epochs", 7, "--spike_factor", 5]
    words += ["--print_freq", 3, "--model_ema", "--model_ema_decay", "0.5", "--kernels", "torch"]
    words += ["--on_spike", "rollback", "--save_ckpt_every_steps", 4, "--save_ckpt_num", 9]
    said = run("main_finetune.py", *words, "--output_dir", tmp_path, env={"FRAIL": "loss:25:0"})
    (fault,) = faults(tmp_path)
    assert fault["update"] == 26  # the second of 4 steps of its epoch; the third is checked
    assert fault["loss"] > 5 * fault["running_loss"] > 0
    assert fault["ranks"][0]["first_not_finite"] is None
    assert "3 steps dropped" in said.stdout
    before, after = (
        torch.load(tmp_path / f"checkpoint-{n}.pth", weights_only=True) for n in (5, 6)
    )
    assert after["state"]["bad_steps"] == 3
    moments = [list(c["optimizer"]["state"].values()) for c in (before, after)]
    assert (moments[0][0]["step"].item(), moments[1][0]["step"].item()) == (24, 25)
    for name, value in before["model"].items():  # one update at the last, lowest rates
        torch.testing.assert_close(after["model"][name], value, rtol=0, atol=1e-4, msg=name)
    for name, value in before["model_ema"].items():
        torch.testing.assert_close(after["model_ema"][name], value, rtol=0.5, atol=1e-2, msg=name)


@pytest.mark.slow
def test_rollback_survives_a_restart(tmp_path):
    """Killed after a rollback, the run ends as one that was not, counts of rollbacks included."""
    words = [*FRAIL["main_pretrain.py"], *COLORS, *SMALL, "--epochs", 4, "--print_freq", 1]
    words += ["--on_spike", "rollback", "--save_ckpt_every_steps", 3, "--kernels", "torch"]
    env = {"FRAIL": "gradient:6:0"}
    whole, again = tmp_path / "whole", tmp_path / "again"
    run("main_pretrain.py", *words, "--output_dir", whole, env=env)
    run("main_pretrain.py", *words, "--output_dir", again, env=env)
    for path in again.glob("checkpoint-*.pth"):  # as if killed in update 9, two after the fault
        state = torch.load(path, weights_only=True)["state"]
        if state["global_step"] > 9:
            path.unlink()
    newest = max(again.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime_ns)
    kept = torch.load(newest, weights_only=True)["state"]["epoch_sums"]["guard"]
    assert (kept["returns"], kept["returned_at"]) == (1, 7)
    run("main_pretrain.py", *words, "--output_dir", again, env=env)
    ours, theirs = (
        torch.load(place / "checkpoint-3.pth", weights_only=True) for place in (again, whole)
    )
    assert_same(ours["model"], theirs["model"])
    assert ours["state"] == theirs["state"]
    assert ours["state"]["epoch_sums"]["guard"]["returns"] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_parameter_of_one_rank_brings_both_back_to_the_same_snapshot(tmp_path, script):
    """Each would have kept another: they differed for good, and nobody noticed."""
    words = [*FRAIL[script], *COLORS, *SMALL, "--batch_size", 3, "--on_spike", "rollback"]
    words += ["--snapshot_freq", 2, "--print_freq", 1, "--kernels", "torch", "--epochs", 3]
    words += ["--output_dir", tmp_path]
    said = run(script, *words, ranks=2, env={"FRAIL": "parameter:5:1", "HASHES": "1"}).stdout
    assert "3 steps dropped" in said
    last = dict(re.findall(r"weights of rank (\d): (\w+)", said))  # of each; ranks do not wait
    assert last.keys() == {"0", "1"}
    assert len(set(last.values())) == 1


# --- the guard ------------------------------------------------------------------------------


def guarded(stepper, model, optimizer, **options) -> tuple[AnomalyGuard, TrainState]:
    guard, state = AnomalyGuard(stepper, (model, optimizer), **options), TrainState()
    guard.begin_epoch(state, lambda *batch: None)
    return guard, state


def test_run_stops_after_bad_steps_in_a_row(log):
    model, optimizer, stepper = product(lr=1e-9)
    guard, state = guarded(stepper, model, optimizer, max_bad_steps=2)
    for x in (NAN, NAN, 1, NAN, NAN):  # never three in a row
        feed(model, stepper, x)
        assert guard.check(state) == ""
    assert state.bad_steps == 4
    feed(model, stepper, NAN)
    assert "3 bad steps in a row" in guard.check(state)
    assert log.text.count("skipped 1 step,") == 5
    feed(model, stepper, NAN)
    guard.data_loader, guard._report = [], lambda *_: ["images", "images", "loss"]
    assert guard.check(state) == ""  # after a resume the count starts from zero
    assert log.messages[-1] == "first non-finite value in a rerun: images; loss"


def test_single_bad_step_stops_a_run_that_allows_none():
    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, max_bad_steps=0)
    feed(model, stepper, NAN)
    assert guard.check(state).startswith("1 bad step in a row")


def test_search_of_fp16_for_its_scale_is_not_a_bad_step(tmp_path, log):
    model, optimizer, stepper = product(lr=1e-38, amp="fp16")
    guard, state = guarded(
        stepper, model, optimizer, max_bad_steps=0, snapshot_freq=1, folder=tmp_path
    )
    feed(model, stepper, *[3e38] * 16)
    assert guard.check(state) == ""
    assert state.bad_steps == 16
    assert "skipped 16 steps: fp16 reduced its loss scale" in log.text
    assert list(tmp_path.iterdir()) == []


def test_rollback_restores_weights_optimizer_state_and_counts():
    model, optimizer, stepper = adamw()
    guard, state = guarded(stepper, model, optimizer, snapshot_freq=3)
    twin = copy.deepcopy(model), None

    def train(*values: float) -> None:
        feed(model, stepper, *values)
        state.global_step += len(values)
        assert guard.check(state) == ""

    train(1, 2, 3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    usual = stepper.state()
    train(4, 5)
    assert not torch.equal(model.weight, twin[0].weight)
    train(6, NAN)  # the check at step 7 finds the NaN; the snapshot is that of step 3
    assert (state.global_step, state.bad_steps) == (7, 4)
    for _ in range(2):  # the snapshot itself is not trained on
        assert_same(model.state_dict(), kept[0])
        moments = [o["state"][0] for o in (optimizer.state_dict(), kept[1])]
        assert_same(*moments)
        assert stepper.state() == usual
        train(7, NAN)
    assert (state.global_step, state.bad_steps) == (11, 8)


def test_rollbacks_close_together_are_counted_and_others_forgotten():
    model, optimizer, stepper = product(lr=1e-9)
    guard, state = guarded(stepper, model, optimizer, snapshot_freq=3, max_bad_steps=2)

    def train(*values: float) -> str:
        feed(model, stepper, *values)
        state.global_step += len(values)
        return guard.check(state)

    for _ in range(3):
        assert train(1, NAN) == train(NAN) == train(1, 1, 1) == ""
    assert train(NAN) == train(1, NAN) == ""
    assert "rolled back 3 times" in train(1, NAN)
    assert train(NAN) == train(NAN) == ""  # after a resume the count starts from zero


def test_rollbacks_are_bounded_when_checks_are_further_apart_than_snapshots():
    model, optimizer, stepper = product(lr=1e-9)
    stepper.begin_epoch(1000)
    guard, state = guarded(stepper, model, optimizer, snapshot_freq=3, max_bad_steps=2)
    problems = []
    for _ in range(4):
        feed(model, stepper, *[NAN] * 7)
        state.global_step += 7
        problems.append(bool(guard.check(state)))
    assert problems == [False, False, True, False]


def test_rollback_to_before_the_first_step_leaves_no_uninitialized_momentum():
    """Fused SGD that skips its first step would read a momentum buffer it never wrote."""
    model, optimizer, stepper = product(lr=1e-3, momentum=0.5, fused=True)
    guard, state = guarded(stepper, model, optimizer, snapshot_freq=9)
    junk = [torch.full((1,), 7e8) for _ in range(100)]
    feed(model, stepper, 1, NAN)
    state.global_step += 2
    assert guard.check(state) == ""
    del junk
    feed(model, stepper, NAN, 1)
    assert model.weight.item() == pytest.approx(1 - 1e-3)


def test_bad_steps_are_listed_once_and_the_newest_are_kept(tmp_path):
    path = tmp_path / "bad_batch.json"
    path.write_text('{"of": "another program"}')
    append_entries(path, [{"epoch": 0, "update": 1}])
    path.write_text("[{half a line, since the run was killed")
    for update in (1, 2, 2, 3):  # step 2 repeats after a restart
        append_entries(path, [{"epoch": 0, "update": update}])
    assert [fault["update"] for fault in json.loads(path.read_text())] == [1, 2, 3]
    append_entries(path, [{"epoch": 1, "update": update} for update in range(10, 10 + MAX_ENTRIES)])
    assert [fault["update"] for fault in json.loads(path.read_text())] == [
        *range(10, 10 + MAX_ENTRIES)
    ]


def test_full_disk_does_not_end_the_run(tmp_path, monkeypatch, log):
    def full(*_: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr("training.anomaly.write_atomically", full)
    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, folder=tmp_path)
    feed(model, stepper, NAN)
    assert guard.check(state) == ""
    assert "bad_batch.json cannot be written: No space left" in log.text


@pytest.mark.parametrize("error", [UserError("cannot read a.png"), torch.OutOfMemoryError("no")])
def test_batch_that_cannot_be_rerun_is_reported(tmp_path, error):
    """A diagnosis that fails must not end the run."""

    class Gone:
        def reload(self, epoch: int, ids: torch.Tensor) -> None:
            raise error

    model, optimizer, stepper = product()
    guard, state = guarded(stepper, model, optimizer, data_loader=Gone(), folder=tmp_path)
    stepper.step(model(NAN), torch.tensor([3]))
    state.global_step = 1
    assert guard.check(state) == ""
    ((rank,),) = [fault["ranks"] for fault in faults(tmp_path)]
    assert rank["note"] == f"cannot be rerun: {type(error).__name__}: {error}"


# --- the first non-finite value -------------------------------------------------------------


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


def test_diagnosis_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3))
    before = copy.deepcopy(net.state_dict())
    assert find(net) == ""
    assert_same(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def test_frozen_parameters_have_no_gradient_to_check():
    net = network()
    for value in net.stages[0].parameters():
        value.requires_grad_(False)
    assert find(net) == ""
    net.stages[0][0].norm.weight.data[0] = NAN
    assert find(net) == "stages.0.0.norm.weight"


def test_compiled_network_is_checked_module_by_module():
    net = network()
    net.stages[2][0].register_forward_hook(lambda m, i, o: o * NAN)
    net.compile(backend="eager")
    assert find(net) == "output of stages.2.0"
