"""What `summary.json` says of a study: its figures, one cascade, and where the time went."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from federation.core.ledger import EventRecord
from federation.scenario.design import Design
from federation.scenario.explain import Causes
from federation.scenario.results import read_domains, read_events, read_json, read_waits
from federation.scenario.spec import Scenario
from federation.scenario.study import Rows, combined_digest, figures


def summarise(design: Design, rows: Rows, folder: Path) -> dict[str, Any]:
    """What `summary.json` says of the runs; who did them and how long it took comes from them
    who know. The cascade is that of the first reference run in the folder."""
    scenario = design.scenario
    kept = [
        m
        for m in design.measures
        if (folder / "reference" / m / "actions.parquet").is_file()  # it is written last
    ]
    return {
        "region": scenario.region,
        "scenario": scenario.name,
        "seed": design.seed,
        "digest": combined_digest(rows),
        "runs": len({row["run"] for row in rows}),
        "failed_runs": [
            {
                "run": row["run"],
                "measure": row["measure"],
                "seed": row["seed"],
                "error": row["error"],
            }
            for row in rows
            if row["error"]
        ],
        **figures(rows, design.measures),
        "cascade": cascade_of(read_events(folder, kept[0]), read_domains(folder)) if kept else {},
        "critical_path": read_waits(folder, kept[0]) if kept else {},
    }


def cascade_of(events: Sequence[EventRecord], domains: Mapping[str, str]) -> dict[str, Any]:
    """The `cascade` of a summary from the events of one run."""
    causes = Causes(events, domains)
    cascade = causes.cascade()
    return {
        "events": cascade.events,
        "domains": list(cascade.domains),
        "depth": cascade.depth,
        "longest_chain": [causes.line(i) for i in cascade.longest_chain],
    }


def _costs(row: Mapping[str, Any], what: str) -> dict[str, float]:
    """Seconds by member, of `wall_s` or `cpu_s`."""
    return {
        name.split(".")[1]: float(value)
        for name, value in row.items()
        if name.startswith("cost.") and name.endswith(f".{what}") and value is not None
    }


def timing(rows: Rows, wall_s: float) -> dict[str, Any]:
    """Seconds: of the whole, the median of a run, and what members and engine took of it."""
    good = [row for row in rows if not row["error"]]
    if not good:
        return {"wall_s": wall_s}
    costs = [_costs(row, "cpu_s") for row in good]
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {
        "wall_s": wall_s,
        "run_wall_s": float(np.median([row["wall_s"] for row in good])),
        "run_cpu_s": float(np.median([row["cpu_s"] for row in good])),
        "run_cpu_s_by_member": {
            name: float(np.median([cost.get(name, 0.0) for cost in costs])) for name in names
        },
        "run_cpu_s_engine": float(
            np.median([row["cpu_s"] - sum(c.values()) for row, c in zip(good, costs, strict=True)])
        ),
    }


def local_members(scenario: Scenario, rows: Rows, folder: Path) -> list[dict[str, Any]]:
    """The `members` of a summary for runs in this process or on workers."""
    path = folder / "reference" / "descriptions.json"
    described = read_json(path) if path.is_file() else {}
    wall = [_costs(row, "wall_s") for row in rows]
    cpu = [_costs(row, "cpu_s") for row in rows]
    return [
        {
            "name": name,
            "address": f"local:{member.twin}",
            "pid": os.getpid(),
            "version": described[name]["version"] if name in described else "",
            "wall_s": sum(cost.get(name, 0.0) for cost in wall),
            "cpu_s": sum(cost.get(name, 0.0) for cost in cpu),
        }
        for name, member in scenario.members.items()
    ]
