# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""One epoch of supervised training, and evaluation; main_finetune.py calls both.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --stem_stride 1 --input_size 32
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from data_loading.loader import DeviceLoader
from data_loading.rng import seed_all
from data_loading.tta import ONE_VIEW
from errors import UserError, first_few, plural
from models.parts import training_mode
from parallel import sharding
from parallel.process_group import get_logger, get_rank, get_world_size
from training.criterion import Criterion
from training.ema import ModelEma
from training.evaluation import Metrics
from training.head_losses import main_output
from training.hooks import Batch, Reporter
from training.meters import accuracy
from training.setup import TrainLoop
from training.stepper import autocast


def train_one_epoch(
    model: nn.Module, model_without_ddp: nn.Module, data_loader: DeviceLoader, loop: TrainLoop
) -> dict[str, float]:
    """Train on the rest of the epoch; returns the means of the metrics and the learning rate.

    model: `model_without_ddp`, perhaps wrapped in DistributedDataParallel. `loop.model_ema` follows
    `model_without_ddp` after every optimizer step that was taken.
    """
    model.train()
    training_mode(model_without_ddp)  # a frozen backbone stays in evaluation mode
    stepper, state = loop.stepper, loop.state
    if loop.freezer is not None:
        loop.freezer.begin_epoch(state.epoch)  # BatchNorm of frozen parts is in eval mode

    def compute_loss(
        network: nn.Module, batch: tuple, step: int, micro: int
    ) -> tuple[Tensor, Tensor]:
        """(loss, logits) of a micro-batch; mixup changes its images in place.

        With several heads, the logits are those of the first.
        """
        images, targets, _ = batch
        seed_all(loop.seed, step, micro, get_rank())  # mixup and drop path
        if loop.mixup is not None:
            images, targets = loop.mixup(images, targets, state.epoch)
        outputs = network(images)
        return loop.criterion(outputs, targets), main_output(outputs)

    names = ["loss", "grad_norm", *["class_acc"] * (loop.kind == "class")]
    meters = loop.reporter.begin_epoch(names, data_loader, stepper)
    stepper.begin_epoch(len(data_loader))
    # The guard reruns bad steps to find their first NaN.
    loop.guard.begin_epoch(state, lambda *inputs: compute_loss(*inputs)[0])
    mixed = loop.mixup is not None and loop.mixup.is_on(state.epoch)
    # A resumed epoch may have no batch left: it ends with the learning rate of its last step.
    lr = loop.schedule.apply(state.global_step - 1) if state.samples_in_epoch else 0.0
    for batch in data_loader:
        images, labels, ids = batch
        if stepper.micro == 0:
            lr = loop.schedule.apply(state.global_step)
        with stepper.micro_batch():
            loss, logits = compute_loss(model, batch, state.global_step, stepper.micro)
        result = stepper.step(loss, ids)  # backward; None until the last micro-batch of a step

        state.samples_in_epoch += len(images) * get_world_size()
        meters.update(len(images), loss=loss.detach())
        if not mixed and loop.kind == "class":  # others have no single right class
            meters.update(len(images), class_acc=accuracy(logits.detach(), labels, (1,))[0])
        loop.reporter.after_batch(len(images), Batch(images, labels, logits, loss, ids))
        if result is not None:
            state.global_step += 1
            meters.update(1, grad_norm=result.grad_norm)
            if loop.model_ema is not None:
                steps_taken = state.global_step - state.bad_steps - stepper.skipped  # a tensor
                loop.model_ema.update(model_without_ddp, steps_taken, result.taken)
            logged = loop.reporter.after_step(lr)
            # Check for NaN where the host waits for the device anyway.
            check = logged or stepper.batches_left == 0
            loop.checkpoints.after_step(state, meters, loop.guard, check)
    return loop.reporter.end_phase(meters.total() | {"lr": lr})


@torch.inference_mode()
def evaluate(
    data_loader: DeviceLoader,
    model: nn.Module,
    device: torch.device,
    amp: str,
    criterion: Criterion | None = None,
    metrics: Metrics | None = None,
    reporter: Reporter | None = None,
    split: str = "",
) -> dict[str, Any]:
    """Mean loss and metrics over the images of all ranks; every image counts once.

    An image with a logit that is NaN or +Inf counts as wrong, and a warning has their number.
    Outputs are the means over the views of each image, if the loader has several (--tta).
    model: not wrapped, since DistributedDataParallel would wait for ranks with fewer batches.
    criterion: the loss; default: cross-entropy. metrics: default: top-1 and top-5 accuracy.
    reporter: notifies the hooks; split: of this evaluation, as hooks see it.
    """
    model.eval()
    views = getattr(data_loader, "views", ONE_VIEW)  # a plain list of batches has none
    criterion, metrics = criterion or Criterion(), metrics or Metrics()
    metrics.reset(device, len(criterion.terms))
    reporter = reporter or Reporter.quiet(device)
    reporter.begin_phase("test", data_loader, split, metrics.kind)
    was_training = criterion.training
    criterion.eval()
    sharding.broadcast_tensors(model.buffers())  # all ranks use the same running statistics
    try:
        with sharding.unsharded(model) as network:
            for images, labels, ids in data_loader:
                with autocast(device, amp):
                    logits = views.mean_output(network, images)
                images, logits = views.center(images), logits.float()
                losses, counts = criterion.per_image(logits, labels)
                logits, labels = metrics.in_units(logits, labels)
                metrics.update(logits, labels, losses, counts)
                if logits.ndim == 3:  # of the heads of a linear probe, hooks see the best one
                    logits, losses = main_output(logits), losses[:, :1]
                reporter.after_evaluated(Batch(images, labels, logits, losses, ids))
    finally:
        criterion.train(was_training)
    count, broken = metrics.reduce()
    if broken:
        text = "NaN or Inf logits for %s, counted as wrong; check weights and images"
        get_logger().warning(text, plural(broken, "image"))
    if not count:  # on any rank
        reasons = [f"{name} ({reason})" for name, reason in data_loader.bad.items()]
        raise UserError(
            "no image to evaluate on: --on_bad_image skip left out all of them "
            f"({first_few(reasons) or 'on other ranks'}); correct --eval_data_path or "
            "--data_path, or pass --disable_eval"
        )
    return reporter.end_phase(metrics.values())


def evaluate_ema(
    data_loader: DeviceLoader,
    model_ema: ModelEma,
    device: torch.device,
    amp: str,
    criterion: Criterion | None = None,
    metrics: Metrics | None = None,
    reporter: Reporter | None = None,
    split: str = "ema",
) -> dict[str, Any]:
    """`evaluate` the EMA weights, on a copy if --model_ema_force_cpu keeps them elsewhere."""
    model = model_ema.module
    if next(model.parameters()).device.type != device.type:
        model = copy.deepcopy(model).to(device)
    return evaluate(data_loader, model, device, amp, criterion, metrics, reporter, split)
