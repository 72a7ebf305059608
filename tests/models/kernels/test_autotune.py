# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The autotuner: which implementation runs, its cache file, the choices of a run."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_loading.loader import DeviceLoader
from errors import UserError
from models.kernels import autotune, ops
from parallel.process_group import all_gather
from tests import tiny
from tests.groups import results_of, run_ranks
from tests.test_end_to_end import PRETRAIN, assert_same, run, weights
from training import hooks, resume
from training.checkpoint import TrainState
from training.steps import Steps

CPU = torch.device("cpu")
X = torch.ones(2, 3)
SUMS = {"torch": lambda x: x + 1, "onednn": lambda x: 1 + x, "third": lambda x: x - -1}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Folder of this test's cache file; nothing has been chosen yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "autotuner", autotune.Autotuner())
    return tmp_path / "convnextv2"


@pytest.fixture
def timed(monkeypatch, folder):
    """A function that sets the times of SUMS and returns a list of the names that are timed."""

    def times(*seconds):
        timings = []

        def measure(implementations, args, device):
            timings.extend(implementations)
            return dict(zip(SUMS, seconds, strict=True)), True

        monkeypatch.setattr(autotune, "measure", measure)
        return timings

    return times


def choose(tuner=None, key=(1, 2), like=X, implementations=SUMS):
    tuner = tuner or autotune.autotuner
    return tuner.choose("sum", implementations, key, like, lambda: (like,))


def test_nothing_is_timed_under_fake_tensors_and_counting_modes(timed):
    """Fake times used to stay in the cache file, and the slow implementation was chosen."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    timings = timed(1.0, 0.5, 0.25)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert choose() == "torch"
    assert choose(like=mode.from_tensor(X)) == "torch"
    with FlopCounterMode(display=False):
        assert choose() == "torch"
    assert not timings
    assert choose() == "third"
    with FlopCounterMode(display=False):  # it does not know the operations of the others
        assert choose() == "torch"


def test_linear_is_timed_in_the_tensors_own_dtype(folder):
    """A default of float64 gave oneDNN, which has none, the time infinity."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ops.linear(torch.ones(2, 3, dtype=torch.float32), torch.ones(4, 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    times = autotune.autotuner.seconds.get("linear float32", {})
    assert all(seconds < float("inf") for seconds in times.values())
    assert bool(times) == torch.backends.mkldnn.is_available()


# --- choosing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ((3.0, 2.0, 1.0), "third"),
        ((3.0, 1.0, 2.0), "onednn"),
        ((1.0, 2.0, 3.0), "torch"),
        ((1.0, 0.91, 0.92), "torch"),  # noise may not decide
        ((1.0, 0.89, 0.95), "onednn"),
    ],
)
def test_fastest_implementation_is_chosen_unless_torchs_is_nearly_as_fast(timed, seconds, taken):
    timed(*seconds)
    assert autotune.GAIN == 0.9
    assert choose() == taken


def test_chosen_implementation_is_the_one_that_runs(timed):
    timed(3, 2, 1)
    marked = {name: lambda x, name=name: name for name in SUMS}
    autotune.autotuner.chosen[("sum", "cpu", torch.float32, (2, 3))] = "third"
    assert autotune.dispatch("sum", marked, (), X) == "third"


def test_each_choice_is_timed_once(timed):
    """One for each operation, key and dtype; not at every step."""
    timings = timed(3, 2, 1)
    for _ in range(3):
        choose()
    assert timings == list(SUMS)
    choose(key=(2, 2))
    choose(like=X.double())
    autotune.autotuner.choose("difference", SUMS, (1, 2), X, lambda: (X,))
    assert len(timings) == 4 * len(SUMS)


def test_operation_with_one_implementation_is_never_timed(timed, folder):
    timings = timed(3, 2, 1)
    assert autotune.dispatch("sum", {"torch": SUMS["torch"]}, (), X).equal(X + 1)
    assert choose(implementations={"torch": SUMS["torch"]}) == "torch"
    assert timings == []
    assert not folder.exists()


def test_implementations_for_gpus_are_not_tried_on_a_cpu(monkeypatch, folder):
    """Timing Triton's interpreter, which tests switch on, would take minutes."""
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("timed"))
    implementations = {"torch": SUMS["torch"], "native": SUMS["third"], "triton": SUMS["third"]}
    assert choose(implementations=implementations) == "torch"


class Clock:
    """Implementations that take given times, one value a call, and the clock that shows them.

    The last value repeats.
    """

    def __init__(self, monkeypatch, **times):
        self.now, self.calls, self.times = 0.0, [], times
        monkeypatch.setattr(autotune.time, "perf_counter", lambda: self.now)

    def run(self, name):
        count = self.calls.count(name)
        self.calls.append(name)
        self.now += self.times[name][min(count, len(self.times[name]) - 1)]
        assert not torch.is_grad_enabled()

    def measure(self):
        own = {name: lambda name=name: self.run(name) for name in self.times}
        return autotune.measure(own, (), CPU)


def test_measuring_takes_the_shortest_call_and_leaves_no_graph(monkeypatch):
    """The first call, which compiles, does not count; each is called in turn."""
    clock = Clock(monkeypatch, torch=[0.5, 4, 3, 2, 4], onednn=[9, 5, 6, 4, 7])
    assert clock.measure() == ({"torch": 2, "onednn": 4}, True)
    assert clock.calls == ["torch", "onednn"] * (1 + 3 + autotune.STABLE)


def test_measuring_goes_on_while_times_still_shrink(monkeypatch):
    """Another program slowed down the first calls, and the wrong answer was kept for ever."""
    noisy = [9] + [8.0] * autotune.STABLE + [1.0]
    clock = Clock(monkeypatch, torch=[4.0], onednn=noisy)
    seconds, stable = clock.measure()
    assert stable
    assert autotune.fastest(seconds) == "onednn"


def test_answer_that_never_becomes_stable_is_used_and_not_kept(monkeypatch, folder):
    """The next run measures again."""
    shrinking = [0.9**call for call in range(2 * autotune.ROUNDS)]
    clock = Clock(monkeypatch, torch=[100.0], onednn=shrinking)
    own = {name: lambda _, name=name: clock.run(name) for name in clock.times}
    assert choose(implementations=own) == "onednn"
    assert clock.calls.count("torch") == 1 + autotune.ROUNDS
    autotune.autotuner.save()
    assert not folder.exists()
    assert choose(autotune.Autotuner(), implementations=own) == "onednn"
    assert clock.calls.count("torch") == 2 * (1 + autotune.ROUNDS)


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, 1), (2, 2), (3, 4), (56, 64), (64, 64)])
def test_sizes_are_rounded_up_to_powers_of_two(size, rounded):
    assert autotune.round_up(size) == rounded


def test_one_choice_serves_similar_sizes(timed):
    """Images of any height and width were each timed, and each wrote the file again."""
    timings = timed(3, 2, 1)
    for height in range(33, 65):
        for width in (40, 64):
            autotune.dispatch("sum", SUMS, (7,), torch.ones(5, height, width, 3))
    assert timings == list(SUMS)
    (entries,) = autotune.autotuner.state().values()
    assert entries == {"sum float32 8 64 64 3 7": "third"}
    autotune.dispatch("sum", SUMS, (7,), torch.ones(5, 65, 64, 3))
    autotune.dispatch("sum", SUMS, (7,), torch.ones(5, 64, 64, 4))  # channels are exact
    autotune.dispatch("sum", SUMS, (5,), torch.ones(5, 64, 64, 3))
    assert timings == 4 * list(SUMS)


def test_compiler_sees_the_first_implementation_alone(timed):
    """Measuring cannot be compiled, and would break the graph."""
    timings = timed(3, 2, 1)
    call = torch.compile(
        lambda x: autotune.dispatch("sum", SUMS, (), x), backend="eager", fullgraph=True
    )
    assert call(X).equal(X + 1)
    assert timings == []


# --- the file ----------------------------------------------------------------------------


def test_choice_is_cached_and_the_next_process_times_nothing(timed, folder):
    timed(3, 1, 2)
    assert choose() == "onednn"
    autotune.autotuner.save()
    file = autotune.cache_file("cpu")
    assert list(folder.glob("[!.]*")) == [file]
    assert json.loads(file.read_text()) == {"sum float32 1 2": "onednn"}
    timings = timed(1, 2, 3)  # it would decide otherwise
    assert choose(autotune.Autotuner()) == "onednn"
    assert timings == []


def test_second_choice_is_added_to_the_first(timed, folder):
    timed(3, 1, 2)
    for key in ((1, 2), (5,)):
        tuner = autotune.Autotuner()
        choose(tuner, key=key)
        tuner.save()
    cached = json.loads(autotune.cache_file("cpu").read_text())
    assert cached == {"sum float32 1 2": "onednn", "sum float32 5": "onednn"}


FOREIGN = ["", "{", "no json", "[1, 2]", "3", "null", '"text"', "[[1, 2, 3]]", "\udcff"]


@pytest.mark.parametrize("text", FOREIGN)
def test_file_that_is_not_ours_is_replaced(timed, folder, text):
    timed(3, 1, 2)
    folder.mkdir()
    autotune.cache_file("cpu").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert choose() == "onednn"
    autotune.autotuner.save()
    assert json.loads(autotune.cache_file("cpu").read_text()) == {"sum float32 1 2": "onednn"}


@pytest.mark.parametrize("value", ["gone", "triton", None, 3, ["onednn"], {}])
def test_cached_implementation_that_does_not_exist_is_replaced(timed, folder, value):
    """Left there by another version of the toolkit."""
    timings = timed(3, 1, 2)
    folder.mkdir()
    file = autotune.cache_file("cpu")
    file.write_text(json.dumps({"sum float32 1 2": value, "other": "torch"}))
    assert choose() == "onednn"
    assert timings == list(SUMS)
    autotune.autotuner.save()
    assert json.loads(file.read_text()) == {"sum float32 1 2": "onednn", "other": "torch"}


@pytest.mark.parametrize("obstacle", ["a file in its place", "a read-only folder"])
def test_folder_that_cannot_be_written_stops_nothing(timed, folder, tmp_path, obstacle):
    timed(3, 1, 2)
    if obstacle == "a file in its place":
        folder.write_text("")
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
    try:
        assert choose() == "onednn"
        autotune.autotuner.save()
    finally:
        tmp_path.chmod(0o700)


def test_disk_that_is_full_stops_nothing(timed, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    timed(3, 1, 2)
    monkeypatch.setattr(autotune, "write_atomically", full)
    assert choose() == choose() == "onednn"
    autotune.autotuner.save()


def test_other_machine_version_or_threads_have_a_file_of_their_own(folder, monkeypatch):
    """A home directory is shared by a cluster's machines."""
    files = {autotune.cache_file("cpu")}
    for target, name, value in (
        (autotune, "_processor", lambda: "Another CPU @ 3.0 GHz / 2"),
        (torch, "__version__", "2.99.0+cu999"),
        (torch, "get_num_threads", lambda: 77),
        (torch.cuda, "get_device_name", lambda: "NVIDIA H999 80GB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            files.add(autotune.cache_file("cuda" if target is torch.cuda else "cpu"))
    assert len(files) == 5
    for file in files:
        assert file.parent == folder
        assert re.fullmatch(r"[\w.+-]+\.json", file.name)


def test_without_xdg_the_file_is_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if unset is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert autotune.cache_file("cpu").parent == tmp_path / ".cache" / "convnextv2"


def test_tests_write_nothing_into_the_users_own_cache():
    assert Path(os.environ["XDG_CACHE_HOME"]).name.startswith("tmp")
    assert Path.home() not in autotune.cache_file("cpu").parents


# --- --kernels ---------------------------------------------------------------------------


def test_torch_takes_the_first_implementation_and_never_times(timed, folder):
    timings = timed(3, 2, 1)
    autotune.set_kernels("torch", CPU)
    assert choose() == "torch"
    assert autotune.dispatch("sum", SUMS, (), X).equal(X + 1)
    assert timings == []
    assert not folder.exists()


def test_triton_takes_triton_where_there_is_one_and_never_measures(timed, monkeypatch):
    timings = timed(3, 2, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(autotune, "_has_triton", lambda: True)
    autotune.set_kernels("triton", CPU)
    assert choose(implementations={**SUMS, "triton": SUMS["torch"]}) == "triton"
    assert choose(key=()) == "torch"
    assert timings == []


def test_mode_that_is_set_counts_for_what_was_chosen_before(timed):
    timed(3, 2, 1)
    assert choose() == "third"
    autotune.set_kernels("torch", CPU)
    assert choose() == "torch"
    autotune.set_kernels("auto", CPU)
    assert choose() == "third"


@pytest.mark.parametrize("interpret", [None, "0"])
def test_triton_without_a_gpu_is_refused_with_a_remedy(folder, monkeypatch, interpret):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(UserError, match=r"--kernels triton.*cpu.*--kernels auto.*TRITON_INTERPRET"):
        autotune.set_kernels("triton", CPU)
    assert autotune.autotuner.mode == "auto"


def test_triton_that_is_not_installed_is_refused(folder, monkeypatch):
    monkeypatch.setattr(autotune, "_has_triton", lambda: False)
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match="--kernels auto"):
            autotune.set_kernels("triton", torch.device(device))


# --- the log -------------------------------------------------------------------------


def test_summary_names_operations_and_implementations(timed):
    timed(3, 1, 2)
    reason = "(--kernels auto: the fastest on this device)"
    choose(key=(1,))
    timed(1, 2, 3)
    choose(key=(3,))
    autotune.autotuner.choose("difference", SUMS, (), X, lambda: (X,))
    texts = "difference by torch, sum by onednn, sum by torch"
    assert autotune.autotuner.summary() == f"{texts} {reason}"
    autotune.set_kernels("torch", CPU)
    assert choose() == "torch"
    assert autotune.autotuner.summary() == "sum by torch (--kernels torch)"


def test_log_says_once_which_kernels_run(timed, log, monkeypatch):
    """At the first log line, when every choice is made: of a resumed run too. Then they are saved,
    since a run may be killed before it ends.
    """
    timed(3, 1, 2)
    monkeypatch.setattr(hooks, "autotuner", autotune.autotuner)
    for chosen in (False, True):  # the first run has none of our operations
        if chosen:
            choose()
        state = TrainState(global_step=6)
        reporter = hooks.Reporter([], CPU, state, Steps.even(6, 2), 2)
        reporter.begin_epoch(["loss"], DeviceLoader([X], CPU, [0.5], [0.5]))
        for _ in range(6):
            state.global_step += 1
            reporter.after_batch(1)
            reporter.after_step(0.1)
    lines = [message for message in log.messages if message.startswith("kernels")]
    assert lines == ["kernels chosen: sum by onednn (--kernels auto: the fastest on this device)"]
    cached = json.loads(autotune.cache_file("cpu").read_text())
    assert cached == {"sum float32 1 2": "onednn"}


@pytest.mark.slow
def test_run_with_triton_and_no_gpu_is_one_line_that_helps():
    words = [*PRETRAIN, "--output_dir", "", "--kernels", "triton"]
    done = run("main_pretrain.py", *words, env={"TRITON_INTERPRET": "0"}, expect=2)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "--kernels triton" in errors[0]
    assert "TRITON_INTERPRET=1" in errors[0]
    assert "Traceback" not in done.stderr


def two(data_path: str, train: bool) -> tiny.Colors:
    """Images for one update, since Triton's interpreter is slow."""
    return tiny.Colors(2)


@pytest.mark.slow
def test_run_with_triton_in_the_interpreter_trains():
    pytest.importorskip("triton")
    words = [*PRETRAIN, "--output_dir", "", "--kernels", "triton", "--batch_size", 2]
    words += ["--epochs", 1, "--data_set", "tests.models.kernels.test_autotune:two"]
    done = run("main_pretrain.py", *words, env={"TRITON_INTERPRET": "1"})
    line = re.search(r"kernels chosen: (.*) \(--kernels triton\)", done.stdout)[1]
    assert {"depthwise norm by triton", "mlp gradients by triton"} <= set(line.split(", "))


def test_implementation_that_fails_is_left_out(folder):
    """A kernel may not fit a device or its memory; the others still run."""

    def failing(x):
        raise RuntimeError("out of resources")

    implementations = {"torch": lambda x: x + 1, "onednn": failing}
    assert choose(implementations=implementations) == "torch"
    autotune.autotuner.save()
    assert not folder.exists()  # the next run, which may have more memory, tries again


def test_without_a_home_folder_a_run_continues(timed, folder, monkeypatch):
    timed(3, 1, 2)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert choose() == "onednn"
    autotune.autotuner.save()


def test_entries_that_another_process_adds_meanwhile_stay(timed, folder):
    timed(3, 1, 2)
    ours, theirs = autotune.Autotuner(), autotune.Autotuner()
    choose(ours, key=(1,))
    choose(theirs, key=(2,))
    theirs.save()
    choose(ours, key=(3,))
    ours.save()
    cached = json.loads(autotune.cache_file("cpu").read_text())
    assert set(cached) == {"sum float32 1", "sum float32 2", "sum float32 3"}


def test_file_is_written_once_for_all_choices(timed, folder, monkeypatch):
    """It was written and synchronized with the disk for each of them."""
    written, write = [], autotune.write_atomically
    monkeypatch.setattr(
        autotune, "write_atomically", lambda text, path: written.append(path) or write(text, path)
    )
    timed(3, 1, 2)
    for key in range(5):
        choose(key=(key,))
    assert written == []
    autotune.autotuner.save()
    autotune.autotuner.save()
    assert written == [autotune.cache_file("cpu")]
    other = autotune.Autotuner()
    choose(other, key=(4,))  # read from the file
    other.save()
    assert len(written) == 1


@pytest.mark.slow
def test_choices_of_a_process_that_ends_are_in_the_file(folder):
    """An evaluation or a script of the user has no log line at which they are written."""
    code = (
        "import math\n"
        "from models.kernels import autotune\n"
        "from tests.models.kernels.test_autotune import choose\n"
        "times = {'torch': 3.0, 'onednn': 1.0, 'third': 2.0}\n"
        "autotune.measure = lambda *_: (times, True)\n"
        "choose()\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text()) == {"sum float32 1 2": "onednn"}


def test_lock_that_is_not_released_stops_nothing(timed, folder, monkeypatch):
    monkeypatch.setattr(autotune, "PATIENCE", 0.1)
    timed(3, 1, 2)
    folder.mkdir()
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert choose() == "onednn"
        autotune.autotuner.save()


# --- the run's own choices -----------------------------------------------------------------


def test_resumed_run_keeps_its_choices_though_others_would_be_made_now(timed, folder, log):
    timed(3, 1, 2)
    assert choose() == "onednn"
    state = autotune.autotuner.state()
    assert state == {autotune.cache_file("cpu").stem: {"sum float32 1 2": "onednn"}}
    autotune.autotuner.save()
    autotune.cache_file("cpu").write_text('{"sum float32 1 2": "third"}')
    autotune.set_kernels("auto", CPU)
    autotune.autotuner = autotune.Autotuner()
    timings = timed(3, 2, 1)
    autotune.autotuner.restore(state, CPU)
    assert choose() == "onednn"
    assert choose(key=(5,)) == "third"  # what the run has not chosen yet
    assert timings == list(SUMS)
    assert log.messages == []
    (entries,) = autotune.autotuner.state().values()
    assert entries == {"sum float32 1 2": "onednn", "sum float32 5": "third"}


def test_choices_not_used_since_the_start_are_saved_again(folder):
    """A run may be stopped before its first evaluation."""
    state = {autotune.cache_file("cpu").stem: {"sum float32 5": "third"}, "another": {"x": "torch"}}
    autotune.autotuner.restore(state, CPU)
    assert autotune.autotuner.state() == state


def test_new_run_of_the_process_has_no_choices_of_the_one_before(timed, folder):
    autotune.autotuner.restore(
        {autotune.cache_file("cpu").stem: {"sum float32 1 2": "onednn"}}, CPU
    )
    autotune.set_kernels("auto", CPU)
    timed(3, 2, 1)
    assert choose() == "third"


def test_resumed_run_chooses_again_where_device_or_versions_differ(timed, folder, log, monkeypatch):
    timed(3, 1, 2)
    choose()
    state, before = autotune.autotuner.state(), autotune.cache_file("cpu").stem
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    autotune.autotuner = autotune.Autotuner()
    timed(3, 2, 1)
    autotune.autotuner.restore(state, CPU)
    now = autotune.cache_file("cpu").stem
    text = f"kernels: choosing again, since the run was on {before} and this is {now}"
    assert log.messages == [text]
    assert choose() == "third"
    # The old ones stay, if the run goes back.
    assert autotune.autotuner.state() == state | {now: {"sum float32 1 2": "third"}}


def test_resumed_run_whose_implementation_is_gone_chooses_again(timed, folder):
    timed(3, 1, 2)
    autotune.autotuner.restore({autotune.cache_file("cpu").stem: {"sum float32 1 2": "gone"}}, CPU)
    assert choose() == "onednn"


def test_checkpoint_without_choices_says_nothing(folder, log):
    point = resume.ResumePoint("x", {"model": {}, "optimizer": {}, "state": {}})
    autotune.autotuner.restore(point.entry("kernels", {}), CPU)
    assert autotune.autotuner.state() == {}
    assert log.messages == []


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_other_modes_ignore_the_choices_of_the_run(folder, monkeypatch, mode, log):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(autotune, "_has_triton", lambda: True)
    autotune.set_kernels(mode, CPU)
    autotune.autotuner.restore({autotune.cache_file("cpu").stem: {"sum float32 1 2": "third"}}, CPU)
    assert choose() == "torch"
    autotune.autotuner.restore({"another": {}}, CPU)
    assert log.messages == []


def choice_of_rank(rank: int, folder: Path) -> list[str]:
    """Each has a cache file of its own with another content; they choose in different orders."""
    os.environ["XDG_CACHE_HOME"] = str(folder / str(rank))
    autotune.cache_file("cpu").parent.mkdir(parents=True)
    cached = {f"sum float32 {key}": list(SUMS)[1 + rank] for key in range(4)}
    autotune.cache_file("cpu").write_text(json.dumps(cached))
    keys = (0, 1, 2, 3) if rank == 0 else (3, 2, 1, 0)
    taken = {key: choose(key=(key,)) for key in keys}
    all_gather(0)  # rank 0, which holds what they agree on, must not end before the others
    return [taken[key] for key in range(4)]


@pytest.mark.slow
def test_ranks_of_a_run_take_the_same_implementations(tmp_path):
    """Each took its own measurement, and a checkpoint holds only those of rank 0."""
    ranks = results_of(run_ranks([choice_of_rank], 2, tmp_path))
    assert ranks[0] == ranks[1]
    assert set(ranks[0]["choice_of_rank"]) <= {"onednn", "third"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
def test_run_resumed_after_the_file_has_changed_ends_with_the_same_weights(tmp_path):
    """Requeued jobs continued with what others had timed meanwhile."""

    def train(name: str, *words: object, expect: int = 0) -> str:
        done = run(
            *("main_pretrain.py", *PRETRAIN, "--output_dir", tmp_path / name, *words),
            env={"XDG_CACHE_HOME": str(tmp_path)},
            expect=expect,
        )
        (said,) = re.findall("kernels chosen: (.*)", done.stdout)  # once
        return said

    file = tmp_path / "convnextv2" / autotune.cache_file("cpu").name
    file.parent.mkdir()
    file.write_text('{"linear float32": "onednn"}')
    said = train("whole")
    assert "linear by onednn" in said
    train("resumed", "--max_minutes", 0.0001, "--print_freq", 1, expect=75)
    file.write_text('{"linear float32": "torch"}')
    assert train("resumed") == said
    assert_same(*(weights(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "resumed")))
