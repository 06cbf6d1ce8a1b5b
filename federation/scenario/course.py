"""A study under way: which runs are still to be done, and what has come of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from federation.errors import FederationError
from federation.scenario.design import Design
from federation.scenario.engine import Progress, remark
from federation.scenario.finding import PASSING, Finding
from federation.scenario.results import Intake, has_runs, read_table
from federation.scenario.run import Case
from federation.scenario.stopping import Stopping
from federation.scenario.study import Rows, kpis_of


class Course:
    """Hands out the runs of a design and takes in what they give, in any order.

    `resumed` goes on with what the folder has; runs that failed for a passing reason are done
    again. Who interrupts it calls `pause`, and may resume at any later time.
    """

    def __init__(
        self,
        design: Design,
        folder: Path,
        *,
        resumed: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.design = design
        self.done = 0
        self._intake = Intake(
            folder, design.documents(), design.samples, design.scenario.horizon_ns
        )
        self._stopping = Stopping(design.stop, design.measures, design.runs)
        self._progress = progress
        self._began_s = time.perf_counter()
        self._is_done: set[tuple[int, str]] = set()
        self._first_failure: FederationError | None = None
        self._any_good = False
        if resumed:
            self._intake.resume()
            rows = read_table(folder, "runs").to_pylist() if has_runs(folder) else ()
            for row in rows:
                if row["reason"] not in PASSING:
                    self._heard(row["run"], row["measure"], None if row["error"] else kpis_of(row))

    @property
    def total(self) -> int:
        """How many runs there are, as far as is known by now."""
        return self._stopping.runs * len(self.design.measures)

    def todo(self, wanted: Callable[[Case], bool] = lambda case: True) -> Iterator[Case]:
        """The runs that are not done yet, until there are enough."""
        for case in self.design.cases:
            if case.run >= self._stopping.runs:
                return
            if (case.run, case.measure) not in self._is_done and wanted(case):
                yield case

    def is_over(self) -> bool:
        """Whether every run that belongs to the study has come."""
        return self._stopping.is_over

    def take(self, finding: Finding) -> None:
        case = finding.case
        self._intake.take(finding)
        good = finding.failure is None
        self._first_failure = self._first_failure or finding.failure
        kpis = kpis_of(finding.row) if good else None
        self._heard(case.run, case.measure, kpis)
        if self._progress:
            text = remark(case, str(finding.row["error"]), float(finding.row["wall_s"]))
            self._progress(min(self.done, self.total), self.total, text)

    def _heard(self, run: int, measure: str, kpis: dict[str, float] | None) -> None:
        self._any_good |= kpis is not None
        self._is_done.add((run, measure))
        self.done += 1
        self._stopping.hear(run, measure, kpis)

    def pause(self) -> None:
        """Write what has come; the study may be resumed."""
        self._intake.flush()

    def gather(self) -> Rows:
        """The rows of all runs that belong to the study; raises when none of them succeeded."""
        if not self._any_good and self._first_failure is not None:
            raise self._first_failure
        rows: Rows = self._intake.gather(self._stopping.runs).to_pylist()
        return rows

    def finish(self, summary: dict[str, Any]) -> None:
        self._intake.finish(summary)
