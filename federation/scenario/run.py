"""One run of a scenario: what it is opened with, how it goes in one process, what it leaves."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from federation.core.ages import Stale
from federation.core.coordinator import FRAME_STEPS, Coordinator
from federation.core.coupling import Actuation, Coupling, Wiring, wire
from federation.core.critical import CriticalPath, path_in_one_thread
from federation.core.envelope import Pool
from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
from federation.core.messages import (
    Aborted,
    Commit,
    Degraded,
    Effect,
    Failed,
    Finished,
    Grant,
    Stepped,
)
from federation.core.schedule import Schedule
from federation.errors import FederationError, Reason, ScenarioError
from federation.scenario.sampling import quantile
from federation.scenario.spec import PLANNER, Scenario
from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Description,
    LinearBlock,
    Planner,
    Session,
    StepInput,
    StepResult,
    Twin,
    blame,
)

if TYPE_CHECKING:
    from federation.scenario.rehearse import Foresight

WEIGHTED = "weighted"
"""The KPI that weighs the others as the scenario says; smaller is better."""


@dataclass(frozen=True)
class Case:
    """One run under one measure: everything that tells it from its siblings.

    `parameters` are by member. The seed does not depend on the measure, so that measures
    are compared on common random numbers.
    """

    run: int
    seed: int
    measure: str
    parameters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def member_seed(self, member: str) -> int:
        """A seed of 63 bits for one member, from the study's seed, the run and its name."""
        text = f"{self.seed}/{self.run}/{member}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class MemberCost:
    """What a member took: wall and CPU seconds inside its steps, and their number.

    Wall time is measured at every step. In one process CPU time is, too, for members whose
    steps take 50 microseconds and more; for quicker ones, which measuring would slow by a
    tenth, it is taken as the share of wall time in which the thread worked (see
    `Schedule.costs`).
    """

    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def plus(self, steps: int, wall_s: float, cpu_s: float) -> MemberCost:
        return MemberCost(self.steps + steps, self.wall_s + wall_s, self.cpu_s + cpu_s)


@dataclass
class Outcome:
    """What a run left: figures and events always, ledger and descriptions when kept."""

    case: Case
    digest: str = ""
    kpis: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Per scalar `member.variable` its `(time_ns, value)` at each change."""
    events: list[EventRecord] = field(default_factory=list)
    actions: list[ActionRecord] = field(default_factory=list)
    ledger: list[Record] = field(default_factory=list)
    descriptions: Mapping[str, Description] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    costs: dict[str, MemberCost] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    recoveries: list[tuple[str, str, float]] = field(default_factory=list)
    """Members that were lost and came back: who, why, and after how many seconds."""
    failure: FederationError | None = None
    critical_path: CriticalPath | None = None
    """What the wall time went to; None for a run that failed."""
    pace: Mapping[str, float | str] | None = None
    """How a paced run kept to the wall clock (`federation.broker.pace.Pacer.report`)."""
    stale: list[Stale] = field(default_factory=list)
    """Values that were older at the end of a live run than the scenario allows."""

    @property
    def error(self) -> str:
        """Why the run failed, with its reason; empty when it did not."""
        return "" if self.failure is None else str(self.failure)


PlannerFactory = Callable[[Scenario, Mapping[str, Description], Any], Planner]
"""Builds the planner of a scenario for a policy, of crews or of dispatch, whichever it has."""


@dataclass(frozen=True)
class Experiment:
    """A scenario bound to the descriptions of its members: wired, checked, ready to run."""

    scenario: Scenario
    descriptions: Mapping[str, Description]
    wiring: Wiring
    pools: tuple[Pool, ...]

    @property
    def kpis(self) -> tuple[str, ...]:
        """`member.variable` of every figure: those that the scenario names, else all."""
        if self.scenario.kpis:
            return self.scenario.kpis
        return tuple(f"{name}.{kpi}" for name, d in self.descriptions.items() for kpi in d.kpis)

    def coordinator(self, frame_steps: int = FRAME_STEPS) -> Coordinator:
        return Coordinator(
            self.wiring, self.scenario.horizon_ns, pools=self.pools, frame_steps=frame_steps
        )


def bind(
    scenario: Scenario,
    descriptions: Mapping[str, Description],
    planner: Description | None,
    case: Case | None = None,
) -> Experiment:
    """Wire a scenario; raises `ScenarioError` when anything that it names is not there.

    Of the case only the number of crews matters, which is the size of their pool.
    """
    members = dict(descriptions)
    couplings = list(scenario.couplings_resolved())
    actuations: tuple[Actuation, ...] = ()
    pools: tuple[Pool, ...] = ()
    repairs = scenario.repairs
    if repairs is not None and planner is not None:
        members[PLANNER] = planner
        for index, work in enumerate(repairs.work):
            for role in ("remaining", "busy", "travel"):
                source, _, output = getattr(work, role).partition(".")
                couplings.append(Coupling(source, output, PLANNER, f"{role}_{index}"))
        targets = dict.fromkeys(work.actuator.partition(".")[0] for work in repairs.work)
        delay_ns = round(repairs.delay_min * MINUTE_NS)
        actuations = tuple(Actuation(PLANNER, target, delay_ns) for target in targets)
        pools = (
            Pool(
                "crews",
                PLANNER,
                crews_of(repairs.crews, case),
                tuple(f"busy_{index}" for index in range(len(repairs.work))),
                tuple(_split(work.actuator) for work in repairs.work),
            ),
        )
    dispatch = scenario.dispatch
    if dispatch is not None and planner is not None:
        members[PLANNER] = planner
        inputs = {v.name for v in planner.inputs()}
        for rule in dispatch.rules:
            for name in filter(None, (rule.lacking, rule.size, rule.store)):
                source, output = _split(name)
                # several rules may look at one output; a planner without rules looks at none
                if (seen := f"{source}_{output}") in inputs:
                    couplings.append(Coupling(source, output, PLANNER, seen))
                    inputs.remove(seen)
        delay_ns = round(dispatch.delay_min * MINUTE_NS)
        targets = dict.fromkeys(_split(name)[0] for name in dispatch.actuators)
        actuations = tuple(Actuation(PLANNER, target, delay_ns) for target in targets)
    experiment = Experiment(scenario, members, wire(members, couplings, actuations), pools)
    for name in experiment.kpis:
        member, variable = _split(name)
        known = {v.name for v in members[member].outputs() if v.kind == SYSTEM}
        if variable not in known:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"the KPI {name} is no scalar output of {member}; it has {sorted(known)}",
                {"member": member, "variable": variable},
            )
    for member, variable in scenario.staleness_ns():
        outputs = {v.name for v in members[member].outputs()}
        if variable not in outputs:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"staleness bounds {member}.{variable}, which is no output; {member} has "
                f"{', '.join(sorted(outputs))}",
                {"member": member, "variable": variable},
            )
    for name in (*scenario.parameters, *scenario.uncertainty, *scenario.sensitivity):
        _check_parameter(name, members)
    for measure in scenario.measures.values():
        for name in measure.parameters:
            _check_parameter(name, members)
    return experiment


Binding = Callable[
    [Scenario, Mapping[str, Description], Description | None, Case | None], Experiment
]
"""What wires a scenario: `bind`, or something that remembers what it said."""


def crews_of(usual: float, case: Case | None) -> float:
    """The number of crews in a case: the scenario's, or the planner's parameter `crews`."""
    return case.parameters.get(PLANNER, {}).get("crews", usual) if case else usual


def _split(name: str) -> tuple[str, str]:
    member, _, variable = name.partition(".")
    return member, variable


def _check_parameter(name: str, descriptions: Mapping[str, Description]) -> None:
    member, parameter = _split(name)
    known = {p.name for p in descriptions[member].parameters}
    if parameter not in known:
        raise ScenarioError(
            Reason.UNKNOWN_PARAMETER,
            f"{member} has no parameter {parameter!r}; it has {', '.join(sorted(known))}",
            {"member": member, "parameter": parameter},
        )


def parameters_of(
    scenario: Scenario, measure: str, drawn: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Parameters by member: the scenario's, then the drawn ones, then the measure's."""
    merged = {**scenario.parameters, **drawn, **scenario.measures[measure].parameters}
    result: dict[str, dict[str, float]] = {}
    for name, value in merged.items():
        member, parameter = _split(name)
        result.setdefault(member, {})[parameter] = float(value)
    return result


def medians(scenario: Scenario, case: Case) -> dict[str, dict[str, float]]:
    """The parameters of a case, by member, with every uncertain one at its median."""
    middle = {n: float(quantile(d, np.array([0.5]))[0]) for n, d in scenario.uncertainty.items()}
    return parameters_of(scenario, case.measure, middle)


class Recorder:
    """Listens to what is committed and keeps what an outcome needs."""

    def __init__(self, experiment: Experiment, case: Case, keep_ledger: bool = False) -> None:
        self.outcome = Outcome(case)
        self.outcome.domains = {n: d.domain for n, d in experiment.descriptions.items()}
        if keep_ledger:
            self.outcome.descriptions = experiment.descriptions
        self._keep_ledger = keep_ledger
        self._kpis = experiment.kpis
        self._weighted = experiment.scenario.weighted
        self._scalars = _scalars(experiment.descriptions)

    def admit(self, descriptions: Mapping[str, Description]) -> None:
        """Listen to members that have joined, too."""
        self.outcome.domains |= {name: d.domain for name, d in descriptions.items()}
        if self._keep_ledger:
            self.outcome.descriptions = {**self.outcome.descriptions, **descriptions}
        self._scalars |= _scalars(descriptions)

    def keeps(self, member: str, output: str) -> bool:
        """Whether `take` has a use for the records of an output."""
        return self._keep_ledger or (member, output) in self._scalars

    def take(self, entries: Iterable[Entry]) -> None:
        outcome = self.outcome
        for entry in entries:
            match entry:
                case Record():
                    if (entry.owner, entry.variable) in self._scalars:
                        name = f"{entry.owner}.{entry.variable}"
                        point = (entry.time_ns, float(entry.value[0]))
                        outcome.series.setdefault(name, []).append(point)
                    if self._keep_ledger:
                        outcome.ledger.append(entry)
                case EventRecord():
                    outcome.events.append(entry)
                case ActionRecord():
                    outcome.actions.append(entry)

    def finish(self, digest: str) -> Outcome:
        outcome = self.outcome
        outcome.digest = digest
        outcome.kpis = {
            name.partition(".")[2]: outcome.series[name][-1][1] if name in outcome.series else 0.0
            for name in self._kpis
        }
        if self._weighted:
            outcome.kpis[WEIGHTED] = sum(
                weight * outcome.kpis[name.partition(".")[2]]
                for name, weight in self._weighted.items()
            )
        return outcome


def _scalars(descriptions: Mapping[str, Description]) -> set[tuple[str, str]]:
    return {
        (name, variable.name)
        for name, description in descriptions.items()
        for variable in description.outputs()
        if variable.kind == SYSTEM
    }


def twin_class(path: str) -> type[Twin]:
    """Import `module:Class` and check that it is a twin."""
    module_name, _, class_name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        own = module_name.partition(".")[0] == (error.name or "").partition(".")[0]
        reason = Reason.SCENARIO_INVALID if own else Reason.MISSING_EXTRA
        hint = "" if own else "; install the extra that brings it, such as multitwin[twins]"
        raise ScenarioError(reason, f"{path} can't be imported: {error}{hint}") from None
    except AttributeError:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"{module_name} has no {class_name!r} (from {path!r})"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Twin)):
        raise ScenarioError(Reason.SCENARIO_INVALID, f"{path} is not a subclass of Twin")
    return found


def build_twin(path: str, config: Mapping[str, str | int | float | bool]) -> Twin:
    """Construct `module:Class` with the scenario's `config` as keyword arguments."""
    try:
        return twin_class(path)(**config)
    except TypeError as error:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"{path} does not take this config: {error}"
        ) from None


def local_sessions(scenario: Scenario) -> dict[str, Session]:
    """A fresh session for every member, in this process."""
    sessions = {}
    for name, member in scenario.members.items():
        if member.twin is None:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{name} is only a service at {member.address}; run with --members grpc",
                {"member": name},
            )
        sessions[name] = Session(build_twin(member.twin, member.config), name)
    return sessions


def run_local(
    scenario: Scenario,
    case: Case,
    factory: PlannerFactory | None,
    *,
    keep_ledger: bool = False,
    on_commit: Callable[[int], None] | None = None,
    binder: Binding | None = None,
) -> Outcome:
    """Do one run in this process and in one thread.

    `on_commit` hears the time up to which the run is settled; `binder` does what `bind` does, for
    callers that have done so before. A member that fails is held when its policy says so; there is
    nothing here to recover it with, nor anybody to stand in. Raises what aborts the run.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    sessions = local_sessions(scenario)
    descriptions = {name: s.description for name, s in sessions.items()}
    planner = plan_member(scenario, descriptions, case, factory)
    described = planner.describe() if planner else None
    experiment = (binder or bind)(scenario, descriptions, described, case)
    if planner is not None:
        sessions[PLANNER] = Session(planner, PLANNER)
    for name, session in sessions.items():
        with blame(name):
            session.open(case.member_seed(name), case.parameters.get(name, {}))
    if planner is not None and (periods := planner.periods_ns()):
        planner.prepare(blocks_for(scenario, case, sessions, periods))
    recorder = Recorder(experiment, case, keep_ledger)
    costs: dict[str, MemberCost] = {}
    opening_s = time.perf_counter() - started
    holds = any(member.on_failure.do == "hold" for member in scenario.members.values())
    suits = Schedule.suits(experiment.wiring) and not holds
    foresight = None
    if planner is not None and planner.foresees():
        from federation.scenario.rehearse import Foresight  # which imports this module

        if not suits:
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"the measure {case.measure} rehearses in forks of the run, which a run with "
                "members that wake on input, wait in loops without delay or are held does not have",
                {"measure": case.measure},
            )
        foresight = Foresight(scenario, case, experiment, sessions, planner)
    try:
        if suits:
            digest = _walk(experiment, sessions, recorder, costs, on_commit, foresight)
        else:
            digest = _drive(experiment, sessions, recorder, costs, on_commit)
    finally:
        for session in sessions.values():
            session.twin.close()
    outcome = recorder.finish(digest)
    outcome.costs = costs
    outcome.wall_s = time.perf_counter() - started
    taken = {name: (cost.steps, cost.wall_s) for name, cost in costs.items()}
    outcome.critical_path = path_in_one_thread(taken, opening_s, outcome.wall_s)
    outcome.cpu_s = time.process_time() - started_cpu
    return outcome


def blocks_for(
    scenario: Scenario, case: Case, sessions: Mapping[str, Session], periods: tuple[int, ...]
) -> dict[str, LinearBlock]:
    """What the opened members could do, by name, as far as the planner may know it.

    Where damage is only assessed, so is all else that is uncertain: the blocks are then those
    of sessions that are opened with every uncertain parameter at its median. So they are where
    actuators are dispatched, of whose members only those that the scenario names are asked.
    """
    found = {}
    dispatch = scenario.dispatch
    assessed = dispatch is not None or (
        scenario.repairs is not None and scenario.repairs.assessment is not None
    )
    believed = medians(scenario, case) if assessed else {}
    for name, session in sessions.items():
        if dispatch is not None and dispatch.members and name not in dispatch.members:
            continue
        twin = session.twin
        if assessed and name != PLANNER:
            member = scenario.members[name]
            assert member.twin is not None
            twin = build_twin(member.twin, member.config)
            Session(twin, name).open(0, believed.get(name, {}))
        block = twin.flexibility(periods)
        if twin is not session.twin:
            twin.close()
        if block is not None:
            found[name] = block
    return found


def plan_member(
    scenario: Scenario,
    descriptions: Mapping[str, Description],
    case: Case,
    factory: PlannerFactory | None,
) -> Planner | None:
    """The planner for the policy of the case's measure, or None where nothing is to decide."""
    if factory is None or (scenario.repairs is None and scenario.dispatch is None):
        return None
    measure = scenario.measures[case.measure]
    policy = measure.crews if scenario.dispatch is None else measure.dispatch
    return factory(scenario, descriptions, policy)


def _walk(
    experiment: Experiment,
    sessions: Mapping[str, Session],
    recorder: Recorder,
    costs: dict[str, MemberCost],
    on_commit: Callable[[int], None] | None,
    foresight: Foresight | None = None,
) -> str:
    """Run members that nobody wakes."""

    def commit(entries: Iterable[Entry], settled_ns: int) -> None:
        recorder.take(entries)
        if on_commit is not None:
            on_commit(settled_ns)

    schedule = Schedule(
        experiment.wiring,
        sessions,
        experiment.scenario.horizon_ns,
        wall=time.perf_counter,
        cpu=time.thread_time,
        pools=experiment.pools,
        keeps=recorder.keeps,
    )
    if foresight is not None:
        foresight.attend(schedule)
    digest = schedule.run(commit)
    costs.update({name: MemberCost(*cost) for name, cost in schedule.costs().items()})
    return digest


def _drive(
    experiment: Experiment,
    sessions: Mapping[str, Session],
    recorder: Recorder,
    costs: dict[str, MemberCost],
    on_commit: Callable[[int], None] | None,
) -> str:
    """Run members of any kind, as the coordinator lets them."""
    coordinator = experiment.coordinator()
    spent = {name: [0, 0.0, 0.0] for name in sessions}
    held: set[str] = set()
    members = experiment.scenario.members

    def step_on(name: str, step: StepInput) -> StepResult:
        """One step of a member, or nothing new when it is held."""
        unchanged = StepResult(step.time_ns, step.micro)
        if name in held:
            return unchanged
        try:
            with blame(name):
                return sessions[name].advance(step)
        except FederationError as error:
            if name not in members or members[name].on_failure.do != "hold":
                raise
            held.add(name)
            coordinator.handle(Degraded(name, step.time_ns, Quality.HELD, error))
            return unchanged

    waiting: deque[Effect] = deque(coordinator.start())
    while waiting:
        effect = waiting.popleft()
        match effect:
            case Grant():
                wall, cpu = time.perf_counter(), time.thread_time()
                answer: Stepped | Failed
                try:
                    results = tuple([step_on(effect.member, step) for step in effect.steps])
                    answer = Stepped(effect.member, results)
                except FederationError as error:
                    answer = Failed(effect.member, error)
                cost = spent[effect.member]
                cost[0] += len(effect.steps)
                cost[1] += time.perf_counter() - wall
                cost[2] += time.thread_time() - cpu
                waiting.extend(coordinator.handle(answer))
            case Commit():
                recorder.take(effect.entries)
                if on_commit is not None:
                    on_commit(coordinator.now_ns)
            case Finished():
                costs.update(
                    {name: MemberCost(int(n), wall, cpu) for name, (n, wall, cpu) in spent.items()}
                )
                return effect.digest
            case Aborted():
                raise effect.error
    raise AssertionError("the coordinator stopped without an end")
