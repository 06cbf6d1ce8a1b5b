"""Shows that the data of the Shelby region are whole and free of the originals' known faults."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandapower as pp
import pytest
import wntr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from federation.errors import Reason, ScenarioError
from twins.regions import (
    REGIONS,
    assumptions,
    data_hash,
    hospital_routes,
    region_file,
    region_rows,
    scene_routes,
)
from twins.regions.shelby.build import (
    apportion,
    degrees,
    great_circle_km,
    p_median,
    position,
    spreading_in,
)

SHELBY = REGIONS / "shelby"

WaterDay = tuple[Any, Any]
"""A WNTR network and the results of its run."""


def rows(name: str) -> tuple[dict[str, str], ...]:
    return region_rows("shelby", name)


def column(name: str, key: str) -> list[str]:
    return [row[key] for row in rows(name)]


def total(name: str, key: str) -> float:
    return math.fsum(float(row[key]) for row in rows(name))


# --- where things are -----------------------------------------------------------------------


def test_web_mercator_metres_become_the_degrees_of_memphis() -> None:
    lon, lat = degrees(-10051482.101687843, 4167279.0634099655)  # first ground-motion point
    assert (round(lon, 6), round(lat, 6)) == (-90.294, 35.025)


@pytest.mark.parametrize(
    "name",
    [
        "power_components.csv",
        "load_points.csv",
        "pumps.csv",
        "water_components.csv",
        "junctions.csv",
        "road_nodes.csv",
        "roads.csv",
        "ground_motion.csv",
        "hospitals.csv",
        "zones.csv",
        "ambulance_posts.csv",
        "crew_depots.csv",
    ],
)
def test_everything_lies_in_the_county_or_next_to_it(name: str) -> None:
    neighbours = {r["hospital"] for r in rows("hospitals.csv") if r["role"] == "neighbour"}
    for row in rows(name):
        lon, lat = position(row)
        margin = 0.2 if row.get("hospital") in neighbours else 0.01
        assert -90.31 - margin < lon < -89.63 + margin, row
        assert 34.99 - margin < lat < 35.41 + margin, row


# --- roads ----------------------------------------------------------------------------------


def road_length_over_great_circle() -> NDArray[np.float64]:
    node = {row["node"]: position(row) for row in rows("road_nodes.csv")}
    return np.array(
        [
            float(row["length_km"]) / great_circle_km(node[row["from_node"]], node[row["to_node"]])
            for row in rows("road_links.csv")
        ]
    )


def test_roads_are_as_long_as_the_ground_and_no_longer_as_long_as_the_map() -> None:
    ratio = road_length_over_great_circle()
    assert ratio.min() > 0.99
    assert np.median(ratio) == pytest.approx(1.0, abs=0.01)  # 1.2252 in the original
    assert np.quantile(ratio, 0.95) < 1.15
    assert ratio.max() < 1.5  # 3.62 in the original: T_L285


def test_a_road_is_driven_at_40_60_or_65_miles_an_hour() -> None:
    links = rows("road_links.csv")
    for row in links:
        hours = float(row["free_flow_min"]) / 60
        assert float(row["length_km"]) / hours == pytest.approx(float(row["speed_kmh"]), rel=2e-3)
    speeds = Counter(round(float(row["speed_kmh"]) / 1.609344) for row in links)
    assert speeds == {40: 332, 60: 94, 65: 162}


def test_the_doubled_road_is_there_once() -> None:
    assert len(set(column("road_links.csv", "link"))) == len(rows("road_links.csv")) == 588
    between = [
        row
        for row in rows("road_links.csv")
        if {row["from_node"], row["to_node"]} == {"T_J101", "T_J106"}
    ]
    assert [row["link"] for row in between] == ["T_L285", "T_L581"]
    assert {row["road"] for row in between} == {"T_L285"}
    assert {float(row["length_km"]) for row in between} == {1.9297}


def test_every_road_has_two_ways_of_one_length() -> None:
    ways = Counter(column("road_links.csv", "road"))
    assert set(ways) == set(column("roads.csv", "road"))
    assert set(ways.values()) == {2}
    length = {row["road"]: row["length_km"] for row in rows("roads.csv")}
    for row in rows("road_links.csv"):
        assert row["length_km"] == length[row["road"]]


def test_all_trips_of_the_original_are_there() -> None:
    assert total("trips.csv", "trips_per_day") == 652_945
    nodes = set(column("road_nodes.csv", "node"))
    assert {row["origin"] for row in rows("trips.csv")} <= nodes
    assert {row["destination"] for row in rows("trips.csv")} <= nodes


def test_the_day_of_traffic_peaks_in_the_late_afternoon() -> None:
    share = [float(v) for v in column("demand_profile.csv", "share")]
    assert math.fsum(share) == pytest.approx(1.0, abs=1e-9)
    assert int(np.argmax(share)) == 17
    assert share[17] == pytest.approx(4377 / 50683, abs=1e-5)  # FHWA table NT-3


# --- power ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def solved_net() -> pp.pandapowerNet:
    net = pp.from_json(str(region_file("shelby", "power.json")))
    pp.runpp(net)
    return net


def test_the_load_is_the_record_peak_in_megawatts() -> None:
    net = solved_net()
    assert net.f_hz == 60
    assert net.load["p_mw"].sum() == pytest.approx(3395.8, rel=1e-3)
    assert total("load_points.csv", "base_mw") == pytest.approx(net.load["p_mw"].sum())
    assert net.load["q_mvar"].sum() == pytest.approx(0.2 * net.load["p_mw"].sum())


def test_voltages_are_those_of_the_original() -> None:
    """The original, solved as it came: lowest 0.917376, mean 0.955407 per unit."""
    net = pp.from_json(str(region_file("shelby", "power.json")))
    net.motor["pn_mech_mw"] = 0.23 * assumptions("shelby")["load_scale"].default
    pp.runpp(net)
    assert net.res_bus["vm_pu"].min() == pytest.approx(0.917376, abs=1e-6)
    assert net.res_bus["vm_pu"].mean() == pytest.approx(0.955407, abs=1e-6)
    supply = net.res_ext_grid["p_mw"] / assumptions("shelby")["load_scale"].default
    assert supply.to_numpy() == pytest.approx(
        [71.4695, 238.0818, 180.8258, 115.4077, 137.5500, 173.6617, 37.0934, 65.3549], abs=1e-3
    )
    assert solved_net().res_bus["vm_pu"].min() > 0.917


def test_nothing_is_overloaded_in_the_base_case() -> None:
    net = solved_net()
    assert net.res_line["loading_percent"].max() < 100 / 1.1 + 0.1  # 1 634 in the original
    assert net.res_trafo["loading_percent"].max() < 100
    infeeds = net.trafo["vn_hv_kv"] > 100
    assert infeeds.sum() == 8
    assert net.res_trafo.loc[infeeds, "loading_percent"].max() < 100 / 1.1 + 0.1


@pytest.mark.parametrize("infeed", [f"P_TF{k}EG" for k in range(1, 9)])
def test_the_network_stands_the_loss_of_any_infeed(infeed: str) -> None:
    net = pp.from_json(str(region_file("shelby", "power.json")))
    net.trafo.loc[net.trafo["name"] == infeed, "in_service"] = False
    pp.runpp(net, init="dc")
    assert net.res_line["loading_percent"].max() < 100
    assert net.res_trafo["loading_percent"].max() < 100


def test_line_lengths_are_ground_lengths() -> None:
    net = solved_net()
    where = {i: json.loads(geo)["coordinates"] for i, geo in net.bus["geo"].items()}
    ratio = [
        length / great_circle_km(where[a], where[b])
        for length, a, b in zip(
            net.line["length_km"], net.line["from_bus"], net.line["to_bus"], strict=True
        )
    ]
    assert np.median(ratio) == pytest.approx(1.018, abs=0.01)


def test_every_component_is_an_element_of_the_net() -> None:
    net = solved_net()
    for row in rows("power_components.csv"):
        assert row["element_name"] in set(net[row["element_table"]]["name"])
    assert Counter(column("power_components.csv", "component_class")) == {
        "line": 73,
        "transformer": 45,
        "infeed": 8,
    }


# --- water ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> WaterDay:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = wntr.network.WaterNetworkModel(str(region_file("shelby", "water.inp")))
        network.options.time.duration = 48 * 3600
        scratch = tmp_path_factory.mktemp("epanet") / "day"
        result = wntr.sim.EpanetSimulator(network).run_sim(file_prefix=str(scratch))
    return network, result


def test_the_county_uses_a_plausible_amount_of_water() -> None:
    daily_m3 = 24 * total("junctions.csv", "base_demand_m3_per_h")
    assert daily_m3 == pytest.approx(3.645373 * 86400, rel=1e-4)
    litres = 1000 * daily_m3 / total("zones.csv", "population")
    assert 250 < litres < 450  # 3.9 in the units that the original claims


def test_epanet_delivers_all_water_with_every_pump_on(
    day: WaterDay,
) -> None:
    network, result = day
    users = [j for j, node in network.junctions() if node.base_demand > 0]
    assert len(users) == 34
    pressure_m = result.node["pressure"][users]
    assert pressure_m.min().min() > 14  # 20 psi
    assert pressure_m.max().max() < 70
    assert result.node["pressure"][network.junction_name_list].min().min() > 0
    asked = sum(network.get_node(j).base_demand for j in users)
    got = result.node["demand"][users].loc[: 47 * 3600].sum(axis=1)
    assert got.mean() == pytest.approx(asked, rel=0.01)
    assert (got.min() / asked, got.max() / asked) == pytest.approx((0.571, 1.571), abs=0.002)


def test_scaling_kept_the_heads_of_the_original(day: WaterDay, tmp_path: Path) -> None:
    """Pressures of the original at its own units in the first hour: 24.0 to 36.77 m."""
    network, _ = day
    assert {round(pipe.diameter / 0.3, 2) for _, pipe in network.pipes()} == {5.45}
    flat = wntr.network.WaterNetworkModel(str(region_file("shelby", "water.inp")))
    flat.get_pattern("DIURNAL").multipliers = [1.0]
    flat.options.time.duration = 0
    result = wntr.sim.EpanetSimulator(flat).run_sim(file_prefix=str(tmp_path / "hour"))
    users = [j for j, node in flat.junctions() if node.base_demand > 0]
    pressure_m = result.node["pressure"][users].loc[0]
    assert pressure_m.min() == pytest.approx(24.0, abs=0.1)
    # the seven mains that got their true length let the rest keep a little more
    assert pressure_m.max() == pytest.approx(36.77, abs=0.5)


def test_mains_are_as_long_as_the_ground() -> None:
    network = wntr.network.WaterNetworkModel(str(region_file("shelby", "water.inp")))
    ratio = [
        pipe.length / 1000 / great_circle_km(pipe.start_node.coordinates, pipe.end_node.coordinates)
        for name, pipe in network.pipes()
        if pipe.length > 1000
    ]
    assert len(ratio) == 71
    assert np.median(ratio) == pytest.approx(1.0, abs=0.01)
    assert min(ratio) > 0.85  # 0.09 in the original: default lengths of 1 000 m


def test_motors_have_the_power_that_pumps_need(
    day: WaterDay,
) -> None:
    network, result = day
    rated = {row["pump"]: float(row["rated_mw"]) for row in rows("pumps.csv")}
    efficiency = assumptions("shelby")["pump_efficiency"].default
    for name, pump in network.pumps():
        flow = result.link["flowrate"][name]
        head = result.node["head"]
        lift = head[pump.end_node_name] - head[pump.start_node_name]
        needed_mw = 9.80665e-3 * flow * lift / efficiency
        assert needed_mw.max() <= rated[name]
        assert needed_mw.max() > 0.5 * rated[name]
    net = solved_net()
    assert dict(zip(net.motor["name"], net.motor["pn_mech_mw"], strict=True)) == {
        row["motor"]: float(row["rated_mw"]) for row in rows("pumps.csv")
    }


# --- ground motion and damage ---------------------------------------------------------------


def test_fields_have_weights_that_sum_to_one() -> None:
    assert total("ground_motion_fields.csv", "weight") == pytest.approx(1.0)
    for field in column("ground_motion_fields.csv", "field"):
        pga = [float(row[f"pga_g_{field}"]) for row in rows("ground_motion.csv")]
        assert 0.149 < min(pga) < max(pga) < 1.09


def test_deformation_is_lateral_spreading_in_inches_and_never_beyond_its_curve() -> None:
    # a point of field 203080, M 7.7, whose original deformation the formula meets exactly
    assert spreading_in(0.2653630391275, 7.7, 0.09) == pytest.approx(33.1729411911693)
    for row in rows("ground_motion_fields.csv"):
        magnitude = float(row["magnitude"])
        pgd = [float(r[f"pgd_in_{row['field']}"]) for r in rows("ground_motion.csv")]
        assert min(pgd) > 0  # exactly 0 at 25 points in the originals
        assert max(pgd) <= spreading_in(9.0, magnitude, 0.09) + 1e-4  # up to 750 in the originals


@given(
    pga=st.floats(0.0, 3.0),
    more=st.floats(0.0, 1.0),
    threshold=st.sampled_from([0.09, 0.12]),
    magnitude=st.floats(5.0, 8.0),
)
def test_stronger_shaking_never_spreads_less(
    pga: float, more: float, threshold: float, magnitude: float
) -> None:
    before = spreading_in(pga, magnitude, threshold)
    assert 0 <= before <= spreading_in(pga + more, magnitude, threshold) + 1e-9


def test_worse_damage_takes_stronger_shaking_and_longer_repair() -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows("fragility.csv"):
        curves.setdefault((row["fragility_class"], row["design_level"]), []).append(
            (float(row["median"]), float(row["repair_days_mean"]))
        )
    for steps in curves.values():
        assert steps == sorted(steps)
    used = set(column("power_components.csv", "fragility_class"))
    used |= set(column("water_components.csv", "fragility_class"))
    used |= set(column("roads.csv", "fragility_class"))
    assert {cls for cls, _ in curves} == used


def test_every_building_has_a_curve_and_casualty_rates() -> None:
    assert total("building_mix.csv", "share") == pytest.approx(1.0)
    known = {(r["building_type"], r["design_level"]) for r in rows("building_fragility.csv")}
    rated = {row["building_type"] for row in rows("casualty_rates.csv")}
    for row in (*rows("building_mix.csv"), *rows("hospitals.csv")):
        assert (row["building_type"], row["design_level"]) in known
        assert row["building_type"] in rated


# --- people and those who care for them -----------------------------------------------------


def test_everybody_is_counted_once_on_every_network() -> None:
    people = total("zones.csv", "population")
    assert people == 936_990
    assert total("load_points.csv", "people") == people
    assert total("junctions.csv", "people") == people
    assert Counter(column("zones.csv", "population"))["0"] == 2


def test_no_hospital_bed_is_counted_twice() -> None:
    beds = {row["hospital"]: int(row["staffed_beds"]) for row in rows("hospitals.csv")}
    assert beds["0008738120"] + beds["0013038017"] == 770  # one provider, two campuses
    roles = Counter(column("hospitals.csv", "role"))
    assert roles == {"acute": 9, "paediatric": 1, "neighbour": 3}
    inside = [row for row in rows("hospitals.csv") if row["role"] != "neighbour"]
    assert sum(int(row["staffed_beds"]) for row in inside) == 2867 + 181
    assert sum(int(row["icu_beds"]) for row in inside) == 300 + 19
    for row in rows("hospitals.csv"):
        assert int(row["icu_beds"]) <= int(row["staffed_beds"])
        assert 0 < float(row["occupancy"]) < 1


def test_every_reference_leads_somewhere() -> None:
    known = {
        "load_point": set(column("load_points.csv", "load_point")),
        "junction": set(column("junctions.csv", "junction")),
        "road_node": set(column("road_nodes.csv", "node")),
        "from_node": set(column("road_nodes.csv", "node")),
        "to_node": set(column("road_nodes.csv", "node")),
        "bus_name": set(solved_net().bus["name"]),
        "pump": {
            row["component_id"]
            for row in rows("water_components.csv")
            if row["component_class"] == "pump"
        },
    }
    outside = {"load_point": "", "junction": ""}
    for name in (
        "zones.csv",
        "hospitals.csv",
        "ambulance_posts.csv",
        "crew_depots.csv",
        "load_points.csv",
        "pumps.csv",
        "road_links.csv",
        "signals.csv",
    ):
        for row in rows(name):
            for key in row.keys() & known.keys():
                if row.get("role") == "neighbour" and key in outside:
                    assert row[key] == outside[key]
                else:
                    assert row[key] in known[key], (name, row)


def test_zones_and_hospitals_draw_on_junctions_that_deliver() -> None:
    demand = {r["junction"]: float(r["base_demand_m3_per_h"]) for r in rows("junctions.csv")}
    used = {*column("zones.csv", "junction"), *column("hospitals.csv", "junction")} - {""}
    assert all(demand[junction] > 0 for junction in used)


def test_fifty_five_ambulances_stand_at_forty_posts() -> None:
    assert total("ambulance_posts.csv", "ambulances") == 55
    assert len(set(column("ambulance_posts.csv", "road_node"))) == 40
    assert min(int(n) for n in column("ambulance_posts.csv", "ambulances")) == 1


def test_two_sites_on_a_line_stand_where_the_people_are() -> None:
    """Places at 0, 1, 2, 10 and 11 km: with most people at 1 and 11, those two are best."""
    at = np.array([0.0, 1.0, 2.0, 10.0, 11.0])
    people = np.array([1.0, 5.0, 1.0, 2.0, 5.0])
    assert p_median(people, abs(at[:, None] - at[None, :]), 2) == [1, 4]


@given(
    weight=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=20),
    spare=st.integers(0, 100),
)
def test_vehicles_are_shared_out_whole(weight: list[float], spare: int) -> None:
    shares = apportion(np.array(weight), len(weight) + spare)
    assert sum(shares) == len(weight) + spare
    assert min(shares) >= 1


# --- how twins reach the data ---------------------------------------------------------------


def test_routes_start_at_bases_and_end_at_zones_and_hospitals() -> None:
    zones = dict.fromkeys(column("zones.csv", "road_node"))
    hospitals = dict.fromkeys(column("hospitals.csv", "road_node"))
    bases = dict.fromkeys([*column("ambulance_posts.csv", "road_node"), *hospitals])
    assert len(scene_routes("shelby")) == len(set(scene_routes("shelby")))
    assert len(scene_routes("shelby")) == len(bases) * len(zones)
    assert scene_routes("shelby")[0] == (next(iter(bases)), next(iter(zones)))
    assert len(hospital_routes("shelby")) == len({**zones, **hospitals}) * len(hospitals)
    assert hospital_routes("shelby")[1] == (next(iter(zones)), list(hospitals)[1])


def test_an_assumption_lies_in_its_own_range_and_names_its_source() -> None:
    declared = assumptions("shelby")
    assert len(declared) == len(rows("assumptions.csv"))
    for parameter in declared.values():
        assert parameter.low <= parameter.default <= parameter.high, parameter
        assert parameter.source, parameter
        assert parameter.doc, parameter


def test_an_unknown_file_is_the_callers_mistake() -> None:
    with pytest.raises(ScenarioError) as caught:
        region_file("shelby", "bridges.csv")
    assert caught.value.reason is Reason.MISSING_FILE
    with pytest.raises(ScenarioError):
        region_rows("atlantis", "zones.csv")


def test_the_hash_of_the_data_is_stable_and_hexadecimal() -> None:
    assert data_hash("shelby") == data_hash("shelby")
    assert len(bytes.fromhex(data_hash("shelby"))) == 32


def test_files_are_those_whose_hashes_were_recorded() -> None:
    recorded = json.loads((SHELBY / "provenance.json").read_text(encoding="utf-8"))["files"]
    present = {p.name for p in SHELBY.iterdir() if p.suffix in {".csv", ".inp", ".json", ".txt"}}
    assert set(recorded) == present - {"provenance.json"}
    for name, digest in recorded.items():
        assert hashlib.sha256((SHELBY / name).read_bytes()).hexdigest() == digest, name


def test_the_readme_shows_every_declared_value() -> None:
    text = (SHELBY / "README.md").read_text(encoding="utf-8")
    with (SHELBY / "assumptions.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            assert f"| `{row['name']}` | {row['value']}" in text
