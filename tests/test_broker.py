"""A broker runs services as one process would, says what happens, and ends what can't go on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from federation.broker.client import print_history
from federation.broker.server import BrokerOptions, BrokerServer
from federation.broker.services import SERVICES
from federation.broker.store import State, Store
from federation.core.ledger import ActionRecord, Entry, EventRecord
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.planners import planner
from federation.scenario.run import Case, PlannerFactory, run_local
from federation.scenario.spec import Scenario, parse
from federation.scenario.study import cases
from federation.twin import HOUR_NS, MINUTE_NS, Action, Twin
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    plan_pb2,
    plan_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
)
from federation.wire import codec, status
from federation.wire.enrol import keep_name
from federation.wire.link import LinkOptions
from federation.wire.serve import ServeOptions, serving
from tests.test_wire import bounded
from tests.valley import (
    SCENARIO,
    Dams,
    PoisonedDams,
    SlowDams,
    Town,
    UnsteadyDams,
    Weather,
    foreman,
)

ROOT = Path(__file__).parents[1]
SLOW: dict[str, type[Twin]] = {"weather": Weather, "dams": SlowDams, "town": Town}
VALLEY: dict[str, type[Twin]] = {"weather": Weather, "dams": Dams, "town": Town}
WITHOUT_PLANS = SCENARIO.replace("  plan: {crews: plan}\n  nearest: {crews: nearest}\n", "")

_T = TypeVar("_T")


class Gated(Dams):
    """Dams that a test lets pass; a class of its own for every test that uses it."""


def scenario_of(text: str = SCENARIO) -> Scenario:
    return parse(text, "scenario", Path(__file__).parent)


def case_of(scenario: Scenario, measure: str, seed: int = 5) -> Case:
    (case,) = cases(scenario, [measure], 1, seed)
    return case


class Services:
    """The four services of a broker, as a client sees them."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.broker: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        self.scenarios: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(
            channel
        )
        self.plans: plan_pb2_grpc.PlansAsyncStub = plan_pb2_grpc.PlansStub(channel)
        self.control: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)

    async def create(self, document: str = SCENARIO, seed: int | None = None) -> scenario_pb2.Run:
        request = scenario_pb2.CreateRunRequest(document=document, seed=seed)
        return (await self.scenarios.CreateRun(request)).run

    async def get(self, name: str) -> scenario_pb2.Run:
        return (await self.scenarios.GetRun(scenario_pb2.GetRunRequest(name=name))).run

    async def ended(self, name: str) -> scenario_pb2.Run:
        last = scenario_pb2.Run()
        async for answer in self.scenarios.WatchRun(scenario_pb2.WatchRunRequest(name=name)):
            last = answer.run
        return last

    async def submit(
        self, run: str, entity: str, value: float, actuator: str = "gate", member: str = "dams"
    ) -> control_pb2.SubmitActionResponse:
        action = codec.encode_action(Action(member, actuator, entity, value))
        return await self.control.SubmitAction(
            control_pb2.SubmitActionRequest(run=run, action=action, operator="Ann")
        )

    def watch(
        self, run: str, cursor: str = "", **only: Sequence[str]
    ) -> AsyncIterator[broker_pb2.WatchResponse]:
        request = broker_pb2.WatchRequest(run=run, cursor=cursor, **only)
        return aiter(self.broker.Watch(request))


@asynccontextmanager
async def client(address: str) -> AsyncIterator[Services]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Services(channel)


@asynccontextmanager
async def present(address: str, **twins: type[Twin]) -> AsyncIterator[dict[str, str]]:
    """Twins that are served in this process, registered at the broker; gives their addresses."""
    async with AsyncExitStack() as stack:
        found = {}
        for name, twin in twins.items():
            at, description = await stack.enter_async_context(serving(twin, name, SERVED))
            stay = asyncio.create_task(keep_name(address, name, at, description, lambda _: None))
            stack.push_async_callback(_gone, stay)
            found[name] = at
        yield found


SERVED = ServeOptions(grace_s=0.1)


async def _gone(stay: asyncio.Task[None]) -> None:
    stay.cancel()
    with suppress(asyncio.CancelledError):
        await stay


@asynccontextmanager
async def valley(
    options: BrokerOptions | None = None, **twins: type[Twin]
) -> AsyncIterator[tuple[BrokerServer, Services]]:
    """A broker with the valley's twins, some of them replaced."""
    options = options or BrokerOptions(planner=planner, grace_s=0.2)
    async with (
        BrokerServer(options) as broker,
        present(broker.address, **{**VALLEY, **twins}),
        client(broker.address) as services,
    ):
        await broker.members_ready({**VALLEY, **twins}, 10)
        yield broker, services


async def refused(call: Awaitable[object]) -> FederationError:
    """The error that a call carries in its rich status."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is not grpc.StatusCode.UNKNOWN
    return status.from_rpc(caught.value, "the broker")


async def collect(answers: AsyncIterator[broker_pb2.WatchResponse]) -> list[Entry]:
    return [codec.decode_entry(e) async for answer in answers for e in answer.entries]


def places(entries: Sequence[Entry]) -> list[object]:
    return [(entry.owner, *entry.sort_key()) for entry in entries]


# -- the same as in one process ------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "factory"),
    [("plan", planner), ("nearest", planner), ("none", planner), ("plan", foreman)],
)
def test_a_run_over_sockets_gives_what_a_run_in_process_gives(
    measure: str, factory: PlannerFactory
) -> None:
    scenario = scenario_of()
    case = case_of(scenario, measure)
    local = run_local(scenario, case, factory, keep_ledger=True)

    async def story() -> None:
        async with valley(dams=UnsteadyDams) as (broker, _):
            settled: list[int] = []
            live = await broker.run(
                scenario, case, factory, keep_ledger=True, on_commit=settled.append
            )
            assert (live.digest, live.kpis) == (local.digest, local.kpis)
            assert places(live.ledger) == places(local.ledger)
            assert (live.events, live.actions) == (local.events, local.actions)
            assert settled == sorted(settled)
            assert settled[-1] == scenario.horizon_ns + 1
            steps = {name: cost.steps for name, cost in local.costs.items()}
            assert {name: cost.steps for name, cost in live.costs.items()} == steps
            assert all(live.costs[name].cpu_s == 0.0 for name in VALLEY)

    assert local.digest
    bounded(story)


def test_runs_that_share_their_twins_do_not_feel_each_other() -> None:
    scenario = scenario_of()
    todo = [case_of(scenario, measure, seed) for seed in (5, 6) for measure in ("plan", "none")]
    expected = [run_local(scenario, case, planner).digest for case in todo]

    async def story() -> None:
        async with valley(dams=UnsteadyDams, town=Town) as (broker, services):
            outcomes = await asyncio.gather(*(broker.run(scenario, c, planner) for c in todo))
            assert [outcome.digest for outcome in outcomes] == expected
            listed = await services.scenarios.ListRuns(scenario_pb2.ListRunsRequest(page_size=3))
            assert [run.state for run in listed.runs] == [scenario_pb2.Run.STATE_SUCCEEDED] * 3
            rest = await services.scenarios.ListRuns(
                scenario_pb2.ListRunsRequest(page_token=listed.next_page_token)
            )
            assert len(rest.runs) == 1
            assert not rest.next_page_token
            found = {run.digest for run in (*listed.runs, *rest.runs)}
            assert found == set(expected)

    bounded(story)


def test_a_run_on_request_has_the_documents_first_measure_and_its_figures() -> None:
    scenario = scenario_of()
    local = run_local(scenario, case_of(scenario, "plan", 11), planner)

    async def story() -> None:
        async with valley() as (_, services):
            made = await services.create(seed=11)
            assert re.fullmatch(r"runs/wet-valley-\d+", made.name)
            run = await services.ended(made.name)
            assert run.state == scenario_pb2.Run.STATE_SUCCEEDED
            assert (run.digest, run.seed) == (local.digest, 11)
            assert run.time_ns == run.horizon_ns == scenario.horizon_ns
            assert {kpi.name: kpi.value for kpi in run.kpis} == local.kpis
            assert [(k.member, k.unit) for k in run.kpis] == [("dams", "m^3"), ("town", "h")]
            assert run.create_time.ToNanoseconds() < run.end_time.ToNanoseconds()
            assert await services.get(made.name) == run

    bounded(story)


# -- watching ------------------------------------------------------------------------------


def test_who_watches_sees_what_holds_and_then_every_change() -> None:
    gate = threading.Event()
    twin = type("Waiting", (Gated,), {"gate_to_pass": gate})

    async def story() -> None:
        async with valley(dams=twin) as (broker, services):
            run = await services.create()
            answers = services.watch(run.name)
            opening = await anext(answers)
            assert opening.snapshot
            assert not opening.entries
            gate.set()
            rest = [answer async for answer in answers]
            assert not any(answer.snapshot for answer in rest)
            changes = [codec.decode_entry(e) for answer in rest for e in answer.entries]
            whole, _, known = broker.store.entries(run.name, limit=1 << 40)
            assert places(changes) == places([stored.entry for stored in whole])
            assert len(whole) == known.entries > 500
            times = [answer.time_ns for answer in rest]
            assert times == sorted(times)
            assert times[-1] == run.horizon_ns
            assert all(e.receive_time.ToNanoseconds() > 0 for a in rest for e in a.entries)
            for answer, following in pairwise(rest):
                assert all(e.time_ns > answer.time_ns for e in following.entries)

            (late,) = [answer async for answer in services.watch(run.name)]
            assert late.snapshot
            latest = broker.store.latest(run.name)
            held = {
                (e.member, e.value.values.variable): e.value.values.values
                for e in late.entries
                if e.HasField("value")
            }
            assert held == {key: r.value.tobytes() for key, r in latest.items()}
            told = [e.occurrence.event.id for e in late.entries if e.HasField("occurrence")]
            happened = [s.entry.event.id for s in whole if isinstance(s.entry, EventRecord)]
            assert told == happened
            only = await collect(services.watch(run.name, members=["dams"], variables=["spilled"]))
            assert {e.owner for e in only} == {"dams"}
            assert {getattr(e, "variable", "spilled") for e in only} == {"spilled"}

    bounded(story)


def test_a_reader_goes_on_after_the_broker_was_started_again(tmp_path: Path) -> None:
    """LEVEL45 6."""
    options = BrokerOptions(store=tmp_path / "broker.sqlite", planner=planner, grace_s=0.2)

    async def story() -> None:
        seen: list[Entry] = []
        cursors: list[tuple[str, int]] = []
        async with valley(options, dams=SlowDams) as (broker, services):
            run = await services.create()
            epoch, lease_epoch = broker.epoch, broker.registry.last_epoch
            async for answer in services.watch(run.name):
                seen += [codec.decode_entry(entry) for entry in answer.entries]
                cursors.append((answer.cursor, len(seen)))
                if len(seen) > 60:
                    break
            foreign = cursors[-1][0].replace(run.name, "runs/another-1")
        async with valley(options) as (broker, services):
            assert broker.epoch == epoch + 1
            assert min(lease.epoch for lease in broker.registry.members(0)) > lease_epoch
            after = await services.get(run.name)
            assert after.state == scenario_pb2.Run.STATE_CANCELLED
            whole = [s.entry for s in broker.store.entries(run.name, limit=1 << 40)[0]]
            assert len(whole) >= len(seen)
            for cursor, count in cursors:
                rest = [answer async for answer in services.watch(run.name, cursor)]
                assert not any(answer.snapshot for answer in rest)
                later = [codec.decode_entry(e) for a in rest for e in a.entries]
                assert places(seen[:count] + later) == places(whole)
            for unknown in (foreign, "nonsense", f"{cursors[-1][0]}999999"):
                first = await anext(services.watch(run.name, unknown))
                assert first.snapshot
            again = await broker.run(scenario_of(), case_of(scenario_of(), "none"), planner)
            assert again.digest

    bounded(story)


def test_a_run_of_a_broker_that_is_killed_continues_and_ends_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    store = str(tmp_path / "broker.sqlite")
    scenario = scenario_of()
    undisturbed = run_local(scenario, case_of(scenario, "plan"), planner)

    async def story() -> None:
        with process("broker", "--store", store) as (child, address):
            port = address.rpartition(":")[2]
            async with present(address, **SLOW):
                async with client(address) as services:
                    run = await eventually(services.create)
                    seen: list[Entry] = []
                    async for answer in services.watch(run.name):
                        seen += [codec.decode_entry(entry) for entry in answer.entries]
                        cursor = answer.cursor
                        if len(seen) > 30:
                            break
                child.kill()
                child.wait()
                with process("broker", "--store", store, "--port", port) as (_, again):
                    assert again == address
                    async with client(again) as services:
                        ended = await services.ended(run.name)
                        assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
                        assert ended.digest == undisturbed.digest
                        rest = await collect(services.watch(run.name, cursor))
                        assert rest
                        fresh = await eventually(services.create)
                        assert fresh.name != run.name
                        left = await services.scenarios.CancelRun(
                            scenario_pb2.CancelRunRequest(name=fresh.name)
                        )
                        assert left.run.state == scenario_pb2.Run.STATE_CANCELLED
        kept = Store(store)
        ledger = [s.entry for s in kept.entries(run.name, limit=1 << 40)[0]]
        assert places(ledger)[: len(seen)] == places(seen)
        assert places(ledger)[len(seen) :] == places(rest)

    bounded(story)


async def eventually(call: Callable[[], Awaitable[_T]]) -> _T:
    """The answer, once the members are back."""
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if status.from_rpc(error, "broker").reason is not Reason.UNKNOWN_MEMBER:
                raise
        await asyncio.sleep(0.1)


# -- what can't go on ends -------------------------------------------------------------------


def test_a_twin_that_is_killed_ends_the_run_with_its_name() -> None:
    class Watched(Town):
        closed = 0

        def close(self) -> None:
            type(self).closed += 1

    async def story() -> None:
        async with (
            BrokerServer(BrokerOptions(planner=planner, grace_s=0.2)) as broker,
            present(broker.address, weather=Weather, town=Watched),
            client(broker.address) as services,
        ):
            with process("serve", "DyingDams", "dams", "--broker", broker.address) as (child, _):
                await broker.members_ready(VALLEY, 20)
                run = await services.create()
                ended = await services.ended(run.name)
                assert ended.state == scenario_pb2.Run.STATE_FAILED
                assert ended.error.reason == "MEMBER_LOST"
                assert ended.error.metadata["member"] == "dams"
                assert await asyncio.to_thread(child.wait, 10) == 9
                assert Watched.closed == 1
                (answer,) = [a async for a in services.watch(run.name)]
                assert answer.time_ns < run.horizon_ns
                late = await refused(services.submit(run.name, "upper", 0.5))
                assert late.reason is Reason.OUTSIDE_ENVELOPE

    bounded(story)


def test_a_value_that_is_no_number_ends_the_run_and_names_the_variable() -> None:
    async def story() -> None:
        async with valley(dams=PoisonedDams) as (broker, services):
            scenario = scenario_of()
            with pytest.raises(TwinError, match=r"dams.level\[1\] is nan") as caught:
                await broker.run(scenario, case_of(scenario, "plan"), planner)
            assert caught.value.reason is Reason.NOT_FINITE
            (run,) = (await services.scenarios.ListRuns(scenario_pb2.ListRunsRequest())).runs
            assert run.state == scenario_pb2.Run.STATE_FAILED
            assert run.error.metadata == {"member": "dams", "variable": "level", "index": "1"}

    bounded(story)


def test_a_store_that_can_not_keep_a_run_ends_it_and_readers_are_told() -> None:
    gate = threading.Event()
    twin = type("Waiting", (Gated,), {"gate_to_pass": gate})

    async def story() -> None:
        async with valley(dams=twin) as (broker, services):
            run = await services.create()
            watching = asyncio.create_task(collect(services.watch(run.name)))
            (pages,) = broker.store._db.execute("PRAGMA page_count").fetchone()
            broker.store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
            gate.set()
            ended = await services.ended(run.name)
            assert ended.state == scenario_pb2.Run.STATE_FAILED
            assert "can't be written: database or disk is full" in ended.error.message
            assert len(await watching) == broker.store.run(run.name).entries

    bounded(story)


def test_the_past_of_a_variable_can_be_asked_for_whole_and_in_buckets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scenario = scenario_of()
    case = case_of(scenario, "plan")
    known = [
        r
        for r in run_local(scenario, case, planner, keep_ledger=True).ledger
        if (r.owner, r.variable) == ("dams", "release")
    ]

    async def story() -> None:
        async with valley() as (broker, services):
            run = await services.create()
            await services.ended(run.name)

            async def ask(**said: object) -> broker_pb2.QueryHistoryResponse:
                request = broker_pb2.QueryHistoryRequest(
                    run=run.name, member="dams", variable="release"
                )
                for name, value in said.items():
                    setattr(request, name, value)
                return await services.broker.QueryHistory(request)

            whole = [codec.decode_entry(entry) for entry in (await ask()).entries]
            assert places(whole) == places(known)
            later = await ask(start_ns=6 * HOUR_NS, end_ns=9 * HOUR_NS)
            asked = [r for r in known if 6 * HOUR_NS <= r.time_ns <= 9 * HOUR_NS]
            assert places([codec.decode_entry(e) for e in later.entries]) == places(asked)
            buckets = (await ask(buckets=8, entity=0)).buckets
            assert sum(bucket.count for bucket in buckets) == len(known)
            highest = max(codec.decode_vector(bucket.high, "high")[0] for bucket in buckets)
            assert highest == max(record.value[0] for record in known)
            for wrong, reason in (
                ({"variable": "relief"}, Reason.UNKNOWN_VARIABLE),
                ({"entity": 99, "buckets": 4}, Reason.UNKNOWN_ENTITY),
                ({"start_ns": 5, "end_ns": 4}, Reason.SCENARIO_INVALID),
                ({"run": "runs/none"}, Reason.RUN_NOT_FOUND),
            ):
                assert (await refused(ask(**wrong))).reason is reason
            await print_history(broker.address, run.name, "dams.release", 6, 9, 0, None)
            printed = capsys.readouterr().out.splitlines()
            assert len(printed) == 1 + sum(record.value.size for record in asked)

    bounded(story)


def test_a_broker_whose_store_was_taken_over_lets_its_runs_go(tmp_path: Path) -> None:
    store = tmp_path / "broker.sqlite"

    class Watched(SlowDams):
        closed = 0

        def close(self) -> None:
            type(self).closed += 1

    async def story() -> None:
        async with valley(
            BrokerOptions(store=store, planner=planner, grace_s=0.2), dams=Watched
        ) as (broker, services):
            run = await services.create()
            async with BrokerServer(BrokerOptions(store=store, continues=False)) as heir:
                assert (heir.epoch, heir.given_up) == (broker.epoch + 1, 1)
                ended = await services.ended(run.name)
                assert ended.state == scenario_pb2.Run.STATE_FAILED
                while not Watched.closed:
                    await asyncio.sleep(0.01)
                error = await refused(services.create())
                assert error.reason is Reason.STALE_EPOCH
                assert heir.store.run(run.name).state is State.FAILED

    bounded(story)


def test_a_member_that_gave_its_name_up_may_not_be_heard_any_more() -> None:
    async def story() -> None:
        options = BrokerOptions(planner=planner, lease_ttl_s=0.5, grace_s=0.2)
        async with (
            BrokerServer(options) as broker,
            present(broker.address, weather=Weather, town=Town),
            client(broker.address) as services,
            serving(SlowDams, "dams", SERVED) as (at, description),
        ):
            stay = asyncio.create_task(
                keep_name(broker.address, "dams", at, description, lambda _: None)
            )
            await broker.members_ready(VALLEY, 10)
            run = await services.create()
            await _gone(stay)
            ended = await services.ended(run.name)
            assert (ended.error.reason, ended.error.metadata["member"]) == ("MEMBER_LOST", "dams")
            assert "its lease has ended" in ended.error.message

    bounded(story)


def test_a_scenario_whose_members_are_not_there_is_refused_at_once() -> None:
    options = BrokerOptions(planner=planner, grace_s=0.2, link=LinkOptions(connect_timeout_s=0.5))

    async def story() -> None:
        async with (
            BrokerServer(options) as broker,
            present(broker.address, weather=Weather, town=Town) as at,
            client(broker.address) as services,
        ):
            await broker.members_ready(["weather", "town"], 10)
            unknown = await refused(services.create())
            assert unknown.reason is Reason.UNKNOWN_MEMBER
            assert unknown.metadata == {"member": "dams"}
            assert "registered: town, weather" in unknown.message
            with pytest.raises(ScenarioError, match="no twin is registered as dams"):
                await broker.members_ready(VALLEY, 0.1)
            nobody = SCENARIO.replace('{class: "tests.valley:Dams"}', "{address: 127.0.0.1:9}")
            deaf = await refused(services.create(nobody))
            assert deaf.reason is Reason.UNREACHABLE
            assert deaf.metadata["member"] == "dams"
            swapped = SCENARIO.replace(
                '{class: "tests.valley:Dams"}', "{address: " + at["town"] + "}"
            )
            wrong = await refused(services.create(swapped))
            assert wrong.reason is Reason.UNKNOWN_VARIABLE
            listed = await services.scenarios.ListRuns(scenario_pb2.ListRunsRequest())
            assert not listed.runs

    bounded(story)


@pytest.mark.parametrize(
    ("old", "new", "reason", "said"),
    [
        (
            "seed: 5\nhorizon_h",
            "seed: 5\nhorizonh",
            Reason.UNKNOWN_KEY,
            "line 5: unknown key 'horizonh'",
        ),
        ("name: Wet", "name: [Wet", Reason.SCENARIO_INVALID, "line"),
        ("weather.wetness", "weather.wet", Reason.UNKNOWN_PARAMETER, "no parameter 'wet'"),
        (
            "to: dams.rain}",
            "to: dams.rain, map: {file: ../pyproject.toml, source: a, target: b}}",
            Reason.SCENARIO_INVALID,
            "outside the folder",
        ),
        (
            "to: dams.rain}",
            "to: dams.rain, map: {file: nowhere.csv, source: a, target: b}}",
            Reason.MISSING_FILE,
            "nowhere.csv is not there",
        ),
    ],
)
def test_a_wrong_document_is_told_what_is_wrong(
    old: str, new: str, reason: Reason, said: str
) -> None:
    options = BrokerOptions(planner=planner, scenario_folder=ROOT / "tests", grace_s=0.2)

    async def story() -> None:
        async with valley(options) as (_, services):
            error = await refused(services.create(SCENARIO.replace(old, new)))
            assert error.reason is reason
            assert said in error.message

    bounded(story)


def test_a_broker_without_a_folder_reads_no_file_for_anybody() -> None:
    document = SCENARIO.replace(
        "to: dams.rain}", "to: dams.rain, map: {file: /etc/hostname, source: a, target: b}}"
    )

    async def story() -> None:
        async with valley() as (_, services):
            error = await refused(services.create(document))
            assert error.reason is Reason.MISSING_FILE
            assert "was given no folder" in error.message

    bounded(story)


def test_what_nobody_knows_is_not_found() -> None:
    async def story() -> None:
        async with BrokerServer() as broker, client(broker.address) as services:
            name = "runs/none-1"
            stop = control_pb2.StopRunRequest(run=name, operator="Ann")
            for call in (
                services.get(name),
                services.ended(name),
                services.submit(name, "upper", 0.5),
                services.control.StopRun(stop),
                services.scenarios.CancelRun(scenario_pb2.CancelRunRequest(name=name)),
                services.plans.ListPlans(plan_pb2.ListPlansRequest(run=name)),
                collect(services.watch(name)),
            ):
                assert (await refused(call)).reason is Reason.RUN_NOT_FOUND
            page = scenario_pb2.ListRunsRequest(page_token="last Tuesday")
            error = await refused(services.scenarios.ListRuns(page))
            assert error.reason is Reason.SCENARIO_INVALID

    bounded(story)


def test_a_name_that_is_held_is_refused_to_others() -> None:
    async def story() -> None:
        async with valley() as (_, services):
            request = broker_pb2.RegisterRequest(
                name="dams", address="127.0.0.1:9", incarnation="another"
            )
            error = await refused(services.broker.Register(request))
            assert error.reason is Reason.NAME_LEASED
            assert error.metadata["name"] == "dams"
            listed = await services.broker.ListMembers(broker_pb2.ListMembersRequest())
            assert [member.name for member in listed.members] == sorted(VALLEY)

    bounded(story)


# -- what people may do ----------------------------------------------------------------------


def test_an_operator_moves_a_gate_and_is_named_as_the_cause() -> None:
    gate = threading.Event()
    twin = type("Waiting", (Gated,), {"gate_to_pass": gate})

    async def story() -> None:
        async with valley(dams=twin) as (broker, services):
            run = (await services.create(WITHOUT_PLANS)).name
            for arguments, reason in (
                (("upper", 1.5), Reason.OUTSIDE_ENVELOPE),
                (("upper", float("nan")), Reason.OUTSIDE_ENVELOPE),
                (("middle", 0.5), Reason.UNKNOWN_ENTITY),
                (("upper", 0.5, "door"), Reason.UNKNOWN_VARIABLE),
                (("upper", 0.5, "gate", "moon"), Reason.UNKNOWN_MEMBER),
            ):
                error = await refused(services.submit(run, *arguments))
                assert error.reason is reason
            action = codec.encode_action(Action("dams", "gate", "upper", 0.5))
            nobody = control_pb2.SubmitActionRequest(run=run, action=action)
            error = await refused(services.control.SubmitAction(nobody))
            assert error.reason is Reason.SCENARIO_INVALID
            taken = await services.submit(run, "upper", 0.75)
            gate.set()
            assert (await services.ended(run)).state == scenario_pb2.Run.STATE_SUCCEEDED
            story = [s.entry for s in broker.store.entries(run, limit=1 << 40)[0]]
            events = {e.event.id: e for e in story if isinstance(e, EventRecord)}
            order = events[taken.event]
            assert (order.event.kind, order.event.time_ns) == ("operator_order", taken.time_ns)
            assert "Ann sets dams.gate[upper] to 0.75" in order.event.text
            (moved,) = (e for e in events.values() if e.event.kind == "gate_moved")
            assert moved.event.causes == (taken.event,)
            assert dict(moved.via) == {taken.event: "operator => dams.gate"}
            (sent,) = (e for e in story if isinstance(e, ActionRecord) and e.owner == "operator")
            assert (sent.action.value, sent.refusal) == (0.75, "")

    bounded(story)


def test_somebody_ends_a_run_and_nothing_stays_behind() -> None:
    class Watched(SlowDams):
        closed = 0

        def close(self) -> None:
            type(self).closed += 1

    async def story() -> None:
        options = BrokerOptions(planner=planner, parallel_runs=1, grace_s=0.2)
        async with valley(options, dams=Watched) as (broker, services):
            first, second, third = [(await services.create(WITHOUT_PLANS)).name for _ in range(3)]
            watching = asyncio.create_task(collect(services.watch(first)))
            following = asyncio.create_task(services.ended(third))
            async for answer in services.scenarios.WatchRun(
                scenario_pb2.WatchRunRequest(name=first)
            ):
                if answer.run.time_ns > 10 * MINUTE_NS:
                    break
            assert (await services.get(second)).state == scenario_pb2.Run.STATE_PENDING
            cancelled = await services.scenarios.CancelRun(
                scenario_pb2.CancelRunRequest(name=second)
            )
            assert cancelled.run.state == scenario_pb2.Run.STATE_CANCELLED
            stopped = await services.control.StopRun(
                control_pb2.StopRunRequest(run=first, operator="Ann", reason="enough")
            )
            assert stopped.run.state == scenario_pb2.Run.STATE_CANCELLED
            assert Watched.closed == 1
            record = broker.store.run(first)
            assert (record.ended_by, record.ended_because) == ("Ann", "enough")
            assert len(await watching) == record.entries > 0
            again = await services.scenarios.CancelRun(scenario_pb2.CancelRunRequest(name=first))
            assert again.run == stopped.run
            while (await services.get(third)).state != scenario_pb2.Run.STATE_RUNNING:
                await asyncio.sleep(0.01)
            await services.scenarios.CancelRun(scenario_pb2.CancelRunRequest(name=third))
            assert (await following).state == scenario_pb2.Run.STATE_CANCELLED

    bounded(story)


def test_whoever_waits_for_a_run_may_give_it_up() -> None:
    async def story() -> None:
        async with valley(dams=SlowDams) as (broker, _):
            scenario = scenario_of()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await broker.run(scenario, case_of(scenario, "none"), planner)
            assert broker.store.runs()[0][0].state is State.CANCELLED

    bounded(story)


def test_the_plans_of_a_run_say_who_was_sent_and_when() -> None:
    scenario = scenario_of()
    case = case_of(scenario, "plan")
    local = run_local(scenario, case, foreman)
    made = [r.event.time_ns for r in local.events if r.event.kind == "plan_made"]

    async def story() -> None:
        async with valley() as (broker, services):
            await broker.run(scenario, case, foreman)
            name = broker.store.runs()[0][0].name
            plans: list[plan_pb2.Plan] = []
            token = ""
            while True:
                page = await services.plans.ListPlans(
                    plan_pb2.ListPlansRequest(run=name, page_size=2, page_token=token)
                )
                assert len(page.plans) <= 2
                plans += page.plans
                token = page.next_page_token
                if not token:
                    break
            assert [plan.time_ns for plan in plans] == made[::-1]
            assert [plan.name for plan in plans] == [
                f"{name}/plans/{number}" for number in range(len(made), 0, -1)
            ]
            sent = [(a.member, a.component) for plan in plans[::-1] for a in plan.assignments]
            assert sent == [(a.action.member, a.action.entity) for a in local.actions]
            for plan in plans:
                assert plan.termination == plan_pb2.Plan.TERMINATION_TIME_LIMIT
                assert not plan.HasField("objective")
                for assignment in plan.assignments:
                    assert assignment.crews == 1
                    assert assignment.start_ns >= plan.time_ns + 5 * MINUTE_NS
                    assert assignment.end_ns == 0 or assignment.end_ns > assignment.start_ns
            assert any(a.end_ns for plan in plans for a in plan.assignments)

    assert len(made) == 9
    bounded(story)


# -- the process ------------------------------------------------------------------------------


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A twin or a broker of the valley in a process of its own; gives it and its address."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.valley", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    ) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            found = re.search(r"^(?:serving \S+|broker) at (\S+) \(pid \d+\)$", line)
            if not found:
                child.kill()
            assert found, line + child.stderr.read()
            yield child, found[1]
        finally:
            child.kill()


def test_everything_that_is_served_can_be_asked_for() -> None:
    async def story() -> None:
        async with (
            BrokerServer() as broker,
            grpc.aio.insecure_channel(broker.address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", *SERVICES):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            mirror = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = mirror.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            (answer,) = [a async for a in call]
            names = {service.name for service in answer.list_services_response.service}
            assert names == {
                "federation.v1.Broker",
                "federation.v1.Scenarios",
                "federation.v1.Plans",
                "federation.v1.Control",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            port = int(broker.address.rpartition(":")[2])
            with pytest.raises(ScenarioError, match="PORT_IN_USE"):
                async with BrokerServer(BrokerOptions(port=port)):
                    pass

    bounded(story)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_broker_that_is_told_to_end_ends_its_runs_first(
    number: signal.Signals, tmp_path: Path
) -> None:
    store = tmp_path / "broker.sqlite"

    async def story() -> None:
        with process("broker", "--store", str(store)) as (child, address):
            async with (
                present(address, **SLOW),
                client(address) as services,
            ):
                run = await eventually(services.create)
                answers = services.watch(run.name)
                await anext(answers)
                child.send_signal(number)
                async for _ in answers:
                    pass
                assert await asyncio.to_thread(child.wait, 10) == 0
                assert child.stderr is not None
                assert child.stderr.read() == ""
        async with BrokerServer(BrokerOptions(store=store)) as broker:
            assert broker.store.run(run.name).state is State.CANCELLED

    bounded(story)


def test_one_trace_follows_a_run_into_the_processes_of_its_twins(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    traced = {"MULTITWIN_TRACE_FILE": str(file)}

    async def story() -> None:
        with process("broker", **traced) as (broker, address):
            with process("serve", "Dams", "dams", "--broker", address, **traced) as (dams, _):
                async with (
                    present(address, weather=Weather, town=Town),
                    client(address) as services,
                ):
                    run = await eventually(services.create)
                    ended = await services.ended(run.name)
                    assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED
                dams.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(dams.wait, 10) == 0
            broker.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(broker.wait, 10) == 0

    bounded(story)
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    by_name: dict[str, list[dict[str, dict[str, str]]]] = {}
    for span in spans:
        service = span["resource"]["attributes"]["service.name"]
        by_name.setdefault(f"{service} {span['name']}", []).append(span)
    (root,) = by_name["broker run"]
    trace = root["context"]["trace_id"]
    path = root["attributes"]
    assert float(path["multitwin.critical_path.member.dams_s"]) > 0
    assert path["multitwin.critical_path.longest"]
    grants = {s["context"]["span_id"]: s for s in by_name["broker grant"]}
    assert {s["context"]["trace_id"] for s in grants.values()} == {trace}
    assert {s["attributes"]["member"] for s in grants.values()} == {*VALLEY, "planner"}
    steps = by_name["dams twin.advance"]
    assert {s["context"]["trace_id"] for s in steps} == {trace}
    assert {grants[str(s["parent_id"])]["attributes"]["member"] for s in steps} == {"dams"}
    pids = {s["resource"]["attributes"]["process.pid"] for s in (root, *steps)}  # type: ignore[index]
    assert len(pids) == 2
