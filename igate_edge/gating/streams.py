"""A backbone as a list of steps (from torch.fx) that can be run once per stream without one stream altering another."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ConvertError

#: x += y and the like, which fx records as calls of these functions.
_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}


@dataclass(frozen=True)
class Ref:
    """Stands for the value of step `index` among another step's arguments."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation. kind: "input", "attr", "module", "function" or "method"; `target` as in torch.fx.

    `same`: its value does not depend on the stream (the image, and what parameter-free operations make of it).
    `pure`: no parameters, nothing random: equal inputs give equal values in every stream. `path`: the module around it.
    """

    index: int
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    uses: tuple[int, ...] = ()
    path: str = ""
    pure: bool = False
    same: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps in execution order, the steps whose values are the backbone's feature maps, and every tensor's shape.

    `constants`: tensors that the backbone's forward makes, by the name under which "attr" steps look for them.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    shapes: dict[int, tuple[int, ...]]
    constants: dict[str, Tensor]

    def branch(self, backbone: nn.Module) -> nn.Module:
        """A copy of the backbone that the steps can be run with: nothing in-place, constants as buffers."""
        module = without_inplace(copy.deepcopy(backbone))
        for name, value in self.constants.items():
            module.register_buffer(name, value.clone(), persistent=False)
        return module

    def users(self) -> dict[int, list[int]]:
        """Step -> steps that read it, in order."""
        table: dict[int, list[int]] = {step.index: [] for step in self.steps}
        for step in self.steps:
            for use in step.uses:
                table[use].append(step.index)
        return table


def trace(backbone: nn.Module, example: Tensor) -> Plan:
    """Trace a backbone; `example` [N,C,H,W] gives the shapes. Raises ConvertError naming what cannot be traced."""
    graph, constants = _trace_graph(backbone)
    _undo_inplace(graph, backbone)
    steps, outputs = _to_steps(graph, backbone, constants)
    shapes = _check(Plan(steps, outputs, {}, constants), backbone, example)
    for index in outputs:
        if len(shapes.get(index, ())) != 4:
            raise ConvertError(
                "the backbone's output is not a feature map",
                f"shape {list(shapes.get(index, ()))}",
                "return [N,C,H,W] maps: drop pooling, flatten and classifier from the backbone",
            )
    return Plan(steps, outputs, shapes, constants)


def evaluate(step: Step, module: nn.Module, fetch: Callable[[int], Any]) -> Any:
    """Value of a step with the parameters of `module`, a copy of the backbone; `fetch` gives the values it uses."""
    if step.kind == "attr":
        return operator.attrgetter(step.target)(module)
    args, kwargs = resolve(step.args, fetch), resolve(step.kwargs, fetch)
    if step.kind == "module":
        return module.get_submodule(step.target)(*args, **kwargs)
    if step.kind == "method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def resolve(value: Any, fetch: Callable[[int], Any]) -> Any:
    """Replace every Ref inside nested tuples, lists, dicts and slices."""
    if isinstance(value, Ref):
        return fetch(value.index)
    if isinstance(value, (tuple, list)):
        return type(value)(resolve(item, fetch) for item in value)
    if isinstance(value, dict):
        return {key: resolve(item, fetch) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(resolve(item, fetch) for item in (value.start, value.stop, value.step)))
    return value


def feature_maps(value: Any) -> list[Tensor]:
    """The maps a backbone returned, in order: one tensor, or a list, tuple or dict of tensors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple, dict)) and value:
        items = list(value.values()) if isinstance(value, dict) else list(value)
        if all(isinstance(item, Tensor) for item in items):
            return items
    raise ConvertError(
        "the backbone returns no feature maps",
        f"it returned {type(value).__name__}",
        "return one [N,C,H,W] tensor, or a list, tuple or dict of them",
    )


def _trace_graph(backbone: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Trace in both modes: fx turns `self.training` into a constant, which would be wrong in the other mode."""
    graphs = []
    try:
        for mode in (True, False):
            probe = copy.deepcopy(backbone).train(mode)
            graphs.append(fx.Tracer().trace(probe))
    except Exception as error:  # a trace runs the user's forward: anything can come out of it
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConvertError(
            "the backbone cannot be traced",
            line,
            "remove Python branches and loops on tensor values, and assignments to parts of a tensor",
        ) from error
    first, second = (
        [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes] for graph in graphs
    )
    if first != second:
        left, right = next((a, b) for a, b in zip([*first, ("end",)], [*second, ("end",)], strict=False) if a != b)
        raise ConvertError(
            "the backbone's forward depends on self.training",
            f"node {left[0]} in training is {right[0]} with other arguments in evaluation"
            if left[0] == right[0]
            else f"node {left[0]} in training is {right[0]} in evaluation",
            "use a module (nn.Dropout, not F.dropout(..., self.training))",
        )
    names = {str(node.target) for node in graphs[1].nodes if node.op == "get_attr"}
    return graphs[1], {name: getattr(probe, name) for name in names if not _has_path(backbone, name)}


def _has_path(module: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def _undo_inplace(graph: fx.Graph, backbone: nn.Module) -> None:
    """Make every in-place operation return a new value, which later readers of the altered one then read."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        altered = _altered(node, backbone)
        if altered is None:
            continue
        for user in list(altered.users):
            if order[user] > order[node]:
                user.replace_input_with(altered, node)


def _altered(node: fx.Node, backbone: nn.Module) -> fx.Node | None:
    """The node that an in-place node overwrites, after making it out-of-place; None if it is not in-place."""
    operand = node.args[0] if node.args else None
    if node.op == "call_module" and getattr(backbone.get_submodule(str(node.target)), "inplace", False):
        return operand if isinstance(operand, fx.Node) else None
    if node.op == "call_method" and _is_inplace_name(str(node.target)):
        if not hasattr(Tensor, str(node.target)[:-1]):
            _refuse_write(node)
        node.target = str(node.target)[:-1]
        return operand if isinstance(operand, fx.Node) else None
    if node.op == "call_function":
        return _altered_by_function(node, operand)
    return None


def _altered_by_function(node: fx.Node, operand: Any) -> fx.Node | None:
    target: Any = node.target
    altered = operand if isinstance(operand, fx.Node) else None
    name = getattr(target, "__name__", "")
    if target in (operator.setitem, operator.delitem) or "out" in node.kwargs:
        _refuse_write(node)
    if target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
        return altered
    if _is_inplace_name(name):
        plain = getattr(torch, name[:-1], None) or getattr(nn.functional, name[:-1], None)
        if plain is None:
            _refuse_write(node)
        else:
            node.target = plain
        return altered
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None  # a builtin without a signature has no `inplace` argument
    if not bound.arguments.get("inplace", False):
        return None
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return altered


def _is_inplace_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _refuse_write(node: fx.Node) -> None:
    raise ConvertError(
        "the backbone writes into a tensor",
        f"node {node.name} ({node.target})",
        "build the new value with torch.where, torch.cat or arithmetic",
    )


def _to_steps(
    graph: fx.Graph, backbone: nn.Module, constants: Collection[str]
) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    index: dict[fx.Node, int] = {}
    steps: list[Step] = []
    outputs: tuple[int, ...] = ()
    for node in graph.nodes:
        if node.op == "output":
            outputs = _output_indices(node, index)
            continue
        kind = {"placeholder": "input", "get_attr": "attr"}.get(node.op, node.op.removeprefix("call_"))
        uses = tuple(index[used] for used in node.all_input_nodes)
        pure = (node.target in constants or not _has_state(node, backbone)) and not _is_random(node, backbone)
        same = pure and all(steps[use].same for use in uses)
        place = list(node.meta.get("nn_module_stack", {}).values())
        path = str(place[-1][0]) if place else ""
        args, kwargs = _with_refs(node.args, index), _with_refs(dict(node.kwargs), index)
        index[node] = len(steps)
        steps.append(Step(len(steps), kind, node.target, args, kwargs, uses, path, pure, same))
        if kind == "input" and len(steps) > 1 and not node.args:
            raise ConvertError(
                "the backbone takes more than one input", f"second input {node.target!r}", "give it a default value"
            )
    return tuple(steps), outputs


def _has_state(node: fx.Node, backbone: nn.Module) -> bool:
    if node.op == "call_module":
        module = backbone.get_submodule(str(node.target))
        return any(True for _ in _tensors(module))
    return node.op == "get_attr"


def _is_random(node: fx.Node, backbone: nn.Module) -> bool:
    target = type(backbone.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    name = getattr(target, "__name__", str(target)).lower()
    return any(word in name for word in ("dropout", "rrelu", "rand", "bernoulli", "noise"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _with_refs(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(index[value])
    if isinstance(value, tuple):
        return tuple(_with_refs(item, index) for item in value)
    if isinstance(value, list):
        return [_with_refs(item, index) for item in value]
    if isinstance(value, dict):
        return {key: _with_refs(item, index) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_with_refs(item, index) for item in (value.start, value.stop, value.step)))
    return value


def _output_indices(node: fx.Node, index: dict[fx.Node, int]) -> tuple[int, ...]:
    value = node.args[0]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    found = list(items)
    if not found or not all(isinstance(item, fx.Node) for item in found):
        raise ConvertError(
            "the backbone returns no feature maps",
            f"it returns {value!r}",
            "return one [N,C,H,W] tensor, or a list, tuple or dict of them",
        )
    return tuple(index[item] for item in found)


def _check(plan: Plan, backbone: nn.Module, example: Tensor) -> dict[int, tuple[int, ...]]:
    """Run the steps beside the backbone: they must agree, else something (an alias, a state) escaped the trace."""
    probe = copy.deepcopy(backbone).eval()
    steps_module = plan.branch(backbone).eval()
    values: list[Any] = []
    # Noise, and a copy for each: an all-zero image would hide differences, and the backbone may overwrite its input.
    image = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wanted = feature_maps(probe(image.clone()))
            torch.manual_seed(0)
            for step in plan.steps:
                values.append(
                    input_value(step, image)
                    if step.kind == "input"
                    else evaluate(step, steps_module, values.__getitem__)
                )
    except ConvertError:
        raise
    except Exception as error:  # the user's own code runs here
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConvertError(
            "the backbone fails on the example", f"input {list(example.shape)}: {line}", "pass an example it accepts"
        ) from error
    for want, index in zip(wanted, plan.outputs, strict=True):
        got = values[index]
        if not isinstance(got, Tensor) or got.shape != want.shape or not _close(got, want):
            raise ConvertError(
                "the traced backbone computes something else",
                f"output of node {plan.steps[index].target} differs",
                "avoid views that are written in place, and state kept outside of parameters and buffers",
            )
    return {step.index: tuple(v.shape) for step, v in zip(plan.steps, values, strict=True) if isinstance(v, Tensor)}


def input_value(step: Step, image: Tensor) -> Any:
    """Value of an "input" step: the image for the first, its default for any other."""
    return step.args[0] if step.args else image


def _close(got: Tensor, want: Tensor) -> bool:
    scale = want.abs().max().item() if want.numel() else 0.0
    return not math.isfinite(scale) or (got - want).abs().max().item() <= 1e-4 * scale + 1e-6


def without_inplace(module: nn.Module) -> nn.Module:
    """Turn off `inplace` in all submodules: streams share tensors. Returns the module."""
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    return module
