# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One epoch of supervised training, and evaluation; main_finetune.py calls both.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loading.rng import seed_all
from datasets import Batches
from errors import UserError, some
from optim_factory import Schedule
from parallel import process_group, sharding
from training.anomaly import Guard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.ema import MovingAverage
from training.hooks import Reporter
from training.meters import Means, accuracy
from training.stepper import Stepper, autocast


def train_one_epoch(
    model: nn.Module,
    bare: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    batches: Batches,
    stepper: Stepper,
    schedule: Schedule,
    state: TrainState,
    reporter: Reporter,
    keeper: CheckpointManager,
    guard: Guard,
    seed: int,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    model_ema: MovingAverage | None = None,
) -> dict[str, float]:
    """Train on what is left of the epoch; returns its means and its last learning rate.

    model: what is called, DistributedDataParallel perhaps; bare: the network inside, which
    `model_ema` averages after every update that was taken.
    """
    model.train()
    means = reporter.begin_epoch(["loss", "grad_norm", "class_acc"], batches, state)
    compute = partial(supervised_loss, criterion, mixup, seed)
    stepper.begin_epoch(len(batches))
    guard.begin_epoch(state, lambda *about: compute(*about)[0])
    # A resumed epoch may have no batch left; its end is saved with the rate of its last update.
    lr = schedule.apply(state.global_step - 1) if state.samples_in_epoch else 0.0
    taken = 0  # images of the group
    for batch in batches:
        images, labels, ids = batch
        if stepper.micro == 0:
            lr = schedule.apply(state.global_step)
        with stepper.micro_batch():
            loss, logits = compute(model, batch, state.global_step, stepper.micro)
        update = stepper.step(loss, ids)

        means.update(len(images), loss=loss.detach())
        if mixup is None:  # with mixed images there is no right answer to count
            means.update(len(images), class_acc=accuracy(logits.detach(), labels, (1,))[0])
        reporter.after_batch(len(images))
        taken += len(images) * process_group.get_world_size()
        if update:
            state.global_step, state.samples_in_epoch, taken = (
                state.global_step + 1,
                state.samples_in_epoch + taken,
                0,
            )
            means.update(1, grad_norm=update.grad_norm)
            if model_ema is not None:
                taken_in_all = (
                    state.global_step - state.bad_steps - stepper.skipped
                )  # not read here
                model_ema.update(bare, taken_in_all, update.taken)
            look = reporter.after_update(lr) or stepper.left == 0
            keeper.after_step(state, means, guard, look)
    state.epoch_sums["guard"] = guard.state()
    return means.total() | {"lr": lr}


def supervised_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    seed: int,
    network: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    update: int,
    micro: int,
) -> tuple[Tensor, Tensor]:
    """(loss, logits) of a micro-batch; what network and mixup draw depends on (seed, update, rank).

    `mixup` changes the images in place.
    """
    seed_all(seed, update, micro, process_group.get_rank())
    images, targets, _ = batch
    if mixup is not None:
        images, targets = mixup(images, targets)
    logits = network(images)
    return criterion(logits.float(), targets), logits


@torch.inference_mode()
def evaluate(
    batches: Batches, model: nn.Module, device: torch.device, amp: str
) -> dict[str, float]:
    """Loss and accuracies per image over all ranks, every image counted exactly once.

    model: the bare network; DistributedDataParallel would wait for ranks that have fewer batches.
    """
    model.eval()
    means = Means(["loss", "acc1", "acc5"], device, skip_nonfinite=False)
    sharding.broadcast_buffers(model)
    with sharding.whole_weights(model) as network:
        for images, labels, _ in batches:
            with autocast(device, amp):
                logits = network(images)
            logits = logits.float()
            acc1, acc5 = accuracy(logits, labels, (1, 5))
            means.update(len(images), loss=F.cross_entropy(logits, labels), acc1=acc1, acc5=acc5)
    stats = means.read()
    if math.isnan(stats["acc1"]):  # there was not a single image, on any rank
        raise UserError(
            "no image could be used to evaluate on, --on_bad_image skip left out all of them: "
            f"{some([f'{name} ({why})' for name, why in batches.bad.items()]) or 'on other ranks'}"
            "; correct --eval_data_path or --data_path, or give --disable_eval"
        )
    return stats
