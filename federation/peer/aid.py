"""The desk at which a city promises aid and is promised some: on disk before it is said, signed,
and never without its guard.

All of it may be called from any thread; whoever writes has the desk for that time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from federation.core.aid import (
    Answer,
    Book,
    Deed,
    Held,
    Record,
    State,
    Terms,
    Word,
    deed_of,
    plain_of,
)
from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.city import City
from federation.peer.estate import Estate, FileEstate, Present
from federation.trail import Trail, read, repair, verify
from federation.twin import Vector
from federation.wire.credentials import Identity, Keyring, Role

HOLD_S = 60.0
"""For how long an offer holds unless somebody says otherwise."""

NONCE = range(16, 65)
"""How long a nonce may be."""

_log = logging.getLogger(__name__)


class AidGuard(Protocol):
    """Confirms or refuses a city's own part of a promise. It knows nothing of why."""

    def judge(
        self, terms: Terms, gives: bool, besides: Sequence[float]
    ) -> Sequence[tuple[str, str]]:
        """The rules that it breaks for the city to give this, or take it, each with a sentence;
        none when it may be. `besides[p]` is what the city has bound itself to give of it to others
        in period p, or takes from them."""


class NoGuard:
    """Of a city that has set no rules for aid: nothing may be."""

    def judge(
        self, terms: Terms, gives: bool, besides: Sequence[float]
    ) -> Sequence[tuple[str, str]]:
        return (("aid", "this city's guard has no rules for aid"),)


@dataclass(frozen=True)
class AidOptions:
    """How a city gives and takes aid.

    It signs under `identity`, whose name is the city's, and believes other cities that the
    `keyring` names with the role of a peer. What is on record is in `folder`.
    """

    estate: Estate | Path
    """What it bargains with, or the file of its goods."""
    identity: Identity
    keyring: Keyring
    folder: Path
    guard: AidGuard | Callable[[City], AidGuard] = field(default_factory=NoGuard)
    """What confirms this city's part of a promise, or makes what does for the city."""
    conversations: int = 4
    """At a time, with one city."""
    rounds: int = 100
    """Questions of one conversation."""
    deadline_s: float = 300.0
    """From its first question on."""
    hold_most_s: float = 900.0
    """For how long an offer is kept at most."""
    clock_ns: Callable[[], int] = time.time_ns
    """The wall clock (Unix), by which offers expire."""

    def at(self, city: City, present: Present) -> AidOptions:
        """The same for a city, of whose members a file may name ports and a guard actuators, and
        of whose run a file may name outputs."""
        found = self
        if isinstance(self.estate, Path):
            found = replace(found, estate=FileEstate(self.estate, city, present))
        if callable(self.guard):
            found = replace(found, guard=self.guard(city))
        return found


@dataclass(frozen=True, slots=True)
class Entered:
    """One record of the city's book, as it stands in the trail."""

    kind: ClassVar[str] = "aid"
    taken: Mapping[str, Any] | None = None
    made: Mapping[str, Any] | None = None


class AidDesk:
    """The book of a city with its trail. Only one process at a time may have it.

    Fails with TRAIL_IN_USE, and with TRAIL_BROKEN when what is on disk is not what was written;
    a torn end, of which nobody was told, is cut off. What can't be written down is not said: then
    everything that would be fails with STORE_FAILED.
    """

    def __init__(self, city: str, options: AidOptions) -> None:
        if options.identity.name != city:
            raise ScenarioError(
                Reason.NOT_AUTHORISED,
                f"{city} can't sign as {options.identity.name}: the key is to have its name",
            )
        self.city, self.options = city, options
        estate = options.estate
        self.estate: Estate = FileEstate(estate) if isinstance(estate, Path) else estate
        self.guard: AidGuard = NoGuard() if callable(options.guard) else options.guard
        self.book = Book(city, options.identity.attest)
        self.lock = threading.RLock()
        self._is_sound = True
        self._asked_for: dict[Terms, int] = {}
        """What other cities may offer, without an expiry, and until when it may be accepted."""
        for record in _records(options.folder):
            self.book.note(record)
        self._trail = Trail(options.folder, options.identity.attest)
        self._places_file = options.folder / "peers.json"
        self.places = _places(self._places_file)
        """Where the brokers of other cities were last, for who is in doubt after a restart."""

    def note_place(self, city: str, address: str) -> None:
        """Remember where a city's broker is."""
        if self.places.get(city) == address:
            return
        self.places = {**self.places, city: address}
        fresh = self._places_file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(self.places, sort_keys=True), encoding="utf-8")
            fresh.replace(self._places_file)
        except OSError as error:
            _log.warning("aid: where %s is could not be written down: %s", city, error)

    def in_doubt(self) -> frozenset[str]:
        """Cities that have not said yet whether what this one has accepted came in time."""
        return frozenset(h.terms.giver for h in self.all() if h.state is State.ACCEPTED)

    def close(self) -> None:
        with self.lock:
            self._trail.close()

    @property
    def now_ns(self) -> int:
        return self.options.clock_ns()

    # -- what is so ----------------------------------------------------------------------

    def held(self, id_: str) -> Held:
        """A promise that is on record. Fails with UNKNOWN_ENTITY."""
        found = self.book.held.get(id_)
        if found is None:
            text = f"there is no promise {id_[:12] or '(none)'} on record"
            raise ScenarioError(Reason.UNKNOWN_ENTITY, text, {"commitment": id_})
        return found

    def all(self) -> tuple[Held, ...]:
        """Every promise, in the order in which they came; waits for nobody."""
        return tuple(self.book.held.values())

    def besides(self, good: str, gives: bool, start_ns: int, periods_ns: Sequence[int]) -> Vector:
        """What is kept for others of a good, or is sure to come, in each period."""
        ends = np.cumsum([start_ns, *periods_ns]).tolist()
        look = self.book.kept if gives else self.book.coming
        with self.lock:
            return np.array([look(good, a, b) for a, b in pairwise(ends)])

    # -- what is said --------------------------------------------------------------------

    def check_guard(self, terms: Terms, gives: bool) -> None:
        """Fails with OUTSIDE_ENVELOPE, with the names of the rules that speak against it."""
        if found := self._refusals(terms, gives):
            _log.warning("aid of %s refused: %s", terms.good, "; ".join(map(": ".join, found)))
            names = ", ".join(dict.fromkeys(rule for rule, _ in found))
            raise ScenarioError(
                Reason.OUTSIDE_ENVELOPE,
                f"the guard of {self.city} refuses its part in {terms.good}: {names}",
                {"rules": names, "good": terms.good, "city": self.city},
            )

    def offer(self, some: Sequence[tuple[Terms, Sequence[float]]]) -> tuple[Deed, ...]:
        """Offer all of these or nothing; with each the most that the city has in each period.

        Fails with OUTSIDE_ENVELOPE, PLAN_INFEASIBLE, EXPIRED, WRONG_SHAPE or NOT_FINITE.
        """
        with self.lock:
            for terms, most in some:
                self.book.offer(terms, most, self.now_ns)
                self.check_guard(terms, gives=True)
            return tuple(
                deed
                for terms, most in some
                for deed in self._carry_out(self.book.offer(terms, most, self.now_ns))
            )

    def expect(self, terms: Terms, within_s: float) -> None:
        """Let another city offer this, whenever it expires; an offer that nobody expects is
        refused. It is forgotten when this process ends."""
        with self.lock:
            now_ns = self.now_ns
            self._asked_for = {t: u for t, u in self._asked_for.items() if u > now_ns}
            self._asked_for[_undated(terms)] = now_ns + round(within_s * 1e9)

    def forget(self, some: Iterable[Terms]) -> None:
        """Expect these offers no more."""
        with self.lock:
            for terms in some:
                self._asked_for.pop(_undated(terms), None)

    def hear(self, deeds: Iterable[Deed], by: str) -> tuple[Deed, ...]:
        """Take what a city has said; what is to be said to it.

        Fails with NOT_AUTHORISED when it did not sign that, and then nothing counts.
        """
        deeds = tuple(deeds)
        for deed in deeds:
            self.check_signed(deed, by)
        said: list[Deed] = []
        with self.lock:
            for deed in deeds:
                refusals: list[str] = []
                is_asked_for = True
                if deed.word is Word.OFFER and deed.commitment not in self.book.held:
                    assert deed.terms is not None
                    until_ns = self._asked_for.get(_undated(deed.terms), 0)
                    is_asked_for = self.now_ns < until_ns
                    if is_asked_for and (found := self._refusals(deed.terms, gives=False)):
                        names = ", ".join(dict.fromkeys(rule for rule, _ in found))
                        refusals.append(f"the guard of {self.city} refuses its part: {names}")
                answer = self.book.hear(deed, self.now_ns, refusals, is_asked_for=is_asked_for)
                said += self._carry_out(answer)
        return tuple(said)

    def decline(self, deeds: Iterable[Deed], why: str) -> tuple[Deed, ...]:
        """Refuse offers, so that nobody keeps anything for this city in vain."""
        with self.lock:
            now_ns = self.now_ns
            said = [self._carry_out(self.book.hear(deed, now_ns, (why,))) for deed in deeds]
        return tuple(deed for deeds in said for deed in deeds)

    def tick(self) -> None:
        """Withdraw what has expired; the next time, when the desk is busy."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            for answer in list(self.book.tick(self.now_ns)):
                self._carry_out(answer)
        except FederationError as error:
            _log.error("aid: %s", error)
        finally:
            self.lock.release()

    def state_delivered(
        self, id_: str, delivered: Sequence[float], run_ns: int
    ) -> tuple[Deed, ...]:
        """Put on record what was delivered; fails as `Book.state_delivered` does."""
        with self.lock:
            return self._carry_out(self.book.state_delivered(id_, delivered, run_ns))

    def open_with(self, city: str) -> tuple[Deed, ...]:
        with self.lock:
            return self.book.open_with(city)

    def check_signed(self, deed: Deed, by: str) -> None:
        """Fails with NOT_AUTHORISED unless `by` is the city that says it and has signed it."""
        keyring = self.options.keyring
        if not by or deed.by != by:
            text = f"{by or 'nobody'} can't say what {deed.by or 'nobody'} promises"
        elif not keyring.proves(by, Role.PEER, deed.message(), deed.signature):
            text = f"{by} is not known here as a peer, or has not signed this {deed.word}"
        else:
            return
        raise ScenarioError(Reason.NOT_AUTHORISED, text, {"identity": by})

    # -- within --------------------------------------------------------------------------

    def _refusals(self, terms: Terms, gives: bool) -> Sequence[tuple[str, str]]:
        """What the guard says; what breaks it is a no."""
        besides = self.besides(terms.good, gives, terms.start_ns, terms.periods_ns)
        try:
            return tuple(self.guard.judge(terms, gives, besides.tolist()))
        except FederationError as error:
            return ((error.reason.value, error.message),)
        except Exception as error:
            return (("form", f"it can't be judged: {type(error).__name__}: {error}"),)

    def _carry_out(self, answer: Answer) -> tuple[Deed, ...]:
        """Write down, and then let it be said."""
        if answer.record is not None:
            self._write(answer.record)
            self.book.note(answer.record)
        return answer.say

    def _write(self, record: Record) -> None:
        plain = Entered(
            *(None if deed is None else plain_of(deed) for deed in (record.taken, record.made))
        )
        if not self._is_sound:
            raise _unkept(self.options.folder, "a record before this one")
        try:
            self._trail.append(plain, self.now_ns / 1e9)
        except OSError as error:
            # half a line may be there: whoever starts again cuts it off
            self._is_sound = False
            raise _unkept(self.options.folder, str(error)) from None


def _records(folder: Path) -> Iterable[Record]:
    """What is on disk; a line that the end of a process has torn was never told to anybody."""
    if not folder.is_dir() or not any(folder.glob("*.jsonl")):
        return
    if any(finding.what == "torn" for finding in verify(folder)):
        repair(folder)
    for line in read(folder):
        yield record_of(line)


def record_of(line: Mapping[str, Any]) -> Record:
    """The record of a line of the trail. Fails with TRAIL_BROKEN."""
    try:
        body = line["body"]
        told = (None if body[key] is None else deed_of(body[key]) for key in ("taken", "made"))
        return Record(*told)
    except (KeyError, TypeError, ValueError) as error:
        text = f"a record of aid can't be read: {error!r}"
        raise ScenarioError(Reason.TRAIL_BROKEN, text) from None


def book_of(city: str, folder: Path) -> Book:
    """What is on record in a folder, for who only looks. Fails with MISSING_FILE, TRAIL_BROKEN."""

    def nobody(message: bytes) -> bytes:
        raise AssertionError("who looks says nothing")

    book = Book(city, nobody)
    for line in read(folder):
        book.note(record_of(line))
    return book


def _places(file: Path) -> Mapping[str, str]:
    """What was remembered; nothing when it can't be read: it only spares a person a command."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(city): str(address) for city, address in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _unkept(folder: Path, why: str) -> ScenarioError:
    return ScenarioError(
        Reason.STORE_FAILED,
        f"nothing can be promised before this city's broker is started again: {folder} did not "
        f"take {why}",
    )


def _undated(terms: Terms) -> Terms:
    return replace(terms, expires_ns=0)
