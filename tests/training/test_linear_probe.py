# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--linear_probe: each head trains as if alone, and the best becomes an ordinary classifier."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import main_finetune
from config import linear_probe
from config import parser as options
from engine_finetune import evaluate
from errors import Preempted, UserError
from models.sweep import LinearSweep, Standardize, SweepNetwork
from optim_factory import build_optimizer
from tests import fakes, tiny
from tests.groups import results_of, run_ranks
from tests.test_end_to_end import FINETUNE, PRETRAIN, log, run, weights
from training.criterion import Criterion
from training.evaluation import Metrics
from training.linear_probe import SweepLoss, SweepMetrics

CPU = torch.device("cpu")
PROBE = [*FINETUNE[: FINETUNE.index("--lr")], *FINETUNE[FINETUNE.index("--lr") + 2 :]]
PROBE = [*map(str, PROBE), "--linear_probe", "--log_dir", "none"]
SGD = ["--opt", "sgd", "--linear_probe_blr", "0.5", "5", "50"]


def parsed(*words: str) -> options.FrozenNamespace:
    return options.parse(options.finetune_parser(), [*PROBE, *words])


def train(folder: Path, *words: str) -> list[dict]:
    with fakes.logged():
        main_finetune.main(parsed("--output_dir", str(folder), *words))
    return log(folder)


# --- the heads ----------------------------------------------------------------------------------


def test_standardization_is_batch_norm_without_affine():
    ours, theirs = Standardize(5), nn.BatchNorm1d(5, affine=False, eps=1e-6)
    for seed in range(3):
        x = 3 + 2 * torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
    assert torch.isfinite(Standardize(5)(x[:1])).all()  # one image has no variance


def standardize_a_part(rank: int, folder: Path) -> dict:
    x = torch.arange(24.0).view(8, 3).square()
    norm = Standardize(3)
    part = norm(x[:5] if rank == 0 else x[5:])
    return {"out": part, "mean": norm.running_mean, "var": norm.running_var}


def test_statistics_are_of_all_processes(tmp_path):
    x, norm = torch.arange(24.0).view(8, 3).square(), Standardize(3)
    run_ranks([standardize_a_part], 2, tmp_path)
    found = [each["standardize_a_part"] for each in results_of(tmp_path)]
    assert torch.allclose(torch.cat([each["out"] for each in found]), norm(x), atol=1e-6)
    for each in found:
        assert torch.allclose(each["mean"], norm.running_mean)
        assert torch.allclose(each["var"], norm.running_var)


def network_of(heads: int = 3) -> SweepNetwork:
    torch.manual_seed(0)
    return SweepNetwork(tiny.classifier(stem_stride=1, num_classes=3).eval(), heads)


def test_heads_start_alike_and_the_backbone_is_frozen():
    network = network_of()
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names == [f"sweep.heads.{n}.{part}" for n in range(3) for part in ("weight", "bias")]
    images = torch.randn(4, 3, 16, 16)
    before = {name: value.clone() for name, value in network.network.named_parameters()}
    outputs = network.train()(images)
    assert outputs.shape == (4, 3, 3)
    assert torch.equal(outputs[:, 0], outputs[:, 2])
    outputs.sum().backward()
    assert all(p.grad is None for p in network.network.parameters())
    after = dict(network.network.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("opt", ["lars", "sgd"])
def test_each_head_trains_as_if_it_were_alone(opt):
    """One with a high learning rate would disturb the others, by a norm or by its loss."""
    rates = (0.5, 5.0, 50.0)
    features = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 4

    def trained(some: tuple[float, ...]) -> list[torch.Tensor]:
        torch.manual_seed(2)
        network = nn.Module()
        network.sweep = sweep = LinearSweep(6, 4, len(some))
        words = ["--opt", opt, "--linear_probe_blr", *map(str, some)]
        args = linear_probe.optimizer_flags(parsed(*words))
        optimizer = build_optimizer(args, network, lr=args.blr)
        for group in optimizer.param_groups:
            group["lr"] = args.blr * group["lr_scale"]
        loss = SweepLoss(Criterion(), len(some))
        for batch in features:
            optimizer.zero_grad()
            loss(sweep(batch), labels).backward()
            optimizer.step()
        return [head.weight.detach() for head in sweep.heads]

    together = trained(rates)
    for rate, weight in zip(rates, together, strict=True):
        assert torch.allclose(trained((rate,))[0], weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_loss_is_the_median_of_the_heads_and_its_gradient_that_of_their_sum():
    """The sum of seven heads, some with too high a rate, was next to the test loss of one."""
    outputs, labels = torch.randn(8, 3, 4), torch.arange(8) % 4
    heads = [each.clone().requires_grad_() for each in outputs.unbind(1)]
    losses = [Criterion()(head, labels) for head in heads]
    torch.stack(losses).sum().backward()
    outputs.requires_grad_()
    loss = SweepLoss(Criterion(), 3)(outputs, labels)
    loss.backward()
    assert loss.item() == torch.stack(losses).median().item()
    assert all(torch.equal(outputs.grad[:, n], head.grad) for n, head in enumerate(heads))


def test_lars_adapts_weights_and_not_biases():
    """As in MAE; without weight decay timm's lars would be plain SGD."""
    args = linear_probe.optimizer_flags(parsed("--linear_probe_blr", "1", "4"))
    optimizer = build_optimizer(args, network_of(2), lr=4.0)
    groups = [(group["lr_scale"], group["always_adapt"]) for group in optimizer.param_groups]
    assert groups == [(0.25, True), (0.25, False), (1.0, True), (1.0, False)]
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    args = linear_probe.optimizer_flags(parsed("--opt", "lars(always_adapt=False)"))
    optimizer = build_optimizer(args, network_of(len(args.linear_probe_blr)), lr=4.0)
    assert not any(group["always_adapt"] for group in optimizer.param_groups)


def test_diverged_head_does_not_end_the_others():
    torch.manual_seed(0)
    sweep = LinearSweep(6, 4, 2)
    with torch.no_grad():
        sweep.heads[1].weight.fill_(torch.inf)
    loss = SweepLoss(Criterion(), 2)(sweep(torch.randn(8, 6)), torch.arange(8) % 4)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in sweep.parameters())
    assert sweep.heads[0].weight.grad.abs().sum() > 0


def test_diverged_head_is_never_the_best():
    """Its outputs were taken for zeros in evaluation: the answer was class 0 for all images."""
    network = network_of().eval()
    metrics = SweepMetrics(Metrics(["acc1"], outputs=3), network, (1.0, 9.0))
    network.sweep.heads = network.sweep.heads[:2]
    with torch.no_grad():
        network.sweep.heads[1].weight.fill_(torch.inf)
        network.sweep.heads[0].bias[1] = 9.0  # answers class 1, and all images are of class 0
    metrics.reset(CPU)
    with torch.no_grad():
        outputs = network(torch.randn(8, 3, 16, 16))
    assert not outputs[:, 1].isfinite().all()
    losses = torch.ones(8, 2)
    metrics.update(outputs, torch.zeros(8, dtype=torch.int64), losses, torch.ones_like(losses))
    metrics.reduce()
    assert (values := metrics.values())["best_blr"] == 1.0
    assert values["acc1"] == 0.0
    assert all(p.isfinite().all() for p in network.network.state_dict().values())
    with torch.no_grad():
        network.sweep.heads[0].bias.fill_(torch.nan)
    with pytest.raises(UserError, match="all heads of --linear_probe have diverged; give lower"):
        metrics.values()


def test_best_head_is_folded_into_the_classifier():
    network = network_of().train()
    with torch.no_grad():
        for number, head in enumerate(network.sweep.heads):
            head.weight.normal_(generator=torch.Generator().manual_seed(number))
            head.bias.fill_(number)
    network(5 + 3 * torch.randn(16, 3, 16, 16))  # running statistics
    network.eval()
    images = torch.randn(4, 3, 16, 16)
    expected = network(images)
    network.sweep.choose(2)
    ordinary = tiny.classifier(stem_stride=1, num_classes=3).eval()
    ordinary.load_state_dict(network.network.state_dict())
    ordinary = ordinary(images)
    assert torch.allclose(ordinary, expected[:, 2], atol=1e-4)
    again = network(images)  # in another order, the best first
    assert torch.equal(again, expected[:, [2, 0, 1]])
    other = network_of()
    other.sweep.load_state_dict(network.sweep.state_dict())
    assert other.eval().sweep.order() == [2, 0, 1]  # as a resumed run


def test_metrics_are_those_of_each_head_by_hand():
    network = network_of(2)
    metrics = SweepMetrics(Metrics(["acc1"], outputs=3), network, (0.1, 1.0))
    loss, labels = SweepLoss(Criterion(), 2), torch.tensor([0, 1, 2, 0])
    right = 9.0 * nn.functional.one_hot(labels, 3)
    wrong = right.roll(1, 0)  # one of four is right
    outputs = torch.stack([wrong, right], 1)
    metrics.reset(CPU, len(loss.terms))
    metrics.update(outputs, labels, *loss.per_image(outputs, labels))
    assert metrics.reduce() == (4, 0)
    found = metrics.values()
    assert (found["acc1"], found["best_blr"]) == (100, 1.0)
    assert (found["acc1_blr0.1"], found["acc1_blr1"]) == (25, 100)
    assert found["loss"] == pytest.approx(Criterion()(right, labels).item(), abs=1e-6)
    assert network.sweep.order() == [1, 0]
    metrics.reset(CPU, len(loss.terms))  # the best head comes first from now on
    outputs = torch.stack([right, torch.full_like(wrong, torch.nan)], 1)
    metrics.update(outputs, labels, *loss.per_image(outputs, labels))
    assert metrics.reduce() == (4, 0)  # one head alone is unusable
    found = metrics.values()
    assert (found["acc1_blr0.1"], found["acc1_blr1"]) == (0, 100)
    assert (metrics.best, metrics.lower_is_better) == ("acc1", False)


def test_lowest_is_the_best_of_a_loss_and_nan_is_never():
    network = network_of(3)
    metrics = SweepMetrics(Metrics(["acc1"], best="loss", outputs=3), network, (1, 2, 3))
    for each, value in zip(metrics.heads, (float("nan"), 2.0, 1.0), strict=True):
        each.values = lambda value=value: {"loss": value}
    assert metrics.values()["best_blr"] == 3


def test_hooks_see_the_outputs_of_the_best_head():
    """They expect (N, K)."""
    network, seen = network_of(3).eval(), []
    network.sweep.choose(1)
    batch = torch.randn(4, 3, 16, 16), torch.arange(4) % 3, torch.arange(4)
    reporter = type("R", (), {"begin_phase": lambda *a: None, "end_phase": lambda s, v: v})()
    reporter.after_evaluated = seen.append
    metrics = SweepMetrics(Metrics(outputs=3), network, (1, 2, 3))
    evaluate([batch], network, CPU, "none", SweepLoss(Criterion(), 3), metrics, reporter)
    assert (seen[0].outputs.shape, seen[0].loss.shape) == ((4, 3), (4, 1))


def test_checkpoints_without_an_evaluation_have_a_trained_head(tmp_path):
    """The classifier was the random one until the first evaluation."""
    train(tmp_path, *SGD, "--eval_freq", "2")
    assert "test_acc1" not in log(tmp_path)[0]
    done = run("main_finetune.py", *FINETUNE, "--eval", "--resume", tmp_path / "checkpoint-0.pth")
    assert float(re.search(r"top-1 ([\d.]+)%", done.stdout)[1]) > 50


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Linear(10, 3, bias=False), None])
def test_network_without_a_linear_classifier_is_refused(layer):
    model = tiny.classifier(num_classes=3)
    model.head_prefixes = ("head.",) if layer else ()
    model.head = layer or nn.Identity()
    with pytest.raises(
        UserError, match=r"--linear_probe: the classifier of .* expected one Linear"
    ):
        SweepNetwork(model, 2)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    train(folder, *SGD)
    return folder


def test_log_has_each_head_and_the_best(probed):
    for entry in log(probed):
        heads = [entry[f"test_acc1_blr{rate}"] for rate in ("0.5", "5", "50")]
        assert entry["test_acc1"] == max(heads)
        assert entry[f"test_acc1_blr{entry['test_best_blr']:g}"] == max(heads)
    assert log(probed)[-1]["test_acc1"] > 100 / 3


def test_checkpoint_is_an_ordinary_classifier(probed, tmp_path):
    best = probed / "checkpoint-best.pth"
    model = tiny.classifier(stem_stride=1, num_classes=3)
    model.load_state_dict(weights(best))
    state = torch.load(best, weights_only=True)["state"]
    done = run("main_finetune.py", *FINETUNE, "--eval", "--resume", probed)
    assert f"top-1 {state['best']['best']:.2f}%" in done.stdout
    words = [*FINETUNE, "--finetune", best, "--lr", 0, "--min_lr", 0, "--weight_decay", 0]
    run("main_finetune.py", *words, "--epochs", 1, "--output_dir", tmp_path)
    kept = weights(tmp_path / "checkpoint-0.pth")
    assert all(torch.equal(kept[name], value) for name, value in weights(best).items())


def test_backbone_is_that_of_the_pretraining_and_the_head_is_new(tmp_path):
    run("main_pretrain.py", *PRETRAIN, "--epochs", 1, "--output_dir", tmp_path / "pre")
    train(tmp_path / "probe", *SGD, "--finetune", str(tmp_path / "pre"), "--epochs", "1")
    before, after = (weights(tmp_path / name / "checkpoint-0.pth") for name in ("pre", "probe"))
    assert torch.equal(
        after["stages.0.0.dwconv.weight"], before["encoder.stages.0.0.dwconv.weight"]
    )
    trained = tmp_path / "probe" / "checkpoint-0.pth"
    train(tmp_path / "again", *SGD, "--finetune", str(trained), "--epochs", "1")
    assert log(tmp_path / "again") == log(tmp_path / "probe")  # the old head is not used


def test_interrupted_probe_ends_with_the_same_bits(probed, tmp_path):
    with pytest.raises(Preempted):
        train(tmp_path, *SGD, "--max_minutes", "1e-9")
    assert list(tmp_path.glob("checkpoint-*-seen-*.pth"))
    train(tmp_path, *SGD)
    ours, theirs = (
        torch.load(f / "checkpoint-1.pth", weights_only=True) for f in (tmp_path, probed)
    )
    for part in ("model", "loss"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], x) for name, x in theirs[part].items())
    assert log(tmp_path) == log(probed)


@pytest.mark.parametrize(
    ("words", "metric", "better"),
    [("", "map", max), ("--task regression --label_column x y", "rmse", min)],
)
def test_other_labels_have_their_metrics_in_their_units(words, metric, better, tmp_path):
    lines = ["image,tags,x,y,split"]
    for number in range(20):
        red, green = 12 * number, 200 * (number % 2)
        Image.new("RGB", (16, 16), (red, green, 0)).save(tmp_path / f"{number}.png")
        tags = "|".join(["red"] * (red > 120) + ["green"] * (green > 0))
        split = "train" if number % 5 else "val"
        lines.append(f"{number}.png,{tags},{1000 + number},{number % 2},{split}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = ["--data_set", "auto", "--data_path", str(tmp_path / "t.csv")]
    (*_, entry) = train(tmp_path / "run", *data, *words.split(), *SGD, "--hook", "predictions")
    heads = [entry[f"test_{metric}_blr{rate}"] for rate in ("0.5", "5", "50")]
    assert entry[f"test_{metric}"] == better(heads)
    done = run("main_finetune.py", *FINETUNE, *data, "--eval", "--resume", tmp_path / "run")
    assert (
        f"{metric} {better(e[f'test_{metric}'] for e in log(tmp_path / 'run')):.4g}" in done.stdout
    )
    if metric == "rmse":  # of numbers around 1000
        rows = (tmp_path / "run" / "predictions.csv").read_text()
        assert len(re.findall(r"\b(9|10)\d\d\.", rows)) >= 4


@pytest.mark.slow
def test_two_processes_give_the_same_heads(tmp_path):
    words = [*PROBE, *SGD, "--model", "tests.tiny:classifier64", "--data_set", "tests.tiny:even"]
    for ranks, batch in ((1, 8), (2, 4)):
        more = ["--batch_size", batch, "--output_dir", tmp_path / str(ranks)]
        run("main_finetune.py", *words, *more, ranks=ranks)
    one, two = (torch.load(tmp_path / n / "checkpoint-1.pth", weights_only=True) for n in "12")
    for part in ("model", "loss"):
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], atol=1e-5), name
    ours, theirs = log(tmp_path / "1")[-1], log(tmp_path / "2")[-1]
    assert {k: v for k, v in ours.items() if "acc1" in k and "test" in k} == {
        k: v for k, v in theirs.items() if "acc1" in k and "test" in k
    }


# --- flags --------------------------------------------------------------------------------------


def test_implied_flags_are_those_of_mae():
    args = options.parse(options.finetune_parser(), ["--data_set", "DIGITS", "--linear_probe"])
    found = {name: getattr(args, name) for name in ("opt", "epochs", "warmup_epochs", "aa")}
    assert found == {"opt": "lars", "epochs": 90, "warmup_epochs": 10, "aa": None}
    assert (args.weight_decay, args.reprob, args.smoothing, args.min_lr) == (0, 0, 0, 0)
    assert (args.freeze_backbone, args.blr) == (True, max(linear_probe.RATES["lars"]))
    given = parsed("--weight_decay", "0.1", "--opt", "sgd", "--linear_probe_blr", "3", "2")
    assert (given.weight_decay, given.opt, given.linear_probe_blr) == (0.1, "sgd", (3, 2))
    assert given.blr == 3


def test_flags_of_the_run_give_the_same_run(tmp_path):
    args = parsed(*SGD, "--output_dir", "none")
    (tmp_path / "args.yaml").write_text(options.dump_args(args))
    again = options.parse(options.finetune_parser(), ["--config", str(tmp_path / "args.yaml")])
    assert vars(again) | {"config": None} == vars(args)
    evaluated = ["--config", str(tmp_path / "args.yaml"), "--eval", "--resume", "x"]
    assert options.parse(options.finetune_parser(), evaluated).eval


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--mixup 0.8", "--mixup cannot be combined"),
        ("--cutmix 1", "--cutmix cannot be combined"),
        ("--layer_decay 0.6", "the heads are the only layers that train"),
        ("--model_ema", "--model_ema cannot be combined"),
        ("--head mlp", "--head cannot be combined"),
        ("--param_group head:lr=1", "learning rates of their own"),
        ("--lr 0.1", "--lr: with --linear_probe give --linear_probe_blr"),
        ("--blr 0.1", "--blr: with --linear_probe give --linear_probe_blr"),
        ("--freeze_backbone false", "--freeze_backbone false: --linear_probe trains heads"),
        ("--linear_probe_blr 1 1", "expected each learning rate once"),
        ("--linear_probe_blr 0", "expected a number >0"),
        ("--clip_grad 1", "--clip_grad cannot be combined"),
        ("--disable_eval", "the evaluation chooses the best head"),
        ("--compile", "--compile cannot be combined"),
        ("--sync_bn", "--linear_probe true and --sync_bn"),
        ("--shard zero1", "use --shard ddp"),
        ("--eval_data_path a=x,b=y", "one evaluation set"),
        ("--linear_probe false --linear_probe_blr 1", "needs --linear_probe true"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, problem, capsys):
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert re.search(problem, capsys.readouterr().err)


def test_loss_with_parameters_is_refused(tmp_path):
    with pytest.raises(UserError, match="would share"):
        train(tmp_path, "--loss", "tests.tiny:Temperature")


def test_resumed_probe_keeps_its_heads(probed):
    with pytest.raises(UserError, match="--linear_probe_blr"):
        train(probed, "--opt", "sgd", "--linear_probe_blr", "1", "2")


def test_command_of_the_page_probes(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "finetuning.md"
    section = page.read_text(encoding="utf-8").partition("## Linear probe")[2].partition("\n## ")[0]
    (command,) = re.findall(r"python main_finetune.py (--linear_probe.*?)\n```", section, re.DOTALL)
    words = command.replace("\\\n", " ").split()
    args = options.parse(options.finetune_parser(), words)
    assert args.linear_probe
    run("main_pretrain.py", *PRETRAIN, "--epochs", 1, "--output_dir", tmp_path / "runs/photos")
    place = ["--data_set", "tests.tiny:colors", "--finetune", str(tmp_path / "runs/photos")]
    small = ["--model", "tests.tiny:classifier", "--epochs", "1", "--device", "cpu"]
    small += ["--batch_size", "6", "--num_workers", "0", "--log_dir", "none"]
    small += ["--output_dir", str(tmp_path / "probe")]
    with fakes.logged():
        main_finetune.main(options.parse(options.finetune_parser(), [*words, *place, *small]))
    assert json.loads((tmp_path / "probe" / "log.txt").read_text())["test_best_blr"] > 0
