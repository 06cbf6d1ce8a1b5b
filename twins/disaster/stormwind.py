"""Turns the gusts of a windstorm into broken poles and damaged stations, and those into work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from federation.twin import Vector
from twins.disaster.fragility import OUT_OF_SERVICE, RepairTimes, repair_times
from twins.disaster.ground import correlation_factor
from twins.regions import region_rows

Matrix = NDArray[np.float64]

EXTENSIVE_SHARE, COMPLETE_SHARE = 0.1, 0.5
"""Broken poles of a line from which its damage counts as extensive and as complete."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What of a region's grid stands in the wind; read once per process.

    `lines` and `stations` are positions among the power components. Components that share a point
    share the gust at it: `place` says which of `places` each is at.
    """

    rows: tuple[dict[str, str], ...]
    places: Matrix
    place: NDArray[np.int64]
    lines: NDArray[np.int64]
    length_km: Vector
    stations: NDArray[np.int64]
    station_repairs: RepairTimes


@lru_cache(maxsize=4)
def overhead(region: str) -> Overhead:
    rows = region_rows(region, "power_components.csv")
    length = {
        row["component_id"]: float(row["length_km"])
        for row in region_rows(region, "overhead_lines.csv")
    }
    lines = [i for i, row in enumerate(rows) if row["component_id"] in length]
    stations = [i for i, row in enumerate(rows) if row["component_id"] not in length]
    points = np.array([(float(row["lon_deg"]), float(row["lat_deg"])) for row in rows])
    places, place = np.unique(points, axis=0, return_inverse=True)
    return Overhead(
        rows,
        places,
        place.ravel(),
        np.array(lines, dtype=np.int64),
        np.array([length[rows[i]["component_id"]] for i in lines]),
        np.array(stations, dtype=np.int64),
        repair_times(
            region_rows(region, "fragility.csv"),
            [rows[i]["fragility_class"] for i in stations],
            "low",
        ),
    )


@lru_cache(maxsize=8)
def gust_factor(region: str, range_km: float) -> Matrix:
    """What makes independent normal numbers correlated ones at the places of a region."""
    places = overhead(region).places
    return correlation_factor(places[:, 0], places[:, 1], range_km)


def gusts(region: str, normals: Vector, median_m_s: float, sigma: float, range_km: float) -> Vector:
    r"""The highest gust at each component: lognormal about the median of the storm, and

    .. math:: corr(\ln v_i, \ln v_j) = e^{-3 h_{ij} / range}

    at a distance h. `normals` has an independent standard normal number for each place.
    """
    # einsum without BLAS: the same bits for any number of threads
    local = np.einsum("ij,j->i", gust_factor(region, range_km), normals)
    return np.asarray(median_m_s * np.exp(sigma * local))[overhead(region).place]


@dataclass(frozen=True, slots=True)
class Havoc:
    r"""What gusts do to lines and stations.

    A pole falls with the chance :math:`p(v) = \Phi(\ln(v / v_{pole}) / \beta_{pole})`. A circuit of
    n poles in a row is out when one has fallen, so with :math:`1 - (1 - p)^n`; how many have fallen
    is binomial. A line of the skeleton stands for several circuits beside one another that fare
    alike: it is out as one of them is, and takes the work of all. Stations have a lognormal curve
    of their own and Hazus' days of repair.
    """

    pole_median_m_s: float
    pole_beta: float
    span_m: float
    circuits: float
    pole_repair_h: float
    repair_spread: float
    station_median_m_s: float
    station_beta: float
    hours_per_day: float

    @classmethod
    def of(cls, p: Mapping[str, float]) -> Havoc:
        return cls(
            p["pole_median_m_s"],
            p["pole_beta"],
            p["pole_span_m"],
            p["circuits_per_line"],
            p["pole_repair_h"],
            p["repair_spread"],
            p["substation_median_m_s"],
            p["substation_beta"],
            p["repair_hours_per_day"],
        )

    def poles(self, length_km: Vector) -> NDArray[np.int64]:
        """Poles of one circuit of each line, at least one."""
        return np.maximum(np.rint(1000.0 * length_km / self.span_m), 1.0).astype(np.int64)

    def pole_chance(self, gust_m_s: Vector) -> Vector:
        return np.asarray(ndtr(np.log(gust_m_s / self.pole_median_m_s) / self.pole_beta))

    def fallen(self, gust_m_s: Vector, poles: NDArray[np.int64], strength: Vector) -> Vector:
        """Poles that fall in one circuit of each line, the fewer the greater its strength.

        The binomial number at the quantile 1 - strength: none from the strength on at which the
        circuit holds.
        """
        return np.asarray(binom.ppf(1.0 - strength, poles, self.pole_chance(gust_m_s)))

    def reached(self, overhead: Overhead, gust_m_s: Vector) -> Matrix:
        """The chance of each component to be out: what bounds on its strength follow from."""
        chance = np.zeros(len(overhead.rows))
        holds = 1.0 - self.pole_chance(gust_m_s[overhead.lines])
        chance[overhead.lines] = 1.0 - holds ** self.poles(overhead.length_km)
        chance[overhead.stations] = ndtr(
            np.log(gust_m_s[overhead.stations] / self.station_median_m_s) / self.station_beta
        )
        return chance

    def damage(
        self, overhead: Overhead, gust_m_s: Vector, strength: Vector, patience: Vector
    ) -> tuple[NDArray[np.int64], Vector]:
        """States (0, or 2 to 4) of all components and their gang-hours of repair.

        `strength` and `patience` are uniform numbers: who is the weaker, who takes the longer.
        """
        state = np.zeros(len(overhead.rows), dtype=np.int64)
        work_h = np.zeros(len(overhead.rows))
        lines, stations = overhead.lines, overhead.stations
        poles = self.poles(overhead.length_km)
        fallen = self.fallen(gust_m_s[lines], poles, strength[lines])
        state[lines] = np.where(
            fallen > 0.0,
            OUT_OF_SERVICE
            + (fallen >= EXTENSIVE_SHARE * poles)
            + (fallen >= COMPLETE_SHARE * poles),
            0,
        )
        slow = np.exp(self.repair_spread * ndtri(patience[lines]))
        work_h[lines] = fallen * self.circuits * self.pole_repair_h * slow
        out = strength[stations] < self.reached(overhead, gust_m_s)[stations]
        state[stations] = np.where(out, OUT_OF_SERVICE, 0)
        days = overhead.station_repairs.days(state[stations], patience[stations])
        work_h[stations] = days * self.hours_per_day
        return state, work_h
