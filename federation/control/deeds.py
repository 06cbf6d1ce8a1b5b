"""Does what a live loop may do, once the guard has judged it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from federation.control import actuation, audit
from federation.control.actuation import Ended, FileJournal, Journal, Stage, Task
from federation.control.autonomy import Breached
from federation.control.mandate import Mandate
from federation.control.petitions import give_way
from federation.control.proposal import State
from federation.control.situation import Forecast, Mode, Verdict
from federation.control.turn import Known
from federation.control.view import Observation
from federation.core.bundle import Bundle


class _Stopwatch:
    """A journal that also keeps how long bundles have been in each stage, wall time."""

    def __init__(self, journal: Journal) -> None:
        self.spent_s: dict[Stage, float] = {}
        self._journal = journal
        self._since_s = 0.0
        self._stage = Stage.SELECTING

    def append(self, record: Mapping[str, Any]) -> None:
        self._journal.append(record)
        now_s, stage = time.perf_counter(), Stage(record["stage"])
        if stage is not Stage.SELECTING:
            spent_s = self.spent_s.get(self._stage, 0.0)
            self.spent_s[self._stage] = spent_s + now_s - self._since_s
        self._since_s, self._stage = now_s, stage


class Deeds:
    """What one loop does. Its journal is open as long as the context of `at_work` lasts."""

    def __init__(self, mandate: Mandate) -> None:
        self.watched_s = 0.0
        """How long it has waited, in all, for twins to do a step under what was set: they do it
        when the run comes to it, and not sooner for any haste of the loop."""
        self._mandate = mandate
        self._journal: FileJournal

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Bring to an end what an earlier life of the loop had begun, and be ready for more."""
        terms = self._mandate.terms
        self._journal = FileJournal(terms.state / "intents.jsonl")
        try:
            for bundle, ended in await actuation.take_up(
                self._journal, self._mandate.keys.guard, within_s=terms.stage_within_s
            ):
                self._take_up(bundle, ended)
            self._give_up()
            self._mandate.save()
            yield
        finally:
            self._journal.close()

    def _take_up(self, bundle: Bundle, ended: Ended) -> None:
        """Know how something ended that an earlier life of the loop had begun."""
        mandate = self._mandate
        made = mandate.made_of(bundle.id)
        self._acted(bundle, ended, "ended after a restart", "" if made is None else made.id)
        if made is not None:
            made.outcome = ended.stage.value
            made.is_shadow = ended.stage is not Stage.COMMITTED
            if made.id in mandate.docket.states:
                mandate.docket.states[made.id] = State.TAKEN

    def _give_up(self) -> None:
        """What persons had confirmed, and nobody began before the loop ended, is not done."""
        mandate = self._mandate
        for made in mandate.decisions:
            is_taken = mandate.docket.states.get(made.id) is State.TAKEN
            if is_taken and made.outcome == "proposed":
                made.outcome = Stage.COMPENSATED.value
                why = "the loop ended before it was begun"
                now_ns = mandate.view.settled_ns
                mandate.note(audit.Acted(made.id, made.outcome, now_ns, why))

    async def judge(self, bundle: Bundle, forecast: Forecast, known: Known) -> Verdict:
        """What the guard says of a bundle as things stand now, after what was known at its cut;
        below level 5 it only looks."""
        mandate = self._mandate
        submission = mandate.submitted(bundle)
        # that a twin says nothing is no fault of who proposes
        at_cut = replace(mandate.view.situation(known.cut, known.desks), silent=())
        situation = await mandate.situation()
        if mandate.level_of(bundle) < 5:
            return mandate.looked_at(submission, situation, forecast, at_cut)
        return mandate.guard.judge(submission, situation, forecast, at_cut)

    async def carry_out(self, decision: str, bundle: Bundle) -> str:
        """Bring a bundle that passed into force; how it ended."""
        desks = await self._mandate.view.desks()
        members = {*bundle.members(), *(c.member for c in bundle.conditions)}
        missing = sorted(members - desks.seats.keys())
        if missing:
            self._mandate.guard.settle(bundle.id, None)
            why = desks.silent.get(missing[0], f"{missing[0]} has no desk")
            now_ns = self._mandate.view.settled_ns
            self._mandate.note(audit.Acted(decision, "compensated", now_ns, why))
            return "compensated"
        task = Task(bundle, desks.seats, self._mandate.terms.window_ns)
        journal = _Stopwatch(self._journal)
        ended = await actuation.carry_out(
            task,
            self._mandate.keys.guard,
            journal,
            within_s=self._mandate.terms.stage_within_s,
        )
        self.watched_s += journal.spent_s.get(Stage.WATCHING, 0.0)
        self._acted(bundle, ended, "", decision)
        return ended.stage.value

    def _acted(self, bundle: Bundle, ended: Ended, detail: str, decision: str = "") -> None:
        in_force = ended.stage is Stage.COMMITTED
        now_ns = self._mandate.view.settled_ns
        self._mandate.guard.settle(bundle.id, now_ns if in_force else None)
        told = "; ".join(part for part in (detail, ended.why, *ended.unreached) if part)
        self._mandate.note(audit.Acted(decision or bundle.id, ended.stage.value, now_ns, told))

    async def fall_back(self, decision: str, verdict: Verdict) -> None:
        """Put the recovery plan in the place of the loop; who is at fault loses autonomy."""
        for key in self._mandate.grantees():
            for refusal in verdict.faults:
                self._mandate.climb(Breached(key, refusal.rule))
        if verdict.fallback is None:
            return
        if given_way := await give_way(self._mandate.view):
            detail = {"bundles": list(given_way)}
            self._mandate.note(audit.Noted("neighbours give way", detail, decision))
        # what the loop holds passes to its recovery plan, and back
        await self.carry_out(
            decision, replace(verdict.fallback, author=self._mandate.keys.optimiser.name)
        )

    async def be_silent(self, cut: Observation, why: str) -> None:
        """No decision came; the guard says what stands meanwhile."""
        self._mandate.note(audit.Noted("no decision", {"why": why, "time_ns": cut.time_ns}))
        if not self._mandate.may_act():
            return
        situation = await self._mandate.situation()
        verdict = self._mandate.guard.silence(situation, why)
        self._mandate.judged(f"silence-{cut.time_ns}", verdict)
        if verdict.fallback is not None:
            await self.fall_back(f"silence-{cut.time_ns}", verdict)

    async def watch(self) -> None:
        """Switch to the recovery plan when something is wrong for too long."""
        mandate = self._mandate
        if not mandate.may_act():
            return
        situation = await mandate.situation()
        was = mandate.guard.mode
        verdict = mandate.guard.watch(situation)
        if verdict is not None and was is Mode.LOOP:
            id_ = f"watch-{situation.time_ns}"
            mandate.note(audit.Noted("switched", {"to": "recovery"}, id_))
            mandate.judged(id_, verdict)
            await self.fall_back(id_, verdict)
            mandate.save()
