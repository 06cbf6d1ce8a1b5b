"""Shows a planner what darkness in the heat would cost, as a linear block."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from federation.twin import LinearBlock, Port, Vector
from twins.disaster.indoors import Exposure, Homes


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

    With the need `powered` p, darkness d = 1 - p, the mean temperature x of homes above
    `comfort_c`, N people of whom a share c have air conditioning, and the hourly excess deaths D_t
    of one whose air conditioning works,

    .. math::
        x_{lt} \ge k^c_t x_{l,t-1} + (1 - k^c_t) \frac{\tau_c}{\tau_w} G_t d_{lt} \\
        x_{lt} \ge k^w_t x_{l,t-1} + (1 - k^w_t) G_t - (1 - d_{lt}) M_{lt} \\
        x_{lt} \ge k^h_t x_{l,t-1} + \frac{1 - k^h_t}{\rho} \left(d_{lt} G_t / \tau_w
        + \Delta X^h_t (d_{lt} - 1/2)\right) \\
        z_{lt} \ge (OR - 1) \frac{T_c + x_{lt} - T_{safe}}{T_{full} - T_{safe}},
        \quad z_{lt} \ge 0 \\
        \min VSL \sum_{l,t} h_t D_t c N_l z_{lt}

    where G = T + gain - T_c is what homes tend to in the dark, k^w = e^{-h / tau_w} and
    k^c = e^{-h / tau_c} are what is left of a temperature after a period in the dark and with
    power. Homes that have power for part of a period, as those that take turns, follow
    :math:`\dot x = d (G - x) / \tau_w - (1 - d) x / \tau_c`. The rows put max(0, x + (d - 1) X)
    in the place of the product d x, with X the temperature of a home dark so far: they are exact
    for d = 0 and d = 1, and M = (k^w - k^c) X + (1 - k^w) G is what the second needs to say nothing
    at d = 0. `forecast_c` begins 24 h before the run; `excess_c` is x now. What
    hurts also people with power is left out: no plan changes it.
    """
    homes, exposure = Homes.of(p), Exposure.of(p)
    points, periods = len(load_points), len(hours)
    size = points * periods
    powered, excess, harm = (np.arange(size).reshape(points, periods) + k * size for k in range(3))
    cost = np.zeros(3 * size)
    outdoor_c, deaths = _expected(exposure, starts_h, hours, forecast_c)
    worth = p["value_of_life_usd"] * exposure.cooled * deaths * hours
    cost[harm.ravel()] = np.outer(people, worth).ravel()

    goal_c = np.maximum(outdoor_c + homes.gain_c - homes.comfort_c, 0.0)
    warm, cool = np.exp(-hours / homes.warm_h), np.exp(-hours / homes.cool_h)
    in_turns_c = (1.0 - cool) * goal_c * homes.cool_h / homes.warm_h
    in_dark_c = (1.0 - warm) * goal_c
    hottest_c = _in_the_dark(warm, in_dark_c, excess_c)
    before_c = np.concatenate([excess_c[:, None], hottest_c[:, :-1]], axis=1)
    relief_c = (warm - cool) * before_c + in_dark_c
    rate, apart = 0.5 / homes.warm_h + 0.5 / homes.cool_h, 1.0 / homes.cool_h - 1.0 / homes.warm_h
    half = np.exp(-rate * hours)
    half_c = 0.5 * goal_c / homes.warm_h / rate
    half_slope_c = (1.0 - half) / rate * (goal_c / homes.warm_h + apart * half_c)
    half_shift_c = (1.0 - half) / rate * apart * half_c * 0.5
    rows = np.arange(size).reshape(points, periods)
    row_index, column_index, coefficient = [], [], []
    low: list[Vector] = []
    names: list[str] = []
    for k, (name, keep, slope_c, dark_c) in enumerate(
        (
            ("in_turns", cool, np.tile(in_turns_c, (points, 1)), in_turns_c),
            ("in_the_dark", warm, relief_c, in_dark_c),
            ("half_dark", half, np.tile(half_slope_c, (points, 1)), half_slope_c - half_shift_c),
        )
    ):
        # with d = 1 - p: x + slope p >= keep x_before + dark
        here = rows + k * size
        row_index += [here.ravel(), here.ravel(), here[:, 1:].ravel()]
        column_index += [excess.ravel(), powered.ravel(), excess[:, :-1].ravel()]
        coefficient += [np.ones(size), slope_c.ravel(), np.tile(-keep[1:], points)]
        least = np.tile(dark_c, (points, 1))
        least[:, 0] += keep[0] * excess_c
        low.append(least.ravel())
        names += [f"{name}[{e},{t}]" for e in load_points for t in range(periods)]
    row_index += [(3 * size + rows).ravel()] * 2
    column_index += [harm.ravel(), excess.ravel()]
    slope = (p["no_cooling_odds"] - 1.0) / (homes.full_c - homes.safe_c)
    coefficient += [np.ones(size), np.full(size, -slope)]
    low.append(np.full(size, slope * (homes.comfort_c - homes.safe_c)))
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
        row_high=np.full(4 * size, np.inf),
        row_index=np.concatenate(row_index).astype(np.int64),
        column_index=np.concatenate(column_index).astype(np.int64),
        coefficient=np.concatenate(coefficient),
        ports=(Port("powered", "need", "load_point", "1", load_points, powered),),
        doc="excess deaths in homes without power; see heat_block",
    )


def _in_the_dark(warm: Vector, in_dark_c: Vector, excess_c: Vector) -> Vector:
    """How much above comfort homes are at the end of each period when they stay dark."""
    found = np.zeros((len(excess_c), len(warm)))
    now_c = excess_c
    for t, (keep, more_c) in enumerate(zip(warm, in_dark_c, strict=True)):
        now_c = keep * now_c + more_c
        found[:, t] = now_c
    return found


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
