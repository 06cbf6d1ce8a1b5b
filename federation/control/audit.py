"""What stands in the trail of every decision (see `federation.trail`), and how it is asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from federation.core.bundle import Bundle, plain_of
from federation.trail import (
    Finding,
    Trail,
    Verify,
    canonical,
    heads,
    read,
    repair,
    segments,
    verify,
)

__all__ = ["Finding", "Trail", "canonical", "heads", "read", "repair", "segments", "verify"]
"""What is asked for here by those who know of no other trail."""

# -- what is recorded ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Basis:
    """All that a decision follows from: the same again gives the same decision."""

    snapshot: str
    """The digest, or name, of the consistent cut."""
    versions: Mapping[str, str]
    """Of the twins' models and of this package, by name."""
    seed: int
    rules_version: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What else went in, such as the horizon and the weights."""

    def digest(self) -> str:
        return hashlib.sha256(canonical(asdict(self))).hexdigest()


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision was made: `limits` were binding, `alternatives` came close."""

    kind: ClassVar[str] = "decided"
    decision: str
    run: str
    time_ns: int
    basis: Basis
    bundle: Mapping[str, Any]
    """The bundle's fields; empty when there was no plan."""
    bundle_digest: str
    limits: tuple[str, ...] = ()
    alternatives: tuple[Mapping[str, Any], ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    level: int = 3


@dataclass(frozen=True, slots=True)
class Judged:
    """The guard's verdict: the rules that the decision broke, each with a sentence."""

    kind: ClassVar[str] = "judged"
    decision: str
    passed: bool
    mode: str
    refusals: tuple[tuple[str, str], ...] = ()
    fallback: str = ""
    """The id of the recovery bundle that was issued instead."""


@dataclass(frozen=True, slots=True)
class Approved:
    """A person said yes, for these domains."""

    kind: ClassVar[str] = "approved"
    decision: str
    person: str
    domains: tuple[str, ...]
    signature: str = ""
    """In hexadecimal."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A person said no, or nobody said anything in time (`person` is empty)."""

    kind: ClassVar[str] = "rejected"
    decision: str
    person: str
    why: str


@dataclass(frozen=True, slots=True)
class Acted:
    """What became of the bundle: committed, compensated, revoked, expired."""

    kind: ClassVar[str] = "acted"
    decision: str
    state: str
    time_ns: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """What came of it, beside what had been predicted."""

    kind: ClassVar[str] = "observed"
    decision: str
    time_ns: int
    predicted: Mapping[str, float]
    observed: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Noted:
    """Anything else that belongs into the trail: a switch, a stop, a change of level or rules."""

    kind: ClassVar[str] = "noted"
    what: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    decision: str = ""


Entry = Decided | Judged | Approved | Rejected | Acted | Observed | Noted


def is_reproduced(decided: Mapping[str, Any], bundle: Bundle | None) -> bool:
    """Whether a decision that was made again from the basis in its record came out the same."""
    return str(decided["bundle_digest"]) == ("" if bundle is None else bundle.digest())


def decided(
    decision: str, run: str, time_ns: int, basis: Basis, bundle: Bundle | None, **more: Any
) -> Decided:
    """The record of a decision; without a bundle there was no plan."""
    plain = {} if bundle is None else plain_of(bundle)
    digest = "" if bundle is None else bundle.digest()
    return Decided(decision, run, time_ns, basis, plain, digest, **more)


# -- asking it -----------------------------------------------------------------------------


def query(
    directory: str | Path,
    limit: str = "",
    since_unix_s: float = -math.inf,
    until_unix_s: float = math.inf,
    verify_head: Verify | None = None,
) -> list[dict[str, Any]]:
    """Every decision in which a limit was active: its alternatives, who approved, what came of it.

    A limit is active when it bound the plan or when the guard refused the decision for it. It is
    named in full (`sum:fuel`), or by the part before or after the colon; "" stands for any. Times
    are Unix seconds. Fails as `read` does: a broken trail answers nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in read(directory, verify_head):
        kind, body, at = record["kind"], record["body"], record["time_unix_s"]
        if kind == Decided.kind:
            found[body["decision"]] = {
                "decision": body["decision"],
                "number": record["number"],
                "time_unix_s": at,
                "run": body["run"],
                "time_ns": body["time_ns"],
                "level": body["level"],
                "limits": list(body["limits"]),
                "alternatives": body["alternatives"],
                "basis": body["basis"],
                "bundle": body["bundle"],
                "bundle_digest": body["bundle_digest"],
                "predicted": body["predicted"],
                "verdicts": [],
                "approvals": [],
                "rejections": [],
                "acts": [],
                "outcomes": [],
                "notes": [],
            }
            continue
        decision = found.get(body.get("decision", ""))
        if decision is None:
            continue
        told = {**{k: v for k, v in body.items() if k != "decision"}, "time_unix_s": at}
        decision[_PLACES[kind]].append(told)
        if kind == Judged.kind:
            decision["limits"] += [r for r, _ in body["refusals"] if r not in decision["limits"]]
    return [
        decision
        for decision in found.values()
        if since_unix_s <= decision["time_unix_s"] <= until_unix_s
        and (not limit or any(_is_named(limit, active) for active in decision["limits"]))
    ]


_PLACES = {
    Judged.kind: "verdicts",
    Approved.kind: "approvals",
    Rejected.kind: "rejections",
    Acted.kind: "acts",
    Observed.kind: "outcomes",
    Noted.kind: "notes",
}


def _is_named(limit: str, active: str) -> bool:
    return limit in (active, active.partition(":")[0], active.partition(":")[2])
