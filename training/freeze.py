# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parts of the network that are frozen in some epochs.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --freeze "stages.*:0-1" --dry_run
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError, first_few, plural
from optim_factory import FrozenSpan, check_pattern, matches, parse_freeze
from parallel.process_group import get_logger
from training.stepper import Stepper


class Freezer:
    """Freeze parameters by epoch: no step changes them, and their BatchNorm is in eval mode.

    They still get gradients, so that DistributedDataParallel sees the same parameters in each
    step, but the stepper drops these before it clips: no weight decay, no momentum, no part in the
    norm. What is frozen depends on the epoch alone, so a resumed run needs no state.
    """

    def __init__(
        self, model: nn.Module, stepper: Stepper, spans: Sequence[FrozenSpan], epochs: float
    ) -> None:
        """model: not wrapped. epochs: of the run; it is an error if one trains nothing."""
        self.model, self.stepper, self.spans = model, stepper, spans
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        for span in spans:
            check_pattern("--freeze", span.pattern, self.names)
            if span.first >= epochs:
                text = f"--freeze {span.pattern}:{span.first}- begins after the last epoch"
                raise UserError(f"{text}, --epochs is {epochs:g}; drop it")
        for epoch in {0, *(int(span.last) for span in spans if span.last < epochs)} | {
            span.first for span in spans
        }:
            if len(self.frozen_names(epoch)) == len(self.names):
                text = f"--freeze leaves nothing to train after {plural(epoch, 'epoch')}"
                raise UserError(f"{text}; freeze fewer parameters")

    def patterns(self, epoch: int) -> list[str]:
        """Return the patterns that are frozen after `epoch` finished epochs."""
        return [span.pattern for span in self.spans if span.first <= epoch < span.last]

    def frozen_names(self, epoch: int) -> list[str]:
        """Return the names of the parameters that are frozen after `epoch` finished epochs."""
        patterns = self.patterns(epoch)
        return [name for name in self.names if any(matches(name, p) for p in patterns)]

    def begin_epoch(self, epoch: int) -> None:
        """Freeze what `epoch` freezes; call it after `model.train()`."""
        frozen, patterns = {*self.frozen_names(epoch)}, self.patterns(epoch)
        for name, module in self.model.named_modules():
            own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            named = any(matches(name, pattern) for pattern in patterns)
            if isinstance(module, _BatchNorm) and (named or (own and own <= frozen)):
                module.eval()
        named = self.model.named_parameters()
        if self.stepper.freeze([parameter for name, parameter in named if name in frozen]):
            count = plural(len(frozen), "parameter")
            what = f"{count} frozen ({first_few(patterns)})" if frozen else "nothing is frozen"
            get_logger().info("epoch %d: %s", epoch + 1, what)


def build_freezer(args: Any, model: nn.Module, stepper: Stepper) -> Freezer | None:
    """Build what --freeze asks for, or None."""
    spans = parse_freeze(args.freeze or ())
    return Freezer(model, stepper, spans, args.epochs) if spans else None
