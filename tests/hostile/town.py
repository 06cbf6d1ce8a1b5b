"""A simulated town: what its actuators hold, what its hospitals get, and what its sensors tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from federation.control.situation import Forecast, Reading, Series, Situation, Standing
from federation.core.bundle import Bundle, Priority
from federation.core.ledger import Quality
from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    TimePolicy,
    Variable,
)

RUN = "runs/town-1"
FEEDERS = tuple(f"f{i}" for i in range(8))
TIES = ("north", "south")
PUMPS = tuple(f"p{i}" for i in range(6))
HOSPITALS = tuple(f"h{i}" for i in range(3))
NEED_MW = 30.0
"""What a hospital needs for all of its supply; hospital i hangs on feeder i."""

Place = tuple[str, str, str]


def _described(
    model: str, kinds: dict[str, tuple[str, ...]], outputs: tuple[Variable, ...], *acts: Actuator
) -> Description:
    entities = tuple(Entity(id_, kind) for kind, ids in kinds.items() for id_ in ids)
    return Description(model, "1", model, entities, outputs, TimePolicy(MINUTE_NS), actuators=acts)


DESCRIPTIONS = {
    "grid": _described(
        "grid",
        {"feeder": FEEDERS, "tie": TIES},
        (),
        Actuator("feed", "feeder", "MW", 0, 100, 40, lease_ns=0),
        Actuator("tie", "tie", "1", 0, 1, 0, lease_ns=10 * MINUTE_NS),
        Actuator("reserve", SYSTEM, "MW", 0, 50, 0, lease_ns=10 * MINUTE_NS),
    ),
    "water": _described(
        "water",
        {"pump": PUMPS},
        (Variable("flood", "pump", "m", Causality.OUTPUT),),
        Actuator("pump", "pump", "1", 0, 1, 0.5, lease_ns=12 * MINUTE_NS),
    ),
    "clinic": _described(
        "clinic",
        {"hospital": HOSPITALS},
        (Variable("supply", "hospital", "1", Causality.OUTPUT),),
        Actuator("divert", "hospital", "1", 0, 1, 0, lease_ns=10 * MINUTE_NS),
    ),
}
ACTUATORS = {f"{m}.{a.name}": a for m, d in DESCRIPTIONS.items() for a in d.actuators}


@dataclass
class Sensor:
    """How a value is told, now."""

    is_silent: bool = False
    quality: Quality = Quality.GOOD
    clock_error_s: float = 0.1


@dataclass
class Pending:
    """A bundle that was let go, when it takes effect, and whether it does."""

    at_ns: int
    bundle: Bundle
    works: bool


@dataclass(frozen=True)
class Move:
    """What the loop did to one place: the value in force before, the command."""

    time_ns: int
    place: Place
    before: float
    value: float
    bundle: str


@dataclass
class Town:
    """The town at one instant. `watch` is called every minute, `changed` after all that changes."""

    now_ns: int = 0
    slots: dict[Place, dict[Priority, Standing]] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    moves: dict[Place, list[Move]] = field(default_factory=dict)
    took_effect: dict[str, int] = field(default_factory=dict)
    efficiency: list[float] = field(default_factory=lambda: [1.0] * len(HOSPITALS))
    flood_m: list[float] = field(default_factory=lambda: [0.0] * len(PUMPS))
    sensors: dict[str, Sensor] = field(
        default_factory=lambda: {"clinic.supply": Sensor(), "water.flood": Sensor()}
    )
    told: dict[tuple[str, str], list[Reading]] = field(default_factory=dict)
    watch: Callable[[], None] = lambda: None
    changed: Callable[[], None] = lambda: None
    settle: Callable[[str, int | None], None] = lambda bundle, effect_ns: None

    def in_force(self, place: Place) -> float:
        held = self.slots.get(place)
        return held[min(held)].value if held else ACTUATORS[f"{place[0]}.{place[1]}"].safe_default

    def supply(self, feed_mw: dict[int, float] | None = None) -> list[float]:
        """What share of its need each hospital gets, with other feeds if they are given."""
        found = []
        for i, entity in enumerate(HOSPITALS):
            feed = (feed_mw or {}).get(i)
            feed = self.in_force(("grid", "feed", f"f{entity[1:]}")) if feed is None else feed
            found.append(min(1.0, self.efficiency[i] * feed / NEED_MW))
        return found

    def situation(self) -> Situation:
        return Situation(
            RUN,
            self.now_ns,
            {name: readings[-1] for name, readings in self.told.items()},
            {place: tuple(held.values()) for place, held in self.slots.items() if held},
        )

    def forecast(self, bundle: Bundle) -> Forecast:
        """What comes of a bundle, as twins would tell that were forked at its cut."""
        feeds = {
            int(s.entity[1:]): s.value
            for s in bundle.setpoints
            if (s.member, s.actuator) == ("grid", "feed") and s.entity in FEEDERS[:3]
        }
        past_ns = [bundle.cut_ns] if bundle.cut_ns < self.now_ns else []
        times_ns = (*past_ns, *(self.now_ns + k * MINUTE_NS for k in range(21)))
        rows = np.array([self.supply()] * (1 + len(past_ns)) + [self.supply(feeds)] * 20)
        return Forecast(bundle.digest(), {("clinic", "supply"): Series(times_ns, rows)})

    def let_go(self, bundle: Bundle, delay_ns: int, works: bool = True) -> None:
        self.pending.append(Pending(self.now_ns + delay_ns, bundle, works))
        self._catch_up()

    def revoke(self, ids: tuple[str, ...]) -> None:
        """What was let go and has not begun does not begin any more."""
        for pending in [p for p in self.pending if p.bundle.id in ids]:
            self.pending.remove(pending)
            self.settle(pending.bundle.id, None)

    def hold(self, place: Place, value: float, minutes: float) -> None:
        """A person takes an actuator."""
        ends_ns = self.now_ns + round(minutes * MINUTE_NS)
        self.slots.setdefault(place, {})[Priority.OPERATOR] = Standing(
            value, Priority.OPERATOR, ends_ns
        )

    def advance(self, until_ns: int) -> None:
        """Let time go by: leases end, bundles take effect, sensors tell, the guard looks."""
        while self.now_ns < until_ns:
            ends = [s.ends_ns for held in self.slots.values() for s in held.values()]
            minute_ns = (self.now_ns // MINUTE_NS + 1) * MINUTE_NS
            self.now_ns = min([until_ns, minute_ns, *ends, *(p.at_ns for p in self.pending)])
            self._catch_up()
            if self.now_ns == minute_ns:
                self.tell()
                self.watch()

    def tell(self) -> None:
        values = {"clinic.supply": self.supply(), "water.flood": self.flood_m}
        for name, sensor in self.sensors.items():
            if not sensor.is_silent:
                member, _, variable = name.partition(".")
                reading = Reading(
                    np.array(values[name]), self.now_ns, sensor.quality, sensor.clock_error_s
                )
                self.told.setdefault((member, variable), []).append(reading)

    def _catch_up(self) -> None:
        for held in self.slots.values():
            for priority in [p for p, s in held.items() if s.ends_ns <= self.now_ns]:
                del held[priority]
        for due in sorted(
            (p for p in self.pending if p.at_ns <= self.now_ns), key=lambda p: p.at_ns
        ):
            self.pending.remove(due)
            if due.works:
                self._begin(due.bundle)
            self.settle(due.bundle.id, self.now_ns if due.works else None)
        self.changed()

    def _begin(self, bundle: Bundle) -> None:
        self.took_effect[bundle.id] = self.now_ns
        before = {(s.member, s.actuator, s.entity): 0.0 for s in bundle.setpoints}
        before = {place: self.in_force(place) for place in before if _exists(place)}
        for s in bundle.setpoints:
            place = (s.member, s.actuator, s.entity)
            if not _exists(place):
                continue
            lease_ns = s.lease_ns or ACTUATORS[f"{s.member}.{s.actuator}"].lease_ns or 10**18
            self.slots.setdefault(place, {})[bundle.priority] = Standing(
                s.value, bundle.priority, self.now_ns + lease_ns
            )
            if bundle.author != "guard" and s.value != before[place]:
                move = Move(self.now_ns, place, before[place], s.value, bundle.id)
                self.moves.setdefault(place, []).append(move)


def _exists(place: Place) -> bool:
    actuator = ACTUATORS.get(f"{place[0]}.{place[1]}")
    return actuator is not None and place[2] in DESCRIPTIONS[place[0]].ids(actuator.kind)


def moved(bundle: Bundle, **changes: object) -> Bundle:
    """The same bundle but for some fields."""
    return replace(bundle, **changes)  # type: ignore[arg-type]
