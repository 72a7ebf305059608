# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Runs with heads: training, evaluation and export take the heads that the checkpoint stores.

python -m pytest tests/test_heads_in_runs.py
"""

import json
from pathlib import Path

import pytest
import torch

import export
import main_finetune
from config import parser as options
from parallel.process_group import get_logger
from training import run_lock

TINY = "--data_set tests.tiny:colors --data_path here --input_size 16 --batch_size 13 --device cpu "
TINY += "--num_workers 0 --log_dir none --model resnet(num_blocks=[1,1,1,1]) --lr 0.001"
HEADS = "main=conv(pool=1)@layer3,aux=linear(planes=4)@layer2"


def run(words: str, **more: str) -> None:
    parser = options.finetune_parser()
    extra = [word for flag, value in more.items() for word in (f"--{flag}", value)]
    try:
        main_finetune.main(options.parse(parser, [*f"{TINY} {words}".split(), *extra]))
    finally:
        run_lock.acquire_run_lock("")


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_heads_are_trained_resumed_evaluated_and_exported(tmp_path, caplog):
    loss = "main=ce, aux=0.5*bce"
    run(f"--output_dir {tmp_path}/two --epochs 1 --sched constant(1)", heads=HEADS, loss=loss)
    run(f"--output_dir {tmp_path}/two --epochs 2 --sched constant(1)", heads=HEADS, loss=loss)
    run(f"--output_dir {tmp_path}/one --epochs 2 --sched constant(1)", heads=HEADS, loss=loss)
    states = [
        torch.load(tmp_path / name / "checkpoint-1.pth", weights_only=True)["model"]
        for name in ("one", "two")
    ]
    assert any(name.startswith("named_heads.aux.") for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logged = log_of(tmp_path / "one")[-1]
    logger = get_logger()
    logger.addHandler(caplog.handler)
    try:
        run(f"--eval true --resume {tmp_path}/one/checkpoint-1.pth")  # without --heads
    finally:
        logger.removeHandler(caplog.handler)
    assert f"loss {logged['test_loss']:.4f}"[:9] in caplog.text
    words = [f"{tmp_path}/one", "--to", "torchscript", "--output", f"{tmp_path}/one.pt"]
    export.main(options.export_parser().parse_args(words))  # which compares the outputs
    assert torch.jit.load(f"{tmp_path}/one.pt")(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.slow
def test_other_formats_refuse_other_heads(tmp_path):
    run(f"--output_dir {tmp_path}/run --epochs 1", head="mlp(4)")
    words = [f"{tmp_path}/run", "--to", "timm", "--output", f"{tmp_path}/x.safetensors"]
    with pytest.raises(ValueError, match="--to timm is for a linear classifier; use one of onnx"):
        export.main(options.export_parser().parse_args(words))
