"""Labels and scores as vision_msgs, which has no wheels: classes that take what its messages do stand in for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
from igate_edge_ros import convert
from std_msgs.msg import Header, String

from igate_edge.robotics.messages import LabelInfoMessage, ScoresMessage

pytestmark = pytest.mark.ros
LABELS = LabelInfoMessage(("floor", "cup"), 0.5, 3_000_000_007, "optical")
SCORES = ScoresMessage(("cup", "hand"), (0.25, 0.75), 3_000_000_007, "optical")


class Checked:
    """Refuses values of another type, as messages do."""

    def __post_init__(self) -> None:
        kinds = {"int": int, "str": str, "float": float, "list": list, "Header": Header}
        for item in fields(self):  # type: ignore[arg-type]
            assert type(getattr(self, item.name)) is kinds[item.type], item.name


@dataclass
class VisionClass(Checked):
    class_id: int = 0
    class_name: str = ""


@dataclass
class LabelInfo(Checked):
    header: Header = field(default_factory=Header)
    class_map: list = field(default_factory=list)
    threshold: float = 0.0


@dataclass
class ObjectHypothesis(Checked):
    class_id: str = ""
    score: float = 0.0


@dataclass
class Classification(Checked):
    header: Header = field(default_factory=Header)
    results: list = field(default_factory=list)


@pytest.fixture
def vision_msgs(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (VisionClass, LabelInfo, ObjectHypothesis, Classification):
        monkeypatch.setattr(convert, kind.__name__, kind)


def stamped(header: Any) -> bool:
    return (header.stamp.sec, header.stamp.nanosec, header.frame_id) == (3, 7, "optical")


def test_labels_of_vision_msgs(vision_msgs: None) -> None:
    message = convert.to_labels(LABELS)
    assert message.class_map == [VisionClass(0, "floor"), VisionClass(1, "cup")]
    assert message.threshold == 0.5 and stamped(message.header)


def test_scores_of_vision_msgs(vision_msgs: None) -> None:
    message = convert.to_scores(SCORES)
    assert message.results == [ObjectHypothesis("cup", 0.25), ObjectHypothesis("hand", 0.75)]
    assert stamped(message.header)


def test_without_vision_msgs_both_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "LabelInfo", None)
    monkeypatch.setattr(convert, "Classification", None)
    labels, scores = convert.to_labels(LABELS), convert.to_scores(SCORES)
    assert isinstance(labels, String) and json.loads(labels.data)["class_map"][1]["class_name"] == "cup"
    said = json.loads(scores.data)
    assert said == {"stamp_ns": 3_000_000_007, "frame_id": "optical", "scores": {"cup": 0.25, "hand": 0.75}}


def test_the_types_of_the_topics_are_those_of_the_messages() -> None:
    assert isinstance(convert.to_labels(LABELS), convert.LABELS)
    assert isinstance(convert.to_scores(SCORES), convert.SCORES)
