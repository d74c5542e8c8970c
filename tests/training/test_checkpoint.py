"""Checkpoints: exact round trip, every cut and every flip refused by one exception, fall back to the one before."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from igate_edge.errors import IgateError
from igate_edge.training.balance import Uncertainty
from igate_edge.training.checkpoint import (
    CheckpointError,
    load_newest,
    load_tensors,
    pack,
    previous,
    save_rotating,
    save_tensors,
    unpack,
)

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "flag": torch.tensor(True),
    "n": torch.tensor(3),
    "none": torch.zeros(0, 4),
}


def test_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "c", TENSORS, {"step": 3})
    tensors, meta = load_tensors(tmp_path / "c")
    assert meta == {"step": 3} and tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype


def test_every_cut_is_refused_by_one_exception(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_tensors(path, TENSORS, {"step": 3})
    whole = path.read_bytes()
    for length in sorted({int(len(whole) * i / 100) for i in range(100)}):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_tensors(path)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_tensors(path, {"a": torch.arange(4.0)}, {"step": 3})
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :])
        try:
            tensors, meta = load_tensors(path)
        except CheckpointError:
            continue
        assert torch.equal(tensors["a"], torch.arange(4.0)) and meta == {"step": 3}


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    (tmp_path / "c").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_tensors(tmp_path / "c")
    assert not marker.exists()


def test_falls_back_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert load_newest(path) is None
    for step in (1, 2, 3):
        save_rotating(path, TENSORS, {"step": step})
    path.write_bytes(path.read_bytes()[:50])
    found = load_newest(path)
    assert found is not None and found[1] == {"step": 2}
    path.unlink()
    found = load_newest(path)
    assert found is not None and found[1] == {"step": 2}
    previous(path).write_bytes(b"")
    assert load_newest(path) is None


def make() -> tuple[nn.Module, Uncertainty, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    balance = Uncertainty({"a": 1.0})
    first = torch.optim.AdamW([*net[0].parameters(), *balance.parameters()], lr=0.1, fused=True)
    return net, balance, [first, torch.optim.SGD(net[2].parameters(), lr=0.1, momentum=0.9)]


def step(net: nn.Module, balance: Uncertainty, optimizers: list[torch.optim.Optimizer], seed: int) -> float:
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    loss = balance({"a": net(batch).pow(2).mean()})
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    run = make()
    for seed in range(4):
        step(*run, seed)
    save_tensors(tmp_path / "c", pack(*run), {})
    expected = [step(*run, seed) for seed in range(4, 9)]
    again = make()
    unpack(load_tensors(tmp_path / "c")[0], *again)
    assert [step(*again, seed) for seed in range(4, 9)] == expected


def test_another_network_is_refused(tmp_path: Path) -> None:
    run = make()
    other = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(CheckpointError, match="of another network"):
        unpack(pack(*run), other, run[1], [])


def test_no_permission_is_a_sentence_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_tensors(path, TENSORS, {"step": 1})

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("igate_edge.files.os.replace", refuse)
    with pytest.raises(IgateError, match="cannot write .*Permission denied"):
        save_tensors(path, TENSORS, {"step": 2})
    assert load_tensors(path)[1] == {"step": 1}
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_moments_keep_their_parameters_memory_format() -> None:
    """A fused optimiser reads memory in the parameter's order: moments in another order would be another layer's."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        net(image.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()

    one, other, nobody = fresh(), fresh(), nn.Module()
    step(*one, 1)
    kept = {key: value.contiguous() for key, value in pack(one[0], nobody, [one[1]]).items()}  # as a file holds them
    unpack(kept, other[0], nobody, [other[1]])
    for net, optimizer in (one, other):
        step(net, optimizer, 2)
    assert torch.equal(one[0].weight, other[0].weight)
