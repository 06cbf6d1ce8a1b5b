"""Plays plans against a guard until enough hostile ones have come, and counts what got through."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature

from federation.control.guard import Guard
from federation.control.rules import load
from federation.control.situation import Mode, Situation, Verdict
from tests.hostile.plans import Author, Plan, keys, public
from tests.hostile.referee import Referee
from tests.hostile.town import DESCRIPTIONS, Town

TOWN = Path(__file__).with_name("town.yaml")
RULES = load(TOWN)


@dataclass
class Suite:
    """One guard before one town. What is hostile and what is safe, the referee says."""

    seed: int = 1
    hostile: int = 0
    safe: int = 0
    breaches: list[str] = field(default_factory=list)
    safe_refused: list[str] = field(default_factory=list)
    switch_ms: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """How often each class of rules was broken, and how often by a plan that broke no other."""
    overtaken: int = 0
    """How many plans were good at their cut and no more when they came."""
    _seen: deque[Situation] = field(default_factory=partial(deque, maxlen=32))

    def __post_init__(self) -> None:
        pairs = keys(self.seed)
        self.known = public(pairs)
        self.town = Town()
        self.guard = Guard(RULES, DESCRIPTIONS, self.verify)
        self.referee = Referee(self.town, self.known)
        self.author = Author(self.town, random.Random(self.seed), pairs)
        self.author.send = self.send
        self.town.changed = self.referee.look
        self.town.watch = self.watch
        self.town.settle = self.guard.settle
        self.town.tell()

    def verify(self, author: str, message: bytes, signature: bytes) -> bool:
        if author not in self.known:
            return False
        try:
            self.known[author].verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def send(self, plan: Plan) -> None:
        """Judge one plan, let go what passed, and compare with what the referee says of it."""
        faults = self.referee.faults(plan.submission, plan.forecast)
        was = self.guard.mode
        started_s = time.perf_counter()
        situation = self.seen()
        at_cut = self.at(plan.submission.bundle.cut_ns)
        verdict = self.guard.judge(plan.submission, situation, plan.forecast, at_cut)
        self.obey(verdict, was, started_s)
        self.overtaken += verdict.is_overtaken
        name = plan.submission.bundle.id
        if faults:
            self.hostile += 1
            self.kinds.update(faults)
            if len(faults) == 1:
                self.kinds.update(f"{fault} alone" for fault in faults)
        else:
            self.safe += 1
            if not verdict.good:
                self.safe_refused.append(f"{name}: {verdict.refusals[0]}")
        if verdict.passed:
            if faults:
                self.breaches.append(f"{name}: {', '.join(sorted(faults))}")
            self.referee.let_go[name] = self.town.now_ns
            self.town.let_go(plan.submission.bundle, plan.delay_ns, plan.works)

    def seen(self) -> Situation:
        """What is so now, which is remembered for a while."""
        situation = self.town.situation()
        self._seen.append(situation)
        return situation

    def at(self, cut_ns: int) -> Situation | None:
        """What was so at a cut, as far as it is remembered."""
        past = [situation for situation in self._seen if situation.time_ns <= cut_ns]
        return replace(past[-1], time_ns=cut_ns) if past else None

    def watch(self) -> None:
        was = self.guard.mode
        started_s = time.perf_counter()
        verdict = self.guard.watch(self.seen())
        if verdict is not None:
            self.obey(verdict, was, started_s)

    def obey(self, verdict: Verdict, was: Mode, started_s: float) -> None:
        """Put the recovery plan in place; from the judgement to there is the time of a switch."""
        self.town.revoke(verdict.revoked)
        if verdict.fallback is not None:
            self.town.let_go(verdict.fallback, 0)
            if was is Mode.LOOP:
                self.switch_ms.append((time.perf_counter() - started_s) * 1000)

    def play(self, hostile: int, safe: int = 0, until_breach: bool = False) -> None:
        """Play attempts of all kinds in turn until so many plans of both sorts have come."""
        turn = 0
        while self.hostile < hostile or self.safe < safe:
            if until_breach and (self.breaches or self.referee.breaches):
                break
            kind = Author.kinds[turn % len(Author.kinds)]
            turn += 1
            self.calm()
            for _ in range(self.author.draw.randrange(3)):
                self.send(self.author.draw.choice((self.author.safe, self.author.brink))())
                self.author.quiet(self.author.draw.uniform(0, 3))
            self.calm()
            kind(self.author)
            self.author.quiet(self.author.draw.uniform(0, 2))
        self.breaches += self.referee.breaches

    def calm(self) -> None:
        """Wait, and send modest plans, until the loop is in charge."""
        while self.guard.mode is Mode.RECOVERY:
            self.author.quiet(self.author.draw.uniform(1, 4))
            self.send(self.author.safe())

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.switch_ms)
        return {
            "hostile": self.hostile,
            "breaches": len(self.breaches),
            "safe": self.safe,
            "safe_refused": len(self.safe_refused),
            "overtaken": self.overtaken,
            "switch_ms_p99": round(ordered[int(0.99 * (len(ordered) - 1))], 3) if ordered else None,
        }
