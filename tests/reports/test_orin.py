"""Predictions for Orin modules: sums that a reader can redo, in order of the machines, and never called measured."""

from __future__ import annotations

from dataclasses import replace

import int8_nets
import pytest
from igate_edge.kernels.orin import MACHINES
from igate_edge.kernels.orin import predict as layer_time

from igate_edge.compiler import calibrate, quantize
from igate_edge.engines.emulate import plan_of
from igate_edge.engines.emulate_graph import ConvStep, program
from igate_edge.reports import orin
from igate_edge.reports.report import Evidence, render


def _int8(net: int8_nets.Net, *outputs: str):
    model = net.model(*outputs)
    return quantize.quantize(model, calibrate.calibrate(model, net.frames(3)), "trt")


def test_two_layers_are_their_times_and_two_gaps() -> None:
    net = int8_nets.Net(size=32)
    model = _int8(net, net.conv(net.conv("image", 32), 32, act=None))
    plans = [plan_of(step.layer) for step in program(model).steps if isinstance(step, ConvStep)]
    assert len(plans) == 2
    for time, machine in zip(orin.predict(model), MACHINES, strict=True):
        layers = [layer_time(plan, machine) for plan in plans]
        assert (time.machine, time.launches) == (machine.name, 2)
        assert time.ms == pytest.approx((layers[0].us + layers[1].us + 2 * 3) / 1e3)
        low = (layers[0].bound_us + layers[1].bound_us) / 0.8 + 2 * 2
        assert time.low_ms == pytest.approx(low / 1e3) and time.low_ms < time.ms < time.high_ms


def test_what_has_no_kernel_moves_its_fp16_bytes_once() -> None:
    net = int8_nets.Net(size=32)
    y = net.conv("image", 16, act=None)
    without, with_sigmoid = (_int8(net, y), _int8(net, net.add_node("Sigmoid", [y], 16)))
    for machine, a, b in zip(MACHINES, orin.predict(without), orin.predict(with_sigmoid), strict=True):
        copied = 2 * 2 * 16 * 32 * 32 / machine.gigabytes / 1e3
        assert b.launches == a.launches + 1
        assert 1e3 * (b.ms - a.ms) == pytest.approx(copied + 3, rel=1e-6)


def test_a_float_node_alone_is_one_launch_of_its_bytes() -> None:
    net = int8_nets.Net(size=8)
    times = orin.predict(net.model(net.conv("image", 4, act=None)))
    assert [time.launches for time in times] == [1] * len(MACHINES)
    assert 1e3 * times[0].ms == pytest.approx(3 + 2 * (3 + 4) * 8 * 8 / 68e3)


def test_the_report_calls_it_predicted(evidence: Evidence) -> None:
    net = int8_nets.Net(size=16)
    table = orin.grid(orin.predict(_int8(net, net.conv("image", 16, act=None))))
    text, _ = render(replace(evidence, orin=table))
    assert "Predicted for Jetson Orin" in text and "Predicted, not measured" in text
    assert text.count('<td class="t">Orin Nano 8 GB</td>') == 1
    assert "Predicted for Jetson Orin" not in render(evidence)[0]
