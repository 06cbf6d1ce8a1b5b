"""Refuses bytes that are no message with a reason; gRPC would say that it did not expect them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from federation.errors import Reason, ScenarioError
from federation.wire.status import refusing

_Handler = Any
"""gRPC's own named tuple of what an RPC is read, done and written with; it has no public type."""


class Malformed:
    """What came instead of a message. A stream's handler finds it among the requests."""

    def __init__(self, rpc: str, error: DecodeError) -> None:
        self.refusal = ScenarioError(
            Reason.INVALID_FRAME, f"what came for {rpc} is no request: {error}", {"rpc": rpc}
        )


class SoundRequests(grpc.aio.ServerInterceptor):
    """Refuses, with INVALID_FRAME, requests that can't be read."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, _Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        rpc = handler_call_details.method
        known = self._known.get(rpc)
        if known is None or known[0] is not handler:
            known = self._known[rpc] = (handler, _refusing(rpc, handler))
        return known[1]


def _refusing(rpc: str, handler: _Handler) -> _Handler:
    read = handler.request_deserializer

    def deserialise(data: bytes) -> object:
        try:
            return read(data)
        except DecodeError as error:
            return Malformed(rpc, error)

    inner = handler.unary_unary or handler.unary_stream
    if inner is None:  # whoever reads a stream finds it there
        return handler._replace(request_deserializer=deserialise)

    async def answer(request: Any, context: Any) -> Any:
        async with refusing(context):
            if isinstance(request, Malformed):
                raise request.refusal
        answers = inner(request, context)
        return await answers if isawaitable(answers) else answers

    async def stream(request: Any, context: Any) -> Any:
        async with refusing(context):
            if isinstance(request, Malformed):
                raise request.refusal
        answers = inner(request, context)
        if isawaitable(answers):
            await answers
            return
        async for each in answers:
            yield each

    return handler._replace(
        request_deserializer=deserialise,
        unary_unary=handler.unary_unary and answer,
        unary_stream=handler.unary_stream and stream,
    )
