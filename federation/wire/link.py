"""Calls twins: one connection to a process, one stream, any number of sessions over it.

The way of a frame is short on purpose: it is turned into bytes once, those posted in one turn
of the event loop leave in one message, and the reader of the stream hands each answer straight
to whoever waits for it, with no task and no timer of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import (
    NOTHING,
    Description,
    LinearBlock,
    StepInput,
    StepResult,
    Vector,
    check_outputs,
)
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import caller, codec, footing, greeting, secure, status
from federation.wire.party import Part, Party

MEBIBYTE = 1 << 20

EXPECTED = "expected_frame"
"""The metadata that marks a refused frame: the number that the session goes on with."""

BATCH_BYTES = MEBIBYTE
"""Frames that wait together leave together up to this size; a larger one goes by itself."""

LONGEST_PAUSE_S = 1.0
"""Between two attempts to take up a stream: after a long absence it is not missed much longer."""

SERVICE = twin_pb2.DESCRIPTOR.services_by_name["Twin"].full_name
_FRAMES = twin_pb2.SessionRequest.DESCRIPTOR.fields_by_name["frames"].number
_OVERHEAD_BYTES = 64
"""More than a frame needs for its place in a message of several."""

_propagator = TraceContextTextMapPropagator()
_T = TypeVar("_T")

Outcome = list[StepResult] | FederationError
"""What became of some steps: a result for each, or why there is none."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How patient a link is and how much it carries.

    A twin that is silent for `answer_timeout_s` while it owes an answer counts as lost, so it
    must be longer than the longest frame. A broken stream is taken up again for at most
    `resume_timeout_s`.
    """

    connect_timeout_s: float = 5.0
    answer_timeout_s: float = 120.0
    resume_timeout_s: float = 1.0
    keepalive_s: float = 20.0
    """How long it may be silent before a sign of life is asked for."""
    keepalive_timeout_s: float = 20.0
    """How long that sign may take."""
    attempt_s: float = 0.2
    """How long one attempt to connect may take, at least; on a long line it takes round trips."""
    max_message_bytes: int = 64 * MEBIBYTE
    identity: str = ""
    """As whom the link comes, where the other side takes a word for it (`wire.caller`)."""


def for_a_look(options: LinkOptions) -> LinkOptions:
    """As patient as a line between cities may need it, when a run that goes on is looked at.

    An opening takes several round trips of seconds. A line that is silent is given up after 16 s,
    for TCP would try again when it likes, and taken up again for as long as the other city keeps
    the session.
    """
    return replace(
        options,
        connect_timeout_s=max(options.connect_timeout_s, 20.0),
        resume_timeout_s=max(options.resume_timeout_s, 55.0),
        keepalive_s=min(options.keepalive_s, 6.0),
        keepalive_timeout_s=min(options.keepalive_timeout_s, 10.0),
        attempt_s=max(options.attempt_s, 10.0),
    )


@dataclass(frozen=True, slots=True)
class Errand:
    """On what errand a link comes: what for, through which brokers, and for which kind of session
    of a city. Twins that are models of their own take no notice."""

    purpose: str = ""
    path: tuple[str, ...] = ()
    is_live: bool = False

    def encode(self) -> twin_pb2.Errand:
        mode = twin_pb2.Errand.MODE_LIVE if self.is_live else twin_pb2.Errand.MODE_WHAT_IF
        return twin_pb2.Errand(purpose=self.purpose, path=self.path, mode=mode)

    @classmethod
    def decode(cls, message: twin_pb2.Errand) -> Errand:
        is_live = message.mode == twin_pb2.Errand.MODE_LIVE
        return cls(message.purpose, tuple(message.path), is_live)


NO_ERRAND = Errand()


@dataclass(frozen=True, slots=True)
class Clock:
    """Another clock against ours: what it shows at our zero, within half the round trip."""

    offset_s: float
    round_trip_s: float


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """What both ends of a stream of small messages want of gRPC."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # one host or one rack: the window is large from the start, so no pings probe for it
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4 * MEBIBYTE),
    ]


@dataclass(slots=True, eq=False)
class _Owed:
    """A frame that waits for its answer."""

    data: bytes
    session: LinkSession
    answered: Callable[[twin_pb2.SessionResponse | FederationError], None]
    due_s: float
    next: _Owed | None = None
    """A frame of the same number that another link sent; answers come in the order of frames."""


class _Line:
    """A connection to one process, shared by all links to it: a channel and a stream in use."""

    def __init__(self, address: str, options: LinkOptions, expects: Party | None) -> None:
        self.address = address
        self.expects = expects
        self.options = options
        self.users = 0
        self.takes_batches = False
        self.metadata = caller.claim(options.identity)
        self.channel = secure.channel(
            address,
            expects,
            [
                *channel_options(options.max_message_bytes),
                ("grpc.keepalive_time_ms", int(options.keepalive_s * 1e3)),
                ("grpc.keepalive_timeout_ms", int(options.keepalive_timeout_s * 1e3)),
                ("grpc.initial_reconnect_backoff_ms", 50),
                # by this name gRPC has the time that an attempt to connect may take
                ("grpc.min_reconnect_backoff_ms", int(options.attempt_s * 1e3)),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # a proxy for the web is no way to reach a twin
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._open: grpc.aio.StreamStreamMultiCallable[bytes, twin_pb2.SessionResponse] = (
            self.channel.stream_stream(
                f"/{SERVICE}/Session",
                request_serializer=None,
                response_deserializer=twin_pb2.SessionResponse.FromString,
            )
        )
        self._loop = asyncio.get_running_loop()
        self._owed: dict[tuple[str, int], _Owed] = {}
        self._unsent: list[bytes] = []
        self._more: asyncio.Future[None] | None = None
        """The writer waits for this when nothing is unsent."""
        self._carrier: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def post(self, key: tuple[str, int], owed: _Owed) -> None:
        """Send a frame; its `answered` is called later, once, with the answer or an error."""
        last = self._owed.setdefault(key, owed)
        if last is not owed:
            while last.next is not None:
                last = last.next
            last.next = owed
        self._unsent.append(owed.data)
        if self._more is not None:
            self._more.set_result(None)
            self._more = None
        elif self._carrier is None:
            # in a context of its own: no span of whoever came first is that of all
            self._carrier = self._loop.create_task(self._carry(), context=contextvars.Context())
        if self._timer is None:
            self._timer = self._loop.call_at(owed.due_s, self._look_at_deadlines)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._carrier is not None:
            self._carrier.cancel()
            with suppress(asyncio.CancelledError):
                await self._carrier
        await self.channel.close()

    async def _carry(self) -> None:
        """Write and read until nothing is owed; what is unanswered when a stream breaks is sent
        over a new one.
        """
        give_up = pause = 0.0
        while True:
            self._unsent = [frame.data for owed in self._owed.values() for frame in _chain(owed)]
            call = self._open(metadata=self.metadata)
            writer = self._loop.create_task(self._write(call))
            heard = False
            try:
                while isinstance(response := await call.read(), twin_pb2.SessionResponse):
                    heard = True
                    if response.answers:
                        for answer in response.answers:
                            self._hear(answer)
                    else:
                        self._hear(response)
                failure: grpc.aio.AioRpcError | None = None
            except grpc.aio.AioRpcError as error:
                failure = error
            finally:
                writer.cancel()
                self._more = None
                call.cancel()
            if heard or not give_up:
                give_up, pause = self._loop.time() + self.options.resume_timeout_s, 0.0
            if self._loop.time() + pause > give_up or not _is_broken(failure):
                self._fail(partial(LinkSession.lost, failure=failure))
            if not self._owed:
                self._carrier = None
                return
            await asyncio.sleep(pause)
            pause = min(max(0.05, 2 * pause), LONGEST_PAUSE_S)

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Send what is unsent, all that there is at a time; ends with the stream."""
        try:
            while True:
                if not self._unsent:
                    self._more = self._loop.create_future()
                    await self._more
                await call.write(self._next_message())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader is told why

    def _next_message(self) -> bytes:
        unsent = self._unsent
        first = unsent[0]
        if len(unsent) == 1 or not self.takes_batches:
            del unsent[0]
            return first
        count, size, limit = 1, len(first), min(BATCH_BYTES, self.options.max_message_bytes)
        while count < len(unsent) and size + len(unsent[count]) + _OVERHEAD_BYTES * count < limit:
            size += len(unsent[count])
            count += 1
        together = unsent[:count]
        del unsent[:count]
        return first if count == 1 else codec.join(together, _FRAMES)

    def _hear(self, answer: twin_pb2.SessionResponse) -> None:
        key = (answer.session, answer.frame)
        owed = self._owed.pop(key, None)
        if owed is None:
            return
        if owed.next is not None:
            self._owed[key] = owed.next
        owed.answered(answer)

    def drop(self, link: Link, why: str) -> None:
        """Fail what this link still waits for."""
        self._fail(lambda session: link.lost(why) if session.link is link else None)

    def _fail(self, error_of: Callable[[LinkSession], FederationError | None]) -> None:
        """Fail every owed frame whose session has an error."""
        everything, self._owed = self._owed, {}
        failed: list[tuple[_Owed, FederationError]] = []
        for key, first in everything.items():
            kept: _Owed | None = None
            for owed in _chain(first):
                error = error_of(owed.session)
                if error is None:
                    owed.next = None
                    if kept is None:
                        self._owed[key] = owed
                    else:
                        kept.next = owed
                    kept = owed
                else:
                    failed.append((owed, error))
        for owed, error in failed:
            owed.answered(error)

    def _look_at_deadlines(self) -> None:
        """Fail what is overdue, and come back when the next frame can be."""
        self._timer = None
        now_s = self._loop.time()
        late = {id(f.session) for o in self._owed.values() for f in _chain(o) if f.due_s <= now_s}
        if late:
            why = f"no answer within {self.options.answer_timeout_s:g} s"
            self._fail(lambda s: s.link.lost(why) if id(s) in late else None)
        dues_s = [frame.due_s for owed in self._owed.values() for frame in _chain(owed)]
        if dues_s and self._timer is None:
            self._timer = self._loop.call_at(min(dues_s), self._look_at_deadlines)


def _chain(owed: _Owed) -> Iterator[_Owed]:
    one: _Owed | None = owed
    while one is not None:
        one, after = one, one.next
        yield one
        one = after


def _is_broken(failure: grpc.aio.AioRpcError | None) -> bool:
    """Whether the stream went and the twin may still be there; None is a stream that ended."""
    # gRPC reports a write to a stream that has just died as INTERNAL; and a stream ends when the
    # certificate expires that it was opened with, though another one may be there by now
    again = status.SILENCE | {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED}
    return failure is None or failure.code() in again


_lines: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[tuple[str, LinkOptions, Party | None], _Line]
] = weakref.WeakKeyDictionary()
"""The lines in use, by event loop; members of one host process share one."""


class Link:
    """A member's connection to the service of its twin.

    Links of one event loop to one address, with the same options, share a stream. Every failure
    is a `FederationError`: UNREACHABLE before the twin has answered once, MEMBER_LOST after.
    """

    def __init__(self, line: _Line, name: str, errand: Errand = NO_ERRAND) -> None:
        self.errand = errand
        self.address = line.address
        self.name = name
        self.options = line.options
        self.line = line
        self.limit_bytes = line.options.max_message_bytes
        """The largest frame that both sides take."""
        self.max_sessions = 0
        """How many sessions the process hosts at a time; 0 when it does not say."""
        self._stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(line.channel)
        self._description: Description | None = None
        self._sizes: dict[str, int] = {}
        self._serial = itertools.count(1)
        self._prefix = uuid.uuid4().hex
        self._is_closed = False

    @classmethod
    async def connect(
        cls,
        address: str,
        name: str,
        options: LinkOptions | None = None,
        expects: Party | Literal["by name"] | None = "by name",
        errand: Errand = NO_ERRAND,
    ) -> Link:
        """Connect to `address` (`host:port`) and read its description.

        `name` is for messages and, unless `expects` says more, whose certificate it takes over
        TLS. Fails with UNREACHABLE, with NOT_AUTHENTICATED when it is somebody else, or with
        UNSUPPORTED when what listens there is no twin.
        """
        options = options or LinkOptions()
        if expects == "by name":
            expects = footing.expected(Part.TWIN, name)
        lines = _lines.setdefault(asyncio.get_running_loop(), {})
        line = lines.get((address, options, expects))
        if line is None:
            line = lines[address, options, expects] = _Line(address, options, expects)
        line.users += 1
        link = cls(line, name, errand)
        try:
            async with asyncio.timeout(options.connect_timeout_s):
                await line.channel.channel_ready()
                await link.describe()
        except TimeoutError:
            await link.close()
            refusal = await greeting.plain_refusal(address)
            if refusal is not None:
                raise refusal from None
            raise ScenarioError(
                Reason.UNREACHABLE,
                f"nothing answers as {name} at {address} "
                f"(tried for {options.connect_timeout_s:g} s)",
                {"member": name, "address": address},
            ) from None
        except BaseException:
            await link.close()
            raise
        return link

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def describe(self) -> Description:
        """What the twin is; asked once and remembered."""
        if self._description is None:
            async with self._calling():
                answer = await self._stub.Describe(
                    twin_pb2.DescribeRequest(errand=self._errand()),
                    timeout=self.options.answer_timeout_s,
                    metadata=self.line.metadata,
                )
            description = codec.decode_description(answer.description)
            self.line.takes_batches = answer.takes_batches
            self.max_sessions = answer.max_sessions
            if answer.max_message_bytes:
                self.limit_bytes = min(self.limit_bytes, answer.max_message_bytes)
            self._sizes = description.output_sizes()
            self._description = description
        return self._description

    async def clock(self) -> Clock | None:
        """The twin's clock against ours, from one exchange; None when it does not tell.

        With the times at which a question leaves, comes, is answered and the answer comes, what
        is on the way equally long there and back drops out (Mills, RFC 5905, section 8). Fails
        when the twin is not there.
        """
        asked_ns = time.time_ns()
        try:
            async with self._calling():
                answer = await self._stub.ReadClock(
                    twin_pb2.ReadClockRequest(),
                    timeout=self.options.connect_timeout_s,
                    metadata=self.line.metadata,
                )
        except TwinError as error:
            if error.reason is Reason.UNSUPPORTED:
                return None
            raise
        heard_ns = time.time_ns()
        came_ns, left_ns = answer.receive_time.ToNanoseconds(), answer.send_time.ToNanoseconds()
        offset_ns = ((came_ns - asked_ns) + (left_ns - heard_ns)) / 2
        # it can't have taken less than nothing, nor longer than we have waited, whatever it says
        took_ns = min(max(left_ns - came_ns, 0), heard_ns - asked_ns)
        return Clock(offset_ns / 1e9, (heard_ns - asked_ns - took_ns) / 1e9)

    async def session(
        self,
        member: str,
        seed: int,
        parameters: Mapping[str, float],
        epoch: int,
        start_ns: int = 0,
        run: str = "",
    ) -> LinkSession:
        """Open a session that begins at `start_ns`. Events are named `member/serial`.

        In a session for a `run` others may act on the twin, as it lets them.
        """
        session_id = f"{self._prefix}-{next(self._serial)}"
        session = await self.resume(session_id, member, 0, epoch)
        await session.open(seed, parameters, start_ns, run)
        return session

    async def resume(self, session_id: str, member: str, frame: int, epoch: int) -> LinkSession:
        """Carry on a session that another link opened, after its last answered frame.

        With a higher epoch than before, whoever had it is shut out. If frame `frame + 1` was
        already carried out for them, the first call here gets its answer.
        """
        await self.describe()
        return LinkSession(self, session_id, member, frame, epoch, self._sizes)

    async def flexibility(self, session: str, periods_ns: Sequence[int]) -> LinearBlock | None:
        """What the session with this id could do; None when the twin has nothing to offer."""
        try:
            async with self._calling():
                answer = await self._stub.Flexibility(
                    twin_pb2.FlexibilityRequest(session=session, periods_ns=periods_ns),
                    timeout=self.options.answer_timeout_s,
                    metadata=self.line.metadata,
                )
        except TwinError as error:
            if error.reason is Reason.UNSUPPORTED:
                return None
            raise
        return codec.decode_block(answer.block) if answer.HasField("block") else None

    def _errand(self) -> twin_pb2.Errand | None:
        return None if self.errand == NO_ERRAND else self.errand.encode()

    async def close(self) -> None:
        """Give the connection up. Sessions that were not closed linger at the twin for a while."""
        if self._is_closed:
            return
        self._is_closed = True
        line = self.line
        line.drop(self, "the link was closed")
        line.users -= 1
        if line.users == 0:
            del _lines[asyncio.get_running_loop()][line.address, line.options, line.expects]
            await line.close()

    def lost(self, why: str) -> TwinError:
        return TwinError(Reason.MEMBER_LOST, f"{self.who} was lost: {why}", {"member": self.name})

    @property
    def who(self) -> str:
        return f"{self.name} at {self.address}"

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            lost = self._description is not None
            raise status.from_rpc(error, self.who, lost=lost) from error


class LinkSession:
    """One session at a twin. One call at a time; a failure is a `FederationError`.

    Once the twin is lost, every call fails with the same MEMBER_LOST.
    """

    def __init__(
        self,
        link: Link,
        id: str,
        member: str,
        frame: int,
        epoch: int,
        sizes: Mapping[str, int],
    ) -> None:
        self.id = id
        self.member = member
        self.frame = frame
        """The number of the last frame that was sent."""
        self.epoch = epoch
        self.done: tuple[StepResult, ...] = ()
        """What the last `advance` did, also when it failed half-way."""
        self.link = link
        self._sizes = sizes
        self._over: FederationError | None = None

    def begin(self, steps: Sequence[StepInput], done: Callable[[Outcome], None]) -> None:
        """Send these steps in one frame. `done` is called once from the event loop, never from
        inside `begin`, with a result for each step or with what went wrong.

        That the results are for the steps asked and keep to the description is for the caller
        to check; `advance` does. The frame is of the trace whose span is current.
        """
        self.done = ()
        request = twin_pb2.SessionRequest()
        add = request.advance.steps.add
        for step in steps:
            codec.write_step_input(add(), step)
        if not steps:
            request.advance.SetInParent()
        self._post(request, "advanced", lambda answer: done(self._results(answer)))

    def _results(self, answer: twin_pb2.SessionResponse | FederationError) -> Outcome:
        if isinstance(answer, FederationError):
            return answer
        try:
            results = []
            for message in answer.advanced.results:
                results.append(codec.decode_step_result(message))
                self.done = (*self.done, results[-1])
        except FederationError as error:
            return error
        if answer.HasField("error"):
            return self._blame(status.decode_error(answer.error))
        return results

    async def advance(self, steps: Sequence[StepInput]) -> list[StepResult]:
        """Do these steps in one frame; the answer has one result for each.

        When a step fails, `done` has the results of those before it. What the twin publishes
        is held to its description, in whatever language it is written.
        """
        outcome: Outcome = await _later(lambda done: self.begin(steps, done))
        done, self.done = self.done, ()
        for step, result in zip(steps, done, strict=False):
            self._check(step, result)
            self.done = (*self.done, result)
        if isinstance(outcome, FederationError):
            raise outcome
        if len(outcome) != len(steps):
            raise self._broken(f"answered {len(steps)} steps with {len(outcome)} results")
        return outcome

    async def snapshot(self) -> bytes:
        """The whole state of the session, for `restore`. Fails with UNSUPPORTED."""
        request = twin_pb2.SessionRequest(snapshot=twin_pb2.SessionRequest.Snapshot())
        return (await self._ask(request, "snapshot_taken")).snapshot_taken.state

    async def restore(self, state: bytes) -> None:
        """Continue from a state of a session of the same twin, seed and parameters."""
        request = twin_pb2.SessionRequest(restore=twin_pb2.SessionRequest.Restore(state=state))
        await self._ask(request, "restored")

    async def diverge(
        self, state: bytes, time_ns: int, believed: Mapping[str, Vector] = NOTHING
    ) -> int | None:
        """Continue from a state in one of its futures (see `Twin.diverge`), that of the seed and
        the parameters that this session was opened with; the next instant that is wanted.

        Fails with UNSUPPORTED, also when the twin is older than this.
        """
        restore = twin_pb2.SessionRequest.Restore(state=state)
        restore.diverge.time_ns = time_ns
        codec.write_values(restore.diverge.believed, believed)
        answer = await self._ask(twin_pb2.SessionRequest(restore=restore), "restored")
        if not answer.restored.is_diverged:
            raise TwinError(
                Reason.UNSUPPORTED,
                f"{self.member} can't have other futures: its service is older than that",
                {"member": self.member},
            )
        return answer.restored.next_ns if answer.restored.HasField("next_ns") else None

    async def flexibility(self, periods_ns: Sequence[int]) -> LinearBlock | None:
        """What the session could do; None when the twin has nothing to offer."""
        return await self.link.flexibility(self.id, periods_ns)

    async def close(self) -> None:
        """End the session; one that is lost has ended already."""
        if self._over is None:
            with suppress(TwinError):
                request = twin_pb2.SessionRequest(close=twin_pb2.SessionRequest.Close())
                await self._ask(request, "closed")
            self._over = TwinError(
                Reason.MEMBER_LOST,
                f"the session of {self.member} is closed",
                {"member": self.member},
            )

    async def open(
        self, seed: int, parameters: Mapping[str, float], start_ns: int = 0, run: str = ""
    ) -> None:
        """Begin at `start_ns`; `Link.session` does this."""
        opened = twin_pb2.SessionRequest.Open(
            member=self.member, seed=seed, parameters=parameters, start_ns=start_ns, run=run
        )
        if self.link.errand != NO_ERRAND:
            opened.errand.CopyFrom(self.link.errand.encode())
        await self._ask(twin_pb2.SessionRequest(open=opened), "opened")

    async def _ask(
        self, request: twin_pb2.SessionRequest, outcome: str
    ) -> twin_pb2.SessionResponse:
        answer: twin_pb2.SessionResponse | FederationError = await _later(
            lambda done: self._post(request, outcome, done)
        )
        if isinstance(answer, FederationError):
            raise answer
        return answer

    def _post(
        self,
        request: twin_pb2.SessionRequest,
        outcome: str,
        done: Callable[[twin_pb2.SessionResponse | FederationError], None],
    ) -> None:
        """Send one frame. `done` gets its answer, which has the `outcome` that fits or, to an
        advance that failed half-way, that and an error; else it gets what went wrong.
        """
        line = self.link.line
        loop = asyncio.get_running_loop()
        if self._over is not None:
            loop.call_soon(done, _anew(self._over))
            return
        frame = self.frame + 1
        request.session = self.id
        request.frame = frame
        request.epoch = self.epoch
        if traceparent := _traceparent():
            request.traceparent = traceparent
        data = request.SerializeToString()
        if len(data) > self.link.limit_bytes:
            too_large = ScenarioError(
                Reason.MESSAGE_TOO_LARGE,
                f"a frame to {self.member} has {len(data)} bytes; "
                f"the limit is {self.link.limit_bytes}",
                {"member": self.member, "bytes": str(len(data))},
            )
            loop.call_soon(done, too_large)
            return
        self.frame = frame
        due_s = loop.time() + self.link.options.answer_timeout_s
        answered = partial(self._answered, frame, outcome, done)
        line.post((self.id, frame), _Owed(data, self, answered, due_s))

    def _answered(
        self,
        frame: int,
        wanted: str,
        done: Callable[[twin_pb2.SessionResponse | FederationError], None],
        answer: twin_pb2.SessionResponse | FederationError,
    ) -> None:
        if isinstance(answer, FederationError):
            self._over = self._blame(answer)
            done(answer)
        elif answer.WhichOneof("outcome") == wanted:
            # an advance that failed half-way has its error beside its outcome
            done(answer)
        elif not answer.HasField("error"):
            done(self._broken(f"answered {_COMMANDS[wanted]} with {answer.WhichOneof('outcome')}"))
        else:
            expected = answer.error.metadata.get(EXPECTED)
            if expected is not None:
                self.frame -= 1
            if expected == "1" and frame > 1:
                self._over = TwinError(
                    Reason.MEMBER_LOST,
                    f"{self.member} has forgotten its session: its process was restarted",
                    {"member": self.member},
                )
                done(_anew(self._over))
            else:
                done(self._blame(status.decode_error(answer.error)))

    def lost(self, failure: grpc.aio.AioRpcError | None) -> FederationError:
        """What a stream that could not be taken up again means for this session."""
        if failure is None:
            return self.link.lost("it ended the stream")
        return status.from_rpc(failure, self.link.who, lost=True)

    def _check(self, step: StepInput, result: StepResult) -> None:
        if (result.time_ns, result.micro) != (step.time_ns, step.micro):
            raise self._broken(
                f"answered the step at {step.time_ns} ns with one at {result.time_ns} ns"
            )
        if result.next_ns is not None and result.next_ns <= result.time_ns:
            raise TwinError(
                Reason.TIME_REGRESSION,
                f"{self.member} asked at {result.time_ns} ns to wake at {result.next_ns} ns",
                {"member": self.member},
            )
        check_outputs(self.member, self._sizes, result)

    def _broken(self, how: str) -> TwinError:
        return TwinError(Reason.INVALID_FRAME, f"{self.member} {how}", {"member": self.member})

    def _blame(self, error: FederationError) -> FederationError:
        error.metadata.setdefault("member", self.member)
        return error


_COMMANDS = {
    "opened": "open",
    "advanced": "advance",
    "snapshot_taken": "snapshot",
    "restored": "restore",
    "closed": "close",
}
"""Per outcome the command that it answers."""


def _later(begin: Callable[[Callable[[_T], None]], None]) -> asyncio.Future[_T]:
    """What will be handed to the callback that `begin` is given."""
    future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

    def done(value: _T) -> None:
        if not future.done():
            future.set_result(value)

    begin(done)
    return future


def _anew(error: FederationError) -> FederationError:
    """The same error for another raise, with a traceback of its own."""
    return type(error)(error.reason, error.message, error.metadata)


def _traceparent() -> str:
    """The trace context of the current span; empty, at no cost, when there is none."""
    if trace.get_current_span() is trace.INVALID_SPAN:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")
