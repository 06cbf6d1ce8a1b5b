"""Says, at any moment of a run, what each member is doing and who holds back whom.

The coordinator's rule is one inequality, E(source) + delay > t. A member that may not step yet
waits because it fails for some coupling; the coupling for which the left side is least names who
holds it back. A member that sleeps until its inputs change is told by whom it could be woken
first. So from every member a chain leads to one that works: there everything waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from federation.core.coupling import Wiring
from federation.core.exchange import Member
from federation.twin import HOUR_NS, MINUTE_NS

if TYPE_CHECKING:
    from federation.core.coordinator import _Unit

_SECOND_NS = 1_000_000_000


class Doing(StrEnum):
    """What a member of a run that goes on is doing."""

    WORKING = "working"
    """It has been granted steps and owes their answer."""
    HELD_BACK = "held back"
    """It has a next step, which may not be granted yet."""
    READY = "ready"
    """It may step, and waits its turn, to do more steps at a time."""
    SLEEPING = "sleeping"
    """It has no next step of its own, and steps when somebody wakes it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One member and what it is doing."""

    member: str
    doing: Doing
    time_ns: int
    """Its next step; the first of those that it works on; when it can be woken at the earliest."""
    until_ns: int
    """The last of the steps that it works on; else as `time_ns`."""
    by: str = ""
    """Who holds it back, or could wake it first."""
    through: str = ""
    """Through which coupling."""
    by_ns: int = 0
    """The earliest instant at which `by` may still publish."""

    def __str__(self) -> str:
        at = instant(self.time_ns)
        match self.doing:
            case Doing.WORKING if self.until_ns > self.time_ns:
                return f"{self.member} works on its steps from {at} to {instant(self.until_ns)}"
            case Doing.WORKING:
                return f"{self.member} works on its step at {at}"
            case Doing.HELD_BACK:
                return (
                    f"{self.member} waits to step at {at} for {self.by}, "
                    f"at {instant(self.by_ns)}, through {self.through}"
                )
            case Doing.READY:
                return (
                    f"{self.member} may step at {at} and waits for the answer of {self.by}: "
                    "no more grants are given out at a time"
                )
            case Doing.SLEEPING:
                return (
                    f"{self.member} sleeps; {self.by} may wake it from {at} on "
                    f"through {self.through}"
                )


def chain(waits: Mapping[str, Wait], member: str) -> tuple[Wait, ...]:
    """From a member to whom it waits for, and on to the one for whom all of them do."""
    found: dict[str, Wait] = {}
    while member in waits and member not in found:
        found[member] = waits[member]
        member = waits[member].by
    return tuple(found.values())


def instant(time_ns: int) -> str:
    """An instant of a run in the words of people: `2 d 3 h`, `40 s`, `7 ns`."""
    parts = []
    for size_ns, unit in ((24 * HOUR_NS, "d"), (HOUR_NS, "h"), (MINUTE_NS, "min")):
        count, time_ns = divmod(time_ns, size_ns)
        if count:
            parts.append(f"{count} {unit}")
    if time_ns and time_ns < 1_000_000:
        parts.append(f"{time_ns} ns")
    elif time_ns:
        parts.append(f"{time_ns / _SECOND_NS:g} s")
    return " ".join(parts) or "0 s"


def find_waits(
    units: Sequence[_Unit], next_step: Callable[[Member], int], wiring: Wiring, horizon_ns: int
) -> tuple[Wait, ...]:
    """What every member is doing that has anything left to do, in the order of units."""
    ways = find_ways(wiring)
    at_work = [m.name for unit in units for m in unit.members if m.granted]
    found: list[Wait | None] = []
    for unit in units:
        for member in unit.members:
            if at_work and unit.parked:
                time_ns = next_step(member)
                ready = Wait(member.name, Doing.READY, time_ns, time_ns, at_work[0], "", time_ns)
                found.append(ready)
            else:
                found.append(_wait(unit, member, next_step, ways, horizon_ns))
    return tuple(wait for wait in found if wait is not None)


def _wait(
    unit: _Unit,
    member: Member,
    next_step: Callable[[Member], int],
    ways: Mapping[tuple[str, str], tuple[int, str]],
    horizon_ns: int,
) -> Wait | None:
    """What a member is doing; None when it will not step again."""
    if granted := member.granted:
        return Wait(member.name, Doing.WORKING, granted[0].time_ns, granted[-1].time_ns)
    time_ns = next_step(member)
    is_asleep = time_ns > horizon_ns
    if is_asleep and not member.wakes:
        return None
    sources: Sequence[Member]
    if unit.loop is not None or time_ns > unit.own_ns:
        # another member of its loop is at work on an instant, or has one to come before
        sources = [min(unit.members, key=lambda m: (not m.granted, next_step(m)))]
        first_ns = by_ns = unit.own_ns
    elif unit.inward:
        source, delay_ns, since_ns = min(unit.inward, key=_visible_ns)
        sources, by_ns = source.members, source.earliest_ns
        first_ns = _visible_ns((source, delay_ns, since_ns))
    else:
        return None
    if is_asleep:
        time_ns = first_ns
    if time_ns > horizon_ns:
        return None
    by, through = _way(ways, sources, (member, *unit.members))
    steps_on = [m for m in sources if m.granted or m.wakes or next_step(m) <= horizon_ns]
    if steps_on and by not in {m.name for m in steps_on}:
        # of a loop one that has no step left is heard of no more: the loop is held to the others
        by = min(steps_on, key=lambda m: (not m.granted, next_step(m))).name
    doing = Doing.SLEEPING if is_asleep else Doing.HELD_BACK
    return Wait(member.name, doing, time_ns, time_ns, by, through, by_ns)


def _visible_ns(way: tuple[_Unit, int, int]) -> int:
    """When what a unit says at its earliest instant is visible at the end of a way from it."""
    source, delay_ns, since_ns = way
    time_ns = source.earliest_ns
    return since_ns if time_ns < since_ns else time_ns + delay_ns


def find_ways(wiring: Wiring) -> dict[tuple[str, str], tuple[int, str]]:
    """Between any two members the shortest delay and through what it leads."""
    ways = [(c.source, c.target, c.delay_ns, c.name) for c in wiring.couplings]
    ways += [
        (a.source, a.target, a.delay_ns, f"{a.source} => {a.target}") for a in wiring.actuations
    ]
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for source, target, delay_ns, name in ways:
        way = found.setdefault((source, target), (delay_ns, name))
        if delay_ns < way[0]:
            found[source, target] = (delay_ns, name)
    return found


def _way(
    ways: Mapping[tuple[str, str], tuple[int, str]],
    sources: Sequence[Member],
    targets: Sequence[Member],
) -> tuple[str, str]:
    """Who of the sources feeds the first target that any of them feeds, and through what."""
    for target in targets:
        known = [(*ways[pair], pair[0]) for s in sources if (pair := (s.name, target.name)) in ways]
        if known:
            _, name, source = min(known)
            return source, name
    return sources[0].name, "their loop"
