# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Weights of classes, by their numbers of images, for --class_weights.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --class_weights inverse
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config.calls import Call, accepted, parse_call
from data_loading.split import list_values
from data_loading.targets import KINDS
from errors import UserError, describe_error, first_few, first_line, resolve_for


def inverse(counts: Tensor) -> Tensor:
    """1 / images of the class."""
    return _weights_of_timm(counts, "inv_freq")


def effective(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^images), the inverse effective number (arXiv 1901.05555)."""
    if not (isinstance(beta, float | int) and 0 < beta < 1):
        raise ValueError(f"beta is {beta!r}, expected above 0 and below 1")
    return _weights_of_timm(counts, "effective_num", beta=beta)


def _weights_of_timm(counts: Tensor, method: str, **options: float) -> Tensor:
    from timm.loss import compute_class_weights

    return compute_class_weights(counts, int(counts.sum()), method, **options)[1]


CLASS_WEIGHTS = {"inverse": inverse, "effective": effective}  # counts (K,) -> weights (K,)


def create_class_weights(text: str, counts: Callable[[], Tensor], num_classes: int) -> Tensor:
    """(K,) weights with mean 1, by a name or from a list such as `[1, 2.5, 1]`.

    counts: returns the number of training images of each class. A class without any does not count
    in the mean, and has weight 0 unless a user's function gives another.
    """
    flag = "--class_weights"
    if text.startswith("["):
        return _given_weights(text, num_classes)
    call = parse_call(text, flag)
    function = find_class_weights(call)
    numbers = counts()
    if call.name not in CLASS_WEIGHTS:
        weights = _users_weights(function, call, numbers)
    else:
        try:
            inspect.signature(function).bind(numbers, *call.args, **call.kwargs)
            found = function(numbers[numbers > 0], *call.args, **call.kwargs)
        except (TypeError, ValueError) as error:
            fix = f"; it takes {accepted(function, 1)}"
            raise UserError(f"{flag} {text}: {first_line(error)}{fix}") from error
        weights = torch.zeros(len(numbers), dtype=torch.float64)
        weights[numbers > 0] = torch.as_tensor(found, dtype=torch.float64)
    return (weights / weights[numbers > 0].mean()).float()


def find_class_weights(call: Call) -> Callable[..., Any]:
    flag = "--class_weights"
    known = dict.fromkeys(("none", *CLASS_WEIGHTS)) | CLASS_WEIGHTS
    function = resolve_for(flag, call.name, known, "class weights", importable=True)
    if function is None:
        raise UserError(f"{flag} {call}: none takes no arguments; pass {flag} none")
    return function


def _users_weights(function: Callable[..., Any], call: Call, counts: Tensor) -> Tensor:
    """(K,) counts -> (K,) float64 weights of a user's function; UserError if they cannot work."""
    try:
        found = function(counts.clone(), *call.args, **call.kwargs)
        weights = torch.as_tensor(found, dtype=torch.float64)
    except Exception as error:
        raise UserError(f"--class_weights {call}: {describe_error(error)}") from error
    problem = ""
    if weights.shape != counts.shape:
        problem = f"it gives shape {tuple(weights.shape)}, expected {tuple(counts.shape)}"
    elif not weights.isfinite().all() or (weights < 0).any():
        problem = f"it gives {first_few(weights.tolist(), 5)}, expected numbers of at least 0"
    elif not weights[counts > 0].any():
        problem = "the weights of all classes with images are 0"
    if problem:
        raise UserError(f"--class_weights {call}: {problem}; correct the function")
    return weights


def _given_weights(text: str, num_classes: int) -> Tensor:
    try:
        values = torch.tensor(ast.literal_eval(text), dtype=torch.float64)
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(f"--class_weights {text}: expected numbers, as in [1, 2.5, 1]") from error
    if values.shape != (num_classes,) or not (values > 0).all() or not values.isfinite().all():
        expected = f"expected {num_classes} numbers above 0, one for each class"
        raise UserError(f"--class_weights {text}: {expected} in the order of their names")
    return (values / values.mean()).float()


def refuse_class_weights(args: Any, dataset: Any) -> None:
    """Raise UserError with the weights of positive labels that stand for those of classes."""
    rows, weights = list_values(dataset.dataset, "targets"), "[...]"
    if rows is not None:
        positive = np.zeros(dataset.nb_classes)
        places = dataset.positions if dataset.positions is not None else range(len(positive))
        positive[list(places)] = rows.sum(0)
        ratios = (len(rows) - positive) / np.maximum(positive, 1)
        weights = f"[{','.join(f'{ratio:.3g}' for ratio in ratios)}]"
    raise UserError(
        f"--class_weights {args.class_weights}: the labels are {KINDS['multi']}; drop it, and use "
        f"--loss BCEWithLogitsLoss(pos_weight={weights}) (negative / positive images of each class)"
    )
