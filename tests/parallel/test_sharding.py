# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""However many processes share the work, and whatever each of them keeps, the run is the same."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine_finetune import evaluate
from errors import UserError
from models.fcmae import FCMAE
from optim_factory import create_optimizer
from parallel import sharding
from parallel.sharding import Sharing, build_sharing
from parallel.state_dict import whole_state
from tests.groups import results_of, run_ranks
from tests.test_end_to_end import log, run
from tests.tiny import classifier, classifier64, fcmae64
from training import checkpoint
from training.anomaly import Guard, first_not_finite
from training.checkpoint import TrainState, load_optimizer
from training.ema import MovingAverage
from training.stepper import Stepper, autocast

CPU = torch.device("cpu")
HAS_FSDP = sharding.has_fsdp()
MODES = ["ddp", "zero1"] + ["fsdp"] * HAS_FSDP
NEEDS_FSDP = pytest.mark.skipif(not HAS_FSDP, reason="FSDP2 needs torch 2.7")
# 3 epochs of 2 updates of 16 images each; 3 images to evaluate.
RUN = ["--data_set", "tests.tiny:even", "--input_size", 16, "--stem_stride", 1, "--epochs", 3]
RUN += ["--lr", 0.01, "--warmup_epochs", 1, "--clip_grad", 1, "--num_workers", 0]
RUN += ["--device", "cpu", "--kernels", "torch"]
SCRIPTS = {
    "main_pretrain.py": ["--model", "tests.tiny:fcmae64", "--decoder_embed_dim", 8],
    "main_finetune.py": [
        *["--model", "tests.tiny:classifier64", "--layer_decay", 0.8],
        *["--model_ema", "--model_ema_eval"],
    ],
}


def train(script: str, folder: Path, processes: int, batch: int, freq: int, *words: Any) -> str:
    """A whole run, or what is left of it; returns what it printed."""
    words = [*SCRIPTS[script], *RUN, "--batch_size", batch, "--update_freq", freq, *words]
    return run(script, *words, "--output_dir", folder, ranks=processes).stdout


def distance(ours: Any, theirs: Any) -> float:
    """Largest difference of two nested states, which must be built alike."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        return (ours.double() - theirs.double()).abs().max().item()
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max([distance(ours[key], theirs[key]) for key in ours], default=0.0)
    if isinstance(ours, list | tuple):
        return max([distance(a, b) for a, b in zip(ours, theirs, strict=True)], default=0.0)
    if isinstance(ours, str | None):
        return 0.0 if ours == theirs else math.inf
    return abs(ours - theirs)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, average, moments and log lines, to what sums in another order cost in float64."""
    one, two = (torch.load(path / "checkpoint-2.pth", weights_only=True) for path in (ours, theirs))
    for key in ("model", "model_ema", "optimizer"):
        if one[key] is not None:
            assert distance(one[key], two[key]) < 1e-10, key
    assert one["state"]["best"] == two["state"]["best"]
    lines = [log(path)[-1] for path in (ours, theirs)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-6)  # means are of float32 losses


GO_ON = {
    ("main_finetune.py", "fsdp"): [("zero1", 2), ("ddp", 1), ("fsdp", 2)],
    ("main_pretrain.py", "zero1"): [("fsdp" if HAS_FSDP else "zero1", 2)],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """script -> folder of one process with 16 images an update."""
    folders = {}

    def of(script: str) -> Path:
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("alone")
            train(script, folders[script], 1, 16, 1)
        return folders[script]

    return of


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("shard", "processes", "batch", "freq"),
    [
        ("zero1", 2, 8, 1),
        ("ddp", 2, 4, 2),
        pytest.param("fsdp", 2, 4, 2, marks=NEEDS_FSDP),
        ("ddp", 4, 2, 2),
    ],
)
def test_processes_and_what_each_keeps_change_nothing(
    alone, tmp_path, script, shard, processes, batch, freq
):
    """Also not the evaluation of 3 images by 4: the last one left it out, and the rest waited."""
    again = "true" if shard == "fsdp" else "false"  # blocks computed again, gathered again
    words = ["--shard", shard, "--grad_checkpointing", again]
    train(script, tmp_path, processes, batch, freq, *words)
    assert_same_run(tmp_path, alone(script))
    # The files are alike, so that whoever goes on from these goes on from any.
    for how, others in GO_ON.get((script, shard), ()):
        folder = tmp_path / how
        folder.mkdir()
        shutil.copy(tmp_path / "checkpoint-1.pth", folder)
        told = train(script, folder, others, 16 // others, 1, "--shard", how)
        assert f"resumed from {folder / 'checkpoint-1.pth'}: epoch 2" in told
        assert "--shard" not in told  # which changes nothing
        assert_same_run(folder, alone(script))


# --- what the ranks do ----------------------------------------------------------------------


def build(
    mode: str, model: nn.Module, opt: str = "adamw", **options: Any
) -> tuple[Sharing, nn.Module, Any]:
    share = Sharing(mode, CPU, **options)
    share.spread(model)
    optimizer = create_optimizer(model, opt, lr=0.01, shard=mode)
    return share, share.wrap(model), optimizer


def images(rank: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def are_spread(model: nn.Module) -> bool:
    return all(sharding.is_spread(parameter) for parameter in model.parameters())


def ranks_keep(rank: int, folder: Path) -> dict:
    """Numbers that each rank holds of weights, gradients and moments after an update."""
    held = {}
    for mode in MODES:
        given = flags(shard=mode, grad_compression="bf16")
        assert build_sharing(given, CPU, "bf16") == Sharing(mode, CPU, "bf16", compress=True)
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        weights = list(model.parameters())
        for now in (False, True):
            with sharding.exchange(wrapped, now):
                loss = wrapped(images(rank)).square().mean()
            loss.backward()
            if mode == "fsdp" and not now:  # the next one adds to what each has kept for itself
                assert all(p.grad is None for p in weights)
        grads = sum(sharding.local(p.grad).numel() for p in weights if p.grad is not None)
        optimizer.step()
        states = sharding.own_part(optimizer).state.values()
        moments = sum(sharding.local(state["exp_avg"]).numel() for state in states)
        held[mode] = [sum(sharding.local(p).numel() for p in weights), grads, moments]
    return held


class Again:
    """A loader that gives batches again; on rank 1 memory runs out in the middle of the network."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def again(self, epoch: int, ids: Tensor) -> tuple[Tensor, ...]:
        return images(self.rank), ids, ids

    def compute(self, network: nn.Module, batch: Any, update: int, micro: int) -> Tensor:
        if self.rank == 1:
            network.stages[1][0].pwconv2.register_forward_pre_hook(self.fail)
        return network(batch[0]).square().mean()

    def fail(self, *_: Any) -> None:
        raise MemoryError


def ranks_skip(rank: int, folder: Path) -> dict:
    """Whether the weights are finite and moved, each update; rank 1 meets NaN in the second."""
    seen, ids = {}, torch.arange(4)
    for mode in MODES:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        start = sharding.local(model.head.bias).detach().clone()
        stepper = Stepper(wrapped, optimizer, CPU, clip_grad=1.0)
        guard = Guard(stepper, (model, optimizer), every=1)
        guard.begin_epoch(TrainState(), None)
        (folder / mode).mkdir(exist_ok=True)
        loader = Again(rank)
        looks = Guard(stepper, (model, optimizer), loader, folder / mode)
        looks.begin_epoch(TrainState(), loader.compute)
        stepper.begin_epoch(4)
        before, moved = None, []
        for update in range(4):
            with stepper.micro_batch():
                loss = wrapped(images(rank)).square().mean()
            stepper.step(loss * float("nan") if rank == 1 and update == 1 else loss, ids)
            if update == 1:  # the updates that follow must not notice that it was run again
                looks.look(TrainState(global_step=2))
                network = sharding.PLAIN.get(model, model)
                network.stages[1][0].pwconv2._forward_pre_hooks.clear()
            after = torch.cat([sharding.local(p).detach().flatten() for p in model.parameters()])
            moved.append([bool(after.isfinite().all()), before is None or not after.equal(before)])
            before = after.clone()
        stepper.read()
        guard._roll_back(TrainState(global_step=4))
        back = sharding.local(model.head.bias).detach().equal(start)
        seen[mode] = {"moved": moved, "back": back}
    return seen


def ranks_average(rank: int, folder: Path) -> dict:
    """The average of spread weights, and an evaluation by rank 0 alone."""
    results = {}
    for mode in [mode for mode in MODES if mode != "zero1"]:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        average = MovingAverage(model, 0.9, CPU)
        share, wrapped, optimizer = build(mode, model)
        share.spread(average.module)
        stepper = Stepper(wrapped, optimizer, CPU)
        stepper.begin_epoch(3)
        for update in range(3):
            with stepper.micro_batch():
                loss = wrapped(images(rank)).square().mean()
            taken = stepper.step(loss).taken
            average.update(model, torch.tensor(update + 1), taken)
            with sharding.whole_weights(model) as network, torch.no_grad():
                output = network(images(9)) if rank == 0 else None  # must not disturb what follows
            assert are_spread(model) == (mode == "fsdp")
        with sharding.whole_weights(average.module) as network:
            state = {name: p.detach().clone() for name, p in network.named_parameters()}
        with sharding.whole_weights(model) as network:
            torn = network.stages[1][0].register_forward_hook(lambda block, x, y: y * math.nan)
            found = first_not_finite(network, lambda: network(images(rank)).square().mean())
            torn.remove()
        with pytest.raises(ZeroDivisionError), sharding.whole_weights(model) as network:
            raise ZeroDivisionError
        if mode == "fsdp":  # nor does a second copy of the weights stay
            assert not any(weight.numel() for weight in network.parameters())
        assert are_spread(model) == (mode == "fsdp")
        uneven = [(images(9), torch.arange(4) % 3, None)] * (1 - rank)
        stats = evaluate(uneven, model, CPU, "none")  # of rank 0 alone
        results[mode] = {"average": state, "output": output, "found": found, "stats": stats}
        stepper.begin_epoch(1)  # and the gradients still come together
        with stepper.micro_batch():
            loss = wrapped(images(rank)).square().mean()
        units = sharding.units(model)  # gathered for their forward, and given back behind it
        assert all(hasattr(unit, "unshard") == (mode == "fsdp") for unit in units)
        assert all(are_spread(unit) == (mode == "fsdp") for unit in units)
        results[mode]["norm"] = stepper.step(loss).grad_norm.item()
    return results


def note_kind(kinds: list[torch.dtype], module: nn.Module, *_: Any) -> None:
    kinds.append(module.weight.dtype)


def ranks_compress(rank: int, folder: Path) -> dict:
    """Gradients in float32, and as they come out of bf16; weights in bf16 too with --amp bf16."""
    results = {}
    for mode in [mode for mode in MODES if mode != "zero1"]:
        for amp, compress in (("none", False), ("none", True), ("bf16", False)):
            torch.manual_seed(0)
            model = classifier(num_classes=3, in_chans=3, stem_stride=1)
            _, wrapped, _ = build(mode, model, amp=amp, compress=compress)
            kinds: list[torch.dtype] = []
            model.head.register_forward_hook(partial(note_kind, kinds))
            with sharding.exchange(wrapped, True), autocast(CPU, amp):
                loss = wrapped(images(rank).float()).square().mean()
            loss.backward()
            grads = {name: sharding.full(p.grad) for name, p in model.named_parameters()}
            results[f"{mode} {amp} {compress}"] = grads
            half = (mode, amp) == ("fsdp", "bf16")
            assert kinds == [torch.bfloat16 if half else torch.float32]
            with sharding.whole_weights(model) as network:  # which an evaluation does not round
                assert network.head.weight.dtype == torch.float32
    return results


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(1024, 3))


def ranks_normalise(rank: int, folder: Path) -> dict:
    """Groups of SyncBatchNorm; running statistics that differ, before an evaluation and after."""
    model, sizes = normed(), {}
    for group in (0, 1, 2):
        synced = sharding.converted(copy.deepcopy(model), group)
        assert type(synced[1]) is nn.SyncBatchNorm
        sizes[group] = dist.get_world_size(synced[1].process_group)
    if HAS_FSDP:
        Sharing("fsdp", CPU).spread(synced)  # a copy without weights, of groups that have none
        with sharding.whole_weights(synced) as network:
            assert network[1].process_group is synced[1].process_group
    with pytest.raises(UserError, match="--sync_bn_group 3: 2 processes.*one of 1, 2"):
        sharding.converted(model, 3)
    model[1].running_mean.fill_(rank)
    model.register_buffer("count", torch.full((2, 3), rank, dtype=torch.int16).t())
    model.register_buffer("wide", torch.full((1,), float("nan")).expand(4))
    model.register_buffer("empty", torch.ones(2, 0))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    batch = images(0).float(), torch.arange(4) % 3, None
    stats = evaluate([batch], model, CPU, "none")
    means = [model[1].running_mean.tolist(), model.count.unique().tolist()]
    return {"sizes": sizes, "stats": stats, "means": means}


class Odd(nn.Module):
    """Like a user's: what it holds beside parameters and buffers, and one that does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain, self.temperature = nn.Linear(2, 2), True, 1.0
        self.mean = torch.zeros(2)
        self.again = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.again[0].t() / self.temperature - self.mean


def ranks_gather(rank: int, folder: Path) -> dict:
    """What an evaluation must see of a module, and memory that is short on one rank."""
    torch.manual_seed(0)
    expected, model = Odd(), Odd()
    model.load_state_dict(expected.state_dict())
    build("fsdp", model)
    for each in (expected, model):
        each.temperature, each.mean = 2.0, torch.ones(2)
    with sharding.whole_weights(model) as network:
        assert torch.equal(network(torch.ones(1, 2)), expected(torch.ones(1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Tensor, "new_empty", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="for all weights on each process: full"):
            sharding.whole_weights(model).__enter__()
    with sharding.whole_weights(model) as network:
        return {"odd": network(torch.ones(1, 2)).detach()}


def short_of_memory(tensor: Tensor, shape: Any) -> Tensor:
    if shape == 0:
        return tensor.new_zeros(0)
    raise torch.OutOfMemoryError("full")


def ranks_begin(rank: int, folder: Path) -> dict:
    """Weights that were drawn apart, made one; BatchNorm under bf16, whose statistics are not."""
    begun = {}
    for mode in MODES:
        torch.manual_seed(rank)
        model = normed()
        _, wrapped, optimizer = build(mode, model, amp="bf16")
        begun[mode] = [sharding.full(p).detach().clone() for p in model.parameters()]
        with sharding.exchange(wrapped, True), autocast(CPU, "bf16"):
            loss = wrapped(images(rank).float()).square().mean()
        loss.backward()
        optimizer.step()
        assert not torch.equal(sharding.full(model[3].bias), begun[mode][3])
        assert model[1].running_mean.dtype == torch.float32
        with sharding.whole_weights(model.eval()) as network:
            assert not network[1].training
            assert network[1].running_mean is model[1].running_mean
    return begun


def ranks_optimize(rank: int, folder: Path) -> dict:
    """Weights after three updates, one of them undone, and what the groups of a file count."""
    ends: dict[str, Any] = {}
    for mode in MODES:
        for opt in sharding.BY_ROWS if mode == "fsdp" else (*sharding.BY_ROWS, "adan"):
            if mode == "zero1" and opt != "adan":
                continue
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double()
            _, wrapped, optimizer = build(mode, model, opt)
            for update in range(3):
                generator = torch.Generator().manual_seed(10 * update + rank)
                inputs = torch.randn(4, 5, dtype=torch.float64, generator=generator)
                wrapped(inputs).square().mean().backward()
                optimizer.step()
                if update == 0:
                    stepper = Stepper(wrapped, optimizer, CPU)
                    guard = Guard(stepper, (model, optimizer), every=1)
                    guard.begin_epoch(TrainState(), None)
                if update == 1:
                    guard._roll_back(TrainState(global_step=2))
                optimizer.zero_grad()
            counts = [group.get("step") for group in whole_state(optimizer)["param_groups"]]
            weights = torch.cat([sharding.full(p).detach().flatten() for p in model.parameters()])
            ends[f"{mode} {opt}"] = {"weights": weights, "counts": counts}
    return ends


def ranks_save(rank: int, folder: Path) -> dict:
    """States as files have them, of one optimizer, loaded into every other kind."""
    about = TrainState(), {"args": {}}
    whole = {}
    for mode in MODES:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        for _ in range(2):
            wrapped(images(rank)).square().mean().backward()
            optimizer.step()
        whole[mode] = whole_state(optimizer) if mode != "ddp" else optimizer.state_dict()
        given = [whole["ddp"]]
        dist.broadcast_object_list(given)
        load_optimizer(optimizer, given[0] | {"name": "AdamW"}, "a file")
        whole[f"{mode} again"] = whole_state(optimizer)
        weights = whole_state(model)
        if rank == 0:  # not a bucket of all of them for each
            assert all(w.nbytes == w.untyped_storage().nbytes() for w in weights.values())
        (folder / f"{mode} save").mkdir(exist_ok=True)
        parts = checkpoint.TrainableParts(model, optimizer)
        checkpoint.save_model(folder / f"{mode} save", parts, *about)
        with torch.no_grad():
            sharding.local(model.head.bias).fill_(math.nan)
        refused = pytest.raises(UserError, match="not finite") if rank == 0 else nullcontext()
        with refused:
            checkpoint.save_model(folder / f"{mode} save", parts, *about)
    return whole if rank == 0 else {}


JOBS = [
    *[ranks_keep, ranks_skip, ranks_average, ranks_compress, ranks_normalise, ranks_begin],
    *[ranks_optimize, ranks_save],
    *[ranks_gather] * HAS_FSDP,
]


# --- what they must have found --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_ranks(JOBS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    return results_of(folder)


def test_each_process_keeps_its_share_alone(results):
    """Else --shard would be a word: the numbers held, of weights, gradients and moments."""
    first, second = (result["ranks_keep"] for result in results)
    total = first["ddp"][0]
    for mode in MODES:
        shared = {"ddp": "", "zero1": "2", "fsdp": "012"}[mode]
        for place in range(3):
            both = first[mode][place] + second[mode][place]
            assert both == (total if str(place) in shared else 2 * total), (mode, place)
            if str(place) in shared:
                assert max(first[mode][place], second[mode][place]) < 0.7 * total


def test_nan_of_one_rank_is_skipped_and_rolled_back_whoever_has_what(results):
    for result in results:
        for mode in MODES:
            moved = [[True, True], [True, False], [True, True], [True, True]]
            assert result["ranks_skip"][mode] == {"moved": moved, "back": True}, mode


@pytest.mark.parametrize("mode", MODES)
def test_what_fails_when_run_again_is_written_down_and_training_goes_on(folder, results, mode):
    """One rank had no memory in the middle of it, the other was through; the next update waits."""
    (fault,) = json.loads((folder / mode / "bad_batch.json").read_text())
    notes = [rank["note"] for rank in fault["ranks"]]
    assert notes[0].startswith("every value was finite when run again")
    assert notes[1].startswith("cannot be run again: MemoryError")


def test_average_is_the_same_on_all_ranks(results):
    """Each computes its own, of weights that were the same after every update."""
    for mode in results[0]["ranks_average"]:
        one, two = (result["ranks_average"][mode]["average"] for result in results)
        assert distance(one, two) == 0, mode


@NEEDS_FSDP
def test_average_and_evaluation_of_spread_weights_are_those_of_whole_ones(results):
    for result in results:
        ddp, fsdp = result["ranks_average"]["ddp"], result["ranks_average"]["fsdp"]
        assert fsdp["found"] == ddp["found"] == "output of stages.1.0"
        assert fsdp["norm"] == pytest.approx(ddp["norm"], rel=1e-10)
    ddp, fsdp = (results[0]["ranks_average"][mode] for mode in ("ddp", "fsdp"))
    assert distance(fsdp["average"], ddp["average"]) < 1e-12
    assert distance(fsdp["output"], ddp["output"]) < 1e-12
    assert fsdp["stats"] == pytest.approx(ddp["stats"])


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=NEEDS_FSDP)])
def test_gradients_that_travel_in_half_are_close_and_equal_on_all(results, mode):
    one, two = (result["ranks_compress"] for result in results)
    exact = torch.cat([grad.flatten() for grad in one[f"{mode} none False"].values()])
    for way, most in (("none True", 0.02), ("bf16 False", 0.3)):  # of so small a network
        half = torch.cat([grad.flatten() for grad in one[f"{mode} {way}"].values()])
        assert half.dtype == torch.float32
        error = ((half - exact).norm() / exact.norm()).item()
        assert 1e-5 < error < most, way
        assert distance(one[f"{mode} {way}"], two[f"{mode} {way}"]) == 0
        in_half = torch.equal(half, half.bfloat16().float())  # as it travelled, not only was made
        assert in_half == (mode == "fsdp" and way == "none True") or mode == "ddp", way


def test_sync_bn_has_the_groups_that_are_asked_for(results):
    for result in results:
        assert result["ranks_normalise"]["sizes"] == {0: 2, 1: 1, 2: 2}


def test_evaluation_takes_the_running_statistics_of_rank_0(results):
    for result in results:
        assert result["ranks_normalise"]["means"] == [[0.0] * 4, [0]]
        assert result["ranks_normalise"]["stats"] == results[0]["ranks_normalise"]["stats"]


@NEEDS_FSDP
def test_evaluation_sees_all_of_a_module_and_wants_of_memory_are_told_to_all(results):
    """The one that had enough would have waited for the other, or found half of the weights."""
    one, two = (result["ranks_gather"]["odd"] for result in results)
    assert distance(one, two) == 0


def test_weights_begin_as_those_of_rank_0(results):
    one, two = (result["ranks_begin"] for result in results)
    for mode in MODES:
        assert distance(one[mode], two[mode]) == distance(one[mode], one["ddp"]) == 0, mode


def test_optimizers_that_are_let_through_come_out_the_same(results):
    """Also after an update that was undone: zero1 gave its later count of steps to the earlier."""
    ends = results[0]["ranks_optimize"]
    for key, end in ends.items():
        expected = ends[f"ddp {key.split()[1]}"]
        assert distance(end["weights"], expected["weights"]) < 1e-12, key
        assert end["counts"] == expected["counts"], key
    assert set(ends["ddp adan"]["counts"]) == {2}
    assert len(ends) == len(sharding.BY_ROWS) * (1 + HAS_FSDP) + 1


def test_optimizer_is_saved_and_loaded_as_if_one_process_had_it(results):
    saved = results[0]["ranks_save"]
    for mode in MODES:
        assert distance(saved[mode], saved["ddp"]) < 1e-12
        assert distance(saved[f"{mode} again"], saved["ddp"]) < 1e-12


# --- alone ----------------------------------------------------------------------------------


def test_what_an_optimizer_saves_besides_its_moments_comes_back():
    """Kron draws when it renews its preconditioner: its generator went on elsewhere."""
    model = nn.Linear(3, 2)
    optimizers = [create_optimizer(model, "kron", lr=0.1) for _ in range(2)]
    optimizers[0].rng.random()
    saved = whole_state(optimizers[0])
    load_optimizer(optimizers[1], saved, "a file")
    assert distance(whole_state(optimizers[1])["rng_state"], saved["rng_state"]) == 0


def flags(**given: Any) -> SimpleNamespace:
    usual = {"shard": "fsdp", "opt": "adamw", "sync_bn": False, "sync_bn_group": 0}
    return SimpleNamespace(**usual | {"grad_compression": "none"} | given)


@pytest.mark.parametrize(
    ("given", "amp", "message"),
    [
        ({"opt": "lamb", "shard": "zero1"}, "none", "--opt lamb with --shard zero1.*adamw"),
        ({"opt": "muon"}, "none", "--opt muon with --shard fsdp.*adamw"),
        ({"opt": "adamx"}, "none", "optimizer 'adamx'. Did you mean 'adamax'"),
        ({"shard": "ddp", "sync_bn": True, "cuda_graphs": True}, "none", "go with --sync_bn"),
        ({"compile": True}, "none", "--compile does not go with --shard fsdp"),
        ({"cuda_graphs": True}, "none", "--cuda_graphs does not go"),
        ({"model_ema_force_cpu": True}, "none", "--model_ema_force_cpu does not go"),
        ({}, "fp16", "--amp fp16 does not go"),
        ({"shard": "ddp", "sync_bn_group": 2}, "none", "--sync_bn_group without --sync_bn"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_once(given, amp, message):
    with pytest.raises(UserError, match=message):
        build_sharing(flags(**given), CPU, amp)


def test_one_process_keeps_all_and_says_so(caplog):
    given = flags(shard="zero1", grad_compression="bf16", sync_bn=True)
    with caplog.at_level(logging.INFO, "convnextv2"):
        logging.getLogger("convnextv2").propagate = True
        share = build_sharing(given, CPU, "none")
    model = classifier(num_classes=3)
    share.spread(model)
    assert share.mode == "ddp"
    assert share.wrap(model) is model
    for flag in ("--shard zero1", "--grad_compression bf16", "--sync_bn True"):
        assert f"{flag}: one process has nobody to share with" in caplog.text


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())


def scaled() -> nn.Module:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(()))
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def tied() -> nn.Module:
    return Tied()


def sideways() -> nn.Module:
    return nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "shard", "message"),
    [
        (mixed, "zero1", "--shard zero1: Sequential has.*float32 and torch.float64.*ddp"),
        (mixed, "fsdp", "--shard fsdp: Sequential has.*float32 and torch.float64.*ddp"),
        (scaled, "fsdp", "--shard fsdp: Linear has .* scale; use --shard zero1"),
        (sideways, "fsdp", "--shard fsdp: Conv2d has .* not contiguous: weight; use --shard ddp"),
        (sideways, "zero1", "--shard zero1: Conv2d has .* not contiguous: weight; use --shard ddp"),
        (tied, "fsdp", "--shard fsdp: Tied has .* two names: second.weight; use --shard zero1"),
    ],
)
def test_models_that_cannot_be_shared_are_refused_by_name(make, shard, message):
    """torch says it after the first batch, or in its own words."""
    with pytest.raises(UserError, match=message):
        Sharing(shard, CPU).spread(make())


def test_sync_batch_norm_converts_what_is_on_gpus(monkeypatch):
    """What the flag does on a machine without one; a model that came back as it was did nothing."""
    monkeypatch.setattr(sharding, "converted", lambda model, group: (model, group))
    here = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(modules=normed().modules, parameters=lambda: iter([here]))
    assert sharding.sync_batch_norm(model, flags(sync_bn=True, sync_bn_group=4)) == (model, 4)


def test_network_that_waits_for_others_is_not_run_again_alone():
    """SyncBatchNorm would wait for a rank whose images were bad, or who was through."""
    model = nn.Sequential(nn.SyncBatchNorm(3))
    guard = Guard(Stepper(model, torch.optim.SGD(model.parameters(), 0.1), CPU), (model,), object())
    told = guard._run_again(model, TrainState(), None)
    assert told["first_not_finite"] is None
    assert "SyncBatchNorm" in told["note"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (classifier(num_classes=3), "ConvNeXtV2 has no BatchNorm; drop it"),
        (nn.Sequential(nn.BatchNorm2d(3)), "on GPUs only, this is cpu"),
    ],
)
def test_sync_bn_that_would_do_nothing_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        sharding.sync_batch_norm(model, flags(sync_bn=True))
    assert sharding.sync_batch_norm(model, flags()) is model


def test_blocks_are_what_fsdp_gathers_at_a_time():
    """Not a stage of them, of which one can be half of the network."""
    model: FCMAE = fcmae64(3, 1, 0.0, decoder_embed_dim=8)
    kinds = [type(unit).__name__ for unit in sharding.units(model)]
    assert kinds == ["Block"] * 5  # one of each stage, and the decoder's
    others = {"convnext_atto": (12, "ConvNeXtBlock"), "vit_tiny_patch16_224": (12, "Block")}
    for name, (count, kind) in others.items():
        kinds = [type(unit).__name__ for unit in sharding.units(timm.create_model(name))]
        assert kinds == [kind] * count
