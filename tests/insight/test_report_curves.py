# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Keys of log.txt share a chart with their kind; long curves keep their spikes."""

import re
from pathlib import Path

import pytest

from insight import report_curves
from insight.report_curves import (
    GROUPS,
    Chart,
    Series,
    as_json,
    build_charts,
    labels_in_chart,
    mean_shares,
    number_labels,
    place,
    points_for,
    sample,
    style_of,
)
from insight.report_data import read_runs
from insight.run_data import read_run
from tests.insight.written import finetune_rows, pretrain_rows, write_run


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train_loss", ("Loss", "Loss", "train", "min")),
        ("test_loss_ema", ("Loss", "Loss", "test EMA", "min")),
        ("holdout_loss", ("Loss", "Loss", "holdout", "min")),
        ("test_sketch_loss", ("Loss", "Loss", "test sketch", "min")),
        ("test_acc1", ("Metrics", "Top-1 accuracy", "test", "max")),
        ("test_sketch_acc1_ema", ("Metrics", "Top-1 accuracy", "test sketch EMA", "max")),
        ("train_class_acc", ("Metrics", "Top-1 accuracy", "train", "max")),
        ("test_balanced_acc", ("Metrics", "Balanced acc", "test", "max")),
        ("test_rmse", ("Metrics", "RMSE", "test", "min")),
        ("train_lr", ("Learning rate", "Learning rate", "learning rate", "")),
        ("probe_knn", ("Probes", "Probes, %", "kNN", "max")),
        ("probe_linear_10pct", ("Probes", "Probes with few labels, %", "linear 10%", "max")),
        ("grad_norm_stage2", ("Health of the network", "Gradient norm", "stage 2", "")),
        ("train_grad_norm", ("Health of the network", "Gradient norm", "grad norm", "")),
        ("rank_me", ("Health of the network", "Rank of the features", "RankMe", "max")),
        ("images_per_s", ("Speed", "Images per second", "images/s", "max")),
        ("test_acc1_blr0.1", ("Metrics", "Top-1 accuracy of each head", "blr 0.1", "max")),
        ("test_rmse_blr1e-05", ("Metrics", "RMSE of each head", "blr 1e-05", "min")),
        ("test_best_blr", ("Learning rate", "Learning rate of the best head", "best head", "")),
        ("anything", ("Other", "Anything", "anything", "")),
    ],
)
def test_place_of_a_key(key, expected):
    assert place(key, {"test_acc1", "test_loss"}) == expected
    assert expected[0] in GROUPS


def test_charts_hold_the_curves_of_all_runs_and_no_counters(tmp_path):
    folders = [write_run(tmp_path / "pre", pretrain_rows(4))]
    folders.append(write_run(tmp_path / "fine", finetune_rows(3)))
    charts, notes = build_charts(read_runs(folders))
    assert notes == []
    rate = next(chart for chart in charts if chart.title == "Learning rate")
    assert [(series.run, len(series.y)) for series in rate.series] == [(0, 4), (1, 3)]
    titles = [chart.title for chart in charts]
    assert titles.index("Probes, %") < titles.index("Learning rate") < titles.index("Gradient norm")
    assert not {"epoch", "n parameters", "time data"} & {*titles}
    distance = next(chart for chart in charts if chart.title == "Channel cosine distance")
    assert [s.label for s in distance.series] == ["feature distance", "stage 1", "stage 2"]


def test_lists_with_a_value_for_each_block_are_drawn_over_the_blocks(tmp_path):
    rows = pretrain_rows(5)
    rows[-1]["feature_distance_blocks"] = [0.1, None, 0.2]  # of a network with NaN
    runs = read_runs([write_run(tmp_path / name, rows) for name in "ab"])
    title = "Channel cosine distance by block"
    alone, both = (
        next(chart for chart in build_charts(some)[0] if chart.title == title)
        for some in (runs[:1], runs)
    )
    assert alone.axis == "block"
    assert [series.label for series in alone.series] == ["epoch 1", "epoch 2", "epoch 4"]
    assert alone.series[0].x == [1, 2, 3, 4]
    assert alone.series[0].y == rows[0]["feature_distance_blocks"]
    assert [(series.run, series.label) for series in both.series] == [
        (0, "last epoch"),
        (1, "last epoch"),
    ]


@pytest.mark.parametrize("runs", [1, 2, 8, 9, 16])
def test_all_curves_of_a_chart_look_different(runs):
    """Two of six gradient norms were solid blue when several runs were shown."""
    labels = labels_in_chart(runs)
    styles = [style_of(run, label, runs) for run in range(runs) for label in range(labels)]
    assert len({*styles}) == len(styles) == runs * labels
    assert labels >= 4
    css = (Path(report_curves.__file__).parent / "report.css").read_text()
    for color, dash in styles:
        assert f"line.c{color}, path.c{color} {{" in css
        assert dash == 0 or f".d{dash} {{ stroke-dasharray" in css  # 0 is solid
    patterns = re.findall(r"stroke-dasharray: ([\d ]+);", css)
    assert len(patterns) == len({*patterns}) >= report_curves.DASHES


def test_losses_of_pretraining_and_finetuning_have_charts_of_their_own(tmp_path):
    """Reconstruction loss and cross-entropy shared an axis, as if they could be compared."""
    fine = {"model": "convnextv2_atto"}
    folders = [write_run(tmp_path / "pre", pretrain_rows(4))]
    folders.append(write_run(tmp_path / "fine", finetune_rows(3), flags=fine))
    charts = [chart for chart in build_charts(read_runs(folders))[0] if chart.group == "Loss"]
    assert [(chart.title, {series.run for series in chart.series}) for chart in charts] == [
        ("Loss, pre-training", {0}),
        ("Loss, fine-tuning", {1}),
    ]
    assert [chart.labels for chart in charts] == [
        ["train", "holdout"],
        ["train", "test", "test EMA"],
    ]
    folders[0] = write_run(tmp_path / "fine2", finetune_rows(3), flags=fine)
    assert build_charts(read_runs(folders))[0][0].title == "Loss"


@pytest.mark.parametrize("runs", [1, 2])
def test_a_label_looks_the_same_in_all_charts_of_a_page(tmp_path, runs):
    """`test` was orange in one chart and blue in the next, which has no `train`."""
    rows = [a | b for a, b in zip(pretrain_rows(3), finetune_rows(3), strict=True)]
    folders = [write_run(tmp_path / f"run{index}", rows) for index in range(runs)]
    charts, _ = build_charts(read_runs(folders))
    numbers: dict[str, set[int]] = {}
    for chart in charts:
        assert len({*chart.numbers.values()}) == len(chart.labels) == len(chart.numbers)
        for label, number in chart.numbers.items():
            numbers.setdefault(label, set()).add(number)
    assert {label for label, found in numbers.items() if len(found) > 1} == set()
    for label in ("train", "test", "test EMA", "stage 1"):
        assert sum(label in chart.labels for chart in charts) > 1
    assert numbers["train"] == numbers["RankMe"] == {0}  # styles are few: alone, the first one


def test_labels_for_which_styles_do_not_suffice_differ_within_each_chart():
    pairs = ("ab", "bc", "ca")  # three labels, each with each other one, and two styles
    charts = [
        Chart("Loss", pair, [Series(0, each, each, [1], [1]) for each in pair]) for pair in pairs
    ]
    number_labels(charts, 2)
    assert [sorted(chart.numbers.values()) for chart in charts] == [[0, 1]] * 3


def test_keys_with_the_same_label_have_curves_that_differ(tmp_path):
    rows = [{"epoch": 0, "train_class_acc": 50.0, "train_acc1": 40.0}]
    (chart,) = build_charts([read_run(write_run(tmp_path / "run", rows))])[0]
    assert [(series.label, series.y) for series in chart.series] == [
        ("train", [50]),
        ("train acc1", [40]),
    ]


def test_a_chart_with_more_labels_than_styles_is_split(tmp_path):
    rows = [{"epoch": e} | {f"grad_norm_part{i}": 1.0 + e for i in range(11)} for e in range(2)]
    found = read_runs([write_run(tmp_path / name, rows) for name in "ab"])
    charts, _ = build_charts(found)
    assert [(chart.title, len(chart.labels)) for chart in charts] == [
        ("Gradient norm, part 1 of 2", 8),
        ("Gradient norm, part 2 of 2", 3),
    ]
    assert all(len(chart.series) == 2 * len(chart.labels) for chart in charts)
    assert [len(chart.labels) for chart in build_charts(found[:1])[0]] == [11]


def test_gamma_and_beta_of_grn_have_charts_of_their_own():
    places = [place(f"grn_{name}_stage1", ()) for name in ("gamma", "beta")]
    assert [(spot.chart, spot.label) for spot in places] == [
        ("GRN gamma", "stage 1"),
        ("GRN beta", "stage 1"),
    ]


def test_metrics_of_a_user_have_the_direction_of_the_record(tmp_path):
    rows, best = [{"epoch": e, "test_cost_5": 3.0 - e} for e in range(3)], {"value": 1.0}
    for lower, expected in ((True, (1, 3)), (False, (3, 1))):
        record = {"best": {"test_cost_5": best | {"lower_is_better": lower}}}
        (chart,) = build_charts([read_run(write_run(tmp_path / "run", rows, record))])[0]
        assert chart.series[0].best == expected
    assert read_run(write_run(tmp_path / "odd", rows, {"best": {"x": 3}})).lowest == set()


def test_missing_values_leave_no_point(tmp_path):
    rows = [{"epoch": 0, "train_loss": None}, {"epoch": 1, "train_loss": 2.0, "alarms": ["x"]}]
    (chart,) = build_charts([read_run(write_run(tmp_path / "run", rows))])[0]
    assert (chart.series[0].x, chart.series[0].y) == ([2], [2])


def test_best_is_the_lowest_loss_and_the_highest_accuracy():
    x = [1.0, 2.0, 3.0]
    assert Series(0, "test_loss", "test", x, [3.0, 1.0, 2.0], "min").best == (1, 2)
    assert Series(0, "test_acc1", "test", x, [3.0, 1.0, 3.0], "max").best == (3, 1)
    assert Series(0, "train_lr", "lr", x, [3.0, 1.0, 3.0]).best is None
    assert Series(0, "test_loss", "test", x, [3.0, 1.0, 2.0], "min").last == (2, 3)


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    x = [float(index) for index in range(10_000)]
    y = [1.0] * 10_000
    y[4321], y[77], y[0], y[-1] = 50.0, -50.0, 2.0, 3.0
    xs, ys = sample(Series(0, "train_loss", "train", x, y), 100)
    assert len(xs) <= 100
    assert xs == sorted(xs)
    assert {(4321, 50), (77, -50), (0, 2), (9999, 3)} <= {*zip(xs, ys, strict=True)}


def test_many_curves_get_fewer_points(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / "run", pretrain_rows(1000)))
    charts, _ = build_charts([run])
    assert points_for(charts) == report_curves.POINTS
    monkeypatch.setattr(report_curves, "CURVE_BYTES", 20_000)
    most = points_for(charts)
    assert report_curves.FEWEST_POINTS < most < 200
    lengths = [len(s["y"]) for chart in as_json(charts) for s in chart["series"]]
    assert max(lengths) <= most


def test_many_charts_are_limited_and_said(tmp_path):
    rows = [{"epoch": 0} | {f"own{index}": 1.0 for index in range(70)}]
    charts, notes = build_charts([read_run(write_run(tmp_path / "run", rows))])
    assert len(charts) == report_curves.MOST_CHARTS
    assert notes == ["10 more charts are not shown, such as Own60."]


def test_log_axis_from_the_start_only_over_many_decades(tmp_path):
    rows = [{"epoch": e, "train_loss": 10.0**-e, "train_lr": 10.0**-e} for e in range(5)]
    charts, _ = build_charts([read_run(write_run(tmp_path / "run", rows))])
    assert [(chart.title, chart.log) for chart in charts] == [
        ("Loss", True),
        ("Learning rate", False),
    ]
    rows = [{"epoch": e, "train_loss": 2.0 - 0.1 * e} for e in range(5)]
    assert not build_charts([read_run(write_run(tmp_path / "run", rows))])[0][0].log


def test_shares_are_means_and_the_rest_is_other(tmp_path):
    rows = [{"epoch": 0, "time_data": 0.2, "time_forward": 0.3, "time_comm": None}]
    rows.append({"epoch": 1, "time_data": 0.4, "time_forward": 0.3})
    found = mean_shares(read_run(write_run(tmp_path / "run", rows)))
    assert found == pytest.approx({"data": 0.3, "forward": 0.3, "other": 0.4})
    assert mean_shares(read_run(write_run(tmp_path / "old", [{"epoch": 0}]))) == {}
    rows = [{"epoch": 0, "time_data": 0.9, "time_forward": 0.6}]  # of two clocks
    found = mean_shares(read_run(write_run(tmp_path / "more", rows)))
    assert found == pytest.approx({"data": 0.6, "forward": 0.4})
