# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The dense model: official names, timm's numbers, layers by hand."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from errors import UserError
from models import create_model, list_models
from models.convnextv2 import SIZES, Block, ConvNeXtV2
from models.layers import GRN, DropPath, PatchConv, fused_residual

TOY = ((1, 1, 2, 1), (4, 6, 8, 10))  # depths, dims
BASE = SIZES["base"][0]  # 3, 3, 27, 3


def toy(seed: int = 0, **kwargs) -> ConvNeXtV2:
    """A toy classifier in float64 with every parameter away from its start."""
    torch.manual_seed(seed)
    model = ConvNeXtV2(*TOY, **kwargs).double()
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():  # GRN starts as identity and would hide its faults
            parameter.add_(0.1 * torch.randn_like(parameter))


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- sizes and names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("atto", 3.7),
        ("femto", 5.2),
        ("pico", 9.1),
        ("nano", 15.6),
        ("tiny", 28.6),
        ("base", 89),
        ("large", 198),
        ("huge", 660),
    ],
)
def test_size_has_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = create_model(f"convnextv2_{size}")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1 if millions < 50 else None) == millions


def official_layout(depths, dims, in_chans, num_classes):
    """Name -> shape, from the text of the official checkpoint layout."""
    layout = {}

    def pair(name, *weight):
        layout[f"{name}.weight"], layout[f"{name}.bias"] = weight, weight[:1]

    pair("downsample_layers.0.0", dims[0], in_chans, 4, 4)
    pair("downsample_layers.0.1", dims[0])
    for i in (1, 2, 3):
        pair(f"downsample_layers.{i}.0", dims[i - 1])
        pair(f"downsample_layers.{i}.1", dims[i], dims[i - 1], 2, 2)
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for j in range(depth):
            block = f"stages.{i}.{j}"
            pair(f"{block}.dwconv", dim, 1, 7, 7)
            pair(f"{block}.norm", dim)
            pair(f"{block}.pwconv1", 4 * dim, dim)
            layout[f"{block}.grn.gamma"] = layout[f"{block}.grn.beta"] = (1, 1, 1, 4 * dim)
            pair(f"{block}.pwconv2", dim, 4 * dim)
    pair("norm", dims[-1])
    pair("head", num_classes, dims[-1])
    return layout


def test_published_checkpoint_loads_name_by_name_and_shape_by_shape():
    with torch.device("meta"):
        state = create_model("convnextv2_tiny").state_dict()
    got = {name: tuple(value.shape) for name, value in state.items()}
    assert got == official_layout((3, 3, 9, 3), (96, 192, 384, 768), 3, 1000)
    assert got["downsample_layers.0.0.weight"] == (96, 3, 4, 4)
    assert got["stages.2.5.grn.gamma"] == (1, 1, 1, 4 * 384)
    assert got["norm.weight"] == (768,)
    assert got["head.bias"] == (1000,)


def test_every_size_can_be_had_dense_and_as_fcmae():
    small = ["atto", "femto", "pico", "nano", "tiny"]
    dense = [f"convnextv2_{size}" for size in (*small, "base", "large", "huge")]
    dense += [f"convnext_{size}" for size in (*small, "small", "base", "large", "xlarge")]
    names = [name for name in list_models() if "convnext" in name]
    assert names == dense + [f"fcmae_{name}" for name in dense]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("convnextv2_tny", "'convnextv2_tiny'"), ("fcmae_convnextv2_bas", "'fcmae_convnextv2_base'")],
)
def test_misspelled_model_is_an_error_that_names_the_right_one(typo, meant):
    with pytest.raises(UserError, match=f"unknown model '{typo}'.*Did you mean .*{meant}"):
        create_model(typo)


def test_module_attribute_is_no_model_name():
    """The official code looked names up in a module: `--model Block` was one."""
    for name in ("Block", "ConvNeXtV2", "torch", ""):
        with pytest.raises(UserError, match="unknown model|expected a name"):
            create_model(name)


def test_model_of_a_fork_needs_no_edit_here(tmp_path, monkeypatch):
    (tmp_path / "fork_nets.py").write_text(
        "import torch\ndef small(width, num_classes):\n"
        "    return torch.nn.Linear(width, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert create_model("fork_nets:small", width=7, num_classes=2).weight.shape == (2, 7)
    with pytest.raises(UserError, match="cannot import model 'fork_nets:large'"):
        create_model("fork_nets:large")
    with pytest.raises(UserError, match="cannot import model 'no_such_module:small'"):
        create_model("no_such_module:small")


def test_fcmae_by_name_takes_keywords_of_both_halves():
    torch.manual_seed(0)
    model = create_model("fcmae_convnextv2_atto", patch_size=64, in_chans=1, decoder_embed_dim=16)
    assert model.encoder.downsample_layers[0][0].weight.shape == (40, 1, 4, 4)
    assert model.mask_token.shape == (1, 16, 1, 1)
    loss, pred, mask = model(torch.randn(2, 1, 128, 128))
    assert pred.shape == (2, 64 * 64, 2, 2)
    assert mask.sum(1).tolist() == [3, 3]  # floor(4 * 0.4) = 1 of 4 stays visible
    assert torch.isfinite(loss)
    with pytest.raises(TypeError, match="no_such"):
        create_model("fcmae_convnextv2_atto", no_such=1)


# --- the same numbers as timm ---------------------------------------------------------------


def timm_name(name: str) -> str:
    """Name in the official layout -> timm's, as OFFICIAL.md lists them."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        stage = parts[1]
        return ".".join(["stem" if stage == "0" else f"stages.{stage}.downsample", *parts[2:]])
    if parts[0] == "stages":
        inner = ".".join(parts[3:])
        for ours, theirs in {
            "dwconv": "conv_dw",
            "pwconv1": "mlp.fc1",
            "pwconv2": "mlp.fc2",
            "grn.gamma": "mlp.grn.weight",
            "grn.beta": "mlp.grn.bias",
        }.items():
            inner = inner.replace(ours, theirs)
        return f"stages.{parts[1]}.blocks.{parts[2]}.{inner}"
    return f"head.{'norm' if parts[0] == 'norm' else 'fc'}.{parts[1]}"


def test_logits_are_timms_also_where_32_does_not_divide_the_image():
    import timm

    torch.manual_seed(0)
    ours = create_model("convnextv2_atto", num_classes=13).double().eval()
    shake(ours)
    oracle = timm.create_model("convnextv2_atto", num_classes=13).double().eval()
    shapes = {name: value.shape for name, value in oracle.state_dict().items()}
    state = {timm_name(name): value for name, value in ours.state_dict().items()}
    oracle.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
    for size in ((64, 64), (64, 96), (100, 76), (39, 65)):
        images = doubles(2, 3, *size)
        with torch.no_grad():
            expected, got = oracle(images), ours(images)
        assert expected.std() > 0.1  # otherwise anything would be close
        assert torch.allclose(got, expected, rtol=0, atol=1e-10), size


def test_patch_convolution_is_conv2d_on_channels_last_maps():
    torch.manual_seed(0)
    for kernel in (1, 2, 4):
        conv = PatchConv(3, 5, kernel).double()
        shake(conv)
        images = doubles(2, 3, 9, 14)
        expected = torch.nn.Conv2d.forward(conv, images)
        got = conv(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.allclose(got, expected, atol=1e-12)


# --- heads, channels, strides ---------------------------------------------------------------


def test_no_classes_gives_normalized_features():
    model = toy(num_classes=0)
    images = doubles(2, 3, 32, 64)
    out = model(images)
    assert out.shape == (2, 10)
    assert not [name for name in model.state_dict() if name.startswith("head")]
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features, pre_logits=True), out)
    mean = features.flatten(2).mean(2)  # official: average over positions, then the norm
    spread = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(out, spread * model.norm.weight + model.norm.bias, atol=1e-12)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_image_need_not_have_three_channels(in_chans):
    model = toy(in_chans=in_chans, num_classes=7)
    assert model(doubles(2, in_chans, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("stem_stride", "size"), [(1, (8, 12)), (2, (4, 6)), (4, (2, 3))]
)  # of 64 x 96 pixels: stem_stride * 8 to a cell
def test_stem_stride_sets_the_size_of_the_features(stem_stride, size):
    model = toy(stem_stride=stem_stride)
    features = model.forward_features(doubles(1, 3, 64, 96))
    assert features.shape == (1, 10, *size)
    assert model.total_stride == 8 * stem_stride
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_impossible_stem_stride_is_refused():
    with pytest.raises(ValueError, match="stem_stride 3: expected 1, 2 or 4"):
        toy(stem_stride=3)


def test_head_init_scale_shrinks_the_head_and_nothing_else():
    torch.manual_seed(0)
    plain = ConvNeXtV2(*TOY, num_classes=5).state_dict()
    torch.manual_seed(0)
    small = ConvNeXtV2(*TOY, num_classes=5, head_init_scale=0.001).state_dict()
    for name, value in small.items():
        expected = plain[name] * 0.001 if name == "head.weight" else plain[name]
        assert torch.equal(value, expected), name


def test_weights_are_initialized_once_with_std_0_02():
    """timm's default std of 1 in a second initialization made official weights useless."""
    torch.manual_seed(0)
    for name, parameter in create_model("convnextv2_atto").named_parameters():
        if parameter.ndim > 1 and "grn" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert parameter.abs().max() <= 2, name
        else:
            one = name.endswith("weight")  # of a norm; every bias, gamma and beta is 0
            assert (parameter == float(one)).all(), name


# --- drop path ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20000, 2, 1, 3), (20000, 2, 1, 1, 3)])
def test_drop_path_drops_whole_images_and_keeps_the_expectation(shape):
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(shape)).flatten(1)
    first = out[:, :1]
    assert torch.equal(out, first.expand_as(out))  # all of an image or nothing
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    # std of the mean: sqrt(0.25 / 0.75 / 20000) = 0.004
    assert first.mean().item() == pytest.approx(1, abs=0.02)


def test_drop_path_is_off_in_evaluation():
    x = torch.randn(8, 2, 2, 3)
    assert torch.equal(DropPath(0.9).eval()(x), x)


def test_drop_path_leaves_the_residual_stream_alone():
    block = Block(4, drop_path=1.0).train()
    shake(block)
    x = torch.randn(2, 5, 5, 4)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


class Results(TorchDispatchMode):
    """Lists the operations whose result has the shape of x."""

    def __init__(self, x):
        super().__init__()
        self.shape, self.found = x.shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.shape == self.shape:
            self.found.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("half", [False, True])
def test_drop_path_and_residual_are_one_pass(half):
    """They were three, a product, a quotient and a sum, each over the whole map."""
    x = torch.randn(64, 2, 2, 3)
    branch = torch.ones(x.shape, dtype=torch.bfloat16 if half else torch.float32)
    torch.manual_seed(0)
    with Results(x) as results, torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = fused_residual(x, branch, DropPath(0.3).train())
    assert results.found == ["addcmul"]
    assert y.dtype == torch.float32
    kept = (y != x).flatten(1).all(1)
    assert 0 < kept.sum() < 64
    # Rounded to bf16, 1 / 0.7 would be 0.03% too large in every block.
    torch.testing.assert_close(y[kept], x[kept] + 1 / 0.7, rtol=1e-6, atol=1e-6)
    assert torch.equal(y[~kept], x[~kept])


def test_residual_saves_no_tensor_of_the_branch():
    """The backward pass needs only which images were kept."""
    x, branch = (torch.randn(8, 2, 2, 3, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_residual(x, branch, DropPath(0.5).train()).sum().backward()
    assert [tuple(tensor.shape) for tensor in saved] == [(8, 1, 1, 1)]
    assert torch.equal(branch.grad, (2 * saved[0]).expand(branch.shape))
    assert (x.grad == 1).all()


def test_changed_drop_path_is_called():
    block = Block(4, drop_path=0.5).train()
    block.drop_path.register_forward_hook(lambda module, args, out: 0 * out)
    x = torch.randn(2, 5, 5, 4)
    assert torch.equal(block(x), x)
    block.drop_path = torch.nn.Identity()
    assert torch.equal(block(x), block.eval()(x))


def test_drop_path_rises_linearly_from_0_to_the_last_block():
    model = create_model("convnextv2_atto", drop_path_rate=0.11)
    rates = [block.drop_path.prob for stage in model.stages for block in stage]
    assert rates == pytest.approx([k / 100 for k in range(12)])


# --- GRN ------------------------------------------------------------------------------------


def test_grn_by_hand():
    """Lengths over positions 5 and 10, their mean 7.5: factors 2/3 and 4/3, for each image."""
    grn = GRN(2).double()
    grn.gamma.data[:] = torch.tensor([3.0, 6.0])
    grn.beta.data[:] = torch.tensor([1.0, 0.0])
    x = torch.tensor([[[[3.0, 6], [4, 8]]], [[[1, 1], [1, 1]]]], dtype=torch.float64)
    first = [[10, 54], [13, 72]]  # x * (1 + 3 * 2/3) + 1 and x * (1 + 6 * 4/3)
    second = [[5, 7], [5, 7]]  # equal lengths: factor 1, so 4x + 1 and 7x
    assert torch.allclose(grn(x), x.new_tensor([[first], [second]]), atol=1e-4)  # 1e-6 in the mean


def test_grn_starts_as_identity():
    x = torch.randn(2, 3, 3, 4)
    assert torch.equal(GRN(4)(x), x)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)  # two units in the last place
def test_grn_sum_does_not_overflow_or_stagnate_in_half_precision(dtype, relative):
    """rms 5 to 10 at 56 x 56: the sum of squares is at least 78400, above fp16's 65504."""
    torch.manual_seed(0)
    x = (torch.randn(1, 56, 56, 6).sign() * torch.linspace(5, 10, 6)).to(dtype)
    grn = GRN(6)
    shake(grn)
    grn = grn.to(dtype)
    expected = copy.deepcopy(grn).double()(x.double())
    x.requires_grad_()
    got = grn(x)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=2 * relative, atol=0)
    got.mean(dtype=torch.float32).backward()
    assert torch.isfinite(x.grad).all()


def test_grn_of_a_dead_channel_and_a_black_image_has_finite_gradients():
    """d sqrt(s) / ds is infinite at s = 0."""
    grn = GRN(3).double()
    shake(grn)
    x = doubles(2, 2, 2, 3)
    x[0, ..., 1] = 0
    x[1] = 0
    x.requires_grad_()
    grn(x).square().sum().backward()
    assert all(torch.isfinite(g).all() for g in (x.grad, grn.gamma.grad, grn.beta.grad))


# --- layers for layer decay -----------------------------------------------------------------


def base_layer(kind: str, name: str) -> int:
    with torch.device("meta"):
        return ConvNeXtV2(BASE, (4, 6, 8, 10)).layer_of(name, kind)


@pytest.mark.parametrize(
    ("name", "single", "group"),
    [
        ("downsample_layers.0.0.weight", 0, 0),  # the stem
        ("downsample_layers.0.1.bias", 0, 0),
        ("stages.0.0.dwconv.weight", 1, 1),
        ("stages.0.2.grn.gamma", 3, 1),
        ("downsample_layers.1.0.weight", 4, 2),
        ("downsample_layers.1.1.weight", 4, 2),
        ("stages.1.0.norm.weight", 4, 2),
        ("stages.1.2.pwconv2.bias", 6, 2),
        ("downsample_layers.2.1.bias", 7, 3),
        ("stages.2.0.dwconv.bias", 7, 3),
        ("stages.2.2.dwconv.bias", 9, 3),
        ("stages.2.3.dwconv.bias", 10, 4),
        ("stages.2.14.pwconv1.weight", 21, 7),
        ("stages.2.26.grn.beta", 33, 11),
        ("downsample_layers.3.0.weight", 34, 12),
        ("stages.3.0.dwconv.weight", 34, 12),
        ("stages.3.2.pwconv2.weight", 36, 12),
        ("norm.weight", 36, 12),
        ("head.weight", 37, 13),
        ("head.bias", 37, 13),
    ],
)
def test_layers_of_base_are_the_official_ones(name, single, group):
    assert base_layer("single", name) == single
    assert base_layer("group", name) == group


@pytest.mark.parametrize("kind", ["single", "group"])
@pytest.mark.parametrize("size", SIZES)
def test_no_layer_number_is_left_out(size, kind):
    """Official group numbers suit 27 blocks alone: with the 9 of tiny they jump from 5 to 12."""
    with torch.device("meta"):
        model = create_model(f"convnextv2_{size}")
    layers = [model.layer_of(name, kind) for name, _ in model.named_parameters()]
    blocks = model.depths[2]
    head = sum(model.depths) + 1 if kind == "single" else 4 + -(-blocks // 3)
    assert sorted(set(layers)) == list(range(head + 1))
    assert model.layer_of("head.weight", kind) == head


def test_unknown_kind_of_layer_is_refused():
    with pytest.raises((KeyError, ValueError), match="grouped"):
        toy().layer_of("head.weight", "grouped")


# --- training, copying -----------------------------------------------------------


def test_gradients_have_the_strides_of_their_parameters():
    """A channels-last gradient would be copied into DDP's bucket every step, with a warning."""
    model = toy(num_classes=3).float()  # float64 takes another path through torch
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
        assert parameter.grad.is_contiguous(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_is_a_model_of_its_own(twin):
    """The moving average is a deep copy; spawned processes pickle."""
    model = toy(num_classes=3, drop_path_rate=0.1).eval()
    images = doubles(2, 3, 32, 32)
    expected = model(images)
    other = twin(model)
    assert torch.equal(other(images), expected)
    with torch.no_grad():
        other.head.weight.zero_()
    assert torch.equal(model(images), expected)
