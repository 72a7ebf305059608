# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags stay valid, and their help is complete and fits a terminal."""

import argparse
import hashlib
from functools import partial

import pytest

import datasets
from config import cores, flags, kinds, predict_flags, probe_flags, views
from config import parser as options

# Each flag of commit f388030 with the first digits of a hash of its names, default, choices, number
# of values and what it makes of PROBES. Add new flags freely; a change here breaks command lines,
# args.yaml files and recipes that users have.
RELEASED = {
    "main_pretrain": """
        model:b645 input_size:5d8b in_chans:1173 stem_stride:ceaa drop_path:54ed patch_size:d272
        mask_ratio:e846 norm_pix_loss:4815 decoder_depth:9aea decoder_embed_dim:239e
        picture_freq:94c2 data_path:be01 data_set:4a4b data_index:6e06
        imagenet_default_mean_and_std:c1bf num_workers:487f pin_mem:5e4b on_bad_image:4038
        data_timeout:fd90 hflip:d6f2 scale:c46f crop_pct:ed9c epochs:6478 start_epoch:77ba
        batch_size:6567 update_freq:1323 effective_batch:a759 opt:2df0 opt_eps:2aef
        opt_betas:70d5 momentum:735c weight_decay:67bc weight_decay_end:23d0 clip_grad:3780
        lr:0c40 blr:71e4 min_lr:2026 warmup_epochs:5fb6 warmup_steps:d6f9 config:fb19
        recipe:1035 device:60dd seed:f37e amp:cb80 use_amp:70f4 on_spike:9a30 spike_factor:04ef
        snapshot_freq:b2de max_bad_steps:268b kernels:c1a8 compile:3728 cuda_graphs:7dee
        grad_checkpointing:c2ad deterministic:b48d dry_run:3921 print_freq:12b2 progress:94a6
        output_dir:0800 log_dir:c28b resume:7f30 sha256:e7ae auto_resume:905d save_ckpt:2d85
        save_ckpt_freq:bbe6 save_ckpt_every_steps:d43d save_ckpt_every_minutes:b7a3
        max_minutes:11fc async_save:dafa max_save_failures:2ded save_ckpt_num:106a shard:ea69
        grad_compression:cc0c sync_bn:26cc sync_bn_group:ade5 world_size:219c local_rank:ee02
        dist_on_itp:ea93 dist_url:b20e
    """,
    "main_finetune": """
        model:b645 input_size:5d8b in_chans:1173 stem_stride:ceaa drop_path:54ed data_path:be01
        data_set:4a4b data_index:6e06 imagenet_default_mean_and_std:c1bf num_workers:487f
        pin_mem:5e4b on_bad_image:4038 data_timeout:fd90 hflip:d6f2 scale:e8f9 crop_pct:ed9c
        train_interpolation:0d3b color_jitter:79c4 aa:a7c2 reprob:0d11 remode:b845 recount:18e5
        resplit:194c smoothing:e04a mixup:5e2f cutmix:5d58 cutmix_minmax:754f mixup_prob:a0b4
        mixup_switch_prob:8a17 mixup_mode:4342 epochs:8b07 start_epoch:77ba batch_size:6567
        update_freq:1323 effective_batch:a759 opt:2df0 opt_eps:2aef opt_betas:70d5 momentum:735c
        weight_decay:67bc weight_decay_end:23d0 clip_grad:3780 lr:0c40 blr:e5ca min_lr:7547
        warmup_epochs:5fb6 warmup_steps:d6f9 finetune:1350 model_key:9a40 use_ema:14a1
        model_prefix:3a50 head_init_scale:8e0f nb_classes:2c81 layer_decay:44eb
        layer_decay_type:e81a model_ema:e423 model_ema_decay:519a model_ema_force_cpu:92b6
        model_ema_eval:7e1f eval:c8e0 disable_eval:4665 dist_eval:ecbe eval_data_path:8f1c
        config:fb19 recipe:1035 device:60dd seed:f37e amp:cb80 use_amp:70f4 on_spike:9a30
        spike_factor:02fb snapshot_freq:b2de max_bad_steps:268b kernels:c1a8 compile:3728
        cuda_graphs:7dee grad_checkpointing:c2ad deterministic:b48d dry_run:3921 print_freq:12b2
        progress:94a6 output_dir:0800 log_dir:c28b resume:7f30 sha256:e7ae auto_resume:905d
        save_ckpt:2d85 save_ckpt_freq:bbe6 save_ckpt_every_steps:d43d
        save_ckpt_every_minutes:b7a3 max_minutes:11fc async_save:dafa max_save_failures:2ded
        save_ckpt_num:106a shard:ea69 grad_compression:cc0c sync_bn:26cc sync_bn_group:ade5
        world_size:219c local_rank:ee02 dist_on_itp:ea93 dist_url:b20e
    """,
    "submitit": """
        cluster:2aee ngpus:a707 tasks_per_node:e3fe nodes:5b3a cpus_per_task:db89 mem_gb:a48f
        timeout:97b0 signal_delay:8b6b job_dir:d7f8 partition:ac99 account:92d4 qos:ce5a
        constraint:092d use_volta32:74e0 exclude:b77e gres:4514 dependency:a323 comment:45c5
        array:59dc follow:048f
    """,
    "visualize": """
        checkpoint:c14e output:3991 num_images:e7f2 split:bcba model:cd28 data_path:acf3
        data_set:d412 data_index:5ec7 eval_data_path:8f1c device:60dd seed:c9e3
    """,
    "export": """
        checkpoint:642c to:2331 output:ea54 overwrite:bc13 labels:c73d half:abe4 opset:5575
        input_size:cabd imagenet_default_mean_and_std:c194 crop_pct:ed9c model_key:9a40
        use_ema:14a1 model_prefix:3a50 sha256:e7ae
    """,
}
PROBES = ["-1", "0", "0.5", "1", "1.5", "17", "inf", "nan", "true", "word"]


def submitit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    options.add_submitit_args(parser)
    return parser


PARSERS = {
    "main_pretrain": options.pretrain_parser,
    "main_finetune": options.finetune_parser,
    "submitit": submitit_parser,
    "visualize": options.visualize_parser,
    "export": options.export_parser,
    "pack": options.pack_parser,
    "predict": predict_flags.predict_parser,
}

VIEWS = {
    "visualize data": views.data_parser,
    "visualize stats": views.stats_parser,
    "visualize runs": views.runs_parser,
    "visualize report": views.report_parser,
    "visualize explain": views.explain_parser,
}
VIEWS |= {f"probe {view}": partial(probe_flags.probe_parser, view) for view in probe_flags.AIMS}


def value_of(action: argparse.Action, text: str) -> object:
    try:
        return action.type(text) if action.type else text
    except (argparse.ArgumentTypeError, ValueError):
        return None


def fingerprint(action: argparse.Action) -> str:
    facts = [action.option_strings, action.dest, action.default, list(action.choices or ())]
    facts += [action.nargs, action.const, [value_of(action, text) for text in PROBES]]
    return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()[:4]


@pytest.mark.parametrize("script", RELEASED)
def test_released_flags_are_unchanged(script):
    now = {action.dest: fingerprint(action) for action in PARSERS[script]()._actions}
    released = dict(row.split(":") for row in RELEASED[script].split())
    assert {name: now.get(name) for name in released} == released


@pytest.mark.parametrize("script", [*PARSERS, *VIEWS])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = (PARSERS | VIEWS)[script]()
    parser.prog = script
    lines = parser.format_help().splitlines()
    assert [line for line in lines if len(line) > columns] == []


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune"])
def test_help_starts_with_the_flags_that_newcomers_need(script):
    text = PARSERS[script]().format_help()
    first = text.partition("start here:\n")[2].partition("\n\n")[0]
    needed = "model data_path data_set output_dir resume batch_size epochs lr device dry_run config"
    for name in [*needed.split(), "recipe", *["finetune"] * (script == "main_finetune")]:
        assert f"  --{name} " in first


@pytest.mark.parametrize("script", PARSERS)
def test_help_names_kind_range_and_default(script):
    for action in PARSERS[script]()._actions:
        known = ("BOOL", "INT", "FLOAT", "PATH", "NAME", "TEXT", action.dest.upper())
        assert action.choices or action.dest == "help" or action.metavar in known
    text = " ".join(options.finetune_parser().format_help().split())
    assert (
        "--drop_path FLOAT stochastic depth rate of the last block (in [0,1); default: 0.0)" in text
    )
    assert "--seed INT random seed (>=0; default: 0)" in text
    assert "--scale FLOAT FLOAT" in text
    assert "default: 0.08 1.0)" in text
    assert "(>=1; default: as many as the data has)" in text


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("int [1, inf)", "0", "got '0', expected an integer >=1"),
        ("int [1, inf)", "1.5", "got '1.5', expected an integer >=1"),
        ("float (0, 1)", "0", r"got '0', expected a number in \(0,1\)"),
        ("float (0, inf)", "nan", "got 'nan', expected a number >0"),
    ],
)
def test_number_outside_of_its_range_is_named(kind, text, expected):
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        kinds.number(kind)["type"](text)


def test_flags_name_every_data_set_by_name():
    assert set(datasets.DATASETS) == {*flags.NEED_PATH, *flags.HAVE_EVAL_DATA}
    assert {"auto", *flags.DATA_SETS.split(", ")} == set(datasets.DATASETS)


def test_cores_are_at_most_those_of_the_container(tmp_path, monkeypatch):
    """Kubernetes limits the CPU time; a process there sees all cores of the machine."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: range(96))
    for text, expected in (("800000 100000", 8), ("150000 100000", 2), ("max 100000", 96)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert cores.cpu_cores(str(tmp_path / "cpu.max")) == expected
    assert cores.cpu_cores(str(tmp_path / "none")) == 96
