"""What becomes of a run whose members fail, as each of them has declared it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest

from federation.broker.shell import run_live
from federation.core.ledger import EventRecord, Quality, Record
from federation.errors import FederationError, Reason
from federation.loop import run
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Scenario, parse
from federation.twin import MINUTE_NS, Causality, Description, Entity, Step, TimePolicy, Twin
from federation.twin import Variable as Values
from federation.wire.link import Link
from federation.wire.serve import ServeOptions, serving

TROUBLE_MIN = 70
"""When it happens: in the middle of the spring's second frame."""

SPRING_AND_LAKE = """
name: lake
region: nowhere
horizon_h: 1.5
members:
  spring: {class: "tests.test_faults:Spring"%s}
  lake: {class: "tests.test_faults:Lake"}
couplings:
  - {from: spring.flow, to: lake.inflow}
"""


class Spring(Twin):
    """Flows a little more every minute; its step at minute 70 is what a test makes of it."""

    trouble: ClassVar[str] = ""
    lives: ClassVar[int] = 0
    """How many sessions have begun: trouble befalls the first of them only."""

    def describe(self) -> Description:
        return Description(
            model="spring",
            version="1",
            domain="water",
            entities=(Entity("s1", "spring"), Entity("s2", "spring")),
            variables=(Values("flow", "spring", "m^3/s", Causality.OUTPUT),),
            time=TimePolicy(period_ns=MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        Spring.lives += 1
        self.life = Spring.lives
        self.flow = np.zeros(2)

    def advance(self, step: Step) -> None:
        self.flow = self.flow + np.array([1.0, 0.5])
        if step.time_ns == TROUBLE_MIN * MINUTE_NS and self.life == 1:
            if Spring.trouble == "raises":
                raise RuntimeError("a stone fell in")
            if Spring.trouble == "nan":
                self.flow = self.flow * np.nan
        if Spring.trouble == "forgets":
            self.flow = self.flow + Spring.lives
            if step.time_ns == TROUBLE_MIN * MINUTE_NS and self.life == 1:
                raise RuntimeError("a stone fell in")
        causes = {}
        if not step.time_ns // MINUTE_NS % 10:
            causes[0] = step.emit("swells", "s1", "the spring swells")
        step.publish("flow", self.flow, causes)

    def snapshot(self) -> bytes:
        return self.flow.tobytes()

    def restore(self, state: bytes) -> None:
        self.flow = np.frombuffer(state)


class Pump(Spring):
    """Stands in for the spring with a flow that it knows from experience."""

    def advance(self, step: Step) -> None:
        event = step.emit("started", "s1", "the pump runs")
        step.publish("flow", [7.0, 7.0], {0: event})


class Lake(Twin):
    """Holds what came."""

    def describe(self) -> Description:
        return Description(
            model="lake",
            version="1",
            domain="water",
            entities=(Entity("s1", "spring"), Entity("s2", "spring")),
            variables=(
                Values("inflow", "spring", "m^3/s", Causality.INPUT),
                Values("held", "spring", "m^3/s*min", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.held = np.zeros(2)

    def advance(self, step: Step) -> None:
        self.held = self.held + step["inflow"]
        step.publish("held", self.held)


def scenario(policy: str) -> Scenario:
    return parse(SPRING_AND_LAKE % (f", on_failure: {policy}" if policy else ""))


@pytest.fixture(autouse=True)
def _first_life() -> None:
    Spring.trouble, Spring.lives = "", 0


def undisturbed() -> Outcome:
    outcome = run_local(scenario(""), Case(0, 1, "none"), None, keep_ledger=True)
    Spring.lives = 0
    return outcome


def here(policy: str, trouble: str) -> Outcome:
    Spring.trouble, Spring.lives = trouble, 0
    return run_local(scenario(policy), Case(0, 1, "none"), None, keep_ledger=True)


def over_sockets(policy: str, trouble: str) -> Outcome:
    async def story() -> Outcome:
        options = ServeOptions(grace_s=0.1)
        async with (
            serving(Spring, "spring", options) as (at_spring, _),
            serving(Lake, "lake", options) as (at_lake, _),
            serving(Pump, "spring-substitute", options) as (at_pump, _),
            await Link.connect(at_spring, "spring") as spring,
            await Link.connect(at_lake, "lake") as lake,
            await Link.connect(at_pump, "spring-substitute") as pump,
        ):
            Spring.trouble, Spring.lives = trouble, 0
            links = {"spring": spring, "lake": lake, "spring-substitute": pump}
            asked = scenario(policy)
            async with asyncio.timeout(60):
                return await run_live(
                    asked, Case(0, 1, "none"), None, links, epoch=1, keep_ledger=True
                )

    return run(story())


def flows(outcome: Outcome) -> list[Record]:
    return [record for record in outcome.ledger if record.variable == "flow"]


def told(outcome: Outcome, owner: str) -> list[EventRecord]:
    return [event for event in outcome.events if event.owner == owner]


@pytest.mark.parametrize("trouble", ["raises", "nan"])
def test_a_member_is_held_from_the_very_step_that_failed_here_and_over_sockets(
    trouble: str,
) -> None:
    good = flows(undisturbed())
    for outcome in (here("hold", trouble), over_sockets("hold", trouble)):
        found = flows(outcome)
        assert [r.time_ns for r in found] == [r.time_ns for r in good[: TROUBLE_MIN + 1]]
        assert [r.quality for r in found] == [Quality.GOOD] * TROUBLE_MIN + [Quality.HELD]
        assert np.array_equal(found[-1].value, good[TROUBLE_MIN - 1].value)
        (said,) = told(outcome, "federation")
        assert (said.event.kind, said.time_ns) == ("member_held", TROUBLE_MIN * MINUTE_NS)
        assert {r.time_ns for r in outcome.ledger if r.owner == "lake"} == {
            minute * MINUTE_NS for minute in range(91)
        }
    assert here("hold", trouble).digest == over_sockets("hold", trouble).digest


def test_another_model_goes_on_for_a_member_and_its_values_are_marked() -> None:
    policy = '{do: substitute, substitute: {class: "tests.test_faults:Pump"}}'
    outcome = over_sockets(policy, "raises")
    good = flows(undisturbed())
    found = flows(outcome)
    assert [r.quality for r in found] == [Quality.GOOD] * TROUBLE_MIN + [Quality.SUBSTITUTED]
    assert np.array_equal(found[-1].value, [7.0, 7.0])
    assert [r.revision for r in found] == list(range(1, TROUBLE_MIN + 2))
    assert np.array_equal(found[TROUBLE_MIN - 1].value, good[TROUBLE_MIN - 1].value)
    serials = [int(e.event.id.rpartition("/")[2]) for e in told(outcome, "spring")]
    assert serials == sorted(set(serials))
    assert len(serials) == 7 + 91 - TROUBLE_MIN


@pytest.mark.parametrize("policy", ["recover", "{do: recover, save_every_min: 5}"])
@pytest.mark.parametrize("trouble", ["raises", "nan"])
def test_a_member_that_recovers_leaves_no_trace(policy: str, trouble: str) -> None:
    outcome = over_sockets(policy, trouble)
    assert [member for member, _, _ in outcome.recoveries] == ["spring"]
    assert outcome.digest == undisturbed().digest


def test_a_member_that_fails_ends_the_run_when_nothing_else_is_declared() -> None:
    for end in (here, over_sockets):
        with pytest.raises(FederationError, match="a stone fell in") as caught:
            end("", "raises")
        assert caught.value.reason is Reason.TWIN_FAILED


def test_a_twin_whose_steps_can_not_be_done_again_is_found_out() -> None:
    with pytest.raises(FederationError, match="draws on something else than its seed") as caught:
        over_sockets("recover", "forgets")
    assert caught.value.reason is Reason.REPLAY_DIFFERS
