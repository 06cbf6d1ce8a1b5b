"""The scenario document: a YAML file, checked to the line, that describes one experiment."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from federation.core.coupling import Combine, Coupling
from federation.errors import Reason, ScenarioError
from federation.twin import HOUR_NS, MINUTE_NS, SECOND_NS

LATIN_HYPERCUBE = "latin-hypercube"
SOBOL = "sobol"

PLANNER = "planner"
"""The member that sends repair crews; it exists in every run and may do nothing."""


def _variable(text: object) -> object:
    if isinstance(text, str) and re.fullmatch(r"[a-z]\w*\.\w+", text):
        return text
    raise ValueError(f"{text!r} is not of the form member.variable")


Variable = Annotated[str, BeforeValidator(_variable)]


MOST_NS = 2**62

_UNITS_NS = {"h": HOUR_NS, "min": MINUTE_NS, "s": SECOND_NS}


SLOWEST, FASTEST = 1e-6, 1e9
"""Of the pace of a run, in seconds of it per second of wall time."""


class Part(BaseModel):
    """Every part of a scenario refuses keys that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        """The clock of a run has 64 bits of nanoseconds."""
        for name, value in self:
            unit_ns = _UNITS_NS.get(name.rpartition("_")[2])
            is_span = unit_ns is not None and isinstance(value, float) and value > 0.0
            if is_span and not 1.0 <= value * unit_ns <= MOST_NS:
                raise ValueError(f"{name} lies between a nanosecond and 146 years; it is {value}")
        return self


class Service(Part):
    """A twin: a class to run in this process or to serve, or the address of a service."""

    twin: str | None = Field(None, alias="class", description="module:Class")
    address: str | None = Field(None, description="host:port of a running service")
    config: dict[str, str | int | float | bool] = {}

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.twin is None) == (self.address is None):
            raise ValueError("a member has either a class or an address")
        return self


class OnFailure(Part):
    """What happens when a member gives no good answer: it is lost, late, or breaks its contract.

    `fail` ends the run with the reason. `hold` goes on with the last values, marked as held.
    `substitute` goes on with another twin that has the same variables, its values marked. To
    `recover` is exact: a fresh session, from the last saved state or the start, does every step
    since again.
    """

    do: Literal["fail", "hold", "substitute", "recover"] = "fail"
    answer_within_s: PositiveFloat = Field(default=120.0, description="of wall time, for one frame")
    back_within_s: PositiveFloat = Field(
        default=60.0, description="wall time for a service to be there"
    )
    save_every_min: float = Field(
        default=0.0, ge=0, description="of the run, between snapshots; 0: none"
    )
    substitute: Service | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, value: object) -> object:
        return {"do": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.do == "substitute") != (self.substitute is not None):
            raise ValueError("say who stands in with `substitute`, and only with do: substitute")
        return self

    @property
    def save_every_ns(self) -> int:
        return round(self.save_every_min * MINUTE_NS)


class Peering(Part):
    """How a member that is another city is asked: what for, and for which kind of session.

    A `what-if` is a run of that city's scenario for this run alone; a `live` session looks at the
    run of the city that goes on, and has at each instant what was so there before it. With
    `on_failure: recover` it is never given up: the city is sought for as long as the run goes on.

    When the request would come back to a city that it has come from, that city refuses it, and the
    run can't begin; or this one may `leave-out` the member: what it feeds keeps its first value.
    """

    purpose: str = ""
    city: str = Field("", description="whose broker has to answer; the member's name if unset")
    session: Literal["what-if", "live"] = "what-if"
    on_loop: Literal["refuse", "leave-out"] = "refuse"
    clock_within_s: PositiveFloat = Field(
        1.0, description="values of a city whose clock is further off than this are marked as held"
    )


class Member(Service):
    """A twin with a place in the run, and what happens when it is lost."""

    on_failure: OnFailure = OnFailure()
    peer: Peering | None = Field(None, description="set for another city")


class Pace(Part):
    """How a run of services keeps to the wall clock; a run in one process goes as fast as it can.

    No step is granted before its instant. When the federation falls behind, it may `wait`: what
    is late is done at once, until the clock is caught up with. It may `skip`: when a step is
    granted more than `late_after_s` late, the clock is set back and the time is lost for good. Or
    it may `degrade`: a member with a period, outside of loops without delay, that takes more than
    `late_after_s` for a step is not waited for any longer; its values hold and are marked as stale
    until it has caught up. What such a run gives depends on the wall clock, what the other two
    give does not.
    """

    factor: float = Field(
        ge=SLOWEST, le=FASTEST, description="seconds of the run per second of wall time"
    )
    when_late: Literal["wait", "skip", "degrade"] = "wait"
    late_after_s: PositiveFloat = Field(default=1.0, description="of wall time")


class Map(Part):
    """Links taken from two columns of a CSV file beside the scenario."""

    file: str
    source: str
    target: str
    weight: str | None = None


class CouplingSpec(Part):
    """`source` and `target` are member.variable; the delay is 0 unless one is given."""

    source: Variable = Field(alias="from")
    target: Variable = Field(alias="to")
    delay_min: float = Field(0.0, ge=0)
    map: Map | None = None
    combine: Combine = Combine.ERROR


class Work(Part):
    """One family of components that crews repair, in the words of the twins that know them."""

    actuator: Variable
    remaining: Variable = Field(description="hours of crew work left per component")
    busy: Variable = Field(description="crews on the way to or at a component")
    travel: Variable = Field(description="minutes from the depot to a component")


class Assessment(Part):
    """How it becomes known what a repair takes: at once which, only later how long.

    The crew-hours that are believed are the truth times exp(`sigma` z), with z standard normal
    and the same for all measures, until the damage has been inspected: a time after it was
    reported that is uniform between the two ends of `inspected_after_h`, or when work begins.
    Where damage is assessed, the planner also takes every uncertain parameter to be at its median.
    """

    sigma: float = Field(ge=0.0, le=2.0)
    inspected_after_h: tuple[float, float] = (6.0, 48.0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.inspected_after_h
        if not 0.0 <= low <= high:
            raise ValueError(f"inspected_after_h is a range of hours, not {low:g} to {high:g}")
        return self


class Repairs(Part):
    """Repair crews, shared by all families of work."""

    crews: PositiveInt
    decide_every_min: PositiveFloat = 60.0
    decide_from_min: float = Field(0.0, ge=0.0, description="of the run, the first decision")
    delay_min: PositiveFloat = Field(5.0, description="from a decision until crews set out")
    horizon_h: PositiveFloat = Field(72.0, description="how far a plan looks ahead")
    assessment: Assessment | None = None
    rehearse_h: PositiveFloat = Field(24.0, description="how far `level5` looks into futures")
    futures: PositiveInt = Field(2, description="in how many futures `level5` tries each plan")
    renew: bool = Field(
        False, description="whether `level5` also plans with what members could do by then"
    )
    work: tuple[Work, ...]


class Rule(Part):
    """What operators do without a plan: they set an actuator while something lacks.

    All entities to `value`; or, with a `size`, as many in turn as cover what lacks, each by its
    size. Rules follow each other, each with what the ones before it have left to cover.
    """

    actuator: Variable
    lacking: Variable = Field(description="how much lacks, a scalar")
    value: float
    size: Variable | None = Field(None, description="what an entity covers at `value`")
    store: Variable | None = Field(None, description="the rule rests while this is used up")


class Dispatch(Part):
    """Actuators that a planner sets period by period, and what operators would do instead."""

    decide_every_min: PositiveFloat = 60.0
    delay_min: PositiveFloat = Field(5.0, description="from a decision until it takes effect")
    horizon_h: PositiveFloat = Field(72.0, description="how far a plan looks ahead")
    actuators: tuple[Variable, ...] = Field(min_length=1)
    members: tuple[str, ...] = Field((), description="whose blocks a plan is made of; none: all")
    rules: tuple[Rule, ...] = ()
    news: tuple[Variable, ...] = Field((), description="outputs that make `level5` think again")
    rehearse_h: PositiveFloat = Field(4.0, description="how far `level5` looks into futures")
    futures: PositiveInt = Field(2, description="in how many futures `level5` tries each plan")
    later_futures: PositiveInt = Field(1, description="in how many after its first decision")


class Distribution(Part):
    """One of: uniform [low, high]; normal [mean, sd]; lognormal [median, sigma of ln];
    triangular [low, mode, high]; choice [values]."""

    uniform: tuple[float, float] | None = None
    normal: tuple[float, float] | None = None
    lognormal: tuple[float, float] | None = None
    triangular: tuple[float, float, float] | None = None
    choice: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}")
        return self


class Correlation(Part):
    """How two uncertain parameters go together: the correlation of the standard normal variables
    behind them (a Gaussian copula). Pairs that are not named are independent."""

    of: tuple[Variable, Variable]
    rho: float = Field(gt=-1.0, lt=1.0)


class Stop(Part):
    """When a study has enough runs: after `runs` of each measure, or once the 95 % interval of
    the mean of `kpi` reaches no further than `half_width` (or the share `relative` of the mean)
    to either side, under every measure.

    The interval is looked at after each run in the order of runs, whatever order they end in,
    from `least_runs` on; after `most_runs` the study ends in any case.
    """

    runs: PositiveInt | None = None
    kpi: str | None = Field(None, description="member.variable, or `weighted`")
    half_width: PositiveFloat | None = Field(None, description="in the unit of the KPI")
    relative: PositiveFloat | None = Field(None, description="share of the mean")
    least_runs: int = Field(20, ge=2)
    most_runs: PositiveInt = 1000

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        width = [self.half_width, self.relative].count(None) == 1
        if self.runs is not None and not self.model_fields_set - {"runs"}:
            return self
        if self.runs is not None or self.kpi is None or not width:
            raise ValueError("give runs, or kpi with half_width or relative")
        if self.least_runs > self.most_runs:
            raise ValueError(f"{self.most_runs} runs at most are fewer than {self.least_runs}")
        return self

    @property
    def most(self) -> int:
        return self.most_runs if self.runs is None else self.runs


Policy = Literal["none", "nearest", "plan", "once", "level5"]
DispatchPolicy = Literal["none", "rule", "once", "level5"]


class Measure(Part):
    """What is done about it: how crews are sent, how actuators are set, parameters that differ."""

    crews: Policy = "none"
    dispatch: DispatchPolicy = "none"
    parameters: dict[str, float] = {}
    doc: str = ""


class Scenario(Part):
    """One coupled experiment."""

    name: str
    region: str
    doc: str = ""
    seed: int = Field(1, ge=0)
    horizon_h: PositiveFloat
    members: dict[str, Member] = Field(min_length=1)
    couplings: tuple[CouplingSpec, ...] = ()
    repairs: Repairs | None = None
    dispatch: Dispatch | None = None
    parameters: dict[str, float] = {}
    uncertainty: dict[str, Distribution] = {}
    correlation: tuple[Correlation, ...] = ()
    sampling: str = Field(
        LATIN_HYPERCUBE, description="latin-hypercube, sobol, or a CSV file with a row per run"
    )
    stop: Stop | None = None
    measures: dict[str, Measure] = {"none": Measure()}
    kpis: tuple[Variable, ...] = ()
    weighted: dict[Variable, float] = Field(
        default={}, description="what a unit of each KPI counts in the KPI `weighted`"
    )
    sensitivity: dict[str, tuple[float, float]] = {}
    pace: Pace | None = None
    staleness: dict[Variable, PositiveFloat] = Field(
        default={}, description="minutes of the run that an output may go unpublished"
    )
    folder: Path = Field(Path(), exclude=True)
    text: str = Field("", exclude=True)

    @model_validator(mode="after")
    def _names(self) -> Scenario:
        if PLANNER in self.members:
            raise ValueError(f"{PLANNER!r} is the name of the built-in member; choose another")
        if any(m.crews != "none" for m in self.measures.values()) and self.repairs is None:
            raise ValueError("a measure sends crews, but the scenario has no repairs")
        if any(m.dispatch != "none" for m in self.measures.values()) and self.dispatch is None:
            raise ValueError("a measure sets actuators, but the scenario has no dispatch")
        if self.dispatch is not None and self.repairs is not None:
            raise ValueError("a scenario has either repairs or dispatch: one planner does one")
        if missing := [name for name in self.weighted if self.kpis and name not in self.kpis]:
            raise ValueError(f"{missing[0]} is weighted and not among the kpis")
        judged = self.stop.kpi if self.stop is not None else None
        if judged == "weighted" and not self.weighted:
            raise ValueError("stop: the KPI weighted needs weights: weighted: {member.kpi: 1.0}")
        if judged not in (None, "weighted", *self.kpis) and (self.kpis or "." not in str(judged)):
            raise ValueError(f"stop: {judged} is not among the kpis")
        if self.sampling not in (LATIN_HYPERCUBE, SOBOL):
            if not self.sampling.endswith(".csv"):
                raise ValueError(
                    f"sampling: {self.sampling!r} is neither {LATIN_HYPERCUBE} nor {SOBOL} nor a "
                    "file that ends in .csv"
                )
            if self.correlation:
                raise ValueError("correlation: given samples have the correlation that they have")
        self.copula()
        if self.pace is not None and self.pace.when_late == "degrade":
            for name, member in self.members.items():
                if member.on_failure.do in ("hold", "substitute"):
                    raise ValueError(
                        f"{name} has on_failure: {member.on_failure.do}, which can't be together "
                        "with pace: when_late: degrade; let it fail or recover"
                    )
        return self

    @property
    def horizon_ns(self) -> int:
        return round(self.horizon_h * HOUR_NS)

    def paced(self, factor: float) -> Scenario:
        """The same at another pace, and with 0 at none. Fails with SCENARIO_INVALID."""
        if factor and not SLOWEST <= factor <= FASTEST:
            raise ScenarioError(
                Reason.SCENARIO_INVALID, f"{factor:g} is no pace: seconds of the run per second"
            )
        pace = self.pace or Pace(factor=1.0)
        changed = pace.model_copy(update={"factor": factor}) if factor else None
        return self.model_copy(update={"pace": changed})

    def copula(self) -> np.ndarray | None:
        """The correlation matrix over the uncertain parameters in the order of their names.

        None without correlation. Raises `ValueError` when no variables can go together so.
        """
        if not self.correlation:
            return None
        names = sorted(self.uncertainty)
        matrix = np.eye(len(names))
        for pair in self.correlation:
            for name in pair.of:
                if name not in self.uncertainty:
                    raise ValueError(f"correlation: {name} is not uncertain")
            i, j = (names.index(name) for name in pair.of)
            if i == j or matrix[i, j] != 0.0:
                raise ValueError(f"correlation: {' and '.join(pair.of)} are no pair, or twice one")
            matrix[i, j] = matrix[j, i] = pair.rho
        least = float(np.linalg.eigvalsh(matrix)[0])
        if least <= 1e-12:
            raise ValueError(
                "correlation: no variables can be correlated so; the matrix is not positive "
                f"definite (its least eigenvalue is {least:.3g})"
            )
        return matrix

    def staleness_ns(self) -> dict[tuple[str, str], int]:
        """Per member and variable how old a value may be, in nanoseconds of the run."""
        return {
            (name.partition(".")[0], name.partition(".")[2]): round(bound_min * MINUTE_NS)
            for name, bound_min in self.staleness.items()
        }

    def couplings_resolved(self) -> tuple[Coupling, ...]:
        """The couplings with their maps read; raises MISSING_FILE or SCENARIO_INVALID."""
        return _resolved(self.couplings, self.folder)


class Addition(Part):
    """Members that join a run that is going on, and how they are coupled to it."""

    members: dict[str, Member] = Field(min_length=1)
    couplings: tuple[CouplingSpec, ...] = ()
    parameters: dict[str, float] = {}
    folder: Path = Field(Path(), exclude=True)
    text: str = Field("", exclude=True)

    def couplings_resolved(self) -> tuple[Coupling, ...]:
        """The couplings with their maps read; raises MISSING_FILE or SCENARIO_INVALID."""
        return _resolved(self.couplings, self.folder)

    def parameters_of(self, member: str) -> dict[str, float]:
        """What a member that joins is opened with, by parameter."""
        named = {name.partition(".")[::2]: value for name, value in self.parameters.items()}
        return {parameter: value for (who, parameter), value in named.items() if who == member}


def _resolved(couplings: Iterable[CouplingSpec], folder: Path) -> tuple[Coupling, ...]:
    found = []
    for spec in couplings:
        source, _, output = spec.source.partition(".")
        target, _, input_ = spec.target.partition(".")
        links = None if spec.map is None else _links(folder, spec.map)
        delay_ns = round(spec.delay_min * MINUTE_NS)
        found.append(Coupling(source, output, target, input_, delay_ns, links, spec.combine))
    return tuple(found)


def _links(folder: Path, map_: Map) -> tuple[tuple[str, str, float], ...]:
    path = folder / map_.file
    if "\0" in str(path) or not path.resolve().is_relative_to(folder.resolve()):
        raise ScenarioError(
            Reason.MISSING_FILE,
            f"the map {map_.file!r} does not lie in the scenario's folder or below it",
            {"file": map_.file},
        )
    if not path.is_file():
        raise ScenarioError(
            Reason.MISSING_FILE,
            f"the map {path} is not there; paths are relative to the scenario",
            {"file": str(path)},
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for column in (map_.source, map_.target, *filter(None, [map_.weight])):
            if column not in (rows.fieldnames or ()):
                raise ScenarioError(
                    Reason.SCENARIO_INVALID,
                    f"{path} has no column {column!r}; it has {', '.join(rows.fieldnames or ())}",
                    {"file": str(path), "column": column},
                )
        return tuple(
            (row[map_.source], row[map_.target], float(row[map_.weight]) if map_.weight else 1.0)
            for row in rows
            if row[map_.source] and row[map_.target]
        )


_Part = TypeVar("_Part", bound=Part)

MOST_CHARACTERS = 4_000_000
"""Of a document; a scenario of 1,000 members has some 200,000."""

MOST_NODES = 1_000_000
"""Of a document whose aliases are written out."""


@dataclass(frozen=True)
class Document:
    """The text of a scenario, or of another `model`, with the line of every key, for errors that
    help."""

    text: str
    path: str
    model: type[Part] = Scenario
    noun: str = "a scenario"
    invalid: Reason = Reason.SCENARIO_INVALID

    @cached_property
    def tree(self) -> yaml.Node:
        if len(self.text) > MOST_CHARACTERS:
            raise self.error_at(self.invalid, 1, f"it has more than {MOST_CHARACTERS:,} characters")
        with self._sound():
            tree = yaml.compose(self.text, Loader=yaml.SafeLoader)
            if not isinstance(tree, yaml.MappingNode):
                raise self.error_at(self.invalid, 1, f"{self.noun} is a mapping of keys")
            if _size(tree, {}) > MOST_NODES:
                raise self.error_at(
                    self.invalid, 1, f"its aliases make it over {MOST_NODES:,} long"
                )
        return tree

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """What YAML makes of odd text is an error that names the line, if there is one."""
        try:
            yield
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = mark.line + 1 if mark else 1
            raise self.error_at(self.invalid, line, f"{error.problem}") from None
        except (yaml.YAMLError, ValueError, TypeError, ArithmeticError) as error:
            raise self.error_at(self.invalid, 1, f"{error}") from None
        except RecursionError:
            raise self.error_at(self.invalid, 1, "it is nested too deeply") from None

    def line(self, path: tuple[int | str, ...]) -> int:
        """The line (from 1) of the deepest key on `path` that the document has."""
        node, line = self.tree, 1
        for key in path:
            if isinstance(node, yaml.MappingNode):
                pairs = [(k, v) for k, v in node.value if k.value == str(key)]
                if not pairs:
                    continue
                line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
                if key >= len(node.value):
                    break
                node = node.value[key]
                line = node.start_mark.line + 1
        return line

    def read(self, model: type[_Part]) -> _Part:
        """What the document says. What is wrong with it is an error that names the line."""
        data = {}
        if self.tree:
            with self._sound():
                data = yaml.safe_load(self.text)
        try:
            return model.model_validate(data)
        except ValidationError as problem:
            raise self.error(problem) from None

    def error_at(self, reason: Reason, line: int, message: str) -> ScenarioError:
        where = {"file": self.path, "line": str(line)}
        return ScenarioError(reason, f"{self.path}, line {line}: {message}", where)

    def error(self, problem: ValidationError) -> ScenarioError:
        """What is wrong, in words, with its line; a misspelt key before what it left missing."""
        found = problem.errors()
        first = min(found, key=lambda e: e["type"] != "extra_forbidden")
        path = first["loc"]
        line = self.line(path)
        dotted = ".".join(str(p) for p in path)
        if first["type"] == "extra_forbidden":
            known = _keys(path[:-1], self.model)
            close = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            return self.error_at(Reason.UNKNOWN_KEY, line, f"unknown key {path[-1]!r}{hint}")
        message = first["msg"].removeprefix("Value error, ")
        whole = self.noun.split()[-1]
        return self.error_at(self.invalid, line, f"{dotted or whole}: {message}")


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The nodes of a document with its aliases written out; fails with ValueError on a loop."""
    if id(node) not in known:
        known[id(node)] = -1
        inside: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            inside = chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        known[id(node)] = 1 + sum(_size(each, known) for each in inside)
    if known[id(node)] < 0:
        raise ValueError("an alias is in what it stands for")
    return known[id(node)]


def _keys(path: tuple[int | str, ...], model: type[Part]) -> list[str]:
    """The keys that the part of `model` at `path` knows, as they are written in a document."""
    for key in path:  # indices and free names, such as those of members, name no field
        annotation = _fields(model).get(str(key))
        for part in (annotation, *get_args(annotation)):
            if isinstance(part, type) and issubclass(part, Part):
                model = part
    return list(_fields(model))


def _fields(model: type[Part]) -> dict[str, Any]:
    """The fields of a part by the keys that they have in a document."""
    return {
        field.alias or name: field.annotation
        for name, field in model.model_fields.items()
        if not field.exclude
    }


def parse(text: str, path: str = "scenario", folder: Path | None = None) -> Scenario:
    """Read a scenario from text; `folder` is where its files are looked for."""
    document = Document(text, path)
    scenario = document.read(Scenario)
    known = {*scenario.members, PLANNER}
    for section, names in _references(scenario).items():
        for name in names:
            member = name.partition(".")[0]
            if member not in known:
                close = difflib.get_close_matches(member, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise document.error_at(
                    Reason.UNKNOWN_MEMBER,
                    _line_of(text, name) or document.line((section,)),
                    f"{name!r} names no member of this scenario{hint}",
                )
    return scenario.model_copy(update={"folder": folder or Path(), "text": text})


def parse_addition(text: str, path: str = "addition", folder: Path | None = None) -> Addition:
    """Read what joins a run from text, written as in a scenario; fails as `parse` does."""
    addition = Document(text, path).read(Addition)
    return addition.model_copy(update={"folder": folder or Path(), "text": text})


def _references(scenario: Scenario) -> Mapping[str, list[str]]:
    return {
        "couplings": [v for c in scenario.couplings for v in (c.source, c.target)],
        "parameters": [*scenario.parameters],
        "uncertainty": [*scenario.uncertainty],
        "correlation": [name for pair in scenario.correlation for name in pair.of],
        "kpis": [*scenario.kpis],
        "weighted": [*scenario.weighted],
        "sensitivity": [*scenario.sensitivity],
        "staleness": [*scenario.staleness],
        "measures": [p for m in scenario.measures.values() for p in m.parameters],
        "repairs": [
            v
            for w in (scenario.repairs.work if scenario.repairs else ())
            for v in (w.actuator, w.remaining, w.busy, w.travel)
        ],
        "dispatch": _names_of(scenario.dispatch),
    }


def _names_of(dispatch: Dispatch | None) -> list[str]:
    if dispatch is None:
        return []
    rules = [v for r in dispatch.rules for v in (r.actuator, r.lacking, r.size, r.store) if v]
    return [*dispatch.actuators, *dispatch.members, *rules, *dispatch.news]


def _line_of(text: str, name: str) -> int | None:
    lines = [i for i, line in enumerate(text.splitlines(), 1) if name in line]
    return lines[0] if lines else None


def load(path: str | Path) -> Scenario:
    """Read a scenario file; raises SCENARIO_NOT_FOUND, SCENARIO_INVALID or UNKNOWN_KEY."""
    file = Path(path)
    if not file.is_file():
        raise ScenarioError(
            Reason.SCENARIO_NOT_FOUND, f"there is no scenario at {file}", {"file": str(file)}
        )
    return parse(file.read_text(encoding="utf-8"), str(path), file.parent)
