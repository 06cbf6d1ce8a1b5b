"""Builds the files of the Mojave region from RTS-GMLC's area 3 and InfraRisk's net `simple`.

`python -m twins.regions.mojave.build ORIGINALS_DIR`, where the folder holds `energy-rts-gmlc` and
`coupled-infrarisk`; what any place shares with Shelby (Hazus' curves, the day of traffic) is
taken from the region beside this one. The same originals give the same bytes. The declared files
here (`assumptions.csv`, `building_mix.csv`, `faults.csv`) are read, not written. README.md says
what comes from where, and what was assumed in words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandapower as pp
from numpy.typing import NDArray

from twins.regions.shelby.build import (
    Row,
    build_bases,
    build_signals,
    great_circle_km,
    how_water_runs,
    middle,
    nearest,
    people_by,
    place,
    position,
    read_csv,
    read_sections,
    sha256,
    spreading_in,
    write_assumptions_table,
    write_csv,
)

Array = NDArray[np.float64]
Point = tuple[float, float]

HERE = Path(__file__).parent
BESIDE = HERE.parent / "shelby"
FROM_BESIDE = (
    "building_fragility.csv",
    "casualty_rates.csv",
    "demand_profile.csv",
    "fragility.csv",
    "LICENSE-pelicun-BSD-3.txt",
)
LICENCES = {
    "coupled-infrarisk/LICENSE": "LICENSE-infrarisk.txt",
    "energy-rts-gmlc/NOTICE.md": "LICENSE-rts-gmlc-notice.txt",
}
USED = (
    "coupled-infrarisk/simple/transpo_net.tntp",
    "coupled-infrarisk/simple/transpo_node.tntp",
    "coupled-infrarisk/simple/transpo_trips.tntp",
    "coupled-infrarisk/simple/water.inp",
    "energy-rts-gmlc/SourceData/branch.csv",
    "energy-rts-gmlc/SourceData/bus.csv",
    "energy-rts-gmlc/SourceData/dc_branch.csv",
    "energy-rts-gmlc/SourceData/gen.csv",
    *LICENCES,
)

AREA = "3"
BASE_MVA = 100.0
MILE_KM = 1.609344
FOOT_M = 0.3048
GPM_M3_H = 0.2271247
"""US gallons per minute in m3/h."""
INCH_MM = 25.4
CENTRE = "J5"
"""The node of `simple` in the middle of its streets; highways end there."""
WELL = "J22"
"""The junction of `simple` in the middle of its mains."""
STREETS_FROM, MAINS_FROM = (300.0, 350.0), (400.0, 450.0)
"""The middles of the two drawings of `simple`, which are laid on the bus of a town."""
DRAWN_KM = 2.0 / 325.0
"""Kilometres per unit of these drawings: the scale at which no street is shorter than straight."""
FIRM = ("Oil CT", "Gas CT", "Gas CC", "Oil ST", "Coal", "Hydro")
"""Kinds of plants whose power can be counted on; wind, sun and the storage are left out."""
LOW_KV = 12.0
GRID_STEP_DEG = 0.08
EARTH_KM_PER_DEG = 111.195
REFERENCE_ROCK_M_S = 760.0


@dataclass(frozen=True)
class Town:
    """A bus of RTS-GMLC with a load, and the people who live on it."""

    name: str
    point: Point
    load_mw: float
    people: int


def build(originals: Path, target: Path) -> None:
    """Write every derived file of the region into `target`, which holds the declared ones."""
    value = {row["name"]: float(row["value"]) for row in read_csv(target / "assumptions.csv")}
    source = originals / "energy-rts-gmlc" / "SourceData"
    simple = originals / "coupled-infrarisk" / "simple"
    for name in FROM_BESIDE:
        shutil.copyfile(BESIDE / name, target / name)
    buses = {row["Bus ID"]: row for row in read_csv(source / "bus.csv")}
    mine = {b: row for b, row in buses.items() if row["Area"] == AREA}
    points = {b: (float(r["lng"]), float(r["lat"])) for b, r in mine.items()}
    towns = {
        bus: Town(
            row["Bus Name"],
            points[bus],
            float(row["MW Load"]),
            round(float(row["MW Load"]) * value["people_per_mw"]),
        )
        for bus, row in mine.items()
        if float(row["MW Load"]) > 0
    }
    branches = [
        row
        for row in read_csv(source / "branch.csv")
        if row["From Bus"] in mine and row["To Bus"] in mine
    ]
    pump_mw = build_water(simple, towns, value, target)
    build_roads(simple, mine, points, towns, branches, value, target)
    build_power(source, mine, points, towns, branches, pump_mw, value, target)
    build_tie_lines(source, buses, target)
    build_ground_motion(points, value, target)
    build_hospitals(towns, value, target)
    build_signals(target)
    build_bases(read_csv(target / "zones.csv"), value, target)
    for original, copy in LICENCES.items():
        shutil.copyfile(originals / original, target / copy)
    write_assumptions_table(target)
    write_provenance(originals, target)


def drawn(town: Town, x: float, y: float, middle_of: Point) -> Point:
    """Where a point of a drawing of `simple` lies in a town, in degrees."""
    east_km, north_km = (x - middle_of[0]) * DRAWN_KM, (y - middle_of[1]) * DRAWN_KM
    lon, lat = town.point
    per_deg = EARTH_KM_PER_DEG
    return lon + east_km / (per_deg * math.cos(math.radians(lat))), lat + north_km / per_deg


# --- water ----------------------------------------------------------------------------------


def build_water(
    simple: Path, towns: Mapping[str, Town], value: Mapping[str, float], target: Path
) -> dict[str, float]:
    """Give every town the water net of `simple` at its size; returns pumps and their MW.

    Flows go with the people, diameters of pipes with their 1.852/4.871th power and those of tanks
    with the square root, so that every head and every filling time of the original stays.
    """
    sections = read_sections((simple / "water.inp").read_text())
    at = {row[0]: (float(row[1]), float(row[2])) for row in sections["COORDINATES"]}
    given_m3_h = sum(float(row[2]) for row in sections["JUNCTIONS"]) * GPM_M3_H
    out: dict[str, list[str]] = {
        name: [] for name in ("JUNCTIONS", "RESERVOIRS", "TANKS", "PIPES", "PUMPS", "CURVES")
    }
    points: dict[str, Point] = {}
    junctions: list[dict[str, object]] = []
    parts: list[Row] = []
    rated: dict[str, float] = {}
    efficiency = value["pump_efficiency"]
    for town in towns.values():
        size = town.people * value["water_litres_per_day"] / 1000 / 24 / given_m3_h
        named = _of(town)
        where = {named(n): drawn(town, *xy, MAINS_FROM) for n, xy in at.items()}
        points |= where
        for name, elevation_ft, gpm, *_ in sections["JUNCTIONS"]:
            demand = float(gpm) * GPM_M3_H * size
            elevation = float(elevation_ft) * FOOT_M
            out["JUNCTIONS"].append(f"{named(name)} {elevation:.3f} {demand:.4f} FLAT")
            junctions.append(
                {
                    "junction": named(name),
                    **place(where[named(name)]),
                    "base_demand_m3_per_h": round(demand, 4),
                    "people": 0,
                }
            )
        for name, head_ft, *_ in sections["RESERVOIRS"]:
            out["RESERVOIRS"].append(f"{named(name)} {float(head_ft) * FOOT_M:.3f}")
        for name, *numbers in sections["TANKS"]:
            elevation, start, low, high, diameter = (float(n) * FOOT_M for n in numbers[:5])
            wide = diameter * math.sqrt(size)
            out["TANKS"].append(
                f"{named(name)} {elevation:.3f} {start:.3f} {low:.3f} {high:.3f} {wide:.2f} 0"
            )
            parts.append(_part(named(name), "tank", where[named(name)]))
        tanks = {row[0] for row in sections["TANKS"]}
        for name, a, b, length_ft, diameter_in, rough, *_ in sections["PIPES"]:
            length_m = float(length_ft) * FOOT_M
            wide_mm = float(diameter_in) * INCH_MM * size ** (1.852 / 4.871)
            out["PIPES"].append(
                f"{named(name)} {named(a)} {named(b)} {length_m:.1f} {wide_mm:.1f} {rough} 0 Open"
            )
            if not tanks & {a, b}:
                spot = middle(where[named(a)], where[named(b)])
                parts.append(_part(named(name), "main", spot, length_m / 1000))
        for name, a, b, _, curve in (row[:5] for row in sections["PUMPS"]):
            (flow, head) = next(
                (float(r[1]) * GPM_M3_H * size, float(r[2]) * FOOT_M)
                for r in sections["CURVES"]
                if r[0] == curve
            )
            out["PUMPS"].append(f"{named(name)} {named(a)} {named(b)} HEAD {named('C' + curve)}")
            out["CURVES"].append(f"{named('C' + curve)} {flow:.3f} {head:.3f}")
            spot = middle(where[named(a)], where[named(b)])
            parts.append(_part(named(name), "pump", spot))
            # as for Shelby: the largest rho g Q H / eta along EPANET's one-point curve
            watt_hours = 1000 * 9.80665 / 3600 / 1e6 * 16 / (9 * math.sqrt(3)) / efficiency
            rated[named(name)] = math.ceil(100 * watt_hours * flow * head) / 100
    _write_inp(out, points, efficiency, target)
    write_csv(target / "junctions.csv", junctions)
    order = {"pump": 0, "tank": 1, "main": 2}
    parts.sort(key=lambda part: order[str(part["component_class"])])
    write_csv(target / "water_components.csv", parts)
    return rated


def _part(name: str, cls: str, spot: Sequence[float], length_km: float = 0.0) -> Row:
    return {
        "component_id": name,
        "component_class": cls,
        **place(spot),
        "length_km": round(length_km, 3),
        "fragility_class": cls,
    }


def _of(town: Town) -> Naming:
    return Naming(town.name)


@dataclass(frozen=True)
class Naming:
    """Names of the parts of `simple` in a town: `W_J10` is `Cabell_J10` in Cabell."""

    town: str

    def __call__(self, name: str) -> str:
        return f"{self.town}_{name.split('_', 1)[-1]}"


def _write_inp(
    parts: Mapping[str, Sequence[str]],
    points: Mapping[str, Point],
    efficiency: float,
    target: Path,
) -> None:
    heads = {
        "JUNCTIONS": ";ID Elev Demand Pattern",
        "RESERVOIRS": ";ID Head",
        "TANKS": ";ID Elevation InitLevel MinLevel MaxLevel Diameter MinVol",
        "PIPES": ";ID Node1 Node2 Length Diameter Roughness MinorLoss Status",
        "PUMPS": ";ID Node1 Node2 Parameters",
        "CURVES": ";ID Flow Head",
    }
    out = ["[TITLE]", "Towns of the Mojave region, each a copy of InfraRisk's simple", ""]
    for name, head in heads.items():
        out += [f"[{name}]", head, *parts[name], ""]
    out += ["[PATTERNS]", ";ID Multipliers", "FLAT 1.0", ""]
    out += how_water_runs(efficiency, "FLAT", points)
    (target / "water.inp").write_text("\n".join(out), encoding="utf-8")


# --- roads and people -----------------------------------------------------------------------


def build_roads(
    simple: Path,
    buses: Mapping[str, Mapping[str, str]],
    points: Mapping[str, Point],
    towns: Mapping[str, Town],
    branches: Sequence[Mapping[str, str]],
    value: Mapping[str, float],
    target: Path,
) -> None:
    """Give every town the streets and the trips of `simple`, and join towns by highways."""
    drawing: dict[str, Point] = {}
    for line in (simple / "transpo_node.tntp").read_text().splitlines()[1:]:
        if line.strip():
            n, x, y = line.split()[:3]
            drawing[n] = (float(x), float(y))
    streets = [
        line.split()
        for line in (simple / "transpo_net.tntp").read_text().splitlines()
        if line.strip().startswith("T_J")
    ]
    given = _given_trips(simple)
    total = sum(given.values())
    day = read_csv(target / "demand_profile.csv")
    busiest = max(float(row["share"]) for row in day)

    nodes: dict[str, Point] = {}
    links: list[Row] = []
    roads: dict[frozenset[str], Row] = {}
    trips: dict[tuple[str, str], float] = {}
    zones: list[Row] = []
    junction = {r["junction"]: position(r) for r in read_csv(target / "junctions.csv")}

    def road(link: str, a: str, b: str, km: float, kmh: float, capacity: int, cls: str) -> None:
        known = roads.setdefault(
            frozenset((a, b)),
            {
                "road": link,
                **place(middle(nodes[a], nodes[b])),
                "length_km": round(km, 4),
                "fragility_class": cls,
            },
        )
        links.append(
            {
                "link": link,
                "road": known["road"],
                "from_node": a,
                "to_node": b,
                "capacity_veh_per_h": capacity,
                "length_km": round(km, 4),
                "free_flow_min": round(km / kmh * 60, 5),
                "b": 0.15,
                "power": 4,
                "speed_kmh": round(kmh, 2),
            }
        )

    for town in towns.values():
        named = _of(town)
        nodes |= {named(n): drawn(town, *xy, STREETS_FROM) for n, xy in drawing.items()}
        daily = town.people * value["trips_per_person"]
        local = daily * (1 - value["intercity_share"])
        # so that streets are as full in the busiest hour as those of the original
        size = local * busiest / total
        for a, b, capacity, length, minutes, *_, link in (f[:5] + f[10:11] for f in streets):
            kmh = float(length) / float(minutes) * 60
            wide = max(1, round(float(capacity) * size))
            road(named(link), named(a), named(b), float(length), kmh, wide, "road_urban")
        for (a, b), count in given.items():
            trips[named(a), named(b)] = round(local * count / total, 3)
        made = {n: sum(c for (a, _), c in given.items() if a == n) for n in drawing}
        near = {n: p for n, p in junction.items() if n.startswith(f"{town.name}_")}
        for n, people in zip(made, whole(list(made.values()), town.people), strict=True):
            spot = nodes[named(n)]
            zones.append(
                {
                    "zone": f"Z_{named(n)}",
                    **place(spot),
                    "population": people,
                    "load_point": f"L_{town.name}",
                    "junction": nearest(spot, near),
                    "road_node": named(n),
                }
            )
    ends: dict[str, str] = {}
    for bus, row in buses.items():
        ends[bus] = _of(towns[bus])(f"T_{CENTRE}") if bus in towns else f"{row['Bus Name']}_H"
        nodes.setdefault(ends[bus], points[bus])
    corridors = dict.fromkeys(
        (min(r["From Bus"], r["To Bus"]), max(r["From Bus"], r["To Bus"])) for r in branches
    )
    neighbours: dict[str, list[str]] = {}
    for a, b in corridors:
        km = great_circle_km(points[a], points[b]) * value["highway_detour"]
        for one, other in ((a, b), (b, a)):
            name = f"H_{buses[one]['Bus Name']}_{buses[other]['Bus Name']}"
            kmh, lanes = value["highway_kmh"], round(value["highway_capacity"])
            road(name, ends[one], ends[other], km, kmh, lanes, "road_major")
            neighbours.setdefault(one, []).append(other)
    for bus, town in towns.items():
        around = _towns_around(bus, neighbours, towns)
        daily = town.people * value["trips_per_person"] * value["intercity_share"]
        people = sum(towns[other].people for other in around)
        for other in around:
            count = daily * towns[other].people / people
            trips[ends[bus], ends[other]] = round(count, 3)
    write_csv(target / "road_nodes.csv", [{"node": n, **place(p)} for n, p in nodes.items()])
    write_csv(target / "road_links.csv", links)
    write_csv(target / "roads.csv", roads.values())
    write_csv(
        target / "trips.csv",
        [
            {"origin": a, "destination": b, "trips_per_day": count}
            for (a, b), count in trips.items()
            if count > 0
        ],
    )
    write_csv(target / "zones.csv", zones)
    people_at = people_by(read_csv(target / "zones.csv"), "junction")
    write_csv(
        target / "junctions.csv",
        [
            {**row, "people": people_at.get(row["junction"], 0)}
            for row in read_csv(target / "junctions.csv")
        ],
    )


def _given_trips(simple: Path) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    origin = ""
    for line in (simple / "transpo_trips.tntp").read_text().splitlines():
        if line.startswith("Origin"):
            origin = line.split()[1]
        for destination, count in re.findall(r"(T_J\d+)\s*:\s*([\d.]+)", line):
            found[origin, destination] = float(count)
    return found


def _towns_around(
    bus: str, neighbours: Mapping[str, Sequence[str]], towns: Mapping[str, Town]
) -> list[str]:
    """The towns that a highway leads to without passing another town."""
    found: dict[str, None] = {}
    seen, ahead = {bus}, list(neighbours.get(bus, ()))
    while ahead:
        there = ahead.pop(0)
        if there in seen:
            continue
        seen.add(there)
        if there in towns:
            found[there] = None
        else:
            ahead += neighbours.get(there, ())
    return list(found)


def whole(weight: Sequence[float], total: int) -> list[int]:
    """Share a whole number by weight, by largest remainder."""
    exact = np.array(weight) / math.fsum(weight) * total
    share = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - share), kind="stable")[: total - int(share.sum())]:
        share[i] += 1
    return [int(s) for s in share]


# --- power ----------------------------------------------------------------------------------


def build_power(
    source: Path,
    buses: Mapping[str, Mapping[str, str]],
    points: Mapping[str, Point],
    towns: Mapping[str, Town],
    branches: Sequence[Mapping[str, str]],
    pump_mw: Mapping[str, float],
    value: Mapping[str, float],
    target: Path,
) -> None:
    """Lay the area out as a net: its own lines and transformers with their published ratings, its
    firm plants as infeeds behind their step-up transformers, a transformer to each town."""
    net = pp.create_empty_network(f_hz=60.0, sn_mva=BASE_MVA)
    place_of: dict[int, Point] = {}

    def bus(name: str, kv: float, point: Point) -> int:
        geo = (round(point[0], 6), round(point[1], 6))
        made = int(pp.create_bus(net, kv, name=name, geodata=geo, index=len(net.bus)))
        place_of[made] = point
        return made

    at = {b: bus(r["Bus Name"], float(r["BaseKV"]), points[b]) for b, r in buses.items()}
    lengths: dict[str, float] = {}
    parts: list[Row] = []

    def part(name: str, cls: str, table: str, point: Sequence[float], fragility: str) -> None:
        parts.append(
            {
                "component_id": name,
                "component_class": cls,
                "element_table": table,
                "element_name": name,
                **place(point),
                "fragility_class": fragility,
            }
        )

    def transformer(
        name: str, high: int, low: int, mva: float, vk: float, vkr: float, **more: float
    ) -> None:
        pp.create_transformer_from_parameters(
            net, high, low, mva,
            **{"vn_hv_kv": net.bus.vn_kv[high], "vn_lv_kv": net.bus.vn_kv[low], **more},
            vk_percent=vk, vkr_percent=vkr, pfe_kw=0.0, i0_percent=0.0, name=name,
        )  # fmt: skip
        part(name, "transformer", "trafo", place_of[high], "substation")

    for row in branches:
        a, b = row["From Bus"], row["To Bus"]
        kv, other_kv = float(buses[a]["BaseKV"]), float(buses[b]["BaseKV"])
        r, x, mva = float(row["R"]), float(row["X"]), float(row["Cont Rating"])
        if kv != other_kv:
            # the tap of the original stands at the 138 kV side
            scale = 100 * mva / BASE_MVA
            ratio = float(row["Tr Ratio"])
            transformer(
                row["UID"], at[b], at[a], mva, math.hypot(r, x) * scale, r * scale,
                vn_lv_kv=kv * ratio,
            )  # fmt: skip
            continue
        ohm = kv**2 / BASE_MVA
        km = max(float(row["Length"]) * MILE_KM, 1.0)
        farad = float(row["B"]) / ohm / (2 * math.pi * 60)
        pp.create_line_from_parameters(
            net, at[a], at[b], km, r * ohm / km, x * ohm / km, farad * 1e9 / km,
            mva / (math.sqrt(3) * kv), name=row["UID"],
        )  # fmt: skip
        lengths[row["UID"]] = km
        part(row["UID"], "line", "line", middle(points[a], points[b]), "power_line")
    for b, row in buses.items():
        if float(row["MVAR Shunt B"]):
            pp.create_shunt(net, at[b], -float(row["MVAR Shunt B"]), name=f"S_{row['Bus Name']}")
    fed_at: dict[str, int] = {}
    for b, town in towns.items():
        low = fed_at[b] = bus(f"{town.name}_12", LOW_KV, town.point)
        reactive = float(buses[b]["MVAR Load"])
        mva = value["town_transformer_margin"] * math.hypot(town.load_mw, reactive)
        vk, vkr = value["town_transformer_vk"], value["town_transformer_vkr"]
        transformer(f"T_{town.name}", at[b], low, round(mva, 1), vk, vkr)
        pp.create_load(net, low, town.load_mw, reactive, name=f"L_{town.name}")
    held = value["plant_voltage"]
    for name, station in plants(source, buses).items():
        b = station[0]["Bus ID"]
        most_mw = sum(float(g["PMax MW"]) for g in station)
        mva = sum(float(g["Base MVA"]) for g in station)
        reach = sum(float(g["Transformer X p.u."]) * float(g["Base MVA"]) for g in station) / mva
        machine = bus(f"{name}_M", float(buses[b]["BaseKV"]), points[b])
        pp.create_ext_grid(net, machine, held, 0.0, name=f"G_{name}", max_p_mw=most_mw)
        vk = 100 * reach * most_mw / mva
        transformer(f"U_{name}", machine, at[b], most_mw, vk, vk / 40)
        # a plant has no emergency rating: at the one of the lines it gives what it can
        net.trafo.loc[net.trafo.index[-1], "df"] = round(1 / value["emergency_rating"], 6)
        part(f"G_{name}", "infeed", "ext_grid", points[b], "external_grid")
    pumps: list[Row] = []
    water = {r["component_id"]: position(r) for r in read_csv(target / "water_components.csv")}
    for pump, rated_mw in pump_mw.items():
        town_bus = next(b for b, t in towns.items() if pump.startswith(f"{t.name}_"))
        motor = f"M_{pump}"
        pp.create_motor(net, fed_at[town_bus], rated_mw, cos_phi=0.8, name=motor)
        pumps.append(
            {
                "pump": pump,
                "motor": motor,
                "bus_name": net.bus.name[fed_at[town_bus]],
                **place(water[pump]),
                "rated_mw": rated_mw,
            }
        )
    write_csv(target / "pumps.csv", pumps)
    people = people_by(read_csv(target / "zones.csv"), "load_point")
    write_csv(
        target / "load_points.csv",
        [
            {
                "load_point": f"L_{town.name}",
                "bus_name": net.bus.name[fed_at[b]],
                **place(town.point),
                "base_mw": town.load_mw,
                "people": people[f"L_{town.name}"],
            }
            for b, town in towns.items()
        ],
    )
    order = {"line": 0, "transformer": 1, "infeed": 2}
    parts.sort(key=lambda row: order[str(row["component_class"])])
    write_csv(target / "power_components.csv", parts)
    write_csv(
        target / "overhead_lines.csv",
        [{"component_id": n, "length_km": round(km, 3)} for n, km in lengths.items()],
    )
    pp.to_json(net, str(target / "power.json"))


def plants(source: Path, buses: Mapping[str, Mapping[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The firm generators of the area; small units of one kind at one bus stand as one."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in read_csv(source / "gen.csv"):
        if row["Bus ID"] not in buses or row["Category"] not in FIRM:
            continue
        name = row["GEN UID"]
        if float(row["PMax MW"]) < 100:
            name = f"{row['Bus ID']}_{row['Unit Type']}"
        found.setdefault(name, []).append(row)
    return found


def build_tie_lines(source: Path, buses: Mapping[str, Mapping[str, str]], target: Path) -> None:
    """The lines of the original that leave the area, with their published ratings."""
    rows: list[Row] = []
    ends = [(r, r["Cont Rating"], "branch.csv") for r in read_csv(source / "branch.csv")]
    ends += [(r, r["MW Load"], "dc_branch.csv") for r in read_csv(source / "dc_branch.csv")]
    for row, rating, file in ends:
        here, there = sorted((row["From Bus"], row["To Bus"]), key=lambda b: b[0] != AREA)
        if here[0] != AREA or there[0] == AREA:
            continue
        bus = buses[here]
        rows.append(
            {
                "tie_line": row["UID"],
                "name": f"{bus['Bus Name']} to {buses[there]['Bus Name']}",
                "bus_name": bus["Bus Name"],
                "lon_deg": round(float(bus["lng"]), 6),
                "lat_deg": round(float(bus["lat"]), 6),
                "rating_mw": float(rating),
                "source": f"RTS-GMLC {file}",
            }
        )
    write_csv(target / "tie_lines.csv", rows)


# --- ground motion --------------------------------------------------------------------------


def build_ground_motion(
    points: Mapping[str, Point], value: Mapping[str, float], target: Path
) -> None:
    """Median shaking of the declared scenarios (`faults.csv`) over the area."""
    lon, lat = (np.array([p[k] for p in points.values()]) for k in (0, 1))
    grid = [
        (round(x, 6), round(y, 6))
        for x in np.arange(lon.min() - 0.1, lon.max() + 0.1 + GRID_STEP_DEG, GRID_STEP_DEG)
        for y in np.arange(lat.min() - 0.1, lat.max() + 0.1 + GRID_STEP_DEG, GRID_STEP_DEG)
    ]
    fields = read_csv(target / "faults.csv")
    columns: dict[str, Array] = {}
    for field in fields:
        trace = [(float(x), float(y)) for x, y in (p.split() for p in field["trace"].split(" / "))]
        km = np.array([distance_km(p, trace) for p in grid])
        magnitude = float(field["magnitude"])
        pga, pgv = shaking(magnitude, km, field["mechanism"], value["vs30_m_s"])
        columns[f"pga_g_{field['field']}"] = np.round(pga, 5)
        columns[f"pgv_cm_s_{field['field']}"] = np.round(pgv, 4)
        columns[f"pgd_in_{field['field']}"] = np.round(
            [spreading_in(float(a), magnitude, value["liquefaction_threshold_g"]) for a in pga], 4
        )
    write_csv(
        target / "ground_motion.csv",
        [
            {**place(p), **{name: float(values[k]) for name, values in columns.items()}}
            for k, p in enumerate(grid)
        ],
    )
    write_csv(
        target / "ground_motion_fields.csv",
        [{n: f[n] for n in ("field", "source", "magnitude", "weight")} for f in fields],
    )


def distance_km(point: Point, trace: Sequence[Point]) -> float:
    """From a point to the nearest of a trace on the ground: Joyner and Boore's distance to a
    vertical fault that reaches the surface."""
    scale = np.array([math.cos(math.radians(point[1])), 1.0]) * EARTH_KM_PER_DEG
    p = np.array(point) * scale
    best = math.inf
    for a, b in itertools.pairwise(trace):
        start, end = np.array(a) * scale, np.array(b) * scale
        way = end - start
        along = float(np.clip((p - start) @ way / (way @ way), 0.0, 1.0))
        best = min(best, float(np.linalg.norm(p - start - along * way)))
    return best


@dataclass(frozen=True)
class Attenuation:
    """One row of table 6 to 8 of Boore and Atkinson (2008)."""

    unspecified: float
    strike_slip: float
    normal: float
    reverse: float
    e5: float
    e6: float
    e7: float
    hinge: float
    c1: float
    c2: float
    c3: float
    h_km: float
    linear: float
    b1: float
    b2: float


PGA = Attenuation(
    -0.53804, -0.50350, -0.75472, -0.50970, 0.28805, -0.10164, 0.0, 6.75,
    -0.66050, 0.11970, -0.01151, 1.35, -0.360, -0.640, -0.14,
)  # fmt: skip
PGV = Attenuation(
    5.00121, 5.04727, 4.63188, 5.08210, 0.18322, -0.12736, 0.0, 8.50,
    -0.87370, 0.10060, -0.00334, 2.54, -0.600, -0.500, -0.06,
)  # fmt: skip


def shaking(
    magnitude: float, distance: Array, mechanism: str, vs30_m_s: float
) -> tuple[Array, Array]:
    """Median PGA in g and PGV in cm/s at Joyner and Boore's distances in km."""
    rock_g = np.exp(_on_rock(PGA, magnitude, distance, mechanism))
    found = []
    for law in (PGA, PGV):
        site = _site(law, rock_g, vs30_m_s)
        found.append(np.exp(_on_rock(law, magnitude, distance, mechanism) + site))
    return found[0], found[1]


def _on_rock(law: Attenuation, magnitude: float, distance: Array, mechanism: str) -> Array:
    r"""ln Y on rock of 760 m/s (Boore and Atkinson, Earthquake Spectra 24 (2008) 99).

    .. math::
        e_{mech} + e_5 (M - M_h) + e_6 (M - M_h)^2 \; (M \le M_h), \quad e_{mech} + e_7 (M - M_h)
        \\ + (c_1 + c_2 (M - 4.5)) \ln R + c_3 (R - 1), \qquad R = \sqrt{R_{JB}^2 + h^2}
    """
    above = magnitude - law.hinge
    size = law.e7 * above if above > 0 else law.e5 * above + law.e6 * above**2
    r = np.hypot(distance, law.h_km)
    decay = (law.c1 + law.c2 * (magnitude - 4.5)) * np.log(r) + law.c3 * (r - 1.0)
    return np.asarray(getattr(law, mechanism) + size + decay)


def _site(law: Attenuation, rock_g: Array, vs30_m_s: float) -> Array:
    """What the ground adds to ln Y; less where it shakes so hard that it gives way."""
    linear = law.linear * math.log(vs30_m_s / REFERENCE_ROCK_M_S)
    if vs30_m_s <= 180:
        b = law.b1
    elif vs30_m_s <= 300:
        b = (law.b1 - law.b2) * math.log(vs30_m_s / 300) / math.log(180 / 300) + law.b2
    elif vs30_m_s < REFERENCE_ROCK_M_S:
        b = law.b2 * math.log(vs30_m_s / REFERENCE_ROCK_M_S) / math.log(300 / REFERENCE_ROCK_M_S)
    else:
        b = 0.0
    low, a1, a2 = 0.06, 0.03, 0.09
    x, y = math.log(a2 / a1), b * math.log(a2 / low)
    c, d = (3 * y - b * x) / x**2, -(2 * y - b * x) / x**3
    z = np.log(np.maximum(rock_g, a1) / a1)
    between = b * math.log(low / 0.1) + c * z**2 + d * z**3
    above = b * np.log(np.maximum(rock_g, a2) / 0.1)
    beyond = np.where(rock_g <= a2, between, above)
    return np.asarray(linear + np.where(rock_g <= a1, b * math.log(low / 0.1), beyond))


# --- hospitals ------------------------------------------------------------------------------


def build_hospitals(towns: Mapping[str, Town], value: Mapping[str, float], target: Path) -> None:
    """One hospital in each larger town, with the beds of the people whose nearest it is."""
    large = {t.name: t for t in towns.values() if t.people >= value["hospital_town_people"]}
    where = {name: town.point for name, town in large.items()}
    served = dict.fromkeys(large, 0)
    for town in towns.values():
        served[nearest(town.point, where)] += town.people
    by_size = sorted(large, key=lambda name: -served[name])
    level = dict(zip(by_size, ("I", "II"), strict=False))
    rows: list[Row] = []
    for name, town in large.items():
        beds = round(served[name] * value["beds_per_1000"] / 1000)
        named = _of(town)
        rows.append(
            {
                "hospital": f"HO_{name}",
                "name": f"{name} Hospital",
                **place(town.point),
                "role": "acute",
                "staffed_beds": beds,
                "icu_beds": max(1, round(beds * value["icu_share"])),
                "occupancy": value["hospital_occupancy"],
                "icu_occupancy": value["icu_occupancy"],
                "trauma_level": level.get(name, ""),
                "load_point": f"L_{name}",
                "junction": named(f"W_{WELL}"),
                "road_node": named(f"T_{CENTRE}"),
                "load_mw": round(beds * value["hospital_kw_per_bed"] / 1000, 3),
                "water_m3_per_h": round(beds * value["hospital_water_m3_per_bed_day"] / 24, 3),
                "building_type": "C2M",
                "design_level": "high_code",
            }
        )
    write_csv(target / "hospitals.csv", rows)


# --- provenance -----------------------------------------------------------------------------


def write_provenance(originals: Path, target: Path) -> None:
    """Write the SHA-256 of every original that is read and of every file beside this one."""
    files = sorted(
        path.name
        for path in target.iterdir()
        if path.suffix in {".csv", ".inp", ".json", ".txt"} and path.name != "provenance.json"
    )
    hashes = {
        "originals": {name: sha256(originals / name) for name in USED}
        | {f"../shelby/{name}": sha256(BESIDE / name) for name in FROM_BESIDE},
        "files": {name: sha256(target / name) for name in files},
    }
    (target / "provenance.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("originals", type=Path, help="folder of the original data sets")
    build(parser.parse_args().originals, HERE)
