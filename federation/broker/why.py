"""What a live run waits for, as it is seen from outside: for the wire, and in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson, Parse

from federation.core.ages import Stale
from federation.core.critical import CriticalPath, Hold, Longest, Share
from federation.core.waits import Doing, Wait, chain, instant
from federation.errors import FederationError
from federation.v1 import control_pb2, scenario_pb2
from federation.wire import status
from federation.wire.link import Clock

_Member = control_pb2.MemberWait


@dataclass(frozen=True, slots=True)
class Trouble:
    """How a member that was lost is being brought back."""

    attempt: int
    stage: str
    error: FederationError | None
    """Why it was lost, or why the attempt before failed; None when a run is continued."""
    since_s: float
    """When it was lost, on the monotonic clock."""
    due_s: float
    """When this stage is given up at the latest."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a member does, for how long by now, and for how long at most from now on."""

    wait: Wait
    elapsed_s: float
    remaining_s: float | None = None
    """Of who works: until it is given up. None while it waits for the wall clock."""
    trouble: Trouble | None = None
    paced_s: float | None = None
    """How long its grant still waits for its instant on the wall clock."""
    clock: Clock | None = None
    is_late: bool = False
    clock_fault: str = ""
    """Why the clock can't be trusted as far as it must."""


class Lookout:
    """Where a live run says what it waits for as a whole, and lets others look at its members."""

    def __init__(self) -> None:
        self.standings: Callable[[], Sequence[Standing]] = tuple
        self.pace: Callable[[], Mapping[str, float | str] | None] = lambda: None
        self.stale: Callable[[], Iterable[Stale]] = tuple
        self._cause = ""
        self._since_s = time.monotonic()
        self._due_s: float | None = None

    def waits_for(self, cause: str, within_s: float | None = None) -> None:
        """The run waits for this from now on, and fails after `within_s`; for nothing with ""."""
        self._cause, self._since_s = cause, time.monotonic()
        self._due_s = None if within_s is None else self._since_s + within_s

    def told(self, run: scenario_pb2.Run) -> control_pb2.WhyResponse:
        """All that can be seen now."""
        now_s = time.monotonic()
        response = control_pb2.WhyResponse(run=run)
        if self._cause:
            response.wait.cause = self._cause
            response.wait.elapsed_duration.CopyFrom(duration(now_s - self._since_s))
            if self._due_s is not None:
                response.wait.remaining_duration.CopyFrom(duration(self._due_s - now_s))
        standings = {standing.wait.member: standing for standing in self.standings()}
        waits = {name: standing.wait for name, standing in standings.items()}
        for name, standing in standings.items():
            last = standings[chain(waits, name)[-1].member]
            response.members.append(_encode(standing, last, now_s))
        if (pace := self.pace()) is not None:
            response.pace.CopyFrom(encode_pace(pace))
        response.stale_values.extend(map(encode_stale, self.stale()))
        return response


# -- for the wire ------------------------------------------------------------------------


def duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(round(seconds * 1e9))
    return found


_STATES = {
    Doing.WORKING: _Member.STATE_WORKING,
    Doing.HELD_BACK: _Member.STATE_HELD_BACK,
    Doing.SLEEPING: _Member.STATE_SLEEPING,
    Doing.READY: _Member.STATE_READY,
}


def _encode(standing: Standing, last: Standing, now_s: float) -> control_pb2.MemberWait:
    wait, trouble = standing.wait, standing.trouble
    message = control_pb2.MemberWait(
        member=wait.member,
        state=_STATES[wait.doing],
        time_ns=wait.time_ns,
        until_ns=wait.until_ns,
        by=wait.by,
        coupling=wait.through,
        by_ns=wait.by_ns,
        elapsed_duration=duration(standing.elapsed_s),
        is_late=standing.is_late,
    )
    if last.remaining_s is not None:
        message.remaining_duration.CopyFrom(duration(last.remaining_s))
    if trouble is not None:
        message.state = _Member.STATE_RECOVERING
        message.recovery.attempt = trouble.attempt
        message.recovery.stage = trouble.stage
        if trouble.error is not None:
            message.recovery.error.CopyFrom(status.encode_error(trouble.error))
    elif standing.paced_s is not None:
        message.state = _Member.STATE_PACED
    if standing.clock is not None:
        message.clock.clock_offset.CopyFrom(duration(standing.clock.offset_s))
        message.clock.round_trip_duration.CopyFrom(duration(standing.clock.round_trip_s))
        message.clock.fault = standing.clock_fault
    return message


def encode_pace(report: Mapping[str, float | str]) -> control_pb2.PaceReport:
    return control_pb2.PaceReport(
        factor=float(report["factor"]),
        when_late=str(report["when_late"]),
        lag_duration=duration(float(report["lag_s"])),
        max_lag_duration=duration(float(report["max_lag_s"])),
        p99_lag_duration=duration(float(report["p99_lag_s"])),
        skipped_duration=duration(float(report["skipped_s"])),
    )


def encode_stale(stale: Stale) -> control_pb2.StaleValue:
    return control_pb2.StaleValue(
        member=stale.member,
        variable=stale.variable,
        publish_time_ns=stale.publish_ns,
        bound_ns=stale.bound_ns,
    )


def encode_path(path: CriticalPath) -> control_pb2.CriticalPath:
    kind = control_pb2.CriticalPath
    return kind(
        members=[
            kind.Share(member=s.member, frames=s.frames, wall_duration=duration(s.seconds))
            for s in path.members
        ],
        holds=[
            kind.Hold(
                holder=hold.holder,
                held=hold.held,
                coupling=hold.coupling,
                frames=hold.frames,
                wall_duration=duration(hold.seconds),
            )
            for hold in path.holds
        ],
        longest_frames=[
            kind.Frame(
                holder=frame.holder,
                held=frame.held,
                time_ns=frame.time_ns,
                wall_duration=duration(frame.seconds),
            )
            for frame in path.longest
        ],
        coordinator_duration=duration(path.coordinator_s),
        store_duration=duration(path.store_s),
        pace_duration=duration(path.pace_s),
        opening_duration=duration(path.opening_s),
        closing_duration=duration(path.closing_s),
    )


def write_results(
    path: CriticalPath | None, pace: Mapping[str, float | str] | None, stale: Iterable[Stale]
) -> str:
    """What a run is told with after its end, for the store."""
    told = control_pb2.WhyResponse(stale_values=map(encode_stale, stale))
    if path is not None:
        told.critical_path.CopyFrom(encode_path(path))
    if pace is not None:
        told.pace.CopyFrom(encode_pace(pace))
    return MessageToJson(told, indent=None)


def read_results(results: str, run: scenario_pb2.Run) -> control_pb2.WhyResponse:
    """The same again, for a reader; of an older broker's run there is nothing."""
    told = control_pb2.WhyResponse()
    if results:
        Parse(results, told, ignore_unknown_fields=True)
    told.run.CopyFrom(run)
    return told


def decode_path(message: control_pb2.CriticalPath) -> CriticalPath:
    return CriticalPath(
        tuple(Share(m.member, m.frames, _seconds(m.wall_duration)) for m in message.members),
        tuple(
            Hold(m.holder, m.held, m.coupling, m.frames, _seconds(m.wall_duration))
            for m in message.holds
        ),
        tuple(
            Longest(m.holder, m.held, m.time_ns, _seconds(m.wall_duration))
            for m in message.longest_frames
        ),
        _seconds(message.coordinator_duration),
        _seconds(message.store_duration),
        _seconds(message.pace_duration),
        _seconds(message.opening_duration),
        _seconds(message.closing_duration),
    )


# -- in words ----------------------------------------------------------------------------


def words(response: control_pb2.WhyResponse) -> str:
    """The answer to `multitwin why`: how the run stands, every member, and what all wait for."""
    run = response.run
    state = scenario_pb2.Run.State.Name(run.state).removeprefix("STATE_").lower()
    lines = [f"{run.name} ({run.scenario}): {state}, settled up to {instant(run.time_ns)}"]
    if run.state not in (scenario_pb2.Run.STATE_PENDING, scenario_pb2.Run.STATE_RUNNING):
        lines[0] = f"{run.name} ({run.scenario}) has ended: {state}, at {instant(run.time_ns)}"
        if run.HasField("error"):
            lines.append(f"  {run.error.reason}: {run.error.message}")
    if response.HasField("wait"):
        lines.append(f"it waits for {response.wait.cause}{_since(response.wait)}")
    if response.HasField("pace"):
        lines.append(_pace_words(response.pace))
    waits = {m.member: _decode(m) for m in response.members}
    told = {m.member: _member_words(m) for m in response.members}
    lines.extend(f"  {line}" for line in told.values())
    followed: set[str] = set()
    chains = sorted((chain(waits, name) for name in waits), key=len, reverse=True)
    for links in chains:
        names = [wait.member for wait in links]
        if len(names) > 1 and not followed.issuperset(names):
            followed.update(names)
            causes = [str(wait) for wait in links[:-1]]
            lines.append(f"because {'; '.join(causes)}; {told[names[-1]]}")
    for value in response.stale_values:
        at = instant(value.publish_time_ns) if value.publish_time_ns >= 0 else "never"
        lines.append(
            f"{value.member}.{value.variable} is stale: last published {at}, "
            f"may be {instant(value.bound_ns)} old"
        )
    if response.HasField("critical_path"):
        lines.extend(_path_words(decode_path(response.critical_path)))
    return "\n".join(lines)


def _decode(message: control_pb2.MemberWait) -> Wait:
    doing = {
        _Member.STATE_HELD_BACK: Doing.HELD_BACK,
        _Member.STATE_SLEEPING: Doing.SLEEPING,
        _Member.STATE_READY: Doing.READY,
    }.get(message.state, Doing.WORKING)
    return Wait(
        message.member,
        doing,
        message.time_ns,
        message.until_ns,
        message.by,
        message.coupling,
        message.by_ns,
    )


def _member_words(message: control_pb2.MemberWait) -> str:
    text = str(_decode(message))
    at = instant(message.time_ns)
    if message.state == _Member.STATE_PACED:
        text = f"{message.member} waits for the wall clock to come to its step at {at}"
    elif message.state == _Member.STATE_RECOVERING:
        recovery = message.recovery
        text = f"{message.member} is brought back for its step at {at}: {recovery.stage}"
        if recovery.HasField("error"):
            text += f" (attempt {recovery.attempt}; {recovery.error.reason}: "
            text += f"{recovery.error.message})"
    text += _since(message)
    if message.is_late:
        text += "; late, its values are marked as stale"
    if message.HasField("clock"):
        offset_s = _seconds(message.clock.clock_offset)
        round_trip_s = _seconds(message.clock.round_trip_duration)
        text += f"; its clock {offset_s * 1e3:+.1f} ms, {round_trip_s * 1e3:.1f} ms away"
        if message.clock.fault:
            text += f"; its values are marked as held: {message.clock.fault}"
    return text


def _since(message: control_pb2.MemberWait | control_pb2.RunWait) -> str:
    text = f" since {_seconds(message.elapsed_duration):.1f} s"
    if message.HasField("remaining_duration"):
        text += f", deadline in {_seconds(message.remaining_duration):.1f} s"
    return text


def _pace_words(pace: control_pb2.PaceReport) -> str:
    text = (
        f"paced: {pace.factor:g} s of the run per second; {_seconds(pace.lag_duration):.3f} s "
        f"late, at most {_seconds(pace.max_lag_duration):.3f} s, 99 of 100 steps at most "
        f"{_seconds(pace.p99_lag_duration):.3f} s; when late: {pace.when_late}"
    )
    if pace.when_late == "skip":
        text += f", {_seconds(pace.skipped_duration):.3f} s skipped"
    return text


def _path_words(path: CriticalPath) -> list[str]:
    lines = [f"critical path of {path.wall_s:.2f} s:"]
    parts = [(f"{s.member} ({s.frames} frames)", s.seconds) for s in path.members]
    parts += [
        ("coordinator", path.coordinator_s),
        ("store", path.store_s),
        ("wall clock", path.pace_s),
        ("opening sessions", path.opening_s),
        ("closing", path.closing_s),
    ]
    lines.extend(f"  {seconds:9.3f} s  {name}" for name, seconds in parts if seconds)
    for hold in path.holds[:10]:
        how = "its own next step" if hold.holder == hold.held else hold.coupling or "others"
        lines.append(
            f"  {hold.holder} held back {hold.held} {hold.frames} times, "
            f"{hold.seconds:.3f} s, through {how}"
        )
    return lines


def _seconds(message: Duration) -> float:
    return message.ToNanoseconds() / 1e9
