# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Learning rate, weight decay and other options of the optimizer as functions of progress.

python -c "from training.schedules import Curve; print(Curve('cosine(1,0)', '--sched', 10)(0.5))"
"""

import bisect
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from config.calls import Call, accepted, fail_at, parse_sum
from config.flags import is_pretraining
from errors import UserError, plural, resolve, resolve_for
from optim_factory import BOUNDED, INITIAL_STD, check_values
from parallel import sharding
from parallel.process_group import get_logger
from training.steps import Steps

EPSILON = 1e-6  # added to the progress, so that rounding does not miss a border
WORDS = {word: word for word in ("rescaled", "fixed", "step", "epoch")}  # in [ ], with the length
BETAS = ("beta1", "beta2", "beta3")
RANGES = {"lr": (0, math.inf), "weight_decay": (0, math.inf), "momentum": (0, 1)}
RANGES |= dict.fromkeys(BETAS, (0, 1)) | {"eps": (1e-30, math.inf)}
INTERNAL = ("lr", "max_lr_snapshot")  # numbers that are set by schedules, or by timm itself
CHECKED_AT = [step / 1000 for step in range(1000)]  # progress at which values are checked


# --- schedules by name: functions of the progress w, in [0, 1), and of their arguments -----------


def constant(w: float, value: float) -> float:
    """The same value in all steps."""
    return value


def linear(w: float, start: float, end: float) -> float:
    """A straight line from `start` to `end`."""
    return end * w + start * (1 - w)


def cosine(w: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, also upwards."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * w))


def polynomial(w: float, base: float, power: float) -> float:
    """From `base` to 0, as (1 - w)^power."""
    return base * (1 - w) ** power


def exponential(w: float, start: float, decay: float) -> float:
    """From `start` to `start * decay`, by the same factor in every step."""
    return start * decay**w


def step(w: float, *values: float) -> float:
    """Each value for an equal part of the run."""
    if not values:
        raise ValueError("got no value")
    return values[min(math.floor((w + EPSILON) * len(values)), len(values) - 1)]


def multistep(w: float, *values: float, milestones: Any = None, epochs: float) -> float:
    """The next value from each milestone on, an epoch; by default in parts of equal length."""
    if not values:
        raise ValueError("got no value")
    if not isinstance(milestones, list | tuple | None):
        raise ValueError(f"milestones is {milestones!r}, expected a list such as [3, 6]")
    if milestones is None:
        width = math.ceil(epochs / len(values))
        milestones = [width * number for number in range(1, len(values))]
    if len(milestones) != len(values) - 1 or sorted(milestones) != list(milestones):
        expected = plural(len(values) - 1, "milestone")
        raise ValueError(f"{plural(len(values), 'value')} need {expected} in ascending order")
    return values[bisect.bisect_right(milestones, math.floor((w + EPSILON) * epochs))]


def step_with_fixed_gamma(w: float, base: float, gamma: float, num_decays: int) -> float:
    """`base`, multiplied by `gamma` `num_decays` times, at equal distances."""
    if type(num_decays) is not int or num_decays < 0:
        raise ValueError(f"num_decays is {num_decays!r}, expected an integer of at least 0")
    return base * gamma ** min(math.floor((w + EPSILON) * (num_decays + 1)), num_decays)


def wsd(
    w: float, warmup: float, decay: float, start: float = 0.0, peak: float = 1.0, end: float = 0.0
) -> float:
    """Linear warm-up, a stable part, linear decay; `warmup` and `decay` are parts of the run."""
    if min(warmup, decay) < 0 or warmup + decay > 1:
        raise ValueError("warmup and decay are fractions of the run, with a sum of at most 1")
    if w < warmup:
        return linear(w / warmup, start, peak)
    return peak if w <= 1 - decay else linear((w - (1 - decay)) / decay, peak, end)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "exponential": exponential,
    "step": step,
    "multistep": multistep,
    "step_with_fixed_gamma": step_with_fixed_gamma,
    "wsd": wsd,
}
BY_EPOCH = ("constant", "step", "multistep")  # change at the end of an epoch unless `[step]` asks


# --- schedules as text -----------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A part of a schedule: a function of the progress, for a fraction `length` of the run."""

    function: Callable[[float], float]
    length: float
    words: frozenset[str]  # of WORDS
    place: int  # of its name in the text


class Curve:
    """A schedule written as text, such as `linear(0,1)[0.1] + cosine(1,0)[0.9]`.

    It is called with the progress w: 0 at the first optimizer step, (N - 1) / N at the last of N.
    flag: names the text in errors. epochs: of the run, for `multistep` and schedules by epoch.
    limits: smallest and largest value.
    """

    def __init__(
        self,
        text: str,
        flag: str,
        epochs: float,
        limits: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.text, self.flag, self.epochs = text, flag, epochs
        calls = parse_sum(text, flag)
        self.segments = [self._segment(call, single=len(calls) == 1) for call in calls]
        total = sum(segment.length for segment in self.segments)
        if abs(total - 1) > 1e-3:
            places = [calls[-1].place, *calls[-1].option_places]
            self._fail(f"the lengths in [ ] sum to {total:.6g}, expected 1", places[-1])
        self.by_epoch = "epoch" in self.segments[0].words
        for segment in self.segments:
            if ("epoch" in segment.words) != self.by_epoch:
                problem = "some parts have [epoch]; write it in all of them or in none"
                self._fail(problem, segment.place)
        for w in CHECKED_AT:
            value = self(w)
            if not limits[0] <= value <= limits[1]:
                problem = f"{value:.4g} at {w:.1%} of the run, expected {limits[0]} to {limits[1]}"
                self._fail(problem, self._at(w)[0].place)

    def __call__(self, w: float) -> float:
        """Value at progress `w`. A part sees its own progress, or with `fixed` that of the run."""
        segment, end = self._at(w)
        if "fixed" not in segment.words:
            w = (w - (end - segment.length)) / segment.length
        return segment.function(w)

    def _at(self, w: float) -> tuple[Segment, float]:
        """Return the part at progress `w`, and where it ends."""
        end = 0.0
        for segment in self.segments:
            end += segment.length
            if w + EPSILON <= end:
                break
        return segment, end

    def at(self, step: float, total: float) -> float:
        """Value at an optimizer step of `total`; by epoch that of the epoch's first step."""
        step = min(max(step, 0), total - 1)
        if self.by_epoch:
            return self(math.floor(step * self.epochs / total + EPSILON) / self.epochs)
        return self(step / total)

    def _segment(self, call: Call, single: bool) -> Segment:
        length, words = None, []
        for option, place in zip(call.options, call.option_places, strict=True):
            if isinstance(option, str):
                words.append(self._resolve(option, WORDS, "word", place, importable=False))
                if {"step", "epoch"} <= {*words} or {"fixed", "rescaled"} <= {*words}:
                    self._fail(f"{' and '.join(words)} contradict each other; drop one", place)
            elif length is not None:
                self._fail(f"got {length} and {option!r}, expected one length in [ ]", place)
            elif type(option) not in (int, float) or not 0 < option <= 1:
                self._fail(f"the length is {option!r}, expected a number in (0,1]", place)
            else:
                length = option
        if not {"step", "epoch"} & {*words}:
            words.append("epoch" if single and call.name in BY_EPOCH else "step")
        if length is None and not single:
            problem = f"expected the part of the run in [ ], such as {call}[0.1]"
            self._fail(problem, call.place)
        length = 1.0 if length is None else length
        return Segment(self._function(call), length, frozenset(words), call.place)

    def _function(self, call: Call) -> Callable[[float], float]:
        """Return the function of w that a call names; its arguments are checked."""
        function = self._resolve(call.name, SCHEDULES, "schedule", call.place)
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:  # not a function, or one without a signature
            self._fail(f"{call.name} cannot be used: {error}", call.place)
        kwargs = dict(call.kwargs)
        if "epochs" in signature.parameters:
            kwargs.setdefault("epochs", self.epochs)
        usage = f"{call.name} takes {accepted(function, inputs=1, hidden=('epochs',))}"
        self._check_arguments(call, signature, kwargs, usage)

        def value(w: float) -> float:
            try:
                found = call.factor * function(w, *call.args, **kwargs)
                if isinstance(found, complex) or not math.isfinite(found):
                    raise ValueError(f"{found} at w = {w:g} is no finite number")
            except (TypeError, ValueError, ArithmeticError, IndexError) as error:
                self._fail(f"{call}: {error}; {usage}", call.place)
            return float(found)

        return value

    def _check_arguments(
        self, call: Call, signature: inspect.Signature, kwargs: Mapping[str, Any], usage: str
    ) -> None:
        """Refuse arguments that a function does not take, and words in place of its numbers."""
        try:
            signature.bind(0.0, *call.args, **kwargs)
        except TypeError as error:
            self._fail(f"{call}: {error}; {usage}", call.place)
        for key, place in call.places.items():
            value = call.args[key] if isinstance(key, int) else call.kwargs[key]
            name, annotation = _parameter(signature, key)
            if annotation in (float, int) and type(value) not in (float, int):
                self._fail(f"{call.name}: {name} is {value!r}, expected a number; {usage}", place)

    def _resolve(self, name: str, table: Any, kind: str, place: int, **options: Any) -> Any:
        try:
            return resolve(name, table, kind, **options)
        except UserError as error:
            self._fail(str(error), place)

    def _fail(self, problem: str, place: int) -> NoReturn:
        fail_at(self.flag, self.text, problem, place)


def _parameter(signature: inspect.Signature, key: int | str) -> tuple[str, Any]:
    """Return the name and annotation of an argument, by its number after the progress or name."""
    known = [*signature.parameters.values()]
    if isinstance(key, str):
        found = signature.parameters.get(key, known[-1])  # of **kwargs
    else:
        several = [number for number, x in enumerate(known) if x.kind == x.VAR_POSITIONAL]
        found = known[min(key + 1, *several, len(known))]
    return found.name, found.annotation


# --- the schedule of a run -------------------------------------------------------------------


def warmup_cosine(step: float, start: float, end: float, *, warmup: float, total: float) -> float:
    """Linear warm-up from start/warmup to `start` in `warmup` steps, then half a cosine to `end`.

    The first step has a rate above 0, and the last one has exactly `end`.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    steps = total - 1 - warmup  # from the peak to the end
    position = (step - warmup) / steps if steps > 0 else float(warmup > 0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


@dataclass(eq=False)
class Schedule:
    """Options of every parameter group as functions of the global step.

    total: optimizer steps of the whole run; the first `warmup` raise the learning rate to `lr`.
    steps: where epochs differ in their steps. The rate then follows the epochs that are done, and
    is larger in proportion to the images of a step; None: epochs are equal.
    weight_decay_end: None keeps the weight decay constant.
    curve: factor of `lr`, in place of the warm-up and the cosine to `min_lr`.
    options: values of other options of the optimizer, by name.
    """

    optimizer: torch.optim.Optimizer
    total: int
    lr: float
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    curve: Curve | None = None
    options: Mapping[str, Curve] = field(default_factory=dict)
    steps: Steps | None = None

    def __post_init__(self) -> None:
        known = schedulable(self.optimizer) if self.options else {}
        for name in self.options:
            resolve_for("--sched_options", name, known, "option")
        if self.warmup >= self.total and self.curve is None:
            text = "warm-up of %s, but the run has %d: the learning rate never decays"
            get_logger().warning(text, plural(self.warmup, "step"), self.total)

    def rate(self, step: int) -> float:
        """Base learning rate of a global step, counted from 0."""
        place, total, warmup = map(self._progress, (step, self.total, self.warmup))
        factor = self.steps.factor(step) if self.steps else 1.0
        if self.curve is not None:
            return factor * self.lr * self.curve.at(place, total)
        return factor * warmup_cosine(place, self.lr, self.min_lr, warmup=warmup, total=total)

    def _progress(self, step: int) -> float:
        """Return what the steps before `step` have covered of the run, in steps of equal size."""
        return self.steps.progress(step) if self.steps else step

    def decay(self, step: int) -> float:
        """Weight decay of a global step."""
        place, total = self._progress(step), self._progress(self.total)
        if "weight_decay" in self.options:
            return self.options["weight_decay"].at(place, total)
        if self.weight_decay_end is None:
            return self.weight_decay
        return warmup_cosine(place, self.weight_decay, self.weight_decay_end, warmup=0, total=total)

    def apply(self, step: int) -> float:
        """Set lr, weight decay and `options` of all groups; returns the base rate.

        Options that a group has of its own (--param_group) stay, except lr, which is a factor.
        """
        lr, decay = self.rate(step), self.decay(step)
        place, total = self._progress(step), self._progress(self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            own = group.get("own_options", ())
            if "weight_decay" not in own:
                group["weight_decay"] = decay if group["decayed"] else 0.0
            for name, curve in self.options.items():
                if name != "weight_decay":
                    _set_option(group, name, curve.at(place, total), own)
        return lr


def schedulable(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Map names for --sched_options to the options of the optimizer that they change."""
    defaults = sharding.local_optimizer(optimizer).defaults
    names = [n for n, value in defaults.items() if type(value) is float or n == "dampening"]
    known = {name: name for name in names if name not in INTERNAL} | {
        "weight_decay": "weight_decay"
    }
    betas = defaults.get("betas") or ()
    known |= {name: "betas" for name, _ in zip(BETAS, betas, strict=False)}
    return known | ({"momentum": "betas"} if betas and "momentum" not in known else {})


def _set_option(group: dict[str, Any], name: str, value: float, own: Any) -> None:
    """Set an option unless it is among the group's own; `momentum` may mean beta1."""
    if name in group:
        if name not in own:
            group[name] = value
    elif "betas" not in own:
        place = BETAS.index("beta1" if name == "momentum" else name)
        betas = group["betas"]
        group["betas"] = (*betas[:place], value, *betas[place + 1 :])


def build_curves(args: Any, epochs: float | None = None) -> tuple[Curve | None, dict[str, Curve]]:
    """Read --sched and --sched_options; epochs: as the steps make them, default: --epochs."""
    epochs = args.epochs if epochs is None else epochs
    curve = Curve(args.sched, "--sched", epochs, RANGES["lr"]) if args.sched else None
    options: dict[str, Curve] = {}
    for word in args.sched_options or ():
        name, sign, text = word.partition("=")
        name, flag = name.strip(), f"--sched_options {name.strip()}"
        if name == "lr":
            raise UserError(f"{flag}: the learning rate has a flag of its own, --sched; use it")
        if not sign or name in options:
            expected = "NAME=SCHEDULE, such as weight_decay=cosine(0.05,0.5), once for each name"
            raise UserError(f"--sched_options: got {word!r}, expected {expected}")
        found = Curve(text, flag, epochs, RANGES.get(name, (-math.inf, math.inf)))
        if name not in RANGES:
            values = [found(w) for w in CHECKED_AT]
            for value in (min(values), max(values)):
                check_values(flag, args, {name: value})
        options[name] = found
    return curve, options


def build_schedule(
    args: Any, optimizer: torch.optim.Optimizer, lr: float, steps: Steps
) -> Schedule:
    """Build the schedule from the flags."""
    total, (steps_per_epoch, _) = steps.total, steps.base
    _warn_if_too_short(args, lr, total)
    warmup = args.warmup_steps  # replaces --warmup_epochs unless negative
    if warmup < 0:
        warmup = steps.before(args.warmup_epochs)
    curve, options = build_curves(args, steps.progress(total) / steps_per_epoch)
    return Schedule(
        optimizer,
        total,
        lr,
        min_lr=args.min_lr,
        warmup=warmup,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
        curve=curve,
        options=options,
        steps=steps if len(steps.parts) > 1 else None,
    )


def _warn_if_too_short(args: Any, lr: float, steps: int) -> None:
    """Warn if an optimizer that moves a weight by about `lr` a step at most hardly changes them.

    Others have no such bound: with SGD, digits reached 65% in 88 steps of 0.0002.
    """
    bounded = any(name in args.opt.partition("(")[0].lower() for name in BOUNDED)
    if not bounded or not 0 < lr * steps < INITIAL_STD:
        return
    kind = "pretrain" if is_pretraining(vars(args)) else "ft"
    recipe = "" if args.recipe else f", or use --recipe small_data_{kind}"
    raised = "--lr (0.0005 suits adamw and batches of 16) or " if lr < 5e-4 else ""
    get_logger().warning(
        "peak lr %.3g for %s moves a weight by %.2g at most, and initial weights have a "
        "standard deviation of %g: the run will hardly learn. Raise %s--epochs%s",
        lr, plural(steps, "step"), lr * steps, INITIAL_STD, raised, recipe,
    )  # fmt: skip


# --- drawing ---------------------------------------------------------------------------------


def lr_rows(schedule: Schedule, now: int) -> Iterator[str]:
    """Yield the learning rate, with a bar, at the first and last step, the peak and each tenth."""
    last = schedule.total - 1
    peak = min(max(schedule.warmup - 1, 0), last)
    if schedule.curve is not None or schedule.steps is not None:
        steps = sorted({0, last, *(last * part // 1000 for part in range(1000))})
        peak = max(steps, key=schedule.rate)
    here = min(now, last)
    marks = {here: " here"} if now > 0 else {}
    marks[peak] = " peak" + marks.get(peak, "")
    return curve_rows(schedule.rate, schedule.total, marks)


def curve_rows(
    value: Callable[[int], float], total: int, marks: Mapping[int, str]
) -> Iterator[str]:
    """Yield a value, with a bar, at the first and last step, each tenth and the marked steps."""
    last = total - 1
    steps = sorted({0, last, *marks, *(total * tenth // 10 for tenth in range(10))})
    highest = max(map(abs, map(value, steps)))
    for step in steps:
        bar = "#" * round(40 * abs(value(step)) / highest) if highest > 0 else ""
        text = f"step {step:{len(str(last))}d}  {value(step):.2e}  {bar}{marks.get(step, '')}"
        yield text.rstrip()
