"""Metrics against torchmetrics where it has them, against arithmetic elsewhere; batch invariance; the delta formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from igate_edge.contract import OutputSpec
from igate_edge.errors import DataError, InputError
from igate_edge.metrics import delta_mtl, make_metric

SPECS = {
    "semseg": OutputSpec("t", "semseg", 4),
    "depth": OutputSpec("t", "depth", 1),
    "normals": OutputSpec("t", "normals", 3),
    "edges": OutputSpec("t", "edges", 1),
    "classification": OutputSpec("t", "classification", 5, ignore=-1),
    "multilabel": OutputSpec("t", "multilabel", 3),
}


def frames(kind: str, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels with very unequal numbers of valid pixels a frame."""
    rng = np.random.default_rng(1)
    keep = rng.random((count, 6, 8)) < np.linspace(0.02, 0.98, count)[:, None, None]
    if kind == "semseg":
        return rng.integers(0, 4, (count, 6, 8)).astype(np.uint8), np.where(keep, rng.integers(0, 4, (6, 8)), 255)
    if kind == "depth":
        return rng.uniform(1, 5, (count, 6, 8)), np.where(keep, rng.uniform(1, 5, (count, 6, 8)), np.nan)
    if kind == "normals":
        a, b = rng.normal(size=(2, count, 6, 8, 3))
        return a, np.where(keep[..., None], b / np.linalg.norm(b, axis=-1, keepdims=True), 0)
    if kind == "edges":
        return rng.random((count, 6, 8)), np.where(keep, rng.integers(0, 2, (count, 6, 8)), 255)
    if kind == "classification":
        return rng.random((count, 5)), np.where(np.arange(count) % 3 == 0, -1, rng.integers(0, 5, count))
    return rng.random((count, 3)), np.where(rng.random((count, 3)) < 0.8, rng.integers(0, 2, (count, 3)), np.nan)


def evaluate(kind: str, batch: int) -> dict[str, float]:
    predicted, label = frames(kind)
    metric = make_metric(SPECS[kind])
    for start in range(0, len(label), batch):
        metric.update(predicted[start : start + batch], label[start : start + batch])
    return metric.compute()


@pytest.mark.parametrize("kind", SPECS)
def test_batch_size_changes_nothing(kind: str) -> None:
    whole = evaluate(kind, 8)
    assert SPECS[kind].metric in whole
    for batch in (1, 2):
        assert evaluate(kind, batch) == pytest.approx(whole, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("kind", SPECS)
def test_nothing_valid_is_nan_not_zero(kind: str) -> None:
    spec = SPECS[kind]
    predicted, label = frames(kind)
    empty = {"semseg": 255, "depth": 0, "normals": 0, "edges": 255, "classification": -1, "multilabel": np.nan}[kind]
    metric = make_metric(spec)
    metric.update(predicted, np.full_like(label, empty))
    assert math.isnan(metric.compute()[spec.metric])


def test_semseg_against_torchmetrics() -> None:
    torch, classification = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.classification")
    predicted, label = frames("semseg")
    reference = classification.MulticlassJaccardIndex(num_classes=4, ignore_index=255, average="macro")
    expected = reference(torch.as_tensor(predicted.astype(np.int64)), torch.as_tensor(label.astype(np.int64)))
    assert evaluate("semseg", 3)["miou"] == pytest.approx(float(expected), abs=1e-6)


def test_semseg_averages_over_classes_present() -> None:
    metric = make_metric(OutputSpec("t", "semseg", 4, ("a", "b", "c", "d")))
    metric.update(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]))
    values = metric.compute()
    assert values["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert values["iou/b"] == pytest.approx(2 / 3) and math.isnan(values["iou/d"])
    assert values["pixel_accuracy"] == 3 / 4


def test_semseg_refuses_a_class_out_of_range() -> None:
    with pytest.raises(DataError, match="out of range.*4 classes"):
        make_metric(SPECS["semseg"]).update(np.zeros((2, 2), np.uint8), np.full((2, 2), 9))


def test_depth_against_arithmetic() -> None:
    metric = make_metric(SPECS["depth"])
    metric.update(np.array([[2.0, 1.1, 9.0, 9.0]]), np.array([[1.0, 1.0, 0.0, np.inf]]))
    values = metric.compute()
    assert values["rmse"] == pytest.approx(math.sqrt((1.0**2 + 0.1**2) / 2))
    assert values["abs_rel"] == pytest.approx((1.0 + 0.1) / 2)
    assert values["delta1"] == 1 / 2


def test_depth_against_torchmetrics() -> None:
    torch, torchmetrics = pytest.importorskip("torch"), pytest.importorskip("torchmetrics")
    predicted, label = frames("depth")
    valid = np.isfinite(label)
    reference = torchmetrics.MeanSquaredError(squared=False)
    expected = reference(torch.as_tensor(predicted[valid]), torch.as_tensor(label[valid]))
    assert evaluate("depth", 3)["rmse"] == pytest.approx(float(expected), rel=1e-6)


def test_normals_angles() -> None:
    def at(degrees: float) -> list[float]:
        return [0.0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))]

    predicted = np.array([[at(0), at(10), at(20), at(25), at(40)]])
    label = np.array([[at(0)] * 4 + [[0, 0, 0]]])
    metric = make_metric(SPECS["normals"])
    metric.update(predicted, label)
    values = metric.compute()
    assert values["mean_angle"] == pytest.approx((0 + 10 + 20 + 25) / 4)
    assert values["median_angle"] == pytest.approx(10, abs=0.02)
    assert (values["within_11"], values["within_22"], values["within_30"]) == (2 / 4, 3 / 4, 1)
    channels_first = make_metric(SPECS["normals"])
    channels_first.update(predicted, np.moveaxis(label, -1, -3))
    assert channels_first.compute() == values


def test_edges_against_torchmetrics() -> None:
    torch, classification = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.classification")
    predicted, label = frames("edges")
    valid = label != 255
    expected = classification.BinaryF1Score()(torch.as_tensor(predicted[valid]), torch.as_tensor(label[valid]))
    values = evaluate("edges", 3)
    assert values["f1"] == pytest.approx(float(expected), abs=1e-6)
    assert values["ods_f1"] >= values["f1"] - 1e-12


def test_classification_against_torchmetrics() -> None:
    torch, classification = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.classification")
    predicted, label = frames("classification")
    reference = classification.MulticlassAccuracy(num_classes=5, average="micro", ignore_index=-1)
    expected = reference(torch.as_tensor(predicted), torch.as_tensor(label))
    assert evaluate("classification", 3)["accuracy"] == pytest.approx(float(expected), abs=1e-6)


def test_multilabel_is_the_mean_of_both_rates() -> None:
    metric = make_metric(SPECS["multilabel"])
    for predicted, label in (
        ([0.9, 0.1, 0.9], [1, 0, 1]),
        ([0.1, 0.1, 0.9], [1, 1, 1]),
        ([0.9, 0.1, 0.1], [0, 0, np.nan]),
    ):
        metric.update(np.array(predicted), np.array(label))
    # First: 1 of 2 positives, 0 of 1 negatives; second: 0 of 1, 2 of 2; third has no negative and is left out.
    assert metric.compute()["balanced_accuracy"] == pytest.approx(((1 / 2 + 0) / 2 + (0 + 1) / 2) / 2)


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match="decode at the label's size"):
        make_metric(SPECS["depth"]).update(np.zeros((2, 2)), np.zeros((4, 4)))


NYUD = [OutputSpec("s", "semseg", 40), OutputSpec("d", "depth", 1), OutputSpec("n", "normals", 3)]
SINGLE = (41.70, 0.582, 18.89)


@pytest.mark.parametrize(
    ("row", "delta"),
    [
        (SINGLE, 0.0),
        ((41.83, 0.582, 22.84), -6.86),
        ((41.86, 0.580, 22.61), -6.29),
        ((41.49, 0.575, 22.27), -5.73),
        ((42.71, 0.577, 22.87), -5.92),
        ((42.10, 0.593, 23.29), -8.09),
        ((41.75, 0.581, 22.73), -6.70),
        ((42.31, 0.580, 22.79), -6.28),
        ((41.23, 0.625, 21.07), -6.68),
        ((43.58, 0.559, 19.32), 2.06),
        ((42.95, 0.562, 19.73), 0.66),
        ((42.36, 0.564, 20.04), -0.48),
        ((42.73, 0.575, 21.01), -2.55),
        ((42.35, 0.575, 21.70), -4.07),
    ],
)
def test_delta_reproduces_the_published_rows(row: tuple[float, ...], delta: float) -> None:
    names = [spec.name for spec in NYUD]
    assert delta_mtl(dict(zip(names, row, strict=True)), dict(zip(names, SINGLE, strict=True)), NYUD) == pytest.approx(
        delta, abs=0.04
    )


def test_delta_needs_every_task() -> None:
    with pytest.raises(InputError, match="no result for task 'n'"):
        delta_mtl({"s": 1, "d": 1}, {"s": 1, "d": 1, "n": 1}, NYUD)


def test_delta_refuses_to_divide_by_nothing() -> None:
    spec = [OutputSpec("s", "semseg", 2)]
    for values, single, specs, words in (
        ({"s": 1}, {"s": 0}, spec, "cannot be compared"),
        ({}, {}, [], "no task"),
        ({"s": {}}, {"s": 1}, spec, "no miou"),
    ):
        with pytest.raises(InputError, match=words):
            delta_mtl(values, single, specs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_no_prediction_is_refused(spec: OutputSpec) -> None:
    shapes = {"normals": (4, 4, 3), "classification": (5,), "multilabel": (3,)}
    right = np.zeros(shapes.get(spec.kind, (4, 4)))
    label = np.zeros(()) if spec.kind == "classification" else right
    for predicted, truth in (
        (None, label),
        (right, None),
        (np.full(right.shape, np.nan), label),
        (right, np.full(label.shape, "a")),
        (right, np.zeros((9, 9))),
    ):
        with pytest.raises(DataError):
            make_metric(spec).update(predicted, truth)
