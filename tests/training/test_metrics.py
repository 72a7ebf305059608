# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Every metric by hand, on four to six rows; over several ranks: test_evaluation.py."""

import math

import pytest
import torch

from config.parser import ROOT
from training.evaluation import Metrics
from training.metrics import METRICS, area_under_roc, average_precision

NAN, INF = math.nan, math.inf


def compute(words, logits, targets, kind: str = "class") -> dict:
    """Metrics of one batch, without the loss."""
    logits, targets = torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(targets)
    metrics = Metrics([words], best="loss", outputs=logits.shape[1], kind=kind)
    metrics.reset("cpu")
    metrics.update(logits, targets, torch.zeros(len(logits)))
    metrics.reduce()
    found = metrics.values()
    assert found.pop("loss") == 0
    return found


def one(word, logits, targets, kind: str = "class"):
    """The value of a single metric."""
    (value,) = compute(word, logits, targets, kind).values()
    return value


# --- the values of ClassyVision's unit tests, in percent ----------------------------------------

SCORES = [[3, 2, 1], [3, 1, 2], [1, 3, 2]]
MORE = [[3, 2, 1], [1, 3, 2], [1, 3, 2]]
MULTI = [[0.2, 0.4, 0.4], [0.2, 0.65, 0.15], [0.33, 0.33, 0.34]]
MULTI_TARGETS = [[0, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_accuracy_is_that_of_classy_vision():
    expected = {"acc1": 100 / 3, "acc_2": 200 / 3}
    assert compute("acc1 acc(k=2)", SCORES, [0, 1, 2]) == pytest.approx(expected)
    both = compute("acc1 acc(k=2)", SCORES + MORE, [0, 1, 2, 0, 1, 2])
    assert both == pytest.approx({"acc1": 300 / 6, "acc_2": 500 / 6})


def test_precision_and_recall_at_k_are_those_of_classy_vision():
    """Hits are divided by k * images, or by the number of targets: not averaged by image."""
    words = "precision(k=2) recall(k=1) recall(k=2)"
    # The first row ties for the best class, which does not change the two best.
    found = compute(words, MULTI, MULTI_TARGETS, "multi")
    assert found["precision_2"] == pytest.approx(400 / 6)
    assert found["recall_2"] == pytest.approx(400 / 5)
    untied = [[0.3, 0.4, 0.3], [0.2, 0.65, 0.15], [0.33, 0.33, 0.34]]
    second = [[0.05, 0.4, 0.05], [0.15, 0.65, 0.2], [0.4, 0.2, 0.4]]
    targets = [*MULTI_TARGETS, *[[0, 1, 0]] * 3]
    found = compute(f"{words} precision(k=1)", [*untied, *second], targets, "multi")
    expected = {"precision_1": 400 / 6, "precision_2": 600 / 12}
    expected |= {"recall_1": 400 / 8, "recall_2": 600 / 8}
    assert found == pytest.approx(expected)


def test_precision_and_recall_at_k_of_class_labels():
    """ClassyVision makes them one-hot: a target an image."""
    logits = [[0.05, 0.4, 0.04], [0.15, 0.65, 0.2], [0.4, 0.2, 0.4]]
    logits += [[0.2, 0.41, 0.4], [0.2, 0.65, 0.15], [0.15, 0.8, 0.1]]
    found = compute(
        "precision(k=1) precision(k=2) recall(k=1) recall(k=2)", logits, [1, 1, 1, 0, 1, 2]
    )
    expected = {"precision_1": 300 / 6, "precision_2": 300 / 12}
    assert found == pytest.approx(expected | {"recall_1": 300 / 6, "recall_2": 300 / 6})


def test_soft_targets_give_the_fraction_of_the_best_class():
    """The best class has a weight of 0.3, then 0.6; of the two best the larger weight counts."""
    logits, targets = [[2, 1, 0], [0, 2, 1]], [[0.3, 0.5, 0.2], [0.4, 0.6, 0.0]]
    found = compute("acc1 acc(k=2) precision(k=2) recall(k=2)", logits, targets, "multi")
    expected = {"acc1": 45, "acc_2": 55, "precision_2": 100 * 1.4 / 4, "recall_2": 100 * 1.4 / 2}
    assert found == pytest.approx(expected, rel=1e-6)


def test_any_target_among_the_best_is_a_hit():
    targets = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert one("acc1", SCORES, targets, "multi") == pytest.approx(100 / 3)
    assert one("acc(k=3)", SCORES, targets, "multi") == pytest.approx(200 / 3)


# --- class labels -------------------------------------------------------------------------------

ANSWERS = [0, 0, 1, 2, 0, 1]
LABELS = [0, 1, 1, 2, 2, 2]
LOGITS = (5 * torch.eye(4))[ANSWERS]  # class 3 is neither a target nor an answer


def test_metrics_of_classes_by_hand():
    """Class 0: 1 of 1 right, 3 answers; 1: 1 of 2, 2 answers; 2: 1 of 3, 1 answer."""
    assert one("class_accuracy", LOGITS, LABELS) == pytest.approx([100, 50, 100 / 3, None])
    assert one("balanced_accuracy", LOGITS, LABELS) == pytest.approx(550 / 9)
    assert one("recall", LOGITS, LABELS) == pytest.approx(550 / 9)
    assert one("precision", LOGITS, LABELS) == pytest.approx((100 / 3 + 50 + 100) / 3)
    assert one("f1", LOGITS, LABELS) == pytest.approx(50)
    assert one("f1(average=per_class)", LOGITS, LABELS) == pytest.approx([50, 50, 50, None])
    for name in ("f1", "precision", "recall"):
        assert one(f"{name}(average=micro)", LOGITS, LABELS) == pytest.approx(50)


def test_a_class_that_is_only_an_answer_counts_in_f1():
    """Of 2 classes of images one is right, and a third is a wrong answer: 100, 0 and 0."""
    logits = torch.eye(3)[[0, 2]]
    assert one("f1", logits, [0, 1]) == pytest.approx(100 / 3)
    assert one("balanced_accuracy", logits, [0, 1]) == pytest.approx(50)


def test_confusion_has_a_row_for_each_true_class():
    found = one("confusion", LOGITS, LABELS)
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    broken = LOGITS.clone()
    broken[0, 0], broken[5, 3] = NAN, INF
    found = one("confusion", broken, LABELS)
    assert found == [[0, 0, 0, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]


def test_ece_by_hand():
    """Probabilities 0.8, 0.8, 0.6, 0.9: |1.6 - 1| in one bin of 5, |0.6 - 1|, |0.9 - 0|, by 4."""
    sure = torch.tensor([0.8, 0.8, 0.6, 0.9], dtype=torch.float64)
    logits = torch.stack([sure.log(), (1 - sure).log()], 1).float()
    labels = [0, 1, 0, 1]
    assert one("ece(bins=10)", logits, labels) == pytest.approx(100 * (0.6 + 0.4 + 0.9) / 4)
    assert one("ece(bins=1)", logits, labels) == pytest.approx(100 * (3.1 - 2) / 4)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    """Of 2 bins, 0.5 belongs to the lower; in one bin 0.5 - 0 and 0.75 - 1 would cancel."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # 0.5 and 0.75
    wrong = 1 - int(logits[0].topk(1).indices)
    assert one("ece(bins=2)", logits, [wrong, 0]) == pytest.approx(100 * (0.5 + 0.25) / 2)


# --- order of scores ----------------------------------------------------------------------------


def test_auroc_by_hand_with_ties():
    """Positives 3 and 1 against 2, 1, 0: wins 3 + 1.5 of 6."""
    scores, positive = torch.tensor([3.0, 2, 1, 1, 0]), torch.tensor([1, 0, 1, 0, 0]) > 0
    assert area_under_roc(scores.double(), positive) == 75
    assert area_under_roc(torch.zeros(5), positive) == 50
    assert area_under_roc(scores, positive & False) is None
    assert area_under_roc(scores, positive | True) is None
    logits = torch.stack([torch.zeros(5), scores], 1)
    assert one("auroc", logits, positive.long()) == 75  # of two classes: the same from either
    assert one("auroc(average=per_class)", logits, positive.long()) == [75, 75]


def test_two_sure_classes_are_still_ordered():
    """Probabilities of 1 - 1e-18 and 1 - 1e-22 are both 1 in float64."""
    logits = [[0, 50], [0, 42], [0, 45], [0, 40]]
    assert one("auroc", logits, [1, 0, 1, 0]) == 100


def test_auroc_of_three_classes_is_their_mean():
    """Class 0 first: 2 of 2 pairs; class 1: 0.5 of 2; class 2 has no image."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    assert one("auroc(average=per_class)", p.log(), [0, 1, 1]) == [100, 100, None]
    assert one("auroc", p.log(), [0, 1, 1]) == 100
    assert one("auroc", p.log(), [1, 0, 1]) == pytest.approx((50 + 25) / 2)


def test_average_precision_by_hand_with_ties():
    """Positives at ranks 1 and 3: (1/1 + 2/3) / 2; tied with another: 2 of 4 in both cases."""
    positive = torch.tensor([1, 0, 1, 0, 0]) > 0
    ordered = torch.tensor([5.0, 4, 3, 2, 1])
    assert average_precision(ordered, positive) == pytest.approx(100 * 5 / 6)
    tied = torch.tensor([5.0, 4, 3, 3, 1])
    assert average_precision(tied, positive) == pytest.approx(100 * (1 + 2 / 4) / 2)
    assert average_precision(torch.ones(5), positive) == pytest.approx(40)
    assert average_precision(ordered, positive & False) is None


def test_map_is_the_mean_of_labels_that_occur():
    logits = [[2, 0, 1], [1, 3, 1], [0, 2, 5], [-1, 1, 0]]
    targets = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    # label 0: ranks 1 and 3; label 1: ranks 1 and 3; label 2 does not occur
    assert one("map", logits, targets, "multi") == pytest.approx(100 * 5 / 6)
    assert one("map(average=per_class)", logits, targets, "multi")[2] is None
    # The positives of labels 0 and 1 win 3 of 4 pairs.
    assert one("auroc", logits, targets, "multi") == 75
    none = [[0, 0, 0]] * 4
    assert math.isnan(one("map", logits, none, "multi"))


# --- several labels an image --------------------------------------------------------------------


def test_threshold_metrics_by_hand():
    """Logits above 0 are an answer; right: 1 of 2 answers of label 0, 1 of 1 of label 1."""
    logits = [[1, -1, -1], [2, -2, -3], [-1, 1, -1], [-1, -1, 0]]
    targets = [[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]
    words = "precision recall f1 exact_match hamming"
    expected = {"precision": 100 * 2.5 / 3, "recall": 100 * 2.5 / 3, "f1": 100 * 2.5 / 3}
    expected |= {"exact_match": 50, "hamming": 1000 / 12}
    assert compute(words, logits, targets, "multi") == pytest.approx(expected)
    micro = "precision(average=micro) recall(average=micro) f1(average=micro)"
    found = compute(micro, logits, targets, "multi")
    assert found == pytest.approx({"precision_micro": 75, "recall_micro": 75, "f1_micro": 75})


def test_threshold_is_of_probabilities():
    logits, targets = [[0.0, 2.0, -2.0]], [[0, 1, 0]]  # 0.5, 0.88, 0.12
    assert one("exact_match", logits, targets, "multi") == 0
    assert one("exact_match(threshold=0.6)", logits, targets, "multi") == 100
    assert one("hamming(threshold=0.1)", logits, targets, "multi") == pytest.approx(100 / 3)
    assert one("recall(threshold=0.9)", logits, targets, "multi") == 0


# --- numbers ------------------------------------------------------------------------------------


def test_regression_by_hand():
    outputs, targets = [[1.0], [2.0], [4.0], [3.0]], [1.0, 3.0, 2.0, 2.0]
    expected = {"mae": 1.0, "rmse": math.sqrt(6 / 4), "r2": 1 - 6 / 2}
    assert compute("mae rmse r2", outputs, targets, "number") == pytest.approx(expected)


def test_regression_of_two_numbers_is_their_mean():
    outputs, targets = [[1.0, 10], [3, 30]], [[1.0, 20], [1, 40]]
    found = compute("mae rmse", outputs, targets, "number")
    assert found == pytest.approx({"mae": 22 / 4, "rmse": (math.sqrt(2) + 10) / 2})
    assert math.isnan(one("r2", outputs, targets, "number"))  # the first target is constant


def test_r2_keeps_its_digits_far_from_zero():
    """A sum of squares of times since 1970 has lost all digits of their variance."""
    targets = 1.7e9 + torch.arange(4, dtype=torch.float64)
    metrics = Metrics(["r2"], outputs=1, kind="number")
    metrics.reset("cpu")
    metrics.update(targets[:, None] + 1, targets, torch.zeros(4))
    metrics.reduce()
    assert metrics.values()["r2"] == pytest.approx(1 - 4 / 5)


# --- broken images ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
def test_broken_image_counts_as_wrong_in_every_metric_of_classes(bad):
    """NaN is the largest value to `topk`, and sorts as the highest score."""
    logits = 5 * torch.eye(3)[[0, 1, 2, 0]]
    labels = [0, 1, 2, 0]
    logits[3, 0] = bad
    words = "acc1 acc(k=3) precision(k=1) recall(k=1) balanced_accuracy precision recall f1"
    expected = {"acc1": 75, "acc_3": 75, "precision_1": 75, "recall_1": 75}
    expected |= {"balanced_accuracy": 250 / 3, "precision": 100, "recall": 250 / 3}
    found = compute(words, logits, labels)
    assert found == pytest.approx(expected | {"f1": (200 / 3 + 200) / 3})
    # Class 0: 2 and 2 images of which one pair of 4 is lost, twice; class 1 and 2: 1 pair of 3.
    assert one("auroc(average=per_class)", logits, labels) == pytest.approx([50, 200 / 3, 200 / 3])
    confidence = torch.tensor(5.0).exp() / (torch.tensor(5.0).exp() + 2)
    expected = 100 * abs(3 * confidence.item() + 1 - 3) / 4  # one bin
    assert one("ece(bins=1)", logits, labels) == pytest.approx(expected, rel=1e-5)


def test_broken_image_counts_as_wrong_in_every_label():
    logits, targets = [[9, -9], [NAN, -9], [-9, 9]], [[1, 0], [1, 0], [0, 1]]
    expected = {"exact_match": 200 / 3, "hamming": 400 / 6, "acc1": 200 / 3}
    assert compute("exact_match hamming acc1", logits, targets, "multi") == pytest.approx(expected)
    assert one("f1(average=per_class)", logits, targets, "multi") == pytest.approx(
        [200 / 3, 200 / 3]
    )
    assert one("auroc(average=per_class)", logits, targets, "multi") == [50, 50]
    assert math.isnan(one("mae", [[NAN], [1.0]], [1.0, 1.0], "number"))


# --- an oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 6])
def test_metrics_are_those_of_sklearn(digits):
    """With many ties (one digit) and without."""
    oracle = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(digits)
    logits = torch.randn(200, 5, generator=generator).mul(10**digits).round().div(10**digits)
    labels = torch.randint(0, 5, (200,), generator=generator)
    several = torch.rand(200, 5, generator=generator) > 0.6
    p, answers = logits.double().softmax(1).numpy(), logits.topk(5).indices[:, 0]
    found = compute("balanced_accuracy f1 precision recall auroc confusion", logits, labels)
    assert found["confusion"] == oracle.confusion_matrix(labels, answers).tolist()
    macro = {"average": "macro", "zero_division": 0}
    assert found["f1"] == pytest.approx(100 * oracle.f1_score(labels, answers, **macro))
    assert found["recall"] == pytest.approx(100 * oracle.recall_score(labels, answers, **macro))
    area = oracle.roc_auc_score(labels, p, multi_class="ovr")
    assert found["auroc"] == pytest.approx(100 * area)
    found = compute("auroc map f1", logits, several.long(), "multi")
    assert found["auroc"] == pytest.approx(100 * oracle.roc_auc_score(several, logits))
    precision = oracle.average_precision_score(several, logits)
    assert found["map"] == pytest.approx(100 * precision)
    assert found["f1"] == pytest.approx(100 * oracle.f1_score(several, logits >= 0, **macro))


def test_order_metrics_are_those_of_all_pairs():
    """Against plain loops, with many ties."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 6, (30,), generator=generator).double()
        positive = torch.rand(30, generator=generator) > 0.7
        own, others = scores[positive].tolist(), scores[~positive].tolist()
        wins = sum((a > b) + 0.5 * (a == b) for a in own for b in others)
        assert area_under_roc(scores, positive) == 100 * wins / (len(own) * len(others))
        at = [sum(b >= a for b in own) / sum(b >= a for b in scores.tolist()) for a in own]
        assert average_precision(scores, positive) == pytest.approx(100 * sum(at) / len(at))


def test_every_metric_is_in_the_docs():
    text = (ROOT / "docs/losses-and-metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}" not in text] == []
