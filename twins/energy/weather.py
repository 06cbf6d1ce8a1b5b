"""Says how demand follows the weather, and what there is to be expected of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from federation.twin import HOUR_NS, Parameter, Vector
from twins.energy.demand import Day
from twins.regions.weather import OUTLOOK_PARAMETERS, Outlook, doubt

UNTOLD_C = -300.0
"""An input at this temperature, which there is not, has not been told."""

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
        "supply_reserve",
        "1",
        0.04,
        0.0,
        0.1,
        "share of the supply limit that a plan keeps free for errors of the forecast in three days",
        "assumption: some 1.2 deviations of the error of the forecast, as a stage of relays that "
        "acts costs more than as much to spare",
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
class Prospect:
    """What a plan may expect of each period: demand over that of the profile, and supply.

    `response_mwh` is left to ask customers for, `response_mw` at once.
    """

    warm: Vector
    limit_mw: Vector
    response_mw: float
    response_mwh: float
    response_usd_mwh: float


def prospect(
    p: Mapping[str, float],
    day: Day,
    periods_ns: tuple[int, ...],
    now_ns: int,
    forecast_c: Vector | None,
    forecast_limit_mw: Vector | None,
    response_left_mwh: float,
) -> Prospect | None:
    """What there is to be expected from now on; None where no supply is limited.

    `warm` is the mean over the hours of each period, weighted with the profile of the day. What
    was told counts before the outlook of the parameters.
    """
    if forecast_limit_mw is None and p["forecast_limit_mw"] < 0.0:
        return None
    outlook = Outlook.of(p)
    warm, limit_mw = np.ones(len(periods_ns)), np.zeros(len(periods_ns))
    start_ns = now_ns
    for t, span_ns in enumerate(periods_ns):
        first = start_ns // HOUR_NS
        last = max(first + 1, math.ceil((start_ns + span_ns) / HOUR_NS))
        total = weight = 0.0
        least_mw = np.inf
        for hour in range(first, last):
            if forecast_c is not None and hour < forecast_c.size:
                temperature_c = float(forecast_c[hour])
            else:
                temperature_c = outlook.temperature_c(hour)
            share = day.share(hour * HOUR_NS)
            total += share * warm_factor(p, temperature_c)
            weight += share
            if forecast_limit_mw is not None:
                here_mw = float(forecast_limit_mw[min(hour, forecast_limit_mw.size - 1)])
            else:
                here_mw = p["forecast_limit_mw"]
            least_mw = min(least_mw, here_mw)
        warm[t] = total / weight
        ahead_h = (start_ns - now_ns) / HOUR_NS
        limit_mw[t] = least_mw * (1.0 - p["supply_reserve"] * doubt(ahead_h))
        start_ns += span_ns
    return Prospect(warm, limit_mw, p["response_most_mw"], response_left_mwh, p["response_usd_mwh"])
