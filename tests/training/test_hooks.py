# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""What a run tells: log lines, log.txt, TensorBoard, pictures."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import read_image

from benchmarks import chaos
from config import parser as options
from data_loading import builtin
from data_loading.loader import Batches
from models import create_model
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from training import hooks
from training.checkpoint import TrainState
from training.checkpoint_manager import CheckpointManager
from training.pictures import build_panel, grid, reconstructions

CPU = torch.device("cpu")
RECORD = {
    "loss": 0.75,
    "grad_norm": 1.25,
    "lr": 5e-8,
    "images_per_s": 1234.5,
    "data_wait": 0.25,
    "memory_mb": 100.0,
    "eta_s": 3723.4,
    "step": 20,
    "steps": 100,
}


# --- log.txt --------------------------------------------------------------------------------


def no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def epochs(folder) -> list[int]:
    """Epochs in log.txt, each line of which must be strict JSON."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant)["epoch"] for line in lines]


def write_epochs(folder, start: int, stop: int) -> None:
    hook = hooks.JsonHook(folder, TrainState(epoch=start))
    for epoch in range(start, stop):
        hook.on_epoch({"train_loss": 1.0, "epoch": epoch}, TrainState(epoch=epoch + 1))


def test_value_that_is_not_finite_is_null_in_log_txt(tmp_path):
    """The official file held `NaN` and `Infinity`, which no other JSON reader takes."""
    hook = hooks.JsonHook(tmp_path, TrainState())
    stats = {"train_loss": math.nan, "train_grad_norm": math.inf, "test_acc1": 12.5}
    hook.on_epoch(stats | {"epoch": 0, "n_parameters": 7}, TrainState(epoch=1))
    line = json.loads((tmp_path / "log.txt").read_text(), parse_constant=no_constant)
    assert line == {
        "train_loss": None,
        "train_grad_norm": None,
        "test_acc1": 12.5,
        "epoch": 0,
        "n_parameters": 7,
    }


def test_resumed_run_does_not_repeat_epochs(tmp_path):
    write_epochs(tmp_path, 0, 4)
    write_epochs(tmp_path, 2, 5)  # from the checkpoint of epoch 1
    assert epochs(tmp_path) == [0, 1, 2, 3, 4]


def test_half_a_line_of_a_killed_run_is_removed(tmp_path):
    write_epochs(tmp_path, 0, 3)
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-10])  # within the line of epoch 2
    write_epochs(tmp_path, 2, 4)
    assert epochs(tmp_path) == [0, 1, 2, 3]


def test_line_that_lacks_only_its_newline_is_not_glued_to_the_next(tmp_path):
    write_epochs(tmp_path, 0, 2)
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-1])
    write_epochs(tmp_path, 2, 3)
    assert epochs(tmp_path) == [0, 1, 2]


def test_log_txt_is_written_epoch_by_epoch(tmp_path):
    hook = hooks.JsonHook(tmp_path, TrainState())
    for epoch in (0, 1):
        hook.on_epoch({"epoch": epoch}, TrainState(epoch=epoch + 1))
        assert epochs(tmp_path) == list(range(epoch + 1))  # with no one having closed anything


@pytest.mark.parametrize(
    "broken", [b"\xff\xfe\x00\x80\n", b'{"epoch": 1, "test_acc1": "\xc3(\xa0"}\n', b"\x00" * 600]
)
def test_bytes_that_are_no_text_do_not_stop_a_run_for_ever(tmp_path, broken):
    """What a machine that lost its power leaves: a UnicodeDecodeError at every start."""
    write_epochs(tmp_path, 0, 1)
    path = tmp_path / "log.txt"
    path.write_bytes(path.read_bytes() + broken)
    write_epochs(tmp_path, 2, 4)
    assert epochs(tmp_path) == [0, 2, 3]


# --- lines ----------------------------------------------------------------------------------


def test_line_shows_small_rates_and_time_left(log):
    """`.6f` showed rates below 5e-7 as 0.000000."""
    hooks.LineHook(epochs=5).on_log(RECORD, TrainState(epoch=2))
    assert log.messages == [
        "epoch 3/5  step 20/100  loss 0.7500  lr 5.00e-08  grad 1.25  1234 img/s  data 25%  "
        "mem 100 MB  eta 1:02:03"
    ]


def test_line_of_an_epoch_shows_losses_and_accuracies_alone(log):
    stats = {"train_loss": 0.5, "train_lr": 0.1, "test_acc1": 81.25, "epoch": 2}
    hooks.LineHook(epochs=5).on_epoch(stats, TrainState(epoch=3))
    assert log.messages == ["epoch 3/5 done  train_loss 0.5  test_acc1 81.25"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723.4, "1:02:03"), (9e5, "250:00:00")],
)
def test_clock(seconds, text):
    assert hooks.clock(seconds) == text


def test_bar_starts_where_the_run_resumes(capsys):
    state = TrainState(epoch=1, global_step=10)
    hook = hooks.BarHook(epochs=3, state=state, updates_all=30)
    assert (hook.bar.initial, hook.bar.total) == (10, 30)
    state.global_step += 1
    hook.on_update(state)
    assert hook.bar.n == 11
    hook.on_log(RECORD, state)
    hook.on_epoch({"train_loss": 0.5}, state)
    hook.on_end()
    assert "train_loss 0.5" in "".join(capsys.readouterr())


# --- reporter -------------------------------------------------------------------------------


class Recorder(hooks.Hook):
    def __init__(self):
        self.updates, self.records, self.ended = 0, [], 0

    def on_update(self, state):
        self.updates += 1

    def on_log(self, record, state):
        self.records.append(dict(record))

    def on_end(self):
        self.ended += 1


class Watch:
    """A clock that stands still until it is told to go on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(hooks.time, "perf_counter", watch)
    return watch


def test_log_record_by_hand(watch):
    """4 updates an epoch, 12 in all, a line every 3; resumed after 4 updates."""
    state, recorder = TrainState(epoch=1, global_step=4), Recorder()
    reporter = hooks.Reporter([recorder], CPU, state, 12, 4, print_freq=3)
    batches = Batches([], CPU, [0.5], [0.5])
    means = reporter.begin_epoch(["loss"], batches, state)
    for update, loss in enumerate([1.0, 2.0, 6.0, 5.0]):
        means.update(2, loss=torch.tensor(loss))
        watch.now += 0.5
        batches.wait_seconds += 0.125
        reporter.after_batch(2)
        state.global_step += 1
        reporter.after_update(lr=0.1 * (update + 1))
    assert recorder.updates == 4
    first, last = recorder.records  # after update 3, and at the end of the epoch
    assert first["loss"] == 3.0
    assert first["lr"] == pytest.approx(0.3)
    assert first["images_per_s"] == pytest.approx(6 / 1.5)
    assert first["data_wait"] == pytest.approx(0.25)
    assert first["eta_s"] == pytest.approx(0.5 * 5)  # 7 of 12 are done, 0.5 s each
    assert (first["step"], first["steps"]) == (3, 4)
    assert last["loss"] == 5.0  # of its own window
    assert last["images_per_s"] == pytest.approx(2 / 0.5)
    assert last["eta_s"] == pytest.approx(0.5 * 4)
    assert last["step"] == 4
    assert last["memory_mb"] > 10
    assert means.total()["loss"] == 3.5


def test_hooks_hear_the_end_of_a_run_that_breaks_off():
    recorder = Recorder()
    with (
        pytest.raises(ZeroDivisionError),
        hooks.Reporter([recorder], CPU, TrainState(), 1, 1, print_freq=1),
    ):
        raise ZeroDivisionError
    assert recorder.ended == 1


@pytest.mark.parametrize(
    ("folder", "flags", "expected"),
    [
        (False, {}, ["LineHook"]),
        (False, {"log_dir": "tb"}, ["LineHook", "TensorboardHook"]),
        (False, {"progress": "bar"}, ["BarHook"]),
        (True, {"log_dir": "none"}, ["LineHook", "JsonHook", "PictureHook"]),
        (True, {}, ["LineHook", "JsonHook", "PictureHook", "TensorboardHook"]),
    ],
)
def test_flags_choose_the_hooks(tmp_path, monkeypatch, folder, flags, expected):
    monkeypatch.chdir(tmp_path)
    defaults = {"epochs": 1, "progress": "lines", "log_dir": None, "print_freq": 1}
    args = SimpleNamespace(**(defaults | flags))
    place = tmp_path if folder else None
    with hooks.build_reporter(args, place, CPU, TrainState(), 10) as reporter:
        assert [type(hook).__name__ for hook in reporter.hooks] == expected
    place = "tensorboard" if folder else "tb"
    expected_files = {place} if "TensorboardHook" in expected else set()
    expected_files |= {"args.yaml"} if folder else set()
    assert {path.name for path in tmp_path.iterdir()} == expected_files


# --- TensorBoard ----------------------------------------------------------------------------


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(folder).Scalars(tag)]


def test_tensorboard_gets_scalars_by_update_and_pictures(tmp_path):
    hook = hooks.TensorboardHook(tmp_path, TrainState())
    hook.on_log(RECORD, TrainState(global_step=20))
    hook.on_log(RECORD | {"loss": 0.5}, TrainState(global_step=40))
    hook.on_epoch({"train_loss": 0.6, "test_acc1": 50.0, "epoch": 0}, TrainState(1, 40))
    hook.on_picture("reconstructions", torch.full((3, 8, 6), 0.5), TrainState(1, 40))
    hook.on_end()
    assert scalars(tmp_path, "train/loss") == [(20, 0.75), (40, 0.5)]
    assert scalars(tmp_path, "test/acc1") == [(40, 50.0)]
    events = read_events(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        *(f"train/{key}" for key in RECORD if key not in ("step", "steps")),
        "test/acc1",
    }
    picture = events.Images("reconstructions")[0]
    assert (picture.step, picture.height, picture.width) == (40, 8, 6)


def write_updates(folder, start: int, stop: int, loss: float) -> None:
    hook = hooks.TensorboardHook(folder, TrainState(global_step=start))
    for updates in range(start + 10, stop + 1, 10):
        hook.on_log(RECORD | {"loss": loss}, TrainState(global_step=updates))
    hook.on_end()


def test_resumed_run_takes_the_place_of_what_it_repeats_and_of_nothing_else(tmp_path):
    """The checkpoint at update 20 has seen update 20: only later points are repeated."""
    write_updates(tmp_path, 0, 40, loss=1.0)
    write_updates(tmp_path, 20, 50, loss=2.0)
    assert scalars(tmp_path, "train/loss") == [(10, 1), (20, 1), (30, 2), (40, 2), (50, 2)]


def pictures(folder) -> dict[str, list[int]]:
    events = read_events(folder)
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize("script", list(chaos.RUNS))
def test_end_of_an_epoch_that_is_told_again_is_in_tensorboard_once(tmp_path, monkeypatch, script):
    """Killed between its lines and its checkpoint, with a save at its last update.

    The run goes on from that update, and test/* and the picture have its number too.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    chaos.complete(script, whole, "--save_ckpt_every_steps", "3")
    real = CheckpointManager.end_epoch

    def end_epoch(self, state, *about, **more) -> None:
        if state.epoch == 2:
            time.sleep(0.3)  # until TensorBoard's thread has written
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, state, *about, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "end_epoch", end_epoch)
        for _ in range(2):
            child = chaos.start(script, run, "--save_ckpt_every_steps", "3")
            assert chaos.finish(child) == -signal.SIGKILL
    assert (run / "checkpoint-1-seen-24.pth").exists()
    chaos.complete(script, run, "--save_ckpt_every_steps", "3")
    assert not chaos.differences(chaos.digest(run), chaos.digest(whole))
    assert pictures(run / "tensorboard") == pictures(whole / "tensorboard")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_its_folder_is_back(tmp_path, log):
    """Its thread is dead then: it complained at every log line, and wrote nothing any more."""
    folder, gone, state = tmp_path / "run", tmp_path / "gone", TrainState()
    folder.mkdir()
    reporter = hooks.Reporter([], CPU, state, 100, 10, print_freq=1)
    reporter.hooks = [hooks.TensorboardHook(folder / "tensorboard", state)]
    for epoch in range(6):
        if epoch == 1:
            folder.rename(gone)
        if epoch == 3:
            assert not folder.exists()  # nor was it made anew
            gone.rename(folder)
            time.sleep(1.1)  # TensorBoard sorts files by their second, then as text: 10 before 9
        for _ in range(10):
            state.global_step += 1
            reporter._tell("on_log", RECORD, state)
        reporter.end_epoch({"test_acc1": 50.0})
    reporter._tell("on_end")
    assert {text.split(":")[0] for text in log.messages} == {"TensorboardHook cannot write"}
    assert 2 <= len(log.messages) <= 3  # at once, and at the end of each epoch
    assert [step for step, _ in scalars(folder / "tensorboard", "test/acc1")] == [10, 40, 50, 60]
    steps = [step for step, _ in scalars(folder / "tensorboard", "train/loss")]
    assert steps == [*range(1, 11), *range(41, 61)]


# --- cost -----------------------------------------------------------------------------------


def test_cost_of_atto_is_the_published_one(log):
    model = create_model("convnextv2_atto")
    assert (
        hooks.log_cost(model, 3, (224, 224), CPU) == 3_708_400
    )  # as timm and Hugging Face count it
    assert "3.71M parameters" in log.text
    gmac = float(log.text.split(" GMAC")[0].split()[-1])
    assert round(gmac, 2) == 0.55


# --- pictures -------------------------------------------------------------------------------


def toy(in_chans: int = 3, norm_pix_loss: bool = True) -> FCMAE:
    """A toy FCMAE of stride 8 whose prediction is not 0."""
    torch.manual_seed(0)
    encoder = ConvNeXtV2((1, 1, 1, 1), (4, 6, 8, 10), in_chans, stem_stride=1)
    model = FCMAE(encoder, decoder_embed_dim=12, norm_pix_loss=norm_pix_loss)
    torch.nn.init.normal_(model.pred.weight)
    return model.train()


@pytest.mark.parametrize(
    ("in_chans", "size"), [(3, (16, 16)), (3, (8, 24)), (1, (24, 16)), (1, (8, 16))]
)
def test_visible_pixels_are_the_inputs_and_hidden_ones_are_grey(in_chans, size):
    model = toy(in_chans)
    mean, std = [0.4, 0.5, 0.6][:in_chans], [0.1, 0.2, 0.3][:in_chans]
    truth = torch.rand(2, in_chans, *size)
    scale = torch.tensor([mean, std])[:, None, :, None, None]  # (2, 1, C, 1, 1)
    images = (truth - scale[0]) / scale[1]
    mask = torch.zeros(2, size[0] * size[1] // 64)
    mask[0, 1], mask[1, 0] = 1, 1
    hidden = torch.zeros(2, 1, *size, dtype=torch.bool)
    hidden[0, :, :8, 8:16] = hidden[1, :, :8, :8] = True  # patch 1 and patch 0 of a row
    pictures = reconstructions(model, images, mask, mean, std)
    assert pictures.shape == (2, 4, in_chans, *size)
    whole, masked, imagined, pasted = pictures.unbind(1)
    assert torch.allclose(whole, truth, atol=1e-6)
    assert torch.equal(masked, torch.where(hidden, 0.5, whole))
    assert torch.equal(pasted, torch.where(hidden, imagined, whole))
    assert not torch.allclose(imagined, whole, atol=0.05)
    assert model.training  # as it was


def test_prediction_gets_mean_and_spread_of_its_patch_back():
    """A prediction of 0 is the mean of each patch; of 1, its mean and one deviation."""
    model = toy(in_chans=1)
    images = torch.zeros(1, 1, 8, 16)
    images[..., :4, 8:] = 1.0  # half of the right patch: mean 0.5, variance 16 / 63
    mask = torch.tensor([[1.0, 0.0]])
    for prediction in (0.0, 1.0):
        with torch.no_grad():
            model.pred.weight.zero_()
            model.pred.bias.fill_(prediction)
        imagined = reconstructions(model, images, mask, [0.25], [0.5])[0, 2, 0]
        right = 0.5 + prediction * (16 / 63) ** 0.5
        assert torch.allclose(imagined[:, :8], torch.tensor(0.25 + 0.5 * prediction * 1e-3))
        assert torch.allclose(imagined[:, 8:], torch.tensor(0.25 + 0.5 * right))


def test_prediction_of_plain_pixels_is_only_denormalised():
    model = toy(in_chans=3, norm_pix_loss=False)
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.view(8, 8, 3)[:] = torch.tensor([1.0, -1.0, 9.0])  # channels innermost
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.125, 0.25]
    imagined = reconstructions(model, torch.randn(1, 3, 16, 16), mask, mean, std)[0, 2]
    assert imagined.mean((1, 2)).tolist() == pytest.approx([0.75, 0.375, 1.0])  # the last is cut


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 4, 3, 96, 96), (3, 2 * 98 + 2, 4 * 98 + 2)),
        ((2, 4, 1, 32, 64), (3, 2 * 102 + 6, 4 * 198 + 6)),  # three times as large, and its gaps
        ((1, 4, 3, 224, 160), (3, 228, 4 * 162 + 2)),
    ],
)
def test_grid_has_a_row_for_each_image(shape, expected):
    pictures = torch.zeros(shape)
    pictures[-1, 3] = 0.25
    drawn = grid(pictures)
    assert drawn.shape == expected
    assert drawn[:, 0, 0].tolist() == [1, 1, 1]  # the gap
    assert drawn[:, -10, -10].tolist() == [0.25] * 3  # last row, last column


def test_picture_hook_writes_png_files_by_epoch(tmp_path):
    picture = torch.zeros(3, 4, 5)
    picture[0, 1, 2], picture[2, 3, 4] = 1.0, 0.5
    hook = hooks.PictureHook(tmp_path)
    hook.on_picture("reconstructions", picture, TrainState(epoch=10))
    read = read_image(str(tmp_path / "reconstructions" / "epoch-9.png"))
    assert read.shape == (3, 4, 5)
    assert torch.equal(read, (picture * 255).round().to(torch.uint8))


def test_panel_shows_the_same_images_behind_the_same_masks():
    words = ["--data_set", "DIGITS", "--input_size", "16", "--stem_stride", "1", "--seed", "3"]
    args = options.parse(options.pretrain_parser(), words)
    data = builtin.Digits(train=False)
    model = toy()
    images, masks = build_panel(data, model, args, CPU, count=4)
    again, masks_again = build_panel(data, model, args, CPU, count=2)
    assert images.shape == (4, 3, 16, 16)
    assert masks.sum(1).tolist() == [3] * 4  # floor(4 * 0.4) = 1 of 4 stays visible
    assert torch.equal(images[[0, 2]], again)  # sample 0 and the one in the middle
    assert torch.equal(masks[[0, 2]], masks_again)
