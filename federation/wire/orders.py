"""Asks the desks of a process that hosts a twin, or of a city, under an identity."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from federation.core.bundle import Bundle
from federation.core.desk import Receipt
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import caller, codec, footing, secure, status
from federation.wire.acting import decode_receipt
from federation.wire.credentials import Identity
from federation.wire.link import MEBIBYTE, channel_options
from federation.wire.party import Part

ANSWER_S = 5.0
"""How long a desk may take to answer; it never waits for a step."""


@dataclass(frozen=True, slots=True)
class City:
    """A member that is another city: its name, what it is asked for, and as whom, where that is
    taken without proof (`wire.caller`)."""

    name: str
    purpose: str = ""
    claim: str = ""


class Hand:
    """Orders of one identity to one process. Fails with UNREACHABLE, and as the contract says.

    A city is told of a bundle what is its own part, and of no other member's. Where no `request` is
    given, its id is made of the bundle, the member and what is asked, so that whoever takes over
    from a caller that died asks the same again. Over TLS the process has to be that of the twin
    with this name, or of any twin when there is none; or the broker of the city.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        answer_s: float = ANSWER_S,
        twin: str = "",
        city: City | None = None,
    ) -> None:
        self.address = address
        self.identity = identity
        self.city = city
        self._answer_s = answer_s
        expects = (
            footing.expected(Part.TWIN, twin)
            if city is None
            else footing.expected(Part.BROKER, city=city.name)
        )
        self._metadata = () if city is None else caller.claim(city.claim)
        self._channel = secure.channel(
            address,
            expects,
            [
                *channel_options(64 * MEBIBYTE),
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def select(
        self,
        bundle: Bundle,
        member: str,
        epoch: int,
        window_ns: int,
        arbiter_address: str = "",
        request: str = "",
    ) -> Receipt:
        """Have a member select its part; `arbiter_address` is for when it is left in doubt."""
        order = self._order(bundle.run, member, epoch, request or f"{bundle.id}/{member}/select")
        order.select.bundle.CopyFrom(codec.encode_bundle(self._told(bundle, member)))
        order.select.window_ns = window_ns
        if self.city is None:  # which knows nobody here
            order.select.arbiter_address = arbiter_address
        asked = twin_pb2.SelectRequest(signed=self.identity.sign(order))
        async with self._calling():
            answer = await self._stub.Select(asked, timeout=self._answer_s, metadata=self._metadata)
        return decode_receipt(answer.receipt)

    async def operate(self, bundle: Bundle, member: str, epoch: int, request: str = "") -> Receipt:
        order = self._order(bundle.run, member, epoch, request or f"{bundle.id}/{member}/operate")
        order.operate.bundle = bundle.id
        order.operate.digest = self._told(bundle, member).digest()
        asked = twin_pb2.OperateRequest(signed=self.identity.sign(order))
        async with self._calling():
            answer = await self._stub.Operate(
                asked, timeout=self._answer_s, metadata=self._metadata
            )
        return decode_receipt(answer.receipt)

    async def confirm(self, bundle: Bundle, member: str, epoch: int, request: str = "") -> Receipt:
        order = self._order(bundle.run, member, epoch, request or f"{bundle.id}/{member}/confirm")
        order.confirm.bundle = bundle.id
        order.confirm.digest = self._told(bundle, member).digest()
        asked = twin_pb2.ConfirmRequest(signed=self.identity.sign(order))
        async with self._calling():
            answer = await self._stub.Confirm(
                asked, timeout=self._answer_s, metadata=self._metadata
            )
        return decode_receipt(answer.receipt)

    async def release(self, run: str, member: str, bundle: str, request: str = "") -> Receipt:
        """Undo a bundle at a member; of whatever epoch, since it is towards safety."""
        order = self._order(run, member, 0, request or f"{bundle}/{member}/release")
        order.release.bundle = bundle
        asked = twin_pb2.ReleaseRequest(signed=self.identity.sign(order))
        async with self._calling():
            answer = await self._stub.Release(
                asked, timeout=self._answer_s, metadata=self._metadata
            )
        return decode_receipt(answer.receipt)

    async def halt(self, reason: str, request: str = "") -> str:
        """Stop all that is autonomous in the process; the id by which the stop is lifted."""
        order = twin_pb2.Order(request=request or f"stop-{uuid.uuid4().hex}")
        order.halt.reason = reason
        asked = twin_pb2.HaltRequest(signed=self.identity.sign(order))
        async with self._calling():
            await self._stub.Halt(asked, timeout=self._answer_s, metadata=self._metadata)
        return order.request

    async def lift(self, stops: Sequence[str], request: str = "") -> None:
        order = twin_pb2.Order(request=request or f"lift-{uuid.uuid4().hex}")
        order.lift.stops.extend(stops)
        asked = twin_pb2.LiftRequest(signed=self.identity.sign(order))
        async with self._calling():
            await self._stub.Lift(asked, timeout=self._answer_s, metadata=self._metadata)

    async def look(self, run: str = "", member: str = "") -> twin_pb2.ReadDeskResponse:
        """What is in force in the sessions of the process, and what is stopped.

        A city tells of what is in force by bundles of this identity's city, under the names of a
        `run` and a `member`.
        """
        order = self._order(run, member, 0, f"look-{uuid.uuid4().hex}")
        order.look.SetInParent()
        asked = twin_pb2.ReadDeskRequest(signed=self.identity.sign(order))
        async with self._calling():
            return await self._stub.ReadDesk(asked, timeout=self._answer_s, metadata=self._metadata)
        raise AssertionError("a failed call raises")

    def _order(self, run: str, member: str, epoch: int, request: str) -> twin_pb2.Order:
        order = twin_pb2.Order(request=request, run=run, member=member, epoch=epoch)
        if self.city is not None:
            order.city, order.purpose = self.city.name, self.city.purpose
        return order

    def _told(self, bundle: Bundle, member: str) -> Bundle:
        return bundle if self.city is None else bundle.part_of(member)

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, f"the twin at {self.address}") from None
