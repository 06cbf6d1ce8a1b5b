"""The phases of a bundle as RPCs, for whoever does what a signed order says: a twin, or a city."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import grpc

from federation.v1 import twin_pb2


class Phases(ABC):
    """Has each order carried out by `_order`."""

    @abstractmethod
    async def _order(
        self, rpc: str, signed: twin_pb2.Signed, context: grpc.aio.ServicerContext[Any, Any]
    ) -> twin_pb2.Receipt:
        """Do what is asked for by an RPC, or refuse it."""

    async def Select(  # noqa: N802
        self,
        request: twin_pb2.SelectRequest,
        context: grpc.aio.ServicerContext[twin_pb2.SelectRequest, twin_pb2.SelectResponse],
    ) -> twin_pb2.SelectResponse:
        receipt = await self._order("select", request.signed, context)
        return twin_pb2.SelectResponse(receipt=receipt)

    async def Operate(  # noqa: N802
        self,
        request: twin_pb2.OperateRequest,
        context: grpc.aio.ServicerContext[twin_pb2.OperateRequest, twin_pb2.OperateResponse],
    ) -> twin_pb2.OperateResponse:
        receipt = await self._order("operate", request.signed, context)
        return twin_pb2.OperateResponse(receipt=receipt)

    async def Confirm(  # noqa: N802
        self,
        request: twin_pb2.ConfirmRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ConfirmRequest, twin_pb2.ConfirmResponse],
    ) -> twin_pb2.ConfirmResponse:
        receipt = await self._order("confirm", request.signed, context)
        return twin_pb2.ConfirmResponse(receipt=receipt)

    async def Release(  # noqa: N802
        self,
        request: twin_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[twin_pb2.ReleaseRequest, twin_pb2.ReleaseResponse],
    ) -> twin_pb2.ReleaseResponse:
        receipt = await self._order("release", request.signed, context)
        return twin_pb2.ReleaseResponse(receipt=receipt)
