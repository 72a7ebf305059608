# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The classifier and the first layer of any network, and weights for other classes or channels."""

import pytest
import torch
from torch import nn

from errors import UserError
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tests import tiny
from tests.weights.test_pretrained import assert_same, randomize, values
from weights.fit import adapt_prediction, adapt_stem, find_classifier, find_stem, fit_weights
from weights.pretrained import load_pretrained


def timm_model(name: str, **kwargs) -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def torchvision_model(name: str, **kwargs) -> nn.Module:
    import torchvision

    with torch.device("meta"):
        return torchvision.models.get_model(name, **kwargs)


def classifier(**kwargs) -> ConvNeXtV2:
    return randomize(ConvNeXtV2(*tiny.SIZE, **{"num_classes": 3, **kwargs}), 0)


def autoencoder(**kwargs) -> FCMAE:
    return randomize(FCMAE(ConvNeXtV2(*tiny.SIZE, **kwargs), decoder_embed_dim=8), 0)


class OwnHead(nn.Module):
    """A network whose classifier only timm's convention finds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.last = nn.Linear(4, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.last


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: timm_model("resnet18"), ("fc.",)),
        (lambda: timm_model("convnextv2_atto"), ("head.fc.",)),
        (lambda: timm_model("efficientnet_b0"), ("classifier.",)),
        (lambda: timm_model("deit_tiny_distilled_patch16_224"), ("head.", "head_dist.")),
        (lambda: torchvision_model("resnet18"), ("fc.",)),
        (lambda: torchvision_model("mobilenet_v3_small"), ("classifier.3.",)),
        (lambda: torchvision_model("densenet121"), ("classifier.",)),
        (lambda: torchvision_model("convnext_tiny"), ("classifier.2.",)),
        (lambda: torchvision_model("vit_b_16"), ("heads.head.",)),
        (lambda: torchvision_model("squeezenet1_0"), ("classifier.1.",)),
        (classifier, ("head.",)),
        (lambda: classifier(num_classes=0), ()),
        (autoencoder, ()),
        (lambda: tiny.Other(3), ("fc.",)),
        (lambda: OwnHead(3), ("last.",)),
    ],
)
def test_classifier_is_found(build, names):
    assert find_classifier(build()) == names


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: timm_model("resnet18"), ("conv1",)),
        (lambda: timm_model("convnextv2_atto"), ("stem.0",)),
        (lambda: torchvision_model("resnet18"), ("conv1",)),
        (classifier, ("downsample_layers.0.0",)),
        (autoencoder, ("encoder.downsample_layers.0.0",)),
        (lambda: OwnHead(3), ()),
    ],
)
def test_first_layer_is_found(build, names):
    assert find_stem(build()) == names


def resnet(source: str, classes: int, seed: int) -> nn.Module:
    import timm
    import torchvision

    if source == "timm":
        return randomize(timm.create_model("resnet10t", num_classes=classes), seed)
    return randomize(torchvision.models.resnet18(num_classes=classes), seed)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_head_for_other_classes_is_new_whatever_its_name(tmp_path, lines, source):
    """A head called fc used to be `of another shape`, and refused by --finetune."""
    torch.save(resnet(source, 7, 0).state_dict(), tmp_path / "a.pth")
    model, before = resnet(source, 3, 1), resnet(source, 3, 1)
    report = load_pretrained(model, str(tmp_path / "a.pth"))
    assert report.missing == report.dropped == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, before.fc.weight)
    assert torch.equal(model.layer1[0].conv1.weight, resnet(source, 7, 0).layer1[0].conv1.weight)
    assert lines()[0].endswith("its head has 7 classes, so the model gets a new head")
    with pytest.raises(UserError, match="trained on 7 classes and this model has 3"):
        load_pretrained(model, str(tmp_path / "a.pth"), new=())


def test_head_that_fits_is_kept_whatever_its_name(tmp_path):
    torch.save(resnet("torchvision", 7, 0).state_dict(), tmp_path / "a.pth")
    model = resnet("torchvision", 7, 1)
    assert load_pretrained(model, str(tmp_path / "a.pth")).missing == []
    assert_same(values(model), values(resnet("torchvision", 7, 0)))


class Renamed(ConvNeXtV2):
    """A fork's ConvNeXt V2 whose head is called fc."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(*tiny.SIZE, num_classes=num_classes)
        self.fc = self.head
        del self.head


def test_published_weights_load_into_a_fork_that_calls_its_head_otherwise(tmp_path):
    torch.save(classifier().state_dict(), tmp_path / "a.pth")
    model = Renamed(3)
    assert load_pretrained(model, str(tmp_path / "a.pth")).missing == []
    assert torch.equal(model.fc.weight, classifier().head.weight)
    other = Renamed(5)
    assert load_pretrained(other, str(tmp_path / "a.pth")).missing == ["fc.weight", "fc.bias"]


# --- channels -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_first_layer_is_adapted_by_timms_rule(channels, dtype):
    from timm.models import adapt_input_conv

    weight = torch.randn(5, 3, 2, 2).to(dtype)
    got, expected = adapt_stem(weight, channels), adapt_input_conv(channels, weight.clone())
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_rgb_weights_load_for_other_channels_and_it_is_reported(tmp_path, lines, channels):
    """They used to be refused: (4, 3, 4, 4) instead of (4, 1, 4, 4); check --model."""
    torch.save(classifier().state_dict(), tmp_path / "a.pth")
    model = classifier(in_chans=channels)
    load_pretrained(model, str(tmp_path / "a.pth"))
    how = "summed" if channels == 1 else f"repeated and multiplied by 3/{channels}"
    wanted = f"trained on 3 channels and the model has {channels}: the weights of the first layer"
    assert any(f"{wanted} are {how}" in line for line in lines())
    stem, name = classifier().state_dict(), "downsample_layers.0.0.weight"
    assert torch.equal(model.state_dict()[name], adapt_stem(stem[name], channels))
    if channels % 3 == 0 or channels == 1:  # equal channels give the same features
        gray = torch.randn(2, 1, 64, 64)
        expected = classifier()(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model(gray.expand(-1, channels, -1, -1)), expected)


def test_gray_weights_load_for_rgb(tmp_path):
    torch.save(classifier(in_chans=1).state_dict(), tmp_path / "a.pth")
    model, gray = classifier(), torch.randn(2, 1, 64, 64)
    load_pretrained(model, str(tmp_path / "a.pth"))
    expected = classifier(in_chans=1)(gray)
    torch.testing.assert_close(model(gray.expand(-1, 3, -1, -1)), expected)


@pytest.mark.parametrize("new", [(), ("norm.", "head.")])
def test_weights_for_four_channels_are_not_adapted(tmp_path, new):
    """The meaning of the fourth is unknown. Evaluation adapts nothing."""
    torch.save(classifier(in_chans=4).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="belong to other flags: --in_chans 4"):
        load_pretrained(classifier(), str(tmp_path / "a.pth"), new=new)


def test_evaluation_adapts_no_channels(tmp_path):
    torch.save(classifier().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="belong to other flags: --in_chans 3"):
        load_pretrained(classifier(in_chans=1), str(tmp_path / "a.pth"), new=())


def test_first_layer_of_other_networks_is_adapted(tmp_path):
    import timm

    source = randomize(timm.create_model("resnet10t", num_classes=3), 0)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = randomize(timm.create_model("resnet10t", num_classes=3, in_chans=1), 1)
    load_pretrained(model, str(tmp_path / "a.pth"))
    gray = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(model(gray), source(gray.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 6), (3, 12), (1, 3)])
def test_pretraining_continues_on_other_channels(tmp_path, before, after):
    """The prediction for a channel is that for the channel whose weights it took, or the mean."""
    source, model = autoencoder(in_chans=before), autoencoder(in_chans=after)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert load_pretrained(model, str(tmp_path / "a.pth")).missing == []
    gray, mask = torch.randn(2, 1, 64, 64), torch.tensor([[1.0, 0, 1, 0]] * 2)
    theirs, ours = (
        network.unpatchify(pred.flatten(2).transpose(1, 2))  # (N, C, H, W)
        for network, images in ((source, before), (model, after))
        for pred in [network(gray.expand(-1, images, -1, -1), mask)[1]]
    )
    expected = (
        theirs.mean(1, keepdim=True) if after == 1 else theirs[:, torch.arange(after) % before]
    )
    torch.testing.assert_close(ours, expected)


def test_predictions_are_repeated_channel_by_channel():
    """Rows are pixels times channels: 2 pixels of red, green, blue."""
    rows = torch.tensor([1.0, 2, 3, 10, 20, 30])
    assert adapt_prediction(rows, 2, 4).tolist() == [1, 2, 3, 1, 10, 20, 30, 10]
    assert adapt_prediction(rows, 2, 1).tolist() == [2, 20]
    assert adapt_prediction(rows[:, None], 2, 1).tolist() == [[2], [20]]


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_atto", "edgenext_xx_small"])
def test_network_of_timm_loads_its_own_weights(name):
    """Since it has a layer `stem.0`, its weights were converted to our names, and refused."""
    import timm

    model = timm.create_model(name, num_classes=3)
    state, _ = fit_weights(model, timm.create_model(name, num_classes=3).state_dict())
    assert state.keys() == model.state_dict().keys()


def test_autoencoder_of_ones_own_keeps_its_decoder():
    """Names of its encoder do not make it a classifier that needs the encoder alone."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    state, report = fit_weights(model, model.state_dict())
    assert state.keys() == model.state_dict().keys()
    assert report.dropped == []
