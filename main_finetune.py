# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Fine-tune from a checkpoint, train from scratch, or evaluate.

torchrun --nproc_per_node=8 main_finetune.py --model convnextv2_tiny --data_path /data/imagenet
"""

import argparse
import gc
from dataclasses import replace
from functools import partial

from config.linear_probe import optimizer_flags
from config.parser import finetune_parser as get_args_parser
from config.parser import parse

if __name__ == "__main__":  # before torch is loaded: --help and typing errors answer at once
    args = parse(get_args_parser())
    gc.disable()  # until `launch`: the imports leave no garbage to look for

import torch

import datasets
import models
import utils
from data_loading.bad_images import BadImages
from data_loading.mixing import build_mixup
from data_loading.rng import seed_all
from engine_finetune import evaluate, evaluate_ema, train_one_epoch
from errors import plural
from models.kernels.autotune import autotuner
from models.parts import KeepOutputs
from optim_factory import build_optimizer, scale_lr
from parallel.sharding import sync_batch_norm
from training.anomaly import build_guard
from training.checkpoint import TrainableParts, restore_loss
from training.checkpoint_manager import build_checkpoint_manager
from training.confusion import report_classes
from training.costs import log_cost, training_flops
from training.criterion import build_criterion
from training.cuda_graphs import Graphed
from training.dry_run import PlannedRun, check_run
from training.ema import build_ema
from training.eval_sets import best_prefix, build_eval_sets, datasets_by_name, first_set
from training.evaluation import build_metrics
from training.freeze import build_freezer
from training.hook_table import build_eval_reporter, build_reporter
from training.linear_probe import build_linear_probe
from training.phases import build_phases
from training.precise_bn import build_precise_bn
from training.report import describe_evaluation, last_line, plain, small_stats
from training.resume import auto_load_model, choose_evaluated
from training.run_record import build_run_record
from training.schedules import build_schedule
from training.setup import (
    TrainLoop,
    check_start,
    check_task,
    log_recipe,
    read_weights,
    settle_task,
    setup_process,
    setup_run,
)
from training.stepper import Stepper
from training.steps import build_steps
from weights.pretrained import EMA_KEY, read_pretrained
from weights.saved_run import inherit_flags


def main(args: argparse.Namespace) -> None:
    """Fine-tune a classifier, or evaluate a checkpoint (--eval)."""
    # --- 1. set-up --------------------------------------------------------------------------
    device, amp = setup_process(args)
    if args.eval:
        return evaluate_checkpoint(args, device, amp)
    run = setup_run(args, device, amp)
    args, log = run.args, utils.get_logger()

    # --- 2. data ----------------------------------------------------------------------------
    dataset_train, dataset_val, nb_classes = datasets.build_datasets(
        first_set(args), run.head, resumes=run.resume_point.is_run
    )
    classes = dataset_train.classes  # names in the order of the head, None if there are none
    targets = dataset_train.targets
    args = settle_task(args, targets.kind)
    data_loader_train = datasets.build_loader(dataset_train, True, args, device)
    steps = build_steps(args, data_loader_train, run.update_freq)
    mixup = build_mixup(args, nb_classes, targets.kind)
    metrics = build_metrics(args, nb_classes, targets.kind, targets.scale)
    eval_sets = build_eval_sets(args, dataset_val, dataset_train.head("train"), device, metrics)
    data_loaders_val = [each.loader for each in eval_sets]

    # --- 3. model ---------------------------------------------------------------------------
    seed_all(args.seed)
    model_without_ddp = models.build_classifier(args, nb_classes).to(device)
    n_parameters = log_cost(args, model_without_ddp)
    flops = training_flops(args, model_without_ddp)  # of an image, for the MFU

    # --- 4. weights -------------------------------------------------------------------------
    source = run.resume_point.source or args.finetune or args.model * args.pretrained
    new_head = args.reset_head or args.linear_probe
    new_head |= run.head is None or not run.head.fits(targets)
    if run.weights:  # a run is restored in step 7
        run.weights.load(model_without_ddp, classes=classes, reset_head=new_head)
    elif args.layer_decay < 1 and not source:
        log.warning(
            "random weights: --layer_decay < 1 is meant for pretrained ones; use --finetune"
        )
    elif args.freeze_backbone and not source:
        log.warning("random weights stay random with --freeze_backbone true; use --finetune")
    model_ema = build_ema(args, model_without_ddp)
    ema_module = model_ema.module if model_ema else None
    if ema_module and run.resume_point.is_weights and not args.use_ema and run.weights.ema:
        run.weights.ema.load(ema_module, classes=classes, reset_head=new_head)
    run = replace(run, weights=None)  # frees their memory

    # --- 5. optimizer and schedule ----------------------------------------------------------
    model_without_ddp = sync_batch_norm(model_without_ddp, args)  # not in the EMA model
    run.parallelism.shard(model_without_ddp, ema_module)
    lr = scale_lr(args.lr, args.blr, run.effective_batch)
    criterion = build_criterion(args, nb_classes, device, dataset_train, targets.kind)
    network, criterion, metrics, own_state = build_linear_probe(
        args, model_without_ddp, criterion, metrics
    )  # without --linear_probe nothing changes
    evaluation = device, amp, criterion, metrics
    precise_bn = build_precise_bn(args, model_without_ddp, data_loader_train, device, amp)
    flags = optimizer_flags(args)
    optimizer = build_optimizer(flags, network, lr, run.parallelism.mode, criterion)
    lr_schedule = build_schedule(args, optimizer, lr, steps)
    log.info("peak lr %.3g, precision %s", lr, amp)

    # --- 6. wrap ----------------------------------------------------------------------------
    if args.compile:
        model_without_ddp.compile()
    model = network
    if args.cuda_graphs:
        shape = (args.batch_size, args.in_chans, *args.input_size)
        model = Graphed(model_without_ddp, device, amp, [shape])
    model = run.parallelism.wrap(model)
    limits = args.clip_grad, args.spike_factor, args.clip_mode
    stepper = Stepper(model, optimizer, device, amp, run.update_freq, *limits, criterion)

    # --- 7. resume --------------------------------------------------------------------------
    parts = TrainableParts(model_without_ddp, optimizer, stepper.scaler, ema_module, own_state)
    state = auto_load_model(run.resume_point, parts, args.start_epoch)
    best_metric = best_prefix(args) + metrics.best
    state.choose_best(best_metric, metrics.lower_is_better)
    state.recount_steps(steps, len(dataset_train))
    phases = build_phases(args, steps)
    bad_images = BadImages(
        run.output_dir, data_loader_train, *data_loaders_val, active=args.on_bad_image == "skip"
    )
    reporter = build_reporter(
        args, run.output_dir, device, state, steps, nb_classes > 5, classes, flops
    )
    data = {"train": dataset_train} | datasets_by_name(eval_sets)
    record = build_run_record(args, run.output_dir, run.resume_point, data, n_parameters)
    reporter.attach(parts, lr_schedule, run.resume_point.entry("hooks"), record)
    loop = TrainLoop(
        stepper,
        lr_schedule,
        state,
        guard=build_guard(args, stepper, parts, data_loader_train, run.output_dir),
        reporter=reporter,
        checkpoints=build_checkpoint_manager(
            args,
            run.output_dir,
            parts,
            dataset_train.head(""),
            bad_images.write,
            reporter.hook_states,
        ),
        seed=args.seed,
        freezer=build_freezer(args, model_without_ddp, stepper),
        criterion=criterion,
        mixup=mixup,
        kind=targets.kind,
        model_ema=model_ema,
    )
    if args.dry_run:
        plan = PlannedRun(
            args,
            run.output_dir,
            source,
            loop,
            lambda batches, probe: train_one_epoch(model, model_without_ddp, batches, probe),
            data_loader_train,
            next(iter(data_loaders_val), None),
            lambda batches: evaluate(batches, network, *evaluation),
            more_val=data_loaders_val[1:],
        )
        return check_run(plan)

    # --- 8. epoch loop ----------------------------------------------------------------------
    loop.checkpoints.watch(data_loader_train, *data_loaders_val)  # to save although no batch comes
    with loop.checkpoints, loop.reporter:  # handle stop signals; open the log files
        while not phases.done(state):
            phase = phases.next(state)  # an epoch, or the part of it up to the next evaluation
            data_loader_train.set_epoch(state.epoch, state.samples_in_epoch, phase.stop)
            train_stats = train_one_epoch(model, model_without_ddp, data_loader_train, loop)
            if precise_bn is not None:
                precise_bn.update(model_without_ddp, model_ema, state.epoch)
            entries = phases.end(phase, state, loop.reporter)
            log_stats = {f"train_{name}": value for name, value in train_stats.items()}
            for each in eval_sets if phase.evaluates else ():
                names = reporter, each.split()
                test_stats = evaluate(each.loader, network, *evaluation, *names)
                log_stats |= each.named(test_stats)
                if args.model_ema_eval:
                    names = reporter, each.split("ema")
                    test_stats = evaluate_ema(each.loader, model_ema, *evaluation, *names)
                    log_stats |= each.named(test_stats, "_ema")
            log_stats = plain(log_stats | entries | {"n_parameters": n_parameters})
            state.stats = small_stats(log_stats)
            key = f"test_{best_metric}"
            best = {"best": log_stats.get(key), "best-ema": log_stats.get(f"{key}_ema")}
            last = phases.ends_run(phase, state, best)
            if loop.reporter.worst and phase.evaluates and (last or state.improves(best["best"])):
                loop.reporter.image("worst_images", loop.reporter.worst.draw)  # a rerun does too
            report = partial(loop.reporter.end_epoch, log_stats)
            loop.checkpoints.end_epoch(state, best, last, report)  # save, then report
    log.info("%s", last_line(args, run.output_dir, state))


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device, amp: str) -> None:
    """Evaluate the weights of a checkpoint, and with --model_ema its EMA weights too."""
    log_recipe(args)
    path = choose_evaluated(
        args.resume, args.output_dir or "", args.config, args.finetune, args.use_ema
    )
    sha256 = args.sha256 if path in (args.resume, args.finetune) else ""
    weights = read_weights(args, path, sha256)
    args = inherit_flags(args, weights.saved)
    check_task(args)  # again, with the flags of the checkpoint
    check_start(args, weights, weights.saved.head.count, new=())
    dataset_val, nb_classes = datasets.build_dataset(False, first_set(args), weights.saved.head)
    args = settle_task(args, dataset_val.kind)
    network = model = models.build_classifier(args, nb_classes).to(device)
    answers = dataset_val.describe_answers()
    if args.eval_classes == "data":
        kept = dataset_val.keep_own_classes()
        network, nb_classes = KeepOutputs(model, kept).to(device), len(kept)
        answers = f" among the {plural(nb_classes, 'class')} of the data"
    targets = dataset_val.targets
    criterion = build_criterion(args, nb_classes, device, kind=targets.kind)
    if criterion.state_dict():  # parameters of its own
        restore_loss(weights.checkpoint, weights.path, criterion)
    if args.compile:
        model.compile()
    metrics = build_metrics(args, nb_classes, targets.kind, targets.scale)
    eval_sets = build_eval_sets(args, dataset_val, weights.saved.head, device, metrics)
    skips = args.on_bad_image == "skip"
    bad_images = [BadImages(None, each.loader, active=skips) for each in eval_sets]
    found = [weights]
    if args.model_ema and not args.use_ema and weights.ema:  # in a folder the best of them
        found.append(read_pretrained(path, EMA_KEY, args.model_prefix, sha256))
    weights.load(model, new=())  # before hooks start, which see the model
    with build_eval_reporter(args, device, model, dataset_val.classes) as reporter:
        for weights in found:
            if weights is not found[0]:
                weights.load(model, new=())
            of_ema = weights.key == EMA_KEY
            source = weights.path + " (EMA weights)" * of_ema
            for each, bad in zip(eval_sets, bad_images, strict=True):
                names = reporter, each.split("ema" * of_ema)
                stats = evaluate(each.loader, network, device, amp, criterion, metrics, *names)
                images = len(each.loader.loader.dataset) - bad.write()
                text = describe_evaluation(stats, top5=nb_classes > 5)
                which = each.describe(images) + answers
                utils.get_logger().info("%s: %s on %s", source, text, which)
                report_classes(stats, dataset_val.classes, args.output_dir, of_ema, each.prefix)
    if autotuner.chosen:  # not by networks of other libraries
        utils.get_logger().info("kernels chosen: %s", autotuner.summary())


if __name__ == "__main__":
    utils.launch(main, args)
