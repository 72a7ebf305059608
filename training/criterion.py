# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The loss that the flags describe: a weighted sum of losses, with smoothing and class weights.

python main_finetune.py --data_set DIGITS --loss "focal(gamma=2) + 0.1*ce" --class_weights inverse
"""

import copy
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.calls import Call, accepted, parse_call, parse_sum
from config.tasks import task_flags
from data_loading.targets import KINDS
from datasets import count_labels
from errors import UserError, describe_error, first_few, first_line, resolve_for
from parallel import sharding
from parallel.process_group import get_logger, get_world_size
from training.class_weights import create_class_weights, find_class_weights, refuse_class_weights
from training.head_losses import HeadLosses, losses_by_head
from training.losses import LOSSES, NOT_LOGITS, TINY, TORCH_LOSSES, TORCH_RANGES, Range, Row

ONLY_IN_TRAINING = ("label_smoothing", "weight", "pos_weight")  # so are these
REDUCTIONS = ("reduction", "reduce", "size_average")  # arguments of torch's losses


class Criterion(nn.Module):
    """Weighted sum of losses: (outputs, targets) -> its mean over the batch, a scalar.

    text: such as `0.5*focal(gamma=2) + ce`. kind: of the targets, one of KINDS. smoothing: of class
    labels, in training only. class_weights: (K,), in training only.
    `per_image(outputs, targets)` is the loss of evaluation, without smoothing and weights.
    Both compute in float32 or better. Parameters of losses are trained with those of the model.
    """

    def __init__(
        self,
        text: str = "ce",
        kind: str = "class",
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.smoothing = kind, smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.terms = nn.ModuleList(Term(call) for call in parse_sum(text, "--loss"))
        for term in self.terms:
            self._check(term)

    def _check(self, term: "Term") -> None:
        """Refuse a loss that cannot take the targets, their smoothing or class weights."""
        if term.takes and self.kind not in term.takes:
            fit = ", ".join(name for name, row in LOSSES.items() if self.kind in row.takes.split())
            taken = " or ".join(KINDS[kind] for kind in term.takes if kind != "soft")
            raise UserError(
                f"--loss {term.text} takes {taken}, and the labels are {KINDS[self.kind]}; use "
                f"one of {fit}" + ", or drop --mixup and --cutmix" * (self.kind == "soft")
            )
        if self.smoothing and term.takes and self.kind == "class" and "soft" not in term.takes:
            raise UserError(
                f"--smoothing {self.smoothing:g}: --loss {term.text} takes no smoothed labels; "
                "pass --smoothing 0"
            )
        if self.smoothing and self.kind == "number":
            raise UserError(f"--smoothing {self.smoothing:g} is for classes; pass --smoothing 0")
        if self.class_weights is not None and self.kind not in ("class", "soft"):
            fix = "; use --loss BCEWithLogitsLoss(pos_weight=[...])" * (self.kind == "multi")
            raise UserError(f"--class_weights: the labels are {KINDS[self.kind]}; drop it{fix}")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            means = [term.times_factor(self.mean(term, outputs, targets)) for term in self.terms]
            return functools.reduce(operator.add, means)

    def mean(self, term: "Term", outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch of one loss, weighted by the classes of the images.

        The sum of weighted values is divided by the sum of the weights. `ce` is torch's own loss:
        it divides by the number of images if targets are mixed, and weighs smoothed labels too.
        """
        weights = self.class_weights
        weights = None if weights is None else weights.to(outputs.dtype)
        if term.name == "ce":
            return F.cross_entropy(outputs, targets, weights, label_smoothing=self.smoothing)
        if weights is not None:
            weights = weights[targets] if targets.ndim == 1 else targets.to(weights) @ weights
        if self.smoothing:
            targets = self._smooth(targets, outputs)
        if weights is None and isinstance(term.loss, TorchLoss):
            return term.loss.mean(outputs, targets)
        values, counts = _values(term.loss, outputs, targets)
        if counts is not None:
            weights = counts if weights is None else weights * counts
        if weights is None:
            return values.mean()
        if values.ndim == 0:
            raise UserError(
                "it returns the mean over the batch, and --class_weights needs a value for each "
                "image, (N,); return these, or drop --class_weights"
            )
        return (values * weights).sum() / weights.sum().clamp(min=TINY)

    def _smooth(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Labels (N,) -> (N, K) moved to 1/K; several classes per image -> moved to 1/2."""
        classes = outputs.shape[1]
        if self.kind == "class":
            targets = F.one_hot(targets, classes)
        middle = 0.5 if self.kind == "multi" else 1 / classes
        return targets.to(outputs.dtype) * (1 - self.smoothing) + self.smoothing * middle

    def per_image(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T) losses of each image and term, without smoothing and class weights; (N, T) counts.

        A count is 0, as is the loss, for an image whose targets are all ignored, otherwise 1.
        A loss that gives only the mean over a batch counts as if each image had that value.
        """
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            losses, counts = [], []
            for term in self.terms:
                values, counted = _values(term.evaluated or term.loss, outputs, targets)
                counted = outputs.new_ones(len(outputs)) if counted is None else counted
                values = torch.where(counted > 0, values, 0.0).expand(len(outputs))
                losses.append(term.times_factor(values))
                counts.append(counted)
            return torch.stack(losses, 1), torch.stack(counts, 1)


def _values(loss: Callable, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the losses of the images (N,), or their mean; and (N,) 1 for those that count."""
    found = loss(outputs, targets)
    values, counts = found if isinstance(found, tuple) else (found, None)
    if values.shape not in ((), (len(outputs),)):
        raise UserError(
            f"it gives a tensor of shape {tuple(values.shape)} for {len(outputs)} images; "
            f"expected ({len(outputs)},), or the mean as a scalar"
        )
    return values, counts


class Term(nn.Module):
    """One loss of a sum.

    takes: kinds of targets; () if unknown, as of a user's loss without an attribute `takes`.
    loss: the function or module. evaluated: another one for evaluation, or None.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.name, self.text, self.factor = call.name, str(call), call.factor
        if call.options:
            raise UserError(f"--loss {call}: got values in [ ], which no loss takes; drop them")
        if not 0 < call.factor < math.inf:
            raise UserError(f"--loss: the factor of {call} is {call.factor:g}, expected above 0")
        found, self.evaluated = _find(call.name), None
        if isinstance(found, Row):
            self.takes = tuple(found.takes.split())
            values = _bind(found.function, call, inputs=2)
            _check_ranges(call, values, found.ranges)
            self.loss = functools.partial(found.function, **values)
            if found.evaluation:
                values |= found.evaluation
                self.evaluated = functools.partial(found.function, **values)
        elif call.name in TORCH_LOSSES:
            self.takes, self.loss = tuple(TORCH_LOSSES[call.name][0].split()), TorchLoss(call)
            given = _bind(getattr(nn, call.name), call)
            _check_ranges(call, given, TORCH_RANGES)
            if given.keys() & set(ONLY_IN_TRAINING):
                plain = {k: v for k, v in given.items() if k not in ONLY_IN_TRAINING + REDUCTIONS}
                self.evaluated = TorchLoss(Call(call.name, kwargs=plain))
        else:
            self.takes = tuple(getattr(found, "takes", ()))
            self.loss = _users_loss(found, call)

    def times_factor(self, value: Tensor) -> Tensor:
        return value if self.factor == 1 else self.factor * value


class TorchLoss(nn.Module):
    """A loss of torch.nn: `forward` gives a value for each image, `mean` is torch's own mean.

    With `ignore_index`, `forward` also returns (N,) 1 for images that count, or 0.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        make, self.prepare = getattr(nn, call.name), TORCH_LOSSES[call.name][1]
        if call.kwargs.keys() & set(REDUCTIONS):
            raise UserError(f"--loss {call}: the mean over the batch is taken anyway; drop that")
        _bind(make, call)
        self.average, self.each = _create(make, call), _create(make, call, reduction="none")
        for part in (self.each, self.average):
            for name, value in list(part.named_buffers()):  # weights, which the flag gives again
                part.register_buffer(name, value, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Any:
        values = self.each(outputs, self._prepared(targets, outputs))
        values = values.reshape(len(outputs), -1).mean(1)
        if targets.ndim == 1 and hasattr(self.each, "ignore_index"):
            return values, (targets != self.each.ignore_index).to(values.dtype)
        return values

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; CrossEntropyLoss with weights divides by the sum of the weights."""
        return self.average(outputs, self._prepared(targets, outputs))

    def _prepared(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return self.prepare(targets, outputs) if self.prepare else targets


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, list | tuple) else value


def _find(name: str) -> Any:
    """Return the row of a loss, a class of torch.nn, or what `package.module:name` names."""
    if name in NOT_LOGITS:
        fix = f"takes probabilities, and networks give logits; use {NOT_LOGITS[name]}"
        raise UserError(f"--loss {name} {fix}")
    if name.endswith("Loss") and hasattr(nn, name) and name not in TORCH_LOSSES:
        fix = f"use one of {', '.join(TORCH_LOSSES)}"
        raise UserError(
            f"--loss {name} is not supported here, since it needs other inputs or targets; {fix}"
        )
    return resolve_for(
        "--loss", name, LOSSES | dict.fromkeys(TORCH_LOSSES), "loss", importable=True
    )


def _users_loss(found: Any, call: Call) -> Callable[..., Tensor]:
    """Create a user's class with the arguments, or pass them to a function at each call."""
    if isinstance(found, type):
        _bind(found, call)
        return _create(found, call)
    _bind(found, call, inputs=2)
    return lambda outputs, targets: found(outputs, targets, *call.args, **call.kwargs)


def _create(make: Callable, call: Call, **more: Any) -> Any:
    values = {name: _as_tensor(value) for name, value in call.kwargs.items()}
    try:
        return make(*map(_as_tensor, call.args), **values, **more)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--loss {call}: {first_line(error)}{_accepted(make)}") from error


def _bind(function: Callable, call: Call, inputs: int = 0) -> dict[str, Any]:
    """Return the arguments of a call by name; UserError if the function does not take them.

    inputs: number of arguments before them, such as outputs and targets.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)[:inputs]
    try:
        bound = signature.bind(*names, *call.args, **call.kwargs).arguments
    except TypeError as error:
        raise UserError(f"--loss {call}: {error}{_accepted(function, inputs)}") from error
    return {name: value for name, value in bound.items() if name not in names}


def _check_ranges(call: Call, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    for name in values.keys() & ranges.keys():
        value, (expected, holds) = values[name], ranges[name]
        numbers = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(type(x) in (int, float) and holds(x) for x in numbers):
            raise UserError(f"--loss {call}: {name} is {value!r}, expected {expected}")


def _accepted(function: Callable, inputs: int = 0) -> str:
    """Return the end of a message: the arguments that a loss takes."""
    return f"; it takes {accepted(function, inputs, REDUCTIONS)}"


def try_out(criterion: Criterion | HeadLosses, num_classes: int, evaluates: bool = False) -> None:
    """Compute loss and gradients of two rows on a copy; UserError if that fails or is not finite.

    Wrong types of arguments, wrong shapes and errors in a user's loss show here, before training.
    evaluates: try the loss of evaluation alone, which may be for fewer classes than the training.
    """
    if isinstance(criterion, HeadLosses):
        for loss in [*criterion.losses.values()][: 1 if evaluates else None]:  # the main one
            try_out(loss, num_classes, evaluates)
        return
    trial = copy.deepcopy(criterion).cpu().train(not evaluates)
    targets = {
        "class": torch.tensor([0, num_classes - 1]),
        "soft": torch.full((2, num_classes), 1 / num_classes),
        "multi": torch.ones(2, num_classes).triu(),
        "number": torch.zeros(2, num_classes),
    }[trial.kind]
    for term in trial.terms:
        outputs, problem = torch.linspace(-1, 1, 2 * num_classes).reshape(2, -1), ""
        try:
            if evaluates:
                loss, _ = _values(term.evaluated or term.loss, outputs, targets)
            else:
                loss = trial.mean(term, outputs.requires_grad_(), targets)
                loss.backward()
        except Exception as error:
            raise UserError(f"--loss {term.text}: {describe_error(error)}{_taken(term)}") from error
        unused = [name for name, p in term.named_parameters() if p.requires_grad and p.grad is None]
        if outputs.grad is None and not evaluates:
            problem = "it does not depend on the outputs of the network"
        elif not all(x.isfinite().all() for x in (loss, outputs.grad) if x is not None):
            problem = "it or its gradient is not finite for logits between -1 and 1"
        elif unused and not evaluates:
            problem = f"its parameters {first_few(unused)} have no effect"
        if problem:
            raise UserError(f"--loss {term.text}: {problem}{_taken(term)}")


def _taken(term: Term) -> str:
    row = LOSSES.get(term.name)
    return _accepted(row.function, 2) if row else ""


# --- from the flags -------------------------------------------------------------------------


def _create_criterion(
    args: Any, weights: Tensor | None = None, kind: str = "class", early: bool = False
) -> Criterion | HeadLosses:
    mixed = bool(args.mixup or args.cutmix or args.cutmix_minmax) and not args.eval
    mixed_classes = mixed and kind == "class"
    smoothing = 0.0 if mixed_classes or args.eval else args.smoothing  # mixup smooths these itself
    text = task_flags(vars(args), vars(args), kind)["loss"]
    settings = "soft" if mixed_classes else kind, smoothing, weights
    if losses := losses_by_head(args, text, early):
        parts = {name: Criterion(loss, *settings) for name, loss in losses.items()}
        criterion = HeadLosses(parts)
    else:
        criterion = Criterion(text, *settings)
    for term in criterion.modules() if mixed else ():
        if isinstance(term, Term) and term.takes and "soft" not in term.takes:
            raise UserError(
                f"--loss {term.text} takes no {KINDS['soft']}; drop --mixup and --cutmix"
            )
    return criterion


def check_loss(args: Any, kind: str = "class") -> None:
    """Raise UserError for a loss or class weights that cannot work, before the data is listed."""
    criterion = _create_criterion(args, None, kind, early=True)
    if args.nb_classes:  # else build_criterion tries it, with the classes of the data
        try_out(criterion, args.nb_classes, args.eval)
    if args.eval:
        return
    if args.shard != "ddp" and get_world_size() > 1 and any(True for _ in criterion.parameters()):
        raise UserError(
            f"--loss {args.loss} has parameters of its own, which --shard {args.shard} does not "
            "average over processes; use --shard ddp"
        )
    if args.class_weights != "none":
        given, users = args.class_weights.startswith("["), ":" in args.class_weights
        if users and not args.nb_classes:  # it may know the number of classes
            find_class_weights(parse_call(args.class_weights, "--class_weights"))
            return
        expected = args.nb_classes or (args.class_weights.count(",") + 1 if given else 3)
        equal = torch.full((expected,), 2.0, dtype=torch.float64)
        weights = create_class_weights(args.class_weights, lambda: equal, expected)
        criterion = _create_criterion(args, weights, kind, early=True)
        if args.nb_classes:
            try_out(criterion, args.nb_classes)


def build_criterion(
    args: Any,
    num_classes: int,
    device: torch.device,
    dataset_train: Any = None,
    kind: str = "class",
) -> Criterion | HeadLosses:
    """Build the loss of the flags; class weights, for training, are those of `dataset_train`."""
    weights = None
    if dataset_train is not None and args.class_weights != "none":
        if kind == "multi":
            refuse_class_weights(args, dataset_train)
        counts = functools.partial(count_labels, dataset_train, num_classes)
        weights = create_class_weights(args.class_weights, counts, num_classes)
        names = dataset_train.classes or range(num_classes)
        pairs = zip(names, weights.tolist(), strict=True)
        texts = [f"{name} = {weight:.3g}" for name, weight in pairs]
        get_logger().info("class weights %s: %s", args.class_weights, first_few(texts, 10))
    criterion = _create_criterion(args, weights, kind)
    try_out(criterion, num_classes, args.eval)
    sharding.broadcast_tensors([*criterion.to(device).parameters(), *criterion.buffers()])
    return criterion
