"""Shows that the data of the Mojave region are whole, are RTS-GMLC's, and carry two scenarios."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter

import numpy as np
import pandapower as pp
import pytest

from federation.peer.policy import read_policy
from federation.planners import planner
from federation.scenario.run import Outcome, run_local
from federation.scenario.spec import load
from federation.scenario.study import cases
from twins.energy.network import power_net
from twins.regions import REGIONS, assumptions, region_file, region_rows
from twins.regions.mojave.build import distance_km, shaking, whole

MOJAVE = REGIONS / "mojave"


def rows(name: str) -> tuple[dict[str, str], ...]:
    return region_rows("mojave", name)


def total(name: str, key: str) -> float:
    return math.fsum(float(row[key]) for row in rows(name))


# --- the data -------------------------------------------------------------------------------


def test_files_are_those_whose_hashes_were_recorded() -> None:
    recorded = json.loads((MOJAVE / "provenance.json").read_text(encoding="utf-8"))["files"]
    present = {p.name for p in MOJAVE.iterdir() if p.suffix in {".csv", ".inp", ".json", ".txt"}}
    assert set(recorded) == present - {"provenance.json"}
    for name, digest in recorded.items():
        assert hashlib.sha256((MOJAVE / name).read_bytes()).hexdigest() == digest, name


def test_the_readme_shows_every_declared_value_and_each_has_a_source() -> None:
    text = (MOJAVE / "README.md").read_text(encoding="utf-8")
    with (MOJAVE / "assumptions.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            assert f"| `{row['name']}` | {row['value']}" in text
    for parameter in assumptions("mojave").values():
        assert parameter.low <= parameter.default <= parameter.high, parameter
        assert parameter.source, parameter


def test_everybody_is_counted_once_on_every_network() -> None:
    people = total("zones.csv", "population")
    assert people == 786_600
    assert total("load_points.csv", "people") == people
    assert total("junctions.csv", "people") == people


def test_loads_lines_and_ties_are_the_published_ones() -> None:
    """RTS-GMLC: 2 850 MW of load in each area; 175 and 500 MVA of line; three lines leave it."""
    net = pp.from_json(str(region_file("mojave", "power.json")))
    assert net.load.p_mw.sum() == pytest.approx(2850.0)
    assert net.load.q_mvar.sum() == pytest.approx(580.0)
    kv = net.bus.vn_kv.loc[net.line.from_bus].to_numpy()
    mva = np.sqrt(3) * kv * net.line.max_i_ka.to_numpy()
    assert Counter(np.rint(mva).astype(int).tolist()) == {500: 21, 175: 12, 722: 1}
    assert net.ext_grid.max_p_mw.sum() == pytest.approx(2875.0)
    assert {row["tie_line"]: float(row["rating_mw"]) for row in rows("tie_lines.csv")} == {
        "CA-1": 500.0,
        "CB-1": 500.0,
        "DC1": 100.0,
    }


def test_every_line_has_the_impedance_of_the_original() -> None:
    """C1: 0.003 + 0.014j, B 0.461 pu at 138 kV; C30: 0.014 + 0.105j, B 0.221 pu at 230 kV."""
    line = pp.from_json(str(region_file("mojave", "power.json"))).line.set_index("name")
    for name, kv, r, x, b in (("C1", 138, 0.003, 0.014, 0.461), ("C30", 230, 0.014, 0.105, 0.221)):
        ohm = kv**2 / 100
        km = line.length_km[name]
        assert line.r_ohm_per_km[name] * km / ohm == pytest.approx(r)
        assert line.x_ohm_per_km[name] * km / ohm == pytest.approx(x)
        siemens = line.c_nf_per_km[name] * km * 1e-9 * 2 * np.pi * 60
        assert siemens * ohm == pytest.approx(b)


def test_every_component_is_an_element_of_the_net() -> None:
    net = power_net("mojave")
    assert ((net.component_branch >= 0) ^ (net.component_infeed >= 0)).all()
    assert Counter(row["component_class"] for row in rows("power_components.csv")) == {
        "line": 34,
        "transformer": 35,
        "infeed": 13,
    }


def test_every_town_can_be_reached_and_every_road_has_two_ways() -> None:
    assert set(Counter(row["road"] for row in rows("road_links.csv")).values()) == {2}
    nodes = {row["node"] for row in rows("road_nodes.csv")}
    around: dict[str, list[str]] = {}
    for row in rows("road_links.csv"):
        around.setdefault(row["from_node"], []).append(row["to_node"])
    seen: set[str] = set()
    ahead = [next(iter(nodes))]
    while ahead:
        here = ahead.pop()
        if here not in seen:
            seen.add(here)
            ahead += around[here]
    assert seen == nodes


def test_shaking_follows_the_published_equation() -> None:
    """Boore and Atkinson's own figure 10: at M 7 and 10 km on 760 m/s some 0.2 g; it falls with
    distance, grows with magnitude, and soft ground adds more to weak shaking than to strong."""
    km = np.array([1.0, 10.0, 50.0, 100.0])
    pga, pgv = shaking(7.0, km, "strike_slip", 760.0)
    assert 0.18 < pga[1] < 0.28
    assert (np.diff(pga) < 0).all()
    assert (np.diff(pgv) < 0).all()
    assert (shaking(7.8, km, "strike_slip", 760.0)[0] > pga).all()
    soft = shaking(7.0, km, "strike_slip", 300.0)[0] / pga
    assert (np.diff(soft) > 0).all()
    assert soft[-1] > 1.2


def test_a_place_is_as_far_from_a_fault_as_from_its_nearest_point() -> None:
    trace = [(-118.0, 35.0), (-117.0, 35.0)]
    assert distance_km((-117.5, 35.5), trace) == pytest.approx(0.5 * 111.195)
    assert distance_km((-117.3, 35.0), trace) == pytest.approx(0.0)
    beyond = distance_km((-119.0, 35.0), trace)
    assert beyond == pytest.approx(111.195 * math.cos(math.radians(35.0)))


def test_whole_people_are_shared_by_weight() -> None:
    assert whole([1.0, 1.0, 2.0], 10) == [3, 2, 5]
    assert sum(whole([0.3, 0.3, 0.4], 1001)) == 1001


# --- the scenarios --------------------------------------------------------------------------


def outcome(name: str, measure: str, seed: int) -> Outcome:
    scenario = load(MOJAVE / name)
    (case,) = cases(scenario, [measure], 1, seed)
    return run_local(scenario, case, planner)


def last(found: Outcome, name: str) -> float:
    return found.series[name][-1][1]


def test_on_ordinary_days_everybody_has_power_and_water() -> None:
    plain = outcome("plain.yaml", "none", 1)
    assert plain.kpis["unserved_energy_mwh"] == 0.0
    assert plain.kpis["unserved_water_m3"] == pytest.approx(0.0, abs=1e-6)
    assert 5.0 < plain.kpis["ambulance_response_min"] < 12.0
    # some 344 calls a day of which 0.6 % are arrests
    assert plain.kpis["deaths"] < 40


def test_an_earthquake_takes_power_from_the_towns_and_lives() -> None:
    hit = outcome("earthquake.yaml", "none", 2)
    assert {e.event.kind for e in hit.events} >= {"mainshock", "component_out", "load_point_dark"}
    assert 1e4 < hit.kpis["unserved_energy_mwh"] < 72 * 2850
    assert hit.kpis["deaths"] > 20
    left = sum(last(hit, f"medical.patients_{k}") for k in ("in_system", "discharged", "dead"))
    assert last(hit, "medical.patients_arisen") == left


def test_the_export_policy_is_in_order() -> None:
    policy = read_policy((MOJAVE / "export.yaml").read_text(encoding="utf-8"), "export.yaml")
    assert {rule.name for rule in policy.rules} >= {"tie-lines", "live-picture"}
