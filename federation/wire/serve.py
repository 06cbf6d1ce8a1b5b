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
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.telemetry import tracer
from federation.twin import Description, Twin
from federation.twin import Session as ModelSession
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import codec, status
from federation.wire.enrol import keep_name
from federation.wire.link import EXPECTED, MEBIBYTE

SERVICE = twin_pb2.DESCRIPTOR.services_by_name["Twin"].full_name

_CLOSED_KEPT = 1024
"""Closed sessions whose last answer is remembered, in case it has to be repeated."""

_log = logging.getLogger(__name__)
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a twin is hosted.

    `threads` is 1 because twins are bound by the processor and share caches between sessions;
    raise it only for a twin that is safe with several. Sessions that no stream has carried for
    `linger_s` are closed. `advertise` is the address (`host:port`) that the broker is told when
    it is not the one listened at; a port of 0 in it stands for the port that was chosen.
    """

    host: str = "127.0.0.1"
    port: int = 0
    broker: str | None = None
    advertise: str | None = None
    threads: int = 1
    linger_s: float = 600.0
    grace_s: float = 2.0
    max_message_bytes: int = 64 * MEBIBYTE


@dataclass(slots=True, eq=False)
class _Hosted:
    """One session as the service keeps it: the twin's, and what makes frames repeatable."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    frame: int = 0
    epoch: int = 0
    answer: twin_pb2.SessionResponse | None = None
    session: ModelSession | None = None
    opened: twin_pb2.SessionRequest.Open | None = None
    failure: FederationError | None = None
    streams: int = 0
    detached_s: float = math.inf

    def refusal(self, request: twin_pb2.SessionRequest) -> FederationError | None:
        """Why this frame may not be carried out, or repeated, now."""
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


class TwinService(twin_pb2_grpc.TwinServicer):
    """Serves one model. Model code runs in threads of its own, so that health and other
    streams are answered while a step is computed.
    """

    def __init__(self, factory: Callable[[], Twin], name: str, options: ServeOptions) -> None:
        self.name = name
        self.description: Description = factory().describe()
        self._described = twin_pb2.DescribeResponse(
            description=codec.encode_description(self.description)
        )
        self._factory = factory
        self._options = options
        self._threads = ThreadPoolExecutor(options.threads, thread_name_prefix=f"twin-{name}")
        self._sessions: dict[str, _Hosted] = {}
        self._closed: deque[str] = deque()
        self._readers: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def Describe(  # noqa: N802
        self,
        request: twin_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[twin_pb2.DescribeRequest, twin_pb2.DescribeResponse],
    ) -> twin_pb2.DescribeResponse:
        return self._described

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterable[twin_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[twin_pb2.SessionRequest, twin_pb2.SessionResponse],
    ) -> AsyncIterator[twin_pb2.SessionResponse]:
        answers: asyncio.Queue[twin_pb2.SessionResponse | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()
        carried: dict[str, _Hosted] = {}

        async def handle(request: twin_pb2.SessionRequest) -> None:
            answers.put_nowait(await self.answer(request, carried))

        async def read() -> None:
            async for request in request_iterator:
                task = asyncio.create_task(handle(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        async def finish() -> None:
            # Frames that were taken are carried out even when the stream is gone: their answers
            # wait to be asked for again.
            if tasks:
                await asyncio.wait(tasks)
            answers.put_nowait(None)
            self._detach(carried)

        def ended(reader: asyncio.Task[None]) -> None:
            self._readers.discard(reader)
            if not reader.cancelled() and reader.exception() is not None:
                _log.debug("a stream to %s broke", self.name, exc_info=reader.exception())
            last = asyncio.create_task(finish())
            self._finishing.add(last)
            last.add_done_callback(self._finishing.discard)

        reader = asyncio.create_task(read())
        self._readers.add(reader)
        reader.add_done_callback(ended)
        try:
            while (answer := await answers.get()) is not None:
                yield answer
        finally:
            reader.cancel()

    def _detach(self, carried: dict[str, _Hosted]) -> None:
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
                    self._threads.submit(self._end, hosted)

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
            async with hosted.lock:
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._flexibility, hosted.session, request
                )
        raise AssertionError("abort raises")

    def _flexibility(
        self, session: ModelSession, request: twin_pb2.FlexibilityRequest
    ) -> twin_pb2.FlexibilityResponse:
        with tracer.start_as_current_span("twin.flexibility"), _blaming(self.name):
            block = session.twin.flexibility(tuple(request.periods_ns))
            if block is None:
                return twin_pb2.FlexibilityResponse()
            return twin_pb2.FlexibilityResponse(block=codec.encode_block(block))

    async def answer(
        self, request: twin_pb2.SessionRequest, carried: dict[str, _Hosted]
    ) -> twin_pb2.SessionResponse:
        """The one answer to a frame: refused, repeated, or carried out.

        `carried` collects the sessions that came over the same stream.
        """
        hosted = self._sessions.get(request.session)
        if hosted is None:
            hosted = _Hosted()
            if hosted.refusal(request) is None:
                self._sessions[request.session] = hosted
        async with hosted.lock:
            refusal = hosted.refusal(request)
            if refusal is not None:
                return _refused(request, refusal)
            if request.session not in carried:
                carried[request.session] = hosted
                hosted.streams += 1
                hosted.detached_s = math.inf
            if hosted.answer is None or not hosted.repeats(request):
                hosted.answer = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._carry_out, hosted, request
                )
                hosted.frame = request.frame
                if request.HasField("close"):
                    self._forget_later(request.session)
            hosted.epoch = max(hosted.epoch, request.epoch)
            return hosted.answer

    def _forget_later(self, session_id: str) -> None:
        self._closed.append(session_id)
        if len(self._closed) > _CLOSED_KEPT:
            oldest = self._closed.popleft()
            if oldest in self._sessions and self._sessions[oldest].session is None:
                del self._sessions[oldest]

    def _carry_out(
        self, hosted: _Hosted, request: twin_pb2.SessionRequest
    ) -> twin_pb2.SessionResponse:
        """What a frame asks for; runs in a thread of the model's."""
        response = twin_pb2.SessionResponse(session=request.session, frame=request.frame)
        command = request.WhichOneof("command")
        parent = _propagator.extract({"traceparent": request.traceparent})
        with tracer.start_as_current_span(f"twin.{command}", context=parent) as span:
            try:
                with _blaming(self.name):
                    match command:
                        case "open":
                            self._open(hosted, request.open)
                            response.opened.SetInParent()
                        case "advance":
                            self._advance(hosted, request.advance, response)
                        case "snapshot":
                            state = codec.encode_session(_usable(hosted))
                            response.snapshot_taken.state = state
                        case "restore":
                            self._restore(hosted, request.restore.state)
                            response.restored.SetInParent()
                        case _:
                            self._end(hosted)
                            response.closed.SetInParent()
            except FederationError as error:
                span.set_attribute("error.type", error.reason.value)
                response.error.CopyFrom(status.encode_error(error))
                if command in ("advance", "restore"):
                    hosted.failure = error
        size, limit = response.ByteSize(), self._options.max_message_bytes
        if size > limit:
            too_large = ScenarioError(
                Reason.MESSAGE_TOO_LARGE,
                f"the answer of {self.name} to {command} has {size} bytes; the limit is {limit}",
                {"bytes": str(size)},
            )
            if command == "advance":
                hosted.failure = too_large
            response = _refused(request, too_large)
        return response

    def _open(self, hosted: _Hosted, opened: twin_pb2.SessionRequest.Open) -> None:
        self._end(hosted)
        for parameter, value in opened.parameters.items():
            if not math.isfinite(value):
                raise ScenarioError(
                    Reason.NOT_FINITE,
                    f"parameter {parameter} is {value}",
                    {"parameter": parameter},
                )
        session = ModelSession(self._factory(), opened.member)
        session.open(opened.seed, dict(opened.parameters))
        hosted.session, hosted.opened, hosted.failure = session, opened, None

    def _advance(
        self,
        hosted: _Hosted,
        advance: twin_pb2.SessionRequest.Advance,
        response: twin_pb2.SessionResponse,
    ) -> None:
        session = _usable(hosted)
        response.advanced.SetInParent()
        for step in advance.steps:
            result = session.advance(codec.decode_step_input(step))
            response.advanced.results.append(codec.encode_step_result(result))

    def _restore(self, hosted: _Hosted, state: bytes) -> None:
        """A fresh object takes the state, so that nothing of the old one shines through."""
        assert hosted.opened is not None
        opened = hosted.opened
        session = ModelSession(self._factory(), opened.member)
        session.open(opened.seed, dict(opened.parameters))
        codec.restore_session(session, state)
        self._end(hosted)
        hosted.session, hosted.failure = session, None

    def _end(self, hosted: _Hosted) -> None:
        session, hosted.session = hosted.session, None
        if session is not None:
            with _blaming(self.name):
                session.twin.close()

    def drain(self) -> None:
        """Take no more frames; each stream ends with the answers that it still owes."""
        self._stopped = True
        for reader in self._readers:
            reader.cancel()

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


def _refused(request: twin_pb2.SessionRequest, error: FederationError) -> twin_pb2.SessionResponse:
    return twin_pb2.SessionResponse(
        session=request.session, frame=request.frame, error=status.encode_error(error)
    )


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Anything that model code raises, but for errors of ours, becomes TWIN_FAILED."""
    try:
        yield
    except FederationError:
        raise
    except (Exception, SystemExit) as error:
        _log.exception("%s failed", name)
        kind = type(error).__name__
        raise TwinError(
            Reason.TWIN_FAILED, f"{name} failed with {kind}: {error}", {"exception": kind}
        ) from error


def new_server(max_message_bytes: int) -> grpc.aio.Server:
    """A server with the limits that all of ours have, and no services yet."""
    return grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            # a caller may ask for a sign of life while a long step is computed
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
    )


async def start_server(
    server: grpc.aio.Server, services: tuple[str, ...], host: str, port: int
) -> tuple[str, health.aio.HealthServicer]:
    """Add health and reflection for its `services`, listen, and say that it serves.

    Returns the address with the port that was chosen, and the health service for its end.
    Fails with PORT_IN_USE.
    """
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection(
        (*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    chosen = _bind(server, host, port)
    await server.start()
    for served in ("", *services):
        await healthy.set(served, health_pb2.HealthCheckResponse.SERVING)
    return f"{host}:{chosen}", healthy


@contextlib.asynccontextmanager
async def serving(
    factory: Callable[[], Twin], name: str, options: ServeOptions | None = None
) -> AsyncIterator[tuple[str, Description]]:
    """Serve a twin for as long as the context lasts; gives its address and description.

    Fails with PORT_IN_USE, or with what the twin's constructor raises.
    """
    options = options or ServeOptions()

    def build() -> TwinService:
        with _blaming(name):
            return TwinService(factory, name, options)

    service = await asyncio.to_thread(build)
    server = new_server(options.max_message_bytes)
    twin_pb2_grpc.add_TwinServicer_to_server(service, server)
    try:
        address, healthy = await start_server(server, (SERVICE,), options.host, options.port)
        try:
            yield address, service.description
        finally:
            await healthy.enter_graceful_shutdown()
            service.drain()
            await server.stop(options.grace_s)
    finally:
        await asyncio.to_thread(service.stop)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
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
