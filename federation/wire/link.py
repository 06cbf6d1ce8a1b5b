"""Calls a twin: one connection, one stream, any number of sessions over it."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import (
    Description,
    LinearBlock,
    StepInput,
    StepResult,
    check_outputs,
)
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import codec, status

MEBIBYTE = 1 << 20

EXPECTED = "expected_frame"
"""The metadata that marks a refused frame: the number that the session goes on with."""

_propagator = TraceContextTextMapPropagator()


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
    max_message_bytes: int = 64 * MEBIBYTE


class _Stream:
    """One gRPC stream in use: its call, and the frames that wait to be written to it.

    Frames go through a queue because a cancelled `write` would cancel the whole call.
    """

    def __init__(self, stub: twin_pb2_grpc.TwinAsyncStub) -> None:
        self._unsent: asyncio.Queue[twin_pb2.SessionRequest | None] = asyncio.Queue()
        self.call = stub.Session(self._requests())

    def end(self) -> None:
        self._unsent.put_nowait(None)

    def send(self, request: twin_pb2.SessionRequest) -> None:
        self._unsent.put_nowait(request)

    async def _requests(self) -> AsyncIterator[twin_pb2.SessionRequest]:
        while (request := await self._unsent.get()) is not None:
            yield request


class Link:
    """A connection to one twin service. All its sessions share one stream.

    Use it from one event loop. Every failure is a `FederationError`: UNREACHABLE before the
    twin has answered once, MEMBER_LOST after.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, name: str, options: LinkOptions
    ) -> None:
        self.address = address
        self.name = name
        self.options = options
        self._channel = channel
        self._stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(channel)
        self._description: Description | None = None
        self._sizes: dict[str, int] = {}
        self._stream: _Stream | None = None
        self._reader: asyncio.Task[None] | None = None
        self._owed: dict[
            tuple[str, int],
            tuple[twin_pb2.SessionRequest, asyncio.Future[twin_pb2.SessionResponse]],
        ] = {}
        self._serial = itertools.count(1)
        self._prefix = uuid.uuid4().hex

    @classmethod
    async def connect(cls, address: str, name: str, options: LinkOptions | None = None) -> Link:
        """Connect to `address` (`host:port`) and read its description.

        `name` is for messages. Fails with UNREACHABLE, or UNSUPPORTED when what listens there
        is no twin.
        """
        options = options or LinkOptions()
        channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", options.max_message_bytes),
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.keepalive_time_ms", int(options.keepalive_s * 1e3)),
                ("grpc.keepalive_timeout_ms", int(options.keepalive_s * 1e3)),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # a proxy for the web is no way to reach a twin
                ("grpc.enable_http_proxy", 0),
            ],
        )
        link = cls(channel, address, name, options)
        try:
            async with asyncio.timeout(options.connect_timeout_s):
                await channel.channel_ready()
                await link.describe()
        except TimeoutError:
            await link.close()
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
                    twin_pb2.DescribeRequest(), timeout=self.options.answer_timeout_s
                )
            description = codec.decode_description(answer.description)
            self._sizes = description.output_sizes()
            self._description = description
        return self._description

    async def session(
        self, member: str, seed: int, parameters: Mapping[str, float], epoch: int
    ) -> LinkSession:
        """Open a session at instant 0. Events are named `member/serial`."""
        session_id = f"{self._prefix}-{next(self._serial)}"
        session = await self.resume(session_id, member, 0, epoch)
        await session.open(seed, parameters)
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
                )
        except TwinError as error:
            if error.reason is Reason.UNSUPPORTED:
                return None
            raise
        return codec.decode_block(answer.block) if answer.HasField("block") else None

    async def close(self) -> None:
        """Drop the connection. Sessions that were not closed linger at the twin for a while."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
        self._drop(self._lost("the link was closed"))
        await self._channel.close()

    async def exchange(self, request: twin_pb2.SessionRequest) -> twin_pb2.SessionResponse:
        """Send one frame and wait for its answer, over a new stream if the old one breaks."""
        key = (request.session, request.frame)
        answer: asyncio.Future[twin_pb2.SessionResponse] = (
            asyncio.get_running_loop().create_future()
        )
        self._owed[key] = (request, answer)
        if self._stream is None:
            self._stream = _Stream(self._stub)
            self._reader = asyncio.create_task(self._read(self._stream))
        self._stream.send(request)
        try:
            async with asyncio.timeout(self.options.answer_timeout_s):
                return await answer
        except TimeoutError:
            raise self._lost(f"no answer within {self.options.answer_timeout_s:g} s") from None
        finally:
            self._owed.pop(key, None)

    async def _read(self, stream: _Stream) -> None:
        """Hand out answers; when the stream breaks, send what is unanswered over a new one."""
        loop = asyncio.get_running_loop()
        give_up = pause = 0.0
        while True:
            heard = False
            try:
                async for response in stream.call:
                    heard = True
                    owed = self._owed.get((response.session, response.frame))
                    if owed is not None and not owed[1].done():
                        owed[1].set_result(response)
                error: FederationError = self._lost("it ended the stream")
            except grpc.aio.AioRpcError as failure:
                error = status.from_rpc(failure, self._who, lost=True)
            finally:
                stream.end()
            if heard or not give_up:
                give_up, pause = loop.time() + self.options.resume_timeout_s, 0.0
            # gRPC reports a write to a stream that has just died as INTERNAL
            broken = (
                error.reason is Reason.MEMBER_LOST or error.metadata.get("grpc_code") == "INTERNAL"
            )
            if not broken or loop.time() + pause > give_up:
                self._drop(error)
            if not self._owed:
                self._stream = None
                return
            await asyncio.sleep(pause)
            pause = max(0.05, 2 * pause)
            stream = self._stream = _Stream(self._stub)
            for request, _ in self._owed.values():
                stream.send(request)

    def _drop(self, error: FederationError) -> None:
        for _, answer in self._owed.values():
            if not answer.done():
                answer.set_exception(_anew(error))
        self._owed.clear()

    def _lost(self, why: str) -> TwinError:
        return TwinError(Reason.MEMBER_LOST, f"{self._who} was lost: {why}", {"member": self.name})

    @property
    def _who(self) -> str:
        return f"{self.name} at {self.address}"

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            lost = self._description is not None
            raise status.from_rpc(error, self._who, lost=lost) from error


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
        self._link = link
        self._sizes = sizes
        self._over: FederationError | None = None

    async def advance(self, steps: Sequence[StepInput]) -> list[StepResult]:
        """Do these steps in one frame; the answer has one result for each.

        When a step fails, `done` has the results of those before it. What the twin publishes
        is held to its description, in whatever language it is written.
        """
        self.done = ()
        response = await self._ask(
            twin_pb2.SessionRequest(
                advance=twin_pb2.SessionRequest.Advance(
                    steps=[codec.encode_step_input(step) for step in steps]
                )
            )
        )
        results = []
        for step, message in zip(steps, response.advanced.results, strict=False):
            result = codec.decode_step_result(message)
            self._check(step, result)
            results.append(result)
            self.done = tuple(results)
        if response.HasField("error"):
            raise self._blame(status.decode_error(response.error))
        if len(response.advanced.results) != len(steps):
            raise self._broken(
                f"answered {len(steps)} steps with {len(response.advanced.results)} results"
            )
        return results

    async def snapshot(self) -> bytes:
        """The whole state of the session, for `restore`. Fails with UNSUPPORTED."""
        response = await self._ask(
            twin_pb2.SessionRequest(snapshot=twin_pb2.SessionRequest.Snapshot())
        )
        return response.snapshot_taken.state

    async def restore(self, state: bytes) -> None:
        """Continue from a state of a session of the same twin, seed and parameters."""
        await self._ask(
            twin_pb2.SessionRequest(restore=twin_pb2.SessionRequest.Restore(state=state))
        )

    async def flexibility(self, periods_ns: Sequence[int]) -> LinearBlock | None:
        """What the session could do; None when the twin has nothing to offer."""
        return await self._link.flexibility(self.id, periods_ns)

    async def close(self) -> None:
        """End the session; one that is lost has ended already."""
        if self._over is None:
            with suppress(TwinError):
                await self._ask(twin_pb2.SessionRequest(close=twin_pb2.SessionRequest.Close()))
            self._over = TwinError(
                Reason.MEMBER_LOST,
                f"the session of {self.member} is closed",
                {"member": self.member},
            )

    async def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        """Begin at instant 0; `Link.session` does this."""
        await self._ask(
            twin_pb2.SessionRequest(
                open=twin_pb2.SessionRequest.Open(
                    member=self.member, seed=seed, parameters=parameters
                )
            )
        )

    async def _ask(self, request: twin_pb2.SessionRequest) -> twin_pb2.SessionResponse:
        """One frame and its answer. Raises what went wrong, but for a half-done advance."""
        if self._over is not None:
            raise _anew(self._over)
        request.session = self.id
        request.frame = self.frame + 1
        request.epoch = self.epoch
        request.traceparent = _traceparent()
        limit = self._link.options.max_message_bytes
        if request.ByteSize() > limit:
            raise ScenarioError(
                Reason.MESSAGE_TOO_LARGE,
                f"a frame to {self.member} has {request.ByteSize()} bytes; the limit is {limit}",
                {"member": self.member, "bytes": str(request.ByteSize())},
            )
        self.frame += 1
        try:
            response = await self._link.exchange(request)
        except FederationError as error:
            self._over = self._blame(error)
            raise
        if response.HasField("error"):
            if EXPECTED in response.error.metadata:
                self.frame -= 1
                if response.error.metadata[EXPECTED] == "1" and request.frame > 1:
                    self._over = TwinError(
                        Reason.MEMBER_LOST,
                        f"{self.member} has forgotten its session: its process was restarted",
                        {"member": self.member},
                    )
                    raise self._over
            if not response.HasField("advanced"):
                raise self._blame(status.decode_error(response.error))
        else:
            command, outcome = request.WhichOneof("command"), response.WhichOneof("outcome")
            if (command, outcome) not in _OUTCOMES:
                raise self._broken(f"answered {command} with {outcome}")
        return response

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


_OUTCOMES = frozenset(
    {
        ("open", "opened"),
        ("advance", "advanced"),
        ("snapshot", "snapshot_taken"),
        ("restore", "restored"),
        ("close", "closed"),
    }
)


def _anew(error: FederationError) -> FederationError:
    """The same error for another raise, with a traceback of its own."""
    return type(error)(error.reason, error.message, error.metadata)


def _traceparent() -> str:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")
