"""What the streams of a gated net see of one tensor of live values, and how selection, mix and reordering change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = tuple[int, int] | None  # (stream, channel) that a physical channel holds; None: nobody reads it


@dataclass(frozen=True)
class Reading:
    """One stream's channels as sums of few physical ones: channel c = sum over k of weights[c, k] * x[columns[c, k]].

    columns int64, weights float64, both [C, K]. A channel that is one physical channel as it is (a pick) has weight 1
    in front and 0 behind; a mix has weights between 0 and 1; one that nobody reads has zeros.
    """

    columns: Tensor
    weights: Tensor

    @property
    def picks(self) -> Tensor:
        """Which channels are one physical channel, unscaled; bool [C]."""
        return self.weights[:, 0] == 1

    def rows(self, channels: Tensor | Sequence[int]) -> Reading:
        """Some of the channels, in this order."""
        return Reading(self.columns[channels], self.weights[channels])

    def only(self, live: Tensor) -> Reading:
        """The same, with zeros where `live` is False."""
        return Reading(self.columns, self.weights * live[:, None])

    def is_identity(self, width: int) -> bool:
        """True when channel c is physical channel c, and there are no others."""
        return len(self.columns) == width and bool(self.picks.all()) and _counts_up(self.columns[:, 0])

    def used(self, width: int) -> Tensor:
        """Physical channels that some channel reads; bool [width]."""
        mask = torch.zeros(width, dtype=torch.bool)
        mask[self.columns[self.weights != 0]] = True
        return mask

    def fold(self, weight: Tensor, width: int) -> Tensor:
        """A convolution's weight [O, C, kh, kw] as one [O, width, kh, kw] that reads the physical channels."""
        made = weight.new_zeros(weight.shape[0], width, *weight.shape[2:])
        for columns, factors in zip(self.columns.T, self.weights.T, strict=True):
            made.index_add_(1, columns, weight * factors[None, :, None, None])
        return made

    def matrix(self, width: int) -> Tensor:
        """The same as a matrix [C, width], float64."""
        eye = torch.eye(len(self.columns), dtype=torch.float64)
        return self.fold(eye[:, :, None, None], width)[:, :, 0, 0]


@dataclass(frozen=True)
class Layout:
    """One value: its number of physical channels, and what each stream that somebody reads sees of them."""

    width: int
    streams: Mapping[int, Reading]


def identity(channels: int, streams: int) -> Layout:
    """All streams are the value as it is."""
    reading = Reading(torch.arange(channels)[:, None], torch.ones(channels, 1, dtype=torch.float64))
    return Layout(channels, dict.fromkeys(range(streams), reading))


def of_rows(rows: Sequence[Row], channels: int, streams: Sequence[int]) -> Layout:
    """Physical channel k is rows[k]."""
    made = {}
    for stream in streams:
        places, mine = rows_of(rows, stream)
        columns, weights = torch.zeros(channels, 1, dtype=torch.int64), torch.zeros(channels, 1, dtype=torch.float64)
        columns[mine, 0], weights[mine] = torch.tensor(places, dtype=torch.int64), 1.0
        made[stream] = Reading(columns, weights)
    return Layout(len(rows), made)


def owners(layout: Layout, mask: Tensor) -> list[Row]:
    """The row that each physical channel behind a site holds; mask: bool [T, C], the site's gates."""
    tasks = len(mask)
    found: list[Row] = [None] * layout.width
    for task in range(tasks):
        reading = layout.streams[task]
        for channel in reading.picks.nonzero().flatten().tolist():
            found[int(reading.columns[channel, 0])] = (task if mask[task, channel] else tasks, channel)
    return found


def runs(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Rows as (stream, first channel, count) of neighbours; rows of nobody have stream -1.

    >>> runs([(3, 0), (3, 1), (3, 4), (0, 2), None])
    [(3, 0, 2), (3, 4, 1), (0, 2, 1), (-1, 0, 1)]
    """
    found: list[tuple[int, int, int]] = []
    for row in rows:
        stream, channel = row or (-1, 0)
        if found:
            last, first, count = found[-1]
            if stream == last and (row is None or channel == first + count):
                found[-1] = (last, first, count + 1)
                continue
        found.append((stream, channel, 1))
    return found


def rows_of(rows: Sequence[Row], stream: int) -> tuple[list[int], list[int]]:
    """Places of a stream's rows, and their channels."""
    found = [(place, row[1]) for place, row in enumerate(rows) if row is not None and row[0] == stream]
    return [place for place, _ in found], [channel for _, channel in found]


def side_by_side(parts: Sequence[Layout], streams: Sequence[int]) -> Layout:
    """Layout of a concatenation."""
    starts = [sum(part.width for part in parts[:k]) for k in range(len(parts))]
    made = {}
    for stream in streams:
        terms = _same_width([part.streams[stream] for part in parts])
        columns = torch.cat([term.columns + start for term, start in zip(terms, starts, strict=True)])
        made[stream] = Reading(columns, torch.cat([term.weights for term in terms]))
    return Layout(sum(part.width for part in parts), made)


def behind_site(layout: Layout, mask: Tensor, weights: Tensor) -> Layout:
    """Selection, then the mix: mask bool [T, C], weights [T, C]. What nobody opened is the shared channel, unmixed."""
    tasks, channels = mask.shape
    none = Reading(torch.zeros(channels, 1, dtype=torch.int64), torch.zeros(channels, 1, dtype=torch.float64))
    *own, shared = _same_width([layout.streams.get(stream, none) for stream in range(tasks + 1)])
    chosen = [_where(mask[t], own[t], shared) for t in range(tasks)]
    columns = torch.cat([reading.columns for reading in chosen], 1)
    mixed = torch.cat([reading.weights * weights[t][:, None] for t, reading in enumerate(chosen)], 1)
    behind = _where(mask.any(0), *_same_width([_tidy(Reading(columns, mixed)), shared]))
    return Layout(layout.width, {**{t: _tidy(reading) for t, reading in enumerate(chosen)}, tasks: _tidy(behind)})


def _where(mask: Tensor, one: Reading, other: Reading) -> Reading:
    choose = mask[:, None]
    return Reading(torch.where(choose, one.columns, other.columns), torch.where(choose, one.weights, other.weights))


def _tidy(reading: Reading) -> Reading:
    """A sum whose terms are all one physical channel becomes a pick of it; terms that no channel needs are dropped."""
    columns, weights = reading.columns.clone(), reading.weights.clone()
    used = weights != 0
    first = columns.gather(1, used.int().argmax(1, keepdim=True))
    alike = ((columns == first) | ~used).all(1) & used.any(1)
    columns[alike] = first[alike]
    weights[alike] = 0.0
    weights[alike, 0] = 1.0
    needed = (weights != 0).any(0).nonzero().flatten().tolist()
    terms = 1 + max(needed, default=0)
    return Reading(columns[:, :terms], weights[:, :terms])


def _same_width(readings: Sequence[Reading]) -> list[Reading]:
    """Readings of as many terms each, padded with zeros."""
    terms = max(reading.columns.shape[1] for reading in readings)
    pad = torch.nn.functional.pad
    return [
        Reading(*(pad(part, (0, terms - part.shape[1])) for part in (reading.columns, reading.weights)))
        for reading in readings
    ]


def order_of(layout: Layout, rows: Sequence[Row]) -> tuple[Row, ...] | None:
    """The layout's channels as rows, if each of `rows` is one of them, unscaled, and no two are the same."""
    found: list[Row] = [None] * layout.width
    for stream, reading in layout.streams.items():
        _, channels = rows_of(rows, stream)
        picked = reading.rows(channels)
        if not bool(picked.picks.all()):
            return None
        for channel, column in zip(channels, picked.columns[:, 0].tolist(), strict=True):
            if found[column] is not None:
                return None
            found[column] = (stream, channel)
    return tuple(found)


def stack(layout: Layout, rows: Sequence[Row]) -> Reading:
    """These rows as readings of the layout's channels; rows of nobody are zero."""
    readings = dict(zip(layout.streams, _same_width(list(layout.streams.values())), strict=True))
    terms = next(iter(readings.values())).columns.shape[1]
    columns = torch.zeros(len(rows), terms, dtype=torch.int64)
    weights = torch.zeros(len(rows), terms, dtype=torch.float64)
    for stream, reading in readings.items():
        places, channels = rows_of(rows, stream)
        columns[places], weights[places] = reading.columns[channels], reading.weights[channels]
    return Reading(columns, weights)


def fits(layout: Layout, rows: Sequence[Row]) -> bool:
    """True when physical channel k of the layout is row k wherever somebody reads it."""
    if layout.width != len(rows):
        return False
    read = [place for place, row in enumerate(rows) if row is not None]
    made = stack(layout, rows).rows(read)
    return bool(made.picks.all()) and made.columns[:, 0].tolist() == read


def materialise(layout: Layout, live: Mapping[int, Tensor]) -> tuple[Reading, Layout]:
    """What makes every live channel of every stream a physical one, once, and the layout behind it.

    Channels that are there already keep their order and come first, mixes behind them.
    """
    readings = _same_width([layout.streams[stream].only(rows) for stream, rows in live.items()])
    wanted = [reading.rows(rows.nonzero().flatten()) for reading, rows in zip(readings, live.values(), strict=True)]
    columns, weights = (torch.cat([getattr(part, name) for part in wanted]) for name in ("columns", "weights"))
    # Columns of unused terms are set to 0: equal channels then have equal entries.
    table = torch.cat([torch.where(weights != 0, columns, 0).double(), weights], 1)
    distinct, number = torch.unique(table, dim=0, return_inverse=True)
    terms = columns.shape[1]
    found = Reading(distinct[:, :terms].long(), distinct[:, terms:])
    order = (found.columns[:, 0] + layout.width * ~found.picks).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    made, start = {}, 0
    for stream, rows in live.items():
        where = rows.nonzero().flatten()
        behind = Reading(torch.zeros(len(rows), 1, dtype=torch.int64), torch.zeros(len(rows), 1, dtype=torch.float64))
        behind.columns[where, 0] = place[number[start : start + len(where)]]
        behind.weights[where] = 1.0
        made[stream], start = behind, start + len(where)
    return found.rows(order), Layout(len(order), made)


def _counts_up(columns: Tensor) -> bool:
    return torch.equal(columns, torch.arange(len(columns)))
