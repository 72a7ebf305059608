# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The curves of a report: which keys of log.txt share a chart, and their last and best values.

python -c "from insight.report_curves import place; print(place('test_acc1_ema', {'test_acc1'}))"
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from config.run_files import PLACES
from insight.report_data import evenly
from insight.run_data import RunData, number
from insight.runs import goal_of

GROUPS = ("Loss", "Metrics", "Probes", "Learning rate", "Health of the network", "Speed", "Other")
MOST_CHARTS = 60
COLORS, DASHES = 8, 8  # of curves, as in report.css
LAYERS = "_blocks"  # end of the keys of lists with a value for each block of the network
POINTS, FEWEST_POINTS = 600, 40  # of a curve
POINT_BYTES = 14  # of a point in the page, about
CURVE_BYTES = 700_000  # of all curves of a page, about
SHARES = {  # key of log.txt -> name
    "time_data": "data",
    "time_forward": "forward",
    "time_backward": "backward",
    "time_optimizer": "optimizer",
    "time_comm": "communication",
}
SPELLED = {"knn": "kNN", "map": "mAP", "f1": "F1", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}
SPELLED |= {"1pct": "1%", "10pct": "10%", "grn": "GRN", "mfu": "MFU", "ema": "EMA"}
LABELS = {"train_lr": "learning rate", "rank_me": "RankMe", "images_per_s": "images/s"}
LABELS |= {"test_best_blr": "best head"}
HEAD = re.compile(r"_blr(\d\S*)$")  # end of the keys of a head of --linear_probe: its learning rate
PERCENT = re.compile(r"test_(\w+_)?acc\d+(_ema)?|probe_(knn|linear)")


class Place(NamedTuple):
    """The place of a key: group, title of its chart, label of its curve, and a hint.

    goal: `min`, `max`, or '' where no value is the best.
    """

    group: str
    chart: str
    label: str
    goal: str = ""


# Regular expression of keys -> group, chart. The label is what the last bracket matches, or
# the key without `train_`. The first that matches the whole key counts.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("train_lr", "Learning rate", "Learning rate"),
    ("test_best_blr", "Learning rate", "Learning rate of the best head"),
    (r"(train)_class_acc", "Metrics", "Top-1 accuracy"),
    (r"probe_(.+_\d+pct\w*)", "Probes", "Probes with few labels, %"),
    (r"probe_(.+)", "Probes", "Probes, %"),
    (r"(holdout|fixed_train)_loss", "Loss", "Loss"),
    (r"train_grad_norm|grad_norm_(.+)", "Health of the network", "Gradient norm"),
    ("rank_me", "Health of the network", "Rank of the features"),
    (r"feature_distance_?(.*)", "Health of the network", "Channel cosine distance"),
    (r"grn_gamma_(.+)", "Health of the network", "GRN gamma"),
    (r"grn_beta_(.+)", "Health of the network", "GRN beta"),
    (r"(dead|saturated)_channels", "Health of the network", "Dead and saturated channels, %"),
    ("skipped_steps", "Health of the network", "Skipped steps, %"),
    ("images_per_s", "Speed", "Images per second"),
    ("mfu", "Speed", "Model FLOPs utilization"),
)


@dataclass
class Series:
    """A curve: x, the epochs done, and y. run: its number. label: `train`, `test`, `knn` ..."""

    run: int
    key: str
    label: str
    x: list[float]
    y: list[float]
    goal: str = ""

    @property
    def last(self) -> tuple[float, float]:
        """The last value and its epoch."""
        return self.y[-1], self.x[-1]

    @property
    def best(self) -> tuple[float, float] | None:
        """The best value and its epoch, None where no value is the best."""
        if not self.goal:
            return None
        value = min(self.y) if self.goal == "min" else max(self.y)
        return value, self.x[self.y.index(value)]


@dataclass
class Chart:
    """Curves that share a plot. axis: unit of x, `epoch` or `block`. numbers: see number_labels."""

    group: str
    title: str
    series: list[Series] = field(default_factory=list)
    axis: str = "epoch"
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The labels of the curves, each once."""
        return [*dict.fromkeys(series.label for series in self.series)]

    @property
    def log(self) -> bool:
        """True where a log axis shows more from the start: a loss over three decades."""
        values = [y for series in self.series for y in series.y]
        return self.group == "Loss" and 0 < 1000 * min(values) < max(values)


def place(key: str, keys: Collection[str], lowest: Collection[str] = ()) -> Place:
    """Return the place of a key of log.txt; keys: all that runs have, to recognize sets.

    lowest: keys of a user's metrics of which the lowest value is the best.
    """
    goal = goal_of(HEAD.sub("", key), lowest)
    for pattern, group, chart in TABLE:
        if found := re.fullmatch(pattern, key):
            label = next(filter(None, reversed(found.groups())), key.removeprefix("train_"))
            return Place(group, chart or _title(key), LABELS.get(key) or _words(label), goal)
    found = re.fullmatch(r"(train|test)_(.+?)(_ema)?", key)
    if not found:
        return Place("Other", _title(key), _words(key))
    split, name, ema = found.groups()
    if head := HEAD.search(name):
        title = f"{metric_name(name.removesuffix(head[0]))} of each head"
        return Place("Metrics", title, f"blr {head[1]}", goal)
    group = "Loss" if name.endswith("loss") else "Metrics"
    name, where = _without_set(split, name, keys)
    label = " ".join(filter(None, (split, where, "EMA" * bool(ema))))
    if group == "Loss":
        more = name.removesuffix("loss").strip("_")
        return Place(group, "Loss", " ".join(filter(None, (label, _words(more)))), goal)
    return Place(group, metric_name(name), label, goal)


def _without_set(split: str, name: str, keys: Collection[str]) -> tuple[str, str]:
    """Split `sketch_acc1` into acc1 and sketch, if there is a key `test_acc1` too."""
    parts = name.split("_")
    for count in range(1, len(parts)):
        rest = "_".join(parts[count:])
        if split == "test" and f"test_{rest}" in keys:
            return rest, "_".join(parts[:count])
    return name, ""


def metric_name(name: str) -> str:
    """Return the title of a metric: `Top-1 accuracy` for acc1."""
    found = re.fullmatch(r"acc(\d+)", name)
    return f"Top-{found[1]} accuracy" if found else SPELLED.get(name) or _title(name)


def _words(key: str) -> str:
    words = re.sub(r"stage(\d)", r"stage \1", key.replace("_", " ")).split()
    return " ".join(SPELLED.get(word, word) for word in words)


def _title(key: str) -> str:
    words = _words(key)
    return words[:1].upper() + words[1:]


def read_values(run: RunData) -> dict[str, list[float | None]]:
    """Return the numbers of log.txt by key, a value a row."""
    found: dict[str, list[float | None]] = {}
    for index, row in enumerate(run.rows):
        for key, value in row.items():
            if key in (*PLACES, *SHARES, "at"):
                continue
            if (known := number(value)) is not None:
                if key not in found:
                    found[key] = [None] * len(run.rows)
                found[key][index] = known
    return found


def build_charts(runs: Sequence[RunData]) -> tuple[list[Chart], list[str]]:
    """Return the charts of some runs in the order of GROUPS, and sentences on what is left out."""
    values = [read_values(run) for run in runs]
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    lowest = {name for run in runs for name in run.lowest}
    charts: dict[tuple[str, str], Chart] = {}
    owners: dict[tuple[str, str], str] = {}  # (chart, label) -> key
    for key in keys:
        spot = place(key, keys, lowest)
        is_first = owners.setdefault((spot.chart, spot.label), key) == key
        label = spot.label if is_first else _words(key)  # no two of a chart are alike
        for index, run in enumerate(runs):
            pairs = zip([row["at"] for row in run.rows], values[index].get(key, ()), strict=False)
            points = [(x, y) for x, y in pairs if y is not None]
            if points:
                x, y = ([*column] for column in zip(*points, strict=True))
                title = title_in(spot, run, runs)
                chart = charts.setdefault((spot.group, title), Chart(spot.group, title))
                chart.series.append(Series(index, key, label, x, y, spot.goal))
    found = [*charts.values(), *build_layer_charts(runs)]
    ordered = sorted(found, key=lambda chart: GROUPS.index(chart.group))
    for chart in ordered:
        chart.series.sort(key=lambda series: series.run)  # of one key in the order of the keys
    most = labels_in_chart(len(runs))
    ordered = [part for chart in ordered for part in split_chart(chart, most)]
    kept, left = ordered[:MOST_CHARTS], [chart.title for chart in ordered[MOST_CHARTS:]]
    number_labels(kept, most)
    return kept, [f"{len(left)} more charts are not shown, such as {left[0]}."] if left else []


def title_in(spot: Place, run: RunData, runs: Sequence[RunData]) -> str:
    """Return the title of a run's chart: losses of pre-training and fine-tuning do not compare."""
    if spot.group == "Loss" and len({each.kind for each in runs}) > 1:
        return f"{spot.chart}, {run.kind or 'kind unknown'}"
    return spot.chart


def number_labels(charts: Sequence[Chart], most: int) -> None:
    """Number the labels of a page, so that one looks the same in all of its charts.

    Two labels of a chart have different numbers, below `most`. If those do not suffice, a label
    has another number in some charts.
    """
    shared: dict[str, list[set[str]]] = {}  # label -> labels of each chart that has it
    for chart in charts:
        for label in chart.labels:
            shared.setdefault(label, []).append({*chart.labels})
    known: dict[str, int] = {}
    for label, lists in shared.items():
        known[label] = _lowest_free({known[each] for part in lists for each in part & known.keys()})
    for chart in charts:
        chart.numbers = {label: known[label] for label in chart.labels if known[label] < most}
        for label in chart.labels:
            if label not in chart.numbers:
                chart.numbers[label] = _lowest_free({*chart.numbers.values()})


def _lowest_free(taken: Collection[int]) -> int:
    return next(number for number in itertools.count() if number not in taken)


def labels_in_chart(runs: int) -> int:
    """Return how many labels a chart may have so that all of its curves look different."""
    if runs == 1:
        return COLORS * DASHES
    return DASHES // math.ceil(runs / COLORS)


def style_of(run: int, label: int, runs: int) -> tuple[int, int]:
    """Return color and dash of a curve; label: its number, see `number_labels`.

    Of one run each label has its color, of several runs each run.
    """
    if runs == 1:
        return label % COLORS, label // COLORS
    return run % COLORS, run // COLORS * labels_in_chart(runs) + label


def split_chart(chart: Chart, most: int) -> list[Chart]:
    """Return charts of at most `most` labels each, which hold the curves of one."""
    labels = chart.labels
    count = math.ceil(len(labels) / most)
    if count < 2:
        return [chart]
    parts = []
    for index in range(count):
        own = labels[index * most : (index + 1) * most]
        series = [each for each in chart.series if each.label in own]
        title = f"{chart.title}, part {index + 1} of {count}"
        parts.append(Chart(chart.group, title, series, chart.axis))
    return parts


def build_layer_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return charts over the blocks of the network, from lists of log.txt with a value a block.

    Of one run they show the first, the middle and the last epoch, of several runs the last one.
    """
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    charts = []
    for key in [key for key in keys if key.endswith(LAYERS)]:
        spot = place(key.removesuffix(LAYERS), keys)
        chart = Chart(spot.group, f"{spot.chart} by block", axis="block")
        for index, run in enumerate(runs):
            rows = [row for row in run.rows if _is_curve(row.get(key))]
            for row in evenly(rows, 3 if len(runs) == 1 else 1):
                x = [float(block) for block in range(1, len(row[key]) + 1)]
                label = f"epoch {row['at']:g}" if len(runs) == 1 else "last epoch"
                chart.series.append(Series(index, key, label, x, [*map(float, row[key])], "min"))
        charts += [chart] if chart.series else []
    return charts


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and value != [] and None not in map(number, value)


def sample(series: Series, most: int) -> tuple[list[float], list[float]]:
    """Return at most about `most` points of a curve: the lowest and the highest of equal parts.

    The first and the last point, the minimum and the maximum stay.
    """
    x, y = series.x, series.y
    if len(y) <= most:
        return x, y
    parts = max(most // 2 - 1, 1)
    kept = {0, len(y) - 1}
    for part in range(parts):
        here = range(part * len(y) // parts, (part + 1) * len(y) // parts)
        kept |= {min(here, key=y.__getitem__), max(here, key=y.__getitem__)}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def points_for(charts: Sequence[Chart]) -> int:
    """Return how many points a curve may have, so that all fit into CURVE_BYTES."""
    curves = sum(len(chart.series) for chart in charts)
    return max(FEWEST_POINTS, min(POINTS, CURVE_BYTES // (POINT_BYTES * max(curves, 1))))


def as_json(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Return the charts for the script of the page."""
    most = points_for(charts)
    return [
        {
            "title": chart.title,
            "axis": chart.axis,
            "log": chart.log,
            "series": [
                {"run": each.run, "label": each.label} | _points(*sample(each, most))
                for each in chart.series
            ],
        }
        for chart in charts
    ]


def _points(x: Sequence[float], y: Sequence[float]) -> Mapping[str, list[float]]:
    return {"x": [_short(value) for value in x], "y": [_short(value) for value in y]}


def _short(value: float) -> float:
    """Round to 6 digits, and write integers without a point."""
    value = float(f"{value:.6g}")
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def mean_shares(run: RunData) -> dict[str, float]:
    """Return the mean shares of the time, 0 to 1, by name; `other` is the rest. {} if unknown."""
    means = {}
    for key, name in SHARES.items():
        known = [value for value in run.values(key) if value is not None]
        if known:
            means[name] = max(sum(known) / len(known), 0.0)
    total = sum(means.values())
    if not means or not math.isfinite(total) or total <= 0:
        return {}
    if total < 0.995:
        return means | {"other": 1 - total}
    return {name: share / max(total, 1.0) for name, share in means.items()}
