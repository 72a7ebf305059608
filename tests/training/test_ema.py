# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""EMA of weights and buffers: warm-up, skipped steps, agreement with timm."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.convnextv2 import ConvNeXtV2
from training.ema import build_ema


def classifier() -> ConvNeXtV2:
    torch.manual_seed(0)
    return ConvNeXtV2((1, 1, 2, 1), (4, 6, 8, 10), num_classes=3)


def ema_args(**changes) -> SimpleNamespace:
    flags = {"model_ema": True, "model_ema_decay": 0.5, "model_ema_force_cpu": False}
    return SimpleNamespace(**(flags | changes))


def test_no_ema_without_the_flag():
    assert build_ema(ema_args(model_ema=False), nn.Linear(1, 1)) is None


@pytest.mark.parametrize("force_cpu", [False, True])
def test_ema_warms_up_and_then_has_the_given_decay(force_cpu):
    """The decay is 0 at the first step, then 1 - k^(-2/3) for k = 2, 3, ..., at most 0.5."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data[:] = 100.0
    ema = build_ema(ema_args(model_ema_force_cpu=force_cpu), model)
    average = 100.0
    decays = [0.0, 1 - 2 ** (-2 / 3), 0.5, 0.5]  # 1 - 3^(-2/3) = 0.519 is above the limit
    for step, (weight, decay) in enumerate(zip([8.0, 4.0, 2.0, 1.0], decays, strict=True), start=1):
        model.weight.data[:] = weight
        ema.update(model, torch.tensor(step), torch.tensor(True))
        average = decay * average + (1 - decay) * weight
        assert ema.module.weight.item() == pytest.approx(average, rel=1e-12)
    assert model.weight.item() == 1.0


@pytest.mark.parametrize("force_cpu", [False, True])
def test_skipped_step_leaves_the_ema_bit_for_bit(force_cpu):
    """Even if the batch of the skipped step left NaN in running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))
    ema = build_ema(ema_args(model_ema_force_cpu=force_cpu), model)
    for step, x in enumerate(torch.randn(3, 8, 20), start=1):
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        ema.update(model, torch.tensor(step), torch.tensor(True))
    before = copy.deepcopy(ema.module.state_dict())
    with torch.no_grad():
        model[2].weight.mul_(3)
    model(torch.full((8, 20), math.nan))
    ema.update(model, torch.tensor(3), torch.tensor(False))
    for name, value in ema.module.state_dict().items():
        assert value.dtype == before[name].dtype
        assert value.numpy().tobytes() == before[name].numpy().tobytes(), name


def test_float_buffers_are_averaged_and_others_copied():
    model = nn.BatchNorm1d(1)
    ema = build_ema(ema_args(), model)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(7)
    ema.update(model, torch.tensor(100), torch.tensor(True))  # past the warm-up: the decay is 0.5
    assert ema.module.running_mean.item() == 2.0
    assert ema.module.num_batches_tracked.item() == 7


class Allocated(TorchDispatchMode):
    """Bytes of the largest result that is no view of an argument."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves
        old = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        new = [t.untyped_storage() for t in leaves(out) if torch.is_tensor(t)]
        sizes = [storage.nbytes() for storage in new if storage.data_ptr() not in old]
        self.largest = max([self.largest, *sizes])
        return out


def test_ema_step_takes_no_memory_of_the_weights_size():
    """It made a copy of all weights at every step, and passed three times over it."""
    model = nn.Linear(300, 300)
    ema = build_ema(ema_args(), model)
    with Allocated() as allocated:
        ema.update(model, torch.tensor(2), torch.tensor(True))
    assert allocated.largest <= 8  # scalars


def test_ema_of_weights_of_several_dtypes():
    """The fraction is a tensor, which lerp takes only in the dtype of the weights."""
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).double(), nn.Linear(1, 1).bfloat16()])
    ema = build_ema(ema_args(), model)
    for layer, average in zip(model, ema.module, strict=True):
        layer.weight.data.fill_(4.0)
        average.weight.fill_(2.0)
    ema.update(model, torch.tensor(100), torch.tensor(True))  # past the warm-up: the decay is 0.5
    assert [average.weight.item() for average in ema.module] == [3.0, 3.0, 3.0]


def test_ema_equals_timms():
    """timm's synchronizes with the device and knows no skipped steps, so it is not used."""
    from timm.utils import ModelEmaV3

    model = classifier()
    ours = build_ema(ema_args(model_ema_decay=0.9), model)
    timms = ModelEmaV3(model, 0.9, use_warmup=True)
    for step in range(1, 60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(model, torch.tensor(step), torch.tensor(True))
        timms.update(model, step=step)
    for a, b in zip(ours.module.parameters(), timms.module.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_ema_has_no_gradient_and_is_in_eval_mode():
    model = classifier()
    ema = build_ema(ema_args(), model.train())
    assert not ema.module.training
    assert model.training
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in ema.module.parameters())
