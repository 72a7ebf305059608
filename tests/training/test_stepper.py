# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Accumulation, scaling, clipping, skipped updates, by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from errors import UserError
from optim_factory import create_optimizer
from training.stepper import WARMUP_STEPS, Stepper, autocast, choose_amp, clip_adaptively

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


class Product(nn.Module):
    """weight * x: with loss = output the gradient is x."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: float) -> torch.Tensor:
        return (self.weight * x).sum()


def product(lr=1.0, weight=1.0, momentum=0.0, fused=False, **options):
    """A one-number model under SGD with its stepper, an epoch of a hundred micro-batches begun."""
    model = Product(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, fused=fused)
    stepper = Stepper(model, optimizer, CPU, **options)
    stepper.begin_epoch(100)
    return model, optimizer, stepper


def feed(model, stepper, *values):
    """One micro-batch for each value; returns what the last `step` returned."""
    for x in values:
        with stepper.micro_batch():
            loss = model(x)
        update = stepper.step(loss)
    return update


# --- accumulation ---------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).double()


def train(batch: int, update_freq: int, images: torch.Tensor, epochs: int, **options) -> nn.Module:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stepper = Stepper(model, optimizer, CPU, update_freq=update_freq, **options)
    batches = images.split(batch)
    for _ in range(epochs):
        stepper.begin_epoch(len(batches))
        for x in batches:
            with stepper.micro_batch():
                loss = (model(x) - x[:, :2]).square().mean()
            stepper.step(loss)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_parameters_without_a_gradient_are_fine_in_a_single_process():
    used, idle = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.ModuleList([used, idle])
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=1.0), torch.device("cpu"))
    stepper.begin_epoch(1)
    with stepper.micro_batch():
        loss = used(torch.ones(1, 1)).sum()
    assert stepper.step(loss).taken


@pytest.mark.parametrize("clip_grad", [None, 0.05])
@pytest.mark.parametrize("update_freq", [2, 3, 4])
def test_small_batches_accumulated_are_one_large_batch(update_freq, clip_grad):
    """12 images a group; 30 images leave a last group of 6, which counts as 6 and not as 12."""
    images = torch.randn(30, 3, dtype=torch.float64)
    small = train(
        12 // update_freq, update_freq, images[: 24 + 12 // update_freq], 3, clip_grad=clip_grad
    )
    large = train(12, 1, images[: 24 + 12 // update_freq], 3, clip_grad=clip_grad)
    assert_equal(small, large)


def test_last_group_of_an_epoch_is_divided_by_what_it_holds():
    model, _, stepper = product(update_freq=3)
    stepper.begin_epoch(5)
    assert feed(model, stepper, 1, 2) is None
    assert feed(model, stepper, 6).taken
    assert model.weight.item() == pytest.approx(1 - 3)  # the mean of 1, 2, 6
    assert feed(model, stepper, 4) is None
    assert feed(model, stepper, 8).taken  # the fifth of five closes its group
    assert model.weight.item() == pytest.approx(1 - 3 - 6)


def test_epoch_shorter_than_a_group_is_one_update():
    model, _, stepper = product(update_freq=64)
    stepper.begin_epoch(2)
    assert feed(model, stepper, 1) is None
    assert feed(model, stepper, 3).taken
    assert model.weight.item() == pytest.approx(1 - 2)


def test_every_epoch_begins_with_a_fresh_group():
    """What a broken-off epoch left must not leak into the next."""
    model, _, stepper = product(update_freq=4)
    feed(model, stepper, 100, NAN)
    stepper.begin_epoch(2)
    assert feed(model, stepper, 1) is None
    assert feed(model, stepper, 3).taken
    assert model.weight.item() == pytest.approx(1 - 2)


def test_micro_counts_within_the_group():
    """The engines set the schedule where it is 0."""
    model, _, stepper = product(update_freq=2)
    stepper.begin_epoch(3)
    seen = []
    for _ in range(3):
        seen.append(stepper.micro)
        feed(model, stepper, 1)
    assert seen == [0, 1, 0]


# --- clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_clip_grad_acts_in_full_precision_units(amp):
    """Clipped while scaled by 65536, a limit of 0.5 would leave steps of 7.6e-6."""
    model, _, stepper = product(amp=amp, clip_grad=0.5)
    update = feed(model, stepper, 3)
    assert update.grad_norm.item() == pytest.approx(3)  # before clipping
    assert model.weight.item() == pytest.approx(1 - 0.5, abs=1e-5)


def test_clip_grad_acts_on_the_mean_of_the_group():
    model, _, stepper = product(update_freq=2, clip_grad=3)
    update = feed(model, stepper, 10, -6)  # the mean, 2, is below the limit
    assert update.grad_norm.item() == 2
    assert model.weight.item() == pytest.approx(1 - 2)


def test_clip_grad_is_one_norm_over_all_parameters():
    """Gradients 3 and 4 have the norm 5; a limit of 1 leaves 0.6 and 0.8."""
    model = nn.ModuleList([Product(), Product()])
    groups = [{"params": part.parameters()} for part in model]
    stepper = Stepper(model, torch.optim.SGD(groups, lr=1.0), CPU, clip_grad=1)
    stepper.begin_epoch(1)
    update = stepper.step(model[0](3) + model[1](4))
    assert update.grad_norm.item() == pytest.approx(5)
    assert [part.weight.item() for part in model] == pytest.approx([0.4, 0.2], abs=1e-5)


def test_no_clip_grad_is_no_limit():
    model, _, stepper = product()
    assert feed(model, stepper, 1e6).grad_norm.item() == 1e6
    assert model.weight.item() == 1 - 1e6


# --- values that are not finite -------------------------------------------------------------


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("fused", [False, True])  # decides the host, or the device
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_loss_changes_neither_weights_nor_moments(bad, amp, fused):
    model, optimizer, stepper = product(lr=0.5, momentum=0.5, amp=amp, fused=fused)
    assert feed(model, stepper, 2).taken  # weight 0, momentum 2
    weights, moments = snapshot(model, optimizer)
    update = feed(model, stepper, bad)
    assert not update.taken
    assert not torch.isfinite(update.grad_norm)
    assert [bad_step.in_a_row for bad_step in stepper.read()[1]] == [1]
    assert model.state_dict() == weights
    assert optimizer.state_dict()["state"] == moments["state"]
    assert feed(model, stepper, 1).taken  # momentum 0.5 * 2 + 1 = 2
    assert model.weight.item() == pytest.approx(-1)
    assert stepper.read() == (0, [])


def adamw(**options):
    """`product` under fused AdamW, whose moments and step count are zero before the first step."""
    model = Product()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    stepper = Stepper(model, optimizer, CPU, **options)
    stepper.begin_epoch(100)
    return model, optimizer, stepper


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_skipped_update_does_not_count_as_a_step_of_adamw(amp):
    model, optimizer, stepper = adamw(amp=amp)
    same, other, by_hand = adamw(amp=amp)
    feed(model, stepper, 1, NAN, 2, NAN, NAN, 3)
    feed(same, by_hand, 1, 2, 3)
    assert torch.equal(model.weight, same.weight)
    moments, expected = (list(o.state.values())[0] for o in (optimizer, other))
    assert moments == expected
    assert moments["step"] == 3
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_first_update_of_all_may_be_skipped(amp):
    """fused SGD would make its momentum of what lay in memory."""
    junk = [torch.full((1,), 7e8) for _ in range(100)]
    model, _, stepper = product(momentum=0.5, fused=True, amp=amp)
    del junk
    assert not feed(model, stepper, NAN).taken
    assert feed(model, stepper, 1).taken
    assert feed(model, stepper, 1).taken
    assert model.weight.item() == 1 - 1 - 1.5


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * NAN


def test_bad_gradient_of_a_good_loss_is_skipped_too():
    model, _, stepper = product()
    update = stepper.step(BadGradient.apply(model(2)))
    assert not update.taken
    assert model.weight.item() == 1


class BadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * INF

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_bad_loss_of_a_good_gradient_is_skipped_too():
    model, _, stepper = product()
    update = stepper.step(BadLoss.apply(model(2)))
    assert torch.isfinite(update.grad_norm)
    assert not update.taken
    assert model.weight.item() == 1


class Normed(nn.Module):
    """BatchNorm, a counter that is replaced, a constant, and a cache that the forward creates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("constant", torch.ones(1).expand(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        self.register_buffer("cache", torch.zeros(2))
        return self.norm(x).square().sum() + x.sum()


def normed(**options) -> tuple[Normed, Stepper]:
    model = Normed()
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU, **options)
    stepper.begin_epoch(100)
    return model, stepper


def test_dropped_window_leaves_no_trace():
    """A run that is saved while it waits for the rest of a step repeats its micro-batches."""
    x = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0))
    model, stepper = normed(update_freq=2)
    feed(model, stepper, x[0], x[1], x[2])
    stepper.drop_window()
    feed(model, stepper, x[2], x[3])
    same, by_hand = normed(update_freq=2)
    feed(same, by_hand, *x)
    for name, value in same.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("update_freq", [1, 2])
def test_buffers_go_back_with_a_skipped_step(amp, update_freq):
    """Running statistics that took in a bad image were NaN for the rest of the run."""
    good = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    bad = torch.full((4, 2), NAN)
    model, stepper = normed(amp=amp, update_freq=update_freq)
    same, by_hand = normed(amp=amp, update_freq=update_freq)
    feed(model, stepper, *good[:4], *[good[7], bad][-update_freq:], *good[4:])
    feed(same, by_hand, *good)
    for (name, value), expected in zip(model.named_buffers(), same.buffers(), strict=True):
        assert torch.equal(value, expected), name
    assert model.calls == 8
    assert torch.equal(model.norm.weight, same.norm.weight)


def test_buffers_go_back_with_a_loss_spike():
    model, stepper = normed(spike_factor=3.0)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    feed(model, stepper, *[x] * WARMUP_STEPS)
    before = copy.deepcopy(model.state_dict())
    assert not feed(model, stepper, 100 * x).taken
    assert model.norm.num_batches_tracked == WARMUP_STEPS
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_buffers_that_a_rollback_loaded_are_the_ones_that_come_back():
    """A copy made when the last step ended would bring back statistics from before it."""
    model, stepper = normed()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    start = copy.deepcopy(model.state_dict())
    feed(model, stepper, x)
    model.load_state_dict(start, strict=False)
    feed(model, stepper, x * NAN)
    assert torch.equal(model.norm.running_mean, torch.zeros(2))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_micro_batch_skips_its_group_and_no_other(place):
    model, _, stepper = product(update_freq=3)
    values = [1.0, 2.0, 3.0]
    values[place] = NAN
    assert not feed(model, stepper, *values).taken
    assert model.weight.item() == 1
    assert feed(model, stepper, 1, 2, 3).taken
    assert model.weight.item() == pytest.approx(1 - 2)  # nothing was left of the skipped group


def test_overflow_of_the_scaler_skips_and_lowers_the_scale():
    """A gradient of 1e36 is finite, times 65536 it is not: halve the scale and go on."""
    model, _, stepper = product(lr=1e-36, amp="fp16")
    before = stepper.scaler.get_scale()
    assert before == 65536
    assert not feed(model, stepper, 1e36).taken
    assert model.weight.item() == 1
    assert stepper.scaler.get_scale() == before / 2
    assert feed(model, stepper, 1).taken


@pytest.mark.parametrize("fused", [False, True])
def test_what_went_wrong_between_two_looks_is_read_in_order(fused):
    model, _, stepper = product(lr=1e-9, fused=fused)
    feed(model, stepper, 1, NAN, INF, 1, NAN)
    skipped, bad_steps = stepper.read()
    assert skipped == 3
    assert [(bad_step.steps_ago, bad_step.in_a_row) for bad_step in bad_steps] == [
        (4, 1),
        (3, 2),
        (1, 1),
    ]
    assert str(bad_steps[0]) == "loss is not finite"
    assert stepper.read() == (0, [])
    feed(model, stepper, NAN)  # with the one before the look it is two in a row
    assert [bad_step.in_a_row for bad_step in stepper.read()[1]] == [2]


def test_overflow_that_the_scaler_can_still_mend_is_no_bad_step():
    """Seventeen halvings of 65536 give a scale below 1; only what is bad then counts."""
    model, _, stepper = product(lr=1e-38, amp="fp16")
    for x in [3e38] * 16:  # finite, but not times the scale
        assert not feed(model, stepper, x).taken
    assert stepper.read() == (16, [])
    assert stepper.scaler.get_scale() == 1


def test_samples_of_a_bad_step_are_those_of_its_micro_batches():
    model, _, stepper = product(update_freq=2, lr=1e-9)
    for number, x in enumerate((1, 1, NAN, 1, 1, 1)):
        stepper.step(model(x), torch.tensor([number]))
    ((bad_step,), _) = stepper.read()[1], None
    assert [ids.tolist() for ids in bad_step.ids] == [[2], [3]]


def losses(stepper, *values: float) -> list[bool]:
    """Updates with these losses and a gradient of 1; which of them are taken."""
    weight = stepper.parameters[0]
    return [stepper.step(weight.sum() * 1 + value - weight.item()).taken.item() for value in values]


def test_spike_is_a_multiple_of_the_running_loss():
    _, _, stepper = product(lr=1e-9, spike_factor=3.0)
    assert losses(stepper, *[2.0] * WARMUP_STEPS, 5.9, 6.7, 2.0) == [True] * (WARMUP_STEPS + 1) + [
        False,
        True,
    ]
    skipped, (bad_step,) = stepper.read()
    assert (skipped, bad_step.steps_ago) == (1, 2)
    assert bad_step.running_loss == pytest.approx((2 * WARMUP_STEPS + 5.9) / (WARMUP_STEPS + 1))
    assert str(bad_step) == "loss 6.7 is a spike (running mean 2.186)"
    assert losses(stepper, 6.7) == [False]  # a spike does not raise the mean


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_first_losses_and_those_without_a_limit_are_no_spikes(factor):
    _, _, stepper = product(lr=1e-9, spike_factor=factor)
    assert all(losses(stepper, 1.0, 1e3, 1e-3, 1e3))
    _, _, stepper = product(lr=1e-9, spike_factor=0.0)
    assert all(losses(stepper, *[1.0] * 30, 1e6))


def test_running_loss_follows_the_last_hundred_and_is_restored():
    _, _, stepper = product(lr=1e-9, spike_factor=3.0)
    stepper.begin_epoch(10**4)
    losses(stepper, *[8.0] * 150, *[1.0] * 500)
    assert stepper.running_loss.item() == pytest.approx(1.0, abs=0.1)
    _, _, other = product(lr=1e-9, spike_factor=3.0)
    other.restore(stepper.state())
    assert other.state() == stepper.state()
    assert losses(other, 4.0) == [False]


class NoReading(TorchFunctionMode):
    """Fails where the host reads a tensor, for which it would have to wait for a GPU."""

    FORBIDDEN = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


class NoScalar(TorchDispatchMode):
    """The same for what torch's own code reads."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_host_reads_nothing_between_two_looks(amp):
    model, _, stepper = adamw(amp=amp, update_freq=2, clip_grad=1.0)
    model.register_buffer("statistic", torch.zeros(3))
    feed(model, stepper, 1, 2)  # the very first step may
    with NoReading(), NoScalar():
        updates = [feed(model, stepper, 1, x) for x in (2, NAN, 3)]
    assert [update.taken.item() for update in updates] == [True, False, True]
    with pytest.raises(AssertionError), NoReading():
        stepper.read()
    with pytest.raises(AssertionError), NoScalar():
        bool(updates[0].taken)


def test_optimizer_that_needs_the_host_is_named_once(log):
    model, _, stepper = product()
    feed(model, stepper, 1, 2)
    assert log.text.count("SGD cannot skip a step on the device") == 1
    adamw()
    assert "AdamW" not in log.text


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "enabled"), [("none", False), ("bf16", False), ("fp16", True)])
def test_gradients_are_scaled_for_fp16_alone(amp, enabled):
    """The official scaler ran without autocast, until its scale overflowed."""
    _, _, stepper = product(amp=amp)
    assert stepper.scaler.is_enabled() == enabled


@pytest.mark.parametrize(
    ("amp", "use_amp", "place", "has_bf16", "expected"),
    [
        (None, None, "cpu", None, "none"),
        (None, True, "cpu", None, "bf16"),
        (None, False, "cpu", None, "none"),
        ("bf16", None, "cpu", None, "bf16"),
        ("fp16", None, "cpu", None, "fp16"),
        ("none", None, "cpu", None, "none"),
        (None, None, "mps", None, "none"),
        (None, None, "cuda", True, "bf16"),
        (None, None, "cuda", False, "fp16"),
        (None, True, "cuda", True, "bf16"),
        (None, True, "cuda", False, "fp16"),
        (None, False, "cuda", True, "none"),
        ("fp16", None, "cuda", True, "fp16"),
        ("none", True, "cuda", True, "none"),
    ],
)
def test_precision_is_as_asked_for_else_as_the_device_has_it(
    amp, use_amp, place, has_bf16, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert choose_amp(amp, use_amp, torch.device(place)) == expected


def test_bf16_on_a_card_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="--amp bf16.*use --amp fp16"):
        choose_amp("bf16", None, torch.device("cuda"))


@pytest.mark.parametrize(
    ("amp", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_micro_batch_runs_in_the_chosen_precision_and_weights_stay_float32(amp, dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    before, bias = model.weight.detach().clone(), model.bias.detach().clone()
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU, amp=amp)
    stepper.begin_epoch(1)
    x = torch.randn(8, 4)
    with stepper.micro_batch():
        y = model(x)
        loss = y.float().square().mean()
    assert y.dtype == dtype
    assert not torch.is_autocast_enabled("cpu")  # backward and step run outside
    assert stepper.step(loss).taken
    assert model.weight.dtype == torch.float32
    error = x @ before.T + bias
    exact = before - 0.1 * 2 * error.T @ x / 16  # d mean(y^2) / d weight over 16 numbers
    assert torch.allclose(model.weight, exact, rtol=0, atol=1e-6 if amp == "none" else 1e-3)


def test_scaled_gradients_have_no_second_derivatives():
    """adahessian would divide by curvature that is 65536 times as large."""
    model = Product()
    optimizer = create_optimizer(model, "adahessian", lr=0.1)
    Stepper(model, optimizer, CPU, amp="bf16")
    with pytest.raises(UserError, match="--opt adahessian does not work with --amp fp16"):
        Stepper(model, optimizer, CPU, amp="fp16")


def test_evaluation_uses_the_same_autocast():
    layer = nn.Linear(2, 2)
    with autocast(CPU, "bf16"):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast(CPU, "none"):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


# --- other ways to clip ------------------------------------------------------------------------


def test_clip_by_value_limits_each_number_and_reports_the_norm_before():
    layer = nn.Linear(3, 1, bias=False).double()
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    stepper = Stepper(layer, optimizer, CPU, clip_grad=0.5, clip_mode="value")
    stepper.begin_epoch(1)
    with stepper.micro_batch():
        loss = layer(torch.tensor([[3.0, -4.0, 0.25]], dtype=torch.float64)).sum()
    assert stepper.step(loss).grad_norm.item() == pytest.approx(math.sqrt(25.0625))
    moved = (before - layer.weight).flatten().tolist()
    assert moved == pytest.approx([0.5, -0.5, 0.25])


def test_adaptive_clipping_by_hand():
    """Rows of norm 5 and 0, a bias of norm 2; gradients may have 1/10 of it, at least 1e-4."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    bias = nn.Parameter(torch.tensor([2.0, 0.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([0.06, 0.08])
    clip_adaptively([weight, bias, nn.Parameter(torch.ones(1))], 0.1)
    assert weight.grad.flatten().tolist() == pytest.approx([0, 0.5, 1e-4, 0])
    assert bias.grad.tolist() == pytest.approx([0.06, 0.08])  # of norm 0.1, below 0.2


def test_adaptive_clipping_is_timms():
    from timm.utils.agc import adaptive_clip_grad

    torch.manual_seed(0)
    shapes = (7,), (4, 5), (4, 3, 3, 3), (1, 1, 1, 6)
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one) * 0.05
        other.grad = one.grad.clone()
    clip_adaptively(ours, 0.02)
    adaptive_clip_grad(theirs, 0.02)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-12, atol=0)


class Wrapper(nn.Module):
    """Holds a network as Graphed does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_adaptive_clipping_finds_the_classifier_in_wrappers():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 4))
    model.add_module("head", nn.Linear(4, 2))
    parallel = nn.Module()
    parallel.module = Wrapper(model)
    for wrapped in (model, Wrapper(model), parallel):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        stepper = Stepper(wrapped, optimizer, CPU, clip_grad=0.1, clip_mode="agc")
        assert list(map(id, stepper.adaptive)) == list(map(id, model.body.parameters()))
    bare = Wrapper(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(UserError, match="agc: found no classifier in Wrapper"):
        Stepper(bare, optimizer, CPU, clip_grad=0.1, clip_mode="agc")


def test_adaptive_clipping_leaves_out_the_classifier():
    """As timm does: a new classifier has small weights, so its steps would be tiny."""

    def moved(limit: float | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("body", nn.Linear(3, 4))
        model.add_module("head", nn.Linear(4, 2))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        stepper = Stepper(model, optimizer, CPU, clip_grad=limit, clip_mode="agc")
        stepper.begin_epoch(1)
        with stepper.micro_batch():
            loss = model(torch.ones(2, 3)).sum()
        stepper.step(loss)
        return {name: p - before[name] for name, p in model.named_parameters()}

    free, clipped = moved(None), moved(0.01)
    same = {name: torch.equal(free[name], clipped[name]) for name in free}
    assert same == {name: name.startswith("head") for name in free}
