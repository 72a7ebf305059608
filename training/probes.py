# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Probes of pre-training: evaluators of frozen features, the network's health, and alarms.

python main_pretrain.py --recipe digits_pretrain --output_dir runs/probed --probe_every 5
"""

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import datasets
from config.calls import Call, accepted, parse_call
from config.run_files import LOG, parse_line, position_of
from data_loading.bad_images import BadImages
from data_loading.loader import DeviceLoader
from data_loading.rng import mask_noise
from errors import UserError, describe_error, first_line, plural, resolve_for
from insight.alarms import find_alarms, without_numbers
from insight.evaluators import EVALUATORS, Labeled, few_labels, take
from insight.features import Features, encoder_of, extract
from insight.health import (
    LayerSums,
    describe_layers,
    grn_sizes,
    layer_sums,
    parameters_by_stage,
    rank_me,
)
from models.fcmae import FCMAE, random_mask, visible_patches
from models.parts import evaluating
from parallel import sharding
from parallel.process_group import (
    all_gather,
    all_reduce_sum,
    broadcast,
    from_main_process,
    get_logger,
    get_rank,
    get_world_size,
    is_main_process,
)
from training.checkpoint import TrainState
from training.evaluation import log_name
from training.probe_data import (
    ProbeData,
    build_probe_data,
    choose,
    describe_held_out,
    open_held_out,
)
from training.stepper import DTYPES, Stepper, autocast

HELD_OUT = 256  # images of the loss on a fixed set, at most
MEASURED = 32  # of them, whose activations are measured
CHUNK = 16  # images at once, since widened features take memory
LABEL_FRACTIONS = {
    "": 1.0,
    "_10pct": 0.1,
    "_1pct": 0.01,
}  # ending of a name -> fraction of the labels
MASKS = 0  # epoch of the masks of the fixed set, which never change
TRIED_S = 3.0  # seconds to measure the speed for a dry run


class Evaluators:
    """The evaluators that --probes names: (train, test, kind) -> values by their names."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.calls: dict[str, tuple[Call, Callable[..., Any]]] = {}
        self.refused: set[tuple[str, str]] = set()  # names and reasons
        for text in texts:
            call = parse_call(text, "--probes")
            make = resolve_for("--probes", call.name, EVALUATORS, "evaluator", importable=True)
            name = f"probe_{log_name(call)}"
            if name in self.calls:
                raise UserError(f"--probes {text}: {name} is given twice; drop one")
            try:
                inspect.signature(make).bind(None, None, "class", *call.args, **call.kwargs)
            except TypeError as error:
                takes = accepted(make, inputs=3)
                raise UserError(f"--probes {call}: {error}; it takes {takes}") from error
            self.calls[name] = call, make

    def run(self, train: Labeled, test: Labeled, kind: str) -> dict[str, float]:
        """Return all values in percent, with few labels too where there are enough images."""
        found = {}
        for ending, fraction in LABEL_FRACTIONS.items():
            for name in self.calls:
                try:
                    part = take(train, few_labels(train.targets, fraction, 0, kind))
                    found |= self._values(name, ending, part, test, kind)
                except UserError as error:
                    self._refuse(name + ending, error, is_expected=bool(ending))
        return found

    def _values(
        self, name: str, ending: str, train: Labeled, test: Labeled, kind: str
    ) -> dict[str, float]:
        call, function = self.calls[name]
        try:
            value = function(train, test, kind, *call.args, **call.kwargs)
            several = value if isinstance(value, Mapping) else {"": value}
            return {name + f"_{key}" * bool(key) + ending: float(x) for key, x in several.items()}
        except UserError as error:
            raise UserError(f"--probes {call}: {error}") from error
        except Exception as error:  # of a user's own
            raise UserError(f"--probes {call}: {describe_error(error)}") from error

    def _refuse(self, name: str, error: UserError, is_expected: bool = True) -> None:
        """Log a reason once; is_expected: such as too few images, and not one of a failure."""
        if (name, str(error)) not in self.refused:
            self.refused.add((name, str(error)))
            level = logging.INFO if is_expected else logging.WARNING
            get_logger().log(level, "probes: no %s: %s", name, error)

    def try_out(self, data: ProbeData, columns: int = 4) -> None:
        """Run them on random features of as many images; UserError if one fails."""
        device, sets = data.loader.device, []
        generator = torch.Generator().manual_seed(0)
        for count in (data.train_count, data.test_count):
            features = torch.randn(count, columns, generator=generator)
            targets = torch.arange(count) % 2
            if data.kind != "class":
                targets = torch.stack([targets, 1 - targets], 1).float()
            sets.append(Labeled(features.to(device), targets.to(device)))
        for name in self.calls:
            self._values(name, "", *sets, data.kind)

    def drop_unfit(self, data: ProbeData) -> None:
        """Drop those that `try_out` refuses, such as 20 neighbors among 10 images, and log it."""
        for name, call in [*self.calls.items()]:
            rest, self.calls = self.calls, {name: call}
            try:
                self.try_out(data)
            except UserError as error:
                rest.pop(name)
                self._refuse(name, error)
            self.calls = rest


def check_probes(args: Any) -> None:
    """Raise UserError, before data is listed, for evaluators that are not known."""
    if vars(args).get("probe_every"):
        Evaluators(args.probes)


class FixedImages:
    """Images with fixed masks, whose loss is followed; some of them for activations too.

    own: the raw training data, which is used if the data has no evaluation images.
    """

    def __init__(self, args: Any, own: Any, device: torch.device) -> None:
        data, self.is_held_out = open_held_out(args, own)
        dataset = datasets.eval_dataset(data, args, "replace")
        self.loader = datasets.build_reader(dataset, args, device)
        self.name = "holdout_loss" if self.is_held_out else "fixed_train_loss"
        count = min(HELD_OUT, max(MEASURED, len(own) // 10), len(data))
        ids = torch.from_numpy(choose(data, count, kind=""))
        self.count = len(ids)
        self.own_ids = ids[get_rank() :: get_world_size()]
        self.measured = len(range(get_rank(), min(MEASURED, len(ids)), get_world_size()))
        self.images: Tensor | None = None  # (n, C, H, W) of own_ids, normalized, on the CPU

    def batches(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's images and their numbers on the device; count: only the first ones.

        The first call reads the images; they stay in memory.
        """
        ids = self.own_ids[:count]
        if not len(ids):
            return
        if self.images is None:
            self.images = self.loader.reload(0, self.own_ids)[0].cpu()
        device = self.loader.device
        for images, numbers in zip(self.images[:count].split(CHUNK), ids.split(CHUNK), strict=True):
            yield images.to(device), numbers.to(device)

    def loss(self, network: FCMAE, amp: str) -> Tensor:
        """(2,) float64 on the CPU: sum of the losses of this rank's images, and their number."""
        total = torch.zeros(2, dtype=torch.float64)
        for images, ids in self.batches():
            h, w = network.grid_size(*images.shape[-2:])
            visible = visible_patches(h * w, network.mask_ratio)
            mask = random_mask(mask_noise(0, MASKS, ids, h * w), visible)
            with autocast(images.device, amp):
                loss = network.forward(images, mask, visible)[0]  # without --compile
            total += torch.tensor([loss.item() * len(images), len(images)], dtype=torch.float64)
        return total

    def layers(self, network: FCMAE, amp: str) -> LayerSums | None:
        """Return sums of the activations of the first images; None on a rank without any."""
        total = None
        for images, _ in self.batches(self.measured):
            with autocast(images.device, amp):
                own = layer_sums(network, images)
            total = own if total is None else total + own
        return total


class Probes:
    """Measure a network every `--probe_every` epochs, without an effect on what it trains."""

    def __init__(self, args: Any, own: Any, model: nn.Module, stepper: Stepper) -> None:
        """own: the raw training data. Every rank must create it."""
        self.every, self.epochs = args.probe_every, args.epochs
        self.stepper, self.stages = stepper, parameters_by_stage(model)
        self.evaluators = Evaluators(args.probes)
        self.fixed = FixedImages(args, own, stepper.device)
        self.data: ProbeData | None = None
        try:
            encoder_of(model)
            self.data = build_probe_data(args, own, stepper.device)
        except UserError as error:
            if args.probe_data or args.probe_label_column:
                raise
            get_logger().info("probes: no features: %s", error)
        self.bad_images = BadImages(None, self.loader, self.fixed.loader)
        if self.data is not None and self.data.kind:
            own = "probes" in getattr(args, "typed", ())
            (self.evaluators.try_out if own else self.evaluators.drop_unfit)(self.data)
        held = describe_held_out(self.fixed.count, self.fixed.is_held_out)
        times = f"after epoch 1, every {self.every} epochs and at the end"
        times = "after every epoch" if self.every == 1 else times
        get_logger().info("probes: %s; %s", held, times)
        stepper.watched = [*self.stages.values()]
        self.history: list[dict[str, Any]] | None = None  # of the epochs before, on rank 0

    @property
    def loader(self) -> DeviceLoader | None:
        """The loader of the images whose features are probed."""
        return self.data and self.data.loader

    def is_due(self, state: TrainState) -> bool:
        """Return True if the network is probed after the epoch, or part of one, that just ended."""
        epoch = state.position
        if epoch == 0 or not state.at_phase_end:
            return False
        is_end = epoch >= self.epochs or state.samples_in_epoch > 0
        return is_end or epoch == 1 or epoch % self.every == 0

    def after_epoch(
        self, model: nn.Module, state: TrainState, stats: Mapping[str, Any], folder: Path | None
    ) -> dict[str, Any]:
        """Return `stats` of an epoch with values of a probe, if one is due, and alarms.

        folder: of log.txt, with the epochs before. Every rank must call it.
        """
        values = self.measure(model, state) if self.is_due(state) else {}
        return broadcast(self._with_alarms(state, {**stats, **values}, folder))

    # --- a probe ----------------------------------------------------------------------------------

    def measure(self, model: nn.Module, state: TrainState) -> dict[str, Any]:
        """Probe the network, and return the values; every rank must call it."""
        start, found = time.perf_counter(), {}
        with _buffers_of_rank_0(model):
            if self.data is not None:
                dtype = DTYPES.get(self.stepper.amp)
                features = extract(model, self.data.loader, self.stepper.device, dtype)
                found = from_main_process(partial(self.score, features))
            with torch.no_grad(), sharding.unsharded(model) as network, evaluating(network):
                found |= self._health(network)
        found |= self._steps(state)
        self.bad_images.write()
        shown = "  ".join(f"{name} {x:.4g}" for name, x in found.items() if is_shown(name))
        get_logger().info("probe: %s (%.1f s)", shown, time.perf_counter() - start)
        return found

    def score(self, found: Features) -> dict[str, Any]:
        """Return the scores and the rank of features."""
        if not found.features.isfinite().all():
            return {"features_finite": False}
        values, scores = {}, {}
        try:
            values["rank_me"] = rank_me(found.features)
            if self.data.kind:
                first = found.ids < self.data.train_count
                labeled = Labeled(found.features, found.labels)
                sets = [take(labeled, places) for places in (first, ~first)]
                scores = self.evaluators.run(*sets, self.data.kind)
        except (UserError, RuntimeError) as error:  # such as of memory
            text = "probes: not all values after this epoch: %s; the run continues"
            get_logger().warning(text, first_line(error))
        return scores | values

    def _health(self, network: FCMAE) -> dict[str, Any]:
        """Return the loss on the fixed set and measures of activations and GRN."""
        amp = self.stepper.amp
        layers = self.fixed.layers(network, amp) if self.data is not None else None
        loss, layers = _sum_over_ranks(self.fixed.loss(network, amp), layers, self.stepper.device)
        values = {self.fixed.name: (loss[0] / loss[1]).item()}
        if layers.stages:
            values |= describe_layers(layers) | grn_sizes(network)
        return values

    def seconds_per_epoch(self, model: nn.Module) -> float:
        """Measure the speed of a part of a probe, and log the time of a whole one.

        For a dry run; every rank must call it.
        """
        seconds, images = broadcast(self._estimate(model))
        times = len({1, *range(self.every, int(self.epochs) + 1, self.every), self.epochs})
        each = timedelta(seconds=max(1, round(seconds)))
        text = "%-12s about %s each, of %d images, %s in the run"
        get_logger().info(text, "probes", each, images, plural(times, "time"))
        return seconds * times / self.epochs

    def _estimate(self, model: nn.Module) -> tuple[float, int]:
        """Return the seconds and the images of a probe, on rank 0."""
        device, start = self.stepper.device, time.perf_counter()
        if self.data is None:
            with torch.no_grad(), sharding.unsharded(model) as network, evaluating(network):
                self.fixed.loss(network, self.stepper.amp)
            return time.perf_counter() - start, self.fixed.count
        batches = _some(self.data.loader, TRIED_S)
        tried = extract(model, batches, device, DTYPES.get(self.stepper.amp))
        if tried is None:
            return 0.0, 0
        each = (time.perf_counter() - start) / len(tried.ids)
        images, start = self.data.train_count + self.data.test_count, time.perf_counter()
        if self.data.kind:
            self.evaluators.try_out(self.data, tried.features.shape[1])
        scoring = time.perf_counter() - start
        return each * (images + self.fixed.count + 2 * MEASURED) + scoring, images

    def _steps(self, state: TrainState) -> dict[str, float]:
        """Return gradient norms of the last step, and skipped steps since the last probe."""
        names = [f"grad_norm_{name}" for name in self.stages]
        found = dict(zip(names, state.probed.get("norms", ()), strict=False))  # none before a step
        before, now = state.probed.get("steps", [0, 0]), [state.global_step, state.bad_steps]
        state.probed["steps"] = now
        steps, bad = now[0] - before[0], now[1] - before[1]
        return found | ({"skipped_steps": 100 * max(bad, 0) / steps} if steps > 0 else {})

    # --- alarms -----------------------------------------------------------------------------------

    def _with_alarms(
        self, state: TrainState, stats: dict[str, Any], folder: Path | None
    ) -> dict[str, Any]:
        """Return `stats` with the alarms of this epoch; new ones are logged as warnings."""
        if not is_main_process():
            return stats
        if self.history is None:
            self.history = read_history(folder, state.position)
        last = (self.history or [{}])[-1].get("alarms", ())
        before = {without_numbers(text) for text in last}
        alarms = find_alarms([*self.history, stats])
        for text in alarms:
            if without_numbers(text) not in before:
                get_logger().warning("alarm after epoch %g: %s", state.position, text)
        stats = stats | ({"alarms": alarms} if alarms else {})
        self.history.append(stats)
        return stats


def _some(batches: Iterable[tuple[Tensor, ...]], seconds: float) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches until the time is up, one at least."""
    start = time.perf_counter()
    for batch in batches:
        yield batch
        if time.perf_counter() - start > seconds:
            return


def is_shown(name: str) -> bool:
    """Return True for the values of a probe that its log line shows."""
    return name in ("rank_me", "holdout_loss", "fixed_train_loss", "feature_distance") or (
        name.startswith("probe_") and not name.endswith("pct")
    )


def read_history(folder: Path | None, position: float) -> list[dict[str, Any]]:
    """Return the values of log.txt of the epochs before `position`, [] without a file."""
    path = folder and folder / LOG
    if path is None or not path.exists():
        return []
    rows = map(parse_line, path.read_bytes().splitlines())
    return [row for row in rows if position_of(row) < position]


@contextlib.contextmanager
def _buffers_of_rank_0(model: nn.Module) -> Iterator[None]:
    """Give all ranks the buffers of rank 0, such as BatchNorm's statistics, and take them back."""
    buffers = [*model.buffers()] if get_world_size() > 1 else []
    before = [buffer.clone() for buffer in buffers]
    sharding.broadcast_tensors(buffers)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in zip(buffers, before, strict=True):
                buffer.copy_(values)


def _sum_over_ranks(
    loss: Tensor, layers: LayerSums | None, device: torch.device
) -> tuple[Tensor, LayerSums]:
    """Add the sums of all ranks, of which some may have no images."""
    own = layers or LayerSums((), ())
    known = all_gather([(stage, len(x)) for stage, x in zip(*own, strict=True)])
    shapes = next(filter(None, known), [])
    values = [x.cpu().double() for x in own.values]
    values = values or [torch.zeros(length, dtype=torch.float64) for _, length in shapes]
    joined = torch.cat([loss, *values])
    if get_world_size() > 1:  # not on MPS, which lacks float64
        joined = all_reduce_sum(joined.to(device)).cpu()
    sums = joined[len(loss) :].split([length for _, length in shapes])
    return joined[: len(loss)], LayerSums([stage for stage, _ in shapes], sums)


def build_probes(args: Any, own: Any, model: nn.Module, stepper: Stepper) -> Probes | None:
    """Build the probes that the flags describe, None for `--probe_every 0`."""
    return Probes(args, own, model, stepper) if args.probe_every else None
