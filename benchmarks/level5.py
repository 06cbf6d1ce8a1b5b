"""Runs the four measures of each level-5 scenario on common random numbers and compares them.

`python -m benchmarks.level5` writes runs/level5/summary.json and prints a table. What is said of
it comes from seeds that no tuning has seen; the scenarios name them, and the fields.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from federation.__main__ import PLANNER_FACTORY, Progress, say
from federation.scenario import study
from federation.scenario.run import WEIGHTED, Outcome
from federation.scenario.spec import Scenario, load

SCENARIOS = ("level5.yaml", "heat.yaml", "epidemic.yaml")
MEASURES = ("none", "nearest-first", "plan", "level5")
PAIRS = (("level5", "plan"), ("plan", "nearest-first"), ("nearest-first", "none"))
"""Who is compared with whom: the first should have less than the second."""


def compared(
    scenario: Scenario, seed: int, measures: Sequence[str], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """What `summary.json` says of one scenario; intervals are 95 %, smaller is better."""
    good = {(o.case.run, o.case.measure): o for o in outcomes if not o.error}
    found: dict[str, Any] = {
        "seed": seed,
        "digest": study.combined_digest(outcomes),
        "runs": len({o.case.run for o in outcomes}),
        "failed_runs": [
            {"run": o.case.run, "measure": o.case.measure, "seed": seed, "error": o.error}
            for o in outcomes
            if o.error
        ],
        "uncertainty": {
            n: d.model_dump(exclude_none=True) for n, d in scenario.uncertainty.items()
        },
        "weighted": dict(scenario.weighted),
        "measures": {},
        "paired": {},
        "cpu_s": {},
        "decisions": {},
    }
    for measure in measures:
        mine = [o for (_, m), o in good.items() if m == measure]
        if not mine:
            continue
        found["measures"][measure] = {
            kpi: study.interval(np.array([o.kpis[kpi] for o in mine])) for kpi in mine[0].kpis
        }
        found["cpu_s"][measure] = float(np.mean([o.cpu_s for o in mine]))
        found["decisions"][measure] = float(
            np.mean([sum(e.event.kind == "decision_made" for e in o.events) for o in mine])
        )
    for better, worse in PAIRS:
        pairs = [
            (o, good[run, worse])
            for (run, m), o in good.items()
            if m == better and (run, worse) in good
        ]
        if pairs:
            found["paired"][f"{better} - {worse}"] = {
                kpi: study.interval(np.array([a.kpis[kpi] - b.kpis[kpi] for a, b in pairs]))
                for kpi in pairs[0][0].kpis
            }
    return found


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of one scenario, a line per KPI."""
    measures = list(found["measures"])
    lines = [f"{name}: {found['runs']} runs of seed {found['seed']}"]
    lines.append(f"  {'':26}" + "".join(f"{m:>18}" for m in measures))
    for kpi in found["measures"][measures[0]]:
        means = (found["measures"][m][kpi]["mean"] for m in measures)
        lines.append(f"  {kpi:26}" + "".join(f"{mean:18,.1f}" for mean in means))
    lines.append(
        f"  {'CPU s per run':26}" + "".join(f"{found['cpu_s'][m]:18.2f}" for m in measures)
    )
    for pair, kpis in found["paired"].items():
        low, high = kpis[WEIGHTED]["ci95"]
        verdict = "less" if high < 0.0 else "more" if low > 0.0 else "not told apart"
        mean = kpis[WEIGHTED]["mean"]
        lines.append(f"  weighted, {pair}: {mean:,.0f} [{low:,.0f}, {high:,.0f}], {verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    spec = importlib.util.find_spec("twins")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "regions" / "shelby"
    files = [Path(file) for file in options.scenario]
    files = files or [folder / name for name in SCENARIOS if (folder / name).is_file()]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.perf_counter()
    summary: dict[str, Any] = {"scenarios": {}}
    if options.workers > 1:
        study.start_ray(options.workers, None)
    for file in files:
        scenario = load(file)
        seed = scenario.seed if options.seed is None else options.seed
        measures = [m for m in MEASURES if m in scenario.measures]
        todo = study.cases(scenario, measures, options.runs, seed)
        say(f"{scenario.name}: {len(todo)} runs of {scenario.horizon_h:g} h")
        engine = study.Engine(scenario, PLANNER_FACTORY, options.workers)
        found = compared(scenario, seed, measures, engine.run(todo, progress=Progress()))
        summary["scenarios"][scenario.name] = found
        summary["wall_s"] = time.perf_counter() - began_s
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(table(scenario.name, found), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.level5", description=__doc__)
    found.add_argument("scenario", nargs="*", help="scenario files (those of the region)")
    found.add_argument("--runs", type=int, default=200, help="paired runs per measure (200)")
    found.add_argument("--workers", type=int, default=2, help="processes that Ray starts (2)")
    found.add_argument("--seed", type=int, help="another seed than the scenarios'")
    found.add_argument("--out", default="runs/level5", help="where to write (runs/level5)")
    return found


if __name__ == "__main__":
    sys.exit(main())
