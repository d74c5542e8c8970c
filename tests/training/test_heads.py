"""Heads: shapes, arithmetic cost, the operators they use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from igate_edge.errors import ConvertError
from igate_edge.training.heads import DenseHead, FeatureInfo, VectorHead

FEATURES = [FeatureInfo(4, 4), FeatureInfo(8, 8), FeatureInfo(16, 16)]


def maps(height: int = 12, width: int = 16) -> list[torch.Tensor]:
    return [torch.randn(2, f.channels, -(-height * 4 // f.stride), -(-width * 4 // f.stride)) for f in FEATURES]


def test_dense_head_answers_at_the_finest_stride() -> None:
    assert DenseHead(FEATURES, outputs=5, width=6)(maps()).shape == (2, 5, 12, 16)


def test_dense_head_takes_odd_sizes() -> None:
    assert DenseHead(FEATURES, outputs=5, width=6)(maps(13, 17)).shape == (2, 5, 13, 17)


def test_dense_head_parameters_are_the_layers_named() -> None:
    count = sum(p.numel() for p in DenseHead(FEATURES, outputs=5, width=6).parameters())
    lateral = (4 + 8 + 16) * 6 + 3 * 6
    assert count == lateral + 6 * 6 * 9 + 2 * 6 + 6 * 5 + 5


def test_every_feature_map_is_read() -> None:
    head, features = DenseHead(FEATURES, outputs=1, width=6).eval(), maps()
    before = head(features)
    for index in range(len(features)):
        changed = [f + 1 if i == index else f for i, f in enumerate(features)]
        assert not torch.equal(head(changed), before)


def test_single_map_needs_no_lateral() -> None:
    head = DenseHead([FeatureInfo(4, 8)], outputs=2, width=6)
    assert head([torch.zeros(1, 4, 3, 5)]).shape == (1, 2, 3, 5)
    assert sum(isinstance(m, nn.Conv2d) for m in head.modules()) == 2


def test_vector_head_is_the_mean_then_linear() -> None:
    head = VectorHead(FEATURES, outputs=3)
    features = maps()
    expected = features[-1].mean((2, 3)) @ head.out.weight[:, :, 0, 0].T + head.out.bias
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("features", [[], [FeatureInfo(4, 8), FeatureInfo(4, 4)]])
def test_bad_features_are_refused(features: list[FeatureInfo]) -> None:
    with pytest.raises(ConvertError, match="feature map"):
        DenseHead(features, outputs=1)
