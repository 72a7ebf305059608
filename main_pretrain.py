# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pre-train FCMAE.

torchrun --nproc_per_node=8 main_pretrain.py --model convnextv2_tiny --data_path /data/imagenet
"""

from __future__ import annotations

import argparse
from functools import partial

from config import parser as options
from config.parser import pretrain_parser as get_args_parser
from parallel import process_group
from training import checkpoint
from training.pictures import build_panel, grid, reconstructions

if __name__ == "__main__":  # --help and typing errors answer before torch is loaded
    args = options.parse(get_args_parser())

import datasets
import models
from data_loading.rng import make_deterministic, seed_all
from engine_pretrain import train_one_epoch
from models.fcmae import visible_patches
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
from training.run_lock import hold_folder
from training.setup import check_alike
from training.stepper import Stepper, autocast, choose_amp
from weights.pretrained import load_pretrained


def main(args: argparse.Namespace) -> None:
    """Pre-train as `args` from `options.parse` say."""
    # --- 1. set-up --------------------------------------------------------------------------
    device = process_group.init_distributed_mode(
        args.device, args.dist_url, args.world_size, args.local_rank, args.dist_on_itp
    )
    check_alike(vars(args))
    log = process_group.get_logger()
    if args.recipe:
        log.info("recipe %s", args.recipe)
    amp = choose_amp(args.amp, args.use_amp, device)
    sharing = sharding.build_sharing(args, device, amp)
    set_kernels(args.kernels, device)
    make_deterministic(args.deterministic, device)
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
    dataset = datasets.build_pretrain_dataset(args)
    batches = datasets.build_batches(dataset, True, args, device)
    updates_per_epoch = count_updates(len(batches), update_freq)

    # --- 3. model ---------------------------------------------------------------------------
    seed_all(args.seed)
    fcmae = models.build_fcmae(args).to(device)
    h, w = fcmae.grid_size(*args.input_size)
    visible = visible_patches(h * w, args.mask_ratio)
    n_parameters = hooks.log_cost(fcmae, args.in_chans, args.input_size, device)
    log.info("%d of %d patches visible: mask ratio %.3f", visible, h * w, 1 - visible / (h * w))

    # --- 4. weights -------------------------------------------------------------------------
    # Pre-training starts from random weights, or from what --resume names: step 7.

    # --- 5. optimizer and schedule ----------------------------------------------------------
    fcmae = sharding.sync_batch_norm(fcmae, args)
    sharing.spread(fcmae)
    effective_batch = args.batch_size * update_freq * processes
    lr = scale_lr(args.lr, args.blr, effective_batch)
    optimizer = build_optimizer(args, fcmae, lr, shard=sharing.mode)
    schedule = build_schedule(args, optimizer, lr, updates_per_epoch)
    log.info("peak lr %.3g, precision %s", lr, amp)

    # --- 6. wrap ----------------------------------------------------------------------------
    if args.compile:
        fcmae.compile()
    called = fcmae
    if args.cuda_graphs:
        shapes = (args.batch_size, args.in_chans, *args.input_size), (args.batch_size, h * w)
        called = Graphed(fcmae, device, amp, shapes, visible)
    model = sharing.wrap(called)
    stepper = Stepper(model, optimizer, device, amp, update_freq, args.clip_grad, args.spike_factor)

    # --- 7. resume --------------------------------------------------------------------------
    parts = (fcmae, optimizer, stepper.scaler)
    load = partial(load_pretrained, fcmae, sha256=args.sha256)
    state = resume.auto_load_model(start, *parts, load=load, fresh=args.start_epoch)
    state.count_updates(updates_per_epoch, effective_batch, len(dataset))
    about = {"args": vars(args), "keep": args.save_ckpt_num, "source": args.resume}
    about |= {"kernels": autotuner.state}
    save = partial(checkpoint.save_model, folder, *parts, **about)
    guard = build_guard(args, stepper, parts, batches, folder)
    about = {"stepper": stepper, "schedule": schedule, "guard": guard, "seed": args.seed}
    train_epoch = partial(train_one_epoch, model, fcmae, **about)
    if args.dry_run:
        return dry_run.check_run(
            args, folder, start.source, state, batches, stepper, schedule, train_epoch, save
        )
    panel = args.picture_freq and build_panel(dataset.dataset, fcmae, args, device)
    mean_and_std = datasets.build_mean_and_std(args)

    # --- 8. epoch loop ----------------------------------------------------------------------
    with (
        datasets.build_bad_images(args, folder, batches) as bad_images,
        build_keeper(args, folder and save, bad_images.write) as keeper,
        hooks.build_reporter(args, folder, device, state, updates_per_epoch) as reporter,
    ):
        while state.epoch < args.epochs:
            batches.set_epoch(state.epoch, state.seen)
            train = train_epoch(batches=batches, state=state, reporter=reporter, keeper=keeper)
            state.end_epoch()
            last = state.epoch == args.epochs
            bad_images.write()
            stats = {f"train_{key}": value for key, value in train.items()}
            reporter.end_epoch(stats | {"epoch": state.epoch - 1, "n_parameters": n_parameters})
            if panel and (last or state.epoch % args.picture_freq == 0):
                with sharding.whole_weights(fcmae) as network, autocast(device, amp):
                    if process_group.is_main_process():
                        pictures = reconstructions(network, *panel, *mean_and_std)
                        reporter.picture("reconstructions", grid(pictures))
            keeper.end_epoch(state, last=last)
    log.info("%d of %d epochs are done; %s", state.epoch, args.epochs, folder or "nothing saved")


if __name__ == "__main__":
    process_group.launch(main, args)
