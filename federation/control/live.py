"""The closed loop over a live federation: a client of its broker and of its twins.

At each decision instant of the run it looks at a consistent cut, tries the measures of the
scenario in futures forked from it, and has the guard judge what the best one would do at once. At
level 3 that is advice, at level 4 a proposal for persons, at level 5 it acts. Then it holds what
came of it against what it had predicted, and how far it may go by itself follows from that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from federation.control import audit
from federation.control.autonomy import Key as Grantee
from federation.control.autonomy import Moved, Solved
from federation.control.consent import Consent
from federation.control.deeds import Deeds
from federation.control.guard import Guard
from federation.control.loop import Decision, Loop
from federation.control.mandate import Keys, Mandate, Terms
from federation.control.merit import Merit
from federation.control.outlook import Outlook
from federation.control.petitions import Petitions
from federation.control.promised import BrokerBook, Promised
from federation.control.proposal import Answer, Told
from federation.control.rules import Rules
from federation.control.stages import LiveStages
from federation.control.turn import Candidate, Known, LiveCut, Made
from federation.control.view import LiveView, Observation, variable_of
from federation.core.waits import instant
from federation.errors import FederationError

WATCH_S = 0.2
"""How often at most the guard looks at what is observed between decisions; wall time."""


@dataclass(frozen=True)
class Turn:
    """What one turn of the loop took, wall time: in all, and of it each stage.

    Of the stage that acts, `watched_s` went by until the twins had done a step of their own under
    what was set: that is the pace of the run. `why` says why there was no decision, if something
    went wrong.
    """

    time_ns: int
    wall_s: float
    stages_s: Mapping[str, float]
    watched_s: float
    why: str
    made: Made | None

    def plain(self) -> dict[str, Any]:
        return {
            "time_ns": self.time_ns,
            "wall_s": self.wall_s,
            "stages_s": dict(self.stages_s),
            "watched_s": self.watched_s,
            "why": self.why,
            "outcome": "" if self.made is None else self.made.outcome,
        }

    def sentence(self) -> str:
        what = self.why or "nothing to decide"
        if self.made is not None:
            what = f"{self.made.chosen}: {self.made.outcome}"
        parts = {**self.stages_s, "of it watching": self.watched_s}
        stages = ", ".join(f"{name} {s:.1f}" for name, s in parts.items() if s >= 0.05)
        return f"{instant(self.time_ns)}: {what}; {self.wall_s:.1f} s ({stages})"


class LiveLoop:
    """One loop over one run, for as long as the context lasts.

    Fails as `LiveView` does, with RULES_INVALID, TRAIL_BROKEN, TRAIL_IN_USE, and SCENARIO_INVALID
    when there is nothing that it could try or weigh.
    """

    def __init__(
        self,
        broker: str,
        run: str,
        terms: Terms,
        keys: Keys,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.terms = terms
        self.keys = keys
        self.view = LiveView(broker, run, keys.guard)
        self.mandate = Mandate(self.view, terms, keys, unix_s)
        self.ladder = self.mandate.ladder
        self.docket = self.mandate.docket
        self.turns: list[Turn] = []
        self._turn = asyncio.Lock()
        """Of what may act at a time there is one."""
        self._stack = AsyncExitStack()

    @property
    def rules(self) -> Rules:
        """Those that it goes by now."""
        return self.mandate.rules

    @property
    def guard(self) -> Guard:
        return self.mandate.guard

    @property
    def decisions(self) -> list[Made]:
        """Those whose end is open, and the last one."""
        return self.mandate.decisions

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.view)
            mandate = self.mandate
            self._outlook = Outlook(mandate)
            stack.enter_context(mandate.on_record())
            self._deeds = Deeds(mandate)
            await stack.enter_async_context(self._deeds.at_work())
            self._consent = Consent(mandate, self._outlook, self._deeds)
            book, foreseen = BrokerBook(self.view), self._outlook.foreseen
            self._promised = Promised(mandate, self._deeds, self.terms.city, book, foreseen)
            self.petitions = Petitions(
                self.view, lambda: mandate.guard, mandate.keys.keyring, mandate.noted
            )
            self._stages = LiveStages(
                mandate,
                self._outlook,
                Merit(mandate, self._outlook),
                self._deeds,
                self._consent,
                asyncio.get_running_loop(),
            )
            self.loop: Loop[Known, Candidate] = Loop(
                self._stages, self.view.scenario.seed, time.perf_counter
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def go(self, told: Callable[[Turn], None] = lambda turn: None) -> None:
        """Decide until the run ends; `told` hears of each turn. A cut that an earlier life of the
        loop has decided about is not decided about again."""
        watching = asyncio.create_task(self._watch())
        decided_ns = max((made.known.cut.time_ns for made in self.decisions), default=-1)
        try:
            while (cut := await self.view.cut(self.terms.every_ns)) is not None:
                if cut.time_ns > decided_ns:
                    await self.decide(cut)
                    told(self.turns[-1])
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def decide(self, cut: Observation) -> Decision | None:
        """One turn of the loop. What goes wrong in it is on record, and the loop goes on."""
        async with self._turn:
            if self.mandate.reload_rules():
                self._outlook.change_rules()
            began_s, before_s = time.perf_counter(), dict(self.loop.spent_s)
            watched_s = self._deeds.watched_s
            await self.view.look_at_clocks({variable_of(name)[0] for name in self.rules.values})
            cut = self.view.timed(cut)
            decision: Decision | None = None
            why = ""
            turning = asyncio.ensure_future(
                asyncio.to_thread(self.loop.turn, LiveCut(cut, self.view))
            )
            try:
                async with asyncio.timeout(self.terms.within_s):
                    decision = await asyncio.shield(turning)
            except TimeoutError:
                why = f"no decision within {self.terms.within_s:g} s"
                self._stages.give_up()
                await asyncio.gather(turning, return_exceptions=True)
            except asyncio.CancelledError:
                self._stages.give_up(even_acts=True)
                await asyncio.gather(turning, return_exceptions=True)
                raise
            except FederationError as error:
                why = str(error)
            for key in self.mandate.grantees():
                self.mandate.climb(Solved(key, in_time=not why))
            if why:
                await self._deeds.be_silent(cut, why)
            stages_s = {name: s - before_s[name] for name, s in self.loop.spent_s.items()}
            made = self.decisions[-1] if decision is not None and self.decisions else None
            turn = Turn(
                cut.time_ns,
                time.perf_counter() - began_s,
                stages_s,
                self._deeds.watched_s - watched_s,
                why,
                made,
            )
            self.turns.append(turn)
            self.mandate.note(audit.Noted("turn", turn.plain(), "" if made is None else made.id))
            self.mandate.save()
            return decision

    async def _watch(self) -> None:
        """Between decisions: refuse what nobody has confirmed in time, see to it that nothing is
        wrong for too long, and that what was promised is done."""
        while not self.view.has_ended:
            await self.view.changed()
            async with self._turn:
                self.pass_time()
                await self._deeds.watch()
                if self.terms.city:
                    await self._promised.keep()
            await asyncio.sleep(WATCH_S)

    # -- persons -------------------------------------------------------------------------------

    async def answer(self, answer: Answer) -> Told:
        """Take a person's yes or no. What is confirmed by all acts before this returns."""
        async with self._turn:
            return await self._consent.answer(answer)

    def pass_time(self) -> None:
        """Refuse what nobody has confirmed in time."""
        self._consent.pass_time()

    def outcome(self, decision: str) -> str:
        """What became of a decision, in a word; empty when it is not known."""
        return self.mandate.outcome(decision)

    def set_level(self, key: Grantee, level: int, person: str, request: str = "") -> Moved:
        """A person sets a level; see `Mandate.set_level`."""
        return self.mandate.set_level(key, level, person, request)
