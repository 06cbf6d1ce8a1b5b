"""A study as one object: its tables in Arrow, in pandas and under SQL, whole or still growing."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from federation.errors import Reason, ScenarioError
from federation.scenario.design import Design, read_design
from federation.scenario.results import (
    SCHEMAS,
    SUMMARY,
    TABLES,
    read_json,
    read_summary,
    read_table,
)
from federation.scenario.spec import Scenario, parse

REFERENCE = ("ledger", "events", "actions")
"""Tables of the reference runs, one per measure."""


class Study:
    """What a study has left in its folder. Reads when asked; fails with RUN_NOT_FOUND.

    A study that is still going on, or was interrupted, shows the runs that it has so far.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ScenarioError(
                Reason.RUN_NOT_FOUND,
                f"there is no study at {self.folder}",
                {"folder": str(self.folder)},
            )

    @property
    def is_whole(self) -> bool:
        return (self.folder / SUMMARY).is_file()

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.folder)

    @cached_property
    def design(self) -> Design:
        return read_design(self.folder)

    @cached_property
    def scenario(self) -> Scenario:
        path = self.folder / "scenario.yaml"
        design = self.folder / "study.json"
        beside = Path(read_json(design)["folder"]) if design.is_file() else None
        return parse(path.read_text(encoding="utf-8"), str(path), beside)

    @cached_property
    def runs(self) -> pa.Table:
        """A row per run and measure, in order."""
        return read_table(self.folder, "runs")

    @property
    def series(self) -> pa.Table:
        """Every scalar of every run, on the hour."""
        return self._table("series")

    @property
    def cascade(self) -> pa.Table:
        """How often one kind of event led to another, in each run."""
        return self._table("cascade")

    def _table(self, kind: str) -> pa.Table:
        if not (self.folder / "parts").is_dir() and not self._file(kind).is_file():
            return SCHEMAS[kind].empty_table()
        return read_table(self.folder, kind)

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.parquet"

    @cached_property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.runs["measure"].to_pylist()))

    @cached_property
    def kpis(self) -> tuple[str, ...]:
        return tuple(n.removeprefix("kpi.") for n in self.runs.column_names if n[:4] == "kpi.")

    @cached_property
    def sampled(self) -> tuple[str, ...]:
        """The parameters that runs differ in, given ones included."""
        path = self._file("samples")
        return tuple(pq.read_schema(path).names) if path.is_file() else ()

    def kpi(self, name: str) -> str:
        """The name of a KPI, with or without its member. Fails with UNKNOWN_VARIABLE."""
        short = name.rpartition(".")[2]
        if short not in self.kpis:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"the study has no KPI {name!r}; it has {', '.join(self.kpis)}",
                {"variable": name},
            )
        return short

    def measure(self, name: str | None) -> str:
        """A measure of the study, the first one for None. Fails with SCENARIO_INVALID."""
        if name is None:
            return self.measures[0]
        if name not in self.measures:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"the study has no measure {name!r}; it has {', '.join(self.measures)}",
                {"measure": name},
            )
        return name

    def good(self, measure: str) -> pd.DataFrame:
        """The runs of a measure that did not fail, by their number."""
        table = self.runs.filter(
            pc.and_(pc.equal(self.runs["measure"], measure), pc.equal(self.runs["error"], ""))
        )
        found: pd.DataFrame = table.to_pandas()
        return found.set_index("run").sort_index()

    def frame(self, kind: str = "runs") -> pd.DataFrame:
        """`runs`, `series` or `cascade` in pandas."""
        table: pa.Table = getattr(self, kind)
        found: pd.DataFrame = table.to_pandas()
        return found

    def reference(self, kind: str, measure: str | None = None) -> pa.Table:
        """`ledger`, `events` or `actions` of run 0 under a measure."""
        path = self.folder / "reference" / self.measure(measure) / f"{kind}.parquet"
        if not path.is_file():
            raise ScenarioError(
                Reason.RUN_NOT_FOUND, f"{path} is not there", {"folder": str(self.folder)}
            )
        return pq.read_table(path)

    def nearest(self, kpi: str, measure: str, share: float) -> int:
        """The run whose KPI is nearest to the quantile `share`, the first of several."""
        values = self.good(measure)[f"kpi.{self.kpi(kpi)}"]
        distance = (values - float(np.quantile(values, share))).abs()
        return int(distance.index[int(np.argmin(distance.to_numpy()))])

    def query(self, sql: str) -> pa.Table:
        """The answer of DuckDB to SQL over the views `runs`, `series`, `cascade`, `ledger`,
        `events` and `actions`, the last three of run 0 with a column `measure`.

        Nothing can be changed, and no other file be read. Fails with QUERY_FAILED.
        """
        try:
            import duckdb
        except ImportError:
            raise ScenarioError(
                Reason.MISSING_EXTRA, "a query needs DuckDB: install multitwin[study]"
            ) from None
        with duckdb.connect(":memory:") as connection:
            for kind in TABLES:
                connection.register(kind, self._source(kind))
            for kind in REFERENCE:
                parts = []
                for i, path in enumerate(self.folder.glob(f"reference/*/{kind}.parquet")):
                    connection.register(f"_{kind}_{i}", ds.dataset(path))
                    name = path.parent.name.replace("'", "''")
                    parts.append(f"SELECT '{name}' AS measure, * FROM _{kind}_{i}")
                if parts:
                    connection.execute(f"CREATE VIEW {kind} AS {' UNION ALL BY NAME '.join(parts)}")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET python_enable_replacements = false")
            connection.execute("SET lock_configuration = true")
            try:
                statements = connection.extract_statements(sql)
                if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                    raise ScenarioError(
                        Reason.QUERY_FAILED, "a query is one SELECT; a study can only be read"
                    )
                found: pa.Table = connection.sql(sql).to_arrow_table()
            except duckdb.Error as error:
                text = str(error).strip()
                raise ScenarioError(Reason.QUERY_FAILED, text) from None
            return found

    def _source(self, kind: str) -> Any:
        """What DuckDB reads: files as they lie there, so that a large table is not loaded."""
        if self.is_whole and self._file(kind).is_file():
            return ds.dataset(self._file(kind))
        return self.runs if kind == "runs" else self._table(kind)
