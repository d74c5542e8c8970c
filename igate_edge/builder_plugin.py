"""The kernels' plugin in a TensorRT build: tried layer by layer as kernels/plugin_choice.py says, kept where faster.

Nothing is compiled here: where kernels or library are missing, the report says how to make them. Not run on a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igate_edge.kernels import manifest, plugin
from igate_edge.kernels.plugin_choice import Choice, choose, gather

from .builder_forms import Ask, Form, How, Maker, image_of
from .compiler import functions, graph
from .compiler.half import half
from .engines.onnxruntime import Timing, ab_time
from .engines.tensorrt import BuildCancelled
from .errors import CheckFailed, GraphError, IgateError
from .files import as_path, os_errors, read_file
from .runtime.cache import default_dir

if TYPE_CHECKING:
    import onnx_ir as ir

    from .builder import Options

#: Profiled runs of each engine, in turn, and the calls of a run.
ROUNDS, CALLS = 8, 10
#: What only the plugin's library has in it, in words that it prints.
MARK = b"igate::Kernel"
#: Such a build ends every process that did not start with its runtime.
_SANITISED = b"__asan_init"
_ELF = {"x86_64": 62, "aarch64": 183}
_HEAD = b"igate plugin "
BUILD = "python -m igate_edge.kernels.build_plugin"


@dataclass(frozen=True)
class Kit:
    """What the plugin runs on here. sha256: of the library, kernels: of their image; both are in the engine's key."""

    library: Path
    sha256: str
    image: plugin.Image
    kernels: str


def find(options: Options, here: dict[str, Any], kernels: Path | None, libraries: Path | None) -> Kit | str:
    """What is needed to try the plugin, or why it is not tried.

    here: `probe` of the backend. kernels: what `kernels.build` wrote (None: beside the package). libraries: where
    `kernels.build_plugin` keeps its builds (None: its place).
    """
    if options.precision == "float":
        return "only INT8 layers have kernels"
    if options.batch != 1:
        return f"its launches are made for one image a call, not {options.batch}"
    try:
        arch, driver = _number(here["compute"], 10, 1), _number(here["driver"], 1000, 10)
        image = plugin.Image.built(arch, driver, kernels or manifest.FOLDER)
        for path, data in _libraries(options, libraries):
            return Kit(path, hashlib.sha256(data).hexdigest(), image, manifest.digest(image.data))
    except (KeyError, ValueError):
        return f"no kernels for compute {here.get('compute')}, driver {here.get('driver')}"
    except IgateError as error:
        return str(error)
    given = "none of the libraries given is it" if options.plugins else "none was built for this machine"
    return f"its library is missing: {given}; {BUILD}"


def _number(version: str, major: int, minor: int) -> int:
    """
    >>> _number("8.7", 10, 1), _number("12.6", 1000, 10)
    (87, 12060)
    """
    first, second = str(version).split(".")[:2]
    return int(first) * major + int(second) * minor


def _libraries(options: Options, folder: Path | None) -> Iterator[tuple[Path, bytes]]:
    """The plugin's libraries for this machine with their bytes: those given, else the builds, newest first."""
    folder = default_dir() / "plugin" if folder is None else folder
    builds = {path: path.stat().st_mtime for path in folder.glob("*/libigate_kernel.so")}
    paths = [as_path(path) for path in options.plugins] or sorted(builds, key=lambda path: -builds[path])
    for path in paths:
        with os_errors(path, "read"):
            data = read_file(path)
        machine = int.from_bytes(data[18:20], "little")
        if MARK in data and _SANITISED not in data and machine == _ELF.get(platform.machine()):
            yield path, data


def seal(plan: bytes, kit: Kit) -> bytes:
    """A plan with plugin layers, with the library that they need written before it.

    >>> kit = Kit(Path("x.so"), "ab" * 32, plugin.Image(b"", {}), "")
    >>> unseal(seal(b"plan", kit)) == (b"plan", "ab" * 32), unseal(b"plan")
    (True, (b'plan', ''))
    """
    return _HEAD + kit.sha256.encode() + b"\n" + plan


def unseal(payload: bytes) -> tuple[bytes, str]:
    """A plan and the SHA-256 of the library that it needs, "" where it has no plugin layers."""
    if not payload.startswith(_HEAD):
        return payload, ""
    head, plan = payload.split(b"\n", 1)
    return plan, head[len(_HEAD) :].decode(errors="replace")


def library(sha256: str, options: Options, folder: Path | None) -> Path:
    """The library of this SHA-256; raises CheckFailed where it is not here (cases T8)."""
    for path, data in _libraries(options, folder):
        if hashlib.sha256(data).hexdigest() == sha256:
            return path
    evidence = f"igate::Kernel of the library with SHA-256 {sha256[:16]}"
    raise CheckFailed("the engine needs a plugin library that is not here", evidence, f"build it: {BUILD}")


def compare(calls: Collection[str], own: Any, plugged: Any) -> tuple[Choice, dict[str, dict[str, float]]]:
    """The layers that take the plugin, and median ms of each layer that both engines have; `layer_times` in turn."""
    runs: tuple[list[Sequence[tuple[str, float]]], ...] = ([], [])
    for number in range(ROUNDS):
        pairs = list(zip((own, plugged), runs, strict=True))
        for session, into in pairs if number % 2 == 0 else pairs[::-1]:
            into.append(session.layer_times(CALLS))
    times = gather(calls, *runs)
    medians = {
        name: {"tensorrt_ms": statistics.median(both.engine), "plugin_ms": statistics.median(both.plugin)}
        for name, both in times.items()
        if both.engine and both.plugin
    }
    return choose(times), medians


def engine_times(times: Timing) -> tuple[bool, str, dict[str, float]]:
    """Whether whole frames are faster with the plugin beyond doubt, in words and numbers; `times` has it as the first.

    Every quarter of the pairs counts: a plugin that gains nothing sure is one more library to keep.
    """
    better = times.spread[1] < 1
    words = (
        f"with the plugin {times.a_ms:.3f} ms, without {times.b_ms:.3f} ms, ratio {times.ratio:.3f} "
        f"({times.spread[0]:.3f}-{times.spread[1]:.3f}, {times.rounds} pairs)"
    )
    return better, words, {"plugin_ms": times.a_ms, "tensorrt_ms": times.b_ms, "ratio": times.ratio}


def int8_form(
    maker: Maker, ask: Ask, quantised: ir.Model, kit: Kit | str, clock: Callable[[], float]
) -> tuple[Form, dict[str, Any]]:
    """The INT8 form, with the plugin in those layers where it is faster; and what the report says of the plugin.

    What goes wrong with the plugin, or with local functions, costs the plugin and nothing else. Raises as `Maker.form`.
    """
    begin = clock()
    if isinstance(kit, str):
        return maker.form(ask, "int8", half(quantised)), {"layers": [], "note": f"not tried: {kit}"}
    about: dict[str, Any] = {"layers": [], "note": "", "library": kit.sha256, "kernels": kit.kernels}
    try:
        calls = half(functions.with_functions(quantised))
        own = maker.form(ask, "int8", calls, How(share=0.5))
    except BuildCancelled:
        raise
    except (GraphError, CheckFailed) as error:
        about["note"] = f"not tried: no engine of local functions: {error}"
        return maker.form(ask, "int8", half(quantised)), about
    try:
        form = _plugged(maker, ask, own, calls, kit, _Limit(begin, clock, own, ask.options.seconds), about)
    except BaseException as error:
        if isinstance(error, BuildCancelled) or not isinstance(error, IgateError):
            own.session.close()
            raise
        about["note"] = f"not used: {error}"
        ask.work.warnings += [f"the plugin is {about['note']}"] if isinstance(error, CheckFailed) else []
        return own, about
    if form is None:
        return own, about
    own.session.close()
    return form, about


@dataclass(frozen=True)
class _Limit:
    """The time that is left for builds like those of `own`."""

    begin: float
    clock: Callable[[], float]
    own: Form
    seconds: float

    def over(self, builds: int) -> str:
        """Why so many more builds do not fit into what is left, "" where they do."""
        longest = max([row.get("seconds", 0.0) for row in self.own.plan.tried] or [self.own.plan.seconds])
        spent = self.clock() - self.begin
        if spent + builds * longest <= self.seconds:
            return ""
        return f"{builds} more build(s) of {longest:.0f} s after {spent:.0f} s: more than {self.seconds:.0f} s"


def _plugged(
    maker: Maker, ask: Ask, own: Form, calls: ir.Model, kit: Kit, limit: _Limit, about: dict[str, Any]
) -> Form | None:
    """The form with the plugin in the layers that are faster on it, None where it is not faster; see plugin_choice.

    `about` is told why. Raises IgateError where one of its engines cannot be built or fails a gate.
    """
    known = functions.layers(calls)
    late = limit.over(2)
    if late or not known:
        about["note"] = f"not tried: {late or 'no layer of this network has a kernel'}"
        return None
    how, work = How(own, kit), ask.work
    with work.stage("build plugin"):
        plan = maker.compile(graph.dump(functions.drop_functions(calls, kit.image)), ask.options, "int8", how)
    with work.stage("plugin"), contextlib.closing(maker.open(plan.plan, ask.options, kit)) as session:
        choice, about["times"] = compare(known, own.session, session)
    about["why"] = dict(choice.why)
    late = limit.over(1)
    if late or not choice.layers:
        about["note"] = f"not used: {late or 'no layer is faster on it'}"
        return None
    form = maker.form(ask, "int8", functions.drop_functions(calls, kit.image, only=choice.layers), how)
    with contextlib.ExitStack() as undo, work.stage("plugin"):
        undo.callback(form.session.close)
        image = image_of(ask.bundle, form.session)
        better, words, about["engine"] = engine_times(ab_time(form.session, own.session, image, clock=limit.clock))
        about["note"] = f"{'' if better else 'not used: '}{words}"
        if not better:
            return None
        undo.pop_all()
    about["layers"] = list(choice.layers)
    return form
