# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Alarms of a pre-training run: divergence, collapse, stall, as functions of its history.

python -c "from insight.alarms import find_alarms; print(find_alarms([{'train_loss': None}]))"

A history is a list of the values of epochs, as in log.txt, the oldest first; a value may be absent.
An alarm begins with its kind and a colon. The thresholds are far from what healthy runs have
(docs/insight.md), since an alarm that is often wrong is not read.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

RISE = 1.2  # times the lowest loss, in two epochs in a row
SMALL = 0.1  # of the loss of the first epoch, below which a rise does not matter
HARDLY = 0.97  # of the loss of the first epoch
STALL_EPOCHS = 5  # after which the loss must have fallen below it
LOWEST_RANK = 2.0
RANK_FALL = 0.4  # of its highest
LOWEST_DISTANCE = 0.05  # of 0.5 for unrelated channels
MOST_IDLE = 50.0  # percent of channels that are dead or saturated
MOST_SKIPPED = 5.0  # percent
WORSE = 3.0  # points of nearest neighbors below the first probe, in three probes in a row


def find_alarms(history: Sequence[Record]) -> list[str]:
    """Return sentences about what has gone wrong by the last epoch of a history, [] for nothing."""
    return [f"{kind}: {text}" for kind, find in ALARMS for text in find(history)]


def kind_of(alarm: str) -> str:
    """Return the kind of an alarm, such as `collapse`."""
    return alarm.partition(":")[0]


def without_numbers(alarm: str) -> str:
    """Return an alarm without its numbers, which is equal for the same problem in two epochs."""
    return re.sub(r"[\d.,]+", "", alarm)


def _values(history: Sequence[Record], *names: str) -> list[float]:
    """Return the finite values of the first of the names that the history has."""
    for name in names:
        found = [record[name] for record in history if _is_number(record.get(name))]
        if found:
            return found
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def divergence(history: Sequence[Record]) -> Iterator[str]:
    """Yield alarms of a loss that is not finite, or has risen far above its lowest value."""
    last = history[-1] if history else {}
    broken = [
        name
        for name in ("train_loss", "holdout_loss", "fixed_train_loss")
        if name in last and not _is_number(last[name])
    ]
    if broken or last.get("features_finite") is False:
        what = f"{broken[0]} is not finite" if broken else "features hold NaN or Inf"
        yield (
            f"{what}, so the weights are damaged. Resume an earlier checkpoint with a lower --lr, "
            "--clip_grad 1 or --on_spike rollback, or in another precision (--amp bf16 or none)"
        )
        return
    losses = _values(history, "train_loss")
    lowest, recent = min(losses, default=0.0), min(losses[-2:], default=0.0)
    if len(losses) > 2 and recent > RISE * lowest and recent > SMALL * losses[0]:
        yield (
            f"train_loss {losses[-1]:.4g} is far above its lowest value, {lowest:.4g}. Resume an "
            "earlier checkpoint with a lower --lr (half of it), or --clip_grad 1; a longer "
            "--warmup_epochs helps if it happened early"
        )


def skipped(history: Sequence[Record]) -> Iterator[str]:
    """Yield an alarm if many optimizer steps are skipped."""
    if (values := _values(history, "skipped_steps")) and values[-1] > MOST_SKIPPED:
        yield (
            f"{values[-1]:.0f}% of the optimizer steps since the last probe were skipped, for NaN, "
            "Inf or loss spikes. Lower --lr, or use --amp bf16 in place of fp16"
        )


def collapse(history: Sequence[Record]) -> Iterator[str]:
    """Yield alarms of features that lose their variety."""
    remedy = (
        "Lower --lr, raise --mask_ratio or the batch size, and keep GRN (convnextv2, not convnext)"
    )
    ranks = _values(history, "rank_me")
    if ranks and ranks[-1] < LOWEST_RANK:
        yield (
            f"rank_me {ranks[-1]:.3g}: all images get nearly the same features, which use "
            f"{ranks[-1]:.3g} directions. {remedy}"
        )
    elif len(ranks) > 2 and ranks[-1] < RANK_FALL * max(ranks):
        yield f"rank_me {ranks[-1]:.1f} has fallen from {max(ranks):.1f}. {remedy}"
    distances = _values(history, "feature_distance")
    if distances and distances[-1] < LOWEST_DISTANCE:
        yield (
            f"feature_distance {distances[-1]:.3f}: channels show nearly the same map (unrelated "
            f"ones have 0.5). {remedy}"
        )
    idle = (_values(history, f"{kind}_channels") for kind in ("dead", "saturated"))
    dead, saturated = (values[-1:] for values in idle)
    if sum(dead + saturated) > MOST_IDLE:
        yield (
            f"{sum(dead):.0f}% of the channels are dead and {sum(saturated):.0f}% saturated: they "
            f"are the same for every image. {remedy}"
        )


def stall(history: Sequence[Record]) -> Iterator[str]:
    """Yield alarms of a run that learns nothing, or nothing for the labels."""
    losses = _values(history, "train_loss")
    if len(losses) > STALL_EPOCHS and losses[-1] > HARDLY * losses[0] and losses[-1] > 0:
        yield (
            f"train_loss {losses[-1]:.4g} after {len(losses)} epochs, and {losses[0]:.4g} in the "
            "first: the network has hardly learned. Check --mean, --std and the pictures of "
            "reconstructions, then the learning rate: a higher --blr if train_loss falls slowly, "
            "a lower one if it jumps"
        )
    scores = _values(history, "probe_knn", "probe_linear")
    if len(scores) > 3 and max(scores[-3:]) < scores[0] - WORSE:
        name = "probe_knn" if _values(history, "probe_knn") else "probe_linear"
        yield (
            f"{name} {scores[-1]:.1f}% is below its first value, {scores[0]:.1f}%, for three "
            "probes: the features get worse for the labels. If rank_me is low or probe_linear "
            "falls too, lower --lr; otherwise it may be harmless, or --mask_ratio or --patch_size "
            "is too small"
        )


Find = Callable[[Sequence[Record]], Iterator[str]]
ALARMS: tuple[tuple[str, Find], ...] = (
    ("divergence", divergence),
    ("skipped steps", skipped),
    ("collapse", collapse),
    ("stall", stall),
)
