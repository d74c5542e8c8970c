"""Tasks: each one is a head, a loss and an output contract (OutputSpec).

Invalid labels are replaced before any arithmetic, so a NaN label never reaches a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract import OutputSpec
from ..errors import DataError, InputError
from .heads import DenseHead, FeatureInfo, VectorHead

MakeHead = Callable[[Sequence[FeatureInfo]], nn.Module]

_TARGETS = {
    "semseg": "semseg",
    "depth": "depth",
    "normals": "normals",
    "edges": "edges",
    "classification": "label",
    "multilabel": "labels",
}


class Task:
    """Base of the six kinds: `.name`, `.spec`, `.weight` (of its loss), `.target` (key of its label in a batch).

    `head` replaces the standard head: a function from the backbone's features to a module that takes list[Tensor].
    """

    def __init__(
        self, spec: OutputSpec, *, weight: float = 1.0, head: MakeHead | None = None, head_width: int = 32
    ) -> None:
        if weight < 0:
            raise InputError(f"task {spec.name!r} has a negative weight", f"{weight}", "use a weight of 0 or more")
        self.spec, self.weight, self._head, self._head_width = spec, weight, head, head_width

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def target(self) -> str:
        return self.spec.target

    def make_head(self, features: Sequence[FeatureInfo]) -> nn.Module:
        """A new head for these features (fine to coarse): list[Tensor] -> raw output as the OutputSpec says."""
        if self._head is not None:
            return self._head(features)
        if self.spec.dense:
            return DenseHead(features, self.spec.channels, self._head_width)
        return VectorHead(features, self.spec.channels)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        """Scalar: mean over valid labels; exactly 0 with zero gradients when none is valid."""
        raise TypeError(f"{type(self).__name__} has no loss: use one of the six tasks")

    def labelled(self, target: Tensor) -> Tensor:
        """Which entries of a label are valid, bool: what the loss is the mean over. Here: all of them."""
        return torch.ones_like(target, dtype=torch.bool)

    @torch.no_grad()
    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        """A batch of raw outputs -> what the robot's runtime returns, stacked.

        semseg uint8 [N,H,W], depth float32 [N,H,W] metres, normals float32 [N,H,W,3] unit, edges float32 [N,H,W]
        probability, classification and multilabel float32 [N,K] probabilities.
        """
        raise TypeError(f"{type(self).__name__} has no decode: use one of the six tasks")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class SemanticSegmentation(Task):
    """One class a pixel. Label: uint8 or int64 [N,H,W], 255 = ignored. Loss: cross entropy.

    `classes`: how many, or their names. `class_weights`: one a class (see `sqrt_inverse_frequency`). Raises InputError.

    >>> task = SemanticSegmentation("semseg", classes=["floor", "box"])
    >>> float(task.loss(torch.zeros(1, 2, 2, 2), torch.full((1, 4, 4), 255)))
    0.0
    """

    def __init__(
        self,
        name: str,
        classes: int | Sequence[str],
        *,
        class_weights: Sequence[float] | None = None,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
        head_width: int = 32,
    ) -> None:
        count, names = _classes(name, classes)
        spec = OutputSpec(name, "semseg", count, names, target=target or _TARGETS["semseg"])
        super().__init__(spec, weight=weight, head=head, head_width=head_width)
        if class_weights is not None and len(class_weights) != count:
            raise InputError(
                f"task {name!r} has {len(class_weights)} class weights", f"{count} classes", "give one weight a class"
            )
        self.class_weights = None if class_weights is None else tuple(float(w) for w in class_weights)

    def labelled(self, target: Tensor) -> Tensor:
        return target != self.spec.ignore

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        raw, target = resize(raw, target.shape[-2:]), target.long()
        weights = None if self.class_weights is None else raw.new_tensor(self.class_weights)
        total = F.cross_entropy(raw, target, weights, ignore_index=self.spec.ignore, reduction="sum")
        return total / self.labelled(target).sum().clamp(min=1)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return resize(raw, size).argmax(1).to(torch.uint8).cpu().numpy()


class Depth(Task):
    """Metres a pixel. Label: float32 [N,H,W], invalid = 0, negative, NaN or inf. Loss: L1 of the logarithm."""

    def __init__(
        self,
        name: str,
        *,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
        head_width: int = 32,
    ) -> None:
        spec = OutputSpec(name, "depth", 1, units="m", target=target or _TARGETS["depth"])
        super().__init__(spec, weight=weight, head=head, head_width=head_width)

    def labelled(self, target: Tensor) -> Tensor:
        return torch.isfinite(target) & (target > 0)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        valid = self.labelled(target)
        log = torch.where(valid, target, 1.0).log()
        error = (resize(raw, target.shape[-2:])[:, 0] - log).abs()
        return _mean(error, valid)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return resize(raw, size)[:, 0].exp().float().cpu().numpy()


class Normals(Task):
    """Unit surface normal a pixel, optical frame. Loss: 1 - cosine.

    Label: float32 [N,3,H,W], invalid = zero vector or NaN.
    """

    def __init__(
        self,
        name: str,
        *,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
        head_width: int = 32,
    ) -> None:
        spec = OutputSpec(name, "normals", 3, target=target or _TARGETS["normals"])
        super().__init__(spec, weight=weight, head=head, head_width=head_width)

    def labelled(self, target: Tensor) -> Tensor:
        square = (target * target).sum(1)
        return (square > 0.25) & (square < 4)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        # Sums, not norms: reductions over 3 of many channels are slow. NaN and inf fail the comparison.
        square = (target * target).sum(1)
        valid = (square > 0.25) & (square < 4)
        safe = torch.where(valid[:, None], target, 0.0)
        out = resize(raw, target.shape[-2:])
        lengths = (out * out).sum(1).clamp(min=1e-12) * torch.where(valid, square, 1.0)
        cosine = (out * safe).sum(1) * lengths.rsqrt()
        return _mean(1 - cosine, valid)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return F.normalize(resize(raw, size), dim=1, eps=1e-6).movedim(1, -1).float().cpu().numpy()


class Edges(Task):
    """Edge probability a pixel. Label: uint8 [N,H,W], 0 or 1, 255 = ignored.

    Loss: binary cross entropy in which an edge pixel weighs `positive_weight`, any other 1 - that (edges are rare).
    """

    def __init__(
        self,
        name: str,
        *,
        positive_weight: float = 0.9,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
        head_width: int = 32,
    ) -> None:
        spec = OutputSpec(name, "edges", 1, target=target or _TARGETS["edges"])
        super().__init__(spec, weight=weight, head=head, head_width=head_width)
        if not 0 < positive_weight < 1:
            raise InputError(f"positive_weight of task {name!r}", f"{positive_weight}", "choose it between 0 and 1")
        self.positive_weight = positive_weight

    def labelled(self, target: Tensor) -> Tensor:
        return target != self.spec.ignore

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        valid = self.labelled(target)
        edge = torch.where(valid, target, 0).to(raw.dtype)
        weights = edge * self.positive_weight + (1 - edge) * (1 - self.positive_weight)
        logits = resize(raw, target.shape[-2:])[:, 0]
        return _mean(F.binary_cross_entropy_with_logits(logits, edge, weights, reduction="none"), valid)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return torch.sigmoid(resize(raw, size)[:, 0]).float().cpu().numpy()


class Classification(Task):
    """One class a frame. Label: int64 [N], -1 = ignored. Loss: cross entropy."""

    def __init__(
        self,
        name: str,
        classes: int | Sequence[str],
        *,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
    ) -> None:
        count, names = _classes(name, classes)
        spec = OutputSpec(name, "classification", count, names, ignore=-1, target=target or _TARGETS["classification"])
        super().__init__(spec, weight=weight, head=head)

    def labelled(self, target: Tensor) -> Tensor:
        return target != self.spec.ignore

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(raw, target.long(), ignore_index=self.spec.ignore, reduction="sum")
        return total / self.labelled(target).sum().clamp(min=1)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return raw.softmax(1).float().cpu().numpy()


class MultiLabel(Task):
    """Several yes/no answers a frame. Label: float32 [N,K] of 0 and 1, NaN = ignored. Loss: binary cross entropy."""

    def __init__(
        self,
        name: str,
        classes: int | Sequence[str],
        *,
        target: str = "",
        weight: float = 1.0,
        head: MakeHead | None = None,
    ) -> None:
        count, names = _classes(name, classes)
        spec = OutputSpec(name, "multilabel", count, names, target=target or _TARGETS["multilabel"])
        super().__init__(spec, weight=weight, head=head)

    def labelled(self, target: Tensor) -> Tensor:
        return torch.isfinite(target)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        valid = self.labelled(target)
        safe = torch.where(valid, target, 0.0)
        return _mean(F.binary_cross_entropy_with_logits(raw, safe, reduction="none"), valid)

    def decode(self, raw: Tensor, size: tuple[int, int]) -> np.ndarray:
        return raw.sigmoid().float().cpu().numpy()


def from_spec(spec: OutputSpec, **options: object) -> Task:
    """The task that an OutputSpec describes; `options` go to its constructor."""
    kinds: Mapping[str, Callable[..., Task]] = {
        "semseg": SemanticSegmentation,
        "depth": Depth,
        "normals": Normals,
        "edges": Edges,
        "classification": Classification,
        "multilabel": MultiLabel,
    }
    classes = {"classes": list(spec.classes) or spec.channels} if spec.kind in _WITH_CLASSES else {}
    return kinds[spec.kind](spec.name, target=spec.target, **classes, **options)


_WITH_CLASSES = ("semseg", "classification", "multilabel")


def resize(raw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, half-pixel centres, as the runtime does it; [N,C,h,w] -> [N,C,H,W]."""
    if tuple(raw.shape[-2:]) == tuple(size):
        return raw
    return F.interpolate(raw, size=tuple(size), mode="bilinear", align_corners=False)


def sqrt_inverse_frequency(labels: np.ndarray, classes: int, ignore: int = 255) -> tuple[float, ...]:
    """Class weights 1 / sqrt(frequency), of mean 1 over labelled pixels; a class never seen weighs 0.

    >>> sqrt_inverse_frequency(np.array([0, 0, 0, 0, 1, 255]), 3)
    (0.8333333333333334, 1.6666666666666667, 0.0)
    """
    counts = np.bincount(labels[labels != ignore].ravel(), minlength=classes).astype(np.float64)
    if len(counts) > classes:
        raise DataError(
            "a label is out of range", f"class {len(counts) - 1} with {classes} classes", "check the class list"
        )
    raw = np.divide(1.0, np.sqrt(counts), out=np.zeros(classes), where=counts > 0)
    return tuple((raw * counts.sum() / max(float((raw * counts).sum()), 1e-12)).tolist())


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def _classes(name: str, classes: int | Sequence[str]) -> tuple[int, tuple[str, ...]]:
    count, names = (classes, ()) if isinstance(classes, int) else (len(classes), tuple(classes))
    if count < 1:
        raise InputError(f"task {name!r} has no class", f"classes={classes!r}", "give a number or a list of names")
    return count, names
