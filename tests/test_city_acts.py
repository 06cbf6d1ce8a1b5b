"""Acting on another city: its policy says what may be asked, its guard says yes or no, and its
twins do it once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from federation.__main__ import main
from federation.broker.server import BrokerOptions, BrokerServer
from federation.control.actuation import FileJournal, Seat, Stage, Task, carry_out
from federation.control.guard import Guard
from federation.control.petitions import SERVICE, Petitions, PetitionService, give_way
from federation.control.rules import parse as parse_rules
from federation.control.situation import Mode
from federation.control.view import LiveView
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.core.ledger import ActionRecord
from federation.errors import FederationError, Reason
from federation.peer.aid import AidOptions
from federation.planners import planner
from federation.scenario.spec import parse
from federation.twin import MINUTE_NS, NOTHING, Action, StepInput, Twin
from federation.v1 import peer_pb2, peer_pb2_grpc, twin_pb2
from federation.wire.caller import claim
from federation.wire.credentials import Identity, Keyring, Role
from federation.wire.enrol import keep_name
from federation.wire.link import Errand, Link
from federation.wire.orders import City, Hand
from federation.wire.party import Part
from federation.wire.serve import ServeOptions, new_server, serving, start_server
from tests.cities import BIRCH, BIRCH_POLICY, Clinic, Grid, write_birch
from tests.guises import broker_of, guise, served_as
from tests.guises import city as certified
from tests.test_broker import _gone
from tests.test_peers import ASH, case_of, free_ports, wire_to
from tests.test_wire import bounded

ASH_GUARD = Identity.generate("spiffe://ash/guard/g1")
ASH_LOOP = Identity.generate("spiffe://ash/planner/p1")
BIRCH_GUARD = Identity.generate("guard-of-birch")
KIM = Identity.generate("kim")

TWINS = Keyring.of((BIRCH_GUARD, Role.GUARD, ["*"]), (KIM, Role.OPERATOR, ["*"]))
"""Whom the twins of birch believe: nobody of ash."""

NEIGHBOURS = Keyring.of(
    (ASH_GUARD, Role.GUARD, ["energy"]),
    (ASH_LOOP, Role.OPTIMISER, ["energy"]),
    (Identity("spiffe://cedar/guard/g1", ASH_GUARD.key), Role.GUARD, ["energy"]),
)
"""Whom the guard of birch believes of others."""

POLICY = (
    BIRCH_POLICY.replace("sessions: [what-if]", "sessions: [what-if, live]")
    + """  - name: shed-in-the-south
    who: [ash]
    what: {actions: [grid.shed], entities: ['S*'], acts: [live], risk: [low, medium]}
    purpose: [mutual-aid]
  - name: what-ifs-of-the-north
    who: [ash]
    what: {actions: [grid.shed], entities: ['N*']}
  - name: breakers-stay
    effect: deny
    who: ['*']
    what: {actions: [grid.open_breaker]}
    why: nobody outside opens a breaker
"""
)

RULES = """
version: 1
owners: {grid: the utility of birch}
cut_min: 600
life_min: 600
bundles: {at_most: 20, within_min: 60}
setpoints_at_most: 4
members_at_most: 2
actuators:
  grid.shed:
    high: 3
    change: {at_most: 20, within_min: 60}
    changes: {at_most: 40, within_min: 60}
    entities: {at_most: 4, within_min: 60}
    reversals: {at_most: 20, within_min: 60}
    lease_min: 120
values:
  grid.unserved: {age_min: 30, clock_s: 30}
recovery: {name: nothing-is-shed, lease_min: 700, returns_after: 1}
"""

WINDOW_NS = 40 * MINUTE_NS


@dataclass
class Birch:
    """A city whose run goes on, with a guard that hears what neighbours ask."""

    broker: BrokerServer
    view: LiveView
    guard: Guard
    policy: Path
    places: Mapping[str, str]
    notes: list[tuple[str, str]]

    @property
    def city(self) -> City:
        return City("birch", "mutual-aid", "spiffe://ash/guard/g1")

    def hand(self, identity: Identity = ASH_GUARD, **other: str) -> Hand:
        return Hand(self.broker.address, identity, city=replace(self.city, **other))

    def told(self) -> list[tuple[str, float]]:
        """What the model of the grid was given, in order."""
        found, _, _ = self.broker.store.entries(self.view.run, 0)
        actions = [s.entry for s in found if isinstance(s.entry, ActionRecord)]
        return [(a.action.entity, a.action.value) for a in actions if a.action.actuator == "shed"]

    async def minutes(self, more: int) -> None:
        """Wait until the run has gone on for so long."""
        until_ns = self.view.settled_ns + more * MINUTE_NS
        async with asyncio.timeout(20):
            while self.view.settled_ns < until_ns:
                await self.view.changed()

    async def given(self, *expected: tuple[str, float]) -> None:
        """Wait until the grid was given just this, in all."""
        async with asyncio.timeout(20):
            while self.told() != list(expected):
                assert len(self.told()) <= len(expected), self.told()
                await asyncio.sleep(0.05)


@asynccontextmanager
async def birch(
    folder: Path,
    policy: str = POLICY,
    rules: str = RULES,
    minutes_per_s: int = 10,
    more: Mapping[str, type[Twin]] = NOTHING,
    aid: AidOptions | None = None,
) -> AsyncIterator[Birch]:
    """`more` are members besides its grid and its clinic, of classes of `tests.cities`."""
    async with AsyncExitStack() as stack:
        files = write_birch(folder, policy)
        members = "".join(
            f'  {n}: {{class: "tests.cities:{t.__name__}"}}\n' for n, t in more.items()
        )
        document = BIRCH.replace("couplings:", f"{members}couplings:")
        files[0].write_text(document, encoding="utf-8")
        (port,) = free_ports(1)
        options = BrokerOptions(
            city="birch",
            export=files[1],
            city_scenario=files[0],
            planner=planner,
            grace_s=0.1,
            guard=f"127.0.0.1:{port}",
            aid=aid,
        )
        broker = await stack.enter_async_context(BrokerServer(options))
        served = ServeOptions(grace_s=0.1, keyring=TWINS)
        places: dict[str, str] = {}
        twins: dict[str, type[Twin]] = {"grid": Grid, "clinic": Clinic, **more}
        for name, twin in twins.items():
            at, description = await stack.enter_async_context(serving(twin, name, served))
            stay = keep_name(broker.address, name, at, description, lambda _: None)
            stack.push_async_callback(_gone, asyncio.create_task(stay))
            places[name] = at
        await broker.members_ready(twins, 10)
        long = document.replace("horizon_h: 2", "horizon_h: 200")
        own = parse(f"{long}pace: {{factor: {60 * minutes_per_s}}}\n")
        live, task = await broker.begin(own, case_of(own, 11), None, document=long)
        stack.push_async_callback(asyncio.wait, [task])
        stack.push_async_callback(live.cancel)
        view = LiveView(broker.address, live.name, BIRCH_GUARD)
        await stack.enter_async_context(view)
        notes: list[tuple[str, str]] = []
        guard = Guard(parse_rules(rules), view.descriptions, lambda *_: False)
        petitions = Petitions(
            view, lambda: guard, NEIGHBOURS, lambda what, _, about: notes.append((what, about))
        )
        server = new_server(1 << 20)
        peer_pb2_grpc.add_PetitionsServicer_to_server(PetitionService(petitions), server)
        await start_server(server, (SERVICE,), "127.0.0.1", port)
        stack.push_async_callback(server.stop, 0.1)
        here = Birch(broker, view, guard, files[1], places, notes)
        async with asyncio.timeout(10):
            while view.settled_ns < 2 * MINUTE_NS:
                await view.changed()
        yield here


def shed(
    at: Birch,
    id: str = "b1",
    mw: Mapping[str, float] | None = None,
    *,
    actuator: str = "grid_shed",
    lease_min: int = 30,
    expires_min: int = 500,
    conditions: tuple[Condition, ...] = (),
    priority: Priority = Priority.AUTONOMOUS,
) -> Bundle:
    """A bundle of ash, in whose scenario the other city is called `neighbour`."""
    mw = {"S1": 2.0} if mw is None else mw
    return Bundle(
        id,
        "runs/ash-1",
        tuple(
            Setpoint("neighbour", actuator, entity, value, lease_min * MINUTE_NS)
            for entity, value in mw.items()
        ),
        priority,
        max(at.view.settled_ns, 0),
        at.view.settled_ns + expires_min * MINUTE_NS,
        "ash-loop",
        conditions=conditions,
    )


async def epoch_of(hand: Hand) -> int:
    (desk,) = (await hand.look("runs/ash-1", "neighbour")).desks
    return desk.epoch


async def put(hand: Hand, what: Bundle) -> None:
    epoch = await epoch_of(hand)
    await hand.select(what, "neighbour", epoch, WINDOW_NS)
    await hand.operate(what, "neighbour", epoch)
    await hand.confirm(what, "neighbour", epoch)


async def refusal(asked: Awaitable[object]) -> FederationError:
    with pytest.raises(FederationError) as caught:
        await asked
    return caught.value


# -- what is allowed -------------------------------------------------------------------------------


def test_what_a_neighbour_may_ask_is_done_once_and_ends_with_its_lease(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            what = shed(at, mw={"S1": 2.0, "S2": 1.0}, lease_min=20)
            await put(ash, what)
            await at.given(("S1", 2.0), ("S2", 1.0))
            (desk,) = (await ash.look("runs/ash-1", "neighbour")).desks
            assert (desk.run, desk.member) == ("runs/ash-1", "neighbour")
            held = {(e.actuator, e.entity): (e.value, e.bundle) for e in desk.in_force}
            assert held == {
                ("grid_shed", "S1"): (2.0, "b1"),
                ("grid_shed", "S2"): (1.0, "b1"),
            }
            # then the safe default, without anybody's word
            await at.given(("S1", 2.0), ("S2", 1.0), ("S1", 0.0), ("S2", 0.0))
            assert [n for n in at.notes if n[0] != "petition"] == []
            assert at.notes[0] == ("petition", "ash:b1")

    bounded(story)


def test_the_guard_of_a_neighbour_acts_on_both_cities_as_on_members_of_its_own(
    tmp_path: Path,
) -> None:
    """With the carrier of bundles that the loop has, journal and all."""

    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            seat = Seat(at.broker.address, await epoch_of(ash), *vars_of(at.city))
            for id_, mw, stage in (("good", 2.0, Stage.COMMITTED), ("bad", 9.0, Stage.COMPENSATED)):
                journal = FileJournal(tmp_path / f"{id_}.jsonl")
                task = Task(shed(at, id_, {"S1": mw}), {"neighbour": seat}, WINDOW_NS)
                ended = await carry_out(task, ASH_GUARD, journal, within_s=10)
                assert ended.stage is stage, ended
                journal.close()
            await at.given(("S1", 2.0))

    bounded(story)


def test_a_loop_of_ash_sees_birch_as_a_member_of_its_run_and_acts_there(tmp_path: Path) -> None:
    """Over both brokers: what its view tells of desks and seats is enough to carry a bundle."""

    async def story() -> None:
        options = BrokerOptions(city="ash", grace_s=0.1)
        async with birch(tmp_path) as at, BrokerServer(options) as ash:
            document = f"""
name: ash-looks
region: ash
horizon_h: 100
members:
  neighbour:
    address: "{at.broker.address}"
    peer: {{session: live, purpose: mutual-aid, city: birch}}
couplings: []
pace: {{factor: 600}}
"""
            own = parse(document)
            live, task = await ash.begin(own, case_of(own), None, document=document)
            async with LiveView(ash.address, live.name, ASH_GUARD) as view:
                (actuator,) = view.descriptions["neighbour"].actuators
                assert actuator.name == "grid_shed"
                desks = await view.desks()
                assert not desks.silent
                what = replace(shed(at), run=live.name)
                journal = FileJournal(tmp_path / "intents.jsonl")
                ended = await carry_out(
                    Task(what, desks.seats, WINDOW_NS), ASH_GUARD, journal, within_s=10
                )
                assert ended.stage is Stage.COMMITTED, ended
                await at.given(("S1", 2.0))
                held = (await view.desks()).holdings
                assert held["neighbour", "grid_shed", "S1"].value == 2.0
                journal.close()
            await live.cancel()
            await asyncio.wait([task])

    bounded(story)


def vars_of(city: City) -> tuple[str, str, str]:
    return city.name, city.purpose, city.claim


def test_a_neighbour_sees_what_it_may_set_and_a_session_that_looks_sets_nothing(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with (
            birch(tmp_path) as at,
            await Link.connect(
                at.broker.address, "birch", ASH, errand=Errand("mutual-aid", is_live=True)
            ) as link,
        ):
            description = await link.describe()
            (actuator,) = description.actuators
            assert (actuator.name, description.ids(actuator.kind)) == ("grid_shed", ("S1", "S2"))
            session = await link.session("birch", 1, {}, 1)
            act = Action("birch", "grid_shed", "S1", 1.0)
            error = await refusal(session.advance([StepInput(0, actions=(act,))]))
            assert error.reason is Reason.NOT_AUTHORISED
            # what-ifs have their own rules, and those without a purpose no live actuator
            async with await Link.connect(at.broker.address, "birch", ASH) as other:
                (actuator,) = (await other.describe()).actuators
                assert (await other.describe()).ids(actuator.kind) == ("N1", "N2")
            assert at.told() == []

    bounded(story)


# -- what is not -----------------------------------------------------------------------------------


def test_what_is_not_exported_is_refused_by_the_name_of_the_rule_and_nothing_else(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash, at.hand(purpose="planning") as other:
            epoch = await epoch_of(ash)

            async def said(hand: Hand, what: Bundle) -> FederationError:
                return await refusal(hand.select(what, "neighbour", epoch, WINDOW_NS))

            for hand, what, rule in (
                (ash, shed(at, mw={"N1": 1.0}), "shed-in-the-south"),
                (ash, shed(at, actuator="grid_open_breaker"), "breakers-stay"),
                (ash, shed(at, actuator="grid_nothing"), "default"),
                (other, shed(at), "shed-in-the-south"),
            ):
                error = await said(hand, what)
                assert error.reason is Reason.NOT_EXPORTED
                assert error.metadata["rule"] == rule
            # the same words whether there is such a thing or not
            gone = await said(ash, shed(at, actuator="grid_abcdefg"))
            none = await said(ash, shed(at, actuator="clinic_abcde"))
            assert str(gone).replace("grid_abcdefg", "X").replace("grid.abcdefg", "Y") == str(
                none
            ).replace("clinic_abcde", "X").replace("clinic.abcde", "Y")
            # a person's place is no neighbour's
            person = shed(at, priority=Priority.OPERATOR)
            assert (await said(ash, person)).reason is Reason.NOT_AUTHORISED
            assert at.told() == []

    bounded(story)


def test_a_city_without_a_rule_for_it_lets_nobody_act(tmp_path: Path) -> None:
    async def story() -> None:
        policy = POLICY.replace("acts: [live], ", "")
        async with birch(tmp_path, policy) as at, at.hand() as ash:
            error = await refusal(ash.select(shed(at), "neighbour", 9, WINDOW_NS))
            assert (error.reason, error.metadata["rule"]) == (Reason.NOT_EXPORTED, "default")

    bounded(story)


@pytest.mark.parametrize(
    ("who", "claims", "reason"),
    [
        (ASH_LOOP, "spiffe://ash/guard/g1", Reason.NOT_AUTHORISED),
        (Identity.generate("spiffe://ash/guard/g1"), "spiffe://ash/broker/main", None),
        (ASH_GUARD, "spiffe://ash/broker/main", None),
        (ASH_GUARD, "spiffe://cedar/guard/g1", Reason.NOT_EXPORTED),
        (ASH_GUARD, "", Reason.NOT_EXPORTED),
    ],
)
def test_nobody_but_the_neighbours_guard_lets_anything_happen(
    tmp_path: Path, who: Identity, claims: str, reason: Reason | None
) -> None:
    """Its broker may carry an order, and can't make one."""

    async def story() -> None:
        async with birch(tmp_path) as at, at.hand(who, claim=claims) as hand:
            what = shed(at)
            if who is ASH_GUARD and reason is None:
                await put(hand, what)
                await at.given(("S1", 2.0))
                return
            error = await refusal(hand.select(what, "neighbour", 9, WINDOW_NS))
            assert error.reason is (reason or Reason.NOT_AUTHORISED)
            assert at.told() == []

    bounded(story)


def test_what_was_signed_for_one_city_is_good_at_no_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand(name="cedar") as hand:
            error = await refusal(hand.select(shed(at), "neighbour", 9, WINDOW_NS))
            assert error.reason is Reason.NOT_AUTHORISED
            assert "not for birch" in error.message

    bounded(story)


def test_the_owners_limits_hold_for_neighbours_and_are_told_by_their_class_alone(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            epoch = await epoch_of(ash)
            now_ns = at.view.settled_ns
            for what, reason, limit in (
                (shed(at, mw={"S1": 3.5}), Reason.OUTSIDE_ENVELOPE, "range"),
                (shed(at, mw={"S1": float("nan")}), Reason.OUTSIDE_ENVELOPE, "range"),
                (shed(at, lease_min=200), Reason.NO_LEASE, ""),
                (shed(at, lease_min=0), Reason.NO_LEASE, ""),
                (shed(at, expires_min=2000), Reason.OUTSIDE_ENVELOPE, "freshness"),
                (replace(shed(at), expires_ns=now_ns), Reason.EXPIRED, ""),
                (replace(shed(at), setpoints=()), Reason.OUTSIDE_ENVELOPE, "granted"),
            ):
                error = await refusal(ash.select(what, "neighbour", epoch, WINDOW_NS))
                assert error.reason is reason, error
                assert error.metadata.get("limit", "") == limit
                assert "grid" not in error.message
                assert "utility" not in error.message
            stale = ash.select(shed(at), "neighbour", epoch - 1, WINDOW_NS)
            assert (await refusal(stale)).reason is Reason.STALE_EPOCH
            # it was refused, and the own loop has not lost its place by that
            assert at.guard.mode.value == "loop"
            assert {what for what, _ in at.notes} == {"petition refused"}
            await put(ash, shed(at))
            await at.given(("S1", 2.0))

    bounded(story)


def test_what_was_decided_on_a_state_that_has_moved_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            epoch = await epoch_of(ash)

            def hold(variable: str, high: float) -> tuple[Condition, ...]:
                return (Condition("neighbour", variable, "system", 0.0, high),)

            moved = shed(at, "b1", conditions=hold("grid_unserved", -1.0))
            error = await refusal(ash.select(moved, "neighbour", epoch, WINDOW_NS))
            assert (error.reason, "unserved" in error.message) == (Reason.STATE_MOVED, False)
            # a condition on what is told in steps would find out what it is
            coarse = shed(at, "b2", conditions=hold("grid_load_sum", 20.0))
            error = await refusal(ash.select(coarse, "neighbour", epoch, WINDOW_NS))
            assert error.reason is Reason.NOT_EXPORTED
            await put(ash, shed(at, "b3", conditions=hold("grid_unserved", 1e6)))
            await at.given(("S1", 2.0))

    bounded(story)


def test_a_dry_run_tells_what_may_be_set_in_what_ifs_from_what_may_be_set_in_the_city(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, policy = write_birch(tmp_path, POLICY)
    asked = ["policy", "explain", str(policy), "--as", "ash", "--purpose", "mutual-aid"]
    assert main([*asked, "--what", "grid.shed", "--scenario", str(scenario)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "grid.shed" in line]
    told = {(row[1], row[2] == "(live)", rule) for row in rows for rule in row if "-the-" in rule}
    assert told == {
        ("grid.shed", True, "shed-in-the-south"),
        ("grid.shed", False, "what-ifs-of-the-north"),
    }


# -- again, late, and half ------------------------------------------------------------------------


def test_the_same_again_gets_the_same_answer_and_acts_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            epoch = await epoch_of(ash)
            what = shed(at)
            first = await ash.select(what, "neighbour", epoch, WINDOW_NS)
            assert await ash.select(what, "neighbour", epoch, WINDOW_NS) == first
            # another life of the caller, under another id
            again = await ash.select(what, "neighbour", epoch, WINDOW_NS, request="again")
            assert again.until_ns == first.until_ns
            other = shed(at, mw={"S1": 1.0})
            for request in ("", "other"):
                asked = ash.select(other, "neighbour", epoch, WINDOW_NS, request=request)
                assert (await refusal(asked)).reason is Reason.REQUEST_DIFFERS
            operated = await ash.operate(what, "neighbour", epoch)
            assert await ash.operate(what, "neighbour", epoch) == operated
            await ash.confirm(what, "neighbour", epoch)
            await ash.confirm(what, "neighbour", epoch, request="confirmed again")
            await at.given(("S1", 2.0))
            await at.minutes(5)
            assert at.told() == [("S1", 2.0)]
            # what is over does not come back by being said again
            await ash.release("runs/ash-1", "neighbour", "b1")
            await at.given(("S1", 2.0), ("S1", 0.0))
            for ask in (ash.operate, ash.confirm):
                await ask(what, "neighbour", epoch, request=f"replayed {ask.__name__}")
            await at.minutes(5)
            assert at.told() == [("S1", 2.0), ("S1", 0.0)]

    bounded(story)


def test_when_the_line_is_cut_between_the_stages_nothing_is_half_applied(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, wire_to(at.broker) as wire:
            address = f"127.0.0.1:{wire.port}"
            async with Hand(address, ASH_GUARD, city=at.city, answer_s=0.5) as ash:
                epoch = await epoch_of(ash)
                what = shed(at, mw={"S1": 2.0, "S2": 1.0})
                short_ns = 10 * MINUTE_NS
                await ash.select(what, "neighbour", epoch, short_ns)
                wire.down()
                lost = await refusal(ash.operate(what, "neighbour", epoch))
                assert lost.reason in (Reason.UNREACHABLE, Reason.MEMBER_LOST)
                await at.minutes(15)
                wire.is_down = False
                late = await reached(ash, what, epoch)
                assert late.reason is Reason.BUNDLE_OVER
                assert at.told() == []
                # cut after it was operated: undone at the end of its window
                second = shed(at, "b2", {"S1": 2.0, "S2": 1.0})
                await ash.select(second, "neighbour", epoch, short_ns)
                await ash.operate(second, "neighbour", epoch)
                wire.down()
                await at.given(("S1", 2.0), ("S2", 1.0), ("S1", 0.0), ("S2", 0.0))

    bounded(story)


def test_what_one_member_refuses_is_undone_at_the_others(tmp_path: Path) -> None:
    """Two grids in one bundle: the second is stopped between the stages."""
    policy = POLICY.replace("actions: [grid.shed], entities: ['S*']", "actions: ['*.shed']")
    own = RULES[RULES.index("  grid.shed:") : RULES.index("values:")]
    rules = RULES.replace("values:", own.replace("grid", "other") + "values:")
    rules = rules.replace("of birch}", "of birch, other: another utility}")

    async def story() -> None:
        async with birch(tmp_path, policy, rules, more={"other": Grid}) as at, at.hand() as ash:
            epoch = await epoch_of(ash)
            one = shed(at)
            second = replace(one.setpoints[0], actuator="other_shed")
            what = replace(one, setpoints=(*one.setpoints, second))
            await ash.select(what, "neighbour", epoch, WINDOW_NS)
            async with Hand(at.places["other"], KIM) as kim:
                await kim.halt("storm")
            error = await refusal(ash.operate(what, "neighbour", epoch))
            assert error.reason is Reason.BUNDLE_OVER  # a stop undoes what was selected
            (desk,) = (await ash.look("runs/ash-1", "neighbour")).desks
            assert not desk.in_force
            assert [(b.bundle, b.phase) for b in desk.bundles] == [("b1", "over")]
            await at.minutes(3)
            # at most for the step that came in between
            assert at.told() in ([], [("S1", 2.0), ("S1", 0.0)])
            assert "ash:b1" not in at.guard.snapshot()["memory"]["open"]

    bounded(story)


async def reached(hand: Hand, what: Bundle, epoch: int) -> FederationError:
    """What a city says as soon as it can be asked again."""
    async with asyncio.timeout(10):
        while True:
            error = await refusal(hand.operate(what, "neighbour", epoch))
            if error.reason not in (Reason.UNREACHABLE, Reason.MEMBER_LOST):
                return error
            await asyncio.sleep(0.05)


def test_a_right_that_ends_between_the_stages_ends_the_bundle(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            epoch = await epoch_of(ash)
            what = shed(at)
            await ash.select(what, "neighbour", epoch, WINDOW_NS)
            text = at.policy.read_text(encoding="utf-8").replace("version: 1", "version: 2")
            at.policy.write_text(text.replace("acts: [live], ", ""), encoding="utf-8")
            await asyncio.sleep(1.0)
            error = await refusal(ash.operate(what, "neighbour", epoch))
            assert error.reason is Reason.NOT_EXPORTED
            # what is towards safety is heard from those who hold something
            await ash.release("runs/ash-1", "neighbour", "b1")
            assert at.told() == []

    bounded(story)


def test_the_owners_stop_ends_what_a_neighbour_has_set_and_refuses_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash, Hand(at.places["grid"], KIM) as kim:
            await put(ash, shed(at, "b1", lease_min=100))
            await at.given(("S1", 2.0))
            stop = await kim.halt("storm")
            await at.given(("S1", 2.0), ("S1", 0.0))
            epoch = await epoch_of(ash)
            error = await refusal(ash.select(shed(at, "b2"), "neighbour", epoch, WINDOW_NS))
            assert error.reason is Reason.HALTED
            assert "storm" not in error.message
            (desk,) = (await ash.look("runs/ash-1", "neighbour")).desks
            assert [(b.bundle, b.phase) for b in desk.bundles] == [("b1", "over")]
            await kim.lift([stop])
            await put(ash, shed(at, "b3"))
            await at.given(("S1", 2.0), ("S1", 0.0), ("S1", 2.0))

    bounded(story)


def test_a_person_of_the_owner_is_above_a_neighbour(tmp_path: Path) -> None:
    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash, Hand(at.places["grid"], KIM) as kim:
            (desk,) = (await kim.look()).desks
            person = Bundle(
                "kim-1",
                at.view.run,
                (Setpoint("grid", "shed", "S1", 1.0),),
                Priority.OPERATOR,
                0,
                1 << 60,
                "kim",
            )
            await kim.select(person, "grid", desk.epoch, WINDOW_NS)
            await kim.operate(person, "grid", desk.epoch)
            await kim.confirm(person, "grid", desk.epoch)
            await at.given(("S1", 1.0))
            epoch = await epoch_of(ash)
            error = await refusal(ash.select(shed(at), "neighbour", epoch, WINDOW_NS))
            assert error.reason is Reason.ACTUATOR_OWNED
            assert "kim" not in error.message
            assert at.told() == [("S1", 1.0)]
            # of what others hold a neighbour is told nothing
            (seen,) = (await ash.look("runs/ash-1", "neighbour")).desks
            assert not seen.in_force
            assert not seen.bundles

    bounded(story)


def test_the_owners_recovery_plan_finds_no_neighbour_in_its_way(tmp_path: Path) -> None:
    """What passed before does not begin any more, and what is in force is undone."""

    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            await put(ash, shed(at, "b1", lease_min=100))
            await at.given(("S1", 2.0))
            epoch = await epoch_of(ash)
            second = shed(at, "b2", {"S2": 1.0})
            await ash.select(second, "neighbour", epoch, WINDOW_NS)
            at.guard.mode = Mode.RECOVERY
            error = await refusal(ash.operate(second, "neighbour", epoch))
            assert (error.reason, error.metadata["limit"]) == (Reason.OUTSIDE_ENVELOPE, "recovery")
            assert await give_way(at.view) == ("ash:b1",)
            await at.given(("S1", 2.0), ("S1", 0.0))
            more = ash.select(shed(at, "b3"), "neighbour", epoch, WINDOW_NS)
            assert (await refusal(more)).metadata["limit"] == "recovery"

    bounded(story)


def test_without_a_guard_a_city_refuses_to_be_acted_on(tmp_path: Path) -> None:
    async def story() -> None:
        files = write_birch(tmp_path, POLICY)
        (port,) = free_ports(1)
        for guard in ("", f"127.0.0.1:{port}"):
            options = BrokerOptions(
                city="birch", export=files[1], city_scenario=files[0], grace_s=0.1, guard=guard
            )
            async with BrokerServer(options) as broker, AsyncExitStack() as stack:
                for name, twin in (("grid", Grid), ("clinic", Clinic)):
                    at, description = await stack.enter_async_context(
                        serving(twin, name, ServeOptions(grace_s=0.1))
                    )
                    stay = keep_name(broker.address, name, at, description, lambda _: None)
                    stack.push_async_callback(_gone, asyncio.create_task(stay))
                await broker.members_ready(["grid", "clinic"], 10)
                city = City("birch", "mutual-aid", "spiffe://ash/guard/g1")
                ash = await stack.enter_async_context(Hand(broker.address, ASH_GUARD, city=city))
                look = ash.look("runs/ash-1", "neighbour")
                assert (await refusal(look)).reason is Reason.NOT_LIVE  # no run either
                own = parse(BIRCH + "pace: {factor: 60}\n")
                live, task = await broker.begin(own, case_of(own, 11), None)
                error = await refusal(ash.look("runs/ash-1", "neighbour"))
                assert error.reason is (Reason.UNREACHABLE if guard else Reason.NOT_LIVE)
                await live.cancel()
                await asyncio.wait([task])

    bounded(story)


class Heard(peer_pb2_grpc.PetitionsServicer):
    """A guard that says yes to everything, and notes what it was asked."""

    def __init__(self) -> None:
        self.requests: list[peer_pb2.HearRequest] = []

    async def Hear(  # noqa: N802
        self,
        request: peer_pb2.HearRequest,
        context: grpc.aio.ServicerContext[peer_pb2.HearRequest, peer_pb2.HearResponse],
    ) -> peer_pb2.HearResponse:
        self.requests.append(request)
        return peer_pb2.HearResponse(receipt=twin_pb2.Receipt(phase="selected"))


def test_between_cities_that_show_certificates_the_guard_is_who_its_certificate_says(
    tmp_path: Path,
) -> None:
    """Its claim is not looked at; the broker reaches its own guard under its own identity."""
    birch_, ash_ = (certified(tmp_path / name, name) for name in ("birch", "ash"))
    for twin in ("grid", "clinic"):
        birch_.issue(Part.TWIN, twin)
    guard_home = ash_.folder / "guard" / "loop"
    for home, other in ((birch_.folder / "broker" / "main", ash_), (guard_home, birch_)):
        (home / "peers").mkdir()
        there = home / "peers" / f"{other.city}.crt"
        there.write_bytes((other.folder / "ca.crt").read_bytes())

    async def story() -> None:
        files = write_birch(tmp_path, POLICY)
        async with AsyncExitStack() as stack:
            heard = Heard()
            with guise(birch_.folder / "guard" / "loop"):
                server = new_server(1 << 20)
                peer_pb2_grpc.add_PetitionsServicer_to_server(heard, server)
                guard, _ = await start_server(server, (SERVICE,), "127.0.0.1", 0)
                stack.push_async_callback(server.stop, None)
            options = BrokerOptions(
                city="birch", export=files[1], city_scenario=files[0], grace_s=0.1, guard=guard
            )
            broker = await stack.enter_async_context(broker_of(birch_.folder, options))
            for name, twin in (("grid", Grid), ("clinic", Clinic)):
                home = birch_.folder / "twin" / name
                await stack.enter_async_context(served_as(home, name, twin, broker.address))
            await broker.members_ready(["grid", "clinic"], 10)
            own = parse(BIRCH + "pace: {factor: 60}\n")
            with guise(birch_.folder / "broker" / "main"):
                live, task = await broker.begin(own, case_of(own, 11), None)
            stack.push_async_callback(asyncio.wait, [task])
            stack.push_async_callback(live.cancel)
            what = Bundle(
                "b1",
                "runs/ash-1",
                (Setpoint("neighbour", "grid_shed", "S1", 2.0, MINUTE_NS),),
                Priority.AUTONOMOUS,
                0,
                1 << 60,
                "ash-loop",
            )
            with guise(guard_home):
                city = City("birch", "mutual-aid", "spiffe://cedar/guard/thief")
                ash = Hand(broker.address, ASH_GUARD, city=city)
            async with ash:
                await ash.select(what, "neighbour", 1, WINDOW_NS)
            (request,) = heard.requests
            assert request.reader == "spiffe://ash/guard/loop"
            assert request.bundle.id == "ash:b1"
            assert [(s.member, s.actuator) for s in request.bundle.setpoints] == [("grid", "shed")]
            assert request.bundle.basis == what.digest()
            # nobody of ash but its broker and its guard is heard at all
            for part, person in ((Part.OPERATOR, "ann"), (Part.PLANNER, "pat")):
                home = ash_.folder / part / person
                (home / "peers").mkdir()
                there = home / "peers" / "birch.crt"
                there.write_bytes((birch_.folder / "ca.crt").read_bytes())
                with guise(home):
                    hand = Hand(broker.address, ASH_GUARD, city=city)
                async with hand:
                    error = await refusal(hand.select(what, "neighbour", 1, WINDOW_NS))
                assert error.reason is Reason.NOT_AUTHORISED
            assert len(heard.requests) == 1

    bounded(story)


def test_hostile_orders_are_refused_with_a_reason(tmp_path: Path) -> None:
    """Bytes that are no order, orders of kinds that a city does not take, and no order at all."""

    async def story() -> None:
        async with birch(tmp_path) as at, at.hand() as ash:
            stub = ash._stub

            async def said(signed: twin_pb2.Signed) -> Reason:
                async with ash._calling():
                    await stub.Select(
                        twin_pb2.SelectRequest(signed=signed),
                        metadata=claim("spiffe://ash/guard/g1"),
                        timeout=5,
                    )
                raise AssertionError("it was not refused")

            halt = twin_pb2.Order(request="h", city="birch", purpose="mutual-aid")
            halt.halt.reason = "because"
            for signed, reason in (
                (twin_pb2.Signed(order=b"\xff\xff"), Reason.INVALID_FRAME),
                (twin_pb2.Signed(), Reason.NOT_AUTHORISED),
                (ASH_GUARD.sign(halt), Reason.NOT_AUTHORISED),
            ):
                assert (await refusal(said(signed))).reason is reason
            assert at.told() == []

    bounded(story)
