# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The page of a report in a real Chromium: it draws, answers to mouse and keyboard, and fits."""

import json

import pytest

from insight.report_data import read_runs
from insight.report_page import build_page, write_report
from tests import browser
from tests.insight.written import RECORD, pretrain_rows, write_examples, write_run

pytestmark = pytest.mark.slow
EVIL = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'&"""
CURVES = "#curves [data-chart='0'] path.curve"  # of the first chart, which shows losses


@pytest.fixture(scope="module")
def chromium():
    """A running browser; skips without Chromium, which .ci/run installs."""
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium: install Debian's package chromium")
    with browser.Browser(program) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three runs."""
    folder = tmp_path_factory.mktemp("report")
    return write_report(write_examples(folder), folder / "report.html")


def count(chromium, selector):
    return chromium.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def text(chromium, selector):
    return chromium.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def ticks(chromium, axis):
    code = f"[...document.querySelectorAll('[data-chart=\"0\"] text.{axis}')]"
    return chromium.evaluate(f"{code}.map(each => Number(each.textContent))")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_opens_without_errors_and_asks_for_nothing(chromium, page, width, dark):
    chromium.open(page, width, dark=dark)
    assert chromium.errors == []
    assert chromium.requests == [page.as_uri()]
    assert count(chromium, CURVES) == 4  # train and held-out loss of two runs
    assert count(chromium, CURVES.replace("'0'", "'1'")) == 3  # of the fine-tuning run
    plots, drawn = count(chromium, ".plot"), count(chromium, ".plot > svg > title")
    assert plots == drawn > 10
    light = chromium.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(light) < 60) == dark


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(chromium, page, width):
    chromium.open(page, width)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    wide = chromium.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest("
        "'svg') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert wide == []


@pytest.mark.parametrize("width", [390, 700, 1000, 1280])
def test_tiles_leave_no_gap(chromium, tmp_path, width):
    """At 1000 pixels the second row was one tile and an empty block."""
    run = write_run(tmp_path / "run", pretrain_rows(2), RECORD)
    chromium.open(write_report([run]), width)
    assert count(chromium, ".tiles > div") == 7
    assert (
        chromium.evaluate(
            "(() => { const size = e => { const b = e.getBoundingClientRect(); "
            "return b.width * b.height; }; const all = document.querySelector('.tiles'); "
            "return [...all.children].map(size).reduce((a, b) => a + b) / size(all); })()"
        )
        > 0.96
    )  # the rest are lines between them


def test_a_flag_in_a_note_stays_in_one_line(chromium, tmp_path):
    """A line ended with `raise --` and the next began with `mask_ratio`."""
    rows = pretrain_rows(2)
    rows[-1]["advice"] = [f"{'x' * index} try --mask_ratio 0.6" for index in range(30)]
    chromium.open(write_report([write_run(tmp_path / "run", rows)]), 390)
    lines = chromium.evaluate(
        "[...document.querySelectorAll('.said .flag')].map(e => e.getClientRects().length)"
    )
    assert lines == [1] * 30


@pytest.mark.parametrize(
    "values",
    [(0.9948, 0.994801), (1234.5, 1234.6), (0.5, 0.5), (2e6, 2e6 + 20), (1e-6, 1.00001e-6)],
)
def test_marks_of_a_flat_curve_differ(chromium, tmp_path, values):
    """Four marks of a nearly constant loss were all labeled 0.9948."""
    rows = [{"epoch": e, "train_loss": value} for e, value in enumerate(values)]
    chromium.open(write_report([write_run(tmp_path / "run", rows)]))
    marks = chromium.evaluate("[...document.querySelectorAll('text.y')].map(e => e.textContent)")
    assert len(marks) > 1
    assert len({*marks}) == len(marks)
    assert chromium.evaluate(
        "[...document.querySelectorAll('text.y')].every(e => e.getBBox().x >= 0)"
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_of_classes_have_room(chromium, tmp_path, width):
    """The last column's name was cut at the right edge, and those of the table had 8 lines."""
    names = [f"WWW_a_soft-coated_wheaten_terrier_of_the_north_{index}" for index in range(9)]
    run = write_run(tmp_path / "run", pretrain_rows(2), classes=[*names, "犬" * 20])
    chromium.open(write_report([run]), width)
    outside = chromium.evaluate(
        "(() => { const all = document.querySelector('.matrix').getBoundingClientRect(); "
        "return [...document.querySelectorAll('.matrix text')].filter(e => { "
        "const b = e.getBoundingClientRect(); return b.right > all.right + 1 || "
        "b.left < all.left - 1 || b.top < all.top - 1; }).map(e => e.textContent); })()"
    )
    assert outside == []
    rows = chromium.evaluate(
        "[...document.querySelectorAll('#results tbody tr')].map(e => e.offsetHeight)"
    )
    assert max(rows) < 110  # four lines


def test_a_click_on_a_run_hides_its_curves_and_another_shows_them(chromium, page):
    chromium.open(page)
    chip = ".chip[data-run='1']"
    before, own = count(chromium, "path.curve"), count(chromium, "path.curve[data-run='1']")
    assert own > 5
    chromium.click(chip)
    assert count(chromium, "path.curve[data-run='1']") == 0
    assert count(chromium, "path.curve") == before - own
    assert count(chromium, f"{chip}[aria-pressed='false']") == 1
    chromium.evaluate(f'document.querySelector("{chip}").focus()')
    chromium.press("Enter")
    assert count(chromium, "path.curve") == before
    assert chromium.errors == []


def test_epochs_have_whole_numbers_on_the_axis(chromium, tmp_path):
    """Three epochs had marks at 1, 1.2, 1.4 ..."""
    chromium.open(write_report([write_run(tmp_path / "run", pretrain_rows(3))]))
    assert ticks(chromium, "x") == [1, 2, 3]
    chromium.open(write_report([write_run(tmp_path / "one", pretrain_rows(1))]))
    assert ticks(chromium, "x") == [0, 1, 2]
    assert count(chromium, "[data-chart='0'] circle") == 2  # a line of one point is invisible
    assert chromium.errors == []


def test_rare_values_have_marks_and_all_charts_the_same_epochs(chromium, tmp_path):
    """Three probes in 30 epochs looked like a curve, over another range than the loss."""
    rows = [{"epoch": e, "train_loss": 1 / (e + 1)} for e in range(30)]
    for epoch in (9, 19):
        rows[epoch] |= {"probe_knn": 50.0 + epoch, "rank_me": 9.0}
    chromium.open(write_report([write_run(tmp_path / "run", rows)]))
    marks = "[...document.querySelectorAll('.chart')].map(e => e.querySelectorAll('circle').length)"
    assert chromium.evaluate(marks) == [0, 2, 2]
    assert (
        chromium.evaluate("charts.map(chart => [chart.scale.left, chart.scale.right])")
        == [[1, 30]] * 3
    )
    axes = chromium.evaluate(
        "charts.map(c => [...c.figure.querySelectorAll('text.x')].map(e => e.textContent).join())"
    )
    assert len({*axes}) == 1
    short = write_run(tmp_path / "short", rows[:12])
    chromium.open(write_report([tmp_path / "run", short]))
    chromium.click(".chip[data-run='0']")
    assert chromium.evaluate("charts.map(chart => chart.scale.right)") == [12] * 3


def test_all_runs_hidden_leave_an_empty_plot(chromium, page):
    chromium.open(page)
    for run in range(3):
        chromium.click(f".chip[data-run='{run}']")
    assert count(chromium, "path.curve") == 0
    assert "no curve to show" in text(chromium, "#curves .plot")
    chromium.move(*chromium.middle("#curves .plot"))
    assert chromium.errors == []


def test_a_click_on_a_curve_hides_it_in_its_plot_alone(chromium, page):
    chromium.open(page)
    before = count(chromium, "path.curve")
    chromium.click("[data-chart='0'] button[data-series='1']")
    assert count(chromium, CURVES) == 3
    assert count(chromium, "path.curve") == before - 1


def test_the_mouse_and_the_arrow_keys_show_values(chromium, page):
    chromium.open(page)
    plot = "[data-chart='0'] .plot"
    assert count(chromium, f"{plot} .tip:not([hidden])") == 0
    chromium.move(*chromium.middle(plot))
    lines = text(chromium, f"{plot} .tip").split("\n")
    assert lines[0] in ("epoch 6", "epoch 7")
    epoch = int(lines[0].split()[1])
    value = pretrain_rows()[epoch - 1]["train_loss"]
    assert lines[lines.index("pre · train") + 1] == f"{value:.4g}"
    height = chromium.evaluate(f'document.querySelector("{plot} .tip").offsetHeight')
    assert height < 200  # of four rows
    chromium.evaluate(f'document.querySelector("{plot}").focus()')
    chromium.press("ArrowRight")
    assert text(chromium, f"{plot} .tip").startswith(f"epoch {epoch + 1}\n")
    chromium.press("Escape")
    assert count(chromium, f"{plot} .tip:not([hidden])") == 0


def test_smoothing_changes_the_curve_and_keeps_the_original(chromium, page):
    chromium.open(page)
    shape = f"document.querySelector(\"{CURVES}\").getAttribute('d')"
    before, curves = chromium.evaluate(shape), count(chromium, CURVES)
    chromium.evaluate(
        "(() => { const s = document.getElementById('smoothing'); s.value = 0.9; "
        "s.dispatchEvent(new Event('input')); })()"
    )
    assert count(chromium, f"{CURVES}.raw") == curves
    assert count(chromium, CURVES) == 2 * curves
    raw, smoothed = chromium.evaluate(
        f"[...document.querySelectorAll(\"{CURVES}\")].slice(0, 2).map(c => c.getAttribute('d'))"
    )
    assert raw == before != smoothed
    assert text(chromium, "#smoothing-value") == "0.9"


def test_log_axis_acts_on_one_plot_or_on_all(chromium, page):
    chromium.open(page)
    shape = f"document.querySelector(\"{CURVES}\").getAttribute('d')"
    linear, marks = chromium.evaluate(shape), ticks(chromium, "y")
    chromium.click("[data-chart='0'] button.log")
    assert chromium.evaluate(shape) != linear
    assert ticks(chromium, "y") != marks
    assert count(chromium, "button.log[aria-pressed='true']") == 1
    chromium.click("#log")
    assert count(chromium, "button.log[aria-pressed='true']") > 5
    chromium.click("#log")
    assert chromium.evaluate(shape) == linear
    assert chromium.errors == []


def test_log_axis_leaves_out_values_up_to_zero(chromium, tmp_path):
    rows = [{"epoch": e, "train_lr": value} for e, value in enumerate((0.0, 1e-3, 1e-5, 0.0))]
    rows[2]["test_r2"] = -1.0
    run = write_run(tmp_path / "run", rows)
    chromium.open(write_report([run]))
    assert text(chromium, "#curves").count("log") == 1  # no button for a curve below zero
    chromium.click("#log")
    numbers = chromium.evaluate("[...document.querySelectorAll('path.curve')].map(c => "
                                "c.getAttribute('d')).join('')")  # fmt: skip
    assert "NaN" not in numbers
    assert "Infinity" not in numbers
    assert chromium.errors == []


def test_buttons_choose_the_epoch_of_the_reconstructions(chromium, page):
    chromium.open(page)
    shown = "[...document.querySelectorAll('.album img')].filter(i => !i.hidden).map(i => i.alt)"
    assert "reconstructions of pre after 12 epochs" in chromium.evaluate(shown)
    chromium.click(".album button[data-epoch='4']")
    after = chromium.evaluate(shown)
    assert "reconstructions of pre after 4 epochs" in after
    assert "reconstructions of high after 12 epochs" in after
    assert len(after) == 3
    assert chromium.evaluate("document.querySelector('.album img').naturalWidth") > 100


def test_pictures_are_readable_on_a_phone(chromium, page):
    """The titles in a picture had 8 pixels; it scrolls sideways now, in its own frame."""
    chromium.open(page, 390)
    widths = "[...document.querySelectorAll('.album img:not([hidden])')].map(e => e.offsetWidth)"
    assert chromium.evaluate(widths) == [560] * 3
    frame = "document.querySelector('.album .scroll')"
    assert chromium.evaluate(f"{frame}.scrollWidth > {frame}.clientWidth")
    assert chromium.evaluate("document.documentElement.scrollWidth") == 390


def test_hostile_names_are_shown_as_text(chromium, tmp_path):
    rows = [{"epoch": e, "train_loss": 1.0 + e, f"test_{EVIL}": 2.0} for e in range(3)]
    rows[-1]["alarms"] = [EVIL]
    classes = [f"{EVIL}{index}" for index in range(3)]
    record = RECORD | {"status": "failed", "error": EVIL}
    runs = [write_run(tmp_path / name, rows, record, {"model": EVIL}, classes) for name in "ab"]
    found = read_runs(runs)
    found[0].name = f"a{EVIL}"
    (tmp_path / "report.html").write_text(build_page(found))
    chromium.open(tmp_path / "report.html")
    chromium.move(*chromium.middle("[data-chart='1'] .plot"))
    assert EVIL in text(chromium, "[data-chart='1'] .tip")
    assert EVIL in text(chromium, ".chip")
    assert chromium.evaluate("typeof window.hacked") == "undefined"
    assert chromium.errors == []


def test_every_control_has_a_name_and_can_be_focused(chromium, page):
    chromium.open(page)
    nameless = chromium.evaluate(
        "[...document.querySelectorAll('button, input, img, [role]')].filter(e => !(e.innerText || "
        "e.getAttribute('aria-label') || e.alt || e.labels?.[0]?.innerText || "
        "e.querySelector('title'))).map(e => e.outerHTML.slice(0, 200))"
    )
    assert [each for each in nameless if 'class="tip"' not in each] == []
    small = chromium.evaluate(
        "[...document.querySelectorAll('button')].filter(e => e.tabIndex < 0)"
    )
    assert small == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(chromium, page, dark):
    """WCAG AA: 4.5 to 1, for all texts outside of drawings."""
    chromium.open(page, dark=dark)
    low = chromium.evaluate(
        """(() => {
          const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const back = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(c)) return c; } };
          return [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('svg') && [...e.childNodes].some(n => n.nodeType === 3
              && n.textContent.trim()) && e.offsetWidth)
            .filter(e => { const [a, b] = [getComputedStyle(e).color, back(e)].map(light);
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5; })
            .map(e => e.outerHTML.slice(0, 200)); })()"""
    )
    assert low == []


def test_errors_of_a_page_are_noticed(chromium, tmp_path):
    """Otherwise the tests above could not fail."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('first'); missing.call()</script><img src=none.png>")
    chromium.open(page)
    assert "['first']" in chromium.errors
    assert any("missing is not defined" in error for error in chromium.errors)
    assert any(request.endswith("none.png") for request in chromium.requests)
