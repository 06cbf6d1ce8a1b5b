"""Cities that may help each other: ash, which an earthquake has hit, and birch, which is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from federation.core.aid import Terms
from federation.peer.aid import AidOptions
from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Causality,
    Description,
    Entity,
    LinearBlock,
    Port,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from federation.wire.credentials import Identity, Keyring, Role

PERIODS = (HOUR_NS,) * 6
PURPOSE = "mutual-aid"

INF = np.inf


class Power(Twin):
    """A city's power: units of rising cost, a store of energy, customers of two kinds, a tie line.

    What is not served costs 9,000 a MWh for homes and 40,000 for the hospital's feeder (USD).
    """

    def __init__(self, units_mw: str, load_mw: float, tie_mw: float, stored_mwh: float) -> None:
        self.units_mw = tuple(map(float, units_mw.split()))
        self.load_mw, self.tie_mw, self.stored_mwh = load_mw, tie_mw, stored_mwh

    def describe(self) -> Description:
        return Description(
            model="power",
            version="1",
            domain="energy",
            entities=(Entity("F1", "feeder"),),
            variables=(
                Variable("sent", SYSTEM, "MW", Causality.OUTPUT, 0.0),
                Variable("received", SYSTEM, "MW", Causality.OUTPUT, 0.0),
                Variable("fed", "feeder", "1", Causality.OUTPUT, 1.0),
            ),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        return None

    def advance(self, step: Step) -> None:
        hour = step.time_ns // HOUR_NS
        step.publish("sent", 5.0 if hour < 2 else 4.0)
        step.publish("received", 5.0 if hour < 2 else 3.5)

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        b = Draft()
        hours = [p / HOUR_NS for p in periods_ns]
        for t, h in enumerate(hours):
            day = 1.0 + 0.25 * np.sin(2 * np.pi * t / 24)
            for n, most in enumerate(self.units_mw):
                b.column(f"unit{n}[{t}]", 0.0, most, h * (20.0 + 25.0 * n + 3.0 * n * n))
            b.column(f"export[{t}]", 0.0, self.tie_mw, 0.0)
            b.column(f"import[{t}]", 0.0, self.tie_mw, 0.0)
            b.column(f"dark[{t}]", 0.0, 0.8 * self.load_mw * day, 9_000.0 * h)
            b.column(f"fed[{t}]", 0.0, 1.0, -40_000.0 * h * 0.2 * self.load_mw)
            b.column(f"from_store[{t}]", 0.0, self.stored_mwh / 3.0, 0.1 * h)
            b.column(f"share[{t}]", 0.0, 1.0, 0.0)
            supply = {f"unit{n}[{t}]": 1.0 for n in range(len(self.units_mw))}
            supply |= {f"import[{t}]": 1.0, f"from_store[{t}]": 1.0, f"dark[{t}]": 1.0}
            need = {f"export[{t}]": -1.02, f"share[{t}]": -0.2 * self.load_mw * day}
            b.row(f"balance[{t}]", 0.8 * self.load_mw * day, supply | need, INF)
            b.row(f"feeder[{t}]", -INF, {f"fed[{t}]": 1.0, f"share[{t}]": -1.0}, 0.0)
        store = {f"from_store[{t}]": h for t, h in enumerate(hours)}
        b.row("store", -INF, store, self.stored_mwh)
        return b.block(
            [
                b.port("export", "supply", "MW", len(hours)),
                b.port("import", "need", "MW", len(hours)),
                b.port("share", "supply", "1", len(hours), kind="feeder", entity="F1"),
            ]
        )


class Ward(Twin):
    """A hospital that treats whom it can, as far as its feeder has power."""

    def __init__(self, patients: float) -> None:
        self.patients = patients

    def describe(self) -> Description:
        return Description(
            model="ward",
            version="1",
            domain="medical",
            entities=(Entity("F1", "feeder"),),
            variables=(Variable("power", "feeder", "1", Causality.INPUT, 1.0),),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        return None

    def advance(self, step: Step) -> None:
        return None

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        b = Draft()
        for t, length_ns in enumerate(periods_ns):
            usd = 2_000.0 * length_ns / HOUR_NS
            b.column(f"power[{t}]", 0.0, 1.0, 0.0)
            b.column(f"treated[{t}]", 0.0, self.patients, -usd)
            body = {f"treated[{t}]": 1.0, f"power[{t}]": -self.patients}
            b.row(f"powered[{t}]", -INF, body, 0.0)
        return b.block([b.port("power", "need", "1", len(periods_ns), kind="feeder", entity="F1")])


class Draft:
    """A block in the making."""

    def __init__(self) -> None:
        self.columns: dict[str, tuple[float, float, float]] = {}
        self.rows: list[tuple[str, float, Mapping[str, float], float]] = []

    def column(self, name: str, low: float, high: float, cost: float) -> None:
        self.columns[name] = (low, high, cost)

    def row(self, name: str, low: float, body: Mapping[str, float], high: float) -> None:
        self.rows.append((name, low, body, high))

    def port(
        self,
        name: str,
        role: str,
        unit: str,
        periods: int,
        kind: str = SYSTEM,
        entity: str = SYSTEM,
    ) -> Port:
        place = {column: j for j, column in enumerate(self.columns)}
        columns = np.array([[place[f"{name}[{t}]"] for t in range(periods)]], dtype=np.int64)
        return Port(name, role, kind, unit, (entity,), columns)

    def block(self, ports: Sequence[Port]) -> LinearBlock:
        place = {column: j for j, column in enumerate(self.columns)}
        low, high, cost = (np.array(x, dtype=np.float64) for x in zip(*self.columns.values()))  # noqa: B905
        entries = [
            (i, place[c], v) for i, (_, _, body, _) in enumerate(self.rows) for c, v in body.items()
        ]
        row, column, value = zip(*entries, strict=True)
        return LinearBlock(
            columns=tuple(self.columns),
            low=low,
            high=high,
            cost=cost,
            integer=np.zeros(low.size, dtype=np.bool_),
            rows=tuple(name for name, _, _, _ in self.rows),
            row_low=np.array([r[1] for r in self.rows], dtype=np.float64),
            row_high=np.array([r[3] for r in self.rows], dtype=np.float64),
            row_index=np.array(row, dtype=np.int64),
            column_index=np.array(column, dtype=np.int64),
            coefficient=np.array(value, dtype=np.float64),
            ports=tuple(ports),
        )


SCENARIO = """
name: {city}-day
region: {city}
horizon_h: 8
members:
  power: {{class: "tests.aidcities:Power", config: {{{power}}}}}
  ward: {{class: "tests.aidcities:Ward", config: {{patients: {patients}}}}}
couplings:
  - {{from: power.fed, to: ward.power}}
"""

GOODS = """
version: 1
goods:
  power: {{unit: MW, gives: {{port: power.export}}, takes: {{port: power.import}}}}
  crews: {{unit: "1", whole: true, {crews}}}
  beds: {{unit: "1", whole: true, {beds}}}
"""

POLICY = """
version: 1
rules:
  - name: mutual-aid
    who: [{neighbours}]
    what: {{flexibility: [aid.power, aid.crews]}}
    purpose: [mutual-aid]
  - name: beds-in-an-emergency
    who: [{neighbours}]
    what: {{flexibility: [aid.beds]}}
    emergency: mass-casualty
emergencies:
  mass-casualty: {{by: [mayor], most_h: 12}}
"""


@dataclass(frozen=True)
class Makeup:
    """What a city is made of."""

    power: str
    patients: int
    crews: str
    beds: str


MAKEUPS = {
    "ash": Makeup(
        'units_mw: "12 8", load_mw: 40, tie_mw: 25, stored_mwh: 9',
        30,
        "takes: [{most: 3, usd_per_h: 5000}, {most: 4, usd_per_h: 900}]",
        "takes: [{most: 12, usd_per_h: 700}]",
    ),
    "birch": Makeup(
        'units_mw: "30 14 9 6", load_mw: 35, tie_mw: 18, stored_mwh: 12',
        12,
        "gives: [{most: 2, usd_per_h: 200}, {most: 3, usd_per_h: 1500}]",
        "gives: [{most: 8, usd_per_h: 150}]",
    ),
    "cedar": Makeup(
        'units_mw: "22 9", load_mw: 26, tie_mw: 15, stored_mwh: 3',
        5,
        "gives: [{most: 1, usd_per_h: 300}]",
        "gives: [{most: 3, usd_per_h: 100}]",
    ),
}


@dataclass(frozen=True)
class Files:
    """Where the files of a city are."""

    scenario: Path
    policy: Path
    goods: Path
    trail: Path


def write_city(folder: Path, city: str) -> Files:
    """The files of a city: its scenario, its policy for the others, and its goods."""
    made, here = MAKEUPS[city], folder / city
    here.mkdir(parents=True, exist_ok=True)
    neighbours = ", ".join(name for name in MAKEUPS if name != city)
    files = Files(here / "city.yaml", here / "policy.yaml", here / "goods.yaml", here / "trail")
    texts = (
        (files.scenario, SCENARIO.format(city=city, power=made.power, patients=made.patients)),
        (files.policy, POLICY.format(neighbours=neighbours)),
        (files.goods, GOODS.format(crews=made.crews, beds=made.beds)),
    )
    for file, text in texts:
        if not file.exists():
            file.write_text(text, encoding="utf-8")
    return files


def identities(folder: Path) -> dict[str, Identity]:
    """The keys of the cities, which are made once."""
    found = {}
    for city in MAKEUPS:
        file = folder / f"{city}.pem"
        if not file.exists():
            Identity.generate(city).save(file)
        found[city] = Identity.load(city, file)
    return found


@dataclass
class Permissive:
    """A guard that lets pass what is not in its way, and remembers what it was asked."""

    refuses: set[tuple[str, bool]] = field(default_factory=set)
    asked: list[tuple[str, bool, tuple[float, ...]]] = field(default_factory=list)

    def judge(
        self, terms: Terms, gives: bool, besides: Sequence[float]
    ) -> Sequence[tuple[str, str]]:
        self.asked.append((terms.good, gives, tuple(besides)))
        if (terms.good, gives) in self.refuses:
            return (("tie-line", "the line is needed for ourselves"),)
        return ()


BEGINS_NS = 1_790_000_000 * 10**9
"""What wall clocks show at first, where a story sets them."""


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_ns = BEGINS_NS

    def __call__(self) -> int:
        return self.now_ns

    def pass_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


def options_of(folder: Path, city: str, **more: object) -> AidOptions:
    """How a city gives aid in these tests; it knows the other two."""
    keys = identities(folder)
    known = Keyring.of(*((keys[name], Role.PEER, ()) for name in keys if name != city))
    files = write_city(folder, city)
    options = {"guard": Permissive(), **more}
    return AidOptions(files.goods, keys[city], known, files.trail, **options)  # type: ignore[arg-type]
