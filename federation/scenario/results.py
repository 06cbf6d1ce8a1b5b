"""What a study leaves in its folder: figures as JSON, everything else as Parquet.

summary.json                     the figures that others script against
scenario.yaml                    the scenario as it was run
sensitivity.json                 how the effect of a measure moves with an assumption
runs.parquet                     a row per run and measure: seed, digest, draws, KPIs
series.parquet                   every scalar of every run, on the hour
reference/descriptions.json      the members: entities with places, variables with units
reference/MEASURE/ledger.parquet every value of run 0, and events.parquet, actions.parquet
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from federation.core.ledger import EventRecord
from federation.errors import Reason, ScenarioError
from federation.scenario.run import Outcome
from federation.scenario.spec import Scenario
from federation.twin import HOUR_NS, Event

SUMMARY = "summary.json"


def write_study(
    folder: Path, scenario: Scenario, outcomes: Sequence[Outcome], summary: Mapping[str, Any]
) -> None:
    """Write all that a study leaves; `summary.json` comes last, so that it stands for the whole.

    The full ledgers that were kept become the reference runs.
    """
    write_runs(folder, outcomes, scenario.horizon_ns)
    write_reference(folder, [o for o in outcomes if o.ledger and not o.error])
    (folder / "scenario.yaml").write_text(scenario.text, encoding="utf-8")
    write_summary(folder, summary)


def write_sensitivity(folder: Path, sensitivity: Mapping[str, Any]) -> None:
    text = json.dumps(sensitivity, indent=2, allow_nan=False)
    (folder / "sensitivity.json").write_text(text + "\n", encoding="utf-8")


def read_runs(folder: Path) -> dict[tuple[int, str], dict[str, float]]:
    """The KPIs of every run that did not fail, by run and measure."""
    return {
        (row["run"], row["measure"]): {
            name.removeprefix("kpi."): value
            for name, value in row.items()
            if name.startswith("kpi.")
        }
        for row in pq.read_table(folder / "runs.parquet").to_pylist()
        if not row["error"]
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (SUMMARY + ".part")
    part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(folder / SUMMARY)


def read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    if not path.is_file():
        raise ScenarioError(
            Reason.RUN_NOT_FOUND,
            f"{folder} holds no finished run: there is no {SUMMARY}",
            {"folder": str(folder)},
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_runs(folder: Path, outcomes: Sequence[Outcome], horizon_ns: int) -> None:
    """Write `runs.parquet` and `series.parquet` for all runs of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "run": o.case.run,
            "measure": o.case.measure,
            "seed": o.case.seed,
            "digest": o.digest,
            "error": o.error,
            "wall_s": o.wall_s,
            "cpu_s": o.cpu_s,
            **{
                f"parameter.{member}.{name}": value
                for member, values in o.case.parameters.items()
                for name, value in values.items()
            },
            **{f"kpi.{name}": value for name, value in o.kpis.items()},
        }
        for o in outcomes
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    pq.write_table(table, folder / "runs.parquet")
    hours = np.arange(0, math.floor(horizon_ns / HOUR_NS) + 1)
    parts = [
        pa.table(
            {
                "run": pa.array(np.full(hours.size, o.case.run)),
                "measure": pa.array([o.case.measure] * hours.size),
                "variable": pa.array([name] * hours.size),
                "time_h": pa.array(hours),
                "value": pa.array(sampled(points, hours * HOUR_NS)),
            }
        )
        for o in outcomes
        for name, points in o.series.items()
    ]
    if parts:
        pq.write_table(pa.concat_tables(parts), folder / "series.parquet")


def sampled(points: Sequence[tuple[int, float]], times_ns: np.ndarray) -> np.ndarray:
    """The last value at or before each time; the first one before it begins."""
    at = np.array([t for t, _ in points])
    values = np.array([v for _, v in points])
    return values[np.clip(np.searchsorted(at, times_ns, side="right") - 1, 0, None)]


def write_reference(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the whole ledger of one run per measure, for maps, trees and charts."""
    reference = folder / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    descriptions = outcomes[0].descriptions if outcomes else {}
    text = json.dumps({n: _plain(asdict(d)) for n, d in descriptions.items()})
    (reference / "descriptions.json").write_text(text, encoding="utf-8")
    for outcome in outcomes:
        place = reference / outcome.case.measure
        place.mkdir(exist_ok=True)
        pq.write_table(
            pa.table(
                {
                    "time_ns": pa.array([r.time_ns for r in outcome.ledger], pa.int64()),
                    "micro": pa.array([r.micro for r in outcome.ledger], pa.int32()),
                    "owner": pa.array([r.owner for r in outcome.ledger], pa.string()),
                    "variable": pa.array([r.variable for r in outcome.ledger], pa.string()),
                    "revision": pa.array([r.revision for r in outcome.ledger], pa.int64()),
                    "quality": pa.array([int(r.quality) for r in outcome.ledger], pa.int8()),
                    "value": pa.array([r.value for r in outcome.ledger], pa.list_(pa.float64())),
                }
            ),
            place / "ledger.parquet",
            compression="zstd",
        )
        pq.write_table(_event_table(outcome.events), place / "events.parquet")
        actions = [(r.time_ns, r.owner, r.action, r.refusal) for r in outcome.actions]
        pq.write_table(
            pa.table(
                {
                    "time_ns": pa.array([a[0] for a in actions], pa.int64()),
                    "owner": pa.array([a[1] for a in actions], pa.string()),
                    "member": pa.array([a[2].member for a in actions], pa.string()),
                    "actuator": pa.array([a[2].actuator for a in actions], pa.string()),
                    "entity": pa.array([a[2].entity for a in actions], pa.string()),
                    "value": pa.array([a[2].value for a in actions], pa.float64()),
                    "cause": pa.array([a[2].cause for a in actions], pa.string()),
                    "refusal": pa.array([a[3] for a in actions], pa.string()),
                }
            ),
            place / "actions.parquet",
        )


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: a place or bound that is not there becomes null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _event_table(events: Sequence[EventRecord]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([r.event.id for r in events], pa.string()),
            "time_ns": pa.array([r.time_ns for r in events], pa.int64()),
            "micro": pa.array([r.micro for r in events], pa.int32()),
            "rank": pa.array([r.rank for r in events], pa.int32()),
            "owner": pa.array([r.owner for r in events], pa.string()),
            "kind": pa.array([r.event.kind for r in events], pa.string()),
            "entity": pa.array([r.event.entity for r in events], pa.string()),
            "text": pa.array([r.event.text for r in events], pa.string()),
            "causes": pa.array([list(r.event.causes) for r in events], pa.list_(pa.string())),
            "via": pa.array([dict(r.via) for r in events], pa.map_(pa.string(), pa.string())),
        }
    )


def read_events(folder: Path, measure: str) -> list[EventRecord]:
    """The events of a reference run, in the order of the ledger."""
    path = folder / "reference" / measure / "events.parquet"
    if not path.is_file():
        raise ScenarioError(
            Reason.RUN_NOT_FOUND,
            f"{folder} keeps no events of the measure {measure!r}",
            {"folder": str(folder), "measure": measure},
        )
    return [
        EventRecord(
            row["time_ns"],
            row["micro"],
            row["rank"],
            row["owner"],
            Event(
                row["id"],
                row["time_ns"],
                row["kind"],
                row["entity"],
                row["text"],
                tuple(row["causes"]),
            ),
            tuple((cause, channel) for cause, channel in row["via"]),
        )
        for row in pq.read_table(path).to_pylist()
    ]


def read_domains(folder: Path) -> dict[str, str]:
    """The domain of each member, by its name."""
    text = (folder / "reference" / "descriptions.json").read_text(encoding="utf-8")
    return {name: description["domain"] for name, description in json.loads(text).items()}
