"""The door of a city to its peers: serves the city as a twin, to each reader as the policy has it.

Each reader has a service of its own, with its own sessions and one thread, so that none sees, waits
for or uses up what is another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.acts import Acts, Petition, Standing, Warden, read_petition
from federation.peer.city import City, CityRun, Path_, Rights
from federation.peer.export import Export, Interior, Mode, export_of, may_begin, refusal
from federation.peer.live import LiveCity, LiveRecord
from federation.peer.parlour import Parlour, no_aid
from federation.peer.policy import Decision, Limits, Policy, Question, Sort, Thing, decide
from federation.peer.reader import Reader
from federation.peer.standing import LOOK_S, PolicyFile
from federation.twin import HOUR_NS, Description, TimePolicy, Twin
from federation.twin import Session as ModelSession
from federation.v1 import peer_pb2, peer_pb2_grpc, twin_pb2
from federation.wire import caller, codec, status
from federation.wire.link import SERVICE, Errand
from federation.wire.phases import Phases
from federation.wire.serve import ServeOptions, TwinService

ORDERS = ("Select", "Operate", "Confirm", "Release")
"""The orders of a neighbour's guard that a city takes."""

READERS = 256
"""How many readers are served at a time; each may open sessions as its limits let it."""


@dataclass(frozen=True, slots=True)
class GateOptions:
    """How a city is served. Without `takes_claims` callers need certificates."""

    max_message_bytes: int
    takes_claims: bool
    linger_s: float = 60.0


class Budget:
    """What a reader has used of this process in the window that goes on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._cpu_s = self._wall_s = 0.0

    def check(self, limits: Limits) -> None:
        """Fails with PEER_LIMIT when a window's share is used up, until the next one begins."""
        left_s = self._began_s + 60.0 * limits.per_min - self._clock()
        if left_s <= 0.0:
            self._began_s, self._cpu_s, self._wall_s = self._clock(), 0.0, 0.0
            return
        for name, used, most in (
            ("cpu_s", self._cpu_s, limits.cpu_s),
            ("wall_s", self._wall_s, limits.wall_s),
        ):
            if used >= most:
                raise over_limit(
                    name,
                    f"{used:.1f} of {most:g} s are used up; more in {left_s:.0f} s",
                    {"after_s": f"{left_s:.0f}"},
                )

    def pause(self, seconds: float) -> None:
        """Wait for something; to wait uses up nothing."""
        began_s = self._clock()
        time.sleep(seconds)
        self._wall_s -= self._clock() - began_s

    @contextlib.contextmanager
    def spending(self) -> Any:
        """Count what is done inside, in this thread."""
        wall_s, cpu_s = self._clock(), time.thread_time()
        try:
            yield
        finally:
            self._wall_s += self._clock() - wall_s
            self._cpu_s += time.thread_time() - cpu_s


def over_limit(name: str, why: str, more: Mapping[str, str] | None = None) -> ScenarioError:
    return ScenarioError(
        Reason.PEER_LIMIT, f"the limit {name} of this city: {why}", {"limit": name, **(more or {})}
    )


class _Nothing(Twin):
    """What a reader has that has asked for nothing yet."""

    def __init__(self, city: str) -> None:
        self._city = city

    def describe(self) -> Description:
        return Description(f"city-{self._city}", "", "city", (), (), TimePolicy(period_ns=HOUR_NS))

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        raise AssertionError("a session of a city has an errand")

    def advance(self, step: Any) -> None:
        raise AssertionError("a session of a city has an errand")


class PeerService(TwinService):
    """What one reader is served: sessions of the city, as far as its rights and limits go."""

    def __init__(self, gate: Gate, reader: Reader) -> None:
        options = ServeOptions(
            max_message_bytes=gate.options.max_message_bytes, linger_s=gate.options.linger_s
        )
        super().__init__(lambda: _Nothing(gate.city.name), f"city {gate.city.name}", options)
        self._gate, self.reader = gate, reader
        self.budget = Budget()

    @property
    def is_idle(self) -> bool:
        """Whether the reader has no session and nothing under way."""
        return not self._streams and not any(h.session for h in self._sessions.values())

    def limits(self) -> Limits:
        """How much it may use, now."""
        return self._gate.policy.limits_of(self.reader)

    def _fullness(self) -> FederationError | None:
        limit = self.limits().sessions
        hosted = self._sessions.values()
        # a session that is being opened has no answer yet
        if sum(one.session is not None or one.answer is None for one in hosted) < limit:
            return None
        return over_limit("sessions", f"{limit} at a time, and all are in use")

    def _open(self, hosted: Any, opened: twin_pb2.SessionRequest.Open) -> None:
        self.budget.check(self.limits())
        alone = twin_pb2.SessionRequest.Open()
        alone.CopyFrom(opened)
        # nobody acts on a peer's session but the peer
        alone.run = ""
        with self.budget.spending():
            super()._open(hosted, alone)

    def _restore(self, hosted: Any, restore: Any, restored: Any) -> None:
        self.budget.check(self.limits())
        with self.budget.spending():
            super()._restore(hosted, restore, restored)

    def _advance(self, hosted: Any, advance: Any, response: Any) -> None:
        is_live = hosted.session is not None and isinstance(hosted.session.twin, LiveCity)
        if is_live and any(step.actions for step in advance.steps):
            raise ScenarioError(
                Reason.NOT_AUTHORISED,
                f"nobody acts on {self._gate.city.name} by a session that looks at it: a guard "
                "selects and operates",
            )
        limits = self.limits()
        self.budget.check(limits)
        hosted.steps += len(advance.steps)
        if hosted.steps > limits.steps:
            raise over_limit("steps", f"{limits.steps} in one session")
        with self.budget.spending():
            super()._advance(hosted, advance, response)

    def _flexibility(
        self, session: ModelSession, request: twin_pb2.FlexibilityRequest
    ) -> twin_pb2.FlexibilityResponse:
        limits = self.limits()
        self.budget.check(limits)
        if len(request.periods_ns) > limits.periods:
            raise over_limit("periods", f"{limits.periods} in one horizon")
        with self.budget.spending():
            return super()._flexibility(session, request)

    def _build(self, opened: twin_pb2.SessionRequest.Open) -> Twin:
        errand, limits = Errand.decode(opened.errand), self.limits()
        return self._gate.build(self.reader, errand, limits, self.budget.pause)


class Gate(Phases, peer_pb2_grpc.PeersServicer):
    """Serves a city to its peers. Its policy is that of `file`."""

    parlour: Parlour | None = None
    """Where the city bargains, if it does."""

    def __init__(
        self,
        city: City,
        file: PolicyFile,
        record: LiveRecord,
        options: GateOptions,
        warden: Warden | None = None,
    ) -> None:
        """Without a `warden` nobody acts on the city."""
        self.city, self.options = city, options
        self._acts = Acts(city.name, warden)
        self._file, self._record = file, record
        self._services: dict[str, PeerService] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix=f"city-{city.name}")
        self._watching: asyncio.Task[None] | None = None

    @property
    def policy(self) -> Policy:
        return self._file.policy

    def register(self, server: grpc.aio.Server) -> None:
        """Add the services; begin to look after the policy's file."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.Describe,
                twin_pb2.DescribeRequest.FromString,
                twin_pb2.DescribeResponse.SerializeToString,
            ),
            "Session": grpc.stream_stream_rpc_method_handler(
                self.Session, twin_pb2.SessionRequest.FromString
            ),
            "ReadClock": grpc.unary_unary_rpc_method_handler(
                self.ReadClock,
                twin_pb2.ReadClockRequest.FromString,
                twin_pb2.ReadClockResponse.SerializeToString,
            ),
            "Flexibility": grpc.unary_unary_rpc_method_handler(
                self.Flexibility,
                twin_pb2.FlexibilityRequest.FromString,
                twin_pb2.FlexibilityResponse.SerializeToString,
            ),
        }
        for rpc in (*ORDERS, "ReadDesk"):
            handlers[rpc] = grpc.unary_unary_rpc_method_handler(
                getattr(self, rpc),
                getattr(twin_pb2, f"{rpc}Request").FromString,
                getattr(twin_pb2, f"{rpc}Response").SerializeToString,
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        peer_pb2_grpc.add_PeersServicer_to_server(self, server)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._file.look()
            if self.parlour is not None:
                await asyncio.to_thread(self.parlour.desk.tick)

    def live_run(self) -> str:
        """The city's run that goes on; fails with NOT_LIVE when there is none."""
        return self._record.run()

    def drain(self) -> None:
        """Take no more frames."""
        for service in self._services.values():
            service.drain()

    async def stop(self) -> None:
        """End all sessions."""
        if self._watching is not None:
            self._watching.cancel()
        for service in self._services.values():
            await asyncio.to_thread(service.stop)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- what a reader gets ------------------------------------------------------------------

    def build(
        self,
        reader: Reader,
        errand: Errand,
        limits: Limits,
        pause: Callable[[float], None] = time.sleep,
    ) -> Twin:
        """A session for a reader; called in its thread, which it lets wait with `pause`. Fails with
        NOT_EXPORTED, PATH_LOOP, and as the members of the city do."""

        def standing() -> tuple[Policy, Question]:
            return self.policy, self._file.question(reader, errand.purpose)

        path, mode = self._path(errand), _mode(errand)
        policy, asked = standing()
        _check_may_begin(policy, asked, mode)
        if mode == "live":
            run = self._record.run()
            rights = Rights(self._interior_of(run), standing, mode)
            self._note(rights.export, reader)
            return LiveCity(rights, self._record, run, policy.patience_s, str(reader), pause=pause)
        rights = Rights(self.city.interior(path), standing, mode)
        self._note(rights.export, reader)
        horizon_ns = None if limits.horizon_h is None else round(limits.horizon_h * HOUR_NS)
        return CityRun(self.city, rights, path, horizon_ns)

    def _note(self, export: Export, reader: Reader, does: str = "sees") -> None:
        for declaration in export.declared:
            self._file.say(
                f"{reader} {does} more by the emergency {declaration.emergency}, which "
                f"{declaration.by} has declared: {declaration.why}"
            )

    def _interior_of(self, run: str) -> Interior:
        descriptions = self._record.describe(run)
        # cities may have joined the run that the scenario does not know, and may yet
        cities = self._record.cities(run)
        return Interior(self.city.name, descriptions, cities, {}, self.city.version)

    def _export(self, service: PeerService, errand: Errand) -> Export:
        """What a reader may have now; it is said at its expense."""
        service.budget.check(service.limits())
        with service.budget.spending():
            return self._exported(service.reader, errand)

    def _exported(self, reader: Reader, errand: Errand) -> Export:
        policy, asked = self.policy, self._file.question(reader, errand.purpose)
        path, mode = self._path(errand), _mode(errand)
        _check_may_begin(policy, asked, mode)
        if mode == "live":
            interior = self._interior_of(self._record.run())
        else:
            interior = self.city.interior(path)
        return export_of(interior, policy, asked, mode)

    def _path(self, errand: Errand) -> Path_:
        """The way of a request with this broker at its end. Fails with PATH_LOOP."""
        if self.city.name in errand.path:
            way = " -> ".join((*errand.path, self.city.name))
            raise ScenarioError(
                Reason.PATH_LOOP,
                f"the request came back to {self.city.name}: {way}",
                {"path": ",".join(errand.path), "city": self.city.name},
            )
        return (*errand.path, self.city.name)

    def _reader(self, context: grpc.aio.ServicerContext[Any, Any]) -> Reader:
        return Reader(caller.identity_of(context, takes_claims=self.options.takes_claims))

    def _service(self, context: grpc.aio.ServicerContext[Any, Any]) -> PeerService:
        """What serves a caller; one that has nothing under way makes room for another.

        Who is nobody, or may have nothing at any time, is refused and costs nothing.
        """
        reader = self._reader(context)
        meant = (who for rule in self.policy.rules if not rule.denies for who in rule.who)
        if not any(reader.is_meant_by(pattern) for pattern in meant):
            asked = self._file.question(reader, "")
            raise refusal(self.policy, asked, Sort.SESSION, "what-if")
        found = self._services.get(reader.identity)
        if found is None:
            if len(self._services) >= READERS:
                idle = [name for name, service in self._services.items() if service.is_idle]
                if not idle:
                    raise over_limit("readers", f"{READERS} at a time, and all have sessions")
                self._services.pop(idle[0]).stop()
            found = self._services[reader.identity] = PeerService(self, reader)
        return found

    # -- the RPCs ------------------------------------------------------------------------------

    async def Describe(  # noqa: N802
        self,
        request: twin_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[twin_pb2.DescribeRequest, twin_pb2.DescribeResponse],
    ) -> twin_pb2.DescribeResponse:
        async with status.refusing(context):
            service = self._service(context)
            export = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._export, service, Errand.decode(request.errand)
            )
            return twin_pb2.DescribeResponse(
                description=codec.encode_description(export.description),
                max_message_bytes=self.options.max_message_bytes,
                takes_batches=True,
                max_sessions=service.limits().sessions,
            )
        raise AssertionError("abort raises")

    async def Session(  # noqa: N802
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext[twin_pb2.SessionRequest, bytes],
    ) -> None:
        async with status.refusing(context):
            service = self._service(context)
        await service.Session(request_iterator, context)

    async def ReadClock(  # noqa: N802
        self,
        request: twin_pb2.ReadClockRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ReadClockRequest, twin_pb2.ReadClockResponse],
    ) -> twin_pb2.ReadClockResponse:
        answer = twin_pb2.ReadClockResponse()
        answer.receive_time.GetCurrentTime()
        answer.send_time.GetCurrentTime()
        return answer

    async def Flexibility(  # noqa: N802
        self,
        request: twin_pb2.FlexibilityRequest,
        context: grpc.aio.ServicerContext[
            twin_pb2.FlexibilityRequest, twin_pb2.FlexibilityResponse
        ],
    ) -> twin_pb2.FlexibilityResponse:
        async with status.refusing(context):
            return await self._service(context).Flexibility(request, context)
        raise AssertionError("abort raises")

    async def ReadDesk(  # noqa: N802
        self,
        request: twin_pb2.ReadDeskRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ReadDeskRequest, twin_pb2.ReadDeskResponse],
    ) -> twin_pb2.ReadDeskResponse:
        async with status.refusing(context):
            petition = read_petition("look", request.signed, self.city.name)
            standing = await self._standing(self._service(context), petition)
            return twin_pb2.ReadDeskResponse(desks=[await self._acts.look(petition, standing)])
        raise AssertionError("abort raises")

    async def _order(
        self, rpc: str, signed: twin_pb2.Signed, context: grpc.aio.ServicerContext[Any, Any]
    ) -> twin_pb2.Receipt:
        async with status.refusing(context):
            service = self._service(context)
            petition = read_petition(rpc, signed, self.city.name)
            return await self._acts.order(petition, await self._standing(service, petition))
        raise AssertionError("abort raises")

    async def _standing(self, service: PeerService, petition: Petition) -> Standing:
        """What a reader may do on the city now; it is said at its expense."""
        reader, purpose = service.reader, petition.order.purpose

        def look() -> Standing:
            asked = self._file.question(reader, purpose)
            if petition.what == "release":  # is heard from those who have lost their rights, too
                export = Export(_Nothing(self.city.name).describe())
            else:
                _check_may_begin(self.policy, asked, "live")
                export = self._export(service, Errand(purpose, is_live=True))
            if petition.what == "select":
                self._note(export, reader, "may do")
            refuse = partial(refusal, self.policy, asked, is_live=True)
            return Standing(reader, self._record.run(), export, refuse)

        return await asyncio.get_running_loop().run_in_executor(self._threads, look)

    async def Ask(  # noqa: N802
        self,
        request: peer_pb2.AskRequest,
        context: grpc.aio.ServicerContext[peer_pb2.AskRequest, peer_pb2.AskResponse],
    ) -> peer_pb2.AskResponse:
        async with status.refusing(context):
            sort = _SORTS.get(request.sort)
            if sort is None:
                raise ScenarioError(Reason.SCENARIO_INVALID, "say what sort of thing you ask for")
            asked = self._file.question(self._reader(context), request.purpose)
            is_live = request.mode == twin_pb2.Errand.MODE_LIVE
            found = decide(self.policy, asked, Thing(sort, request.name, is_live=is_live))
            return _answer(found, self.policy.version)
        raise AssertionError("abort raises")

    async def Bargain(  # type: ignore[override]  # noqa: N802 - it reads and writes by itself
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext[peer_pb2.BargainRequest, peer_pb2.BargainResponse],
    ) -> None:
        async with status.refusing(context):
            parlour, service = self._hosted(), self._service(context)
            reader = service.reader

            def allow(good: str, purpose: str) -> None:
                asked, name = self._file.question(reader, purpose), f"aid.{good}"
                if not decide(self.policy, asked, Thing(Sort.FLEXIBILITY, name)).allowed:
                    raise refusal(self.policy, asked, Sort.FLEXIBILITY, name)

            def do(answer: Callable[[], peer_pb2.BargainResponse]) -> peer_pb2.BargainResponse:
                service.budget.check(service.limits())
                with service.budget.spending():
                    return answer()

            await parlour.bargain(reader.city, allow, request_iterator, context, do)

    async def Pledge(  # noqa: N802
        self,
        request: peer_pb2.PledgeRequest,
        context: grpc.aio.ServicerContext[peer_pb2.PledgeRequest, peer_pb2.PledgeResponse],
    ) -> peer_pb2.PledgeResponse:
        async with status.refusing(context):
            # what was promised is kept to whatever the policy has become; the signature counts
            return await self._hosted().pledge(self._reader(context).city, request)
        raise AssertionError("abort raises")

    def _hosted(self) -> Parlour:
        if self.parlour is None:
            raise no_aid(self.city.name)
        return self.parlour


_SORTS = {
    peer_pb2.AskRequest.SORT_VARIABLE: Sort.VARIABLE,
    peer_pb2.AskRequest.SORT_INPUT: Sort.INPUT,
    peer_pb2.AskRequest.SORT_EVENT: Sort.EVENT,
    peer_pb2.AskRequest.SORT_ACTION: Sort.ACTION,
    peer_pb2.AskRequest.SORT_FLEXIBILITY: Sort.FLEXIBILITY,
    peer_pb2.AskRequest.SORT_SESSION: Sort.SESSION,
}


def _answer(decision: Decision, version: int) -> peer_pb2.AskResponse:
    told = str(decision.resolution) if decision.allowed else ""
    return peer_pb2.AskResponse(
        is_allowed=decision.allowed,
        rule=decision.rule,
        code="" if decision.code is None else decision.code.value,
        text=", ".join(filter(None, (told, decision.reason))),
        policy_version=version,
    )


def _mode(errand: Errand) -> Mode:
    return "live" if errand.is_live else "what-if"


def _check_may_begin(policy: Policy, asked: Question, mode: Mode) -> None:
    """Before anything else is looked at: who may have no session costs nothing."""
    if not may_begin(policy, asked, mode).allowed:
        raise refusal(policy, asked, Sort.SESSION, mode)
