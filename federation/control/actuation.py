"""Brings a bundle into force at several members, whole or not at all, whoever dies on the way.

Select at all of them, operate at all, see that what is in force is what was asked, confirm: at
the bundle's arbiter first, whose word decides, then at the others. Whatever goes wrong before the
arbiter's word ends in a release everywhere. Before a stage begins it is written down, so that
another life of this process ends what was begun: what may have been confirmed is confirmed again,
everything else is released. When there is no other life, the members end it themselves within the
bundle's window (`federation.core.desk`).

`Actuation` decides, and waits for nothing; `carry_out` and `take_up` do what it says over gRPC.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from federation.core.bundle import Bundle, bundle_of
from federation.errors import FederationError, Reason, TwinError
from federation.v1 import twin_pb2
from federation.wire.credentials import Identity
from federation.wire.orders import City, Hand

AGAIN_S = 0.05
"""The pause before a member is asked the same once more."""

STAGE_WITHIN_S = 10.0
"""How long a stage may take; wall time."""


class Stage(StrEnum):
    """How far a bundle has come."""

    SELECTING = "selecting"
    OPERATING = "operating"
    WATCHING = "watching"
    CONFIRMING = "confirming"
    RELEASING = "releasing"
    COMMITTED = "committed"
    COMPENSATED = "compensated"

    @property
    def is_end(self) -> bool:
        return self in (Stage.COMMITTED, Stage.COMPENSATED)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a member's twin is served, and the fencing number of its run's coordinator.

    A member that is a `city` is at the address of its broker, which is asked for a `purpose`, as
    `claim` where that is taken without proof.
    """

    address: str
    epoch: int
    city: str = ""
    purpose: str = ""
    claim: str = ""

    def hand(self, identity: Identity) -> Hand:
        """What acts there."""
        city = City(self.city, self.purpose, self.claim) if self.city else None
        return Hand(self.address, identity, city=city)


@dataclass(frozen=True)
class Task:
    """A bundle, where its members are, and its window in nanoseconds of the run.

    `seats` has every member that the bundle sets or has a condition on.
    """

    bundle: Bundle
    seats: Mapping[str, Seat]
    window_ns: int

    def members(self) -> tuple[str, ...]:
        """All whose word is needed, those that are set before those that are only looked at."""
        conditions = {c.member for c in self.bundle.conditions}
        set_ = self.bundle.members()
        return (*set_, *sorted(conditions.difference(set_)))

    @property
    def arbiter(self) -> str:
        return self.bundle.members()[0]


# events in


@dataclass(frozen=True, slots=True)
class Answered:
    """A member has done what it was asked, or refused or not answered (`error`)."""

    what: str
    member: str
    error: FederationError | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a member says is in force: not yet everything (`is_begun`), or something else."""

    member: str
    is_begun: bool
    difference: str = ""


@dataclass(frozen=True, slots=True)
class Overdue:
    """The time of a stage is over."""

    stage: Stage


Event = Answered | Seen | Overdue

# effects out


@dataclass(frozen=True, slots=True)
class Write:
    """Keep this before anything that follows is done."""

    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask these members for this: select, operate, look, confirm, release."""

    what: str
    members: tuple[str, ...]
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The bundle is in force everywhere, or nowhere; `why` says why it is not.

    Members in `unreached` were not heard: what they hold ends within its window, or its lease.
    """

    stage: Stage
    why: str = ""
    unreached: tuple[str, ...] = ()


Effect = Write | Ask | Ended

_SILENT = (Reason.UNREACHABLE, Reason.MEMBER_LOST, Reason.NOT_LIVE)
"""Errors of a member that may answer if it is asked again."""


class Actuation:
    """One bundle on its way. Events in, effects out; it never waits."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.stage = Stage.SELECTING
        self.why = ""
        self._owed: set[str] = set()

    def begin(self) -> tuple[Effect, ...]:
        return self._go(Stage.SELECTING, "select", self.task.members())

    def resume(self, stage: Stage, why: str = "") -> tuple[Effect, ...]:
        """Go on from the last stage that an earlier life has written down."""
        self.stage, self.why = stage, why
        match stage:
            case Stage.COMMITTED | Stage.COMPENSATED:
                return (Ended(stage, why),)
            case Stage.CONFIRMING:
                return self._go(Stage.CONFIRMING, "confirm", (self.task.arbiter,))
            case Stage.RELEASING:
                return self._go(Stage.RELEASING, "release", self.task.members())
            case _:
                return self._release("who brought it was started again")

    def handle(self, event: Event) -> tuple[Effect, ...]:
        if self.stage.is_end:
            return ()
        match event:
            case Overdue():
                return self._overdue() if event.stage is self.stage else ()
            case Seen():
                return self._see(event)
            case Answered():
                if event.what != _ASKED[self.stage] or event.member not in self._owed:
                    return ()
                if event.error is not None:
                    return self._refused(event, event.error)
                self._owed.discard(event.member)
                return () if self._owed else self._next(event.member)

    def _go(self, stage: Stage, what: str, members: tuple[str, ...]) -> tuple[Effect, ...]:
        self.stage, self._owed = stage, set(members)
        return (Write(self._record()), Ask(what, members))

    def _next(self, last: str) -> tuple[Effect, ...]:
        members = self.task.members()
        match self.stage:
            case Stage.SELECTING:
                return self._go(Stage.OPERATING, "operate", members)
            case Stage.OPERATING:
                return self._go(Stage.WATCHING, "look", members)
            case Stage.WATCHING:
                return self._go(Stage.CONFIRMING, "confirm", (self.task.arbiter,))
            case Stage.CONFIRMING if last == self.task.arbiter and len(members) > 1:
                self._owed = {member for member in members if member != last}
                return (Ask("confirm", tuple(m for m in members if m != last)),)
            case Stage.CONFIRMING:
                return self._end(Stage.COMMITTED)
            case _:
                return self._end(Stage.COMPENSATED)

    def _see(self, seen: Seen) -> tuple[Effect, ...]:
        if self.stage is not Stage.WATCHING or seen.member not in self._owed:
            return ()
        if seen.difference:
            return self._release(seen.difference)
        if not seen.is_begun:
            return (Ask("look", (seen.member,), is_again=True),)
        self._owed.discard(seen.member)
        return () if self._owed else self._next(seen.member)

    def _refused(self, event: Answered, error: FederationError) -> tuple[Effect, ...]:
        is_late = self.stage in (Stage.CONFIRMING, Stage.RELEASING)
        if is_late and error.reason in _SILENT:
            return (Ask(event.what, (event.member,), is_again=True),)
        if self.stage is Stage.RELEASING:  # it can't be made to; its window or lease ends it
            return ()
        return self._release(f"{event.member}: {error}")

    def _overdue(self) -> tuple[Effect, ...]:
        missing = ", ".join(sorted(self._owed))
        if self.stage is Stage.RELEASING:
            return self._end(Stage.COMPENSATED)
        return self._release(f"{missing} did not come to an end of {self.stage} in time")

    def _release(self, why: str) -> tuple[Effect, ...]:
        self.why = why
        return self._go(Stage.RELEASING, "release", self.task.members())

    def _end(self, stage: Stage) -> tuple[Effect, ...]:
        self.stage = stage
        unreached = tuple(sorted(self._owed))
        return (Write(self._record()), Ended(stage, self.why, unreached))

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"bundle": self.task.bundle.id, "stage": self.stage.value}
        if self.why:
            record["why"] = self.why
        if self.stage is Stage.SELECTING:
            seats = {name: asdict(seat) for name, seat in self.task.seats.items()}
            record["task"] = {
                "bundle": asdict(self.task.bundle),
                "seats": seats,
                "window_ns": self.task.window_ns,
            }
        return record


_ASKED = {
    Stage.SELECTING: "select",
    Stage.OPERATING: "operate",
    Stage.WATCHING: "look",
    Stage.CONFIRMING: "confirm",
    Stage.RELEASING: "release",
}


# what is written down


class Journal(Protocol):
    """Keeps records for another life of this process."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep a record; it is there for good when this returns."""


class FileJournal:
    """Records as JSON, one a line, each on the disk before it counts.

    A line that was being written when the process died never counted, and is dropped.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._out = file.open("a+b")
        self._out.seek(0)
        whole = self._out.read().rpartition(b"\n")
        if whole[2]:
            self._out.truncate(len(whole[0]) + len(whole[1]))

    def append(self, record: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._out.flush()
        os.fsync(self._out.fileno())

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read_bytes().splitlines()]

    def close(self) -> None:
        self._out.close()


def unfinished(records: Iterable[Mapping[str, Any]]) -> list[tuple[Task, Stage, str]]:
    """The bundles that a journal leaves open, with the last stage of each, in order."""
    found: dict[str, tuple[Task, Stage, str]] = {}
    for record in records:
        id, stage = record["bundle"], Stage(record["stage"])
        if "task" in record:
            plain = record["task"]
            seats = {name: Seat(**seat) for name, seat in plain["seats"].items()}
            found[id] = (Task(bundle_of(plain["bundle"]), seats, plain["window_ns"]), stage, "")
        elif stage.is_end:
            found.pop(id, None)
        elif id in found:
            found[id] = (found[id][0], stage, record.get("why", ""))
    return list(found.values())


# over gRPC


class Messenger(Protocol):
    """Carries what is asked to a member, and its answer back."""

    async def ask(self, what: str, member: str) -> Event: ...

    async def close(self) -> None: ...


class Hands:
    """Asks the members of a task where they are."""

    def __init__(self, task: Task, identity: Identity) -> None:
        self._task = task
        self._hands = {name: seat.hand(identity) for name, seat in task.seats.items()}

    async def ask(self, what: str, member: str) -> Event:
        task, bundle = self._task, self._task.bundle
        hand, epoch = self._hands[member], task.seats[member].epoch
        try:
            match what:
                case "select":
                    at = task.seats[task.arbiter].address
                    await hand.select(bundle, member, epoch, task.window_ns, at)
                case "operate":
                    await hand.operate(bundle, member, epoch)
                case "confirm":
                    await hand.confirm(bundle, member, epoch)
                case "release":
                    await hand.release(bundle.run, member, bundle.id)
                case _:
                    return compare(bundle, member, await hand.look(bundle.run, member))
        except FederationError as error:
            return Answered(what, member, error)
        return Answered(what, member)

    async def close(self) -> None:
        await asyncio.gather(*(hand.close() for hand in self._hands.values()))


def compare(bundle: Bundle, member: str, desks: twin_pb2.ReadDeskResponse) -> Seen:
    """Hold what a member says is in force to what a bundle wants there."""
    views = [v for v in desks.desks if (v.run, v.member) == (bundle.run, member)]
    if not views:
        return Seen(member, False, f"{member} has no session in {bundle.run} any more")
    for known in views[-1].bundles:
        if known.bundle == bundle.id and known.phase == "over":
            return Seen(member, False, f"{member} has undone it: {known.why}")
    reported = {(each.actuator, each.entity): each for each in views[-1].in_force}
    is_begun = True
    for setpoint in bundle.setpoints:
        if setpoint.member != member:
            continue
        at = f"{member}.{setpoint.actuator}[{setpoint.entity}]"
        there = reported.get((setpoint.actuator, setpoint.entity))
        if there is None or there.bundle != bundle.id:
            holder = "nobody" if there is None else there.owner
            return Seen(member, False, f"{holder} holds {at} and not {bundle.author}")
        if there.value != setpoint.value:
            return Seen(member, False, f"{at} is {there.value!r} and not {setpoint.value!r}")
        is_begun = is_begun and there.HasField("since_ns")
    return Seen(member, is_begun)


@dataclass(eq=False)
class _Carrier:
    """Does what an actuation says until it has ended."""

    actuation: Actuation
    messenger: Messenger
    journal: Journal
    within_s: float
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None

    async def run(self, effects: Sequence[Effect]) -> Ended:
        loop = asyncio.get_running_loop()
        self._end: asyncio.Future[Ended] = loop.create_future()
        try:
            self._do(effects)
            return await self._end
        finally:
            if self.timer is not None:
                self.timer.cancel()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    def _do(self, effects: Sequence[Effect]) -> None:
        try:
            for effect in effects:
                match effect:
                    case Write():
                        self.journal.append(effect.record)
                        self._watch(self.actuation.stage)
                    case Ask():
                        for member in effect.members:
                            pause_s = AGAIN_S if effect.is_again else 0.0
                            task = asyncio.ensure_future(self._ask(effect.what, member, pause_s))
                            self.tasks.add(task)
                            task.add_done_callback(self.tasks.discard)
                    case Ended():
                        if not self._end.done():
                            self._end.set_result(effect)
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)

    async def _ask(self, what: str, member: str, pause_s: float) -> None:
        if pause_s:
            await asyncio.sleep(pause_s)
        try:
            answer = await self.messenger.ask(what, member)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            answer = Answered(what, member, TwinError(Reason.TWIN_FAILED, text))
        if isinstance(answer, Answered) and answer.error is not None and what == "look":
            # a member that can't be looked at now may be looked at in a moment
            answer = Seen(member, is_begun=False)
        self._do(self.actuation.handle(answer))

    def _watch(self, stage: Stage) -> None:
        """Give a stage its time."""
        if self.timer is not None:
            self.timer.cancel()
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(
            self.within_s, lambda: self._do(self.actuation.handle(Overdue(stage)))
        )


Messengers = Callable[[Task, Identity], Messenger]


async def carry_out(
    task: Task,
    identity: Identity,
    journal: Journal,
    *,
    within_s: float = STAGE_WITHIN_S,
    messengers: Messengers = Hands,
) -> Ended:
    """Bring a bundle into force, or leave no trace of it. `identity` is that of a guard."""
    actuation = Actuation(task)
    return await _carried(actuation, identity, journal, within_s, messengers, actuation.begin())


async def take_up(
    journal: FileJournal,
    identity: Identity,
    *,
    within_s: float = STAGE_WITHIN_S,
    messengers: Messengers = Hands,
) -> list[tuple[Bundle, Ended]]:
    """End what an earlier life of this process has begun, as its journal has it."""

    async def end(task: Task, stage: Stage, why: str) -> tuple[Bundle, Ended]:
        actuation = Actuation(task)
        effects = actuation.resume(stage, why)
        ended = await _carried(actuation, identity, journal, within_s, messengers, effects)
        return task.bundle, ended

    work: list[Awaitable[tuple[Bundle, Ended]]] = [
        end(*open_) for open_ in unfinished(journal.records())
    ]
    return list(await asyncio.gather(*work))


async def _carried(
    actuation: Actuation,
    identity: Identity,
    journal: Journal,
    within_s: float,
    messengers: Messengers,
    effects: Sequence[Effect],
) -> Ended:
    async with AsyncExitStack() as stack:
        messenger = messengers(actuation.task, identity)
        stack.push_async_callback(messenger.close)
        return await _Carrier(actuation, messenger, journal, within_s).run(effects)
