# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Built-in hooks of --hook: CSV files, costs, profile, predictions, TensorBoard, export."""

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from config import parser as options
from errors import UserError
from models import create_model
from tests import tiny
from training import (
    confusion,
    costs,
    eval_sets,
    hook_table,
    hooks,
    log_files,
    predictions,
    profiler,
    tensorboard,
)
from training.checkpoint import TrainState
from training.export_hook import ExportHook
from training.hooks import Batch, Run
from training.schedules import Schedule

CPU = torch.device("cpu")


def run_in(folder, state: TrainState | None = None, **more) -> Run:
    args = SimpleNamespace(epochs=2, in_chans=3, input_size=(8, 8), model="tests.tiny:classifier")
    args.loss = more.pop("loss", None)
    return Run(args, folder, state or TrainState(), CPU, **more)


# --- CSV ------------------------------------------------------------------------------------


def write_epochs(folder, start: int, *values: dict) -> str:
    hook = log_files.CsvHook()
    hook.on_start(run_in(folder, TrainState(epoch=start)))
    for epoch, stats in enumerate(values, start):
        hook.on_epoch(stats | {"epoch": epoch}, TrainState(epoch=epoch + 1))
    return (folder / "metrics.csv").read_text()


def test_csv_has_a_row_an_epoch_and_a_resumed_run_repeats_none(tmp_path):
    matrix = {"test_confusion": [[1]]}
    losses = {"train_loss": 0.5} | matrix, {"train_loss": math.nan}, {"train_loss": 0.125}
    first = write_epochs(tmp_path, 0, *losses)
    assert first == "epoch,train_loss\n0,0.5\n1,nan\n2,0.125\n"
    assert write_epochs(tmp_path, 1, {"train_loss": 0.25}) == "epoch,train_loss\n0,0.5\n1,0.25\n"


def test_csv_takes_a_metric_that_comes_later(tmp_path):
    """The columns of the first row would be those of all."""
    write_epochs(tmp_path, 0, {"train_loss": 0.5})
    text = write_epochs(tmp_path, 1, {"train_loss": 0.25, "test_acc1": 50.0})
    assert text == "epoch,train_loss,test_acc1\n0,0.5,\n1,0.25,50.0\n"


def test_csv_of_a_killed_run_is_read_as_far_as_it_can_be(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"epoch,train_loss\n0,0.5\n1\nx,\xff\n,,,\n")
    assert write_epochs(tmp_path, 2, {"train_loss": 1}).endswith("0,0.5\n1,\n2,1\n")


def test_schedule_by_hand(tmp_path):
    """Two steps of warm-up to 1, then half a cosine to 0 in three."""
    parameter = nn.Parameter(torch.zeros(1))
    schedule = Schedule(torch.optim.SGD([parameter], lr=1.0), 5, 1.0, warmup=2, weight_decay=0.5)
    log_files.ScheduleHook().on_start(run_in(tmp_path, schedule=schedule))
    rows = (tmp_path / "schedule.csv").read_text().splitlines()
    assert rows == ["step,lr,weight_decay", *("0,0.5,0.5", "1,1.0,0.5", "2,1.0,0.5"),
                    "3,0.5,0.5", "4,0.0,0.5"]  # fmt: skip
    log_files.ScheduleHook(rows=3).on_start(run_in(tmp_path, schedule=schedule))
    rows = (tmp_path / "schedule.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "2", "4"]


# --- predictions ----------------------------------------------------------------------------


def predict(
    folder, kind: str, outputs: list, targets: list, split: str = "", loss: str | None = None
) -> list[str]:
    """Rows of predictions.csv for images 1 and 0, in two batches."""
    data = SimpleNamespace(path_of=lambda index: f"photos/{index}.jpg")
    run = run_in(folder, classes=["cat", "dog", "eel"], loss=loss)
    run.phase, run.kind, run.split = "test", kind, split
    run.loader = SimpleNamespace(loader=SimpleNamespace(dataset=data))
    hook = predictions.PredictionsHook()
    hook.on_phase_start(run)
    for index, (row, target) in enumerate(zip(outputs, targets, strict=True)):
        one = torch.tensor([row]), torch.tensor([target])
        run.last_batch = Batch(
            torch.ones(1), one[1], one[0], torch.ones(1), torch.tensor([1 - index])
        )
        hook.on_step(run)
    hook.on_phase_end(run)
    name = f"predictions{'-' * bool(split)}{split.replace('_', '-')}.csv"
    head, *rows = (folder / name).read_text().splitlines()
    assert head == "path,target,prediction,probability"
    return rows


def test_predictions_by_hand_in_the_order_of_the_data(tmp_path):
    """softmax of (log 2, log 1, log 1) is 1/2, 1/4, 1/4."""
    outputs = [[math.log(2), 0.0, 0.0], [0.0, math.log(8), 0.0]]
    assert predict(tmp_path, "class", outputs, [0, 2], "ema") == [
        "photos/0.jpg,eel,dog,0.8",
        "photos/1.jpg,cat,cat,0.5",
    ]


def test_probability_is_a_sigmoid_if_the_loss_has_one_and_sets_have_files_of_their_own(tmp_path):
    """The sigmoid of log 3 is 3/4, its softmax among zeros 3/5. confusion.csv has the same rule."""
    outputs = [[math.log(3), 0.0, 0.0], [0.0, math.log(3), 0.0]]
    rows = predict(tmp_path, "class", outputs, [0, 0], "b_ema", "2*bce + ce")
    assert rows == ["photos/0.jpg,cat,dog,0.75", "photos/1.jpg,cat,cat,0.75"]
    names = [eval_sets.EvalSet(*name, None).split("ema") for name in (("a", ""), ("b", "b_"))]
    assert names == ["ema", "b_ema"]
    assert confusion.confusion_file("test_b_confusion_ema") == "confusion-b-ema.csv"
    assert confusion.csv_name("predictions", "b_ema") == "predictions-b-ema.csv"
    assert confusion.csv_name("predictions", "") == "predictions.csv"


def test_image_without_usable_outputs_has_no_prediction(tmp_path):
    """argmax of NaN is a class too."""
    rows = predict(tmp_path, "class", [[0.0, 1.0, 0.0], [math.nan, 1.0, 0.0]], [1, 0])
    assert rows[0] == "photos/0.jpg,cat,,"


def test_predictions_of_several_classes_and_of_numbers(tmp_path):
    """The sigmoid of log 3 is 3/4."""
    outputs, targets = [[math.log(3), -1.0, 0.0], [-9.0, -9.0, -9.0]], [[1, 1, 0], [0, 0, 1]]
    assert predict(tmp_path, "multi", outputs, targets) == [
        "photos/0.jpg,eel,,",
        "photos/1.jpg,cat|dog,cat|eel,0.75|0.5",
    ]
    assert predict(tmp_path, "number", [[1.5, 2.0], [0.0, -1.0]], [[1.0, 2.0], [0.25, 0.0]]) == [
        "photos/0.jpg,0.25|0,0|-1,",
        "photos/1.jpg,1|2,1.5|2,",
    ]


# --- costs ----------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4).eval()  # as a frozen one

    def forward(self, x):
        return self.norm(self.conv(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Inner()])
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.parts[0](images).mean((2, 3)))


@pytest.mark.parametrize("compiled", [False, True])
def test_costs_by_hand_and_the_modes_stay(compiled):
    """8x8 images: 4 x 6 x 6 outputs of 27 products each, and 2 of 4."""
    model = Outer()
    if compiled:
        model._compiled_call_impl = lambda *_: 1 / 0  # that of model.compile() has no modules
    lines = [line.split() for line in costs.cost_table(model, 3, (8, 8), 3)]
    assert lines == [
        ["module", "parameters", "MACs", "activations"],
        ["(all)", "130", "3,896", "146"],
        ["parts", "120", "3,888", "144"],  # a list, which is not called itself
        ["parts.0", "120", "3,888", "144"],
        ["parts.0.conv", "112", "3,888", "144"],
        ["parts.0.norm", "8", "0", "0"],
        ["fc", "10", "8", "2"],
    ]
    assert model.training
    assert not model.parts[0].norm.training
    assert int(model.parts[0].norm.num_batches_tracked) == 0


def test_activations_of_resnet50_are_the_published_ones():
    """11.1 million in table 2 of arXiv 2003.13678."""
    model = create_model("torchvision:resnet50", num_classes=1000, drop_path_rate=0.0)
    macs, activations = costs.measure(model.to("meta"), 3, (224, 224))["Global"]
    assert (round(macs / 1e9, 1), round(activations / 1e6, 1)) == (4.1, 11.1)


# --- profile --------------------------------------------------------------------------------


def test_profile_is_of_the_steps_after_the_skipped_ones(tmp_path):
    hook, run = profiler.ProfilerHook(steps=2, skip=2), run_in(tmp_path)
    run.phase = "train"
    hook.on_phase_start(run)
    for step in range(5):
        torch.full((4, 4), float(step)).sin() if step in (2, 3) else torch.ones(4, 4).cos()
        hook.on_step(run)
    hook.on_phase_end(run)
    hook.on_end(run)
    names = names_in(tmp_path / "profile.json")
    assert (names.count("aten::sin"), names.count("aten::cos")) == (2, 0)
    table = (tmp_path / "profile.txt").read_text()
    assert "aten::sin" in table
    assert "ProfilerStep" not in table  # a step is no operation


def names_in(trace: Path) -> list[str]:
    """Names of what has a beginning and an end in a Chrome trace, which must be valid JSON."""
    data = trace.read_bytes()
    data = gzip.decompress(data) if trace.suffix == ".gz" else data
    events = [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    assert {type(event["pid"]) for event in events} <= {int, str}
    return [event["name"] for event in events]


def profile_of(folder, steps: int, start: int = 0) -> Path:
    """Profile all steps of a run that resumes after `start` steps; returns the trace."""
    run = run_in(folder, TrainState(global_step=start))
    hook, run.phase = profiler.ProfilerHook(steps=steps, skip=0), "train"
    hook.on_phase_start(run)
    for _ in range(steps):
        torch.ones(2).sin()
        run.state.global_step += 1
        hook.on_step(run)
    hook.on_end(run)
    (trace,) = folder.glob("profile.json*")
    return trace


def test_steps_in_a_trace_have_their_numbers_in_the_run(tmp_path):
    names = names_in(profile_of(tmp_path, steps=2, start=7))
    steps = [name for name in names if name.startswith("ProfilerStep")]
    assert sorted(steps) == ["ProfilerStep#8", "ProfilerStep#9"]


def test_large_trace_is_compressed_and_no_old_one_stays(tmp_path, monkeypatch):
    """Perfetto reads both; profile.json next to it would be of another run."""
    assert profile_of(tmp_path, 1).name == "profile.json"
    monkeypatch.setattr(profiler, "LARGE", 100)
    assert profile_of(tmp_path, 1).name == "profile.json.gz"
    assert "aten::sin" in names_in(tmp_path / "profile.json.gz")
    monkeypatch.undo()
    assert profile_of(tmp_path, 1).name == "profile.json"


def test_files_of_a_profile_are_named_at_the_end_again(tmp_path, log):
    """Thousands of log lines come in between."""
    profile_of(tmp_path, 1)
    last = log.messages[-1]
    assert last == (
        f"{tmp_path}/profile.json: a trace of 1 step for https://ui.perfetto.dev; "
        f"{tmp_path}/profile.txt: the ten most expensive operations"
    )
    assert log.messages[0].startswith(last + "\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", []),
        ("--profile", ["profiler"]),
        ("--profile --hook csv", ["csv", "profiler"]),
        ("--profile --hook profiler(steps=7)", ["profiler(steps=7)"]),
        ("--profile --eval --finetune x", []),
    ],
)
def test_profile_is_the_hook(words, expected, tmp_path):
    words = f"--data_set DIGITS --output_dir {tmp_path} {words}".split()
    args = options.parse(options.finetune_parser(), words)
    assert [str(call) for call, _ in hook_table.find_hooks(args).values()] == expected


def test_profile_without_a_folder_is_refused():
    words = ["--data_set", "DIGITS", "--output_dir", "none", "--profile"]
    args = options.parse(options.pretrain_parser(), words)
    with pytest.raises(UserError, match=r"^--profile writes into --output_dir; give a folder$"):
        hook_table.check_hooks(args)


def test_profile_of_one_step_says_so(tmp_path, log):
    hook, run = profiler.ProfilerHook(steps=1, skip=0), run_in(tmp_path)
    run.phase = "train"
    hook.on_phase_start(run)
    hook.on_step(run)
    assert "profile.json: a trace of 1 step for https" in log.text


def test_run_without_enough_steps_for_a_profile_says_so(tmp_path, log):
    hook, run = profiler.ProfilerHook(skip=4), run_in(tmp_path, TrainState(epoch=2))
    run.phase = "train"
    hook.on_phase_start(run)
    hook.on_step(run)
    hook.on_phase_end(run)
    hook.on_end(run)
    assert log.messages == ["hook profiler: the run ended before step 5, so there is no profile"]
    assert not list(tmp_path.iterdir())


# --- TensorBoard ----------------------------------------------------------------------------


@dataclass
class Board:
    """A run with TensorBoard files in `folder`."""

    folder: object

    def run(self, hook, state: TrainState, *words: str, **more) -> tuple[Run, list]:
        words = ["--data_set", "DIGITS", "--epochs", "2", *words]
        args = options.parse(options.finetune_parser(), words)
        run = Run(args, self.folder, state, CPU, **more)
        return run, [tensorboard.TensorboardHook(self.folder / "tensorboard", state), hook]

    def read(self) -> EventAccumulator:
        assert [path.name for path in self.folder.iterdir()] == ["tensorboard"]
        return EventAccumulator(str(self.folder / "tensorboard")).Reload()


def test_histograms_hold_every_weight_of_chosen_epochs(tmp_path):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, math.inf]]))
    board = Board(tmp_path)
    run, both = board.run(tensorboard.HistogramHook(every=2), TrainState(), model=model)
    for hook in both:
        hook.on_start(run)
    for epoch in (1, 2, 3):
        both[1].on_epoch({}, TrainState(epoch, global_step=10 * epoch))
    both[0].on_end(run)
    events = board.read().Histograms("weights/weight")
    assert [event.step for event in events] == [20]
    assert (events[0].histogram_value.num, events[0].histogram_value.max) == (1, 1.0)  # no Inf


def test_hyper_parameters_are_in_the_same_folder_after_a_resumed_run_too(tmp_path):
    """SummaryWriter.add_hparams writes into a folder named by the time, at every call."""
    board = Board(tmp_path)
    for epoch, accuracy in ((1, 25.0), (2, 50.0), (2, 75.0)):
        state = TrainState(epoch, 10 * epoch, stats={"test_acc1": accuracy, "train_loss": 1.0})
        run, both = board.run(tensorboard.HparamsHook(), state, "--lr", "0.5")
        both[0].on_start(run)
        both[0].on_epoch(state.stats, state)
        for hook in reversed(both):
            hook.on_end(run)
    metadata = board.read().summary_metadata
    contents = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data.plugin_data.content)
        for tag, data in metadata.items()
        if data.plugin_data.plugin_name == "hparams"
    }
    start = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert start["lr"].number_value == 0.5
    assert start["model"].string_value == "convnextv2_base"
    assert "hflip" not in start
    metrics = contents["_hparams_/experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["test/acc1"]


def test_graph_is_traced_without_a_change_of_the_model(tmp_path):
    model = tiny.classifier(in_chans=3, num_classes=3, stem_stride=1)
    board = Board(tmp_path)
    words = ("--input_size", "16", "--stem_stride", "1")
    run, both = board.run(tensorboard.GraphHook(), TrainState(), *words, model=model)
    for hook in both:
        hook.on_start(run)
    both[0].on_end(run)
    assert model.training
    assert len(board.read().Graph().node) > 20


# --- export ---------------------------------------------------------------------------------


def test_export_runs_after_complete_runs_alone_and_says_what_went_wrong(tmp_path, log):
    hook = ExportHook("timm")
    run = run_in(tmp_path)
    run.error = KeyboardInterrupt()
    hook.on_end(run)  # of an interrupted run
    run.error = None
    with pytest.raises(UserError, match=r"export.py ended with code 2: .*--to timm is for"):
        hook.on_end(run)  # to timm, of a network with code


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--head", "mlp(4)"], "not for --head mlp(4); use one of onnx, torchscript, pt2, safe"),
        (["--heads", "a=linear@norm"], "not for --heads a=linear@norm; use one of onnx"),
        (["--model", "timm:resnet18"], "not for --model timm:resnet18; use one of onnx"),
        (["--head", "linear(dropout=0.1)"], ""),
    ],
)
def test_export_that_must_fail_is_refused_before_training(words, problem):
    args = options.parse(options.finetune_parser(), ["--data_set", "DIGITS", *words])
    ExportHook().check(args)  # as safetensors
    if problem:
        with pytest.raises(UserError) as error:
            ExportHook("timm").check(args)
        assert problem in str(error.value)
    else:
        ExportHook("timm").check(args)


def test_pretrained_weights_of_other_networks_are_not_exported():
    words = ["--data_set", "DIGITS", "--model", "timm:resnet18"]
    with pytest.raises(UserError, match="has no classifier in pre-training"):
        ExportHook().check(options.parse(options.pretrain_parser(), words))


def test_board_hook_names_the_flag_that_turns_the_files_off():
    words = ["--data_set", "DIGITS", "--log_dir", "none", "--output_dir", "x"]
    with pytest.raises(UserError, match="--log_dir none turns them off, so drop it"):
        tensorboard.GraphHook().check(options.parse(options.finetune_parser(), words))


def test_argument_of_a_hook_has_its_range():
    with pytest.raises(UserError, match=r"--hook costs\(depth\): got 0, expected an integer >=1"):
        costs.CostsHook(depth=0)
    with pytest.raises(UserError, match="got True"):
        log_files.ScheduleHook(rows=True)
    assert hooks._not_plain({"a": (1, "b", None, b"c", torch.ones(1))}) == ""
