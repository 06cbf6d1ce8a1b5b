"""Says what became of two cities and of what went between them, from nothing but their records."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from federation.broker.outages import outages
from federation.broker.store import Store
from federation.core.ledger import ActionRecord, EventRecord, Quality, Record
from federation.twin import HOUR_NS, MINUTE_NS, Vector
from federation.v1 import aid_pb2, peer_pb2

STEP_NS = 5 * MINUTE_NS
FLOWS_MW = 0.5
"""Less than this over a tie line is nothing."""
END_NS = 1 << 62


@dataclass(frozen=True)
class Crossing:
    """What one city has of the other, against that one's own record."""

    delivered: int
    lost: int
    doubled: int


class CityRecord:
    """The record of one city's run, read from its broker's store."""

    def __init__(self, store: Path, run: str) -> None:
        self.store = Store(store)
        self.run = run

    def close(self) -> None:
        self.store.close()

    def values(self, owner: str, variable: str) -> list[tuple[Record, int]]:
        """Every revision of a variable, with when it was received (Unix, ns)."""
        found = self.store.history(self.run, owner, variable, 0, END_NS)
        return [(s.entry, s.receive_ns) for s in found if isinstance(s.entry, Record)]

    def events(self, owner: str) -> list[EventRecord]:
        found, _, _ = self.store.snapshot(self.run, members=[owner])
        return [s.entry for s in found if isinstance(s.entry, EventRecord)]

    def last(self, owner: str, variable: str) -> float:
        found = self.values(owner, variable)
        return float(found[-1][0].value[0]) if found else 0.0

    @property
    def settled_ns(self) -> int:
        return self.store.run(self.run).settled_ns

    def kpis(self) -> dict[str, float]:
        """Unserved energy, hours that hospitals were without supply (the unserved share of each
        times time), and deaths."""
        return {
            "unserved_mwh": round(self.last("energy", "unserved_energy_mwh"), 1),
            "hospital_hours_without_supply": round(self.hospital_hours(), 2),
            "deaths": self.last("medical", "deaths"),
            "received_mwh": round(self.flow_mwh(1.0), 1),
            "sent_mwh": round(self.flow_mwh(-1.0), 1),
        }

    def hospital_hours(self) -> float:
        found = self.values("energy", "hospital_supplied")
        ends = [record.time_ns for record, _ in found[1:]] + [self.settled_ns]
        return sum(
            float((1.0 - record.value).sum()) * (end_ns - record.time_ns) / HOUR_NS
            for (record, _), end_ns in zip(found, ends, strict=True)
        )

    def flows(self) -> list[tuple[int, int, Vector]]:
        """What flowed over the tie lines, from when to when (run time, ns; MW, + comes)."""
        found = [record for record, _ in self.values("energy", "tie_flow")]
        ends = [record.time_ns for record in found[1:]] + [self.settled_ns]
        return [(r.time_ns, end_ns, r.value) for r, end_ns in zip(found, ends, strict=True)]

    def flow_mwh(self, sign: float) -> float:
        return sum(
            float(np.maximum(sign * value, 0.0).sum()) * (end_ns - start_ns) / HOUR_NS
            for start_ns, end_ns, value in self.flows()
        )

    def orders(self) -> list[str]:
        """The events behind the exchanges that were ordered and took effect."""
        found = [stored.entry for stored in self.store.actions(self.run, "operator")]
        return [
            entry.action.cause
            for entry in found
            if isinstance(entry, ActionRecord) and entry.action.actuator.startswith("tie_")
        ]

    def acted_after_expiry(self, bound: Sequence[aid_pb2.Commitment]) -> int:
        """Steps at which power flowed over a tie line that no promise of its own book covers."""
        count = 0
        for start_ns, end_ns, value in self.flows():
            if np.abs(value).max() < FLOWS_MW:
                continue
            for time_ns in range(start_ns, end_ns, STEP_NS):
                count += not any(covers(each.terms, time_ns) for each in bound)
        return count

    def neighbour_good(self, neighbour: str, variable: str, after_unix_ns: int) -> int | None:
        """When the first good value of a neighbour came after an instant of the wall clock."""
        for record, receive_ns in self.values(neighbour, variable):
            if receive_ns > after_unix_ns and record.quality is Quality.GOOD:
                return receive_ns
        return None

    def late_marks(self, own: Sequence[str]) -> int:
        """How often one of its own twins was too late for its pace."""
        found = self.events("federation")
        return sum(e.event.kind == "member_stale" and e.event.entity in own for e in found)


def covers(terms: peer_pb2.Terms, time_ns: int) -> bool:
    """Whether a promise has anything to be given at an instant of the run."""
    start_ns = terms.start_ns
    for length_ns, quantity in zip(terms.periods_ns, terms.quantity, strict=True):
        if start_ns <= time_ns < start_ns + length_ns:
            return bool(quantity > 0.0)
        start_ns += length_ns
    return False


def crossing(reader: CityRecord, owner: CityRecord, name: str, variable: str) -> Crossing:
    """What the reader has of its neighbour's variable and events.

    Of values: at each of its instants it is to be told, then or later, what was so before it. Of
    events: each that the owner tells of, once. From when it first had a good value to when it last
    had one.
    """
    member, _, inner = variable.partition("_")
    own = [(r.time_ns, r.value.tobytes()) for r, _ in owner.values(member, inner)]
    own_ns = [time_ns for time_ns, _ in own]
    had = [record for record, _ in reader.values(name, variable)]
    good_ns = [record.time_ns for record in had if record.quality is Quality.GOOD]
    if not good_ns:
        return Crossing(0, 0, 0)
    since_ns, last_ns = good_ns[0], good_ns[-1]
    if had[-1].quality is Quality.GOOD:
        # a value that does not change is told once, and holds until there is another word
        last_ns = max(last_ns, reader.settled_ns - STEP_NS)

    def is_so(time_ns: int, value: Vector) -> bool:
        """Whether the owner's value was this just before the instant, or at it."""
        place = bisect.bisect_left(own_ns, time_ns)
        around = own[max(place - 1, 0) : place]
        around += [one for one in own[place : place + 1] if one[0] == time_ns]
        return value.tobytes() in {told for _, told in around}

    known: set[int] = set()
    ends = [record.time_ns for record in had[1:]] + [last_ns + STEP_NS]
    for record, end_ns in zip(had, ends, strict=True):
        # held: told in time, as what it was last, by an owner whose own run was not there yet
        if record.quality in (Quality.GOOD, Quality.HELD):
            span = range(record.time_ns, min(end_ns, last_ns + STEP_NS), STEP_NS)
            known.update(time_ns for time_ns in span if is_so(time_ns, record.value))
    for outage in outages(reader.store, reader.run):
        for late in outage.late if outage.peer == name else ():
            if variable in late.values and is_so(late.time_ns, late.values[variable]):
                known.add(late.time_ns)
    instants = range(since_ns, last_ns + 1, STEP_NS)
    missing = sum(time_ns not in known for time_ns in instants)
    told = Counter((e.event.kind, e.event.entity, e.event.text) for e in reader.events(name))
    wrote = Counter(
        (f"{member}_{e.event.kind}", e.event.entity, e.event.text)
        for e in owner.events(member)
        if since_ns <= e.time_ns < last_ns - STEP_NS and e.event.entity.startswith(TOLD_OF)
    )
    lost = wrote - told
    more = told - Counter(
        (f"{member}_{e.event.kind}", e.event.entity, e.event.text) for e in owner.events(member)
    )
    return Crossing(
        len(instants) - missing + told.total(),
        missing + lost.total(),
        more.total(),
    )


TOLD_OF = ("CA-", "CB-", "DC", "G_", "C", "T_", "U_", "system")
"""How the names of things begin of whose events the giver's policy tells."""


def orders(record: CityRecord, asked: Sequence[str]) -> Crossing:
    """Orders that a broker has taken, by the events that it answered, and that took effect."""
    one, other = Counter(asked), Counter(record.orders())
    more = other.total() - len(other)
    return Crossing((one & other).total(), (one - other).total(), more)


def promises(here: Sequence[aid_pb2.Commitment], there: Sequence[aid_pb2.Commitment]) -> Crossing:
    """Promises that both books have as bound, those that one has alone, and those had twice."""
    state = aid_pb2.Commitment.STATE_BOUND
    one = Counter(c.id for c in here if c.state == state)
    other = Counter(c.id for c in there if c.state == state)
    doubled = sum(n - 1 for book in (one, other) for n in book.values())
    return Crossing(len(one.keys() & other.keys()), len(one.keys() ^ other.keys()), doubled)
