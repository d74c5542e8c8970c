"""Checkpoints without pickle: one safetensors file with a JSON head and a digest, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import InputError
from ..files import os_errors, write_atomic


class CheckpointError(InputError):
    """A file that is not a checkpoint, was cut or altered, or belongs to another network."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able `meta` to one file, atomically; on UnavailableError the old file stays."""
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(meta)
    head = {"meta": text, "sha256": _digest(flat, text)}
    write_atomic(path, save(flat, metadata=head))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. Raises CheckpointError for anything else, whatever its bytes."""
    with os_errors(path, "read"):
        size = path.stat().st_size
    try:
        with safe_open(str(path), framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta, digest = json.loads(head["meta"]), head["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path.name} is not a whole checkpoint", f"{size} bytes, {error}", _FIX) from error
    if digest != _digest(tensors, head["meta"]):
        raise CheckpointError(f"{path.name} was altered", "its digest does not match its content", _FIX)
    return tensors, meta


_FIX = "delete it; training resumes from the one before or starts again"


def save_rotating(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """`save_tensors`, keeping the file that was there as `<name>.previous`."""
    if path.exists():
        os.replace(path, previous(path))
    save_tensors(path, tensors, meta)


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    return path.with_name(path.name + ".previous")


def load_newest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint at `path` or before it; None when there is none."""
    for candidate in (path, previous(path)):
        if candidate.exists():
            try:
                return load_tensors(candidate)
            except CheckpointError:
                continue
    return None


def pack(net: nn.Module, balance: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything a run needs to go on, as one flat dict: net/..., balance/..., optimizer/<i>/<parameter>/<key>."""
    flat = {f"net/{k}": v for k, v in net.state_dict().items()}
    flat |= {f"balance/{k}": v for k, v in balance.state_dict().items()}
    names = _names(net, balance)
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if value is not None:
                    flat[f"optimizer/{index}/{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    return flat


def unpack(
    flat: Mapping[str, Tensor], net: nn.Module, balance: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Put back what `pack` took. Raises CheckpointError when names or shapes are another network's."""
    try:
        net.load_state_dict(_part(flat, "net/"))
        balance.load_state_dict(_part(flat, "balance/"))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError("the checkpoint is of another network", first, "use another output folder") from error
    names = {name: p for p, name in _named(net, balance)}
    for index, optimizer in enumerate(optimizers):
        optimizer.state.clear()
        for key, value in _part(flat, f"optimizer/{index}/").items():
            name, entry = key.rsplit("/", 1)
            parameter = names[name]
            if value.shape == parameter.shape:  # fused kernels read memory in the parameter's order, not by strides
                value = torch.empty_like(parameter).copy_(value)
            dtype = torch.float32 if entry == "step" else parameter.dtype
            optimizer.state[parameter][entry] = value.to(parameter.device, dtype).clone()


def _part(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in flat.items() if key.startswith(prefix)}


def _named(net: nn.Module, balance: nn.Module) -> list[tuple[nn.Parameter, str]]:
    pairs = [(p, f"net.{n}") for n, p in net.named_parameters()]
    return pairs + [(p, f"balance.{n}") for n, p in balance.named_parameters()]


def _names(net: nn.Module, balance: nn.Module) -> dict[int, str]:
    return {id(p): name for p, name in _named(net, balance)}


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
