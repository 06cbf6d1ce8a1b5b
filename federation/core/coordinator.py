"""The conservative coordinator: decides who may step, how far, and with which inputs.

A state machine without waits: `start` and `handle` return effects, a shell carries them out
and feeds back what happened. The rule it keeps is one sentence: a unit (a member, or a loop
of instant couplings) may step at t when no member outside it that feeds it can still publish
something that would be visible at t. With E(u) the earliest instant at which unit u can still
publish, and d the delay of a coupling, that is E(source) + d > t for every coupling into u
(Chandy and Misra 1979; Fujimoto, Parallel and Distributed Simulation Systems, 2000).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from federation.core.coupling import MAX_CAUSES, Slot, Unit, Wire, Wiring
from federation.core.envelope import Envelope, Pool
from federation.core.ledger import ActionRecord, Entry, EventRecord, Ledger, Record
from federation.core.messages import (
    Aborted,
    Accepted,
    Commit,
    Effect,
    Failed,
    Finished,
    Grant,
    Input,
    Ordered,
    Refused,
    Stepped,
)
from federation.errors import FederationError, Reason, TwinError
from federation.twin import Action, Event, StepInput, StepResult, Vector, check_outputs

NEVER = (1 << 63) - 1
"""Later than every instant of a run."""

OPERATOR = "operator"
"""Under which name orders of people stand in the ledger."""

OPERATOR_RANK = -1
"""A person's order comes before all steps of its instant."""

SETTLE_EVERY = 512
"""Ledger entries to gather before they are put in order; a matter of speed only."""


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
class _Feed:
    """What has come over one wire: the visible value and what becomes visible later."""

    wire: Wire
    visible: Vector | None = None
    causes: dict[int, str] = field(default_factory=dict)
    pending: deque[tuple[int, Vector, Mapping[int, str]]] = field(default_factory=deque)


@dataclass(slots=True)
class _Input:
    slot: Slot
    feeds: list[_Feed]
    value: Vector
    """What the member was last given."""
    causes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    is_behind: bool = False
    """Something visible, below the tolerance of a loop, was not given yet."""


@dataclass(slots=True)
class _Member:
    name: str
    rank: int
    period_ns: int
    wakes: bool
    sizes: Mapping[str, int]
    inputs: list[_Input]
    next_ns: int
    """Its own next instant: of its period, or asked for; NEVER when it asked for none."""
    feeds_out: dict[str, list[_Feed]]
    acts: bool
    """Whether it may act on others; its inputs are then judged step by step."""
    granted: tuple[StepInput, ...] = ()
    """The steps in flight; empty when the member is idle."""
    orders: deque[tuple[int, str, Action]] = field(default_factory=deque)
    """Actions on their way to it: (visible from, channel, action)."""
    untold: dict[str, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    """Causes that became visible when it had no reason to step."""
    published: dict[str, tuple[int, Vector]] = field(default_factory=dict)
    """Per output the revision and value last recorded."""
    known_events: dict[str, dict[str, str]] = field(default_factory=dict)
    """Foreign events that reached it, with the coupling that brought each to each input."""
    own_events: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Loop:
    """The iteration of one loop unit at one instant."""

    time_ns: int
    micro: int = 0
    queue: deque[_Member] = field(default_factory=deque)
    stepped: dict[str, StepResult] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    """Per member the number of its micro-steps so far."""
    actions: dict[str, tuple[Action, ...]] = field(default_factory=dict)


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
        frame_steps: int = 64,
    ) -> None:
        self.wiring = wiring
        self.horizon_ns = horizon_ns
        self.ledger = Ledger()
        self._policy = loop or LoopPolicy()
        self._frame_steps = frame_steps
        self._envelope = Envelope(wiring.descriptions, wiring.actuations, pools)
        self._action_delay = {(a.source, a.target): a.delay_ns for a in wiring.actuations}
        self._members = self._build()
        self._by_unit = [[self._members[m] for m in unit.members] for unit in wiring.units]
        self._loops: dict[int, _Loop] = {}
        self._earliest = [0] * len(wiring.units)
        self._waking = [any(member.wakes for member in members) for members in self._by_unit]
        self._any_waking = any(self._waking)
        self._wakes_from: list[list[tuple[int, int]]] = [[] for _ in wiring.units]
        """Per unit the waking units that it feeds, each with the shortest delay_ns."""
        for target, sources in enumerate(wiring.inward):
            for source, delay_ns in sources if self._waking[target] else ():
                self._wakes_from[source].append((target, delay_ns))
        self._over = False
        self._orders_taken = 0

    # -- the two doors ---------------------------------------------------------------

    def start(self) -> tuple[Effect, ...]:
        """The grants that can be given before anything has happened."""
        self._refresh(range(len(self._by_unit)))
        return self._advance(range(len(self._by_unit)))

    def handle(self, event: Input) -> tuple[Effect, ...]:
        """Take one event and say what follows from it."""
        if self._over:
            return ()
        if isinstance(event, Failed):
            return self._abort(event.error)
        if isinstance(event, Ordered):
            return self._order(event)
        member = self._members[event.member]
        try:
            self._check_answer(member, event)
            unit = self.wiring.unit_of[member.name]
            if unit in self._loops:
                return self._continue_loop(unit, member, event.results[0])
            for result in event.results:
                self._absorb(member, result)
                self._schedule(member, result)
            member.granted = ()
            return self._advance(self._touched(unit))
        except FederationError as error:
            return self._abort(error)

    @property
    def now_ns(self) -> int:
        """Every instant before this is settled for all members."""
        return min(min(self._earliest), self.horizon_ns + 1)

    # -- construction ----------------------------------------------------------------

    def _build(self) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        for name, description in self.wiring.descriptions.items():
            inputs = [
                _Input(slot, [_Feed(w) for w in slot.wires], slot.initial())
                for slot in self.wiring.slots[name]
            ]
            policy = description.time
            members[name] = _Member(
                name,
                self.wiring.rank[name],
                policy.period_ns,
                policy.wakes_on_input,
                description.output_sizes(),
                inputs,
                policy.offset_ns,
                {},
                any(name == a.source for a in self.wiring.actuations),
            )
        for member in members.values():
            for given in member.inputs:
                for feed in given.feeds:
                    coupling = feed.wire.coupling
                    heirs = members[coupling.source].feeds_out
                    heirs.setdefault(coupling.output, []).append(feed)
        return members

    # -- earliest instants and readiness -----------------------------------------------

    def _own_earliest(self, unit: int) -> int:
        """The earliest step of a unit that is already sure to be possible."""
        if unit in self._loops:
            return self._loops[unit].time_ns
        return min(self._next_step(member) for member in self._by_unit[unit])

    def _next_step(self, member: _Member) -> int:
        if member.granted:
            return member.granted[0].time_ns
        if not member.wakes:
            return member.next_ns
        change_ns = min(
            (feed.pending[0][0] for i in member.inputs for feed in i.feeds if feed.pending),
            default=NEVER,
        )
        if member.orders:
            change_ns = min(change_ns, min(visible_ns for visible_ns, _, _ in member.orders))
        return min(member.next_ns, change_ns)

    def _touched(self, unit: int) -> Iterable[int]:
        """Units whose right to step may have changed after `unit` moved."""
        if self._any_waking:
            everyone = range(len(self._by_unit))
            self._refresh(everyone)
            return everyone
        self._refresh((unit,))
        return (unit, *self.wiring.outward[unit])

    def _refresh(self, units: Iterable[int]) -> None:
        """Bring the earliest instants of `units` up to date.

        A unit that wakes on input can be woken by anything upstream, so with such units the
        earliest instants are shortest paths from what is sure, and Dijkstra's algorithm finds
        them for all at once.
        """
        earliest = self._earliest
        for unit in units:
            earliest[unit] = self._own_earliest(unit)
        if not self._any_waking:
            return
        heap = [(t, u) for u, t in enumerate(earliest) if t < NEVER]
        heapq.heapify(heap)
        while heap:
            time_ns, source = heapq.heappop(heap)
            if time_ns > earliest[source]:
                continue
            for target, delay_ns in self._wakes_from[source]:
                if time_ns + delay_ns < earliest[target]:
                    earliest[target] = time_ns + delay_ns
                    heapq.heappush(heap, (earliest[target], target))

    def _bound(self, unit: int) -> int:
        """A unit may step at every t < this."""
        earliest = self._earliest
        return min(
            (earliest[source] + delay_ns for source, delay_ns in self.wiring.inward[unit]),
            default=NEVER,
        )

    def _advance(self, candidates: Iterable[int]) -> tuple[Effect, ...]:
        """Grant whatever can be granted among `candidates` and commit what is settled."""
        effects: list[Effect] = []
        queue = deque(candidates)
        is_near_end = False
        while queue:
            index = queue.popleft()
            queue.extend(self._try(self.wiring.units[index], effects))
            is_near_end = is_near_end or self._earliest[index] > self.horizon_ns
        if is_near_end and self.now_ns > self.horizon_ns:
            self._over = True
            effects.extend(_commit(self.ledger.settle(NEVER)))
            effects.append(Finished(self.ledger.digest()))
        elif self.ledger.waiting >= SETTLE_EVERY:
            effects.extend(_commit(self.ledger.settle(self.now_ns)))
        return tuple(effects)

    def _try(self, unit: Unit, effects: list[Effect]) -> Iterable[int]:
        """Grant `unit` what it may do now; the units to look at again if it only caught up."""
        members = self._by_unit[unit.index]
        if unit.index in self._loops or any(member.granted for member in members):
            return ()
        time_ns = self._own_earliest(unit.index)
        bound_ns = min(self._bound(unit.index), self.horizon_ns + 1)
        if time_ns >= bound_ns:
            return ()
        if unit.is_loop:
            due = deque(m for m in members if self._next_step(m) == time_ns)
            self._loops[unit.index] = _Loop(time_ns, queue=due)
            return self._next_in_loop(unit.index, effects)
        member = members[0]
        bound_ns = min(bound_ns, time_ns + self.wiring.echo_ns[unit.index])
        steps = []
        while time_ns < bound_ns:
            given = self._collect(member, time_ns)
            if member.wakes and member.next_ns != time_ns and _is_empty(given):
                member.untold = {v: dict(c) for v, c in given.causes.items()}
                return self._touched(unit.index)
            steps.append(given)
            # Beyond the first step only a fixed period says when the next one is.
            if member.wakes or member.acts or not member.period_ns:
                break
            if len(steps) >= self._frame_steps:
                break
            time_ns += member.period_ns
        member.granted = tuple(steps)
        effects.append(Grant(member.name, member.granted))
        return ()

    # -- what a member is given ----------------------------------------------------------

    def _collect(self, member: _Member, time_ns: int, micro: int = 0) -> StepInput:
        """The inputs of `member` that differ from what it saw last, and its due actions."""
        inputs: dict[str, Vector] = {}
        causes, member.untold = member.untold, {}
        for given in member.inputs:
            touched = self._receive(given, time_ns)
            if touched is None and not given.is_behind:
                continue
            given.is_behind = False
            name = given.slot.variable.name
            value = self._relaxed(given, micro)
            if not np.array_equal(value, given.value):
                value.setflags(write=False)
                given.value = value
                inputs[name] = value
                given.is_behind = micro > 0 and self._policy.relaxation < 1.0
            changed = self._explain(member, given, touched or set())
            if changed:
                causes.setdefault(name, {}).update(changed)
        actions = tuple(a for visible_ns, _, a in member.orders if visible_ns <= time_ns)
        if actions:
            for _, channel, action in member.orders:
                if action.cause and action in actions:
                    member.known_events.setdefault(action.cause, {}).setdefault("", channel)
            member.orders = deque(o for o in member.orders if o[0] > time_ns)
        return StepInput(time_ns, micro, inputs, causes, actions)

    def _receive(self, given: _Input, time_ns: int) -> set[int] | None:
        """Make visible what is due; None if nothing was, else the rows with new causes."""
        rows: set[int] | None = None
        for feed in given.feeds:
            while feed.pending and feed.pending[0][0] <= time_ns:
                _, feed.visible, news = feed.pending.popleft()
                rows = set() if rows is None else rows
                for column, event in news.items():
                    if feed.causes.get(column) != event:
                        feed.causes[column] = event
                        rows.update(feed.wire.targets_of.get(column, ()))
        return rows

    def _relaxed(self, given: _Input, micro: int) -> Vector:
        value = given.slot.combined([feed.visible for feed in given.feeds])
        if micro and self._policy.relaxation < 1.0:
            return given.value + self._policy.relaxation * (value - given.value)
        return value

    def _explain(
        self, member: _Member, given: _Input, rows: set[int]
    ) -> dict[int, tuple[str, ...]]:
        """The new causes of the touched rows, remembering through which coupling they came."""
        changed: dict[int, tuple[str, ...]] = {}
        for row in sorted(rows):
            events: dict[str, str] = {}
            for feed_index, column in given.slot.sources_of[row]:
                feed = given.feeds[feed_index]
                event = feed.causes.get(column)
                if event is not None:
                    events.setdefault(event, feed.wire.coupling.name)
            kept = tuple(events)[:MAX_CAUSES]
            if given.causes.get(row) != kept:
                given.causes[row] = changed[row] = kept
                name = given.slot.variable.name
                for event in kept:
                    member.known_events.setdefault(event, {}).setdefault(name, events[event])
        return changed

    # -- what a member answers -----------------------------------------------------------

    def _check_answer(self, member: _Member, event: Stepped) -> None:
        times = [(s.time_ns, s.micro) for s in member.granted]
        answered = [(r.time_ns, r.micro) for r in event.results]
        if not times or times != answered:
            raise TwinError(
                Reason.INVALID_FRAME,
                f"{member.name} was granted {times or 'nothing'} and answered for {answered}",
                {"member": member.name},
            )

    def _absorb(self, member: _Member, result: StepResult) -> None:
        """Check a final result, record it, and hand it on to every member that it feeds."""
        self._absorb_story(member, result)
        self._publish(member, result, result.causes)

    def _publish(
        self, member: _Member, result: StepResult, causes: Mapping[str, Mapping[int, str]]
    ) -> None:
        check_outputs(member.name, member.sizes, result)
        for name in dict.fromkeys((*result.outputs, *causes)):
            last = member.published.get(name)
            value = result.outputs.get(name)
            news = causes.get(name, {})
            for event in news.values():
                if event not in member.own_events and event not in member.known_events:
                    raise TwinError(
                        Reason.UNKNOWN_CAUSE,
                        f"{member.name}.{name} is explained by {event!r}, which is neither an "
                        f"event of {member.name} nor one that reached it",
                        {"member": member.name, "variable": name, "cause": event},
                    )
            if value is not None and (last is None or not np.array_equal(value, last[1])):
                revision = 1 if last is None else last[0] + 1
                member.published[name] = (revision, value)
                self.ledger.add(
                    Record(
                        result.time_ns,
                        result.micro,
                        member.rank,
                        member.name,
                        name,
                        revision,
                        value,
                    )
                )
            elif last is None or not news:
                continue
            present = member.published[name][1]
            for feed in member.feeds_out.get(name, ()):
                visible_ns = result.time_ns + feed.wire.coupling.delay_ns
                feed.pending.append((visible_ns, present, news))

    def _absorb_story(self, member: _Member, result: StepResult) -> None:
        prefix = f"{member.name}/"
        for event in result.events:
            if not event.id.startswith(prefix) or event.id in member.own_events:
                raise TwinError(
                    Reason.UNKNOWN_CAUSE,
                    f"{member.name} may not name an event {event.id!r}",
                    {"member": member.name, "event": event.id},
                )
            via = []
            for cause in event.causes:
                if cause in member.own_events:
                    continue
                channels = member.known_events.get(cause)
                if channels is None:
                    raise TwinError(
                        Reason.UNKNOWN_CAUSE,
                        f"{event.id} ({event.kind}) names the cause {cause!r}, which is neither "
                        f"an earlier event of {member.name} nor one that reached it",
                        {"member": member.name, "event": event.id, "cause": cause},
                    )
                told_by = dict(event.through).get(cause, "")
                via.append((cause, channels.get(told_by) or next(iter(channels.values()))))
            member.own_events.add(event.id)
            self.ledger.add(
                EventRecord(
                    result.time_ns, result.micro, member.rank, member.name, event, tuple(via)
                )
            )
        if result.actions:
            seen = {i.slot.variable.name: i.value for i in member.inputs}
            for action, refusal in self._envelope.screen(member.name, result.actions, seen):
                self.ledger.add(
                    ActionRecord(
                        result.time_ns, result.micro, member.rank, member.name, action, refusal
                    )
                )
                if not refusal:
                    delay_ns = self._action_delay[member.name, action.member]
                    channel = f"{member.name} => {action.member}.{action.actuator}"
                    self._members[action.member].orders.append(
                        (result.time_ns + delay_ns, channel, action)
                    )

    def _order(self, event: Ordered) -> tuple[Effect, ...]:
        """Let an operator act: at the first instant that no grant has passed yet."""
        refusal = self._envelope.fault(event.action)
        if refusal:
            return (Refused(refusal),)
        member = self._members[event.action.member]
        time_ns = max(self.now_ns, member.granted[-1].time_ns + 1 if member.granted else 0)
        if time_ns > self.horizon_ns:
            return (Refused("the run has nothing left to do"),)
        self._orders_taken += 1
        event_id = f"{OPERATOR}/{self._orders_taken}"
        action = replace(event.action, cause=event_id)
        text = (
            f"{event.operator} sets {action.member}.{action.actuator}[{action.entity}] "
            f"to {action.value:g}"
        )
        what = Event(event_id, time_ns, "operator_order", action.entity, text)
        self.ledger.add(EventRecord(time_ns, 0, OPERATOR_RANK, OPERATOR, what, ()))
        self.ledger.add(ActionRecord(time_ns, 0, OPERATOR_RANK, OPERATOR, action))
        channel = f"{OPERATOR} => {action.member}.{action.actuator}"
        member.orders.append((time_ns, channel, action))
        again = self._touched(self.wiring.unit_of[member.name])
        return (Accepted(event_id, time_ns), *self._advance(again))

    def _schedule(self, member: _Member, result: StepResult) -> None:
        """Set the member's own next instant after its step at `result.time_ns`."""
        if member.period_ns:
            if member.next_ns <= result.time_ns:
                member.next_ns = result.time_ns + member.period_ns
            return
        if result.next_ns is not None:
            if result.next_ns <= result.time_ns:
                raise TwinError(
                    Reason.TIME_REGRESSION,
                    f"{member.name} stepped at {result.time_ns} ns and asked for "
                    f"{result.next_ns} ns",
                    {"member": member.name},
                )
            member.next_ns = result.next_ns
        elif member.next_ns <= result.time_ns:
            member.next_ns = NEVER

    def _abort(self, error: FederationError) -> tuple[Effect, ...]:
        self._over = True
        return (*_commit(self.ledger.settle(self.now_ns)), Aborted(error))

    # -- loops of instant couplings --------------------------------------------------------

    def _next_in_loop(self, unit: int, effects: list[Effect]) -> Iterable[int]:
        """Grant the next member of the pass, or begin the next pass, or end the instant.

        Returns the units to look at again, which are none before the instant has ended.
        """
        loop = self._loops[unit]
        while True:
            while loop.queue:
                member = loop.queue.popleft()
                micro = loop.given.get(member.name, 0)
                step = self._collect(member, loop.time_ns, micro)
                is_own = member.next_ns == loop.time_ns and micro == 0
                if not is_own and _is_empty(step):
                    member.untold = {v: dict(c) for v, c in step.causes.items()}
                    continue
                # a redone step acts on the same orders as the step that it replaces
                orders = loop.actions.setdefault(member.name, step.actions)
                step = StepInput(step.time_ns, micro, step.inputs, step.causes, orders)
                loop.given[member.name] = micro + 1
                member.granted = (step,)
                effects.append(Grant(member.name, member.granted))
                return ()
            unsettled = [m for m in self._by_unit[unit] if self._is_unsettled(m, loop)]
            if not unsettled:
                self._end_loop(unit)
                return self._touched(unit)
            loop.micro += 1
            if loop.micro > self._policy.limit:
                names = self.wiring.units[unit].members
                raise TwinError(
                    Reason.LOOP_NOT_CONVERGED,
                    f"the loop {' -> '.join((*names, names[0]))} did not settle at "
                    f"{loop.time_ns} ns within {self._policy.limit} micro-steps (tolerance "
                    f"{self._policy.tolerance:g}); relax it or delay one of its couplings",
                    {"loop": ",".join(names)},
                )
            loop.queue.extend(unsettled)

    def _is_unsettled(self, member: _Member, loop: _Loop) -> bool:
        """Whether inputs have moved by more than the tolerance since its last micro-step."""
        has_stepped = member.name in loop.given
        if not has_stepped and not member.wakes:
            return False
        # a member that has not stepped is woken by news, not by what a loop left over
        staged = [self._stage(given, loop.time_ns) for given in member.inputs]
        for given in member.inputs:
            value = given.slot.combined([feed.visible for feed in given.feeds])
            if not has_stepped and any(staged) and not np.array_equal(value, given.value):
                return True
            limit = self._policy.tolerance * (1.0 + np.abs(given.value))
            if has_stepped and (np.abs(value - given.value) > limit).any():
                return True
        return False

    def _stage(self, given: _Input, time_ns: int) -> bool:
        """Make values visible within a loop; their causes follow when it has settled."""
        is_rung = False
        for feed in given.feeds:
            while feed.pending and feed.pending[0][0] <= time_ns and not feed.pending[0][2]:
                feed.visible = feed.pending.popleft()[1]
                given.is_behind = is_rung = True
        return is_rung

    def _continue_loop(self, unit: int, member: _Member, result: StepResult) -> tuple[Effect, ...]:
        self._publish(member, result, {})
        self._loops[unit].stepped[member.name] = result
        member.granted = ()
        effects: list[Effect] = []
        again = self._next_in_loop(unit, effects)
        return (*effects, *self._advance(again))

    def _end_loop(self, unit: int) -> None:
        """Keep the last micro-step of each member as what happened at this instant.

        Events and causes of micro-steps that were redone never happened; within the loop,
        causes therefore become visible from the next step on.
        """
        loop = self._loops.pop(unit)
        for member in self._by_unit[unit]:
            result = loop.stepped.get(member.name)
            if result is not None:
                self._absorb_story(member, result)
                self._publish(member, result, result.causes)
                self._schedule(member, result)
        for member in self._by_unit[unit]:
            for given in member.inputs:
                self._catch_up(member, given, loop.time_ns)

    def _catch_up(self, member: _Member, given: _Input, time_ns: int) -> None:
        """Take in what the loop left below its tolerance, without waking the member."""
        rows = self._receive(given, time_ns)
        if rows is None:
            return
        given.is_behind = True
        changed = self._explain(member, given, rows)
        if changed:
            member.untold.setdefault(given.slot.variable.name, {}).update(changed)


def _commit(entries: tuple[Entry, ...]) -> tuple[Effect, ...]:
    return (Commit(entries),) if entries else ()


def _is_empty(step: StepInput) -> bool:
    """Whether a step would bring nothing that could wake a member."""
    return not step.inputs and not step.actions
