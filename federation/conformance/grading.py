"""Goes through all checks of a service, and says what came of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from federation.conformance.caller import Asked, BrokenError, Graded, NotOfferedError
from federation.conformance.checks import CHECKS, describes_itself
from federation.errors import FederationError, Reason, ScenarioError
from federation.wire import codec

CONNECT_S = 5.0
"""How long a service may take to be there."""


class Grade(StrEnum):
    """What came of a check."""

    PASS = "pass"
    FAIL = "fail"
    NOT_OFFERED = "not offered"


NOBODY = Asked()


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check, and what its author may do about it."""

    check: str
    grade: Grade
    found: str = ""
    advice: str = ""


async def grade(address: str, asked: Asked = NOBODY, only: Collection[str] = ()) -> list[Finding]:
    """All findings about what is served at an address, in the order of the checks.

    Fails with UNREACHABLE, with UNSUPPORTED when what is there is no twin, and as it refuses to
    describe itself.
    """
    graded = Graded(address, asked)
    findings = []
    async with graded.channel:
        try:
            async with asyncio.timeout(CONNECT_S):
                await graded.channel.channel_ready()
        except TimeoutError:
            raise ScenarioError(
                Reason.UNREACHABLE, f"nobody answers at {address}", {"address": address}
            ) from None
        graded.described = await graded.describe()
        try:
            graded.description = codec.decode_description(graded.described.description)
        except FederationError as error:
            advice = CHECKS[0][1]
            return [Finding(_name(describes_itself), Grade.FAIL, str(error), advice)]
        for check, advice in CHECKS:
            name = _name(check)
            if only and name not in only:
                continue
            findings.append(await _found(check, name, advice, graded))
    return findings


async def _found(
    check: Callable[[Graded], Awaitable[str]], name: str, advice: str, graded: Graded
) -> Finding:
    try:
        return Finding(name, Grade.PASS, await check(graded))
    except NotOfferedError as why:
        return Finding(name, Grade.NOT_OFFERED, str(why))
    except BrokenError as why:
        return Finding(name, Grade.FAIL, str(why), advice)
    except FederationError as error:
        return Finding(name, Grade.FAIL, str(error), advice)


def _name(check: Callable[..., object]) -> str:
    return check.__name__.replace("_", " ")


def table(findings: Sequence[Finding]) -> str:
    """The findings for a person, each failure with what to do about it."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.check.ljust(width)}  {finding.grade.ljust(11)}  {finding.found}")
        if finding.grade is Grade.FAIL:
            lines.append(f"{' ' * width}  -> {finding.advice}")
    return "\n".join(line.rstrip() for line in lines)


def as_json(address: str, findings: Sequence[Finding]) -> str:
    """One JSON document: the address, whether it passed, and the findings."""
    passed = all(finding.grade is not Grade.FAIL for finding in findings)
    counts = {g.value: sum(f.grade is g for f in findings) for g in Grade}
    return json.dumps(
        {
            "address": address,
            "passed": passed,
            "counts": counts,
            "findings": [asdict(finding) for finding in findings],
        },
        indent=2,
    )
