"""Reads a power net once and lays it out as the arrays that the engines work on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandapower as pp
from numpy.typing import NDArray

from federation.errors import Reason, ScenarioError
from federation.twin import Vector
from twins.regions import optional_rows, region_file, region_rows

Index = NDArray[np.int64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True, slots=True)
class Grid:
    """A three-phase net per unit of `base_mva`, as pandapower converts it.

    A node is what is left of buses joined by closed switches. A branch carries
    I_f = y_ff V_f + y_ft V_t and I_t = y_tf V_f + y_tt V_t. An infeed holds its node at
    a fixed complex voltage; one of finite `infeed_most_mw` is a plant that can give no more, and
    plants share the load among them. `injection` and `voltage` are the solved state of the net
    as given; `rating_pu` bounds the current at both ends (infinite: no rating).
    """

    base_mva: float
    from_node: Index
    to_node: Index
    y_ff: Complex
    y_ft: Complex
    y_tf: Complex
    y_tt: Complex
    y_shunt: Complex
    rating_pu: Vector
    infeed_node: Index
    infeed_most_mw: Vector
    generator_node: Index
    injection: Complex
    voltage: Complex

    @property
    def nodes(self) -> int:
        return self.voltage.size

    @property
    def branches(self) -> int:
        return self.from_node.size

    def branch_flow_mva(self, voltage: Complex) -> tuple[Complex, Complex]:
        """Complex power that enters every branch at its two ends."""
        v_f, v_t = voltage[self.from_node], voltage[self.to_node]
        at_from = v_f * np.conj(self.y_ff * v_f + self.y_ft * v_t) * self.base_mva
        at_to = v_t * np.conj(self.y_tf * v_f + self.y_tt * v_t) * self.base_mva
        return at_from, at_to


def grid_of(net: Any) -> Grid:
    """Solve a pandapower net and take over its own per-unit conversion.

    The matrices are pandapower's, so no second conversion can disagree with it. Lines
    and two-winding transformers only; every element has to be in service.
    """
    pp.runpp(net, tolerance_mva=1e-8)
    inner = net._ppc["internal"]
    lookup = net._pd2ppc_lookups
    y_from, y_to = inner["Yf"].tocsr(), inner["Yt"].tocsr()
    ends = inner["branch"][:, :2].real.astype(np.int64)
    rows = np.arange(len(ends))
    base_mva = float(inner["baseMVA"])
    rating = np.full(len(ends), np.inf)
    if len(net.line):
        first, last = lookup["branch"]["line"]
        kv = net.bus.vn_kv.loc[net.line.from_bus].to_numpy()
        amperage = (net.line.max_i_ka * net.line.df * net.line.parallel).to_numpy()
        rating[first:last] = np.sqrt(3.0) * kv * amperage / base_mva
    if len(net.trafo):
        first, last = lookup["branch"]["trafo"]
        # the winding whose nominal voltage is lower than its bus's carries the higher current
        high = net.bus.vn_kv.loc[net.trafo.hv_bus].to_numpy() / net.trafo.vn_hv_kv.to_numpy()
        low = net.bus.vn_kv.loc[net.trafo.lv_bus].to_numpy() / net.trafo.vn_lv_kv.to_numpy()
        mva = (net.trafo.sn_mva * net.trafo.df * net.trafo.parallel).to_numpy()
        rating[first:last] = mva * np.minimum(high, low) / base_mva

    most_mw = np.full(len(net.ext_grid), np.inf)
    if "max_p_mw" in net.ext_grid:
        most_mw = net.ext_grid.max_p_mw.to_numpy(np.float64)
    infeed_node = lookup["bus"][net.ext_grid.bus.to_numpy()].astype(np.int64)
    injection = np.array(inner["Sbus"], dtype=np.complex128) * base_mva
    # pandapower books the base case's infeed there too; without its infeed a node has only its load
    injection[infeed_node] = -(inner["bus"][:, 2] + 1j * inner["bus"][:, 3])[infeed_node]

    def entry(matrix: Any, end: int) -> Complex:
        return np.asarray(matrix[rows, ends[:, end]], dtype=np.complex128).ravel()

    return Grid(
        base_mva=base_mva,
        from_node=ends[:, 0],
        to_node=ends[:, 1],
        y_ff=entry(y_from, 0),
        y_ft=entry(y_from, 1),
        y_tf=entry(y_to, 0),
        y_tt=entry(y_to, 1),
        y_shunt=(inner["bus"][:, 4] + 1j * inner["bus"][:, 5]).astype(np.complex128) / base_mva,
        rating_pu=np.where(np.isfinite(rating) & (rating > 0), rating, np.inf),
        infeed_node=infeed_node,
        infeed_most_mw=np.where(np.isfinite(most_mw), most_mw, np.inf),
        generator_node=np.asarray(inner["pv"], dtype=np.int64),
        injection=injection,
        voltage=np.asarray(inner["V"], dtype=np.complex128),
    )


@dataclass(frozen=True, slots=True)
class PowerNet:
    """The grid of a region with what hangs on it, in the order of the region's files.

    `component_branch` and `component_infeed` place every component (-1: it is the
    other). `hospital_load_point` is -1 for a hospital that another grid feeds. Reactive
    demand follows active demand in the ratio `..._q_per_p` of the stored net. A tie line
    leads from its node to a neighbour.
    """

    net: Any
    grid: Grid
    components: tuple[str, ...]
    component_branch: Index
    component_infeed: Index
    branch_names: tuple[str, ...]
    load_points: tuple[str, ...]
    load_node: Index
    load_base_mw: Vector
    load_q_per_p: Vector
    people: Vector
    pumps: tuple[str, ...]
    pump_node: Index
    pump_rated_mw: Vector
    pump_q_per_p: Vector
    hospitals: tuple[str, ...]
    hospital_load_point: Index
    hospital_base_mw: Vector
    tie_lines: tuple[str, ...]
    tie_node: Index
    tie_rating_mw: Vector
    line_ends: tuple[tuple[str, float, float], ...]
    """Name, longitude and latitude (degrees) of every bus at which a line ends: for maps."""


@lru_cache(maxsize=4)
def power_net(region: str) -> PowerNet:
    """Read the power files of a region; what one names and another lacks is an error."""
    net = pp.from_json(str(region_file(region, "power.json")))
    grid = grid_of(net)
    lookup = net._pd2ppc_lookups
    node_of_bus = {
        name: int(lookup["bus"][bus]) for bus, name in zip(net.bus.index, net.bus.name, strict=True)
    }
    names = [""] * grid.branches
    for table in ("line", "trafo"):
        if len(net[table]):
            names[slice(*lookup["branch"][table])] = [str(n) for n in net[table].name]
    branch_of = {name: index for index, name in enumerate(names)}
    infeed_of = {str(name): index for index, name in enumerate(net.ext_grid.name)}

    def node(bus_name: str, whose: str) -> int:
        if bus_name not in node_of_bus:
            raise ScenarioError(
                Reason.UNKNOWN_ENTITY,
                f"{whose} of region {region!r} is at bus {bus_name!r}, which power.json lacks",
                {"region": region, "entity": whose},
            )
        return node_of_bus[bus_name]

    components = region_rows(region, "power_components.csv")
    for row in components:
        if row["element_name"] not in branch_of and row["element_name"] not in infeed_of:
            raise ScenarioError(
                Reason.UNKNOWN_ENTITY,
                f"region {region!r}: power component {row['component_id']!r} is not in power.json",
                {"region": region, "entity": row["component_id"]},
            )
    load_points = region_rows(region, "load_points.csv")
    pumps = region_rows(region, "pumps.csv")
    hospitals = region_rows(region, "hospitals.csv")
    stored_load = net.load.set_index("name")
    load_of = {row["load_point"]: index for index, row in enumerate(load_points)}
    stored_ratio = [
        float(stored_load.q_mvar[row["load_point"]] / stored_load.p_mw[row["load_point"]])
        for row in load_points
    ]
    ties = optional_rows(region, "tie_lines.csv")
    cos_phi = dict(zip(net.motor.name, net.motor.cos_phi, strict=True))
    pump_ratio = [float(np.tan(np.arccos(cos_phi.get(row["motor"], 0.8)))) for row in pumps]
    return PowerNet(
        net=net,
        grid=grid,
        components=tuple(row["component_id"] for row in components),
        component_branch=np.array([branch_of.get(row["element_name"], -1) for row in components]),
        component_infeed=np.array([infeed_of.get(row["element_name"], -1) for row in components]),
        branch_names=tuple(names),
        load_points=tuple(load_of),
        load_node=np.array([node(row["bus_name"], row["load_point"]) for row in load_points]),
        load_base_mw=np.array([float(row["base_mw"]) for row in load_points]),
        load_q_per_p=np.array(stored_ratio),
        people=np.array([float(row["people"]) for row in load_points]),
        pumps=tuple(row["pump"] for row in pumps),
        pump_node=np.array([node(row["bus_name"], row["pump"]) for row in pumps], dtype=np.int64),
        pump_rated_mw=np.array([float(row["rated_mw"]) for row in pumps]),
        pump_q_per_p=np.array(pump_ratio),
        hospitals=tuple(row["hospital"] for row in hospitals),
        hospital_load_point=np.array(
            [load_of.get(row["load_point"], -1) for row in hospitals], dtype=np.int64
        ),
        hospital_base_mw=np.array([float(row["load_mw"]) for row in hospitals]),
        tie_lines=tuple(row["tie_line"] for row in ties),
        tie_node=np.array([node(row["bus_name"], row["tie_line"]) for row in ties], np.int64),
        tie_rating_mw=np.array([float(row["rating_mw"]) for row in ties]),
        line_ends=tuple(
            (str(net.bus.name[bus]), *json.loads(net.bus.geo[bus])["coordinates"])
            for bus in sorted({*net.line.from_bus, *net.line.to_bus})
        ),
    )
