"""Members come, go and are replaced in runs that go on; runs are forked and gone through again."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from federation.__main__ import main
from federation.broker.server import BrokerOptions, BrokerServer
from federation.broker.store import Store
from federation.core.coupling import Arrival, wire
from federation.core.ledger import EventRecord
from federation.errors import Reason
from federation.planners import planner
from federation.scenario.run import run_local
from federation.scenario.spec import parse_addition
from federation.twin import HOUR_NS, NOTHING, Action, Session, Step, Twin
from federation.v1 import control_pb2, scenario_pb2
from federation.wire import codec
from tests.reference import Reference
from tests.test_broker import (
    VALLEY,
    Services,
    case_of,
    client,
    eventually,
    places,
    present,
    process,
    refused,
    scenario_of,
    valley,
)
from tests.test_wire import bounded
from tests.valley import Dams, Gauge, NewTown, SteadyDams, Town, Weather

DOCUMENT = """
name: Wet valley
region: nowhere
seed: 5
horizon_h: 16
members:
  weather: {class: "tests.valley:Weather"}
  dams: {class: "tests.valley:Dams"}
  town: {class: "tests.valley:Town"}
  meter: {class: "tests.valley:Gauge"}
couplings:
  - {from: weather.rain, to: dams.rain}
  - {from: dams.release, to: town.river, combine: sum}
  - {from: town.demand, to: dams.demand, delay_min: 30}
  - {from: dams.level, to: meter.level}
"""

GAUGE = """
members:
  gauge: {class: "tests.valley:Gauge"}
couplings:
  - {from: dams.level, to: gauge.level, delay_min: 10}
  - {from: gauge.seep, to: town.river, delay_min: 15, combine: sum}
parameters: {gauge.share: 0.5}
"""

TWINS: dict[str, type[Twin]] = {"weather": Weather, "dams": Dams, "town": Town, "meter": Gauge}


def expected(
    joins_ns: int | None = None,
    leaves: Mapping[str, int] = NOTHING,
    heirs: Mapping[str, tuple[int, type[Twin], str]] = NOTHING,
) -> str:
    """The digest of a run that knows from its start who will come and go."""
    scenario = scenario_of(DOCUMENT)
    (measure,) = scenario.measures
    case = case_of(scenario, measure)
    sessions = {name: Session(twin(), name) for name, twin in TWINS.items()}
    for name, session in sessions.items():
        session.open(case.member_seed(name), case.parameters.get(name, {}))
    couplings = scenario.couplings_resolved()
    arrivals = []
    if joins_ns is not None:
        sessions["gauge"] = Session(Gauge(), "gauge")
        sessions["gauge"].open(case.member_seed("gauge"), {"share": 0.5}, joins_ns)
        couplings += parse_addition(GAUGE).couplings_resolved()
        arrivals.append(Arrival(("gauge",), joins_ns))
    successors = {}
    for name, (time_ns, twin, text) in heirs.items():
        heir = Session(twin(), name)
        heir.open(case.member_seed(name), case.parameters.get(name, {}))
        successors[name] = (time_ns, heir, text)
    wiring = wire({n: s.description for n, s in sessions.items()}, couplings, (), arrivals)
    reference = Reference(
        wiring, sessions, scenario.horizon_ns, leaves=leaves, heirs=successors, asked_by="Ann"
    )
    return reference.run()


class People:
    """What an operator does to one run."""

    def __init__(self, services: Services, run: str) -> None:
        self.services = services
        self.run = run

    async def add(self, document: str = GAUGE, time_ns: int | None = None) -> int:
        request = control_pb2.AddMembersRequest(
            run=self.run, document=document, time_ns=time_ns, operator="Ann"
        )
        return (await self.services.control.AddMembers(request)).time_ns

    async def remove(self, member: str, time_ns: int | None = None) -> int:
        request = control_pb2.RemoveMemberRequest(
            run=self.run, member=member, time_ns=time_ns, operator="Ann"
        )
        return (await self.services.control.RemoveMember(request)).time_ns

    async def replace(
        self,
        member: str,
        service: str,
        time_ns: int | None = None,
        patience_s: float | None = None,
    ) -> int:
        request = control_pb2.ReplaceMemberRequest(
            run=self.run, member=member, service=service, time_ns=time_ns, operator="Ann"
        )
        answer = await self.services.control.ReplaceMember(request, timeout=patience_s)
        return answer.time_ns

    async def fork(self, **changes: object) -> str:
        request = scenario_pb2.ForkRunRequest(name=self.run, **changes)  # type: ignore[arg-type]
        return (await self.services.scenarios.ForkRun(request)).run.name

    async def replay(self, *live_members: str) -> str:
        request = scenario_pb2.ReplayRunRequest(name=self.run, live_members=live_members)
        return (await self.services.scenarios.ReplayRun(request)).run.name

    async def settled(self, time_ns: int) -> None:
        """Wait until the run has passed an instant."""
        request = scenario_pb2.WatchRunRequest(name=self.run)
        async for answer in self.services.scenarios.WatchRun(request):
            if answer.run.time_ns > time_ns:
                return
        raise AssertionError("the run ended before")


def test_one_joins_one_leaves_one_is_replaced_and_then_the_broker_is_killed(
    tmp_path: Path,
) -> None:
    store = str(tmp_path / "broker.sqlite")
    digest = expected(
        4 * HOUR_NS,
        {"meter": 5 * HOUR_NS},
        {"town": (6 * HOUR_NS, Town, "town 1 goes on for town 1, with its state, as Ann asked")},
    )

    async def story() -> None:
        with process("broker", "--store", store) as (child, address):
            port = address.rpartition(":")[2]
            async with AsyncExitStack() as stay, AsyncExitStack() as old:
                twins: dict[str, type[Twin]] = {
                    "weather": Weather,
                    "dams": SteadyDams,
                    "gauge": Gauge,
                }
                await stay.enter_async_context(present(address, **twins))
                await old.enter_async_context(present(address, town=Town, meter=Gauge))
                successor, _ = stay.enter_context(
                    process("serve", "Town", "town-2", "--broker", address)
                )
                async with client(address) as services:
                    run = await eventually(lambda: services.create(DOCUMENT))
                    people = People(services, run.name)
                    assert await eventually(lambda: people.add(time_ns=4 * HOUR_NS)) == 4 * HOUR_NS
                    assert await people.remove("meter", 5 * HOUR_NS) == 5 * HOUR_NS
                    replaced = await eventually(
                        lambda: people.replace("town", "town-2", 6 * HOUR_NS)
                    )
                    assert replaced == 6 * HOUR_NS
                    await people.settled(7 * HOUR_NS)
                child.kill()
                child.wait()
                await old.aclose()
                with process("broker", "--store", store, "--port", port) as (_, again):
                    async with client(again) as services:
                        ended = await services.ended(run.name)
                        assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
                        assert ended.digest == digest
                assert successor.poll() is None
        kept = Store(store)
        ledger = [s.entry for s in kept.entries(run.name, limit=1 << 40)[0]]
        changes = [e.event.kind for e in ledger if isinstance(e, EventRecord) and e.rank == -2]
        assert changes == ["member_joined", "member_left", "member_replaced"]
        kept.close()

    bounded(story)


def waiting(gate: threading.Event) -> type[Twin]:
    """Dams that stand still until the gate is set."""
    return type("Waiting", (Dams,), {"gate_to_pass": gate})


def test_a_later_version_goes_on_afresh_and_is_shown_every_input() -> None:
    """At 3 h it was to, and whoever asked gave it up; at 6 h it does."""
    gate = threading.Event()
    text = "town 2 goes on for town 1, afresh, as Ann asked"
    digest = expected(heirs={"town": (6 * HOUR_NS, NewTown, text)})
    assert digest != expected()

    async def story() -> None:
        twins = TWINS | {"dams": waiting(gate), "new": NewTown}
        async with valley(None, **twins) as (_, services):
            run = await services.create(DOCUMENT)
            people = People(services, run.name)
            with pytest.raises(grpc.aio.AioRpcError) as given_up:
                await people.replace("town", "new", 3 * HOUR_NS, patience_s=0.3)
            assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            replacing = asyncio.create_task(people.replace("town", "new", 6 * HOUR_NS))
            gate.set()
            assert await replacing == 6 * HOUR_NS
            assert (await services.ended(run.name)).digest == digest

    bounded(story)


def test_a_member_with_neither_snapshot_nor_memory_stays_and_the_run_does_not_feel_it() -> None:
    recovering = DOCUMENT.replace(
        '{class: "tests.valley:Dams"}', '{class: "tests.valley:Dams", on_failure: recover}'
    )
    text = "dams 1 goes on for dams 1, with its state, as Ann asked"

    class Recorded(Dams):
        """As if it had a snapshot: the reference hands a state over, the broker all steps."""

        def snapshot(self) -> bytes:
            return pickle.dumps(self.__dict__)

        def restore(self, state: bytes) -> None:
            self.__dict__.update(pickle.loads(state))

    undisturbed = expected()
    TWINS["dams"] = Recorded
    try:
        handed_over = expected(heirs={"dams": (6 * HOUR_NS, Recorded, text)})
    finally:
        TWINS["dams"] = Dams

    async def story() -> None:
        async with valley(None, **TWINS | {"dams": SteadyDams, "spare": Dams}) as (_, services):
            for document, digest in ((DOCUMENT, undisturbed), (recovering, handed_over)):
                run = await services.create(document)
                people = People(services, run.name)
                replacing = people.replace("dams", "spare", 6 * HOUR_NS)
                if document is DOCUMENT:
                    assert (await refused(replacing)).reason is Reason.UNSUPPORTED
                else:
                    assert await replacing == 6 * HOUR_NS
                ended = await services.ended(run.name)
                assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
                assert ended.digest == digest

    bounded(story)


def test_what_can_not_be_is_refused_with_a_reason_and_the_run_goes_on() -> None:
    gate = threading.Event()
    digest = expected()

    async def story() -> None:
        twins = TWINS | {"dams": waiting(gate), "gauge": Gauge, "spare": Gauge}
        async with valley(None, **twins) as (_, services):
            run = await services.create(DOCUMENT)
            people = People(services, run.name)
            instant = GAUGE.replace(", delay_min: 15", "")
            foreign = GAUGE.replace("gauge.seep, to: town.river", "dams.release, to: town.river")
            joins = [
                (instant, None, Reason.LATE_WITHOUT_DELAY),
                (foreign, None, Reason.SCENARIO_INVALID),
                (GAUGE.replace("gauge.share", "gauge.size"), None, Reason.UNKNOWN_PARAMETER),
                (GAUGE.replace("combine: sum", "combine: mean"), None, Reason.AMBIGUOUS_INPUT),
                (GAUGE.replace("gauge", "meter"), None, Reason.SCENARIO_INVALID),
                (GAUGE.replace("gauge:", "ghost:"), None, Reason.UNKNOWN_MEMBER),
                (GAUGE.replace("members", "member"), None, Reason.UNKNOWN_KEY),
                (GAUGE, 99 * HOUR_NS, Reason.INSTANT_PASSED),
                (GAUGE.replace("dams.level", "weather.rain"), 0, Reason.INSTANT_PASSED),
            ]
            for document, time_ns, reason in joins:
                error = await refused(people.add(document, time_ns))
                assert error.reason is reason, error
            assert int(error.metadata["earliest_ns"]) > 0
            assert (await refused(people.remove("moon"))).reason is Reason.UNKNOWN_MEMBER
            early = await refused(people.remove("weather", 0))
            assert early.reason is Reason.INSTANT_PASSED
            other = await refused(people.replace("town", "spare"))
            assert (other.reason, other.metadata["what"]) == (
                Reason.DESCRIPTION_DIFFERS,
                "entities",
            )
            nobody = await refused(people.replace("town", "ghost"))
            assert nobody.reason is Reason.UNKNOWN_MEMBER
            gate.set()
            assert (await services.ended(run.name)).digest == digest
            for late in (people.add(), people.remove("town"), people.replace("meter", "spare")):
                assert (await refused(late)).reason is Reason.INSTANT_PASSED

    bounded(story)


def test_the_command_line_does_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    file = tmp_path / "gauge.yaml"
    file.write_text(GAUGE)

    async def story() -> None:
        twins = TWINS | {"dams": waiting(gate), "gauge": Gauge, "new": NewTown}
        async with valley(None, **twins) as (broker, services):
            run = await services.create(DOCUMENT)

            async def command(*arguments: str) -> str:
                done = await asyncio.to_thread(main, [*arguments, "--broker", broker.address])
                assert done == 0
                return capsys.readouterr().out

            assert "joined at 4 h" in await command(
                "member", "add", run.name, str(file), "--at", "4"
            )
            assert "meter leaves at 5 h" in await command(
                "member", "remove", run.name, "meter", "--at", "5"
            )
            replacing = asyncio.create_task(
                command("member", "replace", run.name, "town", "new", "--at", "6")
            )
            gate.set()
            assert "new goes on for town at 6 h" in await replacing
            ended = await services.ended(run.name)
            assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
            for again in ((), ("--live", "dams,gauge"), ("--recorded", "weather,town")):
                said = await command("replay", run.name, *again)
                assert said.strip().endswith(ended.digest)
            forked = (await command("fork", run.name, "--at", "7", "--horizon-h", "9")).strip()
            short = await services.ended(forked)
            assert (short.state, short.time_ns) == (ended.state, 9 * HOUR_NS), short.error
            arguments = ["fork", run.name, "--at", "99", "--broker", broker.address]
            assert await asyncio.to_thread(main, arguments) == 2
            assert "INSTANT_PASSED" in capsys.readouterr().err

    bounded(story)


# -- forks and replays -----------------------------------------------------------------------


def test_a_run_forked_at_any_cut_without_changes_ends_as_the_one_that_it_is_from() -> None:
    scenario = scenario_of()
    undisturbed = run_local(scenario, case_of(scenario, "plan"), planner)

    async def story() -> None:
        async with valley() as (_, services):
            run = await services.create()
            people = People(services, run.name)
            assert (await services.ended(run.name)).digest == undisturbed.digest
            for time_ns in (0, 7 * HOUR_NS + 1, 24 * HOUR_NS):
                forked = await services.ended(await people.fork(time_ns=time_ns))
                assert forked.state == scenario_pb2.Run.STATE_SUCCEEDED, forked.error
                assert forked.digest == undisturbed.digest

    bounded(story)


def test_a_live_run_is_forked_into_what_ifs_and_does_not_feel_it() -> None:
    """Another way to send crews, an order, a later end: the same past up to the cut, and then
    another future."""
    scenario = scenario_of()
    undisturbed = run_local(scenario, case_of(scenario, "plan"), planner)
    cut_ns = 3 * HOUR_NS

    class Slower(Dams):
        def advance(self, step: Step) -> None:
            time.sleep(0.005)
            super().advance(step)

    async def story() -> None:
        async with valley(dams=Slower) as (broker, services):
            run = await services.create()
            people = People(services, run.name)
            await people.settled(cut_ns)
            order = codec.encode_action(Action("dams", "gate", "upper", 0.9))
            names = {
                "as it is": await people.fork(time_ns=cut_ns),
                "nearest": await people.fork(time_ns=cut_ns, measure="nearest"),
                "none": await people.fork(time_ns=cut_ns, measure="none"),
                "gate": await people.fork(time_ns=cut_ns, actions=[order], operator="Ann"),
                "short": await people.fork(time_ns=cut_ns, horizon_ns=cut_ns + HOUR_NS),
            }
            early = await refused(people.fork(time_ns=100 * HOUR_NS))
            assert early.reason is Reason.INSTANT_PASSED
            assert (await refused(people.fork(measure="moon"))).reason is Reason.SCENARIO_INVALID
            runs = {why: await services.ended(name) for why, name in names.items()}
            assert (await services.ended(run.name)).digest == undisturbed.digest
            assert runs["as it is"].digest == undisturbed.digest
            assert runs["short"].time_ns == cut_ns + HOUR_NS
            assert len({found.digest for found in runs.values()}) == 5
            past = before(broker.store, run.name, cut_ns)
            for name in names.values():
                assert before(broker.store, name, cut_ns) == past
            fork = People(services, names["none"])
            for time_ns in (cut_ns, 5 * HOUR_NS):
                again = await services.ended(await fork.fork(time_ns=time_ns))
                assert again.digest == runs["none"].digest
            before_its_own = await refused(fork.fork(time_ns=0))
            assert before_its_own.metadata["run"] == run.name

    bounded(story)


def before(store: Store, run: str, cut_ns: int) -> list[object]:
    """The ledger of a run up to an instant."""
    whole = [s.entry for s in store.entries(run, limit=1 << 40)[0]]
    return places([entry for entry in whole if entry.time_ns <= cut_ns])


def test_a_fork_of_a_broker_that_is_killed_goes_on(tmp_path: Path) -> None:
    options = BrokerOptions(store=tmp_path / "broker.sqlite", planner=planner, grace_s=0.2)
    scenario = scenario_of()
    undisturbed = run_local(scenario, case_of(scenario, "plan"), planner)

    async def story() -> None:
        store = str(options.store)
        with process("broker", "--store", store) as (child, address):
            port = address.rpartition(":")[2]
            async with present(address, weather=Weather, dams=SteadyDams, town=Town):
                async with client(address) as services:
                    run = await eventually(services.create)
                    await People(services, run.name).settled(3 * HOUR_NS)
                    name = await People(services, run.name).fork(time_ns=2 * HOUR_NS)
                    await People(services, name).settled(4 * HOUR_NS)
                child.kill()
                child.wait()
                with process("broker", "--store", store, "--port", port) as (_, again):
                    async with client(again) as services:
                        for found in (run.name, name):
                            ended = await services.ended(found)
                            assert ended.digest == undisturbed.digest, ended.error

    bounded(story)


def test_a_run_is_gone_through_again_with_recordings_in_the_place_of_its_twins() -> None:
    async def story() -> None:
        async with valley(town=NewTown) as (_, services):
            run = await services.create()
            people = People(services, run.name)
            ended = await services.ended(run.name)
            for live in ((), ("dams",), ("town", "planner"), ("weather", "dams", "town")):
                again = await services.ended(await people.replay(*live))
                assert again.state == scenario_pb2.Run.STATE_SUCCEEDED, again.error
                assert again.digest == ended.digest
            assert (await refused(people.replay("moon"))).reason is Reason.UNKNOWN_MEMBER

    bounded(story)


def test_a_twin_that_answers_otherwise_than_its_recording_is_told_where() -> None:
    class Leaky(Dams):
        """From three hours on it loses water."""

        def advance(self, step: Step) -> None:
            super().advance(step)
            if step.time_ns >= 3 * HOUR_NS:
                step.publish("level", self.level_m - 0.25)

    async def story() -> None:
        async with (
            BrokerServer(BrokerOptions(planner=planner, grace_s=0.2)) as broker,
            present(broker.address, weather=Weather, town=Town),
            client(broker.address) as services,
        ):
            async with present(broker.address, dams=Dams):
                await broker.members_ready(VALLEY, 10)
                run = await services.create()
                await services.ended(run.name)
            async with present(broker.address, dams=Leaky):
                await broker.members_ready(VALLEY, 10)
                name = await People(services, run.name).replay("dams")
                again = await services.ended(name)
        assert again.state == scenario_pb2.Run.STATE_FAILED
        assert again.error.reason == "REPLAY_DIFFERS"
        assert "dams.level" in again.error.message
        assert f"at {3 * HOUR_NS} ns" in again.error.message

    bounded(story)
