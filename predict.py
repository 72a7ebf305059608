# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Predict the classes of images, or numbers, with any checkpoint; evaluate them if labeled.

python predict.py runs/finetune photos --output results.csv
"""

import argparse
import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from config import predict_flags

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported
    parsed = predict_flags.parse()

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

import datasets
from config.paths import absolute, map_sources
from data_loading.dataset import TransformedDataset
from data_loading.inputs import Inputs, image_files, in_input_order
from data_loading.labels import Head, differences, find_outputs, find_positions, order_of_head
from data_loading.loader import DeviceLoader
from data_loading.mixed import MixedImages, refuse_overwriting
from data_loading.sources import TABLES, DatasetSpec
from data_loading.split import Part
from data_loading.targets import Targets
from data_loading.tta import build_views
from data_loading.tuning import Tuner, most_workers
from errors import UserError, plural
from insight.feature_cache import checksum
from insight.predictions import LIKELY, PredictionRecords
from insight.result_files import Parts, Shown, check_place, files_to_write, folder_of
from models.kernels.autotune import autotuner
from parallel.process_group import (
    all_gather,
    broadcast,
    from_main_process,
    gather_rows,
    get_logger,
    get_rank,
    get_world_size,
    is_main_process,
    join_rows,
    launch,
    pack_rows,
)
from training.prediction_eval import Evaluation
from training.run_lock import acquire_run_lock
from training.setup import setup_process
from training.stepper import autocast
from training.trained_model import TrainedModel, load_trained

SHOWN = 20  # images of the table that is printed without --output
PART = 1024  # images that are written at once
LARGEST = 2**24  # numbers of a part that rank 0 gathers, at most, unless a batch has more
TOPK = 5
VERSION = 1  # of the files of parts
IN_PLAN = ("batch_size", "model", "input_size", "crop_pct", "mean", "std", "value_range", "tta")
IN_PLAN += ("imagenet_default_mean_and_std", "compile", "kernels")
SURE = ("", "by ImageNet's names", "by ImageNet's English names")  # matches of class names


def main(parsed: tuple[argparse.Namespace, Any]) -> None:
    """Predict all images of the inputs."""
    args, flags = parsed
    out = Path(args.output) if args.output else None
    if out is not None:
        from_main_process(lambda: check_place(out))
    device, amp = setup_process(flags)
    trained = load_trained(flags, args.checkpoint, device)
    if trained.flags.compile:
        trained.network.compile()
    dataset, labeled = open_inputs(args, trained)
    if out is not None:
        refuse_overwriting(files_to_write(out), dataset, args.checkpoint)
    if labeled and dataset.classes and not trained.head.names:
        trained = replace(trained, names=dataset.classes)  # as the data names them
    if out is None and not labeled and len(dataset) > SHOWN:
        text = "the first %d of %d images; --output results.csv predicts and writes all of them"
        get_logger().info(text, SHOWN, len(dataset))
        dataset.dataset = Part(dataset.dataset, np.arange(SHOWN))
    records = build_records(args, trained, labeled)
    job = PredictionJob(args, trained, records, dataset, device, amp)
    try:
        job.run(out)
    except KeyboardInterrupt:
        if out is None or get_world_size() > 1:
            raise
        get_logger().warning("interrupted; finished parts are kept, the same command continues")
        sys.exit(130)


# --- inputs ---------------------------------------------------------------------------------------


def open_inputs(args: argparse.Namespace, trained: TrainedModel) -> tuple[TransformedDataset, bool]:
    """Return the images in the order of the inputs, and True if they have labels to use."""
    paths = args.input
    if paths == [predict_flags.PLACE]:
        paths = read_paths()
        data = in_input_order(MixedImages([image_files(paths)]))
        if args.labels == "true":
            raise UserError("--labels true: paths on standard input have no labels; give a table")
        return transformed(data, trained, None), False
    labeled, reason = find_labeled(args, trained) if args.labels != "false" else (None, "")
    if labeled is not None:
        return labeled, True
    data = in_input_order(open_images(args, trained, labeled=False))
    if reason:
        get_logger().info("predictions alone, no evaluation: %s", reason)
    return transformed(data, trained, None), False


def find_labeled(
    args: argparse.Namespace, trained: TrainedModel
) -> tuple[TransformedDataset | None, str]:
    """Return the inputs with labels; None and why, with --labels auto, if these cannot be used."""
    must = args.labels == "true"
    try:
        data = open_images(args, trained, labeled=True)
    except UserError as error:
        if must:
            raise
        has_table = any(path.lower().endswith(TABLES) for path in args.input)
        return None, str(error) if has_table else ""  # other images need not have labels
    try:
        return with_labels(data, trained, must), ""
    except UserError as error:
        if must:
            raise
        return None, str(error)


def read_paths() -> list[str]:
    """Return the paths on standard input of rank 0, one a line."""

    def read() -> list[str]:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
        return [line for line in lines if line]

    paths = broadcast(read() if is_main_process() else None)
    if not paths:
        raise UserError("INPUT -: standard input names no image; give one path per line")
    return paths


def open_images(args: argparse.Namespace, trained: TrainedModel, labeled: bool) -> MixedImages:
    """Open all inputs; they have the labels of the checkpoint's task, or none."""
    flags = trained.flags
    labels = flags.label_column if labeled else ()
    columns = datasets.build_columns(flags, labels, flags.weight_column, is_train=False)
    spec = DatasetSpec(
        kind=trained.kind, columns=columns, labeled=labeled, skip_missing=True, shuffled=False
    )
    with datasets.naming_source(flags, trained.head):
        inputs = Inputs(spec, "image_folder", args.split == "train", "INPUT", is_own=True)
        data = inputs.open(args.input)
    datasets.check_columns(data, flags)
    return data


def with_labels(data: MixedImages, trained: TrainedModel, must: bool) -> TransformedDataset:
    """Return images with labels as outputs of the checkpoint; UserError if they do not fit.

    must: also match classes by number or position.
    """
    if data.kind != trained.kind:
        raise UserError(f"the labels are of another task than {trained.weights.path} has")
    names, head = data.classes, trained.head
    if trained.kind == "number":
        return transformed(in_input_order(data), trained, find_outputs(names, head, "INPUT"))
    order, how = order_of_head(names, head)
    if order is not None and not must and how not in SURE:
        raise UserError(
            f"the classes of INPUT match those of {head.source} only {how}; if that is right, give "
            "--labels true"
        )
    if order is None:
        raise UserError(differences(names, head, "INPUT", advise(names)))
    positions = find_positions(names, head, "INPUT")
    return transformed(in_input_order(data), trained, positions, order)


def advise(names: Sequence[str]) -> str:
    """Return what to give as INPUT, whose classes have these names and are not the checkpoint's."""
    if {"train", "val"} <= set(names):
        return "To evaluate, give its subfolder val, which has a folder for each class"
    return "To evaluate, give images with labels of these classes"


def transformed(
    data: Part,
    trained: TrainedModel,
    positions: list[int] | None,
    order: Sequence[str] | None = None,
) -> TransformedDataset:
    """Return the images as the network takes them; positions: of their labels, None without."""
    flags, count = trained.flags, None if positions is None else trained.head.count
    transform = datasets.build_transform(False, flags)
    dataset = TransformedDataset(
        data, transform, 0, flags.in_chans, count, "leave out", classes=order
    )
    if positions is not None:
        dataset.expect(Targets(trained.kind, count, positions, trained.head.scale))
    return dataset.map_values(flags.value_range)


# --- records --------------------------------------------------------------------------------------


def build_records(
    args: argparse.Namespace, trained: TrainedModel, labeled: bool
) -> PredictionRecords:
    """Return how outputs become results; UserError for flags that the task does not have."""
    path = trained.weights.path
    if args.topk is not None and trained.kind == "number":
        raise UserError(f"--topk is for classes, and {path} predicts numbers; drop it")
    if args.threshold is not None and trained.kind != "multi":
        raise UserError(f"--threshold is for --task multi_label, which {path} is not; drop it")
    head: Head = trained.head
    if (args.topk or 0) > head.count:
        text = "--topk %d: all %d classes of %s are listed"
        get_logger().info(text, args.topk, head.count, path)
    return PredictionRecords(
        trained.kind,
        trained.activation,
        head.count,
        trained.names,
        head.scale,
        args.topk or TOPK,
        args.threshold or LIKELY,
        labeled,
    )


def describe_file(path: str) -> str:
    """Return the size and time of an input that is one file, such as an archive; '' for others."""
    try:
        facts = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return ""
    return f"{facts.st_size} {facts.st_mtime_ns}" if stat.S_ISREG(facts.st_mode) else ""


class Batches(Sampler):
    """Keys (0, position) of every world_size-th batch, from batch number `first` on.

    A batch has the same images for any number of ranks, and after an interruption.
    """

    def __init__(self, length: int, batch_size: int, first: int = 0) -> None:
        self.length, self.batch_size, self.skipped = length, batch_size, 0
        self.numbers = range(-(-length // batch_size))[first + get_rank() :: get_world_size()]

    def positions(self, number: int) -> range:
        """Return the positions of the images of a batch."""
        return range(self.length)[number * self.batch_size : (number + 1) * self.batch_size]

    def skip(self, count: int) -> None:
        """Leave out the next images, a whole number of batches; the length stays as it is."""
        self.skipped += count

    def __len__(self) -> int:
        return sum(len(self.positions(number)) for number in (self.numbers or [])[-1:]) + (
            max(len(self.numbers) - 1, 0) * self.batch_size
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        keys = ((0, place) for number in self.numbers for place in self.positions(number))
        return islice(keys, self.skipped, None)


@dataclass
class PartResults:
    """Results of a rank for a part: rows of numbers, and images that cannot be read."""

    rows: list[Tensor]
    bad: list[tuple[int, str]]  # position, reason


class PredictionJob:
    """Predicts the images of a data set in parts, on all ranks."""

    def __init__(
        self,
        args: argparse.Namespace,
        trained: TrainedModel,
        records: PredictionRecords,
        dataset: TransformedDataset,
        device: torch.device,
        amp: str,
    ) -> None:
        self.args, self.trained, self.records, self.dataset = args, trained, records, dataset
        self.device, self.amp, self.size = device, amp, trained.flags.batch_size
        self.views, labeled = build_views(trained.flags), records.labeled
        self.evaluation = Evaluation(trained, device, args.num_worst) if labeled else None
        self.sends_outputs = labeled or records.kind == "multi"
        count = records.count
        self.widths = [1, 2 * records.listed or count, count * self.sends_outputs]
        self.widths += self.evaluation.widths() if self.evaluation else ()
        most = min(PART, LARGEST // sum(self.widths))
        self.batches = max(1, most // self.size)  # of a part
        self.parts = -(-len(dataset) // (self.batches * self.size))

    def run(self, out: Path | None) -> None:
        """Predict what no finished part holds, and write the results."""
        began = time.monotonic()
        store, state = self.open_store(out)
        first = state["parts"]
        loader = self.build_loader(first * self.batches)
        self.predict(loader, store, first)
        bad = from_main_process(lambda: store.finish(self.parts, self.records.fields))
        seconds = time.monotonic() - began
        new = len(self.dataset) - first * self.batches * self.size
        if out is not None:
            images = plural(f"{len(self.dataset):,}", "image")
            images += f", {bad:,} of them could not be used (see the column error)" * bool(bad)
            get_logger().info("%s: %s, %.0f images/s", out, images, max(new, 0) / seconds)
        elif bad:
            get_logger().warning("%s could not be used", plural(bad, "image"))
        about, is_empty = " ".join(self.args.input), bad == len(self.dataset)
        if self.evaluation is not None and not is_empty:
            self.evaluation.report(out, loader, about)
        acquire_run_lock("")  # releases it
        if is_main_process():
            store.remove()
        if is_empty:
            raise UserError(f"{about}: no image could be used; the column error says why")

    def plan(self) -> dict[str, Any]:
        """Return what decides the results, as plain values."""
        flags, data = vars(self.trained.flags), self.dataset.dataset
        plan: dict[str, Any] = {"version": VERSION, "weights": checksum(self.trained.weights.state)}
        plan["checkpoint"] = absolute(self.trained.weights.path)
        plan["input"] = [map_sources(path, absolute) for path in self.args.input]
        plan["files"] = [describe_file(path) for path in self.args.input]
        plan["image_root"] = absolute(flags["image_root"] or ".")
        names = 0
        for name in data.dataset.encoded_names():
            names = zlib.crc32(name + b"\0", names)
        plan["names"] = zlib.crc32(np.ascontiguousarray(data.indices), names)
        plan |= {"images": len(data), "classes": self.records.names, "topk": self.records.topk}
        plan |= {"threshold": self.records.threshold, "labels": self.records.labeled}
        plan |= {name: flags[name] for name in IN_PLAN}
        plan |= {"amp": self.amp, "device": self.device.type}
        if self.records.labeled:
            targets = np.ascontiguousarray(data.dataset.targets)
            plan |= {"targets": zlib.crc32(targets), "num_worst": self.args.num_worst}
        return plan

    def open_store(self, out: Path | None) -> tuple[Any, dict[str, Any]]:
        """Return where results are written, and the state of the parts that are finished."""
        if out is None:
            return Shown(SHOWN), {"parts": 0}
        store = from_main_process(lambda: Parts(out, self.plan(), self.args.overwrite))
        try:
            acquire_run_lock(str(folder_of(out)))
        except UserError as error:
            raise UserError(str(error).replace("--output_dir", "--output")) from error
        state = from_main_process(store.begin)
        autotuner.restore(state.get("kernels", {}), self.device)
        done = state["parts"]
        if done:
            images = min(done * self.batches * self.size, len(self.dataset))
            get_logger().info("%s: continues after %d of %d images", out, images, len(self.dataset))
        if done and self.evaluation is not None and is_main_process():
            self.evaluation.restore(state["evaluation"], store.rows(done))
        return store, state

    def build_loader(self, first: int) -> DeviceLoader:
        """Build the loader of this rank's batches from batch number `first` on."""
        flags, sampler = self.trained.flags, Batches(len(self.dataset), self.size, first)
        workers = datasets.build_workers(self.dataset, sampler, self.size, flags)
        if flags.num_workers is None:
            workers.tuner = Tuner(most_workers())
        mean_std = datasets.build_mean_and_std(flags)
        return DeviceLoader(workers, self.device, *mean_std, self.views)

    # --- parts ------------------------------------------------------------------------------------

    def predict(self, loader: DeviceLoader, store: Any, first: int) -> None:
        """Predict the parts from `first` on, and write each when all ranks have finished it."""
        sampler, total = loader.loader.sampler, len(self.dataset)
        done = min(first * self.batches * self.size, total)
        numbered = zip(sampler.numbers, loader.pairs(), strict=True)
        groups = groupby(numbered, key=lambda pair: pair[0] // self.batches)
        hidden = None if is_main_process() else True  # None: shown on a terminal
        bar = {"unit": " images", "dynamic_ncols": True, "leave": False, "disable": hidden}
        with tqdm(total=total, initial=done, **bar) as shown:
            waiting = None
            for part in range(first, self.parts):
                waiting = waiting or next(groups, None)
                found = PartResults([], [])
                if waiting is not None and waiting[0] == part:
                    for number, batch in waiting[1]:
                        self.add(found, sampler.positions(number), *batch)
                        shown.update(min(self.size * get_world_size(), total - shown.n))
                    waiting = None
                self.write(part, found, store)

    @torch.inference_mode()
    def add(self, found: PartResults, positions: range, read: tuple, batch: tuple | None) -> None:
        """Predict a batch. read: of `collate`; batch: on the device, None without images."""
        used = set(read[2].tolist())
        unread = [place for place in positions if place not in used]
        found.bad += zip(unread, (reason for _, reason in read[3]), strict=True)
        if batch is None:
            return
        images, labels, ids = batch
        with autocast(self.device, self.amp):
            outputs = self.views.mean_output(self.trained.network, images)
        outputs = outputs.float()
        if outputs.shape != (len(ids), self.records.count):
            got = f"outputs of shape {tuple(outputs.shape)} for {len(ids)} images"
            raise UserError(f"the network gives {got}, expected {self.records.count} for each")
        parts = [ids, self.records.columns(outputs)] + [outputs] * self.sends_outputs
        if self.evaluation is not None:
            parts += [labels, *self.trained.criterion.per_image(outputs, labels)]
        found.rows.append(pack_rows(parts))

    def write(self, part: int, found: PartResults, store: Any) -> None:
        """Gather a part from all ranks and write it on rank 0; every rank must call it."""
        rows = join_rows(found.rows, self.device, sum(self.widths))
        mine = self.records_of(rows.cpu()) | {
            place: self.records.bad(self.dataset.path_of(place), reason)
            for place, reason in found.bad
        }
        lines = all_gather({place: json.dumps(record) for place, record in mine.items()})
        rows = gather_rows(rows) if self.evaluation is not None else None
        from_main_process(lambda: self.store(part, lines, rows, store))

    def store(
        self, part: int, lines: list[dict[int, str]], rows: Tensor | None, store: Any
    ) -> None:
        """Write the records of a part, in order, and the state of the evaluation."""
        found = {place: line for of_rank in lines for place, line in of_rank.items()}
        span = self.batches * self.size
        expected = range(len(self.dataset))[part * span : (part + 1) * span]
        assert sorted(found) == [*expected], "each image has one record"
        state: dict[str, Any] = {"kernels": autotuner.state()}
        lists = None
        if self.evaluation is not None:
            self.evaluate(rows.cpu())
            state["evaluation"], lists = self.evaluation.state(), self.evaluation.new_rows()
        store.write(part, [found[place] for place in expected], state, lists)

    def evaluate(self, rows: Tensor) -> None:
        """Add the rows of a part to the evaluation, batch by batch, in order."""
        rows = rows[rows[:, 0].argsort()]
        numbers = rows[:, 0].long() // self.size
        _, counts = numbers.unique_consecutive(return_counts=True)
        for batch in rows.split(counts.tolist()) if len(rows) else ():
            ids, _, outputs, targets, losses, counted = batch.split(self.widths, 1)
            self.evaluation.add(ids[:, 0], outputs, targets, torch.cat([losses, counted], 1))

    def records_of(self, rows: Tensor) -> dict[int, dict[str, Any]]:
        """Return the records of images by position; rows: of `add`, on the CPU."""
        ids, best, outputs, *labels = rows.split(self.widths, 1)
        places = ids[:, 0].long().tolist()
        pairs = zip(places, self.records.in_units(best).tolist(), outputs.tolist(), strict=True)
        found = {n: self.records.record(self.dataset.path_of(n), *row) for n, *row in pairs}
        if labels:
            targets, losses = self.records.in_units(labels[0]).tolist(), labels[1].sum(1).tolist()
            for place, row, loss in zip(places, targets, losses, strict=True):
                found[place] |= self.records.targets(row, loss)
        return found


if __name__ == "__main__":
    launch(main, parsed)
