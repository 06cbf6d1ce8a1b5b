"""Puts what a live loop would do to persons, and does what they have confirmed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from federation.control.deeds import Deeds
from federation.control.draft import limits_of
from federation.control.loop import IN_FORCE
from federation.control.mandate import Mandate
from federation.control.outlook import Outlook
from federation.control.proposal import (
    Alternative,
    Answer,
    Effect,
    Proposal,
    State,
    Told,
    affected_domains,
    reversal_of,
)
from federation.control.turn import Candidate, Made
from federation.control.view import variable_of


class Consent:
    """What persons are asked, and what they have said."""

    def __init__(self, mandate: Mandate, outlook: Outlook, deeds: Deeds) -> None:
        self._mandate = mandate
        self._outlook = outlook
        self._deeds = deeds

    def propose(self, made: Made, candidate: Candidate) -> str:
        """Put a decision to persons: `proposed`, or `void` when the docket does not take it."""
        mandate = self._mandate
        bundle = made.bundle
        assert bundle is not None
        fed: dict[str, tuple[str, ...]] = {}
        for coupling in mandate.view.scenario.couplings:
            source, target = variable_of(coupling.source)[0], variable_of(coupling.target)[0]
            fed[source] = (*fed.get(source, ()), target)
        domains = affected_domains(bundle, mandate.view.descriptions, fed)
        effects: dict[str, tuple[Effect, ...]] = dict.fromkeys(domains, ())
        idle = made.candidates[IN_FORCE].trials
        for variable in self._outlook.weights:
            member, output = variable
            description = mandate.view.descriptions[member]
            unit = next(v.unit for v in description.outputs() if v.name == output)
            ends = [trial.at(variable, made.known.until_ns) for trial in candidate.trials]
            low, high = np.quantile(ends, [0.05, 0.95])
            without = float(np.mean([t.at(variable, made.known.until_ns) for t in idle]))
            effect = Effect(
                ".".join(variable), unit, without, float(low), float(np.mean(ends)), float(high)
            )
            if description.domain in effects:
                effects[description.domain] = (*effects[description.domain], effect)
        autonomy = mandate.rules.autonomy
        assert autonomy is not None
        made_s = mandate.unix_s()
        proposal = Proposal(
            id=made.id,
            operator=mandate.terms.operator,
            bundle=bundle,
            rules_version=mandate.rules.version,
            effects=effects,
            alternatives=self._alternatives(made),
            limits=limits_of(mandate, made),
            reversal=reversal_of(bundle, mandate.view.descriptions),
            made_unix_s=made_s,
            expires_unix_s=made_s + 60.0 * autonomy.proposal_min,
        )
        told = mandate.docket.propose(proposal)
        mandate.told((told,))
        return "proposed" if told.state is State.OPEN else "void"

    def _alternatives(self, made: Made) -> tuple[Alternative, ...]:
        mine = next(r for r in made.ratings if r.name == made.chosen)
        return tuple(
            Alternative(r.name, r.mean - mine.mean) for r in made.ratings if r.name != made.chosen
        )

    async def answer(self, answer: Answer) -> Told:
        """Take a person's yes or no. What is confirmed by all acts before this returns."""
        mandate = self._mandate
        told = mandate.docket.answer(answer, mandate.unix_s())
        mandate.told((told,))
        if told.counts and told.state is State.CONFIRMED:
            await self._act_on(answer.proposal)
            told = replace(
                told,
                state=mandate.docket.states[answer.proposal],
                sentence=mandate.outcome(answer.proposal),
            )
        mandate.save()
        return told

    async def _act_on(self, proposal: str) -> None:
        """Act on what persons have confirmed, if it is still what they confirmed."""
        mandate = self._mandate
        # another life of the loop may have been who looked at them last
        await mandate.view.look_at_clocks({variable_of(name)[0] for name in mandate.rules.values})
        now = mandate.view.now()
        situation = mandate.view.situation(now, await mandate.view.desks())

        def value_of(member: str, variable: str, entity: str) -> float | None:
            return mandate.monitor.entity(situation, f"{member}.{variable}", entity)[0]

        made = mandate.made(proposal)
        bundle, told = mandate.docket.take(proposal, value_of, mandate.unix_s(), now.time_ns)
        mandate.told((told,))
        if bundle is None or made is None:
            return
        candidate = made.candidates[made.chosen]
        mandate.save()  # what is taken is not taken again by another life of the loop
        submission = mandate.submitted(bundle)
        forecast = self._outlook.forecast_of(bundle, candidate, made.known.until_ns)
        # a person stands by: the switch to the recovery plan is for a loop that acts alone
        verdict = mandate.looked_at(submission, situation, forecast)
        if verdict.passed:
            verdict = mandate.guard.judge(submission, situation, forecast)
        mandate.judged(proposal, verdict)
        made.outcome = (
            await self._deeds.carry_out(proposal, bundle) if verdict.passed else "refused"
        )
        made.is_shadow = made.outcome != "committed"

    def pass_time(self) -> None:
        """Refuse what nobody has confirmed in time."""
        mandate = self._mandate
        mandate.told(mandate.docket.pass_time(mandate.unix_s()))
