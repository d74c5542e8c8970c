"""Ahead-of-time build of gated_select in Triton: needs Triton's compiler (with its own ptxas), no GPU and no driver.

Shipped is the forward, for a device that has no Python, let alone Triton: the unpruned net whose gates can still be
switched, with float16 maps, float32 logits and mix logits and 2 to 5 tasks. The backward is compiled for its budget
only: training compiles at run time. PTX is of ISA 8.5, which a CUDA 12.5 driver can read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igate_edge.errors import UnavailableError

from . import cubin, manifest

TASKS = (2, 3, 4, 5)
_PARAM = re.compile(r"\.param \.(\w+)")
_TYPES = {"u64": "pointer", "b64": "pointer", "u32": "i32", "b32": "i32"}


@dataclass(frozen=True)
class Layout:
    """How maps lie in memory: planes, or (`last`) pixels with their channels; `unit` divides a row's columns."""

    last: bool
    unit: int

    def block(self, elements: int) -> dict[str, int]:
        """A program's block; channels_last as in gated_select_op: 128 bytes of a row, lanes of 4 bytes."""
        if self.last:
            return {"ROWS": elements // 64, "GROUPS": 32, "LANES": 2}
        return {"ROWS": 1, "GROUPS": 1, "LANES": elements}


#: Maps of any size, those whose planes are a multiple of 8 positions (16 bytes), channels_last with 8 n channels.
LAYOUTS = {"nchw_any": Layout(False, 1), "nchw": Layout(False, 8), "nhwc": Layout(True, 8)}


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that is fixed when it is compiled; `elements` of a map belong to a program."""

    kernel: str
    tasks: int
    layout: str
    elements: int
    warps: int

    @property
    def name(self) -> str:
        """As in the manifest and the budget.

        >>> Variant("select_forward", 2, "nchw", 1024, 4).name
        'gated_select_forward_t2_nchw'
        """
        return f"gated_{self.kernel}_t{self.tasks}_{self.layout}"

    @property
    def shipped(self) -> bool:
        """Whether it goes into the wheel."""
        return self.kernel == "select_forward"

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's arguments that are no run-time ones."""
        layout = LAYOUTS[self.layout]
        fixed = {"step": None, "TASKS": self.tasks, "MIXED": True, "FIXED": False, "QUANTISED": False}
        if self.kernel == "select_backward":
            everything = (1 << self.tasks) - 1
            fixed |= {"GIVEN": everything, "WANT_PHIS": everything}
            fixed |= dict.fromkeys(("WANT_PSI", "WANT_ALPHA", "WANT_BETA"), True)
        return fixed | {"LAST": layout.last, "UNIT": layout.unit, **layout.block(self.elements)}

    @property
    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """Run-time arguments and their types, in order."""
        maps = ("*fp16",) * self.tasks
        kinds: dict[str, str | tuple[str, ...]] = {"psi": "*fp16", "phis": maps}
        if self.kernel == "select_forward":
            kinds |= {"outs": maps, "psi_next": "*fp16"}
        else:
            kinds |= {"grads": maps, "grad_next": "*fp16", "d_psi": "*fp16", "d_phis": maps, "partial": "*fp32"}
        logits = {"alpha": "*fp32", "beta": "*fp32"}
        return kinds | logits | {"rows": "i32", "units": "i32", "channels": "i32"}


def variants() -> list[Variant]:
    """Everything that is built. nchw_any has half the elements: its loads are narrow, more would spill registers."""
    sizes = {"nchw_any": 512, "nchw": 1024, "nhwc": 1024}
    ahead = [Variant("select_forward", t, layout, sizes[layout], 4) for t in TASKS for layout in LAYOUTS]
    return ahead + [Variant("select_backward", 4, layout, 2048, 8) for layout in ("nchw", "nhwc")]


@dataclass(frozen=True)
class Compiled:
    """A variant's code; `hidden`: parameters that Triton adds at the end, a number that changes with its release."""

    variant: Variant
    arch: int
    toolchain: str
    entry: str
    data: bytes
    ptx: str
    dynamic_shared: int
    source: str

    @property
    def kinds(self) -> list[str]:
        """Types of all parameters, from the PTX."""
        entry = self.ptx[self.ptx.index(".entry") : self.ptx.index(".reqntid")]
        return [_TYPES[kind] for kind in _PARAM.findall(entry)]

    @property
    def names(self) -> list[str]:
        """Names of the visible parameters, tuples spread out."""
        spread = [(n, 1 if isinstance(kind, str) else len(kind)) for n, kind in self.variant.signature.items()]
        return [name if count == 1 else f"{name}{t}" for name, count in spread for t in range(count)]

    def describe(self) -> tuple[manifest.Built, cubin.Resources]:
        """What the manifest says, and what the budget looks at."""
        found = cubin.inspect(self.data)[self.entry]
        hidden = len(self.kinds) - len(self.names)
        names = self.names + [f"scratch{index}" for index in range(hidden)]
        variant, layout = self.variant, LAYOUTS[self.variant.layout]
        fixed = {"tasks": variant.tasks, "dtype": "float16", "last": layout.last, "unit": layout.unit}
        built = manifest.Built(
            name=variant.name,
            language="triton",
            file=f"{variant.name}.sm_{self.arch}.cubin",
            ptx=f"{variant.name}.sm_{self.arch}.ptx",
            entry=self.entry,
            arch=f"sm_{self.arch}",
            abi=cubin.header(self.data).abi,
            toolchain=self.toolchain,
            source=self.source,
            sha256=manifest.digest(self.data),
            params=tuple(zip(names, self.kinds, strict=True)),
            hidden=hidden,
            align=16,
            block=(32 * variant.warps, 1, 1),
            dynamic_shared=self.dynamic_shared,
            registers=found.registers,
            stack=found.stack,
            shared=found.shared,
            variant=fixed | layout.block(variant.elements),
        )
        return built, found


def build(arch: int) -> Iterator[Compiled]:
    """Compile all variants for sm_`arch`. Raises UnavailableError without Triton, or when it interprets."""
    what = "Triton's kernels cannot be built"
    try:
        import triton
    except ImportError as error:
        raise UnavailableError(what, "no module named triton", "pip install 'igate-edge[triton]'") from error
    from . import gated_select_triton as device

    if not isinstance(device.select_forward, triton.JITFunction):
        raise UnavailableError(what, "TRITON_INTERPRET is set: Triton interprets", "unset it")
    source = manifest.digest(Path(device.__file__).read_bytes())
    for variant in variants():
        made = _compile(getattr(device, variant.kernel), variant, arch)
        toolchain = f"triton {triton.__version__}"
        data, ptx, shared = made.asm["cubin"], made.asm["ptx"], made.metadata.shared
        yield Compiled(variant, arch, toolchain, made.metadata.name, data, ptx, shared, source)


def _compile(kernel: Any, variant: Variant, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned: list[tuple[int, ...]] = []  # maps start at 16 bytes: without the hint a vector load becomes eight
    for place, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            aligned += [(place, t) for t in range(len(kind))]
        elif kind.startswith("*"):
            aligned.append((place,))
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    options = {"num_warps": variant.warps, "enable_fp_fusion": False, "ptx_version": 85}
    with warnings.catch_warnings(), triton.knobs.compilation.scope():
        warnings.simplefilter("ignore")  # it warns that the default of fp fusion will change; that is set here
        triton.knobs.compilation.disable_line_info = True  # no path of this machine in what is shipped
        source = ASTSource(kernel, signature, variant.constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
