"""Where a broker has the members of its city: services that are registered or have an address, and
classes for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from federation.errors import FederationError, Reason, TwinError
from federation.peer.city import LocalQuarters, Path_
from federation.peer.inner import Stand
from federation.scenario.spec import Member, Scenario
from federation.twin import Description, LinearBlock, StepInput, StepResult
from federation.wire.link import Errand, Link, LinkSession

CLOSE_S = 2.0
"""How long a member may take to close its session."""

_T = TypeVar("_T")

Find = Callable[[str, Member, Errand], Awaitable[Link | None]]
"""A link to a member's service on an errand; None when it is to be built from its class."""


class ServiceStand:
    """A member whose steps are done by a service."""

    def __init__(self, session: LinkSession, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self.session = session
        self._link, self._loop = link, loop

    def begin(self, steps: Sequence[StepInput]) -> Future[Sequence[StepResult]]:
        return asyncio.run_coroutine_threadsafe(self._advance(steps), self._loop)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop)

    async def _advance(self, steps: Sequence[StepInput]) -> Sequence[StepResult]:
        return await self.session.advance(steps)

    async def _close(self) -> None:
        with suppress(FederationError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.session.close()
        await self._link.close()


class ServiceQuarters:
    """The members of a city as its broker can have them. Called from threads, never from `loop`."""

    def __init__(
        self,
        city: str,
        scenario: Scenario,
        find: Find,
        epoch: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._city, self._scenario, self._find = city, scenario, find
        self._epoch, self._loop = epoch, loop
        self._local = LocalQuarters(scenario)
        self._context = copy_context()

    def describe(self, path: Path_) -> Mapping[str, Description]:
        """What each member is. Members that a loop leaves out are not in it."""
        found = {}
        for name, member in self._scenario.members.items():
            try:
                described = self._wait(self._describe(name, member, path))
            except FederationError as error:
                if _is_left_out(member, error):
                    continue
                raise
            found[name] = self._local.describe_one(name) if described is None else described
        return found

    def open(self, member: str, seed: int, parameters: Mapping[str, float], path: Path_) -> Stand:
        opened = self._wait(self._open(member, seed, parameters, path))
        return self._local.open(member, seed, parameters, path) if opened is None else opened

    def flexibility(self, stand: Stand, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        if isinstance(stand, ServiceStand):
            return self._wait(stand.session.flexibility(periods_ns))
        return self._local.flexibility(stand, periods_ns)

    async def _describe(self, name: str, member: Member, path: Path_) -> Description | None:
        link = await self._find(name, member, self._errand(member, path))
        if link is None:
            return None
        try:
            return await link.describe()
        finally:
            await link.close()

    async def _open(
        self, name: str, seed: int, parameters: Mapping[str, float], path: Path_
    ) -> ServiceStand | None:
        member = self._scenario.members[name]
        link = await self._find(name, member, self._errand(member, path))
        if link is None:
            return None
        try:
            session = await link.session(name, seed, parameters, self._epoch)
        except BaseException:
            await link.close()
            raise
        return ServiceStand(session, link, self._loop)

    def _errand(self, member: Member, path: Path_) -> Errand:
        return errand_of(member, path)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            # what is begun from this thread stands on the footing of the broker
            begin = partial(asyncio.run_coroutine_threadsafe, work, self._loop)
            return self._context.copy().run(begin).result()
        except (FederationError, asyncio.CancelledError):
            raise
        except Exception as error:
            text = f"a member of {self._city} can't be had: {type(error).__name__}: {error}"
            raise TwinError(Reason.TWIN_FAILED, text) from error


def errand_of(member: Member, path: Path_) -> Errand:
    """On what errand a member is asked by a request that came through the brokers of `path`."""
    peer = member.peer
    return Errand("", path) if peer is None else Errand(peer.purpose, path, peer.session == "live")


def _is_left_out(member: Member, error: FederationError) -> bool:
    is_loop = error.reason is Reason.PATH_LOOP
    return is_loop and member.peer is not None and member.peer.on_loop == "leave-out"
