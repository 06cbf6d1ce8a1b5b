"""The broker as a process: registration, runs on request, and everyone who watches them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from google.protobuf.message import Message

from federation.broker import outages
from federation.broker.aid import AidService
from federation.broker.branches import Attempt, Branches, Tried
from federation.broker.cuts import Cuts
from federation.broker.home import AWAY, CONNECT_AGAIN_S, Find, options_to, substitute_of
from federation.broker.live import TURN_WITHIN_S, LiveRun, entrance
from federation.broker.memory import (
    Added,
    Memory,
    Origin,
    cut,
    recall,
    remember,
    write_asked,
    write_case,
    write_description,
    write_desks,
    write_origin,
    write_replaced,
)
from federation.broker.record import RunRecord
from federation.broker.registering import BrokerService
from federation.broker.registry import DEFAULT_TTL_NS, Lease, Registry
from federation.broker.seats import Place, Succession
from federation.broker.services import SERVICES, add_services
from federation.broker.shell import Asked, Prepared, prepare
from federation.broker.store import Frame, Item, Note, Run, State, Store
from federation.broker.tell import entry_of, report_of
from federation.broker.why import read_results
from federation.core.messages import Accepted, Left, Ordered
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.peer.acts import GuardAt
from federation.peer.city import City
from federation.peer.gate import Gate, GateOptions
from federation.peer.parlour import Parlour
from federation.peer.policy import now
from federation.peer.quarters import ServiceQuarters, errand_of
from federation.peer.standing import PolicyFile
from federation.scenario.future import Future
from federation.scenario.run import Case, Outcome, PlannerFactory
from federation.scenario.spec import (
    PLANNER,
    Addition,
    CouplingSpec,
    Member,
    Scenario,
    load,
    parse,
    parse_addition,
)
from federation.scenario.study import cases
from federation.twin import HOUR_NS, Fidelity, Vector
from federation.v1 import (
    aid_pb2,
    aid_pb2_grpc,
    broker_pb2,
    control_pb2,
    peer_pb2,
    scenario_pb2,
)
from federation.wire import codec, footing, status
from federation.wire.link import MEBIBYTE, NO_ERRAND, SERVICE, Errand, Link, LinkOptions
from federation.wire.party import Party
from federation.wire.probes import probed
from federation.wire.roster import Post, Roster
from federation.wire.serve import new_server, start_server

# Who gives no aid needs no solver.
if TYPE_CHECKING:
    from federation.peer.aid import AidDesk, AidOptions

PEER_SERVICES = (
    SERVICE,
    peer_pb2.DESCRIPTOR.services_by_name["Peers"].full_name,
    aid_pb2.DESCRIPTOR.services_by_name["Aid"].full_name,
)
"""What a broker serves besides when it has an export policy."""

MOST_BUCKETS = 10_000
MOST_ATTEMPTS = 1_000
CHUNK_BYTES = 2 * MEBIBYTE
"""About how much one answer of `Watch` carries; less than any client's default limit."""

LOOK_S = 0.5
"""How often the broker looks after leases."""


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """How a broker is run.

    `scenario_folder` is where the maps of documents that come over the wire are looked for; no
    file outside it is read. `planner` builds the planner of a scenario that has repairs. Of the
    runs that were asked for, `parallel_runs` go on at a time; one that has not got its turn within
    `turn_within_s` fails. A broker that `continues`
    takes up the runs that an earlier life of it left unfinished; else they are marked as failed.
    With `keep_runs`, only so many runs that have ended stay in its store. `link` says how patient
    it is with twins. Where they are it notes in the file `roster`, for when it is dead.
    """

    host: str = "127.0.0.1"
    port: int = 0
    store: str | Path = ":memory:"
    scenario_folder: Path | None = None
    planner: PlannerFactory | None = None
    parallel_runs: int = 4
    turn_within_s: float = TURN_WITHIN_S
    continues: bool = True
    keep_runs: int | None = None
    lease_ttl_s: float = DEFAULT_TTL_NS / 1e9
    max_message_bytes: int = 64 * MEBIBYTE
    grace_s: float = 2.0
    link: LinkOptions = field(default_factory=LinkOptions)
    roster: Path | None = None
    city: str = ""
    """The name of the city that it speaks for, to its peers; empty when it has none."""
    export: Path | None = None
    """The policy by which it serves the city to its peers; without one it serves nothing."""
    city_scenario: Path | None = None
    """The scenario that what-ifs of peers run, and whose live run they may look at."""
    guard: str = ""
    """Where the city's own guard hears what peers ask of its actuators; without one they may ask
    for nothing."""
    clock: Callable[[], datetime] = now
    """What the wall clock shows, by which the policy is judged."""
    health_port: int = 0
    """Where health is told in the clear as well, at the same host; 0: nowhere."""
    parallel_futures: int = 8
    """How many futures of runs are tried at a time, for all who ask."""
    aid: AidOptions | None = None
    """How the city gives and takes aid; not at all without."""


class BrokerServer:
    """A broker that serves as long as the context lasts, at `address`.

    Runs that go on when it ends are cancelled. Fails with PORT_IN_USE, and with what the store
    fails with.
    """

    def __init__(self, options: BrokerOptions | None = None) -> None:
        self.options = options or BrokerOptions()
        self.address = ""
        self.epoch = 0
        self.given_up = 0
        """How many runs of an earlier life of the broker were marked as failed."""
        self.continued: tuple[str, ...] = ()
        """The runs of an earlier life of the broker that go on."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ahead: dict[str, asyncio.Event] = {}
        """Runs that go on as soon as their members are there, or have failed by then."""
        self.store: Store
        self.registry: Registry
        self._live: dict[str, LiveRun] = {}
        self._cuts = Cuts()
        self._stack = AsyncExitStack()
        self._turn = asyncio.Semaphore(self.options.parallel_runs)
        self._arrived = asyncio.Event()
        self.gate: Gate | None = None
        """The door of the city to its peers, if it has one."""
        self.aid: AidDesk | None = None
        """Where the city promises aid and is promised some, if it does."""
        file = self.options.roster
        self._roster = None if file is None else Roster(file)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.store = await asyncio.to_thread(Store, self.options.store)
            stack.push_async_callback(asyncio.to_thread, self.store.close)
            self.epoch = self.store.next_epoch()
            unfinished = await asyncio.to_thread(self._unfinished)
            self.registry = Registry(
                f"{self.store.id[:8]}-{self.epoch}",
                round(self.options.lease_ttl_s * 1e9),
                self.store.lease_epoch,
            )
            self._branches = Branches(
                self.store,
                self.epoch,
                self.options.planner,
                self._reach_all,
                self.options.parallel_futures,
            )
            await self._listen(stack)
            self.continued = tuple(run.name for run in unfinished)
            for run in unfinished:
                self._ahead[run.name] = asyncio.Event()
                continuing = asyncio.create_task(self._continue(run))
                self._tasks.add(continuing)
                continuing.add_done_callback(self._tasks.discard)
            stack.push_async_callback(_all_ended, self._tasks)
            self._stack = stack.pop_all()
        return self

    def _unfinished(self) -> list[Run]:
        """The runs to continue; the others that were left unfinished are over."""
        if self.options.continues:
            return self.store.unfinished()
        self.given_up = self.store.give_up_unfinished(
            TwinError(
                Reason.MEMBER_LOST,
                "the broker ended while the run was going on, and this one does not continue runs",
                {"member": "broker"},
            ),
            time.time_ns(),
        )
        return []

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _listen(self, stack: AsyncExitStack) -> None:
        options = self.options
        server = new_server(options.max_message_bytes)
        service = add_services(self, server)
        services = SERVICES
        if options.export is not None:
            guard = GuardAt(options.guard) if options.guard else None
            if guard is not None:
                stack.push_async_callback(guard.close)
            self.gate = gate = await asyncio.to_thread(
                self._open_gate, options.export, asyncio.get_running_loop(), guard
            )
            services += PEER_SERVICES
            gate.register(server)
            aid_pb2_grpc.add_AidServicer_to_server(
                AidService(self.aid, self.store, self._link_options), server
            )
            if self.aid is not None:
                from federation.peer.bargaining import keep_certain

                stack.callback(self.aid.close)
                asking = asyncio.create_task(keep_certain(self.aid, self._link_options))
                stack.push_async_callback(_ended, asking)
            stack.push_async_callback(gate.stop)
        elif options.aid is not None:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                "a broker that gives aid has an export policy: it says to whom and what for",
            )
        self.address, healthy = await start_server(server, services, options.host, options.port)
        stack.push_async_callback(server.stop, options.grace_s)
        if self.gate is not None:
            stack.callback(self.gate.drain)
        await stack.enter_async_context(probed(healthy, options.host, options.health_port))
        stack.push_async_callback(healthy.enter_graceful_shutdown)
        stack.push_async_callback(self._end_runs)
        looking = asyncio.create_task(self._look_after_leases(service))
        stack.push_async_callback(_ended, looking)

    # -- the city, for its peers ---------------------------------------------------------

    def _open_gate(
        self, policy: Path, loop: asyncio.AbstractEventLoop, guard: GuardAt | None
    ) -> Gate:
        """The door of the city; fails as its policy and its scenario do."""
        options = self.options
        if not options.city or options.city_scenario is None:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                "a broker that exports a city is told which: give its name and its scenario",
            )
        scenario = load(options.city_scenario)
        epoch, find = self.epoch, self._find_for_city
        quarters = ServiceQuarters(options.city, scenario, find, epoch, loop)
        is_proven = footing.serving_trust() is not None
        takes_claims = not is_proven and footing.is_local(f"{options.host}:{options.port}")
        how = (
            "peers are who their certificates say they are"
            if is_proven
            else "without certificates, peers on this machine are who they say they are"
            if takes_claims
            else "there are no certificates here, and others than this machine can call: nobody "
            "is believed, and nobody gets anything"
        )
        _say(f"{options.city} is served to its peers as {policy} has it; {how}")
        city = City(options.city, scenario, quarters, options.planner)
        gate = Gate(
            city,
            PolicyFile(policy, _say, options.clock),
            RunRecord(options.city, scenario.name, self.store, self._live, loop),
            GateOptions(options.max_message_bytes, takes_claims),
            guard,
        )
        if options.aid is not None:
            from federation.peer.aid import AidDesk

            def present(member: str, variable: str) -> Vector | None:
                return self.store.value(gate.live_run(), member, variable)

            self.aid = AidDesk(options.city, options.aid.at(city, present))
            gate.parlour = Parlour(self.aid)
        return gate

    async def _find_for_city(self, name: str, member: Member, errand: Errand) -> Link | None:
        """A member of the city where it is registered or has its address; else None."""
        place = Place(name, member.address, errand, _city_of(name, member))
        if place.address is not None:
            address, expects = place.address, place.expects
        elif (lease := self._lease(name)) is not None:
            address, expects = lease.member.address, footing.registered(name)
        else:
            return None
        return await Link.connect(address, name, self._link_options(), expects, errand)

    @property
    def _path(self) -> tuple[str, ...]:
        """The way of what this broker asks for by itself."""
        return (self.options.city,) if self.options.city else ()

    def _link_options(self) -> LinkOptions:
        """How it comes to members, and as whom: among them may be other cities."""
        city = self.options.city
        return replace(
            self.options.link,
            max_message_bytes=self.options.max_message_bytes,
            identity=f"spiffe://{city}/peer/broker" if city else "",
        )

    async def _end_runs(self) -> None:
        await asyncio.gather(
            *(live.cancel("broker", "the broker was stopped") for live in self._live.values())
        )

    # -- members -----------------------------------------------------------------------

    async def members_ready(self, names: Iterable[str], timeout_s: float) -> None:
        """Wait until a twin is registered under every name. Fails with UNKNOWN_MEMBER."""
        wanted = tuple(names)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    arrived = self._arrived
                    if all(self._lease(name) for name in wanted):
                        return
                    await arrived.wait()
        except TimeoutError:
            missing = [name for name in wanted if not self._lease(name)]
            raise self._unknown(missing[0] if missing else wanted[0]) from None

    def dismiss(self, name: str) -> None:
        """End the lease of a member that is known to be gone, so that another may come."""
        lease = self._lease(name)
        if lease is not None:
            self.registry.leave(lease.id)

    def note_arrival(self) -> None:
        self._arrived.set()
        self._arrived = asyncio.Event()
        self.note_roster()

    def note_roster(self, left: Sequence[str] = ()) -> None:
        """Write down who is where, those that runs reach without registration among them."""
        if self._roster is None:
            return
        leases = self.registry.members(time.monotonic_ns())
        posts = [Post(x.member.name, x.member.address, x.member.domain) for x in leases]
        for live in self._live.values():
            descriptions = live.prepared.experiment.descriptions
            for name, place in live.places.items():
                if place.address is not None and name in descriptions:
                    posts.append(Post(name, place.address, descriptions[name].domain))
        try:
            self._roster.note(posts, left)
        except OSError as error:
            _say(f"the roster could not be written: {error}")

    def _lease(self, name: str) -> Lease | None:
        leases = self.registry.members(time.monotonic_ns())
        return next((lease for lease in leases if lease.member.name == name), None)

    def _unknown(self, name: str) -> ScenarioError:
        here = [lease.member.name for lease in self.registry.members(time.monotonic_ns())]
        return ScenarioError(
            Reason.UNKNOWN_MEMBER,
            f"no twin is registered as {name}; registered: {', '.join(here) or 'none'}",
            {"member": name},
        )

    async def _look_after_leases(self, service: BrokerService) -> None:
        """End leases whose time is over, and runs whose members may not be heard any more.

        A member that lost its lease has as long again to come back, in the same life of its
        process: a broker that was too busy to hear it renew must not end its own runs. One whose
        certificate was revoked is put out at once.
        """
        away_s: dict[tuple[str, str], float] = {}
        loop = asyncio.get_running_loop()
        trust = footing.serving_trust()
        while True:
            await asyncio.sleep(LOOK_S)
            service.expire()
            revoked = () if trust is None else service.put_out(trust)
            self.note_roster()
            for live in list(self._live.values()):
                for name, lease in list(live.leases.items()):
                    key = (live.name, name)
                    if lease.id in {gone.id for gone in revoked}:
                        live.lose(name, "its certificate was revoked")
                        continue
                    holder = self._lease(lease.member.name)
                    if holder is None:
                        gone_s = loop.time() - away_s.setdefault(key, loop.time())
                        if gone_s > self.options.lease_ttl_s:
                            live.lose(name, "its lease has ended")
                    elif holder.member.incarnation != lease.member.incarnation:
                        live.lose(name, "another process has its name")
                    else:
                        away_s.pop(key, None)
            away_s = {key: since for key, since in away_s.items() if key[0] in self._live}

    # -- runs --------------------------------------------------------------------------

    async def run(
        self,
        scenario: Scenario,
        case: Case,
        factory: PlannerFactory | None = None,
        *,
        keep_ledger: bool = False,
        on_commit: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Do one run with the registered twins and wait for it; raises what ends it early."""
        _, task = await self.begin(
            scenario, case, factory, keep_ledger=keep_ledger, on_commit=on_commit
        )
        return await task

    async def begin(
        self,
        scenario: Scenario,
        case: Case,
        factory: PlannerFactory | None,
        *,
        document: str = "",
        keep_ledger: bool = False,
        on_commit: Callable[[int], None] | None = None,
    ) -> tuple[LiveRun, asyncio.Task[Outcome]]:
        """Find the members, wire them, and let the run begin when it is its turn.

        Fails with UNKNOWN_MEMBER when a member has no address and no twin is registered under
        its name, with UNREACHABLE when it does not answer, and as wiring does.
        """
        if not 0 <= case.seed < 1 << 63:
            raise ScenarioError(Reason.SCENARIO_INVALID, f"{case.seed} is no seed: 0..2^63 - 1")
        leases: dict[str, Lease] = {}
        places = _places(scenario.members, self._path)
        here = {name: places[name] for name in scenario.members}
        links = await self._connect(here, leases)
        try:
            prepared = await prepare(scenario, case, factory, links)
            experiment = prepared.experiment
            units = {
                (name, v.name): v.unit
                for name, description in experiment.descriptions.items()
                for v in description.outputs()
            }
            figures = [(kpi.partition(".")[0], kpi.partition(".")[2]) for kpi in experiment.kpis]
            run = await asyncio.to_thread(
                self.store.create,
                Run(
                    scenario.name,
                    scenario.name,
                    case.measure,
                    document or scenario.model_dump_json(by_alias=True, exclude_none=True),
                    case.seed,
                    scenario.horizon_ns,
                    time.time_ns(),
                    tuple((*figure, units[figure]) for figure in figures),
                    tuple((a.source, a.target, a.delay_ns) for a in experiment.wiring.actuations),
                    fidelities=tuple((n, d.fidelity) for n, d in experiment.descriptions.items()),
                ),
                (
                    write_case(case),
                    *(write_description(n, d) for n, d in experiment.descriptions.items()),
                ),
            )
        except BaseException:
            await asyncio.gather(*(link.close() for link in links.values()))
            raise
        live = LiveRun(
            run.name,
            scenario,
            case,
            prepared,
            links,
            leases,
            places,
            self.store,
            self.epoch,
            keep_ledger,
            on_commit,
            self._finder(places, leases),
        )
        return live, await self._start(live)

    async def _start(self, live: LiveRun) -> asyncio.Task[Outcome]:
        live.turn_within_s = self.options.turn_within_s
        self._live[live.name] = live
        task = await live.start(self._turn)
        task.add_done_callback(lambda _: self._forget(live))
        return task

    async def _continue(self, run: Run) -> None:
        try:
            await self._take_up(run)
        finally:
            self._ahead.pop(run.name).set()

    async def _take_up(self, run: Run) -> None:
        """Go on with a run of an earlier life, when its members are there again."""
        try:
            memory = await asyncio.to_thread(recall, self.store, run.name)
            if memory.origin is not None and memory.origin.future is not None:
                raise ScenarioError(
                    Reason.UNSUPPORTED,
                    f"the broker ended, and {run.name} is only what might become of "
                    f"{memory.origin.run}: such a run is not continued",
                    {"run": memory.origin.run},
                )
            await self._go_on(run, memory, wait=True)
        except FederationError as error:
            await asyncio.to_thread(
                self.store.change, run.name, State.FAILED, error=error, end_ns=time.time_ns()
            )

    async def _go_on(self, run: Run, memory: Memory, *, wait: bool) -> None:
        """Let a run begin that has a past, with those members that its future needs.

        With `wait` they are waited for, as long as their policies say.
        """
        if memory.case is None:
            raise _no_case(run.name)
        folder = self.options.scenario_folder
        scenario = await asyncio.to_thread(parse, run.document, "scenario", folder)
        hours = run.horizon_ns / HOUR_NS
        scenario = scenario.model_copy(update={"horizon_h": hours})
        if scenario.pace is not None and scenario.pace.when_late == "degrade":
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"{run.name} has a past that can't be gone through again: it depends on when "
                "its members answered (pace: when_late: degrade)",
                {"run": run.name},
            )
        if memory.origin is not None:  # what might be is wanted sooner than what is
            scenario = scenario.model_copy(update={"pace": None})
        additions = {
            asked: await asyncio.to_thread(parse_addition, asked.document, "addition", folder)
            for asked in memory.asked
            if isinstance(asked, Added)
        }
        members = dict(scenario.members)
        for addition in additions.values():
            members |= addition.members
        over = _over(memory, run.settled_ns)
        needed = {name: member for name, member in members.items() if name not in over}
        places = _places(members, self._path)
        for name, place in memory.places.items():
            places[name] = replace(
                place, errand=places[name].errand if name in places else NO_ERRAND
            )
        here = {name: places[name] for name in needed}
        patience_s = max((m.on_failure.back_within_s for m in needed.values()), default=0.0)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + (patience_s if wait else 0.0)
        while True:
            leases: dict[str, Lease] = {}
            try:
                reached = await self._reach(scenario, memory, additions, here, leases, over)
                break
            except FederationError as error:
                if error.reason not in AWAY or loop.time() >= until_s:
                    raise
            await asyncio.sleep(CONNECT_AGAIN_S)
        links, prepared, asked = reached
        live = LiveRun(
            run.name,
            scenario,
            memory.case,
            prepared,
            links,
            leases,
            places,
            self.store,
            self.epoch,
            find=self._finder(places, leases),
            memory=memory,
            asked=asked,
            stored=run.entries,
            settled_ns=run.settled_ns,
            cuts=self._cuts,
        )
        await self._start(live)

    async def _reach(
        self,
        scenario: Scenario,
        memory: Memory,
        additions: Mapping[Added, Addition],
        here: Mapping[str, Place],
        leases: dict[str, Lease],
        over: set[str],
    ) -> tuple[dict[str, Link], Prepared, tuple[Asked, ...]]:
        """Links to the members that are needed, their wiring, and what people have asked for."""
        assert memory.case is not None
        links = await self._connect(here, leases)
        reached = tuple(links.values())
        try:
            asked: list[Asked] = []
            for request in memory.asked:
                if isinstance(request, Added):
                    addition = additions[request]
                    own = {n: links.pop(n) for n in addition.members if n in links}
                    asked.append(
                        await entrance(
                            addition,
                            own,
                            request.time_ns,
                            request.operator,
                            memory.descriptions,
                        )
                    )
                else:
                    asked.append(request)
            factory = None if PLANNER in over else self.options.planner
            if factory is None and PLANNER in memory.descriptions and PLANNER not in over:
                raise ScenarioError(
                    Reason.UNSUPPORTED,
                    "the run has a planner, and this broker was given none to go on with",
                    {"member": PLANNER},
                )
            known = memory.descriptions
            prepared = await prepare(scenario, memory.case, factory, links, known)
        except BaseException:
            await asyncio.gather(*(link.close() for link in reached))
            raise
        return links, prepared, tuple(asked)

    def _addresses(self, places: Mapping[str, Place], leases: dict[str, Lease]) -> dict[str, str]:
        """Where the members are. Notes the leases of those that are found by their names."""
        addresses: dict[str, str] = {}
        for member, place in places.items():
            if place.address is None:
                leases[member] = self._leased(place.name)
            addresses[member] = place.address or leases[member].member.address
        return addresses

    def _leased(self, name: str) -> Lease:
        lease = self._lease(name)
        if lease is None:
            raise self._unknown(name)
        return lease

    def _finder(self, places: Mapping[str, Place], leases: dict[str, Lease]) -> Find:
        """Finds a member, or a substitute, where it is registered at the time."""

        async def find(name: str) -> Link:
            place = places[name]
            options = options_to(place.errand, self._link_options(), again=True)
            address, expects = place.address, place.expects
            if address is None:
                lease = self._leased(place.name)
                if name in leases:
                    leases[name] = lease
                address, expects = lease.member.address, footing.registered(place.name)
            return await Link.connect(address, name, options, expects, place.errand)

        return find

    # -- who comes and goes --------------------------------------------------------------

    async def join(self, run: str, document: str, time_ns: int | None, operator: str) -> Accepted:
        """Let members join a live run; fails as `Control.AddMembers` does."""
        live = await self._lively(run)
        folder = self.options.scenario_folder
        addition = await asyncio.to_thread(parse_addition, document, "addition", folder)
        _check_files(addition.couplings, folder)
        leases: dict[str, Lease] = {}
        places = _places(addition.members, self._path)
        here = {name: places[name] for name in addition.members}
        links = await self._connect(here, leases)
        async with _unless_refused(links):
            return await live.join(addition, links, leases, places, time_ns, operator)

    async def part(self, run: str, member: str, time_ns: int | None, operator: str) -> Accepted:
        """Let a member leave a live run; fails as `Control.RemoveMember` does."""
        return await (await self._lively(run)).leave(member, time_ns, operator)

    async def replace(
        self, run: str, member: str, place: Place, time_ns: int | None, operator: str
    ) -> Accepted:
        """Let another service go on for a member; fails as `Control.ReplaceMember` does."""
        live = await self._lively(run)
        leases: dict[str, Lease] = {}
        before = live.places.get(member)
        if before is not None:
            place = replace(place, errand=before.errand)
        links = await self._connect({member: place}, leases)
        async with _unless_refused(links):
            return await live.replace(
                member, links[member], leases.get(member), place, time_ns, operator
            )

    async def _lively(self, run: str) -> LiveRun:
        live = await self.live(run)
        if live is None:
            raise ScenarioError(Reason.INSTANT_PASSED, f"{run} has ended", {"run": run})
        return live

    # -- runs with the past of others ----------------------------------------------------

    async def fork(
        self,
        name: str,
        time_ns: int | None = None,
        measure: str = "",
        horizon_ns: int | None = None,
        orders: Sequence[Ordered] = (),
        future: Future | None = None,
    ) -> str:
        """Start a run with the past of another one; fails as `Scenarios.ForkRun` does."""
        run = await self.find(name)
        cut_ns = run.settled_ns if time_ns is None else time_ns
        end_ns = run.horizon_ns if horizon_ns is None else horizon_ns
        _check_cut(run, cut_ns, end_ns)
        items, memory = await asyncio.to_thread(_cut, self.store, name, cut_ns)
        case = memory.case
        if case is None:
            raise _no_case(name)
        origin = memory.origin
        _check_is_lived(name, origin)
        if origin is not None and cut_ns < origin.until_ns:
            raise ScenarioError(
                Reason.INSTANT_PASSED,
                f"{name} has its past up to {origin.until_ns} ns from {origin.run}: fork that one",
                {"run": origin.run},
            )
        new = replace(case, measure=measure or case.measure)
        if new != case or future is not None:
            folder = self.options.scenario_folder
            scenario = await asyncio.to_thread(parse, run.document, "scenario", folder)
        if future is not None:
            _check_future(future, memory, future.case(scenario, case, cut_ns + 1))
        if new != case:
            _check_measure(scenario, case.measure, measure)
            items += [
                write_replaced(
                    PLANNER,
                    Succession(cut_ns, f"crews are sent as in {measure}", is_same=False),
                )
            ]
        origin = Origin(name, cut_ns, future=future)
        items = [write_case(new), write_origin(origin), *items]
        items += [write_asked(replace(order, time_ns=cut_ns + 1)) for order in orders]
        return await self._begin_with_past(
            replace(run, measure=new.measure, horizon_ns=end_ns), items
        )

    async def try_futures(
        self,
        name: str,
        cut_ns: int,
        end_ns: int,
        attempts: Sequence[Attempt],
        figures: Collection[str],
    ) -> AsyncGenerator[scenario_pb2.TryFuturesResponse, None]:
        """What came of each attempt, as they end; fails as `Scenarios.TryFutures` does."""
        run = await self.find(name)
        _check_cut(run, cut_ns, end_ns)
        if len(attempts) > MOST_ATTEMPTS:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{len(attempts)} attempts in one request; at most {MOST_ATTEMPTS}",
            )
        memory = await asyncio.to_thread(_beginning, self.store, name)
        _check_is_lived(name, memory.origin)
        if memory.case is None:
            raise _no_case(name)
        wanted = [_figure(memory, figure) for figure in figures]

        def check(scenario: Scenario, case: Case, attempt: Attempt) -> None:
            if attempt.measure not in ("", case.measure):
                _check_measure(scenario, case.measure, attempt.measure)
            if attempt.future is not None:
                _check_future(
                    attempt.future, memory, attempt.future.case(scenario, case, cut_ns + 1)
                )

        read = partial(parse, run.document, "scenario", self.options.scenario_folder)
        trying = self._branches.try_all(name, read, cut_ns, end_ns, attempts, wanted, check)
        async with aclosing(trying) as all_tried:
            async for number, tried in all_tried:
                response = _tried(number, tried)
                self._fitting(response, "fewer figures, or a nearer horizon")
                yield response

    async def _reach_all(self, scenario: Scenario) -> dict[str, Link]:
        """Links to all members of a scenario where they are now."""
        places = _places(scenario.members, self._path)
        return await self._connect({name: places[name] for name in scenario.members}, {})

    async def replay(
        self, name: str, live_members: Sequence[str], recorded_members: Sequence[str] = ()
    ) -> str:
        """Go through a run again; fails as `Scenarios.ReplayRun` does."""
        if live_members and recorded_members:
            raise ScenarioError(
                Reason.SCENARIO_INVALID, "name those who are live or those who are recorded"
            )
        run = await self.find(name)
        items, memory = await asyncio.to_thread(_cut, self.store, name, run.settled_ns)
        known = {*memory.pasts, *memory.descriptions}
        for member in (*live_members, *recorded_members):
            if member not in known:
                raise ScenarioError(
                    Reason.UNKNOWN_MEMBER,
                    f"{name} has no member {member!r}; it has {', '.join(sorted(known))}",
                    {"member": member},
                )
        if memory.case is None:
            raise _no_case(name)
        _check_is_lived(name, memory.origin)
        if recorded_members:
            live_members = [member for member in known if member not in recorded_members]
        kept: list[Item] = []
        for item in items:
            if _member_of(item) not in live_members:
                kept.append(item)
            elif isinstance(item, Frame):
                kept += write_desks(item)
        recorded = tuple(member for member in memory.pasts if member not in live_members)
        origin = Origin(name, run.settled_ns, is_replay=True, recorded=recorded)
        items = [write_case(memory.case), write_origin(origin), *kept]
        end_ns = min(run.horizon_ns, max(run.settled_ns, 0))
        return await self._begin_with_past(replace(run, horizon_ns=end_ns), items)

    async def _begin_with_past(self, like: Run, items: Sequence[Item]) -> str:
        """Start a run like another one, whose journal begins with `items`."""
        made = await asyncio.to_thread(
            self.store.create,
            Run(
                like.scenario,
                like.scenario,
                like.measure,
                like.document,
                like.seed,
                like.horizon_ns,
                time.time_ns(),
                like.figures,
                like.delays,
                fidelities=like.fidelities,
            ),
            items,
        )
        try:
            memory = await asyncio.to_thread(recall, self.store, made.name)
            self._remember(memory)
            await self._go_on(made, memory, wait=False)
        except FederationError as error:
            await asyncio.to_thread(
                self.store.change, made.name, State.FAILED, error=error, end_ns=time.time_ns()
            )
            raise
        return made.name

    def _remember(self, memory: Memory) -> None:
        """Let the members of a fork begin at the last states that earlier forks have found."""
        if memory.origin is None:
            return
        for member, past in memory.pasts.items():
            known = self._cuts.before(memory.origin.run, member, past.steps)
            if known is not None and (past.saved is None or past.saved.steps < known.steps):
                past.saved = known

    def _forget(self, live: LiveRun) -> None:
        if live.unkept is None:
            self._live.pop(live.name, None)
        if self.options.keep_runs is not None:
            pruning = asyncio.create_task(self._prune(self.options.keep_runs))
            self._tasks.add(pruning)
            pruning.add_done_callback(self._tasks.discard)

    async def _prune(self, keep_runs: int) -> None:
        try:
            await asyncio.to_thread(partial(self.store.prune, keep_runs=keep_runs))
        except FederationError as error:
            _say(f"old runs could not be dropped: {error}")

    async def _connect(
        self, places: Mapping[str, Place], leases: dict[str, Lease]
    ) -> dict[str, Link]:
        """A link to every member, all at once; of several failures the first in order.

        Notes the leases of those that are found by their names. Over TLS a member has to be whom
        its lease names, the broker of the city that it is or, at an address of its own, itself.
        """
        options = {
            name: options_to(place.errand, self._link_options()) for name, place in places.items()
        }
        addresses = self._addresses(places, leases)

        def expects(name: str) -> Party | None:
            lease = leases.get(name)
            return places[name].expects if lease is None else footing.registered(lease.member.name)

        results = await asyncio.gather(
            *(
                Link.connect(address, name, options[name], expects(name), places[name].errand)
                for name, address in addresses.items()
            ),
            return_exceptions=True,
        )
        links = [found for found in results if isinstance(found, Link)]
        for result in results:
            if isinstance(result, BaseException):
                await asyncio.gather(*(link.close() for link in links))
                raise result
        return dict(zip(addresses, links, strict=True))

    # -- runs on request -----------------------------------------------------------------

    async def create(
        self, document: str, seed: int | None, pace_factor: float | None = None
    ) -> str:
        """Begin a run of a document, under its first measure; the name of the run.

        `pace_factor` counts in place of the document's.
        """
        scenario = await asyncio.to_thread(
            parse, document, "scenario", self.options.scenario_folder
        )
        _check_files(scenario.couplings, self.options.scenario_folder)
        if pace_factor is not None:
            scenario, document = scenario.paced(pace_factor), ""
        measure = next(iter(scenario.measures))
        (case,) = cases(scenario, [measure], 1, scenario.seed if seed is None else seed)
        live, _ = await self.begin(scenario, case, self.options.planner, document=document)
        return live.name

    async def find(self, name: str) -> Run:
        """What is known about a run. Fails with RUN_NOT_FOUND."""
        return self._as_it_is(await asyncio.to_thread(self.store.run, name))

    def _as_it_is(self, run: Run) -> Run:
        """A run whose end could not be stored has ended all the same."""
        live = self._live.get(run.name)
        if live is None or live.unkept is None:
            return run
        return replace(run, state=State.FAILED, error=live.unkept)

    async def report(self, run: Run) -> scenario_pb2.Run:
        """A run as the wire carries it, with its figures so far."""
        return await asyncio.to_thread(report_of, self.store, run, self._stale(run))

    def _stale(self, run: Run) -> frozenset[tuple[str, str]]:
        """The variables whose values are older, now or at the end, than the scenario allows."""
        live = self._live.get(run.name)
        if live is not None and not run.state.is_over:
            return frozenset((stale.member, stale.variable) for stale in live.lookout.stale())
        if not run.results:
            return frozenset()
        values = read_results(run.results, scenario_pb2.Run()).stale_values
        return frozenset((stale.member, stale.variable) for stale in values)

    def _fidelities(self, run: Run) -> Mapping[str, Fidelity]:
        live = self._live.get(run.name)
        now = {} if live is None else {n: d.fidelity for n, d in live.descriptions.items()}
        return dict(run.fidelities) | now

    async def why(self, name: str) -> control_pb2.WhyResponse:
        """What a run waits for or, when it has ended, what its time went to."""
        run = await self.find(name)
        report = await self.report(run)
        live = self._live.get(name)
        if run.state.is_over:
            return read_results(run.results, report)
        if live is not None:
            return live.lookout.told(report)
        response = control_pb2.WhyResponse(run=report)
        response.wait.cause = "its members to be there again, to continue"
        return response

    async def live(self, name: str) -> LiveRun | None:
        """A run that has not ended, or None when it has. Fails with RUN_NOT_FOUND."""
        if (await self.find(name)).state.is_over:
            return None
        if name in self._ahead:
            await self._ahead[name].wait()
        return self._live.get(name)

    def _changes(self, name: str) -> asyncio.Event | None:
        """What will be set when there is news of a run; None when there will be none."""
        live = self._live.get(name)
        return self._ahead.get(name) if live is None else live.changed

    async def follow(
        self, name: str, cursor: str, members: Sequence[str], variables: Sequence[str]
    ) -> AsyncIterator[broker_pb2.WatchResponse]:
        """The state of a run and then its changes, until it ends; all of it from the store."""
        run = await self.find(name)
        prefix = f"{self.store.id}:{name}:"
        number = cursor.removeprefix(prefix)
        told_ns = run.settled_ns
        if cursor.startswith(prefix) and number.isdecimal() and int(number) <= run.entries:
            after = int(number)
            told_ns = -1
        else:
            found, after, run = await asyncio.to_thread(
                self.store.snapshot, name, members=members, variables=variables
            )
            told_ns = run.settled_ns
            stale, fidelities = self._stale(run), self._fidelities(run)
            yield self._checked(
                broker_pb2.WatchResponse(
                    cursor=f"{prefix}{after}",
                    snapshot=True,
                    time_ns=run.settled_ns,
                    entries=[entry_of(stored, fidelities, stale) for stored in found],
                )
            )
        while True:
            changed = self._changes(name)
            found, end, run = await asyncio.to_thread(
                self.store.entries, name, after, members=members, variables=variables
            )
            response = broker_pb2.WatchResponse()
            fidelities = self._fidelities(run) if found else {}
            size = 0
            for stored in found:
                message = entry_of(stored, fidelities)
                if size and size + message.ByteSize() > CHUNK_BYTES:
                    yield response
                    response, size = broker_pb2.WatchResponse(), 0
                size += message.ByteSize()
                response.entries.append(message)
                response.cursor = f"{prefix}{stored.number}"
                # of its own instant more may follow
                response.time_ns = stored.entry.time_ns - 1
            after = end
            if end == run.entries:
                response.time_ns = run.settled_ns
            if response.entries or (end == run.entries and run.settled_ns > told_ns):
                response.cursor = f"{prefix}{end}"
                told_ns = response.time_ns
                yield self._checked(response)
            if end < run.entries:
                continue
            if changed is None or self._as_it_is(run).state.is_over:
                return
            await changed.wait()

    def _checked(self, response: broker_pb2.WatchResponse) -> broker_pb2.WatchResponse:
        self._fitting(response, "fewer members or variables")
        return response

    def _fitting(self, response: Message, instead: str) -> None:
        size, limit = response.ByteSize(), self.options.max_message_bytes
        if size > limit:
            raise ScenarioError(
                Reason.MESSAGE_TOO_LARGE,
                f"the answer has {size} bytes; the limit is {limit}: ask for {instead}, or raise "
                "the limit",
                {"bytes": str(size)},
            )

    async def outages(
        self, request: broker_pb2.ListOutagesRequest
    ) -> broker_pb2.ListOutagesResponse:
        """When a run went on without somebody; fails as `ListOutages` says."""
        run = await self.find(request.run)
        found = await asyncio.to_thread(outages.outages, self.store, run.name)
        return broker_pb2.ListOutagesResponse(outages=map(outages.encode, found))

    async def history(
        self, request: broker_pb2.QueryHistoryRequest
    ) -> broker_pb2.QueryHistoryResponse:
        """The past of one variable, whole or in buckets; fails as `QueryHistory` says."""
        run = await self.find(request.run)
        end_ns = request.end_ns if request.HasField("end_ns") else run.settled_ns
        if not request.start_ns <= end_ns or not 0 <= request.buckets <= MOST_BUCKETS:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"a span from {request.start_ns} to {end_ns} ns in {request.buckets} buckets; it "
                f"takes a start, an end not before it, and at most {MOST_BUCKETS} buckets",
            )
        where = (request.run, request.member, request.variable)
        entity = request.entity if request.HasField("entity") else None
        latest = await asyncio.to_thread(self.store.value, *where)
        if latest is None or not (entity is None or 0 <= entity < latest.size):
            what = f"{request.member}.{request.variable}"
            problem = "is on record" if latest is None else f"has {latest.size} entities"
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE if latest is None else Reason.UNKNOWN_ENTITY,
                f"no {what} {problem}" if latest is None else f"{what} {problem}",
                {"member": request.member, "variable": request.variable},
            )
        response = broker_pb2.QueryHistoryResponse()
        if request.buckets == 0:
            found = await asyncio.to_thread(self.store.history, *where, request.start_ns, end_ns)
            fidelities = self._fidelities(run)
            response.entries.extend(entry_of(stored, fidelities) for stored in found)
        else:
            outline = await asyncio.to_thread(
                partial(self.store.outline, entity=entity),
                *(*where, request.start_ns, end_ns, request.buckets),
            )
            for row in range(len(outline.count)):
                response.buckets.add(
                    start_ns=int(outline.start_ns[row]),
                    end_ns=int(outline.end_ns[row]),
                    count=int(outline.count[row]),
                    first=codec.encode_vector(outline.first[row]),
                    last=codec.encode_vector(outline.last[row]),
                    low=codec.encode_vector(outline.low[row]),
                    high=codec.encode_vector(outline.high[row]),
                    mean=codec.encode_vector(outline.mean[row]),
                )
        self._fitting(response, "a shorter span, or for buckets of one entity")
        return response

    async def follow_run(self, name: str) -> AsyncIterator[Run]:
        """A run as it is, and again at every change, until it has ended."""
        while True:
            changed = self._changes(name)
            run = await self.find(name)
            yield run
            if changed is None or run.state.is_over:
                return
            await changed.wait()


@asynccontextmanager
async def _unless_refused(links: Mapping[str, Link]) -> AsyncIterator[None]:
    """Links that a run takes over, and that are closed when it does not want them."""
    try:
        yield
    except FederationError:
        await asyncio.gather(*(link.close() for link in links.values()))
        raise


async def _all_ended(tasks: set[asyncio.Task[None]]) -> None:
    await asyncio.gather(*(_ended(task) for task in tuple(tasks)))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _places(members: Mapping[str, Member], path: tuple[str, ...]) -> dict[str, Place]:
    """Where members and those that stand in for them are, as a document says."""
    places: dict[str, Place] = {}
    for name, member in members.items():
        places[name] = Place(name, member.address, errand_of(member, path), _city_of(name, member))
        if (substitute := member.on_failure.substitute) is not None:
            places[substitute_of(name)] = Place(substitute_of(name), substitute.address)
    return places


def _over(memory: Memory, settled_ns: int) -> set[str]:
    """Members whose part of a run is all on record."""
    origin = memory.origin
    if origin is not None and origin.is_replay:
        return set(origin.recorded)
    known_ns = settled_ns if origin is None else max(settled_ns, origin.until_ns)
    left = [asked for asked in memory.asked if isinstance(asked, Left)]
    return {a.member for a in left if a.time_ns is not None and a.time_ns <= known_ns}


def _cut(store: Store, run: str, until_ns: int) -> tuple[list[Item], Memory]:
    """What another run has as its past: the journal up to a cut, and what it says."""
    items = [
        item
        for item in cut(store, run, until_ns)
        if not (isinstance(item, Note) and item.kind in ("case", "origin"))
    ]
    return items, recall(store, run, until_ns)


def _check_cut(run: Run, cut_ns: int, end_ns: int) -> None:
    """Refuse a cut that a run has not come to, and a future that ends before it."""
    if not -1 <= cut_ns <= run.settled_ns:
        raise ScenarioError(
            Reason.INSTANT_PASSED,
            f"{run.name} is settled up to {run.settled_ns} ns; it can't be cut at {cut_ns} ns",
            {"settled_ns": str(run.settled_ns)},
        )
    if end_ns < max(cut_ns, 0):
        raise ScenarioError(
            Reason.INSTANT_PASSED, f"a run can't end at {end_ns} ns, before its cut"
        )


def _beginning(store: Store, run: str) -> Memory:
    """What the journal of a run says before anything has happened in it."""
    notes = takewhile(lambda item: isinstance(item, Note), (item for _, item in store.journal(run)))
    return remember(run, notes)


def _city_of(name: str, member: Member) -> str:
    """The city that a member is; empty for a twin."""
    return "" if member.peer is None else member.peer.city or name


def _figure(memory: Memory, name: str) -> tuple[str, str]:
    member, _, variable = name.partition(".")
    known = memory.descriptions.get(member)
    if known is None or variable not in {v.name for v in known.outputs()}:
        raise ScenarioError(
            Reason.UNKNOWN_VARIABLE,
            f"the run has no output {name!r}",
            {"member": member, "variable": variable},
        )
    return member, variable


def _tried(number: int, tried: Tried | FederationError) -> scenario_pb2.TryFuturesResponse:
    response = scenario_pb2.TryFuturesResponse(attempt=number)
    if isinstance(tried, FederationError):
        response.error.CopyFrom(status.encode_error(tried))
        return response
    for record in tried.told:
        response.told.add(
            member=record.owner,
            variable=record.variable,
            time_ns=record.time_ns,
            values=codec.encode_vector(record.value),
        )
    for sent in tried.sent:
        response.sent.add(time_ns=sent.time_ns, action=codec.encode_action(sent.action))
    return response


def _no_case(run: str) -> ScenarioError:
    return ScenarioError(Reason.STORE_FAILED, f"the record of {run} does not say what it ran")


def _member_of(item: Item) -> str:
    """Whose past an item of a journal belongs to; empty when to nobody's."""
    if isinstance(item, Frame):
        return item.member
    if item.kind in ("degraded", "replaced"):
        return str(json.loads(item.body)["member"])
    return ""


def _check_is_lived(run: str, origin: Origin | None) -> None:
    """Refuse to go on from a run that is only what might become of another one."""
    if origin is not None and origin.future is not None:
        raise ScenarioError(
            Reason.UNSUPPORTED,
            f"{run} is one of the futures of {origin.run}: it can't be forked or replayed",
            {"run": origin.run},
        )


def _check_future(future: Future, memory: Memory, case: Case) -> None:
    """Refuse a future of what its run does not have."""
    for member in future.believed:
        if member not in memory.descriptions or member == PLANNER:
            known = ", ".join(sorted({*memory.descriptions} - {PLANNER}))
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER,
                f"the run has no member {member!r} to believe something of; it has {known}",
                {"member": member},
            )
    for name in future.parameters:
        member, _, parameter = name.partition(".")
        parameters = {p.name for p in memory.descriptions[member].parameters}
        if parameter not in parameters:
            raise ScenarioError(
                Reason.UNKNOWN_PARAMETER,
                f"{member} has no parameter {parameter!r}; it has "
                f"{', '.join(sorted(parameters)) or 'none'}",
                {"member": member, "parameter": parameter},
            )


def _check_measure(scenario: Scenario, before: str, after: str) -> None:
    """Refuse a measure that a run can't change to in its midst."""
    if after not in scenario.measures:
        known = ", ".join(scenario.measures)
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"the scenario has no measure {after!r}; it has {known}",
            {"measure": after},
        )
    if scenario.measures[before].parameters != scenario.measures[after].parameters:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"{after} has other parameters than {before}, with which the run was opened; only how "
            "crews are sent can change in its midst",
            {"measure": after},
        )


def _check_files(couplings: Iterable[CouplingSpec], folder: Path | None) -> None:
    """Refuse a document that would have the broker read what it may not."""
    for coupling in couplings:
        if coupling.map is None:
            continue
        where = {"file": coupling.map.file}
        if folder is None:
            raise ScenarioError(
                Reason.MISSING_FILE,
                f"{coupling.source} to {coupling.target} reads {coupling.map.file}, and this "
                "broker was given no folder for the files of scenarios",
                where,
            )
        root = folder.resolve()
        if not (root / coupling.map.file).resolve().is_relative_to(root):
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{coupling.map.file} is outside the folder for the files of scenarios",
                where,
            )


async def serve_broker(options: BrokerOptions | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Says on stderr where; fails with PORT_IN_USE."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with BrokerServer(options) as broker:
        _say(f"broker at {broker.address} (pid {os.getpid()})")
        if broker.continued:
            _say(f"continuing {', '.join(broker.continued)} as soon as the members are there")
        await stopped.wait()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
