"""What a broker must still know after it was killed: its epoch, its runs, their ledgers and the
journals from which they can go on."""

from __future__ import annotations

import re
import struct
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from federation.broker.store import chunks, kept
from federation.broker.store.chunks import Outline
from federation.broker.store.database import Cursor, Database, Sqlite
from federation.broker.store.kept import Item, Run, Snapshot, State, Stored
from federation.core.ledger import ActionRecord, Entry, Record
from federation.errors import FederationError, Reason, ScenarioError
from federation.twin import Vector

T = TypeVar("T")

SCHEMA = 2

PAGE = 1024
"""How many entries one read takes at most, when the caller names no other limit."""

FOLDED_VALUES = 1 << 15
FOLDED_BYTES = 1 << 23
FOLDED_BATCHES = 1 << 12
"""After so many values, bytes or batches a run's values are sorted by variable."""

_FOLDED, _AT_ONCE = 0, 1
"""The lanes of chunks. In each, what is kept at one time follows all that was kept before."""

_CHUNK = "id, series, width, first, last"


@dataclass
class _Open:
    """What a writer keeps in mind of a run: its variables, and how much isn't folded yet."""

    entries: int
    series: dict[tuple[str, str], tuple[int, int]]
    """The number and the lane of each variable, by owner and name."""
    batches: int
    values: int
    bytes: int


class Store:
    """A SQLite file, ":memory:", or a PostgreSQL database by its `postgresql://` URL.

    Calls may come from any thread; they take turns. What a writing call has returned from is
    stored, whole; what it has failed with isn't, not even in part (whole or not at all, if a
    server went away for good while it committed: `run(...).entries` tells). Every failure is a
    `FederationError`.

    Values are first kept as they came, a row per `append`, and after a while sorted into chunks
    of one variable each, with summaries, so that both writers and readers of a history are
    quick. Long vectors are chunks at once, and are written but once.
    """

    def __init__(self, path: str | Path = ":memory:", *, patience_s: float = 5.0) -> None:
        """`patience_s` is how long a call waits for a database that is away or in use."""
        self._db = _database(str(path), patience_s)
        self.path = self._db.place
        self.epoch = 0
        self._open: dict[int, _Open] = {}
        self._turn = threading.RLock()
        try:
            self._db.write(self._adopt, "opened")
            self.id = str(self._meta("store"))
            """Tells this store from every other one."""
        except BaseException:
            self._db.close()
            raise

    def _adopt(self, db: Cursor) -> None:
        tables = self._db.tables(db)
        if not tables:
            text = re.sub("--.*", "", kept.TABLES.format(**self._db.types))
            for statement in filter(str.strip, text.split(";")):
                db.execute(statement)
            facts = {"schema": SCHEMA, "store": uuid.uuid4().hex}
            facts |= {"epoch": 0, "lease_epoch": 0, "runs": 0}
            rows = [(key, str(value)) for key, value in facts.items()]
            db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            return
        found = None
        if "meta" in tables:
            found = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if found is None:
            what = "is no store of a broker: name another place"
        elif int(found[0]) > SCHEMA:
            what = (
                f"has the schema {found[0]}, of a newer version; this one reads and writes schema "
                f"{SCHEMA}: use the newer version, or name another place"
            )
        elif int(found[0]) < SCHEMA:
            what = (
                f"has the schema {found[0]}, of an older version; this one reads and writes schema "
                f"{SCHEMA}: read its runs with the older version, and name another place"
            )
        else:
            return
        raise ScenarioError(Reason.STORE_FAILED, f"{self.path} {what}", {"file": self.path})

    def close(self) -> None:
        self._db.close()

    # -- epochs ------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Begin a new life of the broker: its number, higher than all before.

        From now on whoever opened the store before can't write to it any more (STALE_EPOCH).
        """

        def body(db: Cursor) -> int:
            epoch = self._epoch_now(db) + 1
            db.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (str(epoch),))
            return epoch

        with self._turn:
            self.epoch = self._db.write(body)
            self._open.clear()
        return self.epoch

    @property
    def lease_epoch(self) -> int:
        """The highest epoch ever given to a lease."""
        return int(self._meta("lease_epoch"))

    def keep_lease_epoch(self, epoch: int) -> None:
        """Remember that leases up to `epoch` have been given."""

        def body(db: Cursor) -> None:
            (known,) = db.execute("SELECT value FROM meta WHERE key = 'lease_epoch'").fetchone()
            highest = str(max(int(known), epoch))
            db.execute("UPDATE meta SET value = ? WHERE key = 'lease_epoch'", (highest,))

        self._write(body)

    # -- writing -----------------------------------------------------------------------

    def create(self, run: Run, journal: Sequence[Item] = ()) -> Run:
        """Keep a new run and the beginning of its journal.

        Its name becomes `runs/` and then `run.name`, made a resource id, with a number that no
        run had before.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40] or "run"

        def body(db: Cursor) -> Run:
            (known,) = db.execute("SELECT value FROM meta WHERE key = 'runs'").fetchone()
            id_ = int(known) + 1
            named = replace(run, name=f"runs/{stem}-{id_}", items=len(journal))
            db.execute("UPDATE meta SET value = ? WHERE key = 'runs'", (str(id_),))
            marks = ", ".join("?" * (1 + len(kept.RUN.split(","))))
            db.execute(
                f"INSERT INTO runs (id, {kept.RUN}) VALUES ({marks})",
                (
                    id_,
                    named.name,
                    str(named.state),
                    named.settled_ns,
                    named.entries,
                    named.items,
                    named.end_ns,
                    kept.facts(named),
                    kept.ending(named.digest, named.error, named.ended_by, named.ended_because),
                ),
            )
            if journal:
                row = (id_, 1, len(journal), kept.pack_items(journal))
                db.execute("INSERT INTO journal VALUES (?, ?, ?, ?)", row)
            return named

        return self._write(body)

    def append(
        self,
        run: str,
        entries: Sequence[Entry],
        receive_ns: Sequence[int],
        settled_ns: int,
        journal: Sequence[Item] = (),
    ) -> int:
        """Keep what follows all entries and journal items before, in one transaction; how many
        entries there are now.

        `receive_ns` has one Unix time per entry. Either all of it is kept or nothing.
        """

        def body(db: Cursor) -> tuple[int, int, _Open]:
            id_, number, items = self._id(db, run)
            # only when all is well it is put back
            known = self._open.pop(id_, None)
            if known is None or known.entries != number:
                known = _look(db, id_, number)
            values: tuple[list[chunks.Value], list[chunks.Value]] = ([], [])
            happenings: list[tuple[object, ...]] = []
            fresh: list[tuple[object, ...]] = []
            first = number + 1
            for entry, received in zip(entries, receive_ns, strict=True):
                number += 1
                if isinstance(entry, Record):
                    name = (entry.owner, entry.variable)
                    place = known.series.get(name)
                    if place is None:
                        lane = _AT_ONCE if entry.value.size >= chunks.WIDE else _FOLDED
                        place = known.series[name] = (len(known.series), lane)
                        fresh.append((id_, place[0], *map(kept.plain, name), lane, 0))
                    series, lane = place
                    values[lane].append((number, received, series, entry))
                else:
                    happenings.append((id_, number, *kept.happening(entry, received)))
            if fresh:
                db.executemany("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?)", fresh)
            if happenings:
                db.executemany("INSERT INTO happenings VALUES (?, ?, ?, ?, ?, ?, ?)", happenings)
            if values[_FOLDED]:
                data = chunks.pack_batch(values[_FOLDED])
                amount = len(values[_FOLDED])
                db.execute(
                    "INSERT INTO batches VALUES (?, ?, ?, ?, ?)", (id_, first, number, amount, data)
                )
                known.batches += 1
                known.values += amount
                known.bytes += len(data)
            if values[_AT_ONCE]:
                found = chunks.of_each(values[_AT_ONCE])
                self._keep_chunks(db, id_, _AT_ONCE, first, found)
            if journal:
                db.execute(
                    "INSERT INTO journal VALUES (?, ?, ?, ?)",
                    (id_, items + 1, items + len(journal), kept.pack_items(journal)),
                )
            db.execute(
                "UPDATE runs SET entries = ?, items = ?, settled_ns = ? WHERE id = ?",
                (number, items + len(journal), settled_ns, id_),
            )
            if (
                known.values >= FOLDED_VALUES
                or known.bytes >= FOLDED_BYTES
                or known.batches >= FOLDED_BATCHES
            ):
                self._fold(db, id_, run)
                known.batches = known.values = known.bytes = 0
            known.entries = number
            return id_, number, known

        with self._turn:
            id_, number, known = self._write(body)
            self._open[id_] = known
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
        results: str = "",
    ) -> None:
        """Keep where a run stands now."""

        ending = kept.ending(digest, error, ended_by, ended_because, results)

        def body(db: Cursor) -> None:
            id_, _, _ = self._id(db, run)
            db.execute(
                "UPDATE runs SET state = ?, end_ns = ?, ending = ? WHERE id = ?",
                (str(state), end_ns, ending, id_),
            )
            if state.is_over:
                self._open.pop(id_, None)
                self._fold(db, id_, run)

        with self._turn:
            self._write(body)

    def give_up_unfinished(self, error: FederationError, now_ns: int) -> int:
        """Mark runs that an earlier life left unfinished as failed; how many there were."""

        def body(db: Cursor) -> int:
            return db.execute(
                "UPDATE runs SET state = ?, ending = ?, end_ns = ? WHERE state IN (?, ?)",
                (str(State.FAILED), kept.ending("", error, "", ""), now_ns, *kept.UNFINISHED),
            ).rowcount

        return self._write(body)

    def _fold(self, db: Cursor, id_: int, run: str) -> None:
        """Sort the values of all batches of a run into chunks of one variable each."""
        rows = db.execute(
            "SELECT first, last, data FROM batches WHERE run = ? ORDER BY first", (id_,)
        ).fetchall()
        if not rows:
            return
        found = chunks.split(*self._unpacked(run, rows))
        self._keep_chunks(db, id_, _FOLDED, rows[0][0], found)
        db.execute("DELETE FROM batches WHERE run = ?", (id_,))

    def _keep_chunks(
        self, db: Cursor, id_: int, lane: int, fold: int, found: Sequence[chunks.Chunk]
    ) -> None:
        (last_id,) = db.execute("SELECT coalesce(max(id), 0) FROM chunks").fetchone()
        latest: dict[int, int] = {}
        known: list[tuple[object, ...]] = []
        packed: list[tuple[int, bytes]] = []
        for number, chunk in enumerate(found, last_id + 1):
            times, numbers = chunk.heads["time_ns"], chunk.heads["number"]
            amount, width = chunk.vectors.shape
            place = (id_, chunk.series, lane, fold, int(numbers[0]), int(numbers[-1]))
            span = (int(times.min()), int(times.max()))
            sums = chunks.summary(chunk.vectors) if amount >= chunks.SUMMED else None
            known.append((number, *place, *span, amount, width, sums))
            packed.append((number, chunk.packed()))
            latest[chunk.series] = max(latest.get(chunk.series, 0), int(numbers[0]))
        marks = ", ".join("?" * 12)
        db.executemany(f"INSERT INTO chunks VALUES ({marks})", known)
        db.executemany("INSERT INTO vectors VALUES (?, ?)", packed)
        db.executemany(
            "UPDATE series SET latest = ? WHERE run = ? AND id = ? AND latest < ?",
            [(first, id_, series, first) for series, first in latest.items()],
        )

    # -- going on after a fall ------------------------------------------------------------

    def unfinished(self) -> list[Run]:
        """The runs that haven't ended, the oldest first."""

        def body(db: Cursor) -> list[Run]:
            rows = db.execute(
                f"SELECT {kept.RUN} FROM runs WHERE state IN (?, ?) ORDER BY id", kept.UNFINISHED
            ).fetchall()
            return [kept.run_of(row) for row in rows]

        return self._db.read(body)

    def journal(self, run: str, after: int = 0) -> Iterator[tuple[int, Item]]:
        """All items that follow number `after`, numbered from 1, a few rows in memory at a time.

        Fails with RUN_NOT_FOUND, with JOURNAL_PRUNED when it was dropped, and with STORE_FAILED
        when an item is damaged or missing.
        """
        id_, _, items = self._db.read(lambda db: self._id(db, run))
        return self._items(id_, run, after, items)

    def _items(self, id_: int, run: str, after: int, items: int) -> Iterator[tuple[int, Item]]:
        def body(db: Cursor) -> list[Any]:
            return db.execute(
                "SELECT first, last, data FROM journal WHERE run = ? AND first >= coalesce((SELECT "
                "max(first) FROM journal WHERE run = ? AND first <= ?), 0) ORDER BY first LIMIT 16",
                (id_, id_, after + 1),
            ).fetchall()

        while after < items:
            before = after
            for first, last, data in self._db.read(body):
                if first > after + 1:
                    break
                with self._naming(f"the journal of {run}, items {first} to {last}"):
                    found = kept.unpack_items(data, last - first + 1)
                for number, item in enumerate(found, first):
                    if number > after:
                        yield number, item
                after = last
            if after <= before:
                raise self._no_item(id_, run, before + 1)

    def _no_item(self, id_: int, run: str, number: int) -> FederationError:
        query = "SELECT count(*) FROM journal WHERE run = ?"
        (left,) = self._db.read(lambda db: db.execute(query, (id_,)).fetchone())
        if left:
            return self._damaged(f"the journal of {run}", f"item {number} is missing")
        return ScenarioError(
            Reason.JOURNAL_PRUNED,
            f"the journal of {run} was dropped after the run had ended",
            {"run": run},
        )

    def keep_snapshot(
        self, run: str, member: str, number: int, time_ns: int, state: bytes, *, keep: int = 2
    ) -> None:
        """Keep a member's state after its frame `number`, and of older ones the newest, so that
        there are `keep` of that member."""

        def body(db: Cursor) -> None:
            id_, _, _ = self._id(db, run)
            who = (id_, kept.plain(member))
            db.execute(
                "DELETE FROM snapshots WHERE run = ? AND member = ? AND number = ?", (*who, number)
            )
            db.execute(
                "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?)",
                (*who, number, time_ns, chunks.seal(state)),
            )
            db.execute(
                "DELETE FROM snapshots WHERE run = ? AND member = ? AND number NOT IN (SELECT "
                "number FROM snapshots WHERE run = ? AND member = ? ORDER BY number DESC LIMIT ?)",
                (*who, *who, keep),
            )

        self._write(body)

    def snapshots(self, run: str, member: str | None = None) -> list[Snapshot]:
        """The kept snapshots of all members, or of one; by member, the newest first."""

        def body(db: Cursor) -> list[Any]:
            id_, _, _ = self._id(db, run)
            only, values = (
                ("", [id_]) if member is None else (" AND member = ?", [id_, kept.plain(member)])
            )
            return db.execute(
                f"SELECT member, number, time_ns, state FROM snapshots WHERE run = ?{only} "
                "ORDER BY member, number DESC",
                values,
            ).fetchall()

        found = []
        for name, number, time_ns, sealed in self._db.read(body):
            name = kept.said(name)
            with self._naming(f"the snapshot of {name} of {run} after frame {number}"):
                found.append(Snapshot(name, number, time_ns, bytes(chunks.unseal(sealed))))
        return found

    # -- reading -----------------------------------------------------------------------

    def run(self, name: str) -> Run:
        """A run by its name. Fails with RUN_NOT_FOUND."""
        return self._db.read(lambda db: self._run(db, name))

    def runs(self, limit: int = 100, before: int | None = None) -> tuple[list[Run], int | None]:
        """Runs, the newest first, and what to pass as `before` for those that follow."""
        rows = self._db.read(
            lambda db: db.execute(
                f"SELECT id, {kept.RUN} FROM runs WHERE id < ? ORDER BY id DESC LIMIT ?",
                ((1 << 62) if before is None else before, limit + 1),
            ).fetchall()
        )
        more = rows[limit - 1][0] if len(rows) > limit else None
        return [kept.run_of(row[1:]) for row in rows[:limit]], more

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
        owners, names = frozenset(members), frozenset(variables)

        def body(db: Cursor) -> tuple[Run, int, _Values, list[Any]]:
            known = self._run(db, run)
            id_, total, _ = self._id(db, run)
            end = min(after + limit, total)
            values = _Values(_names(db, id_, owners, names))
            if end > after:
                values.read_batches(
                    db,
                    "run = ? AND first <= ? AND first >= coalesce((SELECT max(first) FROM batches "
                    "WHERE run = ? AND first <= ?), 0)",
                    (id_, end, id_, after + 1),
                )
                for lane in (_FOLDED, _AT_ONCE):
                    values.read_chunks(
                        db,
                        "run = ? AND lane = ? AND last > ? AND first <= ? AND fold <= ? AND fold "
                        ">= coalesce((SELECT max(fold) FROM chunks WHERE run = ? AND lane = ? AND "
                        "fold <= ?), 0)",
                        (id_, lane, after, end, end, id_, lane, after + 1),
                    )
            rest = _happened(db, "run = ? AND number > ? AND number <= ?", (id_, after, end))
            return known, end, values, rest

        known, end, values, rest = self._db.read(body)
        found = self._stored(run, values, after, end)
        found += self._happenings(run, rest, owners)
        found.sort(key=_number)
        if not owners and not names and len(found) != max(0, end - after):
            raise self._damaged(
                f"the ledger of {run}", f"of entries {after + 1} to {end} {len(found)} are there"
            )
        return found, max(end, after), known

    def snapshot(
        self, run: str, *, members: Iterable[str] = (), variables: Iterable[str] = ()
    ) -> tuple[list[Stored], int, Run]:
        """The latest value of every variable with all events and actions, in ledger order."""
        owners, names = frozenset(members), frozenset(variables)

        def body(db: Cursor) -> tuple[Run, _Values, list[Any]]:
            known = self._run(db, run)
            id_, _, _ = self._id(db, run)
            values = _Values(_names(db, id_, owners, names))
            values.read_batches(db, "run = ?", (id_,))
            latest = "SELECT latest FROM series WHERE run = ? AND id = chunks.series"
            values.read_chunks(db, f"run = ? AND first = ({latest})", (id_, id_))
            return known, values, _happened(db, "run = ?", (id_,))

        known, values, rest = self._db.read(body)
        found = [Stored(*place) for place in self._latest(run, values, known.entries)]
        found += self._happenings(run, rest, owners)
        found.sort(key=_number)
        return found, known.entries, known

    def latest(self, run: str) -> dict[tuple[str, str], Record]:
        """The latest value of every variable, by owner and name."""
        found, _, _ = self.snapshot(run)
        records = (stored.entry for stored in found)
        return {(r.owner, r.variable): r for r in records if isinstance(r, Record)}

    def present(self, run: str, owner: str, variable: str, at: int | None = None) -> float | None:
        """The last value of a scalar, or the last not after entry number `at`; None for none."""
        value = self.value(run, owner, variable, at)
        return None if value is None else float(value[0])

    def value(self, run: str, owner: str, variable: str, at: int | None = None) -> Vector | None:
        """The last value of a variable, or the last not after entry number `at`."""

        def body(db: Cursor) -> tuple[_Values, int]:
            id_, total, _ = self._id(db, run)
            last = total if at is None else at
            values = _Values(_names(db, id_, {owner}, {variable}))
            values.read_batches(db, "run = ?", (id_,))
            for series in values.names:
                values.read_chunks(
                    db,
                    "run = ? AND series = ? AND first = (SELECT max(first) FROM chunks WHERE "
                    "run = ? AND series = ? AND first <= ?)",
                    (id_, series, id_, series, last),
                )
            return values, last

        values, last = self._db.read(body)
        for _, _, record in self._latest(run, values, last):
            return record.value
        return None

    def history(
        self, run: str, owner: str, variable: str, start_ns: int, end_ns: int
    ) -> list[Stored]:
        """All revisions of one variable from `start_ns` up to and including `end_ns`."""

        def body(db: Cursor) -> _Values:
            id_, _, _ = self._id(db, run)
            values = _Values(_names(db, id_, {owner}, {variable}))
            values.read_batches(db, "run = ?", (id_,))
            for series in values.names:
                where = "run = ? AND series = ? AND end_ns >= ? AND start_ns <= ?"
                values.read_chunks(db, where, (id_, series, start_ns, end_ns))
            return values

        found = self._stored(run, self._db.read(body), 0, 1 << 62)
        return [stored for stored in found if start_ns <= stored.entry.time_ns <= end_ns]

    def outline(
        self,
        run: str,
        owner: str,
        variable: str,
        start_ns: int,
        end_ns: int,
        buckets: int,
        *,
        entity: int | None = None,
    ) -> Outline:
        """One variable from `start_ns` up to and including `end_ns` in at most so many buckets.

        Of all entities, or of the one with this index. Where the summary of a chunk says all
        that a bucket needs, its values aren't read: the time goes with the number of buckets
        and of chunks (of about 16 kB), not with that of values.
        """
        width_ns = -(-(end_ns - start_ns + 1) // buckets)

        def body(db: Cursor) -> tuple[_Values, list[Any]]:
            id_, _, _ = self._id(db, run)
            values = _Values(_names(db, id_, {owner}, {variable}))
            values.read_batches(db, "run = ?", (id_,))
            whole: list[Any] = []
            for series in values.names:
                rows = db.execute(
                    f"SELECT {_CHUNK}, start_ns, end_ns, amount, summary FROM chunks WHERE run = ? "
                    "AND series = ? AND end_ns >= ? AND start_ns <= ? ORDER BY first",
                    (id_, series, start_ns, end_ns),
                ).fetchall()
                cut = []
                for row in rows:
                    low, high = (row[5] - start_ns) // width_ns, (row[6] - start_ns) // width_ns
                    inside = row[5] >= start_ns and row[6] <= end_ns
                    if inside and low == high and row[8] is not None:
                        whole.append((low, *row))
                    else:
                        cut.append(row[:5])
                values.read_vectors(db, cut)
            return values, whole

        values, whole = self._db.read(body)
        with self._naming(f"{owner}.{variable} of {run}"):
            parts = chunks.Parts(start_ns, end_ns, width_ns, entity)
            for series in values.names:
                parts.add_batches([data for _, _, data in values.batches], series)
            parts.add_chunks([(data, row[2]) for row, data in values.chunks])
            parts.add_whole([(low, row[3], row[7], row[2], row[8]) for low, *row in whole])
            return parts.gathered()

    def events(self, run: str, kind: str, entity: str | None = None) -> list[Stored]:
        """All events of one kind, or those that happened to one entity."""

        def body(db: Cursor) -> list[Any]:
            id_, _, _ = self._id(db, run)
            where, values = "run = ? AND what = ? AND kind = ?", [id_, kept.EVENT, kept.plain(kind)]
            if entity is not None:
                where, values = f"{where} AND entity = ?", [*values, kept.plain(entity)]
            return _happened(db, where, values)

        return self._happenings(run, self._db.read(body))

    def actions(self, run: str, owner: str) -> list[Stored]:
        """All actions of one member that took effect."""

        def body(db: Cursor) -> list[Any]:
            id_, _, _ = self._id(db, run)
            return _happened(
                db, "run = ? AND what = ? AND owner = ?", (id_, kept.ACTION, kept.plain(owner))
            )

        found = self._happenings(run, self._db.read(body))
        return [s for s in found if isinstance(s.entry, ActionRecord) and not s.entry.refusal]

    # -- retention ---------------------------------------------------------------------

    def prune(
        self,
        *,
        keep_runs: int,
        ended_before_ns: int | None = None,
        journal_only: bool = False,
    ) -> list[str]:
        """Drop runs that have ended, but never the newest `keep_runs` of them, nor those that
        ended at `ended_before_ns` (Unix time) or later; the names of those that were dropped.

        With `journal_only` a run stays with its ledger and loses only what it would need to go
        on: its journal and snapshots. A run that hasn't ended stays whole. The room is
        given back: the file of SQLite gets smaller.
        """

        def chosen(db: Cursor) -> list[Any]:
            rows = db.execute(
                "SELECT id, name, end_ns FROM runs WHERE state NOT IN (?, ?) ORDER BY id DESC",
                kept.UNFINISHED,
            ).fetchall()[keep_runs:]
            return [
                (id_, name)
                for id_, name, end_ns in reversed(rows)
                if ended_before_ns is None or (end_ns or 0) < ended_before_ns
            ]

        dropped = []
        for id_, name in self._db.read(chosen):
            if self._write(partial(_drop, id_=id_, journal_only=journal_only)):
                dropped.append(name)
        if dropped:
            self._db.shrink()
        return dropped

    # -- what is where -------------------------------------------------------------------

    def _stored(self, run: str, values: _Values, after: int, end: int) -> list[Stored]:
        """All values with a number > `after` and <= `end`."""
        found: list[Stored] = []
        for chunk in self._chunks(run, values):
            numbers = chunk.heads["number"]
            low, high = np.searchsorted(numbers, (after, end), side="right")
            part = chunks.Chunk(chunk.heads[low:high], chunk.vectors[low:high])
            found += (Stored(*place) for place in part.records(*values.names[chunk.series]))
        found.sort(key=_number)
        return found

    def _latest(self, run: str, values: _Values, at: int) -> list[tuple[int, int, Record]]:
        """The last value of each variable with a number <= `at`."""
        last: dict[int, chunks.Chunk] = {}
        for chunk in self._chunks(run, values):
            end = int(np.searchsorted(chunk.heads["number"], at, side="right"))
            known = last.get(chunk.series)
            if end and (known is None or known.heads["number"][0] < chunk.heads["number"][end - 1]):
                last[chunk.series] = chunk.only(slice(end - 1, end))
        return [
            place
            for series, chunk in last.items()
            for place in chunk.records(*values.names[series])
        ]

    def _chunks(self, run: str, values: _Values) -> Iterator[chunks.Chunk]:
        for (_, series, width, first, last), data in values.chunks:
            owner, variable = values.names[series]
            with self._naming(f"{owner}.{variable} of {run}, entries {first} to {last}"):
                yield chunks.unpack_chunk(data, series, width)
        if values.batches:
            heads, vectors = self._unpacked(run, values.batches)
            wanted = np.isin(heads["series"], list(values.names))
            yield from chunks.split(heads, vectors, wanted)

    def _unpacked(self, run: str, rows: Sequence[Any]) -> tuple[chunks.Heads, chunks.Floats]:
        for first, last, data in rows:
            with self._naming(f"the ledger of {run}, entries {first} to {last}"):
                chunks.unseal(data)
        return chunks.unpack_batches([data for _, _, data in rows])

    def _happenings(
        self, run: str, rows: Sequence[Any], owners: frozenset[str] = frozenset()
    ) -> list[Stored]:
        found = []
        for number, what, data in rows:
            with self._naming(f"the ledger of {run}, entry {number}"):
                stored = kept.happened(number, what, data)
            if not owners or stored.entry.owner in owners:
                found.append(stored)
        return found

    def _run(self, db: Cursor, name: str) -> Run:
        row = db.execute(f"SELECT {kept.RUN} FROM runs WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise _no_run(name)
        return kept.run_of(row)

    def _id(self, db: Cursor, name: str) -> tuple[int, int, int]:
        """Its id, and how many entries and journal items it has."""
        row = db.execute("SELECT id, entries, items FROM runs WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise _no_run(name)
        return int(row[0]), int(row[1]), int(row[2])

    def _meta(self, key: str) -> str:
        query = "SELECT value FROM meta WHERE key = ?"
        return str(self._db.read(lambda db: db.execute(query, (key,)).fetchone())[0])

    def _epoch_now(self, db: Cursor) -> int:
        query = f"SELECT value FROM meta WHERE key = 'epoch'{self._db.alone}"
        return int(db.execute(query).fetchone()[0])

    def _write(self, body: Callable[[Cursor], T]) -> T:
        """Write as the life of the broker that has the store. Fails with STALE_EPOCH."""

        def fenced(db: Cursor) -> T:
            epoch = self._epoch_now(db)
            if self.epoch and epoch != self.epoch:
                raise ScenarioError(
                    Reason.STALE_EPOCH,
                    f"another broker has taken over the store {self.path} (epoch {epoch}; ours "
                    f"was {self.epoch})",
                    {"file": self.path, "epoch": str(epoch)},
                )
            return body(db)

        return self._db.write(fenced)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Say of what doesn't decode where it was."""
        try:
            yield
        except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
            raise self._damaged(what, str(error)) from error

    def _damaged(self, what: str, why: str) -> FederationError:
        return ScenarioError(
            Reason.STORE_FAILED,
            f"the broker's store {self.path} is damaged: {what}: {why}",
            {"file": self.path},
        )


class _Values:
    """Rows with the values of some variables, as one transaction has found them."""

    def __init__(self, names: Mapping[int, tuple[str, str]]) -> None:
        self.names = names
        self.batches: list[Any] = []
        self.chunks: list[tuple[Any, bytes]] = []

    def read_batches(self, db: Cursor, where: str, values: Sequence[object]) -> None:
        if self.names:
            query = f"SELECT first, last, data FROM batches WHERE {where} ORDER BY first"
            self.batches = db.execute(query, values).fetchall()

    def read_chunks(self, db: Cursor, where: str, values: Sequence[object]) -> None:
        """The chunks of these variables among those that the condition names."""
        query = f"SELECT {_CHUNK} FROM chunks WHERE {where} ORDER BY first"
        rows = db.execute(query, values).fetchall()
        self.read_vectors(db, [row for row in rows if row[1] in self.names])

    def read_vectors(self, db: Cursor, rows: Sequence[Any]) -> None:
        for low in range(0, len(rows), 500):
            part = rows[low : low + 500]
            marks = ", ".join("?" * len(part))
            query = f"SELECT chunk, data FROM vectors WHERE chunk IN ({marks})"
            found = dict(db.execute(query, [row[0] for row in part]).fetchall())
            self.chunks += ((row, found.get(row[0], b"")) for row in part)


def _database(path: str, patience_s: float) -> Database:
    if not path.startswith(("postgresql://", "postgres://")):
        return Sqlite(path, patience_s)
    try:
        from federation.broker.store.postgres import Postgres
    except ImportError:
        raise ScenarioError(
            Reason.MISSING_EXTRA,
            "a store in PostgreSQL needs psycopg: install multitwin[postgres]",
            {"extra": "postgres"},
        ) from None
    return Postgres(path, patience_s)


def _look(db: Cursor, id_: int, entries: int) -> _Open:
    rows = db.execute("SELECT owner, variable, id, lane FROM series WHERE run = ?", (id_,))
    names = {(kept.said(o), kept.said(v)): (series, lane) for o, v, series, lane in rows.fetchall()}
    query = "SELECT count(*), coalesce(sum(amount), 0), coalesce(sum(length(data)), 0) FROM batches"
    batches, values, size = db.execute(f"{query} WHERE run = ?", (id_,)).fetchone()
    return _Open(entries, names, int(batches), int(values), int(size))


def _names(
    db: Cursor, id_: int, owners: Collection[str], variables: Collection[str]
) -> dict[int, tuple[str, str]]:
    """The owner and the name of every variable, or of those that are asked for."""
    query = "SELECT id, owner, variable FROM series WHERE run = ?"
    values: list[object] = [id_]
    for column, wanted in (("owner", owners), ("variable", variables)):
        if wanted:
            query += f" AND {column} IN ({', '.join('?' * len(wanted))})"
            values += map(kept.plain, wanted)
    return {
        series: (kept.said(o), kept.said(v))
        for series, o, v in db.execute(query, values).fetchall()
    }


def _happened(db: Cursor, where: str, values: Sequence[object]) -> list[Any]:
    query = f"SELECT number, what, data FROM happenings WHERE {where} ORDER BY number"
    return db.execute(query, values).fetchall()


def _drop(db: Cursor, id_: int, journal_only: bool) -> int:
    tables = ["journal", "snapshots"]
    if not journal_only:
        query = "DELETE FROM vectors WHERE chunk IN (SELECT id FROM chunks WHERE run = ?)"
        db.execute(query, (id_,))
        tables += ["chunks", "batches", "series", "happenings"]
    count = sum(db.execute(f"DELETE FROM {t} WHERE run = ?", (id_,)).rowcount for t in tables)
    if not journal_only:
        count += db.execute("DELETE FROM runs WHERE id = ?", (id_,)).rowcount
    return count


def _number(stored: Stored) -> int:
    return stored.number


def _no_run(name: str) -> ScenarioError:
    return ScenarioError(Reason.RUN_NOT_FOUND, f"there is no run {name!r}", {"run": name})
