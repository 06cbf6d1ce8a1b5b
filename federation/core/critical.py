"""The critical path of a run: who held whom back, and how long.

Each grant follows from one answer, that of the member that was waited for last. From the last
answer of a run back to its start this makes one chain of frames, whose wall times, with what
lay between them, are the wall time of the run; whoever is not on it could have been slower.
Clocks are read by who calls; here are only their readings, in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

LONGEST = 10
"""How many of the longest frames of the path are told one by one."""

FOLD_AFTER = 1024
FOLD_AFTER_EACH = 16
"""Chains are summed up after so many frames and as many again for each member: seldom enough that
it costs little per frame, often enough that they are short."""


@dataclass(frozen=True, slots=True)
class Share:
    """The frames of one member on the path, or its steps in a run in one thread, and how long
    they took."""

    member: str
    frames: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Hold:
    """How often one member held back another on the path, or itself, and for how long."""

    holder: str
    held: str
    coupling: str
    """Through what; empty for itself, and where nothing leads directly from one to the other."""
    frames: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Longest:
    """One long frame of the path."""

    holder: str
    held: str
    """Who was granted its next steps upon the answer; empty for the last of the run."""
    time_ns: int
    """The last instant of the frame."""
    seconds: float


@dataclass(frozen=True)
class CriticalPath:
    """What the wall time of a run consists of.

    The seconds of `members` and those that have a name of their own add up to it; `holds` and
    `longest` say more about the former. Between the members' frames lay the coordinator's own
    work, with everything that its process did meanwhile, waits for the store to take what is
    final, and waits for the wall clock in a paced run. `opening_s` is the time before the first
    grant, `closing_s` that after the last answer.
    """

    members: tuple[Share, ...]
    holds: tuple[Hold, ...]
    longest: tuple[Longest, ...]
    coordinator_s: float
    store_s: float = 0.0
    pace_s: float = 0.0
    opening_s: float = 0.0
    closing_s: float = 0.0

    @property
    def wall_s(self) -> float:
        between_s = self.coordinator_s + self.store_s + self.pace_s
        members_s = sum(share.seconds for share in self.members)
        return self.opening_s + members_s + between_s + self.closing_s


@dataclass(slots=True, eq=False)
class Frame:
    """The steps of one grant, from the grant to the answer."""

    unlocked_by: Frame | None
    """The answer upon which it was granted; None at the start."""
    member: str
    time_ns: int
    began_s: float
    ended_s: float
    store_s: float = 0.0
    """How long the answer waited for the store before it was looked at."""
    pace_s: float = 0.0
    """How long the grant waited for its instant on the wall clock."""
    before: _Sum | None = None
    """What lay between `unlocked_by` and this one, where that is summed up."""


class _Begin(NamedTuple):
    """What has to be known of the frame that follows an answer."""

    member: str
    began_s: float
    pace_s: float


@dataclass(slots=True, eq=False)
class _Sum:
    """A stretch of a chain, added up; `first` is how its first frame began."""

    first: _Begin
    held: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Per pair of who was waited for and who waited the number of frames and their seconds."""
    longest: list[tuple[float, int, str, str]] = field(default_factory=list)
    between_s: float = 0.0
    store_s: float = 0.0
    pace_s: float = 0.0

    def reach(self, frame: Frame | None, kept: Container[Frame] = ()) -> Frame | None:
        """Add the frames from this one back to the next that is kept, which is returned."""
        held, began_s, pace_s = self.first
        between_s = store_s = paced_s = 0.0
        known = self.held
        longest = self.longest
        least_s = longest[0][0] if len(longest) == LONGEST else -1.0
        while frame is not None and frame not in kept:
            member, frame_s = frame.member, frame.began_s
            seconds = frame.ended_s - frame_s
            pair = (member, held)
            if (count := known.get(pair)) is None:
                known[pair] = [1, seconds]
            else:
                count[0] += 1
                count[1] += seconds
            if seconds >= least_s:
                least_s = self._note(seconds, frame.time_ns, *pair)
            store_s += frame.store_s
            paced_s += pace_s
            between_s += began_s - pace_s - frame.ended_s - frame.store_s
            held, began_s, pace_s = member, frame_s, frame.pace_s
            if frame.before is not None:
                self._merge(frame.before)
                held, began_s, pace_s = frame.before.first
                known = self.held
                least_s = self.longest[0][0] if len(self.longest) == LONGEST else -1.0
            frame = frame.unlocked_by
        self.first = _Begin(held, began_s, pace_s)
        self.between_s += between_s
        self.store_s += store_s
        self.pace_s += paced_s
        return frame

    def end_with(self, last: Frame) -> None:
        """Add the last frame of a chain, for which nobody waited."""
        seconds = last.ended_s - last.began_s
        self.held[last.member, ""] = [1, seconds]
        self._note(seconds, last.time_ns, last.member, "")

    def _note(self, seconds: float, time_ns: int, holder: str, held: str) -> float:
        """Keep a frame if it is among the longest; how long a frame must be for that by now."""
        longest = self.longest
        if len(longest) < LONGEST:
            heapq.heappush(longest, (seconds, time_ns, holder, held))
        else:
            heapq.heappushpop(longest, (seconds, time_ns, holder, held))
        return longest[0][0] if len(longest) == LONGEST else -1.0

    def _merge(self, earlier: _Sum) -> None:
        """Add what lay before. Nobody needs the earlier sum any more."""
        held, others = self.held, earlier.held
        if len(held) < len(others):
            held, others = others, held
        for pair, (count, seconds) in others.items():
            known = held.setdefault(pair, [0, 0.0])
            known[0] += count
            known[1] += seconds
        self.held = held
        for noted in earlier.longest:
            self._note(*noted)
        self.between_s += earlier.between_s
        self.store_s += earlier.store_s
        self.pace_s += earlier.pace_s


def _sum_before(frame: Frame) -> _Sum:
    return frame.before or _Sum(_Begin(frame.member, frame.began_s, frame.pace_s))


def fold(heads: Iterable[Frame]) -> None:
    """Sum up what lies between the frames where the chains that end in `heads` end or meet.

    Then there are no more than twice as many frames as ends, however long the run has been. It
    costs a visit to every frame that came since the last time.
    """
    ends = tuple(heads)
    kept = dict.fromkeys(ends)
    seen: set[Frame] = set()
    for end in ends:
        frame: Frame | None = end
        while frame is not None and frame not in seen:
            seen.add(frame)
            frame = frame.unlocked_by
        if frame is not None:
            kept[frame] = None
    for end in kept:
        if end.unlocked_by is not None and end.unlocked_by not in kept:
            total = _sum_before(end)
            end.unlocked_by = total.reach(end.unlocked_by, kept)
            end.before = total


def path_in_one_thread(
    taken: Mapping[str, tuple[int, float]], opening_s: float, wall_s: float
) -> CriticalPath:
    """The path of a run whose steps were done one after the other: all of them are on it.

    `taken` are per member the number of its steps and their seconds.
    """
    shares = (Share(member, *known) for member, known in taken.items())
    members = tuple(sorted(shares, key=lambda share: (-share.seconds, share.member)))
    rest_s = wall_s - opening_s - sum(share.seconds for share in members)
    return CriticalPath(members, (), (), rest_s, opening_s=opening_s)


def critical_path(
    last: Frame | None,
    through: Mapping[tuple[str, str], str],
    *,
    started_s: float,
    drive_s: float,
    ended_s: float,
) -> CriticalPath:
    """The chain that ends with the last answer of a run, which may not be folded any more.

    `through` are the couplings by the members that they lead from and to. The run went on from
    `started_s` to `ended_s`; its coordinator began at `drive_s`.
    """
    opening_s = drive_s - started_s
    if last is None:
        return CriticalPath((), (), (), ended_s - drive_s, opening_s=opening_s)
    total = _sum_before(last)
    total.end_with(last)
    total.reach(last.unlocked_by)
    frames: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for (holder, _), (count, taken_s) in total.held.items():
        frames[holder] = frames.get(holder, 0) + int(count)
        seconds[holder] = seconds.get(holder, 0.0) + taken_s
    holds = [
        Hold(*pair, "" if pair[0] == pair[1] else through.get(pair, ""), int(count), taken_s)
        for pair, (count, taken_s) in total.held.items()
        if pair[1]
    ]
    return CriticalPath(
        tuple(
            Share(member, frames[member], seconds[member])
            for member in sorted(seconds, key=lambda member: (-seconds[member], member))
        ),
        tuple(sorted(holds, key=lambda hold: (-hold.seconds, hold.holder, hold.held))),
        tuple(
            Longest(holder, held, time_ns, taken_s)
            for taken_s, time_ns, holder, held in sorted(total.longest, reverse=True)
        ),
        total.between_s + total.first.began_s - total.first.pace_s - drive_s,
        total.store_s,
        total.pace_s + total.first.pace_s,
        opening_s,
        ended_s - last.ended_s,
    )
