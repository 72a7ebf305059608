# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Seconds of the evaluators of frozen features: all labels, 10% and 1% of them.

python benchmarks/probe_speed.py --train 20000 --test 4000 --columns 320

Features are random numbers around a center for each class, so the scores mean nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from insight.evaluators import EVALUATORS, Labeled, few_labels, take

LABEL_FRACTIONS = (1.0, 0.1, 0.01)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=20_000, help="images to learn from")
    parser.add_argument("--test", type=int, default=4_000, help="images to score")
    parser.add_argument("--columns", type=int, default=320, help="features of an image")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="the fastest is printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(words)


def make_features(args: argparse.Namespace) -> tuple[Labeled, Labeled]:
    """Return the same features for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(args.classes, args.columns, generator=generator)
    sets = []
    for images in (args.train, args.test):
        labels = torch.randint(args.classes, (images,), generator=generator)
        noise = torch.randn(images, args.columns, generator=generator)
        features = noise + 0.3 * centers[labels]
        sets.append(Labeled(features.to(args.device), labels.to(args.device)))
    return sets[0], sets[1]


def main(args: argparse.Namespace) -> None:
    """Print a table of seconds."""
    torch.set_num_threads(args.threads)
    train, test = make_features(args)
    print(f"{args.train} x {args.test} x {args.columns}, {args.classes} classes, {args.device}")
    print("| evaluator | labels | s | score |\n|---|---|---|---|")
    for name, evaluate in EVALUATORS.items():
        for fraction in LABEL_FRACTIONS:
            own = take(train, few_labels(train.targets, fraction, seed=0))
            seconds = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                found = evaluate(own, test)  # a number of the host
                seconds.append(time.perf_counter() - start)
            print(f"| {name} | {fraction:.0%} | {min(seconds):.2f} | {found:.1f} |")


if __name__ == "__main__":
    main(parse_args())
