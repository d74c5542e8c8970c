"""Tables of numbers, made once and shown twice: in the terminal (rich) and in the HTML report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Grid:
    """A titled table; the first `text_columns` columns are words, the others numbers; `strong` rows are emphasised."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    note: str = ""
    strong: frozenset[int] = field(default_factory=frozenset)

    def html(self) -> str:
        """The table as HTML, everything escaped; scrolls sideways on a narrow screen."""
        kinds = ["t" if k < self.text_columns else "n" for k in range(len(self.columns))]
        head = "".join(f'<th class="{k}">{html.escape(c)}</th>' for k, c in zip(kinds, self.columns, strict=True))
        body = []
        for number, row in enumerate(self.rows):
            cells = "".join(f'<td class="{k}">{html.escape(str(c))}</td>' for k, c in zip(kinds, row, strict=True))
            body.append(f"<tr{' class=strong' if number in self.strong else ''}>{cells}</tr>")
        caption = f"<h3>{html.escape(self.title)}</h3>" if self.title else ""
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f'{caption}<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>{note}'

    def rich(self) -> Group:
        """The same table for the terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(self.columns))
        for number, name in enumerate(self.columns):
            words = number < self.text_columns
            width = min(12, max((len(str(row[number])) for row in self.rows), default=0)) if words else None
            table.add_column(
                Text(name), justify="left" if words else "right", header_style="dim", no_wrap=not words, min_width=width
            )
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(str(cell)) for cell in row), style="bold" if number in self.strong else "")
        title = [Text(self.title, style="bold")] if self.title else []
        return Group(*title, table, *([Text(self.note, style="dim")] if self.note else []))


def number(value: Any, digits: int = 3) -> str:
    """A number with about `digits` significant digits; "-" for what is absent or not finite.

    >>> number(0.123456), number(1234.5), number(0.00000123), number(None)
    ('0.123', '1,234', '1e-06', '-')
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.0e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(value: Any, digits: int = 0) -> str:
    """A share as per cent.

    >>> percent(0.256), percent(float("nan"))
    ('26 %', '-')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{100 * value:.{digits}f} %"


def signed_percent(value: Any) -> str:
    """A change that is already in per cent, with its sign.

    >>> signed_percent(1.24)
    '+1.2 %'
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:+.1f} %"


def times(value: Any) -> str:
    """A ratio.

    >>> times(2.5)
    '2.50x'
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.2f}x"


def count(value: Any) -> str:
    """A large count in millions or thousands.

    >>> count(11_180_000), count(9_300), count(12)
    ('11.2 M', '9.30 k', '12')
    """
    if not isinstance(value, int | float):
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:g}"


def size_of(byte_count: int) -> str:
    """Bytes in MB or kB (powers of ten, as file managers show).

    >>> size_of(2_500_000)
    '2.5 MB'
    """
    return f"{byte_count / 1e6:.1f} MB" if byte_count >= 1_000_000 else f"{byte_count / 1e3:.1f} kB"


def sentence_list(items: Sequence[str]) -> str:
    """Words joined as in a sentence.

    >>> sentence_list(["semseg", "depth", "normals"])
    'semseg, depth and normals'
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def flat(value: Any) -> str:
    """A value of a manifest on one line: digests cut short, empty parts left out.

    >>> flat({"count": 3, "of": ["a", 0.25], "warnings": [], "sha256": "0123456789abcdef" * 4})
    'count 3, of a, 0.250, sha256 0123456789ab'
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        parts = ((key, flat(item)) for key, item in value.items())
        return ", ".join(f"{str(key).replace('_', ' ')} {text}" for key, text in parts if text)
    if isinstance(value, list | tuple):
        return ", ".join(flat(item) for item in value)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    return number(value) if isinstance(value, float) else str(value)


def budget_line(budget: Any) -> str:
    """A manifest's budget on one line: what was asked, what the engine took, where; others as `flat` puts them.

    >>> budget_line({"kind": "Budget", "ratio": 1.34, "measured_ratio": 1.307, "device": {"cpu": "AMD EPYC"}})
    '1.34 times the plain shared net: 1.31 measured when it was trained, on AMD EPYC'
    """
    if not isinstance(budget, dict) or budget.get("kind") != "Budget":
        return flat(budget)
    key = "ratio" if budget.get("ratio") is not None else "ms"
    said = "{} times the plain shared net" if key == "ratio" else "{} ms"
    found = [(word, budget.get(f"{word}_{key}")) for word in ("measured", "predicted")]
    words = [f"{number(value)} {word}" for word, value in found if isinstance(value, float)]
    device = budget.get("device")
    cpu = device.get("cpu") if isinstance(device, dict) else None
    place = f" when it was trained, on {cpu}" if words and cpu else ""
    return said.format(flat(budget.get(key))) + (f": {', '.join(words)}{place}" if words else "")
