"""What a network promises to its users: its input, and one output per task. Shared by training, compiler and runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import InputError

#: Kinds of task, with the metric that judges each and whether more is better.
KINDS: dict[str, tuple[str, bool]] = {
    "semseg": ("miou", True),
    "depth": ("rmse", False),
    "normals": ("mean_angle", False),
    "edges": ("f1", True),
    "classification": ("accuracy", True),
    "multilabel": ("balanced_accuracy", True),
}


@dataclass(frozen=True)
class OutputSpec:
    """One task's output: `name` is also the ONNX output's name.

    Raw network output, float32: semseg logits [1,K,h,w]; depth natural log of metres [1,1,h,w]; normals [1,3,h,w], any length,
    optical frame (x right, y down, z forward); edges logit [1,1,h,w]; classification and multilabel logits [1,K].
    """

    name: str
    kind: str
    channels: int
    classes: tuple[str, ...] = ()
    units: str = ""
    ignore: int = 255
    target: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown task kind {self.kind!r}", f"known: {', '.join(KINDS)}", "use one of these kinds")
        if self.classes and len(self.classes) != self.channels:
            raise InputError(
                f"task {self.name!r} names {len(self.classes)} classes for {self.channels} channels",
                ", ".join(self.classes[:8]),
                "name every class once",
            )

    @property
    def metric(self) -> str:
        """Name of the metric that judges this task."""
        return KINDS[self.kind][0]

    @property
    def higher_is_better(self) -> bool:
        return KINDS[self.kind][1]

    @property
    def dense(self) -> bool:
        """True when the output is an image, False when it is one vector a frame."""
        return self.kind not in ("classification", "multilabel")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutputSpec:
        return cls(**{**data, "classes": tuple(data.get("classes", ()))})


@dataclass(frozen=True)
class Preprocess:
    """How a uint8 RGB frame becomes the network's input: x = (resize(frame) / 255 - mean) / std, float32 [1,3,height,width]."""

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocess:
        return cls(int(data["height"]), int(data["width"]), tuple(data["mean"]), tuple(data["std"]))
