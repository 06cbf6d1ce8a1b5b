"""Tries what might be done in futures of a live run, and says what it would come to."""

from __future__ import annotations

import asyncio

import numpy as np

from federation.control import audit
from federation.control.draft import is_anybody_free, lease_ns
from federation.control.loop import IN_FORCE, Rating
from federation.control.mandate import Mandate
from federation.control.situation import Forecast, Series
from federation.control.trials import Trial, Trials
from federation.control.turn import Candidate, Known, LiveCut
from federation.control.view import Observation, Variable, variable_of
from federation.core.bundle import Bundle, Setpoint
from federation.errors import Reason, ScenarioError
from federation.twin import MINUTE_NS, Action, Vector


class Outlook:
    """What can be tried in a run, and how it is weighed.

    Fails with SCENARIO_INVALID when nothing says what is better.
    """

    def __init__(self, mandate: Mandate) -> None:
        scenario = mandate.view.scenario
        if not scenario.weighted:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                "the scenario does not weigh its figures (`weighted`): nothing says what is better",
            )
        self._mandate = mandate
        self._view = mandate.view
        self.measures = mandate.terms.measures or tuple(
            name
            for name, measure in scenario.measures.items()
            if name != mandate.view.measure and measure.crews != "level5"
        )
        self.weights: dict[Variable, float] = {
            variable_of(name): weight for name, weight in scenario.weighted.items()
        }
        self.change_rules()

    def change_rules(self) -> None:
        """Bring back from trials what the rules that are in force look at."""
        nevers = [variable_of(never.variable) for never in self._mandate.rules.never]
        self.trials = Trials(self._view, self.weights, nevers)
        self._mandate.shelf.wanted = self.trials.wanted

    def weighted(self, cut: Observation) -> float:
        """The weighted figure as it stands; what was never told counts as nothing."""
        return sum(w * (cut.value(*variable) or 0.0) for variable, w in self.weights.items())

    def basis_of(self, known: Known) -> audit.Basis:
        """All that a decision rests on."""
        mandate = self._mandate
        terms = mandate.terms
        return audit.Basis(
            snapshot=known.cut.digest(),
            versions=LiveCut(known.cut, mandate.view).versions,
            seed=mandate.view.scenario.seed,
            rules_version=mandate.rules.version,
            inputs={
                "cut_ns": known.cut.time_ns,
                "until_ns": known.until_ns,
                "futures": terms.futures,
                "every_ns": terms.every_ns,
                "measures": [mandate.view.measure, *self.measures],
                "weights": {".".join(v): w for v, w in self.weights.items()},
                "moves_by": terms.moves_by,
                "held": [
                    [*place, held.value, int(held.priority), held.owner, held.until_ns]
                    for place, held in sorted(known.desks.holdings.items())
                ],
            },
        )

    async def try_all(self, known: Known) -> dict[str, Candidate]:
        """Every measure and what is in force, in the same futures. A measure that can't be tried
        is left out; what is in force must be. It is tried alone while all crews are engaged, as
        others could then send nobody before the next decision."""
        measures = {IN_FORCE: self._view.measure}
        if is_anybody_free(self._mandate, known.cut):
            measures |= {name: name for name in self.measures}
        count = self._mandate.terms.futures
        attempts = [(measure, n) for measure in measures.values() for n in range(count)]
        tried = await self.trials.run_all(known.cut, attempts, known.until_ns)
        found: dict[str, Candidate] = {}
        for place, name in enumerate(measures):
            trials: list[Trial] = []
            for one in tried[place * count : (place + 1) * count]:
                if isinstance(one, Trial):
                    trials.append(one)
                elif name == IN_FORCE:
                    raise one
                else:
                    why = {"measure": name, "why": str(one)}
                    self._mandate.note(audit.Noted("not tried", why))
                    break
            else:
                found[name] = Candidate(name, tuple(trials), self._setpoints(name, trials[0]))
        return found

    def _setpoints(self, name: str, trial: Trial) -> tuple[Setpoint, ...]:
        """What a candidate would set at once."""
        if name == IN_FORCE:
            return ()
        return tuple(
            Setpoint(
                a.member,
                a.actuator,
                a.entity,
                a.value,
                lease_ns(self._mandate, a.member, a.actuator),
            )
            for a in trial.first(self._mandate.terms.every_ns)
        )

    def rated(self, candidate: Candidate, known: Known) -> Rating:
        growth = [trial.growth(self.weights, known.until_ns) for trial in candidate.trials]
        figures = {
            ".".join(variable): float(
                np.mean([t.growth({variable: 1.0}, known.until_ns) for t in candidate.trials])
            )
            for variable in self.weights
        }
        return Rating(candidate.name, tuple(growth), figures)

    async def foreseen(self, bundle: Bundle) -> Forecast | None:
        """What forks expect from now on of a bundle that no measure of the scenario sets; None
        where no rule looks ahead. Fails as `ForkRun` does."""
        ahead_min = max((never.forecast_min for never in self._mandate.rules.never), default=0.0)
        if not ahead_min:
            return None
        cut, measure = self._view.now(), self._view.measure
        until_ns = cut.time_ns + round(ahead_min * MINUTE_NS) + self._mandate.terms.every_ns
        until_ns = min(until_ns, self._view.scenario.horizon_ns)
        actions = [Action(s.member, s.actuator, s.entity, s.value) for s in bundle.setpoints]
        numbers = range(self._mandate.terms.futures)
        tried = [self.trials.run(cut, measure, n, until_ns, actions) for n in numbers]
        trials = tuple(await asyncio.gather(*tried))
        return self.forecast_of(bundle, Candidate(IN_FORCE, trials, ()), until_ns)

    def forecast_of(self, bundle: Bundle, candidate: Candidate, until_ns: int) -> Forecast:
        """What the forks expect of the outputs that must never be wrong for long: at each instant
        the worst of all futures, which went on until `until_ns`, told or not."""
        found: dict[tuple[str, str], Series] = {}
        for never in self._mandate.rules.never:
            variable = variable_of(never.variable)
            all_series = [trial.series(variable) for trial in candidate.trials]
            times = sorted({until_ns, *(t for series in all_series for t in series.times_ns)})
            rows = np.array([[_at(series, t) for t in times] for series in all_series])
            low, high = rows.min(axis=0), rows.max(axis=0)
            worst = np.where(never.low - low > high - never.high, low, high)
            found[variable] = Series(tuple(times), worst)
        return Forecast(bundle.digest(), found)


def _at(series: Series, time_ns: int) -> Vector:
    found: Vector = series.values[0]
    for when_ns, value in zip(series.times_ns, series.values, strict=True):
        if when_ns > time_ns:
            break
        found = value
    return found
