# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The loss of a network with several heads: the sum of their losses.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --input_size 32 \\
    --heads "main=linear@norm, aux=conv@stages.2" --loss "main=focal(gamma=2), aux=0.4*ce"
"""

import functools
import operator
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from config.calls import is_named, parse_named
from errors import UserError, first_few
from models.heads import parse_heads

Outputs = Tensor | Mapping[str, Tensor]  # of a network; of several heads in training, by name


class HeadLosses(nn.Module):
    """Sum of the losses of several heads: ({name: outputs}, targets) -> a scalar.

    losses: a `Criterion` for each head, by name, the evaluated head first. Of a tensor, as in
    evaluation, it is the loss of the first head; so is `per_image`.
    """

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.main = next(iter(losses))

    @property
    def terms(self) -> nn.ModuleList:
        """Losses whose sum is the loss of the first head."""
        return self.losses[self.main].terms

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.losses[self.main](outputs, targets)
        losses = [loss(outputs[name], targets) for name, loss in self.losses.items()]
        return functools.reduce(operator.add, losses)

    def per_image(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the first head; see `Criterion.per_image`."""
        return self.losses[self.main].per_image(outputs, targets)


def main_output(outputs: Outputs) -> Tensor:
    """Return the output of the head that is evaluated, the first one.

    outputs: (N, K), those of several heads by name, or (N, heads, K) of a linear probe.
    """
    if isinstance(outputs, Tensor):
        return outputs[:, 0] if outputs.ndim == 3 else outputs
    return next(iter(outputs.values()))


def losses_by_head(args: Any, text: str, early: bool = False) -> dict[str, str]:
    """Return the text of the loss of each head; {} if there is one loss for the only head.

    text: of --loss. UserError unless it is one loss for all heads, or one for each. early: heads
    may still come from a checkpoint that is not yet read.
    """
    heads = [*parse_heads(args.heads)] if vars(args).get("heads") else []
    if not is_named(text):
        return dict.fromkeys(heads, text) if len(heads) > 1 else {}
    losses = parse_named(text, "--loss")
    later = early and not args.head and (args.eval or args.resume or args.output_dir)
    if not heads and not later:
        raise UserError(
            f"--loss {text}: got losses for {first_few(losses)}, and there are no heads of "
            "that name; give --heads, or one loss without a name"
        )
    return {name: losses[name] for name in _matched(heads or losses, losses)}


def _matched(heads: Collection[str], losses: Mapping[str, str]) -> Collection[str]:
    """Return the names of the heads, the evaluated one first; UserError if losses differ."""
    lacking = [name for name in heads if name not in losses]
    unknown = [name for name in losses if name not in heads]
    problems = [f"no head is called {first_few(unknown)}; the heads are {first_few(heads, 9)}"]
    problems = problems if unknown else []
    if lacking:
        problems.append(
            f"no loss for the head {first_few(lacking)}; add {lacking[0]}=ce, or give one loss for "
            "all heads"
        )
    if problems:
        raise UserError(f"--loss: {'; '.join(problems)}")
    return heads
