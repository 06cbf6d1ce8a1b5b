"""Reads the roads and the water network of a region once per process, for all sessions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.twin import Entity, Vector
from twins.city.roads import RoadNetwork, Traffic
from twins.city.water import WaterNetwork, read_network
from twins.regions import hospital_routes, region_file, region_rows, scene_routes

Indices = NDArray[np.int64]

PERIOD_STARTS_H = (6, 9, 15, 18, 22)
"""The day is cut where the hourly profile of trips bends: morning, midday, afternoon peak,
evening, night. Each period has the mean of its hours; the last runs over midnight."""

EXPRESSWAY_KMH = 90.0
"""Links this fast or faster have no signals: the expressways of the region."""

NODES_TRIED = 3
"""A crew leaves the road network at the best of so many road nodes near its goal."""


def period_of(hour_of_day: float) -> int:
    """The index of the demand period of an hour of the day."""
    return (sum(hour_of_day >= start for start in PERIOD_STARTS_H) - 1) % len(PERIOD_STARTS_H)


@dataclass(frozen=True, slots=True)
class Journeys:
    """From crew depots to many goals, through one of the road nodes near each goal."""

    node: Indices
    access_km: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CityLayout:
    """What does not change in a region; links in the order that `traffic.network` keeps.

    `component_pump`, `component_tank` and `component_main` hold, per water component, its
    index among the pumps, tanks or pipes of the water network, or -1.
    """

    entities: tuple[Entity, ...]
    nodes: tuple[str, ...]
    roads: tuple[str, ...]
    traffic: Traffic
    link_road: Indices
    link_signal: NDArray[np.bool_]
    signal: NDArray[np.bool_]
    scene_from: Indices
    scene_to: Indices
    hospital_from: Indices
    hospital_to: Indices
    depots: Indices
    crew_power: Journeys
    crew_water: Journeys
    crew_road: Journeys
    water: WaterNetwork
    pumps: tuple[str, ...]
    pump_rated_mw: Vector
    components: tuple[str, ...]
    component_pump: Indices
    component_tank: Indices
    component_main: Indices
    component_xy_km: NDArray[np.float64]
    junctions: tuple[str, ...]
    junction_people: Vector
    junction_xy_km: NDArray[np.float64]
    hospitals: tuple[str, ...]
    hospital_junction: Indices
    hospital_base_m3_h: Vector

    @property
    def road_links(self) -> list[Indices]:
        return [np.flatnonzero(self.link_road == road) for road in range(len(self.roads))]


def _plane_km(rows: tuple[dict[str, str], ...]) -> NDArray[np.float64]:
    """Kilometres east and north; good to a per mille over one county."""
    lon = np.array([float(row["lon_deg"]) for row in rows])
    lat = np.array([float(row["lat_deg"]) for row in rows])
    return np.column_stack([lon * 111.32 * np.cos(np.radians(35.2)), lat * 110.95])


def _place(rows: tuple[dict[str, str], ...], kind: str, key: str) -> list[Entity]:
    return [
        Entity(row[key], kind, row.get("name", ""), float(row["lon_deg"]), float(row["lat_deg"]))
        for row in rows
    ]


@lru_cache(maxsize=4)
def read_layout(region: str) -> CityLayout:
    """Read all files of a region that the city needs."""
    rows = {
        name: region_rows(region, f"{name}.csv")
        for name in (
            "road_nodes", "road_links", "roads", "trips", "demand_profile", "crew_depots",
            "power_components", "water_components", "pumps", "junctions", "hospitals",
        )
    }  # fmt: skip
    nodes = tuple(row["node"] for row in rows["road_nodes"])
    at = {node: index for index, node in enumerate(nodes)}
    roads = tuple(row["road"] for row in rows["roads"])
    road_at = {road: index for index, road in enumerate(roads)}
    links = rows["road_links"]

    def number(column: str) -> Vector:
        return np.array([float(row[column]) for row in links])

    tail = np.array([at[row["from_node"]] for row in links])
    head = np.array([at[row["to_node"]] for row in links])
    network = RoadNetwork.of(
        len(nodes), tail, head, number("capacity_veh_per_h"), number("free_flow_min"),
        number("b"), number("power"),
    )  # fmt: skip
    neighbours = np.zeros((len(nodes), len(nodes)), np.bool_)
    neighbours[tail, head] = neighbours[head, tail] = True
    signal = neighbours.sum(axis=1) >= 3
    slow = network.sorted(number("speed_kmh")) < EXPRESSWAY_KMH
    trips = np.zeros((len(nodes), len(nodes)))
    for row in rows["trips"]:
        trips[at[row["origin"]], at[row["destination"]]] += float(row["trips_per_day"])
    profile = np.array([float(row["share"]) for row in rows["demand_profile"]])
    period = np.array([period_of(hour) for hour in range(profile.size)])
    share = np.array([profile[period == p].mean() for p in range(len(PERIOD_STARTS_H))])

    node_km = _plane_km(rows["road_nodes"])

    def journeys(name: str) -> Journeys:
        away = np.linalg.norm(_plane_km(rows[name])[:, None, :] - node_km[None], axis=2)
        near = np.argsort(away, axis=1, kind="stable")[:, :NODES_TRIED]
        return Journeys(near, np.take_along_axis(away, near, axis=1))

    water = read_network(region_file(region, "water.inp"))
    components = rows["water_components"]

    def where(names: tuple[str, ...], keep: str) -> Indices:
        index = {name: place for place, name in enumerate(names)}
        return np.array(
            [index[c["component_id"]] if c["component_class"] == keep else -1 for c in components]
        )

    junction_at = {row["junction"]: index for index, row in enumerate(rows["junctions"])}
    hospitals = rows["hospitals"]
    scene, hospital = scene_routes(region), hospital_routes(region)
    point = {row["node"]: row for row in rows["road_nodes"]}
    entities = [
        *_place(rows["power_components"], "power_component", "component_id"),
        *_place(components, "water_component", "component_id"),
        *_place(rows["roads"], "road", "road"),
        *_place(hospitals, "hospital", "hospital"),
        *_place(rows["pumps"], "pump", "pump"),
        *_place(rows["junctions"], "junction", "junction"),
        *_place(rows["road_nodes"], "road_node", "node"),
    ]
    for kind, routes in (("scene_route", scene), ("hospital_route", hospital)):
        entities += [
            Entity(f"{a}>{b}", kind, "", float(point[b]["lon_deg"]), float(point[b]["lat_deg"]))
            for a, b in routes
        ]
    pumps = tuple(row["pump"] for row in rows["pumps"])
    if pumps != water.pumps or tuple(junction_at) != water.junctions:
        raise ValueError(f"region {region!r}: pumps.csv or junctions.csv and water.inp differ")
    return CityLayout(
        entities=tuple(entities),
        nodes=nodes,
        roads=roads,
        traffic=Traffic(network, trips, share),
        link_road=np.array([road_at[row["road"]] for row in links])[network.given],
        link_signal=signal[network.head] & slow,
        signal=signal,
        scene_from=np.array([at[a] for a, _ in scene]),
        scene_to=np.array([at[b] for _, b in scene]),
        hospital_from=np.array([at[a] for a, _ in hospital]),
        hospital_to=np.array([at[b] for _, b in hospital]),
        depots=np.array([at[row["road_node"]] for row in rows["crew_depots"]]),
        crew_power=journeys("power_components"),
        crew_water=journeys("water_components"),
        crew_road=journeys("roads"),
        water=water,
        pumps=pumps,
        pump_rated_mw=np.array([float(row["rated_mw"]) for row in rows["pumps"]]),
        components=tuple(row["component_id"] for row in components),
        component_pump=where(water.pumps, "pump"),
        component_tank=where(water.tanks, "tank"),
        component_main=where(water.pipes, "main"),
        component_xy_km=_plane_km(components),
        junctions=water.junctions,
        junction_people=np.array([float(row["people"]) for row in rows["junctions"]]),
        junction_xy_km=_plane_km(rows["junctions"]),
        hospitals=tuple(row["hospital"] for row in hospitals),
        hospital_junction=np.array([junction_at.get(h["junction"], -1) for h in hospitals]),
        hospital_base_m3_h=np.array([float(row["water_m3_per_h"] or 0) for row in hospitals]),
    )
