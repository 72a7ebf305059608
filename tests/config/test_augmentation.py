# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Misspelled policies and augmentations that cannot act are refused at the start."""

import pytest
import torch

from config import augmentation
from config import parser as options
from config.augmentation import policy_problems
from data_loading.augment import Augmentation
from data_loading.rng import seed_cpu
from data_loading.transforms import IMAGENET, PRETRAIN, build_augmentation, create_train_transform

PARSERS = {"pretrain": options.pretrain_parser, "finetune": options.finetune_parser}
GOOD = ["rand-m9-mstd0.5-inc1", "rand", "rand-m15-n3-p0.7-mmax20-mstd101", "rand-n15-tweights-inc0"]
GOOD += ["rand-n14-t3aw", "rand-n40-t3a", "augmix", "augmix-m5-w4-d2-a0.5-b1", "augmix-b0-mstd1"]
GOOD += ["original", "original-mstd0.5", "originalr", "v0", "v0r", "v0-mstd1.5", "3a", "3a-mstd0.5"]
GOOD += ["ta_wide"]
BAD = {
    "rnd-m9": "unknown policy 'rnd'. Did you mean 'rand'?",
    "random": "unknown policy 'random'. Did you mean 'rand'?",
    "Original": "unknown policy 'Original'. Did you mean 'original'",
    "ta": "unknown policy 'ta'. ",
    "xyz": "unknown policy 'xyz'. Expected rand, augmix, ",
    "rand-m9-foo": "got 'foo', expected m, n, p, mstd, mmax, inc with a number, or t",  # ignored
    "rand-mm9": "got 'mm9', expected m, n, ",
    "rand-m9.5": "m: got '9.5', expected an integer >=0",
    "rand-p2": "p: got '2', expected a number in [0,1]",
    "rand-inc2": "inc: got '2', expected an integer in [0,1]",
    "rand-m9-m5": "m is given twice",
    "rand-tw": "got 'tw', expected t with one of 3a, 3aw, weights",  # timm took the default set
    "rand-n16-tweights": "n16 is above the 15 operations of tweights",  # workers failed
    "rand-m9-": "got '', expected m, n, ",
    "augmix-n3": "got 'n3', expected m, w, d, a, b, mstd with a number",
    "augmix-d-1": "got 'd', expected m, w, ",
    "augmix-a0": "a: got '0', expected a number >0",
    "original-m9": "got 'm9', expected mstd with a number",
    "ta_wide-m9": "ta_wide has no parts, got 'm9'",
}


def parse(script, words):
    common = ["--data_set", "DIGITS", "--epochs", "3"]
    return options.parse(PARSERS[script](), [*common, *words.split()])


def refused(capsys, script, words):
    with pytest.raises(SystemExit) as stop:
        parse(script, words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("aa", GOOD)
def test_policies_are_built_as_they_are_written(aa):
    """Of each, the table here has the same parts as timm."""
    assert list(policy_problems(aa)) == []
    for script in PARSERS:
        assert parse(script, f"--aa {aa}").aa == aa
    for channels in (1, 3):
        transform = create_train_transform((10, 12), Augmentation(aa=aa, fill=[0.4] * channels))
        image = torch.arange(channels * 120, dtype=torch.float).view(channels, 10, 12).byte()
        for seed in range(30):  # operations and their strength are drawn
            seed_cpu(seed)
            after = transform(image)
            assert (after.shape, after.dtype) == (image.shape, torch.uint8)


def test_sets_of_operations_are_those_of_timm():
    from timm.data import auto_augment

    for name, count in augmentation.SETS.items():
        found = auto_augment.rand_augment_choices(name)
        assert found is not auto_augment.rand_augment_choices("unknown")
        assert count == (len(found) if isinstance(found, dict) else None)


@pytest.mark.parametrize("aa", BAD)
@pytest.mark.parametrize("script", PARSERS)
def test_misspelled_policy_is_refused_before_data_is_read(script, aa, capsys):
    assert f"error: --aa {aa}: {BAD[aa]}" in refused(capsys, script, f"--aa {aa}")
    with pytest.raises(ValueError, match=f"^--aa {aa}: "):
        create_train_transform(16, Augmentation(aa=aa))


def test_policy_of_an_evaluation_is_not_looked_at():
    """The flags of a run may be used to evaluate it."""
    assert parse("finetune", "--eval --resume x --aa foo --rot90 1 --input_size 32 64").eval


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 2 0.5", "--ratio: got 2.0 0.5, expected the smaller number first; swap them"),
        ("--color_jitter 0.4 --aa original", "no effect with --aa original; give --aa none or 3a"),
        ("--color_jitter_prob 0.5 --aa none", "needs --color_jitter above 0; add it, or drop"),
        ("--remode rand --reprob 0", "--remode rand needs --reprob above 0"),
        ("--aug_off_epoch 3 --aa v0", "--aug_off_epoch 3 is not below --epochs 3"),
        ("--aug_off_epoch 2 --aa none --reprob 0", "needs --aa, --reprob or another that it ends"),
        ("--rot90 0.5 --input_size 64 96", "must be square, not --input_size 64 96; drop one"),
        ("--rot90 0.5 --input_size 64:0,64x96:1", "must be square, not --input_size 64 96"),
        ("--aa none --in_chans 12 --grayscale_prob 0.2",
         "--grayscale_prob 0.2 is for RGB images, not --in_chans 12; drop it"),
        ("--aa none --in_chans 1 --pca_lighting 0.1",
         "--pca_lighting 0.1 is for RGB images, not --in_chans 1; drop it"),
        ("--aa 3a --in_chans 4", "--aa 3a is for 8-bit images of 1 or 3 channels, not"),
        ("--aa none --value_range 0 4095 --color_jitter 0.3",
         "--color_jitter 0.3 is for 8-bit images of 1 or 3 channels, not --value_range 0.0 4095.0"),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(script, words, message, capsys):
    assert message in refused(capsys, script, words)


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize(
    "words",
    [
        "--aa none --in_chans 12 --vflip 0.5 --rot90 0.75 --gaussian_blur_prob 0.5 --reprob 0.2",
        "--aa none --value_range 0 4095 --grayscale_prob 0.5 --pca_lighting 0.1",
        "--aa none --in_chans 1 --color_jitter 0.4 --color_jitter_prob 0.8",
        "--aa rand-m9-t3a --color_jitter 0.3 --aug_off_epoch 2",
        *(f"--aa none --reprob 0 --aug_off_epoch 2 {words}" for words in (
            "--color_jitter 0.3", "--pca_lighting 0.1", "--grayscale_prob 0.2",
            "--gaussian_blur_prob 0.1", "--reprob 0.1",
        )),
    ],
)  # fmt: skip
def test_what_works_is_not_refused(script, words):
    parse(script, words)


def test_defaults_of_the_scripts():
    """Pre-training: crop and flip alone; fine-tuning as in the official code."""
    for script, base, changes in (
        ("pretrain", PRETRAIN, {}),
        ("finetune", IMAGENET, {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25}),
    ):
        found = vars(build_augmentation(parse(script, "")))
        assert found == {**vars(base), "fill": [0.485, 0.456, 0.406], **changes}


def test_every_flag_is_a_field_of_its_name():
    names = [
        row[0][2:] for row in options.flags.FLAGS["augmentation"] if row[0][2:] != "aug_off_epoch"
    ]
    assert {*names} == {*vars(Augmentation())} - {"fill"}
    words = "--scale 0.1 0.2 --ratio 0.3 0.4 --train_interpolation random --hflip 0.1 --vflip 0.2 "
    words += "--rot90 0.3 --aa 3a --color_jitter 0.4 --color_jitter_prob 0.5 --pca_lighting 0.6 "
    words += "--grayscale_prob 0.7 --gaussian_blur_prob 0.8 --reprob 0.9 --remode rand --recount 2"
    found = vars(build_augmentation(parse("pretrain", f"{words} --mean 0.3 --std 0.2")))
    assert found == {
        "scale": (0.1, 0.2), "ratio": (0.3, 0.4), "train_interpolation": "random", "hflip": 0.1,
        "vflip": 0.2, "rot90": 0.3, "aa": "3a", "color_jitter": 0.4, "color_jitter_prob": 0.5,
        "pca_lighting": 0.6, "grayscale_prob": 0.7, "gaussian_blur_prob": 0.8, "reprob": 0.9,
        "remode": "rand", "recount": 2, "fill": [0.3] * 3,
    }  # fmt: skip


def test_flags_of_a_run_of_an_earlier_version_are_enough():
    """Its args.yaml has no flags that were added later, and they were off."""
    args = parse("pretrain", "")
    old = {"scale": (0.3, 0.9), "hflip": 0.1, "in_chans": 3, "imagenet_default_mean_and_std": True}
    found = build_augmentation(type(args)(**old))
    assert (found.scale, found.hflip) == ((0.3, 0.9), 0.1)
    assert found.geometric() == found


def test_geometric_is_what_aug_off_epoch_leaves():
    whole = Augmentation((0.3, 0.4), (1.0, 1.0), "random", 0.1, 0.2, 0.3, "3a", 0.4, 0.5, 0.6, 0.7,
                         0.8, 0.9)  # fmt: skip
    left = vars(whole.geometric())
    assert {name for name, value in vars(whole).items() if left[name] != value} == {
        *augmentation.ENDED
    }
    assert not any(left[name] for name in augmentation.ENDED)
