"""Confirms or refuses a city's own part of a promise of aid, by the rules that its owners have set.

A good without a rule may not be promised at all. Where giving or taking it sets an actuator, what
would be set while the promise holds is held to that actuator's rules as well: its range, and the
sums and exclusions that it is in. What then acts is judged once more, when it acts
(`federation.control.promised`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from federation.control.limits import Limits, Memory
from federation.control.rules import AidRule, Rules
from federation.control.situation import Refusal, Situation, Submission
from federation.core.aid import SLACK, Terms
from federation.core.bundle import Bundle, Priority, Setpoint
from federation.twin import HOUR_NS, Description

_CHECKS = ("granted", "range", "sums", "exclusions")
"""The limits on what may be in force; those on how it changes are for when it does."""


class PledgeGuard:
    """Judges promises by one version of the rules.

    `describe` says what the members of the city are, and `situate` what is so in its run; both are
    asked only where a promise sets an actuator. Without a situation all else is at its safe
    default.
    """

    def __init__(
        self,
        rules: Rules,
        describe: Callable[[], Mapping[str, Description]],
        situate: Callable[[], Situation] = lambda: Situation("", 0),
    ) -> None:
        self._rules, self._describe, self._situate = rules, describe, situate
        self._limits: Limits | None = None

    def judge(
        self, terms: Terms, gives: bool, besides: Sequence[float]
    ) -> Sequence[tuple[str, str]]:
        """The rules that it breaks for the city to give this, or take it, each with a sentence.

        `besides[p]` is what it gives of it to others in period p, or takes. Fails with
        RULES_INVALID when the rules do not fit the city's members.
        """
        name, rule = f"aid:{terms.good}", self._rules.aid.get(terms.good)
        if rule is None:
            return (Refusal(name, f"{terms.good} has no rule, and is nothing to promise"),)
        found = list(self._of_promise(name, rule, terms, gives, besides))
        sets = rule.sets if gives else rule.takes_set
        if sets and not found:
            sign = rule.gives_sign if gives else 1
            found += self._of_actuator(sets, rule.entity, sign, terms, besides)
        return found

    def _of_promise(
        self, name: str, rule: AidRule, terms: Terms, gives: bool, besides: Sequence[float]
    ) -> Iterator[Refusal]:
        other = terms.taker if gives else terms.giver
        if other not in rule.cities:
            yield Refusal(name, f"{other} is none of the cities that it may be shared with")
        most = rule.gives_at_most if gives else rule.takes_at_most
        peak = max(q + b for q, b in zip(terms.quantity, besides, strict=True))
        if not peak <= most + SLACK * most:
            way = "given" if gives else "taken"
            yield Refusal(name, f"{peak:g} {terms.unit} would be {way} at once; at most {most:g}")
        hours = sum(terms.periods_ns) / HOUR_NS
        if hours > rule.for_at_most_h:
            yield Refusal(name, f"it is for {hours:g} h; at most {rule.for_at_most_h:g}")
        usd = terms.pay_usd(terms.quantity)
        if not gives and not usd <= rule.usd_at_most:
            yield Refusal(name, f"it may cost {usd:g} USD; at most {rule.usd_at_most:g}")

    def _of_actuator(
        self, sets: str, entity: str, sign: int, terms: Terms, besides: Sequence[float]
    ) -> Iterator[Refusal]:
        if self._limits is None:
            self._limits = Limits(self._rules, self._describe(), lambda *signed: False)
        member, _, actuator = sets.partition(".")
        situation, limits = self._situate(), self._limits
        values = {sign * (q + b) for q, b in zip(terms.quantity, besides, strict=True) if q}
        for value in sorted(values):
            bundle = Bundle(
                terms.id,
                situation.run,
                (Setpoint(member, actuator, entity, value),),
                Priority.AUTONOMOUS,
                situation.time_ns,
                situation.time_ns,
                terms.giver,
            )
            submission = Submission(bundle, self._rules.version)
            case = limits.case(submission, situation, None, Memory())
            for check in _CHECKS:
                yield from Limits.checks[check](limits, case)
