"""Runs the measures of each level-5 scenario on common random numbers and compares them.

`python -m benchmarks.level5` writes runs/level5/summary.json and prints a table. What is said of
it comes from seeds that no tuning has seen; the scenarios name them, and the fields. Each scenario
is a study in a folder of its own: who interrupts it may start it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from federation.scenario.archive import Study
from federation.scenario.run import WEIGHTED
from federation.scenario.spec import Scenario, load
from federation.scenario.study import interval, kpis_of
from federation.studies import command_resume, execute

SCENARIOS = ("level5.yaml", "heat.yaml", "epidemic.yaml")


def compared(study: Study, measures: Sequence[str]) -> dict[str, Any]:
    """What `summary.json` says of one scenario; intervals are 95 %, smaller is better.

    Each measure is compared with the one before, than which it should have less.
    """
    told, scenario = study.summary, study.scenario
    good = {(r["run"], r["measure"]): r for r in study.runs.to_pylist() if not r["error"]}
    kpis = {key: kpis_of(row) for key, row in good.items()}
    found: dict[str, Any] = {
        **{name: told[name] for name in ("seed", "digest", "runs", "failed_runs")},
        "uncertainty": {
            n: d.model_dump(exclude_none=True) for n, d in scenario.uncertainty.items()
        },
        "weighted": dict(scenario.weighted),
        "measures": told["measures"],
        "paired": {},
        "cpu_s": {
            m: float(np.mean([r["cpu_s"] for (_, of), r in good.items() if of == m]))
            for m in measures
        },
    }
    for worse, better in reversed(tuple(pairwise(measures))):
        pairs = [
            (mine, kpis[run, worse])
            for (run, m), mine in kpis.items()
            if m == better and (run, worse) in kpis
        ]
        if pairs:
            found["paired"][f"{better} - {worse}"] = {
                kpi: interval(np.array([a[kpi] - b[kpi] for a, b in pairs])) for kpi in pairs[0][0]
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
    began_s = time.perf_counter()
    summary: dict[str, Any] = {"scenarios": {}}
    for file in files:
        scenario = load(file)
        measures = list(scenario.measures)
        study = _done(scenario, measures, out / scenario.name, options)
        found = compared(study, measures)
        summary["scenarios"][scenario.name] = found
        summary["wall_s"] = time.perf_counter() - began_s
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        (out / "summary.json").write_text(text, encoding="utf-8")
        print(table(scenario.name, found), flush=True)
    return 0


def _done(
    scenario: Scenario, measures: Sequence[str], folder: Path, options: argparse.Namespace
) -> Study:
    """The study of a scenario, which goes on where it was interrupted."""
    chosen = argparse.Namespace(
        run=str(folder),
        runs=options.runs,
        seed=options.seed,
        measures=",".join(measures),
        members="local",
        workers=options.workers,
        ray=None,
        json=False,
    )
    if (folder / "study.json").is_file():
        command_resume(chosen)
    else:
        execute(scenario, chosen, folder)
    return Study(folder)


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
