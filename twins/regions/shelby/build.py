"""Rebuilds the files of the Shelby region from the originals and corrects their known faults.

`python -m twins.regions.shelby.build ORIGINALS_DIR`, where the folder holds `coupled-infrarisk`,
`infra-shelby-indp` and `region-shelby`. The same originals give the same bytes. The declared files
beside this one (`assumptions.csv`, `building_mix.csv`, `demand_profile.csv`) are read, not written.
README.md says for each correction what was wrong, why, and what it changes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandapower as pp
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

Array = NDArray[np.float64]
Row = Mapping[str, object]

HERE = Path(__file__).parent
LICENCES = {
    "coupled-infrarisk/LICENSE": "LICENSE-infrarisk.txt",
    "infra-shelby-indp/LICENSE": "LICENSE-indp-MIT.txt",
    "region-shelby/LICENSE-covidcaremap-MIT.txt": "LICENSE-covidcaremap-MIT.txt",
    "region-shelby/LICENSE-pelicun-BSD-3.txt": "LICENSE-pelicun-BSD-3.txt",
}

SPHERE_M = 6378137.0
"""Radius on which Web Mercator (EPSG:3857) is drawn."""
EARTH_KM = 6371.0088
"""Mean radius of the Earth, for great circles."""
MLD_PER_CMS = 86.4
TABLE_MARKS = ("<!-- assumptions: begin -->", "<!-- assumptions: end -->")
STATES = ("Slight", "Moderate", "Extensive", "Complete")
FIELDS = (
    ("203078_7.7", 7.7, 0.08),
    ("203079_7.7", 7.7, 0.06),
    ("203080_7.5", 7.5, 0.14),
    ("203080_7.7", 7.7, 0.47),
    ("203080_8.0", 8.0, 0.25),
)


def build(originals: Path, target: Path) -> None:
    """Write every derived file of the region into `target`, which holds the declared ones."""
    infrarisk = originals / "coupled-infrarisk" / "shelby"
    region = originals / "region-shelby"
    value = {row["name"]: float(row["value"]) for row in read_csv(target / "assumptions.csv")}
    supply = {
        (row["consumer_id"], row["layer"]): row["supplier"]
        for row in read_csv(region / "supply.csv")
    }
    zones = build_zones(region, supply, target)
    pump_rated_mw = build_water(infrarisk, zones, value, target)
    build_power(infrarisk, zones, pump_rated_mw, value, target)
    build_roads(infrarisk, target)
    build_signals(target)
    build_ground_motion(infrarisk, target)
    build_fragility(infrarisk, region, target)
    build_hospitals(region, supply, value, target)
    build_bases(zones, value, target)
    for original, copy in LICENCES.items():
        shutil.copyfile(originals / original, target / copy)
    write_assumptions_table(target)
    write_provenance(originals, target)


# --- geometry and files ---------------------------------------------------------------------


def degrees(x_m: float, y_m: float) -> tuple[float, float]:
    """Longitude and latitude (WGS84 degrees) of a Web Mercator point."""
    lat = 2 * math.atan(math.exp(y_m / SPHERE_M)) - math.pi / 2
    return math.degrees(x_m / SPHERE_M), math.degrees(lat)


def great_circle_km(a: Sequence[float], b: Sequence[float]) -> float:
    """Distance of two points (lon, lat in degrees) on a sphere, by the haversine formula."""
    lon_a, lat_a, lon_b, lat_b = map(math.radians, (a[0], a[1], b[0], b[1]))
    h = (
        math.sin((lat_b - lat_a) / 2) ** 2
        + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(math.sqrt(h))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows of equal keys; floats are rounded where the row was made."""
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def place(point: Sequence[float]) -> dict[str, float]:
    return {"lon_deg": round(point[0], 6), "lat_deg": round(point[1], 6)}


def middle(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def position(row: Mapping[str, str]) -> tuple[float, float]:
    return float(row["lon_deg"]), float(row["lat_deg"])


def nearest(point: Sequence[float], places: Mapping[str, Sequence[float]]) -> str:
    """The name of the place next to a point on the ground; the first one of equals."""
    return min(places, key=lambda name: great_circle_km(point, places[name]))


# --- people ---------------------------------------------------------------------------------


def build_zones(
    region: Path, supply: Mapping[tuple[str, str], str], target: Path
) -> list[dict[str, str]]:
    rows: list[dict[str, object]] = [
        {
            "zone": z["zone_id"],
            **place((float(z["lon"]), float(z["lat"]))),
            "population": int(z["population"]),
            "load_point": supply[z["zone_id"], "power_load_bus"],
            "junction": supply[z["zone_id"], "water_demand_junction"],
            "road_node": supply[z["zone_id"], "road_node"],
        }
        for z in read_csv(region / "zones.csv")
    ]
    write_csv(target / "zones.csv", rows)
    return read_csv(target / "zones.csv")


def people_by(zones: Iterable[Mapping[str, str]], key: str) -> dict[str, int]:
    people: dict[str, int] = {}
    for zone in zones:
        people[zone[key]] = people.get(zone[key], 0) + int(zone["population"])
    return people


# --- power ----------------------------------------------------------------------------------


def build_power(
    infrarisk: Path,
    zones: Iterable[Mapping[str, str]],
    pump_rated_mw: Mapping[str, float],
    value: Mapping[str, float],
    target: Path,
) -> None:
    """Scale loads to megawatts and admittances with them, so that per-unit voltages stay."""
    net = pp.from_json(str(infrarisk / "power.json"))
    scale = value["load_scale"]
    points = {int(i): degrees(*json.loads(geo)["coordinates"]) for i, geo in net.bus["geo"].items()}
    name = {int(i): str(n) for i, n in net.bus["name"].items()}

    net.load[["p_mw", "q_mvar"]] = (net.load[["p_mw", "q_mvar"]] * scale).round(6)
    net.line[["r_ohm_per_km", "x_ohm_per_km"]] /= scale
    # the stored charging was meant at 50 Hz
    net.line["c_nf_per_km"] *= scale * 50.0 / 60.0
    net.f_hz = 60.0
    net.trafo["sn_mva"] *= scale
    net.trafo["pfe_kw"] *= scale
    low_side = net.bus.index[net.bus["vn_kv"] == 0.12]
    net.bus.loc[low_side, "vn_kv"] = 12.0
    net.trafo.loc[net.trafo["vn_lv_kv"] == 0.12, "vn_lv_kv"] = 12.0
    net.bus["geo"] = [
        json.dumps({"coordinates": [round(c, 6) for c in points[i]], "type": "Point"})
        for i in net.bus.index
    ]
    for table in [t for t in net if t.endswith("_geodata") or t.startswith("res_")]:
        net[table] = net[table].iloc[0:0]
    water = {row["component_id"]: row for row in read_csv(target / "water_components.csv")}
    pumps: list[Row] = []
    for pair in read_csv(infrarisk / "dependencies.csv"):
        pump, motor = pair["water_id"], pair["power_id"]
        row = net.motor.index[net.motor["name"] == motor][0]
        net.motor.loc[row, "pn_mech_mw"] = pump_rated_mw[pump]
        pumps.append(
            {
                "pump": pump,
                "motor": motor,
                "bus_name": name[int(net.motor.at[row, "bus"])],
                **place(position(water[pump])),
                "rated_mw": pump_rated_mw[pump],
            }
        )
    write_csv(target / "pumps.csv", pumps)
    rate(net, value["rating_margin"])

    people = people_by(zones, "load_point")
    write_csv(
        target / "load_points.csv",
        [
            {
                "load_point": load["name"],
                "bus_name": name[load["bus"]],
                **place(points[load["bus"]]),
                "base_mw": load["p_mw"],
                "people": people.get(load["name"], 0),
            }
            for _, load in net.load.iterrows()
        ],
    )
    components: list[Row] = []
    for table, cls, fragility in (
        ("line", "line", "power_line"),
        ("trafo", "transformer", "substation"),
        ("ext_grid", "infeed", "external_grid"),
    ):
        for _, element in net[table].iterrows():
            if table == "line":
                where = middle(points[element["from_bus"]], points[element["to_bus"]])
            else:
                where = points[element["hv_bus" if table == "trafo" else "bus"]]
            components.append(
                {
                    "component_id": element["name"],
                    "component_class": cls,
                    "element_table": table,
                    "element_name": element["name"],
                    **place(where),
                    "fragility_class": fragility,
                }
            )
    write_csv(target / "power_components.csv", components)
    write_csv(
        target / "overhead_lines.csv",
        [
            {"component_id": line["name"], "length_km": round(float(line["length_km"]), 3)}
            for _, line in net.line.iterrows()
        ],
    )
    pp.to_json(net, str(target / "power.json"))


def rate(net: pp.pandapowerNet, margin: float) -> None:
    """Give lines and infeed transformers the ratings of a network planned for N-1 at peak.

    The rating is the largest flow over the base case and every single outage of a line, an
    infeed or a transformer, times `margin`, rounded up to 0.1 kA and 5 MVA.
    """
    lines = net.line.index
    feeds = net.trafo.index[net.trafo["vn_hv_kv"] > 100]
    outages = [("", 0)] + [("line", i) for i in lines] + [("trafo", i) for i in feeds]
    worst_ka = np.zeros(len(lines))
    worst_mva = np.zeros(len(feeds))
    for table, index in outages:
        if table:
            net[table].loc[index, "in_service"] = False
        try:
            pp.runpp(net, init="dc", numba=False)
        except pp.LoadflowNotConverged:
            if not table:
                raise
            continue  # an outage that no rating could survive says nothing about ratings
        finally:
            if table:
                net[table].loc[index, "in_service"] = True
        worst_ka = np.fmax(worst_ka, net.res_line["i_ka"].to_numpy())
        power = net.res_trafo.loc[feeds]
        worst_mva = np.fmax(worst_mva, np.hypot(power["p_hv_mw"], power["q_hv_mvar"]).to_numpy())
    net.line["max_i_ka"] = np.maximum(np.ceil(worst_ka * margin / 0.1 - 1e-6) * 0.1, 0.5).round(1)
    rated = np.ceil(worst_mva * margin / 5 - 1e-6) * 5
    change = rated / net.trafo.loc[feeds, "sn_mva"].to_numpy()
    net.trafo.loc[feeds, "sn_mva"] = rated
    # a transformer of a larger nameplate must keep its impedance in ohms
    for column in ("vk_percent", "vkr_percent"):
        net.trafo.loc[feeds, column] *= change
    for table in [t for t in net if t.startswith("res_")]:
        net[table] = net[table].iloc[0:0]


# --- water ----------------------------------------------------------------------------------


def how_water_runs(
    pump_efficiency: float, pattern: str, point: Mapping[str, tuple[float, float]]
) -> list[str]:
    """The lines that end `water.inp`: a day of 24 h, units, and where each node is (degrees)."""
    out = ["[ENERGY]", f"Global Efficiency {100 * pump_efficiency:g}", ""]
    out += ["[TIMES]", "Duration 24:00", "Hydraulic Timestep 0:15", "Pattern Timestep 1:00"]
    out += ["Report Timestep 0:15", "Start ClockTime 12 am", ""]
    out += ["[OPTIONS]", "Units CMH", "Headloss H-W", "Specific Gravity 1", "Viscosity 1"]
    out += ["Trials 100", "Accuracy 0.0001", "Unbalanced Continue 10", f"Pattern {pattern}"]
    out += ["Demand Multiplier 1.0", "Quality None", "", "[COORDINATES]", ";Node Lon Lat"]
    out += [f"{n} {lon:.6f} {lat:.6f}" for n, (lon, lat) in point.items()]
    out += ["", "[END]", ""]
    return out


def build_water(
    infrarisk: Path,
    zones: Iterable[Mapping[str, str]],
    value: Mapping[str, float],
    target: Path,
) -> dict[str, float]:
    """Write the network at county scale; returns the rated power of each pump in MW.

    Flows are read as m3/s, 86.4 times the megalitres per day that the file claims. Hazen and
    Williams' loss goes with Q^1.852 / D^4.871 and tank levels with Q / D^2, so diameters of
    pipes times 86.4^(1.852/4.871) and of tanks times 86.4^0.5 keep every head and every filling
    time of the original.
    """
    text = (infrarisk / "water.inp").read_text()
    sections = read_sections(text)
    pipe_scale = MLD_PER_CMS ** (1.852 / 4.871)
    tank_scale = MLD_PER_CMS**0.5
    point = {row[0]: degrees(float(row[1]), float(row[2])) for row in sections["COORDINATES"]}
    junctions = [(r[0], float(r[1]), float(r[2]) * 3600) for r in sections["JUNCTIONS"]]
    tanks = [(r[0], [float(v) for v in r[1:6]]) for r in sections["TANKS"]]
    pipes: list[tuple[str, str, str, float, float]] = []
    for pid, a, b, length, diameter, *_ in sections["PIPES"]:
        metres = float(length)
        if metres == 1000.0:
            metres = round(1000 * great_circle_km(point[a], point[b]), -1)
        pipes.append((pid, a, b, metres, round(float(diameter) * pipe_scale, 1)))
    curves = {r[0]: (float(r[1]) * 3600, float(r[2])) for r in sections["CURVES"]}
    pumps = [(r[0], r[1], r[2], r[4]) for r in sections["PUMPS"]]
    flat = value["water_flat_share"]
    residential = np.array(
        [float(v) for r in sections["PATTERNS"] for v in r[1:] if r[0][-1] == "2"]
    )
    pattern = flat + (1 - flat) * residential / residential.mean()

    out = ["[TITLE]", "Shelby County trunk water network, corrected (see README.md)", ""]
    out += ["[JUNCTIONS]", ";ID Elev Demand Pattern"]
    out += [f"{j} {elev:g} {q:.4f} DIURNAL" for j, elev, q in junctions]
    out += ["", "[RESERVOIRS]", ";ID Head"]
    out += [f"{r[0]} {float(r[1]):g}" for r in sections["RESERVOIRS"]]
    out += ["", "[TANKS]", ";ID Elevation InitLevel MinLevel MaxLevel Diameter MinVol"]
    out += [
        f"{t} {e:g} {i:g} {lo:g} {hi:g} {d * tank_scale:.2f} 0" for t, (e, i, lo, hi, d) in tanks
    ]
    out += ["", "[PIPES]", ";ID Node1 Node2 Length Diameter Roughness MinorLoss Status"]
    out += [f"{p} {a} {b} {m:g} {d:g} 100 0 Open" for p, a, b, m, d in pipes]
    out += ["", "[PUMPS]", ";ID Node1 Node2 Parameters"]
    out += [f"{p} {a} {b} HEAD {c}" for p, a, b, c in pumps]
    out += ["", "[CURVES]", ";ID Flow Head"]
    out += [f"{c} {q:.3f} {h:g}" for c, (q, h) in curves.items()]
    out += ["", "[PATTERNS]", ";ID Multipliers"]
    out += ["DIURNAL " + " ".join(f"{v:.4f}" for v in pattern[i : i + 6]) for i in (0, 6, 12, 18)]
    out += ["", *how_water_runs(value["pump_efficiency"], "DIURNAL", point)]
    (target / "water.inp").write_text("\n".join(out), encoding="utf-8")

    people = people_by(zones, "junction")
    write_csv(
        target / "junctions.csv",
        [
            {
                "junction": j,
                **place(point[j]),
                "base_demand_m3_per_h": round(q, 4),
                "people": people.get(j, 0),
            }
            for j, _, q in junctions
        ],
    )
    components: list[Row] = [
        {
            "component_id": p,
            "component_class": "pump",
            **place(middle(point[a], point[b])),
            "length_km": 0.0,
            "fragility_class": "pump",
        }
        for p, a, b, _ in pumps
    ]
    components += [
        {
            "component_id": t,
            "component_class": "tank",
            **place(point[t]),
            "length_km": 0.0,
            "fragility_class": "tank",
        }
        for t, _ in tanks
    ]
    components += [
        {
            "component_id": p,
            "component_class": "main",
            **place(middle(point[a], point[b])),
            "length_km": round(m / 1000, 3),
            "fragility_class": "main",
        }
        for p, a, b, m, _ in pipes
        if p.startswith("W_PMA")
    ]
    write_csv(target / "water_components.csv", components)
    # rho g Q H / eta in MW; on EPANET's one-point curve H = 4/3 H0 - 1/3 H0 (Q/Q0)^2 the product
    # Q H is largest at Q = 2/sqrt(3) Q0, where it is 1.0264 times that of the design point
    per_unit = 1000 * 9.80665 / 3600 / 1e6 * 16 / (9 * math.sqrt(3)) / value["pump_efficiency"]
    return {p: math.ceil(100 * per_unit * math.prod(curves[c])) / 100 for p, _, _, c in pumps}


def read_sections(text: str) -> dict[str, list[list[str]]]:
    """The rows of an EPANET input file by section, without comments."""
    sections: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[]"), [])
        elif line:
            rows.append(line.split())
    return sections


# --- roads ----------------------------------------------------------------------------------


MISDRAWN = ("T_L285", "T_L581")
"""The two ways between T_J101 and T_J106: 6.98 long in the original for 1.93 km."""


def build_roads(infrarisk: Path, target: Path) -> None:
    """Shorten Mercator lengths and times to the ground and drop the doubled link."""
    node: dict[str, tuple[float, float]] = {}
    for line in (infrarisk / "transpo_node.tntp").read_text().splitlines()[1:]:
        if line.strip():
            n, x, y = line.split()[:3]
            node[n] = degrees(float(x), float(y))
    rows: dict[tuple[str, str], list[str]] = {}
    for line in (infrarisk / "transpo_net.tntp").read_text().splitlines():
        if line.startswith("T_J"):
            fields = line.split()
            rows.setdefault((fields[0], fields[1]), fields)

    links: list[Row] = []
    roads: dict[tuple[str, str], dict[str, object]] = {}
    for (a, b), (_, _, capacity, length, minutes, bpr_b, power, _, _, _, link, *_) in rows.items():
        straight = great_circle_km(node[a], node[b])
        speed_kmh = float(length) / float(minutes) * 60
        km = max(float(length) * math.cos(math.radians((node[a][1] + node[b][1]) / 2)), straight)
        if link in MISDRAWN:
            km = straight
        road = roads.setdefault(
            (min(a, b), max(a, b)),
            {
                "road": link,
                **place(middle(node[a], node[b])),
                "length_km": round(km, 4),
                "fragility_class": "road_major" if capacity == "6600" else "road_urban",
            },
        )
        links.append(
            {
                "link": link,
                "road": road["road"],
                "from_node": a,
                "to_node": b,
                "capacity_veh_per_h": int(capacity),
                "length_km": round(km, 4),
                "free_flow_min": round(km / speed_kmh * 60, 5),
                "b": float(bpr_b),
                "power": int(power),
                "speed_kmh": round(speed_kmh, 2),
            }
        )
    write_csv(target / "road_nodes.csv", [{"node": n, **place(p)} for n, p in node.items()])
    write_csv(target / "road_links.csv", links)
    write_csv(target / "roads.csv", roads.values())

    trips: list[Row] = []
    origin = ""
    for line in (infrarisk / "transpo_trips.tntp").read_text().splitlines():
        if line.startswith("Origin"):
            origin = line.split()[1]
        for destination, count in re.findall(r"(T_J\d+)\s*:\s*([\d.]+)", line):
            trips.append(
                {"origin": origin, "destination": destination, "trips_per_day": float(count)}
            )
    write_csv(target / "trips.csv", trips)


def build_signals(target: Path) -> None:
    """Feed the traffic signals of every road node from the nearest load point."""
    feeders = {row["load_point"]: position(row) for row in read_csv(target / "load_points.csv")}
    nodes = read_csv(target / "road_nodes.csv")
    signals = [{"road_node": n["node"], "load_point": nearest(position(n), feeders)} for n in nodes]
    write_csv(target / "signals.csv", signals)


# --- ground motion and damage ---------------------------------------------------------------


def build_ground_motion(infrarisk: Path, target: Path) -> None:
    """Join the five fields; bound and complete their permanent ground deformation.

    The deformation of the originals is Hazus' lateral spreading in inches: with x the PGA over
    the threshold of the soil, 12x-12 (1..2), 18x-24 (2..3), 70x-180 (3..4), times
    0.0086 M^3 - 0.0914 M^2 + 0.4698 M - 0.9835. It was carried beyond x = 4 and left out at 25
    points; here x stops at 4 and those points take the threshold of their nearest neighbour.
    """
    fields = [read_csv(infrarisk / "gmfs_2475yr" / f"{name}_gms.csv") for name, _, _ in FIELDS]
    points = [degrees(float(r["lon_UTM"]), float(r["lat_UTM"])) for r in fields[0]]
    threshold: dict[int, float] = {}
    for i, given in enumerate(fields[2]):
        pga, pgd = float(given["PGA"]), float(given["PGD"])
        misfit = {t: abs(spreading_in(pga, 7.5, t, math.inf) - pgd) for t in (0.09, 0.12)}
        if pgd > 0:
            threshold[i] = min(misfit, key=misfit.__getitem__)
    rows: list[Row] = []
    for i, point in enumerate(points):
        distance = {j: great_circle_km(point, points[j]) for j in threshold}
        limit = threshold[min(distance, key=distance.__getitem__)]
        row: dict[str, object] = {**place(point)}
        for (name, magnitude, _), field in zip(FIELDS, fields, strict=True):
            pga = float(field[i]["PGA"])
            row[f"pga_g_{name}"] = round(pga, 5)
            row[f"pgv_cm_s_{name}"] = round(float(field[i]["PGV"]), 4)
            row[f"pgd_in_{name}"] = round(spreading_in(pga, magnitude, limit), 4)
        rows.append(row)
    write_csv(target / "ground_motion.csv", rows)
    write_csv(
        target / "ground_motion_fields.csv",
        [
            {"field": name, "source": name.split("_")[0], "magnitude": m, "weight": w}
            for name, m, w in FIELDS
        ],
    )


def spreading_in(
    pga_g: float, magnitude: float, threshold_g: float, range_end: float = 4.0
) -> float:
    """Hazus' lateral spreading (inches) where the soil liquefies, x bounded by `range_end`."""
    x = min(pga_g / threshold_g, range_end)
    if x < 1:
        inches = 0.0
    elif x < 2:
        inches = 12 * x - 12
    elif x < 3:
        inches = 18 * x - 24
    else:
        inches = 70 * x - 180
    m = magnitude
    return inches * (0.0086 * m**3 - 0.0914 * m**2 + 0.4698 * m - 0.9835)


def build_fragility(infrarisk: Path, region: Path, target: Path) -> None:
    tables = {
        level: read_csv(
            infrarisk / "fragility_curves" / f"hazus_fragility_and_recovery_{level}.csv"
        )
        for level in ("low", "high")
    }
    # the original's two tables of roads are Hazus' urban (HRD2) and major (HRD1) roads:
    # they tell sizes of road apart and not standards of design
    roads = {"road_urban": "low", "road_major": "high"}
    classes = {
        "P_L": "power_line",
        "P_TF": "substation",
        "P_EG": "external_grid",
        "W_WP": "pump",
        "W_T": "tank",
        "W_PMA": "main",
    }
    intensity = {"PGA": "pga_g", "PGD": "pgd_in", "RR": "repairs_per_km"}
    rows: list[Row] = []
    for level in tables:
        chosen = [(prefix, cls, level) for prefix, cls in classes.items()]
        chosen += [("T_L", cls, table) for cls, table in roads.items()]
        for prefix, cls, table in chosen:
            rows += [
                {
                    "fragility_class": cls,
                    "design_level": level,
                    "state": STATES.index(row["damage_state"]) + 1,
                    "intensity": intensity[row["imt"]],
                    "median": float(row["ds_median"]),
                    "beta": float(row["ds_beta"]),
                    "repair_days_mean": float(row["recov_mean"]),
                    "repair_days_sd": float(row["recov_sigma"]),
                }
                for row in tables[table]
                if row["compon_prefix"] == prefix
            ]
    write_csv(target / "fragility.csv", rows)
    write_csv(
        target / "building_fragility.csv", read_csv(region / "hazus_building_fragility_pga.csv")
    )
    write_csv(target / "casualty_rates.csv", read_csv(region / "hazus_casualty_rates.csv"))


# --- hospitals, ambulances, crews -----------------------------------------------------------


ROLES = {"acute": "acute", "acute_paediatric": "paediatric", "neighbour_acute": "neighbour"}
COLLIERVILLE = "0013038017"
BAPTIST_MEMPHIS = "0008738120"
BEDS_COLLIERVILLE = 81
"""Licensed; its staffed beds are counted in the cost report of Baptist Memphis."""
OPENED = {
    "0009538103": 1983,  # Regional One
    "0009138104": 1924,  # Methodist University
    "0009038103": 2010,  # Le Bonheur
    "0009338128": 1973,  # Methodist North
    "0009438116": 1973,  # Methodist South
    "0009238138": 1985,  # Methodist Germantown
    "0008738120": 1979,  # Baptist Memphis
    "0013038017": 1999,  # Baptist Collierville
    "0000000081": 1974,  # Saint Francis Memphis
    "0016638133": 2004,  # Saint Francis Bartlett
    "0016738019": 1999,  # Baptist Tipton
    "0000238671": 1988,  # Baptist DeSoto
    "0012638654": 2013,  # Methodist Olive Branch
}
"""Year in which most of the present building opened: 1974 (City Ink on Saint Francis) and 1979
(history of Baptist Memorial Hospital) are documented, the others are from memory, unverified."""


def build_hospitals(
    region: Path,
    supply: Mapping[tuple[str, str], str],
    value: Mapping[str, float],
    target: Path,
) -> None:
    rows: list[Row] = []
    nodes = {n["node"]: position(n) for n in read_csv(target / "road_nodes.csv")}
    for h in read_csv(region / "hospitals.csv"):
        if h["model_role"] not in ROLES:
            continue
        hid, role = h["hospital_id"], ROLES[h["model_role"]]
        licensed = int(h["beds_licensed"])
        moved = round(BEDS_COLLIERVILLE * value["baptist_staffed_share"])
        moved_icu = round(moved * value["icu_share"])
        if hid == COLLIERVILLE:
            staffed, icu = moved, moved_icu
        elif hid == BAPTIST_MEMPHIS:
            staffed, icu = int(h["beds_staffed"]) - moved, int(h["icu_beds"]) - moved_icu
        else:
            staffed = int(h["beds_staffed"] or round(licensed * value["staffed_share"]))
            icu = int(h["icu_beds"] or round(staffed * value["icu_share"]))
        inside = role != "neighbour"
        point = (float(h["lon"]), float(h["lat"]))
        rows.append(
            {
                "hospital": hid,
                "name": h["name"].title().replace("'S", "'s").replace("Desoto", "DeSoto"),
                **place(point),
                "role": role,
                "staffed_beds": staffed,
                "icu_beds": icu,
                "occupancy": float(h["occupancy_all"] or value["hospital_occupancy"]),
                "icu_occupancy": float(h["occupancy_icu"] or value["icu_occupancy"]),
                "trauma_level": h["trauma_level"].split(" ")[0],
                "load_point": supply[hid, "power_load_bus"] if inside else "",
                "junction": supply[hid, "water_demand_junction"] if inside else "",
                "road_node": supply.get((hid, "road_node")) or nearest(point, nodes),
                "load_mw": round(licensed * value["hospital_kw_per_bed"] / 1000, 3),
                "water_m3_per_h": round(licensed * value["hospital_water_m3_per_bed_day"] / 24, 3),
                "building_type": "C2M",
                # buildings of Memphis were designed for gravity only before the 1980s
                "design_level": "pre_code" if OPENED[hid] < 1980 else "low_code",
            }
        )
    write_csv(target / "hospitals.csv", rows)


def build_bases(
    zones: Sequence[Mapping[str, str]], value: Mapping[str, float], target: Path
) -> None:
    """Place ambulances by the p-median of people, crew depots by that of damageable things."""
    nodes = read_csv(target / "road_nodes.csv")
    order = {n["node"]: i for i, n in enumerate(nodes)}
    links = read_csv(target / "road_links.csv")
    minutes = dijkstra(
        coo_array(
            (
                [float(k["free_flow_min"]) for k in links],
                (
                    [order[k["from_node"]] for k in links],
                    [order[k["to_node"]] for k in links],
                ),
            ),
            shape=(len(nodes), len(nodes)),
        ).tocsr()
    )
    people = np.zeros(len(nodes))
    for node, count in people_by(zones, "road_node").items():
        people[order[node]] = count
    posts = p_median(people, minutes, int(value["ambulance_posts"]))
    total = int(value["ambulances"])
    served = assigned(people, minutes, posts)
    vehicles = apportion(served, total)
    write_csv(
        target / "ambulance_posts.csv",
        [
            {
                "post": f"A{k}",
                "road_node": nodes[i]["node"],
                "lon_deg": nodes[i]["lon_deg"],
                "lat_deg": nodes[i]["lat_deg"],
                "ambulances": n,
            }
            for k, (i, n) in enumerate(zip(posts, vehicles, strict=True), 1)
        ],
    )
    things = np.zeros(len(nodes))
    places = {n["node"]: position(n) for n in nodes}
    for name in ("power_components.csv", "water_components.csv", "roads.csv"):
        for row in read_csv(target / name):
            things[order[nearest(position(row), places)]] += 1
    depots = p_median(things, minutes, int(value["crew_depots"]))
    write_csv(
        target / "crew_depots.csv",
        [
            {
                "depot": f"D{k}",
                "road_node": nodes[i]["node"],
                "lon_deg": nodes[i]["lon_deg"],
                "lat_deg": nodes[i]["lat_deg"],
            }
            for k, i in enumerate(depots, 1)
        ],
    )


def p_median(weight: Array, distance: Array, p: int) -> list[int]:
    """Exact p-median: the p sites that minimise sum_j weight_j min_i distance_ij."""
    demand = np.flatnonzero(weight > 0)
    sites, n = len(weight), len(demand)
    serve = np.arange(sites * n).reshape(sites, n)
    cost = np.concatenate([np.zeros(sites), (distance[:, demand] * weight[demand]).ravel()])
    rows: list[NDArray[np.int64]] = []
    cols: list[NDArray[np.int64]] = []
    data: list[Array] = []
    # every demand is served once
    rows.append(np.tile(np.arange(n), sites))
    cols.append(sites + serve.ravel())
    data.append(np.ones(sites * n))
    # only from an open site
    rows += [n + serve.ravel(), n + serve.ravel()]
    cols += [sites + serve.ravel(), np.repeat(np.arange(sites), n)]
    data += [np.ones(sites * n), -np.ones(sites * n)]
    rows.append(np.full(sites, n + sites * n))
    cols.append(np.arange(sites))
    data.append(np.ones(sites))
    matrix = coo_array(
        (np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))),
        shape=(n + sites * n + 1, sites + sites * n),
    ).tocsr()
    low = np.concatenate([np.ones(n), np.full(sites * n, -np.inf), [p]])
    high = np.concatenate([np.ones(n), np.zeros(sites * n), [p]])
    whole = np.concatenate([np.ones(sites), np.zeros(sites * n)])
    answer = milp(
        cost,
        constraints=LinearConstraint(matrix, low, high),
        integrality=whole,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not answer.success:
        raise RuntimeError(f"the p-median was not solved: {answer.message}")
    return [int(i) for i in np.flatnonzero(answer.x[:sites] > 0.5)]


def assigned(weight: Array, distance: Array, sites: Sequence[int]) -> Array:
    """The weight whose nearest site each one is."""
    closest = np.argmin(distance[list(sites)], axis=0)
    return np.bincount(closest, weights=weight, minlength=len(sites)).astype(np.float64)


def apportion(weight: Array, total: int) -> list[int]:
    """Share whole things by weight, at least one each, by largest remainder."""
    spare = total - len(weight)
    exact = weight / weight.sum() * spare
    share = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - share), kind="stable")[: spare - share.sum()]:
        share[i] += 1
    return [1 + int(s) for s in share]


# --- provenance -----------------------------------------------------------------------------


USED = (
    "coupled-infrarisk/shelby/dependencies.csv",
    "coupled-infrarisk/shelby/fragility_curves/hazus_fragility_and_recovery_high.csv",
    "coupled-infrarisk/shelby/fragility_curves/hazus_fragility_and_recovery_low.csv",
    *(f"coupled-infrarisk/shelby/gmfs_2475yr/{name}_gms.csv" for name, _, _ in FIELDS),
    "coupled-infrarisk/shelby/power.json",
    "coupled-infrarisk/shelby/transpo_net.tntp",
    "coupled-infrarisk/shelby/transpo_node.tntp",
    "coupled-infrarisk/shelby/transpo_trips.tntp",
    "coupled-infrarisk/shelby/water.inp",
    "region-shelby/hazus_building_fragility_pga.csv",
    "region-shelby/hazus_casualty_rates.csv",
    "region-shelby/hospitals.csv",
    "region-shelby/supply.csv",
    "region-shelby/zones.csv",
    *LICENCES,
)


def write_provenance(originals: Path, target: Path) -> None:
    """Write the SHA-256 of every original that is read and of every file beside this one."""
    outputs = sorted(
        path.name
        for path in target.iterdir()
        if path.suffix in {".csv", ".inp", ".json", ".txt"} and path.name != "provenance.json"
    )
    hashes = {
        "originals": {name: sha256(originals / name) for name in USED},
        "files": {name: sha256(target / name) for name in outputs},
    }
    (target / "provenance.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def write_assumptions_table(target: Path) -> None:
    """Renew the table of assumptions in README.md between its two marks."""
    readme = target / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(TABLE_MARKS[0])
    _, _, tail = rest.partition(TABLE_MARKS[1])
    lines = ["| name | value | range | source | reason |", "|---|---|---|---|---|"]
    for row in read_csv(target / "assumptions.csv"):
        unit = "" if row["unit"] == "1" else f" {row['unit']}"
        lines.append(
            f"| `{row['name']}` | {row['value']}{unit} | {row['low']} to {row['high']} "
            f"| {row['source']} | {row['reason']} |"
        )
    table = "\n".join(lines)
    readme.write_text(f"{head}{TABLE_MARKS[0]}\n{table}\n{TABLE_MARKS[1]}{tail}", encoding="utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("originals", type=Path, help="folder of the original data sets")
    build(parser.parse_args().originals, HERE)
