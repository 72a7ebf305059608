# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Training images that are held out for evaluation."""

import numpy as np
import pytest
from PIL import Image

import datasets
from config import parser as options
from data_loading.sources import DatasetSpec, open_images
from data_loading.split import keep_fraction, list_labels, split
from data_loading.tables import Columns
from errors import UserError
from training.resume import compare_args


class Listed:
    """A data set with labels under torchvision's name."""

    classes = ("a", "b", "c")

    def __init__(self, *counts: int) -> None:
        self.targets = [label for label, count in enumerate(counts) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, self.targets[index]


def parts(data, fraction: float) -> list[list[tuple[int, int]]]:
    return [
        [part[i] for i in range(len(part))]
        for part in (split(data, fraction, train) for train in (True, False))
    ]


def test_each_image_is_trained_on_or_held_out_and_each_class_loses_its_fraction():
    data = Listed(3000, 1000, 2)
    train, val = parts(data, 0.2)
    assert sorted(train + val) == list(enumerate(data.targets))
    counts = [sum(label == k for _, label in val) for k in range(3)]
    assert counts == [pytest.approx(600, abs=80), pytest.approx(200, abs=45), 1]
    assert train == sorted(train)


def test_samples_stay_in_their_part_when_others_are_added():
    """A run that was resumed after that would be evaluated on images that it was trained on."""
    before, after = ({i for i, _ in parts(Listed(n), 0.2)[1]} for n in (1000, 1300))
    assert before == {i for i in after if i < 1000}


def test_split_is_always_the_same_and_has_class_names():
    assert parts(Listed(9, 9), 0.3) == parts(Listed(9, 9), 0.3)
    assert split(Listed(9, 9), 0.3, True).classes == ["a", "b", "c"]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_each_class_of_two_or_more_images_gives_to_both_parts(fraction):
    train, val = parts(Listed(*[2, 5] * 20), fraction)
    assert [label for _, label in val] == [*range(40)]
    assert len(train) == 20 * (1 + 4)


def test_split_of_a_version_is_that_of_later_ones():
    """A resumed run would be evaluated on images that it was trained on."""
    assert [i for i, _ in parts(Listed(20), 0.3)[1]] == [0, 2, 9, 16]


def test_class_of_one_image_is_trained_on():
    train, val = parts(Listed(1, 4), 0.5)
    assert (0, 0) in train
    assert [label for _, label in val] == [1, 1]
    with pytest.raises(UserError, match="no class has two images"):
        split(Listed(1, 1), 0.5, True)


def test_data_set_without_listed_labels_is_split_as_a_whole():
    train, val = parts(range(100), 0.3)
    assert 20 < len(val) < 40
    assert sorted(train + val) == [*range(100)]


@pytest.mark.parametrize(
    "targets", [["a", "b"] * 5, [{"box": 1}] * 10, [[1], [1, 2]] * 5, [[1, 2]] * 10]
)
def test_labels_of_other_kinds_do_not_matter(targets):
    data = Listed(10)
    data.targets = targets
    assert len(split(data, 0.3, True)) + len(split(data, 0.3, False)) == 10


@pytest.fixture
def photos(tmp_path):
    """Class folders without val/."""
    for label, name in enumerate(("ant", "bee")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = np.full((40, 40, 3), 100 * label + i, np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def parse(*words: str):
    words = ("--aa", "none", "--reprob", "0", "--num_workers", "0", *words)
    return options.parse(options.finetune_parser(), list(map(str, words)))


@pytest.mark.parametrize(
    ("data_set", "folder"), [("IMNET", "."), ("image_folder", "train")], ids=("IMNET", "folders")
)
def test_folders_without_evaluation_data(data_set, folder, photos):
    words = ("--data_set", data_set, "--data_path", photos / folder)
    args = parse(*words, "--val_split", 0.2)
    train, val, nb_classes = datasets.build_datasets(args)
    assert (len(train) + len(val), nb_classes) == (20, 2)
    names = [{part.name_of(i) for i in range(len(part))} for part in (train, val)]
    assert not names[0] & names[1]
    assert all(str(photos) in name for name in names[1])
    labels = {path.split("/")[-2]: label for path, label in val.dataset.samples}
    assert labels == {"ant": 0, "bee": 1}
    values = [val[0, i][0].float().mean().item() for i in range(len(val))]
    assert len(set(values)) == len(val)  # other images, and not all the same one
    held = sorted({name.split("/")[-1] for name in names[1]})
    assert held == ["5.png", "8.png", "9.png"]  # in later versions too
    _, few, _ = datasets.build_datasets(parse(*words, "--val_split", 0.001))
    assert [label for _, label in few.dataset.samples] == [0, 1]
    (photos / "val" / "ant").mkdir(parents=True)
    if data_set == "IMNET":
        with pytest.raises(
            UserError, match="has evaluation data of its own .folder val/.; drop --val_split"
        ):
            datasets.build_datasets(args)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--data_set DIGITS", "--data_set DIGITS has its own evaluation data; drop it"),
        ("--data_set image_folder --data_path x --eval_data_path y", "both give the evaluation"),
        ("--data_path x --disable_eval", "there would be no evaluation"),
    ],
)
def test_split_without_effect_is_refused(words, text, capsys):
    with pytest.raises(SystemExit):
        parse(*words.split(), "--val_split", "0.1")
    assert text in capsys.readouterr().err


def test_run_cannot_resume_with_another_split():
    """It would evaluate on images that it was trained on."""
    with pytest.raises(UserError, match="--val_split 0.1 and cannot resume with 0.2"):
        compare_args({"val_split": 0.1}, {"val_split": 0.2}, "it.pth")


# --- --label_fraction -----------------------------------------------------------------------


def kept(data, fraction: float, seed: int = 0, kind: str = "class") -> list[int]:
    """Numbers of the samples that are trained on."""
    return keep_fraction(data, fraction, seed, kind).indices.tolist()


def test_each_class_gives_its_fraction_and_at_least_one(log):
    part = keep_fraction(Listed(200, 57, 3), 0.1, 7, "class")
    assert np.bincount(list_labels(part)).tolist() == [20, 6, 1]
    assert part.classes == ["a", "b", "c"]
    assert [label for _, label in map(part.__getitem__, range(27))] == [0] * 20 + [1] * 6 + [2]
    assert log.messages == ["train: 27 of 260 images (--label_fraction 0.1, seed 7)"]
    keep_fraction(Listed(9000, 3000), 0.5, 0, "class")
    assert log.messages[-1] == "train: 6,000 of 12,000 images (--label_fraction 0.5, seed 0)"


def test_smaller_fraction_is_a_part_of_a_larger_one():
    """Results of 1% and 10% of the labels would otherwise be those of other images."""
    parts = [{*kept(Listed(300, 90, 5), fraction)} for fraction in (0.01, 0.1, 0.11, 0.5, 1)]
    assert [len(part) for part in parts] == [5, 40, 44, 197, 395]
    for smaller, larger in zip(parts, parts[1:], strict=False):
        assert smaller < larger


def test_seed_chooses_the_images_and_later_versions_choose_the_same():
    data = Listed(20, 30)
    assert kept(data, 0.1) == kept(data, 0.1) == [12, 15, 24, 28, 31]
    assert kept(data, 0.1, seed=1) == [13, 19, 20, 30, 32]
    assert sum(len({*kept(data, 0.5, seed)} & {*kept(data, 0.5)}) for seed in range(1, 41)) / (
        25 * 40
    ) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_images_that_are_held_out_do_not_depend_on_the_fraction(fraction):
    """--val_split comes first: nothing is trained on that is evaluated, for any fraction."""
    data = Listed(100, 60)
    train, val = (split(data, 0.25, is_train) for is_train in (True, False))
    part = keep_fraction(train, fraction, 0, "class")
    assert part.dataset is data  # no part of a part, whose files would not be described
    assert {*part.indices} <= {*train.indices}
    assert not {*part.indices} & {*val.indices}
    counts = np.bincount(list_labels(train))
    assert np.bincount(list_labels(part)).tolist() == np.rint(fraction * counts).clip(1).tolist()


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a table of (file, label) rows."""
    for number in range(40):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{number}.png")

    def make(rows, **columns):
        lines = ["image,label", *(f"{number}.png,{label}" for number, label in rows)]
        (tmp_path / "t.csv").write_text("\n".join(lines))
        spec = DatasetSpec(str(tmp_path / "t.csv"), None, columns=Columns(**columns))
        return open_images("table", spec, True)

    return make


def named(data, fraction: float, **options) -> list[int]:
    """Numbers in the names of the samples that are trained on."""
    return [int(data.names[i].split(".")[0]) for i in kept(data, fraction, **options)]


def test_names_choose_the_images_whatever_their_order_and_the_other_classes(make):
    rows = [(number, number % 2) for number in range(40)]
    numbers = named(make(rows), 0.2)
    assert named(make(rows[::-1]), 0.2) == numbers
    fewer = [row for row in rows if row[1] or row[0] < 6]
    assert [n for n in named(make(fewer), 0.2) if n % 2] == [n for n in numbers if n % 2]


def test_rows_of_the_same_image_stay_together(make):
    """The same image with two labels would count twice, and one of them would be lost."""
    rows = [(number // 2, "ab"[number // 40]) for number in range(80)]
    chosen = kept(make(rows), 0.1)
    assert [i for i in chosen if i % 2 == 0] == [i - 1 for i in chosen if i % 2]
    assert [rows[i][1] for i in chosen] == ["a"] * 4 + ["b"] * 4


def test_rarest_of_several_labels_decides(make):
    """20 images of x, of which 4 are of y too, and 16 without a label."""
    labels = ["x"] * 20 + [""] * 16
    for number in (3, 8, 9, 17):
        labels[number] = "x|y"
    data = make([*enumerate(labels)], labels=("label",))
    assert data.kind == "multi"
    found = [labels[number] for number in named(data, 0.25, kind="multi")]
    assert [found.count(label) for label in ("x", "x|y", "")] == [4, 1, 4]


def test_numbers_are_one_class():
    data = Listed(30, 70)
    assert len(kept(data, 0.1, kind="number")) == 10
    assert len(kept(range(50), 0.1, kind="number")) == 5  # they need not be listed


@pytest.mark.parametrize("kind", ["class", "multi"])
def test_data_set_without_listed_labels_cannot_give_a_fraction_of_each_class(kind):
    with pytest.raises(UserError, match="give it a list `targets` with the label of each image"):
        keep_fraction(range(50), 0.1, 0, kind)


def test_fraction_of_folders_is_trained_on_and_evaluated_on_all(photos, log):
    words = ("--data_set", "IMNET", "--data_path", photos, "--val_split", 0.2)
    whole, val, _ = datasets.build_datasets(parse(*words))
    train, same, nb_classes = datasets.build_datasets(
        parse(*words, "--label_fraction", 0.3, "--seed", 3)
    )
    assert (len(train), nb_classes) == (5, 2)
    assert f"train: 5 of {len(whole)} images (--label_fraction 0.3, seed 3)" in log.messages
    assert any(text.startswith("train: 5 images of 2 classes (ant, bee)") for text in log.messages)
    names = [{part.name_of(i) for i in range(len(part))} for part in (train, whole, val, same)]
    assert names[0] < names[1]
    assert names[2] == names[3]
    assert datasets.count_labels(train, 2).tolist() == [3, 2]
