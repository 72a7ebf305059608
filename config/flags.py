# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every command-line flag, declared once: name, kind, default, what it does.

python -c "from config import flags; print(*flags.FLAGS, sep=chr(10))"
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable


def str2bool(text: str) -> bool:
    """`true`, `yes`, `on`, `t`, `y`, `1` and their opposites, in any case."""
    for value, words in ((True, "true yes on t y 1"), (False, "false no off f n 0")):
        if text.lower() in words.split():
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")


def number(kind: str) -> Callable[[str], float]:
    """`int [1, inf)` -> an argparse type; a round bracket excludes its bound, NaN is outside."""
    name, _, span = kind.partition(" ")
    low, high = (float(bound) for bound in span[1:-1].split(","))
    low = math.nextafter(low, math.inf) if span[0] == "(" else low
    high = math.nextafter(high, -math.inf) if span[-1] == ")" else high

    def convert(text: str) -> float:
        try:
            value = int(text) if name == "int" else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {name} in {span}")
        return value

    return convert


HELP = """%s

  torchrun --nproc_per_node=8 %s --model convnextv2_tiny --data_path /data/imagenet
  python %s --model convnextv2_atto --data_set DIGITS --input_size 32 --stem_stride 1

BOOL is true/false, yes/no, 1/0, and the bare flag is true. --config FILE.yaml sets any flag,
--recipe tiny_ft those of a published run (--recipe list)."""
COUNT, WHOLE, AMOUNT = "int [1, inf)", "int [0, inf)", "float [0, inf)"
CHANCE, BELOW_1, SHARE = "float [0, 1]", "float [0, 1)", "float (0, 1]"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
KERNELS = ("auto", "torch", "triton")
FOLDERS = ("IMNET", "image_folder", "folder")
NEED_PATH = (*FOLDERS, "CIFAR10", "CIFAR")
DATA_SETS = " ".join((*NEED_PATH, "DIGITS", "SYNTHETIC"))
MODEL_KEY = "model|module|state_dict"
SOURCES = "file, run folder, hf-hub:owner/name, timm:model.tag or https://..."
TARGETS = {  # of export.py -> how the name of what it writes ends; hf is a folder
    "timm": ".safetensors",
    "hf": "",
    "official": ".pth",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torchscript": ".pt",
    "pt2": ".pt2",
}
GRAPHS = ("onnx", "torchscript", "pt2")  # hold the network too, so their precision is fixed
EXPORT_HELP = """Write a checkpoint as others read it; they read it before it is called good.

  python export.py runs/finetune --to hf --output my_model
  python export.py runs/finetune --to onnx --half true
  python export.py hf-hub:facebook/convnextv2-tiny-1k-224 --to timm
  python export.py runs/pretrain --to official

CHECKPOINT is a %s. Its size, classes and
channels come from its weights; no --model is needed.

  timm         .safetensors for timm.create_model(NAME, checkpoint_path=FILE)
  hf           folder for transformers' from_pretrained: weights, labels, preprocessing
  official     .pth for the official scripts; with the decoder if there is one
  safetensors  our own names, with the decoder; for every script here
  onnx         network of free batch, height and width, for onnxruntime, TensorRT and others
  torchscript  the same for torch.jit.load and LibTorch
  pt2          the same for torch.export.load; sides of at least two cells (64 pixels)

What is written is loaded again by timm, transformers, onnxruntime or torch and must give the
same output on random input, to 1e-5 of its largest value (1e-2 with --half); else nothing is
left. Weights must come back bit by bit. transformers and onnxruntime are asked if installed; if
not, the last line says that the file is unchecked.

Pre-trained weights have no head and no final norm: a graph of them gives the last map
(N, C, h, w); of an encoder with a norm, features (N, C). The bare flag of a BOOL is true."""
WARMUP = "the least of epochs / 5 and 40 (pre-training) or 20 (fine-tuning)"
# group -> (flag, kind, default, help, nargs if several). Kind: str, str2bool, choices, or a range.
FLAGS: dict[str, tuple] = {
    "model": (
        ("--model", str, "convnextv2_base", "a name in list_models(), or package.module:function"),
        ("--input_size", COUNT, 224, "pixels: the side, or height and width", "+"),
        ("--in_chans", COUNT, 3, "channels of an image"),
        ("--stem_stride", (1, 2, 4), 4, "stride of the stem; the network's is 8 times that"),
        ("--drop_path", BELOW_1, 0.0, "stochastic depth: chance to skip the deepest block"),
    ),
    "masked autoencoder": (
        ("--patch_size", COUNT, None, "pixels, side of a mask patch; unset: 8 * stem_stride"),
        ("--mask_ratio", "float (0, 1)", 0.6, "share of the patches removed"),
        ("--norm_pix_loss", str2bool, True, "bring each target patch to mean 0 and variance 1"),
        ("--decoder_depth", COUNT, 1, "blocks of the decoder"),
        ("--decoder_embed_dim", COUNT, 512, "channels of the decoder"),
        ("--picture_freq", WHOLE, 10, "epochs between reconstruction images; 0: none"),
    ),
    "data": (
        ("--data_path", str, "", "folder of the data; DIGITS and SYNTHETIC need none"),
        ("--data_set", str, "IMNET", f"one of {DATA_SETS}, or package.module:function"),
        (
            "--data_index",
            str,
            "",
            "folder for lists of the images, train.index and val.index: each is written once, then "
            "mapped by all processes; empty: each process lists the folders",
        ),
        ("--imagenet_default_mean_and_std", str2bool, True, "false: Inception's mean and std"),
        ("--num_workers", WHOLE, min(10, CORES), "loader processes of each rank"),
        ("--pin_mem", str2bool, True, "page-locked host memory: faster copies to a GPU"),
        ("--on_bad_image", ("error", "skip"), "error", "skip: go on without it, and list it"),
        (
            "--data_timeout",
            AMOUNT,
            None,
            "seconds that a loader process may take for one image; 0: any time; unset: 1800",
        ),
        ("--hflip", CHANCE, 0.5, "chance of a horizontal flip in training"),
        ("--scale", SHARE, (0.08, 1.0), "area of the random crop: least and most", 2),
        ("--crop_pct", SHARE, None, "evaluation: crop / resized side; unset: by input size"),
    ),
    "augmentation": (
        ("--train_interpolation", ("bicubic", "bilinear", "random"), "bicubic", "of random crops"),
        ("--color_jitter", AMOUNT, None, "strength of colour jitter without --aa; unset: none"),
        ("--aa", str, "rand-m9-mstd0.5-inc1", "AutoAugment policy as timm writes it, or none"),
        ("--reprob", CHANCE, 0.25, "chance of random erasing"),
        ("--remode", ("pixel", "rand", "const"), "pixel", "erase to noise, one colour or zero"),
        ("--recount", COUNT, 1, "rectangles erased in an image, at most"),
        ("--resplit", str2bool, False, "official flag without a use here: true is refused"),
        ("--smoothing", BELOW_1, 0.1, "label smoothing; 0: none"),
        ("--mixup", AMOUNT, 0.0, "alpha of mixup; 0: off"),
        ("--cutmix", AMOUNT, 0.0, "alpha of cutmix; 0: off"),
        ("--cutmix_minmax", CHANCE, None, "cutmix side, least and most share; turns it on", "+"),
        ("--mixup_prob", CHANCE, 1.0, "chance that a batch is mixed"),
        ("--mixup_switch_prob", CHANCE, 0.5, "chance of cutmix when mixup is on too"),
        ("--mixup_mode", ("batch", "pair", "elem"), "batch", "one draw for each of these"),
    ),
    "optimizer and schedule": (
        ("--epochs", COUNT, 100, "passes over the data"),
        ("--start_epoch", WHOLE, 0, "first epoch to run; a resumed checkpoint knows better"),
        ("--batch_size", COUNT, 64, "images in a micro-batch of one rank"),
        ("--update_freq", COUNT, None, "micro-batches in an update; unset: by --effective_batch"),
        (
            "--effective_batch",
            COUNT,
            None,
            "images in an update of all ranks, chooses --update_freq; unset: one micro-batch each",
        ),
        ("--opt", str, "adamw", "optimizer, by timm's name"),
        ("--opt_eps", "float (0, inf)", None, "epsilon; unset: the optimizer's own"),
        (
            "--opt_betas",
            BELOW_1,
            None,
            "betas; unset: the optimizer's own, 0.9 0.95 in pre-training by adamw",
            "+",
        ),
        ("--momentum", BELOW_1, 0.9, "for optimizers that have it, such as sgd"),
        ("--weight_decay", AMOUNT, 0.05, "for matrices; vectors and GRN get none"),
        ("--weight_decay_end", AMOUNT, None, "reached by cosine at the end; unset: constant"),
        ("--clip_grad", "float (0, inf)", None, "largest gradient norm; unset: no clipping"),
        ("--lr", AMOUNT, None, "peak rate, wins over --blr; unset: blr * images an update / 256"),
        ("--blr", AMOUNT, 5e-4, "peak rate for 256 images an update"),
        ("--min_lr", AMOUNT, 1e-6, "reached by cosine at the end"),
        ("--warmup_epochs", AMOUNT, None, f"linear, fractions too; unset: {WARMUP}"),
        ("--warmup_steps", "int [-1, inf)", -1, "updates, wins over epochs; -1: not used"),
    ),
    "starting weights and head": (
        ("--finetune", str, "", f"{SOURCES} to start from, of any known layout; empty: random"),
        ("--model_key", str, MODEL_KEY, "keys under which it holds weights, tried in order"),
        ("--use_ema", str2bool, False, "take the averaged weights of --finetune, --resume"),
        ("--model_prefix", str, "", "what precedes the names of its weights; empty: nothing"),
        ("--head_init_scale", AMOUNT, None, "of a new head; unset: 0.001 with --finetune, else 1"),
        ("--nb_classes", COUNT, None, "classes to tell apart; unset: as many as the data has"),
        ("--layer_decay", SHARE, 1.0, "learning rate of a layer / of the next; 1: off"),
        ("--layer_decay_type", ("single", "group"), "single", "a layer is a block or a group of 3"),
    ),
    "evaluation and moving average": (
        ("--model_ema", str2bool, False, "keep an exponential moving average of the weights"),
        ("--model_ema_decay", BELOW_1, 0.9999, "share of the average kept in an update"),
        ("--model_ema_force_cpu", str2bool, False, "keep it in host memory"),
        ("--model_ema_eval", str2bool, False, "evaluate it too"),
        (
            "--eval",
            str2bool,
            False,
            "only evaluate: --resume, --finetune, or the best in OUTPUT_DIR",
        ),
        ("--disable_eval", str2bool, False, "train without evaluation"),
        ("--dist_eval", str2bool, True, "share the evaluation among the ranks"),
        ("--eval_data_path", str, None, "folder of the evaluation data; unset: by --data_set"),
    ),
    "run": (
        ("--config", str, None, "YAML file of flags; the command line wins"),
        (
            "--recipe",
            str,
            None,
            "name in recipes/ or a file like those; --config wins; list: show all",
        ),
        ("--device", str, "auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N, mps"),
        ("--seed", WHOLE, 0, "of every random draw"),
        ("--amp", ("bf16", "fp16", "none"), None, "unset: bf16 on CUDA, none elsewhere"),
        ("--use_amp", str2bool, None, "true: half precision on any device; false: --amp none"),
        (
            "--on_spike",
            ("skip", "rollback"),
            "skip",
            "an update whose loss or gradient is not finite, or whose loss is a spike: leave it "
            "out, or return to the last snapshot too; bad_batch.json tells what it held",
        ),
        ("--spike_factor", AMOUNT, 0.0, "a spike is a loss above so many times the usual; 0: none"),
        (
            "--snapshot_freq",
            COUNT,
            None,
            "updates between snapshots in memory, taken at log lines; unset: 100",
        ),
        (
            "--max_bad_steps",
            WHOLE,
            10,
            "updates in a row to leave out, or returns to one snapshot, before the run stops",
        ),
        (
            "--kernels",
            KERNELS,
            "auto",
            "auto: the fastest here, measured once and kept; torch: its own; triton: Triton's",
        ),
        ("--compile", str2bool, False, "torch.compile: slow first update, then faster"),
        ("--cuda_graphs", str2bool, False, "launch a training step's kernels as one; CUDA only"),
        (
            "--grad_checkpointing",
            str2bool,
            False,
            "backward computes each block again: much less memory for up to a third more work",
        ),
        (
            "--deterministic",
            str2bool,
            False,
            "the same bits in every run of the command on this machine; no --compile, slower",
        ),
        (
            "--dry_run",
            str2bool,
            False,
            "try data, weights, memory, speed and disk without a run; exit code 1 on a problem",
        ),
        ("--print_freq", COUNT, 20, "updates between log lines"),
        ("--progress", ("auto", "bar", "lines"), "auto", "auto: bar on a terminal, else lines"),
    ),
    "checkpoints and logs": (
        ("--output_dir", str, "", "folder of checkpoints and logs; empty: write nothing"),
        ("--log_dir", str, None, "for TensorBoard; unset: OUTPUT_DIR/tensorboard; none: off"),
        ("--resume", str, "", "run to go on from, or weights; newer ones in OUTPUT_DIR win"),
        ("--sha256", str, "", "of the checkpoint that is named; a file with another is refused"),
        ("--auto_resume", str2bool, True, "go on from the newest checkpoint in OUTPUT_DIR"),
        ("--save_ckpt", str2bool, True, "write checkpoints"),
        ("--save_ckpt_freq", COUNT, 1, "epochs between checkpoints"),
        ("--save_ckpt_every_steps", COUNT, None, "updates between checkpoints within an epoch too"),
        ("--save_ckpt_every_minutes", "float (0, inf)", None, "the same by the clock"),
        (
            "--max_minutes",
            "float (0, inf)",
            None,
            "then save and exit with 75, to be requeued",
        ),
        ("--async_save", str2bool, False, "write checkpoints beside the training, from a copy"),
        ("--max_save_failures", WHOLE, 5, "saves in a row that may fail before the run stops"),
        ("--save_ckpt_num", COUNT, 3, "how many of the newest to keep"),
    ),
    "many processes": (
        (
            "--shard",
            ("ddp", "zero1", "fsdp"),
            "ddp",
            "what each process keeps: everything; its share of the optimizer's moments; its share "
            "of weights, gradients and moments",
        ),
        ("--grad_compression", ("none", "bf16"), "none", "how gradients travel between processes"),
        (
            "--sync_bn",
            str2bool,
            False,
            "take BatchNorm's statistics over all GPUs",
        ),
        ("--sync_bn_group", WHOLE, 0, "how many neighbouring processes share them; 0: all"),
    ),
    "processes (set by launchers)": (
        ("--world_size", COUNT, 1, "if not 1, must agree with the launcher"),
        ("--local_rank --local-rank", "int [-1, inf)", -1, "number of this process on its node"),
        ("--dist_on_itp", str2bool, False, "read the ranks that Open MPI's mpirun sets"),
        ("--dist_url", str, "env://", "where the processes meet"),
    ),
    "submitit": (
        ("--cluster", ("slurm", "local", "debug"), "slurm", "local: here; debug: in this process"),
        ("--ngpus", WHOLE, None, "GPUs of each node; 0: CPUs only; unset: 8 on SLURM, else 1"),
        ("--tasks_per_node", COUNT, None, "processes of each node; unset: one a GPU, else 1"),
        ("--nodes", COUNT, None, "nodes; unset: 2 on SLURM, else 1"),
        ("--cpus_per_task", COUNT, 10, "cores of each process, for its --num_workers too"),
        ("--mem_gb", "float (0, inf)", None, "memory of each node; unset: the cluster's default"),
        ("--timeout", COUNT, 4320, "minutes after which the job saves and is requeued"),
        ("--signal_delay", COUNT, 120, "seconds for that save, before the job would be killed"),
        ("--job_dir", str, "./runs/%j", "shared folder of the job; %%j becomes its number"),
        ("--partition", str, "", "empty: the cluster's default"),
        ("--account", str, "", "who pays; empty: the cluster's default"),
        ("--qos", str, "", "quality of service; empty: the cluster's default"),
        ("--constraint", str, "", "features that nodes must have, as sbatch has it"),
        ("--use_volta32", str2bool, False, "ask for V100 GPUs of 32 GB: --constraint volta32gb"),
        ("--exclude", str, "", "nodes not to use"),
        ("--gres", str, "", "generic resources; with gpu:TYPE:N in it, instead of --ngpus's"),
        ("--dependency", str, "", "jobs to wait for, as sbatch has it: afterok:123"),
        ("--comment", str, "", "note for the scheduler"),
        ("--array", str, "", "recipes, parted by commas: a job each, and a folder each"),
        (
            "--follow",
            str2bool,
            False,
            "print rank 0's log until the job ends; exit code 1 if it failed",
        ),
    ),
    "pictures": (
        ("--checkpoint", str, "", "checkpoint of main_pretrain.py, or its output folder"),
        ("--output", str, "reconstructions.png", "PNG file to write"),
        ("--num_images", COUNT, 8, "images to draw, a row each"),
        ("--split", ("train", "val"), "train", "which images; not every data set has val"),
    ),
    "export": (
        ("checkpoint", str, None, SOURCES),
        ("--to", tuple(TARGETS), None, "who shall read it: see above"),
        ("--output", str, "", "file or folder to write; empty: named by size and target, here"),
        ("--overwrite", str2bool, False, "replace what is there"),
        ("--labels", str, None, "hf: file of class names, one a line; unset: the checkpoint's own"),
        ("--half", str2bool, False, "graphs: weights in float16, sums, input and output float32"),
        (
            "--opset",
            "int [17, 20]",
            None,
            "onnx: version of its operations; unset: 17, the first with LayerNormalization, which "
            "the most runtimes read",
        ),
    ),
}
