"""A member's place in a live run: who does its steps, and what happens when they are lost.

The policies are those of the scenario (`OnFailure`). To `recover` is exact: a fresh session is
opened, put into the last state that was saved, and given again every step since, whose answers
must be those that are known; then it goes on where the lost one stopped. A run that another life
of the broker continues is the same thing with a longer past: what a member answered then is on
record, and is only carried out again after the last state that was saved.

A session that looks at the run of another city has nothing to be at fault for: it is sought for
as long as the run goes on. It, too, gives the known answers again, for each step says how far that
city's record went. Only if the record is not what it was does a fresh session begin where the lost
one stopped.

A member may also be replaced by another service. With the same model the state is handed over, so
that nobody notices; another model begins afresh, is shown every input, and counts its events on.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from federation.broker.why import Trouble
from federation.core.ledger import Quality
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.scenario.spec import OnFailure
from federation.twin import NO_DESK, DeskStep, StepInput, StepResult, Vector, check_outputs
from federation.wire import codec, footing
from federation.wire.link import NO_ERRAND, Errand
from federation.wire.party import Part, Party

REPLAY_STEPS = 64
"""How many steps a frame carries when they are done again."""

_T = TypeVar("_T")

ATTEMPTS = 3
"""How often a step is tried in fresh sessions before its error is believed."""

SAVE_LOOKS = 64
"""After how many steps the state is saved of a session that looks at the run of another city."""

LONGEST_PAUSE_S = 5.0
"""Between two attempts to look at the run of another city again."""

Answer = Sequence[StepResult] | FederationError
"""What became of a grant: a result for each step, or why there is none."""

Done = Callable[[Answer], None]
"""Hears it."""


class Session(Protocol):
    """A session of a twin, as `federation.wire.link` calls it."""

    @property
    def done(self) -> Sequence[StepResult]:
        """What the last frame did, also when it failed half-way."""

    def begin(self, steps: Sequence[StepInput], done: Done) -> None: ...

    async def advance(self, steps: Sequence[StepInput]) -> Sequence[StepResult]: ...

    async def snapshot(self) -> bytes: ...

    async def restore(self, state: bytes) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """A member's state after its first `steps` steps, the last of them at `time_ns`."""

    steps: int
    time_ns: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Degradation:
    """From its step at `time_ns` on, a member's values are of another quality."""

    time_ns: int
    quality: Quality
    error: FederationError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service is: under a name that it has registered, or at an address. On `errand` it is
    asked; only cities take notice of that. At the address of a `city` its broker answers."""

    name: str
    address: str | None = None
    errand: Errand = NO_ERRAND
    city: str = ""

    @property
    def expects(self) -> Party | None:
        """Who has to answer at the address, over TLS."""
        if self.city:
            return footing.expected(Part.BROKER, city=self.city)
        return footing.expected(Part.TWIN, self.name)


@dataclass(frozen=True, slots=True)
class Succession:
    """From its step at `time_ns` on, another service goes on for a member.

    It has its state when `is_same`; else it begins afresh. Without a `place` it is looked for
    where the member was.
    """

    time_ns: int
    text: str
    is_same: bool
    place: Place | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Heir:
    """A service that is to take over from a member's step at `time_ns` or later, or its next.

    `done` hears the instant of that step once it is on record, or why the member stays.
    """

    time_ns: int
    text: str
    is_same: bool
    place: Place
    done: asyncio.Future[Any]

    def fail(self, error: FederationError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Home(Protocol):
    """Opens a session where a member's service is, or the one that stands in for it.

    A session begins at `start_ns`. `again` says that the member is lost where it was: its
    service is looked for, and waited for as long as its policy says. What goes wrong is a
    `FederationError`.
    """

    async def open(self, member: str, *, again: bool, start_ns: int = 0) -> Session: ...

    async def open_substitute(self, member: str, start_ns: int = 0) -> Session: ...

    async def open_heir(self, member: str, start_ns: int) -> Session:
        """Where the service is that is to take over."""

    async def open_future(
        self, member: str, state: bytes, start_ns: int
    ) -> tuple[Session, int | None]:
        """A session in the run's own future after the cut at which the member was in this state,
        and the next instant that it wants."""

    async def at_cut(self, member: str, steps: int, make: Callable[[], Awaitable[Saved]]) -> Saved:
        """The state of a member at the cut, after so many steps; `make` makes it."""


class Witness(Protocol):
    """Hears what becomes of a member, besides its answers."""

    def saved(self, member: str, state: Saved) -> None:
        """A state of the member that it can begin from again."""

    def degraded(self, member: str, change: Degradation, *, is_new: bool) -> None:
        """The quality of its values changes with its next answer; new, or from the record."""

    def replaced(self, member: str, change: Succession, heir: Heir | None) -> None:
        """Another service goes on with its next answer; its heir, or one from the record."""

    def recovered(self, member: str, error: FederationError, wall_s: float) -> None:
        """It was lost for this reason, and `wall_s` later it had done its step after all."""


@dataclass(slots=True)
class Past:
    """What is on record of a member: its answers, what changed in between, and a saved state."""

    items: deque[StepResult | Degradation | Succession] = field(default_factory=deque)
    steps: int = 0
    """How many answers there are."""
    saved: Saved | None = None


class MemberSeat:
    """One member of one run. It is given one frame at a time, as the coordinator grants them."""

    def __init__(
        self,
        member: str,
        sizes: Mapping[str, int],
        policy: OnFailure,
        home: Home,
        witness: Witness,
        past: Past | None = None,
        start_ns: int = 0,
        desks: Mapping[tuple[int, int], DeskStep] | None = None,
        *,
        diverges: bool = False,
        asks_to_wake: bool = False,
        looks: bool = False,
    ) -> None:
        """With `diverges` the member goes on, after its past, in another future of it.
        `asks_to_wake` says that it has no period, `looks` that its sessions look at the run of
        another city."""
        self.member = member
        self._looks = looks
        self._diverges = diverges
        self._asks_to_wake = asks_to_wake
        self._desks = desks
        """What its desk had to do with its steps, by instant and micro-step, when the run is one
        that is gone through again."""
        self._sizes = sizes
        self._policy = policy
        self._home = home
        self._witness = witness
        self._past = past or Past()
        self._session: Session | None = None
        self._is_known = bool(self._past.items)
        """Whether it had a session before, here or in an earlier life of the broker."""
        self._track = _Track(self._past, policy, start_ns, fills=looks)
        self.trouble: Trouble | None = None
        """How the member is being brought back, while it is lost."""
        self._quality = Quality.GOOD
        self._known: tuple[StepResult, ...] = ()
        """Answers to the first steps of the frame, from the record."""
        self._rest: tuple[StepInput, ...] = ()
        """The other steps of the frame, as far as one session does them."""
        self._later: tuple[StepInput, ...] = ()
        """Those that the heir does."""
        self._heir: Heir | None = None
        self._done: Done | None = None
        self._asked_s = math.inf
        """When the session was given the frame that it owes an answer to."""
        self._task: asyncio.Task[None] | None = None
        self._lost: FederationError | None = None
        """Why there is no session, if it was lost while it owed nothing."""

    @property
    def answer_within_s(self) -> float:
        """How long its session may take for a frame."""
        return self._policy.answer_within_s

    async def open(self) -> None:
        """Open the member's session, unless there is a past to go through first."""
        if not self._past.items and not self._diverges:
            self._session = await self._open()

    def adopt(self, session: Session, present: StepInput, events: int) -> None:
        """Take over a session that was used without a seat, after the step `present`.

        The step has all that the member was given by then; `events` is how many it has told.
        """
        self._session, self._is_known = session, True
        self._track.learn(present, events)

    def replace(self, heir: Heir, present: StepInput, events: int) -> None:
        """Let another service take over; see `adopt`. The last one who asks has it."""
        if self._heir is not None:
            self._heir.fail(_outdone(self.member))
        self._heir = heir
        self._track.learn(present, events)

    def begin(self, steps: Sequence[StepInput], done: Done) -> None:
        """Do these steps; `done` hears the answers, or the error that ends the run."""
        if self._desks is not None:
            at = self._desks
            steps = [s._replace(desk=at.get((s.time_ns, s.micro), NO_DESK)) for s in steps]
        known: list[StepResult] = []
        items = self._past.items
        while items and len(known) < len(steps):
            item = items.popleft()
            if isinstance(item, Degradation):
                self._degrade(item, is_new=False)
                continue
            step = steps[len(known)]
            if isinstance(item, Succession):
                # of a change at the cut of a fork only the instant of the cut is on record
                self._succeed(replace(item, time_ns=step.time_ns), None)
                continue
            if (item.time_ns, item.micro) != (step.time_ns, step.micro):
                error = off_the_record(self.member, item, step)
                asyncio.get_running_loop().call_soon(done, error)
                return
            self._track.add(step, item)
            known.append(item)
        self._known, self._rest, self._done = tuple(known), tuple(steps[len(known) :]), done
        if self._diverges and not any(isinstance(item, StepResult) for item in items):
            self._diverges = False
            if self._quality is not Quality.HELD:
                self._work(self._diverge())
                return
        self._get_on()

    def _get_on(self) -> None:
        """Have done what is not known of a frame."""
        if self._heir is not None and self._heir.done.cancelled():
            self._heir = None
        if self._heir is not None:
            turn_ns = self._heir.time_ns
            self._later = tuple(step for step in self._rest if step.time_ns >= turn_ns)
            self._rest = self._rest[: len(self._rest) - len(self._later)]
        if self._later and not self._rest:
            self._take_turns()
        elif self._quality is Quality.HELD or not self._rest:
            asyncio.get_running_loop().call_soon(self._answer, _unchanged(self._rest))
        else:
            self._go()

    def _go(self) -> None:
        """Have the rest of the frame done."""
        if self._session is None:
            asyncio.get_running_loop().call_soon(self._begin_again)
        elif self._is_time_to_save():
            self._work(self._save())
        else:
            self._ask(self._session)

    def look(self, now_s: float) -> None:
        """Give the member up when its answer is overdue at `now_s` of the monotonic clock."""
        if self._asked_s + self._policy.answer_within_s < now_s:
            self._fail(self._overdue())

    def lose(self, error: FederationError) -> None:
        """The member may not be heard any more, whatever its session says later.

        One that is idle, or being saved, is missed when it is next needed. Who stands in for a
        member is not lost with it.
        """
        if self._quality is not Quality.GOOD or self._session is None:
            return
        if self._asked_s < math.inf:
            self._fail(error)
            return
        session, self._session, self._lost = self._session, None, error
        self._leave(session)

    async def close(self) -> None:
        """End what goes on, and the session."""
        self._done = None
        if self._heir is not None:
            self._heir.fail(_outdone(self.member))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    # -- a frame and its answer ----------------------------------------------------------

    def _begin_again(self) -> None:
        """Begin a frame without a session: it was lost, or there is a past to go through."""
        if self._done is None:
            return
        if self._lost is None:
            self._work(self._resume(None))
        else:
            self._fail(self._lost)

    def _ask(self, session: Session) -> None:
        self._asked_s = time.monotonic()
        steps = self._track.filled(self._rest)
        session.begin(steps, lambda answer: self._hear(session, answer))

    def _hear(self, session: Session, answer: Answer) -> None:
        """What a session says to the frame that it was given."""
        if self._done is None or self._session is not session:
            return  # it was given up meanwhile
        if isinstance(answer, FederationError):
            results, error = self._sound(session.done, is_whole=False)
            error = error or answer
        else:
            results, error = self._sound(answer, is_whole=True)
        if error is None:
            self._answer(results)
        else:
            self._fail(error, results)

    def _sound(
        self, answer: Sequence[StepResult], *, is_whole: bool
    ) -> tuple[tuple[StepResult, ...], FederationError | None]:
        """The answers that are as they should be, and what is wrong with the first that isn't.

        They are held to what was asked and described; their events are numbered on.
        """
        sound: list[StepResult] = []
        try:
            for step, result in zip(self._rest, answer, strict=False):
                if (step.time_ns, step.micro) != (result.time_ns, result.micro):
                    raise self._misfit(f"for {step.time_ns} ns answered for {result.time_ns} ns")
                check_outputs(self.member, self._sizes, result)
                result = self._track.renumbered(self.member, result)
                if self._looks:
                    self._check_story(sound, result)
                sound.append(result)
            if is_whole and len(answer) != len(self._rest):
                raise self._misfit(f"{len(self._rest)} steps answered for {len(answer)}")
        except FederationError as error:
            return tuple(sound), error
        return tuple(sound), None

    def _check_story(self, before: Sequence[StepResult], result: StepResult) -> None:
        """Hold what another city tells to what may be on record here, which must not fail for it:
        events that are new, and caused by none but such of its own."""
        told = [event for each in before for event in each.events]
        last = _serial(self.member, told[-1].id) if told else self._track.serial
        for event in result.events:
            serial = _serial(self.member, event.id)
            causes = (_serial(self.member, cause) for cause in event.causes)
            if serial <= last or not all(0 < cause < serial for cause in causes):
                raise self._misfit(f"for {result.time_ns} ns told of {event.id} out of its order")
            last = serial
        if result.actions:
            raise self._misfit(f"for {result.time_ns} ns wanted to act")
        for entries in result.causes.values():
            for event_id in entries.values():
                if not 0 < _serial(self.member, event_id) <= last:
                    raise self._misfit(f"for {result.time_ns} ns named the cause {event_id!r}")

    def _misfit(self, how: str) -> TwinError:
        text = f"{self.member}, asked {how}"
        return TwinError(Reason.INVALID_FRAME, text, {"member": self.member})

    def _checked(self, answer: Sequence[StepResult]) -> tuple[StepResult, ...]:
        results, error = self._sound(answer, is_whole=True)
        if error is not None:
            raise error
        return results

    def _answer(self, results: tuple[StepResult, ...]) -> None:
        self._asked_s = math.inf
        if self._done is None:
            return
        if self._quality is not Quality.HELD:
            for step, result in zip(self._rest, results, strict=True):
                self._track.add(step, result)
        self._known += results
        if self._later:
            self._take_turns()
            return
        done, self._done = self._done, None
        done(self._known)

    def _fail(self, error: FederationError, sound: tuple[StepResult, ...] = ()) -> None:
        """Do as the policy says about a frame that has good answers to its first steps only."""
        session, self._session = self._session, None
        self._asked_s, self._lost = math.inf, None
        if session is not None:
            self._leave(session)
        match self._policy.do:
            case "recover":
                self._work(self._resume(error))
            case "hold" | "substitute" if self._quality is Quality.GOOD:
                for step, result in zip(self._rest, sound, strict=False):
                    self._track.add(step, result)
                self._known, self._rest = self._known + sound, self._rest[len(sound) :]
                held = self._policy.do == "hold"
                quality = Quality.HELD if held else Quality.SUBSTITUTED
                change = Degradation(self._rest[0].time_ns, quality, error)
                self._degrade(change, is_new=True)
                if held:
                    self._answer(_unchanged(self._rest))
                else:
                    self._work(self._resume(None))
            case _:
                self._end(error)

    def _end(self, error: FederationError) -> None:
        self.trouble = None
        done, self._done = self._done, None
        if done is not None:
            done(error)

    def _degrade(self, change: Degradation, *, is_new: bool) -> None:
        self._witness.degraded(self.member, change, is_new=is_new)
        self._quality = change.quality
        self._track.begin_anew()

    # -- another service for the member ------------------------------------------------------

    def _take_turns(self) -> None:
        """Have the steps done that come after the hand-over, and the hand-over first."""
        heir, self._heir = self._heir, None
        self._rest, self._later = self._later, ()
        assert heir is not None
        self._work(self._hand_over(heir))

    async def _hand_over(self, heir: Heir) -> None:
        try:
            if self._quality is not Quality.GOOD:
                raise TwinError(
                    Reason.MEMBER_LOST,
                    f"{self.member} was lost and is {self._quality.name.lower()}; there is nobody "
                    "to take over from",
                    {"member": self.member},
                )
            start_ns = self._track.start_ns if heir.is_same else self._track.last_ns
            session = await self._home.open_heir(self.member, start_ns)
            try:
                if heir.is_same:
                    await self._inherit(session)
            except BaseException:
                self._leave(session)
                raise
        except FederationError as error:
            heir.fail(error)
        else:
            old, self._session, self._lost = self._session, session, None
            if old is not None:
                self._leave(old)
            change = Succession(self._rest[0].time_ns, heir.text, heir.is_same, heir.place)
            self._succeed(change, heir)
        if self._quality is Quality.HELD:
            self._answer(_unchanged(self._rest))
        else:
            self._go()

    async def _inherit(self, session: Session) -> None:
        """Bring a session to where the member is: by its state, or by doing all its steps."""
        if self._session is not None:
            try:
                state = await self._in_time(self._session.snapshot())
            except FederationError:
                if not self._track.is_whole:
                    raise
            else:
                await self._in_time(session.restore(state))
                self._witness.saved(self.member, self._track.save(state))
                return
        if not self._track.is_whole:
            raise TwinError(
                Reason.MEMBER_LOST,
                f"{self.member} is lost, and what it was given is not kept: only a member whose "
                "policy is recover can be handed over now",
                {"member": self.member},
            )
        await self._redo(session)

    def _succeed(self, change: Succession, heir: Heir | None) -> None:
        if not change.is_same:
            self._track.begin_anew(self._track.last_ns)
        self._witness.replaced(self.member, change, heir)

    def _leave(self, session: Session) -> None:
        leaving = asyncio.ensure_future(session.close())
        leaving.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _work(self, work: Coroutine[object, object, None]) -> None:
        self._task = asyncio.ensure_future(work)

        def ended(task: asyncio.Task[None]) -> None:
            if self._task is task:
                self._task = None
            error = None if task.cancelled() else task.exception()
            if error is not None:
                text = f"{self.member} can't be recovered: {type(error).__name__}: {error}"
                self._end(TwinError(Reason.TWIN_FAILED, text, {"member": self.member}))

        self._task.add_done_callback(ended)

    # -- another future ----------------------------------------------------------------------

    async def _diverge(self) -> None:
        """Leave the past for a future of its own; what it now wants next is in its last answer."""
        try:
            if self._quality is Quality.SUBSTITUTED or self._past.items:
                text = f"{self.member} was substituted or replaced; it can't have other futures"
                raise TwinError(Reason.UNSUPPORTED, text, {"member": self.member})
            saved = await self._home.at_cut(self.member, self._track.count, self._at_cut)
            self._session, next_ns = await self._in_time(
                self._home.open_future(self.member, saved.state, self._track.start_ns)
            )
        except FederationError as error:
            self._end(error)
            return
        self._is_known = True
        self._track.arrived()
        if self._asks_to_wake and self._known:
            self._known = (*self._known[:-1], self._known[-1]._replace(next_ns=next_ns))
        self._get_on()

    async def _at_cut(self) -> Saved:
        """The state after the past, from a session that goes through it again."""
        if self._track.is_saved:
            assert self._track.saved is not None
            return self._track.saved
        session = await self._home.open(self.member, again=False, start_ns=self._track.start_ns)
        try:
            await self._redo(session)
            return self._track.save(await self._in_time(session.snapshot()))
        finally:
            self._leave(session)

    # -- saving and coming back ------------------------------------------------------------

    def _is_time_to_save(self) -> bool:
        if self._looks and self._policy.do == "recover" and self._track.unsaved >= SAVE_LOOKS:
            return True
        every_ns = self._policy.save_every_ns
        return (
            every_ns > 0
            and self._rest[0].micro == 0
            and self._rest[0].time_ns >= self._track.saved_ns + every_ns
        )

    async def _save(self) -> None:
        session = self._session
        assert session is not None
        try:
            state = await self._in_time(session.snapshot())
        except FederationError as error:
            self._fail(error)
            return
        saved = self._track.save(state)
        self._witness.saved(self.member, saved)
        if self._session is session:
            self._ask(session)
        else:
            self._begin_again()

    async def _resume(self, error: FederationError | None) -> None:
        """Bring a fresh session to where the member is, and let it do what is due.

        A step that fails the same way in every fresh session is the twin's own fault, and its
        error is the answer. A service that is lost again was not there to be at fault.
        """
        began_s, pause_s = time.perf_counter(), 0.05
        is_sought = self._looks and self._policy.do == "recover"
        for attempt in itertools.count(1) if is_sought else range(1, ATTEMPTS + 1):
            try:
                self._recover(attempt, "a session is opened", error, self._policy.back_within_s)
                session = await self._open()
                try:
                    self._recover(attempt, "it does again what it had done", error)
                    await self._redo(session)
                    self._recover(attempt, "it does what is due", error)
                    steps = self._track.filled(self._rest)
                    results = self._checked(await self._in_time(session.advance(steps)))
                except BaseException:
                    self._leave(session)
                    raise
            except FederationError as failure:
                is_same = error is not None and str(failure) == str(error)
                error = failure
                if is_sought:
                    if failure.reason in _OTHERWISE:
                        # what was told has been told; from here on it is the city's new record
                        self._track.begin_anew(self._track.last_ns)
                    self._recover(attempt, "it is sought again", error, LONGEST_PAUSE_S)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    continue
                if is_same and failure.reason is not Reason.MEMBER_LOST:
                    break
                if failure.reason in _FINAL:
                    break
            else:
                self._session, self.trouble = session, None
                self._track.arrived()
                if error is not None:
                    self._witness.recovered(self.member, error, time.perf_counter() - began_s)
                self._answer(results)
                return
        assert error is not None
        if self._policy.do == "recover":
            self._end(error)
        else:
            self._fail(error)

    def _recover(
        self,
        attempt: int,
        stage: str,
        error: FederationError | None,
        within_s: float | None = None,
    ) -> None:
        """Say, to who looks, how the member is being brought back."""
        now_s = time.monotonic()
        since_s = now_s if self.trouble is None else self.trouble.since_s
        within_s = self._policy.answer_within_s if within_s is None else within_s
        self.trouble = Trouble(attempt, stage, error, since_s, now_s + within_s)

    async def _in_time(self, work: Awaitable[_T]) -> _T:
        """What a session that is not heard yet gives, unless its time is over."""
        try:
            async with asyncio.timeout(self._policy.answer_within_s):
                return await work
        except TimeoutError:
            raise self._overdue() from None

    def _overdue(self) -> TwinError:
        return TwinError(
            Reason.MEMBER_LOST,
            f"{self.member} did not answer within {self._policy.answer_within_s:g} s for its step "
            f"at {self._rest[0].time_ns if self._rest else self._track.last_ns} ns",
            {"member": self.member},
        )

    async def _open(self) -> Session:
        if self._quality is Quality.SUBSTITUTED:
            return await self._home.open_substitute(self.member)
        again, self._is_known = self._is_known, True
        return await self._home.open(self.member, again=again, start_ns=self._track.start_ns)

    async def _redo(self, session: Session) -> None:
        """Do again what is not in the saved state; the answers must be the known ones."""
        if self._track.saved is not None:
            await self._in_time(session.restore(self._track.saved.state))
        for steps, marks in self._track.frames():
            results = await self._in_time(session.advance(steps))
            for result, mark in zip(results, marks, strict=True):
                if mark_of(self._track.renumbered(self.member, result)) != mark:
                    raise TwinError(
                        Reason.REPLAY_DIFFERS,
                        f"{self.member} did its step at {result.time_ns} ns again and answered "
                        "otherwise than before: it keeps state outside its snapshots, or draws "
                        "on something else than its seed",
                        {"member": self.member},
                    )


class _Track:
    """Where a member is: its last saved state, and what it was given since."""

    def __init__(
        self, past: Past, policy: OnFailure, start_ns: int, *, fills: bool = False
    ) -> None:
        self.saved = past.saved
        self.start_ns = start_ns
        """When the session began that does the member's steps."""
        self._redoes = policy.do in ("recover", "substitute")
        """Whether a fresh session may have to do again what was done."""
        self._is_past = bool(past.items)
        self._fills = (
            fills
            or policy.do == "substitute"
            or any(isinstance(item, Succession) and not item.is_same for item in past.items)
        )
        self._count = 0
        self.last_ns = start_ns
        self.is_whole = self._redoes or self._is_past
        """Whether all steps since the saved state, or the start, are known."""
        self._steps: list[StepInput] = []
        self._marks: list[bytes] = []
        self._desks: dict[int, DeskStep] = {}
        """Per place in `_steps` what the desk had to do with it; nothing with most."""
        self._seen_ns: dict[int, int] = {}
        """Per place in `_steps` up to where it was looked, by sessions that look."""
        self._inputs: dict[str, Vector] = {}
        self._causes: dict[str, dict[int, tuple[str, ...]]] = {}
        self._is_new = False
        """Another model goes on, which has seen no input yet."""
        self._serial = self._shift = 0

    @property
    def count(self) -> int:
        """How many steps are done."""
        return self._count

    @property
    def is_saved(self) -> bool:
        """Whether the saved state is that after the last step."""
        return self.saved is not None and self.saved.steps == self._count

    @property
    def unsaved(self) -> int:
        """How many steps would have to be done again."""
        return len(self._steps)

    @property
    def serial(self) -> int:
        """Of the last event that was told of, where it is counted."""
        return self._serial

    @property
    def saved_ns(self) -> int:
        return 0 if self.saved is None else self.saved.time_ns

    def add(self, step: StepInput, result: StepResult) -> None:
        """Take note of a step that is done."""
        self._count += 1
        self.last_ns = step.time_ns
        if self._fills:
            (step,) = self.filled((step,))
            self._is_new = False
            self._inputs.update(step.inputs)
            for name, causes in step.causes.items():
                self._causes.setdefault(name, {}).update(causes)
            for event in result.events:
                self._serial = max(self._serial, int(event.id.rpartition("/")[2]))
        is_after = self.saved is None or self._count > self.saved.steps
        if is_after and self.is_whole:
            if result.desk is not None:
                self._desks[len(self._steps)] = result.desk
            if result.seen_ns is not None:
                self._seen_ns[len(self._steps)] = result.seen_ns
            self._steps.append(step)
            self._marks.append(mark_of(result))

    def arrived(self) -> None:
        """A session is where the member is."""
        self._is_past = False
        if not self._redoes:
            self.is_whole = False
            self._clear()

    def learn(self, present: StepInput, events: int) -> None:
        """Know what the member was given by a step, so that another can be shown it."""
        self._fills = True
        self._inputs.update(present.inputs)
        self._causes.update({name: dict(causes) for name, causes in present.causes.items()})
        self._serial = max(self._serial, events)
        self.last_ns = max(self.last_ns, present.time_ns)

    def save(self, state: bytes) -> Saved:
        """Begin from `state` from now on."""
        self.saved = Saved(self._count, self.last_ns, state)
        self.is_whole = self._redoes
        self._clear()
        return self.saved

    def _clear(self) -> None:
        self._steps.clear()
        self._marks.clear()
        self._desks.clear()
        self._seen_ns.clear()

    def begin_anew(self, start_ns: int = 0) -> None:
        """Another session takes over, without the memory of the one before."""
        if self.saved is not None and self.saved.steps <= self._count:
            self.saved = None
        self.start_ns = start_ns
        self.is_whole = self._redoes or self._is_past
        self._clear()
        self._shift, self._is_new = self._serial, True

    def filled(self, steps: Sequence[StepInput]) -> tuple[StepInput, ...]:
        """The steps; the first that a new session ever sees brings every input."""
        if not self._is_new or not steps:
            return tuple(steps)
        first = steps[0]
        causes = {name: dict(known) for name, known in self._causes.items()}
        for name, news in first.causes.items():
            causes.setdefault(name, {}).update(news)
        inputs = {**self._inputs, **first.inputs}
        return (first._replace(inputs=inputs, causes=causes), *steps[1:])

    def renumbered(self, member: str, result: StepResult) -> StepResult:
        """An answer with the serials of its events after those of the session before."""
        return renumbered(member, result, self._shift)

    def frames(self) -> Iterator[tuple[list[StepInput], list[bytes]]]:
        """The steps since the saved state with the marks of their answers, in frames."""
        for start in range(0, len(self._steps), REPLAY_STEPS):
            end = start + REPLAY_STEPS
            steps = [
                step._replace(
                    desk=self._desks.get(place, NO_DESK), seen_ns=self._seen_ns.get(place)
                )
                for place, step in enumerate(self._steps[start:end], start)
            ]
            yield steps, self._marks[start:end]


def renumbered(member: str, result: StepResult, shift: int) -> StepResult:
    """An answer of a session that goes on for another, which told `shift` events before it."""
    if not shift or not (result.events or result.causes or result.actions):
        return result
    prefix = f"{member}/"

    def new(event: str) -> str:
        serial = _serial(member, event)
        return f"{prefix}{serial + shift}" if serial else event

    return result._replace(
        causes={
            name: {index: new(event) for index, event in entries.items()}
            for name, entries in result.causes.items()
        },
        events=tuple(
            replace(event, id=new(event.id), causes=tuple(map(new, event.causes)))
            for event in result.events
        ),
        actions=tuple(replace(a, cause=new(a.cause)) for a in result.actions),
    )


def _outdone(member: str) -> ScenarioError:
    why = f"{member} was not replaced: somebody else is to, or its part of the run ended first"
    return ScenarioError(Reason.INSTANT_PASSED, why, {"member": member})


def off_the_record(member: str, item: StepResult, step: StepInput) -> TwinError:
    return TwinError(
        Reason.REPLAY_DIFFERS,
        f"{member} has a step at {step.time_ns} ns and had one at {item.time_ns} ns on record: "
        "what it is coupled to answers otherwise than before",
        {"member": member, "time_ns": str(min(step.time_ns, item.time_ns))},
    )


def _serial(member: str, event_id: str) -> int:
    """The serial of an event of a member; 0 when it is none."""
    prefix = f"{member}/"
    digits = event_id.removeprefix(prefix) if event_id.startswith(prefix) else ""
    # a number that reads otherwise than it is written would be another name of the same event
    return int(digits) if digits.isascii() and digits.isdigit() and digits[0] != "0" else 0


_OTHERWISE = (Reason.REPLAY_DIFFERS, Reason.INVALID_FRAME, Reason.UNSUPPORTED)
"""Errors of a city that can't give again what it gave."""

_FINAL = (Reason.REPLAY_DIFFERS, Reason.UNREACHABLE, Reason.UNSUPPORTED)
"""Errors that another attempt would only meet again."""


def _unchanged(steps: Sequence[StepInput]) -> tuple[StepResult, ...]:
    """The answers of a member that publishes nothing any more, so that its values hold."""
    return tuple(StepResult(step.time_ns, step.micro) for step in steps)


def mark_of(result: StepResult) -> bytes:
    """Tells an answer from every other one."""
    message = codec.encode_step_result(result).SerializeToString(deterministic=True)
    return hashlib.blake2b(message, digest_size=16).digest()
