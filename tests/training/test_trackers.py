# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Experiment trackers: the calls that they get, resumed runs, wandb and trackio themselves."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from config import parser as options
from errors import UserError
from tests import fakes
from training import trackers
from training.checkpoint import TrainState
from training.hooks import Run

BASE = ["--data_set", "SYNTHETIC", "--output_dir", "runs/here"]
FAKE = "tests.fakes:tracker"


def build(*words: str) -> trackers.TrackerHook:
    args = options.parse(options.finetune_parser(), [*BASE, *words])
    hook = trackers.build_tracker(args)
    hook.args = args
    return hook


def start(hook: trackers.TrackerHook, folder) -> Run:
    run = Run(hook.args, folder, TrainState(), torch.device("cpu"))
    hook.on_start(run)
    return run


@pytest.fixture(autouse=True)
def calls():
    fakes.CALLS.clear()
    return fakes.CALLS


def test_calls_of_a_run(calls, tmp_path):
    hook = build("--tracker", f"{FAKE}(mode=offline)", "--project", "mine", "--tags", "a", "b")
    run = start(hook, tmp_path / "demo")
    record = {"loss": 0.5, "class_acc": float("nan"), "step": 2, "steps": 4}
    hook.on_log(record, TrainState(global_step=2))
    stats = {"train_loss": 0.5, "test_acc1": 50.0, "test_class_accuracy": [1.0, 2.0], "epoch": 0}
    hook.on_epoch(stats, TrainState(1, 4))
    hook.on_image("dreams", torch.full((3, 4, 5), 0.5), TrainState(1, 4))
    hook.on_end(run)
    (_, words, config), *others = calls
    expected = {"project": "mine", "name": "demo", "id": None, "resume": "never"}
    assert words == expected | {"mode": "offline"}
    assert (config["epochs"], config["input_size"]) == (100, [224, 224])
    assert config["tags"] == ["a", "b"]  # its init has none
    assert others == [
        ("log", {"train/loss": 0.5}, 2),  # NaN where it is not defined is no value
        ("log", {"test/acc1": 50.0, "epoch/train_loss": 0.5, "epoch": 0}, 4),
        ("log", {"dreams": ("image", (4, 5, 3), 128)}, 4),
        ("finish",),
    ]


def test_resumed_run_continues_that_of_the_tracker(calls, tmp_path):
    """Every requeue would be another run."""
    first, second = build("--tracker", FAKE), build("--tracker", FAKE)
    start(first, tmp_path)
    second.load_state_dict(first.state_dict())
    start(second, tmp_path)
    words = calls[1][1]
    assert (words["name"], words["id"], words["resume"]) == ("own name", "id7", "allow")


def test_tracker_without_images_gets_none(calls, tmp_path, monkeypatch):
    hook = build("--tracker", FAKE)
    start(hook, tmp_path)
    calls.clear()
    monkeypatch.delattr(type(hook.module), "Image")
    hook.on_image("dreams", torch.zeros(3, 4, 5), TrainState())
    assert calls == []


def test_tracker_that_is_not_installed_is_named_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as caught:
        build("--tracker", "wandb(mode=offline)")
    assert str(caught.value).startswith("--tracker wandb: cannot import it (import of wandb")
    assert str(caught.value).endswith("; pip install wandb, or drop --tracker")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["wanb"], "--tracker: unknown tracker 'wanb'. Did you mean 'wandb'?"),
        ([f"{FAKE}(speed=1)"], "has no argument speed; accepted: project, name, id, config"),
        ([f"{FAKE}(1)"], "takes arguments by name"),
        (["os:sep"], "--tracker os:sep is a str, expected a function"),
        (
            ["os:getcwd"],
            "os:getcwd returned a str, expected an object with a function init",
        ),
        (["shutil:which(x=1)"], "--tracker shutil:which: TypeError in "),
        (["a+b"], "--tracker: expected the end, after one name"),
    ],
)
def test_wrong_tracker_is_refused(words, expected):
    with pytest.raises(UserError) as caught:
        build("--tracker", *words)
    assert expected in str(caught.value)


def test_tracker_that_is_not_installed_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trackers, "import_module", missing)
    with pytest.raises(UserError, match="pip install trackio, or drop --tracker"):
        build("--tracker", "trackio")


@pytest.mark.parametrize("words", [["--project", "x"], ["--tags", "x"]])
def test_flags_of_a_tracker_need_one(words, capsys):
    with pytest.raises(SystemExit):
        build(*words)
    assert "needs --tracker; give both or neither" in capsys.readouterr().err


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_real_tracker_works_offline_and_resumes(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    own = []
    for _ in range(2):
        hook = build("--tracker", name, "--tags", "a")
        if own:
            hook.load_state_dict(own[0])
        run = start(hook, tmp_path)
        hook.on_log({"loss": 0.5}, TrainState(global_step=2))
        hook.on_image("dreams", torch.zeros(3, 4, 5), TrainState(1, 4))
        hook.on_end(run)
        own.append(hook.state_dict())
    assert own[0] == own[1]
    assert own[0]["name"] == tmp_path.name
    assert SimpleNamespace(**own[0]).name
