# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Time steps and all-reduces of several processes, and fit the model to them.

python benchmarks/scaling.py --only steps --processes 1 2 --rounds 3
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import table
from benchmarks.scaling_model import (
    Link,
    Training,
    fit_link,
    fit_work,
    parameters,
    relative_errors,
)
from benchmarks.step import machine, others_busy

WORKER = Path(__file__).with_name("scaling_worker.py")
WAYS = ("alone", "no_sync", "sync")  # without a group; in a group without and with all-reduce
CONTROL = {"vote": "vote on saving and stopping, per step", "meters": "means, per log line"}
SIZES = [2**exponent for exponent in range(10, 25, 2)]  # bytes of all-reduces: 1 KiB to 16 MiB

Case = tuple[str, int, Any]  # (way or "message", processes, images or size)
Seconds = dict[Case, list[float]]  # one value per round


class Team:
    """Worker processes that do the same at the same time, in a process group or not."""

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
        """Ask the members, or the `first` few of them, and return their answers."""
        asked = self.members[:first]
        for member in asked:
            with suppress(BrokenPipeError):  # it will not answer either
                member.stdin.write(json.dumps({"what": what, **about}) + "\n")
                member.stdin.flush()
        answers = [member.stdout.readline() for member in asked]
        if not all(answers):
            sys.exit(f"benchmarks/scaling.py: a process asked for {what!r} ended; see above")
        return [json.loads(answer) for answer in answers]

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self.members:
            if exception[0] is not None:
                member.kill()
            with suppress(BrokenPipeError):
                member.stdin.close()
        for member in self.members:
            member.wait()
            member.stdout.close()


def scalings(args: argparse.Namespace) -> dict[str, list[tuple[int, int]]]:
    """Return kind of scaling -> (processes, images per process)."""
    return {
        "weak": [(n, args.batch_size) for n in args.processes],
        "strong": [(n, args.total // n) for n in args.processes],
    }


def step_cases(args: argparse.Namespace) -> list[Case]:
    """Return the steps of a round; a single process takes every number of images, for the fit."""
    points = list(dict.fromkeys(point for kind in scalings(args).values() for point in kind))
    single = list(dict.fromkeys(("alone", 1, images) for _, images in points))
    return single + [(way, n, images) for n, images in points if n > 1 for way in WAYS]


def measure(args: argparse.Namespace, folder: Path) -> tuple[Seconds, list[float]]:
    """Time all cases; returns their seconds and the cores that other programs kept busy.

    Each round starts with another case, so that none has a fixed place.
    """
    groups, found, others = args.processes[1:], defaultdict(list), []
    gradients = 4 * parameters(args.model, args.mode)
    sizes = [*(size for size in SIZES if size < gradients), gradients]
    with ExitStack() as stack:
        print("starting processes, a step of each case to warm up", file=sys.stderr, flush=True)
        teams = {0: stack.enter_context(Team(max(args.processes), args))}  # without a group
        for n in groups:
            teams[n] = stack.enter_context(Team(n, args, folder / f"meet-{n}"))
        for case in step_cases(args):  # a single process is the first to choose kernels
            time_step(case, teams, 1)
        work = [partial(time_step, case, teams, args.steps) for case in step_cases(args)]
        work += [partial(time_messages, n, sizes, teams[n]) for n in groups]
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            turn = number % len(work)
            for timing in work[turn:] + work[:turn]:
                for case, seconds in quietly(timing, teams, args.quiet, others).items():
                    found[case].append(seconds)
    return found, others


def quietly(
    timing: Callable[[], Any], teams: dict[int, Team], limit: float | None, others: list[float]
) -> Any:
    """Call `timing`, repeatedly while other programs keep more than `limit` cores busy."""

    def busy() -> float:
        return others_busy() - sum(sum(team.ask("cpu")) for team in teams.values())

    for _ in range(1 if limit is None else 20):
        began, before = time.monotonic(), busy()
        result = timing()
        share = (busy() - before) / (time.monotonic() - began)
        if limit is None or share <= limit:
            break
        time.sleep(3)
    others.append(max(0.0, share))
    return result


def time_step(case: Case, teams: dict[int, Team], count: int) -> dict[Case, float]:
    """Return the seconds of a step, the mean over the processes."""
    way, n, images = case
    team = teams[0 if way == "alone" else n]
    answers = team.ask("step", n, images=images, exchange=way == "sync", count=count)
    return {case: statistics.mean(answers)}


def time_messages(n: int, sizes: list[int], team: Team) -> dict[Case, float]:
    """Return the seconds of an all-reduce of each size, and of the control messages."""
    found: dict[Case, float] = {}
    for size in sizes:
        answers = team.ask("all_reduce", size=size, count=max(2, min(200, 2**23 // size)))
        found["message", n, size] = statistics.mean(answers)
    control = team.ask("control", count=200)[0]
    return found | {("message", n, what): control[what] for what in CONTROL}


def fit(args: argparse.Namespace, found: Seconds) -> Training:
    """Fit the model to this machine; of the groups' steps it uses only the first weak one."""
    middle = {case: statistics.median(seconds) for case, seconds in found.items()}
    alone = {(n, images): s for (way, n, images), s in middle.items() if way == "alone"}
    single = {images: s for (n, images), s in alone.items() if n == 1}
    slowdown = {
        n: statistics.mean(s / single[images] for (m, images), s in alone.items() if m == n)
        for n in args.processes
    }
    work = fit_work(list(single), list(single.values()))
    here = Training(work, Link(0, math.inf), parameters(args.model, args.mode), slowdown=slowdown)
    if len(args.processes) == 1:
        return here
    members, sizes, seconds = zip(*reduces(found), strict=True)
    here = replace(here, network=fit_link(sizes, members, seconds, os.cpu_count() or 1))
    n, images = scalings(args)["weak"][1]
    pairs = zip(found["sync", n, images], found["alone", n, images], strict=True)
    longer = statistics.median(group - alone for group, alone in pairs)  # in the same round
    return replace(here, hidden=min(1.0, max(0.0, 1 - longer / here.exchange(n))))


def reduces(found: Seconds) -> list[tuple[int, int, float]]:
    """Return (processes, bytes, seconds) of the all-reduces."""
    messages = [case for case in found if case[0] == "message" and case[2] not in CONTROL]
    return [(n, size, statistics.median(found["message", n, size])) for _, n, size in messages]


# --- report --------------------------------------------------------------------------------------


def ms(seconds: float, digits: int = 1) -> str:
    """Format milliseconds; empty if not measured."""
    return "" if math.isnan(seconds) else f"{1e3 * seconds:.{digits}f}"


def percent(ratio: float) -> str:
    return f"{100 * ratio:.0f}%"


def step_rows(args: argparse.Namespace, found: Seconds, here: Training) -> list[list[object]]:
    """Return a row for each number of processes in each kind of scaling."""
    rows: list[list[object]] = []
    for kind, points in scalings(args).items():
        first = points[0][1] / statistics.median(found["alone", 1, points[0][1]])
        for n, images in points:
            ways = [found.get((way, n, images), [math.nan]) for way in WAYS]
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


def message_table(args: argparse.Namespace, found: Seconds, here: Training) -> str:
    """Return a table of all-reduces, measured and modeled, and of the control messages."""
    head, rows = ["all-reduce of"], defaultdict(list)
    for n in args.processes[1:]:
        head += [f"{n} processes, ms", "min", "model", "error"]
        for _, size, middle in (found for found in reduces(found) if found[0] == n):
            model, least = here.network.seconds(size, n), min(found["message", n, size])
            rows[f"{size / 1024:.0f} KiB"] += [ms(middle, 2), ms(least, 2), ms(model, 2)]
            rows[f"{size / 1024:.0f} KiB"] += [f"{100 * (model / middle - 1):+.0f}%"]
        for what, name in CONTROL.items():
            own = found["message", n, what]
            rows[name] += [ms(statistics.median(own), 2), ms(min(own), 2), "", ""]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def describe_fit(args: argparse.Namespace, found: Seconds, here: Training) -> str:
    """Describe the fitted model and its errors."""
    members, sizes, seconds = zip(*reduces(found), strict=True)
    predicted = [here.network.seconds(size, n) for n, size in zip(members, sizes, strict=True)]
    usual, largest = relative_errors(predicted, seconds)
    slow = " and ".join(f"{here.slowdown[n]:.2f} ({n} processes)" for n in args.processes[1:])
    n, link = args.processes[1], here.network
    return f"""The model, fitted to the columns *alone* and to the all-reduces below:

- Computing: {ms(here.work.fixed)} ms per step and {ms(here.work.image, 2)} ms per image in a \
single process; with several processes {slow} times as long.
- All-reduce: 2 (n - 1) latencies of {1e6 * link.latency:.0f} us and 2 (n - 1) / n of the bytes at \
{link.bandwidth / 1e9:.2f} GB/s, times n / {link.cores} where processes outnumber cores; error \
{percent(usual)} (root mean square), at most {percent(largest)}.
- Communication: {here.size / 1e6:.1f} MB of gradients in {here.messages} buckets, \
{ms(here.exchange(n))} ms with {n} processes, of which {percent(here.hidden)} overlap with \
backward. This fraction is fitted to the weak step of {n} processes; other steps are predicted."""


def report_steps(args: argparse.Namespace) -> str:
    """Return Markdown: measured steps and all-reduces next to those of the model."""
    with tempfile.TemporaryDirectory() as folder:
        found, others = measure(args, Path(folder))
    here = fit(args, found)
    head = ["scaling", "processes", "images each", "alone, ms", "group, no all-reduce, ms"]
    head += ["group, ms", "min to max", "images/s", "vs. one process", "vs. independent"]
    lines = [
        f"### Steps on several processes: {args.model}, {args.mode}",
        "",
        f"Measured, except the model: float32, {args.input_size} px, gloo, one thread per "
        f"process on {os.cpu_count()} cores; medians of {args.rounds} rounds, the cases in turn, "
        f"{args.steps} steps per timing. *Alone*: as many independent processes at the same time. "
        "*vs. one process*: images/s per process compared with a single process. "
        "*vs. independent*: compared with independent processes.",
        "",
        machine(torch.device("cpu")),
        f"Other programs kept {statistics.mean(others):.2f} cores busy, in a timing at most "
        f"{max(others):.2f}.",
        "",
        table([*head, "model, ms", "error"], step_rows(args, found, here)),
    ]
    if len(args.processes) > 1:
        lines += ["", describe_fit(args, found, here), "", message_table(args, found, here)]
    return "\n".join(lines)
