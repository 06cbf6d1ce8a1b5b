"""What the earthquake in Shelby County costs, member by member: `python -m benchmarks.shelby`.

One JSON line per measure goes to standard output, a table to standard error. All figures are
medians of runs in this process, in which the measures take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from federation.planners import planner
from federation.scenario.run import Outcome, run_local
from federation.scenario.spec import load
from federation.scenario.study import cases

SHELBY = Path(__file__).parent.parent / "twins/regions/shelby/earthquake.yaml"
MEASURES = ("none", "nearest", "plan")


def run_shelby(repeat: int) -> list[dict[str, Any]]:
    """The earthquake under each measure, in this process, after one run that is not counted.

    `rest` is what no member's step took: coupling, ledger, opening, and preparing plans.
    """
    scenario = load(SHELBY)
    todo = cases(scenario, MEASURES, 1, scenario.seed)
    outcomes: dict[str, list[Outcome]] = {measure: [] for measure in MEASURES}
    for turn in range(repeat + 1):
        for case in todo:
            outcome = run_local(scenario, case, planner)
            if turn:
                outcomes[case.measure].append(outcome)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        {
            "case": "shelby",
            "measure": measure,
            "horizon_h": scenario.horizon_h,
            "repeat": repeat,
            "wall_s": round(median(o.wall_s for o in found), 3),
            "cpu_s": round(median(o.cpu_s for o in found), 3),
            "cpu_s_by_member": {
                **{
                    name: round(median(o.costs[name].cpu_s for o in found), 3)
                    for name in found[0].costs
                },
                "rest": round(median(map(_rest_s, found)), 3),
            },
            "peak_rss_mib": round(peak_mib),
        }
        for measure, found in outcomes.items()
    ]


def _rest_s(outcome: Outcome) -> float:
    return outcome.cpu_s - sum(cost.cpu_s for cost in outcome.costs.values())


def shelby_table(rows: list[dict[str, Any]]) -> str:
    members: Mapping[str, float] = rows[0]["cpu_s_by_member"]
    head = f"{'shelby 72 h, CPU s':<22}" + "".join(f"{name:>10}" for name in members)
    lines = [f"{head}{'all':>10}{'wall s':>10}"]
    for row in rows:
        spent = "".join(f"{s:>10.3f}" for s in row["cpu_s_by_member"].values())
        lines.append(f"{row['measure']:<22}{spent}{row['cpu_s']:>10.3f}{row['wall_s']:>10.3f}")
    lines.append(f"peak resident memory {rows[0]['peak_rss_mib']} MiB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shelby", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (5)")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    rows = run_shelby(options.repeat)
    for row in rows:
        print(json.dumps(row), flush=True)
    print(shelby_table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
