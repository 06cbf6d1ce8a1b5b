"""What the contract promises, a check for each promise; every one opens sessions of its own, and
closes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from federation.conformance.caller import (
    ANSWER_S,
    SEED,
    STEPS,
    BrokenError,
    Graded,
    NotOfferedError,
    Session,
)
from federation.core.coupling import parse_unit
from federation.errors import FederationError, Reason
from federation.twin import HOUR_NS, SYSTEM, StepInput
from federation.v1 import twin_pb2
from federation.wire import codec, status
from federation.wire.link import EXPECTED

MOST_SESSIONS = 16
"""A service that hosts more at a time is not filled up."""


def _sound(graded: Graded) -> str:
    """Raises BrokenError with all that a description contradicts itself in."""
    d = graded.description
    wrong = [f"no {what}" for what in ("model", "domain") if not getattr(d, what)]
    if d.time.period_ns < 0 or d.time.offset_ns < 0:
        wrong.append("a time policy below 0")
    names = [v.name for v in d.variables]
    for what, all_names in (
        ("variable", names),
        ("parameter", [p.name for p in d.parameters]),
        ("actuator", [a.name for a in d.actuators]),
        ("entity", [f"{e.kind}/{e.id}" for e in d.entities]),
    ):
        twice = sorted({name for name in all_names if all_names.count(name) > 1})
        wrong += [f"{what} {name} stands there twice" for name in twice]
    kinds = [(v.name, v.kind) for v in d.variables] + [(a.name, a.kind) for a in d.actuators]
    for name, kind in kinds:
        if kind != SYSTEM and not d.ids(kind):
            wrong.append(f"{name} is over {kind}, of which there is no entity")
    for p in d.parameters:
        if not (math.isfinite(p.default) and p.low <= p.default <= p.high):
            wrong.append(f"the default of {p.name} is outside its range")
    for a in d.actuators:
        if not a.low <= a.safe_default <= a.high:
            wrong.append(f"the safe default of {a.name} is outside its range")
    scalars = {v.name for v in d.outputs() if v.kind == SYSTEM}
    wrong += [f"the figure {k} is no output of the system" for k in d.kpis if k not in scalars]
    if wrong:
        raise BrokenError("; ".join(wrong))
    return f"{d.model} {d.version}: {len(d.variables)} variables, {len(d.entities)} entities"


async def describes_itself(graded: Graded) -> str:
    again = await graded.describe()
    same = again.description.SerializeToString(deterministic=True)
    if same != graded.described.description.SerializeToString(deterministic=True):
        raise BrokenError("it describes itself otherwise when it is asked again")
    return _sound(graded)


async def knows_its_units(graded: Graded) -> str:
    d = graded.description
    wrong = []
    units = [(v.name, v.unit) for v in d.variables] + [(p.name, p.unit) for p in d.parameters]
    for name, unit in (*units, *((a.name, a.unit) for a in d.actuators)):
        try:
            parse_unit(unit)
        except FederationError as error:
            wrong.append(f"{name}: {error.message}")
    if wrong:
        raise BrokenError("; ".join(wrong))
    return ""


async def opens_steps_and_closes(graded: Graded) -> str:
    async with graded.session() as session:
        made = await session.steps()
        await session.close()
        late = session.stepping(StepInput(session.last_ns + 1))
        error = await session.refusal(late)
        _same_reason(error, Reason.INVALID_FRAME, "a step after the end")
    return f"{len(made)} steps"


async def gives_the_same_for_the_same_seed(graded: Graded) -> str:
    found = []
    for _ in range(2):
        async with graded.session() as session:
            found.append(await session.steps())
    if found[0] != found[1]:
        raise BrokenError(f"two sessions of seed {SEED} differ at {_first(*found)}")
    return ""


async def keeps_sessions_apart(graded: Graded) -> str:
    if graded.described.max_sessions == 1:
        raise NotOfferedError("it hosts one session at a time")
    async with graded.session() as alone:
        expected = await alone.steps()
    async with graded.session() as one, graded.session(SEED + 1) as other:
        found = []
        for _ in range(STEPS):
            found += await one.steps(1)
            await other.steps(1)
    if found != expected:
        raise BrokenError(f"beside another session it differs at {_first(found, expected)}")
    return ""


async def goes_on_from_a_snapshot(graded: Graded) -> str:
    async with graded.session() as first:
        await first.steps(STEPS // 2)
        state = await first.snapshot()
        then_ns = first.next_ns
        expected = await first.steps()
    async with graded.session() as second:
        answer = await second.done(second.restoring(state))
        if not answer.HasField("restored"):
            raise BrokenError(f"a restore was answered with {answer.WhichOneof('outcome')}")
        second.next_ns = then_ns
        found = await second.steps()
    if found != expected:
        raise BrokenError(f"after a restore it differs at {_first(found, expected)}")
    return f"{len(state)} bytes"


async def refuses_a_state_of_something_else(graded: Graded) -> str:
    async with graded.session() as session:
        await session.snapshot()
        before = await session.steps(1)
        error = await session.refusal(session.restoring(b"no state of anything"))
        _same_reason(error, Reason.INVALID_FRAME, "a restore of bytes that are no state")
    return f"{len(before)} step before"


async def repeats_answers(graded: Graded) -> str:
    async with graded.session() as alone:
        expected = await alone.steps()
    async with graded.session() as session:
        found = await session.steps(2)
        request = session.stepping(StepInput(_due(session)))
        first, again, once_more = await session.stream.ask(request, request, request)
        if first.HasField("error"):
            raise status.decode_error(first.error)
        if first != again or first != once_more:
            raise BrokenError("a repeated frame was answered otherwise than the first time")
        session.frame = request.frame
        found.append(first.advanced.results[0].SerializeToString(deterministic=True))
        _went_on(session, _due(session), first)
        found += await session.steps(STEPS - 3)
    if found != expected:
        raise BrokenError(f"after a repeated frame it differs at {_first(found, expected)}")
    return ""


async def refuses_frames_that_are_not_due(graded: Graded) -> str:
    async with graded.session(epoch=5) as alone:
        expected = await alone.steps()
    async with graded.session(epoch=5) as session:
        found = await session.steps(3)
        due_ns = _due(session)
        ahead = session.stepping(StepInput(due_ns))
        ahead.frame += 5
        backwards = session.stepping(StepInput(session.last_ns), StepInput(session.last_ns - 1))
        stale = session.stepping(StepInput(due_ns))
        stale.epoch = 4
        unknown = session.stepping(StepInput(due_ns))
        unknown.session = f"{session.id}-unknown"
        for request, reason, what in (
            (ahead, Reason.INVALID_FRAME, "a frame that is not the next"),
            (backwards, Reason.INVALID_FRAME, "a step before the last one"),
            (session.request(), Reason.INVALID_FRAME, "a frame without a command"),
            (stale, Reason.STALE_EPOCH, "a frame of an epoch that is over"),
            (unknown, Reason.INVALID_FRAME, "a frame to a session that nobody opened"),
        ):
            (answer,) = await session.stream.ask(request)
            if not answer.HasField("error"):
                raise BrokenError(f"{what} was not refused")
            error = status.decode_error(answer.error)
            _same_reason(error, reason, what)
            wanted = "1" if request is unknown else str(session.frame + 1)
            if error.metadata.get(EXPECTED) != wanted:
                raise BrokenError(f"the refusal of {what} does not say that {wanted} is expected")
        found += await session.steps(STEPS - 3)
    if found != expected:
        raise BrokenError(f"refused frames left a trace: it differs at {_first(found, expected)}")
    return ""


async def refuses_bad_input(graded: Graded) -> str:
    """With the reason of the contract; and where it has snapshots, it can be put back."""
    d = graded.description
    bad: list[tuple[StepInput, Reason, str]] = [
        (
            StepInput(0, 0, {"no-such-variable": np.zeros(1)}),
            Reason.UNKNOWN_VARIABLE,
            "an input that it does not have",
        )
    ]
    for output in d.outputs()[:1]:
        size = len(d.ids(output.kind))
        given = StepInput(0, 0, {output.name: np.zeros(size)})
        bad.append((given, Reason.UNKNOWN_VARIABLE, "an output as an input"))
    for variable in d.inputs()[:1]:
        size = len(d.ids(variable.kind))
        bad += [
            (
                StepInput(0, 0, {variable.name: np.zeros(size + 1)}),
                Reason.WRONG_SHAPE,
                f"{size + 1} values where there are {size} entities",
            ),
            (StepInput(0, 0, {variable.name: np.full(size, np.nan)}), Reason.NOT_FINITE, "NaN"),
            (
                StepInput(0, 0, {variable.name: np.full(size, np.inf)}),
                Reason.NOT_FINITE,
                "an infinity",
            ),
        ]
    async with graded.session() as alone:
        expected = await alone.steps()
    for step, reason, what in bad:
        async with graded.session() as session:
            found = await session.steps(2)
            try:
                state = await session.snapshot()
            except NotOfferedError:
                state = b""
            due_ns = _due(session)
            request = session.stepping()
            codec_step = request.advance.steps.add()
            _write(codec_step, step._replace(time_ns=due_ns))
            _same_reason(await session.refusal(request), reason, what)
            if state:
                await session.done(session.restoring(state))
                session.next_ns = due_ns
                found += await session.steps(STEPS - 2)
                if found != expected:
                    raise BrokenError(
                        f"{what} has left a trace: it differs at {_first(found, expected)}"
                    )
    return f"{len(bad)} kinds"


def _write(message: twin_pb2.StepInput, step: StepInput) -> None:
    """A step as a careless caller sends it: our own codec would refuse to."""
    message.time_ns = step.time_ns
    for name, value in step.inputs.items():
        message.inputs.add(variable=name, values=np.asarray(value, "<f8").tobytes())


async def refuses_parameters_that_it_does_not_have(graded: Graded) -> str:
    """A session that was not opened may be opened properly afterwards, under another id."""
    for name, value, reason in (
        ("no-such-parameter", 1.0, Reason.UNKNOWN_PARAMETER),
        *((p.name, math.nan, Reason.NOT_FINITE) for p in graded.description.parameters[:1]),
    ):
        async with graded.stream() as stream:
            session = Session(graded, stream, f"{graded._prefix}-{next(graded._serial)}", 1)
            request = session.opening(SEED, **{name: value})
            what = f"the parameter {name} of {value:g}"
            _same_reason(await session.refusal(request), reason, what)
    async with graded.session() as session:
        await session.steps(1)
    return ""


async def takes_a_session_up_over_another_stream(graded: Graded) -> str:
    async with graded.session() as alone:
        expected = await alone.steps()
    async with graded.stream() as first:
        session = Session(graded, first, f"{graded._prefix}-{next(graded._serial)}", 1)
        await session.open(SEED)
        found = await session.steps(STEPS // 2)
    async with graded.stream() as second:
        session.stream = second
        found += await session.steps(STEPS - STEPS // 2)
        await session.close()
    if found != expected:
        raise BrokenError(f"over another stream it differs at {_first(found, expected)}")
    return ""


async def lets_a_higher_epoch_take_over(graded: Graded) -> str:
    async with graded.session(epoch=1) as session:
        await session.steps(1)
        session.epoch = 9
        await session.steps(1)
        old = session.stepping(StepInput(_due(session)))
        old.epoch = 1
        (answer,) = await session.stream.ask(old)
        if not answer.HasField("error"):
            raise BrokenError("a caller of an epoch that is over was not shut out")
        _same_reason(status.decode_error(answer.error), Reason.STALE_EPOCH, "the earlier epoch")
        await session.steps(1)
    return ""


async def takes_frames_together(graded: Graded) -> str:
    if not graded.described.takes_batches:
        raise NotOfferedError("it takes one frame at a time")
    async with graded.session() as alone:
        expected = await alone.steps(2)
    if len(expected) < 2:
        raise NotOfferedError("it makes one step only")
    async with graded.session() as session:
        first = session.stepping(StepInput(_due(session)))
        wrong = session.stepping(StepInput(_due(session)))
        wrong.frame += 7
        answers = await session.stream.together(first, wrong)
        if answers[0].HasField("error") or not answers[1].HasField("error"):
            raise BrokenError("of two frames in one message not each has got its own answer")
        session.frame += 1
        found = [answers[0].advanced.results[0].SerializeToString(deterministic=True)]
        if found != expected[:1]:
            raise BrokenError("a frame that came with another one was answered otherwise")
    return ""


async def hosts_as_many_sessions_as_it_says(graded: Graded) -> str:
    limit = graded.described.max_sessions
    if not limit:
        raise NotOfferedError("it names no limit")
    if limit > MOST_SESSIONS:
        raise NotOfferedError(f"it hosts {limit}, which was not tried")
    async with graded.stream() as stream:
        opened = []
        try:
            for _ in range(limit):
                session = Session(graded, stream, f"{graded._prefix}-{next(graded._serial)}", 1)
                await session.open(SEED)
                opened.append(session)
            more = Session(graded, stream, f"{graded._prefix}-{next(graded._serial)}", 1)
            error = await more.refusal(more.opening(SEED))
            if error.reason not in (Reason.TOO_MANY_SESSIONS, Reason.PEER_LIMIT):
                _same_reason(error, Reason.TOO_MANY_SESSIONS, "one session too many")
        finally:
            for session in opened:
                await session.close()
    async with graded.session() as session:  # there is room again
        await session.steps(1)
    return f"{limit}"


async def lets_nobody_act_unsigned(graded: Graded) -> str:
    async with graded.session() as session:
        await session.steps(1)
        requests: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            (
                "Select",
                lambda: graded.stub.Select(
                    twin_pb2.SelectRequest(), metadata=graded.metadata, timeout=ANSWER_S
                ),
            ),
            (
                "Halt",
                lambda: graded.stub.Halt(
                    twin_pb2.HaltRequest(), metadata=graded.metadata, timeout=ANSWER_S
                ),
            ),
        ]
        refused = 0
        for rpc, ask in requests:
            try:
                await graded.call(ask())
            except FederationError as error:
                if error.reason is Reason.UNSUPPORTED:
                    continue
                if error.reason not in (Reason.NOT_AUTHORISED, Reason.NOT_EXPORTED):
                    _same_reason(error, Reason.NOT_AUTHORISED, f"{rpc} that nobody has signed")
                refused += 1
            else:
                raise BrokenError(f"{rpc} that nobody has signed was carried out")
    if not refused:
        raise NotOfferedError("nobody can act on it from outside of a run")
    return ""


async def says_what_it_could_do(graded: Graded) -> str:
    async with graded.session() as session:
        ask = twin_pb2.FlexibilityRequest(session=session.id, periods_ns=[HOUR_NS] * 2)
        answer = graded.stub.Flexibility(ask, metadata=graded.metadata, timeout=ANSWER_S)
        found = await graded.call_if_offered(answer, "it says nothing of that")
        for wrong, what in (
            (twin_pb2.FlexibilityRequest(session="nobody's", periods_ns=[1]), "an unknown session"),
            (twin_pb2.FlexibilityRequest(session=session.id), "no periods"),
            (twin_pb2.FlexibilityRequest(session=session.id, periods_ns=[0]), "a period of 0 ns"),
        ):
            try:
                await graded.call(
                    graded.stub.Flexibility(wrong, metadata=graded.metadata, timeout=ANSWER_S)
                )
            except FederationError as error:
                _same_reason(error, Reason.INVALID_FRAME, what)
            else:
                raise BrokenError(f"a question with {what} was not refused")
        if not found.HasField("block"):
            raise NotOfferedError("it has nothing to offer")
        block = codec.decode_block(found.block)
        for port in block.ports:
            if port.columns.shape != (len(port.entities), 2):
                raise BrokenError(f"the port {port.name} is not over two periods")
    return f"{len(block.columns)} columns, {len(block.ports)} ports"


async def tells_the_time(graded: Graded) -> str:
    ask = twin_pb2.ReadClockRequest()
    answer = graded.stub.ReadClock(ask, metadata=graded.metadata, timeout=ANSWER_S)
    found = await graded.call_if_offered(answer, "its clock is not known")
    if found.send_time.ToNanoseconds() < found.receive_time.ToNanoseconds():
        raise BrokenError("it has answered before it was asked")
    return ""


async def gives_nobody_what_it_does_not_export(graded: Graded) -> str:
    """A caller without a name gets nothing of a city, and what came through it not again."""
    city = graded.description.model.removeprefix("city-")
    if graded.description.domain != "city" or city == graded.description.model:
        raise NotOfferedError("it is no city")
    looped = twin_pb2.Errand(
        purpose=graded.errand.purpose, path=[city, "elsewhere"], mode=graded.errand.mode
    )
    told = ["a request that came through it"]
    calls: list[tuple[twin_pb2.Errand, Sequence[tuple[str, str]], tuple[Reason, ...]]]
    calls = [(looped, graded.metadata, (Reason.PATH_LOOP,))]
    if graded.metadata:  # over TLS nobody can be nobody
        calls.append((graded.errand, (), (Reason.NOT_EXPORTED, Reason.NOT_AUTHENTICATED)))
        told.append("a caller without a name")
    for what, (errand, metadata, reasons) in zip(told, calls, strict=True):
        request = twin_pb2.DescribeRequest(errand=errand)
        try:
            await graded.call(graded.stub.Describe(request, metadata=metadata, timeout=ANSWER_S))
        except FederationError as error:
            if error.reason not in reasons:
                _same_reason(error, reasons[0], what)
        else:
            raise BrokenError(f"{what} was not refused")
    return ", ".join(told)


def _same_reason(error: FederationError, wanted: Reason, what: str) -> None:
    if error.reason is not wanted:
        text = f"{what} is refused with {error.reason}, not with {wanted}: {error.message}"
        raise BrokenError(text)


def _due(session: Session) -> int:
    if session.next_ns is None:
        raise NotOfferedError("it makes no more steps by itself")
    return session.next_ns


def _went_on(session: Session, time_ns: int, answer: twin_pb2.SessionResponse) -> None:
    """Note a step that was made by hand."""
    result = codec.decode_step_result(answer.advanced.results[0])
    period_ns = session.graded.description.time.period_ns
    session.last_ns = time_ns
    session.next_ns = time_ns + period_ns if period_ns else result.next_ns


def _first(found: Sequence[bytes], expected: Sequence[bytes]) -> str:
    for number, (one, other) in enumerate(itertools.zip_longest(found, expected), 1):
        if one != other:
            return f"step {number}"
    return "no step"


CHECKS: Sequence[tuple[Callable[[Graded], Awaitable[str]], str]] = (
    (
        describes_itself,
        "say in Describe what the model has, the same each time, and nothing that it has not",
    ),
    (knows_its_units, "give units as pint reads them: MW, m^3/h, 1 for a pure number"),
    (opens_steps_and_closes, "answer Open, each Advance with a result per step, and Close"),
    (
        gives_the_same_for_the_same_seed,
        "draw from the session's seed alone: no clock, no shared generator, no order of a set",
    ),
    (keeps_sessions_apart, "keep everything that changes in the session, nothing in the process"),
    (
        goes_on_from_a_snapshot,
        "put all that changes into the snapshot, generators too; restore it into a fresh session",
    ),
    (refuses_a_state_of_something_else, "check a state before it is taken: INVALID_FRAME"),
    (repeats_answers, "keep the last answer of a session, and give it again for its frame"),
    (
        refuses_frames_that_are_not_due,
        "check number, epoch, command and instants before anything is done, and say expected_frame",
    ),
    (refuses_bad_input, "check names, sizes and numbers of inputs before the model sees them"),
    (refuses_parameters_that_it_does_not_have, "check parameters when a session is opened"),
    (
        takes_a_session_up_over_another_stream,
        "keep sessions when their stream ends, for a while at least",
    ),
    (
        lets_a_higher_epoch_take_over,
        "remember the highest epoch of a session, and refuse lower ones",
    ),
    (takes_frames_together, "answer each frame of a message of several for itself"),
    (hosts_as_many_sessions_as_it_says, "refuse more sessions than max_sessions, with a reason"),
    (lets_nobody_act_unsigned, "check the signature of every order before anything else"),
    (says_what_it_could_do, "give a block whose vectors fit each other and the periods asked for"),
    (tells_the_time, "note when a question came before it is answered"),
    (gives_nobody_what_it_does_not_export, "judge every caller by the policy, also for Describe"),
)
"""Every check, and what to do when it fails."""
