# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A trained network with its flags, class names and loss, from any checkpoint.

python predict.py runs/finetune photos
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import models
from config.flags import is_code, is_pretraining, library_of
from config.tasks import TASKS
from config.tool_flags import OF_FILES
from data_loading.labels import IMAGENET, Head, imagenet_classes
from errors import UserError
from models.heads import implied_activation
from models.parts import find_classifier
from parallel.process_group import get_logger
from training.checkpoint import restore_loss
from training.criterion import build_criterion
from training.setup import check_start, check_task, read_weights, settle_task
from weights.convert import unwrap
from weights.fit import fit_weights
from weights.library import read_library_weights
from weights.pretrained import Pretrained
from weights.saved_run import inherit_flags


@dataclass(frozen=True)
class TrainedModel:
    """A network in evaluation mode.

    flags: of main_finetune.py --eval, with those of the checkpoint. head: what the checkpoint says
    about its outputs. names: of the classes or numbers, to show; None if unknown. kind: of targets.
    """

    flags: Any
    network: nn.Module
    weights: Pretrained
    head: Head
    names: Sequence[str] | None
    kind: str
    criterion: Any

    @property
    def activation(self) -> str:
        """The function that turns outputs into probabilities: softmax, sigmoid or identity."""
        return "sigmoid" if self.kind == "multi" else implied_activation(self.flags.loss or "ce")


def read_source(flags: Any, source: str) -> Pretrained:
    """Read a checkpoint, or the weights that a library publishes for `timm:NAME`."""
    if not library_of(source):
        return read_weights(flags, source, flags.sha256)
    if wrong := [name for name in OF_FILES if name in flags.typed]:
        raise UserError(f"--{wrong[0]} is for files, and {source} is a name; drop it")
    return read_library_weights(source, flags.input_size if "input_size" in flags.given else None)


def load_trained(flags: Any, source: str, device: torch.device) -> TrainedModel:
    """Load a classifier, or a network that predicts numbers; UserError if it has no head."""
    weights = read_source(flags, source)
    saved = weights.saved
    if is_pretraining(saved.flags) or has_decoder(weights):
        raise UserError(_without_head(weights.path))
    flags = inherit_flags(flags, saved)
    check_task(flags)
    kind = TASKS.get(flags.task) or saved.head.kind or "class"
    count = saved.head.count or count_outputs(flags, weights)
    check_start(flags, weights, count, new=())
    flags = settle_task(flags, kind)
    network = models.build_classifier(flags, count).to(device)
    weights.load(network, new=())
    criterion = build_criterion(flags, count, device, kind=kind)
    if criterion.state_dict():  # parameters of its own
        restore_loss(weights.checkpoint, weights.path, criterion)
    criterion.eval()
    head = Head(weights.path, saved.head.names, count, kind, saved.head.scale)
    names = name_outputs(weights, head)
    return TrainedModel(flags, network.eval(), weights, head, names, kind, criterion)


def has_decoder(weights: Pretrained) -> bool:
    """Return True for the weights of a masked autoencoder with its decoder."""
    names = {unwrap(name) for name in weights.state}
    return "mask_token" in names and any(name.startswith("pred.") for name in names)


def _without_head(path: str) -> str:
    return (
        f"{path} has no classifier, as after pre-training; fine-tune it first: main_finetune.py "
        f"--finetune {path}. For what its features know see probe.py"
    )


def count_outputs(flags: Any, weights: Pretrained) -> int:
    """Return the number of outputs of a network that is no ConvNeXt, by its last layer."""
    with torch.device("cpu" if is_code(flags.model) else "meta"):
        network = models.build_classifier(flags, 2)
    state, _ = fit_weights(network, weights.state)
    found = [state[f"{n}weight"] for n in find_classifier(network) if f"{n}weight" in state]
    if not found:
        raise UserError(_without_head(weights.path))
    return len(found[0])


def name_outputs(weights: Pretrained, head: Head) -> Sequence[str] | None:
    """Return the names of classes; ImageNet's for published weights of 1000 classes without."""
    if head.names is not None or head.kind == "number":
        return head.names
    held: Mapping[str, Any] = weights.checkpoint if isinstance(weights.checkpoint, dict) else {}
    if head.count == IMAGENET and "outputs" not in held:  # which runs of this toolkit store
        get_logger().info("%s stores no class names; those of ImageNet are shown", weights.path)
        return imagenet_classes()
    text = "%s stores no class names; their numbers are shown, 0 to %d"
    get_logger().warning(text, weights.path, head.count - 1)
    return None
