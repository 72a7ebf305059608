# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Training images that are held out for evaluation."""

import numpy as np
import pytest
from PIL import Image

import datasets
from config import parser as options
from data_loading.split import split
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
