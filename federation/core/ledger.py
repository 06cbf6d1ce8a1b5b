"""The shared state of a run: every published value, event and action in one defined order."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from federation.twin import Action, Event, Vector


class Quality(IntEnum):
    """How far a value can be trusted."""

    GOOD = 0
    HELD = 1
    SUBSTITUTED = 2
    STALE = 3


@dataclass(frozen=True, slots=True)
class Record:
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


class Ledger:
    """Puts entries, in whatever order they arrive, into the defined one and hashes them.

    The digest is SHA-256 over all entries by time, micro-step, topological rank and name,
    so it does not depend on when messages arrived.
    """

    def __init__(self) -> None:
        self._waiting: list[Entry] = []
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)

    def settle(self, before_ns: int) -> tuple[Entry, ...]:
        """Commit every entry of a time < `before_ns`; nothing earlier can come any more."""
        ready = [entry for entry in self._waiting if entry.time_ns < before_ns]
        if not ready:
            return ()
        self._waiting = [entry for entry in self._waiting if entry.time_ns >= before_ns]
        ready.sort(key=_sort_key)
        for entry in ready:
            self._hash.update(_canonical(entry))
        self.size += len(ready)
        return tuple(ready)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def digest(self) -> str:
        """The hash over all committed entries, in hexadecimal."""
        return self._hash.hexdigest()


def _sort_key(entry: Entry) -> tuple[int, int, int, int, str]:
    return entry.sort_key()


def _canonical(entry: Entry) -> bytes:
    head = struct.pack("<qii", entry.time_ns, entry.micro, entry.rank)
    match entry:
        case Record():
            text = f"{entry.owner}.{entry.variable}#{entry.revision}/{int(entry.quality)}"
            # -0.0 and 0.0 are the same quantity, and engines differ in which they give
            body = np.ascontiguousarray(entry.value + 0.0, dtype="<f8").tobytes()
        case EventRecord():
            event = entry.event
            text = "|".join((event.id, event.kind, event.entity, *event.causes))
            body = event.text.encode()
        case ActionRecord():
            action = entry.action
            text = f"{action.member}.{action.actuator}.{action.entity}|{action.cause}"
            body = struct.pack("<d", action.value) + entry.refusal.encode()
    return head + text.encode() + b"\0" + body
