"""Turns what a candidate would set into a bundle that a guard can judge and desks can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from federation.control import audit
from federation.control.mandate import Mandate
from federation.control.situation import Place
from federation.control.turn import Candidate, Known, Made
from federation.control.view import Observation, variable_of
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.twin import MINUTE_NS, Actuator

LAPSE_SHARE = 4
"""What ends within this part of the time between decisions is too late to be renewed."""


def bundle_of(
    mandate: Mandate, made: Made, candidate: Candidate, basis: audit.Basis
) -> Bundle | None:
    """What a candidate sets that is not so already, with what is held and would lapse.

    It expires before any lease at the same places does, so that what it replaces is what was seen.
    A lease that ends too soon for that is let go.
    """
    known = made.known
    author = mandate.keys.optimiser.name
    wanted: dict[Place, Setpoint] = {}
    soon_ns = known.cut.time_ns + 2 * mandate.terms.every_ns
    too_soon_ns = known.cut.time_ns + mandate.terms.every_ns // LAPSE_SHARE
    lapsing = {p for p, held in known.desks.holdings.items() if held.until_ns <= too_soon_ns}
    for place, held in known.desks.holdings.items():
        is_mine = held.owner == author and held.priority is Priority.AUTONOMOUS
        if not is_mine or place in lapsing:
            continue
        if _is_done(mandate, place, known.cut):
            default = _actuator(mandate, *place[:2]).safe_default
            if held.value != default:
                wanted[place] = Setpoint(*place, default, lease_ns(mandate, *place[:2]))
        elif held.until_ns < soon_ns:
            wanted[place] = Setpoint(*place, held.value, lease_ns(mandate, *place[:2]))
    crews = _Crews(mandate, known, wanted)
    for setpoint in candidate.setpoints:
        place = (setpoint.member, setpoint.actuator, setpoint.entity)
        if place in lapsing or _is_done(mandate, place, known.cut):
            continue  # what is only to come in one of the futures is no reason to act now
        possible = crews.as_free(place, setpoint)
        there = known.desks.holdings.get(place)
        is_news = there is None or there.value != setpoint.value or place in wanted
        if is_news and possible is not None:
            wanted[place] = possible
    if not wanted:
        return None
    setpoints = tuple(wanted[place] for place in sorted(wanted))
    life_ns = round(mandate.rules.life_min * MINUTE_NS)
    ends_ns = [held.until_ns for p, held in known.desks.holdings.items() if p in wanted]
    return Bundle(
        id=f"{made.id}/{candidate.name}".replace(" ", "-"),
        run=mandate.view.run,
        setpoints=setpoints,
        priority=Priority.AUTONOMOUS,
        cut_ns=known.cut.time_ns,
        expires_ns=min([known.cut.time_ns + life_ns, *(end_ns - 1 for end_ns in ends_ns)]),
        author=author,
        basis=basis.digest(),
        conditions=_conditions(mandate, _changes(mandate, setpoints, known), known.cut),
    )


def is_anybody_free(mandate: Mandate, cut: Observation) -> bool:
    """Whether there is a crew that could be sent; also when nothing is known of crews."""
    repairs = mandate.view.scenario.repairs
    readings = [
        cut.readings.get(variable_of(work.busy)) for work in (repairs.work if repairs else ())
    ]
    busy = sum(float(reading.values.sum()) for reading in readings if reading is not None)
    return repairs is None or repairs.crews - busy >= 1.0


class _Crews:
    """The crews that repairs share, as they are at a cut: one that comes free a little later in a
    future is not free yet, and is sent when it is."""

    def __init__(self, mandate: Mandate, known: Known, wanted: Mapping[Place, Setpoint]) -> None:
        repairs = mandate.view.scenario.repairs
        self._engaged: dict[Place, float] = {}
        self._free = 0.0 if repairs is None else repairs.crews
        for work in repairs.work if repairs is not None else ():
            member, actuator = variable_of(work.actuator)
            reading = known.cut.readings.get(variable_of(work.busy))
            ids = mandate.view.descriptions[member].ids(_actuator(mandate, member, actuator).kind)
            for i, entity in enumerate(ids):
                place = (member, actuator, entity)
                held = known.desks.holdings.get(place)
                there = 0.0 if held is None else held.value
                there = there if reading is None else max(there, float(reading.values[i]))
                self._engaged[place] = wanted[place].value if place in wanted else there
        self._free -= sum(self._engaged.values())

    def as_free(self, place: Place, setpoint: Setpoint) -> Setpoint | None:
        """A setpoint with as many more crews as are free, which then are not; None for no more."""
        there = self._engaged.get(place)
        if there is None:
            return setpoint  # of no crews
        more, wanted = self._free, setpoint.value - there
        if wanted > 0.0 >= more:
            return None
        value = setpoint.value if wanted <= more else there + more
        self._free -= value - there
        self._engaged[place] = value
        return replace(setpoint, value=value)


def _changes(mandate: Mandate, setpoints: Sequence[Setpoint], known: Known) -> list[Setpoint]:
    """The setpoints that rest on what was seen: not those that are in force already, nor those
    that go back to the safe default."""
    found = []
    for s in setpoints:
        there = known.desks.holdings.get((s.member, s.actuator, s.entity))
        default = _actuator(mandate, s.member, s.actuator).safe_default
        if s.value != (default if there is None else there.value) and s.value != default:
            found.append(s)
    return found


def _is_done(mandate: Mandate, place: Place, cut: Observation) -> bool:
    """Whether it is seen that nothing remains to be done there, so that a crew may go."""
    repairs = mandate.view.scenario.repairs
    member, actuator, entity = place
    for work in repairs.work if repairs is not None else ():
        if work.actuator != f"{member}.{actuator}":
            continue
        reading = cut.readings.get(variable_of(work.remaining))
        ids = mandate.view.descriptions[member].ids(_actuator(mandate, member, actuator).kind)
        return reading is not None and not reading.values[ids.index(entity)] > 0.0
    return False


def _actuator(mandate: Mandate, member: str, actuator: str) -> Actuator:
    actuators = mandate.view.descriptions[member].actuators
    return next(a for a in actuators if a.name == actuator)


def _conditions(
    mandate: Mandate, setpoints: Sequence[Setpoint], cut: Observation
) -> tuple[Condition, ...]:
    """What the setpoints need is still about as it was seen: where they are set, if it is of the
    same kind, else everywhere."""
    needed: dict[str, set[tuple[str, str]]] = {}
    for s in setpoints:
        rule = mandate.rules.actuators.get(f"{s.member}.{s.actuator}")
        kind = _actuator(mandate, s.member, s.actuator).kind
        for variable in () if rule is None else rule.needs:
            needed.setdefault(variable, set()).add((kind, s.entity))
    found = []
    for name in sorted(needed):
        member, output = variable_of(name)
        reading = cut.readings.get((member, output))
        if reading is None:
            continue
        description = mandate.view.descriptions[member]
        known = next(v for v in description.outputs() if v.name == output)
        is_local = {kind for kind, _ in needed[name]} == {known.kind}
        for entity, value in zip(description.ids(known.kind), reading.values.tolist(), strict=True):
            if is_local and (known.kind, entity) not in needed[name]:
                continue
            band = mandate.terms.moves_by * max(abs(value), 1e-6)
            found.append(Condition(member, output, entity, value - band, value + band))
    return tuple(found)


def lease_ns(mandate: Mandate, member: str, actuator: str) -> int:
    """How long a setpoint holds: no longer than the twin and the rules let it; 0 for no end."""
    declared = _actuator(mandate, member, actuator).lease_ns
    rule = mandate.rules.actuators.get(f"{member}.{actuator}")
    if rule is None:
        return declared
    allowed_ns = round(rule.lease_min * MINUTE_NS)
    return min(declared, allowed_ns) if declared else allowed_ns


def limits_of(mandate: Mandate, made: Made) -> tuple[str, ...]:
    """The ends of ranges at which the bundle sets something."""
    if made.bundle is None:
        return ()
    found = []
    for s in made.bundle.setpoints:
        name = f"{s.member}.{s.actuator}"
        actuators = {a.name: a for a in mandate.view.descriptions[s.member].actuators}
        if name in mandate.rules.actuators:
            actuator = actuators[s.actuator]
            ends = (mandate.rules.low(name, actuator), mandate.rules.high(name, actuator))
            if s.value in ends:
                found.append(f"range:{name}")
    return tuple(dict.fromkeys(found))
