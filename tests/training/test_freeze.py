# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parameters frozen in some epochs: no step changes them, as if they were not there."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import UserError
from optim_factory import FrozenSpan, GroupRules, create_optimizer, parse_freeze
from parallel.sharding import Parallelism
from parallel.state_dict import full_state_dict, tensor_leaves
from tests.groups import results_of, run_ranks
from training.freeze import Freezer
from training.stepper import Stepper

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = {"stem": nn.Conv2d(1, 4, 2), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten()}
    model = nn.Sequential()
    for name, part in (parts | {"head": nn.Linear(16, 2)}).items():
        model.add_module(name, part)
    return model


class Run:
    """A network that trains for epochs of 2 steps, with --freeze as given."""

    def __init__(
        self, *texts: str, opt: str = "adamw", epochs: int = 6, shard: str = "ddp", **options
    ) -> None:
        self.model, spans = network(), parse_freeze(texts)
        rules = GroupRules(apart=tuple(span.pattern for span in spans))
        parallelism = Parallelism(shard, CPU)
        parallelism.shard(self.model)
        self.optimizer = create_optimizer(
            self.model, opt, lr=0.1, weight_decay=0.5, rules=rules, shard=shard
        )
        self.stepper = Stepper(parallelism.wrap(self.model), self.optimizer, CPU, **options)
        self.freezer = Freezer(self.model, self.stepper, spans, epochs)

    def epoch(self, number: int) -> list:
        self.model.train()
        self.freezer.begin_epoch(number)
        self.stepper.begin_epoch(2)
        images = torch.randn(2, 8, 1, 3, 3, generator=torch.Generator().manual_seed(number))
        norms = []
        for batch in images:
            with self.stepper.micro_batch():
                loss = self.model(batch).square().mean()
            norms.append(self.stepper.step(loss).grad_norm.item())
        return norms

    def weights(self, prefix: str = "") -> list[torch.Tensor]:
        state = self.model.state_dict().items()
        return [value.clone() for name, value in state if name.startswith(prefix)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_texts_are_patterns_and_finished_epochs():
    assert parse_freeze(["a.*:0-5", "b:5-", "c"]) == [
        FrozenSpan("a.*", 0, 5),
        FrozenSpan("b", 5, math.inf),
        FrozenSpan("c"),
    ]
    for text in ("a:5-5", "a:5-3", "a:5", "a:-5", ":0-5", "a:0-5:3"):
        with pytest.raises(UserError, match=r"expected PATTERN:FIRST-LAST"):
            parse_freeze([text])


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "lookahead_adamw"])
def test_frozen_part_keeps_every_bit_and_then_trains(opt):
    """Neither weight decay nor momentum, nor BatchNorm's running statistics, move it."""
    run = Run("stem:1-3", "norm:1-3", opt=opt)
    run.epoch(0)
    before, head = [run.weights(name) for name in ("stem", "norm")], run.weights("head")
    state = [t.clone() for t in tensor_leaves(run.optimizer.state[run.model.stem.weight])]
    run.epoch(1)
    run.epoch(2)
    assert equal(run.weights("stem"), before[0])
    assert equal(run.weights("norm"), before[1])
    assert equal(tensor_leaves(run.optimizer.state[run.model.stem.weight]), state)
    assert not equal(run.weights("head"), head)
    run.epoch(3)
    assert not equal(run.weights("stem"), before[0])
    assert run.model.norm.num_batches_tracked == 4  # of epochs 0 and 3


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_frozen_from_the_start_is_as_if_it_began_to_train_later(opt):
    """Fused SGD creates the momentum of a parameter group at once, so they are separate."""
    run = Run("stem:0-1", "norm:0-1", opt=opt)
    first = run.weights("stem")
    run.epoch(0)
    assert equal(run.weights("stem"), first)
    assert not run.optimizer.state.get(run.model.stem.weight)
    run.epoch(1)
    steps = run.optimizer.state[run.model.stem.weight].get("step", 2)
    assert (steps, equal(run.weights("stem"), first)) == (2, False)


def test_norm_and_clipping_leave_out_frozen_parameters():
    whole, frozen = Run(), Run("stem")
    whole.model.norm.eval()
    norms = frozen.epoch(0)
    images = torch.randn(2, 8, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    model = network()
    model(images[0]).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if not name.startswith("stem")]
    assert norms[0] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item())
    assert whole.epoch(0)[0] > norms[0]


def test_epochs_are_independent_of_where_a_run_began():
    """A resumed run freezes what the epoch says."""
    freezer = Run("stem:1-3", "norm:2-").freezer
    assert [freezer.patterns(epoch) for epoch in range(5)] == [
        [], ["stem"], ["stem", "norm"], ["norm"], ["norm"],
    ]  # fmt: skip


@pytest.mark.parametrize("texts", [["norm"], ["*.norm*", "norm.weight", "norm.bias"][1:]])
def test_batch_norm_is_in_eval_mode_if_it_or_all_of_it_is_frozen(texts):
    run = Run(*texts)
    run.epoch(0)
    assert (run.model.norm.training, run.model.training) == (False, True)
    run = Run("norm.weight")
    run.epoch(0)
    assert run.model.norm.training


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stam"], "--freeze 'stam' matches no parameter that is trained. Did you mean 'stem"),
        (["*"], "leaves nothing to train after 0 epochs"),
        (["stem", "norm:2-4", "head:3-5"], "leaves nothing to train after 3 epochs"),
        (["stem:6-"], "begins after the last epoch, --epochs is 6"),
    ],
)
def test_freezing_that_cannot_work_is_refused(texts, message):
    with pytest.raises(UserError, match=message):
        Run(*texts)


MODES = [(mode, clip) for mode in ("ddp", "zero1", "fsdp") for clip in ("norm", "value", "agc")]


def freeze_on_ranks(rank: int, folder: Path) -> dict:
    """Train with the stem frozen for an epoch, in every mode; all parameters must get gradients."""
    results = {}
    for mode, clip in MODES:
        run = Run("stem:0-1", "norm", shard=mode, clip_grad=0.01, clip_mode=clip)
        stem = full_state_dict(run.model)
        run.epoch(0)
        frozen = full_state_dict(run.model)
        run.epoch(1)
        trained = full_state_dict(run.model)
        if rank == 0:
            results[f"{mode} {clip}"] = {
                "kept": torch.equal(stem["stem.weight"], frozen["stem.weight"]),
                "weights": {name: value.clone() for name, value in trained.items()},
            }
    return results


@pytest.mark.slow
def test_frozen_and_clipped_alike_in_every_mode(tmp_path):
    """With fsdp a rank holds some rows of a matrix and some numbers of a bias."""
    results = results_of(run_ranks([freeze_on_ranks], 2, tmp_path))[0]["freeze_on_ranks"]
    first = network().state_dict()
    for mode, clip in MODES:
        found, wanted = results[f"{mode} {clip}"], Run("stem:0-1", "norm")
        wanted = Run("stem:0-1", "norm", clip_grad=0.01, clip_mode=clip)
        wanted.epoch(0)
        wanted.epoch(1)
        assert found["kept"], (mode, clip)
        assert not torch.equal(found["weights"]["stem.weight"], first["stem.weight"])
        for name, value in wanted.model.state_dict().items():
            assert torch.allclose(found["weights"][name], value, atol=1e-5), (mode, clip, name)
