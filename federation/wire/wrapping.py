"""Puts something of ours around every RPC of a server, made once for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Handler = Any
"""gRPC's own named tuple of what an RPC is read, done and written with; it has no public type."""


class Wrapping(grpc.aio.ServerInterceptor, ABC):
    """Has each RPC handled by what `wrap` makes of its handler."""

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    @abstractmethod
    def wrap(self, rpc: str, handler: Handler) -> Handler:
        """What handles an RPC instead of `handler`; called once for as long as that is the same."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # there is no such RPC here
        rpc = handler_call_details.method
        known = self._wrapped.get(rpc)
        if known is None or known[0] is not handler:
            known = self._wrapped[rpc] = (handler, self.wrap(rpc, handler))
        return known[1]
