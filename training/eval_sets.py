# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The sets that a run evaluates on: one, or several that --eval_data_path names.

python -c "from training.eval_sets import EvalSet; print(EvalSet('sketch', 'sketch_', None))"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import datasets
from config.phases import eval_sets, split_best_metric
from data_loading.dataset import TransformedDataset
from data_loading.labels import Head
from data_loading.loader import DeviceLoader
from errors import UserError, plural
from parallel.process_group import get_logger
from training.evaluation import Metrics
from training.metrics import METRICS


@dataclass(frozen=True)
class EvalSet:
    """Images to evaluate on.

    name: '' for the only set. prefix: of its values in log.txt, between `test_` and the name of the
    metric: '' for the first set, `sketch_` for a later one.
    """

    name: str
    prefix: str
    loader: DeviceLoader

    def split(self, ending: str = "") -> str:
        """Return '' for the first set, or else its name; with `ema` for EMA weights."""
        return "_".join(filter(None, [self.prefix[:-1], ending]))

    def describe(self, images: int) -> str:
        """Return `355 images of sketch in 10 views` for as many images that were evaluated."""
        views = self.loader.views.count
        name, several = f" of {self.name}" * bool(self.name), f" in {views} views" * (views > 1)
        return plural(images, "image") + name + several

    def named(self, stats: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
        """Return the values of an evaluation by their names in log.txt."""
        return {f"test_{self.prefix}{name}{ending}": value for name, value in stats.items()}


def first_set(args: Any) -> Any:
    """Return `args` with the first evaluation set alone."""
    return args.replace(eval_data_path=next(iter(eval_sets(args.eval_data_path).values())) or None)


def datasets_by_name(sets: Sequence[EvalSet]) -> dict[str, TransformedDataset]:
    """Return the data sets as `val` and, of later sets, `val_NAME`."""
    return {f"val_{each.prefix}"[:-1]: each.loader.loader.dataset for each in sets}


def best_prefix(args: Any) -> str:
    """Return the prefix of the set whose metric chooses the best checkpoint."""
    name, _ = split_best_metric(vars(args))
    return f"{name}_" if name else ""


def check_name(name: str, metrics: Metrics) -> None:
    """Raise UserError if `test_NAME_...` could be a metric of another set in log.txt."""
    alike = [metric for metric in (*metrics.names, *METRICS) if metric.startswith(f"{name}_")]
    if name and alike:
        raise UserError(
            f"--eval_data_path: the set {name} would be mistaken for the metric {alike[0]}; "
            "rename the set"
        )


def build_eval_sets(
    args: Any,
    first: TransformedDataset | None,
    head: Head,
    device: torch.device,
    metrics: Metrics,
) -> list[EvalSet]:
    """Build all sets; labels of each are found by class name in `head`.

    first: the data set of the first one, None for no evaluation.
    """
    found: list[EvalSet] = []
    for name, path in eval_sets(args.eval_data_path).items() if first is not None else ():
        prefix, dataset = f"{name}_" * bool(found), first
        own = args.replace(eval_data_path=path or None)
        if found:
            get_logger().info("evaluation set %s: %s", name, path)
            dataset, _ = datasets.build_dataset(False, own, head)
        check_name(name, metrics)
        found.append(EvalSet(name, prefix, datasets.build_loader(dataset, False, own, device)))
    if found and found[0].loader.views.count > 1:
        get_logger().info("evaluation: %s", found[0].loader.views)
    return found
