# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Evaluations over several views of each image, through main_finetune.py and its engine."""

import json

import pytest
import torch

import datasets
import engine_finetune
import main_finetune
from config import parser as options
from data_loading.targets import Scale
from data_loading.transforms import create_eval_transform, mean_and_std
from data_loading.tta import Views
from errors import UserError
from tests import fakes, tiny
from training.criterion import Criterion
from training.evaluation import Metrics
from training.hooks import Reporter

CPU = torch.device("cpu")
TINY = (
    "--model tests.tiny:classifier --data_set tests.tiny:colors --input_size 16 --stem_stride 1 "
    "--batch_size 6 --lr 0.01 --num_workers 0 --device cpu --warmup_epochs 0 --aa none "
    "--epochs 1 --log_dir none --kernels torch "
    "--head_init_scale 100"  # so that outputs differ between views
)
TEN_CROP = "--tta hflip five_crop --crop_pct 0.8"


def finetune(words: str) -> list[str]:
    """Run main_finetune.py in this process; returns its log lines."""
    with fakes.logged() as messages:
        main_finetune.main(options.parse(options.finetune_parser(), f"{TINY} {words}".split()))
    return messages


def ten_crop_loss(checkpoint: dict, key: str, images: int) -> float:
    """Of `tests.tiny:colors`, from a loop in plain PyTorch."""
    model = tiny.classifier(stem_stride=1, num_classes=tiny.CLASSES).eval()
    model.load_state_dict(checkpoint[key])
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in mean_and_std())
    resize, data, logits = create_eval_transform(20, 1.0), tiny.Colors(images), []
    for number in range(images):
        image = (resize(data[number][0]) / 255 - mean) / std
        places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
        crops = [image[:, top : top + 16, left : left + 16] for top, left in places]
        with torch.no_grad():
            outputs = model(torch.stack([*crops, *(crop.flip(2) for crop in crops)]))
        logits.append(outputs.mean(0))
    labels = torch.arange(images) % tiny.CLASSES
    return torch.nn.functional.cross_entropy(torch.stack(logits), labels).item()


def test_all_evaluations_of_a_run_are_over_the_views(tmp_path):
    """Those of the weights and the EMA weights on each set, and --eval without the flags."""
    words = "--model_ema --model_ema_eval --model_ema_decay 0.5 --eval_data_path one=a,two=b"
    lines = finetune(f"{TEN_CROP} {words} --output_dir {tmp_path}")
    assert lines.count("evaluation: 10 views of each image: --tta hflip five_crop") == 1
    stats = json.loads((tmp_path / "log.txt").read_text())
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    for key, ending in ("model", ""), ("model_ema", "_ema"):
        expected = ten_crop_loss(saved, key, 7)
        assert stats[f"test_loss{ending}"] == pytest.approx(expected, rel=1e-5)
        assert stats[f"test_two_loss{ending}"] == stats[f"test_loss{ending}"]
    text = f"loss {stats['test_loss']:.4f} on 7 images in 10 views"
    for own in ("", f"--config {tmp_path}/args.yaml --num_workers 2 --batch_size 2"):
        words = f"--eval --resume {tmp_path} --output_dir none --eval_data_path a"
        lines = finetune(f"{words} {own}")
        assert [line for line in lines if line.endswith(text)]
    lines = finetune(f"--eval --resume {tmp_path / 'checkpoint-0.pth'} --tta none --dist_eval 0")
    (last,) = [line for line in lines if line.endswith(" on 7 images")]
    plain = float(last.partition(" loss ")[2].split()[0])
    assert abs(plain - stats["test_loss"]) > 0.01


def test_resumed_run_keeps_its_views_and_a_new_one_does_not(tmp_path):
    """The best metric of a run would be compared with values of another kind."""
    finetune(f"{TEN_CROP} --output_dir {tmp_path}")
    views = "evaluation: 10 views of each image: --tta hflip five_crop"
    assert views in finetune(f"--epochs 2 --output_dir {tmp_path}")
    assert views not in finetune(f"--finetune {tmp_path} --output_dir none")


def test_views_of_another_size_than_that_of_the_run_are_checked_before_the_data(tmp_path):
    """Sizes and --crop_pct come from the checkpoint."""
    finetune(f"--output_dir {tmp_path}")
    words = f"--eval --resume {tmp_path} --data_set tests.test_tta:untouched"
    for own, message in (
        ("--tta five_crop", "resized to --input_size 16 16, which leaves no corners"),
        ("--tta five_crop --crop_pct 1", "--input_size 16 16 by --crop_pct 1, which"),
        ("--tta rot90 --input_size 16 24", "needs square images, got --input_size 16 24"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(f"{words} {own}")


def untouched(data_path: str, train: bool) -> None:
    raise AssertionError("the data was read")


class Batches(list):
    """Batches as a loader with views has them."""

    views = Views(["hflip", "five_crop"])


class Linear(torch.nn.Module):
    """The left pixels of the first row; flips change its outputs."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :3]


def batch_of(crops: int = 5) -> tuple[torch.Tensor, ...]:
    images = torch.randn(4, 3, crops * 6, 6, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([0, 1, 2, 1]), torch.arange(4)


def test_hooks_get_the_center_crops_and_the_mean_outputs(monkeypatch):
    seen = []
    monkeypatch.setattr(Reporter, "after_evaluated", lambda self, batch: seen.append(batch))
    images, labels, ids = batch_of()
    engine_finetune.evaluate(Batches([(images, labels, ids)]), Linear(), CPU, "none")
    (batch,) = seen
    assert torch.equal(batch.images, images[:, :, :6])
    both = images[:, 0, ::6, :3] + images[:, 0, ::6].flip(2)[..., :3]
    torch.testing.assert_close(batch.outputs, both.mean(1) / 2)


def test_network_that_flips_do_not_change_has_the_same_metrics():
    class Pooled(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    batches = Batches([batch_of(1)])
    batches.views = Views(["hflip", "vflip", "rot90"])
    found = engine_finetune.evaluate(batches, Pooled(), CPU, "none")
    alone = engine_finetune.evaluate([batch_of(1)], Pooled(), CPU, "none")
    assert found == pytest.approx(alone, rel=1e-5)
    assert found["acc1"] == alone["acc1"]


def test_numbers_are_averaged_before_errors_are_measured():
    """Outputs 1 and 3 of two views: the mean is right, though each of them is wrong."""
    images = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).view(2, 1, 1, 2)
    targets = torch.tensor([[2.0], [2.5]])
    batches = Batches([(images, targets, torch.arange(2))])
    batches.views = Views(["hflip"])
    metrics = Metrics(["mae"], None, 1, "number", Scale((10.0,), (4.0,)))
    model = torch.nn.Sequential(torch.nn.Flatten(), First())
    criterion = Criterion("l2", kind="number")
    stats = engine_finetune.evaluate(batches, model, CPU, "none", criterion, metrics)
    assert stats["mae"] == pytest.approx((0 + 0.5 * 4) / 2)  # in units of the data


class First(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :1]


def test_training_images_have_one_view():
    """They would be stacked, five times as high."""
    args = options.parse(options.finetune_parser(), f"{TINY} {TEN_CROP}".split())
    train, val, _ = datasets.build_datasets(args)
    assert (train[0, 0][0].shape, val[0, 0][0].shape) == ((3, 16, 16), (3, 80, 16))
    parts = [(train, True), (val, False)]
    counts = [datasets.build_loader(*part, args, "cpu").views.count for part in parts]
    assert counts == [1, 10]
