# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Steps and all-reduces of several processes, round by round, and the model fitted to them.

python benchmarks/scaling.py --only steps --processes 1 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import table
from benchmarks.scaling_model import (
    Here,
    Link,
    buckets,
    fit_link,
    fit_work,
    parameters,
    relative_errors,
)
from benchmarks.step import machine, others_busy

WORKER = Path(__file__).with_name("scaling_worker.py")
WAYS = ("alone", "no_sync", "sync")  # without a group; in one, without and with exchange
TOLD = {"agreement": "whether to save or stop, an update", "meters": "means, a log line"}
SIZES = [2**exponent for exponent in range(10, 25, 2)]  # bytes of all-reduces: 1 KiB to 16 MiB

Case = tuple[str, int, int]  # way, processes, images of each


class Team:
    """Processes that do the same at the same time, in a group or not."""

    def __init__(self, size: int, args: argparse.Namespace, meet: Path | None = None) -> None:
        command = [sys.executable, str(WORKER), "--model", args.model, "--mode", args.mode]
        command += ["--input_size", str(args.input_size)]
        command += ["--meet", f"file://{meet}"] if meet else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.members = []
        for rank in range(size):
            own = os.environ | {"OMP_NUM_THREADS": "1"}
            own |= {"RANK": str(rank), "WORLD_SIZE": str(size)} if meet else {}
            self.members.append(subprocess.Popen(command, env=own, **pipes))

    def ask(self, what: str, first: int | None = None, **about: Any) -> list[Any]:
        """What each of the members, or the `first` of them, answers."""
        asked = self.members[:first]
        for member in asked:
            member.stdin.write(json.dumps({"what": what, **about}) + "\n")
            member.stdin.flush()
        answers = [member.stdout.readline() for member in asked]
        if not all(answers):
            sys.exit(f"benchmarks/scaling.py: a process that should {what} ended; see above")
        return [json.loads(answer) for answer in answers]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self.members:
            if exception[0] is not None:
                member.kill()
            member.stdin.close()
        for member in self.members:
            member.wait()
            member.stdout.close()


def scalings(args: argparse.Namespace) -> dict[str, list[tuple[int, int]]]:
    """Kind -> (processes, images of each)."""
    return {
        "weak": [(n, args.batch_size) for n in args.processes],
        "strong": [(n, args.total // n) for n in args.processes],
    }


def gradient_bytes(args: argparse.Namespace) -> int:
    """In float32."""
    return 4 * parameters(args.model, args.mode)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What a round times. One process takes every number of images, for the fit."""
    points = list(dict.fromkeys(point for kind in scalings(args).values() for point in kind))
    single = list(dict.fromkeys(("alone", 1, images) for _, images in points))
    return single + [(way, n, images) for n, images in points if n > 1 for way in WAYS]


@dataclass
class Measured:
    """Seconds, a value a round, and the cores that other programs kept busy in each timing."""

    steps: dict[Case, list[float]]
    reduces: dict[tuple[int, int], list[float]]  # (processes, bytes) -> an all-reduce
    told: dict[tuple[int, str], list[float]]  # (processes, what) -> what ranks tell besides
    others: list[float]


def measure(args: argparse.Namespace, folder: Path) -> Measured:
    """Round by round, each beginning one case later, so that none has a fixed place."""
    groups = [n for n in args.processes if n > 1]
    gradients = gradient_bytes(args)
    sizes = [*(size for size in SIZES if size < gradients), gradients]
    found = Measured(
        {case: [] for case in cases_of(args)},
        {(n, size): [] for n in groups for size in sizes},
        {(n, what): [] for n in groups for what in TOLD},
        [],
    )
    with ExitStack() as stack:
        teams = {0: stack.enter_context(Team(max(args.processes), args))}  # of no group
        for n in groups:
            teams[n] = stack.enter_context(Team(n, args, folder / f"meet-{n}"))
        for case in found.steps:  # warm; a single process is the first to choose kernels
            time_case(case, teams, 1)
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            measure_round(found, number, teams, args)
    return found


def measure_round(
    found: Measured, number: int, teams: dict[int, Team], args: argparse.Namespace
) -> None:
    """Every case once."""
    cases = list(found.steps)
    turn = number % len(cases)
    for case in cases[turn:] + cases[:turn]:
        work = partial(time_case, case, teams, args.steps)
        found.steps[case].append(quietly(work, teams, args.quiet, found.others))
    for n in teams.keys() - {0}:
        sizes = [size for m, size in found.reduces if m == n]
        work = partial(time_messages, teams[n], sizes)
        for key, seconds in quietly(work, teams, args.quiet, found.others).items():
            (found.told if key in TOLD else found.reduces)[n, key].append(seconds)


def quietly(
    work: Callable[[], Any], teams: dict[int, Team], limit: float | None, others: list[float]
) -> Any:
    """What `work` returns, again while other programs keep more cores busy than `limit`."""

    def busy() -> float:
        return others_busy() - sum(sum(team.ask("cpu")) for team in teams.values())

    for _ in range(1 if limit is None else 20):
        began, before = time.monotonic(), busy()
        result = work()
        share = (busy() - before) / (time.monotonic() - began)
        if limit is None or share <= limit:
            break
        time.sleep(3)
    others.append(max(0.0, share))
    return result


def time_case(case: Case, teams: dict[int, Team], steps: int) -> float:
    """Seconds of a step, the mean over the processes."""
    way, n, images = case
    team = teams[0 if way == "alone" else n]
    return statistics.mean(team.ask("step", n, images=images, exchange=way == "sync", count=steps))


def time_messages(team: Team, sizes: list[int]) -> dict[Any, float]:
    """Seconds of an all-reduce of each size, and of what ranks tell each other besides."""
    found: dict[Any, float] = {}
    for size in sizes:
        count = max(2, min(200, 2**23 // size))
        found[size] = statistics.mean(team.ask("all_reduce", size=size, count=count))
    return found | team.ask("told", count=200)[0]


def medians(found: dict[Any, list[float]]) -> dict[Any, float]:
    """By the same keys."""
    return {key: statistics.median(values) for key, values in found.items()}


def fit(args: argparse.Namespace, found: Measured) -> Here:
    """The model of this machine. Of the groups' steps it knows one: weak, in the smallest group."""
    seconds, cores = medians(found.steps), os.cpu_count() or 1
    alone = {(n, images): s for (way, n, images), s in seconds.items() if way == "alone"}
    single = {images: s for (n, images), s in alone.items() if n == 1}
    slowdown = {
        n: statistics.mean(s / single[images] for (m, images), s in alone.items() if m == n)
        for n in args.processes
    }
    work, size = fit_work(list(single), list(single.values())), gradient_bytes(args)
    here = Here(work, slowdown, Link(0.0, math.inf), size, cores)
    if len(args.processes) == 1:
        return here
    members, sizes = zip(*found.reduces, strict=True)
    reduces = [s / here.crowd(n) for (n, _), s in medians(found.reduces).items()]
    here = replace(here, link=fit_link(sizes, members, reduces))
    n, images = scalings(args)["weak"][1]
    pairs = zip(found.steps["sync", n, images], found.steps["alone", n, images], strict=True)
    longer = statistics.median(group - alone for group, alone in pairs)  # of the same round
    return replace(here, hidden=min(1.0, 1 - longer / here.exchange(n)))


# --- report --------------------------------------------------------------------------------------


def ms(seconds: float, digits: int = 1) -> str:
    """Milliseconds; nothing for what was not measured."""
    return "" if math.isnan(seconds) else f"{1e3 * seconds:.{digits}f}"


def percent(ratio: float) -> str:
    return f"{100 * ratio:.0f}%"


def step_rows(args: argparse.Namespace, found: Measured, here: Here) -> list[list[object]]:
    """A row for each number of processes in each kind of scaling."""
    rows: list[list[object]] = []
    for kind, points in scalings(args).items():
        first = points[0][1] / statistics.median(found.steps["alone", 1, points[0][1]])
        for n, images in points:
            ways = [found.steps.get((way, n, images), [math.nan]) for way in WAYS]
            whole = ways[-1] if n > 1 else ways[0]
            middle, model = statistics.median(whole), here.seconds(n, images)
            beside = statistics.median(a / b for a, b in zip(ways[0], whole, strict=True))
            rows.append(
                [kind, n, images, *(ms(statistics.median(seconds)) for seconds in ways)]
                + [f"{ms(min(whole))} to {ms(max(whole))}", f"{n * images / middle:.1f}"]
                + [percent(images / middle / first), f"**{percent(beside)}**"]
                + [ms(model), f"{100 * (model / middle - 1):+.0f}%"]
            )
    return rows


def reduce_table(found: Measured, here: Here) -> str:
    """Milliseconds of an all-reduce of each size, measured and by the model."""
    members = sorted({n for n, _ in found.reduces})
    head, rows = ["KiB"], []
    for n in members:
        head += [f"{n} processes, ms", "min", "model", "error"]
    for size in sorted({size for _, size in found.reduces}):
        cells = [f"{size / 1024:.0f}"]
        for n in members:
            own = found.reduces[n, size]
            middle, model = statistics.median(own), here.crowd(n) * here.link.seconds(size, n)
            cells += [ms(middle, 2), ms(min(own), 2), ms(model, 2)]
            cells += [f"{100 * (model / middle - 1):+.0f}%"]
        rows.append(cells)
    return table(head, rows)


def told_table(found: Measured) -> str:
    """Milliseconds of what ranks tell each other beside the gradients."""
    members = sorted({n for n, _ in found.told})
    rows = [
        [name, *(ms(statistics.median(found.told[n, what]), 3) for n in members)]
        for what, name in TOLD.items()
    ]
    return table(["", *(f"{n} processes, ms" for n in members)], rows)


def describe_fit(args: argparse.Namespace, found: Measured, here: Here) -> str:
    """The numbers of the model and how well they fit."""
    reduces = medians(found.reduces)
    predicted = [here.crowd(n) * here.link.seconds(size, n) for n, size in reduces]
    usual, largest = relative_errors(predicted, list(reduces.values()))
    slow = " and ".join(f"{here.slowdown[n]:.2f} ({n} processes)" for n in args.processes[1:])
    n, _ = scalings(args)["weak"][1]
    return (
        f"The model: a process that has the machine to itself takes {ms(here.work.fixed)} ms a "
        f"step and {ms(here.work.image, 2)} ms an image; others beside it make that {slow} times "
        "as long. An all-reduce takes 2 (n - 1) latencies and 2 (n - 1) / n of its bytes, times "
        f"n / {here.cores} where processes outnumber cores: {1e6 * here.link.latency:.0f} us and "
        f"{here.link.bandwidth / 1e9:.2f} GB/s by least squares, error {percent(usual)} (root mean "
        f"square), at most {percent(largest)}. The {here.size / 1e6:.1f} MB of gradients go in "
        f"{buckets(here.size)} messages, {ms(here.exchange(n))} ms with {n} processes, of which "
        f"{percent(here.hidden)} are hidden behind backward, by the weak step of {n} processes; "
        "the other steps of groups are predicted."
    )


def report_steps(args: argparse.Namespace) -> str:
    """Markdown: steps and all-reduces, the model's beside them."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    here = fit(args, found)
    head = ["scaling", "processes", "images each", "alone, ms", "group, no exchange, ms"]
    head += ["group, ms", "min to max", "images/s", "of one process", "of as many alone"]
    lines = [
        f"### Steps on several processes: {args.model}, {args.mode}",
        "",
        f"float32, {args.input_size} px, gloo, a thread a process on {here.cores} cores; medians "
        f"of {args.rounds} rounds, the cases in turn, {args.steps} steps a timing. *Alone*: as "
        "many processes at the same time without a group, which share the cores as a group does. "
        "*Of one process*: images/s of a process, against one that has the machine to itself. *Of "
        "as many alone*: what the group leaves of that.",
        machine(torch.device("cpu")),
        f"Other programs kept {statistics.mean(found.others):.2f} cores busy, in a timing at most "
        f"{max(found.others):.2f}.",
        "",
        table([*head, "model, ms", "error"], step_rows(args, found, here)),
    ]
    if found.reduces:
        lines += ["", describe_fit(args, found, here), "", "All-reduces of float32:", ""]
        lines += [reduce_table(found, here), "", "What ranks tell each other besides:", ""]
        lines += [told_table(found)]
    return "\n".join(lines)
