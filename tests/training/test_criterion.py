# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Sums of losses with smoothing and class weights, and what they refuse."""

from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import datasets
from data_loading.dataset import TransformedDataset
from data_loading.split import Part
from errors import UserError
from optim_factory import create_optimizer
from tests import tiny
from training.anomaly import first_not_finite
from training.class_weights import create_class_weights
from training.criterion import Criterion, build_criterion, check_loss, try_out
from training.evaluation import Metrics
from training.stepper import Stepper

CPU = torch.device("cpu")
ME = "tests.training.test_criterion"
# Softmax of these rows: (1/4, 3/4) and (1/2, 1/2).
LOGITS = torch.tensor([[0.0, log(3)], [0.0, 0.0]])
LABELS = torch.tensor([1, 0])


def flags(**given) -> SimpleNamespace:
    defaults = {"loss": "ce", "class_weights": "none", "smoothing": 0.0, "nb_classes": None}
    defaults |= {"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "eval": False, "shard": "ddp"}
    return SimpleNamespace(**defaults | given)


def refused(**given) -> str:
    """The message of `check_loss`, which comes before the data is listed."""
    with pytest.raises(UserError) as caught:
        check_loss(flags(**{"nb_classes": 3} | given))
    return str(caught.value)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(7, 4, generator=generator), torch.arange(7) % 4


def per_image(criterion: Criterion, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return criterion.per_image(outputs, targets)[0].sum(1)


# --- values ---------------------------------------------------------------------------------


def test_default_is_torchs_cross_entropy_bit_for_bit():
    outputs, labels = batch()
    soft = outputs.flip(0).softmax(1)
    for smoothing in (0.0, 0.1):
        ours, theirs = (
            Criterion(smoothing=smoothing),
            nn.CrossEntropyLoss(label_smoothing=smoothing),
        )
        assert torch.equal(ours(outputs, labels), theirs(outputs, labels))
        plain = F.cross_entropy(outputs, labels, reduction="none")
        assert torch.equal(per_image(ours, outputs, labels), plain)  # without smoothing
    assert torch.equal(Criterion(kind="soft")(outputs, soft), nn.CrossEntropyLoss()(outputs, soft))


def test_sum_by_hand():
    criterion = Criterion("0.5*focal(gamma=1) + ce")
    # focal: 1/4 log 4/3 and 1/2 log 2; ce: log 4/3 and log 2
    rows = [0.5 / 4 * log(4 / 3) + log(4 / 3), 0.5 / 2 * log(2) + log(2)]
    assert per_image(criterion, LOGITS, LABELS).tolist() == pytest.approx(rows)
    assert criterion(LOGITS, LABELS).item() == pytest.approx(sum(rows) / 2)


@pytest.mark.parametrize(
    ("text", "smoothing"),
    [("poly", 0.2), ("bce", 0.2), ("focal(gamma=0)", 0.2), ("CrossEntropyLoss", 0.2)],
)
def test_smoothing_acts_on_other_losses_in_training_only(text, smoothing):
    outputs, labels = batch()
    smoothed = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    criterion = Criterion(text, smoothing=smoothing)
    expected = Criterion(text, kind="soft")(outputs, smoothed)
    torch.testing.assert_close(criterion(outputs, labels), expected)
    assert torch.equal(
        per_image(criterion, outputs, labels), per_image(Criterion(text), outputs, labels)
    )


def test_smoothing_of_several_classes_moves_to_one_half():
    criterion = Criterion("bce", kind="multi", smoothing=0.2)
    # targets (0.1, 0.9): (-0.1 log 1/2 - 0.9 log 1/2 - 0.9 log 3/4 - 0.1 log 1/4) / 2
    expected = (log(2) + 0.9 * log(4 / 3) + 0.1 * log(4)) / 2
    found = criterion(LOGITS[:1], torch.tensor([[0.0, 1.0]]))
    assert found.item() == pytest.approx(expected)


def test_losses_own_smoothing_is_off_in_evaluation():
    outputs, labels = batch()
    plain = F.cross_entropy(outputs, labels, reduction="none")
    for text in ("classy_smoothing(0.3)", "CrossEntropyLoss(label_smoothing=0.3)"):
        torch.testing.assert_close(per_image(Criterion(text), outputs, labels), plain)
        assert Criterion(text)(outputs, labels) > plain.mean() + 0.01
    one = per_image(Criterion("asymmetric_single(gamma_neg=2)"), outputs, labels)
    assert torch.equal(one, per_image(Criterion("asymmetric_single(1, 2, eps=0)"), outputs, labels))


def test_rows_without_a_target_do_not_count_in_the_mean():
    criterion = Criterion("soft_target_ce(ignore_index=-1)", kind="multi")
    targets = torch.tensor([[0.0, 1.0], [-1.0, -1.0]])
    assert criterion(LOGITS, targets).item() == pytest.approx(log(4 / 3), rel=1e-5)
    nothing = torch.full((2, 2), -1.0)
    assert criterion(LOGITS, nothing).item() == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CrossEntropyLoss(weight=[1, 2, 3, 4])", "class"),
        ("MultiMarginLoss(margin=0.5, p=2)", "class"),
        ("BCEWithLogitsLoss(pos_weight=[1, 2, 3, 4])", "multi"),
        ("MultiLabelSoftMarginLoss", "multi"),
        ("SmoothL1Loss(beta=0.5)", "number"),
        ("PoissonNLLLoss", "number"),
    ],
)
def test_losses_of_torch_are_torchs(text, kind):
    outputs, labels = batch()
    targets = {"class": labels, "multi": (outputs.flip(0) > 0).float(), "number": outputs.flip(0)}
    name, _, words = text.partition("(")
    options = eval(f"dict({words}" if words else "dict()")
    options = {k: torch.tensor(v).float() if isinstance(v, list) else v for k, v in options.items()}
    expected = getattr(nn, name)(**options)(outputs, targets[kind])
    criterion = Criterion(text, kind)
    assert torch.equal(criterion(outputs, targets[kind]), expected)
    values = per_image(criterion, outputs, targets[kind])
    assert values.shape == (7,)
    if "weight=[1" not in text:  # which evaluation leaves out
        torch.testing.assert_close(values.mean(), expected)
    assert criterion.state_dict() == {}  # a resumed run has the weights of its own flag


def test_losses_of_torch_with_other_forms_of_targets_by_hand():
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    margin = per_image(Criterion("MultiLabelMarginLoss", "multi"), LOGITS, targets)
    # max(0, 1 - (x[positive] - x[negative])) / 2
    assert margin.tolist() == pytest.approx([max(0, 1 - log(3)) / 2, 0.5])
    soft = per_image(Criterion("SoftMarginLoss", "multi"), LOGITS, targets)
    # log(1 + exp(-y x)): log 2 for logits of 0, log(1 + 1/3) for log 3
    assert soft.tolist() == pytest.approx([(log(2) + log(4 / 3)) / 2, log(2)])


def test_half_precision_is_computed_in_float32():
    outputs, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        for text in ("ce", "focal", "bce", "tests.tiny:Temperature"):
            found = Criterion(text)(outputs.bfloat16(), labels)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, Criterion(text)(outputs.bfloat16().float(), labels))
    assert Criterion()(outputs.double(), labels).dtype == torch.float64


# --- class weights --------------------------------------------------------------------------


def test_class_weights_by_hand():
    counts = torch.tensor([10.0, 40.0], dtype=torch.float64)
    # 1/10 and 1/40 over their mean 1/16
    found = create_class_weights("inverse", lambda: counts, 2)
    assert found.tolist() == pytest.approx([1.6, 0.4])
    # (1 - b) / (1 - b^n) with b = 1/2 and n = 1, 2: 1 and 2/3, over their mean 5/6
    few = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = create_class_weights("effective(beta=0.5)", lambda: few, 2)
    assert found.tolist() == pytest.approx([1.2, 0.8])
    assert create_class_weights("[1, 3]", None, 2).tolist() == [0.5, 1.5]
    absent = torch.tensor([10.0, 0.0, 40.0], dtype=torch.float64)
    assert create_class_weights("inverse", lambda: absent, 3).tolist() == pytest.approx(
        [1.6, 0.0, 0.4]
    )


def short(counts: torch.Tensor) -> list:
    return [1, 2]


def negative(counts: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(counts)) - 1


def scaled(counts: torch.Tensor, factor=1.0) -> torch.Tensor:
    return factor * counts


def test_class_weights_of_the_user_get_the_counts_of_all_classes():
    counts = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    found = create_class_weights(f"{ME}:scaled(5)", lambda: counts, 3)
    assert found.tolist() == [0.5, 0, 1.5]
    check_loss(flags(class_weights=f"{ME}:short"))  # it may know that there are two classes
    known = create_class_weights(f"{ME}:short", lambda: counts[[0, 2]], 2)
    assert known.tolist() == pytest.approx([2 / 3, 4 / 3])


def test_class_weights_act_as_torchs_do():
    outputs, labels = batch()
    soft, weights = outputs.flip(0).softmax(1), torch.tensor([0.5, 2.0, 1.0, 0.5])
    for smoothing in (0.0, 0.1):
        ours = Criterion(smoothing=smoothing, class_weights=weights)
        theirs = nn.CrossEntropyLoss(weights, label_smoothing=smoothing)
        assert torch.equal(ours(outputs, labels), theirs(outputs, labels))
    mixed = Criterion(kind="soft", class_weights=weights)(outputs, soft)
    assert torch.equal(mixed, nn.CrossEntropyLoss(weights)(outputs, soft))


def test_class_weights_weigh_the_images_of_other_losses():
    weights = torch.tensor([0.5, 1.5])
    criterion = Criterion("focal(gamma=1)", class_weights=weights)
    rows = [1 / 4 * log(4 / 3), 1 / 2 * log(2)]  # of classes 1 and 0
    expected = (1.5 * rows[0] + 0.5 * rows[1]) / 2
    assert criterion(LOGITS, LABELS).item() == pytest.approx(expected)
    assert per_image(criterion, LOGITS, LABELS).tolist() == pytest.approx(rows)  # not in evaluation
    # In a batch of one class its weight makes no difference: the sum of weights is 3, not 2.
    ones = torch.tensor([1, 1])
    assert criterion(LOGITS, ones).item() == pytest.approx(sum(rows) / 2)
    # Mixed labels have the mixture of both weights: 1 and 1.
    mixed = Criterion("focal(gamma=0)", "soft", class_weights=weights)
    both = torch.full((2, 2), 0.5)
    plain = Criterion("focal(gamma=0)", "soft")(LOGITS, both)
    assert mixed(LOGITS, both).item() == pytest.approx(plain.item())


@pytest.mark.parametrize(
    ("weighted", "plain"),
    [
        ("CrossEntropyLoss(weight=[1, 9])", "ce"),
        ("CrossEntropyLoss([1, 9], label_smoothing=0.1)", "ce"),
        ("MultiMarginLoss(weight=[1, 9], margin=2)", "MultiMarginLoss(margin=2)"),
        ("BCEWithLogitsLoss(pos_weight=[1, 9])", "bce"),
    ],
)
def test_weights_of_torchs_losses_are_not_in_evaluation(weighted, plain):
    assert Criterion(weighted)(LOGITS, LABELS) != Criterion(plain)(LOGITS, LABELS)
    found = per_image(Criterion(weighted), LOGITS, LABELS)
    torch.testing.assert_close(found, per_image(Criterion(plain), LOGITS, LABELS))


@pytest.mark.parametrize(
    "loss", ["ce", "CrossEntropyLoss", "soft_target_ce", "classy_smoothing", "bce + ce"]
)
def test_images_with_ignored_targets_alone_do_not_count_in_evaluation(loss):
    labels = torch.tensor([1, -100]) if "bce" not in loss else LABELS
    losses, counts = Criterion(loss).per_image(LOGITS, labels)
    if "bce" in loss:
        assert counts.tolist() == [[1, 1], [1, 1]]
        return
    assert (counts.tolist(), losses[1].tolist()) == ([[1], [0]], [0])
    metrics = Metrics(["acc1"], outputs=2)
    metrics.reset("cpu", 1)
    metrics.update(LOGITS, LABELS, losses, counts)
    metrics.reduce()
    assert metrics.values()["loss"] == pytest.approx(log(4 / 3))  # of the first image, p = 3/4


def test_loss_of_evaluation_is_the_sum_of_the_means_of_its_terms():
    metrics = Metrics(["acc1"], outputs=2)
    metrics.reset("cpu", 2)
    losses, counts = torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    metrics.update(LOGITS, LABELS, losses, counts)
    metrics.reduce()
    assert metrics.values()["loss"] == 2 + 4


class Listed(tiny.Colors):
    """`Colors` that lists its labels: 4 red, 1 green, 1 blue."""

    targets = (0, 0, 1, 2, 0, 0)


def test_labels_are_counted_in_the_order_of_the_head_without_loading_images():
    data = Listed(6)
    data.__class__.__getitem__ = None
    made = TransformedDataset(data, None, 0, nb_classes=3, positions=[2, 0, 1])
    assert datasets.count_labels(made, 3).tolist() == [1, 1, 4]
    part = TransformedDataset(Part(data, np.array([0, 1, 2])), None, 0, nb_classes=3)
    assert datasets.count_labels(part, 3).tolist() == [2, 1, 0]
    digits = TransformedDataset(datasets.Digits(True), None, 0, nb_classes=10)
    counts = datasets.count_labels(digits, 10)
    labels = [digits.dataset[i][1] for i in range(len(digits))]
    assert counts.tolist() == np.bincount(labels).tolist()


def test_labels_of_folders_are_counted_from_their_list(tmp_path):
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.png").write_bytes(b"never read")
    spec = datasets.DatasetSpec(str(tmp_path))
    data = TransformedDataset(datasets.create_dataset("image_folder", spec, True), None, 0)
    assert datasets.count_labels(data, 2).tolist() == [3, 1]


def test_data_that_lists_no_labels_is_refused_with_the_fix():
    data = TransformedDataset(tiny.Colors(6), None, 0, nb_classes=3)
    with pytest.raises(UserError, match=r"does not list its labels; give it a list `targets`"):
        datasets.count_labels(data, 3)


# --- parameters of a loss -------------------------------------------------------------------


def test_parameters_of_a_loss_are_trained_without_decay_and_clipped_with_the_others():
    model = nn.Linear(2, 2)
    criterion = Criterion("tests.tiny:Temperature(start=2)")
    optimizer = create_optimizer(model, "momentum", lr=1.0, weight_decay=0.0, loss=criterion)
    scale = criterion.terms[0].loss.scale
    group = optimizer.param_groups[-1]
    assert (group["params"], group["weight_decay"], group["decayed"]) == ([scale], 0.0, False)
    stepper = Stepper(model, optimizer, CPU, clip_grad=0.01, criterion=criterion)
    stepper.begin_epoch(1)
    with stepper.micro_batch():
        loss = criterion(model(torch.ones(2, 2)), LABELS)
    before = [p.detach().clone() for p in (*model.parameters(), scale)]
    stepper.step(loss)
    moved = [b - p for b, p in zip(before, (*model.parameters(), scale), strict=True)]
    norm = torch.cat([x.flatten() for x in moved]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)  # lr 1: all move by the clipped gradient
    assert moved[-1] != 0


def test_without_parameters_the_optimizer_has_no_other_groups():
    model = nn.Linear(2, 2)
    plain, ours = (create_optimizer(model, lr=1.0, loss=loss) for loss in (None, Criterion()))
    assert [len(g["params"]) for g in plain.param_groups] == [
        len(g["params"]) for g in ours.param_groups
    ]


class Counting(nn.Module):
    """A loss with a buffer that a NaN would poison."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(outputs, labels, reduction="none")
        self.mean += losses.detach().mean()
        return losses


def test_a_skipped_step_does_not_change_buffers_of_the_loss():
    model, criterion = nn.Linear(2, 2), Criterion("tests.training.test_criterion:Counting")
    optimizer = create_optimizer(model, "sgd", lr=1.0)
    stepper = Stepper(model, optimizer, CPU, criterion=criterion)
    stepper.begin_epoch(2)
    for value, finite in ((1.0, True), (float("nan"), False)):
        with stepper.micro_batch():
            loss = criterion(model(torch.full((2, 2), value)), LABELS)
        assert stepper.step(loss).taken.item() is finite
    mean = criterion.terms[0].loss.mean
    assert mean > 0
    assert mean.isfinite()


def test_rerun_of_a_bad_step_does_not_change_buffers_of_the_loss():
    model, criterion = nn.Linear(2, 2), Criterion("tests.training.test_criterion:Counting")
    images = torch.full((2, 2), float("nan"))
    found = first_not_finite(model, lambda: criterion(model(images), LABELS), criterion)
    assert found == "output of Linear"
    assert criterion.terms[0].loss.mean == 0


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": "focl"}, "--loss: unknown loss 'focl'. Did you mean 'focal' or"),
        ({"loss": "focal(gama=2)"}, "unexpected keyword argument 'gama'; it takes gamma=2.0"),
        ({"loss": "focal(gamma=high)"}, "gamma is 'high', expected a number of at least 0"),
        ({"loss": "zlpr(1)"}, "too many positional arguments; it takes no arguments"),
        ({"loss": "ce + "}, "expected a name"),
        ({"loss": ""}, "expected a name"),
        ({"loss": "ce[1]"}, "got values in [ ], which no loss takes"),
        ({"loss": "jsd(weight=1)"}, "expected a number between 0 and 1"),
        ({"loss": "focal(gamma=-0.5)"}, "gamma is -0.5, expected a number of at least 0"),
        ({"loss": "binary_focal(alpha=2)"}, "alpha is 2, expected a number from 0 to 1"),
        ({"loss": "asymmetric(clip=-1)"}, "clip is -1, expected a number from 0 to 1"),
        ({"loss": "asymmetric(gamma_neg=-1)"}, "gamma_neg is -1, expected a number of at least 0"),
        ({"loss": "classy_smoothing(1)"}, "smoothing is 1, expected a number of at least 0 and be"),
        ({"loss": "asymmetric_single(eps=1)"}, "eps is 1, expected a number of at least 0 and bel"),
        ({"loss": "bce(threshold=1.5)"}, "threshold is 1.5, expected a number from 0 to 1"),
        ({"loss": "CrossEntropyLoss(weight=[1, -1, 1])"}, "weight is [1, -1, 1], expected a num"),
        ({"loss": "smooth_l1(beta=-1)"}, "beta is -1, expected a number of at least 0"),
        ({"loss": "barron(c=0)"}, "c is 0, expected a number above 0"),
        ({"loss": "-1*ce"}, "the factor of ce is -1, expected above 0"),
        ({"loss": "ce + 0*bce"}, "the factor of bce is 0, expected above 0"),
        ({"loss": "NLLLoss"}, "takes probabilities, and networks give logits; use ce"),
        ({"loss": "TripletMarginLoss"}, "is not supported here, since it needs other inputs"),
        ({"loss": "HingeEmbeddingLoss"}, "--loss HingeEmbeddingLoss is not supported here"),
        ({"loss": "MultiMarginLoss(p=3)"}, "only p == 1 and p == 2 supported"),
        ({"loss": "MultiMarginLoss(mrgin=3)"}, "unexpected keyword argument 'mrgin'; it takes p="),
        ({"loss": "CrossEntropyLoss(reduction=sum)"}, "the mean over the batch is taken anyway"),
        (
            {"loss": "barron"},
            "takes numbers, and the labels are one class per image; use one of ce",
        ),
        (
            {"loss": "MultiMarginLoss", "mixup": 0.8},
            "takes one class per image, and the labels are mixed labels",
        ),
        ({"loss": "MultiMarginLoss", "cutmix": 1.0}, "or drop --mixup and --cutmix"),
        ({"loss": "asymmetric_single", "smoothing": 0.1}, "pass --smoothing 0"),
        ({"loss": "tests.tiny:lost"}, "cannot import loss 'tests.tiny:lost'"),
        ({"loss": "tests.tiny:brier(faktor=2)"}, "'faktor'; it takes factor=1.0"),
        ({"loss": "tests.tiny:Temperature(begin=2)"}, "'begin'; it takes start=1.0"),
        ({"loss": "tests.tiny:brier", "mixup": 0.8}, "--loss tests.tiny:brier: "),
        ({"loss": "tests.training.test_criterion:per_class"}, "gives a tensor of shape (2, 3)"),
        ({"loss": "tests.training.test_criterion:constant"}, "does not depend on the outputs"),
        ({"loss": "tests.training.test_criterion:Unused"}, "parameters loss.scale have no effect"),
        ({"loss": "tests.tiny:brier", "class_weights": "inverse"}, "needs a value for each image"),
        (
            {"class_weights": "invers"},
            "--class_weights: unknown class weights 'invers'. Did you mean 'inverse'?",
        ),
        ({"class_weights": "effective(beta=2)"}, "beta is 2, expected above 0 and below 1; it"),
        ({"class_weights": "effective(beta=x)"}, "beta is 'x', expected above 0 and below 1; it"),
        ({"class_weights": "effective(1, 2)"}, "too many positional arguments; it takes beta=0.9"),
        ({"class_weights": "effective(bet=2)"}, "'bet'; it takes beta=0.9999"),
        ({"class_weights": "[1, -2]", "nb_classes": None}, "expected 2 numbers above 0"),
        ({"class_weights": "[1, 2]", "nb_classes": 3}, "expected 3 numbers above 0"),
        ({"class_weights": f"{ME}:short"}, "it gives shape (2,), expected (3,); correct the"),
        ({"class_weights": f"{ME}:negative"}, "it gives -1.0, 0.0, 1.0, expected numbers of at le"),
        ({"class_weights": f"{ME}:short(0)"}, "short(0): TypeError in "),
        ({"class_weights": f"{ME}:scaled(0)"}, "the weights of all classes with images are 0"),
        ({"class_weights": f"{ME}:lost", "nb_classes": None}, "cannot import class weights"),
        ({"class_weights": "[1, x]"}, "expected numbers, as in [1, 2.5, 1]"),
    ],
)
def test_refusals(given, said):
    assert said in refused(**given)


def per_class(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return outputs.square()


def constant(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.ones((), requires_grad=True)


class Unused(tiny.Temperature):
    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, labels)


@pytest.mark.parametrize("loss", ["ce", "focal", "poly", "jsd", "asymmetric_single"])
def test_several_classes_per_image_need_another_loss(loss):
    with pytest.raises(UserError, match="several classes per image; use one of soft_target_ce"):
        Criterion(loss, kind="multi")


def test_class_weights_are_not_for_several_classes_and_numbers():
    for loss, kind in (("bce", "multi"), ("l1", "number")):
        with pytest.raises(UserError, match="--class_weights: the labels are"):
            Criterion(loss, kind, class_weights=torch.ones(2))


def test_sharded_runs_refuse_a_loss_with_parameters(monkeypatch):
    monkeypatch.setattr("training.criterion.get_world_size", lambda: 2)
    assert "use --shard ddp" in refused(loss="tests.tiny:Temperature", shard="fsdp")
    check_loss(flags(loss="tests.tiny:Temperature", shard="ddp"))
    check_loss(flags(loss="focal", shard="zero1"))


def test_numbers_of_classes_are_checked_with_those_of_the_data():
    args = flags(loss="CrossEntropyLoss(weight=[1, 2])")
    check_loss(args)  # without --nb_classes it is not known
    with pytest.raises(UserError, match="weight"):
        build_criterion(args, 3, CPU)


def test_evaluation_tries_no_weights_of_the_training():
    """`--eval --eval_classes data` among two of three classes refused the weights of the three."""
    for loss, kind in (
        ("BCEWithLogitsLoss(pos_weight=[1, 2, 3])", "multi"),
        ("CrossEntropyLoss(weight=[1, 2, 3])", "class"),
    ):
        args = flags(loss=loss, eval=True, class_weights="[1, 2, 3]")
        check_loss(args, kind)
        outputs, labels = LOGITS, LABELS if kind == "class" else F.one_hot(LABELS).float()
        found = per_image(build_criterion(args, 2, CPU, kind=kind), outputs, labels)
        plain = Criterion(args.loss.partition("(")[0], kind)
        torch.testing.assert_close(found, per_image(plain, outputs, labels))
    args = flags(loss="BCEWithLogitsLoss(pos_weight=[1, 2, 3])")
    with pytest.raises(UserError, match="size of tensor a"):
        build_criterion(args, 2, CPU, kind="multi")


@pytest.mark.parametrize("loss", ["per_class", "Centers"])
def test_evaluation_tries_a_loss_of_the_users(loss):
    args = flags(loss=f"tests.training.test_criterion:{loss}", eval=True)
    with pytest.raises(UserError, match=r"gives a tensor of shape \(2, 3\)|The size of tensor a"):
        build_criterion(args, 3, CPU)


class Centers(nn.Module):
    """A loss that knows the number of classes: a parameter (K,) and a buffer (K, K)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("costs", torch.ones(classes, classes))

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        costs = self.costs[labels]
        return F.cross_entropy(outputs + self.bias, labels) + (costs * outputs.softmax(1)).mean()


def test_a_loss_may_know_the_number_of_classes():
    args = flags(loss="tests.training.test_criterion:Centers")
    check_loss(args)  # before the data is listed
    build_criterion(args, 5, CPU)
    assert "size of tensor" in refused(loss=args.loss, nb_classes=3)


def test_trial_leaves_the_loss_as_it_was():
    criterion = Criterion("tests.training.test_criterion:Counting")
    try_out(criterion, 3)
    assert criterion.terms[0].loss.mean == 0
    assert all(p.grad is None for p in criterion.parameters())
