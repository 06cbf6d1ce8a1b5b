"""What a city lets its peers have, told from the side of those who ask."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.__main__ import main
from federation.broker.server import BrokerOptions, BrokerServer
from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.export import Interior, Lens, export_of
from federation.peer.policy import (
    Code,
    Declaration,
    Policy,
    Question,
    Sort,
    Thing,
    decide,
    read_policy,
)
from federation.peer.reader import Reader, matches
from federation.peer.standing import PolicyFile, declarations_of, declare
from federation.twin import MINUTE_NS, SYSTEM, Entity, Risk, StepInput
from federation.v1 import peer_pb2, peer_pb2_grpc
from federation.wire.caller import claim
from federation.wire.link import Errand, Link, LinkOptions
from tests.cities import HOSPITALS, STATIONS, Clinic, Grid, write_birch
from tests.test_wire import bounded

POLICY = """
version: 7
step_min: 5
areas:
  north: {box: [-91, 35.2, -89, 36]}
  airport: {entities: [S2]}
emergencies:
  quake: {by: ["Kim *", duty], most_h: 6}
  attack: {by: [duty], most_h: 48}
rules:
  - name: hospitals-stay-ours
    effect: deny
    who: ['*']
    what: {variables: ['*'], kinds: [hospital]}
    why: what hospitals do is told by themselves
  - name: patients-never
    effect: deny
    always: true
    who: ['*']
    what: {variables: [clinic.diagnoses], events: ['clinic.*']}
    why: patients are nobody's figures
  - name: no-research
    effect: deny
    who: ['*']
    what: {variables: ['grid.*']}
    purpose: [research]
  - name: what-ifs
    who: [ash, cedar, elm]
    what: {sessions: [what-if]}
  - name: live-look
    who: ["spiffe://ash/peer/broker"]
    what: {sessions: [live]}
    purpose: [mutual-aid]
  - name: north-as-it-is
    who: [ash]
    what: {variables: [grid.load], areas: [north]}
    purpose: [mutual-aid, drill]
  - name: load-in-total
    who: [ash, cedar]
    what: {variables: [grid.load]}
    purpose: [mutual-aid, drill, planning]
    resolution: {space: sum, window_min: 15, round_to: 0.5}
  - name: lack-by-day
    who: [cedar]
    what: {variables: [grid.unserved]}
    hours: {from: '08:00', to: 20:00, days: [mon, tue, wed, thu, fri], zone: America/Chicago}
  - name: lack-at-night
    who: [cedar]
    what: {variables: [grid.unserved]}
    hours: {from: 22:00, to: '06:00', days: [fri, sat]}
    resolution: {delay_min: 30}
  - name: lack
    who: ["spiffe://ash/peer/*"]
    what: {variables: [grid.unserved]}
  - name: beds-after-quake
    emergency: quake
    who: [ash, "spiffe://cedar/peer/*"]
    what: {variables: [clinic.beds_free]}
  - name: lockdown
    effect: deny
    emergency: attack
    who: ['*']
    what: {sessions: [what-if, live], variables: ['*']}
    why: the city is under attack
  - name: tie-line
    who: [ash]
    what: {inputs: [grid.tie]}
    purpose: [mutual-aid]
  - name: may-shed
    who: [ash]
    what: {actions: [grid.shed], risk: [low, medium], entities: ['S*']}
  - name: harmless
    who: [elm]
    what: {actions: ['*'], risk: [low]}
  - name: shortages
    who: [ash]
    what: {events: [grid.short_of_power]}
    resolution: {delay_min: 15, text: true}
  - name: tie-in-plans
    who: ["spiffe://ash/peer/broker"]
    what: {flexibility: [grid.tie]}
    purpose: [mutual-aid]
  - name: what-cedar-says
    who: [ash]
    what: {variables: [cedar.*]}
    relay: true
  - name: all-of-ours
    who: [elm]
    what: {variables: ['*']}
"""

RULES = read_policy(POLICY)
ASH = "spiffe://ash/peer/broker"
ASH_SPARE = "spiffe://ash/peer/spare"
KIM = "spiffe://ash/operator/kim"
CEDAR = "spiffe://cedar/peer/broker"
ELM = "elm"
OAK = "spiffe://oak/peer/broker"
AID, DRILL, PLANNING, RESEARCH = "mutual-aid", "drill", "planning", "research"

N1, S1, S2 = STATIONS[0], STATIONS[2], STATIONS[3]
H1 = HOSPITALS[0]
NOWHERE = Entity("N9", "station")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NOON = at("2026-03-04T12:00")
"""A Wednesday; six in the morning in Chicago."""

QUAKE = Declaration(
    "quake", "Kim Lee", "magnitude 7.7", NOON - timedelta(hours=1), NOON + timedelta(hours=3)
)
ATTACK = Declaration(
    "attack", "duty", "intruders", NOON - timedelta(hours=1), NOON + timedelta(hours=3)
)


@dataclass(frozen=True)
class Gets:
    """The rule that lets the reader have it, and how finely."""

    rule: str
    how: str = "as it is"


@dataclass(frozen=True)
class Refused:
    """The rule by which it is refused, and why."""

    rule: str
    code: Code


@dataclass(frozen=True)
class Case:
    story: str
    who: str
    sort: Sort
    name: str
    entity: Entity | None
    answer: Gets | Refused
    purpose: str = ""
    when: datetime = NOON
    declared: tuple[Declaration, ...] = ()
    risk: Risk = Risk.HIGH
    is_relayed: bool = False


V, SET, E, A, F, S = (
    Sort.VARIABLE,
    Sort.INPUT,
    Sort.EVENT,
    Sort.ACTION,
    Sort.FLEXIBILITY,
    Sort.SESSION,
)
SYS = Entity(SYSTEM, SYSTEM)
DENIED, NOT_LISTED, PURPOSE, HOURS, NO_EMERGENCY = (
    Code.DENIED,
    Code.NOT_LISTED,
    Code.WRONG_PURPOSE,
    Code.OUTSIDE_HOURS,
    Code.NO_EMERGENCY,
)
HOSPITALS_OURS = Refused("hospitals-stay-ours", DENIED)
NEVER = Refused("patients-never", DENIED)
DEFAULT = Refused("default", NOT_LISTED)
TOTAL = Gets("load-in-total", "sum in total, mean of 15 min, in steps of 0.5")
NIGHT = at("2026-03-04T03:00")

CASES = [
    # hospitals
    Case("an operator in ash asks for the load of a hospital in birch at 03:00", KIM, V,
         "grid.hospital_load", H1, HOSPITALS_OURS, when=NIGHT),
    Case("the broker of ash asks for it, for mutual aid", ASH, V, "grid.hospital_load", H1,
         HOSPITALS_OURS, AID),
    Case("elm, which may have all of ours, asks for it", ELM, V, "grid.hospital_load", H1,
         HOSPITALS_OURS),
    Case("a city that nobody has named asks for it", OAK, V, "grid.hospital_load", H1,
         HOSPITALS_OURS),
    Case("ash asks for free beds on a quiet day", ASH, V, "clinic.beds_free", H1, HOSPITALS_OURS),
    Case("ash asks for free beds after the quake", ASH, V, "clinic.beds_free", H1,
         Gets("beds-after-quake"), declared=(QUAKE,)),
    Case("so does its spare broker", ASH_SPARE, V, "clinic.beds_free", H1,
         Gets("beds-after-quake"), declared=(QUAKE,)),
    Case("an operator of ash does, who is no broker", KIM, V, "clinic.beds_free", H1,
         HOSPITALS_OURS, declared=(QUAKE,)),
    Case("cedar does", CEDAR, V, "clinic.beds_free", H1, Gets("beds-after-quake"),
         declared=(QUAKE,)),
    Case("elm does, for which the emergency changes nothing", ELM, V, "clinic.beds_free", H1,
         HOSPITALS_OURS, declared=(QUAKE,)),
    Case("ash asks four hours after the emergency has ended", ASH, V, "clinic.beds_free", H1,
         HOSPITALS_OURS, when=NOON + timedelta(hours=7), declared=(QUAKE,)),
    Case("ash asks in the minute before it begins", ASH, V, "clinic.beds_free", H1,
         HOSPITALS_OURS, when=NOON - timedelta(minutes=61), declared=(QUAKE,)),
    Case("somebody declared it who may not", ASH, V, "clinic.beds_free", H1, HOSPITALS_OURS,
         declared=(replace(QUAKE, by="Sam"),)),
    Case("it was declared for a week, which holds for six hours: ash asks in the fifth", ASH, V,
         "clinic.beds_free", H1, Gets("beds-after-quake"), when=NOON + timedelta(hours=4),
         declared=(replace(QUAKE, end=NOON + timedelta(days=7)),)),
    Case("and in the seventh", ASH, V, "clinic.beds_free", H1, HOSPITALS_OURS,
         when=NOON + timedelta(hours=6),
         declared=(replace(QUAKE, end=NOON + timedelta(days=7)),)),
    Case("ash asks after another emergency", ASH, V, "clinic.beds_free", H1,
         HOSPITALS_OURS, declared=(replace(QUAKE, emergency="flood"),)),
    Case("ash asks for diagnoses", ASH, V, "clinic.diagnoses", H1, NEVER),
    Case("ash asks for diagnoses after the quake", ASH, V, "clinic.diagnoses", H1, NEVER, AID,
         declared=(QUAKE,)),
    Case("ash asks to hear of full hospitals", ASH, E, "clinic.hospital_full", H1, NEVER),
    Case("elm asks for diagnoses of a hospital that there isn't", ELM, V, "clinic.diagnoses",
         Entity("H9", "hospital"), NEVER),
    # load, by place, by purpose
    Case("ash asks for a station in the north, to help", ASH, V, "grid.load", N1,
         Gets("north-as-it-is"), AID),
    Case("for a drill", ASH, V, "grid.load", N1, Gets("north-as-it-is"), DRILL),
    Case("for planning: the total is enough", ASH, V, "grid.load", N1, TOTAL, PLANNING),
    Case("and says no purpose", ASH, V, "grid.load", N1, Refused("no-research", DENIED)),
    Case("ash asks for a station in the south, to help", ASH, V, "grid.load", S1, TOTAL, AID),
    Case("for research", ASH, V, "grid.load", S1, Refused("no-research", DENIED), RESEARCH),
    Case("for a purpose that nobody knows", ASH, V, "grid.load", S1,
         Refused("load-in-total", PURPOSE),
         "curiosity"),
    Case("for a station in the north, out of curiosity", ASH, V, "grid.load", N1,
         Refused("north-as-it-is", PURPOSE), "curiosity"),
    Case("cedar asks for a station in the north, to help", CEDAR, V, "grid.load", N1, TOTAL, AID),
    Case("cedar asks for one without a place", CEDAR, V, "grid.load", NOWHERE, TOTAL, AID),
    Case("ash asks for one without a place: it is in no area", ASH, V, "grid.load", NOWHERE,
         TOTAL, AID),
    Case("elm, which may have all, asks for a station for planning", ELM, V, "grid.load", S2,
         Gets("all-of-ours"), PLANNING),
    Case("elm asks for research", ELM, V, "grid.load", S2, Refused("no-research", DENIED),
         RESEARCH),
    Case("oak asks for a station", OAK, V, "grid.load", S2, DEFAULT, AID),
    Case("nobody asks for a station", "", V, "grid.load", S2, DEFAULT, AID),
    Case("an operator of ash asks for a station", KIM, V, "grid.load", N1, DEFAULT, AID),
    Case("somebody whose city is called ash-not", "spiffe://ash-not/peer/broker", V, "grid.load",
         N1, DEFAULT, AID),
    Case("somebody who has ash in the path", "spiffe://oak/peer/ash", V, "grid.load", N1, DEFAULT,
         AID),
    Case("somebody whose plain name is a pattern", "a*", V, "grid.load", N1, DEFAULT, AID),
    # hours
    Case("cedar asks what is unserved at noon UTC, 6:00 in Chicago", CEDAR, V, "grid.unserved",
         SYS, Refused("lack-by-day", HOURS), AID),
    Case("at 8:00 in Chicago", CEDAR, V, "grid.unserved", SYS, Gets("lack-by-day"), AID,
         at("2026-03-04T14:00")),
    Case("a minute before", CEDAR, V, "grid.unserved", SYS, Refused("lack-by-day", HOURS), AID,
         at("2026-03-04T13:59")),
    Case("at 20:00 in Chicago", CEDAR, V, "grid.unserved", SYS, Refused("lack-by-day", HOURS),
         AID, at("2026-03-05T02:00")),
    Case("at 8:00 in Chicago when clocks have gone forward", CEDAR, V, "grid.unserved", SYS,
         Gets("lack-by-day"), AID, at("2026-07-01T13:00")),
    Case("on a Saturday afternoon", CEDAR, V, "grid.unserved", SYS,
         Refused("lack-by-day", HOURS), AID, at("2026-03-07T18:00")),
    Case("on Saturday at 23:00", CEDAR, V, "grid.unserved", SYS,
         Gets("lack-at-night", "30 min late"), AID, at("2026-03-07T23:00")),
    Case("in the night to Sunday at 05:00, which is Saturday's", CEDAR, V, "grid.unserved", SYS,
         Gets("lack-at-night", "30 min late"), AID, at("2026-03-08T05:00")),
    Case("in the night to Friday at 05:00, which is Thursday's", CEDAR, V, "grid.unserved", SYS,
         Refused("lack-by-day", HOURS), AID, at("2026-03-06T05:00")),
    Case("on Sunday at 06:00, when the night is over", CEDAR, V, "grid.unserved", SYS,
         Refused("lack-by-day", HOURS), AID, at("2026-03-08T06:00")),
    Case("ash asks what is unserved at 03:00", ASH, V, "grid.unserved", SYS, Gets("lack"), AID,
         NIGHT),
    # sessions
    Case("ash asks for a what-if", ASH, S, "what-if", None, Gets("what-ifs")),
    Case("its broker does under a certificate that calls it one", "spiffe://ash/broker/main", S,
         "what-if", None, Gets("what-ifs")),
    Case("somebody of ash whose role only begins like one", "spiffe://ash/peerless/x", S,
         "what-if", None, DEFAULT),
    Case("an operator of ash does", KIM, S, "what-if", None, DEFAULT),
    Case("oak does", OAK, S, "what-if", None, DEFAULT),
    Case("ash asks to look at the live run, to help", ASH, S, "live", None, Gets("live-look"),
         AID),
    Case("ash asks to look at it and does not say why", ASH, S, "live", None,
         Refused("live-look", PURPOSE)),
    Case("the spare broker of ash asks to look at it", ASH_SPARE, S, "live", None, DEFAULT, AID),
    Case("cedar asks to look at it", CEDAR, S, "live", None, DEFAULT, AID),
    Case("ash asks for a what-if while the city is under attack", ASH, S, "what-if", None,
         Refused("lockdown", DENIED), declared=(ATTACK,)),
    Case("and for beds, after the quake and under attack", ASH, V, "clinic.beds_free", H1,
         Refused("lockdown", DENIED), declared=(QUAKE, ATTACK)),
    # what may be set
    Case("ash wants to set the tie line in a what-if, to help", ASH, SET, "grid.tie", SYS,
         Gets("tie-line"), AID),
    Case("for planning", ASH, SET, "grid.tie", SYS, Refused("tie-line", PURPOSE), PLANNING),
    Case("cedar wants to", CEDAR, SET, "grid.tie", SYS, DEFAULT, AID),
    Case("ash wants to set what it may read", ASH, SET, "grid.load", N1, DEFAULT, AID),
    Case("ash wants to shed load in the south", ASH, A, "grid.shed", S1, Gets("may-shed"),
         risk=Risk.MEDIUM),
    Case("in the north", ASH, A, "grid.shed", N1, DEFAULT, risk=Risk.MEDIUM),
    Case("and if it were a danger to life", ASH, A, "grid.shed", S1, DEFAULT, risk=Risk.HIGH),
    Case("ash wants to open a breaker", ASH, A, "grid.open_breaker", S1, DEFAULT),
    Case("elm, which may do what is harmless, wants to shed load", ELM, A, "grid.shed", S1,
         DEFAULT, risk=Risk.MEDIUM),
    Case("elm does something harmless", ELM, A, "grid.ring_bell", S1, Gets("harmless"),
         risk=Risk.LOW),
    # events, plans, what comes from elsewhere
    Case("ash hears that power is short, a quarter of an hour later", ASH, E,
         "grid.short_of_power", SYS, Gets("shortages", "15 min late, in words")),
    Case("that it is back", ASH, E, "grid.supplied_again", SYS, DEFAULT),
    Case("elm, which may see all variables, asks for events", ELM, E, "grid.short_of_power", SYS,
         DEFAULT),
    Case("ash asks what the tie line could do in a plan", ASH, F, "grid.tie", None,
         Gets("tie-in-plans"), AID),
    Case("what the stations could do", ASH, F, "grid.load", None, DEFAULT, AID),
    Case("ash asks what birch has from cedar", ASH, V, "cedar.grid_load", SYS,
         Gets("what-cedar-says"), is_relayed=True),
    Case("elm asks for it, which may have all that is birch's own", ELM, V, "cedar.grid_load", SYS,
         DEFAULT, is_relayed=True),
    Case("elm asks for something that there isn't", ELM, V, "grid.gold", SYS, Gets("all-of-ours"),
         PLANNING),
    Case("oak asks for something that there isn't", OAK, V, "grid.gold", SYS, DEFAULT, AID),
    Case("and does not say why, as who does research might not", OAK, V, "grid.gold", SYS,
         Refused("no-research", DENIED)),
]  # fmt: skip


def question(case: Case) -> Question:
    return Question(Reader(case.who), case.purpose, case.when, case.declared)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.story)
def test_a_reader_gets_what_a_rule_lets_it_have(case: Case) -> None:
    thing = Thing(case.sort, case.name, case.entity, case.risk, case.is_relayed)
    decision = decide(RULES, question(case), thing)
    if isinstance(case.answer, Gets):
        assert (decision.allowed, decision.rule) == (True, case.answer.rule)
        assert str(decision.resolution) == case.answer.how
    else:
        assert (decision.allowed, decision.rule, decision.code) == (
            False,
            case.answer.rule,
            case.answer.code,
        )
        assert decision.reason
        assert case.entity is None or case.entity.id not in decision.reason


def test_there_are_enough_cases_and_no_two_of_one_name() -> None:
    assert len({case.story for case in CASES}) == len(CASES) >= 60


# -- what a refusal tells ------------------------------------------------------------------


@pytest.mark.parametrize("who", [ASH, KIM, CEDAR, ELM, OAK, ""])
@pytest.mark.parametrize("sort", list(Sort))
def test_a_refusal_is_the_same_for_what_there_is_and_what_there_is_not(
    who: str, sort: Sort
) -> None:
    """A reader asks by names. It could not tell from the answers which of them name something."""
    asked = Question(Reader(who), AID, NOON)
    there, not_there = (decide(RULES, asked, Thing(sort, f"grid.{n}")) for n in ("secret", "gold"))
    assert replace(there, reason="") == replace(not_there, reason="")
    assert there.reason.replace("secret", "gold") == not_there.reason


def test_an_empty_policy_shares_nothing_with_anybody() -> None:
    """LEVEL45 7."""
    empty = Policy(version=1)
    for case in CASES:
        thing = Thing(case.sort, case.name, case.entity, case.risk)
        decision = decide(empty, question(case), thing)
        assert (decision.allowed, decision.rule) == (False, "default")


# -- what goes out ---------------------------------------------------------------------------


def interior() -> Interior:
    descriptions = {"grid": Grid().describe(), "clinic": Clinic().describe()}
    unfed = {("grid", "tie"): (0,), ("clinic", "power"): ()}
    return Interior("birch", descriptions, {}, unfed)


def seen_by(
    who: str, purpose: str = AID, *declared: Declaration, when: datetime = NOON
) -> set[str]:
    """Everything that a reader's description has, in words: member variables with their
    entities."""
    asked = Question(Reader(who), purpose, when, declared)
    description = export_of(interior(), RULES, asked, "what-if").description
    return {f"{v.name}[{id_}]" for v in description.variables for id_ in description.ids(v.kind)}


def test_a_description_has_nothing_that_its_reader_may_not_have() -> None:
    """LEVEL45 7."""
    assert seen_by(ASH) == {
        "grid_load[N1]",
        "grid_load[N2]",
        "grid_load_sum[system]",
        "grid_unserved[system]",
        "grid_tie[system]",
    }
    assert seen_by(ASH, AID, QUAKE) >= {"clinic_beds_free[H1]", "clinic_beds_free[H2]"}
    assert seen_by(CEDAR) == {"grid_load_sum[system]"}
    assert not seen_by(OAK)
    assert not seen_by(ASH, AID, ATTACK)
    description = export_of(
        interior(), RULES, Question(Reader(CEDAR), AID, NOON), "what-if"
    ).description
    assert (description.entities, description.actuators) == ((), ())
    for word in ("secret", "clinic", "served", "shed", "H1", "N1", "St. Anne"):
        assert word not in str(description)


def test_actuators_are_told_of_with_those_entities_that_may_be_set() -> None:
    asked = Question(Reader(ASH), "", NOON)
    export = export_of(interior(), RULES, asked, "what-if")
    (shed,) = export.description.actuators
    assert (shed.name, export.description.ids(shed.kind)) == ("grid_shed", ("S1", "S2"))
    assert not export_of(interior(), RULES, asked, "live").description.actuators


def told(resolution: str, minutes: int = 30) -> list[tuple[int, list[float]]]:
    """What a reader is told of a load of [m, 2m, 3m, 4m] in minute m, and when."""
    policy = read_policy(
        "version: 1\nstep_min: 5\nareas: {north: {box: [-91, 35.2, -89, 36]}, south: {entities: "
        "['S*']}}\nrules:\n  - {name: s, who: [ash], what: {sessions: [what-if]}}\n"
        f"  - {{name: r, who: [ash], what: {{variables: [grid.load]}}, resolution: {resolution}}}"
    )
    asked = Question(Reader("ash"), "", NOON)
    lens = Lens(export_of(interior(), policy, asked, "what-if").views)
    found: list[tuple[int, list[float]]] = []
    for minute in range(0, minutes + 1, 5):
        load = minute * np.array([1.0, 2.0, 3.0, 4.0])
        now = lens.see(minute * MINUTE_NS, {("grid", "load"): load})
        found += [(minute, value.tolist()) for value in now.values()]
    return found


def test_what_is_told_is_gathered_rounded_and_late_before_anything_leaves() -> None:
    assert told("{}", 5) == [(0, [0.0, 0.0, 0.0, 0.0]), (5, [5.0, 10.0, 15.0, 20.0])]
    assert told("{space: sum}", 5) == [(0, [0.0]), (5, [50.0])]
    assert told("{space: mean, by: area}", 5)[1] == (5, [7.5, 17.5])
    assert told("{space: max, by: area, at_least: 3}", 5) == []
    assert told("{round_to: 4}", 5)[1] == (5, [4.0, 8.0, 16.0, 20.0])
    assert told("{space: sum, window_min: 15}") == [(15, [100.0]), (30, [250.0])]
    assert told("{space: sum, window_min: 15, take: max}") == [(15, [150.0]), (30, [300.0])]
    assert told("{space: sum, delay_min: 10}", 20) == [(10, [0.0]), (15, [50.0]), (20, [100.0])]
    assert told("{space: sum, window_min: 10, delay_min: 10, round_to: 100}") == [
        (20, [100.0]),
        (30, [200.0]),
    ]


words = st.sampled_from(["*", "grid.*", "grid.load", "*.load", "clinic.*", "x.y"])
wheres = st.fixed_dictionaries(
    {},
    optional={
        "kinds": st.lists(st.sampled_from(["station", "hospital", "*"]), max_size=2),
        "entities": st.lists(st.sampled_from(["N*", "S1", "*2"]), max_size=2),
        "areas": st.lists(st.sampled_from(["north", "airport"]), max_size=2),
    },
)
resolutions: st.SearchStrategy[dict[str, object]] = st.sampled_from(
    [{}, {"space": "sum"}, {"space": "mean", "by": "area"}, {"round_to": 2.0}, {"delay_min": 5}]
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    rules: list[dict[str, object]] = [
        {"name": "s", "who": ["ash"], "what": {"sessions": ["what-if"]}}
    ]
    for number in range(draw(st.integers(0, 6))):
        denies = draw(st.booleans())
        rule: dict[str, object] = {
            "name": f"r{number}",
            "who": draw(st.sampled_from([["ash"], ["*"], ["oak"]])),
            "what": {"variables": [draw(words)], **draw(wheres)},
            "effect": "deny" if denies else "allow",
        }
        if not denies:
            rule["resolution"] = draw(resolutions)
        rules.append(rule)
    areas = {"north": {"box": [-91, 35.2, -89, 36]}, "airport": {"entities": ["S2"]}}
    return Policy.model_validate({"version": 1, "areas": areas, "rules": rules})


@given(policies())
def test_each_entity_leaves_by_one_rule_at_most_and_by_one_that_allows_it(policy: Policy) -> None:
    """Else what one rule gives, subtracted from what another does, would be what none does."""
    asked = Question(Reader("ash"), "", NOON)
    inside = interior()
    export = export_of(inside, policy, asked, "what-if")
    left: dict[tuple[str, str, int], str] = {}
    for view in export.views:
        for column in (column for group in view.groups for column in group):
            assert left.setdefault((view.member, view.variable, column), view.rule) == view.rule
    for member, description in inside.descriptions.items():
        for variable in description.outputs():
            entities = [e for e in description.entities if e.kind == variable.kind] or [SYS]
            for column, entity in enumerate(entities):
                thing = Thing(V, f"{member}.{variable.name}", entity)
                decision = decide(policy, asked, thing)
                rule = left.get((member, variable.name, column))
                is_grouped = decision.resolution.by == "area"
                if decision.allowed and not is_grouped:
                    assert rule == decision.rule
                elif rule is not None:
                    assert decision.allowed
    names = [v.name for v in export.description.variables]
    assert len(set(names)) == len(names) == len(export.views)


@given(policies(), policies())
def test_a_denial_more_never_shows_more(policy: Policy, other: Policy) -> None:
    asked = Question(Reader("ash"), "", NOON)
    denials = [rule for rule in other.rules if rule.denies]
    renamed = tuple(rule.model_copy(update={"name": f"d-{rule.name}"}) for rule in denials)
    stricter = policy.model_copy(update={"rules": (*policy.rules, *renamed)})
    for entity in (*STATIONS, *HOSPITALS):
        thing = Thing(V, "grid.load", entity)
        before, after = decide(policy, asked, thing), decide(stricter, asked, thing)
        assert before.allowed or not after.allowed


@given(st.text("ab*", max_size=8), st.text("ab", max_size=8))
def test_a_pattern_matches_as_its_plain_meaning_says(pattern: str, text: str) -> None:
    def means(p: str, t: str) -> bool:
        if not p:
            return not t
        if p[0] == "*":
            return means(p[1:], t) or (bool(t) and means(p, t[1:]))
        return bool(t) and p[0] == t[0] and means(p[1:], t[1:])

    assert matches(pattern, text) == means(pattern, text)


# -- documents that are wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason", "line", "says"),
    [
        ("version: 1\nruels: []", Reason.UNKNOWN_KEY, 2, "did you mean 'rules'"),
        ("rules: []", Reason.POLICY_INVALID, 1, "version"),
        ("version: 1\nrules: [{name: x}]", Reason.POLICY_INVALID, 2, "who"),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {}}",
            Reason.POLICY_INVALID,
            3,
            "say what",
        ),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {variables: [load]}}",
            Reason.POLICY_INVALID,
            3,
            "member.variable",
        ),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {variables: [a.b], areas: [n]}}",
            Reason.POLICY_INVALID,
            1,
            "there are none",
        ),
        (
            "version: 1\nrules:\n  - {name: default, who: [a], what: {variables: [a.b]}}",
            Reason.POLICY_INVALID,
            3,
            "another name",
        ),
        (
            "version: 1\nstep_min: 5\nrules:\n  - {name: x, who: [a], what: {variables: [a.b]}, "
            "resolution: {window_min: 7}}",
            Reason.POLICY_INVALID,
            1,
            "no multiple",
        ),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {variables: [a.b]}, effect: deny, "
            "resolution: {space: sum}}",
            Reason.POLICY_INVALID,
            3,
            "no resolution",
        ),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {variables: [a.b]}, hours: "
            "{zone: Middle/Earth}}",
            Reason.POLICY_INVALID,
            3,
            "no time zone",
        ),
        (
            "version: 1\nrules:\n  - {name: x, who: [a], what: {variables: [a.b]}, emergency: q}",
            Reason.POLICY_INVALID,
            1,
            "'q'",
        ),
        ("version: 1\nrules: [", Reason.POLICY_INVALID, 2, ""),
        ("- 1", Reason.POLICY_INVALID, 1, "mapping"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_with_its_line(
    wrong: str, reason: Reason, line: int, says: str
) -> None:
    with pytest.raises(ScenarioError) as caught:
        read_policy(wrong, "p.yaml")
    assert caught.value.reason is reason
    assert caught.value.metadata["line"] == str(line)
    assert says in caught.value.message


# -- the file in force ---------------------------------------------------------------------------


def test_a_broken_file_changes_nothing_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY, encoding="utf-8")
    said: list[str] = []
    held = PolicyFile(file, said.append, lambda: NOON)
    file.write_text(POLICY.replace("who: [ash]", "whom: [ash]"), encoding="utf-8")
    held.look()
    assert held.policy == RULES
    assert "whom" in held.problem
    assert "version 7 stays in force" in said[-1]
    file.write_text(POLICY.replace("version: 7", "version: 8"), encoding="utf-8")
    held.look()
    assert (held.policy.version, held.problem) == (8, "")
    file.unlink()
    held.look()
    assert held.policy.version == 8
    assert "can't be read" in held.problem


def test_an_emergency_is_declared_by_name_is_on_record_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY, encoding="utf-8")
    for who, hours, why, reason in (
        ("Sam", 1.0, "because", Reason.NOT_AUTHORISED),
        ("Kim Lee", 9.0, "because", Reason.NOT_AUTHORISED),
        ("Kim Lee", 1.0, " ", Reason.SCENARIO_INVALID),
    ):
        with pytest.raises(ScenarioError) as caught:
            declare(file, "quake", who, why, hours, NOON)
        assert caught.value.reason is reason
    said: list[str] = []
    times = [NOON]
    held = PolicyFile(file, said.append, lambda: times[0])
    beds = Thing(V, "clinic.beds_free", H1)

    def may() -> bool:
        return decide(held.policy, held.question(Reader(ASH), ""), beds).allowed

    assert not may()
    declare(file, "quake", "Kim Lee", "magnitude 7.7", 2.0, NOON)
    held.look()
    assert may()
    assert "Kim Lee" in said[-1]
    assert "magnitude 7.7" in said[-1]
    times[0] = NOON + timedelta(hours=2)
    held.look()
    assert not may()
    assert said[-1] == "emergency quake is over"
    declare(file, "quake", "duty", "aftershock", 2.0, times[0])
    held.look()
    assert may()
    declare(file, "quake", "duty", "it was a lorry", 0.0, times[0])
    held.look()
    assert not may()
    assert len(declarations_of(file).read_text(encoding="utf-8").splitlines()) == 3


# -- the commands ----------------------------------------------------------------------------------


def test_the_commands_explain_a_policy_without_asking_anybody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, file = write_birch(tmp_path, POLICY)
    assert main(["policy", "check", str(file), "--scenario", str(scenario)]) == 0
    out = capsys.readouterr().out
    assert "version 7, 19 rules, 4 of them denials" in out
    assert "in vain: rule what-cedar-says: the city has no variable cedar.*" in out
    command = ["policy", "explain", str(file), "--as", ASH, "--scenario", str(scenario)]
    assert main([*command, "--purpose", AID, "--at", "2026-03-04T03:00"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["variable", "grid.load", "N1,", "N2", "as", "it", "is", "north-as-it-is"] in rows
    hospital = next(line for line in out.splitlines() if "hospital_load" in line)
    assert "hospitals-stay-ours" in hospital
    assert "what hospitals do is told" in hospital
    assert main([*command, "--what", "grid.secret"]) == 0
    assert "clinic" not in capsys.readouterr().out
    assert main(["policy", "explain", str(file), "--as", "oak"]) == 0
    assert "may begin no session" in capsys.readouterr().out
    quake = ["policy", "declare", str(file), "quake", "--by", "duty", "--why", "drill"]
    assert main([*quake, "--for-h", "1"]) == 0
    assert main([*command, "--what", "clinic.beds_free"]) == 0
    assert "emergency quake, declared by duty" in capsys.readouterr().out
    file.write_text("version: 1\nruels: []", encoding="utf-8")
    assert main(["policy", "check", str(file)]) == 2
    assert "line 2: unknown key 'ruels'; did you mean 'rules'?" in capsys.readouterr().err


# -- the same over a socket ---------------------------------------------------------------------


def test_a_broker_answers_as_the_policy_says(tmp_path: Path) -> None:
    """The cases about variables, read off the descriptions that a broker gives; and those without
    an entity, asked for. Policy and readers are the same, the sockets are real.

    LEVEL45 7.
    """
    scenario, file = write_birch(tmp_path, POLICY)
    times = [NOON]
    there = {("grid", e.id) for e in (*STATIONS, *HOSPITALS)} | {("grid", SYSTEM)}
    there |= {("clinic", e.id) for e in HOSPITALS}
    options = BrokerOptions(
        city="birch", export=file, city_scenario=scenario, grace_s=0.1, clock=lambda: times[0]
    )

    refusals: list[tuple[Reason, str]] = []

    async def described(address: str, case: Case) -> set[str]:
        """What the reader of a case is told of; nothing when it may begin no session."""
        link_options = LinkOptions(identity=case.who)
        try:
            link = await Link.connect(address, "birch", link_options, errand=Errand(case.purpose))
        except ScenarioError as error:
            refusals.append((error.reason, error.metadata["rule"]))
            return set()
        async with link:
            description = await link.describe()
        return {
            f"{v.name}[{id_}]" for v in description.outputs() for id_ in description.ids(v.kind)
        }

    async def story() -> None:
        seen = asked = 0
        async with BrokerServer(options) as broker:
            assert broker.gate is not None
            async with grpc.aio.insecure_channel(broker.address) as channel:
                peers: peer_pb2_grpc.PeersAsyncStub = peer_pb2_grpc.PeersStub(channel)
                for case in CASES:
                    if case.declared or case.is_relayed:
                        continue
                    times[0] = case.when
                    member, _, variable = case.name.partition(".")
                    is_there = case.entity is not None and (member, case.entity.id) in there
                    if case.sort is V and is_there and variable != "gold":
                        assert case.entity is not None
                        found = await described(broker.address, case)
                        is_told = f"{member}_{variable}[{case.entity.id}]" in found
                        may = isinstance(case.answer, Gets) and "sum" not in case.answer.how
                        assert is_told is may, case.story
                        if isinstance(case.answer, Gets) and not may:
                            assert f"{member}_{variable}_sum[system]" in found
                        seen += 1
                    elif case.entity is None or case.entity is SYS:
                        if case.sort is A:
                            continue
                        answer = await peers.Ask(
                            peer_pb2.AskRequest(
                                sort=peer_pb2.AskRequest.Sort.Value(f"SORT_{case.sort.name}"),
                                name=case.name,
                                purpose=case.purpose,
                            ),
                            metadata=claim(case.who),
                        )
                        assert answer.rule == case.answer.rule, case.story
                        assert answer.is_allowed is isinstance(case.answer, Gets)
                        assert answer.policy_version == 7
                        asked += 1
        assert seen >= 30
        assert asked >= 15
        assert {reason for reason, _ in refusals} == {Reason.NOT_EXPORTED}

    bounded(story)


def test_a_session_that_sees_more_by_an_emergency_ends_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, file = write_birch(tmp_path, POLICY)
    times = [NOON]
    options = BrokerOptions(
        city="birch", export=file, city_scenario=scenario, grace_s=0.1, clock=lambda: times[0]
    )

    async def story() -> None:
        declare(file, "quake", "Kim Lee", "magnitude 7.7", 2.0, NOON)
        async with (
            BrokerServer(options) as broker,
            await Link.connect(broker.address, "birch", LinkOptions(identity=ASH)) as link,
        ):
            session = await link.session("birch", 1, {}, 1)
            (first,) = await session.advance([StepInput(0)])
            assert "clinic_beds_free" in first.outputs
            times[0] = NOON + timedelta(hours=2)
            with pytest.raises(FederationError) as caught:
                await session.advance([StepInput(5 * MINUTE_NS)])
            assert caught.value.reason is Reason.NOT_EXPORTED
            assert caught.value.metadata["what"] == "clinic.beds_free"

    bounded(story)
    said = capsys.readouterr().err
    assert "emergency quake, declared by Kim Lee" in said
    assert f"{ASH} sees more by the emergency quake, which Kim Lee has declared" in said


def test_a_change_of_the_file_counts_within_a_second_in_a_running_broker(tmp_path: Path) -> None:
    scenario, file = write_birch(tmp_path, POLICY)
    options = BrokerOptions(city="birch", export=file, city_scenario=scenario, grace_s=0.1)

    async def story() -> None:
        async with (
            BrokerServer(options) as broker,
            await Link.connect(
                broker.address, "birch", LinkOptions(identity=ASH), errand=Errand(DRILL)
            ) as link,
        ):
            session = await link.session("birch", 1, {}, 1)
            await session.advance([StepInput(0)])
            file.write_text(
                POLICY.replace("version: 7", "version: 8").replace(
                    "purpose: [mutual-aid, drill]\n", "purpose: [mutual-aid]\n"
                ),
                encoding="utf-8",
            )
            began_s, step_ns = time.monotonic(), 5 * MINUTE_NS
            error: FederationError | None = None
            while error is None and time.monotonic() < began_s + 5.0:
                await asyncio.sleep(0.05)
                try:
                    await session.advance([StepInput(step_ns)])
                    step_ns += 5 * MINUTE_NS
                except FederationError as refused:
                    error = refused
            assert time.monotonic() - began_s < 1.0
            assert error is not None
            assert error.reason is Reason.NOT_EXPORTED
            assert error.metadata["rule"] == "load-in-total"
            # a new session has what may still be had
            async with await Link.connect(
                broker.address, "birch", LinkOptions(identity=ASH), errand=Errand(DRILL)
            ) as again:
                names = {v.name for v in (await again.describe()).variables}
                assert names == {"grid_load_sum", "grid_unserved"}

    bounded(story)
