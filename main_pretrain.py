# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pre-train FCMAE.

torchrun --nproc_per_node=8 main_pretrain.py --model convnextv2_tiny --data_path /data/imagenet
"""

import argparse
import gc
from dataclasses import replace
from functools import partial

from config.parser import parse
from config.parser import pretrain_parser as get_args_parser

if __name__ == "__main__":  # before torch is loaded: --help and typing errors answer at once
    args = parse(get_args_parser())
    gc.disable()  # until `launch`: the imports leave no garbage to look for

import datasets
import models
import utils
from data_loading.bad_images import BadImages
from data_loading.rng import seed_all
from engine_pretrain import train_one_epoch
from optim_factory import build_optimizer, scale_lr
from parallel.sharding import sync_batch_norm
from training.anomaly import build_guard
from training.checkpoint import TrainableParts, TrainState
from training.checkpoint_manager import build_checkpoint_manager
from training.costs import log_cost, log_masks, training_flops
from training.cuda_graphs import Graphed
from training.dry_run import PlannedRun, check_run
from training.freeze import build_freezer
from training.hook_table import build_reporter
from training.phases import build_phases
from training.pictures import ReconstructionImages
from training.probes import build_probes
from training.report import last_line, plain
from training.resume import auto_load_model
from training.run_record import build_run_record
from training.schedules import build_schedule
from training.setup import TrainLoop, setup_process, setup_run
from training.stepper import Stepper
from training.steps import build_steps


def main(args: argparse.Namespace) -> None:
    """Pre-train FCMAE."""
    # --- 1. set-up --------------------------------------------------------------------------
    device, amp = setup_process(args)
    run = setup_run(args, device, amp)
    args, log = run.args, utils.get_logger()

    # --- 2. data ----------------------------------------------------------------------------
    dataset_train = datasets.build_pretrain_dataset(args)
    data_loader_train = datasets.build_loader(dataset_train, True, args, device)
    steps = build_steps(args, data_loader_train, run.update_freq)

    # --- 3. model ---------------------------------------------------------------------------
    seed_all(args.seed)
    model_without_ddp = models.build_fcmae(args).to(device)
    n_parameters = log_cost(args, model_without_ddp)
    flops = training_flops(args, model_without_ddp)  # of an image, for the MFU
    patches, visible = log_masks(args, model_without_ddp)  # of images of --input_size

    # --- 4. weights -------------------------------------------------------------------------
    if run.weights:  # a run is restored in step 7
        run.weights.load(model_without_ddp)
        run = replace(run, weights=None)  # frees their memory

    # --- 5. optimizer and schedule ----------------------------------------------------------
    model_without_ddp = sync_batch_norm(model_without_ddp, args)
    run.parallelism.shard(model_without_ddp)
    lr = scale_lr(args.lr, args.blr, run.effective_batch)
    optimizer = build_optimizer(args, model_without_ddp, lr, run.parallelism.mode)
    lr_schedule = build_schedule(args, optimizer, lr, steps)
    log.info("peak lr %.3g, precision %s", lr, amp)

    # --- 6. wrap ----------------------------------------------------------------------------
    if args.compile:
        model_without_ddp.compile()
    model = model_without_ddp
    if args.cuda_graphs:
        shapes = (args.batch_size, args.in_chans, *args.input_size), (args.batch_size, patches)
        model = Graphed(model_without_ddp, device, amp, shapes, visible)
    model = run.parallelism.wrap(model)
    stepper = Stepper(
        model,
        optimizer,
        device,
        amp,
        run.update_freq,
        args.clip_grad,
        args.spike_factor,
        args.clip_mode,
    )

    # --- 7. resume --------------------------------------------------------------------------
    parts = TrainableParts(model_without_ddp, optimizer, stepper.scaler)
    state = auto_load_model(run.resume_point, parts, args.start_epoch)
    state.recount_steps(steps, len(dataset_train))
    phases = build_phases(args, steps)
    bad_images = BadImages(run.output_dir, data_loader_train, active=args.on_bad_image == "skip")
    reporter = build_reporter(args, run.output_dir, device, state, steps, flops=flops)
    record = build_run_record(
        args,
        run.output_dir,
        run.resume_point,
        {"train": dataset_train},
        n_parameters,
        mask_ratio=1 - visible / patches,
    )
    reporter.attach(parts, lr_schedule, run.resume_point.entry("hooks"), record)
    loop = TrainLoop(
        stepper,
        lr_schedule,
        state,
        guard=build_guard(args, stepper, parts, data_loader_train, run.output_dir),
        reporter=reporter,
        checkpoints=build_checkpoint_manager(
            args, run.output_dir, parts, before_save=bad_images.write, more=reporter.hook_states
        ),
        seed=args.seed,
        freezer=build_freezer(args, model_without_ddp, stepper),
    )
    reconstructions = ReconstructionImages(args, dataset_train.dataset, device, amp)
    draw = partial(reconstructions.draw, model_without_ddp)
    probes = build_probes(args, dataset_train.dataset, model_without_ddp, stepper)
    if args.dry_run:
        plan = PlannedRun(
            args,
            run.output_dir,
            run.resume_point.source,
            loop,
            lambda batches, probe: train_one_epoch(model, model_without_ddp, batches, probe),
            data_loader_train,
            draw=partial(draw, TrainState(args.epochs)),
            more_work=lambda: probes.seconds_per_epoch(model_without_ddp) if probes else 0.0,
        )
        return check_run(plan)

    # --- 8. epoch loop ----------------------------------------------------------------------
    # To save although no batch comes.
    loop.checkpoints.watch(data_loader_train, probes and probes.loader)
    with loop.checkpoints, loop.reporter:  # handle stop signals; open the log files
        loop.reporter.image("reconstructions", partial(draw, state), only_missing=True)
        while not phases.done(state):
            phase = phases.next(state)  # an epoch, or the part of it in which the run ends
            data_loader_train.set_epoch(state.epoch, state.samples_in_epoch, phase.stop)
            train_stats = train_one_epoch(model, model_without_ddp, data_loader_train, loop)
            entries = phases.end(phase, state, loop.reporter)
            log_stats = {f"train_{name}": value for name, value in train_stats.items()}
            stats = log_stats | entries | {"n_parameters": n_parameters}
            if probes is not None:  # what it measures joins them
                stats = probes.after_epoch(model_without_ddp, state, stats, run.output_dir)
            state.stats = plain(stats)
            report = loop.reporter.end_epoch
            loop.checkpoints.end_epoch(state, last=phase.is_last, report=report)  # then report
            loop.reporter.image("reconstructions", partial(draw, state))
    log.info("%s", last_line(args, run.output_dir, state))


if __name__ == "__main__":
    utils.launch(main, args)
