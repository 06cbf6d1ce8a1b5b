"""Calls a service that is graded as any caller would: frame by frame over the real wire, without
our own client between, so that what is graded is what anybody would meet."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import grpc

from federation.errors import FederationError, Reason
from federation.twin import Description, StepInput, check_outputs
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import caller, codec, footing, secure, status
from federation.wire.link import EXPECTED, MEBIBYTE, NO_ERRAND, Errand, channel_options
from federation.wire.party import Part

STEPS = 6
"""How many steps a session makes where nothing else is said."""

SEED = 7

ANSWER_S = 30.0
"""How long an answer may take."""

MEMBER = "graded"

_T = TypeVar("_T")


class NotOfferedError(Exception):
    """The service does without what a check is about, which the contract allows."""


@contextmanager
def unless_offered(why: str) -> Iterator[None]:
    """Raises NotOfferedError for what is refused with UNSUPPORTED."""
    try:
        yield
    except FederationError as error:
        if error.reason is Reason.UNSUPPORTED:
            raise NotOfferedError(why) from None
        raise


class BrokenError(Exception):
    """The service does not do what the contract says."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How a service is asked: as whom where that is taken without proof, and on what errand."""

    identity: str = ""
    errand: Errand = NO_ERRAND
    city: str = ""
    """The city whose broker has to answer, over TLS; empty for a twin."""


class Graded:
    """A service that is being graded. Its checks are named after what it should do."""

    def __init__(self, address: str, asked: Asked) -> None:
        self.address = address
        self.metadata = caller.claim(asked.identity)
        self.errand = asked.errand.encode()
        expects = (
            footing.expected(Part.BROKER, city=asked.city)
            if asked.city
            else footing.expected(Part.TWIN)
        )
        options = [*channel_options(64 * MEBIBYTE), ("grpc.enable_http_proxy", 0)]
        self.channel = secure.channel(address, expects, options)
        self.stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(self.channel)
        self.described = twin_pb2.DescribeResponse()
        self.description: Description
        self._prefix = uuid.uuid4().hex
        self._serial = itertools.count(1)

    async def describe(self) -> twin_pb2.DescribeResponse:
        """Fails with UNREACHABLE, and as the service refuses."""
        request = twin_pb2.DescribeRequest(errand=self.errand)
        return await self.call(
            self.stub.Describe(request, metadata=self.metadata, timeout=ANSWER_S)
        )

    async def call(self, answer: Awaitable[_T]) -> _T:
        try:
            return await answer
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, f"what is at {self.address}") from None

    async def call_if_offered(self, answer: Awaitable[_T], why: str) -> _T:
        """The same; raises NotOfferedError, saying why, when there is no such thing."""
        with unless_offered(why):
            return await self.call(answer)
        raise AssertionError("what is not offered raises")

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        call = self.stub.Session(metadata=self.metadata)
        try:
            yield Stream(call)
        finally:
            call.cancel()

    @asynccontextmanager
    async def session(self, seed: int = SEED, epoch: int = 1) -> AsyncIterator[Session]:
        """A session over a stream of its own, that is closed afterwards."""
        async with self.stream() as stream:
            session = Session(self, stream, f"{self._prefix}-{next(self._serial)}", epoch)
            await session.open(seed)
            try:
                yield session
            except BaseException:
                with suppress(BrokenError, FederationError):  # what was found first counts
                    await session.close()
                raise
            await session.close()

    def instants_ns(self, count: int) -> list[int]:
        """When a service with a period makes its first steps."""
        policy = self.description.time
        return [policy.offset_ns + n * policy.period_ns for n in range(count)]


class Stream:
    """A stream of frames, to each of which one answer comes."""

    def __init__(
        self, call: grpc.aio.StreamStreamCall[twin_pb2.SessionRequest, twin_pb2.SessionResponse]
    ) -> None:
        self._call = call
        self._answers: list[twin_pb2.SessionResponse] = []

    async def ask(self, *frames: twin_pb2.SessionRequest) -> list[twin_pb2.SessionResponse]:
        """Send frames one by one, and hear as many answers, in the order of the frames."""
        for frame in frames:
            await self._write(frame)
        return await self.hear(frames)

    async def together(self, *frames: twin_pb2.SessionRequest) -> list[twin_pb2.SessionResponse]:
        """The same in one message."""
        await self._write(twin_pb2.SessionRequest(frames=frames))
        return await self.hear(frames)

    async def _write(self, message: twin_pb2.SessionRequest) -> None:
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise BrokenError(f"the stream was lost: {status.from_rpc(error, 'it')}") from None
        except asyncio.InvalidStateError:
            raise BrokenError("the stream was lost") from None

    async def hear(
        self, frames: Sequence[twin_pb2.SessionRequest]
    ) -> list[twin_pb2.SessionResponse]:
        try:
            async with asyncio.timeout(ANSWER_S):
                return [await self._answer_to(frame) for frame in frames]
        except TimeoutError:
            raise BrokenError(f"no answer within {ANSWER_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise BrokenError(f"the stream was lost: {status.from_rpc(error, 'it')}") from None

    async def _answer_to(self, frame: twin_pb2.SessionRequest) -> twin_pb2.SessionResponse:
        while True:
            for answer in self._answers:
                if (answer.session, answer.frame) == (frame.session, frame.frame):
                    self._answers.remove(answer)
                    return answer
            message = await self._call.read()
            if not isinstance(message, twin_pb2.SessionResponse):
                raise BrokenError(f"the stream ended without an answer to frame {frame.frame}")
            self._answers += message.answers or [message]


class Session:
    """One session as any caller has it."""

    def __init__(self, graded: Graded, stream: Stream, id: str, epoch: int) -> None:
        self.graded, self.stream, self.id, self.epoch = graded, stream, id, epoch
        self.frame = 0
        self.last_ns = 0
        self.next_ns: int | None = None
        self._is_open = False

    def request(
        self, frame: int | None = None, epoch: int | None = None
    ) -> twin_pb2.SessionRequest:
        """The next frame without a command, or another one."""
        return twin_pb2.SessionRequest(
            session=self.id,
            frame=self.frame + 1 if frame is None else frame,
            epoch=self.epoch if epoch is None else epoch,
        )

    async def open(self, seed: int, **parameters: float) -> None:
        answer = await self.done(self.opening(seed, **parameters))
        if not answer.HasField("opened"):
            raise BrokenError(f"an open was answered with {answer.WhichOneof('outcome')}")
        self._is_open = True
        self.next_ns = self.graded.description.time.offset_ns

    def opening(self, seed: int, **parameters: float) -> twin_pb2.SessionRequest:
        request = self.request()
        request.open.member, request.open.seed = MEMBER, seed
        request.open.parameters.update(parameters)
        request.open.errand.CopyFrom(self.graded.errand)
        return request

    def stepping(self, *steps: StepInput) -> twin_pb2.SessionRequest:
        request = self.request()
        request.advance.SetInParent()
        for step in steps:
            codec.write_step_input(request.advance.steps.add(), step)
        return request

    async def done(self, request: twin_pb2.SessionRequest) -> twin_pb2.SessionResponse:
        """The answer to a frame that is due; raises what it refuses."""
        (answer,) = await self.stream.ask(request)
        if not answer.HasField("error"):
            self.frame = request.frame
            return answer
        if EXPECTED not in answer.error.metadata:
            self.frame = request.frame
        raise status.decode_error(answer.error)

    async def refusal(self, request: twin_pb2.SessionRequest) -> FederationError:
        """Why a frame is refused."""
        try:
            answer = await self.done(request)
        except FederationError as error:
            return error
        raise BrokenError(f"it was not refused, and answered with {answer.WhichOneof('outcome')}")

    async def advance(self, step: StepInput) -> bytes:
        """Make a step; what was answered, held to the description."""
        answer = await self.done(self.stepping(step))
        results = answer.advanced.results
        if len(results) != 1:
            raise BrokenError(f"one step was answered with {len(results)} results")
        result = codec.decode_step_result(results[0])
        if (result.time_ns, result.micro) != (step.time_ns, step.micro):
            raise BrokenError(
                f"the step at {step.time_ns} ns was answered as one at {result.time_ns} ns"
            )
        check_outputs(MEMBER, self.graded.description.output_sizes(), result)
        if result.next_ns is not None and result.next_ns <= result.time_ns:
            raise BrokenError(f"at {result.time_ns} ns it asks to wake at {result.next_ns} ns")
        self.last_ns, self.next_ns = step.time_ns, result.next_ns
        return results[0].SerializeToString(deterministic=True)

    async def steps(self, count: int = STEPS) -> list[bytes]:
        """Make the next steps of its own; fewer when it wants none any more."""
        period_ns = self.graded.description.time.period_ns
        found: list[bytes] = []
        while len(found) < count and self.next_ns is not None:
            time_ns = self.next_ns
            found.append(await self.advance(StepInput(time_ns)))
            if period_ns:
                self.next_ns = time_ns + period_ns
        return found

    async def snapshot(self) -> bytes:
        """Its state; raises NotOfferedError when it has none."""
        request = self.request()
        request.snapshot.SetInParent()
        with unless_offered("it has no snapshots"):
            return (await self.done(request)).snapshot_taken.state
        raise AssertionError("what is not offered raises")

    def restoring(self, state: bytes) -> twin_pb2.SessionRequest:
        request = self.request()
        request.restore.state = state
        return request

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            request = self.request()
            request.close.SetInParent()
            await self.done(request)
