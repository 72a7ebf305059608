# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""--grad_checkpointing changes what is saved for backward and no number."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import models
from errors import UserError
from models import convnextv2
from models.convnextv2 import Block, ConvNeXtV2
from models.fcmae import FCMAE
from models.sparse import PatchGrid
from tests.test_end_to_end import FINETUNE, PRETRAIN, assert_same, run, weights
from training.anomaly import first_not_finite

MASKS = {  # (N, L), 1 = removed
    "packed": torch.tensor([[0.0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]]),
    "one visible patch": torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]]),
}
CASES = ("dense", *MASKS)
CAN_COMPILE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


DEEP, SHALLOW = ((2, 1, 4, 1), (4, 6, 8, 10)), ((2, 2), (4, 6))  # depths, dims


def build(
    case: str,
    dtype: torch.dtype = torch.float64,
    drop_path: float = 0.5,
    sizes: tuple = DEEP,
    scale: float | None = None,  # 1e-6: a ConvNeXt V1
):
    """A toy in training mode, and its inputs."""
    torch.manual_seed(0)
    stem = {"stem_stride": 1 if sizes == DEEP else 4}
    stem |= {"layer_scale_init_value": scale}
    model = ConvNeXtV2(*sizes, num_classes=3, drop_path_rate=drop_path, **stem)
    if case in MASKS:
        model = FCMAE(model, decoder_depth=2, decoder_embed_dim=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64).to(dtype)
    return model.to(dtype).train(), (images, *([MASKS[case]] if case in MASKS else []))


def loss_of(output: Tensor | tuple) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).double().square().mean()


def step(model: nn.Module, inputs: tuple, half: bool = False):
    """Loss, gradients by name, and the next random number; from one seed."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = loss_of(model(*inputs))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **grads, "next": torch.rand(1)}


def saved_bytes(model: nn.Module, inputs: tuple) -> int:
    """Bytes of distinct storages that forward saves for backward, without parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = model(*inputs)
    del result  # kept to here: memory that is freed could be counted as that of others
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)


@pytest.fixture
def branches(monkeypatch):
    """A list that grows by one with every computation of a block's branch."""
    calls, fused_mlp = [], convnextv2.fused_mlp
    monkeypatch.setattr(convnextv2, "fused_mlp", lambda *args: calls.append(1) or fused_mlp(*args))
    return calls


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_loss_gradients_and_random_draws_are_the_same(case, half, scale):
    model, inputs = build(case, torch.float32 if half else torch.float64, scale=scale)
    plain = step(model, inputs, half=half)
    model.set_grad_checkpointing()
    assert_same(step(model, inputs, half=half), plain)
    model.set_grad_checkpointing(False)
    assert_same(step(model, inputs, half=half), plain)


def test_drop_path_drops_here():
    """Otherwise the test above would compare nothing random."""
    model, inputs = build("dense")
    first = loss_of(model(*inputs))
    assert loss_of(model(*inputs)) != first


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_block_saves_its_input_and_nothing_wider(packed, scale):
    """The tensors of own autograd functions too: of width 4C for plain, of width C here."""
    torch.manual_seed(0)
    block = Block(8, 0.5, scale)
    grid = PatchGrid(MASKS["packed"], (2, 2)) if packed else None
    shape = (3, 2, 4, 4, 8) if packed else (3, 8, 8, 8)
    x = torch.randn(shape, requires_grad=True)
    plain = saved_bytes(block, (x, grid))
    block.checkpointing = True
    dropped = 3 * 4  # a number for each image
    assert saved_bytes(block, (x, grid)) == x.nbytes + dropped
    assert plain > 5 * x.nbytes


@pytest.mark.parametrize(("case", "times"), [("dense", 3), ("packed", 2)])
def test_network_saves_much_less(case, times):
    """Stem, downsampling and head still save their tensors."""
    model, inputs = build(case)
    plain = saved_bytes(model, inputs)
    model.set_grad_checkpointing()
    assert saved_bytes(model, inputs) < plain / times


@pytest.mark.parametrize("case", CASES)
def test_each_block_is_computed_twice_and_only_in_training(case, branches):
    model, inputs = build(case)
    model.set_grad_checkpointing()
    blocks = sum(isinstance(module, Block) for module in model.modules())
    assert blocks == (8 if case == "dense" else 10)
    loss_of(model(*inputs)).backward()
    assert len(branches) == 2 * blocks
    branches.clear()
    with torch.no_grad():
        model(*inputs)
    loss_of(model.eval()(*inputs)).backward()
    assert len(branches) == 2 * blocks


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "packed"])
def test_compiled_network_is_one_graph_and_the_same(case):
    model, inputs = build(case, sizes=SHALLOW)
    inputs += (2,) if case == "packed" else ()
    wanted, plain = step(model, inputs), saved_bytes(model, inputs)
    model.set_grad_checkpointing()
    model.compile(fullgraph=True, backend="aot_eager")
    for name, ours in step(model, inputs).items():
        assert torch.allclose(ours, wanted[name], rtol=1e-10, atol=1e-12), name
    assert (saved_bytes(model, inputs) < 0.7 * plain) == CAN_COMPILE  # others refuse the flags


def test_second_derivative_is_the_same():
    """As --opt adahessian asks for it."""
    model, inputs = build("dense")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_("pwconv1" in name)  # no channel is dead

    def curvature() -> list[Tensor]:
        torch.manual_seed(5)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(loss_of(model(*inputs)), parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)

    wanted = curvature()
    model.set_grad_checkpointing()
    for ours, theirs in zip(curvature(), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draw", ["export", "trace"])
def test_graph_for_elsewhere_holds_plain_operations(draw):
    model, (images,) = build("dense", torch.float32, drop_path=0.0)
    model.set_grad_checkpointing()
    if draw == "export":
        graph = torch.export.export(model, (images,))
        assert "tag_activation_checkpoint" not in str(graph)
        found = graph.module()(images)
    else:
        found = torch.jit.trace(model, images)(images)
    assert torch.allclose(found, model(images), atol=1e-5)


def test_first_value_that_is_not_finite_has_the_same_name():
    model, inputs = build("dense")
    torch.nn.init.constant_(model.stages[2][1].pwconv1.bias, 1e300)  # its square overflows

    def found() -> str:
        torch.manual_seed(5)
        return first_not_finite(model, lambda: loss_of(model(*inputs)))

    wanted = found()
    assert "stages.2.1" in wanted
    model.set_grad_checkpointing()
    assert found() == wanted


def test_state_dict_and_copies_know_nothing_new():
    model, inputs = build("dense")
    names = list(model.state_dict())
    model.set_grad_checkpointing()
    assert list(model.state_dict()) == names
    assert_same(step(copy.deepcopy(model), inputs), step(model, inputs))


# --- the flag ----------------------------------------------------------------------------------


def flags(model: str, **more) -> SimpleNamespace:
    args = {"in_chans": 3, "stem_stride": 1, "drop_path": 0.0, "head_init_scale": 1.0}
    args |= {"patch_size": 8, "mask_ratio": 0.5, "decoder_depth": 1, "decoder_embed_dim": 8}
    args |= {"norm_pix_loss": True, "grad_checkpointing": True, "compile": False, "eval": False}
    args |= {"freeze_backbone": False, "cuda_graphs": False, "sync_bn": False, "shard": "ddp"}
    return SimpleNamespace(model=model, **(args | more))


def test_flag_turns_all_blocks_on():
    fcmae = models.build_fcmae(flags("tests.tiny:fcmae"))
    classifier = models.build_classifier(flags("tests.tiny:classifier"), 3)
    for model, count in ((fcmae, 5), (classifier, 4)):
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        assert [block.checkpointing for block in blocks] == [True] * count
    plain = models.build_classifier(flags("tests.tiny:classifier", grad_checkpointing=False), 3)
    assert not any(getattr(module, "checkpointing", False) for module in plain.modules())


def test_torch_that_saves_everything_in_compiled_blocks_is_refused(monkeypatch):
    for name, build in {
        "tests.tiny:fcmae": models.build_fcmae,
        "tests.tiny:classifier": lambda args: models.build_classifier(args, 3),
    }.items():
        for version, refused in (("2.13.1", True), ("2.14.0", False)):
            monkeypatch.setattr("torch.__version__", version)
            build(flags(name))
            if refused:
                with pytest.raises(UserError, match="with --compile true needs torch 2.14"):
                    build(flags(name, compile=True))
            else:
                build(flags(name, compile=True))


class Refuses(nn.Module):
    """As timm's networks that cannot."""

    def __init__(self, **kwargs) -> None:
        super().__init__()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


@pytest.mark.parametrize(
    "name", ["tests.tiny:other", "tests.models.test_grad_checkpointing:Refuses"]
)
def test_model_that_cannot_is_refused(name):
    with pytest.raises(UserError, match="(Other|Refuses) does not support it"):
        models.build_classifier(flags(name), 3)
    models.build_classifier(flags(name, eval=True), 3)  # nothing is trained


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ("resnet", "main=linear@layer4, aux=mlp(4)@layer2"),
        ("efficientnet", "main=linear@bn2, aux=conv@blocks.3, all=linear@blocks"),
        ("vit", "main=linear@norm, aux=linear@blocks"),
        ("convnext", "main=linear@stages, aux=linear@stages.1.blocks"),
    ],
)
def test_heads_on_lists_of_blocks_get_the_same_gradients(model, heads):
    """timm calls the blocks of a list then, and not the list."""
    results = []
    more = {"heads": heads, "head": "", "loss": "ce", "input_size": (64, 64)}
    for flag in (False, True):
        torch.manual_seed(0)
        args = flags(f"timm:test_{model}", grad_checkpointing=flag, stem_stride=4, **more)
        network = models.build_classifier(args, 3).train()
        outputs = network(torch.randn(4, 3, 64, 64))
        sum((i + 1) * loss_of(x) for i, x in enumerate(outputs.values())).backward()
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        grads = {f"{name} grad": p.grad for name, p in trained.items()}
        results.append(outputs | grads | network.state_dict())
    assert_same(*results)
    assert all(value.any() for name, value in results[1].items() if "named_heads" in name)


def both_ways(folder: Path, script: str, *words: object, ranks: int = 1) -> list[Path]:
    """The last checkpoint without the flag and with it."""
    found = []
    for flag in ("false", "true"):
        more = ["--output_dir", folder / flag, "--grad_checkpointing", flag, "--kernels", "torch"]
        run(script, *words, *more, "--drop_path", 0.5, ranks=ranks)
        found.append(folder / flag / "checkpoint-1.pth")
    return found


@pytest.mark.slow
def test_pretraining_on_two_processes_ends_with_the_same_weights(tmp_path):
    """Under DistributedDataParallel, with micro-batches that exchange no gradients."""
    words = [*PRETRAIN, "--picture_freq", 0, "--update_freq", 2]
    plain, flag = both_ways(tmp_path, "main_pretrain.py", *words, ranks=2)
    assert_same(weights(flag), weights(plain))


@pytest.mark.slow
def test_finetuning_ends_with_the_same_weights_and_average(tmp_path):
    words = [*FINETUNE, "--model_ema", "--model_ema_eval", "--update_freq", 2, "--mixup", 0.8]
    plain, flag = both_ways(tmp_path, "main_finetune.py", *words)
    for key in ("model", "model_ema"):
        assert_same(weights(flag, key), weights(plain, key))


def test_weights_replaced_by_functional_call_never_give_wrong_gradients():
    """Backward would recompute with the module's own weights."""
    model, inputs = build("dense")
    twice = {name: 2 * weight.detach() for name, weight in model.named_parameters()}
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        replaced = {name: weight.clone().requires_grad_() for name, weight in twice.items()}
        torch.manual_seed(1)  # of drop path
        loss_of(torch.func.functional_call(model, replaced, inputs)).backward()
        gradients.append({name: weight.grad for name, weight in replaced.items()})
    assert_same(*gradients)
    replaced = {name: nn.Parameter(weight) for name, weight in twice.items()}
    loss = loss_of(torch.func.functional_call(model, replaced, inputs))
    with pytest.raises(RuntimeError, match="were replaced between forward and backward"):
        loss.backward()
