"""Makes a decision again from its record: the same cut, versions and seed give the same bundle.

Nothing acts, nobody is asked, and no trail is written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from federation.control.audit import is_reproduced
from federation.control.draft import bundle_of
from federation.control.loop import IN_FORCE, Comparison, Decision, Loop, Rating
from federation.control.mandate import Keys, Mandate, Terms
from federation.control.outlook import Outlook
from federation.control.turn import Candidate, Known, LiveCut, Made
from federation.control.view import Desks, Holding, LiveView, Observation
from federation.core.bundle import Bundle, Priority
from federation.errors import Reason, ScenarioError
from federation.wire.credentials import Identity, Keyring


@dataclass(frozen=True)
class Again:
    """What came of it: the bundle, and whether it is the one on record."""

    bundle: Bundle | None
    is_same: bool
    ratings: tuple[Rating, ...]


async def again(broker: str, record: Mapping[str, Any], rules: Path) -> Again:
    """Make a decision again that stands in a trail as `decided`.

    The run must still be at its broker, with the twins in the versions of then. Fails with
    RULES_INVALID, with DESCRIPTION_DIFFERS when twins or rules have another version by now, and as
    `LiveView` and `TryFutures` do.
    """
    basis = record["basis"]
    inputs = basis["inputs"]
    in_force, *measures = inputs["measures"]
    # nobody signs anything here; of the optimiser only the name matters
    author = record["bundle"].get("author", "optimiser")
    keys = Keys(Identity.generate("nobody"), Identity.generate(author), Keyring())
    with TemporaryDirectory() as folder:  # nothing of it is kept
        terms = Terms(
            level=3,
            rules=rules,
            state=Path(folder),
            operator="",
            every_ns=inputs["every_ns"],
            futures=inputs["futures"],
            measures=tuple(measures),
            moves_by=inputs["moves_by"],
        )
        async with LiveView(broker, record["run"], keys.guard) as view:
            view.measure = in_force
            mandate = Mandate(view, terms, keys, time.time)
            outlook = Outlook(mandate)
            _check(basis, mandate)
            cut = await view.at(inputs["cut_ns"])
            known = Known(cut, Desks(_held(inputs["held"])), inputs["until_ns"])
            made = Made(record["decision"], known)
            made.candidates = await outlook.try_all(known)
            stages = _Stages(outlook, made)
            seed = view.scenario.seed
            turn = Loop[Known, Candidate](stages, seed, time.perf_counter).turn
            await asyncio.to_thread(turn, LiveCut(cut, view))
            bundle = bundle_of(
                mandate, made, made.candidates[stages.chosen], outlook.basis_of(known)
            )
        return Again(bundle, is_reproduced(record, bundle), tuple(stages.ratings))


def _check(basis: Mapping[str, Any], mandate: Mandate) -> None:
    now = {
        **LiveCut(Observation(-1, {}), mandate.view).versions,
        "the rules": str(mandate.rules.version),
    }
    then = {**basis["versions"], "the rules": str(basis["rules_version"])}
    for name, version in then.items():
        if now.get(name) != version:
            raise ScenarioError(
                Reason.DESCRIPTION_DIFFERS,
                f"{name} was {version} when it was decided, and is {now.get(name, 'not there')}",
                {"name": name},
            )


def _held(held: Sequence[Sequence[Any]]) -> dict[tuple[str, str, str], Holding]:
    return {
        (member, actuator, entity): Holding(value, Priority(priority), owner, "", until_ns)
        for member, actuator, entity, value, priority, owner, until_ns in held
    }


class _Stages:
    """A turn in which all was tried already, nobody refuses, and nothing acts."""

    def __init__(self, outlook: Outlook, made: Made) -> None:
        self.chosen = IN_FORCE
        self.ratings: list[Rating] = []
        self._outlook = outlook
        self._made = made

    def observe(self, cut: Any) -> Known:
        return self._made.known

    def observed(self, situation: Known) -> float:
        return 0.0

    def occasion(self, situation: Known, drift: Comparison | None) -> str:
        return "made again"

    def until_ns(self, situation: Known) -> int:
        return situation.until_ns

    def forecast(self, situation: Known) -> Rating:
        return self._outlook.rated(self._made.candidates[IN_FORCE], situation)

    def plan(self, situation: Known) -> Mapping[str, Candidate]:
        return {n: c for n, c in self._made.candidates.items() if n != IN_FORCE}

    def verify(
        self, situation: Known, plans: Mapping[str, Candidate], in_force: Rating
    ) -> Sequence[Rating]:
        rated = [self._outlook.rated(plan, situation) for plan in plans.values()]
        self.ratings = [in_force, *rated]
        return self.ratings

    def guard(self, situation: Known, plan: Candidate) -> Sequence[str]:
        return ()

    def act(self, situation: Known, name: str, plan: Candidate | None) -> str:
        self.chosen = name
        return ""

    def binding(self, situation: Known, name: str) -> Sequence[str]:
        return ()

    def record(self, decision: Decision) -> None:
        return None
