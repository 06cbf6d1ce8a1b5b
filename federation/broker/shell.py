"""The shell of a live run: carries out what the coordinator decides, at twins that are services."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opentelemetry import trace

from federation import telemetry
from federation.broker.clocks import Clocks
from federation.broker.flow import Flow
from federation.broker.home import (
    CLOSE_S,
    PLAN_WITHIN_S,
    Ahead,
    Entrance,
    Find,
    PlannerSession,
    RunHome,
    Seat,
    Takeover,
    all_of,
    leave,
    planner_overdue,
)
from federation.broker.memory import (
    Memory,
    write_asked,
    write_degraded,
    write_description,
    write_late,
    write_replaced,
)
from federation.broker.pace import LateSeat, Pacer
from federation.broker.seats import Answer, Degradation, Done, Heir, MemberSeat, Saved, Succession
from federation.broker.store import Frame, Item, Note
from federation.broker.why import Lookout, Standing
from federation.core import critical
from federation.core.ages import Ages
from federation.core.coordinator import FRAME_STEPS, Coordinator
from federation.core.exchange import change_id
from federation.core.ledger import Entry, Quality
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
    Left,
    Ordered,
    Refused,
    Replaced,
    Stepped,
)
from federation.core.waits import find_ways
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.scenario.run import (
    Case,
    Experiment,
    MemberCost,
    Outcome,
    PlannerFactory,
    Recorder,
    bind,
    plan_member,
)
from federation.scenario.spec import PLANNER, OnFailure, Scenario
from federation.twin import NOTHING, Description, Planner, StepInput, StepResult
from federation.wire import codec
from federation.wire.link import Link, LinkSession

SETTLE_S = 0.2
"""How long an entry that is settled may wait before readers get it."""

BACKLOG = 8_192
"""How many final entries may wait for the sink before answers wait with them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries that are final and follow all before, with the Unix times of their arrival.

    With them the ledger is complete up to and including `settled_ns`. `items` are what the run
    could be continued from, and follow all before; `saved` are states of members that go with
    what is on record by then.
    """

    entries: tuple[Entry, ...]
    receive_ns: tuple[int, ...]
    settled_ns: int
    items: tuple[Item, ...] = ()
    saved: tuple[tuple[str, Saved], ...] = ()


Sink = Callable[[Batch], Awaitable[None]]
"""Keeps a batch; gets one at a time, and the run fails when it can't. The run goes on meanwhile,
but not further than `BACKLOG` entries, and has not ended before all is kept."""


Asked = Ordered | Left | Entrance
"""What people may ask of a live run, and get a verdict on."""

Said = Input | Entrance | Takeover | Note
"""All that may be said to a live run."""

Ear = asyncio.Future[Any]
"""Hears what became of something that was said."""


class Inbox:
    """What people and the broker say to a live run, from its creation to its end.

    What comes before the run takes it, or while the run waits for its store, is kept in order.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Said, Ear | None]] = deque()
        self._taker: Callable[[Said, Ear | None], None] | None = None
        self._is_closed = False

    def put(self, event: Input | Note) -> None:
        """Hand in an event."""
        self._give(event, None)

    async def ask(self, asked: Asked | Takeover) -> Accepted:
        """Ask for something, and wait until it is granted and on record.

        Fails with what it is refused for.
        """
        if self._is_closed:
            raise refused(ENDED)
        verdict: Ear = asyncio.get_running_loop().create_future()
        self._give(asked, verdict)
        effect = await verdict
        if isinstance(effect, Refused):
            raise refused(effect)
        assert isinstance(effect, Accepted)
        return effect

    def attach(self, taker: Callable[[Said, Ear | None], None] | None) -> None:
        """Give everything to `taker` from now on, what has waited first; to nobody with None."""
        self._taker = taker
        while self._taker is not None and self._waiting:
            self._taker(*self._waiting.popleft())

    def close(self) -> None:
        """Take nothing more; orders that nobody has looked at are refused."""
        self._is_closed = True
        self._taker = None
        for _, verdict in self._waiting:
            if verdict is not None and not verdict.done():
                verdict.set_result(ENDED)
        self._waiting.clear()

    def _give(self, event: Said, verdict: Ear | None) -> None:
        if self._is_closed:
            return
        if self._taker is None:
            self._waiting.append((event, verdict))
        else:
            self._taker(event, verdict)


ENDED = Refused("the run has ended")


def refused(verdict: Refused) -> ScenarioError:
    return ScenarioError(verdict.reason, verdict.refusal, verdict.metadata)


@dataclass(frozen=True)
class Prepared:
    """A scenario wired to the twins that are there."""

    experiment: Experiment
    planner: Planner | None


async def prepare(
    scenario: Scenario,
    case: Case,
    factory: PlannerFactory | None,
    links: Mapping[str, Link],
    known: Mapping[str, Description] = NOTHING,
) -> Prepared:
    """Wire a scenario to the twins at the other ends of `links`; fails as `bind` does.

    Of members without a link, what is `known` must do.
    """
    for name in scenario.members:
        if name not in links and name not in known:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER, f"there is no link to the member {name}", {"member": name}
            )
    descriptions = {
        name: await links[name].describe() if name in links else known[name]
        for name in scenario.members
    }

    def wire() -> Prepared:
        planner = plan_member(scenario, descriptions, case, factory)
        described = known.get(PLANNER) if planner is None else planner.describe()
        return Prepared(bind(scenario, descriptions, described, case), planner)

    return await asyncio.to_thread(wire)


async def run_live(
    scenario: Scenario,
    case: Case,
    factory: PlannerFactory | None,
    links: Mapping[str, Link],
    *,
    epoch: int,
    keep_ledger: bool = False,
    sink: Sink | None = None,
    on_commit: Callable[[int], None] | None = None,
    inbox: Inbox | None = None,
    prepared: Prepared | None = None,
    find: Find | None = None,
    memory: Memory | None = None,
    asked: Sequence[Asked] = (),
    gone: Callable[[str], None] = lambda member: None,
    lookout: Lookout | None = None,
    run: str = "",
    ahead: Ahead | None = None,
) -> Outcome:
    """Do one run with members that are services, and the planner in this process.

    The digest is that of `run_local`, bit for bit. `links` stay open, the sessions in them are
    closed. `inbox` brings in orders; `prepared` is what `prepare` gave for the same arguments.
    A member that is lost is looked for with `find`, at its old address when that is None.
    `memory` is what an earlier part of the run left, and `asked` what people got of it then.
    `gone` hears of members that have left. Under the name `run` others may act on the members, as
    these let them. At `lookout` one sees what the run waits for.
    Raises what aborts the run: MEMBER_LOST
    when a member goes away for good. A run that is cancelled ends its sessions first. Of
    members that are services the CPU time is not known and stays 0; `Outcome.cpu_s` is that of
    this process, whatever else it did meanwhile.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    inbox, memory, lookout = inbox or Inbox(), memory or Memory(), lookout or Lookout()
    home: RunHome | None = None
    with telemetry.tracer.start_as_current_span(
        "run", attributes={"scenario": scenario.name, "measure": case.measure, "run": case.run}
    ) as span:
        try:
            prepared = prepared or await prepare(scenario, case, factory, links)
            home = RunHome(scenario, case, prepared.planner, links, epoch, find, run, ahead)
            # a paced frame has one step, so that none is given before its time
            coordinator = prepared.experiment.coordinator(1 if scenario.pace else FRAME_STEPS)
            shell = Shell(
                coordinator,
                Recorder(prepared.experiment, case, keep_ledger),
                inbox,
                sink,
                on_commit,
                memory,
                home,
                gone,
                Ages(scenario.staleness_ns()),
                None if scenario.pace is None else Pacer(scenario.pace),
            )
            lookout.waits_for("the sessions of its members to open", home.open_within_s)
            await shell.seat()
            outcome = await shell.drive(lookout, asked)
        finally:
            inbox.close()
            lookout.waits_for("the sessions of its members to close", CLOSE_S)
            if home is not None:
                await home.leave()
        outcome.wall_s = time.perf_counter() - started
        outcome.critical_path = path = shell.path(started, outcome.wall_s)
        span.set_attributes(telemetry.path_attributes(path))
    outcome.cpu_s = time.process_time() - started_cpu
    return outcome


@dataclass(slots=True, eq=False)
class _Place:
    """A member at work: its seat, the grant in hand, and what it has cost so far."""

    name: str
    seat: Seat
    answered: Done
    begin: Callable[[Sequence[StepInput], Done], None]
    """Where its grants go: to the seat, or to who answers for it while it is late."""
    late: LateSeat | None = None
    began_s: float = 0.0
    ended_s: float = 0.0
    """When its last answer came."""
    granted: int = 0
    """How many steps it is granted; 0 when it owes no answer."""
    until_ns: int = 0
    """The last of them."""
    unlocked_by: critical.Frame | None = None
    """The answer upon which they were granted."""
    pace_s: float = 0.0
    """How long the grant waited for the wall clock."""
    due_s: float | None = None
    """When a grant that waits for the wall clock is given, by the clock of the loop."""
    timer: asyncio.TimerHandle | None = None
    span: trace.Span | None = None
    steps: int = 0
    on_record: int = 0
    """How many of its first steps are on record already."""
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Shell:
    """One run of a coordinator, from its start to the last answer.

    Whatever happens is a call from the event loop: an answer goes to the coordinator at once,
    and the grants that follow are posted before the call returns. Only the sink is waited for.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        recorder: Recorder,
        inbox: Inbox,
        sink: Sink | None,
        on_commit: Callable[[int], None] | None,
        memory: Memory,
        home: RunHome,
        gone: Callable[[str], None],
        ages: Ages,
        pacer: Pacer | None,
    ) -> None:
        self._coordinator = coordinator
        self._home = home
        self._gone = gone
        self._leaving: dict[str, int] = {}
        """Members that leave, and when."""
        self._left: set[str] = set()
        self._parting: set[asyncio.Task[None]] = set()
        self._ages = ages
        self._pacer = pacer
        self._clocks: Clocks | None = None
        # grants that wait for the wall clock would keep others from their turn
        self._flow = Flow() if pacer is None else None
        self._last: critical.Frame | None = None
        """The answer that was taken last."""
        self._frames = self._fold_at = 0
        self._drive_s = 0.0
        self._places: dict[str, _Place] = {}
        self._memory = memory
        self._recorder = recorder
        self._inbox = inbox
        self._sink = sink
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._parent = trace.get_current_span()
        self._is_traced = self._parent.get_span_context().is_valid
        self._end: asyncio.Future[str] = self._loop.create_future()
        self._held: deque[tuple[Stepped | Failed, critical.Frame]] = deque()
        """Answers that wait until the sink has caught up."""
        self._unkept: list[Entry] = []
        """Entries that are final and have not been given to the sink."""
        self._items: list[Item] = []
        self._saved: list[tuple[str, Saved]] = []
        """What the run could be continued from and has not been given to the sink."""
        self._accepted: list[tuple[Ear, Accepted]] = []
        """Requests that are granted, of which nobody is told before they are on record."""
        self._keeping: asyncio.Task[None] | None = None
        self._verdict: Finished | Aborted | None = None
        self._receive_ns: dict[tuple[str, int], int] = {}
        """When the answer about a member's instant came."""
        self._foremost_ns = 0
        self._settled_ns = -1

    async def seat(self) -> None:
        """Give every member its place; sessions are opened all at once."""
        home = self._home

        async def sit(name: str, description: Description) -> Seat:
            is_known = name in self._memory.pasts or name in self._memory.desks
            if home.policy(name) == OnFailure() and not is_known and not home.diverges(name):
                return await home.open(name, again=False)
            seat = self._seat(name, description)
            if home.reaches(name):
                await seat.open()
            return seat

        async def place(name: str, description: Description) -> None:
            self._sit(name, await sit(name, description))

        self._clocks = home.clocks
        descriptions = self._coordinator.wiring.descriptions
        await all_of([place(n, d) for n, d in descriptions.items() if n != PLANNER])
        if PLANNER in descriptions:  # it is shown what the others can do
            await place(PLANNER, descriptions[PLANNER])
        home.begin()

    def _is_given_up_when_late(self, member: str) -> bool:
        """Whether others go on without a member that is late: nothing but its period says when
        it steps, and at its instants it steps once."""
        wiring = self._coordinator.wiring
        policy = wiring.descriptions[member].time
        return (
            self._pacer is not None
            and self._pacer.pace.when_late == "degrade"
            and policy.period_ns > 0
            and not policy.wakes_on_input
            and not wiring.units[wiring.unit_of[member]].is_loop
        )

    def _late_seat(self, place: _Place) -> LateSeat:
        assert self._pacer is not None
        late_after_s = self._pacer.pace.late_after_s

        def changed(time_ns: int, quality: Quality) -> None:
            is_late = quality is Quality.STALE
            why = (
                f"it took more than {late_after_s:g} s for its step" if is_late else "in time again"
            )
            error = TwinError(Reason.MEMBER_LATE, why, {"member": place.name})
            self.degraded(place.name, Degradation(time_ns, quality, error), is_new=True)

        def failed(error: FederationError) -> None:
            self._do(lambda: self._coordinator.handle(Failed(place.name, error)))

        def told(results: Sequence[StepResult]) -> None:
            self._items.append(write_late(place.name, results, time.time_ns()))

        return LateSeat(place.seat.begin, late_after_s, changed, failed, told)

    def _seat(self, name: str, description: Description, start_ns: int = 0) -> MemberSeat:
        policy, past = self._home.policy(name), self._memory.pasts.get(name)
        sizes = description.output_sizes()
        desks = self._memory.desks.get(name)
        return MemberSeat(
            name,
            sizes,
            policy,
            self._home,
            self,
            past,
            start_ns,
            desks,
            diverges=self._home.diverges(name),
            asks_to_wake=not description.time.period_ns,
            looks=self._home.looks(name),
        )

    def _sit(self, name: str, seat: Seat) -> None:
        self._home.seats.append(seat)
        place = self._places[name] = _Place(name, seat, _ignore, seat.begin)
        place.answered = partial(self._answered, place)
        if self._is_given_up_when_late(name):
            place.late = self._late_seat(place)
            place.begin = place.late.begin
        if (past := self._memory.pasts.get(name)) is not None:
            place.on_record = past.steps

    async def drive(self, lookout: Lookout, asked: Sequence[Asked]) -> Outcome:
        """Let the coordinator begin with what people have `asked` for already, and got."""
        ticking = self._loop.create_task(self._tick())
        asking = self._loop.create_task(self._clocks.measure()) if self._clocks else None
        lookout.waits_for("")
        lookout.standings = self._standings
        lookout.stale = lambda: self._ages.stale(self._present_ns())
        if self._pacer is not None:
            lookout.pace = self._pacer.report
        self._drive_s = time.perf_counter()
        try:
            told = list(asked)
            events = [a.event if isinstance(a, Entrance) else a for a in asked]
            self._do(lambda: self._coordinator.start(events), lambda: (told.pop(0), None))
            self._inbox.attach(self._take)
            digest = await self._end
        finally:
            self._inbox.attach(None)
            self._verdict = self._verdict or Aborted(_GONE)
            for place in self._places.values():
                if place.timer is not None:
                    place.timer.cancel()
                if place.late is not None:
                    place.late.close()
            lookout.standings = tuple
            tasks = [task for task in (ticking, asking, self._keeping) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for verdict, _ in self._accepted:
                _tell(verdict, ENDED)
        outcome = self._recorder.finish(digest)
        outcome.costs = {
            name: MemberCost(place.steps, place.wall_s, place.cpu_s)
            for name, place in self._places.items()
        }
        outcome.pace = None if self._pacer is None else self._pacer.report()
        outcome.stale = list(self._ages.stale(self._coordinator.horizon_ns))
        return outcome

    # -- what it waits for, and what it waited for -----------------------------------------

    def path(self, started_s: float, wall_s: float) -> critical.CriticalPath:
        """What the wall time of the run went to, which began at `started_s`."""
        ways = find_ways(self._coordinator.wiring)
        return critical.critical_path(
            self._last,
            {pair: name for pair, (_, name) in ways.items()},
            started_s=started_s,
            drive_s=self._drive_s,
            ended_s=started_s + wall_s,
        )

    def _fold(self) -> None:
        each = critical.FOLD_AFTER_EACH * len(self._places)
        self._fold_at = self._frames + critical.FOLD_AFTER + each
        heads = [place.unlocked_by for place in self._places.values() if place.granted]
        heads += [frame for _, frame in self._held]
        critical.fold([head for head in (self._last, *heads) if head is not None])

    def _present_ns(self) -> int:
        """Up to when the run is settled or, if that is later, what the wall clock stands at."""
        now_ns = self._coordinator.now_ns - 1
        if self._pacer is not None:
            now_ns = max(now_ns, self._pacer.now_ns(self._loop.time()))
        return min(now_ns, self._coordinator.horizon_ns)

    def _standings(self) -> list[Standing]:
        now_s, clock_s = time.perf_counter(), time.monotonic()
        found = []
        for wait in self._coordinator.waits():
            place = self._places[wait.member]
            since_s = place.began_s if place.granted else place.ended_s or self._drive_s
            remaining_s: float | None = None
            trouble = place.seat.trouble if isinstance(place.seat, MemberSeat) else None
            paced_s = None
            if place.due_s is not None:
                paced_s = max(place.due_s - self._loop.time(), 0.0)
                since_s = place.ended_s or self._drive_s
            elif trouble is not None:
                remaining_s = trouble.due_s - clock_s
                since_s = now_s - (clock_s - trouble.since_s)
            elif place.granted:
                remaining_s = _answer_within_s(place.seat) - (now_s - since_s)
            found.append(
                Standing(
                    wait,
                    now_s - since_s,
                    remaining_s,
                    trouble,
                    paced_s,
                    None if self._clocks is None else self._clocks.of(wait.member),
                    place.late is not None and place.late.is_late,
                    self._clock_fault(wait.member),
                )
            )
        return found

    # -- what is said besides answers ------------------------------------------------------

    def saved(self, member: str, state: Saved) -> None:
        self._saved.append((member, state))

    def degraded(self, member: str, change: Degradation, *, is_new: bool) -> None:
        event = Degraded(member, change.time_ns, change.quality, change.error)
        if is_new:
            _log.warning("%s is %s: %s", member, change.quality.name.lower(), change.error)
            self._items.append(write_degraded(event))
        self._do(lambda: self._coordinator.handle(event))

    def replaced(self, member: str, change: Succession, heir: Heir | None) -> None:
        event = Replaced(member, change.time_ns, change.text)
        if heir is not None:
            self._items.append(write_replaced(member, change))
            event_id = change_id("replaced", member, change.time_ns)
            self._accepted.append((heir.done, Accepted(event_id, change.time_ns)))
        self._do(lambda: self._coordinator.handle(event))

    def recovered(self, member: str, error: FederationError, wall_s: float) -> None:
        _log.warning("%s was lost and is back after %.2f s: %s", member, wall_s, error)
        self._recorder.outcome.recoveries.append((member, str(error), wall_s))

    def _take(self, said: Said, verdict: Ear | None) -> None:
        match said:
            case Failed():
                if said.member in self._left:
                    return
                seat = self._places[said.member].seat
                if isinstance(seat, MemberSeat):
                    seat.lose(said.error)
                else:
                    self._do(lambda: self._coordinator.handle(said))
            case Entrance():
                self._do(lambda: self._coordinator.handle(said.event), lambda: (said, verdict))
            case Ordered() | Left():
                self._do(lambda: self._coordinator.handle(said), lambda: (said, verdict))
            case Takeover():
                assert verdict is not None
                self._take_over(said, verdict)
            case Note():
                self._items.append(said)
                self._keep(())
            case _:
                raise AssertionError(f"nobody says {said} to a run")

    def _grant_request(self, asked: Asked, ear: Ear | None, effect: Accepted) -> None:
        """See to what the coordinator has granted, before anything follows from it."""
        match asked:
            case Entrance():
                self._home.admit(asked)
                self._recorder.admit(asked.event.descriptions)
                for name, description in asked.event.descriptions.items():
                    self._sit(name, self._seat(name, description, effect.time_ns))
            case Left():
                self._leaving[asked.member] = effect.time_ns
        if ear is None:
            return  # it was known from the start, and is on record
        if isinstance(asked, Entrance):
            for name, description in asked.event.descriptions.items():
                self._items.append(write_description(name, description, effect.time_ns))
            self._items.append(write_asked(asked.at(effect.time_ns)))
        elif isinstance(asked, Ordered):
            serial = int(effect.event.rpartition("/")[2])
            self._items.append(write_asked(replace(asked, time_ns=effect.time_ns, serial=serial)))
        else:
            self._items.append(write_asked(replace(asked, time_ns=effect.time_ns)))
        self._accepted.append((ear, effect))

    def _take_over(self, takeover: Takeover, ear: Ear) -> None:
        """Have another service go on for a member; its seat knows when."""
        member = takeover.member
        place = self._places[member]
        present, events = self._coordinator.present(member)
        time_ns = present.time_ns + 1 if takeover.time_ns is None else takeover.time_ns
        if self._verdict is not None or member in self._left:
            _tell(ear, ENDED)
            return
        if time_ns <= present.time_ns:
            first_ns = present.time_ns + 1
            why = f"{member} has passed {time_ns} ns; the earliest instant is {first_ns} ns"
            metadata = {"earliest_ns": str(first_ns)}
            _tell(ear, Refused(why, Reason.INSTANT_PASSED, metadata))
            return
        if place.late is not None:
            why = "a run that goes on without late members (pace: when_late: degrade) keeps them"
            _tell(ear, Refused(why, Reason.UNSUPPORTED, {"member": member}))
            return
        self._home.expect(takeover)
        seat = place.seat
        if isinstance(seat, LinkSession):
            session = seat
            seat = self._seat(member, self._coordinator.wiring.descriptions[member])
            seat.adopt(session, present, events)
            self._home.seats[self._home.seats.index(session)] = place.seat = seat
            place.begin = seat.begin
        assert isinstance(seat, MemberSeat)
        heir = Heir(time_ns, takeover.text, takeover.is_same, takeover.place, ear)
        seat.replace(heir, present, events)

    def _answered(self, place: _Place, results: Answer) -> None:
        """Take what became of a grant."""
        if self._verdict is not None:
            return
        place.ended_s = now_s = time.perf_counter()
        wall_s = now_s - place.began_s
        place.wall_s += wall_s
        granted, place.granted = place.granted, 0
        place.steps += granted
        frame = critical.Frame(
            place.unlocked_by, place.name, place.until_ns, place.began_s, now_s, 0.0, place.pace_s
        )
        telemetry.step_duration.record(wall_s, {"member": place.name})
        if self._flow is not None:
            self._flow.answered(granted, wall_s, now_s)
            self._coordinator.in_flight = self._flow.limit
        if isinstance(place.seat, PlannerSession):
            place.cpu_s = place.seat.cpu_s
        answer: Stepped | Failed
        if isinstance(results, FederationError):
            answer = Failed(place.name, results)
        else:
            if fault := self._clock_fault(place.name):
                results = [r if r.held else r._replace(held=fault) for r in results]
            answer = Stepped(place.name, tuple(results))
        if place.span is not None:
            if isinstance(results, FederationError):
                place.span.set_attribute("error.type", results.reason.value)
            place.span.end()
            place.span = None
        if len(self._unkept) > BACKLOG:
            self._held.append((answer, frame))
        else:
            self._handle(answer, frame)

    def _clock_fault(self, member: str) -> str:
        """Why the values of another city can't be trusted, by its clock."""
        peer = self._home.peering(member)
        if peer is None or self._clocks is None:
            return ""
        return self._clocks.fault(member, peer.clock_within_s)

    def _handle(self, answer: Stepped | Failed, frame: critical.Frame) -> None:
        self._last = frame
        self._frames += 1
        if self._frames > self._fold_at:
            self._fold()
        if isinstance(answer, Stepped) and answer.results:
            if self._ages.bounds_ns:
                self._ages.heard(answer.member, answer.results)
            if self._sink is not None:
                now_ns = time.time_ns()
                for result in answer.results:
                    self._receive_ns[answer.member, result.time_ns] = now_ns
                self._record(self._places[answer.member], answer.results)
            self._foremost_ns = max(self._foremost_ns, answer.results[-1].time_ns)
        self._do(lambda: self._coordinator.handle(answer))

    def _record(self, place: _Place, results: Sequence[StepResult]) -> None:
        """Keep for the journal what is not on record yet."""
        known = place.on_record - (place.steps - len(results))
        if known < len(results):
            new = results[max(known, 0) :]
            self._items.append(Frame(place.name, place.steps, codec.encode_results(new)))

    def _do(
        self,
        decide: Callable[[], Sequence[Effect]],
        asked: Callable[[], tuple[Asked, Ear | None]] | None = None,
    ) -> None:
        """Do what the coordinator asks for. What goes wrong here ends the run.

        `asked` says, verdict by verdict, what was asked for and who waits for it.
        """
        try:
            for effect in decide():
                match effect:
                    case Grant():
                        self._grant(effect)
                    case Commit():
                        self._keep(effect.entries)
                    case Accepted():
                        assert asked is not None
                        self._grant_request(*asked(), effect)
                        self._keep(())
                    case Refused():
                        assert asked is not None
                        _, ear = asked()
                        if ear is None:
                            raise refused(effect)
                        _tell(ear, effect)
                    case Finished() | Aborted():
                        self._verdict = effect
                        self._keep(())
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)

    def _grant(self, grant: Grant) -> None:
        place = self._places[grant.member]
        place.granted = len(grant.steps)
        place.until_ns = grant.steps[-1].time_ns
        place.unlocked_by = self._last
        place.began_s = time.perf_counter()
        if self._pacer is not None and self._is_early(place, grant, self._pacer):
            return
        self._give(place, grant)

    def _is_early(self, place: _Place, grant: Grant, pacer: Pacer) -> bool:
        """Whether a grant has to wait for the wall clock; then it is given in time.

        What is on record is not waited for; the clock starts with the first step that is not.
        """
        if place.steps < place.on_record:
            return False
        place.pace_s = 0.0
        time_ns, now_s = grant.steps[0].time_ns, self._loop.time()
        due_s = pacer.due_s(time_ns, now_s, time_ns if self._memory.pasts else 0)
        if due_s <= now_s:
            self._note_lag(pacer, time_ns, now_s)
            return False

        def in_time() -> None:
            place.due_s = place.timer = None
            if self._verdict is None:
                began_s = time.perf_counter()
                place.pace_s, place.began_s = began_s - place.began_s, began_s
                self._note_lag(pacer, time_ns, self._loop.time())
                self._give(place, grant)

        place.due_s = due_s
        place.timer = self._loop.call_at(due_s, in_time)
        return True

    def _note_lag(self, pacer: Pacer, time_ns: int, now_s: float) -> None:
        pacer.gave(time_ns, now_s)
        telemetry.pace_lag.record(pacer.lag_s)

    def _give(self, place: _Place, grant: Grant) -> None:
        if not self._is_traced:
            place.begin(grant.steps, place.answered)
            return
        span = telemetry.tracer.start_span(
            "grant",
            trace.set_span_in_context(self._parent),
            attributes={
                "member": grant.member,
                "until_ns": grant.steps[-1].time_ns,
                "steps": len(grant.steps),
            },
        )
        place.span = span
        with trace.use_span(span):
            place.begin(grant.steps, place.answered)

    def _keep(self, entries: Sequence[Entry]) -> None:
        """Take entries that are final, and hand on what there is unless the sink is at work."""
        self._unkept.extend(entries)
        if self._keeping is not None:
            return
        if self._sink is None:
            self._commit()
            self._tell_accepted(len(self._accepted))
            self._finish()
        else:
            self._keeping = self._loop.create_task(self._feed(self._sink))

    async def _feed(self, sink: Sink) -> None:
        """Give the sink one batch after the other until no entry is left."""
        try:
            while (batch := self._commit()) is not None:
                count = len(self._accepted)
                await sink(batch)
                self._tell_accepted(count)
                if self._on_commit is not None:
                    self._on_commit(batch.settled_ns + 1)
                while self._held and len(self._unkept) <= BACKLOG:
                    answer, frame = self._held.popleft()
                    frame.store_s = time.perf_counter() - frame.ended_s
                    self._handle(answer, frame)
                if not self._unkept and self._verdict is None:
                    break  # that time has gone on meanwhile is news for the next tick
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)
        else:
            self._keeping = None
            self._finish()

    def _tell_accepted(self, count: int) -> None:
        """Say yes to the first so many orders, which are on record now."""
        for verdict, effect in self._accepted[:count]:
            _tell(verdict, effect)
        del self._accepted[:count]

    def _commit(self) -> Batch | None:
        """What is final and was not handed on, if there is news."""
        settled_ns = self._coordinator.now_ns - 1
        self._unkept.extend(self._coordinator.settle())
        is_news = self._unkept or self._items or self._saved
        if not is_news and settled_ns == self._settled_ns:
            return None
        self._settled_ns = settled_ns
        for member in [m for m, time_ns in self._leaving.items() if time_ns <= settled_ns]:
            self._part(member)
        entries, self._unkept = tuple(self._unkept), []
        self._recorder.take(entries)
        telemetry.run_lag.record((self._foremost_ns - settled_ns - 1) / 1e9)
        items, self._items = tuple(self._items), []
        saved, self._saved = tuple(self._saved), []
        if self._sink is None:
            if self._on_commit is not None:
                self._on_commit(settled_ns + 1)
            return None
        now_ns = time.time_ns()
        came = tuple(self._receive_ns.get((e.owner, e.time_ns), now_ns) for e in entries)
        self._receive_ns = {k: t for k, t in self._receive_ns.items() if k[1] > settled_ns}
        return Batch(entries, came, settled_ns, items, saved)

    def _part(self, member: str) -> None:
        """Let a member go that has made its last step."""
        del self._leaving[member]
        self._left.add(member)
        self._gone(member)
        leaving = self._loop.create_task(leave(self._places[member].seat))
        self._parting.add(leaving)
        leaving.add_done_callback(self._parting.discard)

    def _finish(self) -> None:
        """End the run if the coordinator has, now that all that it left is kept."""
        if self._end.done():
            return
        match self._verdict:
            case Finished(digest):
                self._end.set_result(digest)
            case Aborted(error):
                self._end.set_exception(error)

    async def _tick(self) -> None:
        """Have what is settled handed on, however little it is."""
        while True:
            await asyncio.sleep(SETTLE_S)
            now_s = time.monotonic()
            for place in self._places.values():
                if isinstance(place.seat, MemberSeat):
                    place.seat.look(now_s)
                elif isinstance(place.seat, PlannerSession):
                    self._look_at_planner(place)
                if self._flow is not None and place.granted:
                    self._flow.owed(place.began_s, time.perf_counter())
            if self._flow is not None and self._flow.limit != self._coordinator.in_flight:
                self._do(partial(self._coordinator.limit, self._flow.limit))
            self._keep(())

    def _look_at_planner(self, place: _Place) -> None:
        """Give the planner up when it is overdue; the thread that it is in can't be ended."""
        is_at_work = place.granted and place.due_s is None
        if is_at_work and time.perf_counter() > place.began_s + PLAN_WITHIN_S:
            place.answered(planner_overdue())


def _answer_within_s(seat: Seat) -> float:
    """How long a member may take for a frame."""
    if isinstance(seat, MemberSeat):
        return seat.answer_within_s
    return seat.link.options.answer_timeout_s if isinstance(seat, LinkSession) else PLAN_WITHIN_S


def _tell(ear: Ear, what: Effect) -> None:
    """Say what became of something, unless nobody waits for it any more."""
    if not ear.done():
        ear.set_result(what)


def _ignore(results: Answer) -> None:
    """Nothing was asked."""


_GONE = TwinError(Reason.MEMBER_LOST, "the run was given up")
