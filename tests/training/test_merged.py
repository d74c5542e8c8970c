"""The recipe's last cycle on the merged net: kept, resumed, loaded, exported; its zero blocks stay zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import TINY, Killed, curve, kill_at, source

from igate_edge.errors import InputError
from igate_edge.gating.convert import InterroGateNet
from igate_edge.gating.export import to_onnx
from igate_edge.gating.merge import MergedNet
from igate_edge.gating.merge_layers import MaskedConv2d
from igate_edge.training.config import TrainConfig
from igate_edge.training.recipe import load_net, train

SHORT = replace(TINY, backbone="pyramid_net", plain_steps=3, fork_steps=1, search_steps=8, final_steps=6)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose final cycle was cut."""
    folder = tmp_path_factory.mktemp("merged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3 + 2 * 1 + 8 + 4)
        with pytest.raises(Killed):
            train(source(SHORT), folder, SHORT)
    assert (folder / "frozen.safetensors").exists() and not (folder / "final.safetensors").exists()
    return folder


def copied(folder: Path, target: Path, config: TrainConfig) -> Path:
    """The same search, to be finished in another way."""
    target.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith(("final", "config")):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_final_net_is_merged_and_its_blocks_are_zero(searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path / "run", SHORT)
    done = train(source(SHORT), folder, SHORT)
    net, preprocess = load_net(folder)
    assert isinstance(net, MergedNet) and net.form == "merged" and not net.training
    layers = [layer for layer in net.modules() if isinstance(layer, MaskedConv2d)]
    assert layers and all(bool((layer.weight * (1 - layer.mask) == 0).all()) for layer in layers)
    result = done.final.result
    assert result["form"] == "merged" and result["widths"] == net.widths()
    frozen, _ = load_net(folder, "frozen")
    assert isinstance(frozen, InterroGateNet) and result["hard"] == frozen.hard_fractions()
    assert all(torch.equal(mask, net.gate_masks()[site]) for site, mask in frozen.gate_masks().items())
    assert b"merged" in to_onnx(net, preprocess)


def test_a_cut_cycle_goes_on_as_if_nothing_had_happened(searched: Path, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", copied(searched, tmp_path / "whole", SHORT)
    cut.mkdir()
    for file in searched.iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    for folder in (cut, whole):
        train(source(SHORT), folder, SHORT)
    final = [[row for row in curve(folder) if row[0] == "final"] for folder in (cut, whole)]
    assert final[0] == final[1] and len(final[0]) == 6


@pytest.mark.parametrize(("final", "kind"), [("fill", MergedNet), ("gated", InterroGateNet)])
def test_filled_or_gated_when_asked_for(searched: Path, tmp_path: Path, final: str, kind: type) -> None:
    config = replace(SHORT, final=final)
    folder = copied(searched, tmp_path / "run", config)
    train(source(config), folder, config)
    net, _ = load_net(folder)
    assert isinstance(net, kind)
    if isinstance(net, MergedNet):
        assert net.form == "filled" and not any(isinstance(layer, MaskedConv2d) for layer in net.modules())


def test_an_unknown_final_is_refused() -> None:
    with pytest.raises(InputError, match="unknown final 'thin'.*known: masked, fill, gated"):
        replace(SHORT, final="thin")
