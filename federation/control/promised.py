"""Brings into force what a city has promised to others, and others to it: leased setpoints.

A promise says what flows and when; the rules of its good say which actuator that sets. Each part is
judged by the guard once more when it acts, and no lease outlasts what it is for: who promised
less from then on, or nothing, need not be alive to end it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from federation.control import audit
from federation.control.deeds import Deeds
from federation.control.draft import lease_ns
from federation.control.mandate import Mandate
from federation.control.rules import AidRule
from federation.control.situation import Forecast, Place
from federation.control.view import ANSWER_S, Holding, LiveView, variable_of
from federation.core.aid import Terms
from federation.core.bundle import Bundle, Priority, Setpoint
from federation.errors import FederationError
from federation.twin import MINUTE_NS
from federation.v1 import aid_pb2, aid_pb2_grpc
from federation.wire.aid import decode_terms

FIRST_SHARE = 4
"""A lease begins within this part of the time that it is for."""

TAIL_SHARE = 16
"""No lease is begun or renewed for so small a part at the end of what is due."""


Foreseen = Callable[[Bundle], Awaitable[Forecast | None]]
"""What is expected of a bundle, where a rule asks for that."""


async def unforeseen(bundle: Bundle) -> Forecast | None:
    """Of who can look at nothing but the present."""
    return None


class Book(Protocol):
    """Knows what is promised by now."""

    async def bound(self) -> tuple[Terms, ...]:
        """The promises that both sides are bound by."""
        ...


@dataclass(frozen=True, slots=True)
class Due:
    """What promises come to at one place: a value from one instant of the run until another."""

    value: float
    since_ns: int
    until_ns: int

    @property
    def tail_ns(self) -> int:
        return (self.until_ns - self.since_ns) // TAIL_SHARE


def due(
    bound: Iterable[Terms], city: str, rules: Mapping[str, AidRule], time_ns: int
) -> dict[Place, Due]:
    """What the promises of a city set at an instant, by place; nothing where none is for then."""
    spans: dict[Place, list[tuple[int, int, float]]] = {}
    for terms in bound:
        rule = rules.get(terms.good)
        name = "" if rule is None else rule.sets if terms.giver == city else rule.takes_set
        if rule is not None and name:
            sign = rule.gives_sign if terms.giver == city else 1
            place = (*variable_of(name), rule.entity)
            spans.setdefault(place, []).extend((b, e, sign * q) for b, e, q in terms.spans() if q)
    found = {}
    for place, some in spans.items():
        value = _total(some, time_ns)
        if value is not None:
            edges = sorted({t for begin, end, _ in some for t in (begin, end)})
            until_ns = next(t for t in edges if t > time_ns and _total(some, t) != value)
            before = (t for t in reversed(edges) if t <= time_ns and _total(some, t - 1) != value)
            found[place] = Due(value, next(before), until_ns)
    return found


def _total(spans: Iterable[tuple[int, int, float]], time_ns: int) -> float | None:
    amounts = [amount for begin, end, amount in spans if begin <= time_ns < end]
    return sum(amounts) if amounts else None


def begins_within_ns(
    due: Due, held: Holding | None, now_ns: int, life_ns: int, most_ns: int
) -> int | None:
    """Within what time a setpoint is to begin that does what is due; None when there is no need.

    A bundle lives `life_ns` at most, and a lease `most_ns`. A lease counts from its beginning,
    which is not known before, so it is for what is left after the latest one. Each renewal at
    least halves what is then missing at the end, and the last bit of it is let go.
    """
    if held is None or held.value != due.value:
        if due.until_ns - now_ns <= due.tail_ns:
            return None
        found = min(life_ns, (due.until_ns - now_ns) // FIRST_SHARE)
        return found if held is None else min(found, held.until_ns - 1 - now_ns)
    missing_ns, left_ns = due.until_ns - held.until_ns, held.until_ns - now_ns
    soon_ns = min(missing_ns, 2 * life_ns, most_ns // 2)
    if missing_ns <= due.tail_ns or left_ns > soon_ns:
        return None
    return min(life_ns, left_ns // 2)


class BrokerBook:
    """What the city's broker has on record. Fails as a broker does."""

    def __init__(self, view: LiveView) -> None:
        self._view = view
        self._aid: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(view.channel)

    async def bound(self) -> tuple[Terms, ...]:
        request = aid_pb2.ListCommitmentsRequest()
        with self._view.asking():
            answer = await self._aid.ListCommitments(request, timeout=ANSWER_S)
        is_bound = aid_pb2.Commitment.STATE_BOUND
        return tuple(decode_terms(c.terms) for c in answer.commitments if c.state == is_bound)


class Promised:
    """Keeps the promises of one city in one run, as far as its guard lets it."""

    def __init__(
        self, mandate: Mandate, deeds: Deeds, city: str, book: Book, foreseen: Foreseen = unforeseen
    ) -> None:
        self._mandate, self._deeds, self._foreseen = mandate, deeds, foreseen
        self._city, self._book = city, book
        self._author = f"aid-of-{city}"
        self._told = ""
        """What was said last of why something is not in force."""

    async def keep(self) -> None:
        """Bring into force what is due and is not so yet. What goes wrong is on record, once."""
        try:
            why = await self._keep()
        except FederationError as error:
            why = str(error)
        if why and why != self._told:
            self._mandate.noted("a promise is not kept", {"why": why}, "")
        self._told = why

    async def _keep(self) -> str:
        mandate = self._mandate
        bound = await self._book.bound()
        wanted = due(bound, self._city, mandate.rules.aid, mandate.view.settled_ns)
        if not wanted:
            return ""
        desks = await mandate.view.desks()
        whys = []
        for place, each in sorted(wanted.items()):
            bundle = self._bundle(place, each, desks.holdings.get(place))
            if bundle is None:
                continue
            forecast = await self._foreseen(bundle)
            refusals = mandate.guard.admit(bundle, await mandate.situation(), forecast)
            if refusals:
                whys += [f"{'.'.join(place)}: {r.rule}: {r.sentence}" for r in refusals]
                continue
            detail = {"place": list(place), "value": each.value, "until_ns": each.until_ns}
            mandate.note(audit.Noted("a promise is due", detail, bundle.id))
            await self._deeds.carry_out(bundle.id, bundle)
            mandate.save()
        return "; ".join(whys)

    def _bundle(self, place: Place, due: Due, held: Holding | None) -> Bundle | None:
        rules, now_ns = self._mandate.rules, self._mandate.view.settled_ns
        # without an end, and so without a rule, the guard lets nothing pass, and says so
        most_ns = lease_ns(self._mandate, *place[:2]) or due.until_ns
        begins_ns = begins_within_ns(due, held, now_ns, round(rules.life_min * MINUTE_NS), most_ns)
        if begins_ns is None or begins_ns <= 0:
            return None
        return Bundle(
            f"{self._author}/{now_ns}/{'.'.join(place)}",
            self._mandate.view.run,
            (Setpoint(*place, due.value, min(due.until_ns - now_ns - begins_ns, most_ns)),),
            Priority.AUTONOMOUS,
            now_ns,
            now_ns + begins_ns,
            self._author,
        )
