"""Tells when a run went on without somebody, from what is on its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from federation.broker.memory import ABSENCE, LATE, read_absence, read_late
from federation.broker.store import Note, Store, Stored
from federation.core.exchange import FEDERATION
from federation.core.ledger import EventRecord, Quality, Record
from federation.errors import FederationError, Reason
from federation.twin import HOUR_NS, NOTHING, Vector
from federation.v1 import broker_pb2
from federation.wire import codec


@dataclass(frozen=True, slots=True)
class Late:
    """Values of one instant of an outage that came when it was over."""

    time_ns: int
    receive_ns: int
    values: Mapping[str, Vector] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Outage:
    """A span of a run in which it went on without a member; or in which another city, that looks
    at the run, went on without it.

    `end_ns` is the first instant at which all was well again, None while it is not. Unix times
    are those of this broker: of a member when the outage was noticed and when it was over; of a
    reader when it was last heard before, if that is known, and when it was heard again.
    """

    peer: str
    is_reader: bool
    start_ns: int
    end_ns: int | None
    start_unix_ns: int | None
    end_unix_ns: int | None
    why: str
    variables: tuple[str, ...]
    quality: Quality = Quality.GOOD
    late: tuple[Late, ...] = ()


_BEGINS = {f"member_{quality.name.lower()}": quality for quality in Quality if quality}
_ENDS = f"member_{Quality.GOOD.name.lower()}"


def outages(store: Store, run: str) -> list[Outage]:
    """All outages of a run, in the order of their beginnings. Fails with RUN_NOT_FOUND.

    What came late is told of as long as the journal of the run is kept.
    """
    found = list(_of_members(store, run))
    late: dict[str, list[Late]] = {}
    for note in _notes(store, run):
        if note.kind == LATE:
            member, receive_ns, results = read_late(note)
            known = late.setdefault(member, [])
            known += [Late(result.time_ns, receive_ns, result.outputs) for result in results]
        else:
            absence = read_absence(note)
            why = f"{absence.reader} went on without this city, as it said when it was back"
            found.append(
                Outage(
                    absence.reader,
                    True,
                    absence.start_ns,
                    absence.end_ns,
                    absence.heard_unix_ns,
                    absence.back_unix_ns,
                    why,
                    absence.variables,
                )
            )
    told = [
        replace(o, late=tuple(each for each in late.get(o.peer, ()) if _is_within(o, each)))
        for o in found
    ]
    return sorted(told, key=lambda outage: (outage.start_ns, outage.is_reader, outage.peer))


def _is_within(outage: Outage, late: Late) -> bool:
    is_over = outage.end_ns is not None and late.time_ns >= outage.end_ns
    return not outage.is_reader and outage.start_ns <= late.time_ns and not is_over


def _notes(store: Store, run: str) -> Iterator[Note]:
    try:
        for _, item in store.journal(run):
            if isinstance(item, Note) and item.kind in (LATE, ABSENCE):
                yield item
    except FederationError as error:
        if error.reason is not Reason.JOURNAL_PRUNED:
            raise


def _of_members(store: Store, run: str) -> Iterator[Outage]:
    """What the ledger says of changes of quality. Where one follows the other, both are told of."""
    entries, _, _ = store.snapshot(run, members=[FEDERATION])
    changes = [
        (stored, stored.entry)
        for stored in entries
        if isinstance(stored.entry, EventRecord)
        and (stored.entry.event.kind in _BEGINS or stored.entry.event.kind == _ENDS)
    ]
    known: dict[str, list[str]] = {}
    for member, variable in store.latest(run):
        known.setdefault(member, []).append(variable)
    is_open: dict[str, Outage] = {}
    for stored, entry in changes:
        member = entry.event.entity
        if (begun := is_open.pop(member, None)) is not None:
            yield replace(begun, end_ns=entry.time_ns, end_unix_ns=stored.receive_ns)
        quality = _BEGINS.get(entry.event.kind)
        if quality is not None:
            held = _held(store, run, member, known.get(member, ()), entry.time_ns)
            span = (entry.time_ns, None, stored.receive_ns, None)
            text = entry.event.text
            is_open[member] = Outage(member, False, *span, text, held, quality)
    yield from is_open.values()


def _held(
    store: Store, run: str, member: str, variables: list[str] | tuple[str, ...], time_ns: int
) -> tuple[str, ...]:
    """The variables of a member of which the ledger says at an instant that they are not good."""

    def is_held(found: list[Stored]) -> bool:
        return any(isinstance(s.entry, Record) and s.entry.quality for s in found)

    return tuple(
        variable
        for variable in variables
        if is_held(store.history(run, member, variable, time_ns, time_ns))
    )


# -- for the wire, and in words ------------------------------------------------------------


def encode(outage: Outage) -> broker_pb2.Outage:
    message = broker_pb2.Outage(
        peer=outage.peer,
        is_reader=outage.is_reader,
        start_ns=outage.start_ns,
        end_ns=outage.end_ns,
        why=outage.why,
        variables=outage.variables,
    )
    if outage.start_unix_ns is not None:
        message.start_time.FromNanoseconds(outage.start_unix_ns)
    if outage.end_unix_ns is not None:
        message.end_time.FromNanoseconds(outage.end_unix_ns)
    if not outage.is_reader:
        message.quality = codec.encode_quality(outage.quality)
    for late in outage.late:
        for variable, value in late.values.items():
            entry = message.late_values.add(time_ns=late.time_ns, member=outage.peer)
            entry.receive_time.FromNanoseconds(late.receive_ns)
            entry.value.values.variable = variable
            entry.value.values.values = codec.encode_vector(value)
            entry.value.quality = broker_pb2.LedgerEntry.QUALITY_GOOD
    return message


def words(answer: broker_pb2.ListOutagesResponse) -> str:
    """A line for each outage."""
    lines = []
    for o in answer.outages:
        quality = broker_pb2.LedgerEntry.Quality.Name(o.quality).removeprefix("QUALITY_").lower()
        what = "was without this city" if o.is_reader else f"was {quality}"
        until = f"until {o.end_ns / HOUR_NS:.4f} h" if o.HasField("end_ns") else "until now"
        line = f"{o.peer} {what} from {o.start_ns / HOUR_NS:.4f} h {until}: {o.why}"
        if o.variables:
            line += f"; {', '.join(o.variables)}"
        if o.late_values:
            line += f"; {len(o.late_values)} values of then came later"
        lines.append(line)
    return "\n".join(lines) or "nobody was away"
