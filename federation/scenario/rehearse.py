"""Forks a run in this process: to go on exactly as it would, or into futures it might have.

A fork starts from a consistent cut, the beginning of an instant: everything before it is
settled, nothing of it has begun. What never changes (wiring, descriptions, arrays that nobody
writes to) is shared; all else is copied, and twins are restored from a snapshot into fresh
objects. The run that is forked does not feel it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from federation.core.ledger import Entry, Record
from federation.core.schedule import Schedule
from federation.errors import Reason, ScenarioError
from federation.scenario.future import Future
from federation.scenario.run import Case, Experiment, build_twin, medians
from federation.scenario.spec import PLANNER, Scenario
from federation.twin import (
    NOTHING,
    Glimpse,
    LinearBlock,
    Planner,
    Session,
    Twin,
    Vector,
    blame,
)


class Foresight:
    """Lets the planner of a run deliberate at the cut before each of its steps."""

    def __init__(
        self,
        scenario: Scenario,
        case: Case,
        experiment: Experiment,
        sessions: Mapping[str, Session],
        planner: Planner,
    ) -> None:
        self.scenario = scenario
        self.case = case
        self.experiment = experiment
        self.sessions = sessions
        self.planner = planner

    def attend(self, schedule: Schedule) -> None:
        """Have the planner called before its steps in this schedule."""
        self.schedule = schedule
        schedule.watch(PLANNER, lambda time_ns: self.planner.deliberate(self.cut(time_ns)))

    def cut(self, time_ns: int) -> RunCut:
        return RunCut(self, time_ns)

    def fresh(self, member: str) -> Twin:
        """Another twin object of a member that is built by its class."""
        spec = self.scenario.members[member]
        if spec.twin is None:
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"{member} is a service at {spec.address}; only members in this process are forked",
                {"member": member},
            )
        return build_twin(spec.twin, spec.config)


@dataclass
class RunCut:
    """The run at the beginning of an instant (see `federation.twin.Cut`)."""

    foresight: Foresight
    time_ns: int
    _states: dict[str, bytes] = field(default_factory=dict)

    @property
    def horizon_ns(self) -> int:
        return self.foresight.scenario.horizon_ns

    @property
    def digest(self) -> str:
        return self.foresight.schedule.ledger.digest()

    @property
    def weights(self) -> Mapping[str, float]:
        return self.foresight.scenario.weighted

    @property
    def versions(self) -> Mapping[str, str]:
        return {
            name: f"{session.description.model} {session.description.version}"
            for name, session in self.foresight.sessions.items()
        }

    def seen(self, member: str, output: str) -> Vector:
        value = self.foresight.schedule.seen(member, output)
        if value is not None:
            return value
        description = self.foresight.sessions[member].description
        variable = next(v for v in description.outputs() if v.name == output)
        return np.full(len(description.ids(variable.kind)), variable.initial)

    def exact(self, planner: Planner | None) -> tuple[str, Schedule]:
        """Let the run go on in a fork to its end, unchanged; its digest and the schedule.

        `planner` is another object that stands where the run's does.
        """
        case = self.foresight.case
        sessions = self._sessions(
            planner, case.parameters, {n: case.member_seed(n) for n in self.foresight.sessions}
        )
        schedule = self.foresight.schedule.fork(
            sessions, self.horizon_ns, lambda member, output: False, hashes=True
        )
        if planner is not None and planner.foresees():
            inner = Foresight(
                self.foresight.scenario, case, self.foresight.experiment, sessions, planner
            )
            inner.attend(schedule)
        return self._finish(schedule, sessions, lambda entries: None), schedule

    def future(
        self,
        number: int,
        planner: Planner,
        until_ns: int,
        believed: Mapping[str, Mapping[str, Vector]] = NOTHING,
    ) -> Glimpse:
        case, scenario = self.foresight.case, self.foresight.scenario
        other = Future(number).case(scenario, case, self.time_ns)
        sessions = self._sessions(
            planner, other.parameters, {n: other.member_seed(n) for n in self.foresight.sessions}
        )
        wishes: dict[str, int | None] = {}
        for name, session in sessions.items():
            if name != PLANNER:
                with blame(name):
                    known = {p.name: p.default for p in session.description.parameters}
                    wishes[name] = session.twin.diverge(
                        self.time_ns,
                        other.member_seed(name),
                        {**known, **other.parameters.get(name, {})},
                        believed.get(name, NOTHING),
                    )
        figures = {(n.partition(".")[0], n.partition(".")[2]) for n in self.weights}
        series = {
            f"{member}.{output}": [(self.time_ns, float(self.seen(member, output)[0]))]
            for member, output in sorted(figures)
        }

        def note(entries: Iterable[Entry]) -> None:
            for entry in entries:
                if isinstance(entry, Record):
                    point = (entry.time_ns, float(entry.value[0]))
                    series[f"{entry.owner}.{entry.variable}"].append(point)

        schedule = self.foresight.schedule.fork(
            sessions, min(until_ns, self.horizon_ns), lambda m, output: (m, output) in figures
        )
        for name, next_ns in wishes.items():
            schedule.wake(name, next_ns)
        self._finish(schedule, sessions, note)
        return Glimpse(number, {n: tuple(points) for n, points in series.items()}, until_ns)

    def believed_blocks(
        self, from_ns: int, periods_ns: tuple[int, ...], members: Sequence[str] = ()
    ) -> Mapping[str, LinearBlock]:
        known = medians(self.foresight.scenario, self.foresight.case)
        names = members or tuple(self.foresight.sessions)
        return self._blocks(names, from_ns, periods_ns, known, lambda _: 0)

    def blocks(self, number: int, periods_ns: tuple[int, ...]) -> Mapping[str, LinearBlock]:
        case, scenario = self.foresight.case, self.foresight.scenario
        other = Future(number).case(scenario, case, self.time_ns)
        names = tuple(self.foresight.sessions)
        return self._blocks(names, self.time_ns, periods_ns, other.parameters, other.member_seed)

    def _blocks(
        self,
        names: Collection[str],
        from_ns: int,
        periods_ns: tuple[int, ...],
        parameters: Mapping[str, Mapping[str, float]],
        seed_of: Callable[[str], int],
    ) -> dict[str, LinearBlock]:
        """What members could do from an instant on, asked of twins that have diverged there."""
        found = {}
        for name, session in self.foresight.sessions.items():
            if name == PLANNER or name not in names:
                continue
            with blame(name):
                given = {p.name: p.default for p in session.description.parameters}
                given |= parameters.get(name, {})
                twin = self._restored(name, seed_of(name), given)
                twin.diverge(from_ns, seed_of(name), given)
                block = twin.flexibility(periods_ns)
                twin.close()
            if block is not None:
                found[name] = block
        return found

    def _restored(self, name: str, seed: int, parameters: Mapping[str, float]) -> Twin:
        """A fresh twin that stands where that of the run does."""
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = self.foresight.sessions[name].twin.snapshot()
        twin = self.foresight.fresh(name)
        twin.open(seed, parameters)
        twin.restore(state)
        return twin

    def _sessions(
        self,
        planner: Planner | None,
        parameters: Mapping[str, Mapping[str, float]],
        seeds: Mapping[str, int],
    ) -> dict[str, Session]:
        """Sessions of fresh twins that stand where those of the run do."""
        found = {}
        for name, session in self.foresight.sessions.items():
            if name == PLANNER:
                assert planner is not None
                found[name] = session.fork(planner)
                continue
            with blame(name):
                given = {p.name: p.default for p in session.description.parameters}
                given |= parameters.get(name, {})
                found[name] = session.fork(self._restored(name, seeds[name], given))
        return found

    def _finish(
        self,
        schedule: Schedule,
        sessions: Mapping[str, Session],
        note: Callable[[Iterable[Entry]], None],
    ) -> str:
        try:
            return schedule.run(lambda entries, settled_ns: note(entries))
        finally:
            for session in sessions.values():
                session.twin.close()
