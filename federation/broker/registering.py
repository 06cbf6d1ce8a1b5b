"""Answers for the registry on the wire; the one place that gives it the time."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
from google.protobuf.duration_pb2 import Duration

from federation.broker.registry import Lease, Member, Registry
from federation.v1 import broker_pb2, broker_pb2_grpc
from federation.wire.gate import bearer, check_owns
from federation.wire.profile import check_schema, decode_profile, decode_search, encode_profile
from federation.wire.status import refusing
from federation.wire.trust import Bearer, Trust


class BrokerService(broker_pb2_grpc.BrokerServicer):
    """Registration of twins. `on_gone` is told of members whose leases ended or were left."""

    def __init__(
        self,
        registry: Registry,
        now_ns: Callable[[], int] = time.monotonic_ns,
        on_gone: Callable[[tuple[Lease, ...]], None] = lambda gone: None,
    ) -> None:
        self.registry = registry
        self._now_ns = now_ns
        self._on_gone = on_gone
        self._bearers: dict[str, Bearer] = {}
        """By lease the certificate under which it was asked for, or last renewed."""

    def put_out(self, trust: Trust) -> tuple[Lease, ...]:
        """End the leases of those whose certificates were revoked since; these leases. A
        certificate that has expired may be replaced before the lease ends, and is no reason."""
        gone: list[Lease] = []
        for id_, shown in list(self._bearers.items()):
            lease = self.registry.find(id_)
            if lease is None:
                del self._bearers[id_]
            elif trust.is_revoked(shown):
                del self._bearers[id_]
                self.registry.leave(id_)
                gone.append(lease)
        if gone:
            self._on_gone(tuple(gone))
        return tuple(gone)

    def expire(self) -> None:
        """End the leases whose time is over; the broker calls this now and then."""
        gone = self.registry.expire(self._now_ns())
        if gone:
            self._on_gone(gone)

    async def Register(  # noqa: N802
        self,
        request: broker_pb2.RegisterRequest,
        context: grpc.aio.ServicerContext[broker_pb2.RegisterRequest, broker_pb2.RegisterResponse],
    ) -> broker_pb2.RegisterResponse:
        async with refusing(context):
            check_owns(request.name)
            check_schema(request.schema)
            self.expire()
            member = Member(
                request.name,
                request.address,
                request.incarnation,
                request.model,
                request.version,
                request.domain,
                decode_profile(request.profile),
            )
            lease = self.registry.register(member, self._now_ns())
            self._note(lease)
            return broker_pb2.RegisterResponse(lease=self._lease(lease))

    async def Renew(  # noqa: N802
        self,
        request: broker_pb2.RenewRequest,
        context: grpc.aio.ServicerContext[broker_pb2.RenewRequest, broker_pb2.RenewResponse],
    ) -> broker_pb2.RenewResponse:
        async with refusing(context):
            self.expire()
            self._check_owns(request.lease)
            lease = self.registry.renew(request.lease, self._now_ns())
            self._note(lease)
            return broker_pb2.RenewResponse(lease=self._lease(lease))

    async def Leave(  # noqa: N802
        self,
        request: broker_pb2.LeaveRequest,
        context: grpc.aio.ServicerContext[broker_pb2.LeaveRequest, broker_pb2.LeaveResponse],
    ) -> broker_pb2.LeaveResponse:
        async with refusing(context):
            self._check_owns(request.lease)
            gone = self.registry.leave(request.lease)
            if gone is not None:
                self._on_gone((gone,))
            return broker_pb2.LeaveResponse()
        raise AssertionError("abort raises")

    async def ListMembers(  # noqa: N802
        self,
        request: broker_pb2.ListMembersRequest,
        context: grpc.aio.ServicerContext[
            broker_pb2.ListMembersRequest, broker_pb2.ListMembersResponse
        ],
    ) -> broker_pb2.ListMembersResponse:
        async with refusing(context):
            search = decode_search(request)
            self.expire()
            now_ns = self._now_ns()
            return broker_pb2.ListMembersResponse(
                members=[
                    broker_pb2.Member(
                        name=lease.member.name,
                        address=lease.member.address,
                        model=lease.member.model,
                        version=lease.member.version,
                        domain=lease.member.domain,
                        incarnation=lease.member.incarnation,
                        epoch=lease.epoch,
                        remaining_duration=_duration(lease.expires_ns - now_ns),
                        profile=encode_profile(lease.member.profile),
                    )
                    for lease in self.registry.found(search, now_ns)
                ]
            )
        raise AssertionError("abort raises")

    def _note(self, lease: Lease) -> None:
        shown = bearer()
        if shown is not None:
            self._bearers[lease.id] = shown

    def _check_owns(self, lease_id: str) -> None:
        lease = self.registry.find(lease_id)
        if lease is not None:
            check_owns(lease.member.name)

    def _lease(self, lease: Lease) -> broker_pb2.Lease:
        return broker_pb2.Lease(id=lease.id, epoch=lease.epoch, ttl=_duration(self.registry.ttl_ns))


def _duration(span_ns: int) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(span_ns)
    return duration
