"""A service between broker and twin that understands frames, and meddles with them when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import grpc

from federation.v1 import twin_pb2, twin_pb2_grpc

REORDER_S = 0.3
"""How long an answer is held back when no other comes to overtake it."""

INJECT_S = 10.0


How = Literal[
    "request twice",
    "old request",
    "answer twice",
    "answer late",
    "answer lost",
    "stale epoch",
    "strange session",
    "skipped frame",
]


@dataclass(frozen=True)
class Meddling:
    """What happens to the next frame, or the next answer, that comes by.

    `request twice` and `answer twice` let a message pass two times, `old request` sends one of
    before once more, `answer late` lets another overtake it, `answer lost` lets it vanish.
    `stale epoch`, `strange session` and `skipped frame` send the twin a frame of its own, which
    it must refuse.
    """

    how: How


REFUSALS: Mapping[How, str] = {
    "stale epoch": "STALE_EPOCH",
    "strange session": "INVALID_FRAME",
    "skipped frame": "INVALID_FRAME",
}

OF_REQUESTS: tuple[How, ...] = ("request twice", "old request")


class Meddler(twin_pb2_grpc.TwinServicer):
    """Serves the twin that is behind `port` at `self.port`."""

    def __init__(self, target: int, on_meddling: Callable[[Meddling, str], None]) -> None:
        self.port = 0
        self._target = target
        self._on_meddling = on_meddling
        self._for_requests: list[Meddling] = []
        self._for_answers: list[Meddling] = []
        self._seen: list[twin_pb2.SessionRequest] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        twin_pb2_grpc.add_TwinServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self._target}",
            options=[
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        self._stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(self._channel)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(0)
        await self._channel.close()

    def calm(self) -> None:
        """Forget what nothing has met."""
        self._for_requests.clear()
        self._for_answers.clear()
        self._seen.clear()

    def meddle(self, meddling: Meddling) -> None:
        if meddling.how in REFUSALS:
            self._later(self._inject(meddling))
        elif meddling.how in OF_REQUESTS:
            self._for_requests.append(meddling)
        else:
            self._for_answers.append(meddling)

    async def Describe(  # noqa: N802
        self,
        request: twin_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[twin_pb2.DescribeRequest, twin_pb2.DescribeResponse],
    ) -> twin_pb2.DescribeResponse:
        try:
            return await self._stub.Describe(request, timeout=5)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        raise AssertionError("abort raises")

    async def Flexibility(  # noqa: N802
        self,
        request: twin_pb2.FlexibilityRequest,
        context: grpc.aio.ServicerContext[
            twin_pb2.FlexibilityRequest, twin_pb2.FlexibilityResponse
        ],
    ) -> twin_pb2.FlexibilityResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "nobody plans here")
        raise AssertionError("abort raises")

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterable[twin_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[twin_pb2.SessionRequest, twin_pb2.SessionResponse],
    ) -> AsyncIterator[twin_pb2.SessionResponse]:
        answers: asyncio.Queue[twin_pb2.SessionResponse | Exception | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[twin_pb2.SessionRequest]:
            async for request in request_iterator:
                if self._for_requests:
                    meddling = self._for_requests.pop(0)
                    old = request if meddling.how == "request twice" else self._old(request)
                    if old is None:
                        self._for_requests.append(meddling)
                    else:
                        yield old
                        self._on_meddling(meddling, "")
                self._seen.append(request)
                yield request

        async def read() -> None:
            held: twin_pb2.SessionResponse | None = None
            try:
                async for answer in self._stub.Session(requests()):
                    meddling = self._for_answers.pop(0) if self._for_answers else None
                    match meddling and meddling.how:
                        case "answer lost":
                            pass
                        case "answer twice":
                            answers.put_nowait(answer)
                            answers.put_nowait(answer)
                        case "answer late":
                            held = answer
                            asyncio.get_running_loop().call_later(
                                REORDER_S, answers.put_nowait, held
                            )
                        case _:
                            answers.put_nowait(answer)
                    if meddling is not None:
                        self._on_meddling(meddling, "")
                answers.put_nowait(None)
            except grpc.aio.AioRpcError as error:
                answers.put_nowait(error)

        reader = self._later(read())
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, grpc.aio.AioRpcError):
                    await context.abort(answer.code(), answer.details() or "")
                assert isinstance(answer, twin_pb2.SessionResponse)
                yield answer
        finally:
            reader.cancel()

    def _old(self, request: twin_pb2.SessionRequest) -> twin_pb2.SessionRequest | None:
        """A message of the same session, older than the last."""
        frames = _frames(request)
        sessions = {frame.session for frame in frames}
        before = [r for r in self._seen if sessions & {frame.session for frame in _frames(r)}]
        return before[-2] if len(before) > 1 else None

    async def _inject(self, meddling: Meddling) -> None:
        """Send the twin a frame that it must refuse, over a stream of its own."""
        frames = [frame for request in self._seen for frame in _frames(request)]
        if not frames:
            return
        last = frames[-1]
        frame = twin_pb2.SessionRequest(
            session=last.session, frame=last.frame + 1, epoch=last.epoch
        )
        frame.close.SetInParent()
        match meddling.how:
            case "stale epoch":
                frame.epoch -= 1
            case "strange session":
                frame.session = "nobody-1"
            case "skipped frame":
                frame.frame += 7

        async def one() -> AsyncIterator[twin_pb2.SessionRequest]:
            yield frame
            await asyncio.sleep(INJECT_S)

        answer = twin_pb2.SessionResponse()
        call = self._stub.Session(one())
        with suppress(TimeoutError, StopAsyncIteration, grpc.aio.AioRpcError):
            async with asyncio.timeout(INJECT_S):
                answer = await anext(aiter(call))
        call.cancel()
        wanted = REFUSALS[meddling.how]
        found = answer.error.reason
        problem = "" if found == wanted else f"{meddling.how} was answered with {answer}"
        self._on_meddling(meddling, problem)

    def _later(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _frames(request: twin_pb2.SessionRequest) -> list[twin_pb2.SessionRequest]:
    """The frames of a message, which may be one itself."""
    several = list(getattr(request, "frames", ()))
    return several or [request]
