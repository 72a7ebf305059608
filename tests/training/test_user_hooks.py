# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Hooks of --hook: when they are called and with what, their errors, states and names."""

import io
from types import SimpleNamespace

import pytest
import torch

from config import parser as options
from data_loading.loader import DeviceLoader
from errors import TrainingStopped, UserError
from tests import fakes
from training import hook_table, hooks
from training.checkpoint import TrainableParts, TrainState
from training.hooks import Batch
from training.steps import Steps

CPU = torch.device("cpu")
ME = "tests.fakes"
BASE = ["--data_set", "SYNTHETIC", "--output_dir", "runs/here"]


def parse(*words: str, pretrain: bool = False):
    parser = options.pretrain_parser() if pretrain else options.finetune_parser()
    return options.parse(parser, [*BASE, *words])


def reporter_of(**observers: hooks.Hook) -> hooks.Reporter:
    """Two epochs of two steps."""
    run = hooks.Run(SimpleNamespace(epochs=2), None, TrainState(), CPU)
    found = list(observers.values())
    return hooks.Reporter(found, CPU, run.state, Steps.even(2, 2), 9, observers=observers, run=run)


def batch() -> Batch:
    images, outputs = torch.ones(2, 3, 4, 4), torch.ones(2, 5, requires_grad=True)
    return Batch(images, torch.tensor([0, 1]), outputs * 2, outputs.sum(), torch.tensor([4, 2]))


def train_and_evaluate(reporter: hooks.Reporter, given: Batch) -> None:
    """One epoch of two steps of two micro-batches, and an evaluation of two batches."""
    loader = DeviceLoader([], CPU, [0.5], [0.5])
    means = reporter.begin_epoch(["loss"], loader)
    for step in range(4):
        means.update(2, loss=torch.tensor(1.5))
        reporter.after_batch(2, given)
        if step % 2:
            reporter.state.global_step += 1
            reporter.after_step(0.1)
    reporter.end_phase(means.total() | {"lr": 0.1})
    reporter.begin_phase("test", loader, "ema", "class")
    for _ in range(2):
        reporter.after_evaluated(given)
    assert reporter.end_phase({"loss": 0.5, "acc1": 50.0}) == {"loss": 0.5, "acc1": 50.0}
    reporter.state.epoch = 2


# --- points ---------------------------------------------------------------------------------


def test_points_come_in_order_in_training_and_evaluation():
    counter, given = fakes.Counter(), batch()
    with reporter_of(counter=counter) as reporter:
        train_and_evaluate(reporter, given)
    assert counter.points == [
        *("start at 0", "train", "step", "step", "train loss 1.5"),
        *("testema", "step", "step", "testema loss 0.5", "complete True"),
    ]
    assert counter.steps == 2  # optimizer steps; those of an evaluation do not count


def test_last_batch_is_that_of_the_step_without_copies_and_without_its_graph():
    """A kept graph would hold the activations of a step during the next one."""
    counter, given = fakes.Counter(), batch()
    with reporter_of(counter=counter) as reporter:
        train_and_evaluate(reporter, given)
        assert reporter.run.last_batch is None  # its memory is free between phases
    for seen in counter.batches:
        for name, tensor in seen._asdict().items():
            assert tensor.data_ptr() == getattr(given, name).data_ptr()
            assert not tensor.requires_grad
    quiet = reporter_of()
    quiet.after_evaluated(given)
    assert quiet.run.last_batch is None  # no hook, no memory


def test_failed_run_is_not_complete_for_its_hooks():
    counter = fakes.Counter()
    reporter = reporter_of(counter=counter)
    with pytest.raises(ZeroDivisionError), reporter:
        raise ZeroDivisionError
    assert counter.points[-1] == "complete False"
    assert isinstance(reporter.run.error, ZeroDivisionError)


def test_hooks_are_called_without_gradients_and_end_in_reverse():
    order = []

    class Noting(hooks.Hook):
        def on_step(self, run):
            order.append(torch.is_grad_enabled())

        def on_end(self, run):
            order.append(self)

    first, second = Noting(), Noting()
    with reporter_of(one=first, two=second) as reporter:
        reporter._notify("on_step", reporter.run)
        assert torch.is_grad_enabled()
    assert order == [False, False, second, first]


# --- errors ---------------------------------------------------------------------------------


def test_failure_names_hook_point_and_line_once_and_the_run_continues(log):
    failing, counter = fakes.Failing("on_step"), fakes.Counter()
    with reporter_of(**{f"{ME}:Failing": failing, "counter": counter}) as reporter:
        train_and_evaluate(reporter, batch())
    (text,) = (line for line in log.messages if not line.startswith("kernels chosen"))
    assert text.startswith(
        "hook tests.fakes:Failing failed in on_step (ZeroDivisionError in fakes.py, line "
    )
    end = ": of a hook); the run continues, and further failures of it are not reported"
    assert text.endswith(end)
    assert counter.steps == 2


def test_failure_at_the_end_says_that_the_checkpoints_are_complete(log):
    """It said that the run continues and tries again, and gave the place in the hook."""
    with reporter_of(**{"export": fakes.Failing("on_end", "UserError")}):
        pass
    (text,) = log.messages
    expected = "hook export failed in on_end (of a hook)"
    assert text == expected + "; training and checkpoints are complete"
    with (
        pytest.raises(KeyError),
        reporter_of(**{"export": fakes.Failing("on_end", "UserError")}),
    ):
        raise KeyError
    assert log.messages[1] == expected


@pytest.mark.parametrize(
    ("point", "kind", "expected"),
    [
        (
            "on_start",
            "ZeroDivisionError",
            "on_start .ZeroDivisionError in fakes.py, line .*a hook",
        ),
        ("on_step", "UserError", "^of a hook$"),  # deliberately
        ("on_phase_end", "TrainingStopped", "^of a hook$"),
    ],
)
def test_failure_at_the_start_and_a_wish_to_stop_end_the_run(point, kind, expected):
    error = TrainingStopped if kind == "TrainingStopped" else UserError
    with (
        pytest.raises(error, match=expected),
        reporter_of(bad=fakes.Failing(point, kind)) as reporter,
    ):
        train_and_evaluate(reporter, batch())


def test_hook_of_all_ranks_that_fails_ends_the_run_as_others_would_wait(monkeypatch):
    reporter = reporter_of(bad=fakes.Failing("on_step", every_rank=True))
    reporter._notify("on_step", reporter.run)  # alone: a warning
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="hook bad failed in on_step"):
        reporter._notify("on_step", reporter.run)


def test_failure_at_the_end_does_not_hide_the_error_of_the_run(log):
    with pytest.raises(KeyError), reporter_of(bad=fakes.Failing("on_end", "UserError")):
        raise KeyError("of the run")
    assert "hook bad failed in on_end" in log.messages[0]


# --- states ---------------------------------------------------------------------------------


def attach(reporter: hooks.Reporter, saved: dict | None) -> None:
    model = torch.nn.Linear(1, 1)
    reporter.attach(TrainableParts(model, torch.optim.SGD(model.parameters())), None, saved)


def test_state_is_in_the_checkpoint_and_comes_back():
    counter = fakes.Counter()
    with reporter_of(counter=counter, other=hooks.Hook()) as reporter:
        train_and_evaluate(reporter, batch())
        saved = reporter.hook_states()
    assert saved == {"hooks": {"counter": {"steps": 2}}}
    assert reporter_of(other=hooks.Hook()).hook_states() == {}  # as before there were hooks
    resumed = fakes.Counter()
    reporter = reporter_of(counter=resumed)
    attach(reporter, saved["hooks"])
    with reporter:
        assert resumed.points == ["start at 2"]


class Holding(hooks.Hook):
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}


def test_state_of_a_checkpoint_is_not_what_the_hook_changes_later():
    """A checkpoint may be written in the background."""
    held = Holding([torch.zeros(2)])
    saved = reporter_of(held=held).hook_states()["hooks"]["held"]
    held.value[0] += 1
    assert saved["value"][0].tolist() == [0, 0]


@pytest.mark.parametrize("value", [CPU, {"a": [1, {2, 3}]}, SimpleNamespace()])
def test_state_that_could_not_be_loaded_is_left_out(value, log):
    """torch.load(weights_only=True) refuses the whole file: no run could resume from it."""
    states = reporter_of(held=Holding(value), counter=fakes.Counter()).hook_states()
    assert states == {"hooks": {"counter": {"steps": 0}}}
    assert "hook held failed in state_dict (state_dict() holds a " in log.messages[0]
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == states


def test_hooks_may_come_and_leave_between_runs(log):
    counter = fakes.Counter(5)
    attach(reporter_of(counter=counter), {"gone": {"steps": 1}})
    assert counter.steps == 5
    assert "has states of hooks that are not given; they are dropped: gone" in log.messages[0]
    with pytest.raises(UserError, match="hook counter failed in load_state_dict .*KeyError"):
        attach(reporter_of(counter=counter), {"counter": {}})


# --- names ----------------------------------------------------------------------------------


def test_flags_of_two_places_add_up_and_the_command_line_replaces_a_file(tmp_path):
    args = parse("--hook", "csv", "schedule", "--hook", f"{ME}:Counter(start=3)")
    assert args.hook == ("csv", "schedule", f"{ME}:Counter(start=3)")
    made = hook_table.create_hooks(args)
    assert list(made) == ["csv", "schedule", f"{ME}:Counter"]
    assert made[f"{ME}:Counter"].steps == 3
    file = tmp_path / "flags.yaml"
    file.write_text("hook: [csv, schedule]\n")
    assert parse("--config", str(file)).hook == ("csv", "schedule")
    assert parse("--config", str(file), "--hook", "costs").hook == ("costs",)


def test_hook_of_the_user_may_be_given_twice():
    made = hook_table.create_hooks(parse("--hook", f"{ME}:Counter(1)", f"{ME}:Counter(2)"))
    assert {name: hook.steps for name, hook in made.items()} == {
        f"{ME}:Counter": 1,
        f"{ME}:Counter 2": 2,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["histogramms"], "--hook: unknown hook 'histogramms'. Did you mean 'histograms' or"),
        (
            ["histograms(often=3)"],
            "unexpected keyword argument 'often'; it takes every=1",
        ),
        (["histograms(every=x)"], "--hook histograms(every): got 'x', expected an integer >=1"),
        (["histograms(every=3"], "--hook: '(' is not closed\n  histograms(every=3\n            ^"),
        (["csv", "csv"], "--hook csv is given twice"),
        (["export(to=tims)"], "--hook export(to): unknown format 'tims'. Did you mean 'timm'?"),
        (["nowhere.at_all:Hook"], "looked in the working folder "),
        ([f"{ME}:Lost"], "cannot import hook 'tests.fakes:Lost': module 'tests.fakes' has no"),
        ([f"{ME}:Counter(begin=1)"], "it takes start=0"),
        ([f"{ME}:CALLS"], "tests.fakes:CALLS is a list, expected a class of hooks"),
        (["math:pi"], "math:pi is a float, expected a class of hooks"),
        ([f"{ME}:NoHook"], f"{ME}:NoHook is no hook; expected a subclass of training.hooks."),
        ([f"{ME}:number"], f"{ME}:number gives an int; expected a subclass of training.hooks."),
        (["csv csv"], "expected the end, after one name, perhaps with (arguments)\n  csv csv\n"),
        (["predictions", "--disable_eval"], "--disable_eval true has no evaluation"),
        (["export", "--save_ckpt", "false"], "--save_ckpt false leaves nothing to export"),
        (["graph", "--shard", "fsdp"], "--hook graph cannot trace sharded weights"),
        (["costs", "--shard", "fsdp"], "--hook costs cannot run one rank's shard"),
        (["csv", "--output_dir", "none"], "--hook csv writes into --output_dir; give a folder"),
        (["histograms", "--log_dir", "none"], "--hook histograms writes to TensorBoard files"),
    ],
)
def test_wrong_hook_is_refused_before_data_is_listed(words, expected):
    with pytest.raises(UserError) as caught:
        hook_table.check_hooks(parse("--hook", *words))
    assert expected in str(caught.value)


def test_flags_of_training_do_not_matter_to_eval(tmp_path):
    """The command that a finished run prints was refused, with the flags of its args.yaml."""
    ended = ["--finetune", "x", "--reset_head", "--tracker", "wandb", "--cuda_graphs"]
    ended += ["--patience", "2", "--hook", "csv", "costs", f"{ME}:Counter"]
    (tmp_path / "args.yaml").write_text(options.dump_args(parse(*ended)))
    words = ["--config", str(tmp_path / "args.yaml"), "--eval"]
    args = options.parse(options.finetune_parser(), words)
    hook_table.check_hooks(args)
    assert list(hook_table.create_hooks(args)) == ["costs", f"{ME}:Counter"]


def test_pretraining_has_no_predictions():
    with pytest.raises(UserError, match="pre-training has no evaluation"):
        hook_table.check_hooks(parse("--hook", "predictions", pretrain=True))


def test_function_that_returns_a_hook_is_one():
    assert hook_table.create_hooks(parse("--hook", f"{ME}:counter(4)"))[f"{ME}:counter"].steps == 4


def test_hook_whose_constructor_fails_names_its_line():
    with pytest.raises(UserError, match=r"--hook tests.fakes:Counter\(start=1\): .* in test_user_"):
        hook_table._create(
            hook_table.parse_call(f"{ME}:Counter(start=1)", "--hook"), lambda start: 1 / 0
        )


def test_other_ranks_have_the_hooks_of_all_ranks_alone(monkeypatch):
    monkeypatch.setattr(hook_table, "is_main_process", lambda: False)
    words = ("csv", "predictions", "histograms", f"{ME}:Counter")
    made = hook_table.create_hooks(parse("--hook", *words, "--tracker", f"{ME}:tracker"))
    assert list(made) == ["predictions", "histograms"]


def test_module_that_a_hook_imports_and_is_missing_is_not_looked_for_here(tmp_path, monkeypatch):
    (tmp_path / "hooks_of_mine.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        hook_table.check_hooks(parse("--hook", "hooks_of_mine:A"))
    assert str(caught.value).endswith("No module named 'no_such_package'")
