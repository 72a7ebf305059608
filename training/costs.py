# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Cost of a network: parameters, multiply-adds and activations, of the whole and of each module.

python main_finetune.py --data_set DIGITS --model convnextv2_atto --hook "costs(depth=2)"
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from config.sizes import describe_size, sizes_by_epoch
from errors import UserError, first_line
from models.fcmae import visible_patches
from models.parts import evaluating
from parallel.process_group import get_logger
from training.hooks import Hook, Run
from training.log_files import at_least
from training.speed import find_peak

aten = torch.ops.aten
# Convolutions and matrix products: their outputs are the activations of "Designing Network Design
# Spaces" (arXiv 2003.13678), which predict the time on a GPU better than multiply-adds.
COUNTED = (aten.convolution, aten._convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm)


class ActivationCounter(TorchDispatchMode):
    """Counts the elements of the outputs of convolutions and matrix products, by module.

    counts: by name, with the root's under Global, as in FlopCounterMode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.modules = ModuleTracker()

    def __enter__(self) -> "ActivationCounter":
        self.modules.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.modules.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in COUNTED:
            for name in self.modules.parents:
                self.counts[name] += output.numel()
        return output


@torch.no_grad()
def measure(model: nn.Module, in_chans: int, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """(multiply-adds, activations) of one image by name of a module; Global is the whole model."""
    flops, activations = FlopCounterMode(display=False), ActivationCounter()
    image = torch.zeros(1, in_chans, *size, device=next(model.parameters()).device)
    with evaluating(model), flops, activations:
        model._call_impl(image)  # not as compiled
    macs = {name: sum(ops.values()) // 2 for name, ops in flops.get_flop_counts().items()}
    names = {**macs, **activations.counts}
    return {name: (macs.get(name, 0), activations.counts[name]) for name in names}


def cost_table(model: nn.Module, in_chans: int, size: tuple[int, int], depth: int) -> list[str]:
    """Return the lines of a table of modules whose names have at most `depth` parts."""
    costs = measure(model, in_chans, size)
    costs = {name.removeprefix(f"{type(model).__name__}."): cost for name, cost in costs.items()}

    def cost_of(name: str, module: nn.Module) -> tuple[int, int]:
        """Return the cost of a module; of a container, which is not called, that of its parts."""
        if name in costs:
            return costs[name]
        parts = [cost_of(f"{name}.{part}", child) for part, child in module.named_children()]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    rows = [("module", "parameters", "MACs", "activations")]
    for name, module in model.named_modules():
        if name.count(".") < depth:
            macs, activations = cost_of(name, module) if name else costs["Global"]
            numbers = (sum(p.numel() for p in module.parameters()), macs, activations)
            if any(numbers):
                rows.append((name or "(all)", *(f"{number:,}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


class CostsHook(Hook):
    """Log a table of the modules' parameters, multiply-adds and activations before training.

    depth: parts of a module's name, such as 2 for `stages.0`.
    """

    def __init__(self, depth: int = 2) -> None:
        self.depth = at_least(depth, 1, "costs(depth)")

    def check(self, args: Any) -> None:
        if args.shard == "fsdp":
            raise UserError("--hook costs cannot run one rank's shard; use --shard ddp or zero1")

    def on_start(self, run: Run) -> None:
        for line in cost_table(run.model, run.args.in_chans, run.args.input_size, self.depth):
            get_logger().info("%s", line)


def _count_text(count: int) -> str:
    """Return `3.71M`; numbers under 100,000 in full."""
    return f"{count / 1e6:.2f}M" if count >= 100_000 else f"{count:,}"


def log_cost(args: Any, model: torch.nn.Module) -> int:
    """Log the number of parameters and the GMACs per image; returns the number of parameters.

    UserError if the network takes images of the last size alone, so that this is found at once.
    """
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - parameters
    count = f"{_count_text(parameters + frozen)} parameters"
    count += f" ({_count_text(parameters)} trained)" if frozen else ""
    *earlier, last = sizes_by_epoch(args).values()
    macs = {last: measure(model, args.in_chans, last)["Global"][0]}
    for size in earlier:
        try:
            macs[size] = measure(model, args.in_chans, size)["Global"][0]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--input_size {args.input_sizes}: --model {args.model} takes no images of "
                f"{describe_size(size)} ({first_line(error)}); give one size, or another --model"
            ) from error
    costs = [f"{macs[h, w] / 1e9:.3f} GMACs per {h}x{w} image" for h, w in (*earlier, last)]
    get_logger().info("%s: %s, %s", args.model, count, ", ".join(costs))
    return parameters


def training_flops(args: Any, model: nn.Module) -> dict[int, float] | None:
    """Return the FLOPs of training on one image, by the first epoch of each image size.

    Three times the forward pass, since backward computes the gradients of inputs and of weights;
    of a masked autoencoder, what it computes of the visible patches, and its decoder. What is
    computed again with --grad_checkpointing does not count. None if the peak of the device is not
    known, if parts are frozen, and if the network does not run without data. It is counted on a
    copy without memory, in torch's own operations, so that no kernel hides any.
    """
    parameters = list(model.parameters())
    frozen = vars(args).get("freeze") or not all(p.requires_grad for p in parameters)
    if frozen or find_peak(args, parameters[0].device) is None:
        return None
    try:
        empty = without_memory(model)
        sizes = sizes_by_epoch(args).items()
        macs = {epoch: measure(empty, args.in_chans, size)["Global"][0] for epoch, size in sizes}
    except Exception as error:  # of any library, or a user's
        text = "%s: mfu is not known, since its FLOPs cannot be counted (%s)"
        get_logger().info(text, args.model, first_line(error))
        return None
    return {epoch: 3.0 * 2 * count for epoch, count in macs.items()}


def without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, which allocates nothing."""
    replaced: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        replaced[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, replaced)


def log_masks(args: Any, model: nn.Module) -> tuple[int, int]:
    """Log how many patches of an image are visible, for each size.

    Returns (all, visible) of the last size. model: FCMAE or another masked autoencoder.
    """
    sizes = sizes_by_epoch(args).values()
    for size in sizes:
        h, w = model.grid_size(*size)
        patches, visible = h * w, visible_patches(h * w, args.mask_ratio)
        which = "{} x {} pixels: ".format(*size) * (len(sizes) > 1)
        text = "%s%d of %d patches visible: mask ratio %.3f"
        get_logger().info(text, which, visible, patches, 1 - visible / patches)
    return patches, visible
