"""Ours against its rivals on this machine: interleaved in one process, judged by paired ratios, never by two runs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .builder import networks, ranges_for
from .bundle import Bundle
from .compiler import cost, graph, layout, masks, quantize
from .engines import onnxruntime as ort
from .errors import InputError
from .plain import fill
from .profiler_clock import LEAST_SHARE
from .runtime.cache import fingerprint
from .runtime.preprocess import to_input
from .timing import interleave, noise, noise_int8, pinned, ratio

_RANDOM_FRAMES = 8


@dataclass(frozen=True)
class BenchRow:
    """One net: times in ms (median and quartiles), MACs and parameters, share of convolution MACs that ran as INT8.

    ratio: median over rounds of this net's time / the plain INT8 net's time in the same round, with the 95 % interval
    of that median and the rounds' quartiles; spread = (third - first quartile) / median. meaningful is False, and note
    says why, when the ratio is not to be believed.
    """

    name: str
    label: str
    macs: int
    params: int
    int8_share: float
    ms: float
    ms_quartiles: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    ratio_quartiles: tuple[float, float]
    spread: float
    meaningful: bool
    note: str


@dataclass(frozen=True)
class BenchReport:
    """rows: ours (INT8, float), plain, T separate nets, and for a gated model the dense run-time-gated net.

    separate_over_ours: the paired ratio T separate nets / ours, as `ratio` returns it.
    """

    bundle: str
    seal: str
    rounds: int
    threads: int
    pinned: bool
    device: dict[str, Any]
    rows: list[BenchRow]
    separate_over_ours: dict[str, Any]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def row(self, name: str) -> BenchRow:
        """The row of "ours", "ours-float", "plain", "separate" or "dense"."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class _Net:
    """What is timed as one: a list of sessions, run one after the other."""

    label: str
    run: Callable[[np.ndarray], object]
    sessions: list[ort.Session]
    macs: int
    params: int
    int8_share: float


def bench(
    path: str | os.PathLike[str], rounds: int = 100, *, threads: int = 1, choice: str | Mapping[str, str] = "merged"
) -> BenchReport:
    """Time the bundle's net against its rivals in `rounds` interleaved rounds after a warm-up; batch 1, host to host.

    The plain and the separate nets carry noise as weights (time does not depend on them) and are quantised by the same
    quantiser. choice: the lowering of ours, see `compiler.layout.lay_out`. Raises BundleError or InputError.
    """
    if rounds < 3:
        raise InputError("too few rounds", f"got {rounds}", "use at least 3, better 100")
    bundle = Bundle.read(path)
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    # Sessions start their threads when they are made, and a thread keeps the cores of the one that started it.
    with pinned(threads) as alone:
        nets, warnings = _nets(bundle, threads, choice)
        begun, used = time.perf_counter(), time.process_time()
        try:
            times = interleave({name: net.run for name, net in nets.items()}, image, rounds)
            share = (time.process_time() - used) / max(time.perf_counter() - begun, 1e-9)
        finally:
            for session in (session for net in nets.values() for session in net.sessions):
                session.close()
    if not alone:
        warnings.append(f"the process could not be pinned to {threads} core(s) of its own: expect more spread")
    warnings += conditions(share, os.cpu_count() or 1)
    rows = [_row(name, net, times) for name, net in nets.items()]
    pair = ratio(times["separate"], times["ours"])
    warnings += [f"{row.label}: {row.note}" for row in rows if row.note]
    warnings += [f"separate / ours: {pair['note']}"] if pair["note"] else []
    return BenchReport(Path(path).name, bundle.seal, rounds, threads, alone, fingerprint(), rows, pair, warnings)


def conditions(share: float, cores: int) -> list[str]:
    """Why milliseconds of this run mean little, a sentence each. share: of the time, what the nets had a core for."""
    found = []
    if cores == 1:
        found.append("one core only: the timed networks shared it with everything else that ran")
    if share < LEAST_SHARE:
        found.append(f"the machine is under load: the timed networks had a core for {share:.0%} of the time")
    return found


def _row(name: str, net: _Net, times: dict[str, np.ndarray]) -> BenchRow:
    low, middle, high = (float(value) * 1e3 for value in np.percentile(times[name], (25, 50, 75)))
    pair = ratio(times[name], times["plain"])
    return BenchRow(
        name=name,
        label=net.label,
        macs=net.macs,
        params=net.params,
        int8_share=net.int8_share,
        ms=middle,
        ms_quartiles=(low, high),
        ratio=pair["ratio"],
        ratio_interval=pair["interval"],
        ratio_quartiles=pair["quartiles"],
        spread=pair["spread"],
        meaningful=pair["meaningful"],
        note=pair["note"],
    )


def _nets(bundle: Bundle, threads: int, choice: str | Mapping[str, str]) -> tuple[dict[str, _Net], list[str]]:
    model, _ = networks(bundle)
    laid = layout.lay_out(model, choice)
    ranges, notes = ranges_for(bundle, laid)
    plain = graph.load(fill(bundle.plain))
    frames = noise(bundle.preprocess, _RANDOM_FRAMES)
    names = [spec.name for spec in bundle.tasks]
    singles = [layout.lay_out(masks.keep_outputs(plain, [name])).model for name in names]
    nets = {
        "ours": _net("ours, INT8", [(laid.model, quantize.quantize(laid.model, ranges, dialect="ort"))], threads),
        "ours-float": _net("ours, float", [(laid.model, None)], threads),
        "plain": _net("plain shared net, INT8", [(plain, noise_int8(plain, frames))], threads),
        "separate": _net(
            f"{len(names)} separate nets, INT8", [(single, noise_int8(single, frames)) for single in singles], threads
        ),
    }
    if graph.meta(model)["form"] == "gated":
        nets["dense"] = _net("run-time-gated net, INT8", [(model, noise_int8(model, frames))], threads)
    return nets, notes


def _net(label: str, parts: list[tuple[Any, Any]], threads: int) -> _Net:
    """parts: (float graph, INT8 graph or None to run in float)."""
    data = [graph.dump(quantised if quantised is not None else plain) for plain, quantised in parts]
    sessions = [ort.open(item, threads=threads) for item in data]
    counts = [cost.count(plain) for plain, _ in parts]
    shares = [ort.inspect(item).int8_conv_macs_share for item in data]
    macs = sum(count.macs for count in counts)
    share = sum(part * count.macs for part, count in zip(shares, counts, strict=True)) / max(macs, 1)

    def run(image: np.ndarray) -> None:
        for session in sessions:
            session.run(image)

    return _Net(label, run, sessions, int(macs), int(sum(count.params for count in counts)), float(share))
