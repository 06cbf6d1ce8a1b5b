"""Reads a live run over gRPC: consistent cuts of it, and what is in force at its twins."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from federation.control.actuation import Seat
from federation.control.situation import NEVER, Place, Reading, Situation, Standing
from federation.core.bundle import Priority
from federation.core.ledger import Quality, Record
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.peer.reader import SCHEME
from federation.scenario.spec import Member, Scenario, parse
from federation.twin import Description
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
    twin_pb2,
)
from federation.wire import codec, footing, secure, status
from federation.wire.credentials import Identity
from federation.wire.link import MEBIBYTE, Errand, Link, LinkOptions, channel_options
from federation.wire.orders import City, Hand
from federation.wire.party import Part

ANSWER_S = 10.0
"""How long the broker may take to answer a question."""

CLOCKS_S = 3.0
"""How long a decision waits for clocks that are not known."""

Variable = tuple[str, str]
"""A member and an output of it."""


@dataclass(frozen=True)
class Observation:
    """A run as it stood when all up to `time_ns` was settled, and nothing after that."""

    time_ns: int
    readings: Mapping[Variable, Reading]

    def value(self, member: str, output: str) -> float | None:
        """The value of a scalar; None when it was never told."""
        reading = self.readings.get((member, output))
        return None if reading is None else float(reading.values[0])

    def digest(self) -> str:
        found = hashlib.sha256(str(self.time_ns).encode())
        for (member, output), reading in sorted(self.readings.items()):
            found.update(f"\0{member}.{output}@{reading.time_ns}/{int(reading.quality)}\0".encode())
            found.update(reading.values.tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Holding:
    """What is in force at one actuator of one entity, whose it is, and until when."""

    value: float
    priority: Priority
    owner: str
    bundle: str
    until_ns: int


@dataclass(frozen=True)
class Desks:
    """What is in force at all twins of a run that can be acted on.

    `silent` are the members that could not be asked, and why.
    """

    holdings: Mapping[Place, Holding] = field(default_factory=dict)
    seats: Mapping[str, Seat] = field(default_factory=dict)
    stops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)


class LiveView:
    """Follows a run from when the context is entered. Fails with RUN_NOT_FOUND and UNREACHABLE."""

    def __init__(self, broker: str, run: str, identity: Identity) -> None:
        self.run = run
        self.scenario: Scenario
        self.measure = ""
        self.descriptions: dict[str, Description] = {}
        self.settled_ns = -1
        self.has_ended = False
        self._identity = identity
        self.channel = secure.channel(
            broker,
            footing.expected(Part.BROKER),
            [*channel_options(256 * MEBIBYTE), ("grpc.enable_http_proxy", 0)],
        )
        self.broker: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(self.channel)
        self.scenarios: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(
            self.channel
        )
        self._control: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(
            self.channel
        )
        self._address = broker
        self._hands: dict[str, Hand] = {}
        self._clock_s: dict[str, float] = {}
        self._cut_ns = -1
        self._kept: dict[Variable, Reading] = {}
        """The last values at or before `_cut_ns`."""
        self._later: deque[Record] = deque()
        """What came after that, in order."""
        self._changed = asyncio.Event()
        self._heard = asyncio.Event()
        """Set when it is known how the run stands."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.channel.close)
            try:
                asked = scenario_pb2.GetRunRequest(name=self.run)
                found = await self.scenarios.GetRun(asked, timeout=ANSWER_S)
                members = await self.broker.ListMembers(
                    broker_pb2.ListMembersRequest(), timeout=ANSWER_S
                )
            except grpc.aio.AioRpcError as error:
                raise status.from_rpc(error, f"the broker at {self._address}") from None
            self.measure = found.measure
            self.scenario = await asyncio.to_thread(parse, found.document, "scenario")
            registered = {member.name: member.address for member in members.members}
            for name, member in self.scenario.members.items():
                address = member.address or registered.get(name)
                if address is None:
                    raise ScenarioError(
                        Reason.UNKNOWN_MEMBER,
                        f"no twin is registered as {name}",
                        {"member": name},
                    )
                city = self._city_of(name, member)
                async with await self._link(address, name, member, city) as link:
                    self.descriptions[name] = await link.describe()
                is_what_if = member.peer is not None and member.peer.session != "live"
                if self.descriptions[name].actuators and not is_what_if:
                    self._hands[name] = Hand(address, self._identity, city=city)
                    stack.push_async_callback(self._hands[name].close)
            following = asyncio.create_task(self._follow())
            stack.push_async_callback(_ended, following)
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self._heard.wait()
            except TimeoutError:
                raise TwinError(
                    Reason.UNREACHABLE,
                    f"the broker at {self._address} has not told of {self.run} within "
                    f"{ANSWER_S:g} s",
                    {"run": self.run},
                ) from None
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _city_of(self, name: str, member: Member) -> City | None:
        """What a member is that is another city; as whom it is asked where that takes no proof is
        the name of this identity, if that is a SPIFFE id."""
        if member.peer is None:
            return None
        claim = self._identity.name if self._identity.name.startswith(SCHEME) else ""
        return City(member.peer.city or name, member.peer.purpose, claim)

    async def _link(self, address: str, name: str, member: Member, city: City | None) -> Link:
        if city is None or member.peer is None:
            return await Link.connect(address, name)
        options = LinkOptions(identity=city.claim)
        expects = footing.expected(Part.BROKER, city=city.name)
        errand = Errand(city.purpose, (), member.peer.session == "live")
        return await Link.connect(address, name, options, expects, errand)

    async def cut(self, every_ns: int) -> Observation | None:
        """The run just before the last instant that is a multiple of `every_ns` and that it has
        come to, one that was not given before; waits for it. None when the run has ended first.
        """
        while True:
            instant_ns = (self.settled_ns + 1) // every_ns * every_ns
            if instant_ns - 1 > self._cut_ns:
                self._move_to(instant_ns - 1)
                return self._observed(self._cut_ns, self._kept)
            if self.has_ended:
                return None
            changed = self._changed
            await changed.wait()

    async def at(self, time_ns: int) -> Observation:
        """The run as it stood at an instant that is settled, from the broker's history."""
        outputs = [(m, v.name) for m, d in self.descriptions.items() for v in d.outputs()]
        told = await asyncio.gather(*(self._last(variable, time_ns) for variable in outputs))
        found = {v: r for v, r in zip(outputs, told, strict=True) if r is not None}
        return self._observed(time_ns, found)

    async def _last(self, variable: Variable, time_ns: int) -> Reading | None:
        member, output = variable
        request = broker_pb2.QueryHistoryRequest(
            run=self.run, member=member, variable=output, start_ns=0, end_ns=time_ns
        )
        try:
            answer = await self.broker.QueryHistory(request, timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            failure = status.from_rpc(error, f"the broker at {self._address}")
            if failure.reason is Reason.UNKNOWN_VARIABLE:
                return None
            raise failure from None
        if not answer.entries:
            return None
        record = codec.decode_entry(answer.entries[-1])
        assert isinstance(record, Record)
        return _reading(record)

    def timed(self, observation: Observation) -> Observation:
        """An observation with what is known of the clocks by now."""
        return self._observed(observation.time_ns, observation.readings)

    def now(self) -> Observation:
        """The run as far as it is settled."""
        found = dict(self._kept)
        for record in self._later:
            if record.time_ns > self.settled_ns:
                break
            found[record.owner, record.variable] = _reading(record)
        return self._observed(self.settled_ns, found)

    async def changed(self) -> None:
        """Wait until the run has gone on, or ended."""
        await self._changed.wait()

    async def look_at_clocks(self, needed: Collection[str]) -> None:
        """Ask how far the twins' clocks may be off; a run is given a moment to know those of the
        members that are `needed`."""
        until_s = asyncio.get_running_loop().time() + CLOCKS_S
        while True:
            await self._ask_for_clocks()
            is_known = self._clock_s.keys() >= set(needed)
            if is_known or asyncio.get_running_loop().time() > until_s:
                return
            await asyncio.sleep(0.1)

    async def _ask_for_clocks(self) -> None:
        try:
            answer = await self._control.Why(control_pb2.WhyRequest(run=self.run), timeout=ANSWER_S)
        except grpc.aio.AioRpcError:
            return  # what is known of the clocks stays
        for member in answer.members:
            if member.HasField("clock"):
                clock = member.clock
                self._clock_s[member.member] = (
                    abs(clock.clock_offset.ToNanoseconds())
                    + clock.round_trip_duration.ToNanoseconds() / 2
                ) / 1e9

    async def looks(self) -> dict[str, twin_pb2.ReadDeskResponse | FederationError]:
        """What every twin says is in force there, or why it can't be asked."""
        names = tuple(self._hands)
        answers = await asyncio.gather(
            *(self._hands[name].look(self.run, name) for name in names), return_exceptions=True
        )
        found: dict[str, twin_pb2.ReadDeskResponse | FederationError] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, FederationError):
                raise answer
            found[name] = answer
        return found

    def hand(self, member: str) -> Hand:
        """What acts on a twin under the identity of the view."""
        return self._hands[member]

    async def desks(self) -> Desks:
        """What is in force, asked of every twin itself."""
        return self.told(await self.looks())

    def told(self, answers: Mapping[str, twin_pb2.ReadDeskResponse | FederationError]) -> Desks:
        """What is in force, of what every twin has said."""
        holdings: dict[Place, Holding] = {}
        seats: dict[str, Seat] = {}
        stops: dict[str, tuple[str, ...]] = {}
        silent: dict[str, str] = {}
        for name, answer in answers.items():
            if isinstance(answer, FederationError):
                silent[name] = str(answer)
                continue
            if answer.stops:
                stops[name] = tuple(f"{stop.by}: {stop.reason}" for stop in answer.stops)
            views = [view for view in answer.desks if (view.run, view.member) == (self.run, name)]
            if not views:
                silent[name] = f"{name} has no session in {self.run}"
                continue
            seats[name] = seat_of(self._hands[name], views[-1].epoch)
            for each in views[-1].in_force:
                holdings[name, each.actuator, each.entity] = Holding(
                    each.value,
                    Priority(each.priority),
                    each.owner,
                    each.bundle,
                    each.until_ns if each.HasField("until_ns") else NEVER,
                )
        return Desks(holdings, seats, stops, silent)

    def situation(self, observation: Observation, desks: Desks) -> Situation:
        """What a guard judges by."""
        standing = {
            place: (Standing(held.value, held.priority, held.until_ns),)
            for place, held in desks.holdings.items()
        }
        silent = tuple(sorted(desks.silent))
        return Situation(
            self.run, observation.time_ns, observation.readings, standing, silent=silent
        )

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What the broker refuses is raised as a `FederationError`."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, f"the broker at {self._address}") from None

    # -- following -------------------------------------------------------------------------

    async def _follow(self) -> None:
        cursor, pause_s = "", 0.05
        while True:
            try:
                request = broker_pb2.WatchRequest(run=self.run, cursor=cursor)
                async for answer in self.broker.Watch(request):
                    self._take(answer)
                    cursor, pause_s = answer.cursor, 0.05
                break
            except grpc.aio.AioRpcError:
                # the broker may come back, and knows by the cursor where we are
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
        self.has_ended = True
        self._heard.set()
        self._announce()

    def _take(self, answer: broker_pb2.WatchResponse) -> None:
        self._heard.set()
        if answer.snapshot:
            self._kept.clear()
            self._later.clear()
        for message in answer.entries:
            entry = codec.decode_entry(message)
            if isinstance(entry, Record):
                self._later.append(entry)
        if answer.snapshot:
            self._move_to(answer.time_ns)
        if answer.time_ns > self.settled_ns:
            self.settled_ns = answer.time_ns
            self._announce()

    def _move_to(self, time_ns: int) -> None:
        while self._later and self._later[0].time_ns <= time_ns:
            record = self._later.popleft()
            self._kept[record.owner, record.variable] = _reading(record)
        self._cut_ns = max(self._cut_ns, time_ns)

    def _observed(self, time_ns: int, kept: Mapping[Variable, Reading]) -> Observation:
        """Readings with when they were last told, and what is known of their sources' clocks."""
        return Observation(
            time_ns,
            {
                key: reading._replace(
                    time_ns=self._told_ns(key[0], reading, time_ns),
                    clock_error_s=self._clock_s.get(key[0], math.inf),
                )
                for key, reading in kept.items()
            },
        )

    def _told_ns(self, member: str, reading: Reading, time_ns: int) -> int:
        """When a value was last told. The ledger has it when it changes; a member that has done
        its steps since then without another word has said that it holds. With all settled up to
        `time_ns` that is at its last step or, if it has no period, until now."""
        description = self.descriptions.get(member)
        if description is None or reading.quality is not Quality.GOOD:
            return reading.time_ns
        policy = description.time
        if not policy.period_ns:
            return max(reading.time_ns, time_ns)
        steps = (time_ns - policy.offset_ns) // policy.period_ns
        return max(reading.time_ns, policy.offset_ns + steps * policy.period_ns)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def seat_of(hand: Hand, epoch: int) -> Seat:
    """Where a hand reaches a twin, or a city."""
    if hand.city is None:
        return Seat(hand.address, epoch)
    return Seat(hand.address, epoch, hand.city.name, hand.city.purpose, hand.city.claim)


def _reading(record: Record) -> Reading:
    return Reading(record.value, record.time_ns, record.quality)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def variable_of(name: str) -> Variable:
    """Member and variable of `member.variable`."""
    member, _, variable = name.partition(".")
    return member, variable
