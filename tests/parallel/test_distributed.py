# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Two processes compute the same as one.

Two gloo ranks start once and run every function named `ranks_...`; the tests check their results.
"""

import itertools
import logging
import math
import re
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import utils
from data_loading.dataset import TransformedDataset
from data_loading.loader import DeviceLoader
from data_loading.samplers import EvalSampler
from data_loading.transforms import create_eval_transform
from data_loading.tta import ONE_VIEW, Views
from data_loading.workers import WatchedLoader
from engine_finetune import evaluate
from errors import Preempted, TrainingStopped, UserError
from models.convnextv2 import ConvNeXtV2
from optim_factory import create_optimizer
from parallel import process_group
from parallel.sharding import Parallelism
from tests.groups import results_of, run_ranks
from tests.training import test_precise_bn
from tests.training.test_run_lock import lock_from_elsewhere
from training import hook_table, hooks, resume, run_lock
from training.checkpoint import TrainableParts, TrainState
from training.checkpoint_manager import CheckpointManager
from training.criterion import Criterion
from training.meters import Means
from training.phases import Phases
from training.precise_bn import PreciseBn
from training.run_lock import acquire_run_lock
from training.stepper import Stepper
from training.steps import Steps

CPU = torch.device("cpu")
RANKS = 2
TEN_CROP = Views(["hflip", "five_crop"])
LEARNED = "tests.tiny:Temperature(start=2)"


def toy(seed: int = 0) -> ConvNeXtV2:
    """Return a toy classifier in float64 without parameters of zero or one."""
    torch.manual_seed(seed)
    model = ConvNeXtV2((1, 1, 1, 1), (4, 6, 8, 10), num_classes=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- jobs of the ranks ----------------------------------------------------------------------


def train(model: nn.Module, batch: int, loss: str = "ce", **options) -> dict[str, torch.Tensor]:
    """Train 3 epochs on 20 images: 5 micro-batches, 2 in each optimizer step, 1 in the last."""
    criterion = Criterion(loss).double()
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    images = images.to(model.head.weight.dtype)
    labels = torch.arange(20) % 3
    optimizer = create_optimizer(model, lr=0.01, layer_decay=0.9, loss=criterion)
    wrapped = Parallelism("ddp", CPU).wrap(model)
    stepper = Stepper(wrapped, optimizer, CPU, update_freq=2, criterion=criterion, **options)
    own = slice(process_group.get_rank() * batch, (process_group.get_rank() + 1) * batch)
    local = None
    for _ in range(3):
        stepper.begin_epoch(5)
        for block in torch.arange(20).split(4):
            with stepper.micro_batch():
                logits = wrapped(images[block[own]])
                loss = criterion(logits, labels[block[own]])
            stepper.step(loss)
            if local is None:
                local = model.head.weight.grad.clone()
    return {**model.state_dict(), **criterion.state_dict(), "first gradient": local}


def ranks_see_no_warning(rank: int, folder: Path) -> list[str]:
    """Runs first, since torch warns of strides only once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(toy().float(), batch=2)  # torch does not warn in float64
    return [str(warning.message) for warning in caught]


def ranks_train(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    return train(toy(seed=rank), batch=2)  # rank 1 must get the weights of rank 0


def ranks_train_clipped(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    return train(toy(), batch=2, clip_grad=0.05)


def ranks_train_with_the_loss(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Train parameters of the loss too, which are outside DistributedDataParallel."""
    return train(toy(), batch=2, loss=LEARNED, clip_grad=0.05)


def ranks_skip_together(rank: int, folder: Path) -> dict:
    """Let rank 1 have NaN: in loss and gradient, or in the loss alone."""
    result = {}
    for place, fused in itertools.product(range(4), (False, True)):
        for kind in ("loss and gradient", "loss alone"):
            layer = nn.Linear(1, 1, bias=False).double()
            layer.weight.data[:] = 1.0
            model = Parallelism("ddp", CPU).wrap(layer)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
            stepper = Stepper(model, optimizer, CPU, update_freq=2)
            stepper.begin_epoch(6)
            seen = []
            for micro in range(6):
                bad = rank == 1 and micro == place
                with stepper.micro_batch():
                    loss = model(torch.full((1, 1), rank + 1.0, dtype=torch.float64)).sum()
                    loss = loss + math.nan if bad and kind == "loss alone" else loss
                    loss = loss * math.nan if bad and kind != "loss alone" else loss
                update = stepper.step(loss)
                if update:
                    seen.append((update.taken.item(), layer.weight.item()))
            result[f"{place // 2}: {kind}, micro-batch {place}, {fused}"] = seen
    return result


class HalfUsed(nn.Module):
    """Two layers of which forward uses one, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.frozen = (nn.Linear(1, 1) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) + self.frozen(x)


def ranks_have_unused_parameters(rank: int, folder: Path) -> str:
    model = Parallelism("ddp", CPU).wrap(HalfUsed())
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = Stepper(model, torch.optim.SGD(trained, lr=1.0), CPU)
    stepper.begin_epoch(1)
    with stepper.micro_batch():
        loss = model(torch.ones(1, 1)).sum()
    try:
        stepper.step(loss)
    except UserError as error:
        return str(error)
    return "no error"


def ranks_restore_buffers(rank: int, folder: Path) -> dict:
    """Let one rank have NaN in the first or second micro-batch; rank 0's statistics are sent."""
    result = {}
    for bad_rank, place in itertools.product(range(RANKS), (None, 2, 3)):
        layers = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        model = Parallelism("ddp", CPU).wrap(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        stepper = Stepper(model, optimizer, CPU, update_freq=2)
        stepper.begin_epoch(6)
        for micro in range(6):
            x = torch.tensor([[1.0, 2.0], [4.0, 8.0]]) * (rank + 1)
            bad = rank == bad_rank and micro == place
            if place is None and micro in (2, 3):  # as if the step had not been there
                continue
            with stepper.micro_batch():
                loss = model(x * math.nan if bad else x).sum()
            stepper.step(loss)
        result[f"{bad_rank}, {place}"] = dict(layers[0].named_buffers())
    return result


def ranks_average(rank: int, folder: Path) -> dict:
    """Average images 0 to 6 with values 0, 1, 4, ..., 36: four of them on rank 0."""
    uneven = Means(["square"], CPU)
    for image in range(rank, 7, RANKS):
        uneven.update(1, square=torch.tensor(float(image**2)))
    alone = Means(["square", "never"], CPU)
    if rank == 0:
        alone.update(3, square=torch.tensor(5.0))
        alone.update(1, square=torch.tensor(1.0))
    return {
        "uneven": uneven.read(),
        "uneven, all": uneven.total(),
        "alone": alone.read(),
        "alone, all": alone.total(),
    }


class Pictures(torch.utils.data.Dataset):
    """Seven images of noise, with labels of three classes."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8), index % 3


def evaluation_batches(dist_eval: bool = True, views: Views = ONE_VIEW) -> DeviceLoader:
    several = views.crops > 1
    transform = create_eval_transform((32, 32), 0.8 if several else None, several)
    data = TransformedDataset(Pictures(), transform, seed=0)
    sampler = EvalSampler(7, process_group.get_rank(), process_group.get_world_size(), dist_eval)
    loader = WatchedLoader(data, sampler, batch_size=2)
    return DeviceLoader(loader, CPU, [0.5] * 3, [0.25] * 3, views)


def evaluation(dist_eval: bool = True, views: Views = ONE_VIEW) -> dict[str, float]:
    return evaluate(evaluation_batches(dist_eval, views), toy().float(), CPU, "none")


def predictions(folder: Path) -> str:
    """Return predictions.csv, which rank 0 writes; '' on others."""
    args = SimpleNamespace(output_dir=str(folder), hook=("predictions",), tracker=None, loss=None)
    with hook_table.build_eval_reporter(args, CPU, toy(), None) as reporter:
        evaluate(evaluation_batches(), toy().float(), CPU, "none", reporter=reporter)
    return (folder / "predictions.csv").read_text() if process_group.is_main_process() else ""


def ranks_predict(rank: int, folder: Path) -> str:
    return predictions(folder / f"predicted-{rank}")


def ranks_evaluate_with_other_statistics(rank: int, folder: Path) -> dict:
    """Only rank 0's running mean is right, and only rank 0 has no patience left."""
    model = nn.BatchNorm1d(2, affine=False).double()
    model.running_mean.fill_(100.0 * rank)
    images = torch.eye(2).double()
    evaluate([(images, torch.arange(2), None)], model, CPU, "none")
    state = TrainState(since_best=1 - rank, watched={"best": 50.0})
    phases = Phases(Steps.even(10, 9, 8), patience=2)
    stops = phases.ends_run(phases.next(state), state, {"best": 10.0})
    return {"mean": model.running_mean.tolist(), "stops": stops}


def ranks_measure_statistics(rank: int, folder: Path) -> list[float]:
    """Measure the statistics of 8 images: each rank has two batches of 2."""
    model = nn.BatchNorm2d(1)
    PreciseBn(test_precise_bn.batches(2, rank, RANKS), 8, CPU).update(model, None, epoch=1)
    return [model.running_mean.item(), model.running_var.item()]


def ranks_evaluate(rank: int, folder: Path) -> dict:
    return {"shared": evaluation(), "on one rank": evaluation(dist_eval=False)}


def ranks_evaluate_ten_crops(rank: int, folder: Path) -> dict:
    return evaluation(views=TEN_CROP)


class Recorder(hooks.Hook):
    def on_log(self, record, state) -> None:
        self.record = record


def ranks_write(rank: int, folder: Path) -> dict:
    """Write to a different folder on each rank: only that of rank 0 may exist afterwards."""
    own = folder / f"run-{rank}"
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    acquire_run_lock(str(own))
    parts, state = TrainableParts(model, optimizer), TrainState(epoch=1, global_step=1)
    utils.save_model(own, parts, state, {"args": {"epochs": 1}}, improved=["best"])
    args = SimpleNamespace(epochs=1, progress="lines", log_dir=None, print_freq=1, report=False)
    args.dry_run = False
    args.hook = args.tracker = None
    running = TrainState()
    with hook_table.build_reporter(args, own, CPU, running, Steps.even(1)) as reporter:
        own_hooks = len(reporter.hooks)
        recorder = Recorder()
        reporter.hooks.append(recorder)
        batches = SimpleNamespace()
        means = reporter.begin_epoch(["loss", "grad_norm"], batches)
        means.update(1, loss=torch.tensor(float(rank)), grad_norm=torch.tensor(1.0))
        reporter.after_batch(4)
        images = reporter.speed.images
        running.global_step += 1
        reporter.after_step(lr=0.1)
        running.epoch, running.stats = 1, {"train_loss": 1.0, "epoch": 0}
        reporter.end_epoch()
    return {
        "hooks": own_hooks,
        "images": images,
        "loss": recorder.record["loss"],
        "level": process_group.get_logger().level,
        "first": process_group.is_main_process(),
    }


def ranks_resume(rank: int, folder: Path) -> dict:
    """Resume all ranks from the checkpoint of rank 0."""
    dist.barrier()
    model = toy(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    point = resume.find_resume_point(folder / "run-0")
    state = resume.auto_load_model(point, TrainableParts(model, optimizer))
    return {"state": (state.epoch, state.global_step), "head": model.head.weight.detach()}


def ranks_refuse(rank: int, folder: Path) -> str:
    """Raise an error that only rank 0 can see."""
    (folder / "mixed").mkdir(exist_ok=True)
    (folder / "mixed" / "checkpoint-3.pth").write_bytes(b"of another run")
    dist.barrier()
    with pytest.raises(UserError) as caught:
        resume.find_resume_point(folder / "mixed", auto_resume=False)
    return str(caught.value)


def ranks_lose_the_run_folder(rank: int, folder: Path) -> list[str]:
    """Let another run take over the lock, which only rank 0 holds."""
    guard = SimpleNamespace(check=lambda state: "", snapshot=lambda state: None, state=dict)
    guard.recent = torch.zeros(2, 1)  # as a meter
    run_lock.BEAT = 0.05
    acquire_run_lock(str(folder / "lost"))
    if rank == 0:
        lock_from_elsewhere(folder / "lost")
        while not run_lock.is_lost():
            time.sleep(0.01)
    state = TrainState(global_step=3, samples_in_epoch=12)
    messages = []
    with CheckpointManager(lambda **_: None) as keeper:
        try:
            for state.global_step in range(3, 9):
                keeper.after_step(state, guard, guard)
        except TrainingStopped as error:
            messages = [str(error).split("/")[-1].split(" while")[0], str(state.global_step)]
        keeper.vote.wait()
    acquire_run_lock("")
    return messages


def ranks_wait_for_batches(rank: int, folder: Path) -> dict[str, list]:
    """Ask both ranks to stop while both, or one, wait for a batch, or one for its second."""
    stepper = SimpleNamespace(drop_window=lambda: None)
    quiet = SimpleNamespace(check=lambda state: "", snapshot=lambda state: None, stepper=stepper)
    found = {}
    for step, case in enumerate(("both", "one", "late"), 1):
        state = TrainState(global_step=step, samples_in_epoch=step)
        saved, means = [], Means(["loss"], CPU)
        try:
            with CheckpointManager(lambda state, saved=saved, **_: saved.append(state)) as keeper:
                means.update(1, loss=torch.tensor(2.0 + rank))
                keeper.round = 10 * step  # the store has the rounds of the case before
                keeper.after_step(state, means, quiet)
                state.samples_in_epoch += 1 + rank  # an accumulation window begins
                means.update(1, loss=torch.tensor(100.0))
                keeper._on_wait(False)  # not asked to stop
                keeper.signals.reason = "SIGTERM"
                if case == "one":
                    for arrived in (False, False, True) if rank == 0 else (True,):
                        keeper._on_wait(arrived)
                    state.global_step += 1
                    keeper.after_step(state, means, quiet)
                    keeper.after_step(state, means, quiet)  # the vote is one step late
                if case == "late":
                    for arrived in (False, True) if rank == 0 else ():
                        keeper._on_wait(arrived)
                    dist.barrier()
                while True:
                    keeper._on_wait(False)
                    time.sleep(0.01)
        except Preempted as stop:
            found[case] = [str(stop).partition(" Exit")[0]]
            found[case] += [(s.samples_in_epoch, s.epoch_sums["means"]["recent"]) for s in saved]
    return found


def ranks_cannot_write(rank: int, folder: Path) -> list[str]:
    """Make args.yaml, log.txt or TensorBoard's folder unwritable."""
    args = SimpleNamespace(epochs=1, progress="lines", log_dir=None, print_freq=1, report=False)
    args.dry_run = False
    args.hook = args.tracker = None
    messages = []
    for number, name in enumerate(["args.yaml", "log.txt", "tensorboard"]):
        place = folder / f"no-{name}"
        if rank == 0:
            place.mkdir()
            (place / name).write_text("") if number == 2 else (place / name).mkdir()
        with pytest.raises(UserError) as caught:
            hook_table.build_reporter(args, place, CPU, TrainState(), Steps.even(1)).__enter__()
        messages.append(str(caught.value))
    return messages


JOBS = [  # in this order
    ranks_see_no_warning,
    ranks_train,
    ranks_train_clipped,
    ranks_train_with_the_loss,
    ranks_skip_together,
    ranks_average,
    ranks_restore_buffers,
    ranks_evaluate,
    ranks_evaluate_ten_crops,
    ranks_evaluate_with_other_statistics,
    ranks_measure_statistics,
    ranks_predict,
    ranks_write,
    ranks_resume,
    ranks_refuse,
    ranks_lose_the_run_folder,
    ranks_wait_for_batches,
    ranks_cannot_write,
    ranks_have_unused_parameters,
]


# --- checks of their results -----------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread, as the ranks do: on a busy machine two are ten times slower at toy sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run all jobs on two ranks; returns their folder."""
    return run_ranks(JOBS, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    """Return the results of each rank's jobs."""
    return results_of(folder)


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name != "first gradient":
            assert torch.allclose(got[name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("train", {}),
        ("train_clipped", {"clip_grad": 0.05}),
        ("train_with_the_loss", {"clip_grad": 0.05, "loss": LEARNED}),
    ],
)
def test_two_ranks_train_as_one_with_twice_the_batch(results, job, options):
    expected = train(toy(), batch=4, **options)
    before = toy().state_dict() | {name: torch.tensor(2.0) for name in expected if "scale" in name}
    assert all(not torch.allclose(expected[n], before[n].to(expected[n])) for n in before)
    for result in results:
        assert_equal(result[f"ranks_{job}"], expected)


def test_gradients_are_averaged_only_with_the_last_micro_batch(results):
    first, second = (result["ranks_train"]["first gradient"] for result in results)
    assert not torch.allclose(first, second)
    alone = train(toy(), batch=4)["first gradient"]
    assert torch.allclose((first + second) / 2, alone, rtol=0, atol=1e-12)


def test_gradient_strides_match_the_buckets_of_ddp(results):
    """`Grad strides do not match bucket view strides` costs a copy of every gradient."""
    assert [result["ranks_see_no_warning"] for result in results] == [[], []]


def test_unused_parameters_are_named(results):
    """DDP's own error has numbers: `Parameter indices which did not receive grad: 2 3`."""
    for result in results:
        error = result["ranks_have_unused_parameters"]
        assert error.startswith(
            "2 parameters got no gradient: idle.weight, idle.bias. With several"
        )


def test_nan_on_one_rank_is_skipped_by_both(results):
    """The official code exits on one rank and hangs on the others."""
    assert results[0]["ranks_skip_together"] == results[1]["ranks_skip_together"]
    for case, seen in results[0]["ranks_skip_together"].items():
        # inputs 1 and 2 on the ranks: a good group's mean gradient is 1.5
        first_is_bad = [(False, 1.0), (True, -0.5), (True, -2.0)]
        second_is_bad = [(True, -0.5), (False, -0.5), (True, -2.0)]
        assert seen == (second_is_bad if case.startswith("1") else first_is_bad), case


def test_means_count_the_images_of_all_ranks_once(results):
    for result in results:
        found = result["ranks_average"]
        assert found["uneven"] == found["uneven, all"] == {"square": 91 / 7}  # 0 + 1 + ... + 36


def test_rank_without_images_takes_part_in_means(results):
    for result in results:
        for key in ("alone", "alone, all"):
            found = result["ranks_average"][key]
            assert found["square"] == 4.0  # 3 of 5 and 1 of 1
            assert math.isnan(found["never"])


def test_buffers_go_back_on_all_ranks_if_one_has_a_bad_batch(results):
    """DistributedDataParallel sends rank 0's buffers in each forward pass, NaN included."""
    for result in results:
        found = result["ranks_restore_buffers"]
        for key, buffers in found.items():
            expected = found[f"{key[0]}, None"]
            assert all(torch.equal(buffers[name], expected[name]) for name in expected), key
            assert expected["num_batches_tracked"] == 4


def test_ranks_evaluate_with_the_statistics_of_rank_0_and_stop_together(results):
    for result in results:
        assert result["ranks_evaluate_with_other_statistics"] == {"mean": [0.0, 0.0], "stops": True}


def test_statistics_measured_on_two_ranks_are_those_of_all_their_batches(results):
    values = test_precise_bn.first(8, epoch=1)
    for result in results:
        mean, var = result["ranks_measure_statistics"]
        assert mean == pytest.approx(values.mean().item(), abs=1e-6)
        assert var == pytest.approx(values.var(correction=0).item(), rel=1e-5)


def test_predictions_of_two_ranks_are_those_of_one_in_the_same_order(results, tmp_path):
    """Rank 0 has images 0, 2, 4, 6, or the first four."""
    (*alone, odds), (*both, odds_of_both) = (
        zip(*(row.split(",") for row in table.splitlines()[1:]), strict=True)
        for table in (predictions(tmp_path), results[0]["ranks_predict"])
    )
    assert alone[0] == tuple(f"number {i}" for i in range(7))
    assert both == alone
    assert [*map(float, odds_of_both)] == pytest.approx([*map(float, odds)], abs=1e-5)
    assert results[1]["ranks_predict"] == ""


def test_evaluation_of_seven_images_on_two_ranks_is_that_of_one(results):
    """A sampler with padding would count an eighth image."""
    expected = evaluation()
    assert expected["acc1"] in [100 * right / 7 for right in range(8)]
    for result in results:
        for found in result["ranks_evaluate"].values():
            assert found == pytest.approx(expected, rel=1e-5)
            assert (found["acc1"], found["acc5"]) == (expected["acc1"], expected["acc5"])


def test_ten_crops_of_seven_images_on_two_ranks_are_those_of_one(results):
    expected = evaluation(views=TEN_CROP)
    assert abs(expected["loss"] - evaluation()["loss"]) > 1e-4
    for result in results:
        found = result["ranks_evaluate_ten_crops"]
        assert found == pytest.approx(expected, rel=1e-5)
        assert (found["acc1"], found["acc5"]) == (expected["acc1"], expected["acc5"])


def test_only_the_first_rank_writes(results, folder):
    assert not (folder / "run-1").exists()
    written = {path.name for path in (folder / "run-0").iterdir()}
    assert written == {
        "args.yaml", "checkpoint-0.pth", "checkpoint-best.pth", "log.txt", "tensorboard",
    }  # fmt: skip
    assert len((folder / "run-0" / "log.txt").read_text().splitlines()) == 1
    first, second = (result["ranks_write"] for result in results)
    assert (first["hooks"] > 0, second["hooks"]) == (True, 0)
    assert (first["level"], second["level"]) == (logging.INFO, logging.ERROR)
    assert (first["first"], second["first"]) == (True, False)


def test_log_line_counts_all_ranks(results):
    for result in results:
        assert result["ranks_write"]["images"] == 8  # 4 on each
        assert result["ranks_write"]["loss"] == 0.5  # 0 and 1


def test_all_ranks_resume_from_what_the_first_wrote(results):
    for result in results:
        found = result["ranks_resume"]
        assert found["state"] == (1, 1)
        assert torch.equal(found["head"], toy().head.weight)


def test_error_of_the_first_rank_is_that_of_all(results):
    assert ["checkpoint-3.pth" in result["ranks_refuse"] for result in results] == [True, True]


def test_run_folder_lost_by_rank_0_ends_all_ranks_at_the_same_step(results):
    for text, step in (result["ranks_lose_the_run_folder"] for result in results):
        assert re.fullmatch("lost was taken over by process [0-9]+ on elsewhere", text)
        assert step == "4"  # the vote is one step late


def test_ranks_that_all_wait_for_a_batch_save_the_last_step_together(results):
    """If one of them saved alone, it would wait for the others, and they for its gradients."""
    sums = [[[2.0], [1.0]], [[3.0], [1.0]]]
    for rank, result in enumerate(results):
        stopped, saved = result["ranks_wait_for_batches"]["both"]
        assert stopped == "stopped by SIGTERM in epoch 1, step 1; checkpoint saved."
        assert saved == (1, sums)
        stopped, saved = result["ranks_wait_for_batches"]["late"]
        assert stopped == "stopped by SIGTERM in epoch 1, step 3; checkpoint saved."
        assert saved == (3, sums)
        stopped, saved = result["ranks_wait_for_batches"]["one"]
        assert stopped == "stopped by SIGTERM in epoch 1, step 3; checkpoint saved."
        assert saved[0] == 3 + rank


def test_hooks_that_cannot_write_end_all_ranks(results):
    """If rank 0 ended alone, the others would wait for it until nccl's timeout."""
    first, second = (result["ranks_cannot_write"] for result in results)
    assert first == second
    for message, name in zip(first, ["args.yaml", "log.txt", "tensorboard"], strict=True):
        assert re.match(f"the run cannot write its logs .*/{name}.*; choose another", message)
