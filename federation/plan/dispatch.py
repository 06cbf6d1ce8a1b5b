r"""Turns the joint model into setpoints: how much each actuator is to do in each period.

The blocks of the members are joined (see `Joined`); ports of role `control` say which columns
are the setpoints of which actuator. One linear (or mixed) problem over the horizon is solved,
and its columns, cut to the actuators' ranges, are the plan. It is made of what the members
expect when their blocks are asked for: what they have observed by then, and forecasts of theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from federation.core.bundle import Setpoint
from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.engine import UNIT_USD, engine_of, make_whole, optimum_usd
from federation.plan.joining import Joined, join
from federation.plan.keeping import States
from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Causality,
    Description,
    Entity,
    LinearBlock,
    Planner,
    Port,
    Step,
    TimePolicy,
    Variable,
    Vector,
)

DispatchPolicy = Literal["none", "rule", "once", "level5"]

SAME = 1e-6
"""Setpoints that are nearer than this to the safe default are the safe default."""


@dataclass(frozen=True)
class Control:
    """One actuator that a planner may set: its entities, its range, and what is safe."""

    member: str
    actuator: str
    kind: str
    unit: str
    entities: tuple[str, ...]
    low: float
    high: float
    safe: float


@dataclass(frozen=True)
class Rule:
    """What operators do without a plan: while something lacks, they set an actuator.

    `lacking` is the output (member, variable) that says how much. Without a `size`, all its
    entities are set to `value`, which covers that much of what lacks. With one, as many
    entities as are needed have their turn, the next ones at the next decision: an entity that
    is set to `value` covers its `size`, the last one in part. While the output `store` is
    named and empty, the rule does nothing.
    """

    control: int
    lacking: tuple[str, str]
    value: float
    size: tuple[str, str] | None = None
    store: tuple[str, str] | None = None


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Setpoints for each control over the periods from `start_ns` on.

    `values[i]` are those of the i-th control, entities x periods. Costs are in US dollars over
    the horizon by the model: of the plan, and of leaving every actuator at its safe default
    (infinite if the model allows no such thing, NaN if nobody asked). `prices` are what a unit more
    of each given quantity, by member and port, would save, entities x periods.
    """

    start_ns: int
    periods_ns: tuple[int, ...]
    controls: tuple[Control, ...]
    values: tuple[Vector, ...]
    cost_usd: float
    idle_cost_usd: float
    prices: Mapping[tuple[str, str], Vector] = field(default_factory=dict)

    def period(self, time_ns: int) -> int | None:
        """The period that an instant is in, None outside of the plan."""
        edges = self.start_ns + np.concatenate([[0], np.cumsum(self.periods_ns)])
        found = int(np.searchsorted(edges, time_ns, side="right")) - 1
        return found if 0 <= found < len(self.periods_ns) else None

    def at(self, time_ns: int) -> tuple[Vector, ...]:
        """The setpoints of every control at an instant; safe defaults outside of the plan."""
        period = self.period(time_ns)
        if period is None:
            return tuple(np.full(len(c.entities), c.safe) for c in self.controls)
        return tuple(value[:, period] for value in self.values)

    def setpoints(self, time_ns: int) -> tuple[Setpoint, ...]:
        """What is to be asked for at an instant, without what is safe by itself."""
        return tuple(
            Setpoint(control.member, control.actuator, entity, float(value))
            for control, values in zip(self.controls, self.at(time_ns), strict=True)
            for entity, value in zip(control.entities, values, strict=True)
            if abs(value - control.safe) > SAME
        )


@dataclass(frozen=True)
class DispatchModel:
    """The joint model of some members' blocks, and where the setpoints are in it."""

    blocks: Mapping[str, LinearBlock]
    couplings: Sequence[Coupling]
    periods_ns: tuple[int, ...]
    controls: tuple[Control, ...]

    def solve(
        self,
        start_ns: int,
        members: Sequence[str] | None = None,
        weighs_idle: bool = True,
    ) -> DispatchPlan:
        """Plan from `start_ns` on.

        What leaving all at the safe defaults costs is a problem of its own, which is not solved
        unless it `weighs_idle`. Raises NO_PLAN when a control has no port or the solver ends with
        nothing, PLAN_INFEASIBLE when nothing keeps all rows.
        """
        chosen = [name for name in sorted(self.blocks) if members is None or name in members]
        blocks = {name: self.blocks[name] for name in chosen}
        problem = join(blocks, self.couplings)
        first = dict(
            zip(
                chosen,
                np.cumsum([0, *(len(blocks[n].columns) for n in chosen)]).tolist(),
                strict=False,
            )
        )
        places = [self._port(blocks, c).columns + first[c.member] for c in self.controls]
        engine = engine_of(problem)
        make_whole(engine, np.flatnonzero(problem.integer))
        cost_usd = optimum_usd(engine)
        found = np.array(engine.getSolution().col_value)
        values = tuple(
            np.clip(np.where(np.abs(found[p] - c.safe) < SAME, c.safe, found[p]), c.low, c.high)
            for c, p in zip(self.controls, places, strict=True)
        )
        reduced = np.array(engine.getSolution().col_dual)
        prices = {
            (name, port.name): -reduced[port.columns + first[name]] * UNIT_USD
            for name in chosen
            for port in blocks[name].ports
            if port.role == "given" and not problem.integer.any()
        }
        idle_cost_usd = float("nan")
        if weighs_idle:
            low, high = problem.low.copy(), problem.high.copy()
            for control, place in zip(self.controls, places, strict=True):
                low[place] = high[place] = control.safe
            idle_cost_usd = _or_infinite(replace(problem, low=low, high=high))
        return DispatchPlan(
            start_ns,
            self.periods_ns,
            self.controls,
            values,
            cost_usd,
            idle_cost_usd,
            prices,
        )

    def _port(self, blocks: Mapping[str, LinearBlock], control: Control) -> Port:
        ports = blocks[control.member].ports if control.member in blocks else ()
        for port in ports:
            if port.role == "control" and port.name == control.actuator:
                if port.entities != control.entities:
                    break
                return port
        raise PlanError(
            Reason.NO_PLAN,
            f"no block of {control.member} has the actuator {control.actuator!r} as a control of "
            "all its entities",
            {"member": control.member, "actuator": control.actuator},
        )


def _or_infinite(problem: Joined) -> float:
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    try:
        return optimum_usd(engine)
    except PlanError:
        return float("inf")


@dataclass(frozen=True, eq=False)
class Course:
    """What is followed: a plan, or, without one, the rules, or nothing at all."""

    name: Literal["none", "rule", "plan"]
    plan: DispatchPlan | None = None

    def __repr__(self) -> str:
        """Short, and the same for the same setpoints."""
        if self.plan is None:
            return self.name
        parts = (self.plan.start_ns, self.plan.periods_ns, *(v.tobytes() for v in self.plan.values))
        return f"plan {hashlib.sha256(repr(parts).encode()).hexdigest()}"


NOTHING_SET = Course("none")
BY_RULE = Course("rule")


@dataclass
class _Memory:
    """What a planner remembers between decisions; plain data."""

    course: Course = NOTHING_SET
    turn: dict[int, int] = field(default_factory=dict)
    """Per rule the entity whose turn is next."""
    set_to: tuple[Vector, ...] = ()
    """What each control was last set to."""
    plans: int = 0


KEPT = (_Memory, Course, DispatchPlan, Control)
"""What such a memory is made of."""

STATES = States(*KEPT)

Reading = Callable[[tuple[str, str]], Vector]
"""What an output (member, variable) is seen to be."""


class DispatchPlanner(Planner):
    """Sets actuators at a fixed period, so that what it decides takes effect at whole periods.

    `none` does nothing. `rule` does what its rules say. `once` makes a plan from the blocks that
    it was shown before the start and follows it to the end. What differs from the safe default is
    asked for again at every decision, before its lease ends.
    """

    def __init__(
        self,
        policy: DispatchPolicy,
        controls: Sequence[Control],
        rules: Sequence[Rule],
        period_ns: int,
        delay_ns: int,
        horizon_ns: int,
        couplings: Sequence[Coupling] = (),
        members: Sequence[str] | None = None,
        sources: Mapping[tuple[str, str], tuple[str, str]] | None = None,
        entities: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.policy = policy
        self.controls = tuple(controls)
        self.rules = tuple(rules)
        self._period_ns = period_ns
        self._delay_ns = delay_ns
        self._horizon_ns = horizon_ns
        self._couplings = couplings
        self._members = members
        self._sources = dict(sources or {})
        self._entities = dict(entities or {})
        self._model: DispatchModel | None = None
        self._memory = _Memory()

    def follower(self, course: Course) -> DispatchPlanner:
        """One that stands where this one does and follows a course, whatever comes."""
        other = DispatchPlanner(
            "none",
            self.controls,
            self.rules,
            self._period_ns,
            self._delay_ns,
            self._horizon_ns,
            sources=self._sources,
            entities=self._entities,
        )
        other._memory = replace(self._memory, course=course, turn=dict(self._memory.turn))
        return other

    def inputs(self) -> dict[tuple[str, str], str]:
        """Which outputs (member, variable) it must see, and as which input."""
        seen: dict[tuple[str, str], str] = {}
        for rule in self.rules:
            for source in (rule.lacking, rule.size, rule.store):
                if source is not None:
                    seen.setdefault(source, f"{source[0]}_{source[1]}")
        return seen

    def describe(self) -> Description:
        variables = [
            Variable(name, *self._sources[source], Causality.INPUT)
            for source, name in self.inputs().items()
        ]
        for name, unit, doc in (
            ("plans_made", "1", "how often the joint model was solved"),
            ("plan_cost", "USD", "cost of the last plan over its horizon by the model"),
            ("plan_saving", "USD", "what it saves against leaving all at the safe defaults"),
            ("setpoints_held", "1", "setpoints that differ from their safe default"),
        ):
            variables.append(Variable(name, SYSTEM, unit, Causality.OUTPUT, doc=doc))
        kinds = {kind for kind, _ in self._sources.values()} - {SYSTEM}
        return Description(
            model="dispatch-planner",
            version="1",
            domain="planner",
            entities=tuple(
                Entity(entity, kind) for kind in sorted(kinds) for entity in self._entities[kind]
            ),
            variables=tuple(variables),
            time=TimePolicy(
                period_ns=self._period_ns, offset_ns=max(self._period_ns - self._delay_ns, 0)
            ),
            doc=self.__doc__ or "",
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        course = BY_RULE if self.policy == "rule" else NOTHING_SET
        self._memory = _Memory(course, set_to=self._safe())

    def snapshot(self) -> bytes:
        return STATES.pack(self._memory)

    def restore(self, state: bytes) -> None:
        self._memory = STATES.unpack(state, lambda found: isinstance(found, _Memory))

    def periods_ns(self) -> tuple[int, ...]:
        if self.policy != "once":
            return ()
        count = -(-self._horizon_ns // self._period_ns)
        return (self._period_ns,) * int(count)

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        self._model = DispatchModel(blocks, self._couplings, self.periods_ns(), self.controls)

    def advance(self, step: Step) -> None:
        memory = self._memory
        if self.policy == "once" and memory.course.plan is None:
            self._plan(step)
        names = self.inputs()
        wanted, turn = self._wanted(memory.course, step.time_ns, lambda source: step[names[source]])
        memory.turn.update(turn)
        was_safe = all(
            (v == c.safe).all() for c, v in zip(self.controls, memory.set_to, strict=True)
        )
        if memory.course.name != "none" or not was_safe:
            self._ask(step, wanted)

    def _wanted(
        self, course: Course, time_ns: int, read: Reading
    ) -> tuple[tuple[Vector, ...], dict[int, int]]:
        """What a course sets at a decision, and whose turn it is after that, rule by rule."""
        if course.plan is not None:
            return course.plan.at(time_ns + self._delay_ns), {}
        if course.name == "rule":
            return self._by_rule(read)
        return self._safe(), {}

    def _safe(self) -> tuple[Vector, ...]:
        return tuple(np.full(len(c.entities), c.safe) for c in self.controls)

    def _plan(self, step: Step) -> None:
        if self._model is None:
            raise PlanError(Reason.NO_PLAN, "the planner was not shown any flexibility")
        plan = self._model.solve(0, members=self._members)
        self._memory.course = Course("plan", plan)
        self._memory.plans += 1
        saving_usd = plan.idle_cost_usd - plan.cost_usd
        step.publish("plans_made", self._memory.plans)
        step.publish("plan_cost", plan.cost_usd)
        if np.isfinite(saving_usd):
            step.publish("plan_saving", saving_usd)
        hours = sum(plan.periods_ns) / HOUR_NS
        step.emit("plan_made", SYSTEM, f"a plan for {hours:.0f} h costs {plan.cost_usd:,.0f} USD")

    def _by_rule(self, read: Reading) -> tuple[tuple[Vector, ...], dict[int, int]]:
        wanted = tuple(v.copy() for v in self._safe())
        turns: dict[int, int] = {}
        left: dict[tuple[str, str], float] = {}
        for index, rule in enumerate(self.rules):
            lacking = left.setdefault(rule.lacking, float(read(rule.lacking)[0]))
            if lacking <= 0.0 or (rule.store and read(rule.store)[0] <= 0.0):
                continue
            control, values = self.controls[rule.control], wanted[rule.control]
            if rule.size is None:
                values[:] = rule.value
                left[rule.lacking] = lacking - rule.value
                continue
            size = read(rule.size)
            turn = self._memory.turn.get(index, 0)
            for _ in range(size.size):
                if lacking <= 0.0:
                    break
                part = min(1.0, lacking / size[turn]) if size[turn] > 0.0 else 0.0
                values[turn] = control.safe + part * (rule.value - control.safe)
                lacking -= part * float(size[turn])
                turn = (turn + 1) % size.size
            turns[index] = turn
            left[rule.lacking] = lacking
        return wanted, turns

    def _ask(self, step: Step, wanted: tuple[Vector, ...]) -> None:
        """Ask for what is not safe, and once more for the safe default of what was not."""
        held = 0
        names = self.inputs()
        causes = [c for r in self.rules for c in step.cause(names[r.lacking], 0)]
        for control, values, before in zip(self.controls, wanted, self._memory.set_to, strict=True):
            moved = np.flatnonzero(
                (np.abs(values - control.safe) > SAME) | (np.abs(before - control.safe) > SAME)
            ).tolist()
            if not moved:
                continue
            held += int((np.abs(values - control.safe) > SAME).sum())
            event = step.emit(
                "setpoints",
                SYSTEM,
                f"{control.member}.{control.actuator} is set at {len(moved)} of "
                f"{len(control.entities)} places",
                causes,
            )
            for i in moved:
                step.act(
                    control.member, control.actuator, control.entities[i], float(values[i]), event
                )
        self._memory.set_to = wanted
        step.publish("setpoints_held", held)
