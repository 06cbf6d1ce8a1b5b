"""Autonomy is earned by evidence, lost at once, and at level 4 it takes named persons to act."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.control import rules as documents
from federation.control.autonomy import (
    Breached,
    Compared,
    Event,
    Key,
    Ladder,
    Rollout,
    Scored,
    Set,
    Solved,
    Unusable,
    regret_bound,
)
from federation.control.guard import Guard
from federation.control.proposal import (
    Alternative,
    Answer,
    Docket,
    Effect,
    Proposal,
    State,
    affected_domains,
    reversal_of,
)
from federation.control.rules import Evidence, Rules
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.errors import ScenarioError
from federation.twin import MINUTE_NS
from tests.hostile.suite import TOWN
from tests.hostile.town import DESCRIPTIONS, RUN

AUTONOMY = """
autonomy:
  classes: {grid.feed: feeding, grid.tie: switching}
  grants:
    - {twin: grid, action: feeding, operator: ida, start: 3}
    - {twin: grid, action: switching, operator: ida, start: 4, at_most: 4}
    - {twin: water, action: pump, operator: ida, start: 4}
  to_4: {decisions: 40, regret: 3, worst: 4}
  to_5: {decisions: 100, regret: 1.5, worst: 4}
persons:
  ida: [grid, clinic]
  jon: [water]
  eva: [clinic]
"""
FEEDING = Key("grid", "feeding", "ida")
SWITCHING = Key("grid", "switching", "ida")
PUMPING = Key("water", "pump", "ida")
NOON = 1_790_000_000.0


@cache
def rules(version: int = 7, old: str = "", new: str = "") -> Rules:
    text = TOWN.read_text(encoding="utf-8").replace("version: 7", f"version: {version}")
    return documents.parse(text + AUTONOMY.replace(old, new) if old else text + AUTONOMY)


def scores(key: Key, count: int, regret: float = 0.0) -> list[Event]:
    return [Scored(key, f"d{i}", 10 + regret, 10.0, 11.0) for i in range(count)]


def feed(ladder: Ladder, events: Sequence[Event]) -> list[tuple[int, int, str]]:
    return [(m.before, m.after, m.why) for e in events for m in ladder.handle(e)]


def at_level_5() -> Ladder:
    ladder = Ladder(rules())
    feed(ladder, [*scores(FEEDING, 140), Set(FEEDING, 5, "ida")])
    assert ladder.level(FEEDING) == 5
    return ladder


# -- up --------------------------------------------------------------------------------------


def test_level45_19_what_nobody_granted_is_advice() -> None:
    ladder = Ladder(rules())
    for key in (Key("grid", "feeding", "jon"), Key("clinic", "divert", "ida")):
        assert ladder.level(key) == 3
        assert feed(ladder, [*scores(key, 500), Set(key, 5, "ida")]) == [
            (3, 3, "the rules grant nothing here")
        ]
    assert Ladder(documents.load(TOWN)).level(FEEDING) == 3, "rules without a word on autonomy"


def test_level45_19_a_level_is_earned_in_shadow_mode_and_granted_by_a_person() -> None:
    ladder = Ladder(rules())
    assert feed(ladder, [Set(FEEDING, 4, "ida")]) == [(3, 3, "ida asks for 4; up to 3 is earned")]
    assert feed(ladder, scores(FEEDING, 39)) == []
    ((before, after, why),) = feed(ladder, scores(FEEDING, 1))
    assert (before, after) == (3, 3)
    assert why.startswith("40 decisions, mean regret up to")
    assert feed(ladder, [Set(FEEDING, 4, "ida")]) == [(3, 4, "set by ida")]
    assert feed(ladder, scores(FEEDING, 100))[0][2].endswith("5 is earned")
    assert feed(ladder, [Set(FEEDING, 5, "")]) == [(4, 4, "nobody asks for it")]
    assert feed(ladder, [Set(FEEDING, 5, "ida")]) == [(4, 5, "set by ida")]
    assert feed(ladder, [Set(FEEDING, 3, "jon")]) == [(5, 3, "set by jon")], "down is always free"


def test_level45_19_rules_may_leave_promotion_to_the_evidence() -> None:
    automatic = rules(7, "  to_4:", "  a_person_promotes: false\n  to_4:")
    ladder = Ladder(automatic)
    assert [(b, a) for b, a, _ in feed(ladder, scores(FEEDING, 140))] == [(3, 4), (4, 5)]
    feed(ladder, scores(SWITCHING, 500))
    assert ladder.level(SWITCHING) == 4, "no evidence goes beyond what is granted"


@pytest.mark.parametrize(
    "bad",
    [
        Scored(FEEDING, "d", 14.5, 10.0),
        Scored(FEEDING, "d", float("nan"), 10.0),
        Scored(FEEDING, "d", 10.0, 10.0, 5.5),
        Scored(FEEDING, "d", 10.0, 10.0, is_good=False),
    ],
)
def test_level45_19_one_decision_beyond_the_worst_fails_the_whole_block(bad: Event) -> None:
    ladder = Ladder(rules())
    told = feed(ladder, [*scores(FEEDING, 7), bad, *scores(FEEDING, 32)])
    assert told == [(3, 3, "block 1: a decision failed it")]
    assert len(feed(ladder, scores(FEEDING, 40))) == 1, "the next block may do better"
    assert ladder.standings[FEEDING].earned == 4


def test_level45_19_regret_is_against_the_better_of_operator_and_simulation() -> None:
    ladder = Ladder(rules())
    worse = [Scored(FEEDING, f"d{i}", 11.0, 13.0, 8.0) for i in range(40)]
    ((_, _, why),) = feed(ladder, worse)
    assert why.startswith("block 1: mean regret up to"), "3 worse than what was possible"


def test_level45_19_the_bound_is_that_of_maurer_and_pontil() -> None:
    evidence = Evidence.model_construct(decisions=4, regret=0.0, worst=0.5, confidence=0.9)
    # width 1, n = 4, mean 0.1, V = 0.0066667, d = 0.1 / 2, ln(2 / d) = 3.6888795
    expected = 0.1 + (2 * 0.02 / 3 * 3.6888795 / 4) ** 0.5 + 7 * 3.6888795 / 9
    assert regret_bound([0.0, 0.1, 0.1, 0.2], evidence, 1) == pytest.approx(expected)


def test_level45_19_who_tries_again_and_again_is_promoted_no_oftener_than_the_rules_allow() -> None:
    evidence = Evidence(decisions=50, regret=0.5, worst=1.0, confidence=0.8)
    draw = random.Random(3)

    def promoted(p_bad: float) -> bool:
        for block in range(1, 6):
            scores = [1.0 if draw.random() < p_bad else -1.0 for _ in range(50)]
            if regret_bound(scores, evidence, block) <= evidence.regret:
                return True
        return False

    wrong = sum(promoted(0.751) for _ in range(200))  # true mean regret 0.502: just too much
    right = sum(promoted(0.05) for _ in range(200))
    assert wrong <= 0.2 * 200
    assert right >= 0.99 * 200


# -- down ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "level", "why"),
    [
        (Unusable(FEEDING, "clinic.supply"), 4, "clinic.supply is not usable"),
        (Breached(FEEDING, "sum:supply"), 3, "breach of sum:supply"),
        (Compared(FEEDING, 10.0, 17.0, 1.0), 4, "7 standard deviations from the forecast"),
        (Compared(FEEDING, 10.0, float("nan"), 1.0), 4, "nan standard deviations"),
        (Compared(FEEDING, 10.0, 10.0, 0.0), 4, "nan standard deviations"),
    ],
)
def test_level45_19_autonomy_is_lost_at_once(event: Event, level: int, why: str) -> None:
    ladder = at_level_5()
    ((before, after, told),) = feed(ladder, [event])
    assert (before, after) == (5, level)
    assert why in told
    assert feed(ladder, [Set(FEEDING, 5, "ida")])[0][1] == level, "and must be earned again"
    other = ladder.standings[PUMPING]
    assert (other.level, other.earned) == (4, 4), "others are not touched"


def test_level45_19_a_small_drift_is_noticed_when_it_lasts_and_noise_is_not() -> None:
    ladder = at_level_5()
    draw = random.Random(5)
    for _ in range(100):
        assert feed(ladder, [Compared(FEEDING, 10.0, draw.gauss(10.0, 0.5), 1.0)]) == []
    told: list[tuple[int, int, str]] = []
    steps = 0
    while not told:
        steps += 1
        told = feed(ladder, [Compared(FEEDING, 10.0, 11.5, 1.0)])
    assert told[0][:2] == (5, 4)
    assert "drift" in told[0][2]
    assert steps <= 6, "1.5 deviations less the slack of 0.5, to the limit of 5"


def test_level45_24_a_solver_in_trouble_costs_level_5() -> None:
    ladder = at_level_5()
    trouble = [Solved(FEEDING, False), Solved(FEEDING, True), Solved(FEEDING, False)]
    assert feed(ladder, trouble) == [], "once, and once again"
    assert feed(ladder, [Solved(FEEDING, False)]) == [(5, 4, "no plan in time, 2 times in a row")]


def test_level45_19_a_bundle_has_the_lowest_level_of_all_that_it_touches() -> None:
    ladder = at_level_5()
    places = [("grid", "feed", "f1"), ("grid", "tie", "north"), ("clinic", "divert", "h0")]
    levels = []
    for i in range(4):
        setpoints = tuple(Setpoint(*place, 0.0) for place in places[:i])
        bundle = replace(bundle_of(), setpoints=setpoints)
        levels.append(ladder.level_of(bundle, "ida"))
    assert levels == [3, 5, 4, 3]
    assert ladder.level_of(replace(bundle_of(), setpoints=()), "jon") == 3


keys = st.sampled_from([FEEDING, SWITCHING, PUMPING, Key("grid", "feeding", "jon")])
numbers = st.one_of(st.floats(), st.floats(-6, 6))
happenings = st.one_of(
    st.builds(Scored, keys, st.just("d"), numbers, numbers, st.none() | numbers, st.booleans()),
    st.builds(Compared, keys, numbers, numbers, numbers),
    st.builds(Unusable, keys, st.just("v")),
    st.builds(Breached, keys, st.just("r")),
    st.builds(Solved, keys, st.booleans()),
    st.builds(Set, keys, st.integers(-1, 9), st.sampled_from(["", "ida"])),
)


@settings(max_examples=60)
@given(st.lists(st.one_of(happenings, st.integers(2, 60)), max_size=20))
def test_level45_19_no_story_takes_a_level_beyond_what_is_granted_and_earned(
    story: list[Any],
) -> None:
    ladder = Ladder(rules())
    ladder.handle(Set(FEEDING, 3, "ida"))
    for happening in story:
        events = scores(FEEDING, happening) if isinstance(happening, int) else [happening]
        for event in events:
            before = dict(ladder.standings)
            moved = ladder.handle(event)
            after = ladder.standings
            assert all(3 <= s.level <= s.earned <= 5 for s in after.values())
            assert after[SWITCHING].level <= 4
            assert after.keys() == before.keys()
            assert all(s == before[k] for k, s in after.items() if k != event.key)
            if not isinstance(event, Set):
                assert all(s.level <= before[k].level for k, s in after.items())
            if isinstance(event, Breached):
                assert ladder.level(event.key) == 3
            for record in moved:
                assert record.after == ladder.level(record.key)
                assert record.rules_version == 7
    heir = Ladder(rules())
    heir.restore(json.loads(json.dumps(ladder.snapshot())))
    assert repr(heir.standings) == repr(dict(sorted(ladder.standings.items())))


# -- rules change ----------------------------------------------------------------------------


def test_level45_25_a_change_of_rules_counts_before_the_next_decision() -> None:
    ladder = at_level_5()
    narrower = rules(
        8,
        "action: feeding, operator: ida, start: 3",
        "action: feeding, operator: ida, start: 3, at_most: 4",
    )
    (moved,) = ladder.change_rules(narrower)
    assert (moved.key, moved.before, moved.after, moved.rules_version) == (FEEDING, 5, 4, 8)
    with pytest.raises(ScenarioError, match="version 8 is already in force"):
        ladder.change_rules(rules(8))
    withdrawn = documents.parse(
        TOWN.read_text(encoding="utf-8").replace("version: 7", "version: 9")
    )
    assert {(m.before, m.after) for m in ladder.change_rules(withdrawn)} == {(4, 3)}
    assert ladder.level(FEEDING) == 3
    with pytest.raises(ScenarioError, match="the snapshot is of version 7"):
        ladder.restore(at_level_5().snapshot())


def test_level45_25_evidence_of_other_conditions_counts_for_nothing() -> None:
    ladder = Ladder(rules())
    feed(ladder, scores(FEEDING, 39))
    ladder.change_rules(rules(8, "decisions: 40", "decisions: 50"))
    assert feed(ladder, scores(FEEDING, 49)) == []
    assert len(feed(ladder, scores(FEEDING, 1))) == 1


def test_level45_25_a_decision_waits_until_every_twin_has_the_rules() -> None:
    rollout = Rollout(7, ("grid", "water"), {"grid": 7, "water": 7})
    assert rollout.admits(7)
    rollout.announce(8, ("grid", "water", "clinic"))
    assert not rollout.admits(7), "decided before"
    assert not rollout.admits(8), "decided after, and no twin knows"
    rollout.acknowledge("grid", 8)
    rollout.acknowledge("clinic", 8)
    rollout.acknowledge("water", 7)
    assert rollout.waits_for() == ("water",)
    rollout.acknowledge("water", 8)
    rollout.acknowledge("grid", 7)
    assert rollout.admits(8)
    rollout.announce(7, ("grid", "water", "clinic"))
    assert rollout.version == 8


# -- persons ---------------------------------------------------------------------------------

PEOPLE = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([i] * 32))
    for i, name in enumerate(("ida", "jon", "eva", "mallory"))
}


def is_signed(person: str, message: bytes, signature: bytes) -> bool:
    try:
        PEOPLE[person].public_key().verify(signature, message)
    except (InvalidSignature, KeyError):
        return False
    return True


def bundle_of() -> Bundle:
    return Bundle(
        "plan-1",
        RUN,
        (Setpoint("grid", "feed", "f1", 50.0, 20 * MINUTE_NS),),
        Priority.AUTONOMOUS,
        0,
        8 * MINUTE_NS,
        "planner",
        "",
        (Condition("clinic", "supply", "h1", 0.5, 1.0),),
    )


def proposal(**changes: Any) -> Proposal:
    fallen = Effect("unserved", "MWh", 12.0, 2.0, 3.0, 5.0)
    found = Proposal(
        id="p1",
        operator="ida",
        bundle=bundle_of(),
        rules_version=7,
        effects={"grid": (fallen,), "water": (fallen,)},
        alternatives=(Alternative("feed of f2 instead of f1", 0.4),),
        limits=("sum:supply",),
        reversal=reversal_of(bundle_of(), DESCRIPTIONS),
        made_unix_s=NOON,
        expires_unix_s=NOON + 600,
    )
    return replace(found, **changes)


def docket(found: Proposal) -> Docket:
    made = Docket(rules().persons, is_signed, 7)
    made.propose(found)
    return made


def yes(found: Proposal, person: str, signer: str = "") -> Answer:
    signature = PEOPLE[signer or person].sign(found.message("yes"))
    return Answer(found.id, person, True, signature)


def bright(value: float | None = 0.9) -> Callable[[str, str, str], float | None]:
    return lambda member, variable, entity: value


def test_level45_10_nothing_acts_without_a_named_person_for_every_domain() -> None:
    found = proposal()
    made = docket(found)
    assert made.take("p1", bright(), NOON, 0)[0] is None
    first = made.answer(yes(found, "ida"), NOON + 10)
    assert (first.state, first.sentence) == (State.OPEN, "still waits for water")
    assert made.take("p1", bright(), NOON + 10, 0)[0] is None
    second = made.answer(yes(found, "jon"), NOON + 20)
    assert second.state is State.CONFIRMED
    assert made.approvers("p1") == {"grid": "ida", "water": "jon"}
    bundle, told = made.take("p1", bright(), NOON + 30, 0)
    assert (bundle, told.state) == (found.bundle, State.TAKEN)
    assert made.take("p1", bright(), NOON + 30, 0)[0] is None, "once"


def test_level45_10_the_wrong_person_and_the_wrong_signature_count_for_nothing() -> None:
    found = proposal()
    made = docket(found)
    other = proposal(limits=())
    for answer, words in (
        (yes(found, "eva"), "'eva' has no authority in grid, water"),
        (yes(found, "mallory"), "'mallory' has no authority"),
        (yes(found, "jon", signer="mallory"), "'jon' did not sign this"),
        (replace(yes(found, "jon"), is_yes=False), "did not sign this"),
        (yes(other, "jon"), "did not sign this"),
        (replace(yes(found, "jon"), proposal="p2"), "no such proposal"),
    ):
        told = made.answer(answer, NOON + 1)
        assert not told.counts
        assert words in told.sentence
    assert made.states["p1"] is State.OPEN
    assert made.approvers("p1") == {}


def test_level45_10_silence_refuses() -> None:
    found = proposal()
    made = docket(found)
    made.answer(yes(found, "ida"), NOON + 10)
    assert made.pass_time(NOON + 599) == ()
    (told,) = made.pass_time(NOON + 600)
    assert (told.state, told.sentence) == (State.EXPIRED, "nobody confirmed in time")
    late = made.answer(yes(found, "jon"), NOON + 601)
    assert (late.state, late.counts) == (State.EXPIRED, False)


def test_level45_10_a_confirmation_that_nobody_used_in_time_expires_too() -> None:
    found = proposal(effects={"water": ()})
    made = docket(found)
    assert made.answer(yes(found, "jon"), NOON + 590).state is State.CONFIRMED
    assert made.take("p1", bright(), NOON + 600, 0)[1].state is State.EXPIRED


def test_level45_10_any_person_with_authority_may_reject() -> None:
    found = proposal()
    made = docket(found)
    no = Answer("p1", "jon", False, PEOPLE["jon"].sign(found.message("no")), "the main is open")
    assert made.answer(no, NOON + 5).state is State.REJECTED
    assert made.answer(yes(found, "ida"), NOON + 6).state is State.REJECTED


@pytest.mark.parametrize("value", [0.4, None, float("nan")])
def test_level45_11_an_approval_is_void_when_the_state_has_moved(value: float | None) -> None:
    found = proposal(effects={"water": ()})
    made = docket(found)
    made.answer(yes(found, "jon"), NOON + 10)
    bundle, told = made.take("p1", bright(value), NOON + 20, 0)
    assert (bundle, told.state) == (None, State.VOID)
    assert "the state has moved: clinic.supply of h1" in told.sentence
    assert made.take("p1", bright(), NOON + 21, 0)[0] is None, "it stays void"


def test_level45_12_an_approval_does_not_outlive_its_bundle() -> None:
    found = proposal(effects={"water": ()})
    made = docket(found)
    made.answer(yes(found, "jon"), NOON + 10)
    assert made.take("p1", bright(), NOON + 20, 8 * MINUTE_NS)[1].state is State.EXPIRED


def test_level45_25_a_proposal_under_other_rules_must_be_made_anew() -> None:
    found = proposal(effects={"water": ()})
    made = docket(found)
    made.answer(yes(found, "jon"), NOON + 10)
    (told,) = made.change_rules(rules(8).persons, 8)
    assert told.state is State.VOID
    assert made.take("p1", bright(), NOON + 20, 0)[0] is None
    assert made.propose(proposal(id="p2")).sentence == "it was made under other rules"


def test_level45_10_where_nobody_has_authority_nothing_can_be_confirmed() -> None:
    made = Docket(rules().persons, is_signed, 7)
    told = made.propose(proposal(effects={"roads": ()}))
    assert (told.state, told.sentence) == (State.VOID, "nobody has authority in roads")
    assert made.propose(proposal(id="p3", effects={})).state is State.VOID
    assert not made.propose(proposal(id="p3")).counts, "an id is used once"


def test_level45_10_a_proposal_says_whom_it_affects_and_how_to_undo_it() -> None:
    fed = {"grid": ("clinic", "water"), "water": ("clinic",), "clinic": ("grid",)}
    assert affected_domains(bundle_of(), DESCRIPTIONS, fed) == ("clinic", "grid", "water")
    assert affected_domains(bundle_of(), DESCRIPTIONS, {}) == ("grid",)
    assert proposal().reversal == ("grid.feed of f1: set 40 MW, its safe default",)


def test_a_docket_goes_on_from_its_snapshot() -> None:
    found = proposal()
    made = docket(found)
    made.answer(yes(found, "ida"), NOON + 10)
    plain = json.loads(json.dumps(made.snapshot()))
    heir = Docket(rules().persons, is_signed, 7)
    heir.restore(plain)
    assert heir.proposals == made.proposals
    assert heir.answer(yes(found, "jon"), NOON + 20).state is State.CONFIRMED


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ida", "jon", "eva", "mallory"]),
            st.sampled_from(["ida", "jon", "eva", "mallory"]),
            st.booleans(),
            st.integers(0, 400),
        ),
        max_size=8,
    )
)
def test_level45_10_no_story_of_answers_confirms_without_all_domains(
    story: list[tuple[str, str, bool, int]],
) -> None:
    found = proposal()
    made = docket(found)
    now = NOON
    genuine = set()
    for person, signer, is_yes, wait in story:
        now += wait
        signature = PEOPLE[signer].sign(found.message("yes" if is_yes else "no"))
        made.answer(Answer("p1", person, is_yes, signature), now)
        if person == signer and is_yes and now < NOON + 600:
            genuine.add(person)
    bundle, _ = made.take("p1", bright(), now, 0)
    assert bundle is None or ({"ida", "jon"} <= genuine and now < NOON + 600)


# -- the rules of autonomy -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("start: 4, at_most: 4", "start: 4, at_most: 3", "it starts at 4, above its 3"),
        ("start: 3}", "start: 5}", "Input should be 3 or 4"),
        ("action: switching", "action: feeding", "is granted twice"),
        ("regret: 3, worst: 4", "regret: .nan, worst: 4", "finite"),
        ("regret: 1.5", "regret: 4.5", "must be below the worst"),
        ("decisions: 40", "decisions: 1", "greater than or equal to 2"),
        ("decisions: 40", "decisions: 20", "20 decisions can't show it"),
    ],
)
def test_rules_of_autonomy_that_make_no_sense_are_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(ScenarioError, match=words):
        rules(7, old, new)


def test_the_guard_takes_rules_with_autonomy() -> None:
    assert Guard(rules(), DESCRIPTIONS, is_signed).rules.persons["jon"] == ("water",)
