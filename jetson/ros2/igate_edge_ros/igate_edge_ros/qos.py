"""Quality of service: profiles of the topics, parameters that override them, and events that nobody should miss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

try:  # Iron and later
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks, UnsupportedEventTypeError

#: A deadline is this many periods of the camera: one frame may be late, two in a row may not.
SLACK = 1.5
#: What `qos_overrides./TOPIC.publisher.POLICY` (or .subscription.) may set.
KINDS = (
    QoSPolicyKind.RELIABILITY,
    QoSPolicyKind.DURABILITY,
    QoSPolicyKind.HISTORY,
    QoSPolicyKind.DEPTH,
    QoSPolicyKind.DEADLINE,
)
#: What some releases call no deadline.
FOREVER_NS = 2**63 - 1
#: Called with the topic, the kind of event ("deadline" or "incompatible") and a sentence.
Report = Callable[[str, str, str], None]


def sensor(depth: int, fps: float = 0.0) -> QoSProfile:
    """Best effort, volatile, the last `depth` images; offers a deadline where the camera's rate is known.

    Only publishers offer one: a subscription that asks for a deadline gets nothing from a camera that promises none.
    """
    profile = QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.VOLATILE,
    )
    if fps > 0:
        profile.deadline = Duration(nanoseconds=int(1e9 / fps * SLACK))
    return profile


def latched() -> QoSProfile:
    """Reliable, and kept for those who come later."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


def publisher(node: Any, kind: Any, topic: str, profile: QoSProfile, report: Report) -> Any:
    """A lifecycle publisher whose missed deadlines and incompatible subscribers are reported."""

    def make(callbacks: PublisherEventCallbacks) -> Any:
        overriding = QoSOverridingOptions(KINDS)
        return node.create_lifecycle_publisher(
            kind, topic, profile, event_callbacks=callbacks, qos_overriding_options=overriding
        )

    name = node.resolve_topic_name(topic)
    events = _events(name, report, "a subscriber asks for another {}: it gets nothing")
    if not _deadline(node, f"qos_overrides.{name}.publisher.deadline", profile):
        del events["deadline"]
    return _with_events(make, PublisherEventCallbacks, events)


def subscription(
    node: Node, kind: Any, topic: str, callback: Callable[[Any], None], profile: QoSProfile, report: Report, group: Any
) -> Any:
    """A subscription whose missed deadlines and incompatible publishers are reported."""

    def make(callbacks: SubscriptionEventCallbacks) -> Any:
        overriding = QoSOverridingOptions(KINDS)
        return node.create_subscription(
            kind,
            topic,
            callback,
            profile,
            callback_group=group,
            event_callbacks=callbacks,
            qos_overriding_options=overriding,
        )

    name = node.resolve_topic_name(topic)
    events = _events(name, report, "a publisher offers another {}: nothing is received from it")
    if not _deadline(node, f"qos_overrides.{name}.subscription.deadline", profile):
        del events["deadline"]
    return _with_events(make, SubscriptionEventCallbacks, events)


def _deadline(node: Node, parameter: str, profile: QoSProfile) -> bool:
    """Whether there is a deadline to be missed, by the profile or the parameter that overrides it."""
    if not node.has_parameter(parameter):
        descriptor = ParameterDescriptor(description="nanoseconds, 0 = none", read_only=True)
        node.declare_parameter(parameter, profile.deadline.nanoseconds, descriptor)
    return 0 < node.get_parameter(parameter).value < FOREVER_NS


def _events(topic: str, report: Report, sentence: str) -> dict[str, Callable[[Any], None]]:
    def deadline(event: Any) -> None:
        report(topic, "deadline", f"{event.total_count_change} deadlines missed")

    def incompatible(event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind).lower().replace("_", " ")
        report(topic, "incompatible", sentence.format(policy))

    return {"deadline": deadline, "incompatible_qos": incompatible}


def _with_events(make: Callable[[Any], Any], callbacks: Any, events: dict[str, Callable[[Any], None]]) -> Any:
    """What `make` makes, with as many of `events` as the middleware has, and no others: each costs at every frame."""

    class Lasting(callbacks):
        """Events that an executor may still look at while their topic is taken down."""

        def create_event_handlers(self, *arguments: Any, **named: Any) -> Any:
            handlers = super().create_event_handlers(*arguments, **named)
            for handler in handlers:
                handler.add_to_wait_set = functools.partial(_add, handler.add_to_wait_set)
            return handlers

    for left in (events, {name: event for name, event in events.items() if name != "deadline"}):
        try:
            return make(Lasting(**left, use_default_callbacks=False))
        except UnsupportedEventTypeError:
            continue
    return make(Lasting(use_default_callbacks=False))


def _add(add: Callable[[Any], None], wait_set: Any) -> None:
    # rclpy's executor passes over a destroyed subscription, but not over its events: it would stop spinning.
    with contextlib.suppress(RuntimeError):
        add(wait_set)
