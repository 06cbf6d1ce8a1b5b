"""Judges every bundle by the owners' rules before it may reach a twin, and puts the recovery plan
in the place of the loop when it must: run-time assurance after ASTM F3269.

The guard believes nobody who proposes. It reads the situation, remembers what it let pass, and
takes of all that may come to be in force the worst: each value that a priority array holds, what
has passed and may yet take effect, and the safe default to which every lease may fall. So two
bundles that are each within the limits and together are not can't both pass. It has no clock, no
randomness and no key: time comes with the situation, signatures are checked by who has the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from federation.control.limits import Limits, Memory, Verify
from federation.control.rules import Rules
from federation.control.situation import (
    STAYS,
    Forecast,
    Mode,
    Refusal,
    Situation,
    Submission,
    Verdict,
)
from federation.core.bundle import Bundle, Priority, Setpoint
from federation.twin import MINUTE_NS, Description


class Guard:
    """Says of each bundle whether it may act, and what acts instead.

    Whoever issues a bundle that passed, or a fallback, tells with `settle` what became of it, and
    shows the next situation only then. Fails with RULES_INVALID when the rules do not fit the
    twins, or their recovery plan does not fit the rules.
    """

    def __init__(
        self,
        rules: Rules,
        descriptions: Mapping[str, Description],
        verify: Verify,
        name: str = "guard",
    ) -> None:
        self.name = name
        self.mode = Mode.LOOP
        self._descriptions = descriptions
        self._verify = verify
        self._limits = Limits(rules, descriptions, verify)
        self._memory = Memory()
        self._last_good_ns = -1
        self._good_in_row = 0
        self._issued = 0

    @property
    def rules(self) -> Rules:
        """The rules that are in force."""
        return self._limits.rules

    def judge(
        self,
        submission: Submission,
        situation: Situation,
        forecast: Forecast | None = None,
        at_cut: Situation | None = None,
    ) -> Verdict:
        """Judge one decision. What can't even be judged is refused.

        `at_cut` is what was so at the cut that it was made on, as the same tell it who tell of
        the `situation`; without it every refusal is a fault.
        """
        breaches = self._observe(situation)
        refusals: tuple[Refusal, ...]
        try:
            case = self._limits.case(submission, situation, forecast, self._memory)
            refusals = tuple(self._limits.judge(case))
        except Exception as error:  # hostile input may break any assumption: that is a no
            text = f"can't be judged: {type(error).__name__}: {error}"
            refusals = (Refusal("form", text),)
        good = not refusals
        self._good_in_row = self._good_in_row + 1 if good and not breaches else 0
        if not good and not breaches and self._was_good(submission, forecast, at_cut):
            is_late = any(refusal.rule == "freshness" for refusal in refusals)
            if self.mode is Mode.LOOP and (not is_late or self._stands(situation)):
                return Verdict(self.mode, good, False, refusals, is_overtaken=True)
            if not is_late:
                return replace(self._recover(situation, good, refusals), is_overtaken=True)
        if not good or breaches:
            return self._recover(situation, good, (*refusals, *breaches))
        needed = self.rules.recovery.returns_after
        if self.mode is Mode.RECOVERY and self._good_in_row < needed:
            text = f"{self._good_in_row} of {needed} good decisions since the switch"
            return self._recover(situation, True, (Refusal(STAYS, text),))
        self.mode = Mode.LOOP
        self._last_good_ns = situation.time_ns
        self._memory.note(case.bundle, case.changes)
        return Verdict(self.mode, good=True, passed=True)

    def admit(
        self, bundle: Bundle, situation: Situation, forecast: Forecast | None = None
    ) -> tuple[Refusal, ...]:
        """Judge what a neighbour's guard asks for, or what was promised to one; it passes when
        there is nothing to refuse.

        Whose it is has been checked before, and no rules of ours bound who made it; else it is held
        to all limits that a decision of the loop is held to, after whatever either was let do. What
        is refused says nothing of the loop, so nothing is switched. While the recovery plan is in
        force nothing passes.
        """
        breaches = self._observe(situation)
        if breaches or self.mode is Mode.RECOVERY:
            return (*breaches, Refusal("recovery", "the recovery plan is, or will be, in force"))
        try:
            submission = Submission(bundle, self.rules.version)
            case = self._limits.case(submission, situation, forecast, self._memory)
            refusals = tuple(self._limits.judge(case, but=("authority",)))
        except Exception as error:  # as above
            text = f"can't be judged: {type(error).__name__}: {error}"
            return (Refusal("form", text),)
        if bundle.priority != Priority.AUTONOMOUS:
            refusals = (Refusal("authority", f"a neighbour has no priority {bundle.priority!r}"),)
        if not refusals:
            self._memory.note(bundle, case.changes)
        return refusals

    def silence(self, situation: Situation, why: str) -> Verdict:
        """No decision came in time: the last one that passed stands for a while, if it may."""
        breaches = self._observe(situation)
        refusal = Refusal("silence", why)
        self._good_in_row = 0
        if self.mode is Mode.LOOP and self._stands(situation) and not breaches:
            return Verdict(self.mode, good=False, passed=False, refusals=(refusal,))
        return self._recover(situation, False, (refusal, *breaches))

    def watch(self, situation: Situation) -> Verdict | None:
        """Look at what is observed; the switch to the recovery plan, or None when all is well."""
        breaches = self._observe(situation)
        if not breaches:
            return None
        self._good_in_row = 0
        return self._recover(situation, False, breaches)

    def settle(self, bundle: str, effect_ns: int | None) -> None:
        """Note that what was let go took effect at that instant, or with None that it never will.

        Until it is told, the guard reckons with both.
        """
        self._memory.settle(bundle, effect_ns)

    def forget(self, bundle: str) -> None:
        """Note that a bundle was undone: that it never took effect, unless it is known that it did
        before. Until `settle` or this is told, it is reckoned with."""
        if bundle in self._memory.open:
            self._memory.settle(bundle, None)

    def change_rules(self, rules: Rules) -> None:
        """Judge by these from now on; what was decided under others is refused.

        What has been wrong for long goes on to be. Fails with RULES_INVALID, and changes nothing,
        when they do not fit or are not newer.
        """
        if rules.version <= self.rules.version:
            raise rules.error(("version",), f"version {self.rules.version} is already in force")
        limits = Limits(rules, self._descriptions, self._verify)
        limits.monitor.right_ns |= self._limits.monitor.right_ns
        self._limits = limits

    def snapshot(self) -> dict[str, Any]:
        """All that it remembers, as plain data; the rules are not part of it."""
        return {
            "mode": self.mode.value,
            "memory": self._memory.snapshot(),
            "right_ns": [[*key, at_ns] for key, at_ns in self._limits.monitor.right_ns.items()],
            "last_good_ns": self._last_good_ns,
            "good_in_row": self._good_in_row,
            "issued": self._issued,
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.mode = Mode(plain["mode"])
        self._memory = Memory.restored(plain["memory"])
        right_ns = {(name, row): at_ns for name, row, at_ns in plain["right_ns"]}
        self._limits.monitor.right_ns = right_ns
        self._last_good_ns = plain["last_good_ns"]
        self._good_in_row = plain["good_in_row"]
        self._issued = plain["issued"]

    def _observe(self, situation: Situation) -> tuple[Refusal, ...]:
        rules = self.rules
        self._memory.move_to(situation.time_ns, rules.longest_ns, rules.longest_lease_ns)
        return self._limits.monitor.observe(situation)

    def _stands(self, situation: Situation) -> bool:
        """Whether the last decision that passed may stand for want of another."""
        grace_ns = round(self.rules.recovery.grace_min * MINUTE_NS)
        return self._last_good_ns >= 0 and situation.time_ns - self._last_good_ns <= grace_ns

    def _was_good(
        self, submission: Submission, forecast: Forecast | None, at_cut: Situation | None
    ) -> bool:
        """Whether a decision breaks nothing as things stood at its cut, with all that has passed
        by now."""
        if at_cut is None or at_cut.time_ns != submission.bundle.cut_ns:
            return False
        memory = replace(self._memory, now_ns=at_cut.time_ns)
        try:
            return not self._limits.judge(self._limits.case(submission, at_cut, forecast, memory))
        except Exception:  # as above
            return False

    def _recover(self, situation: Situation, good: bool, refusals: tuple[Refusal, ...]) -> Verdict:
        """Switch to the recovery plan, or renew it; what passed before must not begin any more."""
        self.mode = Mode.RECOVERY
        now_ns, recovery = self._memory.now_ns, self.rules.recovery
        revoked = tuple(id_ for id_, b in self._memory.open.items() if b.expires_ns > now_ns)
        plan = self._limits.recovery(situation, self._memory)
        if not plan:
            return Verdict(self.mode, good, False, refusals, None, revoked)
        self._issued += 1
        lease_ns = round(recovery.lease_min * MINUTE_NS)
        fallback = Bundle(
            id=f"{self.name}-{recovery.name}-{self.rules.version}-{now_ns}-{self._issued}",
            run=situation.run,
            setpoints=tuple(Setpoint(*place, plan[place], lease_ns) for place in sorted(plan)),
            priority=Priority.AUTONOMOUS,
            cut_ns=now_ns,
            expires_ns=now_ns + round(self.rules.life_min * MINUTE_NS),
            author=self.name,
            basis=recovery.name,
        )
        self._memory.open[fallback.id] = fallback
        return Verdict(self.mode, good, False, refusals, fallback, revoked)
