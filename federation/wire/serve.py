"""Turns a Python twin into a service that hosts any number of its sessions."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.telemetry import is_tracing, tracer
from federation.twin import Description, Twin, blame
from federation.twin import Session as ModelSession
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import codec, footing, secure, status
from federation.wire.access import SERVED_BY
from federation.wire.acting import Acting, SeatedDesk, Standing, done_with, encode_receipt
from federation.wire.credentials import Keyring
from federation.wire.enrol import keep_name
from federation.wire.gate import Gate
from federation.wire.link import BATCH_BYTES, EXPECTED, MEBIBYTE, SERVICE, channel_options
from federation.wire.malformed import Malformed, SoundRequests
from federation.wire.party import Part
from federation.wire.phases import Phases
from federation.wire.probes import probed

HANDSHAKE_MS = 10_000
"""How long who connects may take to say hello; who says nothing holds a connection no longer."""

INLINE_S = 5e-3
"""What a process of a twin's own may spend on a frame in its event loop."""

BLOCKED_S = 0.05
"""How long a step may seem to take on a busy machine that takes almost no time of its own."""

ORDERS = ("Select", "Operate", "Confirm", "Release", "Halt", "Lift")
"""The RPCs whose request is a signed order and whose answer a receipt."""

_ANSWERS = twin_pb2.SessionResponse.DESCRIPTOR.fields_by_name["answers"].number
_T = TypeVar("_T")

_CLOSED_KEPT = 1024
"""Closed sessions whose last answer is remembered, in case it has to be repeated."""

_log = logging.getLogger(__name__)
_blame = partial(blame, also=(SystemExit,), log=_log)
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a twin is hosted.

    `threads` is 1 because twins are bound by the processor and share caches between sessions;
    raise it only for a twin that is safe with several. Sessions that no stream has carried for
    `linger_s` are closed. `advertise` is the address (`host:port`) that the broker is told when
    it is not the one listened at; a port of 0 in it stands for the port that was chosen.

    Steps are done in the threads, so that health and other streams are answered meanwhile. A
    frame that should take less than `inline_s`, as the last ones of its session did, is done in
    the event loop instead, which spares it two changes of threads: for a process that does
    nothing else, and models that never wait for something in this process. With several threads
    nothing is done there.

    Who may act on its sessions stands in the `keyring`; without one nobody may. What was
    stopped, and what was confirmed, is kept in `state_file`, over restarts of the process.
    """

    host: str = "127.0.0.1"
    port: int = 0
    broker: str | None = None
    advertise: str | None = None
    threads: int = 1
    linger_s: float = 600.0
    grace_s: float = 2.0
    inline_s: float = 0.0
    max_message_bytes: int = 64 * MEBIBYTE
    max_sessions: int = 0
    """Open at a time, more are refused with TOO_MANY_SESSIONS; 0: no limit."""
    keyring: Keyring = field(default_factory=Keyring)
    state_file: Path | None = None
    health_port: int = 0
    """Where health is told in the clear as well, at the same host; 0: nowhere."""


@dataclass(slots=True, eq=False)
class _Hosted:
    """One session as the service keeps it: the twin's, and what makes frames repeatable."""

    is_busy: bool = False
    """A thread works for it; what else comes waits."""
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    step_s: float = math.inf
    """What a step of it takes: the last one, or a tenth less than before when that is more."""
    frame: int = 0
    epoch: int = 0
    answer: bytes | None = None
    session: ModelSession | None = None
    desk: SeatedDesk | None = None
    """Where it is acted on; only for a session that was opened for a run."""
    opened: twin_pb2.SessionRequest.Open | None = None
    failure: FederationError | None = None
    steps: int = 0
    """How many steps it was asked for, where somebody counts them."""
    streams: int = 0
    detached_s: float = math.inf

    def refusal(self, request: twin_pb2.SessionRequest) -> FederationError | None:
        """Why this frame may not be carried out, or repeated, now."""
        if self.is_due(request):
            return None
        command = request.WhichOneof("command")
        if self.frame and request.epoch < self.epoch:
            return ScenarioError(
                Reason.STALE_EPOCH,
                f"epoch {request.epoch} is over; the session is at {self.epoch}",
                {"epoch": str(self.epoch), EXPECTED: str(self.frame + 1)},
            )
        if self.repeats(request) or self.reopens(request):
            return None
        if request.frame != self.frame + 1:
            problem = f"frame {request.frame} came where {self.frame + 1} is due"
        elif command is None:
            problem = f"frame {request.frame} has no command that this twin knows"
        elif (command == "open") != (request.frame == 1):
            problem = f"frame {request.frame} is {command}; frame 1 and no other is open"
        elif self.session is None and self.frame and command != "close":
            problem = f"frame {request.frame} is {command} to a session that is not open"
        elif command == "advance" and self.session is not None:
            problem = _time_problem(self.session.last_ns, request.advance)
        else:
            problem = ""
        if not problem:
            return None
        return ScenarioError(Reason.INVALID_FRAME, problem, {EXPECTED: str(self.frame + 1)})

    def is_due(self, request: twin_pb2.SessionRequest) -> bool:
        """Whether this is the advance that is expected next; nothing is wrong with most."""
        return (
            self.session is not None
            and request.frame == self.frame + 1
            and request.epoch >= self.epoch
            and request.HasField("advance")
            and not _time_problem(self.session.last_ns, request.advance)
        )

    def repeats(self, request: twin_pb2.SessionRequest) -> bool:
        return 0 < request.frame == self.frame and not self.reopens(request)

    def reopens(self, request: twin_pb2.SessionRequest) -> bool:
        return (
            self.frame > 0
            and request.frame == 1
            and request.epoch > self.epoch
            and request.HasField("open")
        )


def _time_problem(last_ns: int, advance: twin_pb2.SessionRequest.Advance) -> str:
    for step in advance.steps:
        if step.time_ns < last_ns:
            return f"a step at {step.time_ns} ns came after one at {last_ns} ns"
        last_ns = step.time_ns
    return ""


class _Stream:
    """One gRPC stream as the service sees it: takes frames, owes an answer to each."""

    def __init__(
        self,
        service: TwinService,
        context: grpc.aio.ServicerContext[twin_pb2.SessionRequest, bytes],
    ) -> None:
        self.carried: dict[str, _Hosted] = {}
        """The sessions whose frames came over it."""
        self.owed = 0
        """Frames that a thread works on, or that wait for one."""
        self._service = service
        self._context = context
        self._task = asyncio.current_task()
        self._unsent: list[bytes] = []
        self._takes_batches = self._is_reading = self._is_writing = False
        self._is_draining = self._is_over = False
        self._settled: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Read until the caller ends the stream or it is drained, then pay what is owed."""
        try:
            while not self._is_draining:
                request = await self._read()
                if request is None:
                    break
                if request.frames:
                    self._takes_batches = True
                    for frame in request.frames:
                        self._service.take(frame, self)
                else:
                    self._service.take(request, self)
                if self._unsent and not self._is_writing:
                    await self._write()
            if self.owed:
                self._settled = asyncio.get_running_loop().create_future()
                await self._settled
            if self._writer is not None:
                await self._writer
        finally:
            self._is_over = True
            if not self.owed:
                self._service.detach(self.carried)

    async def _read(self) -> twin_pb2.SessionRequest | None:
        """The next message; None when there is none, or none is wanted.

        Fails with INVALID_FRAME when it is no message.
        """
        self._is_reading = True
        try:
            request: object = await self._context.read()
            if isinstance(request, Malformed):
                raise request.refusal
            return request if isinstance(request, twin_pb2.SessionRequest) else None
        except asyncio.CancelledError:
            if not self._is_draining or self._task is None:
                raise
            self._task.uncancel()
            return None
        finally:
            self._is_reading = False

    def drain(self) -> None:
        """Take no more frames."""
        self._is_draining = True
        if self._is_reading and self._task is not None:
            self._task.cancel()

    def answer(self, answer: bytes) -> None:
        """Send an answer at the next opportunity."""
        self._unsent.append(answer)

    def settle(self, answer: bytes) -> None:
        """Send an answer that was owed. When the stream is gone, it waits to be asked for again:
        frames that were taken are carried out all the same.
        """
        self.owed -= 1
        self._unsent.append(answer)
        if self._is_over:
            if not self.owed:
                self._service.detach(self.carried)
            return
        if not self._is_writing:
            self._is_writing = True
            self._writer = asyncio.get_running_loop().create_task(self._write())
        if self._settled is not None and not self.owed and not self._settled.done():
            self._settled.set_result(None)

    async def _write(self) -> None:
        self._is_writing = True
        try:
            while self._unsent and not self._is_over:
                await self._context.write(self._next_message())
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            _log.debug("a stream to %s broke: %r", self._service.name, error)
        finally:
            self._is_writing = False

    def _next_message(self) -> bytes:
        unsent = self._unsent
        count = 1
        if self._takes_batches:
            size, limit = len(unsent[0]), min(BATCH_BYTES, self._service.limit_bytes)
            while count < len(unsent) and size + len(unsent[count]) + 16 * count < limit:
                size += len(unsent[count])
                count += 1
        together = unsent[:count]
        del unsent[:count]
        return together[0] if count == 1 else codec.join(together, _ANSWERS)


class TwinService(Phases, twin_pb2_grpc.TwinServicer):
    """Serves one model. Its code runs in threads of its own or, when it is quick enough, in the
    event loop, but never for two sessions at once unless `threads` allows it.
    """

    def __init__(self, factory: Callable[[], Twin], name: str, options: ServeOptions) -> None:
        self.name = name
        self.limit_bytes = options.max_message_bytes
        self.description: Description = factory().describe()
        self._described = twin_pb2.DescribeResponse(
            description=codec.encode_description(self.description),
            max_message_bytes=options.max_message_bytes,
            takes_batches=True,
            max_sessions=options.max_sessions,
        )
        self._acting = Acting(
            name, self.description.domain, options.keyring, Standing(options.state_file)
        )
        self._factory = factory
        self._options = options
        self._threads = ThreadPoolExecutor(options.threads, thread_name_prefix=f"twin-{name}")
        self._in_threads = 0
        self._inline_s = options.inline_s if options.threads == 1 else 0.0
        self._sessions: dict[str, _Hosted] = {}
        self._closed: deque[str] = deque()
        self._streams: set[_Stream] = set()
        self._stopped = False

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service; its answers to frames are bytes already."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self.Describe,
                twin_pb2.DescribeRequest.FromString,
                twin_pb2.DescribeResponse.SerializeToString,
            ),
            "Session": grpc.stream_stream_rpc_method_handler(
                self.Session, twin_pb2.SessionRequest.FromString
            ),
            "ReadClock": grpc.unary_unary_rpc_method_handler(
                self.ReadClock,
                twin_pb2.ReadClockRequest.FromString,
                twin_pb2.ReadClockResponse.SerializeToString,
            ),
            "Flexibility": grpc.unary_unary_rpc_method_handler(
                self.Flexibility,
                twin_pb2.FlexibilityRequest.FromString,
                twin_pb2.FlexibilityResponse.SerializeToString,
            ),
        }
        for rpc in (*ORDERS, "ReadDesk", "Decide"):
            handlers[rpc] = grpc.unary_unary_rpc_method_handler(
                getattr(self, rpc),
                getattr(twin_pb2, f"{rpc}Request").FromString,
                getattr(twin_pb2, f"{rpc}Response").SerializeToString,
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Halt(  # noqa: N802
        self,
        request: twin_pb2.HaltRequest,
        context: grpc.aio.ServicerContext[twin_pb2.HaltRequest, twin_pb2.HaltResponse],
    ) -> twin_pb2.HaltResponse:
        receipt = await self._order("halt", request.signed, context)
        return twin_pb2.HaltResponse(receipt=receipt)

    async def Lift(  # noqa: N802
        self,
        request: twin_pb2.LiftRequest,
        context: grpc.aio.ServicerContext[twin_pb2.LiftRequest, twin_pb2.LiftResponse],
    ) -> twin_pb2.LiftResponse:
        receipt = await self._order("lift", request.signed, context)
        return twin_pb2.LiftResponse(receipt=receipt)

    async def _order(
        self, rpc: str, signed: twin_pb2.Signed, context: grpc.aio.ServicerContext[Any, Any]
    ) -> twin_pb2.Receipt:
        async with status.refusing(context):
            return encode_receipt(self._acting.handle(rpc, signed))
        raise AssertionError("abort raises")

    async def ReadDesk(  # noqa: N802
        self,
        request: twin_pb2.ReadDeskRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ReadDeskRequest, twin_pb2.ReadDeskResponse],
    ) -> twin_pb2.ReadDeskResponse:
        async with status.refusing(context):
            return self._acting.look(request.signed)
        raise AssertionError("abort raises")

    async def Decide(  # noqa: N802
        self,
        request: twin_pb2.DecideRequest,
        context: grpc.aio.ServicerContext[twin_pb2.DecideRequest, twin_pb2.DecideResponse],
    ) -> twin_pb2.DecideResponse:
        async with status.refusing(context):
            is_confirmed = self._acting.decide(request.selected)
            return twin_pb2.DecideResponse(is_confirmed=is_confirmed)
        raise AssertionError("abort raises")

    async def Describe(  # noqa: N802
        self,
        request: twin_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[twin_pb2.DescribeRequest, twin_pb2.DescribeResponse],
    ) -> twin_pb2.DescribeResponse:
        return self._described

    async def ReadClock(  # noqa: N802
        self,
        request: twin_pb2.ReadClockRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ReadClockRequest, twin_pb2.ReadClockResponse],
    ) -> twin_pb2.ReadClockResponse:
        answer = twin_pb2.ReadClockResponse()
        answer.receive_time.GetCurrentTime()
        answer.send_time.GetCurrentTime()
        return answer

    async def Session(  # type: ignore[override]  # noqa: N802 - it reads and writes by itself
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext[twin_pb2.SessionRequest, bytes],
    ) -> None:
        stream = _Stream(self, context)
        self._streams.add(stream)
        try:
            async with status.refusing(context):
                await stream.serve()
        finally:
            self._streams.discard(stream)

    def detach(self, carried: dict[str, _Hosted]) -> None:
        """Note that a stream has ended; its sessions wait for another one, for a while."""
        loop = asyncio.get_running_loop()
        for hosted in carried.values():
            hosted.streams -= 1
            hosted.detached_s = loop.time() if hosted.streams == 0 else math.inf
        if carried and not self._stopped:
            loop.call_later(self._options.linger_s, self._sweep, carried)

    def _sweep(self, carried: dict[str, _Hosted]) -> None:
        now_s = asyncio.get_running_loop().time()
        for session_id, hosted in carried.items():
            if now_s >= hosted.detached_s + self._options.linger_s - 1e-3:
                _log.info("closing session %s of %s: nobody came back", session_id, self.name)
                self._sessions.pop(session_id, None)
                if not self._stopped:
                    self._in_thread(hosted, partial(self._end, hosted), lambda _: None)

    async def Flexibility(  # noqa: N802
        self,
        request: twin_pb2.FlexibilityRequest,
        context: grpc.aio.ServicerContext[
            twin_pb2.FlexibilityRequest, twin_pb2.FlexibilityResponse
        ],
    ) -> twin_pb2.FlexibilityResponse:
        async with status.refusing(context):
            hosted = self._sessions.get(request.session)
            if hosted is None or hosted.session is None:
                raise ScenarioError(
                    Reason.INVALID_FRAME, f"{self.name} has no open session {request.session!r}"
                )
            if not request.periods_ns or min(request.periods_ns) <= 0:
                raise ScenarioError(
                    Reason.INVALID_FRAME, "a horizon has at least one period, each above 0 ns"
                )
            answer: asyncio.Future[twin_pb2.FlexibilityResponse] = (
                asyncio.get_running_loop().create_future()
            )
            session = hosted.session
            self._in_turn(
                hosted,
                lambda: self._in_thread(
                    hosted,
                    lambda: self._flexibility(session, request),
                    lambda done: None if answer.cancelled() else _copy(done, answer),
                ),
            )
            return await answer
        raise AssertionError("abort raises")

    def _flexibility(
        self, session: ModelSession, request: twin_pb2.FlexibilityRequest
    ) -> twin_pb2.FlexibilityResponse:
        with tracer.start_as_current_span("twin.flexibility"), _blame(self.name):
            block = session.twin.flexibility(tuple(request.periods_ns))
            if block is None:
                return twin_pb2.FlexibilityResponse()
            return twin_pb2.FlexibilityResponse(block=codec.encode_block(block))

    def take(self, request: twin_pb2.SessionRequest, stream: _Stream) -> None:
        """Give a frame of `stream` its one answer, now or later: refused, repeated, or done."""
        hosted = self._sessions.get(request.session)
        if hosted is None:
            hosted = _Hosted()
            if hosted.refusal(request) is None:
                if (full := self._fullness()) is not None:
                    stream.answer(_refused(request, full))
                    return
                self._sessions[request.session] = hosted
        if hosted.is_busy:
            stream.owed += 1
            hosted.waiting.append(partial(self._take_owed, hosted, request, stream))
            return
        answer = self._at_once(hosted, request, stream)
        if answer is None:
            stream.owed += 1
            self._hand_over(hosted, request, stream)
        else:
            stream.answer(answer)

    def _fullness(self) -> FederationError | None:
        """Why no session more can be opened now."""
        limit = self._options.max_sessions
        if not limit:
            return None
        # a session that is being opened has no answer yet
        hosted = self._sessions.values()
        if sum(one.session is not None or one.answer is None for one in hosted) < limit:
            return None
        return TwinError(
            Reason.TOO_MANY_SESSIONS,
            f"{self.name} hosts {limit} sessions at a time, and all are in use",
            {"max_sessions": str(limit)},
        )

    def _take_owed(
        self, hosted: _Hosted, request: twin_pb2.SessionRequest, stream: _Stream
    ) -> None:
        answer = self._at_once(hosted, request, stream)
        if answer is None:
            self._hand_over(hosted, request, stream)
        else:
            stream.settle(answer)

    def _at_once(
        self, hosted: _Hosted, request: twin_pb2.SessionRequest, stream: _Stream
    ) -> bytes | None:
        """The answer, if it takes no thread to give it."""
        refusal = hosted.refusal(request)
        if refusal is not None:
            return _refused(request, refusal)
        if request.session not in stream.carried:
            stream.carried[request.session] = hosted
            hosted.streams += 1
            hosted.detached_s = math.inf
        if hosted.answer is not None and hosted.repeats(request):
            hosted.epoch = max(hosted.epoch, request.epoch)
            return hosted.answer
        # one after the other: what the thread does for another session comes first
        if not self._in_threads and self._inline_s and request.HasField("advance"):
            expected_s = hosted.step_s * len(request.advance.steps)
            if expected_s < self._inline_s:
                answer = self._carry_out(hosted, request)
                self._keep(hosted, request, answer)
                return answer
        return None

    def _hand_over(
        self, hosted: _Hosted, request: twin_pb2.SessionRequest, stream: _Stream
    ) -> None:
        def answered(done: asyncio.Future[bytes]) -> None:
            answer = done.result()
            self._keep(hosted, request, answer)
            stream.settle(answer)

        self._in_thread(hosted, lambda: self._carry_out(hosted, request), answered)

    def _keep(self, hosted: _Hosted, request: twin_pb2.SessionRequest, answer: bytes) -> None:
        hosted.answer = answer
        hosted.frame = request.frame
        hosted.epoch = max(hosted.epoch, request.epoch)
        if hosted.desk is not None:
            hosted.desk.epoch = hosted.epoch
            if hosted.desk.desk.doubts():
                self._acting.ask_arbiters(hosted.desk)
        if request.HasField("close"):
            self._forget_later(request.session)

    def _in_turn(self, hosted: _Hosted, begin: Callable[[], None]) -> None:
        """Begin something when no thread works for the session."""
        if hosted.is_busy:
            hosted.waiting.append(begin)
        else:
            begin()

    def _in_thread(
        self, hosted: _Hosted, work: Callable[[], _T], then: Callable[[asyncio.Future[_T]], None]
    ) -> None:
        """Work for a session that is not busy in a thread; `then` is called in the event loop,
        and after it whatever has waited for the session.
        """

        def ended(done: asyncio.Future[_T]) -> None:
            self._in_threads -= 1
            hosted.is_busy = False
            try:
                then(done)
            finally:
                while hosted.waiting and not hosted.is_busy:
                    hosted.waiting.popleft()()

        hosted.is_busy = True
        self._in_threads += 1
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        done.add_done_callback(ended)

    def _forget_later(self, session_id: str) -> None:
        self._closed.append(session_id)
        if len(self._closed) > _CLOSED_KEPT:
            oldest = self._closed.popleft()
            if oldest in self._sessions and self._sessions[oldest].session is None:
                del self._sessions[oldest]

    def _carry_out(self, hosted: _Hosted, request: twin_pb2.SessionRequest) -> bytes:
        """What a frame asks for, and the answer to it."""
        if not request.traceparent and not is_tracing():
            return self._answer(hosted, request)[0]
        parent = _propagator.extract({"traceparent": request.traceparent})
        name = f"twin.{request.WhichOneof('command')}"
        with tracer.start_as_current_span(name, context=parent) as span:
            answer, error = self._answer(hosted, request)
            if error is not None:
                span.set_attribute("error.type", error.reason.value)
            return answer

    def _name_of(self, hosted: _Hosted, request: twin_pb2.SessionRequest) -> str:
        """What the federation calls the member whose session this is."""
        opened = request.open if hosted.opened is None else hosted.opened
        return opened.member or self.name

    def _answer(
        self, hosted: _Hosted, request: twin_pb2.SessionRequest
    ) -> tuple[bytes, FederationError | None]:
        response = twin_pb2.SessionResponse(session=request.session, frame=request.frame)
        command = request.WhichOneof("command")
        failure: FederationError | None = None
        try:
            with _blame(self._name_of(hosted, request)):
                match command:
                    case "advance":
                        self._advance(hosted, request.advance, response)
                    case "open":
                        self._open(hosted, request.open)
                        response.opened.SetInParent()
                    case "snapshot":
                        desk = hosted.desk
                        saved = b"" if desk is None else desk.save()
                        state = codec.encode_session(_usable(hosted), saved)
                        response.snapshot_taken.state = state
                    case "restore":
                        self._restore(hosted, request.restore, response.restored)
                    case _:
                        self._end(hosted)
                        response.closed.SetInParent()
        except FederationError as error:
            failure = error
            response.error.CopyFrom(status.encode_error(error))
            if command in ("advance", "restore"):
                hosted.failure = error
        answer, limit = response.SerializeToString(), self._options.max_message_bytes
        if len(answer) > limit:
            failure = ScenarioError(
                Reason.MESSAGE_TOO_LARGE,
                f"the answer of {self.name} to {command} has {len(answer)} bytes; "
                f"the limit is {limit}",
                {"bytes": str(len(answer))},
            )
            if command == "advance":
                hosted.failure = failure
            answer = _refused(request, failure)
        return answer, failure

    def _build(self, opened: twin_pb2.SessionRequest.Open) -> Twin:
        """The object of a session that is opened so."""
        return self._factory()

    def _open(self, hosted: _Hosted, opened: twin_pb2.SessionRequest.Open) -> None:
        self._end(hosted)
        for parameter, value in opened.parameters.items():
            if not math.isfinite(value):
                raise ScenarioError(
                    Reason.NOT_FINITE,
                    f"parameter {parameter} is {value}",
                    {"parameter": parameter},
                )
        session = ModelSession(self._build(opened), opened.member)
        session.open(opened.seed, dict(opened.parameters), opened.start_ns)
        hosted.session, hosted.opened, hosted.failure = session, opened, None
        if opened.run:
            hosted.desk = self._acting.seat(
                opened.run, opened.member, self.description, opened.start_ns
            )

    def _advance(
        self,
        hosted: _Hosted,
        advance: twin_pb2.SessionRequest.Advance,
        response: twin_pb2.SessionResponse,
    ) -> None:
        session = _usable(hosted)
        response.advanced.SetInParent()
        add = response.advanced.results.add
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        desk = hosted.desk
        for step in advance.steps:
            given = codec.decode_step_input(step)
            if desk is not None:
                result = desk.advance(session, given)
            elif given.desk is None:
                result = session.advance(given)
            else:
                result = done_with(session, given, given.desk)
            codec.write_step_result(add(), result)
        if advance.steps:
            took_s = time.perf_counter() - began_s
            if took_s < BLOCKED_S:
                # it may have waited for a processor rather than for itself
                took_s = time.thread_time() - began_cpu_s
            usual_s = hosted.step_s if hosted.step_s < math.inf else 0.0
            hosted.step_s = max(took_s / len(advance.steps), 0.9 * usual_s)

    def _restore(
        self,
        hosted: _Hosted,
        restore: twin_pb2.SessionRequest.Restore,
        restored: twin_pb2.SessionResponse.Restored,
    ) -> None:
        """A fresh object takes the state, so that nothing of the old one shines through."""
        assert hosted.opened is not None
        opened = hosted.opened
        session = ModelSession(self._build(opened), opened.member)
        session.open(opened.seed, dict(opened.parameters), opened.start_ns)
        try:
            state_of_desk = codec.restore_session(session, restore.state)
            if restore.HasField("diverge"):
                believed = codec.decode_values(restore.diverge.believed)
                next_ns = session.diverge(
                    restore.diverge.time_ns, opened.seed, dict(opened.parameters), believed
                )
                restored.is_diverged = True
                if next_ns is not None:
                    restored.next_ns = next_ns
        except BaseException:
            session.twin.close()
            raise
        restored.SetInParent()
        self._end(hosted, keeps_desk=True)
        hosted.session, hosted.failure = session, None
        if hosted.desk is not None:
            hosted.desk.take_up(state_of_desk)

    def _end(self, hosted: _Hosted, *, keeps_desk: bool = False) -> None:
        session, hosted.session = hosted.session, None
        if hosted.desk is not None and not keeps_desk:
            self._acting.unseat(hosted.desk)
            hosted.desk = None
        if session is not None:
            with _blame(self.name):
                session.twin.close()

    def drain(self) -> None:
        """Take no more frames; each stream ends with the answers that it still owes."""
        self._stopped = True
        for stream in self._streams:
            stream.drain()

    def stop(self) -> None:
        """End all sessions; waits for a step that is being computed."""
        for hosted in self._sessions.values():
            self._threads.submit(self._end, hosted)
        self._sessions.clear()
        self._threads.shutdown()


def _usable(hosted: _Hosted) -> ModelSession:
    if hosted.failure is not None:
        raise hosted.failure
    assert hosted.session is not None
    return hosted.session


def _refused(request: twin_pb2.SessionRequest, error: FederationError) -> bytes:
    return twin_pb2.SessionResponse(
        session=request.session, frame=request.frame, error=status.encode_error(error)
    ).SerializeToString()


def _copy(done: asyncio.Future[_T], to: asyncio.Future[_T]) -> None:
    error = done.exception()
    if error is None:
        to.set_result(done.result())
    else:
        to.set_exception(error)


def new_server(max_message_bytes: int) -> grpc.aio.Server:
    """A server with the limits that all of ours have, and no services yet.

    Under an identity it has a gate, which knows who may call what.
    """
    trust = footing.serving_trust()
    return grpc.aio.server(
        # who calls is looked at before what they say
        interceptors=[*([] if trust is None else [Gate(trust)]), SoundRequests()],
        options=[
            *channel_options(max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            # a caller may ask for a sign of life while a long step is computed
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


async def start_server(
    server: grpc.aio.Server, services: tuple[str, ...], host: str, port: int
) -> tuple[str, health.aio.HealthServicer]:
    """Add health and reflection for its `services`, listen, and say that it serves.

    Returns the address with the port that was chosen, and the health service for its end.
    Fails with PORT_IN_USE, and as `secure.add_port` does.
    """
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection(
        (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    serves = frozenset[Part].intersection(*(SERVED_BY[service] for service in services))
    chosen = _bind(server, host, port, serves)
    await server.start()
    for served in ("", *services):
        await healthy.set(served, health_pb2.HealthCheckResponse.SERVING)
    return f"{host}:{chosen}", healthy


@contextlib.asynccontextmanager
async def serving(
    factory: Callable[[], Twin], name: str, options: ServeOptions | None = None
) -> AsyncIterator[tuple[str, Description]]:
    """Serve a twin for as long as the context lasts; gives its address and description.

    Fails with PORT_IN_USE, with CERTIFICATE_INVALID under the identity of somebody else, or with
    what the twin's constructor raises.
    """
    options = options or ServeOptions()
    secure.check_serves_as(name)

    def build() -> TwinService:
        with _blame(name):
            return TwinService(factory, name, options)

    service = await asyncio.to_thread(build)
    server = new_server(options.max_message_bytes)
    service.register(server)
    try:
        address, healthy = await start_server(server, (SERVICE,), options.host, options.port)
        try:
            async with probed(healthy, options.host, options.health_port):
                yield address, service.description
        finally:
            await healthy.enter_graceful_shutdown()
            service.drain()
            await server.stop(options.grace_s)
    finally:
        await asyncio.to_thread(service.stop)


def _bind(server: grpc.aio.Server, host: str, port: int, serves: frozenset[Part]) -> int:
    address = f"{host}:{port}"
    try:
        return secure.add_port(server, host, port, serves)
    except RuntimeError as error:
        try:
            with socket.create_server((host, port)):
                pass
        except OSError as cause:
            if cause.errno == errno.EADDRINUSE:
                raise ScenarioError(
                    Reason.PORT_IN_USE,
                    f"something else listens at {address}; choose another port, or 0 for any",
                    {"address": address},
                ) from error
            raise ScenarioError(
                Reason.UNREACHABLE, f"can't listen at {address}: {cause}", {"address": address}
            ) from error
        raise ScenarioError(
            Reason.UNREACHABLE, f"can't listen at {address}: {error}", {"address": address}
        ) from error


async def serve(
    factory: Callable[[], Twin], name: str, options: ServeOptions | None = None
) -> None:
    """Serve a twin until SIGTERM or SIGINT, under its name at the broker if there is one.

    Says on stderr where it listens. Fails with PORT_IN_USE, and with NAME_LEASED when another
    process holds on to the name.
    """
    options = options or ServeOptions()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with serving(factory, name, options) as (address, description):
        _say(f"serving {name} at {address} (pid {os.getpid()})")
        waits: list[asyncio.Task[object]] = [asyncio.create_task(stopped.wait())]
        if options.broker:
            waits.append(
                asyncio.create_task(
                    keep_name(
                        options.broker,
                        name,
                        advertised(address, options.advertise),
                        description,
                        _say,
                    )
                )
            )
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        for outcome in await asyncio.gather(*waits, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def advertised(address: str, advertise: str | None) -> str:
    """The address for the broker: what was asked for, with the port that was chosen."""
    host, _, port = address.rpartition(":")
    if advertise is None:
        if host in ("0.0.0.0", "[::]"):
            raise ScenarioError(
                Reason.UNREACHABLE,
                f"{host} is no address that a broker could call; say which one to advertise",
                {"address": address},
            )
        return address
    return f"{advertise[: -len(':0')]}:{port}" if advertise.endswith(":0") else advertise


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
