"""What reports hold as JSON types, for `--json` and for the cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def plain_json(value: Any) -> Any:
    """Anything a report holds as JSON types: numpy numbers become numbers, NaN and infinity become null.

    >>> plain_json({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if hasattr(value, "as_json"):
        return plain_json(value.as_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_json(dataclasses.asdict(value))
    return str(value)
