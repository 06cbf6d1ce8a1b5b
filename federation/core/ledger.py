"""The shared state of a run: every published value, event and action in one defined order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from federation.twin import Action, Event, Vector, plain_zeros


class Quality(IntEnum):
    """How far a value can be trusted."""

    GOOD = 0
    HELD = 1
    SUBSTITUTED = 2
    STALE = 3


class Record(NamedTuple):
    """One revision of one shared variable; `owner` is the only member that may write it."""

    time_ns: int
    micro: int
    rank: int
    owner: str
    variable: str
    revision: int
    value: Vector
    quality: Quality = Quality.GOOD

    def sort_key(self) -> tuple[int, int, int, int, str]:
        return (self.time_ns, self.micro, self.rank, 0, self.variable)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event with, per foreign cause, the coupling through which it came."""

    time_ns: int
    micro: int
    rank: int
    owner: str
    event: Event
    via: tuple[tuple[str, str], ...]
    """`(cause id, coupling name)` for every cause that another member reported."""

    def sort_key(self) -> tuple[int, int, int, int, str]:
        return (self.time_ns, self.micro, self.rank, 1, _serial(self.event.id))


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """An action as the envelope let it through, or refused it with a reason."""

    time_ns: int
    micro: int
    rank: int
    owner: str
    action: Action
    refusal: str = ""

    def sort_key(self) -> tuple[int, int, int, int, str]:
        action = self.action
        return (
            self.time_ns,
            self.micro,
            self.rank,
            2,
            f"{action.member}.{action.actuator}.{action.entity}",
        )


Entry = Record | EventRecord | ActionRecord


def _serial(event_id: str) -> str:
    return event_id.rpartition("/")[2].rjust(12, "0")


_INSTANT = struct.Struct("<qi")
_HEAD = struct.Struct("<iBBI")
_VALUE = struct.Struct("<d")

HASH_BYTES = 1 << 16
"""How much to gather before it is hashed; a matter of speed only."""


def _head(rank: int, kind: int, quality: int, size: int, text: str) -> bytes:
    name = text.encode()
    return _HEAD.pack(rank, kind, quality, len(name)) + name + _SIZE.pack(size)


_SIZE = struct.Struct("<Q")


def record_head(rank: int, owner: str, variable: str, size: int, quality: Quality) -> bytes:
    """What stands in the hash before the values of a record; the same for all its revisions."""
    return _head(rank, 0, int(quality), 8 * size, f"{owner}.{variable}")


class Ledger:
    """Puts entries, in whatever order they arrive, into the defined one and hashes them.

    The order is by time, unit (a member, or all members of a loop), micro-step, topological
    rank and name, so that nothing stands before its cause; `leads` says of the ranks in loops
    which is the lowest of the loop. The digest is SHA-256 over all entries and does not depend
    on when messages arrived. Hashed are, little-endian: before the first
    entry of each micro-step its time (int64) and number (int32); of every entry its rank
    (int32), kind and quality (bytes), the length of its name (uint32), the name, the length of
    its body (uint64) and the body. The body of a record are its values; its revision is the
    number of records of its name so far, and so needs no place.
    """

    def __init__(self, leads: Mapping[int, int]) -> None:
        self.leads = leads
        self._waiting: list[_Waiting] = []
        self._serial = 0
        self._hash = hashlib.sha256()
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._now = (-1, -1)
        self._heads: dict[tuple[int, str, str, Quality], bytes] = {}
        self._is_hashed = True
        self.size = 0

    def fork(self, hashes: bool) -> Ledger:
        """Another that stands where this one does; without `hashes` it never has a digest."""
        other = Ledger(self.leads)
        other._waiting = list(self._waiting)
        other._serial, other._now, other.size = self._serial, self._now, self.size
        other._heads = self._heads
        other._is_hashed = hashes
        if hashes:
            other._hash = self._hash.copy()
            other._parts, other._parts_bytes = list(self._parts), self._parts_bytes
        return other

    def add(self, entry: Entry, data: bytes | None = None) -> None:
        """Take an entry of any instant that is not settled.

        `data` are the bytes of a record's value where they are known.
        """
        self._serial += 1
        if isinstance(entry, Record):
            if data is None:
                data = plain_zeros(entry.value).tobytes()
            key = (entry.micro, entry.rank, 0, entry.variable)
        else:
            data = b""
            key = entry.sort_key()[1:]
        unit = self.leads.get(entry.rank, entry.rank)
        self._waiting.append((entry.time_ns, unit, key, self._serial, entry, data))

    def settle(self, before_ns: int) -> tuple[Entry, ...]:
        """Commit every entry of a time < `before_ns`; nothing earlier can come any more."""
        ready = [waiting for waiting in self._waiting if waiting[0] < before_ns]
        if not ready:
            return ()
        if len(ready) == len(self._waiting):
            self._waiting = []
        else:
            self._waiting = [waiting for waiting in self._waiting if waiting[0] >= before_ns]
        ready.sort()
        entries = []
        parts: list[bytes] = []
        now = self._now
        for time_ns, _, _, _, entry, data in ready:
            if now != (time_ns, entry.micro):
                now = (time_ns, entry.micro)
                parts.append(_INSTANT.pack(*now))
            if isinstance(entry, Record):
                parts.append(self._record_head(entry))
                parts.append(data)
            else:
                parts.append(_story(entry))
            entries.append(entry)
        self._now = now
        self._gather(parts, sum(map(len, parts)))
        self.size += len(ready)
        return tuple(entries)

    def commit(self, time_ns: int, heads_and_values: list[bytes], size_bytes: int) -> None:
        """Commit records of micro-step 0 whose place is known to be here.

        The list holds the `record_head` and the bytes of the value of each, in turn, and
        together `size_bytes`. Who calls this answers for the order.
        """
        if self._now != (time_ns, 0):
            self._now = (time_ns, 0)
            if self._is_hashed:
                self._parts.append(_INSTANT.pack(time_ns, 0))
        self.size += len(heads_and_values) >> 1
        self._gather(heads_and_values, size_bytes)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def digest(self) -> str:
        """The hash over all committed entries, in hexadecimal; "" of a fork without hashes."""
        if not self._is_hashed:
            return ""
        self._flush()
        return self._hash.hexdigest()

    def _record_head(self, record: Record) -> bytes:
        key = (record.rank, record.owner, record.variable, record.quality)
        head = self._heads.get(key)
        if head is None:
            size = len(record.value)
            head = record_head(record.rank, record.owner, record.variable, size, record.quality)
            self._heads[key] = head
        return head

    def _gather(self, parts: list[bytes], size_bytes: int) -> None:
        if not self._is_hashed:
            return
        self._parts += parts
        self._parts_bytes += size_bytes
        if self._parts_bytes >= HASH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(b"".join(self._parts))
        self._parts.clear()
        self._parts_bytes = 0


_Waiting = tuple[int, int, tuple[int, int, int, str], int, Entry, bytes]
"""Time, unit, order within it, serial number (so that no two compare equal), entry, bytes of a
record's value."""


def _story(entry: EventRecord | ActionRecord) -> bytes:
    if isinstance(entry, EventRecord):
        event = entry.event
        text = "|".join((event.id, event.kind, event.entity, *event.causes))
        body = event.text.encode()
        return _head(entry.rank, 1, 0, len(body), text) + body
    action = entry.action
    text = f"{action.member}.{action.actuator}.{action.entity}|{action.cause}"
    body = _VALUE.pack(action.value) + entry.refusal.encode()
    return _head(entry.rank, 2, 0, len(body), text) + body
