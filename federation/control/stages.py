"""The stages of the loop over a live run, which a turn goes through."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from federation.control import audit
from federation.control.actuation import Stage
from federation.control.consent import Consent
from federation.control.deeds import Deeds
from federation.control.draft import bundle_of, limits_of
from federation.control.loop import IN_FORCE, Comparison, Decision, Rating
from federation.control.mandate import Mandate
from federation.control.merit import Merit
from federation.control.outlook import Outlook
from federation.control.situation import Mode, Verdict
from federation.control.turn import Candidate, Known, Made
from federation.control.view import Observation
from federation.core.bundle import Bundle

_T = TypeVar("_T")

LOOKS = 3
"""How often twins that do not say what they hold are asked, before a decision does without."""


class LiveStages:
    """For a turn in a thread of its own: what waits for others is done in the event loop."""

    def __init__(
        self,
        mandate: Mandate,
        outlook: Outlook,
        merit: Merit,
        deeds: Deeds,
        consent: Consent,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._mandate = mandate
        self._outlook = outlook
        self._merit = merit
        self._deeds = deeds
        self._consent = consent
        self._loop = loop
        self._waits: asyncio.Task[Any] | None = None
        self._acts = self._is_given_up = False

    def give_up(self, *, even_acts: bool = False) -> None:
        """End what the turn waits for, unless it acts already; in the event loop."""
        if even_acts or not self._acts:
            self._is_given_up = True
            if self._waits is not None:
                self._waits.cancel()

    def observe(self, cut: Any) -> Known:
        self._acts = self._is_given_up = False
        known = self._wait(self._look(cut.observation))
        # another loop over the run has its own
        self._made = Made(f"{self._mandate.keys.optimiser.name}-{cut.time_ns}", known)
        return known

    def observed(self, situation: Known) -> float:
        return self._outlook.weighted(situation.cut)

    def occasion(self, situation: Known, drift: Comparison | None) -> str:
        self._wait(self._merit.compare(situation))
        self._wait(self._merit.score(situation.cut.time_ns))
        return "" if situation.until_ns <= situation.cut.time_ns else "time to decide"

    def until_ns(self, situation: Known) -> int:
        return situation.until_ns

    def forecast(self, situation: Known) -> Rating:
        # all is tried at once: the twins take turns, and the broker between them
        self._made.candidates = self._wait(self._outlook.try_all(situation))
        return self._outlook.rated(self._made.candidates[IN_FORCE], situation)

    def plan(self, situation: Known) -> Mapping[str, Candidate]:
        return {n: c for n, c in self._made.candidates.items() if n != IN_FORCE}

    def verify(
        self, situation: Known, plans: Mapping[str, Candidate], in_force: Rating
    ) -> Sequence[Rating]:
        ratings = [in_force, *(self._outlook.rated(plan, situation) for plan in plans.values())]
        self._made.ratings = tuple(ratings)
        return ratings

    def guard(self, situation: Known, plan: Candidate) -> Sequence[str]:
        made = self._made
        if made.verdict is not None:
            return ("the guard has judged this decision already",)
        bundle = self._bundle(plan)
        if bundle is None:
            return ()
        verdict = self._judge(bundle, plan)
        made.verdict, made.bundle, made.chosen = verdict, bundle, plan.name
        return tuple(f"{r.rule}: {r.sentence}" for r in verdict.refusals)

    def act(self, situation: Known, name: str, plan: Candidate | None) -> str:
        made = self._made
        if made.verdict is None:  # nothing was judged: what is in force goes on
            made.chosen = name
            candidate = made.candidates[name]
            made.bundle = self._bundle(candidate)
            if made.bundle is not None:
                made.verdict = self._judge(made.bundle, candidate)
        self._mandate.decisions.append(made)
        self._acts = True
        return self._wait(self._follow(made, made.candidates[made.chosen]))

    def binding(self, situation: Known, name: str) -> Sequence[str]:
        return limits_of(self._mandate, self._made)

    def record(self, decision: Decision) -> None:
        return None

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        async def noted() -> _T:
            self._waits = asyncio.current_task()
            try:
                if self._is_given_up:
                    work.close()
                    raise asyncio.CancelledError
                return await work
            finally:
                self._waits = None

        return asyncio.run_coroutine_threadsafe(noted(), self._loop).result()

    async def _look(self, cut: Observation) -> Known:
        view = self._mandate.view
        desks = await view.desks()
        for _ in range(LOOKS - 1):
            if not desks.silent:
                break
            desks = await view.desks()
        until_ns = min(cut.time_ns + self._mandate.terms.ahead_ns, view.scenario.horizon_ns)
        return Known(cut, desks, until_ns)

    def _bundle(self, candidate: Candidate) -> Bundle | None:
        basis = self._outlook.basis_of(self._made.known)
        return bundle_of(self._mandate, self._made, candidate, basis)

    def _judge(self, bundle: Bundle, candidate: Candidate) -> Verdict:
        return self._wait(self._judged(bundle, candidate, self._made.known))

    async def _judged(self, bundle: Bundle, candidate: Candidate, known: Known) -> Verdict:
        forecast = self._outlook.forecast_of(bundle, candidate, known.until_ns)
        return await self._deeds.judge(bundle, forecast, known)

    async def _follow(self, made: Made, candidate: Candidate) -> str:
        """Do what the level allows with what was decided, after it is on record."""
        mandate = self._mandate
        bundle, verdict = made.bundle, made.verdict
        mandate.note(self._decided(made))
        if verdict is not None:
            mandate.judged(made.id, verdict)
        mandate.save()  # who takes up what is done now must know what it was for
        if bundle is None:
            made.outcome = "nothing"
            return ""
        level = mandate.level_of(bundle)
        if verdict is not None and not verdict.passed:
            made.outcome = "overtaken" if verdict.is_overtaken else "refused"
            if verdict.mode is Mode.RECOVERY and level == 5:
                made.outcome = "recovery"
                await self._deeds.fall_back(made.id, verdict)
            elif level == 5:
                await self._go_on(made)
        elif level == 5:
            made.outcome = await self._deeds.carry_out(made.id, bundle)
            if made.outcome != Stage.COMMITTED.value:
                await self._go_on(made)
        elif level == 4:
            made.outcome = self._consent.propose(made, candidate)
        else:
            made.outcome = "advised"
        made.is_shadow = made.outcome != "committed" and made.chosen != IN_FORCE
        mandate.save()
        return bundle.digest()

    async def _go_on(self, made: Made) -> None:
        """Keep from lapsing what is in force by now, as nothing takes its place: on record under
        the bundle that does so, since it is not what was decided."""
        mandate, candidate = self._mandate, made.candidates[IN_FORCE]
        known = replace(made.known, desks=await mandate.view.desks())
        basis = self._outlook.basis_of(known)
        bundle = bundle_of(mandate, replace(made, known=known), candidate, basis)
        if made.chosen == IN_FORCE or bundle is None or mandate.level_of(bundle) < 5:
            return
        verdict = await self._judged(bundle, candidate, known)
        mandate.judged(bundle.id, verdict)
        if verdict.passed:
            await self._deeds.carry_out(bundle.id, bundle)
        elif verdict.mode is Mode.RECOVERY:
            made.outcome = "recovery"
            await self._deeds.fall_back(bundle.id, verdict)

    def _decided(self, made: Made) -> audit.Decided:
        mandate = self._mandate
        mine = next(r for r in made.ratings if r.name == made.chosen)
        return audit.decided(
            made.id,
            mandate.view.run,
            made.known.cut.time_ns,
            self._outlook.basis_of(made.known),
            made.bundle,
            limits=limits_of(mandate, made),
            alternatives=tuple(
                {"plan": r.name, "weighted": list(r.weighted)}
                for r in made.ratings
                if r.name != made.chosen
            ),
            predicted={"weighted": mine.mean, "deviation": mine.deviation, **mine.figures},
            level=3 if made.bundle is None else mandate.level_of(made.bundle),
        )
