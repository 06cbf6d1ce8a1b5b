"""Says how demand follows the weather, and what there is to be expected of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from federation.twin import HOUR_NS, Parameter, Vector
from twins.energy.demand import Day
from twins.regions.weather import OUTLOOK_PARAMETERS, Outlook

UNTOLD_C = -300.0
"""An input at this temperature, which there is not, has not been told."""

METERED_ABOVE_C = 1.0
"""An hour so much hotter than the base shows in the meters by how much demand grows with heat."""

COOLING_PARAMETERS = (
    Parameter(
        "cooling_base_c",
        "degC",
        24.0,
        18.0,
        26.0,
        "outdoor temperature above which demand rises",
        "assumption: 18.3 C (65 F) is usual for days, more for hours",
    ),
    Parameter(
        "cooling_per_c",
        "1",
        0.03,
        0.0045,
        0.046,
        "growth of demand per degree above it",
        "Santamouris et al., Energy and Buildings 98 (2015) 119: peak load grows by 0.45 to 4.6 % "
        "per degree in eleven studies",
    ),
    Parameter(
        "forecast_limit_mw",
        "MW",
        -1.0,
        -1.0,
        10000.0,
        "what plans made before anything was told take the supply limit to be; below 0: none",
        "by choice",
    ),
    Parameter(
        "cooling_error_per_c",
        "1",
        0.0012,
        0.0,
        0.02,
        "deviation of what plans take cooling_per_c to be before a warm hour has been metered",
        "assumption: 4 % of it, from the loads of earlier summers",
    ),
    Parameter(
        "other_error",
        "1",
        0.003,
        0.0,
        0.05,
        "deviation of what else a plan takes demand and losses to be, over the supply limit",
        "assumption: where load is shed changes losses by about that",
    ),
    Parameter(
        "nowcast_h",
        "h",
        6.0,
        0.5,
        24.0,
        "time constant with which an error of the forecast that is seen now fades",
        "assumption: half a day's weather goes on as it is",
    ),
    Parameter(
        "relay_block",
        "1",
        0.07,
        0.02,
        0.1,
        "share of each load point that one stage of automatic shedding takes off",
        "NERC PRC-006: three or more stages that shed some 30 % in all, from memory, unverified; "
        "restored by the same stages",
    ),
    Parameter(
        "response_most_mw",
        "MW",
        170.0,
        0.0,
        500.0,
        "what customers under contract can do without",
        "assumption: 5 % of the record peak, as large utilities' programmes have",
    ),
    Parameter(
        "response_store_mwh",
        "MW*h",
        2040.0,
        0.0,
        20000.0,
        "what they may be asked for in all",
        "assumption: three calls of four hours",
    ),
    Parameter(
        "response_usd_mwh",
        "USD/MWh",
        1849.0,
        50.0,
        3000.0,
        "what that costs",
        "PJM's highest strike price of emergency load response (from memory, unverified)",
    ),
    *OUTLOOK_PARAMETERS,
)

COOLING = {p.name: p for p in COOLING_PARAMETERS}


def warm_factor(p: Mapping[str, float], temperature_c: float) -> float:
    """Demand at an outdoor temperature over that on a day without cooling."""
    return 1.0 + p["cooling_per_c"] * max(temperature_c - p["cooling_base_c"], 0.0)


@dataclass(frozen=True, slots=True)
class Told:
    """What has been said of the weather and the supply, by hour of the run; None: nothing yet.

    `outdoor_c` is what it is now, and `cooling_is_metered` says that the growth of demand with
    heat has been seen.
    """

    forecast_c: Vector | None = None
    deviation_c: Vector | None = None
    limit_mw: Vector | None = None
    outdoor_c: float | None = None
    cooling_is_metered: bool = False


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a plan may expect of each period: demand over that of the profile, and supply.

    `spare_mw` of the supply is kept free for errors. `response_mwh` is left to ask customers for,
    `response_mw` at once, after `response_used_mwh`.
    """

    warm: Vector
    limit_mw: Vector
    spare_mw: Vector
    response_mw: float
    response_mwh: float
    response_used_mwh: float
    response_usd_mwh: float


def prospect(
    p: Mapping[str, float],
    day: Day,
    periods_ns: tuple[int, ...],
    now_ns: int,
    peak_mw: float,
    told: Told,
    response_left_mwh: float,
    response_used_mwh: float,
) -> Prospect | None:
    """What there is to be expected from now on; None where no supply is limited.

    `warm` is the mean over the hours of each period, weighted with the profile of the day. What
    was told counts before the outlook of the parameters. `peak_mw` is the demand at a share of 1.
    """
    if told.limit_mw is None and p["forecast_limit_mw"] < 0.0:
        return None
    coming = _Coming.of(p, now_ns, told)
    count = len(periods_ns)
    warm, limit_mw, spare = np.ones(count), np.zeros(count), np.zeros(count)
    start_ns = now_ns
    for t, span_ns in enumerate(periods_ns):
        first = start_ns // HOUR_NS
        last = max(first + 1, math.ceil((start_ns + span_ns) / HOUR_NS))
        shares = np.array([day.share(hour * HOUR_NS) for hour in range(first, last)])
        outdoor_c = [coming.outdoor_c(hour) for hour in range(first, last)]
        warm[t] = np.average([warm_factor(p, c) for c in outdoor_c], weights=shares)
        limit_mw[t] = min(coming.limit_mw(hour) for hour in range(first, last))
        by_weather = p["cooling_per_c"] * coming.deviation_c(first)
        above_c = max(float(np.mean(outdoor_c)) - p["cooling_base_c"], 0.0)
        by_meter = 0.0 if told.cooling_is_metered else p["cooling_error_per_c"] * above_c
        demand_mw = peak_mw * float(shares.mean()) * math.hypot(by_weather, by_meter)
        deviation_mw = math.hypot(demand_mw, p["other_error"] * limit_mw[t])
        spare[t] = spare_mw(deviation_mw, p["relay_block"] * limit_mw[t])
        start_ns += span_ns
    return Prospect(
        warm,
        limit_mw,
        spare,
        p["response_most_mw"],
        response_left_mwh,
        response_used_mwh,
        p["response_usd_mwh"],
    )


@dataclass(frozen=True, slots=True)
class _Coming:
    """The weather and the supply of hours to come, as far as they are known."""

    outlook: Outlook
    told: Told
    now_h: float
    off_c: float
    """How much hotter it is now than was forecast."""
    fades_h: float
    usual_limit_mw: float

    @classmethod
    def of(cls, p: Mapping[str, float], now_ns: int, told: Told) -> _Coming:
        now_h, off_c = now_ns / HOUR_NS, 0.0
        if told.forecast_c is not None and told.outdoor_c is not None:
            off_c = told.outdoor_c - float(told.forecast_c[_hour(now_ns, told.forecast_c)])
        outlook = Outlook.of(p)
        return cls(outlook, told, now_h, off_c, p["nowcast_h"], p["forecast_limit_mw"])

    def outdoor_c(self, hour: int) -> float:
        forecast_c = self.told.forecast_c
        if forecast_c is None or hour >= forecast_c.size:
            return self.outlook.temperature_c(hour)
        return float(forecast_c[hour]) + self.off_c * self._kept(hour)

    def deviation_c(self, hour: int) -> float:
        found = self.told.deviation_c
        if found is None or hour >= found.size:
            return self.outlook.deviation_c(hour)
        return float(found[hour]) * math.sqrt(1.0 - self._kept(hour) ** 2)

    def limit_mw(self, hour: int) -> float:
        found = self.told.limit_mw
        return self.usual_limit_mw if found is None else float(found[min(hour, found.size - 1)])

    def _kept(self, hour: float) -> float:
        """What is left by then of an error that is seen now."""
        return math.exp(-max(hour - self.now_h, 0.0) / self.fades_h)


def _hour(time_ns: int, values: Vector) -> int:
    """The place of the last whole hour before an instant."""
    return min(max((time_ns - 1) // HOUR_NS, 0), values.size - 1)


def spare_mw(deviation_mw: float, stage_mw: float) -> float:
    r"""What to keep free so that as little as possible is taken off in vain.

    When demand is e more than expected and r was kept free, what is taken off in vain is r - e
    and, where that falls below 0, as many stages of relays as make up for it. With e normal,
    the mean of it is

    .. math:: r + stage \sum_{k \ge 0} P(e > r + k \, stage)
    """
    spare = np.linspace(0.0, 4.0 * deviation_mw, 81)
    after = (spare[:, None] + stage_mw * np.arange(4)) / max(deviation_mw, 1e-9)
    return float(spare[np.argmin(spare + stage_mw * ndtr(-after).sum(axis=1))])
