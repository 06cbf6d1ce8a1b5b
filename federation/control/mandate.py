"""What a live loop goes by, on record: its terms, the owners' rules, how far it may go itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from federation.control import actuation, audit
from federation.control.autonomy import Event as LadderEvent
from federation.control.autonomy import Key as Grantee
from federation.control.autonomy import Ladder, Moved, Set
from federation.control.guard import Guard
from federation.control.monitor import Monitor
from federation.control.proposal import Docket, State, Told
from federation.control.rules import Rules, load
from federation.control.shelf import Shelf
from federation.control.situation import Forecast, Situation, Submission, Verdict
from federation.control.turn import Made
from federation.control.view import LiveView, variable_of
from federation.core.bundle import Bundle
from federation.errors import FederationError, Reason, ScenarioError
from federation.twin import HOUR_NS, MINUTE_NS
from federation.wire.credentials import Identity, Keyring, Role

MOST_REQUESTS = 1_000
"""How many requests to set a level are remembered with their answers."""


@dataclass(frozen=True)
class Terms:
    """How a loop is run.

    It goes no further than `level`. It decides every `every_ns` of the run, looks `ahead_ns` ahead
    in so many `futures`, and has `within_s` of wall time for it. `measures` are what it tries
    besides what is in force; empty for all of the scenario that can be changed to. A value that an
    action needs may move by the share `moves_by` of itself before the action is void. `operator`
    is who is on duty. What it knows is kept in the folder `state`. What the `city` of that name has
    promised to others it brings into force at any level; nothing when it is empty.
    """

    level: int
    rules: Path
    state: Path
    operator: str
    every_ns: int = HOUR_NS
    ahead_ns: int = 24 * HOUR_NS
    futures: int = 2
    within_s: float = 60.0
    measures: tuple[str, ...] = ()
    moves_by: float = 0.25
    window_ns: int = 30 * MINUTE_NS
    stage_within_s: float = actuation.STAGE_WITHIN_S
    city: str = ""


@dataclass(frozen=True)
class Keys:
    """Who the loop is: a guard that may act, an optimiser that may not, and whom it believes."""

    guard: Identity
    optimiser: Identity
    keyring: Keyring


class Mandate:
    """What the stages of one loop share. Fails with RULES_INVALID."""

    def __init__(
        self, view: LiveView, terms: Terms, keys: Keys, unix_s: Callable[[], float]
    ) -> None:
        self.view = view
        self.terms = terms
        self.keys = keys
        self.unix_s = unix_s
        self.rules: Rules = load(terms.rules)
        self.ladder = Ladder(self.rules)
        self.docket = Docket(self.rules.persons, self._is_said_by, self.rules.version)
        self.guard: Guard
        self.monitor: Monitor
        self.trail: audit.Trail
        self.shelf = Shelf(terms.state / "decisions")
        self.decisions: list[Made] = []
        """Those whose end is open, and the last one."""
        self._outcomes: dict[str, str] = {}
        """What became of all others, by decision."""
        self._requests: dict[str, tuple[str, Moved]] = {}
        """What was asked of the ladder under an id, by digest, and the answer."""

    @contextmanager
    def on_record(self) -> Iterator[None]:
        """Go on from what an earlier life has kept, with the trail open as long as the context
        lasts. Fails with TRAIL_BROKEN and TRAIL_IN_USE."""
        terms = self.terms
        self.guard = Guard(
            self.rules, self.view.descriptions, self._is_proposed_by, self.keys.guard.name
        )
        self.monitor = Monitor(self.rules, self.view.descriptions)
        terms.state.mkdir(parents=True, exist_ok=True)
        with audit.Trail(terms.state / "trail", self.keys.guard.attest) as self.trail:
            self._restore()
            yield

    async def situation(self) -> Situation:
        """What is seen, and in force, now."""
        return self.view.situation(self.view.now(), await self.view.desks())

    def made(self, decision: str) -> Made | None:
        """A decision whose end is open, or the last one."""
        return next((m for m in self.decisions if m.id == decision), None)

    def made_of(self, bundle: str) -> Made | None:
        """The same for the decision that made a bundle."""
        made = (m for m in self.decisions if m.bundle is not None and m.bundle.id == bundle)
        return next(made, None)

    def _is_proposed_by(self, author: str, message: bytes, signature: bytes) -> bool:
        return self.keys.keyring.proves(author, Role.OPTIMISER, message, signature)

    def _is_said_by(self, person: str, message: bytes, signature: bytes) -> bool:
        return self.keys.keyring.proves(person, Role.OPERATOR, message, signature)

    def level_of(self, bundle: Bundle) -> int:
        """How far this may go by itself, now."""
        return min(self.terms.level, self.ladder.level_of(bundle, self.terms.operator))

    def may_act(self) -> bool:
        """Whether there is anything that it may do without asking."""
        return self.terms.level == 5 and any(self.ladder.level(key) == 5 for key in self.grantees())

    def set_level(self, key: Grantee, level: int, person: str, request: str = "") -> Moved:
        """A person sets a level; see `Ladder`. Who may do so is for the caller to have checked.

        The same under the id of an earlier `request` gets the same answer, also in another life
        of the loop. Fails with REQUEST_DIFFERS when the id was used for something else.
        """
        content = hashlib.sha256(json.dumps([*key, level, person]).encode()).hexdigest()
        if request in self._requests:
            before, answer = self._requests[request]
            if before != content:
                raise ScenarioError(
                    Reason.REQUEST_DIFFERS,
                    f"the request {request} was made before, and said something else",
                    {"request": request},
                )
            return answer
        (moved,) = self.ladder.handle(Set(key, level, person))
        if request:
            self._requests[request] = (content, moved)
            self._requests = dict(list(self._requests.items())[-MOST_REQUESTS:])
        self.note(audit.Noted("level", _moved(moved)))
        self.save()
        return moved

    def looked_at(
        self,
        submission: Submission,
        situation: Situation,
        forecast: Forecast,
        at_cut: Situation | None = None,
    ) -> Verdict:
        """What the guard would say, who then knows nothing of it."""
        guard = Guard(
            self.rules, self.view.descriptions, self._is_proposed_by, self.keys.guard.name
        )
        guard.restore(self.guard.snapshot())
        return guard.judge(submission, situation, forecast, at_cut)

    def submitted(self, bundle: Bundle) -> Submission:
        """A bundle as the optimiser proposes it."""
        unsigned = Submission(bundle, self.rules.version)
        return replace(unsigned, signature=self.keys.optimiser.attest(unsigned.message()))

    def outcome(self, decision: str) -> str:
        """What became of a decision, in a word; empty when it is not known."""
        made = self.made(decision)
        return self._outcomes.get(decision, "") if made is None else made.outcome

    def judged(self, decision: str, verdict: Verdict) -> None:
        """Put on record what the guard said of a decision."""
        fallback = "" if verdict.fallback is None else verdict.fallback.id
        refusals = tuple((r.rule, r.sentence) for r in verdict.refusals)
        self.note(audit.Judged(decision, verdict.passed, verdict.mode.value, refusals, fallback))

    def told(self, all_told: Sequence[Told]) -> None:
        """Put on record what has become of proposals."""
        for told in all_told:
            if not told.counts:
                detail = {"sentence": told.sentence, "person": told.person}
                self.note(audit.Noted("answer does not count", detail, told.proposal))
            elif told.state in (State.OPEN, State.CONFIRMED) and told.person:
                self.note(audit.Approved(told.proposal, told.person, told.domains))
            elif told.state in (State.REJECTED, State.EXPIRED, State.VOID):
                self.note(audit.Rejected(told.proposal, told.person, told.sentence))
                self._outcomes[told.proposal] = told.state.value
                made = self.made(told.proposal)
                if made is not None:
                    made.outcome = told.state.value

    def climb(self, event: LadderEvent) -> None:
        """Let autonomy grow or shrink with what has happened; each move is on record."""
        for moved in self.ladder.handle(event):
            self.note(audit.Noted("level", _moved(moved)))

    def note(self, entry: audit.Entry) -> None:
        """Put an entry on record. Raises what the disk does."""
        self.trail.append(entry, self.unix_s())

    def noted(self, what: str, detail: Mapping[str, Any], about: str) -> None:
        """Put on record what is no decision of the loop, and keep what the guard knows by now."""
        self.note(audit.Noted(what, dict(detail), about))
        self.save()

    def grantees(self) -> tuple[Grantee, ...]:
        """What autonomy is granted for, as long as this operator is on duty."""
        return tuple(k for k in self.ladder.standings if k.operator == self.terms.operator)

    def needs(self, key: Grantee) -> tuple[str, ...]:
        """The outputs that an action of this kind needs."""
        return tuple(
            dict.fromkeys(
                needed
                for name, rule in self.rules.actuators.items()
                if self.ladder.key(*variable_of(name), key.operator) == key
                for needed in rule.needs
            )
        )

    def reload_rules(self) -> bool:
        """Go by the rules as they stand in their file, if they are newer; whether they are."""
        try:
            rules = load(self.terms.rules)
            if rules.version <= self.rules.version:
                return False
            self.guard.change_rules(rules)
        except FederationError as error:
            self.note(audit.Noted("rules refused", {"why": str(error)}))
            return False
        self.rules = rules
        self.monitor = Monitor(rules, self.view.descriptions)
        for moved in self.ladder.change_rules(rules):
            self.note(audit.Noted("level", _moved(moved)))
        self.told(self.docket.change_rules(rules.persons, rules.version))
        self.note(audit.Noted("rules", {"version": rules.version}))
        return True

    def save(self) -> None:
        """Keep what a later life of the loop goes on from; each file whole or not at all."""
        waiting = {
            id_
            for id_, state in self.docket.states.items()
            if state in (State.OPEN, State.CONFIRMED)
        }
        kept: list[tuple[Made, bool]] = []
        for made in self.decisions:
            self._outcomes[made.id] = made.outcome
            has_trials = made is self.decisions[-1] or made.id in waiting
            if not has_trials:
                made.candidates = {}
            if has_trials or made.is_shadow:
                kept.append((made, has_trials))
        self.decisions = [made for made, _ in kept]
        self.shelf.keep(kept)
        self._write(
            "loop.json",
            {
                "rules_version": self.rules.version,
                "run": self.view.run,
                "guard": self.guard.snapshot(),
                "docket": self.docket.snapshot(),
                "outcomes": self._outcomes,
            },
        )
        requests = [[id_, *entry] for id_, entry in self._requests.items()]
        self._write("autonomy.json", {"ladder": self.ladder.snapshot(), "requests": requests})

    def _write(self, name: str, plain: Mapping[str, Any]) -> None:
        file = self.terms.state / name
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(plain, default=asdict), encoding="utf-8")
        new.replace(file)

    def _restore(self) -> None:
        """Go on from what an earlier life of the loop has kept.

        Autonomy that was earned in one run counts in the next, under the same rules. What was
        proposed under others is void.
        """
        standing = _read(self.terms.state / "autonomy.json")
        if standing is not None:
            self._requests = {
                id_: (content, _as_moved(moved)) for id_, content, moved in standing["requests"]
            }
            if standing["ladder"]["rules_version"] == self.rules.version:
                self.ladder.restore(standing["ladder"])
        plain = _read(self.terms.state / "loop.json")
        if plain is None or plain["run"] != self.view.run:
            return
        self._outcomes = plain["outcomes"]
        self.decisions = self.shelf.all()
        self.docket.restore(plain["docket"])
        if plain["rules_version"] == self.rules.version:
            self.guard.restore(plain["guard"])
        else:
            self.told(self.docket.change_rules(self.rules.persons, self.rules.version))


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return plain


def _as_moved(plain: Mapping[str, Any]) -> Moved:
    return Moved(**{**plain, "key": Grantee(*plain["key"])})


def _moved(moved: Moved) -> dict[str, Any]:
    return asdict(moved) | {"key": list(moved.key)}
