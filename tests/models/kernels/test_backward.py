# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The block's backward passes against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from config.flags import KERNELS
from models.convnextv2 import Block, ConvNeXtV2
from models.fcmae import FCMAE
from models.kernels import autotune, depthwise, grn_mlp, ops
from models.layers import GRN, fused_dwconv, fused_mlp
from models.sparse import PatchGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without one Triton is interpreted


def mlp_layers(dim):
    """fc1, GRN and fc2 in float64, far from their start, one channel dead."""
    torch.manual_seed(dim)
    layers = [nn.Linear(dim, 4 * dim), GRN(4 * dim), nn.Linear(4 * dim, dim)]
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    with torch.no_grad():
        layers[0].weight[0] = layers[0].bias[0] = 0  # GELU(0) = 0 everywhere
    return layers


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 1, 1), (3, 2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("dim", [3, 5])  # fewer and more channels than positions
def test_fused_mlp_is_the_plain_one_with_its_gradients(shape, dim):
    fc1, grn, fc2 = mlp_layers(dim)
    x = torch.randn(dim, *shape[1:], shape[0], dtype=torch.float64).transpose(0, -1)
    x.requires_grad_()  # not contiguous
    inputs = [x, *fc1.parameters(), *grn.parameters(), *fc2.parameters()]
    plain = fc2(grn(F.gelu(fc1(x))))
    fused = fused_mlp(x, fc1, grn, fc2)
    assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, dy)
    for ours, theirs in zip(torch.autograd.grad(fused, inputs, dy), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_fused_mlp_can_be_differentiated_twice():
    """Second-order optimizers; a backward that took saved tensors for constants would be wrong."""
    fc1, grn, fc2 = mlp_layers(2)
    with torch.no_grad():
        fc1.weight[0] += 1  # at a dead channel the length has no second derivative
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fused_mlp(x, fc1, grn, fc2), x)


def test_fused_mlp_of_an_all_zero_image_has_finite_gradients():
    fc1, grn, fc2 = mlp_layers(3)
    with torch.no_grad():
        fc1.bias.zero_()
    x = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    fused_mlp(x, fc1, grn, fc2).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in grn.parameters())


def test_fused_mlp_saves_one_wide_tensor():
    """Plain autograd saves five; saved tensors take most of the memory of pre-training."""
    fc1, grn, fc2 = mlp_layers(4)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_mlp(torch.randn(2, 50, 4, dtype=torch.float64, requires_grad=True), fc1, grn, fc2)
    assert sum(size == 2 * 50 * 16 for size in saved) == 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fused_mlp_under_autocast_is_close_and_returns_full_gradients(half):
    fc1, grn, fc2 = (layer.float() for layer in mlp_layers(6))
    x = torch.randn(2, 9, 6, requires_grad=True)
    wanted = torch.autograd.grad(fused_mlp(x, fc1, grn, fc2).sum(), [x, *grn.parameters()])
    with torch.autocast("cpu", half):
        y = fused_mlp(x, fc1, grn, fc2)
    assert y.dtype == half
    grads = torch.autograd.grad(y.sum(), [x, *grn.parameters()])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 4)])
def test_depthwise_gradients_are_those_of_torch(size):
    """Small maps: the 7 x 7 kernel is larger than the map."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 3, 7, padding=3, groups=3).double(), nn.LayerNorm(3).double()
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *conv.parameters(), *norm.parameters()]
    ours = fused_dwconv(x, conv, norm)
    plain = norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.allclose(ours, plain, atol=1e-12)
    dy = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, inputs, dy)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, dy), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)
    assert torch.autograd.gradgradcheck(lambda x: fused_dwconv(x, conv, norm), x)


# --- every implementation of a block, under every --kernels -------------------------------


@pytest.fixture
def set_kernels(monkeypatch, tmp_path):
    """Sets `--kernels` for this test alone, with an autotuner and a cache file of its own."""
    monkeypatch.setattr(autotune, "autotuner", autotune.Autotuner())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda mode: autotune.set_kernels(mode, torch.device(DEVICE))


def written_out(block, x, grid=None):
    """A block in torch's modules, on the whole map, by the formulas of the paper."""
    dense = x if grid is None else grid.unpack(x)
    y = block.dwconv(dense.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    a = F.gelu(block.pwconv1(block.norm(y if grid is None else grid.pack(y))))
    length = torch.linalg.vector_norm(a, dim=tuple(range(1, a.ndim - 1)), keepdim=True)
    relative = length / (length.mean(-1, keepdim=True) + block.grn.eps)
    gamma, beta = block.grn.gamma.flatten(), block.grn.beta.flatten()
    return x + block.drop_path(block.pwconv2(gamma * a * relative + beta + a))


def new_block(dim, dtype=torch.float64, drop_path=0.0):
    """Parameters far from their start; a channel of width 4C is dead: GELU(0) = 0 everywhere."""
    torch.manual_seed(dim)
    block = Block(dim, drop_path).to(DEVICE, dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        block.pwconv1.weight[1] = block.pwconv1.bias[1] = 0
    return block


def new_grid(images, h, w, visible):
    noise = torch.rand(images, h * w, device=DEVICE)
    return PatchGrid((noise.argsort(1).argsort(1) >= visible).view(images, h, w).float())


CASES = {  # shape of x, and the grid of a packed one
    "dense": ((2, 5, 3, 4), None),
    "channels outnumber positions": ((3, 2, 1, 5), None),
    "one cell of one image": ((1, 1, 1, 4), None),
    "packed": ((2, 3, 2, 2, 4), (2, 3)),
    "one visible patch": ((2, 1, 2, 2, 4), (3, 2)),
    "one visible cell": ((3, 1, 1, 1, 5), (2, 2)),
    "one packed image": ((1, 2, 3, 3, 3), (2, 2)),
}


def case_of(name, dtype=torch.float64):
    """x, not contiguous, and the grid of a case."""
    shape, size = CASES[name]
    grid = size and new_grid(shape[0], *size, shape[1])
    x = torch.randn(*shape[1:], shape[0], device=DEVICE, dtype=dtype).movedim(-1, 0)
    assert shape[0] == 1 or shape[1:] == (1, 1, 1, 5) or not x.is_contiguous()
    return x.requires_grad_(), grid


def with_gradients(function, inputs, half=False):
    """The result, and the gradients in the inputs for the same random one above, by name."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        y = function()
    y = y if y.ndim else y[None]
    return {"result": y.detach()} | gradients(y, inputs)


def gradients(y, inputs):
    """The gradients in the inputs for the same random one above, by name."""
    torch.manual_seed(3)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return dict(zip(inputs, grads, strict=True))


def assert_near(ours, theirs, tolerance):
    """Each tensor apart by no more than a share of its own length."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name].double() - wanted.double()).norm().item()
        assert error <= tolerance * wanted.double().norm().item(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", KERNELS)
def test_block_is_the_written_out_one_whatever_runs(set_kernels, mode, case):
    set_kernels(mode)
    x, grid = case_of(case)
    block = new_block(x.shape[-1])
    inputs = {"x": x, **dict(block.named_parameters())}
    wanted = with_gradients(lambda: written_out(block, x, grid), inputs)
    assert_near(with_gradients(lambda: block(x, grid), inputs), wanted, 1e-9)
    if mode == "triton":
        taken = {op: name for (op, *_), name in autotune.autotuner.chosen.items()}
        ops_of_triton = ("depthwise norm", "gelu", "mlp gradients", "depthwise weight")
        assert {taken[op] for op in ops_of_triton} == {"triton"}


@pytest.mark.parametrize("mode", KERNELS)
def test_dead_block_has_the_gradients_of_the_written_out_one(set_kernels, mode):
    """All channels of width 4C are zero: no length, and a mean of 0 to divide by."""
    set_kernels(mode)
    x, grid = case_of("packed")
    block = new_block(4)
    with torch.no_grad():
        block.pwconv1.weight.zero_()
        block.pwconv1.bias.zero_()
    inputs = {"x": x, **dict(block.named_parameters())}
    ours = with_gradients(lambda: block(x, grid), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert_near(ours, with_gradients(lambda: written_out(block, x, grid), inputs), 1e-9)


@pytest.mark.parametrize("mode", KERNELS)
def test_dropped_branches_are_those_of_the_written_out_block(set_kernels, mode):
    set_kernels(mode)
    block = new_block(3, drop_path=0.5)
    x = torch.randn(6, 3, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs = {"x": x, **dict(block.named_parameters())}

    def seeded(function):
        torch.manual_seed(5)
        return function(x)

    wanted = with_gradients(lambda: seeded(lambda x: written_out(block, x)), inputs)
    assert 0 < (wanted["result"] == x).flatten(1).all(1).sum() < 6
    assert_near(with_gradients(lambda: seeded(block), inputs), wanted, 1e-9)


def fcmae_and_input(dtype=torch.float64, device=DEVICE):
    """A model, its parameters, and a function that gives its loss."""
    torch.manual_seed(0)
    model = FCMAE(ConvNeXtV2((1, 1), (4, 6)), decoder_embed_dim=4, mask_ratio=0.5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(device, dtype)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(device, dtype)
    mask = torch.tensor([[0.0, 1, 1, 0], [1, 0, 1, 0]], device=device)
    return model, dict(model.named_parameters()), lambda: model(images, mask)[0]


def by_written_out_blocks(monkeypatch, loss, inputs):
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", written_out)
        return with_gradients(loss, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", KERNELS)
def test_fcmae_is_that_of_written_out_blocks_whatever_runs(set_kernels, monkeypatch, mode):
    set_kernels(mode)
    _, inputs, loss = fcmae_and_input()
    wanted = by_written_out_blocks(monkeypatch, loss, inputs)
    assert_near(with_gradients(loss, inputs), wanted, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", KERNELS)
def test_fcmae_in_bf16_is_close_to_itself_in_float32(set_kernels, monkeypatch, mode):
    """As close as bf16 is: three digits an operation, of which there are some thirty in a row."""
    set_kernels(mode)
    _, inputs, loss = fcmae_and_input(torch.float32)
    ours = with_gradients(loss, inputs, half=True)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert_near(ours, by_written_out_blocks(monkeypatch, loss, inputs), 0.12)


@pytest.mark.parametrize("case", ["dense", "channels outnumber positions", "packed"])
@pytest.mark.parametrize("mode", KERNELS)
def test_block_in_bf16_is_close_to_itself_in_float32(set_kernels, mode, case):
    set_kernels(mode)
    x, grid = case_of(case, torch.float32)
    block = new_block(x.shape[-1], torch.float32)
    inputs = {"x": x, **dict(block.named_parameters())}
    ours = with_gradients(lambda: block(x, grid), inputs, half=True)
    assert_near(ours, with_gradients(lambda: written_out(block, x, grid), inputs), 0.03)


# --- on a CPU only -------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
@pytest.mark.parametrize("faster", ["torch", "onednn"])
def test_fcmae_in_float32_is_right_in_both_linear_layers(set_kernels, monkeypatch, faster):
    """Only float32 on a CPU has two; float64, in which the others test, never sees oneDNN."""
    calls, onednn = [], ops.LINEAR["onednn"]

    def counted(*args):
        calls.append(args[1].ndim)
        return onednn(*args)

    def measure(implementations, *_):
        return {name: 1.0 if name == faster else 2.0 for name in implementations}, True

    monkeypatch.setitem(ops.LINEAR, "onednn", counted)
    monkeypatch.setattr(autotune, "measure", measure)
    autotune.set_kernels("auto", torch.device("cpu"))
    _, inputs, loss = fcmae_and_input(device="cpu")
    wanted = by_written_out_blocks(monkeypatch, loss, inputs)
    _, inputs, loss = fcmae_and_input(torch.float32, "cpu")
    assert_near(with_gradients(loss, inputs), wanted, 2e-5)
    assert set(calls) == ({2, 3} if faster == "onednn" else set())


@pytest.mark.parametrize("faster", ["torch", "onednn"])
def test_linear_and_weight_grad_of_every_layout_are_torchs(set_kernels, faster):
    """Transposed inputs, weights for every image, a weight gradient that is transposed."""
    autotune.autotuner.chosen[("linear", "cpu", torch.float32, ())] = faster
    torch.manual_seed(0)
    x, bias = torch.randn(2, 5, 600).mT, torch.randn(7)
    for weight in (torch.randn(7, 5), torch.randn(5, 7).mT, torch.randn(2, 7, 5)):
        for b in (None, bias):
            wanted = x.double() @ weight.double().mT + (0 if b is None else b)
            assert_near({"": ops.linear(x, weight, b)}, {"": wanted}, 1e-6)
    wide = torch.randn(2, 600, 9)
    for y, z in ((wide, x), (x, wide), (wide[0], x[0]), (wide[:, :20], x[:, :20])):
        wanted = y.double().mT @ z.double()
        assert_near({"": ops.weight_grad(y, z)}, {"": wanted}, 1e-6)
        assert ops.weight_grad(y, z).is_contiguous()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("case", ["dense", "packed"])
def test_batch_in_parts_is_the_batch_in_one(set_kernels, monkeypatch, case, images):
    """Five images: the last part is smaller; every sum runs over all parts."""
    set_kernels("auto")
    block = new_block(4)
    grid = new_grid(5, 2, 3, 3) if case == "packed" else None
    shape = (5, 3, 2, 2, 4) if case == "packed" else (5, 3, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs = {"x": x, **dict(block.named_parameters())}
    wanted = with_gradients(lambda: block(x, grid), inputs)
    asked = []
    monkeypatch.setattr(ops, "images_at_once", lambda *args: asked.append(args) or images)
    assert_near(with_gradients(lambda: block(x, grid), inputs), wanted, 1e-12)
    assert len(asked) >= 4  # both convolutions, the MLP and its gradients


def test_a_cpu_splits_what_exceeds_its_cache_and_never_into_nothing():
    x = torch.zeros(6, 1)
    assert ops.images_at_once(x, 1) == 6
    assert ops.images_at_once(x, ops.CACHE // 4) == 4
    assert ops.images_at_once(x, 2 * ops.CACHE) == 1
    assert ops.images_at_once(x.to("meta"), 2 * ops.CACHE) == 6  # as on a GPU


def test_sums_over_many_parts_in_bf16_do_not_stagnate(set_kernels, monkeypatch):
    """300 images of equal gradients: a bf16 sum of theirs would stop growing at 256 of them."""
    set_kernels("torch")
    monkeypatch.setattr(ops, "images_at_once", lambda *_: 1)
    block = new_block(4, torch.float32)
    x = torch.randn(1, 3, 3, 4, device=DEVICE).repeat(300, 1, 1, 1).requires_grad_()
    inputs = dict(block.named_parameters())
    torch.manual_seed(0)
    above = torch.randn(1, 3, 3, 4, device=DEVICE)

    def total():
        return (block(x) * above).sum()

    ours = with_gradients(total, inputs, half=True)
    assert_near(ours, with_gradients(total, inputs), 0.03)


# --- memory --------------------------------------------------------------------------------


class WideFloats(TorchDispatchMode):
    """Names the operations that return a float32 tensor (..., length, width), or a batch of it."""

    def __init__(self, length, width):
        super().__init__()
        self.length, self.width, self.found = length, width, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor.dtype == torch.float32 and tensor.ndim > 1:
                rows, width = tensor.shape[-2:]
                if width == self.width and rows in (self.length, 2 * self.length):
                    self.found.append((func.overloadpacket.__name__, tensor.numel()))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("mode", KERNELS)
@pytest.mark.parametrize("length", [3, 25])  # fewer and more than channels: two ways to scale
def test_no_tensor_of_width_4c_is_promoted_in_bf16(set_kernels, monkeypatch, mode, length):
    """A float32 copy of one would be the largest tensor of a step. Torch's implementation squares
    one part of the batch in float32, which on a CPU stays in the cache.
    """
    set_kernels(mode)
    monkeypatch.setattr(ops, "images_at_once", lambda *_: 1)
    block = new_block(4, torch.float32)
    x = torch.randn(2, length, 1, 4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        block(x).float().square().sum().backward()  # makes the choices
    # Under dispatch modes only torch's own implementations run.
    monkeypatch.setattr(autotune, "_get_current_dispatch_mode", lambda: None)
    forward, backward = WideFloats(length, 16), WideFloats(length, 16)
    with forward, torch.autocast(DEVICE, torch.bfloat16):
        y = block(x)
    with backward:
        y.float().square().sum().backward()
    chosen = {op: name for (op, *_), name in autotune.autotuner.chosen.items()}
    if chosen["gelu"] == "torch":
        assert {size for _, size in forward.found} == {length * 16}
        assert {name for name, _ in forward.found} <= {"_to_copy", "pow", "square"}
    else:
        assert forward.found == []
    assert backward.found == []


@pytest.mark.parametrize("mode", KERNELS)
@pytest.mark.parametrize("half", [False, True])
def test_block_saves_one_tensor_of_width_4c(set_kernels, mode, half):
    """And in the low precision, if there is one."""
    set_kernels(mode)
    block = new_block(4, torch.float32)
    saved = []
    x = torch.randn(2, 5, 5, 4, device=DEVICE, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keep, torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        block(x)
    wide = [t.dtype for t in saved if t.shape[-1] == 16 and t.numel() == 2 * 25 * 16]
    assert wide == [torch.bfloat16 if half else torch.float32]


# --- frozen parts ----------------------------------------------------------------------------

# Work of the backward pass that gives one gradient alone: matrix products of the MLP, each as
# large as one of the forward pass, and depthwise convolutions.
WORK = {
    "x": (2, 1),
    "dwconv.weight": (2, 1),
    "dwconv.bias": (2, 0),
    "norm.weight": (2, 0),
    "norm.bias": (2, 0),
    "pwconv1.weight": (2, 0),
    "pwconv1.bias": (1, 0),
    "grn.gamma": (1, 0),
    "grn.beta": (0, 0),
    "pwconv2.weight": (1, 0),
    "pwconv2.bias": (0, 0),
    "x, grn.gamma, pwconv2.bias": (2, 1),
    "all": (4, 2),
}


def count_flops(function):
    """FLOPs of matrix products and of torch's convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(  # more and fewer cells than channels
    ("mode", "shape"),
    [("auto", (1, 3, 3, 8)), ("torch", (1, 3, 3, 8)), ("torch", (1, 3, 1, 8))]
    + [("triton", (1, 3, 1, 8))],
)
@pytest.mark.parametrize("wanted", WORK)
def test_frozen_parts_cost_no_backward_work(set_kernels, monkeypatch, wanted, mode, shape):
    """Gradients of a frozen backbone were computed and thrown away: twice the work."""
    set_kernels(mode)
    block = new_block(8)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    inputs = {"x": x, **dict(block.named_parameters())}
    chosen = inputs if wanted == "all" else {name: inputs[name] for name in wanted.split(", ")}
    for tensor in inputs.values():
        tensor.requires_grad_(any(tensor is one for one in chosen.values()))
    # Under dispatch modes, such as the counter, only torch's own implementations run.
    monkeypatch.setattr(autotune, "_get_current_dispatch_mode", lambda: None)
    y = block(x)
    ours = {"result": y.detach()}
    flops = count_flops(lambda: ours.update(gradients(y, chosen)))
    assert_near(ours, with_gradients(lambda: written_out(block, x), chosen), 1e-9)
    cells = shape[1] * shape[2]
    products, convolutions = WORK[wanted]
    counted = 0 if mode == "triton" else convolutions  # Triton's are not torch's
    expected = products * 2 * cells * 8 * 32 + counted * 2 * cells * 8 * 49
    vectors = 4 * 8 * 32  # of the biases' gradients, less than one product
    assert expected <= flops <= expected + vectors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frozen", ["dwconv.weight", "x"])
def test_convolution_gradients_that_nobody_asked_for_are_not_computed(
    set_kernels, monkeypatch, frozen, packed
):
    """On a GPU and with Triton, each is a kernel of its own."""
    set_kernels("triton")
    block, grid = new_block(4), new_grid(2, 2, 3, 3) if packed else None
    shape = (2, 3, 2, 2, 4) if packed else (2, 3, 2, 4)
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    x.requires_grad_(frozen != "x")
    block.dwconv.weight.requires_grad_(frozen == "x")
    ran = []
    for name, table in (("x", depthwise.CONVOLVE), ("dwconv.weight", depthwise.WEIGHT_GRAD)):
        own = table["triton"]
        monkeypatch.setitem(
            table, "triton", lambda *args, own=own, name=name: ran.append(name) or own(*args)
        )
    y = block(x, grid)
    y.sum().backward()
    assert ran == ["x" if frozen != "x" else "dwconv.weight"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
@pytest.mark.parametrize(("wanted", "products"), [("x", 1), ("weight", 1), ("bias", 0)])
def test_frozen_linear_layer_costs_no_backward_work(set_kernels, wanted, products):
    """Downsampling and the decoder's layers, in float32 on a CPU."""
    set_kernels("torch")
    inputs = {"x": torch.randn(6, 8), "weight": torch.randn(16, 8), "bias": torch.randn(16)}
    inputs[wanted].requires_grad_()
    y = ops.affine(*inputs.values())
    assert type(y.grad_fn).__name__ == "_AffineBackward"
    assert count_flops(y.sum().backward) == products * 2 * 6 * 8 * 16
    called = []
    y = ops.affine(*inputs.values())
    y.grad_fn.register_hook(lambda grads, _: called.extend(grads))
    y.sum().backward()
    assert [grad is not None for grad in called] == [name == wanted for name in inputs]


# --- an empty batch --------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", KERNELS)
def test_empty_batch_passes_whatever_runs(set_kernels, mode, packed):
    """The last rank of an evaluation may have nothing; Triton's kernels divided by zero."""
    set_kernels(mode)
    block = new_block(4)
    grid = PatchGrid(torch.zeros(0, 2, 3, device=DEVICE), visible=3) if packed else None
    shape = (0, 3, 2, 2, 4) if packed else (0, 3, 2, 4)
    x = torch.zeros(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = block(x, grid)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all((parameter.grad == 0).all() for parameter in block.parameters())


# --- sums in half precision ------------------------------------------------------------------

# Gradients of biases are float32 sums of half-precision terms: apart from the exact sum by less
# than this fraction of the sum of the terms' magnitudes. A sum rounded to bf16 or fp16 is apart by
# up to 2e-3 or 2e-4 of it, and a sum in fp16 ends at 65504.
FLOAT32_SUM = 1e-6


def assert_summed_in_float32(grad, terms):
    """terms: (..., C), which are added over all but the last axis."""
    assert grad.dtype == torch.float32
    terms = terms.double().flatten(0, -2)
    error = (grad.double() - terms.sum(0)).abs()
    assert (error <= FLOAT32_SUM * terms.abs().sum(0)).all()


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("mode", KERNELS)
@pytest.mark.parametrize("parts", [1, 3])  # that a batch is split into
def test_bias_gradients_of_the_mlp_are_sums_in_float32(set_kernels, monkeypatch, mode, half, parts):
    set_kernels(mode)
    monkeypatch.setattr(ops, "images_at_once", lambda *_: 6 // parts)
    terms = []  # what flows into the GELU
    for name, own in grn_mlp.BACKWARD.items():

        def recorded(*args, own=own):
            found = own(*args)
            terms.append(found[0])
            return found

        monkeypatch.setitem(grn_mlp.BACKWARD, name, recorded)
    block = new_block(4, torch.float32)
    x = torch.randn(6, 5, 5, 4, device=DEVICE)
    with torch.autocast(DEVICE, half):
        y = fused_mlp(x, block.pwconv1, block.grn, block.pwconv2)
    assert y.dtype == half
    dy = torch.rand(y.shape, device=DEVICE).to(half)
    y.backward(dy)
    dh = torch.cat(terms[-parts:])
    assert dh.dtype == half
    assert_summed_in_float32(block.pwconv1.bias.grad, dh.flatten(0, 1))
    assert_summed_in_float32(block.pwconv2.bias.grad, dy)
    weight = block.pwconv2.weight.to(half).double()
    of_beta = (dy.double() @ weight).flatten(0, -2)  # its terms
    assert_summed_in_float32(block.grn.beta.grad.flatten(), of_beta)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("mode", KERNELS)
def test_bias_gradients_of_convolution_and_norm_are_sums_in_float32(set_kernels, mode, half):
    """The convolution passes its input on, so that its gradient is the terms of the bias's."""
    set_kernels(mode)
    block = new_block(4, torch.float32)
    with torch.no_grad():
        block.dwconv.weight.zero_()
        block.dwconv.weight[:, :, 3, 3] = 1
    x = torch.randn(6, 2, 3, 4, device=DEVICE).to(half).requires_grad_()
    with torch.autocast(DEVICE, half):
        y = fused_dwconv(x, block.dwconv, block.norm)
    dy = torch.rand(y.shape, device=DEVICE).to(half)
    y.backward(dy)
    assert x.grad.dtype == half
    assert_summed_in_float32(block.dwconv.bias.grad, x.grad)
    assert_summed_in_float32(block.norm.bias.grad, dy)


@pytest.mark.parametrize("mode", KERNELS)
def test_bias_gradients_in_fp16_may_exceed_its_range(set_kernels, mode):
    """150 gradients of 1000 and more, as a loss scale makes them: fp16 ends at 65504."""
    set_kernels(mode)
    block = new_block(4, torch.float32)
    x = torch.randn(6, 5, 5, 4, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        y = fused_mlp(x, block.pwconv1, block.grn, block.pwconv2)
    y.backward(torch.full_like(y, 1000.0))
    assert (block.pwconv2.bias.grad == 150_000).all()
