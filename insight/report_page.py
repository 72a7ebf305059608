# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The report of one run or of several as one HTML file that needs no server and no network.

python visualize.py report runs/demo/pretrain runs/demo/finetune --output report.html
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from insight import report_tables as tables
from insight.report_curves import (
    PERCENT,
    SPELLED,
    Chart,
    Series,
    as_json,
    build_charts,
    style_of,
)
from insight.report_data import ReportData, labels_of, read_runs
from insight.report_html import (
    Html,
    duration,
    figure_of,
    join,
    script_json,
    table,
    tag,
    with_flags,
)
from insight.report_notes import describe_status, find_notes
from insight.report_pictures import Picture, collect_pictures
from insight.run_data import RunData, number
from utils import write_atomically

NAME = "report.html"
LIMIT, ROOM = 2_000_000, 40_000  # bytes of a page, of which some are for its head
READABLE = 560  # pixels to which a phone does not shrink a picture: its text gets too small
RECONSTRUCTIONS, WORST_IMAGES = "reconstructions", "worst_images"
COMMON = ("Images per second", "Duration")  # numbers of all runs, which come last
TITLES = {  # of the sections, and of the links to them
    "notes": "Notes",
    "curves": "Curves",
    "pictures": "Pictures",
    "results": "Results of the last evaluation",
    "time": "Where the time went",
    "configuration": "Configuration",
    "machine": "Machine",
}
LABELS = {"error": "Error", "warning": "Warning", "advice": "Advice", "info": "Note"}
HERE, PARTS = Path(__file__).parent, ("report.css", "report.js")


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of the runs in some folders, by default into the first; returns its path.

    Raises UserError if a folder holds no run, or if the file cannot be written.
    """
    path = Path(output) if output else Path(folders[0]).expanduser() / NAME
    content = build_page(read_runs(folders)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, path)
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror or error}") from error
    return path


def build_page(runs: Sequence[ReportData]) -> str:
    """Return the page of some runs, which have names; at most LIMIT bytes."""
    charts, notes = build_charts(runs)
    payload = script_json({"runs": [run.name for run in runs], "charts": as_json(charts)})
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in PARTS)
    sections = [
        _notes(runs, notes),
        _curves(runs, charts),
        None,  # pictures, which fill the rest of LIMIT
        None,  # results, with the worst images
        _time(runs, charts),
        _section("configuration", tables.flags_tables(runs)),
        _section("machine", tables.machine_table(runs)),
    ]
    evaluations = _evaluations(runs)
    texts = payload, css, script, *evaluations, *filter(None, sections)
    room = LIMIT - ROOM - sum(len(text.encode()) for text in texts)
    pictures, problems = collect_pictures(runs, room)
    worst = [picture for picture in pictures if picture.name == WORST_IMAGES]
    others = [picture for picture in pictures if picture.name != WORST_IMAGES]
    sections[2] = _pictures(runs, others, problems)
    sections[3] = _results(evaluations, _albums(runs, worst))
    body = [_head(runs, charts), tag("main", *filter(None, sections)), _foot()]
    return _document(", ".join(run.name for run in runs), body, (payload, css, script))


def _document(title: str, body: Sequence[Html], parts: tuple[Html, str, str]) -> str:
    """Return the whole page. Its policy allows this script and no other, and no connection."""
    payload, css, script = parts
    rules = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(css)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=rules),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"Report: {title}"),
        tag("style", Html(css)),
    ]
    data = tag("script", payload, type="application/json", id="data")
    parts = [tag("head", head), tag("body", body, data, tag("script", Html(script)))]
    return f"<!DOCTYPE html>\n{tag('html', parts, lang='en')}\n"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- head -----------------------------------------------------------------------------------


def _head(runs: Sequence[RunData], charts: Sequence[Chart]) -> Html:
    if len(runs) == 1:
        (run,) = runs
        title, content = run.name, _tiles(_facts(run, 0, charts))
    else:
        title, content = f"{len(runs)} runs", _comparison(runs, charts)
    nav = tag("nav", [tag("a", title, href=f"#{place}") for place, title in TITLES.items()])
    subtitle = " · ".join(dict.fromkeys(filter(None, map(_describe_run, runs))))
    header = [tag("h1", title), tag("p", subtitle, class_="lead"), nav, content]
    return tag("header", header)


def _describe_run(run: RunData) -> str:
    """Return `convnextv2_atto, pre-training on DIGITS`."""
    flags = run.flags
    if not flags.get("model"):
        return ""
    data = flags.get("data_set") if flags.get("data_set") not in (None, "auto") else ""
    data = data or Path(str(flags.get("data_path") or "")).name
    return f"{flags['model']}, {run.kind}" + f" on {data}" * bool(data)


class Fact(NamedTuple):
    """A number for the top of the page. goal: as in `Series`, of the values of several runs."""

    label: str
    text: str
    remark: str
    value: float | None = None
    goal: str = ""


def _facts(run: RunData, index: int, charts: Sequence[Chart]) -> list[Fact]:
    """Return the most important numbers of a run."""
    planned = number(run.flags.get("epochs"))
    epochs = f"{round(run.epochs_done, 3):g}" + (f" of {planned:g}" if planned else "")
    facts = [Fact("Epochs", epochs, describe_status(run))]
    for group, most in (("Metrics", 1), ("Loss", 2), ("Probes", 2), ("Speed", 1)):
        own = [(s, c) for c in charts if c.group == group for s in c.series if s.run == index]
        own = [(s, c) for s, c in own if group != "Metrics" or s.label.startswith("test")]
        own = [(s, c) for s, c in own if group != "Speed" or s.key == "images_per_s"]
        facts += [_fact(series, chart) for series, chart in own[:most]]
    seconds = number(run.record.get("seconds"))
    return facts + ([Fact("Duration", duration(seconds), "")] if seconds is not None else [])


def _fact(series: Series, chart: Chart) -> Fact:
    first, *others = series.label.split(" ")
    name = " ".join([first if first in SPELLED.values() else first.capitalize(), *others])
    labels = {"Loss": f"{name} loss", "Probes": f"{name} probe"}
    best = None if chart.group == "Speed" else series.best
    value, epoch = best or series.last
    remark = "last" if best is None else f"best, epoch {epoch:g}"
    text = figure_of(value) + "%" * bool(PERCENT.fullmatch(series.key))
    return Fact(labels.get(chart.group, chart.title), text, remark, value, series.goal)


def _tiles(facts: Sequence[Fact]) -> Html:
    tiles = [
        tag("div", tag("dt", label), tag("dd", tag("b", value), tag("small", remark)))
        for label, value, remark, *_ in facts
    ]
    return tag("dl", tiles, class_="tiles")


def _comparison(runs: Sequence[RunData], charts: Sequence[Chart]) -> Html:
    """Return the tables that compare the runs, one for each kind of training."""
    kinds: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        kinds.setdefault(run.kind, []).append(index)
    parts = []
    for kind, numbers in kinds.items():
        title = tag("h3", kind.capitalize() or "Unknown script") if len(kinds) > 1 else None
        parts += [title, _facts_table(runs, numbers, charts)]
    return join(parts)


def _facts_table(runs: Sequence[RunData], numbers: Sequence[int], charts: Sequence[Chart]) -> Html:
    """Return the table of some of the runs: a row a run, a column a fact."""
    facts = {index: {f.label: f for f in _facts(runs[index], index, charts)} for index in numbers}
    labels = [*dict.fromkeys(label for of_run in facts.values() for label in of_run)]
    labels.sort(key=lambda label: label in COMMON)
    rows = []
    best = {label: _best([f[label] for f in facts.values() if label in f]) for label in labels}
    for index, of_run in facts.items():
        swatch = _swatch(_style(index, 0, len(runs)))
        cells: list[Html] = [join([swatch, runs[index].name])]
        for label in labels:
            fact = of_run.get(label, Fact(label, "–", ""))
            name = "b" if fact.value is not None and fact.value == best[label] else "span"
            cells.append(join([tag(name, fact.text), tag("small", fact.remark)]))
        rows.append(cells)
    return table(["run", *labels], rows, "facts", "runs compared")


def _best(facts: Sequence[Fact]) -> float | None:
    """Return the best value of several runs, None where there is none or nothing to compare."""
    values = [fact.value for fact in facts if fact.value is not None]
    if len(values) < 2 or not facts[0].goal:
        return None
    return min(values) if facts[0].goal == "min" else max(values)


def _style(run: int, label: int, runs: int) -> str:
    """Return the classes of a curve in report.css."""
    color, dash = style_of(run, label, runs)
    return f"c{color} d{dash}"


def _swatch(style: str) -> Html:
    line = tag("line", x1=1, x2=29, y1=6, y2=6, class_=style)
    return tag("svg", line, width=30, height=12, class_="swatch", aria_hidden="true")


# --- sections -------------------------------------------------------------------------------


def _section(name: str, *parts: Any) -> Html:
    return tag("section", tag("h2", TITLES[name]), *parts, id=name)


def _notes(runs: Sequence[RunData], more: Sequence[str]) -> Html:
    items = []
    for run in runs:
        for note in find_notes(run):
            who = tag("span", run.name, class_="who") if len(runs) > 1 else None
            level = tag("strong", LABELS[note.level])
            said = tag("span", with_flags(note.text), class_="said")
            items.append((note.level, tag("li", level, who, said, class_=note.level)))
    items.sort(key=lambda item: [*LABELS].index(item[0]))
    found = [item for _, item in items]
    found += [tag("li", tag("strong", "Note"), tag("span", text), class_="info") for text in more]
    if any(run.rows for run in runs) and not {"error", "warning"} & {level for level, _ in items}:
        text = tag("span", "No alarms in the logs.")
        found.insert(0, tag("li", tag("strong", "OK"), text, class_="fine"))
    return _section("notes", tag("ul", found, class_="notes"))


def _toolbar(runs: Sequence[RunData]) -> Html:
    chips = [
        tag("button", _swatch(_style(index, 0, len(runs))), tag("span", label), class_="chip",
            type="button", aria_pressed="true", data_run=index)
        for index, label in enumerate(labels_of([run.name for run in runs]))
    ] if len(runs) > 1 else []  # fmt: skip
    smoothing = tag(
        "label",
        tag("span", "Smoothing"),
        tag("input", type="range", id="smoothing", min=0, max=0.95, step=0.05, value=0),
        tag("output", "0", id="smoothing-value"),
    )
    log = tag("button", "Log axis", class_="switch", type="button", id="log", aria_pressed="false")
    parts = [tag("div", chips, class_="chips"), tag("div", smoothing, log, class_="controls")]
    kind = "toolbar" if chips else "toolbar short"
    return tag("div", parts, class_=kind, role="toolbar", aria_label="curves")


def _curves(runs: Sequence[RunData], charts: Sequence[Chart]) -> Html:
    shown = [(i, chart) for i, chart in enumerate(charts) if chart.group != "Speed"]
    cards = [_card(runs, index, chart) for index, chart in shown]
    content = [_toolbar(runs), tag("div", cards, class_="charts")]
    if not charts:
        begun = all(run.epochs_done < 1 for run in runs)
        text = "No epoch is done yet." if begun else "log.txt holds no values."
        content = [tag("p", text, class_="dim")]
    else:
        text = "The curves are drawn by the script of this page; the tables hold their values."
        content.append(tag("noscript", tag("p", text)))
    return _section("curves", content)


def _card(runs: Sequence[RunData], index: int, chart: Chart) -> Html:
    """Return a chart: the place for its drawing, then last and best value of each curve."""
    several, labels = len(runs) > 1, chart.labels
    names = labels_of([run.name for run in runs])
    has_best = any(series.goal for series in chart.series)
    rows = []
    for place, series in enumerate(chart.series):
        style = _style(series.run, chart.numbers[series.label], len(runs))
        words = [names[series.run]] if several else []
        words += [series.label] if not several or len(labels) > 1 else []
        parts = [_swatch(style), tag("span", " · ".join(words))]
        name = tag("button", parts, type="button", aria_pressed="true", data_series=place,
                   data_style=style)  # fmt: skip
        cells = [tag("th", name, scope="row"), tag("td", figure_of(series.last[0]))]
        if best := series.best:
            at = tag("small", f" {chart.axis} {best[1]:g}")
            cells.append(tag("td", figure_of(best[0]), at))
        elif has_best:
            cells.append(tag("td", "–"))
        rows.append(tag("tr", cells))
    titles = ("", "last", "best") if chart.axis == "epoch" else ("", "last block", "lowest")
    titles = titles[: 2 + has_best]
    heads = tag("tr", [tag("th", text, scope="col") for text in titles])
    values = tag("table", tag("thead", heads), tag("tbody", rows), class_="values")
    log = tag("button", "log", class_="log", type="button", aria_pressed="false",
              aria_label=f"log axis of {chart.title}")  # fmt: skip
    caption = tag("figcaption", tag("h3", chart.title), log)
    plot = tag("div", class_="plot")
    return tag("figure", caption, plot, tag("div", values, class_="scroll", tabindex="0"),
               class_="chart", data_chart=index)  # fmt: skip


def _pictures(
    runs: Sequence[RunData], pictures: Sequence[Picture], problems: Sequence[str]
) -> Html | None:
    """Return the pictures over epochs, the reconstructions first."""
    if not pictures and not problems:
        return None
    lost = [tag("p", problem, class_="dim") for problem in problems]
    return _section("pictures", _albums(runs, pictures), lost)


def _albums(runs: Sequence[RunData], pictures: Sequence[Picture]) -> list[Html]:
    """Return the albums of the runs for each name, under a title."""
    names = [*dict.fromkeys(picture.name for picture in pictures)]
    names.sort(key=lambda name: name != RECONSTRUCTIONS)
    parts = []
    for name in names:
        own = [picture for picture in pictures if picture.name == name]
        albums = [
            _album(runs, [picture for picture in own if picture.run == index])
            for index in dict.fromkeys(picture.run for picture in own)
        ]
        title = name.replace("_", " ").capitalize()
        kind = "albums" + " many" * (len(albums) > 1)
        parts += [tag("h3", title), tag("div", albums, class_=kind)]
    return parts


def _album(runs: Sequence[RunData], pictures: Sequence[Picture]) -> Html:
    """Return the pictures of a run: the last one, and buttons for those of other epochs."""
    run, last = runs[pictures[0].run], pictures[-1]
    images = [
        tag("img", src=picture.url, width=picture.width, height=picture.height, loading="lazy",
            alt=f"{picture.name} of {run.name} after {picture.epoch} epochs",
            hidden=picture is not last, data_epoch=picture.epoch,
            class_="wide" if picture.width >= READABLE else None)
        for picture in pictures
    ]  # fmt: skip
    buttons = [
        tag("button", str(picture.epoch), type="button", data_epoch=picture.epoch,
            aria_pressed="true" if picture is last else "false")
        for picture in pictures
    ]  # fmt: skip
    name = tag("h3", run.name) if len(runs) > 1 else None
    choice = tag("div", tag("span", "Epoch"), buttons, class_="epochs", role="group",
                 aria_label="epoch") if len(pictures) > 1 else None  # fmt: skip
    frame = tag("div", images, class_="scroll", tabindex="0", role="region",
                aria_label=f"{pictures[0].name} of {run.name}")  # fmt: skip
    return tag("figure", tag("figcaption", name, choice), frame, class_="album")


def _evaluations(runs: Sequence[ReportData]) -> list[Html]:
    """Return confusion matrices, tables of classes, and the most confident wrong predictions."""
    count = sum(len(run.confusions) for run in runs)
    size, parts = tables.matrix_size(count), []
    for run in runs:
        for name in dict.fromkeys([*run.confusions, *run.predictions]):
            titles = ([run.name] if len(runs) > 1 else []) + ([name] if name else [])
            parts += [tag("h3", " · ".join(titles))] if titles else []
            if confusion := run.confusions.get(name):
                most = tables.MOST_ROWS * 4 // count
                pair = tables.matrix_picture(confusion, size), tables.class_table(confusion, most)
                parts.append(tag("div", [tag("div", part) for part in pair], class_="pair"))
            if predictions := run.predictions.get(name):
                parts.append(tables.predictions_table(predictions))
    if any(run.last("test_acc1") is not None for run in runs) and not count:
        text = "For a confusion matrix and a table of classes use --metrics acc1 acc5 confusion."
        parts.append(tag("p", with_flags(text), class_="dim"))
    return parts


def _results(evaluations: Sequence[Html], worst: Sequence[Html]) -> Html | None:
    parts = [*evaluations, *worst]
    return _section("results", parts) if parts else None


def _time(runs: Sequence[RunData], charts: Sequence[Chart]) -> Html | None:
    cards = [_card(runs, i, chart) for i, chart in enumerate(charts) if chart.group == "Speed"]
    bars = tables.shares_picture(runs)
    if not cards and bars is None:
        return None
    shares = tag("div", tag("h3", "Shares of the time"), bars, class_="card") if bars else None
    content = [shares, tag("div", cards, class_="charts") if cards else None]
    return _section("time", content)


def _foot() -> Html:
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return tag("footer", f"Written {when} by the ConvNeXt V2 toolkit.")
