"""What a store asks of its database, and SQLite as the one that needs no server."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from federation.errors import FederationError, Reason, ScenarioError

T = TypeVar("T")

FREED = 1024
"""How many free pages SQLite gives back at a time, so that others get their turn."""


class Cursor(Protocol):
    """The statements of one transaction, with `?` for each value."""

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor: ...

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]], /) -> Cursor: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def rowcount(self) -> int: ...


class Database(Protocol):
    """Calls may come from any thread; they take turns. Every failure is a STORE_FAILED."""

    place: str
    """What errors call it; without a password."""
    types: Mapping[str, str]
    """How the tables' `{integer}`, 64 bits with a sign, and `{bytes}` are called here."""
    alone: str
    """What follows a SELECT of a row in `write`, so that other writers wait for the end."""

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor:
        """One statement outside of any transaction."""

    def write(self, body: Callable[[Cursor], T], purpose: str = "written") -> T:
        """All that `body` writes, once, or nothing. It may be called again after it failed."""

    def read(self, body: Callable[[Cursor], T]) -> T:
        """One consistent view: all statements of `body` see the same state."""

    def tables(self, db: Cursor) -> set[str]:
        """The names of all tables that are there, whoever made them."""

    def shrink(self) -> None:
        """Give back the room of what has been deleted."""

    def close(self) -> None: ...


class Sqlite:
    """One SQLite file in WAL mode, or ":memory:".

    What `write` has returned from is in the file, and a killed process loses none of it (a
    power cut may lose the last moments, never consistency: `synchronous=NORMAL`).
    """

    types: Mapping[str, str] = MappingProxyType({"integer": "INTEGER", "bytes": "BLOB"})
    alone = ""

    def __init__(self, path: str | Path, patience_s: float) -> None:
        self.place = str(path)
        self._turn = threading.Lock()
        try:
            self._db = sqlite3.connect(
                self.place, timeout=patience_s, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self._failed("opened", error) from None
        try:
            # these two only before the first table is there; long rows want long pages
            self._db.execute("PRAGMA page_size=16384")
            self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA journal_size_limit=67108864")
        except sqlite3.Error as error:
            self._db.close()
            raise self._failed("opened", error) from error

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Cursor:
        return self._db.execute(statement, values)

    def write(self, body: Callable[[Cursor], T], purpose: str = "written") -> T:
        with self._turn:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    found = body(self._db.cursor())
                    self._db.execute("COMMIT")
                except BaseException:
                    self._roll_back()
                    raise
            except sqlite3.Error as error:
                raise self._failed(purpose, error) from error
            return found

    def read(self, body: Callable[[Cursor], T]) -> T:
        with self._turn:
            try:
                self._db.execute("BEGIN")
                try:
                    return body(self._db.cursor())
                finally:
                    self._roll_back()
            except sqlite3.Error as error:
                raise self._failed("read", error) from error

    def tables(self, db: Cursor) -> set[str]:
        return {name for (name,) in db.execute("SELECT name FROM sqlite_master")}

    def shrink(self) -> None:
        try:
            free = 1
            while free:
                with self._turn:
                    self._db.execute(f"PRAGMA incremental_vacuum({FREED})").fetchall()
                    (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            with self._turn:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            raise self._failed("written", error) from error

    def close(self) -> None:
        with self._turn:
            self._db.close()

    def _roll_back(self) -> None:
        # a full disk has rolled back already
        if self._db.in_transaction:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _failed(self, purpose: str, error: sqlite3.Error) -> FederationError:
        return failed(self.place, purpose, error, sqlite=getattr(error, "sqlite_errorname", ""))


def failed(place: str, purpose: str, why: object, **metadata: str) -> FederationError:
    return ScenarioError(
        Reason.STORE_FAILED,
        f"the broker's store {place} can't be {purpose}: {why}",
        {"file": place, **metadata},
    )
