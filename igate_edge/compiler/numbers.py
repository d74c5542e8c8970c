"""Value numbers: two channels with one number hold the same map. The table behind `channels.analyse`.

Global value numbering (Alpern, Wegman and Zadeck, 1988), one number a channel instead of one a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Ids = np.ndarray  # int64 [C]: the number of every channel

ONE = 0  # the number of the map that is 1.0 everywhere
TOLERANCE = 1e-6  # a single coefficient this close to 1 is 1: float32 softmax weights sum to 1 only so well


class Numbers:
    """Hands out value numbers. A number is a constant, a linear form of other numbers, or an atom (anything else).

    >>> table = Numbers()
    >>> x, y = table.new(2)
    >>> a, b, c = table.combine([{x: 0.25, y: 0.75}, {y: 0.75, x: 0.25}, {x: 1.0}])
    >>> bool(a == b), bool(c == x)
    (True, True)
    """

    def __init__(self) -> None:
        self.count = 1
        self.constants: dict[int, float] = {ONE: 1.0}
        self.forms: dict[int, tuple[tuple[int, float], ...]] = {}
        self.literals: dict[int, np.ndarray] = {}  # constant maps that are not one value everywhere: [N, *spatial]
        self.composed: set[int] = set()  # forms that a node can also make without their atoms
        self._by_constant: dict[float, int] = {1.0: ONE}
        self._tables: dict[Any, dict[Any, int]] = {}
        self._rows: dict[Any, dict[bytes, list[tuple[np.ndarray, int, int]]]] = {}

    def new(self, count: int) -> Ids:
        """`count` numbers that equal nothing else."""
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def constant(self, value: float) -> int:
        """Number of the map that is `value` everywhere."""
        value = float(np.float32(value))
        if value not in self._by_constant:
            number = int(self.new(1)[0])
            self._by_constant[value], self.constants[number] = number, value
        return self._by_constant[value]

    def intern(self, space: Any, keys: Iterable[Any]) -> tuple[Ids, Ids]:
        """Numbers of `keys` within `space`, and the positions of those that are new."""
        table = self._tables.setdefault(space, {})
        ids, fresh, number = [], [], self.count
        for position, key in enumerate(keys):
            found = table.get(key)
            if found is None:
                found = table[key] = number
                fresh.append(position)
                number += 1
            ids.append(found)
        self.count = number
        return np.array(ids, np.int64), np.array(fresh, np.int64)

    def known(self, space: Any, key: Any) -> int | None:
        """The number of a key, if it has one."""
        return self._tables.get(space, {}).get(key)

    def compose(self, forms: Sequence[dict[int, float]]) -> tuple[Ids, Ids]:
        """As `combine`, for a node that makes these forms without their atoms; and the positions that are new."""
        before = self.count
        ids = self.combine(forms)
        born, first = np.unique(ids, return_index=True)
        self.composed.update(born[born >= before].tolist())
        return ids, np.sort(first[born >= before])

    def rows(self, space: Any, weight: np.ndarray) -> tuple[Ids, Ids]:
        """Numbers of the rows of `weight` [O, F] that act on one and the same input, named by `space`.

        A few sampled columns tell rows apart; rows are compared whole only where those agree.
        """
        buckets = self._rows.setdefault(space, {})
        picked = np.unique(np.linspace(0, weight.shape[1] - 1, 8).astype(int))
        samples = np.ascontiguousarray(weight[:, picked])
        ids, fresh = np.empty(len(weight), np.int64), []
        for position in range(len(weight)):
            bucket = buckets.setdefault(samples[position].tobytes(), [])
            for other, row, number in bucket:
                if np.array_equal(other[row], weight[position]):
                    ids[position] = number
                    break
            else:
                ids[position] = self.count
                bucket.append((weight, position, self.count))
                fresh.append(position)
                self.count += 1
        return ids, np.array(fresh, np.int64)

    def terms(self, number: int) -> dict[int, float]:
        """The linear form of a number: {atom: coefficient}."""
        if number in self.constants:
            value = self.constants[number]
            return {ONE: value} if value != 0 else {}
        form = self.forms.get(number)
        return dict(form) if form is not None else {number: 1.0}

    def combine(self, forms: Sequence[dict[int, float]]) -> Ids:
        """Numbers of linear forms; one atom with coefficient 1 is that atom, no atom at all is a constant."""
        ids = np.empty(len(forms), np.int64)
        keys: dict[int, tuple[tuple[int, float], ...]] = {}
        for position, terms in enumerate(forms):
            kept = [(atom, weight) for atom, weight in terms.items() if weight != 0]
            if not kept:
                ids[position] = self.constant(0.0)
            elif len(kept) == 1 and kept[0][0] == ONE:
                ids[position] = self.constant(kept[0][1])
            elif len(kept) == 1 and abs(kept[0][1] - 1.0) <= TOLERANCE:
                ids[position] = kept[0][0]
            else:
                keys[position] = tuple(sorted((atom, float(np.float32(weight))) for atom, weight in kept))
        if keys:
            made, fresh = self.intern("linear", keys.values())
            ids[list(keys)] = made
            wanted = list(keys.values())
            for index in fresh.tolist():
                self.forms[int(made[index])] = wanted[index]
        return ids

    def is_constant(self, ids: Ids) -> np.ndarray:
        """bool, shaped as `ids`: which are one value everywhere."""
        known = np.fromiter(self.constants, np.int64, len(self.constants))
        return np.isin(ids, known)

    def values(self, ids: Sequence[int] | Ids) -> np.ndarray:
        """float32: the values of constant numbers."""
        return np.array([self.constants[int(number)] for number in ids], np.float32)
