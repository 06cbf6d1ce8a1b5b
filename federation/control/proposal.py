"""What a person is asked to confirm, and when the answer counts: silence refuses.

A proposal is confirmed when, for every domain that it affects, a named person with authority there
has signed it; one person may answer for several domains. Whoever has authority in any of them may
reject it. An answer counts before the expiry and under the rules that it was proposed by; when the
state has moved by the time that it is to act, it is void.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from federation.core.bundle import Bundle, bundle_of, plain_of
from federation.twin import Description

Verify = Callable[[str, bytes, bytes], bool]
"""Whether this person signed this message with this signature."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a figure is expected to be with the bundle and without it, at 5 % and at 95 %."""

    figure: str
    unit: str
    without: float
    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan that was nearly chosen: how it differs, and what it would cost more."""

    differs: str
    regret: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """All that a person needs to say yes or no; `expires_unix_s` is when silence has refused it."""

    id: str
    operator: str
    """Who is on duty."""
    bundle: Bundle
    rules_version: int
    effects: Mapping[str, tuple[Effect, ...]]
    """By domain, every affected one."""
    alternatives: tuple[Alternative, ...]
    limits: tuple[str, ...]
    """Those that bind the plan."""
    reversal: tuple[str, ...]
    """How each setpoint's effect is undone, in words."""
    made_unix_s: float
    expires_unix_s: float

    def domains(self) -> tuple[str, ...]:
        return tuple(sorted(self.effects))

    def message(self, answer: str) -> bytes:
        """What a person signs: the answer, and all that they were shown."""
        plain = {"answer": answer, "proposal": self.id, "digest": self.digest()}
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        text = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """Its fields as plain data."""
        return {
            "id": self.id,
            "operator": self.operator,
            "bundle": plain_of(self.bundle),
            "rules_version": self.rules_version,
            "effects": {d: [asdict(e) for e in some] for d, some in self.effects.items()},
            "alternatives": [asdict(a) for a in self.alternatives],
            "limits": list(self.limits),
            "reversal": list(self.reversal),
            "made_unix_s": self.made_unix_s,
            "expires_unix_s": self.expires_unix_s,
        }


def proposal_of(plain: Mapping[str, Any]) -> Proposal:
    """The proposal whose plain data these are."""
    return Proposal(
        **{
            **plain,
            "bundle": bundle_of(plain["bundle"]),
            "effects": {
                d: tuple(Effect(**e) for e in some) for d, some in plain["effects"].items()
            },
            "alternatives": tuple(Alternative(**a) for a in plain["alternatives"]),
            "limits": tuple(plain["limits"]),
            "reversal": tuple(plain["reversal"]),
        }
    )


def affected_domains(
    bundle: Bundle, descriptions: Mapping[str, Description], fed: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The domains that a bundle acts on, and those that its members feed through couplings.

    `fed` names, for each member, the members that read from it.
    """
    found, waiting = set(), list(bundle.members())
    while waiting:
        member = waiting.pop()
        if member in found or member not in descriptions:
            continue
        found.add(member)
        waiting += fed.get(member, ())
    return tuple(sorted({descriptions[member].domain for member in found}))


def reversal_of(bundle: Bundle, descriptions: Mapping[str, Description]) -> tuple[str, ...]:
    """How each setpoint is undone, in the words of the twins' authors."""
    words = {
        (member, a.name): a.compensation or f"set {a.safe_default:g} {a.unit}, its safe default"
        for member, description in descriptions.items()
        for a in description.actuators
    }
    return tuple(
        f"{s.member}.{s.actuator} of {s.entity}: {words.get((s.member, s.actuator), 'unknown')}"
        for s in bundle.setpoints
    )


class State(StrEnum):
    """What has become of a proposal."""

    OPEN = "open"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    VOID = "void"
    TAKEN = "taken"


@dataclass(frozen=True, slots=True)
class Answer:
    """A person's signed yes or no to one proposal."""

    proposal: str
    person: str
    is_yes: bool
    signature: bytes
    why: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What became of an answer, or of a proposal: a record for the trail."""

    proposal: str
    state: State
    sentence: str
    counts: bool = True
    """Whether the answer changed anything."""
    person: str = ""
    domains: tuple[str, ...] = ()


@dataclass
class Docket:
    """The proposals that wait, and who has answered; events in, records out.

    `persons` names the domains of each person's authority.
    """

    persons: Mapping[str, tuple[str, ...]]
    verify: Verify
    rules_version: int
    proposals: dict[str, Proposal] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    confirmed: dict[str, dict[str, str]] = field(default_factory=dict)
    """By proposal, who confirmed for each domain."""

    def propose(self, proposal: Proposal) -> Told:
        """Put a proposal before the persons. The same id a second time changes nothing."""
        if proposal.id in self.proposals:
            state = self.states[proposal.id]
            return Told(proposal.id, state, "it was proposed before", counts=False)
        self.proposals[proposal.id] = proposal
        self.confirmed[proposal.id] = {}
        nobody = [d for d in proposal.domains() if not self._with_authority(d)]
        if not proposal.effects:
            return self._end(proposal.id, State.VOID, "it names no domain that it affects")
        if nobody:
            return self._end(proposal.id, State.VOID, f"nobody has authority in {nobody[0]}")
        if proposal.rules_version != self.rules_version:
            return self._end(proposal.id, State.VOID, "it was made under other rules")
        self.states[proposal.id] = State.OPEN
        return Told(proposal.id, State.OPEN, f"waits for {', '.join(proposal.domains())}")

    def answer(self, answer: Answer, now_unix_s: float) -> Told:
        """Take in an answer; one that does not count leaves everything as it was."""
        proposal = self.proposals.get(answer.proposal)
        if proposal is None:
            return Told(answer.proposal, State.VOID, "there is no such proposal", False)
        self.pass_time(now_unix_s)
        state = self.states[proposal.id]
        person = answer.person
        if state is not State.OPEN:
            return Told(proposal.id, state, f"it is {state.value} already", False, person)
        domains = tuple(d for d in self.persons.get(person, ()) if d in proposal.effects)
        if not domains:
            text = f"{person!r} has no authority in {', '.join(proposal.domains())}"
            return Told(proposal.id, state, text, False, person)
        message = proposal.message("yes" if answer.is_yes else "no")
        if not self.verify(person, message, answer.signature):
            return Told(proposal.id, state, f"{person!r} did not sign this", False, person)
        if not answer.is_yes:
            why = answer.why or "no reason given"
            return self._end(proposal.id, State.REJECTED, why, person, domains)
        given = self.confirmed[proposal.id]
        for domain in domains:
            given.setdefault(domain, person)
        missing = [d for d in proposal.domains() if d not in given]
        if missing:
            text = f"still waits for {', '.join(missing)}"
            return Told(proposal.id, State.OPEN, text, True, person, domains)
        return self._end(proposal.id, State.CONFIRMED, "confirmed", person, domains)

    def pass_time(self, now_unix_s: float) -> tuple[Told, ...]:
        """Refuse what nobody has confirmed, or taken, in time."""
        return tuple(
            self._end(id_, State.EXPIRED, "nobody confirmed in time")
            for id_, state in tuple(self.states.items())
            if state in (State.OPEN, State.CONFIRMED)
            and not now_unix_s < self.proposals[id_].expires_unix_s
        )

    def change_rules(
        self, persons: Mapping[str, tuple[str, ...]], rules_version: int
    ) -> tuple[Told, ...]:
        """Void what was proposed under other rules: it must be proposed anew."""
        self.persons, self.rules_version = persons, rules_version
        return tuple(
            self._end(id_, State.VOID, f"the rules are at version {rules_version} now")
            for id_, state in tuple(self.states.items())
            if state in (State.OPEN, State.CONFIRMED)
            and self.proposals[id_].rules_version != rules_version
        )

    def take(
        self,
        proposal: str,
        value_of: Callable[[str, str, str], float | None],
        now_unix_s: float,
        now_ns: int,
    ) -> tuple[Bundle | None, Told]:
        """The bundle of a confirmed proposal, once, to be judged by the guard and to act.

        `value_of` gives the value of an output (member, variable, entity), None while it is not
        good enough to act on; every condition of the bundle is looked at again, and so is its
        expiry in the run. When the state has moved the approval is void.
        """
        self.pass_time(now_unix_s)
        found = self.proposals.get(proposal)
        if found is None:
            return None, Told(proposal, State.VOID, "there is no such proposal", False)
        state = self.states[proposal]
        if state is not State.CONFIRMED:
            return None, Told(proposal, state, f"it is {state.value}", False)
        if found.bundle.expires_ns <= now_ns:
            return None, self._end(proposal, State.EXPIRED, "its bundle has expired in the run")
        for c in found.bundle.conditions:
            value = value_of(c.member, c.variable, c.entity)
            if value is None or not c.low <= value <= c.high:
                now = "not known" if value is None else f"{value:g}"
                text = f"{c.member}.{c.variable} of {c.entity} is {now}; {c.low:g}..{c.high:g}"
                return None, self._end(proposal, State.VOID, f"the state has moved: {text}")
        return found.bundle, self._end(proposal, State.TAKEN, "acts")

    def approvers(self, proposal: str) -> dict[str, str]:
        """Who confirmed for each domain."""
        return dict(self.confirmed.get(proposal, {}))

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain data, but for the rules."""
        return {
            "proposals": [proposal.plain() for proposal in self.proposals.values()],
            "states": {id_: state.value for id_, state in self.states.items()},
            "confirmed": {id_: dict(given) for id_, given in self.confirmed.items()},
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        found = [proposal_of(fields) for fields in plain["proposals"]]
        self.proposals = {proposal.id: proposal for proposal in found}
        self.states = {id_: State(state) for id_, state in plain["states"].items()}
        self.confirmed = {id_: dict(given) for id_, given in plain["confirmed"].items()}

    def _with_authority(self, domain: str) -> list[str]:
        return [person for person, domains in self.persons.items() if domain in domains]

    def _end(
        self,
        proposal: str,
        state: State,
        sentence: str,
        person: str = "",
        domains: tuple[str, ...] = (),
    ) -> Told:
        self.states[proposal] = state
        return Told(proposal, state, sentence, True, person, domains)
