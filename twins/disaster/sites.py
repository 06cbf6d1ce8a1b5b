"""Reads everything of a region that shakes, with the curves that say how it breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.twin import Vector
from twins.disaster import casualties, fragility, ground
from twins.regions import region_rows

NETWORKS = ("power", "water", "road")
"""The networks whose components crews repair."""


@dataclass(frozen=True, slots=True)
class Sites:
    """Everything of a region that shakes, read once per process.

    `part` is where each kind lies in the vectors over sites; `place` joins sites that
    share a point, of which `places` has each once.
    """

    rows: Mapping[str, tuple[dict[str, str], ...]]
    part: Mapping[str, slice]
    place: NDArray[np.int64]
    places: NDArray[np.float64]
    motion: ground.GroundMotion
    mains: NDArray[np.int64]
    main_km: Vector
    population: Vector
    stock: casualties.BuildingStock

    def size(self, kind: str) -> int:
        return len(self.rows[kind])


@lru_cache(maxsize=4)
def read_sites(region: str) -> Sites:
    rows = {
        "power": region_rows(region, "power_components.csv"),
        "water": region_rows(region, "water_components.csv"),
        "road": region_rows(region, "roads.csv"),
        "hospital": region_rows(region, "hospitals.csv"),
        "zone": region_rows(region, "zones.csv"),
    }
    part: dict[str, slice] = {}
    points: list[tuple[float, float]] = []
    for kind, things in rows.items():
        part[kind] = slice(len(points), len(points) + len(things))
        points += [(float(row["lon_deg"]), float(row["lat_deg"])) for row in things]
    sites = np.array(points)
    places, place = np.unique(sites, axis=0, return_inverse=True)
    mains = [i for i, row in enumerate(rows["water"]) if row["component_class"] == "main"]
    return Sites(
        rows,
        part,
        place.ravel(),
        places,
        ground.read_ground_motion(region, sites[:, 0], sites[:, 1]),
        np.array(mains, dtype=np.int64),
        np.array([float(rows["water"][i]["length_km"]) for i in mains]),
        np.array([float(row["population"]) for row in rows["zone"]]),
        casualties.building_stock(
            region_rows(region, "building_mix.csv"), region_rows(region, "casualty_rates.csv")
        ),
    )


@lru_cache(maxsize=8)
def correlation_factor(region: str, range_km: float) -> NDArray[np.float64]:
    places = read_sites(region).places
    return ground.correlation_factor(places[:, 0], places[:, 1], range_km)


@dataclass(frozen=True, slots=True)
class Design:
    """The curves of everything, for the parameters of one run."""

    components: Mapping[str, fragility.Fragility]
    repairs: Mapping[str, fragility.RepairTimes]
    ductile_mains: bool
    hospitals: fragility.Fragility
    buildings: fragility.Fragility


@lru_cache(maxsize=32)
def _design(
    region: str,
    high: tuple[bool, ...],
    hospitals_better: int,
    buildings_better: int,
    scatter: float,
) -> Design:
    sites = read_sites(region)
    table = region_rows(region, "fragility.csv")
    building_table = region_rows(region, "building_fragility.csv")
    level = {n: "high" if yes else "low" for n, yes in zip(NETWORKS, high, strict=True)}
    classes = {n: [row["fragility_class"] for row in sites.rows[n]] for n in NETWORKS}
    hospitals = [(row["building_type"], row["design_level"]) for row in sites.rows["hospital"]]
    return Design(
        {n: fragility.curves(table, classes[n], level[n]) for n in NETWORKS},
        {n: fragility.repair_times(table, classes[n], level[n]) for n in NETWORKS},
        level["water"] == "high",
        casualties.building_curves(building_table, hospitals, hospitals_better).without(scatter),
        casualties.building_curves(building_table, sites.stock.buildings, buildings_better).without(
            scatter
        ),
    )


def design(region: str, given: Mapping[str, float]) -> Design:
    """The curves that the parameters of a session ask for."""
    levels = (given[f"{network}_design_level"] for network in NETWORKS)
    common = given["component_design_level"]
    return _design(
        region,
        tuple((common if level < 0 else level) >= 0.5 for level in levels),
        round(given["hospital_levels_better"]),
        round(given["building_levels_better"]),
        float(np.hypot(given["within_event_sigma"], given["between_event_sigma"])),
    )


def pipe_law(given: Mapping[str, float], ductile: bool) -> fragility.PipeLaw:
    """Hazus' law with the mean brittleness of the mains: which are ductile is not known."""
    share = 1.0 if ductile else given["ductile_pipe_share"]
    return fragility.PipeLaw(
        1.0 - share * (1.0 - given["ductile_pipe_factor"]),
        given["repair_rate_pgv"],
        given["repair_rate_pgv_exponent"],
        given["repair_rate_pgd"],
        given["repair_rate_pgd_exponent"],
        given["leak_share_of_repairs"],
        given["leak_share_of_repairs_pgd"],
    )
