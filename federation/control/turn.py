"""One turn of a live loop: what is known, what was tried, what it would set, what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from federation.control.loop import IN_FORCE, Rating
from federation.control.situation import Verdict
from federation.control.trials import Trial
from federation.control.view import Desks, LiveView, Observation
from federation.core.bundle import Bundle, Setpoint
from federation.errors import Reason, ScenarioError
from federation.twin import NOTHING, Planner, Vector


@dataclass(frozen=True)
class Candidate:
    """A measure that was tried, and what it would have set at once."""

    name: str
    trials: tuple[Trial, ...]
    setpoints: tuple[Setpoint, ...]


@dataclass(frozen=True)
class Known:
    """What is known at a decision."""

    cut: Observation
    desks: Desks
    until_ns: int


@dataclass
class Made:
    """A decision on its way: what it would set, what was said of it, and what came of it."""

    id: str
    known: Known
    bundle: Bundle | None = None
    verdict: Verdict | None = None
    outcome: str = ""
    """`advised`, `proposed`, `committed`, `compensated`, `overtaken`, `recovery`, `nothing`, ..."""
    chosen: str = IN_FORCE
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    ratings: tuple[Rating, ...] = ()
    is_shadow: bool = False
    """Nobody followed it, and it waits to be scored."""


@dataclass(frozen=True)
class LiveCut:
    """A cut of a live run (see `federation.twin.Cut`)."""

    observation: Observation
    view: LiveView

    @property
    def time_ns(self) -> int:
        return self.observation.time_ns

    @property
    def horizon_ns(self) -> int:
        return self.view.scenario.horizon_ns

    @property
    def digest(self) -> str:
        return self.observation.digest()

    @property
    def weights(self) -> Mapping[str, float]:
        return self.view.scenario.weighted

    @property
    def versions(self) -> Mapping[str, str]:
        return {n: f"{d.model} {d.version}" for n, d in self.view.descriptions.items()}

    def seen(self, member: str, output: str) -> Vector:
        return self.observation.readings[member, output].values

    def future(
        self,
        number: int,
        planner: Planner,
        until_ns: int,
        believed: Mapping[str, Mapping[str, Vector]] = NOTHING,
    ) -> Any:
        raise ScenarioError(
            Reason.UNSUPPORTED, "futures of a live run go on under a measure of its scenario"
        )
