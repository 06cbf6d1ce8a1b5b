"""Turns a region's files into the arrays that the flow of patients runs on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from federation.twin import Parameter
from twins.medical.assumptions import own_assumptions
from twins.regions import assumptions, hospital_routes, region_rows, scene_routes

EARTH_KM = 6371.0


@dataclass(frozen=True, slots=True)
class HospitalSite:
    """A hospital as it stands on an ordinary day; `access_km` leads to its road node."""

    id: str
    name: str
    role: str
    lon_deg: float
    lat_deg: float
    staffed_beds: int
    icu_beds: int
    occupancy: float
    icu_occupancy: float
    trauma_level: int
    load_mw: float
    water_m3_per_h: float
    base: int
    origin: int
    column: int
    scene: int
    access_km: float

    @property
    def for_children(self) -> bool:
        return self.role == "paediatric"


@dataclass(frozen=True, slots=True)
class Layout:
    """Who is where: the indices by which routes, zones, posts and hospitals find each other.

    A scene route goes from base b to scene s at index `b * scenes + s`; a hospital route
    from origin o to hospital node c at `o * columns + c`. Zone z lies at scene
    `zone_scene[z]`; the scenes are also the first origins. `post_base` has one entry per
    ambulance; `post_scene` is the scene nearest to its post, which stands for the post on
    the way home because no route leads to a post.
    """

    hospitals: tuple[HospitalSite, ...]
    zones: tuple[str, ...]
    zone_people: tuple[float, ...]
    zone_scene: tuple[int, ...]
    zone_access_km: tuple[float, ...]
    zone_lon_deg: tuple[float, ...]
    zone_lat_deg: tuple[float, ...]
    bases: int
    scenes: int
    columns: int
    post_base: tuple[int, ...]
    post_scene: tuple[int, ...]

    @property
    def origins(self) -> int:
        return 1 + max([h.origin for h in self.hospitals] + [self.scenes - 1])


def distance_km(lon_a: float, lat_a: float, lon_b: float, lat_b: float) -> float:
    """Great-circle distance of two points in degrees (haversine)."""
    phi_a, phi_b = math.radians(lat_a), math.radians(lat_b)
    half = (
        math.sin((phi_b - phi_a) / 2) ** 2
        + math.cos(phi_a) * math.cos(phi_b) * math.sin(math.radians(lon_b - lon_a) / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(math.sqrt(half))


def _place(row: Mapping[str, str]) -> tuple[float, float]:
    return float(row["lon_deg"]), float(row["lat_deg"])


def _roman(level: str) -> int:
    """A trauma level as a number, 0 for none: `I (adult)` is 1."""
    word = level.split("(")[0].strip()
    if word.isdigit():
        return int(word)
    return {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5}.get(word, 0)


def _nearest(point: tuple[float, float], places: Sequence[tuple[float, float]]) -> int:
    return min(range(len(places)), key=lambda i: distance_km(*point, *places[i]))


@lru_cache(maxsize=8)
def region_layout(region: str) -> Layout:
    """Read the hospitals, zones and ambulance posts of a region."""
    hospital_rows = region_rows(region, "hospitals.csv")
    zone_rows = region_rows(region, "zones.csv")
    nodes = {row["node"]: _place(row) for row in region_rows(region, "road_nodes.csv")}
    bases = list(dict.fromkeys(base for base, _ in scene_routes(region)))
    scenes = list(dict.fromkeys(scene for _, scene in scene_routes(region)))
    origins = list(dict.fromkeys(origin for origin, _ in hospital_routes(region)))
    columns = list(dict.fromkeys(column for _, column in hospital_routes(region)))
    scene_places = [nodes[scene] for scene in scenes]
    hospitals = tuple(
        HospitalSite(
            id=row["hospital"],
            name=row["name"],
            role=row["role"],
            lon_deg=float(row["lon_deg"]),
            lat_deg=float(row["lat_deg"]),
            staffed_beds=round(float(row["staffed_beds"])),
            icu_beds=round(float(row["icu_beds"])),
            occupancy=float(row["occupancy"]),
            icu_occupancy=float(row["icu_occupancy"]),
            trauma_level=_roman(row["trauma_level"]),
            load_mw=float(row["load_mw"]),
            water_m3_per_h=float(row["water_m3_per_h"]),
            base=bases.index(row["road_node"]),
            origin=origins.index(row["road_node"]),
            column=columns.index(row["road_node"]),
            scene=_nearest(nodes[row["road_node"]], scene_places),
            access_km=distance_km(*_place(row), *nodes[row["road_node"]]),
        )
        for row in hospital_rows
    )
    posts = [
        row
        for row in region_rows(region, "ambulance_posts.csv")
        for _ in range(round(float(row["ambulances"])))
    ]
    return Layout(
        hospitals=hospitals,
        zones=tuple(row["zone"] for row in zone_rows),
        zone_people=tuple(float(row["population"]) for row in zone_rows),
        zone_scene=tuple(scenes.index(row["road_node"]) for row in zone_rows),
        zone_access_km=tuple(
            distance_km(*_place(row), *nodes[row["road_node"]]) for row in zone_rows
        ),
        zone_lon_deg=tuple(float(row["lon_deg"]) for row in zone_rows),
        zone_lat_deg=tuple(float(row["lat_deg"]) for row in zone_rows),
        bases=len(bases),
        scenes=len(scenes),
        columns=len(columns),
        post_base=tuple(bases.index(row["road_node"]) for row in posts),
        post_scene=tuple(_nearest(nodes[row["road_node"]], scene_places) for row in posts),
    )


@lru_cache(maxsize=8)
def region_parameters(region: str) -> tuple[Parameter, ...]:
    """The assumptions of medicine; where the region declares one of the same name, its own."""
    regional = assumptions(region)
    return tuple(regional.get(name, own) for name, own in own_assumptions().items())
