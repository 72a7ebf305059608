# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A run computes the same with any --shard on any number of processes."""

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

import utils
from data_loading.loader import DeviceLoader
from engine_finetune import evaluate
from errors import UserError
from models.attach import add_heads
from models.fcmae import FCMAE
from models.heads import HeadOptions, parse_heads
from models.parts import keep_statistics
from optim_factory import create_optimizer
from parallel import sharding
from parallel.sharding import HAS_FSDP, Parallelism, build_parallelism
from parallel.state_dict import full_state_dict
from tests.groups import results_of, run_ranks, run_script
from tests.test_end_to_end import log
from tests.tiny import classifier, classifier64, fcmae64
from tests.training.test_precise_bn import batches
from training.anomaly import AnomalyGuard, first_not_finite
from training.checkpoint import TrainableParts, TrainState, load_optimizer
from training.ema import ModelEma
from training.precise_bn import PreciseBn
from training.stepper import Stepper, autocast

CPU = torch.device("cpu")
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
        *["--heads", "main=linear@norm, aux=mlp(4)@stages.2"],
        *["--loss", "main=ce, aux=0.5*focal"],
    ],
}


def train(script: str, folder: Path, processes: int, batch: int, freq: int, *words: Any) -> str:
    """Run a script to its end, or resume it; returns its output."""
    words = [*SCRIPTS[script], *RUN, "--batch_size", batch, "--update_freq", freq, *words]
    words += ["--output_dir", folder]
    return run_script(script, *words, ranks=processes, folder=folder.parent)


def distance(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two nested states of the same structure."""
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
    """Compare weights, EMA weights, optimizer state and log, up to rounding errors of float64."""
    one, two = (torch.load(path / "checkpoint-2.pth", weights_only=True) for path in (ours, theirs))
    for key in ("model", "model_ema", "optimizer"):
        if one[key] is not None:
            assert distance(one[key], two[key]) < 1e-10, key
    assert one["state"]["best"] == two["state"]["best"]
    lines = [log(path)[-1] for path in (ours, theirs)]
    speed = ("time_", "images_per_s", "mfu")
    numbers = [
        {k: x for k, x in line.items() if not (isinstance(x, list) or k.startswith(speed))}
        for line in lines
    ]
    # Means are of float32 losses, and probes of float32 features.
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5 if "rank_me" in lines[0] else 1e-6)


RESUMES = {
    ("main_finetune.py", "fsdp"): [("zero1", 2), ("ddp", 1), ("fsdp", 2)],
    ("main_pretrain.py", "zero1"): [("fsdp" if HAS_FSDP else "zero1", 2)],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function: script -> folder of its run on one process, 16 images a step."""
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
        pytest.param("ddp", 2, 4, 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 4, 2, marks=NEEDS_FSDP),
        pytest.param("ddp", 4, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_shard_and_number_of_processes_change_nothing(
    alone, tmp_path, script, shard, processes, batch, freq
):
    """4 processes evaluate 3 images: once the one without an image left and the others waited."""
    again = "true" if shard == "fsdp" else "false"  # gathers the weights of a block again
    words = ["--shard", shard, "--grad_checkpointing", again]
    train(script, tmp_path, processes, batch, freq, *words)
    assert_same_run(tmp_path, alone(script))
    # The checkpoints are the same, so a resume from these stands for a resume from any.
    for how, others in RESUMES.get((script, shard), ()):
        folder = tmp_path / how
        folder.mkdir()
        shutil.copy(tmp_path / "checkpoint-1.pth", folder)
        output = train(script, folder, others, 16 // others, 1, "--shard", how)
        assert f"resumed from {folder / 'checkpoint-1.pth'}, after epoch 2" in output
        assert "--shard" not in output  # among the flags that differ from the first run's
        assert_same_run(folder, alone(script))


# --- jobs of the ranks ----------------------------------------------------------------------


def build(
    mode: str, model: nn.Module, opt: str = "adamw", **options: Any
) -> tuple[Parallelism, nn.Module, Any]:
    parallelism = Parallelism(mode, CPU, **options)
    parallelism.shard(model)
    optimizer = create_optimizer(model, opt, lr=0.01, shard=mode)
    return parallelism, parallelism.wrap(model), optimizer


def images(rank: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def is_sharded(model: nn.Module) -> bool:
    return all(sharding.is_dtensor(parameter) for parameter in model.parameters())


def ranks_count(rank: int, folder: Path) -> dict:
    """Count the numbers of weights, gradients and optimizer state that each rank holds."""
    held = {}
    for mode in MODES:
        given = flags(shard=mode, grad_compression="bf16")
        assert build_parallelism(given, CPU, "bf16") == Parallelism(
            mode, CPU, "bf16", compress=True
        )
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        weights = list(model.parameters())
        for now in (False, True):
            with sharding.sync_gradients(wrapped, now):
                loss = wrapped(images(rank)).square().mean()
            loss.backward()
            if mode == "fsdp" and not now:  # FSDP2 keeps unreduced gradients elsewhere
                assert all(p.grad is None for p in weights)
        grads = sum(sharding.to_local(p.grad).numel() for p in weights if p.grad is not None)
        optimizer.step()
        states = sharding.local_optimizer(optimizer).state.values()
        moments = sum(sharding.to_local(state["exp_avg"]).numel() for state in states)
        held[mode] = [sum(sharding.to_local(p).numel() for p in weights), grads, moments]
    return held


class Reloader:
    """Stand-in for a loader; on rank 1 memory runs out in the middle of the forward."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def reload(self, epoch: int, ids: Tensor) -> tuple[Tensor, ...]:
        return images(self.rank), ids, ids

    def compute(self, network: nn.Module, batch: Any, update: int, micro: int) -> Tensor:
        if self.rank == 1:
            network.stages[1][0].pwconv2.register_forward_pre_hook(self.fail)
        return network(batch[0]).square().mean()

    def fail(self, *_: Any) -> None:
        raise MemoryError


def ranks_skip(rank: int, folder: Path) -> dict:
    """Report for each step if the weights are finite and changed; rank 1 has NaN in the second."""
    seen, ids = {}, torch.arange(4)
    for mode in MODES:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        start = sharding.to_local(model.head.bias).detach().clone()
        stepper = Stepper(wrapped, optimizer, CPU, clip_grad=1.0)
        guard = AnomalyGuard(stepper, (model, optimizer), snapshot_freq=1)
        guard.begin_epoch(TrainState(), None)
        (folder / mode).mkdir(exist_ok=True)
        loader = Reloader(rank)
        diagnosis = AnomalyGuard(stepper, (model, optimizer), loader, folder / mode)
        diagnosis.begin_epoch(TrainState(), loader.compute)
        stepper.begin_epoch(4)
        before, moved = None, []
        for update in range(4):
            with stepper.micro_batch():
                loss = wrapped(images(rank)).square().mean()
            stepper.step(loss * float("nan") if rank == 1 and update == 1 else loss, ids)
            if update == 1:  # must not disturb the steps that follow
                diagnosis.check(TrainState(global_step=2))
                model.stages[1][0].pwconv2._forward_pre_hooks.clear()
            after = torch.cat([sharding.to_local(p).detach().flatten() for p in model.parameters()])
            moved.append([bool(after.isfinite().all()), before is None or not after.equal(before)])
            before = after.clone()
        stepper.read()
        guard._roll_back(TrainState(global_step=4))
        back = sharding.to_local(model.head.bias).detach().equal(start)
        seen[mode] = {"moved": moved, "back": back}
    return seen


def ranks_average(rank: int, folder: Path) -> dict:
    """Average sharded weights; evaluate on rank 0 alone."""
    results = {}
    for mode in [mode for mode in MODES if mode != "zero1"]:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        average = ModelEma(model, 0.9, CPU)
        parallelism, wrapped, optimizer = build(mode, model)
        parallelism.shard(average.module)
        stepper = Stepper(wrapped, optimizer, CPU)
        stepper.begin_epoch(3)
        for update in range(3):
            with stepper.micro_batch():
                loss = wrapped(images(rank)).square().mean()
            taken = stepper.step(loss).taken
            average.update(model, torch.tensor(update + 1), taken)
            with sharding.unsharded(model) as network, torch.no_grad():
                output = network(images(9)) if rank == 0 else None  # must not disturb what follows
            assert is_sharded(model) == (mode == "fsdp")
        with sharding.unsharded(average.module) as network:
            state = {name: p.detach().clone() for name, p in network.named_parameters()}
        with sharding.unsharded(model) as network:
            torn = network.stages[1][0].register_forward_hook(lambda block, x, y: y * math.nan)
            found = first_not_finite(network, lambda: network(images(rank)).square().mean())
            torn.remove()
        with pytest.raises(ZeroDivisionError), sharding.unsharded(model) as network:
            raise ZeroDivisionError
        assert is_sharded(model) == (mode == "fsdp")
        uneven = [(images(9), torch.arange(4) % 3, None)] * (1 - rank)
        stats = evaluate(uneven, model, CPU, "none")  # rank 1 has no batch
        results[mode] = {"average": state, "output": output, "found": found, "stats": stats}
        stepper.begin_epoch(1)  # gradients are still averaged
        with stepper.micro_batch():
            loss = wrapped(images(rank)).square().mean()
        units = sharding.units(model)  # gathered for their forward, resharded after it
        assert all(hasattr(unit, "unshard") == (mode == "fsdp") for unit in units)
        assert all(is_sharded(unit) == (mode == "fsdp") for unit in units)
        results[mode]["norm"] = stepper.step(loss).grad_norm.item()
    return results


def note_dtype(dtypes: list[torch.dtype], module: nn.Module, *_: Any) -> None:
    dtypes.append(module.weight.dtype)


def ranks_compress(rank: int, folder: Path) -> dict:
    """Compute gradients reduced in float32 and in bf16; with --amp bf16 fsdp has bf16 weights."""
    results = {}
    for mode in [mode for mode in MODES if mode != "zero1"]:
        for amp, compress in (("none", False), ("none", True), ("bf16", False)):
            torch.manual_seed(0)
            model = classifier(num_classes=3, in_chans=3, stem_stride=1)
            _, wrapped, _ = build(mode, model, amp=amp, compress=compress)
            dtypes: list[torch.dtype] = []
            model.head.register_forward_hook(partial(note_dtype, dtypes))
            with sharding.sync_gradients(wrapped, True), autocast(CPU, amp):
                loss = wrapped(images(rank).float()).square().mean()
            loss.backward()
            grads = {name: sharding.full_tensor(p.grad) for name, p in model.named_parameters()}
            results[f"{mode} {amp} {compress}"] = grads
            half = (mode, amp) == ("fsdp", "bf16")
            assert dtypes == [torch.bfloat16 if half else torch.float32]
            with sharding.unsharded(model) as network:  # evaluation uses float32
                assert network.head.weight.dtype == torch.float32
    return results


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(1024, 3))


def ranks_normalize(rank: int, folder: Path) -> dict:
    """Build groups of SyncBatchNorm; evaluate with running statistics that differ by rank."""
    model, sizes = normed(), {}
    for group in (0, 1, 2):
        synced = sharding.convert_batch_norm(copy.deepcopy(model), group)
        assert type(synced[1]) is nn.SyncBatchNorm
        sizes[group] = dist.get_world_size(synced[1].process_group)
    if HAS_FSDP:
        Parallelism("fsdp", CPU).shard(synced)
        with sharding.unsharded(synced) as network:
            assert network[1].process_group is synced[1].process_group
    with pytest.raises(UserError, match="--sync_bn_group 3 does not divide the 2 processes"):
        sharding.convert_batch_norm(model, 3)
    model[1].running_mean.fill_(rank)
    model.register_buffer("count", torch.full((2, 3), rank).t())
    model.register_buffer("empty", torch.ones(2, 0))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    batch = images(0).float(), torch.arange(4) % 3, None
    stats = evaluate([batch], model, CPU, "none")
    means = [model[1].running_mean.tolist(), model.count.unique().tolist()]
    return {"sizes": sizes, "stats": stats, "means": means}


class Scaled(nn.Module):
    """A user's model, with attributes besides parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(2, 2), 1.0
        self.mean = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / self.temperature - self.mean


def ranks_gather(rank: int, folder: Path) -> dict:
    """Evaluate a sharded module with changed attributes; then let one rank run out of memory."""
    torch.manual_seed(0)
    expected, model = Scaled(), Scaled()
    model.load_state_dict(expected.state_dict())
    build("fsdp", model)
    for each in (expected, model):
        each.temperature, each.mean = 2.0, torch.ones(2)
    with sharding.unsharded(model) as network:
        assert torch.equal(network(torch.ones(1, 2)), expected(torch.ones(1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Tensor, "new_empty", short_of_memory)
        with pytest.raises(MemoryError, match="not enough memory for all weights: full"):
            sharding.unsharded(model).__enter__()
    with sharding.unsharded(model) as network:
        return {"output": network(torch.ones(1, 2)).detach()}


def short_of_memory(tensor: Tensor, shape: Any) -> Tensor:
    raise torch.OutOfMemoryError("full")


def measured(batches: DeviceLoader, mode: str = "ddp") -> dict[str, Tensor]:
    """Return the statistics that --precise_bn measures behind a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    Parallelism(mode, CPU).shard(model)
    PreciseBn(batches, 8, CPU).update(model, None, epoch=1)
    assert is_sharded(model) == (mode == "fsdp")
    return dict(model.named_buffers())


def ranks_measure(rank: int, folder: Path) -> dict:
    """Measure statistics on the 8 images of an epoch, which worker processes read."""
    return {mode: measured(batches(2, rank, 2, workers=1), mode) for mode in MODES}


def ranks_start(rank: int, folder: Path) -> dict:
    """Start from different random weights; train BatchNorm under bf16."""
    starts = {}
    for mode in MODES:
        torch.manual_seed(rank)
        model = normed()
        _, wrapped, optimizer = build(mode, model, amp="bf16")
        starts[mode] = [sharding.full_tensor(p).detach().clone() for p in model.parameters()]
        with sharding.sync_gradients(wrapped, True), autocast(CPU, "bf16"):
            loss = wrapped(images(rank).float()).square().mean()
        loss.backward()
        optimizer.step()
        assert not torch.equal(sharding.full_tensor(model[3].bias), starts[mode][3])
        assert model[1].running_mean.dtype == torch.float32
        with sharding.unsharded(model.eval()) as network:
            assert not network[1].training
            assert network[1].running_mean is model[1].running_mean
    return starts


def ranks_optimize(rank: int, folder: Path) -> dict:
    """Take three steps, undo one; return weights and step counts of parameter groups."""
    ends: dict[str, Any] = {}
    for mode in MODES:
        for opt in (
            sharding.FSDP_OPTIMIZERS if mode == "fsdp" else (*sharding.FSDP_OPTIMIZERS, "adan")
        ):
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
                    guard = AnomalyGuard(stepper, (model, optimizer), snapshot_freq=1)
                    guard.begin_epoch(TrainState(), None)
                if update == 1:
                    guard._roll_back(TrainState(global_step=2))
                optimizer.zero_grad()
            state = full_state_dict(optimizer)  # {} on rank 1
            counts = [group.get("step") for group in state.get("param_groups", ())]
            weights = torch.cat(
                [sharding.full_tensor(p).detach().flatten() for p in model.parameters()]
            )
            ends[f"{mode} {opt}"] = {"weights": weights, "counts": counts}
    return ends


def ranks_save(rank: int, folder: Path) -> dict:
    """Save an optimizer in each mode, and load what ddp saved into each."""
    state, saved = TrainState(), {}
    for mode in MODES:
        torch.manual_seed(0)
        model = classifier64(num_classes=3, in_chans=3, stem_stride=1)
        _, wrapped, optimizer = build(mode, model)
        for _ in range(2):
            wrapped(images(rank)).square().mean().backward()
            optimizer.step()
        saved[mode] = full_state_dict(optimizer) if mode != "ddp" else optimizer.state_dict()
        received = [saved["ddp"]]
        dist.broadcast_object_list(received)
        load_optimizer(optimizer, received[0] | {"name": "AdamW"}, "a file")
        saved[f"{mode} again"] = full_state_dict(optimizer)
        weights = full_state_dict(model)
        if rank == 0:  # a view would save its whole bucket
            assert all(w.nbytes == w.untyped_storage().nbytes() for w in weights.values())
        own, parts = folder / f"{mode} save", TrainableParts(model, optimizer)
        own.mkdir(exist_ok=True)
        utils.save_model(own, parts, state, {"args": {}})
        with torch.no_grad():
            sharding.to_local(model.head.bias).fill_(math.nan)
        refused = pytest.raises(UserError, match="not finite") if rank == 0 else nullcontext()
        with refused:
            utils.save_model(own, parts, state, {"args": {}})
    return saved if rank == 0 else {}


JOBS = [
    *[ranks_count, ranks_skip, ranks_average, ranks_compress, ranks_normalize, ranks_measure],
    *[ranks_start, ranks_optimize, ranks_save],
    *[ranks_gather] * HAS_FSDP,
]


# --- checks of their results ----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_ranks(JOBS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    return results_of(folder)


@pytest.mark.slow
def test_each_process_keeps_its_share_alone(results):
    """The flag must save memory: of weights, gradients and optimizer state."""
    first, second = (result["ranks_count"] for result in results)
    total = first["ddp"][0]
    for mode in MODES:
        shared = {"ddp": "", "zero1": "2", "fsdp": "012"}[mode]
        for place in range(3):
            both = first[mode][place] + second[mode][place]
            assert both == (total if str(place) in shared else 2 * total), (mode, place)
            if str(place) in shared:
                assert max(first[mode][place], second[mode][place]) < 0.7 * total


def test_nan_of_one_rank_is_skipped_and_rolled_back_in_each_mode(results):
    for result in results:
        for mode in MODES:
            moved = [[True, True], [True, False], [True, True], [True, True]]
            assert result["ranks_skip"][mode] == {"moved": moved, "back": True}, mode


@pytest.mark.parametrize("mode", MODES)
def test_training_continues_when_the_diagnosis_of_a_fault_fails(folder, results, mode):
    """One rank ran out of memory in it, the other did not."""
    (fault,) = json.loads((folder / mode / "bad_batch.json").read_text())
    notes = [rank["note"] for rank in fault["ranks"]]
    assert notes[0].startswith("every value was finite in a rerun")
    assert notes[1].startswith("cannot be rerun: MemoryError")


def test_average_is_the_same_on_all_ranks(results):
    """Each rank averages on its own, from weights that are the same after each step."""
    for mode in results[0]["ranks_average"]:
        one, two = (result["ranks_average"][mode]["average"] for result in results)
        assert distance(one, two) == 0, mode


@NEEDS_FSDP
def test_ema_and_evaluation_are_the_same_with_fsdp_and_ddp(results):
    for result in results:
        ddp, fsdp = result["ranks_average"]["ddp"], result["ranks_average"]["fsdp"]
        assert fsdp["found"] == ddp["found"] == "output of stages.1.0"
        assert fsdp["norm"] == pytest.approx(ddp["norm"], rel=1e-10)
    ddp, fsdp = (results[0]["ranks_average"][mode] for mode in ("ddp", "fsdp"))
    assert distance(fsdp["average"], ddp["average"]) < 1e-12
    assert distance(fsdp["output"], ddp["output"]) < 1e-12
    assert fsdp["stats"] == pytest.approx(ddp["stats"])


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=NEEDS_FSDP)])
def test_gradients_reduced_in_bf16_are_close_and_equal_on_all_ranks(results, mode):
    one, two = (result["ranks_compress"] for result in results)
    exact = torch.cat([grad.flatten() for grad in one[f"{mode} none False"].values()])
    for way, most in (
        ("none True", 0.02),
        ("bf16 False", 0.3),
    ):  # large, since the network is small
        half = torch.cat([grad.flatten() for grad in one[f"{mode} {way}"].values()])
        assert half.dtype == torch.float32
        error = ((half - exact).norm() / exact.norm()).item()
        assert 1e-5 < error < most, way
        assert distance(one[f"{mode} {way}"], two[f"{mode} {way}"]) == 0
        in_half = torch.equal(half, half.bfloat16().float())  # rounded in the reduction too
        assert in_half == (mode == "fsdp" and way == "none True") or mode == "ddp", way


def test_sync_bn_uses_groups_of_the_given_size(results):
    for result in results:
        assert result["ranks_normalize"]["sizes"] == {0: 2, 1: 1, 2: 2}


def test_evaluation_uses_the_running_statistics_of_rank_0(results):
    for result in results:
        assert result["ranks_normalize"]["means"] == [[0.0] * 4, [0]]
        assert result["ranks_normalize"]["stats"] == results[0]["ranks_normalize"]["stats"]


@NEEDS_FSDP
def test_evaluation_works_after_one_rank_lacked_memory_to_gather(results):
    """The other rank waited for it."""
    one, two = (result["ranks_gather"]["output"] for result in results)
    assert distance(one, two) == 0


def test_precise_statistics_are_those_of_one_process_in_each_mode(results):
    expected = measured(batches(2))
    assert (expected["1.running_var"] != 1).all()
    for result in results:
        for mode in MODES:
            assert distance(result["ranks_measure"][mode], expected) < 1e-6, mode


def test_all_ranks_start_with_the_weights_of_rank_0(results):
    one, two = (result["ranks_start"] for result in results)
    for mode in MODES:
        assert distance(one[mode], two[mode]) == distance(one[mode], one["ddp"]) == 0, mode


def test_supported_optimizers_give_the_same_weights_in_each_mode(results):
    """Also after a step was undone: zero1 kept the later step count."""
    ends = results[0]["ranks_optimize"]
    for key, end in ends.items():
        expected = ends[f"ddp {key.split()[1]}"]
        assert distance(end["weights"], expected["weights"]) < 1e-12, key
        assert end["counts"] == expected["counts"], key
    assert set(ends["ddp adan"]["counts"]) == {2}
    assert len(ends) == len(sharding.FSDP_OPTIMIZERS) * (1 + HAS_FSDP) + 1


def test_optimizer_state_is_saved_and_loaded_as_by_a_single_process(results):
    saved = results[0]["ranks_save"]
    for mode in MODES:
        assert distance(saved[mode], saved["ddp"]) < 1e-12
        assert distance(saved[f"{mode} again"], saved["ddp"]) < 1e-12


# --- one process -----------------------------------------------------------------------------


def test_extra_keys_of_an_optimizer_state_are_restored():
    """Kron saves the state of its random generator."""
    model = nn.Linear(3, 2)
    optimizers = [create_optimizer(model, "kron", lr=0.1) for _ in range(2)]
    optimizers[0].rng.random()
    saved = full_state_dict(optimizers[0])
    load_optimizer(optimizers[1], saved, "a file")
    assert distance(full_state_dict(optimizers[1])["rng_state"], saved["rng_state"]) == 0


def flags(**values: Any) -> SimpleNamespace:
    defaults = {"shard": "fsdp", "opt": "adamw", "sync_bn": False, "sync_bn_group": 0}
    return SimpleNamespace(**defaults | {"grad_compression": "none"} | values)


@pytest.mark.parametrize(
    ("values", "amp", "message"),
    [
        (
            {"opt": "lamb", "shard": "zero1"},
            "none",
            "--opt lamb is not known.* --shard zero1; use .*adamw",
        ),
        ({"opt": "muon"}, "none", "--opt muon is not known.* --shard fsdp; use .*adamw"),
        ({"compile": True}, "none", "--compile does not work with --shard fsdp"),
        ({"cuda_graphs": True}, "none", "--cuda_graphs does not work"),
        ({"model_ema_force_cpu": True}, "none", "--model_ema_force_cpu does not work"),
        ({}, "fp16", "--amp fp16 does not work"),
    ],
)
def test_flags_that_do_not_work_together_are_refused(values, amp, message):
    with pytest.raises(UserError, match=message):
        build_parallelism(flags(**values), CPU, amp)


def test_second_derivatives_of_several_processes_are_refused(monkeypatch):
    """DistributedDataParallel does not average them; it ended with a traceback."""
    build_parallelism(flags(shard="ddp", opt="adahessian"), CPU, "none")
    monkeypatch.setattr("parallel.sharding.get_world_size", lambda: 2)
    for opt in ("adahessian", "lookahead_adahessian"):
        with pytest.raises(UserError, match=f"--opt {opt} works in a single process only"):
            build_parallelism(flags(shard="ddp", opt=opt), CPU, "none")


def test_single_process_ignores_the_flags_and_logs_it(caplog):
    values = flags(shard="zero1", grad_compression="bf16", sync_bn=True)
    with caplog.at_level(logging.INFO, "convnextv2"):
        logging.getLogger("convnextv2").propagate = True
        parallelism = build_parallelism(values, CPU, "none")
    model = classifier(num_classes=3)
    parallelism.shard(model)
    assert parallelism.mode == "ddp"
    assert parallelism.wrap(model) is model
    for flag in ("--shard zero1", "--grad_compression bf16", "--sync_bn True"):
        assert f"{flag} has no effect with a single process" in caplog.text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def tied() -> nn.Module:
    return Tied()


def channels_last() -> nn.Module:
    return nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "shard", "message"),
    [
        (
            channels_last,
            "zero1",
            "--shard zero1: Conv2d has .* not contiguous: weight; use --shard ddp",
        ),
        (tied, "fsdp", "--shard fsdp: Tied has .* two names: second.weight; use --shard zero1"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused_by_name(make, shard, message):
    """torch fails on them after the first batch, or never."""
    with pytest.raises(UserError, match=message):
        Parallelism(shard, CPU).shard(make())


def test_sync_batch_norm_converts_models_on_gpus(monkeypatch):
    """Checked without a GPU."""
    monkeypatch.setattr(sharding, "convert_batch_norm", lambda model, group: (model, group))
    here = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(modules=normed().modules, parameters=lambda: iter([here]))
    assert sharding.sync_batch_norm(model, flags(sync_bn=True, sync_bn_group=4)) == (model, 4)


def test_sync_batch_norm_keeps_the_hooks_of_heads_and_of_gradient_checkpointing(monkeypatch):
    """Heads on a BatchNorm got nothing. In eval mode no other process is asked."""
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    heads = parse_heads("main=linear@bn2, aux=linear@blocks.1.0.bn2")
    add_heads(model, heads, (3, 32, 32), HeadOptions("--heads", 3))
    keep_statistics(model)
    model.named_heads.train()
    inputs = images(0).float()
    expected = model(inputs)
    monkeypatch.setattr(sharding, "get_world_size", lambda: 2)
    monkeypatch.setattr(sharding.dist, "new_subgroups", lambda *_, **__: (None, []))
    synced = sharding.convert_batch_norm(model, 0)
    norms = [module for module in synced.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert synced.bn2 in norms
    assert all(len(norm._forward_pre_hooks) == 1 for norm in norms)
    assert distance(synced(inputs), expected) == 0


def test_network_with_sync_batch_norm_is_not_run_by_one_rank_alone():
    """It would wait for ranks that do not run it."""
    model = nn.Sequential(nn.SyncBatchNorm(3))
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), 0.1), CPU)
    guard = AnomalyGuard(stepper, (model,), object())
    found = guard._diagnose(model, TrainState(), None)
    assert found["first_not_finite"] is None
    assert "SyncBatchNorm" in found["note"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (classifier(num_classes=3), "ConvNeXtV2 has no BatchNorm; drop it"),
        (nn.Sequential(nn.BatchNorm2d(3)), "on GPUs only, the device is cpu"),
    ],
)
def test_sync_bn_without_effect_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        sharding.sync_batch_norm(model, flags(sync_bn=True))
    assert sharding.sync_batch_norm(model, flags()) is model


def test_fsdp_shards_block_by_block():
    """A stage can be half of the network."""
    model: FCMAE = fcmae64(3, 1, 0.0, decoder_embed_dim=8)
    kinds = [type(unit).__name__ for unit in sharding.units(model)]
    assert kinds == ["Block"] * 5  # one of each stage, and the decoder's
    others = {"convnext_atto": (12, "ConvNeXtBlock"), "vit_tiny_patch16_224": (12, "Block")}
    for name, (count, kind) in others.items():
        kinds = [type(unit).__name__ for unit in sharding.units(timm.create_model(name))]
        assert kinds == [kind] * count
