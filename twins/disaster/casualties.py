"""Counts the people whom damaged buildings hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from federation.twin import Vector
from twins.disaster.fragility import STATES, Fragility

Matrix = NDArray[np.float64]

LEVELS = ("pre_code", "low_code", "moderate_code", "high_code")
SEVERITIES = 4
"""Hazus: 1 first aid, 2 medical care, 3 life at risk, 4 dead at once."""

HOMES = ("W1", "W2", "MH")
"""Types of building in which nobody is who is not at home: wood frame and mobile homes."""

_MEDIANS = tuple(f"median_pga_g_{s}" for s in ("slight", "moderate", "extensive", "complete"))
_RATES = ("slight", "moderate", "extensive", "complete_no_collapse", "complete_with_collapse")


def building_curves(
    rows: Sequence[Mapping[str, str]],
    buildings: Sequence[tuple[str, str]],
    levels_better: int,
) -> Fragility:
    """Hazus' equivalent-PGA curves of (type, design level), some levels better built.

    A type that has no such level gets the best that it has.
    """
    table = {(row["building_type"], row["design_level"]): row for row in rows}
    log_median = np.empty((len(buildings), STATES))
    beta = np.empty_like(log_median)
    for index, (kind, level) in enumerate(buildings):
        wanted = min(LEVELS.index(level) + levels_better, len(LEVELS) - 1)
        row = next(
            table[kind, LEVELS[i]] for i in range(wanted, -1, -1) if (kind, LEVELS[i]) in table
        )
        log_median[index] = np.log([float(row[column]) for column in _MEDIANS])
        beta[index] = float(row["beta"])
    return Fragility(log_median, beta)


@dataclass(frozen=True, slots=True)
class BuildingStock:
    """The mix of buildings of every zone, and how each hurts its occupants.

    `rates` (types x states 1..4 x severities) are persons per occupant; those of complete
    damage are the mean over collapsed and standing buildings.
    """

    buildings: tuple[tuple[str, str], ...]
    at_home: Vector
    """Share of the people at home who are in each type: the region's mix."""
    away: Vector
    """The same of people indoors elsewhere: the mix without `HOMES`."""
    rates: NDArray[np.float64]


def building_stock(
    mix: Sequence[Mapping[str, str]], casualty_rates: Sequence[Mapping[str, str]]
) -> BuildingStock:
    buildings = tuple((row["building_type"], row["design_level"]) for row in mix)
    share = np.array([float(row["share"]) for row in mix])
    table = {(row["building_type"], row["damage_state"]): row for row in casualty_rates}
    rates = np.empty((len(buildings), STATES, SEVERITIES))
    for index, (kind, _) in enumerate(buildings):
        by_state = np.array(
            [
                [float(table[kind, state][f"severity{s + 1}_pct"]) / 100 for s in range(SEVERITIES)]
                for state in _RATES
            ]
        )
        collapse = float(table[kind, _RATES[-1]]["p_collapse_given_complete"])
        rates[index, :3] = by_state[:3]
        rates[index, 3] = (1.0 - collapse) * by_state[3] + collapse * by_state[4]
    away = np.where([kind in HOMES for kind, _ in buildings], 0.0, share)
    if not away.any():
        away = share
    return BuildingStock(buildings, share / share.sum(), away / away.sum(), rates)


def newly_damaged(before: Matrix, now: Matrix) -> Matrix:
    """The shares of buildings that a shock brings into each state 1..4 (last axis).

    `before` and `now` are shares in at least each state, before and after it. Every
    building keeps its strength, so the weakest are always the same; those already in
    state 3 or 4 stand empty and hurt nobody any more.
    """
    beyond = np.concatenate([now[..., 1:], np.zeros_like(now[..., :1])], axis=-1)
    floor = np.maximum(np.maximum(beyond, before), before[..., 2:3])
    return np.asarray(np.maximum(now - floor, 0.0))


def injury_chances(stock: BuildingStock, newly: Matrix, home_share: float) -> Matrix:
    """The chance of each severity for a person indoors; zones x 4 from zones x types x 4.

    `home_share` of the people indoors are at home, the others in other buildings.
    """
    share = home_share * stock.at_home + (1.0 - home_share) * stock.away
    return np.asarray(np.einsum("t,ztk,tks->zs", share, newly, stock.rates))


def sample_injured(occupants: Vector, chances: Matrix, uniform: Matrix) -> Matrix:
    """Whole persons per zone and severity: a multinomial draw by inversion, worst first.

    Each severity is binomial among those whom none worse has hit, at the quantile `uniform`.
    """
    injured = np.zeros_like(chances)
    left, unused = occupants.copy(), np.ones(len(occupants))
    for severity in range(SEVERITIES - 1, -1, -1):
        chance = np.clip(chances[:, severity] / unused, 0.0, 1.0)
        some = (chance > 0.0) & (left > 0.0)
        if some.any():
            quantile = binom.ppf(uniform[some, severity], left[some], chance[some])
            injured[some, severity] = np.maximum(quantile, 0.0)
        left -= injured[:, severity]
        unused = np.maximum(unused - chances[:, severity], 1e-12)
    return injured
