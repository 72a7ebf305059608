# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Pack images of any source into tar shards with their labels, resized if asked, and verify them.

python pack.py labeled packed --size 256
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from config import parser as options
from config import tool_flags
from config.flags import as_typed
from config.tool_flags import size_text

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported
    parser = options.pack_parser()
    args = parser.parse_args()
    for problem in tool_flags.pack_problems(args, vars(parser.parse_args([args.source]))):
        parser.error(problem)

import numpy as np

import datasets
from config.tasks import known_kind
from data_loading import packs
from data_loading.bad_images import as_lines
from data_loading.dataset import Replacement
from data_loading.encode import Encoded, EncodedImages, Encoding
from data_loading.files import Names
from data_loading.labels import class_names
from data_loading.mixed import Listed, reading_order
from data_loading.pack_writer import RECORDS, TEXT, PartWriter, member_names
from data_loading.sources import DatasetSpec
from data_loading.split import list_values
from data_loading.tar_headers import BLOCK
from data_loading.targets import check_label, check_row
from data_loading.workers import WatchedLoader
from errors import UserError, first_few, format_bytes, plural
from parallel.process_group import get_logger, get_world_size, init_distributed_mode, launch
from training.run_lock import NAME as LOCK
from training.run_lock import acquire_run_lock
from utils import write_atomically

BATCH = 16  # images that a process reads at a time
SAMPLES = 100  # images that are encoded to estimate the size of the pack
BAD = "bad_images.txt"  # in the pack: names and reasons of images that are left out
MOST_CLASSES = 2**31
MARGIN = 1.02  # of the estimated size: lists, and what the estimate lacks


def main(args: argparse.Namespace) -> None:
    """Pack SOURCE into DEST, and verify DEST; with --verify alone verify SOURCE."""
    init_distributed_mode("cpu")
    if get_world_size() > 1:
        raise UserError("pack.py is one program; start it without torchrun, with --num_workers")
    try:
        if args.dest is None:
            verify(os.path.expanduser(args.source), args.num_workers)
        else:
            pack(args, Path(args.dest).expanduser())
    except KeyboardInterrupt:
        get_logger().warning("interrupted; finished shards are kept, the same command continues")
        sys.exit(130)


def pack(args: argparse.Namespace, dest: Path) -> None:
    """Pack SOURCE into DEST unless that is done, and verify it if asked."""
    check_place(args, dest)
    parts = open_parts(args)
    plan = make_plan(parts, args)
    if is_finished(dest, plan):
        get_logger().info("%s: the pack is finished; nothing to do", dest)
    else:
        pack_all(dest, parts, plan, args)
    if args.verify:
        verify(str(dest), args.num_workers)


# --- what to pack ---------------------------------------------------------------------------------


def check_place(args: argparse.Namespace, dest: Path) -> None:
    """Raise UserError if DEST holds something else than a pack, or lies in SOURCE."""
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file; give a folder for the pack")
    known = {RECORDS, LOCK}
    names = {entry.name for entry in os.scandir(dest)} - known if dest.is_dir() else set()
    if names and not packs.is_pack(str(dest)):
        raise UserError(
            f"{dest} holds other files ({first_few(sorted(names))}) and no pack; give a new folder"
        )
    source = os.path.realpath(os.path.expanduser(args.source))
    if os.path.isdir(source) and os.path.realpath(dest).startswith(f"{source}{os.sep}"):
        raise UserError(f"{dest} lies in {args.source}, which is packed; give a folder elsewhere")


def open_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the data sets to pack, by the name of their part in the pack."""
    wanted = ("train", "val") if args.part == "all" else (args.part,)
    first = open_part(args, wanted[0])
    if isinstance(first, Listed) and not first.own_split:
        return {packs.WHOLE: first}
    return {wanted[0]: first, **{name: open_part(args, name) for name in wanted[1:]}}


def open_part(args: argparse.Namespace, name: str) -> Any:
    """Open the data set of SOURCE for training or evaluation, with labels unless --unlabeled."""
    train, labeled = name == "train", not (args.unlabeled or args.data_set == "folder")

    def create(labeled: bool) -> Any:
        columns = datasets.build_columns(args, args.label_column, args.weight_column, train)
        spec = DatasetSpec(
            args.source,
            kind=known_kind(vars(args)),
            columns=columns,
            labeled=labeled,
            skip_missing=args.on_bad_image == "skip",
            shuffled=False,
        )
        return datasets.create_dataset(args.data_set, spec, train)

    try:
        return create(labeled)
    except UserError as error:
        text, hint = str(error).replace("--data_path ", "SOURCE "), ""
        if not train and ("--eval_data_path" in text or "--val_split" in text):  # of other scripts
            text = f"{text.partition('; ')[0]}; give what holds these images as SOURCE"
        if args.part == "all" and not train:
            hint = "; or pack the training images alone: --part train"
        elif labeled and can_open(create):
            hint = "; or pack the images without labels: --unlabeled"
        raise UserError(f"{text}{hint}") from error


def can_open(create: Any) -> bool:
    """Return True if a source opens without labels."""
    try:
        create(False)
    except UserError:
        return False
    return True


def make_plan(parts: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the content of a pack, as plain values."""
    plan: dict[str, Any] = {
        **asdict(build_encoding(args)),
        "shard_size": size_text(*args.shard_size),
    }
    plan |= {"on_bad_image": args.on_bad_image, "unlabeled": args.unlabeled}
    plan["label_files"] = args.label_files
    plan["parts"] = {}
    for part, data in parts.items():
        about: dict[str, Any] = {"images": len(data), "classes": class_names(data)}
        if isinstance(data, Listed):
            about["names"] = zlib.crc32(b"\0".join(data.encoded_names()))
            for name in ("targets", "weights"):
                values = getattr(data, name)
                about[name] = None if values is None else zlib.crc32(np.ascontiguousarray(values))
        plan["parts"][part] = about
    return json.loads(json.dumps(plan))


def as_flag(value: Any) -> str:
    """Return the value of a flag as it is typed, `none` for one that is not given."""
    return "none" if value is None else as_typed(value)


def is_finished(dest: Path, plan: Mapping[str, Any]) -> bool:
    """Return True if DEST is a finished pack; UserError if it is one of something else."""
    if not packs.is_pack(str(dest)):
        return False
    try:
        held = json.loads((dest / packs.NAME).read_bytes())
        old, finished = held["plan"], bool(held["parts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{dest / packs.NAME} is damaged ({error}); {packs.REMEDY}") from error
    different = [n for n in plan if n != "parts" and plan[n] != old.get(n)]
    if old.get("on_bad_image") == "error":  # none was left out, so `skip` may continue it
        different = [n for n in different if n != "on_bad_image"]
    if different:
        found = [f"--{n} {as_flag(old.get(n))} (now {as_flag(plan[n])})" for n in different]
        raise UserError(
            f"{dest} was begun with other flags: {first_few(found)}; give the same, or another DEST"
        )
    if plan["parts"] != old["parts"]:
        raise UserError(
            f"{dest} was begun with other images, names or labels than the source has now "
            f"({describe(plan['parts'])}); give another DEST, or delete it"
        )
    return finished


# --- packing --------------------------------------------------------------------------------------


class PartJob:
    """A part of a pack: the images of `data` that are written, each once, and their labels."""

    def __init__(self, dest: Path, part: str, data: Any, args: argparse.Namespace) -> None:
        self.data, self.part, self.is_listed = data, part, isinstance(data, Listed)
        encoding = build_encoding(args)
        on_bad = {"error": "error", "skip": "leave out"}[args.on_bad_image]
        self.images = EncodedImages(data, encoding, on_bad)
        self.kind = None if args.unlabeled else getattr(data, "kind", None)
        if not (self.is_listed or args.unlabeled):
            self.kind = self.kind or known_kind(vars(args)) or "class"
        self.classes = class_names(data)
        self.first = first_of_each(data)
        order = reading_order(data)
        self.numbers = order[self.first[order] == order]  # to write; the writer counts in these
        names = data.encoded_names() if self.is_listed else [b"%08d" % n for n in range(len(data))]
        self.names = Names.pack(names)
        own = [names[n] for n in self.numbers]
        self.has_files = args.label_files
        by_stem = args.size is not None or args.label_files
        self.members = member_names(own, by_stem, dots=not args.label_files)
        self.writer = PartWriter(dest, part, args.shard_size)

    @property
    def rest(self) -> np.ndarray:
        """Numbers of the images that are in no finished shard."""
        return self.numbers[self.writer.next :]

    def estimate(self) -> int:
        """Return the bytes that the rest takes, estimated by some images spread over it."""
        rest = self.rest
        if not len(rest):
            return 0
        chosen = rest[np.unique(np.linspace(0, len(rest) - 1, SAMPLES).astype(int))]
        items = [self.images[0, int(number)] for number in chosen]
        sizes = [len(self._read(item).content) for item in items if not is_bad(item)]
        more = 3 if self.has_files else 1  # a header, perhaps also a .json file with its own
        blocks = [more + math.ceil(size / BLOCK) for size in sizes]
        return int(MARGIN * BLOCK * np.mean(blocks or [0]) * len(rest))

    def _read(self, item: Any) -> Encoded:
        if isinstance(item, UserError):
            raise item
        return item[0]

    def pack(self, num_workers: int) -> None:
        """Write the shards that are not there yet."""
        from tqdm import tqdm

        rest, done = self.rest, len(self.numbers) - len(self.rest)
        if done and len(rest):
            get_logger().info(
                "%s: continues after image %d of %d", self.part, done, done + len(rest)
            )
        loader = WatchedLoader(self.images, Keys(rest), BATCH, num_workers, collate_fn=list)
        bar = {"desc": self.part, "unit": " images", "dynamic_ncols": True, "disable": None}
        began = time.monotonic()
        with tqdm(total=done + len(rest), initial=done, leave=False, **bar) as shown:
            items = (item for batch in loader for item in batch)
            for place, (number, item) in enumerate(zip(rest.tolist(), items, strict=True)):
                if self._add(done + place, number, item):
                    self._log(done + place, place / (time.monotonic() - began))
                shown.update()
        self.writer.finish(len(self.numbers))

    def _add(self, place: int, number: int, item: Any) -> bool:
        if is_bad(item):
            self.writer.skip(place, item.bad[0][1])
            return False
        image = self._read(item)
        if not self.is_listed:
            image = image._replace(label=self._plain(image.label, number))
        label = self._label_file(number, image.label) if self.has_files else ""
        return self.writer.add(place, self.members[place], image, label)

    def _label_file(self, number: int, label: Any) -> str:
        """Return the label of an image as JSON: its class, its classes, or its numbers by name."""
        label = self.data.targets[number] if self.is_listed else label
        names = self.classes
        if self.kind == "class":
            return json.dumps({"label": names[label] if names else int(label)})
        row = np.asarray(label).reshape(-1).tolist()
        names = names or [str(place) for place in range(len(row))]
        pairs = zip(names, row, strict=True)
        if self.kind == "multi":
            return json.dumps({"labels": [name for name, value in pairs if value]})
        return json.dumps(dict(pairs))

    def _plain(self, label: Any, number: int) -> Any:
        """Return the label of an image as an int, or a list of numbers, to be stored."""
        if self.kind is None:
            return None
        try:
            if self.kind == "class":
                return check_label(label, len(self.classes or ()) or MOST_CLASSES)
            row = np.asarray(label, np.float64).reshape(-1)
            return check_row(row, self.kind, len(self.classes or row)).tolist()
        except (UserError, TypeError, ValueError) as error:
            hint = "; or pack the images without labels: --unlabeled"
            raise UserError(f"{self.images.name_of(number)}: {error}{hint}") from error

    def _log(self, done: int, rate: float) -> None:
        shard, total = self.writer.records[-1]["name"], len(self.numbers)
        left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown time"
        text = "%s finished: %d of %d images, %.0f images/s, %s left"
        get_logger().info(text, shard, done, total, rate, left)

    def named_bad(self) -> dict[str, str]:
        """Return the reasons of bad images by name."""
        found = sorted((int(self.numbers[n]), why) for n, why in self.writer.all_bad().items())
        return {self.images.path_of(n): why for n, why in found}

    def finish(self) -> dict[str, Any]:
        """Write the list of the images; returns what pack.json says of the part."""
        if not self.writer.records:
            raise UserError(f"{self.part}: no image can be used; see {BAD}, and correct the data")
        places = self.writer.places()
        written = self.numbers[places.pop("image")]
        place = np.full(len(self.data), -1, np.int64)
        place[written] = np.arange(len(written))
        place = place[self.first]  # rows of a table with the same image share it
        kept = np.flatnonzero(place >= 0)
        arrays = {name: array[place[kept]] for name, array in places.items()}
        arrays |= {name: array[kept] for name, array in self._values(kept).items()}
        metadata = {"classes": self.classes if self.kind else None, "kind": self.kind}
        if shares := getattr(self.data, "shares", None):
            metadata["shares"] = shares
        names = self.names if len(kept) == len(self.names) else self.names.take(kept)
        return self.writer.finish_part(names, arrays, metadata)

    def _values(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Return labels and weights of all images, as far as there are any."""
        found = {"weights": list_values(self.data, "weights")}
        if self.is_listed and self.kind:
            found["targets"] = self.data.targets
        elif self.kind:
            labels = np.array(self.writer.labels(), np.int64 if self.kind == "class" else float)
            found["targets"] = np.zeros((len(self.data), *labels.shape[1:]), labels.dtype)
            found["targets"][kept] = labels
        return {name: np.asarray(each) for name, each in found.items() if each is not None}


class Keys:
    """The keys (0, number) of some images, for a loader."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, int(number)) for number in self.numbers)


def is_bad(item: Any) -> bool:
    """Return True for an image that --on_bad_image skip leaves out."""
    return isinstance(item, Replacement)


def build_encoding(args: argparse.Namespace) -> Encoding:
    """Return the encoding that the flags ask for."""
    return Encoding(args.size, args.format or "jpeg", args.quality or 90)


def first_of_each(data: Any) -> np.ndarray:
    """Return for each sample the first one with the same image, (N,): rows of a table may share it.

    They have the same name and place, and follow each other, since a list is in order of names.
    """
    first = np.arange(len(data))
    if isinstance(data, Listed):
        names, samples = data.encoded_names(), data.samples
        for number in range(1, len(names)):
            is_same = names[number] == names[number - 1]
            if is_same and samples[number][0] == samples[number - 1][0]:
                first[number] = first[number - 1]
    return first


def pack_all(
    dest: Path, parts: Mapping[str, Any], plan: Mapping[str, Any], args: argparse.Namespace
) -> None:
    """Write the shards of all parts and their lists, and pack.json at the end."""
    jobs = {}
    try:
        lock(dest)
        (dest / RECORDS).mkdir(exist_ok=True)
        jobs = {name: PartJob(dest, name, data, args) for name, data in parts.items()}
        check_space(dest, jobs)
        write_pack(dest, plan, {})
        for job in jobs.values():
            job.pack(args.num_workers)
        bad = [line for job in jobs.values() for line in as_lines(job.named_bad())]
        (dest / BAD).unlink(missing_ok=True)  # of an attempt before the data was corrected
        if bad:
            write_atomically("".join(bad).encode(*TEXT), dest / BAD)
            get_logger().warning("%s left out, see %s", plural(len(bad), "image"), dest / BAD)
        about = {name: job.finish() for name, job in jobs.items()}
        write_pack(dest, plan, about)
        shutil.rmtree(dest / RECORDS)
    except OSError as error:
        raise UserError(
            f"{dest}: cannot write ({error.strerror or error}); free some space or make it "
            "writable, then start again: finished shards are kept"
        ) from error
    finally:
        acquire_run_lock("")  # releases it
    shards = [shard for part in about.values() for shard in part["shards"]]
    size = format_bytes(sum(shard["bytes"] for shard in shards))
    text = "%s: %s in %s, %s; use it as --data_path %s"
    flag = as_typed(str(dest))
    get_logger().info(text, dest, describe(about), plural(len(shards), "shard"), size, flag)


def describe(parts: Mapping[str, Any]) -> str:
    """Return `train: 120 images, val: 30 images`."""
    return ", ".join(f"{name}: {plural(p['images'], 'image')}" for name, p in parts.items())


def write_pack(dest: Path, plan: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Write pack.json; parts: empty as long as the pack is unfinished."""
    content = {"version": packs.VERSION, "plan": plan, "parts": parts}
    write_atomically(json.dumps(content, indent=1), dest / packs.NAME)


def lock(dest: Path) -> None:
    """Create DEST, and make sure that no other process packs into it."""
    try:
        acquire_run_lock(str(dest))
    except UserError as error:
        raise UserError(str(error).replace("--output_dir", "DEST")) from error


def check_space(dest: Path, jobs: Mapping[str, PartJob]) -> None:
    """Raise UserError if the disk has less space than the images take by an estimate."""
    needed, free = sum(job.estimate() for job in jobs.values()), shutil.disk_usage(dest).free
    sizes = f"about {format_bytes(needed)} are needed, {format_bytes(free)} are free"
    if needed > free:
        raise UserError(f"{dest}: {sizes}; choose another disk, or give a smaller --size")
    images = sum(len(job.rest) for job in jobs.values())
    get_logger().info("%s: %s to pack, %s", dest, plural(images, "image"), sizes)


# --- verifying ------------------------------------------------------------------------------------


def verify(folder: str, num_workers: int) -> None:
    """Compare a pack with its checksums and decode its images; UserError that names the faults."""
    from tqdm import tqdm

    if not packs.is_pack(folder):
        raise UserError(f"{folder} is no pack: it has no {packs.NAME}; give the folder of a pack")
    pack = packs.read_pack(folder)
    faults, count = packs.check_lists(folder, pack), 0
    checks = packs.ShardChecks(folder, pack) if not faults else ()
    loader = WatchedLoader(checks, Keys(np.arange(len(checks))), 1, num_workers, collate_fn=list)
    with tqdm(total=len(checks), unit=" shards", leave=False, disable=None) as shown:
        for [(images, found)] in loader if len(checks) else ():
            count, faults = count + images, faults + found
            shown.update()
    if faults:
        raise UserError(
            f"{plural(len(faults), 'fault')} in {folder}: {first_few(faults, 20)}; copy the named "
            "files again, or delete the pack and pack the images again"
        )
    shards = plural(len(checks), "shard")
    get_logger().info("%s: %s in %s are whole", folder, plural(count, "image"), shards)


if __name__ == "__main__":
    launch(main, args)
