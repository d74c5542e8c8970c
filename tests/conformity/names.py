"""What a program calls of a module, as mypy sees it: ("tensorrt.IBuilderConfig", "set_memory_pool_limit"), ...

Run as a program: names.py FILE NAME MODULE, with the stubs of MODULE on MYPYPATH; prints JSON of errors and names.
"""

from __future__ import annotations

import json
import sys

from mypy import build, types
from mypy.modulefinder import BuildSource
from mypy.nodes import Expression, MemberExpr, MypyFile, RefExpr
from mypy.options import Options


def looked_up(owner: types.Type | None) -> list[str]:
    """The classes that an attribute is looked up in: the alternatives of a union, the class of a class."""
    owner = types.get_proper_type(owner) if owner is not None else None
    if isinstance(owner, types.UnionType):
        return [name for item in owner.items for name in looked_up(item)]
    if isinstance(owner, types.Instance):
        return [owner.type.fullname]
    if isinstance(owner, types.CallableType) and owner.is_type_obj():
        return [owner.type_object().fullname]
    return []


def names(found: dict[Expression, types.Type], module: str) -> set[tuple[str, str]]:
    """(class or module, attribute) of everything below `module` that is looked up."""
    seen = set()
    for expression in found:
        if not isinstance(expression, MemberExpr):
            continue
        base = expression.expr
        if isinstance(base, RefExpr) and isinstance(base.node, MypyFile):
            owners = [base.node.fullname]
        else:
            owners = looked_up(found.get(base))
        seen.update((owner, expression.name) for owner in owners if owner.split(".")[0] == module)
    return seen


def main(path: str, name: str, module: str) -> None:
    options = Options()
    options.export_types = options.preserve_asts = True
    options.check_untyped_defs = options.disallow_untyped_defs = True
    # Stubs are read all the same; our own package would pull in everything that it knows.
    options.ignore_missing_imports, options.follow_imports = True, "skip"
    options.incremental, options.fine_grained_incremental = False, False
    # Of the stubs only names and signatures count; what they say of themselves is stubgen's affair.
    options.per_module_options = {f"{module}.*": {"ignore_errors": True}, module: {"ignore_errors": True}}
    made = build.build([BuildSource(path, name, None)], options)
    print(json.dumps({"errors": made.errors, "names": sorted(names(made.types, module))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
