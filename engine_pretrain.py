# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One epoch of FCMAE pre-training; main_pretrain.py calls it.

python main_pretrain.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32
"""

from torch import Tensor, nn

from data_loading.loader import DeviceLoader
from data_loading.rng import mask_noise, seed_all
from models.fcmae import FCMAE, random_mask, visible_patches
from parallel.process_group import get_rank, get_world_size
from training.hooks import Batch
from training.setup import TrainLoop


def train_one_epoch(
    model: nn.Module, model_without_ddp: FCMAE, data_loader: DeviceLoader, loop: TrainLoop
) -> dict[str, float]:
    """Train on the rest of the epoch; returns mean loss, mean gradient norm and learning rate.

    model: `model_without_ddp`, perhaps wrapped in DistributedDataParallel.
    """
    model.train()
    stepper, state = loop.stepper, loop.state
    if loop.freezer is not None:
        loop.freezer.begin_epoch(state.epoch)  # BatchNorm of frozen parts is in eval mode

    def compute_loss(network: nn.Module, batch: tuple, step: int, micro: int) -> Tensor:
        images, _, ids = batch
        seed_all(loop.seed, step, micro, get_rank())  # drop path
        return masked_loss(network, model_without_ddp, images, ids, loop.seed, state.epoch)

    meters = loop.reporter.begin_epoch(["loss", "grad_norm"], data_loader, stepper)
    stepper.begin_epoch(len(data_loader))
    loop.guard.begin_epoch(state, compute_loss)  # to rerun bad steps and find their first NaN
    # A resumed epoch may have no batch left: it ends with the learning rate of its last step.
    lr = loop.schedule.apply(state.global_step - 1) if state.samples_in_epoch else 0.0
    for batch in data_loader:
        images, _, ids = batch
        if stepper.micro == 0:
            lr = loop.schedule.apply(state.global_step)
        with stepper.micro_batch():
            loss = compute_loss(model, batch, state.global_step, stepper.micro)
        result = stepper.step(loss, ids)  # backward; None until the last micro-batch of a step

        state.samples_in_epoch += len(images) * get_world_size()
        meters.update(len(images), loss=loss.detach())
        loop.reporter.after_batch(len(images), Batch(images, None, None, loss, ids))
        if result is not None:
            state.global_step += 1
            meters.update(1, grad_norm=result.grad_norm)
            logged = loop.reporter.after_step(lr)
            # Check for NaN where the host waits for the device anyway.
            check = logged or stepper.batches_left == 0
            loop.checkpoints.after_step(state, meters, loop.guard, check)
    return loop.reporter.end_phase(meters.total() | {"lr": lr})


def masked_loss(
    network: nn.Module, model_without_ddp: FCMAE, images: Tensor, ids: Tensor, seed: int, epoch: int
) -> Tensor:
    """Reconstruction loss of images (N, C, H, W) under masks drawn from (seed, epoch, sample id).

    network: `model_without_ddp`, perhaps wrapped. ids: (N,).
    """
    h, w = model_without_ddp.grid_size(*images.shape[-2:])
    visible = visible_patches(h * w, model_without_ddp.mask_ratio)
    mask = random_mask(mask_noise(seed, epoch, ids, h * w), visible)  # (N, L), 1 = removed
    return network(images, mask, visible)[0]
