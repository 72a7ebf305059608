# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""FCMAE is exact: the packed encoder equals the definition, written here a second time.

The reference is dense, channels first, reads parameters by name and shares no code with `models`.
"""

import pytest
import torch
import torch.nn.functional as F

from config.parser import parse, pretrain_parser
from models import build_fcmae
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE, random_mask, visible_patches
from tests import tiny

SIZES = {
    "square": {"size": (64, 64)},
    "wide": {"size": (64, 96)},
    "stem 1": {"size": (24, 40), "stem_stride": 1},
    "stem 2": {"size": (32, 48), "stem_stride": 2},
    "large patch": {"size": (64, 96), "stem_stride": 2, "patch_size": 32},
    "large odd patch": {"size": (72, 48), "stem_stride": 1, "patch_size": 24},
    "one channel": {"size": (64, 64), "in_chans": 1},
    "V1": {"size": (64, 96), "layer_scale_init_value": 1e-6},
    "V1, stem 1": {"size": (24, 40), "stem_stride": 1, "layer_scale_init_value": 1e-6},
}


def build(
    stem_stride: int = 4,
    in_chans: int = 3,
    patch_size: int | None = None,
    size: tuple[int, int] = (64, 64),
    seed: int = 0,
    layer_scale_init_value: float | None = None,
    **kwargs,
) -> tuple[FCMAE, torch.Tensor, torch.Tensor]:
    """A toy FCMAE in float64 with every parameter away from its start, images and a mask."""
    torch.manual_seed(seed)
    scale = {"layer_scale_init_value": layer_scale_init_value}
    encoder = ConvNeXtV2((1, 1, 2, 1), (4, 6, 8, 10), in_chans, stem_stride=stem_stride, **scale)
    model = FCMAE(encoder, patch_size, decoder_embed_dim=12, **kwargs).double()
    with torch.no_grad():
        for parameter in model.parameters():  # GRN starts as identity and would hide its faults
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(3, in_chans, *size, dtype=torch.float64)
    h, w = model.grid_size(*size)
    mask = random_mask(torch.rand(3, h * w), visible_patches(h * w, 0.6)).double()
    return model, images, mask


def norm(x, p, name):
    """LayerNorm over the channels of (N, C, H, W)."""
    weight, bias = p[name + ".weight"], p[name + ".bias"]
    mean = x.mean(1, keepdim=True)
    spread = ((x - mean) ** 2).mean(1, keepdim=True) + 1e-6
    return (x - mean) / spread.sqrt() * weight[:, None, None] + bias[:, None, None]


def block(x, p, name, visible):
    """A block on a dense map, hidden cells zero before and after whatever could fill them."""
    weight, bias = p[name + ".dwconv.weight"], p[name + ".dwconv.bias"]
    y = F.conv2d(x * visible, weight, bias, padding=3, groups=x.shape[1])
    y = norm(y * visible, p, name + ".norm") * visible
    wide = p[name + ".pwconv1.weight"]
    y = F.conv2d(y, wide[:, :, None, None], p[name + ".pwconv1.bias"])
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5)) * visible
    fc2 = p[name + ".pwconv2.weight"][:, :, None, None], p[name + ".pwconv2.bias"]
    if name + ".gamma" in p:  # V1
        return (x + F.conv2d(y, *fc2) * p[name + ".gamma"][:, None, None]) * visible
    squares = (y**2).sum((2, 3), keepdim=True)
    length = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    relative = length / (length.mean(1, keepdim=True) + 1e-6)
    gamma, beta = (p[f"{name}.grn.{k}"].reshape(1, -1, 1, 1) for k in ("gamma", "beta"))
    y = (gamma * (y * relative) + beta + y) * visible
    return (x + F.conv2d(y, *fc2)) * visible


def upsample(mask, size):
    """(N, h, w) -> (N, 1, H, W), each value a rectangle."""
    return F.interpolate(mask[:, None], size=size, mode="nearest")


def reference_encoder(model, p, images, mask):
    """The dense network of the definition in ARCHITECTURE: zero, operate, zero."""
    n, _, height, width = images.shape
    grid = 1 - mask.reshape(n, *model.grid_size(height, width))
    x, visible = images, None
    for stage, blocks in enumerate(model.encoder.stages):
        name = f"encoder.downsample_layers.{stage}"
        conv, ln = ("0", "1") if stage == 0 else ("1", "0")
        if stage:
            x = norm(x, p, f"{name}.{ln}") * visible
        weight = p[f"{name}.{conv}.weight"]
        x = F.conv2d(x, weight, p[f"{name}.{conv}.bias"], stride=weight.shape[-1])
        visible = upsample(grid, x.shape[-2:])
        x = (norm(x, p, f"{name}.{ln}") if stage == 0 else x) * visible
        for i in range(len(blocks)):
            x = block(x, p, f"encoder.stages.{stage}.{i}", visible)
    return x


def reference_loss(model, p, images, mask):
    """Decoder and loss from the paper's text: predicted pixels compared patch by patch."""
    x = reference_encoder(model, p, images, mask)
    x = F.conv2d(x, p["proj.weight"], p["proj.bias"])
    n, _, height, width = images.shape
    h, w = model.grid_size(height, width)
    hidden = upsample(mask.reshape(n, h, w), x.shape[-2:])
    x = x * (1 - hidden) + p["mask_token"] * hidden
    for i in range(len(model.decoder)):
        x = block(x, p, f"decoder.{i}", torch.ones_like(hidden))
    x = F.conv2d(x, p["pred.weight"], p["pred.bias"])
    stride, chans, patch = model.encoder.total_stride, images.shape[1], model.patch_size
    total = 0.0
    for image in range(n):
        for row in range(h):
            for column in range(w):
                if mask[image, row * w + column] == 0:
                    continue
                top, left = row * patch, column * patch
                target = images[image, :, top : top + patch, left : left + patch]
                if model.norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                m = patch // stride  # cells along a patch
                cells = x[image, :, row * m : (row + 1) * m, column * m : (column + 1) * m]
                drawn = cells.reshape(stride, stride, chans, m, m).permute(2, 3, 0, 4, 1)
                total += ((drawn.reshape(chans, patch, patch) - target) ** 2).mean()
    return total / mask.sum()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("case", SIZES)
def test_packed_network_is_the_masked_dense_one(case, norm_pix_loss):
    model, images, mask = build(**SIZES[case], norm_pix_loss=norm_pix_loss)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        features = model.forward_encoder(images, mask)
        wanted = reference_encoder(model, parameters, images, mask)
        assert torch.allclose(features, wanted, atol=1e-12)
    loss, pred, _ = model(images, mask)
    expected = reference_loss(model, parameters, images, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    h, w = model.grid_size(*images.shape[-2:])
    assert pred.shape == (3, model.patch_size**2 * images.shape[1], h, w)
    grads = torch.autograd.grad(loss, parameters.values())
    wanted = torch.autograd.grad(expected, parameters.values())
    for name, ours, theirs in zip(parameters, grads, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("case", SIZES)
def test_hidden_pixels_and_batch_mates_cannot_change_a_visible_feature(case):
    model, images, mask = build(**SIZES[case])
    features = model.forward_encoder(images, mask)
    size = images.shape[-2:]
    hidden = upsample(mask.reshape(3, *model.grid_size(*size)), size) > 0
    scribbled = torch.where(hidden, torch.full_like(images, float("nan")), images)
    assert torch.equal(model.forward_encoder(scribbled, mask), features)
    others = torch.cat([images[:1], torch.randn_like(images[1:]) * 100])
    masks = torch.cat([mask[:1], mask[1:].flip(1)])
    assert torch.equal(model.forward_encoder(others, masks)[0], features[0])


@pytest.mark.parametrize("case", SIZES)
def test_nothing_removed_is_the_plain_dense_network(case):
    model, images, mask = build(**SIZES[case])
    features = model.forward_encoder(images, torch.zeros_like(mask))
    assert torch.allclose(features, model.encoder.forward_features(images), atol=1e-12)


def test_encoder_features_are_zero_where_removed():
    model, images, mask = build()
    features = model.forward_encoder(images, mask)
    hidden = mask.reshape(3, 1, 2, 2).expand_as(features) > 0
    assert (features[hidden] == 0).all()
    assert (features[~hidden] != 0).any()


def test_one_visible_patch_works():
    model, images, _ = build(size=(64, 96))
    mask = torch.ones(3, 6, dtype=torch.float64)
    mask[[0, 1, 2], [0, 3, 5]] = 0
    features = model.forward_encoder(images, mask)
    expected = reference_encoder(model, dict(model.named_parameters()), images, mask)
    assert torch.allclose(features, expected, atol=1e-12)


def test_dead_channels_and_black_images_have_finite_gradients():
    """d sqrt(x) at 0 is infinite: a channel that is zero everywhere made everything NaN."""
    model, images, mask = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pwconv1" in name:
                parameter[:2] = 0  # GELU(0) = 0 in two channels, everywhere
            if "stages.0" in name:
                parameter.zero_()
    images[0] = 0
    loss, _, _ = model(images, mask)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_bf16_autocast_is_close_to_float32():
    model, images, mask = build(size=(64, 96))
    model, images, mask = model.float(), images.float(), mask.float()
    exact, exact_pred, _ = model(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_pred, _ = model(images, mask)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.03)
    assert (half_pred.float() - exact_pred).norm() < 0.03 * exact_pred.norm()


def test_initial_loss_is_about_one():
    """Initialized twice, and with std 1, the official model starts at 2e10."""
    torch.manual_seed(0)
    model = FCMAE(ConvNeXtV2((2, 2, 6, 2), (40, 80, 160, 320)))
    loss, _, mask = model(torch.randn(2, 3, 224, 224))
    assert 0.9 < loss.item() < 1.2
    assert (mask == 0).sum(1).tolist() == [19, 19]
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 4) and not name.endswith(("gamma", "beta")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(49, 0.6, 19), (100, 0.9, 10), (196, 0.75, 49), (4, 0.5, 2)]
)
def test_kept_patches_do_not_depend_on_float_accidents(patches, ratio, kept):
    assert visible_patches(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 0.99, float("nan")])
def test_impossible_mask_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        visible_patches(49, ratio)


def test_uneven_mask_is_refused():
    model, images, mask = build()
    mask[0] = torch.tensor([1.0, 0, 0, 1])
    mask[1] = torch.tensor([1.0, 1, 0, 1])
    with pytest.raises(ValueError, match="same number"):
        model.forward_encoder(images, mask)


def test_image_that_patches_do_not_divide_is_refused():
    model, _, _ = build()
    with pytest.raises(ValueError, match="try 64 x 32"):
        model(torch.zeros(1, 3, 70, 40))


def test_given_mask_ratio_is_used():
    model, images, _ = build(size=(64, 96), mask_ratio=0.5)
    assert model(images)[2].sum(1).tolist() == [3, 3, 3]


def test_patchify_orders_pixels_as_the_official_one():
    model, _, _ = build()
    images = torch.arange(3 * 64 * 32).reshape(1, 3, 64, 32).double()
    patches = model.patchify(images)
    assert patches.shape == (1, 2, 32 * 32 * 3)
    assert patches[0, 0, :4].tolist() == [0, 2048, 4096, 1]  # three channels, then the next pixel
    assert patches[0, 1, 0] == 32 * 32
    assert torch.equal(model.unpatchify(patches, (2, 1)), images)


def test_pretrained_encoder_is_the_fine_tuning_model():
    """Every encoder tensor loads and nothing is left over, whatever pre-training added."""
    from weights.convert import to_convnextv2

    model, _, _ = build()
    classifier = ConvNeXtV2((1, 1, 2, 1), (4, 6, 8, 10), num_classes=5).double()
    state, report = to_convnextv2(model.state_dict())
    result = classifier.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {name.split(".")[0] for name in result.missing_keys} == {"norm", "head"}
    assert {name.split(".")[0] for name in report.dropped} == {
        "proj", "mask_token", "decoder", "pred",
    }  # fmt: skip
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(classifier.forward_features(images), model.encoder.forward_features(images))


@pytest.mark.gpu
def test_gpu_computes_what_the_cpu_does():
    """Packed network, masks and their gradients in float32, and bf16 close to it."""
    model, images, mask = build(size=(64, 96))
    expected, wanted, _ = model(images, mask)
    expected.backward()
    grads = [parameter.grad.float() for parameter in model.parameters()]
    model, images, mask = model.float().cuda(), images.float().cuda(), mask.float().cuda()
    model.zero_grad()
    loss, pred, _ = model(images, mask, 1)
    loss.backward()
    assert torch.allclose(pred.cpu().double(), wanted, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(ours.grad.cpu(), theirs, rtol=1e-2, atol=1e-3 * theirs.abs().max())
    with torch.autocast("cuda", torch.bfloat16):
        half, _, _ = model(images, mask, 1)
    assert half.item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l2", (9 + 0.25) / 2), ("l1", (3 + 0.5) / 2), ("smooth_l1", (2.5 + 0.125) / 2)],
)
def test_reconstruction_losses_by_hand(name, expected):
    """Errors of 3 and 1/2 in two removed patches; the visible ones do not count."""
    model = tiny.fcmae(3, 1, 0.0, norm_pix_loss=False, recon_loss=name)
    errors = torch.tensor([3.0, 100.0, -0.5, 100.0]).reshape(1, 1, 2, 2)
    pred = errors.expand(1, 8 * 8 * 3, 2, 2)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert model.forward_loss(torch.zeros(1, 3, 16, 16), pred, mask).item() == expected


def test_unknown_reconstruction_loss_is_refused():
    with pytest.raises(ValueError, match="unknown reconstruction loss 'l3'. Did you mean"):
        tiny.fcmae(3, 1, 0.0, recon_loss="l3")


class OwnLoss(FCMAE):
    def forward_loss(self, images, pred, mask):
        return pred.square().mean()


def own_loss(in_chans: int, stem_stride: int, drop_path_rate: float, **kwargs) -> FCMAE:
    network = tiny.classifier(in_chans=in_chans, stem_stride=stem_stride)
    return OwnLoss(network, **kwargs)


def test_reconstruction_loss_of_a_model_with_its_own_is_refused():
    """It would be ignored."""
    words = "--model tests.models.test_fcmae:own_loss --data_set DIGITS --input_size 16"
    words += " --stem_stride 1"
    args = parse(pretrain_parser(), words.split())
    assert isinstance(build_fcmae(args), OwnLoss)
    with pytest.raises(ValueError, match="OwnLoss has a forward_loss of its own"):
        build_fcmae(args.replace(recon_loss="l1"))
