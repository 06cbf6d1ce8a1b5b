"""Nothing waits in silence: who waits for whom is told, and a run keeps to the wall clock."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from federation.__main__ import main
from federation.broker import home, live, shell
from federation.broker.client import print_why
from federation.broker.pace import Pacer
from federation.broker.server import BrokerOptions, BrokerServer
from federation.broker.store import Store
from federation.broker.why import words
from federation.core.ledger import EventRecord, Quality, Record
from federation.errors import Reason, ScenarioError, TwinError
from federation.planners import planner
from federation.scenario.run import Outcome, run_local
from federation.scenario.spec import Pace, parse
from federation.twin import HOUR_NS, MINUTE_NS, Step, Twin
from federation.v1 import broker_pb2, control_pb2, scenario_pb2
from federation.wire.link import Link
from federation.wire.serve import serving
from tests.test_broker import (
    SERVED,
    VALLEY,
    WITHOUT_PLANS,
    Services,
    case_of,
    client,
    present,
    refused,
    scenario_of,
    valley,
)
from tests.test_wire import ROOT, bounded, process
from tests.valley import SCENARIO, Dams, Foreman, Town, Weather, foreman

MEMBER = control_pb2.MemberWait


async def why(services: Services, run: str) -> control_pb2.WhyResponse:
    return await services.control.Why(control_pb2.WhyRequest(run=run), timeout=5)


async def when(services: Services, run: str, member: str, state: int) -> control_pb2.WhyResponse:
    """What a run waits for as soon as a member is in this state."""
    while True:
        found = await why(services, run)
        if any(m.member == member and m.state == state for m in found.members):
            return found
        await asyncio.sleep(0.01)


def gated(after_ns: int) -> tuple[type[Twin], threading.Event, threading.Event]:
    """Dams that wait for a gate in each step from an instant on; the second event says so."""
    gate, reached = threading.Event(), threading.Event()

    class GatedLater(Dams):
        def advance(self, step: Step) -> None:
            if step.time_ns >= after_ns:
                reached.set()
                assert gate.wait(20)
            super().advance(step)

    return GatedLater, gate, reached


# -- who waits for whom ----------------------------------------------------------------------


def test_a_run_says_who_holds_back_whom_since_when_and_by_when_that_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dams, gate, _ = gated(3 * HOUR_NS)

    async def story() -> None:
        async with valley(dams=dams) as (broker, services):
            run = await services.create()
            while True:
                found = await why(services, run.name)
                states = {m.member: m for m in found.members}
                if set(states) == {"dams", "town", "planner"} and (
                    states["planner"].by == "town" and states["dams"].time_ns == 3 * HOUR_NS
                ):
                    break
                await asyncio.sleep(0.01)
            assert found.run.state == scenario_pb2.Run.STATE_RUNNING
            assert not found.HasField("wait")
            at_work, waits = states["dams"], states["town"]
            assert at_work.state == MEMBER.STATE_WORKING
            assert 0 <= at_work.elapsed_duration.ToNanoseconds() < 20e9
            left_s = at_work.remaining_duration.ToNanoseconds() / 1e9
            assert 100 < left_s <= broker.options.link.answer_timeout_s
            assert at_work.time_ns == 3 * HOUR_NS
            assert waits.state == MEMBER.STATE_HELD_BACK
            assert (waits.by, waits.coupling) == ("dams", "dams.release -> town.river")
            assert waits.by_ns <= waits.time_ns
            assert waits.remaining_duration == at_work.remaining_duration
            await print_why(broker.address, run.name)
            told = capsys.readouterr().out
            assert told.startswith(f"{run.name} (Wet valley): running, settled up to ")
            assert "because planner waits to step at 3 h for town" in told
            assert "through dams.release -> town.river; dams works on its steps from 3 h" in told
            assert "deadline in 1" in told.splitlines()[-1]
            gate.set()
            assert (await services.ended(run.name)).state == scenario_pb2.Run.STATE_SUCCEEDED
            ended = await why(services, run.name)
            assert not ended.members
            assert "has ended: succeeded, at 1 d" in words(ended)
            assert "dams held back town" in words(ended)
            unknown = await refused(why(services, "runs/nobody-1"))
            assert unknown.reason is Reason.RUN_NOT_FOUND

    bounded(story)


def test_a_run_says_that_it_waits_for_its_turn_and_does_not_wait_for_ever() -> None:
    dams, gate, _ = gated(HOUR_NS)
    options = BrokerOptions(planner=planner, grace_s=0.2, parallel_runs=1, turn_within_s=0.5)

    async def story() -> None:
        async with valley(options, dams=dams) as (_, services):
            first = await services.create()
            second = await services.create()
            found = await why(services, second.name)
            assert found.wait.cause == "its turn, after other runs"
            assert 0 < found.wait.remaining_duration.ToNanoseconds() <= 5e8
            assert "it waits for its turn" in words(found)
            ended = await services.ended(second.name)
            assert (ended.state, ended.error.reason) == (
                scenario_pb2.Run.STATE_FAILED,
                "NO_TURN",
            )
            gate.set()
            assert (await services.ended(first.name)).state == scenario_pb2.Run.STATE_SUCCEEDED

    bounded(story)


def test_a_member_that_is_brought_back_says_since_when_and_why_it_was_lost() -> None:
    dams, gate, reached = gated(3 * HOUR_NS)
    document = SCENARIO.replace(
        'dams: {class: "tests.valley:Dams"}',
        'dams: {class: "tests.valley:Dams", on_failure: {do: recover, back_within_s: 30}}',
    )
    options = BrokerOptions(planner=planner, grace_s=0.2)
    scenario = scenario_of(document)
    undisturbed = run_local(scenario, case_of(scenario, "plan"), planner)

    async def story() -> None:
        async with (
            BrokerServer(options) as broker,
            present(broker.address, weather=Weather, town=Town),
            client(broker.address) as services,
        ):
            async with AsyncExitStack() as first:
                await first.enter_async_context(present(broker.address, dams=dams))
                await broker.members_ready(VALLEY, 10)
                run = await services.create(document)
                await asyncio.to_thread(reached.wait, 20)
                broker._live[run.name].lose("dams", "a test said so")
                found = await when(services, run.name, "dams", MEMBER.STATE_RECOVERING)
                (dam,) = (m for m in found.members if m.member == "dams")
                assert dam.recovery.attempt == 1
                assert dam.recovery.error.reason == "MEMBER_LOST"
                assert "a test said so" in dam.recovery.error.message
                assert 0 < dam.remaining_duration.ToNanoseconds() <= 120e9
                assert "dams is brought back for its step at 3 h: " in words(found)
                gate.set()
            async with present(broker.address, dams=Dams):
                ended = await services.ended(run.name)
                assert (ended.digest, ended.error.message) == (undisturbed.digest, "")

    bounded(story)


def test_a_planner_that_does_not_come_back_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (home, shell):
        monkeypatch.setattr(room, "PLAN_WITHIN_S", 0.5)
    gate = threading.Event()

    class Pondering(Foreman):
        def advance(self, step: Step) -> None:
            assert gate.wait(20)

    async def story() -> None:
        async with valley() as (broker, _):
            scenario = scenario_of()
            with pytest.raises(TwinError, match="planner did not answer within") as lost:
                await broker.run(scenario, case_of(scenario, "plan"), lambda *_: Pondering())
            assert lost.value.reason is Reason.MEMBER_LOST
            gate.set()

    bounded(story)


def test_a_store_that_does_not_come_back_ends_the_run_and_no_order_is_left_without_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "STORE_WITHIN_S", 1.0)
    gate, reached = threading.Event(), threading.Event()

    def stuck(*_: object, **__: object) -> int:
        reached.set()
        gate.wait(20)
        return 0

    async def story() -> None:
        async with valley() as (_, services):
            monkeypatch.setattr(Store, "append", stuck)
            run = await services.create()
            await asyncio.to_thread(reached.wait, 20)
            order = asyncio.create_task(refused(services.submit(run.name, "upper", 0.5)))
            ended = await services.ended(run.name)
            assert ended.error.reason == "STORE_FAILED"
            assert "has not answered for 1 s" in ended.error.message
            assert (await order).reason is Reason.OUTSIDE_ENVELOPE
            gate.set()

    bounded(story)


# -- what the time went to -------------------------------------------------------------------


def test_the_critical_path_accounts_for_the_whole_wall_time_and_blames_who_is_slow() -> None:
    class Slow(Dams):
        def advance(self, step: Step) -> None:
            time.sleep(0.005)
            super().advance(step)

    async def story() -> None:
        async with valley(dams=Slow) as (broker, services):
            scenario = scenario_of()
            outcome = await broker.run(scenario, case_of(scenario, "plan"), planner)
            path = outcome.critical_path
            assert path is not None
            assert path.wall_s == pytest.approx(outcome.wall_s, rel=1e-6)
            seconds = {share.member: share.seconds for share in path.members}
            for name, taken_s in seconds.items():
                assert taken_s <= outcome.costs[name].wall_s + 1e-9
            assert max(seconds, key=lambda name: seconds[name]) == "dams"
            assert seconds["dams"] > 0.7 * 145 * 0.005
            assert 0 <= path.coordinator_s < 0.5 * outcome.wall_s
            couplings = {(hold.holder, hold.held): hold.coupling for hold in path.holds}
            assert couplings["dams", "town"] == "dams.release -> town.river"
            assert couplings["dams", "dams"] == ""
            assert path.holds[0].holder == "dams"
            longest = [frame.seconds for frame in path.longest]
            assert longest == sorted(longest, reverse=True)
            (run,) = (await services.scenarios.ListRuns(scenario_pb2.ListRunsRequest())).runs
            kept = (await why(services, run.name)).critical_path
            assert {m.member for m in kept.members} == set(seconds)

    bounded(story)


def test_in_one_process_every_step_is_on_the_critical_path() -> None:
    scenario = scenario_of()
    outcome = run_local(scenario, case_of(scenario, "plan"), planner)
    path = outcome.critical_path
    assert path is not None
    assert path.wall_s == pytest.approx(outcome.wall_s)
    assert {s.member: s.frames for s in path.members} == {
        name: cost.steps for name, cost in outcome.costs.items()
    }
    assert path.coordinator_s > 0


# -- the wall clock --------------------------------------------------------------------------


def test_the_lag_of_a_run_is_counted_and_its_quantile_is_no_more_than_a_tenth_too_high() -> None:
    pacer = Pacer(Pace(factor=10.0))
    assert pacer.due_s(0, 100.0) == 100.0
    assert pacer.due_s(50_000_000_000, 100.0) == 105.0
    for number in range(200):
        pacer.gave(0, 100.0 + (3.0 if number in (7, 70) else 0.5 if number < 50 else -1.0))
    assert (pacer.max_lag_s, pacer.lag_s) == (3.0, 0.0)
    assert 0.5 <= pacer.p99_lag_s <= 0.56
    assert pacer.now_ns(107.0) == 70_000_000_000


def test_who_skips_lets_the_time_go_that_was_lost_and_who_waits_does_not() -> None:
    waits, skips = Pacer(Pace(factor=1.0)), Pacer(Pace(factor=1.0, when_late="skip"))
    for pacer in (waits, skips):
        assert pacer.due_s(0, 0.0) == 0.0
        pacer.gave(1_000_000_000, 1.5)  # a little late is caught up with
        pacer.gave(2_000_000_000, 7.0)
    assert (waits.due_s(8_000_000_000, 7.0), waits.skipped_s) == (8.0, 0.0)
    assert (skips.due_s(8_000_000_000, 7.0), skips.skipped_s) == (13.0, 5.0)


def paced(factor: float, when_late: str = "wait", late_after_s: float = 0.1) -> str:
    pace = f"pace: {{factor: {factor}, when_late: {when_late}, late_after_s: {late_after_s}}}"
    return f"{WITHOUT_PLANS}\n{pace}\n"


async def paced_run(document: str, **twins: type[Twin]) -> Outcome:
    scenario = scenario_of(document)
    async with valley(None, **twins) as (broker, _):
        return await broker.run(scenario, case_of(scenario, "none"), foreman, keep_ledger=True)


DAY_IN_A_SECOND = 24 * 3600 / 1.0


def test_no_step_of_a_paced_run_is_done_before_its_time_and_the_digest_is_the_same() -> None:
    scenario = scenario_of(WITHOUT_PLANS)
    undisturbed = run_local(scenario, case_of(scenario, "none"), foreman)
    done: list[tuple[int, float]] = []

    class Timed(Town):
        def advance(self, step: Step) -> None:
            done.append((step.time_ns, time.monotonic()))
            super().advance(step)

    async def story() -> None:
        outcome = await paced_run(paced(DAY_IN_A_SECOND), town=Timed)
        assert outcome.digest == undisturbed.digest
        (_, start_s), *rest = done
        # the clock started no later than at the first step
        for time_ns, at_s in rest:
            assert at_s - start_s >= time_ns / 1e9 / DAY_IN_A_SECOND - 0.3
        assert rest[-1][1] - start_s > 0.7
        path = outcome.critical_path
        assert path is not None
        assert path.wall_s == pytest.approx(outcome.wall_s, rel=1e-6)
        assert path.pace_s > 0
        assert outcome.pace is not None
        assert 0 <= float(outcome.pace["p99_lag_s"]) <= float(outcome.pace["max_lag_s"]) < 20

    bounded(story)


@pytest.mark.parametrize("when_late", ["wait", "skip"])
def test_a_run_that_falls_behind_gives_the_same_digest(when_late: str) -> None:
    scenario = scenario_of(WITHOUT_PLANS)
    undisturbed = run_local(scenario, case_of(scenario, "none"), foreman)

    class Stumbling(Dams):
        def advance(self, step: Step) -> None:
            if step.time_ns == 6 * HOUR_NS:
                time.sleep(0.6)
            super().advance(step)

    async def story() -> None:
        outcome = await paced_run(paced(DAY_IN_A_SECOND, when_late), dams=Stumbling)
        assert outcome.digest == undisturbed.digest
        assert outcome.pace is not None
        # on a busy machine the clock may have started a little before the others were there
        assert float(outcome.pace["max_lag_s"]) > 0.2
        assert (float(outcome.pace["skipped_s"]) > 0.2) == (when_late == "skip")

    bounded(story)


def test_who_is_late_is_not_waited_for_and_misses_nothing() -> None:
    gate = threading.Event()
    done: list[int] = []

    class Late(Dams):
        def advance(self, step: Step) -> None:
            done.append(step.time_ns)
            if step.time_ns == 6 * HOUR_NS:
                assert gate.wait(20)
            super().advance(step)

    class Going(Town):
        def advance(self, step: Step) -> None:
            if step.time_ns == 9 * HOUR_NS:
                gate.set()  # nobody waits for the dams any more, or this would never be
            super().advance(step)

    async def story() -> None:
        outcome = await paced_run(paced(DAY_IN_A_SECOND / 2, "degrade", 0.3), dams=Late, town=Going)
        periods = [number * 10 * MINUTE_NS for number in range(145)]
        assert done == periods[: len(done)]
        assert len(done) > 100
        changes = [
            (r.event.kind, r.event.entity, r.event.time_ns)
            for r in outcome.events
            if isinstance(r, EventRecord) and r.owner == "federation"
        ]
        assert changes[0] == ("member_stale", "dams", 6 * HOUR_NS)
        kind, entity, good_ns = changes[1]
        assert (kind, entity) == ("member_good", "dams")
        assert good_ns >= 9 * HOUR_NS
        records = [r for r in outcome.ledger if isinstance(r, Record) and r.owner == "dams"]
        late = [r for r in records if 6 * HOUR_NS <= r.time_ns < good_ns]
        assert {r.quality for r in late} == {Quality.STALE}
        assert {r.variable for r in late} == {"level", "release", "spilled"}
        again = {r.variable for r in records if r.time_ns == good_ns}
        assert again == {"level", "release", "spilled"}
        assert all(r.quality is Quality.GOOD for r in records if r.time_ns < 6 * HOUR_NS)
        assert all(r.quality is Quality.GOOD for r in records if r.time_ns == good_ns)

    bounded(story)


def test_a_run_that_was_told_to_go_faster_than_its_document_goes_faster() -> None:
    async def story() -> None:
        async with valley() as (broker, services):
            request = scenario_pb2.CreateRunRequest(
                document=f"{SCENARIO}\npace: {{factor: 1}}\n", pace_factor=0.0
            )
            run = (await services.scenarios.CreateRun(request)).run
            assert (await services.ended(run.name)).state == scenario_pb2.Run.STATE_SUCCEEDED
            request.pace_factor = 600.0
            run = (await services.scenarios.CreateRun(request)).run
            found = await when(services, run.name, "dams", MEMBER.STATE_PACED)
            assert found.pace.factor == 600.0
            assert "dams waits for the wall clock to come to its step at" in words(found)
            again = parse(broker.store.run(run.name).document, "kept", Path(__file__).parent)
            assert again.pace == Pace(factor=600.0)
            bad = await refused(
                services.scenarios.CreateRun(
                    scenario_pb2.CreateRunRequest(document=SCENARIO, pace_factor=-1.0)
                )
            )
            assert bad.reason is Reason.SCENARIO_INVALID

    bounded(story)


def test_what_can_not_be_paced_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(SCENARIO)
    assert main(["run", str(file), "--pace", "60"]) == 2
    assert "--members grpc" in capsys.readouterr().err
    document = SCENARIO.replace(
        'dams: {class: "tests.valley:Dams"}',
        'dams: {class: "tests.valley:Dams", on_failure: hold}',
    )
    with pytest.raises(ScenarioError, match="dams has on_failure: hold"):
        scenario_of(document + "\npace: {factor: 60, when_late: degrade}\n")


# -- clocks and ages -------------------------------------------------------------------------


def test_the_clock_of_a_twin_is_known_within_half_the_round_trip() -> None:
    async def story() -> None:
        async with serving(Dams, "dams", SERVED) as (address, _):
            link = await Link.connect(address, "dams")
            clock = await link.clock()
            await link.close()
            assert clock is not None
            assert abs(clock.offset_s) <= clock.round_trip_s / 2 + 1e-6
            assert 0 <= clock.round_trip_s < 5
        with process(str(ROOT / "tests" / "rawtwin.py"), "--port", "0") as (_, old):
            link = await Link.connect(old, "old")
            assert await link.clock() is None
            await link.close()

    bounded(story)


class Silent(Dams):
    """Publishes its level once, and then only what else it has."""

    def advance(self, step: Step) -> None:
        if step.time_ns == 0:
            super().advance(step)
        else:
            step.publish("release", 1.0)
            step.publish("spilled", 0.0)


def test_a_value_that_is_not_published_for_too_long_is_stale_for_who_reads_it() -> None:
    document = f"{SCENARIO}\nstaleness: {{dams.level: 60, dams.spilled: 30}}\n"

    async def story() -> None:
        async with valley(dams=Silent) as (_, services):
            run = await services.create(document)
            ended = await services.ended(run.name)
            assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
            found = await why(services, run.name)
            (stale,) = found.stale_values
            assert (stale.member, stale.variable) == ("dams", "level")
            assert (stale.publish_time_ns, stale.bound_ns) == (0, HOUR_NS)
            assert "dams.level is stale: last published 0 s, may be 1 h old" in words(found)
            (answer,) = [a async for a in services.watch(run.name, members=["dams"])]
            qualities = {
                e.value.values.variable: e.value.quality
                for e in answer.entries
                if e.HasField("value")
            }
            kind = broker_pb2.LedgerEntry
            assert qualities["level"] == kind.QUALITY_STALE
            # it is published at every step, though it hardly ever changes
            assert qualities["spilled"] == kind.QUALITY_GOOD
            assert not any(kpi.is_stale for kpi in ended.kpis)
            late = await refused(services.create(f"{SCENARIO}\nstaleness: {{dams.nothing: 1}}\n"))
            assert late.reason is Reason.UNKNOWN_VARIABLE

    bounded(story)
