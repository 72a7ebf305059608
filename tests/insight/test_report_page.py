# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The page of a report: complete, escaped, self-contained and small. See also the next file."""

import json
import random
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import visualize
from config import views
from errors import UserError
from insight import report_page
from insight.report_data import Confusion, WrongPredictions, read_runs
from insight.report_html import duration, figure_of, script_json, shorten_middle, tag
from insight.report_page import LIMIT, build_page, write_report
from insight.report_tables import (
    class_rows,
    describe_machine,
    machine_table,
    matrix_picture,
    most_confused,
    predictions_table,
    shares_picture,
)
from insight.run_data import read_run
from tests.insight.written import (
    CLASSES,
    FLAGS,
    RECORD,
    finetune_rows,
    pretrain_rows,
    write_examples,
    write_picture,
    write_run,
)

EVIL = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'&<!--"""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "insight.md"
VOID = {"meta", "img", "input", "rect", "line", "path", "br"}


class Reader(HTMLParser):
    """Elements of a page with their attributes, and its text; fails if an element is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        if name not in VOID:
            assert self.open.pop() == name

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(folders):
    return build_page(read_runs(folders))


def test_sections_come_in_order_with_the_alarms_first(page):
    Reader(page)
    found = re.findall(r"<h2>(.*?)</h2>", page)
    assert found == [
        "Notes", "Curves", "Pictures", "Results of the last evaluation",
        "Where the time went", "Configuration", "Machine",
    ]  # fmt: skip
    text = Reader(page).text
    assert "Features collapse: RankMe fell to 3 of 320." in text
    assert "Overfitting: the test loss was lowest in epoch 5" in text
    assert text.index("Features collapse") < text.index("Smoothing") < text.index("--mask_ratio")


def test_top_of_the_page_has_the_best_values(folders):
    text = Reader(build_page(read_runs(folders[2:]))).text
    assert "Top-1 accuracy90%best, epoch 7" in text
    assert "Test loss0.5best, epoch 5" in text
    text = Reader(build_page(read_runs(folders[:1]))).text
    assert "kNN probe77.51%best, epoch 12" in text
    assert "Epochs12 of 12finished" in text
    page = build_page(read_runs(folders[:2]))
    assert "<b>77.51%</b><small>best, epoch 12" in page  # the better one of two runs
    assert "<span>64.94%</span><small>best, epoch 12" in page
    page = build_page(read_runs(folders[1:]))  # their losses do not compare
    assert "<b>" not in page.partition("<main>")[0]


def test_differing_flags_are_marked_and_equal_ones_are_not(folders):
    page = build_page(read_runs(folders[:2]))
    marked = re.findall(r'<tr class="marked"><th scope="row">--(\w+)', page)
    assert marked == ["lr", "mask_ratio", "output_dir"]
    assert "3 flags differ between the runs." in page
    assert re.findall(r"<dt>--(\w+)", page) == ["model", "data_path", "data_set", "epochs",
                                                "batch_size"]  # fmt: skip


def test_flags_and_facts_of_one_script_alone_are_not_compared(folders):
    """54 flags of a pre-training and a fine-tuning run differed, most of them in one alone."""
    page = build_page(read_runs(folders))
    marked = re.findall(r'<tr class="marked"><th scope="row">--(\w+)', page)
    assert marked == ["lr", "mask_ratio", "output_dir"]  # of the two pre-training runs
    page = build_page(read_runs(folders[1:]))
    marked = re.findall(r'<tr class="marked"><th scope="row">--(\w+)', page)
    assert marked == ["lr", "output_dir"]
    folded = page.partition("1 flag of pre-training only</summary>")[2]
    assert re.findall(r"<dt>--(\w+)</dt><dd>(.*?)</dd>", folded) == [("mask_ratio", "0.75")]
    head = page.partition("<main>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", head) == ["Pre-training", "Fine-tuning"]
    first, second = re.findall(r"<thead>(.*?)</thead>", head)
    assert ("Holdout loss" in first, "Test loss" in first) == (True, False)
    assert ("Holdout loss" in second, "Test loss" in second) == (False, True)


def test_flags_of_some_runs_of_a_kind_name_them(tmp_path):
    runs = [write_run(tmp_path / name, (), flags=FLAGS) for name in "ab"]
    runs.append(write_run(tmp_path / "new", (), flags=FLAGS | {"fresh": 3}))
    text = Reader(build_page(read_runs(runs))).text
    assert "1 flag of new only--fresh3" in text
    assert "0 flags differ between the runs." in text


def test_times_of_runs_are_not_marked(tmp_path):
    """Start, end and duration differ between any two runs."""
    other = RECORD | {"start": "2026-12-01", "end": "2026-12-02", "seconds": 7.0, "host": "node8"}
    runs = [write_run(tmp_path / "a", (), RECORD), write_run(tmp_path / "b", (), other)]
    table = build_page(read_runs(runs)).partition('id="machine"')[2]
    assert re.findall(r'<tr class="marked"><th scope="row">(.*?)<', table) == ["host"]
    assert "2026-12-01" in table


def test_typed_flags_of_one_run_are_marked(folders):
    page = build_page(read_runs(folders[:1]))
    marked = re.findall(r'<tr class="marked"><th scope="row">--(\w+)', page)
    assert marked == ["model", "data_path", "epochs"]
    assert 'class="chip"' not in page  # there is no other run to hide


def test_a_typed_recipe_and_config_are_shown(tmp_path):
    """Both were left out: no flag of the run, but of its command line."""
    typed = {"recipe": "tiny: --lr 1", "config": "own.yaml"}
    record = RECORD | {"arguments": FLAGS | typed, "typed": ["lr", *typed], "recipe": "tiny"}
    page = build_page(read_runs([write_run(tmp_path / "run", (), record)]))
    marked = re.findall(r'<tr class="marked"><th scope="row">--(\w+)</th><td>(.*?)</td>', page)
    assert marked == [("recipe", "tiny"), ("config", "own.yaml"), ("lr", "0.001")]
    record |= {"typed": ["lr"]}
    page = build_page(read_runs([write_run(tmp_path / "run", (), record)]))
    assert "--recipe" not in page


def test_links_have_the_words_of_the_titles(page):
    """A link `Pictures` led to `Reconstructions over epochs`."""
    links = re.findall(r'<a href="#(\w+)">(.*?)</a>', page)
    sections = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', page)
    assert sections == links
    assert len(links) == 7


def test_results_without_a_confusion_matrix_name_the_flag(tmp_path, folders):
    said = "For a confusion matrix and a table of classes use --metrics acc1 acc5 confusion."
    flags = {"model": "convnextv2_atto"}
    run = write_run(tmp_path / "run", finetune_rows(2), flags=flags)
    assert said in Reader(build_page(read_runs([run]))).text
    assert said not in Reader(build_page(read_runs(folders))).text  # which have them
    numbers = write_run(tmp_path / "rmse", [{"epoch": 0, "test_rmse": 1.0}], flags=flags)
    assert said not in Reader(build_page(read_runs([numbers]))).text


def test_shares_of_the_time_have_each_name_once(folders):
    """A legend had the names, and the line below them again."""
    card = build_page(read_runs(folders[:1])).partition("Shares of the time</h3>")[2]
    card = card.partition('class="charts"')[0]
    card = re.sub("<title>.*?</title>", "", card)  # which appear under the mouse
    assert Reader(card.rpartition("</div>")[0]).text == (
        "data 31%forward 24%backward 35%optimizer 6%other 4%"
    )


def test_value_of_the_last_block_is_called_so(page):
    """`last` was read as the last epoch."""
    card = page.partition("Channel cosine distance by block</h3>")[2].partition("</figure>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', card) == ["", "last block", "lowest"]


def test_runs_of_earlier_versions_have_a_page_too(tmp_path):
    run = write_run(tmp_path / "old", [{"epoch": 0, "train_loss": 1.0}])
    text = Reader(build_page(read_runs([run]))).text
    assert "run.json is missing, so it is not known which flags were typed." in text
    assert "No alarms in the logs." in text
    (run / "args.yaml").unlink()
    (run / "log.txt").write_text("")
    text = Reader(build_page(read_runs([run]))).text
    assert "args.yaml is missing, so the flags are unknown." in text
    assert "No epoch is done yet." in text
    assert "No alarms" not in text  # nothing is known


def test_markup_of_files_is_text(tmp_path):
    rows = [
        {"epoch": 0, "train_loss": 1.0, f"test_{EVIL}": 2.0, "alarms": [EVIL], "advice": [EVIL]}
    ]
    record = RECORD | {"status": "failed", "error": EVIL, "host": EVIL, "typed": ["model"]}
    record["git"] = {"commit": EVIL, "branch": EVIL}
    flags = FLAGS | {"model": EVIL, EVIL: EVIL, "data_path": EVIL}
    classes = [f"{EVIL}{index}" for index in range(3)]
    runs = [write_run(tmp_path / name, rows, record, flags, classes) for name in "ab"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(record | {"device": {"name": EVIL}}))
    found = read_runs(runs)
    found[0].name = f"a{EVIL}"
    page = build_page(found)
    reader = Reader(page)
    assert [name for name, _ in reader.elements].count("script") == 2  # the data and ours
    assert all(not any(key.startswith("on") for key in attributes) for _, attributes
               in reader.elements)  # fmt: skip
    assert "img" not in {name for name, _ in reader.elements}
    assert reader.text.count(EVIL) > 20
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data[1])["runs"][0] == f"a{EVIL}"
    assert "alert" not in {name for name, _ in reader.elements}


def test_nothing_is_loaded_from_elsewhere(page):
    outside = re.findall(r'(?:src|href|action|data|poster)="([^"]*)"', page)
    assert all(link.startswith(("data:image/", "#")) for link in outside)
    assert "@import" not in page
    assert "url(" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src &#x27;none&#x27;; img-src data:")
    assert "unsafe" not in policy


@pytest.mark.slow
def test_large_runs_stay_below_the_limit(tmp_path):
    """Noise in pictures and curves cannot be compressed; 16 runs of it would have 60 MB."""
    rng = random.Random(0)
    rows = [
        {"epoch": epoch} | {f"test_m{index}": rng.random() for index in range(12)}
        for epoch in range(800)
    ]
    first = write_run(tmp_path / "run0", rows, RECORD, classes=[f"class {i}" for i in range(300)])
    for epoch in range(30):
        write_picture(first / "reconstructions" / f"epoch-{epoch}.png", "", (1100, 700))
    noise = bytes(rng.getrandbits(8) for _ in range(700 * 700))
    Image.frombytes("L", (700, 700), noise).save(first / "reconstructions" / "epoch-29.png")
    page = build_page(read_runs([first]) * 16).encode()
    assert 500_000 < len(page) < LIMIT


def test_damaged_pictures_are_named_and_the_others_kept(tmp_path):
    run = write_run(tmp_path / "run", pretrain_rows(2), pictures={"reconstructions": [0, 1]})
    (run / "reconstructions" / "epoch-0.png").write_bytes(b"\x89PNG broken")
    page = build_page(read_runs([run]))
    assert page.count("<img ") == 1
    assert "reconstructions/epoch-0.png of run is left out: cannot identify image file" in page


def test_rows_of_classes_and_the_most_confused_ones(folders):
    confusion = read_runs(folders[2:])[0].confusions[""]
    assert class_rows(confusion) == [
        ("owl", 70, pytest.approx(100 * 7 / 9), 10, "cat (3)"),
        ("horse", 80, pytest.approx(100 * 8 / 9), 10, "owl (2)"),
        ("dog", 90, 100, 10, "horse (1)"),
        ("cat", 100, pytest.approx(100 * 10 / 13), 10, ""),
    ]
    assert most_confused(confusion, 2) == [0, 3]  # cat and owl, in their own order
    missed = Confusion("abc", "abc", ((0, 2, 2), (0, 5, 0), (0, 0, 5)))
    assert most_confused(missed, 1) == [0]  # never predicted, so no column has it


def test_classes_without_images_come_last():
    """Their recall is unknown, and not the lowest."""
    confusion = Confusion(("a", "b"), ("a", "b"), ((0, 0), (1, 3)))
    assert [row[0] for row in class_rows(confusion)] == ["b", "a"]


def test_diagonal_of_the_confusion_matrix_is_right():
    """The colors of right and wrong would be the other way round."""
    drawing = matrix_picture(Confusion(("a", "b"), ("a", "b"), ((3, 1), (0, 2))), 8)
    assert re.findall(r'class="(right|wrong|none)"', drawing) == ["right", "wrong", "none", "right"]


def test_rows_of_the_machine_that_differ_are_marked(tmp_path):
    other = RECORD | {"seed": 1, "packages": RECORD["packages"] | {"torch": "2.9.0"}}
    runs = [read_run(write_run(tmp_path / n, (), r)) for n, r in (("a", RECORD), ("b", other))]
    marked = re.findall(r'<tr class="marked"><th scope="row">([\w ]+)', machine_table(runs))
    assert marked == ["seed", "packages"]


def test_shares_of_the_time_lie_side_by_side(tmp_path):
    row = {"epoch": 0, "time_data": 0.25, "time_forward": 0.5, "time_backward": 0.25}
    bar = shares_picture([read_run(write_run(tmp_path / "run", [row]))])
    assert re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', bar) == [
        ("0.00", "25.00"), ("25.00", "50.00"), ("75.00", "25.00"),
    ]  # fmt: skip


def test_the_last_picture_is_shown_first(tmp_path):
    """Also of more epochs than there is room for."""
    drawn = {"reconstructions": range(12)}
    run = write_run(tmp_path / "run", pretrain_rows(12), pictures=drawn)
    elements = Reader(build_page(read_runs([run]))).elements
    shown = [a["data-epoch"] for name, a in elements if name == "img" and "hidden" not in a]
    buttons = [a for name, a in elements if name == "button" and "data-epoch" in a]
    pressed = [a["data-epoch"] for a in buttons if a["aria-pressed"] == "true"]
    assert shown == pressed == ["12"]
    assert buttons[0]["data-epoch"] == "1"


def test_lowest_loss_of_several_runs_is_the_best(tmp_path):
    rows = {name: [{"epoch": 0, "train_loss": loss}] for name, loss in (("a", 2.5), ("b", 1.5))}
    page = build_page(read_runs([write_run(tmp_path / name, rows[name]) for name in rows]))
    assert re.findall(r"<b>(.*?)</b>", page.partition("<main>")[0]) == ["1.5"]


def test_errors_of_any_run_come_before_notes_of_others(tmp_path):
    states = {"a": {"status": "running"}, "b": {"status": "failed", "error": "no memory"}}
    runs = [write_run(tmp_path / n, pretrain_rows(2), RECORD | r) for n, r in states.items()]
    levels = re.findall(r'<li class="(\w+)"><strong>', build_page(read_runs(runs)))
    assert levels[:2] == ["error", "warning"]


def test_no_wrong_prediction_is_a_sentence_without_a_table():
    """`0 of 42 predictions are wrong; those with the highest probability:` had an empty table."""
    assert predictions_table(WrongPredictions([], 0, 42, True)) == (
        '<p class="dim">None of 42 predictions is wrong.</p>'
    )
    assert "<table" in predictions_table(WrongPredictions([("a", "b", "c", 0.5)], 1, 42, True))


def test_long_names_of_classes_are_cut_in_the_middle(tmp_path):
    """`soft-coated_wheaten_terrier_1` and `..._2` looked alike."""
    names = [f"a_soft-coated_wheaten_terrier_of_the_north_{index}" for index in range(3)]
    assert shorten_middle("0123456789", 5) == "01…89"
    assert shorten_middle("01234", 5) == "01234"
    run = write_run(tmp_path / "run", pretrain_rows(1), classes=names)
    page = build_page(read_runs([run]))
    labels = re.findall(r">(a_soft[^<(]*…[^<(]*?)(?: \(\d+\))?<", page)
    assert {len(label) for label in labels} <= {16, 40}
    assert len({*labels}) == 6  # of three names, short in the matrix and longer in tables
    assert page.count(f'title="{names[0]}"') >= 1


def test_flags_that_are_none_differ_from_missing_ones(tmp_path):
    """A typed `--aa none` was shown as a dash."""
    record = RECORD | {"arguments": FLAGS | {"aa": None}, "typed": ["aa"]}
    runs = [write_run(tmp_path / "a", pretrain_rows(1), record)]
    text = Reader(build_page(read_runs(runs))).text
    assert "--aanone" in text
    record = RECORD | {"arguments": FLAGS | {"aa": "rand"}}
    runs.append(write_run(tmp_path / "b", pretrain_rows(1), record))
    runs.append(write_run(tmp_path / "c", pretrain_rows(1), RECORD | {"arguments": FLAGS}))
    assert "--aanonerand–" in Reader(build_page(read_runs(runs))).text


def test_heads_of_a_linear_probe_share_a_card(tmp_path):
    """Each had a card of its own, and its rate was called best."""
    row = {"train_loss": 1.0, "test_acc1": 50.0, "test_best_blr": 3.0}
    row |= {f"test_acc1_blr{rate:g}": 50.0 for rate in (0.1, 3, 1e-5)}
    page = build_page(read_runs([write_run(tmp_path / "run", [{"epoch": 0} | row])]))
    cards = re.findall(r"<h3>(.*?)</h3>.*?<table class=\"values\">(.*?)</table>", page)
    titles = ["Loss", "Top-1 accuracy", "Top-1 accuracy of each head"]
    assert [title for title, _ in cards] == [*titles, "Learning rate of the best head"]
    assert [label in cards[2][1] for label in ("blr 0.1", "blr 3", "blr 1e-05")] == [True] * 3
    assert "best</th>" in cards[1][1]
    assert "best</th>" not in cards[3][1]


def test_machine_of_a_record():
    found = describe_machine(RECORD)
    assert found["git"] == "1fc3ee7a0b on main, 2 changed files (31 lines, 1.5 KiB)"
    assert found["device"] == "8 x NVIDIA H200, 8 processes, 64 CPU cores"
    assert found["data"] == "/data/animals: 20,000 images, 4 classes, fingerprint 9f3a11c2"
    assert found["effective mask ratio"] == "0.6122"
    assert "evaluation data" not in found
    assert describe_machine({"git": "x", "device": [], "data": {"train": 3}}) == {}


def test_elements_are_escaped_and_numbers_are_short():
    assert tag("td", "<b>", ["&", tag("i", 3)], title='"x"', hidden=True, id=None) == (
        '<td title="&quot;x&quot;" hidden>&lt;b&gt;&amp;<i>3</i></td>'
    )
    assert "<" not in script_json({"a": "</script>\u2028"})
    assert [figure_of(x) for x in (0.123456, 98.876, 12345.6, 1e-7, None)] == [
        "0.1235", "98.88", "12,346", "1e-07", "–"
    ]  # fmt: skip
    assert [duration(x) for x in (4, 130, 1300, 7500, 3600, 270000, None)] == [
        "4 s", "2 min 10 s", "22 min", "2 h 5 min", "1 h", "3 d 3 h", "–"
    ]  # fmt: skip


def test_command_writes_the_page_and_names_it(folders, tmp_path, capsys):
    output = tmp_path / "new" / "compared.html"
    words = ["report", *map(str, folders), "--output", str(output)]
    view, args = views.parse_view(words)
    visualize.VIEWS[view](args)
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert re.fullmatch(rf"{output}: 3 runs, \d+\.\d KiB\n", capsys.readouterr().out)
    visualize.report(views.parse_view(["report", str(folders[0])])[1])
    assert (folders[0] / report_page.NAME).exists()
    with pytest.raises(UserError, match="does not exist"):
        visualize.report(views.parse_view(["report", str(tmp_path / "none")])[1])
    with pytest.raises(UserError, match="cannot write --output /proc/report.html"):
        write_report([folders[0]], "/proc/report.html")
    with pytest.raises(SystemExit):
        views.parse_view(["report"])


def test_class_names_are_shown_for_all_sets(tmp_path):
    run = write_run(tmp_path / "run", pretrain_rows(1), classes=CLASSES)
    (run / "confusion.csv").rename(run / "confusion-sketch.csv")
    page = build_page(read_runs([run]))
    assert "<h3>sketch</h3>" in page
    assert "owl as cat: 3 of 10 (30%)" in page


def test_commands_of_the_docs_write_reports(tmp_path, monkeypatch):
    section = DOCS.read_text(encoding="utf-8").partition("## Report")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "first", "second"):
        write_run(tmp_path / "runs" / name, pretrain_rows(2), RECORD)
    for line in block.splitlines():
        python, script, *words = shlex.split(line)
        assert (python, script) == ("python", "visualize.py")
        view, args = views.parse_view(words)
        visualize.VIEWS[view](args)
    assert "<h1>photos</h1>" in (tmp_path / "runs/photos/report.html").read_text()
    assert "<h1>2 runs</h1>" in (tmp_path / "compared.html").read_text()
