"""Writing a graph whose tensors hold chosen channels: who holds which number, and how to assemble a list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from .lanes import dims_or_none, name_of
from .numbers import Ids, Numbers

SLICES = 3  # up to so many Slices are tried before a Gather
CANDIDATES = 16  # assembled tensors looked at for reuse


@dataclass(eq=False)
class Tensor:
    """A value of the new graph. `numbers`: what its channels hold, -1 for a channel nobody reads. `free`: the
    producer can still put its output channels in any order, until somebody reads them. `family`: see `families`.
    """

    name: str
    numbers: Ids
    shape: tuple[int, ...]
    dtype: ir.DataType | None
    free: bool = False
    array: np.ndarray | None = None
    index: int = -1
    family: str = ""


@dataclass(eq=False)
class Constant:
    """An initializer; `make` is called when the order of all channels is known. `source`: the tensor that `make` may
    return as is.
    """

    name: str
    make: Callable[[], np.ndarray]
    source: ir.TensorProtocol | None = None
    whole: np.ndarray | None = None


@dataclass(eq=False)
class Record:
    """One node to be. `notes`: its metadata, by key, as text that is made when the order of all channels is known."""

    op: str
    name: str
    inputs: list[Tensor | Constant | None]
    outputs: list[Tensor]
    attributes: list[ir.Attr] = field(default_factory=list)
    domain: str = ""
    notes: dict[str, Callable[[], str]] = field(default_factory=dict)


class Emitter:
    """Collects nodes, knows where every number lives, and assembles inputs.

    families: value name -> family, which every new tensor inherits from the original value that it is like.
    """

    def __init__(self, numbers: Numbers, reserved: Sequence[str], families: Mapping[str, str]) -> None:
        self.numbers, self.families = numbers, families
        self.records: list[Record] = []
        self.tensors: list[Tensor] = []
        self.gathers: list[str] = []
        self.home = np.full(numbers.count, -1, np.int64)  # number -> index of the tensor that holds it
        self.place = np.zeros(numbers.count, np.int64)  # number -> channel in that tensor
        self._names = set(reserved)
        self._holders: dict[int, list[Tensor]] = {}
        self._made: dict[Any, Tensor] = {}
        self._shared: dict[str, Constant] = {}

    # --- names, tensors, nodes ---

    def name(self, base: str) -> str:
        """`base`, or `base.1`, `base.2`... when it is taken."""
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}.{count}"
        self._names.add(name)
        return name

    def tensor(self, like: ir.Value, numbers: Ids, *, free: bool = False, base: str = "") -> Tensor:
        """A new home for `numbers`, shaped as the original value `like` with another channel count."""
        made = self.copy(like, numbers, base or name_of(like))
        made.free = free
        held = np.flatnonzero(numbers >= 0)
        self.home[numbers[held]], self.place[numbers[held]] = made.index, held
        return made

    def copy(self, like: ir.Value, numbers: Ids, base: str) -> Tensor:
        """A tensor that is nobody's home: its numbers live elsewhere, or are mixes."""
        return self._add(base, numbers, dims_or_none(like), like.dtype, self.families.get(name_of(like), ""))

    def _add(self, base: str, numbers: Ids, shape: tuple[int, ...], dtype: ir.DataType | None, family: str) -> Tensor:
        shape = (shape[0], len(numbers), *shape[2:]) if len(shape) >= 2 else shape
        made = Tensor(self.name(base), numbers, shape, dtype, index=len(self.tensors), family=family)
        self.tensors.append(made)
        return made

    def node(
        self,
        op: str,
        inputs: list[Tensor | Constant | None],
        output: Tensor,
        base: str,
        attributes: Sequence[ir.Attr] = (),
    ) -> Record:
        record = Record(op, self.name(f"node:{base}")[5:], inputs, [output], list(attributes))
        self.records.append(record)
        return record

    def shared(self, name: str, array: np.ndarray) -> Constant:
        """An initializer that several nodes may read, under its original name."""
        if name not in self._shared:
            self._shared[name] = Constant(self.name(name), lambda: array)
        return self._shared[name]

    def constant(self, base: str, array: np.ndarray) -> Constant:
        return Constant(self.name(base), lambda: array)

    def reorder(self, tensor: Tensor, numbers: Ids) -> bool:
        """Put a tensor's channels in the order of `numbers` if its producer still can; says whether they now are.

        -1 among them is a channel of zeros.
        """
        if np.array_equal(tensor.numbers, numbers):
            return True
        held = np.flatnonzero(numbers >= 0)
        live = tensor.numbers[tensor.numbers >= 0]
        if not tensor.free or not np.array_equal(np.sort(numbers[held]), np.sort(live)):
            return False
        tensor.numbers, tensor.shape = numbers, (tensor.shape[0], len(numbers), *tensor.shape[2:])
        self.place[numbers[held]] = held
        return True

    # --- reading ---

    def read(self, numbers: Ids, base: str, like: ir.Value) -> Tensor:
        """A tensor that holds exactly `numbers`, in this order."""
        shape = dims_or_none(like)
        for held in self._candidates(int(numbers[0]), shape):
            start = int(np.flatnonzero(held.numbers == numbers[0])[0])
            if np.array_equal(held.numbers[start : start + len(numbers)], numbers):
                return self._slice(held, start, start + len(numbers), base)
        homes = self.home[numbers]
        cuts = np.flatnonzero(np.diff(homes) != 0) + 1
        stretches = np.split(numbers, cuts)
        sources = np.unique(homes)
        if len(stretches) > 8 and len(stretches) > 2 * len(sources):
            whole = [self._whole(int(home), numbers[homes == home], like) for home in sources]
            base = self.name(base)
            self._names.remove(base)
            return self._gather(self._concat(whole, f"{base}.sources", like), numbers, base)
        parts = [part for stretch in stretches for part in self._stretch(stretch, base, like)]
        return self._concat(parts, base, like)

    def columns(self, wanted: Ids, base: str, like: ir.Value, *, whole: bool = False) -> Tensor:
        """A tensor that holds `wanted` in any order, perhaps with others between: for readers with free columns.

        `whole`: tensors are taken as they are, whatever else they hold; else with at most a quarter of others.
        """
        shape, spare = dims_or_none(like), len(wanted) // 4
        best: Tensor | None = None
        for held in self._candidates(int(wanted[0]), shape):
            if (whole or len(held.numbers) <= len(wanted) + spare) and np.isin(wanted, held.numbers).all():
                best = held if best is None or len(held.numbers) < len(best.numbers) else best
        if best is not None:
            best.free = False
            return best
        homes, parts = self.home[wanted], []
        for home in sorted(set(homes.tolist()), key=lambda index: (index < 0, index)):
            part = wanted[homes == home]
            if home >= 0:
                part = part[np.argsort(self.place[part], kind="stable")]
                held = self.tensors[home]
                if whole or len(held.numbers) - len(part) <= len(part) // 4:
                    held.free = False
                    parts.append(held)
                    continue
            parts += self._stretch(part, base, like)
        return self._concat(parts, base, like)

    def arrange(self, numbers: Ids) -> Ids:
        """Order (argsort) in which `numbers` are cheapest to read."""
        for held in self._candidates(int(numbers[0]), None):
            if np.isin(numbers, held.numbers).all():
                where = {int(number): index for index, number in reversed(list(enumerate(held.numbers)))}
                places = np.array([where[int(number)] for number in numbers])
                order = np.argsort(places, kind="stable")
                if (np.diff(places[order]) == 1).all():
                    return order
        return np.lexsort((self.place[numbers], self.home[numbers]))

    def _candidates(self, number: int, shape: tuple[int, ...] | None) -> list[Tensor]:
        home = int(self.home[number])
        found = ([self.tensors[home]] if home >= 0 else []) + self._holders.get(number, [])[:CANDIDATES]
        return [t for t in found if shape is None or (t.shape[:1] == shape[:1] and t.shape[2:] == shape[2:])]

    def _stretch(self, numbers: Ids, base: str, like: ir.Value) -> list[Tensor]:
        """Parts that together hold `numbers`, all of which live in one tensor (or are constants)."""
        home = int(self.home[numbers[0]])
        if home < 0:
            return [self._literal(numbers, like)]
        held, places = self.tensors[home], self.place[numbers]
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        if len(cuts) >= SLICES:
            return [self._gather(held, numbers, f"{held.name}.gather")]
        return [self._slice(held, int(run[0]), int(run[-1]) + 1, base) for run in np.split(places, cuts)]

    def _whole(self, home: int, numbers: Ids, like: ir.Value) -> Tensor:
        return self._literal(np.unique(numbers), like) if home < 0 else self.tensors[home]

    # --- nodes that move channels ---

    def _slice(self, held: Tensor, start: int, stop: int, base: str) -> Tensor:
        held.free = False
        if start == 0 and stop == len(held.numbers):
            return held
        key = ("slice", held.index, start, stop)
        if key not in self._made:
            name = f"{held.name}.{start}to{stop}"
            made = self._add(name, held.numbers[start:stop], held.shape, held.dtype, held.family)
            limits = (("starts", start), ("ends", stop), ("axes", 1))
            inputs = [self.constant(f"{made.name}.{word}", np.array([value])) for word, value in limits]
            self.node("Slice", [held, *inputs], made, f"{made.name}.slice")
            self._made[key] = made
        return self._made[key]

    def _concat(self, parts: list[Tensor], base: str, like: ir.Value) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        key = ("concat", *(part.index for part in parts))
        if key not in self._made:
            for part in parts:
                part.free = False
            numbers = np.concatenate([part.numbers for part in parts])
            own = {part.family for part in parts if part.array is None}
            family = own.pop() if len(own) == 1 else self.families.get(name_of(like), "")
            made = self._add(base, numbers, dims_or_none(like), parts[0].dtype, family)
            self.node("Concat", list(parts), made, f"{made.name}.concat", [ir.AttrInt64("axis", 1)])
            self._hold(made)
            self._made[key] = made
        return self._made[key]

    def _gather(self, held: Tensor, numbers: Ids, base: str) -> Tensor:
        held.free = False
        where = {int(number): index for index, number in reversed(list(enumerate(held.numbers)))}
        places = np.array([where[int(number)] for number in numbers], np.int64)
        key = ("gather", held.index, places.tobytes())
        if key not in self._made:
            made = self._add(base, numbers, held.shape, held.dtype, held.family)
            index = self.constant(f"{made.name}.index", places)
            self.node("Gather", [held, index], made, f"{made.name}.gather", [ir.AttrInt64("axis", 1)])
            self.gathers.append(made.name)
            self._hold(made)
            self._made[key] = made
        return self._made[key]

    def _hold(self, made: Tensor) -> None:
        for number in set(made.numbers.tolist()) - {-1}:
            self._holders.setdefault(number, []).append(made)

    def _literal(self, numbers: Ids, like: ir.Value) -> Tensor:
        """Constant channels as an initializer of the full size: zero padding must meet them as it met the original."""
        shape = dims_or_none(like)
        key = ("literal", numbers.tobytes(), shape[0], shape[2:])
        if key not in self._made:
            array = np.empty((shape[0], len(numbers), *shape[2:]), like.dtype.numpy() if like.dtype else np.float32)
            for index, number in enumerate(numbers.tolist()):
                known = self.numbers.constants.get(number)
                array[:, index] = self.numbers.literals[number] if known is None else known
            self._made[key] = made = self._add("constant", numbers, shape, like.dtype, "")
            made.array = array
        return self._made[key]

    # --- the graph ---

    def output(self, numbers: Ids, value: ir.Value, inputs: Sequence[Tensor], taken: list[Tensor]) -> Tensor:
        """The tensor of a graph output, under the output's own name."""
        found = self.read(numbers, name_of(value), value)
        if found in taken or found in inputs or found.array is not None:
            copy = Tensor(name_of(value), found.numbers, found.shape, found.dtype, family=found.family)
            self.node("Identity", [found], copy, f"{name_of(value)}.identity")
            return copy
        found.name = name_of(value)
        return found

    def build(self, inputs: list[Tensor], outputs: list[Tensor], like: ir.Model) -> ir.Model:
        """The finished model: inputs, outputs, opset and metadata as in `like`."""
        values: dict[int, ir.Value] = {}
        initializers: dict[int, ir.Value] = {}

        def value(item: Tensor | Constant | None) -> ir.Value | None:
            if item is None:
                return None
            if isinstance(item, Constant) or item.array is not None:
                if id(item) not in initializers:
                    initializers[id(item)] = _initializer(item)
                return initializers[id(item)]
            if id(item) not in values:
                kind = ir.TensorType(item.dtype) if item.dtype is not None else None
                values[id(item)] = ir.Value(name=item.name, shape=ir.Shape(item.shape), type=kind)
            return values[id(item)]

        starts = [value(item) for item in inputs]
        nodes = [
            ir.Node(
                r.domain,
                r.op,
                [value(i) for i in r.inputs],
                r.attributes,
                outputs=[_some(value(o)) for o in r.outputs],
                name=r.name,
                metadata_props={key: text() for key, text in r.notes.items()},
            )
            for r in self.records
        ]
        ends = [value(item) for item in outputs]
        graph = ir.Graph(
            [_some(v) for v in starts], [_some(v) for v in ends], nodes=nodes, initializers=list(initializers.values()),
            opset_imports=dict(like.graph.opset_imports), name=like.graph.name,
        )  # fmt: skip
        return ir.Model(
            graph,
            ir_version=like.ir_version,
            producer_name=like.producer_name,
            metadata_props=dict(like.metadata_props),
        )


def _some(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _initializer(item: Tensor | Constant) -> ir.Value:
    made = item.array if isinstance(item, Tensor) else item.make()
    assert made is not None
    array = np.ascontiguousarray(made) if made.ndim else np.asarray(made)  # makes a scalar 1-D otherwise
    tensor: Any = ir.Tensor(array, name=item.name)
    if isinstance(item, Constant) and item.source is not None and made is item.whole and item.source.name == item.name:
        tensor = item.source
    return ir.Value(name=item.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def attributes(node: ir.Node, **changed: int) -> list[ir.Attr]:
    """The node's attributes with some integers replaced."""
    kept = [item for key, item in node.attributes.items() if key not in changed]
    return kept + [ir.AttrInt64(key, number) for key, number in changed.items()]


def group_attributes(node: ir.Node, groups: int) -> list[ir.Attr]:
    """A convolution's attributes with `groups` groups; one group is the default and goes unsaid."""
    kept = [item for key, item in node.attributes.items() if key != "group"]
    return [*kept, ir.AttrInt64("group", groups)] if groups > 1 else kept
