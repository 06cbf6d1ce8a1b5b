"""A city as a twin: a session of it is a run of its scenario, as far as a reader may have it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.export import (
    Export,
    Interior,
    Lens,
    Mode,
    export_of,
    may_begin,
    refusal,
)
from federation.peer.inner import SAYS, InnerRun, Seen, Stand, unfed
from federation.peer.policy import Decision, Policy, Question, Sort, Thing, decide, now, read_policy
from federation.peer.reader import Reader
from federation.scenario.run import (
    Case,
    Experiment,
    PlannerFactory,
    bind,
    build_twin,
    plan_member,
)
from federation.scenario.spec import PLANNER, Scenario, load
from federation.scenario.study import cases
from federation.twin import (
    NOTHING,
    Action,
    Description,
    Entity,
    Event,
    LinearBlock,
    Planner,
    Session,
    Step,
    StepInput,
    StepResult,
    Twin,
    Vector,
    blame,
)
from federation.v1 import twin_pb2
from federation.wire import codec

Path_ = tuple[str, ...]
"""The names of the brokers that a request came through, the first one first."""


class Quarters(Protocol):
    """Where the members of a city can be had."""

    def describe(self, path: Path_) -> Mapping[str, Description]:
        """What each member is, in the order of the scenario, but for those that a loop of brokers
        leaves out."""

    def open(self, member: str, seed: int, parameters: Mapping[str, float], path: Path_) -> Stand:
        """A fresh session of a member."""

    def flexibility(self, stand: Stand, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        """What a member could do whose session has not made a step."""


class LocalStand:
    """A member whose steps are done here and now, in the thread that asks for them."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def begin(self, steps: Sequence[StepInput]) -> Future[Sequence[StepResult]]:
        done: Future[Sequence[StepResult]] = Future()
        try:
            with blame(self.session.name):
                done.set_result([self.session.advance(step) for step in steps])
        except FederationError as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        self.session.twin.close()


class LocalQuarters:
    """Members that are built in this process by their classes."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._described: dict[str, Description] = {}

    def describe(self, path: Path_) -> Mapping[str, Description]:
        return {name: self.describe_one(name) for name in self._scenario.members}

    def describe_one(self, member: str) -> Description:
        """What a member is; asked once and remembered."""
        if member not in self._described:
            with blame(member):
                self._described[member] = self._build(member).describe()
        return self._described[member]

    def open(
        self, member: str, seed: int, parameters: Mapping[str, float], path: Path_
    ) -> LocalStand:
        session = Session(self._build(member), member)
        with blame(member):
            session.open(seed, parameters)
        return LocalStand(session)

    def flexibility(self, stand: Stand, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        assert isinstance(stand, LocalStand)
        return stand.session.twin.flexibility(periods_ns)

    def _build(self, member: str) -> Twin:
        spec = self._scenario.members[member]
        if spec.twin is None:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{member} is only a service at {spec.address}, which only a broker calls",
                {"member": member},
            )
        return build_twin(spec.twin, spec.config)


class City:
    """What a city is inside, and what a policy lets a reader have of it."""

    def __init__(
        self,
        name: str,
        scenario: Scenario,
        quarters: Quarters,
        factory: PlannerFactory | None = None,
    ) -> None:
        self.name = name
        self.scenario = scenario
        self.quarters = quarters
        self.factory = factory
        text = scenario.model_dump_json(exclude_none=True)
        self.version = hashlib.sha256(text.encode()).hexdigest()[:12]

    def interior(self, path: Path_) -> Interior:
        """What there is in the city; fails as its members' descriptions and its wiring do."""
        descriptions = self.quarters.describe(path)
        experiment, _ = self._bound(descriptions, self.case(0))
        free = unfed(experiment.wiring)
        return Interior(self.name, descriptions, self.cities, free, self.version)

    @property
    def cities(self) -> Mapping[str, str]:
        """The members that are other cities, and which."""
        members = self.scenario.members.items()
        return {n: m.peer.city or n for n, m in members if m.peer is not None}

    def case(self, seed: int) -> Case:
        """The run that a session of this seed is: of the scenario's first measure."""
        (case,) = cases(self.scenario, [next(iter(self.scenario.measures))], 1, seed)
        return case

    def begin(self, export: Export, seed: int, path: Path_, horizon_ns: int | None) -> InnerRun:
        """A run for one session."""
        case, quarters = self.case(seed), self.quarters
        descriptions = quarters.describe(path)
        experiment, planner = self._bound(descriptions, case)
        stands: dict[str, Stand] = {}
        try:
            for name in descriptions:
                parameters = case.parameters.get(name, {})
                stands[name] = quarters.open(name, case.member_seed(name), parameters, path)
            if planner is not None:
                session = Session(planner, PLANNER)
                with blame(PLANNER):
                    session.open(case.member_seed(PLANNER), case.parameters.get(PLANNER, {}))
                    if periods := planner.periods_ns():
                        blocks = {n: quarters.flexibility(s, periods) for n, s in stands.items()}
                        planner.prepare({n: b for n, b in blocks.items() if b is not None})
                stands[PLANNER] = LocalStand(session)
            end_ns = self.scenario.horizon_ns
            if horizon_ns is not None:
                end_ns = min(end_ns, horizon_ns)
            return InnerRun(experiment, export, stands, end_ns)
        except BaseException:
            for stand in stands.values():
                stand.close()
            raise

    def _bound(
        self, descriptions: Mapping[str, Description], case: Case
    ) -> tuple[Experiment, Planner | None]:
        """The scenario, wired, as far as its members are there."""
        absent = self.scenario.members.keys() - descriptions.keys()
        if self.factory is None:
            absent |= {PLANNER}
        scenario = _without(self.scenario, absent)
        planner = plan_member(scenario, descriptions, case, self.factory)
        if planner is not None and planner.foresees():
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"the measure {case.measure} rehearses in forks, which a city's sessions have not",
                {"measure": case.measure},
            )
        described = None if planner is None else planner.describe()
        return bind(scenario, descriptions, described, case), planner


def _without(scenario: Scenario, absent: AbstractSet[str]) -> Scenario:
    """The scenario without some members, and without what names them."""
    if not absent:
        return scenario

    def stays(name: str) -> bool:
        return name.partition(".")[0] not in absent

    couplings = tuple(c for c in scenario.couplings if stays(c.source) and stays(c.target))
    changed: dict[str, object] = {
        "members": {n: m for n, m in scenario.members.items() if stays(n)},
        "couplings": couplings,
        "kpis": tuple(filter(stays, scenario.kpis)),
    }
    for part in ("parameters", "uncertainty", "weighted", "sensitivity", "staleness"):
        changed[part] = {n: v for n, v in getattr(scenario, part).items() if stays(n)}
    return scenario.model_copy(update=changed)


Standing = Callable[[], tuple[Policy, Question]]
"""The policy that is in force, and who asks and when: now, whenever it is asked."""


class Rights:
    """What a session may tell its reader: as it was when it began, for as long as that holds."""

    def __init__(self, interior: Interior, standing: Standing, mode: Mode) -> None:
        self._interior, self._standing, self._mode = interior, standing, mode
        policy, asked = standing()
        if not may_begin(policy, asked, mode).allowed:
            raise refusal(policy, asked, Sort.SESSION, mode)
        self.export = export_of(interior, policy, asked, mode)
        self._judged = _moment(policy, asked)
        self._entities: dict[tuple[str, str], Entity] = {
            (member, entity.id): entity
            for member, description in reversed(list(interior.descriptions.items()))
            for entity in reversed(description.entities)
        }

    def check(self) -> None:
        """Refuse to go on when something that the session tells may not be told any more."""
        policy, asked = self._standing()
        moment = _moment(policy, asked)
        if moment[0] is self._judged[0] and moment[1:] == self._judged[1:]:
            return
        if not may_begin(policy, asked, self._mode).allowed:
            raise refusal(policy, asked, Sort.SESSION, self._mode)
        present = export_of(self._interior, policy, asked, self._mode)
        before, after = self.export, present
        for sort, had, has in (
            (Sort.VARIABLE, before.views, after.views),
            (Sort.INPUT, before.inputs, after.inputs),
            (Sort.ACTION, before.actuators, after.actuators),
        ):
            for one in had:
                if one not in has:
                    raise refusal(policy, asked, sort, f"{one.member}.{one.variable}")
        self._judged = moment

    def event(self, owner: str, event: Event) -> Decision:
        """Whether an event may be told of, and how finely."""
        policy, asked = self._standing()
        # one that the city does not list is of no kind and in no place
        entity = self._entities.get((owner, event.entity), Entity(event.entity, ""))
        is_relayed = owner in self._interior.cities
        thing = Thing(Sort.EVENT, f"{owner}.{event.kind}", entity, is_relayed=is_relayed)
        return decide(policy, asked, thing)

    def via(self, owner: str, event: Event) -> tuple[str, ...] | None:
        """The cities that an event came through, the last first; None when the reader's is among
        them, so that in a ring of cities nothing comes back to where it has been."""
        city = self._interior.cities.get(owner)
        if city is None:
            return ()
        came = (city, *event.via)
        _, asked = self._standing()
        return None if asked.reader.city in came else came

    def action(self, action: Action) -> None:
        """Refuse an action on what the reader may not set."""
        for entry, actuator in zip(
            self.export.actuators, self.export.description.actuators, strict=True
        ):
            if entry.name == action.actuator:
                if action.entity in self.export.description.ids(actuator.kind):
                    return
                break
        policy, asked = self._standing()
        raise refusal(policy, asked, Sort.ACTION, action.actuator)


def _moment(policy: Policy, asked: Question) -> tuple[object, ...]:
    """What a right depends on that changes with time: the policy, emergencies, the minute."""
    minute = asked.instant.replace(second=0, microsecond=0)
    held = tuple(d for d in asked.declared if d.holds(policy, asked.instant))
    return (policy, minute, held)


class Teller:
    """Tells of a city's events under the names of its session, and of nothing behind them that
    may not be told."""

    def __init__(self, rights: Rights) -> None:
        self._rights = rights
        self._behind: dict[str, tuple[str, ...]] = {}
        """Per event inside the events outside that stand for it: itself, or what it came from."""
        self._later: list[tuple[int, str, Event, str, str]] = []

    def tell(
        self, time_ns: int, events: Iterable[tuple[str, Event]], emit: Callable[..., str]
    ) -> None:
        """Tell of what has happened up to now, in the order in which it did."""
        for owner, event in events:
            if owner == SAYS:
                self._behind[event.id] = tuple(event.text.split("\n"))
                continue
            self._behind[event.id] = self.outside(event.causes)
            via = self._rights.via(owner, event)
            if via is None:
                continue
            decision = self._rights.event(owner, event)
            if not decision.allowed:
                continue
            event = replace(event, via=via)
            how = decision.resolution
            entity = event.entity if how.space == "each" else "system"
            text = event.text if how.text else f"{event.kind.replace('_', ' ')} ({entity})"
            self._later.append((event.time_ns + how.delay_ns, owner, event, entity, text))
        due = [later for later in self._later if later[0] <= time_ns]
        self._later = [later for later in self._later if later[0] > time_ns]
        for _, owner, event, entity, text in due:
            causes = self.outside(event.causes)
            id_ = emit(f"{owner}_{event.kind}", entity, text, causes, event.via)
            self._behind[event.id] = (id_,)

    def forget(self, most: int) -> None:
        """Remember only so many events as causes, the newest."""
        for event in list(itertools.islice(self._behind, max(len(self._behind) - most, 0))):
            del self._behind[event]

    def state(self) -> list[object]:
        """What is remembered and what is told later, for another one of the same rights."""
        return [dict(self._behind), list(self._later)]

    def resume(self, state: list[Any]) -> None:
        behind, later = state
        self._behind, self._later = dict(behind), [tuple(each) for each in later]

    def outside(self, causes: Iterable[str]) -> tuple[str, ...]:
        """The events outside that stand behind events inside."""
        found = dict.fromkeys(id_ for cause in causes for id_ in self._behind.get(cause, ()))
        return tuple(found)[:16]


class CityRun(Twin):
    """One what-if session of a city. Its state is what it was given: to restore it, the run is
    gone through again, which gives the same."""

    def __init__(
        self, city: City, rights: Rights, path: Path_ = (), horizon_ns: int | None = None
    ) -> None:
        self._city, self._rights, self._path = city, rights, path
        self._horizon_ns = horizon_ns
        self._inner: InnerRun | None = None
        self._given: list[StepInput] = []
        self._emitted: list[str] = []
        self._start_ns: int | None = None
        self._causes: dict[tuple[str, int], tuple[str, ...]] = {}

    def describe(self) -> Description:
        return self._rights.export.description

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.close()
        export = self._rights.export
        self._inner = self._city.begin(export, seed, self._path, self._horizon_ns)
        self._lens = Lens(export.views)
        self._teller = Teller(self._rights)
        self._explained: dict[tuple[str, int], str] = {}

    def advance(self, step: Step) -> None:
        self._rights.check()
        if self._start_ns is None:
            self._start_ns = step.last_ns
        for action in step.actions:
            self._rights.action(action)
        given = StepInput(
            step.time_ns - self._start_ns,
            0,
            {name: step[name] for name in sorted(step.changed)},
            self._news(step),
            step.actions,
        )

        def emit(
            kind: str, entity: str, text: str, causes: Iterable[str], via: tuple[str, ...]
        ) -> str:
            id_ = step.emit(kind, entity, text, causes, via)
            self._emitted.append(id_)
            return id_

        for name, value, causes in self._do(given, emit):
            step.publish(name, value, causes)
        self._given.append(given)

    def _news(self, step: Step) -> Mapping[str, Mapping[int, tuple[str, ...]]]:
        """The events behind entries of inputs, where they have changed."""
        news: dict[str, dict[int, tuple[str, ...]]] = {}
        for variable in self._rights.export.description.inputs():
            for index in range(step[variable.name].size):
                behind = step.cause(variable.name, index)
                if self._causes.get((variable.name, index), ()) != behind:
                    self._causes[variable.name, index] = behind
                    news.setdefault(variable.name, {})[index] = behind
        return news or NOTHING

    def _do(
        self, given: StepInput, emit: Callable[..., str]
    ) -> list[tuple[str, Vector, Mapping[int, str]]]:
        """Go on to an instant and say what there is to tell."""
        assert self._inner is not None
        seen = self._inner.advance(given)
        self._teller.tell(given.time_ns, seen.events, emit)
        told = self._lens.see(given.time_ns, seen.values)
        return [(name, value, self._explain(name, seen)) for name, value in told.items()]

    def _explain(self, name: str, seen: Seen) -> Mapping[int, str]:
        """Per entry the event that explains it from now on, where it is told of as it is."""
        view = next(view for view in self._rights.export.views if view.name == name)
        inside = seen.causes.get((view.member, view.variable))
        if not inside or not view.resolution.is_of_each_at_once:
            return NOTHING
        found = {}
        for index, (column,) in enumerate(view.groups):
            events = self._teller.outside(inside.get(column, ()))
            if events and self._explained.get((name, index)) != events[0]:
                self._explained[name, index] = found[index] = events[0]
        return found

    def snapshot(self) -> bytes:
        head = {"start_ns": self._start_ns, "emitted": self._emitted}
        steps = twin_pb2.SessionRequest.Advance()
        for given in self._given:
            codec.write_step_input(steps.steps.add(), given)
        return json.dumps(head).encode() + b"\n" + steps.SerializeToString()

    def restore(self, state: bytes) -> None:
        head, _, body = state.partition(b"\n")
        try:
            told = json.loads(head)
            ids = iter([str(id_) for id_ in told["emitted"]])
            start_ns = None if told["start_ns"] is None else int(told["start_ns"])
            steps = twin_pb2.SessionRequest.Advance.FromString(body)
        except Exception:
            raise ScenarioError(Reason.INVALID_FRAME, "this is no state of a city") from None
        self._start_ns = start_ns
        self._given = [codec.decode_step_input(step) for step in steps.steps]
        self._emitted = list(told["emitted"])
        for given in self._given:
            for variable, entries in given.causes.items():
                for index, behind in entries.items():
                    self._causes[variable, index] = behind
            self._do(given, lambda *what: next(ids))

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


class CityTwin(CityRun):
    """A city in this process, from its files, as a reader has it: for one run of both cities
    without a network, which gives what brokers give over one."""

    def __init__(
        self,
        city: str,
        scenario: str,
        policy: str,
        reader: str,
        purpose: str = "",
        at: str = "",
    ) -> None:
        """`at` is the instant at which the reader asks, in ISO 8601 with its zone; else now."""
        inside = load(scenario)
        rules = read_policy(Path(policy).read_text(encoding="utf-8"), policy)
        instant = datetime.fromisoformat(at) if at else now()
        question = Question(Reader(reader), purpose, instant)
        whole = City(city, inside, LocalQuarters(inside))
        rights = Rights(whole.interior((city,)), lambda: (rules, question), "what-if")
        super().__init__(whole, rights, (city,))
