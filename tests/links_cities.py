"""Cities that look at each other's runs over bad links, and what must be so of their records."""

from __future__ import annotations

import asyncio
import bisect
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from federation.broker.live import LiveRun
from federation.broker.outages import Outage, outages
from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.ledger import EventRecord, Quality, Record
from federation.scenario.run import Outcome
from federation.scenario.spec import parse
from federation.scenario.study import cases
from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Causality,
    Description,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from tests.links import BadLink, Fault, bad_link
from tests.test_broker import present

STEP_NS = 5 * MINUTE_NS
WRITES_EVERY = 3
"""A station writes at each third of its steps."""


class Station(Twin):
    """Measures something that tells by its number when it was and where, writes now and then, and
    notes what it hears of others."""

    def describe(self) -> Description:
        return Description(
            model="station",
            version="1",
            domain="test",
            entities=(),
            variables=(
                Variable("heard", SYSTEM, "1", Causality.INPUT, 0.0),
                Variable("load", SYSTEM, "1", Causality.OUTPUT, 0.0),
                Variable("noted", SYSTEM, "1", Causality.OUTPUT, 0.0),
            ),
            time=TimePolicy(period_ns=STEP_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.base = float(np.random.default_rng(seed).integers(1, 1000)) * 1e6

    def advance(self, step: Step) -> None:
        number = step.time_ns // STEP_NS
        step.publish("load", self.base + number)
        step.publish("noted", step["heard"])
        if number % WRITES_EVERY == 0:
            step.emit("wrote", SYSTEM, f"{self.base:.0f}:{number}")


@dataclass
class City:
    """A city with its broker, and the links over which it looks at others."""

    name: str
    broker: BrokerServer
    run: LiveRun
    task: asyncio.Task[Outcome]
    joined_ns: dict[str, int] = field(default_factory=dict)
    """Since when it looks at a neighbour."""

    @property
    def settled_ns(self) -> int:
        return self.broker.store.run(self.run.name).settled_ns

    def records(self, owner: str, variable: str) -> list[tuple[Record, int]]:
        """What its ledger has of a variable, with when it was received."""
        found = self.broker.store.history(self.run.name, owner, variable, 0, 1 << 60)
        return [(s.entry, s.receive_ns) for s in found if isinstance(s.entry, Record)]

    def events(self, owner: str) -> list[EventRecord]:
        found, _, _ = self.broker.store.snapshot(self.run.name, members=[owner])
        return [s.entry for s in found if isinstance(s.entry, EventRecord)]

    def wrote(self, *, of: str = "") -> dict[str, list[int]]:
        """When it had which writes on record: its own, or those that a neighbour has told `of`."""
        found: dict[str, list[int]] = {}
        for entry in self.events(of or "station"):
            if entry.event.kind.endswith("wrote"):
                found.setdefault(entry.event.text, []).append(entry.time_ns)
        return found

    def is_good(self, neighbour: str, after_ns: int) -> bool:
        """Whether the last that it has of a neighbour is good and later than an instant."""
        where = (self.run.name, neighbour, "station_load")
        found = self.broker.store.history(*where, after_ns + 1, 1 << 60)
        last = found[-1].entry if found else None
        return isinstance(last, Record) and last.quality is Quality.GOOD

    def quality(self, neighbour: str) -> Quality | None:
        """Of the last that it has of a neighbour's load."""
        found = self.records(neighbour, "station_load")
        return found[-1][0].quality if found else None

    def outages(self) -> list[Outage]:
        return outages(self.broker.store, self.run.name)


POLICY = """
version: 1
patience_s: {patience_s}
rules:
  - name: stations
    who: ['*']
    what: {{sessions: [live], variables: [station.*], events: [station.*]}}
    resolution: {{text: true}}
  - name: what-others-wrote
    who: ['*']
    what: {{events: ['*.*wrote']}}
    relay: true
    resolution: {{text: true}}
limits:
  - {{steps: 1000000, cpu_s: 3000, wall_s: 3000}}
"""

DAY = """
name: {city}-day
region: {city}
horizon_h: {horizon_h}
members:
  station: {{class: "tests.links_cities:Station"}}
pace: {{factor: {factor}, when_late: degrade, late_after_s: {late_after_s}}}
"""

NEIGHBOUR = """
members:
  {city}: {{address: "{address}", peer: {{session: live}}, on_failure: recover}}
{couplings}
"""


def seed_of(name: str) -> int:
    return sum(map(ord, name))


def pace_of(step_s: float, late_after_s: float | None = None) -> dict[str, float]:
    """A step of five minutes in so many seconds; late is who takes longer than most of that."""
    late = 0.8 * step_s if late_after_s is None else late_after_s
    return {"factor": STEP_NS / 1e9 / step_s, "late_after_s": late}


@asynccontextmanager
async def city_alone(
    name: str,
    folder: Path,
    pace: Mapping[str, float],
    store: str | Path = ":memory:",
    horizon_h: float = 2000.0,
    station: type[Twin] = Station,
) -> AsyncIterator[City]:
    """A city whose run goes on."""
    document = DAY.format(city=name, horizon_h=horizon_h, **pace)
    scenario, policy = folder / f"{name}.yaml", folder / f"{name}-policy.yaml"
    scenario.write_text(document, encoding="utf-8")
    patience_s = min(1.0, 0.6 * pace["late_after_s"])
    policy.write_text(POLICY.format(patience_s=patience_s), encoding="utf-8")
    options = BrokerOptions(
        city=name, export=policy, city_scenario=scenario, grace_s=0.1, store=store
    )
    async with BrokerServer(options) as broker, present(broker.address, station=station):
        await broker.members_ready(["station"], 10)
        parsed = parse(document)
        (case,) = cases(parsed, ["none"], 1, seed_of(name))
        run, task = await broker.begin(parsed, case, None)
        try:
            yield City(name, broker, run, task)
        finally:
            await run.cancel()
            await asyncio.wait([task])


async def look(city: City, name: str, address: str, *, heeds: bool = True, ahead: int = 3) -> None:
    """Let a city look at its neighbour from so many steps `ahead` on and, if it `heeds` it, let its
    station hear."""
    couplings = ""
    if heeds:
        couplings = f"couplings: [{{from: {name}.station_load, to: station.heard, delay_min: 5}}]"
    text = NEIGHBOUR.format(city=name, address=address, couplings=couplings)
    await until(lambda: city.settled_ns >= 0)
    # at an instant of its own clock that both have steps at
    step = city.settled_ns // STEP_NS + ahead
    accepted = await city.broker.join(city.run.name, text, step * STEP_NS, "duty")
    city.joined_ns[name] = accepted.time_ns


@dataclass
class Neighbours:
    """Cities and the links between them, by who looks and at whom."""

    cities: dict[str, City]
    links: dict[tuple[str, str], BadLink]

    def between(self, one: str, other: str) -> list[BadLink]:
        """The links between two cities, in both directions."""
        return [link for pair, link in self.links.items() if set(pair) == {one, other}]


@asynccontextmanager
async def neighbours(
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    pace: Mapping[str, float],
    seed: int = 0,
    stores: Path | None = None,
    faults: Sequence[Fault] = (),
    ahead: int = 3,
) -> AsyncIterator[Neighbours]:
    """Cities of which the first of each pair looks at the second, over links with these faults from
    the beginning."""
    names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    async with AsyncExitStack() as stack:
        cities = {}
        for name in names:
            store = ":memory:" if stores is None else stores / f"{name}.sqlite"
            made = city_alone(name, folder, pace, store)
            cities[name] = await stack.enter_async_context(made)
        links = {}
        for number, (one, other) in enumerate(pairs):
            made_link = bad_link(cities[other].broker.address, 1000 * seed + number)
            links[one, other] = await stack.enter_async_context(made_link)
            for fault in faults:
                links[one, other].begin(fault)
        heeded: set[str] = set()
        for (one, other), link in links.items():
            # an input has one source
            heeds = one not in heeded
            await look(cities[one], other, link.address, heeds=heeds, ahead=ahead)
            heeded.add(one)
        yield Neighbours(cities, links)


async def until(is_so: Callable[[], bool], within_s: float = 40.0) -> None:
    """Wait for something."""
    async with asyncio.timeout(within_s):
        while not is_so():
            await asyncio.sleep(0.05)


async def all_good(found: Neighbours, within_s: float = 40.0) -> None:
    """Wait until every city has good values of all that it looks at, younger than now."""
    after = {name: city.settled_ns for name, city in found.cities.items()}

    def is_good() -> bool:
        return all(found.cities[one].is_good(other, after[one]) for one, other in found.links)

    await until(is_good, within_s)


# -- what must be so -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What one city has of another, against what that one has itself."""

    writes: int
    """How many it should have been told of."""
    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    wrong: tuple[str, ...]
    """Values that are said to be good and differ, or held ones that are not the last known."""
    compared: int
    """Instants whose value is known here, then or later, and is right."""
    unknown: tuple[int, ...]
    """Instants at which it did not hear the other one, and of whose value nothing is known here
    though that is over."""
    held: int
    """Instants at which it went by a value that was marked."""
    behind: int
    """Those of them at which it heard the other one, whose own run was behind or short of news."""


def compare(reader: City, owner: City) -> Comparison:
    """Hold what a city has of its neighbour against that one's own record, by event time and value:
    at each of its instants it is told what was so before.

    Of the writes that the owner has on record, its own and what others have told it of, all that
    came after the reader joined and before it last had a good value must be there once; but none
    that has been in the reader's city.
    """
    name = owner.name
    since_ns = reader.joined_ns[name]
    own = {r.time_ns: float(r.value[0]) for r, _ in owner.records("station", "load")}
    own_ns = sorted(own)

    def was(time_ns: int) -> float | None:
        """The owner's value before an instant."""
        found = bisect.bisect_left(own_ns, time_ns)
        return own[own_ns[found - 1]] if found else None

    had = reader.records(name, "station_load")
    good_ns = [r.time_ns for r, _ in had if r.quality is Quality.GOOD]
    last_ns = max(good_ns, default=-1)
    wrong: list[str] = []
    known: dict[int, float] = {}
    marked: set[int] = set()
    behind: set[int] = set()
    ends_ns = [*(record.time_ns for record, _ in had), last_ns][1:]
    for (entry, _), end_ns in zip(had, ends_ns, strict=True):
        value, at_s = float(entry.value[0]), entry.time_ns / 1e9
        if entry.quality is Quality.GOOD:
            known[entry.time_ns] = value
            if was(entry.time_ns) != value:
                wrong.append(f"at {at_s:g} s {value} is good; there it was {was(entry.time_ns)}")
            continue
        marked.update(range(entry.time_ns, end_ns, STEP_NS))
        if entry.quality is Quality.HELD:
            behind.update(range(entry.time_ns, end_ns, STEP_NS))
        if value not in own.values():
            wrong.append(f"at {at_s:g} s {value} is held and never was")
    for outage in reader.outages():
        for late in outage.late if outage.peer == name else ():
            if "station_load" not in late.values:
                continue
            value = float(late.values["station_load"][0])
            # while the owner's run had not come so far, it told its last
            if was(late.time_ns) == value:
                known[late.time_ns] = value
            elif value not in own.values():
                wrong.append(f"late for {late.time_ns / 1e9:g} s: {value}, which never was")
    told = reader.wrote(of=name)
    mine = reader.wrote()
    wrote = {
        text
        for of in ("", *owner.joined_ns)
        for text, times_ns in owner.wrote(of=of).items()
        if text not in mine and any(since_ns <= time_ns < last_ns for time_ns in times_ns)
    }
    instants = range(since_ns, last_ns + 1, STEP_NS)
    return Comparison(
        len(wrote),
        tuple(sorted(wrote - told.keys())),
        tuple(sorted(t for t, times in told.items() if len(times) > 1 or t in mine)),
        tuple(wrong),
        sum(time_ns in known for time_ns in instants),
        tuple(t for t in instants if t not in known and t not in behind),
        len(marked),
        len(behind - known.keys()),
    )


def comparisons(found: Neighbours) -> Iterator[tuple[tuple[str, str], Comparison]]:
    for one, other in found.links:
        yield (one, other), compare(found.cities[one], found.cities[other])


def agree(found: Neighbours) -> None:
    """All cities know of all that they look at what was so, each write once."""
    for pair, comparison in comparisons(found):
        assert not comparison.lost, (pair, comparison.lost)
        assert not comparison.doubled, (pair, comparison.doubled)
        assert not comparison.wrong, (pair, comparison.wrong)
        if comparison.unknown:
            told = [(o.start_ns / STEP_NS, o.why) for o in found.cities[pair[0]].outages()]
            raise AssertionError((pair, [t / STEP_NS for t in comparison.unknown], told))
        assert comparison.compared > 0


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


@dataclass(frozen=True)
class Told:
    """An outage as one side has it."""

    start_ns: int
    end_ns: int | None


def stories(reader: City, owner: City) -> tuple[list[Told], list[Told]]:
    """The outages of a line that are over, as both ends have them: those in which the reader was
    late, and those of which the owner has heard from it, with the first word afterwards."""
    here = [
        Told(o.start_ns, o.end_ns)
        for o in reader.outages()
        if o.peer == owner.name and o.quality is Quality.STALE and o.end_ns is not None
    ]
    there = [
        Told(o.start_ns, o.end_ns)
        for o in owner.outages()
        if o.is_reader and f"/{reader.name}/" in o.peer
    ]
    return here, there


def one_story(found: Neighbours) -> None:
    """Both ends of every line tell of the same outages, but for one that has just ended."""
    for one, other in found.links:
        here, there = stories(found.cities[one], found.cities[other])
        assert there == here[: len(there)], (one, other, here, there)
        assert len(here) - len(there) <= 1, (one, other, here, there)
