# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Tables of a report: results by class, where the time went, flags, machine.

python visualize.py report runs/demo/finetune
"""

import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errors import first_few, format_bytes, plural
from insight.report_curves import SHARES, mean_shares
from insight.report_data import NONE, Confusion, WrongPredictions
from insight.report_html import (
    Html,
    duration,
    figure_of,
    join,
    short,
    shorten_middle,
    table,
    tag,
)
from insight.run_data import RunData, number, part

CELLS = 6000  # of all confusion matrices of a page, which limits their classes
MOST_CLASSES, FEWEST_CLASSES = 30, 8
NUMBERED = 16  # classes up to which cells show their number
MOST_ROWS = 100  # of a table of classes
CELL = 29  # units of the drawing
LETTER, TURN = 6.8, 50  # mean width of a letter there; degrees by which names of columns are turned
NAME, LONG_NAME = 16, 40  # letters of the name of a class in a matrix and in a table
SHARE_NAMES = (*SHARES.values(), "other")
TIMES = ("started", "ended", "duration")  # of each run its own
PACKAGES = ("torch", "torchvision", "numpy", "timm", "triton")  # shown first


# --- classes --------------------------------------------------------------------------------


def class_rows(confusion: Confusion) -> list[tuple[str, float | None, float | None, int, str]]:
    """Return name, recall and precision in percent, images, and the most frequent wrong prediction.

    The class with the lowest recall comes first; those without images come last.
    """
    predicted = [sum(column) for column in zip(*confusion.matrix, strict=True)]
    rows = []
    for index, counts in enumerate(confusion.matrix):
        right, total = counts[index], sum(counts)
        wrong = [(count, place) for place, count in enumerate(counts) if place != index and count]
        count, place = max(wrong, key=lambda pair: (pair[0], -pair[1]), default=(0, 0))
        mistaken = f"{confusion.columns[place]} ({count})" if count else ""
        recall = 100 * right / total if total else None
        precision = 100 * right / predicted[index] if predicted[index] else None
        rows.append((confusion.classes[index], recall, precision, total, mistaken))
    return sorted(rows, key=lambda row: (row[1] is None, row[1] or 0))


def class_table(confusion: Confusion, most: int) -> Html:
    """Return the table of the classes with the lowest recall, at most `most`."""
    rows = class_rows(confusion)
    most = max(min(most, MOST_ROWS), FEWEST_CLASSES)
    cells = [
        [_name(name), *map(figure_of, (recall, precision, images)), _mistaken(mistaken)]
        for name, recall, precision, images, mistaken in rows[:most]
    ]
    head = ("class", "recall %", "precision %", "images", "most often mistaken for")
    parts = [table(head, cells, "numbers classes", "results of each class")]
    if len(rows) > most:
        text = f"The {most} classes with the lowest recall of {len(rows)}."
        parts.append(tag("p", text, class_="dim"))
    return join(parts)


def _name(text: str, count: str = "") -> Html:
    shown = shorten_middle(text, LONG_NAME)
    return tag("span", shown + count, title=None if shown == text else text)


def _mistaken(text: str) -> Html:
    name, mark, count = text.rpartition(" (")
    return _name(name, mark + count) if text else Html("–")


def most_confused(confusion: Confusion, most: int) -> list[int]:
    """Return the classes with the most wrong images, as row or as column, in their own order."""
    count = len(confusion.matrix)
    wrong = [0] * count
    for true, row in enumerate(confusion.matrix):
        for predicted, images in enumerate(row):
            if predicted != true:
                wrong[true] += images
                if predicted < count:
                    wrong[predicted] += images
    worst = sorted(range(count), key=lambda index: (-wrong[index], index))[:most]
    return sorted(worst)


def matrix_size(matrices: int) -> int:
    """Return how many classes a confusion matrix shows if there are so many matrices."""
    fits = int(math.sqrt(CELLS / max(matrices, 1)))
    return max(FEWEST_CLASSES, min(MOST_CLASSES, fits))


def matrix_picture(confusion: Confusion, most: int) -> Html:
    """Return the confusion matrix as SVG; of many classes those that are confused most."""
    kept = most_confused(confusion, most)
    columns = kept + [i for i in range(len(confusion.columns)) if i >= len(confusion.matrix)]
    names = [confusion.classes[index] for index in kept]
    top = [confusion.columns[index] for index in columns]
    left = 12 + max(map(_width, names))
    above = 12 + max(map(_width, top)) * math.sin(math.radians(TURN))
    right = left + len(columns) * CELL
    parts = [tag("title", "Confusion matrix: rows are true classes, columns predicted ones")]
    for y, name in enumerate(names):
        middle = above + (y + 0.5) * CELL
        place = {"x": f"{left - 6:.1f}", "y": f"{middle + 4:.1f}"}
        parts.append(_label(name, **place, text_anchor="end"))
    for x, name in enumerate(top):
        middle = left + (x + 0.5) * CELL
        turn = f"translate({middle + 3:.1f} {above - 6:.1f}) rotate(-{TURN})"
        parts.append(_label(name, transform=turn))
        right = max(right, middle + 10 + _width(name) * math.cos(math.radians(TURN)))
    for y, true in enumerate(kept):
        total = sum(confusion.matrix[true])
        for x, predicted in enumerate(columns):
            images = confusion.matrix[true][predicted]
            parts.append(_cell(confusion, (true, predicted), images, total, (left, above, x, y)))
    width, height = right + 2, above + len(kept) * CELL + 2
    view = f"0 0 {width:.0f} {height:.0f}"
    drawing = tag("svg", parts, viewBox=view, role="img", class_="matrix", width=f"{width:.0f}")
    text = "Rows are true classes, columns are predicted ones; color is the share of the row."
    if len(kept) < len(confusion.matrix):
        text += f" The {len(kept)} most confused of {len(confusion.matrix)} classes."
    return join([drawing, tag("p", text, class_="dim")])


def _width(name: str) -> float:
    """Return the width of the name of a class, of which letters of East Asia have twice as much."""
    shown = shorten_middle(name, NAME)
    return LETTER * sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in shown)


def _label(name: str, **attributes: Any) -> Html:
    shown = shorten_middle(name, NAME)
    whole = tag("title", name) if shown != name else None
    return tag("text", shown, whole, **attributes)


def _cell(
    confusion: Confusion,
    where: tuple[int, int],
    images: int,
    total: int,
    place: tuple[float, float, int, int],
) -> Html:
    true, predicted = where
    left, above, x, y = place
    corner = {"x": f"{left + x * CELL + 1:.1f}", "y": f"{above + y * CELL + 1:.1f}"}
    size = {"width": CELL - 2, "height": CELL - 2, "rx": 3}
    if not images:
        return tag("rect", **corner, **size, class_="none")
    share, kind = images / total, "right" if true == predicted else "wrong"
    names = confusion.classes[true], confusion.columns[predicted]
    said = " as ".join(shorten_middle(name, 60) for name in names) + ": "
    title = tag("title", f"{said}{images} of {total} ({100 * share:.3g}%)")
    opacity = f"{0.12 + 0.88 * share:.2f}"
    parts = [tag("rect", title, **corner, **size, class_=kind, fill_opacity=opacity)]
    if len(confusion.matrix) <= NUMBERED and images < 10_000:
        at = {"x": f"{left + (x + 0.5) * CELL:.1f}", "y": f"{above + (y + 0.5) * CELL + 3.5:.1f}"}
        ink = "on" if share > 0.5 else "off"
        parts.append(tag("text", str(images), **at, text_anchor="middle", class_=f"count {ink}"))
    return join(parts)


def predictions_table(predictions: WrongPredictions) -> Html:
    """Return the table of the wrong predictions with the highest probability."""
    rows = [
        [path, _name(target), _name(predicted), "–" if predicted == NONE else f"{100 * chance:.1f}"]
        for path, target, predicted, chance in predictions.worst
    ]
    of = "" if predictions.is_whole else "the first "
    of += f"{predictions.read:,} predictions"
    if not predictions.wrong:
        return tag("p", f"None of {of} is wrong.", class_="dim")
    text = f"{predictions.wrong:,} of {of} are wrong; those with the highest probability:"
    head = ("image", "true class", "prediction", "probability %")
    return join(
        [tag("p", text, class_="dim"), table(head, rows, "words named", "wrong predictions")]
    )


# --- time -----------------------------------------------------------------------------------


def shares_picture(runs: Sequence[RunData]) -> Html | None:
    """Return a bar of the shares of the time for each run; None if no run has them."""
    known = [(run, mean_shares(run)) for run in runs]
    known = [(run, shares) for run, shares in known if shares]
    if not known:
        return None
    rows = []
    for run, shares in known:
        parts, x = [tag("title", "Share of the time: " + _describe(shares))], 0.0
        for name, share in shares.items():
            kind = f"s{SHARE_NAMES.index(name)}"
            box = {"x": f"{x:.2f}", "y": 0, "width": f"{100 * share:.2f}", "height": 10}
            title = tag("title", f"{name} {100 * share:.1f}%")
            parts.append(tag("rect", title, **box, class_=kind))
            x += 100 * share
        bar = {"viewBox": "0 0 100 10", "preserveAspectRatio": "none", "role": "img"}
        drawing = tag("svg", parts, **bar, class_="shares")
        texts = [
            tag("span", _swatch(f"s{SHARE_NAMES.index(name)}"), f"{name} {100 * share:.0f}%",
                class_="key")
            for name, share in shares.items()
        ]  # fmt: skip
        label = tag("p", run.name, class_="bar-name") if len(runs) > 1 else None
        rows.append(join([label, drawing, tag("p", texts, class_="dim spread")]))
    return join(rows)


def _describe(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())


def _swatch(kind: str) -> Html:
    box = tag("rect", width=12, height=12, rx=3, class_=kind)
    return tag("svg", box, width=12, height=12, aria_hidden="true")


# --- flags and machine ----------------------------------------------------------------------


def show(value: Any) -> str:
    """Return the value of a flag or of run.json as text."""
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, list | tuple):
        return short(" ".join(map(str, value)))
    if isinstance(value, dict):
        return short(json.dumps(value, default=str))
    return short(str(value).lower() if isinstance(value, bool) else value)


def show_flag(run: RunData, name: str) -> str:
    """Return the value of a flag; a dash if the run has no such flag."""
    value = run.flags.get(name)
    return show(value) if name not in run.flags or value not in (None, "", [], ()) else "none"


def flags_tables(runs: Sequence[RunData]) -> Html:
    """Return the flags: those that differ, or of one run those that were typed, and the rest."""
    names = [*dict.fromkeys(name for run in runs for name in run.flags)]
    if not names:
        return tag("p", "args.yaml is missing, so the flags are unknown.", class_="dim")
    return _compared_flags(runs, names) if len(runs) > 1 else _own_flags(runs[0], names)


def _own_flags(run: RunData, names: Sequence[str]) -> Html:
    """Return the flags of one run, those that were typed first."""
    typed = run.record.get("typed")
    marked = [name for name in names if isinstance(typed, list) and name in typed]
    rows = [("marked", [f"--{name}", show_flag(run, name)]) for name in marked]
    files = {"recipe": run.recipe, "config": part(run.record, "arguments").get("config")}
    rows[:0] = [
        ("marked", [f"--{name}", show(value)])
        for name, value in files.items()
        if value and isinstance(typed, list) and name in typed
    ]
    first = table((), rows, "words", "flags that were typed") if rows else None
    if not isinstance(typed, list):
        why = "run.json is missing, so it is not known which flags were typed."
        first = tag("p", why, class_="dim")
    others = [name for name in names if name not in marked]
    return join([first, _folded(run, others, plural(len(others), "other flag"))])


def _compared_flags(runs: Sequence[RunData], names: Sequence[str]) -> Html:
    """Return the flags of several runs: a table of those that differ; the others are folded."""
    having = {name: [run for run in runs if name in run.flags] for name in names}
    marked = [name for name in names if len({show_flag(run, name) for run in having[name]}) > 1]
    rows = [("marked", [f"--{name}", *(show_flag(run, name) for run in runs)]) for name in marked]
    head = ["flag", *(run.name for run in runs)]
    first = table(head, rows, "words", "flags that differ") if rows else None
    words = plural(len(marked), "flag") + " differ" + "s" * (len(marked) == 1)
    parts = [tag("p", f"{words} between the runs.", class_="dim"), first]
    groups: dict[tuple[str, ...], list[str]] = {}  # names of runs -> flags that they alone have
    for name in names:
        if name not in marked:
            groups.setdefault(tuple(run.name for run in having[name]), []).append(name)
    equal = groups.pop(tuple(run.name for run in runs), [])
    parts += [_folded(runs[0], equal, plural(len(equal), "equal flag"))]
    for own in groups.values():
        known = having[own[0]]
        parts.append(_folded(known[0], own, f"{plural(len(own), 'flag')} of {_who(known, runs)}"))
    return join(parts)


def _who(some: Sequence[RunData], runs: Sequence[RunData]) -> str:
    """Return `pre-training only` for all runs of that kind, otherwise the names of the runs."""
    kinds = {run.kind for run in some}
    if len(kinds) == 1 and len(some) == sum(run.kind in kinds for run in runs):
        return f"{kinds.pop()} only"
    return f"{first_few([run.name for run in some])} only"


def _folded(run: RunData, names: Sequence[str], title: str) -> Html:
    pairs = [tag("div", tag("dt", f"--{n}"), tag("dd", show_flag(run, n))) for n in names]
    return tag("details", tag("summary", title), tag("dl", pairs, class_="pairs"))


def machine_table(runs: Sequence[RunData]) -> Html:
    """Return versions, machine, git state and data of each run; rows that differ are marked."""
    known = [describe_machine(run.record) for run in runs]
    names = [*dict.fromkeys(name for facts in known for name in facts)]
    if not names:
        text = "run.json is missing: the run is older than it, or has written nothing yet."
        return tag("p", text, class_="dim")
    rows = []
    for name in names:
        cells = [facts.get(name, "–") for facts in known]
        differs = len(set(cells)) > 1 and name not in TIMES
        rows.append(("marked" if differs else "", [name, *cells]))
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return table(head, rows, "words", "machine and versions")


def describe_machine(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of run.json by name; those that are missing are left out."""
    facts = {label: make(record) for label, make in FACTS.items()}
    return {label: text for label, text in facts.items() if text}


def _git(record: Mapping[str, Any]) -> str:
    git = part(record, "git")
    if not git.get("commit"):
        return ""
    text = f"{str(git['commit'])[:12]} on {show(git.get('branch'))}"
    changed, lines = number(git.get("changed_files")), number(git.get("diff_lines"))
    if not changed:
        return f"{text}, no changes"
    text += f", {plural(int(changed), 'changed file')}"
    size = number(git.get("diff_bytes"))
    return text + f" ({lines:.0f} lines, {format_bytes(size)})" * (None not in (lines, size))


def _device(record: Mapping[str, Any]) -> str:
    device = part(record, "device")
    name, count = device.get("name") or device.get("type"), number(device.get("count"))
    if not name:
        return ""
    text = f"{count:.0f} x {name}" if count and count > 1 else str(name)
    extra = [
        f"{plural(int(value), noun)}"
        for key, noun in (("processes", "process"), ("cpu_cores", "CPU core"))
        if (value := number(device.get(key)))
    ]
    return short(", ".join([text, *extra]))


def _data(name: str) -> Callable[[Mapping[str, Any]], str]:
    def describe(record: Mapping[str, Any]) -> str:
        data = part(part(record, "data"), name)
        if not data:
            return ""
        images, classes = number(data.get("images")), number(data.get("classes"))
        words = [f"{images:,.0f} images"] if images is not None else []
        words += [plural(int(classes), "class")] if classes else []
        words += [f"fingerprint {data['fingerprint']}"] if data.get("fingerprint") else []
        return short(f"{show(data.get('source'))}: {', '.join(words)}")

    return describe


def _sessions(sessions: Any) -> str:
    """Return how many processes, one after the other, have trained the run; '' for one."""
    if not isinstance(sessions, list) or len(sessions) < 2:
        return ""
    return f"{len(sessions)}, resumed {plural(len(sessions) - 1, 'time')}"


def _packages(record: Mapping[str, Any]) -> str:
    packages = part(record, "packages")
    names = [name for name in PACKAGES if name in packages]
    names += [name for name in packages if name not in names]
    return short(", ".join(f"{name} {packages[name]}" for name in names))


def _plain(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: show(record[key]) if record.get(key) not in (None, "") else ""


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: figure_of(number(record.get(key))) if number(record.get(key)) else ""


FACTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "script": _plain("script"),
    "recipe": _plain("recipe"),
    "started": _plain("start"),
    "ended": _plain("end"),
    "duration": lambda record: duration(s) if (s := number(record.get("seconds"))) else "",
    "data": _data("train"),
    "evaluation data": _data("val"),
    "parameters": _count("parameters"),
    "optimizer steps": _count("steps_done"),
    "effective mask ratio": _count("mask_ratio"),
    "seed": _plain("seed"),
    "weights from": _plain("finetuned_from"),
    "resumed from": _plain("resumed_from"),
    "sessions": lambda record: _sessions(record.get("sessions")),
    "device": _device,
    "host": _plain("host"),
    "platform": _plain("platform"),
    "Python": _plain("python"),
    "packages": _packages,
    "git": _git,
}
