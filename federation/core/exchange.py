"""What members tell each other: values, causes and actions, from where they arise to where
they are seen.

The coordinator and the schedule decide when a member steps; what it is then given, and what
becomes of its answer, is the same for both and is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from federation.core.coupling import MAX_CAUSES, Slot, Wire, Wiring
from federation.core.envelope import Envelope, Pool
from federation.core.ledger import (
    ActionRecord,
    EventRecord,
    Ledger,
    Quality,
    Record,
    record_head,
)
from federation.core.messages import Degraded, Replaced
from federation.errors import Reason, TwinError
from federation.twin import (
    NOTHING,
    Action,
    DeskStep,
    Event,
    StepInput,
    StepResult,
    Vector,
    check_finite,
    has_minus_zero,
    not_yet,
    plain_zeros,
    undeclared,
    wrong_shape,
)

NEVER = (1 << 63) - 1
"""Later than every instant of a run."""

FEDERATION = "federation"
"""Under which name changes of members stand in the ledger."""

DESK_RANK = -1
"""What a desk gives a member comes before all steps of its instant, as orders of people do."""

FEDERATION_RANK = -2
"""A change of members comes before the orders and steps of its instant."""


@dataclass(slots=True, eq=False)
class Feed:
    """What has come over one wire: the visible value and what becomes visible later."""

    wire: Wire
    inlet: Inlet
    member: Member
    delay_ns: int
    since_ns: int
    visible: Vector | None = None
    data: bytes = b""
    """The bytes of the visible value."""
    causes: dict[int, str] = field(default_factory=dict)
    pending: deque[tuple[int, Vector, bytes, Mapping[int, str]]] = field(default_factory=deque)
    """(visible from, value, its bytes, per entry the event that explains it from then on)."""


@dataclass(slots=True, eq=False)
class Inlet:
    """An input of a member: all that feeds it, and what the member was last given."""

    name: str
    slot: Slot
    is_plain: bool
    value: Vector
    data: bytes
    """The bytes of the value."""
    feeds: list[Feed] = field(default_factory=list)
    causes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    is_behind: bool = False
    """Something is visible that was not given yet."""


@dataclass(slots=True, eq=False)
class Outlet:
    """An output of a member: the value last recorded, and whom it feeds."""

    name: str
    owner: str
    rank: int
    size: int
    head: bytes
    """What stands before each of its values in the hash."""
    feeds: list[Feed] = field(default_factory=list)
    revision: int = 0
    data: bytes | None = None
    """The bytes of the value; None before the first."""
    value: Vector | None = None
    causes: dict[int, str] = field(default_factory=dict)
    """Per entry the event that explains it."""


@dataclass(slots=True, eq=False)
class Member:
    """What the federation knows of a member while it runs."""

    name: str
    rank: int
    unit: int
    period_ns: int
    wakes: bool
    acts: bool
    """Whether it may act on others; its inputs are then judged step by step."""
    inlets: list[Inlet]
    outlets: dict[str, Outlet]
    next_ns: int
    """Its own next instant: of its period, or asked for; NEVER when it asked for none."""
    since_ns: int = 0
    """From when on it is there."""
    until_ns: int = NEVER
    """It makes no step at this instant or later."""
    reached_ns: int = -1
    """Its last instant that is behind it."""
    granted: tuple[StepInput, ...] = ()
    """The steps in flight; empty when the member is idle."""
    awaits: bool = False
    """Whether anything may be on its way to it that it can't see yet."""
    orders: deque[tuple[int, int, str, Action]] = field(default_factory=deque)
    """Actions on their way to it: (visible from, rank of who acts, channel, action)."""
    untold: dict[str, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    """Causes that became visible when it had no reason to step."""
    known_events: dict[str, dict[str, str]] = field(default_factory=dict)
    """Foreign events that reached it, with the coupling that brought each to each input."""
    own_events: set[str] = field(default_factory=set)
    quality: Quality = Quality.GOOD
    degraded_ns: int = NEVER
    """From when on its values are of this quality."""
    says_held: bool = False
    """It said with its last step that its values are of an earlier instant."""

    def adopt(self, other: Member) -> None:
        """Take over where `other`, of the same wiring, stands; share nothing that moves."""
        self.next_ns, self.since_ns, self.until_ns = other.next_ns, other.since_ns, other.until_ns
        self.reached_ns, self.granted, self.awaits = other.reached_ns, other.granted, other.awaits
        self.quality, self.degraded_ns = other.quality, other.degraded_ns
        self.says_held = other.says_held
        self.orders = deque(other.orders)
        self.untold = {name: dict(causes) for name, causes in other.untold.items()}
        self.known_events = {event: dict(how) for event, how in other.known_events.items()}
        self.own_events = set(other.own_events)
        for inlet, its in zip(self.inlets, other.inlets, strict=True):
            inlet.value, inlet.data, inlet.is_behind = its.value, its.data, its.is_behind
            inlet.causes = dict(its.causes)
            for feed, source in zip(inlet.feeds, its.feeds, strict=True):
                feed.visible, feed.data = source.visible, source.data
                feed.causes, feed.pending = dict(source.causes), deque(source.pending)
        for name, outlet in self.outlets.items():
            was = other.outlets[name]
            outlet.revision, outlet.data, outlet.value = was.revision, was.data, was.value
            outlet.causes = dict(was.causes)

    def collect(self, time_ns: int, micro: int = 0, relaxation: float = 1.0) -> StepInput:
        """The inputs that differ from what it saw last, and its due actions."""
        inputs: dict[str, Vector] = {}
        untold = self.untold
        causes: dict[str, dict[int, tuple[str, ...]]] | None = None
        if untold:
            causes, self.untold = untold, {}
        for inlet in self.inlets:
            rows: Iterable[int] | None = None
            for feed in inlet.feeds:
                pending = feed.pending
                while pending and pending[0][0] <= time_ns:
                    _, feed.visible, feed.data, news = pending.popleft()
                    rows = rows or ()
                    if news:
                        rows = _rows_of(feed, news, rows)
            if rows is None and not inlet.is_behind:
                continue
            inlet.is_behind = False
            self.give(inlet, inputs, relaxation if micro else 1.0)
            if rows:
                changed = self.explain(inlet, rows)
                if changed:
                    causes = {} if causes is None else causes
                    causes.setdefault(inlet.name, {}).update(changed)
        actions = self.due(time_ns) if self.orders else ()
        return StepInput(time_ns, micro, inputs, causes or NOTHING, actions)

    def give(self, inlet: Inlet, inputs: dict[str, Vector], share: float = 1.0) -> None:
        """Put what is visible at an input into `inputs` if it is not what was given last.

        Of the way to it only `share` is gone.
        """
        if inlet.is_plain and share == 1.0:
            feed = inlet.feeds[0]
            if feed.visible is None or feed.data == inlet.data:
                return
            inlet.value, inlet.data = feed.visible, feed.data
        else:
            value = inlet.slot.combined([feed.visible for feed in inlet.feeds])
            if share < 1.0:
                value = inlet.value + share * (value - inlet.value)
            data = value.tobytes()
            if data == inlet.data:
                return
            value.setflags(write=False)
            inlet.value, inlet.data = value, data
            inlet.is_behind = share < 1.0
        inputs[inlet.name] = inlet.value

    def due(self, time_ns: int) -> tuple[Action, ...]:
        """The actions that are visible at `time_ns`, taken off the list.

        They come in the order in which they became visible, and then in that of who acts: when
        each was heard of does not matter.
        """
        ready = sorted((o for o in self.orders if o[0] <= time_ns), key=lambda order: order[:2])
        if ready:
            for _, _, channel, action in ready:
                if action.cause:
                    self.known_events.setdefault(action.cause, {}).setdefault("", channel)
            self.orders = deque(o for o in self.orders if o[0] > time_ns)
        return tuple(action for _, _, _, action in ready)

    def explain(self, inlet: Inlet, rows: Iterable[int]) -> dict[int, tuple[str, ...]]:
        """The new causes of the touched rows, remembering through which coupling they came."""
        changed: dict[int, tuple[str, ...]] = {}
        for row in sorted(rows):
            events: dict[str, str] = {}
            for feed_index, column in inlet.slot.sources_of[row]:
                feed = inlet.feeds[feed_index]
                event = feed.causes.get(column)
                if event is not None:
                    events.setdefault(event, feed.wire.coupling.name)
            kept = tuple(events)[:MAX_CAUSES]
            if inlet.causes.get(row) != kept:
                inlet.causes[row] = changed[row] = kept
                for event in kept:
                    channels = self.known_events.setdefault(event, {})
                    channels.setdefault(inlet.name, events[event])
        return changed

    def catch_up(self, inlet: Inlet, time_ns: int) -> None:
        """Take in what a loop left below its tolerance, without waking the member."""
        rows: Iterable[int] | None = None
        for feed in inlet.feeds:
            while feed.pending and feed.pending[0][0] <= time_ns:
                _, feed.visible, feed.data, news = feed.pending.popleft()
                rows = _rows_of(feed, news, rows or ())
        if rows is None:
            return
        inlet.is_behind = True
        changed = self.explain(inlet, rows)
        if changed:
            self.untold.setdefault(inlet.name, {}).update(changed)

    def stage(self, inlet: Inlet, time_ns: int) -> bool:
        """Make values visible within a loop; their causes follow when it has settled."""
        is_rung = False
        for feed in inlet.feeds:
            while feed.pending and feed.pending[0][0] <= time_ns and not feed.pending[0][3]:
                _, feed.visible, feed.data, _ = feed.pending.popleft()
                inlet.is_behind = is_rung = True
        return is_rung

    def set_next(self, result: StepResult) -> None:
        """Set its own next instant after its step at `result.time_ns`."""
        if self.period_ns:
            if self.next_ns <= result.time_ns:
                self.next_ns = result.time_ns + self.period_ns
            return
        if result.next_ns is not None:
            if result.next_ns <= result.time_ns:
                raise TwinError(
                    Reason.TIME_REGRESSION,
                    f"{self.name} stepped at {result.time_ns} ns and asked for {result.next_ns} ns",
                    {"member": self.name},
                )
            self.next_ns = result.next_ns
        elif self.next_ns <= result.time_ns:
            self.next_ns = NEVER

    def put_off(self, step: StepInput) -> None:
        """Keep the causes of a step that is not done after all."""
        self.reached_ns = step.time_ns
        self.untold = {variable: dict(causes) for variable, causes in step.causes.items()}


def _rows_of(feed: Feed, news: Mapping[int, str], rows: Iterable[int]) -> set[int]:
    """`rows` with those whose causes change by `news`, which is noted."""
    found = set(rows)
    for column, event in news.items():
        if feed.causes.get(column) != event:
            feed.causes[column] = event
            found.update(feed.wire.targets_of.get(column, ()))
    return found


def change_id(what: str, member: str, time_ns: int) -> str:
    """The id of the event that tells of a change of members."""
    return f"{FEDERATION}/{what}-{member}-{time_ns}"


def _asked_by(operator: str) -> str:
    return f", as {operator} asked" if operator else ""


class Exchange:
    """The members of a wiring with their ledger: takes answers in and hands them on."""

    def __init__(self, wiring: Wiring, pools: tuple[Pool, ...] = ()) -> None:
        self.ledger = Ledger(wiring.leads())
        self.members: dict[str, Member] = {}
        self._pools = pools
        self._changes: dict[str, Degraded] = {}
        """Changes of quality that are ahead, by member."""
        self._arrive(wiring)

    def admit(self, wiring: Wiring, operator: str) -> None:
        """Take in those members and couplings of `wiring` that are new.

        All others are as they were, in the same order. What the sources of new couplings say
        at present is on its way to their targets.
        """
        for name in self._arrive(wiring):
            text = f"{name} joins{_asked_by(operator)}"
            self._note(wiring.since_ns(name), "joined", name, text)

    def adopt(self, other: Exchange, hashes: bool) -> None:
        """Take over where `other`, of the same wiring, stands; share nothing that moves."""
        self.ledger = other.ledger.fork(hashes)
        self._changes = dict(other._changes)
        for name, member in self.members.items():
            member.adopt(other.members[name])

    def _arrive(self, wiring: Wiring) -> list[str]:
        """The same, without a word; the names of those who are new."""
        self.ledger.leads = wiring.leads()
        self.envelope = Envelope(wiring.descriptions, wiring.actuations, self._pools)
        self._action_delay = {(a.source, a.target): a.delay_ns for a in wiring.actuations}
        new = [name for name in wiring.descriptions if name not in self.members]
        for name in new:
            description = wiring.descriptions[name]
            since_ns = wiring.since_ns(name)
            rank = wiring.rank[name]
            policy = description.time
            inlets = []
            for slot in wiring.slots[name]:
                value = slot.initial()
                value.setflags(write=False)
                inlets.append(
                    Inlet(slot.variable.name, slot, slot.is_plain, value, value.tobytes())
                )
            self.members[name] = Member(
                name,
                rank,
                wiring.unit_of[name],
                policy.period_ns,
                policy.wakes_on_input,
                any(name == a.source for a in wiring.actuations),
                inlets,
                {
                    output: Outlet(
                        output,
                        name,
                        rank,
                        size,
                        record_head(rank, name, output, size, Quality.GOOD),
                    )
                    for output, size in description.output_sizes().items()
                },
                since_ns + policy.offset_ns,
                since_ns,
            )
        for member in self.members.values():
            for inlet, slot in zip(member.inlets, wiring.slots[member.name], strict=True):
                if len(slot.wires) > len(inlet.feeds):
                    inlet.slot, inlet.is_plain = slot, slot.is_plain
                    for wire in slot.wires[len(inlet.feeds) :]:
                        self._connect(wire, inlet, member)
        return new

    def _connect(self, wire: Wire, inlet: Inlet, member: Member) -> None:
        coupling = wire.coupling
        feed = Feed(wire, inlet, member, coupling.delay_ns, coupling.since_ns)
        inlet.feeds.append(feed)
        outlet = self.members[coupling.source].outlets[coupling.output]
        outlet.feeds.append(feed)
        if outlet.value is not None:
            data = outlet.value.tobytes()
            feed.pending.append((coupling.since_ns, outlet.value, data, dict(outlet.causes)))
            member.awaits = True

    def absorb(self, member: Member, result: StepResult) -> None:
        """Check a final result, record it, and hand it on to every member that it feeds."""
        if bool(result.held) is not member.says_held:
            self._hear_of_age(member, result)
        if result.desk is not None:
            self.operate(member, result.time_ns, result.desk)
        if result.events or result.actions:
            self.tell(member, result)
        self.publish(member, result, result.causes)

    def publish(
        self, member: Member, result: StepResult, causes: Mapping[str, Mapping[int, str]]
    ) -> None:
        """Record what has changed of a result's values, and hand it on with its causes."""
        outputs = result.outputs
        time_ns = result.time_ns
        if time_ns >= member.degraded_ns and member.name in self._changes:
            self._record_change(member)
        names: Iterable[str] = outputs
        if causes:
            names = dict.fromkeys(chain(outputs, causes))
        for name in names:
            outlet = member.outlets.get(name)
            if outlet is None:
                raise undeclared(member.name, name)
            value = outputs.get(name)
            if value is not None:
                if value.shape != (outlet.size,):
                    raise wrong_shape(member.name, name, outlet.size, value.size)
                check_finite(member.name, name, value, time_ns)
        for name in names:
            outlet = member.outlets[name]
            news: Mapping[int, str] = NOTHING
            if causes:
                news = causes.get(name, NOTHING)
                self._check_causes(member, name, news)
            value = outputs.get(name)
            is_new = False
            if value is not None:
                data = value.tobytes()
                if data != outlet.data and has_minus_zero(data):
                    value = plain_zeros(value)
                    value.setflags(write=False)
                    data = value.tobytes()
                if data != outlet.data:
                    is_new = True
                    outlet.revision += 1
                    outlet.value, outlet.data = value, data
                    record = Record(
                        time_ns,
                        result.micro,
                        member.rank,
                        member.name,
                        name,
                        outlet.revision,
                        value,
                        Quality.GOOD if time_ns < member.degraded_ns else member.quality,
                    )
                    self.ledger.add(record, data)
            present = outlet.value
            if present is None or outlet.data is None or not (is_new or news):
                continue
            if news:
                outlet.causes.update(news)
            for feed in outlet.feeds:
                since_ns = feed.since_ns
                visible_ns = time_ns + feed.delay_ns if time_ns >= since_ns else since_ns
                feed.pending.append((visible_ns, present, outlet.data, news))
                feed.member.awaits = True

    def degrade(self, change: Degraded) -> None:
        """Note that a member's values are of another quality from an instant on."""
        member = self.members[change.member]
        member.quality, member.degraded_ns = change.quality, change.time_ns
        self._changes[change.member] = change

    def _hear_of_age(self, member: Member, result: StepResult) -> None:
        """Note that a member's values are held, or good again, as it says itself.

        Where others have said of what quality they are, that counts.
        """
        member.says_held = bool(result.held)
        expected = Quality.GOOD if result.held else Quality.HELD
        if member.quality is expected:
            quality = Quality.HELD if result.held else Quality.GOOD
            why = TwinError(
                Reason.MEMBER_LATE, result.held or "in time again", {"member": member.name}
            )
            self.degrade(Degraded(member.name, result.time_ns, quality, why))

    def replace(self, change: Replaced) -> None:
        """Note that another service goes on under a member's name."""
        self._note(change.time_ns, "replaced", change.member, change.text)

    def leave(self, member: Member, time_ns: int, operator: str) -> str:
        """Let a member make no step at `time_ns` or later; the event that says so."""
        member.until_ns = time_ns
        text = f"{member.name} leaves{_asked_by(operator)}"
        return self._note(time_ns, "left", member.name, text)

    def hold(self, member: Member) -> None:
        """Record what a member that has made its last step leaves behind, as held."""
        for name, outlet in member.outlets.items():
            self._hold(member, name, outlet, member.until_ns, Quality.HELD)

    def _record_change(self, member: Member) -> None:
        """Record that the quality changes; what is held or stale, anew.

        Not before the member's own answers to the steps before have been recorded.
        """
        change = self._changes.pop(member.name)
        time_ns = change.time_ns
        quality = change.quality.name.lower()
        self._note(time_ns, quality, member.name, f"{member.name} is {quality}: {change.error}")
        if change.quality is Quality.SUBSTITUTED:
            return
        for name, outlet in member.outlets.items():
            if change.quality is not Quality.GOOD:
                self._hold(member, name, outlet, time_ns, change.quality)
            elif outlet.value is not None:
                outlet.data = b""  # what it says next is news, be it the same as before

    def _hold(
        self, member: Member, name: str, outlet: Outlet, time_ns: int, quality: Quality
    ) -> None:
        if outlet.value is not None:
            outlet.revision += 1
            place = (time_ns, 0, member.rank, member.name, name)
            self.ledger.add(Record(*place, outlet.revision, outlet.value, quality))

    def _note(self, time_ns: int, what: str, member: str, text: str) -> str:
        """Record a change of members. Its name does not depend on when it became known."""
        event_id = change_id(what, member, time_ns)
        event = Event(event_id, time_ns, f"member_{what}", member, text)
        self.ledger.add(EventRecord(time_ns, 0, FEDERATION_RANK, FEDERATION, event, ()))
        return event_id

    def _check_causes(self, member: Member, name: str, news: Mapping[int, str]) -> None:
        for event in news.values():
            if event not in member.own_events and event not in member.known_events:
                raise TwinError(
                    Reason.UNKNOWN_CAUSE,
                    f"{member.name}.{name} is explained by {event!r}, which is neither an "
                    f"event of {member.name} nor one that reached it",
                    {"member": member.name, "variable": name, "cause": event},
                )

    def operate(self, member: Member, time_ns: int, desk: DeskStep) -> None:
        """Record what a member was given besides its inputs, with who gave it.

        It comes before the step that it was given to, and that step may name it as a cause.
        """
        for operated in desk.operated:
            action, by = operated.action, operated.by
            known = member.known_events.setdefault(action.cause, {})
            known.setdefault("", f"{by} => {action.member}.{action.actuator}")
            what = Event(action.cause, time_ns, "setpoint_operated", action.entity, operated.text)
            self.ledger.add(EventRecord(time_ns, 0, DESK_RANK, by, what, ()))
            self.ledger.add(ActionRecord(time_ns, 0, DESK_RANK, by, action))

    def tell(self, member: Member, result: StepResult) -> None:
        """Check and record the events and actions of a result, and send the actions off."""
        prefix = f"{member.name}/"
        for event in result.events:
            if not event.id.startswith(prefix) or event.id in member.own_events:
                raise TwinError(
                    Reason.UNKNOWN_CAUSE,
                    f"{member.name} may not name an event {event.id!r}",
                    {"member": member.name, "event": event.id},
                )
            if event.time_ns > result.time_ns:
                raise not_yet(member.name, event, result.time_ns)
            via = []
            for cause in event.causes:
                if cause in member.own_events:
                    continue
                channels = member.known_events.get(cause)
                if channels is None:
                    raise TwinError(
                        Reason.UNKNOWN_CAUSE,
                        f"{event.id} ({event.kind}) names the cause {cause!r}, which is neither "
                        f"an earlier event of {member.name} nor one that reached it",
                        {"member": member.name, "event": event.id, "cause": cause},
                    )
                told_by = dict(event.through).get(cause, "")
                via.append((cause, channels.get(told_by) or next(iter(channels.values()))))
            member.own_events.add(event.id)
            self.ledger.add(
                EventRecord(
                    result.time_ns, result.micro, member.rank, member.name, event, tuple(via)
                )
            )
        if result.actions:
            seen = {inlet.name: inlet.value for inlet in member.inlets}
            for action, refusal in self.envelope.screen(member.name, result.actions, seen):
                self.ledger.add(
                    ActionRecord(
                        result.time_ns, result.micro, member.rank, member.name, action, refusal
                    )
                )
                if not refusal:
                    delay_ns = self._action_delay[member.name, action.member]
                    channel = f"{member.name} => {action.member}.{action.actuator}"
                    target = self.members[action.member]
                    visible_ns = max(result.time_ns + delay_ns, target.since_ns)
                    target.orders.append((visible_ns, member.rank, channel, action))
                    target.awaits = True
