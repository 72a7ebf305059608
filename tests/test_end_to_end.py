# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The scripts, run as processes the way people run them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from data_loading.transforms import create_eval_transform, mean_and_std
from tests import tiny
from tests.groups import exit_codes, start_script
from training.report import SPEED
from weights.files import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# A run of seconds: 26 images of 16 x 16 pixels, 4 patches, 2 epochs of 4 or 3 updates.
SMALL = [
    *["--input_size", "16", "--stem_stride", "1", "--batch_size", "6", "--epochs", "2"],
    *["--lr", "0.01", "--num_workers", "0", "--device", "cpu", "--print_freq", "2"],
]
COLORS = ["--data_set", "tests.tiny:colors"]
PRETRAIN = ["--model", "tests.tiny:fcmae", *COLORS, *SMALL, "--decoder_embed_dim", "8"]
FINETUNE = ["--model", "tests.tiny:classifier", *COLORS, *SMALL, "--aa", "none"]


def run(
    script: str,
    *words: object,
    expect: int = 0,
    torchrun: int = 0,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    cwd: Path = ROOT,
    folder: bool = False,
) -> subprocess.CompletedProcess:
    """Run a script; returns the finished process, with the output of all of its `ranks`.

    torchrun: number of processes, started by torchrun; fresh: in a new Python. Without them the
    script runs in forks of a process that has imported everything, which takes 3 s less.
    A training script without a folder gets `--output_dir none`, or with `folder` a new one.
    """
    written = {"--output_dir", "--config", "--eval", "--dry_run"} & set(map(str, words))
    if script.startswith("main_") and not written and not folder:
        words += ("--output_dir", "none")
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    command = [*start, str(ROOT / script), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(ranks)]
        if torchrun or fresh:
            own = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
            with files[0][0].open("w") as out, files[0][1].open("w") as error:
                done = subprocess.run(
                    command, cwd=cwd, env=own, stdout=out, stderr=error, timeout=300, check=False
                )
            codes = [done.returncode]
        else:
            codes = exit_codes(start_script(script, words, files, env, cwd), 300)
        out, error = ("".join(map(Path.read_text, kind)) for kind in zip(*files, strict=True))
    assert codes == [expect] * ranks, f"exit {codes}\n{out}\n{error}"
    return subprocess.CompletedProcess(command, expect, out, error)


def weights(path: Path, key: str = "model") -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)[key]


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def log(folder: Path) -> list[dict]:
    """Lines of log.txt, without what two equal runs do not share."""
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in SPEED} for line in lines]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    words = [*PRETRAIN, "--output_dir", folder, "--drop_path", "0.1"]
    run("main_pretrain.py", *words, fresh=True)
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, pretrained) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    run(
        *["main_finetune.py", *FINETUNE, "--finetune", pretrained, "--output_dir", folder],
        *["--epochs", 4, "--model_ema", "--model_ema_eval", "--drop_path", "0.2"],
        *["--mixup", 0.8, "--cutmix", "1.0", "--reprob", "0.5", "--update_freq", 3],
        fresh=True,
    )
    return folder


def test_pretraining_leaves_everything_it_promises(pretrained):
    assert [entry["epoch"] for entry in log(pretrained)] == [0, 1]
    assert log(pretrained)[1]["train_loss"] < log(pretrained)[0]["train_loss"]
    names = {path.name for path in pretrained.iterdir()}
    assert names >= {"checkpoint-0.pth", "checkpoint-1.pth", "args.yaml", "log.txt", "report.html"}
    assert list((pretrained / "tensorboard").glob("events.*"))
    picture = np.asarray(Image.open(pretrained / "reconstructions" / "epoch-1.png"))
    assert picture.ndim == 3
    assert picture.std() > 10


def test_finetuning_leaves_everything_it_promises(finetuned):
    entries = log(finetuned)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3]
    assert {"train_loss", "test_acc1", "test_acc5_ema", "n_parameters"} <= entries[0].keys()
    names = {path.name for path in finetuned.iterdir()}
    assert names >= {"checkpoint-3.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"}
    assert "checkpoint-0.pth" not in names  # three are kept
    best = torch.load(finetuned / "checkpoint-best.pth", weights_only=True)["state"]["best"]["best"]
    assert best == max(entry["test_acc1"] for entry in entries)


def test_evaluation_of_a_checkpoint_is_that_of_the_run(finetuned):
    done = run("main_finetune.py", *FINETUNE, "--eval", "--resume", finetuned / "checkpoint-3.pth")
    entry = log(finetuned)[3]
    assert f"checkpoint-3.pth: top-1 {entry['test_acc1']:.2f}%" in done.stdout
    assert f"loss {entry['test_loss']:.4f} on 7 images" in done.stdout


@pytest.mark.slow
def test_evaluation_on_two_processes_counts_every_image_once(finetuned):
    words = [*FINETUNE, "--eval", "true", "--resume", finetuned / "checkpoint-3.pth"]
    words += ["--model_ema", "true"]
    alone, two = run("main_finetune.py", *words), run("main_finetune.py", *words, torchrun=2)
    said = re.compile(r"top-1 .* on 7 images")
    assert len(said.findall(alone.stdout)) == 2  # the weights and the EMA weights
    assert said.findall(alone.stdout) == said.findall(two.stdout)
    unshared = run("main_finetune.py", *words, "--dist_eval", "false", ranks=2)
    assert said.findall(alone.stdout) == said.findall(unshared.stdout)


@pytest.mark.slow
def test_checkpoint_is_evaluated_and_tuned_at_other_sizes(finetuned, tmp_path):
    """No table of positions, so 16 pixels, 40 x 24, 33 and 384 are all the same network."""
    path = finetuned / "checkpoint-3.pth"
    for size in ((40, 24), (33,), (384,)):  # squashed up to 32 and from 384, cropped between
        flags = ["--input_size", *size, "--eval", "--resume", path]
        said = run("main_finetune.py", *FINETUNE, *flags).stdout
        (loss,) = re.findall(r"top-1 .* loss ([\d.]+) on 7 images", said)
        assert float(loss) == pytest.approx(loss_at(path, size), abs=1e-4)

    words = [*FINETUNE, "--finetune", path, "--epochs", 4, "--output_dir", tmp_path]
    done = run("main_finetune.py", *words, "--input_size", 40, 24)
    assert "loaded 60 tensors" in done.stdout  # all: the head too
    assert log(tmp_path)[-1]["test_loss"] < loss_at(path, (40, 24))


def loss_at(path: Path, size: tuple[int, ...]) -> float:
    """Of the images that `tests.tiny:colors` evaluates, at another size."""
    model = tiny.classifier(stem_stride=1, num_classes=tiny.CLASSES).eval()
    model.load_state_dict(weights(path))
    resize = create_eval_transform(size * 2 if len(size) == 1 else size)
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in mean_and_std())
    data = tiny.colors("", False)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    batch = torch.stack([resize(image) for image in images])
    with torch.no_grad():
        logits = model((batch / 255 - mean) / std)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()


def test_visualize_draws_a_checkpoint(pretrained, tmp_path):
    words = ["--checkpoint", pretrained, "--output", tmp_path / "a.png", "--device", "cpu"]
    run("visualize.py", *words, "--model", "tests.tiny:fcmae", *COLORS)
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_interrupted_run_ends_like_the_one_that_was_not(script, tmp_path):
    """Best metric, average, schedule, order of images, masks and dropped paths all go on."""
    words = [*(PRETRAIN if "pretrain" in script else FINETUNE), "--drop_path", "0.2"]
    words += ["--epochs", 4, "--save_ckpt_num", 9, "--output_dir", tmp_path]
    if "finetune" in script:
        words += ["--model_ema", "--model_ema_eval", "--mixup", "0.8", "--weight_decay_end", "0.2"]
    run(script, *words)
    whole = torch.load(tmp_path / "checkpoint-3.pth", weights_only=True)
    entries = log(tmp_path)
    for name in ("checkpoint-2.pth", "checkpoint-3.pth", "checkpoint-best.pth"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "checkpoint-1.pth").rename(tmp_path / "kept")
    newest = (tmp_path / "kept").read_bytes()
    (tmp_path / "checkpoint-1.pth").write_bytes(newest)
    (tmp_path / "checkpoint-2.pth").write_bytes(newest[: len(newest) // 2])  # cut off by a crash
    done = run(script, *words)
    assert "continuing from " in done.stdout + done.stderr
    again = torch.load(tmp_path / "checkpoint-3.pth", weights_only=True)
    assert_same(again["model"], whole["model"])
    if whole["model_ema"]:
        assert_same(again["model_ema"], whole["model_ema"])
    assert repr(again["state"]) == repr(whole["state"])  # NaN is not equal to itself
    for ours, theirs in zip(
        again["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True
    ):
        assert_same(ours, theirs)
    assert log(tmp_path) == entries


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_number_of_workers_changes_nothing(script, tmp_path):
    words = [*(PRETRAIN if "pretrain" in script else FINETUNE), "--scale", "0.3", "1"]
    words += [] if "pretrain" in script else ["--reprob", "0.5"]
    for workers in (0, 2):
        run(script, *words, "--num_workers", workers, "--output_dir", tmp_path / str(workers))
    name = "checkpoint-1.pth"
    assert_same(weights(tmp_path / "0" / name), weights(tmp_path / "2" / name))


@pytest.mark.parametrize(
    "words",
    [
        "--amp bf16",
        "--amp fp16 --clip_grad 1",
        "--opt lamb --use_amp true",
        pytest.param("--compile true --disable_eval true --epochs 1", marks=pytest.mark.slow),
    ],
)
def test_precisions_optimizers_and_compile_train(words, pretrained, tmp_path):
    if "--compile" in words and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    extra = [*words.split(), "--output_dir", tmp_path, "--finetune", pretrained]
    run("main_finetune.py", *FINETUNE, *extra)
    entries = log(tmp_path)
    assert np.isfinite([entry["train_loss"] for entry in entries]).all()


def test_a_poisoned_image_costs_its_update_and_not_the_run(tmp_path):
    words = [*FINETUNE, "--data_set", "tests.tiny:poisoned", "--output_dir", tmp_path]
    done = run("main_finetune.py", *words)
    assert "skipped 1 step" in done.stdout + done.stderr
    state = torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["state"]
    assert state["bad_steps"] == 2  # once an epoch
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "checkpoint-1.pth").values())
    run("main_finetune.py", *words, "--max_bad_steps", 0, "--output_dir", "", expect=1)


def test_empty_output_dir_saves_and_resumes_nothing(tmp_path):
    """The official code looked for checkpoints in the current directory."""
    bait = tmp_path / "checkpoint-7.pth"
    bait.write_bytes(b"not to be read")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("main_pretrain.py", *PRETRAIN, cwd=tmp_path)
    assert "nothing saved" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_args_yaml_repeats_a_run(pretrained, tmp_path):
    run("main_pretrain.py", "--config", pretrained / "args.yaml", "--output_dir", tmp_path)
    assert_same(weights(tmp_path / "checkpoint-1.pth"), weights(pretrained / "checkpoint-1.pth"))


@pytest.mark.slow
def test_head_that_fits_is_kept_and_another_is_new(finetuned, tmp_path):
    best = finetuned / "checkpoint-best.pth"
    words = [*FINETUNE, "--finetune", best, "--lr", 0, "--min_lr", 0, "--weight_decay", 0]
    run("main_finetune.py", *words, "--output_dir", tmp_path)
    assert_same(weights(tmp_path / "checkpoint-1.pth"), weights(best))
    digits = ["--data_set", "DIGITS", "--batch_size", 700, "--epochs", 1]
    done = run("main_finetune.py", *words, *digits, "--aa", "none")
    assert "has 3 classes (red, green, blue), so the model gets a new head" in done.stdout


def test_evaluation_takes_the_averaged_weights_when_asked_for(finetuned):
    newest = finetuned / "checkpoint-3.pth"
    done = run("main_finetune.py", *FINETUNE, "--eval", "--resume", newest, "--use_ema")
    entry = log(finetuned)[3]
    assert f"top-1 {entry['test_acc1_ema']:.2f}%" in done.stdout
    assert f"loss {entry['test_loss_ema']:.4f}" in done.stdout
    assert f"loss {entry['test_loss']:.4f}" not in done.stdout


@pytest.mark.slow
def test_published_weights_start_pretraining_and_finetuning(pretrained, finetuned, tmp_path):
    """In timm's names, by --resume as the official README evaluates, and by --finetune."""
    from weights.convert import to_convnextv2, to_timm

    encoder, _ = to_convnextv2(weights(pretrained / "checkpoint-1.pth"))
    torch.save(to_timm(encoder), tmp_path / "encoder.bin")
    frozen = ["--lr", 0, "--min_lr", 0, "--weight_decay", 0, "--epochs", 1]
    words = [
        *PRETRAIN,
        *frozen,
        "--resume",
        tmp_path / "encoder.bin",
        "--output_dir",
        tmp_path / "a",
    ]
    done = run("main_pretrain.py", *words)
    assert "timm layout" in done.stdout
    kept = weights(tmp_path / "a" / "checkpoint-0.pth")
    assert all(torch.equal(kept[f"encoder.{name}"], value) for name, value in encoder.items())
    state = weights(finetuned / "checkpoint-3.pth")
    save_file(to_timm(state), tmp_path / "whole.safetensors")
    words = [*FINETUNE, "--eval", "--resume", tmp_path / "whole.safetensors"]
    assert f"loss {log(finetuned)[3]['test_loss']:.4f}" in run("main_finetune.py", *words).stdout
    words = [*FINETUNE, *frozen, "--finetune", tmp_path / "whole.safetensors"]
    run("main_finetune.py", *words, "--output_dir", tmp_path / "b")
    assert_same(weights(tmp_path / "b" / "checkpoint-0.pth"), state)


@pytest.mark.slow
@pytest.mark.parametrize(("cluster", "ranks"), [("local", 2), ("debug", 1)])
def test_submitit_runs_the_main(cluster, ranks, tmp_path):
    words = [*PRETRAIN, "--cluster", cluster, "--job_dir", tmp_path / "%j", "--nodes", 1]
    done = run("submitit_pretrain.py", *words, "--ngpus", ranks, "--batch_size", 3)
    number = re.search(r"job (\w+);", done.stdout)[1]
    newest = tmp_path / number / "checkpoint-1.pth"
    deadline = time.monotonic() + 100
    while not newest.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert torch.load(newest, weights_only=True)["state"]["epoch"] == 2
    assert [entry["epoch"] for entry in log(tmp_path / number)] == [0, 1]
    assert "ngpus" not in (tmp_path / number / "args.yaml").read_text()  # --config takes it back


# --- a checkpoint and its data ------------------------------------------------------------


@pytest.fixture(scope="module")
def insects(tmp_path_factory) -> Path:
    """Class folders: 12 images to train and 9 to evaluate, of three colors."""
    root = tmp_path_factory.mktemp("insects")
    for split, data in {"train": tiny.Colors(12), "val": tiny.Colors(9)}.items():
        for index in range(len(data)):
            image, label = data[index]
            folder = root / split / ("ant", "bee", "cat")[label]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{index}.png")
    ant, bee = root / "val" / "ant" / "0.png", root / "val" / "bee" / "1.png"
    ant.rename(bee.with_name("0.png"))  # two wrong labels, so that not all answers are right
    bee.rename(ant.with_name("1.png"))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, insects) -> Path:
    """A run on them, with a normalization and a size of its own, as a relative path."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--model", "tests.tiny:classifier", *SMALL, "--aa", "none", "--lr", 0.02]
    words += ["--input_size", 20, 24, "--imagenet_default_mean_and_std", "false"]
    words += ["--data_path", insects.name, "--output_dir", folder, "--epochs", 3]
    run("main_finetune.py", *words, cwd=insects.parent)
    return folder


MODEL = ["--model", "tests.tiny:classifier", "--num_workers", 0, "--device", "cpu"]


def result(*words: object, **how: object) -> tuple[str, float, float, int]:
    """Source, top-1, loss and number of images that an evaluation reports."""
    said = run("main_finetune.py", *MODEL, "--eval", *words, **how).stdout
    found = re.search(r"(\S+): top-1 ([\d.]+)%.* loss ([\d.]+) on (\d+) images", said)
    return found[1], float(found[2]), float(found[3]), int(found[4])


@pytest.mark.slow
def test_evaluation_repeats_the_runs_own_without_its_flags(trained, insects):
    """With another normalization 100% became 45%, and nothing was said."""
    entries = log(trained)
    best = max(entries, key=lambda entry: entry["test_acc1"])
    expected = (
        str(trained / "checkpoint-best.pth"),
        pytest.approx(best["test_acc1"], abs=0.005),
        pytest.approx(best["test_loss"], abs=6e-5),
        9,
    )
    assert 40 < best["test_acc1"] < 100
    assert result("--resume", trained, "--data_path", insects) == expected
    # from another folder, though the run was given a relative path
    assert result("--config", trained / "args.yaml") == expected
    assert result("--output_dir", trained, "--finetune", "x", "--data_path", insects) == expected


@pytest.mark.slow
def test_training_command_with_eval_evaluates_what_it_trained(trained, insects, tmp_path):
    """Not the weights that it started from, also after the run was moved to another place."""
    words = ["--finetune", "x.pth", "--data_path", insects, "--auto_resume", "false"]
    assert result(*words, "--output_dir", trained)[0] == str(trained / "checkpoint-best.pth")
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    text = (moved / "args.yaml").read_text()
    text = text.replace(str(trained), "/nowhere/run").replace("finetune: ''", "finetune: x.pth")
    assert "finetune: x.pth" in text
    (moved / "args.yaml").write_text(text)
    assert result("--config", moved / "args.yaml")[0] == str(moved / "checkpoint-best.pth")
    shutil.copytree(trained, tmp_path / "first")  # and where another run has its old place
    text = text.replace("/nowhere/run", str(tmp_path / "first"))
    (moved / "args.yaml").write_text(text)
    assert result("--config", moved / "args.yaml")[0] == str(moved / "checkpoint-best.pth")
    flags = ["--config", moved / "args.yaml", "--output_dir", trained]
    assert result(*flags)[0] == str(trained / "checkpoint-best.pth")
    (tmp_path / "empty").mkdir()
    words = ["--eval", "--output_dir", tmp_path / "empty", "--finetune", trained]
    done = run("main_finetune.py", *MODEL, *words, "--data_path", insects)
    assert f"empty holds no checkpoint: --finetune {trained} is evaluated" in done.stdout


@pytest.mark.slow
def test_exported_files_keep_class_names_and_normalization(insects, tmp_path):
    """Without them the labels of another folder, and another mean, were used silently."""
    words = ["--model", "convnextv2_atto", *SMALL, "--aa", "none", "--epochs", 1]
    words += ["--mean", 0.3, "--std", 0.2, "--data_path", insects, "--output_dir", tmp_path / "run"]
    run("main_finetune.py", *words)
    flags = ["--eval", "--num_workers", 0, "--device", "cpu", "--data_path", insects]
    said = re.compile(r"top-1 .* images")
    (expected,) = said.findall(run("main_finetune.py", *flags, "--resume", tmp_path / "run").stdout)
    for target, name in {"hf": "hf", "timm": "a.safetensors", "official": "a.pth"}.items():
        run("export.py", tmp_path / "run", "--to", target, "--output", tmp_path / name)
        found = run("main_finetune.py", *flags, "--resume", tmp_path / name).stdout
        assert said.findall(found) == [expected], target
        content = read_checkpoint(tmp_path / name)
        assert content["classes"] == ["ant", "bee", "cat"]


@pytest.mark.slow
def test_labels_are_found_by_name(trained, insects, tmp_path):
    """Each class alone, and under numbers: the right answers add up to those of all."""
    _, top1, _, count = result("--resume", trained, "--data_path", insects)
    for names in (("ant", "bee", "cat"), ("0", "1", "2")):
        right = 0.0
        for name, number in zip(("ant", "bee", "cat"), names, strict=True):
            val = tmp_path / number / "val"
            shutil.copytree(insects / "val" / name, val / number)
            (val / ("bee" if name == "ant" else "ant")).mkdir()  # no images: as if it were absent
            flags = ["--resume", trained, "--data_path", tmp_path / number]
            _, alone, _, images = result(*flags)
            assert images == 3
            right += alone * images / 100
            shutil.rmtree(val)
        assert right == pytest.approx(top1 * count / 100, abs=0.01)


def test_renamed_classes_are_refused_by_evaluation_and_resume(trained, insects, tmp_path):
    """Labels moved by one when `ant` was called `zant`: 100% became 0%."""
    shutil.copytree(insects, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "zant")
    words = ["--data_path", tmp_path / "data"]
    refused = "{} has classes that {} does not know: zant; "
    done = run("main_finetune.py", *MODEL, "--eval", "--resume", trained, *words, expect=2)
    assert refused.format("val", trained / "checkpoint-best.pth") in done.stderr
    shutil.copytree(trained, tmp_path / "run")
    words += ["--config", trained / "args.yaml", "--epochs", 4]
    words += ["--output_dir", tmp_path / "run"]
    done = run("main_finetune.py", *words, expect=2)
    assert refused.format("train", tmp_path / "run" / "checkpoint-2.pth") in done.stderr
    words[-1] = tmp_path / "new"
    done = run("main_finetune.py", *words, "--finetune", trained)
    assert "its head has 3 classes (ant, bee, cat), so the model gets a new head" in done.stdout
    assert weights_of_classes(tmp_path / "new") == ["bee", "cat", "zant"]


def weights_of_classes(folder: Path) -> list[str]:
    return torch.load(folder / "checkpoint-3.pth", weights_only=True)["classes"]


# --- bad input: one line, exit code 2, before any training -------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Image folders with one fault each, and an ImageNet-like one without."""
    root = tmp_path_factory.mktemp("images")
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    for split, names in {"train": "abc", "val": "abd"}.items():
        for name in names:
            (root / "differ" / split / name).mkdir(parents=True)
            picture.save(root / "differ" / split / name / "1.png")
    for i in range(12):
        (root / "broken").mkdir(exist_ok=True)
        picture.save(root / "broken" / f"{i}.png")
    (root / "broken" / "5.png").write_bytes(b"no picture")
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, root / "resnet.pth")
    return root


BAD = {  # name -> script, flags, what the line must name
    "no workers": ("finetune", "--data_timeout 9", "--data_timeout needs --num_workers"),
    "on bad image": ("pretrain", "--on_bad_image skp", "skip"),
    "wrong path": ("pretrain", "--data_set IMNET --data_path {0}/nowhere", "nowhere"),
    "no train folder": ("pretrain", "--data_set IMNET --data_path {0}/empty", "--data_set folder"),
    "empty folder": ("pretrain", "--data_set folder --data_path {0}/empty", "empty"),
    "unreadable image": ("pretrain", "--data_set folder --data_path {0}/broken", "5.png"),
    "class maps": ("finetune", "--data_set IMNET --data_path {0}/differ", "does not know: d"),
    "class count": ("finetune", "--nb_classes 7", "--nb_classes 7"),
    "patches": ("pretrain", "--input_size 20", "--input_size 20"),
    "mask ratio": ("pretrain", "--mask_ratio 0.9", "--mask_ratio 0.9"),
    "large batch": ("pretrain", "--batch_size 27", "--batch_size 26"),
    "odd batch": ("finetune", "--mixup 1 --batch_size 5", "--batch_size 5"),
    "model": ("pretrain", "--model convnextv2_tiy", "convnextv2_tiny"),
    "data set": ("finetune", "--data_set CIFAR11 --data_path {0}", "CIFAR10"),
    "optimizer": ("finetune", "--opt adamv", "adam"),
    "flag": ("finetune", "--warmup_epoch 3", "--warmup_epochs"),
    "other network": ("finetune", "--finetune {0}/resnet.pth", "conv1.weight"),
    "other size": ("finetune", "--stem_stride 2 --finetune {1}", "--stem_stride 2 is given ("),
    "no weights": ("finetune", "--eval", "--resume"),
    "no checkpoint": ("finetune", "--eval --resume {0}/nothing.pth", "nothing.pth"),
    "resume other": ("pretrain", "--resume {0}/resnet.pth", "conv1.weight"),
    "text as weights": ("finetune", "--eval --resume {0}/file", "begins with b'a file'"),
    "other hash": ("finetune", f"--finetune {{1}} --sha256 {'0' * 64}", "has SHA-256"),
    "hash of what": ("finetune", f"--sha256 {'0' * 64}", "either --resume or --finetune"),
    "two starts": ("finetune", "--finetune {1} --resume {1}", "--finetune cannot be combined"),
    "average of what": ("finetune", "--use_ema", "--finetune, --resume or --eval"),
    "hub": ("finetune", "--finetune hf-hub:owner/name", "local cache"),
    "output": ("pretrain", "--output_dir {0}/file", "--output_dir"),
    "device": ("pretrain", "--device warp", "--device warp"),
    "launcher": ("pretrain", "--world_size 2", "torchrun"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_helps(case, folders, finetuned):
    kind, words, named = BAD[case]
    base = PRETRAIN if kind == "pretrain" else FINETUNE
    words = words.format(folders, finetuned / "checkpoint-best.pth").split()
    done = run(f"main_{kind}.py", *base, *words, expect=2)
    said = done.stdout + done.stderr
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert named in errors[0]
    assert "Traceback" not in said
    assert "step 2/" not in said


def test_checkpoint_cannot_choose_what_code_is_run(tmp_path, pretrained):
    """`args` are plain text, and a name in them would be imported and called."""
    checkpoint = torch.load(pretrained / "checkpoint-1.pth", weights_only=True)
    checkpoint["args"] |= {"model": "convnextv2_atto", "data_set": "shutil:rmtree"}
    checkpoint["args"]["data_path"] = str(tmp_path)
    torch.save(checkpoint, tmp_path / "evil.pth")
    done = run("visualize.py", "--checkpoint", tmp_path / "evil.pth", expect=2)
    assert "shutil:rmtree" in done.stderr
    assert (tmp_path / "evil.pth").exists()
