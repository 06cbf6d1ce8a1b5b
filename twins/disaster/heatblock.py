"""Shows a planner what darkness in the heat would cost, as a linear block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from federation.twin import LinearBlock, Port, Vector
from twins.disaster.indoors import Exposure, Homes, smoothing

TANGENTS = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
"""Shares of darkness at which the convex harm is replaced by its tangent."""
NUDGE = 1e-4


def heat_block(
    load_points: tuple[str, ...],
    people: Vector,
    starts_h: Vector,
    hours: Vector,
    forecast_c: Vector,
    dark_so_far: Vector,
    p: Mapping[str, float],
) -> LinearBlock:
    r"""Deaths in homes that are dark, priced, for each load point l and period t of h_t hours.

    With the need `powered` p, the moving mean m of the darkness over the time constant of a
    home, and N people,

    .. math::
        m_{lt} = e^{-h_t/\tau} m_{l,t-1} + (1 - e^{-h_t/\tau}) (1 - p_{lt}) \\
        z_{lt} \ge D_{lk} + D'_{lk} (m_{lt} - m_k) \quad \text{for every tangent } k \\
        \min VSL \sum_{l,t} h_t N_l \, z_{lt}

    where D(m) is the excess deaths per person and hour in homes at the temperature that they
    have in the long run when dark for a share m of the time, at the temperature forecast:
    homes cool down faster than they warm up, so D is convex. `forecast_c` begins 24 h before
    the run; `dark_so_far` is m now. What hurts also people with power is left out: no plan
    changes it.
    """
    homes, exposure = Homes.of(p), Exposure.of(p)
    points, periods = len(load_points), len(hours)
    size = points * periods
    powered, mean, harm = (np.arange(size).reshape(points, periods) + k * size for k in range(3))
    cost = np.zeros(3 * size)
    cost[harm.ravel()] = p["value_of_life_usd"] * np.outer(people, hours).ravel()

    keep = np.array([smoothing(float(h), p["indoor_warm_h"]) for h in hours])
    rows = np.arange(size).reshape(points, periods)
    row_index = [rows.ravel(), rows.ravel(), rows[:, 1:].ravel()]
    column_index = [mean.ravel(), powered.ravel(), mean[:, :-1].ravel()]
    coefficient = [
        np.ones(size),
        np.tile(1.0 - keep, points),
        np.tile(-keep[1:], points),
    ]
    balance = np.tile(1.0 - keep, (points, 1))
    balance[:, 0] += keep[0] * dark_so_far
    low, high = [balance.ravel()], [balance.ravel()]
    names = [f"darkness[{e},{t}]" for e in load_points for t in range(periods)]
    base = size
    for k, share in enumerate(TANGENTS):
        at, slope = _tangents(homes, exposure, share, starts_h, hours, forecast_c)
        place = base + rows
        row_index += [place.ravel(), place.ravel()]
        column_index += [harm.ravel(), mean.ravel()]
        coefficient += [np.ones(size), np.tile(-slope, points)]
        low.append(np.tile(at - slope * share, points))
        high.append(np.full(size, np.inf))
        names += [f"harm{k}[{e},{t}]" for e in load_points for t in range(periods)]
        base += size
    return LinearBlock(
        columns=tuple(
            f"{n}[{e},{t}]"
            for n in ("powered", "mean_darkness", "harm")
            for e in load_points
            for t in range(periods)
        ),
        low=np.zeros(3 * size),
        high=np.concatenate([np.ones(2 * size), np.full(size, np.inf)]),
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


def _tangents(
    homes: Homes,
    exposure: Exposure,
    share: float,
    starts_h: Vector,
    hours: Vector,
    forecast_c: Sequence[float] | Vector,
) -> tuple[Vector, Vector]:
    """Deaths per person and hour beyond those with power, at a share of darkness; the slope."""
    at, slope = np.zeros(len(hours)), np.zeros(len(hours))
    for t, (start_h, span_h) in enumerate(zip(starts_h, hours, strict=True)):
        first = int(np.floor(start_h)) + 24
        last = max(int(np.ceil(start_h + span_h)) + 24, first + 1)
        window = forecast_c[min(first, len(forecast_c) - 1) : last]
        outdoor_c = float(np.mean(window))
        mean_c = float(np.mean(forecast_c[max(last - 24, 0) : last]))
        rate = exposure.cooled * exposure.deaths_per_cooled_h(mean_c)
        near = max(share - NUDGE, 0.0), min(share + NUDGE, 1.0)
        risks = [float(homes.risk(homes.lasting_c(s, outdoor_c))) for s in (share, *near)]
        at[t] = rate * (risks[0] - 1.0)
        slope[t] = rate * (risks[2] - risks[1]) / (near[1] - near[0])
    return at, slope
