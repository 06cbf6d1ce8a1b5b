"""The shell of a live run: carries out what the coordinator decides, at twins that are services."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import numpy as np
from opentelemetry import trace

from federation import telemetry
from federation.broker.clocks import Clocks
from federation.broker.flow import Flow
from federation.broker.memory import (
    Added,
    Memory,
    Origin,
    write_asked,
    write_degraded,
    write_description,
    write_replaced,
)
from federation.broker.pace import LateSeat, Pacer
from federation.broker.registry import Lease
from federation.broker.seats import Degradation, Heir, MemberSeat, Place, Saved, Succession
from federation.broker.store import NOT_SETTLED, Frame, Item, State, Store
from federation.broker.why import Lookout, Standing, write_results
from federation.core import critical
from federation.core.ages import Ages
from federation.core.coordinator import FRAME_STEPS, Coordinator
from federation.core.exchange import change_id
from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
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
    blame,
    plan_member,
)
from federation.scenario.spec import PLANNER, Addition, Member, OnFailure, Scenario
from federation.twin import (
    NOTHING,
    Action,
    Description,
    LinearBlock,
    Planner,
    Session,
    StepInput,
    StepResult,
)
from federation.wire import codec
from federation.wire.link import Link, LinkSession

SETTLE_S = 0.2
"""How long an entry that is settled may wait before readers get it."""

BACKLOG = 8_192
"""How many final entries may wait for the sink before answers wait with them."""

CONNECT_AGAIN_S = 0.5
"""How long one attempt to reach a member that was lost may take."""

PLAN_WITHIN_S = 600.0
"""How long the planner may take to open, and for one frame."""

TURN_WITHIN_S = 86_400.0
"""How long a run may wait for others to end before it begins."""

STORE_WITHIN_S = 120.0
"""How long the store may take for one batch, or to note where a run stands."""

CLOSE_S = 2.0
"""How long a run waits for its members to close their sessions."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Planners take turns in one thread: their solver borrows the process's output while it works.
_planning = ThreadPoolExecutor(1, thread_name_prefix="planner")


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

Results = Sequence[StepResult] | FederationError
"""What became of a grant: a result for each step, or why there is none."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """Members that are to join a run: as the core sees them, as the document has them, where."""

    event: Joined
    addition: Addition
    links: Mapping[str, Link]

    def at(self, time_ns: int) -> Added:
        return Added(self.addition.text, time_ns, self.event.operator)


@dataclass(frozen=True, slots=True)
class Takeover:
    """A service that is to go on for a member, from its first step at `time_ns` or later."""

    member: str
    link: Link
    place: Place
    text: str
    is_same: bool
    time_ns: int | None = None


Asked = Ordered | Left | Entrance
"""What people may ask of a live run, and get a verdict on."""

Said = Input | Entrance | Takeover
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

    def put(self, event: Input) -> None:
        """Hand in an event."""
        self._give(event, None)

    async def ask(self, asked: Asked | Takeover) -> Accepted:
        """Ask for something, and wait until it is granted and on record.

        Fails with what it is refused for.
        """
        if self._is_closed:
            raise _refused(_ENDED)
        verdict: Ear = asyncio.get_running_loop().create_future()
        self._give(asked, verdict)
        effect = await verdict
        if isinstance(effect, Refused):
            raise _refused(effect)
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
                verdict.set_result(_ENDED)
        self._waiting.clear()

    def _give(self, event: Said, verdict: Ear | None) -> None:
        if self._is_closed:
            return
        if self._taker is None:
            self._waiting.append((event, verdict))
        else:
            self._taker(event, verdict)


_ENDED = Refused("the run has ended")


def _refused(verdict: Refused) -> ScenarioError:
    return ScenarioError(verdict.reason, verdict.refusal, verdict.metadata)


class Seat(Protocol):
    """A member's place in a run, wherever its model is."""

    def begin(self, steps: Sequence[StepInput], done: Callable[[Results], None]) -> None:
        """Have the member do these steps, which are those of one grant.

        `done` is called once from the event loop, never from inside `begin`: with a result for
        each step, or with the error that ends the member's part. A seat is given one grant at
        a time. What the results say is checked by whoever gets them. The span that is current
        is that of the grant.
        """

    async def close(self) -> None:
        """End the member's session; a grant that it still has comes to nothing."""


class PlannerSession:
    """The planner runs in this process, in the thread for planners."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.cpu_s = 0.0
        self.done: tuple[StepResult, ...] = ()
        """A frame that fails half-way has done nothing."""
        self._session = Session(planner, PLANNER)

    async def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        await self._work(lambda: self._session.open(seed, parameters))

    async def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        await self._work(lambda: self.planner.prepare(blocks))

    def begin(self, steps: Sequence[StepInput], done: Callable[[Results], None]) -> None:
        def ended(work: asyncio.Future[list[StepResult]]) -> None:
            if work.cancelled():
                return
            error = work.exception()
            assert error is None or isinstance(error, FederationError)
            done(work.result() if error is None else error)

        work = self._work(lambda: [self._session.advance(step) for step in steps])
        work.add_done_callback(ended)

    async def advance(self, steps: Sequence[StepInput]) -> Sequence[StepResult]:
        return await self._work(lambda: [self._session.advance(step) for step in steps])

    async def snapshot(self) -> bytes:
        return await self._work(lambda: codec.encode_session(self._session))

    async def restore(self, state: bytes) -> None:
        await self._work(lambda: codec.restore_session(self._session, state))

    async def close(self) -> None:
        await self._work(self.planner.close)

    def _work(self, do: Callable[[], _T]) -> asyncio.Future[_T]:
        context = contextvars.copy_context()

        def work() -> _T:
            began_s = time.thread_time()
            try:
                with blame(PLANNER):
                    return context.run(do)
            finally:
                self.cpu_s += time.thread_time() - began_s

        return asyncio.get_running_loop().run_in_executor(_planning, work)


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


Find = Callable[[str], Awaitable[Link]]
"""A link to where a member's service is now; fails when it is not there yet."""


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
) -> Outcome:
    """Do one run with members that are services, and the planner in this process.

    The digest is that of `run_local`, bit for bit. `links` stay open, the sessions in them are
    closed. `inbox` brings in orders; `prepared` is what `prepare` gave for the same arguments.
    A member that is lost is looked for with `find`, at its old address when that is None.
    `memory` is what an earlier part of the run left, and `asked` what people got of it then.
    `gone` hears of members that have left. At `lookout` one sees what the run waits for.
    Raises what aborts the run: MEMBER_LOST
    when a member goes away for good. A run that is cancelled ends its sessions first. Of
    members that are services the CPU time is not known and stays 0; `Outcome.cpu_s` is that of
    this process, whatever else it did meanwhile.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    inbox, memory, lookout = inbox or Inbox(), memory or Memory(), lookout or Lookout()
    home: _Home | None = None
    with telemetry.tracer.start_as_current_span(
        "run", attributes={"scenario": scenario.name, "measure": case.measure, "run": case.run}
    ) as span:
        try:
            prepared = prepared or await prepare(scenario, case, factory, links)
            home = _Home(scenario, case, prepared.planner, links, epoch, find)
            # a paced frame has one step, so that none is given before its time
            coordinator = prepared.experiment.coordinator(1 if scenario.pace else FRAME_STEPS)
            shell = _Shell(
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


class _Home:
    """Opens the sessions of one run, where the services of its members are."""

    def __init__(
        self,
        scenario: Scenario,
        case: Case,
        planner: Planner | None,
        links: Mapping[str, Link],
        epoch: int,
        find: Find | None,
    ) -> None:
        self.planner = planner
        self.seats: list[Seat] = []
        self.members: dict[str, Member] = dict(scenario.members)
        self._case = case
        self._parameters = dict(case.parameters)
        self._first = tuple(scenario.members)
        self._links = dict(links)
        self._given = tuple(links.values())
        self._epoch = epoch
        self._find = find or self._find_at_old_address
        self.clocks = Clocks(lambda: self._links)
        self._heirs: dict[str, Link] = {}
        """Links to services that are to take over."""
        self._has_begun = False
        self._fresh: dict[str, LinkSession] = {}
        """Sessions that have not made a step yet."""

    @property
    def open_within_s(self) -> float:
        """How long the opening of all sessions takes at most."""
        patience_s = max((link.options.answer_timeout_s for link in self._given), default=0.0)
        return patience_s + (0.0 if self.planner is None else PLAN_WITHIN_S)

    def policy(self, member: str) -> OnFailure:
        found = self.members.get(member)
        return OnFailure() if found is None else found.on_failure

    def reaches(self, member: str) -> bool:
        """Whether a member is known to be anywhere; one that has left need not be."""
        return member in self._links or (member == PLANNER and self.planner is not None)

    def admit(self, entrance: Entrance) -> None:
        """Know of members that join."""
        addition = entrance.addition
        self.members |= addition.members
        self._links |= entrance.links
        self._given += tuple(entrance.links.values())
        self._parameters |= {name: addition.parameters_of(name) for name in addition.members}

    def expect(self, takeover: Takeover) -> None:
        """Know where the service is that is to take over a member."""
        self._given += (takeover.link,)
        self._heirs[takeover.member] = takeover.link

    async def open(
        self, member: str, *, again: bool, start_ns: int = 0
    ) -> PlannerSession | LinkSession:
        if member == PLANNER:
            return await self._open_planner()
        if again:
            return await self._open_again(member, member, start_ns)
        session = await self._session(member, self._links[member], start_ns)
        if not self._has_begun:
            self._fresh[member] = session
        return session

    def begin(self) -> None:
        """The members make their first steps now."""
        self._has_begun = True
        self._fresh.clear()

    async def open_substitute(self, member: str, start_ns: int = 0) -> LinkSession:
        return await self._open_again(member, substitute_of(member), start_ns)

    async def open_heir(self, member: str, start_ns: int) -> LinkSession:
        link = self._heirs[member]
        session = await self._session(member, link, start_ns)
        self._links[member] = link
        return session

    async def leave(self) -> None:
        """End all sessions, and the links that were found on the way."""
        await asyncio.gather(*(_leave(seat) for seat in self.seats))
        found = [link for link in self._links.values() if link not in self._given]
        await asyncio.gather(*(link.close() for link in found))

    async def _session(self, member: str, link: Link, start_ns: int = 0) -> LinkSession:
        parameters = self._parameters.get(member, {})
        seed = self._case.member_seed(member)
        return await link.session(member, seed, parameters, self._epoch, start_ns)

    async def _open_again(self, member: str, service: str, start_ns: int) -> LinkSession:
        """A session where the service is found, which is waited for."""
        limit_s = self.policy(member).back_within_s
        why = "it has not come up"
        try:
            async with asyncio.timeout(limit_s):
                pause_s = 0.02
                while True:
                    try:
                        link = await self._find(service)
                        before = self._links.get(service)
                        if before is not link:
                            self._links[service] = link
                            if before is not None and before not in self._given:
                                await before.close()
                        return await self._session(member, link, start_ns)
                    except FederationError as error:
                        if error.reason not in AWAY:
                            raise
                        why = error.message
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 0.5)
        except TimeoutError:
            raise TwinError(
                Reason.MEMBER_LOST,
                f"{service} was not back within {limit_s:g} s: {why}",
                {"member": member},
            ) from None

    async def _find_at_old_address(self, service: str) -> Link:
        link = self._links.get(service)
        if link is None:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER, f"there is no link to {service}", {"member": service}
            )
        options = replace(link.options, connect_timeout_s=CONNECT_AGAIN_S)
        return await Link.connect(link.address, service, options)

    async def _open_planner(self) -> PlannerSession:
        """The planner is shown, before it starts, what the members can do."""
        try:
            async with asyncio.timeout(PLAN_WITHIN_S):
                return await self._planner_shown()
        except TimeoutError:
            raise _planner_overdue() from None

    async def _planner_shown(self) -> PlannerSession:
        assert self.planner is not None
        session = PlannerSession(self.planner)
        await session.open(self._case.member_seed(PLANNER), self._case.parameters.get(PLANNER, {}))
        if periods := self.planner.periods_ns():
            members = self._first
            blocks = await _all([self._flexibility(name, periods) for name in members])
            found = zip(members, blocks, strict=True)
            await session.prepare({name: block for name, block in found if block is not None})
        return session

    async def _flexibility(self, member: str, periods_ns: Sequence[int]) -> LinearBlock | None:
        """What a member could do, asked of a session that has not made a step."""
        if member in self._fresh:
            return await self._fresh[member].flexibility(periods_ns)
        if member not in self._links:
            return None
        session = await self._session(member, self._links[member])
        try:
            return await session.flexibility(periods_ns)
        finally:
            await session.close()


AWAY = (Reason.MEMBER_LOST, Reason.UNREACHABLE, Reason.UNKNOWN_MEMBER)
"""Errors of a service that may still come up."""


def substitute_of(member: str) -> str:
    """The name under which the service that stands in for a member is found."""
    return f"{member}-substitute"


def _planner_overdue() -> TwinError:
    return TwinError(
        Reason.MEMBER_LOST,
        f"the planner did not answer within {PLAN_WITHIN_S:g} s",
        {"member": PLANNER},
    )


async def _all(work: Sequence[Coroutine[object, object, _T]]) -> list[_T]:
    """The results in order, when all have ended; of several errors the first in order."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def _leave(seat: Seat) -> None:
    with suppress(FederationError, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await seat.close()


@dataclass(slots=True, eq=False)
class _Place:
    """A member at work: its seat, the grant in hand, and what it has cost so far."""

    name: str
    seat: Seat
    answered: Callable[[Results], None]
    begin: Callable[[Sequence[StepInput], Callable[[Results], None]], None]
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


class _Shell:
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
        home: _Home,
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
            if home.policy(name) == OnFailure() and name not in self._memory.pasts:
                return await home.open(name, again=False)
            seat = self._seat(name, description)
            if home.reaches(name):
                await seat.open()
            return seat

        async def place(name: str, description: Description) -> None:
            self._sit(name, await sit(name, description))

        self._clocks = home.clocks
        descriptions = self._coordinator.wiring.descriptions
        await _all([place(n, d) for n, d in descriptions.items() if n != PLANNER])
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

        return LateSeat(place.seat.begin, late_after_s, changed, failed)

    def _seat(self, name: str, description: Description, start_ns: int = 0) -> MemberSeat:
        policy, past = self._home.policy(name), self._memory.pasts.get(name)
        sizes = description.output_sizes()
        return MemberSeat(name, sizes, policy, self._home, self, past, start_ns)

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
                _tell(verdict, _ENDED)
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
            _tell(ear, _ENDED)
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

    def _answered(self, place: _Place, results: Results) -> None:
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
                            raise _refused(effect)
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
        leaving = self._loop.create_task(_leave(self._places[member].seat))
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
            place.answered(_planner_overdue())


def _answer_within_s(seat: Seat) -> float:
    """How long a member may take for a frame."""
    if isinstance(seat, MemberSeat):
        return seat.answer_within_s
    return seat.link.options.answer_timeout_s if isinstance(seat, LinkSession) else PLAN_WITHIN_S


def _tell(ear: Ear, what: Effect) -> None:
    """Say what became of something, unless nobody waits for it any more."""
    if not ear.done():
        ear.set_result(what)


def _ignore(results: Results) -> None:
    """Nothing was asked."""


_GONE = TwinError(Reason.MEMBER_LOST, "the run was given up")


@dataclass(eq=False)
class LiveRun:
    """A run as the broker hosts it: pending, running, then succeeded, failed or cancelled.

    What readers are told is in the store first. `changed` is set and replaced at every change:
    take it, read, and wait for it when there was nothing new. `leases` are those of the members
    that were found by their names, `places` say where each is.
    """

    name: str
    scenario: Scenario
    case: Case
    prepared: Prepared
    links: Mapping[str, Link]
    leases: dict[str, Lease]
    places: dict[str, Place]
    store: Store
    epoch: int
    keep_ledger: bool = False
    on_commit: Callable[[int], None] | None = None
    find: Find | None = None
    memory: Memory | None = None
    asked: tuple[Asked, ...] = ()
    """What people had asked for, and got, before this life of the broker."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unkept: FederationError | None = None
    """Why the run failed, if not even that could be stored."""
    stored: int = 0
    """How many entries of the ledger an earlier life of the broker has stored."""
    settled_ns: int = NOT_SETTLED
    """The instant up to which they are complete."""
    turn_within_s: float = TURN_WITHIN_S
    lookout: Lookout = field(default_factory=Lookout)
    _inbox: Inbox = field(default_factory=Inbox)
    _task: asyncio.Task[Outcome] | None = None
    _ended_by: str = ""
    _ended_because: str = ""
    _more_links: list[Link] = field(default_factory=list)
    """To members that came later."""
    _descriptions: dict[str, Description] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._descriptions.update(self.prepared.experiment.descriptions)
        for asked in self.asked:
            if isinstance(asked, Entrance):
                self._descriptions.update(asked.event.descriptions)
                self._more_links += asked.links.values()

    async def start(self, turn: asyncio.Semaphore) -> asyncio.Task[Outcome]:
        """Begin when it is this run's turn; the task gives the outcome or raises why not."""
        self._task = asyncio.create_task(self._go(turn))
        self._task.add_done_callback(_seen)
        await asyncio.sleep(0)  # a task that is cancelled before its first step ends unrecorded
        return self._task

    async def _go(self, turn: asyncio.Semaphore) -> Outcome:
        try:
            async with AsyncExitStack() as stack:
                await self._wait_for_turn(turn)
                stack.callback(turn.release)
                await self._change(State.RUNNING)
                outcome = await run_live(
                    self.scenario,
                    self.case,
                    None,
                    self.links,
                    epoch=self.epoch,
                    keep_ledger=self.keep_ledger,
                    sink=self._keep,
                    on_commit=self.on_commit,
                    inbox=self._inbox,
                    prepared=self.prepared,
                    find=self.find,
                    memory=self.memory,
                    asked=self.asked,
                    gone=self._let_go,
                    lookout=self.lookout,
                )
            origin = None if self.memory is None else self.memory.origin
            if origin is not None and origin.is_replay:
                await asyncio.to_thread(self._compare, origin, outcome.digest)
            results = write_results(outcome.critical_path, outcome.pace, outcome.stale)
            await self._change(State.SUCCEEDED, digest=outcome.digest, results=results)
            return outcome
        except asyncio.CancelledError:
            await self._change(State.CANCELLED)
            raise
        except FederationError as error:
            await self._change(State.FAILED, error=error)
            raise
        except Exception as error:
            text = f"the broker failed: {type(error).__name__}: {error}"
            await self._change(State.FAILED, error=TwinError(Reason.TWIN_FAILED, text))
            raise
        finally:
            self._inbox.close()
            links = (*self.links.values(), *self._more_links)
            await asyncio.gather(*(link.close() for link in links))

    async def _wait_for_turn(self, turn: asyncio.Semaphore) -> None:
        self.lookout.waits_for("its turn, after other runs", self.turn_within_s)
        try:
            async with asyncio.timeout(self.turn_within_s):
                await turn.acquire()
        except TimeoutError:
            raise ScenarioError(
                Reason.NO_TURN,
                f"{self.name} did not get its turn within {self.turn_within_s:g} s: other runs "
                "go on for longer",
                {"run": self.name},
            ) from None

    async def submit(self, operator: str, action: Action) -> Accepted:
        """Let a person set an actuator. Fails with UNKNOWN_MEMBER, UNKNOWN_VARIABLE,
        UNKNOWN_ENTITY or OUTSIDE_ENVELOPE."""
        where = {"member": action.member, "actuator": action.actuator, "entity": action.entity}
        description = self._describe(action.member)
        actuators = {actuator.name: actuator for actuator in description.actuators}
        if action.actuator not in actuators:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"{action.member} has no actuator {action.actuator!r}; it has "
                f"{', '.join(actuators) or 'none'}",
                where,
            )
        if action.entity not in description.ids(actuators[action.actuator].kind):
            raise ScenarioError(
                Reason.UNKNOWN_ENTITY,
                f"{action.member}.{action.actuator} has no entity {action.entity!r}",
                where,
            )
        try:
            return await self._inbox.ask(Ordered(operator, action))
        except ScenarioError as error:
            raise ScenarioError(error.reason, error.message, {**where, **error.metadata}) from None

    async def join(
        self,
        addition: Addition,
        links: Mapping[str, Link],
        leases: Mapping[str, Lease],
        places: Mapping[str, Place],
        time_ns: int | None,
        operator: str,
    ) -> Accepted:
        """Let members join at `time_ns` of the run, or as soon as they can.

        The links are the run's from now on. Fails as wiring does, with LATE_WITHOUT_DELAY,
        UNKNOWN_PARAMETER, SCENARIO_INVALID when a name is taken, and INSTANT_PASSED.
        """
        self._more_links += links.values()
        asked = await entrance(addition, links, time_ns, operator)
        descriptions = asked.event.descriptions
        accepted = await self._inbox.ask(asked)
        self._descriptions.update(descriptions)
        self.leases.update(leases)
        self.places.update(places)
        return accepted

    async def leave(self, member: str, time_ns: int | None, operator: str) -> Accepted:
        """Let a member make no step at `time_ns` of the run or later, or as soon as that can be.

        Fails with UNKNOWN_MEMBER and INSTANT_PASSED.
        """
        self._describe(member)
        return await self._inbox.ask(Left(member, time_ns, operator))

    async def replace(
        self,
        member: str,
        link: Link,
        lease: Lease | None,
        place: Place,
        time_ns: int | None,
        operator: str,
    ) -> Accepted:
        """Let another service go on for a member, from its first step at `time_ns` or later.

        Returns when it does. Fails with UNKNOWN_MEMBER, DESCRIPTION_DIFFERS, INSTANT_PASSED, and
        with UNSUPPORTED when the same model can't be handed its state; the member then stays.
        """
        self._more_links.append(link)
        before, after = self._describe(member), await link.describe()
        if member == PLANNER:
            why = "the planner is no service; it can't be replaced"
            raise ScenarioError(Reason.UNKNOWN_MEMBER, why, {"member": member})
        for what in ("entities", "variables", "actuators", "time"):
            if getattr(before, what) != getattr(after, what):
                raise ScenarioError(
                    Reason.DESCRIPTION_DIFFERS,
                    f"{place.name} has other {what} than {member}: who takes over has the same "
                    "entities, variables, actuators and time policy",
                    {"member": member, "what": what},
                )
        _check_parameters(member, after, self.case.parameters.get(member, {}))
        kinds = [f"{d.model} {d.version}" for d in (before, after)]
        is_same = kinds[0] == kinds[1] and before.data_hash == after.data_hash
        how = "with its state" if is_same else "afresh"
        text = f"{kinds[1]} goes on for {kinds[0]}, {how}, as {operator} asked"
        takeover = Takeover(member, link, place, text, is_same, time_ns)
        accepted = await self._inbox.ask(takeover)
        self._descriptions[member] = after
        self.places[member] = place
        self.leases.pop(member, None)
        if lease is not None:
            self.leases[member] = lease
        return accepted

    def _describe(self, member: str) -> Description:
        found = self._descriptions.get(member)
        if found is None:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER,
                f"the run has no member {member!r}; it has {', '.join(self._descriptions)}",
                {"member": member},
            )
        return found

    def _let_go(self, member: str) -> None:
        """A member has left; what becomes of its service is no matter of this run any more."""
        self.leases.pop(member, None)
        self.places.pop(member, None)

    def _compare(self, origin: Origin, digest: str) -> None:
        """Hold a replay to the run that it repeats. Fails with REPLAY_DIFFERS."""
        before = self.store.run(origin.run)
        if before.digest == digest:
            return
        difference = first_difference(self.store, origin.run, self.name, origin.until_ns)
        if difference or before.digest:
            raise TwinError(
                Reason.REPLAY_DIFFERS,
                f"{self.name} has another ledger than {origin.run}: {difference}",
                {"run": origin.run},
            )

    def lose(self, member: str, why: str) -> None:
        """End the run because a member may not be heard any more."""
        error = TwinError(Reason.MEMBER_LOST, f"{member} was lost: {why}", {"member": member})
        self._inbox.put(Failed(member, error))

    async def cancel(self, by: str = "", because: str = "") -> None:
        """End the run, and wait until it has ended. One that has ended already stays as it is."""
        if self._task is None or self._task.done():
            return
        if not self._task.cancelling():
            self._ended_by, self._ended_because = by, because
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep(self, batch: Batch) -> None:
        await _stored(lambda: self._store(batch))
        self._announce()

    def _store(self, batch: Batch) -> None:
        skip = min(self.stored, len(batch.entries))
        self.stored -= skip
        self.store.append(
            self.name,
            batch.entries[skip:],
            batch.receive_ns[skip:],
            max(batch.settled_ns, self.settled_ns),
            batch.items,
        )
        for member, saved in batch.saved:
            self.store.keep_snapshot(self.name, member, saved.steps, saved.time_ns, saved.state)

    async def _change(
        self,
        state: State,
        *,
        digest: str = "",
        error: FederationError | None = None,
        results: str = "",
    ) -> None:
        end_ns = time.time_ns() if state.is_over else None
        by, because = self._ended_by, self._ended_because
        try:
            await _stored(
                lambda: self.store.change(
                    self.name,
                    state,
                    digest=digest,
                    error=error,
                    end_ns=end_ns,
                    ended_by=by,
                    ended_because=because,
                    results=results,
                )
            )
        except FederationError as failure:
            if state in (State.RUNNING, State.SUCCEEDED):
                raise
            self.unkept = error or failure
            _log.error("the end of %s could not be stored: %s", self.name, failure)
        self._announce()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


async def entrance(
    addition: Addition,
    links: Mapping[str, Link],
    time_ns: int | None,
    operator: str,
    known: Mapping[str, Description] = NOTHING,
) -> Entrance:
    """What joins a run, checked as far as it says something of its own members.

    Of members without a link, what is `known` must do.
    """
    descriptions = {
        name: await links[name].describe() if name in links else known[name]
        for name in addition.members
    }
    for name in addition.parameters:
        if name.partition(".")[0] not in descriptions:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER,
                f"{name!r} is no parameter of a member that joins",
                {"parameter": name},
            )
    for name, description in descriptions.items():
        _check_parameters(name, description, addition.parameters_of(name))
    couplings = await asyncio.to_thread(addition.couplings_resolved)
    joined = Joined(descriptions, couplings, time_ns=time_ns, operator=operator)
    return Entrance(joined, addition, links)


def _check_parameters(member: str, description: Description, given: Mapping[str, float]) -> None:
    known = {parameter.name for parameter in description.parameters}
    for name in given:
        if name not in known:
            raise ScenarioError(
                Reason.UNKNOWN_PARAMETER,
                f"{member} has no parameter {name!r}; it has {', '.join(sorted(known)) or 'none'}",
                {"member": member, "parameter": name},
            )


def first_difference(store: Store, one: str, other: str, until_ns: int) -> str:
    """The first entry of two ledgers that differs, in words; empty when none does."""
    after = 0
    while True:
        found, end, _ = store.entries(one, after)
        again, _, _ = store.entries(other, after, limit=max(len(found), 1))
        for before, now in zip_longest(found, again):
            entries = [
                None if s is None or s.entry.time_ns > until_ns else s.entry for s in (before, now)
            ]
            if _content(entries[0]) != _content(entries[1]):
                lines = ["nothing" if entry is None else show(entry) for entry in entries]
                return f"it has {lines[1]}, where there was {lines[0]}"
        if not found:
            return ""
        after = end


def _content(entry: Entry | None) -> object:
    """All of an entry that goes into the digest."""
    match entry:
        case Record():
            return (entry.sort_key(), entry.owner, entry.quality, entry.value.tobytes())
        case EventRecord():
            event = entry.event
            told = (event.id, event.kind, event.entity, event.text, event.causes)
            return (entry.sort_key(), entry.owner, told)
        case ActionRecord():
            return (entry.sort_key(), entry.owner, entry.action, entry.refusal)
        case None:
            return None


def show(entry: Entry) -> str:
    """An entry in a line."""
    at = f"at {entry.time_ns} ns"
    match entry:
        case Record():
            value = np.array2string(entry.value, threshold=8, precision=17)
            what = f"{entry.owner}.{entry.variable} = {value} ({entry.quality.name.lower()})"
            return f"{what} {at}.{entry.micro}"
        case EventRecord():
            event = entry.event
            return f"{event.kind} {event.id} of {event.entity} ({event.text}) {at}"
        case ActionRecord():
            action = entry.action
            place = f"{action.member}.{action.actuator}[{action.entity}]"
            return f"{entry.owner} sets {place} to {action.value!r} {entry.refusal} {at}"


async def _stored(work: Callable[[], None]) -> None:
    """Have the store do something, unless it takes too long, which ends the run."""
    try:
        async with asyncio.timeout(STORE_WITHIN_S):
            await asyncio.to_thread(work)
    except TimeoutError:
        raise ScenarioError(
            Reason.STORE_FAILED, f"the broker's store has not answered for {STORE_WITHIN_S:g} s"
        ) from None


def _seen(task: asyncio.Task[Outcome]) -> None:
    """A failed run is on record; nobody has to ask its task."""
    if not task.cancelled():
        task.exception()
