"""Where the members of a run are: opens their sessions, and the planner in this process."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from federation.broker.clocks import Clocks
from federation.broker.cuts import Cuts
from federation.broker.memory import Added
from federation.broker.seats import Done, Place, Saved
from federation.core.messages import Joined
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.scenario.run import Case
from federation.scenario.spec import PLANNER, Addition, Member, OnFailure, Peering, Scenario
from federation.twin import (
    NOTHING,
    LinearBlock,
    Planner,
    Session,
    StepInput,
    StepResult,
    Vector,
    blame,
)
from federation.wire import codec
from federation.wire.link import Errand, Link, LinkOptions, LinkSession, for_a_look

CONNECT_AGAIN_S = 0.5
"""How long one attempt to reach a member that was lost may take."""

PLAN_WITHIN_S = 600.0
"""How long the planner may take to open, and for one frame."""

CLOSE_S = 2.0
"""How long a run waits for its members to close their sessions."""

_T = TypeVar("_T")


# Planners take turns in one thread: their solver borrows the process's output while it works.
_planning = ThreadPoolExecutor(1, thread_name_prefix="planner")


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


class Seat(Protocol):
    """A member's place in a run, wherever its model is."""

    def begin(self, steps: Sequence[StepInput], done: Done) -> None:
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

    def begin(self, steps: Sequence[StepInput], done: Done) -> None:
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


Find = Callable[[str], Awaitable[Link]]
"""A link to where a member's service is now; fails when it is not there yet."""


@dataclass(frozen=True)
class Ahead:
    """The future that a run goes on in after its past, from `time_ns` on.

    `run` is the one that it has its past from, `cuts` what is known of the states of members there.
    """

    run: str
    time_ns: int
    case: Case
    believed: Mapping[str, Mapping[str, Vector]]
    cuts: Cuts


class RunHome:
    """Opens the sessions of one run, where the services of its members are."""

    def __init__(
        self,
        scenario: Scenario,
        case: Case,
        planner: Planner | None,
        links: Mapping[str, Link],
        epoch: int,
        find: Find | None,
        run: str = "",
        ahead: Ahead | None = None,
    ) -> None:
        self.planner = planner
        self._ahead = ahead
        self._run = run
        """Under which name others may act on the members; empty when nobody may."""
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
        policy = OnFailure() if found is None else found.on_failure
        if self.diverges(member):  # a session of another seed has no past to come back by
            return OnFailure(answer_within_s=policy.answer_within_s)
        return policy

    def diverges(self, member: str) -> bool:
        """Whether a member goes on in another future than the one that its past is from."""
        return self._ahead is not None and member != PLANNER

    def looks(self, member: str) -> bool:
        """Whether a member's sessions look at the run of another city."""
        return self.peering(member) is not None and not self.diverges(member)

    def peering(self, member: str) -> Peering | None:
        """How another city is asked whose run that goes on is looked at; None for all others."""
        found = self.members.get(member)
        peer = None if found is None else found.peer
        return peer if peer is not None and peer.session == "live" else None

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

    async def open_future(
        self, member: str, state: bytes, start_ns: int
    ) -> tuple[LinkSession, int | None]:
        ahead, link = self._ahead, self._links[member]
        assert ahead is not None
        session = await self._session_ahead(ahead, member, link, start_ns)
        try:
            believed = ahead.believed.get(member, NOTHING)
            return session, await session.diverge(state, ahead.time_ns, believed)
        except BaseException:
            await leave(session)
            raise

    async def at_cut(self, member: str, steps: int, make: Callable[[], Awaitable[Saved]]) -> Saved:
        assert self._ahead is not None
        return await self._ahead.cuts.at(self._ahead.run, member, steps, make)

    async def leave(self) -> None:
        """End all sessions, and the links that were found on the way."""
        await asyncio.gather(*(leave(seat) for seat in self.seats))
        found = [link for link in self._links.values() if link not in self._given]
        await asyncio.gather(*(link.close() for link in found))

    async def _session(self, member: str, link: Link, start_ns: int = 0) -> LinkSession:
        parameters = self._parameters.get(member, {})
        seed = self._case.member_seed(member)
        return await link.session(member, seed, parameters, self._epoch, start_ns, self._run)

    async def _session_ahead(
        self, ahead: Ahead, member: str, link: Link, start_ns: int = 0
    ) -> LinkSession:
        parameters = ahead.case.parameters.get(member, self._parameters.get(member, {}))
        seed = ahead.case.member_seed(member)
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
        options = options_to(link.errand, link.options, again=True)
        expects, errand = link.line.expects, link.errand
        return await Link.connect(link.address, service, options, expects, errand)

    async def _open_planner(self) -> PlannerSession:
        """The planner is shown, before it starts, what the members can do."""
        try:
            async with asyncio.timeout(PLAN_WITHIN_S):
                return await self._planner_shown()
        except TimeoutError:
            raise planner_overdue() from None

    async def _planner_shown(self) -> PlannerSession:
        assert self.planner is not None
        session = PlannerSession(self.planner)
        await session.open(self._case.member_seed(PLANNER), self._case.parameters.get(PLANNER, {}))
        if periods := self.planner.periods_ns():
            members = self._first
            blocks = await all_of([self._flexibility(name, periods) for name in members])
            found = zip(members, blocks, strict=True)
            await session.prepare({name: block for name, block in found if block is not None})
        return session

    async def _flexibility(self, member: str, periods_ns: Sequence[int]) -> LinearBlock | None:
        """What a member could do, asked of a session that has not made a step."""
        if member in self._fresh:
            return await self._fresh[member].flexibility(periods_ns)
        if member not in self._links:
            return None
        if self._ahead is None:
            session = await self._session(member, self._links[member])
        else:  # who plans in a future is not told what is so in the run itself
            session = await self._session_ahead(self._ahead, member, self._links[member])
        try:
            return await session.flexibility(periods_ns)
        finally:
            await session.close()


def options_to(errand: Errand, options: LinkOptions, *, again: bool = False) -> LinkOptions:
    """How patient a link on an errand is, for the first time or `again`."""
    if errand.is_live:
        return for_a_look(options)
    return replace(options, connect_timeout_s=CONNECT_AGAIN_S) if again else options


AWAY = (Reason.MEMBER_LOST, Reason.UNREACHABLE, Reason.UNKNOWN_MEMBER)
"""Errors of a service that may still come up."""


def substitute_of(member: str) -> str:
    """The name under which the service that stands in for a member is found."""
    return f"{member}-substitute"


def planner_overdue() -> TwinError:
    return TwinError(
        Reason.MEMBER_LOST,
        f"the planner did not answer within {PLAN_WITHIN_S:g} s",
        {"member": PLANNER},
    )


async def all_of(work: Sequence[Coroutine[object, object, _T]]) -> list[_T]:
    """The results in order, when all have ended; of several errors the first in order."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def leave(seat: Seat) -> None:
    with suppress(FederationError, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await seat.close()
