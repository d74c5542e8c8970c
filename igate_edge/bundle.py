"""The .igate bundle: one file that holds a network and everything that proves it is still that network.

A zip, stored and not deflated, of exactly the members in `MEMBERS`, in that order, with no timestamps, extra fields
or attributes. The manifest names the size and SHA-256 of every other member; the archive comment is the SHA-256 of
the manifest. The bytes of a valid bundle therefore follow from its members alone: the reader builds every zip header
again and compares, so no byte is free to change.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from .contract import OutputSpec, Preprocess, check_sites, is_number
from .errors import BundleError, IgateError
from .files import as_path, atomic_writer, os_errors

if TYPE_CHECKING:
    import numpy as np

FORMAT = "igate_edge bundle"
SCHEMA = 1
#: manifest.json stays first in every schema, so that an old reader can say "newer" instead of "broken".
MEMBERS = ("manifest.json", "model.onnx", "ranges.safetensors", "plain.onnx", "golden.safetensors")
#: What model.onnx may be (design section 5).
FORMS = ("gated", "merged", "filled", "plain")
MIN_GOLDEN = 4
MAX_BYTES = 2**31 - 1
MAX_MANIFEST_BYTES = 1 << 20
#: Parsed JSON takes up to 70 bytes a value; this bounds what a hostile manifest can make us allocate.
MAX_MANIFEST_VALUES = 50_000
_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_SEAL_PREFIX = b"igate-sha256:"
_AGAIN = "copy or export the bundle again; never edit it by hand"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory; make one with `Bundle.read`.

    model: ONNX bytes of the network (gated, merged, filled or plain form). plain: ONNX bytes of the plain shared net,
    shapes only. ranges: tensor name -> (low, high) seen in calibration. golden: "frame" uint8 [N,h,w,3], per task
    "float/NAME", "int8/NAME" float32 [N,...] raw outputs, and "label/NAME" where a label was known. seal: SHA-256 of
    the manifest, hex: the bundle's identity.
    """

    manifest: dict[str, Any]
    model: bytes
    ranges: dict[str, tuple[float, float]]
    plain: bytes
    golden: dict[str, np.ndarray]
    seal: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and verify every byte of the bundle at `path`; memory stays near the file's size.

        Raises BundleError (not a bundle, newer schema, truncated, altered) or UnavailableError (no permission).
        """
        path = as_path(path)
        with os_errors(path, "read"):
            if not path.exists():
                raise BundleError("no such bundle", str(path), "check the path")
            # Asked before opening: opening a named pipe would wait for a writer.
            if not path.is_file():
                raise BundleError(
                    "not a bundle", f"{path} is not a regular file", "pass a file written by `igate export`"
                )
            with path.open("rb") as file:
                return _read(file, os.fstat(file.fileno()).st_size, path.name)

    @property
    def tasks(self) -> tuple[OutputSpec, ...]:
        """One OutputSpec per task, in output order."""
        return tuple(OutputSpec.from_json(item) for item in self.manifest["tasks"])

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_json(self.manifest["preprocess"])

    @property
    def warnings(self) -> list[str]:
        """What was already wrong when it was packaged, one sentence each."""
        found = self.manifest.get("warnings")
        return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def canonical_json(data: Any) -> bytes:
    """The one way a JSON value is written here: sorted keys, no spaces, ASCII, finite numbers only.

    >>> canonical_json({"b": 1, "a": [1.5, "x"]})
    b'{"a":[1.5,"x"],"b":1}'
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def write_bundle(
    path: str | os.PathLike[str],
    manifest: dict[str, Any],
    *,
    model: bytes,
    ranges: dict[str, tuple[float, float]],
    plain: bytes,
    golden: dict[str, np.ndarray],
) -> Bundle:
    """Write a bundle in one step (whole or absent) and return it; the same content gives the same bytes.

    `manifest` holds tasks, preprocess, tolerances and whatever else describes the network; format, schema, version
    and digests are added here. Raises BundleError when the content would not read back, UnavailableError when the
    file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save

    from . import __version__

    try:
        arrays = {name: np.ascontiguousarray(golden[name]) for name in sorted(golden)}
        pairs = {name: np.asarray(ranges[name], np.float64) for name in sorted(ranges)}
        contents = [bytes(memoryview(model)), save(pairs), bytes(memoryview(plain)), save(arrays)]
    except Exception as error:  # safetensors and numpy have their own error types
        evidence = f"{type(error).__name__}: {str(error)[:200]}"
        fix = "pass bytes, pairs of numbers and numeric arrays"
        raise BundleError("the bundle's members cannot be stored", evidence, fix) from error
    members = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in zip(MEMBERS[1:], contents, strict=True)
    }
    created = {"format": FORMAT, "schema": SCHEMA, "created_by": f"igate_edge {__version__}", "members": members}
    try:
        head = canonical_json({**manifest, **created})
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            "the manifest is not plain JSON", str(error), "pass numbers, strings, lists and dicts"
        ) from error
    contents.insert(0, head)
    _check_manifest_size(len(head))
    bundle = _assemble(head, contents[1:], as_path(path).name)
    pieces = [(_local_header(name, data), data) for name, data in zip(MEMBERS, contents, strict=True)]
    tail = _tail([(zlib.crc32(data), len(data)) for data in contents], bundle.seal)
    total = sum(len(a) + len(b) for a, b in pieces) + len(tail)
    if total > MAX_BYTES:
        raise BundleError("the bundle would be too large", f"{total} bytes, limit {MAX_BYTES}", "store half weights")
    with atomic_writer(path) as file:
        for local, data in pieces:
            file.write(local)
            file.write(data)
        file.write(tail)
    return bundle


def _local_header(name: str, data: bytes) -> bytes:
    """1980-01-01, stored, nothing optional."""
    size = len(data)
    return _LOCAL.pack(b"PK\3\4", 10, 0, 0, 0, 0x21, zlib.crc32(data), size, size, len(name), 0) + name.encode()


def _tail(checks: list[tuple[int, int]], seal: str) -> bytes:
    """Central directory and end record for members of these (crc, size)."""
    central, offset = b"", 0
    for name, (crc, size) in zip(MEMBERS, checks, strict=True):
        fields = (10, 10, 0, 0, 0, 0x21, crc, size, size, len(name), 0, 0, 0, 0, 0, offset)
        central += _CENTRAL.pack(b"PK\1\2", *fields) + name.encode()
        offset += _LOCAL.size + len(name) + size
    comment = _SEAL_PREFIX + seal.encode()
    count = len(MEMBERS)
    return central + _END.pack(b"PK\5\6", 0, 0, count, count, len(central), offset, len(comment)) + comment


def _read(file: BinaryIO, size: int, label: str) -> Bundle:
    head, local = _read_manifest(file, size, label)
    manifest = _parse_manifest(head, label)
    sizes = _promised_sizes(manifest, label)
    names = sum(len(name) for name in MEMBERS)
    total = sum(sizes) + len(head) + len(MEMBERS) * (_LOCAL.size + _CENTRAL.size) + 2 * names
    total += _END.size + len(_SEAL_PREFIX) + 64
    if total != size:
        kind = "truncated" if size < total else "altered"
        raise BundleError(f"the bundle is {kind}", f"{label} has {size} bytes, its manifest promises {total}", _AGAIN)
    headers_ok, checks, contents = local == _local_header(MEMBERS[0], head), [(zlib.crc32(head), len(head))], []
    for name, length in zip(MEMBERS[1:], sizes, strict=True):
        header = file.read(_LOCAL.size + len(name))
        data = file.read(length)
        if hashlib.sha256(data).hexdigest() != manifest["members"][name]["sha256"]:
            raise BundleError("the bundle was altered", f"{name} in {label} does not match its SHA-256", _AGAIN)
        headers_ok = headers_ok and header == _local_header(name, data)
        checks.append((zlib.crc32(data), length))
        contents.append(data)
    tail = _tail(checks, hashlib.sha256(head).hexdigest())
    if not headers_ok or file.read(len(tail) + 1) != tail:
        raise BundleError(
            "the bundle was altered", f"the zip structure of {label} is not the one its members give", _AGAIN
        )
    return _assemble(head, contents, label)


def _read_manifest(file: BinaryIO, size: int, label: str) -> tuple[bytes, bytes]:
    """The first member and its header, without trusting any length beyond the file's own size."""
    local = file.read(_LOCAL.size + len(MEMBERS[0]))
    evidence = f"{label} is empty" if not size else f"{label} starts with {local[:4]!r}"
    refusal = BundleError("not a bundle", evidence, "pass a file written by `igate export`")
    if local[:4] != b"PK\3\4" or size > MAX_BYTES:
        raise refusal
    if len(local) < _LOCAL.size + len(MEMBERS[0]):
        raise BundleError("the bundle is truncated", f"{label} has {size} bytes", _AGAIN)
    fields = _LOCAL.unpack(local[: _LOCAL.size])
    if fields[9] != len(MEMBERS[0]) or local[_LOCAL.size :] != MEMBERS[0].encode() or fields[3]:
        raise BundleError("not a bundle", f"{label} is a zip, but does not begin with manifest.json", refusal.fix)
    length = fields[8]
    if length > size - len(local):
        raise BundleError("the bundle is truncated", f"manifest.json claims {length} bytes, {label} has {size}", _AGAIN)
    _check_manifest_size(length)
    return file.read(length), local


def _check_manifest_size(length: int) -> None:
    if length > MAX_MANIFEST_BYTES:
        raise BundleError(
            "the manifest is too large", f"{length} bytes, limit {MAX_MANIFEST_BYTES}", "store fewer results"
        )


def _parse_manifest(head: bytes, label: str) -> dict[str, Any]:
    altered = BundleError("the bundle was altered", f"manifest.json in {label} is not canonical JSON", _AGAIN)
    if head.count(b",") + head.count(b"[") + head.count(b"{") > MAX_MANIFEST_VALUES:
        raise altered
    try:
        manifest = json.loads(head)
    except (ValueError, RecursionError):
        raise altered from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(
            "not a bundle", f"manifest.json in {label} names no {FORMAT!r}", "pass a file of `igate export`"
        )
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        writer = str(manifest.get("created_by"))[:60]
        evidence = f"{label} has schema {schema} (written by {writer}), this version reads {SCHEMA}"
        raise BundleError(
            "the bundle was written by a newer igate_edge", evidence, "upgrade igate-edge, or export again here"
        )
    try:
        canonical = canonical_json(manifest)
    except (ValueError, RecursionError):
        raise altered from None
    if canonical != head or type(schema) is not int or schema != SCHEMA:
        raise altered
    return manifest


def _promised_sizes(manifest: dict[str, Any], label: str) -> list[int]:
    """Sizes of all members but the manifest, checked to be a plain list of exactly those members."""
    members = manifest.get("members")
    good, entries = isinstance(members, dict) and sorted(members) == sorted(MEMBERS[1:]), []
    if isinstance(members, dict) and good:
        entries = [members[name] for name in MEMBERS[1:]]
        good = all(isinstance(entry, dict) and type(entry.get("size")) is int for entry in entries)
        good = good and all(
            0 <= entry["size"] <= MAX_BYTES and isinstance(entry.get("sha256"), str) for entry in entries
        )
    if not good:
        raise BundleError("the bundle was altered", f"the manifest of {label} does not list the five members", _AGAIN)
    return [entry["size"] for entry in entries]


def _assemble(head: bytes, contents: list[bytes], label: str) -> Bundle:
    """Decode the members and check that they fit each other: what is true here, no later stage has to ask again."""
    import numpy as np

    model, ranges, plain, golden = contents
    manifest = json.loads(head)
    arrays = _tensors(golden, MEMBERS[4], label)
    pairs = _tensors(ranges, MEMBERS[2], label)
    bad = [
        n
        for n, a in pairs.items()
        if a.dtype != np.float64 or a.shape != (2,) or not np.isfinite(a).all() or a[0] > a[1]
    ]
    if bad:
        raise BundleError(
            "the bundle holds a bad activation range", f"{bad[0]!r} in {label}", "export the bundle again"
        )
    limits = {name: (float(pair[0]), float(pair[1])) for name, pair in pairs.items()}
    bundle = Bundle(manifest, model, limits, plain, arrays, hashlib.sha256(head).hexdigest())
    problem = _problem(bundle)
    if problem:
        raise BundleError(
            "the bundle's members do not fit together", f"{problem} in {label}", "export the bundle again"
        )
    return bundle


def _tensors(data: bytes, member: str, label: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError("the bundle holds a broken member", f"{member} in {label}: {error}", _AGAIN) from error
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def _problem(bundle: Bundle) -> str:
    """What is wrong with the content, in words; empty when nothing is."""
    try:
        tasks, size = bundle.tasks, bundle.preprocess
        tolerances = bundle.manifest["tolerances"]
        limits = [tolerances[spec.name]["limit"] for spec in tasks]
        check_sites(bundle.manifest.get("gates") or [], tasks)
        known = bundle.manifest["form"] in FORMS and isinstance(bundle.manifest["calibration"]["method"], str)
    except (IgateError, KeyError, TypeError, ValueError, AttributeError) as error:
        parts = "tasks, preprocess, gates, form, calibration or tolerances"
        return f"{parts} are incomplete ({type(error).__name__}: {error})"
    if not known:
        return "the form or the calibration is not known"
    if not tasks or len({spec.name for spec in tasks}) != len(tasks):
        return "tasks are absent or named twice"
    if not all(is_number(limit) and limit > 0 for limit in limits):
        return "a tolerance is not a positive number"
    if not _readable(bundle.manifest):
        return "opset, budget, training or results are of another type"
    frames = bundle.golden.get("frame")
    if frames is None or frames.dtype.name != "uint8" or frames.shape[1:] != (size.height, size.width, 3):
        return f"golden frames of {size.height}x{size.width}x3 uint8 are absent"
    if len(frames) < MIN_GOLDEN:
        return f"only {len(frames)} golden frames, at least {MIN_GOLDEN} are needed,"
    return next((p for spec in tasks for p in (_golden_problem(bundle, spec, len(frames)),) if p), "")


def _readable(manifest: dict[str, Any]) -> bool:
    """Whether what is only shown has the types that `inspect` and `report` show."""
    shown = [manifest.get(name) for name in ("budget", "training", "results")]
    if type(manifest.get("opset", 0)) is not int or not all(isinstance(part, dict | None) for part in shown):
        return False
    results = manifest.get("results") or {}
    rivals = results.get("rivals") or {}
    if not isinstance(rivals, dict):
        return False
    tables = [net for net in (results.get("float"), results.get("int8"), *rivals.values()) if net is not None]
    if not all(isinstance(net, dict) and all(isinstance(row, dict | None) for row in net.values()) for net in tables):
        return False
    values = [value for net in tables for row in net.values() for value in (row or {}).values()]
    return all(value is None or is_number(value) for value in values)


def _golden_problem(bundle: Bundle, spec: OutputSpec, count: int) -> str:
    import numpy as np

    shapes = set()
    for precision in ("float", "int8"):
        array = bundle.golden.get(f"{precision}/{spec.name}")
        if array is None or array.dtype != np.float32 or array.ndim != (4 if spec.dense else 2):
            return f"golden {precision} output of task {spec.name!r} is absent or of another type"
        if array.shape[:2] != (count, spec.channels) or not np.isfinite(array).all() or not array.size:
            return f"golden {precision} output of task {spec.name!r} has shape {array.shape} or is not finite"
        shapes.add(array.shape)
    label = bundle.golden.get(f"label/{spec.name}")
    size = bundle.preprocess.height, bundle.preprocess.width
    if label is not None and (label.dtype.kind not in "biuf" or label.shape not in _label_shapes(spec, count, size)):
        return f"labels of task {spec.name!r} are {label.dtype} {list(label.shape)}, not one a frame at network size"
    return "" if len(shapes) == 1 else f"float and INT8 golden outputs of task {spec.name!r} differ in shape"


def _label_shapes(spec: OutputSpec, count: int, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes that labels of `count` frames may have."""
    if spec.kind == "normals":
        return [(count, *size, 3), (count, 3, *size)]
    if spec.dense:
        return [(count, *size)]
    return [(count, spec.channels) if spec.kind == "multilabel" else (count,)]
