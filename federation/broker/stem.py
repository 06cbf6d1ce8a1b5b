"""A run as it stood at a cut: its futures branch from there, and none goes through its past again.

The past is gone through twice at most. The coordinator is given what the members answered, as the
journal has it; and of each member a session does again what it had done since the last stem, to
be asked for its state.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from federation.broker.memory import Memory, remember
from federation.broker.seats import REPLAY_STEPS, Saved, Session, mark_of, off_the_record
from federation.broker.store import Store
from federation.core.coordinator import Coordinator
from federation.core.messages import Aborted, Effect, Grant, Ordered, Refused, Stepped
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.scenario.run import Case, Experiment, PlannerFactory, bind, plan_member
from federation.scenario.spec import PLANNER, Scenario
from federation.twin import NO_DESK, Description, StepInput, StepResult


@dataclass
class _Log:
    """What a member did since its state was last saved, and how to know the answers again."""

    saved: Saved | None = None
    steps: list[StepInput] = field(default_factory=list)
    marks: list[bytes] = field(default_factory=list)

    def copy(self) -> _Log:
        return _Log(self.saved, list(self.steps), list(self.marks))

    def add(self, step: StepInput, result: StepResult) -> None:
        # what the desk gave the step is part of the answer, and no desk gives it again
        self.steps.append(step._replace(desk=result.desk or NO_DESK))
        self.marks.append(mark_of(result))


class Journal:
    """What the journal of a run says, read on as it grows.

    Fails as `Store.journal` does, and with UNSUPPORTED when members of the run came, went, were
    lost or replaced: what such a run did can't be gone through in this way.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.run = run
        self.case: Case
        self.descriptions: dict[str, Description] = {}
        self.orders: list[Ordered] = []
        self.answers: dict[str, list[StepResult]] = {}
        """By member, in the order of its steps."""
        self._store = store
        self._read = 0
        self.read_on()

    def read_on(self) -> None:
        """Read what has come since."""
        items = []
        for number, item in self._store.journal(self.run, self._read):
            items.append(item)
            self._read = number
        memory = remember(self.run, items)
        self._check(memory)
        if memory.case is not None:
            self.case = memory.case
        self.descriptions |= memory.descriptions
        for member, past in memory.pasts.items():
            found = [item for item in past.items if isinstance(item, StepResult)]
            self.answers.setdefault(member, []).extend(found)
        self.orders += [asked for asked in memory.asked if isinstance(asked, Ordered)]

    def _check(self, memory: Memory) -> None:
        changed = [m for m, past in memory.pasts.items() if len(past.items) != past.steps]
        changed += [type(a).__name__ for a in memory.asked if not isinstance(a, Ordered)]
        if changed or (memory.origin is not None and memory.origin.is_replay) or memory.desks:
            raise ScenarioError(
                Reason.UNSUPPORTED,
                f"members of {self.run} have changed in its midst; its futures are runs of their "
                "own (ForkRun)",
                {"run": self.run},
            )


class Stem:
    """A run with all that is of instants up to `cut_ns`, and nothing of later ones."""

    def __init__(
        self,
        journal: Journal,
        experiment: Experiment,
        cut_ns: int,
        coordinator: Coordinator,
        taken: Mapping[str, int],
        logs: Mapping[str, _Log],
    ) -> None:
        self.journal = journal
        self.experiment = experiment
        self.cut_ns = cut_ns
        self._coordinator = coordinator
        self._taken = dict(taken)
        """Per member how many of its answers are of instants up to the cut."""
        self._logs = dict(logs)
        self._turns = {name: asyncio.Lock() for name in logs}

    @classmethod
    def grow(
        cls,
        journal: Journal,
        scenario: Scenario,
        factory: PlannerFactory | None,
        cut_ns: int,
    ) -> Stem:
        """The first one of a run, from its beginning; takes processor time.

        Fails with REPLAY_DIFFERS when the record does not fit the scenario.
        """
        case, known = journal.case, journal.descriptions
        members = {name: known[name] for name in scenario.members}
        planner = plan_member(scenario, members, case, factory)
        if planner is None and PLANNER in known:
            raise ScenarioError(
                Reason.UNSUPPORTED,
                "the run has a planner, and this broker was given none to go on with",
                {"member": PLANNER},
            )
        experiment = bind(scenario, members, known.get(PLANNER), case)
        first = Coordinator(experiment.wiring, cut_ns, pools=experiment.pools)
        logs = {name: _Log() for name in experiment.wiring.descriptions}
        stem = cls(journal, experiment, cut_ns, first, dict.fromkeys(logs, 0), logs)
        stem._go_through(-1)
        return stem

    def grown(self, cut_ns: int) -> Stem:
        """A later one; takes processor time. Fails as `grow` does."""
        logs = {name: log.copy() for name, log in self._logs.items()}
        onward = self._coordinator.fork(cut_ns)
        stem = Stem(self.journal, self.experiment, cut_ns, onward, self._taken, logs)
        stem._go_through(self.cut_ns)
        return stem

    def branch(self, until_ns: int) -> Coordinator:
        """What is to come after the cut, up to an instant."""
        return self._coordinator.fork(until_ns)

    def present(self, member: str) -> tuple[StepInput, int]:
        """What a member was given by its last step, and how many events it has told."""
        return self._coordinator.present(member)

    async def state(self, member: str, begin: Callable[[], Awaitable[Session]]) -> bytes:
        """The state of a member at the cut. Of several who ask, the first one has it made by a
        session that `begin` opens, as the run itself opened its own.

        Fails as the session does, and with REPLAY_DIFFERS.
        """
        async with self._turns[member]:
            log = self._logs[member]
            if log.saved is None or log.steps:
                session = await begin()
                try:
                    await self._redo(member, session)
                    self._save(log, await session.snapshot())
                finally:
                    await session.close()
        assert log.saved is not None
        return log.saved.state

    async def bring(self, member: str, session: Session) -> None:
        """Bring a fresh session, opened as the run itself opened its own, to the cut.

        Fails as the session does, and with REPLAY_DIFFERS.
        """
        async with self._turns[member]:
            log = self._logs[member]
            await self._redo(member, session)
            if log.steps:
                try:
                    self._save(log, await session.snapshot())
                except FederationError as error:
                    if error.reason is not Reason.UNSUPPORTED:
                        raise  # one without snapshots does its steps again each time

    def _go_through(self, after_ns: int) -> None:
        """Give the coordinator what the members have answered, up to the cut."""
        orders = [
            order
            for order in self.journal.orders
            if order.time_ns is not None and after_ns < order.time_ns <= self.cut_ns
        ]
        effects: deque[Effect] = deque(self._coordinator.start(orders))
        while effects:
            match effects.popleft():
                case Grant(member, steps):
                    answer = Stepped(member, self._answers(member, steps))
                    effects.extend(self._coordinator.handle(answer))
                case Aborted(error):
                    raise error
                case Refused() as refused:
                    raise ScenarioError(refused.reason, refused.refusal, refused.metadata)
                case _:
                    pass

    def _answers(self, member: str, steps: Sequence[StepInput]) -> tuple[StepResult, ...]:
        first = self._taken[member]
        found = tuple(self.journal.answers.get(member, ())[first : first + len(steps)])
        for step, result in zip(steps, found, strict=False):
            if (step.time_ns, step.micro) != (result.time_ns, result.micro):
                raise off_the_record(member, result, step)
            self._logs[member].add(step, result)
        if len(found) < len(steps):
            raise TwinError(
                Reason.REPLAY_DIFFERS,
                f"{member} has a step at {steps[len(found)].time_ns} ns and none on record",
                {"member": member},
            )
        self._taken[member] = first + len(steps)
        return found

    async def _redo(self, member: str, session: Session) -> None:
        log = self._logs[member]
        if log.saved is not None:
            await session.restore(log.saved.state)
        for start in range(0, len(log.steps), REPLAY_STEPS):
            end = start + REPLAY_STEPS
            results = await session.advance(log.steps[start:end])
            for result, mark in zip(results, log.marks[start:end], strict=True):
                if mark_of(result) != mark:
                    raise TwinError(
                        Reason.REPLAY_DIFFERS,
                        f"{member} did its step at {result.time_ns} ns again and answered "
                        "otherwise than before: it keeps state outside its snapshots, or draws "
                        "on something else than its seed",
                        {"member": member},
                    )

    def _save(self, log: _Log, state: bytes) -> None:
        steps = len(log.steps) + (0 if log.saved is None else log.saved.steps)
        log.saved = Saved(steps, self.cut_ns, state)
        log.steps, log.marks = [], []
