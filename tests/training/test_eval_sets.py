# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Several evaluation sets: how they are written, and their names in log.txt and files."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import main_finetune
from config.parser import absolute_paths, parse
from config.phases import eval_sets, phase_problems, split_best_metric
from errors import UserError
from training.confusion import confusion_file
from training.eval_sets import check_name
from training.evaluation import Metrics

WORDS = (
    "--model tests.tiny:classifier --data_set image_folder --input_size 16 --stem_stride 1 "
    "--batch_size 4 --lr 0.01 --num_workers 0 --device cpu --epochs 1 --aa none --log_dir none "
    "--metrics acc1 confusion --best_metric sketch_acc1"
)


def finetune(words: str) -> None:
    main_finetune.main(parse(main_finetune.get_args_parser(), f"{WORDS} {words}".split()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {"": ""}),
        ("/data/val", {"": "/data/val"}),
        ("real=/a,sketch=/b", {"real": "/a", "sketch": "/b"}),
        (" real=/a, sketch=/b=c", {"real": "/a", "sketch": "/b=c"}),
        ("size=big", {"": "size=big"}),  # a single path, or a word for a data set of one's own
        ("/data/a,b=c", {"": "/data/a,b=c"}),
    ],
)
def test_sets_by_name(text, expected):
    assert eval_sets(text) == expected


def test_folder_that_exists_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("real=a,sketch=b")
    assert eval_sets("real=a,sketch=b") == {"": "real=a,sketch=b"}


@pytest.mark.parametrize("text", ["real=/a,/b", "real=/a,real=/b", "real=/a,", "real=/a,=b"])
def test_unclear_sets_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        finetune(f"--data_path here --eval_data_path {text}")
    assert "--eval_data_path: " in capsys.readouterr().err


def test_best_metric_may_be_that_of_any_set():
    sets = {"eval_data_path": "real=/a,sketch=/b"}
    assert split_best_metric(sets | {"best_metric": "sketch_acc1"}) == ("sketch", "acc1")
    assert split_best_metric(sets | {"best_metric": "real_f1(average=micro)"}) == (
        "",
        "f1(average=micro)",
    )
    assert split_best_metric(sets | {"best_metric": "acc1"}) == ("", "acc1")
    assert split_best_metric(sets) == ("", None)
    assert split_best_metric({"best_metric": "sketch_acc1"}) == ("", "sketch_acc1")


def test_metric_belongs_to_the_set_with_the_longest_name():
    sets = {"eval_data_path": "x=/x,a=/a,a_b=/b", "best_metric": "a_b_acc1"}
    assert split_best_metric(sets) == ("a_b", "acc1")
    assert split_best_metric(sets | {"best_metric": "a_acc1"}) == ("a", "acc1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=/a,ema=/b", "the set ema would be mistaken"),  # predictions-ema.csv
        ("a=/a,a_ema=/b", "the set a_ema would be mistaken"),  # predictions-a_ema.csv
        ("a=/x/v1.csv", "for several NAME=PATH,NAME=PATH"),
        ("v1.csv,b=v2.csv", "for one set give its path alone"),
    ],
)
def test_names_of_sets_are_refused_with_a_fix(text, said):
    args = parse(main_finetune.get_args_parser(), f"{WORDS} --data_path here".split())
    args = args.replace(eval_data_path=text, best_metric=None)
    assert [said in problem for problem in phase_problems(args)] == [True]
    assert not [*phase_problems(args.replace(eval_data_path="a=/a,sema=/b"))]
    if "/b" not in text:  # it may be a word for a data set of the user's own
        assert not [*phase_problems(args.replace(data_set="tests.tiny:colors"))]


def test_name_like_that_of_a_metric_is_refused():
    """`test_balanced_accuracy` could be the accuracy of a set `balanced`."""
    check_name("sketch", Metrics())
    check_name("", Metrics())
    with pytest.raises(UserError, match="the set balanced .* balanced_accuracy; rename the set"):
        check_name("balanced", Metrics())


def test_each_matrix_has_its_file():
    names = ["confusion", "confusion_ema", "sketch_confusion", "a_b_confusion_ema", "acc1"]
    assert [confusion_file(f"test_{name}") for name in names] == [
        *("confusion.csv", "confusion-ema.csv", "confusion-sketch.csv", "confusion-a-b-ema.csv"),
        "",
    ]


def test_run_evaluates_all_sets_and_matches_their_classes(tmp_path, capsys):
    """`cat` is absent from the sketches, which are all of bees: label 0 there, 1 in the head."""
    random = np.random.default_rng(0)
    for part, classes in (("train", "ant bee cat"), ("real", "ant bee cat"), ("sketch", "bee")):
        for name in classes.split():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    sets = f"real={tmp_path / 'real'},sketch={tmp_path / 'sketch'}"
    words = f"--data_path {tmp_path / 'train'} --eval_data_path {sets} --output_dir"
    finetune(f"{words} {tmp_path / 'run'}")
    row = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert [sum(line) for line in row["test_confusion"]] == [2, 2, 2]
    assert [sum(line) for line in row["test_sketch_confusion"]] == [0, 2, 0]
    assert f"best sketch_acc1 {row['test_sketch_acc1']:.4g} in epoch 1" in capsys.readouterr().out
    finetune(f"{words} {tmp_path / 'run'} --eval")
    text = capsys.readouterr().out
    assert f"loss {row['test_loss']:.4f} on 6 images of real" in text
    assert f"loss {row['test_sketch_loss']:.4f} on 2 images of sketch" in text
    files = {path.name for path in (tmp_path / "run").glob("confusion*")}
    assert files == {"confusion.csv", "confusion-sketch.csv"}


def test_paths_of_all_sets_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("a")
    found = absolute_paths({"eval_data_path": "real=a,sketch=nowhere"})
    assert found == {"eval_data_path": f"real={tmp_path}/a,sketch=nowhere"}
