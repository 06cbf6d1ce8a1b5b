"""A windstorm: gusts, the poles and stations that they break, and who needs power at home."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from federation.errors import FederationError, Reason
from federation.twin import HOUR_NS, NOTHING, Session, StepInput, Twin, Vector
from twins.disaster.cases import Cases
from twins.disaster.storm import Windstorm
from twins.disaster.stormhomes import PERIOD_NS, Homes, dependents, expected_visits
from twins.disaster.stormwind import Havoc, gust_factor, gusts, overhead

DEFAULTS = {p.name: p.default for p in Windstorm().describe().parameters}
AT_HOME = {p.name: p.default for p in Homes().describe().parameters}
GRID = overhead("shelby")
HAVOC = Havoc.of(DEFAULTS)
GUSTS_2003_MPH = np.array([84.0, 61.0, 77.0, 102.0])
"""At Channel 3, the airport, Agricenter and AutoZone Park (NWS Memphis)."""
MPH = 0.44704


def passed(seed: int, parameters: Mapping[str, float] = NOTHING, hours: float = 1.0) -> Session:
    """A storm that has come at its hour, and whatever came until another one."""
    session = Session(Windstorm(), "storm")
    session.open(seed, parameters)
    wish: int | None = 0
    while wish is not None and wish <= hours * HOUR_NS:
        wish = session.advance(StepInput(wish)).next_ns
    return session


def state_of(session: Session) -> Vector:
    return np.asarray(session.twin.passage.power.state)  # type: ignore[attr-defined]


# -- wind ------------------------------------------------------------------------------


def test_the_gusts_are_those_measured_in_2003() -> None:
    logs = np.log(GUSTS_2003_MPH * MPH)
    assert np.exp(logs.mean()) == pytest.approx(DEFAULTS["gust_median_m_s"], rel=0.005)
    assert logs.std(ddof=1) == pytest.approx(DEFAULTS["gust_sigma"], abs=0.005)


def test_gusts_are_lognormal_about_the_median_and_alike_where_places_are_near() -> None:
    draws = np.random.default_rng(1)
    range_km = DEFAULTS["gust_range_km"]
    many = np.log(
        [
            gusts("shelby", draws.standard_normal(len(GRID.places)), 35.6, 0.21, range_km)
            for _ in range(2000)
        ]
    )
    assert np.exp(many.mean()) == pytest.approx(35.6, rel=0.01)
    assert many.std(axis=0) == pytest.approx(np.full(len(GRID.rows), 0.21), rel=0.1)
    here, there = GRID.places[GRID.place[0]], GRID.places[GRID.place]
    km = 111.2 * np.hypot((there[:, 0] - here[0]) * np.cos(np.radians(35.1)), there[:, 1] - here[1])
    found = np.array([np.corrcoef(many[:, 0], many[:, i])[0, 1] for i in range(len(GRID.rows))])
    assert np.abs(found - np.exp(-3.0 * km / range_km)).max() < 0.1
    factor = gust_factor("shelby", range_km)
    assert np.einsum("ij,ij->i", factor, factor) == pytest.approx(np.ones(len(factor)))


# -- what it breaks --------------------------------------------------------------------


@pytest.mark.parametrize(("gust_m_s", "published"), [(45.3, 0.1), (58.2, 0.5), (75.0, 0.9)])
def test_a_pole_falls_as_often_as_published(gust_m_s: float, published: float) -> None:
    assert HAVOC.pole_chance(np.array([gust_m_s]))[0] == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(("gust_m_s", "published"), [(27.9, 0.027), (38.8, 0.064), (50.0, 0.132)])
def test_a_station_is_put_out_as_often_as_published(gust_m_s: float, published: float) -> None:
    calm = np.full(len(GRID.rows), gust_m_s)
    assert HAVOC.reached(GRID, calm)[GRID.stations] == pytest.approx(
        np.full(len(GRID.stations), published), abs=0.01
    )


@given(st.floats(15.0, 60.0), st.integers(1, 300), st.floats(0.001, 0.999))
def test_a_circuit_is_out_exactly_when_a_pole_has_fallen(
    gust_m_s: float, poles: int, strength: float
) -> None:
    gust, count = np.array([gust_m_s]), np.array([poles])
    fallen = HAVOC.fallen(gust, count, np.array([strength]))[0]
    chance = HAVOC.pole_chance(gust)[0]
    out = 1.0 - (1.0 - chance) ** poles
    if abs(out - strength) > 1e-9:
        assert (fallen > 0) == (strength < out)
    assert 0 <= fallen <= poles
    assert binom.cdf(fallen, poles, chance) >= 1.0 - strength - 1e-9
    harder = HAVOC.fallen(gust * 1.2, count, np.array([strength]))[0]
    assert harder >= fallen


def test_as_many_components_are_out_as_their_chances_say() -> None:
    rng = np.random.default_rng(3)
    gust = np.full(len(GRID.rows), 36.0)
    size = 400
    out = np.zeros(len(GRID.rows))
    for _ in range(size):
        state, work_h = HAVOC.damage(GRID, gust, *rng.random((2, len(GRID.rows))))
        assert ((work_h > 0.0) == (state >= 2)).all()
        out += state > 0
    chance = HAVOC.reached(GRID, gust)
    deviation = np.sqrt(size * chance * (1.0 - chance)) + 1e-9
    assert (np.abs(out - size * chance) < 4.5 * deviation).all()


def test_a_storm_like_that_of_2003_breaks_about_what_that_one_did() -> None:
    """279 of 435 circuits were out and 1,300 poles broken (MLGW). Nothing was fitted to these: the
    curve is of Texas, and knows of no trees that bring down wires without a pole."""
    shares, poles = [], []
    for seed in range(60):
        passage = passed(seed).twin.passage  # type: ignore[attr-defined]
        shares.append((passage.power.state[GRID.lines] > 0).mean())
        fallen = HAVOC.fallen(
            passage.peak_m_s[GRID.lines],
            HAVOC.poles(GRID.length_km),
            passage.power.strength[GRID.lines],
        )
        poles.append(HAVOC.circuits * fallen.sum())
    assert np.quantile(shares, 0.05) < 279 / 435 < np.quantile(shares, 0.98)
    assert np.quantile(poles, 0.05) < 1300 < np.quantile(poles, 0.95)
    assert 0.5 * 1300 < np.mean(poles) < 2.0 * 1300


def test_work_scatters_as_widely_as_it_does_when_only_the_length_of_a_line_is_known() -> None:
    """Why epidemic.yaml lets estimates err by a deviation of ln of 1.0, twice that of level5.yaml:
    who knows of a line only that it is out, and how long it is, errs by 1.27."""
    length, work = [], []
    for seed in range(60):
        power = passed(seed).twin.passage.power  # type: ignore[attr-defined]
        out = power.state[GRID.lines] > 0
        length += np.log(GRID.length_km[out]).tolist()
        work += np.log(power.caused_h[GRID.lines][out]).tolist()
    slope = np.polyfit(length, work, 1)
    left = np.array(work) - np.polyval(slope, length)
    assert left.std() == pytest.approx(1.27, abs=0.1)


def test_nothing_happens_before_the_storm_and_work_is_where_something_is_out() -> None:
    session = Session(Windstorm(), "storm")
    session.open(4, {"storm_h": 2.0})
    first = session.advance(StepInput(0))
    assert not first.outputs
    assert not first.events
    assert first.next_ns == 2 * HOUR_NS
    then = session.advance(StepInput(2 * HOUR_NS))
    out = then.outputs["power_damage_state"] >= 2
    assert out.any()
    assert ((then.outputs["power_repair_work"] > 0.0) == out).all()
    known = {e.id for e in then.events}
    assert all(c in known for why in then.causes.values() for c in why.values())


def test_later_storms_come_at_the_rate_that_is_given() -> None:
    found = [len(passed(s, hours=0.0).twin.passage.storms_ns) - 1 for s in range(400)]  # type: ignore[attr-defined]
    expected = 336.0 / DEFAULTS["next_storm_mean_h"]
    assert np.mean(found) == pytest.approx(expected, abs=4.0 * np.sqrt(expected / 400))


def test_a_repaired_line_can_be_hit_again_and_what_stood_stands_in_a_weaker_storm() -> None:
    given = {"next_storm_mean_h": 1.0, "next_gust_median_m_s": 24.0}
    session = Session(Windstorm(), "storm")
    session.open(6, given)
    session.advance(StepInput(0))
    wish = session.advance(StepInput(HOUR_NS)).next_ns
    before = state_of(session)
    assert wish is not None
    intact = (before == 0).astype(np.float64)
    session.advance(StepInput(wish, inputs={"power_intact": intact}))
    assert (state_of(session) >= before).all()
    passage = session.twin.passage  # type: ignore[attr-defined]
    weaker = passage.peak_m_s[GRID.stations] >= 24.0 * 3.0
    assert not weaker.any()
    # whole again after long enough: its strength is drawn anew, and its work counts in full
    late_ns = wish + 400 * HOUR_NS
    passage.storms_ns = [*passage.storms_ns[: passage.passed], late_ns]
    worked = passage.power.caused_h.copy()
    passage.parameters["next_gust_median_m_s"] = 60.0
    whole = np.ones(len(GRID.rows))
    session.advance(StepInput(late_ns, inputs={"power_intact": whole}))
    again = before >= 2
    assert (passage.power.rebuilt[again] == 1).all()
    assert (passage.power.caused_h[again] > worked[again]).any()


# -- people whose equipment needs power ------------------------------------------------


def darkness(hours: int, share: float, seed: int = 5) -> tuple[Homes, dict[str, Vector]]:
    twin = Homes()
    session = Session(twin, "homes")
    session.open(seed, {})
    powered = np.full(37, 1.0 - share)
    values: dict[str, Vector] = {}
    for k in range(hours * HOUR_NS // PERIOD_NS + 1):
        inputs = {"powered": powered} if k == 0 else {}
        values |= session.advance(StepInput(k * PERIOD_NS, inputs=inputs)).outputs
    return twin, values


def test_new_york_would_have_had_the_visits_of_august_2003() -> None:
    """65 at a hospital that sees some 2.7 % of the city's emergency patients."""
    visits = expected_visits(8.0e6, 29.0, AT_HOME)
    assert visits * 0.027 == pytest.approx(65.0, rel=0.1)


def test_as_many_come_as_expected_and_nobody_while_there_is_power() -> None:
    _, lit = darkness(24, 0.0)
    assert not lit
    twin, dark = darkness(24, 1.0)
    assert twin.household is not None
    people = float(dependents("shelby").people.sum())
    expected = expected_visits(people, 24.0, AT_HOME)
    assert sum(e.sum() for e in twin.household.expected) == pytest.approx(expected, rel=1e-6)
    come = dark["injured_severity2"].sum() + dark["injured_severity3"].sum()
    assert abs(come - expected) < 4.0 * np.sqrt(expected)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9))
def test_who_comes_in_less_darkness_also_comes_in_more(share: float) -> None:
    _, some = darkness(12, share)
    _, all_ = darkness(12, 1.0)
    for name, count in some.items():
        assert (all_[name] >= count).all()


@given(st.integers(0, 10), st.lists(st.floats(0.0, 40.0), min_size=1, max_size=6))
def test_cases_do_not_depend_on_how_often_they_are_counted(seed: int, parts: list[float]) -> None:
    once, often = Cases.none(seed, 7, 3), Cases.none(seed, 7, 3)
    expected = np.zeros(3)
    for part in parts:
        expected = expected + part
        counted = often.count(expected)
    assert (once.count(expected) == counted).all()


# -- determinism and futures -----------------------------------------------------------


def test_a_storm_goes_on_from_its_snapshot_bit_for_bit() -> None:
    given = {"next_storm_mean_h": 24.0}
    session = passed(8, given)
    other = Session(Windstorm(), "storm")
    other.open(99, {})
    other.twin.restore(session.twin.snapshot())
    storms = session.twin.passage.storms_ns  # type: ignore[attr-defined]
    assert len(storms) > 1
    other.last_ns, other.serial = session.last_ns, session.serial
    mine, theirs = (s.advance(StepInput(storms[1])) for s in (session, other))
    assert mine.events == theirs.events
    assert {n: v.tobytes() for n, v in mine.outputs.items()} == {
        n: v.tobytes() for n, v in theirs.outputs.items()
    }


def test_a_future_of_its_own_seed_is_the_run_itself_and_another_is_not() -> None:
    now_ns = 2 * HOUR_NS
    state = passed(8).twin.snapshot()
    twin, other = Windstorm(), Windstorm()
    for copy in (twin, other):
        copy.restore(state)
    before = twin.snapshot()
    twin.diverge(now_ns, 8, DEFAULTS)
    assert twin.snapshot() == before
    other.diverge(now_ns, 9, DEFAULTS)
    assert twin.passage is not None
    assert other.passage is not None
    was, power = twin.passage.power, other.passage.power
    assert (power.state == was.state).all()
    assert (power.caused_h == was.caused_h).all()
    assert (power.strength != was.strength).any()
    for strength in (was.strength, power.strength):
        assert (power.bounds[:, 0] <= strength + 1e-12).all()
        assert (strength <= power.bounds[:, 1] + 1e-12).all()
    assert all(at_ns >= now_ns for at_ns in other.passage.storms_ns[1:])


def test_a_future_before_the_storm_has_a_storm_of_its_own() -> None:
    session = passed(8, hours=0.0)
    twin = Windstorm()
    twin.restore(session.twin.snapshot())
    assert twin.diverge(HOUR_NS // 2, 9, DEFAULTS) == HOUR_NS
    mine, theirs = twin, Windstorm()
    theirs.open(9, DEFAULTS)
    ends = []
    for session in (Session(mine, "storm"), Session(theirs, "storm")):
        session.advance(StepInput(0))
        ends.append(session.advance(StepInput(HOUR_NS)).outputs["power_repair_work"])
    assert (ends[0] == ends[1]).all()


def test_in_another_future_of_the_homes_others_come_but_who_has_come_stays() -> None:
    twin, told = darkness(10, 0.6)
    before = twin.snapshot()
    same, other = Homes(), Homes()
    for copy in (same, other):
        copy.restore(before)
    same.diverge(10 * HOUR_NS, 5, AT_HOME)
    assert same.snapshot() == before
    other.diverge(10 * HOUR_NS, 6, AT_HOME)
    sessions = [Session(t, "homes") for t in (same, other)]
    for session in sessions:
        session.values["powered"] = np.zeros(37)
        session.last_ns = 10 * HOUR_NS
    ends = []
    for session in sessions:
        values = dict(told)
        for k in range(1, 41):
            values |= session.advance(StepInput(10 * HOUR_NS + k * PERIOD_NS)).outputs
        ends.append(values["injured_severity2"])
        assert (values["injured_severity2"] >= told["injured_severity2"]).all()
    assert (ends[0] != ends[1]).any()


@pytest.mark.parametrize("twin", [Windstorm(), Homes()])
def test_what_the_wind_does_is_no_matter_of_belief(twin: Twin) -> None:
    with pytest.raises(FederationError) as caught:
        twin.diverge(0, 1, {}, {"gust": np.zeros(1)})
    assert caught.value.reason is Reason.UNKNOWN_VARIABLE


def test_every_parameter_has_a_source_and_lies_in_its_range() -> None:
    for parameter in (*Windstorm().describe().parameters, *Homes().describe().parameters):
        assert parameter.source
        assert parameter.doc
        assert parameter.low <= parameter.default <= parameter.high
