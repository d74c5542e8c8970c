"""A budget of time as the tables name it: a ratio to the plain shared net's time, or milliseconds. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contract import is_number
from ..errors import InputError

#: A measured time may lie this share above a budget and still count as within it: two runs differ by as much.
SLACK = 0.015


@dataclass(frozen=True)
class Goal:
    """Exactly one of `ratio` (above 1, to the plain shared net) and `ms`. Raises InputError.

    >>> Goal(ratio=1.5).name, Goal(ms=3.5).name, Goal(ratio=1.5).text
    ('150', '3.5ms', '1.5x')
    """

    ratio: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.ratio, self.ms) if value is not None]
        if len(given) != 1 or not is_number(given[0]) or not 0 < given[0] < 1e6:
            raise InputError("not a budget", f"ratio {self.ratio}, ms {self.ms}", "give one positive number")
        if self.ratio is not None and self.ratio <= 1:
            evidence = f"{self.ratio:g} times the plain shared net's time"
            raise InputError("nothing is left for specialisation", evidence, "give a ratio above 1")

    @property
    def name(self) -> str:
        """What the units of this budget are called after: per cent of the plain net's time, or milliseconds."""
        return f"{100 * self.ratio:.6g}" if self.ratio is not None else f"{self.ms:g}ms"

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.ratio:g}x" if self.ratio is not None else f"{self.ms:g} ms"

    def settings(self) -> dict[str, Any]:
        """The fields of a TrainConfig that ask for this budget."""
        return {"ratio": self.ratio} if self.ratio is not None else {"ms": self.ms or 0.0}

    def limit(self, plain_ms: float) -> float:
        """The budget in milliseconds, where the plain shared net takes `plain_ms`."""
        return self.ratio * plain_ms if self.ratio is not None else self.ms or 0.0

    def holds(self, ms: float, ratio: float) -> bool:
        """Whether a measured time, and its ratio to the plain net's in the same run, is within the budget."""
        value, most = (ratio, self.ratio) if self.ratio is not None else (ms, self.ms or 0.0)
        return value <= most * (1 + SLACK)


def goals(ratios: tuple[float, ...] = (), ms: tuple[float, ...] = ()) -> tuple[Goal, ...]:
    """Budgets in order of size, each once. Raises InputError for none, or for ratios and milliseconds together."""
    if bool(ratios) == bool(ms):
        evidence = f"ratios {list(ratios)}, milliseconds {list(ms)}"
        raise InputError("budgets are ratios, or milliseconds", evidence, "give one kind")
    made = [Goal(ratio=r) for r in sorted(ratios)] or [Goal(ms=m) for m in sorted(ms)]
    return tuple({goal.name: goal for goal in made}.values())  # a name is a folder: as good as equal is equal


def from_json(data: Mapping[str, Any]) -> Goal:
    """The way back from `settings`."""
    return Goal(ratio=data.get("ratio"), ms=data.get("ms"))
