# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Compiled, exported, traced, checkpointed and copied models compute the same as plain ones."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from errors import UserError
from models import create_model
from models.convnextv2 import Block, ConvNeXtV2
from models.fcmae import FCMAE
from models.kernels import autotune
from models.kernels.ops import affine
from models.layers import GRN, PatchConv, fused_dwconv, init_weights
from models.sparse import PatchGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOY = ((1, 1), (4, 6))  # depths, dims: two stages, for the compiler's sake
MASK = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 1]])


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch, tmp_path):
    """An autotuner and a cache file of its own for each test; the compiler forgets its graphs."""
    monkeypatch.setattr(autotune, "autotuner", autotune.Autotuner())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch._dynamo.reset()


def scramble(model, dtype=torch.float64, device="cpu"):
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device, dtype)


def classifier(dtype=torch.float64, device="cpu"):
    """A classifier and a loss of it, so that `loss(model)` has a gradient everywhere."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(device, dtype)
    model = ConvNeXtV2(*TOY, num_classes=3)
    return scramble(model, dtype, device), lambda model: model(images).square().sum()


def v1(dtype=torch.float64, device="cpu"):
    """An FCMAE around a ConvNeXt V1, whose decoder is of V2."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(device, dtype)
    mask = MASK.to(device)
    model = FCMAE(ConvNeXtV2(*TOY, layer_scale_init_value=1e-6), decoder_embed_dim=8)
    return scramble(model, dtype, device), lambda model: model(images, mask, 1)[0]


def fcmae(dtype=torch.float64, device="cpu"):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(device, dtype)
    mask = MASK.to(device)
    model = FCMAE(ConvNeXtV2(*TOY), decoder_embed_dim=8)
    return scramble(model, dtype, device), lambda model: model(images, mask, 1)[0]


def with_gradients(loss, model):
    """The loss, and the gradients by the names of parameters."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    return {"loss": value.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_near(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name].double() - wanted.double()).norm()
        assert error <= tolerance * wanted.double().norm(), name


# --- compiled ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_gradients_are_the_eager_ones(build, dtype):
    """One graph forward and one backward; the custom operations have a gradient there too."""
    model, loss = build(dtype)
    wanted = with_gradients(loss, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_near(with_gradients(lambda _: loss(compiled), model), wanted, tolerance)


@pytest.mark.slow
def test_images_that_grow_are_compiled_twice():
    """Each size was compiled; after eight, torch ran the rest uncompiled."""
    counter = CompileCounterWithBackend("eager")
    model = FCMAE(ConvNeXtV2(*TOY), decoder_embed_dim=8)
    model.compile(backend=counter)
    for cells in (2, 3, 4, 5, 9):
        mask = torch.ones(2, cells**2)
        mask[:, :2] = 0
        model(torch.randn(2, 3, 8 * cells, 8 * cells), mask, 2)[0].backward()
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("trained", [".dwconv.", ".pwconv2.bias"])
def test_compiled_gradients_are_the_eager_ones_where_the_rest_is_frozen(trained):
    """Gradients that are not wanted are left out of the compiled backward pass too."""
    model, loss = fcmae()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)

    def gradients(called):
        model.zero_grad()
        loss(called).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(gradients(compiled), wanted)


@pytest.mark.slow
def test_compiled_under_autocast_is_the_eager_one():
    model, loss = fcmae(torch.float32)

    def in_bf16(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model)

    wanted = with_gradients(in_bf16, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = with_gradients(lambda _: in_bf16(compiled), model)
    assert_near(ours, wanted, 0.1)  # its implementations round elsewhere


@pytest.fixture
def traced_backward():
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot compile a backward pass along")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("build", [classifier, fcmae, v1])
def test_whole_training_step_compiles_without_a_graph_break(traced_backward, build):
    """Forward, gradients and the update of all parameters, as one graph, thrice."""
    losses = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model, loss = build()
        parameters = list(model.parameters())

        def step(model=model, loss=loss, parameters=parameters):
            value = loss(model)
            gradients = torch.autograd.grad(value, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, list(gradients), alpha=-1e-4)
            return value.detach()

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiling else step
        losses.append([run().item() for _ in range(3)])
    assert losses[0][0] > losses[0][1] > losses[0][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.slow
def test_compiled_step_with_fused_adamw_breaks_nowhere_but_in_torchs_optimizer(traced_backward):
    """`Optimizer.step` breaks the graph itself; the model is one graph with eager's numbers."""
    runs = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model, loss = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

        def forward_backward(model=model, loss=loss):
            value = loss(model)
            value.backward()
            return value.detach()

        update = optimizer.step
        if compiling:
            forward_backward = torch.compile(forward_backward, fullgraph=True, backend="aot_eager")
            update = torch.compile(update, backend="aot_eager")
        values = []
        for _ in range(3):
            values.append(forward_backward().item())
            update()
            optimizer.zero_grad(set_to_none=False)
        runs.append(values)
    assert runs[0][0] > runs[0][2]
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


LAYOUTS = {  # shape and strides of a custom operation's input
    "dense": ((2, 5, 6, 4), None),
    "channels first in memory": ((2, 5, 6, 4), (0, 3, 1, 2)),
    "images last in memory": ((2, 5, 6, 4), (1, 2, 3, 0)),
    "packed": ((2, 2, 3, 3, 4), None),
    "packed, images last": ((2, 2, 3, 3, 4), (1, 2, 3, 4, 0)),
    "one cell": ((1, 1, 1, 1), None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiler_is_told_the_truth_about_shapes_and_strides(layout, dtype):
    """Code generated for other strides would read the wrong values, or stop."""
    shape, order = LAYOUTS[layout]
    x = torch.randn(shape, dtype=dtype)
    if order:
        x = x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    weight, bias = torch.randn(shape[-1], 1, 7, 7, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    place = (None, None)
    if len(shape) == 5:
        grid = PatchGrid(torch.tensor([[[0, 1, 0], [1, 1, 1]], [[1, 1, 0], [0, 1, 1]]]))
        place = (grid.ids, grid.slots)
    checks = ("test_schema", "test_faketensor")
    calls = torch.ops.convnextv2
    torch.library.opcheck(calls.depthwise.default, (x, weight, bias, *place), test_utils=checks)
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (x, x, weight, *place, *wanted)
        torch.library.opcheck(calls.depthwise_gradients.default, arguments, test_utils=checks)
    if dtype == torch.float32:
        factors = torch.randn(6, shape[-1]), torch.randn(6)
        torch.library.opcheck(calls.linear.default, (x, *factors), test_utils=checks)


# --- recomputed, called with other parameters, copied ---------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_checkpointed_block_has_the_same_gradients(reentrant, packed, half):
    """The second forward meets the same dropped paths, and under autocast the same precision."""
    torch.manual_seed(0)
    block = scramble(Block(4, drop_path=0.5), torch.float32)
    x = torch.randn((4, 1, 2, 2, 4) if packed else (4, 5, 3, 4), requires_grad=True)
    grid = PatchGrid(MASK.repeat(2, 1).view(4, 2, 2)) if packed else None

    def gradients(run):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = run(x, grid)
        y.square().sum().backward()
        found = {"x": x.grad, **{n: p.grad for n, p in block.named_parameters()}}
        x.grad = None
        block.zero_grad()
        return found

    wanted = gradients(block)
    ours = gradients(lambda *inputs: checkpoint(block, *inputs, use_reentrant=reentrant))
    assert_near(ours, wanted, 1e-6)


@pytest.mark.parametrize("build", [classifier, fcmae])
def test_functional_call_computes_with_the_parameters_it_gets(build):
    model, loss = build()
    wanted = with_gradients(loss, model)
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))

    def called(own):
        return loss(lambda *inputs: torch.func.functional_call(model, own, inputs))

    value = called(own)
    value.backward()
    assert_near({"loss": value.detach()} | {n: p.grad for n, p in own.items()}, wanted)
    gradients, value = torch.func.grad_and_value(called)(own)
    assert_near({"loss": value.detach(), **gradients}, wanted)


@pytest.mark.parametrize("build", [classifier, fcmae])
def test_average_of_a_model_starts_as_the_model_and_follows_it(build):
    """A moving average is a deep copy whose parameters are written in place."""
    model, loss = build()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    other = copy.deepcopy(model)
    assert loss(average).item() == loss(model).item() == loss(other).item()
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.75)
    assert loss(average).item() == pytest.approx(loss(other).item(), rel=1e-12)


# --- exported ----------------------------------------------------------------------------


def operations(program):
    """Names of the functions that a program and the programs inside it call."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes]
    return {str(node.target) for node in nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    ("strict", "dtype", "is_v1"),
    [  # every pair of values once
        (False, torch.float64, False),
        (False, torch.float32, True),
        (True, torch.float64, True),
        (True, torch.float32, False),
    ],
)
def test_exported_classifier_is_of_torchs_operations_alone(strict, dtype, is_v1):
    """Other programs have no convnextv2::depthwise, and maybe no oneDNN."""
    model = (v1(dtype)[0].encoder if is_v1 else classifier(dtype)[0]).eval()
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    program = torch.export.export(model, (images,), strict=strict)
    assert not any("convnextv2" in name or "mkldnn" in name for name in operations(program))
    plain = program.run_decompositions()
    foreign = {name for name in operations(plain) if not name.startswith("aten.")}
    assert foreign <= {"<built-in function getitem>"}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for other in (program.module(), plain.module()):
        assert_near({"": other(images)}, {"": model(images)}, tolerance)


def test_exported_classifier_takes_other_batches():
    """`len` and `split` would have fixed the batch that export saw."""
    model = classifier()[0].eval()
    example = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    sizes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(model, (example,), dynamic_shapes=sizes, strict=False)
    for n in (1, 5):
        images = torch.randn(n, 3, 16, 16, dtype=torch.float64)
        assert_near({"": program.module()(images)}, {"": model(images)}, 1e-12)


def test_traced_classifier_is_of_torchs_operations_and_takes_other_batches():
    model = classifier()[0].eval()
    example, images = (torch.randn(n, 3, 16, 16, dtype=torch.float64) for n in (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (example,))
    graph = str(traced.inlined_graph)
    assert "aten::_convolution" in graph
    assert "convnextv2::" not in graph
    assert "mkldnn::" not in graph
    assert "PythonOp" not in graph
    assert_near({"": traced(images)}, {"": model(images)}, 1e-12)


def test_exporting_one_model_leaves_the_fast_path_to_others():
    model, loss = classifier()
    torch.export.export(model.eval(), (torch.zeros(1, 3, 16, 16, dtype=torch.float64),))
    value = loss(model)
    found, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        found.add(type(node).__name__)
        stack += [above for above, _ in node.next_functions if above is not None]
    assert {"_MLPBackward", "_DepthwiseNormBackward"} <= found


# --- on a GPU ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("build", [classifier, fcmae])
@pytest.mark.parametrize("half", [False, True])
def test_every_implementation_is_the_same_on_a_gpu(build, half):
    """Eager with each --kernels, compiled, checkpointed and graphed against torch's own."""
    model, raw_loss = build(torch.float32, "cuda")

    def loss(model):
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            return raw_loss(model)

    autotune.set_kernels("torch", torch.device("cuda"))
    wanted = with_gradients(loss, model)
    tolerance = 0.1 if half else 2e-3  # TF32 may be on
    for mode in ("auto", "triton"):
        autotune.set_kernels(mode, torch.device("cuda"))
        assert_near(with_gradients(loss, model), wanted, tolerance)
    compiled = torch.compile(model, fullgraph=True)
    assert_near(with_gradients(lambda _: loss(compiled), model), wanted, tolerance)
    again = with_gradients(lambda m: checkpoint(loss, m, use_reentrant=False), model)
    assert_near(again, wanted, tolerance)

    parameters = list(model.parameters())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(loss(model), parameters)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(model)
        grads = torch.autograd.grad(value, parameters)
    graph.replay()
    names = [name for name, _ in model.named_parameters()]
    assert_near({"loss": value.detach(), **dict(zip(names, grads, strict=True))}, wanted, tolerance)


# --- special cases -------------------------------------------------------------------------


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [classifier, fcmae])
def test_compiled_inference_is_one_graph(build, without):
    """The compiler drops a Function's context by counting the arguments of its `forward`."""
    model, loss = build()
    wanted = loss(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with without():
        assert torch.allclose(loss(compiled), wanted)


@pytest.mark.slow
def test_new_batch_size_makes_one_graph_for_all():
    """An autotuner key made from the batch size would compile again for each."""
    model, _ = classifier()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for batch in (4, 3, 7, 5, 9):
        compiled(torch.randn(batch, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "norm", nn.RMSNorm(8)),
        lambda block: setattr(block, "norm", nn.Identity()),
        lambda block: setattr(block, "norm", nn.LayerNorm(8, bias=False)),
        lambda block: setattr(block, "dwconv", nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False)),
        lambda block: setattr(block, "pwconv1", nn.Linear(8, 32, bias=False)),
        lambda block: setattr(block, "pwconv1", Doubled(8, 32)),
        lambda block: nn.utils.parametrizations.weight_norm(block.pwconv2),
        lambda block: block.grn.register_forward_hook(lambda module, args, out: 2 * out),
        lambda block: block.dwconv.register_forward_hook(lambda module, args, out: 2 * out),
        lambda block: block.pwconv2.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda block: setattr(block.pwconv1, "forward", Doubled(8, 32).double().forward),
        lambda block: setattr(block, "dwconv", circular()),
        lambda block: setattr(block, "dwconv", nn.Conv2d(8, 8, 3, padding=1)),
        lambda block: setattr(block, "dwconv", nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_changed_module_is_called(change, packed):
    """LoRA on a layer whose forward never runs would train nothing."""
    block = Block(8)
    change(block)
    scramble(block)
    grid = PatchGrid(MASK, (2, 2)) if packed else None
    x = torch.randn(2, *((1, 3, 3) if packed else (6, 6)), 8, dtype=torch.float64)
    dense = grid.unpack(x) if packed else x
    y = block.dwconv(dense.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = block.norm(grid.pack(y) if packed else y)
    y = x + block.pwconv2(block.grn(nn.functional.gelu(block.pwconv1(y))))
    assert torch.allclose(block(x, grid), y)
    block(x, grid).sum().backward()


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["dwconv", "norm", "pwconv1", "grn", "pwconv2"])
def test_hooks_of_the_backward_pass_fire(kind, name):
    block, fired = scramble(Block(8)), []
    getattr(getattr(block, name), f"register_{kind}")(lambda *_: fired.append(name))
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64, requires_grad=True)
    block(x).sum().backward()
    assert fired == [name]


def test_hooks_of_all_modules_fire_for_each():
    block, seen = scramble(Block(8)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        block(torch.randn(2, 6, 6, 8, dtype=torch.float64))
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.LayerNorm, nn.Linear, GRN} <= set(seen)


def circular() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="circular")


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batch_passes(dtype):
    """The last rank of an evaluation may have nothing; oneDNN refused it in float32."""
    model = classifier()[0].to(dtype)
    logits = model(torch.empty(0, 3, 16, 16, dtype=dtype))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())
    assert PatchConv(3, 4, 4)(torch.empty(0, 8, 8, 3)).shape == (0, 2, 2, 4)


def test_image_smaller_than_the_stride_is_named():
    with pytest.raises(UserError, match="map of 1 x 1 cells is smaller than the 2 x 2"):
        create_model("convnextv2_atto")(torch.zeros(1, 3, 16, 16))


def test_results_may_be_changed_in_place():
    """Like those of nn.Linear and nn.Conv2d: a view made inside an autograd function may not."""
    x = torch.randn(2, 8, 8, 3, requires_grad=True)
    torch.relu_(PatchConv(3, 4, 4)(x)).sum().backward()
    y = fused_dwconv(x, nn.Conv2d(3, 3, 7, padding=3, groups=3), nn.LayerNorm(3))
    y.mul_(2).sum().backward()


def test_second_order_gradients_of_layers_behind_each_other_count_once():
    """Asked for the gradient in its input, torch went on into the layer before, and came back."""
    block, x = scramble(Block(8)), torch.randn(2, 6, 6, 8, dtype=torch.float64)
    layer = init_weights(nn.Linear(8, 8))
    product = (lambda x: affine(x, layer.weight, layer.bias), layer.parameters(), x.float())
    for net, parameters, start in ((block, block.parameters(), x), product):
        parameters = list(parameters)
        loss = net(net(start)).square().sum()
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        again = torch.autograd.grad(loss, parameters, create_graph=True)
        for one, other in zip(first, again, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-4)


def test_second_derivative_of_products_in_float32():
    """gradgradcheck runs in float64, which has one implementation with torch's own gradient."""
    layer, x = init_weights(nn.Linear(5, 7)), torch.randn(3, 4, 5, requires_grad=True)
    wanted = None
    for product in (affine, nn.functional.linear):
        first = torch.autograd.grad(
            product(x, layer.weight, layer.bias).square().sum(),
            [x, layer.weight],
            create_graph=True,
        )
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight])
        wanted = wanted or second
        for one, other in zip(second, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_float64_stays_under_autocast():
    block, x = scramble(Block(8)), torch.randn(2, 6, 6, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert torch.equal(y, block(x))


def test_frozen_weights_get_no_gradient_and_the_rest_its_own():
    block, x = scramble(Block(8)), torch.randn(2, 6, 6, 8, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(block(x).square().sum(), x)[0]
    block.requires_grad_(False)
    block(x).square().sum().backward()
    assert torch.allclose(x.grad, wanted)
    assert all(parameter.grad is None for parameter in block.parameters())


def test_almost_dead_channel_keeps_fp16_gradients_finite():
    """The gradient of its norm over that norm exceeds the range of fp16."""
    torch.manual_seed(0)
    block = Block(8)
    nn.init.normal_(block.grn.gamma)
    with torch.no_grad():
        block.pwconv1.bias[:] = -4.5
    x = torch.randn(2, 6, 6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = block(x)
    (65536.0 * y.float().mean()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivative_with_norm_and_grid(packed):
    block = scramble(Block(3))
    grid = PatchGrid(MASK, (2, 2)) if packed else None
    x = torch.randn(2, *((1, 2, 2) if packed else (2, 2)), 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: block(x, grid), x.requires_grad_())
