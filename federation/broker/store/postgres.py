"""A store's database in PostgreSQL: for brokers that have one, and keep going while it is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.pq import TransactionStatus

from federation.broker.store.database import Cursor, failed
from federation.errors import FederationError

T = TypeVar("T")

RETRY_S = 0.05
"""How long to wait before a database that is away is tried again; twice as long each time."""

LONGEST_RETRY_S = 1.0

ADOPTING = 0x6D756C7469
"""The number of the lock under which a store's tables are made."""

SHRINK_S = 600.0
"""How long PostgreSQL may take to clear up after a deletion."""

_PASSING = ("08", "57P01", "57P02", "57P03", "40001", "40P01", "53300")
"""SQLSTATEs after which a transaction is tried again: lost, shutting down, starting, deadlock."""


class _Connection(psycopg.Connection[Any]):
    """One that waits so long for an answer of the server and not for ever."""

    answer_s: float | None = None

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, self.answer_s if timeout is None else timeout)


class _Statements:
    """A psycopg cursor that takes `?` for each value."""

    def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
        self._cursor = cursor
        self.fetchone = cursor.fetchone
        self.fetchall = cursor.fetchall

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor:
        self._cursor.execute(statement.replace("?", "%s").encode(), values)
        return self

    def executemany(self, statement: str, rows: Any, /) -> Cursor:
        self._cursor.executemany(statement.replace("?", "%s").encode(), rows)
        return self

    def __iter__(self) -> Any:
        return iter(self._cursor)

    @property
    def rowcount(self) -> int:
        return self._cursor.rowcount


class Postgres:
    """A database of a PostgreSQL server of version 13 or later, over one connection.

    A connection that is lost is made again, and what was going on is done again, for
    `patience_s` from when the loss was noticed. Whether a transaction whose commit wasn't
    answered has been committed is asked of the server by the transaction's number, so that
    nothing is written twice.
    """

    types: Mapping[str, str] = MappingProxyType({"integer": "BIGINT", "bytes": "BYTEA"})
    alone = " FOR UPDATE"

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._turn = threading.Lock()
        self._db: _Connection | None = None
        self._closed = False
        self._was_in = False
        self._lost_s: float | None = None
        self.place = "postgresql://"
        try:
            parts = conninfo.conninfo_to_dict(url)
        except psycopg.Error:
            # what libpq says of it may have the password in it
            raise failed(self.place, "opened", "its URL can't be read") from None
        self._password = str(parts.get("password") or "")
        user = f"{parts['user']}@" if parts.get("user") else ""
        where = ":".join(str(parts[key]) for key in ("host", "port") if parts.get(key))
        self.place += f"{user}{where}/{parts.get('dbname') or ''}"

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor:
        with self._turn:
            return self._again("written", lambda db: self._cursor(db).execute(statement, values))

    def write(self, body: Callable[[Cursor], T], purpose: str = "written") -> T:
        number = ""  # of a transaction that may have been committed
        found: T

        def attempt(db: _Connection) -> T:
            nonlocal number, found
            if number and self._committed(db, number):
                return found
            number = ""
            db.execute("BEGIN")
            try:
                (mine,) = db.execute("SELECT pg_current_xact_id()::text").fetchone() or ("",)
                found = body(self._cursor(db))
                number = str(mine)
                db.execute("COMMIT")
            except BaseException:
                self._roll_back(db)
                raise
            return found

        with self._turn:
            return self._again(purpose, attempt)

    def read(self, body: Callable[[Cursor], T]) -> T:
        def attempt(db: _Connection) -> T:
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                return body(self._cursor(db))
            finally:
                self._roll_back(db)

        with self._turn:
            return self._again("read", attempt)

    def tables(self, db: Cursor) -> set[str]:
        # who comes second waits for the tables of the first
        db.execute("SELECT pg_advisory_xact_lock(?)", (ADOPTING,))
        query = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        return {name for (name,) in db.execute(query)}

    def shrink(self) -> None:
        """Leave the room to what is written next; tables that end in free room get shorter."""

        def attempt(db: _Connection) -> None:
            db.answer_s = SHRINK_S
            try:
                db.execute("VACUUM")
            finally:
                db.answer_s = self._answer_s

        with self._turn:
            self._again("written", attempt)

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._disconnect()

    # -- the connection ------------------------------------------------------------------

    @property
    def _answer_s(self) -> float:
        """The server gives up a lock that it doesn't get after the patience; then it says so."""
        return self._patience_s + 1.0

    def _again(self, purpose: str, attempt: Callable[[_Connection], T]) -> T:
        """Try it until it succeeds, fails for good, or the patience is over."""
        wait_s = RETRY_S
        while True:
            try:
                found = attempt(self._connected())
                self._lost_s = None
                return found
            except psycopg.Error as error:
                now_s = time.monotonic()
                if self._lost_s is None:
                    self._lost_s = now_s
                over = now_s + wait_s > self._lost_s + self._patience_s
                passing = self._is_passing(error)
                if passing:
                    self._disconnect()
                else:
                    self._lost_s = None
                if over or not passing:
                    raise self._failed(purpose, error) from None
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    def _is_passing(self, error: psycopg.Error) -> bool:
        """Who was never let in, as with a wrong password, is told so at once."""
        if self._closed or not self._was_in:
            return False
        if error.sqlstate is None:
            return isinstance(error, psycopg.OperationalError)
        return error.sqlstate.startswith(_PASSING)

    def _connected(self) -> _Connection:
        if self._closed:
            raise psycopg.OperationalError("it has been closed")
        if self._db is None or self._db.closed:
            self._db = None
            db = _Connection.connect(
                self._url,
                autocommit=True,
                connect_timeout=max(2, int(self._patience_s)),
                application_name="multitwin",
            )
            db.answer_s = self._answer_s
            self._db = db
            self._was_in = True
            db.execute(f"SET lock_timeout = {max(1, int(self._patience_s * 1000))}")
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _cursor(self, db: _Connection) -> Cursor:
        return _Statements(db.cursor(binary=True))

    def _committed(self, db: _Connection, number: str) -> bool:
        """Whether a transaction of that number is in the database.

        A server that crashed may not remember that it gave the number out: then nothing of the
        transaction was kept.
        """
        query = "SELECT pg_xact_status(%s::xid8)"
        try:
            (known,) = db.execute(query, (number,)).fetchone() or (None,)
        except psycopg.errors.InvalidParameterValue:  # "is in the future"
            return False
        if known == "in progress":
            raise psycopg.OperationalError(f"transaction {number} is still going on")
        return bool(known == "committed")

    def _roll_back(self, db: _Connection) -> None:
        """A connection that doesn't answer any more is in no state for that."""
        if db.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            with suppress(psycopg.Error):
                db.execute("ROLLBACK")

    def _failed(self, purpose: str, error: psycopg.Error) -> FederationError:
        text = " ".join(str(error).split()) or type(error).__name__
        if self._password:
            text = text.replace(self._password, "***")
        return failed(self.place, purpose, text, sqlstate=error.sqlstate or "")
