"""Refuses bytes that are no message with a reason; gRPC would say that it did not expect them."""

from __future__ import annotations

from inspect import isawaitable
from typing import Any

from google.protobuf.message import DecodeError

from federation.errors import Reason, ScenarioError
from federation.wire.status import refusing
from federation.wire.wrapping import Handler, Wrapping


class Malformed:
    """What came instead of a message. A stream's handler finds it among the requests."""

    def __init__(self, rpc: str, error: DecodeError) -> None:
        self.refusal = ScenarioError(
            Reason.INVALID_FRAME, f"what came for {rpc} is no request: {error}", {"rpc": rpc}
        )


class SoundRequests(Wrapping):
    """Refuses, with INVALID_FRAME, requests that can't be read."""

    def wrap(self, rpc: str, handler: Handler) -> Handler:
        return handler if handler.request_deserializer is None else _refusing(rpc, handler)


def _refusing(rpc: str, handler: Handler) -> Handler:
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
