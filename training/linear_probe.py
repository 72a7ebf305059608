# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Loss and metrics of --linear_probe: those of each head, and of the best one.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --input_size 32 --linear_probe
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from config.linear_probe import is_on
from data_loading.rng import seed_all
from errors import UserError, first_few, plural
from models.sweep import SweepNetwork
from parallel.process_group import get_logger
from training.evaluation import Metrics
from training.meters import is_better


class SweepLoss(nn.Module):
    """Median of the losses of all heads, (N, heads, K) and targets -> a scalar.

    A mean would show those whose rate is too high. Its gradient is that of their sum: heads share
    nothing that is trained, so each gets that of its own loss. (N, K) of an ordinary classifier, as
    in a rerun of a bad step, have the loss of one head.
    """

    def __init__(self, criterion: nn.Module, heads: int) -> None:
        """criterion: of one head, without parameters."""
        super().__init__()
        self.criterion, self.terms = criterion, range(heads)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 2:
            return self.criterion(outputs, targets)
        losses = torch.stack([self.criterion(each, targets) for each in outputs.unbind(1)])
        total = losses.sum()
        return losses.detach().median() + (total - total.detach())  # the last part is 0

    def per_image(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, heads) losses of each image and head, and as many counts; see `Criterion`."""
        pairs = [self.criterion.per_image(each, targets) for each in outputs.unbind(1)]
        losses = torch.stack([losses.sum(1) for losses, _ in pairs], 1)
        return losses, torch.stack([counts.amin(1) for _, counts in pairs], 1)


class SweepMetrics:
    """Metrics of all heads, with the interface of `Metrics`; `values` are those of the best head.

    rates: learning rates of the heads, per 256 images, for their names in log.txt.
    """

    def __init__(self, metrics: Metrics, network: SweepNetwork, rates: tuple[float, ...]) -> None:
        self.one, self.network, self.rates = metrics, network, rates
        self.heads = [copy.deepcopy(metrics) for _ in rates]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.one, name)  # best, lower_is_better, names, kind ...

    def reset(self, device: torch.device | str, terms: int = 1) -> None:
        """Forget all images."""
        for metrics in self.heads:
            metrics.reset(device)

    def in_units(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, heads, K) outputs and targets in the units of the data."""
        pairs = [self.heads[0].in_units(each, targets) for each in logits.unbind(1)]
        return torch.stack([outputs for outputs, _ in pairs], 1), pairs[0][1]

    def update(self, logits: Tensor, targets: Tensor, losses: Tensor, counts: Tensor) -> None:
        """Add a batch: (N, heads, K) outputs, targets, (N, heads) losses and counts."""
        for column, number in enumerate(self.network.sweep.order()):
            part = slice(column, column + 1)
            self.heads[number].update(logits[:, column], targets, losses[:, part], counts[:, part])

    def reduce(self) -> tuple[int, int]:
        """Sum over all ranks; returns the number of images, and of those unusable for all heads."""
        found = [metrics.reduce() for metrics in self.heads]
        return found[0][0], min(broken for _, broken in found)

    def values(self) -> dict[str, Any]:
        """Return the metrics of the best head, its rate, and the best metric of each head.

        It becomes the classifier in checkpoints; heads that have diverged are passed over. Every
        rank must call it. UserError if all have diverged.
        """
        found = [metrics.values() for metrics in self.heads]
        name, best, held, usable = self.one.best, None, None, self.network.sweep.finite()
        for number, values in enumerate(found):
            if usable[number] and is_better(values[name], held, self.one.lower_is_better):
                best, held = number, values[name]
        if best is None and any(usable):  # a metric that is not defined for these images
            best = usable.index(True)
        if best is None:
            raise UserError(
                "all heads of --linear_probe have diverged; give lower rates with "
                "--linear_probe_blr"
            )
        self.network.sweep.choose(best)
        pairs = zip(self.rates, found, strict=True)
        each = {f"{name}_blr{rate:g}": values[name] for rate, values in pairs}
        return found[best] | {"best_blr": self.rates[best]} | each


def build_linear_probe(
    args: Any, model: nn.Module, criterion: nn.Module, metrics: Metrics
) -> tuple[nn.Module, nn.Module, Any, nn.Module]:
    """Return the network to train, its loss, its metrics, and the module that checkpoints add.

    Without --linear_probe these are the model, the criterion, the metrics and the criterion.
    """
    if not is_on(vars(args)):
        return model, criterion, metrics, criterion
    if criterion.state_dict():
        raise UserError(
            f"--loss {args.loss} has parameters of its own, which the heads of --linear_probe "
            "would share; use a loss without"
        )
    rates = args.linear_probe_blr
    seed_all(args.seed)
    network = SweepNetwork(model, len(rates))
    get_logger().info(
        "linear probe: %s on %d frozen features, --opt %s, learning rates per 256 images: %s",
        plural(len(rates), "head"),
        network.classifier.in_features,
        args.opt,
        first_few([f"{rate:g}" for rate in rates], 20),
    )
    loss = SweepLoss(criterion, len(rates))
    return network, loss, SweepMetrics(metrics, network, rates), network.sweep
