"""Futures of a live run, over gRPC: the same as in one process, honest, and not felt by the run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from federation.broker.memory import Origin, write_case, write_origin
from federation.broker.server import BrokerOptions, BrokerServer
from federation.broker.store import Run, State, Store
from federation.core.ledger import Record
from federation.errors import Reason, TwinError
from federation.scenario.future import Future
from federation.scenario.run import Case, run_local
from federation.scenario.spec import Policy, Scenario, parse
from federation.scenario.study import cases
from federation.twin import (
    HOUR_NS,
    NOTHING,
    Cut,
    Description,
    Glimpse,
    Planner,
    Session,
    Step,
    Twin,
    Vector,
)
from federation.v1 import scenario_pb2, twin_pb2
from federation.wire import codec, status
from federation.wire.serve import TwinService
from tests.lowland import SCENARIO, Polder, Reservoir, Sky, Warden, warden
from tests.test_broker import Services, client, present, refused
from tests.test_members import People, before
from tests.test_wire import bounded

TWINS: Mapping[str, type[Twin]] = {"sky": Sky, "reservoir": Reservoir, "polder": Polder}
LEAK = 0.15


@asynccontextmanager
async def lowland(
    options: BrokerOptions | None = None, **twins: type[Twin]
) -> AsyncIterator[tuple[BrokerServer, Services]]:
    async with (
        BrokerServer(options or BrokerOptions(planner=warden, grace_s=0.1)) as broker,
        present(broker.address, **{**TWINS, **twins}),
        client(broker.address) as services,
    ):
        await broker.members_ready(TWINS, 10)
        yield broker, services


def case_of(scenario: Scenario) -> Case:
    (case,) = cases(scenario, ["none"], 1, scenario.seed)
    return case


def glimpsed(at_h: int, until_h: int, number: int, believed: Mapping[str, float]) -> Glimpse:
    """A future of the run in one process, under the policy `plan` from then on."""
    found: list[Glimpse] = []

    class Foreseer(Warden):
        def foresees(self) -> bool:
            return True

        def deliberate(self, cut: Cut) -> None:
            if cut.time_ns == at_h * HOUR_NS:
                known = {m: {"leak": np.array([leak])} for m, leak in believed.items()}
                found.append(cut.future(number, Warden("plan"), until_h * HOUR_NS, known))

    def foreseer(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy
    ) -> Planner:
        return Foreseer()

    scenario = parse(SCENARIO)
    run_local(scenario, case_of(scenario), foreseer)
    (glimpse,) = found
    return glimpse


def future_of(number: int, believed: Mapping[str, float] = NOTHING) -> scenario_pb2.Future:
    message = scenario_pb2.Future(number=number)
    for member, leak in believed.items():
        belief = message.believed.add(member=member)
        codec.write_values(belief.outputs, {"leak": np.array([leak])})
    return message


def test_a_future_over_grpc_is_the_one_in_one_process_bit_for_bit_and_the_run_goes_on() -> None:
    cases_ = [(1, 0, {}), (1, 1, {"reservoir": LEAK}), (9, 0, {}), (9, 0, {"reservoir": LEAK})]
    expected = [glimpsed(at_h, at_h + 6, number, known) for at_h, number, known in cases_]
    scenario = parse(SCENARIO)
    undisturbed = run_local(scenario, case_of(scenario), warden)

    class Slower(Polder):
        def advance(self, step: Step) -> None:
            time.sleep(0.003)
            super().advance(step)

    async def story() -> None:
        async with lowland(polder=Slower) as (broker, services):
            run = await services.create(SCENARIO)
            people = People(services, run.name)
            await people.settled(10 * HOUR_NS)
            names = []
            for at_h, number, known in cases_:
                request = scenario_pb2.ForkRunRequest(
                    name=run.name,
                    time_ns=at_h * HOUR_NS - 1,
                    measure="plan",
                    horizon_ns=(at_h + 6) * HOUR_NS,
                    future=future_of(number, known),
                )
                answer = await services.scenarios.ForkRun(request)
                assert answer.is_future
                names.append(answer.run.name)
            for name, glimpse, (at_h, _, _) in zip(names, expected, cases_, strict=True):
                ended = await services.ended(name)
                assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
                cut_ns = at_h * HOUR_NS - 1
                assert before(broker.store, name, cut_ns) == before(broker.store, run.name, cut_ns)
                for figure, series in glimpse.series.items():
                    member, _, variable = figure.partition(".")
                    stored = broker.store.history(name, member, variable, cut_ns + 1, 1 << 62)
                    told = tuple(
                        (s.entry.time_ns, float(s.entry.value[0]))
                        for s in stored
                        if isinstance(s.entry, Record)
                    )
                    assert told == series[1:]
            assert (await services.ended(run.name)).digest == undisturbed.digest

    bounded(story)
    assert len({str(glimpse.series) for glimpse in expected}) == len(expected)


Told = dict[str, list[tuple[int, float]]]


async def tried(
    services: Services,
    run: str,
    cut_ns: int,
    until_ns: int,
    *attempts: scenario_pb2.TryFuturesRequest.Attempt,
    figures: tuple[str, ...] = ("reservoir.spilled", "polder.damage"),
) -> list[scenario_pb2.TryFuturesResponse]:
    """What came of each attempt, in the order in which they were asked for."""
    request = scenario_pb2.TryFuturesRequest(
        name=run, time_ns=cut_ns, horizon_ns=until_ns, attempts=attempts, figures=figures
    )
    found = [answer async for answer in services.scenarios.TryFutures(request)]
    assert sorted(answer.attempt for answer in found) == list(range(len(attempts)))
    return sorted(found, key=lambda answer: answer.attempt)


def told_by(answer: scenario_pb2.TryFuturesResponse) -> Told:
    assert not answer.HasField("error"), answer.error
    found: Told = {}
    for told in answer.told:
        value = float(codec.decode_vector(told.values, told.variable)[0])
        found.setdefault(f"{told.member}.{told.variable}", []).append((told.time_ns, value))
    return found


Attempt = scenario_pb2.TryFuturesRequest.Attempt


def test_futures_that_are_tried_are_those_in_one_process_bit_for_bit_and_leave_nothing() -> None:
    known: dict[str, float] = {"reservoir": LEAK}
    cases_ = [(at_h, n, b) for at_h in (1, 9) for n, b in ((0, {}), (1, {}), (0, known))]
    expected = [glimpsed(at_h, at_h + 6, number, b) for at_h, number, b in cases_]
    scenario = parse(SCENARIO)
    undisturbed = run_local(scenario, case_of(scenario), warden)

    class Slower(Polder):
        def advance(self, step: Step) -> None:
            time.sleep(0.003)
            super().advance(step)

    async def story() -> None:
        async with lowland(polder=Slower) as (broker, services):
            run = await services.create(SCENARIO)
            await People(services, run.name).settled(10 * HOUR_NS)
            found: list[Told] = []
            for at_h in (1, 9):
                attempts = [
                    Attempt(measure="plan", future=future_of(number, b))
                    for hour, number, b in cases_
                    if hour == at_h
                ]
                cut_ns, until_ns = at_h * HOUR_NS - 1, (at_h + 6) * HOUR_NS
                answers = await tried(services, run.name, cut_ns, until_ns, *attempts)
                found += map(told_by, answers)
                assert all(sent.action.member for answer in answers for sent in answer.sent)
                assert all(answer.sent for answer in answers)
            for told, glimpse in zip(found, expected, strict=True):
                for figure, series in glimpse.series.items():
                    assert tuple(told.get(figure, ())) == series[1:]
            runs, _ = broker.store.runs(100, None)
            assert [one.name for one in runs] == [run.name]
            assert (await services.ended(run.name)).digest == undisturbed.digest

    bounded(story)
    assert len({str(glimpse.series) for glimpse in expected}) == len(expected)


def test_without_another_future_what_is_tried_goes_on_as_the_run_did() -> None:
    planned = SCENARIO.replace("none: {}", "none: {crews: nearest}")

    async def story() -> None:
        async with lowland() as (broker, services):
            run = await services.create(planned)
            await services.ended(run.name)
            cut_ns = 7 * HOUR_NS - 1
            for cut_ns in (-1, 7 * HOUR_NS - 1, 9 * HOUR_NS + 1):
                asked = (run.name, cut_ns, 24 * HOUR_NS, Attempt(), Attempt(measure="plan"))
                as_it_was, planned_anew = map(told_by, await tried(services, *asked))
                lived: Told = {}
                for figure in as_it_was:
                    member, _, variable = figure.partition(".")
                    stored = broker.store.history(run.name, member, variable, cut_ns + 1, 1 << 62)
                    lived[figure] = [
                        (s.entry.time_ns, float(s.entry.value[0]))
                        for s in stored
                        if isinstance(s.entry, Record)
                    ]
                assert as_it_was == lived
                assert planned_anew != lived

    bounded(story)


def test_what_can_not_be_tried_says_why_and_what_nobody_waits_for_ends() -> None:
    at_work: set[int] = set()

    class Fixed(Polder):
        """It has no other futures, and takes its time."""

        def open(self, seed: int, parameters: Mapping[str, float]) -> None:
            super().open(seed, parameters)
            at_work.add(id(self))

        def advance(self, step: Step) -> None:
            time.sleep(0.002)
            super().advance(step)

        def close(self) -> None:
            at_work.discard(id(self))

        def diverge(self, *what: object, **more: object) -> int | None:
            return Twin.diverge(self, *what, **more)  # type: ignore[arg-type]

        def snapshot(self) -> bytes:
            return json.dumps([self.water_m, self.pumps, self.damage_usd]).encode()

        def restore(self, state: bytes) -> None:
            self.water_m, self.pumps, self.damage_usd = json.loads(state)

    async def story() -> None:
        async with lowland(polder=Fixed) as (_, services):
            run = await services.create(SCENARIO)
            await services.ended(run.name)
            asked = (run.name, HOUR_NS, 20 * HOUR_NS)
            no, yes = await tried(services, *asked, Attempt(future=future_of(0)), Attempt())
            assert (no.error.reason, no.error.metadata["member"]) == ("UNSUPPORTED", "polder")
            assert told_by(yes)
            for wrong, reason in (
                (tried(services, *asked, figures=("polder.colour",)), Reason.UNKNOWN_VARIABLE),
                (tried(services, *asked, Attempt(measure="pray")), Reason.SCENARIO_INVALID),
                (tried(services, *asked, *[Attempt()] * 1001), Reason.SCENARIO_INVALID),
                (tried(services, run.name, HOUR_NS, 0), Reason.INSTANT_PASSED),
                (tried(services, run.name, 99 * HOUR_NS, 100 * HOUR_NS), Reason.INSTANT_PASSED),
            ):
                assert (await refused(wrong)).reason is reason
            while at_work:
                await asyncio.sleep(0.02)
            request = scenario_pb2.TryFuturesRequest(
                name=run.name, time_ns=HOUR_NS, horizon_ns=1 << 60, attempts=[Attempt()]
            )
            call = services.scenarios.TryFutures(request)
            reading = asyncio.create_task(call.read())
            while not at_work:
                await asyncio.sleep(0.02)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            while at_work:
                await asyncio.sleep(0.02)

    bounded(story)


def test_a_future_goes_through_the_past_once_however_many_there_are_of_a_cut() -> None:
    steps: list[int] = []

    class Counted(Polder):
        def advance(self, step: Step) -> None:
            steps.append(step.time_ns)
            super().advance(step)

    async def story() -> None:
        async with lowland(polder=Counted) as (_, services):
            run = await services.create(SCENARIO)
            await services.ended(run.name)
            people = People(services, run.name)
            for at_h, again in ((12, 12), (13, 1)):
                steps.clear()
                cut_ns = at_h * HOUR_NS - 1
                futures = [future_of(number) for number in range(3)]
                forks = [
                    people.fork(time_ns=cut_ns, horizon_ns=cut_ns + HOUR_NS, future=future)
                    for future in futures
                ]
                for name in await asyncio.gather(*forks):
                    ended = await services.ended(name)
                    assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
                assert sum(time_ns <= cut_ns for time_ns in steps) == 4 * again
                assert sum(time_ns > cut_ns for time_ns in steps) == 3 * 4

    bounded(story)


def test_what_can_have_no_other_future_says_so_and_nothing_else_is_made_of_it() -> None:
    class Fixed(Polder):
        def diverge(
            self,
            time_ns: int,
            seed: int,
            parameters: Mapping[str, float],
            believed: Mapping[str, Vector] = NOTHING,
        ) -> int | None:
            return Twin.diverge(self, time_ns, seed, parameters, believed)

    async def story() -> None:
        async with lowland(polder=Fixed) as (_, services):
            run = await services.create(SCENARIO)
            await services.ended(run.name)
            people = People(services, run.name)
            name = await people.fork(time_ns=HOUR_NS, future=future_of(0))
            ended = await services.ended(name)
            assert ended.error.reason == Reason.UNSUPPORTED
            assert ended.error.metadata["member"] == "polder"
            again = await refused(people.fork(time_ns=HOUR_NS, future=future_of(0, {"moon": 1.0})))
            assert again.reason is Reason.UNKNOWN_MEMBER
            odd = scenario_pb2.Future(parameters={"sky.colour": 1.0})
            again = await refused(people.fork(time_ns=HOUR_NS, future=odd))
            assert again.reason is Reason.UNKNOWN_PARAMETER
            for ask in (People(services, name).fork(), People(services, name).replay()):
                assert (await refused(ask)).reason is Reason.UNSUPPORTED

    bounded(story)


def test_a_twin_that_is_older_than_futures_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = TwinService._restore

    def older(
        self: TwinService,
        hosted: object,
        restore: twin_pb2.SessionRequest.Restore,
        restored: twin_pb2.SessionResponse.Restored,
    ) -> None:
        restore.ClearField("diverge")
        now(self, hosted, restore, restored)  # type: ignore[arg-type]

    monkeypatch.setattr(TwinService, "_restore", older)

    async def story() -> None:
        async with lowland() as (_, services):
            run = await services.create(SCENARIO)
            await services.ended(run.name)
            fork = People(services, run.name).fork(time_ns=HOUR_NS, future=future_of(0))
            ended = await services.ended(await fork)
            assert ended.error.reason == Reason.UNSUPPORTED
            assert "older" in status.decode_error(ended.error).message

    bounded(story)


def test_a_broker_that_is_started_again_leaves_futures_alone(tmp_path: Path) -> None:
    file = tmp_path / "broker.sqlite"
    scenario = parse(SCENARIO)
    store = Store(file)
    made = store.create(
        Run("x", "Lowland", "none", SCENARIO, 11, 24 * HOUR_NS, 0, (), ()),
        [
            write_case(case_of(scenario)),
            write_origin(Origin("runs/other-1", HOUR_NS, future=Future(3))),
        ],
    )
    store.change(made.name, State.RUNNING)
    store.close()

    async def story() -> None:
        async with lowland(BrokerOptions(store=file, grace_s=0.1)) as (_, services):
            ended = await services.ended(made.name)
            assert ended.state == scenario_pb2.Run.STATE_FAILED
            assert ended.error.reason == Reason.UNSUPPORTED
            assert ended.error.metadata["run"] == "runs/other-1"

    bounded(story)


def test_what_is_believed_is_held_to_what_a_twin_says_of_itself() -> None:
    session = Session(Reservoir(), "reservoir")
    session.open(1, {})
    for believed, reason in (
        ({"colour": np.zeros(1)}, Reason.UNDECLARED_OUTPUT),
        ({"leak": np.zeros(2)}, Reason.WRONG_SHAPE),
        ({"leak": np.array([np.nan])}, Reason.NOT_FINITE),
    ):
        with pytest.raises(TwinError) as caught:
            session.diverge(HOUR_NS, 2, {}, believed)
        assert caught.value.reason is reason
