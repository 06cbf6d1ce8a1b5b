"""Solves the AC power flow of islands fast, and only with engines that agree with pandapower."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandapower as pp
from lightsim2grid.solver import NR_KLU
from numpy.typing import NDArray
from scipy.sparse import bmat, coo_matrix, csc_matrix, csgraph, csr_matrix, diags_array
from scipy.sparse.linalg import splu

from federation.errors import Reason, TwinError
from twins.energy.network import Complex, Grid, Index

Mask = NDArray[np.bool_]
Newton = Callable[[csc_matrix, Complex, Complex, int, Index, Index], Complex | None]
"""(Y, S, first guess, slack, voltage-controlled nodes, load nodes) -> V, None if it diverges."""
Engine = Callable[[Grid, Mask, Mask], Complex]
"""(grid, branches on, infeeds on) -> voltage per node, NaN where nothing feeds it."""

TOLERANCE_PU = 1e-9
MOST_ITERATIONS = 15
AGREEMENT_PU = 1e-6
_threads = threading.local()


def newton_klu(
    y: csc_matrix, s: Complex, guess: Complex, slack: int, controlled: Index, loads: Index
) -> Complex | None:
    """Newton-Raphson of lightsim2grid, on our matrix; never through its own net conversion."""
    if not hasattr(_threads, "klu"):
        _threads.klu = NR_KLU()
    klu = _threads.klu
    # an engine that remembers the pivots of its last matrix would make bits depend on history
    klu.reset()
    weights = np.zeros(s.size)
    weights[slack] = 1.0
    found = klu.compute_pf(
        y,
        guess.copy(),
        s,
        np.array([slack], dtype=np.int32),
        weights,
        controlled.astype(np.int32),
        loads.astype(np.int32),
        MOST_ITERATIONS,
        TOLERANCE_PU * max(1.0, float(np.abs(s).max())),
    )
    if not found:
        return None
    voltage = np.array(klu.get_V(), dtype=np.complex128)
    return voltage if np.isfinite(voltage).all() else None


def newton_scipy(
    y: csc_matrix, s: Complex, guess: Complex, slack: int, controlled: Index, loads: Index
) -> Complex | None:
    r"""Newton-Raphson in polar form with SuperLU, for when the compiled one is refused.

    Solves dS(V) = V conj(Y V) - S = 0 for angle (all but the slack) and magnitude (loads).
    """
    free = np.concatenate([controlled, loads]).astype(np.int64)
    angle, size = np.angle(guess), np.abs(guess)
    tolerance = TOLERANCE_PU * max(1.0, float(np.abs(s).max()))
    for _ in range(MOST_ITERATIONS + 1):
        v: Complex = size * np.exp(1j * angle)
        current = y @ v
        mismatch = v * np.conj(current) - s
        residual = np.concatenate([mismatch[free].real, mismatch[loads].imag])
        if not np.isfinite(residual).all():
            return None
        if residual.size == 0 or np.abs(residual).max() < tolerance:
            return v
        unit = diags_array(v / size)
        by_angle = csr_matrix(
            1j * (diags_array(v) @ (diags_array(current) - y @ diags_array(v)).conj())
        )
        by_size = csr_matrix(
            diags_array(v) @ (y @ unit).conj() + diags_array(current.conj()) @ unit
        )
        jacobian = _stack(by_angle, by_size, free, loads)
        try:
            change = splu(jacobian).solve(residual)
        except RuntimeError:
            return None
        angle[free] -= change[: free.size]
        size[loads] -= change[free.size :]
    return None


def _stack(by_angle: csr_matrix, by_size: csr_matrix, free: Index, loads: Index) -> csc_matrix:
    return csc_matrix(
        bmat(
            [
                [by_angle[free][:, free].real, by_size[free][:, loads].real],
                [by_angle[loads][:, free].imag, by_size[loads][:, loads].imag],
            ]
        )
    )


class Island:
    """A connected part of the grid with at least one infeed, ready to be solved often.

    All its infeeds hold the same voltage, so they are one slack node; position 0 of every
    vector inside. `nodes` are the others, in the grid's numbering; those of them that are in
    `holding` keep the size of their voltage, as a generator does.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Index,
        branches: Index,
        infeed_nodes: Index,
        holding: Index | None = None,
    ) -> None:
        self.grid = grid
        self.infeed_nodes = infeed_nodes
        self.nodes: Index = np.setdiff1d(nodes, infeed_nodes)
        self.branches = branches
        position = np.full(grid.nodes, -1, dtype=np.int64)
        position[infeed_nodes] = 0
        position[self.nodes] = np.arange(1, self.nodes.size + 1)
        self.position = position
        f, t = position[grid.from_node[branches]], position[grid.to_node[branches]]
        own = np.concatenate([infeed_nodes, self.nodes])
        size = self.nodes.size + 1
        values = [grid.y_ff, grid.y_ft, grid.y_tf, grid.y_tt]
        self.matrix = csc_matrix(
            coo_matrix(
                (
                    np.concatenate([*(v[branches] for v in values), grid.y_shunt[own]]),
                    (
                        np.concatenate([f, f, t, t, position[own]]),
                        np.concatenate([f, t, f, t, position[own]]),
                    ),
                ),
                shape=(size, size),
            )
        )
        self.f, self.t = f, t
        held = complex(grid.voltage[infeed_nodes[0]])
        self.linear: Any = splu(csc_matrix(self.matrix[1:, 1:])) if self.nodes.size else None
        self._sensitivity: dict[bytes, tuple[Complex, Complex]] = {}
        no_load: Complex = np.zeros(0, dtype=np.complex128)
        if self.linear is not None:
            no_load = self.linear.solve(-self.matrix[1:, 0].toarray().ravel() * held)
        controlled = np.isin(self.nodes, grid.generator_node)
        if holding is not None and holding.size:
            controlled |= np.isin(self.nodes, holding)
        if controlled.any():
            # long lines lift the voltages without load; generators keep theirs
            no_load = np.exp(1j * np.angle(no_load))
            no_load[controlled] *= np.abs(grid.voltage[self.nodes[controlled]])
        # the voltages without load know every transformer's shift, and nothing of a solution
        self.guess: Complex = np.concatenate([[held], no_load])
        self.controlled: Index = np.flatnonzero(controlled) + 1
        self.loads: Index = np.flatnonzero(~controlled) + 1

    def solve(self, injection_mva: Complex, newton: Newton) -> Complex | None:
        """Voltages (slack first, then `nodes`) under the injections at `nodes`."""
        s = np.zeros(self.nodes.size + 1, dtype=np.complex128)
        s[1:] = injection_mva / self.grid.base_mva
        if self.nodes.size == 0:
            return self.guess.copy()
        return newton(self.matrix, s, self.guess, 0, self.controlled, self.loads)

    def sensitivity(self, loads: Index) -> tuple[Complex, Complex]:
        """Voltage of `nodes`, and current into `branches`, per unit of current into each load.

        `loads` are indices into `nodes`; the answer has a column for each.
        """
        key = loads.tobytes()
        if key not in self._sensitivity:
            volts = np.zeros((self.nodes.size + 1, loads.size), dtype=np.complex128)
            unit = np.zeros(self.nodes.size, dtype=np.complex128)
            for column, load in enumerate(loads):
                # one at a time: many at once wake the threads of BLAS, for longer than this takes
                unit[load] = 1.0
                volts[1:, column] = self.linear.solve(unit)
                unit[load] = 0.0
            y_ff, y_ft = self.grid.y_ff[self.branches], self.grid.y_ft[self.branches]
            currents = y_ff[:, None] * volts[self.f] + y_ft[:, None] * volts[self.t]
            self._sensitivity[key] = (volts[1:], currents)
        return self._sensitivity[key]


def components(grid: Grid, branch_on: Mask) -> Index:
    """The connected part that every node belongs to, numbered from 0."""
    on = np.flatnonzero(branch_on)
    links = coo_matrix(
        (np.ones(on.size, dtype=np.int8), (grid.from_node[on], grid.to_node[on])),
        shape=(grid.nodes, grid.nodes),
    )
    _, part = csgraph.connected_components(links, directed=False)
    return np.asarray(part, dtype=np.int64)


def live_parts(
    grid: Grid, branch_on: Mask, infeed_on: Mask
) -> tuple[Index, list[tuple[Index, Index, Index]]]:
    """The part of every node; nodes, branches and infeed nodes of each part that is fed."""
    part = components(grid, branch_on)
    fed = grid.infeed_node[infeed_on]
    return part, [
        (
            np.flatnonzero(part == label),
            np.flatnonzero(branch_on & (part[grid.from_node] == label)),
            np.unique(fed[part[fed] == label]),
        )
        for label in np.unique(part[fed])
    ]


def engine(newton: Newton) -> Engine:
    """Solve a whole grid under its stored injections with one Newton method."""

    def voltages(grid: Grid, branch_on: Mask, infeed_on: Mask) -> Complex:
        result = np.full(grid.nodes, np.nan + 0j)
        for nodes, branches, infeed_nodes in live_parts(grid, branch_on, infeed_on)[1]:
            island = Island(grid, nodes, branches, infeed_nodes)
            solution = island.solve(grid.injection[island.nodes], newton)
            if solution is not None:
                result[island.infeed_nodes] = solution[0]
                result[island.nodes] = solution[1:]
        return result

    return voltages


def gap_pu(
    net: Any, grid: Grid, voltages: Engine, outages: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> float:
    """The largest distance between an engine's voltages and pandapower's.

    `outages` are cases, each a list of branches and one of infeeds that are out; the net
    itself should be the first. Infinite when the two disagree on what is alive.
    """
    worst = 0.0
    lookup = net._pd2ppc_lookups["branch"]
    node_of_bus = net._pd2ppc_lookups["bus"][net.bus.index.to_numpy()]
    for branches, infeeds in outages:
        case = pp.pandapowerNet(net)
        for table in ("line", "trafo"):
            if table in lookup:
                first, last = lookup[table]
                out = [b - first for b in branches if first <= b < last]
                case[table] = net[table].copy()
                case[table].loc[net[table].index[out], "in_service"] = False
        case["ext_grid"] = net.ext_grid.copy()
        case["ext_grid"].loc[net.ext_grid.index[list(infeeds)], "in_service"] = False
        pp.runpp(case, tolerance_mva=1e-8, init="dc")
        size, angle = case.res_bus.vm_pu.to_numpy(), case.res_bus.va_degree.to_numpy()
        reference = size * np.exp(1j * np.deg2rad(angle))
        branch_on = np.ones(grid.branches, dtype=bool)
        branch_on[list(branches)] = False
        infeed_on = np.ones(grid.infeed_node.size, dtype=bool)
        infeed_on[list(infeeds)] = False
        ours = voltages(grid, branch_on, infeed_on)[node_of_bus]
        if (np.isnan(ours) != np.isnan(reference)).any():
            return float("inf")
        worst = max(worst, float(np.nanmax(np.abs(ours - reference))))
    return worst


def trusted_newton(
    net: Any,
    grid: Grid,
    outages: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: Sequence[Newton] = (newton_klu, newton_scipy),
) -> Newton:
    """The first candidate that agrees with pandapower on every case; an error if none does."""
    gaps = []
    for newton in candidates:
        gap = gap_pu(net, grid, engine(newton), outages)
        if gap <= AGREEMENT_PU:
            return newton
        gaps.append(f"{getattr(newton, '__name__', newton)}: {gap:.3g} pu")
    raise TwinError(
        Reason.TWIN_FAILED,
        f"no power flow engine agrees with pandapower within {AGREEMENT_PU} pu ({'; '.join(gaps)})",
    )
