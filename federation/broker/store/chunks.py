"""How values lie in a store: packed by variable, checked, and summed up for quick readers."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.core.ledger import Quality, Record
from federation.wire import codec

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Heads = NDArray[np.void]
"""One structured row per value: everything of a `Record` but its vector."""

BYTES = 16000
"""How large a chunk should be: a little less than a page of SQLite, with 4 bytes for each head."""

SHORTEST = 128
"""A chunk isn't cut below so many values only because its vectors are long."""

WIDE = 512
"""A vector of so many numbers or more is worth a chunk, even if it's the only one in it."""

SUMMED = 64
"""A chunk of fewer values has no summary: five rows of it would be no small part of the chunk."""

_HEAD = np.dtype(
    [
        ("number", "<i8"),
        ("receive_ns", "<i8"),
        ("time_ns", "<i8"),
        ("revision", "<i8"),
        ("micro", "<i4"),
        ("rank", "<i4"),
        ("series", "<u4"),
        ("width", "<u4"),
        ("quality", "u1"),
    ]
)
_pack_head = struct.Struct("<qqqqiiIIB").pack
_COUNT = struct.Struct("<I")
_COLUMNS = ("number", "time_ns", "receive_ns", "revision", "micro", "rank", "quality")
_SLOPE = struct.Struct("<Bqq")
_QUALITIES = {int(quality): quality for quality in Quality}


class DamagedError(ValueError):
    """Bytes that are not what was written."""


def seal(*parts: bytes | memoryview) -> bytes:
    """All parts in one, behind their checksum."""
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return b"".join([_COUNT.pack(check), *parts])


def unseal(sealed: bytes) -> memoryview:
    """What was sealed. Raises DamagedError when that is not what was found."""
    data = memoryview(sealed)[_COUNT.size :]
    if len(sealed) < _COUNT.size or _COUNT.unpack_from(sealed)[0] != zlib.crc32(data):
        raise DamagedError(f"its {len(sealed)} bytes don't match their checksum")
    return data


# -- batches: values as they came ----------------------------------------------------------


Value = tuple[int, int, int, Record]
"""`(number, receive_ns, series, record)`."""


def _pack_heads(values: Sequence[Value]) -> bytes:
    return b"".join(
        [
            _pack_head(
                number,
                receive_ns,
                record.time_ns,
                record.revision,
                record.micro,
                record.rank,
                series,
                record.value.size,
                record.quality,
            )
            for number, receive_ns, series, record in values
        ]
    )


def pack_batch(values: Sequence[Value]) -> bytes:
    """Values in the order of the ledger, sealed."""
    vectors = [codec.encode_vector(record.value) for *_, record in values]
    return seal(_COUNT.pack(len(values)), _pack_heads(values), b"".join(vectors))


def unpack_batches(batches: Iterable[bytes]) -> tuple[Heads, Floats]:
    """The heads of all values of these batches and their vectors, one after another."""
    heads: list[Heads] = [np.empty(0, _HEAD)]
    vectors: list[Floats] = [np.empty(0)]
    for sealed in batches:
        data = unseal(sealed)
        (count,) = _COUNT.unpack_from(data)
        heads.append(np.frombuffer(data, _HEAD, count, _COUNT.size))
        vectors.append(np.frombuffer(data, "<f8", offset=_COUNT.size + count * _HEAD.itemsize))
    return np.concatenate(heads), np.concatenate(vectors)


def _starts(heads: Heads) -> Ints:
    """Where each vector begins among those of `unpack_batches`."""
    widths = heads["width"].astype(np.int64)
    return np.cumsum(widths) - widths


# -- chunks: values of one variable ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """Values of one variable in the order of the ledger; a row of `vectors` for each head."""

    heads: Heads
    vectors: Floats

    @property
    def series(self) -> int:
        return int(self.heads["series"][0])

    def records(self, owner: str, variable: str) -> Iterator[tuple[int, int, Record]]:
        """`(number, receive_ns, record)` of every value."""
        columns = (self.heads[name].tolist() for name in _COLUMNS)
        for number, time_ns, receive_ns, revision, micro, rank, quality, vector in zip(
            *columns, self.vectors, strict=True
        ):
            record = Record(
                time_ns, micro, rank, owner, variable, revision, vector, _QUALITIES[quality]
            )
            yield number, receive_ns, record

    def only(self, wanted: slice) -> Chunk:
        """Only the values that are wanted, without holding on to the others."""
        return Chunk(self.heads[wanted].copy(), _frozen(self.vectors[wanted].copy()))

    def packed(self) -> bytes:
        """All of it but the series, sealed."""
        heads = [_pack_ints(self.heads[name].astype(np.int64)) for name in _COLUMNS]
        vectors = np.ascontiguousarray(self.vectors, "<f8").reshape(-1).data
        return seal(_COUNT.pack(len(self.heads)), *heads, vectors.cast("B"))


def unpack_chunk(sealed: bytes, series: int, width: int) -> Chunk:
    data = unseal(sealed)
    (count,) = _COUNT.unpack_from(data)
    place = _COUNT.size
    heads = np.empty(count, _HEAD)
    for name in _COLUMNS:
        heads[name], place = _unpack_ints(data, place, count)
    heads["series"], heads["width"] = series, width
    vectors = np.frombuffer(data, "<f8", offset=place).astype(np.float64, copy=False)
    if len(vectors) != count * width:
        raise DamagedError(f"it has {len(vectors)} numbers where {count} times {width} belong")
    return Chunk(heads, vectors.reshape(count, width))


def split(heads: Heads, vectors: Floats, wanted: NDArray[np.bool_] | None = None) -> list[Chunk]:
    """Values as `unpack_batches` gives them, all or some, sorted into chunks of their variables."""
    starts = _starts(heads)
    order = np.argsort(heads["series"], kind="stable")
    if wanted is not None:
        order = order[wanted[order]]
    heads, starts = heads[order], starts[order]
    series, widths = heads["series"], heads["width"]
    cuts = np.flatnonzero((np.diff(series) != 0) | (np.diff(widths) != 0)) + 1
    found = []
    for first, end in zip([0, *cuts], [*cuts, len(heads)], strict=True):
        if first == end:
            continue
        width = int(widths[first])
        longest = max(SHORTEST, BYTES // (8 * width + 4))
        columns = np.arange(width)
        for low in range(first, end, longest):
            high = min(low + longest, end)
            rows = vectors[starts[low:high, None] + columns]
            found.append(Chunk(heads[low:high], _frozen(rows)))
    return found


def of_each(values: Sequence[Value]) -> list[Chunk]:
    """A chunk of each variable's values, however many there are."""
    of: dict[int, list[Value]] = {}
    for value in values:
        of.setdefault(value[2], []).append(value)
    parts = [
        list(part)
        for series in of.values()
        for _, part in itertools.groupby(series, lambda value: value[3].value.size)
    ]
    return [
        Chunk(
            np.frombuffer(_pack_heads(part), _HEAD),
            np.stack([record.value for *_, record in part]),
        )
        for part in parts
    ]


def _frozen(vectors: Floats) -> Floats:
    vectors.flags.writeable = False
    return vectors


def _pack_ints(values: Ints) -> bytes:
    """A straight line is its start and slope; else a byte to eight for each step beside it.

    The steps are taken modulo 2^64, so any values come back.
    """
    steps = np.diff(values.view(np.uint64)).view(np.int64)
    least = int(steps.min()) if len(steps) else 0
    rest = (steps - np.int64(least)).view(np.uint64)
    most = int(rest.max()) if len(rest) else 0
    size = 0 if most == 0 else next(size for size in (1, 2, 4, 8) if most < 1 << (8 * size))
    line = _SLOPE.pack(size, int(values[0]), least)
    return line if size == 0 else line + rest.astype(f"<u{size}").tobytes()


def _unpack_ints(data: memoryview, place: int, count: int) -> tuple[Ints, int]:
    size, first, least = _SLOPE.unpack_from(data, place)
    place += _SLOPE.size
    steps = np.full(count, least, np.int64).view(np.uint64)
    steps[0] = np.int64(first).view(np.uint64)
    if size:
        steps[1:] += np.frombuffer(data, f"<u{size}", count - 1, place)
        place += size * (count - 1)
    return np.cumsum(steps, dtype=np.uint64).view(np.int64), place


# -- summaries -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A variable over time in a few buckets of equal length; those without a value are left out.

    Bucket i is about the values from `start_ns[i]` up to and including `end_ns[i]`, `count[i]`
    of them. The other arrays have a row per bucket and a column per entity: the first and the
    last value in the order of the ledger, the lowest, the highest, and the plain mean of the
    values (each revision counts once, however long it was in force).
    """

    start_ns: Ints
    end_ns: Ints
    count: Ints
    first: Floats
    last: Floats
    low: Floats
    high: Floats
    mean: Floats


def summary(vectors: Floats) -> bytes:
    """First, last, lowest, highest and total of each column, sealed."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = vectors.sum(axis=0)
    rows = (vectors[0], vectors[-1], vectors.min(axis=0), vectors.max(axis=0), total)
    return seal(np.stack(rows).astype("<f8", copy=False).tobytes())


class Parts:
    """Parts of one variable's history that fall into one bucket each, and then the buckets.

    Bucket 0 begins at `start_ns`, each is `width_ns` long, and the last may end early, at
    `end_ns`. A part has the number of its first value in the ledger, by which parts of a bucket
    are put in order.
    """

    def __init__(self, start_ns: int, end_ns: int, width_ns: int, entity: int | None) -> None:
        self._start_ns, self._end_ns, self._width_ns = start_ns, end_ns, width_ns
        self._columns = slice(None) if entity is None else slice(entity, entity + 1)
        self._found: list[tuple[Ints, Ints, Ints, Floats]] = []

    def add_whole(self, rows: Sequence[tuple[int, int, int, int, bytes]]) -> None:
        """Chunks that fall into one bucket: `(bucket, number, amount, width, summary)`."""
        if not rows:
            return
        bucket, number, amount, widths, sealed = zip(*rows, strict=True)
        flat = np.frombuffer(b"".join([unseal(data) for data in sealed]), "<f8")
        if len(set(widths)) > 1:
            raise DamagedError(f"its vectors have the lengths {sorted(set(widths))}")
        sums = flat.astype(np.float64, copy=False).reshape(len(rows), 5, widths[0])
        sums = sums[:, :, self._columns]
        self._add(np.array(bucket), np.array(number), np.array(amount), sums)

    def add_chunks(self, rows: Sequence[tuple[bytes, int]]) -> None:
        """Chunks of which each value must be looked at: `(packed chunk, width)`."""
        if rows:
            self._cut([_unpack_times(data, width) for data, width in rows])

    def add_batches(self, batches: Sequence[bytes], series: int) -> None:
        heads, vectors = unpack_batches(batches)
        self._cut(
            [
                (chunk.heads["number"], chunk.heads["time_ns"], chunk.vectors)
                for chunk in split(heads, vectors, heads["series"] == series)
            ]
        )

    def _cut(self, rows: Sequence[tuple[Ints, Ints, Floats]]) -> None:
        """Sum up neighbours in one row and one bucket."""
        if not rows:
            return
        # between two of these others may come
        row = np.repeat(np.arange(len(rows)), [len(number) for number, _, _ in rows])
        number, time_ns, vectors = (np.concatenate(column) for column in zip(*rows, strict=True))
        inside = (time_ns >= self._start_ns) & (time_ns <= self._end_ns)
        if not inside.all():
            row, number, time_ns = row[inside], number[inside], time_ns[inside]
            vectors = vectors[inside]
        # the difference of two instants may need all 64 bits
        since = time_ns.view(np.uint64) - np.uint64(self._start_ns % (1 << 64))
        bucket = (since // np.uint64(min(self._width_ns, (1 << 64) - 1))).astype(np.int64)
        changes = (np.diff(bucket, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0)
        starts = np.flatnonzero(changes)
        amount = np.diff(starts, append=len(bucket))
        vectors = vectors[:, self._columns]
        sums = np.stack(_reduced(starts, *((vectors,) * 5)), axis=1)
        self._add(bucket[starts], number[starts], amount, sums)

    def _add(self, bucket: Ints, number: Ints, amount: Ints, sums: Floats) -> None:
        self._found.append((bucket, number, amount, sums))

    def gathered(self) -> Outline:
        """The buckets that have values."""
        found = self._found or [(np.empty(0, np.int64),) * 3 + (np.empty((0, 5, 0)),)]
        bucket, number, amount, sums = (np.concatenate(c) for c in zip(*found, strict=True))
        order = np.lexsort((number, bucket))
        bucket, amount, sums = bucket[order], amount[order], sums[order]
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        count = np.add.reduceat(amount, starts) if len(starts) else amount
        first, last, low, high, total = _reduced(starts, *(sums[:, row] for row in range(5)))
        begin = [self._start_ns + int(b) * self._width_ns for b in bucket[starts]]
        return Outline(
            np.array(begin, np.int64),
            np.array([min(b + self._width_ns - 1, self._end_ns) for b in begin], np.int64),
            count,
            first,
            last,
            low,
            high,
            total / count[:, None],
        )


def _unpack_times(sealed: bytes, width: int) -> tuple[Ints, Ints, Floats]:
    """The numbers, times and vectors of a packed chunk."""
    data = unseal(sealed)
    (count,) = _COUNT.unpack_from(data)
    number, place = _unpack_ints(data, _COUNT.size, count)
    time_ns, _ = _unpack_ints(data, place, count)
    vectors = np.frombuffer(data, "<f8", offset=len(data) - 8 * count * width)
    return number, time_ns, vectors.astype(np.float64, copy=False).reshape(count, width)


def _reduced(
    starts: Ints, first: Floats, last: Floats, low: Floats, high: Floats, total: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The five over the rows from each of `starts` up to the next."""
    if not len(starts):
        return first[:0], last[:0], low[:0], high[:0], total[:0]
    ends = np.append(starts[1:], len(first)) - 1
    with np.errstate(invalid="ignore", over="ignore"):
        return (
            first[starts],
            last[ends],
            np.minimum.reduceat(low, starts, axis=0),
            np.maximum.reduceat(high, starts, axis=0),
            np.add.reduceat(total, starts, axis=0),
        )
