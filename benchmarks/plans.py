"""What plans of Shelby County cost, and beside other tools: `python -m benchmarks.plans`.

One JSON line per question goes to standard output. Times are CPU seconds of this process, which
HiGHS uses on one thread; medians of turns that the contenders take in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import highspy
import numpy as np
from scipy.sparse import csr_array

from federation.core.coupling import Coupling
from federation.plan.algebra import pyomo_model
from federation.plan.bargain import Bargain
from federation.plan.crews import CrewPlanner
from federation.plan.engine import UNIT_USD, engine_of, optimum_usd
from federation.plan.joining import Joined, join
from federation.plan.joint import JointModel, joint_model
from federation.plan.owner import agree, owners_of
from federation.plan.rolling import Rolling
from federation.plan.visits import Task
from federation.planners import planner
from federation.scenario.run import Case, local_sessions, run_local
from federation.scenario.spec import Policy, Scenario, load
from federation.twin import HOUR_NS, Description, LinearBlock, Planner, Step, Vector

SHELBY = Path(__file__).parent.parent / "twins/regions/shelby/earthquake.yaml"

TWO = (36 * HOUR_NS, 36 * HOUR_NS)
"""The periods of the crew planner."""

DAY = (HOUR_NS,) * 24

FOURS = (4 * HOUR_NS,) * 6


@dataclass(frozen=True)
class Region:
    """Shelby County an hour after the shock of a run: what is broken, and what joins whom."""

    tasks: tuple[Task, ...]
    couplings: tuple[Coupling, ...]
    blocks: Callable[[Sequence[int]], Mapping[str, LinearBlock]]
    crews: float

    def model(self, periods_ns: Sequence[int]) -> JointModel:
        starts = [h * HOUR_NS for h in (0, 6, 18, 36) if h * HOUR_NS < sum(periods_ns)]
        return joint_model(self.blocks(periods_ns), self.couplings, periods_ns, starts, self.crews)

    def convex(self, periods_ns: Sequence[int]) -> dict[str, LinearBlock]:
        """The blocks with each broken component available as a plan of the region has it."""
        model = self.model(periods_ns)
        _, x = model.settle(model.pose(self.tasks))
        made = dict(self.blocks(periods_ns))
        for task in self.tasks:
            columns = model.joined.available[task.member, task.component]
            own = columns - model.joined.owners[task.member][0].start
            high = made[task.member].high.copy()
            high[own] = np.clip(x[columns], 0.0, 1.0)
            made[task.member] = replace(made[task.member], high=high)
        return made


class _Listener(CrewPlanner):
    """Hears what the crew planner is asked and sends nobody."""

    heard: tuple[Task, ...] = ()

    def _plan(self, step: Step, remaining: Any, keys: Any, tasks: list[Task]) -> None:
        self.heard = self.heard or tuple(tasks)
        self._planned_ns = step.time_ns

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        pass


def shelby() -> Region:
    """Runs the earthquake for two hours, until its damage is known."""
    scenario = load(SHELBY).model_copy(update={"horizon_h": 2.0})
    case = Case(0, 1, "plan")
    made: list[CrewPlanner] = []

    def listen(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy
    ) -> Planner:
        found = planner(scenario, descriptions, policy)
        found.__class__ = _Listener
        assert isinstance(found, CrewPlanner)
        made.append(found)
        return found

    run_local(scenario, case, listen)
    sessions = local_sessions(scenario)
    for name, session in sessions.items():
        session.open(case.member_seed(name), {})

    def blocks(periods_ns: Sequence[int]) -> Mapping[str, LinearBlock]:
        found = {n: s.twin.flexibility(tuple(periods_ns)) for n, s in sessions.items()}
        return {name: block for name, block in found.items() if block is not None}

    listener = made[-1]
    assert isinstance(listener, _Listener)
    return Region(listener.heard, scenario.couplings_resolved(), blocks, listener.crews)


def direct(problem: Joined) -> tuple[float, float]:
    """HiGHS called by hand on the same matrices, with a matrix that SciPy sums: seconds, USD."""
    matrix = csr_array(
        (problem.coefficient, (problem.row_index, problem.column_index)),
        (len(problem.row_low), len(problem.low)),
    ).tocsc()
    began = time.process_time()
    engine = highspy.Highs()  # type: ignore[no-untyped-call]
    engine.setOptionValue("output_flag", False)
    engine.setOptionValue("threads", 1)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = matrix.shape[1], matrix.shape[0]
    model.col_cost_ = problem.cost / UNIT_USD
    model.col_lower_, model.col_upper_ = problem.low, problem.high
    model.row_lower_, model.row_upper_ = problem.row_low, problem.row_high
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    engine.passModel(model)
    engine.run()
    usd = float(engine.getInfo().objective_function_value) * UNIT_USD
    return time.process_time() - began, usd


def ours(blocks: Mapping[str, LinearBlock], couplings: Sequence[Coupling]) -> tuple[float, float]:
    """From the blocks of the twins to the optimum: seconds, USD."""
    began = time.process_time()
    usd = optimum_usd(engine_of(join(blocks, couplings)))
    return time.process_time() - began, usd


def seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def with_linopy(problem: Joined) -> object:
    """The same problem in linopy, from the same arrays, as far as HiGHS' own matrices."""
    import linopy
    import pandas as pd
    import xarray as xr

    model = linopy.Model()
    index = pd.RangeIndex(len(problem.low), name="column")
    x = model.add_variables(
        xr.DataArray(problem.low, [index]), xr.DataArray(problem.high, [index]), name="x"
    )
    order = np.argsort(problem.row_index, kind="stable")
    row, column = problem.row_index[order], problem.column_index[order]
    first = np.searchsorted(row, np.arange(len(problem.row_low) + 1))
    width = int(np.diff(first).max())
    place = np.arange(row.size) - first[row]
    columns = np.full((len(problem.row_low), width), -1)
    values: Vector = np.zeros(columns.shape)
    columns[row, place], values[row, place] = column, problem.coefficient[order]
    rows = pd.RangeIndex(len(problem.row_low), name="row")
    body = linopy.LinearExpression(
        xr.Dataset(
            {
                "coeffs": (("row", "_term"), values),
                "vars": (("row", "_term"), columns),
            },
            coords={"row": rows},
        ),
        model,
    )
    for sign, side in ((">=", problem.row_low), ("<=", problem.row_high)):
        finite = np.isfinite(side)
        model.add_constraints(
            body,
            sign,
            xr.DataArray(np.where(finite, side, 0.0), [rows]),
            mask=xr.DataArray(finite, [rows]),
            name=f"rows {sign}",
        )
    model.add_objective((x * xr.DataArray(problem.cost / UNIT_USD, [index])).sum())
    return model.matrices.A


def questions(region: Region, repeat: int) -> Iterator[dict[str, Any]]:
    """Every figure as one row; see the module."""
    for name, periods in (("72 h", TWO), ("24 h", DAY)):
        blocks = region.convex(periods)
        problem = join(blocks, region.couplings)
        turns = [(ours(blocks, region.couplings), direct(problem)) for _ in range(repeat)]
        # what they import does not count
        with_linopy(problem)
        pyomo_model(problem)
        own, other = (median(t[k][0] for t in turns) for k in (0, 1))
        apart = abs(turns[0][0][1] - turns[0][1][1]) / abs(turns[0][1][1])
        built = [
            (
                seconds(lambda: engine_of(join(blocks, region.couplings))),  # noqa: B023
                seconds(lambda: with_linopy(problem)),  # noqa: B023
                seconds(lambda: pyomo_model(problem)),  # noqa: B023
            )
            for _ in range(repeat)
        ]
        build = [median(b[k] for b in built) for k in range(3)]
        yield (
            {
                "case": f"lp {name}",
                "columns": len(problem.columns),
                "rows": len(problem.rows),
                "multitwin_s": round(own, 4),
                "highs_s": round(other, 4),
                "overhead": round(own / other, 3),
                "differ": apart,
                "build_s": round(build[0], 4),
                "linopy_build_s": round(build[1], 4),
                "pyomo_build_s": round(build[2], 4),
                "linopy_ratio": round(build[1] / build[0], 1),
                "pyomo_ratio": round(build[2] / build[0], 1),
            }
        )
    yield _rolling(region, repeat)
    horizons: dict[str, Sequence[int]] = {"72 h": TWO, "24 h by fours": FOURS, "24 h": DAY}
    for name, spans in horizons.items():
        yield _bargain(region, name, spans)


def _rolling(region: Region, repeat: int) -> dict[str, Any]:
    """The 24 h plan, hour after hour: the work at what is broken goes down a little each time."""
    model, rolling = region.model(DAY), Rolling(time.process_time)
    first = rolling.plan(model, region.tasks)
    found, fresh = [], []
    for hour in range(1, repeat + 1):
        tasks = [replace(t, work_h=t.work_h - 0.1 * hour) for t in region.tasks]
        found.append(rolling.plan(model, tasks, float(hour)))
        fresh.append(seconds(lambda: model.solve(tasks)))  # noqa: B023
    return {
        "case": "rolling 24 h",
        "first_s": round(first.update_s + first.solve_s, 3),
        "resolve_s": round(median(r.update_s + r.solve_s for r in found), 3),
        "resolve_most_s": round(max(r.update_s + r.solve_s for r in found), 3),
        "update_share": round(median(r.update_s / r.solve_s for r in found), 3),
        "fresh_s": round(median(fresh), 3),
        "sources": sorted({r.source for r in found}),
        "gap": round(median(r.schedule.gap for r in found if r.schedule), 4),
    }


def _bargain(region: Region, name: str, periods: Sequence[int]) -> dict[str, Any]:
    """Owners that agree within half a percent of the optimum, which they do not know."""
    blocks = region.convex(periods)
    joint_usd = optimum_usd(engine_of(join(blocks, region.couplings)))
    owners, limit = owners_of(blocks, region.couplings)
    began = time.process_time()
    found = agree(owners, Bargain(tuple(o.stake for o in owners), limit, tolerance=0.005))
    return {
        "case": f"bargain {name}",
        "owners": len(owners),
        "boundary": int(limit.size),
        "rounds": found.rounds,
        "gap": round(found.gap, 6),
        "above_optimum": round((found.cost_usd - joint_usd) / abs(joint_usd), 6),
        "below_optimum": round((joint_usd - found.bound_usd) / abs(joint_usd), 6),
        "cpu_s": round(time.process_time() - began, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns per question")
    for line in questions(shelby(), parser.parse_args().repeat):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
