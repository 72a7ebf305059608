# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The metrics that --metrics names: summed on the device, and reduced once over all ranks.

python -c "from training.evaluation import Metrics; print(Metrics(['f1', 'ece(bins=10)']).names)"
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config.calls import Call, accepted, parse_call
from config.phases import split_best_metric
from data_loading.targets import KINDS, Scale
from errors import UserError, a_type, describe_error, first_few, plural, resolve
from models.heads import implied_activation
from parallel.process_group import (
    all_reduce_sum,
    from_main_process,
    gather_rows,
    get_logger,
    join_rows,
    pack_rows,
)
from training.metrics import METRICS, Batch, Metric, default_metrics
from training.report import plain

SPACES = re.compile(r"\s+(?![^(]*\))")  # that are not in brackets
SHARED = 2  # sums besides those of losses and metrics: images, images without usable outputs


class Metrics:
    """Metrics of an evaluation: exact for any split of its images into batches and ranks.

    words: as for --metrics, such as `f1` or `precision(k=5)`. best: the metric that chooses the
    best checkpoint, computed too. Without them: `default_metrics(kind)`. outputs: of the model, if
    known. kind: of the targets, of KINDS. scale: of numbers, which `in_units` undoes. All sums are
    one tensor, in float64 where the device has it. Metrics of the order of scores, and functions of
    the user's, need all outputs: rank 0 then gathers (images, outputs + targets) in float32.
    """

    def __init__(
        self,
        words: Sequence[str] | None = None,
        best: str | None = None,
        outputs: int = 0,
        kind: str = "class",
        scale: Scale | None = None,
    ) -> None:
        self.kind, self.outputs, self.scale = kind, outputs, scale
        self.activation = "softmax"  # of the outputs of one class per image
        self.metrics: dict[str, Metric] = {}
        self.texts: dict[str, str] = {}  # name in log.txt -> as typed
        for text in words or default_metrics(kind):
            for word in SPACES.split(text.strip()):
                self._add(word, "--metrics")
        self.best = self._choose_best(best or default_metrics(kind)[0])
        self.lower_is_better = self.best == "loss" or any(
            metric.best == "lowest"
            for name, metric in self.metrics.items()
            if self.best == name or (":" in self.texts[name] and self.best.startswith(f"{name}_"))
        )
        self.rows_needed = any(metric.whole for metric in self.metrics.values())
        self.ranks = max([5, *(metric.ranks for metric in self.metrics.values())])

    @property
    def names(self) -> list[str]:
        """Names in log.txt, without `test_`."""
        return ["loss", *self.metrics]

    def _add(self, text: str, flag: str) -> str:
        """Add a metric, unless it is there; returns its name in log.txt."""
        call = parse_call(text, flag)
        name = log_name(call)
        if text == "loss" or self.texts.get(name) == str(call):
            return name
        if name in self.names:
            other = self.texts.get(name, name)
            raise UserError(f"{flag}: {text} and {other} are both logged as {name}; rename one")
        metric = create_metric(call, flag)
        if self.kind not in metric.kinds:
            takes = " or ".join(KINDS[kind] for kind in metric.kinds)
            fits = [key for key, make in METRICS.items() if self.kind in make_kinds(make)]
            raise UserError(
                f"{flag}: {text} is for {takes}, and this run's targets are {KINDS[self.kind]}; "
                f"use one of {', '.join(fits)}"
            )
        if 0 < self.outputs < metric.fewest:
            got = f"the model has {plural(self.outputs, 'output')}"
            raise UserError(f"{flag}: {text} needs at least {metric.fewest}, and {got}; lower k")
        try:
            metric.size(self.outputs)
        except ValueError as error:
            raise UserError(f"{flag}: {text}: {error}") from error
        self.metrics[name], self.texts[name] = metric, str(call)
        return name

    def _choose_best(self, text: str) -> str:
        """Return the name of the metric that --best_metric names, and add it if it is absent."""
        flag = "--best_metric"
        own = [log_name(parse_call(word, flag)) for word in self.texts.values() if ":" in word]
        if text in self.names or any(text.startswith(f"{name}_") for name in own):
            return text  # perhaps one of several values of a user's function
        call = parse_call(text, flag)
        if ":" not in call.name:
            known = dict.fromkeys([*self.names, *METRICS])
            _resolve(call.name, known, flag)
        name = self._add(text, flag)
        if not self.metrics[name].best:
            raise UserError(
                f"{flag}: {text} has several values, expected one; use one of "
                f"{', '.join(['loss', *(n for n, m in self.metrics.items() if m.best)])}"
            )
        return name

    def reset(self, device: torch.device | str, terms: int = 1) -> None:
        """Forget all images; terms: number of losses that the loss is the sum of."""
        no_float64 = torch.device(device).type == "mps"
        self.dtype = torch.float32 if no_float64 else torch.float64
        self.mean_std = self.scale and self.scale.tensors(self.dtype, device)  # once: it is a copy
        sizes = [metric.size(self.outputs) if metric.add else 0 for metric in self.metrics.values()]
        self.sizes = [SHARED, terms, terms, *sizes]
        self.sums = torch.zeros(sum(self.sizes), dtype=self.dtype, device=device)
        self.rows: list[Tensor] = []

    def in_units(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets in the units of the data, which `update` and hooks take."""
        if self.mean_std is None:
            return logits, targets
        mean, std = self.mean_std
        targets = self._checked(logits, targets)
        return tuple(x.to(self.dtype) * std + mean for x in (logits, targets))

    @torch.no_grad()
    def update(
        self, logits: Tensor, targets: Tensor, losses: Tensor, counts: Tensor | None = None
    ) -> None:
        """Add a batch without a host sync: (N, K) float outputs, targets, losses (N, T) or (N,).

        counts: as losses, 0 for an image that does not count in the mean of a loss, otherwise 1.
        """
        targets = self._checked(logits, targets)
        about = self.kind, self.ranks, self.dtype, self.activation
        batch = Batch(logits, targets, *about)
        images = torch.full((), len(logits), dtype=self.dtype, device=self.sums.device)
        broken = batch.broken.sum(dtype=self.dtype)
        counts = torch.ones_like(losses) if counts is None else counts
        parts = [torch.stack([images, broken])]
        parts += [x.to(self.dtype).view(len(logits), -1).sum(0) for x in (losses, counts)]
        parts += [metric.add(batch) for metric in self.metrics.values() if metric.add]
        self.sums += torch.cat(parts)
        if self.rows_needed:
            self.rows.append(pack_rows([logits, targets], self._row_dtype()))

    def _row_dtype(self) -> torch.dtype:
        return self.dtype if self.kind == "number" else torch.float32  # exact for class labels

    def _checked(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return targets of the right shape; UserError if outputs or targets have another."""
        if self.outputs and logits.shape[1] != self.outputs:
            got = plural(logits.shape[1], "output")
            raise UserError(f"the model has {got}, expected {self.outputs}; correct its head")
        if self.kind == "number" and targets.ndim == 1 and logits.shape[1] == 1:
            targets = targets[:, None]
        expected = logits.shape[:1] if self.kind == "class" else logits.shape
        if targets.shape != expected or (self.kind == "class" and targets.is_floating_point()):
            got = f"{targets.dtype} of shape {tuple(targets.shape)}".removeprefix("torch.")
            wanted = "integers of shape" if self.kind == "class" else "shape"
            raise UserError(
                f"metrics of {KINDS[self.kind]}: got targets {got}, expected {wanted} "
                f"{tuple(expected)}, for outputs of shape {tuple(logits.shape)}; correct the data"
            )
        return targets

    def reduce(self) -> tuple[int, int]:
        """Sum over all ranks; every rank must call it.

        Returns the number of images, and of those without usable outputs.
        """
        self.total = all_reduce_sum(self.sums.clone()).cpu().double()
        self.images = int(self.total[0])
        return self.images, int(self.total[1])

    def values(self) -> dict[str, Any]:
        """Return loss and metrics after `reduce`; every rank must call it.

        Numbers, or lists of metrics with several values.
        """
        _, losses, counts, *sums = self.total.split(self.sizes)
        found = {"loss": (losses / counts).sum().item()}
        whole: dict[str, dict[str, Any]] = {}
        if self.rows_needed:
            rows = self._gather()
            whole = from_main_process(lambda: self._whole_values(rows))
        for (name, metric), own in zip(self.metrics.items(), sums, strict=True):
            found |= {name: metric.value(own, self.images)} if metric.add else whole[name]
        best = found.setdefault(self.best, math.nan)  # a user's function may have left it out
        if not math.isfinite(best):
            text = "%s is %s, so this cannot become the best checkpoint"
            get_logger().warning(text, self.best, best)
        return found

    def _gather(self) -> Tensor | None:
        """Return the rows of all ranks on rank 0, on the device if it has float64."""
        width = self.outputs + (1 if self.kind == "class" else self.outputs)
        rows = gather_rows(join_rows(self.rows, self.sums.device, width, self._row_dtype()))
        self.rows = []
        return rows.cpu() if rows is not None and rows.device.type == "mps" else rows

    def _whole_values(self, rows: Tensor) -> dict[str, dict[str, Any]]:
        """Return the values of each metric that needs all outputs, by name."""
        outputs, targets = rows[:, : self.outputs], rows[:, self.outputs :]
        if self.kind == "class":
            targets = targets[:, 0].long()
        found = {}
        for name, metric in self.metrics.items():
            if metric.whole:
                found[name] = self._whole_value(name, metric, outputs, targets)
        return found

    def _whole_value(
        self, name: str, metric: Metric, outputs: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        """Return the values of a metric; NaN, with a warning, if a user's function fails."""
        try:
            value = metric.whole(outputs, targets, self.kind)
        except Exception as error:
            if ":" not in self.texts[name]:
                raise
            text = "%s failed, so it is NaN: %s"
            get_logger().warning(text, self.texts[name], describe_error(error))
            value = math.nan
        several = value if isinstance(value, Mapping) else {}
        return {f"{name}_{key}": x for key, x in several.items()} or {name: value}

    def try_out(self) -> None:
        """Call the functions of the user's on random outputs; UserError if one fails.

        Errors, results that are no numbers and a wrong --best_metric show here, before training.
        """
        images = max(2, min(2 * self.outputs, 4_000_000 // self.outputs))  # each class twice
        outputs = torch.randn(images, self.outputs, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(images) % self.outputs
        if self.kind != "class":
            targets = F.one_hot(targets, self.outputs).to(outputs.dtype)
        for name, metric in self.metrics.items():
            if ":" not in self.texts[name]:
                continue
            try:
                with torch.inference_mode():  # as in evaluation
                    value = metric.whole(outputs, targets, self.kind)
            except Exception as error:
                raise UserError(f"--metrics {self.texts[name]}: {describe_error(error)}") from error
            several = value if isinstance(value, Mapping) else {}
            names = [f"{name}_{key}" for key in several] or [name]
            others = set(self.names) - {name}
            own = self.best == name or self.best.startswith(f"{name}_")
            if own and self.best not in {*names, *others}:
                raise UserError(f"--best_metric {self.best}: expected one of {first_few(names)}")


def build_metrics(
    args: Any, outputs: int = 0, kind: str = "class", scale: Scale | None = None
) -> Metrics:
    """Build the metrics that the flags name; outputs: of the model, 0 if not known yet."""
    problem, typed = None, "best_metric" in getattr(args, "typed", ())
    for best in _names_of_best(vars(args), typed):
        try:
            metrics = Metrics(args.metrics, best, outputs, kind, scale)
            break
        except UserError as error:
            problem = problem or error
    else:
        raise problem
    metrics.activation = implied_activation(vars(args).get("loss") or "ce")
    if outputs:
        metrics.try_out()
    return metrics


def _names_of_best(flags: Mapping[str, Any], typed: bool) -> list[str | None]:
    """Return the name of the best metric; of a run with --eval also without the name of a set.

    The run may have chosen by `sketch_acc1`, and other sets are evaluated now. typed: it is of the
    command line, and not of a run.
    """
    _, text = split_best_metric(flags)
    if not (text and flags.get("eval")) or typed:
        return [text]
    if ":" in text:  # code, of which another part may be a name too
        return [text, None]
    parts = text.split("_")
    return [text, *("_".join(parts[start:]) for start in range(1, len(parts)))]


def log_name(call: Call) -> str:
    """Return the name in log.txt: `f1_micro` of `f1(average=micro)`, `auc` of `my.module:auc`."""
    parts = [call.name.rpartition(":")[2], *call.args, *call.kwargs.values()]
    return re.sub(r"[^\w.-]+", "_", "_".join(map(str, parts)))


def make_kinds(make: Callable[..., Metric]) -> Sequence[str]:
    """Return the kinds of targets of a row of METRICS."""
    return make().kinds


def create_metric(call: Call, flag: str) -> Metric:
    """Create a metric from a row of METRICS or from `package.module:function`."""
    make = _resolve(call.name, METRICS, flag)
    own = call.name.rpartition(":")[2]
    if call.name not in METRICS and own in METRICS:
        raise UserError(f"{flag}: {call.name} has the name of the metric {own}; rename it")
    if call.name not in METRICS:
        return user_metric(make, call, flag)
    try:
        inspect.signature(make).bind(*call.args, **call.kwargs)
        return make(*call.args, **call.kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag}: {call}: {error}; it takes {accepted(make)}") from error


def _resolve(name: str, table: Mapping[str, Any], flag: str) -> Any:
    try:
        return resolve(name, table, "metric")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def user_metric(function: Any, call: Call, flag: str) -> Metric:
    """Return the metric of a function (scores (N, K), targets, ...) -> number, or dict of numbers.

    It gets the outputs and targets of all images on the CPU, on rank 0. Its attribute
    `lower_is_better`, if true, makes the lowest value the best.
    """
    if not callable(function):
        got = a_type(function)
        raise UserError(f"{flag}: {call.name} is {got}, expected a function (scores, targets)")
    try:
        inspect.signature(function).bind(None, None, *call.args, **call.kwargs)
    except TypeError as error:
        expected = f"{call.name}(scores, targets, ...){' with these arguments' * bool(call.kwargs)}"
        raise UserError(f"{flag}: {call}: {error}; expected a function {expected}") from error
    except ValueError:  # written in C, without a signature
        pass

    def whole(outputs: Tensor, targets: Tensor, kind: str) -> Any:
        result = function(outputs.cpu(), targets.cpu(), *call.args, **call.kwargs)
        found = plain({"value": result})["value"]
        values = found.values() if isinstance(found, dict) else [found]
        if not all(isinstance(value, int | float) for value in values):
            got = f"{type(result).__name__} {str(result)[:60]}"
            raise UserError(f"{flag}: {call.name} returned {got}, expected a number, or a dict")
        return found

    lowest = bool(getattr(function, "lower_is_better", False))
    return Metric(tuple(KINDS), whole=whole, best="lowest" if lowest else "highest")
