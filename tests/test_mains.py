# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The steps of both training scripts: initial weights, wrapping, dry run, evaluation, logs."""

import argparse
import hashlib
import json
import shutil
import weakref
import zipfile
from pathlib import Path

import pytest
import torch

import main_finetune
import models
from config import parser as options
from data_loading.bad_images import BadImages
from data_loading.samplers import EvalSampler, TrainSampler
from errors import UserError
from optim_factory import build_optimizer
from parallel.sharding import Parallelism
from tests import tiny
from tests.test_flags_act import BASE, MAINS, Built, build
from training import hook_table, setup
from training.checkpoint_manager import CheckpointManager
from training.hooks import Hook, Reporter

SEED_OF = {"model": 1, "model_ema": 2, "other": 3}  # entry of the checkpoint -> its weights


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = tiny.classifier(stem_stride=1, num_classes=tiny.CLASSES)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.fixture
def file(tmp_path) -> Path:
    """A checkpoint of weights alone."""
    content = {key: weights(seed) for key, seed in SEED_OF.items()}
    content["wrapped"] = {f"net.{name}": value for name, value in weights(4).items()}
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def seed_of(model: torch.nn.Module) -> int | None:
    """The number of the `weights` that a model holds."""
    head = model.state_dict()["stages.0.0.pwconv1.weight"]
    same = [n for n in range(5) if torch.equal(head, weights(n)["stages.0.0.pwconv1.weight"])]
    return same[0] if same else None


@pytest.mark.parametrize("flag", ["--finetune", "--resume"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", 1),
        ("--use_ema", 2),
        ("--model_key other|model", 3),
        ("--model_key wrapped --model_prefix net.", 4),
    ],
)
def test_finetuning_starts_from_the_weights_that_flags_name(
    flag, words, expected, file, tmp_path, monkeypatch
):
    built = build("finetune", f"{flag} {file} {words}", tmp_path / "run", monkeypatch)
    assert seed_of(built.inner) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--finetune {}", 1),  # EMA weights of the former run are not those of this one
        ("--resume {}", 2),
        ("--resume {} --use_ema", 2),
        ("--resume {} --model_key wrapped|model --model_prefix net.", 4),
    ],
)
def test_ema_starts_from_the_ema_weights_of_what_is_resumed(
    words, expected, file, tmp_path, monkeypatch
):
    content = torch.load(file, weights_only=True)
    if "wrapped" in words:  # without EMA weights
        torch.save({"wrapped": content["wrapped"]}, file)
    words = f"--model_ema {words.format(file)}"
    built = build("finetune", words, tmp_path / "run", monkeypatch)
    assert seed_of(built.loop.model_ema.module) == expected


def test_prefix_of_ema_weights_is_removed_too(file, tmp_path, monkeypatch):
    content = torch.load(file, weights_only=True)
    wrapped = {f"net.{name}": value for name, value in content["model_ema"].items()}
    torch.save({"model": content["wrapped"], "model_ema": wrapped}, file)
    words = f"--model_ema --resume {file} --model_prefix net."
    built = build("finetune", words, tmp_path / "run", monkeypatch)
    assert (seed_of(built.inner), seed_of(built.loop.model_ema.module)) == (4, 2)


@pytest.mark.parametrize(
    ("script", "flag"),
    [("pretrain", "--resume"), ("finetune", "--resume"), ("finetune", "--finetune")],
)
def test_hash_of_initial_weights_is_checked(script, flag, file, tmp_path, monkeypatch):
    words = f"{flag} {file} --sha256 {'0' * 64}"
    with pytest.raises(UserError, match="has SHA-256"):
        build(script, words, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("script", MAINS)
def test_run_of_the_other_kind_gives_its_weights_alone(script, tmp_path, monkeypatch):
    """Not its epochs, optimizer and schedule."""
    other = next(name for name in MAINS if name != script)
    first = build(other, "", tmp_path / "other", monkeypatch).inner.state_dict()
    words = f"--resume {tmp_path / 'other' / 'checkpoint-1.pth'}"
    built = build(script, words, tmp_path / "run", monkeypatch)
    assert built.epochs == [0, 1]
    name = "stages.0.0.pwconv1.weight"
    ours, theirs = (name, f"encoder.{name}")[:: -1 if script == "pretrain" else 1]
    assert torch.equal(built.inner.state_dict()[ours], first[theirs])


def test_pretraining_starts_from_the_weights_of_a_classifier(file, tmp_path, monkeypatch):
    for words, expected in {
        "": 1, "--model_key other|model": 3, "--model_key wrapped --model_prefix net.": 4,
    }.items():  # fmt: skip
        words, folder = f"--resume {file} {words}", tmp_path / str(expected)
        assert seed_of(build("pretrain", words, folder, monkeypatch).inner.encoder) == expected


def test_layer_decay_of_random_weights_is_a_warning(file, tmp_path, monkeypatch):
    for folder, words, expected in (
        ("a", "", 0),
        ("b", "--layer_decay 0.9", 1),
        ("c", f"--layer_decay 0.9 --finetune {file}", 0),
        ("b", "--layer_decay 0.9 --epochs 3", 0),  # resumed
    ):
        built = build("finetune", words, tmp_path / folder, monkeypatch)
        assert built.text.count("random weights: --layer_decay < 1") == expected
    assert "loaded" not in built.text  # the checkpoint is restored, and not loaded as weights too


@pytest.mark.parametrize("script", MAINS)
def test_random_weights_depend_on_the_seed(script, tmp_path, monkeypatch):
    first, again, other = (
        next(iter(build(script, f"--seed {seed}", tmp_path / name, monkeypatch).inner.parameters()))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("script", MAINS)
def test_compile_compiles_the_network(script, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    build(script, "", tmp_path / "plain", monkeypatch)
    assert compiled == []
    built = build(script, "--compile", tmp_path / "compiled", monkeypatch)
    assert compiled == [built.inner]


@pytest.mark.parametrize("script", MAINS)
def test_graphs_capture_the_shapes_of_a_batch(script, tmp_path, monkeypatch):
    captured = []

    class Graphed(torch.nn.Module):
        def __init__(self, model, *arguments) -> None:
            super().__init__()
            captured.append(arguments)

    monkeypatch.setattr(MAINS[script], "Graphed", Graphed)
    monkeypatch.setattr(setup, "check_graphs", lambda *_: None)  # there is no GPU
    built = build(script, "--cuda_graphs --in_chans 1", tmp_path / "run", monkeypatch)
    assert isinstance(built.model, Graphed)
    shapes = [(6, 1, 16, 16)] if script == "finetune" else [(6, 1, 16, 16), (6, 4)]
    expected = [torch.device("cpu"), "none", shapes] + [1] * (script == "pretrain")
    assert [*captured[0][:2], list(captured[0][2]), *captured[0][3:]] == expected


@pytest.mark.parametrize("script", MAINS)
def test_models_are_sharded_before_the_optimizer_is_built(script, tmp_path, monkeypatch):
    sharded = []
    monkeypatch.setattr(Parallelism, "shard", lambda self, *models: sharded.append(models))
    words = "--model_ema" if script == "finetune" else ""
    built = build(script, words, tmp_path / "run", monkeypatch)
    expected = (built.inner, built.loop.model_ema.module) if words else (built.inner,)
    assert sharded == [expected]


@pytest.mark.parametrize("script", MAINS)
def test_dry_run_gets_the_parts_of_the_run(script, file, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(MAINS[script], "check_run", plans.append)
    words = f"--resume {file} --dry_run"
    built = build(script, words, tmp_path / "run", monkeypatch)
    (plan,) = plans
    assert built.epochs == []  # nothing was trained
    assert not (tmp_path / "run").exists()
    assert (plan.folder, plan.source) == (tmp_path / "run", str(file))
    assert plan.loop.checkpoints.save is not None
    plan.train_epoch(plan.data_loader_train, plan.loop)
    assert built.train is plan.data_loader_train
    assert built.loop is plan.loop
    if script == "finetune":
        assert plan.evaluate(plan.data_loader_val) == {"acc1": 50.0, "loss": 1.0}
        assert built.val is plan.data_loader_val


def test_eval_only_evaluates(tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(main_finetune, "evaluate_checkpoint", lambda *args: evaluated.append(args))
    built = build("finetune", "--eval --resume x.pth", tmp_path / "run", monkeypatch)
    assert evaluated == [(built.args, torch.device("cpu"), "none")]
    assert built.epochs == []


def test_evaluation_has_its_own_sampler_and_batch(tmp_path, monkeypatch):
    built = build("finetune", "", tmp_path / "run", monkeypatch)
    assert isinstance(built.train.loader.sampler, TrainSampler)
    assert isinstance(built.val.loader.sampler, EvalSampler)
    assert (built.train.loader.batch_size, built.val.loader.batch_size) == (6, 9)


def log(built: Built) -> list[dict]:
    return [json.loads(line) for line in (built.folder / "log.txt").read_text().splitlines()]


def test_log_of_finetuning(tmp_path, monkeypatch):
    built = build("finetune", "--model_ema --model_ema_eval", tmp_path / "run", monkeypatch)
    n_parameters = sum(p.numel() for p in built.inner.parameters())
    stats = {"train_loss": 1.0, "train_lr": 0.0, "test_acc1": 50.0, "test_loss": 1.0}
    stats |= {"test_acc1_ema": 50.0, "test_loss_ema": 1.0, "n_parameters": n_parameters}
    assert log(built) == [stats | {"epoch": epoch} for epoch in range(2)]
    assert f"tests.tiny:classifier: {n_parameters:,} parameters" in built.text
    assert "peak lr 0.01, precision none" in built.text
    assert f"{tmp_path / 'run'}: 2 of 2 epochs done; best top-1 50.00% in epoch 1, " in built.text
    assert (tmp_path / "run" / "checkpoint-1.pth").exists()


def test_log_of_pretraining(tmp_path, monkeypatch):
    built = build("pretrain", "--mask_ratio 0.5 --probe_every 0", tmp_path / "run", monkeypatch)
    n_parameters = sum(p.numel() for p in built.inner.parameters())
    stats = {"train_loss": 1.0, "train_lr": 0.0, "n_parameters": n_parameters}
    assert log(built) == [stats | {"epoch": epoch} for epoch in range(2)]
    assert f"tests.tiny:fcmae: {n_parameters:,} parameters" in built.text
    assert "2 of 4 patches visible: mask ratio 0.500" in built.text
    assert "peak lr 0.01, precision none" in built.text
    assert f"{tmp_path / 'run'}: 2 of 2 epochs done; train_loss 1.0000 in" in built.text
    assert [path.name for path in (tmp_path / "run" / "reconstructions").iterdir()] == [
        "epoch-1.png"
    ]


@pytest.mark.parametrize(
    ("script", "words", "text"),
    [
        ("pretrain", "--save_ckpt false", "train_loss 1.0000 in epoch 2; nothing saved"),
        ("finetune", "--disable_eval", "train_loss 1.0000 in epoch 2, not evaluated; next: "),
    ],
)
def test_last_words_say_what_is_missing(script, words, text, tmp_path, monkeypatch):
    assert text in build(script, words, tmp_path / "run", monkeypatch).text


@pytest.mark.parametrize("script", MAINS)
def test_last_epoch_is_saved_whatever_the_frequency(script, tmp_path, monkeypatch):
    built = build(script, "--save_ckpt_freq 5", tmp_path / "run", monkeypatch)
    assert built.files("checkpoint-?.pth") == ["checkpoint-1.pth"]


@pytest.mark.parametrize("script", MAINS)
def test_folder_to_resume_stands_for_its_newest_checkpoint(script, tmp_path, monkeypatch):
    """Its best one is older, and an evaluation's choice."""
    build(script, "", tmp_path / "old", monkeypatch)
    (tmp_path / "old" / "checkpoint-0.pth").rename(tmp_path / "old" / "checkpoint-best.pth")
    words = f"--epochs 3 --resume {tmp_path / 'old'}"
    built = build(script, words, tmp_path / "new", monkeypatch)
    assert built.epochs == [2]
    assert f"resumed from {tmp_path / 'old' / 'checkpoint-1.pth'}, after epoch 2" in built.text


@pytest.mark.parametrize("script", MAINS)
def test_folder_to_resume_is_treated_as_the_file_would_be(script, tmp_path, monkeypatch):
    """Checksums and --sha256 count, none of its files is deleted, other kinds give weights."""
    old, new = tmp_path / "old", tmp_path / "new"
    build(script, "", old, monkeypatch)
    torch.save({}, old / "checkpoint-0-seen-6.pth")
    files = sorted(old.iterdir())
    with pytest.raises(UserError, match="sha256"):
        build(script, f"--resume {old} --sha256 {'0' * 64}", new / "hash", monkeypatch)
    build(script, f"--epochs 3 --resume {old}", new / "run", monkeypatch)
    assert sorted(old.iterdir()) == files
    other = {"pretrain": "finetune", "finetune": "pretrain"}[script]
    built = build(other, f"--resume {old}", new / "other", monkeypatch)
    assert "only its weights are loaded" in built.text

    newest = old / "checkpoint-1.pth"
    content = bytearray(newest.read_bytes())
    with zipfile.ZipFile(newest) as file:
        record = next(
            info for info in file.infolist() if info.file_size > 100 and "/data/" in info.filename
        )
    content[record.header_offset + 150] ^= 1
    newest.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        build(script, f"--resume {old}", new / "damaged", monkeypatch)


@pytest.mark.parametrize("script", MAINS)
def test_run_for_other_channels_starts_from_the_weights_alone(script, tmp_path, monkeypatch):
    """RGB pre-training continues on gray images; in its own folder that is refused."""
    first = build(script, "", tmp_path / "rgb", monkeypatch).inner.state_dict()
    words = f"--in_chans 1 --resume {tmp_path / 'rgb'}"
    built = build(script, words, tmp_path / "gray", monkeypatch)
    assert built.epochs == [0, 1]
    stem = "encoder." * (script == "pretrain") + "downsample_layers.0.0.weight"
    expected = first[stem].sum(1, keepdim=True)
    assert torch.equal(built.inner.state_dict()[stem], expected)
    assert "--in_chans 1: only the weights of" in built.text
    assert "are loaded; training starts at epoch 1\n" in built.text
    words = f"--epochs 3 --resume {tmp_path / 'gray'}"  # its channels need not be given
    assert build(script, words, tmp_path / "more", monkeypatch).epochs == [2]
    with pytest.raises(UserError, match="was trained with --in_chans 3 and cannot resume with 1"):
        build(script, "--in_chans 1", tmp_path / "rgb", monkeypatch)


def test_weights_to_evaluate_are_checked_before_the_data_is_listed(tmp_path):
    torch.save(models.create_model("fcmae_convnextv2_atto").state_dict(), tmp_path / "a.pth")
    words = ["--eval", "--resume", str(tmp_path / "a.pth"), "--data_set", "no.module:data"]
    args = options.parse(options.finetune_parser(), [*words, "--device", "cpu"])
    with pytest.raises(UserError, match="these weights have no classifier"):
        main_finetune.main(args)


@pytest.mark.parametrize("script", MAINS)
@pytest.mark.parametrize("fault", ["model", "file", "size", "nan", "nan of own", "key of own"])
def test_wrong_model_or_weights_are_found_before_the_data_is_listed(
    script, fault, tmp_path, monkeypatch
):
    """Listing ImageNet takes minutes; here the data set does not exist.

    A network of the user's own is not built for it: its weights are read and must be finite.
    """
    model, path = tiny.classifier(num_classes=3, stem_stride=1), tmp_path / "weights.pth"
    model = models.create_model("convnextv2_atto", stem_stride=1) if fault == "nan" else model
    with torch.no_grad():
        model.stages[0][0].norm.bias[0] = float("nan")
    torch.save(model.state_dict(), path)
    words, message = {
        "model": ("--model convnextv2_tny", "Did you mean"),
        "file": ("--model convnextv2_atto START=nothing.pth", "nothing.pth does not exist"),
        "size": (
            f"--model convnextv2_atto START={path}",
            "belong to other flags: --model of",
        ),
        "nan": (f"--model convnextv2_atto START={path}", "NaN or Inf in .*stages.0.0.norm.bias"),
        "nan of own": (f"START={path}", "weights.pth holds NaN or Inf in .*stages.0.0.norm.bias"),
        "key of own": (f"START={path} --model_key other", "expected weights under 'other'"),
    }[fault]
    words = words.replace("START", START[script])
    with pytest.raises(UserError, match=message):
        build(script, f"--data_set no.module:data {words}", tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("script", MAINS)
def test_weights_are_read_once_and_freed_before_training(script, tmp_path, monkeypatch):
    """They were read and verified four times, which took seconds for 350 MB."""
    model = getattr(tiny, "fcmae" if script == "pretrain" else "classifier")
    sizes = {"in_chans": 3, "stem_stride": 1, "drop_path_rate": 0.0}
    sizes |= {"decoder_embed_dim": 8, "patch_size": 8} if script == "pretrain" else {}
    torch.save({"model": model(**sizes).state_dict()}, tmp_path / "weights.pth")
    found, main, read, held = [], MAINS[script], setup.read_pretrained, []

    def reader(*args):
        weights = read(*args)
        found.append(weakref.ref(weights))
        return weights

    def optimizer(*args):
        held.extend(weights() for weights in found)
        return build_optimizer(*args)

    monkeypatch.setattr(setup, "read_pretrained", reader)
    monkeypatch.setattr(main, "build_optimizer", optimizer)
    build(script, f"{START[script]} {tmp_path / 'weights.pth'}", tmp_path / "run", monkeypatch)
    assert held == [None]


START = {"pretrain": "--resume", "finetune": "--finetune"}  # flags that load only weights


@pytest.mark.parametrize("script", MAINS)
def test_run_never_starts_over_in_the_folder_of_another(script, tmp_path, monkeypatch):
    """Its files would outrank the new ones, and each rerun would begin at epoch 0."""
    folder = tmp_path / "run"
    build(script, "", folder, monkeypatch)
    monkeypatch.chdir(tmp_path)
    other = {"pretrain": "finetune", "finetune": "pretrain"}[script]
    for resume in ("", folder, "run", "./run/checkpoint-1.pth"):  # however the folder is written
        for output in (folder, "run"):
            words = f"{f'--resume {resume} ' * bool(resume)}--output_dir {output}"
            advice = f"another --output_dir: give it, and {START[other]} .*run to start from"
            with pytest.raises(UserError, match=f"belongs to a .* needs {advice}"):
                build(other, words, folder, monkeypatch)


@pytest.mark.parametrize("script", MAINS)
def test_run_continues_from_its_best_where_no_numbered_checkpoint_is_intact(
    script, tmp_path, monkeypatch
):
    """Killed before the first one, with --save_ckpt_freq 10, it began again at epoch 0."""
    folder, first = tmp_path / "run", tmp_path / "first.pth"
    best, newest = folder / "checkpoint-best.pth", folder / "checkpoint-1.pth"
    ema = folder / "checkpoint-best-ema.pth"
    build(script, "", folder, monkeypatch)
    shutil.copy(folder / "checkpoint-0.pth", first)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.pth").symlink_to(best)
    other = {"pretrain": "finetune", "finetune": "pretrain"}[script]
    starts = ["", "--resume run", f"--resume {best}", "--resume link.pth"]
    starts += ["--finetune run", "--finetune link.pth --use_ema"] * (script == "finetune")
    for start in starts:  # however the folder is written
        for path in folder.glob("checkpoint-*.pth"):
            path.unlink()
        shutil.copy(first, best)
        newest.write_bytes(b"half")
        torch.save({"model": {}}, ema)
        with pytest.raises(UserError, match="belongs to a .* needs another --output_dir"):
            build(other, "", folder, monkeypatch)
        with pytest.raises(UserError, match="holds checkpoint-[1b].*: the files of two runs"):
            build(script, "--auto_resume false", folder, monkeypatch)
        assert newest.exists()
        assert build(script, start, folder, monkeypatch).epochs == [1]
        assert ema.exists()
    best.write_bytes(b"half")
    (folder / "checkpoint-0.pth").unlink(missing_ok=True)
    newest.write_bytes(b"half")
    for start in starts:
        with pytest.raises(UserError, match="no run can resume from a checkpoint in"):
            build(script, start, folder, monkeypatch)
        assert newest.exists()


@pytest.mark.parametrize("script", MAINS)
def test_folder_of_another_run_within_the_output_folder_is_another(script, tmp_path, monkeypatch):
    best = tmp_path / "runs" / "best"
    build(script, "", best, monkeypatch)
    for name in ("checkpoint-best.pth", "checkpoint-0.pth"):
        (best / name).unlink(missing_ok=True)
    (best / "checkpoint-1.pth").rename(best / "checkpoint-best.pth")
    other = {"pretrain": "finetune", "finetune": "pretrain"}[script]
    built = build(other, f"--resume {best}", tmp_path / "runs", monkeypatch)
    assert "only its weights are loaded" in built.text
    link = tmp_path / "linked" / "checkpoint-1.pth"
    link.parent.mkdir()
    link.symlink_to(best / "checkpoint-best.pth")
    with pytest.raises(UserError, match="belongs to a"):
        build(other, f"--resume {link}", link.parent, monkeypatch)


def test_folder_with_ema_weights_alone(tmp_path, monkeypatch):
    """A run that starts from them would replace them; one killed in its first save leaves them."""
    old = tmp_path / "old"
    build("finetune", "--model_ema --model_ema_eval", old, monkeypatch)
    for path in old.glob("checkpoint-*.pth"):
        if path.name != "checkpoint-best-ema.pth":
            path.unlink()
    monkeypatch.chdir(tmp_path)
    for number, flag in enumerate(("finetune", "resume")):
        words = f"--{flag} {old} --use_ema"
        assert build("finetune", words, tmp_path / f"new{number}", monkeypatch).epochs == [0, 1]
        ema = f"--{flag} old/checkpoint-best-ema.pth"
        for more in words, ema, f"{ema} --use_ema":
            with pytest.raises(UserError, match="would replace .*/checkpoint-best-ema.pth, which"):
                build("finetune", more, old, monkeypatch)
    weights = torch.load(tmp_path / "new0" / "checkpoint-1.pth", weights_only=True)["model"]
    torch.save(weights, old / "pytorch_model.bin")
    assert build("finetune", f"--finetune {old}", old, monkeypatch).epochs == [0, 1]
    continued = build("finetune", f"--finetune {old} --use_ema --epochs 3", old, monkeypatch)
    assert continued.epochs == [2]
    continued = build("finetune", "--epochs 4", old, monkeypatch)
    assert "changed flag: --epochs 4 (was 3)" in continued.text
    assert "head_init_scale" not in continued.text


@pytest.mark.parametrize("kind", ["run", "weights", "weights in the output folder"])
def test_requeued_job_repeats_its_start_and_continues(kind, tmp_path, monkeypatch):
    """--use_ema and --sha256 belong to the start; they must not refuse what the job has saved."""
    old, new = tmp_path / "old", tmp_path / "new"
    build("finetune", "--model_ema", old, monkeypatch)
    source = old / "checkpoint-1.pth"
    if kind != "run":
        content = torch.load(source, weights_only=True)
        source = (new if "output" in kind else old) / "first.pth"
        new.mkdir()
        torch.save({name: content[name] for name in ("model", "model_ema")}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    words = f"--resume {source} --use_ema --sha256 {digest}"
    assert build("finetune", words, new, monkeypatch).epochs == [0, 1]
    (new / "checkpoint-1.pth").unlink()
    assert build("finetune", words, new, monkeypatch).epochs == [1]
    continued = build("finetune", "--epochs 3", new, monkeypatch)
    assert continued.epochs == [2]
    assert "changed flag: --use_ema" not in continued.text
    source.unlink()
    assert build("finetune", f"{words} --epochs 4", new, monkeypatch).epochs == [3]


@pytest.mark.parametrize("script", MAINS)
def test_checkpoint_says_what_its_steps_were(script, tmp_path, monkeypatch):
    built = build(script, "--update_freq 2", tmp_path / "run", monkeypatch)
    state = torch.load(built.folder / "checkpoint-1.pth", weights_only=True)["state"]
    assert (state["effective_batch"], state["images"], state["global_step"]) == (12, 26, 4)


@pytest.mark.parametrize("script", MAINS)
def test_bad_images_are_listed_after_every_epoch(script, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(BadImages, "write", lambda self: written.append(self) or 0)
    build(script, "--save_ckpt false", tmp_path / "run", monkeypatch)
    of_run = [each for each in written if each.path is not None]  # not that of the probes
    assert len(of_run) == 2


@pytest.mark.parametrize("script", MAINS)
def test_resumed_run_continues_at_its_sample(script, tmp_path, monkeypatch):
    """The loader starts after the samples that the checkpoint has seen."""
    build(script, "--epochs 1", tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / "checkpoint-0.pth"
    content = torch.load(path, weights_only=True)
    content["state"] |= {"samples_in_epoch": 12}
    torch.save(content, path)
    built = build(script, "", tmp_path / "run", monkeypatch)
    assert built.epochs == [1]
    assert (built.train.loader.sampler.epoch, built.train.loader.sampler.start) == (1, 12)


def evaluate(words: str, capsys: pytest.CaptureFixture) -> str:
    words = f"{BASE['finetune']} --eval {words}".split()
    args: argparse.Namespace = options.parse(main_finetune.get_args_parser(), words)
    main_finetune.main(args)
    return capsys.readouterr().out


def test_evaluation_reports_each_kind_of_weights(file, tmp_path, capsys, monkeypatch):
    samplers, kernels = [], {}

    def evaluation(loader, model, *_):
        samplers.append(type(loader.loader.sampler))
        main_finetune.autotuner.chosen |= kernels
        return {"acc1": 10.0 * seed_of(model), "acc5": 99.0, "loss": 0.5}

    monkeypatch.setattr(main_finetune, "evaluate", evaluation)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    line = "{}: top-1 {}.00%, loss 0.5000 on 7 images"
    plain, ema = line.format(file, 10), line.format(f"{file} (EMA weights)", 20)
    assert plain in evaluate(f"--resume {file}", capsys)
    assert ema in evaluate(f"--finetune {file} --use_ema", capsys)
    assert samplers == [EvalSampler] * 2
    assert evaluate(f"--resume {file} --use_ema --model_ema", capsys).count("on 7 images") == 1
    words = f"--resume {tmp_path / 'plain.pth'} --model_ema"
    torch.save({"model": weights(1)}, tmp_path / "plain.pth")
    assert evaluate(words, capsys).count("on 7 images") == 1  # it has no EMA weights
    said = evaluate(f"--resume {file} --model_ema", capsys)
    assert plain in said
    assert ema in said
    assert line.format(file, 30) in evaluate(f"--resume {file} --model_key other", capsys)
    assert "kernels chosen" not in said  # a network of another library has none
    kernels["gelu",] = "torch"
    said = evaluate(f"--resume {file} --model_key wrapped --model_prefix net.", capsys)
    assert line.format(file, 40) in said
    assert "kernels chosen: gelu by torch (" in said
    assert compiled == []
    (tmp_path / "run").mkdir()
    file.rename(tmp_path / "run" / "checkpoint-best.pth")
    said = evaluate(f"--output_dir {tmp_path / 'run'} --compile", capsys)
    assert f"{tmp_path / 'run' / 'checkpoint-best.pth'}: top-1 10.00%" in said
    assert len(compiled) == 1
    with pytest.raises(UserError, match="has SHA-256"):
        evaluate(f"--resume {tmp_path / 'run' / 'checkpoint-best.pth'} --sha256 {'0' * 64}", capsys)


def test_evaluation_refuses_another_head(file, capsys):
    """A new head would be evaluated as it was drawn."""
    state = {name: value for name, value in weights(1).items() if not name.startswith("head")}
    torch.save(state, file)
    with pytest.raises(UserError, match="missing"):
        evaluate(f"--resume {file}", capsys)


def test_evaluation_counts_the_images_that_it_used(file, monkeypatch, capsys):
    class Bad:
        def __init__(self, folder, *loaders, active) -> None:
            assert (folder, active) == (None, True)

        def write(self) -> int:
            return 2

    monkeypatch.setattr(main_finetune, "BadImages", Bad)
    assert "on 5 images" in evaluate(f"--resume {file} --on_bad_image skip", capsys)


class Killed(BaseException):
    """Ends a run as no error does."""


class Fatal(Hook):
    """Ends the run when an epoch is over, before any other hook is told."""

    def on_epoch(self, stats, state):
        raise Killed


@pytest.mark.parametrize("script", MAINS)
def test_epoch_is_saved_before_its_hooks_and_logged_if_one_ends_the_run(
    script, tmp_path, monkeypatch
):
    """The epoch was lost, and each restart ended in the same way."""
    own = "--probe_every 0" * (script == "pretrain")  # a probe comes at the end of each run
    whole = build(script, own, tmp_path / "whole", monkeypatch)
    build_hooks = hook_table._build_hooks
    for epoch in range(2):
        with monkeypatch.context() as fatal:
            fatal.setattr(hook_table, "_build_hooks", lambda *a: [Fatal(), *build_hooks(*a)])
            with pytest.raises(Killed):
                build(script, f"--epochs 3 {own}", tmp_path / "run", fatal)
        assert (tmp_path / "run" / f"checkpoint-{epoch}.pth").exists()
        run = build(script, f"--epochs {epoch + 1} {own}", tmp_path / "run", monkeypatch)
        assert run.epochs == []
        assert log(run) == log(whole)[: epoch + 1]
        assert f"epoch {epoch + 1}/{epoch + 1} done  train_loss 1" in run.text
    other = build(script, f"--resume {tmp_path / 'run'}", tmp_path / "other", monkeypatch)
    assert not (other.folder / "log.txt").exists()  # those epochs are in the log of that run


def test_scripts_stop_listening_to_signals_and_close_their_files(tmp_path, monkeypatch):
    closed = []
    for kind in (CheckpointManager, Reporter):
        real = kind.__exit__
        monkeypatch.setattr(
            kind,
            "__exit__",
            lambda self, *stop, real=real: closed.append(type(self).__name__) or real(self, *stop),
        )
    for script in MAINS:
        build(script, "", tmp_path / script, monkeypatch)
    assert closed == ["Reporter", "CheckpointManager"] * 2
