# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Parameter groups with layer decay and rules of the user, optimizers by name.

python -c "import optim_factory; print(optim_factory.scale_lr(None, 5e-4, 1024))"
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config.calls import Call, parse_call, parse_options
from config.flags import default_of
from data_loading.rng import fold_in
from errors import UserError, did_you_mean, first_few, first_line, plural, resolve, sentences
from parallel import sharding
from parallel.process_group import get_logger

INITIAL_STD = 0.02  # of the weights
# Parts of the names of optimizers whose steps do not grow with the gradients.
BOUNDED = ("adam", "adan", "lamb", "lion")
OWN_FLAGS = {"lr", "weight_decay", "momentum", "seed"}  # options with flags of their own
# GRN parameters and the mask token have 4 dimensions, so `ndim <= 1` would miss them. `.gamma` is
# also layer scale in ConvNeXt V1.
NO_WEIGHT_DECAY = (".bias", ".gamma", ".beta", "mask_token")


def scale_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """Return `lr`, or if it is None `blr * effective_batch / 256`."""
    return blr * effective_batch / 256 if lr is None else lr


def choose_update_freq(
    update_freq: int | None,
    effective_batch: int | None,
    batch_size: int,
    world_size: int,
    resumed_batch: int = 0,
) -> int:
    """Gradient accumulation steps: `update_freq`, or as many as `effective_batch` images need.

    resumed_batch: effective batch of the run that is resumed (0 for none). The run keeps it on any
        number of processes unless `effective_batch` is given.
    """
    global_batch, log = batch_size * world_size, get_logger()
    if resumed_batch and resumed_batch != (effective_batch or resumed_batch):
        log.warning("effective batch changes from %d to %d", resumed_batch, effective_batch)
    elif resumed_batch and resumed_batch != global_batch * (update_freq or 1):
        log.warning("effective batch stays %d, as in the run that is resumed", resumed_batch)
    wanted = effective_batch or resumed_batch  # 0: not given
    if wanted % global_batch:
        name = f"--effective_batch {wanted}"
        if not effective_batch:
            name = f"the effective batch {wanted} of the resumed run"
        raise UserError(
            f"{name} is not a multiple of --batch_size {batch_size} x "
            f"{plural(world_size, 'process')} = {global_batch}; "
            f"try {_fitting(wanted, batch_size, world_size)}"
        )
    update_freq = wanted // global_batch or update_freq or 1
    log.info(
        "effective batch %d = %s x %s x %s",
        global_batch * update_freq,
        plural(batch_size, "image"),
        plural(update_freq, "micro-batch"),
        plural(world_size, "process"),
    )
    return update_freq


def _fitting(effective_batch: int, batch_size: int, world_size: int) -> str:
    """Suggest the nearest batch sizes that divide it, or else the nearest effective batches."""
    per_process, rest = divmod(effective_batch, world_size)
    if rest:
        step = batch_size * world_size
        low = effective_batch // step * step
        return f"--effective_batch {low} or {low + step}" if low else f"--effective_batch {step}"
    sizes = [size for size in range(1, per_process + 1) if per_process % size == 0]
    sizes = [size for size in sizes if size % 2 == 0] or sizes  # mixup takes pairs
    below, above = [s for s in sizes if s < batch_size], [s for s in sizes if s > batch_size]
    return f"--batch_size {' or '.join(map(str, below[-1:] + above[:1]))}"


def count_steps(batches: int, update_freq: int) -> int:
    """Optimizer steps in an epoch of `batches` micro-batches; the last may be smaller."""
    if batches < update_freq:
        get_logger().warning(
            "an epoch has %d micro-batches, fewer than the %d of an optimizer step: every step "
            "uses fewer images than its learning rate assumes; lower --effective_batch or "
            "--update_freq",
            batches,
            update_freq,
        )
    return math.ceil(batches / update_freq)


class LayerDecayValueAssigner:
    """Learning-rate scale of a parameter: `decay` to the power of its distance from the head.

    kind: `single` (every block is a layer) or `group` (see `ConvNeXtV2.layer_of`).
    """

    def __init__(self, model: nn.Module, decay: float, kind: str = "single") -> None:
        if not hasattr(model, "layer_of"):
            raise UserError(
                f"--layer_decay {decay} needs a model with a method layer_of(name, kind) that "
                f"returns a parameter's layer; {type(model).__name__} has none: use --layer_decay 1"
            )
        self.model, self.decay, self.kind = model, decay, kind

    def get_layer_id(self, name: str) -> int:
        """Layer of a parameter, counted from the stem, which is 0; heads are the last."""
        is_head = name.startswith(tuple(getattr(self.model, "head_prefixes", ())))  # models.heads
        return self.model.layer_of("head.weight" if is_head else name, self.kind)

    def get_scale(self, layer: int) -> float:
        """Learning-rate scale of a layer; 1 for the head."""
        return self.decay ** (self.get_layer_id("head.weight") - layer)


def matches(name: str, pattern: str) -> bool:
    """True if a pattern such as `head` or `stages.*.norm.bias` fits a name or a module above it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def check_pattern(flag: str, pattern: str, names: Iterable[str]) -> None:
    """Raise UserError if a pattern matches none of the names of parameters."""
    names = list(names)
    if any(matches(name, pattern) for name in names):
        return
    known = {".".join(name.split(".")[:end]) for name in names for end in range(1, 9)}
    hint = did_you_mean(pattern, known)
    top = first_few(dict.fromkeys(name.partition(".")[0] for name in names), 10)
    raise UserError(
        f"{flag} {pattern!r} matches no parameter that is trained. {hint or f'Known: {top}.'} "
        "Names are those of parameters and modules; * stands for any text"
    )


@dataclass(frozen=True)
class GroupRules:
    """Rules of the user for parameter groups, by patterns of names (see `matches`).

    options: (pattern, options of the optimizer); of several that match, a later one wins. `lr` is
        a factor.
    no_weight_decay: patterns or words of `--no_weight_decay`; None for the default.
    apart: patterns whose parameters get groups of their own, to be frozen later.
    """

    options: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    no_weight_decay: tuple[str, ...] | None = None
    apart: tuple[str, ...] = ()

    def check(self, names: list[str]) -> None:
        """Raise UserError if a pattern matches no parameter."""
        for pattern, _ in self.options:
            check_pattern("--param_group", pattern, names)
        for pattern in self.apart:
            check_pattern("--freeze", pattern, names)

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the options of a parameter."""
        found: dict[str, Any] = {}
        for pattern, options in self.options:
            found |= options if matches(name, pattern) else {}
        return found

    def apart_of(self, name: str) -> tuple[bool, ...]:
        """Return which patterns of `apart` match a parameter."""
        return tuple(matches(name, pattern) for pattern in self.apart)


def get_parameter_groups(
    model: nn.Module,
    weight_decay: float,
    assigner: LayerDecayValueAssigner | None = None,
    rules: GroupRules | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning-rate scale (`lr_scale`).

    Biases, norms, GRN, layer scale, the mask token and what the network itself exempts get no
    weight decay.
    """
    rules = rules or GroupRules()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rules.check(list(trained))
    exempt = _exempt_from_decay(model, rules.no_weight_decay)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in trained.items():
        options = rules.options_of(name)
        scale = assigner.get_scale(assigner.get_layer_id(name)) if assigner else 1.0
        scale *= options.pop("lr", 1.0)
        decayed = not exempt(name, parameter)
        decay = options.get("weight_decay", weight_decay if decayed else 0.0)
        decayed = decay > 0 if "weight_decay" in options else decayed
        new = {"params": [], "weight_decay": decay, "lr_scale": scale, "decayed": decayed}
        if options:
            new |= options | {"own_options": list(options)}  # schedules leave these alone
        key = decayed, scale, repr(sorted(options.items())), rules.apart_of(name)
        groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def _groups_of_loss(loss: nn.Module | None) -> list[dict[str, Any]]:
    """Return a group without weight decay for the parameters of a loss, if it has any."""
    own = [p for p in loss.parameters() if p.requires_grad] if loss is not None else []
    group = {"params": own, "weight_decay": 0.0, "lr_scale": 1.0, "decayed": False}
    return [group] if own else []


def _exempt_from_decay(
    model: nn.Module, wanted: tuple[str, ...] | None
) -> Callable[[str, nn.Parameter], bool]:
    """Return a test (name, parameter) for parameters without weight decay.

    wanted: as in `GroupRules`; None for biases, norms and what the network itself exempts.
    """
    if wanted is None:
        patterns = _exempt_by_network(model)
        return lambda name, parameter: (
            parameter.ndim <= 1
            or name.endswith(NO_WEIGHT_DECAY)
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        )
    names, exempt = [name for name, _ in model.named_parameters()], set()
    for word in wanted:
        kinds = {"norm": _is_norm, "batchnorm": lambda module: isinstance(module, _BatchNorm)}
        if word in kinds:
            modules = [name for name, module in model.named_modules() if kinds[word](module)]
            found = {n for n in names if any(n.rpartition(".")[0] == module for module in modules)}
        elif word == "bias":
            found = {name for name in names if name.rpartition(".")[2] == "bias"}
        elif word == "none":
            found = set()
        else:
            check_pattern("--no_weight_decay", word, names)
            found = {name for name in names if matches(name, word)}
        if not found and word != "none":
            raise UserError(f"--no_weight_decay {word}: {type(model).__name__} has none; drop it")
        exempt |= found
    return lambda name, _: name in exempt


def _is_norm(module: nn.Module) -> bool:
    """True for normalization layers of any library, and GRN."""
    return "Norm" in type(module).__name__ or type(module).__name__ == "GRN"


def _exempt_by_network(model: nn.Module) -> set[str]:
    """Return name patterns of what `no_weight_decay()` of timm's networks exempts, such as tokens.

    The network may be a part of another one.
    """
    names = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", set)()
        names |= {f"{prefix}.{name}" if prefix else name for name in exempt}
    return names


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    layer_decay_type: str = "single",
    momentum: float = 0.9,
    shard: str = "ddp",
    **options: Any,
) -> torch.optim.Optimizer:
    """Create any of timm's optimizers by name, over `get_parameter_groups`.

    lr: peak of the schedule. momentum: for optimizers that have one. shard: data-parallel mode,
    `ddp`, `zero1` or `fsdp`. options: `seed` of the noise that adahessian and kron draw, 0 by
    default; `rules` (GroupRules) for parameter groups; `loss`, a module whose parameters are
    trained too, without weight decay; others of the optimizer itself, such as `eps` and `betas`:
    UserError if it has none of that name.
    """
    from timm.optim import create_optimizer_v2

    seed, rules = options.pop("seed", 0), options.pop("rules", None) or GroupRules()
    layers = model, layer_decay, layer_decay_type
    assigner = LayerDecayValueAssigner(*layers) if layer_decay < 1.0 else None
    groups = get_parameter_groups(model, weight_decay, assigner, rules)
    groups += _groups_of_loss(options.pop("loss", None))
    own = signature(_optimizer_class(opt)).parameters
    _check_betas(opt, own, options)
    in_one_kernel = next(model.parameters()).device.type in ("cpu", "cuda")
    # With fsdp only they work on DTensors.
    in_one_kernel &= shard != "fsdp" or opt.lower().startswith("adam")
    in_one_kernel &= not options.keys() & {"foreach", "differentiable", "capturable"}
    fixed = {"fused": in_one_kernel, "deterministic": True}  # kron's noise is then that of its rng
    fixed = {name: value for name, value in fixed.items() if value and name in own}
    make = partial(create_optimizer_v2, opt=opt, lr=lr, momentum=momentum, **fixed | options)
    try:
        optimizer = sharding.wrap_optimizer(make, groups, lr, shard)
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--opt {opt} with {options}: {error}; try --opt adamw") from error
    defaults = sharding.local_optimizer(optimizer).defaults
    # timm drops these if an optimizer does not have them
    for key in {"eps", "betas"} & options.keys() - defaults.keys():
        raise UserError(f"--opt {opt} has no {key}; drop --opt_{key}")
    muon = {"use_fallback": False} if "fallback_lr_scale" in defaults else {}
    for pattern, values in rules.options:  # some arguments of an optimizer are no options of groups
        _check_options(f"--param_group {pattern}", values, defaults | muon)
    _seed_noise(sharding.local_optimizer(optimizer), seed)
    return optimizer


def _check_betas(opt: str, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise UserError unless there are as many betas as the optimizer has."""
    betas = own["betas"].default if "betas" in own else None  # None of adafactor
    if betas and len(options.get("betas", betas)) != len(betas):
        default, got = " ".join(map(str, betas)), len(options["betas"])
        text = f"takes {len(betas)} --opt_betas (default {default}), got {got}"
        raise UserError(f"--opt {opt} {text}")


def _check_options(flag: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise UserError if an option is not among those known, or is of another kind than there."""

    def kind(value: Any) -> str:
        if isinstance(value, bool | str):
            return "a word" if isinstance(value, str) else "True or False"
        if isinstance(value, list | tuple):
            return plural(len(value), "value") + " in ( )"
        return "a number"

    for name, value in options.items():
        if name not in known:
            hint = sentences(did_you_mean(name, known), f"Known: {', '.join(known)}")
            raise UserError(f"{flag}: unknown option {name!r}. {hint}")
        if known[name] is not None and kind(value) != kind(known[name]):
            raise UserError(f"{flag}: {name} is {value!r}, expected {kind(known[name])}")


def check_values(flag: str, args: Any, values: Mapping[str, Any]) -> None:
    """Raise UserError if the optimizer of --opt refuses the values, such as betas above 1."""
    make = _optimizer_class(build_optimizer_call(args).name)
    own = signature(make).parameters
    usual = {name: x for name, x in {"lr": 1e-3, "momentum": args.momentum}.items() if name in own}
    values = {name: x for name, x in values.items() if name in own and name != "lr"}
    weights = [nn.Parameter(torch.zeros(2, 2))]
    try:
        make(weights, **usual)
    except Exception:  # it needs other weights
        return
    try:
        make(weights, **usual | values)
    except Exception as error:
        raise UserError(f"{flag}: {first_line(error)}") from error


def build_optimizer_call(args: Any) -> Call:
    """Read --opt, such as `adamw` or `rmsproptf(alpha=0.99)`."""
    call = parse_call(args.opt, "--opt")
    if call.args:
        raise UserError(f"--opt {args.opt}: expected arguments as name=value")
    for name in call.kwargs.keys() & OWN_FLAGS:
        raise UserError(f"--opt {args.opt}: {name} has a flag of its own; use --{name}")
    own = signature(_optimizer_class(call.name)).parameters
    known = {p.name: p.default for p in own.values() if p.name not in {"params", *OWN_FLAGS}}
    differs = args.momentum != default_of("momentum") and "momentum" in getattr(args, "typed", ())
    if differs and "momentum" not in own and not vars(args).get("eval"):
        raise UserError(f"--opt {args.opt} has no momentum; drop --momentum")
    _check_options(f"--opt {call.name}", call.kwargs, known)
    for name in call.kwargs.keys() & {"eps", "betas"}:
        if getattr(args, f"opt_{name}") is not None:
            raise UserError(f"--opt {args.opt} and --opt_{name} both set {name}; drop one")
    return call


def _optimizer_class(opt: str) -> type:
    """Return the class of an optimizer; UserError if it is unknown or cannot be imported."""
    from timm.optim import get_optimizer_class, list_optimizers

    name = opt.lower().removeprefix("lookahead_")
    resolve(name, dict.fromkeys(list_optimizers()), "optimizer", importable=False)
    try:
        return get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        packages = {"bnb": "bitsandbytes", "fused": "NVIDIA's apex"}
        package = next((p for start, p in packages.items() if name.startswith(start)), "")
        needs = f"needs a CUDA GPU and {package}" if package else "cannot be imported"
        raise UserError(f"--opt {opt} {needs} ({error}); try --opt adamw") from error


def _seed_noise(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Make the noise of adahessian and kron a function of (seed, step), equal on all processes.

    Their generators would begin again after a resume. Processes with other noise would take other
    steps.
    """
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # of lookahead

    def before_step(*_: Any) -> None:
        states = optimizer.state.values()
        steps = [state.get("hessian step", state.get("step", 0)) for state in states]
        number = fold_in(seed, max(map(int, steps), default=0))
        if hasattr(optimizer, "rng"):  # kron
            optimizer.rng.seed(number)
        else:  # adahessian, which creates another generator on a GPU, with this seed
            optimizer.seed = number
            optimizer.generator.manual_seed(number)

    if hasattr(optimizer, "rng") or hasattr(optimizer, "generator"):
        optimizer.register_step_pre_hook(before_step)


def build_rules(args: Any) -> GroupRules:
    """Read --param_group, --no_weight_decay and --freeze."""
    options = [parse_options(text, "--param_group") for text in args.param_group or ()]
    parameters = signature(_optimizer_class(build_optimizer_call(args).name)).parameters
    known = {name: p.default for name, p in parameters.items() if name != "params"}
    known |= {"lr": 1.0, "weight_decay": 0.0, "use_fallback": False}  # the last one is Muon's
    for pattern, values in options:
        _check_options(f"--param_group {pattern}", values, known)
        for name in ("lr", "weight_decay"):
            if not 0 <= values.get(name, 0) < math.inf:
                text = f"{name} is {values[name]}, expected a number of at least 0"
                raise UserError(f"--param_group {pattern}: {text}")
        check_values(f"--param_group {pattern}", args, values)
    words = tuple(args.no_weight_decay) if args.no_weight_decay else None
    if words and "none" in words and len(words) > 1:
        raise UserError(f"--no_weight_decay {' '.join(words)}: none stands alone; drop it")
    apart = tuple(span.pattern for span in parse_freeze(args.freeze or ()))
    return GroupRules(tuple(options), words, apart)


@dataclass(frozen=True)
class FrozenSpan:
    """Epochs in which some parameters are frozen: from `first` finished ones to `last`."""

    pattern: str
    first: int = 0
    last: float = math.inf


def parse_freeze(texts: Iterable[str]) -> list[FrozenSpan]:
    """Read `PATTERN:FIRST-LAST` (in finished epochs), `PATTERN:FIRST-` or `PATTERN`."""
    spans = []
    for text in texts:
        found = re.fullmatch(r"([^:]+)(?::(\d+)-(\d*))?", text.strip())
        first, last = (found[2] or 0, found[3] or math.inf) if found else (1, 0)
        if int(first) >= float(last):
            expected = "PATTERN:FIRST-LAST with FIRST < LAST: 'stages.0:0-5' for the first 5 epochs"
            raise UserError(f"--freeze: got {text!r}, expected {expected}")
        spans.append(FrozenSpan(found[1], int(first), float(last)))
    return spans


def build_optimizer(
    args: Any, model: nn.Module, lr: float, shard: str = "ddp", loss: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer from the flags; pre-training has no layer decay.

    loss: a module whose parameters, if it has any, are trained with those of the model.
    """
    call = build_optimizer_call(args)
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    options = {name: value for name, value in options.items() if value is not None}
    return create_optimizer(
        model,
        call.name,
        lr=lr,
        weight_decay=args.weight_decay,
        layer_decay=getattr(args, "layer_decay", 1.0),
        layer_decay_type=getattr(args, "layer_decay_type", "single"),
        momentum=args.momentum,
        shard=shard,
        seed=getattr(args, "seed", 0),
        loss=loss,
        rules=build_rules(args),
        **options,
        **call.kwargs,
    )
