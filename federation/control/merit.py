"""Holds a live loop to what came of its decisions: how far it may go by itself follows from it."""

from __future__ import annotations

import asyncio

import numpy as np

from federation.control import audit
from federation.control.autonomy import Compared, Scored, Unusable
from federation.control.loop import IN_FORCE
from federation.control.mandate import Mandate
from federation.control.outlook import Outlook
from federation.control.turn import Known
from federation.errors import FederationError


class Merit:
    """Compares and scores the decisions of one loop."""

    def __init__(self, mandate: Mandate, outlook: Outlook) -> None:
        self._mandate = mandate
        self._outlook = outlook

    async def compare(self, known: Known) -> None:
        """See whether what is known can be acted on, and hold the last decision to what came of
        it."""
        mandate = self._mandate
        last = mandate.decisions[-1] if mandate.decisions else None
        situation = mandate.view.situation(known.cut, known.desks)
        for key in mandate.grantees():
            for variable in mandate.needs(key):
                if mandate.monitor.value(situation, variable)[0] is None:
                    mandate.climb(Unusable(key, variable))
        if last is None or not last.ratings or known.cut.time_ns > last.known.until_ns:
            return  # nothing was predicted of now
        if last.outcome == "recovery":
            return  # nobody has foreseen what comes of the recovery plan
        then, now_ns = last.known.cut, known.cut.time_ns
        grew = self._outlook.weighted(known.cut) - self._outlook.weighted(then)
        was_done = last.chosen if last.outcome in ("committed", "nothing") else IN_FORCE
        foreseen = [
            t.growth(self._outlook.weights, now_ns) for t in last.candidates[was_done].trials
        ]
        predicted = float(np.mean(foreseen))
        spread = float(np.std(foreseen, ddof=1)) if len(foreseen) > 1 else 0.0
        sd = max(spread, 0.05 * abs(predicted), 1e-9)
        mandate.note(audit.Observed(last.id, now_ns, {"weighted": predicted}, {"weighted": grew}))
        for key in mandate.grantees():
            mandate.climb(Compared(key, predicted, grew, sd))

    async def score(self, now_ns: int) -> None:
        """Score the decisions that nobody followed and whose time has passed: what they would have
        cost, in forks of what has been, beside what was done instead."""
        mandate = self._mandate
        due = [
            made for made in mandate.decisions if made.is_shadow and made.known.until_ns <= now_ns
        ]
        for made in due:
            made.is_shadow = False
            assert made.bundle is not None
            keys = [
                k
                for k in mandate.ladder.keys(made.bundle, mandate.terms.operator)
                if k in mandate.grantees()
            ]
            if not any(mandate.ladder.standings[key].earned < 5 for key in keys):
                continue
            then, until_ns = made.known.cut, made.known.until_ns
            others = [r.name for r in made.ratings if r.name not in (IN_FORCE, made.chosen)]
            attempts = [(name, None) for name in (made.chosen, *others[:1])]
            lived, trials = await asyncio.gather(
                self._outlook.trials.lived(then, until_ns),
                self._outlook.trials.run_all(then, attempts, until_ns),
            )
            growths = []
            for trial in trials:
                if isinstance(trial, FederationError):
                    raise trial
                growths.append(trial.growth(self._outlook.weights, until_ns))
            cost, *rest = growths
            alternative = rest[0] if rest else None
            grew = lived.growth(self._outlook.weights, until_ns)
            verdict = made.verdict
            is_good = verdict is not None and (verdict.good or verdict.is_overtaken)
            for key in keys:
                mandate.climb(Scored(key, made.id, cost, grew, alternative, is_good))
