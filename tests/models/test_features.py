# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Maps for detection and segmentation: timm's numbers, gradients, weights."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch

from errors import UserError
from models import create_model
from models.convnextv2 import ConvNeXtV2, take_stages
from models.fcmae import FCMAE
from optim_factory import LayerDecayValueAssigner, get_parameter_groups
from weights.convert import to_timm
from weights.pretrained import load_pretrained

DEPTHS, DIMS = (1, 2, 1, 1), (4, 6, 8, 10)


@torch.no_grad()
def network(seed: int = 0, **kwargs) -> ConvNeXtV2:
    """In float64, with every parameter away from its start."""
    model = ConvNeXtV2(DEPTHS, DIMS, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.double()


def pair(**kwargs) -> tuple[ConvNeXtV2, ConvNeXtV2]:
    """A whole network and a backbone with its weights."""
    whole = network(num_classes=5)
    backbone = network(seed=1, features_only=True, **kwargs)
    names = backbone.state_dict().keys()
    backbone.load_state_dict({name: whole.state_dict()[name] for name in names})
    return whole, backbone


def images_of(*size: int, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, *size, generator=generator, dtype=torch.float64)


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got, expected)


# --- numbers and shapes -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (256, 192), (384, 384), (100, 76), (39, 65)])
def test_maps_are_timms(size):
    from timm.models._features import FeatureGetterNet
    from timm.models.convnext import ConvNeXt

    ours, backbone = pair()
    theirs = ConvNeXt(depths=DEPTHS, dims=DIMS, num_classes=5, use_grn=True, ls_init_value=None)
    theirs.double().load_state_dict(to_timm(ours.state_dict()), strict=True)
    oracle = FeatureGetterNet(theirs, out_indices=(0, 1, 2, 3))
    images = images_of(*size, n=1)
    with torch.no_grad():
        expected, got = oracle(images), backbone(images)
    for mine, other in zip(got, expected, strict=True):
        assert other.std() > 0.1  # otherwise anything would be close
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert backbone.feature_info.channels() == oracle.feature_info.channels()
    assert backbone.feature_info.reduction() == oracle.feature_info.reduction()


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_shapes_are_what_feature_info_says(stem_stride, size):
    model = network(features_only=True, stem_stride=stem_stride)
    strides = model.feature_info.reduction()
    assert strides == [stem_stride, 2 * stem_stride, 4 * stem_stride, 8 * stem_stride]
    sizes = [(size[0] // stride, size[1] // stride) for stride in strides]
    maps = model(images_of(*size))
    expected = [(2, dim, *size) for dim, size in zip(DIMS, sizes, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_pixels_that_fill_no_whole_cell_have_no_effect():
    """39 x 65: the stem sees 36 x 64, 9 x 16 cells; the next stage 8 x 16 of them."""
    model = network(features_only=True).eval()
    images = images_of(39, 65)
    changed = images.clone()
    changed[:, :, 36:] = 7
    changed[:, :, :, 64:] = 7
    maps = model(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 16), (4, 8), (2, 4), (1, 2)]
    assert_equal(model(changed), maps)


def test_last_map_is_the_features():
    model = network()
    images = images_of(64, 64)
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, model.forward_features(images))
    assert torch.equal(maps[3], last)


# --- which stages -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "taken"),
    [(None, (0, 1, 2, 3)), (1, (3,)), (3, (1, 2, 3)), ((0, 2), (0, 2)), ([1, -1], (1, 3))],
)
def test_indices_mean_what_they_mean_in_timm(indices, taken):
    from timm.models._features import feature_take_indices

    assert take_stages(indices, 4) == taken
    assert feature_take_indices(4, indices)[0] == list(taken)
    model = network()
    images = images_of(64, 64)
    last, maps = model.forward_intermediates(images)
    chosen = [maps[i] for i in taken]
    again, got = model.forward_intermediates(images, indices)
    assert torch.equal(again, last)
    assert_equal(got, chosen)
    assert_equal(model.forward_intermediates(images, indices, intermediates_only=True), chosen)
    backbone = pair(out_indices=indices)[1]
    assert_equal(backbone(images), chosen)
    assert backbone.feature_info.channels() == [DIMS[i] for i in taken]
    assert backbone.feature_info.reduction() == [4 * 2**i for i in taken]


@pytest.mark.parametrize("indices", [0, 5, -1, (), (4,), (-5,), (2, 1), (1, 1), (3, -1)])
def test_stages_that_are_not_there_are_refused(indices):
    with pytest.raises(UserError, match="1 to 4, or a rising list of numbers from 0 to 3"):
        network().forward_intermediates(images_of(32, 32), indices)
    with pytest.raises(UserError, match="rising list"):
        network(features_only=True, out_indices=indices)


def test_deeper_stages_do_not_run_for_the_maps_alone():
    model = network()
    model.stages[2].forward = model.downsample_layers[2].forward = None
    assert len(model.forward_intermediates(images_of(32, 32), (0, 1), intermediates_only=True)) == 2
    with pytest.raises(TypeError):
        model.forward_intermediates(images_of(32, 32), (0, 1))


def test_out_indices_without_features_only_are_refused():
    with pytest.raises(UserError, match="needs features_only=True"):
        network(out_indices=(1, 2))
    with pytest.raises(UserError, match="features_only is for convnextv2_atto"):
        create_model("fcmae_convnextv2_atto", features_only=True)


def test_backbones_by_name_and_of_a_fork():
    with torch.device("meta"):
        model = create_model("convnextv2_tiny", features_only=True, out_indices=(1, 2, 3))
    assert model.feature_info.channels() == [192, 384, 768]
    model = create_model("tests.tiny:classifier", features_only=True, out_indices=(0, 1))
    assert len(model.stages) == 2


# --- training ---------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [None, (0, 1), (1, 2), (3,)])
def test_every_parameter_of_a_backbone_gets_a_gradient(out_indices):
    """One without would stop DistributedDataParallel with an error about unused parameters."""
    model = network(features_only=True, out_indices=out_indices)
    sum(m.square().mean() for m in model(images_of(64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad != 0).any(), name
        assert not name.startswith(model.left_out), name


def test_whole_network_leaves_norm_and_head_without_gradients():
    """So it is no module to wrap for a detector; see the class."""
    model = network()
    maps = model.forward_intermediates(images_of(64, 64), intermediates_only=True)
    sum(m.square().mean() for m in maps).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_gradients_are_those_of_the_whole_network():
    whole, backbone = pair()
    images = images_of(64, 64)
    for maps in (backbone(images), whole.forward_intermediates(images)[1]):
        sum((i + 1) * m.square().mean() for i, m in enumerate(maps)).backward()
    theirs = dict(whole.named_parameters())
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


def test_frozen_stages_stay_and_the_others_learn_as_before():
    free, frozen = network(features_only=True), network(features_only=True)
    for i in (0, 1):
        frozen.downsample_layers[i].requires_grad_(False)
        frozen.stages[i].requires_grad_(False)
    for model in (free, frozen):
        sum(m.square().mean() for m in model(images_of(64, 64))).backward()
    expected = dict(free.named_parameters())
    for name, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name].grad), name
        else:
            assert parameter.grad is None, name
            assert name.split(".")[1] in "01"


def test_stochastic_depth_is_that_of_the_whole_network():
    rates = [
        [block.drop_path.prob for stage in model.stages for block in stage]
        for model in (
            network(drop_path_rate=0.4),
            network(drop_path_rate=0.4, features_only=True, out_indices=(0, 1)),
        )
    ]
    assert rates[0] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rates[1] == rates[0][:3]


def test_layer_decay_counts_from_the_deepest_stage_there_is():
    model = network(features_only=True, out_indices=(0, 1))
    assigner = LayerDecayValueAssigner(model, 0.5)
    scales = {group["lr_scale"] for group in get_parameter_groups(model, 0.05, assigner)}
    assert scales == {0.5, 0.25, 0.125, 0.0625}  # three blocks and the stem


@pytest.mark.slow
def test_compiled_backbone_is_one_graph_and_the_same():
    model = network(features_only=True, out_indices=(0, 1))
    images = images_of(36, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = compiled(images), model(images)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_autocast_maps_are_close_and_train():
    model = ConvNeXtV2(DEPTHS, DIMS, features_only=True)
    images = images_of(64, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(images)
    for got, expected in zip(maps, model(images), strict=True):
        assert (got.float() - expected).norm() < 0.03 * expected.norm()
    sum(m.float().square().mean() for m in maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_backbone_is_a_backbone(twin):
    model = network(features_only=True, out_indices=(1, 2))
    other = twin(model)
    assert_equal(other(images_of(32, 32)), model(images_of(32, 32)))
    assert other.feature_info.channels() == model.feature_info.channels()


# --- weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [None, (1, 2), (0,)])
@pytest.mark.parametrize("kind", ["classifier", "autoencoder", "timm"])
def test_weights_load_into_a_backbone_and_the_rest_is_dropped(kind, out_indices, tmp_path):
    whole = network(num_classes=5)
    state = to_timm(whole.state_dict()) if kind == "timm" else whole.state_dict()
    if kind == "autoencoder":
        state = FCMAE(network(), decoder_embed_dim=12).double().state_dict()
    torch.save({"model": state}, tmp_path / "weights.pth")
    backbone = network(seed=1, features_only=True, out_indices=out_indices)
    report = load_pretrained(backbone, str(tmp_path / "weights.pth"))
    assert report.missing == []
    assert set(report.loaded) == backbone.state_dict().keys()
    images = images_of(32, 32)
    assert_equal(backbone(images), whole.forward_intermediates(images, out_indices)[1])
    if kind == "classifier":
        rest = whole.state_dict().keys() - backbone.state_dict().keys()
        assert rest == set(report.dropped)
        assert {"norm.weight", "head.bias"} <= rest


def test_backbone_that_lacks_a_tensor_it_uses_is_refused(tmp_path):
    state = network(num_classes=5).state_dict()
    del state["stages.1.1.grn.gamma"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"1 missing \(stages\.1\.1\.grn\.gamma\)"):
        load_pretrained(network(features_only=True), str(tmp_path / "weights.pth"))


# --- in a detector ---------------------------------------------------------------------


def test_detector_of_torchvision_takes_the_maps_and_trains():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(torch.nn.Module):
        out_channels = 8

        def __init__(self) -> None:
            super().__init__()
            self.body = ConvNeXtV2(DEPTHS, DIMS, features_only=True)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 8)

        def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
            return self.fpn(OrderedDict(zip("0123", self.body(images), strict=True)))

    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
    torch.manual_seed(0)
    detector = FasterRCNN(
        Backbone(),
        num_classes=2,
        rpn_anchor_generator=anchors,
        min_size=64,
        max_size=96,
        box_detections_per_img=3,
    )
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 61, 83)], [target])
    sum(losses.values()).backward()
    body = dict(detector.backbone.body.named_parameters())
    assert all(torch.isfinite(p.grad).all() and (p.grad != 0).any() for p in body.values())
    found = detector.eval()([torch.rand(3, 61, 83)])
    assert found[0]["boxes"].shape[1] == 4
