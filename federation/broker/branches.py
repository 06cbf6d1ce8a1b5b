"""Tries what might become of a run: many futures of one cut, in memory, for who wants figures.

A fork (`BrokerServer.fork`) is a run of its own, on record from its beginning. What is tried here
leaves nothing behind: its futures share one past (`Stem`), the links to the twins, and the scenario
as it was read, and each tells only what was asked for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from federation import telemetry
from federation.broker.cuts import Cuts
from federation.broker.home import Ahead, PlannerSession, RunHome, Seat, all_of, leave
from federation.broker.seats import Answer, Done, Session, renumbered
from federation.broker.stem import Journal, Stem
from federation.broker.store import Store
from federation.core.coordinator import Coordinator
from federation.core.ledger import ActionRecord, Entry, Record
from federation.core.messages import Aborted, Commit, Effect, Failed, Finished, Grant, Stepped
from federation.errors import FederationError, Reason, ScenarioError
from federation.scenario.future import Future
from federation.scenario.run import Case, PlannerFactory, plan_member
from federation.scenario.spec import PLANNER, Scenario
from federation.twin import HOUR_NS, Description, Planner, StepInput
from federation.wire import codec
from federation.wire.link import Link

MOST_RUNS = 4
"""How many runs have stems, those that were asked for last."""

MOST_STEMS = 8
"""How many stems a run has, those that were asked for last; a forgotten one is grown again."""

Figure = tuple[str, str]
"""A member and an output of it."""

Reach = Callable[[Scenario], Awaitable[dict[str, Link]]]
"""Links to the members of a scenario, for whoever closes them."""


@dataclass(frozen=True)
class Attempt:
    """What is tried: a measure, in a future or, without one, as the run itself would go on."""

    measure: str
    future: Future | None


@dataclass(frozen=True)
class Tried:
    """What came of it after the cut: each value of the figures, and what the planner had done."""

    told: tuple[Record, ...]
    sent: tuple[ActionRecord, ...]


@dataclass
class _Tree:
    """A run with its stems."""

    scenario: Scenario
    journal: Journal
    stems: OrderedDict[int, Stem] = field(default_factory=OrderedDict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Branches:
    """Futures of the runs of one broker; so many `at_a_time` take their course."""

    def __init__(
        self,
        store: Store,
        epoch: int,
        factory: PlannerFactory | None,
        reach: Reach,
        at_a_time: int,
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._factory = factory
        self._reach = reach
        self._turn = asyncio.Semaphore(at_a_time)
        self._trees: OrderedDict[str, _Tree] = OrderedDict()

    async def try_all(
        self,
        run: str,
        read: Callable[[], Scenario],
        cut_ns: int,
        until_ns: int,
        attempts: Sequence[Attempt],
        figures: Collection[Figure],
        check: Callable[[Scenario, Case, Attempt], None],
    ) -> AsyncGenerator[tuple[int, Tried | FederationError], None]:
        """Let each attempt take its course from a cut of a run; they come as they end.

        `read` gives the scenario when it is not known yet. What `check` says of an attempt, or
        `Stem` of the run, is raised before any begins.
        """
        tree = await self._tree(run, read)
        for attempt in attempts:
            check(tree.scenario, tree.journal.case, attempt)
        stem = await self._stem(tree, cut_ns)
        wanted = frozenset(figures)
        # what might be is wanted sooner than what is
        scenario = tree.scenario.model_copy(update={"horizon_h": until_ns / HOUR_NS, "pace": None})
        tasks: dict[asyncio.Future[Tried], int] = {}
        links = await self._reach(tree.scenario)
        try:
            branches = [
                _Branch(run, scenario, stem, attempt, links, self._epoch, self._factory)
                for attempt in attempts
            ]
            for number, branch in enumerate(branches):
                tasks[asyncio.ensure_future(branch.bear(until_ns, wanted, self._turn))] = number
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = tasks.pop(task)
                    error = task.exception()
                    if error is None:
                        yield number, task.result()
                    elif isinstance(error, FederationError):
                        yield number, error
                    else:
                        raise error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(link.close() for link in links.values()))

    async def _tree(self, run: str, read: Callable[[], Scenario]) -> _Tree:
        tree = self._trees.get(run)
        if tree is None:
            scenario, journal = await asyncio.to_thread(lambda: (read(), Journal(self._store, run)))
            tree = self._trees.setdefault(run, _Tree(scenario, journal))
        self._trees.move_to_end(run)
        while len(self._trees) > MOST_RUNS:
            self._trees.popitem(last=False)
        return tree

    async def _stem(self, tree: _Tree, cut_ns: int) -> Stem:
        """The run at a cut, grown from the last stem before it."""
        async with tree.turn:
            await asyncio.to_thread(tree.journal.read_on)
            stem = tree.stems.get(cut_ns)
            if stem is None:
                before = max((ns for ns in tree.stems if ns < cut_ns), default=None)
                grow: Callable[[], Stem] = (
                    partial(Stem.grow, tree.journal, tree.scenario, self._factory, cut_ns)
                    if before is None
                    else partial(tree.stems[before].grown, cut_ns)
                )
                stem = tree.stems[cut_ns] = await asyncio.to_thread(grow)
            tree.stems.move_to_end(cut_ns)
            while len(tree.stems) > MOST_STEMS:
                tree.stems.popitem(last=False)
            return stem


class _Branch:
    """One attempt, from the opening of its sessions to their end."""

    def __init__(
        self,
        run: str,
        scenario: Scenario,
        stem: Stem,
        attempt: Attempt,
        links: Mapping[str, Link],
        epoch: int,
        factory: PlannerFactory | None,
    ) -> None:
        self._stem = stem
        self._scenario = scenario
        self._own = stem.journal.case
        self._case = replace(self._own, measure=attempt.measure or self._own.measure)
        self._links = links
        self._epoch = epoch
        self._factory = factory
        self._seats: dict[str, Seat] = {}
        ahead = None
        if (future := attempt.future) is not None:
            time_ns = stem.cut_ns + 1
            case = future.case(scenario, self._case, time_ns)
            ahead = Ahead(run, time_ns, case, future.believed, Cuts())
        self._is_future = ahead is not None
        self._planner = self._planner_of(self._case)
        self._home = RunHome(scenario, self._case, self._planner, links, epoch, None, ahead=ahead)

    async def bear(
        self, until_ns: int, figures: Collection[Figure], turn: asyncio.Semaphore
    ) -> Tried:
        """Take its course when it is its turn. Raises what ends it early."""
        async with turn:
            with telemetry.tracer.start_as_current_span(
                "future", attributes={"measure": self._case.measure, "cut_ns": self._stem.cut_ns}
            ):
                coordinator = self._stem.branch(until_ns)
                course = _Course(coordinator, self._seats, figures)
                try:
                    await self._sit(coordinator)
                    await course.run()
                finally:
                    course.end()
                    await asyncio.gather(*(leave(seat) for seat in self._seats.values()))
                return Tried(tuple(course.told), tuple(course.sent))

    def _planner_of(self, case: Case) -> Planner | None:
        known = self._stem.journal.descriptions
        planner = plan_member(self._scenario, known, case, self._factory)
        now = None if planner is None else planner.describe()
        if _told(now) != _told(known.get(PLANNER)):
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"the planner of {case.measure} is described otherwise than the one that the run "
                "has; such a future is a run of its own (ForkRun)",
                {"member": PLANNER},
            )
        return planner

    async def _sit(self, coordinator: Coordinator) -> None:
        """Give every member its place, in the state that it has at the cut."""
        names = [name for name in self._stem.experiment.wiring.descriptions if name != PLANNER]
        await all_of([self._seat(name, coordinator) for name in names])
        if self._planner is not None:
            await self._seat_planner()

    async def _seat(self, name: str, coordinator: Coordinator) -> None:
        stem, home = self._stem, self._home
        if not self._is_future:
            session = await home.open(name, again=False)
            self._seats[name] = session
            await stem.bring(name, session)
            return
        state = await stem.state(name, self._as_it_was(name))
        self._seats[name], next_ns = await home.open_future(name, state, 0)
        if stem.present(name)[0].time_ns >= 0:  # its first step does not depend on its luck
            coordinator.wake(name, next_ns)

    async def _seat_planner(self) -> None:
        session = await self._home.open(PLANNER, again=False)
        assert isinstance(session, PlannerSession)
        self._seats[PLANNER] = session
        if self._case.measure == self._own.measure:
            await self._stem.bring(PLANNER, session)
        else:
            self._seats[PLANNER] = _Successor(session, *self._stem.present(PLANNER))

    def _as_it_was(self, name: str) -> Callable[[], Awaitable[Session]]:
        """Opens a session as the run itself did."""
        home = RunHome(self._scenario, self._own, None, self._links, self._epoch, None)
        return partial(home.open, name, again=False)


def _told(description: Description | None) -> bytes:
    """A description as it is told, which loses some differences that are none."""
    if description is None:
        return b""
    return codec.encode_description(description).SerializeToString(deterministic=True)


class _Successor:
    """A planner that takes over at a cut: it is shown every input at once, and counts its events
    on after those of the one before it."""

    def __init__(self, session: PlannerSession, present: StepInput, events: int) -> None:
        self._session = session
        self._present: StepInput | None = present
        self._shift = events

    def begin(self, steps: Sequence[StepInput], done: Done) -> None:
        present, self._present = self._present, None
        if present is not None:
            first = steps[0]
            causes = {name: dict(known) for name, known in present.causes.items()}
            for name, news in first.causes.items():
                causes.setdefault(name, {}).update(news)
            inputs = {**present.inputs, **first.inputs}
            steps = (first._replace(inputs=inputs, causes=causes), *steps[1:])

        def renumber(answer: Answer) -> None:
            if not isinstance(answer, FederationError):
                answer = [renumbered(PLANNER, result, self._shift) for result in answer]
            done(answer)

        self._session.begin(steps, renumber)

    async def close(self) -> None:
        await self._session.close()


class _Course:
    """Lets a coordinator and its members have their way, and keeps what was asked for."""

    def __init__(
        self, coordinator: Coordinator, seats: Mapping[str, Seat], figures: Collection[Figure]
    ) -> None:
        self.told: list[Record] = []
        self.sent: list[ActionRecord] = []
        self._coordinator = coordinator
        self._seats = seats
        self._figures = figures
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until the horizon; raises what ends it early."""
        self._do(self._coordinator.start)
        await self._end

    def end(self) -> None:
        """Take no more answers."""
        self._end.cancel()

    def _do(self, decide: Callable[[], Sequence[Effect]]) -> None:
        """What goes wrong here, be it in an answer, ends the course."""
        try:
            for effect in decide():
                match effect:
                    case Grant(member, steps):
                        self._seats[member].begin(steps, partial(self._hear, member))
                    case Commit(entries):
                        self._note(entries)
                    case Finished():
                        self._end.set_result(None)
                    case Aborted(error):
                        self._end.set_exception(error)
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)

    def _hear(self, member: str, answer: Answer) -> None:
        if self._end.done():
            return
        event: Stepped | Failed
        if isinstance(answer, FederationError):
            event = Failed(member, answer)
        else:
            event = Stepped(member, tuple(answer))
        self._do(lambda: self._coordinator.handle(event))

    def _note(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if isinstance(entry, Record):
                if (entry.owner, entry.variable) in self._figures:
                    self.told.append(entry)
            elif isinstance(entry, ActionRecord) and entry.owner == PLANNER and not entry.refusal:
                self.sent.append(entry)
