r"""Solves the pressures and flows of a damaged water network, so that service follows from them.

The engine is EPANET 2.2 (the library that WNTR carries) with pressure-driven demand: a
junction at pressure p gets

.. math:: q = d \sqrt{(p - p_0) / (p_r - p_0)}, \quad 0 \le q \le d

A leak of area A loses 0.6 A sqrt(2 g p) (an orifice). Each solution starts afresh from the
levels of the tanks and the state of the pipes and pumps, so that equal states give equal
bits and a session can be restored from the levels alone.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import wntr
from numpy.typing import NDArray
from wntr.epanet.toolkit import ENepanet

from federation.errors import Reason, TwinError
from federation.twin import Vector

Mask = NDArray[np.bool_]

ORIFICE = 0.6 * np.sqrt(2.0 * 9.81) * 3600.0
"""Outflow in m3/h per m2 of a sharp-edged hole and per root of a metre of pressure."""

WEIGHT_MW = 1000.0 * 9.81 / 3600.0 / 1e6
"""Power in MW that lifts 1 m3/h of water by 1 m."""

_BASE_DEMAND, _EMITTER, _LEVEL, _DEMAND, _HEAD, _PRESSURE, _DEFICIT = 1, 3, 8, 9, 10, 11, 27
_START_STATUS, _FLOW = 4, 8
_PRESSURE_DRIVEN, _FRESH_FLOWS, _UNBALANCED, _ERRORS_FROM = 1, 10, 1, 100
_ACCURACY, _CHECK_FREQUENCY, _DAMP_LIMIT = 1, 15, 17

_SOLVERS = (
    ((_ACCURACY, 1e-4), (_CHECK_FREQUENCY, 2.0), (_DAMP_LIMIT, 0.0)),
    ((_CHECK_FREQUENCY, 1.0),),
    ((_DAMP_LIMIT, 1.0),),
    ((_CHECK_FREQUENCY, 2.0),),
    ((_ACCURACY, 1e-3), (_DAMP_LIMIT, 10.0)),
)
"""Settings of EPANET's iteration, tried in turn until flows balance; the first nearly always."""


@dataclass(frozen=True, slots=True)
class WaterNetwork:
    """What stays the same of a water network; flows in m3/h, heads and levels in m.

    `pattern[hour]` multiplies `base_demand`. A tank hangs on the pipe `tank_pipe`.
    Junctions, tanks and pumps are in the order of the EPANET file.
    """

    file: Path
    junctions: tuple[str, ...]
    tanks: tuple[str, ...]
    pumps: tuple[str, ...]
    pipes: tuple[str, ...]
    base_demand: Vector
    pattern: Vector
    tank_pipe: tuple[str, ...]
    tank_low: Vector
    tank_high: Vector
    tank_start: Vector
    tank_area_m2: Vector
    pump_design: Vector
    pump_to: tuple[str, ...]
    tank_to: tuple[str, ...]
    pipe_ends: tuple[tuple[str, str], ...]
    pipe_area_m2: Vector

    def demand(self, hour_of_day: float) -> Vector:
        return np.asarray(self.base_demand * self.pattern[int(hour_of_day) % self.pattern.size])


@lru_cache(maxsize=8)
def read_network(file: Path) -> WaterNetwork:
    """Read an EPANET file with flows in m3/h; one pattern for all junctions, no rules."""
    model = wntr.network.WaterNetworkModel(str(file))
    tanks = [model.get_node(name) for name in model.tank_name_list]
    pumps = [model.get_link(name) for name in model.pump_name_list]
    pipes = [model.get_link(name) for name in model.pipe_name_list]
    tank_pipe, tank_to = [], []
    for tank in tanks:
        (pipe,) = model.get_links_for_node(tank.name)
        link = model.get_link(pipe)
        tank_pipe.append(pipe)
        tank_to.append(
            link.end_node_name if link.start_node_name == tank.name else link.start_node_name
        )
    junctions = [model.get_node(name) for name in model.junction_name_list]
    pattern = junctions[0].demand_timeseries_list[0].pattern
    return WaterNetwork(
        file=file,
        junctions=tuple(model.junction_name_list),
        tanks=tuple(model.tank_name_list),
        pumps=tuple(model.pump_name_list),
        pipes=tuple(model.pipe_name_list),
        base_demand=np.array([j.base_demand * 3600.0 for j in junctions]),
        pattern=np.ones(1) if pattern is None else np.array(pattern.multipliers, np.float64),
        tank_pipe=tuple(tank_pipe),
        tank_low=np.array([t.min_level for t in tanks]),
        tank_high=np.array([t.max_level for t in tanks]),
        tank_start=np.array([t.init_level for t in tanks]),
        tank_area_m2=np.array([np.pi / 4.0 * t.diameter**2 for t in tanks]),
        pump_design=np.array([p.get_pump_curve().points[0][0] * 3600.0 for p in pumps]),
        pump_to=tuple(p.end_node_name for p in pumps),
        tank_to=tuple(tank_to),
        pipe_ends=tuple((p.start_node_name, p.end_node_name) for p in pipes),
        pipe_area_m2=np.array([np.pi / 4.0 * p.diameter**2 for p in pipes]),
    )


@dataclass(frozen=True, slots=True)
class WaterState:
    """What a solution depends on: demands in m3/h, levels in m, what is open, and leaks.

    `leak` is per junction, in m3/h per root of a metre of pressure.
    """

    demand: Vector
    level: Vector
    pump_open: Mask
    pipe_open: Mask
    leak: Vector


@dataclass(frozen=True, slots=True)
class Flows:
    """A solution: m3/h, except `pressure` (m) and `lift` (m across each pump)."""

    delivered: Vector
    leaked: Vector
    pressure: Vector
    tank_inflow: Vector
    pump_flow: Vector
    lift: Vector

    def balance(self) -> float:
        """Pumped in less delivered, leaked and stored; 0 but for the solver's tolerance."""
        return float(
            self.pump_flow.sum() - self.delivered.sum() - self.leaked.sum() - self.tank_inflow.sum()
        )


def _close(library: ctypes.CDLL, project: ctypes.c_uint64) -> None:
    library.EN_close(project)
    library.EN_deleteproject(project)


class Hydraulics:
    """One open EPANET project. It writes no file, and several can be open in a process."""

    def __init__(
        self, network: WaterNetwork, pressure_min_m: float, pressure_required_m: float
    ) -> None:
        self.network = network
        self._library = ENepanet().ENlib
        self._project = ctypes.c_uint64()
        self._library.EN_createproject(ctypes.byref(self._project))
        self.close = weakref.finalize(self, _close, self._library, self._project)
        nowhere = os.devnull.encode()
        self._call("EN_open", str(network.file).encode(), nowhere, b"")
        self._call(
            "EN_setdemandmodel",
            _PRESSURE_DRIVEN,
            ctypes.c_double(pressure_min_m),
            ctypes.c_double(max(pressure_required_m, pressure_min_m + 0.1)),
            ctypes.c_double(0.5),
        )
        count, flat = ctypes.c_int(), ctypes.c_double(1.0)
        self._call("EN_getcount", 3, ctypes.byref(count))
        for pattern in range(1, count.value + 1):
            self._call("EN_setpattern", pattern, ctypes.byref(flat), 1)
        self._call("EN_openH")
        self._junctions = [self._index("EN_getnodeindex", n) for n in network.junctions]
        self._tanks = [self._index("EN_getnodeindex", n) for n in network.tanks]
        self._pumps = [self._index("EN_getlinkindex", n) for n in network.pumps]
        self._pipes = [self._index("EN_getlinkindex", n) for n in network.pipes]
        self._pump_ends = []
        for pump in self._pumps:
            start, end = ctypes.c_int(), ctypes.c_int()
            self._call("EN_getlinknodes", pump, ctypes.byref(start), ctypes.byref(end))
            self._pump_ends.append((start.value, end.value))
        self._tank_pipes = np.array([network.pipes.index(p) for p in network.tank_pipe], np.int64)
        nodes = ctypes.c_int()
        self._call("EN_getcount", 0, ctypes.byref(nodes))
        self._nodes = list(range(1, nodes.value + 1))
        self._written = WaterState(
            np.full(len(self._junctions), np.nan),
            np.full(len(self._tanks), np.nan),
            np.ones(len(self._pumps), np.bool_),
            np.ones(len(self._pipes), np.bool_),
            np.zeros(len(self._junctions)),
        )
        self._solved: tuple[bytes, Flows] | None = None

    def _call(self, function: str, *arguments: object) -> int:
        """Call the toolkit; its answer if that is a warning (or 0, all well)."""
        code = int(getattr(self._library, function)(self._project, *arguments))
        if code >= _ERRORS_FROM:
            raise TwinError(Reason.TWIN_FAILED, f"EPANET answered {function} with error {code}")
        return code

    def _index(self, function: str, name: str) -> int:
        index = ctypes.c_int()
        self._call(function, name.encode(), ctypes.byref(index))
        return index.value

    def _read(self, function: str, indices: list[int], code: int) -> Vector:
        read, project = getattr(self._library, function), self._project
        value = ctypes.c_double()
        target = ctypes.byref(value)
        values = np.empty(len(indices))
        for place, index in enumerate(indices):
            read(project, index, code, target)
            values[place] = value.value
        return values

    def _write(
        self, function: str, indices: list[int], code: int, new: Vector | Mask, old: Vector | Mask
    ) -> None:
        for place in np.flatnonzero(new != old):
            self._call(function, indices[place], code, ctypes.c_double(float(new[place])))

    def solve(self, state: WaterState) -> Flows:
        """The steady flows at one state; the same bits for the same state, always.

        EPANET lets a leak draw water in where the pressure is negative, and lets an empty
        tank give (or a full one take) through a pipe so wide that the head lost in it is
        below its tolerance; these are shut and the flows are found again.
        """
        key = b"".join(
            part.tobytes()
            for part in (state.demand, state.level, state.pump_open, state.pipe_open, state.leak)
        )
        if self._solved is not None and self._solved[0] == key:
            return self._solved[1]
        network = self.network
        flows = self._run(state)
        for _ in range(len(self._junctions) + len(self._tanks)):
            drawing = flows.leaked < 0.0
            empty = (state.level <= network.tank_low) & (flows.tank_inflow < 0.0)
            full = (state.level >= network.tank_high) & (flows.tank_inflow > 0.0)
            wrong = self._tank_pipes[empty | full]
            wrong = wrong[state.pipe_open[wrong]]
            if not drawing.any() and not wrong.size:
                break
            pipe_open = state.pipe_open.copy()
            pipe_open[wrong] = False
            leak = np.where(drawing, 0.0, state.leak)
            state = replace(state, leak=leak, pipe_open=pipe_open)
            flows = self._run(state)
        self._solved = (key, flows)
        return flows

    def _run(self, state: WaterState) -> Flows:
        was, self._written = self._written, state
        node, link = "EN_setnodevalue", "EN_setlinkvalue"
        self._write(node, self._junctions, _BASE_DEMAND, state.demand, was.demand)
        self._write(node, self._junctions, _EMITTER, state.leak, was.leak)
        self._write(node, self._tanks, _LEVEL, state.level, was.level)
        self._write(link, self._pumps, _START_STATUS, state.pump_open, was.pump_open)
        self._write(link, self._pipes, _START_STATUS, state.pipe_open, was.pipe_open)
        for settings in _SOLVERS:
            for option, value in settings:
                self._call("EN_setoption", option, ctypes.c_double(value))
            self._call("EN_initH", _FRESH_FLOWS)
            if self._call("EN_runH", ctypes.byref(ctypes.c_long())) != _UNBALANCED:
                break
        else:
            raise TwinError(Reason.TWIN_FAILED, "EPANET found no balance of flows")
        if settings is not _SOLVERS[0]:
            for option, value in _SOLVERS[0]:
                self._call("EN_setoption", option, ctypes.c_double(value))
        node, link = "EN_getnodevalue", "EN_getlinkvalue"
        outflow = self._read(node, self._junctions, _DEMAND)
        deficit = self._read(node, self._junctions, _DEFICIT)
        delivered = np.clip(state.demand - deficit, 0.0, state.demand)
        head = self._read(node, self._nodes, _HEAD)
        lift = np.array([head[end - 1] - head[start - 1] for start, end in self._pump_ends])
        return Flows(
            delivered=delivered,
            leaked=np.where(state.leak > 0.0, outflow - delivered, 0.0),
            pressure=self._read(node, self._junctions, _PRESSURE),
            tank_inflow=self._read(node, self._tanks, _DEMAND),
            pump_flow=np.where(state.pump_open, self._read(link, self._pumps, _FLOW), 0.0),
            lift=np.where(state.pump_open, lift, 0.0),
        )


@dataclass(frozen=True, slots=True)
class Span:
    """What a span of time did: volumes in m3, levels in m at its end."""

    level: Vector
    required: float
    delivered: float
    leaked: float
    pumped: float


def pass_time(hydraulics: Hydraulics, state: WaterState, span_h: float) -> Span:
    """Let a state hold for a span, with the tanks moving; explicit steps in time.

    Flows hold until the span ends or a tank becomes full or empty, whichever is first.
    """
    network = hydraulics.network
    level = state.level
    left_h = span_h
    delivered = leaked = pumped = 0.0
    for attempt in range(4 * len(network.tanks) + 1):
        flows = hydraulics.solve(replace(state, level=level))
        speed = flows.tank_inflow / network.tank_area_m2
        room = np.where(speed > 0.0, network.tank_high - level, network.tank_low - level)
        with np.errstate(divide="ignore", invalid="ignore"):
            until = np.where(np.abs(speed) * span_h > 1e-6, room / speed, np.inf)
        until[until <= 1e-9] = np.inf
        step_h = min(left_h, float(until.min(initial=np.inf)))
        if attempt == 4 * len(network.tanks):
            step_h = left_h
        moved = np.clip(level + speed * step_h, network.tank_low, network.tank_high)
        bound = np.where(speed > 0.0, network.tank_high, network.tank_low)
        level = np.where(until <= step_h, bound, moved)
        delivered += float(flows.delivered.sum()) * step_h
        leaked += float(flows.leaked.sum()) * step_h
        pumped += float(flows.pump_flow.sum()) * step_h
        left_h -= step_h
        if left_h <= 0.0:
            break
    return Span(level, float(state.demand.sum()) * span_h, delivered, leaked, pumped)
