"""Shows a planner what darkness in the heat would cost, as a linear block."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from federation.twin import LinearBlock, Port, Vector
from twins.disaster.indoors import Exposure, Homes, smoothing


def heat_block(
    load_points: tuple[str, ...],
    people: Vector,
    starts_h: Vector,
    hours: Vector,
    forecast_c: Vector,
    excess_c: Vector,
    p: Mapping[str, float],
) -> LinearBlock:
    r"""Deaths in homes that are dark, priced, for each load point l and period t of h_t hours.

    With the need `powered` p, the temperature x of a home above `comfort_c`, N people of whom a
    share c have air conditioning, and the hourly excess deaths d_t of one whose air
    conditioning works,

    .. math::
        x_{lt} = e^{-h_t/\tau} x_{l,t-1} + (1 - e^{-h_t/\tau}) (T_t + gain - T_c) (1 - p_{lt}) \\
        z_{lt} \ge (OR - 1) \frac{T_c + x_{lt} - T_{safe}}{T_{full} - T_{safe}},
        \quad z_{lt} \ge 0 \\
        \min VSL \sum_{l,t} h_t d_t c N_l z_{lt}

    The first row is that of a home dark without a break. Where feeders take turns, and after
    power is back, homes are cooler than that: the block overstates what a plan there harms.
    `forecast_c` begins 24 h before the run; `excess_c` is x now. What hurts also people with
    power is left out: no plan changes it.
    """
    homes, exposure = Homes.of(p), Exposure.of(p)
    points, periods = len(load_points), len(hours)
    size = points * periods
    powered, excess, harm = (np.arange(size).reshape(points, periods) + k * size for k in range(3))
    cost = np.zeros(3 * size)
    outdoor_c, deaths = _expected(exposure, starts_h, hours, forecast_c)
    worth = p["value_of_life_usd"] * exposure.cooled * deaths * hours
    cost[harm.ravel()] = np.outer(people, worth).ravel()

    keep = np.array([smoothing(float(h), p["indoor_warm_h"]) for h in hours])
    warming_c = (1.0 - keep) * np.maximum(outdoor_c + homes.gain_c - homes.comfort_c, 0.0)
    rows = np.arange(size).reshape(points, periods)
    row_index = [rows.ravel(), rows.ravel(), rows[:, 1:].ravel()]
    column_index = [excess.ravel(), powered.ravel(), excess[:, :-1].ravel()]
    coefficient = [
        np.ones(size),
        np.tile(warming_c, points),
        np.tile(-keep[1:], points),
    ]
    balance = np.tile(warming_c, (points, 1))
    balance[:, 0] += keep[0] * excess_c
    low, high = [balance.ravel()], [balance.ravel()]
    names = [f"warming[{e},{t}]" for e in load_points for t in range(periods)]
    row_index += [(size + rows).ravel()] * 2
    column_index += [harm.ravel(), excess.ravel()]
    slope = (p["no_cooling_odds"] - 1.0) / (homes.full_c - homes.safe_c)
    coefficient += [np.ones(size), np.full(size, -slope)]
    low.append(np.full(size, slope * (homes.comfort_c - homes.safe_c)))
    high.append(np.full(size, np.inf))
    names += [f"harm[{e},{t}]" for e in load_points for t in range(periods)]
    return LinearBlock(
        columns=tuple(
            f"{n}[{e},{t}]"
            for n in ("powered", "excess", "harm")
            for e in load_points
            for t in range(periods)
        ),
        low=np.zeros(3 * size),
        high=np.concatenate([np.ones(size), np.full(2 * size, np.inf)]),
        cost=cost,
        integer=np.zeros(3 * size, dtype=np.bool_),
        rows=tuple(names),
        row_low=np.concatenate(low),
        row_high=np.concatenate(high),
        row_index=np.concatenate(row_index).astype(np.int64),
        column_index=np.concatenate(column_index).astype(np.int64),
        coefficient=np.concatenate(coefficient),
        ports=(Port("powered", "need", "load_point", "1", load_points, powered),),
        doc="excess deaths in homes without power; see heat_block",
    )


def _expected(
    exposure: Exposure, starts_h: Vector, hours: Vector, forecast_c: Vector
) -> tuple[Vector, Vector]:
    """Per period the mean temperature outside, and deaths per person with cooling and hour."""
    outdoor_c, deaths = np.zeros(len(hours)), np.zeros(len(hours))
    for t, (start_h, span_h) in enumerate(zip(starts_h, hours, strict=True)):
        first = min(math.floor(start_h) + 24, len(forecast_c) - 1)
        last = max(math.ceil(start_h + span_h) + 24, first + 1)
        outdoor_c[t] = np.mean(forecast_c[first:last])
        deaths[t] = exposure.deaths_per_cooled_h(float(np.mean(forecast_c[last - 24 : last])))
    return outdoor_c, deaths
