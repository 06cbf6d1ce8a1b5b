"""The conservative coordinator: decides who may step, how far, and with which inputs.

A state machine without waits: `start` and `handle` return effects, a shell carries them out
and feeds back what happened. The rule it keeps is one sentence: a unit (a member, or a loop
of instant couplings) may step at t when no member outside it that feeds it can still publish
something that would be visible at t. With E(u) the earliest instant at which unit u can still
publish, and d the delay of a coupling, that is E(source) + d > t for every coupling into u
(Chandy and Misra 1979; Fujimoto, Parallel and Distributed Simulation Systems, 2000). A coupling
that comes with a member that joins at T brings at T what was published before.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from federation.core.coupling import Arrival, Wiring, wire
from federation.core.envelope import Pool
from federation.core.exchange import NEVER, Exchange, Member, change_id
from federation.core.ledger import ActionRecord, Entry, EventRecord
from federation.core.messages import (
    Aborted,
    Accepted,
    Commit,
    Degraded,
    Effect,
    Failed,
    Finished,
    Grant,
    Input,
    Joined,
    Left,
    Ordered,
    Refused,
    Replaced,
    Request,
)
from federation.core.waits import Wait, find_waits
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import NOTHING, Action, Event, StepInput, StepResult

OPERATOR = "operator"
"""Under which name orders of people stand in the ledger."""

OPERATOR_RANK = -1
"""A person's order comes before all steps of its instant."""

FRAME_STEPS = 64
"""How many steps a grant carries at most unless told otherwise."""

SETTLE_EVERY = 512
"""Ledger entries to gather at least before they are put in order; a matter of speed only."""


@dataclass(frozen=True, slots=True)
class LoopPolicy:
    """How a loop of instant couplings is iterated to a fixed point.

    It has converged when every input of the loop moves by at most
    `tolerance * (1 + |value|)` between micro-steps. `relaxation` in (0, 1] is the share of
    each move that is taken.
    """

    tolerance: float = 1e-9
    limit: int = 100
    relaxation: float = 1.0


@dataclass(slots=True)
class _Loop:
    """The iteration of one loop unit at one instant."""

    time_ns: int
    due: frozenset[str]
    """Who steps at this instant whatever the others do."""
    queue: deque[Member]
    """Who is to be looked at in this pass; in the first one all, for a member may be woken by one
    before it."""
    micro: int = 0
    stepped: dict[str, StepResult] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    """Per member the number of its micro-steps so far."""
    actions: dict[str, tuple[Action, ...]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Unit:
    """A unit of the wiring with where it stands in time."""

    index: int
    members: list[Member]
    is_loop: bool
    wakes: bool
    echo_ns: int
    inward: list[tuple[_Unit, int, int]] = field(default_factory=list)
    """The units that feed it, each with the shortest delay_ns, and since when both are there."""
    outward: list[_Unit] = field(default_factory=list)
    wakers: list[tuple[_Unit, int, int]] = field(default_factory=list)
    """The units that it feeds and that wake on input, in the same way."""
    loop: _Loop | None = None
    until_ns: int = NEVER
    """None of its members makes a step at this instant or later."""
    own_ns: int = 0
    """The earliest step that is already sure to be possible."""
    earliest_ns: int = 0
    """The earliest step that is possible at all: nothing can be published before."""
    parked: int = 0
    """How many steps it could be granted when it was last put off for others."""

    def sure_ns(self) -> int:
        """What `own_ns` should be now."""
        if self.loop is not None:
            return self.loop.time_ns
        if len(self.members) == 1:
            return _next_step(self.members[0])
        return min(map(_next_step, self.members))

    def reached_ns(self) -> int:
        """The last instant at which a member of it may have stepped already."""
        if self.loop is not None:
            return self.loop.time_ns
        return max(
            member.granted[-1].time_ns if member.granted else member.reached_ns
            for member in self.members
        )


class Coordinator:
    """Runs a wiring from time 0 up to and including `horizon_ns`.

    `frame_steps` bounds how many steps one grant may carry. The ledger, and so the digest,
    does not depend on it, nor on the order in which answers arrive.
    """

    def __init__(
        self,
        wiring: Wiring,
        horizon_ns: int,
        *,
        loop: LoopPolicy | None = None,
        pools: tuple[Pool, ...] = (),
        frame_steps: int = FRAME_STEPS,
    ) -> None:
        self.wiring = wiring
        self.horizon_ns = horizon_ns
        self._pools = pools
        self._exchange = Exchange(wiring, pools)
        self.ledger = self._exchange.ledger
        self._policy = loop or LoopPolicy()
        self._frame_steps = frame_steps
        self._members = self._exchange.members
        self._units: list[_Unit] = []
        self._front: list[tuple[int, int]] = []
        """A heap of (earliest instant, unit); entries that are out of date are passed over."""
        self.in_flight: int | None = None
        """How many grants may be out at a time, None for any number. With fewer, a grant waits
        until it carries more steps: what the frames of quick members cost is shared by more. It
        changes no result. See `limit`."""
        self._flying = 0
        self._parked: list[tuple[int, int]] = []
        """A heap of units that were put off, those with most steps first; see `_Unit.parked`."""
        self._build()
        self._leaving: list[Member] = []
        """Members that have an end ahead of them."""
        self._settle_at = SETTLE_EVERY
        self._over = False
        self._orders_taken = 0
        """The highest number of an order."""

    # -- the two doors ---------------------------------------------------------------

    def start(self, requests: Iterable[Request] = ()) -> tuple[Effect, ...]:
        """The grants that can be given before anything has happened.

        `requests` are known beforehand, with the instants at which they take effect.
        """
        self._refresh(self._units)
        verdicts = []
        for request in requests:
            verdicts.append(self._decide(request))
            self._refresh(self._units)
        return (*verdicts, *self._advance(self._units))

    def handle(self, event: Input) -> tuple[Effect, ...]:
        """Take one event and say what follows from it.

        The work grows with the couplings of the member that answered and, where members wake
        on input, with the part of the federation that it may wake; not with its size.
        """
        if self._over:
            return (_OVER,) if isinstance(event, Request) else ()
        if isinstance(event, Failed):
            return self._abort(event.error)
        if isinstance(event, Request):
            return self._answer(event)
        if isinstance(event, Degraded):
            self._exchange.degrade(event)
            return ()
        if isinstance(event, Replaced):
            self._exchange.replace(event)
            return ()
        name, results = event
        member = self._members[name]
        try:
            self._check_answer(member, results)
            unit = self._units[member.unit]
            if unit.loop is not None:
                return self._continue_loop(unit, unit.loop, member, results[0])
            for result in results:
                self._exchange.absorb(member, result)
                member.set_next(result)
            member.reached_ns = member.granted[-1].time_ns
            member.granted = ()
            self._flying -= 1
            return self._advance(self._moved(unit))
        except FederationError as error:
            return self._abort(error)

    def limit(self, in_flight: int | None) -> tuple[Effect, ...]:
        """Change how many grants may be out; what may be granted now."""
        self.in_flight = in_flight
        return () if self._over else self._advance(())

    @property
    def now_ns(self) -> int:
        """Every instant before this is settled for all members."""
        front, units = self._front, self._units
        while front[0][0] != units[front[0][1]].earliest_ns:
            heapq.heappop(front)
        return min(front[0][0], self.horizon_ns + 1)

    def settle(self) -> tuple[Entry, ...]:
        """What is settled and was not committed yet; nothing earlier can come any more."""
        return self._settle(self.now_ns)

    def fork(self, horizon_ns: int) -> Coordinator:
        """Another one that stands where this one does, which has finished, and goes on from there
        to a later horizon; `start` begins it. Its ledger has no digest."""
        assert self._over
        other = Coordinator(
            self.wiring,
            horizon_ns,
            loop=self._policy,
            pools=self._pools,
            frame_steps=self._frame_steps,
        )
        other._exchange.adopt(self._exchange, hashes=False)
        other.ledger = other._exchange.ledger
        other._orders_taken = self._orders_taken
        return other

    def wake(self, member: str, next_ns: int | None) -> None:
        """Before `start`: let a member that asks for its instants have asked for this one."""
        found = self._members[member]
        if not found.period_ns:
            found.next_ns = NEVER if next_ns is None else next_ns

    def waits(self) -> tuple[Wait, ...]:
        """What each member that has not come to its end is doing, and who holds it back."""
        return find_waits(self._units, _next_step, self.wiring, self.horizon_ns)

    def present(self, member: str) -> tuple[StepInput, int]:
        """All that a member was given by its last step, as one step; and its events so far.

        The step is that of the last grant, or one at -1 when there was none.
        """
        found = self._members[member]
        reached_ns = found.granted[-1].time_ns if found.granted else found.reached_ns
        inputs = {inlet.name: inlet.value for inlet in found.inlets}
        causes = {inlet.name: dict(inlet.causes) for inlet in found.inlets if inlet.causes}
        return StepInput(reached_ns, 0, inputs, causes), len(found.own_events)

    # -- construction ----------------------------------------------------------------

    def _build(self) -> None:
        """Build the units of the wiring that are not there yet, at its end."""
        wiring, units = self.wiring, self._units
        known = len(units)
        for unit, echo_ns in zip(wiring.units[known:], wiring.echo_ns[known:], strict=True):
            members = [self._members[name] for name in unit.members]
            wakes = any(member.wakes for member in members)
            units.append(_Unit(unit.index, members, unit.is_loop, wakes, echo_ns))
            heapq.heappush(self._front, (0, unit.index))
        for target, sources in zip(units, wiring.inward, strict=True):
            for index, delay_ns in sources:
                source = units[index]
                if index < known and target.index < known:
                    continue
                since_ns = max(source.members[0].since_ns, target.members[0].since_ns)
                target.inward.append((source, delay_ns, since_ns))
                source.outward.append(target)
                if target.wakes:
                    source.wakers.append((target, delay_ns, since_ns))

    # -- earliest instants and readiness -----------------------------------------------

    def _moved(self, unit: _Unit) -> Iterable[_Unit]:
        """Units whose right to step may have changed after `unit` moved."""
        if not unit.wakers and not unit.wakes:
            earliest_ns = unit.own_ns = unit.sure_ns()
            if earliest_ns != unit.earliest_ns:
                unit.earliest_ns = earliest_ns
                heapq.heappush(self._front, (earliest_ns, unit.index))
            return (unit, *unit.outward)
        seen = self._refresh((unit, *(target for target, _, _ in unit.wakers)))
        return dict.fromkeys(chain(seen, *(other.outward for other in seen)))

    def _refresh(self, units: Iterable[_Unit]) -> Collection[_Unit]:
        """Bring the earliest instants up to date after `units` moved or were sent something.

        A unit that wakes on input can be woken by anything upstream, so its earliest instant
        ends a shortest path from what is sure. Those whose shortest path may have led through
        `units` are found anew by Dijkstra's algorithm, from what borders on them (Ramalingam
        and Reps 1996); all others keep theirs. Returns the units that were looked at.
        """
        seen: dict[int, _Unit] = {}
        before: dict[int, int] = {}
        stack = list(units)
        for unit in stack:
            unit.own_ns = unit.sure_ns()
        while stack:
            unit = stack.pop()
            if unit.index in seen:
                continue
            seen[unit.index] = unit
            for target, delay_ns, since_ns in unit.wakers:
                if target.earliest_ns == _visible_ns(unit.earliest_ns, delay_ns, since_ns):
                    stack.append(target)
        heap = []
        for unit in seen.values():
            before[unit.index] = unit.earliest_ns
            earliest_ns = unit.own_ns
            if unit.wakes:
                for source, delay_ns, since_ns in unit.inward:
                    woken_ns = _visible_ns(source.earliest_ns, delay_ns, since_ns)
                    if source.index not in seen and woken_ns < unit.until_ns:
                        earliest_ns = min(earliest_ns, woken_ns)
            heap.append((earliest_ns, unit.index))
        for earliest_ns, index in heap:
            self._units[index].earliest_ns = earliest_ns
        heapq.heapify(heap)
        while heap:
            earliest_ns, index = heapq.heappop(heap)
            unit = self._units[index]
            if earliest_ns > unit.earliest_ns:
                continue
            for target, delay_ns, since_ns in unit.wakers:
                woken_ns = _visible_ns(earliest_ns, delay_ns, since_ns)
                if woken_ns < target.earliest_ns and woken_ns < target.until_ns:
                    before.setdefault(target.index, target.earliest_ns)
                    seen[target.index] = target
                    target.earliest_ns = woken_ns
                    heapq.heappush(heap, (target.earliest_ns, target.index))
        for index, earliest_ns in before.items():
            unit = seen[index]
            if unit.earliest_ns != earliest_ns:
                heapq.heappush(self._front, (unit.earliest_ns, index))
        return seen.values()

    def _advance(self, candidates: Iterable[_Unit]) -> tuple[Effect, ...]:
        """Grant whatever can be granted among `candidates` and commit what is settled."""
        effects: list[Effect] = []
        limit = self.in_flight
        if limit is None:
            again = list(candidates)
            for _, index in self._parked:
                unit = self._units[index]
                unit.parked = 0
                again.append(unit)
            self._parked.clear()
            again.reverse()
            while again:
                again.extend(self._try(again.pop(), effects))
        else:
            for unit in candidates:
                self._park(unit)
            while self._flying < limit and self._parked:
                room, index = heapq.heappop(self._parked)
                unit = self._units[index]
                if unit.parked == -room:
                    unit.parked = 0
                    for other in self._try(unit, effects):
                        self._park(other)
        now_ns = self.now_ns
        if now_ns > self.horizon_ns:
            self._over = True
            effects.extend(_commit(self._settle(NEVER)))
            effects.append(Finished(self.ledger.digest()))
        elif self.ledger.waiting >= self._settle_at:
            effects.extend(_commit(self._settle(now_ns)))
            # what had to stay is not looked through again at every event
            self._settle_at = max(SETTLE_EVERY, 2 * self.ledger.waiting)
        return tuple(effects)

    def _settle(self, before_ns: int) -> tuple[Entry, ...]:
        """Commit what is of instants before `before_ns`, all of which are behind all members."""
        if self._leaving:
            for member in self._leaving:
                if member.until_ns < before_ns:
                    self._exchange.hold(member)
            self._leaving = [m for m in self._leaving if m.until_ns >= before_ns]
        return self.ledger.settle(before_ns)

    def _park(self, unit: _Unit) -> None:
        """Put off what a unit may do now, if anything, behind those that may do more."""
        room = self._room(unit)
        if room != unit.parked:
            unit.parked = room
            if room:
                heapq.heappush(self._parked, (-room, unit.index))

    def _bound_ns(self, unit: _Unit) -> int:
        """A unit may step at every instant before this."""
        bound_ns = min(self.horizon_ns + 1, unit.until_ns)
        for source, delay_ns, since_ns in unit.inward:
            limit_ns = source.earliest_ns + delay_ns
            if source.earliest_ns < since_ns:
                limit_ns = since_ns
            if limit_ns < bound_ns:
                bound_ns = limit_ns
        return bound_ns

    def _room(self, unit: _Unit) -> int:
        """How many steps a grant to this unit would carry now."""
        member = unit.members[0]
        if unit.loop is not None or member.granted:
            return 0
        own_ns, bound_ns = unit.own_ns, self._bound_ns(unit)
        if own_ns >= bound_ns:
            return 0
        if unit.is_loop or not member.period_ns or member.wakes or member.acts:
            return 1
        span_ns = min(bound_ns - own_ns, unit.echo_ns)
        return min(-(-span_ns // member.period_ns), self._frame_steps)

    def _grant(self, member: Member, steps: tuple[StepInput, ...], effects: list[Effect]) -> None:
        member.granted = steps
        self._flying += 1
        effects.append(Grant(member.name, steps))

    def _try(self, unit: _Unit, effects: list[Effect]) -> Iterable[_Unit]:
        """Grant `unit` what it may do now; the units to look at again if it only caught up."""
        time_ns, bound_ns = unit.own_ns, self._bound_ns(unit)
        if time_ns >= bound_ns or unit.loop is not None:
            return ()
        if unit.is_loop:
            due = frozenset(m.name for m in unit.members if _next_step(m) == time_ns)
            unit.loop = _Loop(time_ns, due, deque(unit.members))
            return self._next_in_loop(unit, unit.loop, effects)
        member = unit.members[0]
        if member.granted:
            return ()
        given = member.collect(time_ns)
        if not member.period_ns or member.wakes or member.acts:
            # only a fixed period says already now when the next step is
            if member.wakes and member.next_ns != time_ns and _is_empty(given):
                member.put_off(given)
                return self._moved(unit)
            self._grant(member, (given,), effects)
            return ()
        steps = [given]
        bound_ns = min(bound_ns, time_ns + unit.echo_ns)
        time_ns += member.period_ns
        while time_ns < bound_ns and len(steps) < self._frame_steps:
            steps.append(member.collect(time_ns))
            time_ns += member.period_ns
        self._grant(member, tuple(steps), effects)
        return ()

    # -- what a member answers -----------------------------------------------------------

    def _check_answer(self, member: Member, results: tuple[StepResult, ...]) -> None:
        granted = member.granted
        if granted and len(granted) == len(results):
            for step, result in zip(granted, results, strict=True):
                if step.time_ns != result.time_ns or step.micro != result.micro:
                    break
            else:
                return
        times = [(s.time_ns, s.micro) for s in granted]
        answered = [(r.time_ns, r.micro) for r in results]
        raise TwinError(
            Reason.INVALID_FRAME,
            f"{member.name} was granted {times or 'nothing'} and answered for {answered}",
            {"member": member.name},
        )

    def _abort(self, error: FederationError) -> tuple[Effect, ...]:
        self._over = True
        return (*_commit(self.settle()), Aborted(error))

    # -- what people ask for -------------------------------------------------------------

    def _answer(self, request: Request) -> tuple[Effect, ...]:
        verdict = self._decide(request)
        if isinstance(verdict, Refused):
            return (verdict,)
        self._refresh(self._units)
        return (verdict, *self._advance(self._units))

    def _decide(self, request: Request) -> Accepted | Refused:
        """Grant or refuse a request; who may step when is to be looked at anew after it."""
        match request:
            case Ordered():
                return self._take_order(request)
            case Joined():
                return self._join(request)
            case Left():
                return self._leave(request)

    def _join(self, event: Joined) -> Accepted | Refused:
        """Let members join at the first instant at which nobody is ahead of them, or later."""
        known, new = self._members, event.descriptions
        if taken := [name for name in new if name in known]:
            why = f"the run has or had a member {taken[0]!r}: choose another name"
            return Refused(why, Reason.SCENARIO_INVALID, {"member": taken[0]})
        for coupling in event.couplings:
            if coupling.source not in new and coupling.target not in new:
                why = f"coupling {coupling.name} is not of a member that joins"
                return Refused(why, Reason.SCENARIO_INVALID, {"coupling": coupling.name})
        for actuation in event.actuations:
            if actuation.source not in new:
                why = f"{actuation.source} does not join, and gets no right to act by it"
                return Refused(why, Reason.SCENARIO_INVALID, {"member": actuation.source})
        heard = [(coupling.target, coupling.delay_ns) for coupling in event.couplings]
        heard += [(actuation.target, actuation.delay_ns) for actuation in event.actuations]
        first_ns = self._soonest_ns([(name, delay) for name, delay in heard if name in known])
        for coupling in event.couplings:
            if coupling.source in known:
                unit = self._units[known[coupling.source].unit]
                first_ns = max(first_ns, unit.reached_ns() + 1)
        if self.wiring.arrivals:  # ranks are in the order of joining
            first_ns = max(first_ns, self.wiring.arrivals[-1].time_ns)
        time_ns = first_ns if event.time_ns is None else event.time_ns
        if refusal := self._too_soon(time_ns, first_ns, ", ".join(new)):
            return refusal
        wiring = self.wiring
        try:
            self.wiring = wire(
                {**wiring.descriptions, **new},
                (*wiring.couplings, *event.couplings),
                (*wiring.actuations, *event.actuations),
                (*wiring.arrivals, Arrival(tuple(new), time_ns)),
            )
        except ScenarioError as error:
            return Refused(error.message, error.reason, error.metadata)
        self._exchange.admit(self.wiring, event.operator)
        self._build()
        return Accepted(change_id("joined", next(iter(new)), time_ns), time_ns)

    def _leave(self, event: Left) -> Accepted | Refused:
        """Let a member make its last step before the first instant that it has not reached."""
        member = self._members.get(event.member)
        if member is None:
            why = f"the run has no member {event.member!r}; it has {', '.join(self._members)}"
            return Refused(why, Reason.UNKNOWN_MEMBER, {"member": event.member})
        if member.until_ns < NEVER:
            why = f"{member.name} leaves at {member.until_ns} ns already"
            return Refused(why, Reason.UNKNOWN_MEMBER, {"member": member.name})
        unit = self._units[member.unit]
        first_ns = max(self.now_ns, unit.reached_ns() + 1, member.since_ns)
        time_ns = first_ns if event.time_ns is None else event.time_ns
        if refusal := self._too_soon(time_ns, first_ns, member.name):
            return refusal
        event_id = self._exchange.leave(member, time_ns, event.operator)
        self._leaving.append(member)
        unit.until_ns = max(m.until_ns for m in unit.members)
        return Accepted(event_id, time_ns)

    def _too_soon(self, time_ns: int, first_ns: int, who: str) -> Refused | None:
        if time_ns < first_ns:
            return Refused(
                f"the run has passed {time_ns} ns: what {who} did then would come too late for "
                f"some; the earliest instant is {first_ns} ns",
                Reason.INSTANT_PASSED,
                {"earliest_ns": str(first_ns)},
            )
        if time_ns > self.horizon_ns:
            return Refused(
                f"the run ends at {self.horizon_ns} ns; at {time_ns} ns it has nothing left to do",
                Reason.INSTANT_PASSED,
                {"horizon_ns": str(self.horizon_ns)},
            )
        return None

    def _soonest_ns(self, news: Iterable[tuple[str, int]]) -> int:
        """The first instant T at which something may begin that nobody has planned with.

        `news` are members that will hear of it, each at T and a delay. Those that wake on input
        may then publish at once, and so on; what that reaches must not be past it.
        """
        first_ns = self.now_ns
        units, members = self._units, self._members
        heap = [(delay_ns, members[name].unit) for name, delay_ns in news]
        heapq.heapify(heap)
        seen: set[int] = set()
        while heap:
            delay_ns, index = heapq.heappop(heap)
            if index in seen:
                continue
            seen.add(index)
            first_ns = max(first_ns, units[index].reached_ns() + 1 - delay_ns)
            if units[index].wakes:
                for target in units[index].outward:
                    ways = [way for way in target.inward if way[0].index == index]
                    way_ns = min(0 if since_ns else ns for _, ns, since_ns in ways)
                    heapq.heappush(heap, (delay_ns + way_ns, target.index))
        return first_ns

    def _take_order(self, event: Ordered) -> Accepted | Refused:
        """Let an operator act: at the first instant that no grant has passed yet, or later."""
        refusal = self._exchange.envelope.fault(event.action)
        if refusal:
            return Refused(refusal)
        member = self._members[event.action.member]
        first_ns = max(self._soonest_ns([(member.name, 0)]), member.since_ns)
        time_ns = first_ns if event.time_ns is None else event.time_ns
        if time_ns < first_ns:
            return Refused(f"{event.action.member} is at {first_ns} ns already")
        if time_ns >= member.until_ns:
            return Refused(f"{event.action.member} leaves at {member.until_ns} ns")
        if time_ns > self.horizon_ns:
            return Refused("the run has nothing left to do")
        serial = self._orders_taken + 1 if event.serial is None else event.serial
        self._orders_taken = max(self._orders_taken, serial)
        event_id = f"{OPERATOR}/{serial}"
        action = replace(event.action, cause=event_id)
        text = (
            f"{event.operator} sets {action.member}.{action.actuator}[{action.entity}] "
            f"to {action.value:g}"
        )
        what = Event(event_id, time_ns, "operator_order", action.entity, text)
        self.ledger.add(EventRecord(time_ns, 0, OPERATOR_RANK, OPERATOR, what, ()))
        self.ledger.add(ActionRecord(time_ns, 0, OPERATOR_RANK, OPERATOR, action))
        channel = f"{OPERATOR} => {action.member}.{action.actuator}"
        member.orders.append((time_ns, OPERATOR_RANK, channel, action))
        return Accepted(event_id, time_ns)

    # -- loops of instant couplings --------------------------------------------------------

    def _next_in_loop(self, unit: _Unit, loop: _Loop, effects: list[Effect]) -> Iterable[_Unit]:
        """Grant the next member of the pass, or begin the next pass, or end the instant.

        Returns the units to look at again, which are none before the instant has ended.
        """
        while True:
            while loop.queue:
                member = loop.queue.popleft()
                is_due = loop.micro > 0 or member.name in loop.due
                if not is_due and not self._is_unsettled(member, loop):
                    continue
                micro = loop.given.get(member.name, 0)
                step = member.collect(loop.time_ns, micro, self._policy.relaxation)
                is_own = member.next_ns == loop.time_ns and micro == 0
                if not is_own and _is_empty(step):
                    member.put_off(step)
                    continue
                # a redone step acts on the same orders as the step that it replaces
                orders = loop.actions.setdefault(member.name, step.actions)
                step = StepInput(step.time_ns, micro, step.inputs, step.causes, orders)
                loop.given[member.name] = micro + 1
                self._grant(member, (step,), effects)
                return ()
            unsettled = [m for m in unit.members if self._is_unsettled(m, loop)]
            if not unsettled:
                self._end_loop(unit, loop)
                return self._moved(unit)
            loop.micro += 1
            if loop.micro > self._policy.limit:
                names = [member.name for member in unit.members]
                raise TwinError(
                    Reason.LOOP_NOT_CONVERGED,
                    f"the loop {' -> '.join((*names, names[0]))} did not settle at "
                    f"{loop.time_ns} ns within {self._policy.limit} micro-steps (tolerance "
                    f"{self._policy.tolerance:g}); relax it or delay one of its couplings",
                    {"loop": ",".join(names)},
                )
            loop.queue.extend(unsettled)

    def _is_unsettled(self, member: Member, loop: _Loop) -> bool:
        """Whether inputs have moved by more than the tolerance since its last micro-step."""
        has_stepped = member.name in loop.given
        if (not has_stepped and not member.wakes) or loop.time_ns >= member.until_ns:
            return False
        # a member that has not stepped is woken by news, not by what a loop left over
        staged = [member.stage(given, loop.time_ns) for given in member.inlets]
        for given in member.inlets:
            value = given.slot.combined([feed.visible for feed in given.feeds])
            if not has_stepped and any(staged) and not np.array_equal(value, given.value):
                return True
            limit = self._policy.tolerance * (1.0 + np.abs(given.value))
            if has_stepped and (np.abs(value - given.value) > limit).any():
                return True
        return False

    def _continue_loop(
        self, unit: _Unit, loop: _Loop, member: Member, result: StepResult
    ) -> tuple[Effect, ...]:
        self._exchange.publish(member, result, NOTHING)
        loop.stepped[member.name] = result
        member.granted = ()
        self._flying -= 1
        effects: list[Effect] = []
        again = self._next_in_loop(unit, loop, effects)
        return (*effects, *self._advance(again))

    def _end_loop(self, unit: _Unit, loop: _Loop) -> None:
        """Keep the last micro-step of each member as what happened at this instant.

        Events and causes of micro-steps that were redone never happened; within the loop,
        causes therefore become visible from the next step on.
        """
        unit.loop = None
        for member in unit.members:
            result = loop.stepped.get(member.name)
            if result is not None:
                self._exchange.absorb(member, result)
                member.set_next(result)
        for member in unit.members:
            member.reached_ns = loop.time_ns
            for inlet in member.inlets:
                member.catch_up(inlet, loop.time_ns)


def _visible_ns(time_ns: int, delay_ns: int, since_ns: int) -> int:
    """When what is published at `time_ns` is visible, as `Coupling.visible_ns` has it."""
    return since_ns if time_ns < since_ns else time_ns + delay_ns


def _next_step(member: Member) -> int:
    if member.granted:
        return member.granted[0].time_ns
    next_ns = member.next_ns
    if member.wakes:
        for inlet in member.inlets:
            for feed in inlet.feeds:
                if feed.pending and feed.pending[0][0] < next_ns:
                    next_ns = feed.pending[0][0]
        for visible_ns, _, _, _ in member.orders:
            if visible_ns < next_ns:
                next_ns = visible_ns
    return next_ns if next_ns < member.until_ns else NEVER


_OVER = Refused("the run has ended")


def _commit(entries: tuple[Entry, ...]) -> tuple[Effect, ...]:
    return (Commit(entries),) if entries else ()


def _is_empty(step: StepInput) -> bool:
    """Whether a step would bring nothing that could wake a member."""
    return not step.inputs and not step.actions
