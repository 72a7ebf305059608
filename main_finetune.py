# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Fine-tune from a checkpoint, train from scratch, or evaluate.

torchrun --nproc_per_node=8 main_finetune.py --model convnextv2_tiny --data_path /data/imagenet
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

from config import parser as options
from config.parser import finetune_parser as get_args_parser
from parallel import process_group
from training import checkpoint

if __name__ == "__main__":  # --help and typing errors answer before torch is loaded
    args = options.parse(get_args_parser())

import torch

import datasets
import models
from data_loading.rng import make_deterministic, seed_all
from engine_finetune import evaluate, train_one_epoch
from models.kernels.autotune import autotuner, set_kernels
from optim_factory import (
    build_optimizer,
    build_schedule,
    choose_update_freq,
    count_updates,
    scale_lr,
)
from parallel import sharding
from training import dry_run, hooks, resume
from training.anomaly import build_guard
from training.checkpoint_manager import build_keeper
from training.cuda_graphs import Graphed, check_graphs
from training.ema import build_ema
from training.run_lock import hold_folder
from training.setup import check_alike
from training.stepper import Stepper, choose_amp
from weights.pretrained import EMA_KEY, has_average, load_both, load_pretrained


def main(args: argparse.Namespace) -> None:
    """Fine-tune, or only evaluate, as `args` from `options.parse` say."""
    # --- 1. set-up --------------------------------------------------------------------------
    device = process_group.init_distributed_mode(
        args.device, args.dist_url, args.world_size, args.local_rank, args.dist_on_itp
    )
    check_alike(vars(args))
    log = process_group.get_logger()
    if args.recipe:
        log.info("recipe %s", args.recipe)
    amp = choose_amp(args.amp, args.use_amp, device)
    set_kernels(args.kernels, device)
    make_deterministic(args.deterministic, device)
    if args.eval:
        return evaluate_checkpoint(args, device, amp)
    sharing = sharding.build_sharing(args, device, amp)
    processes = process_group.get_world_size()
    folder = (dry_run.named_folder if args.dry_run else hold_folder)(args.output_dir)
    start = resume.find_start(
        folder, args.resume, args.auto_resume, args.sha256, vars(args), not args.dry_run
    )
    autotuner.restore(start.kernels, device)
    update_freq = choose_update_freq(
        args.update_freq, args.effective_batch, args.batch_size, processes, start.effective_batch
    )
    check_graphs(args.cuda_graphs, device, update_freq)

    # --- 2. data ----------------------------------------------------------------------------
    train_set, val_set, nb_classes = datasets.build_datasets(args)
    batches = datasets.build_batches(train_set, True, args, device)
    val_batches = datasets.build_batches(val_set, False, args, device) if val_set else None
    updates_per_epoch = count_updates(len(batches), update_freq)
    mixup = datasets.build_mixup(args, nb_classes)

    # --- 3. model ---------------------------------------------------------------------------
    seed_all(args.seed)
    bare = models.build_classifier(args, nb_classes).to(device)
    n_parameters = hooks.log_cost(bare, args.in_chans, args.input_size, device)

    # --- 4. weights -------------------------------------------------------------------------
    named = {"model_key": EMA_KEY if args.use_ema else args.model_key}
    named |= {"model_prefix": args.model_prefix, "sha256": args.sha256}
    load = partial(load_both, bare, **named)
    if args.finetune and not start.is_run:
        load(None, args.finetune)
    elif args.layer_decay < 1 and not start.source:
        log.warning("random weights, but --layer_decay < 1 spares trained ones; give --finetune")
    model_ema = build_ema(args, bare)

    # --- 5. optimizer and schedule ----------------------------------------------------------
    bare = sharding.sync_batch_norm(bare, args)  # the average has nobody to wait for
    sharing.spread(bare, model_ema and model_ema.module)
    effective_batch = args.batch_size * update_freq * processes
    lr = scale_lr(args.lr, args.blr, effective_batch)
    decay = args.layer_decay, args.layer_decay_type
    optimizer = build_optimizer(args, bare, lr, *decay, sharing.mode)
    schedule = build_schedule(args, optimizer, lr, updates_per_epoch)
    # Mixed labels are smoothed by mixup itself.
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)
    log.info("peak lr %.3g, precision %s", lr, amp)

    # --- 6. wrap ----------------------------------------------------------------------------
    if args.compile:
        bare.compile()
    called = bare
    if args.cuda_graphs:
        shape = (args.batch_size, args.in_chans, *args.input_size)
        called = Graphed(bare, device, amp, [shape])
    model = sharing.wrap(called)
    stepper = Stepper(model, optimizer, device, amp, update_freq, args.clip_grad, args.spike_factor)

    # --- 7. resume --------------------------------------------------------------------------
    parts = (bare, optimizer, stepper.scaler, model_ema and model_ema.module)
    load = partial(load, model_ema and model_ema.module)
    state = resume.auto_load_model(start, *parts, load=load, fresh=args.start_epoch)
    state.count_updates(updates_per_epoch, effective_batch, len(train_set))
    known = {"args": vars(args), "classes": datasets.class_map(train_set)}
    known |= {"keep": args.save_ckpt_num, "source": args.resume, "kernels": autotuner.state}
    save = partial(checkpoint.save_model, folder, *parts, **known)
    guard = build_guard(args, stepper, parts, batches, folder)
    about = {"stepper": stepper, "schedule": schedule, "guard": guard, "seed": args.seed}
    about |= {"mixup": mixup, "model_ema": model_ema}
    train_epoch = partial(train_one_epoch, model, bare, criterion, **about)
    if args.dry_run:
        return dry_run.check_run(
            *(args, folder, start.source, state, batches, stepper, schedule, train_epoch, save),
            *(val_batches, partial(evaluate, model=bare, device=device, amp=amp)),
        )

    # --- 8. epoch loop ----------------------------------------------------------------------
    with (
        datasets.build_bad_images(args, folder, batches, val_batches) as bad_images,
        build_keeper(args, folder and save, bad_images.write) as keeper,
        hooks.build_reporter(args, folder, device, state, updates_per_epoch) as reporter,
    ):
        while state.epoch < args.epochs:
            batches.set_epoch(state.epoch, state.seen)
            train = train_epoch(batches=batches, state=state, reporter=reporter, keeper=keeper)
            state.end_epoch()
            stats = {f"train_{key}": value for key, value in train.items()}
            if val_set:  # not its batches, of which this process may have none
                test = evaluate(val_batches, bare, device, amp)
                stats |= {f"test_{key}": value for key, value in test.items()}
            if val_set and args.model_ema_eval:
                test = evaluate(val_batches, on_device(model_ema.module, device), device, amp)
                stats |= {f"test_{key}_ema": value for key, value in test.items()}
            bad_images.write()
            accuracies = {"best": stats.get("test_acc1"), "best-ema": stats.get("test_acc1_ema")}
            reporter.end_epoch(stats | {"epoch": state.epoch - 1, "n_parameters": n_parameters})
            keeper.end_epoch(state, accuracies, last=state.epoch == args.epochs)
    best = ", ".join(f"{name} acc1 {value:.2f}%" for name, value in state.best.items())
    log.info("%d of %d epochs are done; %s", state.epoch, args.epochs, best or "not evaluated")


def on_device(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model, or a copy where it is needed: --model_ema_force_cpu keeps it elsewhere."""
    here = next(model.parameters()).device.type == device.type
    return model if here else copy.deepcopy(model).to(device)


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device, amp: str) -> None:
    """Evaluate the weights in a checkpoint, and with --model_ema their average too."""
    path = args.resume or args.finetune or args.output_dir
    dataset, nb_classes = datasets.build_dataset(False, args)
    batches = datasets.build_batches(dataset, False, args, device)
    model = models.build_classifier(args, nb_classes).to(device)
    if args.compile:
        model.compile()
    bad_images = datasets.build_bad_images(args, None, batches)
    both = args.model_ema and has_average(path, args.sha256)  # a published file has one of them
    keys = [EMA_KEY] if args.use_ema else [args.model_key] + [EMA_KEY] * both
    for key in keys:
        load_pretrained(model, path, key, args.model_prefix, args.sha256, new=())
        stats = evaluate(batches, model, device, amp)
        left_out = bad_images.write()
        process_group.get_logger().info(
            "%s of %s on %d images: acc1 %.2f%%  acc5 %.2f%%  loss %.4f",
            key,
            path,
            len(dataset) - left_out,
            stats["acc1"],
            stats["acc5"],
            stats["loss"],
        )
    process_group.get_logger().info("kernels %s", autotuner.summary())


if __name__ == "__main__":
    process_group.launch(main, args)
