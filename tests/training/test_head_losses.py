# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Losses of several heads: their sum in training, that of the first in evaluation.

python -m pytest tests/training/test_head_losses.py
"""

import argparse
import math

import pytest
import torch
from torch import Tensor

import engine_finetune
from errors import UserError
from training.criterion import Criterion, build_criterion, check_loss
from training.head_losses import HeadLosses, losses_by_head, main_output

CPU = torch.device("cpu")
HEADS = "main=linear@norm, aux=conv@stages.2"


def flags(**changes) -> argparse.Namespace:
    own = {"loss": "ce", "heads": HEADS, "head": "", "eval": False, "resume": "", "mixup": 0.0}
    own |= {"cutmix": 0.0, "cutmix_minmax": None, "smoothing": 0.0, "class_weights": "none"}
    own |= {"nb_classes": 2, "shard": "ddp", "output_dir": ""}
    return argparse.Namespace(**own | changes)


def outputs() -> dict[str, Tensor]:
    """Logits of two images, with p = 3/4 and 1/2 for class 0 in `main`, and 1/4 in `aux`."""
    main = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    aux = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    return {"main": main.requires_grad_(), "aux": aux.requires_grad_()}


LABELS = torch.zeros(2, dtype=torch.int64)
MAIN, AUX = -(math.log(3 / 4) + math.log(1 / 2)) / 2, -math.log(1 / 4)


def test_one_loss_acts_on_every_head_and_the_losses_add_up():
    loss = build_criterion(flags(), 2, CPU)
    assert loss(outputs(), LABELS).item() == pytest.approx(MAIN + AUX, abs=1e-12)


def test_each_head_has_its_own_loss_and_factor():
    criterion = build_criterion(flags(loss="aux=0.4*ce, main=focal(gamma=2)"), 2, CPU)
    found = outputs()
    loss = criterion(found, LABELS)
    focal = -((1 / 4) ** 2 * math.log(3 / 4) + (1 / 2) ** 2 * math.log(1 / 2)) / 2
    assert loss.item() == pytest.approx(focal + 0.4 * AUX, abs=1e-12)
    loss.backward()  # of 0.4 * ce: 0.4 (p - t) / N
    torch.testing.assert_close(found["aux"].grad[0].tolist(), [-0.15, 0.15], atol=1e-12, rtol=0)
    images = criterion.per_image(found["main"], LABELS)[0][:, 0]  # of the first head alone
    torch.testing.assert_close(images.mean().item(), focal, atol=1e-12, rtol=0)
    assert criterion(found["main"], LABELS).item() == pytest.approx(focal, abs=1e-12)


def test_class_weights_and_smoothing_act_on_every_head():
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    one = {name: Criterion("ce", "class", 0.1, weights) for name in ("main", "aux")}
    found = outputs()
    expected = sum(
        torch.nn.functional.cross_entropy(x, labels, weights, label_smoothing=0.1)
        for x in found.values()
    )
    torch.testing.assert_close(HeadLosses(one)(found, labels), expected)


def test_parameters_of_the_losses_of_heads_are_trained_and_saved():
    text = "main=ce, aux=tests.tiny:Temperature"
    criterion = build_criterion(flags(loss=text), 2, CPU)
    names = [name for name, _ in criterion.named_parameters()]
    assert len(names) == 1
    assert names[0].startswith("losses.aux.")
    criterion(outputs(), LABELS).backward()
    assert next(criterion.parameters()).grad is not None


def test_accuracy_in_training_is_that_of_the_first_head():
    found = outputs()
    assert main_output(found) is found["main"]
    assert main_output(found["aux"]) is found["aux"]
    assert engine_finetune.main_output is main_output


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss": "main=ce"}, "no loss for the head aux; add aux=ce"),
        (
            {"loss": "main=ce, axu=ce"},
            "--loss: no head is called axu; the heads are main, aux; no loss for the head aux; add",
        ),
        ({"loss": "main=ce, aux=ce, more=ce"}, "no head is called more; the heads are main, aux"),
        ({"loss": "main=ce, aux=ce", "heads": ""}, "there are no heads of that name"),
        ({"loss": "main=ce, aux=l1"}, "--loss l1 takes numbers"),
        ({"loss": "main=ce, aux=focal(gama=2)"}, "'gama'"),
        ({"loss": "main=ce, aux="}, "expected NAME=VALUE"),
    ],
)
def test_losses_that_fit_no_head_are_refused(changes, problem):
    with pytest.raises(UserError) as error:
        check_loss(flags(**changes))
    assert problem in str(error.value)


def test_evaluation_tries_the_loss_of_the_first_head_alone():
    """Among some of the classes, that of another head may know the number of all of them."""
    aux = "tests.training.test_criterion:Centers"  # of five classes
    build_criterion(flags(loss=f"main=ce, aux={aux}", eval=True), 2, CPU)
    for loss, evaluates in ((f"main=ce, aux={aux}", False), (f"main={aux}, aux=ce", True)):
        with pytest.raises(UserError, match="size of tensor"):
            build_criterion(flags(loss=loss, eval=evaluates), 2, CPU)


def test_evaluation_may_learn_of_heads_from_the_checkpoint():
    args = flags(loss="main=ce, aux=ce", heads="", eval=True)
    assert losses_by_head(args, args.loss, early=True) == {"main": "ce", "aux": "ce"}
    with pytest.raises(UserError, match="there are no heads of that name"):
        losses_by_head(args, args.loss)  # the checkpoint had none
    assert losses_by_head(flags(heads=""), "ce") == {}
    assert losses_by_head(flags(heads="main=linear@norm"), "ce") == {}  # one head: a tensor
