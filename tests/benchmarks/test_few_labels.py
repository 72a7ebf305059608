# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The benchmark of few labels: what is compared is fair, and a stopped program goes on."""

import json
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import few_labels
from benchmarks.cifar_runs import autoencoder
from benchmarks.few_labels import COST, BestEpoch, Job, Runs
from errors import UserError
from tests.test_end_to_end import run

TOY = (
    "--model 1,1/4,8 --decoder_embed_dim 8 --pretrain_images 16 --val_images 8 --choose_images 4 "
    "--pretrain_epochs 2 --pretrain_batch_size 8 --batch_size 4 --cutout 4 --amp none --jobs 1 "
    "--labels 4 8 --epochs 2 1 --seeds 3 5 --finetune_lrs 1e-3 2e-3 --scratch_lrs 1e-3 --k 3"
)


def parse(*words: object, folder: object = "runs") -> Namespace:
    argv = [*TOY.split(), "--folder", str(folder), *map(str, words)]
    return few_labels.get_args_parser().parse_args(argv)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of the tables of a page, without their heads."""
    found: list[list[list[str]]] = []
    for line in text.splitlines():
        if line.startswith("|---"):
            found.append([])
        elif line.startswith("|") and found:
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [[row for row in rows if row[0].isdecimal()] for rows in found]  # without next heads


@pytest.mark.slow
def test_the_table_is_that_of_the_runs_and_a_second_call_only_reports(toy_zip, tmp_path):
    words = [*TOY.split(), "--data", toy_zip, "--folder", tmp_path / "runs"]
    output = tmp_path / "table.md"
    first = run("benchmarks/few_labels.py", *words, "--output", output)
    assert output.read_text(encoding="utf-8").strip() == first.stdout.strip()
    rows = [json.loads(line) for line in (tmp_path / "runs/runs.jsonl").read_text().splitlines()]
    by_job = {tuple(row[key] for key in Job._fields[:-1]): row for row in rows}
    # 1 cost, 2 of pre-training, 3 learning rates x 2 for the first seed, then 2 + 4 for each number
    assert len(by_job) == len(rows) == 1 + 2 + 2 * 3 + 2 * (2 + 2)
    cost = next(row["cost"] for row in rows if row["run"] == "cost")
    assert cost > 0
    accuracies = tables(first.stdout)[0]
    assert [row[:2] for row in accuracies][:3] == [
        ["4", title] for title in few_labels.RUNS.values()
    ]
    for number, (labels, epochs) in enumerate(((4, 2), (8, 1))):
        tuned, scratch, longer = accuracies[3 * number : 3 * number + 3]
        lrs = {lr: max(by_job["pretrained", labels, 3, lr]["curve"]) for lr in (1e-3, 2e-3)}
        assert float(tuned[3]) == max(lrs, key=lrs.get)
        assert (tuned[2], scratch[2]) == (f"2 + {epochs}", str(epochs))
        assert int(longer[2]) == few_labels.longer_epochs(labels, epochs, cost, parse())
        for name, row in zip(few_labels.RUNS, (tuned, scratch, longer), strict=True):
            own = [by_job[name, labels, seed, float(row[3])]["acc1"] for seed in (3, 5)]
            assert row[-1] == ", ".join(f"{value:.2f}" for value in own)
    assert len(tables(first.stdout)[-1]) == 2  # probes of two epochs
    other = rows[-1] | {"labels": 16, "seconds": 1e6, "machine": "other"}  # of other numbers
    with (tmp_path / "runs/runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(other) + "\n")
    again = run("benchmarks/few_labels.py", *words)
    assert again.stdout == first.stdout
    assert again.stderr == ""  # nothing was run again


def test_images_with_labels_are_drawn_by_seed_and_others_choose_than_are_reported():
    """The epoch would be chosen on the images that are reported, or seeds share their labels."""
    labels = np.repeat(np.arange(2), 20)
    data = {name: (np.arange(40)[:, None], labels) for name in ("train", "val")}
    found = {}
    for seed in (0, 1):
        for count in (4, 8, 40):
            images, own = few_labels.split(data, parse(), Job("scratch", count, seed, 1.0, 1))[
                "train"
            ]
            found[seed, count] = set(images[:, 0].tolist())
            assert len(found[seed, count]) == count
            assert (np.bincount(own) == count // 2).all()
        assert found[seed, 4] < found[seed, 8]
    assert found[0, 4] != found[1, 4]
    parts = few_labels.split(data, parse(), Job("scratch", 4, 0, 1.0, 1))
    choose, test = (set(parts[name][0][:, 0].tolist()) for name in ("choose", "test"))
    assert len(choose) == 4
    assert choose | test == set(range(40))
    assert not choose & test
    whole = few_labels.split(data, parse(), Job("pretraining", 0, 1, 1.0, 1))
    assert len(whole["train"][0]) == len(whole["pretrain"][0]) == 40


def test_best_epoch_keeps_the_weights_of_its_evaluation(monkeypatch):
    """The last weights would be reported with the best epoch."""
    found: Iterator[float] = iter([10.0, 30.0, 30.0, 20.0])
    monkeypatch.setattr(few_labels, "accuracy", lambda *_: {"acc1": next(found)})
    model, best = nn.Linear(1, 1), BestEpoch(None, parse())
    for value in range(4):
        nn.init.constant_(model.weight, value)
        best(model)
    assert best.best == 1
    assert best.load().weight.item() == 1.0
    assert best.curve == [10.0, 30.0, 30.0, 20.0]


def test_accuracy_is_of_other_images_with_the_weights_of_the_best_epoch(monkeypatch, tmp_path):
    """Accuracies on the images that choose the epoch are too high."""
    model, curve, calls = nn.Linear(1, 1), iter([10.0, 30.0, 20.0] * 2), []

    def accuracy(images, network, args):
        return {"acc1": next(curve) if images == "choose" else network.weight.item()}

    def classify(title, seed, epochs, images, args, best, weights, lr):
        calls.append((seed, epochs, args.eval_every, weights, lr))
        for value in (1.0, 3.0, 2.0):
            nn.init.constant_(model.weight, value)
            best(model)
        return [1.0, 2.0], None

    monkeypatch.setattr(few_labels, "split", lambda *_: {n: (n,) for n in ("choose", "test")})
    monkeypatch.setattr(few_labels, "InMemory", lambda name, *_: name)
    monkeypatch.setattr(few_labels, "accuracy", accuracy)
    monkeypatch.setattr(few_labels, "classify", classify)
    args = parse(folder=tmp_path)
    args.device = torch.device("cpu")
    torch.save({"seed": 5}, few_labels.weights_path(tmp_path, 5))
    rows = [few_labels.do(Job(name, 4, 5, 2e-3, 40), args) for name in ("scratch", "pretrained")]
    for row in rows:
        assert (row["acc1"], row["best_epoch"], row["seconds"]) == (3.0, 4, 3.0)
        assert row["curve"] == [10.0, 30.0, 20.0]
    assert calls == [(5, 40, 2, weights, 2e-3) for weights in (None, {"seed": 5})]


def test_leads_are_those_of_pretraining(tmp_path):
    runs = Runs(parse(folder=tmp_path), "own")
    for name, scores in (("pretrained", (50.0, 60.0)), ("scratch", (45.0, 62.0))):
        for seed, acc1 in zip((3, 5), scores, strict=True):
            job = Job(name, 4, seed, 1e-3, 2)
            runs.rows[job] = job._asdict() | {"curve": [acc1], "acc1": acc1}
    runs.args.finetune_lrs = [1e-3]
    *_, cell = few_labels.lead_row(runs, 4, "scratch")
    assert cell == "**+1.50** | +5.00, -2.00"


def test_epochs_of_as_much_compute():
    """16 images x 2 epochs at 0.7 are 22.4 images of training: 5.6 epochs of 4 of the 6 images."""
    assert few_labels.longer_epochs(6, 3, 0.7, parse()) == 3 + 6
    assert few_labels.longer_epochs(8, 3, 0.5, parse()) == 3 + 2


def test_learning_rate_is_not_chosen_by_the_reported_accuracy(tmp_path):
    runs = Runs(parse(folder=tmp_path), "own")
    for lr, curve, acc1 in ((1e-3, [50.0, 20.0], 40.0), (2e-3, [45.0, 30.0], 90.0)):
        job = Job("pretrained", 4, 3, lr, 2)
        runs.add(job, job._asdict() | {"curve": curve, "acc1": acc1})
    expected = [Job("pretrained", 4, seed, 1e-3, 2) for seed in (3, 5)]
    assert runs.of("pretrained", 4) == expected
    assert Runs(parse(folder=tmp_path), "own").of("pretrained", 4) == expected
    with pytest.raises(UserError, match="of other settings, own; name another"):
        Runs(parse(folder=tmp_path), "others")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 3", "--epochs 3, but --labels 4 8; give as many of both"),
        ("--labels 4 17", "--labels 17: too many for --pretrain_images 16; lower it"),
        ("--batch_size 6", "--batch_size 6: too many for --labels 4 8; lower it"),
        ("--batch_size 3", "--batch_size 3: mixup mixes pairs; make it even"),
        ("--pretrain_batch_size 64", "--pretrain_batch_size 64: too many for --pretrain_images 16"),
        ("--choose_images 8", "--choose_images 8: too many for --val_images 8; lower it"),
        ("--k 17", "--k 17: too many for --pretrain_images 16; lower it"),
        ("--output no/table.md", "no/table.md: there is no folder no; make it first"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        few_labels.check(parse(*words.split()))


def test_longer_runs_have_a_learning_rate_of_their_own_if_asked(tmp_path):
    rates = ["--scratch_lrs", "0.001", "--longer_lrs", "0.001", "0.002"]
    for args, lr in ((parse(*rates, folder=tmp_path), 2e-3), (parse(folder=tmp_path), 1e-3)):
        runs = Runs(args, "own")
        runs.rows[COST] = {"cost": 0.5}
        for name, rate, best in (("scratch", 1e-3, 9), ("longer", 1e-3, 5), ("longer", 2e-3, 7)):
            job = Job(name, 4, 3, rate, runs._epochs(name, 4))
            runs.rows[job] = {"curve": [best]}
        runs.rows |= {job: {"curve": [1]} for job in runs.tuning("scratch", 4)[1:]}
        assert [job.lr for job in runs.of("longer", 4)] == [lr] * 2


def test_an_error_keeps_the_runs_that_have_begun(tmp_path, monkeypatch):
    """Hours of training would be lost; those that wait are not begun."""
    jobs = [Job("scratch", 4, seed, 1e-3, 1) for seed in range(9)]
    begun, failed = [], Event()

    def do(job: Job, args: object) -> dict:
        begun.append(job)
        if job.seed == 0:
            raise RuntimeError("out of memory")
        assert failed.wait(60)
        return job._asdict()

    class Pool(ThreadPoolExecutor):
        def submit(self, *words) -> Future:
            future = super().submit(*words)
            if words[1] == jobs[0]:
                future.add_done_callback(lambda _: failed.set())
            return future

    monkeypatch.setattr(few_labels, "do", do)
    runs = Runs(parse("--jobs", 2, folder=tmp_path), "own")
    with Pool(3) as pool, pytest.raises(RuntimeError, match="out of memory"):
        runs.do_all(pool, jobs)
    assert {*begun} == {*jobs[:2]}
    assert [*Runs(parse(folder=tmp_path), "own").rows] == [*runs.rows] == [jobs[1]]


def test_a_killed_program_leaves_whole_lines(tmp_path, monkeypatch):
    job, other = (Job("scratch", 4, seed, 1e-3, 1) for seed in (3, 5))
    runs = Runs(parse(folder=tmp_path), "own")
    runs.add(job, job._asdict())
    monkeypatch.setattr("os.replace", None)  # the last step of a write
    with pytest.raises(TypeError):
        runs.add(other, other._asdict())
    assert [*Runs(parse(folder=tmp_path), "own").rows] == [job]


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"run": "scr\n', encoding="utf-8")
    with pytest.raises(UserError, match="runs.jsonl: holds no results of this program"):
        Runs(parse(folder=tmp_path), "own")


def test_probes_are_of_frozen_features(toy_zip):
    """A network in training mode would move its features."""
    args = parse("--data", toy_zip, "--labels", 4, 16)
    args.device = torch.device("cpu")
    few_labels.start_process(args)
    images = few_labels.split(few_labels._DATA, args, Job("pretraining", 0, 0, 1e-3, 1))
    probes = few_labels.Probes(images, args)
    model = autoencoder(args).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = probes(model)
    assert [*scores] == ["knn", "linear", "linear_4", "linear_16"]
    assert scores["linear"] == scores["linear_16"] == 100.0  # one class is dark, the other bright
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
