# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""HTML that is escaped by construction, and the words for numbers and times in it.

python -c "from insight.report_html import tag; print(tag('td', '</script>', title='a & b'))"
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 300  # characters of a text from a file
VOID = ("meta", "img", "input", "rect", "line", "path", "col", "br")


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def tag(name: str, *parts: Any, **attributes: Any) -> Html:
    """Return an element. Parts that are not `Html` are escaped, lists are joined.

    Of attributes, `class_` is `class`, `aria_label` is `aria-label`; True has no value, and None
    and False are left out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value))}"')
    if name in VOID and not parts:
        return Html(f"<{' '.join(words)}{'/' * (name in ('rect', 'line', 'path'))}>")
    return Html(f"<{' '.join(words)}>{join(parts)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Return parts one after the other; those that are not `Html` are escaped."""
    texts = []
    for part in parts:
        if isinstance(part, Html):
            texts.append(part)
        elif isinstance(part, list | tuple):
            texts.append(join(part))
        elif part is not None:
            texts.append(html.escape(short(part), quote=False))
    return Html("".join(texts))


def script_json(value: Any) -> Html:
    """Return JSON that may stand in a script element: no text in it can end that element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(text)


def short(value: Any, most: int = LONGEST) -> str:
    """Return a value as text, shortened with an ellipsis."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def shorten_middle(text: str, most: int) -> str:
    """Return a name, shortened in the middle: names often differ at their ends."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def with_flags(text: Any) -> list[Any]:
    """Return a text in which flags such as `--mask_ratio` do not break at the end of a line."""
    parts = re.split(r"(--\w+)", short(text))
    return [tag("span", part, class_="flag") if i % 2 else part for i, part in enumerate(parts)]


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str = "", label: str = ""
) -> Html:
    """Return a table that scrolls by itself; the first cell of a row is its heading.

    A row may be a tuple (class, cells). head: may be empty. label: for screen readers.
    """
    body = []
    for row in rows:
        kind, cells = row if isinstance(row, tuple) else (None, row)
        first, *others = cells
        cells = [tag("th", first, scope="row"), *(tag("td", cell) for cell in others)]
        body.append(tag("tr", cells, class_=kind))
    top = tag("tr", [tag("th", cell, scope="col") for cell in head])
    heads = tag("thead", top) if head else None
    inner = tag("table", heads, tag("tbody", body), class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def figure_of(value: float | int | None) -> str:
    """Return a number for a table: 4 digits, thousands with commas, a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1000 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Return `45 s`, `3 min 20 s`, `12 min`, `2 h 5 min` or `3 d 4 h`; a dash for None."""
    if seconds is None or seconds < 0:
        return "–"
    if 600 <= seconds < 3600:
        return f"{seconds / 60:.0f} min"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, size), (low_name, low) in zip(units, units[1:], strict=False):
        if seconds >= size:
            rest = int(seconds % size) // low
            return f"{int(seconds // size)} {name}" + f" {rest} {low_name}" * bool(rest)
    return f"{seconds:.0f} s"
