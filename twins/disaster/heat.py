"""Lays a heat wave over a region: what it is like outside, what power comes in, whom it hurts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Causality,
    Description,
    Entity,
    Fidelity,
    LinearBlock,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.disaster.heatblock import heat_block
from twins.disaster.heatparameters import HEAT_PARAMETERS
from twins.disaster.indoors import SLICES, Exposure, Homes, dark_share
from twins.regions import data_hash, region_rows
from twins.regions.weather import FORECAST_HOURS, Outlook, doubt, forecast_entities, lead

PERIOD_NS = 15 * MINUTE_NS
ISSUE_H = 6
"""Hours between two issues of the forecast."""
SEVERITIES = 4
WEATHER_STREAM, UNIT_STREAM, CASE_STREAM = 31, 32, 33
CASES_AT_ONCE = 64
"""How many thresholds are drawn at a time for each zone and severity."""


@dataclass(frozen=True, slots=True)
class Places:
    """The zones of a region with their people, and the load point that each hangs on."""

    rows: tuple[dict[str, str], ...]
    people: Vector
    load_points: tuple[str, ...]
    load_point: NDArray[np.int64]


@lru_cache(maxsize=4)
def places(region: str) -> Places:
    rows = region_rows(region, "zones.csv")
    points = tuple(row["load_point"] for row in region_rows(region, "load_points.csv"))
    index = {name: i for i, name in enumerate(points)}
    return Places(
        rows,
        np.array([float(row["population"]) for row in rows]),
        points,
        np.array([index[row["load_point"]] for row in rows], dtype=np.int64),
    )


@dataclass(slots=True)
class Wave:
    """All that changes in a run; plain data, so that a snapshot is all of it."""

    seed: int
    parameters: dict[str, float]
    error_c: Vector
    """How much hotter than forecast at the start each hour of the run becomes."""
    known_c: Vector
    """How much of that was forecast at `known_h`, from when on the rest comes out."""
    forecast_c: Vector
    """The forecast that was issued last, at `issued_h`."""
    outage_h: float
    """When a unit that feeds the region trips, for the rest of the run."""
    indoor_c: Vector
    """Temperature of each slice of the homes of each load point."""
    offset: Vector
    """Where the rotating outages of each load point have got to, as a share of its homes."""
    hazard: Vector
    """Expected cases so far; zones x severities."""
    deaths: float
    """Excess deaths expected so far without any care."""
    cases: Vector
    thresholds: Vector
    """Expected cases at which the next case comes; zones x severities x so many."""
    hot_home: NDArray[np.object_]
    """Per load point the event that says that its homes are hot now, or nothing."""
    cases_before: Vector
    """Cases that came before the first of the thresholds, which lie beyond `hazard_before`."""
    hazard_before: Vector
    known_h: float = 0.0
    issued_h: float = 0.0
    drawn: int = 0
    onset: str = ""
    tripped: str = ""
    told: dict[str, bytes] = field(default_factory=dict)


STATES = Snapshots(Wave)


class HeatWave(Twin):
    """A heat wave with short supply.

    It is as hot as forecast at the start plus an error that grows with the lead time; a new
    forecast is issued every six hours and errs less. The transmission grid can give as much as
    forecast until a unit trips. Who is hurt follows the outdoor temperature of the last
    24 hours and, for those whose homes have lost power, the temperature in their homes.
    Cases come when the expected number passes thresholds drawn beforehand, so that two runs
    with one seed differ only in whom the difference of their circumstances hurts.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.wave: Wave | None = None
        self._now_ns = 0
        self._last_share: tuple[bytes, Vector] | None = None

    def describe(self) -> Description:
        return _describe(self.region)

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        p = dict(parameters)
        draws = np.random.default_rng([seed, WEATHER_STREAM])
        error_c = _errors(p, draws)
        luck = float(np.random.default_rng([seed, UNIT_STREAM]).standard_exponential())
        where = places(self.region)
        points, zones = len(where.load_points), where.people.size
        self.wave = Wave(
            seed=seed,
            parameters=p,
            error_c=error_c,
            known_c=np.zeros(FORECAST_HOURS),
            forecast_c=np.zeros(FORECAST_HOURS),
            outage_h=p["unit_trip_mean_h"] * luck if p["unit_mw"] > 0.0 else math.inf,
            indoor_c=np.full((points, SLICES), p["indoor_comfort_c"]),
            offset=np.zeros(points),
            hazard=np.zeros((zones, SEVERITIES)),
            deaths=0.0,
            cases=np.zeros((zones, SEVERITIES)),
            thresholds=np.zeros((zones, SEVERITIES, 0)),
            hot_home=np.full(points, "", dtype=object),
            cases_before=np.zeros((zones, SEVERITIES)),
            hazard_before=np.zeros((zones, SEVERITIES)),
        )
        self.wave.forecast_c = self.forecast_c(0.0)
        self._now_ns = 0

    def snapshot(self) -> bytes:
        return STATES.pack((self._wave, self._now_ns))

    def restore(self, state: bytes) -> None:
        self.wave, self._now_ns = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """The weather, the unit and the cases to come are drawn anew.

        What it was outside at each whole hour so far and the last forecast stay; what that
        forecast errs by is drawn on the condition of the error that was seen last. A unit that
        has not tripped has the same law as at the start, and so have the cases to come. How warm
        homes are shows in who falls ill, and stays.
        """
        if believed:
            raise TwinError(Reason.UNKNOWN_VARIABLE, "a heat wave is no matter of belief")
        wave = self._wave
        self._now_ns = time_ns
        if (wave.seed, wave.parameters) == (seed, dict(parameters)):
            return
        wave.seed, wave.parameters = seed, dict(parameters)
        self._diverge_weather((time_ns - 1) // HOUR_NS, wave.parameters)
        if not wave.tripped:
            luck = float(np.random.default_rng([seed, UNIT_STREAM]).standard_exponential())
            wait_h = wave.parameters["unit_trip_mean_h"] * luck
            spared = wave.parameters["unit_mw"] <= 0.0
            wave.outage_h = math.inf if spared else time_ns / HOUR_NS + wait_h
        wave.cases_before, wave.hazard_before = wave.cases, wave.hazard
        wave.thresholds, wave.drawn = wave.thresholds[:, :, :0], 0

    def _diverge_weather(self, seen: int, p: Mapping[str, float]) -> None:
        """Errors of the last forecast for the hours after `seen`, the last one that is known."""
        wave = self._wave
        expected_c = Outlook.of(p).temperatures_c(np.arange(float(FORECAST_HOURS)))
        leads = _leads(wave.issued_h)
        off_c = None
        if 0 <= seen < FORECAST_HOURS and leads[seen] > 0.0:
            seen_c = expected_c[seen] + wave.error_c[seen]
            off_c = seen, float((seen_c - wave.forecast_c[seen]) / leads[seen])
        errors_c = _errors(p, np.random.default_rng([wave.seed, WEATHER_STREAM]), off_c)
        wave.known_c, wave.known_h = wave.forecast_c - expected_c, wave.issued_h
        coming = np.arange(FORECAST_HOURS) > seen
        wave.error_c = np.where(coming, wave.known_c + leads * errors_c, wave.error_c)

    @property
    def _wave(self) -> Wave:
        if self.wave is None:
            raise RuntimeError("the twin has not been opened")
        return self.wave

    # --- weather and supply ---------------------------------------------------------------

    def _temperatures_c(self, hours: Vector) -> Vector:
        """What it is outside, between whole hours on a straight line from one error to the next."""
        wave = self._wave
        error_c = np.interp(hours, np.arange(FORECAST_HOURS), wave.error_c)
        before = Outlook.of(wave.parameters).temperatures_c(hours)
        return np.asarray(before + np.where(hours >= 0.0, error_c, 0.0))

    def _temperature_c(self, hour: float) -> float:
        return float(self._temperatures_c(np.array([hour]))[0])

    def _mean_24h_c(self, hour: float) -> float:
        return float(self._temperatures_c(hour - np.arange(24.0)).mean())

    def forecast_c(self, now_h: float) -> Vector:
        """The temperature of each hour of the run: as it was, then as forecast now.

        The error of the forecast for an hour falls in proportion to the time left to it.
        """
        wave = self._wave
        hours = np.arange(FORECAST_HOURS, dtype=np.float64)
        ahead_h = np.maximum(hours - wave.known_h, 1.0)
        left = np.clip((hours - now_h) / ahead_h, 0.0, 1.0)
        expected = Outlook.of(wave.parameters).temperatures_c(hours)
        return np.asarray(expected + wave.known_c + (wave.error_c - wave.known_c) * (1.0 - left))

    def _import_limit_mw(self, now_h: float) -> float:
        p = self._wave.parameters
        return p["import_limit_mw"] - (p["unit_mw"] if now_h >= self._wave.outage_h else 0.0)

    # --- one step -------------------------------------------------------------------------

    def advance(self, step: Step) -> None:
        now_h = step.time_ns / HOUR_NS
        if step.span_ns:
            self._hurt(step, now_h)
        self._now_ns = step.time_ns
        if step.time_ns % HOUR_NS == 0:
            self._tell_weather(step, now_h)
        self._tell_supply(step, now_h)
        self._tell_hot_homes(step)
        self._tell_cases(step)

    def _tell_weather(self, step: Step, now_h: float) -> None:
        wave, outside_c = self._wave, self._temperature_c(now_h)
        threshold_c = wave.parameters["mortality_threshold_c"]
        if not wave.onset and self._mean_24h_c(now_h) > threshold_c:
            wave.onset = step.emit(
                "heat_wave",
                SYSTEM,
                f"the last 24 hours were hotter than {threshold_c:.0f} degrees on average",
            )
        known = {0: wave.onset} if wave.onset else None
        step.publish("temperature", outside_c, known)
        if round(now_h) % ISSUE_H == 0:
            outlook = Outlook.of(wave.parameters)
            wave.forecast_c, wave.issued_h = self.forecast_c(now_h), now_h
            deviation = [outlook.deviation_c(float(h), now_h) for h in range(FORECAST_HOURS)]
            ahead = wave.forecast_c[int(now_h) : int(now_h) + 24]
            step.publish("forecast_temperature", wave.forecast_c)
            step.publish("forecast_deviation", np.array(deviation))
            step.publish("forecast_peak", ahead.max() if ahead.size else outside_c)

    def _tell_supply(self, step: Step, now_h: float) -> None:
        wave = self._wave
        limit_mw = self._import_limit_mw(now_h)
        if now_h >= wave.outage_h and not wave.tripped:
            wave.tripped = step.emit(
                "unit_tripped",
                SYSTEM,
                f"a unit trips: the region may draw {limit_mw:.0f} MW",
                [wave.onset],
            )
        value = np.array([limit_mw])
        if wave.told.get("import_limit") == value.tobytes():
            return
        wave.told["import_limit"] = value.tobytes()
        step.publish("import_limit", value, {0: wave.tripped} if wave.tripped else None)
        step.publish("forecast_import_limit", np.full(FORECAST_HOURS, limit_mw))

    def _hurt(self, step: Step, now_h: float) -> None:
        """Let homes warm up and people fall ill over the span since the last step."""
        wave, where = self._wave, places(self.region)
        p = wave.parameters
        homes, exposure = Homes.of(p), Exposure.of(p)
        dark = np.clip(1.0 - step["powered"], 0.0, 1.0)
        kept_out = np.minimum(np.clip(step["kept_out"], 0.0, 1.0), dark)
        share = self._share(kept_out, dark - kept_out)
        before_h = now_h - step.span_h
        wave.indoor_c = homes.after(
            wave.indoor_c, share, self._temperature_c(before_h), step.span_h
        )
        if int(now_h / p["rotation_h"]) > int(before_h / p["rotation_h"]):
            wave.offset = wave.offset + (dark - kept_out)
        risk = homes.risk(wave.indoor_c).mean(axis=1)
        deaths = exposure.deaths_per_person(self._mean_24h_c(now_h), risk)
        expected = deaths[where.load_point] * where.people * step.span_h
        wave.deaths += float(expected.sum())
        wave.hazard = wave.hazard + expected[:, None] * cases_per_death(p)

    def _share(self, kept_out: Vector, rotated: Vector) -> Vector:
        """`dark_share`, which stays the same from one turn to the next."""
        case = kept_out.tobytes() + rotated.tobytes() + self._wave.offset.tobytes()
        if self._last_share is None or self._last_share[0] != case:
            self._last_share = case, dark_share(kept_out, rotated, self._wave.offset)
        return self._last_share[1]

    def _tell_cases(self, step: Step) -> None:
        wave, where = self._wave, places(self.region)
        step.publish("excess_deaths_expected", wave.deaths)
        while wave.thresholds.shape[2] == 0 or (wave.thresholds[:, :, -1] <= wave.hazard).any():
            draws = np.random.default_rng([wave.seed, CASE_STREAM, wave.drawn])
            gaps = draws.standard_exponential((*wave.hazard.shape, CASES_AT_ONCE))
            last = wave.thresholds[:, :, -1:] if wave.drawn else wave.hazard_before[:, :, None]
            more = last + np.cumsum(gaps, axis=2)
            wave.thresholds = np.concatenate([wave.thresholds, more], axis=2)
            wave.drawn += 1
        cases = wave.cases_before + (wave.thresholds <= wave.hazard[:, :, None]).sum(axis=2)
        for severity in range(SEVERITIES):
            new = np.flatnonzero(cases[:, severity] != wave.cases[:, severity])
            if not new.size:
                continue
            causes = {
                int(zone): str(wave.hot_home[where.load_point[zone]]) or wave.onset for zone in new
            }
            causes = {zone: event for zone, event in causes.items() if event}
            step.publish(f"injured_severity{severity + 1}", cases[:, severity], causes)
        wave.cases = cases

    def _tell_hot_homes(self, step: Step) -> None:
        """Emit an event for every load point whose homes have become too hot."""
        wave, where = self._wave, places(self.region)
        hottest_c = wave.indoor_c.max(axis=1)
        hot = hottest_c > wave.parameters["indoor_safe_c"]
        for point in np.flatnonzero(hot != (wave.hot_home != "")).tolist():
            if not hot[point]:
                wave.hot_home[point] = ""
                continue
            name = where.load_points[point]
            wave.hot_home[point] = step.emit(
                "homes_hot",
                name,
                f"homes at {name} that have no power reach {hottest_c[point]:.0f} degrees",
                (wave.onset, *step.cause("powered", point)),
            )

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        wave, where = self._wave, places(self.region)
        starts_h = (self._now_ns + np.concatenate([[0], np.cumsum(periods_ns)[:-1]])) / HOUR_NS
        outlook = Outlook.of(wave.parameters)
        past = outlook.temperatures_c(np.arange(-24.0, 0.0))
        return heat_block(
            where.load_points,
            np.asarray(
                np.bincount(where.load_point, where.people, len(where.load_points)), np.float64
            ),
            starts_h,
            np.array(periods_ns) / HOUR_NS,
            np.concatenate([past, wave.forecast_c]),
            wave.indoor_c.mean(axis=1) - wave.parameters["indoor_comfort_c"],
            wave.parameters,
        )


def _leads(issued_h: float) -> Vector:
    """By hour of the run what part of its error a forecast issued at an instant still has."""
    return np.array([lead(float(hour), issued_h) for hour in range(FORECAST_HOURS)])


def _errors(
    p: Mapping[str, float],
    draws: np.random.Generator,
    seen: tuple[int, float] | None = None,
) -> Vector:
    r"""By hour of the run how much hotter it becomes than forecast at the start.

    A draw z of what all days and each day have in common, normal with deviations s, makes the error
    z·h_t of an hour. When an hour t was `seen` to err by e, the draw is taken on that condition:

    .. math:: z' = z + \frac{S h_t}{h_t^T S h_t} (e - h_t^T z), \quad S = diag(s^2)
    """
    peak_error_c = p["peak_error_sd_c"] * float(draws.standard_normal())
    days = p["day_error_sd_c"] * draws.standard_normal(FORECAST_HOURS // 24 + 1)
    outlook = Outlook.of(p)
    hours = np.arange(FORECAST_HOURS)
    day = ((outlook.start_hour + hours) // 24).astype(np.int64)
    bell = np.array([outlook.bell(float(h)) for h in hours])
    growth = np.array([doubt(float(h)) for h in hours])
    if seen is not None and (deviation_c := outlook.deviation_c(float(seen[0]))) > 0.0:
        hour, error_c = seen
        missing_c = error_c - (peak_error_c * bell[hour] + days[day[hour]]) * growth[hour]
        gain = missing_c * growth[hour] / deviation_c**2
        peak_error_c += p["peak_error_sd_c"] ** 2 * float(bell[hour]) * gain
        days[day[hour]] += p["day_error_sd_c"] ** 2 * gain
    return np.asarray((peak_error_c * bell + days[day]) * growth)


def cases_per_death(p: Mapping[str, float]) -> Vector:
    """Cases of the four severities per excess death that is expected without any care."""
    return np.array(
        [
            p["heat_minor_per_death"],
            p["heat_hospital_per_death"],
            p["heat_critical_per_death"],
            p["heat_dead_at_home_share"],
        ]
    )


@lru_cache(maxsize=4)
def _describe(region: str) -> Description:
    where = places(region)
    entities = [
        *(
            Entity(row["zone"], "zone", row["zone"], float(row["lon_deg"]), float(row["lat_deg"]))
            for row in where.rows
        ),
        *(
            Entity(
                row["load_point"],
                "load_point",
                row["load_point"],
                float(row["lon_deg"]),
                float(row["lat_deg"]),
            )
            for row in region_rows(region, "load_points.csv")
        ),
        *forecast_entities(),
        Entity(SYSTEM, SYSTEM),
    ]

    def given(name: str, initial: float, doc: str) -> Variable:
        return Variable(name, "load_point", "1", Causality.INPUT, initial, 0.0, 1.0, doc)

    def told(name: str, kind: str, unit: str, doc: str) -> Variable:
        return Variable(name, kind, unit, Causality.OUTPUT, 0.0, doc=doc)

    variables = (
        given("powered", 1.0, "share of the homes that have power"),
        given("kept_out", 0.0, "share of the homes that are without it all the time"),
        told("temperature", SYSTEM, "degC", "outdoors in the shade"),
        told("forecast_peak", SYSTEM, "degC", "highest of the next 24 h, as forecast now"),
        told("forecast_temperature", "hour", "degC", "by hour of the run: was, then as forecast"),
        told("forecast_deviation", "hour", "degC", "of the error of that forecast, by hour"),
        told("excess_deaths_expected", SYSTEM, "persons", "so far, without any care"),
        told("import_limit", SYSTEM, "MW", "what the transmission grid can give now"),
        told("forecast_import_limit", "hour", "MW", "by hour of the run, as known now"),
        *(
            told(f"injured_severity{s + 1}", "zone", "persons", f"fallen ill so far: {doc}")
            for s, doc in enumerate(
                ("first aid", "hospital care", "life-threatening", "found dead at home")
            )
        ),
    )
    return Description(
        model="heat-wave",
        version="1",
        domain="disaster",
        entities=tuple(entities),
        variables=variables,
        time=TimePolicy(period_ns=PERIOD_NS),
        fidelity=Fidelity.REDUCED,
        parameters=HEAT_PARAMETERS,
        doc=HeatWave.__doc__ or "",
        data_hash=data_hash(region),
    )
