"""What people and loops have asked of one session's actuators, and which of it is in force.

Every actuator of every entity has a priority array: one entry for each `Priority`, the strongest
that lives is in force, and the actuator's safe default when the last one has gone. Entries come
in bundles: a bundle is selected (checked, and its places reserved), operated (in force from the
next step on), and confirmed. What is not confirmed within its window is undone, and what it had
replaced is back. A confirmed entry ends with its lease, or when its bundle is released.

A bundle over several members is confirmed at the first of them (its arbiter) or not at all: a
desk whose window ends in doubt asks there, and the arbiter that is asked too early has then
decided against it. So a bundle is never confirmed at one member and undone at another for want
of the one who brought it.

A desk has no clock: its time is the instant of its session's last step. It answers with
`Receipt`s and refuses with `ScenarioError`s that change nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from federation.core.bundle import Bundle, Priority, bundle_of
from federation.errors import Reason, ScenarioError
from federation.twin import Action, Actuator, Description, DeskStep, Operated

NEVER = (1 << 63) - 1

DESK = "desk"
"""Under which name a safe default that nobody asked for stands in the ledger."""

KEPT = 64
"""How many answers, and how many bundles that are over, a desk remembers at least."""

Read = Callable[[str, str], float | None]
"""The last value of a variable of an entity; None while it is not known."""

Place = tuple[str, str]
"""An actuator and an entity."""


class Phase(StrEnum):
    """How far a bundle has come at one desk."""

    SELECTED = "selected"
    OPERATED = "operated"
    CONFIRMED = "confirmed"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Receipt:
    """A desk's answer: the bundle's phase here, the desk's instant, and until when this holds.

    `until_ns` is the end of the reservation or of the window for the confirmation.
    """

    phase: str
    time_ns: int
    until_ns: int = NEVER


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing autonomous happens here until a person lifts this."""

    id: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry of a priority array.

    `since_ns` is the step at which it came into force, None before that step; its lease counts
    from there. `under` is the confirmed entry that it replaces until it is confirmed itself.
    """

    value: float
    owner: str
    signer: str
    bundle: str
    lease_ns: int
    since_ns: int | None = None
    under: Slot | None = None

    @property
    def until_ns(self) -> int:
        if self.since_ns is None or not self.lease_ns:
            return NEVER
        return self.since_ns + self.lease_ns


@dataclass(frozen=True, slots=True)
class Held:
    """A bundle as one desk knows it: its part here, and how far it has come."""

    bundle: Bundle
    digest: str
    signer: str
    phase: Phase
    window_ns: int
    until_ns: int
    is_arbiter: bool
    token: str = ""
    """By what the arbiter is found and asked; the shell's affair."""
    why: str = ""
    """Why it is over."""

    @property
    def is_open(self) -> bool:
        """Whether its end is not decided yet."""
        return self.phase in (Phase.SELECTED, Phase.OPERATED)


@dataclass(frozen=True, slots=True)
class InForce:
    """What is in force at one actuator of one entity, by whom, and until when."""

    actuator: str
    entity: str
    value: float
    priority: Priority
    owner: str
    signer: str
    bundle: str
    since_ns: int | None
    until_ns: int


class Desk:
    """The desk of one session. `member` is its name in `run`."""

    def __init__(self, run: str, member: str, description: Description, start_ns: int = 0) -> None:
        self.run = run
        self.member = member
        self.now_ns = start_ns
        self.epoch = 0
        """The highest that anybody has acted under; the shell keeps it, and it is saved."""
        self.stops: dict[str, Stop] = {}
        self._actuators: dict[str, tuple[Actuator, frozenset[str]]] = {
            actuator.name: (actuator, frozenset(description.ids(actuator.kind)))
            for actuator in description.actuators
        }
        self._slots: dict[Place, dict[Priority, Slot]] = {}
        self._bundles: dict[str, Held] = {}
        self._answers: dict[str, tuple[str, Receipt]] = {}
        """By the id of the request: the digest of what it said, and what it was answered."""
        self._told: dict[Place, float] = {}
        """What the model was last given at places that are held, or were a step ago."""
        self._ended: dict[Place, str] = {}
        """Why the last entry of a place has gone, until the model is told."""
        self._amends: dict[Place, tuple[Priority, str]] = {}
        """Where the model was given what then was not confirmed, and must be made up for: of which
        priority that was, and why it was undone."""
        self._open: dict[str, None] = {}
        """The bundles whose end is not decided yet, in the order of their selection."""
        self._is_changed = False

    # -- the phases of a bundle ------------------------------------------------------------

    def once(self, request: str, content: str, do: Callable[[], Receipt]) -> Receipt:
        """Do what is asked under an id, once; the same again gets the same answer.

        `content` is the digest of what is asked. Fails with REQUEST_DIFFERS when the id was used
        for something else. A refusal is not kept: the same may be asked again later.
        """
        if not request:
            raise _refusal(Reason.REQUEST_DIFFERS, "a request has an id")
        known = self._answers.get(request)
        if known is not None:
            if known[0] != content:
                raise _refusal(
                    Reason.REQUEST_DIFFERS,
                    f"the request {request} was made before, and said something else",
                    request=request,
                )
            return known[1]
        receipt = do()
        self._answers[request] = (content, receipt)
        if len(self._answers) > 2 * KEPT:
            self._answers = dict(list(self._answers.items())[-KEPT:])
        self._is_changed = True
        return receipt

    def select(
        self, bundle: Bundle, signer: str, window_ns: int, read: Read, token: str = ""
    ) -> Receipt:
        """Check a bundle's part here and reserve its places for `window_ns` of the run.

        Fails with HALTED, EXPIRED, UNKNOWN_MEMBER, UNKNOWN_VARIABLE (the actuator),
        UNKNOWN_ENTITY, NOT_FINITE, OUTSIDE_ENVELOPE, NO_LEASE, ACTUATOR_OWNED,
        SELECTED_BY_OTHER, STATE_MOVED, BUNDLE_OVER, SCENARIO_INVALID.
        """
        digest = bundle.digest()
        held = self._bundles.get(bundle.id)
        if held is not None:
            if held.phase is Phase.SELECTED and (held.digest, held.signer) == (digest, signer):
                return Receipt(held.phase, self.now_ns, held.until_ns)
            raise self._over(held)
        if bundle.run != self.run:
            raise _refusal(Reason.NOT_LIVE, f"the bundle is for {bundle.run}, this is {self.run}")
        if window_ns <= 0:
            raise _refusal(Reason.SCENARIO_INVALID, "the window of a bundle is above 0 ns")
        self._check_halt(bundle)
        self._check_expiry(bundle)
        seen: set[Place] = set()
        for setpoint in bundle.setpoints:
            if setpoint.member == self.member:
                place = (setpoint.actuator, setpoint.entity)
                if place in seen:
                    raise _refusal(
                        Reason.SCENARIO_INVALID,
                        f"the bundle sets {self._called(place)} twice",
                        bundle=bundle.id,
                    )
                seen.add(place)
                self._check_value(place, setpoint.value)
                self._check_lease(place, setpoint.lease_ns, bundle.priority)
                self._check_owner(place, bundle, bundle.author or signer)
        if not seen and all(c.member != self.member for c in bundle.conditions):
            raise _refusal(
                Reason.UNKNOWN_MEMBER,
                f"the bundle {bundle.id} has nothing for {self.member}",
                member=self.member,
            )
        self._check_conditions(bundle, read)
        members = bundle.members()
        until_ns = min(self.now_ns + window_ns, NEVER)
        self._put(
            Held(
                bundle,
                digest,
                signer,
                Phase.SELECTED,
                window_ns,
                until_ns,
                not members or members[0] == self.member,
                token,
            )
        )
        return Receipt(Phase.SELECTED, self.now_ns, until_ns)

    def operate(self, id: str, digest: str, signer: str, read: Read) -> Receipt:
        """Put a selected bundle's setpoints in force, from the next step on.

        They are undone when they are not confirmed within the window, which counts from now.
        Fails as `select` does, and with UNKNOWN_BUNDLE.
        """
        held = self._find(id, digest, signer)
        if held.phase is Phase.OPERATED:
            return Receipt(held.phase, self.now_ns, held.until_ns)
        if held.phase is not Phase.SELECTED:
            raise self._over(held)
        bundle = held.bundle
        self._check_halt(bundle)
        self._check_expiry(bundle)
        for place, _, _ in self._part(bundle):
            self._check_owner(place, bundle, bundle.author or signer, but=id)
        self._check_conditions(bundle, read)
        for place, value, lease_ns in self._part(bundle):
            array = self._slots.setdefault(place, {})
            array[bundle.priority] = Slot(
                value,
                bundle.author or signer,
                signer,
                id,
                lease_ns or self._actuators[place[0]][0].lease_ns,
                under=array.get(bundle.priority),
            )
        until_ns = min(self.now_ns + held.window_ns, NEVER)
        self._put(replace(held, phase=Phase.OPERATED, until_ns=until_ns))
        return Receipt(Phase.OPERATED, self.now_ns, until_ns)

    def confirm(self, id: str, digest: str, signer: str) -> Receipt:
        """Keep an operated bundle's setpoints for the time of their leases.

        Fails with UNKNOWN_BUNDLE, BUNDLE_OVER, HALTED.
        """
        held = self._find(id, digest, signer)
        if held.phase is Phase.CONFIRMED:
            return Receipt(held.phase, self.now_ns)
        if held.phase is not Phase.OPERATED:
            raise self._over(held)
        self._check_halt(held.bundle)
        self._settle(held)
        return Receipt(Phase.CONFIRMED, self.now_ns)

    def release(self, id: str, why: str = "released") -> Receipt:
        """Undo a bundle in whatever phase it is; the next priority is in force again.

        One that is not known is over as well from now on: it can't be selected any more.
        """
        held = self._bundles.get(id)
        if held is None:
            nothing = Bundle(id, self.run, (), Priority.AUTONOMOUS, 0, 0, "")
            held = Held(nothing, "", "", Phase.SELECTED, 0, 0, is_arbiter=False)
            self._put(held)
        self._undo(held, why)
        return Receipt(Phase.OVER, self.now_ns)

    def decide(self, id: str) -> bool:
        """Say, as the arbiter, whether a bundle is confirmed; one that is not never will be."""
        held = self._bundles.get(id)
        if held is not None and held.phase is Phase.CONFIRMED:
            return True
        self.release(id, "not confirmed when another member had to know")
        return False

    def doubts(self) -> tuple[str, ...]:
        """Bundles whose window has ended here, of which only their arbiter knows the end."""
        return tuple(
            id
            for id in self._open
            if self._bundles[id].phase is Phase.OPERATED
            and self._bundles[id].until_ns <= self.now_ns
        )

    def learn(self, id: str, *, is_confirmed: bool) -> None:
        """Take the arbiter's word on a bundle that is in doubt, or that nobody could be asked."""
        held = self._bundles.get(id)
        if held is None or held.phase is not Phase.OPERATED:
            return
        if is_confirmed:
            self._settle(held)
        else:
            self._undo(held, "not confirmed within its window")

    # -- stop ------------------------------------------------------------------------------

    def halt(self, stop: Stop) -> None:
        """Undo all that is autonomous, and refuse it until the stop is lifted."""
        if stop.id not in self.stops:
            self.stops[stop.id] = stop
            self._is_changed = True
        for held in list(self._bundles.values()):
            if held.bundle.priority is Priority.AUTONOMOUS and held.phase is not Phase.OVER:
                self._undo(held, f"stopped by {stop.by}: {stop.reason}")

    def lift(self, ids: Iterable[str]) -> None:
        """Allow again what these stops forbid."""
        for id in ids:
            if self.stops.pop(id, None) is not None:
                self._is_changed = True

    # -- time, and what the model is told ----------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether a step now has nothing to do with the desk; cheap, asked at every step."""
        return not (self._is_changed or self._told or self._open or self._slots)

    def step(self, time_ns: int, actions: tuple[Action, ...] = ()) -> DeskStep | None:
        """Come to a step of the session: what the model is given, or None when it is nothing.

        `actions` are what the run itself gives the step. Where the desk holds an actuator, its
        setpoint comes after them, and so counts.
        """
        if self.is_idle:
            self.now_ns = time_ns
            return None
        self.tick(time_ns)
        operated = self._changes(actions)
        if not self._is_changed and not operated:
            return None
        self._is_changed = False
        return DeskStep(operated, self.save())

    def tick(self, time_ns: int) -> None:
        """Come to an instant: what has begun begins to count, and what has ended falls away."""
        self.now_ns = time_ns
        for held in [self._bundles[id] for id in self._open]:
            if held.until_ns <= time_ns:
                if held.phase is Phase.SELECTED:
                    self._undo(held, "selected and not operated within its window")
                elif held.is_arbiter:
                    self._undo(held, "not confirmed within its window")
        for place, array in list(self._slots.items()):
            for priority, slot in list(array.items()):
                if slot.since_ns is None:
                    held_slot = self._bundles[slot.bundle]
                    if held_slot.bundle.expires_ns <= time_ns:
                        self._undo(held_slot, "expired before it came into force")
                        continue
                    if self._is_amended(place, array):
                        continue  # it begins after that
                    slot = array[priority] = replace(slot, since_ns=time_ns)
                    self._is_changed = True
                self._expire(place, array, priority, slot)
            if not array:
                del self._slots[place]

    def _expire(
        self, place: Place, array: dict[Priority, Slot], priority: Priority, slot: Slot
    ) -> None:
        """Drop an entry, or the one under it, whose lease has ended."""
        under = slot.under
        if under is not None and under.until_ns <= self.now_ns:
            slot = array[priority] = replace(slot, under=None)
            self._is_changed = True
            self._retire(under.bundle, f"the lease of {under.owner} has ended")
        if slot.until_ns <= self.now_ns:
            self._end(place, array, priority, f"the lease of {slot.owner} has ended")

    def in_force(self) -> tuple[InForce, ...]:
        """What is in force at every actuator that is held, by place."""
        found = []
        for place, array in sorted(self._slots.items()):
            if array:
                priority = min(array)
                slot = array[priority]
                found.append(
                    InForce(
                        *place,
                        slot.value,
                        priority,
                        slot.owner,
                        slot.signer,
                        slot.bundle,
                        slot.since_ns,
                        slot.until_ns,
                    )
                )
        return tuple(found)

    def bundles(self) -> tuple[Held, ...]:
        """The bundles that it knows, those that are over among them."""
        return tuple(self._bundles.values())

    def held(self, id: str) -> Held | None:
        return self._bundles.get(id)

    # -- its state ---------------------------------------------------------------------------

    def save(self) -> bytes:
        """All that it knows, for `load` on a desk of the same session in another process."""
        plain = {
            "now_ns": self.now_ns,
            "epoch": self.epoch,
            "stops": [asdict(stop) for stop in self.stops.values()],
            "slots": [
                [*place, int(priority), asdict(slot)]
                for place, array in sorted(self._slots.items())
                for priority, slot in sorted(array.items())
            ],
            "bundles": [asdict(held) for held in self._bundles.values()],
            "answers": [[id, said, asdict(r)] for id, (said, r) in self._answers.items()],
            "told": [[*place, value] for place, value in sorted(self._told.items())],
            "ended": [[*place, why] for place, why in sorted(self._ended.items())],
            "amends": [[*place, int(p), why] for place, (p, why) in sorted(self._amends.items())],
        }
        return json.dumps(plain, separators=(",", ":")).encode()

    def load(self, state: bytes) -> None:
        """Be as the desk was that gave `state`. Fails with INVALID_FRAME."""
        try:
            plain = json.loads(state)
            slots: dict[Place, dict[Priority, Slot]] = {}
            for actuator, entity, priority, slot in plain["slots"]:
                slots.setdefault((actuator, entity), {})[Priority(priority)] = _slot(slot)
            bundles = [_held(each) for each in plain["bundles"]]
            answers = {id: (said, Receipt(**r)) for id, said, r in plain["answers"]}
            stops = {each["id"]: Stop(**each) for each in plain["stops"]}
            told = {(a, e): value for a, e, value in plain["told"]}
            ended = {(a, e): why for a, e, why in plain["ended"]}
            amends = {(a, e): (Priority(p), why) for a, e, p, why in plain.get("amends", ())}
            numbers = int(plain["now_ns"]), int(plain["epoch"])
        except (ValueError, KeyError, TypeError) as error:
            raise _refusal(Reason.INVALID_FRAME, f"this is no state of a desk: {error}") from error
        self.now_ns, self.epoch = numbers
        self._slots, self._answers, self.stops = slots, answers, stops
        self._told, self._ended, self._amends = told, ended, amends
        self._bundles = {held.bundle.id: held for held in bundles}
        self._open = {held.bundle.id: None for held in bundles if held.is_open}
        self._is_changed = False

    # -- what is behind this -------------------------------------------------------------------

    def _changes(self, actions: tuple[Action, ...]) -> tuple[Operated, ...]:
        """What the model is to be given: where what is in force has changed, was acted on, or was
        renewed at an actuator that declares a lease, which the model may count by itself."""
        disturbed = {(action.actuator, action.entity) for action in actions}
        operated: list[Operated] = []
        after: dict[Place, str] = {}
        for place in sorted({*self._slots, *self._told}):
            array = self._slots.get(place)
            amends = self._amends.pop(place, None) if self._is_amended(place, array) else None
            if amends is not None:
                actuator, why = self._actuators[place[0]][0], amends[1]
                value = self._told[place] = _sure(actuator.amends)
                words = actuator.compensation or f"{value:g} {actuator.unit}"
                text = f"{self._called(place)} is compensated, {words}: {why}"
                operated.append(self._operated(len(operated), place, value, DESK, text))
                after[place] = why
            elif array:
                priority = min(array)
                slot = array[priority]
                is_so = self._told.get(place) == slot.value and place not in disturbed
                is_renewed = slot.since_ns == self.now_ns and self._actuators[place[0]][0].lease_ns
                if is_so and not is_renewed:
                    continue
                self._told[place] = slot.value
                text = (
                    f"{slot.owner} sets {self._called(place)} to {slot.value:g} "
                    f"({priority.name.lower().replace('_', ' ')}, bundle {slot.bundle})"
                )
                given = (slot.value, slot.signer, text)
                operated.append(self._operated(len(operated), place, *given))
            else:
                value = self._actuators[place[0]][0].safe_default
                if self._told.pop(place) != value and place not in disturbed:
                    why = self._ended.get(place, "nobody holds it")
                    text = f"{self._called(place)} falls back to {value:g}: {why}"
                    operated.append(self._operated(len(operated), place, value, DESK, text))
        self._ended = after
        self._amends.clear()  # what is left is where somebody of a higher priority has the say
        return tuple(operated)

    def _is_amended(self, place: Place, array: Mapping[Priority, Slot] | None) -> bool:
        """Whether the next step makes up for what the last ones were given at a place, unless
        somebody of a higher priority has the say there."""
        amends = self._amends.get(place)
        return amends is not None and not (array and min(array) < amends[0])

    def _operated(self, number: int, place: Place, value: float, by: str, text: str) -> Operated:
        """The `number`-th setpoint of this instant; another desk of the member has other instants,
        so its events have other names."""
        cause = f"{DESK}/{self.member}-{self.now_ns}-{number:03d}"
        return Operated(Action(self.member, *place, value, cause), by, text)

    def _part(self, bundle: Bundle) -> Iterable[tuple[Place, float, int]]:
        for setpoint in bundle.setpoints:
            if setpoint.member == self.member:
                yield (setpoint.actuator, setpoint.entity), setpoint.value, setpoint.lease_ns

    def _put(self, held: Held) -> None:
        self._bundles[held.bundle.id] = held
        self._is_changed = True
        if held.is_open:
            self._open[held.bundle.id] = None
        else:
            self._open.pop(held.bundle.id, None)
        over = [id for id, held in self._bundles.items() if held.phase is Phase.OVER]
        if len(over) > 2 * KEPT:
            for id in over[:-KEPT]:
                del self._bundles[id]

    def _settle(self, held: Held) -> None:
        for place, _, _ in self._part(held.bundle):
            array = self._slots.get(place, {})
            slot = array.get(held.bundle.priority)
            if slot is not None and slot.bundle == held.bundle.id:
                array[held.bundle.priority] = replace(slot, under=None)
                if slot.under is not None:
                    self._retire(slot.under.bundle, f"replaced by {held.bundle.id}")
        self._put(replace(held, phase=Phase.CONFIRMED, until_ns=NEVER))

    def _undo(self, held: Held, why: str) -> None:
        if held.phase is Phase.OVER:
            return
        priority = held.bundle.priority
        for place, _, _ in self._part(held.bundle):
            array = self._slots.get(place, {})
            slot = array.get(priority)
            if slot is None:
                continue
            if slot.under is not None and slot.under.bundle == held.bundle.id:
                array[priority] = replace(slot, under=None)
            if slot.bundle != held.bundle.id:
                continue
            is_given = slot.since_ns is not None and self._told.get(place) == slot.value
            is_open = held.phase is Phase.OPERATED and priority is min(array)
            if is_given and is_open and self._actuators[place[0]][0].amends is not None:
                self._amends[place] = (priority, why)
            if slot.under is not None and slot.under.until_ns > self.now_ns:
                array[priority] = slot.under
            else:
                self._end(place, array, priority, why)
        self._put(replace(held, phase=Phase.OVER, why=why))

    def _end(self, place: Place, array: dict[Priority, Slot], priority: Priority, why: str) -> None:
        """Take an entry away."""
        slot = array.pop(priority)
        self._ended[place] = why
        self._is_changed = True
        self._retire(slot.bundle, why)

    def _retire(self, id: str, why: str) -> None:
        """End a bundle that has no entry left."""
        held = self._bundles.get(id)
        if held is None or held.phase not in (Phase.OPERATED, Phase.CONFIRMED):
            return
        for array in self._slots.values():
            for slot in array.values():
                if slot.bundle == id or (slot.under is not None and slot.under.bundle == id):
                    return
        self._put(replace(held, phase=Phase.OVER, why=why))

    def _find(self, id: str, digest: str, signer: str) -> Held:
        held = self._bundles.get(id)
        if held is None or not held.digest:
            raise _refusal(
                Reason.UNKNOWN_BUNDLE,
                f"{self.member} has not selected the bundle {id}",
                bundle=id,
            )
        if held.digest != digest:
            raise _refusal(
                Reason.REQUEST_DIFFERS, f"the bundle {id} was selected with other content"
            )
        if held.signer != signer:
            raise _refusal(
                Reason.SELECTED_BY_OTHER, f"{held.signer} has selected the bundle {id}", bundle=id
            )
        return held

    def _over(self, held: Held) -> ScenarioError:
        what = f"is {held.phase}" + (f": {held.why}" if held.why else "")
        return _refusal(
            Reason.BUNDLE_OVER, f"the bundle {held.bundle.id} {what}", bundle=held.bundle.id
        )

    def _called(self, place: Place) -> str:
        return f"{self.member}.{place[0]}[{place[1]}]"

    def _check_halt(self, bundle: Bundle) -> None:
        if bundle.priority is Priority.AUTONOMOUS and self.stops:
            stop = next(iter(self.stops.values()))
            raise _refusal(
                Reason.HALTED,
                f"{self.member} was stopped by {stop.by}: {stop.reason}",
                stop=stop.id,
            )

    def _check_expiry(self, bundle: Bundle) -> None:
        if self.now_ns >= bundle.expires_ns:
            raise _refusal(
                Reason.EXPIRED,
                f"the bundle {bundle.id} has expired at {bundle.expires_ns} ns, and "
                f"{self.member} is at {self.now_ns} ns",
                expires_ns=str(bundle.expires_ns),
            )

    def _check_value(self, place: Place, value: float) -> None:
        found = self._actuators.get(place[0])
        if found is None:
            raise _refusal(
                Reason.UNKNOWN_VARIABLE,
                f"{self.member} has no actuator {place[0]!r}",
                actuator=place[0],
            )
        actuator, entities = found
        if place[1] not in entities:
            raise _refusal(
                Reason.UNKNOWN_ENTITY,
                f"{self.member}.{place[0]} has no entity {place[1]!r}",
                entity=place[1],
            )
        if not math.isfinite(value):
            raise _refusal(Reason.OUTSIDE_ENVELOPE, f"{value} is not a setpoint")
        if not actuator.low <= value <= actuator.high:
            raise _refusal(
                Reason.OUTSIDE_ENVELOPE,
                f"{self._called(place)}: {value:g} {actuator.unit} is outside {actuator.low:g}.."
                f"{actuator.high:g} {actuator.unit}",
                actuator=place[0],
                entity=place[1],
            )

    def _check_lease(self, place: Place, lease_ns: int, priority: Priority) -> None:
        declared_ns = self._actuators[place[0]][0].lease_ns
        if lease_ns < 0:
            raise _refusal(Reason.NO_LEASE, f"a lease of {lease_ns} ns has ended before it began")
        if priority is not Priority.AUTONOMOUS:
            return
        if not lease_ns and not declared_ns:
            raise _refusal(
                Reason.NO_LEASE,
                f"{self._called(place)} declares no lease, and an autonomous setpoint needs one",
                actuator=place[0],
            )
        if declared_ns and lease_ns > declared_ns:
            raise _refusal(
                Reason.OUTSIDE_ENVELOPE,
                f"{self._called(place)} is leased for {declared_ns} ns at most, not {lease_ns} ns",
                actuator=place[0],
            )

    def _check_owner(self, place: Place, bundle: Bundle, owner: str, but: str = "") -> None:
        """One owner per actuator: nobody else at this priority, and nobody above it."""
        for other in map(self._bundles.__getitem__, self._open):
            if (
                other.bundle.id != but
                and other.bundle.priority is bundle.priority
                and any(place == there for there, _, _ in self._part(other.bundle))
            ):
                raise _refusal(
                    Reason.SELECTED_BY_OTHER,
                    f"{self._called(place)} is selected for the bundle {other.bundle.id}",
                    bundle=other.bundle.id,
                )
        for priority, slot in sorted(self._slots.get(place, {}).items()):
            is_above = priority < bundle.priority
            is_other = priority is bundle.priority and slot.owner != owner
            if slot.bundle != but and slot.until_ns > self.now_ns and (is_above or is_other):
                raise _refusal(
                    Reason.ACTUATOR_OWNED,
                    f"{slot.owner} holds {self._called(place)} "
                    f"({priority.name.lower().replace('_', ' ')}, bundle {slot.bundle})",
                    owner=slot.owner,
                    bundle=slot.bundle,
                )

    def _check_conditions(self, bundle: Bundle, read: Read) -> None:
        for condition in bundle.conditions:
            if condition.member != self.member:
                continue
            value = read(condition.variable, condition.entity)
            if value is None or not condition.low <= value <= condition.high:
                stands = "not known" if value is None else f"{value:g}"
                raise _refusal(
                    Reason.STATE_MOVED,
                    f"{self.member}.{condition.variable}[{condition.entity}] is {stands}; the "
                    f"bundle {bundle.id} was decided for {condition.low:g}..{condition.high:g}",
                    variable=condition.variable,
                    entity=condition.entity,
                )


def _refusal(reason: Reason, message: str, **metadata: str) -> ScenarioError:
    return ScenarioError(reason, message, metadata)


def _slot(plain: Mapping[str, object]) -> Slot:
    under = plain["under"]
    assert under is None or isinstance(under, dict)
    return Slot(**{**plain, "under": None if under is None else _slot(under)})  # type: ignore[arg-type]


def _held(plain: Mapping[str, object]) -> Held:
    bundle = plain["bundle"]
    assert isinstance(bundle, dict)
    return Held(
        **{  # type: ignore[arg-type]
            **plain,
            "bundle": bundle_of(bundle),
            "phase": Phase(str(plain["phase"])),
        }
    )


def _sure(value: float | None) -> float:
    assert value is not None
    return value
