"""Tasks: losses against arithmetic, invalid labels (cases M1, M2), decode equal to the robot's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from igate_edge.errors import DataError, InputError
from igate_edge.runtime.postprocess import decode
from igate_edge.training.heads import FeatureInfo
from igate_edge.training.tasks import (
    Classification,
    Depth,
    Edges,
    MultiLabel,
    Normals,
    SemanticSegmentation,
    Task,
    from_spec,
    sqrt_inverse_frequency,
)

FEATURES = [FeatureInfo(4, 4), FeatureInfo(8, 8)]
TASKS: list[Task] = [
    SemanticSegmentation("seg", ["a", "b", "c"]),
    SemanticSegmentation("weighted", 3, class_weights=[1, 2, 3]),
    Depth("depth"),
    Normals("normals"),
    Edges("edges"),
    Classification("class", 5),
    MultiLabel("labels", 4),
]
IDS = [task.name for task in TASKS]


def raw(task: Task, count: int = 2) -> torch.Tensor:
    shape = (count, task.spec.channels, 4, 4) if task.spec.dense else (count, task.spec.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def labels(task: Task, count: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    if task.spec.kind in ("semseg", "edges"):
        return torch.randint(
            0, min(task.spec.channels + 1, 3) if task.spec.kind == "semseg" else 2, (count, 8, 8), generator=rng
        ).byte()
    if task.spec.kind == "depth":
        return torch.rand(count, 8, 8, generator=rng) + 0.5
    if task.spec.kind == "normals":
        return torch.nn.functional.normalize(torch.randn(count, 3, 8, 8, generator=rng), dim=1)
    if task.spec.kind == "classification":
        return torch.randint(0, task.spec.channels, (count,), generator=rng)
    return torch.randint(0, 2, (count, task.spec.channels), generator=rng).float()


def invalid(task: Task) -> list[float]:
    return {
        "semseg": [255],
        "edges": [255],
        "depth": [0.0, math.nan, math.inf, -1.0],
        "normals": [0.0, math.nan],
        "classification": [-1],
        "multilabel": [math.nan],
    }[task.spec.kind]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_no_valid_label_is_exactly_zero(task: Task) -> None:
    for value in invalid(task):
        out = raw(task)
        loss = task.loss(out, torch.full_like(labels(task), value))
        loss.backward()
        assert loss.item() == 0.0
        assert out.grad is not None and torch.equal(out.grad, torch.zeros_like(out))


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_invalid_frame_changes_neither_loss_nor_gradients_of_the_other(task: Task) -> None:
    alone, target = raw(task, 1), labels(task, 1)
    task.loss(alone, target).backward()
    for value in invalid(task):
        both = torch.cat([alone.detach(), torch.full_like(alone, 3.0)]).requires_grad_()
        mixed = torch.cat([target, torch.full_like(target, value)])
        loss = task.loss(both, mixed)
        loss.backward()
        torch.testing.assert_close(loss, task.loss(alone, target))
        assert both.grad is not None and alone.grad is not None
        torch.testing.assert_close(both.grad[:1], alone.grad)
        assert not both.grad[1].any()


def test_semseg_of_flat_logits_is_log_classes() -> None:
    task = SemanticSegmentation("t", 3)
    assert task.loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4).long()).item() == pytest.approx(math.log(3))


def test_class_weights_multiply_their_class() -> None:
    target = torch.tensor([[[0, 0], [2, 255]]])
    loss = SemanticSegmentation("t", 3, class_weights=[1, 2, 3]).loss(torch.zeros(1, 3, 2, 2), target)
    assert loss.item() == pytest.approx((1 + 1 + 3) / 3 * math.log(3))


def test_depth_is_the_mean_absolute_log_ratio() -> None:
    target = torch.tensor([[[1.0, math.e], [0.0, math.e**3]]])
    assert Depth("t").loss(torch.zeros(1, 1, 2, 2), target).item() == pytest.approx((0 + 1 + 3) / 3)


def test_normals_is_one_minus_cosine_whatever_the_length() -> None:
    out = torch.tensor([0.0, 0.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    target = torch.tensor([[0.0, 0.0, 1.0], [0.0, math.sin(1.0), math.cos(1.0)]]).T.reshape(1, 3, 1, 2)
    assert Normals("t").loss(out, target).item() == pytest.approx((0 + 1 - math.cos(1.0)) / 2, abs=1e-6)


def test_edges_weigh_an_edge_as_stated() -> None:
    target = torch.tensor([[[1, 0], [0, 255]]], dtype=torch.uint8)
    loss = Edges("t", positive_weight=0.8).loss(torch.zeros(1, 1, 2, 2), target)
    assert loss.item() == pytest.approx((0.8 + 0.2 + 0.2) / 3 * math.log(2))


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_heads_give_what_the_spec_says(task: Task) -> None:
    out = task.make_head(FEATURES)([torch.zeros(2, 4, 6, 8), torch.zeros(2, 8, 3, 4)])
    assert out.shape == ((2, task.spec.channels, 6, 8) if task.spec.dense else (2, task.spec.channels))


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_decode_is_the_robots(task: Task) -> None:
    out = raw(task).detach()
    batch = task.decode(out, (9, 11))
    for index in range(2):
        single = decode(task.spec, out[index : index + 1].numpy(), (9, 11))
        assert single.dtype == batch.dtype and single.shape == batch[index].shape
        np.testing.assert_allclose(single, batch[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_task_from_its_spec(task: Task) -> None:
    again = from_spec(task.spec, weight=2.0)
    assert again.spec == task.spec and type(again) is type(task) and again.weight == 2.0


def test_own_head_replaces_the_standard_one() -> None:
    task = Depth("t", head=lambda features: torch.nn.Conv2d(features[0].channels, 1, 1))
    assert isinstance(task.make_head(FEATURES), torch.nn.Conv2d)


def test_sqrt_inverse_frequency() -> None:
    weights = sqrt_inverse_frequency(np.array([0] * 16 + [1] * 4 + [255]), 3)
    # 1/4 and 1/2 before scaling; the mean over the 20 pixels is (16/4 + 4/2) / 20.
    assert weights == pytest.approx((0.25 / 0.3, 0.5 / 0.3, 0.0))
    with pytest.raises(DataError, match="label is out of range: class 7 with 3 classes"):
        sqrt_inverse_frequency(np.array([0, 7]), 3)


def test_wrong_use_is_a_sentence() -> None:
    with pytest.raises(InputError, match="no class"):
        SemanticSegmentation("t", [])
    with pytest.raises(InputError, match="2 class weights: 3 classes"):
        SemanticSegmentation("t", 3, class_weights=[1, 2])
    with pytest.raises(InputError, match="positive_weight"):
        Edges("t", positive_weight=1.5)
    with pytest.raises(InputError, match="negative weight"):
        Depth("t", weight=-1)
