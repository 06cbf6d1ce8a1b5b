"""What a store keeps, and the rows in which a database holds it."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

from federation.broker.store import chunks
from federation.core.ledger import ActionRecord, Entry, EventRecord
from federation.errors import FederationError
from federation.twin import Action, Event, Fidelity
from federation.v1 import error_pb2
from federation.wire import status

NOT_SETTLED = -1
"""The settled instant of a run in which nothing is settled yet, not even instant 0."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (
    id {integer} PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    settled_ns {integer} NOT NULL,
    entries {integer} NOT NULL,    -- how many there are; they are numbered from 1
    items {integer} NOT NULL,      -- of the journal, numbered from 1
    end_ns {integer},              -- Unix time, as all instants that are not of a run
    facts TEXT NOT NULL,           -- JSON: what doesn't change
    ending TEXT NOT NULL           -- JSON: digest, error, by whom and why, results
);
CREATE TABLE series (              -- the shared variables of a run, numbered from 0
    run {integer} NOT NULL, id {integer} NOT NULL, owner TEXT NOT NULL, variable TEXT NOT NULL,
    lane {integer} NOT NULL,       -- of its chunks
    latest {integer} NOT NULL,     -- the first number of its last chunk, or 0
    PRIMARY KEY (run, id)
);
CREATE TABLE batches (             -- values as they came, in the order of the ledger
    run {integer} NOT NULL, first {integer} NOT NULL, last {integer} NOT NULL,
    amount {integer} NOT NULL,     -- how many values are among these numbers
    data {bytes} NOT NULL,
    PRIMARY KEY (run, first)
);
CREATE TABLE chunks (              -- values of one variable each, sorted out of many batches
    id {integer} PRIMARY KEY, run {integer} NOT NULL, series {integer} NOT NULL,
    lane {integer} NOT NULL, fold {integer} NOT NULL,  -- the first number of those batches
    first {integer} NOT NULL, last {integer} NOT NULL,
    start_ns {integer} NOT NULL, end_ns {integer} NOT NULL,  -- the earliest and latest value
    amount {integer} NOT NULL, width {integer} NOT NULL,
    summary {bytes}
);
CREATE INDEX chunk_by_number ON chunks (run, lane, fold);
CREATE INDEX chunk_by_series ON chunks (run, series, first);
CREATE TABLE vectors (chunk {integer} PRIMARY KEY, data {bytes} NOT NULL);
CREATE TABLE happenings (          -- events and actions
    run {integer} NOT NULL, number {integer} NOT NULL, what TEXT NOT NULL,
    owner TEXT NOT NULL, kind TEXT NOT NULL, entity TEXT NOT NULL,
    data {bytes} NOT NULL,
    PRIMARY KEY (run, number)
);
CREATE INDEX happening_by_kind ON happenings (run, what, kind);
CREATE TABLE journal (
    run {integer} NOT NULL, first {integer} NOT NULL, last {integer} NOT NULL,
    data {bytes} NOT NULL,
    PRIMARY KEY (run, first)
);
CREATE TABLE snapshots (
    run {integer} NOT NULL, member TEXT NOT NULL, number {integer} NOT NULL,
    time_ns {integer} NOT NULL, state {bytes} NOT NULL,
    PRIMARY KEY (run, member, number)
);
"""

RUN = "name, state, settled_ns, entries, items, end_ns, facts, ending"
"""The columns that `run_of` takes."""

EVENT, ACTION = "event", "action"

_ITEM = struct.Struct("<BIqQ")
_FRAME, _NOTE = 0, 1


class State(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self not in (State.PENDING, State.RUNNING)


UNFINISHED = tuple(state.value for state in State if not state.is_over)


@dataclass(frozen=True, slots=True)
class Run:
    """What is known about a run besides its ledger and its journal.

    `figures` are the `(member, variable, unit)` of its KPIs, `delays` the `(source, target,
    delay_ns)` after which an action takes effect, `fidelities` the `(member, fidelity)` of those
    that it began with. `settled_ns` is the instant up to which the
    stored ledger is complete; `entries` and `items` are how many the ledger and the journal
    have ever had. `ended_by` and `ended_because` are for the record of a run that somebody
    ended; `results` is what one that succeeded is told with, besides its ledger.
    """

    name: str
    scenario: str
    measure: str
    document: str
    seed: int
    horizon_ns: int
    create_ns: int
    figures: tuple[tuple[str, str, str], ...] = ()
    delays: tuple[tuple[str, str, int], ...] = ()
    state: State = State.PENDING
    settled_ns: int = NOT_SETTLED
    entries: int = 0
    digest: str = ""
    error: FederationError | None = None
    end_ns: int | None = None
    ended_by: str = ""
    ended_because: str = ""
    items: int = 0
    results: str = ""
    fidelities: tuple[tuple[str, Fidelity], ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """A ledger entry with its place in the run's ledger and when the broker got it."""

    number: int
    receive_ns: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Frame:
    """A member's answer to its frame of this number (from 1), as it is on the wire."""

    member: str
    number: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """What else decides how a run goes on: an order, a membership change. `time_ns` of the run."""

    kind: str
    time_ns: int
    body: bytes


Item = Frame | Note


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a member's session after its frame `number`, at the run's `time_ns`."""

    member: str
    number: int
    time_ns: int
    state: bytes


def plain(text: str) -> str:
    """Any text, even with a zero in it, in characters that every database takes."""
    return json.dumps(text)[1:-1]


def said(plain: str) -> str:
    return str(json.loads(f'"{plain}"'))


def facts(run: Run) -> str:
    seed = str(run.seed)  # of 64 bits, without a sign
    known = (run.scenario, run.measure, run.document, seed, run.horizon_ns, run.create_ns)
    return json.dumps([*known, run.figures, run.delays, run.fidelities])


def ending(
    digest: str, error: FederationError | None, by: str, because: str, results: str = ""
) -> str:
    told = error and {"reason": error.reason, "message": error.message, "metadata": error.metadata}
    return json.dumps([digest, told, by, because, *filter(None, [results])])


def run_of(row: Sequence[Any]) -> Run:
    name, state, settled_ns, entries, items, end_ns, facts, ending = row
    known = json.loads(facts)
    scenario, measure, document, seed, horizon_ns, create_ns, figures, delays, *later = known
    digest, error, by, because, *results = json.loads(ending)
    return Run(
        name,
        scenario,
        measure,
        document,
        int(seed),
        horizon_ns,
        create_ns,
        tuple((m, v, u) for m, v, u in figures),
        tuple((s, t, d) for s, t, d in delays),
        State(state),
        settled_ns,
        entries,
        digest,
        error and status.decode_error(error_pb2.Error(**error)),
        end_ns,
        by,
        because,
        items,
        "".join(results),
        tuple((m, Fidelity(f)) for m, f in chain.from_iterable(later)),
    )


def happening(entry: EventRecord | ActionRecord, receive_ns: int) -> tuple[object, ...]:
    """Its kind, owner, kind of event or actuator, entity, and all of it, sealed."""
    place = (receive_ns, entry.time_ns, entry.micro, entry.rank, entry.owner)
    if isinstance(entry, EventRecord):
        event = entry.event
        what, kind, entity = EVENT, event.kind, event.entity
        body: tuple[object, ...] = (event.id, event.time_ns, event.text, event.causes, entry.via)
        if event.via:
            body = (*body, event.via)
    else:
        action = entry.action
        what, kind, entity = ACTION, action.actuator, action.entity
        setpoint = struct.pack("<d", action.value).hex()  # a refused one may be NaN
        body = (action.member, setpoint, action.cause, entry.refusal)
    text = json.dumps([*place, kind, entity, *body])
    return what, plain(entry.owner), plain(kind), plain(entity), chunks.seal(text.encode())


def happened(number: int, what: str, data: bytes) -> Stored:
    receive_ns, time_ns, micro, rank, owner, kind, entity, *rest = json.loads(
        bytes(chunks.unseal(data))
    )
    if what == EVENT:
        id_, event_ns, text, causes, via, *more = rest
        event = Event(
            id_, event_ns, kind, entity, text, tuple(causes), via=tuple(more[0]) if more else ()
        )
        channels = tuple((cause, channel) for cause, channel in via)
        return Stored(number, receive_ns, EventRecord(time_ns, micro, rank, owner, event, channels))
    member, setpoint, cause, refusal = rest
    (value,) = struct.unpack("<d", bytes.fromhex(setpoint))
    action = Action(member, kind, entity, value, cause)
    return Stored(number, receive_ns, ActionRecord(time_ns, micro, rank, owner, action, refusal))


def pack_items(items: Sequence[Item]) -> bytes:
    parts: list[bytes] = []
    for item in items:
        if isinstance(item, Frame):
            what, name, number, body = _FRAME, item.member, item.number, item.answer
        else:
            what, name, number, body = _NOTE, item.kind, item.time_ns, item.body
        label = name.encode()
        parts += (_ITEM.pack(what, len(label), number, len(body)), label, body)
    return chunks.seal(b"".join(parts))


def unpack_items(sealed: bytes, count: int) -> list[Item]:
    data = chunks.unseal(sealed)
    found: list[Item] = []
    place = 0
    while place < len(data):
        what, label, number, size = _ITEM.unpack_from(data, place)
        place += _ITEM.size
        name = str(data[place : place + label], "utf-8")
        place += label + size
        body = bytes(data[place - size : place])
        found.append(Frame(name, number, body) if what == _FRAME else Note(name, number, body))
    if len(found) != count:
        raise chunks.DamagedError(f"{len(found)} of them are there")
    return found
