# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""An epoch, run through the training scripts' own wiring."""

import copy
import itertools
import json
from statistics import mean
from typing import ClassVar

import pytest
import torch

import engine_finetune
import engine_pretrain
import main_finetune
import main_pretrain
from config import parser as options
from errors import UserError
from training.anomaly import AnomalyGuard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.criterion import Criterion
from training.ema import ModelEma
from training.head_losses import HeadLosses
from training.hooks import Reporter
from training.log_lines import LineHook
from training.meters import Means
from training.schedules import Schedule
from training.stepper import Stepper

COMMON = (
    "--input_size 16 --stem_stride 1 --batch_size 6 --lr 0.01 --num_workers 0 --device cpu "
    "--warmup_epochs 0 --output_dir none"
)
PRETRAIN = f"--model tests.tiny:fcmae --data_set tests.tiny:colors {COMMON}"
FINETUNE = f"--model tests.tiny:classifier --data_set tests.tiny:colors {COMMON} --aa none"


def pretrain(words: str) -> None:
    main_pretrain.main(
        options.parse(main_pretrain.get_args_parser(), f"{PRETRAIN} {words}".split())
    )


def finetune(words: str) -> None:
    main_finetune.main(
        options.parse(main_finetune.get_args_parser(), f"{FINETUNE} {words}".split())
    )


class Watched:
    """Notes what the loss function of an engine was given."""

    def __init__(self, monkeypatch, owner, name: str) -> None:
        self.calls: list[tuple] = []
        self.options: list[dict] = []
        real = getattr(owner, name)

        def noting(*args, **kwargs):
            self.calls.append(args)
            self.options.append(kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)


class Running(torch.nn.Module):
    """A loss with a running mean, which changes in training mode alone, like BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
        if self.training:
            self.mean.lerp_(losses.detach().mean(), 0.1)
        return losses / self.mean


@pytest.mark.parametrize("words", ["", "--freeze_backbone"])
def test_the_loss_gets_the_outputs_of_all_heads_and_hooks_those_of_the_first(monkeypatch, words):
    losses = Watched(monkeypatch, HeadLosses, "forward")
    shown = Watched(monkeypatch, Reporter, "after_batch")
    finetune(f"--heads main=linear@norm,aux=mlp(4)@stages.2 --epochs 1 --disable_eval {words}")
    assert len(losses.calls) == len(shown.calls) == 4
    for (_, outputs, _), (_, _, batch) in zip(losses.calls, shown.calls, strict=True):
        assert list(outputs) == ["main", "aux"]
        assert batch.outputs is outputs["main"]


def test_evaluation_does_not_change_buffers_of_the_loss():
    criterion = Criterion("tests.test_engines:Running")
    batches = [(torch.eye(3), torch.tensor([0, 1, 1]), None)]
    model = torch.nn.Flatten()
    engine_finetune.evaluate(batches, model, torch.device("cpu"), "none", criterion)
    assert criterion.terms[0].loss.mean == 1
    assert criterion.training
    assert criterion.terms[0].training
    criterion(torch.eye(3), torch.tensor([0, 1, 1]))
    assert criterion.terms[0].loss.mean != 1


def test_images_come_in_another_order_every_epoch_of_a_single_process(monkeypatch):
    """set_epoch was only called with more than one process: the same shuffle again and again."""
    seen = Watched(monkeypatch, engine_pretrain, "mask_noise")
    pretrain("--epochs 2 --picture_freq 0")
    first, second = ([call[2].tolist() for call in seen.calls[i : i + 4]] for i in (0, 4))
    assert [call[1] for call in seen.calls[:8]] == [0] * 4 + [1] * 4  # epochs, of masks too
    assert first != second
    assert len({i for batch in first for i in batch}) == 24  # of 26: whole batches, none twice


def test_masks_differ_between_epochs_and_keep_the_ratio(monkeypatch):
    masks = []
    real = engine_pretrain.random_mask
    monkeypatch.setattr(
        engine_pretrain, "random_mask", lambda *a: masks.append(real(*a)) or masks[-1]
    )
    pretrain("--epochs 2 --mask_ratio 0.5")
    assert all((mask.sum(1) == 2).all() for mask in masks)
    assert not torch.equal(torch.cat(masks[:4]), torch.cat(masks[4:]))


@pytest.mark.parametrize(
    ("words", "largest"),
    [("--smoothing 0.3 --mixup 0", None), ("--smoothing 0 --mixup 0.8", 1.0)],
)
def test_mixup_gives_soft_labels_and_smoothing_acts_without_it(monkeypatch, words, largest):
    seen = Watched(monkeypatch, torch.nn.functional, "cross_entropy")
    finetune(f"--epochs 1 --disable_eval {words}")
    steps = [i for i, call in enumerate(seen.calls) if len(call[0]) == 6]  # not of the trials
    targets, smoothing = seen.calls[steps[0]][1], seen.options[steps[0]]["label_smoothing"]
    if largest is None:
        assert smoothing == 0.3
        assert targets.shape == (6,)
    else:
        assert smoothing == 0.0
        assert targets.shape == (6, 3)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        assert 0 < targets.max() <= largest


@pytest.mark.parametrize("print_freq", [1, 3, 100])
def test_ema_does_not_move_when_a_step_was_skipped(monkeypatch, print_freq):
    """The official EMA followed steps that the scaler had skipped."""
    averaged = []
    build = main_finetune.build_ema

    def watching(args, model):
        ema = build(args, model)
        update = ema.update

        def noting(model, updates, taken):
            averaged.append((updates.item(), taken.item()))
            update(model, updates, taken)

        ema.update = noting
        return ema

    monkeypatch.setattr(main_finetune, "build_ema", watching)
    finetune(f"--epochs 2 --model_ema --data_set tests.tiny:poisoned --print_freq {print_freq}")
    assert [updates for updates, taken in averaged if taken] == [1, 2, 3, 4, 5, 6]
    assert [taken for _, taken in averaged].count(False) == 2


def normed(num_classes: int, **unused) -> torch.nn.Module:
    """A classifier with running statistics, for --model."""
    conv = torch.nn.Conv2d(3, 4, 3)
    layers = [conv, torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(784, num_classes)]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("print_freq", [1, 100])
def test_bad_image_leaves_running_statistics_and_their_average_finite(tmp_path, print_freq):
    """`test_loss` was NaN from the first NaN image on, in an epoch that counted as the best."""
    words = f"--epochs 2 --model_ema --print_freq {print_freq} --output_dir {tmp_path}"
    finetune(f"{words} --data_set tests.tiny:poisoned --model tests.test_engines:normed")
    saved = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)
    assert saved["state"]["bad_steps"] == 2
    for key in ("model", "model_ema"):
        assert torch.isfinite(saved[key]["1.running_mean"]).all(), key
        assert torch.isfinite(saved[key]["1.running_var"]).all(), key
        assert saved[key]["1.num_batches_tracked"] == 6, key  # 8 steps, 2 of them skipped


@pytest.mark.parametrize("print_freq", [1, 100])
def test_checkpoint_counts_every_skipped_step(tmp_path, print_freq):
    words = f"--epochs 2 --print_freq {print_freq} --output_dir {tmp_path}"
    pretrain(f"{words} --data_set tests.tiny:poisoned --picture_freq 0")
    for epoch in (0, 1):
        state = torch.load(tmp_path / f"checkpoint-{epoch}.pth", weights_only=True)["state"]
        assert (state["global_step"], state["bad_steps"]) == (4 * epoch + 4, epoch + 1)


def test_schedule_acts_once_per_step_and_ends_at_the_minimum(monkeypatch):
    applied = []
    real = Schedule.apply
    monkeypatch.setattr(
        Schedule,
        "apply",
        lambda self, update: applied.append((update, real(self, update))) or applied[-1][1],
    )
    finetune("--epochs 2 --update_freq 3 --min_lr 0.001 --disable_eval")
    assert [update for update, _ in applied] == [0, 1, 2, 3]  # groups of 3 and 1, twice
    assert applied[0][1] == pytest.approx(0.01)
    assert applied[-1][1] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("run", "engine"), [(pretrain, engine_pretrain), (finetune, engine_finetune)]
)
def test_log_holds_the_means_of_the_steps(tmp_path, monkeypatch, run, engine):
    """Of the losses, norms and accuracies that the engine computed in training mode."""
    losses, norms, records = [], [], []
    step = Stepper.step

    def noting(self, loss, ids):
        assert all(module.training for module in self.model.modules())
        losses.append(loss.item())
        result = step(self, loss, ids)
        norms.append(result.grad_norm.item())
        return result

    monkeypatch.setattr(Stepper, "step", noting)
    monkeypatch.setattr(LineHook, "on_log", lambda self, record, state: records.append(record))
    monkeypatch.setattr(LineHook, "on_first_step", lambda *_: None)
    seeds = Watched(monkeypatch, engine, "seed_all")
    checks = Watched(monkeypatch, AnomalyGuard, "check")
    run(f"--epochs 2 --print_freq 3 --save_ckpt false --log_dir none --output_dir {tmp_path}")
    entries = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    for epoch, entry in enumerate(entries):
        part = slice(4 * epoch, 4 * epoch + 4)
        assert entry["train_loss"] == pytest.approx(mean(losses[part]))
        assert entry["train_grad_norm"] == pytest.approx(mean(norms[part]))
    assert len(entries) == 2
    assert seeds.calls == [(0, number, 0, 0) for number in range(8)]
    assert [record["step"] for record in records] == [3, 4, 3, 4]
    assert len(checks.calls) == 4
    assert all(record["images_per_s"] > 0 for record in records)


@pytest.mark.parametrize("mixup", [0, 0.8])
def test_training_accuracy_is_the_mean_over_images_or_absent(tmp_path, monkeypatch, mixup):
    found = []
    real = engine_finetune.accuracy

    def noting(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(engine_finetune, "accuracy", noting)
    words = f"--epochs 1 --disable_eval --mixup {mixup} --log_dir none --output_dir {tmp_path}"
    finetune(f"{words} --save_ckpt false")
    entry = json.loads((tmp_path / "log.txt").read_text())
    if mixup:  # mixed images have no single right class
        assert found == []
        assert entry["train_class_acc"] is None
    else:
        assert [len(values) for values in found] == [1] * 4
        assert entry["train_class_acc"] == mean(torch.cat([value for (value,) in found]).tolist())


def test_training_accuracy_counts_once_images_are_no_longer_mixed(tmp_path):
    words = "--epochs 2 --disable_eval --mixup 0.8 --mixup_off_epoch 1 --log_dir none"
    finetune(f"{words} --output_dir {tmp_path} --save_ckpt false")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    mixed, plain = (json.loads(line)["train_class_acc"] for line in lines)
    assert mixed is None
    assert 0 <= plain <= 100


def test_evaluation_is_that_of_every_image_in_evaluation_mode():
    """Loss and accuracies by hand; the labels have ranks 1, 2, 6 and, in a smaller batch, 1."""

    class Known(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            return images[:, 0, 0]

    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1]] * 4)
    labels, ids = torch.tensor([0, 1, 5, 0]), torch.arange(4)
    images = logits[:, None, None]
    batches = [(images[:3], labels[:3], ids[:3]), (images[3:], labels[3:], ids[3:])]
    stats = engine_finetune.evaluate(batches, Known(), torch.device("cpu"), "none")
    assert stats["acc1"] == pytest.approx(50)
    assert stats["acc5"] == pytest.approx(75)
    expected = (logits.logsumexp(1) - logits[range(4), labels]).mean().item()
    assert stats["loss"] == pytest.approx(expected)


def test_evaluation_shows_a_loss_that_is_not_finite():
    """Leaving such a batch out would report a good loss for a broken model."""

    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3]

    labels = torch.tensor([0, 1])
    batches = [(torch.full((2, 3, 2, 2), x), labels, labels) for x in (1.0, float("nan"))]
    stats = engine_finetune.evaluate(batches, Broken(), torch.device("cpu"), "none")
    assert stats["loss"] != stats["loss"]


def test_images_with_nan_logits_count_as_wrong_and_are_reported(log):
    """NaN weights had an accuracy of 50% on two classes."""

    class Some(torch.nn.Module):
        def forward(self, images):
            return images[:, :2, 0, 0]

    images = torch.zeros(4, 3, 2, 2)
    images[:2, 0], images[2:, 1], images[1:3] = 1, 1, float("nan")
    labels, ids = torch.tensor([0, 0, 1, 1]), torch.arange(4)
    batches = [(images[:2], labels[:2], ids[:2]), (images[2:], labels[2:], ids[2:])]
    stats = engine_finetune.evaluate(batches, Some(), torch.device("cpu"), "none")
    assert (stats["acc1"], stats["acc5"]) == (50, 50)
    assert log.messages == [
        "NaN or Inf logits for 2 images, counted as wrong; check weights and images"
    ]


@pytest.mark.parametrize("size", [1, 5, 71])
def test_evaluation_gives_the_same_float_for_any_batch_size(size):
    """349 of 355 gave nine values, so that equal epochs became new best ones."""

    class Known(torch.nn.Module):
        def forward(self, images):
            return images[:, :, 0, 0].double()

    images, labels = torch.rand(355, 3, 1, 1), torch.zeros(355, dtype=torch.long)
    images[:, 0], images[3::60, 1] = 4, 5  # 6 wrong ones
    parts = zip(images.split(size), labels.split(size), labels.split(size), strict=True)
    stats = engine_finetune.evaluate(list(parts), Known(), torch.device("cpu"), "none")
    assert stats["acc1"] == 34900 / 355
    assert stats["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(images.flatten(1).double(), labels).item(), rel=1e-7
    )


def test_rank_without_images_says_that_others_know_the_reasons():
    class Empty(list):
        bad: ClassVar[dict[str, str]] = {}

    with pytest.raises(UserError, match=r"left out all of them \(on other ranks\)"):
        engine_finetune.evaluate(Empty(), torch.nn.Flatten(), torch.device("cpu"), "none")


def test_ema_is_evaluated_on_the_device_of_the_run(monkeypatch):
    """Weights of --model_ema_force_cpu are copied there; others are used as they are."""
    ema = ModelEma(torch.nn.Linear(2, 3), 0.9, torch.device("cpu"))
    seen = []
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *args: seen.append(args) or {})
    for device in (torch.device("cpu"), torch.device("meta")):
        assert engine_finetune.evaluate_ema([], ema, device, "bf16") == {}
    assert seen[0] == ([], ema.module, torch.device("cpu"), "bf16", None, None, None, "ema")
    assert seen[1][1].weight.device.type == "meta"
    assert ema.module.weight.device.type == "cpu"


def test_resumed_steps_are_counted_in_the_new_batch_size(tmp_path, monkeypatch):
    """With another batch the schedule would otherwise be long over, or start anew."""
    words = f"--epochs 4 --disable_eval --output_dir {tmp_path}"
    finetune(words)
    for name in ("checkpoint-2.pth", "checkpoint-3.pth"):
        (tmp_path / name).unlink()
    states: list[TrainState] = []
    real = main_finetune.train_one_epoch
    monkeypatch.setattr(
        main_finetune,
        "train_one_epoch",
        lambda *a: states.append(copy.copy(a[3].state)) or real(*a),
    )
    with pytest.raises(
        UserError, match="the effective batch 6 of the resumed run is not a multiple of"
    ):
        finetune(f"{words} --batch_size 12")  # nobody said that the updates should change
    finetune(f"{words} --batch_size 12 --effective_batch 12")
    assert [(state.epoch, state.global_step) for state in states] == [(2, 4), (3, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "words"), [(pretrain, "--picture_freq 0"), (finetune, "")])
def test_epoch_that_breaks_off_at_its_last_update_is_saved_like_any(
    tmp_path, monkeypatch, run, words
):
    """Nothing is left to do then, and its checkpoint had the rate of the first update."""
    words = f"{words} --epochs 2 --log_dir none --save_ckpt_every_steps 4 --output_dir"
    run(f"{words} {tmp_path / 'whole'}")
    with monkeypatch.context() as broken:
        broken.setattr(
            CheckpointManager, "end_epoch", lambda *_, **__: (_ for _ in ()).throw(OSError("dead"))
        )
        with pytest.raises(OSError, match="dead"):
            run(f"{words} {tmp_path / 'run'}")
    assert (tmp_path / "run" / "checkpoint-0-seen-24.pth").exists()
    run(f"{words} {tmp_path / 'run'}")
    for name in ("checkpoint-0.pth", "checkpoint-1.pth"):
        ours, theirs = (
            torch.load(tmp_path / folder / name, weights_only=True) for folder in ("run", "whole")
        )
        assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
        assert ours["state"] == theirs["state"]


# --- CUDA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [pretrain, finetune])
def test_graphs_without_a_gpu_are_refused(run):
    with pytest.raises(UserError, match="--cuda_graphs needs a CUDA device, this one is cpu"):
        run("--cuda_graphs --epochs 1")


@pytest.mark.parametrize("run", [pretrain, finetune])
def test_effective_batch_is_settled_before_any_work(run, tmp_path):
    words = f"--epochs 1 --log_dir none --output_dir {tmp_path / 'new'} --effective_batch"
    with pytest.raises(UserError, match="10 is not a multiple of --batch_size 6 x 1 process = 6"):
        run(f"{words} 10")
    with pytest.raises(UserError, match="--cuda_graphs does not work with 2 gradient accumulation"):
        run(f"{words} 12 --cuda_graphs")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock", "console.log"}
    run(f"{words} 12")
    state = torch.load(tmp_path / "new" / "checkpoint-0.pth", weights_only=True)["state"]
    assert state["global_step"] == 2


@pytest.fixture
def no_waiting(monkeypatch):
    """From the second epoch on it is an error to wait for the GPU, but where log lines read."""

    def under(mode: str, owner, name: str, after: int = 0) -> None:
        real, calls = getattr(owner, name), itertools.count()

        def call(*args, **kwargs):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode if next(calls) >= after else before)
            try:
                return real(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        monkeypatch.setattr(owner, name, call)

    under("error", main_pretrain, "train_one_epoch", after=1)
    under("error", main_finetune, "train_one_epoch", after=1)
    under("default", Means, "read")
    under("default", AnomalyGuard, "check")


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "--amp none", "--amp fp16", "--cuda_graphs"])
@pytest.mark.parametrize(
    ("run", "more"),
    [
        (pretrain, "--drop_path 0.2 --picture_freq 0"),
        (finetune, "--drop_path 0.2 --model_ema --clip_grad 1"),
        (finetune, "--mixup 0.8 --cutmix 1 --opt sgd"),
    ],
)
def test_host_waits_for_the_gpu_at_log_lines_alone(no_waiting, run, more, words):
    run(f"--epochs 3 --device cuda --print_freq 2 {more} {words}")


@pytest.mark.gpu
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("run", [pretrain, finetune])
def test_graphs_change_no_number(tmp_path, run, drop_path):
    """Twelve steps; with drop path the seed of each step must reach the graph."""
    words = f"--epochs 3 --device cuda --amp none --opt sgd --drop_path {drop_path}"
    weights = []
    for more in ("", "--cuda_graphs"):
        folder = tmp_path / f"run{more}"
        run(f"{words} {more} --output_dir {folder}")
        weights.append(torch.load(folder / "checkpoint-2.pth", weights_only=True)["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


ALL_RULES = (
    "--epochs 2 --sched linear(1,0.5)[0.5]+cosine(0.5,0)[0.5] --clip_grad 0.01 --clip_mode agc "
    "--sched_options weight_decay=linear(0,0.5) momentum=constant(0.8) "
    "--param_group *.norm:lr=2,weight_decay=0.1 --no_weight_decay none --freeze *stages.0:0-1"
)


@pytest.mark.parametrize("run", [pretrain, finetune])
def test_frozen_part_moves_in_neither_engine_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path, run
):
    """Schedules and freezing are functions of the step, so a checkpoint holds no state of them."""
    run(f"{ALL_RULES} --output_dir {tmp_path / 'whole'}")
    ends = [tmp_path / "whole" / f"checkpoint-{epoch}.pth" for epoch in (0, 1)]
    run(f"{ALL_RULES} --output_dir {tmp_path / 'resumed'} --resume {ends[0]}")
    ends.append(tmp_path / "resumed" / "checkpoint-1.pth")
    first, whole, resumed = (torch.load(end, weights_only=True) for end in ends)
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    name = next(name for name in whole["model"] if "stages.0.0.dwconv.weight" in name)
    later = name.replace("stages.0", "stages.1")
    state = first["optimizer"]["state"]
    frozen = [g for g in first["optimizer"]["param_groups"] if g["params"][0] not in state]
    assert frozen
    assert not torch.equal(first["model"][name], whole["model"][name])
    assert not torch.equal(first["model"][later], whole["model"][later])
    options_of = [(g["weight_decay"], g["betas"][0]) for g in whole["optimizer"]["param_groups"]]
    decay = 0.5 * 7 / 8  # of the last of 8 steps
    assert sorted(set(options_of)) == [(0.1, 0.8), (pytest.approx(decay), 0.8)]
