# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Reports of a run: log lines, log.txt, TensorBoard, reconstruction images."""

import io
import json
import math
import resource
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import read_image

from config import parser as options
from data_loading.loader import DeviceLoader
from models import create_model
from parallel import console
from training import costs, hook_table, hooks, log_files, log_lines, tensorboard
from training.checkpoint import TrainState
from training.steps import Steps

CPU = torch.device("cpu")
RECORD = {
    "loss": 0.75,
    "grad_norm": 1.25,
    "lr": 5e-8,
    "images_per_s": 1234.5,
    "time_data": 0.25,
    "time_forward": 0.5,
    "memory_mb": 100.0,
    "eta_s": 3723.4,
    "step": 20,
    "steps": 100,
}


# --- log.txt --------------------------------------------------------------------------------


def refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def epochs(folder) -> list[int]:
    """The epochs in log.txt, whose lines must be strict JSON."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant)["epoch"] for line in lines]


def write_epochs(folder, start: int, stop: int) -> None:
    hook = log_files.JsonHook(folder, TrainState(epoch=start))
    for epoch in range(start, stop):
        hook.on_epoch({"train_loss": 1.0, "epoch": epoch}, TrainState(epoch=epoch + 1))


def test_nonfinite_value_is_null_in_log_txt(tmp_path):
    """The official code writes `NaN` and `Infinity`, which are not JSON."""
    hook = log_files.JsonHook(tmp_path, TrainState())
    stats = {"train_loss": math.nan, "train_grad_norm": math.inf, "test_acc1": 12.5}
    hook.on_epoch(stats | {"epoch": 0, "n_parameters": 7}, TrainState(epoch=1))
    line = json.loads((tmp_path / "log.txt").read_text(), parse_constant=refuse_constant)
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


def test_incomplete_line_of_a_killed_run_is_removed(tmp_path):
    write_epochs(tmp_path, 0, 3)
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-10])  # within the line of epoch 2
    write_epochs(tmp_path, 2, 4)
    assert epochs(tmp_path) == [0, 1, 2, 3]


def test_line_without_newline_is_not_joined_with_the_next(tmp_path):
    write_epochs(tmp_path, 0, 2)
    path = tmp_path / "log.txt"
    path.write_text(path.read_text()[:-1])
    write_epochs(tmp_path, 2, 3)
    assert epochs(tmp_path) == [0, 1, 2]


def test_line_that_a_full_disk_refused_is_written_later(tmp_path):
    write_epochs(tmp_path, 0, 1)
    before = (tmp_path / "log.txt").read_bytes()
    hook = log_files.JsonHook(tmp_path, TrainState(epoch=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            hook.on_epoch({"epoch": 1}, TrainState(epoch=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    hook.on_epoch({"epoch": 2}, TrainState(epoch=3))
    assert epochs(tmp_path) == [0, 1, 2]


def test_log_txt_is_written_epoch_by_epoch(tmp_path):
    hook = log_files.JsonHook(tmp_path, TrainState())
    for epoch in (0, 1):
        hook.on_epoch({"epoch": epoch}, TrainState(epoch=epoch + 1))
        assert epochs(tmp_path) == list(range(epoch + 1))  # before the run ends


@pytest.mark.parametrize(
    "broken", [b"\xff\xfe\x00\x80\n", b'{"epoch": 1, "test_acc1": "\xc3(\xa0"}\n', b"\x00" * 600]
)
def test_log_txt_with_binary_garbage_does_not_stop_a_run(tmp_path, broken):
    """A power cut leaves such bytes, which raised a UnicodeDecodeError at every start."""
    write_epochs(tmp_path, 0, 1)
    path = tmp_path / "log.txt"
    path.write_bytes(path.read_bytes() + broken)
    write_epochs(tmp_path, 2, 4)
    assert epochs(tmp_path) == [0, 2, 3]


# --- log lines ---------------------------------------------------------------------------------


def test_log_line_shows_small_learning_rates_and_time_left(log):
    """`.6f` would show a rate below 5e-7 as 0.000000."""
    log_lines.LineHook(epochs=5).on_log(RECORD, TrainState(epoch=2))
    assert log.messages == [
        "epoch 3/5  step 20/100  loss 0.7500  lr 5.00e-08  grad_norm 1.25  images/s 1234  "
        "data 25%  forward 50%  memory 100 MB  eta 1:02:03"
    ]


def test_epoch_line_shows_metrics_and_not_what_is_undefined(log):
    """Mixup has no training accuracy, five classes have no top-5; a user's metric is shown."""
    stats = {"train_loss": 0.5, "train_class_acc": math.nan, "train_lr": 0.1, "test_acc1": 81.25}
    stats |= {"test_acc5": 100.0, "test_acc5_ema": 100.0, "test_kappa": 0.75, "epoch": 2}
    log_lines.LineHook(epochs=5, top5=False).on_epoch(stats, TrainState(epoch=3))
    plain = {"train_loss": math.nan, "train_class_acc": 75.0, "test_acc5": 9.0}
    log_lines.LineHook(epochs=5).on_epoch(plain, TrainState(3))
    assert log.messages == [
        "epoch 3/5 done  train_loss 0.5  test_acc1 81.25  test_kappa 0.75",
        "epoch 3/5 done  train_loss nan  train_class_acc 75  test_acc5 9",
    ]


def test_metric_of_a_user_is_in_the_lines_of_steps(log):
    record = RECORD | {"psnr": 31.5, "class_acc": math.nan, "memory_mb": math.nan}
    log_lines.LineHook(epochs=5).on_log(record, TrainState())
    assert "  loss 0.7500  psnr 31.5  lr 5.00e-08  " in log.messages[0]
    assert "class_acc" not in log.messages[0]
    assert "memory" not in log.messages[0]  # not known on Windows without a GPU


class Screen(io.StringIO):
    """A terminal of 80 columns, which keeps what was written."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What it shows: a carriage return goes back to the start of the line."""
        shown = []
        for line in self.getvalue().split("\n"):
            cells = ""
            for part in line.split("\r"):
                cells = part + cells[len(part) :]
            shown.append(cells.rstrip())
        return shown


def show(monkeypatch) -> Screen:
    """Write to a screen; in a fixture pytest would undo it before the test."""
    screen = Screen()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.setenv("COLUMNS", "80")
    handler = console.TerminalHandler(screen)
    monkeypatch.setattr(console.get_logger(), "handlers", [handler])
    monkeypatch.setattr(console.get_logger(), "propagate", False)
    console.get_logger().setLevel("INFO")
    return screen


def test_bar_shows_epoch_and_loss_and_log_lines_do_not_break_it(monkeypatch):
    """The epoch was that of the last log line, and other lines were appended to the bar."""
    screen = show(monkeypatch)
    state = TrainState(epoch=1, global_step=10)
    hook = log_lines.BarHook(epochs=3, state=state, total=30)
    assert (hook.bar.initial, hook.bar.total) == (10, 30)
    assert screen.lines()[-1].startswith("epoch 2/3   33% |")
    state.global_step += 1
    hook.on_step(SimpleNamespace(state=state))
    hook.on_first_step(RECORD, state)
    console.get_logger().warning("a warning")
    values = "epoch 2/3  loss 0.7500  lr 5.0e-08  1234 img/s  1:02:03 left   37% |"
    *above, bar = screen.lines()
    assert [line for line in above if line] == ["a warning"]
    assert bar.startswith(values)
    assert len(bar) <= 80
    assert bar.endswith("|")
    assert len(bar) - len(values) >= 10  # the bar itself
    state.epoch, state.global_step = 2, 21
    hook.bar.mininterval = 0
    hook.on_step(SimpleNamespace(state=state))
    assert screen.lines()[-1].startswith("epoch 3/3  loss 0.7500")
    hook.on_end(None)
    assert screen.lines()[-1] == ""


@pytest.mark.parametrize(
    ("progress", "terminals", "bar", "lines"),
    [
        ("auto", ("stdout", "stderr"), True, False),
        ("auto", ("stderr",), False, True),  # > train.log
        ("auto", ("stdout",), False, True),  # 2> errors
        ("auto", (), False, True),
        ("lines", ("stdout", "stderr"), False, True),
        ("bar", ("stderr",), True, True),
        ("bar", ("stdout", "stderr"), True, False),
    ],
)
def test_bar_needs_two_terminals_and_a_file_gets_the_lines(
    progress, terminals, bar, lines, monkeypatch, tmp_path
):
    """`> train.log` in a terminal had a bar, and no line of a step."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Screen() if name in terminals else io.StringIO())
    args = SimpleNamespace(epochs=1, progress=progress, log_dir="none", print_freq=1)
    args.hook = args.tracker = None
    console_log = console.ConsoleLog()
    console_log.open(tmp_path)
    handlers = [console.TerminalHandler(sys.stdout), console_log]
    monkeypatch.setattr(console.get_logger(), "handlers", handlers)
    console.get_logger().setLevel("INFO")
    with hook_table.build_reporter(args, None, CPU, TrainState(), Steps.even(10)) as reporter:
        assert any(isinstance(hook, log_lines.BarHook) for hook in reporter.hooks) is bar
        reporter._notify("on_log", RECORD, TrainState())
        assert ("step 20/100" in sys.stdout.getvalue()) is lines
    assert "step 20/100" in (tmp_path / "console.log").read_text()


# --- reporter -------------------------------------------------------------------------------


class Recorder(hooks.Hook):
    def __init__(self):
        self.steps, self.records, self.first, self.ends = 0, [], [], 0

    def on_step(self, run):
        self.steps += 1

    def on_first_step(self, record, state):
        self.first.append(dict(record))

    def on_log(self, record, state):
        self.records.append(dict(record))

    def on_end(self, run):
        self.ends += 1


class Clock:
    """A clock that moves only when `now` is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hooks.time, "perf_counter", clock)
    return clock


def test_log_record_by_hand(clock):
    """4 steps per epoch, 12 in total, a line every 3 steps; resumed after 4 steps."""
    state, recorder = TrainState(epoch=1, global_step=4), Recorder()
    reporter = hooks.Reporter([recorder], CPU, state, Steps.even(4, 3), print_freq=3)
    batches = DeviceLoader([], CPU, [0.5], [0.5])
    stepper = SimpleNamespace(can_skip=True)
    means = reporter.begin_epoch(["loss"], batches, stepper)
    for step, loss in enumerate([1.0, 2.0, 6.0, 5.0]):
        means.update(2, loss=torch.tensor(loss))
        for mark, part in ((batches.mark, "data"), (stepper.mark, "backward")):
            clock.now += 0.125 if part == "data" else 0.375
            mark(part)
        reporter.after_batch(2)
        state.global_step += 1
        reporter.after_step(lr=0.1 * (step + 1))
    assert recorder.steps == 4
    (early,) = recorder.first  # the loss is known at once, and counts in the next line too
    assert (early["loss"], early["step"]) == (1.0, 1)
    first, last = recorder.records  # after step 3 and at the end of the epoch
    assert first["loss"] == 3.0
    assert first["lr"] == pytest.approx(0.3)
    assert first["images_per_s"] == pytest.approx(6 / 1.5)
    assert (first["time_data"], first["time_backward"]) == (0.25, 0.75)
    assert "time_forward" not in first  # never marked, as communication of a process alone
    assert first["eta_s"] == pytest.approx(0.5 * 5)  # 7 of 12 steps are done, 0.5 s each
    assert (first["step"], first["steps"]) == (3, 4)
    assert last["loss"] == 5.0  # of step 4 alone
    assert last["images_per_s"] == pytest.approx(2 / 0.5)
    assert last["eta_s"] == pytest.approx(0.5 * 4)
    assert last["step"] == 4
    assert last["memory_mb"] > 10
    assert means.total()["loss"] == 3.5


def test_hooks_are_notified_when_a_run_fails():
    recorder = Recorder()
    with (
        pytest.raises(ZeroDivisionError),
        hooks.Reporter([recorder], CPU, TrainState(), Steps.even(1), print_freq=1),
    ):
        raise ZeroDivisionError
    assert recorder.ends == 1


class Broken(hooks.Hook):
    def on_step(self, run):
        raise ZeroDivisionError("of a hook")

    def on_image(self, name, image, state):
        raise KeyError("of an image")


def test_hook_and_picture_that_fail_are_reported_once_and_end_no_run(log):
    """They ended the run before its epoch was saved."""
    recorder = Recorder()
    reporter = hooks.Reporter([Broken(), recorder], CPU, TrainState(), Steps.even(9), print_freq=1)
    for _ in range(3):
        reporter._notify("on_step", reporter.run)
        reporter.image("dreams", lambda: torch.zeros(1, 2).squeeze(0)[5])
    assert recorder.steps == 3
    first, second = log.messages
    assert first.startswith("Broken failed in on_step (ZeroDivisionError in test_hooks.py, line ")
    assert second.startswith("the image dreams failed (IndexError in test_hooks.py, line ")


def test_picture_that_a_killed_run_did_not_draw_is_drawn_when_it_resumes(tmp_path):
    """The checkpoint is written first."""
    reporter = hooks.Reporter(
        [log_files.ImageHook(tmp_path)], CPU, TrainState(epoch=3), Steps.even(3, 3), 1
    )
    for value in (0.0, 1.0):
        draw = partial(torch.full, (3, 2, 2), value)
        reporter.image("dreams", draw, only_missing=True)
    assert read_image(str(tmp_path / "dreams" / "epoch-2.png")).max() == 0
    reporter.image("dreams", lambda: torch.ones(3, 2, 2))
    assert read_image(str(tmp_path / "dreams" / "epoch-2.png")).max() == 255


FILES = ("ConfusionHook", "JsonHook", "ImageHook")


@pytest.mark.parametrize(
    ("folder", "flags", "expected"),
    [
        (False, {}, ["LineHook"]),
        (False, {"log_dir": "tb"}, ["LineHook", "TensorboardHook"]),
        (False, {"progress": "bar"}, ["BarHook", "LineHook"]),
        (True, {"log_dir": "none"}, ["LineHook", "HtmlReport", *FILES]),
        (True, {"report": False}, ["LineHook", "TensorboardHook", *FILES]),
        (True, {}, ["LineHook", "TensorboardHook", "HtmlReport", *FILES]),
    ],
)
def test_flags_choose_the_hooks(tmp_path, monkeypatch, folder, flags, expected):
    monkeypatch.chdir(tmp_path)
    defaults = {"epochs": 1, "progress": "lines", "log_dir": None, "print_freq": 1}
    defaults |= {"hook": None, "tracker": None, "report": True}
    args = SimpleNamespace(**(defaults | flags))
    place = tmp_path if folder else None
    with hook_table.build_reporter(args, place, CPU, TrainState(), Steps.even(10)) as reporter:
        assert [type(hook).__name__ for hook in reporter.hooks] == expected
    place = "tensorboard" if folder else "tb"
    expected_files = {place} if "TensorboardHook" in expected else set()
    expected_files |= {"args.yaml"} if folder else set()
    assert {path.name for path in tmp_path.iterdir()} == expected_files


def test_confusion_of_the_last_epoch_is_a_file(tmp_path):
    hook = log_files.ConfusionHook(tmp_path, ["a", "b"])
    hook.on_epoch({"test_acc1": 50.0}, TrainState())
    assert not list(tmp_path.iterdir())
    for right in (1, 2):
        stats = {"test_confusion": [[right, 0], [0, 1]], "test_confusion_ema": [[0, 1], [0, 1]]}
        hook.on_epoch(stats, TrainState())
    assert (tmp_path / "confusion.csv").read_text() == "true class,a,b\na,2,0\nb,0,1\n"
    assert (tmp_path / "confusion-ema.csv").read_text() == "true class,a,b\na,0,1\nb,0,1\n"


# --- TensorBoard ----------------------------------------------------------------------------


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(folder).Scalars(tag)]


def test_tensorboard_gets_scalars_by_step_and_images(tmp_path):
    hook = tensorboard.TensorboardHook(tmp_path, TrainState())
    hook.on_log(RECORD, TrainState(global_step=20))
    hook.on_log(RECORD | {"loss": 0.5}, TrainState(global_step=40))
    lists = {"test_confusion": [[1]], "test_f1_per_class": [1.0, None]}  # have no curve
    hook.on_epoch({"train_loss": 0.6, "test_acc1": 50.0, "epoch": 0} | lists, TrainState(1, 40))
    hook.on_image("reconstructions", torch.full((3, 8, 6), 0.5), TrainState(1, 40))
    hook.on_end(None)
    assert scalars(tmp_path, "train/loss") == [(20, 0.75), (40, 0.5)]
    assert scalars(tmp_path, "test/acc1") == [(40, 50.0)]
    events = read_events(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        *(f"train/{key}" for key in RECORD if key not in ("step", "steps")),
        "test/acc1",
    }
    image = events.Images("reconstructions")[0]
    assert (image.step, image.height, image.width) == (40, 8, 6)


def write_steps(folder, start: int, stop: int, loss: float) -> None:
    hook = tensorboard.TensorboardHook(folder, TrainState(global_step=start))
    for updates in range(start + 10, stop + 1, 10):
        hook.on_log(RECORD | {"loss": loss}, TrainState(global_step=updates))
    hook.on_end(None)


def test_resumed_run_replaces_only_the_points_it_repeats(tmp_path):
    """A checkpoint after step 20 repeats only later points."""
    write_steps(tmp_path, 0, 40, loss=1.0)
    time.sleep(1.1)  # event files are sorted by second, then by name, and .10 is before .9
    write_steps(tmp_path, 20, 50, loss=2.0)
    assert scalars(tmp_path, "train/loss") == [(10, 1), (20, 1), (30, 2), (40, 2), (50, 2)]


def image_steps(folder) -> dict[str, list[int]]:
    events = read_events(folder)
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize("saved", [False, True])
def test_repeated_end_of_an_epoch_is_in_tensorboard_once(tmp_path, saved):
    """Killed after an epoch's values, and before its checkpoint or before its line in log.txt.

    The run resumes at that step, and test/* and the image are written at the same step again.
    """
    flags = {"epochs": 3, "progress": "lines", "log_dir": str(tmp_path), "print_freq": 1}
    folder, stats = tmp_path / "run", {"test_acc1": 50.0, "epoch": 0}
    args = options.parse(options.pretrain_parser(), ["--data_set", "DIGITS"]).replace(**flags)
    folder.mkdir()
    for resumed in (False, True):
        state = TrainState(global_step=10 * resumed, samples_in_epoch=40 * resumed)
        if resumed and saved:
            state = TrainState(1, 10, stats=stats)
            (folder / "checkpoint-0.pth").touch()
        with hook_table.build_reporter(args, folder, CPU, state, Steps.even(10)) as reporter:
            board = reporter.hooks[1]
            if not resumed:
                board.on_log(RECORD, TrainState(global_step=10))
            if not (resumed and saved):
                board.on_epoch(stats, TrainState(1, 10))
            board.on_image("reconstructions", torch.zeros(3, 8, 6), TrainState(1, 10))
    assert scalars(tmp_path, "train/loss") == [(10, 0.75)]
    assert scalars(tmp_path, "test/acc1") == [(10, 50.0)]
    assert image_steps(tmp_path) == {"reconstructions": [10]}
    assert (folder / "log.txt").exists() is saved
    if saved:
        assert epochs(folder) == [0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_continues_when_its_folder_is_back(tmp_path, log):
    """The writer's thread is dead then, and every later log line would fail."""
    folder, gone, state = tmp_path / "run", tmp_path / "gone", TrainState()
    folder.mkdir()
    state.stats = {"test_acc1": 50.0}
    reporter = hooks.Reporter([], CPU, state, Steps.even(10, 10), print_freq=1)
    reporter.hooks = [tensorboard.TensorboardHook(folder / "tensorboard", state)]
    for epoch in range(6):
        if epoch == 1:
            folder.rename(gone)
        if epoch == 3:
            assert not folder.exists()  # nor was it created again
            gone.rename(folder)
            time.sleep(1.1)  # event files are sorted by second, then by name
        for _ in range(10):
            state.global_step += 1
            reporter._notify("on_log", RECORD, state)
        reporter.end_epoch()
    reporter._notify("on_end", reporter.run)
    (text,) = log.messages  # once
    assert text.startswith("TensorboardHook failed in on_log (FileNotFoundError in ")
    assert [step for step, _ in scalars(folder / "tensorboard", "test/acc1")] == [10, 40, 50, 60]
    steps = [step for step, _ in scalars(folder / "tensorboard", "train/loss")]
    assert steps == [*range(1, 11), *range(41, 61)]


# --- cost -----------------------------------------------------------------------------------


def test_cost_of_atto_is_the_published_one(log):
    model = create_model("convnextv2_atto")
    args = SimpleNamespace(model="convnextv2_atto", in_chans=3, input_size=(224, 224))
    parameters = costs.log_cost(args, model)
    assert parameters == 3_708_400  # as counted by timm and Hugging Face
    assert all(module.training for module in model.modules())
    assert log.messages == ["convnextv2_atto: 3.71M parameters, 0.547 GMACs per 224x224 image"]


def test_few_parameters_are_counted_in_full(log):
    """A linear probe had `0.00M parameters (3.3e-05M trained)`."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 10, 1), torch.nn.Flatten(), torch.nn.Linear(10, 3)
    )
    model[0].requires_grad_(False)
    args = SimpleNamespace(model="own", in_chans=3, input_size=(1, 1))
    assert costs.log_cost(args, model) == 33
    assert log.messages[0].startswith("own: 73 parameters (33 trained), ")


def test_image_hook_writes_png_files_by_epoch(tmp_path):
    image = torch.zeros(3, 4, 5)
    image[0, 1, 2], image[2, 3, 4] = 1.0, 0.5
    hook = log_files.ImageHook(tmp_path)
    hook.on_image("reconstructions", image, TrainState(epoch=10))
    read = read_image(str(tmp_path / "reconstructions" / "epoch-9.png"))
    assert read.shape == (3, 4, 5)
    assert torch.equal(read, (image * 255).round().to(torch.uint8))
