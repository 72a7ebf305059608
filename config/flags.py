# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every flag of the training scripts, declared once: name, kind, default and help.

config/tool_flags.py and config/views.py declare those of other scripts alone.

python -c "from config import flags; print(*flags.FLAGS, sep=chr(10))"
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.cores import cpu_cores
from config.kinds import (
    AMOUNT,
    ANY,
    BELOW_1,
    BOOL,
    CHANCE,
    COUNT,
    EPOCHS,
    FRACTION,
    FROM_0,
    FROM_MINUS_1,
    NAME,
    OUT,
    PATH,
    POSITIVE,
    REPEATED,
    SIZE,
    TEXT,
    number,
)
from config.tasks import TASKS


def as_typed(value: Any) -> str:
    """Write a value as on the command line: `true`, `0.08 1.0`."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(shlex.quote(str(x).lower() if isinstance(x, bool) else str(x)) for x in values)


def library_of(name: str) -> str:
    """Return `timm` or `torchvision` for a network of theirs, such as `timm:resnet18`, else ''."""
    library = name.removeprefix("fcmae_").partition(":")[0]
    return library if ":" in name and library in LIBRARIES else ""


def is_code(name: str) -> bool:
    """Return True for `package.module:function`, code that no checkpoint may choose."""
    return ":" in name and not library_of(name)


def downloads(data_set: str) -> bool:
    """Return True for a --data_set that is downloaded to --data_path if it is not there."""
    return data_set in DOWNLOADED or bool(library_of(data_set))


def needs_path(data_set: str) -> bool:
    """Return True for a --data_set that needs --data_path."""
    return data_set in NEED_PATH or bool(library_of(data_set))


def implied_patch(model: str, stem_stride: int) -> int | None:
    """Side of a mask patch without --patch_size; None: the stride of a network of another kind."""
    own = is_code(model) or model.removeprefix("fcmae_").startswith("convnext")
    return 8 * stem_stride if own else None


def is_pretraining(values: Mapping[str, Any]) -> bool:
    """Return True for flags of main_pretrain.py, False for those of main_finetune.py."""
    return "mask_ratio" in values


def command(script: str) -> str:
    """Return `python export.py`, or the console command if pip has installed the toolkit."""
    if __name__ == "config.flags":
        root, name = Path(__file__).resolve().parents[1], f"{script}.py"
        return f"python {name if root == Path.cwd() else shlex.quote(str(root / name))}"
    return f"convnextv2-{script.removeprefix('main_')}"


# Flags in --help of the training scripts and of submitit; --help all shows the others too.
EVERYDAY = """
model data_set data_path output_dir finetune resume batch_size epochs lr device dry_run recipe
config input_size stem_stride drop_path mask_ratio norm_pix_loss probe_data num_workers
on_bad_image warmup_epochs effective_batch layer_decay eval amp seed save_ckpt_freq
cluster nodes ngpus timeout job_dir partition array follow
"""
HELP = """%(aim)s

  python main_%(kind)s.py --recipe digits_%(kind)s --output_dir runs/digits
  torchrun --nproc_per_node=8 main_%(kind)s.py --model convnextv2_tiny \\
      --data_path /data/imagenet --output_dir runs/tiny

BOOL is true or false (or yes/no, 1/0); the flag alone means true. Flags on the
command line win over --config FILE, which wins over --recipe NAME."""
SUBMITIT_HELP = """Run main_%(kind)s.py as a SLURM job, or here with --cluster local or debug.
It saves before its time limit, and continues when it is requeued.

  python submitit_%(kind)s.py --nodes 8 --ngpus 8 --model convnextv2_base \\
      --data_path /data/imagenet --job_dir /shared/runs/%%j

The last group of flags describes the job. BOOL is true or false (or yes/no,
1/0); the flag alone means true."""
JOB = "SLURM job (submitit)"  # group of the flags that only submitit_*.py has
CORES = cpu_cores()
KERNELS = ("auto", "torch", "triton")
LISTED = ("auto", "IMNET", "image_folder", "folder", "table")  # --data_index lists their images
DOWNLOADED = ("CIFAR10", "CIFAR")  # if they are not in --data_path
NEED_PATH = (*LISTED, *DOWNLOADED)
HAVE_EVAL_DATA = ("IMNET", "CIFAR10", "CIFAR", "DIGITS", "SYNTHETIC")
DATA_SETS = ", ".join((*NEED_PATH[1:], "DIGITS", "SYNTHETIC"))
LIBRARIES = ("timm", "torchvision")
PROJECT = "convnextv2"
MODEL_KEY = "model|module|state_dict"
SOURCES = "file, run folder, hf-hub:owner/name, timm:model.tag or https://..."

# Texts for which '' has a meaning, as in the official code: none, or the default.
MAY_BE_EMPTY = "output_dir log_dir job_dir resume finetune model_prefix aa partition comment"

# Group -> rows of (flag, kind, default, help, nargs if several values). A kind is a tuple of
# choices, or argparse's options. Help may end in "; default: WORDS" where the default itself says
# too little; the range and other defaults are added when help is printed.
FLAGS: dict[str, tuple] = {}
# fmt: off
FLAGS["start here"] = (
    ("--model", NAME, "convnextv2_base",
     "name of --list_models, timm:NAME, torchvision:NAME or package.module:function, perhaps with "
     "(key=value, ...); default: the checkpoint's, or convnextv2_base"),
    ("--data_set", NAME, "auto",
     f"auto, which recognizes what --data_path is, {DATA_SETS}, torchvision:NAME or "
     "package.module:function"),
    ("--data_path", PATH, "",
     "data: a folder, a table of images (.csv, .tsv, .txt), a zip, tar or Parquet file, a pattern, "
     "or several: a.tar:0.7,b/:0.3; DIGITS and SYNTHETIC need none"),
    ("--output_dir", OUT, None,
     "folder for checkpoints and logs, or none; default: runs/SCRIPT-MODEL-TIME"),
    ("--finetune", PATH, "", f"pretrained weights: {SOURCES}; default: random weights"),
    ("--resume", PATH, "", "run or checkpoint to continue; those in --output_dir take precedence"),
    ("--batch_size", COUNT, 64, "images per process in each forward pass"),
    ("--epochs", EPOCHS, 100, "passes over the training data, also a fraction such as 2.5"),
    ("--lr", AMOUNT, None, "peak learning rate; default: blr * images per optimizer step / 256"),
    ("--device", NAME, "auto", "cpu, cuda, cuda:N, mps; auto: CUDA, MPS or CPU, in this order"),
    ("--dry_run", BOOL, False, "check data, weights, memory, speed and disk without training"),
    ("--recipe", NAME, None, "flags of a published run: a name (list shows all) or a YAML file"),
    ("--config", PATH, None, "file of flags: YAML, as the args.yaml of a run, or a checkpoint"),
)
FLAGS["model"] = (
    ("--input_size", SIZE, 224,
     "image side in pixels, or height and width; or sides by epoch, such as 128:0,160:50,224:80; "
     "default: the checkpoint's, or 224", "+"),
    ("--progressive_batch", BOOL, False,
     "sizes by epoch: larger batches of smaller images, by area; the learning rate follows"),
    ("--in_chans", COUNT, 3, "image channels; default: the checkpoint's, or 3"),
    ("--stem_stride", (1, 2, 4), 4,
     "stride of the stem; the network's is 8 times as large; of timm and torchvision 4 is the "
     "network's own; default: the checkpoint's, or 4"),
    ("--drop_path", BELOW_1, 0.0, "stochastic depth rate of the last block"),
)
FLAGS["masked autoencoder"] = (
    ("--patch_size", COUNT, None, "side of a mask patch in pixels; default: the network's stride"),
    ("--mask_ratio", number("float (0, 1)"), 0.6, "fraction of patches to mask"),
    ("--norm_pix_loss", BOOL, True, "normalize each target patch to mean 0 and std 1"),
    ("--recon_loss", ("l2", "l1", "smooth_l1"), "l2", "loss of the removed pixels"),
    ("--decoder_depth", COUNT, 1, "decoder blocks"),
    ("--decoder_embed_dim", COUNT, 512, "decoder channels"),
    ("--picture_freq", FROM_0, 10, "epochs between reconstruction images; 0: none"),
)
FLAGS["probes and alarms"] = (
    ("--probe_every", FROM_0, 10, "epochs between probes of the network, and alarms; 0: neither"),
    ("--probe_data", PATH, "", "labeled data for probes, as --data_path; default: the run's own"),
    ("--probe_label_column", NAME, None,
     "table: columns of labels for probes, * for all others; default: label, class, target ...",
     "+"),
    ("--probe_images", COUNT, None,
     "labeled images of a probe; default: 1/4 of the training images, 500 to 24,000"),
    ("--probes", TEXT, ("knn", "linear"), "evaluators: knn(k=9), linear, package.module:name", "+"),
)
FLAGS["data"] = (
    ("--data_index", OUT, "", "folder to cache lists of image files in; default: no cache"),
    ("--ram_cache", BOOL, False, "hold image files in memory, once for all processes of a node"),
    ("--imagenet_default_mean_and_std", BOOL, True, "ImageNet's mean and std; false: Inception's"),
    ("--mean", ANY, None, "mean of images in 0 to 1, one or per channel; default: ImageNet's", "+"),
    ("--std", POSITIVE, None, "their standard deviation, likewise; default: ImageNet's", "+"),
    ("--value_range", ANY, None,
     "pixel values that become 0 and 1, in full depth; default: 8 bits, or floats in 0 to 1", 2),
    ("--num_workers", FROM_0, None,
     "data-loading processes per rank; default: measured, at first one per CPU core, at most 10"),
    ("--pin_mem", BOOL, True, "use page-locked memory, for faster copies to a GPU"),
    ("--decode", ("exact", "fast"), "exact",
     "large JPEG files to train on: exact pixels, or those of a smaller image if the crop needs no "
     "more"),
    ("--on_bad_image", ("error", "skip"), "error", "unreadable images: stop, or skip and log them"),
    ("--data_timeout", AMOUNT, None, "seconds to load one image; 0: no limit; default: 1800"),
    ("--crop_pct", FRACTION, None, "evaluation crop side / image side; default: by --input_size"),
    ("--image_column", NAME, None, "table: column of image files; default: image, path ... or 1st"),
    ("--image_root", PATH, "", "table: folder of its image files; default: the table's own"),
    ("--split_column", NAME, None, "table: column of train or val; default: split, if there"),
    ("--num_samples", COUNT, None,
     "training images of an epoch, drawn from all; default: as many as there are"),
    ("--aug_repeats", COUNT, 1,
     "times that each image comes in a row, augmented differently; an epoch keeps its length"),
)
FLAGS["task and sampling"] = (
    ("--task", ("auto", *TASKS), "auto",
     "kind of labels; default: multi_label for a table with a|b or with several label columns, "
     "or what a data set of your own says; otherwise classification"),
    ("--label_column", NAME, None,
     "table: columns of labels, * for all others; default: label, class, target ...", "+"),
    ("--normalize_targets", BOOL, True, "regression: train on targets of mean 0 and std 1"),
    ("--sampling", ("shuffle", "balanced", "weighted"), "shuffle",
     "images of an epoch: each once, as many of each class, or drawn by weights"),
    ("--weight_column", NAME, None, "table: column of the weights of --sampling weighted"),
    ("--label_fraction", FRACTION, 1.0,
     "fraction of the training images of each class to train on, chosen by --seed"),
)
FLAGS["augmentation"] = (
    ("--scale", FRACTION, (0.08, 1.0), "smallest and largest random crop, as fractions of area", 2),
    ("--ratio", POSITIVE, (3 / 4, 4 / 3),
     "smallest and largest width / height of a random crop; default: 3/4 4/3", 2),
    ("--train_interpolation", ("bicubic", "bilinear", "random"), "bicubic",
     "interpolation of random crops and of --aa; random: one of the two per image"),
    ("--hflip", CHANCE, 0.5, "probability of a horizontal flip in training"),
    ("--vflip", CHANCE, 0.0, "probability of a vertical flip, for images of any orientation"),
    ("--rot90", CHANCE, 0.0,
     "probability of a turn by 90, 180 or 270 degrees; 0.75 makes all four orientations equally "
     "likely"),
    ("--aa", NAME, "rand-m9-mstd0.5-inc1",
     "policy: rand-..., original, v0, augmix-... in timm's notation, 3a (3-Augment), ta_wide "
     "(TrivialAugment), or none"),
    ("--color_jitter", AMOUNT, None,
     "strength of random brightness, contrast and saturation, with --aa none or 3a; default: none"),
    ("--color_jitter_prob", CHANCE, None, "probability of --color_jitter; default: always"),
    ("--pca_lighting", AMOUNT, 0.0,
     "AlexNet's color noise along ImageNet's principal components: std of its factors, 0.1 in "
     "AlexNet; 0: off"),
    ("--grayscale_prob", CHANCE, 0.0, "probability that an RGB image becomes gray"),
    ("--gaussian_blur_prob", CHANCE, 0.0,
     "probability of a Gaussian blur with a sigma of 0.1 to 2 pixels"),
    ("--reprob", CHANCE, 0.25, "probability of random erasing"),
    ("--remode", ("pixel", "rand", "const"), "pixel", "erase to noise, a random color or zeros"),
    ("--recount", COUNT, 1, "largest number of erased rectangles per image"),
    ("--aug_off_epoch", FROM_0, 0,
     "epoch, from 0, from which only crop, flips and --rot90 are left: no --aa, colors, blur and "
     "erasing; 0: never"),
)
FLAGS["label smoothing and mixing"] = (
    ("--resplit", BOOL, False, "flag of the official code; true is not supported"),
    ("--smoothing", BELOW_1, 0.1,
     "label smoothing; 0: none; default: 0.1, or 0 if --loss is not ce"),
    ("--mixup", AMOUNT, 0.0, "mixup alpha; 0: off"),
    ("--cutmix", AMOUNT, 0.0, "cutmix alpha; 0: off"),
    ("--cutmix_minmax", CHANCE, None,
     "smallest and largest cutmix side, enables cutmix; default: by --cutmix", "+"),
    ("--mixup_prob", CHANCE, 1.0, "probability of mixing a batch"),
    ("--mixup_switch_prob", CHANCE, 0.5, "probability of cutmix when mixup is on as well"),
    ("--mixup_mode", ("batch", "pair", "elem"), "batch", "images that share a mixing ratio"),
    ("--mixup_off_epoch", FROM_0, 0, "epoch, from 0, from which images are not mixed; 0: never"),
)
FLAGS["loss"] = (
    ("--loss", TEXT, None,
     "ce, focal(gamma=2), 0.5*bce + zlpr ...: names of docs/losses-and-metrics.md, torch.nn's, or "
     "package.module:name; or one for each of --heads: 'main=ce, aux=0.4*ce'; default: by --task: "
     "ce, bce (multi_label) or l2 (regression)"),
    ("--class_weights", TEXT, "none",
     "none, inverse, effective(beta=0.9999) or [w1,w2,...]: weights of the classes in the loss"),
)
FLAGS["optimizer and schedule"] = (
    ("--blr", AMOUNT, 5e-4, "peak learning rate per 256 images of an optimizer step"),
    ("--min_lr", AMOUNT, 1e-6, "final learning rate, reached by cosine decay"),
    ("--warmup_epochs", AMOUNT, None,
     "epochs of linear warm-up; default: epochs / 5, at most 40 (pre-training) or 20"),
    ("--warmup_steps", FROM_MINUS_1, -1, "warm-up in optimizer steps; -1: --warmup_epochs"),
    ("--start_epoch", FROM_0, 0, "epochs that count as done; a resumed checkpoint has its own"),
    ("--update_freq", COUNT, None, "gradient accumulation steps; default: by --effective_batch"),
    ("--effective_batch", COUNT, None, "images per optimizer step; default: by --update_freq"),
    ("--sched", TEXT, None,
     "learning rate as a factor of its peak, such as 'linear(0,1)[0.1] + cosine(1,0)[0.9]'; "
     "default: warm-up, then cosine to --min_lr"),
    ("--sched_options", TEXT, None,
     "schedules of other options of the optimizer, such as 'weight_decay=cosine(0.05,0.5)'", "+"),
    ("--opt", NAME, "adamw", "optimizer in timm, perhaps with arguments: 'rmsprop(alpha=0.99)'"),
    ("--opt_eps", POSITIVE, None, "optimizer epsilon; default: the optimizer's own"),
    ("--opt_betas", BELOW_1, None,
     "optimizer betas; default: the optimizer's own; 0.9 0.95 for adamw in pre-training", "+"),
    ("--momentum", BELOW_1, 0.9, "momentum of optimizers such as sgd"),
    ("--weight_decay", AMOUNT, 0.05,
     "weight decay of matrices; biases, norms, GRN and layer scale have none"),
    ("--weight_decay_end", AMOUNT, None, "final weight decay, by cosine; default: constant"),
    ("--no_weight_decay", TEXT, None,
     "parameters without weight decay: bias, norm, batchnorm, none, or patterns of names; "
     "default: biases, norms, GRN and tokens", "+"),
    ("--param_group", TEXT, None,
     "options of some parameters, such as 'head:lr=10,weight_decay=0'; lr is a factor", "+"),
    ("--freeze", TEXT, None,
     "parameters to freeze by epoch: 'stages.0:0-5' in the first 5, 'stages.0:5-' afterwards", "+"),
    ("--clip_grad", POSITIVE, None, "largest gradient norm, or see --clip_mode; default: none"),
    ("--clip_mode", ("norm", "value", "agc"), "norm",
     "what --clip_grad limits: the norm, each value, or by unit the norm over the weights'"),
)
FLAGS["pretrained weights and head"] = (
    ("--pretrained", BOOL, False, "weights that timm or torchvision publishes for its --model"),
    ("--freeze_backbone", BOOL, False, "train the classifier only, the rest in evaluation mode"),
    ("--linear_probe", BOOL, False, "train several linear heads on frozen features, as in MAE"),
    ("--linear_probe_blr", POSITIVE, None,
     "their peak learning rates per 256 images of an optimizer step; default: by --opt", "+"),
    ("--model_key", NAME, MODEL_KEY, "keys of the weights in the checkpoint, tried in order"),
    ("--use_ema", BOOL, False, "use the checkpoint's EMA weights"),
    ("--model_prefix", TEXT, "", "prefix to strip from names of weights; others are ignored"),
    ("--head", TEXT, "",
     "head in place of the model's classifier: linear, mlp(hidden=512), conv, norm_linear, "
     "vit_tanh, identity, or package.module:name; default: the model's own"),
    ("--heads", TEXT, "",
     "heads on blocks, such as 'main=linear@norm, aux=conv@stages.2'; the first is evaluated"),
    ("--reset_head", BOOL, False, "start with new heads, also where those of the weights fit"),
    ("--head_init_scale", AMOUNT, None,
     "scale of a new head's weights; default: 0.001 with --finetune or --pretrained, otherwise 1"),
    ("--nb_classes", COUNT, None, "number of classes; default: as many as the data has"),
    ("--layer_decay", FRACTION, 1.0, "learning rate of a layer over that of the next; 1: equal"),
    ("--layer_decay_type", ("single", "group"), "single", "a layer: one block, or a group of 3"),
)
FLAGS["evaluation and EMA"] = (
    ("--eval", BOOL, False, "only evaluate --resume, --finetune or the best in --output_dir"),
    ("--disable_eval", BOOL, False, "train without evaluation"),
    ("--eval_freq", POSITIVE, 1.0,
     "epochs between evaluations, also a fraction: 0.25 is four times an epoch"),
    ("--patience", COUNT, None,
     "evaluations in a row without a better --best_metric after which training stops"),
    ("--min_delta", AMOUNT, 0.0, "smallest change of --best_metric that counts for --patience"),
    ("--precise_bn", COUNT, None,
     "training images to recompute BatchNorm statistics from before each evaluation and at the "
     "end of each epoch; default: moving averages"),
    ("--dist_eval", BOOL, True, "split the evaluation over all processes"),
    ("--val_split", BELOW_1, 0.0,
     "fraction of the training images to hold out for evaluation; 0: the data has its own"),
    ("--eval_data_path", PATH, None,
     "folder or table of the evaluation data, or several: real=PATH,sketch=PATH; default: by "
     "--data_set"),
    ("--eval_classes", ("all", "data"), "all",
     "with --eval: answers may be all classes, or only those that the data has"),
    ("--tta", ("none", "hflip", "vflip", "rot90", "five_crop"), None,
     "test-time augmentation: views of each image to average outputs over: hflip, vflip, rot90, "
     "five_crop and their combinations; N views take N times as long; default: none", "+"),
    ("--metrics", NAME, None,
     "metrics such as acc1, f1, \"precision(k=5)\", or package.module:function; default: by "
     "--task: acc1 acc5, map f1 exact_match, or rmse mae r2", "+"),
    ("--best_metric", NAME, None,
     "metric of checkpoint-best.pth, or loss; default: the first of those by --task"),
    ("--model_ema", BOOL, False, "keep an exponential moving average (EMA) of the weights"),
    ("--model_ema_decay", BELOW_1, 0.9999, "EMA decay per optimizer step"),
    ("--model_ema_force_cpu", BOOL, False, "keep the EMA weights in CPU memory"),
    ("--model_ema_eval", BOOL, False, "evaluate the EMA weights as well"),
)
FLAGS["precision, speed and reproducibility"] = (
    ("--amp", ("bf16", "fp16", "none"), None, "mixed precision; default: bf16 on CUDA, or none"),
    ("--use_amp", BOOL, None, "mixed precision on any device; false: none; default: by --amp"),
    ("--kernels", KERNELS, "auto", "kernel implementation; auto: the fastest here, measured once"),
    ("--compile", BOOL, False, "use torch.compile: a slow first step, faster ones afterwards"),
    ("--cuda_graphs", BOOL, False, "replay the training step as CUDA graphs; for small models"),
    ("--grad_checkpointing", BOOL, False, "recompute blocks in backward: less memory, slower"),
    ("--seed", FROM_0, 0, "random seed"),
    ("--deterministic", BOOL, False, "reproduce runs bit for bit on this machine; slower"),
)
FLAGS["NaN and loss spikes"] = (
    ("--on_spike", ("skip", "rollback"), "skip",
     "response to a step with NaN, Inf or a loss spike: skip it, or also restore a snapshot"),
    ("--spike_factor", AMOUNT, 0.0, "loss spike threshold over the recent mean loss; 0: off"),
    ("--snapshot_freq", COUNT, None, "optimizer steps between snapshots in memory; default: 100"),
    ("--max_bad_steps", FROM_0, 10, "consecutive bad steps or rollbacks that the run survives"),
)
FLAGS["checkpoints and logs"] = (
    ("--log_dir", OUT, None, "TensorBoard folder, or none; default: OUTPUT_DIR/tensorboard"),
    ("--print_freq", COUNT, 20, "optimizer steps between log lines"),
    ("--hook", REPEATED, None,
     "csv, histograms(every=5), predictions ...: names of docs/hooks.md, or package.module:MyHook; "
     "may be given several times", "+"),
    ("--profile", BOOL, False,
     "trace some optimizer steps for ui.perfetto.dev and list the most expensive operations; as "
     "--hook profiler, which takes arguments"),
    ("--tracker", TEXT, None,
     "experiment tracker: wandb, trackio or package.module:function, perhaps with arguments of its "
     "init, such as 'wandb(mode=offline)'; default: none"),
    ("--project", NAME, PROJECT, "project of --tracker"),
    ("--tags", TEXT, None, "tags of the run in --tracker; default: none", "+"),
    ("--progress", ("auto", "bar", "lines"), "auto", "progress display; auto: a bar on a terminal"),
    ("--report", BOOL, True, "write report.html into --output_dir: curves, images, notes, flags"),
    ("--auto_resume", BOOL, True, "continue from the newest checkpoint in --output_dir"),
    ("--sha256", TEXT, "", "expected SHA-256 of the checkpoint, 64 hexadecimal digits"),
    ("--save_ckpt", BOOL, True, "write checkpoints"),
    ("--save_ckpt_freq", COUNT, 1, "epochs between checkpoints"),
    ("--save_ckpt_num", COUNT, 3, "number of newest checkpoints to keep"),
    ("--save_ckpt_every_steps", COUNT, None, "optimizer steps between saves within an epoch"),
    ("--save_ckpt_every_minutes", POSITIVE, None, "minutes between saves within an epoch"),
    ("--max_minutes", POSITIVE, None, "minutes until the run saves and exits with code 75"),
    ("--async_save", BOOL, False, "write checkpoints in the background, from a copy"),
    ("--max_save_failures", FROM_0, 5, "consecutive failed saves that the run survives"),
)
FLAGS["distributed training"] = (
    ("--shard", ("ddp", "zero1", "fsdp"), "ddp",
     "ddp: replicate all; zero1: shard optimizer state; fsdp: shard weights and gradients too"),
    ("--grad_compression", ("none", "bf16"), "none", "data type for sending gradients"),
    ("--sync_bn", BOOL, False, "compute BatchNorm statistics over all GPUs"),
    ("--sync_bn_group", FROM_0, 0, "neighboring processes that share statistics; 0: all"),
    ("--world_size", COUNT, 1, "expected number of processes; 1: any"),
    ("--local_rank --local-rank", FROM_MINUS_1, -1, "rank on the node, set by launchers"),
    ("--dist_on_itp", BOOL, False, "read ranks set by Open MPI's mpirun"),
    ("--dist_url", TEXT, "env://", "rendezvous address of the processes"),
)
FLAGS[JOB] = (
    ("--cluster", ("slurm", "local", "debug"), "slurm", "SLURM, this machine or this process"),
    ("--nodes", COUNT, None, "nodes; default: 2 on SLURM, otherwise 1"),
    ("--ngpus", FROM_0, None, "GPUs per node; 0: CPUs only; default: 8 on SLURM, otherwise 1"),
    ("--tasks_per_node", COUNT, None, "processes per node; default: one per GPU, at least 1"),
    ("--cpus_per_task", COUNT, 10, "CPU cores per process, for its --num_workers too"),
    ("--mem_gb", POSITIVE, None, "memory per node in GB; default: the cluster's"),
    ("--timeout", COUNT, 4320, "time limit in minutes; the job saves and is requeued"),
    ("--signal_delay", COUNT, 120, "seconds before the time limit at which the job saves"),
    ("--job_dir", OUT, "./runs/%j", "shared folder of the job; %%j: job number"),
    ("--partition", NAME, "", "SLURM partition; default: the cluster's"),
    ("--account", NAME, "", "SLURM account; default: the cluster's"),
    ("--qos", NAME, "", "SLURM quality of service; default: the cluster's"),
    ("--constraint", TEXT, "", "required node features, in sbatch's syntax"),
    ("--use_volta32", BOOL, False, "request V100 GPUs with 32 GB (--constraint volta32gb)"),
    ("--exclude", TEXT, "", "nodes to avoid, in sbatch's syntax"),
    ("--gres", TEXT, "", "generic resources in sbatch's syntax; gpu:TYPE:N replaces --ngpus"),
    ("--dependency", TEXT, "", "jobs to wait for in sbatch's syntax, such as afterok:123"),
    ("--comment", TEXT, "", "comment for the scheduler"),
    ("--array", TEXT, "", "recipes separated by commas, each a job with its own folder"),
    ("--follow", BOOL, False, "print rank 0's log until the job ends; exit code 1 on failure"),
)
# fmt: on


def default_of(name: str) -> Any:
    """Return the default of a flag, before that of a script."""
    return _row(name)[2]


def allowed(name: str) -> tuple[Callable[[Any], bool], str]:
    """Return a test for the numbers that a flag takes, and their range in words, '' for any."""
    kind = _row(name)[1]
    if isinstance(kind, tuple):
        return kind.__contains__, f"of {', '.join(map(str, kind))}"
    convert = kind.get("type")
    return getattr(convert, "holds", lambda value: True), getattr(convert, "range", "")


def _row(name: str) -> tuple:
    return next(row for rows in FLAGS.values() for row in rows if row[0] == f"--{name}")
