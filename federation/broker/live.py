"""A run as the broker hosts it, from its creation to its end, and what people may do to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from federation.broker.cuts import Cuts
from federation.broker.home import Ahead, Entrance, Find, Takeover
from federation.broker.memory import Memory, Origin
from federation.broker.registry import Lease
from federation.broker.seats import Place
from federation.broker.shell import Asked, Batch, Inbox, Prepared, run_live
from federation.broker.store import NOT_SETTLED, Note, State, Store
from federation.broker.why import Lookout, write_results
from federation.core.ledger import ActionRecord, Entry, EventRecord, Record
from federation.core.messages import Accepted, Failed, Joined, Left, Ordered
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.scenario.run import Case, Outcome
from federation.scenario.spec import PLANNER, Addition, Scenario
from federation.twin import NOTHING, Action, Description
from federation.wire.link import Link

TURN_WITHIN_S = 86_400.0
"""How long a run may wait for others to end before it begins."""

STORE_WITHIN_S = 120.0
"""How long the store may take for one batch, or to note where a run stands."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class LiveRun:
    """A run as the broker hosts it: pending, running, then succeeded, failed or cancelled.

    What readers are told is in the store first. `changed` is set and replaced at every change:
    take it, read, and wait for it when there was nothing new. `leases` are those of the members
    that were found by their names, `places` say where each is.
    """

    name: str
    scenario: Scenario
    case: Case
    prepared: Prepared
    links: Mapping[str, Link]
    leases: dict[str, Lease]
    places: dict[str, Place]
    store: Store
    epoch: int
    keep_ledger: bool = False
    on_commit: Callable[[int], None] | None = None
    find: Find | None = None
    memory: Memory | None = None
    asked: tuple[Asked, ...] = ()
    """What people had asked for, and got, before this life of the broker."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    unkept: FederationError | None = None
    """Why the run failed, if not even that could be stored."""
    stored: int = 0
    """How many entries of the ledger an earlier life of the broker has stored."""
    settled_ns: int = NOT_SETTLED
    """The instant up to which they are complete."""
    cuts: Cuts = field(default_factory=Cuts)
    """States of members that forks of one run share."""
    turn_within_s: float = TURN_WITHIN_S
    lookout: Lookout = field(default_factory=Lookout)
    cities: dict[str, str] = field(default_factory=dict)
    """The members that are, or ever were, other cities, and which."""
    _inbox: Inbox = field(default_factory=Inbox)
    _task: asyncio.Task[Outcome] | None = None
    _ended_by: str = ""
    _ended_because: str = ""
    _more_links: list[Link] = field(default_factory=list)
    """To members that came later."""
    _descriptions: dict[str, Description] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._descriptions.update(self.prepared.experiment.descriptions)
        self._know_cities(self.places)
        for asked in self.asked:
            if isinstance(asked, Entrance):
                self._descriptions.update(asked.event.descriptions)
                self._more_links += asked.links.values()

    async def start(self, turn: asyncio.Semaphore) -> asyncio.Task[Outcome]:
        """Begin when it is this run's turn; the task gives the outcome or raises why not."""
        self._task = asyncio.create_task(self._go(turn))
        self._task.add_done_callback(_seen)
        await asyncio.sleep(0)  # a task that is cancelled before its first step ends unrecorded
        return self._task

    async def _go(self, turn: asyncio.Semaphore) -> Outcome:
        try:
            async with AsyncExitStack() as stack:
                await self._wait_for_turn(turn)
                stack.callback(turn.release)
                await self._change(State.RUNNING)
                origin = None if self.memory is None else self.memory.origin
                outcome = await run_live(
                    self.scenario,
                    self.case,
                    None,
                    self.links,
                    epoch=self.epoch,
                    keep_ledger=self.keep_ledger,
                    sink=self._keep,
                    on_commit=self.on_commit,
                    inbox=self._inbox,
                    prepared=self.prepared,
                    find=self.find,
                    memory=self.memory,
                    asked=self.asked,
                    gone=self._let_go,
                    lookout=self.lookout,
                    # what has been, and what only might be, is not acted on
                    run=self.name if self.is_lived else "",
                    ahead=self._ahead(),
                )
            if origin is not None and origin.is_replay:
                await asyncio.to_thread(self._compare, origin, outcome.digest)
            results = write_results(outcome.critical_path, outcome.pace, outcome.stale)
            await self._change(State.SUCCEEDED, digest=outcome.digest, results=results)
            return outcome
        except asyncio.CancelledError:
            await self._change(State.CANCELLED)
            raise
        except FederationError as error:
            await self._change(State.FAILED, error=error)
            raise
        except Exception as error:
            text = f"the broker failed: {type(error).__name__}: {error}"
            await self._change(State.FAILED, error=TwinError(Reason.TWIN_FAILED, text))
            raise
        finally:
            self._inbox.close()
            links = (*self.links.values(), *self._more_links)
            await asyncio.gather(*(link.close() for link in links))

    @property
    def descriptions(self) -> Mapping[str, Description]:
        """What each member is, those that joined later among them."""
        return dict(self._descriptions)

    @property
    def is_lived(self) -> bool:
        """Whether it is what is, and not what was or might be."""
        origin = None if self.memory is None else self.memory.origin
        return origin is None or not (origin.is_replay or origin.future is not None)

    def _ahead(self) -> Ahead | None:
        origin = None if self.memory is None else self.memory.origin
        if origin is None or origin.future is None:
            return None
        time_ns, future = origin.until_ns + 1, origin.future
        case = future.case(self.scenario, self.case, time_ns)
        return Ahead(origin.run, time_ns, case, future.believed, self.cuts)

    async def _wait_for_turn(self, turn: asyncio.Semaphore) -> None:
        self.lookout.waits_for("its turn, after other runs", self.turn_within_s)
        try:
            async with asyncio.timeout(self.turn_within_s):
                await turn.acquire()
        except TimeoutError:
            raise ScenarioError(
                Reason.NO_TURN,
                f"{self.name} did not get its turn within {self.turn_within_s:g} s: other runs "
                "go on for longer",
                {"run": self.name},
            ) from None

    async def submit(self, operator: str, action: Action) -> Accepted:
        """Let a person set an actuator. Fails with UNKNOWN_MEMBER, UNKNOWN_VARIABLE,
        UNKNOWN_ENTITY or OUTSIDE_ENVELOPE."""
        where = {"member": action.member, "actuator": action.actuator, "entity": action.entity}
        description = self._describe(action.member)
        actuators = {actuator.name: actuator for actuator in description.actuators}
        if action.actuator not in actuators:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"{action.member} has no actuator {action.actuator!r}; it has "
                f"{', '.join(actuators) or 'none'}",
                where,
            )
        if action.entity not in description.ids(actuators[action.actuator].kind):
            raise ScenarioError(
                Reason.UNKNOWN_ENTITY,
                f"{action.member}.{action.actuator} has no entity {action.entity!r}",
                where,
            )
        try:
            return await self._inbox.ask(Ordered(operator, action))
        except ScenarioError as error:
            raise ScenarioError(error.reason, error.message, {**where, **error.metadata}) from None

    async def join(
        self,
        addition: Addition,
        links: Mapping[str, Link],
        leases: Mapping[str, Lease],
        places: Mapping[str, Place],
        time_ns: int | None,
        operator: str,
    ) -> Accepted:
        """Let members join at `time_ns` of the run, or as soon as they can.

        The links are the run's from now on. Fails as wiring does, with LATE_WITHOUT_DELAY,
        UNKNOWN_PARAMETER, SCENARIO_INVALID when a name is taken, and INSTANT_PASSED.
        """
        self._more_links += links.values()
        # before anybody may be told of what they tell
        self._know_cities(places)
        asked = await entrance(addition, links, time_ns, operator)
        descriptions = asked.event.descriptions
        accepted = await self._inbox.ask(asked)
        self._descriptions.update(descriptions)
        self.leases.update(leases)
        self.places.update(places)
        return accepted

    def _know_cities(self, places: Mapping[str, Place]) -> None:
        self.cities.update({name: place.city for name, place in places.items() if place.city})

    async def leave(self, member: str, time_ns: int | None, operator: str) -> Accepted:
        """Let a member make no step at `time_ns` of the run or later, or as soon as that can be.

        Fails with UNKNOWN_MEMBER and INSTANT_PASSED.
        """
        self._describe(member)
        return await self._inbox.ask(Left(member, time_ns, operator))

    async def replace(
        self,
        member: str,
        link: Link,
        lease: Lease | None,
        place: Place,
        time_ns: int | None,
        operator: str,
    ) -> Accepted:
        """Let another service go on for a member, from its first step at `time_ns` or later.

        Returns when it does. Fails with UNKNOWN_MEMBER, DESCRIPTION_DIFFERS, INSTANT_PASSED, and
        with UNSUPPORTED when the same model can't be handed its state; the member then stays.
        """
        self._more_links.append(link)
        before, after = self._describe(member), await link.describe()
        if member == PLANNER:
            why = "the planner is no service; it can't be replaced"
            raise ScenarioError(Reason.UNKNOWN_MEMBER, why, {"member": member})
        for what in ("entities", "variables", "actuators", "time"):
            if getattr(before, what) != getattr(after, what):
                raise ScenarioError(
                    Reason.DESCRIPTION_DIFFERS,
                    f"{place.name} has other {what} than {member}: who takes over has the same "
                    "entities, variables, actuators and time policy",
                    {"member": member, "what": what},
                )
        _check_parameters(member, after, self.case.parameters.get(member, {}))
        kinds = [f"{d.model} {d.version}" for d in (before, after)]
        is_same = kinds[0] == kinds[1] and before.data_hash == after.data_hash
        how = "with its state" if is_same else "afresh"
        text = f"{kinds[1]} goes on for {kinds[0]}, {how}, as {operator} asked"
        takeover = Takeover(member, link, place, text, is_same, time_ns)
        accepted = await self._inbox.ask(takeover)
        self._descriptions[member] = after
        self.places[member] = place
        self.leases.pop(member, None)
        if lease is not None:
            self.leases[member] = lease
        return accepted

    def _describe(self, member: str) -> Description:
        found = self._descriptions.get(member)
        if found is None:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER,
                f"the run has no member {member!r}; it has {', '.join(self._descriptions)}",
                {"member": member},
            )
        return found

    def _let_go(self, member: str) -> None:
        """A member has left; what becomes of its service is no matter of this run any more."""
        self.leases.pop(member, None)
        self.places.pop(member, None)

    def _compare(self, origin: Origin, digest: str) -> None:
        """Hold a replay to the run that it repeats. Fails with REPLAY_DIFFERS."""
        before = self.store.run(origin.run)
        if before.digest == digest:
            return
        difference = first_difference(self.store, origin.run, self.name, origin.until_ns)
        if difference or before.digest:
            raise TwinError(
                Reason.REPLAY_DIFFERS,
                f"{self.name} has another ledger than {origin.run}: {difference}",
                {"run": origin.run},
            )

    def note(self, note: Note) -> None:
        """Put something on the run's record that the run does not go by."""
        self._inbox.put(note)

    def lose(self, member: str, why: str) -> None:
        """End the run because a member may not be heard any more."""
        error = TwinError(Reason.MEMBER_LOST, f"{member} was lost: {why}", {"member": member})
        self._inbox.put(Failed(member, error))

    async def cancel(self, by: str = "", because: str = "") -> None:
        """End the run, and wait until it has ended. One that has ended already stays as it is."""
        if self._task is None or self._task.done():
            return
        if not self._task.cancelling():
            self._ended_by, self._ended_because = by, because
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep(self, batch: Batch) -> None:
        await _stored(lambda: self._store(batch))
        self._announce()

    def _store(self, batch: Batch) -> None:
        skip = min(self.stored, len(batch.entries))
        self.stored -= skip
        self.store.append(
            self.name,
            batch.entries[skip:],
            batch.receive_ns[skip:],
            max(batch.settled_ns, self.settled_ns),
            batch.items,
        )
        for member, saved in batch.saved:
            self.store.keep_snapshot(self.name, member, saved.steps, saved.time_ns, saved.state)

    async def _change(
        self,
        state: State,
        *,
        digest: str = "",
        error: FederationError | None = None,
        results: str = "",
    ) -> None:
        end_ns = time.time_ns() if state.is_over else None
        by, because = self._ended_by, self._ended_because
        try:
            await _stored(
                lambda: self.store.change(
                    self.name,
                    state,
                    digest=digest,
                    error=error,
                    end_ns=end_ns,
                    ended_by=by,
                    ended_because=because,
                    results=results,
                )
            )
        except FederationError as failure:
            if state in (State.RUNNING, State.SUCCEEDED):
                raise
            self.unkept = error or failure
            _log.error("the end of %s could not be stored: %s", self.name, failure)
        self._announce()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


async def entrance(
    addition: Addition,
    links: Mapping[str, Link],
    time_ns: int | None,
    operator: str,
    known: Mapping[str, Description] = NOTHING,
) -> Entrance:
    """What joins a run, checked as far as it says something of its own members.

    Of members without a link, what is `known` must do.
    """
    descriptions = {
        name: await links[name].describe() if name in links else known[name]
        for name in addition.members
    }
    for name in addition.parameters:
        if name.partition(".")[0] not in descriptions:
            raise ScenarioError(
                Reason.UNKNOWN_MEMBER,
                f"{name!r} is no parameter of a member that joins",
                {"parameter": name},
            )
    for name, description in descriptions.items():
        _check_parameters(name, description, addition.parameters_of(name))
    couplings = await asyncio.to_thread(addition.couplings_resolved)
    joined = Joined(descriptions, couplings, time_ns=time_ns, operator=operator)
    return Entrance(joined, addition, links)


def _check_parameters(member: str, description: Description, given: Mapping[str, float]) -> None:
    known = {parameter.name for parameter in description.parameters}
    for name in given:
        if name not in known:
            raise ScenarioError(
                Reason.UNKNOWN_PARAMETER,
                f"{member} has no parameter {name!r}; it has {', '.join(sorted(known)) or 'none'}",
                {"member": member, "parameter": name},
            )


def first_difference(store: Store, one: str, other: str, until_ns: int) -> str:
    """The first entry of two ledgers that differs, in words; empty when none does."""
    after = 0
    while True:
        found, end, _ = store.entries(one, after)
        again, _, _ = store.entries(other, after, limit=max(len(found), 1))
        for before, now in zip_longest(found, again):
            entries = [
                None if s is None or s.entry.time_ns > until_ns else s.entry for s in (before, now)
            ]
            if _content(entries[0]) != _content(entries[1]):
                lines = ["nothing" if entry is None else show(entry) for entry in entries]
                return f"it has {lines[1]}, where there was {lines[0]}"
        if not found:
            return ""
        after = end


def _content(entry: Entry | None) -> object:
    """All of an entry that goes into the digest."""
    match entry:
        case Record():
            return (entry.sort_key(), entry.owner, entry.quality, entry.value.tobytes())
        case EventRecord():
            event = entry.event
            told = (event.id, event.kind, event.entity, event.text, event.causes)
            return (entry.sort_key(), entry.owner, told)
        case ActionRecord():
            return (entry.sort_key(), entry.owner, entry.action, entry.refusal)
        case None:
            return None


def show(entry: Entry) -> str:
    """An entry in a line."""
    at = f"at {entry.time_ns} ns"
    match entry:
        case Record():
            value = np.array2string(entry.value, threshold=8, precision=17)
            what = f"{entry.owner}.{entry.variable} = {value} ({entry.quality.name.lower()})"
            return f"{what} {at}.{entry.micro}"
        case EventRecord():
            event = entry.event
            return f"{event.kind} {event.id} of {event.entity} ({event.text}) {at}"
        case ActionRecord():
            action = entry.action
            place = f"{action.member}.{action.actuator}[{action.entity}]"
            return f"{entry.owner} sets {place} to {action.value!r} {entry.refusal} {at}"


async def _stored(work: Callable[[], None]) -> None:
    """Have the store do something, unless it takes too long, which ends the run."""
    try:
        async with asyncio.timeout(STORE_WITHIN_S):
            await asyncio.to_thread(work)
    except TimeoutError:
        raise ScenarioError(
            Reason.STORE_FAILED, f"the broker's store has not answered for {STORE_WITHIN_S:g} s"
        ) from None


def _seen(task: asyncio.Task[Outcome]) -> None:
    """A failed run is on record; nobody has to ask its task."""
    if not task.cancelled():
        task.exception()
