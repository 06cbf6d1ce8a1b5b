"""What a study leaves in its folder: figures as JSON, everything else as Parquet.

summary.json                     the figures that others script against; comes last
study.json                       what makes the study the one it is, for who resumes it
scenario.yaml                    the scenario as it was run
samples.parquet                  a row per run: what its uncertain parameters are
sensitivity.json                 how the effect of a measure moves with an assumption
parts/KIND-00001.parquet         tables of runs as they come, until the study is whole
runs.parquet                     a row per run and measure: seed, digest, draws, KPIs, costs
series.parquet                   every scalar of every run, on the hour
cascade.parquet                  how often one kind of event led to another, in each run
reference/descriptions.json      the members: entities with places, variables with units
reference/MEASURE/ledger.parquet every value of run 0, and events.parquet, actions.parquet

A file is written beside its place and then moved there, so none is ever half there. Of a part,
`runs` comes last: without it, the others of its number do not count.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from federation.core.ledger import EventRecord
from federation.errors import Reason, ScenarioError
from federation.scenario.finding import Finding
from federation.scenario.run import Outcome
from federation.twin import Event

SUMMARY = "summary.json"
DESIGN = "study.json"
WAITS = "critical_path.json"
TABLES = ("series", "cascade", "runs")
"""What grows with the runs; `runs` is the last to be written of a part."""

MOST_WAITING = 500
WAIT_S = 2.0
"""A part is written when so many runs have come, or this long after the last one."""


class Intake:
    """Takes runs into the folder of a study as they come, and makes one whole of them.

    Nothing is written before the first run that did not fail, so a request that can't be met
    leaves no trace. `documents` are texts by file name, and `samples` what each run draws.
    """

    def __init__(
        self,
        folder: Path,
        documents: Mapping[str, str],
        samples: Sequence[Mapping[str, float]],
        horizon_ns: int,
    ) -> None:
        self.folder = folder
        self._documents = documents
        self._samples = samples
        self._horizon_ns = horizon_ns
        self._waiting: list[Finding] = []
        self._count = 0
        self._is_begun = False
        self._written_s = time.monotonic()

    def begin(self) -> None:
        """Make the folder that of this study; what another left there goes."""
        clear(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = dict.fromkeys(name for sample in self._samples for name in sample)
        table = pa.table({name: [s.get(name) for s in self._samples] for name in columns})
        write_table(table, self.folder / "samples.parquet")
        for name, text in self._documents.items():  # with the last of them it can be resumed
            write_text(self.folder / name, text)
        self._is_begun = True

    def resume(self) -> None:
        """Go on with the folder as it is."""
        self._count = max(_part_numbers(self.folder), default=0)
        self._is_begun = True

    def take(self, finding: Finding) -> None:
        if finding.whole is not None and finding.failure is None:
            if not self._is_begun:
                self.begin()
            write_reference(self.folder, [finding.whole])
        self._waiting.append(finding)
        is_old = time.monotonic() - self._written_s > WAIT_S
        if is_old or len(self._waiting) >= MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write what has come as one part."""
        if not self._waiting or not (
            self._is_begun or any(finding.failure is None for finding in self._waiting)
        ):
            return
        if not self._is_begun:
            self.begin()
        parts = self.folder / "parts"
        parts.mkdir(exist_ok=True)
        made = {
            "series": _series_table(self._waiting),
            "cascade": _cascade_table(self._waiting),
            "runs": _runs_table(self._waiting),
        }
        for kind in TABLES:
            write_table(made[kind], parts / f"{kind}-{self._count + 1:05d}.parquet")
        self._count += 1
        self._waiting.clear()
        self._written_s = time.monotonic()

    def gather(self, runs: int) -> pa.Table:
        """Make one table of each kind of all parts, for the first `runs` runs; gives `runs`."""
        self.flush()
        table = read_table(self.folder, "runs")
        table = table.filter(pa.compute.less(table["run"], runs))
        write_table(table, self.folder / "runs.parquet")
        for kind in TABLES[:-1]:
            target = self.folder / f"{kind}.parquet"
            with (
                whole(target) as part,
                pq.ParquetWriter(part, SCHEMAS[kind], compression="zstd") as writer,
            ):
                for piece in _pieces(self.folder, kind):
                    writer.write_table(piece.filter(pa.compute.less(piece["run"], runs)))
        return table

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The study is whole."""
        write_summary(self.folder, summary)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


SCHEMAS: Mapping[str, pa.Schema] = {
    "series": pa.schema(
        [
            ("run", pa.int64()),
            ("measure", pa.string()),
            ("variable", pa.string()),
            ("time_h", pa.int64()),
            ("value", pa.float64()),
        ]
    ),
    "cascade": pa.schema(
        [
            ("run", pa.int64()),
            ("measure", pa.string()),
            ("is_path", pa.bool_()),
            ("kinds", pa.list_(pa.string())),
            ("count", pa.int64()),
        ]
    ),
}


def _runs_table(findings: Sequence[Finding]) -> pa.Table:
    columns = dict.fromkeys(name for finding in findings for name in finding.row)
    return pa.table({name: [f.row.get(name) for f in findings] for name in columns})


def _series_table(findings: Sequence[Finding]) -> pa.Table:
    pieces = []
    for finding in findings:
        for name, values in finding.series.items():
            size = len(values)
            pieces.append(
                pa.table(
                    [
                        pa.array(np.full(size, finding.case.run)),
                        pa.repeat(finding.case.measure, size),
                        pa.repeat(name, size),
                        pa.array(np.arange(size)),
                        pa.array(values),
                    ],
                    schema=SCHEMAS["series"],
                )
            )
    return pa.concat_tables(pieces) if pieces else SCHEMAS["series"].empty_table()


def _cascade_table(findings: Sequence[Finding]) -> pa.Table:
    rows = [
        {
            "run": finding.case.run,
            "measure": finding.case.measure,
            "is_path": is_path,
            "kinds": list(kinds),
            "count": count,
        }
        for finding in findings
        for is_path, counted in ((False, finding.links), (True, finding.paths))
        for kinds, count in counted.items()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["cascade"])


def _part_numbers(folder: Path) -> list[int]:
    """The parts that count, in order."""
    found = (folder / "parts").glob("runs-*.parquet")
    return sorted(int(path.stem.rpartition("-")[2]) for path in found)


def _pieces(folder: Path, kind: str) -> Iterator[pa.Table]:
    """The parts of a table one by one, each run only where it counts: where it came last."""
    numbers = _part_numbers(folder)
    keys = {
        number: pq.read_table(
            folder / "parts" / f"runs-{number:05d}.parquet", columns=["run", "measure"]
        ).to_pylist()
        for number in numbers
    }
    last = {(row["run"], row["measure"]): n for n in numbers for row in keys[n]}
    for number in numbers:
        table = pq.read_table(folder / "parts" / f"{kind}-{number:05d}.parquet")
        gone = {key for row in keys[number] if last[key := (row["run"], row["measure"])] != number}
        if gone:
            pairs = zip(table["run"].to_pylist(), table["measure"].to_pylist(), strict=True)
            table = table.filter(pa.array([pair not in gone for pair in pairs]))
        yield table


def has_runs(folder: Path) -> bool:
    return bool(_part_numbers(folder)) or (folder / "runs.parquet").is_file()


def read_table(folder: Path, kind: str) -> pa.Table:
    """One of `TABLES`, also of a study that is not whole; `runs` in the order of runs."""
    whole = folder / f"{kind}.parquet"
    if whole.is_file() and not _part_numbers(folder):
        return pq.read_table(whole)
    pieces = list(_pieces(folder, kind))
    if not pieces:
        if kind in SCHEMAS and (folder / "runs.parquet").is_file():
            return SCHEMAS[kind].empty_table()
        raise ScenarioError(
            Reason.RUN_NOT_FOUND, f"{folder} holds no runs of a study", {"folder": str(folder)}
        )
    table = pa.concat_tables(pieces, promote_options="permissive")
    if kind == "runs":
        order = {name: i for i, name in enumerate(_measures(folder))}
        rank = [order.get(name, len(order)) for name in table["measure"].to_pylist()]
        places = np.lexsort((rank, table["run"].to_numpy()))
        table = table.take(pa.array(places))
    return table


def _measures(folder: Path) -> Sequence[str]:
    path = folder / DESIGN
    found: Sequence[str] = read_json(path)["measures"] if path.is_file() else ()
    return found


def clear(folder: Path) -> None:
    """Remove what a study left in a folder, the summary first, and nothing else."""
    for name in (
        SUMMARY,
        DESIGN,
        "sensitivity.json",
        "indices.json",
        "quantiles.json",
        "samples.parquet",
    ):
        (folder / name).unlink(missing_ok=True)
    for kind in TABLES:
        (folder / f"{kind}.parquet").unlink(missing_ok=True)
    for name in ("parts", "reference", "explained"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file when it is whole; whoever ends before leaves nothing."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table whole or not at all."""
    with whole(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_sensitivity(folder: Path, sensitivity: Mapping[str, Any]) -> None:
    text = json.dumps(sensitivity, indent=2, allow_nan=False)
    write_text(folder / "sensitivity.json", text + "\n")


def read_runs(folder: Path) -> dict[tuple[int, str], dict[str, float]]:
    """The KPIs of every run that did not fail, by run and measure."""
    return {
        (row["run"], row["measure"]): {
            name.removeprefix("kpi."): value
            for name, value in row.items()
            if name.startswith("kpi.")
        }
        for row in read_table(folder, "runs").to_pylist()
        if not row["error"]
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    if not path.is_file():
        raise ScenarioError(
            Reason.RUN_NOT_FOUND,
            f"{folder} holds no finished run: there is no {SUMMARY}",
            {"folder": str(folder)},
        )
    return read_json(path)


def write_reference(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the whole ledger of one run per measure, for maps, trees and charts."""
    reference = folder / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    descriptions = outcomes[0].descriptions if outcomes else {}
    text = json.dumps({n: _plain(asdict(d)) for n, d in descriptions.items()})
    write_text(reference / "descriptions.json", text)
    for outcome in outcomes:
        place = reference / outcome.case.measure
        place.mkdir(exist_ok=True)
        write_table(
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
        )
        write_table(_event_table(outcome.events), place / "events.parquet")
        write_text(place / WAITS, json.dumps(_plain(_waits_of(outcome))))
        actions = [(r.time_ns, r.owner, r.action, r.refusal) for r in outcome.actions]
        write_table(
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


def _waits_of(outcome: Outcome) -> dict[str, Any]:
    """What the wall time of a run went to; if it was paced, how late it was; what was too old."""
    path = outcome.critical_path
    found: dict[str, Any] = {"run": outcome.case.run, "measure": outcome.case.measure}
    if path is not None:
        found |= {"wall_s": path.wall_s, **asdict(path)}
    if outcome.pace is not None:
        found["pace"] = dict(outcome.pace)
    if outcome.stale:
        found["stale"] = [asdict(stale) for stale in outcome.stale]
    return found


def read_waits(folder: Path, measure: str) -> dict[str, Any]:
    """The `critical_path` of a summary, from a reference run."""
    return read_json(folder / "reference" / measure / WAITS)


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
