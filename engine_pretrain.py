# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One epoch of FCMAE pre-training; main_pretrain.py calls it.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from data_loading.rng import hash_noise, seed_all
from datasets import Batches
from models.fcmae import FCMAE, random_mask, visible_patches
from optim_factory import Schedule
from parallel import process_group
from training.anomaly import Guard
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.hooks import Reporter
from training.stepper import Stepper


def train_one_epoch(
    model: nn.Module,
    fcmae: FCMAE,
    batches: Batches,
    stepper: Stepper,
    schedule: Schedule,
    state: TrainState,
    reporter: Reporter,
    keeper: CheckpointManager,
    guard: Guard,
    seed: int,
) -> dict[str, float]:
    """Train on what is left of the epoch; returns its mean loss and gradient norm and its rate.

    model: what is called, DistributedDataParallel perhaps; fcmae: the FCMAE inside.
    """
    model.train()
    means = reporter.begin_epoch(["loss", "grad_norm"], batches, state)
    compute = partial(masked_loss, fcmae, seed, state.epoch)
    stepper.begin_epoch(len(batches))
    guard.begin_epoch(state, compute)
    # A resumed epoch may have no batch left; its end is saved with the rate of its last update.
    lr = schedule.apply(state.global_step - 1) if state.samples_in_epoch else 0.0
    taken = 0  # images of the group
    for batch in batches:
        images, _, ids = batch
        if stepper.micro == 0:
            lr = schedule.apply(state.global_step)
        with stepper.micro_batch():
            loss = compute(model, batch, state.global_step, stepper.micro)
        update = stepper.step(loss, ids)

        means.update(len(images), loss=loss.detach())
        reporter.after_batch(len(images))
        taken += len(images) * process_group.get_world_size()
        if update:
            state.global_step, state.samples_in_epoch, taken = (
                state.global_step + 1,
                state.samples_in_epoch + taken,
                0,
            )
            means.update(1, grad_norm=update.grad_norm)
            look = reporter.after_update(lr) or stepper.left == 0
            keeper.after_step(state, means, guard, look)
    state.epoch_sums["guard"] = guard.state()
    return means.total() | {"lr": lr}


def masked_loss(
    fcmae: FCMAE,
    seed: int,
    epoch: int,
    network: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    update: int,
    micro: int,
) -> Tensor:
    """The loss of a micro-batch by `network`: `fcmae`, or what it is wrapped in.

    A mask is a function of (seed, epoch, sample), drop path one of (seed, update, rank).
    """
    images, _, ids = batch
    h, w = fcmae.grid_size(*images.shape[-2:])
    visible = visible_patches(h * w, fcmae.mask_ratio)
    mask = random_mask(hash_noise(seed, epoch, ids, h * w), visible)
    seed_all(seed, update, micro, process_group.get_rank())
    return network(images, mask, visible)[0]
