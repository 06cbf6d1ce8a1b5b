"""The order of steps without questions, for members in one process that nobody wakes.

Where none wakes on input and no instant couplings form a loop, each member alone says when it
steps: it has a period, or it asks for its next instant. So nobody has to be asked what may be
done next: the members that are due at an instant are walked by rank, in stages of which none
feeds another at once, and what a stage has published is checked, hashed and handed on in one
piece. The ledger is the coordinator's, bit for bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from federation.core.coupling import Wiring
from federation.core.envelope import Pool
from federation.core.exchange import NEVER, Exchange, Feed, Member, Outlet
from federation.core.ledger import Entry, Record
from federation.errors import FederationError
from federation.twin import (
    FLOAT64,
    NOTHING,
    Action,
    Session,
    Vector,
    check_finite,
    failed,
    has_minus_zero,
    plain_zeros,
    undeclared,
    wrong_shape,
)

COMMIT_EVERY = 512
"""Ledger entries to gather at least before they are handed out; a matter of speed only."""

SLOW_S = 50e-6
"""Mean wall time of a step from which on its CPU time is read at each step."""

MAX_PATTERNS = 4096
"""How many different sets of members that are due together are remembered."""


@dataclass(slots=True, eq=False)
class Place:
    """A member in the schedule, with its session and what its steps have taken so far."""

    member: Member
    session: Session
    plain: list[Feed]
    """The feeds of those inputs that are just what one source publishes."""
    mixed: list[Feed]
    """All other feeds."""
    steps: int = 0
    wall_s: float = 0.0
    read_cpu_s: float = 0.0
    """CPU time of the steps in which it was read."""
    read_wall_s: float = 0.0
    """Wall time of these steps."""
    is_slow: bool = True
    """Whether CPU time is read; the first step may well load or compile something."""


@dataclass(slots=True, eq=False)
class Stage:
    """Members that are due at one instant, of which none feeds another at once."""

    places: list[Place]
    ways: dict[Outlet, tuple[list[Feed], list[Feed]]] = field(default_factory=dict)
    """Per output the feeds whose next reader always comes when the value is visible and before
    the next value is, and all others."""
    outlets: list[Outlet] = field(default_factory=list)
    """The outputs that changed last time; what follows is laid out for them."""
    layout: list[tuple[Outlet, slice, list[Feed], list[Feed]]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    """What goes into the hash, with empty bytes where values go."""
    head_bytes: int = 0
    kept: list[Outlet] = field(default_factory=list)

    def lay_out(self, outlets: list[Outlet], kept: frozenset[Outlet]) -> None:
        """Find the place of each output in the joined values, and of each head in the hash."""
        self.outlets = outlets
        self.layout = []
        start = 0
        for outlet in outlets:
            self.layout.append((outlet, slice(start, start + outlet.size), *self.ways[outlet]))
            start += outlet.size
        self.parts = [part for outlet in outlets for part in (outlet.head, b"")]
        self.head_bytes = sum(map(len, self.parts))
        self.kept = [outlet for outlet in outlets if outlet in kept]


class Schedule:
    """Runs sessions from time 0 up to and including `horizon_ns`, in this thread.

    `keeps(member, output)` says whose records `commit` gets besides all events and actions. The
    clocks give seconds of wall time and of this thread's CPU time.
    """

    def __init__(
        self,
        wiring: Wiring,
        sessions: Mapping[str, Session],
        horizon_ns: int,
        *,
        wall: Callable[[], float],
        cpu: Callable[[], float],
        pools: tuple[Pool, ...] = (),
        keeps: Callable[[str, str], bool] = lambda member, output: True,
    ) -> None:
        self._wiring, self._pools = wiring, pools
        self._horizon_ns = horizon_ns
        self._wall, self._cpu = wall, cpu
        self._watched: Place | None = None
        self._deliberate: Callable[[int], None] = lambda time_ns: None
        self._exchange = Exchange(wiring, pools)
        self.ledger = self._exchange.ledger
        self._kept = frozenset(
            outlet
            for name, member in self._exchange.members.items()
            for outlet in member.outlets.values()
            if keeps(name, outlet.name)
        )
        self._entries: list[Entry] = []
        self._wall_s = self._cpu_s = 0.0
        rhythms: dict[tuple[int, int, str], list[Place]] = {}
        for name, member in self._exchange.members.items():
            plain: list[Feed] = []
            mixed: list[Feed] = []
            for inlet in member.inlets:
                for feed in inlet.feeds:
                    (plain if inlet.is_plain else mixed).append(feed)
                    if inlet.is_plain:
                        feed.visible, feed.data = inlet.value, inlet.data
            place = Place(member, sessions[name], plain, mixed)
            # one that asks for its instants is a rhythm of its own
            own = "" if member.period_ns else name
            rhythms.setdefault((member.next_ns, member.period_ns, own), []).append(place)
        self._rhythms = list(rhythms.values())
        self._due = [
            (offset_ns, i, period_ns) for i, (offset_ns, period_ns, _) in enumerate(rhythms)
        ]
        """A heap of (next instant, index, period or 0) of all members of one rhythm."""
        self._stages: dict[tuple[int, ...], list[Stage]] = {}

    @staticmethod
    def suits(wiring: Wiring) -> bool:
        """Whether each member alone says when it steps."""
        policies = [description.time for description in wiring.descriptions.values()]
        is_fixed = not any(p.wakes_on_input for p in policies)
        return is_fixed and not wiring.arrivals and not any(u.is_loop for u in wiring.units)

    def watch(self, member: str, deliberate: Callable[[int], None]) -> None:
        """Call `deliberate` before each instant at which a member with a period is due.

        Everything before that instant is settled then, and `fork` may be called. What it takes
        counts as the member's.
        """
        places = [place for places in self._rhythms for place in places]
        self._watched = next(place for place in places if place.member.name == member)
        self._deliberate = deliberate

    def fork(
        self,
        sessions: Mapping[str, Session],
        horizon_ns: int,
        keeps: Callable[[str, str], bool],
        hashes: bool = False,
    ) -> Schedule:
        """Another schedule that stands where this one does between two instants, and goes on
        with these sessions. With `hashes` its digest goes on, too. Its clocks stand still."""
        other = Schedule(
            self._wiring,
            sessions,
            horizon_ns,
            wall=_stopped,
            cpu=_stopped,
            pools=self._pools,
            keeps=keeps,
        )
        other._exchange.adopt(self._exchange, hashes)
        other.ledger = other._exchange.ledger
        other._due = list(self._due)
        return other

    def wake(self, member: str, next_ns: int | None) -> None:
        """Let a member that asks for its instants have asked for this one instead."""
        for index, places in enumerate(self._rhythms):
            if places[0].member.name == member and not places[0].member.period_ns:
                places[0].member.next_ns = NEVER if next_ns is None else next_ns
                self._due = [due for due in self._due if due[1] != index]
                self._due.append((places[0].member.next_ns, index, 0))

    def seen(self, member: str, output: str) -> Vector | None:
        """What an output said last, or None."""
        return self._exchange.members[member].outlets[output].value

    def run(self, commit: Callable[[list[Entry], int], None]) -> str:
        """Do all steps and return the digest.

        `commit` gets what is final, in the order of the ledger, with the time before which all
        is settled. Raises what a twin raises, as an error that names the member.
        """
        wall_s, cpu_s = self._wall(), self._cpu()
        due = self._due
        heapq.heapify(due)
        committed = 0
        watched = self._watched
        while due and (time_ns := due[0][0]) <= self._horizon_ns:
            if watched is not None and watched.member.next_ns == time_ns:
                self._let_deliberate(watched, time_ns)
            rhythms = []
            asking: list[int] = []
            while due and due[0][0] == time_ns:
                _, index, period_ns = due[0]
                rhythms.append(index)
                if period_ns:
                    heapq.heapreplace(due, (time_ns + period_ns, index, period_ns))
                else:
                    heapq.heappop(due)
                    asking.append(index)
            pattern = tuple(rhythms)
            stages = self._stages.get(pattern)
            if stages is None:
                stages = self._arrange(pattern)
            for stage in stages:
                self._walk(stage, time_ns)
            for index in asking:
                heapq.heappush(due, (self._rhythms[index][0].member.next_ns, index, 0))
            if self.ledger.size - committed >= COMMIT_EVERY:
                committed = self.ledger.size
                entries, self._entries = self._entries, []
                commit(entries, time_ns + 1)
        commit(self._entries, self._horizon_ns + 1)
        self._wall_s += self._wall() - wall_s
        self._cpu_s += self._cpu() - cpu_s
        return self.ledger.digest()

    def _let_deliberate(self, place: Place, time_ns: int) -> None:
        then_s, then_cpu_s = self._wall(), self._cpu()
        try:
            self._deliberate(time_ns)
        except FederationError:
            raise
        except Exception as error:
            raise failed(place.member.name, error) from error
        spent_s = self._wall() - then_s
        place.wall_s += spent_s
        place.read_wall_s += spent_s
        place.read_cpu_s += self._cpu() - then_cpu_s

    def costs(self) -> dict[str, tuple[int, float, float]]:
        """Per member the number of its steps and the seconds of wall and CPU time in them.

        Wall time is read at every step. CPU time is, too, where steps are slow; of fast steps,
        of which reading it would be a tenth, it is the share of wall time in which the thread
        worked. Of either, what it takes to hand the values over is part.
        """
        places = [place for places in self._rhythms for place in places]
        rest_s = self._wall_s - sum(place.read_wall_s for place in places)
        rest_cpu_s = self._cpu_s - sum(place.read_cpu_s for place in places)
        share = min(max(rest_cpu_s / rest_s, 0.0), 1.0) if rest_s > 0.0 else 1.0
        return {
            place.member.name: (
                place.steps,
                place.wall_s,
                place.read_cpu_s + share * (place.wall_s - place.read_wall_s),
            )
            for place in places
        }

    # -- who steps when --------------------------------------------------------------------

    def _arrange(self, pattern: tuple[int, ...]) -> list[Stage]:
        """The stages of an instant at which the members of these rhythms are due."""
        if len(self._stages) >= MAX_PATTERNS:
            self._stages.clear()
        due = [place for index in pattern for place in self._rhythms[index]]
        due.sort(key=lambda place: place.member.rank)
        instant_sources: dict[Member, set[Member]] = {}
        for place in due:
            for outlet in place.member.outlets.values():
                for feed in outlet.feeds:
                    if feed.delay_ns == 0:
                        instant_sources.setdefault(feed.member, set()).add(place.member)
        stages: list[Stage] = []
        stage_of: dict[Member, int] = {}
        for place in due:
            sources = instant_sources.get(place.member, ())
            if not stages or any(stage_of[s] == len(stages) - 1 for s in sources):
                stages.append(Stage([]))
            stages[-1].places.append(place)
            stage_of[place.member] = len(stages) - 1
        rhythm_of = {place.member: index for index in pattern for place in self._rhythms[index]}
        for number, stage in enumerate(stages):
            for place in stage.places:
                for outlet in place.member.outlets.values():
                    straight: list[Feed] = []
                    others: list[Feed] = []
                    for feed in outlet.feeds:
                        is_straight = (
                            feed.inlet.is_plain
                            and rhythm_of.get(feed.member) == rhythm_of[place.member]
                            and feed.delay_ns <= place.member.period_ns
                            and (feed.delay_ns == 0 or stage_of[feed.member] <= number)
                        )
                        (straight if is_straight else others).append(feed)
                    stage.ways[outlet] = straight, others
        self._stages[pattern] = stages
        return stages

    # -- one stage -------------------------------------------------------------------------

    def _walk(self, stage: Stage, time_ns: int) -> None:
        """Let the members of a stage do their step at `time_ns`, then take in what they say."""
        wall = self._wall
        outlets: list[Outlet] = []
        values: list[bytes] = []
        has_more = False
        place = stage.places[0]
        try:
            then_s = wall()
            for place in stage.places:
                member, session = place.member, place.session
                changed: list[str] = []
                actions: tuple[Action, ...] = ()
                if member.awaits:
                    actions = self._catch_up(place, time_ns, changed)
                for feed in place.plain:
                    data, inlet = feed.data, feed.inlet
                    if data is not inlet.data:
                        if data != inlet.data:
                            assert feed.visible is not None
                            session.values[inlet.name] = inlet.value = feed.visible
                            changed.append(inlet.name)
                        inlet.data = data
                if place.mixed:
                    _mix(place, changed)
                if place.is_slow:
                    cpu_s = self._cpu()
                    outputs = session.run(time_ns, changed, actions)
                    place.read_cpu_s += self._cpu() - cpu_s
                    spent_s = wall() - then_s
                    place.read_wall_s += spent_s
                    place.is_slow = place.wall_s + spent_s >= SLOW_S * (place.steps + 1)
                else:
                    outputs = session.run(time_ns, changed, actions)
                place.steps += 1
                member.next_ns = time_ns + member.period_ns if member.period_ns else NEVER
                if session.has_more:
                    has_more = True
                for name, data in outputs.items() if len(outputs) < 2 else sorted(outputs.items()):
                    outlet = member.outlets.get(name)
                    if outlet is None:
                        raise undeclared(member.name, name)
                    if data != outlet.data:
                        if len(data) != outlet.size * 8:
                            raise wrong_shape(member.name, name, outlet.size, len(data) >> 3)
                        outlets.append(outlet)
                        values.append(data)
                now_s = wall()
                spent_s = now_s - then_s
                then_s = now_s
                place.wall_s += spent_s
                if spent_s > SLOW_S:
                    place.is_slow = place.wall_s >= SLOW_S * place.steps
        except Exception as error:
            # of several errors the one of the lowest rank counts
            _check(outlets, values, time_ns)
            if isinstance(error, FederationError):
                raise
            raise failed(place.member.name, error) from error
        if has_more:
            self._absorb(stage, time_ns)
        elif outlets:
            self._publish(stage, outlets, values, time_ns)

    def _catch_up(self, place: Place, time_ns: int, changed: list[str]) -> tuple[Action, ...]:
        """Take in what had to wait for this instant, with causes; the actions that are due."""
        member, session = place.member, place.session
        step = member.collect(time_ns)
        session.values.update(step.inputs)
        for name, causes in step.causes.items():
            session.input_causes.setdefault(name, {}).update(causes)
        changed.extend(step.inputs)
        member.awaits = bool(member.orders) or any(
            feed.pending for feeds in (place.plain, place.mixed) for feed in feeds
        )
        return step.actions

    def _publish(
        self, stage: Stage, outlets: list[Outlet], values: list[bytes], time_ns: int
    ) -> None:
        """Check, record and hand on the changed outputs of a stage that says nothing else."""
        joined = b"".join(values)
        if has_minus_zero(joined):
            outlets, values = _with_plain_zeros(outlets, values)
            joined = b"".join(values)
            if not outlets:
                return
        everything: Vector = np.frombuffer(joined, FLOAT64)
        if not isfinite(np.vdot(everything, everything)):
            _check(outlets, values, time_ns)
        if outlets != stage.outlets:
            stage.lay_out(outlets, self._kept)
        for (outlet, cut, straight, others), data in zip(stage.layout, values, strict=True):
            outlet.data = data
            outlet.value = value = everything[cut]
            outlet.revision += 1
            for feed in straight:
                feed.visible = value
                feed.data = data
            for feed in others:
                visible_ns = time_ns + feed.delay_ns
                if feed.pending or feed.member.next_ns < visible_ns:
                    feed.pending.append((visible_ns, value, data, NOTHING))
                    feed.member.awaits = True
                else:
                    feed.visible = value
                    feed.data = data
                    feed.inlet.is_behind = True
        parts = stage.parts.copy()
        parts[1::2] = values
        self.ledger.commit(time_ns, parts, stage.head_bytes + len(joined))
        for outlet in stage.kept:
            assert outlet.value is not None
            self._entries.append(
                Record(
                    time_ns,
                    0,
                    outlet.rank,
                    outlet.owner,
                    outlet.name,
                    outlet.revision,
                    outlet.value,
                )
            )

    def _absorb(self, stage: Stage, time_ns: int) -> None:
        """The same for a stage that also tells of events, causes or actions."""
        for place in stage.places:
            result = place.session.result()
            self._exchange.absorb(place.member, result)
            place.member.set_next(result)
        for entry in self.ledger.settle(time_ns + 1):
            if not isinstance(entry, Record) or self._is_kept(entry):
                self._entries.append(entry)

    def _is_kept(self, record: Record) -> bool:
        outlets = self._exchange.members[record.owner].outlets
        return outlets[record.variable] in self._kept


def _stopped() -> float:
    return 0.0


def _mix(place: Place, changed: list[str]) -> None:
    """Give a member what became visible at inputs of several or converted sources."""
    given: dict[str, Vector] = {}
    for feed in place.mixed:
        if feed.inlet.is_behind:
            feed.inlet.is_behind = False
            place.member.give(feed.inlet, given)
    if given:
        place.session.values.update(given)
        changed.extend(given)


def _check(outlets: Iterable[Outlet], values: Iterable[bytes], time_ns: int) -> None:
    for outlet, data in zip(outlets, values, strict=True):
        check_finite(outlet.owner, outlet.name, np.frombuffer(data, FLOAT64), time_ns)


def _with_plain_zeros(
    outlets: list[Outlet], values: list[bytes]
) -> tuple[list[Outlet], list[bytes]]:
    """The outputs that are still changed when -0.0 counts as 0.0."""
    found = [
        (outlet, plain)
        for outlet, data in zip(outlets, values, strict=True)
        if (plain := plain_zeros(np.frombuffer(data, FLOAT64)).tobytes()) != outlet.data
    ]
    return [outlet for outlet, _ in found], [plain for _, plain in found]
