"""The lifecycle node: configure loads, verifies and warms up; activate publishes; deactivate keeps; cleanup frees."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from igate_edge.errors import IgateError, InputError
from igate_edge.robotics.messages import Diagnostics, Status, to_frame
from igate_edge.runtime.frame import Camera, Frame

from . import convert, loading, parameters, qos
from .health import ERROR, OK, WARN, Health, Heartbeat
from .parameters import Settings
from .work import Work

#: Seconds between two log lines about images that cannot be taken.
QUIET_S = 5.0


class IgateNode(LifecycleNode):
    """Answers `image` (and `camera_info`) on ~/segmentation, ~/depth, ~/normals, ... with the image's own header.

    Several of them run in one process on one executor: give each a name or a namespace of its own. A transition blocks
    the thread that runs it; with `executor.CameraExecutor` all other callbacks go on. open_engine: how the options of
    `loading.options_of` become an engine, for programs that bring their own. Other arguments: as rclpy.node.Node, and
    parameter_overrides as messages too, which is what a component container hands over.
    """

    def __init__(
        self,
        name: str = "igate",
        *,
        open_engine: Callable[[Mapping[str, Any]], Any] | None = None,
        parameter_overrides: Sequence[Parameter | ParameterMessage] | None = None,
        **node_arguments: Any,
    ) -> None:
        given = [
            Parameter.from_parameter_msg(p) if isinstance(p, ParameterMessage) else p for p in parameter_overrides or ()
        ]
        super().__init__(name, parameter_overrides=given, **node_arguments)
        parameters.declare(self)
        self._open_engine = open_engine
        self._built: set[str] = set()
        self._phase, self._reason, self._lost = "unconfigured", "", ""
        self._work: Work | None = None
        self._camera: Camera | None = None
        self._inputs: list[Any] = []
        self._topic = ""
        self._health = Health()
        self._image_group = MutuallyExclusiveCallbackGroup()
        self._diagnostics = self.create_publisher(convert.DiagnosticArray, "/diagnostics", 10)
        self._trouble = self.create_guard_condition(self._give_up)
        self._start = self.create_guard_condition(self._configure_and_activate)
        self._closing = False
        # Held while images, and while events and diagnostics look at what a transition may take away.
        self._taking, self._looking = threading.Lock(), threading.Lock()
        self.add_on_set_parameters_callback(self._on_parameters)
        # Not a timer: in real time whatever the robot's clock does, and whatever its executor is busy with.
        self._heart = Heartbeat(self._beat, 1.0)

    # Transitions -----------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the parameters, open the engine, warm it up, and offer the topics."""
        self._phase, self._reason, self._lost = "loading", "", ""
        try:
            settings = parameters.check(parameters.read(self))
            self._heart.every(settings.diag_period)
            self._health = Health()
            self._work = Work(self, *self._prepare(settings), self._on_event, self._warn)
        except Exception as error:  # whatever a backend or a middleware raises is the reason
            return self._error(error)
        self._phase = "inactive"
        self.get_logger().info("ready: " + ", ".join(f"{name} {value}" for name, value in self._work.facts().items()))
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Say what the labels mean, and take images from now on."""
        assert self._work is not None
        done = super().on_activate(state)
        try:
            self._work.outputs.latch()
            self._health.begin()
            self._subscribe(self._work.settings)
        except Exception as error:
            return self._error(error)
        self._phase = "active"
        return done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take no more images; engine and topics stay. An engine that was lost makes this end in the error state."""
        with self._taking:
            self._phase = "inactive"
        self._unsubscribe()
        if self._work is not None:
            self._work.drain()
        done = super().on_deactivate(state)
        if self._lost:
            self._reason = self._lost
            return TransitionCallbackReturn.ERROR
        return done

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and take the topics down."""
        self._release("unconfigured")
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As cleanup, for good."""
        self._release("finalized")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything and be unconfigured again, with the reason in the log and in /diagnostics."""
        self._release("unconfigured")
        self.get_logger().error(f"not usable: {self._reason or 'a transition failed'}")
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        """Free the engine, then the node."""
        self._closing = True
        self._heart.close()
        self._release("finalized")
        super().destroy_node()

    def autostart(self) -> None:
        """Configure and activate as soon as an executor spins, without anybody asking for it."""
        self._start.trigger()

    @property
    def alive(self) -> bool:
        """False when the engine was lost for good: only a new process helps."""
        return not self._lost

    @property
    def hang_s(self) -> float:
        """Seconds that a callback may wait for an engine that hangs: with `drop_policy` every, images wait for it."""
        work = self._work
        return 0.0 if work is None else work.settings.hang_s

    @property
    def reason(self) -> str:
        """Why the node was last in its error state; empty once it is configured again."""
        return self._reason

    def _prepare(self, settings: Settings) -> tuple[Callable[[], Any], Settings, Mapping[str, Any]]:
        """What opens the engine, quickly from now on; and the bundle's manifest."""
        options = loading.options_of(settings)
        if self._open_engine is not None:
            return functools.partial(self._open_engine, options), settings, {}
        # Once in a node's life: whoever configures it again finds the engine in the cache.
        if settings.build_apart and repr(options) not in self._built:
            loading.build_apart(options, lambda: self._closing or not self.context.ok())
            self._built.add(repr(options))
        return functools.partial(loading.open_engine, options), settings, loading.manifest_of(options)

    def _error(self, error: Exception) -> TransitionCallbackReturn:
        self._reason = str(error) if isinstance(error, IgateError) else f"{type(error).__name__}: {error}"
        return TransitionCallbackReturn.ERROR

    def _configure_and_activate(self) -> None:
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _give_up(self) -> None:
        if self._phase == "active" and self._lost:
            self.trigger_deactivate()

    def _release(self, phase: str) -> None:
        with self._taking, self._looking:
            work, self._work, self._phase = self._work, None, phase
        self._unsubscribe()
        if work is not None:
            work.close()

    # Images ----------------------------------------------------------------------------------------------------------

    def _subscribe(self, settings: Settings) -> None:
        depth = 1 if settings.drop_policy == "latest" else 10
        kind, topic, on_image = Image, "image", self._on_image
        if settings.compressed:
            kind, topic, on_image = CompressedImage, "image/compressed", self._on_compressed
        self._topic = self.resolve_topic_name(topic)
        for what, name, callback in ((kind, topic, on_image), (CameraInfo, "camera_info", self._on_camera)):
            profile = qos.sensor(depth if what is kind else 1)
            made = qos.subscription(self, what, name, callback, profile, self._on_event, self._image_group)
            self._inputs.append(made)

    def _unsubscribe(self) -> None:
        inputs, self._inputs, self._camera = self._inputs, [], None
        for subscription in inputs:
            self.destroy_subscription(subscription)

    def _on_camera(self, message: CameraInfo) -> None:
        self._camera = convert.to_camera(message)

    def _on_image(self, message: Image) -> None:
        self._take(functools.partial(convert.to_frame, message))

    def _on_compressed(self, message: CompressedImage) -> None:
        self._take(functools.partial(to_frame, convert.from_compressed(message)))

    def _take(self, framed: Callable[[str, Camera | None, int], Frame]) -> None:
        """Hand an image to the pipeline; `framed` makes it a frame of this topic and camera at this time."""
        with self._taking:
            work = self._work
            if work is None or self._phase != "active":
                return
            self._health.image()
            wanted = work.outputs.wanted()
            if wanted is None:
                self._health.unwatched()
                return
            try:
                work.submit(framed(self._topic, self._camera, self.get_clock().now().nanoseconds), wanted)
            except IgateError as error:
                self._health.refused(str(error))
                self.get_logger().warning(f"image refused: {error}", throttle_duration_sec=QUIET_S)

    # Parameters and diagnostics --------------------------------------------------------------------------------------

    def _on_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        before = parameters.read(self)
        after = before | {parameter.name: parameter.value for parameter in changed if parameter.name in before}
        fixed = [name for name, value in after.items() if value != before[name] and name not in parameters.LIVE]
        if fixed and self._phase in ("loading", "inactive", "active"):
            reason = f"{', '.join(fixed)}: read by configure, the node is {self._phase}. Fix: run cleanup first."
            return SetParametersResult(successful=False, reason=reason)
        try:
            settings = parameters.check(after)
        except InputError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if after["diag_period"] != before["diag_period"]:
            self._heart.every(settings.diag_period)
        if self._work is not None:
            self._work.apply(settings)
        return SetParametersResult(successful=True)

    def _warn(self, sentence: str) -> None:
        self.get_logger().warning(sentence)

    def _on_event(self, topic: str, kind: str, sentence: str) -> None:
        with self._looking:
            # Topics go on missing deadlines while nothing is published on purpose.
            work = self._work if self._phase == "active" else None
            if kind == "deadline" and (work is None or work.outputs.unheard(topic)):
                return
            news = self._health.event(topic, kind, sentence)
        if news:
            self._warn(f"{topic}: {sentence}")

    def _beat(self) -> None:
        if (work := self._work) is not None:
            work.quiet()
        try:
            self.publish_diagnostics()
        except Exception as error:  # the context is shut down, or the middleware is gone
            if self.context.ok():
                self.get_logger().error(f"no diagnostics: {error}", throttle_duration_sec=QUIET_S)

    def publish_diagnostics(self) -> None:
        """Say how the node is, on /diagnostics; also called every `diag_period` seconds."""
        with self._looking:
            statuses = self._statuses()
        prefix = self.get_fully_qualified_name().lstrip("/")
        named = tuple(dataclasses.replace(status, name=f"{prefix}: {status.name}") for status in statuses)
        stamp_ns = self.get_clock().now().nanoseconds
        self._diagnostics.publish(convert.to_diagnostics(Diagnostics(named, stamp_ns)))

    def _statuses(self) -> list[Status]:
        work = self._work if self._phase == "active" else None
        if work is not None and not work.alive and not self._lost:
            self._lost = work.trouble or "a frame never came out of the pipeline"
            self.get_logger().fatal(f"lost for good: {self._lost}")
            self._trouble.trigger()
        statuses = [self._state()]
        if work is not None:
            publishers = self.count_publishers(self._topic)
            statuses.append(self._health.input_status(self._topic, publishers, work.settings.fps))
            statuses += [*work.statuses(), self._health.qos_status()]
        return statuses

    def _state(self) -> Status:
        work, reason = self._work, self._reason
        values = {} if work is None else work.facts()
        if reason:
            return Status(ERROR, "state", f"{self._phase}: {reason}", values)
        level = OK if self._phase in ("active", "inactive") else WARN
        return Status(level, "state", self._phase, values)
