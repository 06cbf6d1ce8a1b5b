"""The policy that is in force: read again whenever its file changes, with the emergencies that are
declared beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.policy import Declaration, Policy, Question, matches_any, now, read_policy
from federation.peer.reader import Reader

LOOK_S = 0.25
"""How often the file is looked at; a change counts within a second."""

_log = logging.getLogger(__name__)


def declarations_of(policy_file: Path) -> Path:
    """The file beside a policy in which emergencies are declared, a line each, never rewritten."""
    return policy_file.with_name(f"{policy_file.name}.emergencies.jsonl")


def declare(
    policy_file: Path, emergency: str, by: str, why: str, hours: float, instant: datetime
) -> Declaration:
    """Declare an emergency from now on, for so many hours; 0 ends it.

    Fails with POLICY_INVALID when the policy knows no such emergency, or with NOT_AUTHORISED when
    it may not be declared by them or for so long, and with SCENARIO_INVALID without a reason.
    """
    policy = load_policy(policy_file)
    known = policy.emergencies.get(emergency)
    if known is None:
        named = ", ".join(policy.emergencies) or "none"
        raise ScenarioError(
            Reason.POLICY_INVALID, f"{policy_file} knows no emergency {emergency!r}; it has {named}"
        )
    if not matches_any(known.by, by):
        raise ScenarioError(
            Reason.NOT_AUTHORISED,
            f"{by or 'nobody'} may not declare {emergency}; {', '.join(known.by)} may",
        )
    if not 0 <= hours <= known.most_h:
        raise ScenarioError(
            Reason.NOT_AUTHORISED,
            f"{emergency} may be declared for {known.most_h:g} h at most, not for {hours:g}",
        )
    if not why.strip():
        raise ScenarioError(Reason.SCENARIO_INVALID, "say why: it stands on record")
    made = Declaration(emergency, by, why, instant, instant + timedelta(hours=hours))
    line = {
        "emergency": emergency,
        "by": by,
        "why": why,
        "from": made.start.isoformat(),
        "until": made.end.isoformat(),
    }
    with declarations_of(policy_file).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return made


def load_policy(file: Path) -> Policy:
    """Read a policy file; fails with MISSING_FILE, POLICY_INVALID or UNKNOWN_KEY."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(
            Reason.MISSING_FILE, f"the policy {file} can't be read: {error}", {"file": str(file)}
        ) from None
    return read_policy(text, str(file))


def load_declarations(policy_file: Path) -> tuple[Declaration, ...]:
    """What is declared, the last word on each emergency; fails with POLICY_INVALID."""
    file = declarations_of(policy_file)
    if not file.is_file():
        return ()
    found: dict[str, Declaration] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            times = [datetime.fromisoformat(row[key]) for key in ("from", "until")]
            if any(time.tzinfo is None for time in times):
                raise ValueError("a time has no zone")
            start, end = (time.astimezone(UTC) for time in times)
            told = [str(row[key]) for key in ("emergency", "by", "why")]
        except (ValueError, KeyError, TypeError) as error:
            raise ScenarioError(
                Reason.POLICY_INVALID,
                f"{file}, line {number}: this declares nothing: {error}",
                {"file": str(file), "line": str(number)},
            ) from None
        found[told[0]] = Declaration(told[0], told[1], told[2], start, end)
    return tuple(found.values())


class PolicyFile:
    """The policy of a file as it is in force. A new one that is broken changes nothing.

    `say` hears of every change, of what is wrong with one, and of emergencies that begin and end.
    """

    def __init__(
        self, file: Path, say: Callable[[str], None], clock: Callable[[], datetime] = now
    ) -> None:
        """Fails as `load_policy` does: a broker does not begin with a broken policy."""
        self.file = file
        self.policy = load_policy(file)
        self.declared = load_declarations(file)
        self.problem = ""
        """What is wrong with the file as it is now; empty when it is in force."""
        self.say, self._clock = say, clock
        self._marks = self._look_at_files()
        self._held: frozenset[str] = frozenset()
        self._note_emergencies()

    def question(self, reader: Reader, purpose: str) -> Question:
        """Who asks, now."""
        return Question(reader, purpose, self._clock(), self.declared)

    def look(self) -> None:
        """Take up what has changed since the last look."""
        marks = self._look_at_files()
        if marks != self._marks:
            self._marks = marks
            try:
                policy, declared = load_policy(self.file), load_declarations(self.file)
            except FederationError as error:
                self.problem = str(error)
                self.say(
                    f"the export policy was changed and is broken; version {self.policy.version} "
                    f"stays in force: {error}"
                )
            else:
                if self.problem or policy != self.policy:
                    self.say(f"the export policy is in force in version {policy.version}")
                self.policy, self.declared, self.problem = policy, declared, ""
        self._note_emergencies()

    def _note_emergencies(self) -> None:
        instant = self._clock()
        held = {d.emergency: d for d in self.declared if d.holds(self.policy, instant)}
        for name in held.keys() - self._held:
            d = held[name]
            self.say(f"emergency {name}, declared by {d.by} until {d.end.isoformat()}: {d.why}")
        for name in self._held - held.keys():
            self.say(f"emergency {name} is over")
        self._held = frozenset(held)

    def _look_at_files(self) -> tuple[object, ...]:
        marks: list[object] = []
        for file in (self.file, declarations_of(self.file)):
            try:
                stat = file.stat()
            except OSError:
                marks.append(None)
            else:
                marks.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(marks)
