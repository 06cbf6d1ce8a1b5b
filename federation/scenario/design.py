"""What makes a study the one it is, so that another process can go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from federation.errors import Reason, ScenarioError
from federation.scenario.results import DESIGN, read_json
from federation.scenario.run import Case
from federation.scenario.sampling import draws
from federation.scenario.spec import Scenario, Stop, parse
from federation.scenario.study import cases_of


@dataclass(frozen=True)
class Design:
    """What makes a study the one it is: equal designs give equal digests, however often they are
    interrupted and wherever they run."""

    scenario: Scenario
    seed: int
    measures: tuple[str, ...]
    samples: tuple[Mapping[str, float], ...]
    """Per run, of as many as there may be, its uncertain parameters."""
    stop: Stop | None = None
    members: str = "local"
    pace: float | None = None

    @property
    def runs(self) -> int:
        return len(self.samples)

    @cached_property
    def cases(self) -> list[Case]:
        return cases_of(self.scenario, self.measures, self.samples, self.seed)

    def case(self, run: int, measure: str) -> Case:
        """One run by its number. Fails with RUN_NOT_FOUND."""
        for case in self.cases:
            if (case.run, case.measure) == (run, measure):
                return case
        raise ScenarioError(
            Reason.RUN_NOT_FOUND,
            f"the study has no run {run}:{measure}; there are {self.runs} runs of "
            f"{', '.join(self.measures)}",
            {"run": str(run), "measure": measure},
        )

    def documents(self) -> dict[str, str]:
        """The files from which `read_design` has it again, but for the samples."""
        text = self.scenario.text or yaml.safe_dump(
            self.scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        )
        design = {
            "folder": str(self.scenario.folder.resolve()),
            "seed": self.seed,
            "measures": list(self.measures),
            "runs": self.runs,
            "stop": self.stop.model_dump(exclude_unset=True) if self.stop else None,
            "members": self.members,
            "pace": self.pace,
        }
        return {"scenario.yaml": text, DESIGN: json.dumps(design, indent=2) + "\n"}


def design(
    scenario: Scenario,
    *,
    measures: Sequence[str] = (),
    runs: int | None = None,
    seed: int | None = None,
    members: str = "local",
    pace: float | None = None,
) -> Design:
    """The study that a scenario describes; `runs` takes the place of its stopping rule."""
    seed = scenario.seed if seed is None else seed
    stop = scenario.stop if runs is None else None
    most = runs or (stop.most if stop else 1)
    samples = tuple(draws(scenario, most, seed))
    chosen = tuple(measures or scenario.measures)
    found = Design(scenario, seed, chosen, samples, stop, members, pace)
    cases_of(scenario, chosen, (), seed)  # are the measures there?
    return found


def read_design(folder: Path) -> Design:
    """The design of a study from its folder. Fails with RUN_NOT_FOUND."""
    if not (folder / DESIGN).is_file():
        raise ScenarioError(
            Reason.RUN_NOT_FOUND,
            f"{folder} holds no study that can go on: there is no {DESIGN}",
            {"folder": str(folder)},
        )
    told = read_json(folder / DESIGN)
    path = folder / "scenario.yaml"
    scenario = parse(path.read_text(encoding="utf-8"), str(path), Path(told["folder"]))
    if told["pace"] is not None:
        scenario = scenario.paced(told["pace"])
    samples = pq.read_table(folder / "samples.parquet").to_pylist() or [{}] * told["runs"]
    return Design(
        scenario,
        told["seed"],
        tuple(told["measures"]),
        tuple(samples),
        Stop.model_validate(told["stop"]) if told["stop"] else None,
        told["members"],
        told["pace"],
    )
