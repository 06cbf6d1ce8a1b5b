"""Cities as peers: each broker is a twin to the other, for what its policy allows and no more."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.ledger import EventRecord, Quality, Record
from federation.errors import FederationError, Reason
from federation.peer.gate import Budget
from federation.peer.policy import Limits
from federation.planners import planner
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Scenario, load, parse
from federation.scenario.study import cases
from federation.twin import MINUTE_NS, Action, StepInput, StepResult, Twin
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire.caller import claim
from federation.wire.link import Errand, Link, LinkOptions
from tests.chaos.proxy import Proxy
from tests.cities import (
    ARRIVED,
    BIRCH,
    BIRCH_POLICY,
    RELAY_POLICY,
    Clinic,
    Gauge,
    Grid,
    Helper,
    Relay,
    Writer,
    ash,
    relay,
    write_birch,
)
from tests.test_broker import present
from tests.test_wire import bounded

STEP_NS = 5 * MINUTE_NS
SHELBY = Path(__file__).parents[1] / "twins/regions/shelby"
ASH = LinkOptions(identity="spiffe://ash/peer/broker")


def case_of(scenario: Scenario, seed: int = 5) -> Case:
    (case,) = cases(scenario, ["none"], 1, seed)
    return case


@asynccontextmanager
async def city(
    name: str, scenario: Path, policy: Path, port: int = 0
) -> AsyncIterator[BrokerServer]:
    """A broker that serves a city to its peers."""
    options = BrokerOptions(
        city=name,
        export=policy,
        city_scenario=scenario,
        planner=planner,
        grace_s=0.1,
        port=port,
    )
    async with BrokerServer(options) as broker:
        yield broker


@asynccontextmanager
async def caller(
    link: LinkOptions | None = None, **twins: type[Twin]
) -> AsyncIterator[BrokerServer]:
    """The broker of ash with its own twins."""
    options = BrokerOptions(city="ash", grace_s=0.1, link=link or LinkOptions())
    async with BrokerServer(options) as broker, present(broker.address, **twins):
        await broker.members_ready(twins, 10)
        yield broker


def inside(scenario: Path, policy: Path) -> str:
    """Birch as a member of a run in one process."""
    config = f'city: birch, scenario: "{scenario}", policy: "{policy}", reader: ash'
    return f'{{class: "federation.peer.city:CityTwin", peer: {{}}, config: {{{config}}}}}'


def there(address: str, peer: str = "{}", more: str = "") -> str:
    """Birch as a member that is at an address."""
    return f'{{address: "{address}", peer: {peer}{more}}}'


async def steps(link: Link, count: int, tie_mw: float = 0.0, seed: int = 3) -> list[StepResult]:
    """The answers of a fresh session to its first steps."""
    session = await link.session("birch", seed, {}, 1)
    found = []
    for number in range(count):
        inputs = {"grid_tie": np.array([tie_mw])} if number == 0 else {}
        found += await session.advance([StepInput(number * STEP_NS, 0, inputs)])
    await session.close()
    return found


def values(results: list[StepResult], variable: str) -> list[list[float]]:
    return [r.outputs[variable].tolist() for r in results if variable in r.outputs]


# -- a joint what-if ---------------------------------------------------------------------------


def test_a_city_is_a_twin_with_the_same_ledger_in_process_and_between_two_brokers(
    tmp_path: Path,
) -> None:
    files = write_birch(tmp_path)
    local_scenario = parse(ash(inside(*files)))
    case = case_of(local_scenario)
    local = run_local(local_scenario, case, None)
    assert local.kpis["sent"] == 3.0
    chain = {(e.owner, e.event.kind) for e in local.events}
    assert chain == {("birch", "grid_short_of_power"), ("helper", "help_sent")}
    helped = next(e for e in local.events if e.owner == "helper")
    assert [cause for cause, _ in helped.via] == ["birch/1"]

    async def story() -> None:
        async with city("birch", *files) as birch, caller(helper=Helper) as broker:
            far = await broker.run(parse(ash(there(birch.address))), case)
            assert (far.digest, far.kpis) == (local.digest, local.kpis)
            # the same when the members of birch are services of their own
            async with present(birch.address, grid=Grid, clinic=Clinic):
                await birch.members_ready(["grid", "clinic"], 10)
                again = await broker.run(parse(ash(there(birch.address))), case)
                assert again.digest == local.digest

    bounded(story)


def test_what_is_told_as_it_is_is_what_the_city_is(tmp_path: Path) -> None:
    """Every output of birch at each of its steps as a city, against birch run alone."""
    everything = BIRCH_POLICY[: BIRCH_POLICY.index("  - name: lack-of-power")]
    everything += "  - {name: all, who: [ash], what: {variables: ['*'], events: ['*']}}\n"
    files = write_birch(tmp_path, everything)
    own = parse(BIRCH)
    alone = run_local(own, case_of(own, 3), None, keep_ledger=True)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            session = await link.session("birch", 3, {}, 1)
            results = await session.advance([StepInput(n * STEP_NS) for n in range(25)])
            now: dict[str, list[float]] = {}
            records = iter(alone.ledger)
            record = next(records, None)
            for result in results:
                while record is not None and record.time_ns <= result.time_ns:
                    now[f"{record.owner}_{record.variable}"] = record.value.tolist()
                    record = next(records, None)
                assert {n: v.tolist() for n, v in result.outputs.items()} == now
            assert [(e.kind, e.entity) for r in results for e in r.events] == [
                (f"{e.owner}_{e.event.kind}", e.event.entity) for e in alone.events
            ]

    bounded(story)


def test_two_sessions_of_a_city_do_not_see_each_other(tmp_path: Path) -> None:
    files = write_birch(tmp_path)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            helped, alone = await asyncio.gather(steps(link, 12, 15.0), steps(link, 12))
            assert values(helped, "grid_unserved") == [[0.0]] * 12
            assert values(alone, "grid_unserved")[-1] > [0.0]
            assert values(await steps(link, 12), "grid_unserved") == values(alone, "grid_unserved")

    bounded(story)


def test_a_session_goes_on_from_a_snapshot_as_if_nothing_had_been(tmp_path: Path) -> None:
    files = write_birch(tmp_path)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            whole = await steps(link, 16, 2.0)
            first = await link.session("birch", 3, {}, 1)
            inputs = {"grid_tie": np.array([2.0])}
            before = await first.advance([StepInput(0, 0, inputs)])
            before += await first.advance([StepInput(n * STEP_NS) for n in range(1, 9)])
            state = await first.snapshot()
            second = await link.session("birch", 3, {}, 1)
            await second.restore(state)
            after = await second.advance([StepInput(n * STEP_NS) for n in range(9, 16)])
            for one, other in zip(whole, [*before, *after], strict=True):
                assert one.events == other.events
                assert one.outputs.keys() == other.outputs.keys()
                for name, value in one.outputs.items():
                    assert value.tobytes() == other.outputs[name].tobytes()
            with pytest.raises(FederationError):
                await second.restore(b"no state")

    bounded(story)


def test_a_cut_line_changes_nothing_in_a_what_if_of_a_member_that_recovers(tmp_path: Path) -> None:
    files = write_birch(tmp_path)
    local_scenario = parse(ash(inside(*files)))
    case = case_of(local_scenario)
    local = run_local(local_scenario, case, None)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            wire_to(birch) as wire,
            caller(helper=Helper) as broker,
        ):
            at = f"127.0.0.1:{wire.port}"
            paced = "pace: {factor: 7200}"
            recovers = there(at, more=", on_failure: {do: recover}")
            scenario = parse(ash(recovers, more=paced))
            cutting = asyncio.create_task(cut_again_and_again(wire))
            far = await broker.run(scenario, case)
            cutting.cancel()
            assert far.digest == local.digest
            assert wire.cuts > 3

    bounded(story)


# -- who gets what -----------------------------------------------------------------------------


def test_a_stranger_gets_nothing_and_learns_by_which_rule(tmp_path: Path) -> None:
    files = write_birch(tmp_path)

    async def story() -> None:
        async with city("birch", *files) as birch:
            for identity in ("", "cedar", "spiffe://ash/operator/kim"):
                with pytest.raises(FederationError) as caught:
                    await Link.connect(birch.address, "birch", LinkOptions(identity=identity))
                assert caught.value.reason is Reason.NOT_EXPORTED
                assert caught.value.metadata["rule"] == "default"
            with pytest.raises(FederationError) as caught:
                await Link.connect(birch.address, "birch", ASH, errand=Errand(is_live=True))
            assert caught.value.reason is Reason.NOT_EXPORTED
            # a session that is opened without asking first is refused as well
            async with await Link.connect(birch.address, "birch", ASH) as link:
                stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(link.line.channel)
                call = stub.Session(metadata=claim("cedar"))
                with pytest.raises(grpc.aio.AioRpcError, match="cedar may not have a what-if"):
                    await call.read()

    bounded(story)


def test_a_peer_can_neither_read_nor_set_what_is_not_exported_to_it(tmp_path: Path) -> None:
    files = write_birch(tmp_path)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            (first,) = await steps(link, 1)
            assert set(first.outputs) == {"grid_unserved", "clinic_beds_free"}
            for wrong, reason in (
                (StepInput(0, 0, {"grid_secret": np.zeros(1)}), Reason.UNKNOWN_VARIABLE),
                (StepInput(0, 0, {"clinic_power": np.zeros(2)}), Reason.UNKNOWN_VARIABLE),
                (
                    StepInput(0, actions=(Action("birch", "grid_shed", "S1", 1.0),)),
                    Reason.NOT_EXPORTED,
                ),
                (StepInput(1), Reason.INVALID_FRAME),
            ):
                session = await link.session("birch", 1, {}, 1)
                with pytest.raises(FederationError) as caught:
                    await session.advance([wrong])
                assert caught.value.reason is reason
                await session.close()

    bounded(story)


def test_an_action_of_a_peer_takes_effect_in_its_own_what_if_only(tmp_path: Path) -> None:
    more = "  - {name: shed, who: [ash], what: {actions: [grid.shed], entities: ['S*']}}\n"
    files = write_birch(tmp_path, BIRCH_POLICY + more)

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            session = await link.session("birch", 3, {}, 1)
            shed = tuple(Action("birch", "grid_shed", s, 5.0) for s in ("S1", "S2"))
            results = await session.advance([StepInput(0, actions=shed)])
            results += await session.advance([StepInput(n * STEP_NS) for n in range(1, 7)])
            alone = await steps(link, 7)
            unserved = [values(found, "grid_unserved") for found in (results, alone)]
            assert unserved[0][-1] == [0.0] < unserved[1][-1]
            north = Action("birch", "grid_shed", "N1", 5.0)
            with pytest.raises(FederationError) as caught:
                await session.advance([StepInput(7 * STEP_NS, actions=(north,))])
            assert caught.value.reason is Reason.NOT_EXPORTED

    bounded(story)


def test_a_repeated_frame_gets_the_same_answer_and_one_session_is_nobody_elses(
    tmp_path: Path,
) -> None:
    """What the contract asks of any twin, asked of a city with nothing but its protos."""
    files = write_birch(tmp_path, BIRCH_POLICY.replace("[ash]", "[ash, cedar]"))

    async def ask(
        stub: twin_pb2_grpc.TwinAsyncStub, who: str, *frames: twin_pb2.SessionRequest
    ) -> list[twin_pb2.SessionResponse]:
        call = stub.Session(metadata=claim(who))
        found = []
        for frame in frames:
            await call.write(frame)
            answer = await call.read()
            assert isinstance(answer, twin_pb2.SessionResponse)
            found.append(answer)
        await call.done_writing()
        return found

    def frame(number: int, epoch: int = 1) -> twin_pb2.SessionRequest:
        request = twin_pb2.SessionRequest(session="s", frame=number, epoch=epoch)
        if number == 1:
            request.open.member, request.open.seed = "birch", 1
        else:
            request.advance.steps.add(time_ns=(number - 2) * STEP_NS)
        return request

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(link.line.channel)
            opened, one, again, late, stale = await ask(
                stub, "ash", frame(1), frame(2), frame(2), frame(9), frame(3, 0)
            )
            assert opened.HasField("opened")
            assert one.HasField("advanced")
            assert again == one
            assert late.error.reason == "INVALID_FRAME"
            assert stale.error.reason == "STALE_EPOCH"
            # the same id is another session for another reader
            (other,) = await ask(stub, "cedar", frame(3))
            assert (other.error.reason, other.error.metadata["expected_frame"]) == (
                "INVALID_FRAME",
                "1",
            )
            (on,) = await ask(stub, "ash", frame(3))
            assert on.HasField("advanced")
            assert not on.HasField("error")

    bounded(story)


# -- how much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ("sessions: 1", "sessions"),
        ("steps: 4", "steps"),
        ("cpu_s: 0.001", "cpu_s"),
        ("wall_s: 0.001", "wall_s"),
        ("horizon_h: 0.25", "horizon_h"),
    ],
)
def test_a_peer_uses_no_more_than_its_limits(tmp_path: Path, limits: str, name: str) -> None:
    files = write_birch(tmp_path, BIRCH_POLICY + f"limits: [{{who: [ash], {limits}}}]\n")

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            await Link.connect(birch.address, "birch", ASH) as link,
        ):
            assert link.max_sessions == (1 if name == "sessions" else 2)

            async def use() -> None:
                session = await link.session("birch", 1, {}, 1)
                try:
                    if name == "sessions":
                        await link.session("birch", 2, {}, 1)
                    await session.advance([StepInput(0)])
                    await session.advance([StepInput(n * STEP_NS) for n in range(1, 6)])
                finally:
                    await session.close()

            with pytest.raises(FederationError) as caught:
                await use()
            assert caught.value.reason is Reason.PEER_LIMIT
            assert caught.value.metadata["limit"] == name
            if name == "sessions":  # one that has ended makes room
                await link.session("birch", 2, {}, 1)

    bounded(story)


def test_a_new_window_gives_a_new_share() -> None:
    now_s = [0.0]
    budget, limits = Budget(lambda: now_s[0]), Limits(wall_s=2.0, per_min=1.0)
    for share_s in (1.0, 1.0):
        budget.check(limits)
        with budget.spending():
            now_s[0] += share_s
    with pytest.raises(FederationError) as caught:
        budget.check(limits)
    assert caught.value.metadata == {"limit": "wall_s", "after_s": "58"}
    now_s[0] = 60.0
    budget.check(limits)


# -- rings ---------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in with_ports]
    for one in with_ports:
        one.close()
    return ports


@asynccontextmanager
async def ring(folder: Path, on_loop: str) -> AsyncIterator[dict[str, BrokerServer]]:
    """Three cities, each of which has the next one as a member of its scenario."""
    names = ("ash", "birch", "cedar")
    ports = dict(zip(names, free_ports(3), strict=True))
    policy = folder / "policy.yaml"
    policy.write_text(RELAY_POLICY, encoding="utf-8")
    async with AsyncExitStack() as stack:
        brokers = {}
        for name, beyond in zip(names, (*names[1:], names[0]), strict=True):
            file = folder / f"{name}.yaml"
            file.write_text(relay(name, f"127.0.0.1:{ports[beyond]}", on_loop), encoding="utf-8")
            made = city(name, file, policy, ports[name])
            brokers[name] = await stack.enter_async_context(made)
        yield brokers


class OfAsh(Relay):
    """The relay of ash as a service."""

    def __init__(self) -> None:
        super().__init__("ash")


@asynccontextmanager
async def talkers(broker: BrokerServer) -> AsyncIterator[None]:
    async with present(broker.address, writer=Writer, relay=OfAsh):
        await broker.members_ready(["writer", "relay"], 10)
        yield


def from_ash(brokers: dict[str, BrokerServer]) -> str:
    """A run of ash in which somebody writes something that goes around."""
    return f"""
name: ash-talk
region: ash
horizon_h: 1
members:
  writer: {{class: "tests.cities:Writer"}}
  relay: {{class: "tests.cities:Relay"}}
  beyond: {there(brokers["birch"].address)}
couplings:
  - {{from: writer.said, to: relay.heard}}
  - {{from: relay.said, to: beyond.relay_heard}}
"""


def test_in_a_ring_of_three_brokers_a_write_arrives_at_each_once(tmp_path: Path) -> None:
    """LEVEL45 8."""

    async def story() -> None:
        async with ring(tmp_path, "leave-out") as brokers, talkers(brokers["ash"]):
            scenario = parse(from_ash(brokers))
            ARRIVED.clear()
            outcome = await brokers["ash"].run(scenario, case_of(scenario))
            assert sorted(ARRIVED) == [("ash", 7.0), ("birch", 7.0), ("cedar", 7.0)]
            # what birch has told of it goes back to what was written in ash
            arrived = [
                (e.event.kind, e.event.causes) for e in outcome.events if e.owner == "beyond"
            ]
            assert arrived == [("relay_arrived", ("relay/1",))]

    bounded(story)


def test_a_broker_that_finds_its_own_name_in_the_path_refuses(tmp_path: Path) -> None:
    async def story() -> None:
        async with ring(tmp_path, "refuse") as brokers, talkers(brokers["ash"]):
            scenario = parse(from_ash(brokers))
            with pytest.raises(FederationError) as caught:
                await brokers["ash"].run(scenario, case_of(scenario))
            assert caught.value.reason is Reason.PATH_LOOP
            assert caught.value.metadata["path"] == "ash,birch,cedar"
            assert caught.value.metadata["city"] == "ash"

    bounded(story)


# -- the run that goes on ------------------------------------------------------------------------


GAUGE = """
name: gauge
region: test
horizon_h: 0.5
members:
  gauge: {class: "tests.cities:Gauge"}
"""


def test_a_twin_says_itself_when_its_values_are_held_and_when_they_are_good_again() -> None:
    scenario = parse(GAUGE)
    case = case_of(scenario)
    local = run_local(scenario, case, None, keep_ledger=True)
    assert [(r.time_ns // MINUTE_NS, r.value.tolist(), r.quality) for r in local.ledger] == [
        (0, [0.0], Quality.GOOD),
        (5, [5.0], Quality.GOOD),
        (10, [5.0], Quality.HELD),
        (25, [25.0], Quality.GOOD),
        (30, [30.0], Quality.GOOD),
    ]
    marks = [(e.event.kind, e.event.time_ns // MINUTE_NS) for e in local.events]
    assert marks == [("member_held", 10), ("member_good", 25)]
    assert "the line is down" in local.events[0].event.text

    async def story() -> None:
        async with caller(gauge=Gauge) as broker:
            far = await broker.run(scenario, case)
            assert far.digest == local.digest

    bounded(story)


class Wire(Proxy):
    """A line between two brokers that can be down."""

    is_down = False
    cuts = 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        await super()._accept(reader, writer)

    def down(self) -> None:
        self.is_down = True
        self.cut()


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for something, for 20 s at most."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.05)


async def cut_again_and_again(wire: Wire) -> None:
    while True:
        await asyncio.sleep(0.1)
        wire.cuts += wire.cut()


@asynccontextmanager
async def wire_to(broker: BrokerServer) -> AsyncIterator[Wire]:
    wire = Wire(int(broker.address.rpartition(":")[2]), lambda blow: None)
    await wire.start()
    try:
        yield wire
    finally:
        await wire.stop()


def live_policy(patience_s: float) -> str:
    """Birch lets ash look at its live run, too; a session waits so long for it."""
    sessions = BIRCH_POLICY.replace("sessions: [what-if]", "sessions: [what-if, live]")
    return f"{sessions}patience_s: {patience_s}\n"


def watching(address: str, pace: str = "") -> str:
    """Ash looks at the live run of birch."""
    return f"""
name: ash-looks
region: ash
horizon_h: 1
members:
  helper: {{class: "tests.cities:Helper"}}
  birch: {there(address, "{session: live}", ", on_failure: recover")}
couplings:
  - {{from: birch.grid_unserved, to: helper.missing, delay_min: 5}}
{pace}
"""


def told_of_birch(outcome: Outcome, variable: str) -> dict[int, tuple[float, Quality]]:
    return {
        r.time_ns: (float(r.value[0]), r.quality)
        for r in outcome.ledger
        if isinstance(r, Record) and (r.owner, r.variable) == ("birch", variable)
    }


async def lived(birch: BrokerServer, run: str, variable: str, time_ns: int) -> float:
    """A value of birch's own record before an instant."""
    found = birch.store.history(run, "grid", variable, 0, time_ns - 1)
    record = found[-1].entry
    assert isinstance(record, Record)
    return float(record.value[0])


def test_a_live_session_sees_the_run_of_the_city_as_it_is_at_each_instant(tmp_path: Path) -> None:
    files = write_birch(tmp_path, live_policy(5))

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            present(birch.address, grid=Grid, clinic=Clinic),
            caller(helper=Helper) as broker,
        ):
            await birch.members_ready(["grid", "clinic"], 10)
            scenario = parse(watching(birch.address))
            with pytest.raises(FederationError) as caught:
                await broker.run(scenario, case_of(scenario))
            assert caught.value.reason is Reason.NOT_LIVE
            own = parse(BIRCH + "pace: {factor: 3600}\n")
            live, task = await birch.begin(own, case_of(own, 11), None)
            outcome = await broker.run(scenario, case_of(scenario), keep_ledger=True)
            seen = told_of_birch(outcome, "grid_unserved")
            assert len(seen) > 5
            for time_ns, (value, quality) in seen.items():
                assert quality is Quality.GOOD
                assert value == await lived(birch, live.name, "unserved", time_ns)
            assert any(e.event.kind == "grid_short_of_power" for e in outcome.events)
            await live.cancel()
            await asyncio.wait([task])

    bounded(story)


def test_where_the_run_of_the_city_has_not_come_yet_values_are_held_and_marked(
    tmp_path: Path,
) -> None:
    files = write_birch(tmp_path, live_policy(0))

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            present(birch.address, grid=Grid, clinic=Clinic),
            caller(helper=Helper) as broker,
        ):
            await birch.members_ready(["grid", "clinic"], 10)
            own = parse(BIRCH + "pace: {factor: 1}\n")
            live, task = await birch.begin(own, case_of(own, 11), None)
            await until(lambda: birch.store.run(live.name).settled_ns >= 0)
            scenario = parse(watching(birch.address))
            outcome = await broker.run(scenario, case_of(scenario), keep_ledger=True)
            marks = [e.event for e in outcome.events if e.event.kind == "member_held"]
            assert [(e.entity, "not come further" in e.text) for e in marks] == [("birch", True)]
            seen = told_of_birch(outcome, "grid_unserved")
            assert {q for t, (_, q) in seen.items() if t >= marks[0].time_ns} == {Quality.HELD}
            await live.cancel()
            await asyncio.wait([task])

    bounded(story)


def test_a_city_goes_on_alone_when_the_line_is_down_and_both_agree_when_it_is_back(
    tmp_path: Path,
) -> None:
    """The values of the neighbour are marked as stale meanwhile; nothing of them is lost.

    LEVEL45 12.
    """
    files = write_birch(tmp_path, live_policy(1))

    async def story() -> None:
        async with (
            city("birch", *files) as birch,
            present(birch.address, grid=Grid, clinic=Clinic),
            caller(LinkOptions(resume_timeout_s=60), helper=Helper) as broker,
            wire_to(birch) as wire,
        ):
            await birch.members_ready(["grid", "clinic"], 10)
            own = parse(BIRCH.replace("horizon_h: 2", "horizon_h: 24") + "pace: {factor: 1200}\n")
            live, lives = await birch.begin(own, case_of(own, 11), None)
            pace = "pace: {factor: 1200, when_late: degrade, late_after_s: 0.3}"
            text = watching(f"127.0.0.1:{wire.port}", pace).replace("horizon_h: 1", "horizon_h: 24")
            scenario = parse(text)
            looks, asks = await broker.begin(scenario, case_of(scenario), None)

            def marks() -> list[str]:
                found, _, _ = broker.store.snapshot(looks.name)
                events = [s.entry for s in found if isinstance(s.entry, EventRecord)]
                return [e.event.kind for e in events if e.owner == "federation"]

            await asyncio.sleep(0.6)
            wire.down()
            await until(lambda: marks()[-1:] == ["member_stale"])
            at_ns = broker.store.run(looks.name).settled_ns
            # nobody waits for the neighbour
            await until(lambda: broker.store.run(looks.name).settled_ns > at_ns + 2 * STEP_NS)
            wire.is_down = False
            await until(lambda: marks()[-1:] == ["member_good"])

            def told() -> list[Record]:
                history = broker.store.history(looks.name, "birch", "grid_unserved", 0, 1 << 60)
                return [s.entry for s in history if isinstance(s.entry, Record)]

            # on a busy machine the neighbour may be late once more in between
            await until(lambda: told()[-1].quality is Quality.GOOD and len(told()) > 1)
            for run in (looks, live):
                await run.cancel()
            await asyncio.wait([asks, lives])
            records = told()
            assert Quality.STALE in {record.quality for record in records}
            good = [record for record in records if record.quality is Quality.GOOD]
            assert good[-1] is records[-1]
            for record in good:
                assert float(record.value[0]) == await lived(
                    birch, live.name, "unserved", record.time_ns
                )

    bounded(story)


# -- a county ------------------------------------------------------------------------------------


SHOCK = """
name: shelby-shock
region: shelby
horizon_h: 1
members:
  disaster: {class: "twins.disaster.twin:DisasterTwin", config: {region: shelby}}
  energy: {class: "twins.energy.twin:EnergyTwin", config: {region: shelby}}
couplings:
  - {from: disaster.power_damage_state, to: energy.damage_state}
  - {from: disaster.power_repair_work, to: energy.repair_work}
  - {from: energy.intact, to: disaster.power_intact, delay_min: 1}
uncertainty:
  energy.demand_factor: {triangular: [0.45, 0.75, 1.0]}
"""


def test_shelby_as_a_neighbour_sees_it_is_what_shelby_is_as_far_as_it_may_be_seen(
    tmp_path: Path,
) -> None:
    """Ground and grid in the first hour after the shock, against a run of the county alone."""
    file = tmp_path / "shock.yaml"
    file.write_text(SHOCK, encoding="utf-8")
    scenario = load(file)
    alone = run_local(scenario, case_of(scenario, 3), None, keep_ledger=True)

    def of_shelby(member: str, variable: str, time_ns: int) -> np.ndarray:
        found = [
            r.value
            for r in alone.ledger
            if (r.owner, r.variable) == (member, variable) and r.time_ns <= time_ns
        ]
        return found[-1]

    async def story() -> None:
        identity = LinkOptions(identity="spiffe://nashville/peer/broker", connect_timeout_s=30)
        async with (
            city("shelby", file, SHELBY / "export.yaml") as shelby,
            await Link.connect(
                shelby.address, "shelby", identity, errand=Errand("planning")
            ) as link,
        ):
            description = await link.describe()
            assert {v.name for v in description.outputs()} == {
                "energy_supplied_fraction_mean",
                "energy_lacking_sum",
                "energy_people_without_power_sum",
            }
            assert description.ids("area") == ("north", "south")
            session = await link.session("shelby", 3, {}, 1)
            results = await session.advance([StepInput(n * STEP_NS) for n in range(13)])
            people = {r.time_ns: r.outputs.get("energy_people_without_power_sum") for r in results}
            for time_ns, told in people.items():
                if time_ns < 3 * STEP_NS:
                    assert told is None
                    continue
                true = of_shelby("energy", "people_without_power", time_ns - 3 * STEP_NS)
                assert told is not None
                assert told.tolist() == true.tolist()
            shares = values(results, "energy_supplied_fraction_mean")
            assert len(shares) == 4
            assert all(round(20 * share, 6).is_integer() for pair in shares for share in pair)

    bounded(story)
