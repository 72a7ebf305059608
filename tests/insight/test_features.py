# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Features of a frozen network: the ones that fine-tuning sees, each image once, in order."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from errors import UserError
from insight.features import extract, pooled_features
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.masked import MaskedFCMAE
from tests.groups import results_of, run_ranks
from tests.tiny import SIZE

CPU = torch.device("cpu")
IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(7) % 3


def classifier(**options) -> ConvNeXtV2:
    torch.manual_seed(0)
    return ConvNeXtV2(*SIZE, num_classes=3, **options)


def batches(*groups: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(IMAGES[ids], LABELS[ids], torch.tensor(ids)) for ids in groups]


def test_features_are_those_of_a_new_classifier_with_the_pretrained_weights():
    model = classifier().eval()
    expected = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    fcmae = FCMAE(classifier(), decoder_embed_dim=8).eval()  # with the same weights
    torch.testing.assert_close(pooled_features(fcmae, IMAGES), expected)
    torch.testing.assert_close(pooled_features(model, IMAGES), expected)


def test_a_trained_norm_is_part_of_the_features():
    model = classifier().eval()
    model.norm.weight.data.fill_(2)
    torch.testing.assert_close(
        pooled_features(model, IMAGES), 2 * pooled_features(classifier().eval(), IMAGES)
    )


def test_features_of_other_networks_are_the_input_of_their_classifier():
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3).eval()
    expected = network.forward_features(IMAGES).mean((-2, -1))
    torch.testing.assert_close(pooled_features(network, IMAGES), expected)
    torch.testing.assert_close(pooled_features(MaskedFCMAE(network), IMAGES), expected)


def test_a_network_of_unknown_features_is_refused():
    with pytest.raises(UserError, match="Linear has no forward_features"):
        extract(nn.Linear(3, 3), batches([0]), CPU)


def test_each_image_counts_once_in_the_order_of_the_data():
    found = extract(classifier(), batches([6, 2], [0, 4, 2], [1, 3, 5]), CPU)
    assert found.ids.tolist() == list(range(7))
    assert torch.equal(found.labels, LABELS)
    torch.testing.assert_close(found.features, pooled_features(classifier().eval(), IMAGES))


def test_rows_of_labels_are_kept():
    rows = torch.rand(7, 2)
    (images, _, ids), *_ = batches([3, 1])
    found = extract(classifier(), [(images, rows[ids], ids)], CPU)
    assert torch.equal(found.labels, rows[[1, 3]])


def test_network_is_frozen_in_eval_mode_and_put_back():
    model = classifier(drop_path_rate=0.9).train()
    model.head.eval()
    state = torch.get_rng_state()
    first, second = (extract(model, batches([0, 1]), CPU).features for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model.head.training


def test_no_image_at_all_is_refused():
    with pytest.raises(UserError, match="no image"):
        extract(classifier(), [], CPU)


def test_autocast_gives_float32_features():
    found = extract(classifier(), batches([0, 1, 2]), CPU, torch.bfloat16).features
    assert found.dtype == torch.float32
    exact = extract(classifier(), batches([0, 1, 2]), CPU).features
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0.1)


# --- on two ranks ---------------------------------------------------------------------------------


def uneven(rank: int, folder: Path) -> dict[str, Tensor] | None:
    own = [batches([6, 0, 3], [1, 5, 4, 2]), []][rank]
    found = extract(classifier(), own, CPU)
    return found and found._asdict()


def shared(rank: int, folder: Path) -> dict[str, Tensor] | None:
    own = [batches([0, 2], [4, 6]), batches([1, 3, 5, 6])][rank]  # 6 twice, as of padding
    found = extract(classifier(), own, CPU)
    return found and found._asdict()


def nothing(rank: int, folder: Path) -> str:
    with pytest.raises(UserError, match="no image") as found:
        extract(classifier(), [], CPU)
    return str(found.value)


def test_two_ranks_give_the_features_of_one(tmp_path):
    first, second = results_of(run_ranks([uneven, shared, nothing], 2, tmp_path))
    one = extract(classifier(), batches(list(range(7))), CPU)
    for job in ("uneven", "shared"):
        assert second[job] is None
        assert torch.equal(first[job]["ids"], one.ids)
        assert torch.equal(first[job]["labels"], one.labels)
        torch.testing.assert_close(first[job]["features"], one.features)
    assert first["nothing"] == second["nothing"]
