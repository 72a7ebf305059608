# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Metrics by name, over any split into batches and ranks; the metric of the best checkpoint."""

import itertools
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config.calls import parse_call
from errors import UserError
from parallel.process_group import gather_rows, get_logger
from tests.groups import results_of, run_ranks
from training import evaluation
from training.evaluation import Metrics, build_metrics, log_name
from training.metrics import DEFAULTS, METRICS, default_metrics

ME = "tests.training.test_evaluation"
WORDS = {
    "class": "acc1 acc5 precision(k=2) recall(k=2) f1 f1(average=micro) f1(average=per_class) "
    "precision recall balanced_accuracy class_accuracy confusion auroc map ece "
    f"{ME}:mean_score",
    "multi": "acc1 precision(k=2) recall(k=2) f1 f1(threshold=0.3) exact_match hamming auroc "
    f"map {ME}:mean_score(scale=2)",
    "number": f"mae rmse r2 {ME}:mean_score",
}


def mean_score(scores: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> float:
    """A user's metric."""
    return scale * scores.double().nansum().item() / len(targets)


def error_rates(scores: torch.Tensor, targets: torch.Tensor) -> dict:
    """A user's metric of two values, tensors."""
    wrong = scores.argmax(1) != targets
    return {"first": wrong[0].float(), "all": wrong.double().mean()}


error_rates.lower_is_better = True


def data_of(kind: str, images: int = 23) -> tuple[torch.Tensor, ...]:
    """Outputs with ties and a broken image, targets and losses."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-4, 5, (images, 6), generator=generator) / 2
    targets = {
        "class": torch.randint(0, 5, (images,), generator=generator),  # of the last class none
        "multi": torch.randint(0, 2, (images, 6), generator=generator),
        "number": torch.randn(images, 6, generator=generator),
    }[kind]
    if kind != "number":
        logits[-1, 2] = math.nan
    return logits, targets, torch.arange(images) / 8


def assert_close(found: dict, expected: dict) -> None:
    """Equal but for the rounding of sums; whole numbers, and what follows from them, exactly."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = name in ("loss", "ece", "mae", "rmse", "r2") or name.startswith("mean_score")
        assert found[name] == (pytest.approx(value, rel=1e-12) if rounded else value), name


def create(kind: str) -> Metrics:
    metrics = Metrics([WORDS[kind]], "loss", 6, kind)
    metrics.reset("cpu")
    return metrics


def add(metrics: Metrics, data: tuple[torch.Tensor, ...], sizes: list[int]) -> None:
    parts = [part.split(sizes) for part in data]
    for batch in zip(*parts, strict=True):
        metrics.update(*batch)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("shards", [[23], [12, 11], [20, 0, 3]])
@pytest.mark.parametrize("batch", [1, 7, 23])
def test_no_split_into_ranks_and_batches_changes_a_metric(kind, shards, batch, monkeypatch):
    """A mean over batches counted the images of a small last batch too much."""
    data = data_of(kind)
    whole = create(kind)
    add(whole, data, [23])
    whole.reduce()
    expected = whole.values()
    ranks, ends = [], [0, *itertools.accumulate(shards)]
    for first, last in itertools.pairwise(ends):
        own = create(kind)
        if last > first:
            sizes = [min(batch, last - start) for start in range(first, last, batch)]
            add(own, tuple(part[first:last] for part in data), sizes)
        ranks.append(own)
    total = sum(rank.sums for rank in ranks)
    monkeypatch.setattr(evaluation, "all_reduce_sum", lambda sums: total.clone())
    ranks[0].rows = [row for rank in ranks for row in rank.rows]  # as `gather_rows` does
    assert ranks[0].reduce() == (23, 0 if kind == "number" else 1)
    found = ranks[0].values()
    assert_close(found, expected)


def ranks_gather(rank: int, folder: Path) -> list:
    """Evaluate 2 images on rank 1 alone, and 5 images on both."""
    found = []
    for images, own in ((2, range(2 * rank)), (5, range(rank, 5, 2))):
        data = data_of("class", images)
        metrics = create("class")
        if len(own):
            add(metrics, tuple(part[list(own)] for part in data), [len(own)])
        metrics.reduce()
        found.append(metrics.values())
    rows = gather_rows(torch.full((3 * rank, 2), float(rank)))
    return [*found, None if rows is None else rows.tolist()]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    """A rank without images must take part in the reduction and in the gathering."""
    results = [each["ranks_gather"] for each in results_of(run_ranks([ranks_gather], 2, tmp_path))]
    for place, images in enumerate((2, 5)):
        alone = create("class")
        add(alone, data_of("class", images), [images])
        alone.reduce()
        expected = alone.values()
        for result in results:
            assert_close(result[place], expected)
    assert [result[-1] for result in results] == [[[1.0, 1.0]] * 3, None]


# --- names --------------------------------------------------------------------------------------


def test_names_in_the_log():
    words = ["acc1 f1(average=micro)", "precision(k=5)", "a.b:auc(weights=[1, 2])", "ece"]
    names = [log_name(parse_call(word, "--metrics")) for word in evaluation.SPACES.split(words[0])]
    names += [log_name(parse_call(word, "--metrics")) for word in words[1:]]
    assert names == ["acc1", "f1_micro", "precision_5", "auc__1_2_", "ece"]


def test_defaults_are_the_metrics_of_the_official_log():
    metrics = Metrics()
    assert metrics.names == ["loss", "acc1", "acc5"]
    assert (metrics.best, metrics.lower_is_better) == ("acc1", False)
    for kind in DEFAULTS:
        metrics = Metrics(outputs=6, kind=kind)
        assert metrics.names == ["loss", *default_metrics(kind)]
        assert metrics.best == default_metrics(kind)[0]
    assert metrics.lower_is_better  # rmse


@pytest.mark.parametrize(
    ("best", "name", "lower"),
    [
        ("loss", "loss", True),
        ("f1", "f1", False),
        ("ece", "ece", True),
        ("auroc", "auroc", False),  # not among --metrics
        ("precision(k=2)", "precision_2", False),
        ("precision_2", "precision_2", False),
        (f"{ME}:mean_score", "mean_score", False),
        (f"{ME}:error_rates", "error_rates", True),
        ("error_rates_all", "error_rates_all", True),
    ],
)
def test_best_metric_has_a_direction_and_is_computed(best, name, lower):
    metrics = Metrics(["f1", "ece precision(k=2)", f"{ME}:error_rates"], best, 6)
    assert (metrics.best, metrics.lower_is_better) == (name, lower)
    assert name in (*metrics.names, "error_rates_all")


@pytest.mark.parametrize(
    ("words", "best", "message"),
    [
        ("f11", None, r"--metrics: unknown metric 'f11'. Did you mean 'f1'\?"),
        ("f1(avg=micro)", None, r"unexpected keyword argument 'avg'; it takes average=macro"),
        ("f1(average=all)", None, "average: got 'all', expected macro, micro, per_class; it takes"),
        ("precision(k=2.5)", None, "k: got 2.5, expected an integer >=1"),
        ("precision(k=2, average=micro)", None, "goes with no other argument; drop one"),
        ("precision(k=7)", None, r"precision\(k=7\) needs at least 7, and the model has 6 outputs"),
        (
            "f1(threshold=0.5)",
            None,
            "is for several classes per image, and this run's targets are one",
        ),
        (
            "mae acc1",
            None,
            "mae is for numbers, .* targets are one class per image; use one of acc1",
        ),
        ("f1(average", None, r"'\(' is not closed"),
        ("acc1", "acc9", "--best_metric: unknown metric 'acc9'. Did you mean 'acc"),
        ("acc1", "confusion", "confusion has several values, expected one; use one of loss, acc1"),
        ("nowhere:f", None, "cannot import metric 'nowhere:f': No module named 'nowhere'"),
        (f"{ME}:ME", None, "is a str, expected a function"),
        (f"{ME}:mean_score(size=1)", None, "unexpected keyword argument 'size'"),
        (f"{ME}:f1", None, f"{ME}:f1 has the name of the metric f1; rename it"),
        ("f1(average=micro) " + f"{ME}:f1_micro", None, "are both logged as f1_micro; rename one"),
    ],
)
def test_bad_names_are_refused_before_the_data_is_listed(words, best, message):
    with pytest.raises(UserError, match=message):
        Metrics([words], best, outputs=6)


def test_confusion_of_very_many_classes_is_refused():
    """Its sums would take 3.8 GB for ImageNet-22K."""
    with pytest.raises(UserError, match="confusion: 21841 classes, expected at most 5000"):
        Metrics(["confusion"], outputs=21841)


def test_targets_of_another_shape_are_refused():
    logits, losses = torch.zeros(4, 6), torch.zeros(4)
    for kind, targets, message in (
        ("class", torch.zeros(4, 6), r"got targets float32 of shape \(4, 6\), expected integers"),
        ("multi", torch.zeros(4).long(), r"expected shape \(4, 6\)"),
        ("number", torch.zeros(4), r"expected shape \(4, 6\)"),
    ):
        with pytest.raises(UserError, match=message):
            create(kind).update(logits, targets, losses)
    with pytest.raises(UserError, match="the model has 5 outputs, expected 6"):
        create("class").update(torch.zeros(4, 5), torch.zeros(4).long(), losses)


# --- functions of the user's --------------------------------------------------------------------


def f1(scores: torch.Tensor, targets: torch.Tensor) -> str:
    """A name that is taken, and no number."""
    return "high"


f1_micro = level = f1


def faulty(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return scores.nowhere


def rare(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Fails in evaluation alone."""
    if len(targets) == 4:
        raise RuntimeError("four images")
    return 1.0


def measure(words: str, best: str = "loss") -> dict:
    metrics = Metrics([words], best, 3)
    metrics.reset("cpu")
    logits = torch.eye(3)[[0, 1, 1, 2]]
    metrics.update(logits, torch.tensor([1, 1, 1, 2]), torch.zeros(4))
    metrics.reduce()
    return metrics.values()


def test_function_of_the_user_gets_all_outputs():
    assert measure(f"{ME}:mean_score(scale=3)") == {"loss": 0, "mean_score_3": 3}
    found = measure(f"{ME}:error_rates", "error_rates_all")
    assert found == {"loss": 0, "error_rates_first": 1.0, "error_rates_all": 0.25}
    assert [type(value) for value in found.values()] == [float] * 3  # for the checkpoint


@pytest.mark.parametrize(
    ("words", "best", "message"),
    [
        ("level", "loss", r":level returned str high, expected a number, or a dict"),
        ("faulty", "loss", r":faulty: AttributeError in test_evaluation.py, line \d+: 'Tensor'"),
        ("error_rates", f"{ME}:error_rates", "error_rates: expected one of error_rates_first, err"),
        ("error_rates", "error_rates_none", "error_rates_none: expected one of error_rates_first"),
        ("mean_score", "mean_score_one", "--best_metric mean_score_one: expected one of mean_sco"),
    ],
)
def test_errors_of_the_users_functions_show_before_training(words, best, message):
    args = SimpleNamespace(metrics=[f"{ME}:{words}"], best_metric=best)
    build_metrics(args)  # the number of classes is not known yet
    with pytest.raises(UserError, match=message):
        build_metrics(args, 3)
    build_metrics(SimpleNamespace(metrics=[f"{ME}:error_rates"], best_metric="error_rates_all"), 3)


@pytest.mark.parametrize(
    ("best", "found"),
    [
        ("f1", "f1"),
        ("sketch_f1(average=micro)", "f1_micro"),
        ("a_set_balanced_accuracy", "balanced_accuracy"),
        (None, "acc1"),
    ],
)
def test_run_that_chose_by_another_set_is_evaluated_by_the_same_metric(best, found):
    """--eval of other data refused the run's own `--best_metric sketch_f1`."""
    args = SimpleNamespace(metrics=None, best_metric=best, eval=True)
    assert build_metrics(args, 3).best == found
    with pytest.raises(UserError, match="unknown metric 'sketch_f7'"):
        build_metrics(SimpleNamespace(metrics=None, best_metric="sketch_f7", eval=True))
    own = SimpleNamespace(metrics=None, best_metric="sketch_my_fork.metrics:cost(2)", eval=True)
    assert build_metrics(own, 3).best == "acc1"
    typed = {"eval": True, "typed": {"best_metric"}}  # a typing error of this command
    with pytest.raises(UserError, match="unknown metric 'tpyo_f1'"):
        build_metrics(SimpleNamespace(metrics=None, best_metric="tpyo_f1", **typed))
    with pytest.raises(UserError, match="unknown metric 'sketch_f1'"):
        build_metrics(SimpleNamespace(metrics=None, best_metric="sketch_f1", eval=False))


def test_error_of_the_users_function_in_evaluation_is_nan_and_a_warning(caplog):
    get_logger().addHandler(caplog.handler)
    try:
        found = measure(f"{ME}:rare acc1")
    finally:
        get_logger().removeHandler(caplog.handler)
    assert math.isnan(found.pop("rare"))
    assert found == {"loss": 0, "acc1": 75.0}
    assert "rare failed, so it is NaN: RuntimeError in test_evaluation.py, line" in caplog.text


def test_undefined_best_metric_is_reported():
    """No image of a second class: a run without checkpoint-best.pth, and no reason."""
    seen = logging.Handler()
    seen.messages = []
    seen.emit = lambda record: seen.messages.append(record.getMessage())
    get_logger().addHandler(seen)
    try:
        metrics = Metrics(["auroc"], "auroc", 2)
        metrics.reset("cpu")
        metrics.update(torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(3))
        metrics.reduce()
        assert math.isnan(metrics.values()["auroc"])
    finally:
        get_logger().removeHandler(seen)
    assert seen.messages == ["auroc is nan, so this cannot become the best checkpoint"]


def test_every_row_of_the_table_has_a_docstring():
    assert [name for name, make in METRICS.items() if make.__name__ == "<lambda>"] == [
        "acc1",
        "acc5",
    ]
    assert all(make.__doc__ for name, make in METRICS.items() if name not in ("acc1", "acc5"))
