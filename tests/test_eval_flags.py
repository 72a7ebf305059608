# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Flags of training do nothing with --eval, and a line names them."""

import pytest
import torch

import main_finetune
from config import checks
from config import parser as options
from tests import tiny
from tests.test_flags_act import BASE

# Flags of checks.OF_TRAINING that may stand together, each with a value that changes training.
GROUPS = (
    "--epochs 3 --lr 1 --min_lr 0.1 --drop_path 0.9 --hflip 1 --scale 0.1 0.2 --opt_eps 0.1 "
    "--ratio 1 2 --vflip 1 --rot90 1 --pca_lighting 9 --grayscale_prob 1 --gaussian_blur_prob 1 "
    "--color_jitter_prob 0.5 "
    "--train_interpolation random --color_jitter 0.9 --aa rand-m5 --reprob 1 --remode rand "
    "--recount 5 --smoothing 0.3 --mixup 1 --cutmix 1 --cutmix_minmax 0.2 0.8 --mixup_prob 0.5 "
    "--mixup_switch_prob 0.2 --mixup_mode elem --warmup_epochs 1 --start_epoch 1 --update_freq 2 "
    "--opt lamb --opt_betas 0.1 0.2 --no_weight_decay none --weight_decay 0.2 --eval_freq 0.5 "
    "--weight_decay_end 0.3 --param_group head:lr=3 --freeze stages.0 --clip_grad 1 "
    "--clip_mode agc --layer_decay 0.5 --layer_decay_type group --patience 2 --min_delta 0.1 "
    "--precise_bn 8 --head_init_scale 9 --on_spike rollback --spike_factor 9 --snapshot_freq 2 "
    "--decode fast --report false "
    "--max_bad_steps 1 --log_dir tb --print_freq 1 --profile --tracker wandb --project p --tags a "
    "--progress bar --auto_resume false --save_ckpt_freq 2 --save_ckpt_num 1 --async_save "
    "--save_ckpt_every_steps 1 --save_ckpt_every_minutes 1 --max_minutes 1 --max_save_failures 0 "
    "--shard zero1 --grad_compression bf16 --mixup_off_epoch 9 --aug_off_epoch 9 "
    "--progressive_batch --decode fast",
    "--blr 1 --warmup_steps 3 --effective_batch 64 --sched_options eps=linear(1e-8,1e-4) "
    "--freeze_backbone --reset_head --save_ckpt false --sampling balanced --opt sgd --momentum 0.5 "
    "--class_weights inverse --model_ema --model_ema_decay 0.5 --model_ema_eval "
    "--model_ema_force_cpu --num_samples 9 --aug_repeats 2 --label_fraction 0.5",
    "--sched linear(0,1) --grad_checkpointing --sync_bn --sync_bn_group 2",
    "--linear_probe --linear_probe_blr 1 2",
    "--cuda_graphs",
)
NOT_TRIED = {"pretrained", "ram_cache"}  # for networks of other libraries; for image files


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Evaluate a checkpoint with further flags; returns the log."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = tiny.classifier(stem_stride=1, num_classes=tiny.CLASSES)
    torch.save({"model": model.state_dict()}, "weights.pth")

    def run(words=""):
        base = f"{BASE['finetune']} --eval --resume weights.pth --output_dir none"
        parser = main_finetune.get_args_parser()
        main_finetune.main(options.parse(parser, f"{base} {words}".split()))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("words", GROUPS)
def test_flags_of_training_do_nothing_with_eval_and_are_named(words, evaluate):
    first, *said = evaluate(words).splitlines()
    named = first.partition("with --eval these do nothing: ")[2].replace("--", "").split(", ")
    typed = {word[2:] for word in f"{BASE['finetune']} {words}".split() if word.startswith("--")}
    assert {*named} == typed & {*checks.OF_TRAINING.split()}
    assert said == evaluate().splitlines()[1:]


def test_every_flag_of_training_is_tried():
    words = f"{BASE['finetune']} {' '.join(GROUPS)}".split()
    typed = {word[2:] for word in words if word.startswith("--")}
    assert {*checks.OF_TRAINING.split()} - typed == NOT_TRIED


def test_hooks_of_training_are_named_and_flags_of_files_are_not(evaluate, tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("sched: linear(0,1)\nhook: [csv, costs]\npatience: 3\n")
    first = evaluate(f"--config {path}").splitlines()[0]
    assert first.endswith("these do nothing: --epochs, --lr, --log_dir")
    assert "--log_dir, --hook csv\n" in evaluate("--hook csv costs")
