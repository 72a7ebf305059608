# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Several linear heads on the frozen features of a network, each trained as if it were alone.

python -c "from models.sweep import LinearSweep; print(LinearSweep(8, 3, 4))"
"""

from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, first_few
from models.parts import find_classifier
from parallel.process_group import all_reduce_sum

STD = 0.01  # of the initial weights, as in MAE


class Standardize(nn.Module):
    """BatchNorm without affine over the batches of all processes: (N, D) -> (N, D).

    So the result does not depend on the number of processes. Nothing is learned before it, so it
    has no backward pass.
    """

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.running_mean) * self.scale().to(x.dtype)
        exact = x if x.device.type == "mps" else x.double()  # which has no float64
        count = exact.new_full((exact.shape[1],), len(exact))
        sums = all_reduce_sum(torch.stack([count, exact.sum(0), exact.square().sum(0)]))
        count, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        var = (square - mean.square()).clamp(min=0)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        unbiased = var * count / (count - 1).clamp(min=1)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return ((exact - mean) * (var + self.eps).rsqrt()).to(x.dtype)

    def scale(self) -> Tensor:
        """Factor of the features in evaluation, (D,)."""
        return (self.running_var + self.eps).rsqrt()


class LinearSweep(nn.Module):
    """Linear heads with equal initial weights on standardized features.

    (N, D) -> (N, heads, K), the best head of the last evaluation first, then those after it, and
    those before it at the end.
    """

    def __init__(self, dim: int, num_classes: int, heads: int) -> None:
        super().__init__()
        weight = nn.init.trunc_normal_(torch.empty(num_classes, dim), std=STD)
        self.norm = Standardize(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        for head in self.heads:  # whose number does not change the weights
            nn.init.zeros_(head.bias)
            head.weight.data.copy_(weight)
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))
        self.first = 0  # `best` on the host

    def train(self, mode: bool = True) -> "LinearSweep":
        self.first = int(self.best)  # which a checkpoint may have set
        return super().train(mode)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features)
        return torch.stack([self._logits(number, x) for number in self.order()], 1)

    def _logits(self, number: int, x: Tensor) -> Tensor:
        """(N, D) -> (N, K); in training zeros, without a gradient, if the head has diverged.

        Its NaN would end the training of the others.
        """
        logits = self.heads[number](x)
        if not self.training:
            return logits
        return torch.where(torch.isfinite(logits).all(), logits, torch.zeros_like(logits))

    def order(self) -> list[int]:
        """Return the numbers of the heads in the order of the outputs."""
        count = len(self.heads)
        return [(self.first + number) % count for number in range(count)]

    def finite(self) -> list[bool]:
        """Return for each head whether all of its weights are finite."""
        return [all(p.isfinite().all().item() for p in head.parameters()) for head in self.heads]

    @torch.no_grad()
    def choose(self, best: int) -> None:
        """Make a head the best one."""
        self.first = best
        self.best.fill_(best)

    @torch.no_grad()
    def fold(self, classifier: nn.Linear) -> None:
        """Copy the best head into a classifier, together with the standardization."""
        head, scale = self.heads[self.first], self.norm.scale()
        weight = head.weight * scale.to(head.weight)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(head.bias - weight @ self.norm.running_mean.to(weight))


class SweepNetwork(nn.Module):
    """A frozen classifier and a sweep of heads in its place: images -> (N, heads, K).

    `network` stays an ordinary classifier: its state dict has the best head as the last layer.
    """

    def __init__(self, network: nn.Module, heads: int) -> None:
        """network: on its device, with its weights; all of it is frozen, in evaluation mode."""
        super().__init__()
        self.network, self.classifier_path = network, _find_linear(network)
        classifier = self.classifier
        network.requires_grad_(False)
        network.trained_parts = ()  # see `training_mode`
        self.sweep = LinearSweep(classifier.in_features, classifier.out_features, heads)
        self.sweep.to(classifier.weight.device)
        self.sweep.to(torch.promote_types(classifier.weight.dtype, torch.float32))
        self.kept: list[Tensor] = []
        classifier.register_forward_pre_hook(self._keep)
        network.register_state_dict_pre_hook(self._fold)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer of the network."""
        return self.network.get_submodule(self.classifier_path)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.kept = [inputs[0].detach()]

    def _fold(self, *_: Any) -> None:
        self.sweep.fold(self.classifier)

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D), the input of the classifier."""
        with torch.no_grad():
            self.network(images)
        features = self.kept.pop()
        if features.ndim != 2:
            raise UserError(
                f"--linear_probe: the classifier of {type(self.network).__name__} gets features of "
                f"shape {tuple(features.shape)}, expected (N, D); use --freeze_backbone"
            )
        return features

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.sweep(features.to(self.sweep.heads[0].weight.dtype))


def _find_linear(network: nn.Module) -> str:
    """Return the path of a network's only classifier; UserError if it is no plain Linear."""
    paths = [prefix[:-1] for prefix in find_classifier(network)]
    layers = [network.get_submodule(path) for path in paths]
    if len(layers) == 1 and type(layers[0]) is nn.Linear and layers[0].bias is not None:
        return paths[0]
    kinds = first_few(type(layer).__name__ for layer in layers) or "not found"
    raise UserError(
        f"--linear_probe: the classifier of {type(network).__name__} is {kinds}, expected one "
        "Linear with a bias; use --freeze_backbone"
    )
