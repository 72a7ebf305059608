# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Sentences on what went wrong in a run, and on what to try, from the files that it has written.

python visualize.py report runs/demo/pretrain
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from errors import first_few, plural
from insight.alarms import divergence, kind_of, without_numbers
from insight.report_data import describe_place
from insight.run_data import Row, RunData, number

LEVELS = ("error", "warning", "advice", "info")  # the most urgent first
MOST = 30  # notes of a run
RISE = 0.05  # of the test loss over its minimum that counts as overfitting
AGAIN = 3  # evaluations after the minimum, before this is said


class Note(NamedTuple):
    """A sentence and its level, one of LEVELS."""

    level: str
    text: str


def find_notes(run: RunData) -> list[Note]:
    """Return the notes on a run, the most urgent first."""
    notes = [
        *end_notes(run),
        *_alarms(run),
        *_skipped(run),
        *_not_finite(run),
        *_diverged(run),
        *_overfitting(run),
        *(Note("warning", _sentence(text)) for text in run.warnings),
        *_advice(run),
    ]
    notes += [Note("info", problem) for problem in run.problems]
    notes = sorted(dict.fromkeys(notes), key=lambda note: LEVELS.index(note.level))
    left = len(notes) - MOST
    return notes[:MOST] + [Note("info", f"{plural(left, 'more note')} left out.")] * (left > 0)


def end_notes(run: RunData) -> list[Note]:
    """Say how the run ended, unless it is complete; an error that says where says it alone."""
    status, error = run.status, _text(run.record.get("error"))
    place, planned = describe_place(run), number(run.flags.get("epochs"))
    if status == "failed":
        where = "" if re.search(r"\bepoch \d", error) else f" {place}"
        return [Note("error", f"The run failed{where}: {error or 'no reason was written'}")]
    if status == "stopped":
        if " " in error:  # a sentence, with place and remedy, and not the name of an exception
            return [Note("warning", error[0].upper() + error[1:])]
        why = f" ({error})" if error else ""
        return [Note("warning", f"The run was stopped {place}{why}. Rerun it to continue.")]
    if status == "running":
        return [Note("info", f"The run had not ended when this was written, {place}.")]
    if status == "killed":
        why = "no process holds its folder, and it could not note its end"
        return [Note("warning", f"The run was killed {place}: {why}. Rerun it to continue.")]
    if not status and planned and run.epochs_done < planned:
        of = f"{round(run.epochs_done, 3):g} of {planned:g} epochs are done"
        return [Note("info", f"{of}: the run is running, was stopped, or has failed.")]
    return []


def _text(value: Any) -> str:
    return " ".join(str(value).split()) if value is not None else ""


def sentences_of(value: Any) -> list[str]:
    """Return the sentences of a value of log.txt, a list if it is there and not damaged."""
    values = value if isinstance(value, list) else ()
    texts = [_text(each) for each in values if isinstance(each, str) and each.strip()]
    return [text[:1].upper() + text[1:] for text in texts]


def _sentence(text: str) -> str:
    """Return a log line that begins with a word, and not with a path or a flag, as a sentence."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text


def _alarms(run: RunData) -> list[Note]:
    """The alarms of log.txt, each once with its epochs; those that have ended are no warnings.

    Alarms that differ in numbers alone are one, which has the numbers of its last epoch.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for row in run.rows:
        for text in sentences_of(row.get("alarms")):
            found.setdefault(without_numbers(text), []).append((row["at"], text))
    notes = []
    for places in found.values():
        epochs, (last, text) = [at for at, _ in places], places[-1]
        lasts = last == run.rows[-1]["at"]
        when = describe_epochs(epochs) + ("" if lasts else ", not since")
        notes.append(Note("warning" if lasts else "info", f"{text} ({when})"))
    return notes


def _has_alarm(row: Row, kind: str) -> bool:
    return kind in [kind_of(text).lower() for text in sentences_of(row.get("alarms"))]


def _advice(run: RunData) -> list[Note]:
    """The advice of the last epoch that gave one."""
    return [Note("advice", text) for text in sentences_of(run.last("advice"))]


def _skipped(run: RunData) -> list[Note]:
    """Optimizer steps that were skipped, in percent; nothing where an alarm says it."""
    bad = [(at, value) for at, value in _series(run, "skipped_steps") if value]
    if not bad or any(_has_alarm(row, "skipped steps") for row in run.rows):
        return []
    most, when = max(value for _, value in bad), describe_epochs([at for at, _ in bad])
    return [
        Note(
            "warning",
            f"Up to {most:.2g}% of the optimizer steps were skipped for NaN, Inf or a loss spike "
            f"({when}). console.log names the images. Try a lower --lr, a longer --warmup_epochs "
            "or --clip_grad 1.",
        )
    ]


def _not_finite(run: RunData) -> list[Note]:
    """Losses that log.txt has as null, which stands for NaN and Inf, without an alarm."""
    rows = [row for row in run.rows if not _has_alarm(row, "divergence")]
    notes = []
    for key in ("train_loss", "test_loss", "test_loss_ema", "holdout_loss", "fixed_train_loss"):
        bad = [row["at"] for row in rows if key in row and number(row[key]) is None]
        if bad:
            text = f"{key} was NaN or infinite ({describe_epochs(bad)}). Try a lower --lr, "
            notes.append(Note("error", text + "--clip_grad 1 or --amp none."))
    return notes


def _series(run: RunData, key: str) -> list[tuple[float, float]]:
    """Return (epochs done, value) of the rows that have the key."""
    pairs = zip([row["at"] for row in run.rows], run.values(key), strict=True)
    return [(at, value) for at, value in pairs if value is not None]


def _diverged(run: RunData) -> list[Note]:
    """The alarm of divergence for the last epoch of a run without alarms, such as fine-tuning."""
    if any("alarms" in row for row in run.rows) or _not_finite(run):
        return []
    return [Note("warning", f"Divergence: {text}.") for text in divergence(run.rows)]


def _overfitting(run: RunData) -> list[Note]:
    """A test loss that rises while the training loss still falls."""
    points, train = _series(run, "test_loss"), dict(_series(run, "train_loss"))
    if len(points) <= AGAIN:
        return []
    at, low = min(points, key=lambda point: point[1])
    after = [value for epoch, value in points if epoch > at]
    last = points[-1][1]
    if len(after) < AGAIN or low <= 0 or last < (1 + RISE) * low:
        return []
    before, now = train.get(at), train.get(points[-1][0])
    if before is None or now is None or now >= before:
        return []
    return [
        Note(
            "warning",
            f"Overfitting: the test loss was lowest in epoch {at:g} ({low:.4g}) and has risen to "
            f"{last:.4g}, while the training loss fell from {before:.4g} to {now:.4g}. Try more "
            "augmentation (--aa, --mixup, --cutmix, --reprob), --drop_path, or fewer epochs.",
        )
    ]


def describe_epochs(epochs: Sequence[float]) -> str:
    """Return `epoch 3`, `epochs 3 to 7`, or `epochs 1, 4, 9 and 2 more`."""
    if len(epochs) == 1:
        return f"epoch {epochs[0]:g}"
    if all(after - before <= 1 for before, after in zip(epochs, epochs[1:], strict=False)):
        return f"epochs {epochs[0]:g} to {epochs[-1]:g}"
    return f"epochs {first_few([f'{epoch:g}' for epoch in epochs])}"


def describe_status(run: RunData) -> str:
    """Return the status of the run; where it is unknown `complete`, or `incomplete`."""
    if run.status:
        return _text(run.status)
    planned = number(run.flags.get("epochs"))
    return "complete" if planned and run.epochs_done >= planned else "incomplete"
