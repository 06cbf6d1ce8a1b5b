"""Draws plans of every kind that a broken, late or malicious optimiser may send."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from federation.control.situation import Forecast, Submission
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.core.ledger import Quality
from federation.twin import MINUTE_NS
from tests.hostile.referee import RULES
from tests.hostile.town import ACTUATORS, FEEDERS, PUMPS, RUN, TIES, Place, Sensor, Town

OPTIMISERS = ("planner", "second-planner")
OTHERS = ("desk-officer", "grid", "stranger")
"""Who has a key and no right to propose."""


def keys(seed: int) -> dict[str, Ed25519PrivateKey]:
    """The same keys for the same seed."""
    draw = random.Random(seed)
    names = (*OPTIMISERS, *OTHERS)
    return {name: Ed25519PrivateKey.from_private_bytes(draw.randbytes(32)) for name in names}


def public(pairs: dict[str, Ed25519PrivateKey]) -> dict[str, Ed25519PublicKey]:
    """What is known of those who may propose."""
    return {name: pairs[name].public_key() for name in OPTIMISERS}


@dataclass(frozen=True)
class Plan:
    """A submission, the forecast that comes with it, and how long it takes to take effect."""

    submission: Submission
    forecast: Forecast | None
    delay_ns: int = 0
    works: bool = True


@dataclass
class Author:
    """Draws plans; a kind is a method of its own that gives the plans of one attempt in turn.

    Between two plans of an attempt it may let time go by, which is why it has the town.
    """

    town: Town
    draw: random.Random
    pairs: dict[str, Ed25519PrivateKey]
    serial: int = 0
    sent: list[Plan] = field(default_factory=list)
    others: list[Plan] = field(default_factory=list)
    """What passed, for those who play it again."""

    def plan(
        self,
        *setpoints: Setpoint,
        author: str = "planner",
        signer: str = "",
        version: int = RULES["version"],
        age_min: float | None = None,
        life_min: float = 7.0,
        forecast: bool = True,
        delay_min: float | None = None,
        **changes: object,
    ) -> Plan:
        """A plan that is in order but for what is asked for."""
        self.serial += 1
        age = self.draw.uniform(0, 3) if age_min is None else age_min
        cut_ns = (
            max(0, self.town.now_ns - round(age * MINUTE_NS))
            if age >= 0
            else round(self.town.now_ns - age * MINUTE_NS)
        )
        bundle = Bundle(
            f"plan-{self.serial}",
            RUN,
            setpoints,
            Priority.AUTONOMOUS,
            cut_ns,
            cut_ns + round(life_min * MINUTE_NS),
            author,
        )
        bundle = replace(bundle, **changes)  # type: ignore[arg-type]
        delay = self.draw.choice((0.0, 0.0, 0.7, 2.0)) if delay_min is None else delay_min
        return Plan(
            self.signed(bundle, version, signer or author),
            self.town.forecast(bundle) if forecast else None,
            round(delay * MINUTE_NS),
            self.draw.random() > 0.05,
        )

    def signed(self, bundle: Bundle, version: int, signer: str) -> Submission:
        unsigned = Submission(bundle, version)
        if signer not in self.pairs:
            return unsigned
        return replace(unsigned, signature=self.pairs[signer].sign(unsigned.message()))

    # -- parts ------------------------------------------------------------------------------

    def set(self, place: Place, value: float, lease_min: float | None = None) -> Setpoint:
        if lease_min is None:
            lease_min = self.draw.uniform(12, 20)
        return Setpoint(*place, value, round(lease_min * MINUTE_NS))

    def now(self, place: Place) -> float:
        return self.town.in_force(place)

    def feeder(self) -> Place:
        return ("grid", "feed", self.draw.choice(FEEDERS))

    def pump(self) -> Place:
        return ("water", "pump", self.draw.choice(PUMPS))

    def modest(self) -> list[Setpoint]:
        """A small change, most often a safe one."""
        found = []
        for place in {self.feeder() for _ in range(self.draw.choice((1, 1, 2)))}:
            default = ACTUATORS["grid.feed"].safe_default
            aim = default + self.draw.uniform(-12, 12)
            step = max(-9.0, min(9.0, aim - self.now(place)))
            found.append(self.set(place, max(20.0, self.now(place) + step)))
        if self.draw.random() < 0.4:
            place = self.pump()
            found.append(self.set(place, self.draw.uniform(0.3, 0.7)))
        if self.draw.random() < 0.2:
            place = ("grid", "tie", self.draw.choice(TIES))
            found.append(self.set(place, self.now(place)))
        return found

    def quiet(self, minutes: float) -> None:
        self.town.advance(self.town.now_ns + round(minutes * MINUTE_NS))

    def safe(self) -> Plan:
        return self.plan(*self.modest())

    def brink(self) -> Plan:
        """Right at a limit, on the safe side of it as long as nothing else has happened."""
        place, pump = self.feeder(), self.pump()
        now = self.now(place)
        limit = self.draw.choice((now + 30, now - 30, 5.0, 90.0, now))
        choices = (
            [self.set(place, max(5.0, min(90.0, limit)), 30)],
            [self.set(pump, self.draw.choice((0.0, 0.89, self.now(pump))), 25)],
            [self.set(("grid", "tie", self.draw.choice(TIES)), self.draw.choice((0, 1, 0.49)), 20)],
        )
        age = self.draw.choice((0.0, 5.0))
        return self.plan(*self.draw.choice(choices), age_min=age, life_min=8)

    # -- kinds ------------------------------------------------------------------------------

    def not_a_number(self) -> None:
        value = self.draw.choice((float("nan"), float("inf"), float("-inf"), 1e300, -1e300))
        self.send(self.plan(*self.modest(), self.set(("water", "pump", "p5"), value)))

    def out_of_range(self) -> None:
        place = self.draw.choice((self.feeder(), self.pump()))
        value = {"feed": (4.9, 90.01), "pump": (-0.01, 1.01)}[place[1]]
        self.quiet(self.draw.choice((1, 12)))
        for _ in range(self.draw.choice((1, 3))):  # in steps that the rate allows
            step = 28 if place[1] == "feed" else 0.7
            aim = self.draw.choice(value)
            near = max(self.now(place) - step, min(self.now(place) + step, aim))
            self.send(self.plan(self.set(place, near), delay_min=0))
            self.quiet(6)
        self.send(self.plan(self.set(place, aim), delay_min=0))

    def unknown(self) -> None:
        place = self.draw.choice(
            (
                ("grid", "feed", "f99"),
                ("grid", "breaker", "f1"),
                ("nowhere", "feed", "f1"),
                ("grid", "", ""),
            )
        )
        self.send(self.plan(*self.modest(), self.set(place, 40)))

    def without_rule(self) -> None:
        place = self.draw.choice((("grid", "reserve", "system"), ("clinic", "divert", "h1")))
        self.send(self.plan(self.set(place, self.draw.choice((0, 1)))))

    def empty_or_odd(self) -> None:
        twice = self.set(self.feeder(), 41)
        many = [self.set(("grid", "feed", f), self.now(("grid", "feed", f))) for f in FEEDERS]
        ties = [self.set(("grid", "tie", "north"), 0), self.set(("water", "pump", "p1"), 0.5)]
        all_three = [*ties, self.set(("clinic", "divert", "h0"), 0)]
        choice = self.draw.choice(([], [twice, twice], many[:7], all_three))
        self.send(self.plan(*choice))

    def too_fast(self) -> None:
        place = self.feeder()
        sign = self.draw.choice((-1, 1))
        parts = self.draw.choice(((31,), (18, 14), (11, 11, 9)))
        self.quiet(self.draw.choice((0, 6)))
        for part in parts:
            self.send(self.plan(self.set(place, self.now(place) + sign * part), delay_min=0))
            self.quiet(0.6)

    def too_many(self) -> None:
        places = self.draw.sample(FEEDERS, 4)
        for _ in range(3):
            some = [("grid", "feed", e) for e in places[: self.draw.choice((2, 4))]]
            self.send(
                self.plan(
                    *(self.set(p, self.now(p) + self.draw.choice((1, 2))) for p in some),
                    delay_min=0,
                )
            )
            self.quiet(1)

    def too_wide(self) -> None:
        kind, actuator, ids, step = self.draw.choice(
            (("grid", "feed", FEEDERS, 1.0), ("water", "pump", PUMPS, 0.05))
        )
        wide = [(kind, actuator, e) for e in self.draw.sample(ids, 6)]
        self.quiet(11)
        cut = self.draw.choice((6, 3))
        for some in (wide[:cut], wide[cut:]):
            if some:
                changed = [self.set(p, self.now(p) + step) for p in some]
                self.send(self.plan(*changed, delay_min=0))
                self.quiet(1)

    def oscillating(self) -> None:
        place, step = self.draw.choice(((self.feeder(), 4.0), (self.pump(), 0.1)))
        for i in range(5):
            by = step if i % 2 else -step
            self.send(self.plan(self.set(place, self.now(place) + by), delay_min=0))
            self.quiet(2.5)

    def lapsing(self) -> None:
        """Goes up and down by letting leases end."""
        place = self.feeder()
        for _ in range(4):
            value = self.now(place) + 6
            self.send(self.plan(self.set(place, value, 2), delay_min=0, life_min=3, age_min=0))
            self.quiet(4.2)

    def ring(self) -> None:
        order = list(TIES)
        self.draw.shuffle(order)
        first, second = (("grid", "tie", e) for e in order)
        if self.draw.random() < 0.5:
            self.send(self.plan(self.set(first, 1), self.set(second, 1)))
        else:
            late = self.draw.choice((0, 1.5))
            self.send(self.plan(self.set(first, 1), delay_min=late))
            self.send(self.plan(self.set(second, 1), author="second-planner", delay_min=late))

    def pump_in_flood(self) -> None:
        self.town.flood_m[2] = 1.5
        self.quiet(2)
        place = self.pump()
        self.send(self.plan(self.set(place, self.draw.choice((0.9, 1.0))), delay_min=0))
        self.town.flood_m[2] = 0.0

    def over_the_sum(self) -> None:
        """Within every limit of its own; all together over that of the sum."""
        sign = self.draw.choice((1, -1))
        for some in (FEEDERS[3:6], FEEDERS[5:8], FEEDERS[4:7], FEEDERS[3:5]):
            places = [("grid", "feed", e) for e in some]
            self.send(
                self.plan(
                    *(self.set(p, max(5, min(90, self.now(p) + sign * 25)), 28) for p in places),
                    delay_min=self.draw.choice((0, 1)),
                )
            )
            self.quiet(5.5)

    def pumps_together(self) -> None:
        for some in (PUMPS[:3], PUMPS[3:]):
            setpoints = [self.set(("water", "pump", e), 0.85) for e in some]
            self.send(self.plan(*setpoints, delay_min=2, author=self.draw.choice(OPTIMISERS)))
            self.quiet(self.draw.choice((0, 5.5)))

    def colluding(self) -> None:
        """Two authors, each within the limits on what is in force, before either takes effect."""
        ways = self.draw.choice((0, 1, 2))
        if ways == 0:  # each raises another part
            for author, some in zip(OPTIMISERS, (FEEDERS[3:5], FEEDERS[5:7]), strict=True):
                places = [("grid", "feed", e) for e in some]
                changed = [self.set(p, min(90, self.now(p) + 29)) for p in places]
                self.send(self.plan(*changed, author=author, delay_min=2))
        else:  # both on one place
            place = self.feeder()
            for author, by in zip(OPTIMISERS, (12, -17) if ways == 1 else (2, 1), strict=True):
                self.send(
                    self.plan(self.set(place, self.now(place) + by), author=author, delay_min=1)
                )

    def against_a_person(self) -> None:
        place = self.pump()
        self.town.hold(place, 0.6, 9)
        self.send(self.plan(self.set(place, 0.5)))

    def at_the_end_of_a_lease(self) -> None:
        place = self.pump()
        self.send(self.plan(self.set(place, 0.55, 3), delay_min=0, life_min=3, age_min=0))
        self.send(self.plan(self.set(place, 0.6), delay_min=2.5))

    def starving(self) -> None:
        place = ("grid", "feed", self.draw.choice(FEEDERS[:3]))
        for _ in range(3):
            value = max(5.0, self.now(place) - 24)
            self.send(self.plan(self.set(place, value), delay_min=0))
            self.quiet(5.5)

    def in_the_dark(self) -> None:
        """A hospital gets too little whatever the plans say."""
        hospital = self.draw.randrange(3)
        place = ("grid", "feed", f"f{hospital}")
        self.send(self.plan(self.set(place, 36, 20), delay_min=0))
        self.town.efficiency[hospital] = 0.4  # 36 MW are too few, and the 40 of the default enough
        if self.draw.random() < 0.5:  # and nobody says anything
            self.quiet(13)
        else:
            for _ in range(12):
                self.quiet(self.draw.uniform(0.5, 2))
                self.send(self.plan(*self.modest()))
        self.town.efficiency[hospital] = 1.0

    def forecast_missing(self) -> None:
        plan = self.plan(*self.modest(), forecast=self.draw.random() < 0.5)
        if plan.forecast is not None:
            plan = replace(plan, forecast=replace(plan.forecast, bundle="of another"))
        self.send(plan)

    def sensors_fail(self) -> None:
        name = self.draw.choice(("clinic.supply", "water.flood"))
        sensor = self.draw.choice(
            (Sensor(is_silent=True), Sensor(quality=Quality.STALE), Sensor(clock_error_s=5))
        )
        self.town.sensors[name] = sensor
        self.quiet(4.6 if sensor.is_silent else 1.2)
        place = self.feeder() if name == "clinic.supply" else self.pump()
        self.send(self.plan(self.set(place, self.now(place) + 0.05), delay_min=0))
        self.town.sensors[name] = Sensor()
        self.quiet(1)

    def moved_on(self) -> None:
        condition = self.draw.choice(
            (
                Condition("clinic", "supply", "h1", 0.0, 0.2),
                Condition("clinic", "supply", "h9", 0, 1),
                Condition("clinic", "deaths", "h1", 0, 1),
                Condition("water", "flood", "p1", 1, float("nan")),
                Condition("water", "flood", "p1", 0.5, 9),
            )
        )
        self.send(self.plan(*self.modest(), conditions=(condition,)))

    def out_of_date(self) -> None:
        self.quiet(10)
        which = self.draw.randrange(6)
        setpoints = self.modest()
        if which == 0:
            self.send(self.plan(*setpoints, age_min=self.draw.uniform(5.01, 7.9), life_min=8))
        elif which == 1:
            self.send(self.plan(*setpoints, age_min=-self.draw.uniform(0.01, 5), life_min=7))
        elif which == 2:
            self.send(self.plan(*setpoints, age_min=3, life_min=self.draw.choice((2.9, 3, -1))))
        elif which == 3:
            self.send(self.plan(*setpoints, life_min=8.01))
        elif which == 4:
            self.send(self.plan(*setpoints, run="runs/another"))
        else:
            late = self.plan(*setpoints)
            self.quiet(self.draw.uniform(7, 9))
            self.send(late)

    def replayed(self) -> None:
        first = self.plan(*self.modest(), delay_min=0, life_min=8, age_min=0)
        self.send(first)
        self.quiet(self.draw.choice((0.5, 2)))
        again = replace(first, forecast=self.town.forecast(first.submission.bundle))
        if self.draw.random() < 0.5:  # the same name for something else, duly signed
            bundle = replace(first.submission.bundle, setpoints=tuple(self.modest()))
            signed = self.signed(bundle, RULES["version"], "planner")
            again = replace(first, submission=signed, forecast=self.town.forecast(bundle))
        self.send(again)

    def forged(self) -> None:
        setpoints = self.modest()
        which = self.draw.randrange(6)
        if which == 0:
            self.send(self.plan(*setpoints, author=self.draw.choice(OTHERS)))
        elif which == 1:
            self.send(self.plan(*setpoints, signer=self.draw.choice(OTHERS)))
        elif which == 2:
            self.send(self.plan(*setpoints, signer="second-planner"))
        elif which == 3:
            self.send(self.plan(*setpoints, signer="nobody"))
        elif which == 4:
            plan = self.plan(*setpoints)
            other = replace(plan.submission.bundle, setpoints=tuple(self.modest()))
            altered = replace(plan.submission, bundle=other)
            self.send(Plan(altered, self.town.forecast(other), 0))
        else:
            plan = self.plan(*setpoints)
            bits = bytearray(plan.submission.signature)
            bits[self.draw.randrange(64)] ^= 1 << self.draw.randrange(8)
            self.send(replace(plan, submission=replace(plan.submission, signature=bytes(bits))))

    def presuming(self) -> None:
        priority = self.draw.choice((Priority.LIFE_SAFETY, Priority.OPERATOR))
        self.send(self.plan(*self.modest(), priority=priority))

    def for_ever(self) -> None:
        place = self.feeder()
        lease_ns = self.draw.choice((0, -1, 31 * MINUTE_NS, 10**18))
        self.send(self.plan(Setpoint(*place, self.now(place), lease_ns), delay_min=0))

    def under_other_rules(self) -> None:
        version = RULES["version"] + self.draw.choice((-1, 1, -7, 10**9))
        self.send(self.plan(*self.modest(), version=version))

    def in_a_flood(self) -> None:
        for _ in range(11):
            place = self.pump()
            self.send(self.plan(self.set(place, self.now(place)), delay_min=0, age_min=0))
            self.quiet(0.5)

    send: Callable[[Plan], None] = field(default=lambda plan: None)

    kinds = (
        not_a_number,
        out_of_range,
        unknown,
        without_rule,
        empty_or_odd,
        too_fast,
        too_many,
        too_wide,
        oscillating,
        lapsing,
        ring,
        pump_in_flood,
        over_the_sum,
        pumps_together,
        colluding,
        against_a_person,
        at_the_end_of_a_lease,
        starving,
        in_the_dark,
        forecast_missing,
        sensors_fail,
        moved_on,
        out_of_date,
        replayed,
        forged,
        presuming,
        for_ever,
        under_other_rules,
        in_a_flood,
    )
