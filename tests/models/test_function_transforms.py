# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""torch.func's transforms, forward-mode AD and torch.fx give what they give for plain networks."""

import copy
import importlib.util

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.kernels import ops
from weights.convert import to_timm

DEPTHS, DIMS = (1, 1, 2, 1), (4, 6, 8, 10)
DTYPES = [torch.float64, torch.float32]  # float32 has linear layers of its own on a CPU
MASK = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 1]])


def shaken(model, dtype):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def pair(dtype):
    """Our network and timm's of plain operations with the same weights."""
    from timm.models.convnext import ConvNeXt

    ours = shaken(ConvNeXtV2(DEPTHS, DIMS, num_classes=3), dtype)
    theirs = ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=3, use_grn=True, ls_init_value=None)
    theirs = theirs.to(dtype).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    return ours, theirs


def images_of(dtype, n=2, size=32):
    torch.manual_seed(2)
    return torch.randn(n, 3, size, size, dtype=torch.float64).to(dtype)


def close(ours, theirs):
    """Apart by no more than a fraction of its own length."""
    tolerance = 1e-10 if theirs.dtype == torch.float64 else 5e-5
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert 0 < theirs.norm() < torch.inf
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def dual_tangent(model, images, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(images, tangent))).tangent


TRANSFORMS = {  # (model, images, another tensor of their shape) -> a tensor
    "vmap": lambda model, x, _: func.vmap(lambda image: model(image[None])[0])(x),
    "vmap without gradients": torch.no_grad()(
        lambda model, x, _: func.vmap(lambda image: model(image[None])[0])(x)
    ),
    "jvp": lambda model, x, v: func.jvp(model, (x,), (v,))[1],
    "vjp": lambda model, x, _: func.vjp(model, x)[1](torch.ones(len(x), 3, dtype=x.dtype))[0],
    "jacrev": lambda model, x, _: func.jacrev(model)(x),
    "forward-mode AD": dual_tangent,
    "functionalize": lambda model, x, _: func.functionalize(model)(x),
    "jacobian, vectorized": lambda model, x, _: torch.autograd.functional.jacobian(
        model, x, vectorize=True
    ),
    "Hessian times a vector": lambda model, x, v: func.jvp(
        func.grad(lambda x: model(x).square().sum()), (x,), (v,)
    )[1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_gives_what_it_gives_for_timms_network(name, dtype):
    """Our autograd functions have neither a vmap nor a jvp rule."""
    ours, theirs = pair(dtype)
    x = images_of(dtype)
    arguments = (x, x.flip(0).flip(2))
    close(TRANSFORMS[name](ours, *arguments), TRANSFORMS[name](theirs, *arguments))


def fcmae(dtype):
    """A model and the loss of images by its parameters, each image with a mask of its own."""
    model = shaken(FCMAE(ConvNeXtV2((1, 1), (4, 6)), decoder_embed_dim=8), dtype)
    return model, lambda own, x, mask: func.functional_call(model, own, (x, mask, 1))[0]


def v1(dtype):
    model = shaken(ConvNeXtV2((1, 1), (4, 6), num_classes=3, layer_scale_init_value=1e-6), dtype)
    return model, lambda own, x, mask: func.functional_call(model, own, (x,)).square().sum()


def classifier(dtype):
    model = shaken(ConvNeXtV2((1, 1), (4, 6), num_classes=3), dtype)
    return model, lambda own, x, mask: func.functional_call(model, own, (x,)).square().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
def test_gradients_of_each_image_are_those_of_batches_of_one(build, dtype):
    """For differential privacy and influence functions."""
    model, loss = build(dtype)
    x, own = images_of(dtype, size=16), {n: p.detach() for n, p in model.named_parameters()}

    def of_one(own, image, mask):
        return loss(own, image[None], mask[None])

    ours = func.vmap(func.grad(of_one), in_dims=(None, 0, 0))(own, x, MASK)
    for i in range(2):
        model.zero_grad()
        loss(dict(model.named_parameters()), x[i : i + 1], MASK[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            close(ours[name][i], parameter.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
def test_models_of_an_ensemble_run_as_one(build, dtype):
    first, loss = build(dtype)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    own, _ = func.stack_module_state([first, second])
    x = images_of(dtype, size=16)
    together = func.vmap(loss, in_dims=(0, None, None))(own, x, MASK)
    apart = [loss(dict(model.named_parameters()), x, MASK) for model in (first, second)]
    close(together, torch.stack(apart))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
def test_derivative_along_a_direction_of_the_weights_is_the_gradients(build, dtype):
    """Forward mode against our own backward pass."""
    model, loss = build(dtype)
    x, own = images_of(dtype, size=16), {n: p.detach() for n, p in model.named_parameters()}
    loss(dict(model.named_parameters()), x, MASK).backward()
    along = {name: torch.randn_like(value) for name, value in own.items()}
    _, ours = func.jvp(lambda own: loss(own, x, MASK), (own,), (along,))
    wanted = sum((along[name] * p.grad).sum() for name, p in model.named_parameters())
    close(ours, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
def test_batched_gradients_of_the_backward_pass(build, dtype):
    """Our backward passes write in place, into tensors that vmap has not batched."""
    model, loss = build(dtype)
    own = dict(model.named_parameters())
    x = images_of(dtype, size=16).requires_grad_()
    value = torch.stack([loss(own, x, MASK), 3 * loss(own, x, MASK)])
    wanted = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in value]
    directions = torch.eye(2, dtype=dtype)
    (ours,) = torch.autograd.grad(value, x, directions, is_grads_batched=True)
    close(ours, torch.stack(wanted))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_image_draws_its_own_dropped_paths_under_vmap(checkpointing):
    """With gradient checkpointing, which torch.func's transforms refuse, nothing is recomputed."""
    model = shaken(ConvNeXtV2((1, 1), (4, 6), num_classes=3, drop_path_rate=0.5), torch.float64)
    model.train().set_grad_checkpointing(checkpointing)
    own = {name: p.detach() for name, p in model.named_parameters()}

    def loss(own, image):
        return func.functional_call(model, own, (image[None],)).square().sum()

    gradients = func.vmap(func.grad(loss), in_dims=(None, 0), randomness="different")
    last = gradients(own, images_of(torch.float64, 16, 16))["stages.1.0.pwconv2.weight"]
    kept = (last != 0).flatten(1).any(1)
    assert 0 < kept.sum() < 16


# --- torch.fx ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_symbolic_trace_is_the_network(dtype, drop_path_rate, scale):
    """In training too; the graph takes other batches and image sizes than any it has seen."""
    options = {"drop_path_rate": drop_path_rate, "layer_scale_init_value": scale}
    model = shaken(ConvNeXtV2(DEPTHS, DIMS, num_classes=3, **options), dtype)
    for training in (False, True):
        traced = torch.fx.symbolic_trace(model.train(training))
        for n, size in ((2, 32), (5, 64)):
            torch.manual_seed(0)
            wanted = model(images_of(dtype, n, size))
            torch.manual_seed(0)
            close(traced(images_of(dtype, n, size)), wanted)


def test_torchvision_extracts_features_by_name():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = shaken(ConvNeXtV2(DEPTHS, DIMS, num_classes=3), torch.float64)
    names = {f"stages.{i}": f"map{i}" for i in range(4)} | {"stages.2.0.norm": "norm", "head": "y"}
    extractor = create_feature_extractor(model, names)
    images = images_of(torch.float64, size=64)
    found = extractor(images)
    assert set(found) == set(names.values())
    for i, wanted in enumerate(model.forward_intermediates(images)[1]):
        close(found[f"map{i}"], wanted.permute(0, 2, 3, 1))  # channels last, as inside the network
    close(found["y"], model(images))
    seen = []
    model.stages[2][0].norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    close(found["norm"], seen[0])
    found["y"].sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


# --- elsewhere -------------------------------------------------------------------------------


def test_transforms_leave_the_fast_path_to_other_calls():
    model, x = shaken(ConvNeXtV2(DEPTHS, DIMS), torch.float32), images_of(torch.float32)
    func.vmap(lambda image: model(image[None]))(x)
    func.jvp(model, (x,), (x,))
    torch.fx.symbolic_trace(model)
    found, stack = set(), [model(x).grad_fn]
    while stack:
        node = stack.pop()
        found.add(type(node).__name__)
        stack += [above for above, _ in node.next_functions if above is not None]
    expected = {"_MLPBackward", "_DepthwiseNormBackward"}
    expected |= {"_AffineBackward"} if torch.backends.mkldnn.is_available() else set()
    assert expected <= found


def test_network_trains_with_a_torch_that_lacks_the_private_names(monkeypatch):
    """They told whether a transform is active; `import models` failed without them."""
    for name in ("peek_interpreter_stack", "is_legacy_batchedtensor"):
        monkeypatch.delattr(torch._C._functorch, name)
    monkeypatch.delattr(forward_ad, "_current_level")
    spec = importlib.util.spec_from_file_location("ops_of_another_torch", ops.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    with torch.no_grad():
        assert not other.plain_only(torch.ones(1))
        assert not other.plain_backward(torch.ones(1))
    assert other.plain_only("a proxy of torch.fx")
    assert other.plain_backward(torch.ones(1))  # of a second derivative
