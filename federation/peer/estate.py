"""What a city may bargain with: one YAML document that says which goods there are, what stands
behind each, and what it is worth.

Behind a good is either a port of a member's block, or steps of a curve: so many units at such a
price, as many as an output of the city's run says at the time if it is named. The document is read
anew for every conversation, so that whoever knows how a city stands may write it as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol, Self

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from federation.core.coupling import Coupling
from federation.errors import Reason, ScenarioError
from federation.peer.city import City
from federation.plan.border import Holding, Line, Outlet
from federation.scenario.spec import Document, Part
from federation.twin import HOUR_NS, SYSTEM, LinearBlock, Port, Vector

STOCK = "stock"
"""The member that has what stands behind no port. No document can name it: see `_beside`."""


def _word(text: object) -> object:
    if isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9-]*", text):
        return text
    raise ValueError(f"{text!r} is no name of a good: small letters, digits and hyphens")


Present = Callable[[str, str], Vector | None]
"""The last value of a member's output in the city's run that goes on, if it has told one; fails
with NOT_LIVE when none goes on."""


def no_run(member: str, variable: str) -> Vector | None:
    """Of a city that has no run."""
    raise ScenarioError(Reason.NOT_LIVE, "the city has no run that goes on")


Word = Annotated[str, BeforeValidator(_word)]
Span = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Way(Part):
    """What stands behind a good in one direction: a port of a member, which is of role supply for
    what is given and of role need for what is taken; all its entities, or one."""

    port: str = Field(pattern=r"^[\w-]+\.[\w-]+$", description="member.port")
    entity: str = ""

    @property
    def outlet(self) -> Outlet:
        member, _, port = self.port.partition(".")
        return Outlet(member, port, self.entity)


class Step(Part):
    """Up to so many units more, each at this price for an hour: what it costs to do without one
    that is given, or what one that is taken is worth. US dollars of 2020.

    With `most_of` there are no more than an output of the city's run says at the time, and none
    where it is below 0.
    """

    most: Span | None = None
    most_of: str = Field(default="", pattern=r"^([\w-]+\.[\w-]+)?$", description="member.variable")
    entity: int | None = Field(default=None, ge=0, description="its index; the sum of all")
    usd_per_h: Span

    @model_validator(mode="after")
    def _is_limited(self) -> Self:
        if self.most is None and not self.most_of:
            raise ValueError("say how many: `most`, `most_of`, or both")
        return self

    def now(self, present: Present) -> Step:
        """The same as things stand; fails with NOT_LIVE, UNKNOWN_VARIABLE or UNKNOWN_ENTITY."""
        if not self.most_of:
            return self
        member, _, variable = self.most_of.partition(".")
        value = present(member, variable)
        if value is None:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE, f"the city's run has told no {self.most_of} yet"
            )
        if self.entity is not None and self.entity >= value.size:
            text = f"{self.most_of} has {value.size} entities"
            raise ScenarioError(Reason.UNKNOWN_ENTITY, text)
        told = float(value.sum() if self.entity is None else value[self.entity])
        most = math.inf if self.most is None else self.most
        return Step(most=min(max(told, 0.0), most), usd_per_h=self.usd_per_h)


def _sort(given: object) -> str:
    return "port" if isinstance(given, Mapping | Way) else "steps"


Behind = Annotated[
    Annotated[Way, Tag("port")] | Annotated[tuple[Step, ...], Tag("steps")], Discriminator(_sort)
]
"""What stands behind a good in one direction."""


class Good(Part):
    """Something that may cross the border; without `gives` or `takes` not in that direction.

    The steps of what is given must get dearer, those of what is taken worth less.
    """

    unit: str
    whole: bool = Field(default=False, description="of a curve: only whole things")
    gives: Behind = ()
    takes: Behind = ()

    @model_validator(mode="after")
    def _is_a_curve(self) -> Self:
        for steps, name, sign in ((self.gives, "gives", 1), (self.takes, "takes", -1)):
            if isinstance(steps, tuple):
                usd = [sign * step.usd_per_h for step in steps]
                if usd != sorted(usd):
                    how = "dearer" if sign > 0 else "worth less"
                    raise ValueError(f"the steps of `{name}` get {how} one by one")
        return self


class EstateSpec(Part):
    """The goods of a city."""

    version: PositiveInt
    goods: dict[Word, Good] = Field(default={})


def read_estate(text: str, path: str = "aid") -> EstateSpec:
    """Read from text; fails with SCENARIO_INVALID or UNKNOWN_KEY, naming the line."""
    document = Document(text, path, EstateSpec, "a list of goods", Reason.SCENARIO_INVALID)
    return document.read(EstateSpec)


Ask = tuple[str, str, bool]
"""A good, a unit, and whether it is given."""


class Estate(Protocol):
    """Where a city's part of a bargain comes from. Its methods may be called from any thread."""

    def holding(self, asked: Sequence[Ask], start_ns: int, periods_ns: tuple[int, ...]) -> Holding:
        """The blocks of the city from an instant of its run on, as things stand.

        Fails with UNKNOWN_VARIABLE for what there is not, and INCOMPATIBLE_UNITS.
        """

    def outlets(self, asked: Sequence[Ask]) -> Sequence[Outlet]:
        """Which ports of the blocks are meant."""

    def units(self) -> Mapping[str, str]:
        """The goods that there are, each with its unit."""


class FileEstate:
    """The goods of a file, of the members of a city where a port is named.

    The members' blocks are those of fresh sessions, as their `flexibility` has them.
    """

    def __init__(self, file: Path, city: City | None = None, present: Present = no_run) -> None:
        """Fails with MISSING_FILE, SCENARIO_INVALID or UNKNOWN_KEY."""
        self._file, self._city, self._present = file, city, present
        self.read()

    def read(self) -> EstateSpec:
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ScenarioError(
                Reason.MISSING_FILE, f"{self._file} can't be read: {error}"
            ) from None
        return read_estate(text, str(self._file))

    def units(self) -> Mapping[str, str]:
        return {name: good.unit for name, good in self.read().goods.items()}

    def outlets(self, asked: Sequence[Ask]) -> Sequence[Outlet]:
        goods = self.read().goods
        return [_outlet(goods, *one) for one in asked]

    def holding(self, asked: Sequence[Ask], start_ns: int, periods_ns: tuple[int, ...]) -> Holding:
        goods = self.read().goods
        outlets = [_outlet(goods, *one) for one in asked]
        curves = {
            (name, gives): tuple(step.now(self._present) for step in steps)
            for name, _, gives in asked
            if isinstance(steps := _way(goods[name], gives), tuple)
        }
        blocks: dict[str, LinearBlock] = {}
        couplings: Sequence[Coupling] = ()
        if any(outlet.member != STOCK for outlet in outlets):
            blocks, couplings = self._members(periods_ns)
        if curves:
            units = {name: good.unit for name, good in goods.items()}
            whole = {name for name, good in goods.items() if good.whole}
            blocks[STOCK] = curve_block(curves, units, whole, periods_ns)
        return Holding(blocks, couplings)

    def _members(
        self, periods_ns: tuple[int, ...]
    ) -> tuple[dict[str, LinearBlock], Sequence[Coupling]]:
        city = self._city
        if city is None:
            text = f"{self._file} names ports of members, and there is no city to have them"
            raise ScenarioError(Reason.SCENARIO_INVALID, text)
        _beside(city)
        path, case = (city.name,), city.case(0)
        found = {}
        for member in city.quarters.describe(path):
            if member in city.cities:
                continue  # what another city could do is bargained over with it
            seed, parameters = case.member_seed(member), case.parameters.get(member, {})
            stand = city.quarters.open(member, seed, parameters, path)
            try:
                block = city.quarters.flexibility(stand, periods_ns)
            finally:
                stand.close()
            if block is not None:
                found[member] = block
        return found, city.scenario.couplings_resolved()


def curve_block(
    curves: Mapping[tuple[str, bool], Sequence[Step]],
    units: Mapping[str, str],
    whole: set[str],
    periods_ns: tuple[int, ...],
) -> LinearBlock:
    """Steps of curves as a block: what is given or taken in a period is the sum of its steps.

    Given: x <= sum of steps, each at its price times the hours. Taken: sum of steps <= x, each
    worth its price times the hours.
    """
    hours = np.array(periods_ns, dtype=np.float64) / HOUR_NS
    periods = hours.size
    names: list[str] = []
    high: list[float] = []
    cost: list[float] = []
    integer: list[bool] = []
    rows: list[str] = []
    entries: list[tuple[int, int, float]] = []
    ports: list[Port] = []
    for (good, gives), steps in curves.items():
        way, sign = ("gives", 1.0) if gives else ("takes", -1.0)
        columns = np.arange(periods) + len(names)
        for p in range(periods):
            names.append(f"{way} {good}[{p}]")
            high.append(sum(step.most or 0.0 for step in steps))
            cost.append(0.0)
            integer.append(good in whole)
        for p in range(periods):
            entries.append((len(rows), int(columns[p]), sign))
            for number, step in enumerate(steps):
                entries.append((len(rows), len(names), -sign))
                names.append(f"{way} {good}: step {number}[{p}]")
                high.append(step.most or 0.0)
                cost.append(sign * step.usd_per_h * float(hours[p]))
                integer.append(False)
            rows.append(f"{way} {good}[{p}]")
        port = _stock_port(good, gives)
        role = "supply" if gives else "need"
        ports.append(Port(port, role, SYSTEM, units[good], (SYSTEM,), columns[None, :]))
    row, column, value = zip(*entries, strict=True)
    return LinearBlock(
        columns=tuple(names),
        low=np.zeros(len(names)),
        high=np.array(high, dtype=np.float64),
        cost=np.array(cost, dtype=np.float64),
        integer=np.array(integer, dtype=np.bool_),
        rows=tuple(rows),
        row_low=np.full(len(rows), -np.inf),
        row_high=np.zeros(len(rows)),
        row_index=np.array(row, dtype=np.int64),
        column_index=np.array(column, dtype=np.int64),
        coefficient=np.array(value, dtype=np.float64),
        ports=tuple(ports),
        doc="what stands behind no port of a member",
    )


def lines_of(estate: Estate, asked: Sequence[Ask], held: Sequence[Vector]) -> tuple[Line, ...]:
    """The lines of a border as this city has them, with what is held of each."""
    outlets = estate.outlets(asked)
    return tuple(
        Line(good, unit, gives, outlet, kept)
        for (good, unit, gives), outlet, kept in zip(asked, outlets, held, strict=True)
    )


def _way(good: Good, gives: bool) -> Way | tuple[Step, ...]:
    return good.gives if gives else good.takes


def _outlet(goods: Mapping[str, Good], name: str, unit: str, gives: bool) -> Outlet:
    good = goods.get(name)
    way = () if good is None else _way(good, gives)
    if good is None or way == ():
        text = f"there is no {name} that this city could {'give' if gives else 'take'}"
        raise ScenarioError(Reason.UNKNOWN_VARIABLE, text, {"good": name})
    if good.unit != unit:
        text = f"{name} is counted in {good.unit} here, and not in {unit or 'nothing'}"
        raise ScenarioError(Reason.INCOMPATIBLE_UNITS, text, {"good": name})
    return way.outlet if isinstance(way, Way) else Outlet(STOCK, _stock_port(name, gives))


def _stock_port(good: str, gives: bool) -> str:
    return f"{good}-{'given' if gives else 'taken'}"


def _beside(city: City) -> None:
    if STOCK in city.scenario.members:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"a city that gives aid has no member {STOCK!r}: it is the name of what it has besides",
        )
