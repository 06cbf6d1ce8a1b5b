"""Keeps a twin's name at a broker: registers, renews, registers again, and leaves."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress

import grpc

from federation.errors import FederationError, Reason
from federation.twin import Description
from federation.v1 import broker_pb2, broker_pb2_grpc
from federation.wire import footing, greeting, secure, status
from federation.wire.party import Part
from federation.wire.profile import SCHEMA, encode_profile, profile_of

RETRY_S = 1.0
"""The pause before a broker that did not answer is asked again."""

CALL_TIMEOUT_S = 5.0


async def keep_name(
    broker: str,
    name: str,
    address: str,
    description: Description,
    say: Callable[[str], None],
) -> None:
    """Hold `name` at the broker until cancelled, and then give it up.

    A broker that is away is waited for; one that comes back without its memory gets a new
    registration. When another process holds the name, its lease is waited out once, since it
    may be of an earlier life of this twin; if it is renewed meanwhile, fails with NAME_LEASED.
    `say` is told, in a line, what a person should know.
    """
    request = broker_pb2.RegisterRequest(
        name=name,
        address=address,
        model=description.model,
        version=description.version,
        domain=description.domain,
        incarnation=uuid.uuid4().hex,
        schema=SCHEMA,
        profile=encode_profile(profile_of(description)),
    )
    async with secure.channel(
        broker,
        footing.expected(Part.BROKER),
        [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 1000)],
    ) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)

        async def register() -> broker_pb2.Lease:
            answer = await stub.Register(request, timeout=CALL_TIMEOUT_S)
            return answer.lease

        lease: broker_pb2.Lease | None = None
        registering: asyncio.Task[broker_pb2.Lease] | None = None
        waited = away = is_known = False
        try:
            while True:
                try:
                    if lease is None:
                        registering = asyncio.create_task(register())
                        lease = await asyncio.shield(registering)
                        say(f"registered {name} with {broker} (epoch {lease.epoch})")
                    else:
                        await asyncio.sleep(lease.ttl.ToTimedelta().total_seconds() / 3)
                        await stub.Renew(
                            broker_pb2.RenewRequest(lease=lease.id), timeout=CALL_TIMEOUT_S
                        )
                    waited = away = False
                    is_known = True
                except grpc.aio.AioRpcError as failure:
                    error = status.from_rpc(failure, f"the broker at {broker}")
                    match error.reason:
                        case Reason.LEASE_UNKNOWN:
                            lease = None
                        case Reason.NAME_LEASED if not waited:
                            waited = True
                            say(f"{error.message}; waiting for its lease to end")
                            await asyncio.sleep(_remaining_s(error) + 0.1)
                        case Reason.UNREACHABLE | Reason.NOT_AUTHENTICATED if (
                            is_known or error.reason is Reason.UNREACHABLE
                        ):  # a certificate that has expired may be replaced any moment
                            refusal = await greeting.plain_refusal(broker)
                            if refusal is not None:
                                raise refusal from None
                            if not away:
                                say(f"{error.message}; trying again")
                            away = True
                            await asyncio.sleep(RETRY_S)
                        case _:
                            raise error from None
        finally:
            with suppress(grpc.aio.AioRpcError):
                if lease is None and registering is not None:
                    lease = await registering  # who ends just now may have a name all the same
                if lease is not None:
                    await stub.Leave(
                        broker_pb2.LeaveRequest(lease=lease.id), timeout=CALL_TIMEOUT_S
                    )


def _remaining_s(error: FederationError) -> float:
    return int(error.metadata.get("expires_in_ns", "0")) / 1e9
