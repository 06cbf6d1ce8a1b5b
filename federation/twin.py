"""The Twin contract in Python: what a twin's author subclasses.

A twin describes itself (entities, variables, time policy) and then advances from
instant to instant. One `Twin` object is one session of the model; data that all
sessions share belongs in a module-level cache. All instants and spans are integer
nanoseconds from the start of the run. All values are float64 vectors over the
entities of one kind, in the order in which `describe` lists them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from federation.errors import FederationError, Reason, TwinError

Vector = NDArray[np.float64]

FLOAT64 = np.dtype("<f8")
"""The one form of every value, in memory, on the wire and in the hash."""

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 60 * MINUTE_NS

SYSTEM = "system"
"""The kind of the one entity (id `system`) that scalars are variables of."""


class Causality(StrEnum):
    """Whether a variable is read or written by its twin."""

    INPUT = "input"
    OUTPUT = "output"


class Risk(StrEnum):
    """How bad a wrong action on an actuator can be, for the grant of autonomy."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Fidelity(StrEnum):
    """How closely a model follows what it stands for; each value of it is that good."""

    UNSTATED = "unstated"
    RECORDED = "recorded"
    """What was measured or logged, played back."""
    SURROGATE = "surrogate"
    """Fitted to data or to a finer model, without the laws behind them."""
    REDUCED = "reduced"
    """The laws of its domain, with parts taken together or effects left out."""
    DETAILED = "detailed"
    """The laws of its domain, component by component."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing that a twin models. Coordinates are WGS84 degrees, NaN if it has no place."""

    id: str
    kind: str
    name: str = ""
    lon_deg: float = float("nan")
    lat_deg: float = float("nan")


@dataclass(frozen=True, slots=True)
class Variable:
    """A vector over all entities of `kind`, in `unit` (a pint expression; "1" if pure).

    `initial` is the value before the first that is visible. `low` and `high` bound the
    nominal range; a value outside is legal but unusual. `via` are the cities that it came through,
    the last first, where a city tells what it has from others.
    """

    name: str
    kind: str
    unit: str
    causality: Causality
    initial: float = 0.0
    low: float = float("-inf")
    high: float = float("inf")
    doc: str = ""
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a session is opened with and that stays as it is for the whole run.

    `low` and `high` bound what is plausible; `source` says where the default comes from,
    or "assumption: ..." where no document gives it.
    """

    name: str
    unit: str
    default: float
    low: float
    high: float
    doc: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Actuator:
    """What may be changed from outside, one value per entity of `kind`.

    A setpoint that nobody renews falls back to `safe_default` after `lease_ns` (0: it
    holds until changed). `compensation` says in words how its effect is undone. Where it takes
    more than to set what was set before, `amends` is the setpoint that does it: a place whose new
    setpoint was in force and then not confirmed is given that for one step, and then what was set
    before, or the safe default.
    """

    name: str
    kind: str
    unit: str
    low: float
    high: float
    safe_default: float
    risk: Risk = Risk.LOW
    lease_ns: int = 0
    compensation: str = ""
    doc: str = ""
    amends: float | None = None


@dataclass(frozen=True, slots=True)
class TimePolicy:
    """When a twin steps.

    `period_ns` > 0: at `offset_ns`, `offset_ns + period_ns`, ... Otherwise event-driven:
    at `offset_ns` and then at each time that it asked for with `Step.wake_at`. With
    `wakes_on_input` also whenever a visible input changes. `can_redo` lets a zero-delay
    loop iterate it: it needs `snapshot` and `restore`.
    """

    period_ns: int = 0
    offset_ns: int = 0
    wakes_on_input: bool = False
    can_redo: bool = False


@dataclass(frozen=True)
class Description:
    """Everything that the federation may know about a twin.

    `kpis` name output variables of kind `system`: their last value is the figure of a run.
    """

    model: str
    version: str
    domain: str
    entities: tuple[Entity, ...]
    variables: tuple[Variable, ...]
    time: TimePolicy
    parameters: tuple[Parameter, ...] = ()
    actuators: tuple[Actuator, ...] = ()
    kpis: tuple[str, ...] = ()
    doc: str = ""
    data_hash: str = ""
    fidelity: Fidelity = Fidelity.UNSTATED

    @cached_property
    def _ids(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for entity in self.entities:
            found.setdefault(entity.kind, []).append(entity.id)
        return {SYSTEM: (SYSTEM,)} | {kind: tuple(ids) for kind, ids in found.items()}

    def ids(self, kind: str) -> tuple[str, ...]:
        """The ids of all entities of one kind, in the order of every vector over them.

        The kind `system` has its one entity whether it is listed or not.
        """
        return self._ids.get(kind, ())

    def output_sizes(self) -> dict[str, int]:
        """How many values each output has, by name."""
        return {v.name: len(self.ids(v.kind)) for v in self.outputs()}

    def inputs(self) -> tuple[Variable, ...]:
        return tuple(v for v in self.variables if v.causality is Causality.INPUT)

    def outputs(self) -> tuple[Variable, ...]:
        return tuple(v for v in self.variables if v.causality is Causality.OUTPUT)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a planner would name, with the ids of the events that caused it.

    `id` is `member/serial`, the serial counting from 1 in a session. `kind` is a short
    stable word (`pump_stopped`), `entity` the id of what it happened to, `text` a sentence.
    `through` says of causes that came from outside which input told of them. `via` are the cities
    that the event came through, the last first.
    """

    id: str
    time_ns: int
    kind: str
    entity: str
    text: str
    causes: tuple[str, ...] = ()
    through: tuple[tuple[str, str], ...] = ()
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Action:
    """One new setpoint for one actuator of one entity of one member."""

    member: str
    actuator: str
    entity: str
    value: float
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Operated:
    """A setpoint that a step was given besides its actions, from the desk of the twin's service.

    `by` is the identity that holds the actuator, or `desk` for a safe default that nobody asked
    for. `action.cause` is the id of an event that the federation records with this `text`.
    """

    action: Action
    by: str
    text: str


@dataclass(frozen=True, slots=True)
class DeskStep:
    """What the desk had to do with a step: the setpoints in turn, and its `state` after them.

    The state is its own affair; it is empty when nothing in it has changed since the step before.
    """

    operated: tuple[Operated, ...] = ()
    state: bytes = b""


NO_DESK = DeskStep()
"""The desk had nothing to do with a step."""


NOTHING: Mapping[Any, Any] = MappingProxyType({})
"""No inputs, no outputs, no causes."""


class StepInput(NamedTuple):
    """What a session is told when it steps: only inputs that changed since its last step.

    `causes[variable][index]` are the events behind an entry, sent when the entry changed. A step
    that is done again has in `desk` what the desk had to do with it then (`NO_DESK` for nothing),
    and its session's desk keeps to that; None is for a step that is done for the first time. In
    `seen_ns` it has what the answer said then. `missed_since_ns` is the instant since which the run
    goes on without the session's answers, if it does.
    """

    time_ns: int
    micro: int = 0
    inputs: Mapping[str, Vector] = NOTHING
    causes: Mapping[str, Mapping[int, tuple[str, ...]]] = NOTHING
    actions: tuple[Action, ...] = ()
    desk: DeskStep | None = None
    seen_ns: int | None = None
    missed_since_ns: int | None = None


class StepResult(NamedTuple):
    """What a session answers: the outputs that it published, its events, and what it wants.

    `causes[variable][index]` is the event that explains the present value of an entry.
    `next_ns` is the next instant wanted by an event-driven twin, or None for none. `desk` is set
    by the service of a twin whose desk had to do with the step. `held` says why the values are not
    those of this instant but the last that were known; it is empty when they are. `seen_ns` is set
    by a twin that looks at a run that goes on: up to where that was on record.
    """

    time_ns: int
    micro: int = 0
    outputs: Mapping[str, Vector] = NOTHING
    causes: Mapping[str, Mapping[int, str]] = NOTHING
    events: tuple[Event, ...] = ()
    actions: tuple[Action, ...] = ()
    next_ns: int | None = None
    desk: DeskStep | None = None
    held: str = ""
    seen_ns: int | None = None


def failed(member: str, error: BaseException) -> TwinError:
    """The error of a twin whose own code raised something."""
    return TwinError(
        Reason.TWIN_FAILED,
        f"{member} failed: {type(error).__name__}: {error}",
        {"member": member, "exception": type(error).__name__},
    )


class blame:  # noqa: N801 - reads as a statement
    """Turn what a twin's code raises, but for errors of ours, into a `TwinError` that names it.

    A service outlives its twins: it takes `also` exits for failures, and keeps the trace in its
    `log`.
    """

    def __init__(
        self,
        member: str,
        also: tuple[type[BaseException], ...] = (),
        log: logging.Logger | None = None,
    ) -> None:
        self._member = member
        self._caught: tuple[type[BaseException], ...] = (Exception, *also)
        self._log = log

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._caught) and not isinstance(error, FederationError):
            if self._log is not None:
                self._log.error("%s failed", self._member, exc_info=error)
            raise failed(self._member, error) from error


def undeclared(member: str, variable: str) -> TwinError:
    """The error of an output that its twin does not have."""
    return TwinError(
        Reason.UNDECLARED_OUTPUT,
        f"{member} published {variable!r}, which it does not declare",
        {"member": member, "variable": variable},
    )


def wrong_shape(member: str, variable: str, size: int, values: int) -> TwinError:
    """The error of an output with `values` values instead of `size`."""
    return TwinError(
        Reason.WRONG_SHAPE,
        f"{member}.{variable} has {size} entities and {values} values were published",
        {"member": member, "variable": variable},
    )


def check_finite(member: str, variable: str, value: Vector, time_ns: int) -> None:
    """Refuse infinities and NaN.

    A sum of squares that is finite has only finite terms, and takes a third of the time of
    looking at each; one that is not may also come from numbers beyond 1e154. (`vdot`, unlike
    `dot`, does not warn of that.)
    """
    if not isfinite(np.vdot(value, value)) and not np.isfinite(value).all():
        index = int(np.flatnonzero(~np.isfinite(value))[0])
        raise TwinError(
            Reason.NOT_FINITE,
            f"{member}.{variable}[{index}] is {value[index]} at {time_ns} ns",
            {"member": member, "variable": variable, "index": str(index)},
        )


def not_yet(member: str, event: Event, time_ns: int) -> TwinError:
    """The error of an event that is told of before it happens."""
    return TwinError(
        Reason.INVALID_FRAME,
        f"{member} told at {time_ns} ns of {event.id} ({event.kind}), which happens at "
        f"{event.time_ns} ns",
        {"member": member, "event": event.id},
    )


def check_outputs(member: str, sizes: Mapping[str, int], result: StepResult) -> None:
    """Refuse outputs that are undeclared, of the wrong length, or not finite, and events that have
    not happened yet."""
    for event in result.events:
        if event.time_ns > result.time_ns:
            raise not_yet(member, event, result.time_ns)
    for variable, value in result.outputs.items():
        size = sizes.get(variable)
        if size is None:
            raise undeclared(member, variable)
        if value.shape != (size,):
            raise wrong_shape(member, variable, size, value.size)
        check_finite(member, variable, value, result.time_ns)


_MINUS_ZERO = np.float64(-0.0).tobytes()
_ZERO = np.zeros(())
_LONG_BYTES = 4096
"""From here on numpy is faster than a search in bytes."""


def has_minus_zero(data: bytes) -> bool:
    """Whether float64 `data` may hold -0.0; never a wrong no."""
    if len(data) < _LONG_BYTES:
        return _MINUS_ZERO in data
    return bool(np.frombuffer(data, np.int64).min() == np.iinfo(np.int64).min)


def plain_zeros(value: Vector) -> Vector:
    """The same numbers, with 0.0 for -0.0.

    The two are the same quantity, engines differ in which they give, and all values that
    travel have the one, so that equal numbers have equal bits.
    """
    return value + _ZERO


class Step:
    """One step as its author sees it: read inputs and actions, publish, emit, ask to wake.

    It is good for the time of one `Twin.advance`; the session uses it again.
    """

    __slots__ = (
        "_acts",
        "_causes",
        "_changed",
        "_events",
        "_held",
        "_next_ns",
        "_outputs",
        "_seen_ns",
        "_session",
        "actions",
        "last_ns",
        "micro",
        "missed_since_ns",
        "seen_ns",
        "time_ns",
    )

    def __init__(self, session: Session) -> None:
        self.time_ns = 0
        self.micro = 0
        self.last_ns = 0
        self.actions: tuple[Action, ...] = ()
        self._session = session
        self._changed: Iterable[str] = ()
        self._outputs: dict[str, bytes] = {}
        self._causes: dict[str, dict[int, str]] = {}
        self._events: list[Event] = []
        self._acts: list[Action] = []
        self._next_ns: int | None = None
        self._held = ""
        self._seen_ns: int | None = None
        self.seen_ns: int | None = None
        self.missed_since_ns: int | None = None

    @property
    def changed(self) -> frozenset[str]:
        """The inputs that have another value than at the last step."""
        return frozenset(self._changed)

    @property
    def span_ns(self) -> int:
        """The time since the last step; 0 in the first."""
        return self.time_ns - self.last_ns

    @property
    def span_h(self) -> float:
        return self.span_ns / HOUR_NS

    def __getitem__(self, variable: str) -> Vector:
        """The visible value of an input, read-only."""
        return self._session.values[variable]

    def cause(self, variable: str, index: int) -> tuple[str, ...]:
        """The ids of the events behind the present value of one entry of an input."""
        causes = self._session.input_causes.get(variable, NOTHING).get(index, ())
        for cause in causes:
            self._session.told_by[cause] = variable
        return causes

    def emit(
        self,
        kind: str,
        entity: str,
        text: str,
        causes: Iterable[str] = (),
        via: tuple[str, ...] = (),
    ) -> str:
        """Record an event of this instant and return its id, to be named as a cause."""
        self._session.serial += 1
        event_id = f"{self._session.name}/{self._session.serial}"
        unique = tuple(dict.fromkeys(c for c in causes if c))
        told_by = self._session.told_by
        through = tuple((c, told_by[c]) for c in unique if c in told_by)
        self._session.has_more = True
        told = (kind, entity, text, unique, through, via)
        self._events.append(Event(event_id, self.time_ns, *told))
        return event_id

    def publish(
        self, variable: str, values: ArrayLike, causes: Mapping[int, str] | None = None
    ) -> None:
        """Set an output as of this instant; what is not published keeps its value.

        `causes` names, per index, the event that explains the entry from now on; entries
        that it leaves out keep their explanation.
        """
        if values.__class__ is not np.ndarray or values.dtype is not FLOAT64:
            values = np.array(values, dtype=FLOAT64, ndmin=1)
        if values.ndim != 1:
            size = self._session.sizes.get(variable, 0)
            raise wrong_shape(self._session.name, variable, size, values.size)
        self._outputs[variable] = values.tobytes()
        if causes:
            self._session.has_more = True
            self._causes.setdefault(variable, {}).update(causes)

    def act(self, member: str, actuator: str, entity: str, value: float, cause: str = "") -> None:
        """Ask for a setpoint at another member; only a member that is wired to it may."""
        self._session.has_more = True
        self._acts.append(Action(member, actuator, entity, value, cause))

    def wake_at(self, time_ns: int) -> None:
        """Ask for the next step (event-driven twins); the earliest call of a step counts."""
        if time_ns <= self.time_ns:
            raise TwinError(
                Reason.TIME_REGRESSION,
                f"{self._session.name} asked at {self.time_ns} ns to wake at {time_ns} ns; "
                "a twin can only ask for a later time",
                {"member": self._session.name},
            )
        self._session.has_more = True
        self._next_ns = time_ns if self._next_ns is None else min(self._next_ns, time_ns)

    def hold(self, why: str) -> None:
        """Say that the outputs are not those of this instant but the last that are known."""
        self._session.has_more = True
        self._held = why

    def saw(self, seen_ns: int) -> None:
        """Say up to where the run was on record that the twin looks at; when the step is done again
        it has this in `seen_ns`, and must look no further."""
        self._session.has_more = True
        self._seen_ns = seen_ns

    def _begin(self) -> None:
        """Forget the story of the step before."""
        self._causes = {}
        self._events = []
        self._acts = []
        self._next_ns = None
        self._held = ""
        self._seen_ns = None


class Twin(ABC):
    """A domain model. Subclass it, and `multitwin serve module:Class` makes it a service.

    The constructor takes keyword arguments from the scenario's `config` (strings or
    numbers) and must be cheap after the first time: one object is built per session.
    """

    @abstractmethod
    def describe(self) -> Description:
        """Say what this twin is. Called before `open`; always gives the same answer."""

    @abstractmethod
    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        """Begin a session at time 0. All randomness comes from `seed`.

        `parameters` holds every declared parameter, defaults filled in.
        """

    @abstractmethod
    def advance(self, step: Step) -> None:
        """Cover the span since the last step and publish the state at `step.time_ns`."""

    def snapshot(self) -> bytes:
        """The whole state of the session, for `restore` on a fresh object of this class.

        It may come back over the wire: `federation.snapshot` reads it without running it.
        """
        raise TwinError(Reason.UNSUPPORTED, f"{type(self).__name__} has no snapshot")

    def restore(self, state: bytes) -> None:
        raise TwinError(Reason.UNSUPPORTED, f"{type(self).__name__} has no restore")

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        """Make a restored session one of the futures that its past allows, from `time_ns` on.

        Called once, after `restore`, on a session that was opened with this seed and these
        parameters, before any step at `time_ns` or later. What has happened and what has been
        told stays. What is not known yet, such as what is still to be drawn, follows `seed` and
        `parameters`: nothing of it may be left of the session that the snapshot was taken of.
        `believed` gives outputs that are only estimated, whole vectors by name, to be taken as
        the truth. With the seed and parameters of the snapshot, and nothing believed, nothing
        may change.

        The answer is the next instant that an event-driven twin wants in this future, `time_ns`
        at the earliest, or None for none; a twin with a period need not say.
        """
        raise TwinError(Reason.UNSUPPORTED, f"{type(self).__name__} can't have other futures")

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        """What this twin could do over a horizon, as a linear block; None if nothing.

        `periods_ns` are the lengths of the periods. The block describes the structure for
        a session opened with the present parameters; the planner fixes what is broken at
        the time of a decision through its ports.
        """
        return None

    def close(self) -> None:
        """Free what the session holds."""
        return None


@dataclass(frozen=True, slots=True)
class Port:
    """A named family of columns of a block: `columns[entity, period]`.

    `role` is `available` (a component works: 0..1, set by repairs), `supply` (something
    that the block delivers), `need` (something that it receives), `control` (the setpoints of
    the actuator of this name) or `given` (data that the block takes as they are: its owner
    fixes them, and whoever plans may ask what if they were others). Ports of role supply and
    need are joined by the scenario's couplings of the variables named here.
    """

    name: str
    role: str
    kind: str
    unit: str
    entities: tuple[str, ...]
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LinearBlock:
    r"""min c'x + c0 subject to row_low <= A x <= row_high, low <= x <= high.

    A is given by coordinates (`row_index`, `column_index`, `coefficient`). `integer` marks
    columns that must be whole. Costs are in US dollars of 2020.
    """

    columns: tuple[str, ...]
    low: Vector
    high: Vector
    cost: Vector
    integer: NDArray[np.bool_]
    rows: tuple[str, ...]
    row_low: Vector
    row_high: Vector
    row_index: NDArray[np.int64]
    column_index: NDArray[np.int64]
    coefficient: Vector
    ports: tuple[Port, ...]
    doc: str = ""


@dataclass(frozen=True)
class Glimpse:
    """What became of the figures of a run in one future, from the cut on.

    `series[member.variable]` are (instant, value), the first at the cut.
    """

    number: int
    series: Mapping[str, tuple[tuple[int, float], ...]]
    until_ns: int

    def at(self, name: str, time_ns: int) -> float:
        """A figure as it stood at an instant of the future; the last one that was published."""
        found = self.series[name][0][1]
        for when_ns, value in self.series[name]:
            if when_ns > time_ns:
                break
            found = value
        return found

    def growth(self, name: str, time_ns: int) -> float:
        """By how much a figure grew from the cut to an instant."""
        return self.at(name, time_ns) - self.series[name][0][1]


class Cut(Protocol):
    """A run at the beginning of an instant, everything before it settled; what forks start from.

    It is good for as long as the planner deliberates. Nothing here tells more than has been
    published: futures draw anew whatever has not.
    """

    @property
    def time_ns(self) -> int: ...

    @property
    def horizon_ns(self) -> int:
        """The last instant of the run."""
        ...

    @property
    def digest(self) -> str:
        """A hash over everything that has been published up to here."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """What a unit of each figure counts, by `member.variable`; smaller sums are better."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Model and version of each member."""
        ...

    def seen(self, member: str, output: str) -> Vector:
        """What an output said last; its initial value when it has said nothing yet."""
        ...

    def future(
        self,
        number: int,
        planner: Planner,
        until_ns: int,
        believed: Mapping[str, Mapping[str, Vector]] = NOTHING,
    ) -> Glimpse:
        """Let a future take its course under another planner.

        Futures of one number meet the same luck and the same parameters, whoever plans.
        `believed` are outputs by member that are estimated (`Twin.diverge`).
        """
        ...


class OpenCut(Cut, Protocol):
    """A cut of a run whose members can also be asked what they could do from then on."""

    def believed_blocks(
        self, from_ns: int, periods_ns: tuple[int, ...], members: Sequence[str] = ()
    ) -> Mapping[str, LinearBlock]:
        """The blocks of members (of all, by default) for periods from `from_ns` on, by name.

        They are those of sessions that stand at the cut and know what has been published, with
        every uncertain parameter at its median.
        """
        ...


@runtime_checkable
class Renewing(Protocol):
    """A cut that can also say what members could do from then on."""

    def blocks(self, number: int, periods_ns: tuple[int, ...]) -> Mapping[str, LinearBlock]:
        """The members' `flexibility` in a future: what they have told so far is as it is in the
        run, what they have not is as that future draws it."""
        ...


class Planner(Twin):
    """A twin that decides for others and is shown, before it starts, what they can do."""

    def foresees(self) -> bool:
        """Whether it wants a cut of the run before each of its steps; it then has a period."""
        return False

    def deliberate(self, cut: Cut) -> None:
        """Think, before the step at `cut.time_ns`, about what the run may come to."""
        return None

    def periods_ns(self) -> tuple[int, ...]:
        """The periods that it wants `flexibility` for; empty when it plans nothing."""
        return ()

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        """Take the linear blocks of the opened members, by name."""
        return None


class Session:
    """Runs one twin object step by step and keeps what the contract asks to be kept.

    It holds the visible inputs between steps, counts events, checks what the author
    publishes, and lets a loop redo a step by restoring the state before it.
    """

    def __init__(self, twin: Twin, name: str) -> None:
        self.twin = twin
        self.name = name
        self.description = twin.describe()
        self.values: dict[str, Vector] = {}
        self.input_causes: dict[str, dict[int, tuple[str, ...]]] = {}
        self.told_by: dict[str, str] = {}
        """Per foreign event the input that last told of it."""
        self.serial = 0
        self.last_ns = 0
        self.sizes = self.description.output_sizes()
        self.has_more = False
        """Whether the last step gave more than values: events, causes, actions, a wish to wake."""
        self._step = Step(self)
        self._can_redo = self.description.time.can_redo
        self._before: tuple[bytes, int, int] | None = None
        for variable in self.description.inputs():
            size = len(self.description.ids(variable.kind))
            initial = np.full(size, variable.initial, dtype=np.float64)
            initial.setflags(write=False)
            self.values[variable.name] = initial

    def fork(self, twin: Twin) -> Session:
        """A session of another twin object of this description that stands where this one does.

        What the twin itself knows is not copied: see `Twin.restore`.
        """
        other = Session(twin, self.name)
        other.values = dict(self.values)
        other.input_causes = {name: dict(causes) for name, causes in self.input_causes.items()}
        other.told_by = dict(self.told_by)
        other.serial, other.last_ns = self.serial, self.last_ns
        other._before = self._before
        other._step._held, other.has_more = self._step._held, bool(self._step._held)
        return other

    def open(self, seed: int, parameters: Mapping[str, float], start_ns: int = 0) -> None:
        """Begin at `start_ns` of the run; the first step covers the span since then."""
        self.last_ns = start_ns
        known = {p.name: p.default for p in self.description.parameters}
        for name in parameters:
            if name not in known:
                raise TwinError(
                    Reason.UNKNOWN_PARAMETER,
                    f"{self.name} has no parameter {name!r}; it has {sorted(known)}",
                    {"member": self.name, "parameter": name},
                )
        self.twin.open(seed, {**known, **parameters})

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        """Be one of the futures of a state that was just restored (see `Twin.diverge`).

        `parameters` may leave out those that have their default. Fails with UNDECLARED_OUTPUT,
        WRONG_SHAPE or NOT_FINITE for what is believed, and with TIME_REGRESSION.
        """
        if time_ns < self.last_ns:
            raise TwinError(
                Reason.TIME_REGRESSION,
                f"{self.name} has done its step at {self.last_ns} ns; no other future can begin at "
                f"{time_ns} ns",
                {"member": self.name},
            )
        check_outputs(self.name, self.sizes, StepResult(time_ns, outputs=believed))
        known = {p.name: p.default for p in self.description.parameters}
        next_ns = self.twin.diverge(time_ns, seed, {**known, **parameters}, believed)
        if next_ns is not None and next_ns < time_ns:
            raise TwinError(
                Reason.TIME_REGRESSION,
                f"{self.name} asked, in a future from {time_ns} ns on, to wake at {next_ns} ns",
                {"member": self.name},
            )
        return next_ns

    def advance(self, given: StepInput) -> StepResult:
        """Do one step, or redo the last one when `given.micro` > 0."""
        if self._can_redo:
            if given.micro == 0 or self._before is None:
                self._before = (self.twin.snapshot(), self.serial, self.last_ns)
            else:
                state, self.serial, self.last_ns = self._before
                self.twin.restore(state)
        for variable, value in given.inputs.items():
            if variable not in self.values:
                raise TwinError(
                    Reason.UNKNOWN_VARIABLE,
                    f"{self.name} has no input {variable!r}",
                    {"member": self.name, "variable": variable},
                )
            if value.shape != self.values[variable].shape:
                raise TwinError(
                    Reason.WRONG_SHAPE,
                    f"{self.name}.{variable} wants {self.values[variable].size} values "
                    f"and was given {value.size}",
                    {"member": self.name, "variable": variable},
                )
            self.values[variable] = value
        for variable, causes in given.causes.items():
            self.input_causes.setdefault(variable, {}).update(causes)
        self._step.seen_ns, self._step.missed_since_ns = given.seen_ns, given.missed_since_ns
        self.run(given.time_ns, given.inputs, given.actions, given.micro)
        return self.result()

    def run(
        self,
        time_ns: int,
        changed: Iterable[str] = (),
        actions: tuple[Action, ...] = (),
        micro: int = 0,
    ) -> dict[str, bytes]:
        """Let the twin do a step with the `values` that are there; what it published, unchecked.

        This is the bare step for a caller in the same process that has put the values of the
        `changed` inputs in place, never redoes a step, and checks what comes out.
        """
        step = self._step
        if self.has_more:
            # that what was held is good again is news, too
            self.has_more = bool(step._held)
            step._begin()
        step.time_ns = time_ns
        step.micro = micro
        step.last_ns = self.last_ns
        step.actions = actions
        step._changed = changed
        outputs: dict[str, bytes] = {}
        step._outputs = outputs
        self.twin.advance(step)
        self.last_ns = time_ns
        return outputs

    def result(self) -> StepResult:
        """What the last step gave, checked; its values have no -0.0 and can't be written."""
        step = self._step
        outputs: dict[str, Vector] = {}
        for variable, data in step._outputs.items():
            size = self.sizes.get(variable)
            if size is None:
                raise undeclared(self.name, variable)
            if len(data) != 8 * size:
                raise wrong_shape(self.name, variable, size, len(data) // 8)
            value: Vector = np.frombuffer(data, FLOAT64)
            check_finite(self.name, variable, value, step.time_ns)
            if has_minus_zero(data):
                value = plain_zeros(value)
                value.setflags(write=False)
            outputs[variable] = value
        if not self.has_more:
            return StepResult(step.time_ns, step.micro, outputs)
        return StepResult(
            step.time_ns,
            step.micro,
            outputs,
            step._causes,
            tuple(step._events),
            tuple(step._acts),
            step._next_ns,
            held=step._held,
            seen_ns=step._seen_ns,
        )
