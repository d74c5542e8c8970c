"""Ranges from frames: what they are, how they join, and which frames are refused."""

from __future__ import annotations

import int8_nets
import numpy as np
import onnx_ir as ir
import pytest

from igate_edge.compiler import calibrate, groups
from igate_edge.errors import DataError, GraphError, InputError

PREPROCESS = {"height": 4, "width": 4, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def _scaling(factors: list[float], act: str | None = None, **more) -> tuple[ir.Model, int8_nets.Net, str]:
    """A 1x1 convolution that multiplies one input channel by each factor."""
    net = int8_nets.Net(channels=1, size=4)
    y = net.conv(
        "image", len(factors), k=1, act=act, weight=np.reshape(factors, (-1, 1, 1, 1)), bias=np.zeros(len(factors))
    )
    return net.model(y, **more), net, y


def _frame(values: list[float]) -> np.ndarray:
    return np.resize(np.array(values, np.float32), (1, 1, 4, 4))


def test_minmax_is_the_extreme_over_all_frames() -> None:
    model, _, y = _scaling([2.0, -3.0])
    ranges = calibrate.calibrate(model, [_frame([-1.0, 0.5]), _frame([0.25, 4.0])])
    assert ranges["image"] == (-1.0, 4.0)
    assert ranges[y] == (-3.0 * 4.0, 2.0 * 4.0)


def test_a_folded_relu_is_measured_behind_it() -> None:
    model, _, y = _scaling([2.0, -3.0], act="Relu")
    assert calibrate.calibrate(model, [_frame([-1.0, 4.0])])[y] == (0.0, 2.0 * 4.0)


def test_every_float_tensor_has_a_range() -> None:
    model, net = int8_nets.assorted()
    ranges = calibrate.calibrate(model, net.frames(2))
    floats = {out.name for node in model.graph for out in node.outputs}
    assert floats | {"image"} == set(ranges)


# mse: 40,960 rounding errors of (v / 127)^2 / 12 and one clipped (2 - v)^2 are least at this v.
@pytest.mark.parametrize(("method", "top"), [("percentile", 1.0), ("mse", 2.0 / (1 + 40960 / (12 * 127**2)))])
def test_robust_methods_clip_an_outlier_and_keep_the_rest(method: str, top: float) -> None:
    net = int8_nets.Net(channels=1, size=64)
    model = net.model(net.conv("image", 1, k=1, act=None, weight=[[[[1.0]]]], bias=[0.0]))
    rng = np.random.default_rng(0)
    frames = [rng.uniform(-1, 1, (1, 1, 64, 64)).astype(np.float32) for _ in range(10)]
    frames[0][0, 0, 0, 0] = 2.0
    low, high = calibrate.calibrate(model, frames, method)["image"]
    assert high == pytest.approx(top, abs=0.02)
    assert low == pytest.approx(-1.0, abs=0.01)
    assert calibrate.calibrate(model, frames)["image"][1] == 2.0


@pytest.mark.parametrize("name", ["resnet", "gated", "assorted"])
def test_groups_share_one_range(name: str) -> None:
    model, net = int8_nets.NETS[name]()
    ranges = calibrate.calibrate(model, net.frames(2))
    by_root: dict[str, set] = {}
    for tensor, root in groups.join(groups.typed(model), ranges).items():
        by_root.setdefault(root, set()).add(ranges[tensor])
    assert all(len(found) == 1 for found in by_root.values())
    assert any(node.op_type in ("Concat", "Where") for node in model.graph)


def test_a_site_with_slices_gather_concat_and_mix_is_one_group() -> None:
    model, _ = int8_nets.assorted()
    joined = groups.join(groups.typed(model))
    ops = {node.op_type: node.outputs[0].name for node in model.graph if node.op_type in ("Slice", "Gather")}
    concats = [node.outputs[0].name for node in model.graph if node.op_type == "Concat"]
    site = {joined[name] for name in (*ops.values(), "site.mix", *concats[:2])}
    assert len(site) == 1
    assert joined[concats[2]] not in site


def test_a_small_concat_input_that_others_read_keeps_its_scale() -> None:
    net = int8_nets.Net(channels=1, size=4)
    small = net.conv("image", 1, k=1, weight=[[[[1.0]]]], bias=[0.0])
    large = net.conv("image", 1, k=1, weight=[[[[100.0]]]], bias=[0.0])
    both = net.conv(net.concat(small, large), 1, k=1, act=None)
    alone = net.conv(small, 1, k=1, act=None)
    ranges = calibrate.calibrate(net.model(both, alone), [_frame([1.0, 0.5])])
    assert ranges[small] == (0.5, 1.0)
    assert ranges[large][1] == 100.0
    only = int8_nets.Net(channels=1, size=4)
    parts = [only.conv("image", 1, k=1, weight=[[[[factor]]]], bias=[0.0]) for factor in (1.0, 100.0)]
    ranges = calibrate.calibrate(only.model(only.conv(only.concat(*parts), 1, k=1, act=None)), [_frame([1.0, 0.5])])
    assert ranges[parts[0]] == ranges[parts[1]] == (0.5, 100.0)


def _nan(frame: np.ndarray) -> np.ndarray:
    frame[0, 0, 1, 1] = np.nan
    return frame


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([], "no calibration frames: 0 frames given"),
        ([_frame([1.0]), _nan(_frame([1.0]))], "frame 1 is not finite: 1 NaN or infinite"),
        ([_frame([1.0]) * np.inf], "frame 0 is not finite: 16"),
        ([np.zeros((1, 1, 4, 5), np.float32)], r"float32 \(1, 1, 4, 4\) expected, float32 \(1, 1, 4, 5\) given"),
        ([np.zeros((1, 1, 4, 4), np.uint8)], "uint8"),
        ([[[1.0]]], "list given"),
    ],
)
def test_bad_frames_are_refused_with_evidence(frames: list, text: str) -> None:
    model, _, _ = _scaling([1.0])
    with pytest.raises(DataError, match=text):
        calibrate.calibrate(model, frames)


def test_frames_that_were_not_scaled_are_refused() -> None:
    net = int8_nets.Net(channels=3, size=4)
    model = net.model(net.conv("image", 2, act=None), preprocess=PREPROCESS)
    rgb = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4)).astype(np.float32)
    calibrate.calibrate(model, [(rgb / 255 - 0.5) / 0.25])
    with pytest.raises(DataError, match="not preprocessed as the model says.*possible are -2..2"):
        calibrate.calibrate(model, [rgb])
    with pytest.raises(DataError, match="not preprocessed"):
        calibrate.calibrate(model, [((rgb / 255 - 0.5) / 0.25 - 0.5) / 0.25])


def test_warnings_and_record() -> None:
    model, net, _ = _scaling([1.0])
    good = calibrate.observe(model, net.frames(8))
    assert (good.frames, good.warnings, good.method) == (8, (), "minmax")
    again = calibrate.observe(model, net.frames(8))
    assert good.sha256 == again.sha256 != calibrate.observe(model, net.frames(8, seed=2)).sha256
    few = calibrate.observe(model, [_frame([1.0])] * 2)
    assert [text.split(":")[0] for text in few.warnings] == [
        "only 2 calibration frames",
        "2 of 2 calibration frames are constant images",
        "all 2 calibration frames are the same image",
    ]


def test_the_model_is_not_altered_and_wrong_use_is_named() -> None:
    model, net, _ = _scaling([1.0])
    before = ir.to_proto(model).SerializeToString()
    calibrate.calibrate(model, net.frames(1))
    assert ir.to_proto(model).SerializeToString() == before
    with pytest.raises(InputError, match="known: minmax, percentile, mse"):
        calibrate.calibrate(model, net.frames(1), "entropy")
    wild, _, y = _scaling([3e38])
    with pytest.raises(GraphError, match=f"tensor '{y}' reaches"):
        calibrate.calibrate(wild, [_frame([1e3])])


def test_a_mix_shares_the_scale_of_what_it_mixes() -> None:
    """Also where no Concat follows: its output is a convex combination of its input's channels."""
    for name, same in (("site.mix", True), ("other", False)):
        net = int8_nets.Net(channels=3, size=8)
        x = net.conv("image", 4)
        y = net.conv(x, 2, k=1, act=None, name=name, weight=np.full((2, 4, 1, 1), 0.25), bias=[0.0, 0.0])
        ranges = calibrate.calibrate(net.model(net.conv(y, 2, act=None)), net.frames(2))
        assert (ranges[x] == ranges[y]) is same
