r"""Writes what hospitals lose without power and water as a linear block for the joint plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from federation.twin import HOUR_NS, LinearBlock, Port
from twins.medical.layout import Layout


def hospital_block(
    layout: Layout,
    p: Mapping[str, float],
    periods_ns: tuple[int, ...],
    fuel_h: Sequence[float] = (),
    water_h: Sequence[float] = (),
) -> LinearBlock:
    r"""Bed-hours lost over a horizon, priced.

    For hospital h and period t of length d_t hours, with the needs power p and water w as
    ports, generator g, tank r, unpowered u and waterless v, all between 0 and 1:

    .. math::
        u_{ht} + p_{ht} + g_{ht} \ge 1 \qquad \sum_t d_t g_{ht} \le F
        v_{ht} + w_{ht} + r_{ht} \ge 1 \qquad \sum_t d_t r_{ht} \le R

        \min \sum_{ht} c B_h d_t \left[(1 - \phi) u_{ht} + (1 - \psi) v_{ht}\right]

    F is what each hospital has in `fuel_h`, R in `water_h` (without them the parameters `fuel_h`
    and `water_reserve_h`), B staffed beds, c `bed_hour_value_usd`, and phi and
    psi the shares of beds usable without power and water. A bed that lacks both counts
    twice, where the simulation takes the worse of the two: the block overstates that case.
    """
    hospitals, periods = len(layout.hospitals), len(periods_ns)
    size = hospitals * periods
    hours = np.array(periods_ns, dtype=np.float64) / HOUR_NS
    beds = np.array([site.staffed_beds for site in layout.hospitals], dtype=np.float64)
    value = p["bed_hour_value_usd"] * np.outer(beds, hours).ravel()
    power, generator, unpowered, water, reserve, waterless = (
        np.arange(size).reshape(hospitals, periods) + block * size for block in range(6)
    )
    cost = np.zeros(6 * size)
    cost[unpowered.ravel()] = value * (1.0 - p["unpowered_bed_share"])
    cost[waterless.ravel()] = value * (1.0 - p["waterless_bed_share"])
    balance = np.arange(2 * size)
    budget = 2 * size + np.arange(2 * hospitals)
    stores = np.concatenate([generator, reserve])
    row_index = np.concatenate([np.tile(balance, 3), np.repeat(budget, periods)])
    column_index = np.concatenate(
        [
            *(
                np.concatenate([a.ravel(), b.ravel()])
                for a, b in ((unpowered, waterless), (power, water), (generator, reserve))
            ),
            stores.ravel(),
        ]
    )
    coefficient = np.concatenate([np.ones(6 * size), np.tile(hours, 2 * hospitals)])
    ids = tuple(site.id for site in layout.hospitals)
    names = ("power", "generator", "unpowered", "water", "reserve", "waterless")
    return LinearBlock(
        columns=tuple(f"{n}[{h},{t}]" for n in names for h in ids for t in range(periods)),
        low=np.zeros(6 * size),
        high=np.ones(6 * size),
        cost=cost,
        integer=np.zeros(6 * size, dtype=np.bool_),
        rows=tuple(
            [
                f"{n}_balance[{h},{t}]"
                for n in ("power", "water")
                for h in ids
                for t in range(periods)
            ]
            + [f"{n}_store[{h}]" for n in ("fuel", "water") for h in ids]
        ),
        row_low=np.concatenate([np.ones(2 * size), np.full(2 * hospitals, -np.inf)]),
        row_high=np.concatenate(
            [
                np.full(2 * size, np.inf),
                np.array(fuel_h or [p["fuel_h"]] * hospitals, dtype=np.float64),
                np.array(water_h or [p["water_reserve_h"]] * hospitals, dtype=np.float64),
            ]
        ),
        row_index=row_index,
        column_index=column_index,
        coefficient=coefficient,
        ports=(
            Port("hospital_power", "need", "hospital", "1", ids, power),
            Port("hospital_water", "need", "hospital", "1", ids, water),
        ),
        doc="bed-hours lost without power and water; see hospital_block",
    )
