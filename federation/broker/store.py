"""What a broker must still know after it was killed: its epoch, its runs and their ledgers."""

from __future__ import annotations

import json
import re
import sqlite3
import struct
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
from federation.errors import FederationError, Reason, ScenarioError
from federation.twin import Action, Event
from federation.v1 import error_pb2
from federation.wire import codec, status

SCHEMA = 1

NOT_SETTLED = -1
"""The settled instant of a run in which nothing is settled yet, not even instant 0."""

PAGE = 1024
"""How many entries one read takes at most, when the caller names no other limit."""

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    scenario TEXT NOT NULL,
    measure TEXT NOT NULL,
    document TEXT NOT NULL,
    seed TEXT NOT NULL,          -- of 64 bits, without a sign
    horizon_ns INTEGER NOT NULL,
    figures TEXT NOT NULL,       -- JSON: [[member, variable, unit], ...]
    delays TEXT NOT NULL,        -- JSON: [[source, target, ns], ...] of actuations
    state TEXT NOT NULL,
    settled_ns INTEGER NOT NULL,
    entries INTEGER NOT NULL,    -- how many there are; they are numbered from 1
    digest TEXT NOT NULL,
    error TEXT NOT NULL,         -- JSON: {reason, message, metadata}; empty for none
    create_ns INTEGER NOT NULL,  -- Unix time, as all instants that are not of a run
    end_ns INTEGER,
    ended_by TEXT NOT NULL,
    ended_because TEXT NOT NULL
);
CREATE TABLE readings (
    run INTEGER NOT NULL, number INTEGER NOT NULL, receive_ns INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, micro INTEGER NOT NULL, rank INTEGER NOT NULL, owner TEXT NOT NULL,
    variable TEXT NOT NULL, revision INTEGER NOT NULL, quality INTEGER NOT NULL,
    vector BLOB NOT NULL,        -- float64, little-endian
    PRIMARY KEY (run, number)
);  -- with row ids: long rows pack badly without
CREATE INDEX reading_by_variable ON readings (run, owner, variable, number);
CREATE TABLE events (
    run INTEGER NOT NULL, number INTEGER NOT NULL, receive_ns INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, micro INTEGER NOT NULL, rank INTEGER NOT NULL, owner TEXT NOT NULL,
    id TEXT NOT NULL, event_ns INTEGER NOT NULL, kind TEXT NOT NULL, entity TEXT NOT NULL,
    text TEXT NOT NULL,
    causes TEXT NOT NULL,        -- JSON: [event id, ...]
    via TEXT NOT NULL,           -- JSON: [[event id, coupling], ...]
    PRIMARY KEY (run, number)
) WITHOUT ROWID;
CREATE TABLE actions (
    run INTEGER NOT NULL, number INTEGER NOT NULL, receive_ns INTEGER NOT NULL,
    time_ns INTEGER NOT NULL, micro INTEGER NOT NULL, rank INTEGER NOT NULL, owner TEXT NOT NULL,
    member TEXT NOT NULL, actuator TEXT NOT NULL, entity TEXT NOT NULL,
    setpoint BLOB NOT NULL,      -- one float64, little-endian: a refused one may be NaN
    cause TEXT NOT NULL, refusal TEXT NOT NULL,
    PRIMARY KEY (run, number)
) WITHOUT ROWID;
"""

_RUN = (
    "name, scenario, measure, document, seed, horizon_ns, figures, delays, state, settled_ns, "
    "entries, digest, error, create_ns, end_ns, ended_by, ended_because"
)
_PLACE = "number, receive_ns, time_ns, micro, rank, owner"
_READING = f"{_PLACE}, variable, revision, quality, vector"
_EVENT = f"{_PLACE}, id, event_ns, kind, entity, text, causes, via"
_ACTION = f"{_PLACE}, member, actuator, entity, setpoint, cause, refusal"


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


@dataclass(frozen=True, slots=True)
class Run:
    """What is known about a run besides its ledger.

    `figures` are the `(member, variable, unit)` of its KPIs, `delays` the `(source, target,
    delay_ns)` after which an action takes effect. `settled_ns` is the instant up to which the
    stored ledger is complete. `ended_by` and `ended_because` are for the record of a run that
    somebody ended.
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


@dataclass(frozen=True, slots=True)
class Stored:
    """A ledger entry with its place in the run's ledger and when the broker got it."""

    number: int
    receive_ns: int
    entry: Entry


class Store:
    """One SQLite file, or ":memory:". Calls may come from any thread; they take turns.

    What `append` and `change` have returned from is in the file, and a killed process loses
    none of it (a power cut may lose the last moments, never consistency: write-ahead log,
    `synchronous=NORMAL`). Every failure is a `FederationError`.
    """

    def __init__(self, path: str | Path = ":memory:", *, patience_s: float = 5.0) -> None:
        self.path = str(path)
        self.epoch = 0
        self._turn = threading.Lock()
        try:
            self._db = sqlite3.connect(
                self.path, timeout=patience_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._failed("opened", error) from None
        try:
            with self._errors("opened"):
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
            with self._transaction("opened") as db:
                self._adopt(db)
        except BaseException:
            self._db.close()
            raise
        self.id = str(self._meta("store"))
        """Tells this store from every other one."""

    def _adopt(self, db: sqlite3.Connection) -> None:
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        if not tables:
            for statement in filter(str.strip, re.sub("--.*", "", _TABLES).split(";")):
                db.execute(statement)
            facts = {"schema": SCHEMA, "store": uuid.uuid4().hex, "epoch": 0, "lease_epoch": 0}
            db.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
            return
        found = None
        if "meta" in tables:
            found = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if found is None or found[0] != SCHEMA:
            what = "is no store of a broker" if found is None else f"has the schema {found[0]}"
            raise ScenarioError(
                Reason.STORE_FAILED,
                f"{self.path} {what}; this version reads schema {SCHEMA}: name another file",
                {"file": self.path},
            )

    def close(self) -> None:
        with self._turn:
            self._db.close()

    # -- epochs ------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Begin a new life of the broker: its number, higher than all before.

        From now on whoever opened the store before can't write to it any more (STALE_EPOCH).
        """
        with self._transaction("written") as db:
            db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
            (epoch,) = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
        self.epoch = int(epoch)
        return self.epoch

    @property
    def lease_epoch(self) -> int:
        """The highest epoch ever given to a lease."""
        return int(self._meta("lease_epoch"))

    def keep_lease_epoch(self, epoch: int) -> None:
        """Remember that leases up to `epoch` have been given."""
        with self._writing() as db:
            db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'lease_epoch'", (epoch,))

    # -- writing -----------------------------------------------------------------------

    def create(self, run: Run) -> Run:
        """Keep a new run. Its name becomes `runs/` and then `run.name`, made a resource id,
        with a number that no run had before."""
        stem = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40] or "run"
        with self._writing() as db:
            (last,) = db.execute("SELECT coalesce(max(id), 0) FROM runs").fetchone()
            named = replace(run, name=f"runs/{stem}-{last + 1}")
            marks = ", ".join("?" * (1 + len(_RUN.split(","))))
            db.execute(
                f"INSERT INTO runs (id, {_RUN}) VALUES ({marks})", (last + 1, *_run_row(named))
            )
        return named

    def append(
        self, run: str, entries: Sequence[Entry], receive_ns: Sequence[int], settled_ns: int
    ) -> int:
        """Keep what follows all entries before, in one transaction; how many there are now.

        `receive_ns` has one Unix time per entry. Either all of it is kept or nothing.
        """
        readings: list[tuple[object, ...]] = []
        events: list[tuple[object, ...]] = []
        actions: list[tuple[object, ...]] = []
        with self._writing() as db:
            id_, number = self._id(db, run)
            for entry, received in zip(entries, receive_ns, strict=True):
                number += 1
                place = (id_, number, received, entry.time_ns, entry.micro, entry.rank, entry.owner)
                match entry:
                    case Record():
                        vector = codec.encode_vector(entry.value)
                        quality = int(entry.quality)
                        readings.append((*place, entry.variable, entry.revision, quality, vector))
                    case EventRecord():
                        what = entry.event
                        said = (what.id, what.time_ns, what.kind, what.entity, what.text)
                        story = (json.dumps(what.causes), json.dumps(entry.via))
                        events.append((*place, *said, *story))
                    case ActionRecord():
                        order = entry.action
                        setpoint = struct.pack("<d", order.value)
                        target = (order.member, order.actuator, order.entity, setpoint)
                        actions.append((*place, *target, order.cause, entry.refusal))
            for table, columns, rows in (
                ("readings", _READING, readings),
                ("events", _EVENT, events),
                ("actions", _ACTION, actions),
            ):
                if rows:
                    marks = ", ".join("?" * len(rows[0]))
                    db.executemany(f"INSERT INTO {table} (run, {columns}) VALUES ({marks})", rows)
            db.execute(
                "UPDATE runs SET entries = ?, settled_ns = ? WHERE id = ?",
                (number, settled_ns, id_),
            )
        return number

    def change(
        self,
        run: str,
        state: State,
        *,
        digest: str = "",
        error: FederationError | None = None,
        end_ns: int | None = None,
        ended_by: str = "",
        ended_because: str = "",
    ) -> None:
        """Keep where a run stands now."""
        with self._writing() as db:
            id_, _ = self._id(db, run)
            db.execute(
                "UPDATE runs SET state = ?, digest = ?, error = ?, end_ns = ?, ended_by = ?, "
                "ended_because = ? WHERE id = ?",
                (state, digest, _error_text(error), end_ns, ended_by, ended_because, id_),
            )

    def give_up_unfinished(self, error: FederationError, now_ns: int) -> int:
        """Mark runs that an earlier life left unfinished as failed; how many there were."""
        with self._writing() as db:
            return db.execute(
                "UPDATE runs SET state = ?, error = ?, end_ns = ? WHERE state IN (?, ?)",
                (State.FAILED, _error_text(error), now_ns, State.PENDING, State.RUNNING),
            ).rowcount

    # -- reading -----------------------------------------------------------------------

    def run(self, name: str) -> Run:
        """A run by its name. Fails with RUN_NOT_FOUND."""
        with self._reading() as db:
            return self._run(db, name)

    def runs(self, limit: int = 100, before: int | None = None) -> tuple[list[Run], int | None]:
        """Runs, the newest first, and what to pass as `before` for those that follow."""
        with self._reading() as db:
            rows = db.execute(
                f"SELECT id, {_RUN} FROM runs WHERE id < ? ORDER BY id DESC LIMIT ?",
                ((1 << 62) if before is None else before, limit + 1),
            ).fetchall()
        more = rows[limit - 1][0] if len(rows) > limit else None
        return [_run_of(row[1:]) for row in rows[:limit]], more

    def entries(
        self,
        run: str,
        after: int = 0,
        *,
        limit: int = PAGE,
        members: Iterable[str] = (),
        variables: Iterable[str] = (),
    ) -> tuple[list[Stored], int, Run]:
        """Entries that follow number `after`, the number to go on after, and the run as it was.

        At most `limit` numbers are looked at. With `members`, only entries of these; with
        `variables`, only values of these, besides events and actions.
        """
        with self._reading() as db:
            id_, total = self._id(db, run)
            end = min(after + limit, total)
            span = "run = ? AND number > ? AND number <= ?"
            found = self._select(db, span, (id_, after, end), members, variables)
            return found, max(end, after), self._run(db, run)

    def snapshot(
        self, run: str, *, members: Iterable[str] = (), variables: Iterable[str] = ()
    ) -> tuple[list[Stored], int, Run]:
        """The latest value of every variable with all events and actions, in ledger order."""
        with self._reading() as db:
            id_, total = self._id(db, run)
            latest = (
                "run = ? AND number IN (SELECT max(number) FROM readings WHERE run = ? "
                "GROUP BY owner, variable)"
            )
            values = self._select(db, latest, (id_, id_), members, variables, ("readings",))
            rest = self._select(db, "run = ?", (id_,), members, variables, ("events", "actions"))
            found = sorted([*values, *rest], key=lambda stored: stored.number)
            return found, total, self._run(db, run)

    def latest(self, run: str) -> dict[tuple[str, str], Record]:
        """The latest value of every variable, by owner and name."""
        found, _, _ = self.snapshot(run)
        records = (stored.entry for stored in found)
        return {(r.owner, r.variable): r for r in records if isinstance(r, Record)}

    def present(self, run: str, owner: str, variable: str, at: int | None = None) -> float | None:
        """The last value of a scalar, or the last not after entry number `at`; None for none."""
        with self._reading() as db:
            id_, total = self._id(db, run)
            row = db.execute(
                "SELECT vector FROM readings WHERE run = ? AND owner = ? AND variable = ? AND "
                "number <= ? ORDER BY number DESC LIMIT 1",
                (id_, owner, variable, total if at is None else at),
            ).fetchone()
        return None if row is None else float(codec.decode_vector(row[0], variable)[0])

    def history(
        self, run: str, owner: str, variable: str, start_ns: int, end_ns: int
    ) -> list[Stored]:
        """All revisions of one variable from `start_ns` up to and including `end_ns`."""
        with self._reading() as db:
            id_, _ = self._id(db, run)
            where = "run = ? AND owner = ? AND variable = ? AND time_ns BETWEEN ? AND ?"
            values = (id_, owner, variable, start_ns, end_ns)
            return self._select(db, where, values, (), (), ("readings",))

    def events(self, run: str, kind: str, entity: str | None = None) -> list[Stored]:
        """All events of one kind, or those that happened to one entity."""
        with self._reading() as db:
            id_, _ = self._id(db, run)
            where, values = "run = ? AND kind = ?", [id_, kind]
            if entity is not None:
                where, values = f"{where} AND entity = ?", [*values, entity]
            return self._select(db, where, values, (), (), ("events",))

    def actions(self, run: str, owner: str) -> list[Stored]:
        """All actions of one member that took effect."""
        with self._reading() as db:
            id_, _ = self._id(db, run)
            where = "run = ? AND owner = ? AND refusal = ''"
            return self._select(db, where, (id_, owner), (), (), ("actions",))

    def _select(
        self,
        db: sqlite3.Connection,
        where: str,
        values: Sequence[object],
        members: Iterable[str],
        variables: Iterable[str],
        tables: Sequence[str] = ("readings", "events", "actions"),
    ) -> list[Stored]:
        owners, names = tuple(members), tuple(variables)
        if owners:
            where += f" AND owner IN ({', '.join('?' * len(owners))})"
        found: list[Stored] = []
        for table in tables:
            columns, decode = _DECODED[table]
            clause, arguments = where, [*values, *owners]
            if names and table == "readings":
                clause += f" AND variable IN ({', '.join('?' * len(names))})"
                arguments += names
            query = f"SELECT {columns} FROM {table} WHERE {clause} ORDER BY number"
            found += (Stored(row[0], row[1], decode(row)) for row in db.execute(query, arguments))
        if len(tables) > 1:
            found.sort(key=lambda stored: stored.number)
        return found

    def _run(self, db: sqlite3.Connection, name: str) -> Run:
        row = db.execute(f"SELECT {_RUN} FROM runs WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise _no_run(name)
        return _run_of(row)

    def _id(self, db: sqlite3.Connection, name: str) -> tuple[int, int]:
        row = db.execute("SELECT id, entries FROM runs WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise _no_run(name)
        return int(row[0]), int(row[1])

    def _meta(self, key: str) -> Any:
        with self._reading() as db:
            return db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]

    # -- turns and failures --------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view: the statements inside see the same state."""
        with self._turn, self._errors("read"):
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._roll_back()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("written") as db:
            (epoch,) = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            if self.epoch and epoch != self.epoch:
                raise ScenarioError(
                    Reason.STALE_EPOCH,
                    f"another broker has taken over the store {self.path} (epoch {epoch}; ours "
                    f"was {self.epoch})",
                    {"file": self.path, "epoch": str(epoch)},
                )
            yield db

    @contextmanager
    def _transaction(self, purpose: str) -> Iterator[sqlite3.Connection]:
        """All of what happens inside, or nothing."""
        with self._turn, self._errors(purpose):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        # a full disk has rolled back already
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    @contextmanager
    def _errors(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._failed(purpose, error) from error

    def _failed(self, purpose: str, error: sqlite3.Error) -> FederationError:
        return ScenarioError(
            Reason.STORE_FAILED,
            f"the broker's store {self.path} can't be {purpose}: {error}",
            {"file": self.path, "sqlite": getattr(error, "sqlite_errorname", "")},
        )


def _no_run(name: str) -> ScenarioError:
    return ScenarioError(Reason.RUN_NOT_FOUND, f"there is no run {name!r}", {"run": name})


def _run_row(run: Run) -> tuple[object, ...]:
    return (
        run.name,
        run.scenario,
        run.measure,
        run.document,
        str(run.seed),
        run.horizon_ns,
        json.dumps(run.figures),
        json.dumps(run.delays),
        run.state,
        run.settled_ns,
        run.entries,
        run.digest,
        _error_text(run.error),
        run.create_ns,
        run.end_ns,
        run.ended_by,
        run.ended_because,
    )


def _run_of(row: Sequence[Any]) -> Run:
    name, scenario, measure, document, seed, horizon_ns, figures, delays = row[:8]
    state, settled_ns, entries, digest, error, create_ns, end_ns, by, because = row[8:]
    return Run(
        name,
        scenario,
        measure,
        document,
        int(seed),
        horizon_ns,
        create_ns,
        tuple((m, v, u) for m, v, u in json.loads(figures)),
        tuple((s, t, d) for s, t, d in json.loads(delays)),
        State(state),
        settled_ns,
        entries,
        digest,
        _error_of(error),
        end_ns,
        by,
        because,
    )


def _error_text(error: FederationError | None) -> str:
    if error is None:
        return ""
    return json.dumps(
        {"reason": error.reason, "message": error.message, "metadata": error.metadata}
    )


def _error_of(text: str) -> FederationError | None:
    if not text:
        return None
    parts: Mapping[str, Any] = json.loads(text)
    return status.decode_error(error_pb2.Error(**parts))


def _reading_of(row: Sequence[Any]) -> Record:
    _, _, time_ns, micro, rank, owner, variable, revision, quality, vector = row
    value = codec.decode_vector(vector, variable)
    return Record(time_ns, micro, rank, owner, variable, revision, value, Quality(quality))


def _event_of(row: Sequence[Any]) -> EventRecord:
    _, _, time_ns, micro, rank, owner, id_, event_ns, kind, entity, text, causes, via = row
    event = Event(id_, event_ns, kind, entity, text, tuple(json.loads(causes)))
    channels = tuple((cause, channel) for cause, channel in json.loads(via))
    return EventRecord(time_ns, micro, rank, owner, event, channels)


def _action_of(row: Sequence[Any]) -> ActionRecord:
    _, _, time_ns, micro, rank, owner, member, actuator, entity, setpoint, cause, refusal = row
    (value,) = struct.unpack("<d", setpoint)
    action = Action(member, actuator, entity, value, cause)
    return ActionRecord(time_ns, micro, rank, owner, action, refusal)


_DECODED: Mapping[str, tuple[str, Callable[[Sequence[Any]], Entry]]] = {
    "readings": (_READING, _reading_of),
    "events": (_EVENT, _event_of),
    "actions": (_ACTION, _action_of),
}
