"""A heat wave: how homes warm up, whom that hurts, and who goes without when supply is short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Action,
    Session,
    StepInput,
    Vector,
)
from twins.disaster.heat import PERIOD_NS, HeatWave, Wave, cases_per_death
from twins.disaster.indoors import SLICES, Exposure, Homes, dark_share
from twins.energy.shortage import LEASE_NS
from twins.energy.twin import EnergyTwin
from twins.energy.weather import Told, prospect, spare_mw
from twins.regions.weather import FORECAST_HOURS, Outlook, doubt, lead

POINTS = 37
DEFAULTS = {p.name: p.default for p in HeatWave().describe().parameters}
HOMES, EXPOSURE = Homes.of(DEFAULTS), Exposure.of(DEFAULTS)
shares = st.floats(0.0, 1.0)


# -- homes and people ------------------------------------------------------------------


def test_a_dark_home_warms_up_by_its_time_constant_and_cools_down_faster() -> None:
    warm = HOMES.after(np.array([25.0]), np.array([1.0]), 40.0, 8.0)
    assert warm[0] == pytest.approx(42.0 - 17.0 * math.exp(-1.0))
    cooled = HOMES.after(warm, np.array([0.0]), 40.0, 1.5)
    assert cooled[0] == pytest.approx(25.0 + (warm[0] - 25.0) * math.exp(-1.0))


def test_two_half_steps_warm_a_home_as_one_whole_step() -> None:
    start, dark = np.array([26.0, 31.0]), np.array([0.3, 1.0])
    once = HOMES.after(start, dark, 38.0, 2.0)
    twice = HOMES.after(HOMES.after(start, dark, 38.0, 1.0), dark, 38.0, 1.0)
    assert once == pytest.approx(twice)


@given(shares, shares, st.floats(24.0, 44.0))
def test_more_darkness_never_makes_a_home_cooler_nor_safer(a: float, b: float, out: float) -> None:
    less, more = sorted((a, b))
    homes = HOMES.after(np.array([25.0, 25.0]), np.array([less, more]), out, 3.0)
    assert homes[0] <= homes[1] + 1e-9
    risk = HOMES.risk(homes)
    assert 1.0 <= risk[0] <= risk[1] + 1e-9


def test_without_cooling_the_risk_is_that_of_the_published_odds() -> None:
    assert HOMES.risk(DEFAULTS["indoor_full_c"]) == pytest.approx(1 / 0.23, rel=0.001)
    assert HOMES.risk(DEFAULTS["indoor_safe_c"]) == 1.0


def test_the_excess_of_a_city_with_power_is_the_published_one() -> None:
    """2.49 % more deaths per degree Fahrenheit above the threshold, over all people."""
    hot = DEFAULTS["mortality_threshold_c"] + 5.0 / 9.0
    excess = EXPOSURE.deaths_per_person(hot, np.array([1.0]))[0] / EXPOSURE.deaths_per_person_h
    assert excess == pytest.approx(0.0249, rel=0.001)
    assert EXPOSURE.deaths_per_person(hot - 1.0, np.array([1.0]))[0] == 0.0


@given(shares, shares, st.floats(0.0, 30.0))
def test_the_dark_homes_of_a_load_point_are_as_many_as_the_grid_says(
    kept: float, turning: float, offset: float
) -> None:
    turning *= 1.0 - kept
    dark = dark_share(np.array([kept]), np.array([turning]), np.array([offset]))
    assert dark.shape == (1, SLICES)
    assert dark.mean() == pytest.approx(kept + turning, abs=1e-9)
    assert (dark[0, : int(kept * SLICES + 1e-9)] > 1.0 - 1e-9).all()


def test_feeders_that_take_turns_all_have_the_same_share_of_darkness() -> None:
    total = sum(
        dark_share(np.zeros(1), np.array([0.25]), np.array([0.25 * turn])) for turn in range(4)
    )
    assert total == pytest.approx(np.ones((1, SLICES)))


# -- the wave --------------------------------------------------------------------------


CALM = {"peak_error_sd_c": 0.0, "day_error_sd_c": 0.0}
"""A forecast that does not err."""


def days(
    kept_out: float, hours: int = 48, seed: int = 5, parameters: Mapping[str, float] = NOTHING
) -> tuple[HeatWave, dict[str, Vector]]:
    """A wave in which a share of all homes is dark all the time; the twin and its last values."""
    twin = HeatWave()
    session = Session(twin, "heat")
    session.open(seed, parameters)
    dark = np.full(POINTS, kept_out)
    values: dict[str, Vector] = {}
    for k in range(hours * HOUR_NS // PERIOD_NS + 1):
        inputs = {"powered": 1.0 - dark, "kept_out": dark} if k == 0 else {}
        values |= session.advance(StepInput(k * PERIOD_NS, inputs=inputs)).outputs
    return twin, values


def test_the_forecast_at_the_start_is_the_outlook_and_errs_less_and_less() -> None:
    twin, _ = days(0.0, hours=0)
    outlook = Outlook.of(DEFAULTS)
    expected = [outlook.temperature_c(h) for h in range(FORECAST_HOURS)]
    truth = np.array([twin._temperature_c(float(h)) for h in range(FORECAST_HOURS)])
    assert twin.forecast_c(0.0)[1:] == pytest.approx(expected[1:])
    before = np.abs(twin.forecast_c(0.0) - truth)
    for now_h in (12.0, 24.0, 48.0):
        error = np.abs(twin.forecast_c(now_h) - truth)
        assert (error <= before + 1e-9).all()
        assert error[: int(now_h) + 1] == pytest.approx(0.0)
        before = error


def test_whoever_falls_ill_with_power_also_does_without_it() -> None:
    """Common random numbers: darkness adds cases and takes none away."""
    _, lit = days(0.0)
    twin, dark = days(0.3)
    for severity in range(1, 5):
        name = f"injured_severity{severity}"
        assert (dark[name] >= lit[name]).all()
    assert dark["injured_severity2"].sum() > 1.2 * lit["injured_severity2"].sum()
    assert twin.wave is not None
    assert twin.wave.hazard.sum(axis=0) == pytest.approx(
        dark["excess_deaths_expected"][0] * cases_per_death(DEFAULTS)
    )


def test_cases_come_as_often_as_expected() -> None:
    """The number of cases is Poisson: over seeds, mean and variance are the expectation."""
    found = [days(0.0, 24, seed) for seed in range(4)]
    expected = np.array([t.wave.hazard[:, 0].sum() for t, _ in found if t.wave])
    got = np.array([v["injured_severity1"].sum() for _, v in found])
    assert abs((got - expected).sum()) < 4.0 * math.sqrt(expected.sum())


def test_a_wave_goes_on_from_its_snapshot_as_if_nothing_had_been() -> None:
    twin, _ = days(0.2, hours=20)
    other = HeatWave()
    other.restore(twin.snapshot())
    one, two = Session(twin, "heat"), Session(other, "heat")
    for session in (one, two):
        session.values["kept_out"] = np.full(POINTS, 0.2)
        session.values["powered"] = np.full(POINTS, 0.8)
        session.last_ns = 20 * HOUR_NS
    step = StepInput(20 * HOUR_NS + PERIOD_NS)
    first, second = one.advance(step).outputs, two.advance(step).outputs
    assert {n: v.tobytes() for n, v in first.items()} == {n: v.tobytes() for n, v in second.items()}


def test_the_block_knows_how_hot_a_home_gets_that_stays_dark() -> None:
    """Its temperature is that of the simulation while it is dark without a break, and a day of
    darkness for all costs what the simulated excess deaths of it are worth, within a tenth."""
    twin = HeatWave()
    Session(twin, "heat").open(1, CALM)
    block = twin.flexibility((HOUR_NS,) * 24)
    powered = block.ports[0].columns
    dark = join({"heat": block}, ())
    dark.high[powered.ravel()] = 0.0
    cost_usd = optimum_usd(engine_of(dark))
    _, lit = days(0.0, 24, parameters=CALM)
    _, gone = days(1.0, 24, parameters=CALM)
    deaths = gone["excess_deaths_expected"][0] - lit["excess_deaths_expected"][0]
    assert cost_usd == pytest.approx(deaths * DEFAULTS["value_of_life_usd"], rel=0.1)


# -- other futures of a wave -------------------------------------------------------------


def at_noon(hours: float = 20.5, seed: int = 5) -> HeatWave:
    """A wave that has come so far, with a fifth of all homes dark."""
    twin = HeatWave()
    session = Session(twin, "heat")
    session.open(seed, {})
    dark = np.full(POINTS, 0.2)
    for k in range(round(hours * HOUR_NS) // PERIOD_NS + 1):
        inputs = {"powered": 1.0 - dark, "kept_out": dark} if k == 0 else {}
        session.advance(StepInput(k * PERIOD_NS, inputs=inputs))
    return twin


AT_NOON = at_noon().snapshot()


def future_of(state: bytes, hour: float, seed: int, **parameters: float) -> HeatWave:
    """One of the futures from an hour on of a wave that stands in a state."""
    twin = HeatWave()
    twin.open(seed, {**DEFAULTS, **parameters})
    twin.restore(state)
    twin.diverge(round(hour * HOUR_NS), seed, {**DEFAULTS, **parameters})
    return twin


def test_a_wave_that_goes_on_with_its_own_seed_is_not_changed() -> None:
    twin = at_noon()
    before = twin.snapshot()
    twin.diverge(twin._now_ns, 5, DEFAULTS)
    assert twin.snapshot() == before


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.floats(-4.0, 4.0), min_size=FORECAST_HOURS, max_size=FORECAST_HOURS),
    st.floats(20.76, 500.0),
)
def test_futures_know_nothing_of_what_has_not_been_told(
    seed: int, errors_c: list[float], outage_h: float
) -> None:
    """Two waves with one past and other things to come have the same futures, bit for bit."""
    state = AT_NOON
    other = HeatWave()
    other.restore(state)
    assert other.wave is not None
    seen = np.arange(FORECAST_HOURS) <= 20
    other.wave.error_c = np.where(seen, other.wave.error_c, errors_c)
    other.wave.outage_h = outage_h
    later = other.wave.thresholds > other.wave.hazard[:, :, None]
    other.wave.thresholds = np.where(later, other.wave.thresholds * 1.5, other.wave.thresholds)
    other.wave.seed = 77
    one = future_of(state, 20.75, seed)
    two = future_of(other.snapshot(), 20.75, seed)
    for name in (field.name for field in fields(Wave)):
        mine, its = getattr(one.wave, name), getattr(two.wave, name)
        assert np.array_equal(mine, its) if isinstance(mine, np.ndarray) else mine == its, name
    asked = [twin.flexibility((HOUR_NS,) * 6) for twin in (one, two)]
    assert (asked[0].row_low == asked[1].row_low).all()
    assert (asked[0].cost == asked[1].cost).all()


def test_what_was_seen_and_forecast_stays_in_every_future() -> None:
    twin = at_noon()
    assert twin.wave is not None
    for seed in (11, 12):
        other = future_of(twin.snapshot(), 20.75, seed)
        assert other.wave is not None
        assert other.wave.cases.sum() == twin.wave.cases.sum()
        past = [other._temperature_c(h) for h in range(21)]
        assert past == pytest.approx([twin._temperature_c(h) for h in range(21)])
        assert other.forecast_c(18.0)[21:] == pytest.approx(twin.wave.forecast_c[21:])
        truth = [other._temperature_c(float(h)) for h in range(FORECAST_HOURS)]
        assert other.forecast_c(95.0) == pytest.approx(truth)


def test_futures_err_as_forecasts_do_and_go_on_from_the_error_that_was_seen() -> None:
    twin = at_noon()
    assert twin.wave is not None
    state = twin.snapshot()
    futures = [future_of(state, 20.75, seed) for seed in range(300)]
    outlook = Outlook.of(DEFAULTS)
    errors = np.array(
        [[f._temperature_c(float(h)) - twin.wave.forecast_c[h] for h in (21, 40)] for f in futures]
    )
    # for tomorrow today's error tells of the part that all days have in common, and of no other
    peak, day = DEFAULTS["peak_error_sd_c"], DEFAULTS["day_error_sd_c"]
    b20, b40 = peak * outlook.bell(20.0), peak * outlook.bell(40.0)
    told = b40**2 * b20**2 / (b20**2 + day**2)
    spread_c = math.sqrt(b40**2 - told + day**2) * doubt(40.0) * lead(40, 18.0)
    assert errors[:, 1].std() == pytest.approx(spread_c, rel=0.15)
    # an hour ahead the error is that of now, the more so as the forecast had the time to err
    now_c = twin._temperature_c(20.0) - twin.wave.forecast_c[20]
    assert errors[:, 0].mean() == pytest.approx(now_c * lead(21, 18.0) / lead(20, 18.0), rel=0.05)
    assert errors[:, 0].std() < 0.1 * outlook.deviation_c(21.0, 18.0) + 0.01


def test_a_unit_that_has_not_tripped_may_do_so_from_now_on_and_one_that_has_stays_out() -> None:
    state = at_noon().snapshot()
    waits = []
    for seed in range(300):
        wave = future_of(state, 20.75, seed).wave
        assert wave is not None
        waits.append(wave.outage_h - 20.75)
    assert min(waits) > 0.0
    assert np.mean(waits) == pytest.approx(DEFAULTS["unit_trip_mean_h"], rel=0.2)
    gone = HeatWave()
    gone.restore(state)
    assert gone.wave is not None
    gone.wave.outage_h, gone.wave.tripped = 3.0, "event"
    after = future_of(gone.snapshot(), 20.75, 9)
    assert after._import_limit_mw(21.0) == 2550.0


def test_cases_to_come_are_as_many_as_the_hazard_says_in_every_future() -> None:
    state = at_noon().snapshot()
    more, expected = [], []
    for seed in range(12):
        twin = future_of(state, 20.75, seed)
        assert twin.wave is not None
        before, hazard = twin.wave.cases.sum(), twin.wave.hazard.sum()
        session = Session(twin, "heat")
        session.last_ns = round(20.5 * HOUR_NS)
        for k in range(83, 140):
            session.advance(StepInput(k * PERIOD_NS))
        more.append(twin.wave.cases.sum() - before)
        expected.append(twin.wave.hazard.sum() - hazard)
    assert abs(sum(more) - sum(expected)) < 4.0 * math.sqrt(sum(expected))


def test_homes_that_take_turns_cost_the_block_nothing_and_dark_ones_do() -> None:
    """A day in which each load point has 40 % of its homes dark, an hour each: nobody is hurt by
    it in the simulation, and nobody in the block."""
    turning = HeatWave()
    session = Session(turning, "heat")
    session.open(1, CALM)
    for k in range(24 * 4 + 1):
        inputs = {"powered": np.full(POINTS, 0.6)} if k == 0 else {}
        session.advance(StepInput(k * PERIOD_NS, inputs=inputs))
    lit, _ = days(0.0, 24, 1, CALM)
    assert turning.wave is not None
    assert lit.wave is not None
    assert turning.wave.deaths == pytest.approx(lit.wave.deaths, rel=0.01)

    def cost_usd(powered: float) -> float:
        twin = HeatWave()
        Session(twin, "heat").open(1, CALM)
        block = twin.flexibility((HOUR_NS,) * 24)
        problem = join({"heat": block}, ())
        problem.high[block.ports[0].columns.ravel()] = powered
        return optimum_usd(engine_of(problem))

    assert cost_usd(0.6) == pytest.approx(0.0, abs=1.0)
    assert cost_usd(0.0) > 1e7


# -- the grid that is short of supply ---------------------------------------------------


def grid(**parameters: float) -> Session:
    session = Session(EnergyTwin(), "energy")
    session.open(1, {"demand_factor": 0.7, **parameters})
    return session


def told(session: Session, hour: float, *actions: Action, **inputs: float) -> dict[str, float]:
    """One step at an hour; every scalar that the grid has published so far."""
    given = {name: np.array([value]) for name, value in inputs.items()}
    session.advance(StepInput(round(hour * 60) * MINUTE_NS, inputs=given, actions=actions))
    published = session.twin._state.published  # type: ignore[attr-defined]
    return {name: float(v[0]) for name, v in published.items() if v.size == 1}


def limit(point: str, value: float) -> Action:
    return Action("energy", "serve_limit", point, value)


def test_a_grid_that_nobody_limits_says_nothing_of_shortage() -> None:
    session = grid()
    plain = told(session, 0.0)
    assert "lacking" not in plain
    assert plain["shed"] == pytest.approx(0.0, abs=1e-9)


def test_demand_grows_with_the_heat_by_the_published_share() -> None:
    cool, hot = told(grid(), 0.0), told(grid(), 0.0, ambient_temperature=34.0)
    usual = cool["served"]
    # hospitals and pumps, told nothing, keep their usual load: all else grows by 3 % a degree
    assert hot["served"] == pytest.approx(usual * 1.3, rel=0.01)


@settings(max_examples=15, deadline=None)
@given(st.floats(600.0, 3000.0), st.floats(20.0, 42.0))
def test_relays_take_off_the_least_number_of_blocks_that_is_enough(
    limit_mw: float, temperature_c: float
) -> None:
    free = told(grid(), 0.0, ambient_temperature=temperature_c)
    session = grid()
    short = told(session, 0.0, ambient_temperature=temperature_c, supply_limit=limit_mw)
    assert short["supply"] <= limit_mw + 1e-6
    assert short["served"] + short["shed"] == pytest.approx(free["served"] + free["shed"])
    assert short["supply"] == pytest.approx(short["served"] + short["losses"], rel=1e-6)
    assert short["lacking"] == pytest.approx(max(0.0, free["supply"] - limit_mw))
    blocks = session.twin._state.rationed.blocks  # type: ignore[attr-defined]
    assert (blocks == 0) == (free["supply"] <= limit_mw)
    # a block is 7 % of all: no more than one of them is taken in vain
    assert short["shed"] <= short["lacking"] + 0.08 * free["served"] + 1e-6


def test_less_supply_never_serves_more() -> None:
    served = [told(grid(), 0.0, supply_limit=mw)["served"] for mw in (2500, 1500, 1200, 900, 600)]
    assert served == sorted(served, reverse=True)


def test_hospitals_and_pumps_are_spared_by_relays_and_by_orders() -> None:
    session = grid()
    told(session, 0.0, supply_limit=1000.0)
    told(session, 1.0, *(limit(p, 0.0) for p in session.description.ids("load_point")))
    published = session.twin._state.published  # type: ignore[attr-defined]
    assert (published["hospital_supplied"] == 1.0).all()
    assert (published["pump_supplied"] == 1.0).all()
    assert published["supplied_fraction"].mean() < 0.1


def test_an_order_ends_with_its_lease() -> None:
    session = grid()
    told(session, 0.0)
    low = told(session, 1.0, limit("P_LO10", 0.0))
    assert low["shed"] > 50.0
    last_h = 1.0 + LEASE_NS / HOUR_NS
    assert told(session, last_h - 1 / 12)["shed"] > 50.0
    assert told(session, last_h)["shed"] == pytest.approx(0.0, abs=1e-6)


def test_customers_under_contract_help_as_long_as_their_store_lasts() -> None:
    session = grid(response_store_mwh=200.0)
    told(session, 0.0, supply_limit=1500.0)
    help_ = Action("energy", "demand_response", SYSTEM, 100.0)
    first = told(session, 1.0, help_)
    assert first["response_left_mwh"] == pytest.approx(200.0)
    assert told(session, 2.0, help_)["response_left_mwh"] == pytest.approx(100.0)
    spent = told(session, 3.0, help_)
    assert spent["response_left_mwh"] == pytest.approx(0.0)
    assert told(session, 4.0, help_)["response_used_mwh"] == pytest.approx(200.0)
    assert session.twin._state.orders.response_mw == 0.0  # type: ignore[attr-defined]


def test_a_plan_of_the_grid_costs_no_more_with_less_doubt_or_more_help() -> None:
    def cost_usd(**parameters: float) -> float:
        session = grid(forecast_limit_mw=2300.0, **parameters)
        block = session.twin.flexibility((3 * HOUR_NS,) * 8)
        assert block is not None
        return optimum_usd(engine_of(join({"energy": block}, ())))

    usual = cost_usd()
    sure = {"peak_error_sd_c": 0.0, "day_error_sd_c": 0.0, "cooling_error_per_c": 0.0}
    assert cost_usd(**sure, other_error=0.0) < cost_usd(**sure, other_error=0.01)
    assert cost_usd(response_store_mwh=4000.0) < usual
    assert cost_usd(response_store_mwh=0.0) > usual
    assert usual > 1e6


def test_a_scenario_without_limits_has_the_block_that_it_had() -> None:
    block = grid().twin.flexibility((36 * HOUR_NS, 36 * HOUR_NS))
    assert block is not None
    assert {port.role for port in block.ports} == {"available", "supply"}


def test_customers_help_in_full_also_while_feeders_are_out() -> None:
    """Those on feeders that are out are not asked; the others make up for them."""
    session = grid()
    told(session, 0.0)
    orders = [limit(point, 0.5) for point in session.description.ids("load_point")]
    halved = told(session, 1.0, *orders)
    helped = told(session, 1.0 + 1 / 12, Action("energy", "demand_response", SYSTEM, 100.0))
    assert halved["served"] - helped["served"] == pytest.approx(100.0)
    assert helped["shed"] == pytest.approx(halved["shed"], abs=1e-6)


def test_how_demand_grows_with_heat_is_known_after_a_warm_hour_and_not_before() -> None:
    for outdoor_c, expected in ((24.5, 0.04), (30.0, 0.027)):
        session = grid(cooling_per_c=0.027)
        told(session, 0.0, ambient_temperature=outdoor_c)
        twin = session.twin
        parameters = {p.name: p.default for p in session.description.parameters}
        twin.diverge(HOUR_NS, 3, {**parameters, "demand_factor": 0.7, "cooling_per_c": 0.04})
        assert twin._parameters["cooling_per_c"] == expected  # type: ignore[attr-defined]


@given(st.floats(1.0, 200.0), st.floats(100.0, 250.0))
def test_what_is_kept_free_wastes_least_in_the_mean(deviation_mw: float, stage_mw: float) -> None:
    errors_mw = deviation_mw * np.random.default_rng(3).standard_normal(4000)

    def waste_mw(spare: float) -> float:
        stages = np.ceil(np.maximum(errors_mw - spare, 0.0) / stage_mw)
        return float((spare - errors_mw + stage_mw * stages).mean())

    found = waste_mw(spare_mw(deviation_mw, stage_mw))
    others = [waste_mw(r * deviation_mw) for r in np.linspace(0.0, 4.0, 17)]
    assert found <= min(others) + 0.1 * deviation_mw


def test_the_less_is_known_the_more_is_kept_free_until_it_is_in_vain() -> None:
    kept = [spare_mw(deviation, 190.0) for deviation in (0.0, 10.0, 30.0, 60.0)]
    assert kept == sorted(kept)
    assert kept[0] == 0.0
    # where relays act as often as not, whatever is kept free is lost
    assert spare_mw(120.0, 190.0) == 0.0


def test_what_it_is_now_moves_what_is_expected_for_the_next_hours() -> None:
    p = {q.name: q.default for q in EnergyTwin().describe().parameters}
    p["forecast_limit_mw"] = 2700.0
    forecast_c = np.full(FORECAST_HOURS, 36.0)

    def warm(outdoor_c: float) -> Vector:
        told_now = Told(forecast_c, np.full(FORECAST_HOURS, 0.5), None, outdoor_c)
        periods = (HOUR_NS,) * 24
        found = prospect(p, EnergyTwin()._day, periods, 9 * HOUR_NS, 3400.0, told_now, 0.0, 0.0)
        assert found is not None
        return found.warm

    usual, hotter = warm(36.0), warm(37.0)
    assert hotter[0] - usual[0] == pytest.approx(p["cooling_per_c"], rel=0.01)
    assert (np.diff(hotter - usual) < 0.0).all()
    assert hotter[-1] == pytest.approx(usual[-1], abs=0.001)
