# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Official flags parse; wrong flags are refused with an error that says how to fix them."""

import argparse
import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import parser as options
from config import predict_flags

PARSERS = {"pretrain": options.pretrain_parser, "finetune": options.finetune_parser}
DIGITS = ["--data_set", "DIGITS"]

# Official flags with a value to give (OFFICIAL.md); the last word is what the args must hold.
SHARED = """
batch_size=32 epochs=90 warmup_epochs=7 update_freq=4 model=convnextv2_tiny input_size=448
weight_decay=0.1 lr=0.001 blr=0.002 min_lr=1e-7 data_path=/data output_dir=out log_dir=tb
device=cpu seed=3 resume=a.pth auto_resume=false save_ckpt=no save_ckpt_freq=2 save_ckpt_num=5
start_epoch=1 num_workers=0 pin_mem=0 world_size=2 local_rank=1 dist_on_itp=yes
dist_url=tcp://localhost:1
"""
OFFICIAL = {
    "pretrain": SHARED + "mask_ratio=0.75 norm_pix_loss=true decoder_depth=2 decoder_embed_dim=256",
    "finetune": SHARED
    + """
drop_path=0.2 layer_decay_type=group model_ema=true model_ema_decay=0.99
model_ema_force_cpu=true model_ema_eval=true clip_grad=1.5 layer_decay=0.9 warmup_steps=100 opt=sgd
opt_eps=1e-6 momentum=0.8 weight_decay_end=0.2 color_jitter=0.4 aa=3a smoothing=0.2
train_interpolation=bilinear reprob=0.1 remode=const recount=2 resplit=false mixup=0.8 cutmix=1.0
mixup_prob=0.5 mixup_switch_prob=0.3 mixup_mode=elem finetune=b.pt head_init_scale=0.01
model_key=model model_prefix=encoder. nb_classes=10 eval_data_path=/val
imagenet_default_mean_and_std=false data_set=image_folder eval=false
dist_eval=false disable_eval=false
crop_pct=0.9 use_amp=true
""",
}
SUBMITIT = [
    "ngpus=4",
    "nodes=8",
    "timeout=60",
    "job_dir=runs/x",
    "partition=p",
    "comment=hello",
    "use_volta32=true",
]


def parse(kind, *words):
    return options.parse(PARSERS[kind](), [*DIGITS, *words])


def refused(capsys, kind, words, *parts, base=DIGITS):
    with pytest.raises(SystemExit) as stop:
        options.parse(PARSERS[kind](), [*base, *words.split()])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    for part in parts:
        assert part in message
    return message


def plain(text):
    """The value in args of a value written as text."""
    if text in ("true", "yes", "false", "no"):
        return text in ("true", "yes")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@pytest.mark.parametrize(
    ("kind", "pair"), [(kind, pair) for kind, pairs in OFFICIAL.items() for pair in pairs.split()]
)
def test_official_flag_parses(kind, pair):
    name, _, text = pair.partition("=")
    parser = PARSERS[kind]()
    joined = vars(parser.parse_args([f"--{name}={text}"]))[name]
    split = vars(parser.parse_args([f"--{name}", text]))[name]
    expected = [plain(text)] if name == "input_size" else plain(text)
    assert joined == split == expected


@pytest.mark.parametrize("kind", PARSERS)
def test_a_tilde_is_the_home_folder_in_a_file_to_write(kind, monkeypatch):
    """Shells leave it in --output_dir=~/runs; a folder named ~ was made."""
    monkeypatch.setenv("HOME", "/home/a")
    args = PARSERS[kind]().parse_args(["--output_dir=~/runs", "--log_dir", "~/logs"])
    assert (args.output_dir, args.log_dir) == ("/home/a/runs", "/home/a/logs")


def test_evaluation_may_have_the_flags_of_the_run():
    """With --config RUN/args.yaml, which holds --finetune."""
    words = ["--finetune", "a.pth", "--resume", "b.pth"]
    assert parse("finetune", *words, "--eval").resume == "b.pth"
    with pytest.raises(SystemExit):
        parse("finetune", *words)


def test_official_flags_parse_together():
    pairs = OFFICIAL["finetune"].replace("resume=a.pth", "").split()  # it excludes --finetune
    words = [word for pair in pairs for word in f"--{pair}".split("=")]
    args = options.parse(options.finetune_parser(), words)
    assert (args.opt, args.remode, args.model_prefix) == ("sgd", "const", "encoder.")


@pytest.mark.parametrize("kind", PARSERS)
def test_submitit_flags_parse(kind):
    parser = PARSERS[kind]()
    options.add_submitit_args(parser)
    args = options.parse(parser, [*DIGITS, *(f"--{pair}" for pair in SUBMITIT)])
    assert (args.ngpus, args.nodes, args.timeout, args.use_volta32) == (4, 8, 60, True)
    defaults = options.parse(parser, [*DIGITS, "--job_dir", ""])
    assert (defaults.job_dir, defaults.partition, defaults.cluster) == ("./runs/%j", "", "slurm")


def test_values_in_several_words():
    args = parse(
        "finetune",
        *["--opt_betas", "0.9", "0.99", "--cutmix_minmax", "0.2", "0.8", "--scale", "0.5", "1"],
    )
    assert args.opt_betas == (0.9, 0.99)
    assert args.cutmix_minmax == (0.2, 0.8)
    assert args.scale == (0.5, 1.0)


# --- the published command lines -----------------------------------------------------------

FINETUNE_BASE = (
    "--model convnextv2_base --batch_size 32 --update_freq 4 --blr 6.25e-4 --epochs 100 "
    "--warmup_epochs 20 --layer_decay_type group --layer_decay 0.6 --weight_decay 0.05 "
    "--drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True "
    "--model_ema_eval True --use_amp True --finetune CKPT --data_path D --output_dir O"
)
PRETRAIN_BASE = (
    "--model convnextv2_base --batch_size 64 --blr 1.5e-4 --epochs 1600 --warmup_epochs 40 "
    "--data_path D --output_dir O"
)
ATTO = (
    "--model convnextv2_atto --batch_size 32 --update_freq 4 --blr 2e-4 --epochs 600 "
    "--warmup_epochs 0 --layer_decay_type single --layer_decay 0.9 --weight_decay 0.3 "
    "--drop_path 0.1 --reprob 0.25 --mixup 0. --cutmix 0. --smoothing 0.2 --model_ema True "
    "--model_ema_eval True --use_amp True --finetune CKPT --data_path D --output_dir O"
)
TINY = (
    "--model convnextv2_tiny --batch_size 32 --update_freq 4 --blr 8e-4 --epochs 300 "
    "--warmup_epochs 40 --layer_decay_type single --layer_decay 0.9 --weight_decay 0.05 "
    "--drop_path 0.2 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True "
    "--model_ema_eval True --use_amp True --finetune CKPT --data_path D --output_dir O"
)
EVALUATE = (
    "--model convnextv2_base --eval true --resume CKPT --input_size 224 --data_path D"  # README.md
)


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("finetune", EVALUATE),
        ("finetune", FINETUNE_BASE),
        ("finetune", ATTO),
        ("finetune", TINY),
        ("pretrain", PRETRAIN_BASE + " --update_freq 8"),
        ("finetune", FINETUNE_BASE + " --nodes 4 --ngpus 8 --job_dir J"),
        ("pretrain", PRETRAIN_BASE + " --nodes 8 --ngpus 8 --job_dir J"),
        ("pretrain", "--local-rank=3 " + PRETRAIN_BASE),
    ],
)
def test_published_command_gives_its_values(kind, command):
    parser = PARSERS[kind]()
    if "--nodes" in command:
        options.add_submitit_args(parser)
    args = options.parse(parser, command.split())
    words = command.replace("--local-rank=3", "--local_rank 3").split()
    for flag, text in zip(words[::2], words[1::2], strict=True):
        expected = (224, 224) if flag == "--input_size" else plain(text.lower())
        got = getattr(args, flag[2:])
        assert (got.lower() if isinstance(got, str) else got) == expected, flag


def test_defaults_are_the_official_ones():
    pretrain, finetune = parse("pretrain"), parse("finetune")
    assert (pretrain.epochs, pretrain.blr, pretrain.min_lr) == (800, 1.5e-4, 0.0)
    assert (pretrain.warmup_epochs, pretrain.opt_betas) == (40, (0.9, 0.95))
    assert (finetune.epochs, finetune.blr, finetune.min_lr) == (100, 5e-4, 1e-6)
    assert (finetune.warmup_epochs, finetune.opt_betas) == (20, None)
    assert (finetune.update_freq, finetune.effective_batch) == (None, None)  # unset is 1
    assert pretrain.norm_pix_loss is True
    assert (pretrain.scale, finetune.scale) == ((0.2, 1.0), (0.08, 1.0))


# --- kinds of values -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["true", "True", "yes", "1", "y", "t", "on", "ON"])
def test_true_words(text):
    assert parse("pretrain", "--norm_pix_loss", text).norm_pix_loss is True


@pytest.mark.parametrize("text", ["false", "False", "no", "0", "n", "f", "off"])
def test_false_words(text):
    assert parse("pretrain", "--norm_pix_loss", text).norm_pix_loss is False


def test_bare_boolean_is_true():
    args = parse("finetune", "--model_ema", "--model_ema_eval", "--seed", "1")
    assert (args.model_ema, args.model_ema_eval, args.seed) == (True, True, 1)


def test_other_words_are_no_boolean(capsys):
    refused(capsys, "pretrain", "--pin_mem maybe", "--pin_mem", "'maybe'", "true or false")


@pytest.mark.parametrize(
    "words", [["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
def test_local_rank_with_dash_or_underscore(words):
    assert parse("finetune", *words).local_rank == 3


def test_input_size_becomes_height_and_width():
    assert parse("pretrain").input_size == (224, 224)
    assert parse("pretrain", "--input_size", "64").input_size == (64, 64)
    assert parse("pretrain", "--input_size", "64", "96").input_size == (64, 96)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pretrain", "--mask_ratio 0"),
        ("pretrain", "--mask_ratio 1"),
        ("pretrain", "--mask_ratio nan"),
        ("pretrain", "--decoder_depth 0"),
        ("finetune", "--epochs 0"),
        ("finetune", "--epochs inf"),
        ("finetune", "--batch_size -1"),
        ("finetune", "--update_freq 0"),
        ("finetune", "--drop_path 1"),
        ("finetune", "--reprob 1.1"),
        ("finetune", "--hflip -0.1"),
        ("finetune", "--smoothing 1"),
        ("finetune", "--clip_grad 0"),
        ("finetune", "--lr inf"),
        ("finetune", "--lr -1"),
        ("finetune", "--layer_decay 0"),
        ("finetune", "--model_ema_decay 1"),
        ("finetune", "--opt_betas 0.9 1.0"),
        ("finetune", "--save_ckpt_num 0"),
        ("finetune", "--save_ckpt_freq 0"),
        ("finetune", "--crop_pct 2"),
        ("finetune", "--warmup_steps -2"),
        ("finetune", "--print_freq 0"),
        ("finetune", "--std 0"),
        ("finetune", "--std -1"),
        ("pretrain", "--mean nan"),
        ("pretrain", "--mean inf"),
    ],
)
def test_number_outside_its_range_is_refused(capsys, kind, words):
    refused(capsys, kind, words, words.split()[0], "expected", f"got {words.split()[-1]!r}")


def test_choices_are_refused_with_the_list(capsys):
    refused(capsys, "finetune", "--amp bf8", "--amp", "bf16", "fp16", "none")
    refused(capsys, "finetune", "--stem_stride 3", "--stem_stride", "1, 2, 4")


# --- cross-checks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words", "parts"),
    [
        ("pretrain", "--input_size 230", ["--input_size 230", "224 or 256"]),
        ("pretrain", "--input_size 224 20", ["--input_size 20", "try 32"]),
        ("pretrain", "--input_size 8 8 8", ["--input_size", "one or two"]),
        ("pretrain", "--patch_size 20 --stem_stride 2", ["--patch_size 20", "16 or 32"]),
        ("pretrain", "--input_size 64 --mask_ratio 0.9", ["keeps 0 of 4", "1 to 3; lower"]),
        ("pretrain", "--mask_ratio 1e-9", ["keeps 49 of 49", "1 to 48; raise"]),
        ("pretrain", "--input_size 32", ["--input_size 32", "single patch", "--stem_stride"]),
        ("pretrain", "--crop_pct 0.9", ["--crop_pct", "leave it out"]),
        ("pretrain", "--scale 1.0 0.2", ["--scale", "swap"]),
        ("finetune", "--mixup 0.8 --batch_size 5", ["--batch_size 5", "--mixup", "even"]),
        ("finetune", "--cutmix 1 --batch_size 5", ["--batch_size 5", "--cutmix", "even"]),
        ("finetune", "--cutmix_minmax 0.2 0.8 --batch_size 5", ["--batch_size 5"]),
        ("finetune", "--cutmix_minmax 0.8 0.2", ["--cutmix_minmax"]),
        ("finetune", "--cutmix_minmax 0.8", ["--cutmix_minmax", "two numbers"]),
        ("finetune", "--epochs 10 --warmup_epochs 11", ["--warmup_epochs 11", "--epochs 10"]),
        ("finetune", "--start_epoch 100", ["--start_epoch 100", "--epochs 100"]),
        ("finetune", "--lr 1e-7", ["--min_lr 1e-06", "--lr 1e-07"]),
        ("finetune", "--resplit true", ["--resplit"]),
        ("finetune", "--model_ema_eval true", ["--model_ema_eval", "--model_ema true"]),
        ("finetune", "--model_ema_force_cpu true", ["--model_ema_force_cpu", "--model_ema true"]),
        ("finetune", "--use_amp true --amp none", ["--use_amp", "--amp none"]),
        ("finetune", "--use_amp false --amp bf16", ["--use_amp", "--amp bf16"]),
        ("finetune", "--mean 0.5", ["--mean and --std belong together"]),
        ("pretrain", "--std 0.5", ["--mean and --std belong together"]),
        ("pretrain", "--mean 0 1 --std 1", ["--mean 0.0 1.0 has 2 values", "--in_chans 3"]),
        (
            "finetune",
            "--mean 0 --std 1 1 1 --in_chans 1",
            ["--std 1.0 1.0 1.0 has 3", "--in_chans 1"],
        ),
        ("finetune", "--mean 0 --std 1 --imagenet_default_mean_and_std false", ["drop one"]),
        ("finetune", "--eval --disable_eval --resume x", ["--eval", "--disable_eval"]),
        ("finetune", "--disable_eval --model_ema --model_ema_eval", ["--model_ema_eval"]),
        ("finetune", "--tta hflip vflip hflip", ["hflip is given 2 times", "give it once"]),
        ("finetune", "--tta none hflip", ["none stands for no augmentation"]),
        ("finetune", "--tta hflip --disable_eval", ["--tta hflip and --disable_eval"]),
        ("finetune", "--tta rot90 --input_size 224 192", ["--tta rot90", "got --input_size 224"]),
        ("finetune", "--tta five_crop --input_size 384", ["no corners", "give --crop_pct 0.875"]),
        ("finetune", "--tta five_crop --input_size 32", ["resized to --input_size 32 32, which"]),
        ("finetune", "--tta five_crop --crop_pct 1", ["--input_size 224 224 by --crop_pct 1,"]),
        ("finetune", "--tta five_crop --crop_pct 0.999", ["by --crop_pct 0.999, which leaves"]),
        ("finetune", "--eval_data_path somewhere", ["--eval_data_path", "drop one of the two"]),
        ("finetune", "--eval", ["--eval", "--resume"]),
        ("finetune", "--input_size 16", ["--input_size", "at least 32", "--stem_stride"]),
        ("pretrain", "--cuda_graphs --compile", ["--cuda_graphs", "--compile", "drop one"]),
        ("pretrain", "--cuda_graphs --grad_checkpointing", ["--grad_checkpointing", "drop one"]),
        ("pretrain", "--sync_bn_group 2", ["--sync_bn_group needs --sync_bn true"]),
        ("pretrain", "--cuda_graphs --update_freq 2", ["--cuda_graphs", "--update_freq 2", "drop"]),
        ("pretrain", "--cuda_graphs --sync_bn", ["--cuda_graphs", "--sync_bn", "drop one"]),
        ("finetune", "--cuda_graphs --opt adahessian", ["--cuda_graphs", "--opt adahessian"]),
    ],
)
def test_flags_that_cannot_work_are_refused(capsys, kind, words, parts):
    refused(capsys, kind, words, *parts)


def test_data_path_is_needed_unless_the_data_has_none(capsys):
    for kind in PARSERS:
        refused(capsys, kind, "", "--data_path is missing", "table", base=[])
        refused(capsys, kind, "--data_set CIFAR", "--data_set CIFAR needs --data_path", base=[])
        for name in ("SYNTHETIC", "my_pkg.sets:pets"):
            assert options.parse(PARSERS[kind](), ["--data_set", name]).data_path == ""


def test_legal_neighbors_of_refused_values():
    assert parse("pretrain", "--input_size", "64", "--mask_ratio", "0.75").mask_ratio == 0.75
    assert parse("pretrain", "--input_size", "320", "--mask_ratio", "0.99").input_size == (320, 320)
    assert parse("finetune", "--epochs", "20", "--warmup_epochs", "20").warmup_epochs == 20
    assert parse("finetune", "--batch_size", "5").batch_size == 5
    assert parse("finetune", "--tta", "five_crop", "rot90").tta == ("five_crop", "rot90")
    words = ["--tta", "five_crop", "--input_size", "32", "--stem_stride", "1"]
    assert parse("finetune", *words, "--crop_pct", "0.875").crop_pct == 0.875
    assert parse("finetune", "--tta", "none", "--disable_eval").tta == ("none",)
    assert parse("finetune", "--resplit", "false").resplit is False
    assert parse("finetune", "--use_amp", "true", "--amp", "fp16").amp == "fp16"
    args = parse("finetune", *["--eval", "--resume", "x", "--mixup", "0.8", "--batch_size", "1"])
    assert args.batch_size == 1  # a training recipe, reused to evaluate, mixes nothing


def test_short_run_gets_a_short_warmup():
    assert parse("finetune", "--epochs", "20").warmup_epochs == 4.0
    assert parse("pretrain", "--epochs", "1").warmup_epochs == 0.2
    assert parse("pretrain", "--warmup_epochs", "0.5").warmup_epochs == 0.5


def test_finalize_resolves_what_follows_from_other_flags():
    assert parse("pretrain", "--stem_stride", "2").patch_size == 16
    assert parse("pretrain", "--model", "timm:resnet18").patch_size is None  # its own stride
    assert parse("finetune").head_init_scale == 1.0
    assert parse("finetune", "--finetune", "x").head_init_scale == 0.001
    assert parse("finetune", "--finetune", "x", "--head_init_scale", "1").head_init_scale == 1.0
    assert parse("finetune", "--use_amp", "false").amp == "none"
    amp = parse("finetune", "--use_amp", "true")
    assert (amp.amp, amp.use_amp) == (None, True)
    assert parse("finetune", "--aa", "none").aa is None


# --- unknown flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--epoch 3", "--epochs"),
        ("--batch-size=3", "--batch_size"),
        ("--learning 3", "unrecognized argument '--learning'"),
        ("stray", "'stray'"),
    ],
)
def test_unknown_flag_gets_the_closest_match(capsys, words, part):
    refused(capsys, "pretrain", words, "unrecognized argument", part)


def test_flags_of_the_other_script_are_unknown(capsys):
    refused(capsys, "finetune", "--mask_ratio 0.6", "--mask_ratio")
    refused(capsys, "pretrain", "--nb_classes 10", "--nb_classes")


# --- frozen args -----------------------------------------------------------------------------


def test_args_are_frozen():
    args = parse("finetune")
    with pytest.raises(AttributeError, match="frozen"):
        args.lr = 1.0
    with pytest.raises(AttributeError, match="frozen"):
        del args.lr
    assert args.lr is None


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))]
)
def test_args_survive_copies_and_pickle(duplicate):
    args = parse("finetune")
    other = duplicate(args)
    assert vars(other) == vars(args)
    with pytest.raises(AttributeError, match="frozen"):
        other.lr = 1.0
    assert options.FrozenNamespace(**{**vars(args), "output_dir": "x"}).output_dir == "x"


# --- config files ----------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_config_sets_defaults_and_the_command_line_wins(write):
    path = write("epochs: 7\nblr: 1e-3\nopt_betas: [0.8, 0.9]\ninput_size: [64, 96]\npin_mem: no\n")
    args = parse("pretrain", "--config", path)
    assert (args.epochs, args.blr, args.pin_mem) == (7, 1e-3, False)
    assert (args.opt_betas, args.input_size) == ((0.8, 0.9), (64, 96))
    for words in (["--config", path, "--epochs", "9"], ["--epochs", "9", "--config", path]):
        args = parse("pretrain", *words, "--input_size", "96", "64", "--pin_mem")
        assert (args.epochs, args.blr, args.pin_mem) == (9, 1e-3, True)
        assert args.input_size == (96, 64)


def test_mean_and_the_choice_of_a_default_replace_each_other(write):
    own = ["--mean", "-0.5", "--std", "2"]
    path = write("imagenet_default_mean_and_std: false")
    args = parse("finetune", "--config", path, *own)
    assert (args.mean, args.std, args.imagenet_default_mean_and_std) == ((-0.5,), (2.0,), True)
    path = write(options.dump_args(args))
    again = parse("finetune", "--config", path)
    assert (again.mean, again.std) == ((-0.5,), (2.0,))
    other = parse("finetune", "--config", path, "--imagenet_default_mean_and_std", "false")
    assert (other.mean, other.std, other.imagenet_default_mean_and_std) == (None, None, False)


def test_null_in_a_config_resets_to_none(write):
    path = write("opt_betas: null\nclip_grad: null\naa: ~\nnb_classes: 3\n")
    args = parse("finetune", "--config", path)
    assert (args.opt_betas, args.clip_grad, args.aa, args.nb_classes) == (None, None, None, 3)
    assert parse("pretrain", "--config", write("opt_betas: null")).opt_betas == (0.9, 0.95)
    assert parse("pretrain", "--opt", "sgd").opt_betas is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch: 3", ["'epoch'", "epochs"]),
        ("3: 3", ["unknown key 3"]),
        ("config: other.yaml", ["'config'"]),
        ("epochs: many", ["--epochs", "'many'"]),
        ("epochs: -1.5", ["--epochs", "-1.5"]),
        ("epochs: null", ["epochs", "one value"]),
        ("epochs: [3, 4]", ["epochs", "one value"]),
        ("epochs: true", ["epochs", "one value"]),
        ("log_dir: no", ["log_dir", "quote"]),
        ("opt: {name: sgd}", ["opt", "one value"]),
        ("opt_betas: []", ["--opt_betas"]),
        ("opt_betas: [0.9, [1]]", ["opt_betas"]),
        ("scale: [0.1]", ["--scale", "2 arguments"]),
        ("amp: bf8", ["--amp", "bf16"]),
        ("- epochs", ["flag: value"]),
        ("", ["flag: value"]),
        ("a: [", ["cannot read"]),
        ("epochs: !!python/object/apply:os.getcwd []", ["cannot read"]),
    ],
)
def test_wrong_config_is_a_usage_error(capsys, write, text, parts):
    refused(capsys, "finetune", f"--config {write(text)}", "recipe.yaml", *parts)


def test_config_does_not_swallow_a_stray_word(capsys, write):
    refused(capsys, "finetune", f"--config {write('input_size: [64, 64]')} 7", "'7'")


def test_missing_config_is_a_usage_error(capsys):
    refused(capsys, "finetune", "--config no/such.yaml", "no/such.yaml", "cannot read")


@pytest.mark.parametrize("kind", PARSERS)
def test_config_round_trip(write, kind):
    words = "--input_size 64 96 --weight_decay 1e-8 --clip_grad 2 --opt_betas 0.9 0.99 --comment -x"
    words += " --log_dir none --use_amp true --output_dir=  --min_lr 1e-5 --dist_eval no --aa none"
    if kind == "pretrain":
        words = words.replace("--dist_eval no --aa none", "--norm_pix_loss off")
    words = words.replace("--comment -x", "--comment=-x")

    def read(*more):
        parser = PARSERS[kind]()
        options.add_submitit_args(parser)
        return options.parse(parser, list(more))

    args = read(*DIGITS, *words.split())
    path = write(options.dump_args(args))
    again = read("--config", path)
    assert again.config == path
    assert vars(again) == {**vars(args), "config": path}
    assert options.dump_args(again) == options.dump_args(args)


# --- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARSERS)
def test_help_names_every_flag_and_group(kind):
    parser = PARSERS[kind]()
    options.add_submitit_args(parser)
    text = parser.format_help()
    assert f"main_{kind}.py" in text
    for group in (
        "start here:",
        "model:",
        "data:",
        "optimizer and schedule:",
        "SLURM job (submitit):",
    ):
        assert f"\n{group}\n" in text
    for action in parser._actions:
        assert action.help
        for option in action.option_strings:
            assert option in text


def answer(capsys, parser, *words: str) -> str:
    """What a flag prints that ends the script."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert not stop.value.code
    return capsys.readouterr().out


def options_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-h.*)?--(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_25_everyday_flags_and_help_all_the_others(kind, columns, capsys, monkeypatch):
    """It was 250 lines long."""
    monkeypatch.setenv("COLUMNS", str(columns))
    short = answer(capsys, PARSERS[kind](), "--help")
    assert answer(capsys, PARSERS[kind](), "-h") == short
    usage, *text = short.splitlines()
    assert re.fullmatch(r"usage: \S+ \[FLAGS\]", usage)
    assert f"  python main_{kind}.py --recipe digits_{kind} --output_dir runs/digits" in text
    shown = set(options_in(short)) - {"help", "version", "list_models"}
    assert len(shown) == 25
    assert {"model", "data_path", "output_dir", "epochs", "lr"} <= shown
    assert ("mask_ratio" in shown, "finetune" in shown) == (kind == "pretrain", kind != "pretrain")
    assert max(map(len, short.splitlines())) <= columns
    every = answer(capsys, PARSERS[kind](), "--help", "all")
    hidden = len(set(options_in(every)) - set(options_in(short)))
    assert short.endswith(f"--help all shows {hidden} more flags.\n")
    assert hidden > 40


def test_everyday_flags_exist():
    known = {action.dest for parser in PARSERS.values() for action in parser()._actions}
    known |= {row[0].removeprefix("--") for row in options.flags.FLAGS[options.flags.JOB]}
    assert set(options.flags.EVERYDAY.split()) <= known


@pytest.mark.parametrize("kind", PARSERS)
def test_help_of_a_job_shows_its_commands_and_flags(kind, capsys):
    parser = PARSERS[kind]()
    options.add_submitit_args(parser)
    text = answer(capsys, parser, "--help")
    assert f"  python submitit_{kind}.py --nodes 8" in text
    assert "python main_" not in text
    assert {"nodes", "ngpus", "job_dir", "partition"} <= set(options_in(text))


@pytest.mark.parametrize("kind", PARSERS)
def test_models_and_versions_are_listed(kind, capsys):
    """By names that --model takes."""
    names = answer(capsys, PARSERS[kind](), "--list_models").split()
    assert names[0] == "convnextv2_atto"
    assert len(set(names)) == len(names) >= 8
    text = answer(capsys, PARSERS[kind](), "--version")
    assert re.match(r"convnextv2-toolkit \S+, Python 3\.\d+\.\d+, torch \d+\.", text)


def test_sizes_wait_for_the_checkpoint_of_the_folder(tmp_path, capsys, monkeypatch):
    """The stem stride of a run is known once its checkpoint is read."""
    words = ["--data_set", "DIGITS", "--input_size", "16", "--output_dir"]
    for folder in (tmp_path, tmp_path / "new", "none"):
        with pytest.raises(SystemExit):
            options.parse(options.finetune_parser(), [*words, str(folder)])
        assert "--input_size: got 16 16, expected at least 32" in capsys.readouterr().err
    (tmp_path / "checkpoint-0.pth").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # a new folder, not this one
        options.parse(options.finetune_parser(), words[:-1])
    options.parse(options.finetune_parser(), [*words, str(tmp_path)])
    for more in ("--model=my.nets:tiny", "--resume=a.pth", "--finetune=a.pth"):
        options.parse(options.finetune_parser(), [*words, "none", more])


def test_paths_that_a_run_stores_are_absolute(tmp_path, monkeypatch):
    """Files to read only where they exist: others may name a hub's model, or a user's own data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    args = {"output_dir": "run", "log_dir": "none", "data_path": "data", "resume": "timm:name"}
    args |= {"finetune": "", "data_index": None, "eval_data_path": None, "seed": 3}
    own = {"output_dir": str(tmp_path / "run"), "data_path": str(tmp_path / "data")}
    assert options.absolute_paths(args) == args | own


def test_given_flags_are_those_of_the_command_line():
    args = options.parse(options.finetune_parser(), ["--data_set", "DIGITS", "--lr", "1"])
    assert args.given == args.replace(lr=2.0).given == {"data_set", "lr"}
    plain = argparse.Namespace(**vars(args))
    assert options.finalize(plain).given == vars(args).keys()


def test_help_tells_which_checkpoint_is_evaluated():
    """--resume said the opposite of what --eval does."""
    said = {kind: " ".join(PARSERS[kind]().format_help().split()) for kind in PARSERS}
    text = "those in --output_dir take precedence"
    assert f"{text}, but not with --eval" in said["finetune"]
    assert text in said["pretrain"]
    assert "--eval" not in said["pretrain"].replace("--eval_data_path", "")


@pytest.mark.parametrize(
    "build",
    [
        options.export_parser,
        options.visualize_parser,
        options.pack_parser,
        predict_flags.predict_parser,
    ],
)
def test_help_of_other_scripts_shows_all_their_flags(build, capsys):
    text = answer(capsys, build(), "--help")
    flags = [action.option_strings[0] for action in build()._actions if action.option_strings]
    assert all(flag in text for flag in flags)
    assert "-h, --help                  show all flags" in text


def test_fine_tuning_does_not_offer_images_without_labels():
    for kind, offered in ("pretrain", True), ("finetune", False):
        text = " ".join(PARSERS[kind]().format_help().split())
        assert ("image_folder, folder, table" in text) is offered
        assert ("image_folder, table" in text) is not offered


def test_parser_imports_nothing_heavy():
    code = "import sys, config.parser; print({'torch', 'timm', 'yaml'} & sys.modules.keys())"
    root = Path(options.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
